"""The command line as a process of its own, and the guards of one that runs in this process."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import attrs
import pytest
import trio

# A process that does not do what a test waits for fails the test, not the whole run.
PATIENCE = 60

COMMAND = (sys.executable, "-m", "broker")


@attrs.define(eq=False)
class Running:
    """`python -m broker …` as a process; stderr is read line by line."""

    process: trio.Process
    stdout: bytearray = attrs.field(factory=bytearray)
    stderr: bytearray = attrs.field(factory=bytearray)
    grown: trio.Event = attrs.field(factory=trio.Event)
    ended: int = 0

    async def read(self, stream: trio.abc.ReceiveStream, into: bytearray) -> None:
        async for chunk in stream:
            into += chunk
            self._tell()
        self.ended += 1
        self._tell()

    def _tell(self) -> None:
        self.grown.set()
        self.grown = trio.Event()

    async def wait_for(self, text: str, *, into: str = "stderr") -> str:
        """The first line of stderr (or stdout) that holds `text`."""
        while True:
            for line in bytes(getattr(self, into)).decode().splitlines(keepends=True):
                if text in line and line.endswith("\n"):
                    return line
            if self.ended == 2:
                pytest.fail(f"ended without {text!r} on {into}; stderr: {self.stderr.decode()}")
            await self.grown.wait()

    async def url(self) -> str:
        """Where it listens; needs `--log-format json`."""
        addresses: list[str] = json.loads(await self.wait_for('"ready"'))["addresses"]
        return addresses[0]

    async def stop(self, *signals: signal.Signals) -> int:
        for number in signals:
            self.process.send_signal(number)
        return await self.process.wait()


@asynccontextmanager
async def _running(
    *args: str,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
    command: tuple[str, ...] = COMMAND,
    pass_fds: tuple[int, ...] = (),
) -> AsyncIterator[Running]:
    root = str(Path(__file__).parents[2])
    environ = {**os.environ, "PYTHONPATH": root, **(env or {})}
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            process = await trio.lowlevel.open_process(
                [*command, *args],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=cwd,
                env=environ,
                pass_fds=pass_fds,
            )
            it = Running(process)
            assert process.stdout is not None
            assert process.stderr is not None
            nursery.start_soon(it.read, process.stdout, it.stdout)
            nursery.start_soon(it.read, process.stderr, it.stderr)
            try:
                yield it
            finally:
                process.kill()
                with trio.CancelScope(shield=True):
                    await process.wait()


async def _run(*args: str) -> tuple[int, str, str]:
    """Run a command to its end: exit status, stdout, stderr."""
    async with _running(*args) as it:
        status = await it.process.wait()
    return status, it.stdout.decode(), it.stderr.decode()


@pytest.fixture
def running() -> Callable[..., AbstractAsyncContextManager[Running]]:
    """Run `python -m broker …` for a block; `command` stands for all before the arguments."""
    return _running


@pytest.fixture
def run() -> Callable[..., object]:
    """Run a command to its end: exit status, stdout, stderr."""
    return _run


@pytest.fixture
def alarm() -> Iterator[None]:
    """Ends a command that runs in this process and should have failed at once."""

    def ring(*_: object) -> None:
        raise TimeoutError("it serves, or hangs")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(PATIENCE)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    return tmp_path
