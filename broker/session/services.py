"""The parts that all connections of one broker share."""

from collections.abc import Awaitable, Callable
from math import inf
from typing import TYPE_CHECKING, Any

import attrs
import structlog
import trio

from broker.access.rate_limits import Limits
from broker.access.tokens import Tokens
from broker.config.settings import Config
from broker.core.event_queue import EventKind
from broker.core.messages import Fd
from broker.hooks import Hooks
from broker.routing.router import Router
from broker.session.rpc import Methods
from broker.transport.head import Request
from broker.transport.lane import LaneLimits

if TYPE_CHECKING:
    from broker.session.connection import Connection

HttpHandler = Callable[
    ["Services", trio.abc.Stream, Request, str], Awaitable["Connection | Request | None"]
]
"""Serves plain HTTP on a stream from which a request was already read; the last is the peer's
address. Returns a connection where the request opens one, the next request on that stream where it is
not one of a kind that the handler was serving, None when the stream is done with. May raise `HeadError`."""


@attrs.define(eq=False)
class Services:
    """What all connections of one broker share."""

    config: Config
    hooks: Hooks
    router: Router
    serve_http: HttpHandler
    loopback_bind: bool
    """Whether only this machine can reach us, its proxies among all else; see `origin_allowed`."""
    tokens: Tokens
    max_connections: float = inf
    methods: Methods = attrs.field(init=False)
    limits: Limits = attrs.field(
        default=attrs.Factory(lambda services: Limits(services.config), takes_self=True)
    )
    draining: bool = False
    connections: dict[Fd, "Connection"] = attrs.field(factory=dict)
    meeting: int = 0
    """Streams accepted and not yet closed, whatever they speak."""
    refused: int = 0
    log: structlog.typing.FilteringBoundLogger = attrs.field(
        # Bound once: asking for a logger anew costs 3 µs a message, said or not.
        factory=lambda: structlog.get_logger("broker").bind()
    )
    lane_limits: LaneLimits = attrs.field(
        default=attrs.Factory(lambda services: _lane_limits(services.config), takes_self=True)
    )

    def __attrs_post_init__(self) -> None:
        self.methods = Methods(self.router)

    def tell(self, kind: EventKind, fd: Fd, user: str, **fields: Any) -> None:
        """Something has happened to a connection; `fields` are those of `Event`. Never waits."""
        if self.router.events is not None:
            self.router.events.emit(kind, fd, user, **fields)

    def reload(self, config: Config) -> None:
        """Go by another config, everybody here included."""
        self.config = config
        self.lane_limits = _lane_limits(config)
        self.limits.reload(config)
        self.router.reload(config)
        self.log = structlog.get_logger("broker").bind()
        for connection in self.connections.values():
            connection.reload(config)


def _lane_limits(config: Config) -> LaneLimits:
    return LaneLimits(
        max_message_bytes=config.max_message_bytes,
        max_fragments=config.max_fragments,
        message_seconds=config.message_seconds,
        control_rate=config.control_rate,
        control_burst=config.control_burst,
        inbox_batches=config.inbox_batches,
    )
