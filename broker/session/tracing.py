"""Live traces: all that one connection, one user or one topic does, for those who look.

Rules:

1. While nobody looks it costs nothing: a traced connection has another list for queued messages and another
   taker of those that come, a traced topic one subscriber more, and events go by way of here only while there
   is a trace.
2. Nobody waits for those who look; see `core.trace` for the bounds of each, and `TRACES_MOST` for how many.
3. A trace of a connection ends with it. That of a user goes on with whatever connections the user has.
"""

from collections.abc import AsyncIterator, Callable, Hashable, Iterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from math import inf
from typing import Final, Unpack
from uuid import uuid4

import attrs
import trio

from broker.core.event_queue import EventFields, EventKind
from broker.core.messages import ClientInfo, Fd, Publication
from broker.core.session import (
    Audience,
    Decider,
    Grant,
    Parcel,
    Recipient,
    SlowRule,
    Subscription,
)
from broker.core.topics import is_pattern, matches
from broker.core.trace import START_MOST, TEXT_MOST, Entry, Target, TraceBuffer, shown_text
from broker.errors import ErrorCode, Refused
from broker.events.dispatcher import Events
from broker.protocols.centrifuge_protobuf import CENTRIFUGE_PROTOBUF, COMMAND, REPLY, Message
from broker.protocols.shown_protobuf import without_secrets
from broker.session.services import ServedConnection, Services
from broker.transport.frames import HEADER_MOST, RSV1, payload_of
from broker.transport.inflating import preview
from broker.transport.lane import Batch
from broker.transport.runs import Run

TRACES_MOST: Final = 8
"""At once: a team that looks for one fault. Together they hold 20 MiB at most, and take 12 ms a second."""

IDLE_SECONDS: Final = 60.0
"""A trace that is read by its id, as by HTTP, ends when nobody has read it for so long."""


@attrs.define(eq=False)
class Trace:
    """One trace while it goes on. One task reads it."""

    id: str
    target: Target
    expires_at: float
    """On Trio's clock."""
    buffer: TraceBuffer = attrs.field(init=False, factory=TraceBuffer)
    has_ended: bool = attrs.field(init=False, default=False)
    """No more will come."""
    _came: trio.Event = attrs.field(init=False, factory=trio.Event)

    def add(self, entries: Iterator[Entry], count: int) -> None:
        self.buffer.add(entries, count, trio.current_time())
        self._came.set()

    def is_about(self, fd: Fd, user: str, topic: str) -> bool:
        """Whether what happens to a connection, perhaps on a topic, belongs here."""
        target = self.target
        if target.fd:
            return target.fd == fd
        if target.user:
            return target.user == user
        return bool(topic) and _covers(target.topic, topic)

    def end(self) -> None:
        self.has_ended = True
        self._came.set()

    async def wait(self) -> None:
        """Wait until there is something to take, or no more will come. Cancelled, nothing is lost."""
        while not self.buffer and not self.has_ended:
            self._came = trio.Event()
            await self._came.wait()

    async def receive(self) -> list[Entry]:
        """The entries since the last call, at least one; an empty list once the trace has ended. Cancelled,
        nothing is lost."""
        await trio.lowlevel.checkpoint()
        await self.wait()
        return self.buffer.take()


@attrs.frozen
class _EventTap:
    """The events of a broker, of which the traces see each as well. It takes them, and is nothing else of what
    `Events` are: epochs and the deaths of nodes are the readers' own."""

    _events: Events | None
    _see: Callable[..., None]

    def emit(self, kind: EventKind, fd: Fd, user: str, **fields: Unpack[EventFields]) -> None:
        if self._events is not None:
            self._events.emit(kind, fd, user, **fields)
        self._see(kind, fd, user, **fields)


@attrs.define(eq=False)
class Traces:
    """The traces of one broker. `now` is in Unix seconds."""

    services: Services
    now: Callable[[], float]
    _traces: dict[str, Trace] = attrs.field(init=False, factory=dict)
    _listeners: dict[str, "_TopicTap"] = attrs.field(init=False, factory=dict)
    _tapped: dict[Fd, ServedConnection] = attrs.field(init=False, factory=dict)

    @property
    def bytes_held(self) -> int:
        """Bytes of the entries that wait."""
        return sum([trace.buffer.bytes_held for trace in self._traces.values()])

    def __len__(self) -> int:
        return len(self._traces)

    # for who looks

    def begin(self, target: Target, idle_seconds: float = inf) -> Trace:
        """Begin a trace, which ends if nobody has read it for `idle_seconds`.

        Raises `Refused`: 102 for an fd that is not here, 103 for one that is an operator's, 106 where
        there are `TRACES_MOST` already, 107 for what is neither topic nor pattern.
        """
        if len(self._traces) >= TRACES_MOST:
            raise Refused(ErrorCode.LIMIT_EXCEEDED, f"more than {TRACES_MOST} traces at once")
        if target.fd and target.fd not in self.services.connections:
            raise Refused(ErrorCode.UNKNOWN_CHANNEL, f"no connection has fd {target.fd}")
        if target.fd and not self.services.connections[target.fd].is_apps:
            raise Refused(ErrorCode.PERMISSION_DENIED, f"fd {target.fd} is an operator's")
        trace = Trace(uuid4().hex, target, trio.current_time() + idle_seconds)
        if target.topic:
            self._listen(trace)
        router = self.services.router
        if not self._traces:
            router.event_sink = _EventTap(router.events, self._see_event)
        self._traces[trace.id] = trace
        self._tap_connections()
        return trace

    def end(self, trace: Trace) -> None:
        """End a trace; its holder can still take the entries that are there."""
        if self._traces.pop(trace.id, None) is None:
            return
        trace.end()
        self._stop_listening(trace.target.topic)
        self._tap_connections()
        if not self._traces:
            self.services.router.event_sink = self.services.router.events

    @asynccontextmanager
    async def open(self, target: Target) -> AsyncIterator[Trace]:
        """A trace for as long as the block. Raises as `begin` does."""
        trace = self.begin(target)
        try:
            yield trace
        finally:
            self.end(trace)

    def find(self, trace_id: str, idle_seconds: float) -> Trace:
        """The trace with this id, which is about to be read. Raises `Refused` (102) if it has ended and
        everything was taken, or nobody had read it for too long."""
        trace = self._traces.get(trace_id)
        if trace is None:
            raise Refused(ErrorCode.UNKNOWN_CHANNEL, "no such trace: it has ended")
        trace.expires_at = trio.current_time() + idle_seconds
        return trace

    def expire(self, now: float) -> None:
        """End what nobody reads. Linear in the traces."""
        for trace in list(self._traces.values()):
            if now >= trace.expires_at:
                self.end(trace)

    def end_all(self) -> None:
        """The broker stops: nobody waits for an entry any longer."""
        for trace in self._traces.values():
            trace.end()

    # what is seen

    def _listen(self, trace: Trace) -> None:
        router, topic = self.services.router, trace.target.topic
        router.rights.check_listenable(topic)
        # One for all traces of a topic, as each is one audience more.
        if topic not in self._listeners:
            listener = _TopicTap(partial(self._see_publications, topic))
            router.subscribe(Subscription(listener, topic, Grant(topic, Decider.PROGRAM)))
            self._listeners[topic] = listener

    def _stop_listening(self, topic: str) -> None:
        if topic and all(trace.target.topic != topic for trace in self._traces.values()):
            self.services.router.unsubscribe(self._listeners.pop(topic), topic)

    def _tap_connections(self) -> None:
        """Look at those connections that are traced by now, and at no others."""
        connections, targets = self.services.connections, []
        for trace in self._traces.values():
            if not trace.has_ended:
                targets += [trace.target.fd] if trace.target.fd else []
                targets += self.services.router.hub.sessions.fds_of(trace.target.user)
        wanted = {
            fd: connections[fd] for fd in targets if fd in connections and connections[fd].is_apps
        }
        for fd in self._tapped.keys() - wanted.keys():
            connection = self._tapped.pop(fd)
            if fd in connections:
                connection.lane.show(None)
                connection.peer.outbox.show(None)
        for fd in wanted.keys() - self._tapped.keys():
            self._tapped[fd] = wanted[fd]
            wanted[fd].lane.show(partial(self._see_received, fd))
            wanted[fd].peer.outbox.show(partial(self._see_sent, fd))

    def _of(self, fd: Fd, user: str, topic: str = "") -> list[Trace]:
        return [
            trace
            for trace in self._traces.values()
            if not trace.has_ended and trace.is_about(fd, user, topic)
        ]

    def _way_to_show(self, fd: Fd, kind: Message) -> Callable[[bytes, int], tuple[str, bool]]:
        """The text of a message to or from a connection, by its beginning and its size, without secrets."""
        is_protobuf = self._tapped[fd].subprotocol == CENTRIFUGE_PROTOBUF.name
        return partial(_shown_protobuf, kind) if is_protobuf else shown_text

    def _see_received(self, fd: Fd, batch: Batch) -> None:
        peer, now = self._tapped[fd].peer, self.now()
        shown = self._way_to_show(fd, COMMAND)

        def entries() -> Iterator[Entry]:
            for _, payload in batch:
                text, is_cut = shown(payload[:START_MOST], len(payload))
                yield Entry(now, "received", fd, peer.user, "", 0, len(payload), text, is_cut)

        for trace in self._of(fd, peer.user):
            trace.add(entries(), len(batch))

    def _see_sent(self, fd: Fd, run: Run) -> None:
        user, now = self._tapped[fd].peer.user, self.now()
        shown = self._way_to_show(fd, REPLY)

        def entries() -> Iterator[Entry]:
            for start, size in run.previews(START_MOST + HEADER_MOST):
                payload, behind = payload_of(start), size - len(start)
                if start[0] & 0xF0 == 0x80 | RSV1:
                    payload = preview(payload, START_MOST)
                    behind += len(payload) == START_MOST  # how much more, nobody has counted
                text, is_cut = shown(payload, len(payload) + behind)
                yield Entry(now, "sent", fd, user, run.topic, 0, size, text, is_cut)

        for trace in self._of(fd, user):
            trace.add(entries(), run.count)

    def _see_publications(self, name: str, publications: Sequence[Publication]) -> None:
        now = self.now()

        def entries() -> Iterator[Entry]:
            for each in publications:
                fd, user = (0, "") if each.info is None else (int(each.info.client), each.info.user)
                text, is_cut = shown_text(each.data[:START_MOST], len(each.data))
                about = fd, user, each.topic, each.offset
                yield Entry(now, "published", *about, len(each.data), text, is_cut)

        for trace in self._traces.values():
            if trace.target.topic == name and not trace.has_ended:
                trace.add(entries(), len(publications))

    def _see_event(self, kind: EventKind, fd: Fd, user: str, **fields: Unpack[EventFields]) -> None:
        topic = fields.pop("topic", "")
        text = " ".join([f"{name}={value}" for name, value in fields.items()])[:TEXT_MOST]
        entry = Entry(self.now(), kind.value, fd, user, topic, 0, 0, text)
        for trace in self._of(fd, user, topic):
            trace.add(iter((entry,)), 1)
        if kind is EventKind.DISCONNECTED:
            self._tapped.pop(fd, None)
            for trace in self._traces.values():
                if trace.target.fd == fd:
                    trace.end()
        elif kind in (EventKind.CONNECTED, EventKind.BOUND):
            self._tap_connections()


def _shown_protobuf(kind: Message, start: bytes, size: int) -> tuple[str, bool]:
    text, is_cut = shown_text(without_secrets(start, kind), 0)
    return text, is_cut or size > len(start)


def _covers(target: str, topic: str) -> bool:
    """Whether what happens to `topic`, which may be a pattern itself, is about the target."""
    if topic == target:
        return True
    return is_pattern(target) and not is_pattern(topic) and matches(target, topic)


class _TopicTap:
    """Listens to a topic for a trace, as a subscriber and as its own audience; it counts in no report."""

    fd: Fd = 0
    user = ""
    is_reachable = True
    keeps_up = True
    bytes_waiting = 0

    def __init__(self, see: Callable[[Sequence[Publication]], None]) -> None:
        self.subscriptions: dict[str, Subscription] = {}
        self._see = see

    def info_on(self, chan_info: bytes | None) -> ClientInfo | None:
        return None

    @property
    def audience_key(self) -> Hashable:
        return self

    def new_audience(self, name: str) -> Audience:
        return self

    def add(self, subscription: Subscription) -> None:
        pass

    def remove(self, subscription: Subscription) -> None:
        pass

    def __len__(self) -> int:
        return len(self.subscriptions)

    def __iter__(self) -> Iterator[Subscription]:
        return iter(self.subscriptions.values())

    def narrowed(self, admits: Callable[[Subscription], bool]) -> Recipient:
        return self

    def take(self, name: str, publications: Sequence[Publication], rule: SlowRule) -> int:
        self._see(publications)
        return len(publications)

    def deliver(self, parcel: Parcel) -> None:
        for batch in parcel.batches:
            self._see(batch)
