"""Make a failing script short: leave out steps for as long as it fails in the same way."""

import re
from collections.abc import Callable

from tests.simulation.play import Outcome, simulate
from tests.simulation.script import Script


def shrink(
    script: Script, failure: str, play: Callable[[Script], Outcome] = simulate, most: int = 400
) -> Script:
    """A script of as few steps as `most` runs can find, which fails as the first does, but for numbers in
    what is said of it. Half of the steps are left out at first, then a quarter, down to one by one."""
    kind, runs = _kind(failure), 0
    numbers = [number for number, _ in script.steps]
    size = max(1, len(numbers) // 2)
    while True:
        place = 0
        while place < len(numbers) and runs < most:
            left = numbers[:place] + numbers[place + size :]
            runs += 1
            if _kind(play(script.only(frozenset(left))).failure) == kind:
                numbers = left
            else:
                place += size
        if size == 1 or runs >= most:
            return script.only(frozenset(numbers))
        size //= 2


def _kind(failure: str) -> str:
    return re.sub(r"[0-9a-f]*[0-9][0-9a-f]*", "#", failure)[:60]
