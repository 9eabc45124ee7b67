"""What was done once is not done again, within five minutes and ten thousand results."""

from broker.core.idempotency import Once


def test_a_result_is_kept_until_its_time_is_over() -> None:
    once: Once[str] = Once(ttl=300.0)
    assert once.get("k", 0.0) is None
    once.keep("k", "done", 0.0)
    assert once.get("k", 299.9) == "done"
    assert once.get("other", 299.9) is None
    assert once.get("k", 300.0) is None
    assert len(once) == 0


def test_beyond_the_bound_the_oldest_is_forgotten() -> None:
    once: Once[int] = Once(max_kept=2)
    for number in range(3):
        once.keep(number, number, float(number))
    assert [once.get(number, 3.0) for number in range(3)] == [None, 1, 2]
    assert len(once) == 2
