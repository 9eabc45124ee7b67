"""Events on their way from where they happen to their readers: the app's hook, the backend.

Rules:

1. An event is put into a queue in the very step in which it happens, so the events and the state
   of the broker never differ. Nobody waits for a reader.
2. Each reader is one task with a feed of its own.
3. The readers outlive every connection, so last words are told too, for `flush_seconds` at most.
"""

import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Final, Protocol, Unpack

import attrs
import structlog
import trio

from broker.config.settings import WebhookRules
from broker.core.event_queue import CHOICES, EventFields, EventKind, EventQueue, EventStatistics
from broker.core.messages import Fd
from broker.core.scopes import name_scope
from broker.events.feed import Feed
from broker.hooks import EndsProcess, EventHook

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("broker")

LOOK_SECONDS: Final = 1.0
"""Between two looks at whether an event was told."""


def new_epoch(now: float) -> str:
    """The time is for the reader; chance makes an epoch different from all others."""
    return f"{datetime.fromtimestamp(now, UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}"


class EventSink(Protocol):
    """Takes events where they happen."""

    def emit(self, kind: EventKind, fd: Fd, user: str, **fields: Unpack[EventFields]) -> None:
        """Something has happened to a connection; `fields` are those of `Event`. Never waits."""


class Events:
    """Tells what happens to every reader."""

    def __init__(self, feeds: Sequence[Feed], now: Callable[[], float], epoch: str) -> None:
        self._feeds = feeds
        self._now = now
        self.epoch: str = epoch

    def emit(self, kind: EventKind, fd: Fd, user: str, **fields: Unpack[EventFields]) -> None:
        """Something has happened to a connection; `fields` are those of `Event`. Never waits."""
        now = self._now()
        for feed in self._feeds:
            feed.put(kind, now, fd, user, **fields)

    def begin_anew(self) -> None:
        """Begin a new epoch: others have told that everybody here has gone."""
        now = self._now()
        self.epoch = new_epoch(now)
        for feed in self._feeds:
            feed.queue.begin(self.epoch, now)
            feed.wake()

    async def tell_death(self, name: str, epoch: str) -> None:
        """Tell that another node has died; returns when every reader has had that. Cancelled, some may
        have."""
        untold = list(self._feeds)
        while untold:
            now = self._now()
            marks = []
            for feed in untold:
                feed.put(EventKind.DIED, now, dead=name, dead_epoch=epoch)
                told = feed.queue.statistics()
                marks.append((feed, told.epoch, told.seq, told.dropped))
            while not all(feed.queue.has_told(e, seq) for feed, e, seq, _ in marks):  # noqa: ASYNC110 - nobody is in a hurry
                await trio.sleep(LOOK_SECONDS)
            # An event that was dropped meanwhile may have been this one.
            untold = [
                feed for feed, _, _, dropped in marks if feed.queue.statistics().dropped != dropped
            ]

    def end(self) -> None:
        """The broker has stopped, and nobody is connected."""
        for feed in self._feeds:
            feed.put(EventKind.STOPPED, self._now())
            feed.ending.set()

    @property
    def readers(self) -> int:
        """How many readers there are, each with a queue of its own."""
        return len(self._feeds)

    @property
    def bytes_held(self) -> int:
        """About what the events take that wait for a reader."""
        return sum([feed.queue.bytes_held for feed in self._feeds])

    def statistics(self) -> dict[str, EventStatistics]:
        """By reader: `on_event`, `webhooks`."""
        return {feed.name: feed.queue.statistics() for feed in self._feeds}


@attrs.frozen
class EventReader:
    """A reader of events: `run` takes them from its feed until that ends. It wants `kinds` of those
    that a reader may do without."""

    name: str
    run: Callable[[Feed], Awaitable[None]]
    kinds: Collection[str] = CHOICES


@asynccontextmanager
async def open_events(
    node: str, readers: Sequence[EventReader], rules: WebhookRules, now: Callable[[], float]
) -> AsyncGenerator[Events | None]:
    """Events of this node for as long as the block, then of its end; None if nobody wants to know.

    `now` is in Unix seconds. An exception in the block is no end in good order: nothing more is
    told, what waits is left.
    """
    if not readers:
        yield None
        return
    started = now()
    epoch = new_epoch(started)
    feeds = []
    async with trio.open_nursery() as tasks:
        name_scope(tasks, "events")
        for reader in readers:
            queue = EventQueue(node, epoch, started, rules.max_events, reader.kinds)
            feed = Feed(reader.name, queue)
            feeds.append(feed)
            tasks.start_soon(reader.run, feed, name=reader.name)
        events = Events(feeds, now, epoch)
        yield events
        events.end()
        tasks.cancel_scope.deadline = trio.current_time() + rules.flush_seconds
    for name, statistics in events.statistics().items():
        if statistics.waiting:
            text = f"not taken within {rules.flush_seconds:g} s of the end"
            log.warning("events_untold", reader=name, waiting=statistics.waiting, detail=text)


def hook_reader(hook: EventHook) -> EventReader:
    """The app's `on_event`, one event at a time. Its failures are logged, and the next event comes."""

    async def run(feed: Feed) -> None:
        while batch := await feed.wait_batch(1):
            try:
                await hook(batch[0])
            except EndsProcess:
                pass  # the broker stops, and tells of that too
            except Exception:
                log.exception("hook_failed", hook="event", kind=batch[0].kind, fd=batch[0].fd)
            feed.queue.done(batch)

    return EventReader("on_event", run)
