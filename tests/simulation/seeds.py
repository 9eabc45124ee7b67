"""Many seeds, on all processors."""

import multiprocessing
from collections.abc import Iterator
from typing import Final

import attrs

from tests.simulation.play import Outcome, simulate
from tests.simulation.script import write
from tests.simulation.world import Engine

AT_ONCE: Final = 10
"""Seeds that a process takes at a time."""


@attrs.frozen
class Played:
    seed: int
    outcome: Outcome


def play_all(
    seeds: range, engine: Engine | None, processes: int, server: str = ""
) -> Iterator[Played]:
    """Play each, in any order; on the real server at this URL, if there is one. Close the iterator to stop
    before the end."""
    work = [(seed, engine, server) for seed in seeds]
    if processes == 1:
        yield from map(_play, work)
        return
    # Forked, they would share what Hypothesis and Trio have set up in threads.
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap_unordered(_play, work, AT_ONCE)


def _play(work: tuple[int, Engine | None, str]) -> Played:
    seed, engine, server = work
    script = write(seed, engine)
    if server:
        script = attrs.evolve(script, engine_url=f"{server}?prefix=seed{seed}")
    return Played(seed, attrs.evolve(simulate(script), error=None))
