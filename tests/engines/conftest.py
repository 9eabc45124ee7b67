"""An engine on a file, a Redis, and room for all that tests keep."""

import resource
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.lowlevel

from broker.config.engine_url import parse_engine_url
from broker.engines.redis_log import Logged
from broker.engines.sqlite import SqliteEngine, open_sqlite
from broker.testing import Witness, wait_in_line
from tests.conftest import Disk
from tests.engines.servers import BINARIES, Server, serving

ROOM = 64 * 2**20


@asynccontextmanager
async def opened(
    path: Path,
    query: str = "",
    *,
    disk: Disk | None = None,
    room: int = ROOM,
    runs: bool = True,
    **options: Any,
) -> AsyncGenerator[tuple[SqliteEngine, Witness]]:
    """An engine on a file, giving back to a witness."""
    url = parse_engine_url(f"sqlite:{path}{query}")
    clock = partial(_wall_clock, 1e9)
    waits = disk or wait_in_line
    async with open_sqlite(url, room, room, clock, run_blocking=waits, **options) as engine:
        witness = Witness(engine)
        try:
            if not runs:
                yield engine, witness
                return
            async with engine.running(witness):
                yield engine, witness
        finally:
            if disk is not None:
                disk.release()  # a test that fails meanwhile ends, too


@contextmanager
def files_bounded(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size`: its disk is full, as far as it can tell."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _wall_clock(began: float) -> float:
    return began + trio.current_time()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.db"


def logged(first: int, epoch: str = "e1") -> Logged:
    return Logged("other", "k", "t", 0, first, epoch, 10, 60.0, 0.0, 9, b"")


ONE = BINARIES["valkey"]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(ONE, tmp_path) as server:
        yield server
