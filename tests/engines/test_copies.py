"""Pieces of a history are put together when the last one was read, as far as they are still kept."""

from collections.abc import Sequence

import pytest

from broker.core.history import HistoryStore
from broker.core.messages import Position, Publication
from broker.engines.copies import Copies
from broker.engines.records import Batch, Older, Run, Stands

ROOM = 2**24


def piece(front: int, first: int, end: int, *, epoch: str = "e", is_last: bool = False) -> Older:
    data = [[b"%d" % offset] for offset in range(first, end)]
    runs = [Run("a", 7, 9, 60.0, [Batch(each)]) for each in data]
    return Older("a", epoch, front, first, runs, is_last)


def make() -> tuple[HistoryStore, Copies]:
    store = HistoryStore(ROOM, lambda topic: "new")
    return store, Copies(store)


def publish(store: HistoryStore, count: int, size: int = 100) -> None:
    top = store.position("a", 0.0).offset
    said = [Publication("a", b"%d" % offset) for offset in range(top + 1, top + 1 + count)]
    store.extend("a", said, 5.0, size, 60.0)


def offsets(store: HistoryStore) -> list[int]:
    """Of what is kept, which says its offset itself."""
    state = store.state("a")
    assert state is not None
    assert state[0].epoch == "e"
    dated = [] if state[1] is None else list(state[1].dated())
    assert all(int(each.data) == each.offset for _, each in dated)
    return [each.offset for _, each in dated]


@pytest.mark.parametrize(
    ("pieces", "kept"),
    [
        ([piece(1, 1, 4), piece(1, 4, 7, is_last=True)], [1, 2, 3, 4, 5, 6, 7, 8]),
        ([piece(1, 1, 4), piece(3, 4, 7, is_last=True)], [3, 4, 5, 6, 7, 8]),
        ([piece(1, 1, 3), piece(1, 5, 7, is_last=True)], [5, 6, 7, 8]),
        ([piece(1, 1, 4), piece(7, 7, 7, is_last=True)], [7, 8]),
        ([piece(1, 1, 4), piece(1, 4, 7)], [7, 8]),
        ([piece(1, 1, 4), piece(1, 4, 7, epoch="other", is_last=True)], [7, 8]),
        ([piece(1, 1, 4, is_last=True)], [7, 8]),
    ],
    ids=["all", "some went", "a gap went", "all went", "no last one", "of another", "no end"],
)  # fmt: skip
def test_the_pieces_are_put_before_what_was_published_meanwhile(
    pieces: Sequence[Older], kept: list[int]
) -> None:
    store, copies = make()
    copies.begin(Stands("a", "e", 6), 0.0)
    for each in pieces[:-1]:
        copies.take(each, 0.0, float)
    publish(store, 2)
    copies.take(pieces[-1], 0.0, float)
    assert offsets(store) == kept
    assert store.position("a", 0.0) == Position(8, "e")
    state = store.state("a")
    assert state is not None
    assert state[1] is not None
    times = [when for when, _ in state[1].dated()]
    assert times == [7.0] * (len(kept) - 2) + [5.0] * 2


def test_pieces_are_of_no_use_where_the_originals_are() -> None:
    store, copies = make()
    store.restore("a", Position(0, "e"), 0.0)
    publish(store, 6)
    before = store.state("a")
    assert before is not None
    copies.begin(Stands("a", "e", 6), 0.0)
    copies.take(piece(1, 1, 4), 0.0, float)
    assert copies._of == {"a": ("e", [])}, "they would take as much again"
    copies.take(piece(1, 4, 7, is_last=True), 0.0, float)
    after = store.state("a")
    assert after is not None
    assert after[1] is before[1], "the same ring"
    assert offsets(store) == [1, 2, 3, 4, 5, 6]


def test_a_topic_that_is_elsewhere_than_its_copy_says_begins_there() -> None:
    store, copies = make()
    publish(store, 4)
    copies.begin(Stands("a", "e", 6), 0.0)
    assert store.state("a") == (Position(6, "e"), None)


def test_pieces_are_dropped_with_what_they_are_copies_of() -> None:
    store, copies = make()
    copies.begin(Stands("a", "e", 6), 0.0)
    copies.take(piece(1, 1, 4), 0.0, float)
    copies.drop("a")
    copies.take(piece(1, 4, 7, is_last=True), 0.0, float)
    assert offsets(store) == []


def test_pieces_without_a_beginning_are_passed_over() -> None:
    store, copies = make()
    copies.take(piece(1, 1, 7, is_last=True), 0.0, float)
    assert store.state("a") is None


def test_pieces_that_do_not_reach_what_is_left_here_are_gone_too() -> None:
    store, copies = make()
    copies.begin(Stands("a", "e", 6), 0.0)
    publish(store, 4, size=2)
    copies.take(piece(1, 1, 7, is_last=True), 0.0, float)
    assert offsets(store) == [9, 10]
