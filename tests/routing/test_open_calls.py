"""Calls to other nodes: each ends once."""

from functools import partial
from math import inf

import pytest
import trio
from trio.testing import MockClock

from broker.errors import Refused
from broker.routing.open_calls import OpenCalls, Unanswered


async def test_each_ends_once_by_its_answer_its_time_or_its_node(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    calls, told = OpenCalls(), dict[int, object]()
    nursery.start_soon(calls.keep_time)
    for seconds, node in ((2.0, "a"), (1.0, "a"), (inf, "b"), (2.0, "b"), (5.0, "a")):
        number = calls.next_number()
        calls.add(number, node, partial(told.__setitem__, number), seconds)
    calls.end(1, b"yes")
    calls.end(1, b"again")
    calls.end(99, b"nobody's")
    assert told == {1: b"yes"}
    await trio.sleep(1.5)
    assert isinstance(told[2], Unanswered)
    assert told[2].temporary
    calls.end_all("node b has gone", "b")
    assert {3, 4} < told.keys()
    calls.forget(5)
    await trio.sleep(10)
    assert told.keys() == {1, 2, 3, 4}
    assert len(calls) == 0


async def test_what_was_answered_leaves_nothing(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    calls = OpenCalls()
    nursery.start_soon(calls.keep_time)
    calls.add(calls.next_number(), "a", print, inf)  # a program that waits as long as it takes
    for _ in range(1000):
        number = calls.next_number()
        calls.add(number, "a", lambda answer: None, inf if number % 2 else 2.0)
        calls.end(number, Refused(100))
    await trio.sleep(3)
    assert len(calls) == 1
    assert calls.deadlines == 0


@pytest.mark.parametrize("first", [1.0, 5.0])
async def test_the_earliest_is_ended_first(
    autojump_clock: MockClock, nursery: trio.Nursery, first: float
) -> None:
    calls, at = OpenCalls(), list[float]()
    nursery.start_soon(calls.keep_time)
    await trio.testing.wait_all_tasks_blocked()
    began = trio.current_time()
    for seconds in (first, 6.0 - first):
        calls.add(
            calls.next_number(), "a", lambda _: at.append(trio.current_time() - began), seconds
        )
    await trio.sleep(6)
    assert at == [1.0, 5.0]
