"""A broker under a steady load for long: `python -m tests.soak`, or `nox -s soak`.

Clients of all transports, some that come and go and recover, publications at a steady rate, one in a hundred
hostile, the settings read anew, a backend that is away now and then; and beside all that two clients who
must not notice. In the end nothing may be lost or come twice, and memory, files and tasks are where they were.
The exit status is 1 if any of it is not so.
"""

# ruff: noqa: T201 - a program, whose output this is

import argparse
import gc
import itertools
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import attrs
import trio

from tests.fuzz.tcp import broken_connection
from tests.hostile.aloud import NICE
from tests.hostile.bystander import Heard, open_pair
from tests.hostile.field import MIB, Api, Field
from tests.hostile.judge import log_errors
from tests.hostile.target import ROOT, Sample, Setup, Target, scratch_directory, step_back
from tests.hostile.wire import Ended, Peer, connect, frame, handshake
from tests.soak.fleet import AWAY_SECONDS, STAY_SECONDS, TOPICS
from tests.world.places import Far

SAMPLE_SECONDS: Final = 2.0
WARM_SHARE: Final = 0.25
"""Of the time, before memory is looked at: until then caches fill, and code is imported."""
RELOAD_SECONDS: Final = 20.0
FLAP_SECONDS: Final = 7.0
FILES: Final = 16384
TURNS: Final = 10
"""A second, in which it is published."""
SLOPE_MIB: Final = 1.0
"""In ten minutes."""
P99_MS: Final = 50.0

CONFIG: Final = (
    'log_level = "{level}"\nmessage_rate = {rate}\nmessage_burst = 100000\n'
    "[topics]\nhistory_size = 1000\nhistory_ttl = 60\n"
    '[[topics.patterns]]\nmatch = "talk"\nhistory_size = 0\n'
)


@attrs.define
class Run:
    """What is measured on the way."""

    target: Target
    options: argparse.Namespace
    published: dict[str, int]
    samples: list[tuple[float, Sample, int]] = attrs.field(factory=list)
    """When, in seconds; and how many tasks there were."""
    broken: int = 0
    reloads: int = 0
    flaps: int = 0
    trouble: list[str] = attrs.field(factory=list)


async def _publish(run: Run) -> None:
    """Publish to each topic in turn, by the clock."""
    async with trio.open_nursery() as nursery:
        field = Field(run.target, nursery)
        try:
            await _publish_on(run, await field.keep_api())
        finally:
            await field.close()  # noqa: ASYNC102 - shields itself, waits for nobody


async def _publish_on(run: Run, api: Api) -> None:
    subscribers = run.options.connections / TOPICS
    rate = run.options.deliveries / subscribers / TURNS
    topics = itertools.cycle(run.published)
    due, owed = trio.current_time(), 0.0
    while True:
        owed += rate
        commands = []
        for _ in range(int(owed)):
            topic = next(topics)
            run.published[topic] += 1
            data = {"n": run.published[topic]}
            commands.append({"publish": {"channel": topic, "data": data}})
        owed -= len(commands)
        answer = await api.call("batch", commands=commands)
        wrong = [each for each in answer["replies"] if "error" in each]
        if wrong:
            run.trouble.append(f"a publish was refused: {wrong[0]}")
        due += 1 / TURNS
        await trio.sleep_until(due)


async def _break_connections(run: Run, number: int) -> None:
    """Be a hostile peer, over and over."""
    async with trio.open_nursery() as nursery:
        field = Field(run.target, nursery)
        for each in itertools.count(number * 10**6):
            try:
                await broken_connection(field, 1, each)
            except Ended:
                pass
            run.broken += 1
            await trio.sleep(0.5)


async def _reload(run: Run) -> None:
    for level, rate in itertools.cycle((("info", "100000"), ("warning", "inf"))):
        await trio.sleep(RELOAD_SECONDS)
        run.target.config_file.write_text(CONFIG.format(level=level, rate=rate))
        run.target.signal(signal.SIGHUP)
        run.reloads += 1


async def _flap(run: Run) -> None:
    """Stop the backend, and let it go on."""
    for number in itertools.cycle((signal.SIGSTOP, signal.SIGCONT)):
        await trio.sleep(FLAP_SECONDS)
        run.target.signal_backend(number)
        run.flaps += number is signal.SIGSTOP


async def _sample(run: Run) -> None:
    peer = Peer(await connect(run.target.address))
    await peer.send(handshake(host=run.target.address.name))
    await peer.head()
    began = trio.current_time()
    while True:
        await peer.send(frame(1, b"tasks"))
        tasks = int(await peer.message())
        run.samples.append((trio.current_time() - began, run.target.sample(), tasks))
        await trio.sleep(SAMPLE_SECONDS)


async def soak(options: argparse.Namespace) -> int:
    with scratch_directory() as scratch:
        setup = Setup(
            app="tests.soak.app:soaked",
            toml=CONFIG.format(level="info", rate="inf"),
            backend=("rpc",),
            env={"BROKER_WEBHOOKS_ANSWER_SECONDS": "1"},
        )
        target = Target(setup, Path(scratch))
        try:
            await target.wait_served()
            async with open_pair(target.address, {}) as pair:
                return await _soak(Run(target, options, dict.fromkeys(_topics(), -1)), pair)
        finally:
            with trio.CancelScope(shield=True):
                target.signal_backend(signal.SIGCONT)
                await target.stop()


def _topics() -> list[str]:
    return [f"t{number}" for number in range(TOPICS)]


async def _soak(run: Run, pair: Any) -> int:
    options = run.options
    address = run.target.address
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "tests.soak.fleet"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    try:
        fleet = Far(process)
        coming = round(options.churn * (STAY_SECONDS + AWAY_SECONDS / 2))
        port = getattr(address, "port")  # noqa: B009 - it is on TCP
        await fleet.order({"port": port, "steady": options.connections, "coming": coming})
        print(f"{options.connections} clients stay, {coming} come and go", flush=True)
        async with trio.open_nursery() as nursery:
            publishing = trio.CancelScope()

            async def publish() -> None:
                with publishing:
                    await _publish(run)

            await pair.begin()
            for task in (
                publish,
                partial(_reload, run),
                partial(_flap, run),
                partial(_sample, run),
            ):
                nursery.start_soon(task)
            for number in range(max(1, options.connections // 100)):
                nursery.start_soon(_break_connections, run, number)
            await _wait(run, fleet, options.minutes * 60)
            publishing.cancel()
            await trio.sleep(2)  # what is on its way arrives
            report = await fleet.order(run.published)
            heard = await pair.end()
            nursery.cancel_scope.cancel()
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
    return _tell(run, report, heard)


async def _wait(run: Run, fleet: Far, seconds: float) -> None:
    """Wait, and say now and then how it goes."""
    end = trio.current_time() + seconds
    while (left := end - trio.current_time()) > 0:
        await trio.sleep(min(left, 30))
        found = await fleet.order(None)
        rss = run.samples[-1][1].rss / MIB if run.samples else 0
        print(
            f"{(seconds - left) / 60:5.1f} min: {found['deliveries']} delivered, lost {found['lost']}, "
            f"twice {found['twice']}, RSS {rss:.1f} MiB",
            flush=True,
        )


def slope(points: Sequence[tuple[float, float]]) -> float:
    """The rise in a second, by least squares; 0 of fewer than two points."""
    count = len(points)
    mean_x, mean_y = (sum(each) / max(1, count) for each in zip(*points, strict=True))
    below = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / below if below else 0.0


def flatness(values: Sequence[float]) -> float:
    """How much higher the last third is than the first, on average."""
    third = max(1, len(values) // 3)
    return sum(values[-third:]) / third - sum(values[:third]) / third


def _tell(run: Run, report: dict[str, Any], heard: Heard) -> int:
    warm = run.samples[int(len(run.samples) * WARM_SHARE) :]
    rise = slope([(when, sample.rss / MIB) for when, sample, _ in warm]) * 600
    files = flatness([sample.files for _, sample, _ in warm])
    tasks = flatness([float(each) for _, _, each in warm])
    # Those that come and go are of another number at any moment.
    room = 3 * run.options.churn**0.5 + 5
    errors = log_errors(run.target.log_lines())
    rate = report["deliveries"] / (run.options.minutes * 60)
    steady_ended = {how: n for how, n in report["ended"].items() if not how.startswith("came")}
    came_ended = {how: n for how, n in report["ended"].items() if how.startswith("came")}
    rows = [
        ("lost", f"{report['lost']} of {report['deliveries']}", not report["lost"]),
        ("twice", f"{report['twice']}", not report["twice"]),
        ("gaps told", f"{report['gaps']} of {report['came']} that came", not report["gaps"]),
        ("steady clients ended", str(steady_ended or 0), not steady_ended),
        ("others ended early", str(came_ended or 0), not came_ended),
        ("deliveries a second", f"{rate:.0f}", rate >= 0.95 * run.options.deliveries),
        ("RSS slope", f"{rise:+.2f} MiB in 10 min, at {warm[-1][1].rss / MIB:.1f}", rise <= SLOPE_MIB),
        ("files", f"{files:+.1f} at {warm[-1][1].files}", abs(files) <= room),
        ("tasks", f"{tasks:+.1f} at {warm[-1][2]}", abs(tasks) <= 3 * room),
        ("bystander p99", f"{heard.p99 * 1000:.1f} ms, {heard.worst * 1000:.1f} at most", heard.p99 * 1000 < P99_MS),
        ("bystander lost", f"{heard.lost} of {heard.sent}", not heard.lost),
        ("bystander twice", f"{heard.twice}", not heard.twice),
        ("bystander ended", heard.closed or "no", not heard.closed),
        ("errors in the log", str(errors[:2] or 0), not errors),
        ("trouble", str(run.trouble[:2] or 0), not run.trouble),
    ]  # fmt: skip
    print(
        f"\n{run.options.minutes:g} min: {run.options.connections} clients, {report['came']} came and went, "
        f"{run.broken} hostile, {run.reloads} reloads, the backend was away {run.flaps} times "
        f"({report['asked']})"
    )
    for name, value, is_good in rows:
        print(f"{name:25} {'ok' if is_good else 'FAIL':5} {value}")
    return 0 if all(is_good for _, _, is_good in rows) else 1


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--minutes", type=float, default=30, help="(%(default)s)")
    parser.add_argument("--connections", type=int, default=2000, help="that stay (%(default)s)")
    parser.add_argument("--churn", type=float, default=50, help="come a second (%(default)s)")
    parser.add_argument("--deliveries", type=int, default=15_000, help="a second (%(default)s)")
    options = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(FILES, hard), hard))
    step_back(NICE)
    gc.freeze()
    return trio.run(soak, options)


if __name__ == "__main__":
    sys.exit(main())
