"""One connection to the broker, from its handshake to its end: replies it owes us, commands we owe it."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import trio
import trio_websocket
from wsproto.utilities import ProtocolError

from broker.client.loss import Lost, foreign
from broker.client.subscription import Subscription
from broker.client.wire import Reply, encode
from broker.errors import CloseCode

OUTBOX_COMMANDS = 1000
"""Commands that wait for the writer before requests and publishes wait as well."""

OUTBOX_BYTES = 4 * 2**20
"""The same in bytes: four of the largest messages that a broker takes by default."""

FRAME_BYTES = 64 * 2**10
"""Commands that wait are joined into one frame below this size: far below the 1 MiB a broker takes
by default. A larger command is a frame of its own, so that joining makes none too large."""

UNHEARD_REPLIES = 10_000
"""Requests that nobody waits for any more and whose replies are still due. Beyond that a reply
that nobody expects is no longer told from one that nobody asked for: 1 MiB is enough for it."""

SERVER_TOPICS = 10_000
SERVER_TOPICS_BYTES = 2**20
"""Subscriptions that the broker makes for one connection, and their names in all: more than any
app gives one user, with names of 100 bytes."""

PONG = b"{}"


@attrs.define(eq=False)
class Pending:
    """A request whose reply has not come."""

    method: str
    subscription: Subscription[Any] | None = None
    done: trio.Event = attrs.field(factory=trio.Event)
    reply: Reply | None = None
    lost: Lost | None = None


class ServerTopics:
    """The topics that the broker has subscribed this connection to."""

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._bytes = 0

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def add(self, name: str) -> None:
        """Raises `Lost` when the broker has made too many."""
        if name in self._names:
            return
        self._names.add(name)
        self._bytes += len(name)
        if len(self._names) > SERVER_TOPICS or self._bytes > SERVER_TOPICS_BYTES:
            raise foreign(f"more than {SERVER_TOPICS:,} subscriptions that nobody asked for")

    def discard(self, name: str) -> None:
        if name in self._names:
            self._names.remove(name)
            self._bytes -= len(name)


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
        self.welcomed = False
        self.ping = 0
        self.pong = False
        self.server_topics: ServerTopics = ServerTopics()
        self.closing: bool = False
        self.written: trio.Event = trio.Event()
        self.room: trio.Event = trio.Event()
        self._last_id = 0
        self._unheard: set[int] | None = set()
        self._pong_waits = False
        self._bytes_queued = 0
        self._mail, self._queued = trio.open_memory_channel[bytes](math.inf)

    @property
    def full(self) -> bool:
        """Whether so much waits for the writer that the next command should wait too."""
        return (
            self._queued.statistics().current_buffer_used >= OUTBOX_COMMANDS
            or self._bytes_queued >= OUTBOX_BYTES
        )

    def post(self, line: bytes) -> None:
        """Queue one command. Never waits: a caller that can wait looks at `full` first."""
        if not self.closing:
            self._bytes_queued += len(line)
            self._mail.send_nowait(line)

    def post_pong(self) -> None:
        """Queue the answer to a ping; one answers all that came before it is sent."""
        if self.pong and not self._pong_waits:
            self._pong_waits = True
            self.post(PONG)

    def ask(
        self,
        method: str,
        params: Mapping[str, object],
        subscription: Subscription[Any] | None = None,
    ) -> tuple[int, Pending]:
        """Queue a request, and say under which number its reply will be found in `pending`."""
        line = encode({"id": self._last_id + 1, method: params})
        self._last_id += 1
        self.post(line)
        pending = self.pending[self._last_id] = Pending(method, subscription)
        return self._last_id, pending

    def forget(self, number: int) -> None:
        """Nobody waits for this reply any more; that it comes is still right."""
        if self.pending.pop(number, None) is not None and self._unheard is not None:
            self._unheard.add(number)
            if len(self._unheard) > UNHEARD_REPLIES:
                self._unheard = None

    def take_pending(self, number: int, reply: Reply) -> Pending | None:
        """The request that this is the reply to; None if nobody waits for it any more.

        Raises `Lost` for a reply that was not asked for, came before, or is of another kind.
        """
        pending = self.pending.pop(number, None)
        if pending is None:
            if number > self._last_id or (
                self._unheard is not None and number not in self._unheard
            ):
                raise foreign(f"a reply to request {number}, for which none is due")
            if self._unheard is not None:
                self._unheard.remove(number)
            return None
        if not reply.answers(pending.method):
            self.pending[number] = pending  # it ends with the connection
            raise foreign(f"the reply to {pending.method} is of another kind")
        return pending

    def finish(self) -> None:
        """The writer sends what is queued, then says goodbye."""
        self.closing = True
        self._mail.close()

    async def write(self) -> None:
        """Send what is posted until `finish`, then close with 1000 and wait for the answer."""
        try:
            async for line in self._queued:
                self._taken(line)
                frame = bytearray(line)
                while (more := self._next_queued()) is not None:
                    self._taken(more)
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

    def _taken(self, line: bytes) -> None:
        self._bytes_queued -= len(line)
        if line == PONG:
            self._pong_waits = False

    def _next_queued(self) -> bytes | None:
        try:
            return self._queued.receive_nowait()
        except (trio.WouldBlock, trio.EndOfChannel):
            return None

    async def _send(self, frame: bytearray) -> None:
        self.room.set()
        self.room = trio.Event()
        await self.ws.send_message(frame.decode())
