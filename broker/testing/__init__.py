"""A test kit: a whole broker in memory, on virtual time, with peers that behave and peers that do not.

With pytest-trio's `autojump_clock` (or `trio.testing.MockClock`) heartbeats, drains and recoveries
that take minutes pass in milliseconds::

    async def test_a_silent_peer_is_cut(autojump_clock, nursery):
        async with open_test_broker(Broker()) as net:
            peer = await net.open_plain()
            await trio.sleep(31)
            assert await peer.receive_close() == (1011, "no pong")

Everything here speaks through `trio.testing` streams, byte for byte what a socket would carry.
"""

import os
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Self, TypeAlias

import msgspec
import trio
import trio.testing

from broker.app import Broker
from broker.core.messages import Fd
from broker.hooks import ConnectEvent, ConnectReply
from broker.node import Node
from broker.testing.bus import Bus, BusEngine
from broker.testing.engines import (
    ENGINE_CONTRACT,
    OpenEngine,
    Witness,
    engine_contract,
    wait_in_line,
)
from broker.transport import frames
from broker.transport.outbox import Outbox

__all__ = [
    "ENGINE_CONTRACT",
    "Bus",
    "BusEngine",
    "BusNode",
    "Closed",
    "MemoryListener",
    "Network",
    "OpenEngine",
    "Peer",
    "Witness",
    "client_frame",
    "engine_contract",
    "handshake",
    "name_users_by_token",
    "open_test_broker",
    "open_test_node",
    "wait_in_line",
]

StreamPair: TypeAlias = tuple[trio.abc.Stream, trio.abc.Stream]
MakePair: TypeAlias = Callable[[], StreamPair]


class MemoryListener(trio.abc.Listener[trio.abc.Stream]):
    """A listener that is connected to by a method call."""

    def __init__(self) -> None:
        self._send, self._receive = trio.open_memory_channel[trio.abc.Stream](1000)

    async def connect(
        self, make_pair: MakePair = trio.testing.memory_stream_pair
    ) -> trio.abc.Stream:
        """Connect; `make_pair` makes the two ends, for example `lockstep_stream_pair`, whose peer
        takes nothing until it reads. Raises `trio.ClosedResourceError` when nobody listens."""
        ours, theirs = make_pair()
        await self._send.send(theirs)
        return ours

    async def accept(self) -> trio.abc.Stream:
        try:
            return await self._receive.receive()
        except trio.EndOfChannel:
            raise trio.ClosedResourceError from None

    async def aclose(self) -> None:
        """Connects that nobody has accepted yet are refused: their streams are closed."""
        self._send.close()
        with trio.CancelScope(shield=True):  # closing by force does not wait for anybody
            while self._receive.statistics().current_buffer_used:
                await trio.aclose_forcefully(self._receive.receive_nowait())
        self._receive.close()
        await trio.lowlevel.checkpoint()


def handshake(
    path: str = "/", headers: Mapping[str, str] | None = None, *, host: str = "testserver"
) -> bytes:
    """A WebSocket upgrade request. `headers` are added, or replace those of the same name."""
    fields = {
        "Host": host,
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Version": "13",
    }
    fields |= headers or {}
    lines = [f"GET {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"


def client_frame(opcode: int, payload: bytes = b"", *, fin: bool = True) -> bytes:
    """A masked frame as a client sends it."""
    header = bytearray(frames.encode(opcode, payload)[: -len(payload) or None])
    if not fin:
        header[0] &= 0x7F
    header[1] |= 0x80
    mask = os.urandom(4)
    return bytes(header) + mask + frames.unmask(payload, mask)


class Closed(Exception):
    """The broker closed the connection; `code` is None if it did so without a Close frame."""

    def __init__(self, code: int | None, reason: str = "") -> None:
        super().__init__(f"{code}: {reason}")
        self.code = code
        self.reason = reason


class Peer:
    """One client at the level of frames: it does just what it is told, however rude.

    It answers nothing by itself: no pings, no Close.
    """

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.fd = 0
        self._buffer = bytearray()

    async def send(self, data: bytes) -> None:
        """Raw bytes."""
        await self.stream.send_all(data)

    async def send_text(self, text: str) -> None:
        await self.send(client_frame(frames.TEXT, text.encode()))

    async def send_json(self, *commands: object) -> None:
        """Centrifuge commands, joined into one message."""
        await self.send_text("\n".join(msgspec.json.encode(c).decode() for c in commands))

    async def send_close(self, code: int = 1000, reason: str = "") -> None:
        payload = frames.close_frame(code, reason)[2:]
        await self.send(client_frame(frames.CLOSE, payload))

    async def receive_head(self) -> str:
        """The head of an HTTP response."""
        while (end := self._buffer.find(b"\r\n\r\n")) < 0:
            await self._read()
        head = self._take(end + 4)
        return head.decode("latin-1")

    async def receive_frame(self) -> tuple[int, bytes]:
        """The next frame, whatever it is. Raises `Closed` at the end of the stream."""
        while (header := frames.read_header(self._buffer)) is None:
            await self._read()
        assert not header.masked
        while len(self._buffer) < header.size + header.length:
            await self._read()
        self._take(header.size)
        return header.opcode, self._take(header.length)

    async def receive_text(self) -> str:
        """The next text frame. Raises `Closed` on a Close frame."""
        while True:
            opcode, payload = await self.receive_frame()
            if opcode == frames.TEXT:
                return payload.decode()
            if opcode == frames.CLOSE:
                raise Closed(int.from_bytes(payload[:2], "big"), payload[2:].decode())

    async def receive_json(self) -> Any:
        """The next JSON object of the next text frame; a frame of several must hold just one."""
        return msgspec.json.decode(await self.receive_text())

    async def receive_all(self) -> list[Any]:
        """All that comes until nothing has for a tenth of a second, line by line and in order.

        JSON objects are decoded, any other text is as it came. Where the stream has ended the last
        is the code of its Close frame, None without one.
        """
        came: list[Any] = []
        try:
            while True:
                with trio.move_on_after(0.1) as silence:
                    text = await self.receive_text()
                if silence.cancelled_caught:
                    return came
                came += [_object(line) for line in text.split("\n")]
        except Closed as closed:
            return [*came, closed.code]

    async def receive_close(self) -> tuple[int | None, str]:
        """Read on until the end; return code and reason of the Close frame."""
        try:
            while True:
                await self.receive_text()
        except Closed as closed:
            return closed.code, closed.reason

    async def receive_eof(self) -> bytes:
        """Read to the end of the stream; return what came."""
        try:
            while True:
                await self._read()
        except Closed:
            return self._take(len(self._buffer))

    async def request(self, **command: object) -> Any:
        """Send one Centrifuge command and return its reply; pushes before it are dropped."""
        await self.send_json({"id": 1, **command})
        while True:
            for line in (await self.receive_text()).split("\n"):
                reply = msgspec.json.decode(line)
                if reply.get("id"):
                    return reply

    async def aclose(self) -> None:
        """Go away without a word."""
        await trio.aclose_forcefully(self.stream)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def _read(self) -> None:
        try:
            data = await self.stream.receive_some(64 * 2**10)
        except trio.BrokenResourceError:
            data = b""
        if not data:
            raise Closed(None, "end of stream")
        self._buffer += data

    def _take(self, size: int) -> bytes:
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken


def _object(line: str) -> Any:
    return msgspec.json.decode(line) if line.startswith("{") else line


class Network:
    """A broker that is being served in memory, and the way to it."""

    def __init__(self, broker: Broker, listener: MemoryListener) -> None:
        self.broker = broker
        self.listener = listener
        self._node: Node | None = None

    @property
    def node(self) -> Node:
        """The broker's inner side. Once asked for, it may be looked at after the end, too."""
        if self._node is None:
            self._node = self.broker.node
        return self._node

    def outbox(self, fd: Fd) -> Outbox:
        """The outbox of a connection. Raises `KeyError` if it is not here."""
        return self.node.services.connections[fd].peer.outbox

    @property
    def open_requests(self) -> int:
        """Requests between clients that wait for an answer."""
        return len(self.node.services.requests)

    @property
    def streams(self) -> int:
        """Streams accepted and not yet closed, whatever they speak."""
        return self.node.services.admission.count()

    async def connect(self, make_pair: MakePair = trio.testing.memory_stream_pair) -> Peer:
        """A bare connection: nothing has been sent yet."""
        return Peer(await self.listener.connect(make_pair))

    async def open_plain(
        self,
        path: str = "/",
        headers: Mapping[str, str] | None = None,
        make_pair: MakePair = trio.testing.memory_stream_pair,
    ) -> Peer:
        """A plain peer, which the broker takes for one before it has sent anything.

        Raises `AssertionError` if the handshake was refused.
        """
        peer = await self.open_websocket(path, headers, make_pair)
        self.broker.declare_plain(peer.fd)
        return peer

    async def open_websocket(
        self,
        path: str = "/",
        headers: Mapping[str, str] | None = None,
        make_pair: MakePair = trio.testing.memory_stream_pair,
    ) -> Peer:
        """A peer after its WebSocket handshake: its first message will tell what it speaks.

        Raises `AssertionError` if the handshake was refused.
        """
        peer = await self.connect(make_pair)
        before = {info.fd for info in self.broker.connections(limit=10**9)}
        await peer.send(handshake(path, headers))
        head = await peer.receive_head()
        assert head.startswith("HTTP/1.1 101 "), head
        new = [i.fd for i in self.broker.connections(limit=10**9) if i.fd not in before]
        peer.fd = new[-1]
        return peer

    async def open_client(
        self, make_pair: MakePair = trio.testing.memory_stream_pair, **connect: object
    ) -> Peer:
        """A Centrifuge client after its `connect`; `connect` are fields of that command."""
        peer = await self.open_websocket(make_pair=make_pair)
        reply = await peer.request(connect=connect)
        assert "connect" in reply, reply
        return peer


class BusNode(Network):
    """A node on a bus, and its faults."""

    def __init__(self, network: Network, bus: Bus, scope: trio.CancelScope) -> None:
        super().__init__(network.broker, network.listener)
        engine = network.node.router.engine
        assert isinstance(engine, BusEngine)
        self.bus = bus
        self.engine = engine
        self._scope = scope

    def kill(self) -> None:
        """Have the node die as by kill -9: the others hear nothing of it."""
        self.bus.kill(self.engine.node)
        self._scope.cancel()

    def cut(self) -> None:
        """Cut the node off from the bus, until `mend`. Its clients notice nothing."""
        self.bus.cut(self.engine.node)

    def mend(self) -> None:
        self.bus.mend(self.engine)


def name_users_by_token(broker: Broker) -> Broker:
    """Take each client's token for its user, so `open_client(token="ann")` is Ann's; return the
    broker. It sets the connect hook, in place of any other."""

    @broker.on_connect
    async def let_in(event: ConnectEvent) -> ConnectReply:
        return ConnectReply(user=event.token)

    return broker


@asynccontextmanager
async def open_test_broker(broker: Broker) -> AsyncGenerator[Network, None]:
    """Serve a broker in memory for as long as the block; then stop it, as SIGTERM would.

    Its wall clock goes with Trio's, so tokens expire in virtual time as well; an engine's disk is waited
    for in line.
    """
    async with trio.open_nursery() as nursery:
        yield await _serve(nursery, broker)
        broker.stop()


@asynccontextmanager
async def open_test_node(bus: Bus, broker: Broker | None = None) -> AsyncGenerator[BusNode, None]:
    """Serve one more node on a bus for as long as the block; then stop it, unless it was killed. Each needs
    a `name` of its own in its settings, if names matter."""
    broker = broker or Broker()
    broker.open_engine = bus.open_engine
    async with trio.open_nursery() as nursery:
        scope = trio.CancelScope()
        network = await _serve(nursery, broker, scope)
        yield BusNode(network, bus, scope)
        broker.stop()


async def _serve(
    nursery: trio.Nursery, broker: Broker, scope: trio.CancelScope | None = None
) -> Network:
    """Serve a broker in a nursery, until it is stopped or the scope is cancelled."""
    began = time.time() - trio.current_time()
    broker.wall_clock = lambda: began + trio.current_time()
    if broker.run_blocking is None:
        broker.run_blocking = wait_in_line
    listener = MemoryListener()

    async def serve(task_status: trio.TaskStatus[list[str]]) -> None:  # noqa: ASYNC128 - handed on
        with scope or trio.CancelScope():
            await broker.serve(listeners=[listener], task_status=task_status)

    await nursery.start(serve)
    return Network(broker, listener)
