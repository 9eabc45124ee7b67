"""Kill a broker again and again while it is published to, and keep the books: `python -m tests.ledger`,
or `nox -s ledger`.

A broker runs as `python -m broker --engine sqlite:…`. Publishers write down what it acknowledges, and
a recovering subscriber per topic all that it is told. The broker is killed in the middle of that, by
SIGKILL, and started again on its file. In the end the file is read, and compared with the books:

- what was acknowledged is there, once;
- the offsets of a topic have no hole, and each publisher's publications are in their order;
- each subscriber had everything once and in that order, or was told that it did not recover. It
  never has to be: every restart keeps all that anybody was told.
"""

# ruff: noqa: T201 - a program, whose output this is

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import Any, ClassVar, Final

import attrs
import trio

from broker.config.engine_url import parse_engine_url
from broker.core.messages import Position
from broker.engines.engine import Engine
from broker.engines.sqlite import open_sqlite
from broker.testing import Closed, Peer, handshake

ROOM: Final = 2**30
WINDOW: Final = 32
"""Publishes of one publisher that wait for an answer."""
PUBLISHERS: Final = 4
TOPICS: Final = ("a", "b", "c")
Act = Callable[[Any], Coroutine[Any, Any, None]]

LATE_SECONDS: Final = 1.0
"""Another broker may hand out what it had read for so long after a subscriber was told of a loss."""

PATIENCE: Final = 60.0
"""Seconds until a broker that does not start has failed: beside ten other programs on two cores one has taken
more than 20."""


@attrs.define
class Books:
    """What publishers and subscribers were told, and what turned out to be wrong."""

    acked: dict[str, list[str]] = attrs.field(factory=lambda: {topic: [] for topic in TOPICS})
    seen: dict[str, list[str]] = attrs.field(factory=lambda: {topic: [] for topic in TOPICS})
    refused: int = 0
    recoveries: int = 0
    unrecovered: int = 0
    gaps: int = 0
    lost: int = 0
    duplicates: int = 0
    order_violations: int = 0
    wrong: int = 0
    """Publications that a subscriber was told differently from what is kept."""
    kept: int = 0
    kills: int = 0
    histories: int = 0
    """Questions for history that were answered."""
    away: int = 0
    """Those, and subscribers, that were answered with 100, temporary: it cannot be fetched now."""
    strange: list[str] = attrs.field(factory=list)
    """Other errors that these were answered with."""
    may_tell: bool = False
    """Whether the fault is one that takes what was acknowledged, if it says so: by a new epoch."""
    untold: int = 0
    """Times that a subscriber was not told of a loss."""
    told: int = 0
    """Acknowledged publications of epochs that have ended, which every subscriber was told."""

    @property
    def is_clean(self) -> bool:
        return not (
            self.lost
            or self.gaps
            or self.duplicates
            or self.order_violations
            or self.wrong
            or self.strange
            or self.untold
            or (self.unrecovered and not self.may_tell)
        )

    def __str__(self) -> str:
        acked = sum(map(len, self.acked.values()))
        strange = "".join(f"; {each}" for each in sorted(set(self.strange)))
        told = f" and told {self.told}, untold {self.untold}" if self.may_tell else ""
        asked = f"; history asked {self.histories} times, away {self.away} times"
        return (
            f"{self.kills} times: {acked} acknowledged, {self.kept} kept, lost {self.lost}{told}, "
            f"gaps {self.gaps}, duplicates {self.duplicates}, "
            f"order violations {self.order_violations}, wrong {self.wrong}; "
            f"{self.recoveries} recoveries, {self.unrecovered} not recovered"
            f"{asked if self.histories else ''}{strange}"
        )


class Ledger:
    """One run: a broker on a file, its publishers and subscribers, and their books."""

    PAUSE: ClassVar[float] = 0.0
    """Seconds that a publisher waits between what is answered and what it publishes next."""

    def __init__(self, directory: Path, engine: str, chance: random.Random) -> None:
        self.books = Books()
        self._socket = directory / "socket"
        self._engine = engine
        self._chance = chance
        self._numbers = dict.fromkeys(range(PUBLISHERS), 0)
        self._positions: dict[str, Position] = {}
        self._one_acked = trio.Event()
        self._acked_at: dict[str, float] = {}
        self._told = trio.Event()
        self._told_at: dict[str, float] = {}
        """When a topic's subscriber was told that it did not recover."""

    def _settings(self) -> dict[str, object]:
        return {
            "BROKER_HISTORY_BYTES": ROOM,
            "BROKER_TOPICS_HISTORY_SIZE": 10**7,
            "BROKER_TOPICS_HISTORY_TTL": 10**6,
            "BROKER_HISTORY_REPLY_BYTES": ROOM,
            "BROKER_OUTBOX_BYTES": 2**26,
            "BROKER_OUTBOX_MESSAGES": 10**6,
            "BROKER_LOG_LEVEL": "warning",
        }

    def _start(self) -> "subprocess.Popen[bytes]":
        self._socket.unlink(missing_ok=True)
        settings = self._settings()
        root = str(Path(__file__).parents[1])
        environ = {**os.environ, "PYTHONPATH": root, **{k: str(v) for k, v in settings.items()}}
        command = [sys.executable, "-m", "broker", "--unix", str(self._socket)]
        return subprocess.Popen([*command, "--engine", self._engine], env=environ)

    async def _connect(self) -> Peer:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                return await self._try_connect()
            except OSError:
                assert time.monotonic() < deadline, "the broker does not start"
                await trio.sleep(0.02)  # a foreign process: no clock of ours moves it

    async def _try_connect(self) -> Peer:
        peer = Peer(await trio.open_unix_socket(str(self._socket)))
        try:
            await peer.send(handshake())
            await peer.receive_head()
            await peer.request(connect={})
        except BaseException:
            await trio.aclose_forcefully(peer.stream)
            raise
        return peer

    # publishers and subscribers, until their connection breaks

    async def _until_broken(self, act: Act, about: Any) -> None:
        with suppress(Closed, trio.BrokenResourceError):
            await act(about)

    async def _publish(self, number: int) -> None:
        waiting: dict[int, tuple[str, str]] = {}
        async with await self._connect() as peer:
            while True:
                commands: list[object] = []
                while len(waiting) < WINDOW:
                    self._numbers[number] += 1
                    mark = f"{number}.{self._numbers[number]}"
                    topic = self._chance.choice(TOPICS)
                    waiting[self._numbers[number]] = topic, mark
                    publish = {"channel": topic, "data": mark}
                    commands.append({"id": self._numbers[number], "publish": publish})
                if commands:
                    await peer.send_json(*commands)
                for line in (await peer.receive_text()).split("\n"):
                    reply = json.loads(line)
                    if reply.get("id"):
                        topic, mark = waiting.pop(reply["id"])
                        if "error" in reply:
                            self.books.refused += 1
                        else:
                            self.books.acked[topic].append(mark)
                            self._acked_at[mark] = trio.current_time()
                            self._one_acked.set()
                if self.PAUSE:
                    await trio.sleep(self.PAUSE)  # a foreign process: no clock of ours moves it

    async def _listen(self, topic: str) -> None:
        request: dict[str, Any] = {"channel": topic, "recoverable": True}
        since = self._positions.get(topic)
        if since is not None:
            request |= {"recover": True, "offset": since.offset, "epoch": since.epoch}
        async with await self._connect() as peer:
            reply = await peer.request(subscribe=request)
            if "error" in reply:
                self._note_error("subscribe", reply["error"])
                await trio.sleep(0.1)  # a foreign process: no clock of ours moves it
                return  # and come back
            result = reply["subscribe"]
            epoch, offset = result["epoch"], result.get("offset", 0)
            if since is not None:
                self.books.recoveries += 1
                if result.get("recovered"):
                    offset = since.offset
                else:
                    self.books.unrecovered += 1
                    self.books.seen[topic] = []
                    self._told_at[topic] = trio.current_time()
                    self._told.set()
                    self._told = trio.Event()
            self._positions[topic] = Position(offset, epoch)
            for publication in result.get("publications", ()):
                self._take(topic, publication)
            while True:
                for line in (await peer.receive_text()).split("\n"):
                    push = json.loads(line).get("push", {})
                    if "unsubscribe" in push:
                        return  # and come back
                    if "pub" in push:
                        self._take(topic, push["pub"])

    def _note_error(self, act: str, error: dict[str, Any]) -> None:
        """Enter a refusal: a temporary one, which says that what is kept cannot be fetched, or a strange one."""
        if error["code"] == 100 and error["message"].startswith("history is away: "):
            self.books.away += 1
        else:
            self.books.strange.append(f"{act}: {error['code']} {error['message']}")

    def _take(self, topic: str, publication: dict[str, Any]) -> None:
        before = self._positions[topic]
        self.books.gaps += publication["offset"] != before.offset + 1
        self._positions[topic] = Position(publication["offset"], before.epoch)
        self.books.seen[topic].append(publication["data"])

    # the run

    async def run(self, kills: int, seconds: float) -> Books:
        """Kill it so often, each time within so many seconds after all have come; then compare."""
        for _ in range(kills):
            process = self._start()
            try:
                async with trio.open_nursery() as nursery:
                    for topic in TOPICS:
                        nursery.start_soon(self._until_broken, self._listen, topic)
                    self._one_acked = trio.Event()
                    for number in range(PUBLISHERS):
                        nursery.start_soon(self._until_broken, self._publish, number)
                    await self._one_acked.wait()
                    await trio.sleep(seconds * (0.2 + 0.8 * self._chance.random()))
                    process.kill()
            finally:
                process.kill()
                process.wait()
            self.books.kills += 1
        await self._compare()
        return self.books

    async def _compare(self) -> None:
        async with open_sqlite(parse_engine_url(self._engine), ROOM, ROOM, time.time) as engine:
            self._compare_with(engine)

    def _compare_with(self, engine: Engine) -> None:
        books = self.books
        for topic in TOPICS:
            publications, top = engine.history(topic, None, -1, False)
            marks = [str(each.value) for each in publications]
            offsets = [each.offset for each in publications]
            books.kept += len(marks)
            books.gaps += offsets != list(range(1, top.offset + 1))
            books.duplicates += len(marks) - len(set(marks))
            told_at = self._told_at.get(topic, -inf) + LATE_SECONDS if books.may_tell else -inf
            for mark in set(books.acked[topic]) - set(marks):
                was_told = self._acked_at[mark] < told_at
                books.told += was_told
                books.lost += not was_told
            last: dict[str, int] = {}
            for mark in marks:
                publisher, _, number = mark.partition(".")
                books.order_violations += last.get(publisher, 0) >= int(number)
                last[publisher] = int(number)
            seen = books.seen[topic]
            position = self._positions[topic]
            books.wrong += seen != marks[position.offset - len(seen) : position.offset]


async def keep(kills: int, seconds: float, query: str = "", seed: int = 0) -> Books:
    """The books of one run in a directory of its own."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        engine = f"sqlite:{path / 'log.db'}{query}"
        return await Ledger(path, engine, random.Random(seed)).run(kills, seconds)


def main() -> int:
    from tests.shared_ledger import FAULTS, USUAL, keep_shared
    from tests.worker_ledger import keep_workers

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=1.0, help="of load before each kill")
    parser.add_argument("--sync", choices=["power", "process"], default="power")
    parser.add_argument("--redis", action="store_true", help="two brokers on one, and its faults")
    parser.add_argument("--fault", default="", help=f"with --redis: one of {', '.join(FAULTS)}")
    parser.add_argument(
        "--workers", action="store_true", help="two workers, one of which is killed"
    )
    options = parser.parse_args()
    if options.workers:
        books = trio.run(keep_workers, options.kills, options.seconds)
        print(f"two workers, SIGKILL of one: {books}")
        return 0 if books.is_clean else 1
    if options.redis:
        kinds = (options.fault,) if options.fault else USUAL
        books = trio.run(keep_shared, options.kills, options.seconds, 0, "valkey", kinds)
        print(f"two brokers on one redis, {', '.join(kinds)}: {books}")
        return 0 if books.is_clean else 1
    books = trio.run(keep, options.kills, options.seconds, f"?sync={options.sync}")
    print(f"sqlite, sync={options.sync}, SIGKILL: {books}")
    return 0 if books.is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
