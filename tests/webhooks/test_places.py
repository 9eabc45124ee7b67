"""Places for requests: how many, for whom, and who is next."""

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from broker.webhooks.places import NoPlace, Places, PlaceStatistics


class Pool:
    """Holders of places, each of which leaves when it is told to."""

    def __init__(self, total: int, share: int, nursery: trio.Nursery) -> None:
        self.places = Places(total, share)
        self.nursery = nursery
        self.held: list[str] = []
        self._leave: dict[str, trio.Event] = {}
        self._scopes: dict[str, trio.CancelScope] = {}
        self.reasons: dict[str, NoPlace] = {}

    async def come(self, *names: str, seconds: float = 60) -> None:
        """`ann1` is a request of the party `ann`."""
        for name in names:
            self._leave[name] = trio.Event()
            self._scopes[name] = trio.CancelScope()
            self.nursery.start_soon(self._hold, name, seconds)
            await wait_all_tasks_blocked()

    async def leave(self, *names: str) -> None:
        for name in names:
            self._leave[name].set()
        await wait_all_tasks_blocked()

    async def cancel(self, name: str) -> None:
        self._scopes[name].cancel()
        await wait_all_tasks_blocked()

    def cancel_nowait(self, name: str) -> None:
        self._scopes[name].cancel()

    def leave_nowait(self, name: str) -> None:
        self._leave[name].set()

    async def _hold(self, name: str, seconds: float) -> None:
        with self._scopes[name]:
            try:
                async with self.places.place(name.rstrip("0123456789"), seconds):
                    self.held.append(name)
                    try:
                        await self._leave[name].wait()
                    finally:
                        self.held.remove(name)
            except NoPlace as error:
                self.reasons[name] = error


async def test_no_more_hold_a_place_than_there_are(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    pool = Pool(3, 3, nursery)
    await pool.come("a1", "b1", "c1", "d1")
    assert pool.held == ["a1", "b1", "c1"]
    assert pool.places.statistics() == PlaceStatistics(taken=3, waiting=1)
    await pool.leave("b1")
    assert pool.held == ["a1", "c1", "d1"]
    await pool.leave("a1", "c1", "d1")
    assert pool.places.statistics() == PlaceStatistics(taken=0, waiting=0)


async def test_one_party_holds_its_share_at_most_and_others_have_the_rest(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    pool = Pool(4, 2, nursery)
    await pool.come(*(f"ann{n}" for n in range(500)))
    assert pool.held == ["ann0", "ann1"]
    await pool.come("bob0", "cid0", "dan0")
    assert pool.held == ["ann0", "ann1", "bob0", "cid0"]
    await pool.leave("ann0")
    # Ann's own is free again, but Dan waits as well, and she came first.
    assert len(pool.held) == 4
    await pool.leave("bob0")
    assert "dan0" in pool.held
    nursery.cancel_scope.cancel()


async def test_parties_take_turns_and_each_has_its_own_in_order(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    pool = Pool(1, 1, nursery)
    await pool.come("x1", "ann1", "ann2", "ann3", "bob1", "cid1", "bob2")
    order = []
    for _ in range(7):
        (holder,) = pool.held
        order.append(holder)
        await pool.leave(holder)
    assert order == ["x1", "ann1", "bob1", "cid1", "ann2", "bob2", "ann3"]


async def test_a_wait_is_bounded_and_says_why_it_was_in_vain(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    pool = Pool(2, 1, nursery)
    await pool.come("ann1", "ann2", "bob1", "cid1", seconds=4)
    await trio.sleep(3.9)
    assert not pool.reasons
    await trio.sleep(0.2)
    assert str(pool.reasons["ann2"]) == "ann held its share, 1 of 2 at once, for 4 s"
    assert pool.reasons["ann2"].own_fault
    assert str(pool.reasons["cid1"]) == "all 2 places were taken for 4 s"
    assert not pool.reasons["cid1"].own_fault
    assert pool.places.statistics() == PlaceStatistics(taken=2, waiting=0)
    await pool.leave("ann1", "bob1")


async def test_a_party_that_is_cancelled_while_it_waits_or_holds_leaves_no_trace(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    pool = Pool(1, 1, nursery)
    await pool.come("ann1", "bob1", "cid1")
    await pool.cancel("bob1")
    assert pool.places.statistics() == PlaceStatistics(taken=1, waiting=1)
    await pool.cancel("ann1")
    assert pool.held == ["cid1"]
    await pool.leave("cid1")
    assert pool.places.statistics() == PlaceStatistics(taken=0, waiting=0)


@pytest.mark.parametrize("cancel_first", [False, True])
async def test_a_party_that_is_cancelled_in_the_moment_of_its_turn_hands_it_on(
    autojump_clock: MockClock, nursery: trio.Nursery, cancel_first: bool
) -> None:
    for _ in range(20):  # Trio runs what is ready in one of two orders
        pool = Pool(1, 1, nursery)
        await pool.come("ann1", "bob1", "cid1")
        if cancel_first:
            pool.cancel_nowait("bob1")
        pool.leave_nowait("ann1")
        if not cancel_first:
            pool.cancel_nowait("bob1")
        await wait_all_tasks_blocked()
        assert pool.held == ["cid1"]
        await pool.leave("cid1")
        assert pool.places.statistics() == PlaceStatistics(taken=0, waiting=0)


async def test_a_turn_that_comes_with_the_end_of_the_wait_counts(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    for _ in range(20):
        pool = Pool(1, 1, nursery)
        await pool.come("ann1", "bob1", seconds=1)
        nursery.start_soon(trio.sleep, 1)
        await trio.sleep(1)
        pool.leave_nowait("ann1")
        await wait_all_tasks_blocked()
        # In time or not: whichever it was, nothing is lost.
        assert (pool.held == ["bob1"]) != ("bob1" in pool.reasons)
        if pool.held:
            await pool.leave("bob1")
        assert pool.places.statistics() == PlaceStatistics(taken=0, waiting=0)
