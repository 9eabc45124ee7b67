"""One simulation from nothing to nothing: its seed decides, its log is read, its outcome is a value."""

import logging
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import attrs
import structlog
import trio
from trio.testing import MockClock

from tests.simulation.chances import decided_by
from tests.simulation.script import Script
from tests.simulation.world import World

EXPECTED: Final = ("hook_failed", "node_lapsed", "engine_failing", "not_subscribed")
"""Lines that the log may have: what was done to the broker on purpose."""


@attrs.frozen
class Outcome:
    """How a simulation ended: `failure` is what was violated, "" for nothing."""

    trace: str
    failure: str
    most_steps: int = 0
    most_bytes: int = 0
    messages: int = 0
    error: BaseException | None = None


def simulate(script: Script) -> Outcome:
    """Play a script, from nothing to nothing."""
    if script.engine != "sqlite" or script.engine_url != "memory":
        return _simulate(script)
    with tempfile.TemporaryDirectory() as directory:
        # What waits for the power to fail would only take longer.
        url = f"sqlite:{directory}/log.db?sync=process"
        return _simulate(attrs.evolve(script, engine_url=url))


def _simulate(script: Script) -> Outcome:
    with decided_by(script.seed) as chance_for, _logged() as lines:
        world: World | None = None

        async def play() -> None:
            nonlocal world
            world = World(script, chance_for)
            await world.play()

        clock = None if script.engine == "redis" else MockClock(autojump_threshold=0)
        error: BaseException | None = None
        try:
            trio.run(play, clock=clock)
        except Exception as caught:  # noqa: BLE001 - it is what the simulation has found
            error = caught
        assert world is not None
        failure = _failure_of(error, lines)
        world.trace.update(failure.encode())
        digest = world.trace.hexdigest()
        sent = len(world.ledger.sent)
    return Outcome(digest, failure, world.most_steps, world.most_bytes, sent, error)


def _failure_of(error: BaseException | None, lines: Sequence[Any]) -> str:
    """What was wrong, in a line: of several things the first in the log, as it came first."""
    for line in lines:
        found = line.get("exc_info")
        if isinstance(found, AssertionError):
            return f"{type(found).__name__}: {found}"
        if line["event"] not in EXPECTED:
            return f"logged: {line['event']} {found!r}"
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if error is None:
        return ""
    return f"{type(error).__name__}: {error}".split("\n")[0]


@contextmanager
def _logged() -> Iterator[list[Any]]:
    """What the broker logs of errors, meanwhile."""
    before = structlog.get_config() if structlog.is_configured() else None
    lines: list[Any] = []

    def note(logger: object, method: str, line: Any) -> Any:
        if line.get("exc_info") is True:
            line["exc_info"] = sys.exc_info()[1]
        lines.append(line)
        raise structlog.DropEvent

    level = structlog.make_filtering_bound_logger(logging.ERROR)
    structlog.configure([note], wrapper_class=level, cache_logger_on_first_use=False)
    try:
        yield lines
    finally:
        structlog.reset_defaults()
        if before is not None:
            structlog.configure(**before)
