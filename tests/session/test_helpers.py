"""The tasks beside the one that serves a connection: their nursery comes with the first, and nothing outlives its
connection."""

import socket

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from broker import Broker, Connection, Frame
from broker.session.helpers import Helpers
from broker.testing import open_test_broker
from broker.transport.frames import CLOSE


def socket_pair() -> tuple[trio.SocketStream, trio.SocketStream]:
    """Two ends that the system knows: a connection on one has no cancel scope around it."""
    ours, theirs = (trio.socket.from_stdlib_socket(each) for each in socket.socketpair())
    return trio.SocketStream(ours), trio.SocketStream(theirs)


def never() -> None:
    raise AssertionError("no helper has failed")


async def test_the_nursery_is_there_as_long_as_somebody_is_in_it(nursery: trio.Nursery) -> None:
    helpers, may_end = Helpers(nursery, never), trio.Event()
    seen: list[object] = []
    for _ in range(2):
        helpers.start_soon(may_end.wait)
    await wait_all_tasks_blocked()
    seen.append(helpers.nursery and len(helpers.nursery.child_tasks))
    may_end.set()
    await wait_all_tasks_blocked()
    seen.append(helpers.nursery)
    assert seen == [2, None]
    await helpers.join()


@pytest.mark.parametrize("steps", range(6))
async def test_one_may_be_started_at_any_step_of_the_end_of_the_last(
    nursery: trio.Nursery, steps: int
) -> None:
    helpers, done = Helpers(nursery, never), []

    async def work() -> None:
        done.append(1)
        await trio.lowlevel.checkpoint()

    helpers.start_soon(work)
    for _ in range(steps):
        await trio.lowlevel.checkpoint()
    helpers.start_soon(work)
    await wait_all_tasks_blocked()
    assert len(done) == 2
    await helpers.join()


@pytest.mark.parametrize("steps", range(4))
async def test_who_joins_waits_for_the_last_words_of_all(
    nursery: trio.Nursery, autojump_clock: MockClock, steps: int
) -> None:
    """At every step of a start, and though the one who joins is cancelled itself."""
    helpers, said = Helpers(nursery, never), []

    async def work() -> None:
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(1)
            said.append("last words")

    helpers.start_soon(work)
    for _ in range(steps):
        await trio.lowlevel.checkpoint()
    with trio.CancelScope() as scope:
        scope.cancel()
        await helpers.join()
    assert said == ["last words"]
    assert len(nursery.child_tasks) == 0 or helpers.nursery is None


async def test_what_one_raises_ends_all_and_is_raised_by_who_joins(nursery: trio.Nursery) -> None:
    failed: list[str] = []
    helpers = Helpers(nursery, lambda: failed.append("told"))
    others = trio.Event()

    async def other() -> None:
        try:
            await trio.sleep_forever()
        finally:
            others.set()

    async def fail() -> None:
        raise ValueError("of a helper")

    helpers.start_soon(other)
    helpers.start_soon(fail)
    await wait_all_tasks_blocked()
    assert others.is_set()
    assert failed == ["told"]
    with pytest.RaisesGroup(pytest.RaisesGroup(pytest.RaisesExc(ValueError, match="helper"))):
        await helpers.join()


async def test_they_end_with_all_that_is_around_them() -> None:
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as home:
            helpers = Helpers(home, never)
            helpers.start_soon(trio.sleep_forever)
            await wait_all_tasks_blocked()
            scope.cancel()
    assert scope.cancelled_caught
    assert helpers.nursery is None


# on a socket of the system, whose reader is woken without a scope


async def test_a_peer_on_a_socket_that_never_answers_our_close_is_cut(
    autojump_clock: MockClock,
) -> None:
    async with open_test_broker(Broker()) as net:
        peer = await net.open_plain(make_pair=socket_pair)
        began = trio.current_time()
        assert net.broker.disconnect(peer.fd, 4001, "go")
        assert (await peer.receive_frame())[0] == CLOSE
        assert await peer.receive_eof() == b""
        seconds = net.broker.config.close_seconds
        assert seconds <= trio.current_time() - began < seconds + 1
        assert not net.broker.exists(peer.fd)
        await peer.aclose()


async def test_a_hook_that_hangs_on_a_socket_is_cut_with_its_connection(
    autojump_clock: MockClock,
) -> None:
    broker, ended = Broker(), []

    @broker.on_message
    async def hang(connection: Connection, frame: Frame) -> None:
        try:
            await trio.sleep_forever()
        finally:
            ended.append(connection.fd)

    async with open_test_broker(broker) as net:
        peer = await net.open_plain(make_pair=socket_pair)
        await peer.send_text("first")
        await wait_all_tasks_blocked()
        await peer.aclose()
        await trio.sleep(2 * broker.config.close_seconds)
        assert ended == [peer.fd]
        assert not broker.exists(peer.fd)


async def test_a_helper_that_fails_ends_its_connection_on_a_socket_alone(
    autojump_clock: MockClock,
) -> None:
    async with open_test_broker(Broker()) as net:
        peer, other = [await net.open_plain(make_pair=socket_pair) for _ in range(2)]

        async def fail() -> None:
            raise ValueError("of a helper")

        net.node.services.connections[peer.fd].peer.start_soon(fail)
        assert await peer.receive_eof() == b""
        assert not net.broker.exists(peer.fd)
        await net.broker.publish(f"fd:{other.fd}", "all is well")
        assert await other.receive_text() == "all is well"
        await peer.aclose()
        await other.aclose()
