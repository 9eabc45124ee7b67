"""The ledger of brokers that share a Redis: `python -m tests.ledger --redis`, or `nox -s ledger -- --redis`.

Two brokers on one Redis; publishers and recovering subscribers go from one to the other as they lose
them, and somebody asks for history all the time. Of the faults there is one at a time; `FAULTS` says which.
Some take what was acknowledged: then every subscriber has to be told, by a new epoch.
"""

import random
import subprocess
import tempfile
import time
from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import Any, Final

import trio

from broker.engines.redis import open_redis
from broker.testing import Closed, Peer, Witness
from tests.engines.servers import BINARIES, Server, serving
from tests.ledger import PUBLISHERS, ROOM, TOPICS, Act, Books, Ledger
from tests.ports import free_port

BROKERS: Final = 2

FAULTS: Final = {
    "kill": "a broker is killed by SIGKILL, and started again",
    "cut": "all connections to Redis are cut (CLIENT KILL)",
    "cut one": "one of them is",
    "hang": "Redis is stopped for a moment (SIGSTOP)",
    "pause": "it answers nobody for a moment (CLIENT PAUSE)",
    "flush": "it forgets everything (FLUSHALL)",
    "snapshot": "it is killed, and comes back from a snapshot of before",
    "failover": "it is killed, and a replica without the end takes its place",
}

USUAL: Final = ("kill", "cut", "cut one", "hang", "pause")
"""Those that lose nothing: by turns."""

TOLD_SECONDS: Final = 30.0
"""By then a subscriber was told of a loss, or never will be."""

BACK_SECONDS: Final = 120.0
"""By then somebody has found a broker that works again, or never will."""

LOSSES: Final = {"flush", "snapshot", "failover"}


class SharedLedger(Ledger):
    """One run; see the module."""

    def __init__(
        self,
        directory: Path,
        server: Server,
        chance: random.Random,
        faults: Sequence[str] = USUAL,
    ) -> None:
        super().__init__(directory, f"redis+unix://{server.socket}", chance)
        self._server = server
        self._faults = faults
        self.books.may_tell = not LOSSES.isdisjoint(faults)
        self._sockets = [directory / f"socket{number}" for number in range(BROKERS)]
        self._processes: list[subprocess.Popen[bytes]] = []
        self._lives: dict[int, int] = {}

    async def _connect(self) -> Peer:
        """To any broker that is there."""
        deadline = time.monotonic() + BACK_SECONDS
        while True:
            self._socket = self._chance.choice(self._sockets)
            try:
                with trio.fail_after(5):
                    return await self._try_connect()
            except (OSError, Closed, trio.BrokenResourceError, trio.TooSlowError):
                assert time.monotonic() < deadline, "no broker comes back"
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
                nursery.start_soon(self._again, self._ask, None)
                for number in range(kills):
                    self._one_acked = trio.Event()
                    await self._one_acked.wait()
                    await trio.sleep(seconds * (0.2 + 0.8 * self._chance.random()))
                    name, began = self._faults[number % len(self._faults)], trio.current_time()
                    await self._fault(name)
                    if name in LOSSES:
                        await self._wait_told(began)
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

    async def _ask(self, about: None) -> None:
        """Ask for history again and again. A refusal is temporary, and says that it cannot be fetched."""
        async with await self._connect() as peer:
            while True:
                topic = self._chance.choice(TOPICS)
                reply = await peer.request(history={"channel": topic, "limit": 10})
                if "error" in reply:
                    self._note_error("history", reply["error"])
                else:
                    self.books.histories += 1

    async def _fault(self, name: str) -> None:
        server = self._server
        if name == "kill":
            number = self._chance.randrange(BROKERS)
            self._processes[number].kill()
            self._processes[number].wait()
            self._processes[number] = self._begin(self._sockets[number])
        elif name == "hang":
            server.pause()
            await trio.sleep(3 * self._chance.random())
            server.go_on()
        elif name == "pause":
            await server.call("CLIENT", "PAUSE", str(int(3000 * self._chance.random())))
        elif name == "cut":
            await server.call("CLIENT", "KILL", "TYPE", "normal")
        elif name == "cut one":
            clients = (await server.call("CLIENT", "LIST")).decode().split("id=")[1:]
            named = self._chance.choice(clients).split(" ")[0]
            await server.call("CLIENT", "KILL", "ID", named)
        elif name == "flush":
            await server.call("FLUSHALL")
        elif name == "snapshot":
            await server.call("SAVE")
            await self._publish_more()
            server.end()
            server.begin()
        else:
            await self._fail_over()

    async def _wait_told(self, began: float) -> None:
        """Wait until every subscriber was told of a loss; count those that never are."""
        with trio.move_on_after(TOLD_SECONDS):
            for topic in TOPICS:
                while self._told_at.get(topic, -inf) < began:
                    await self._told.wait()
            return
        self.books.untold += 1

    async def _publish_more(self) -> None:
        """Wait until something was acknowledged that is about to be lost."""
        self._one_acked = trio.Event()
        await self._one_acked.wait()
        await trio.sleep(0.2)

    async def _fail_over(self) -> None:
        """Have a replica without the end in place of the server, under the same name."""
        port = free_port()
        await self._server.call("CONFIG", "SET", "port", str(port))
        place = self._server.directory / f"replica{port}"
        place.mkdir()
        replica = Server(self._server.binary, place, ("--replicaof", "127.0.0.1", str(port)))
        replica.begin()
        while True:
            if b"master_link_status:up" in await replica.call("INFO", "replication"):
                break
            await trio.sleep(0.02)  # a foreign process: no clock of ours moves it
        await replica.call("REPLICAOF", "NO", "ONE")
        await self._publish_more()
        former, home = self._server.process, self._server.socket
        self._server.end()
        assert former.poll() is not None
        replica.socket.rename(home)
        self._server.process = replica.process

    def _begin(self, socket: Path) -> subprocess.Popen[bytes]:
        self._socket = socket
        return self._start()

    async def _compare(self) -> None:
        async with open_redis(self._server.url, ROOM, ROOM, time.time) as engine:
            async with engine.running(Witness(engine)):
                await engine.fetch(TOPICS)
                self._compare_with(engine)


async def keep_shared(
    faults: int,
    seconds: float,
    seed: int = 0,
    server: str = "valkey",
    kinds: Sequence[str] = USUAL,
) -> Books:
    """The books of one run in a directory and on a server of its own; the kinds of faults are taken by turns."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        with serving(BINARIES[server], path) as redis:
            ledger = SharedLedger(path, redis, random.Random(seed), kinds)
            return await ledger.run(faults, seconds)
