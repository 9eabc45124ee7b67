"""Readers in this program: order, ends, and what a slow one is told."""

from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from broker import (
    Broker,
    Lagged,
    Publication,
    Refused,
)
from broker.testing import open_test_broker


async def test_an_fd_cannot_be_read_in_process(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker()) as net:
        with pytest.raises(Refused, match="103"):
            async with net.broker.subscribe("fd:1"):
                pass


async def test_an_app_reads_topics_and_patterns(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker()) as net:
        client = await net.open_client()
        async with net.broker.subscribe("news.*") as messages:
            await client.request(publish={"channel": "news.eu", "data": {"a": 1}})
            net.broker.publish_nowait("news.fr", "x")
            net.broker.publish_nowait("news", "y")
            first, second = [await messages.receive() for _ in range(2)]
        assert (first.topic, first.value, first.offset) == ("news.eu", {"a": 1}, 1)
        assert first.info is not None
        assert first.info.client == str(client.fd)
        assert (second.topic, second.value, second.info) == ("news.fr", "x", None)
        assert net.broker.stats().hub.subscriptions == 0


async def read_all(messages: Any) -> list[object]:
    """Each publication's value, and how many were missed as ("missed", n), to the end."""
    read: list[object] = []
    while True:
        try:
            publication = await anext(messages)
        except StopAsyncIteration:
            return read
        except Lagged as lagged:
            read.append(("missed", lagged.missed))
        else:
            assert isinstance(publication, Publication)
            read.append(publication.value)


@pytest.mark.parametrize(
    "steps, expected",
    [
        ("12 rr", [1, 2]),
        ("123 rrr", [1, 2, ("missed", 1)]),
        ("12345 rrr6 rr", [1, 2, ("missed", 3), 6]),
        # what was dropped is told where it is missing, not before and not behind
        ("123 r4 rrrr", [1, 2, ("missed", 1), 4]),
        ("123 r4 r5 r6 rrrr", [1, 2, ("missed", 1), 4, 5, 6]),
        ("123 r45 rr67 ", [1, 2, ("missed", 1), 4, ("missed", 1), 6, 7]),
    ],
)
async def test_a_reader_that_is_too_slow_is_told_what_it_missed(
    autojump_clock: MockClock, steps: str, expected: list[object]
) -> None:
    read: list[object] = []
    async with open_test_broker(Broker()) as net:
        async with net.broker.subscribe("news", capacity=2) as messages:
            for step in steps.replace(" ", ""):
                if step != "r":
                    net.broker.publish_nowait("news", int(step))
                    continue
                with trio.move_on_after(1):
                    try:
                        read.append((await messages.receive()).value)
                    except Lagged as lagged:
                        read.append(("missed", lagged.missed))
            with trio.move_on_after(1):
                while True:
                    try:
                        read.append((await messages.receive()).value)
                    except Lagged as lagged:
                        read.append(("missed", lagged.missed))
    assert read == expected


async def test_a_slow_reader_delays_nobody(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker()) as net:
        client = await net.open_client()
        await client.request(subscribe={"channel": "news"})
        async with net.broker.subscribe("news", capacity=1):
            for number in range(100):
                net.broker.publish_nowait("news", number)
            with trio.fail_after(1):
                for number in range(100):
                    assert (await client.receive_json())["push"]["pub"]["data"] == number


async def test_reading_ends_after_the_last_publication_when_the_broker_stops(
    autojump_clock: MockClock,
) -> None:
    read: list[object] = []
    broker = Broker()

    async def read_news(task_status: trio.TaskStatus[None]) -> None:
        async with broker.subscribe("news") as messages:
            task_status.started()
            read.extend(await read_all(messages))

    async with trio.open_nursery() as nursery:
        async with open_test_broker(broker):
            await nursery.start(read_news)
            for number in range(3):
                broker.publish_nowait("news", number)
    assert read == [0, 1, 2]


async def test_a_reader_that_is_cancelled_loses_nothing(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker()) as net, net.broker.subscribe("news") as messages:
        with trio.move_on_after(1):
            await messages.receive()
        net.broker.publish_nowait("news", 1)
        with trio.CancelScope() as scope:
            scope.cancel()
            await messages.receive()
        assert (await messages.receive()).value == 1


async def test_a_reader_that_is_cancelled_while_it_lags_loses_nothing(
    autojump_clock: MockClock,
) -> None:
    async with (
        open_test_broker(Broker()) as net,
        net.broker.subscribe("news", capacity=1) as messages,
    ):
        for number in (1, 2):
            net.broker.publish_nowait("news", number)
        assert (await messages.receive()).value == 1
        net.broker.publish_nowait("news", 3)
        read: list[object] = []
        for _ in range(3):
            with trio.CancelScope() as scope:
                scope.cancel()
                await messages.receive()
            with trio.move_on_after(1):
                try:
                    read.append((await messages.receive()).value)
                except Lagged as lagged:
                    read.append(("missed", lagged.missed))
        assert read == [("missed", 1), 3]


@pytest.mark.parametrize("pattern", ["", "a.>.b", "a\x00"])
async def test_a_name_that_is_no_pattern_cannot_be_read(
    autojump_clock: MockClock, pattern: str
) -> None:
    async with open_test_broker(Broker()) as net:
        with pytest.raises(Refused, match="107"):
            async with net.broker.subscribe(pattern):
                pytest.fail("unreachable")
        assert net.broker.stats().hub.subscriptions == 0


async def test_a_block_that_reads_and_fails_leaves_nothing(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker()) as net:
        with pytest.raises(ZeroDivisionError):
            async with net.broker.subscribe("news"):
                raise ZeroDivisionError
        assert net.broker.stats().hub.subscriptions == 0


async def test_a_reader_that_outlives_its_broker_harms_no_later_one(
    autojump_clock: MockClock,
) -> None:
    broker = Broker()
    async with trio.open_nursery() as nursery:

        async def linger(task_status: trio.TaskStatus[None]) -> None:
            async with broker.subscribe("news") as messages:
                task_status.started()
                async for _ in messages:
                    pass
                await trio.sleep(100)

        async with open_test_broker(broker):
            await nursery.start(linger)
        async with open_test_broker(broker) as net:
            client = await net.open_client()
            await client.request(subscribe={"channel": "news"})
            broker.publish_nowait("news", 1)
            assert (await client.receive_json())["push"]["pub"]["data"] == 1
