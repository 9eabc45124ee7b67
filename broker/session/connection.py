"""One peer, from the accepted stream to the closed socket.

Rules:

1. What goes wrong with one peer ends that peer: no exception of its leaves `meet`.
2. Ending is asked for before it is enforced. `Connection.close` sends a Close frame and gives a
   running hook, then the peer, `close_seconds` each; only then is anything cut.
3. The address is taken once, at accept: after a reset there is nobody to ask.
"""

from collections.abc import Mapping
from math import inf
from time import time as wall_clock
from types import MappingProxyType
from typing import Any

import attrs
import trio

from broker.access.rate_limits import ConnectionUsage
from broker.config.settings import Config
from broker.core.event_queue import EventKind
from broker.core.messages import ClientInfo, Close, ConnectionInfo, Fd, Frame, Initiator, Transport
from broker.core.session import Happening, Phase, Session
from broker.errors import CloseCode, Disconnect, UnsubscribeCode
from broker.hooks import OpenHook
from broker.protocols import centrifuge_json as centrifuge
from broker.protocols.centrifuge_json import CENTRIFUGE_JSON
from broker.protocols.centrifuge_protobuf import CENTRIFUGE_PROTOBUF
from broker.protocols.codec import Codec
from broker.protocols.commands import SubscribeRequest
from broker.protocols.json_text import to_json
from broker.protocols.plain import PLAIN
from broker.routing.router import PERSONAL
from broker.routing.subscriptions import open_subscription
from broker.session.commands import Conversation
from broker.session.rpc import Methods
from broker.session.services import Services
from broker.transport import frames
from broker.transport.head import Head, acceptance
from broker.transport.lane import Batch, Lane
from broker.transport.outbox import Outbox, Run

SUBPROTOCOLS: Mapping[str, Codec] = {
    codec.name: codec for codec in (CENTRIFUGE_JSON, CENTRIFUGE_PROTOBUF)
}
"""What a WebSocket handshake may ask for. Who asks for nothing is plain, or speaks JSON."""


class Connection:
    """One peer, as hooks see it: a WebSocket, or a client without one (`http.fallbacks`).

    `data` is for the app, to keep what it likes with the connection. `claims` is what its token
    says, `meta` among them; empty without one. `transport` says how the peer is carried.
    """

    __slots__ = (
        "_acceptance",
        "_closing",
        "_conversation",
        "_io",
        "_is_seen_out",
        "_lane",
        "_node",
        "_ping_due",
        "_pinged",
        "_serve_until",
        "_served",
        "_serving",
        "_session",
        "_stream",
        "_undelivered",
        "_usage",
        "_waiting",
        "address",
        "claims",
        "data",
        "headers",
        "opened_at",
        "outbox",
        "path",
        "subprotocol",
        "transport",
    )

    def __init__(
        self,
        node: Services,
        stream: trio.abc.Stream,
        head: Head,
        behind: bytes,
        address: str,
        *,
        transport: Transport = "websocket",
        answer: bytes = b"",
    ) -> None:
        """`answer` is what accepts a peer that asked for no WebSocket."""
        self.data: dict[str, Any] = {}
        self.claims: Mapping[str, object] = _NO_CLAIMS
        self.address = address
        self.path = head.path
        self.headers: Mapping[str, str] = dict(head.headers)
        self.opened_at = wall_clock()
        self.transport = transport
        self.subprotocol: str | None = None
        if transport == "websocket":
            offered = head.subprotocols
            self.subprotocol = next((p for p in offered if p in SUBPROTOCOLS), None)
            answer = acceptance(head, self.subprotocol)
        self._node = node
        self._stream = stream
        self._closing: Close | None = None
        self._undelivered = 0
        # Of the ping that is not answered yet: when, the ping, and how much had been taken by then.
        self._pinged: tuple[float, Run, int] | None = None
        self._ping_due = trio.current_time() + node.config.ping_seconds
        self._io: trio.Nursery
        self._serving: trio.CancelScope | None = None
        self._served: trio.Event | None = None
        self._serve_until = inf
        self._is_seen_out = False
        self._conversation: Conversation | None = None
        self._waiting = 0
        self._acceptance = answer
        self._lane = Lane(stream, behind, node.lane_limits, self.end_soon, self._take_now)
        self._usage: ConnectionUsage | None = None  # until there are limits
        self._session: Session
        self.outbox: Outbox

    # what an app may ask

    @property
    def fd(self) -> Fd:
        return self._session.fd

    @property
    def user(self) -> str:
        """Whoever the app or a token said this is; empty for nobody in particular."""
        return self._node.router.hub.sessions.user_of(self.fd)

    @property
    def protocol(self) -> str:
        """`plain` until a Centrifuge `connect` was accepted."""
        return self._session.codec.name  # type: ignore[attr-defined, no-any-return]

    @property
    def codec(self) -> Codec | None:
        """How a Centrifuge client is written to; None for any other peer, or before its connect."""
        if self._session.phase is not Phase.CONNECTED:
            return None
        return self._session.codec  # type: ignore[return-value]

    @property
    def is_established(self) -> bool:
        """Whether the peer can be sent something."""
        return self._session.is_established

    @property
    def methods(self) -> Methods:
        """What the broker does for all connections alike."""
        return self._node.methods

    @property
    def is_limited(self) -> bool:
        """Whether `admits` has to be asked."""
        return self._node.limits.active

    def admits(self, size: float) -> bool:
        """Whether one more request of `size` bytes is within the limits; if so, it is counted.

        Raises `Disconnect` when the peer was told no too often.
        """
        if self._usage is None:
            self._usage = ConnectionUsage()
        return self._node.limits.admits(self._usage, self.user, size, trio.current_time())

    def reload(self, config: Config) -> None:
        """Go by another config, which the node has already, as far as a connection does later."""
        self.outbox.bound(config.outbox_bytes, config.outbox_messages)
        if self._conversation is not None:
            self._conversation.reload(config)

    def info(self) -> ConnectionInfo:
        topics = tuple(self._session.subscriptions)
        return ConnectionInfo(
            self.fd,
            self.user,
            self.address,
            self.path,
            self.transport,
            self.protocol,
            self.opened_at,
            topics,
        )

    @property
    def answers_pings(self) -> bool:
        """Whether silence after a ping means that the peer is gone."""
        return True

    def connect_fields(self) -> dict[str, object]:
        """What the reply to `connect` says besides, on account of the transport."""
        return {}

    # from accept to the end

    async def run(self) -> None:
        """Accept, serve, say goodbye."""
        node = self._node
        with node.router.hub.attached(self._make_session) as session:
            try:
                # The innermost block: its tasks use all of the above.
                async with trio.open_nursery() as io:
                    self._io = io
                    self._open_outbox(io)
                    try:
                        # First in the outbox, so nothing can come before it on the wire.
                        self.outbox.offer(Run((self._acceptance,), messages=0))
                        self._acceptance = b""
                        node.connections[session.fd] = self
                        node.tell(
                            EventKind.OPENED,
                            session.fd,
                            "",
                            address=self.address,
                            path=self.path,
                            transport=self.transport,
                        )
                        self._node.log.info("open", fd=self.fd, peer=self.address, path=self.path)
                        if node.hooks.open is not None:
                            self._waiting += 1  # all that comes waits for the hook
                            self._begin_serving(node.hooks.open)
                        if node.draining:
                            self.shut_down()
                        await self._lane.run(io)
                        await self._see_out()
                    finally:
                        # In this order: nobody delivers to an outbox without a writer.
                        node.router.leave_all(session)
                        self._undelivered += self.outbox.messages
                        self.outbox.abandon()
                        io.cancel_scope.cancel()
            finally:
                node.connections.pop(session.fd, None)
                node.methods.end(session.fd, self._closing or _CUT)
                await self._tell_closed()  # noqa: ASYNC102 - shields and times itself

    def _make_session(self, fd: Fd) -> Session:
        self._session = Session(fd, PLAIN, None, ClientInfo(str(fd)))
        return self._session

    def _open_outbox(self, io: trio.Nursery) -> None:
        config = self._node.config
        self.outbox = Outbox(
            self._stream,
            post=self._node.router.office.post,
            start_writer=io.start_soon,
            on_slow=self._on_slow,
            on_drop=self._on_drop,
            on_broken=self._on_broken,
            max_bytes=config.outbox_bytes,
            max_messages=config.outbox_messages,
            stall_seconds=config.stall_seconds,
            ledger=self._node.router.office.ledger,
        )
        self._session.outbox = self.outbox
        self._lane.outbox = self.outbox

    def _begin_serving(self, open_hook: OpenHook | None = None) -> None:
        """Have a task that may wait for hooks: most sessions never need one."""
        self._served = trio.Event()
        self._io.start_soon(self._serve, open_hook, self._served)

    async def _serve(self, open_hook: OpenHook | None, served: trio.Event) -> None:
        """Hand what is left of what comes to the app or the conversation, until no more can come."""
        hook = "open"
        try:
            with trio.CancelScope(deadline=self._serve_until) as self._serving:
                if open_hook is not None:
                    await open_hook(self)
                    self._waiting -= 1
                hook = "message"
                async for batch in self._lane.inbox:
                    if not batch:
                        continue  # it only keeps the place of what was before it
                    await self._handle(batch)
                    self._waiting -= 1
                    if self._closing is not None:
                        break
        except Disconnect as order:
            self.close(order.code, order.reason)
        except Exception:
            self._node.log.exception("hook_failed", hook=hook, fd=self.fd)
            self.close(CloseCode.INTERNAL_ERROR, "internal error")
        finally:
            served.set()

    async def _take_now(self, batch: Batch) -> Batch:
        """Carry out what a batch begins with, as far as nobody has to be waited for; return the rest.

        Called in the lane's task, and only effective while nothing that came before waits for the
        session's: to wake that would cost 10 µs, as much as three publishes, and to have it 3 KiB.
        """
        if not self._waiting:
            try:
                batch = await self._carry_out(batch)
            except Disconnect as order:
                self.close(order.code, order.reason)
        if batch and self._closing is None:
            self._waiting += 1
            if self._served is None:
                self._begin_serving()
        return batch

    async def _carry_out(self, batch: Batch) -> Batch:
        done = 0
        try:
            if self._publish_now(batch):
                return []
            for _, payload in batch:
                conversation = self._conversation or self._converse(payload)
                if conversation is None or conversation.may_wait(payload):
                    break
                if not await conversation.handle_nowait(payload):
                    break
                done += 1
        finally:
            if self._conversation is not None:
                self._conversation.settle()
        return batch[done:]

    def _publish_now(self, batch: Batch) -> bool:
        """Whether all of a batch is publishes that wait for nobody, which then are carried out."""
        return self._conversation is not None and self._conversation.publish_nowait(
            [payload for _, payload in batch]
        )

    def _converse(self, payload: bytes) -> Conversation | None:
        """Begin to speak the Centrifuge protocol, if that is what a first message does."""
        if self._session.phase is Phase.OPEN and (
            centrifuge.is_connect(payload) or self.subprotocol
        ):
            node = self._node
            codec = SUBPROTOCOLS.get(self.subprotocol or "", CENTRIFUGE_JSON)
            self._conversation = Conversation(
                self, self._session, codec, node.router, node.hooks, node.config, node.tokens
            )
        return self._conversation

    async def _handle(self, batch: Batch) -> None:
        try:
            if self._closing is None and self._publish_now(batch):
                return
            for opcode, payload in batch:
                if self._closing is not None:
                    break
                conversation = self._conversation or self._converse(payload)
                if conversation is not None:
                    await conversation.handle(payload)
                else:
                    self._check_rate(len(payload))
                    self._session.note(Happening.MESSAGE)
                    await self.handle_message(opcode, payload)
        finally:
            # What was published is out, whatever the message behind it was.
            if self._conversation is not None:
                self._conversation.settle()

    def _check_rate(self, size: int) -> None:
        """Send a plain peer away that sends too much: it knows no error reply."""
        if self.is_limited and not self.admits(size):
            raise Disconnect(CloseCode.POLICY_VIOLATION, "too many messages")

    async def handle_message(self, opcode: int, payload: bytes) -> None:
        """Give one message to the app."""
        text = opcode == frames.TEXT
        frame = Frame(payload.decode() if text else payload, opcode)
        self._node.log.debug(
            "message", fd=self.fd, data=frame.data, opcode=opcode, fin=int(frame.fin)
        )
        if self._node.hooks.message is not None:
            await self._node.hooks.message(self, frame)

    async def _see_out(self) -> None:
        """All of the end: what came is dealt with, what is queued goes out, the peer may answer.

        Begun when the lane is done, and beside it when we are done with a peer that goes on.
        """
        self._is_seen_out = True
        if self._served is not None:
            await self._served.wait()
        self._note_end()
        await self._say_goodbye()
        self._io.cancel_scope.cancel()

    async def _say_goodbye(self) -> None:
        """Let what is queued go out, and give the peer time to answer our Close."""
        with trio.move_on_after(self._node.config.close_seconds) as answering:
            await self.outbox.wait_empty()
            # The queue may have taken its time, at the pace of a slow but living peer.
            answering.deadline = trio.current_time() + self._node.config.close_seconds
            await self._lane.wait_ended()
            # Where the peer began, the answer to its Close was queued only now.
            await self.outbox.wait_empty()

    async def _tell_closed(self) -> None:
        close = attrs.evolve(self._closing or _CUT, undelivered=self._undelivered)
        said = {**attrs.asdict(close), "initiator": close.initiator.value}
        self._node.tell(EventKind.DISCONNECTED, self.fd, self.user, **said)
        self._node.log.info("close", fd=self.fd, **said)
        hook = self._node.hooks.close
        if hook is None:
            return
        # The app counts on being told, also when everything around here is being cancelled.
        grace = trio.current_time() + self._node.config.close_seconds
        with trio.CancelScope(shield=True, deadline=grace):
            try:
                await hook(self, close)
            except Exception:
                self._node.log.exception("hook_failed", hook="close", fd=self.fd)

    def _note_end(self) -> None:
        """All that came has been dealt with: the session is over, if it was not told so before."""
        if self._closing is None:
            self._closing = self._how_it_ended()
            self._session.note(Happening.CLOSE)
            self._node.router.leave_all(self._session)

    def _how_it_ended(self) -> Close:
        lane = self._lane
        if lane.close_began_here and lane.close_sent is not None:
            return Close(*lane.close_sent, Initiator.SERVER)
        if lane.peer_close is not None:
            return Close(*lane.peer_close, Initiator.CLIENT)
        if self.outbox.stalled:
            reason = f"took nothing for {self._node.config.stall_seconds:g} s"
            return Close(CloseCode.ABNORMAL, reason, Initiator.SLOW)
        return Close(CloseCode.ABNORMAL, "connection lost", Initiator.NETWORK)

    # ending

    def close(self, code: int, reason: str = "", initiator: Initiator = Initiator.SERVER) -> bool:
        """Begin to close: the peer gets what is queued, then a Close frame. Never waits.

        False if the connection was closing already.
        """
        if self._closing is not None or self._lane.is_ending:
            return False
        # A lone surrogate, as `json.loads` may give the app one, cannot be sent.
        reason = reason.encode(errors="replace").decode()
        self._closing = Close(code, reason, initiator)
        self._node.router.flush()
        codec = self.codec
        if codec is not None:
            farewell = codec.disconnect(code, reason)
            self.outbox.offer(Run((farewell,), messages=0))
        self._session.note(Happening.CLOSE)
        self._lane.close(code, reason)
        self._node.router.leave_all(self._session)
        self.end_soon()
        return True

    def shut_down(self) -> bool:
        """Close because the broker stops: 3001 to who knows that code, 1001 to all others."""
        talks = self._session.phase is Phase.CONNECTED
        code = CloseCode.SHUTDOWN if talks else CloseCode.GOING_AWAY
        return self.close(code, "shutdown", Initiator.SHUTDOWN)

    def end_soon(self) -> None:
        """No more messages will come: a hook that is still running gets `close_seconds`."""
        deadline = trio.current_time() + self._node.config.close_seconds
        self._serve_until = min(self._serve_until, deadline)
        if self._serving is not None:
            self._serving.deadline = self._serve_until
        if not self._lane.has_ended:
            self._see_out_beside()

    def _see_out_beside(self) -> None:
        if not self._is_seen_out:
            self._is_seen_out = True
            self._io.start_soon(self._see_out)

    def _on_slow(self) -> None:
        """The outbox is full and its topic's rule says close."""
        # The open run as well, or it would come behind the gap and look like what follows. It may
        # make this outbox overflow once more, which then has closed it.
        self._node.router.flush()
        if self._closing is None:
            self._undelivered += self.outbox.discard()
            self.close(CloseCode.SLOW, "slow", Initiator.SLOW)

    def _on_drop(self, dropped: Mapping[str, int]) -> None:
        """Publications were dropped: who can recover them is told that there is a gap."""
        subscriptions = self._session.subscriptions
        gaps = [s for topic in dropped if (s := subscriptions.get(topic)) and s.recoverable]
        # Into what is dropped: see `_on_slow`. Should it overflow once more, and that end everything,
        # what is here of our own topics is behind a gap all the same.
        self._node.router.flush()
        # Nothing of these may reach the client now: it recovers from the last it saw.
        for gap in gaps:
            self.outbox.drop_topic(gap.name)
        if any(gap.server_side for gap in gaps):  # which it recovers with its next connect
            self.close(CloseCode.INSUFFICIENT_STATE, "insufficient state")
            return
        for gap in gaps:
            self.end_subscription(
                gap.name, UnsubscribeCode.INSUFFICIENT_STATE, "insufficient state"
            )

    def _on_broken(self) -> None:
        """The stream is dead, or its peer takes nothing: which the lane may never see."""
        self._lane.lost()
        self._see_out_beside()

    def tell_user(self, before: str, after: str) -> None:
        """Tell a client that its personal topic is another one from here on."""
        codec = self.codec
        if codec is not None and self._node.router.direct_topics:
            frames = []
            if before:
                code, reason = UnsubscribeCode.SERVER, "other user"
                frames.append(codec.unsubscribe(PERSONAL + before, code, reason))
            if after:
                frames.append(codec.subscribe(PERSONAL + after, {}))
            self._node.router.flush()
            self.outbox.offer(Run(frames, messages=0))

    def end_subscription(self, topic: str, code: int, reason: str) -> bool:
        """End a peer's subscription and tell it why; false if there was none."""
        if self._node.router.unsubscribe(self._session, topic, code, reason) is None:
            return False
        codec = self.codec
        if codec is not None:
            self.outbox.offer(Run((codec.unsubscribe(topic, code, reason),), messages=0))
        return True

    def add_subscription(
        self, topic: str, *, info: object = None, data: object = None, join_leave: bool = False
    ) -> bool:
        """Subscribe the peer and tell it; false if it is subscribed already, or closing.

        Raises `Refused`: 106 for one subscription too many, 107 for what is no topic or pattern.
        """
        session, node, codec = self._session, self._node, self.codec
        if not session.is_established or topic in session.subscriptions:
            return False
        node.router.check_subscribable(session, topic)
        opened = open_subscription(
            node.router,
            session,
            codec,
            SubscribeRequest(topic),
            info=None if info is None else to_json(info),
            data=None if data is None else to_json(data),
            server_side=True,
            join_leave=join_leave,
        )
        if codec is not None:
            told = {k: v for k, v in opened.result.items() if k != "publications"}
            self.outbox.offer(Run((codec.subscribe(topic, told),), messages=0))
        opened.settle(node.router)
        return True

    def expire(self, when: float | None) -> bool:
        """End a client's connection at `when`, in Unix seconds, or never; at once if that is past.

        False if it is no Centrifuge client.
        """
        if self._conversation is None:
            return False
        if not self._conversation.expire_at(when):
            self.close(CloseCode.EXPIRED, "expired")
        return True

    # heartbeat

    def beat(self, now: float) -> None:
        """Called about once a second: end what has expired, ping a silent peer, give up one that
        does not answer."""
        if self._conversation is not None and self._closing is None:
            self._conversation.beat(now)
        if self._closing is not None:
            return
        config, lane = self._node.config, self._lane
        if self._pinged is not None:
            pinged_at, ping, chunks = self._pinged
            # At the same instant counts: on virtual time an answer takes none.
            # While the line is full our ping may not be out: then the outbox sees who is dead.
            if lane.heard_at >= pinged_at or not lane.reading or self.outbox.blocked:
                self._pinged = None
            elif now - pinged_at < config.pong_seconds:
                pass
            elif self.outbox.chunks > chunks and self.outbox.holds(ping):
                self._pinged = None  # it is behind what a slow but living peer takes
            else:
                talks = self._session.phase is Phase.CONNECTED
                code = CloseCode.NO_PONG if talks else CloseCode.INTERNAL_ERROR
                self.close(code, "no pong", Initiator.HEARTBEAT)
                return
        if now < self._ping_due:
            return
        codec = self.codec
        if codec is not None:
            # These clients count on a ping at this interval, however busy the line is.
            ping = Run((codec.ping(),), messages=0)
            self._ping_due = now + config.ping_seconds
        else:
            silent_until = lane.heard_at + config.ping_seconds
            if now < silent_until:
                self._ping_due = silent_until
                return
            ping = Run((frames.encode(frames.PING, b""),), messages=0)
            self._ping_due = now + config.ping_seconds
        self.outbox.offer(ping)
        if self._pinged is None and self.answers_pings:
            self._pinged = now, ping, self.outbox.chunks


NODE_ID = "1"
"""Which of several brokers this is, as the HTTP API says too: here there is one."""

_NO_CLAIMS: Mapping[str, object] = MappingProxyType({})

_CUT = Close(CloseCode.ABNORMAL, "cut", Initiator.SHUTDOWN)
"""How a connection ends that is cancelled before it was told to close."""
