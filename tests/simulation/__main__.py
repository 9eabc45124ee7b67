"""Play seeds, and say which of them fail: `python -m tests.simulation`, or `nox -s simulate`.

A seed that fails is played once more with fewer and fewer steps; what is left of it is printed, with the
command that plays just that. The exit status is 1 if any has failed.
"""

# ruff: noqa: T201 - a program, whose output this is

import argparse
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Final

from tests.engines.servers import BINARIES, serving
from tests.simulation.planted import PLANTED, SEEDS, find_all
from tests.simulation.play import simulate
from tests.simulation.script import Script, write
from tests.simulation.seeds import Played, play_all
from tests.simulation.shrinker import shrink

MOST_SHOWN: Final = 5
"""Failures that are made short and shown."""


def main() -> int:
    options = _options()
    if options.seed is not None:
        return _show(_chosen(options))
    if options.planted is not None:
        return _plant(options)
    if not options.redis:
        return _play_seeds(options)
    name, binary = next(iter(BINARIES.items()))
    print(f"two nodes on {name}, in real time: a seed is nearly the same run each time")
    with tempfile.TemporaryDirectory() as directory, serving(binary, Path(directory)) as server:
        options.engine, options.quick = "redis", True
        return _play_seeds(options, f"redis+unix://{server.socket}")


def _play_seeds(options: argparse.Namespace, server: str = "") -> int:
    began = time.monotonic()
    failed: list[Played] = []
    count = messages = steps = size = 0
    seeds = range(options.first, options.first + options.seeds)
    for played in play_all(seeds, options.engine, options.jobs, server):
        outcome = played.outcome
        count, messages = count + 1, messages + outcome.messages
        steps, size = max(steps, outcome.most_steps), max(size, outcome.most_bytes)
        if outcome.failure:
            failed.append(played)
            print(f"seed {played.seed}: {outcome.failure}", flush=True)
            if options.until_failure:
                break
    for played in [] if options.quick else failed[:MOST_SHOWN]:
        _explain(write(played.seed, options.engine), played.outcome.failure)
    print(
        f"{count} seeds, {len(failed)} failed: {messages} messages in {time.monotonic() - began:.0f} s; "
        f"a bystander's longest round trip was {steps} steps of tasks and {size} bytes to others"
    )
    return 1 if failed else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=500, help="how many (500)")
    parser.add_argument("--first", type=int, default=0, help="the first of them (0)")
    parser.add_argument("--seed", type=int, help="play this one, twice, and show it")
    parser.add_argument("--only", default="", help="of that one these steps, such as 3,7,12")
    parser.add_argument("--engine", choices=["memory", "sqlite", "bus"], help="for all of them")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--quick", action="store_true", help="do not make failures short")
    parser.add_argument("--until-failure", action="store_true", help="stop at the first")
    parser.add_argument("--redis", action="store_true", help="two nodes on a real Valkey, or Redis")
    parser.add_argument(
        "--planted", nargs="?", const="", help="plant faults, all or those named so, and find each"
    )
    return parser.parse_args()


def _chosen(options: argparse.Namespace) -> Script:
    script = write(options.seed, options.engine)
    if options.only:
        script = script.only(frozenset(map(int, options.only.split(","))))
    return script


def _explain(script: Script, failure: str) -> None:
    short = shrink(script, failure)
    print(f"\nseed {script.seed}, of whose {len(script.steps)} steps these are enough:")
    _print_script(short)
    numbers = ",".join(str(number) for number, _ in short.steps)
    chosen = f" --engine {script.engine}" if script != write(script.seed) else ""
    print(f"python -m tests.simulation --seed {script.seed} --only {numbers}{chosen}\n", flush=True)


def _print_script(script: Script) -> None:
    hooks = ", ".join(sorted(script.hooks)) or "no hooks"
    witness = "with" if script.has_witness else "without"
    print(f"  {script.engine}, {script.nodes} node(s), {hooks}, {witness} a witness")
    for number, step in script.steps:
        print(f"  {number:3} {step}")


def _plant(options: argparse.Namespace) -> int:
    """Plant one fault after the other, and see which seed finds it."""
    faults = tuple(each for each in PLANTED if options.planted in each.name)
    count = 0
    for found in find_all(faults, options.jobs):
        count += found.seed >= 0
        by = f"seed {found.seed}" if found.seed >= 0 else "NOT FOUND"
        print(f"{by:12} {found.mutant.name}: {found.failure}", flush=True)
    print(f"{count} of {len(faults)} planted faults found, each within {SEEDS} seeds")
    return 0 if count == len(faults) else 1


def _show(script: Script) -> int:
    """Play a script twice: the two are the same to the last byte and step."""
    _print_script(script)
    first, second = simulate(script), simulate(script)
    print(f"  trace {first.trace}, and once more {second.trace}")
    if first.error is not None:
        traceback.print_exception(first.error)
    print(first.failure or "nothing failed")
    return 1 if first.failure or first.trace != second.trace else 0


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":  # the order of sets is to be the same everywhere
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "tests.simulation", *sys.argv[1:]])
    sys.exit(main())
