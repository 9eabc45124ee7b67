"""What strangers send, by chance: 20,000 inputs from seeds, and all that was kept before."""

from typing import Final

import pytest

from tests.fuzz.mutator import input_of
from tests.fuzz.table import TARGETS, Target

INPUTS: Final = 20_000
_SHARES: Final = sum(target.share for target in TARGETS.values())


def count_of(target: Target) -> int:
    """How many of the inputs are this target's."""
    return -(-INPUTS * target.share // _SHARES)


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_and_what_was_kept(name: str) -> None:
    target = TARGETS[name]
    for data in (*target.seeds, *target.corpus(), b""):
        target.check(data)


@pytest.mark.parametrize("name", TARGETS)
def test_inputs_by_chance(name: str) -> None:
    target = TARGETS[name]
    for number in range(count_of(target)):
        data = input_of(target, number)
        try:
            target.check(data)
        except BaseException as error:
            error.add_note(f"input {number} of {name}: {data[:2000]!r}")
            raise
