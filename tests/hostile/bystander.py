"""The bystander pair: two well-behaved clients in a process of their own, beside every input.

One publishes a numbered message every 10 ms and sends a Ping every 200 ms, the other receives. They publish
by the clock, not when the last message has arrived: a broker that stands still for a second makes a
hundred messages late, not one.

`python -m tests.hostile.bystander` takes its orders from stdin, one a line (`begin`, `end`), and
answers each with a line of JSON. `Pair` is its other end.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

import attrs
import trio

from tests.hostile.orders import answer, orders
from tests.hostile.target import LOAD_CORE, ROOT, start_process, waited_of
from tests.hostile.wire import (
    PING,
    PONG,
    Address,
    Ended,
    Peer,
    Tcp,
    Unix,
    connect,
    frame,
    handshake,
)

TOPIC: Final = "talk"
EVERY: Final = 0.010
PING_EVERY: Final = 0.2
"""Five a second; the broker takes 20."""
ARRIVE_SECONDS: Final = 5.0
"""How long the last messages of a window are waited for before they are lost."""


@attrs.frozen
class Heard:
    """Measurements of the pair in one window. Times in seconds."""

    sent: int = 0
    lost: int = 0
    twice: int = 0
    p50: float = 0.0
    p99: float = 0.0
    worst: float = 0.0
    ping_p99: float = 0.0
    closed: str = ""
    """How the broker ended one of the two; empty while both are there."""
    waited: float = 0.0
    """Seconds that this process was ready to run and others had its core."""


def percentile(values: list[float], share: float) -> float:
    """The nearest rank; 0 of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else 0.0


class _Window:
    """The messages sent and heard since `begin`."""

    def __init__(self, first: int) -> None:
        self.first = first
        self.took: dict[int, float] = {}
        self.twice = 0
        self.pings: list[float] = []
        self.waited = waited_of(os.getpid())


class _Bystanders:
    def __init__(self, address: Address, fields: Mapping[str, object]) -> None:
        self._address = address
        self._fields = fields
        self._next = 0
        self._sent: dict[int, float] = {}
        self._pinged: dict[bytes, float] = {}
        self._closed = ""
        self._window = _Window(0)

    async def run(self) -> None:
        talker, listener = [await self._open() for _ in range(2)]
        assert "error" not in await listener.call(subscribe={"channel": TOPIC})
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._talk, talker)
            nursery.start_soon(self._ping, talker)
            nursery.start_soon(self._read, talker)
            nursery.start_soon(self._read, listener)
            answer({})
            await self._obey()
            nursery.cancel_scope.cancel()

    async def _open(self) -> Peer:
        peer = Peer(await connect(self._address))
        await peer.send(handshake(host=self._address.name))
        assert (await peer.head()).status == 101
        reply = await peer.call(connect=self._fields)
        assert "connect" in reply, reply
        return peer

    async def _obey(self) -> None:
        async for line in orders():
            if line == b"begin":
                self._window = _Window(self._next)
                answer({})
            else:
                answer(attrs.asdict(await self._end()))

    async def _end(self) -> Heard:
        window, last = self._window, self._next
        with trio.move_on_after(ARRIVE_SECONDS):
            while (  # noqa: ASYNC110 - looked at as often as one message is sent
                len(window.took) < last - window.first and not self._closed
            ):
                await trio.sleep(EVERY)
        took = [seconds for number, seconds in window.took.items() if number < last]
        sent = last - window.first
        return Heard(
            sent=sent,
            lost=sent - len(took),
            twice=window.twice,
            p50=percentile(took, 0.5),
            p99=percentile(took, 0.99),
            worst=max(took, default=0.0),
            ping_p99=percentile(window.pings, 0.99),
            closed=self._closed,
            waited=waited_of(os.getpid()) - window.waited,
        )

    async def _talk(self, peer: Peer) -> None:
        due = trio.current_time()
        while not self._closed:
            await trio.sleep_until(due)
            due = max(due + EVERY, trio.current_time() - 1)
            number, self._next = self._next, self._next + 1
            self._sent[number] = time.perf_counter()
            try:
                await peer.say({"publish": {"channel": TOPIC, "data": number}})
            except Ended as ended:
                self._lose(ended)

    async def _ping(self, peer: Peer) -> None:
        number = 0
        while not self._closed:
            number += 1
            payload = b"%d" % number
            self._pinged[payload] = time.perf_counter()
            try:
                await peer.send(frame(PING, payload))
            except Ended as ended:
                self._lose(ended)
            await trio.sleep(PING_EVERY)

    async def _read(self, peer: Peer) -> None:
        try:
            while True:
                opcode, payload = await peer.frame()
                now = time.perf_counter()
                if opcode == PONG:
                    if payload in self._pinged:
                        self._window.pings.append(now - self._pinged.pop(payload))
                elif opcode == PING:
                    await peer.send(frame(PONG, payload))
                elif payload == b"{}":
                    await peer.say({})
                elif opcode == 8:
                    raise Ended(f"close {int.from_bytes(payload[:2], 'big')}")
                else:
                    for line in payload.split(b"\n"):
                        self._hear(json.loads(line), now)
        except Ended as ended:
            self._lose(ended)

    def _lose(self, ended: Ended) -> None:
        """The first end is the one that tells why."""
        self._closed = self._closed or ended.how

    def _hear(self, message: dict[str, Any], now: float) -> None:
        """Count a message of the pair; a stranger may send a number to its fds, by right."""
        push = message.get("push", {})
        if push.get("channel") != TOPIC or "pub" not in push:
            return
        number = push["pub"]["data"]
        if number in self._window.took:
            self._window.twice += 1
        sent = self._sent.pop(number, None)
        if sent is not None and number >= self._window.first:
            self._window.took[number] = now - sent


class Pair:
    """The other end: gives orders to a bystander process."""

    def __init__(self, orders: trio.abc.SendStream, answers: trio.abc.ReceiveStream) -> None:
        self._orders = orders
        self._answers = answers
        self._buffer = b""

    async def begin(self) -> None:
        """Begin a window: what was sent before counts no more."""
        await self._order("begin")

    async def end(self) -> Heard:
        """End the window; waits up to `ARRIVE_SECONDS` for what is still on its way."""
        return Heard(**await self._order("end"))

    async def wait_ready(self) -> None:
        """Wait until both are connected. Raises `RuntimeError` if they cannot be."""
        await self._line()

    async def _order(self, order: str) -> dict[str, Any]:
        try:
            await self._orders.send_all(order.encode() + b"\n")
        except trio.BrokenResourceError:
            raise RuntimeError("the bystanders have ended") from None
        return await self._line()

    async def _line(self) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            data = await self._answers.receive_some()
            if not data:
                raise RuntimeError("the bystanders could not connect, or have ended")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        values: dict[str, Any] = json.loads(line)
        return values


@asynccontextmanager
async def open_pair(address: Address, fields: Mapping[str, object]) -> AsyncGenerator[Pair]:
    """Start a pair for as long as the block, on the core of the load and before it in line."""
    where = attrs.asdict(address)
    arguments = json.dumps({"address": where, "fields": dict(fields)})
    process = start_process(
        [sys.executable, "-m", "tests.hostile.bystander", arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        orders = trio.lowlevel.FdStream(os.dup(process.stdin.fileno()))
        answers = trio.lowlevel.FdStream(os.dup(process.stdout.fileno()))
        async with orders, answers:
            try:
                pair = Pair(orders, answers)
                await pair.wait_ready()
                yield pair
            finally:
                process.kill()


def main() -> None:
    arguments = json.loads(sys.argv[1])
    where = arguments["address"]
    address: Address = Unix(**where) if "path" in where else Tcp(**where)
    os.sched_setaffinity(0, {LOAD_CORE})
    trio.run(_Bystanders(address, arguments["fields"]).run)


if __name__ == "__main__":
    main()
