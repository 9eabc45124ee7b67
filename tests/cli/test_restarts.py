"""When a process that died is started again."""

import pytest

from broker.cli.restarts import DEATHS, FIRST_PAUSE, LONGEST_PAUSE, STEADY_SECONDS, Restarts


def test_one_that_lived_long_is_back_at_once_however_often() -> None:
    restarts = Restarts()
    assert {restarts.pause(STEADY_SECONDS, float(now)) for now in range(50)} == {FIRST_PAUSE}


def test_each_early_death_makes_the_pause_longer_until_it_is_given_up() -> None:
    restarts = Restarts()
    pauses = [restarts.pause(0.5, float(now)) for now in range(DEATHS)]
    assert pauses == [0.1, 0.2, 0.4, 0.8, None]


@pytest.mark.parametrize("apart", [STEADY_SECONDS / 4 + 0.01, STEADY_SECONDS])
def test_deaths_that_are_far_apart_are_never_given_up(apart: float) -> None:
    restarts = Restarts()
    pauses = [restarts.pause(1, number * apart) for number in range(100)]
    assert all(pause is not None and pause <= LONGEST_PAUSE for pause in pauses)
