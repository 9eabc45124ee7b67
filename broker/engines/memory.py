"""The memory engine: history in this process, gone when it ends.

Each method is one atomic step with no checkpoint, so what is published while a client recovers
falls either into its recovery or behind it, never in between and never into both.
"""

import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager

import trio

from broker.config.settings import TopicRules
from broker.core.history import HistoryStatistics, HistoryStore
from broker.core.messages import Position, Publication
from broker.core.work import Meter

_EXPIRE_EVERY = 1.0


class MemoryEngine:
    """Keeps what topics publish; see `HistoryStore` for the exact meaning of each method."""

    def __init__(self, max_bytes: int) -> None:
        # Random, so that a client that comes back after a restart is told that it missed something.
        self.meter = Meter()
        """The one of its broker: see `core.work`."""
        self._store = HistoryStore(
            max_bytes, new_epoch=lambda: secrets.token_hex(4), meter=self.meter
        )

    def publish(
        self, topic: str, publications: Sequence[Publication], rules: TopicRules, now: float
    ) -> Sequence[Publication]:
        """Keep publications as their topic's rules say; return them with their offsets.

        `now` is `trio.current_time()`: asked for once per run, as it costs more than the rest.
        """
        size, ttl = rules.history_size, rules.history_ttl
        return self._store.extend(topic, publications, now, size, ttl)

    def position(self, topic: str) -> Position:
        return self._store.position(topic, trio.current_time())

    def history(
        self, topic: str, since: Position | None, limit: int, reverse: bool
    ) -> tuple[list[Publication], Position]:
        """Raises `UnrecoverablePosition` when `since` is of another epoch."""
        return self._store.read(topic, trio.current_time(), since, limit, reverse)

    def peek(
        self, topic: str, since: int | None, limit: int, reverse: bool = False
    ) -> list[Publication]:
        """About what `history` would list, to know what that is going to cost."""
        return self._store.peek(topic, since, limit, reverse)

    def recover(self, topic: str, since: Position) -> tuple[list[Publication], bool, Position]:
        return self._store.recover(topic, trio.current_time(), since)

    def remove(self, topic: str) -> None:
        self._store.remove(topic, trio.current_time())

    def forget(self, is_over: Callable[[str], bool]) -> None:
        """Forget the topics that this is true of, with their epochs. Linear in all topics."""
        self._store.forget(is_over)

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

    def statistics(self) -> HistoryStatistics:
        return self._store.statistics()

    async def _expire(self) -> None:
        while True:
            await trio.sleep(_EXPIRE_EVERY)
            while self._store.expire(trio.current_time()):
                await trio.lowlevel.checkpoint()


@asynccontextmanager
async def open_engine(max_bytes: int) -> AsyncGenerator[MemoryEngine, None]:
    """An engine for as long as the block; open it around everything that publishes."""
    engine = MemoryEngine(max_bytes)
    async with trio.open_nursery() as upkeep:
        upkeep.start_soon(engine._expire, name="history expiry")
        try:
            yield engine
        finally:
            upkeep.cancel_scope.cancel()
