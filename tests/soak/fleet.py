"""The clients of a soak: a process of its own, `python -m tests.soak.fleet`, with orders by its stdin.

Steady ones of every transport stay from the beginning to the end; others come and go, and recover what they
have missed. The publications of a topic are numbered, so each client knows what it should have had.
"""

import json
import random
import re
from collections import Counter
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

import centrifuge.protocol.client_pb2 as schema
import msgspec
import trio

from tests.conftest import delimited
from tests.hostile.orders import answer, orders
from tests.hostile.target import API_KEY
from tests.hostile.wire import (
    BINARY,
    CLOSE,
    PING,
    PONG,
    TEXT,
    Ended,
    Peer,
    Tcp,
    connect,
    frame,
    handshake,
    request,
)

TOPICS: Final = 100
SHARES: Final = {"json": 55, "protobuf": 15, "http_stream": 10, "sse": 10, "uni_sse": 5, "plain": 5}
"""Transports of the steady clients, in percent."""
STAY_SECONDS: Final = 4.0
"""So long one that comes and goes stays, on average."""
AWAY_SECONDS: Final = 0.5

_numbers: Final = re.compile(rb'"n":(\d+)[,}]').findall


def _kind_of(number: int) -> str:
    """The transport of a steady client; any hundred of them in a row have all in their shares."""
    left = number * 37 % 100
    for kind, percent in SHARES.items():
        left -= percent
        if left < 0:
            return kind
    raise AssertionError("the shares are not a hundred percent")


class _Reader:
    """A steady client's account of its topic."""

    def __init__(self, fleet: "_Fleet", topic: int) -> None:
        self.fleet = fleet
        self.topic = topic
        self.last = -1

    def take(self, data: bytes) -> None:
        for text in _numbers(data):
            number = int(text)
            self.fleet.deliveries += 1
            if self.last >= 0:
                self.fleet.lost += max(0, number - self.last - 1)
                self.fleet.twice += number <= self.last
            self.last = max(self.last, number)


@asynccontextmanager
async def _closing(peer: Peer) -> AsyncGenerator[None]:
    """Close a connection behind the block, without a word."""
    try:
        yield
    finally:
        with trio.CancelScope(shield=True):
            await peer.aclose()


class _Fleet:
    def __init__(self, order: Mapping[str, Any], nursery: trio.Nursery) -> None:
        self.address = Tcp(order["port"])
        self.order = order
        self.nursery = nursery
        self.deliveries = self.lost = self.twice = self.gaps = self.came = 0
        self.asked: Counter[str] = Counter()
        self.ended: Counter[str] = Counter()
        self.readers: list[_Reader] = []

    async def open(self) -> None:
        for number in range(self.order["steady"]):
            kind = _kind_of(number)
            peer = Peer(await connect(self.address))
            topic = (number * 7 + number // 100) % TOPICS
            reader = _Reader(self, topic)
            start = getattr(self, f"_start_{kind}")
            rest = await start(peer, f"t{topic}")
            if kind != "plain":
                self.readers.append(reader)
            self.nursery.start_soon(self._stay, kind, peer, reader, rest)
        for number in range(self.order["coming"]):
            self.nursery.start_soon(self._come_and_go, number)

    # steady ones

    async def _start_json(self, peer: Peer, topic: str) -> str:
        await self._start_plain(peer, topic)
        assert "connect" in await peer.call(connect={})
        assert "error" not in await peer.call(subscribe={"channel": topic})
        return ""

    async def _start_plain(self, peer: Peer, topic: str) -> str:
        await peer.send(handshake(host=self.address.name))
        assert (await peer.head()).status == 101
        return ""

    async def _start_protobuf(self, peer: Peer, topic: str) -> str:
        fields = {"Sec-WebSocket-Protocol": "centrifuge-protobuf"}
        await peer.send(handshake(fields=fields, host=self.address.name))
        assert (await peer.head()).status == 101
        commands = (
            schema.Command(id=1, connect={}),
            schema.Command(id=2, subscribe={"channel": topic}),
        )
        for command in commands:
            await peer.send(frame(BINARY, delimited(command.SerializeToString())))
            await peer.frame()
        return ""

    async def _start_http_stream(self, peer: Peer, topic: str, path: str = "http_stream") -> str:
        body = msgspec.json.encode({"id": 1, "connect": {}})
        fields = [("Content-Type", "application/json")]
        await peer.send(request(f"POST /connection/{path}", fields, body))
        assert (await peer.head()).status == 200
        first = await peer.until(b"\n")
        found = msgspec.json.decode(first.removeprefix(b"data: "))["connect"]
        await self._api("subscribe", user="", client=found["client"], channel=topic)
        return str(found["session"])

    async def _start_sse(self, peer: Peer, topic: str) -> str:
        return await self._start_http_stream(peer, topic, "sse")

    async def _start_uni_sse(self, peer: Peer, topic: str) -> str:
        await peer.send(request(f"GET /connection/uni_sse?topic={topic}"))
        assert (await peer.head()).status == 200
        return ""

    async def _stay(self, kind: str, peer: Peer, reader: _Reader, session: str) -> None:
        async with _closing(peer):
            how = await self._follow(kind, peer, reader, session)
        self.ended[f"{kind}: {how}"] += 1

    async def _follow(self, kind: str, peer: Peer, reader: _Reader, session: str) -> str:
        """Read to the end; how that came."""
        how = ""
        async with trio.open_nursery() as nursery:
            try:
                if kind in ("json", "protobuf", "plain"):
                    await self._follow_frames(peer, reader)
                await self._follow_lines(peer, reader, session, nursery)
            except Ended as ended:
                how = ended.how
            nursery.cancel_scope.cancel()
        return how

    async def _follow_frames(self, peer: Peer, reader: _Reader) -> None:
        while True:
            opcode, payload = await peer.frame()
            if opcode == CLOSE:
                raise Ended(f"close {int.from_bytes(payload[:2], 'big')}")
            if opcode == PING:
                await peer.send(frame(PONG, payload))
            elif payload == b"{}":
                await peer.send(frame(TEXT, b"{}"))
            elif payload == b"\0":
                await peer.send(frame(BINARY, b"\0"))
            else:
                reader.take(payload)

    async def _follow_lines(
        self, peer: Peer, reader: _Reader, session: str, nursery: trio.Nursery
    ) -> None:
        buffer = b""
        while True:
            *lines, buffer = (buffer + await peer.read()).split(b"\n")
            reader.take(b"\n".join(lines))
            if session and (b"{}" in lines or b"data: {}" in lines):
                nursery.start_soon(self._pong, session)

    async def _pong(self, session: str) -> None:
        body = msgspec.json.encode({"session": session, "node": "", "data": "{}"})
        try:
            peer = Peer(await connect(self.address))
            async with _closing(peer):
                await peer.send(request("POST /emulation", [("Connection", "close")], body))
                await peer.head()
        except Ended as ended:
            self.ended[f"a pong: {ended.how}"] += 1

    async def _api(self, method: str, **params: object) -> None:
        peer = Peer(await connect(self.address))
        fields = [("X-API-Key", API_KEY), ("Connection", "close")]
        async with _closing(peer):
            await peer.send(request(f"POST /api/{method}", fields, msgspec.json.encode(params)))
            assert b"error" not in (await peer.response()).body

    # those that come and go

    async def _come_and_go(self, number: int) -> None:
        chance = random.Random(number)
        topic = f"t{number % TOPICS}"
        epoch, offset = "", -1
        await trio.sleep(chance.random() * STAY_SECONDS)
        while True:
            self.came += 1
            try:
                peer = Peer(await connect(self.address))
                async with _closing(peer):
                    epoch, offset = await self._visit(peer, topic, epoch, offset)
                    with trio.move_on_after(chance.expovariate(1 / STAY_SECONDS)):
                        while True:
                            offset = self._count(await peer.publications(), offset)
                    await self._leave(peer, chance)
            except Ended as ended:
                self.ended[f"came: {ended.how}"] += 1
            await trio.sleep(AWAY_SECONDS * chance.random())

    async def _visit(self, peer: Peer, topic: str, epoch: str, offset: int) -> tuple[str, int]:
        """Come back to a topic, recover, and ask the backend; where the topic is."""
        await self._start_plain(peer, topic)
        await peer.call(connect={})
        asked: dict[str, object] = {"channel": topic, "recoverable": True}
        if offset >= 0:
            asked |= {"recover": True, "epoch": epoch, "offset": offset}
        found = (await peer.call(subscribe=asked))["subscribe"]
        if offset >= 0 and not found.get("recovered"):
            self.gaps += 1
            offset = -1
        if offset < 0:
            offset = found.get("offset", 0)
        offset = self._count(found.get("publications", ()), offset)
        answer = await peer.rpc("quick")
        self.asked["refused" if "error" in answer else "answered"] += 1
        return found["epoch"], offset

    def _count(self, publications: Any, offset: int) -> int:
        for each in publications:
            self.deliveries += 1
            self.lost += max(0, each["offset"] - offset - 1)
            self.twice += each["offset"] <= offset
            offset = max(offset, each["offset"])
        return offset

    async def _leave(self, peer: Peer, chance: random.Random) -> None:
        match chance.randrange(3):
            case 0:
                peer.reset()
            case 1:
                await peer.send(frame(CLOSE, b"\x03\xe8"))
                await peer.ending(2)

    # reports

    def report(self, finals: Mapping[str, int] | None = None) -> dict[str, object]:
        """`finals` are the last numbers of the topics, once nothing is on its way any more."""
        behind = 0
        if finals is not None:
            behind = sum(max(0, finals[f"t{each.topic}"] - each.last) for each in self.readers)
        return {
            "deliveries": self.deliveries,
            "lost": self.lost + behind,
            "twice": self.twice,
            "gaps": self.gaps,
            "came": self.came,
            "asked": dict(self.asked),
            "ended": dict(self.ended),
        }


async def _run() -> None:
    fleet: _Fleet | None = None
    async with trio.open_nursery() as nursery:
        async for line in orders():
            order = json.loads(line)
            if fleet is None:
                fleet = _Fleet(order, nursery)
                await fleet.open()
                answer({"ready": True})
            else:
                answer(fleet.report(order))
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(_run)
