"""One reader's way to the events: it waits for them, has them until it is done, and sees the end."""

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock, wait_all_tasks_blocked

from broker.core.event_queue import Event, EventKind, EventQueue
from broker.events.feed import Feed


def make_feed(capacity: int = 10) -> Feed:
    """A feed whose reader has had the event that it was started."""
    feed = Feed("webhooks", EventQueue("node", "epoch", 0.0, capacity))
    feed.queue.done(feed.queue.batch(1))
    return feed


def put(feed: Feed, *fds: int) -> None:
    for fd in fds:
        feed.put(EventKind.CONNECTED, 1.0, fd=fd, user="")


def fds(batch: object) -> list[int | None]:
    assert isinstance(batch, list)
    return [event.fd for event in batch]


async def test_the_first_event_is_that_it_began() -> None:
    feed = Feed("webhooks", EventQueue("node", "epoch", 5.0, 10))
    (event,) = await feed.wait_batch(10)
    assert (event.kind, event.time) == ("started", 5.0)


async def test_a_reader_waits_for_events_and_has_them_until_it_is_done(
    autojump_clock: MockClock,
) -> None:
    feed = make_feed()
    got: list[Event] = []

    async def read() -> None:
        got.extend(await feed.wait_batch(2))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await wait_all_tasks_blocked()
        assert got == []
        put(feed, 1, 2, 3)
    assert fds(got) == [1, 2]
    assert fds(await feed.wait_batch(2)) == [1, 2]  # until it is done with them
    feed.queue.done(got)
    assert fds(await feed.wait_batch(2)) == [3]


async def test_a_reader_that_is_cancelled_loses_nothing() -> None:
    feed = make_feed()
    put(feed, 1)
    with trio.CancelScope() as scope:
        scope.cancel()
        await feed.wait_batch(10)
    assert scope.cancelled_caught
    assert fds(await feed.wait_batch(10)) == [1]


async def test_after_the_last_event_a_batch_is_empty() -> None:
    feed = make_feed()
    put(feed, 1)
    feed.put(EventKind.STOPPED, 2.0)
    feed.ending.set()
    batch = await feed.wait_batch(10)
    assert [event.kind for event in batch] == ["connected", "stopped"]
    feed.queue.done(batch)
    for _ in range(2):
        assert await feed.wait_batch(10) == []


async def test_of_a_full_queue_the_oldest_go_and_the_log_says_so_once(
    autojump_clock: MockClock,
) -> None:
    feed = make_feed(2)
    with capture_logs() as logs:
        put(feed, 1, 2, 3, 4)
        assert [each["event"] for each in logs] == ["events_lost"]
        batch = await feed.wait_batch(10)
        assert fds(batch)[-2:] == [3, 4]
        feed.queue.done(batch)
        put(feed, 5, 6, 7)
        assert len(logs) == 1, "the reader was not through in between"
        while feed.queue.statistics().waiting:
            feed.queue.done(await feed.wait_batch(10))
        with trio.move_on_after(1):
            await feed.wait_batch(10)
        put(feed, 8, 9, 10)
    assert [(each["event"], each["reader"]) for each in logs] == [("events_lost", "webhooks")] * 2


def test_events_have_what_they_were_given() -> None:
    feed = make_feed()
    feed.put(EventKind.SUBSCRIBED, 3.0, fd=7, user="ann", topic="a")
    (event,) = feed.queue.batch(1)
    assert isinstance(event, Event)
    assert (event.fd, event.user, event.topic, event.time) == (7, "ann", "a", 3.0)


@pytest.mark.parametrize("limit", [1, 2, 100])
async def test_a_batch_is_no_larger_than_asked_for(limit: int) -> None:
    feed = make_feed(1000)
    put(feed, *range(1, 51))
    assert len(await feed.wait_batch(limit)) == min(limit, 50)
