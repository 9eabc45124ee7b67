"""Break the guards of the broker, one by one, and see that the tests which should see it do:
`python -m tests.mutants`, or `nox -s mutants`.

First those tests run on the tree as it is, where all of them have to pass. Then each guard is broken in a copy of
the tree, and its tests run on that. It is caught where one of them fails; not where they hang, which is
called so after a minute, and not where they cannot even be collected. The exit status is 1 if any was not caught.
"""

# ruff: noqa: T201 - a program, whose output this is

import argparse
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import attrs

from tests.mutants.mutant import Mutant, copied_tree, environment
from tests.mutants.table import MUTANTS

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
    for verdict in _try_all(chosen, options.jobs):
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
    done = _run(tests, Path.cwd(), seconds=None)
    print(done.stdout.strip().split("\n")[-1])
    if done.returncode:
        print(done.stdout + done.stderr, file=sys.stderr)
    return not done.returncode


def _try_all(chosen: Sequence[Mutant], jobs: int) -> Iterator[Verdict]:
    """Each worker has a copy of its own, in which one guard at a time is broken."""
    left, found = iter(chosen), queue.SimpleQueue[Verdict]()

    def work() -> None:
        with copied_tree() as root:
            for mutant in left:  # a list's iterator gives each to one thread
                found.put(_try(mutant, root))

    workers = [threading.Thread(target=work, daemon=True) for _ in range(jobs)]
    for worker in workers:
        worker.start()
    for _ in chosen:
        yield found.get()
    for worker in workers:
        worker.join()


def _try(mutant: Mutant, root: Path) -> Verdict:
    began = time.monotonic()
    with mutant.planted(root):
        try:
            done = _run(mutant.tests, root, seconds=SECONDS)
        except subprocess.TimeoutExpired:
            return Verdict(mutant, "", "it hangs", time.monotonic() - began)
    seconds = time.monotonic() - began
    found = re.search(r"^(?:FAILED|ERROR) ([^ ]+)", done.stdout, re.MULTILINE)
    if done.returncode == FAILED and found is not None:
        return Verdict(mutant, found[1], "", seconds)
    last = (done.stdout + done.stderr).strip().split("\n")[-1]
    return Verdict(mutant, "", last, seconds)


def _run(
    tests: Sequence[str], root: Path, seconds: float | None
) -> "subprocess.CompletedProcess[str]":
    options = ["-x", "-q", "-p", "no:cacheprovider", "--tb=line"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests],
        cwd=root,
        env=environment(root),
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


if __name__ == "__main__":
    sys.exit(main())
