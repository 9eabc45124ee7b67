"""`connections`, `connection`, `topics`, `disconnect`, `stats`: what they print of a real broker."""

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from tests.cli.conftest import COMMAND, PATIENCE, Served


@contextmanager
def subscriber(served: Served, topic: str, user: str) -> Iterator[int]:
    """A client that listens; its fd."""
    before = {row["fd"] for row in served.json("connections", "--limit", "1000")}
    command = [*COMMAND, "sub", topic, "--url", served.url, "--token", user]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + PATIENCE
        new: list[int] = []
        while not new:
            assert time.monotonic() < deadline
            rows = served.json("connections", "--user", user)
            new = [row["fd"] for row in rows if row["fd"] not in before and row["topics"]]
        yield new[0]
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def clients(served: Served) -> Iterator[tuple[int, int]]:
    with ExitStack() as stack:
        ann = stack.enter_context(subscriber(served, "news", "ann"))
        bob = stack.enter_context(subscriber(served, "a.*", "bob"))
        yield ann, bob


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ((), (0, 1)),
        (("--user", "ann"), (0,)),
        (("--user", "nobody"), ()),
        (("--topic", "news"), (0,)),
        (("--topic", "a.*"), (1,)),
        (("--address", "127.0.0.1:"), (0, 1)),
        (("--address", "10."), ()),
        (("--app", "trio-broker"), (0, 1)),
        (("--app", "js"), ()),
        (("--limit", "1"), (0,)),
    ],
)
def test_connections_are_listed_as_they_are_asked_for(
    served: Served, clients: tuple[int, int], query: tuple[str, ...], found: tuple[int, ...]
) -> None:
    expected = [clients[place] for place in found]
    assert [row["fd"] for row in served.json("connections", *query)] == expected
    table = served.ok("connections", *query).splitlines()
    assert [int(line.split()[0]) for line in table[1:]] == expected
    assert table[0].split()[:5] == ["FD", "USER", "ADDRESS", "PROTOCOL", "APP"]


def test_more_connections_than_a_page_are_all_listed(
    served: Served, clients: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broker.cli.admin_commands.PAGE", 1)
    assert [row["fd"] for row in served.json("connections")] == list(clients)


def test_one_connection_is_shown_with_all_that_is_known(
    served: Served, clients: tuple[int, int]
) -> None:
    (row,) = served.json("connection", str(clients[0]))
    assert (row["user"], row["topics"], row["established"]) == ("ann", ["news"], True)
    text = served.ok("connection", str(clients[0])).splitlines()
    words = dict(line.split(maxsplit=1) for line in text[:4])
    assert words == {
        "fd": str(clients[0]),
        "state": "connected",
        "user": "ann",
        "address": row["address"],
    }
    assert "topics      1 of 500" in text


def test_why_a_connection_was_closed_is_told_with_what_it_had_subscribed_to(
    served: Served,
) -> None:
    with subscriber(served, "gone", "carl") as fd:
        result = served.invoke(
            "disconnect", str(fd), "99999", "--code", "4500", "--reason", "no\x1b[2J"
        )
        assert result.exit_code == 1
        assert result.stderr == "Error: no connection has fd 99999\n"
        deadline = time.monotonic() + PATIENCE
        while "closed" not in (text := served.ok("connection", str(fd))):
            assert time.monotonic() < deadline
    assert r"4500 no\x1b[2J, by server" in text
    assert text.splitlines()[-1].split() == ["gone"]
    assert "\x1b" not in text
    (row,) = served.json("connection", str(fd))
    assert (row["code"], row["initiator"], row["topics"]) == (4500, "server", ["gone"])
    first = served.ok("connections", "--closed", "--user", "carl").splitlines()[1]
    assert first.split()[2:4] == [str(fd), "carl"]
    assert served.json("connections", "--closed", "--user", "carl")[0]["fd"] == fd


def test_an_order_that_is_refused_is_told_as_it_is(served: Served) -> None:
    """And not as that of a connection that is not here."""
    with subscriber(served, "here", "eve") as fd:
        result = served.invoke("disconnect", str(fd), "--code", "99")
        assert (result.exit_code, "code" in result.stderr) == (1, True), result.stderr
        assert "no connection has fd" not in result.stderr
        assert "connected" in served.ok("connection", str(fd))


@pytest.mark.parametrize("command", ["connection", "disconnect", "push"])
@pytest.mark.parametrize("fd", ["x", "0", "-", "07", "9" * 19, "1.5", "１"])
def test_what_is_no_fd_is_told(served: Served, command: str, fd: str) -> None:
    result = served.invoke(command, fd, *(["1"] if command == "push" else []))
    assert result.exit_code == 2
    assert f"{fd!r} is no fd: expected a number from 1 on" in result.stderr


def test_all_connections_of_a_user_are_closed(served: Served) -> None:
    with subscriber(served, "x", "dora") as fd:
        assert served.ok("disconnect", "--user", "dora") == ""
        deadline = time.monotonic() + PATIENCE
        while served.json("connections", "--user", "dora"):
            assert time.monotonic() < deadline
    assert served.json("connection", str(fd))[0]["code"] == 3503


def test_a_connection_that_never_was_is_a_refusal(served: Served) -> None:
    result = served.invoke("connection", "99999")
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: fd 99999 is not here, nor among the last 1,000 connections that have ended\n"
    )


def test_topics_are_listed_the_busiest_first(served: Served, clients: tuple[int, int]) -> None:
    with subscriber(served, "news", "eve"):
        rows = served.json("topics")
        assert rows == [
            {"topic": "news", "subscriptions": 2},
            {"topic": "a.*", "subscriptions": 1},
        ]
        assert served.ok("topics", "ne*").splitlines() == [
            "SUBSCRIPTIONS  TOPIC",
            "            2  news",
        ]


def test_stats_say_what_is_here(served: Served, clients: tuple[int, int]) -> None:
    (stats,) = served.json("stats")
    assert (stats["connections"], stats["users"]) == (2, 2)
    words = dict(line.split(maxsplit=1) for line in served.ok("stats").splitlines())
    assert words["connections"].endswith(": 2 centrifuge-json over websocket")
    assert words["users"] == "2"


@pytest.mark.parametrize("command", ["connections", "topics", "stats", "top --count 1 --json"])
def test_a_wrong_key_is_a_mistake_of_one_line(served: Served, command: str) -> None:
    result = served.invoke(*command.split(), env={"BROKER_API_KEY": "wrong"})
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "does not take this key" in result.stderr
    assert "wrong" not in result.stderr


def test_versions_are_told(served: Served) -> None:
    (found,) = served.json("version")
    assert found["trio-broker"]
    assert served.ok("version").splitlines()[0].split() == ["trio-broker", found["trio-broker"]]
    assert json.dumps(found)
