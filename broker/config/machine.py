"""The memory of this machine, and of this process.

Nothing here waits: the files are the system's own, and are in memory. Where a system does not tell,
or cannot do, what is asked, nothing happens.
"""

import ctypes
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Final

import attrs

from broker.config.settings import Config

PROC: Final = Path("/proc")
CGROUPS: Final = Path("/sys/fs/cgroup")

UNKNOWN_BYTES: Final = 2**30
"""Taken for the memory of a machine that does not say: as much as the smallest ones have."""


@attrs.frozen
class Room:
    """How much memory there is, in bytes, and whether the `machine` or its `cgroup` sets that."""

    bytes: int
    of: str


def memory_limit(config: Config) -> int:
    """`max_memory_bytes` as it counts: half of what there is where it is unset. Python, the buffers of the
    system, and gaps in memory have the other half."""
    if config.max_memory_bytes is not None:
        return config.max_memory_bytes
    return find_room().bytes // 2


def find_room(proc: Path = PROC, cgroups: Path = CGROUPS) -> Room:
    """The memory of the machine, or the limit of the cgroup that this process is in, or of one around
    that: whichever is least. Knows cgroups of both versions."""
    room = Room(_physical_bytes(), "machine")
    for limit in _limits(proc, cgroups):
        if limit < room.bytes:
            room = Room(limit, "cgroup")
    return room


def _physical_bytes() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return UNKNOWN_BYTES


def _limits(proc: Path, cgroups: Path) -> Iterator[int]:
    """The limits of all cgroups from that of this process outwards.

    In a container the path may be that of the host, of which only the last part, or nothing, is there
    to be seen; the root is then the container's own.
    """
    for line in _read(proc / "self" / "cgroup").splitlines():
        _, controllers, path = (line.split(":", 2) * 3)[:3]  # a line of another form names none
        if controllers == "":
            root, name = cgroups, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = cgroups / "memory", "memory.limit_in_bytes"
        else:
            continue
        inner = root / path.lstrip("/")
        for directory in (inner, *inner.parents):
            text = _read(directory / name).strip()
            if text.isdecimal():  # "max" where there is none
                yield int(text)
            if directory == root:
                break


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""


def resident_bytes(proc: Path = PROC) -> int:
    """The memory that this process takes (RSS); 0 where the system does not say. About 10 µs."""
    fields = _read(proc / "self" / "statm").split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") if len(fields) > 1 else 0


def trim() -> bool:
    """Give memory that was freed back to the system, as far as whole pages of it are free.

    Python's allocator leaves that to the C library, and that gives back by itself only what lies at the
    end of its heap. Takes 60 ms a gigabyte of large pieces, 200 ms of small ones: for a quiet moment.
    False if the C library cannot: only glibc can.
    """
    trim_heap = _malloc_trim()
    if trim_heap is None:
        return False
    trim_heap(0)
    return True


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None
    return found
