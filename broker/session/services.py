"""The parts that all connections of one broker share."""

import resource
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol

import attrs
import structlog
import trio

from broker.access.rate_limits import RateLimits
from broker.access.rights import Rights
from broker.access.tokens import Tokens
from broker.config.reload import Settings
from broker.config.settings import Config
from broker.core.event_queue import EventKind
from broker.core.messages import ConnectionInfo, Fd, Initiator
from broker.hooks import Hooks
from broker.routing.publishing import Publisher
from broker.routing.recipients import Peer
from broker.routing.requests import Requests
from broker.routing.router import Router
from broker.routing.wills import Wills
from broker.session.orders import Orders
from broker.transport.head import Request
from broker.transport.lane import LaneLimits

_SPARE_FILES: Final = 64
"""Open files kept for listeners, logs and the app: no connection is accepted into these."""


class ServedConnection(Protocol):
    """A connection as the rest of its node uses it."""

    @property
    def peer(self) -> Peer: ...
    @property
    def orders(self) -> Orders: ...

    async def run(self) -> None: ...
    def info(self) -> ConnectionInfo: ...
    def close(self, code: int, reason: str = "", initiator: Initiator = ...) -> bool: ...
    def shut_down(self) -> bool: ...
    def beat(self, now: float) -> None: ...


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
    serve_http: HttpHandler = attrs.field(init=False)
    """Set before anybody is accepted: it is made of what is here."""
    rights: Rights = attrs.field(init=False)
    rate_limits: RateLimits = attrs.field(init=False)
    publisher: Publisher = attrs.field(init=False)
    requests: Requests = attrs.field(init=False)
    wills: Wills = attrs.field(init=False)
    turns: trio.Lock = attrs.field(factory=trio.Lock)
    """The one queue of those who have used up their share of the loop; see `core.work`. Its holder
    works off one slice. Strictly first come, first served."""
    draining: bool = False
    connections: dict[Fd, ServedConnection] = attrs.field(factory=dict)
    meeting: int = 0
    """Streams accepted and not yet closed, whatever they speak."""
    refused: int = 0
    # Bound once: asking for a logger anew costs 3 µs a message, said or not.
    log: structlog.typing.FilteringBoundLogger = attrs.field(init=False)
    lane_limits: LaneLimits = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.rights = self.router.rights
        self.rate_limits = RateLimits(self.settings)
        self.publisher = Publisher(self.router)
        self.requests = Requests(self.router)
        self.wills = Wills(self.publisher)
        self.settings.watch(self._settings_changed)
        self._settings_changed()

    @property
    def max_connections(self) -> int:
        """Connections at once: as the settings say, else as many as files may be open, less a reserve."""
        limit = self.config.max_connections
        if limit is not None:
            return limit
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        # What is open by now (listeners, logs, the event loop) is within the reserve.
        spare = _SPARE_FILES + self.config.webhooks.most_requests
        return max(1, files - min(spare, files // 2))

    @property
    def config(self) -> Config:
        """The settings of now. Nobody keeps them beyond an await."""
        return self.settings.config

    def emit(self, kind: EventKind, fd: Fd, user: str, **fields: Any) -> None:
        """Note that something has happened to a connection; `fields` are those of `Event`. Never
        waits."""
        if self.router.events is not None:
            self.router.events.emit(kind, fd, user, **fields)

    def _settings_changed(self) -> None:
        config = self.config
        self.log = structlog.get_logger("broker").bind()
        self.lane_limits = LaneLimits(
            max_message_bytes=config.max_message_bytes,
            max_fragments=config.max_fragments,
            message_seconds=config.message_seconds,
            control_rate=config.control_rate,
            control_burst=config.control_burst,
            inbox_batches=config.inbox_batches,
        )
        for connection in self.connections.values():
            connection.peer.outbox.bound(config.outbox_bytes, config.outbox_messages)
