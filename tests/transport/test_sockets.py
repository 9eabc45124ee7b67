"""Facts that the system tells of a socket, bare or below other streams."""

import gc
import os
import socket
import ssl
import weakref
from contextlib import suppress

import pytest
import trio
from trio.testing import memory_stream_pair, wait_all_tasks_blocked

from broker.transport.sockets import (
    RelayStream,
    acknowledged,
    fileno_of,
    has_room,
    let_go,
    receive_now,
    receive_some,
    socket_below,
    tls_fault,
    unacknowledged,
)


class Relay(RelayStream):
    def __init__(self, stream: trio.abc.Stream) -> None:
        self.transport_stream = stream

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self.transport_stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self.transport_stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        return await self.transport_stream.receive_some(max_bytes)

    async def aclose(self) -> None:
        await self.transport_stream.aclose()


def socket_pair(family: str) -> tuple[trio.SocketStream, trio.SocketStream]:
    if family == "unix":
        pair = socket.socketpair()
    else:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            client = socket.create_connection(listener.getsockname())
            pair = client, listener.accept()[0]
    ours, theirs = map(trio.socket.from_stdlib_socket, pair)
    return trio.SocketStream(ours), trio.SocketStream(theirs)


async def test_what_has_come_is_taken_without_waiting() -> None:
    ours, theirs = socket_pair("tcp")
    assert receive_now(ours, 9) == b""
    await theirs.send_all(b"early")
    await trio.lowlevel.wait_readable(ours.socket)
    assert receive_now(ours, 2) == b"ea"
    await theirs.aclose()
    assert receive_now(ours, 9) == b"rly"
    assert receive_now(ours, 9) == b""  # its end
    await ours.aclose()
    assert receive_now(ours, 9) == b""
    in_memory, other = memory_stream_pair()
    await other.send_all(b"x")
    assert receive_now(in_memory, 9) == b""


async def test_the_socket_below_is_found_through_what_is_above() -> None:
    ours, theirs = socket_pair("unix")
    tls = trio.SSLStream(ours, ssl.create_default_context(), server_hostname="x")
    for stream in (ours, tls, Relay(ours), Relay(tls)):
        assert socket_below(stream) is ours
    memory, _ = memory_stream_pair()
    assert socket_below(memory) is None
    assert socket_below(Relay(memory)) is None
    assert fileno_of(ours) == ours.socket.fileno()
    assert fileno_of(Relay(ours)) == -1
    await ours.aclose()
    await theirs.aclose()


@pytest.mark.parametrize("family", ["tcp", "unix"])
async def test_bytes_that_the_peer_takes_are_seen(family: str) -> None:
    ours, theirs = socket_pair(family)
    async with ours, theirs:
        fileno = ours.socket.fileno()
        assert has_room(ours)
        with suppress(BlockingIOError):
            while True:
                os.write(fileno, bytes(100_000))
        assert not has_room(ours)
        held, before = unacknowledged(fileno), acknowledged(ours)
        assert held > 0
        taken = 0
        while taken < 2 * held // 3:
            taken += len(await receive_some(theirs, 65536))
        await wait_all_tasks_blocked()
        assert unacknowledged(fileno) < held
        assert acknowledged(ours) != before


async def test_a_closed_socket_has_room_and_owes_nothing() -> None:
    ours, theirs = socket_pair("unix")
    fileno = ours.socket.fileno()
    await ours.aclose()
    await theirs.aclose()
    assert has_room(ours)
    assert unacknowledged(fileno) == 0
    assert unacknowledged(-1) == 0  # as its own socket says now
    assert acknowledged(ours) == 0


@pytest.mark.parametrize("cause", [None, OSError(104, "Connection reset by peer")])
def test_only_tls_s_own_faults_are_told(cause: BaseException | None) -> None:
    broken = trio.BrokenResourceError()
    broken.__cause__ = cause
    assert tls_fault(broken) is None


async def test_a_tls_stream_that_is_let_go_is_freed_without_the_collector() -> None:
    ours, _ = memory_stream_pair()
    tls = trio.SSLStream(ours, ssl.create_default_context(), server_hostname="x")
    openssl = next(each for each in vars(tls).values() if isinstance(each, ssl.SSLObject))
    is_there = weakref.ref(openssl)
    del openssl
    await trio.aclose_forcefully(tls)
    await trio.lowlevel.checkpoint()  # until then Trio has the exception that ended it
    gc.collect()
    gc.disable()
    try:
        let_go(tls)
        assert is_there() is None
    finally:
        gc.enable()


async def test_other_streams_stay_as_they_are_when_let_go() -> None:
    ours, theirs = memory_stream_pair()
    let_go(ours)
    await ours.send_all(b"as before")
    assert await theirs.receive_some() == b"as before"


async def test_a_socket_that_was_closed_here_is_read_no_more() -> None:
    ours, theirs = socket.socketpair()
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
    with theirs:
        await stream.aclose()
        with pytest.raises(trio.ClosedResourceError):
            await receive_some(stream, 4096)
