"""Runs of pytest in a copy of the tree, each in a process that was forked when nearly all was imported:
to start is what most of them take.

Nothing of the broker or of the tests is imported by then, so each run sees the copy as it is at that moment.
"""

import importlib
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Final

import attrs

OURS: Final = ("broker", "tests", "clients")

BROKEN: Final = 70
"""The status of a run in which pytest itself has raised."""

LOOKS_EVERY: Final = 0.02
"""Seconds between two looks at whether a run has ended: it is another process, and no clock of ours moves it."""


@attrs.frozen
class Run:
    status: int
    """As pytest exits: 1 where a test has failed."""
    output: str
    timed_out: bool = False


def warm_up(root: Path) -> None:
    """Import what the tests below `root` import of others; forget what is ours. Call it once, in a process
    with one thread."""
    os.chdir(root)
    sys.path[:] = [str(root), *(each for each in sys.path if each not in ("", str(Path.cwd())))]
    for name in ("pytest", "hypothesis", "pytest_trio.plugin", "tests.conftest"):
        importlib.import_module(name)
    for name in list(sys.modules):
        if name.split(".")[0] in OURS:
            del sys.modules[name]
    importlib.invalidate_caches()


def run(tests: Sequence[str], seconds: float) -> Run:
    """Run these tests, up to the first that fails, for so many seconds at most."""
    with tempfile.TemporaryFile("w+") as output:
        pid = os.fork()
        if not pid:
            _be_pytest(tests, output)
        status = _wait(pid, seconds)
        output.seek(0)
        text = output.read()
    return Run(-1, text, timed_out=True) if status is None else Run(status, text)


def _be_pytest(tests: Sequence[str], output: IO[str]) -> None:
    """The forked process: it never returns."""
    status = BROKEN
    try:
        os.setpgid(0, 0)  # what it starts ends with it
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        pytest = importlib.import_module("pytest")
        options = ["-x", "-q", "-p", "no:cacheprovider", "--tb=line"]
        # Plugins were imported before; their own assertions say less for that.
        options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
        status = int(pytest.main([*options, *tests]))
    finally:  # it must not go on as a copy of its parent
        if status == BROKEN:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _wait(pid: int, seconds: float) -> int | None:
    """The exit status; None for one that was killed as its time was over."""
    due = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > due:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None
        time.sleep(LOOKS_EVERY)
