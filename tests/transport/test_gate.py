"""The gate: who may take the next connection of a socket that several accept from."""

import os
import socket
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from functools import partial

import attrs
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from broker.transport import gate as module
from broker.transport.gate import BEAT, LEAD, PAUSE, PAUSES, SILENCE, Counts, Gate, GatedListener

pytestmark = pytest.mark.usefixtures("autojump_clock")


def shared(places: int) -> Counts:
    return Counts(memoryview(bytearray(places * 16)).cast("q"), trio.current_time)


@attrs.define(eq=False)
class Place:
    """One of several that accept from a socket."""

    gate: Gate
    taken: list[trio.SocketStream]


@asynccontextmanager
async def places(number: int) -> AsyncGenerator[tuple[list[Place], Callable[[], socket.socket]]]:
    """So many listeners on one socket, none of which accepts yet; and what connects to it."""
    counts = shared(number)
    with socket.create_server(("127.0.0.1", 0)) as server:
        made = []
        for each in range(number):
            taken: list[trio.SocketStream] = []
            made.append(Place(Gate(counts, each, partial(len, taken)), taken))
        peers: list[socket.socket] = []

        def connect() -> socket.socket:
            peers.append(socket.create_connection(server.getsockname()))
            return peers[-1]

        async with trio.open_nursery() as nursery:

            async def accept(place: Place) -> None:
                sock = trio.SocketListener(trio.socket.from_stdlib_socket(server.dup()))
                listener = GatedListener.over(sock, place.gate)
                try:
                    while True:
                        place.taken.append(await listener.accept())
                        place.gate.note()
                finally:
                    await listener.aclose()

            for place in made:
                place.gate.note()
                nursery.start_soon(accept, place)
            yield made, connect
            nursery.cancel_scope.cancel()
        for place in made:
            for stream in place.taken:
                await stream.aclose()
        for peer in peers:
            peer.close()


async def settle(made: list[Place], number: int) -> None:
    """Until so many have been accepted. The system needs real time for a handshake, if little."""
    while sum(len(place.taken) for place in made) < number:
        await trio.testing.wait_all_tasks_blocked()
        await trio.sleep(PAUSE)


async def test_nobody_gets_many_more_than_the_least(autojump_clock: MockClock) -> None:
    async with places(4) as (made, connect):
        for number in range(200):
            connect()
            await settle(made, number + 1)
        counts = [len(place.taken) for place in made]
    assert sum(counts) == 200
    assert max(counts) - min(counts) <= LEAD


async def test_one_that_hangs_is_waited_for_a_moment_and_no_longer(
    autojump_clock: MockClock,
) -> None:
    async with places(1) as (made, connect):
        (place,) = made
        counts = place.gate.counts = shared(2)
        counts.note(1, 0)
        for number in range(LEAD):
            connect()
            await settle(made, number + 1)
        began = trio.current_time()
        connect()
        await settle(made, LEAD + 1)
        assert trio.current_time() - began == pytest.approx(PAUSES * PAUSE, abs=2 * PAUSE)
        await trio.sleep(SILENCE)
        place.gate.note()
        assert not place.gate.is_ahead()


async def test_one_that_has_left_is_not_waited_for(autojump_clock: MockClock) -> None:
    counts = shared(2)
    gate = Gate(counts, 0, lambda: 100)
    counts.note(1, 0)
    assert gate.is_ahead()
    counts.leave(1)
    gate.note()
    assert not gate.is_ahead()
    assert counts.silence(1) is None


async def test_a_beat_tells_that_one_lives_and_its_end_that_it_does_not(
    autojump_clock: MockClock,
) -> None:
    counts = shared(1)
    gate = Gate(counts, 0, lambda: 7)
    over = False
    async with trio.open_nursery() as nursery:
        nursery.start_soon(gate.beat, lambda: over)
        await trio.sleep(10 * BEAT)
        silence = counts.silence(0)
        assert silence is not None
        assert silence <= BEAT
        assert counts.connections(0) == 7
        over = True
    assert counts.silence(0) is None
    assert counts.least() is None


async def test_a_connection_that_another_took_is_no_error(autojump_clock: MockClock) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        sock = trio.SocketListener(trio.socket.from_stdlib_socket(server.dup()))
        listener = GatedListener.over(sock, Gate(shared(1), 0, lambda: 0))
        taken: list[trio.SocketStream] = []

        async def accept() -> None:
            taken.append(await listener.accept())

        async with trio.open_nursery() as nursery:
            with socket.create_connection(server.getsockname()):
                other, _ = server.accept()  # before the listener has run at all
                other.close()
                nursery.start_soon(accept)
                await wait_all_tasks_blocked()
                assert taken == []
                with socket.create_connection(server.getsockname()):
                    while not taken:  # noqa: ASYNC110 - the system's own time
                        await trio.sleep(PAUSE)
        await taken[0].aclose()
        await listener.aclose()


async def test_a_listener_that_is_closed_says_so(autojump_clock: MockClock) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        sock = trio.SocketListener(trio.socket.from_stdlib_socket(server.dup()))
        listener = GatedListener.over(sock, Gate(shared(1), 0, lambda: 0))
        async with trio.open_nursery() as nursery:

            async def accept() -> None:
                with pytest.raises(trio.ClosedResourceError):
                    await listener.accept()

            nursery.start_soon(accept)
            await wait_all_tasks_blocked()
            await listener.aclose()
        with pytest.raises(trio.ClosedResourceError):
            await listener.accept()
        await listener.aclose()


def test_counts_are_shared_by_a_file() -> None:
    fileno = module.make_shared(3)
    first, second = Counts.of(fileno), Counts.of(fileno)
    os.close(fileno)
    first.note(2, 41)
    assert second.connections(2) == 41
    assert second.least() == 41
