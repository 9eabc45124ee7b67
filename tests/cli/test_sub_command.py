"""`sub`: where it begins, where it ends, and that nothing is lost without a word."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import trio
from trio.testing import MockClock, lockstep_stream_pair, wait_all_tasks_blocked

from broker import Broker, Config, TopicRules
from broker.cli.sub_command import TOPICS_MOST, Loss, Losses, Output, _print_messages
from broker.client import open_client
from broker.client.testing import KEPT, FakeBroker, pub
from broker.core.messages import Position, Publication
from broker.testing import open_test_broker
from tests.cli.conftest import Served

pytestmark = pytest.mark.usefixtures("logging_restored")


@contextmanager
def published(
    served: Served, topic: str, *values: object, subscriptions: int = 1
) -> Iterator[None]:
    """Publish as soon as somebody listens, by so many subscriptions."""
    served.wait_left("subscriptions")

    def publish() -> None:
        served.wait_until("subscriptions", subscriptions)
        for value in values:
            served.api("publish", channel=topic, data=value)

    thread = threading.Thread(target=publish)
    thread.start()
    yield
    thread.join()


def test_it_ends_after_so_many(served: Served) -> None:
    with published(served, "two", 1, 2, 3):
        assert served.ok("sub", "two", "--count", "2") == "two 1 1\ntwo 2 2\n"


def test_it_prints_what_the_server_has_subscribed_it_to(served: Served) -> None:
    for pattern, subscriptions in (("of.server", 1), ("of.*", 2)):
        with published(served, "of.server", 1, 2, 3, subscriptions=subscriptions):
            rows = served.json("sub", pattern, "--token", "reader", "--count", "3")
        assert [row["data"] for row in rows] == [1, 2, 3]
    refused = served.invoke("sub", "of.server", "--token", "reader", "--since", "1")
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "already subscribed (105)" in refused.stderr


@pytest.mark.parametrize("pattern", ["quiet", "of.server"], ids=["its own", "the server's"])
def test_it_prints_what_is_sent_to_its_connection_alone(served: Served, pattern: str) -> None:
    served.wait_left("subscriptions")

    def push() -> None:
        served.wait_until("subscriptions", 1)
        fd = int(next(iter(served.api("connections")["connections"])))
        served.api("push", fd=fd, data={"by": "fd"})
        served.api("publish", channel="user:reader", data={"by": "user"})

    thread = threading.Thread(target=push)
    thread.start()
    rows = served.json("sub", pattern, "--token", "reader", "--count", "2")
    thread.join()
    assert [(row["topic"].split(":")[0], row["offset"], row["data"]) for row in rows] == [
        ("fd", 0, {"by": "fd"}),
        ("user", 0, {"by": "user"}),
    ]


def test_it_begins_with_the_last_that_are_kept(served: Served) -> None:
    for number in range(5):
        served.api("publish", channel="kept", data=number)
    assert served.ok("sub", "kept", "--history", "2", "--count", "2") == "kept 4 3\nkept 5 4\n"
    assert served.ok("sub", "kept", "--history", "99", "--count", "1") == "kept 1 0\n"
    with published(served, "kept", "new"):
        text = served.ok("sub", "kept", "--history", "1", "--count", "2")
    assert text == 'kept 5 4\nkept 6 "new"\n'


def test_it_begins_with_nothing_where_nothing_is_kept(served: Served) -> None:
    with published(served, "empty", 1):
        assert served.ok("sub", "empty", "--history", "5", "--count", "1") == "empty 1 1\n"


def test_it_begins_behind_a_position(served: Served) -> None:
    for number in range(3):
        served.api("publish", channel="since", data=number)
    epoch = served.api("history", channel="since")["epoch"]
    for since in ("1", f"1:{epoch}"):
        rows = served.json("sub", "since", "--since", since, "--count", "2")
        assert [(row["offset"], row["epoch"]) for row in rows] == [(2, epoch), (3, epoch)]


def test_a_position_that_is_gone_is_told(served: Served) -> None:
    served.api("publish", channel="other", data=0)
    with published(served, "other", 1):
        result = served.invoke("sub", "other", "--since", "1:gone", "--count", "1")
    assert result.stdout == "other 2 1\n"
    assert result.stderr == (
        "lost: publications of 'other' may be missing here: it was away for longer than they are "
        "kept\n"
    )
    with published(served, "other", 1):
        rows = served.json("sub", "other", "--since", "1:gone", "--count", "1")
    assert rows[0] == {"lost": None, "topic": "other", "first": 0, "last": 0}


def test_members_of_a_group_take_turns(served: Served) -> None:
    with published(served, "work", 1):
        assert served.ok("sub", "work", "--group", "g", "--count", "1") == "work 1 1\n"


# losses


def publication(topic: str, offset: int) -> Publication:
    return Publication(topic, b"1", None, offset)


def losses_of(offsets: list[int], **fields: Any) -> list[tuple[int, int]]:
    losses = Losses(**fields)
    found = [loss for offset in offsets for loss in losses.before(publication("t", offset))]
    return [(loss.first, loss.last) for loss in found]


@pytest.mark.parametrize(
    ("offsets", "lost"),
    [
        ([1, 2, 3], []),
        ([1, 9], [(2, 8)]),
        ([5, 6, 8, 9, 11], [(7, 7), (10, 10)]),
        ([5, 0, 6], []),  # one that is not kept has no offset
        ([5, 3, 4], []),  # a retained one, or a history that has begun anew
        ([0, 0], []),
    ],
)
def test_what_is_missing_between_offsets_is_lost(
    offsets: list[int], lost: list[tuple[int, int]]
) -> None:
    assert losses_of(offsets) == lost
    assert losses_of(offsets, is_group=True) == []


def test_each_topic_of_a_pattern_is_counted_for_itself_within_bounds() -> None:
    losses = Losses()
    for number in range(TOPICS_MOST + 5):
        assert list(losses.before(publication(f"t{number}", 1))) == []
    assert list(losses.before(publication(f"t{TOPICS_MOST}", 3))) == [Loss(f"t{TOPICS_MOST}", 2, 2)]
    assert list(losses.before(publication("t0", 9))) == [], "the longest ago is forgotten"


def test_a_loss_is_said_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    found = [Loss("a\x1b", 2, 8), Loss("b", 3, 3), Loss("c")]
    Output(Losses(), None, as_json=False).tell(iter(found))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(r"lost: 7 of 'a\x1b', offsets 2 to 8: ")
    assert lines[1].startswith("lost: 1 of 'b', offset 3: ")
    assert lines[2].startswith("lost: publications of 'c' may be missing here: ")
    Output(Losses(), None, as_json=True).tell(iter(found))
    assert [json.loads(line)["lost"] for line in capsys.readouterr().out.splitlines()] == [
        7,
        1,
        None,
    ]


async def test_what_a_slow_subscriber_is_not_given_is_told(autojump_clock: MockClock) -> None:
    """From offset 1 to 9, as a topic drops the oldest for those that cannot follow."""
    rules = TopicRules(slow_consumer="drop_oldest")
    broker = Broker(Config(topics=rules, outbox_messages=1))

    async with open_test_broker(broker) as net:

        async def connect(host: str, port: int) -> Any:
            return await net.listener.connect(lockstep_stream_pair)

        async with (
            open_client("ws://test", open_stream=connect) as client,
            client.subscribe("t", recoverable=False) as subscription,
        ):
            losses = Losses()
            await wait_all_tasks_blocked()
            found: list[Loss] = []
            offsets: list[int] = []
            for number in range(9):
                net.broker.publish_nowait("t", number)
            await wait_all_tasks_blocked()
            net.broker.publish_nowait("t", "last")
            while not offsets or offsets[-1] < 10:
                each = await anext(subscription)
                found += losses.before(each)
                offsets.append(each.offset)
            missing = sorted({*range(offsets[0], 11)} - {*offsets})
            told = [number for loss in found for number in range(loss.first, loss.last + 1)]
            assert told == missing


def test_losses_are_counted_from_where_a_subscription_begins() -> None:
    losses = Losses()
    losses.begin("t", Position(4, "e"))
    losses.begin("u", Position(1, "e"))
    assert list(losses.gap("t", 0)) == []
    assert list(losses.before(publication("t", 7))) == [Loss("t", 5, 6)]
    assert list(losses.gap("t", 1)) == [Loss("t")]
    assert list(losses.gap("t", 1)) == []
    assert list(losses.before(publication("t", 90))) == [], "told already"
    assert list(losses.before(publication("u", 3))) == [Loss("u", 2, 2)]
    assert list(losses.gap("*", 1)) == [Loss("*")]
    assert list(losses.before(publication("u", 9))) == [], "told already, of all it matches"


async def test_topics_of_the_server_s_are_recovered_and_their_losses_told(
    nursery: trio.Nursery, capsys: pytest.CaptureFixture[str], autojump_clock: MockClock
) -> None:
    fake = FakeBroker(nursery)
    async with fake.client(subs={"news": {**KEPT, "offset": 3}}) as (client, peer):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_print_messages, client, "*", Output(Losses(), None, as_json=True))
            await peer.publish(5)
            await peer.drop()
            recovered = {**KEPT, "recovered": True, "publications": [pub(6), pub(7)]}
            peer = await fake.greet(subs={"news": recovered})
            await peer.drop()
            peer = await fake.greet(subs={"news": {**KEPT, "epoch": "new", "offset": 1}})
            await peer.publish(2)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row.get("first"), row.get("offset"), row.get("epoch")) for row in rows] == [
        (4, None, None),
        (None, 5, "e"),
        (None, 6, "e"),
        (None, 7, "e"),
        (0, None, None),
        (None, 2, "new"),
    ]


def test_sub_comes_back_to_what_the_server_has_subscribed_it_to(served: Served) -> None:
    """With a real broker: what is published while it is away is printed once, and nothing is lost."""
    with published(served, "of.server", 1):
        before = served.json("sub", "of.server", "--token", "reader", "--count", "1")[0]["offset"]

    served.wait_left("subscriptions")

    def cut() -> None:
        served.wait_until("subscriptions", 1)
        served.api("publish", channel="of.server", data="before")
        for fd in served.api("connections")["connections"]:
            order = {"code": 4000, "reason": "again"}
            served.api("disconnect", client=fd, disconnect=order)
        served.api("publish", channel="of.server", data="away")

    thread = threading.Thread(target=cut)
    thread.start()
    result = served.invoke("sub", "of.server", "--token", "reader", "--count", "2", "--json")
    thread.join()
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["data"] for row in rows] == ["before", "away"]
    assert [row["offset"] for row in rows] == [before + 1, before + 2]
