"""The PROXY protocol, versions 1 and 2: how a proxy that passes on bytes says whose they are.

It stands before all else, before TLS too, once a connection. See the specification of HAProxy,
doc/proxy-protocol.txt.

Rules:

1. Not a byte behind it is read here: those are TLS's, or of the request.
2. It is read from proxies that the settings name, and there it is owed; from others it is none, and so
   no HTTP request.
"""

import ipaddress
import socket
import struct
from typing import Final

import trio

from broker.errors import HeadError

_V2: Final = b"\r\n\r\n\0\r\nQUIT\n"
_V1: Final = b"PROXY "
_V1_LINE: Final = 107
"""The longest line of version 1, with its line end."""

_V2_BYTES: Final = 4096
"""The most that stands behind the fixed part of version 2: addresses have 216, and what HAProxy tells of
a client's certificate some hundreds."""

_NO_HEADER: Final = "this proxy has to begin with the PROXY protocol (proxy_protocol is on)"


async def read_proxy_header(stream: trio.SocketStream) -> str | None:
    """The client's address, as `HOST:PORT`, by the header; None where the proxy speaks for itself, as in a
    health check, or of a client without an address.

    Raises `HeadError` for anything else. The caller brings the deadline; cancelled, close the stream.
    """
    start = await _exactly(stream, len(_V2))
    if start == _V2:
        return await _read_v2(stream)
    if start.startswith(_V1):
        return _parse_v1(start + await _to_line_end(stream, _V1_LINE - len(start)))
    raise HeadError(400, _NO_HEADER)


async def _exactly(stream: trio.SocketStream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = await stream.socket.recv(size - len(data))
        if not more:
            raise HeadError(400, _NO_HEADER)
        data += more
    return data


async def _to_line_end(stream: trio.SocketStream, most: int) -> bytes:
    """Read through the next line end: looked at first, so that no byte behind it is taken."""
    line = b""
    while most > 0:
        seen = await stream.socket.recv(most, socket.MSG_PEEK)
        if not seen:
            break
        taken = await stream.socket.recv(seen.find(b"\n") + 1 or len(seen))
        line += taken
        most -= len(taken)
        if line.endswith(b"\n"):
            return line
    raise HeadError(400, "the line of the PROXY protocol does not end")


def _parse_v1(line: bytes) -> str | None:
    """`PROXY TCP4 192.0.2.7 192.0.2.1 4711 443\\r\\n`, and `PROXY UNKNOWN` with anything behind it."""
    words = line.removesuffix(b"\r\n").decode("latin-1").split(" ")
    is_whole = line.endswith(b"\r\n")
    if is_whole and words[1] == "UNKNOWN":
        return None
    # Python reads a zone as well, which may hold anything: it means something to the proxy alone.
    is_whole = is_whole and len(words) == 6 and "%" not in words[2]
    if is_whole and words[1] in ("TCP4", "TCP6") and words[4].isdecimal():
        try:
            made = ipaddress.IPv4Address if words[1] == "TCP4" else ipaddress.IPv6Address
            return _text(made(words[2]), int(words[4]))
        except ValueError:
            pass
    raise HeadError(400, "the line of the PROXY protocol is not as it has to be")


async def _read_v2(stream: trio.SocketStream) -> str | None:
    command, family, size = struct.unpack("!BBH", await _exactly(stream, 4))
    if command not in (0x20, 0x21) or size > _V2_BYTES:
        raise HeadError(400, "the header of the PROXY protocol is not as it has to be")
    body = await _exactly(stream, size)
    if command == 0x20:  # LOCAL: of the proxy itself
        return None
    if family >> 4 == 1 and size >= 12:
        return _text(ipaddress.IPv4Address(body[:4]), int.from_bytes(body[8:10]))
    if family >> 4 == 2 and size >= 36:
        return _text(ipaddress.IPv6Address(body[:16]), int.from_bytes(body[32:34]))
    if family >> 4 in (0, 3):  # without an address; a Unix socket
        return None
    raise HeadError(400, "the header of the PROXY protocol is not as it has to be")


def _text(host: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int) -> str:
    if port > 65535:
        raise HeadError(400, "the line of the PROXY protocol is not as it has to be")
    if isinstance(host, ipaddress.IPv6Address) and host.ipv4_mapped is not None:
        host = host.ipv4_mapped  # of a proxy that listens on both by one socket
    return f"[{host}]:{port}" if host.version == 6 else f"{host}:{port}"
