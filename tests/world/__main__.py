"""Faults of the world, each beside clients that must not notice: `python -m tests.world`, or `nox -s world`.

Links that go down, clients that stand still, full disks, clocks that are set, files and memory that are few,
names and backends that do not answer; and brokers that are stopped under load, with official clients
that come back. It needs Linux, root, and Debian's packages iproute2 and faketime, and works in namespaces
of its own. The exit status is 1 if any row is not as it should be, or could not be run.
"""

# ruff: noqa: T201 - a program, whose output this is

import argparse
import resource
import sys
import time
from fnmatch import fnmatchcase

from tests.hostile.aloud import run_aloud
from tests.world.faults import FAULTS
from tests.world.places import enter
from tests.world.returning import ROUNDS, SIGNALS, keep_returning

FILES = 4096


def main() -> int:
    options = _options()
    chosen = [entry for entry in FAULTS if _is_chosen(entry.name, options)]
    signals = [name for name in SIGNALS if _is_chosen(f"return/{name}", options)]
    if options.list:
        for entry in chosen:
            print(f"{entry.name:50} {' or '.join(entry.should)}")
        for name in signals:
            print(f"return/{name:43} nothing acknowledged is lost, or a gap is told")
        print(f"{len(chosen) + len(signals)} faults")
        return 0
    if not chosen and not signals:
        print("No fault has such a name; --list shows them.", file=sys.stderr)
        return 2
    try:
        enter()
    except (OSError, RuntimeError) as error:
        print(f"not run: {error}", file=sys.stderr)
        return 2
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < FILES:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(FILES, hard), hard))
    began = time.monotonic()
    good, count = _run_faults(chosen, once=options.once) if chosen else (0, 0)
    for name in signals:
        books = keep_returning(name, options.rounds)
        print(f"return/{name:43} {'ok' if books.is_clean else 'FAIL':4} {books}", flush=True)
        good, count = good + books.is_clean, count + 1
    print(f"\nsurvived {good} of {count} faults, in {(time.monotonic() - began) / 60:.1f} min")
    return 0 if good == count else 1


def _run_faults(chosen: list, *, once: bool) -> tuple[int, int]:  # type: ignore[type-arg]
    verdicts = run_aloud(chosen, once=once)
    return sum(verdict.is_good for verdict in verdicts), len(verdicts)


def _is_chosen(name: str, options: argparse.Namespace) -> bool:
    return not options.only or any(fnmatchcase(name, pattern) for pattern in options.only)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.world", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--list", action="store_true", help="only name the faults")
    parser.add_argument(
        "--only", nargs="+", metavar="PATTERN", help="of such a name, as in 'disk/*'"
    )
    parser.add_argument("--once", action="store_true", help="no second try for what fails")
    parser.add_argument(
        "--rounds", type=int, default=ROUNDS, help="stops of each kind (%(default)s)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
