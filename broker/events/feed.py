"""One reader's way to the events: it waits for them, gets them in order, and says when it is done."""

from collections.abc import Sequence
from typing import Unpack

import attrs
import structlog
import trio

from broker.core.event_queue import Event, EventFields, EventKind, EventQueue

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("broker")


@attrs.define(eq=False)
class Feed:
    """One reader's queue, and how it waits for what comes."""

    name: str
    queue: EventQueue
    ending: trio.Event = attrs.field(factory=trio.Event)
    """Set in the step in which the last event was put."""
    _came: trio.Event = attrs.field(factory=trio.Event)
    _full: bool = False  # since the reader was last through

    def put(
        self,
        kind: EventKind,
        now: float,
        fd: int | None = None,
        user: str | None = None,
        **fields: Unpack[EventFields],
    ) -> None:
        """Add an event. Never waits; the first that is lost is logged, until all were read."""
        fits = self.queue.put(kind, now, fd, user, **fields)
        self._came.set()
        if not fits and not self._full:
            self._full = True
            log.warning("events_lost", reader=self.name, detail="the queue is full, the oldest go")

    def wake(self) -> None:
        """Have the reader look again."""
        self._came.set()

    async def wait_batch(self, limit: int) -> Sequence[Event]:
        """The next events, as soon as there are any; empty after the last. They stay where they are
        until `queue.done`, also if this is cancelled."""
        await trio.lowlevel.checkpoint()
        while True:
            self._came = trio.Event()
            batch = self.queue.batch(limit)
            self._full = self._full and bool(batch)
            if batch or self.ending.is_set():
                return batch
            await self._came.wait()
