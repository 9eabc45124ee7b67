"""Results by owner and key: for five minutes, and never pushed out by another owner's."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.core.idempotency import (
    MAX_BYTES,
    MAX_KEPT,
    MAX_KEY_BYTES,
    OWNER_BYTES,
    RESULT_BYTES,
    IdempotencyStatistics,
    IdempotentResults,
)
from broker.core.shares import Owner


def kept(results: IdempotentResults[int], owner: Owner, keys: range, now: float = 0.0) -> int:
    """How many of these keys still have their result."""
    return sum(results.get(owner, key, now) is not None for key in keys)


def test_a_result_is_kept_until_its_time_is_over() -> None:
    results: IdempotentResults[str] = IdempotentResults(ttl=300.0)
    assert results.get("alice", "k", 0.0) is None
    results.keep("alice", "k", "done", 0.0)
    assert results.get("alice", "k", 299.9) == "done"
    assert results.get("alice", "other", 299.9) is None
    assert results.get("alice", "k", 300.0) is None
    assert len(results) == 0


def test_a_key_belongs_to_its_owner() -> None:
    results: IdempotentResults[str] = IdempotentResults()
    owners: list[Owner] = ["alice", "7", 7, 8, None]
    for owner in owners:
        assert results.get(owner, "1", 0.0) is None
        results.keep(owner, "1", f"of {owner!r}", 0.0)
    assert [results.get(owner, "1", 0.0) for owner in owners] == [f"of {o!r}" for o in owners]


def test_beyond_the_number_the_oldest_is_forgotten() -> None:
    results: IdempotentResults[int] = IdempotentResults(max_kept=2)
    for number in range(3):
        results.keep("alice", number, number, float(number))
    assert [results.get("alice", number, 3.0) for number in range(3)] == [None, 1, 2]
    assert results.statistics() == IdempotencyStatistics(
        results=2, owners=1, bytes=OWNER_BYTES + 2 * RESULT_BYTES, results_evicted=1
    )


def test_beyond_the_bytes_the_oldest_is_forgotten() -> None:
    results: IdempotentResults[int] = IdempotentResults(
        max_bytes=OWNER_BYTES + 2 * RESULT_BYTES + 100
    )
    for number in range(3):
        results.keep("alice", number, number, 0.0, size=50)
    assert kept(results, "alice", range(3)) == 2
    results.keep("alice", "large", 4, 0.0, size=5000)
    assert len(results) == 0
    assert results.statistics().bytes == 0


@pytest.mark.parametrize("flooder", ["mallory", 9, None])
@pytest.mark.parametrize("innocent", ["alice", 7, "app"])
def test_a_flood_of_keys_costs_others_nothing(flooder: Owner, innocent: Owner) -> None:
    innocent = None if innocent == "app" else innocent
    if flooder == innocent:
        return
    results: IdempotentResults[int] = IdempotentResults(max_kept=100)
    for key in range(30):
        results.keep(innocent, key, key, 0.0)
    for key in range(1000):
        results.keep(flooder, key, key, 0.0)
    assert kept(results, innocent, range(30)) == 30
    assert kept(results, flooder, range(930, 1000)) == 70


def test_a_flood_of_connections_costs_users_nothing() -> None:
    results: IdempotentResults[int] = IdempotentResults(max_kept=100)
    for key in range(30):
        results.keep("alice", key, key, 0.0)
    for fd in range(1, 1000):
        results.keep(fd, 0, fd, 0.0)
    assert kept(results, "alice", range(30)) == 30


def test_large_results_count_more_than_many() -> None:
    room = 2 * OWNER_BYTES + 101 * RESULT_BYTES + 50_000
    results: IdempotentResults[int] = IdempotentResults(max_bytes=room)
    for key in range(100):
        results.keep("alice", key, key, 0.0)
    for key in range(10):
        results.keep("mallory", key, key, 0.0, size=100_000)
    assert kept(results, "alice", range(100)) == 100


def test_keeping_again_replaces_the_result_and_its_weight() -> None:
    results: IdempotentResults[str] = IdempotentResults(ttl=10.0)
    results.keep("alice", "k", "first", 0.0, size=100)
    results.keep("alice", "k", "second", 5.0, size=1)
    assert results.get("alice", "k", 14.9) == "second"
    assert results.statistics() == IdempotencyStatistics(1, 1, OWNER_BYTES + RESULT_BYTES + 1, 0)


def test_an_owner_that_has_gone_is_forgotten_at_once_and_alone() -> None:
    results: IdempotentResults[int] = IdempotentResults()
    for owner in (7, 8):
        for key in range(5):
            results.keep(owner, key, key, 0.0)
    results.forget(7)
    results.forget(99)
    assert (kept(results, 7, range(5)), kept(results, 8, range(5))) == (0, 5)
    assert results.statistics().owners == 1
    results.forget(8)
    assert results.statistics() == IdempotencyStatistics(0, 0, 0, 0)


def test_the_defaults_fit_each_other() -> None:
    assert MAX_KEPT * (RESULT_BYTES + 2 * MAX_KEY_BYTES) <= MAX_BYTES


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["alice", "bob", None, 1, 2]),
            st.integers(0, 5),
            st.integers(0, 300),
            st.sampled_from([0.0, 1.0, 6.0]),
            st.booleans(),
        ),
        max_size=60,
    )
)
def test_the_counts_agree_whatever_happens(
    steps: list[tuple[Owner, int, int, float, bool]],
) -> None:
    results: IdempotentResults[int] = IdempotentResults(ttl=10.0, max_kept=8, max_bytes=9_000)
    now = 0.0
    for owner, key, size, later, forget in steps:
        now += later
        if forget:
            results.forget(owner)
        else:
            results.keep(owner, key, key, now, size)
            assert all(each.due > now for each in results._order)
        accounts = {each.account.owner: each.account for each in results._order}
        statistics = results.statistics()
        assert statistics.results == sum(len(a.kept) for a in accounts.values()) <= 8
        assert statistics.owners == len(accounts)
        held = sum(each.bytes for each in results._order) + OWNER_BYTES * len(accounts)
        assert statistics.bytes == sum(a.bytes for a in accounts.values()) == held <= 9_000
