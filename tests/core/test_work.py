"""The share of the loop that one session may use: a little at once, and more at a rate."""

import pytest

from broker.core.work import BURST, DEBT, SHARE, SLICE, Allowance, Meter


def test_a_meter_adds_up_all_that_is_done() -> None:
    meter = Meter()
    for work in (1.5, 2.5, 0.0):
        meter.add(work)
    assert meter.done == 4.0


def test_a_new_session_may_do_a_burst_at_once() -> None:
    allowance = Allowance()
    assert allowance.admits(BURST)
    assert not allowance.admits(BURST + 1)
    allowance.spend(BURST)
    assert not allowance.admits(0), "with nothing left it may do nothing"


def test_an_allowance_fills_at_its_share_of_the_time_up_to_the_burst() -> None:
    allowance = Allowance()
    allowance.spend(BURST)
    second = SHARE * 1_000_000
    allowance.refill(100 / second)
    assert allowance.left == pytest.approx(100)
    allowance.refill(100 / second)  # the same instant counts once
    assert allowance.left == pytest.approx(100)
    allowance.refill(3600)
    assert allowance.left == BURST


@pytest.mark.parametrize("spent, seconds", [(BURST + DEBT / 2, 1), (BURST + 100 * DEBT, 2)])
def test_a_debt_is_for_two_seconds_at_most(spent: float, seconds: float) -> None:
    allowance = Allowance()
    allowance.spend(spent)
    allowance.refill(seconds)
    assert not allowance.admits(1)
    allowance.refill(seconds + 0.001)
    assert allowance.admits(1)


def test_a_turn_for_a_large_act_leaves_no_more_than_a_slice_for_another() -> None:
    allowance = Allowance(slice=20 * SLICE)
    assert allowance.admits(20 * SLICE)
    allowance.spend(1)  # it was refused, say
    assert allowance.admits(SLICE)
    assert not allowance.admits(SLICE + 1)
