"""`top`: what it draws, and how it ends."""

import json
import signal
import sys
import threading
from typing import Any

import pytest
from rich.console import Console

from broker.cli.top import Look, _rates, drawn
from tests.cli.conftest import Served

STATS: dict[str, Any] = {
    "node": "a\x1b[2J",
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
}


def test_a_look_is_drawn_clean_and_without_markup(capsys: pytest.CaptureFixture[str]) -> None:
    look = Look(STATS, [CLOSED], {**_rates(None, STATS), "delivered": 1500.0, "bytes_queued": 3e6})
    Console(file=sys.stdout, width=100).print(drawn(look))
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\x9b" not in out
    lines = out.splitlines()
    assert lines[0].rstrip() == r"a\x1b[2J  1  up 10s, draining"
    assert any(
        line.split() == ["behind", "34", "connections", "bytes", "out", "2.9M", "4.0K"]
        for line in lines
    )
    assert any("1,500" in line and "1,000" in line for line in lines)
    assert "< 10 ms" in out
    assert r"[red]\x9b" in lines[-1]
    assert lines[-1].rstrip().endswith("3008 slow, by slow")


def test_rates_are_of_the_time_between_two_looks() -> None:
    later = {**STATS, "uptime": 12.0, "published": 150}
    assert _rates(STATS, later)["published"] == 25.0
    assert _rates(None, later)["published"] == 0.0
    assert _rates(later, STATS)["published"] == 0.0, "a broker that began anew"


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
