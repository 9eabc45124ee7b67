"""`top`: what it draws, and how it ends."""

import json
import signal
import sys
import threading
from typing import Any

import pytest
from rich.console import Console

from broker.cli.top import Look, drawn
from tests.cli.conftest import Served

NODE: dict[str, Any] = {
    "node": "a\x1b[2J",
    "id": "",
    "alive": True,
    "version": "1",
    "uptime": 10.0,
    "draining": True,
    "connections": 1234,
    "connections_max": 20000,
    "users": 7,
    "topics": 3,
    "patterns": 1,
    "subscriptions": 99,
    "published": 100,
    "delivered": 1000,
    "messages_received": 50,
    "bytes_received": 2048,
    "messages_queued": 60,
    "bytes_queued": 4096,
    "messages_dropped": 5,
    "memory": {"held": 2**20, "limit": 2**30},
    "queues": {"messages": {"bounds": [0, 1], "counts": [1200, 30, 4], "count": 1234, "sum": 9}},
    "loop_lag": {"bounds": [0.001, 0.01], "counts": [1, 98, 1], "count": 100, "sum": 1},
}
CLOSED = {
    "closed_at": 0.0,
    "fd": 7,
    "user": "[red]\x9b",
    "address": "10.0.0.1:5",
    "code": 3008,
    "reason": "slow",
    "initiator": "slow",
    "node": "b",
}
HEAVY = {
    "fd": 8,
    "user": "[b]",
    "address": "10.0.0.2:5",
    "app_name": "js",
    "app_version": "5",
    "bytes_queued": 2048,
    "messages_dropped": 3,
    "bytes_received": 1,
    "bytes_sent": 5,
    "node": "b",
}


def stats(*nodes: dict[str, Any]) -> dict[str, Any]:
    return {**NODE, "nodes": list(nodes), "heaviest": [HEAVY], "closed_last": [CLOSED]}


def printed(look: Look, capsys: pytest.CaptureFixture[str]) -> list[str]:
    Console(file=sys.stdout, width=120).print(drawn(look))
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\x9b" not in out
    return [line.rstrip() for line in out.splitlines()]


def test_a_look_is_drawn_clean_and_without_markup(capsys: pytest.CaptureFixture[str]) -> None:
    before = stats({**NODE, "uptime": 8.0, "delivered": 0, "bytes_queued": -6_000_000})
    lines = printed(Look.of(before, stats(NODE)), capsys)
    assert lines[0] == r"a\x1b[2J  1  up 10s, draining"
    assert any(
        line.split() == ["behind", "34", "connections", "bytes", "out", "2.9M", "4.0K"]
        for line in lines
    )
    assert any("500" in line and "1,000" in line for line in lines)
    assert any("< 10 ms" in line for line in lines)
    assert any(line.split() == ["8", "[b]", "10.0.0.2:5", "js", "2.0K", "1", "5"] for line in lines)
    assert r"[red]\x9b" in lines[-1]
    assert lines[-1].endswith("3008 slow, by slow")
    assert not any("NODE" in line for line in lines)


def test_several_nodes_have_a_line_each_and_who_is_silent_is_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = {**NODE, "node": "b", "id": "2", "connections": 5, "draining": False}
    dead = {"node": "c\x1b", "id": "3", "alive": False, "reason": "x"}
    lines = printed(Look.of(None, stats(NODE, other, dead)), capsys)
    assert lines[0] == r"2 of 3 nodes, by a\x1b[2J"
    assert lines[1] == r"no answer from c\x1b: the sums are without"
    rows = [line.split() for line in lines]
    assert ["b", "10s", "5", "0", "0", "1.0M", "34", "<", "10", "ms"] in rows
    assert [r"c\x1b", "no", "answer", *["-"] * 6] in rows
    assert any(row[:1] == ["8"] and row[-1] == "b" for row in rows)
    assert rows[-1][-1] == "b"


def test_rates_are_of_the_time_between_two_answers_of_a_node() -> None:
    later = {**NODE, "uptime": 12.0, "published": 150}
    other = {**NODE, "id": "2", "uptime": 100.0}
    other_later = {**other, "uptime": 104.0, "published": 120}
    look = Look.of(stats(NODE, other), stats(later, other_later))
    assert [rates["published"] for rates in look.by_node] == [25.0, 5.0]
    assert look.rates["published"] == 30.0
    assert Look.of(None, stats(later)).rates["published"] == 0.0
    assert Look.of(stats(later), stats(NODE)).rates["published"] == 0.0, "one that began anew"
    silent = {"node": "b", "id": "2", "alive": False, "reason": "x"}
    for before, now in ((silent, other_later), (other, silent)):
        look = Look.of(stats(NODE, before), stats(later, now))
        assert look.rates["published"] == 25.0
        assert look.by_node[1]["published"] == 0.0


def test_top_looks_as_often_as_it_is_told(served: Served) -> None:
    served.api("publish", channel="t", data=1)
    looks = [
        json.loads(line)
        for line in served.ok("top", "--count", "2", "--seconds", "0.2", "--json").splitlines()
    ]
    assert [look["stats"]["published"] for look in looks] == [1, 1]
    assert looks[0]["rates"]["published"] == 0.0
    text = served.ok("top", "--count", "1")
    assert "connections" in text
    assert "CLOSED" in text


def test_ctrl_c_ends_it_with_130(served: Served) -> None:
    def interrupt() -> None:
        import time

        time.sleep(1)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    result = served.invoke("top", "--json", "--seconds", "0.2")
    thread.join()
    assert result.exit_code == 130
    assert result.stderr == ""


def test_without_rich_it_says_how_to_get_it(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    result = served.invoke("top", "--count", "1")
    assert result.exit_code == 2
    assert result.stderr == (
        "Error: top needs the package `rich`: pip install '.[top]', or use --json\n"
    )
    assert served.invoke("top", "--count", "1", "--json").exit_code == 0
