"""How much memory there is: of the machine, or of the cgroup that the process is in."""

import os
from pathlib import Path

import pytest

from broker import Config
from broker.config.machine import (
    UNKNOWN_BYTES,
    Room,
    find_room,
    memory_limit,
    resident_bytes,
    trim,
)

MIB = 2**20
PHYSICAL = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
V2, V1 = "memory.max", "memory/{}memory.limit_in_bytes"
UNLIMITED = "9223372036854771712\n"
"""As Linux has it in cgroups of version 1: the largest number of whole pages."""


def room(tmp_path: Path, cgroup: str, **files: str) -> Room:
    """The room on a system with this `/proc/self/cgroup`, and these files below `/sys/fs/cgroup`."""
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text(cgroup)
    for name, content in files.items():
        path = cgroups / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return find_room(proc, cgroups)


@pytest.mark.parametrize(
    "cgroup, files, mib",
    [
        # version 2: a service of systemd, and the slices around it
        ("0::/a/b\n", {"a/b/memory.max": "104857600\n"}, 100),
        ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/memory.max": "52428800\n"}, 50),
        ("0::/a/b\n", {"a/b/memory.max": "104857600\n", "a/memory.max": "52428800\n"}, 50),
        ("0::/a/b\n", {"a/b/memory.max": "max\n"}, None),
        # in a container, with a namespace of its own or without
        ("0::/\n", {"memory.max": "104857600\n"}, 100),
        ("0::/docker/1f3a\n", {"memory.max": "104857600\n"}, 100),
        ("0::/../../pod\n", {"memory.max": "104857600\n"}, 100),
        # version 1, and both beside each other
        ("4:memory:/a\n", {"memory/a/memory.limit_in_bytes": "104857600\n"}, 100),
        ("4:cpu,memory:/a\n", {"memory/a/memory.limit_in_bytes": "104857600\n"}, 100),
        ("4:memory:/a\n", {"memory/a/memory.limit_in_bytes": UNLIMITED}, None),
        ("4:memory:/docker/1f\n", {"memory/memory.limit_in_bytes": "104857600\n"}, 100),
        ("5:pids:/a\n0::/b\n", {"memory/a/memory.limit_in_bytes": "104857600\n"}, None),
        (
            "4:memory:/a\n0::/b\n",
            {"memory/a/memory.limit_in_bytes": "104857600\n", "b/memory.max": "52428800\n"},
            50,
        ),
        # nothing that says anything
        ("", {}, None),
        ("nonsense", {"memory.max": "104857600\n"}, None),
        ("0::/a\n", {"a/memory.max": "much\n"}, None),
        ("0::/a\n", {"a/memory.max": f"{2**62}\n"}, None),
    ],
)
def test_the_least_limit_counts(
    tmp_path: Path, cgroup: str, files: dict[str, str], mib: int | None
) -> None:
    found = room(tmp_path, cgroup, **files)
    assert found == (Room(PHYSICAL, "machine") if mib is None else Room(mib * MIB, "cgroup"))


def test_a_system_without_cgroups_has_the_memory_of_its_machine(tmp_path: Path) -> None:
    assert find_room(tmp_path, tmp_path) == Room(PHYSICAL, "machine")


def test_a_machine_that_does_not_say_has_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: str) -> int:
        raise ValueError

    monkeypatch.setattr(os, "sysconf", refuse)
    assert find_room(tmp_path, tmp_path) == Room(UNKNOWN_BYTES, "machine")


def test_a_setting_comes_before_half_of_what_there_is() -> None:
    assert memory_limit(Config(max_memory_bytes=123)) == 123
    assert memory_limit(Config()) == find_room().bytes // 2


def test_a_process_knows_what_it_takes(tmp_path: Path) -> None:
    before = resident_bytes()
    assert before > MIB
    held = bytearray(b"x") * (64 * MIB)
    assert resident_bytes() > before + 32 * MIB
    del held
    assert resident_bytes(tmp_path) == 0


def test_freed_memory_can_be_given_back() -> None:
    # Of pieces between two that stay, nothing goes back by itself.
    pieces = [bytearray(8192) for _ in range(16_000)]
    kept = pieces[::20]
    del pieces
    before = resident_bytes()
    if not trim():
        pytest.skip("the C library is not glibc")
    assert resident_bytes() < before - 64 * MIB
    assert len(kept) == 800
