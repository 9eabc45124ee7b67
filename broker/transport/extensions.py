"""The extension of WebSocket that is spoken here, and how it is agreed on: permessage-deflate (RFC 7692).

Rules:

1. An offer that cannot be taken is passed over, and the next one is looked at; if none can, there
   is no compression. Only a header that is no list of extensions at all breaks the handshake,
   as RFC 6455 section 9.1 asks.
2. We never keep sent messages to compress the next one by (`server_no_context_takeover`): so one message is
   compressed once for all who get it.
3. Clients keep theirs only where the caller lets them: it is a window here for each of them.
"""

import re
from collections.abc import Iterator
from typing import Final

import attrs

from broker.errors import HeadError

NAME: Final = "permessage-deflate"

WIDEST: Final = 15
"""Bits of the largest window that DEFLATE has, 32 KiB; and of what a side uses that says nothing."""

NARROWEST: Final = 9
"""Bits of the smallest window that zlib compresses with. RFC 7692 knows 8 as well: a client that can
read no more than that has to do without."""

INFLATE_BYTES: Final = 10 * 2**10
"""Bytes that zlib holds to inflate one stream, besides its window: 9.5 KiB of 1.2.13, and Python's object."""

_TOKEN = r"[-!#$%&'*+.^_`|~0-9A-Za-z]+"
# `a`, `a=1`, `a="1"`; a quoted value has to be a token as well, once its backslashes are taken off.
_NAME = re.compile(rf"[ \t]*({_TOKEN})[ \t]*")
_VALUE = re.compile(rf'=[ \t]*(?:({_TOKEN})|"((?:[^"\\]|\\.)*)")[ \t]*')
_EMPTY = re.compile(r"[ \t]*(?:,|\Z)")
_IS_TOKEN = re.compile(_TOKEN).fullmatch
_BITS = re.compile("[89]|1[0-5]").fullmatch

_Offer = tuple[str, list[tuple[str, str | None]]]


@attrs.frozen
class Deflate:
    """The compression that both sides agreed on. Bits are those of a window: `server_bits` of ours at most,
    `client_bits` of the client's. `client_keeps`: a message of the client may refer to those before it."""

    server_bits: int = WIDEST
    client_bits: int = WIDEST
    client_keeps: bool = False
    answer: str = attrs.field(default="", eq=False)
    """The value of `Sec-WebSocket-Extensions` that tells the peer."""

    @property
    def kept_bytes(self) -> int:
        """Memory that is held for as long as the connection, once the peer has sent something."""
        return window_bytes(self.client_bits) if self.client_keeps else 0


def window_bytes(bits: int) -> int:
    """The memory that it takes to inflate with a window of so many bits."""
    return INFLATE_BYTES + (1 << bits)


def choose_deflate(offers: str, may_keep: bool = False) -> Deflate | None:
    """The first of the offers in a `Sec-WebSocket-Extensions` header that can be taken, or None.

    `may_keep`: a client that wants to may keep its window between messages. Linear. Raises `HeadError`
    (400) for a header that is no list of extensions.
    """
    for name, parameters in _read(offers):
        if name == NAME:
            taken = _take(parameters, may_keep)
            if taken is not None:
                return taken
    return None


def _take(parameters: list[tuple[str, str | None]], may_keep: bool) -> Deflate | None:
    """None for an offer to decline, by section 7.1: a parameter is unknown, given twice, or of a bad
    value."""
    given = dict(parameters)
    if len(given) < len(parameters):
        return None
    server_bits = client_bits = WIDEST
    answer = [NAME, "server_no_context_takeover"]
    for name, value in parameters:
        if name in ("server_no_context_takeover", "client_no_context_takeover"):
            if value is not None:
                return None
        elif name == "server_max_window_bits":
            if value is None or not _BITS(value) or int(value) < NARROWEST:
                return None
            server_bits = int(value)
            answer.append(f"{name}={value}")
        elif name == "client_max_window_bits":
            if value is not None:
                if not _BITS(value):
                    return None
                client_bits = int(value)
                answer.append(f"{name}={value}")
        else:
            return None
    keeps = may_keep and "client_no_context_takeover" not in given
    if not keeps:
        answer.insert(2, "client_no_context_takeover")
    return Deflate(server_bits, client_bits, keeps, "; ".join(answer))


def _read(offers: str) -> Iterator[_Offer]:
    """The extensions of a header, in their order. An empty element is passed over (RFC 9110 section
    5.6.1). All of it is read before the first comes out."""
    found: list[_Offer] = []
    at, end = 0, len(offers)
    while at < end:
        match = _NAME.match(offers, at)
        if match is None:
            match = _EMPTY.match(offers, at)
            if match is None:
                raise _malformed()
            at = match.end()
            continue
        at = match.end()
        parameters: list[tuple[str, str | None]] = []
        found.append((match[1], parameters))
        while at < end and offers[at] == ";":
            name = _NAME.match(offers, at + 1)
            if name is None:
                raise _malformed()
            at = name.end()
            value = _VALUE.match(offers, at)
            if value is None:
                parameters.append((name[1], None))
                continue
            at = value.end()
            text = value[1] if value[1] is not None else re.sub(r"\\(.)", r"\1", value[2])
            if not _IS_TOKEN(text):
                raise _malformed()
            parameters.append((name[1], text))
        if at < end and offers[at] != ",":
            raise _malformed()
        at += 1
    return iter(found)


def _malformed() -> HeadError:
    return HeadError(400, "the Sec-WebSocket-Extensions header is no list of extensions")
