"""`trace`: a line for each thing that happens, clean and in order."""

import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import trio

from broker.cli.trace_command import _echo
from broker.client import open_client
from tests.cli.conftest import Served


@pytest.fixture(autouse=True)
def the_last_has_ended(served: Served) -> None:
    served.wait_left("traces")


@contextmanager
def meanwhile(*steps: Callable[[], object]) -> Iterator[None]:
    """Carry out some steps in a thread, while the block runs."""
    thread = threading.Thread(target=lambda: [step() for step in steps])
    thread.start()
    yield
    thread.join()


def traced(served: Served, what: str, *options: str, then: Callable[[], object]) -> list[str]:
    served.wait_left("traces")
    with meanwhile(lambda: served.wait_until("traces", 1), then):
        return served.ok("trace", what, *options).splitlines()


def publish(served: Served, topic: str, *values: object) -> Callable[[], object]:
    return lambda: [served.api("publish", channel=topic, data=value) for value in values]


def test_a_topic_is_traced(served: Served) -> None:
    lines = traced(
        served, "news", "--count", "2", then=publish(served, "news", "a\x1b[2J", {"b": 1})
    )
    assert [line.split(maxsplit=1)[1] for line in lines] == [
        r'- - published news #1 "a\u001b[2J"',
        '- - published news #2 {"b": 1}',
    ]


def test_the_same_as_json(served: Served) -> None:
    lines = traced(served, "j.*", "--count", "1", "--json", then=publish(served, "j.x", "\x9b31m"))
    (line,) = lines
    assert "\x9b" not in line
    fields = json.loads(line)
    assert fields["time"] > 0
    assert {**fields, "time": 0} == {
        "time": 0,
        "kind": "published",
        "topic": "j.x",
        "offset": 1,
        "size": len('"\x9b31m"'.encode()),
        "text": '"\x9b31m"',
    }


def test_a_connection_is_traced_until_it_ends(served: Served) -> None:
    async def client() -> None:
        async with open_client(served.url, token="ann") as opened:
            fds.append(opened.fd)
            connected.set()
            await trio.to_thread.run_sync(served.wait_until, "traces", 1)
            await opened.publish("t", {"n": 1})

    fds: list[int] = []
    connected = threading.Event()
    with meanwhile(lambda: trio.run(client)):
        assert connected.wait(60)
        lines = served.ok("trace", str(fds[0])).splitlines()
    kinds = [line.split()[3] for line in lines]
    assert kinds[:2] == ["received", "sent"]
    assert kinds[-1] == "disconnected"
    assert all(line.split()[1:3] == [str(fds[0]), "ann"] for line in lines)
    assert '"publish":{"channel":"t","data":{"n":1}}' in lines[0]
    assert lines[-1].split(maxsplit=4)[4].startswith("code=1000 ")


def test_what_is_missing_is_told(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    _echo({"time": 0.0, "kind": "sent", "fd": 7, "text": "x", "missed": 3}, as_json=False)
    captured = capsys.readouterr()
    assert captured.err == "missed: 3 lines, as more happens than is shown\n"
    assert captured.out.endswith(" 7 - sent x\n")


@pytest.mark.parametrize(
    ("what", "message", "status"),
    [
        ("99999", "Error: the broker refused: no connection has fd 99999 (102)\n", 1),
        ("a.*.>.b", "Error: the broker refused: ", 1),
    ],
)
def test_what_cannot_be_traced_is_a_refusal(
    served: Served, what: str, message: str, status: int
) -> None:
    result = served.invoke("trace", what)
    assert result.exit_code == status
    assert result.stderr.startswith(message)


def test_a_name_that_looks_like_a_pattern_is_noted(served: Served) -> None:
    with meanwhile(lambda: served.wait_until("traces", 1), publish(served, "a/+/b", 1)):
        result = served.invoke("trace", "a/+/b", "--count", "1")
    assert result.stderr == (
        "note: 'a/+/b' is the name of one topic, no pattern: did you mean 'a.*.b'? Names are split at dots\n"
    )


def test_ctrl_c_ends_it_with_130_and_the_trace_with_it(served: Served) -> None:
    with meanwhile(
        lambda: served.wait_until("traces", 1),
        lambda: signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT),
    ):
        result = served.invoke("trace", "news")
    assert result.exit_code == 130
    assert result.stderr == ""
    assert served.api("stats")["traces"] == 0
