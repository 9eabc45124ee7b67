"""Attack the broker, and see that nobody else notices: `python -m tests.hostile`, or `nox -s hostile`.

A broker runs as `python -m broker` on one core. From the other it is attacked, by this process, while
a pair of well-behaved clients in a third process, first in line for that core, goes on talking. Each
row of the table is one input: what the hostile peer got, what the pair noticed, what was left behind.
The exit status is 1 if any row is not as it should be.
"""

# ruff: noqa: T201 - a program, whose output this is

import argparse
import gc
import json
import resource
import sys
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import get_args

from tests.hostile import (  # noqa: F401
    bombs,
    combined,
    crowds,
    engines,
    floods,
    frames,
    heads,
    messages,
    passages,
    pieces,
    process,
    races,
    rights,
    slow,
)
from tests.hostile.aloud import run_aloud
from tests.hostile.field import TABLE, Input, can_stand_on, stood_on
from tests.hostile.judge import Verdict, as_record
from tests.hostile.target import BROKER_CORE, LOAD_CORE, Ground

FILES = 4096
"""Open files that an attack with a thousand peers needs."""


def main() -> int:
    options = _options()
    chosen = [entry for entry in TABLE if _is_chosen(entry, options)]
    if options.on != "memory":
        chosen = [stood_on(entry, options.on) for entry in chosen if can_stand_on(entry)]
    if options.list:
        for entry in chosen:
            print(f"{entry.name:50} {' or '.join(entry.should):40} {entry.source}")
        print(f"{len(chosen)} inputs")
        return 0
    if not chosen:
        print("No input has such a name; --list shows them.", file=sys.stderr)
        return 2
    verdicts = _run(chosen, once=options.once)
    if options.json is not None:
        options.json.write_text(json.dumps([as_record(each) for each in verdicts], indent=1) + "\n")
    return 0 if all(verdict.is_good for verdict in verdicts) else 1


def _run(chosen: list[Input], *, once: bool) -> list[Verdict]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < FILES:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(FILES, hard), hard))
    gc.set_threshold(50_000, 10, 50)
    print(f"The broker is on core {BROKER_CORE}, bystanders and attackers are on {LOAD_CORE}.")
    if BROKER_CORE == LOAD_CORE:
        print("There is only one: the times below are theirs together.")
    began = time.monotonic()
    verdicts = run_aloud(chosen, once=once)
    bad = [verdict for verdict in verdicts if not verdict.is_good]
    minutes = (time.monotonic() - began) / 60
    print(f"\n{len(verdicts)} inputs in {minutes:.1f} min, {len(bad)} not as they should be")
    for verdict in bad:
        print(f"  {verdict.entry.name}: {'; '.join(verdict.faults) or 'was not found'}")
    return verdicts


def _is_chosen(entry: Input, options: argparse.Namespace) -> bool:
    if options.only:
        return any(fnmatchcase(entry.name, pattern) for pattern in options.only)
    return entry.quick or not options.quick


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.hostile", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--list", action="store_true", help="only name the inputs")
    parser.add_argument(
        "--only", nargs="+", metavar="PATTERN", help="inputs of such a name, as in 'head/*'"
    )
    parser.add_argument("--quick", action="store_true", help="those that take less than a second")
    parser.add_argument(
        "--on", choices=get_args(Ground), default="memory", help="an engine, two nodes, or workers"
    )
    parser.add_argument("--once", action="store_true", help="no second try for what fails")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements there")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
