"""The flow of one connection, as far as the app has a say in it: it pauses what comes, waits for room, is
told of watermarks, and pings.

Rules:

1. A task that waits is woken by all that could end the wait, and looks again: at whether the peer is here,
   whose it is, and whether there is room.
2. A message that waits is charged to its connection. Where that may hold no more, nobody waits.
3. Hooks of watermarks hold up nobody, and nobody holds them up: they are what an app sends less by.
"""

from typing import Final

import attrs
import trio

from broker.core.memory import Part
from broker.core.messages import PushResult
from broker.hooks import Connection
from broker.session.ending import end_by
from broker.session.orders import Message, Orders, size_of
from broker.session.services import Services
from broker.transport import frames
from broker.transport.lane import Lane
from broker.transport.outbox import Watermarks
from broker.transport.tasks import StartSoon

SEND_BYTES: Final = 4096
"""Bytes of a send that waits, besides its data: its task."""

MAX_PING: Final = 125
"""Bytes of data in a control frame (RFC 6455 section 5.5)."""


@attrs.define(eq=False)
class Flow:
    """See the module. `start_soon` starts a task that ends with the connection at the latest."""

    _services: Services
    _connection: Connection
    _orders: Orders
    _lane: Lane
    _start_soon: StartSoon
    _is_apps: bool = True
    """Whether the app is told of its watermarks."""
    _turn: trio.StrictFIFOLock | None = attrs.field(init=False, default=None)
    _waiting: int = attrs.field(init=False, default=0)
    _told: bool = attrs.field(init=False, default=False)
    _is_telling: bool = attrs.field(init=False, default=False)

    # what comes

    def pause(self) -> bool:
        self._lane.pause()
        return True

    def resume(self) -> bool:
        self._lane.resume()
        return True

    # what goes

    def ping(self, data: bytes) -> bool:
        """Send a Ping; false where the transport has none. Raises `ValueError` for too much data."""
        if len(data) > MAX_PING:
            raise ValueError(f"a ping has at most {MAX_PING} bytes of data, not {len(data)}")
        if self._connection.transport != "websocket":
            return False
        orders = self._orders
        orders.router.send(orders.peer, (frames.encode(frames.PING, data),))
        return True

    async def send(self, message: Message) -> PushResult:
        """Push a message when there is room for it, in turn with all others that wait.

        FULL if nobody may wait any more, CLOSED and REBOUND if the peer is not what it was. Cancelled,
        it was not pushed.
        """
        peer, orders = self._orders.peer, self._orders
        user, size = peer.user, size_of(message)
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._turn is None and orders.has_room(size):
            result = orders.push(message)
            await trio.lowlevel.cancel_shielded_checkpoint()
            return result
        weight = SEND_BYTES + size
        if peer.holding.refusal(weight):
            return PushResult.FULL
        if self._turn is None:
            self._turn = trio.StrictFIFOLock()
        peer.holding.charge(Part.OUTBOXES, weight)
        self._waiting += 1
        try:
            async with self._turn:
                while peer.is_established and peer.user == user and not orders.has_room(size):
                    await orders.wait_change(size)
                if peer.is_established and peer.user != user:
                    return PushResult.REBOUND
                return orders.push(message)
        finally:
            peer.holding.charge(Part.OUTBOXES, -weight)
            self._waiting -= 1
            if not self._waiting:
                self._turn = None  # nobody is before the next one

    # watermarks

    def mark(self) -> None:
        """Go by the watermarks of now, if anybody wants to be told of them."""
        if self._is_apps and self._services.hooks.watch_buffers:
            high, low = self._services.config.watermarks
            self._orders.peer.outbox.mark(Watermarks(high, low, self._note))

    def _note(self, is_filling: bool) -> None:
        if not self._is_telling:
            self._is_telling = True
            self._start_soon(self._tell)

    async def _tell(self) -> None:
        """Tell the app how it is, until that is what it was told last."""
        hooks, peer = self._services.hooks, self._orders.peer
        try:
            while self._told != peer.outbox.is_filling:
                self._told = peer.outbox.is_filling
                kind = "buffer_full" if self._told else "buffer_empty"
                hook = hooks.buffer_full if self._told else hooks.buffer_empty
                if hook is not None:
                    try:
                        await hook(self._connection)
                    except Exception as error:  # noqa: BLE001 - it ends this connection, and no other
                        end_by(self._services, peer.fd, error, kind)
        finally:
            self._is_telling = False
