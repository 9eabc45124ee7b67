"""One account of all memory: who is charged, who is refused, and who gives way."""

import random
from math import inf

import attrs
import pytest

from broker.core.memory import FREE_BYTES, NEAR, Holding, MemoryBudget, Part

MIB = 2**20


@attrs.define(eq=False)
class Somebody:
    """A holder. `waiting` is what its outbox holds, `own` what of that no other does."""

    party: str = "address 192.0.2.1"
    waiting: int = 0
    own: int = 0
    holding: Holding | None = None

    def own_waiting(self) -> int:
        return self.own

    def give_way(self) -> None:
        """It says so to its peer first."""


def hold(
    budget: MemoryBudget, size: int, party: str = "a", *, waiting: int = 0, own: int = 0
) -> Somebody:
    """A holder of so many bytes of what has come."""
    somebody = Somebody(party, waiting, own)
    somebody.holding = budget.hold(somebody).__enter__()
    somebody.holding.charge(Part.INCOMING, size)
    return somebody


def holding_of(somebody: Somebody) -> Holding:
    assert somebody.holding is not None
    return somebody.holding


def givers(budget: MemoryBudget, goal: float) -> list[object]:
    return [holding.holder for holding, _ in budget.givers(goal)]


# the account


def test_what_is_held_is_the_sum_of_all_parts() -> None:
    budget = MemoryBudget()
    budget.count(Part.HISTORY, lambda: 1000)
    budget.count(Part.KEYS, lambda: 200)
    budget.runs.bytes_held = 30
    with budget.hold() as first, budget.hold() as second:
        first.charge(Part.WILLS, 4)
        second.charge(Part.WILLS, 5)
        second.charge(Part.OUTBOXES, 6)
        second.charge(Part.OUTBOXES, -2)
        assert (first.bytes, second.bytes) == (4, 9)
        found = budget.statistics()
        assert found.held == budget.held == 1000 + 200 + 30 + 4 + 9 == sum(found.parts.values())
        assert {part: size for part, size in found.parts.items() if size} == {
            "history": 1000,
            "keys": 200,
            "wills": 9,
            "outboxes": 34,
        }
        assert set(found.parts) == {part.value for part in Part}
    assert budget.held == 1230


def test_a_holding_that_has_ended_holds_nothing_and_is_charged_nothing() -> None:
    budget = MemoryBudget()
    with budget.hold() as holding:
        holding.charge(Part.INCOMING, 100)
    assert (holding.bytes, budget.held) == (0, 0)
    holding.charge(Part.INCOMING, -100)  # of a task that outlives it
    holding.charge(Part.WILLS, 7)
    assert (holding.bytes, budget.held) == (0, 0)


def test_whatever_is_charged_and_whoever_goes_the_account_is_right() -> None:
    chance = random.Random(5)
    budget = MemoryBudget()
    open_now: dict[Holding, dict[Part, int]] = {}
    for _ in range(3000):
        if not open_now or chance.random() < 0.2:
            open_now[budget.hold().__enter__()] = dict.fromkeys(Part, 0)
        holding = chance.choice(list(open_now))
        if chance.random() < 0.15:
            holding.__exit__(None, None, None)
            del open_now[holding]
        else:
            part, more = chance.choice(list(Part)), chance.randrange(1000)
            more = max(-open_now[holding][part], more - 500)
            holding.charge(part, more)
            open_now[holding][part] += more
        assert budget.held == sum(sum(parts.values()) for parts in open_now.values())
    parts = budget.statistics().parts
    for part in Part:
        assert parts[part] == sum(each[part] for each in open_now.values())


def test_a_budget_that_is_short_says_so_with_each_charge() -> None:
    calls: list[int] = []
    budget = MemoryBudget(limit=100)
    budget.on_short = lambda: calls.append(budget.held)
    with budget.hold() as holding:
        holding.charge(Part.WILLS, 100)
        assert calls == []
        holding.charge(Part.WILLS, 1)
        assert calls == [101]
        holding.charge(Part.WILLS, -1)
        assert calls == [101]


def test_runs_are_told_how_much_they_may_take_besides_the_rest() -> None:
    calls: list[int] = []
    budget = MemoryBudget(limit=100)
    budget.on_short = lambda: calls.append(budget.held)
    assert budget.runs.most == inf  # not looked at yet
    with budget.hold() as holding:
        holding.charge(Part.WILLS, 40)
        assert budget.runs.most == 60
        budget.runs.bytes_held = 61
        budget.runs.on_full()
        assert calls == [101]
    budget.runs.on_full()
    assert (calls, budget.runs.most) == ([101], 100)


# who asks


@pytest.mark.parametrize(
    "held, mine, size, granted",
    [
        # As long as there is room, anybody may have anything.
        (0, 0, 80 * MIB, True),
        (80 * MIB, 0, 10 * MIB, True),
        # Close to the limit the small go on, and nobody gets heavy.
        (80 * MIB, 0, 10 * MIB + 1, False),
        (89 * MIB, 0, MIB + 1, False),
        (99 * MIB, 0, FREE_BYTES, True),
        (99 * MIB, 0, FREE_BYTES + 1, False),
        (99 * MIB, FREE_BYTES - 10, 10, True),
        (99 * MIB, FREE_BYTES - 10, 11, False),
        (150 * MIB, 0, 700, True),
    ],
)
def test_close_to_the_limit_who_is_heavy_gets_no_more(
    held: int, mine: int, size: int, granted: bool
) -> None:
    budget = MemoryBudget(limit=100 * MIB)
    hold(budget, held)
    asking = holding_of(hold(budget, mine))
    assert (asking.refusal(size) == "") is granted
    assert budget.statistics().refused == (not granted)
    assert budget.held == held + mine  # to ask changes nothing


def test_where_nobody_can_give_way_the_small_get_no_more_either() -> None:
    budget = MemoryBudget(limit=MIB)
    others = holding_of(hold(budget, MIB))
    asking = holding_of(hold(budget, 1))
    budget.set_exhausted(True)
    assert asking.refusal(1) == "memory is short"
    others.charge(Part.INCOMING, -MIB // 2)
    assert not budget.is_exhausted
    assert asking.refusal(1) == ""


def test_a_connection_has_a_bound_on_the_sum_of_all_that_is_held_for_it() -> None:
    budget = MemoryBudget(connection_room=1000)
    with budget.hold() as holding:
        holding.charge(Part.WILLS, 400)
        holding.charge(Part.SUBSCRIPTIONS, 500)
        assert (holding.refusal(100), holding.is_over) == ("", False)
        assert holding.refusal(101) == "more than 1000 bytes for one connection"
        holding.charge(Part.INCOMING, 101)  # what has come has come
        assert holding.is_over
    assert budget.statistics().refused == 0


def test_other_bounds_count_at_once() -> None:
    calls: list[int] = []
    budget = MemoryBudget()
    budget.on_short = lambda: calls.append(1)
    holding = holding_of(hold(budget, 2 * MIB))
    budget.resize(MIB, 3 * MIB)
    assert calls == [1]
    assert holding.refusal(MIB + 1).startswith("more than")
    assert holding.refusal(MIB) == "memory is short"


# who gives way


def test_nobody_gives_way_who_holds_little() -> None:
    budget = MemoryBudget(limit=1)
    for _ in range(100):
        hold(budget, FREE_BYTES)
        hold(budget, 0, waiting=FREE_BYTES, own=FREE_BYTES)
    assert givers(budget, 10**9) == []


def test_the_heaviest_gives_way_first_and_no_more_than_is_needed() -> None:
    budget = MemoryBudget()
    people = [hold(budget, size * MIB, f"user {size}") for size in (1, 5, 3, 2, 4)]
    assert givers(budget, 5 * MIB) == [people[1]]
    assert givers(budget, 5 * MIB + 1) == [people[1], people[4]]
    assert len(givers(budget, inf)) == 5
    assert [size for _, size in budget.givers(inf)] == [n * MIB for n in (5, 4, 3, 2, 1)]
    assert givers(budget, 0) == []


def test_a_thousand_connections_of_one_party_are_one() -> None:
    budget = MemoryBudget()
    many = [hold(budget, 2 * FREE_BYTES, "address 192.0.2.7") for _ in range(1000)]
    one = hold(budget, 20 * MIB, "user 'ann'")
    chosen = givers(budget, 40 * MIB)
    assert one not in chosen
    assert set(chosen) <= set(many)
    # Until together they have less beyond what anybody may have than the other.
    chosen = givers(budget, inf)
    assert 650 < chosen.index(one) < 700


def test_of_one_party_the_heaviest_goes_first() -> None:
    budget = MemoryBudget()
    people = [hold(budget, size * MIB) for size in (3, 9, 1, 4)]
    assert givers(budget, 14 * MIB) == [people[1], people[3], people[0]]


def test_what_others_hold_as_well_weighs_less() -> None:
    budget = MemoryBudget()
    slow = [hold(budget, 0, f"user {n}", waiting=MIB, own=MIB // 50) for n in range(50)]
    asker = hold(budget, 0, "user 50", waiting=MIB, own=MIB // 2)
    assert givers(budget, inf) == [asker]
    assert not set(givers(budget, inf)) & set(slow)


def test_who_is_about_to_give_way_is_asked_once_more_before_all_others() -> None:
    budget = MemoryBudget()
    light, heavy = hold(budget, 2 * MIB, "user 1"), hold(budget, 3 * MIB, "user 2")
    holding_of(light).give_way()
    assert givers(budget, MIB) == [light]
    assert givers(budget, 3 * MIB) == [light, heavy]
    for _ in range(3):
        holding_of(light).give_way()
    assert budget.statistics().gave_way == 1


def test_what_never_gives_way_is_not_asked() -> None:
    budget = MemoryBudget()
    with budget.hold() as backend:
        backend.charge(Part.INCOMING, 50 * MIB)
        assert givers(budget, inf) == []


@pytest.mark.parametrize("seed", range(20))
def test_an_innocent_holds_more_than_whoever_is_left(seed: int) -> None:
    """However much must come free: of two parties with one holding each the heavier goes first, and who
    stays holds no more than whoever has gone."""
    chance = random.Random(seed)
    budget = MemoryBudget()
    people = [hold(budget, chance.randrange(4 * MIB), f"user {n}") for n in range(40)]
    chosen = givers(budget, chance.randrange(1, 60 * MIB))
    gone = [each for each in people if each in chosen]
    stayed = [each for each in people if each not in chosen]
    heavy = max((holding_of(each).bytes for each in stayed), default=0)
    assert heavy <= min((holding_of(each).bytes for each in gone), default=inf) or not gone
    assert all(holding_of(each).bytes > FREE_BYTES for each in gone)


@pytest.mark.parametrize(
    "held, kept, shortage, surplus",
    [
        (80, 10, 0, 0),
        (100, 10, 0, 0),
        (101, 10, 101 - 100 * NEAR, 0),
        (150, 50, 60, 0),
        (150, 70, 60, 20),
    ],
)
def test_kept_data_and_the_rest_are_entitled_to_one_half_each(
    held: int, kept: int, shortage: float, surplus: float
) -> None:
    budget = MemoryBudget(limit=100)
    budget.count(Part.HISTORY, lambda: kept - 1)
    budget.count(Part.RETAINED, lambda: 1)
    hold(budget, held - kept)
    assert (budget.shortage, budget.surplus_kept) == (shortage, surplus)
