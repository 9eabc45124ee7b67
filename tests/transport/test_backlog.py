"""Runs dropped from the mail of a slow peer, and that each place of it is looked at once."""

from collections.abc import Iterator
from typing import SupportsIndex, overload

import pytest

from broker.core.session import SlowRule
from broker.transport.backlog import Backlog, Dropped
from broker.transport.runs import GONE, Run


class Mail(list[Run]):
    """Mail that counts how often one of its places is looked at."""

    looks = 0

    @overload
    def __getitem__(self, place: SupportsIndex, /) -> Run: ...
    @overload
    def __getitem__(self, place: slice, /) -> list[Run]: ...
    def __getitem__(self, place: SupportsIndex | slice, /) -> Run | list[Run]:
        self.looks += 1
        return super().__getitem__(place)

    def __iter__(self) -> Iterator[Run]:
        self.looks += len(self)
        return super().__iter__()


def run_of(*words: str, topic: str = "t", rule: SlowRule = "drop_oldest") -> Run:
    return Run([word.encode() for word in words], topic, rule)


def words(mail: list[Run]) -> list[str]:
    return [frame.decode() for run in mail for frame in run.frames[run.first :]]


def counts(dropped: Dropped) -> tuple[int, int, int, dict[str, int]]:
    return dropped.messages, dropped.size, dropped.places, dropped.topics


# the oldest


def test_the_oldest_go_until_there_are_enough_in_messages_and_in_bytes() -> None:
    mail = [run_of("a"), run_of("bb", topic="u"), run_of("ccc"), run_of("d")]
    assert counts(Backlog(mail).drop_oldest(0, 2, 0)) == (2, 3, 2, {"t": 1, "u": 1})
    assert words(mail) == ["ccc", "d"]
    mail = [run_of("a"), run_of("bb"), run_of("ccc"), run_of("d")]
    assert counts(Backlog(mail).drop_oldest(0, 0, 4)) == (3, 6, 3, {"t": 3})
    assert words(mail) == ["d"]
    assert counts(Backlog(mail).drop_oldest(0, -5, 0)) == (0, 0, 0, {})


@pytest.mark.parametrize("messages", range(6))
def test_a_run_loses_only_as_many_frames_as_needed(messages: int) -> None:
    shared = run_of("a", "bb", "ccc", "dddd", "eeeee")
    mail = [shared]
    backlog = Backlog(mail)
    for _ in range(messages):
        assert backlog.drop_oldest(0, 1, 0).messages == 1
    assert words(mail) == ["a", "bb", "ccc", "dddd", "eeeee"][messages:]
    assert bytes(mail[0].data) == b"".join(shared.frames[messages:])
    assert shared.messages == 5  # others have it too


@pytest.mark.parametrize(("size", "left"), [(1, 3), (2, 2), (3, 2), (6, 1), (7, 0), (99, 0)])
def test_bytes_are_rounded_up_to_frames(size: int, left: int) -> None:
    mail = [run_of("a", "bb", "ccc", "dddd")]
    dropped = Backlog(mail).drop_oldest(0, 0, size)
    assert len(words(mail)) == mail[0].messages == left
    assert dropped.messages == 4 - left
    assert dropped.places == (mail[0] is GONE)


def test_neither_what_has_begun_nor_what_is_no_publication_is_dropped() -> None:
    mail = [run_of("begun"), run_of("a"), Run((b"reply",)), run_of("b")]
    assert counts(Backlog(mail).drop_oldest(1, 9, 0)) == (2, 2, 2, {"t": 2})
    assert words(mail) == ["begun", "reply"]


# the newest of each topic


def test_the_newest_of_each_topic_stays_where_it_is() -> None:
    mail = [
        *(run_of("a1", "a2", topic="a", rule="latest"), Run((b"reply",))),
        *(run_of("b1", topic="b", rule="latest"), run_of("c1", topic="a", rule="close")),
        run_of("a3", "a4", topic="a", rule="latest"),
    ]
    backlog = Backlog(mail)
    assert counts(backlog.thin(0)) == (3, 6, 1, {"a": 3})
    assert words(mail) == ["reply", "b1", "c1", "a4"]
    mail.append(run_of("b2", topic="b", rule="latest"))
    assert counts(backlog.thin(0)) == (1, 2, 1, {"b": 1})
    assert words(mail) == ["reply", "c1", "a4", "b2"]


def test_a_run_that_has_begun_is_not_thinned_out() -> None:
    mail = [run_of("a1", rule="latest"), run_of("a2", rule="latest")]
    backlog = Backlog(mail)
    assert backlog.thin(1).messages == 0
    mail.append(run_of("a3", rule="latest"))
    assert backlog.thin(2).messages == 0
    mail.append(run_of("a4", rule="latest"))
    assert backlog.thin(2).messages == 1
    assert words(mail) == ["a1", "a2", "a4"]


def test_the_rules_may_follow_each_other() -> None:
    mail = [run_of("a1", rule="latest"), run_of("b1", topic="b")]
    backlog = Backlog(mail)
    assert backlog.thin(0).messages == 0
    assert backlog.drop_oldest(0, 1, 0).topics == {"t": 1}
    mail.append(run_of("a2", rule="latest"))
    assert backlog.thin(0).messages == 0  # the older one is gone already
    backlog.drop_topic("b", 0)
    assert backlog.drop_oldest(0, 9, 0).topics == {"t": 1}
    assert words(mail) == []


# one topic


def test_a_topic_is_dropped_but_for_what_has_begun_and_again_later() -> None:
    mail = [run_of("begun"), run_of("a"), run_of("u", topic="u"), run_of("b", "c")]
    backlog = Backlog(mail)
    assert counts(backlog.drop_topic("t", 1)) == (3, 3, 2, {"t": 3})
    assert words(mail) == ["begun", "u"]
    assert backlog.drop_topic("t", 1).messages == 0
    mail.append(run_of("d"))
    assert backlog.drop_topic("t", 1).messages == 1
    assert backlog.drop_topic("nobody's", 1).messages == 0


# the cost


@pytest.mark.parametrize("rule", ["drop_oldest", "latest"])
@pytest.mark.parametrize("front", [0, 10_000], ids=["alone", "behind what stays"])
def test_a_publication_costs_the_same_however_much_waits(rule: SlowRule, front: int) -> None:
    mail = Mail([Run((b"reply",)) for _ in range(front)])
    mail.extend(run_of("x", topic=str(n), rule=rule) for n in range(10_000))
    backlog = Backlog(mail)

    def publish(number: int) -> Dropped:
        mail.append(run_of("x", topic=str(number % 10_000), rule=rule))
        return backlog.thin(0) if rule == "latest" else backlog.drop_oldest(0, 1, 0)

    publish(0)
    mail.looks = 0
    for number in range(1, 5_000):
        assert publish(number).messages == 1
    assert mail.looks < 5 * 5_000


def test_dropping_the_front_of_a_large_run_bit_by_bit_copies_nothing() -> None:
    mail = [Run([bytes(100)] * 10_000, "t", "drop_oldest")]
    backlog = Backlog(mail)
    for _ in range(5_000):
        backlog.drop_oldest(0, 1, 0)
    data = mail[0].data
    assert isinstance(data, memoryview)
    assert len(data) == 500_000
    assert len(mail[0].frames) == 10_000


def test_a_topic_costs_what_is_dropped_of_it() -> None:
    mail = Mail(run_of("x", topic=str(n % 1000)) for n in range(20_000))
    backlog = Backlog(mail)
    for number in range(1000):
        assert backlog.drop_topic(str(number), 0).messages == 20
    assert mail.looks < 5 * 20_000
