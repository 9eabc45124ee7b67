"""`pub`, `history`, `presence`, `request`, with all their options, against a real broker."""

import json
import threading

import pytest
import trio

from broker.client import open_client
from broker.core.messages import Publication
from tests.cli.conftest import Served

pytestmark = pytest.mark.usefixtures("logging_restored")


def kept(served: Served, topic: str) -> list[object]:
    found = served.api("history", channel=topic, limit=-1)["publications"]
    return [each["data"] for each in found]


def test_pub_publishes_so_many_times(served: Served) -> None:
    assert served.ok("pub", "count", '{"n":1}', "--count", "3") == ""
    assert kept(served, "count") == [{"n": 1}] * 3


def test_pub_tells_what_became_of_each(served: Served) -> None:
    report = {"matched": 0, "queued": 0, "dropped": 0, "failed": []}
    assert served.json("pub", "told", "1", "--count", "2") == [report, report]


def test_pub_keeps_to_a_rate(served: Served) -> None:
    began = trio.run(clock)
    served.ok("pub", "rate", "1", "--count", "4", "--rate", "10")
    assert trio.run(clock) - began >= 0.3


async def clock() -> float:
    import time

    return time.monotonic()


def test_pub_retains_and_the_next_subscriber_has_it_at_once(served: Served) -> None:
    served.ok("pub", "kept.value", '"now"', "--retain")
    line = served.ok("sub", "kept.*", "--count", "1")
    assert line == 'kept.value 0 "now"\n'


def test_pub_with_a_key_publishes_once(served: Served) -> None:
    for _ in range(3):
        served.ok("pub", "once", "1", "--key", "order-7", "--token", "ann")
    assert kept(served, "once") == [1]


def test_pub_with_tags_goes_by_the_api(served: Served) -> None:
    (report,) = served.json(
        *("pub", "tagged", "1", "--tag", "city=Rome", "--tag", "a=b=c", "--retain", "--key", "k")
    )
    assert report["offset"] == 1
    (line,) = served.json("history", "tagged")
    assert line["tags"] == {"city": "Rome", "a": "b=c"}
    assert served.json(*("pub", "tagged", "1", "--tag", "x=y", "--key", "k"))[0]["offset"] == 1


def test_history_is_printed_as_it_is_asked_for(served: Served) -> None:
    for number in range(5):
        served.api("publish", channel="past", data=number)
    epoch = served.api("history", channel="past")["epoch"]
    for options, offsets in (
        ((), [1, 2, 3, 4, 5]),
        (("--limit", "2"), [1, 2]),
        (("--limit", "0"), []),
        (("--reverse", "--limit", "2"), [5, 4]),
        (("--since", "3"), [4, 5]),
        (("--since", f"3:{epoch}"), [4, 5]),
    ):
        rows = served.json("history", "past", *options)
        assert [row["offset"] for row in rows] == offsets
        assert {row["epoch"] for row in rows} <= {epoch}
        text = served.ok("history", "past", *options)
        assert text == "".join(f"past {offset} {offset - 1}\n" for offset in offsets)


@pytest.mark.parametrize(
    ("command", "message", "status"),
    [
        ("history past --since 1:other", "the broker refused: unrecoverable position (112)", 1),
        ("history past --since x", "--since 'x' is not like OFFSET or OFFSET:EPOCH", 2),
        (
            "history a.*",
            "Error: history of 'a.*': the broker refused: a pattern has no history: ask for one t",
            1,
        ),
        (
            "presence a.*",
            "Error: presence of 'a.*': the broker refused: a pattern has no presence: ask for one",
            1,
        ),
        ("request fd:99999 1", "Error: request to 'fd:99999': ", 1),
        (
            "request nobody-there 1",
            "Error: request to 'nobody-there': nobody listens to nobody-there in",
            1,
        ),
        ("pub a.* 1 --json", "Error: publish to 'a.*': the broker refused: ", 1),
        ("pub a.* 1 --tag a=b", "Error: publish to 'a.*': the broker refused: ", 1),
    ],
)
def test_a_refusal_names_what_was_asked_for(
    served: Served, command: str, message: str, status: int
) -> None:
    served.api("publish", channel="past", data=0)
    result = served.invoke(*command.split())
    assert result.exit_code == status
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "command", ["history n*", "presence n*", "pub n* 1", "connections --topic n*"]
)
def test_a_topic_that_looks_like_a_pattern_is_told(served: Served, command: str) -> None:
    result = served.invoke(*command.split())
    assert result.exit_code == 0
    hint = "note: 'n*' is the name of one topic, no pattern: did you mean 'n.*'?"
    assert result.stderr == f"{hint} Names are split at dots\n"


def test_presence_and_request_reach_a_client(served: Served) -> None:
    async def responder() -> None:
        async with (
            open_client(served.url, token="ann\x9b") as client,
            trio.open_nursery() as nursery,
        ):
            async with client.subscribe("room"), client.subscribe("work", group="g") as work:
                ready.set()
                publication = await anext(work)
                answer = {"you said": publication.value, "\x1b": "\x9b"}
                tags = publication.tags or {}
                await client.rpc("reply", {"reply_to": tags["reply_to"], "data": answer})
                await trio.to_thread.run_sync(done.wait)
                nursery.cancel_scope.cancel()

    ready, done = threading.Event(), threading.Event()
    thread = threading.Thread(target=trio.run, args=(responder,))
    thread.start()
    try:
        assert ready.wait(60)
        (row,) = served.json("presence", "room")
        assert row["user"] == "ann\x9b"
        assert row["conn_info"] == {"name": "ann\x9b"}
        text = served.ok("presence", "room")
        assert text == f'{row["client"]} ann\\x9b {{"name":"ann\\u009b"}}\n'
        answered = served.ok("request", "work", '{"a":1}')
        assert "\x1b" not in answered
        assert "\x9b" not in answered
        assert json.loads(answered) == {"you said": {"a": 1}, "\x1b": "\x9b"}
    finally:
        done.set()
        thread.join()


def test_a_publication_is_not_shown_with_an_epoch_that_is_not_known() -> None:
    from broker.cli.output import publication_as_json

    publication = Publication("t", b"1")
    assert "epoch" not in json.loads(publication_as_json(publication))
    assert json.loads(publication_as_json(publication, "e"))["epoch"] == "e"
