"""A queue in which each party has a fair part: order, weights, and how little a put or a take does."""

import random
from collections import Counter

from broker.core.fair_queue import FairQueue


def taken(queue: FairQueue[str], count: int) -> list[str]:
    return [queue.take() for _ in range(count)]


def test_who_puts_one_does_not_wait_for_all_that_another_has_put() -> None:
    queue = FairQueue[str]()
    for number in range(1000):
        queue.put(f"flood {number}", 100, "flooder")
    assert taken(queue, 3) == ["flood 0", "flood 1", "flood 2"]
    queue.put("one", 100, "bystander")
    assert taken(queue, 3) == ["one", "flood 3", "flood 4"]


def test_what_is_small_does_not_wait_for_what_many_have_put_that_is_large() -> None:
    queue = FairQueue[str]()
    for party in range(50):
        queue.put("large", 10**6, party)
    assert taken(queue, 2) == ["large"] * 2
    queue.put("small", 600, "bystander")
    assert taken(queue, 1) == ["small"]


def test_parties_have_equal_parts_by_weight() -> None:
    queue = FairQueue[str]()
    for _ in range(100):
        queue.put("large", 900, "a")
    for _ in range(900):
        queue.put("small", 100, "b")
    given: Counter[str] = Counter()
    for item in taken(queue, 500):
        given[item] += 900 if item == "large" else 100
    assert abs(given["large"] - given["small"]) <= 900


def test_who_comes_back_again_and_again_has_no_more_than_a_part() -> None:
    queue = FairQueue[str]()
    for _ in range(100):
        queue.put("patient", 100, "patient")
    order = []
    for _ in range(100):
        queue.put("again", 100, "again")  # and nothing of it waits by the next time
        order += taken(queue, 2)
    assert order.count("patient") == 100
    assert len(queue) == 0


def test_who_comes_late_has_saved_up_nothing() -> None:
    queue = FairQueue[str]()
    queue.put("late", 1, "late")
    for _ in range(100):
        queue.put("busy", 100, "busy")
    taken(queue, 51)
    for _ in range(100):
        queue.put("late", 100, "late")
    assert taken(queue, 20).count("busy") >= 9


def test_one_topic_keeps_its_order_whoever_puts() -> None:
    queue = FairQueue[str]()
    for number in range(3):
        queue.put(f"a{number}", 1000, "a", "t")
    queue.put("b", 1, "b", "t")
    queue.put("b elsewhere", 1, "b", "u")
    queue.put("b once more", 1, "b", "t")
    order = taken(queue, 6)
    assert [each for each in order if each != "b elsewhere"] == [
        "a0",
        "a1",
        "a2",
        "b",
        "b once more",
    ]
    assert order.index("b elsewhere") == 0, "it waits for no other topic"


def test_each_topic_and_party_keeps_its_order_in_any_mix() -> None:
    chance = random.Random(5)
    queue = FairQueue[tuple[str, str, int]]()
    put: list[tuple[str, str, int]] = []
    order: list[tuple[str, str, int]] = []
    for number in range(5000):
        item = chance.choice("abcde"), chance.choice("tuv") + chance.choice(" xy").strip(), number
        queue.put(item, chance.randrange(1, 500), item[0], item[1])
        put.append(item)
        if number % 97 == 0:
            gone = queue.remove(lambda item: item[2] % 89 == 0)
            put = [each for each in put if each not in gone]
        while len(queue) and chance.random() < 0.5:
            order.append(queue.take())
    assert sorted(map(id, queue)) == sorted(id(each) for each in put if each not in order)
    order += [queue.take() for _ in range(len(queue))]
    assert sorted(order) == sorted(put)
    for topic in {each[1] for each in put}:
        numbers = [each[2] for each in order if each[1] == topic]
        assert numbers == sorted(numbers)


def test_a_row_is_what_joins_in_one_line_and_its_party_pays_for_it() -> None:
    queue = FairQueue[str]()
    for name in ("a1", "a2", "a3", "b1", "a4"):
        queue.put(name, 100, "a", name[0])
    for _ in range(6):
        queue.put("other", 100, "other")
    asked: list[tuple[str, str]] = []

    def joins(first: str, item: str) -> bool:
        asked.append((first, item))
        return item[0] == first[0]

    assert queue.take_row(joins) == ["a1", "a2", "a3"]
    assert asked == [("a1", "a2"), ("a1", "a3"), ("a1", "b1")]
    queue.put("new", 100, "new")
    assert taken(queue, 5) == ["other", "new", "other", "other", "b1"], "the row was paid for"
    assert taken(queue, 4) == ["other", "a4", "other", "other"]
    assert not queue._of_topic


def test_parties_that_have_gone_are_forgotten() -> None:
    queue = FairQueue[str]()
    queue.put("first", 1, "first")
    for number in range(10_000):
        queue.put("x", 1, number)
        queue.take()
        queue.put("y", 1, "first")
        queue.take()
    assert len(queue._lines) < 100
    queue.take()
    assert not queue._lines
    assert not queue._of_topic


def test_what_is_taken_out_leaves_the_others_in_their_order() -> None:
    queue = FairQueue[str]()
    for name in ("a1", "a2", "a3"):
        queue.put(name, 1, "a", "t")
    queue.put("b1", 1, "b", "u")
    assert queue.remove(lambda item: item in ("a2", "b1")) == ["a2", "b1"]
    assert (len(queue), queue.parties, list(queue)) == (2, 1, ["a1", "a3"])
    assert queue.clear() == ["a1", "a3"]
    assert (len(queue), queue.parties, queue._of_topic) == (0, 0, {})
