"""Break the guards of the broker, one by one, and see that the tests which should see it do:
`python -m tests.mutants`, or `nox -s mutants`.

First those tests run on the tree as it is, where all of them have to pass. Then each guard is broken in a copy of
the tree, and its tests run on that. It is caught where one of them fails; not where they hang, which is
called so after a minute, and not where they cannot even be collected. The exit status is 1 if any was not caught.
"""

# ruff: noqa: T201 - a program, whose output this is

import argparse
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Final

from tests.mutants.mutant import Mutant, copied_tree
from tests.mutants.runs import run, warm_up
from tests.mutants.table import MUTANTS
from tests.mutants.trials import try_all

ALL_SECONDS: Final = 1200.0
"""For all tests on the tree as it is."""


def main() -> int:
    options = _options()
    chosen = [each for each in MUTANTS if options.only.lower() in each.name.lower()]
    if options.list:
        for mutant in chosen:
            print(f"{mutant.name:75} {mutant.path}")
        print(f"{len(chosen)} guards")
        return 0
    began = time.monotonic()
    if not options.quick and not _pass_as_they_are(chosen):
        return 2
    caught = 0
    for verdict in try_all(chosen, options.jobs):
        caught += bool(verdict.caught_by)
        said = verdict.caught_by or f"NOT CAUGHT: {verdict.detail}"
        print(f"{verdict.seconds:5.1f} s  {verdict.mutant.name:75} {said}", flush=True)
    minutes = (time.monotonic() - began) / 60
    print(f"{caught} of {len(chosen)} mutants caught in {minutes:.1f} min")
    return 0 if caught == len(chosen) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", default="", help="those with this text in their name")
    parser.add_argument("--list", action="store_true", help="name them, and try none")
    parser.add_argument("--quick", action="store_true", help="do not run the tests as they are")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="how many at a time")
    return parser.parse_args()


def _pass_as_they_are(chosen: Sequence[Mutant]) -> bool:
    tests = sorted({test for mutant in chosen for test in mutant.tests})
    with (
        copied_tree() as root,
        ProcessPoolExecutor(1, get_context("spawn"), warm_up, (root,)) as pool,
    ):
        done = pool.submit(run, tests, ALL_SECONDS).result()
    print(done.output.strip().split("\n")[-1], flush=True)
    if done.status:
        print(done.output, file=sys.stderr)
    return not done.status


if __name__ == "__main__":
    sys.exit(main())
