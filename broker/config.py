"""Every limit and every deadline, with the reason for its default.

Rule: a number that a user may want to change lives here and nowhere else. Durations are
seconds, sizes are bytes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import attrs

SlowConsumer = Literal["close", "drop_oldest", "latest"]
LogFormat = Literal["console", "json", "article"]


@attrs.frozen(kw_only=True)
class TopicRules:
    """What topics keep, and what happens to a subscriber that cannot follow."""

    history_size: int = 100
    """Publications kept per topic; 0 keeps none. A phone that loses its network for a minute
    in a busy chat misses fewer."""

    history_ttl: float = 300.0
    """Seconds a publication is kept: longer than a walk through a tunnel or a laptop's nap."""

    presence: bool = True
    """Whether clients may ask who is subscribed. Costs nothing until asked."""

    join_leave: bool = True
    """Whether a client that asks for it is told who comes and goes. Costs nothing until asked."""

    slow_consumer: SlowConsumer = "close"
    """When an outbox is full: `close` the connection (3008, the client comes back and recovers),
    `drop_oldest` publications, or keep only the `latest` of each topic."""


@attrs.frozen(kw_only=True)
class Config:
    """The settings of one broker. Checked when made: a wrong value raises `ValueError`."""

    # where to listen
    host: str = "localhost"
    """Loopback, both families: a wider bind is a decision, not a default."""
    port: int = 9501
    """As in the Swoole tutorial. 0 lets the system choose."""
    unix: Path | None = None
    """Listen on this Unix socket instead of TCP."""
    tls_cert: Path | None = None
    tls_key: Path | None = None
    backlog: int = 4096
    """Connects waiting to be accepted: a reconnect storm of 5,000 needs room (Linux caps it at
    `net.core.somaxconn`, 4,096)."""
    websocket_paths: tuple[str, ...] = ("/", "/connection/websocket")
    """`/` for a bare `new WebSocket("ws://host:9501")`, the other as Centrifugo has it."""
    allowed_origins: tuple[str, ...] = ()
    """Origins that may connect besides the page's own; `*` allows all. On a loopback bind,
    loopback origins and `null` (a page opened from a file) pass as well."""

    # what one peer may take
    max_connections: int | None = None
    """None: the limit on open files, less a reserve of 64 for everything else."""
    head_bytes: int = 8 * 2**10
    """nginx and Apache allow 8 KiB."""
    open_seconds: float = 5.0
    """From accept to the end of the handshake. A phone on a bad network needs about two."""
    max_message_bytes: int = 2**20
    """1 MiB, as trio-websocket and websockets have it."""
    max_fragments: int = 1024
    message_seconds: float = 30.0
    """From a message's first byte to its last: 1 MiB at 35 KB/s."""
    control_rate: float = 20.0
    """Control frames a second; a browser sends none, a busy client one a second."""
    control_burst: int = 100
    inbox_batches: int = 64
    """Reads that may wait for a busy session before we stop reading from this peer."""
    max_topic_bytes: int = 255
    """As Centrifugo and most file systems."""
    max_topics: int = 1000
    """Subscriptions of one connection."""

    # what waits for one peer
    outbox_bytes: int = 2**20
    """1 MiB, as Centrifugo; NATS has 64 MiB, Redis 8 MiB for a minute. Our messages are small."""
    outbox_messages: int = 1000
    stall_seconds: float = 10.0
    """A peer that accepts no byte for this long is cut; NATS waits 10 s as well."""

    # heartbeats and ends
    ping_seconds: float = 20.0
    """Below the 30 s after which the strictest proxies drop a silent connection."""
    pong_seconds: float = 10.0
    """A phone that wakes its radio answers in about three."""
    close_seconds: float = 5.0
    """How long a peer has to answer our Close."""
    drain_seconds: float = 5.0
    """How long a stop waits for outboxes to empty: half of what Docker gives before SIGKILL."""

    # history, over all topics
    history_bytes: int = 64 * 2**20
    """All topics together. Beyond it the topic published to longest ago is forgotten."""
    topics: TopicRules = attrs.field(factory=TopicRules)

    # logs
    log_format: LogFormat = "console"
    log_level: Literal["debug", "info", "warning", "error"] = "info"


def load(path: Path | None, overrides: Mapping[str, object]) -> Config:
    """Read a TOML file and lay `overrides` over it; raise `ConfigError` naming what is wrong."""
    raise NotImplementedError
