"""The files under docs/monitoring are true: Prometheus takes them, and they ask for metrics that we have."""

import json
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from broker.http.metrics import METRICS
from tests.conftest import PATIENCE, Process
from tests.ports import free_port

FILES = Path(__file__).parent.parent / "docs" / "monitoring"
HOWTO = FILES.parent / "howto" / "monitoring.md"
KEY = "m3trics"

_SUFFIXES = {
    "gauge": ("",),
    "counter": ("_total",),
    "histogram": ("_bucket", "_sum", "_count"),
    "gauge histogram": ("_bucket", "_gsum", "_gcount"),
}
SERIES = {metric.name + suffix for metric in METRICS for suffix in _SUFFIXES[metric.kind]}
"""All names of series that a broker has."""

Missing = Callable[[str], NoReturn]


@pytest.fixture(scope="session")
def tool(missing: Missing) -> Callable[[str], str]:
    def find(name: str) -> str:
        return shutil.which(name) or missing(f"{name} is not installed (Debian: prometheus)")

    return find


def run(*command: str, given: bytes = b"") -> str:
    """What a command prints; it has to succeed."""
    result = subprocess.run(
        command, input=given, cwd=FILES, capture_output=True, timeout=60, check=False
    )
    assert result.returncode == 0, (result.stdout + result.stderr).decode()
    return (result.stdout + result.stderr).decode()


def dashboard() -> Any:
    return json.loads((FILES / "grafana.json").read_text("utf-8"))


def queries() -> list[str]:
    """All that the dashboard asks, in the words of Prometheus."""
    asked = [
        target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", ())
    ]
    return [each.replace("$__rate_interval", "1m") for each in asked]


def series_in(text: str) -> set[str]:
    return set(re.findall(r"\b(?:broker|process)_[a-z_]+\b", text))


def test_what_dashboard_and_alerts_ask_for_is_there() -> None:
    asked = series_in("\n".join(queries()))
    rules = "\n".join(
        line
        for line in (FILES / "alerts.yml").read_text("utf-8").splitlines()
        if "what_to_do" not in line and "summary" not in line
    )
    assert len(asked) > 30
    assert asked <= SERIES
    assert series_in(rules) <= SERIES
    for variable in dashboard()["templating"]["list"]:
        assert series_in(variable.get("definition", "")) <= SERIES


def test_every_metric_is_on_the_dashboard_or_in_the_how_to() -> None:
    page = HOWTO.read_text("utf-8")
    listed = set(re.findall(r"^\| `([a-z_]+)`", page, re.MULTILINE))
    named = {m.name + ("_total" if m.kind == "counter" else "") for m in METRICS}
    assert listed == named


def test_panels_stand_beside_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells


# with Debian's package


def test_prometheus_takes_the_rules_and_they_fire_when_they_should(
    tool: Callable[[str], str],
) -> None:
    promtool = tool("promtool")
    run(promtool, "check", "rules", "alerts.yml")
    run(promtool, "test", "rules", "alerts_test.yml")


def test_prometheus_understands_what_the_dashboard_asks(
    tool: Callable[[str], str], tmp_path: Path
) -> None:
    rules = [{"record": f"panel:{n}", "expr": expr} for n, expr in enumerate(queries())]
    path = tmp_path / "queries.yml"
    path.write_text(json.dumps({"groups": [{"name": "queries", "rules": rules}]}))  # also YAML
    run(tool("promtool"), "check", "rules", str(path))


@pytest.fixture
def prometheus(
    tool: Callable[[str], str], tmp_path: Path, start_broker: Callable[..., Process]
) -> Iterator[tuple[Process, str]]:
    """A broker, and Prometheus that scrapes it as the docs say; both its own URLs."""
    program = tool("prometheus")
    (tmp_path / "broker.toml").write_text(f'metrics_key = "{KEY}"\n')
    broker = start_broker("--config", str(tmp_path / "broker.toml"))
    port = free_port()
    text = (FILES / "prometheus.yml").read_text("utf-8")
    text = text.replace("localhost:9501", f"127.0.0.1:{broker.port}")
    text = text.replace("scrape_interval: 15s", "scrape_interval: 1s")
    (tmp_path / "prometheus.yml").write_text(text)
    (tmp_path / "metrics_key").write_text(f"{KEY}\n")
    shutil.copy(FILES / "alerts.yml", tmp_path)
    with (tmp_path / "prometheus.log").open("wb") as output:
        process = subprocess.Popen(
            [
                *(program, "--config.file", "prometheus.yml"),
                *("--web.listen-address", f"127.0.0.1:{port}"),
                *("--storage.tsdb.path", "data"),
            ],
            cwd=tmp_path,
            stdout=output,
            stderr=output,
        )
    try:
        yield broker, f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def ask(url: str, query: str) -> list[Any]:
    """The samples that a query has now; none while Prometheus does not answer yet."""
    asked = urllib.parse.urlencode({"query": query})
    try:
        with urllib.request.urlopen(f"{url}/api/v1/query?{asked}", timeout=PATIENCE) as answer:
            result = json.load(answer)["data"]["result"]
    except OSError:
        return []
    assert isinstance(result, list)
    return result


def test_prometheus_scrapes_a_broker_as_the_how_to_says(
    prometheus: tuple[Process, str], tool: Callable[[str], str]
) -> None:
    broker, url = prometheus
    deadline = time.monotonic() + 3 * PATIENCE
    while not (found := ask(url, 'up{job="broker"} == 1')):
        assert time.monotonic() < deadline, "it is not scraped"
        time.sleep(0.1)  # a foreign process: no clock of ours moves it
    assert found[0]["value"][1] == "1"
    assert ask(url, "broker_info")[0]["metric"]["version"]
    request = urllib.request.Request(
        f"{broker.http}/metrics", headers={"Authorization": f"Bearer {KEY}"}
    )
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        text = answer.read()
    assert run(tool("promtool"), "check", "metrics", given=text) == ""
