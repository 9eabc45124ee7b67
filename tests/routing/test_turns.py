"""The queue of those who have used up their share of the loop, and one party's share of it."""

from functools import partial

import pytest
import trio
from trio.testing import (
    MockClock,
    assert_checkpoints,
    assert_no_checkpoints,
    wait_all_tasks_blocked,
)

from broker.core.work import BURST, COMMAND, DEBT, LITTLE, ROUND, SHARE, SLICE, SWEEP
from broker.routing.turns import Share, Turns


class Clock(trio.abc.Instrument):
    """Counts how often all tasks that can run have run."""

    ticks = 0

    def after_io_wait(self, timeout: float) -> None:
        self.ticks += 1


class Queue:
    """Parties that wait for a turn: in which order they came, and what each was given in which tick."""

    def __init__(self) -> None:
        self.turns = Turns()
        self.clock = Clock()
        self.came: list[str] = []
        self.had: dict[str, tuple[int, float]] = {}
        trio.lowlevel.add_instrument(self.clock)

    async def wait(self, name: str, work: float | None = None) -> None:
        self.came.append(name)
        granted = await self.turns.wait(work)
        self.had[name] = self.clock.ticks, granted

    def rounds(self) -> list[list[str]]:
        """Who had a turn in one round, in the order in which they came."""
        ticks = sorted({tick for tick, _ in self.had.values()})
        return [[each for each in self.came if self.had[each][0] == tick] for tick in ticks]


async def all_wait(works: dict[str, float | None]) -> Queue:
    """A queue that all of these have come to in one tick, in whichever order."""
    queue = Queue()
    async with trio.open_nursery() as nursery:
        for name, work in works.items():
            nursery.start_soon(queue.wait, name, work)
    return queue


async def test_one_alone_has_a_slice_beside_its_act(autojump_clock: MockClock) -> None:
    turns = Turns()
    with assert_checkpoints():
        assert await turns.wait() == SLICE
    assert await turns.wait(100 * SLICE) == 101 * SLICE, "an act may be of any size"


async def test_who_cannot_say_what_comes_is_alone_between_two_turns_of_everybody_else(
    autojump_clock: MockClock,
) -> None:
    queue = await all_wait(dict.fromkeys("abcd"))
    assert queue.rounds() == [[each] for each in queue.came]
    assert {granted for _, granted in queue.had.values()} == {SLICE}


async def test_those_with_little_to_do_go_together(autojump_clock: MockClock) -> None:
    queue = await all_wait(dict.fromkeys("abcdefgh", 10.0))
    first, *others = queue.came
    assert queue.rounds() == [[first], others]
    assert queue.had[first][1] == 10 + SLICE
    for each in others:
        assert queue.had[each][1] == pytest.approx(10 + SLICE / 7), "one slice, in equal parts"


@pytest.mark.parametrize(
    "works",
    [
        dict.fromkeys("abcdefghijkl", ROUND / 3),
        dict.fromkeys("abcd", ROUND),
        dict.fromkeys("abcd", 100 * ROUND),
        {**dict.fromkeys("abcdef", ROUND / 4), **dict.fromkeys("uvwxyz")},
    ],
    ids=["three fill one", "one fills one", "more than one", "some say nothing"],
)
async def test_a_round_is_full_when_the_acts_that_were_named_fill_it(
    autojump_clock: MockClock, works: dict[str, float | None]
) -> None:
    queue = await all_wait(works)
    first, *waiting = queue.came
    expected = [[first]]
    while waiting:
        left, together = ROUND, []
        while waiting and left > 0:
            together.append(waiting.pop(0))
            left -= works[together[-1]] or ROUND
        expected.append(together)
    assert queue.rounds() == expected


async def test_those_who_come_wait_once_they_have_filled_a_round(
    autojump_clock: MockClock,
) -> None:
    turns = Turns()
    for _ in range(10):
        with assert_no_checkpoints():
            await turns.enter(ROUND / 10)
    with assert_checkpoints():
        await turns.enter(1.0)
    with assert_no_checkpoints():
        await turns.enter(1.0)
    assert turns.meter.done == ROUND + 2


async def test_a_crowd_that_comes_at_once_enters_a_round_at_a_time(
    autojump_clock: MockClock,
) -> None:
    queue = Queue()

    async def come(name: str) -> None:
        queue.came.append(name)
        await queue.turns.enter(ROUND / 10)
        queue.had[name] = queue.clock.ticks, 0.0

    async with trio.open_nursery() as nursery:
        for number in range(95):
            nursery.start_soon(come, str(number))
    assert max(map(len, queue.rounds())) == 10
    assert [each for some in queue.rounds() for each in some] == queue.came
    assert queue.turns.meter.done == pytest.approx(9.5 * ROUND)


async def test_bursts_of_many_fill_a_round_and_others_may_do_a_little_then(
    autojump_clock: MockClock,
) -> None:
    turns = Turns()
    for _ in range(int(ROUND / BURST)):
        one = Share(turns=turns)
        with assert_no_checkpoints():
            await one.wait_room(BURST)
        one.spend(BURST)
    late = Share(turns=turns)
    with assert_no_checkpoints():
        await late.wait_room(LITTLE)
    late.spend(LITTLE)
    with assert_checkpoints():
        await Share(turns=turns).wait_room(LITTLE + 1)
    with assert_no_checkpoints():  # everybody else has run
        await Share(turns=turns).wait_room(BURST)


async def test_a_turn_is_as_long_as_ever_whatever_others_do_at_once(
    autojump_clock: MockClock,
) -> None:
    turns = Turns()
    one = Share(turns=turns)
    await one.wait_slice(BURST + 1)
    Share(turns=turns).spend(ROUND)
    with assert_no_checkpoints():
        await one.wait_room(BURST)
    assert one.left == BURST  # as it was


async def test_a_party_that_is_cancelled_gives_up_its_place(autojump_clock: MockClock) -> None:
    queue = Queue()
    async with trio.open_nursery() as nursery:
        for name in "abc":
            nursery.start_soon(queue.wait, name)
        with trio.CancelScope() as scope:
            scope.cancel()
            await queue.turns.wait()
        await wait_all_tasks_blocked()
    assert len(queue.had) == 3
    with trio.CancelScope() as scope:
        scope.cancel()
        await queue.turns.wait()  # nobody else waits
    assert scope.cancelled_caught
    assert await queue.turns.wait() == SLICE


async def test_a_party_that_is_cancelled_in_the_queue_is_passed_over(
    autojump_clock: MockClock,
) -> None:
    queue = Queue()
    scopes = [trio.CancelScope() for _ in range(4)]

    async def wait(number: int) -> None:
        with scopes[number]:
            await queue.wait(str(number))

    async with trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(wait, number)
        while len(queue.came) < 4:  # noqa: ASYNC110 - there is no event for it
            await trio.lowlevel.checkpoint()
        last = int(queue.came[-1])
        scopes[last].cancel()
    assert sorted(queue.had) == sorted(set("0123") - {str(last)})
    assert await queue.turns.wait() == SLICE


# the share of one party


async def test_nobody_waits_behind_parties_that_were_cancelled_and_have_not_run_since(
    autojump_clock: MockClock,
) -> None:
    turns, ready = Turns(), trio.Event()
    again = 0

    async def party() -> None:
        nonlocal again
        has_had_one = False
        with trio.CancelScope() as own:
            scopes.append(own)
            await ready.wait()
            await turns.wait()  # the first of all is not cancelled any more: it has its turn
            has_had_one = True
        if has_had_one:
            await turns.wait()
            again += 1

    scopes: list[trio.CancelScope] = []
    with trio.fail_after(1):
        async with trio.open_nursery() as nursery:
            for _ in range(50):
                nursery.start_soon(party)
            await wait_all_tasks_blocked()
            ready.set()
            await trio.lowlevel.checkpoint()
            for each in scopes:
                each.cancel()
    assert again <= 1
    assert turns.is_free


async def test_a_burst_is_done_at_once_and_then_all_others_come_first(
    autojump_clock: MockClock,
) -> None:
    share = Share(turns=Turns())
    with assert_no_checkpoints():
        await share.wait_room(BURST)
        share.spend(BURST - 1)
        await share.wait_room(1)
        share.spend(1)
    assert not share.has_room()
    with assert_checkpoints():
        await share.wait_room()
    with assert_no_checkpoints():  # its slice
        share.spend(SLICE / 2)
        await share.wait_room(SLICE / 3)
    with assert_checkpoints():
        await share.wait_room(SLICE)


async def test_an_act_of_any_size_has_a_turn(autojump_clock: MockClock) -> None:
    share = Share(turns=Turns())
    with assert_checkpoints():
        await share.wait_room(50 * ROUND)
    assert share.has_room(50 * ROUND)


async def test_what_is_left_of_a_turn_is_not_for_an_act_that_is_larger(
    autojump_clock: MockClock,
) -> None:
    share = Share(turns=Turns())
    await share.wait_room(ROUND)
    share.spend(ROUND + COMMAND + SLICE - 10)
    assert share.has_room(10)
    assert not share.has_room(BURST)


async def test_what_is_to_be_done_by_itself_is_alone_in_its_round(
    autojump_clock: MockClock,
) -> None:
    turns = Turns()
    shares = [Share(turns=turns) for _ in range(5)]
    rounds: list[float] = []
    done = 0.0

    async def work(share: Share) -> None:
        nonlocal done
        for _ in range(10):
            await share.wait_slice(SLICE / 2)
            share.spend(SLICE / 2)
            done += SLICE / 2

    async with trio.open_nursery() as nursery:
        for share in shares:
            with assert_no_checkpoints():  # its burst
                await share.wait_slice(BURST)
            share.spend(BURST)
            nursery.start_soon(work, share)
        while done < 5 * 10 * SLICE / 2:
            before = done
            await trio.lowlevel.checkpoint()
            rounds.append(done - before)
    assert max(rounds) <= 2 * SLICE  # one before, and one after somebody looked


async def test_a_share_fills_with_time(autojump_clock: MockClock) -> None:
    share = Share(turns=Turns())
    share.spend(BURST + DEBT)
    assert not share.begin()
    await trio.sleep(1 + DEBT / (SHARE * 1_000_000))
    assert share.begin()
    assert not share.is_used_up
    assert share.admits(BURST)


async def test_a_step_of_which_nobody_knows_what_comes_is_alone(autojump_clock: MockClock) -> None:
    queue = Queue()
    shares = [Share(turns=queue.turns) for _ in range(3)]
    ticks: list[int] = []

    async def work(share: Share) -> None:
        share.spend(BURST)
        assert not share.begin()
        await share.wait_turn()
        ticks.append(queue.clock.ticks)

    async with trio.open_nursery() as nursery:
        for share in shares:
            nursery.start_soon(partial(work, share))
    assert len(set(ticks)) == 3


async def used_up_after_a_turn(turns: Turns) -> Share:
    share = Share(turns=turns)
    share.spend(BURST)
    await share.wait_room()
    share.spend(2 * SLICE)
    assert not share.has_room()
    return share


async def test_a_party_does_not_queue_behind_itself(autojump_clock: MockClock) -> None:
    share = await used_up_after_a_turn(Turns())
    share.renew()
    assert share.has_room(SLICE)


async def test_a_party_whose_turn_was_not_the_last_has_none_at_once(
    autojump_clock: MockClock,
) -> None:
    turns = Turns()
    first = await used_up_after_a_turn(turns)
    second = await used_up_after_a_turn(turns)
    first.renew()
    assert not first.has_room()
    await turns.wait()  # by nobody's share
    second.renew()
    assert not second.has_room()


async def test_a_party_has_no_turn_at_once_while_another_waits(autojump_clock: MockClock) -> None:
    turns = Turns()
    share = await used_up_after_a_turn(turns)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(turns.wait)
        nursery.start_soon(turns.wait)
        while turns.is_free:  # noqa: ASYNC110 - nothing announces that
            await trio.lowlevel.checkpoint()
        turns.latest = share  # also if one of them has had its turn by now
        share.renew()
        assert not share.has_room()


async def test_a_turn_that_is_paid_for_is_counted_when_it_has_come() -> None:
    turns = Turns()
    await turns.pay(7.0)
    assert turns.meter.done == 7.0
    with trio.CancelScope() as scope:
        scope.cancel()
        await turns.pay(7.0)
    assert (turns.meter.done, turns.is_free) == (7.0, True)


async def test_new_objects_are_looked_at_behind_so_much_work(autojump_clock: MockClock) -> None:
    looks: list[float] = []
    turns = Turns(collect=lambda: looks.append(turns.meter.done))
    for _ in range(100):
        await turns.pay(SWEEP / 10)
    assert looks == [SWEEP * n for n in range(1, 10)]
    turns.sweep()
    turns.meter.add(SWEEP / 2)
    await turns.wait()
    assert len(looks) == 10, "it had been looked at meanwhile"
