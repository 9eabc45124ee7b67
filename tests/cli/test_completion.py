"""Completion by the shell, as the reference tells to switch it on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = "import sys; sys.argv[0] = 'trio-broker'; from broker.__main__ import run; run()"


def completed(*words: str) -> list[str]:
    environ = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "_TRIO_BROKER_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(["trio-broker", *words]),
        "COMP_CWORD": str(len(words)),
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environ, capture_output=True, text=True, check=True
    )
    return [line.partition(",")[2] for line in done.stdout.splitlines() if line]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("conn",), ["connections", "connection"]),
        (("tr",), ["trace"]),
        (("--max-c",), ["--max-connections"]),
        (("--port", "9000", "--hist"), ["--history-size", "--history-ttl"]),
        (("nonsense", "x"), []),
        (("config", ""), ["check", "init", "show"]),
        (("sub", "--s"), ["--since"]),
        (("serve", "--slow-consumer", ""), ["close", "drop_oldest", "latest"]),
    ],
)
def test_commands_and_options_are_completed(words: tuple[str, ...], found: list[str]) -> None:
    assert completed(*words) == found


def test_the_line_of_the_reference_defines_it() -> None:
    page = (ROOT / "docs" / "reference" / "command-line.md").read_text("utf-8")
    assert "_TRIO_BROKER_COMPLETE=bash_source trio-broker" in page
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "_TRIO_BROKER_COMPLETE": "bash_source"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environ, capture_output=True, text=True, check=True
    )
    assert "complete -o nosort -F _trio_broker_completion trio-broker" in done.stdout
