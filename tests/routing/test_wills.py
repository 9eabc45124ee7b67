"""Wills: the last word of a client that goes without saying goodbye."""

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from broker import (
    Broker,
)
from broker.testing import MemoryListener, Network
from tests.conftest import done, served, subscribe


async def test_a_will_is_published_when_its_client_is_lost(autojump_clock: MockClock) -> None:
    async with served() as net, net.broker.subscribe("left") as messages:
        peer = await net.open_client(token="alice")
        assert await done(peer, "will", topic="left", data="first") == {}
        assert await done(peer, "will", topic="left", data={"who": "alice"}) == {}
        await peer.aclose()
        publication = await messages.receive()
        assert publication.value == {"who": "alice"}
        assert publication.info is not None
        assert publication.info.user == "alice"
        await wait_all_tasks_blocked()
        assert messages.bytes_waiting == 0


@pytest.mark.parametrize(
    "code, published", [(1000, False), (1001, True), (4000, True), (None, False)]
)
async def test_a_will_is_void_after_a_goodbye(
    autojump_clock: MockClock, code: int | None, published: bool
) -> None:
    async with served() as net, net.broker.subscribe("left") as messages:
        peer = await net.open_client()
        await done(peer, "will", topic="left", data=1)
        if code is None:  # what `close()` of a browser sends
            await peer.send(b"\x88\x80\x00\x00\x00\x00")
        else:
            await peer.send_close(code)
        await peer.receive_close()
        await peer.aclose()
        await wait_all_tasks_blocked()
        assert messages.bytes_waiting == published


async def test_a_will_is_published_when_the_server_sends_its_client_away(
    autojump_clock: MockClock,
) -> None:
    async with served() as net, net.broker.subscribe("left") as messages:
        peer = await net.open_client()
        await done(peer, "will", topic="left", data=1)
        net.broker.disconnect(peer.fd)
        await peer.receive_close()
        await peer.aclose()
        assert (await messages.receive()).value == 1


async def test_a_will_can_be_taken_back_and_one_to_nobody_is_forgotten(
    autojump_clock: MockClock,
) -> None:
    async with served() as net, net.broker.subscribe("left") as messages:
        peer, other = await net.open_client(), await net.open_client()
        await done(peer, "will", topic="left", data=1)
        assert await done(peer, "will") == {}
        await peer.aclose()
        await done(other, "will", topic="fd:99", data=1)
        await other.aclose()
        await wait_all_tasks_blocked()
        assert messages.bytes_waiting == 0
        assert net.broker.connections() == []


async def test_a_will_does_no_harm_when_the_broker_is_cancelled() -> None:
    broker, listener = Broker(), MemoryListener()
    async with trio.open_nursery() as nursery:
        await nursery.start(lambda **start: broker.serve(listeners=[listener], **start))
        net = Network(broker, listener)
        for _ in range(3):
            peer = await net.open_client()
            await subscribe(peer, "left", join_leave=True)
            await done(peer, "will", topic="left", data=1)
        nursery.cancel_scope.cancel()
    with pytest.raises(RuntimeError, match="not serving"):
        broker.publish("left", 1)
