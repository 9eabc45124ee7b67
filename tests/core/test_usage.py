"""Token buckets: what may be taken at once, and in any stretch of time."""

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.core.usage import Bucket, ConnectionUsage, Usage


@given(
    st.lists(st.tuples(st.floats(0, 10), st.integers(1, 50)), max_size=60),
    st.floats(0.1, 100),
    st.integers(1, 100),
)
def test_in_no_stretch_of_time_more_passes_than_the_rate_and_one_burst(
    asked: list[tuple[float, int]], rate: float, burst: int
) -> None:
    bucket, now, passed = Bucket(), 0.0, []
    for pause, cost in asked:
        now += pause
        if bucket.has(cost, rate, burst, now):
            bucket.take(cost, rate, now)
            passed.append((now, cost))
    for first, (start, _) in enumerate(passed):
        for last, (end, biggest) in enumerate(passed[first:], first):
            total = sum(cost for _, cost in passed[first : last + 1])
            # Only the last can be larger than the burst: it is paid off afterwards.
            assert total <= (end - start) * rate + burst + max(0, biggest - burst) + 1e-6


@pytest.mark.parametrize(
    "steps",
    [
        # at, cost, passes; 2 a second, 4 at once
        [(0, 1, True)] * 4 + [(0, 1, False), (0.4, 1, False), (0.5, 1, True), (0.5, 1, False)],
        [(0, 4, True), (1, 3, False), (1, 2, True), (100, 4, True), (100, 1, False)],
        # larger than the burst: only from full, and the debt is paid at the rate
        [(0, 1, True), (0, 10, False), (0.5, 10, True), (3.5, 1, False), (4, 1, True)],
    ],
)
def test_a_bucket_fills_at_its_rate_up_to_its_burst(
    steps: list[tuple[float, float, bool]],
) -> None:
    bucket = Bucket()
    for now, cost, passes in steps:
        assert bucket.has(cost, 2, 4, now) is passes, (now, cost)
        if passes:
            bucket.take(cost, 2, now)


def test_a_bucket_is_full_when_all_was_paid() -> None:
    bucket = Bucket()
    assert bucket.is_full(2, 0)
    bucket.take(3, 2, 0)
    assert not bucket.is_full(2, 1.4)
    assert bucket.is_full(2, 1.5)
    assert not bucket.is_full(1, 1.5)  # by a rate that was changed under way


def test_at_no_rate_at_all_everything_passes() -> None:
    bucket = Bucket()
    for _ in range(3):
        assert bucket.has(100, inf, 4, 0)
        bucket.take(100, inf, 0)
    assert bucket.is_full(inf, 0)


def test_a_larger_burst_counts_at_once_and_a_smaller_one_too() -> None:
    bucket = Bucket()
    bucket.take(4, 1, 0)
    assert not bucket.has(1, 1, 4, 0)
    assert bucket.has(1, 1, 5, 0)
    assert not bucket.has(1, 1, 3, 1)


def test_nobody_shares_a_bucket_by_accident() -> None:
    one, other = ConnectionUsage(), ConnectionUsage()
    buckets = [b for each in (one, other) for b in (each.own.messages, each.own.bytes, each.excess)]
    assert len({id(bucket) for bucket in buckets}) == 6
    assert Usage().messages is not Usage().messages
