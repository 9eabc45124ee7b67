"""Every limit and every deadline, with the reason for its default.

Rule 1: a number that a user may want to change lives here and nowhere else. Durations are
seconds (`inf`: never), sizes are bytes.

Rule 2: the values of a `Config` have been checked; a wrong one raises when it is made.
"""

import ipaddress
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

import attrs

from broker.config.types import converted
from broker.config.validators import (
    backend_url,
    distinct_patterns,
    engine_url,
    event_kinds,
    file_mode,
    first_fd,
    headers,
    host_name,
    hosts,
    http_url,
    namespace_names,
    networks,
    number,
    origins,
    path_prefix,
    paths,
    place,
    positive,
    secret_text,
    signing_secret,
    topic_match,
)
from broker.core.event_queue import CHOICES
from broker.core.session import SlowRule

Askers = Literal["all", "subscribers", "users", "none"]
"""`subscribers` of the very topic, not of a pattern; `users`: all clients that are not anonymous."""
Joiners = Literal["all", "users", "none"]
"""The same, for what one does before one is a subscriber."""
ProxyHeader = Literal["x-forwarded-for", "x-real-ip", "forwarded"]
LogFormat = Literal["console", "json", "article"]
LogLevel = Literal["debug", "info", "warning", "error"]
SpanExport = Literal["off", "console", "otlp", "program"]
FirstFd = int | Literal["clock"]

NEEDS_RESTART: Final = "needs_restart"
"""Metadata of a field that a reload cannot change: why not."""


def _needs_restart(reason: str) -> dict[str, str]:
    return {NEEDS_RESTART: reason}


INBOX_BATCH_BYTES: Final = 64 * 2**10
"""Bytes that one read brings at most."""

_LISTENING: Final = _needs_restart("the listeners are open")


@attrs.frozen(kw_only=True, field_transformer=converted)
class TopicRules:
    """Rules of topics: their history, the rights of clients, and the treatment of a subscriber that
    cannot follow."""

    history_size: int = attrs.field(default=100, validator=number(0))
    """Publications kept per topic; 0 keeps none. A phone that loses its network for a minute
    in a busy chat misses fewer."""

    history_ttl: float = attrs.field(default=300.0, validator=positive)
    """Seconds a publication is kept: longer than a walk through a tunnel or a laptop's nap."""

    presence: bool = True
    """Whether clients may ask who is subscribed. Costs nothing until asked."""

    join_leave: bool = True
    """Whether a client that asks for it is told who comes and goes. Costs nothing until asked."""

    retain: bool = False
    """Whether the last value of each topic is retained: new subscribers get it at once."""

    force_push_join_leave: bool = False
    """Tell every subscriber who comes and goes, also those that did not ask. Costs a message to
    each subscriber for each that comes: only where topics are small."""

    force_recovery: bool = False
    """Every subscription recovers what it missed, also where the client did not ask."""

    force_positioning: bool = False
    """Every subscription has a position, so that the client learns of a gap."""

    may_publish: Askers = "all"
    """Which clients may publish. Your program and its hooks may always."""

    may_subscribe: Joiners = "all"
    """Which clients may subscribe. A publication that comes through a pattern is judged by its own
    topic."""

    may_read_presence: Askers = "all"
    """Which clients may ask who is subscribed."""

    may_read_history: Askers = "all"
    """Which clients may ask for what was published. Recovery asks `may_subscribe` alone."""

    slow_consumer: SlowRule = "close"
    """When an outbox is full: `close` the connection (3008, the client comes back and recovers),
    `drop_oldest` publications, or keep only the `latest` of each topic."""


@attrs.frozen(field_transformer=converted)
class TopicPattern:
    """Rules of the topics that a pattern matches; `match` may be a single topic as well."""

    match: str = attrs.field(validator=topic_match)
    rules: TopicRules


@attrs.frozen(kw_only=True, field_transformer=converted)
class TokenRules:
    """Keys whose signature on a JSON Web Token counts, and the claims it must have (RFC 7519)."""

    hmac_secret: str = attrs.field(default="", repr=False)
    """Verifies HS256, HS384 and HS512. A person who knows it can mint any token, so take 32 random
    bytes or more. Better in the environment or a file of its own than beside other settings."""

    hmac_secret_file: Path | None = None
    """A file that holds the secret, as container platforms mount it; a line end at its end does
    not count."""

    public_keys: tuple[str, ...] = ()
    """PEM files. An RSA key verifies RS* and PS*, an EC key the ES* of its curve, an Ed25519 or
    Ed448 key EdDSA. Two are there while a key is being replaced."""

    jwks_url: str = attrs.field(default="", validator=http_url)
    """Where the issuer publishes its keys (RFC 7517); a token names one by its `kid`."""

    jwks_seconds: float = attrs.field(default=3600.0, validator=positive)
    """How often the key set is fetched: a key that was taken out counts that much longer."""

    jwks_retry_seconds: float = attrs.field(default=10.0, validator=positive)
    """A failed fetch is tried again after this, and a `kid` that is not in the set has it fetched
    at most this often, so that made-up ones do not hammer the issuer."""

    audience: str = ""
    """If set, a token's `aud` must name it: a token for another service is not for us."""

    issuer: str = ""
    """If set, a token's `iss` must be this."""

    allow_anonymous: bool | None = None
    """Whether a Centrifuge client may connect without a token. Unset: only while no key is set."""

    leeway_seconds: float = attrs.field(default=5.0, validator=number(0, 300))
    """How far the issuer's clock may be from ours. NTP keeps machines within a second; a virtual
    machine that was just woken needs a few."""

    max_bytes: int = attrs.field(default=8 * 2**10, validator=number(1))
    """A longer token is refused unread. As much as a whole request head may take; tokens of
    identity providers have 1 to 4 KiB."""

    grace_seconds: float = attrs.field(default=25.0, validator=number(0))
    """How long an expired connection or subscription may go on, for its client to fetch a new
    token and refresh; as Centrifugo's `expired_close_delay`."""

    @property
    def configured(self) -> bool:
        """Whether any key is set, so that tokens count."""
        return bool(self.hmac_secret or self.hmac_secret_file or self.public_keys or self.jwks_url)

    @property
    def anonymous_allowed(self) -> bool:
        return not self.configured if self.allow_anonymous is None else self.allow_anonymous

    def __attrs_post_init__(self) -> None:
        if self.hmac_secret and self.hmac_secret_file:
            raise ValueError(
                "hmac_secret and hmac_secret_file are both set: which of them counts? Keep one"
            )
        if self.allow_anonymous is False and not self.configured:
            raise ValueError(
                "allow_anonymous is false, but there is no key to verify a token with: set "
                "hmac_secret, public_keys or jwks_url"
            )


@attrs.frozen(kw_only=True, field_transformer=converted)
class WebhookRules:
    """Where events are sent, and what happens while nobody takes them."""

    url: str = attrs.field(default="", validator=backend_url)
    """Your backend, which is told by POST of who comes, goes and subscribes. Unset: nobody is."""

    secret: str = attrs.field(default="", validator=signing_secret, repr=False)
    """Signs each request (Standard Webhooks), so that the backend knows who sent it: `whsec_` and
    base64 of 24 random bytes or more. Better in the environment than beside other settings."""

    events: tuple[str, ...] = attrs.field(default=tuple(map(str, CHOICES)), validator=event_kinds)
    """Kinds of events that are sent; `started`, `stopped` and `lost` always are."""

    batch_events: int = attrs.field(default=100, validator=number(1))
    """Events in one request at most. 100 are about 20 KB: some web frameworks take no more than
    100 KB unless told to."""

    max_events: int = attrs.field(default=100_000, validator=number(1))
    """Events that may wait, here and for your program's `on_event`; beyond it the oldest are lost,
    and the reader is told so. About 40 MB: the events of 5,000 clients that come back twice."""

    timeout_seconds: float = attrs.field(default=10.0, validator=positive)
    """From a request to its whole answer. Then it is sent again, so a backend that works longer
    does the same work twice: answer first."""

    retry_seconds: float = attrs.field(default=0.5, validator=positive)
    """Before the first retry; each next one waits twice as long. A process that restarts is back in
    a few seconds."""

    retry_max_seconds: float = attrs.field(default=30.0, validator=positive)
    """The longest wait between two retries, unless the backend asks for more by `Retry-After`: so
    long may it know nothing after it is back."""

    flush_seconds: float = attrs.field(default=3.0, validator=number(0))
    """How long a stop waits for the last events to be taken, once everybody is gone: with
    `drain_seconds` still within the 10 s that Docker gives before SIGKILL."""

    connect_url: str = attrs.field(default="", validator=backend_url)
    """Asked who a Centrifuge client is and whether it may connect, in place of an `on_connect`
    hook."""

    subscribe_url: str = attrs.field(default="", validator=backend_url)
    """Asked whether a client may subscribe, in place of an `on_subscribe` hook."""

    publish_url: str = attrs.field(default="", validator=backend_url)
    """Asked whether a client may publish, in place of an `on_publish` hook: each publish of a client
    waits for the answer."""

    rpc_url: str = attrs.field(default="", validator=backend_url)
    """Answers the calls of clients, in place of an `on_rpc` hook."""

    answer_seconds: float = attrs.field(default=4.0, validator=positive)
    """How long a question may take, from the moment in which it is sent: official clients give up on
    a reply after 5 s."""

    pool_requests: int = attrs.field(default=64, validator=number(1))
    """Questions of one kind (connect, subscribe, publish, rpc) that are asked at once, so that a slow
    answer to one kind delays no other. At 20 ms an answer that is 3,200 a second; each takes an
    open file."""

    pool_requests_per_user: int | None = attrs.field(
        default=None, validator=number(1, optional=True)
    )
    """Of these the most for one user, or for one address where there is no user. None: a quarter, so
    that it takes four to fill a pool."""

    pool_seconds: float = attrs.field(default=4.0, validator=positive)
    """How long a question may wait until it is among those that are asked: after that an official
    client has no time left for the answer."""

    @property
    def most_requests(self) -> int:
        """How many requests to backends there may be at once: each is an open file."""
        urls = (self.connect_url, self.subscribe_url, self.publish_url, self.rpc_url)
        return self.pool_requests * len(list(filter(None, urls))) + bool(self.url)

    @property
    def pool_share(self) -> int:
        """`pool_requests_per_user` as it counts."""
        share = self.pool_requests_per_user
        return max(1, self.pool_requests // 4) if share is None else share

    forward_headers: tuple[str, ...] = attrs.field(
        default=("Authorization", "Cookie", "Origin", "User-Agent", "X-Forwarded-For", "X-Real-IP"),
        validator=headers,
    )
    """Headers of the client's handshake that go along with a question about it, so that the
    backend's own sessions work. Not along with events. Those that proxies set, such as
    `X-Forwarded-For`, are passed on from `trusted_proxies` alone."""


@attrs.frozen(kw_only=True, field_transformer=converted)
class Config:
    """The settings of one broker. Checked when made: a wrong value raises `ValueError`."""

    # where to listen
    host: str = attrs.field(metadata=_LISTENING, default="localhost", validator=host_name)
    """Loopback, both families: a wider bind is a decision, not a default. `0.0.0.0` is IPv4 alone, `::` is
    IPv6 alone, and an empty one is both."""
    port: int = attrs.field(metadata=_LISTENING, default=9501, validator=number(0, 65535))
    """As in the Swoole tutorial. 0 lets the system choose."""
    unix: Path | None = attrs.field(default=None, metadata=_LISTENING)
    """Listen on this Unix socket instead of TCP. Of `unix` and `host` or `port`, the layer that comes last
    decides: `--port` on the command line beats `unix` in a file."""
    unix_mode: str | None = attrs.field(default=None, metadata=_LISTENING, validator=file_mode)
    """The rights to connect to the Unix socket, in octal as for `chmod`: `"0660"` lets its user and its group
    in. Unset: as the umask has it, or 0660 with `unix_group`."""
    unix_group: str | None = attrs.field(default=None, metadata=_LISTENING)
    """The group of the Unix socket, by name: that of a proxy which runs as another user, such as
    `www-data`. The broker's user has to be a member of it."""
    workers: int = attrs.field(
        default=1, metadata=_needs_restart("the workers are there"), validator=number(1, 1024)
    )
    """Processes that serve, for `python -m broker`: one for each processor core at most. More than one are
    nodes that share the sockets, joined by the Redis that `engine` names, or by one of their own."""
    tls_cert: Path | None = attrs.field(default=None, metadata=_LISTENING)
    """PEM file with the certificate and the chain above it; needs `tls_key` beside it. None:
    no TLS, which is right on loopback and behind a proxy."""
    tls_key: Path | None = attrs.field(default=None, metadata=_LISTENING)
    """PEM file with the certificate's private key, without a passphrase: nobody is there to
    type it when a service restarts."""
    backlog: int = attrs.field(metadata=_LISTENING, default=4096, validator=number(1))
    """Connects waiting to be accepted: a reconnect storm of 5,000 needs room (Linux caps it at
    `net.core.somaxconn`, 4,096)."""
    websocket_paths: tuple[str, ...] = attrs.field(
        metadata=_needs_restart("the pages know their paths"),
        default=("/", "/connection/websocket"),
        validator=paths,
    )
    """`/` for a bare `new WebSocket("ws://host:9501")`, the other as Centrifugo has it. `/rooms/*` is all
    below `/rooms/`, `/*` any path: your program reads it from `connection.path`."""
    demo_page: bool = True
    """Whether the chat at `/` is served, to try the broker with. It may do what any client may, no more. Your
    program's `on_request` comes before it in either case."""
    fallbacks: bool = True
    """Whether clients without WebSocket are served over HTTP, on `/connection/http_stream`,
    `/connection/sse`, `/connection/uni_sse` and `/emulation`, by the same rules as all others."""
    allowed_origins: tuple[str, ...] = attrs.field(default=(), validator=origins)
    """Origins of web pages that may connect besides the page's own: `https://example.com`,
    `https://*.example.com` (all below it), `http://localhost:*` (all ports), `null`, `*` for all. On a
    loopback bind and under a loopback name, loopback origins and `null` (a page opened from a file)
    pass as well, until `[tokens]` says that users matter."""
    hosts: tuple[str, ...] = attrs.field(default=(), validator=hosts)
    """Names under which browsers reach this broker, as a proxy passes them on in `Host`:
    `example.com`, `example.com:8443`, `*.example.com` (all below it), `*` for any. A page that asks us
    under another name is refused with 403, because its owner may have made that name lead here (DNS
    rebinding). Always ours are loopback names, IP addresses, `host` and the hosts of `allowed_origins`. Not
    looked at with `tls_cert`, whose names browsers check; nor on an open bind where neither `hosts` nor
    `allowed_origins`, `[tokens]` or `connect_url` is set, as that serves everybody."""

    trusted_proxies: tuple[str, ...] = attrs.field(default=(), validator=networks)
    """Your proxies, whose `X-Forwarded-For` says for whom they ask: addresses (`192.0.2.7`), networks
    (`10.0.0.0/8`), `unix` for all that come over the Unix socket. None by default, loopback neither: a proxy
    that only passes headers on would pass on those that a stranger made up."""
    proxy_header: ProxyHeader = "x-forwarded-for"
    """The header that they write. A client may have made up others of the kind, because proxies pass on
    headers that they do not know: name the one that yours sets."""
    proxy_protocol: bool = False
    """Whether they begin each connection with the PROXY protocol, version 1 or 2, as proxies do that pass
    on bytes. Then that is owed; others may not send it."""
    path_prefix: str = attrs.field(default="", validator=path_prefix)
    """A path before all of ours, such as `/chat` where a proxy passes on `/chat/…` as it is: then
    WebSockets are at `/chat/connection/websocket`. `/healthz` and `/readyz` are at the root as well."""

    api_key: str | None = attrs.field(default=None, validator=secret_text, repr=False)
    """The key that backends show as `X-API-Key` to use the HTTP API under `/api`. None: no such API.
    Better in `BROKER_API_KEY` than in a file that many can read."""

    api_listen: str = attrs.field(default="", metadata=_LISTENING, validator=place)
    """A place of its own for `/api`, `/metrics`, `/healthz` and `/readyz`, which the others then have not, but for
    their health: `"localhost:9502"`, `"0.0.0.0:9502"`, `"unix:/run/broker-api.sock"`. So a firewall can
    tell backends from clients. It speaks plain HTTP and asks for the same keys."""

    metrics_key: str | None = attrs.field(default=None, validator=secret_text, repr=False)
    """The key that opens `/metrics`, as a bearer token or as a password; so does `api_key`. With neither
    there are no metrics. Better in `BROKER_METRICS_KEY` than in a file that many can read."""

    admin_key: str | None = attrs.field(default=None, validator=secret_text, repr=False)
    """The key that lets an operator in at the dashboard, `/admin`, to look and to act. Without this and
    `admin_view_key` there is no dashboard. Better in `BROKER_ADMIN_KEY` than in a file that many can
    read."""

    admin_view_key: str | None = attrs.field(default=None, validator=secret_text, repr=False)
    """The key that lets somebody in at the dashboard to look at everything, payloads among it, and to
    change nothing. Better in `BROKER_ADMIN_VIEW_KEY`."""

    # limits of one peer
    max_connections: int | None = attrs.field(default=None, validator=number(1, optional=True))
    """None: the limit on open files, less 256 for all else and one for each request to a
    backend that `[webhooks]` allows at once, or half of a small limit. More than
    there are files for is not to be had, and warned about at start."""
    head_bytes: int = attrs.field(default=8 * 2**10, validator=number(1))
    """nginx and Apache allow 8 KiB."""
    open_seconds: float = attrs.field(default=5.0, validator=positive)
    """From accept to the end of the handshake. A phone on a bad network needs about two."""
    stale_seconds: float = attrs.field(default=10.0, validator=positive)
    """From the handshake until a client has connected: one that asked for a subprotocol or came over
    HTTP, and where tokens are required every peer that has neither shown one nor a user by your app.
    Then it is sent away with 3502. As Centrifugo's `stale_close_delay`; NATS allows 2 s."""
    max_message_bytes: int = attrs.field(default=2**20, validator=number(1))
    """1 MiB, as trio-websocket and websockets have it: an official client that comes back asks for all its
    subscriptions in one message, 150 bytes for each and 460 with its token. If that is larger, it never
    comes back; so `max_topics` goes down with this. Centrifugo has 64 KiB and 128 topics."""
    max_fragments: int = attrs.field(default=1024, validator=number(1))
    """1 MiB in pieces of 1 KiB. An empty fragment costs its sender 6 bytes and us a parse, so
    they are counted, not only weighed."""
    message_seconds: float = attrs.field(default=30.0, validator=positive)
    """From a message's first byte to its last: 1 MiB at 35 KB/s."""
    control_rate: float = attrs.field(default=20.0, validator=positive)
    """Control frames a second; a browser sends none, a busy client one a second."""
    control_burst: int = attrs.field(default=100, validator=number(1))
    """Control frames at once before `control_rate` applies: five seconds' worth, for a peer
    whose network held them up."""
    inbox_batches: int = attrs.field(default=64, validator=number(1))
    """Reads that may wait for a busy session before we stop reading from this peer, and as many times
    64 KiB, which is what one brings at most: 4 MiB."""
    max_topic_bytes: int = attrs.field(default=255, validator=number(1))
    """As Centrifugo and most file systems."""
    max_topics: int = attrs.field(default=1000, validator=number(1))
    """Subscriptions of one connection."""
    max_subscription_bytes: int = attrs.field(default=4 * 2**20, validator=number(1))
    """Memory of all subscriptions of one connection: names, filters, what others see of it. 1,000 with
    the longest names and small filters take 3 MiB."""
    max_filter_nodes: int = attrs.field(default=2000, validator=number(1))
    """Nodes in the tags filters of one connection together: two in each of 1,000 subscriptions. A
    filter that asks for some values of a tag is found by them; any other is asked about each publication
    with tags, which costs 0.15 µs a node, and its publisher waits for that."""
    connection_bytes: int | None = attrs.field(default=None, validator=number(1, optional=True))
    """Memory for one connection: what waits for it and from it, its subscriptions, its will. Beyond it
    nothing more is read, and what it asks for is answered with 106 or 503. None: what the bounds on
    these parts add up to, 13.2 MiB by default. One reply that was asked for may come on top."""
    max_connections_per_user: int | None = attrs.field(
        default=None, validator=number(1, optional=True)
    )
    """None: as many as there are. One more is sent away with 3504 and does not come back."""
    message_rate: float = attrs.field(default=math.inf, validator=positive)
    """Requests, or a plain peer's messages, a second from one connection. Off: a full socket
    already slows its own sender, and nobody else."""
    message_burst: int = attrs.field(default=100, validator=number(1))
    """Requests at once before `message_rate` applies: as many as a client sends when it comes back
    and subscribes to all it had."""
    byte_rate: float = attrs.field(default=math.inf, validator=positive)
    """Bytes a second from one connection."""
    byte_burst: int = attrs.field(default=2**20, validator=number(1))
    """Bytes at once before `byte_rate` applies: one message of the largest size. A larger one
    passes when nothing was sent before it, and is paid off afterwards."""
    user_message_rate: float = attrs.field(default=math.inf, validator=positive)
    """As `message_rate`, for all connections of one user together."""
    user_message_burst: int = attrs.field(default=300, validator=number(1))
    """As `message_burst`: a phone, a laptop and a browser tab come back at once."""
    user_byte_rate: float = attrs.field(default=math.inf, validator=positive)
    """As `byte_rate`, for all connections of one user together."""
    user_byte_burst: int = attrs.field(default=4 * 2**20, validator=number(1))
    """As `byte_burst`."""
    excess_rate: float = attrs.field(default=1.0, validator=positive)
    """Requests beyond the rates above that are forgiven a second. A client that goes on is sent
    away with 3013."""
    excess_burst: int = attrs.field(default=1000, validator=number(1))
    """Requests beyond the rates that are answered with 111 before that: a client that publishes
    what it had kept while it was offline deserves an answer to each."""
    history_reply_bytes: int = attrs.field(default=4 * 2**20, validator=number(1))
    """Data in one answer to a history request, with 288 bytes for each publication; a longer one ends
    there, and its client asks again from the last offset that it has got. A recovery that would bring more
    is answered with `recovered: false`. Four messages of the largest size, or 13,000 small ones."""
    history_max_limit: int = attrs.field(default=300, validator=number(1))
    """Publications in one answer to a history request, as Centrifugo: 1,000 of 1 MiB would fill the outbox of
    the asker."""
    presence_max_clients: int = attrs.field(default=5000, validator=number(1))
    """Clients in one answer to a presence request, with `history_reply_bytes` of what they show of
    themselves; where there are more it is 106, and `presence_stats` counts them. 5,000 take 7 ms in JSON
    and 17 in protobuf, during which everybody waits, and nobody reads a longer list."""
    api_reply_bytes: int = attrs.field(default=8 * 2**20, validator=number(1))
    """Lists in one answer of the HTTP API: where one would be longer it is 106, for that command of a
    batch alone; a page of `connections` ends there. A whole history in base64, with room to spare."""
    questions_at_once: int = attrs.field(default=8, validator=number(1))
    """Commands of one client about different topics that hooks, or a backend, are asked about side
    by side; each is carried out when its turn comes. With 8, a client that comes back with 80
    subscriptions and a hook that takes 0.1 s waits one second: official clients give up on a reply
    after five. 1: one after the other."""
    may_send: Joiners = "all"
    """Which clients may send direct messages: publish to `fd:7` or `user:alice`."""

    # the outbox of one peer
    outbox_bytes: int = attrs.field(default=2**20, validator=number(1))
    """1 MiB, as Centrifugo; NATS has 64 MiB, Redis 8 MiB for a minute. Our messages are small."""
    high_watermark_bytes: int | None = attrs.field(default=None, validator=number(0, optional=True))
    """When more than this waits in an outbox, `on_buffer_full` tells your program, and its `send` waits
    for room. None: half of `outbox_bytes`, so that there is room for what is published meanwhile."""
    low_watermark_bytes: int | None = attrs.field(default=None, validator=number(0, optional=True))
    """When no more than this waits after that, `on_buffer_empty` tells so. None: an eighth of
    `outbox_bytes`."""
    outbox_messages: int = attrs.field(default=16_384, validator=number(1))
    """Bounds the cost of what `outbox_bytes` does not weigh: 1 MiB of the shortest messages. One
    read from a publisher holds 500, so a thousand would cut a reader that naps for 5 ms (ADR 2)."""
    stall_seconds: float = attrs.field(default=10.0, validator=positive)
    """A peer that accepts no byte for this long is cut; NATS waits 10 s as well."""

    # compression
    compression: bool = False
    """Whether clients that offer it, as all browsers do, get and may send compressed messages
    (permessage-deflate, RFC 7692): JSON of 1 KiB becomes a third. Off, as with Centrifugo and Swoole: where a
    message holds a secret beside what a stranger chose, its length tells of the secret, TLS or not; and
    a message for one client costs as much time as all else about it. One for many is compressed once.
    Where compressing would take more than half of the time, messages go as they are."""
    compression_min_bytes: int = attrs.field(default=512, validator=number(0))
    """Messages that are smaller are not compressed: it takes 8 µs and saves less than 300 bytes. Larger than
    300 KB neither, as everybody would wait for that."""
    compression_client_context: bool = False
    """Whether clients may refer to what they sent before, so that small messages that are alike get smaller
    still. That takes 42 KiB for each client of the kind; together an eighth of `max_memory_bytes` at most, and
    those who come then compress each message by itself."""

    # connections and their names
    name: str = attrs.field(default="", metadata=_needs_restart("others know this broker by it"))
    """This broker's name: in events, in the HTTP API and in the reply to `connect`. The same after
    each restart, since `started` tells a backend to forget who was online at the broker of that
    name. Unset: host name and port."""
    first_fd: FirstFd = attrs.field(
        default=1, validator=first_fd, metadata=_needs_restart("fds have been given out")
    )
    """The fd of the first connection. `"clock"` begins with the time in microseconds, so that no fd
    comes again after a restart either; else they begin anew, as Swoole's do."""

    # subscriptions without being asked
    direct_topics: bool = True
    """Subscribe each client to its own `fd:N`, and to `user:NAME` if it has a user, so that others
    can send to it. Off, nobody can; for clients that take every subscription which the server makes
    for one of their app's."""

    # heartbeats and ends
    ping_seconds: float = attrs.field(default=20.0, validator=positive)
    """Below the 30 s after which the strictest proxies drop a silent connection."""
    pong_seconds: float = attrs.field(default=10.0, validator=positive)
    """A phone that wakes its radio answers in about three."""
    close_seconds: float = attrs.field(default=5.0, validator=positive)
    """How long a peer has to answer our Close."""
    drain_seconds: float = attrs.field(default=5.0, validator=number(0))
    """How long a stop waits for outboxes to empty: half of what Docker gives before SIGKILL."""
    drain_notice_seconds: float = attrs.field(default=0.0, validator=number(0))
    """How long `/readyz` answers 503 before a stop begins, and all else goes on as before: as long as a
    balancer needs to notice, so that nobody is sent here to be refused. Two checks of it are enough. Comes on
    top of `drain_seconds`."""
    goodbye_rate: float = attrs.field(default=1000.0, validator=positive)
    """Clients a second that a stop sends away, at least so many that all have heard of it after half of
    `drain_seconds`: they come back at once, elsewhere, and a process takes some 2,000 a second."""

    # memory, over all
    max_memory_bytes: int | None = attrs.field(default=None, validator=number(1, optional=True))
    """Memory for everything that is held for clients: outboxes, what they have sent, subscriptions, wills,
    histories. None: half of what this machine or its cgroup has, as Python, the buffers of the system
    and gaps in memory take their part too. Close to it, large requests are refused with 106
    or 503; beyond it the connections that hold the most are ended with 3008."""

    # history, over all topics
    engine: str = attrs.field(
        default="memory", validator=engine_url, metadata=_needs_restart("the engine is open")
    )
    """The store of history, retained values and idempotency keys. `memory`: this process, so they end with
    it, and nobody waits for a disk. `sqlite:PATH`: a file of this broker's own as well; a publication is
    acknowledged and delivered once it is there, and survives the loss of power. With `?sync=process` behind
    the path it survives a crash of the process alone, and nothing waits for the disk. `redis://HOST:PORT/DB`,
    `rediss://…`, `redis+unix://PATH`, `redis+sentinel://…`: a Redis or Valkey; all brokers that name the same
    one, and the same `?prefix=NAME` if there is one, are one broker."""
    history_bytes: int = attrs.field(
        metadata=_needs_restart("the engine has its room"), default=64 * 2**20, validator=number(0)
    )
    """All topics together. Beyond it, of those whose publications take most of it, the topic published
    to longest ago loses some: each user, the app, and all clients without a user count as one."""
    retained_bytes: int = attrs.field(default=8 * 2**20, validator=number(0))
    """Last values retained for new subscribers, all topics together: about 8,000 small ones.
    Beyond it, the owner that takes most of it loses the value retained longest ago, as with
    `history_bytes`."""
    topics: TopicRules = attrs.field(factory=TopicRules)
    """The rules of every topic that has no others; in a file they stand under `[topics]`."""
    namespaces: Mapping[str, TopicRules] = attrs.field(factory=dict, validator=namespace_names)
    """Rules by the part of a topic before its colon; in a file `[topics.namespaces.NAME]`. Once
    there is one, a topic of a namespace that is not here is answered with 102."""
    patterns: tuple[TopicPattern, ...] = attrs.field(default=(), validator=distinct_patterns)
    """Rules by pattern, the first that matches; they come before namespaces. In a file
    `[[topics.patterns]]`, each with its `match`."""
    hook_decides_patterns: bool = False
    """Whether a client may subscribe to patterns where an `on_subscribe` hook or a `subscribe_url`
    decides. It is asked about the pattern once, not about each topic that the pattern covers: open
    this only if a yes to the pattern means a yes to all of these."""
    personal_topic: bool = False
    """Subscribe each client to `#NAME` of its user when it connects, as Centrifugo can."""

    # access
    tokens: TokenRules = attrs.field(
        metadata=_needs_restart("the keys are read"), factory=TokenRules
    )
    """Under `[tokens]` in a file."""

    webhooks: WebhookRules = attrs.field(
        metadata=_needs_restart("the events are numbered"), factory=WebhookRules
    )
    """Under `[webhooks]` in a file."""

    # logs
    log_format: LogFormat = "console"
    """`console` for people, `json` for machines, `article` for the tutorial's four lines."""
    log_level: LogLevel = "info"
    """`info` tells of every connection's start and end, `debug` of every message, and of every command and
    its outcome."""
    access_log: bool = False
    """Whether each HTTP request is logged: method, path, status, time. Off: a broker behind a proxy has
    those lines twice."""

    spans: SpanExport = attrs.field(default="off", metadata=_needs_restart("the exporter is there"))
    """Where spans of OpenTelemetry go, of publications whose tag `traceparent` says that their trace is
    sampled: `otlp` to a collector, by `OTEL_EXPORTER_OTLP_ENDPOINT`, `console` to stdout, `program` to the
    tracer provider that your program has set. Needs `pip install '.[tracing]'`."""

    def __attrs_post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            given, missing = "tls_cert", "tls_key"
            if self.tls_cert is None:
                given, missing = missing, given
            raise ValueError(
                f"{given} is {str(getattr(self, given))!r} but {missing} is not set: "
                "TLS needs both, or neither"
            )
        if self.proxy_protocol and not self.trusted_proxies:
            raise ValueError(
                "proxy_protocol is true but trusted_proxies is not set: whose word counts? Name the "
                'addresses of your proxies, or "unix"'
            )
        if self.workers > 1 and self.engine.startswith("sqlite:"):
            raise ValueError(
                f"workers is {self.workers} and engine is {self.engine!r}: a file belongs to one process. "
                "Workers are joined by Redis: name one as the engine, or none to have one started"
            )
        if self.admin_key is not None and self.admin_key == self.admin_view_key:
            raise ValueError(
                "admin_key and admin_view_key are the same: who has the one may do all that the other "
                "keeps him from; take two"
            )
        high, low = self.watermarks
        if not low < high <= self.outbox_bytes:
            raise ValueError(
                f"low_watermark_bytes is {low}, high_watermark_bytes {high} and outbox_bytes "
                f"{self.outbox_bytes}: each must be less than the next, the last two may be the same"
            )
        least = self.outbox_most + self.max_message_bytes
        if self.connection_bytes is not None and self.connection_bytes < least:
            raise ValueError(
                f"connection_bytes is {self.connection_bytes}: must be at least {least}, as an outbox "
                f"with outbox_bytes = {self.outbox_bytes} and a message of max_message_bytes = "
                f"{self.max_message_bytes} may take so much"
            )

    @property
    def outbox_most(self) -> int:
        """Bytes that an outbox holds at worst, besides a reply that was asked for; see `Outbox`."""
        return self.outbox_bytes + self.outbox_bytes // 4 + 2 * self.max_message_bytes

    @property
    def watermarks(self) -> tuple[int, int]:
        """`high_watermark_bytes` and `low_watermark_bytes` as they count."""
        high, low = self.high_watermark_bytes, self.low_watermark_bytes
        return (
            max(1, self.outbox_bytes // 2) if high is None else high,
            self.outbox_bytes // 8 if low is None else low,
        )

    @property
    def inbox_bytes(self) -> int:
        """Bytes that may wait for a busy session before we stop reading from its peer."""
        return self.inbox_batches * INBOX_BATCH_BYTES

    @property
    def connection_most(self) -> int:
        """`connection_bytes` as it counts."""
        if self.connection_bytes is not None:
            return self.connection_bytes
        # One message that is under way, and one that is a will.
        standing = self.max_subscription_bytes + 2 * self.max_message_bytes
        return self.outbox_most + self.inbox_bytes + standing


def exposure_warning(config: Config) -> str | None:
    """Say in one line what a bind beyond loopback lays open; None if nothing is.

    Three cases bring no warning: a Unix socket is guarded by its directory's permissions, tokens that are
    needed keep out those who have none, and somebody who lists origins has thought about who may connect.
    """
    if config.unix is not None or config.allowed_origins or is_loopback(config.host):
        return None
    if not config.tokens.anonymous_allowed:
        return None
    return (
        f"host {config.host!r} is open to other machines, and neither tokens nor allowed_origins "
        f"are asked for: whoever reaches port {config.port} may read and publish every topic, "
        "unless your app checks it; set a key in [tokens], list --allowed-origin, or let in this "
        "machine alone: by --host localhost, or where systemd or a container opens the port"
    )


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine, by its text alone.

    Other names are not looked up: they count as open.
    """
    host = host.strip("[]").rstrip(".").lower()
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
