"""Runs inputs: starts brokers, puts a bystander pair beside each input, measures, and waits for the
baseline."""

import math
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import attrs
import trio

from tests.hostile.bystander import Heard, Pair, open_pair
from tests.hostile.field import Field, Input, outcome_of
from tests.hostile.judge import NOT_STARTED, Measured, Verdict, judge
from tests.hostile.target import NotStarted, Sample, Setup, Target, scratch_directory

BASELINE_SECONDS: Final = 10.0
"""Issue 9: within this all must be as it was."""
WINDOW_SECONDS: Final = 0.3
"""The shortest time that bystanders are listened to: 30 messages, of which the p99 is the worst."""
PAUSE: Final = 0.05

_NOTHING: Final = Sample(0, 0, 0, 0.0, 0.0)


@attrs.frozen
class _Stage:
    """A broker and its bystanders."""

    target: Target
    pair: Pair


@asynccontextmanager
async def _open_stage(setup: Setup) -> AsyncGenerator[_Stage]:
    with scratch_directory() as scratch:
        target = Target(setup, Path(scratch))
        try:
            await target.wait_served()
            async with open_pair(target.bystanders, setup.connect) as pair:
                await trio.sleep(3 * PAUSE)  # imports of a first request, and the pair's own start
                yield _Stage(target, pair)
        finally:
            with trio.CancelScope(shield=True):
                await target.stop()


async def run_all(
    entries: Sequence[Input], tell: Callable[[Verdict], None], *, once: bool = False
) -> None:
    """Run inputs in their order, and tell the verdict on each as soon as it is there.

    Neighbours with one setup share a broker. An input that goes wrong is tried once more, unless `once`, and
    counts if it does so again; a broker that is not as it was before goes, and the next is a new one.
    """
    left = list(entries)
    while left:
        count = _neighbours(left)
        left = await _run(left[:count], tell, once) + left[count:]


def _neighbours(entries: Sequence[Input]) -> int:
    """How many of the first inputs may share a broker."""
    count = 0
    for entry in entries:
        if count and (_is_alone(entry) or entry.setup != entries[0].setup):
            break
        count += 1
        if _is_alone(entry):
            break
    return count


def _is_alone(entry: Input) -> bool:
    return entry.fresh or entry.control or entry.finale is not None


async def _run(entries: list[Input], tell: Callable[[Verdict], None], once: bool) -> list[Input]:
    """Run inputs on one broker, as long as it is as good as new; return those that are left."""
    done = 0
    verdict: Verdict | None = None
    try:
        async with _open_stage(entries[0].setup) as stage:
            for entry in entries:
                verdict = await _judged(stage, entry)
                while _deserves_another(verdict, once) and _is_reusable(stage, verdict):
                    runs = verdict.runs + 1
                    verdict = attrs.evolve(await _judged(stage, entry), runs=runs)
                if verdict.faults and not _is_reusable(stage, verdict):
                    break  # tried again below, if it may be
                done += 1
                tell(verdict)
                verdict = None
    except RuntimeError as error:
        came = (NOT_STARTED,) if isinstance(error, NotStarted) else ()
        nothing = Measured(came, Heard(), _NOTHING, None, 0, 0, 0, 0.0, trouble=str(error))
        verdict = Verdict(entries[done], nothing, judge(entries[done], nothing))
    if verdict is not None:
        tell(await _again(verdict, once))
        done += 1
    return entries[done:]


def _is_reusable(stage: _Stage, verdict: Verdict) -> bool:
    """Whether another try, or input, tells as much on this broker as on a new one.

    Where memory was kept and nothing else is wrong it tells more: what is kept must be used again, so
    that the second time nothing is gained. A peak would not be seen again, so that asks for a new one.
    """
    if verdict.is_logged or not (verdict.measured.is_over and stage.target.is_running):
        return False
    if verdict.only_keeps:
        return True
    peaked = any(fault.startswith("RSS") for fault in verdict.faults)
    return not (peaked or _is_alone(verdict.entry))


def _deserves_another(verdict: Verdict, once: bool) -> bool:
    """Whether a fault is to be looked at once more, or thrice where others may be to blame."""
    certain = verdict.is_gross or verdict.is_logged or verdict.entry.control
    if once or certain or not verdict.faults:
        return False
    return verdict.runs < (4 if verdict.is_disturbed else 2)


async def _again(verdict: Verdict, once: bool) -> Verdict:
    """The verdict of the last of several tries, each with a broker of its own."""
    entry = verdict.entry
    while _deserves_another(verdict, once):
        runs = verdict.runs + 1
        try:
            async with _open_stage(entry.setup) as stage:
                verdict = attrs.evolve(await _judged(stage, entry), runs=runs)
        except RuntimeError:
            return attrs.evolve(verdict, runs=runs)
    return verdict


async def _judged(stage: _Stage, entry: Input) -> Verdict:
    measured = await _measure(stage, entry)
    return Verdict(entry, measured, judge(entry, measured))


async def _measure(stage: _Stage, entry: Input) -> Measured:
    """Run one input. Raises `RuntimeError` if broker or bystanders are not there to begin with."""
    target, pair = stage.target, stage.pair
    target.log_lines()
    clients_before = await trio.to_thread.run_sync(target.clients)
    await trio.sleep(PAUSE)  # that question was a connection as well
    before = target.sample()
    target.reset_peak()
    await pair.begin()
    began = trio.current_time()
    outcomes = await _attack(target, entry)
    await trio.sleep_until(began + WINDOW_SECONDS)
    took = trio.current_time() - began
    clients_after, hung = await _wait_for_baseline(target, entry, before, clients_before)
    heard = await pair.end()
    peak, after = target.peak(), _sample(target)
    if after is not None and not hung:
        after = await _wait_for_memory(target, entry, before, after)
    log = tuple(target.log_lines())
    finale: tuple[str, ...] = ()
    if entry.finale is not None:
        finale = tuple(await _final(target, entry))
        log += tuple(target.log_lines())
    return Measured(
        tuple(outcomes),
        heard,
        before,
        after,
        peak or before.rss,
        clients_before,
        clients_after,
        took,
        log,
        finale,
        hung,
    )


async def _attack(target: Target, entry: Input) -> list[str]:
    """The outcomes of an input, all its peers closed."""
    outcomes: list[str] = []

    async def once(field: Field) -> None:
        try:
            outcomes.extend(await outcome_of(entry.attack, field))
        except Exception as error:  # noqa: BLE001 - an input that fails is one row, not the table
            outcomes.append(f"the attack raised {error!r}")

    with trio.move_on_after(entry.seconds) as bound:
        async with trio.open_nursery() as nursery:
            field = Field(target, nursery)
            try:
                async with trio.open_nursery() as attacks:
                    for _ in range(entry.times):
                        attacks.start_soon(once, field)
            finally:
                nursery.cancel_scope.cancel()
                await field.close()  # noqa: ASYNC102 - shields itself, waits for nobody
    if bound.cancelled_caught:
        outcomes.append(f"not done in {entry.seconds:g} s")
    return outcomes


async def _final(target: Target, entry: Input) -> Sequence[str]:
    assert entry.finale is not None
    found: Sequence[str] = ["the end took too long"]
    with trio.move_on_after(BASELINE_SECONDS + entry.seconds):
        async with trio.open_nursery() as nursery:
            field = Field(target, nursery)
            try:
                found = await outcome_of(entry.finale, field)
            finally:
                nursery.cancel_scope.cancel()
                await field.close()  # noqa: ASYNC102 - shields itself, waits for nobody
    return found


async def _wait_for_baseline(
    target: Target, entry: Input, before: Sample, clients: int
) -> tuple[int, bool]:
    """Wait until connections and files are as before; how many clients there are then, and
    whether the broker is silent."""
    now = -1
    with trio.move_on_after(BASELINE_SECONDS):
        while target.is_running:
            now = await trio.to_thread.run_sync(target.clients, abandon_on_cancel=True)
            await trio.sleep(PAUSE / 4)
            sample = _sample(target)
            if sample is None:
                break
            if (
                (now >= 0 or clients < 0)
                and now <= clients
                and sample.files <= before.files + entry.files
            ):
                return now, False
            await trio.sleep(PAUSE)
    return now, clients >= 0 and now < 0


async def _wait_for_memory(target: Target, entry: Input, before: Sample, after: Sample) -> Sample:
    """Give what is being given back a moment more, if it matters."""
    bound = before.rss + entry.left_mib * 2**20
    for _ in range(math.ceil(2 / PAUSE)):
        if after.rss <= bound:
            break
        await trio.sleep(PAUSE)
        after = _sample(target) or after
    return after


def _sample(target: Target) -> Sample | None:
    try:
        return target.sample()
    except ProcessLookupError:
        return None
