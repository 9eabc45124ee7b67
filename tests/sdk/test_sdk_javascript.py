"""The npm package `centrifuge`, unmodified, under Node; each scenario is one function there."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

pytestmark = pytest.mark.sdk

HERE = Path(__file__).parent
SCENARIOS = re.findall(
    r"^  async (\w+)\(\) \{$", (HERE / "scenarios.mjs").read_text(), re.MULTILINE
)


@pytest.fixture(scope="session")
def node(missing: Callable[[str], NoReturn]) -> str:
    path = shutil.which("node")
    if path is None:
        missing("node is not installed (Debian: apt-get install nodejs npm)")
    if not (HERE / "node_modules" / "centrifuge").is_dir():
        missing("the JavaScript SDK is not installed: run `npm ci` in tests/sdk, or `nox -s sdk`")
    return path


def test_the_scenarios_were_found() -> None:
    assert {"messages", "history", "presence", "recovery", "direct"} <= set(SCENARIOS)


@pytest.mark.parametrize("encoding", ["json", "protobuf"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_javascript_sdk_does(
    scenario: str, encoding: str, node: str, start_broker: Callable[..., Any]
) -> None:
    broker = start_broker()
    done = subprocess.run(
        [node, "scenarios.mjs", scenario, encoding, broker.ws],
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    broker.stop()
