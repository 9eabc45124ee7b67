"""The last value of each topic, within a bound."""

from broker.core.messages import Publication
from broker.core.retained import VALUE_BYTES, Retained


def test_the_last_of_a_run_is_retained_for_topics_and_patterns() -> None:
    retained = Retained(10_000)
    assert retained.take([Publication("a.x", b"1"), Publication("a.x", b"2")]) == 2
    retained.take([Publication("a.y", b"3")])
    assert [value.data for value in retained.matching("a.x")] == [b"2"]
    assert [value.data for value in retained.matching("a.*")] == [b"2", b"3"]
    assert retained.matching("a.z") == retained.matching("b.>") == []


def test_null_clears_a_topic() -> None:
    retained = Retained(10_000)
    retained.take([Publication("a", b"1")])
    retained.take([Publication("a", b"null")])
    assert retained.matching("a") == []
    assert len(retained) == 0


def test_beyond_the_bound_the_value_retained_longest_ago_goes() -> None:
    retained = Retained(2 * (VALUE_BYTES + 1))
    for topic in ("a", "b", "a", "c"):
        retained.take([Publication(topic, b"1")])
    assert [value.topic for value in retained.matching(">")] == ["a", "c"]
    retained.take([Publication("big", b"1" * 2000)])
    assert len(retained) == 0
    retained.take([Publication("a", b"1")])
    assert len(retained) == 1


def test_a_smaller_bound_counts_at_once() -> None:
    retained = Retained(10 * (VALUE_BYTES + 1))
    for topic in ("a", "b", "c"):
        retained.take([Publication(topic, b"1")])
    retained.resize(2 * (VALUE_BYTES + 1))
    assert [value.topic for value in retained.matching(">")] == ["b", "c"]
    retained.resize(3 * (VALUE_BYTES + 1))
    retained.take([Publication("d", b"1")])
    assert [value.topic for value in retained.matching(">")] == ["b", "c", "d"]
