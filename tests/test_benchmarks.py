"""Tables that the benchmarks make of their figures, and their generator's own HTTP."""

import json
import shutil
import subprocess
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import trio

from broker import Broker, Config

HERE = Path(__file__).parent.parent / "benchmarks"
RUN = {"stalled": False, "lost_connections": 0, "others_cpu": 0.0, "load_cpu": 0.1, "samples": 0}


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(HERE))
    import report  # type: ignore[import-not-found]  # a script's neighbour, not a package

    found: ModuleType = report
    return found


@pytest.fixture
def scenarios(report: ModuleType) -> ModuleType:
    import scenarios  # type: ignore[import-not-found]

    found: ModuleType = scenarios
    return found


def rounds(first: int, *rates: float | None, commit: str = "c") -> list[dict[str, Any]]:
    """One run a round with these deliveries a second; None has failed."""
    return [
        {"round": f"r{number}", "commit": commit}
        | (
            {"error": "it fell over"}
            if rate is None
            else RUN | {"deliveries_per_second": rate, "server_cpu": 0.5}
        )
        for number, rate in enumerate(rates, first)
    ]


def text(report: ModuleType, **servers: list[dict[str, Any]]) -> str:
    machine = {"cpu": "c", "kernel": "k", "date": "d", "versions": "v"}
    shown = report.text({"runs": {"100-100": servers}, "machine": machine})
    assert isinstance(shown, str)
    return shown


def row(report: ModuleType, **servers: list[dict[str, Any]]) -> list[str]:
    """The cells of the one scenario."""
    lines = text(report, **servers).splitlines()
    (line,) = [line for line in lines if line.startswith("| 100→100, each to all |")]
    return [cell.strip() for cell in line.strip("|").split("|")][2:]


def test_ratios_are_taken_within_a_round(report: ModuleType) -> None:
    # Paired by their place, the ratios would be 4, 6 and 1; by their medians 4.
    ours, theirs = rounds(1, 40, 60, 10), rounds(2, 10, 10, 10)
    assert row(report, broker=ours, nats=theirs) == ["3", "**40**", "10 (3.5×)"]


def test_without_a_common_round_there_is_no_ratio(report: ModuleType) -> None:
    ours, theirs = rounds(1, 40, 60), rounds(3, 10, 10)
    assert row(report, broker=ours, nats=theirs) == ["2", "**50**", "10 (no pair)"]
    shown = text(report, broker=ours, nats=theirs)
    assert "| 100→100, each to all, deliveries/s | ≥ 1.5× nats | no pair | not measured |" in shown
    assert "No peer does better" in shown


def test_a_server_of_fewer_rounds_says_so(report: ModuleType) -> None:
    cells = row(report, broker=rounds(1, 40, 60, 50), uws=rounds(1, 10, 10))
    assert cells == ["3", "**50**", "10 (5×, of 2)"]


def test_a_row_needs_no_peer(report: ModuleType) -> None:
    assert row(report, broker=rounds(1, 40, 60)) == ["2", "**50**"]


def test_the_compiled_broker_has_a_column_and_is_held_to_the_same_goals(
    report: ModuleType,
) -> None:
    servers = {"nats": rounds(1, 20), "compiled": rounds(1, 80), "broker": rounds(1, 40)}
    assert row(report, **servers) == ["1", "**40**", "80 (0.5×)", "20 (2×)"]
    shown = text(report, **servers)
    goal = "| 100→100, each to all, deliveries/s | ≥ 1.5× nats | 2.00× | met | 2.00× | 4.00× |"
    assert goal in shown
    assert "No peer does better" in shown


def test_a_server_that_fails_is_named(report: ModuleType) -> None:
    ours = rounds(1, 40, 60)
    assert row(report, broker=ours, uws=rounds(1, None, None)) == ["2", "**50**", "fails"]
    shown = text(report, broker=ours, uws=rounds(1, None, None), nats=rounds(1, None, 1))
    assert "- uws, 100→100, each to all: it fell over" in shown
    assert "- nats, 100→100, each to all: " not in shown


def test_figures_of_more_than_one_commit_are_not_shown_as_one(report: ModuleType) -> None:
    ours = [*rounds(1, 40, commit="new"), *rounds(2, 50, commit="old")]
    assert "more than one commit: new, old." in text(report, broker=ours)
    assert "more than one commit" not in text(report, broker=rounds(1, 40, 50))


@pytest.mark.parametrize(("now", "worse"), [(96, False), (94, True), (200, False)])
def test_a_tree_that_is_slower_by_a_twentieth_is_worse(
    report: ModuleType, now: float, worse: bool
) -> None:
    runs = {"100-100": {"old": rounds(1, 100, 100), "broker": rounds(1, now, now)}}
    shown = report.trees(runs, "old")
    assert f"| 2 | 100 | {now} | {now / 100:.3f}×" in shown
    assert ("**worse**" in shown) is worse


def test_every_goal_is_about_what_is_measured(scenarios: ModuleType) -> None:
    servers = {scenario.name: scenario.servers for scenario in scenarios.SCENARIOS}
    assert len(servers) == len(scenarios.SCENARIOS)
    for goal in scenarios.GOALS:
        assert "broker" in servers[goal.scenario]
        scenario, slash, server = goal.versus.partition("/")
        if goal.versus:
            assert (server if slash else scenario) in servers[scenario if slash else goal.scenario]
        assert scenarios.has_goal(goal.scenario, "broker")
    assert scenarios.has_goal("patterns-10", "broker")
    assert scenarios.has_goal("100-100", "nats")
    assert not scenarios.has_goal("100-100", "uws")
    assert not scenarios.has_goal("payload-16", "broker")


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    program = tmp_path_factory.mktemp("load") / "load"
    subprocess.run([compiler, "-O1", "-o", program, HERE / "load.c"], check=True)
    return program


async def drive(generator: Path, key: str, **options: object) -> tuple[int, str, str]:
    """Publish by HTTP to a broker for a moment; status, output and complaints of the generator."""
    subscribe = '{"id":2,"subscribe":{"channel":"t.%T"}}'
    options = {
        "path": "/connection/websocket", "sub-hello": '{"id":1,"connect":{}}|' + subscribe,
        "sub-ready": '"id":2,"subscribe"', "http-headers": f"X-API-Key: {key}\\r\\n",
        "seconds": 0.2, "warm": 0.1, "subs": 2, "pubs": 2, "topics": 2, **options,
    }  # fmt: skip
    async with trio.open_nursery() as nursery:
        broker = Broker(Config(port=0, api_key="right", log_level="error"))
        (address, *_) = await nursery.start(broker.serve)
        argv = [str(generator), "--port", address.rpartition(":")[2]]
        for name, value in options.items():
            argv += [f"--{name}", str(value)]
        run = partial(trio.run_process, argv, check=False, capture_stdout=True, capture_stderr=True)
        with trio.fail_after(20):
            done = await run()
        broker.stop()
    return done.returncode, done.stdout.decode(), done.stderr.decode()


ONE = {"http": "/api/publish", "prefix": '{"channel":"t.%T","data":"', "suffix": '"}'}
BATCH = {
    "http": "/api/batch", "batch": 100, "batch-open": '{"commands":[', "batch-between": ",",
    "batch-close": "]}", "prefix": '{"publish":' + ONE["prefix"], "suffix": '"}}',
}  # fmt: skip


@pytest.mark.parametrize("request_", [ONE, BATCH], ids=["one", "batch"])
async def test_publications_by_http_arrive(generator: Path, request_: dict[str, object]) -> None:
    window = 100 if "batch" in request_ else 10
    status, output, complaints = await drive(generator, "right", window=window, **request_)
    assert (status, complaints) == (0, "")
    run = json.loads(output)
    assert run["publishes_per_second"] > 0
    missing = (run["publishes_per_second"] - run["deliveries_per_second"]) * run["seconds"]
    assert abs(missing) <= 2 * window + 2  # what is under way at one end, and rounding
    assert not run["stalled"]


async def test_publications_refused_by_http_are_not_counted(generator: Path) -> None:
    status, output, complaints = await drive(generator, "wrong", **ONE)
    assert (status, output) == (1, "")
    assert "HTTP/1.1 401" in complaints


async def test_a_generator_without_openssl_says_so(generator: Path) -> None:
    status, output, complaints = await drive(generator, "right", tls=1, **ONE)
    assert (status, output) == (2, "")
    assert "built without OpenSSL" in complaints


def test_rows_over_tls_are_left_out_aloud_where_they_cannot_be_measured(
    scenarios: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    import run  # type: ignore[import-not-found]

    monkeypatch.setattr(run, "build_generator", lambda scratch: "no headers")
    tasks = [run.Task(1, each, run.SERVERS["broker"]) for each in scenarios.SCENARIOS]
    bench = run.Bench(tmp_path, 0, tasks)
    assert bench.left_out == {"tls": "no headers"}
    assert capsys.readouterr().out == "LEFT OUT: tls: no headers\n"


@pytest.fixture
def scale(report: ModuleType) -> ModuleType:
    import scale  # type: ignore[import-not-found]

    found: ModuleType = scale
    return found


def test_the_page_about_scale_has_the_tables_as_they_are_reckoned(scale: ModuleType) -> None:
    page = (HERE.parent / "docs" / "scale.md").read_text("utf-8")
    assert scale.with_tables(page) == page, "run python benchmarks/scale.py --write"
    for each in scale.COSTS:
        assert each.command in page


def test_what_was_measured_stands_in_the_program_with_two_digits(scale: ModuleType) -> None:
    source = (HERE.parent / "benchmarks" / "scale.py").read_text("utf-8")
    found = scale.with_costs(source, {"reader": 0.2034, "publish with history": 118.25})
    assert 'Cost("reader", 0.2, ' in found
    assert 'Cost("publish with history", 120, ' in found
    with pytest.raises(AssertionError, match="no such"):
        scale.with_costs(source, {"no such": 1.0})


def test_more_of_anything_needs_more(scale: ModuleType) -> None:
    usual = scale.Load(1_000_000)
    for more in ({"connections": 3_000_000}, {"publishes": 0.05}, {"listeners": 100}):
        heavy = scale.need(scale.attrs.evolve(usual, **more), shared=True)
        assert heavy.nodes > scale.need(usual, shared=True).nodes
    with pytest.raises(ValueError, match="one process"):
        scale.need(usual, shared=False)
    busy = scale.need(scale.Load(10_000_000), shared=True)
    assert busy.logs > 1
    assert max(busy.redis_busy, busy.node_busy) <= scale.BUSY


def test_all_come_back_after_a_node_has_died(scale: ModuleType) -> None:
    alone, many = scale.storm(1000, 1), scale.storm(1000, 10)
    assert 0 < many[1] <= alone[1] < 20
    assert max(alone[2], many[2]) <= scale.BUSY
