"""Many nodes on one Redis, with many connections each, and the death of one: `python -m tests.many_nodes`.

Each node is `python -m broker` on a socket of its own; all on a Valkey that has nothing else to do. Connection
number k of each node subscribes to topic k, so each topic has one listener at each node, whose positions are kept.
A publisher at each node publishes to topics by chance. Then a node dies by SIGKILL; its clients come back to the
others and recover. It prints

- what was acknowledged and delivered, and whether each listener had all of its topic, once and in its order;
- how long a message took, and a bystander's round trip while the node died;
- whether presence, joins and leaves were true before and after, and how soon;
- the memory and the processor time of each node and of Redis.
"""

# ruff: noqa: T201 - a program, whose output this is

import argparse
import multiprocessing
import os
import random
import re
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from math import inf
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import attrs
import msgspec
import trio

from broker.testing import Peer, handshake
from broker.transport import frames
from tests.engines.servers import BINARIES, Server, serving

HISTORY: Final = 100
TICK: Final = os.sysconf("SC_CLK_TCK")
RECOVER_SECONDS: Final = 120.0


def frame_of(*commands: object) -> bytes:
    text = b"\n".join(map(msgspec.json.encode, commands))
    size = len(text)
    head = bytes([0x80 | size]) if size < 126 else b"\xfe" + size.to_bytes(2, "big")
    return b"\x81" + head + b"\0\0\0\0" + text


@attrs.define(eq=False)
class Listener:
    """One connection, and what it had of its topic."""

    topic: str
    socket: socket.socket
    buffer: bytearray = attrs.field(factory=bytearray)
    epoch: str = ""
    offset: int = 0

    came: deque[bytes] = attrs.field(factory=deque)
    """Lines that nobody has taken yet."""

    def lines(self) -> Iterator[bytes]:
        """The lines that are there by now; who stops in between leaves the others."""
        while (header := frames.read_header(self.buffer)) is not None:
            end = header.size + header.length
            if len(self.buffer) < end:
                break
            if header.opcode == frames.TEXT:
                self.came += bytes(self.buffer[header.size : end]).split(b"\n")
            del self.buffer[:end]
        while self.came:
            yield self.came.popleft()

    def read(self) -> bool:
        data = self.socket.recv(65536)
        self.buffer += data
        return bool(data)


class Crowd:
    """The connections to one node, in a process of their own, and the publisher among them."""

    def __init__(self, number: int, sockets: Sequence[str], orders: Connection) -> None:
        self.number, self.sockets, self.orders = number, sockets, orders
        self.listeners: list[Listener] = []
        self.selector = selectors.DefaultSelector()
        self.chance = random.Random(number)
        self.interval, self.next_at = 0.0, 0.0
        self.sent = self.acked = self.delivered = self.refused = 0
        self.wrong: list[str] = []
        self.unrecovered = self.returned = 0
        self.times: list[float] = []

    def open(self, topic: str, where: str, since: Listener | None = None) -> Listener:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(60)
        connection.connect(where)
        connection.sendall(handshake())
        listener = Listener(topic, connection)
        while b"\r\n\r\n" not in listener.buffer:
            listener.read()
        del listener.buffer[: listener.buffer.index(b"\r\n\r\n") + 4]
        asked: dict[str, object] = {"channel": topic, "recoverable": True}
        if since is not None:
            asked |= {"recover": True, "offset": since.offset, "epoch": since.epoch}
        reply = self.ask(listener, {"subscribe": asked})
        result = reply["subscribe"]
        listener.epoch, listener.offset = result["epoch"], result.get("offset", 0)
        if since is not None:
            self.returned += 1
            self.unrecovered += not result.get("recovered")
            for publication in result.get("publications", ()):
                self.take(listener, publication)
        self.note(listener)
        connection.setblocking(False)
        self.selector.register(connection, selectors.EVENT_READ, listener)
        return listener

    def opened(self, wanted: Sequence[tuple[str, str, Listener | None]]) -> list[Listener]:
        found = []
        for number, each in enumerate(wanted):
            found.append(self.open(*each))
            if not number % 100:
                self.turn()
        return found

    def ask(self, listener: Listener, command: dict[str, object]) -> Any:
        listener.socket.sendall(frame_of({"id": 1, "connect": {}}, {"id": 2, **command}))
        while True:
            for line in listener.lines():
                reply = msgspec.json.decode(line)
                if reply.get("id") == 2:
                    if "error" not in reply:
                        return reply
                    time.sleep(0.2)  # temporary: it says so
                    listener.socket.sendall(frame_of({"id": 2, **command}))
            assert listener.read(), "the node has closed"

    def take(self, listener: Listener, publication: dict[str, Any]) -> None:
        if publication["offset"] != listener.offset + 1:
            self.wrong.append(f"{listener.topic}: {publication['offset']} after {listener.offset}")
        listener.offset = publication["offset"]
        self.delivered += 1

    def hear(self, listener: Listener) -> None:
        """Read what has come; raises `OSError` where the connection has ended."""
        if not listener.read():
            raise ConnectionResetError
        self.note(listener)

    def note(self, listener: Listener) -> None:
        """Enter what has come in the books."""
        for line in listener.lines():
            reply = msgspec.json.decode(line)
            if "push" in reply and "pub" in reply["push"]:
                publication = reply["push"]["pub"]
                self.take(listener, publication)
                self.times.append(time.monotonic() - publication["data"])
            elif "publish" in reply:
                self.acked += 1
            elif "error" in reply:
                self.refused += 1

    def publish(self) -> None:
        now = time.monotonic()
        while self.interval and self.next_at <= now:
            self.next_at += self.interval
            self.sent += 1
            topic = self.chance.choice(self.listeners).topic
            command = {"id": 9 + self.sent, "publish": {"channel": topic, "data": now}}
            try:
                self.listeners[0].socket.sendall(frame_of(command))
            except OSError:
                self.interval = 0.0  # its node is dead

    def turn(self) -> None:
        self.publish()
        for key, _ in self.selector.select(0.002 if self.interval else 0.05):
            if key.data is None:
                getattr(self, self.orders.recv())()
                continue
            try:
                self.hear(key.data)
            except OSError:
                self.selector.unregister(key.fileobj)

    def serve(self) -> None:
        """Carry out orders, for ever."""
        self.selector.register(self.orders, selectors.EVENT_READ, None)
        while True:
            self.turn()

    # orders, each answered

    def connect(self) -> None:
        count, where = self.orders.recv(), self.sockets[self.number]
        self.listeners = self.opened([(f"t{number}", where, None) for number in range(count)])
        self.orders.send(None)

    def pace(self) -> None:
        rate = self.orders.recv()
        self.interval, self.next_at = (1 / rate if rate else 0.0), time.monotonic()
        self.orders.send(None)

    def come_back(self) -> None:
        """All of them to the other nodes by turns, while these go on."""
        others = [each for each in self.sockets if each != self.sockets[self.number]]
        former, began = self.listeners, time.monotonic()
        for each in former:
            with suppress(OSError):  # what it had sent before it died
                while True:
                    self.hear(each)
            with suppress(KeyError):
                self.selector.unregister(each.socket)
            each.socket.close()
        self.interval = 0.0
        self.listeners = self.opened(
            [(each.topic, others[number % len(others)], each) for number, each in enumerate(former)]
        )
        self.orders.send(time.monotonic() - began)

    def report(self) -> None:
        names = ("sent", "acked", "refused", "delivered", "wrong", "unrecovered", "returned")
        found = {name: getattr(self, name) for name in names}
        times, self.times = self.times, []
        self.orders.send(
            {**found, "times": times, "ends": [each.offset for each in self.listeners]}
        )


def crowd(number: int, sockets: Sequence[str], orders: Connection) -> None:
    Crowd(number, sockets, orders).serve()


@attrs.define(eq=False)
class Seat:
    """A node, its crowd, and the pipe to that."""

    path: str
    process: "subprocess.Popen[bytes]"
    crowd: Any = None
    pipe: Any = None

    async def order(self, name: str, *parts: object) -> Any:
        for each in (name, *parts):
            self.pipe.send(each)
        return await trio.to_thread.run_sync(self.pipe.recv)


def used(pid: int) -> tuple[float, float]:
    """MiB and seconds of processor time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    status = Path(f"/proc/{pid}/status").read_text()
    size = re.search(r"VmRSS:\s+(\d+)", status)
    assert size is not None
    return int(size[1]) / 1024, (int(fields[11]) + int(fields[12])) / TICK


def share(times: Sequence[float], part: float) -> str:
    """So much of the times, in ms, is not above this."""
    return (
        f"{1000 * sorted(times)[min(len(times) - 1, int(part * len(times)))]:.1f}" if times else "-"
    )


class Trial:
    def __init__(self, server: Server, directory: Path, options: argparse.Namespace) -> None:
        self.server, self.directory, self.options = server, directory, options
        self.seats: list[Seat] = []
        self.is_sound = True

    def say(self, what: str, *, holds: bool = True) -> None:
        self.is_sound &= holds
        print(what if holds else f"{what}   FAILED", flush=True)

    def begin(self) -> None:
        paths = [str(self.directory / f"node{n}") for n in range(self.options.nodes)]
        environ = {
            **os.environ,
            "BROKER_TOPICS_HISTORY_SIZE": str(HISTORY),
            "BROKER_TOPICS_HISTORY_TTL": "3600",
            "BROKER_LOG_LEVEL": "error",
            "BROKER_PING_SECONDS": "3600",
        }
        url = f"redis+unix://{self.server.socket}"
        for number, path in enumerate(paths):
            command = [sys.executable, "-m", "broker", "--unix", path, "--engine", url]
            self.seats.append(Seat(path, subprocess.Popen(command, env=environ)))
            ours, theirs = multiprocessing.Pipe()
            seat = self.seats[-1]
            seat.pipe = ours
            seat.crowd = multiprocessing.Process(
                target=crowd, args=(number, paths, theirs), daemon=True
            )
            seat.crowd.start()

    def end(self) -> None:
        for seat in self.seats:
            seat.process.kill()
            seat.process.wait()
            seat.crowd.kill()
            seat.crowd.join()

    async def all(
        self, name: str, *parts: object, seats: Sequence[Seat] | None = None
    ) -> list[Any]:
        found: list[Any] = [None] * len(seats or self.seats)

        async def one(number: int, seat: Seat) -> None:
            found[number] = await seat.order(name, *parts)

        async with trio.open_nursery() as nursery:
            for number, seat in enumerate(seats or self.seats):
                nursery.start_soon(one, number, seat)
        return found

    async def peer(self, seat: Seat) -> Peer:
        with trio.fail_after(60):
            while True:
                try:
                    peer = Peer(await trio.open_unix_socket(seat.path))
                    break
                except OSError:
                    await trio.sleep(0.05)  # a foreign process: no clock of ours moves it
        await peer.send(handshake())
        await peer.receive_head()
        await peer.request(connect={})
        return peer

    async def memory(self) -> str:
        info = (await self.server.call("INFO", "memory")).decode()
        found = re.search(r"used_memory:(\d+)", info)
        assert found is not None
        nodes = [used(seat.process.pid)[0] for seat in self.seats]
        return f"{min(nodes):.0f} to {max(nodes):.0f} MiB a node, Redis {int(found[1]) / 2**20:.0f} MiB"

    # the run

    async def run(self) -> bool:
        options = self.options
        for seat in self.seats:
            await (await self.peer(seat)).aclose()
        self.say(f"{options.nodes} nodes on one Valkey; empty: {await self.memory()}")
        before, began = [used(each.process.pid)[1] for each in self.seats], trio.current_time()
        await self.all("connect", options.connections)
        spent = sum([used(s.process.pid)[1] - b for s, b in zip(self.seats, before, strict=True)])
        total = options.connections * options.nodes
        self.say(
            f"{total:,} connections to {options.connections:,} topics in "
            f"{trio.current_time() - began:.0f} s, {1e6 * spent / total:.0f} µs of a node each; "
            f"{await self.memory()}"
        )
        await self.steady()
        members = [await self.peer(seat) for seat in self.seats]
        watcher = await self.peer(self.seats[0])
        await self.room(members, watcher)
        await self.death(members, watcher)
        return self.is_sound

    async def steady(self) -> None:
        options = self.options
        pids = [each.process.pid for each in self.seats]
        before = [used(each)[1] for each in (*pids, self.server.process.pid)]
        await self.all("pace", options.publishes / options.nodes)
        await trio.sleep(options.seconds)
        await self.all("pace", 0)
        await trio.sleep(1.0)
        spent = [
            (used(pid)[1] - b) / options.seconds
            for pid, b in zip((*pids, self.server.process.pid), before, strict=True)
        ]
        reports = await self.all("report")
        acked, delivered = (sum([r[what] for r in reports]) for what in ("acked", "delivered"))
        times = [each for r in reports for each in r["times"]]
        self.say(
            f"{options.publishes} publishes a second for {options.seconds:.0f} s: {acked:,} acknowledged, "
            f"{delivered:,} delivered of {acked * options.nodes:,}; "
            f"p50 {share(times, 0.5)} ms, p99 {share(times, 0.99)} ms; a node is busy "
            f"{100 * min(spent[:-1]):.0f} to {100 * max(spent[:-1]):.0f}%, Redis {100 * spent[-1]:.0f}%",
            holds=delivered
            == acked * options.nodes
            == sum([r["sent"] for r in reports]) * options.nodes,
        )

    async def room(self, members: Sequence[Peer], watcher: Peer) -> None:
        await watcher.request(subscribe={"channel": "room", "join_leave": True})
        for member in members:
            await member.request(subscribe={"channel": "room", "join_leave": True})
        joins = count(await watcher.receive_all(), "join")
        found = await present(watcher)
        self.say(
            f"a room with one of each node: presence {found}, {joins} joins told",
            holds=found == len(members) + 1 and joins >= len(members),
        )

    async def death(self, members: Sequence[Peer], watcher: Peer) -> None:
        """Kill the last node under load; its clients come back to the others."""
        options, last = self.options, self.seats[-1]
        trips: list[float] = []
        bystander, across = await self.peer(self.seats[0]), await self.peer(self.seats[1])
        await across.request(subscribe={"channel": "beside"})
        await self.all("pace", options.publishes / options.nodes)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stand_by, bystander, across, trips)
            await trio.sleep(3.0)
            calm, trips[:] = list(trips), []
            last.process.kill()
            killed = trio.current_time()
            left: list[float] = []
            nursery.start_soon(wait_left, watcher, left)
            back = await last.order("come_back")
            storm, trips[:] = list(trips), []
            with trio.move_on_after(30):
                while not left:  # noqa: ASYNC110 - a foreign process
                    await trio.sleep(0.1)
            gone = left[0] - killed if left else inf
            await trio.sleep(3.0)
            found = await present(watcher)
            nursery.cancel_scope.cancel()
        await self.all("pace", 0)
        await trio.sleep(1.5)
        reports = await self.all("report")
        ends = [r["ends"] for r in reports]
        differ = sum([len(set(each)) > 1 for each in zip(*ends, strict=True)])
        wrong = [each for r in reports for each in r["wrong"]]
        acked = sum([r["acked"] for r in reports])
        at_last = reports[-1]
        self.say(
            f"a node is killed: {at_last['returned']:,} of its clients were back after {back:.1f} s, "
            f"{at_last['unrecovered']} not recovered; {acked:,} acknowledged in all, {sum(ends[0]):,} kept; "
            f"topics whose listeners differ {differ}, offsets that were wrong {len(wrong)} {wrong[:3]}",
            holds=not (differ or wrong or at_last["unrecovered"]) and sum(ends[0]) >= acked,
        )
        self.say(
            f"a bystander's round trip, p50 / p99 / max in ms: before {row(calm)}, while they came back {row(storm)}, "
            f"until it was buried {row(trips)}"
        )
        self.say(
            f"others saw it leave after {gone:.1f} s; presence {found} then",
            holds=gone < 16 and found == len(members),
        )
        self.seats.pop().process.wait()
        self.say(f"in the end: {await self.memory()}")


async def wait_left(watcher: Peer, left: list[float]) -> None:
    """Note when the first leave is told."""
    while not count(await watcher.receive_all(), "leave"):
        pass
    left.append(trio.current_time())


def row(times: Sequence[float]) -> str:
    return " / ".join(share(times, part) for part in (0.5, 0.99, 1.0))


def count(pushes: Sequence[Any], what: str) -> int:
    return sum([what in each.get("push", {}) for each in pushes if isinstance(each, dict)])


async def present(peer: Peer) -> int:
    return len((await peer.request(presence={"channel": "room"}))["presence"]["presence"])


async def stand_by(bystander: Peer, across: Peer, trips: list[float]) -> None:
    """Publish at one node, and have it from another, 50 times a second."""

    async def publish() -> None:
        while True:
            data = trio.current_time()
            await bystander.send_json({"id": 1, "publish": {"channel": "beside", "data": data}})
            await trio.sleep(0.02)

    async def drain() -> None:
        while True:
            await bystander.receive_text()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(publish)
        nursery.start_soon(drain)
        while True:
            for line in (await across.receive_text()).split("\n"):
                publication = msgspec.json.decode(line).get("push", {}).get("pub")
                if publication is not None:
                    trips.append(trio.current_time() - publication["data"])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--nodes", type=int, default=10)
    parser.add_argument("--connections", type=int, default=1000, help="of each, each to a topic")
    parser.add_argument("--publishes", type=int, default=200, help="a second, of all")
    parser.add_argument("--seconds", type=float, default=20.0)
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        with serving(BINARIES["valkey"], directory) as server:
            trial = Trial(server, directory, parser.parse_args())
            try:
                trial.begin()
                return 0 if trio.run(trial.run) else 1
            finally:
                trial.end()


if __name__ == "__main__":
    sys.exit(main())
