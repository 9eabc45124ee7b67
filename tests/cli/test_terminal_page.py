"""The examples of the page about the terminal, run as they stand there, against a broker as it says."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs
import pytest

from tests.cli.conftest import COMMAND, PATIENCE, Served, serve

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "howto" / "terminal.md"

SETTINGS = {
    "BROKER_API_KEY": "only-for-a-try-s3cret",
    "BROKER_TOKENS_HMAC_SECRET": "only-for-a-try-0123456789abcdef-0123",
}

OF_BROKER = {"BROKER_NAME": "chat-1", "BROKER_PING_SECONDS": "600"}

# Defined anew in each shell: the script may not be installed where the tests are.
SCRIPT = f'trio-broker() {{ "{sys.executable}" -m broker "$@"; }}\n'


@attrs.frozen
class Example:
    """The commands of one block, and what is printed by them all."""

    commands: list[str]
    output: list[str]


def examples() -> list[Example]:
    blocks = re.findall(r"```console\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    found = []
    for block in blocks:
        lines = block.splitlines()
        commands = [line[2:] for line in lines if line.startswith("$ ")]
        found.append(Example(commands, [line for line in lines if not line.startswith("$ ")]))
    return found


@attrs.define(eq=False)
class Shell:
    """Runs commands as a terminal does: one after the other, those with `&` beside the others."""

    served: Served
    environ: dict[str, str]
    here: Path
    background: list["subprocess.Popen[bytes]"] = attrs.field(factory=list)
    listening: list[tuple[str, "subprocess.Popen[bytes]"]] = attrs.field(factory=list)
    """What was begun with `&`, and the number by which the broker counts it."""

    def run(self, example: Example) -> list[str]:
        """All that the commands print, on stdout and stderr, line by line."""
        out = self.here / "out.txt"
        beside: list[subprocess.Popen[bytes]] = []
        with out.open("wb") as opened:
            for command in example.commands:
                if name := re.match(r"export (\w+)=(.*)", command):
                    self.environ[name[1]] = self._output_of(f"echo {name[2]}")
                elif command.endswith(" &"):
                    beside.append(self._begin(command.removesuffix(" &"), opened))
                else:
                    self._run(command, opened)
            for process in beside:
                if "--count" in str(process.args):
                    process.wait(PATIENCE)
                else:
                    self.background.append(process)
        return out.read_text("utf-8").splitlines()

    def _arguments(self, command: str) -> dict[str, Any]:
        return {
            "args": ["bash", "-c", SCRIPT + command],
            "env": self.environ,
            "cwd": self.here,
        }

    def _output_of(self, command: str) -> str:
        done = self._run(command, subprocess.PIPE)
        return done.stdout.decode().strip()

    def _run(self, command: str, out: Any) -> "subprocess.CompletedProcess[bytes]":
        arguments = self._arguments(command)
        return subprocess.run(
            **arguments, stdout=out, stderr=subprocess.STDOUT, check=False, timeout=PATIENCE
        )

    def _begin(self, command: str, opened: Any) -> "subprocess.Popen[bytes]":
        """Start it, and wait until the broker knows of it."""
        counter = "traces" if " trace " in command else "subscriptions"
        here = [each for kind, each in self.listening if kind == counter and each.poll() is None]
        self.served.wait_left(counter, len(here))
        arguments = self._arguments(command)
        process = subprocess.Popen(
            **arguments, stdout=opened, stderr=opened, start_new_session=True
        )
        self.served.wait_until(counter, len(here) + 1)
        self.listening.append((counter, process))
        return process

    def end(self) -> None:
        for process in self.background:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait()


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    with serve(tmp_path, *COMMAND[1:], "--port", "0", **SETTINGS, **OF_BROKER) as served:
        environ = {**os.environ, **SETTINGS, "BROKER_URL": served.url, "PYTHONPATH": str(ROOT)}
        shell = Shell(served, {**environ, "COLUMNS": "100"}, tmp_path)
        yield shell
        shell.end()


def in_general(line: str) -> str:
    """A line without what is different each time: numbers, times, epochs, the width of columns."""
    line = re.sub(r'("epoch":)"\w+"', r'\1"…"', line)
    line = re.sub(r"\b[0-9][0-9,.:]*[A-Za-z]{0,2}\b", "0", line)
    return " ".join(line.replace("0-0-0 ", "").split())


def test_the_page_prints_what_the_commands_print(shell: Shell) -> None:
    for example in examples():
        printed = shell.run(example)
        expected = list(map(in_general, example.output))
        assert list(map(in_general, printed)) == expected, example.commands
