"""The queue of events: numbers without a gap, and a word for each that was dropped."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.core.event_queue import CHOICES, Event, EventKind, EventQueue


def queue_of(capacity: int = 100, kinds: tuple[str, ...] = CHOICES) -> EventQueue:
    return EventQueue("node", "epoch", 5.0, capacity, kinds)


def shown(batch: object) -> list[tuple[str, int]]:
    assert isinstance(batch, list)
    return [(event.kind, event.seq) for event in batch]


def test_an_epoch_begins_with_started() -> None:
    queue = queue_of()
    assert queue.batch(10) == [Event(kind="started", node="node", epoch="epoch", seq=1, time=5.0)]
    assert queue.statistics().waiting == 1
    queue.done(queue.batch(10))
    assert queue.batch(10) == []
    assert queue.statistics().waiting == 0


def test_events_are_numbered_and_say_what_they_were_given() -> None:
    queue = queue_of()
    assert queue.put(EventKind.OPENED, 6.0, fd=7, user="", address="a")
    queue.put(EventKind.STOPPED, 7.0)
    assert shown(queue.batch(10)) == [("started", 1), ("opened", 2), ("stopped", 3)]
    opened = queue.batch(10)[1]
    assert (opened.fd, opened.user, opened.address, opened.time) == (7, "", "a", 6.0)
    assert opened.topic is None
    assert queue.statistics().seq == 3


def test_a_batch_holds_no_more_than_asked_for_and_stays_until_it_is_done() -> None:
    queue = queue_of()
    for _ in range(3):
        queue.put(EventKind.OPENED, 6.0)
    assert shown(queue.batch(2)) == [("started", 1), ("opened", 2)]
    queue.put(EventKind.BOUND, 6.0)
    assert shown(queue.batch(3)) == [("started", 1), ("opened", 2)]
    queue.done(queue.batch(2))
    assert shown(queue.batch(2)) == [("opened", 3), ("opened", 4)]
    queue.done(queue.batch(2))
    assert shown(queue.batch(2)) == [("bound", 5)]
    assert queue.statistics().delivered == 4


def test_kinds_that_nobody_wants_are_not_counted() -> None:
    queue = queue_of(kinds=("connected",))
    for kind in CHOICES:
        queue.put(kind, 6.0)
    queue.put(EventKind.STOPPED, 7.0)
    assert shown(queue.batch(10)) == [("started", 1), ("connected", 2), ("stopped", 3)]


def test_a_full_queue_drops_the_oldest_and_says_so_but_never_the_start() -> None:
    queue = queue_of(capacity=2)
    assert [queue.put(EventKind.OPENED, float(n)) for n in range(5)] == [True, True, *[False] * 3]
    batch = queue.batch(10)
    assert shown(batch) == [("started", 1), ("lost", 4), ("opened", 5), ("opened", 6)]
    assert (batch[1].first, batch[1].missed, batch[1].time) == (2, 3, 3.0)
    assert queue.statistics().dropped == 3
    queue.done(batch)
    queue.put(EventKind.OPENED, 6.0)
    assert shown(queue.batch(10)) == [("opened", 7)]


def test_a_batch_of_which_something_was_dropped_is_made_anew() -> None:
    queue = queue_of(capacity=2)
    queue.done(queue.batch(10))
    for _ in range(2):
        queue.put(EventKind.OPENED, 6.0)
    first = queue.batch(10)
    assert shown(first) == [("opened", 2), ("opened", 3)]
    queue.put(EventKind.OPENED, 6.0)
    assert shown(queue.batch(10)) == [("lost", 2), ("opened", 3), ("opened", 4)]
    # The first arrived all the same: then nothing is lost.
    queue.done(first)
    assert shown(queue.batch(10)) == [("opened", 4)]


def test_events_lost_behind_a_batch_that_arrived_are_all_that_is_lost() -> None:
    queue = queue_of(capacity=2)
    queue.done(queue.batch(10))
    for _ in range(2):
        queue.put(EventKind.OPENED, 6.0)
    first = queue.batch(10)
    for _ in range(3):
        queue.put(EventKind.OPENED, 6.0)
    queue.done(first)  # 2 and 3, of 2 to 6 with 4 dropped as well
    batch = queue.batch(10)
    assert shown(batch) == [("lost", 4), ("opened", 5), ("opened", 6)]
    assert (batch[0].first, batch[0].missed) == (4, 1)


@pytest.mark.parametrize("limit", [1, 2])
def test_small_batches_bring_everything_too(limit: int) -> None:
    queue = queue_of(capacity=2)
    for _ in range(4):
        queue.put(EventKind.OPENED, 6.0)
    seen = []
    while batch := queue.batch(limit):
        assert len(batch) <= limit
        seen += shown(batch)
        queue.done(batch)
    assert seen == [("started", 1), ("lost", 3), ("opened", 4), ("opened", 5)]


@given(
    st.integers(1, 5),
    st.lists(st.sampled_from(["put", "put", "take", "lose"]) | st.integers(1, 5), max_size=60),
)
def test_a_reader_learns_of_every_number_once_as_an_event_or_as_lost(
    capacity: int, steps: list[str | int]
) -> None:
    queue = queue_of(capacity)
    known: list[int] = []
    limit, written, last = 3, 1, 0
    for step in [*steps, *["take"] * 60]:
        if isinstance(step, int):
            limit = step
        elif step == "put":
            written += 1
            queue.put(EventKind.OPENED, 0.0)
        elif batch := queue.batch(limit):
            for event in batch:
                if event.seq <= last:
                    continue
                if event.kind == "lost":
                    assert event.first is not None
                    assert event.first <= last + 1
                    known += range(last + 1, event.seq + 1)
                else:
                    assert event.seq == last + 1
                    known.append(event.seq)
                last = event.seq
            if step == "take":
                queue.done(batch)
    assert known == list(range(1, written + 1))
    assert queue.statistics().seq == written
