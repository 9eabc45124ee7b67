"""Events on their way from where they happen to whoever reads them: the app's hook, the backend.

Rules:

1. Whatever happens is put into a queue in the very step in which it happens, so what the events say
   and what the broker knows never differ. Nobody waits for a reader.
2. Each reader is one task with a feed of its own.
3. The readers outlive every connection, so last words are told too, for `flush_seconds` at most.
"""

import secrets
import socket
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from typing import Any

import structlog
import trio

from broker.config.settings import Config
from broker.core.event_queue import EventKind, EventQueue, EventStatistics
from broker.core.messages import Fd
from broker.events.feed import Feed
from broker.hooks import EventHook
from broker.transport.http_client import Backend
from broker.webhooks.sender import Webhook

log = structlog.get_logger("broker")


class Events:
    """Tells what happens to every reader."""

    def __init__(self, feeds: Sequence[Feed], now: Callable[[], float]) -> None:
        self._feeds = feeds
        self._now = now

    def emit(self, kind: EventKind, fd: Fd, user: str, **fields: Any) -> None:
        """Something has happened to a connection; `fields` are those of `Event`. Never waits."""
        now = self._now()
        for feed in self._feeds:
            feed.put(kind, now, fd=fd, user=user, **fields)

    def end(self) -> None:
        """The broker has stopped, and nobody is connected."""
        for feed in self._feeds:
            feed.put(EventKind.STOPPED, self._now())
            feed.ending.set()

    def statistics(self) -> dict[str, EventStatistics]:
        """By reader: `on_event`, `webhooks`."""
        return {feed.name: feed.queue.statistics() for feed in self._feeds}


@asynccontextmanager
async def open_events(
    config: Config, hook: EventHook | None, backend: Backend | None, now: Callable[[], float]
) -> AsyncGenerator[Events | None]:
    """What tells of events for as long as the block, then of its end; None if nobody wants to know.

    `now` is in Unix seconds. An exception in the block is no end in good order: nothing more is
    told, what waits is left.
    """
    rules = config.webhooks
    if hook is None and backend is None:
        yield None
        return
    node = rules.node or f"{socket.gethostname()}:{config.unix or config.port}"
    started = now()
    # The time is for who reads it; what makes an epoch different from all others is chance.
    epoch = f"{datetime.fromtimestamp(started, UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}"
    begin = partial(EventQueue, node, epoch, started, rules.max_events)
    feeds = []
    async with trio.open_nursery() as readers:
        if hook is not None:
            feeds.append(Feed("on_event", begin()))
            readers.start_soon(_run_hook, feeds[-1], hook)
        if backend is not None:
            feeds.append(Feed("webhooks", begin(rules.events)))
            readers.start_soon(Webhook(feeds[-1], rules, backend).run)
        events = Events(feeds, now)
        yield events
        events.end()
        readers.cancel_scope.deadline = trio.current_time() + rules.flush_seconds
    for name, statistics in events.statistics().items():
        if statistics.waiting:
            text = f"not taken within {rules.flush_seconds:g} s of the end"
            log.warning("events_untold", reader=name, waiting=statistics.waiting, detail=text)


async def _run_hook(feed: Feed, hook: EventHook) -> None:
    while batch := await feed.wait_batch(1):
        try:
            await hook(batch[0])
        except Exception:
            log.exception("hook_failed", hook="event", kind=batch[0].kind, fd=batch[0].fd)
        feed.queue.done(batch)
