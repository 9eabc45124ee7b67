"""Numbers of connections: leased in blocks, given out once over all nodes."""

import trio
from trio.testing import MockClock

from broker.core.messages import PushResult
from broker.routing.fd_leases import FIRST_LEASE
from broker.testing import BusNode, handshake
from tests.conftest import ask
from tests.nodes.conftest import settle


async def test_no_two_nodes_give_out_one_fd(
    autojump_clock: MockClock, one: BusNode, two: BusNode
) -> None:
    peers = [await net.open_plain() for _ in range(3) for net in (one, two)]
    fds = [peer.fd for peer in peers]
    assert fds == [1, FIRST_LEASE + 1, 2, FIRST_LEASE + 2, 3, FIRST_LEASE + 3]


async def test_fds_are_leased_before_they_are_needed(
    autojump_clock: MockClock, one: BusNode, two: BusNode
) -> None:
    sessions = one.node.router.hub.sessions
    sessions.next_fd = FIRST_LEASE // 2
    for _ in range(3):
        await one.open_plain()
    await settle()
    assert sessions.fds_left > FIRST_LEASE
    sessions.next_fd = FIRST_LEASE
    first, second = await one.open_plain(), await one.open_plain()
    assert (first.fd, second.fd) == (FIRST_LEASE, 2 * FIRST_LEASE + 1)
    assert two.broker.push(second.fd, "hi") is PushResult.FORWARDED


async def test_a_block_that_nobody_uses_any_more_is_given_up(
    autojump_clock: MockClock, one: BusNode, two: BusNode
) -> None:
    peer = await one.open_plain()
    for _ in range(2):
        sessions = one.node.router.hub.sessions
        sessions.next_fd = int(sessions.next_fd + sessions.fds_left - 1)
        await (await one.open_plain()).aclose()
        await settle()
    assert two.broker.push(peer.fd, "hi") is PushResult.FORWARDED
    await peer.aclose()
    await settle()
    neighbourhood = two.node.services.neighbourhood
    assert neighbourhood is not None
    blocks = neighbourhood.neighbours.blocks
    assert blocks.node_of(peer.fd) == one.engine.node
    sessions.next_fd = int(sessions.next_fd + sessions.fds_left - 1)
    await (await one.open_plain()).aclose()
    await settle()
    assert blocks.node_of(peer.fd) is None
    assert two.broker.push(peer.fd, "hi") is PushResult.CLOSED


async def test_without_a_number_left_newcomers_are_refused_and_others_served(
    autojump_clock: MockClock, one: BusNode, two: BusNode
) -> None:
    peer = await one.open_client()
    one.node.router.hub.sessions.revoke()
    one.cut()
    newcomer = await one.connect()
    await newcomer.send(handshake())
    assert (await newcomer.receive_head()).startswith("HTTP/1.1 503 ")
    assert await ask(peer, {"id": 1, "unsubscribe": {"channel": "t"}})
    one.mend()
    await trio.sleep(5)
    assert (await one.open_client()).fd > 2 * FIRST_LEASE
