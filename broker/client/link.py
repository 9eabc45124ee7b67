"""One connection to the broker, from its handshake to its end, and how it can end.

Rule: foreign exceptions become a `Lost` here, and nowhere else.
"""

import itertools
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import trio
import trio_websocket
from wsproto.utilities import ProtocolError

from broker.client.subscription import Subscription
from broker.client.wire import Reply, encode
from broker.errors import CloseCode

OUTBOX_COMMANDS = 1000
"""Commands that wait for the writer before a publish without reply waits as well."""

FRAME_BYTES = 64 * 2**10
"""Commands that wait are joined into one frame below this size: far below the 1 MiB a broker takes
by default. A larger command is a frame of its own, so that joining makes none too large."""


class Lost(Exception):
    """How one connection ended. `final`: trying again would be no use."""

    def __init__(self, code: int, reason: str, *, final: bool | None = None) -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason
        # The ranges in which the official clients stay away.
        stays_away = 3500 <= code <= 3999 or 4500 <= code <= 4999
        self.final = stays_away if final is None else final


def foreign(what: str) -> Lost:
    return Lost(CloseCode.PROTOCOL_ERROR, f"the answer is not this broker's protocol ({what})")


# What a connection that fails may raise; anything else is a bug of ours and is not contained.
# ProtocolError: trio-websocket lets it escape, such as for a Ping after our Close (its issue #184).
LOSSES = (
    OSError,
    trio.BrokenResourceError,
    trio.ClosedResourceError,
    trio_websocket.HandshakeError,
    trio_websocket.ConnectionClosed,
    ProtocolError,
)


def explain(error: BaseException) -> Lost:
    """The one seam at which foreign exceptions become a loss."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, trio_websocket.ConnectionRejected):
        return Lost(CloseCode.ABNORMAL, f"the answer is HTTP {error.status_code}, not WebSocket")
    if isinstance(error, trio_websocket.ConnectionClosed):
        if error.reason is None:
            return Lost(CloseCode.ABNORMAL, "connection closed")
        return Lost(error.reason.code, error.reason.reason or error.reason.name.lower())
    if isinstance(error, OSError) and error.__cause__ is not None and error.errno is None:
        # Trio says that all addresses failed, and keeps the reasons in a group.
        return explain(error.__cause__)
    text = str(error)
    if isinstance(error, OSError) and error.errno is not None:
        # Trio adds the address to the text, which the caller has named already.
        text = os.strerror(error.errno) if error.errno > 0 else error.strerror or text
    text = text or type(error).__name__
    return Lost(CloseCode.ABNORMAL, text[0].lower() + text[1:])


class HandshakeStream(trio.abc.Stream):
    """The stream under trio-websocket, which waits for ever when it ends during the handshake.

    Until `opened`, the end of the stream is an error that gets out of trio-websocket.
    """

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self.opened = False

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        try:
            data = await self._stream.receive_some(max_bytes)
        except trio.BrokenResourceError as error:
            if self.opened:
                raise
            raise self._unanswered(error) from error
        if not data and not self.opened:
            raise self._unanswered(None)
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        try:
            await self._stream.send_all(data)
        except trio.BrokenResourceError as error:
            if self.opened:
                raise
            raise self._unanswered(error) from error

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self._stream.aclose()

    def _unanswered(self, error: BaseException | None) -> ConnectionError:
        why = "" if error is None or error.__cause__ is None else f": {error.__cause__}"
        return ConnectionError(0, f"closed before the WebSocket handshake was answered{why}")


@attrs.define(eq=False)
class Pending:
    """A request whose reply has not come."""

    subscription: Subscription[Any] | None
    done: trio.Event = attrs.field(factory=trio.Event)
    reply: Reply | None = None
    lost: Lost | None = None


class Link:
    """One connection to the broker, from its handshake to its end."""

    def __init__(
        self,
        ws: trio_websocket.WebSocketConnection,
        nursery: trio.Nursery,
        came_up: Callable[[], None],
    ) -> None:
        self.ws = ws
        self.nursery = nursery
        self.came_up = came_up
        self.pending: dict[int, Pending] = {}
        self.ping = 0
        self.pong = False
        self.server_topics: set[str] = set()
        self.closing = False
        self.written = trio.Event()
        self.room = trio.Event()
        self._ids = itertools.count(1)
        self._mail, self._queued = trio.open_memory_channel[bytes](math.inf)

    @property
    def full(self) -> bool:
        return self._queued.statistics().current_buffer_used >= OUTBOX_COMMANDS

    def post(self, line: bytes) -> None:
        """Queue one command. Never waits: callers that need no reply look at `full` first."""
        if not self.closing:
            self._mail.send_nowait(line)

    def ask(
        self,
        method: str,
        params: Mapping[str, object],
        subscription: Subscription[Any] | None = None,
    ) -> tuple[int, Pending]:
        number = next(self._ids)
        self.post(encode({"id": number, method: params}))
        pending = self.pending[number] = Pending(subscription)
        return number, pending

    def finish(self) -> None:
        """The writer sends what is queued, then says goodbye."""
        self.closing = True
        self._mail.close()

    async def write(self) -> None:
        """Send what is posted until `finish`, then close with 1000 and wait for the answer."""
        try:
            async for line in self._queued:
                frame = bytearray(line)
                while (more := self._next_queued()) is not None:
                    if len(frame) + len(more) >= FRAME_BYTES:
                        await self._send(frame)
                        frame = bytearray(more)
                    else:
                        frame += b"\n" + more
                await self._send(frame)
            await self.ws.aclose(CloseCode.NORMAL)
        except (trio_websocket.ConnectionClosed, ProtocolError):
            pass  # the reader finds out why
        finally:
            self.written.set()

    def _next_queued(self) -> bytes | None:
        try:
            return self._queued.receive_nowait()
        except (trio.WouldBlock, trio.EndOfChannel):
            return None

    async def _send(self, frame: bytearray) -> None:
        self.room.set()
        self.room = trio.Event()
        await self.ws.send_message(frame.decode())
