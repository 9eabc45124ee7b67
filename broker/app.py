"""The broker as an app has it: hooks, what may be done to connections and topics, and `serve`.

`serve` is the nursery tree. From the outside in: the engine, the post office, upkeep, the sessions,
the intake; what others need in order to finish is opened further out (docs/design/lifetimes.md).
"""

import resource
import time
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial

import attrs
import structlog
import trio

from broker.access.jwks import open_tokens
from broker.access.keys import warning as token_warning
from broker.config.reload import merge
from broker.config.settings import Config, exposure_warning, is_loopback
from broker.core.event_queue import EventKind, EventStatistics
from broker.core.history import HistoryStatistics
from broker.core.hub import Hub, HubStatistics
from broker.core.messages import (
    ClientInfo,
    ConnectionInfo,
    Delivery,
    Fd,
    Position,
    Publication,
    PushResult,
)
from broker.core.session import Subscription
from broker.engines.memory import open_engine
from broker.errors import CloseCode, Lagged, Refused, UnsubscribeCode, check_close_code
from broker.events.dispatcher import open_events
from broker.hooks import (
    Hooks,
    OnClose,
    OnConnect,
    OnEvent,
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
from broker.logs import configure_if_unset, reconfigure
from broker.protocols.json_text import to_json
from broker.protocols.plain import PLAIN
from broker.routing.router import IN_PROCESS, Router
from broker.session.accept import serve_connection
from broker.session.connection import Connection
from broker.session.services import Services
from broker.transport import frames
from broker.transport.listeners import AnyListener, describe, open_listeners
from broker.transport.outbox import Offer, Run
from broker.transport.postman import PostStatistics, open_post_office
from broker.webhooks.proxy import open_questions
from broker.webhooks.sender import open_backend

log = structlog.get_logger("broker")

_BEAT = 1.0
"""How often heartbeats are looked at, in seconds: pings and cuts are late by that much at most."""

_SPARE_FILES = 64
"""Open files kept for listeners, logs and the app: no connection is accepted into these."""

_OFFERS = {
    Offer.TAKEN: PushResult.QUEUED,
    Offer.FULL: PushResult.FULL,
    Offer.SEALED: PushResult.CLOSED,
}


@attrs.frozen
class BrokerStatistics:
    """A snapshot. `published` and `refused` count since `serve` began."""

    connections: int
    users: int
    published: int
    refused: int
    hub: HubStatistics
    history: HistoryStatistics
    post: PostStatistics
    events: Mapping[str, EventStatistics]
    """By reader, `on_event` and `webhooks`; empty where nobody reads them."""


class Messages:
    """What an in-process subscriber reads: `async for publication in messages`."""

    codec = IN_PROCESS
    sealed = False

    def __init__(self, capacity: int) -> None:
        self.subscriptions: dict[str, Subscription] = {}
        self.outbox = self
        # With each publication, how many were dropped right before it.
        self._send, self._receive = trio.open_memory_channel[tuple[int, Publication]](capacity)
        self._missed = 0
        self._next: Publication | None = None

    def take(self, publications: Sequence[Publication]) -> int:
        """Called by the router; returns how many fitted. What does not is counted, and said where
        it is missing."""
        taken = 0
        for publication in publications:
            try:
                self._send.send_nowait((self._missed, publication))
                self._missed = 0
                taken += 1
            except trio.WouldBlock:
                self._missed += 1
            except trio.ClosedResourceError:  # the broker stopped, and this reader is still here
                break
        return taken

    @property
    def bytes(self) -> int:
        """Publications that wait; a reader in this program is not weighed in bytes."""
        return self._receive.statistics().current_buffer_used

    @property
    def keeps_up(self) -> bool:
        """Whether there is room."""
        return self.bytes < self._receive.statistics().max_buffer_size

    def end(self) -> None:
        """No more will come; what is there can still be read."""
        self._send.close()
        self.sealed = True

    def __aiter__(self) -> "Messages":
        return self

    async def __anext__(self) -> Publication:
        try:
            return await self.receive()
        except trio.EndOfChannel:
            raise StopAsyncIteration from None

    async def receive(self) -> Publication:
        """The next publication.

        Raises `Lagged` in place of publications that were dropped because this reader was too slow,
        and `trio.EndOfChannel` after the last one when the broker has stopped. Cancelled, it loses
        nothing.
        """
        if self._next is not None or self._missed:
            await trio.lowlevel.checkpoint()
            if self._next is not None:
                publication, self._next = self._next, None
                return publication
            if self._missed and not self._receive.statistics().current_buffer_used:
                missed, self._missed = self._missed, 0
                raise Lagged(missed)
        missed, publication = await self._receive.receive()
        if missed:
            self._next = publication
            raise Lagged(missed)
        return publication


class Broker:
    """A message broker over WebSocket; `await nursery.start(broker.serve)` runs it.

    Unless it says otherwise a method never waits: it is one atomic step, of which the network
    learns later. `data` is any value that JSON can say, or `msgspec.Raw` for ready JSON.
    """

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or Config()
        """May be replaced until `serve` is called; then `reload` does it."""
        self.wall_clock: Callable[[], float] = time.time
        """Unix seconds, by which tokens expire; `open_test_broker` puts virtual time here."""
        self.hooks = Hooks()
        self._hub = Hub()
        self._node: Services | None = None
        self._is_taken = False
        self._stop = trio.Event()
        self._in_process: set[Messages] = set()

    # hooks

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

    def on_rpc(self, hook: OnRpc) -> OnRpc:
        """`(connection, method, data)`: a client calls. Returns the answer, any value that JSON can
        say; to a client over protobuf also `bytes`."""
        self.hooks.set("rpc", hook)
        return hook

    def on_request(self, hook: OnRequest) -> OnRequest:
        """`(request)`: plain HTTP; returns a Starlette response, or None for what we have there
        ourselves, such as the page at `/`. Only `/healthz` does not come here."""
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

    def push(self, fd: Fd, data: object) -> PushResult:
        """Send to one connection.

        A plain peer gets `str` as a text frame, `bytes` as a binary frame, anything else as JSON
        text; a Centrifuge client gets a `message` push. Until its first message every peer counts
        as plain: a client cannot read what it is sent before it has connected. Raises `TypeError`
        for what JSON cannot say, and `ValueError` for text that is not Unicode (a lone surrogate).
        """
        connection = self._find(fd)
        if connection is None:
            return PushResult.CLOSED
        codec = connection.codec
        if codec is not None:
            if not (isinstance(data, bytes) and codec.opaque_payloads):
                data = to_json(data)
            frame = codec.message(data)
        elif isinstance(data, str):
            frame = frames.text_frame(data.encode())
        elif isinstance(data, bytes):
            frame = frames.encode(frames.BINARY, data)
        else:
            frame = PLAIN.message(to_json(data))
        self._serving.router.flush()
        return _OFFERS[connection.outbox.offer(Run((frame,)))]

    def publish(
        self,
        topic: str,
        data: object,
        *,
        exclude: Collection[Fd] = (),
        tags: Mapping[str, str] | None = None,
        skip_history: bool = False,
        retain: bool = False,
        key: str = "",
    ) -> Delivery:
        """Publish to a topic, to one connection by `fd:N`, or to all those of a user by `user:NAME`.

        `bytes` go out as they are to clients over protobuf, as a binary frame to plain peers, and
        in base64 to those who read JSON, unless they are JSON. The fds of `exclude` get nothing;
        subscribers may pick by `tags`, and see them; with `skip_history` it is not kept; with
        `retain` whoever subscribes later gets it at once. A second publish to the topic with the
        same `key` within five minutes publishes nothing and returns what the first did. Raises
        `Refused` for what is no topic and for an fd or a user that is not here, `TypeError` for
        what JSON cannot say.
        """
        raw = data if isinstance(data, bytes) else to_json(data)
        return self._serving.methods.publish(
            topic,
            raw,
            exclude=exclude,
            tags=tags,
            opaque=raw is data,
            skip_history=skip_history,
            retain=retain,
            key=key,
        )

    async def request(self, to: str, data: object) -> object:
        """Ask a client, by `fd:N`, or one member of a queue group, by a topic; return its answer.

        Waits until the answer comes; set a deadline around it. Raises `Refused`: what the client
        refused with, or 503 when nobody is there to ask or the one who was asked goes away; and
        `ValueError` for an answer that is nested too deeply for Python.
        Cancelled, it no longer waits for the answer, which the client may still give.
        """
        requests = self._serving.methods.requests
        came = trio.Event()
        answers: list[bytes | Refused] = []

        def answer(result: bytes | Refused) -> None:
            answers.append(result)
            came.set()

        number = requests.ask(to, to_json(data), None, answer)
        try:
            await came.wait()
        finally:
            requests.forget(number)
        (result,) = answers
        if isinstance(result, Refused):
            raise result
        return Publication(to, result).value

    @asynccontextmanager
    async def subscribe(
        self, pattern: str, *, capacity: int = 1000, group: str = ""
    ) -> AsyncGenerator[Messages]:
        """Read a topic or pattern in this very program, for as long as the block.

        Publications wait in a memory channel of `capacity`. A reader that is slower than that loses
        some and is told so by `Lagged`; nobody waits for it. With a `group`, each publication goes
        to one of its members, wherever they are. Raises `Refused` for what is neither a
        topic nor a pattern, and for `fd:N` and `user:NAME`, which only these get.
        """
        router = self._serving.router
        router.check_listenable(pattern)
        messages = Messages(capacity)
        subscription = Subscription(messages, pattern, group=group)
        router.subscribe(subscription)
        router.give_retained(subscription)
        self._in_process.add(messages)
        try:
            yield messages
        finally:
            self._in_process.discard(messages)
            router.unsubscribe(messages, pattern)
            messages.end()

    # topics

    def presence(self, topic: str) -> dict[str, ClientInfo]:
        """The clients that are subscribed to `topic` itself, by client id. Linear in them."""
        return self._hub.presence(topic)

    def history(
        self, topic: str, *, since: Position | None = None, limit: int = -1, reverse: bool = False
    ) -> tuple[list[Publication], Position]:
        """What a topic keeps, and its position now.

        Those after `since`, oldest first, or with `reverse` those before it, newest first; at most
        `limit`, unless that is negative. Raises `UnrecoverablePosition` when `since` is of another
        epoch.
        """
        return self._serving.router.engine.history(topic, since, limit, reverse)

    def remove_history(self, topic: str) -> None:
        """Forget what a topic keeps; its position stays, so who was away learns of the loss."""
        self._serving.router.engine.remove(topic)

    def topics(self) -> dict[str, int]:
        """The topics and patterns that are subscribed to, with how many subscriptions each has."""
        return self._hub.topics()

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
        what others see of it on this topic. False if it is subscribed already, or not there. Raises
        `Refused` for one subscription too many and for what is neither topic nor pattern.
        """
        connection = self._find(fd)
        return connection is not None and connection.add_subscription(
            topic, info=info, data=data, join_leave=join_leave
        )

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
        connection = self._find(fd)
        return connection is not None and connection.end_subscription(topic, code, reason)

    # connections

    def disconnect(
        self, fd: Fd, code: int = CloseCode.FORCE_DISCONNECT, reason: str = "force disconnect"
    ) -> bool:
        """Close a connection once it has got what is queued for it; false if it is not there.

        Official clients stay away after codes 3500-3999 and 4500-4999, and come back after others.
        Raises `ValueError` for a code that no Close frame may carry.
        """
        check_close_code(code)
        connection = self._find(fd)
        return connection is not None and connection.close(code, reason)

    def expire(self, fd: Fd, when: float | None = None) -> bool:
        """Let a client's connection end at `when`, in Unix seconds, in place of what its token
        says; None for never. False if there is no such Centrifuge client.

        It ends with 3005, `tokens.grace_seconds` later as with a token; at once if `when` is past.
        The client is not told: one that has a token still refreshes when that token's time comes.
        """
        connection = self._find(fd)
        return connection is not None and connection.expire(when)

    def exists(self, fd: Fd) -> bool:
        """Whether this fd is a connection here, also one that is closing."""
        return self._hub.sessions.get(fd) is not None

    def is_established(self, fd: Fd) -> bool:
        """Whether this fd can be sent something: its handshake is done, and it is not closing."""
        return self._find(fd) is not None

    def connections(self, after: Fd = 0, limit: int = 100) -> list[ConnectionInfo]:
        """Up to `limit` connections in order of their fd, from the first beyond `after` on."""
        page = self._hub.sessions.page(after, limit)
        return [info for s in page if (info := self.connection_info(s.fd)) is not None]

    def connection_info(self, fd: Fd) -> ConnectionInfo | None:
        """What is known of a connection; None if it is not here."""
        connection = self._node and self._node.connections.get(fd)
        return connection.info() if connection else None

    def bind(self, fd: Fd, user: str) -> None:
        """Say who a connection belongs to; empty for nobody. Raises `KeyError` if it is not here.

        A Centrifuge client is told of its new personal topic, `user:NAME`, as of any subscription
        that the server makes.
        """
        node, before = self._node, self._hub.sessions.user_of(fd)
        if node is not None:
            node.router.flush()
        self._hub.sessions.bind(fd, user)
        connection = self._find(fd)
        if connection is not None and user != before:
            connection.tell_user(before, user)
        if user != before and node is not None and fd in node.connections:
            node.tell(EventKind.BOUND, fd, user)

    def fds_of(self, user: str) -> list[Fd]:
        """All connections of a user."""
        return list(self._hub.sessions.fds_of(user))

    def stats(self) -> BrokerStatistics:
        """A snapshot of what is here and what has been done."""
        node = self._serving
        router = node.router
        return BrokerStatistics(
            connections=len(self._hub.sessions),
            users=self._hub.sessions.statistics().users,
            published=router.published,
            refused=node.refused,
            hub=self._hub.statistics(),
            history=router.engine.statistics(),
            post=router.office.statistics(),
            events={} if router.events is None else router.events.statistics(),
        )

    @property
    def draining(self) -> bool:
        """Whether the broker was asked to stop."""
        return self._stop.is_set()

    def _find(self, fd: Fd) -> Connection | None:
        connection = self._node and self._node.connections.get(fd)
        return connection if connection and connection.is_established else None

    @property
    def _serving(self) -> Services:
        if self._node is None:
            raise RuntimeError("the broker is not serving: await nursery.start(broker.serve) first")
        return self._node

    # life

    def stop(self) -> None:
        """Ask `serve` to end: no more connections; those there are get what is queued for them, and
        a Close with 1001 or 3001; after `drain_seconds` the rest is cut."""
        self._stop.set()

    def reload(self, config: Config) -> None:
        """Go by another config from now on, with everybody still connected.

        Rules and limits count from a client's next request on; who is subscribed already stays so.
        Where the broker listens and how much history it keeps cannot change while it serves: that
        stays as it is, and one warning names it.
        """
        change = merge(self.config, config)
        if self._node is None:
            self.config = config
            return
        self.config = config = change.config
        if {"log_format", "log_level"} & set(change.made):
            reconfigure(config.log_format, config.log_level)
        self._node.max_connections = _connection_limit(config)
        self._node.reload(config)
        if change.refused:
            log.warning(
                "not_reloaded",
                settings=list(change.refused),
                detail="these need a restart; the broker goes on with the old ones",
            )
        log.info("reloaded", settings=list(change.made))

    async def serve(  # noqa: ASYNC128 - `_serve` calls `started`
        self,
        *,
        listeners: list[AnyListener] | None = None,
        task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve until `stop` is called and every connection has ended.

        Reports the addresses once it listens. Listens as the config says, or on `listeners`, which
        it then closes. Raises `ConfigError` when it cannot listen or read its keys. Cancelled, it cuts every
        connection at once: the peers see no Close. Nothing it started is left when it returns.
        """
        if self._is_taken:
            raise RuntimeError("this broker is serving already")
        self._is_taken = True
        configure_if_unset(self.config.log_format, self.config.log_level)
        try:
            # Before anything is waited for: a `stop` that comes while we start counts.
            self._stop = trio.Event()
            if listeners is None:
                listeners = await open_listeners(self.config)
            await self._serve(listeners, task_status)
        finally:
            self._is_taken = False

    async def _serve(
        self, listeners: list[AnyListener], task_status: trio.TaskStatus[list[str]]
    ) -> None:
        config = self.config
        backends = BackendServer(self, HttpServer(http_app(self)))

        def now() -> float:
            return self.wall_clock()  # looked up each time: a test may move the clock

        try:
            async with (
                open_backend(config.webhooks, now) as backend,
                open_questions(config, self.hooks, now),
                open_tokens(config, now) as tokens,
                open_engine(config.history_bytes) as engine,
                open_post_office() as office,
                open_events(config, self.hooks.event, backend, now) as events,
                trio.open_nursery() as upkeep,
            ):
                router = Router(self._hub, engine, office, config, events)
                self._node = node = Services(
                    config,
                    self.hooks,
                    router,
                    Fallbacks(backends.serve).serve,
                    loopback_bind=config.unix is not None or is_loopback(config.host),
                    tokens=tokens,
                    max_connections=_connection_limit(config),
                )
                upkeep.start_soon(_beat, node)
                async with trio.open_nursery() as sessions:
                    async with trio.open_nursery() as intake:
                        await intake.start(
                            partial(
                                trio.serve_listeners,
                                partial(serve_connection, node),
                                listeners,
                                handler_nursery=sessions,
                            )
                        )
                        addresses = describe(listeners)
                        log.info("ready", addresses=addresses)
                        exposed = exposure_warning(config)
                        if exposed is not None:
                            log.warning("exposed", detail=exposed)
                        weak = token_warning(config.tokens)
                        if weak is not None:
                            log.warning("weak_secret", detail=weak)
                        task_status.started(addresses)
                        await self._stop.wait()
                        node.draining = True
                        backends.stop()
                        log.info("stopping", connections=len(self._hub.sessions))
                        intake.cancel_scope.cancel()
                    sessions.cancel_scope.deadline = trio.current_time() + config.drain_seconds
                    for connection in list(node.connections.values()):
                        connection.shut_down()
                if sessions.cancel_scope.cancelled_caught:
                    log.warning("cut", reason=f"still open after {config.drain_seconds:g} s")
                upkeep.cancel_scope.cancel()
        finally:
            self._node = None
            for messages in self._in_process:
                messages.end()
            for listener in listeners:
                with suppress(OSError), trio.CancelScope(shield=True, deadline=trio.current_time()):
                    await listener.aclose()
        log.info("stopped")


def _connection_limit(config: Config) -> int:
    if config.max_connections is not None:
        return config.max_connections
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    # What is open by now (listeners, logs, the event loop) is within the reserve.
    return max(1, files - min(_SPARE_FILES, files // 2))


async def _beat(node: Services) -> None:
    while True:
        await trio.sleep(_BEAT)
        now = trio.current_time()
        node.methods.requests.expire(now)
        for connection in list(node.connections.values()):
            connection.beat(now)
