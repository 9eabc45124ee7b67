"""Traces and ended connections over several nodes: where they are does not matter to who asks."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from broker import Broker, Config, Refused
from broker.core.trace import Target
from broker.session.inspection import DISTANT_MOST
from broker.testing import Bus, BusNode, name_users_by_token, open_test_node


@asynccontextmanager
async def two_nodes() -> AsyncIterator[tuple[BusNode, BusNode]]:
    bus = Bus()
    async with (
        open_test_node(bus, name_users_by_token(Broker(Config(name="one")))) as one,
        open_test_node(bus, name_users_by_token(Broker(Config(name="two")))) as two,
    ):
        await trio.sleep(1)
        yield one, two


@pytest.mark.parametrize("where", [0, 1])
async def test_a_connection_is_traced_on_whatever_node_it_is(
    autojump_clock: MockClock, where: int
) -> None:
    async with two_nodes() as nodes:
        inspection = nodes[0].node.inspection
        peer = await nodes[where].open_client(token="ann")
        trace = await inspection.begin(Target(fd=peer.fd))
        assert (await inspection.read(trace, 0)).entries == []
        await peer.request(presence={"channel": "t"})
        read = await inspection.read(trace, 5)
        assert [(e.kind, e.fd, e.user) for e in read.entries] == [
            ("received", peer.fd, "ann"),
            ("sent", peer.fd, "ann"),
        ]
        await peer.aclose()
        read = await inspection.read(trace, 5)
        assert [e.kind for e in read.entries] == ["disconnected"]
        assert read.has_ended
        with pytest.raises(Refused):
            await inspection.read(trace, 0)
        assert [len(node.node.traces) for node in nodes] == [0, 0]


async def test_a_read_of_another_node_waits_until_something_happens(
    autojump_clock: MockClock,
) -> None:
    async with two_nodes() as (one, two), await two.open_client() as peer:
        trace = await one.node.inspection.begin(Target(fd=peer.fd))
        began = trio.current_time()
        assert (await one.node.inspection.read(trace, 4)).entries == []
        assert trio.current_time() - began == pytest.approx(4, abs=0.5)

        async def act() -> None:
            await trio.sleep(2)
            await peer.request(presence={"channel": "t"})

        async with trio.open_nursery() as nursery:
            nursery.start_soon(act)
            began = trio.current_time()
            assert (await one.node.inspection.read(trace, 20)).entries
            assert trio.current_time() - began == pytest.approx(2, abs=0.5)


async def test_a_user_is_traced_on_all_nodes_in_order(autojump_clock: MockClock) -> None:
    async with two_nodes() as (one, two):
        first = await one.open_client(token="ann")
        second = await two.open_client(token="ann")
        inspection = one.node.inspection
        trace = await inspection.begin(Target(user="ann"))
        for peer in (second, first, second):
            await peer.request(presence={"channel": "t"})
            await trio.sleep(0.1)
        read = await inspection.read(trace, 5)
        received = [e.fd for e in read.entries if e.kind == "received"]
        assert received == [second.fd, first.fd, second.fd]
        await inspection.end(trace)
        assert [len(node.node.traces) for node in (one, two)] == [0, 0]
        with pytest.raises(Refused):
            await inspection.end(trace)


async def test_a_topic_is_traced_here_with_what_is_published_elsewhere(
    autojump_clock: MockClock,
) -> None:
    async with two_nodes() as (one, two):
        inspection = one.node.inspection
        trace = await inspection.begin(Target(topic="news"))
        await trio.sleep(1)
        await two.broker.publish("news", "hi")
        read = await inspection.read(trace, 5)
        assert [(e.kind, e.text) for e in read.entries] == [("published", '"hi"')]


async def test_what_cannot_be_traced_elsewhere_is_refused(autojump_clock: MockClock) -> None:
    async with two_nodes() as (one, two):
        gone = await two.open_client()
        await gone.aclose()
        await trio.sleep(1)
        for target in (Target(fd=gone.fd), Target(fd=10**9)):
            with pytest.raises(Refused, match="no connection has fd"):
                await one.node.inspection.begin(target)


async def test_so_many_traces_on_other_nodes_are_known(autojump_clock: MockClock) -> None:
    async with two_nodes() as (one, two), await two.open_client() as peer:
        inspection = one.node.inspection
        for _ in range(DISTANT_MOST + 3):
            trace = await inspection.begin(Target(fd=peer.fd))
            await inspection.end(trace)
        begun = [await inspection.begin(Target(fd=peer.fd)) for _ in range(8)]
        with pytest.raises(Refused, match="more than 8 traces"):
            await inspection.begin(Target(fd=peer.fd))
        await trio.sleep(90)  # nobody reads them
        assert len(two.node.traces) == 0
        with pytest.raises(Refused):
            await inspection.read(begun[0], 0)


async def test_connections_that_ended_on_any_node_are_told_the_last_first(
    autojump_clock: MockClock,
) -> None:
    async with two_nodes() as (one, two):
        peers = []
        for node, user in ((one, "ann"), (two, "bob"), (one, "bob"), (two, "ann")):
            peer = await node.open_client(token=user)
            await peer.request(subscribe={"channel": f"of-{user}"})
            await peer.aclose()
            await wait_all_tasks_blocked()
            peers.append(peer)
            await trio.sleep(1)
        for asked in (one, two):
            closed = asked.node.inspection.closed
            found = await closed(0, "", 100)
            assert {each.details.fd for each in found} == {peer.fd for peer in peers}
            assert [e.closed_at for e in found] == sorted(
                [e.closed_at for e in found], reverse=True
            )
            (last,) = await closed(0, "", 1)
            assert last == found[0]
            (of_fd,) = await closed(peers[1].fd, "", 100)
            assert (of_fd.details.user, of_fd.details.topics) == ("bob", ("of-bob",))
            assert [e.details.user for e in await closed(0, "ann", 100)] == ["ann", "ann"]
            assert await closed(10**9, "", 100) == []
