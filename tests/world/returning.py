"""Brokers that end under load, and official clients that come back: the books of it.

A broker runs as `python -m broker` with its engine on a file. Clients of the Python SDK, in JSON and in
protobuf, publish to it and subscribe with recovery; it is stopped in the middle of that, and started
again on its port and its file. The clients know nothing of it: they come back as the SDK has it. In the
end each subscriber has all that was acknowledged, once, or was told that it has a gap.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import attrs

from tests.hostile.target import ROOT
from tests.ports import free_port

ROUNDS: Final = 10
SUBSCRIBERS: Final = 20
PUBLISHERS: Final = 4
TOPIC: Final = "books"
PATIENCE: Final = 30.0
LOAD_SECONDS: Final = 1.0


def _term(process: "subprocess.Popen[bytes]") -> None:
    process.send_signal(signal.SIGTERM)


def _term_twice(process: "subprocess.Popen[bytes]") -> None:
    process.send_signal(signal.SIGTERM)
    time.sleep(0.05)  # a foreign process: no clock of ours moves it
    process.send_signal(signal.SIGTERM)


def _kill(process: "subprocess.Popen[bytes]") -> None:
    process.kill()


SIGNALS: Final[dict[str, Callable[["subprocess.Popen[bytes]"], None]]] = {
    "SIGTERM": _term,
    "a second SIGTERM": _term_twice,
    "SIGKILL": _kill,
}


@attrs.define
class Returns:
    """The books of one kind of stop."""

    stops: int = 0
    attempted: int = 0
    acked: int = 0
    delivered: int = 0
    lost: int = 0
    """Acknowledged, and not had by a subscriber that was not told of a gap."""
    duplicated: int = 0
    gaps_told: int = 0
    returns: int = 0
    absent: int = 0
    """Subscribers that were not there again in the end."""
    endings: set[int] = attrs.field(factory=set)

    @property
    def is_clean(self) -> bool:
        worked = self.acked > 10 * self.stops and self.returns >= self.stops * SUBSCRIBERS
        return worked and not (self.lost or self.duplicated or self.absent or self.gaps_told)

    def __str__(self) -> str:
        return (
            f"{self.stops} stops (exit {', '.join(map(str, sorted(self.endings)))}): attempted "
            f"{self.attempted}, acked {self.acked}, delivered {self.delivered}, lost {self.lost}, "
            f"duplicated {self.duplicated}, gaps told {self.gaps_told}, returns {self.returns}, "
            f"absent {self.absent}"
        )


def keep_returning(name: str, rounds: int) -> Returns:
    """Stop a broker so often in that way; the books."""
    with tempfile.TemporaryDirectory(prefix="world-") as scratch:
        return asyncio.run(_Run(Path(scratch), SIGNALS[name]).run(rounds))


class _Listener:
    """Notes what a subscription of the SDK is told."""

    def __init__(self, books: Returns, *, is_json: bool) -> None:
        self._books = books
        self._is_json = is_json
        self.had: list[str] = []
        self.subscribed = 0
        self.is_there = False

    async def on_subscribed(self, context: Any) -> None:
        self.subscribed += 1
        self.is_there = True
        if self.subscribed > 1:
            self._books.returns += 1
            self._books.gaps_told += not context.recovered

    async def on_subscribing(self, context: Any) -> None:
        self.is_there = False

    async def on_unsubscribed(self, context: Any) -> None:
        self.is_there = False

    async def on_publication(self, context: Any) -> None:
        data = context.pub.data
        self.had.append(data if self._is_json else json.loads(data))

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("on_"):
            raise AttributeError(name)

        async def ignore(context: Any) -> None: ...

        return ignore


class _Run:
    def __init__(self, scratch: Path, stop: Callable[["subprocess.Popen[bytes]"], None]) -> None:
        self._port = free_port()
        self._engine = f"sqlite:{scratch / 'log.db'}"
        self._log = scratch / "log"
        self._stop = stop
        self.books = Returns()
        self._acked: list[str] = []
        self._listeners: list[_Listener] = []

    def _start(self) -> "subprocess.Popen[bytes]":
        settings = {
            "PYTHONPATH": str(ROOT),
            "BROKER_TOPICS_HISTORY_SIZE": "1000000",
            "BROKER_TOPICS_HISTORY_TTL": "1000000",
            "BROKER_HISTORY_BYTES": str(2**28),
            "BROKER_LOG_LEVEL": "warning",
        }
        command = [
            sys.executable,
            "-m",
            "broker",
            "--port",
            str(self._port),
            "--engine",
            self._engine,
        ]
        with self._log.open("ab") as log:
            return subprocess.Popen(command, env={**os.environ, **settings}, stderr=log, cwd=ROOT)

    async def run(self, rounds: int) -> Returns:
        process = self._start()
        try:
            clients = [await self._subscriber(number) for number in range(SUBSCRIBERS)]
            publishers = [self._client(is_json=True) for _ in range(PUBLISHERS)]
            for each in publishers:
                await each.connect()
            await self._wait(self._all_there)
            tasks = [
                asyncio.create_task(self._publish(each, n)) for n, each in enumerate(publishers)
            ]
            for _ in range(rounds):
                await self._wait(self._all_there)
                await self._wait_acked(20)
                await asyncio.sleep(LOAD_SECONDS)
                self._stop(process)
                status = await asyncio.to_thread(process.wait, PATIENCE)
                self.books.endings.add(status)
                self.books.stops += 1
                process = self._start()
            await self._wait_acked(20)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._settle(await self._wait(self._all_had))
            for client in (*clients, *publishers):
                await client.disconnect()
        finally:
            process.kill()
            process.wait()
        return self.books

    def _client(self, *, is_json: bool) -> Any:
        import centrifuge  # type: ignore[import-untyped,unused-ignore]

        return centrifuge.Client(
            f"ws://127.0.0.1:{self._port}/connection/websocket",
            use_protobuf=not is_json,
            min_reconnect_delay=0.1,
            max_reconnect_delay=1.0,
        )

    async def _subscriber(self, number: int) -> Any:
        is_json = number % 2 == 0
        client = self._client(is_json=is_json)
        listener = _Listener(self.books, is_json=is_json)
        subscription = client.new_subscription(TOPIC, listener, recoverable=True, positioned=True)
        self._listeners.append(listener)
        await client.connect()
        await subscription.subscribe()
        return client

    async def _publish(self, client: Any, who: int) -> None:
        number = 0
        while True:
            number += 1
            mark = f"{who}.{number}"
            self.books.attempted += 1
            try:
                await asyncio.wait_for(client.publish(TOPIC, mark), 2.0)
            except asyncio.CancelledError:
                raise
            except Exception:  # noqa: BLE001 - whatever the SDK says: it was not acknowledged
                await asyncio.sleep(0.05)
            else:
                self.books.acked += 1
                self._acked.append(mark)
                await asyncio.sleep(0.005)

    async def _wait_acked(self, more: int) -> None:
        wanted = self.books.acked + more
        assert await self._wait(lambda: self.books.acked >= wanted), "nothing is acknowledged"

    async def _wait(self, holds: Callable[[], bool]) -> bool:
        """Wait until it holds; whether it does, in the end."""
        deadline = time.monotonic() + PATIENCE
        while (  # noqa: ASYNC110 - the SDK's events are many
            not holds() and time.monotonic() < deadline
        ):
            await asyncio.sleep(0.05)
        return holds()

    def _all_there(self) -> bool:
        return all(each.is_there for each in self._listeners)

    def _all_had(self) -> bool:
        acked = {*self._acked}
        return all(each.is_there and acked <= {*each.had} for each in self._listeners)

    def _settle(self, is_whole: bool) -> None:
        acked = {*self._acked}
        for each in self._listeners:
            had = {*each.had}
            self.books.delivered += len(each.had)
            self.books.duplicated += len(each.had) - len(had)
            self.books.lost += len(acked - had)
            self.books.absent += not each.is_there
