"""From an accepted stream to a connection: each request of it, first or later, by the same way."""

import json
import ssl
from collections.abc import AsyncIterator
from functools import partial

import attrs
import pytest
import structlog
import trio
import trustme
from trio.testing import MockClock, wait_all_tasks_blocked

from broker import (
    Broker,
    Config,
    Connection,
)
from broker.core.work import ROUND, TLS_HANDSHAKE
from broker.testing import Network, Peer, client_frame, handshake, open_test_broker
from broker.transport import frames
from broker.transport.listeners import open_sockets, secure
from tests.session.conftest import CONFIG, LoopLoad

KEY = "s3cret"
CONNECT = json.dumps({"id": 1, "connect": {}}).encode()


@pytest.fixture
async def net() -> AsyncIterator[Network]:
    async with open_test_broker(Broker(Config(api_key=KEY))) as network:
        yield network


def request(line: str, *fields: str, body: bytes = b"") -> bytes:
    length = [f"Content-Length: {len(body)}"] if body else []
    lines = [f"{line} HTTP/1.1", "Host: localhost", *fields, *length, "", ""]
    return "\r\n".join(lines).encode() + body


API = request("POST /api/info", f"X-API-Key: {KEY}", body=b"{}")
EMULATION = request("POST /emulation", body=b'{"session":"1.x","data":"{}"}')


class Proxy(Peer):
    """A peer that keeps its connection: it reads an answer of the API to its end."""

    async def receive_api_answer(self) -> None:
        head = (await self.receive_head()).lower()
        assert head.startswith("http/1.1 200 ")
        assert "connection: close" not in head
        length = int(head.partition("content-length: ")[2].split("\r\n")[0])
        while len(self._buffer) < length:
            await self._read()
        self._take(length)


async def connect(net: Network) -> Proxy:
    return Proxy((await net.connect()).stream)


DOORS = {
    "websocket": (handshake(), "101 "),
    "websocket of an sdk": (handshake("/connection/websocket"), "101 "),
    "http_stream": (request("POST /connection/http_stream", body=CONNECT), "200 "),
    "sse": (request("POST /connection/sse", body=CONNECT), "200 "),
    "uni_sse": (request("GET /connection/uni_sse"), "200 "),
    "emulation": (EMULATION, "404 "),
    "preflight": (request("OPTIONS /emulation", "Origin: http://localhost:1"), "204 "),
    "health": (request("GET /healthz"), "200 "),
    "nothing": (request("GET /nothing"), "404 "),
    "426": (request("GET /connection/websocket"), "426 "),
    "api, wrong key": (request("POST /api/info", "X-API-Key: no", body=b"{}"), "401 "),
    "other page": (handshake(headers={"Origin": "http://evil.example"}), "403 "),
    "rebound page": (
        handshake(headers={"Origin": "http://evil.example"}, host="evil.example"),
        "403 ",
    ),
    "half a handshake": (handshake(headers={"Sec-WebSocket-Key": "short"}), "400 "),
    "old handshake": (handshake(headers={"Sec-WebSocket-Version": "8"}), "426 "),
    "no http": (b"\x16\x03\x01\x00", "400 "),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("before", [0, 1, 3])
@pytest.mark.parametrize("at_once", [True, False])
async def test_a_kept_connection_is_served_as_a_fresh_one(
    autojump_clock: MockClock, net: Network, door: str, before: int, at_once: bool
) -> None:
    sent, status = DOORS[door]
    async with await connect(net) as peer:
        if at_once:
            await peer.send(API * before + sent)
        for _ in range(before):
            if not at_once:
                await peer.send(API)
            await peer.receive_api_answer()
        if not at_once:
            await peer.send(sent)
        assert (await peer.receive_head()).startswith(f"HTTP/1.1 {status}")


async def test_a_websocket_that_comes_second_is_a_connection_like_any_other(
    autojump_clock: MockClock, net: Network
) -> None:
    async with await connect(net) as peer:
        await peer.send(API)
        await peer.receive_api_answer()
        # A frame in the segment of the handshake is its first.
        await peer.send(handshake() + client_frame(frames.TEXT, CONNECT))
        assert (await peer.receive_head()).startswith("HTTP/1.1 101 ")
        assert (await peer.receive_json())["connect"]["client"] == "1"
        [info] = net.broker.connections()
        assert (info.transport, info.path) == ("websocket", "/")
    await trio.sleep(1)
    assert net.broker.connections() == []


@pytest.mark.parametrize("first", [b"\r\n", b"\r\n\r\n", b"\r\n" * 20])
@pytest.mark.parametrize("door", ["websocket", "uni_sse", "health", "emulation"])
async def test_empty_lines_before_a_request_are_passed_over(
    autojump_clock: MockClock, net: Network, door: str, first: bytes
) -> None:
    sent, status = DOORS[door]
    async with await connect(net) as peer:
        await peer.send(first + sent)
        assert (await peer.receive_head()).startswith(f"HTTP/1.1 {status}")


@pytest.mark.parametrize(
    "configured, path, status",
    [
        ("/connection/websocket", "/connection/websocket/", 101),
        ("/connection/websocket", "/connection/websocket/?a=b", 101),
        ("/ws/", "/ws", 101),
        ("/ws/", "/ws/", 101),
        ("/", "/", 101),
        ("/", "/?a", 101),
        ("/ws", "/ws//", 404),
        ("/ws", "/ws/a", 404),
        ("/ws", "/w", 404),
    ],
)
async def test_a_slash_at_the_end_of_the_path_makes_no_difference(
    autojump_clock: MockClock, configured: str, path: str, status: int
) -> None:
    async with open_test_broker(Broker(Config(websocket_paths=(configured,)))) as net:
        async with await connect(net) as peer:
            await peer.send(handshake(path))
            assert (await peer.receive_head()).startswith(f"HTTP/1.1 {status} ")


@pytest.mark.parametrize(
    "lines",
    [
        "Cookie: nick=张三".encode(),
        b"Cookie: nick=caf\xe9",
        b"User-Agent: \xff\xfe",
        b"X-Real-Name: \x80",
        b"Connection: keep-alive",
        b"Connection: keep-alive\r\nConnection: TE",
        b"Upgrade: h2c",
    ],
)
async def test_a_browser_s_own_headers_keep_nobody_out(
    autojump_clock: MockClock, net: Network, lines: bytes
) -> None:
    async with await connect(net) as peer:
        await peer.send(handshake().removesuffix(b"\r\n") + lines + b"\r\n\r\n")
        assert (await peer.receive_head()).startswith("HTTP/1.1 101 ")
        # Fragments go by trio-websocket, which has a handshake of its own.
        await peer.send(client_frame(frames.TEXT, CONNECT[:5], fin=False))
        await peer.send(client_frame(frames.CONTINUATION, CONNECT[5:]))
        assert "connect" in await peer.receive_json()


@pytest.mark.parametrize("begun", [b"", handshake()[:-1]], ids=["silence", "half a request"])
async def test_a_request_that_does_not_come_in_open_seconds_is_answered_408(
    autojump_clock: MockClock, net: Network, begun: bytes
) -> None:
    async with await connect(net) as peer:
        began = trio.current_time()
        for at in range(len(begun)):  # what trickles in buys no time
            await peer.send(begun[at : at + 1])
            await trio.sleep(0.01)
        await trio.sleep_until(began + net.broker.config.open_seconds - 0.1)
        assert net.broker.stats().refused == 0
        await trio.sleep(0.2)
        assert net.broker.stats().refused == 1
        assert (await peer.receive_head()).startswith("HTTP/1.1 408 ")


@pytest.mark.parametrize("host", ["xn--strae-oqa.de", "xn--ls8h.la:9501", "xn--a", "a.xn--fiqs8s"])
async def test_any_a_label_is_served(autojump_clock: MockClock, net: Network, host: str) -> None:
    for sent in (handshake(host=host), f"GET /healthz HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()):
        async with await connect(net) as peer:
            await peer.send(sent)
            assert (await peer.receive_head())[:13] in ("HTTP/1.1 101 ", "HTTP/1.1 200 ")


async def test_hooks_see_one_value_of_each_header(autojump_clock: MockClock) -> None:
    broker = Broker()
    seen: list[Connection] = []

    @broker.on_open
    async def keep(connection: Connection) -> None:
        seen.append(connection)

    async with open_test_broker(broker) as net, await connect(net) as peer:
        more = b"Cookie: a=1\r\nX-Forwarded-For: 1.1.1.1\r\nCookie: b=\xe5\xbc\xa0\r\nX-Forwarded-For: 2.2.2.2\r\n\r\n"
        await peer.send(handshake().removesuffix(b"\r\n") + more)
        await peer.receive_head()
        assert seen[0].headers["cookie"] == "a=1; b=张"
        assert seen[0].headers["x-forwarded-for"] == "1.1.1.1, 2.2.2.2"


@pytest.mark.parametrize(
    "sent, reason",
    [
        (DOORS["rebound page"][0], "host not ours: evil.example, "),
        (DOORS["other page"][0], "origin not allowed: http://evil.example is neither "),
        (DOORS["half a handshake"][0], "Sec-WebSocket-Key is 16 bytes in base64"),
        (
            request("GET /connection/uni_sse").replace(b"localhost", b"evil.example"),
            "host not ours",
        ),
        (DOORS["no http"][0], "this port speaks plain HTTP"),
    ],
)
@pytest.mark.parametrize("first", [b"", API])
async def test_a_refusal_leaves_one_line_with_address_and_reason(
    autojump_clock: MockClock, net: Network, sent: bytes, reason: str, first: bytes
) -> None:
    with structlog.testing.capture_logs() as logs:
        async with await connect(net) as peer:
            await peer.send(first + sent)
            if first:
                await peer.receive_api_answer()
            await peer.receive_eof()
    [line] = [entry for entry in logs if entry["event"] == "refused"]
    assert line["peer"] == "memory"
    assert line["reason"].startswith(reason)
    assert net.broker.stats().refused == 1


async def test_a_second_request_while_the_broker_stops_is_told_so(
    autojump_clock: MockClock, net: Network
) -> None:
    async with await connect(net) as peer:
        await peer.send(API[:-1])
        await wait_all_tasks_blocked()
        net.broker.stop()
        await peer.send(API[-1:] + handshake())
        head = await peer.receive_head()
        assert head.startswith("HTTP/1.1 200 ")
        assert "Connection: close" in head


@pytest.mark.parametrize(
    "origin, status",
    [
        ("null", 403),
        ("http://localhost:3000", 403),
        ("http://127.0.0.1", 403),
        ("http://localhost:9501", 101),
        ("https://listed.example", 101),
        (None, 101),
    ],
)
async def test_with_tokens_only_the_page_of_our_own_and_listed_ones_may_connect(
    autojump_clock: MockClock, origin: str | None, status: int
) -> None:
    config = attrs.evolve(CONFIG, allowed_origins=("https://listed.example",))
    async with open_test_broker(Broker(config)) as net:
        peer = await net.connect()
        headers = {} if origin is None else {"Origin": origin}
        await peer.send(handshake(headers=headers, host="localhost:9501"))
        assert (await peer.receive_head()).startswith(f"HTTP/1.1 {status} ")
        await peer.aclose()


class Faulty(trio.abc.Stream):
    """A stream that brings some bytes, and then an exception which no stream should raise."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.is_closed = False

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        data, self._data = self._data, b""
        if not data:
            raise ZeroDivisionError("a mistake of ours")
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        self.is_closed = True
        await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("data", [b"", handshake()], ids=["before", "behind the handshake"])
async def test_a_mistake_of_ours_ends_one_connection_and_is_logged(
    net: Network, data: bytes
) -> None:
    """An exception by itself, and one in the group of a connection's tasks."""
    stream = Faulty(data)
    with structlog.testing.capture_logs() as lines:
        await net.listener.connect(lambda: (stream, stream))
        await wait_all_tasks_blocked()
    assert [line["event"] for line in lines if line["log_level"] == "error"] == [
        "connection_failed"
    ]
    assert stream.is_closed
    assert net.streams == 0
    await net.open_plain()  # everybody else is served


LONG = "GET / HTTP/1.1\r\nHost: localhost\r\n" + "a:\r\n" * 1900


@pytest.mark.parametrize(
    "head",
    [
        LONG.replace("GET / ", "GET /connection/uni_sse ") + "\r\n",
        LONG + handshake(host="localhost").decode().partition("Host: localhost\r\n")[2],
    ],
    ids=["uni_sse", "websocket"],
)
async def test_of_many_long_heads_none_keeps_others_waiting_for_the_rest(
    net: Network, head: str, autojump_clock: MockClock
) -> None:
    peers = [await connect(net) for _ in range(50)]
    other = await net.open_client()
    answered = 0

    async def ask(peer: Proxy) -> None:
        nonlocal answered
        await peer.receive_head()
        answered += 1

    async with trio.open_nursery() as nursery:
        for peer in peers:
            nursery.start_soon(ask, peer)
        await wait_all_tasks_blocked()
        for peer in peers:
            nursery.start_soon(peer.stream.send_all, head.encode())
        await other.request(rpc={"method": "fds"})
        assert answered < 25
    assert answered == 50


async def test_a_page_is_asked_for_with_1500_fields_and_no_more(net: Network) -> None:
    for fields, status in ((1499, "404 "), (1500, "431 ")):
        peer = await connect(net)
        await peer.send(request("GET /nothing", *["a:"] * fields))
        assert (await peer.receive_head()).startswith(f"HTTP/1.1 {status}")


def first_hello(context: ssl.SSLContext) -> bytes:
    """What a client of TLS says first."""
    coming, going = ssl.MemoryBIO(), ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(coming, going, server_hostname="localhost").do_handshake()
    return going.read()


@pytest.mark.parametrize("said", [0, 1, 100])
async def test_handshakes_of_tls_that_begin_at_once_are_answered_a_few_at_a_time(
    said: int,
) -> None:
    """Also where all have said a part of their hello before."""
    authority = trustme.CA()
    context, trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert("localhost").configure_cert(context)
    authority.configure_trust(trusting)
    (listener,) = await open_sockets(Config(port=0))
    broker = Broker()
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(broker.serve, listeners=secure([listener], context)))
        hello, peers = first_hello(trusting), []
        for _ in range(20):
            plain = await trio.open_tcp_stream(*listener.socket.getsockname())
            peers.append(plain)
            await plain.send_all(hello[:said])
        await wait_all_tasks_blocked(0.01)
        load = LoopLoad(broker.node.router.meter)
        trio.lowlevel.add_instrument(load)
        for peer in peers:
            await peer.send_all(hello[said:])
        for peer in peers:
            assert await peer.receive_some()
        trio.lowlevel.remove_instrument(load)
        assert sum(load.rounds) >= 20 * TLS_HANDSHAKE
        assert max(load.rounds) <= 2 * ROUND
        for peer in peers:
            await trio.aclose_forcefully(peer)
        nursery.cancel_scope.cancel()
