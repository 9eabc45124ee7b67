"""Every engine keeps the contract."""

from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from broker.config.engine_url import parse_engine_url
from broker.engines.memory import open_memory
from broker.engines.sqlite import open_sqlite
from broker.testing import ENGINE_CONTRACT, OpenEngine, engine_contract, wait_in_line

ROOM = 64 * 2**20


def memory(path: Path) -> OpenEngine:
    return lambda: open_memory(ROOM, ROOM)


def sqlite(path: Path, query: str = "") -> OpenEngine:
    url = parse_engine_url(f"sqlite:{path}{query}")
    return lambda: open_sqlite(
        url, ROOM, ROOM, lambda: 1e9 + trio.current_time(), run_blocking=wait_in_line
    )


def sqlite_process(path: Path) -> OpenEngine:
    return sqlite(path, "?sync=process")


def sqlite_cleaning(path: Path) -> OpenEngine:
    """One that is cleaned all the time."""
    url = parse_engine_url(f"sqlite:{path}")
    return lambda: open_sqlite(
        url,
        ROOM,
        ROOM,
        lambda: 1e9 + trio.current_time(),
        run_blocking=wait_in_line,
        spare_bytes=-(2**40),
    )


def sqlite_in_threads(path: Path) -> OpenEngine:
    url = parse_engine_url(f"sqlite:{path}")
    return lambda: open_sqlite(url, ROOM, ROOM, lambda: 1e9 + trio.current_time())


ENGINES = [memory, sqlite, sqlite_process, sqlite_cleaning]


@pytest.mark.parametrize("check", ENGINE_CONTRACT)
@pytest.mark.parametrize("engine", ENGINES)
async def test_an_engine_keeps_the_contract(
    engine: Callable[[Path], OpenEngine], check: str, autojump_clock: MockClock, tmp_path: Path
) -> None:
    await ENGINE_CONTRACT[check](engine(tmp_path / "log.db"))


@pytest.mark.parametrize("check", ["order", "room", "cancelled", "restart"])
async def test_it_keeps_it_with_threads_in_real_time(check: str, tmp_path: Path) -> None:
    await ENGINE_CONTRACT[check](sqlite_in_threads(tmp_path / "log.db"))


async def test_the_contract_as_a_whole(autojump_clock: MockClock, tmp_path: Path) -> None:
    stores = iter(tmp_path / f"{number}.db" for number in range(100))
    await engine_contract(lambda: sqlite(next(stores)))
