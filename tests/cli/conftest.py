"""The command line as a process of its own, and the guards of one that runs in this process."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    asynccontextmanager,
    closing,
    contextmanager,
)
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from click.testing import CliRunner, Result

from broker import Broker, Config
from broker.cli.main import main

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


@contextmanager
def patient() -> Iterator[None]:
    """Ends a command that runs in this process and should have ended long ago."""

    def ring(*_: object) -> None:
        raise TimeoutError("it serves, or hangs")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def alarm() -> Iterator[None]:
    with patient():
        yield


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    return tmp_path


@attrs.define(eq=False)
class Served:
    """A broker that serves in a process of its own, and commands for it that run in this one."""

    url: str
    key: str
    process: "subprocess.Popen[str]"

    def invoke(self, *args: str, env: dict[str, str] | None = None) -> Result:
        """Run a command to its end, as somebody does whose environment names this broker."""
        environ: dict[str, str | None] = {"BROKER_URL": self.url, "BROKER_API_KEY": self.key}
        with patient():
            return CliRunner().invoke(main, list(args), env={**environ, **(env or {})})

    def ok(self, *args: str) -> str:
        """What a command prints that ends well."""
        result = self.invoke(*args)
        assert result.exit_code == 0, result.output
        return result.stdout

    def json(self, *args: str) -> Any:
        """The JSON objects that it prints, one a line."""
        return [json.loads(line) for line in self.ok(*args, "--json").splitlines()]

    def api(self, method: str, **params: object) -> Any:
        """Call a method of the HTTP API directly."""
        connection = HTTPConnection(self.url.removeprefix("ws://"))
        with closing(connection):
            headers = {"X-API-Key": self.key}
            body = json.dumps(params, ensure_ascii=False).encode()
            connection.request("POST", f"/api/{method}", body, headers)
            return json.loads(connection.getresponse().read())["result"]

    def wait_until(self, counter: str, least: int) -> None:
        """Wait until a number of `stats` is so much."""
        deadline = time.monotonic() + PATIENCE
        while self.api("stats")[counter] < least:
            assert time.monotonic() < deadline, f"{counter} is not {least}"

    def wait_left(self, counter: str, most: int = 0) -> None:
        """Wait until no more are here than so many: who has just ended may be counted for a moment."""
        deadline = time.monotonic() + PATIENCE
        while self.api("stats")[counter] > most:
            assert time.monotonic() < deadline, f"{counter} is more than {most}"


@contextmanager
def serve(here: Path, *args: str, **environ: str) -> Iterator[Served]:
    """A broker as a process, with its log in JSON; `environ` has its api_key."""
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, *args, "--log-format", "json"],
        stderr=subprocess.PIPE,
        text=True,
        cwd=here,
        env={**os.environ, "PYTHONPATH": root, **environ},
    )
    assert process.stderr is not None
    ready = next(line for line in process.stderr if '"ready"' in line)
    drain = threading.Thread(target=process.stderr.read)
    drain.start()
    try:
        address = json.loads(ready)["addresses"][0].partition("://")[2]
        yield Served(f"ws://{address}", environ["BROKER_API_KEY"], process)
    finally:
        process.terminate()
        process.wait()
        drain.join()
        process.stderr.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A broker whose clients are who their token says, for all tests of a module."""
    here = tmp_path_factory.mktemp("served")
    (here / "served_app.py").write_text(
        "from broker import Broker, Config, ConnectReply\n"
        "broker = Broker(Config(port=0, max_topics=500))\n"
        "@broker.on_connect\n"
        "async def let_in(event):\n"
        "    topics = ('of.server',) if event.token == 'reader' else ()\n"
        "    return ConnectReply(user=event.token, info={'name': event.token}, topics=topics)\n"
    )
    with serve(here, *COMMAND[1:], "served_app:broker", BROKER_API_KEY="s3cret") as broker:
        yield broker


@asynccontextmanager
async def serving() -> AsyncIterator[str]:
    broker = Broker(Config(host="127.0.0.1", port=0, drain_seconds=0))
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            (url,) = await nursery.start(broker.serve)
            yield url
            broker.stop()
