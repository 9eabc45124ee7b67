"""Events as HTTP requests to a backend: in order, each at least once.

Rules:

1. One request at a time. A batch is sent until it is answered with 2xx; only then comes the next.
   So a backend never sees a gap but where it is told of one, and skips nothing but by taking it.
2. A backend knows by epoch and number which events it has had twice: nobody else can.
3. A backend that is down is logged once, and once when it is back.
"""

import json
import random
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

import attrs
import msgspec
import structlog
import trio

from broker.config.settings import WebhookRules
from broker.core.event_queue import Event
from broker.events.dispatcher import EventReader
from broker.events.feed import Feed
from broker.transport.http_client import Backend, HttpFailed, open_http_client

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("broker")

RETRY_AFTER_MOST = 3600.0
"""Seconds that a backend may put us off for; with more, a mistake there would be the end here."""

_TEMPORARY = frozenset({408, 425, 429})
"""Of the statuses from 300 to 499 those that do not say that the request itself is wrong."""


@attrs.frozen
class Failure:
    """Why a batch was not taken. `refused`: the same request will hardly ever be."""

    reason: str
    refused: bool = False
    retry_after: float = 0.0


@attrs.define(eq=False)
class Webhook:
    """Sends one feed to one backend."""

    feed: Feed
    rules: WebhookRules
    backend: Backend
    _delay: float = 0.0
    _failing_since: float | None = None
    _refusal_logged: bool = False

    async def run(self) -> None:
        """Send until the feed has ended and all of it was taken."""
        while batch := await self.feed.wait_batch(self.rules.batch_events):
            began = trio.current_time()
            failure = await self._send(batch)
            self.feed.queue.seconds.observe(trio.current_time() - began)
            if failure is None:
                self.feed.queue.done(batch)
                self._note_taken()
            else:
                self.feed.queue.failures += 1
                self._note_failure(failure)
                await self._pause(failure)

    async def _send(self, batch: Sequence[Event]) -> Failure | None:
        rules = self.rules
        # The same for the same batch, as Standard Webhooks asks for; no dots, which it signs by.
        request_id = f"{batch[0].epoch}-{batch[0].seq}-{batch[-1].seq}"
        try:
            answer = await self.backend.post(
                rules.url, request_id, encode(batch), rules.timeout_seconds
            )
        except HttpFailed as error:
            return Failure(str(error))
        if 200 <= answer.status < 300:
            return None
        refused = 300 <= answer.status < 500 and answer.status not in _TEMPORARY
        wait = seconds_of(answer.retry_after, self.backend.now())
        return Failure(f"status {answer.status}", refused, wait)

    async def _pause(self, failure: Failure) -> None:
        """Wait before the next attempt; a stop ends the wait, because there is not much time then."""
        rules = self.rules
        self._delay = min(self._delay * 2 or rules.retry_seconds, rules.retry_max_seconds)
        # At random, so that many brokers do not come at once to a backend that is just back.
        wait = max(random.uniform(self._delay / 2, self._delay), failure.retry_after)  # noqa: S311 - not a secret
        if self.feed.ending.is_set():
            await trio.sleep(min(wait, rules.retry_seconds))
        else:
            with trio.move_on_after(wait):
                await self.feed.ending.wait()

    def _note_failure(self, failure: Failure) -> None:
        told = self._failing_since is not None
        if not told:
            self._failing_since = trio.current_time()
        details = {"backend": urlsplit(self.rules.url).hostname, "reason": failure.reason}
        if failure.refused and not self._refusal_logged:
            self._refusal_logged = True
            text = "is webhooks.url right, and the secret? Sent again until it answers with 2xx"
            log.error("webhook_refused", **details, detail=text)
        elif not told:
            text = "events wait here, and are sent again until it answers with 2xx"
            log.warning("webhook_failed", **details, detail=text)

    def _note_taken(self) -> None:
        if self._failing_since is not None:
            seconds = trio.current_time() - self._failing_since
            waiting = self.feed.queue.statistics().waiting
            log.info("webhook_recovered", after=f"{seconds:.1f} s", waiting=waiting)
        self._failing_since, self._refusal_logged, self._delay = None, False, 0.0


def encode(batch: Sequence[Event]) -> bytes:
    """The body of a request: `{"events": […]}`."""
    body = {"events": batch}
    try:
        return msgspec.json.encode(body)
    except UnicodeEncodeError:  # your program may have named a user by what is no Unicode
        return json.dumps(msgspec.to_builtins(body)).encode()


def seconds_of(retry_after: str, now: float) -> float:
    """Seconds that `Retry-After` asks for (RFC 9110 section 10.2.3), within bounds; 0 for text that
    cannot be read."""
    text = retry_after.strip()
    if text.isascii() and text.isdigit():
        seconds = float(text[:10])
    else:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - now
        except (ValueError, OverflowError):
            return 0.0
    return min(max(0.0, seconds), RETRY_AFTER_MOST)


@asynccontextmanager
async def open_sender(
    rules: WebhookRules, now: Callable[[], float]
) -> AsyncGenerator[EventReader | None]:
    """A reader that sends events to `rules.url`, for as long as the block; None without a URL.

    `now` is in Unix seconds. Raises `ConfigError` if the package for it is missing.
    """
    if not rules.url:
        yield None
        return
    async with open_http_client("webhooks.url", "webhooks") as client:
        backend = Backend(client, rules.secret, now)

        async def run(feed: Feed) -> None:
            await Webhook(feed, rules, backend).run()

        yield EventReader("webhooks", run, rules.events)
