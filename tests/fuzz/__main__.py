"""Fuzz what takes bytes of strangers: `python -m tests.fuzz`, or `nox -s fuzz`.

A million inputs, guided by the code that they reach (atheris), in turn for each target; or with `--tcp N` so
many broken connections to a running broker. The exit status is 1 where anything was found: the input then
lies in the directory that is named, and `--replay FILE` tells what is wrong with it.
"""

# ruff: noqa: T201 - a program, whose output this is

import argparse
import importlib.util
import re
import subprocess
import sys
import tempfile
import time
from hashlib import sha1
from pathlib import Path
from typing import Final

from tests.fuzz.mutator import dictionary_of
from tests.fuzz.table import TARGETS, Target
from tests.fuzz.target import CORPUS

RUNS: Final = 1_000_000
SHORTEST: Final = 1000
"""Inputs of a target that gets few."""
FOUND: Final = Path("fuzz-found")
SILENCE_SECONDS: Final = 60
"""An input that takes longer is a finding, whatever it does."""
MEMORY_MIB: Final = 2048
KEPT: Final = 20
"""Inputs that `--keep` adds to the corpus of a target."""
SMALL: Final = 400
"""Bytes of one that is kept."""


def main() -> int:
    options = _options()
    if options.list:
        for target in TARGETS.values():
            print(f"{target.name:20} {(target.judge.__doc__ or '').strip().partition(chr(10))[0]}")
        return 0
    if options.tcp:
        from tests.fuzz.tcp import run

        return run(options.tcp, options.seed)
    chosen = [TARGETS[name] for name in options.only or TARGETS]
    if options.replay is not None:
        for target in chosen:
            target.check(options.replay.read_bytes())
        return 0
    if importlib.util.find_spec("atheris") is None:
        print("atheris is not installed: `nox -s fuzz` does it", file=sys.stderr)
        return 2
    return _fuzz(chosen, options)


def _fuzz(chosen: list[Target], options: argparse.Namespace) -> int:
    shares = sum(target.share for target in chosen)
    print(f"{'target':20} {'inputs':>9} {'a second':>9} {'kept':>6}  found")
    total = found = 0
    began = time.monotonic()
    for target in chosen:
        runs = max(SHORTEST, -(-options.runs * target.share // shares))
        ran, came = _guided(target, runs, options)
        total, found = total + ran, found + len(came)
    minutes = (time.monotonic() - began) / 60
    print(f"\n{total} inputs in {minutes:.1f} min, {found} found")
    return 1 if found or total < options.runs else 0


def _guided(target: Target, runs: int, options: argparse.Namespace) -> tuple[int, list[Path]]:
    """Run one target; how many inputs it had, and what was found."""
    FOUND.mkdir(exist_ok=True)
    before = set(FOUND.iterdir())
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        directory = Path(scratch)
        grown, seeds, words = directory / "grown", directory / "seeds", directory / "words"
        for path in (grown, seeds):
            path.mkdir()
        for data in (*target.seeds, *target.corpus()):
            (seeds / sha1(data).hexdigest()).write_bytes(data)
        words.write_text(dictionary_of(target))
        began = time.monotonic()
        command = [
            *(sys.executable, "-m", "tests.fuzz.guided", target.name),
            *(f"-runs={runs}", f"-seed={options.seed}", f"-max_len={target.most}"),
            *(f"-dict={words}", f"-artifact_prefix={FOUND}/{target.name}-", "-print_final_stats=1"),
            *(f"-timeout={SILENCE_SECONDS}", f"-rss_limit_mb={MEMORY_MIB}"),
            *(f"-max_total_time={options.seconds}", str(grown), str(seeds)),
        ]
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False
        )
        took = time.monotonic() - began
        kept = len(list(grown.iterdir()))
        if options.keep:
            _keep(target, grown)
    came = sorted(set(FOUND.iterdir()) - before)
    ran = [int(number) for number in re.findall(r"number_of_executed_units: (\d+)", done.stderr)]
    count = ran[-1] if ran else 0
    what = ", ".join(map(str, came)) or (
        "nothing" if not done.returncode else "it did not end well"
    )
    print(f"{target.name:20} {count:9} {count / took:9.0f} {kept:6}  {what}", flush=True)
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr)
        came = came or [FOUND]
    return count, came


def _keep(target: Target, grown: Path) -> None:
    """Put the small inputs that reached something new, the last of them first, into the corpus."""
    small = [path for path in grown.iterdir() if path.stat().st_size <= SMALL]
    small.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    where = CORPUS / target.name
    where.mkdir(parents=True, exist_ok=True)
    for path in small[:KEPT]:
        (where / path.name[:12]).write_bytes(path.read_bytes())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--list", action="store_true", help="only name the targets")
    parser.add_argument("--only", nargs="+", metavar="TARGET", choices=TARGETS, help="some targets")
    parser.add_argument("--runs", type=int, default=RUNS, help="inputs in all (%(default)s)")
    parser.add_argument(
        "--seconds", type=int, default=0, help="for each target at most; 0: no bound"
    )
    parser.add_argument("--seed", type=int, default=1, help="of chance (%(default)s)")
    parser.add_argument(
        "--keep", action="store_true", help="put what reaches new code into the corpus"
    )
    parser.add_argument("--replay", type=Path, metavar="FILE", help="judge this input alone")
    parser.add_argument("--tcp", type=int, metavar="N", help="broken connections over TCP instead")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
