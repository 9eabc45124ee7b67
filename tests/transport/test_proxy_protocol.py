"""The PROXY protocol: what is read, what is refused, and that no byte behind it is lost."""

import socket
import struct
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import HeadError
from broker.transport.proxy_protocol import read_proxy_header

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
BEHIND = b"GET / HTTP/1.1\r\n"


def v2(command: int, family: int, body: bytes) -> bytes:
    return SIGNATURE + struct.pack("!BBH", command, family, len(body)) + body


FOUR = socket.inet_aton("192.0.2.7") + socket.inet_aton("10.0.0.1") + struct.pack("!HH", 4711, 443)
SIX = (
    socket.inet_pton(socket.AF_INET6, "2001:db8::7")
    + socket.inet_pton(socket.AF_INET6, "::1")
    + struct.pack("!HH", 4711, 443)
)

MAPPED = socket.inet_pton(socket.AF_INET6, "::ffff:192.0.2.7") + SIX[16:]

GOOD = [
    (b"PROXY TCP4 192.0.2.7 10.0.0.1 4711 443\r\n", "192.0.2.7:4711"),
    (b"PROXY TCP6 2001:db8::7 ::1 4711 443\r\n", "[2001:db8::7]:4711"),
    (b"PROXY TCP6 ::ffff:192.0.2.7 ::1 4711 443\r\n", "192.0.2.7:4711"),
    (b"PROXY UNKNOWN\r\n", None),
    (b"PROXY UNKNOWN ffff::ffff ffff::fffe 65535 65535\r\n", None),
    (v2(0x21, 0x11, FOUR), "192.0.2.7:4711"),
    (v2(0x21, 0x11, FOUR + b"\x01\0\x02h2"), "192.0.2.7:4711"),
    (v2(0x21, 0x21, SIX), "[2001:db8::7]:4711"),
    (v2(0x21, 0x21, MAPPED), "192.0.2.7:4711"),
    (v2(0x20, 0x00, b""), None),
    (v2(0x20, 0x11, FOUR), None),
    (v2(0x21, 0x00, b""), None),
    (v2(0x21, 0x31, bytes(216)), None),
]

BAD = [
    b"",
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"PROXY TCP4 192.0.2.7 10.0.0.1 4711\r\n",
    b"PROXY TCP4 2001:db8::7 ::1 4711 443\r\n",
    b"PROXY TCP6 192.0.2.7 10.0.0.1 4711 443\r\n",
    b"PROXY TCP4 192.0.2.7 10.0.0.1 99999 443\r\n",
    b"PROXY TCP4 192.0.2.7 10.0.0.1 x 443\r\n",
    b"PROXY TCP4 192.0.2.7 10.0.0.1 1 1\n" + b"x" * 99,
    b"PROXY SCTP 192.0.2.7 10.0.0.1 4711 443\r\n",
    b"PROXY  UNKNOWN\r\n",
    b"PROXY UNKNOWN anything\n",
    b"PROXY TCP6 fe80::1%\x1b[31m ::1 4711 443\r\n",
    b"PROXY UNKNOWN" + b" " * 200,
    b"PROXY UNKNOWN",
    b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\0",
    SIGNATURE,
    v2(0x11, 0x11, FOUR),
    v2(0x22, 0x11, FOUR),
    v2(0x21, 0x11, FOUR[:11]),
    v2(0x21, 0x21, FOUR),
    v2(0x21, 0x41, FOUR),
    SIGNATURE + struct.pack("!BBH", 0x21, 0x11, 65535) + FOUR,
]


@asynccontextmanager
async def sent(data: bytes) -> AsyncGenerator[trio.SocketStream, None]:
    """The end of a connection at which all of this has come, and no more does."""
    ours, theirs = trio.socket.socketpair()
    await theirs.send(data)
    theirs.shutdown(socket.SHUT_WR)
    with theirs:
        async with trio.SocketStream(ours) as stream:
            yield stream


@pytest.mark.parametrize(("header", "address"), GOOD)
async def test_whose_it_is_and_what_is_behind_stays(header: bytes, address: str | None) -> None:
    async with sent(header + BEHIND) as stream:
        assert await read_proxy_header(stream) == address
        assert await stream.receive_some() == BEHIND


@pytest.mark.parametrize(("header", "address"), [GOOD[0], GOOD[5]])
async def test_it_may_come_byte_by_byte(header: bytes, address: str) -> None:
    ours, theirs = trio.socket.socketpair()
    async with trio.SocketStream(ours) as stream, trio.open_nursery() as nursery:

        async def read() -> None:
            assert await read_proxy_header(stream) == address

        nursery.start_soon(read)
        for byte in header:
            await theirs.send(bytes((byte,)))
            await trio.testing.wait_all_tasks_blocked()
    theirs.close()


@pytest.mark.parametrize("data", BAD)
async def test_anything_else_is_refused(data: bytes) -> None:
    async with sent(data) as stream:
        with pytest.raises(HeadError) as caught:
            await read_proxy_header(stream)
    assert caught.value.status == 400


@given(st.binary(max_size=300), st.sampled_from([b"", SIGNATURE, b"PROXY TCP4 ", b"PROXY TCP6 "]))
def test_nothing_else_is_raised(data: bytes, start: bytes) -> None:
    async def main() -> None:
        async with sent(start + data) as stream:
            try:
                address = await read_proxy_header(stream)
            except HeadError:
                return
            assert address is None or address.rpartition(":")[2].isdecimal()

    trio.run(main)
