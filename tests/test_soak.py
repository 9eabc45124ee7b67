"""The books of a soak: clients of all transports against a broker over TCP, and its verdicts."""

import argparse
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import attrs
import pytest
import trio

from broker import Broker, Config, TopicRules
from tests.hostile.bystander import Heard
from tests.hostile.field import MIB
from tests.hostile.target import API_KEY, Sample, Target
from tests.hostile.wire import Tcp
from tests.ports import free_port
from tests.soak.__main__ import Run, _publish, _tell, flatness, slope
from tests.soak.fleet import SHARES, TOPICS, _Fleet, _kind_of, _Reader


def test_all_transports_have_their_share() -> None:
    kinds = [_kind_of(number) for number in range(200)]
    assert {kind: kinds.count(kind) for kind in SHARES} == {
        kind: 2 * share for kind, share in SHARES.items()
    }


def test_a_slope_is_found_beside_noise_and_a_flat_line_is_flat() -> None:
    assert slope([(x, 5 + 0.5 * x + (-1) ** x) for x in range(1000)]) == pytest.approx(
        0.5, abs=0.01
    )
    assert flatness([5, 6] * 30) == pytest.approx(0)
    assert flatness([1] * 20 + [2] * 20 + [4] * 20) == 3


def a_fleet(**order: Any) -> _Fleet:
    return _Fleet({"port": 0, "steady": 0, "coming": 0, **order}, cast(trio.Nursery, None))


def test_what_is_lost_and_what_comes_twice_is_counted() -> None:
    fleet = a_fleet()
    reader = _Reader(fleet, 7)
    reader.take(b'{"n":4}\n{"n":5}')
    assert (fleet.deliveries, fleet.lost, fleet.twice) == (2, 0, 0)
    reader.take(b'{"n":8}{"n":8}{"n":6}')
    assert (fleet.deliveries, fleet.lost, fleet.twice) == (5, 2, 2)
    fleet.readers.append(reader)
    assert fleet.report({"t7": 10})["lost"] == 4
    fleet = a_fleet()
    assert fleet._count([{"offset": 3}, {"offset": 5}, {"offset": 5}], 2) == 5
    assert (fleet.lost, fleet.twice) == (1, 1)


class _Process:
    """As much of a `Target` as its publisher needs."""

    def __init__(self, port: int) -> None:
        self.address = Tcp(port)

    def log_lines(self) -> list[str]:
        return []


@asynccontextmanager
async def a_broker() -> AsyncGenerator[tuple[Broker, int]]:
    port = free_port()
    rules = TopicRules(history_size=1000)
    broker = Broker(Config(port=port, api_key=API_KEY, topics=rules))
    async with trio.open_nursery() as nursery:
        await nursery.start(broker.serve)
        yield broker, port
        nursery.cancel_scope.cancel()


def options(**changes: Any) -> argparse.Namespace:
    return argparse.Namespace(
        **{"minutes": 0.1, "connections": 200, "churn": 2, "deliveries": 2000, **changes}
    )


async def until(holds: Callable[[], bool]) -> None:
    """Wait until it holds, for what goes over sockets: no clock of ours moves that."""
    with trio.fail_after(100):
        while not holds():  # noqa: ASYNC110 - as it is looked at
            await trio.sleep(0.01)


async def test_clients_of_all_transports_get_everything_once() -> None:
    async with a_broker() as (broker, port), trio.open_nursery() as nursery:
        fleet = _Fleet({"port": port, "steady": 100, "coming": 0}, nursery)
        await fleet.open()
        published = {f"t{number}": -1 for number in range(TOPICS)}
        target = cast(Target, _Process(port))
        async with trio.open_nursery() as publishing:
            publishing.start_soon(_publish, Run(target, options(), published))
            await until(lambda: fleet.deliveries > 500)
            publishing.cancel_scope.cancel()
        await until(lambda: all(each.last >= published[f"t{each.topic}"] for each in fleet.readers))
        report = fleet.report(published)
        assert (report["lost"], report["twice"], report["ended"]) == (0, 0, {})
        assert len(fleet.readers) == 100 - SHARES["plain"]
        broker.publish_nowait("t7", {"n": published["t7"] + 5})
        await until(lambda: fleet.lost > 0)
        nursery.cancel_scope.cancel()


async def test_those_that_come_and_go_recover_what_they_have_missed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tests.soak.fleet.STAY_SECONDS", 0.2)
    monkeypatch.setattr("tests.soak.fleet.AWAY_SECONDS", 0.2)
    async with a_broker() as (_, port), trio.open_nursery() as nursery:
        fleet = _Fleet({"port": port, "steady": 0, "coming": 3}, nursery)
        await fleet.open()
        published = {f"t{number}": -1 for number in range(3)}
        target = cast(Target, _Process(port))
        async with trio.open_nursery() as publishing:
            publishing.start_soon(_publish, Run(target, options(), published))
            await until(lambda: fleet.came >= 8)
            publishing.cancel_scope.cancel()
        report = fleet.report()
        assert (report["lost"], report["twice"], report["gaps"], report["ended"]) == (0, 0, 0, {})
        assert fleet.asked["refused"] > 0, "nobody answers here"
        nursery.cancel_scope.cancel()


GOOD = {"deliveries": 12_000, "lost": 0, "twice": 0, "gaps": 0, "came": 9, "asked": {}, "ended": {}}
HEARD = Heard(sent=600, p99=0.004, worst=0.01)


def a_run(*, rise: float = 0.0, files: float = 0.0) -> Run:
    """Ten minutes in which memory rises by MiB, and files by a number."""
    run = Run(cast(Target, _Process(0)), options(), {})
    run.samples = [
        (x, Sample(int((50 + rise * x / 600) * MIB), int(100 + files * x / 600), 1, 0, 0), 500)
        for x in range(0, 600, 2)
    ]
    return run


@pytest.mark.parametrize(
    "run, report, heard, fails",
    [
        (a_run(rise=0.9), GOOD, HEARD, None),
        (a_run(rise=1.2), GOOD, HEARD, "RSS slope"),
        (a_run(files=60), GOOD, HEARD, "files"),
        (a_run(), {**GOOD, "lost": 1}, HEARD, "lost"),
        (a_run(), {**GOOD, "twice": 1}, HEARD, "twice"),
        (a_run(), {**GOOD, "gaps": 1}, HEARD, "gaps told"),
        (a_run(), {**GOOD, "ended": {"sse: EOF": 1}}, HEARD, "steady clients ended"),
        (a_run(), {**GOOD, "deliveries": 9000}, HEARD, "deliveries a second"),
        (a_run(), GOOD, attrs.evolve(HEARD, p99=0.06), "bystander p99"),
        (a_run(), GOOD, attrs.evolve(HEARD, lost=1), "bystander lost"),
        (a_run(), GOOD, attrs.evolve(HEARD, twice=1), "bystander twice"),
        (a_run(), GOOD, attrs.evolve(HEARD, closed="close 3008"), "bystander ended"),
    ],
)  # fmt: skip
def test_each_verdict_can_fail(
    run: Run, report: dict[str, Any], heard: Heard, fails: str | None,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert _tell(run, report, heard) == (fails is not None)
    failed = [line for line in capsys.readouterr().out.splitlines() if " FAIL " in line]
    assert [line.partition("  ")[0] for line in failed] == ([] if fails is None else [fails])
