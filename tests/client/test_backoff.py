"""`broker.client.backoff`: how long a client waits between attempts."""

import random

import pytest

from broker.client.backoff import RECONNECT_FIRST_SECONDS, RECONNECT_MOST_SECONDS, backoff


@pytest.mark.parametrize(
    "attempt, bound",
    [(0, RECONNECT_FIRST_SECONDS), (1, 0.4), (5, 6.4), (7, 20.0), (10**9, RECONNECT_MOST_SECONDS)],
)
def test_a_wait_is_anywhere_below_a_bound_that_doubles(attempt: int, bound: float) -> None:
    random.seed(1)
    waits = [backoff(attempt) for _ in range(1000)]
    assert min(waits) >= 0
    assert max(waits) <= bound
    assert min(waits) < 0.05 * bound
    assert max(waits) > 0.95 * bound
