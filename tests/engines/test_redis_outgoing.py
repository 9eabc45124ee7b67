"""All that a node has for the log, from when it is said until nobody waits for it any more."""

import trio
from trio.testing import MockClock

from broker import Refused
from broker.config.settings import TopicRules
from broker.core.messages import Position, Publication
from broker.core.session import Parcel
from broker.core.work import Allowance
from broker.engines.engine import Submission
from broker.engines.redis_log import Draft, Flight
from broker.engines.redis_outgoing import (
    BATCH_RUNS,
    PUBLISH_SECONDS,
    Outgoing,
)
from broker.engines.waiting import BATCH_BYTES, BATCH_PUBLICATIONS, FULL_BYTES

Answer = Position | Refused | None


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
