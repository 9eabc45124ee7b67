"""The things that may be done to connections and topics of one broker while it serves.

`Broker`, the HTTP API and everything else that is no client goes through here. Unless it says
otherwise a method never waits: it is one atomic step, of which the network learns later.
"""

import socket
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import attrs
import structlog
import trio

from broker.access.keys import Key
from broker.config.reload import NO_SOURCES, Change
from broker.config.settings import Config
from broker.core.event_queue import EventKind
from broker.core.memory import Part
from broker.core.messages import (
    ClientInfo,
    ClosedConnection,
    ConnectionDetails,
    ConnectionInfo,
    Delivery,
    Fd,
    Position,
    Publication,
    PushResult,
)
from broker.core.session import Decider, Grant, ServerSub, Subscription
from broker.core.work import SLICE
from broker.errors import Refused, check_close_code
from broker.hooks import Hooks
from broker.logs import reconfigure
from broker.routing.publishing import PublishOptions
from broker.routing.reader import Reader
from broker.routing.retained import give_retained
from broker.routing.router import Router
from broker.routing.turns import Share
from broker.session.details import details_of
from broker.session.everywhere import Everywhere
from broker.session.expiry import expire
from broker.session.figures import Figures
from broker.session.inspection import Inspection
from broker.session.orders import message_of
from broker.session.search import ConnectionQuery, search
from broker.session.services import ServedConnection, Services
from broker.session.tracing import Traces
from broker.session.views import Views

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("broker")


GOODBYES_AT_ONCE: Final = 0.1
"""Seconds of goodbyes that are not spread: a hundred clients that come back together are no storm."""

GOODBYE_STEP: Final = 0.01
"""Seconds between two lots of goodbyes: ten at a time, of a thousand a second."""

BEATEN_AT_ONCE: Final = 100
"""Connections that are pinged, or ended, in one step: up to a millisecond."""


def node_name(config: Config) -> str:
    """This broker's name: that of the settings, else host and port."""
    return config.name or f"{socket.gethostname()}:{config.unix or config.port}"


@attrs.define(eq=False)
class Publishing:
    """A publication on its way, until the engine has kept it."""

    result: Delivery | Refused | None = attrs.field(init=False, default=None)
    """The outcome; None until it is known."""
    _ended: trio.Event = attrs.field(init=False, factory=trio.Event)

    def end(self, result: Delivery | Refused) -> None:
        self.result = result
        self._ended.set()

    async def wait(self) -> Delivery:
        """Wait for the outcome. Raises `Refused` if it is not kept. Cancelled, it is published all the same,
        unless it is refused."""
        await self._ended.wait()
        assert self.result is not None
        if isinstance(self.result, Refused):
            raise self.result
        return self.result


@attrs.define(eq=False)
class Node:
    """One broker while it serves; see the module."""

    services: Services
    now: Callable[[], float] = time.time
    """Unix seconds."""
    figures: Figures = attrs.field(init=False)
    everywhere: Everywhere = attrs.field(init=False)
    """The connections and topics of all nodes."""
    inspection: Inspection = attrs.field(init=False)
    """Traces and ended connections of all nodes."""
    views: Views = attrs.field(init=False)
    """Views of all nodes."""
    traces: Traces = attrs.field(init=False)
    worker: int = attrs.field(init=False, default=0)
    """The number of this process among the workers of `--workers`; 0 for one alone."""
    others: Mapping[int, Path] = attrs.field(init=False, factory=dict)
    """The sockets where the other workers tell their metrics."""
    _readers: set[Reader] = attrs.field(init=False, factory=set)

    def __attrs_post_init__(self) -> None:
        services = self.services
        self.figures = Figures(services)
        self.everywhere = Everywhere(
            self, self.figures, services.router.hub, services.neighbourhood
        )
        self.traces = Traces(services, self.now)
        self.inspection = Inspection(services, self.traces)
        self.views = Views(services.neighbourhood, services.name)
        self.services.memory.count(
            Part.READERS,
            lambda: sum([reader.bytes_held for reader in self._readers]) + self.traces.bytes_held,
        )

    @property
    def config(self) -> Config:
        return self.services.config

    @property
    def hooks(self) -> Hooks:
        return self.services.hooks

    @property
    def name(self) -> str:
        return self.services.name

    @property
    def draining(self) -> bool:
        """Whether the broker was asked to stop."""
        return self.services.draining

    @property
    def router(self) -> Router:
        """The router: it knows who listens, what is kept, and what all of that costs."""
        return self.services.router

    def new_share(self) -> Share:
        """The share of the loop of one more party."""
        return Share(turns=self.router.turns)

    # messages

    def push(self, fd: Fd, data: object) -> PushResult:
        connection = self._find(fd)
        return (
            self.everywhere.push(fd, data) if connection is None else connection.orders.push(data)
        )

    async def send(self, fd: Fd, data: object) -> PushResult:
        message = message_of(data)
        connection = self._find(fd)
        if connection is None:
            await trio.lowlevel.checkpoint()
            return PushResult.CLOSED
        return await connection.flow.send(message)

    def ping(self, fd: Fd, data: bytes) -> bool:
        connection = self._find(fd)
        return connection is not None and connection.flow.ping(data)

    def pause(self, fd: Fd) -> bool:
        connection = self._find(fd)
        return connection is not None and connection.flow.pause()

    def resume(self, fd: Fd) -> bool:
        connection = self._find(fd)
        return connection is not None and connection.flow.resume()

    def declare_plain(self, fd: Fd) -> bool:
        connection = self._find(fd)
        return connection is not None and connection.orders.vouch()

    def publish_nowait(self, topic: str, data: bytes, options: PublishOptions) -> None:
        if self.services.router.engine.is_full():
            raise trio.WouldBlock
        self.services.publisher.publish(topic, data, None, options)

    def publish_soon(self, topic: str, data: bytes, options: PublishOptions) -> "Publishing":
        """Begin to publish, in one atomic step; wait for the end of it by what is returned."""
        publishing = Publishing()
        publisher = self.services.publisher
        delivery = publisher.publish(topic, data, None, options, publishing.end)
        if delivery is not None:
            publishing.end(delivery)
        return publishing

    async def wait_room(self) -> None:
        """Wait while the engine has as much on its way as may be. No checkpoint where it has not."""
        engine = self.services.router.engine
        while engine.is_full():
            await engine.wait_room()

    async def publish(self, topic: str, data: bytes, options: PublishOptions) -> Delivery:
        await trio.lowlevel.checkpoint_if_cancelled()
        await self.wait_room()
        return await self.publish_soon(topic, data, options).wait()

    async def request(self, to: str, data: bytes) -> object:
        requests = self.services.requests
        came = trio.Event()
        answers: list[bytes | Refused] = []

        def answer(result: bytes | Refused) -> None:
            answers.append(result)
            came.set()

        number = requests.ask(to, data, None, answer)
        try:
            await came.wait()
        finally:
            requests.forget(number)
        (result,) = answers
        if isinstance(result, Refused):
            raise result
        return Publication(to, result).value

    @asynccontextmanager
    async def subscribe(self, pattern: str, *, capacity: int, group: str) -> AsyncGenerator[Reader]:
        router = self.services.router
        router.rights.check_listenable(pattern)
        reader = Reader(capacity, self.config.connection_most)
        grant = Grant(pattern, Decider.PROGRAM)
        subscription = Subscription(reader, pattern, grant, group=group)
        router.subscribe(subscription)
        give_retained(router, subscription)
        self._readers.add(reader)
        try:
            yield reader
        finally:
            self._readers.discard(reader)
            router.unsubscribe(reader, pattern)
            reader.end()

    # topics

    async def presence(self, topic: str) -> dict[str, ClientInfo]:
        return dict(await self.everywhere.presence(topic))

    async def history(
        self, topic: str, since: Position | None, limit: int, reverse: bool
    ) -> tuple[list[Publication], Position]:
        engine = self.services.router.engine
        if not engine.knows(topic, since):
            await engine.fetch((topic,), {topic: since})
        return engine.history(topic, since, limit, reverse)

    async def remove_history(self, topic: str) -> None:
        await self.services.router.engine.remove(topic)

    def topics(self) -> dict[str, int]:
        return self.services.router.hub.topics()

    def add_subscription(self, fd: Fd, topic: str, sub: ServerSub) -> bool:
        connection = self._find(fd)
        return connection is not None and connection.orders.add_subscription(topic, sub)

    def end_subscription(self, fd: Fd, topic: str, code: int, reason: str) -> bool:
        connection = self._find(fd)
        return connection is not None and connection.orders.end_subscription(topic, code, reason)

    # connections

    def disconnect(self, fd: Fd, code: int, reason: str) -> bool:
        check_close_code(code)
        connection = self._find(fd)
        return connection is not None and connection.close(code, reason)

    def expire(self, fd: Fd, when: float | None) -> bool:
        connection = self._find(fd)
        return connection is not None and expire(connection, self.services.tokens, when)

    def exists(self, fd: Fd) -> bool:
        return fd in self.services.connections

    def is_established(self, fd: Fd) -> bool:
        return self._find(fd) is not None

    @property
    def next_fd(self) -> Fd:
        """The fd of the next connection."""
        return self.services.router.hub.sessions.next_fd

    def connections(self, after: Fd, limit: int) -> list[ConnectionInfo]:
        page = self.services.router.hub.sessions.page(after, limit)
        return [info for peer in page if (info := self.connection_info(peer.fd)) is not None]

    def connection_info(self, fd: Fd) -> ConnectionInfo | None:
        connection = self.services.connections.get(fd)
        if connection is None:
            return None
        info = connection.info()
        is_one_of_several = self.services.neighbourhood is not None
        return attrs.evolve(info, node=self.name) if is_one_of_several else info

    def connection_details(self, fd: Fd) -> ConnectionDetails | None:
        connection = self.services.connections.get(fd)
        if connection is None:
            return None
        details = details_of(self.services, connection)
        is_one_of_several = self.services.neighbourhood is not None
        return attrs.evolve(details, node=self.name) if is_one_of_several else details

    def search(self, query: ConnectionQuery) -> Iterator[Sequence[Fd]]:
        """The fds of all connections that a query asks for, in growing order, piece by piece: others may
        run between two of them. Each piece costs `SURVEYED_AT_ONCE` looks at most; it may be empty."""
        return search(self.services, query)

    def closed_connections(self) -> Iterator[ClosedConnection]:
        """The connections that ended last, up to 1,000 of them, the last first."""
        return iter(self.services.closed)

    def closed_connection(self, fd: Fd) -> ClosedConnection | None:
        """The one of these that had this fd."""
        return self.services.closed.find(fd)

    def bind(self, fd: Fd, user: str) -> None:
        peer = self.services.router.hub.sessions.get(fd)
        if peer is None:
            raise KeyError(fd)
        connection = self._find(fd)
        if connection is not None and connection.is_apps and user != peer.user:
            connection.orders.bind(user)
            self.services.emit(EventKind.BOUND, fd, user)

    def fds_of(self, user: str) -> list[Fd]:
        return list(self.services.router.hub.sessions.fds_of(user))

    def _find(self, fd: Fd) -> ServedConnection | None:
        connection = self.services.connections.get(fd)
        return connection if connection is not None and connection.peer.is_established else None

    # life

    def reload(
        self,
        config: Config,
        sources: Mapping[str, str] = NO_SOURCES,
        keys: Sequence[Key] | None = None,
    ) -> Change:
        """Go by another config, with the `sources` of its values; atomic. Settings that need a restart
        stay, and are named in the log.

        `keys` are those by its rules of tokens, read anew. Without them these rules stay, too.
        """
        if (config.log_format, config.log_level) != (self.config.log_format, self.config.log_level):
            reconfigure(config.log_format, config.log_level)  # before others bind their loggers
        change = self.services.settings.replace(config, sources, with_tokens=keys is not None)
        if keys is not None:
            self.services.tokens.rules, self.services.tokens.keys = config.tokens, keys
        for session in self.services.router.hub.sessions:
            session.look_at = 0.0  # by what holds now
        if change.refused:
            log.warning(
                "not_reloaded",
                settings=list(change.refused),
                detail="these need a restart; the broker goes on with the old ones",
            )
        log.info("reloaded", settings=list(change.made))
        return change

    async def beat(self) -> None:
        """Look at everything that time ends: requests, expiry, silent peers.

        Linear in connections, 0.05 µs for each of which nothing is due; of the others a few at once, a slice of
        work at most, and everybody else runs in between. Cancelled, it stops there.
        """
        now = trio.current_time()
        while self.services.requests.expire(now, SLICE):  # noqa: ASYNC110 - others run between slices
            await trio.lowlevel.checkpoint()
        self.traces.expire(now)
        self.note_fds()
        sessions, connections = self.services.router.hub.sessions, self.services.connections
        due = [session.fd for session in sessions if session.look_at <= now]
        meter = self.services.router.meter
        began = meter.done
        for number, fd in enumerate(due, 1):
            while (connection := connections.get(fd)) is not None and connection.beat(now):  # noqa: ASYNC110 - as above
                await trio.lowlevel.checkpoint()
            if number % BEATEN_AT_ONCE == 0 or meter.done - began >= SLICE:
                await trio.lowlevel.checkpoint()
                began = meter.done

    def note_fds(self) -> None:
        """Let the engine know which fds were given out."""
        self.services.router.engine.note_fds(self.next_fd)

    async def shut_down(self) -> None:
        """Tell every client that the broker stops, `goodbye_rate` of them a second. Few are told at once."""
        self.traces.end_all()
        connections = list(self.services.connections.values())
        spread = min(len(connections) / self.config.goodbye_rate, self.config.drain_seconds / 2)
        began = trio.current_time()
        for number, connection in enumerate(connections):
            due = began + spread * number / len(connections)
            if spread > GOODBYES_AT_ONCE and due - trio.current_time() > GOODBYE_STEP:
                await trio.sleep_until(due)
            connection.shut_down()

    def end_readers(self) -> None:
        """No more will come for readers in this program."""
        for reader in self._readers:
            reader.end()
