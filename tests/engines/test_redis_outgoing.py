"""All that a node has for the log, from when it is said until nobody waits for it any more."""

from collections.abc import Callable

import trio
from trio.testing import MockClock

from broker import Refused
from broker.config.settings import TopicRules
from broker.core.messages import PUBLICATION_BYTES, ClientInfo, Position, Publication, Series
from broker.core.session import Parcel, Report
from broker.core.work import Allowance
from broker.engines.engine import SUBMISSION_BYTES, IdempotencyKey, Submission
from broker.engines.redis_log import Draft, Flight
from broker.engines.redis_outgoing import (
    BATCH_RUNS,
    JOINED_BYTES,
    NOT_KNOWN,
    PUBLISH_SECONDS,
    Outgoing,
    Post,
    decode_posted,
)
from broker.engines.waiting import BATCH_BYTES, BATCH_PUBLICATIONS, FULL_BYTES

Answer = Position | Refused | None

RULES = TopicRules()
INFO = ClientInfo("a")
PARTY = Allowance()


def outgoing() -> tuple[Outgoing, list[str]]:
    woken: list[str] = []
    return Outgoing(lambda: woken.append("woken")), woken


def submission(answers: list[Answer], size: int = 1, topic: str = "t") -> Submission:
    parcel = Parcel(topic, "close", [[Publication(topic, b"1" * size)]])
    return Submission(parcel, TopicRules(), dones=[answers.append])


async def test_all_is_taken_in_the_order_in_which_it_was_said(autojump_clock: MockClock) -> None:
    items, woken = outgoing()
    items.post(submission([], topic="a"))
    items.note(Draft("m", "node"), lasts=False)
    items.order("R", "a")
    assert woken == ["woken"] * 3
    drafts, taken = items.gather()
    assert [draft.topic for draft in drafts] == ["a", "node", "a"]
    assert (len(taken), len(items), items.taken, items.submitted) == (3, 0, 1, 1)


async def test_more_than_a_batch_holds_waits_for_the_next(autojump_clock: MockClock) -> None:
    items, woken = outgoing()
    for _ in range(BATCH_RUNS + 1):
        items.post(submission([]))
    woken.clear()
    assert [len(items.gather()[0]) for _ in range(2)] == [BATCH_RUNS, 1]
    assert woken == ["woken"], "there was more"


async def test_who_publishes_one_is_in_the_next_batch_whatever_another_has_put(
    autojump_clock: MockClock,
) -> None:
    items, _ = outgoing()
    for number in range(50):
        flood = submission([], BATCH_BYTES, topic=f"t{number}")
        flood.parcel.payer = Allowance()
        items.post(flood)
    one = submission([], topic="one")
    one.parcel.payer = Allowance()
    items.gather()
    items.post(one)
    assert "one" in [draft.topic for draft in items.gather()[0]]


def said(
    answers: list[Answer], *contents: bytes, topic: str = "t", rules: TopicRules = RULES
) -> Submission:
    """A run of what one client says."""
    parcel = Parcel(topic, "close", [Series(topic, contents, INFO)], payer=PARTY)
    return Submission(parcel, rules, dones=[answers.append])


async def test_runs_on_a_topic_that_wait_go_as_one_and_each_is_told_its_place(
    autojump_clock: MockClock,
) -> None:
    items, _ = outgoing()
    answers: list[list[Answer]] = [[], [], []]
    for each, contents in zip(answers, ((b"1", b"2"), (b"3",), (b"4", b"5")), strict=True):
        items.post(said(each, *contents))
    (draft,), (item,) = items.gather()
    assert isinstance(item, Post)
    (batch,) = decode_posted(draft.data).batches
    assert (batch.data, draft.count) == ([b"1", b"2", b"3", b"4", b"5"], 5)
    (run,) = item.submission.parcel.batches
    assert [each.data for each in run] == batch.data, "this is what is given out"
    item.end(Position(15, "e"))
    item.end(Position(99, "e"))
    assert answers == [[Position(12, "e")], [Position(13, "e")], [Position(15, "e")]]
    assert items.waiting
    items.note_over(item)
    assert not items.waiting


async def test_runs_that_go_as_one_are_refused_as_one(autojump_clock: MockClock) -> None:
    items, _ = outgoing()
    answers: list[Answer] = []
    for _ in range(3):
        items.post(said(answers, b"1"))
    _, (item,) = items.gather()
    items.refuse(item, NOT_KNOWN)
    assert [type(each) for each in answers] == [Refused] * 3


async def test_runs_of_several_publishers_go_as_one_in_their_order(
    autojump_clock: MockClock,
) -> None:
    items, _ = outgoing()
    for client, content in (("a", b"1"), ("b", b"2"), ("b", b"3"), ("a", b"4")):
        one = said([], content)
        one.parcel.batches = [
            Series("t", (content,), ClientInfo(client) if client == "b" else INFO)
        ]
        items.post(one)
    ((draft,), _) = items.gather()
    batches = decode_posted(draft.data).batches
    assert [(each.by and each.by.client, each.data) for each in batches] == [
        ("a", [b"1"]),
        ("b", [b"2"]),
        ("b", [b"3"]),
        ("a", [b"4"]),
    ]


async def test_what_is_for_itself_goes_by_itself(autojump_clock: MockClock) -> None:
    def changed(change: Callable[[Submission], object]) -> Submission:
        other = said([], b"2")
        change(other)
        return other

    others = [
        said([], b"2", topic="u"),
        said([], b"2", rules=TopicRules(history_size=7)),
        changed(lambda one: setattr(one, "keep", False)),
        changed(lambda one: setattr(one, "retain", True)),
        changed(lambda one: setattr(one, "key", IdempotencyKey(None, "k"))),
        changed(lambda one: setattr(one.parcel, "payer", Allowance())),
        changed(lambda one: setattr(one.parcel, "report", Report())),
        changed(lambda one: setattr(one.parcel, "report_to", "n 1")),
        changed(lambda one: setattr(one.parcel, "exclude", frozenset({3}))),
        changed(lambda one: setattr(one.parcel, "batches", [[Publication("t", b"2")]])),
    ]
    for other in others:
        for pair in ((said([], b"1"), other), (other, said([], b"1"))):
            items, _ = outgoing()
            for each in pair:
                items.post(each)
            assert len(items.gather()[0]) == 2, other


async def test_what_lies_between_two_runs_keeps_them_apart(autojump_clock: MockClock) -> None:
    items, _ = outgoing()
    items.post(said([], b"1"))
    items.order("R", "t")
    items.post(said([], b"2"))
    items.post(said([], b"3", topic="u"))
    items.post(said([], b"4"))
    assert [draft.flags + draft.topic for draft in items.gather()[0]] == [
        "kt",
        "Rt",
        "kt",
        "ku",
        "kt",
    ]


async def test_as_much_goes_as_one_as_a_read_holds(autojump_clock: MockClock) -> None:
    items, _ = outgoing()
    for _ in range(4):
        items.post(said([], b"1" * (JOINED_BYTES // 2 - SUBMISSION_BYTES - PUBLICATION_BYTES)))
    assert [draft.count for draft in items.gather()[0]] == [2, 2]
    items.post(said([], b"1" * JOINED_BYTES))
    items.post(said([], b"1"))
    assert [draft.count for draft in items.gather()[0]] == [1, 1]


async def test_who_came_later_is_not_refused_with_who_has_waited_long(
    autojump_clock: MockClock,
) -> None:
    items, _ = outgoing()
    first: list[Answer] = []
    second: list[Answer] = []
    items.post(said(first, b"1"))
    await trio.sleep(PUBLISH_SECONDS - 1)
    items.post(said(second, b"2"))
    drafts, sent = items.gather()
    flight = Flight(1, drafts, sent, trio.current_time())
    await trio.sleep(1)
    assert items.refuse_overdue([flight], "")
    assert (len(first), second) == (1, [])


async def test_a_batch_has_a_bound_in_publications(autojump_clock: MockClock) -> None:
    items, _ = outgoing()
    for _ in range(3):
        batch = [Publication("t", b"1")] * BATCH_PUBLICATIONS
        items.post(Submission(Parcel("t", "close", [batch]), TopicRules()))
    assert len(items.gather()[0]) == 1


async def test_who_waits_for_room_goes_on_when_enough_is_over(autojump_clock: MockClock) -> None:
    items, _ = outgoing()
    items.post(submission([], FULL_BYTES))
    assert items.items.is_full()
    goes_on: list[float] = []

    async def wait() -> None:
        await items.items.wait_room()
        goes_on.append(trio.current_time())

    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.sleep(1)
        _, (item,) = items.gather()
        assert not goes_on, "it is on its way, and counts"
        items.note_over(item)
        items.note_over(item)
    assert goes_on == [began + 1]
    assert items.waiting == 0, "once"


async def test_what_waits_too_long_is_refused_and_notices_are_not(
    autojump_clock: MockClock,
) -> None:
    items, _ = outgoing()
    answers: list[Answer] = []
    items.post(submission(answers))
    items.note(Draft("p", "name"), lasts=True)
    await trio.sleep(PUBLISH_SECONDS - 1)
    assert not items.refuse_overdue((), "")
    await trio.sleep(1)
    assert items.refuse_overdue((), "no link")
    (refused,) = answers
    assert isinstance(refused, Refused)
    assert refused.message == "not kept: no link"
    assert [item.topic for item in items] == ["name"]


async def test_of_what_was_sent_nobody_is_told_that_it_is_not_kept(
    autojump_clock: MockClock,
) -> None:
    items, _ = outgoing()
    answers: list[Answer] = []
    items.post(submission(answers))
    drafts, taken = items.gather()
    flight = Flight(1, drafts, taken, trio.current_time())
    await trio.sleep(PUBLISH_SECONDS)
    assert items.refuse_overdue([flight], "no link")
    (refused,) = answers
    assert isinstance(refused, Refused)
    assert "not known" in refused.message
    assert flight.is_given_up
    assert not items.refuse_overdue([flight], "no link"), "once"


async def test_of_a_dead_node_nothing_is_said_any_more(autojump_clock: MockClock) -> None:
    items, _ = outgoing()
    items.note(Draft("p", "name"), lasts=True)
    items.order("R", "t")
    items.drop_notes()
    assert [item.topic for item in items] == ["t"]
    assert items.orders == {"t": 1}
    items.refuse_all("stopped")
    assert (len(items), items.waiting, items.orders) == (0, 0, {})
