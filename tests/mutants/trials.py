"""Each guard is broken by itself, and the tests that should see it are run on that."""

import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import Final

import attrs

from tests.mutants.mutant import Mutant, copied_tree
from tests.mutants.runs import run, warm_up

SECONDS: Final = 60.0
"""For the tests of one: an assertion that comes later is a hang."""

FAILED: Final = 1
"""The exit status of pytest where tests failed; any other says that it could not run them."""


@attrs.frozen
class Verdict:
    mutant: Mutant
    caught_by: str
    """The test that has failed; "" where it was not caught."""
    detail: str
    seconds: float


def try_all(chosen: Sequence[Mutant], jobs: int) -> Iterator[Verdict]:
    """Each process has a copy of its own, in which one guard at a time is broken."""
    with ExitStack() as opened:
        pending: dict[Future[Verdict], ProcessPoolExecutor] = {}
        left = list(reversed(chosen))

        def go_on(pool: ProcessPoolExecutor, root: Path) -> None:
            if left:
                roots[pool] = root
                pending[pool.submit(_try, left.pop(), root)] = pool

        roots: dict[ProcessPoolExecutor, Path] = {}
        for _ in range(jobs):
            root = opened.enter_context(copied_tree())
            pool = ProcessPoolExecutor(1, get_context("spawn"), warm_up, (root,))
            go_on(opened.enter_context(pool), root)
        while pending:
            done, _ = wait(pending, return_when=FIRST_COMPLETED)
            for each in done:
                pool = pending.pop(each)
                go_on(pool, roots[pool])
                yield each.result()


def _try(mutant: Mutant, root: Path) -> Verdict:
    began = time.monotonic()
    with mutant.planted(root):
        done = run(mutant.tests, SECONDS)
    seconds = time.monotonic() - began
    if done.timed_out:
        return Verdict(mutant, "", "it hangs", seconds)
    found = re.search(r"^(?:FAILED|ERROR) ([^ \n]+)", done.output, re.MULTILINE)
    if done.status == FAILED and found is not None:
        return Verdict(mutant, found[1], "", seconds)
    return Verdict(mutant, "", done.output.strip().split("\n")[-1], seconds)
