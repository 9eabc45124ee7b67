"""The carrier of TLS: it hands on what a peer has sent when that is whole, and when its turn has come.

Words: a *record* is a piece of what a peer sends, with its length in front; a *hello* is the message that asks for
a signature and a key: the first of a connection, or its second where the first was about no key that is known here.

Rules:

1. In a handshake OpenSSL gets a record when it is whole, and a hello when all its records are: so nobody sends half
   of it, pays for nothing, and is signed with a thousand others when the rest comes. Not a byte behind is read.
2. Later it gets so many records at a time as a slice of work is for: a peer may ask for other keys in each record,
   of which one read holds 2,400. They are paid for before they are opened, since nothing may be in them.
3. Only lengths are looked at. All else, and whatever is no record, is for OpenSSL to judge.

A second handshake on a connection is none of this module's: `listeners` has it switched off.
"""

import ssl
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

import trio

from broker.core.work import SLICE, TLS_HANDSHAKE, TLS_OPENED, TLS_RECORD
from broker.transport.sockets import RelayStream, receive_now, receive_some

HELLO_BYTES: Final = 2**16
"""The longest hello, as in Go. Browsers send up to 2 KiB."""

HELLO_RECORDS: Final = 64
"""Records that a hello may come in. Nearly all come in one; some programs cut theirs into a few, to hide a name
in it."""

AT_ONCE: Final = int(SLICE / TLS_OPENED)
"""Records that OpenSSL opens in one step. A usual read has one, or four of 16 KiB."""

_READ_BYTES: Final = 2**16
_HEADER: Final = 5
_RECORD_BYTES: Final = 2**14 + 2048
_KINDS: Final = range(20, 24)
_HANDSHAKE: Final = 22
_CLIENT_HELLO: Final = 1
_MESSAGE_HEADER: Final = 4


class Party(Protocol):
    """One that has its turn with all others; see `routing.turns`."""

    async def wait_room(self, work: float = 0.0) -> None: ...
    def spend(self, work: float) -> None: ...


async def shake_hands(
    stream: trio.SSLStream[trio.abc.Stream],
    enter: Callable[[float], Awaitable[None]],
    party: Party,
) -> None:
    """Do the handshake with a peer that has come. Before each answer `enter` is called with its work; what it sends
    later is paid by `party`.

    Raises `trio.BrokenResourceError` and `trio.ClosedResourceError`. The caller brings the deadline; cancelled,
    close the stream.
    """
    plain = stream.transport_stream
    carrier = TlsCarrier(plain, enter, party)
    await carrier.wait_begun()
    stream.transport_stream = carrier
    try:
        await stream.do_handshake()
    except BaseException:
        stream.transport_stream = plain  # where a peer that speaks no TLS can be told so
        raise
    carrier.is_secured = True


class TlsCarrier(RelayStream):
    """A stream below TLS. See the module."""

    def __init__(
        self, stream: trio.abc.Stream, enter: Callable[[float], Awaitable[None]], party: Party
    ) -> None:
        self.transport_stream: trio.abc.Stream = stream
        self.is_secured = False
        """Whether the handshake is over."""
        self._enter = enter
        self._party = party
        self._begun = b""
        self._is_tls = True
        # Later: what was read and not handed on; where the next record begins, counted from there, or from as much of
        # its header as was handed on.
        self._ahead = b""
        self._next = 0
        self._header = b""

    async def wait_begun(self) -> None:
        """Wait until the peer may be answered. Until then OpenSSL has no memory for it."""
        self._begun = await self.receive_some()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """The bytes that OpenSSL may have next; empty at the end of the stream. Cancelled after the handshake, nothing is
        lost."""
        if self.is_secured:
            return await self._receive_later()
        begun, self._begun = self._begun, b""
        if begun:
            return begun
        said, work = await self._read()
        if said:
            await self._enter(work)
        return said

    async def _receive_later(self) -> bytes:
        if not self._ahead:
            self._ahead = bytes(await receive_some(self.transport_stream, _READ_BYTES))
        seen, place, count = self._header + self._ahead, self._next, 0
        while count < AT_ONCE and place + _HEADER <= len(seen):
            place += _HEADER + int.from_bytes(seen[place + 3 : place + _HEADER])
            count += 1
        end = min(place, len(seen)) if count == AT_ONCE else len(seen)
        work = count * TLS_OPENED
        await self._party.wait_room(work)
        self._party.spend(work)
        said, self._ahead = seen[len(self._header) : end], seen[end:]
        self._header, self._next = seen[place:end], max(0, place - end)
        return said

    async def _read(self) -> tuple[bytes, float]:
        """As much as is whole in a handshake, and the work of an answer. Bytes that are no record come as far as it was read."""
        said, message = bytearray(), bytearray()
        for _ in range(HELLO_RECORDS):
            start = len(said)
            body = start + _HEADER
            if not self._is_tls or not await self._read_up_to(said, body):
                break
            size = int.from_bytes(said[body - 2 : body])
            self._is_tls = said[start] in _KINDS and size <= _RECORD_BYTES
            if not self._is_tls or not await self._read_up_to(said, body + size):
                break
            message += said[body:]
            if said[start] != _HANDSHAKE or message[:1] != bytes([_CLIENT_HELLO]):
                return bytes(said), TLS_RECORD
            whole = _MESSAGE_HEADER + int.from_bytes(message[1:_MESSAGE_HEADER])
            if len(message) >= max(whole, _MESSAGE_HEADER):
                return bytes(said), TLS_HANDSHAKE
            if whole > HELLO_BYTES:
                raise _broken(f"a hello of {whole} bytes")
        else:
            raise _broken(f"a hello in more than {HELLO_RECORDS} records")
        return bytes(said or await receive_some(self.transport_stream, HELLO_BYTES)), TLS_RECORD

    async def _read_up_to(self, said: bytearray, size: int) -> bool:
        """Read until there are so many bytes; false if the stream ends before."""
        stream = self.transport_stream
        while len(said) < size:
            more = size - len(said)
            data = receive_now(stream, more) or await receive_some(stream, more)
            if not data:
                return False
            said += data
        return True

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self.transport_stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self.transport_stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self.transport_stream.aclose()


def _broken(reason: str) -> trio.BrokenResourceError:
    """As trio raises it for what OpenSSL refuses."""
    error, cause = trio.BrokenResourceError(reason), ssl.SSLError(reason)
    cause.reason = reason
    error.__cause__ = cause
    return error
