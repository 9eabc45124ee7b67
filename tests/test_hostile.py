"""Hostile and faulty peers, and the answers they must get: one test for each such input.

Meanwhile two clients talk to each other and lose nothing: `open_target` sees to that. The names
say how bad the input is for a server that does not defend itself: S1 kills or starves everyone,
S2 harms others or leaks, S3 is one connection, or conformance.
"""

import base64
import hmac
import os
import random
import re
import socket
import struct
import subprocess
import sys
import textwrap
from collections.abc import AsyncGenerator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import msgspec
import pytest
import structlog.testing
import trio
from trio.testing import MockClock, lockstep_stream_pair, wait_all_tasks_blocked

from broker import Broker, Config, Connection
from broker.config.settings import TokenRules, TopicRules
from broker.core.messages import Close, Frame, Initiator
from broker.core.session import SlowRule
from broker.testing import Closed, MemoryListener, Network, Peer, client_frame, handshake
from broker.transport.frames import BINARY, CLOSE, CONTINUATION, PING, PONG, TEXT
from tests.conftest import HMAC_SECRET

ROOT = Path(__file__).parent.parent

SMALL = 1000
"""A limit on messages that makes it cheap to go over it."""


class Target(Network):
    """A broker in memory and on a TCP port; it notes how connections end."""

    def __init__(self, broker: Broker, memory: MemoryListener, tcp: trio.SocketListener) -> None:
        super().__init__(broker, memory)
        self._address = tcp.socket.getsockname()
        self.closes: list[Close] = []
        self.expected_failures = 0

    async def connect_socket(self) -> trio.SocketStream:
        return await trio.open_tcp_stream(*self._address)

    async def status(self, *pieces: bytes) -> int:
        """The status of the HTTP response to these bytes; the connection is closed behind it."""
        async with await self.connect() as peer:
            for piece in pieces:
                await peer.send(piece)
            answer = await peer.receive_eof()
        match = re.match(rb"HTTP/1\.1 ([0-9]{3}) ", answer)
        assert match, answer
        return int(match[1])

    async def close_after(self, *pieces: bytes) -> int | None:
        """The code of the Close frame that a peer gets for these bytes after its handshake."""
        async with await self.open_plain() as peer:
            with suppress(trio.BrokenResourceError):
                for piece in pieces:
                    await peer.send(piece)
            return (await peer.receive_close())[0]


class Bystander:
    """A client of good behaviour."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.heard: list[int] = []

    async def listen(self) -> None:
        with suppress(Closed, trio.ClosedResourceError):
            while True:
                for line in (await self.peer.receive_text()).split("\n"):
                    message = msgspec.json.decode(line)
                    if message == {}:
                        await self.peer.send_text("{}")
                    elif publication := message.get("push", {}).get("pub"):
                        self.heard.append(publication["data"])


@asynccontextmanager
async def open_target(
    config: Config | None = None, broker: Broker | None = None
) -> AsyncGenerator[Target, None]:
    """A broker with two bystanders. In the end both have heard all, and nothing failed unasked."""
    broker = broker or Broker(config)
    memory = MemoryListener()
    (tcp,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    target = Target(broker, memory, tcp)
    if broker.hooks.close is None:

        @broker.on_close
        async def note(connection: Connection, close: Close) -> None:
            target.closes.append(close)

    said = 0
    with structlog.testing.capture_logs() as logs:
        async with trio.open_nursery() as nursery:
            await nursery.start(lambda **start: broker.serve(listeners=[memory, tcp], **start))
            pair = [Bystander(await target.open_client()) for _ in range(2)]
            for one in pair:
                await one.peer.request(subscribe={"channel": "talk"})
                nursery.start_soon(one.listen)

            async def chat() -> None:
                nonlocal said
                while True:
                    message = {"publish": {"channel": "talk", "data": said}}
                    await pair[said % 2].peer.send_json(message)
                    said += 1
                    await trio.sleep(0.25)

            async with trio.open_nursery() as talk:
                talk.start_soon(chat)
                yield target
                await wait_all_tasks_blocked()
                talk.cancel_scope.cancel()
            await wait_all_tasks_blocked()
            assert said > 0
            for one in pair:
                assert one.heard == list(range(said))
                await one.peer.aclose()
            broker.stop()
    failures = [entry for entry in logs if entry["log_level"] == "error"]
    assert len(failures) == target.expected_failures, failures


def reset(stream: trio.SocketStream) -> None:
    """End a connection as a crashed process does: the other side gets RST, not FIN."""
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stream.socket.close()


def raw_header(first: int, length: int = 0, *, masked: bool = True) -> bytes:
    """Two bytes of header as they are, and a mask of zeros."""
    return bytes((first, length | (0x80 if masked else 0))) + bytes(4 if masked else 0)


def long_header(length: int) -> bytes:
    """The header of a binary message of so many bytes."""
    return b"\x82\xff" + length.to_bytes(8, "big") + bytes(4)


def close_with(code: int, reason: bytes = b"") -> bytes:
    return client_frame(CLOSE, code.to_bytes(2, "big") + reason)


def echo(broker: Broker) -> Broker:
    """Have all messages sent back."""

    @broker.on_message
    async def push(connection: Connection, frame: Frame) -> None:
        broker.push(connection.fd, frame.data)

    return broker


# S1


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HT",
        b"\x00\xff\x00",
        b"GET nonsense\r\n\r\n",
        handshake(),
        handshake() + client_frame(TEXT, b"x"),
        handshake()[:-10],
    ],
    ids=["request", "half a line", "garbage", "bad line", "handshake", "message", "half a head"],
)
async def test_s1_http_good_or_bad_then_rst(sent: bytes, autojump_clock: MockClock) -> None:
    async with open_target() as target:
        for ticks in range(8):
            stream = await target.connect_socket()
            await stream.send_all(sent)
            for _ in range(ticks):
                await trio.lowlevel.checkpoint()
            reset(stream)
        await trio.sleep(20)
        assert len(target.broker.connections()) == 2


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "caf\xe9"},
        {"Host": "xn--\x80"},
        {"Connection": "Upgrade, \xe9"},
        {"Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=\xff"},
        {"Sec-WebSocket-Version": "13\xa0"},
        {"Sec-WebSocket-Protocol": "caf\xe9"},
        {"Sec-WebSocket-Extensions": "\x80"},
    ],
    ids=ascii,
)
async def test_s1_bytes_beyond_ascii_in_the_fields_of_a_handshake(
    headers: dict[str, str], autojump_clock: MockClock
) -> None:
    async with open_target() as target:
        assert await target.status(handshake(headers=headers)) == 400


async def test_s1_ping_after_our_close(autojump_clock: MockClock) -> None:
    async with open_target() as target:
        peer = await target.open_plain()
        target.broker.disconnect(peer.fd, 3503, "go")
        await wait_all_tasks_blocked()
        await peer.send(client_frame(PING, b"late") + client_frame(TEXT, b"late"))
        await peer.send(client_frame(PONG))
        await peer.send_close(3503)
        assert await peer.receive_close() == (3503, "go")
        assert await peer.receive_eof() == b""
        await wait_all_tasks_blocked()
        assert [(c.code, c.initiator) for c in target.closes] == [(3503, Initiator.SERVER)]


@pytest.mark.parametrize("opcode", [TEXT, BINARY])
async def test_s1_message_over_the_limit_with_a_ping_behind_it(
    opcode: int, autojump_clock: MockClock
) -> None:
    heard = []
    broker = Broker(Config(max_message_bytes=SMALL))

    @broker.on_message
    async def note(connection: Connection, frame: Frame) -> None:
        heard.append(frame.data)

    async with open_target(broker=broker) as target, await target.open_plain() as peer:
        behind = client_frame(PING, b"p") + client_frame(TEXT, b"behind")
        await peer.send(client_frame(opcode, b"x" * (SMALL + 1)) + behind)
        opcode_there, payload = await peer.receive_frame()
        assert opcode_there == CLOSE  # and no pong before it
        assert payload[:2] == (1009).to_bytes(2, "big")
        await peer.send_close(1009)
        assert await peer.receive_eof() == b""
        assert not heard


@pytest.mark.parametrize("hook", ["open", "message", "close"])
async def test_s1_a_hook_that_raises(hook: str, autojump_clock: MockClock) -> None:
    broker = Broker()
    raised = 0

    async def fail(connection: Connection, *what: object) -> None:
        nonlocal raised
        if connection.headers.get("x-victim"):
            raised += 1
            raise ExceptionGroup("two", [ValueError("a"), ExceptionGroup("in", [KeyError("b")])])

    getattr(broker, f"on_{hook}")(fail)
    async with open_target(broker=broker) as target:
        target.expected_failures = 1
        async with await target.open_plain(headers={"X-Victim": "1"}) as peer:
            if hook == "close":
                await peer.send_close()
            else:
                await peer.send_text("x")
            assert (await peer.receive_close())[0] == (1000 if hook == "close" else 1011)
        await wait_all_tasks_blocked()
        assert raised == 1


async def test_s1_the_address_of_a_peer_that_has_reset(autojump_clock: MockClock) -> None:
    broker = Broker()
    addresses = []

    @broker.on_open
    async def look(connection: Connection) -> None:
        if connection.address != "memory":
            await trio.sleep(1)
            addresses.append(connection.address)

    @broker.on_close
    async def look_again(connection: Connection, close: Close) -> None:
        if connection.address != "memory":
            addresses.append(connection.address)

    async with open_target(broker=broker) as target:
        stream = await target.connect_socket()
        host, port = stream.socket.getsockname()
        await stream.send_all(handshake())
        await stream.receive_some()
        reset(stream)
        await trio.sleep(10)
        assert addresses == [f"{host}:{port}"] * 2


FLOOD = """
    import resource
    import socket

    import trio
    import trio.testing
    from trio_websocket import open_websocket_url

    from broker import Broker, Config
    from broker.logs import configure
    from broker.testing import handshake

    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

    async def main():
        configure("console", "warning")
        broker = Broker(Config(host="127.0.0.1", port=0, max_connections=20))
        async with trio.open_nursery() as nursery:
            (address,) = await nursery.start(broker.serve)
            where = ("127.0.0.1", int(address.rpartition(":")[2]))
            for _ in range(100):
                sock = trio.socket.socket()
                await sock.connect(where)
                sock.shutdown(socket.SHUT_WR)
                sock.close()
            with trio.fail_after(5):
                async with open_websocket_url(address) as client:
                    await client.send_message("x")
            print("released")
            with trio.fail_after(20):
                held = []
                for status in [b"101"] * 20 + [b"503"]:
                    held.append(await trio.open_tcp_stream(*where))
                    await held[-1].send_all(handshake())
                    answer = await held[-1].receive_some()
                    assert answer.startswith(b"HTTP/1.1 %b " % status), answer
                for stream in held:
                    await stream.aclose()
                await trio.testing.wait_all_tasks_blocked(0.1)
                async with open_websocket_url(address) as client:
                    await client.send_message("x")
            print("capped")
            broker.stop()

    trio.run(main)
"""


def test_s1_connect_and_fin_a_hundred_times_with_64_open_files(tmp_path: Path) -> None:
    script = tmp_path / "flood.py"
    script.write_text(textwrap.dedent(FLOOD))
    done = subprocess.run(
        [sys.executable, "-W", "error", script],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.stdout.split() == ["released", "capped"], done.stderr
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) < 10  # one line a second, whatever strangers do


async def test_s1_300_mib_before_anybody_reads(autojump_clock: MockClock) -> None:
    broker = Broker()

    @broker.on_open
    async def be_slow(connection: Connection) -> None:
        if connection.headers.get("x-flood"):
            await trio.sleep(60)

    async with open_target(broker=broker) as target, trio.open_nursery() as nursery:
        # A lockstep stream takes a byte only when it is read.
        peer = await target.connect(lockstep_stream_pair)
        taken = 0

        async def flood() -> None:
            nonlocal taken
            await peer.send(handshake(headers={"X-Flood": "1"}))
            chunk = client_frame(BINARY, bytes(1000)) * 4
            for _ in range(300 * 2**20 // len(chunk)):
                await peer.send(chunk)
                taken += len(chunk)

        nursery.start_soon(flood)
        await peer.receive_head()
        await trio.sleep(15)
        assert 0 < taken < 2**20
        nursery.cancel_scope.cancel()
        await peer.aclose()


# S2


async def test_s2_messages_then_rst_while_the_session_is_busy(autojump_clock: MockClock) -> None:
    broker = Broker()

    @broker.on_message
    async def be_slow(connection: Connection, frame: Frame) -> None:
        await trio.sleep(3)

    async with open_target(broker=broker) as target:
        await wait_all_tasks_blocked()
        tasks = trio.lowlevel.current_statistics().tasks_living
        for _ in range(5):
            stream = await target.connect_socket()
            await stream.send_all(handshake())
            await stream.receive_some()
            for _ in range(4):
                await stream.send_all(client_frame(TEXT, b"x"))
                await wait_all_tasks_blocked()
            reset(stream)
        await trio.sleep(30)
        assert trio.lowlevel.current_statistics().tasks_living == tasks
        assert len(target.broker.connections()) == 2
        assert [close.initiator for close in target.closes] == [Initiator.NETWORK] * 5


@pytest.mark.parametrize("rule", ["close", "drop_oldest", "latest"])
async def test_s2_a_peer_that_never_reads(rule: SlowRule, autojump_clock: MockClock) -> None:
    async with open_target(Config(topics=TopicRules(slow_consumer=rule))) as target:
        peer = await target.open_client(lockstep_stream_pair)
        await peer.request(subscribe={"channel": "firehose"})
        start = trio.current_time()
        for number in range(3000):
            target.broker.publish_nowait("firehose", "x" * 1000)
            if number % 100 == 0:
                await wait_all_tasks_blocked()
        assert trio.current_time() == start  # nobody has waited
        await trio.sleep(11 if rule != "close" else 16)
        assert not target.broker.exists(peer.fd)
        (close,) = target.closes
        assert close.initiator is Initiator.SLOW
        assert close.code == (3008 if rule == "close" else 1006)
        await peer.aclose()


async def test_s2_a_write_that_is_cut_off_is_the_last(autojump_clock: MockClock) -> None:
    async with open_target() as target:
        peer = await target.open_plain(make_pair=lockstep_stream_pair)
        target.broker.push(peer.fd, b"x" * 100_000)
        await trio.sleep(9)
        taken = await peer.stream.receive_some(70_000)  # a chunk: part of the frame
        await trio.sleep(11)
        target.broker.push(peer.fd, b"y")
        target.broker.disconnect(peer.fd)
        rest = await peer.receive_eof()
        assert taken[:2] == b"\x82\x7f"
        assert set(taken[10:] + rest) == {ord("x")}
        assert len(taken + rest) <= 100_010
        assert [close.initiator for close in target.closes] == [Initiator.SLOW]


async def test_s2_nothing_follows_a_close_frame_though_the_session_is_busy(
    autojump_clock: MockClock,
) -> None:
    broker = Broker(Config(max_message_bytes=SMALL))

    @broker.on_rpc
    async def be_slow(connection: Connection, method: str, data: object) -> object:
        await trio.sleep(3)
        return None

    async with open_target(broker=broker) as target, await target.open_client() as peer:
        await peer.request(subscribe={"channel": "news"})
        await peer.send_json({"id": 5, "rpc": {"method": "x"}})
        await wait_all_tasks_blocked()
        await peer.send(long_header(SMALL + 1))
        await wait_all_tasks_blocked()
        target.broker.publish_nowait("news", 1)
        target.broker.publish_nowait(f"fd:{peer.fd}", 1)
        while (await peer.receive_frame())[0] != CLOSE:
            pass
        assert await peer.receive_eof() == b""


async def test_s2_control_frames_are_answered_while_the_session_is_slow(
    autojump_clock: MockClock,
) -> None:
    broker = Broker()

    @broker.on_message
    async def be_slow(connection: Connection, frame: Frame) -> None:
        await trio.sleep(0.2)

    async with open_target(broker=broker) as target, await target.open_plain() as peer:
        start = trio.current_time()
        for number in range(50):
            await peer.send_text(str(number))
        await peer.send(client_frame(PING, b"now"))
        assert await peer.receive_frame() == (PONG, b"now")
        await peer.send_close()
        assert (await peer.receive_frame())[0] == CLOSE
        assert trio.current_time() == start


async def test_s2_a_half_open_connection(autojump_clock: MockClock) -> None:
    async with open_target() as target:
        plain, client = await target.open_plain(), await target.open_client()
        await trio.sleep(37)
        assert len(target.broker.connections()) == 2
        assert [close.initiator for close in target.closes] == [Initiator.HEARTBEAT] * 2
        assert {close.code for close in target.closes} == {1011, 3012}
        await plain.aclose()
        await client.aclose()


async def test_s2_who_ignores_our_close_is_cut(autojump_clock: MockClock) -> None:
    async with open_target(Config(max_message_bytes=SMALL)) as target:
        silent, talker, too_big = [await target.open_plain() for _ in range(3)]
        start = trio.current_time()
        target.broker.disconnect(silent.fd)
        target.broker.disconnect(talker.fd)
        await too_big.send(long_header(SMALL + 1))

        async def talk_on() -> None:
            with suppress(trio.BrokenResourceError):
                while True:
                    await talker.send_text("and another thing")
                    await trio.sleep(0.1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(talk_on)
            with trio.fail_after(10):
                for peer in (silent, talker, too_big):
                    await peer.receive_eof()
                    assert trio.current_time() - start == pytest.approx(5, abs=0.1)


async def test_s2_a_header_that_promises_1_gib(autojump_clock: MockClock) -> None:
    async with open_target() as target:
        start = trio.current_time()
        assert await target.close_after(long_header(2**30)) == 1009
        assert trio.current_time() == start
        # A permitted message is awaited, for as long as a message may take.
        async with await target.open_plain() as peer:
            await peer.send(long_header(2**20) + b"x")
            for _ in range(6):
                await trio.sleep(5)
                await peer.send(b"x")
            assert (await peer.receive_close())[0] == 1008
            assert trio.current_time() - start == pytest.approx(30, abs=0.1)


async def test_s2_a_fragmented_message_has_a_time_to_be_whole(autojump_clock: MockClock) -> None:
    async with open_target() as target, await target.open_plain() as peer:
        start = trio.current_time()
        await peer.send(client_frame(TEXT, b"x", fin=False))
        for _ in range(5):
            await trio.sleep(5)
            await peer.send(client_frame(CONTINUATION, b"x", fin=False) + client_frame(PING))
        assert (await peer.receive_close())[0] == 1008
        assert trio.current_time() - start == pytest.approx(30, abs=0.1)


async def test_s2_empty_fragments_without_end(autojump_clock: MockClock) -> None:
    async with open_target() as target, await target.open_plain() as peer:
        await peer.send(client_frame(TEXT, fin=False))
        fragments = client_frame(CONTINUATION, fin=False) * 1000
        start = trio.current_time()
        with suppress(trio.BrokenResourceError):
            for _ in range(1000):
                await peer.send(fragments)
                await trio.sleep(0.01)
        assert trio.current_time() - start < 6
        assert (await peer.receive_close())[0] == 1009


async def test_s2_as_many_fragments_as_are_allowed_pass(autojump_clock: MockClock) -> None:
    async with open_target(broker=echo(Broker())) as target, await target.open_plain() as peer:
        middle = client_frame(CONTINUATION, b"b", fin=False) * 1022
        whole = client_frame(TEXT, b"a", fin=False) + middle + client_frame(CONTINUATION, b"c")
        for _ in range(2):
            await peer.send(whole)
            assert await peer.receive_text() == "a" + "b" * 1022 + "c"
        extra = client_frame(CONTINUATION, b"b", fin=False)
        await peer.send(client_frame(TEXT, b"a", fin=False) + middle + extra)
        await peer.send(client_frame(CONTINUATION, b"c"))
        assert (await peer.receive_close())[0] == 1009


@pytest.mark.parametrize("opcode", [PING, PONG])
async def test_s2_a_flood_of_control_frames(opcode: int, autojump_clock: MockClock) -> None:
    async with open_target() as target, await target.open_plain() as peer:
        await peer.send(client_frame(opcode, b"x") * 100)  # a burst may be
        await trio.sleep(1)
        await peer.send(client_frame(opcode, b"x") * 20)  # and so may the rate
        await wait_all_tasks_blocked()
        assert target.broker.is_established(peer.fd)
        await peer.send(client_frame(opcode, b"x") * 2)
        assert (await peer.receive_close())[0] == 1008


async def test_s2_a_flood_of_pings_whose_pongs_are_not_read(autojump_clock: MockClock) -> None:
    async with open_target() as target:
        peer = await target.open_plain(make_pair=lockstep_stream_pair)
        with suppress(trio.BrokenResourceError), trio.move_on_after(20):
            for _ in range(1000):
                await peer.send(client_frame(PING, bytes(125)))
        await trio.sleep(20)
        assert not target.broker.exists(peer.fd)
        await peer.aclose()


async def test_s2_a_stop_tells_200_clients(autojump_clock: MockClock) -> None:
    broker = Broker()
    memory = MemoryListener()
    with structlog.testing.capture_logs() as logs:
        async with trio.open_nursery() as nursery:
            await nursery.start(lambda **start: broker.serve(listeners=[memory], **start))
            net = Network(broker, memory)
            plain = [await net.open_plain() for _ in range(100)]
            clients = [await net.open_client() for _ in range(100)]
            for client in clients:
                await client.request(subscribe={"channel": "news"})
            for number in range(5):
                broker.publish_nowait("news", number)
                for peer in plain:
                    broker.push(peer.fd, str(number))
            start = trio.current_time()
            broker.stop()
            for peer in plain:
                assert [await peer.receive_text() for _ in range(5)] == list("01234")
                assert (await peer.receive_close())[0] == 1001
            for peer in clients:
                lines: list[str] = []
                code = None
                while code is None:
                    try:
                        lines += (await peer.receive_text()).split("\n")
                    except Closed as closed:
                        code = closed.code
                pushes = [msgspec.json.decode(line)["push"] for line in lines]
                assert [push["pub"]["data"] for push in pushes[:-1]] == [0, 1, 2, 3, 4]
                assert pushes[-1]["disconnect"]["code"] == 3001
                assert code == 3001
        # Nobody answered: that holds up the stop for no longer than the drain.
        assert trio.current_time() - start <= 5
    assert not [entry for entry in logs if entry["log_level"] == "error"]


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "https://testserver.evil.example", "null.example", "file:"]
)
async def test_s2_a_page_of_somebody_else(origin: str, autojump_clock: MockClock) -> None:
    async with open_target() as target:
        assert await target.status(handshake(headers={"Origin": origin})) == 403


# S3


async def test_s3_plain_http_on_a_websocket_path(autojump_clock: MockClock) -> None:
    async with open_target() as target:
        get = b" HTTP/1.1\r\nHost: testserver\r\n\r\n"
        # Untimed: a thread reads the file, and virtual time does not wait for threads.
        assert await target.status(b"GET /" + get) == 200
        start = trio.current_time()
        assert await target.status(b"GET /connection/websocket" + get) == 426
        post = b" HTTP/1.1\r\nHost: testserver\r\nContent-Length: 2\r\n\r\nhi"
        assert await target.status(b"POST /connection/websocket" + post) == 426
        assert await target.status(b"POST /" + post) in (404, 405)
        assert trio.current_time() - start < 5


async def test_s3_slowloris_silence_and_garbage(autojump_clock: MockClock) -> None:
    async with open_target() as target:
        for garbage in (b"\x16\x03\x01\x00\xa5", b"hello?\n", bytes(100)):
            async with await target.connect() as peer:
                start = trio.current_time()
                await peer.send(garbage)
                assert (await peer.receive_head()).startswith("HTTP/1.1 400 ")
                assert trio.current_time() == start
        async with await target.connect() as peer:  # silence
            assert (await peer.receive_head()).startswith("HTTP/1.1 408 ")
            assert trio.current_time() - start == pytest.approx(5, abs=0.1)
        async with await target.connect() as peer, trio.open_nursery() as nursery:

            async def drip() -> None:
                for byte in handshake():
                    await peer.send(bytes((byte,)))
                    await trio.sleep(0.5)

            nursery.start_soon(drip)
            start = trio.current_time()
            assert (await peer.receive_head()).startswith("HTTP/1.1 408 ")
            assert trio.current_time() - start == pytest.approx(5, abs=0.1)
            nursery.cancel_scope.cancel()


async def test_s3_a_megabyte_of_headers(autojump_clock: MockClock) -> None:
    async with open_target() as target:
        lines = b"".join(b"X-%d: %b\r\n" % (n, b"y" * 100) for n in range(10_000))
        assert await target.status(b"GET / HTTP/1.1\r\n" + lines) == 431
        assert await target.status(b"GET /" + b"x" * 2**20) == 431


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (handshake().replace(b"HTTP/1.1", b"HTTP/1.0"), 505),
        (handshake().replace(b"HTTP/1.1", b"HTTP/2.0"), 505),
        (handshake(headers={"Sec-WebSocket-Key": "junk"}), 400),
        (handshake(headers={"Sec-WebSocket-Key": ""}), 400),
        (handshake(headers={"Content-Length": "5"}) + b"hello", 400),
        (handshake(headers={"Transfer-Encoding": "chunked"}) + b"0\r\n\r\n", 400),
        (handshake(headers={"Sec-WebSocket-Version": "8"}), 426),
        (handshake().replace(b"GET", b"POST"), 400),
    ],
    ids=["1.0", "2.0", "junk key", "no key", "body", "chunked body", "version 8", "post"],
)
async def test_s3_a_handshake_that_is_none(
    request_bytes: bytes, status: int, autojump_clock: MockClock
) -> None:
    async with open_target() as target:
        assert await target.status(request_bytes) == status


async def test_s3_frames_in_the_segment_of_the_upgrade(autojump_clock: MockClock) -> None:
    async with open_target(broker=echo(Broker())) as target, await target.connect() as peer:
        early = client_frame(TEXT, b"early", fin=False) + client_frame(CONTINUATION, b" bird")
        await peer.send(handshake() + client_frame(TEXT, b"first") + early)
        assert (await peer.receive_head()).startswith("HTTP/1.1 101 ")
        assert [await peer.receive_text() for _ in range(2)] == ["first", "early bird"]


async def test_s3_the_limit_on_text_counts_bytes(autojump_clock: MockClock) -> None:
    async with open_target(Config(max_message_bytes=SMALL)) as target:
        fits, too_long = "😀".encode() * (SMALL // 4), "😀".encode() * (SMALL // 4 + 1)
        assert await target.close_after(client_frame(TEXT, too_long)) == 1009
        fragments = client_frame(TEXT, too_long[:500], fin=False)
        fragments += client_frame(CONTINUATION, too_long[500:])
        assert await target.close_after(fragments) == 1009
        assert await target.close_after(client_frame(TEXT, fits), close_with(1000)) == 1000


BAD_FRAMES = {
    "RSV1": raw_header(0xC1),
    "RSV2": raw_header(0xA1),
    "RSV3": raw_header(0x91),
    "opcode 3": raw_header(0x83),
    "opcode 7": raw_header(0x87),
    "opcode 11": raw_header(0x8B),
    "opcode 15": raw_header(0x8F),
    "unmasked": raw_header(0x81, masked=False),
    "unmasked with payload": raw_header(0x81, 5, masked=False) + b"hello",
    "fragmented ping": raw_header(0x09),
    "fragmented close": raw_header(0x08),
    "ping of 126 bytes": b"\x89\xfe\x00\x7e" + bytes(4 + 126),
    "stray continuation": client_frame(CONTINUATION, b"x"),
    "stray continuation after a message": client_frame(TEXT, b"a", fin=False)
    + client_frame(CONTINUATION, b"b")
    + client_frame(CONTINUATION, b"c"),
    "message within a message": client_frame(TEXT, b"a", fin=False) + client_frame(TEXT, b"b"),
    "length that is not minimal": b"\x81\xfe\x00\x05" + bytes(4) + b"fives",
    "close with one byte": client_frame(CLOSE, b"\x03"),
}


@pytest.mark.parametrize("wire", BAD_FRAMES.values(), ids=BAD_FRAMES.keys())
async def test_s3_bad_frames_get_close_1002(wire: bytes, autojump_clock: MockClock) -> None:
    async with open_target() as target:
        assert await target.close_after(wire) == 1002
        assert await target.close_after(client_frame(TEXT, b"before") + wire) == 1002
        behind = client_frame(TEXT, b"behind")
        one_by_one = [bytes((byte,)) for byte in wire + behind]
        assert await target.close_after(*one_by_one) == 1002


async def test_s3_a_stray_fragment_is_an_error_however_large_the_message_before(
    autojump_clock: MockClock,
) -> None:
    async with open_target(Config(max_message_bytes=SMALL)) as target:
        wire = client_frame(TEXT, b"a", fin=False) + client_frame(CONTINUATION, b"b" * (SMALL - 1))
        assert await target.close_after(wire + client_frame(CONTINUATION, b"c")) == 1002


@pytest.mark.parametrize(
    "code", [0, 1, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535]
)
async def test_s3_bad_close_codes_get_close_1002(code: int, autojump_clock: MockClock) -> None:
    async with open_target() as target:
        assert await target.close_after(close_with(code)) == 1002


GOOD_CODES = (*range(1000, 1004), *range(1007, 1015), 3000, 3999, 4000, 4999)


@pytest.mark.parametrize("code", GOOD_CODES)
async def test_s3_good_close_codes_are_answered_alike(code: int, autojump_clock: MockClock) -> None:
    async with open_target() as target:
        assert await target.close_after(close_with(code, b"why")) == code
        await wait_all_tasks_blocked()
        assert target.closes == [Close(code, "why", Initiator.CLIENT)]


@pytest.mark.parametrize(
    "wire",
    [
        client_frame(TEXT, b"\xff"),
        client_frame(TEXT, b"\xed\xa0\x80"),
        client_frame(TEXT, b"\xf4\x90\x80\x80"),
        client_frame(TEXT, "é".encode()[:1]),
        client_frame(TEXT, b"ok", fin=False) + client_frame(CONTINUATION, b"\xc0\xaf"),
        close_with(1000, b"\xff\xfe"),
    ],
    ids=["ff", "surrogate", "beyond", "cut", "in a fragment", "in a reason"],
)
async def test_s3_bad_utf_8_gets_close_1007(wire: bytes, autojump_clock: MockClock) -> None:
    async with open_target() as target:
        assert await target.close_after(wire) == 1007


# the application level


async def outcome(peer: Peer, command: str | bytes) -> tuple[str, int]:
    """The outcome of a client's message: ("error", code), ("close", code) or ("reply", 0)."""
    await peer.send(client_frame(TEXT, command.encode() if isinstance(command, str) else command))
    try:
        while True:
            for line in (await peer.receive_text()).split("\n"):
                message = msgspec.json.decode(line)
                if "error" in message:
                    return "error", message["error"]["code"]
                if "id" in message:
                    return "reply", 0
    except Closed as closed:
        assert closed.code is not None
        return "close", closed.code


APPLICATION: dict[str, tuple[str | bytes, tuple[str, int]]] = {
    "not JSON": ("hello", ("close", 3501)),
    "empty": ("", ("close", 3501)),
    "half an object": ('{"id":1,"publish":', ("close", 3501)),
    "JSON nested 10,000 deep": ("[" * 10_000 + "]" * 10_000, ("close", 3501)),
    "unknown fields nested 100,000 deep": (
        '{"id":1,"x":' + '{"a":' * 100_000 + "1" + "}" * 100_000 + "}",
        ("close", 3501),
    ),
    "data nested 10,000 deep": (
        '{"id":1,"publish":{"channel":"a","data":' + "[" * 10_000 + "]" * 10_000 + "}}",
        ("close", 3501),
    ),
    "unknown command": ('{"id":1,"frobnicate":{}}', ("error", 104)),
    "two commands in one object": (
        '{"id":1,"publish":{"channel":"a","data":1},"rpc":{"method":"b"}}',
        ("error", 107),
    ),
    "id 0": ('{"id":0,"subscribe":{"channel":"a"}}', ("close", 3501)),
    "id negative": ('{"id":-1,"subscribe":{"channel":"a"}}', ("close", 3501)),
    "id 2^64": ('{"id":18446744073709551616,"subscribe":{"channel":"a"}}', ("close", 3501)),
    "id a string": ('{"id":"1","subscribe":{"channel":"a"}}', ("close", 3501)),
    "a second connect": ('{"id":1,"connect":{}}', ("close", 3501)),
    "topic empty": ('{"id":1,"subscribe":{"channel":""}}', ("error", 107)),
    "topic of 1 MB": ('{"id":1,"subscribe":{"channel":"' + "x" * 10**6 + '"}}', ("error", 107)),
    "topic with NUL": ('{"id":1,"subscribe":{"channel":"a\\u0000b"}}', ("error", 107)),
    "topic with a lone surrogate": ('{"id":1,"subscribe":{"channel":"\\ud800"}}', ("error", 107)),
    "topic that is not UTF-8": (b'{"id":1,"subscribe":{"channel":"\xff"}}', ("close", 1007)),
    "publish to an empty topic": ('{"id":1,"publish":{"channel":"","data":1}}', ("error", 107)),
    "publish to NUL": ('{"id":1,"publish":{"channel":"\\u0000","data":1}}', ("error", 107)),
    "publish to a pattern": ('{"id":1,"publish":{"channel":"a.*","data":1}}', ("error", 107)),
    "publish without data": ('{"id":1,"publish":{"channel":"a"}}', ("error", 107)),
    "to an fd that never was": ('{"id":1,"publish":{"channel":"fd:999","data":1}}', ("error", 102)),
    "to fd 0": ('{"id":1,"publish":{"channel":"fd:0","data":1}}', ("error", 102)),
    "to fd -1": ('{"id":1,"publish":{"channel":"fd:-1","data":1}}', ("error", 102)),
    "to fd 001": ('{"id":1,"publish":{"channel":"fd:001","data":1}}', ("error", 102)),
    "to fd 10^30": (
        '{"id":1,"publish":{"channel":"fd:1' + "0" * 30 + '","data":1}}',
        ("error", 102),
    ),
    "to an Arabic fd": ('{"id":1,"publish":{"channel":"fd:١","data":1}}', ("error", 102)),
    "subscribe to another fd": ('{"id":1,"subscribe":{"channel":"fd:1"}}', ("error", 103)),
    "subscribe to all fds": ('{"id":1,"subscribe":{"channel":"fd:*"}}', ("error", 103)),
    "history of a pattern": ('{"id":1,"history":{"channel":"a.*"}}', ("error", 108)),
    "history limit -2^63": (
        '{"id":1,"history":{"channel":"a","limit":-9223372036854775808}}',
        ("reply", 0),
    ),
    "history limit 2^64": (
        '{"id":1,"history":{"channel":"a","limit":18446744073709551616}}',
        ("reply", 0),
    ),
    "presence of an fd": ('{"id":1,"presence":{"channel":"fd:1"}}', ("error", 108)),
    "unsubscribe from nothing": ('{"id":1,"unsubscribe":{"channel":"nothing"}}', ("reply", 0)),
    "rpc that nobody serves": ('{"id":1,"rpc":{"method":"x"}}', ("error", 104)),
    "send that nobody takes": ('{"send":{"data":1}}', ("close", 3508)),
    "recovery from a future offset": (
        '{"id":1,"subscribe":{"channel":"a","recover":true,"offset":4000000000,"epoch":""}}',
        ("reply", 0),
    ),
    "recovery from an unknown epoch, all or nothing": (
        '{"id":1,"subscribe":{"channel":"a","recover":true,"offset":1,"epoch":"zz","flag":2}}',
        ("error", 112),
    ),
    "recovery from offset 2^64": (
        '{"id":1,"subscribe":{"channel":"a","recover":true,"offset":18446744073709551616}}',
        ("reply", 0),
    ),
    "recovery from a negative offset": (
        '{"id":1,"subscribe":{"channel":"a","recover":true,"offset":-1}}',
        ("error", 107),
    ),
}


@pytest.mark.parametrize(("command", "expected"), APPLICATION.values(), ids=APPLICATION.keys())
async def test_application_bad_commands_get_an_error_or_a_close_code(
    command: str | bytes, expected: tuple[str, int], autojump_clock: MockClock
) -> None:
    async with open_target() as target, await target.open_client() as peer:
        assert await outcome(peer, command) == expected
        if expected[0] != "close":  # it is still a client
            assert await outcome(peer, '{"id":2,"subscribe":{"channel":"next"}}') == ("reply", 0)


@pytest.mark.parametrize(
    ("offset", "epoch"), [(4_000_000_000, ""), (2**64 - 1, ""), (2**64, ""), (1, "unknown")]
)
async def test_application_a_recovery_that_cannot_be_is_said_to_have_failed(
    offset: int, epoch: str, autojump_clock: MockClock
) -> None:
    async with open_target() as target, await target.open_client() as peer:
        for number in range(3):
            target.broker.publish_nowait("a", number)
        request = {"channel": "a", "recover": True, "offset": offset, "epoch": epoch}
        result = (await peer.request(subscribe=request))["subscribe"]
        assert not result["recovered"]
        assert result["publications"] == []
        assert result["offset"] == 3


def forged(header: object, claims: object, secret: bytes = b"") -> str:
    """A token put together by hand, as an attacker does; unsigned without a secret."""
    parts = [msgspec.json.encode(part) for part in (header, claims)]
    head = b".".join(base64.urlsafe_b64encode(part).rstrip(b"=") for part in parts)
    signature = hmac.digest(secret, head, "sha256") if secret else b""
    return (head + b"." + base64.urlsafe_b64encode(signature).rstrip(b"=")).decode()


HS256 = {"alg": "HS256"}
ADMIN = {"sub": "admin"}

# Answers to a token by connect, which knows codes to stay away and to come back with.
TOKENS: dict[str, tuple[str, tuple[str, int]]] = {
    "unsigned": (forged({"alg": "none"}, ADMIN), ("close", 3500)),
    "unsigned by another spelling": (forged({"alg": "nOnE"}, ADMIN), ("close", 3500)),
    "signature left out": (forged(HS256, ADMIN), ("close", 3500)),
    "wrong key": (forged(HS256, ADMIN, b"another secret"), ("close", 3500)),
    "wrong algorithm": (forged({"alg": "RS256"}, ADMIN, HMAC_SECRET.encode()), ("close", 3500)),
    "an empty secret": (forged(HS256, ADMIN, b"\0"), ("close", 3500)),
    "kid as a path": (forged({**HS256, "kid": "../../dev/null"}, ADMIN), ("close", 3500)),
    "a key of its own": (
        forged({**HS256, "jwk": {"kty": "oct", "k": "AAAA"}}, ADMIN, b"\0\0\0"),
        ("close", 3500),
    ),
    "a key at a URL of its own": (
        forged({**HS256, "jku": "http://127.0.0.1:1/"}, ADMIN, b"x"),
        ("close", 3500),
    ),
    "wrong audience": (
        forged(HS256, {**ADMIN, "aud": "them"}, HMAC_SECRET.encode()),
        ("close", 3500),
    ),
    "wrong issuer": (
        forged(HS256, {**ADMIN, "aud": "us", "iss": "them"}, HMAC_SECRET.encode()),
        ("close", 3500),
    ),
    "for a topic": (
        forged(HS256, {**ADMIN, "aud": "us", "iss": "us", "channel": "a"}, HMAC_SECRET.encode()),
        ("close", 3500),
    ),
    "expired in 1970": (
        forged(HS256, {**ADMIN, "aud": "us", "iss": "us", "exp": 1}, HMAC_SECRET.encode()),
        ("error", 109),
    ),
    "from the future": (
        forged(HS256, {**ADMIN, "aud": "us", "iss": "us", "nbf": 9e9}, HMAC_SECRET.encode()),
        ("error", 109),
    ),
    "expired, wrong key": (forged(HS256, {**ADMIN, "exp": 1}, b"another"), ("close", 3500)),
    "oversized": ("x" * 900_000, ("close", 3500)),
    "oversized and well signed": (
        forged(
            HS256, {**ADMIN, "aud": "us", "iss": "us", "info": "x" * 9000}, HMAC_SECRET.encode()
        ),
        ("close", 3500),
    ),
    "a million dots": ("." * 900_000, ("close", 3500)),
    "nested deeply": (
        base64.urlsafe_b64encode(b"[" * 5000).decode() + ".e30.AAAA",
        ("close", 3500),
    ),
    "not ASCII": ("令牌.é.\0", ("close", 3500)),
}


@pytest.mark.parametrize(("token", "expected"), TOKENS.values(), ids=TOKENS.keys())
async def test_application_a_bad_token_lets_nobody_in(
    token: str, expected: tuple[str, int], autojump_clock: MockClock
) -> None:
    rules = TokenRules(hmac_secret=HMAC_SECRET, audience="us", issuer="us", allow_anonymous=True)
    async with open_target(Config(tokens=rules)) as target:
        async with await target.open_websocket() as peer:
            assert await outcome(peer, asking(connect={"token": token})) == expected
            assert target.broker.fds_of("admin") == []
        # nor does it open a topic or extend a stay
        good = forged(HS256, {"sub": "alice", "aud": "us", "iss": "us"}, HMAC_SECRET.encode())
        async with await target.open_client(token=good) as peer:
            wanted = {"channel": "$a", "token": token}
            assert await outcome(peer, asking(subscribe=wanted)) == ("error", 103)
            assert await outcome(peer, asking(sub_refresh=wanted)) == ("error", 103)
            assert await outcome(peer, asking(refresh={"token": token})) == expected


async def test_application_without_a_key_no_token_makes_a_user(autojump_clock: MockClock) -> None:
    async with open_target() as target:
        for token, _ in TOKENS.values():
            async with await target.open_client(token=token) as peer:
                info = target.broker.connection_info(peer.fd)
                assert info is not None
                assert info.user == ""
                assert await outcome(peer, asking(refresh={"token": token})) == ("error", 108)


def asking(**fields: object) -> bytes:
    return msgspec.json.encode({"id": 7, **fields})


async def test_application_100_000_subscriptions(autojump_clock: MockClock) -> None:
    async with open_target() as target, await target.open_client() as peer:
        codes: list[int] = []
        for start in range(0, 100_000, 5000):
            numbers = range(start, start + 5000)
            await peer.send_json(
                *({"id": 1 + n, "subscribe": {"channel": f"t{n}"}} for n in numbers)
            )
            while len(codes) < start + 5000:
                lines = (await peer.receive_text()).split("\n")
                replies = [msgspec.json.decode(line) for line in lines]
                codes += [reply.get("error", {}).get("code", 0) for reply in replies]
        assert codes == [0] * 1000 + [106] * 99_000


async def test_application_10_000_patterns(autojump_clock: MockClock) -> None:
    async with open_target(Config(max_topics=20_000, max_subscription_bytes=2**30)) as target:
        async with await target.open_client() as peer:
            for number in range(10_000):
                pattern = "*.*.*.*.>" if number == 0 else f"*.*.*.*.{number}.>"
                command = {"id": 1 + number, "subscribe": {"channel": pattern}}
                assert await outcome(peer, msgspec.json.encode(command)) == ("reply", 0)
            target.broker.publish_nowait("a.b.c.d.e", 1)
            push = (await peer.receive_json())["push"]
            assert push["channel"] == "*.*.*.*.>"
            assert push["pub"]["channel"] == "a.b.c.d.e"


async def test_application_a_message_to_oneself_or_to_one_who_has_gone(
    autojump_clock: MockClock,
) -> None:
    async with open_target() as target, await target.open_client() as peer:
        to_self = {"id": 1, "publish": {"channel": f"fd:{peer.fd}", "data": 1}}
        assert await outcome(peer, msgspec.json.encode(to_self)) == ("error", 107)
        other = await target.open_client()
        await other.aclose()
        await wait_all_tasks_blocked()
        to_gone = {"id": 1, "publish": {"channel": f"fd:{other.fd}", "data": 1}}
        assert await outcome(peer, msgspec.json.encode(to_gone)) == ("error", 102)


# whatever else may come


def mutated(chance: random.Random, wire: bytes) -> bytes:
    """`wire` with some bytes changed, left out, doubled or put in."""
    mutant = bytearray(wire)
    for _ in range(chance.randint(1, 4)):
        where = chance.randrange(len(mutant) + 1)
        match chance.randrange(4):
            case 0:
                mutant[where : where + 1] = chance.randbytes(1)
            case 1:
                del mutant[where : where + chance.randint(1, 9)]
            case 2:
                mutant[where:where] = mutant[where : where + chance.randint(1, 20)]
            case 3:
                mutant[where:where] = chance.randbytes(chance.randint(1, 9))
    return bytes(mutant)


def random_heads(chance: random.Random, count: int) -> Iterable[bytes]:
    for number in range(count):
        if number % 4 == 0:
            yield chance.randbytes(chance.randint(1, 200))
        else:
            yield mutated(chance, handshake(headers={"Origin": "null", "Cookie": "a=b"}))


COMMANDS = (
    b'{"id":1,"connect":{}}',
    b'{"id":2,"subscribe":{"channel":"a.*"}}\n{"publish":{"channel":"a.b","data":{"a":[1]}}}',
    b'{"id":3,"history":{"channel":"a.b","limit":-1,"since":{"offset":0,"epoch":""}}}',
    b"{}",
)


def random_streams(chance: random.Random, count: int) -> Iterable[bytes]:
    for number in range(count):
        legal = b"".join(
            client_frame(
                chance.choice((TEXT, TEXT, BINARY, PING, CONTINUATION)),
                chance.choice(COMMANDS) if chance.random() < 0.7 else chance.randbytes(20),
                fin=chance.random() < 0.8,
            )
            for _ in range(chance.randint(1, 6))
        )
        match number % 4:
            case 0:
                yield chance.randbytes(chance.randint(2, 200))
            case 1:
                yield legal
            case 2:
                yield mutated(chance, legal) + b"\x81"
            case 3:  # sound frames around unsound commands
                command = mutated(chance, chance.choice(COMMANDS))
                yield client_frame(TEXT, COMMANDS[0]) + client_frame(TEXT, command)


@pytest.mark.parametrize("seed", range(2))
async def test_fuzz_before_the_handshake(seed: int, autojump_clock: MockClock) -> None:
    async with open_target() as target:
        for wire in random_heads(random.Random(seed), 500):
            peer = await target.connect()
            await peer.send(wire)
            await wait_all_tasks_blocked()
            await peer.aclose()
        await trio.sleep(20)
        assert len(target.broker.connections()) == 2


@pytest.mark.parametrize("seed", range(2))
async def test_fuzz_after_the_handshake(seed: int, autojump_clock: MockClock) -> None:
    async with open_target() as target, AsyncExitStack() as silent:
        for number, wire in enumerate(random_streams(random.Random(seed), 500)):
            peer = await target.open_plain()
            cut = number % len(wire)
            with suppress(trio.BrokenResourceError):
                for piece in (wire[:cut], wire[cut:]):
                    await peer.send(piece)
                    await wait_all_tasks_blocked()
            if number % 10:
                await peer.aclose()
            else:
                silent.push_async_callback(peer.aclose)
        await trio.sleep(60)
        assert len(target.broker.connections()) == 2
