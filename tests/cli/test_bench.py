"""`broker.cli.bench` against a real broker on a real socket: it measures, so the clock is real too."""

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import attrs
import pytest
import trio

from broker import Broker, Close, Config, Connection
from broker.cli.bench import SMALLEST, BenchFailed, Plan, measure
from broker.errors import CannotConnect, ClientError


@asynccontextmanager
async def serving() -> AsyncIterator[str]:
    broker = Broker(Config(host="127.0.0.1", port=0, drain_seconds=0))
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            (url,) = await nursery.start(broker.serve)
            yield url
            broker.stop()


def quiet(published: int, seconds: float) -> None:
    """Progress that nobody watches."""


@pytest.mark.parametrize("size", [SMALLEST, 64, 70_000])
async def test_every_subscriber_gets_every_publication(size: int) -> None:
    async with serving() as url:
        plan = Plan(url=url, publishers=2, subscribers=3, size=size, messages=101, window=32)
        result = await measure(plan, quiet)
    assert (result.published, result.delivered, result.missing) == (101, 303, 0)
    assert result.deliveries_per_second == pytest.approx(3 * result.publishes_per_second)
    assert 0 < result.latency["p50"] <= result.latency["p99.9"] <= result.latency["max"] < 20_000


async def test_a_rate_is_kept_and_every_publication_is_timed() -> None:
    seen: list[int] = []
    async with serving() as url:
        plan = Plan(url=url, publishers=2, rate=200, seconds=0.3)
        result = await measure(plan, lambda published, _: seen.append(published))
    assert 40 <= result.published <= 62
    assert result.missing == 0
    assert seen[-1] == result.published


async def test_without_subscribers_it_waits_until_all_was_taken() -> None:
    async with serving() as url:
        result = await measure(Plan(url=url, subscribers=0, messages=50), quiet)
    assert (result.published, result.delivered, result.latency) == (50, 0, {})


@pytest.mark.parametrize("ends_well", [True, False])
async def test_every_connection_is_closed_with_1000(ends_well: bool) -> None:
    broker = Broker(Config(host="127.0.0.1", port=0, drain_seconds=0))
    codes: list[int] = []
    all_closed = trio.Event()

    @broker.on_close
    async def note(connection: Connection, close: Close) -> None:
        codes.append(close.code)
        if len(codes) == 5:
            all_closed.set()

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            (url,) = await nursery.start(broker.serve)
            plan = Plan(url=url, publishers=2, subscribers=3, seconds=60, rate=50)
            with trio.CancelScope() as measuring:
                if ends_well:
                    plan = attrs.evolve(plan, seconds=None, messages=10)
                await measure(plan, lambda count, _: None if ends_well else measuring.cancel())
            await all_closed.wait()
            broker.stop()
    assert codes == [1000] * 5


async def test_a_broker_that_stops_ends_it_with_its_last_words() -> None:
    broker = Broker(Config(host="127.0.0.1", port=0, drain_seconds=0))

    def stop(published: int, seconds: float) -> None:
        broker.stop()

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            (url,) = await nursery.start(broker.serve)
            with pytest.raises(BenchFailed, match=r"closed a connection"):
                await measure(Plan(url=url, subscribers=3, seconds=60, rate=50), stop)


async def test_a_pattern_is_refused_before_anything_is_sent() -> None:
    with pytest.raises(BenchFailed, match=r"topic 'a\.\*': a topic has no wildcard"):
        await measure(Plan(url="ws://localhost:1", topic="a.*", messages=1), quiet)


async def test_nobody_there_is_told_with_the_url() -> None:
    with pytest.raises(
        ClientError, match=r"cannot connect to ws://127\.0\.0\.1:1: connection refused"
    ) as caught:
        await measure(Plan(url="ws://127.0.0.1:1", messages=1), quiet)
    assert type(caught.value) is CannotConnect


async def test_another_path_is_no_broker() -> None:
    async with serving() as url:
        with pytest.raises(BenchFailed, match="404"):
            await measure(Plan(url=f"{url}/nowhere", messages=1), quiet)


async def test_the_table_says_what_was_asked_and_what_was_seen() -> None:
    async with serving() as url:
        process = await trio.run_process(
            [sys.executable, "-m", "broker", "bench", "--url", url, "--messages", "10"],
            capture_stdout=True,
            capture_stderr=True,
        )
    assert process.stderr == b""
    lines = process.stdout.decode().splitlines()
    assert lines[0].startswith("1 → 1, 64 B, as fast as delivered: ")
    assert lines[2].split()[:2] == ["delivered", "10"]
    assert lines[3].startswith("latency, ms  p50 ")
