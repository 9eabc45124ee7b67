"""What is left to chance in one process, decided by a seed: a run with the same seed is the same run.

Trio tells Hypothesis which generator orders its tasks, by the entry point `trio` of the group `hypothesis`
and `hypothesis.register_random`. That is public, and makes each round of tasks a shuffle by that
generator. All else that differs from run to run is put in its place here: clocks, names made of random
bytes, masks.

Within one process nothing more is needed. Sets of texts have an order of their own in each process, unless
`PYTHONHASHSEED` is set, as `__main__` does.
"""

import os
import random
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from typing import Any, Final

import hypothesis
import trio

from broker.http import fallbacks

WALL_BEGAN: Final = 1_800_000_000.0
"""Unix seconds at the virtual time 0."""


def _chance_of_trio() -> random.Random:
    """The generator by which Trio orders its tasks, as it tells Hypothesis."""
    found: list[random.Random] = []
    register = hypothesis.register_random

    def note(chance: random.Random) -> None:
        found.append(chance)
        register(chance)

    (plugin,) = entry_points(group="hypothesis", name="trio")
    with _replaced((hypothesis, "register_random", note)):
        plugin.load()()
    (chance,) = found
    return chance


@contextmanager
def _replaced(*places: tuple[Any, str, Any]) -> Iterator[None]:
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    for owner, name, value in places:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


_trio_chance: Final = _chance_of_trio()


@contextmanager
def decided_by(seed: int) -> Iterator[Callable[[str], random.Random]]:
    """Have the seed decide, for as long as the block: give it `trio.run` and nothing else. The block gets a
    maker of generators, one for each purpose: what one of them draws changes no other."""

    def chance_for(purpose: str) -> random.Random:
        return random.Random(f"{seed} {purpose}")

    def wall_clock() -> float:
        try:
            return WALL_BEGAN + trio.current_time()
        except RuntimeError:  # before the run, or behind it
            return WALL_BEGAN

    names, module = chance_for("names"), random.getstate()
    _trio_chance.seed(f"{seed} tasks")
    random.seed(f"{seed} module")
    try:
        with _replaced(
            (time, "time", wall_clock),
            (secrets, "token_hex", lambda size=16: names.randbytes(size).hex()),
            (fallbacks, "token_urlsafe", lambda size=16: names.randbytes(size).hex()),
            (os, "urandom", names.randbytes),
        ):
            yield chance_for
    finally:
        random.setstate(module)
