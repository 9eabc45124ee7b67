"""Completion by the shell, as the reference tells to switch it on."""

import os
import re
import shutil
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


def test_the_line_of_the_reference_has_bash_complete(tmp_path: Path) -> None:
    """The line as it stands there, then what bash does when Tab is pressed."""
    bash = shutil.which("bash")
    assert bash is not None
    page = (ROOT / "docs" / "reference" / "command-line.md").read_text("utf-8")
    (line,) = re.findall(r"## Completion\n.*?```shell\n(.*?)```", page, re.DOTALL)
    script = tmp_path / "trio-broker"
    script.write_text(f"#!{sys.executable}\nfrom broker.__main__ import run\nrun()\n", "utf-8")
    script.chmod(0o755)
    pressed = (
        "COMP_WORDS=(trio-broker conn) COMP_CWORD=1\n"
        "_trio_broker_completion trio-broker conn trio-broker\n"
        "complete -p trio-broker\n"
        'printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    environ = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(
        [bash, "--norc", "-c", line + pressed],
        env=environ,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [
        "complete -o nosort -F _trio_broker_completion trio-broker",
        "connections",
        "connection",
    ], done.stderr
