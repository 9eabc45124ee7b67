"""The ledger of `--workers`: `python -m tests.ledger --workers`, or `nox -s ledger -- --workers`.

One supervisor with two workers on one socket and one Redis. A worker is killed by SIGKILL, again and
again; its clients come back to whichever worker takes them.
"""

import os
import random
import signal
import tempfile
import time
from pathlib import Path
from typing import Final

import trio

from broker.cli.seat import VARIABLE
from tests.engines.servers import BINARIES, Server, serving
from tests.ledger import Books
from tests.shared_ledger import SharedLedger

WORKERS: Final = 2

GROWN_SECONDS: Final = 3.0
"""By then a worker serves. And no five are killed within ten seconds, which the supervisor would call
hopeless."""


class WorkerLedger(SharedLedger):
    """One run; see the module. It takes a minute and more, so its publishers do not do their utmost: what is
    compared in the end is read topic by topic, whole."""

    PAUSE = 0.02

    def __init__(self, directory: Path, server: Server, chance: random.Random) -> None:
        super().__init__(directory, server, chance)
        del self._sockets[1:]

    def _settings(self) -> dict[str, object]:
        return {**super()._settings(), "BROKER_WORKERS": WORKERS}

    async def _fault(self, name: str) -> None:
        os.kill(self._chance.choice(await self._workers()), signal.SIGKILL)

    async def _workers(self) -> list[int]:
        """The processes of all workers, once none of them is missing, or so young that it has no clients."""
        while True:
            found = [int(each.name) for each in Path("/proc").iterdir() if self._is_grown(each)]
            if len(found) == WORKERS:
                return found
            await trio.sleep(0.02)  # a foreign process: no clock of ours moves it

    def _is_grown(self, process: Path) -> bool:
        try:
            stat = (process / "stat").read_text("utf-8").rpartition(") ")[2].split()
            environ = (process / "environ").read_bytes()
        except OSError:  # no process, or no more
            return False
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(stat[19]) / os.sysconf("SC_CLK_TCK")
        is_ours = int(stat[1]) == self._processes[0].pid and VARIABLE.encode() in environ
        return is_ours and age > GROWN_SECONDS


async def keep_workers(kills: int, seconds: float, seed: int = 0) -> Books:
    """The books of one run in a directory and on a server of its own."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        with serving(BINARIES["valkey"], path) as redis:
            return await WorkerLedger(path, redis, random.Random(seed)).run(kills, seconds)
