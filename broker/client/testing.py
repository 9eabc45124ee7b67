"""A broker that does just what a test tells it to, for programs that use `broker.client`.

It speaks enough of the protocol to do what a real broker cannot be made to do: drop the connection
at a chosen point, hold a reply back, forget a history, send garbage. It lives on memory streams,
so with pytest-trio's `autojump_clock` reconnects take no time::

    async def test_a_lost_line_is_survived(nursery, autojump_clock):
        fake = FakeBroker(nursery)
        async with fake.client() as (client, peer):
            await peer.drop()
            peer = await fake.greet()       # the client is back
            peer.soon("publish")
            await client.publish("news", 1)

For a whole broker in memory see `broker.testing`.
"""

import base64
import hashlib
import json
import math
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final

import trio
import trio_websocket
from trio.testing import memory_stream_pair

from broker.client.client import Client, open_client
from broker.client.subscription import Subscription
from broker.core.messages import Publication

URL: Final = "ws://broker.test:9501"
"""Where the client of a `FakeBroker` believes it is."""

KEPT: Final[dict[str, Any]] = {
    "recoverable": True,
    "positioned": True,
    "epoch": "e",
    "offset": 0,
}
"""A subscribe reply: the topic keeps history, and nothing was published yet."""

VIRTUAL_HOUR: Final = 3600.0
"""How long a block of `FakeBroker.client` may take: at once on a virtual clock that jumps, so
what would hang fails."""


def pub(offset: int) -> dict[str, Any]:
    """The publication at an offset of a topic, as it comes over the wire; its data is `"n7"`."""
    return {"data": f"n{offset}", "offset": offset}


class FakePeer:
    """The broker's end of one connection, after its WebSocket handshake."""

    def __init__(
        self,
        nursery: trio.Nursery,
        stream: trio.abc.Stream,
        ws: trio_websocket.WebSocketConnection,
    ) -> None:
        self.nursery = nursery
        self.stream = stream
        self.ws = ws
        self._commands: list[dict[str, Any]] = []

    async def expect(self, method: str) -> dict[str, Any]:
        """The next command. Raises `AssertionError` unless it is `method`."""
        while not self._commands:
            text = str(await self.ws.get_message())
            self._commands += [json.loads(line) for line in text.split("\n")]
        command = self._commands.pop(0)
        if method not in command:
            raise AssertionError(f"expected {method}, got {command}")
        return command

    async def send(self, *objects: object) -> None:
        """Replies and pushes, joined into one message."""
        await self.ws.send_message("\n".join(json.dumps(each) for each in objects))

    async def answer(self, method: str, **result: object) -> Any:
        """Reply to the next command, which must be `method`; return its fields."""
        command = await self.expect(method)
        await self.send({"id": command["id"], method: result})
        return command[method]

    async def refuse(self, method: str, code: int, *, temporary: bool = False) -> None:
        """Reply to the next command, which must be `method`, with an error."""
        command = await self.expect(method)
        error = {"code": code, "message": "no", "temporary": temporary}
        await self.send({"id": command["id"], "error": error})

    def soon(self, method: str, **result: object) -> None:
        """Answer the next command while the test goes on to send it."""
        self.nursery.start_soon(partial(self.answer, method, **result))

    async def publish(self, *offsets: int, topic: str = "news") -> None:
        """Push the publications at these offsets of a topic."""
        await self.send(*({"push": {"channel": topic, "pub": pub(each)}} for each in offsets))

    async def drop(self) -> None:
        """Cut the line, without a word."""
        await trio.aclose_forcefully(self.stream)


class FakeBroker:
    """Where clients connect to. `dials` has the times of all attempts; `down` refuses them; `pair`
    makes the two ends of a connection, for example `trio.testing.lockstep_stream_pair`."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.dials: list[float] = []
        self.down = False
        self.fds: int = 0
        self.pair: Callable[[], tuple[trio.abc.Stream, trio.abc.Stream]] = memory_stream_pair
        self._send, self._dialled = trio.open_memory_channel[trio.abc.Stream](math.inf)

    async def open_stream(self, host: str, port: int) -> trio.abc.Stream:
        """For the argument `open_stream` of `open_client`."""
        await trio.lowlevel.checkpoint()
        self.dials.append(trio.current_time())
        if self.down:
            raise ConnectionRefusedError(111, "Connection refused")
        ours, theirs = self.pair()
        self._send.send_nowait(theirs)
        return ours

    async def stream(self) -> trio.abc.Stream:
        """The next connection, before anything."""
        return await self._dialled.receive()

    async def request(self) -> tuple[trio_websocket.WebSocketRequest, trio.abc.Stream]:
        """The next connection, before the WebSocket handshake is answered."""
        stream = await self.stream()
        return await trio_websocket.wrap_server_stream(self.nursery, stream), stream

    async def accept(self) -> FakePeer:
        """The next connection, before its connect command."""
        request, stream = await self.request()
        return FakePeer(self.nursery, stream, await request.accept())

    async def greet(self, **reply: object) -> FakePeer:
        """The next connection, after its connect command; `reply` are fields of the reply."""
        peer = await self.accept()
        self.fds += 1
        await peer.answer("connect", client=str(self.fds), **reply)
        return peer

    @asynccontextmanager
    async def client(self, **reply: object) -> AsyncGenerator[tuple[Client, FakePeer], None]:
        """A connected client and the broker's end of its first connection, for a block of at most
        one virtual hour."""
        peers: list[FakePeer] = []
        greeted = trio.Event()

        async def greet() -> None:
            peers.append(await self.greet(**reply))
            greeted.set()

        self.nursery.start_soon(greet)
        with trio.fail_after(VIRTUAL_HOUR):
            async with open_client(URL, open_stream=self.open_stream) as client:
                await greeted.wait()
                yield client, peers[0]

    @asynccontextmanager
    async def subscriber(
        self,
    ) -> AsyncGenerator[tuple[Subscription[Publication], FakePeer], None]:
        """A client that is subscribed to `news`, which keeps history."""
        async with self.client() as (client, peer):
            peer.soon("subscribe", **KEPT)
            async with client.subscribe("news") as subscription:
                yield subscription, peer


async def handshake_by_hand(stream: trio.abc.Stream, *behind: bytes) -> None:
    """Answer a WebSocket handshake as it should be, for a peer that no library would let you play.
    `behind` follows in the same segment."""
    key = await read_key(stream)
    await stream.send_all(acceptance(key) + b"".join(behind))


async def read_key(stream: trio.abc.Stream) -> bytes:
    """Read a WebSocket handshake; its `Sec-WebSocket-Key`."""
    head = bytearray()
    while b"\r\n\r\n" not in head:
        head += await stream.receive_some(1000)
    return bytes(head).split(b"Sec-WebSocket-Key: ")[1].split(b"\r\n")[0]


def acceptance(key: bytes) -> bytes:
    """The 101 that answers a handshake with this key (RFC 6455 section 4.2.2)."""
    guid = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
    accept = base64.b64encode(hashlib.sha1(key + guid, usedforsecurity=False).digest())
    return (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n"
    )


def server_frame(payload: bytes, first: int = 0x81) -> bytes:
    """One unmasked frame; `first` is its first byte, a whole text by default."""
    length = len(payload)
    if length < 126:
        return bytes((first, length)) + payload
    if length < 2**16:
        return bytes((first, 126)) + length.to_bytes(2, "big") + payload
    return bytes((first, 127)) + length.to_bytes(8, "big") + payload
