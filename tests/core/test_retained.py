"""The last value of each topic: within a bound, with a share for each, found by its tokens."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from broker.core.messages import ClientInfo, Publication
from broker.core.retained import (
    BRANCH_BYTES,
    DEPTH,
    OWNER_BYTES,
    VALUE_BYTES,
    Retained,
    RetainedStatistics,
)
from broker.core.shares import Owner, owner_of, tags_bytes, text_bytes
from broker.core.topics import is_pattern, matches

ALICE = ClientInfo("1", "alice")
BOB = ClientInfo("2", "bob")


def retain(
    retained: Retained, topic: str, data: bytes = b"1", info: ClientInfo | None = None
) -> None:
    retained.take([Publication(topic, data, info)])


def topics(retained: Retained, name: str = ">") -> list[str]:
    return sorted(value.topic for value in retained.matching(name))


def cost(values: int, owners: int = 1) -> int:
    """The cost of values of one byte in topics of one letter."""
    return values * (VALUE_BYTES + 2) + owners * OWNER_BYTES


def test_the_last_of_a_run_is_retained_for_topics_and_patterns() -> None:
    retained = Retained(10_000)
    assert retained.take([Publication("a.x", b"1"), Publication("a.x", b"2")]) == 2
    retained.take([Publication("a.y", b"3")])
    assert [value.data for value in retained.matching("a.x")] == [b"2"]
    assert [value.data for value in retained.matching("a.*")] == [b"2", b"3"]
    assert list(retained.matching("a.z")) == list(retained.matching("b.>")) == []


def test_null_clears_a_topic_and_leaves_nothing_behind() -> None:
    retained = Retained(10_000)
    retain(retained, "a.b.c.d.e.f")
    retain(retained, "a.b.c.d.e.f", b"null")
    retain(retained, "never", b"null")
    assert topics(retained) == []
    assert len(retained) == 0
    assert retained.statistics() == RetainedStatistics(0, 0, 0, 0)
    assert not retained._root.below


def test_beyond_the_bound_the_value_an_owner_retained_longest_ago_goes() -> None:
    retained = Retained(cost(2))
    for topic in ("a", "b", "a", "c"):
        retain(retained, topic)
    assert topics(retained) == ["a", "c"]
    assert retained.statistics() == RetainedStatistics(2, 1, cost(2), values_evicted=1)
    retain(retained, "big", b"1" * 5000)
    assert len(retained) == 0
    retain(retained, "a")
    assert len(retained) == 1


def test_a_smaller_bound_counts_at_once() -> None:
    retained = Retained(cost(10))
    for topic in ("a", "b", "c"):
        retain(retained, topic)
    retained.resize(cost(2))
    assert topics(retained) == ["b", "c"]
    retained.resize(cost(3))
    retain(retained, "d")
    assert topics(retained) == ["b", "c", "d"]
    retained.resize(0)
    assert retained.statistics().bytes == 0


def test_values_are_given_back_by_whoever_holds_most() -> None:
    retained = Retained(10**6)
    for number in range(10):
        retain(retained, f"a{number}", b"x" * 100, ALICE)
    retain(retained, "b", b"1", BOB)
    assert retained.heaviest_bytes > 6000
    before = retained.bytes_held
    given = retained.give_back(2000)
    assert 2000 <= given < 2700
    assert retained.bytes_held == before - given
    assert topics(retained) == [*(f"a{number}" for number in range(4, 10)), "b"]
    assert retained.give_back(10**6) == before - given
    assert (retained.bytes_held, retained.heaviest_bytes, retained.give_back(1)) == (0, 0, 0)


def test_a_topic_of_many_tokens_is_bounded_like_others() -> None:
    retained = Retained(100_000)
    for number in range(1000):
        retain(retained, f"{number}." + ".".join("a" * 100))
    assert 10 < len(retained) < 1000
    assert retained._branches == DEPTH * len(retained)
    assert retained.statistics().bytes <= 100_000


# a share for each


@pytest.mark.parametrize("innocent", [ALICE, ClientInfo("7"), None], ids=["user", "fd", "app"])
@pytest.mark.parametrize("data", [b"1", b"1" * 3000], ids=["many", "large"])
@pytest.mark.parametrize("fds", [1, 50])
def test_a_flood_of_values_costs_others_nothing(
    innocent: ClientInfo | None, data: bytes, fds: int
) -> None:
    retained = Retained(100_000)
    for number in range(40):
        retain(retained, f"mine.{number}", b"1", innocent)
    for number in range(1000):
        retain(retained, f"flood.{number}", data, ClientInfo(str(number % fds + 10), "mallory"))
    assert len(topics(retained, "mine.*")) == 40
    assert len(topics(retained, "flood.*")) >= 15


def test_a_flood_of_connections_without_a_user_costs_users_nothing() -> None:
    retained = Retained(100_000)
    for number in range(40):
        retain(retained, f"mine.{number}", b"1", ALICE)
    for fd in range(1, 1000):
        retain(retained, f"flood.{fd}", b"1", ClientInfo(str(fd)))
    assert len(topics(retained, "mine.*")) == 40


def test_a_value_belongs_to_the_last_who_replaced_it() -> None:
    retained = Retained(100_000)
    retain(retained, "a", b"1", ALICE)
    retain(retained, "a", b"22", BOB)
    assert retained.statistics() == RetainedStatistics(1, 1, cost(1) + 1, 0)
    assert retained._shares.get("alice") is None
    retain(retained, "a", b"null", ALICE)
    assert retained._shares.get("bob") is None


def test_tags_and_names_weigh_as_data_does() -> None:
    retained = Retained(100_000)
    retain(retained, "a", b"1", ALICE)
    for number in range(100):
        tags = {"text": "x" * 14_000}
        retained.take([Publication(f"b{number}", b"1", BOB, tags=tags)])
    assert len(retained) == 7
    assert topics(retained, "a") == ["a"]


# searching


def test_a_pattern_finds_its_values_without_a_look_at_the_others() -> None:
    retained = Retained(10**9)
    for number in range(10_000):
        retain(retained, f"sensors.{number}.temperature")
    retain(retained, "doors.front")
    # With the values of the sensors gone, a search that looked at one would raise.
    for branch in retained._root.below["sensors"].below.values():
        del branch.here, branch.below
    assert topics(retained, "doors.*") == ["doors.front"]
    assert topics(retained, "doors.>") == ["doors.front"]
    assert topics(retained, "*.front") == ["doors.front"]
    with pytest.raises(AttributeError):
        topics(retained, "sensors.5.*")


def test_slices_are_bounded_whether_anything_matches_or_not() -> None:
    retained = Retained(10**9)
    for number in range(1000):
        retain(retained, f"a.{number}.b.c.d")
    for pattern, found in (("a.*.b.c.d", 1000), ("a.*.b.c.>", 1000), ("a.*.b.c.e", 0), (">", 1000)):
        slices = list(retained.slices(pattern, looks=100))
        assert sum(map(len, slices)) == found
        assert len(slices) >= 1000 // 100
        assert all(len(each) <= 100 for each in slices)
    assert [len(each) for each in retained.slices("a.5.b.c.d")] == [1]


@pytest.mark.parametrize("tail", ["", ".b", ".b.c.d.e.f"])
@pytest.mark.parametrize("head", ["a", "a.b.c"])
def test_a_search_holds_while_values_come_change_and_go(head: str, tail: str) -> None:
    retained = Retained(10**9)
    for number in range(30):
        retain(retained, f"{head}.{number}{tail}", b"old")
    search = retained.slices(f"{head}.*{tail}", looks=10)
    first = next(search)
    for number in range(30):
        retain(retained, f"{head}.{number}{tail}", b"new" if number % 3 else b"null")
        retain(retained, f"{head}.{number + 100}{tail}")
        retain(retained, f"b.{number}")
    assert [value.data for value in first] == [b"old"] * len(first)
    # The subscriber has got the new ones as they were published.
    assert [value for found in search for value in found] == []
    again = retained.slices(f"{head}.*{tail}", looks=1)
    retain(retained, f"{head}.1{tail}", b"newer")
    left = [value.topic for found in again for value in found]
    assert len(left) == len(set(left)) == len(topics(retained, f"{head}.*{tail}")) - 1


OWNERS = st.sampled_from([None, ALICE, BOB, ClientInfo("4"), ClientInfo("5")])
tokens = st.sampled_from(["a", "b", ""])
TOPICS = st.lists(tokens, min_size=1, max_size=DEPTH + 2).map(".".join).filter(bool)
PATTERNS = st.builds(
    lambda head, last: ".".join([*head, last]),
    st.lists(st.sampled_from(["a", "b", "", "*"]), max_size=DEPTH + 2),
    st.sampled_from(["a", "*", ">"]),
)


class RetainedModel(RuleBasedStateMachine):
    """With room, a dict of values; without, never more than fits, and no owner below its share."""

    @initialize(room=st.sampled_from([3_000, 6_000, 10**9]))
    def start(self, room: int) -> None:
        self.retained = Retained(room)
        self.room = room
        self.model: dict[str, Publication] = {}

    @rule(topic=TOPICS, data=st.sampled_from([b"1", b"22", b"null"]), info=OWNERS)
    def take(self, topic: str, data: bytes, info: ClientInfo | None) -> None:
        value = Publication(topic, data, info, tags={"n": "1"} if data == b"22" else None)
        self.retained.take([value])
        self.model.pop(topic, None)
        if data != b"null":
            self.model[topic] = value
        if self.room < 10**9:
            here = set(topics(self.retained))
            self.model = {name: each for name, each in self.model.items() if name in here}

    @rule(name=st.one_of(TOPICS, PATTERNS), looks=st.integers(1, 5))
    def search(self, name: str, looks: int) -> None:
        fits = matches if is_pattern(name) else str.__eq__
        expected = [topic for topic in self.model if fits(name, topic)]
        found = [value for each in self.retained.slices(name, looks) for value in each]
        assert sorted(value.topic for value in found) == sorted(expected)
        assert all(self.model[value.topic] is value for value in found)

    @invariant()
    def counts_agree(self) -> None:
        owners: set[Owner] = {owner_of(value.info) for value in self.model.values()}
        branches = {
            tuple(topic.split(".", DEPTH)[:depth])
            for topic in self.model
            for depth in range(1, len(topic.split(".", DEPTH)))
        }
        weights = sum(
            VALUE_BYTES + len(each.data) + tags_bytes(each.tags) + text_bytes(each.topic)
            for each in self.model.values()
        )
        held = weights + OWNER_BYTES * len(owners) + BRANCH_BYTES * len(branches)
        statistics = self.retained.statistics()
        assert (statistics.values, statistics.owners) == (len(self.model), len(owners))
        assert statistics.bytes == held <= self.room


TestRetainedModel = RetainedModel.TestCase
TestRetainedModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
