"""The handshake of TLS, in which what a peer says is answered when it is whole, and when its turn has come.

Words: a *record* is a piece of what a peer sends, with its length in front; a *hello* is the message that asks for
a signature and a key: the first of a connection, or its second where the first was about no key that is known here.

Rules:

1. OpenSSL gets a record when it is whole, and a hello when all its records are: so nobody sends half of it, pays
   for nothing, and is signed with a thousand others when the rest comes.
2. Not a byte behind a record is read here: after the handshake the stream is read as if this had not been.
3. Only lengths are looked at. All else, and whatever is no record, is for OpenSSL to judge.

A later handshake on the same connection is none of this module's: `listeners` has it switched off.
"""

import ssl
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from broker.core.work import TLS_HANDSHAKE, TLS_RECORD
from broker.transport.sockets import RelayStream, receive_now, receive_some

HELLO_BYTES: Final = 2**16
"""The longest hello, as in Go. Browsers send up to 2 KiB."""

HELLO_RECORDS: Final = 64
"""Records that a hello may come in. Nearly all come in one; some programs cut theirs into a few, to hide a name
in it."""

_HEADER: Final = 5
_RECORD_BYTES: Final = 2**14 + 2048
_KINDS: Final = range(20, 24)
_HANDSHAKE: Final = 22
_CLIENT_HELLO: Final = 1
_MESSAGE_HEADER: Final = 4


async def shake_hands(
    stream: trio.SSLStream[trio.abc.Stream], enter: Callable[[float], Awaitable[None]]
) -> None:
    """Do the handshake with a peer that has come. Before each answer `enter` is called with its work.

    Raises `trio.BrokenResourceError` and `trio.ClosedResourceError`. The caller brings the deadline; cancelled,
    close the stream.
    """
    plain = stream.transport_stream
    carrier = _Carrier(plain, enter)
    await carrier.wait_begun()
    stream.transport_stream = carrier
    try:
        await stream.do_handshake()
    finally:
        stream.transport_stream = plain


class _Carrier(RelayStream):
    """Carries TLS for the time of a handshake."""

    def __init__(self, stream: trio.abc.Stream, enter: Callable[[float], Awaitable[None]]) -> None:
        self.transport_stream: trio.abc.Stream = stream
        self._enter = enter
        self._begun = b""
        self._is_tls = True

    async def wait_begun(self) -> None:
        """Wait until the peer may be answered. Until then OpenSSL has no memory for it."""
        self._begun = await self.receive_some()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """The next record, or those of a hello; empty at the end of the stream."""
        begun, self._begun = self._begun, b""
        if begun:
            return begun
        said, work = await self._read()
        if said:
            await self._enter(work)
        return said

    async def _read(self) -> tuple[bytes, float]:
        """The same, and the work of an answer. What is no record comes as far as it was read."""
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
