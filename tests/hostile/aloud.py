"""A table of inputs, run with a line for each as soon as it is judged."""

# ruff: noqa: T201 - programs, whose output this is

import gc
from collections.abc import Sequence
from functools import partial
from typing import Final

import trio

from tests.hostile.field import Input
from tests.hostile.judge import HEADER, Verdict, line_of
from tests.hostile.runner import run_all
from tests.hostile.target import step_back

NICE: Final = 5
"""How far the attackers stand behind the bystanders on the core that they share."""


def run_aloud(entries: Sequence[Input], *, once: bool = False) -> list[Verdict]:
    """Run them from the core of the load, behind the bystanders; `once`: without a second try."""
    step_back(NICE)
    gc.freeze()
    print(HEADER, flush=True)
    verdicts: list[Verdict] = []

    def tell(verdict: Verdict) -> None:
        verdicts.append(verdict)
        print(line_of(verdict), flush=True)

    trio.run(partial(run_all, entries, tell, once=once))
    return verdicts
