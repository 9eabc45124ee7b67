"""Publications that are kept, for how long, within which bounds, and what can be recovered from it."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from itertools import count, pairwise, product

import attrs
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from broker.core.charges import OWNER_BYTES
from broker.core.history import (
    EXPIRED_AT_ONCE,
    META_TTL,
    TOPIC_BYTES,
    HistoryStatistics,
    HistoryStore,
    UnrecoverablePosition,
)
from broker.core.messages import ClientInfo, Position, Publication
from broker.core.quiet_topics import QUIET_BYTES
from broker.core.ring import KEPT_BYTES, SHAPE_BYTES
from broker.core.shares import Owner, owner_of, tags_bytes, text_bytes
from broker.core.topic_history import History
from broker.core.work import EVICTED, FIRST

PLENTY = 2**30


def epochs() -> Callable[[str], str]:
    """E1, E2, …: no two alike, and a test can tell how many were begun."""
    numbers = count(1)
    return lambda topic: f"E{next(numbers)}"


def store_of(max_bytes: int = PLENTY) -> HistoryStore:
    return HistoryStore(max_bytes, epochs())


def put(
    store: HistoryStore,
    topic: str,
    texts: str,
    now: float = 0.0,
    size: int = 100,
    ttl: float = 300.0,
) -> None:
    """Publish each letter of `texts`."""
    for text in texts:
        store.append(Publication(topic, text.encode()), now, size, ttl)


def texts(publications: list[Publication]) -> str:
    return b"".join(publication.data for publication in publications).decode()


def everything(store: HistoryStore, topic: str, now: float = 0.0) -> str:
    return texts(store.read(topic, now, None, -1)[0])


# keeping


@pytest.mark.parametrize("count", [1, 3, 4, 5, 9])
@pytest.mark.parametrize("before", ["", "x", "xyz", "wxyz"])
def test_several_at_once_are_kept_as_one_by_one(before: str, count: int) -> None:
    stores = store_of(), store_of()
    more = "abcdefghi"[:count]
    for store in stores:
        put(store, "a", before, size=4)
    publications = [Publication("a", text.encode(), tags={"n": text}) for text in more]
    for publication in publications:
        stores[0].append(publication, 0.0, 4, 300.0)
    kept = stores[1].extend("a", publications, 0.0, 4, 300.0)
    assert [p.offset for p in kept] == list(range(len(before) + 1, len(before) + count + 1))
    assert [p.tags for p in kept] == [p.tags for p in publications]
    assert everything(stores[0], "a") == everything(stores[1], "a") == (before + more)[-4:]
    for store in stores:  # bytes differ where the first that was kept is another one
        check_counts(store)
    assert stores[0].position("a", 0.0).offset == stores[1].position("a", 0.0).offset


RUNS = st.tuples(
    st.sampled_from("ab"),
    st.lists(st.binary(max_size=40), max_size=9),
    st.sampled_from([None, ClientInfo("7"), ClientInfo("8", "alice")]),
    st.booleans(),
    st.integers(0, 5),
    st.sampled_from([0.0, 10.0, 20.0]),
)


@settings(max_examples=300)
@given(st.lists(RUNS, max_size=30), st.sampled_from([PLENTY, 2000, 4000]))
def test_a_run_is_kept_as_its_publications_are(
    runs: list[tuple[str, list[bytes], ClientInfo | None, bool, int, float]], room: int
) -> None:
    whole, made = store_of(room), store_of(room)
    for now, (topic, contents, info, opaque, size, ttl) in enumerate(runs):
        before = [Publication(topic, data, info, opaque=opaque) for data in contents]
        expected = made.extend(topic, before, now, size, ttl)
        assert list(whole.extend_run(topic, contents, info, opaque, now, size, ttl)) == list(
            expected
        )
        assert whole.statistics() == made.statistics()
        assert whole.bytes_held == made.bytes_held
        assert whole.read(topic, now, None, -1) == made.read(topic, now, None, -1)


def test_offsets_start_at_1_and_grow_by_one_per_topic() -> None:
    store = store_of()
    sent = [Publication(topic, b"{}") for topic in ("a", "a", "b", "a")]
    assert [store.append(each, 0.0, 10, 60.0).offset for each in sent] == [1, 2, 1, 3]
    assert store.position("a", 0.0) == Position(3, "E1")
    assert store.position("b", 0.0) == Position(1, "E2")


def test_a_publication_comes_back_as_it_was_but_for_its_offset() -> None:
    sent = Publication("a", b'{"x":1}', ClientInfo("7", "alice"), time=1234)
    kept = store_of().append(sent, 0.0, 10, 60.0)
    assert kept == msgspec.structs.replace(sent, offset=1)
    assert sent.offset == 0


def test_only_the_last_ones_are_kept() -> None:
    store = store_of()
    put(store, "a", "abcde", size=3)
    publications, top = store.read("a", 0.0, None, -1)
    assert [(each.offset, each.data) for each in publications] == [(3, b"c"), (4, b"d"), (5, b"e")]
    assert top.offset == 5
    put(store, "a", "f", size=1)
    assert everything(store, "a") == "f"


@pytest.mark.parametrize(("size", "ttl"), [(0, 60.0), (10, 0.0), (-1, 60.0), (10, -1.0)])
def test_a_topic_without_history_keeps_nothing_and_begins_no_epoch(size: int, ttl: float) -> None:
    store = store_of()
    sent = Publication("a", b"1")
    assert store.append(sent, 0.0, size, ttl) is sent
    assert store.statistics() == HistoryStatistics(0, 0, 0, 0, 0, 0)


def test_turning_history_off_ends_the_epoch_so_that_nobody_recovers_across_the_hole() -> None:
    store = store_of()
    put(store, "a", "ab")
    before = store.position("a", 0.0)
    put(store, "a", "c", size=0)
    put(store, "a", "d")
    assert store.recover("a", 0.0, before) == ([], False, Position(1, "E2"))
    store.remove("a", 0.0)
    put(store, "a", "e", size=0)
    assert store.statistics().bytes == 0


# reading


@pytest.mark.parametrize(
    ("since", "limit", "reverse", "expected"),
    [
        (None, 0, False, ""),
        (None, -1, False, "cdefg"),
        (None, -2, False, "cdefg"),
        (None, 2, False, "cd"),
        (None, 100, False, "cdefg"),
        (None, 0, True, ""),
        (None, -1, True, "gfedc"),
        (None, 2, True, "gf"),
        (4, -1, False, "efg"),
        (4, 1, False, "e"),
        (4, 0, False, ""),
        (7, -1, False, ""),
        (8, -1, False, ""),
        (2**64, -1, False, ""),
        (2, -1, False, "cdefg"),
        (0, 1, False, "c"),  # a and b are gone; what is left comes without a word
        (-1, -1, False, "cdefg"),
        (5, -1, True, "dc"),
        (5, 1, True, "d"),
        (3, -1, True, ""),
        (1, -1, True, ""),
        (0, -1, True, ""),
        (-1, -1, True, ""),
        (8, 2, True, "gf"),
        (2**64, 2, True, "gf"),
    ],
)
def test_read(since: int | None, limit: int, reverse: bool, expected: str) -> None:
    store = store_of()
    put(store, "a", "abcdefg", size=5)  # offsets 3 to 7 are left
    for epoch in ("E1", ""):
        position = None if since is None else Position(since, epoch)
        found, top = store.read("a", 0.0, position, limit, reverse)
        assert texts(found) == expected
        assert top == Position(7, "E1")


@pytest.mark.parametrize("quiet", [False, True])
def test_reading_since_another_epoch_is_refused_and_names_the_one_that_is(quiet: bool) -> None:
    store = store_of()
    put(store, "a", "ab")
    if quiet:
        store.remove("a", 0.0)
    with pytest.raises(UnrecoverablePosition) as caught:
        store.read("a", 0.0, Position(1, "E9"), -1)
    assert caught.value.position == Position(2, "E1")


def test_reading_a_topic_never_published_to_finds_its_epoch() -> None:
    store = store_of()
    assert store.read("a", 0.0, None, -1) == ([], Position(0, "E1"))
    put(store, "a", "a")
    assert store.position("a", 0.0) == Position(1, "E1")


# recovering


@pytest.mark.parametrize(
    ("offset", "epoch", "expected"),
    [
        (7, "E1", ""),  # nothing was missed
        (7, "", ""),
        (6, "E1", "g"),
        (4, "", "efg"),
        (2, "E1", "cdefg"),  # the first one missed is the oldest one kept
        (1, "E1", None),
        (0, "E1", None),
        (8, "E1", None),
        (2**64, "E1", None),
        (2**64 - 1, "", None),
        (-1, "", None),
        (7, "E2", None),
        (6, "e1", None),
    ],
)
def test_a_recovery_is_complete_or_none(offset: int, epoch: str, expected: str | None) -> None:
    store = store_of()
    put(store, "a", "abcdefg", size=5)
    missed, recovered, top = store.recover("a", 0.0, Position(offset, epoch))
    assert top == Position(7, "E1")
    assert recovered is (expected is not None)
    assert texts(missed) == (expected or "")


def test_a_position_before_the_first_publication_recovers_every_one() -> None:
    store = store_of()
    seen = store.position("a", 0.0)
    assert seen == Position(0, "E1")
    assert store.recover("a", 0.0, seen) == ([], True, seen)
    put(store, "a", "abc")
    missed, recovered, _ = store.recover("a", 0.0, seen)
    assert (texts(missed), recovered) == ("abc", True)


def test_when_all_has_expired_only_who_missed_nothing_recovers() -> None:
    store = store_of()
    put(store, "a", "ab", now=0.0, ttl=10.0)
    assert store.recover("a", 10.0, Position(2, "E1")) == ([], True, Position(2, "E1"))
    assert store.recover("a", 10.0, Position(1, "E1")) == ([], False, Position(2, "E1"))
    assert store.recover("a", 10.0, Position(0, "")) == ([], False, Position(2, "E1"))


def test_removing_clears_the_publications_and_goes_on_counting() -> None:
    store = store_of()
    put(store, "a", "ab")
    store.remove("a", 0.0)
    store.remove("a", 0.0)
    store.remove("never", 0.0)
    assert everything(store, "a") == ""
    assert store.recover("a", 0.0, Position(2, "E1"))[1] is True
    assert store.recover("a", 0.0, Position(1, "E1"))[1] is False
    put(store, "a", "c")
    assert store.position("a", 0.0) == Position(3, "E1")
    assert texts(store.recover("a", 0.0, Position(2, "E1"))[0]) == "c"
    assert store.recover("a", 0.0, Position(1, "E1"))[1] is False
    assert store.statistics().quiet_topics == 0


# time


def test_publications_past_their_time_are_not_read_even_before_expire() -> None:
    store = store_of()
    put(store, "a", "a", now=0.0, ttl=10.0)
    put(store, "a", "b", now=5.0, ttl=10.0)
    assert everything(store, "a", now=9.9) == "ab"
    assert everything(store, "a", now=10.0) == "b"
    assert everything(store, "a", now=15.0) == ""
    put(store, "a", "c", now=20.0, ttl=10.0)
    assert store.position("a", 20.0) == Position(3, "E1")


def test_expire_frees_what_is_past_its_time_and_nothing_else() -> None:
    store = store_of()
    put(store, "short", "ab", now=0.0, ttl=10.0)
    put(store, "long", "ab", now=0.0, ttl=100.0)
    put(store, "short", "c", now=5.0, ttl=10.0)
    for now, topics, publications in [(9.9, 2, 5), (10.0, 2, 3), (15.0, 1, 2), (100.0, 0, 0)]:
        store.expire(now)
        statistics = store.statistics()
        assert (statistics.topics, statistics.publications) == (topics, publications), now
    assert store.statistics().bytes == 2 * QUIET_BYTES + len("shortlong")


def test_what_expires_at_one_time_is_freed_a_part_at_a_time() -> None:
    store = store_of()
    for number in range(EXPIRED_AT_ONCE + 10):
        put(store, f"t{number}", "a", now=0.0, ttl=10.0)
    assert not store.expire(9.0)
    assert store.expire(10.0)
    assert store.statistics().topics == 10
    assert not store.expire(10.0)
    assert store.statistics().topics == 0
    assert store.statistics().quiet_topics == EXPIRED_AT_ONCE + 10
    assert not store.expire(9.0 + META_TTL)
    assert store.expire(10.0 + META_TTL)
    assert not store.expire(10.0 + META_TTL)
    assert store.statistics().quiet_topics == 0


def test_topics_that_begin_and_those_that_must_go_are_work() -> None:
    store = store_of(cost(2))
    put(store, "a", "a")
    assert store.meter.done == FIRST
    put(store, "a", "a")
    assert store.meter.done == FIRST
    put(store, "b", "a")
    assert store.meter.done >= 2 * FIRST + EVICTED


def test_to_peek_shows_what_is_kept_and_changes_nothing() -> None:
    store = store_of()
    put(store, "a", "abcd", now=0.0, ttl=10.0)
    for since, limit, reverse in product((None, 0, 2, 9), (-1, 0, 3), (False, True)):
        read, _ = store.read(
            "a", 0.0, None if since is None else Position(since, ""), limit, reverse
        )
        assert store.peek("a", since, limit, reverse) == read
    assert store.peek("b", None, -1) == []
    assert store.statistics().quiet_topics == 0


def test_a_busy_topic_is_freed_when_it_stops() -> None:
    store = store_of()
    for now in range(100):
        put(store, "a", "x", now=now, size=3, ttl=10.0)
        store.expire(now)
    assert store.statistics().publications == 3
    store.expire(106.9)
    assert store.statistics().publications == 3
    store.expire(107.0)
    assert store.statistics().publications == 2
    store.expire(109.0)
    assert store.statistics().publications == 0


def test_a_new_ttl_holds_for_what_is_already_kept() -> None:
    store = store_of()
    put(store, "a", "a", now=0.0, ttl=100.0)
    put(store, "a", "b", now=1.0, ttl=10.0)
    store.expire(10.0)
    assert store.statistics().publications == 1
    store.expire(11.0)
    assert store.statistics().publications == 0


def test_a_topic_is_scheduled_once_however_often_its_ttl_changed() -> None:
    store = store_of()
    for ttl in (10.0, 20.0, 30.0, 40.0, 100.0):
        put(store, "a", "x", ttl=ttl)
    store.expire(50.0)
    assert len(store._due) == 1
    assert store.statistics().publications == 5


def test_expiring_looks_only_at_topics_that_have_something_to_free() -> None:
    store = store_of()
    for number in range(1000):
        put(store, f"long{number}", "x", ttl=1000.0)
    put(store, "short", "x", ttl=10.0)
    # With the others' rings gone, an expire that looked at one of them would raise.
    for topic, history in store._kept.items():
        if topic != "short":
            del history.ring
    store.expire(10.0)
    assert store.statistics().topics == 1000
    with pytest.raises(AttributeError):
        store.expire(1000.0)


def test_a_quiet_topic_keeps_its_epoch_until_nobody_has_asked_for_a_day() -> None:
    store = store_of()
    put(store, "a", "ab", now=0.0, ttl=10.0)
    store.expire(10.0)
    asked = 10.0 + META_TTL - 1
    store.expire(asked)
    assert store.position("a", asked) == Position(2, "E1")
    store.expire(asked + META_TTL - 1)
    assert store.statistics().quiet_topics == 1
    store.expire(asked + META_TTL)
    assert store.statistics() == HistoryStatistics(0, 0, 0, 0, 0, 0)
    put(store, "a", "c", now=asked + META_TTL)
    assert store.position("a", asked + META_TTL) == Position(1, "E2")


def test_a_topic_past_its_day_begins_a_new_epoch_even_if_nobody_called_expire() -> None:
    store = store_of()
    store.position("a", 0.0)
    store.position("b", 0.0)
    assert store.position("a", META_TTL) == Position(0, "E3")
    put(store, "b", "x", now=META_TTL)
    assert store.position("b", META_TTL) == Position(1, "E4")


@pytest.mark.parametrize("quiet", [False, True])
def test_a_topic_that_is_over_is_forgotten_with_its_epoch(quiet: bool) -> None:
    store = store_of()
    for topic in ("on", "off"):
        put(store, topic, "ab")
        if quiet:
            store.remove(topic, 0.0)
    before = {topic: store.position(topic, 0.0) for topic in ("on", "off")}
    store.forget(lambda topic: topic == "off")
    assert store.position("on", 0.0) == before["on"]
    assert store.position("off", 0.0).offset == 0
    assert store.recover("off", 0.0, before["off"])[:2] == ([], False)


# the bound on all topics


def cost(*topics: int, owners: int = 1) -> int:
    """The cost of topics of one letter with so many publications of one byte, of so many owners."""
    each = [TOPIC_BYTES + 1 + publications * (KEPT_BYTES + 1) for publications in topics]
    return sum(each) + owners * OWNER_BYTES


def test_beyond_the_bound_the_topic_published_to_longest_ago_gives_way() -> None:
    store = store_of(cost(3, 2, 1))
    put(store, "a", "abc")
    put(store, "b", "ab")
    put(store, "a", "d", size=3)  # now b was published to longest ago
    put(store, "c", "a")
    assert store.statistics().publications_evicted == 0
    put(store, "c", "b")
    assert [everything(store, topic) for topic in "abc"] == ["bcd", "b", "ab"]
    put(store, "c", "c")
    assert [everything(store, topic) for topic in "abc"] == ["bcd", "", "abc"]
    assert store.statistics().publications_evicted == 2
    # Its epoch and count are still there, so who had everything lost nothing.
    assert store.recover("b", 0.0, Position(2, "E2"))[1] is True
    assert store.recover("b", 0.0, Position(1, "E2"))[1] is False


def test_one_topic_alone_gives_up_its_own_oldest() -> None:
    store = store_of(cost(3))
    put(store, "a", "abcde")
    assert everything(store, "a") == "cde"


def test_a_publication_larger_than_the_bound_gets_its_offset_and_is_not_kept() -> None:
    store = store_of(cost(3))
    kept = store.append(Publication("a", b"x" * 10_000), 0.0, 100, 300.0)
    assert kept.offset == 1
    assert store.read("a", 0.0, None, -1) == ([], Position(1, "E1"))


def test_with_no_room_at_all_every_use_is_a_new_epoch() -> None:
    store = store_of(0)
    assert store.position("a", 0.0) == Position(0, "E1")
    assert store.append(Publication("a", b"1"), 0.0, 100, 300.0).offset == 1
    assert store.recover("a", 0.0, Position(0, "E1"))[1] is False
    assert store.statistics() == HistoryStatistics(0, 0, 0, 0, publications_evicted=1, owners=0)


def test_a_flood_of_subscriptions_is_bounded_and_leaves_half_the_room_to_publications() -> None:
    store = store_of(100 * QUIET_BYTES)
    for number in range(1000):
        store.position(f"empty{number}", 0.0)
    assert store.statistics().bytes <= store.max_bytes
    put(store, "a", "x" * 50)
    statistics = store.statistics()
    assert statistics.publications == 50
    assert statistics.bytes <= store.max_bytes
    for number in range(1000):
        store.position(f"more{number}", 0.0)
    assert everything(store, "a") == "x" * 50


def test_a_flood_of_topics_leaves_no_trail_in_the_schedule() -> None:
    store = store_of(cost(*[1] * 10))
    for number in range(10_000):
        put(store, f"topic{number}", "x")
    assert store.statistics().topics <= 10
    assert len(store._due) <= 3 * 10 + 100


# a share for each

ALICE = ClientInfo("1", "alice")
BOB = ClientInfo("2", "bob")
STRANGERS = [ClientInfo(str(fd)) for fd in range(10, 510)]


def publish(
    store: HistoryStore, topic: str, info: ClientInfo | None, number: int = 1, data: bytes = b"x"
) -> None:
    for _ in range(number):
        store.append(Publication(topic, data, info), 0.0, 100, 300.0)


def lengths(store: HistoryStore, *topics: str) -> list[int]:
    return [len(everything(store, topic)) for topic in topics]


@pytest.mark.parametrize("innocent", [ALICE, STRANGERS[0], None], ids=["user", "stranger", "app"])
@pytest.mark.parametrize(
    "flooder",
    [
        [BOB],
        [ClientInfo(str(fd), "bob") for fd in range(10, 110)],
        STRANGERS[1:2],
    ],
    ids=["user", "user with many connections", "stranger"],
)
def test_a_flood_of_topics_costs_others_nothing(
    innocent: ClientInfo | None, flooder: list[ClientInfo]
) -> None:
    store = store_of(100 * cost(10, owners=0))
    for topic in range(40):
        publish(store, f"quiet{topic}", innocent, 10)
    for number in range(3000):
        publish(store, f"flood{number}", flooder[number % len(flooder)], 1, b"x" * 500)
    assert lengths(store, *(f"quiet{topic}" for topic in range(40))) == [10] * 40
    assert store.statistics().publications > 400 + 30
    check_counts(store)


@pytest.mark.parametrize("data", [b"x", b"x" * 5000], ids=["many", "large"])
def test_a_flood_of_one_topic_costs_others_nothing(data: bytes) -> None:
    store = store_of(cost(10, 10, 100, owners=3) + 3)
    publish(store, "a", ALICE, 10)
    publish(store, "b", BOB, 10)
    publish(store, "c", STRANGERS[0], 500, data)
    assert lengths(store, "a", "b") == [10, 10]
    check_counts(store)


def test_a_flood_of_connections_without_a_user_costs_users_and_the_app_nothing() -> None:
    store = store_of(100 * cost(10, owners=0))
    publish(store, "app", None, 100)
    for topic in range(30):
        publish(store, f"alice{topic}", ALICE, 10)
    for number in range(5000):
        publish(store, f"flood{number}", STRANGERS[number % 500])
    assert lengths(store, "app", *(f"alice{topic}" for topic in range(30))) == [100] + [10] * 30
    check_counts(store)


def test_an_owner_with_publications_in_topics_of_others_gives_way_by_its_own_topics_first() -> None:
    store = store_of(70 * cost(10, owners=0))
    for topic in range(40):
        publish(store, f"alice{topic}", ALICE, 5)
    for topic in range(40):
        publish(store, f"alice{topic}", BOB)
    for number in range(3000):
        publish(store, f"bob{number}", BOB)
    assert lengths(store, *(f"alice{topic}" for topic in range(40))) == [6] * 40
    check_counts(store)


def test_an_owner_only_in_topics_of_others_costs_each_of_these_a_front_in_turn_and_no_other() -> (
    None
):
    shared = [f"shared{topic}" for topic in range(20)]
    each = cost(6, owners=0) + SHAPE_BYTES + 5_000 + 7
    store = store_of(20 * each + cost(10, 3, owners=3))
    publish(store, "closed", ALICE, 10)
    for topic in shared:
        publish(store, topic, ALICE, 5)
    for topic in shared:
        publish(store, topic, BOB, 1, b"x" * 5_000)
    assert store.statistics().publications_evicted == 0
    publish(store, "new", None, 50)
    assert lengths(store, "closed", "new") == [10, 50]
    counts = [len(store.read(topic, 0.0, None, -1)[0]) for topic in shared]
    assert 20 * 3 < sum(counts) < 20 * 5
    assert max(counts) - min(counts) <= 1
    check_counts(store)


def test_a_guest_whose_turn_has_come_at_the_front_is_the_one_to_lose_it() -> None:
    store = store_of(cost(90, 100, owners=3) + 2 * SHAPE_BYTES + 60_000 + 10)
    publish(store, "filler", None, 90)
    publish(store, "room", ALICE, 2)
    publish(store, "room", BOB, 2, b"x" * 30_000)
    publish(store, "room", ALICE, 97)  # the last one pushes out a front of hers
    publish(store, "room", ALICE)  # and this the other
    bob = store.charges.shares.get("bob")
    assert bob is not None
    assert [history.topic for history in bob.shared] == ["room"]
    publish(store, "alice", ALICE, 10)
    assert store.statistics().publications_evicted == 1
    front, *rest = store.read("room", 0.0, None, -1)[0]
    assert (front.info, len(rest)) == (BOB, 98)
    check_counts(store)


def test_a_topic_whose_front_has_become_anothers_is_passed_over() -> None:
    store = store_of(cost(100, 10, owners=3) + 200_300 + QUIET_BYTES)
    publish(store, "filler", None, 1, b"x" * 150_000)  # so that charging has begun
    publish(store, "room", BOB)
    publish(store, "room", ALICE, 99)
    publish(store, "room", BOB)  # pushes out the front, which was his
    bob = store.charges.shares.get("bob")
    assert bob is not None
    assert [history.topic for history in bob.own] == ["room"]
    store.remove("filler", 0.0)
    publish(store, "bob", BOB, 10, b"x" * 20_001)
    assert store.statistics().publications_evicted == 0
    publish(store, "bob", BOB, 20, b"x" * 50_000)
    assert store.statistics().publications_evicted > 10
    assert lengths(store, "room") == [100]
    check_counts(store)


def test_of_topics_shared_with_others_one_whose_front_is_its_own_gives_way_first() -> None:
    store = store_of(cost(5, 5, 90, owners=3) + 2 * SHAPE_BYTES + 40_010)
    publish(store, "new", None, 90)
    for topic in ("first", "second"):
        publish(store, topic, ALICE, 2)
        publish(store, topic, BOB, 3, b"x" * 5_000)
    for _ in "12":  # the two of hers are pushed out of the second
        store.append(Publication("second", b"x" * 5_000, BOB), 0.0, 5, 300.0)
    assert store.statistics().publications_evicted == 0
    bob = store.charges.shares.get("bob")
    assert bob is not None
    assert [history.topic for history in bob.shared] == ["first", "second"]
    publish(store, "new2", None, 1)
    assert store.statistics().publications_evicted == 1
    assert [len(store.read(topic, 0.0, None, -1)[0]) for topic in ("first", "second")] == [5, 4]
    check_counts(store)


def test_the_longest_ago_of_an_owners_topics_gives_way_first() -> None:
    store = store_of(cost(3, 2, 1))
    for topic, number in (("a", 3), ("b", 2), ("a", 0), ("c", 1)):
        publish(store, topic, ALICE, number)
    store.append(Publication("a", b"y", ALICE), 0.0, 3, 300.0)
    publish(store, "c", ALICE)
    assert lengths(store, "a", "b", "c") == [3, 1, 2]


def test_tags_weigh_as_data_does() -> None:
    store = store_of(100_000)
    publish(store, "a", ALICE, 20)
    for number in range(100):
        tags = {"text": "x" * 14_000, "n": str(number)}
        store.append(Publication("b", b"1", BOB, tags=tags), 0.0, 100, 300.0)
    assert lengths(store, "a") == [20]
    assert 5 <= store.statistics().publications - 20 <= 7
    check_counts(store)


def test_names_weigh_too() -> None:
    long = store_of()
    publish(long, "a" * 255, ALICE)
    long.position("b" * 255, 0.0)
    publish(short := store_of(), "a", ALICE)
    short.position("b", 0.0)
    assert long.statistics().bytes - short.statistics().bytes == 2 * 254


def test_a_topic_in_which_publishers_come_and_go_knows_only_those_who_are_there() -> None:
    store = store_of(cost(100, 100, owners=202))
    publish(store, "other", ALICE, 60, b"x" * 5_000)
    for fd in range(10_000):
        publish(store, "room", ClientInfo(str(fd)))
    assert len(store._kept["room"].members) <= 2 * 100 + 17
    assert store.statistics().owners > 90
    publish(store, "room", BOB, 100)
    publish(store, "room", ALICE, 100)
    assert store.charges.shares.get("bob") is None
    check_counts(store)


def test_a_store_gives_back_what_its_heaviest_owner_holds() -> None:
    store = store_of()
    publish(store, "alice", ALICE, 50, b"x" * 100)
    for topic in range(5):
        publish(store, f"bob{topic}", BOB, 40, b"x" * 100)
    while not store.prepare(1000):
        pass
    before = store.bytes_held
    assert store.heaviest_bytes > before * 0.7
    given = store.give_back(11_600, 0.0)
    assert 11_600 <= given < 12_100
    assert store.bytes_held == before - given
    # Bob has more, and loses the topic that he published to longest ago.
    assert lengths(store, "alice", "bob0", "bob1", "bob4") == [5000, 0, 3000, 4000]
    check_counts(store)
    # The bound is still the old one.
    publish(store, "bob0", BOB, 40, b"x" * 100)
    assert lengths(store, "bob0", "bob1") == [4000, 3000]
    assert store.give_back(10**9, 0.0) > before - given
    assert (store.bytes_held, store.heaviest_bytes, store.give_back(1, 0.0)) == (0, 0, 0)
    check_counts(store)


def test_a_store_gets_ready_to_give_back_in_steps() -> None:
    store = store_of()
    for topic in range(30):
        publish(store, f"t{topic}", ALICE, 10, b"x" * 100)
    steps = 1
    while not store.prepare(5_000):
        steps += 1
    assert 10 < steps < 25  # of 100,000 bytes
    check_counts(store)


def test_publications_kept_while_there_was_room_are_charged_before_there_is_none() -> None:
    store = store_of(400 * cost(1, owners=0))
    for number in range(199):
        publish(store, f"a{number}", ALICE)
    assert store.statistics().owners == 0
    uncharged = []
    for number in range(170):
        publish(store, f"b{number}", BOB)
        uncharged.append(len(store.charges._uncharged))
        check_counts(store)
    assert store.statistics().owners == 2
    # A few at a time, and none is left when the store is full.
    assert max(before - after for before, after in pairwise(uncharged)) <= 3
    assert uncharged[-1] == 0
    assert store.statistics().bytes < store.max_bytes
    # Once there is room again, what comes is not charged.
    for name in [
        *(f"a{number}" for number in range(199)),
        *(f"b{number}" for number in range(170)),
    ]:
        store.extend(name, (), 0.0, 0, 0)
    publish(store, "c", ALICE)
    publish(store, "d", BOB)
    assert store.statistics().owners == 1
    check_counts(store)


def test_quiet_topics_with_long_names_may_fill_a_store_in_which_little_is_charged() -> None:
    store = store_of(100_000)
    publish(store, "filler", None, 1, b"x" * 60_000)  # charging has begun
    for number in range(10):
        publish(store, f"a{number}", ALICE, 2)
    store.remove("filler", 0.0)
    for number in range(10):
        publish(store, f"a{number}", BOB, 4)  # and ended: these are not charged
    publish(store, "b", STRANGERS[0], 10)
    assert store.statistics().owners < 4
    for number in range(500):
        store.position(f"{number}".rjust(255, "q"), 0.0)
        assert store.statistics().bytes <= store.max_bytes
        check_counts(store)
    assert lengths(store, "b") == [10]


def test_charging_looks_at_each_publication_once() -> None:
    store = store_of(cost(1000))
    publish(store, "a", ALICE, 100)
    for number in range(200):
        publish(store, f"b{number}", BOB)
    looked = store.charges.shares._known._pushed
    publish(store, "a", ALICE, 500)
    assert store.charges.shares._known._pushed - looked <= 500


# against a plain list


@attrs.define
class PlainTopic:
    """A topic's history by definition: every publication there ever was, in a list."""

    epoch: str
    sent: list[tuple[float, bytes]] = attrs.field(factory=list)
    """In offset order, from 1."""
    first_kept: int = 1
    """The offset of the oldest that is still there."""
    quiet_since: float | None = None


@attrs.frozen
class Client:
    """Somebody who was here once and remembers how far it got, and what it got until then."""

    topic: str
    position: Position
    held: tuple[bytes, ...]


TOPICS = st.sampled_from(["a", "b", "c"])
OWNERS = st.sampled_from(
    [
        None,
        ClientInfo("1", "alice"),
        ClientInfo("2", "alice"),
        ClientInfo("3", "bob"),
        ClientInfo("4"),
        ClientInfo("5"),
    ]
)


class PlainModel(RuleBasedStateMachine):
    """With room enough, the store does exactly what lists do that are cut from the left."""

    META = 50.0

    @initialize()
    def start(self) -> None:
        self.store = HistoryStore(PLENTY, epochs(), meta_ttl=self.META)
        self.fresh_epoch = epochs()
        self.topics: dict[str, PlainTopic] = {}
        self.ttl: dict[str, float] = {}
        self.now = 0.0

    def look(self, name: str) -> PlainTopic:
        """The topic as it is now, begun if need be; being asked keeps a quiet one alive."""
        topic = self.topics.get(name)
        if topic is not None and topic.quiet_since is not None:
            if topic.quiet_since + self.META <= self.now:
                topic = None
            else:
                topic.quiet_since = self.now
        if topic is None:
            topic = self.topics[name] = PlainTopic(self.fresh_epoch(name), quiet_since=self.now)
        return topic

    def cut(self, name: str, topic: PlainTopic) -> None:
        """Take away what is past its time."""
        while (
            topic.first_kept <= len(topic.sent)
            and topic.sent[topic.first_kept - 1][0] + self.ttl[name] <= self.now
        ):
            topic.first_kept += 1
        if topic.first_kept > len(topic.sent) and topic.quiet_since is None:
            topic.quiet_since = self.now

    @rule(
        name=TOPICS,
        data=st.binary(max_size=3),
        size=st.integers(1, 4),
        ttl=st.sampled_from([10.0, 10.0, 10.0, 30.0]),
    )
    def append(self, name: str, data: bytes, size: int, ttl: float) -> None:
        topic = self.look(name)
        self.ttl[name] = ttl
        topic.sent.append((self.now, data))
        topic.quiet_since = None
        topic.first_kept = max(topic.first_kept, len(topic.sent) - size + 1)
        kept = self.store.append(Publication(name, data), self.now, size, ttl)
        assert kept == Publication(name, data, offset=len(topic.sent))

    @rule(name=TOPICS)
    def append_to_a_topic_without_history(self, name: str) -> None:
        self.topics.pop(name, None)
        assert self.store.append(Publication(name, b""), self.now, 0, 10.0).offset == 0

    @rule(name=TOPICS)
    def remove(self, name: str) -> None:
        topic = self.topics.get(name)
        if topic is not None and topic.quiet_since is None:
            topic.first_kept = len(topic.sent) + 1
            topic.quiet_since = self.now
        self.store.remove(name, self.now)

    @rule(name=TOPICS)
    def position(self, name: str) -> None:
        topic = self.look(name)
        assert self.store.position(name, self.now) == Position(len(topic.sent), topic.epoch)

    @rule(
        name=TOPICS,
        since=st.one_of(st.none(), st.integers(-1, 20), st.just(2**64)),
        limit=st.integers(-1, 5),
        reverse=st.booleans(),
    )
    def read(self, name: str, since: int | None, limit: int, reverse: bool) -> None:
        if name in self.topics:
            self.cut(name, self.topics[name])
        topic = self.look(name)
        kept = [
            Publication(name, data, offset=offset)
            for offset, (_, data) in enumerate(topic.sent, 1)
            if offset >= topic.first_kept
        ]
        if since is not None:
            kept = [p for p in kept if (p.offset < since if reverse else p.offset > since)]
        if reverse:
            kept.reverse()
        if limit >= 0:
            kept = kept[:limit]
        position = None if since is None else Position(since, topic.epoch)
        assert self.store.read(name, self.now, position, limit, reverse) == (
            kept,
            Position(len(topic.sent), topic.epoch),
        )

    @rule(name=TOPICS, offset=st.one_of(st.integers(-1, 20), st.just(2**64)))
    def recover(self, name: str, offset: int) -> None:
        if name in self.topics:
            self.cut(name, self.topics[name])
        topic = self.look(name)
        top = len(topic.sent)
        complete = topic.first_kept - 1 <= offset <= top
        missed, recovered, position = self.store.recover(
            name, self.now, Position(offset, topic.epoch)
        )
        assert position == Position(top, topic.epoch)
        assert recovered is complete
        expected = [data for _, data in topic.sent[offset:]] if complete else []
        assert [publication.data for publication in missed] == expected

    @rule(seconds=st.sampled_from([0.5, 4.0, 10.0, 49.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def expire(self) -> None:
        for name, topic in list(self.topics.items()):
            self.cut(name, topic)
            if topic.quiet_since is not None and topic.quiet_since + self.META <= self.now:
                del self.topics[name]
        self.store.expire(self.now)
        assert self.store.statistics().topics == sum(
            topic.quiet_since is None for topic in self.topics.values()
        )
        assert self.store.statistics().quiet_topics == sum(
            topic.quiet_since is not None for topic in self.topics.values()
        )

    @invariant()
    def counts_agree(self) -> None:
        check_counts(self.store)


class BoundedModel(RuleBasedStateMachine):
    """In a narrow store, whatever it forgets, nobody is told a wrong thing.

    Clients come and go. Recovered implies that a client now holds exactly what was published
    on its topic since its epoch began, up to the top.
    """

    @initialize(room=st.integers(0, 12))
    def start(self, room: int) -> None:
        self.store = HistoryStore(cost(room, room), epochs(), meta_ttl=20.0)
        self.sent: dict[tuple[str, str], list[bytes]] = {}
        self.clients: list[Client] = []
        self.now = 0.0

    @rule(
        name=TOPICS,
        data=st.binary(max_size=3),
        size=st.integers(1, 5),
        info=OWNERS,
        tags=st.sampled_from([None, {"a": "b"}]),
    )
    def append(
        self,
        name: str,
        data: bytes,
        size: int,
        info: ClientInfo | None,
        tags: dict[str, str] | None,
    ) -> None:
        before = self.store.position(name, self.now)
        kept = self.store.append(Publication(name, data, info, tags=tags), self.now, size, 10.0)
        after = self.store.position(name, self.now)
        if after.epoch == before.epoch:
            assert (kept.offset, after.offset) == (before.offset + 1, before.offset + 1)
            self.sent.setdefault((name, after.epoch), []).append(data)
        elif after.offset:  # so small is the room that the topic was forgotten before this came
            assert (kept.offset, after.offset) == (1, 1)
            self.sent[name, after.epoch] = [data]
        # Otherwise it was forgotten in the same breath.

    @rule(name=TOPICS, size=st.integers(1, 5), infos=st.lists(OWNERS, max_size=8))
    def extend(self, name: str, size: int, infos: list[ClientInfo | None]) -> None:
        before = self.store.position(name, self.now)
        publications = [Publication(name, b"x", info) for info in infos]
        self.store.extend(name, publications, self.now, size, 10.0)
        after = self.store.position(name, self.now)
        if after.epoch == before.epoch:
            assert after.offset == before.offset + len(infos)
            self.sent.setdefault((name, after.epoch), []).extend([b"x"] * len(infos))
        elif after.offset:
            assert after.offset == len(infos)
            self.sent[name, after.epoch] = [b"x"] * len(infos)

    @rule(name=TOPICS)
    def join(self, name: str) -> None:
        position = self.store.position(name, self.now)
        sent = self.sent.get((name, position.epoch), [])
        assert position.offset == len(sent)
        self.clients.append(Client(name, position, tuple(sent)))

    @precondition(lambda self: self.clients)
    @rule(data=st.data())
    def come_back(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.clients) - 1))
        client = self.clients[index]
        missed, recovered, top = self.store.recover(client.topic, self.now, client.position)
        if recovered:
            assert top.epoch == client.position.epoch
            held = (*client.held, *(publication.data for publication in missed))
            assert list(held) == self.sent.get((client.topic, top.epoch), [])
            assert len(held) == top.offset
            self.clients[index] = Client(client.topic, top, held)
        else:
            assert missed == []
            if top.epoch == client.position.epoch:
                assert top.offset > client.position.offset

    @rule(number=st.integers(0, 9), length=st.sampled_from([1, 200]))
    def ask_for_another(self, number: int, length: int) -> None:
        self.store.position(f"{number}" * length, self.now)

    @rule(name=TOPICS)
    def remove(self, name: str) -> None:
        self.store.remove(name, self.now)

    @rule(seconds=st.sampled_from([0.5, 4.0, 10.0, 20.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.store.expire(self.now)

    @rule(size=st.integers(0, 5000))
    def give_back(self, size: int) -> None:
        before = self.store.bytes_held
        given = self.store.give_back(size, self.now)
        assert self.store.bytes_held == before - given
        assert given >= min(size, before)

    @invariant()
    def the_bound_holds(self) -> None:
        assert self.store.statistics().bytes <= self.store.max_bytes
        check_counts(self.store)


def check_counts(store: HistoryStore) -> None:
    """The running counters say what a count from scratch says, and no ring is empty or torn."""
    for history in store._kept.values():
        offsets = [publication.offset for _, publication in history.dated()]
        assert offsets == list(range(history.top + 1 - len(offsets), history.top + 1))
        assert offsets
    weights = [each for history in store._kept.values() for _, each in weighed(history)]
    statistics = store.statistics()
    assert statistics.publications == len(weights)
    assert statistics.bytes == (
        sum(weights)
        + sum(TOPIC_BYTES + text_bytes(topic) for topic in store._kept)
        + sum(QUIET_BYTES + text_bytes(topic) for topic in store.quiet)
        + OWNER_BYTES * len(store.charges.shares)
    )
    assert not store._kept.keys() & {*store.quiet}
    check_shares(store)


def check_shares(store: HistoryStore) -> None:
    """Each owner is charged for what is its own, and knows where that is."""
    charged: Counter[Owner] = Counter()
    places: dict[Owner, set[str]] = defaultdict(set)
    for history in store._kept.values():
        for publication, weight in weighed(history):
            if publication.offset <= history.charged:
                charged[owner_of(publication.info)] += weight
                places[owner_of(publication.info)].add(history.topic)
        if history.payer is not None:
            charged[history.payer.owner] += history.bytes
            places[history.payer.owner].add(history.topic)
    quiet = store.quiet._topics
    for topic, each in quiet.items():
        payer = each.payer
        if payer is None:
            assert topic in store.quiet._unpaid
        else:
            charged[payer.owner] += QUIET_BYTES + text_bytes(topic)
            assert topic in payer.quiet
    assert all(quiet[topic].payer is None for topic in store.quiet._unpaid)
    accounts = {owner: store.charges.shares.get(owner) for owner in charged}
    charged += Counter(dict.fromkeys(charged, OWNER_BYTES))
    assert charged == {owner: account and account.bytes for owner, account in accounts.items()}
    assert store.statistics().owners == len(charged)
    assert sum(charged.values()) == store.charges.shares.bytes
    for owner, account in accounts.items():
        assert account is not None
        assert not account.own.keys() & account.shared.keys()
        assert all(quiet[topic].payer is account for topic in account.quiet)
        topics = {history.topic for history in (*account.own, *account.shared)}
        assert places[owner] <= topics <= store._kept.keys()
        for history in (*account.own, *account.shared):
            assert account in history.members
            assert store._kept[history.topic] is history


def weighed(history: History) -> Iterator[tuple[Publication, int]]:
    """Publications with their bytes: those of their shape where it is another than of that before."""
    before: Publication | None = None
    for place, (_, each) in enumerate(history.dated()):
        alone = len(each.data) + KEPT_BYTES + tags_bytes(each.tags)
        if before is None:  # it may be the first of its shape, behind what is gone
            assert history.ring.weight(place) in (alone, alone + SHAPE_BYTES)
        else:
            is_other = each.info is not before.info or each.tags is not before.tags
            is_other = is_other or (each.opaque, each.time) != (before.opaque, before.time)
            assert history.ring.weight(place) == alone + (SHAPE_BYTES if is_other else 0)
        yield each, history.ring.weight(place)
        before = each


TestPlainModel = PlainModel.TestCase
TestPlainModel.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
TestBoundedModel = BoundedModel.TestCase
TestBoundedModel.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
