"""The parts that all connections of one broker share."""

import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from math import inf
from typing import Any, Final, Protocol, Unpack

import attrs
import structlog
import trio

from broker.access.operators import Method, Operators
from broker.access.proxies import TrustedProxies, trusted_proxies
from broker.access.rate_limits import RateLimits
from broker.access.rights import Rights
from broker.access.tokens import Tokens
from broker.config.machine import memory_limit
from broker.config.reload import Settings
from broker.config.settings import Config
from broker.core.closed_connections import ClosedConnections
from broker.core.event_queue import EventFields, EventKind
from broker.core.memory import STREAM_BYTES, TLS_STREAM_BYTES, Holding, MemoryBudget, Part
from broker.core.messages import ConnectionInfo, Fd, Initiator, PushResult, Transport
from broker.errors import CloseCode
from broker.hooks import Hooks
from broker.routing.neighbourhood import Neighbourhood
from broker.routing.neighbours import Neighbours
from broker.routing.publishing import Publisher
from broker.routing.recipients import Peer
from broker.routing.requests import Requests
from broker.routing.router import Router
from broker.routing.wills import Wills
from broker.session.admission import Admission
from broker.session.compression import Compression
from broker.session.counts import Counts
from broker.session.heartbeat import Heartbeat
from broker.session.helpers import Helpers
from broker.session.orders import Message, Orders
from broker.transport.head import Request
from broker.transport.lane import Lane, LaneLimits, Traffic

LAST_WORDS_SECONDS: Final = 1.0
"""For close hooks that run when all are cut: with `drain_seconds` and `flush_seconds` as they are by
default a stop takes 9 of the 10 s that Docker gives before SIGKILL. An update of a row takes 10 ms."""


class FlowControl(Protocol):
    """The app's say over what comes from one connection and goes to it; see `session.flow`."""

    def pause(self) -> bool: ...
    def resume(self) -> bool: ...
    def ping(self, data: bytes) -> bool: ...
    async def send(self, message: Message) -> PushResult: ...
    def mark(self) -> None: ...


class ServedConnection(Protocol):
    """A connection as the rest of its node uses it."""

    @property
    def peer(self) -> Peer: ...
    @property
    def orders(self) -> Orders: ...
    @property
    def flow(self) -> "FlowControl": ...
    @property
    def transport(self) -> Transport: ...
    @property
    def protocol(self) -> str: ...
    @property
    def subprotocol(self) -> str | None: ...
    @property
    def address(self) -> str: ...
    @property
    def traffic(self) -> Traffic: ...
    @property
    def task(self) -> trio.lowlevel.Task:
        """The task that serves it."""

    @property
    def helpers(self) -> Helpers | None:
        """The tasks beside that one; None while there have been none."""

    @property
    def is_apps(self) -> bool:
        """Whether it is the app's, and no operator's: those are not traced, because they show their keys."""

    @property
    def lane(self) -> Lane: ...
    @property
    def heartbeat(self) -> Heartbeat: ...
    @property
    def holding(self) -> Holding: ...

    async def run(self) -> None: ...
    def info(self) -> ConnectionInfo: ...
    def facts(self) -> dict[str, Any]: ...
    def close(self, code: int, reason: str = "", initiator: Initiator = ...) -> bool: ...
    def shut_down(self) -> bool: ...
    def beat(self, now: float) -> bool: ...


class OpenDesk(Protocol):
    """An operator who has logged in, as the rest of his node uses him. Neither method waits."""

    def check_login(self) -> None:
        """Send him away if the key that let him in is no longer set."""

    def tell(self, data: bytes) -> bool:
        """Send him raw JSON on `$admin`; false if he has yet to take what came before."""


HttpHandler = Callable[
    ["Services", trio.abc.Stream, Request, str], Awaitable["ServedConnection | Request | None"]
]
"""Serves plain HTTP on a stream from which a request was already read; the last is the peer's
address. Returns a connection where the request opens one, the next request on that stream where it is
not one of a kind that the handler was serving, None when the stream is done with. May raise `HeadError`."""


@attrs.define(eq=False)
class Services:
    """The parts that all connections of one broker share; each has one owner, and that is here."""

    settings: Settings
    hooks: Hooks
    router: Router
    tokens: Tokens
    loopback_bind: bool
    """Whether only this machine can reach us, its proxies among all else; see `origin_allowed`."""
    name: str = ""
    """This broker's name, wherever it is told."""
    started_at: float = attrs.field(factory=time.time)
    """Unix seconds."""
    serve_http: HttpHandler = attrs.field(init=False)
    """Set before anybody is accepted: it is made of what is here."""
    admin: Mapping[str, Method] = attrs.field(init=False, factory=dict)
    """The methods that operators may call, by name; set like `serve_http`."""
    desks: dict[Fd, OpenDesk] = attrs.field(init=False, factory=dict)
    """The operators who have logged in."""
    operators: Operators = attrs.field(init=False)
    rights: Rights = attrs.field(init=False)
    rate_limits: RateLimits = attrs.field(init=False)
    publisher: Publisher = attrs.field(init=False)
    requests: Requests = attrs.field(init=False)
    wills: Wills = attrs.field(init=False)
    leaving: bool = False
    """The broker is about to stop, and serves as before: balancers are told."""
    neighbourhood: Neighbourhood | None = attrs.field(init=False, default=None)
    """The other nodes; None where there can be none."""
    draining: bool = False
    connections: dict[Fd, ServedConnection] = attrs.field(factory=dict)
    admission: Admission = attrs.field(init=False)
    counts: Counts = attrs.field(init=False, factory=Counts)
    closed: ClosedConnections = attrs.field(init=False, factory=ClosedConnections)
    # Bound once: asking for a logger anew costs 3 µs a message, said or not.
    log: structlog.typing.FilteringBoundLogger = attrs.field(init=False)
    lane_limits: LaneLimits = attrs.field(init=False)
    memory: MemoryBudget = attrs.field(init=False)
    compression: Compression = attrs.field(init=False)
    logs_commands: bool = attrs.field(init=False, default=False)
    """Whether every command is logged: then none takes the way where many are carried out as one."""
    _cut_at: float = attrs.field(init=False, default=inf)
    _last_words: set[trio.CancelScope] = attrs.field(init=False, factory=set)

    def __attrs_post_init__(self) -> None:
        self.memory = MemoryBudget(self.router.office.ledger)
        self.compression = Compression(self.settings, self.router.meter, self.memory)
        self.admission = Admission(self.settings)
        self.operators = Operators(self.settings)
        self.rights = self.router.rights
        self.rate_limits = RateLimits(self.settings)
        self.publisher = Publisher(self.router)
        self.requests = Requests(self.router)
        self.wills = Wills(self.publisher)
        cluster = self.router.engine.cluster
        if cluster.is_shared:
            neighbours = Neighbours(cluster, self.name, self.started_at)
            self.neighbourhood = Neighbourhood(
                self.router, self.wills, self.publisher, self.requests, neighbours
            )
            neighbours.on_lapse.append(self._lapsed)
        self._count_memory()
        self.settings.watch(self._settings_changed)
        self._settings_changed()

    def _count_memory(self) -> None:
        count, router, events = self.memory.count, self.router, self.router.events
        each = STREAM_BYTES if self.config.tls_cert is None else TLS_STREAM_BYTES
        count(Part.CONNECTIONS, lambda: each * len(self.admission) + self.closed.bytes_held)
        count(Part.REQUESTS, lambda: self.requests.bytes_held)
        count(Part.KEYS, lambda: self.publisher.bytes_held)
        count(Part.HISTORY, lambda: router.engine.bytes_held)
        count(Part.RETAINED, lambda: router.retained.bytes_held)
        if events is not None:
            count(Part.EVENTS, lambda: events.bytes_held)

    @contextmanager
    def last_words(self, seconds: float) -> Iterator[None]:
        """A block that runs to its end though all around it is being cancelled, if that takes no
        longer than `seconds`; and than `LAST_WORDS_SECONDS` from the moment when all are cut.
        """
        if trio.current_effective_deadline() == -inf:
            seconds = min(seconds, LAST_WORDS_SECONDS)
        deadline = min(trio.current_time() + seconds, self._cut_at)
        with trio.CancelScope(shield=True, deadline=deadline) as scope:
            self._last_words.add(scope)
            try:
                yield
            finally:
                self._last_words.discard(scope)

    def begin_drain(self, seconds: float) -> None:
        """The broker stops; clients that are still there after so many seconds are cut."""
        self.draining = True
        self._end_by(trio.current_time() + seconds + LAST_WORDS_SECONDS)

    def cut(self) -> None:
        """Everything is being cancelled: no last words but for `LAST_WORDS_SECONDS`."""
        self._end_by(trio.current_time() + LAST_WORDS_SECONDS)

    def _end_by(self, when: float) -> None:
        self._cut_at = min(self._cut_at, when)
        for scope in self._last_words:
            scope.deadline = min(scope.deadline, self._cut_at)

    @property
    def config(self) -> Config:
        """The settings of now. Nobody keeps them beyond an await."""
        return self.settings.config

    @property
    def proxies(self) -> TrustedProxies:
        """The proxies that may say for whom they ask."""
        return trusted_proxies(self.config.trusted_proxies, self.config.proxy_header)

    def party_of(self, user: str, address: str, alone: str) -> str:
        """The party that something counts for; see `TrustedProxies.party_of`."""
        return self.proxies.party_of(user, address, alone)

    def emit(self, kind: EventKind, fd: Fd, user: str, **fields: Unpack[EventFields]) -> None:
        """Note that something has happened to a connection; `fields` are those of `Event`. Never
        waits."""
        if self.router.event_sink is not None:
            self.router.event_sink.emit(kind, fd, user, **fields)

    def _lapsed(self) -> None:
        """The other nodes were told that everybody here has gone, and have carried out all wills: so it
        is made true. Clients come back, here or elsewhere, and recover."""
        for connection in list(self.connections.values()):
            self.wills.put(connection.peer, None)
            connection.close(CloseCode.FORCE_RECONNECT, "this node was cut off")

    def _settings_changed(self) -> None:
        config = self.config
        self.log = structlog.get_logger("broker").bind()
        self.logs_commands = config.log_level == "debug"
        self.lane_limits = LaneLimits(
            max_message_bytes=config.max_message_bytes,
            max_fragments=config.max_fragments,
            message_seconds=config.message_seconds,
            control_rate=config.control_rate,
            control_burst=config.control_burst,
            inbox_batches=config.inbox_batches,
            inbox_bytes=config.inbox_bytes,
        )
        self.memory.resize(memory_limit(config), config.connection_most - config.outbox_most)
        for connection in self.connections.values():
            connection.peer.outbox.bound(config.outbox_bytes, config.outbox_messages)
            if self.hooks.watch_buffers:
                connection.flow.mark()
        for desk in list(self.desks.values()):
            desk.check_login()
