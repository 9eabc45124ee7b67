"""Where a fault of the world is made: network namespaces, disks, clocks, all of them our own.

The program runs in a network and a mount namespace of its own, so nothing of this machine is touched, and
all of it goes with the program, however that ends. It needs Linux and root for that.
"""

import json
import os
import subprocess
import sys
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

import trio

from tests.hostile.target import ROOT

INSIDE: Final = "TESTS_WORLD_INSIDE"
OURS: Final = "198.51.100.1"
THEIRS: Final = "198.51.100.2"
"""Of a block that is for documentation (RFC 5737): no machine has one, and no packet leaves."""

FAKETIME: Final = tuple(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
"""Debian's package `faketime`: a wall clock that can be set for one process."""


def enter() -> None:
    """Begin this program anew in namespaces of its own, unless it is there already.

    Raises `PermissionError` where that is not allowed, and `FileNotFoundError` without the tools.
    """
    if os.environ.get(INSIDE) == "1":
        sh("ip link set lo up")
        _hang_names()
        return
    if os.geteuid() != 0:
        raise PermissionError("network and mount namespaces need root")
    arguments = ["--net", "--mount", "--", sys.executable, "-m", "tests.world", *sys.argv[1:]]
    os.execvpe("unshare", ["unshare", *arguments], {**os.environ, INSIDE: "1"})


def sh(command: str) -> None:
    """Run a command. Raises `CalledProcessError`."""
    subprocess.run(command.split(), check=True, stderr=subprocess.DEVNULL)


def _hang_names() -> None:
    """Have every question for a name go to a server that never answers; it is opened where it is needed."""
    path = Path(f"/tmp/resolv-{os.getpid()}")
    path.write_text("nameserver 127.0.0.1\noptions timeout:30 attempts:4\n")
    sh(f"mount --bind {path} /etc/resolv.conf")
    path.unlink()


class Far:
    """A process of clients; see `tests.world.far`."""

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self._buffer = b""

    async def order(self, order: object) -> dict[str, Any]:
        """Give an order, and wait for the answer. Raises `RuntimeError` if the process has ended."""
        assert self.process.stdin is not None
        await self.process.stdin.send_all(json.dumps(order).encode() + b"\n")
        assert self.process.stdout is not None
        while b"\n" not in self._buffer:
            data = await self.process.stdout.receive_some()
            if not data:
                raise RuntimeError("the clients have ended")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer


@asynccontextmanager
async def open_far(
    port: int,
    counts: Mapping[str, int],
    *,
    host: str = "127.0.0.1",
    inside: int = 0,
    buffer: int = 0,
) -> AsyncGenerator[Far]:
    """Clients of these kinds in a process of their own: in the network namespace of the process `inside`,
    if that is given. They go with the block."""
    command = [sys.executable, "-m", "tests.world.far"]
    if inside:
        command = ["nsenter", "-t", str(inside), "-n", *command]
    process = await trio.lowlevel.open_process(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )
    try:
        far = Far(process)
        await far.order({"host": host, "port": port, "counts": counts, "receive_buffer": buffer})
        yield far
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


class Link:
    """A cable to another machine."""

    def __init__(self, machine: int) -> None:
        self.machine = machine
        """The process whose network is that machine's."""

    def down(self) -> None:
        """Pull it: no packet passes, and neither side is told."""
        sh("ip link set wire down")

    def up(self) -> None:
        sh("ip link set wire up")


@asynccontextmanager
async def open_link() -> AsyncGenerator[Link]:
    """Another machine, on a cable, for as long as the block."""
    machine = await trio.lowlevel.open_process(["unshare", "--net", "sleep", "infinity"])
    try:
        await trio.sleep(0.3)  # until it is in its namespace
        sh("ip link add wire type veth peer name far")
        sh(f"ip link set far netns {machine.pid}")
        sh(f"ip addr add {OURS}/24 dev wire")
        sh("ip link set wire up")
        there = f"nsenter -t {machine.pid} -n"
        sh(f"{there} ip addr add {THEIRS}/24 dev far")
        sh(f"{there} ip link set far up")
        yield Link(machine.pid)
    finally:
        machine.kill()
        with trio.CancelScope(shield=True):
            await machine.wait()
        with suppress(subprocess.CalledProcessError):
            sh("ip link del wire")
