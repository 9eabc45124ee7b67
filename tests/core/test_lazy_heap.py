"""A heap whose entries may cease to count: order, size, and how little a push does."""

import random

from broker.core.lazy_heap import SWEPT, LazyHeap


def everything(heap: LazyHeap[tuple[int, int]]) -> list[tuple[int, int]]:
    taken = []
    while (first := heap.first()) is not None:
        assert heap.pop() == first
        taken.append(first)
    return taken


def test_entries_come_out_in_order_and_those_that_count_are_all_there() -> None:
    chance = random.Random(1)
    counting: set[tuple[int, int]] = set()
    heap = LazyHeap(counting.__contains__)
    for number in range(5000):
        entry = (chance.randrange(100), number)
        counting.add(entry)
        heap.push(entry, len(counting))
        if number % 3:
            counting.remove(chance.choice(sorted(counting)))
        if number % 7 == 0 and (first := heap.first()) is not None:
            counting.discard(heap.pop())
            assert first not in counting
    taken = everything(heap)
    assert taken == sorted(taken)
    assert counting <= set(taken)
    assert not len(heap)


def test_entries_that_count_no_more_are_swept_away() -> None:
    latest = 0
    heap = LazyHeap[tuple[int, int]](lambda entry: entry[0] > latest - 10)
    most = 0
    for latest in range(1, 10_000):
        heap.push((latest, 0), 10)
        most = max(most, len(heap))
    assert most <= 3 * 10 + 100


def test_no_push_looks_at_more_than_a_few_entries() -> None:
    looked = 0

    def counts(entry: tuple[int, int]) -> bool:
        nonlocal looked
        looked += 1
        return entry[0] >= 900

    heap = LazyHeap(counts)
    for number in range(10_000):
        looked = 0
        heap.push((number % 1000, number), 1000)
        assert looked <= SWEPT
    assert len(heap) <= 3 * 1000 + 100


def test_entries_that_cease_to_count_with_no_push_are_swept_away() -> None:
    counting = set(range(10_000))
    looked = 0

    def counts(entry: tuple[int]) -> bool:
        nonlocal looked
        looked += 1
        return entry[0] in counting

    heap = LazyHeap(counts)
    for number in range(10_000):
        heap.push((number,), len(counting))
    order = list(counting)
    random.Random(3).shuffle(order)
    for number in order:
        counting.remove(number)
        looked = 0
        heap.sweep(len(counting))
        assert looked <= SWEPT
        assert len(heap) <= 3 * len(counting) + 100
