"""The whole broker under chance: 500 seeds keep every promise, and the machine that says so does its part."""

import subprocess
import sys
from pathlib import Path

import attrs
import pytest

from tests.simulation.play import Outcome, simulate
from tests.simulation.script import Script, write
from tests.simulation.shrinker import shrink
from tests.simulation.world import Engine

ROOT = Path(__file__).parents[2]
SEEDS = 500


def test_every_promise_is_kept_whatever_happens() -> None:
    command = [sys.executable, "-m", "tests.simulation", "--seeds", str(SEEDS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"{SEEDS} seeds, 0 failed")


@pytest.mark.parametrize("engine", ["memory", "sqlite", "bus"])
@pytest.mark.parametrize("seed", [1, 2])
def test_a_seed_is_the_same_run_each_time(engine: Engine, seed: int) -> None:
    script = write(seed, engine)
    first, second = simulate(script), simulate(script)
    assert first.trace == second.trace
    assert first.messages > 10
    assert simulate(write(seed + 10, engine)).trace != first.trace


def test_two_processes_play_the_same() -> None:
    command = [sys.executable, "-m", "tests.simulation", "--seed", "3"]
    runs = [
        subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    assert "trace" in runs[0]


def test_a_failing_script_keeps_the_steps_that_it_takes() -> None:
    def play(script: Script) -> Outcome:
        numbers = {number for number, _ in script.steps}
        failure = f"lost {len(numbers)} messages" if {4, 9} <= numbers else ""
        return Outcome("", failure if 2 in numbers else failure and "something else")

    script = write(5)
    assert len(script.steps) > 12
    short = shrink(script, "lost 40 messages", play)
    assert [number for number, _ in short.steps] == [2, 4, 9]
    assert short == attrs.evolve(script, steps=short.steps)
