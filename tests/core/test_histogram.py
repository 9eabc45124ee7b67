"""Observations between bounds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.core.histogram import Histogram


@pytest.mark.parametrize(
    "value, place", [(-1.0, 0), (0.0, 0), (1.0, 0), (1.5, 1), (2.0, 1), (2.5, 2), (1e9, 2)]
)
def test_a_bound_belongs_to_what_is_below_it(value: float, place: int) -> None:
    histogram = Histogram((1.0, 2.0))
    histogram.observe(value)
    statistics = histogram.statistics()
    assert statistics.counts == tuple(int(place == each) for each in range(3))
    assert (statistics.count, statistics.sum) == (1, value)


@given(st.lists(st.integers(0, 100)))
def test_all_at_once_is_one_by_one(values: list[int]) -> None:
    both, one_by_one = Histogram((1, 10, 50)), Histogram((1, 10, 50))
    both.observe_all(values)
    for value in values:
        one_by_one.observe(value)
    statistics = both.statistics()
    assert statistics == one_by_one.statistics()
    assert (statistics.count, statistics.sum) == (len(values), sum(values))


def test_a_snapshot_stays_as_it_is() -> None:
    histogram = Histogram()
    before = histogram.statistics()
    histogram.observe(0.3)
    assert before.count == 0
