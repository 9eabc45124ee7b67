"""The npm package `centrifuge`, unmodified, under Node; each scenario is one function there."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import PATIENCE

pytestmark = pytest.mark.sdk

HERE = Path(__file__).parent
SCENARIOS = re.findall(
    r"^  async (\w+)\(\) \{$", (HERE / "scenarios.mjs").read_text(), re.MULTILINE
)


# Scenarios that a transport could break; the rest is the same protocol, tried over WebSocket alone.
OVER_HTTP = ["messages", "presence", "recovery", "rpc", "tokenRefresh", "lostSession"]
RUNS = [
    *((scenario, "json", "websocket") for scenario in SCENARIOS),
    *((scenario, "protobuf", "websocket") for scenario in SCENARIOS if scenario != "fallback"),
    *((scenario, "json", how) for how in ("http_stream", "sse") for scenario in OVER_HTTP),
    *((scenario, "protobuf", "http_stream") for scenario in OVER_HTTP),
]


def test_the_scenarios_were_found() -> None:
    assert {*OVER_HTTP, "history", "direct", "fallback"} <= set(SCENARIOS)


@pytest.mark.parametrize(("scenario", "encoding", "transport"), RUNS)
def test_the_javascript_sdk_does(
    scenario: str,
    encoding: str,
    transport: str,
    node: str,
    start_broker: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if scenario.startswith("token"):
        monkeypatch.setenv("BROKER_TOKENS_HMAC_SECRET", "0123456789abcdef0123456789abcdef")
    broker = start_broker()
    done = subprocess.run(
        [node, "scenarios.mjs", scenario, encoding, transport, broker.ws],
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    broker.stop()
