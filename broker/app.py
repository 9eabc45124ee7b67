"""The broker as an app has it: hooks, what may be done to connections and topics, and `serve`.

`serve` is the nursery tree. From the outside in: the engine, the post office, what the engine gives
back, upkeep, the sessions, the intake; what others need in order to finish is opened further out (docs/design/lifetimes.md).
"""

import ssl
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, ExitStack, suppress
from functools import partial
from typing import Any, Final

import attrs
import structlog
import trio

from broker import logs
from broker.access.jwks import open_tokens
from broker.access.keys import load_keys
from broker.access.rights import Rights
from broker.admin.methods import admin_methods
from broker.admin.samples import Samples
from broker.config.doubts import doubts_about
from broker.config.reload import NO_SOURCES, Settings, renews
from broker.config.settings import Config, exposure_warning
from broker.core.hub import Hub
from broker.core.messages import (
    ClientInfo,
    ConnectionInfo,
    Delivery,
    Fd,
    Position,
    Publication,
    PushResult,
)
from broker.core.scopes import name_scope
from broker.core.session import ServerSub
from broker.engines.engine import RunBlocking
from broker.engines.opening import OpenEngine, open_engine
from broker.errors import CloseCode, ConfigError, Refused, UnsubscribeCode
from broker.events.dispatcher import hook_reader, open_events
from broker.events.spans import open_spans
from broker.hooks import (
    Hooks,
    OnBuffer,
    OnClose,
    OnConnect,
    OnEvent,
    OnHandshake,
    OnMessage,
    OnOpen,
    OnPublish,
    OnRead,
    OnRequest,
    OnRpc,
    OnSubscribe,
)
from broker.http.api_server import BackendServer
from broker.http.asgi import http_app
from broker.http.fallbacks import Fallbacks
from broker.http.server import HttpServer
from broker.http.stats import VIEW, AskedStats, stats_of
from broker.node import Node, node_name
from broker.process import signals
from broker.protocols.json_text import to_json
from broker.routing.neighbourhood import Neighbourhood
from broker.routing.publishing import PublishOptions
from broker.routing.reader import Reader
from broker.routing.recipients import Peer
from broker.routing.router import Router
from broker.session.accept import STREAM, serve_connection
from broker.session.cluster import Cluster
from broker.session.figures import BrokerStatistics
from broker.session.memory import hold_request, keep_memory, memory_fields, memory_warning
from broker.session.orders import shaped
from broker.session.services import Services
from broker.session.views import view_of
from broker.transport.listeners import (
    AnyListener,
    accept_streams,
    describe,
    read_certificate,
)
from broker.transport.places import config_of, is_local, open_api_sockets, open_places
from broker.transport.postman import open_post_office
from broker.webhooks.proxy import open_questions
from broker.webhooks.sender import open_sender

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("broker")

_SHOWN: Final = 200
"""Characters of an exception in a log line: it may hold a megabyte of what a peer sent."""

_TICKS_TO_TELL: Final = 10
"""How often all other tasks run after a stop before anybody is cut, also with `drain_seconds = 0`: a
Close frame is with its socket after one round of the postman, and through TLS after some four more."""

_BEAT = 1.0
"""How often heartbeats are looked at, in seconds: pings and cuts are late by that much at most."""


class Broker:
    """A message broker over WebSocket; `await nursery.start(broker.serve)` runs it.

    Unless it says otherwise a method never waits: it is one atomic step, of which the network
    learns later. `data` is any value that JSON can say, or `msgspec.Raw` for ready JSON; also
    what msgspec has a way to say, such as a date, and no set.
    """

    def __init__(self, config: Config | None = None) -> None:
        self.config: Config = config or Config()
        """May be replaced until `serve` is called; then `reload` does it."""
        self.config_sources: Mapping[str, str] = {}
        """Where values of it were given, by setting, for those who look: `{"port": "BROKER_PORT"}`. All
        others are the program's own."""
        self.wall_clock: Callable[[], float] = time.time
        """Unix seconds, by which tokens expire; `open_test_broker` puts virtual time here."""
        self.run_blocking: RunBlocking | None = None
        """Waits for the engine's disk in place of a thread of the engine's own; `open_test_broker` waits in
        line, as virtual time does not wait for threads."""
        self.worker: int | None = None
        """The number of this process among those of `--workers`, from 1 on; None where it is the only one."""
        self.collect: Callable[[], object] = _nothing
        """Called once a second, and more often while there is much to do: the command has Python's collector look
        at new objects then, as the process is its own. In a program of yours that is left to Python."""
        self.tls_context: ssl.SSLContext | None = None
        """The context of listeners with TLS, into which `reload_files` reads the certificate anew. Set it
        with `listeners` of your own."""
        self.cluster: Cluster = Cluster(lambda: self.node.everywhere)
        """The same for connections of all nodes, where several share an engine."""
        self.open_engine: OpenEngine = open_engine
        """Opens the engine that the config names; `broker.testing` may put another here."""
        self.hooks: Hooks = Hooks(self._end_by)
        self._ended_by: BaseException | None = None
        self._node: Node | None = None
        self._places: list[str] = []
        self._next_fd: Fd = 0
        self._is_taken = False
        self._stop = trio.Event()

    # hooks

    def on_handshake(self, hook: OnHandshake) -> OnHandshake:
        """`(handshake)`: a peer asks for a connection, and nothing is answered yet; may return a
        `HandshakeReply`, or raise `Refused` with an HTTP status. Also for clients without WebSocket."""
        self.hooks.set("handshake", hook)
        return hook

    def on_open(self, hook: OnOpen) -> OnOpen:
        """`(connection)`: a WebSocket was opened. Done before its first message is looked at."""
        self.hooks.set("open", hook)
        return hook

    def on_message(self, hook: OnMessage) -> OnMessage:
        """`(connection, frame)`: a plain peer sent a message, or a Centrifuge client used `send`."""
        self.hooks.set("message", hook)
        return hook

    def on_close(self, hook: OnClose) -> OnClose:
        """`(connection, close)`: the connection has ended. Called once for each `on_open`."""
        self.hooks.set("close", hook)
        return hook

    def on_buffer_full(self, hook: OnBuffer) -> OnBuffer:
        """`(connection)`: more than `high_watermark_bytes` waits for a peer that takes no more just now.

        Of connections that open from then on. Beside all other hooks; see `on_buffer_empty`, which
        follows unless the connection ends.
        """
        self.hooks.set("buffer_full", hook)
        return hook

    def on_buffer_empty(self, hook: OnBuffer) -> OnBuffer:
        """`(connection)`: no more than `low_watermark_bytes` waits for a peer that has been behind.

        Where a peer goes back and forth while a hook runs, the two are told the last of it.
        """
        self.hooks.set("buffer_empty", hook)
        return hook

    def on_rpc(self, hook: OnRpc) -> OnRpc:
        """`(connection, method, data)`: a client calls. Returns the answer, any value that JSON can
        say; to a client over protobuf also `bytes`."""
        self.hooks.set("rpc", hook)
        return hook

    def on_request(self, hook: OnRequest) -> OnRequest:
        """`(request)`: plain HTTP; returns a Starlette response, or None for what we have there
        ourselves, such as the page at `/`. Only `/healthz` and `/readyz` do not come here."""
        self.hooks.set("request", hook)
        return hook

    def on_connect(self, hook: OnConnect) -> OnConnect:
        """`(event)`: a Centrifuge client wants in; may return a `ConnectReply`."""
        self.hooks.set("connect", hook)
        return hook

    def on_subscribe(self, hook: OnSubscribe) -> OnSubscribe:
        """`(event)`: a client wants to subscribe; may return a `SubscribeReply`."""
        self.hooks.set("subscribe", hook)
        return hook

    def on_publish(self, hook: OnPublish) -> OnPublish:
        """`(event)`: a client wants to publish; may return a `PublishReply`."""
        self.hooks.set("publish", hook)
        return hook

    def on_presence(self, hook: OnRead) -> OnRead:
        """`(event)`: a client asks who is subscribed to a topic."""
        self.hooks.set("presence", hook)
        return hook

    def on_history(self, hook: OnRead) -> OnRead:
        """`(event)`: a client asks for a topic's history."""
        self.hooks.set("history", hook)
        return hook

    def on_event(self, hook: OnEvent) -> OnEvent:
        """`(event)`: something has happened to a connection.

        Told in order, one at a time, in a task of its own: no connection waits for it. When
        `webhooks.max_events` wait, the oldest are dropped, and an event of kind `lost` says so.
        Raises `RuntimeError` while the broker serves: events are numbered from its start.
        """
        if self._is_taken:
            raise RuntimeError(
                "on_event: set it before `serve`, which numbers events from its start"
            )
        self.hooks.set("event", hook)
        return hook

    # messages

    def push(
        self,
        fd: Fd,
        data: object,
        *,
        opcode: int | None = None,
        fragment_bytes: int | None = None,
    ) -> PushResult:
        """Send to one connection, without waiting: QUEUED means that it is on its way.

        A plain peer gets `str` as a text frame, `bytes` as a binary frame, anything else as JSON
        text; a Centrifuge client gets a `message` push. A peer that has not sent anything yet gets
        it when its first message tells which of them it is: it waits, as much as `outbox_bytes`; see
        `declare_plain`.

        For a plain peer `opcode` says whether the frame is `Opcode.TEXT` or `Opcode.BINARY`, whatever the
        data is, and with `fragment_bytes` it is cut in fragments of so many bytes, 125 or more. Centrifuge
        clients have frames of their own.

        Where nodes share an engine, FORWARDED means that it is on its way to the one that has the fd, if
        anybody has.

        Raises `TypeError` for what JSON cannot say, and `ValueError` for text that is not Unicode (a
        lone surrogate), or not UTF-8, and for another opcode.
        """
        if opcode is not None or fragment_bytes is not None:
            data = shaped(data, opcode, fragment_bytes)
        return PushResult.CLOSED if self._node is None else self._node.push(fd, data)

    async def send(
        self,
        fd: Fd,
        data: object,
        *,
        opcode: int | None = None,
        fragment_bytes: int | None = None,
    ) -> PushResult:
        """The same as `push`, to a connection of this node, but it waits for room: until no more than `high_watermark_bytes` wait for the
        peer. So a program that sends a lot goes on as fast as the peer takes it, and cuts nobody.

        Sends to one fd are queued in the order in which they began. The deadline is the caller's: in
        `trio.move_on_after(5)` it waits for 5 s. Cancelled, nothing was sent. `CLOSED` if the peer goes, or
        the broker stops, before there is room; `REBOUND` if it becomes another user's; `FULL`, without
        waiting, if as much as `connection_bytes` allows waits already, or memory is short. Raises
        what `push` raises.
        """
        if opcode is not None or fragment_bytes is not None:
            data = shaped(data, opcode, fragment_bytes)
        if self._node is None:
            await trio.lowlevel.checkpoint()
            return PushResult.CLOSED
        return await self._node.send(fd, data)

    def ping(self, fd: Fd, data: bytes = b"") -> bool:
        """Send a WebSocket Ping with up to 125 bytes of data, besides those of the broker's own heartbeat.

        False if it is not here, or no WebSocket. Its answer moves `ConnectionInfo.last_received_at`.
        Raises `ValueError` for more data.
        """
        return self._node is not None and self._node.ping(fd, data)

    def pause(self, fd: Fd) -> bool:
        """Read no more from one connection until `resume`; false if it is not here.

        Messages that it has sent already, one read of 64 KiB at most, may still come to your hooks. Then the
        network holds its sender back. Until `resume` nothing is seen of its pings, its Close and its end, so
        its silence is no reason to close it.
        """
        return self._node is not None and self._node.pause(fd)

    def resume(self, fd: Fd) -> bool:
        """Read on after `pause`; false if it is not here."""
        return self._node is not None and self._node.resume(fd)

    def declare_plain(self, fd: Fd) -> bool:
        """Take a peer that has not sent anything yet for a plain one, as for a page that only listens.

        Messages that waited for it go out at once, and whatever it sends goes to `on_message`. False
        if it has spoken already, is not there, or cannot be plain: over HTTP, or with a Centrifuge
        subprotocol. Where tokens are required, one that was declared plain, before it spoke or
        after, needs none to stay: see `stale_seconds`.
        """
        return self._node is not None and self._node.declare_plain(fd)

    async def publish(
        self,
        topic: str,
        data: object,
        *,
        exclude: Collection[Fd] = (),
        tags: Mapping[str, str] | None = None,
        skip_history: bool = False,
        retain: bool = False,
        key: str = "",
        report: bool = False,
    ) -> Delivery:
        """Publish to a topic, to one connection by `fd:N`, or to all those of a user by `user:NAME`;
        return once it is kept, as far as the engine keeps it, and on its way to all who listen.

        `bytes` go out as they are to clients over protobuf, as a binary frame to plain peers, and
        in base64 to those who read JSON, unless they are JSON. The fds of `exclude` get nothing;
        subscribers may pick by `tags`, and see them; with `skip_history` it is not kept; with `retain` later
        subscribers get it at once. A second publish to the topic with the same `key` within five minutes
        publishes nothing and returns the result of the first. The result counts those who listen on this
        node; with `report` on all nodes that share the engine, which takes a second at most: see
        `Delivery.complete`.

        Raises `Refused` for what is no topic and for an fd or a user that is not here, and 100 where
        it cannot be kept, as on a full disk; `TypeError` for what JSON cannot say. Cancelled before
        it has begun to wait for the engine it does nothing; after that it is published all the
        same.
        """
        raw = data if isinstance(data, bytes) else to_json(data)
        options = PublishOptions(
            exclude, tags, raw is data, skip_history, retain, key, report=report
        )
        return await self.node.publish(topic, raw, options)

    def publish_nowait(
        self,
        topic: str,
        data: object,
        *,
        exclude: Collection[Fd] = (),
        tags: Mapping[str, str] | None = None,
        skip_history: bool = False,
        retain: bool = False,
        key: str = "",
    ) -> None:
        """The same, without waiting, and without knowing what becomes of it.

        On the memory engine it is kept and on its way when this returns. Another engine has yet to
        keep it: then it is lost if the process is killed before, or the disk is full. Raises
        `trio.WouldBlock`, with nothing published, while as much waits for the engine as may, and
        16 KiB of it is this program's; and what `publish` raises at once.
        """
        raw = data if isinstance(data, bytes) else to_json(data)
        options = PublishOptions(exclude, tags, raw is data, skip_history, retain, key)
        self.node.publish_nowait(topic, raw, options)

    async def request(self, to: str, data: object) -> object:
        """Ask a client, by `fd:N`, or one member of a queue group, by a topic; return its answer.

        Waits until the answer comes; set a deadline around it. Raises `Refused`: the client's own refusal, or
        503 when nobody is there to ask or the one who was asked goes away; and `ValueError` for an answer
        that is nested too deeply for Python. Cancelled, it no longer waits for the answer, which the client
        may still give.
        """
        return await self.node.request(to, to_json(data))

    def subscribe(
        self, pattern: str, *, capacity: int = 1000, group: str = ""
    ) -> AbstractAsyncContextManager[Reader]:
        """Read a topic or pattern in this very program, for as long as the block.

        Publications wait in a memory channel of `capacity`. A reader that is slower than that loses
        some and is told so by `Lagged`; nobody waits for it. With a `group`, each publication goes
        to one of its members, wherever they are. Raises `Refused` for what is neither a
        topic nor a pattern, and for `fd:N` and `user:NAME`, which only these get.
        """
        return self.node.subscribe(pattern, capacity=capacity, group=group)

    # topics

    async def presence(self, topic: str) -> dict[str, ClientInfo]:
        """The clients that are subscribed to `topic` itself, on all nodes, by client id. Linear in them.

        A checkpoint only where nodes share the engine; there it raises `Refused`: 108 for a topic whose
        rules have no `presence`, 106 for more than 100,000 clients, 100 where the engine does not
        answer.
        """
        return {} if self._node is None else await self._node.presence(topic)

    async def history(
        self, topic: str, *, since: Position | None = None, limit: int = -1, reverse: bool = False
    ) -> tuple[list[Publication], Position]:
        """The publications that a topic keeps, and its position now.

        Those after `since`, oldest first, or with `reverse` those before it, newest first; at most
        `limit`, unless that is negative. Raises `UnrecoverablePosition` when `since` is of another
        epoch, and `Refused` (100) where the engine cannot be asked. A checkpoint only where nodes share
        the engine.
        """
        return await self.node.history(topic, since, limit, reverse)

    async def remove_history(self, topic: str) -> None:
        """Forget what a topic keeps; its position stays, so a client that was away learns of the loss.

        Returns when that is kept, too. Raises `Refused` (100) where it cannot be. Cancelled, it may
        be done or not.
        """
        await self.node.remove_history(topic)

    def topics(self) -> dict[str, int]:
        """The topics and patterns that are subscribed to, with how many subscriptions each has."""
        return {} if self._node is None else self._node.topics()

    def add_subscription(
        self,
        fd: Fd,
        topic: str,
        *,
        info: object = None,
        data: object = None,
        join_leave: bool = False,
    ) -> bool:
        """Subscribe a connection to a topic or pattern, without its asking.

        A Centrifuge client is told by a `subscribe` push, which carries `data`; `join_leave` lets it
        know who comes and goes. A plain peer gets what is published as it gets a push. `info` is
        what others see of it on this topic. For a peer that has not sent anything yet it begins with
        its first message. False if it is subscribed already, or not there. Raises `Refused` for one
        subscription too many and for what is neither topic nor pattern.
        """
        shown = None if info is None else to_json(info)
        told = None if data is None else to_json(data)
        return self.node.add_subscription(fd, topic, ServerSub(shown, told, join_leave))

    def end_subscription(
        self,
        fd: Fd,
        topic: str,
        code: int = UnsubscribeCode.SERVER,
        reason: str = "server unsubscribe",
    ) -> bool:
        """End a connection's subscription, whoever began it; false if there is none.

        Official clients stay unsubscribed for codes below 2500, and subscribe again for others.
        """
        return self._node is not None and self._node.end_subscription(fd, topic, code, reason)

    # connections

    def disconnect(
        self, fd: Fd, code: int = CloseCode.FORCE_DISCONNECT, reason: str = "force disconnect"
    ) -> bool:
        """Close a connection once it has got what is queued for it; false if it is not there.

        Official clients stay away after codes 3500-3999 and 4500-4999, and come back after others.
        Raises `ValueError` for a code that no Close frame may carry.
        """
        return self._node is not None and self._node.disconnect(fd, code, reason)

    def expire(self, fd: Fd, when: float | None = None) -> bool:
        """Let a client's connection end at `when`, in Unix seconds, in place of what its token
        says; None for never. False if there is no such Centrifuge client.

        It ends with 3005, `tokens.grace_seconds` later as with a token; at once if `when` is past.
        The client is not told: one that has a token still refreshes when that token's time comes.
        """
        return self._node is not None and self._node.expire(fd, when)

    def exists(self, fd: Fd) -> bool:
        """Whether this fd is a connection here, also one that is closing; no longer in `on_close`."""
        return self._node is not None and self._node.exists(fd)

    def is_established(self, fd: Fd) -> bool:
        """Whether this fd is connected: its handshake is done, and it is not closing."""
        return self._node is not None and self._node.is_established(fd)

    def connections(self, after: Fd = 0, limit: int = 100) -> list[ConnectionInfo]:
        """Up to `limit` connections in order of their fd, from the first beyond `after` on."""
        return [] if self._node is None else self._node.connections(after, limit)

    def connection_info(self, fd: Fd) -> ConnectionInfo | None:
        """A snapshot of one connection; None if it is not here, as `exists` says."""
        return None if self._node is None else self._node.connection_info(fd)

    def bind(self, fd: Fd, user: str) -> None:
        """Say who a connection belongs to; empty for nobody. Raises `KeyError` if it is not here.

        It is that user everywhere from then on: for the rules, in events, in what others see of it.
        Subscriptions that are not the new user's to have end: those of topics that name other users,
        those by a token for another user, and what the rules keep from the new one. A Centrifuge
        client is told of these, and of its new personal topics. An operator's connection stays nobody's.
        """
        if self._node is None:
            raise KeyError(fd)
        self._node.bind(fd, user)

    def fds_of(self, user: str) -> list[Fd]:
        """All connections of a user that are not closing."""
        return [] if self._node is None else self._node.fds_of(user)

    def stats(self) -> BrokerStatistics:
        """A snapshot of the state now and of all counts so far. Linear in the connections, 0.1 µs each."""
        return self.node.figures.statistics()

    @property
    def draining(self) -> bool:
        """Whether the broker was asked to stop."""
        return self._stop.is_set()

    @property
    def node(self) -> Node:
        """The broker's inner side, for test kits and the HTTP API. Raises `RuntimeError` unless it
        serves."""
        if self._node is None:
            raise RuntimeError("the broker is not serving: await nursery.start(broker.serve) first")
        return self._node

    # life

    def stop(self) -> None:
        """Ask `serve` to end. After `drain_notice_seconds` there are no more connections; those there are
        get what is queued for them, and a Close with 1001 or 3001; after `drain_seconds` the rest is cut."""
        self._stop.set()

    def _end_by(self, kind: str, fd: Fd, error: BaseException) -> None:
        """A hook has raised what ends the process: stop in good order, and raise it at the end."""
        log.critical(
            "hook_ended_the_process",
            hook=kind,
            fd=fd,
            error=repr(error)[:_SHOWN],
            detail="every client is told, then `serve` raises it",
        )
        if self._ended_by is None:
            self._ended_by = error
        self.stop()

    def reload(self, config: Config, sources: Mapping[str, str] = NO_SOURCES) -> None:
        """Go by another config from now on, with everybody still connected.

        Rules and limits count from a client's next request on; who is subscribed already stays so.
        Where the broker listens and how much history it keeps cannot change while it serves: that
        stays as it is, and one warning names it. `sources` is as `config_sources`.
        """
        if self._node is None:
            self.config, self.config_sources = config, sources
        else:
            self.config = self._node.reload(config, sources).config

    def listen(self, place: str) -> None:
        """Listen on one more place: `"unix:/run/broker.sock"`, `"localhost:9502"`, `"[::]:9503"`.

        Beside the one of the settings, whose TLS counts here too. A place that cannot be had when the
        broker begins to serve is logged, and fails none of the others. Raises `ValueError` for what is
        no place, and `RuntimeError` while the broker serves.
        """
        if self._is_taken:
            raise RuntimeError("listen: say it before `serve`, which opens all places at its start")
        config_of(place, self.config)
        self._places.append(place)

    async def reload_files(
        self, config: Config | None = None, sources: Mapping[str, str] = NO_SOURCES
    ) -> None:
        """Read the TLS certificate and the keys of tokens again from their files, and go by another
        config as `reload` does, if there is one.

        Connections stay. The new certificate is for those who come, the new keys count from the next act
        on. Raises `ConfigError` for a file that cannot be used; cancelled, it leaves everything as it was.
        """
        if config is None:
            config, sources = self.config, self.config_sources
        if self._node is None:
            self.config, self.config_sources = config, sources
            return
        node, rules = self._node, self.config.tokens
        # Other rules that need a restart leave those that are in force, and their keys are new.
        renewed = renews(rules, config.tokens)
        rules = config.tokens if renewed else rules
        keys = await trio.to_thread.run_sync(load_keys, rules, abandon_on_cancel=True)
        if self.tls_context is not None:
            await read_certificate(self.config, self.tls_context)
        node.services.tokens.keys = keys
        self.config = node.reload(config, sources, keys if renewed else None).config

    def run(self) -> None:
        """Serve until SIGINT (Ctrl-C) or SIGTERM: the whole of a program. Trio is started for it.

        Signals count as for the command: the first drains, as `stop` does, and this returns; the
        second cuts what is left, and `SystemExit(1)` is raised; a third ends the process at once.
        Before it serves and after it has ended they are what they were before. In another
        thread than the main one, where Python has no signals, only `stop` ends it. Raises what
        `serve` raises.
        """
        if threading.current_thread() is not threading.main_thread():
            trio.run(self.serve)
            return
        signals.process.before_exit = logs.flush
        if not trio.run(partial(serve_until_signal, self)):
            sys.exit(signals.CUT_SHORT)

    async def serve(  # noqa: ASYNC128 - `_serve` calls `started`
        self,
        *,
        listeners: list[AnyListener] | None = None,
        api_listeners: list[AnyListener] | None = None,
        task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve until `stop` is called and every connection has ended.

        Reports the addresses once it listens. Listens as the config says, or on `listeners`, and for the API
        alone on `api_listeners`, which it then closes; and on the places of `listen`. Raises `ConfigError`
        when it cannot listen or read its keys. Cancelled, it cuts every
        connection at once: the peers see no Close. Nothing it started is left when it returns.
        `SystemExit` or `KeyboardInterrupt` of a hook stops the broker as `stop` does, and is raised
        from here once all has ended.
        """
        if self._is_taken:
            raise RuntimeError("this broker is serving already")
        self._is_taken = True
        logs.configure_if_unset(self.config.log_format, self.config.log_level)
        try:
            # Before anything is waited for: a `stop` that comes while we start counts.
            self._stop = trio.Event()
            self._ended_by = None
            own, *more = self.places
            if listeners is None:
                listeners, api_listeners = await self._open_listeners([own, *more])
            elif more and self.worker is None:  # a worker has been given those as well
                listeners = [*listeners, *await open_places(more, self.tls_context, others=True)]
            await self._serve(listeners, api_listeners or [], task_status)
        finally:
            self._is_taken = False
        if self._ended_by is not None:
            raise self._ended_by

    async def _open_listeners(
        self, places: list[Config]
    ) -> tuple[list[AnyListener], list[AnyListener]]:
        """Listen on all places, and for the API alone. Raises `ConfigError`, with nothing open."""
        self.tls_context = await read_certificate(self.config)
        api: list[AnyListener] = list(await open_api_sockets(self.config))
        try:
            return await open_places(places, self.tls_context), api
        except BaseException:
            for listener in api:
                await trio.aclose_forcefully(listener)
            raise

    async def _serve(
        self,
        listeners: list[AnyListener],
        api_listeners: list[AnyListener],
        task_status: trio.TaskStatus[list[str]],
    ) -> None:
        try:
            async with AsyncExitStack() as stack:
                node, backends = await self._open_node(stack)
                services = node.services
                upkeep = await stack.enter_async_context(trio.open_nursery())
                _start_upkeep(node, upkeep)
                async with trio.open_nursery() as sessions:
                    name_scope(sessions, "sessions")

                    def take(stream: trio.abc.Stream) -> None:
                        sessions.start_soon(serve_connection, services, stream, name=STREAM)

                    def take_backend(stream: trio.abc.Stream) -> None:
                        sessions.start_soon(
                            partial(serve_connection, services, stream, is_private=True)
                        )

                    doors = [(each, take) for each in listeners]
                    doors += [(each, take_backend) for each in api_listeners]
                    async with trio.open_nursery() as intake:
                        name_scope(intake, "intake")
                        for listener, door in doors:
                            places = services.admission
                            intake.start_soon(
                                accept_streams, listener, door, places.make_room, places.has_room
                            )
                        addresses = describe(listeners)
                        # First: a program that reads that it is ready may send a signal at once.
                        task_status.started(addresses)
                        _log_ready(node, addresses, describe(api_listeners), self)
                        await self._stop.wait()
                        await _give_notice(node)
                        drain_seconds = node.config.drain_seconds
                        services.begin_drain(drain_seconds)
                        backends.stop()
                        log.info("stopping", connections=node.figures.statistics().connections)
                        intake.cancel_scope.cancel()
                    due = trio.current_time() + drain_seconds
                    await node.shut_down()
                    for _ in range(_TICKS_TO_TELL):
                        await trio.lowlevel.checkpoint()
                    sessions.cancel_scope.deadline = due
                if sessions.cancel_scope.cancelled_caught:
                    log.warning("cut", reason=f"still open after {drain_seconds:g} s")
                upkeep.cancel_scope.cancel()
        finally:
            if self._node is not None:
                self._node.end_readers()
                self._next_fd = self._node.next_fd
            self._node = None
            for listener in (*listeners, *api_listeners):
                with suppress(OSError), trio.CancelScope(shield=True, deadline=trio.current_time()):
                    await listener.aclose()
        log.info("stopped")

    @property
    def places(self) -> list[Config]:
        """The settings, once for each place to listen on: their own first."""
        return [self.config, *(config_of(place, self.config) for place in self._places)]

    async def _open_node(self, stack: AsyncExitStack) -> tuple[Node, BackendServer]:
        """Open everything that outlives the sessions, the outermost first."""
        config, opened = self.config, stack.enter_async_context
        settings, name = Settings(config, self.config_sources), node_name(config)

        def now() -> float:
            return self.wall_clock()  # looked up each time: a test may move the clock

        spans = await opened(open_spans(config))
        sender = await opened(open_sender(config.webhooks, now))
        await opened(open_questions(settings, self.hooks, now))
        tokens = await opened(open_tokens(config, now))
        first_fd = int(now() * 1_000_000) if config.first_fd == "clock" else config.first_fd
        # A broker that serves again goes on counting, as does an engine that was there before.
        next_fd = max(first_fd, self._next_fd)
        engine = await opened(self.open_engine(config, now, next_fd, self.run_blocking))
        office = await opened(open_post_office())
        readers = [] if self.hooks.event is None else [hook_reader(self.hooks.event)]
        readers += [] if sender is None else [sender]
        events = await opened(open_events(name, readers, config.webhooks, now))
        rights = Rights(settings, self.hooks, tokens.enabled)
        hub: Hub[Peer] = Hub(engine.next_fd)
        router = Router(hub, engine, office, rights, events)
        router.spans = spans
        router.turns.collect = self.collect
        services = Services(
            settings,
            self.hooks,
            router,
            tokens,
            loopback_bind=all(map(is_local, self.places)),
            name=name,
        )
        node = Node(services, now)
        node.views.add(VIEW, view_of(AskedStats, partial(stats_of, node)))
        await opened(engine.running(router.returns))
        if services.neighbourhood is not None:
            await _begin_neighbourhood(services.neighbourhood)
        hold = partial(hold_request, services)
        pages = HttpServer(http_app(node), hold=hold, is_logged=lambda: node.config.access_log)
        backends = BackendServer(node, pages)
        services.serve_http = Fallbacks(backends.serve).serve
        self._node = node
        return node, backends


async def _begin_neighbourhood(neighbourhood: Neighbourhood) -> None:
    try:
        await neighbourhood.begin()
    except Refused as refusal:
        text = f"engine: this node gets no place among the others: {refusal.message}"
        raise ConfigError(text) from None


@attrs.frozen
class _WhenServing(trio.TaskStatus[Any]):
    """A task status that calls `begin` in the very step in which the broker says it serves."""

    begin: Callable[[list[str]], None]

    def started(self, value: object = None) -> None:
        self.begin(value if isinstance(value, list) else [])


def _nothing(*_: object) -> None: ...


async def serve_until_signal(
    broker: Broker,
    reload: Callable[[], None] = _nothing,
    *,
    listeners: list[AnyListener] | None = None,
    api_listeners: list[AnyListener] | None = None,
    on_serving: Callable[[list[str]], None] = _nothing,
    on_stop: Callable[[], None] = _nothing,
) -> bool:
    """Serve until a signal; True if everybody was told, False if a second one cut it short.

    Main thread only. From the moment in which the broker serves until it has ended signals are
    `signals.process`'s, which may have been installed before. `reload` is called for SIGHUP, `on_stop`
    for the first that ends it, and `on_serving` with the addresses in the step in which it serves.
    """
    cut = trio.CancelScope()
    token = trio.lowlevel.current_trio_token()

    def obey(order: signals.Order) -> None:
        if order == "drain":
            on_stop()
            broker.stop()
        elif order == "cut":
            cut.cancel()
        else:
            reload()

    def report(place: str) -> None:
        log.critical("stuck", at=place, detail="the event loop is busy there; ended at once")

    # A broker of the app's own may know of no listeners but those of its settings.
    given: dict[str, Any] = {} if listeners is None else {"listeners": listeners}
    if api_listeners:
        given["api_listeners"] = api_listeners
    with ExitStack() as installed:

        def begin(addresses: list[str]) -> None:
            installed.enter_context(signals.process.installed())
            installed.callback(signals.process.take_back)
            signals.process.begin_serving()
            signals.process.hand_over(lambda order: token.run_sync_soon(obey, order), report)
            on_serving(addresses)

        with cut:
            await broker.serve(task_status=_WhenServing(begin), **given)
    return not cut.cancelled_caught


def _start_upkeep(node: Node, upkeep: trio.Nursery) -> None:
    """Start the tasks that run beside the sessions, for as long as there may be any."""
    name_scope(upkeep, "upkeep")
    services, samples = node.services, Samples(node)
    services.admin = admin_methods(node, samples)
    upkeep.start_soon(_beat, node)
    upkeep.start_soon(keep_memory, services, name="memory")
    upkeep.start_soon(samples.keep, name="admin")
    if services.neighbourhood is not None:
        upkeep.start_soon(services.neighbourhood.run, name="neighbours")


def _log_ready(node: Node, addresses: list[str], api: list[str], broker: Broker) -> None:
    config, worker = node.config, broker.worker
    more: dict[str, Any] = {} if config.demo_page else {"demo_page": False}
    if api:
        more["api"] = [each.replace("ws:", "http:", 1) for each in api]
    log.info("ready" if worker is None else "worker_ready", addresses=addresses, **more)
    if worker is not None and worker != 1:
        return  # what follows is the same for all
    log.info("memory", **memory_fields(node.services))
    too_much = memory_warning(node.services)
    if too_much is not None:
        log.warning("too_little_memory", detail=too_much)
    too_many = node.services.admission.warning()
    if too_many is not None:
        log.warning("too_few_files", detail=too_many)
    for exposed in filter(None, map(exposure_warning, broker.places)):
        log.warning("exposed", detail=exposed)
    for doubt in doubts_about(config, node.services.settings.sources):
        log.warning("doubtful_setting", detail=doubt)


async def _give_notice(node: Node) -> None:
    """Let balancers notice that this broker is about to stop, and serve meanwhile."""
    node.services.leaving = True
    seconds = node.config.drain_notice_seconds
    if seconds:
        log.info("leaving", seconds=seconds, detail="/readyz answers 503; all else is as before")
        await trio.sleep(seconds)


async def _beat(node: Node) -> None:
    try:
        while True:
            due = trio.current_time() + _BEAT
            await trio.sleep_until(due)
            # As late as everybody else is served whose socket is ready.
            node.figures.loop_lag.observe(max(0.0, trio.current_time() - due))
            node.services.router.turns.sweep()
            await node.beat()
    finally:
        # Cancelled: the sessions have ended, or everything is being cut with us.
        node.services.cut()
        node.note_fds()
