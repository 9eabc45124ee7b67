"""One peer, from the handshake to the closed socket: the lifetime of a connection.

Rules:

1. A fault of one peer ends that peer.
2. Ending is asked for before it is enforced. `Connection.close` sends a Close frame and gives a
   running hook, then the peer, `close_seconds` each; only then is anything cut.
3. The session owns who the peer is, the dispatcher what it says, `Orders` what the server wants of it. This
   module owns when each begins and ends.
"""

from collections.abc import Mapping
from math import inf
from time import time as wall_clock
from typing import ClassVar, Final

import trio

from broker.core.event_queue import EventFields, EventKind
from broker.core.memory import Holding, Part
from broker.core.messages import ONE_WAY, Close, Initiator, Transport
from broker.core.session import Phase, PhaseEvent
from broker.core.work import ENDING, SLICE
from broker.errors import CloseCode, Disconnect, UnsubscribeCode
from broker.hooks import OpenHook
from broker.protocols.codec import Codec, Result
from broker.routing.recipients import Peer
from broker.session.details import details_of
from broker.session.dispatch import Dispatcher
from broker.session.ending import (
    close_stream,
    end_by,
    how_it_ended,
    note_closed,
    run_close_hook,
    say_goodbye,
)
from broker.session.expiry import end_expired
from broker.session.flow import Flow
from broker.session.handshake import UNASKED, Welcome, choose_subprotocol
from broker.session.heartbeat import Heartbeat
from broker.session.helpers import CUT, Helped, Helpers
from broker.session.orders import Orders
from broker.session.profile import SUBPROTOCOLS
from broker.session.replies import NOTHING
from broker.session.services import Services
from broker.transport.extensions import Deflate
from broker.transport.head import Head, acceptance
from broker.transport.inflating import Inflater
from broker.transport.lane import Batch, Lane, Traffic
from broker.transport.outbox import Outbox
from broker.transport.sockets import fileno_of
from broker.transport.tasks import start_nothing

LEAVES_AT_ONCE: Final = 100.0
"""Work that is done in the very step in which it is known that a connection ends: 20 subscriptions are
left, where nobody watches. Most have fewer, and a hundred connections may end in one turn of the loop."""

FEW: Final = 20
"""Subscriptions that are looked at in that step without a turn."""


class Connection(Helped):
    """One peer while it is here: a WebSocket, or a client without one (`http.fallbacks`). It is the
    holder of the memory that is held for it."""

    __slots__ = (
        "_acceptance",
        "_deflate",
        "_dispatcher",
        "_flow",
        "_has_left",
        "_is_seen_out",
        "_serve_until",
        "_served",
        "_services",
        "_serving",
        "_topics_left",
        "_undelivered",
        "_waiting",
        "heartbeat",
        "holding",
        "orders",
    )

    orders: Orders

    default_codec: ClassVar[Codec | None] = None
    """The codec of a peer that has asked for none; None where its first message decides."""
    dispatches: ClassVar[type[Dispatcher]] = Dispatcher
    is_apps: ClassVar[bool] = True
    """Whether the app's `on_open` and `on_close` are told of it."""

    def __init__(
        self,
        services: Services,
        stream: trio.abc.Stream,
        head: Head,
        behind: bytes,
        address: str,
        *,
        transport: Transport = "websocket",
        answer: bytes = b"",
        welcome: Welcome = UNASKED,
    ) -> None:
        """`answer` accepts a peer that asked for no WebSocket, `welcome` is the answer of the app. Raises
        `HeadError` for extensions that are none."""
        super().__init__(stream, head, address, transport)
        if welcome is not UNASKED:
            self._data = welcome.data
        self._deflate: Deflate | None = None
        if transport == "websocket":
            self.subprotocol: str | None = choose_subprotocol(head, welcome.reply)
            self._deflate = deflate = services.compression.agree(head)
            extensions = "" if deflate is None else deflate.answer
            answer = acceptance(head, self.subprotocol, welcome.reply.lines, extensions)
        self._services = services
        self._undelivered = 0
        self._topics_left: tuple[str, ...] = ()  # that it was subscribed to when its end began
        self._flow: Flow | None = None
        self._serving: trio.CancelScope | None = None
        self._served: trio.Event | None = None
        self._serve_until = inf
        self._is_seen_out = False
        self._has_left = False  # all that others see, and nothing can have come since
        self._dispatcher: Dispatcher
        self.heartbeat: Heartbeat
        self._waiting = 0
        self._acceptance = answer
        self.holding: Holding = services.memory.hold(self)
        self.lane: Lane = Lane(
            stream,
            behind,
            services.lane_limits,
            self.end_soon,
            self._take_now,
            self._take_on,
            self.holding,
        )
        self.traffic: Traffic = self.lane.traffic

    # as its transport has it

    @property
    def answers_pings(self) -> bool:
        """Whether silence after a ping means that the peer is gone."""
        return True

    def connect_fields(self) -> Result:
        """Fields that the transport adds to the reply to `connect`."""
        return NOTHING

    @property
    def flow(self) -> Flow:
        """The app's say over what comes and goes: most apps never have any."""
        if self._flow is None:
            args = self.orders, self.lane, self.start_soon, self.is_apps
            self._flow = Flow(self._services, self, *args)
        return self._flow

    # from the handshake to the end

    async def run(self) -> None:
        """Accept, serve, say goodbye."""
        services = self._services
        self.task: trio.lowlevel.Task = trio.lowlevel.current_task()
        self.peer: Peer = services.router.hub.attach(
            lambda fd: Peer(fd, office=services.router.office, holding=self.holding)
        )
        peer = self.peer
        try:
            self.holding.open()
            self.holding.charge(Part.CONNECTIONS, len(self._field_lines) + len(self._target))
            self._open_outbox()
            try:
                self._begin()
                if fileno_of(self._stream) >= 0:
                    await self.lane.run(peer.start_soon)
                    await self._see_out()
                else:
                    with trio.CancelScope() as self._reading:
                        await self.lane.run(peer.start_soon)
                        await self._see_out()
            finally:
                # In this order: nobody delivers to an outbox without a writer.
                if not self._has_left:
                    self._leave(self._closing or CUT, inf)
                self._undelivered += peer.outbox.messages
                peer.outbox.abandon()
                if self.helpers is not None:
                    await self.helpers.join()  # noqa: ASYNC102 - shields itself
        finally:
            self.holding.close()
            try:
                close = self._note_end()
                try:
                    # The peer has no part in what the app does then.
                    await close_stream(services, self._stream)  # noqa: ASYNC102 - shields itself
                finally:
                    if self.is_apps:
                        await run_close_hook(services, self, close)  # noqa: ASYNC102 - the same
            finally:
                services.router.hub.detach(peer)

    def _note_end(self) -> Close:
        """Tell of the end. In one step: a sum over those who are here and those who have ended misses nobody."""
        services, peer = self._services, self.peer
        close = self._closing = (self._closing or CUT).with_undelivered(self._undelivered)
        if services.connections.pop(peer.fd, None) is not None:
            services.counts.note_ended(self.traffic, peer.outbox.dropped)
            last = details_of(services, self, self._topics_left)
            services.closed.add(last, close, wall_clock())
        seconds = trio.current_time() - self.traffic.began_at
        # These point at each other. Without this they would stay until the garbage collector
        # comes by, which is seldom, and with them all that came: half a message each.
        self._dispatcher.let_go()
        peer.start_soon = start_nothing
        del self.lane, self._dispatcher, self.heartbeat, self.task, self._flow
        self.helpers: Helpers | None = None
        self._serving = None
        note_closed(services, peer, self.address, close, seconds)
        return close

    def _open_outbox(self) -> None:
        services, peer = self._services, self.peer
        config, start_soon = services.config, self.start_soon
        peer.start_soon, peer.is_apps = start_soon, self.is_apps
        peer.outbox = self.lane.outbox = Outbox(
            self._stream,
            post=services.router.office.post,
            owner=self,
            max_bytes=config.outbox_bytes,
            max_messages=config.outbox_messages,
            stall_seconds=config.stall_seconds,
            ledger=services.router.office.ledger,
        )
        codec = SUBPROTOCOLS.get(self.subprotocol or "") or self.default_codec
        self.orders = Orders(services.router, peer, may_be_plain=codec is None)
        if services.hooks.watch_buffers:
            self.flow.mark()
        self.heartbeat = Heartbeat(self.orders, services.router, self.lane, peer.outbox)
        self._dispatcher = self.dispatches(
            services,
            peer,
            self.orders,
            self,
            codec,
            self.connect_fields(),
            start_soon,
        )
        self.lane.pay_by(self._dispatcher.pay)
        if self._deflate is not None:
            compression = services.compression
            compression.keep_window(self._deflate, self.holding)
            peer.packed = compression.codecs(self._deflate)
            self.lane.inflater = Inflater(self._deflate, compression.inflated)

    def _begin(self) -> None:
        services, peer = self._services, self.peer
        # First in the outbox, so nothing can come before it on the wire.
        services.router.send(peer, (self._acceptance,))
        self._acceptance = b""
        services.connections[peer.fd] = self
        services.counts.note_opened(self.transport)
        where: EventFields = {
            "address": self.address,
            "path": self.path,
            "transport": self.transport,
        }
        services.emit(EventKind.OPENED, peer.fd, "", **where)
        services.log.info(
            "open", fd=peer.fd, peer=self.address, path=self.path, transport=self.transport
        )
        if services.hooks.open is not None and self.is_apps:
            self._waiting += 1  # all that comes waits for the hook
            self._served = trio.Event()
            self.start_soon(self._serve, services.hooks.open, self._served)
        if services.draining:
            self.shut_down()

    async def _serve(self, open_hook: OpenHook | None, served: trio.Event) -> None:
        """Do what may have to wait for the app, until no more can come. Most sessions never need this task."""
        hook = "open"
        try:
            with trio.CancelScope(deadline=self._serve_until) as self._serving:
                try:
                    if open_hook is not None:
                        await open_hook(self)
                        self._waiting -= 1
                    hook = "message"
                    async for batch in self.lane.inbox:
                        await self._dispatcher.finish(batch)
                        self.lane.note_done(batch)
                        del batch  # or it would be kept until the next one comes
                        self._waiting -= 1
                        if self._closing is not None:
                            break
                except Exception as error:  # noqa: BLE001 - it ends this connection, and no other
                    end_by(self._services, self.fd, error, hook)
                # Questions have tasks of their own; what they are about is dealt with by then.
                await self._dispatcher.questions.wait_none()
        finally:
            served.set()

    def _take_now(self, batch: Batch) -> Batch:
        """Carry out what a batch begins with, as far as that goes in this step; return the rest.

        Called in the lane's task, as `_take_on` is, and both only effective while nothing that came before
        waits for the session's: to wake that would cost 10 µs, as much as three publishes, and to have it 3 KiB.
        """
        if self._waiting or self._dispatcher.questions.turns:
            return batch
        try:
            return self._dispatcher.take_read(batch, self.traffic.bytes)
        except Disconnect as order:
            self.close(order.code, order.reason)
            return []

    async def _take_on(self, batch: Batch) -> Batch:
        """Go on with what `_take_now` has left, as far as nobody but other sessions has to be waited for;
        return the rest."""
        if not (self._waiting or self._dispatcher.questions.turns):
            try:
                batch = await self._dispatcher.work_off(batch)
            except Disconnect as order:
                self.close(order.code, order.reason)
        if batch and self._closing is None:
            self._waiting += 1
            if self._served is None:
                self._served = trio.Event()
                self.start_soon(self._serve, None, self._served)
        return batch

    # the end

    def close(self, code: int, reason: str = "", initiator: Initiator = Initiator.SERVER) -> bool:
        """Begin to close: the peer gets what is queued, then a Close frame. Never waits.

        False if the connection was closing already.
        """
        if self._closing is not None or self.lane.is_ending:
            return False
        # A lone surrogate, as `json.loads` may give the app one, cannot be sent.
        reason = reason.encode(errors="replace").decode()
        self._closing = Close(code, reason, initiator)
        router, codec = self._services.router, self.orders.codec
        router.send(self.peer, () if codec is None else (codec.disconnect(code, reason),))
        self.peer.transition(PhaseEvent.CLOSE)
        self.lane.close(code, reason)
        self._leave(self._closing)
        self.end_soon()
        return True

    def shut_down(self) -> bool:
        """Close because the broker stops: 3001 to those who know that code, 1001 to all others."""
        code = CloseCode.GOING_AWAY if self.orders.codec is None else CloseCode.SHUTDOWN
        return self.close(code, "shutdown", Initiator.SHUTDOWN)

    def end_soon(self) -> None:
        """No more messages will come: a hook that is still running gets `close_seconds`."""
        due = trio.current_time() + self._services.config.close_seconds
        self._serve_until = min(self._serve_until, due)
        if self._serving is not None:
            self._serving.deadline = self._serve_until
        self._dispatcher.questions.end_soon(self._serve_until)
        if not self.lane.has_ended:
            self._see_out_beside()

    def _leave(self, close: Close, work: float = LEAVES_AT_ONCE) -> None:
        """Leave everything on this node that others see, once it is known how the peer ends; its will and
        its subscriptions as far as so much work goes. Nothing reaches those that are left any more."""
        services, peer = self._services, self.peer
        if peer.subscriptions and not self._topics_left:
            self._topics_left = tuple(peer.subscriptions)
        services.router.hub.sessions.retire(peer)
        peer.outbox.wake()
        services.requests.leave(peer.fd, work)
        services.publisher.forget(peer)
        if services.wills.weigh(peer.fd) <= work:
            services.wills.carry_out(peer, close)
            services.router.leave(peer, work)

    async def _leave_rest(self, close: Close) -> None:
        """Leave what is left, in turns with all others: a peer may have a thousand topics, a will for as many
        readers and a hundred thousand requests to answer, and a thousand peers may go at once."""
        services, peer = self._services, self.peer
        router, wills, requests = services.router, services.wills, services.requests
        while peer.subscriptions or wills.weigh(peer.fd) or requests.has(peer.fd):
            topics = max(SLICE, router.watchers.weigh_leaving(peer))
            await router.turns.wait(wills.weigh(peer.fd) + topics)
            wills.carry_out(peer, close)
            requests.leave(peer.fd, SLICE)
            router.leave(peer, topics)

    def _see_out_beside(self) -> None:
        if not self._is_seen_out:
            self._is_seen_out = True
            self.start_soon(self._see_out, True)

    async def _see_out(self, beside: bool = False) -> None:
        """The whole end: commands that came are carried out, queued messages go out, the peer may answer.

        Begun when the lane is done, and beside it, to stop it in the end, when we are done with a peer that
        goes on.
        """
        self._is_seen_out = True
        if self._closing is not None:
            await self._leave_rest(self._closing)
        if self._served is not None:
            await self._served.wait()
        if self._closing is None:
            # When hundreds go at once, nobody who stays is to wait for all of them, and they are not to be told
            # of each other.
            if len(self.peer.subscriptions) <= FEW:
                self._services.router.hub.stop_watching(self.peer)
            await self._services.router.turns.pay(ENDING)
        if self._closing is None:
            # All that came has been dealt with, and nobody has told the session to end.
            stall_seconds = self._services.config.stall_seconds
            self._closing = how_it_ended(self.lane, self.peer.outbox, stall_seconds)
            self.peer.transition(PhaseEvent.CLOSE)
            self._leave(self._closing)
            await self._leave_rest(self._closing)
            # Unless somebody may still act for it: a hook of its, or all others while it says goodbye.
            is_over = self.lane.has_ended and not self.peer.outbox.mail
            self._has_left = is_over and self._served is None
        seconds = self._services.config.close_seconds
        await say_goodbye(self.lane, self.peer.outbox, seconds)
        if beside:
            self.cut()

    # a peer that is too slow, or too heavy, or dead

    def give_up(self, reason: str = "slow") -> None:
        """The outbox is full and its topic's rule says close, or it has to give way."""
        # To send out the open run may make this outbox overflow once more, which then closes it.
        self._services.router.send(self.peer, ())
        if self._closing is None:
            self._undelivered += self.peer.outbox.discard()
            self.close(CloseCode.SLOW, reason, Initiator.SLOW)

    @property
    def party(self) -> str:
        """The party whose memory it takes."""
        return self._services.party_of(self.user, self.address, f"fd {self.fd}")

    def own_waiting(self) -> int:
        """About how many of those no other outbox holds."""
        return self.peer.outbox.own_bytes()

    def give_way(self) -> None:
        """Memory is short, and this connection holds the most: end it, at once if it is ending already."""
        if self._closing is None and not self.lane.is_ending:
            self.give_up("memory is short")
        else:
            self.cut()

    def note_dropped(self, dropped: Mapping[str, int]) -> None:
        """Publications were dropped: a client that can recover them is told that there is a gap."""
        subscriptions = self.peer.subscriptions
        gaps = [s for topic in dropped if (s := subscriptions.get(topic)) and s.recoverable]
        # Nothing of these may reach the client now: it recovers from the last it saw. Should it
        # overflow once more, and that end everything, they are behind a gap all the same.
        self._services.router.drop_topics(self.peer, [gap.name for gap in gaps])
        self._services.counts.gaps += len(gaps)
        if any(gap.server_side or self.transport in ONE_WAY for gap in gaps):
            # Which it recovers with its next connect.
            self.close(CloseCode.INSUFFICIENT_STATE, "insufficient state")
            return
        for gap in gaps:
            self.orders.end_subscription(
                gap.name, UnsubscribeCode.INSUFFICIENT_STATE, "insufficient state"
            )

    def note_broken(self) -> None:
        """The stream is dead, or its peer takes nothing: which the lane may never see."""
        self.lane.lost()
        self._see_out_beside()

    # time

    def beat(self, now: float) -> bool:
        """Look at what has expired, and at a peer that is silent or stale; note in `look_at` until when
        nothing of that is due. Whether it has to be called again, as more has expired than is ended in one
        step."""
        if self._closing is None and end_expired(self, now):
            return True
        # While it waits for a hook it is not the peer who is late.
        waits_for_us = self._waiting and self.peer.phase is Phase.OPEN
        required = self._services.tokens.required
        if not waits_for_us and self.heartbeat.is_stale(now, tokens_required=required):
            self.close(CloseCode.STALE, "stale")
        if self._closing is not None:
            return False
        if not self.heartbeat.beat(now, answers_pings=self.answers_pings):
            talks = self.peer.phase is Phase.CONNECTED
            code = CloseCode.NO_PONG if talks else CloseCode.INTERNAL_ERROR
            self.close(code, "no pong", Initiator.HEARTBEAT)
            return False
        due = now if waits_for_us else self.heartbeat.due(now, tokens_required=required)
        self.peer.look_at = min(self.peer.next_expiry, due)
        return False
