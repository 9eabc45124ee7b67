"""The memory engine: no log, and so nothing is deferred. History in this process, gone when it ends.

Each method is one atomic step with no checkpoint, so a publication while a client recovers falls either into
its recovery or behind it, never in between and never into both.
"""

import secrets
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Final

import trio

from broker.config.settings import TopicRules
from broker.core.history import HistoryStore
from broker.core.idempotency import IdempotentResults
from broker.core.messages import ClientInfo, Delivery, Fd, Position, Publication
from broker.core.retained import Retained
from broker.core.scopes import name_scope
from broker.core.work import Allowance, Meter
from broker.engines.cluster import ALONE, ClusterLink
from broker.engines.engine import (
    NOWHERE,
    Durability,
    EngineStatistics,
    Sink,
    Submission,
    View,
)
from broker.engines.waiting import LITTLE_BYTES

EXPIRE_EVERY: Final = 1.0
"""Seconds between two looks at what is past its time."""


def new_epoch(topic: str) -> str:
    """Random, so that a client that comes back after a restart is told that it missed something."""
    return secrets.token_hex(4)


class Memory:
    """The memory of an engine, from which it answers; see `HistoryStore` for the exact meaning of each
    method."""

    cluster: ClusterLink = ALONE

    def __init__(
        self, max_bytes: int, retained_bytes: int, new_epoch: Callable[[str], str]
    ) -> None:
        self.retained: Retained = Retained(retained_bytes)
        self.keys: IdempotentResults[Delivery] = IdempotentResults()
        self.meter: Meter = Meter()
        self._store = HistoryStore(max_bytes, new_epoch, meter=self.meter)

    def knows(self, topic: str, since: Position | None = None) -> bool:
        return True

    async def fetch(
        self, topics: Sequence[str], since: Mapping[str, Position | None] = NOWHERE
    ) -> None:
        await trio.lowlevel.checkpoint()

    def publish(
        self, topic: str, publications: Sequence[Publication], rules: TopicRules, now: float
    ) -> Sequence[Publication]:
        raise AssertionError("what has a history is deferred")

    def publish_run(
        self,
        topic: str,
        contents: Sequence[bytes],
        info: ClientInfo | None,
        opaque: bool,
        rules: TopicRules,
        now: float,
    ) -> Sequence[Publication]:
        raise AssertionError("what has a history is deferred")

    def position(self, topic: str) -> Position:
        return self._store.position(topic, trio.current_time())

    def view(self, topic: str, since: Position) -> View:
        return View(*self._store.recover(topic, trio.current_time(), since))

    def history(
        self, topic: str, since: Position | None, limit: int, reverse: bool
    ) -> tuple[list[Publication], Position]:
        return self._store.read(topic, trio.current_time(), since, limit, reverse)

    def peek(
        self, topic: str, since: int | None, limit: int, reverse: bool = False
    ) -> list[Publication]:
        return self._store.peek(topic, since, limit, reverse)

    # the part of the memory that it takes

    @property
    def bytes_held(self) -> int:
        return self._store.bytes_held

    @property
    def heaviest_bytes(self) -> int:
        return self._store.heaviest_bytes

    def prepare(self, size: int) -> bool:
        return self._store.prepare(size)

    def give_back(self, size: int) -> int:
        return self._store.give_back(size, trio.current_time())

    @asynccontextmanager
    async def expiring(self) -> AsyncGenerator[None]:
        """Free what is past its time, for as long as the block."""
        async with trio.open_nursery() as upkeep:
            name_scope(upkeep, "engine")
            upkeep.start_soon(self.expire, name="history expiry")
            try:
                yield
            finally:
                upkeep.cancel_scope.cancel()

    async def expire(self) -> None:
        """Free what is past its time, until cancelled."""
        while True:
            is_more = self._store.expire(trio.current_time())
            await trio.sleep(0 if is_more else EXPIRE_EVERY)


class MemoryEngine(Memory):
    """Keeps what topics publish in this process alone."""

    durability: Durability = "none"

    def __init__(self, max_bytes: int, retained_bytes: int = 0, first_fd: Fd = 1) -> None:
        super().__init__(max_bytes, retained_bytes, new_epoch)
        self.next_fd = first_fd

    def defers(self, topic: str, rules: TopicRules, *, more: bool = False) -> bool:
        return False

    def publish(
        self, topic: str, publications: Sequence[Publication], rules: TopicRules, now: float
    ) -> Sequence[Publication]:
        size, ttl = rules.history_size, rules.history_ttl
        return self._store.extend(topic, publications, now, size, ttl)

    def publish_run(
        self,
        topic: str,
        contents: Sequence[bytes],
        info: ClientInfo | None,
        opaque: bool,
        rules: TopicRules,
        now: float,
    ) -> Sequence[Publication]:
        size, ttl = rules.history_size, rules.history_ttl
        return self._store.extend_run(topic, contents, info, opaque, now, size, ttl)

    def submit(self, submission: Submission) -> None:
        raise AssertionError("nothing is deferred")

    def is_full(self, party: Allowance | None = None, size: int = LITTLE_BYTES) -> bool:
        return False

    async def wait_room(self) -> None:
        await trio.lowlevel.checkpoint()

    async def remove(self, topic: str) -> None:
        await trio.lowlevel.checkpoint()
        self._store.remove(topic, trio.current_time())

    def forget(self, is_over: Callable[[str], bool]) -> None:
        self._store.forget(is_over)

    def note_fds(self, next_fd: Fd) -> None:
        pass  # they begin anew with the process

    @asynccontextmanager
    async def running(self, sink: Sink) -> AsyncGenerator[None]:
        yield

    def statistics(self) -> EngineStatistics:
        return EngineStatistics(self._store.statistics())


@asynccontextmanager
async def open_memory(
    max_bytes: int, retained_bytes: int = 0, first_fd: Fd = 1
) -> AsyncGenerator[MemoryEngine]:
    """An engine for as long as the block; open it around everything that publishes."""
    engine = MemoryEngine(max_bytes, retained_bytes, first_fd)
    async with engine.expiring():
        yield engine
