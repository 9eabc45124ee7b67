"""The figures of a node: a snapshot in one step, a survey in turns."""

from collections.abc import AsyncIterator

import pytest
import trio
from trio.testing import (
    MockClock,
    memory_stream_pair,
)

from broker import (
    Broker,
)
from broker.core.work import SURVEYED, SURVEYED_AT_ONCE
from broker.routing.turns import Turns
from broker.testing import Network, open_test_broker
from tests.conftest import served


async def test_statistics_count_what_is_here_and_what_was_done(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker()) as net:
        client = await net.open_client()
        for name in ("news", "a.*"):
            await client.request(subscribe={"channel": name})
        for topic in ("news", "a.b", "nobody"):
            net.broker.publish_nowait(topic, 1)
        bare = await net.connect()
        await bare.send(b"rubbish\r\n\r\n")
        await bare.receive_head()
        stats = net.broker.stats()
        assert (stats.connections, stats.published, stats.refused) == (1, 3, 1)
        assert (stats.hub.sessions, stats.hub.topics, stats.hub.patterns) == (1, 1, 1)
        assert stats.hub.subscriptions == 2
        assert stats.history.publications == 3
        assert stats.post.messages_delivered == 2


@pytest.fixture
async def net(autojump_clock: MockClock) -> AsyncIterator[Network]:
    async with served() as network:
        yield network


class HeldTurns(Turns):
    """A queue in which who comes first has no turn until `release` is set; all others have theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.release = trio.Event()
        self._is_first = True

    async def wait(self, work: float | None = None) -> float:
        is_first, self._is_first = self._is_first, False
        if is_first:
            await self.release.wait()
        return await super().wait(work)


async def test_a_connection_that_ends_during_the_survey_is_counted_once(
    autojump_clock: MockClock, net: Network
) -> None:
    """The first piece of the survey waits for its turn, and meanwhile they go."""
    peers = [await net.open_plain() for _ in range(3)]
    for peer in peers:
        await peer.send_text("x" * 100)
    await trio.testing.wait_all_tasks_blocked()
    before = (await net.node.figures.survey()).received
    surveys = []
    net.node.router.turns = held = HeldTurns()

    async def survey() -> None:
        surveys.append(await net.node.figures.survey())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(survey)
        await trio.testing.wait_all_tasks_blocked()
        for peer in peers:
            await peer.aclose()
        await trio.sleep(20)
        assert not net.node.services.connections
        held.release.set()
    [during] = surveys
    after = await net.node.figures.survey()
    assert [each.messages for each in (before, during.received, after.received)] == [3, 3, 3]
    assert before.bytes == during.received.bytes == after.received.bytes
    assert not during.connections
    assert during.queue_bytes.count == 0


async def test_a_survey_gives_way_to_others(autojump_clock: MockClock, net: Network) -> None:
    for _ in range(SURVEYED_AT_ONCE + 1):
        await net.open_plain(make_pair=memory_stream_pair)
    steps = 0

    async def count() -> None:
        nonlocal steps
        while True:
            await trio.lowlevel.checkpoint()
            steps += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(count)
        await trio.lowlevel.checkpoint()
        steps, before = 0, net.node.router.meter.done
        survey = await net.node.figures.survey()
        assert net.node.router.meter.done - before == (SURVEYED_AT_ONCE + 1) * SURVEYED
        taken = steps
        nursery.cancel_scope.cancel()
    assert sum(survey.connections.values()) == SURVEYED_AT_ONCE + 1
    assert taken >= 1, "between the two pieces"
