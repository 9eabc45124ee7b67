"""Upkeep of the file of a sqlite engine, while no broker uses it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, TypeVar

import attrs
import trio

from broker.engines.sqlite import SqliteEngine
from broker.engines.sqlite_file import LogFile

T = TypeVar("T")

NO_BOUND: Final = 2**62
"""Here nothing gives way to anything: how much room there is, the broker's settings say."""


@attrs.frozen
class FileReport:
    """The contents of a file. Publications past their time are not counted."""

    problems: list[str]
    topics: int = 0
    publications: int = 0
    values: int = 0
    keys: int = 0
    next_fd: int = 0
    commits: int = 0
    bytes: int = 0
    is_clean: bool = True


async def inspect(path: Path) -> FileReport:
    """Read all of a file, and change nothing. Raises `ConfigError` for one that cannot be opened, or
    holds what we do not write."""
    with _opened(path) as file:
        problems = file.problems()
        if problems:
            return FileReport(problems)
        commits = sum(1 for _ in file.rows())
        engine = _read(file)
        history = engine.statistics().history
        return FileReport(
            [],
            topics=history.topics,
            publications=history.publications,
            values=len(engine.retained),
            keys=len(engine.keys),
            next_fd=file.meta.next_fd,
            commits=commits,
            bytes=path.stat().st_size,
            is_clean=file.meta.is_clean,
        )


async def compact(path: Path) -> tuple[int, int]:
    """Make a file as small as what it keeps; its bytes before and after.

    Raises `ConfigError` as `inspect` does, and `NotWritten` where there is no room for that: what it
    keeps is the same then.
    """
    before = path.stat().st_size if path.exists() else 0
    with _opened(path) as file:
        _read(file).write_all_anew()
        file.shrink()
    return before, path.stat().st_size


@contextmanager
def _opened(path: Path) -> Iterator[LogFile]:
    file = LogFile.open(path, "power", must_exist=True)
    try:
        yield file
    finally:
        file.close()


async def _at_once(work: Callable[[], T], /) -> T:
    return work()  # nobody else is here who could go on meanwhile


def _read(file: LogFile) -> SqliteEngine:
    engine = SqliteEngine(file, "power", NO_BOUND, NO_BOUND, time.time, _at_once, NO_BOUND)
    engine.replay(trio.current_time(), time.time())
    return engine
