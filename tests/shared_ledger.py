"""The ledger of brokers that share a Redis: `python -m tests.ledger --redis`, or `nox -s ledger -- --redis`.

Two brokers on one Redis; publishers and recovering subscribers go from one to the other as they lose
them. Of the faults there is one at a time: a broker is killed by SIGKILL and started again, all
connections to Redis are cut, one of them is, Redis hangs for a moment.
"""

import random
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import trio

from broker.engines.redis import open_redis
from broker.testing import Closed, Peer, Witness
from tests.engines.servers import BINARIES, Server, serving
from tests.ledger import PUBLISHERS, ROOM, TOPICS, Act, Books, Ledger

BROKERS: Final = 2

FAULTS: Final = ("kill", "cut all", "cut one", "hang")


class SharedLedger(Ledger):
    """One run; see the module."""

    def __init__(self, directory: Path, server: Server, chance: random.Random) -> None:
        super().__init__(directory, f"redis+unix://{server.socket}", chance)
        self._server = server
        self._sockets = [directory / f"socket{number}" for number in range(BROKERS)]
        self._processes: list[subprocess.Popen[bytes]] = []
        self._lives: dict[int, int] = {}

    async def _connect(self) -> Peer:
        """To any broker that is there."""
        while True:
            self._socket = self._chance.choice(self._sockets)
            try:
                with trio.fail_after(5):
                    return await self._try_connect()
            except (OSError, Closed, trio.BrokenResourceError, trio.TooSlowError):
                await trio.sleep(0.02)  # a foreign process: no clock of ours moves it

    async def _again(self, act: Act, about: Any) -> None:
        while True:
            await self._until_broken(act, about)

    async def run(self, kills: int, seconds: float) -> Books:
        """Have so many faults, each within so many seconds after the one before; then compare."""
        try:
            for socket in self._sockets:
                self._processes.append(self._begin(socket))
            async with trio.open_nursery() as nursery:
                for topic in TOPICS:
                    nursery.start_soon(self._again, self._listen, topic)
                for number in range(PUBLISHERS):
                    nursery.start_soon(self._again, self._publish, number)
                for number in range(kills):
                    self._one_acked = trio.Event()
                    await self._one_acked.wait()
                    await trio.sleep(seconds * (0.2 + 0.8 * self._chance.random()))
                    await self._fault(FAULTS[number % len(FAULTS)])
                    self.books.kills += 1
                self._one_acked = trio.Event()
                await self._one_acked.wait()
                await trio.sleep(seconds)
                nursery.cancel_scope.cancel()
            await self._compare()
        finally:
            for process in self._processes:
                process.kill()
                process.wait()
        return self.books

    async def _fault(self, name: str) -> None:
        if name == "kill":
            number = self._chance.randrange(BROKERS)
            self._processes[number].kill()
            self._processes[number].wait()
            self._processes[number] = self._begin(self._sockets[number])
        elif name == "hang":
            self._server.pause()
            await trio.sleep(3 * self._chance.random())
            self._server.go_on()
        elif name == "cut all":
            await self._server.call("CLIENT", "KILL", "TYPE", "normal")
        else:
            clients = (await self._server.call("CLIENT", "LIST")).decode().split("id=")[1:]
            named = self._chance.choice(clients).split(" ")[0]
            await self._server.call("CLIENT", "KILL", "ID", named)

    def _begin(self, socket: Path) -> subprocess.Popen[bytes]:
        self._socket = socket
        return self._start()

    async def _compare(self) -> None:
        async with open_redis(self._server.url, ROOM, ROOM, time.time) as engine:
            async with engine.running(Witness(engine)):
                await engine.fetch(TOPICS)
                self._compare_with(engine)


async def keep_shared(faults: int, seconds: float, seed: int = 0, server: str = "valkey") -> Books:
    """The books of one run in a directory and on a server of its own."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        with serving(BINARIES[server], path) as redis:
            return await SharedLedger(path, redis, random.Random(seed)).run(faults, seconds)
