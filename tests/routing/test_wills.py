"""Wills: the last word of a client that goes without saying goodbye."""

from itertools import pairwise
from typing import Any

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock, wait_all_tasks_blocked

from broker import (
    Broker,
)
from broker.core.messages import Close, Initiator
from broker.core.work import ROUND, SLICE
from broker.errors import Refused
from broker.routing.publishing import Publisher
from broker.routing.recipients import Peer
from broker.routing.wills import Will, Wills
from broker.session.connection import LEAVES_AT_ONCE
from broker.testing import MemoryListener, Network
from tests.conftest import done, received, served, subscribe
from tests.routing.conftest import attach, listen, make_router, runs, subscription


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
        await done(other, "will", topic="user:nobody", data=1)
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
        broker.publish_nowait("left", 1)


# by itself


def make_wills(**rules: Any) -> tuple[Wills, Peer, Peer]:
    """Wills, a client that may leave one, and one that listens to `left`."""
    wills = Wills(Publisher(make_router(**rules)))
    router = wills.publisher.router
    return wills, attach(router, user="ann"), listen(router, "left")


LOST = Close(1006, "connection lost", Initiator.NETWORK)


@pytest.mark.parametrize(
    "code, initiator, published",
    [
        (1000, Initiator.CLIENT, False),
        (1005, Initiator.CLIENT, False),
        (1001, Initiator.CLIENT, True),
        (4000, Initiator.CLIENT, True),
        # A code like a goodbye is none if it is ours.
        (1000, Initiator.SERVER, True),
        (1005, Initiator.NETWORK, True),
        (3503, Initiator.SERVER, True),
        (3008, Initiator.SLOW, True),
        (3012, Initiator.HEARTBEAT, True),
        (3001, Initiator.SHUTDOWN, True),
    ],
)
async def test_only_a_goodbye_of_the_client_itself_makes_its_will_void(
    code: int, initiator: Initiator, published: bool
) -> None:
    wills, client, listener = make_wills()
    wills.put(client, Will("left", b"1"))
    wills.carry_out(client, Close(code, "", initiator))
    assert runs(listener) == ([[1]] if published else [])
    assert len(wills) == 0


async def test_a_connection_has_one_will_at_most_and_it_is_carried_out_once() -> None:
    wills, client, listener = make_wills()
    for data in (b"1", b"2"):
        wills.put(client, Will("left", data))
    assert len(wills) == 1
    assert client.holding.bytes == Will("left", b"2").bytes
    for _ in range(2):
        wills.carry_out(client, LOST)
    assert client.holding.bytes == 0
    assert runs(listener) == [[2]]
    wills.put(client, Will("left", b"3"))
    wills.put(client, None)
    wills.put(client, None)
    wills.carry_out(client, LOST)
    assert (runs(listener), len(wills)) == ([[2]], 0)


@pytest.mark.parametrize(
    "will, code",
    [
        (Will("left.*", b"1"), 107),
        (Will("", b"1"), 107),
        (Will("user:" + "u" * 256, b"1"), 107),
        (Will("fd:1", b"1", retain=True), 107),
        (Will("fd:x", b"1"), 102),
    ],
)
async def test_a_will_that_could_never_be_published_is_refused_and_the_old_one_stays(
    will: Will, code: int
) -> None:
    wills, client, listener = make_wills()
    wills.put(client, Will("left", b"1"))
    with pytest.raises(Refused) as caught:
        wills.put(client, will)
    assert caught.value.code == code
    wills.carry_out(client, LOST)
    assert runs(listener) == [[1]]


async def test_a_will_goes_to_all_but_the_one_whose_it_is() -> None:
    wills, client, listener = make_wills()
    wills.publisher.router.subscribe(subscription(client, "left"))
    wills.put(client, Will("left", b"1"))
    wills.carry_out(client, LOST)
    assert (runs(client), runs(listener)) == ([], [[1]])


async def test_a_will_may_be_retained() -> None:
    wills, client, _ = make_wills()
    wills.put(client, Will("left", b"1", retain=True))
    wills.carry_out(client, LOST)
    (value,) = wills.publisher.router.retained.matching("left")
    assert (value.data, value.info) == (b"1", client.info)


@pytest.mark.parametrize("topic", ["fd:99", "user:eve", "$left", "left#eve"])
async def test_a_will_that_may_not_be_is_forgotten_and_told_of(topic: str) -> None:
    wills, client, listener = make_wills()
    wills.put(client, Will(topic, b"1"))
    with capture_logs() as lines:
        wills.carry_out(client, LOST)
    assert (runs(listener), len(wills)) == ([], 0)
    (line,) = lines
    assert (line["event"], line["fd"], line["topic"]) == ("will_refused", client.fd, topic)
    assert line["reason"]


async def test_the_rules_of_the_moment_count_for_a_will() -> None:
    wills, client, listener = make_wills(may_publish="subscribers")
    router = wills.publisher.router
    wills.put(client, Will("left", b"1"))
    wills.carry_out(client, LOST)
    assert runs(listener) == []
    # Its client is still subscribed when it is carried out.
    router.subscribe(subscription(client, "left"))
    wills.put(client, Will("left", b"2"))
    wills.carry_out(client, LOST)
    assert runs(listener) == [[2]]


async def test_wills_that_reach_many_are_carried_out_in_turns_with_all_others(
    autojump_clock: MockClock,
) -> None:
    """Else the wills of peers that go together would be one long step."""
    async with served() as net:
        readers = [await net.open_client() for _ in range(300)]
        for reader in readers:
            await subscribe(reader, "left")
        peers = [await net.open_client() for _ in range(30)]
        for peer in peers:
            await done(peer, "will", topic="left", data=peer.fd)
        router = net.node.services.router
        weight = net.node.services.wills.weigh(peers[0].fd)
        assert weight > LEAVES_AT_ONCE
        before, seen = router.published, [0]

        async def watch() -> None:
            while seen[-1] < len(peers):
                await trio.lowlevel.checkpoint()
                seen.append(router.published - before)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            for peer in peers:
                net.broker.disconnect(peer.fd)
            assert router.published == before
        # As many as fill a round; Trio changes the order of tasks that run in one turn, so two of them.
        most = 2 * (ROUND / (weight + SLICE) + 1)
        assert max(after - earlier for earlier, after in pairwise(seen)) <= most < len(peers)
        assert sorted(await received(net, readers[0])) == [peer.fd for peer in peers]


async def test_a_will_is_weighed_by_those_it_reaches_and_its_size() -> None:
    router = make_router()
    wills = Wills(Publisher(router))
    peer = listen(router, "many")
    for _ in range(100):
        listen(router, "many")
    weights = [wills.weigh(peer.fd)]
    for will in (Will("few", b"1"), Will("many", b"1"), Will("many", b"1" * 102_400)):
        wills.put(peer, will)
        weights.append(wills.weigh(peer.fd))
    assert weights[0] == 0
    assert weights == sorted(set(weights))
