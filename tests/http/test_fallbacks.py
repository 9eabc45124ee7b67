"""Clients without WebSocket, in memory: what streams say, what requests do, who ends when."""

import json
import re
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any
from urllib.parse import quote, urlencode

import centrifuge.protocol.client_pb2 as schema
import pytest
import trio
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from trio.testing import MockClock, lockstep_stream_pair, memory_stream_pair, wait_all_tasks_blocked

from broker import (
    Broker,
    Close,
    Config,
    ConnectEvent,
    Connection,
    Initiator,
    Refused,
    SubscribeEvent,
    TokenRules,
    TopicRules,
)
from broker.access.minting import mint
from broker.http.event_ids import MAX_ID
from broker.http.fallbacks import STREAMS
from broker.http.streams import HttpStream, ProtobufStream, SseStream, UniSseStream
from broker.protocols.centrifuge_protobuf import CENTRIFUGE_PROTOBUF
from broker.testing import Closed, MakePair, Network, Peer, handshake, open_test_broker
from broker.transport import frames
from broker.transport.pieces import PIECE
from tests.conftest import HMAC_SECRET, delimited

CONNECT: dict[str, object] = {"id": 1, "connect": {}}
EMULATED = ["http_stream", "sse", "sse-get"]
"""The transports whose clients can speak, and how their streams are asked for."""


@pytest.fixture(autouse=True)
async def nothing_is_left(nursery: trio.Nursery) -> AsyncIterator[None]:
    """No task more than there was."""
    before = trio.lowlevel.current_statistics().tasks_living
    yield
    assert trio.lowlevel.current_statistics().tasks_living == before


class Stream(Peer):
    """One HTTP request, and the answer as it comes in."""

    status = 0
    head = ""
    session = ""
    last_id = ""
    """What a browser would send as `Last-Event-ID` if it came back now."""

    async def ask(
        self, method: str, target: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> None:
        """Send a request and read the head of its answer."""
        fields = {"Host": "localhost:9501", **(headers or {})}
        if body or method == "POST":
            fields.setdefault("Content-Length", str(len(body)))
        lines = [f"{method} {target} HTTP/1.1", *(f"{k}: {v}" for k, v in fields.items())]
        await self.send("\r\n".join([*lines, "", ""]).encode() + body)
        await self.read_answer()

    async def read_answer(self) -> None:
        self.head = await self.receive_head()
        self.status = int(self.head.split()[1])

    def header(self, name: str) -> str | None:
        for line in self.head.split("\r\n")[1:]:
            key, _, value = line.partition(": ")
            if key.lower() == name:
                return value
        return None

    async def until(self, mark: bytes) -> str:
        while (end := self._buffer.find(mark)) < 0:
            await self._read()
        return self._take(end + len(mark)).decode()

    async def event(self) -> str:
        """The next thing on the stream: a line, or an event, which is one `data` line or a comment."""
        if self.header("content-type") == "application/x-ndjson":
            return (await self.until(b"\n"))[:-1]
        event = (await self.until(b"\n\n"))[:-2]
        data, _, rest = event.partition("\n")
        if rest or data.startswith("id: "):
            self.last_id = (rest or data).removeprefix("id: ")
            assert "id: " not in self.last_id
        assert "\n" not in rest
        assert "\r" not in event
        return ":" if data.startswith("id: ") else data.removeprefix("data: ")

    async def object(self) -> Any:
        """The next event that is one; pings are passed over."""
        while (said := await self.event()) in ("{}", ":"):
            pass
        return json.loads(said)

    async def rest(self) -> list[Any]:
        """All that still comes, to the end."""
        said = []
        try:
            while True:
                said.append(await self.object())
        except Closed:
            assert self._buffer == b""
            return said


async def ask(
    net: Network,
    method: str,
    target: str,
    body: bytes = b"",
    headers: Mapping[str, str] | None = None,
) -> tuple[int, str]:
    """Status and body of one answer that ends."""
    peer = Stream((await net.connect()).stream)
    await peer.ask(method, target, body, headers)
    text = (await peer.receive_eof()).decode()
    await peer.aclose()
    return peer.status, text


async def open_stream(
    net: Network,
    how: str = "http_stream",
    make_pair: MakePair = memory_stream_pair,
    **connect: object,
) -> Stream:
    """A client after its `connect`."""
    peer = Stream((await net.connect(make_pair)).stream)
    command = json.dumps({"id": 1, "connect": connect})
    if how == "sse-get":
        await peer.ask("GET", f"/connection/sse?cf_connect={quote(command)}")
    else:
        await peer.ask("POST", f"/connection/{how}", command.encode())
    assert peer.status == 200, await peer.receive_eof()
    reply = (await peer.object())["connect"]
    peer.fd, peer.session = int(reply["client"]), reply["session"]
    return peer


async def open_one_way(net: Network, make_pair: MakePair = memory_stream_pair, **q: Any) -> Stream:
    """A one-way client, whatever it will be told."""
    peer = Stream((await net.connect(make_pair)).stream)
    await peer.ask("GET", f"/connection/uni_sse?{urlencode(q, doseq=True)}")
    assert peer.status == 200, await peer.receive_eof()
    return peer


async def open_reader(net: Network, how: str) -> Stream:
    """A client of any kind that is subscribed to `a`, and was told so."""
    if how == "uni_sse":
        client = await open_one_way(net, topic="a")
        await client.object()
    else:
        client = await open_stream(net, how)
        await emulate(net, client.session, {"id": 2, "subscribe": {"channel": "a"}})
    await client.object()
    return client


async def emulate(net: Network, session: str, *commands: object) -> int:
    """Send commands as their client does; the status of the answer."""
    data = "\n".join(map(json.dumps, commands))
    body = json.dumps({"session": session, "node": "1", "data": data})
    status, _ = await ask(net, "POST", "/emulation", body.encode())
    return status


@pytest.mark.parametrize("how", ["http_stream", "sse"])
@pytest.mark.parametrize("body", [b"\n", b"\n\n\n", b"\r\n", b" ", b"\t\n ", b"\r"])
async def test_a_body_without_a_command_is_refused(
    autojump_clock: MockClock, net: Network, how: str, body: bytes
) -> None:
    targets = [("POST", f"/connection/{how}", body)]
    if how == "sse":
        targets.append(("GET", f"/connection/sse?cf_connect={quote(body)}", b""))
    for method, target, sent in targets:
        status, text = await ask(net, method, target, sent)
        assert status == 400, (method, text)
        assert text.startswith("not a connect command: ")


@pytest.mark.parametrize("body", [b"\x00", b"\x00\x00", b"\n", b"\r\n"])
async def test_so_is_one_in_protobuf(autojump_clock: MockClock, net: Network, body: bytes) -> None:
    fields = {"Content-Type": "application/octet-stream"}
    status, _ = await ask(net, "POST", "/connection/http_stream", body, fields)
    assert status == 400


@pytest.mark.parametrize("how", [*STREAMS, "/emulation"])
async def test_a_slash_at_the_end_of_a_path_makes_no_difference(
    autojump_clock: MockClock, net: Network, how: str
) -> None:
    async with Stream((await net.connect()).stream) as peer:
        body = json.dumps(CONNECT) if how in STREAMS else '{"session":"1.x","data":""}'
        if how.endswith("uni_sse"):
            body = "{}"
        await peer.ask("POST", f"{how}/", body.encode())
        assert peer.status == (200 if how in STREAMS else 404)


async def test_several_lines_of_a_header_are_joined_for_hooks(
    autojump_clock: MockClock,
) -> None:
    broker = Broker()
    seen: list[Connection] = []

    @broker.on_open
    async def keep(connection: Connection) -> None:
        seen.append(connection)

    async with open_test_broker(broker) as net, await net.connect() as peer:
        await peer.send(
            b"GET /connection/uni_sse HTTP/1.1\r\nHost: localhost\r\nCookie: a=1\r\n"
            b"X-Forwarded-For: 1.1.1.1\r\nCookie: b=\xe5\xbc\xa0\r\nX-Forwarded-For: 2.2.2.2\r\n\r\n"
        )
        assert (await peer.receive_head()).startswith("HTTP/1.1 200 ")
        assert seen[0].headers["cookie"] == "a=1; b=张"
        assert seen[0].headers["x-forwarded-for"] == "1.1.1.1, 2.2.2.2"


# what streams say


@pytest.mark.parametrize("how", EMULATED)
async def test_a_client_over_http_does_what_one_over_websocket_does(
    autojump_clock: MockClock, net: Network, how: str
) -> None:
    async with await open_stream(net, how) as client, await net.open_client() as other:
        assert await emulate(net, client.session, {"id": 2, "subscribe": {"channel": "a"}}) == 204
        assert await client.object() == {"id": 2, "subscribe": {}}
        await other.request(publish={"channel": "a", "data": {"text": "你好\n"}})
        push = (await client.object())["push"]
        assert (push["channel"], push["pub"]["data"]) == ("a", {"text": "你好\n"})
        publish = {"id": 3, "publish": {"channel": "a", "data": 1}}
        presence = {"id": 4, "presence_stats": {"channel": "a"}}
        assert await emulate(net, client.session, publish, presence) == 204
        assert (await client.object())["push"]["pub"]["info"]["client"] == str(client.fd)
        assert await client.object() == {"id": 3, "publish": {}}
        assert (await client.object())["presence_stats"]["num_clients"] == 1
        net.broker.push(client.fd, "hello")
        assert await client.object() == {"push": {"message": {"data": "hello"}}}


@pytest.mark.parametrize("how", [*EMULATED, "uni_sse"])
async def test_it_is_a_connection_with_the_name_of_its_transport(
    autojump_clock: MockClock, net: Network, how: str
) -> None:
    opened: list[Connection] = []

    @net.broker.on_open
    async def on_open(connection: Connection) -> None:
        opened.append(connection)

    peer = await (open_one_way(net) if how == "uni_sse" else open_stream(net, how))
    await wait_all_tasks_blocked()
    [info] = net.broker.connections()
    assert info.transport == how.removesuffix("-get") == opened[0].transport
    assert (info.path, info.protocol) == (f"/connection/{info.transport}", "centrifuge-json")
    assert opened[0].headers["host"] == "localhost:9501"
    await peer.aclose()
    async with await net.open_client():
        assert [i.transport for i in net.broker.connections()] == ["websocket"]


@pytest.mark.parametrize("how", EMULATED)
async def test_nobody_keeps_changes_or_holds_back_a_stream(
    autojump_clock: MockClock, net: Network, how: str
) -> None:
    async with await open_stream(net, how) as client:
        assert client.header("cache-control") == "no-store, no-transform"
        assert client.header("x-accel-buffering") == "no"
        assert client.header("connection") == "close"
        assert client.header("x-content-type-options") == "nosniff"
        expected = "application/x-ndjson" if how == "http_stream" else "text/event-stream"
        assert client.header("content-type") == expected


async def test_a_websocket_client_is_told_of_no_session(
    autojump_clock: MockClock, net: Network
) -> None:
    async with await net.open_websocket() as peer:
        reply = await peer.request(connect={})
        assert not {"session", "node"} & set(reply["connect"])
        assert reply["connect"]["pong"] is True


@pytest.mark.parametrize("how", [*EMULATED, "uni_sse"])
@pytest.mark.parametrize("space", ["\r", "\r\n", "\n", "\n\ndata: 1"])
async def test_line_ends_inside_a_payload_end_nothing(
    autojump_clock: MockClock, net: Network, how: str, space: str
) -> None:
    """In JSON they are white space, which reaches subscribers as it was published."""
    client = await open_reader(net, how)
    async with client, await net.open_client() as other:
        if "data" in space:  # inside a string, as the escapes that they have to be there
            payload = json.dumps({"a": space})
        else:
            payload = f'{{"a":{space}[1,{space}2]{space}}}'
        await other.send_text(f'{{"id":2,"publish":{{"channel":"a","data":{payload}}}}}')
        said = await client.object()
        pub = said["pub"] if how == "uni_sse" else said["push"]["pub"]
        assert pub["data"] == json.loads(payload)
        await other.send_text('{"publish":{"channel":"a","data":"next"}}')
        assert "next" in await client.event()


@pytest.mark.parametrize("how", [*EMULATED, "uni_sse"])
@pytest.mark.parametrize("size", [1, 125, 126, 70_000, 900_000])
async def test_a_payload_of_any_size_comes_whole(
    autojump_clock: MockClock, net: Network, how: str, size: int
) -> None:
    client = await open_reader(net, how)
    async with client:
        for n in range(3):
            net.broker.publish_nowait("a", str(n) * size)
            said = await client.object()
            assert (said.get("push") or said)["pub"]["data"] == str(n) * size


async def test_a_frame_may_end_anywhere_in_what_is_written(
    autojump_clock: MockClock, net: Network
) -> None:
    """The outbox cuts at 64 KiB, wherever that is: many sizes, so that it is everywhere."""
    one_way, other = await open_one_way(net, topic="a"), await open_stream(net, "sse")
    await emulate(net, other.session, {"id": 2, "subscribe": {"channel": "a"}})
    for client in (one_way, other):
        await client.object()
    await one_way.object()
    for size in range(65_536 - 120, 65_536 + 20, 3):
        net.broker.publish_nowait("a", "x" * size)
        net.broker.publish_nowait("a", size)
        for client in (one_way, other):
            said = [await client.object() for _ in range(2)]
            data = [(each.get("push") or each)["pub"]["data"] for each in said]
            assert data == ["x" * size, size]
    await one_way.aclose()
    await other.aclose()


@pytest.mark.parametrize("kind", [HttpStream, SseStream, partial(UniSseStream, subs={})])
async def test_however_frames_are_cut_the_same_is_said(kind: Callable[..., HttpStream]) -> None:
    payloads = [
        *(b"{}", b'{"push":{"channel":"a","pub":{"data":1}}}', b'{"push":{"message":{"data":""}}}'),
        b'{}\n{"push":{"channel":"a","leave":{}}}\n{"push":{"channel":"b","join":{}}}',
        b'{"push":{"disconnect":{"code":3001,"reason":"shutdown"}}}',
    ]
    written = b"HTTP/1.1 200 OK\r\n\r\n"
    frames_of = [*map(frames.text_frame, payloads), frames.close_frame(3001, "shutdown")]
    said = []
    for cuts in (1, 2, 3, 7, 64, 1000):
        ours, theirs = memory_stream_pair()
        line = kind(theirs)
        await line.send_all(written)
        stream = b"".join(frames_of)
        for start in range(0, len(stream), cuts):
            await line.send_all(stream[start : start + cuts])
        said.append(b"".join([bytes(data) async for data in ours]))
        await ours.aclose()
    assert said == said[:1] * 6
    assert said[0].count(b"disconnect") == 1


async def test_a_request_that_comes_byte_by_byte_is_the_same(
    autojump_clock: MockClock, net: Network
) -> None:
    body = json.dumps(CONNECT).encode()
    head = f"POST /connection/sse HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n"
    async with Stream((await net.connect()).stream) as peer:
        for byte in head.encode() + body:
            await peer.send(bytes([byte]))
        await peer.read_answer()
        assert (await peer.object())["connect"]["session"]


async def test_an_http_1_0_peer_is_served(autojump_clock: MockClock, net: Network) -> None:
    target = f"/connection/sse?cf_connect={quote(json.dumps(CONNECT))}"
    async with Stream((await net.connect()).stream) as peer:
        await peer.send(f"GET {target} HTTP/1.0\r\n\r\n".encode())
        await peer.read_answer()
        assert peer.status == 200
        assert "chunked" not in peer.head
        assert (await peer.object())["id"] == 1


async def test_a_body_is_asked_for_where_its_sender_waits_for_that(
    autojump_clock: MockClock, net: Network
) -> None:
    body = json.dumps(CONNECT).encode()
    head = f"POST /connection/sse HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n"
    async with Stream((await net.connect()).stream) as peer:
        await peer.send(f"{head}Expect: 100-continue\r\n\r\n".encode())
        await peer.read_answer()
        assert peer.status == 100
        await peer.send(body)
        await peer.read_answer()
        assert peer.status == 200


async def test_a_post_may_hold_more_than_connect(autojump_clock: MockClock, net: Network) -> None:
    async with Stream((await net.connect()).stream) as peer:
        commands = [CONNECT, {"id": 2, "subscribe": {"channel": "a"}}]
        await peer.ask(
            "POST", "/connection/http_stream", "\n".join(map(json.dumps, commands)).encode()
        )
        assert "connect" in await peer.object()
        assert (await peer.object())["subscribe"] == {}


# who is alive


@pytest.mark.parametrize("how", EMULATED)
async def test_a_client_that_does_not_answer_pings_gets_3012(
    autojump_clock: MockClock, net: Network, how: str
) -> None:
    async with await open_stream(net, how) as client:
        await client.event()  # a ping, after 20 s
        assert trio.current_time() < 25
        assert await client.rest() == [
            {"push": {"disconnect": {"code": 3012, "reason": "no pong"}}}
        ]
        assert trio.current_time() < 35


@pytest.mark.parametrize("how", EMULATED)
async def test_a_client_that_answers_pings_stays(
    autojump_clock: MockClock, net: Network, how: str
) -> None:
    async with await open_stream(net, how) as client:
        for _ in range(5):
            assert await client.event() == "{}"
            assert await emulate(net, client.session, {}) == 204
        assert trio.current_time() > 99
        assert net.broker.is_established(client.fd)


async def test_a_one_way_client_gets_comments_and_answers_nothing(
    autojump_clock: MockClock, net: Network
) -> None:
    async with await open_one_way(net) as client:
        assert (await client.object())["connect"]["pong"] is False
        for _ in range(5):
            assert await client.event() == ":"
        assert trio.current_time() > 99
        assert len(net.broker.connections()) == 1


@pytest.mark.parametrize("how", ["http_stream", "uni_sse"])
async def test_a_connect_that_takes_a_minute_is_waited_for(
    autojump_clock: MockClock, net: Network, how: str
) -> None:
    """Nobody answers the Ping frames that a WebSocket would get meanwhile."""

    @net.broker.on_connect
    async def on_connect(event: ConnectEvent) -> None:
        await trio.sleep(100)

    async with await (open_one_way(net) if how == "uni_sse" else open_stream(net, how)) as client:
        if how == "uni_sse":
            assert "connect" in await client.object()
        assert trio.current_time() >= 100


# the end


@pytest.mark.parametrize("how", [*EMULATED, "uni_sse"])
async def test_a_client_that_is_sent_away_gets_the_reason_once(
    autojump_clock: MockClock, net: Network, how: str
) -> None:
    client = await (open_one_way(net) if how == "uni_sse" else open_stream(net, how))
    if how == "uni_sse":
        await client.object()
    [info] = net.broker.connections()
    net.broker.push(info.fd, "before")
    net.broker.disconnect(info.fd, 3503, "off you go")
    told = {"disconnect": {"code": 3503, "reason": "off you go"}}
    said: list[object] = [{"message": {"data": "before"}}, told]
    if how != "uni_sse":
        said = [{"push": each} for each in said]
    assert await client.rest() == said
    await wait_all_tasks_blocked()
    assert net.broker.connections() == []
    assert trio.current_time() == 0  # nobody had to hang up first
    await client.aclose()


@pytest.mark.parametrize("how", [*EMULATED, "uni_sse"])
async def test_a_stop_is_told_and_nothing_new_begins(autojump_clock: MockClock, how: str) -> None:
    async with open_test_broker(Broker()) as net:
        client = await (open_one_way(net) if how == "uni_sse" else open_stream(net, how))
        late = Stream((await net.connect()).stream)
        await wait_all_tasks_blocked()
        net.broker.stop()
        await wait_all_tasks_blocked()
        told: object = {"disconnect": {"code": 3001, "reason": "shutdown"}}
        assert (await client.rest())[-1] == (told if how == "uni_sse" else {"push": told})
        await late.ask("POST", "/connection/http_stream", json.dumps(CONNECT).encode())
        assert late.status == 503
        await late.aclose()
        await client.aclose()
    assert trio.current_time() < 1


@pytest.mark.parametrize("how", [*EMULATED, "uni_sse"])
@pytest.mark.parametrize("half", [False, True])
async def test_a_client_that_goes_away_is_gone_at_once(
    autojump_clock: MockClock, net: Network, how: str, half: bool
) -> None:
    closes: list[Close] = []

    @net.broker.on_close
    async def on_close(connection: Connection, close: Close) -> None:
        closes.append(close)

    client = await (open_one_way(net) if how == "uni_sse" else open_stream(net, how))
    await wait_all_tasks_blocked()
    if half:
        assert isinstance(client.stream, trio.StapledStream)
        await client.stream.send_eof()
    else:
        await client.aclose()
    await wait_all_tasks_blocked()
    assert net.broker.connections() == []
    [close] = closes
    assert (close.code, close.initiator) == (1006, Initiator.NETWORK)
    assert trio.current_time() == 0
    await client.aclose()


async def test_bytes_behind_the_request_of_a_stream_are_ignored(
    autojump_clock: MockClock, net: Network
) -> None:
    async with await open_stream(net) as client:
        for _ in range(100):
            await client.send(b"POST /emulation HTTP/1.1\r\n\r\n" * 100)
        net.broker.push(client.fd, 1)
        assert await client.object() == {"push": {"message": {"data": 1}}}


@pytest.mark.parametrize("how", [*EMULATED, "uni_sse"])
async def test_a_client_that_reads_nothing_is_cut_after_ten_seconds(
    autojump_clock: MockClock, net: Network, how: str
) -> None:
    closes: list[Close] = []

    @net.broker.on_close
    async def on_close(connection: Connection, close: Close) -> None:
        closes.append(close)

    pair = lockstep_stream_pair
    client = await (open_one_way(net, pair) if how == "uni_sse" else open_stream(net, how, pair))
    if how == "uni_sse":
        await client.object()
    [info] = net.broker.connections()
    net.broker.push(info.fd, "nobody reads this")
    await trio.sleep(9)
    assert closes == []
    await trio.sleep(2)
    [close] = closes
    assert (close.initiator, close.undelivered) == (Initiator.SLOW, 1)
    await client.aclose()


async def test_a_client_that_reads_too_slowly_is_sent_away_by_the_rule_of_the_topic(
    autojump_clock: MockClock,
) -> None:
    closes: list[Close] = []
    broker = Broker(Config(outbox_bytes=10_000))

    @broker.on_close
    async def on_close(connection: Connection, close: Close) -> None:
        closes.append(close)

    async with open_test_broker(broker) as net:
        client = await open_one_way(net, lockstep_stream_pair, topic="a")
        await client.object()
        await client.object()
        for _ in range(20):
            broker.publish_nowait("a", "x" * 1000)
            await wait_all_tasks_blocked()
        said = await client.rest()
        assert said[-1] == {"disconnect": {"code": 3008, "reason": "slow"}}
        await wait_all_tasks_blocked()
        [close] = closes
        assert (close.code, close.initiator) == (3008, Initiator.SLOW)
        assert close.undelivered + len(said) - 1 <= 20
        await client.aclose()


# /emulation


async def test_a_session_is_reached_by_its_own_name_only(
    autojump_clock: MockClock, net: Network
) -> None:
    alice, bob = await open_stream(net), await open_stream(net, "sse")
    one_way = await open_one_way(net)
    web = await net.open_client()
    fd, secret = alice.session.split(".")
    assert len(secret) >= 22  # 128 bits
    assert bob.session.split(".")[1] != secret
    one_way_fd = (await one_way.object())["connect"]["client"]
    strangers = [
        *("", ".", "1", "x", secret, f".{secret}", f"{fd}.", f"{fd}.{secret[:-1]}"),
        *(f"{fd}.{secret}x", f"{fd}.{secret.lower()}", f"{bob.fd}.{secret}", f"+{fd}.{secret}"),
        *(f" {fd}.{secret}", f"{fd}.é", f"{'9' * 18}.{secret}", f"{'9' * 5000}.{secret}"),
        *(f"{web.fd}.", f"{web.fd}.x", f"{one_way_fd}.", f"{one_way_fd}.{secret}", "²." + secret),
    ]
    for session in strangers:
        publish = {"publish": {"channel": f"fd:{web.fd}", "data": session}}
        assert await emulate(net, session, publish) == 404, session
    assert (
        await emulate(net, alice.session, {"publish": {"channel": f"fd:{web.fd}", "data": "me"}})
        == 204
    )
    assert (await web.receive_json())["push"]["pub"]["data"] == "me"
    for peer in (alice, bob, one_way, web):
        await peer.aclose()
    await wait_all_tasks_blocked()
    assert await emulate(net, alice.session, {}) == 404


async def test_a_session_that_is_ending_is_no_more(autojump_clock: MockClock, net: Network) -> None:
    async with await open_stream(net, make_pair=lockstep_stream_pair) as client:
        net.broker.disconnect(client.fd, 3000, "come back")
        assert await emulate(net, client.session, {"id": 2, "rpc": {"method": "x"}}) == 404


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"[]", b"1", b"null", b'{"session":1,"data":"{}"}', b'{"data":"{}"}'),
        *(b'{"session":"1.x"}', b'{"session":"1.x","data":{}}', b'{"session":"1.x","data":null}'),
        *(b'{"session":"1.x","data":"\xff"}', b"[" * 100_000, b'{"session":"\\ud800","data":""}'),
    ],
)
async def test_a_body_that_is_no_emulation_request_gets_400(
    autojump_clock: MockClock, net: Network, body: bytes
) -> None:
    status, text = await ask(net, "POST", "/emulation", body)
    assert status == 400
    assert text.startswith("not an emulation request: ")
    assert "\n" not in text.strip()


@pytest.mark.parametrize("data", ["", "x", "[]", '{"id":1}', '{"id":-1,"rpc":{}}', "{}\n{"])
async def test_a_bad_command_ends_its_session_with_3501_or_an_error(
    autojump_clock: MockClock, net: Network, data: str
) -> None:
    async with await open_stream(net) as client:
        body = json.dumps({"session": client.session, "data": data}).encode()
        assert (await ask(net, "POST", "/emulation", body))[0] == 204
        said = await client.object()
        assert "error" in said or said["push"]["disconnect"]["code"] == 3501


async def test_a_thousand_posts_at_once_wait_and_harm_nobody(autojump_clock: MockClock) -> None:
    broker = Broker(Config(max_connections=2000))
    go_on = trio.Event()
    done: list[object] = []

    @broker.on_rpc
    async def on_rpc(connection: Connection, method: str, data: object) -> object:
        await go_on.wait()
        done.append(data)
        return None

    async with open_test_broker(broker) as net, await open_stream(net) as client:
        statuses: list[int] = []

        async def post(n: int) -> None:
            command = {"id": n + 2, "rpc": {"method": "wait", "data": n}}
            statuses.append(await emulate(net, client.session, command))

        async with trio.open_nursery() as nursery:
            for n in range(1000):
                nursery.start_soon(post, n)
            await wait_all_tasks_blocked()
            assert len(statuses) == 2 + broker.config.inbox_batches
            async with await net.open_client() as bystander:
                assert "publish" in await bystander.request(publish={"channel": "a", "data": 1})
            go_on.set()
        assert statuses == [204] * 1000
        await wait_all_tasks_blocked()
        assert sorted(done) == list(range(1000))  # type: ignore[type-var]


async def test_posts_wait_for_a_busy_session_and_end_with_it(autojump_clock: MockClock) -> None:
    broker = Broker(Config(inbox_batches=2))
    go_on = trio.Event()
    done = []

    @broker.on_rpc
    async def on_rpc(connection: Connection, method: str, data: object) -> object:
        if method == "wait":
            await go_on.wait()
        done.append(method)
        return None

    async with open_test_broker(broker) as net, await open_stream(net) as client:
        statuses: list[int] = []

        async def post(name: str) -> None:
            command = {"id": 9, "rpc": {"method": name}}
            statuses.append(await emulate(net, client.session, command))

        names = ("wait", "1", "2", "3", "4", "5")
        async with trio.open_nursery() as nursery:
            for name in names:
                nursery.start_soon(post, name)
                await wait_all_tasks_blocked()
            # One is under way, two have a place, one waits at the door.
            assert statuses == [204] * 4
            await trio.sleep(100)  # it is not called dead for that
            assert net.broker.is_established(client.fd)
            go_on.set()
        assert statuses == [204] * 6
        assert done == list(names)
        go_on = trio.Event()
        async with trio.open_nursery() as nursery:
            for name in names:
                nursery.start_soon(post, name)
                await wait_all_tasks_blocked()
            await client.aclose()
            net.broker.push(client.fd, "anybody there?")
        assert trio.current_time() < 120
        assert statuses[6:] == [204] * 4 + [404] * 2


# what is refused


def get(**query: str) -> str:
    return f"/connection/sse?{urlencode(query)}"


@pytest.mark.parametrize(
    ("method", "target", "body", "reason"),
    [
        ("GET", "/connection/sse", b"", "not a connect command: cf_connect is empty"),
        ("GET", get(cf_connect=""), b"", "not a connect command: cf_connect is empty"),
        ("POST", "/connection/sse", b"", "not a connect command: the body is empty"),
        ("GET", get(cf_connect="{"), b"", "not a connect command"),
        ("GET", get(cf_connect="[" * 2000), b"", "not a connect command"),
        ("GET", get(cf_connect='{"id":1}'), b"", "the first command is connect"),
        ("GET", get(cf_connect='{"connect":{}}'), b"", "the first command is connect"),
        ("GET", get(cf_connect='{"id":1,"connect":{"token":1}}'), b"", "not a connect command"),
        ("GET", get(cf_connect='{"id":1,"connect":{}}\n{}'), b"", "connect command alone"),
        ("GET", "/connection/sse?cf_connect=%FF", b"", "the query is not UTF-8"),
        ("GET", "/connection/uni_sse?cf_connect=%FF", b"", "the query is not UTF-8"),
        ("GET", "/connection/uni_sse?cf_connect={", b"", "not a connect request"),
        ("GET", "/connection/uni_sse?cf_connect=[]", b"", "not a connect request"),
        ("GET", '/connection/uni_sse?cf_connect={"subs":[]}', b"", "not a connect request"),
        ("GET", '/connection/uni_sse?cf_connect={"subs":{"a":1}}', b"", "not a connect request"),
        ("POST", "/connection/uni_sse", b"", "not a connect request"),
        ("POST", "/connection/sse", b"", "not a connect command"),
        ("POST", "/connection/http_stream", b"client: hello", "not a connect command"),
        ("POST", "/connection/http_stream", b"\xff", "not a connect command"),
        ("POST", "/connection/http_stream", b'{"id":1,"rpc":{}}', "the first command is connect"),
    ],
)
async def test_a_stream_begins_with_connect(
    autojump_clock: MockClock, net: Network, method: str, target: str, body: bytes, reason: str
) -> None:
    status, text = await ask(net, method, target, body)
    assert status == 400
    assert reason in text
    assert net.broker.connections() == []


@pytest.mark.parametrize("count", [3, 4, 70_000])
async def test_a_one_way_client_asks_for_so_many_topics(
    autojump_clock: MockClock, count: int
) -> None:
    async with open_test_broker(Broker(Config(max_topics=3, direct_topics=False))) as net:
        body = json.dumps({"subs": {f"t{number}": {} for number in range(count)}}).encode()
        if count > 3:
            answer = await ask(net, "POST", "/connection/uni_sse", body)
            assert answer == (400, "more than 3 topics\n")
            query = urlencode([("topic", f"t{number}") for number in range(min(count, 500))])
            assert (await ask(net, "GET", f"/connection/uni_sse?{query}"))[0] == 400
            return
        client = Stream((await net.connect()).stream)
        await client.ask("POST", "/connection/uni_sse", body)
        assert client.status == 200
        said = [await client.object() for _ in range(4)]
        assert sum("subscribe" in each for each in said) == 3
        await client.aclose()


async def test_a_topic_that_is_named_twice_is_one(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker(Config(max_topics=1))) as net:
        query = urlencode([("cf_connect", '{"subs":{"a":{}}}'), ("topic", "a"), ("topic", "a")])
        client = Stream((await net.connect()).stream)
        await client.ask("GET", f"/connection/uni_sse?{query}")
        assert client.status == 200
        await client.aclose()


async def test_a_one_way_client_asks_for_so_much_at_most(
    autojump_clock: MockClock, net: Network
) -> None:
    body = json.dumps({"subs": {"a": {"tf": {"op": "or", "nodes": [{}] * 17_000}}}}).encode()
    status, text = await ask(net, "POST", "/connection/uni_sse", body)
    assert (status, text) == (400, "not a connect request: more than 8192 members\n")


@pytest.mark.parametrize("method", ["HEAD", "PUT", "DELETE", "PATCH", "get"])
@pytest.mark.parametrize(
    "path", ["/emulation", *map("/connection/{}".format, ("http_stream", "sse", "uni_sse"))]
)
async def test_other_methods_are_not_allowed(
    autojump_clock: MockClock, net: Network, method: str, path: str
) -> None:
    peer = Stream((await net.connect()).stream)
    await peer.ask(method, path)
    assert peer.status == 405
    only_post = path in ("/emulation", "/connection/http_stream")
    assert peer.header("allow") == ("POST, OPTIONS" if only_post else "GET, POST, OPTIONS")
    await peer.aclose()


@pytest.mark.parametrize("path", ["/emulation", "/connection/http_stream"])
async def test_a_path_for_post_alone_refuses_get(
    autojump_clock: MockClock, net: Network, path: str
) -> None:
    assert (await ask(net, "GET", f"{path}?cf_connect={quote(json.dumps(CONNECT))}"))[0] == 405


@pytest.mark.parametrize("path", ["/emulation", "/connection/sse", "/connection/uni_sse"])
async def test_a_body_has_its_bounds(autojump_clock: MockClock, path: str) -> None:
    async with open_test_broker(Broker(Config(max_message_bytes=1000))) as net:
        limit = 3024 if path == "/emulation" else 1000
        status, text = await ask(net, "POST", path, b"x" * (limit + 1))
        assert (status, text) == (413, f"the body has at most {limit} bytes\n")
        assert (await ask(net, "POST", path, b"x" * limit))[0] == 400
        # Judged before any of it has come.
        huge = {"Content-Length": str(10**17)}
        assert (await ask(net, "POST", path, b"", huge))[0] == 413
        chunked = f"POST {path} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
        async with Stream((await net.connect()).stream) as peer:
            await peer.send(chunked.encode())
            await peer.read_answer()
            assert peer.status == 411
        assert trio.current_time() < 1
        async with Stream((await net.connect()).stream) as peer:
            await peer.send(
                f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n".encode()
            )
            await peer.read_answer()
            assert peer.status == 408
            assert trio.current_time() >= 30
        async with Stream((await net.connect()).stream) as peer:
            await peer.send(
                f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nx".encode()
            )
            assert isinstance(peer.stream, trio.StapledStream)
            await peer.stream.send_eof()
            await peer.read_answer()
            assert peer.status == 400


async def test_a_message_has_the_size_of_any_other(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker(Config(max_message_bytes=1000))) as net:
        async with await open_stream(net) as client:
            rpc: dict[str, Any] = {"id": 2, "rpc": {"method": "x", "data": ""}}
            room = 1000 - len(json.dumps(rpc))
            rpc["rpc"]["data"] = '"' * (room // 2)
            assert await emulate(net, client.session, rpc) == 204
            assert (await client.object())["id"] == 2
            rpc["rpc"]["data"] = "x" * (room + 1)
            assert await emulate(net, client.session, rpc) == 413
            assert net.broker.is_established(client.fd)


async def test_a_large_message_is_read_piece_by_piece(
    autojump_clock: MockClock, net: Network
) -> None:
    async with await open_stream(net) as client, net.broker.subscribe("a") as messages:
        for n in range(3):
            text = str(n) * 300_000
            publish = {"id": n + 2, "publish": {"channel": "a", "data": text}}
            assert await emulate(net, client.session, publish) == 204
            assert (await messages.receive()).data == json.dumps(text).encode()
            assert await client.object() == {"id": n + 2, "publish": {}}


async def test_so_has_the_first(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker(Config(max_message_bytes=100))) as net:
        command = {"id": 1, "connect": {"name": "x" * 100}}
        target = f"/connection/sse?cf_connect={quote(json.dumps(command))}"
        assert (await ask(net, "GET", target))[0] == 413


async def test_a_connection_too_many_gets_503(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker(Config(max_connections=2))) as net:
        async with await open_stream(net), await open_stream(net, "sse") as second:
            body = json.dumps(CONNECT).encode()
            assert (await ask(net, "POST", "/connection/http_stream", body))[0] == 503
            await second.aclose()
            await wait_all_tasks_blocked()
            await (await open_stream(net)).aclose()


async def test_without_fallbacks_the_paths_are_the_apps(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker(Config(fallbacks=False))) as net:
        for path in ("/emulation", "/connection/sse"):
            assert (await ask(net, "GET", path))[0] == 404


async def test_the_apps_own_hook_is_not_asked_for_connections(
    autojump_clock: MockClock, net: Network
) -> None:
    @net.broker.on_request
    async def on_request(request: Request) -> Response:
        return PlainTextResponse("mine", 418)

    await (await open_stream(net)).aclose()
    assert (await ask(net, "GET", "/other"))[0] == 418


# who may


@pytest.mark.parametrize(
    ("config", "origin", "host", "allowed"),
    [
        (Config(), "http://localhost:3000", "localhost:9501", True),
        (Config(), "null", "localhost:9501", True),
        (Config(), "null", "example.com", False),
        (Config(), "http://evil.example", "localhost:9501", False),
        (Config(), "https://example.com", "example.com", False),
        (Config(hosts=("example.com",)), "https://example.com", "example.com", True),
        (Config(allowed_origins=("https://app.example",)), "https://app.example", "a", True),
        (Config(allowed_origins=("https://app.example",)), "https://evil.example", "a", False),
        (Config(allowed_origins=("*",)), "https://any.example", "a", True),
        (Config(tokens=TokenRules(hmac_secret=HMAC_SECRET)), "null", "localhost", False),
    ],
)
async def test_pages_that_may_open_a_websocket_may_this(
    autojump_clock: MockClock, config: Config, origin: str, host: str, allowed: bool
) -> None:
    async with open_test_broker(Broker(config)) as net:
        fields = {"Origin": origin, "Host": host}
        asked = {**fields, "Access-Control-Request-Method": "POST"}
        connect = quote(json.dumps(CONNECT))
        for method, target, body, expected in (
            ("OPTIONS", "/connection/http_stream", b"", 204),
            ("OPTIONS", "/emulation", b"", 204),
            ("POST", "/connection/http_stream", json.dumps(CONNECT).encode(), 200),
            ("GET", f"/connection/sse?cf_connect={connect}", b"", 200),
            ("GET", "/connection/uni_sse", b"", 200),
            ("POST", "/emulation", b'{"session":"1.x","data":""}', 404),
            ("PUT", "/emulation", b"", 405),
            ("POST", "/emulation", b"", 400),
        ):
            async with Stream((await net.connect()).stream) as peer:
                await peer.ask(method, target, body, asked if method == "OPTIONS" else fields)
                assert peer.status == (expected if allowed else 403), (method, target)
                shown = peer.header("access-control-allow-origin")
                assert shown == (origin if allowed else None)
                assert peer.header("vary") == ("Origin" if allowed else None)
                assert peer.header("access-control-allow-credentials") is None
                if peer.status == 204:
                    assert peer.header("access-control-allow-methods") == "GET, POST"
                    assert peer.header("access-control-allow-headers") == (
                        "Content-Type, Last-Event-ID"
                    )
                    assert peer.header("access-control-max-age") == "7200"


async def test_a_program_has_no_origin_and_needs_no_cors(
    autojump_clock: MockClock, net: Network
) -> None:
    async with await open_stream(net) as client:
        assert "access-control" not in client.head.lower()


@pytest.mark.parametrize("path", ["sse", "uni_sse"])
@pytest.mark.parametrize(
    ("site", "status"),
    [("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200)],
)
async def test_an_image_of_another_page_opens_nothing(
    autojump_clock: MockClock, net: Network, path: str, site: str, status: int
) -> None:
    target = f"/connection/{path}"
    if path == "sse":
        target += f"?cf_connect={quote(json.dumps(CONNECT))}"
    async with Stream((await net.connect()).stream) as peer:
        await peer.ask("GET", target, headers={"Sec-Fetch-Site": site})
        assert peer.status == status


@pytest.mark.parametrize("path", ["sse", "uni_sse"])
@pytest.mark.parametrize("host, status", [("evil.example", 403), ("ours.example:9501", 200)])
async def test_a_page_that_had_its_name_lead_here_opens_nothing(
    autojump_clock: MockClock, path: str, host: str, status: int
) -> None:
    """A browser says no origin when it gets an `EventSource` from the page's own host."""
    async with open_test_broker(Broker(Config(hosts=("ours.example",)))) as net:
        async with Stream((await net.connect()).stream) as peer:
            target = f"/connection/{path}?cf_connect={quote(json.dumps(CONNECT))}"
            if path == "uni_sse":
                target = "/connection/uni_sse"
            await peer.ask("GET", target, headers={"Host": host})
            assert peer.status == status
            if status == 403:
                assert b'hosts = ["evil.example"]' in await peer.receive_eof()


async def test_a_page_of_another_site_that_is_listed_may(autojump_clock: MockClock) -> None:
    config = Config(allowed_origins=("https://app.example",))
    async with open_test_broker(Broker(config)) as net:
        async with Stream((await net.connect()).stream) as peer:
            fields = {"Origin": "https://app.example", "Sec-Fetch-Site": "cross-site"}
            await peer.ask("GET", "/connection/uni_sse", headers=fields)
            assert peer.status == 200


async def test_a_websocket_may_still_be_opened_where_a_path_is_both(
    autojump_clock: MockClock,
) -> None:
    async with open_test_broker(Broker(Config(websocket_paths=("/connection/sse",)))) as net:
        async with await net.connect() as peer:
            await peer.send(handshake("/connection/sse"))
            assert (await peer.receive_head()).startswith("HTTP/1.1 101 ")
        await (await open_stream(net, "sse")).aclose()


async def test_an_upgrade_on_such_a_path_is_not_one(
    autojump_clock: MockClock, net: Network
) -> None:
    async with Stream((await net.connect()).stream) as peer:
        await peer.send(
            handshake("/connection/uni_sse", {"Sec-WebSocket-Protocol": "centrifuge-json"})
        )
        await peer.read_answer()
        assert peer.status == 200
        assert "upgrade" not in peer.head.lower()


# tokens


def token(net: Network, seconds: float = 60, **claims: object) -> str:
    return mint({"exp": net.broker.wall_clock() + seconds, **claims}, HMAC_SECRET.encode(), "HS256")


@pytest.fixture
async def guarded() -> AsyncIterator[Network]:
    config = Config(tokens=TokenRules(hmac_secret=HMAC_SECRET), ping_seconds=1000)
    async with open_test_broker(Broker(config)) as network:
        yield network


@pytest.mark.parametrize("how", ["http_stream", "sse"])
async def test_a_bad_token_is_told_before_there_was_a_connection(
    autojump_clock: MockClock, guarded: Network, how: str
) -> None:
    async with Stream((await guarded.connect()).stream) as peer:
        command = {"id": 1, "connect": {"token": "x.y.z"}}
        await peer.ask("POST", f"/connection/{how}", json.dumps(command).encode())
        told = {"push": {"disconnect": {"code": 3500, "reason": "invalid token"}}}
        assert await peer.rest() == [told]
        assert trio.current_time() == 0


async def test_a_connection_lives_as_long_as_its_token_is_renewed(
    autojump_clock: MockClock, guarded: Network
) -> None:
    async with await open_stream(guarded, token=token(guarded, 15, sub="mei")) as client:
        await trio.sleep(10)
        refresh = {"id": 2, "refresh": {"token": token(guarded, 15, sub="mei")}}
        assert await emulate(guarded, client.session, refresh) == 204
        assert (await client.object())["refresh"]["ttl"] == 15
        said = await client.rest()
        assert said[-1]["push"]["disconnect"]["code"] == 3005
        assert trio.current_time() > 25


# one way


async def test_one_way_pushes_stand_alone(autojump_clock: MockClock, net: Network) -> None:
    async with await open_one_way(net, topic=["a", "b"]) as client:
        connect = (await client.object())["connect"]
        assert "session" not in connect
        for topic in ("a", "b"):
            subscribed = await client.object()
            assert (subscribed["channel"], subscribed["subscribe"]["recoverable"]) == (topic, True)
        net.broker.publish_nowait("a", {"n": [1, {}]})
        net.broker.publish_nowait("b", 2)
        net.broker.push(int(connect["client"]), 3)
        net.broker.end_subscription(int(connect["client"]), "b")
        pub = await client.object()
        assert (pub["channel"], pub["pub"]["data"]) == ("a", {"n": [1, {}]})
        assert (await client.object())["pub"]["data"] == 2
        assert await client.object() == {"message": {"data": 3}}
        assert (await client.object())["unsubscribe"]["code"] == 2000


async def test_one_way_topics_are_asked_for_like_any_others(
    autojump_clock: MockClock, net: Network
) -> None:
    @net.broker.on_subscribe
    async def on_subscribe(event: SubscribeEvent) -> None:
        if event.topic == "secret":
            raise Refused(103)

    async with await open_one_way(net, topic=["secret", "a b\n", "ok"]) as client:
        assert "connect" in await client.object()
        denied = {"code": 103, "reason": "permission denied"}
        assert await client.object() == {"channel": "secret", "unsubscribe": denied}
        assert (await client.object())["unsubscribe"]["code"] == 107
        assert (await client.object())["channel"] == "ok"


async def test_one_way_recovers_from_where_it_was(autojump_clock: MockClock, net: Network) -> None:
    for n in range(5):
        net.broker.publish_nowait("a", n)
    _, position = await net.broker.history("a")
    recover = {"recover": True, "offset": 3, "epoch": position.epoch}
    async with await open_one_way(net, cf_connect=json.dumps({"subs": {"a": recover}})) as client:
        await client.object()
        subscribe = (await client.object())["subscribe"]
        assert subscribe["recovered"] is True
        assert [each["data"] for each in subscribe["publications"]] == [3, 4]


async def come_back(net: Network, last_id: str, **query: Any) -> Stream:
    """As a browser does whose `EventSource` lost its connection."""
    peer = Stream((await net.connect()).stream)
    target = f"/connection/uni_sse?{urlencode(query, doseq=True)}"
    await peer.ask("GET", target, headers={"Last-Event-ID": last_id})
    assert peer.status == 200, await peer.receive_eof()
    return peer


def outcomes(said: list[Any]) -> dict[str, Any]:
    """What was told of each topic: whether it recovered, and what came with that."""
    return {
        each["channel"]: (
            each["subscribe"].get("recovered"),
            [pub["data"] for pub in each["subscribe"].get("publications", ())],
        )
        for each in said
    }


async def test_a_reader_that_comes_back_with_its_last_id_gets_what_it_missed(
    autojump_clock: MockClock, net: Network
) -> None:
    async with await open_one_way(net, topic=["a", "ü,:*"]) as client:
        for _ in range(3):
            await client.object()
        net.broker.publish_nowait("a", 1, tags={"k": "v"})
        net.broker.publish_nowait("ü,:*", {"x": 1, "offset": 9})
        net.broker.publish_nowait("a", "2")
        assert [(await client.object())["pub"]["data"] for _ in range(3)][2] == "2"
        last_id = client.last_id
    assert re.fullmatch(r"a:\w+:2,%C3%BC%2C%3A%2A:\w+:1", last_id)
    net.broker.publish_nowait("a", 3)
    net.broker.publish_nowait("ü,:*", {"y": 2})
    net.broker.publish_nowait("a", 4)
    async with await come_back(net, last_id, topic=["a", "ü,:*"]) as client:
        assert "connect" in await client.object()
        assert outcomes([await client.object() for _ in range(2)]) == {
            "a": (True, [3, 4]),
            "ü,:*": (True, [{"y": 2}]),
        }
        assert re.fullmatch(r"a:\w+:4,%C3%BC%2C%3A%2A:\w+:2", client.last_id)


async def test_an_id_is_kept_whole_while_its_topics_are_subscribed_to(
    autojump_clock: MockClock, net: Network
) -> None:
    last_id = "a:x:1,b:x:2,c:x:3"
    async with await come_back(net, last_id, topic=["a", "b"]) as client:
        seen = [client.last_id]
        for _ in range(3):
            await client.object()
            seen.append(client.last_id)
    # Lost in between, it would have begun anew in `b`.
    assert re.fullmatch(r"b:x:2,a:[0-9a-f]+:0", seen[2])
    assert re.fullmatch(r"a:[0-9a-f]+:0,b:[0-9a-f]+:0", seen[3])


async def test_a_position_moves_past_what_is_too_large_for_one_piece(
    autojump_clock: MockClock, net: Network
) -> None:
    async with await open_reader(net, "uni_sse") as client:
        for size in range(65_000, 65_600, 7):
            net.broker.publish_nowait("a", ["x" * size, {"offset": 3}])
            pub = (await client.object())["pub"]
            assert client.last_id.endswith(f":{pub['offset']}")


@pytest.mark.parametrize(
    "last_id",
    [
        *(
            "",
            "*",
            "17",
            "a",
            "a:b",
            "a:b:c",
            ":b:1",
            "a::1",
            "a:b:1,",
            ",a:b:1",
            "a:b:-1",
            "%:%:1",
        ),
        *(
            "a:b:1;c:d:2",
            "a:b:" + "9" * 15,
            "a:b:" + "9" * 16,
            "a:b:1\u00e9",
            "%FF:%FF:1",
            "*,a:b:1",
        ),
        *("a:b:1," * 300 + "a:b:1", "a:b:1," * 1000 + "*", "fd%3A1:b:1", "$admin:b:1"),
    ],
)
async def test_an_id_that_is_none_of_this_broker_harms_nobody(
    autojump_clock: MockClock, net: Network, last_id: str
) -> None:
    net.broker.publish_nowait("a", 1)
    async with await come_back(net, last_id, topic="a") as client:
        assert set((await client.object())["connect"]["subs"]) == {"fd:1"}
        recovered, missed = outcomes([await client.object()])["a"]
        assert (recovered, missed) in ((None, []), (False, []))
        net.broker.publish_nowait("a", 2)
        assert (await client.object())["pub"]["data"] == 2


async def test_an_id_opens_no_topic(autojump_clock: MockClock, net: Network) -> None:
    asked = []

    @net.broker.on_subscribe
    async def on_subscribe(event: SubscribeEvent) -> None:
        asked.append(event.topic)
        if event.topic == "secret":
            raise Refused(103)

    net.broker.publish_nowait("secret", 1)
    net.broker.publish_nowait("other", 1)
    _, secret = await net.broker.history("secret")
    _, other = await net.broker.history("other")
    last_id = f"secret:{secret.epoch}:0,other:{other.epoch}:0"
    async with await come_back(net, last_id, topic="secret") as client:
        assert set((await client.object())["connect"]["subs"]) == {"fd:1"}
        assert (await client.object())["unsubscribe"]["code"] == 103
        assert client.last_id == ""
    assert asked == ["secret"]


async def test_a_topic_that_the_server_gives_goes_on_too(
    autojump_clock: MockClock, guarded: Network
) -> None:
    mine = token(guarded, sub="mei", subs={"news": {}})
    async with await open_one_way(guarded, token=mine) as client:
        await client.object()
        guarded.broker.publish_nowait("news", 1)
        await client.object()
        last_id = client.last_id
    guarded.broker.publish_nowait("news", 2)
    async with await come_back(guarded, last_id, token=mine) as client:
        news = (await client.object())["connect"]["subs"]["news"]
        assert news["recovered"] is True
        assert [each["data"] for each in news["publications"]] == [2]
        assert re.fullmatch(r"news:\w+:2", client.last_id)
    async with await come_back(guarded, last_id, token=token(guarded, sub="tom")) as client:
        assert "news" not in (await client.object())["connect"]["subs"]


async def test_topics_that_come_and_go_are_in_the_id_while_they_are_there(
    autojump_clock: MockClock, net: Network
) -> None:
    async with await open_reader(net, "uni_sse") as client:
        net.broker.add_subscription(1, "more", data="x" * 3000)
        assert (await client.object())["channel"] == "more"
        assert re.fullmatch(r"a:\w+:0,more:\w+:0", client.last_id)
        net.broker.add_subscription(1, "large", data="x" * 5000)
        assert (await client.object())["channel"] == "large"
        net.broker.publish_nowait("large", 1)  # its place is not known
        await client.object()
        net.broker.end_subscription(1, "a")
        await client.object()
        assert re.fullmatch(r"more:\w+:0,\*", client.last_id)
        net.broker.end_subscription(1, "more")
        await client.object()
        assert client.last_id == "*"


async def test_an_id_has_its_bound_and_who_was_left_out_is_told(
    autojump_clock: MockClock, net: Network
) -> None:
    names = [f"topic.{number:0>20}" for number in range(100)]
    async with await open_one_way(net, topic=names) as client:
        for _ in range(101):
            await client.object()
        for name in names:
            net.broker.publish_nowait(name, 1)
        for _ in names:
            await client.object()
        with trio.move_on_after(1):
            await client.object()  # the comment behind all that, with the id alone
        assert 1400 < len(client.last_id) <= MAX_ID
        assert client.last_id.endswith(",*")
        last_id = client.last_id
    for name in names:
        net.broker.publish_nowait(name, 2)
    async with await come_back(net, last_id, topic=names) as client:
        await client.object()
        told = outcomes([await client.object() for _ in names])
    known = last_id.count(":") // 2
    assert [told[name] for name in names] == [(True, [2])] * known + [(False, [])] * (100 - known)


async def test_ids_take_no_more_room_than_what_they_stand_behind(
    autojump_clock: MockClock, net: Network
) -> None:
    names = [f"topic.{number}" for number in range(100)]
    async with await open_one_way(net, topic=names) as client:
        for _ in range(101):
            await client.object()
        for number in range(2000):
            net.broker.publish_nowait("topic.0", number)
        sizes, ids = 0, set()
        for number in range(2000):
            event = await client.event()
            while event == ":":
                event = await client.event()
            sizes += len(event)
            assert json.loads(event)["pub"]["data"] == number
            ids.add(client.last_id)
    assert sum(map(len, ids)) < 2 * sizes


async def test_a_one_way_reader_that_is_too_slow_comes_back_to_where_it_was(
    autojump_clock: MockClock,
) -> None:
    config = Config(outbox_bytes=10_000, topics=TopicRules(slow_consumer="drop_oldest"))
    async with open_test_broker(Broker(config)) as net:
        client = await open_one_way(net, lockstep_stream_pair, topic="a")
        for _ in range(2):
            await client.object()
        for number in range(100):
            net.broker.publish_nowait("a", [number, "x" * 1000])
            await wait_all_tasks_blocked()
        said = await client.rest()
        assert said[-1]["disconnect"]["code"] == 3010
        seen = [each["pub"]["data"][0] for each in said[:-1]]
        async with await come_back(net, client.last_id, topic="a") as again:
            await again.object()
            recovered, missed = outcomes([await again.object()])["a"]
        await client.aclose()
    assert recovered is True
    assert seen + [each[0] for each in missed] == list(range(100))


async def test_one_way_may_be_posted(autojump_clock: MockClock, net: Network) -> None:
    async with Stream((await net.connect()).stream) as peer:
        await peer.ask("POST", "/connection/uni_sse", b'{"subs": {\n"a": {}}}')
        assert "connect" in await peer.object()
        assert (await peer.object())["channel"] == "a"


async def test_one_way_may_ask_for_as_many_topics_as_fit_its_request(
    autojump_clock: MockClock,
) -> None:
    names = [f"t{number}" for number in range(100)]
    async with (
        open_test_broker(Broker(Config(max_message_bytes=2000))) as net,
        Stream((await net.connect()).stream) as peer,
    ):
        body = json.dumps({"subs": {name: {} for name in names}}, separators=(",", ":")).encode()
        assert len(body) < 2000
        await peer.ask("POST", "/connection/uni_sse", body)
        assert "connect" in await peer.object()
        for name in names:
            assert (await peer.object())["channel"] == name


async def test_one_way_with_a_token(autojump_clock: MockClock, guarded: Network) -> None:
    subs = {"news": {"data": {"hello": 1}}}
    mine = token(guarded, sub="mei", subs=subs)
    async with await open_one_way(guarded, token=mine, topic=["news", "b"]) as client:
        connect = (await client.object())["connect"]
        assert connect["subs"]["news"]["data"] == {"hello": 1}
        assert (await client.object())["channel"] == "b"
        [info] = guarded.broker.connections()
        assert (info.user, set(info.topics)) == ("mei", {"news", "b"})
        said = await client.rest()
        assert said == [{"disconnect": {"code": 3005, "reason": said[0]["disconnect"]["reason"]}}]


async def test_a_one_way_client_that_is_refused_is_told_and_let_go(
    autojump_clock: MockClock, guarded: Network
) -> None:
    closes: list[Close] = []

    @guarded.broker.on_close
    async def on_close(connection: Connection, close: Close) -> None:
        closes.append(close)

    refusals: list[Exception] = [Refused(103), Refused(100)]

    @guarded.broker.on_connect
    async def on_connect(event: ConnectEvent) -> None:
        raise refusals.pop(0)

    asked: list[tuple[dict[str, Any], int]] = [
        ({"token": "x"}, 3500),
        ({}, 3500),
        ({"token": token(guarded, -60), "topic": "a"}, 3005),
        ({"token": token(guarded), "topic": "a"}, 3507),
        ({"token": token(guarded)}, 3004),
    ]
    for query, code in asked:
        client = await open_one_way(guarded, **query)
        [told] = await client.rest()
        assert told["disconnect"]["code"] == code
        assert told["disconnect"]["reason"]
        await client.aclose()
        await wait_all_tasks_blocked()
        assert (closes[-1].code, closes[-1].initiator) == (code, Initiator.SERVER)
    assert trio.current_time() == 0


async def test_a_retained_value_comes_behind_its_subscription(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker(Config(topics=TopicRules(retain=True)))) as net:
        net.broker.publish_nowait("a", "last")
        async with await open_one_way(net, topic="a") as client:
            said = [await client.object() for _ in range(3)]
            assert [list(each)[-1] for each in said] == ["connect", "subscribe", "pub"]


# protobuf

PROTOBUF = {"Content-Type": "application/octet-stream"}


def command(**fields: Any) -> Any:
    return schema.Command(**fields)


class ProtobufClient(Stream):
    """A client that reads its stream as the official library does."""

    async def message(self) -> bytes:
        """One message, without its length; a ping is empty."""
        size = shift = 0
        while True:
            (byte,) = await self.take(1)
            size |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return await self.take(size)

    async def take(self, size: int) -> bytes:
        while len(self._buffer) < size:
            await self._read()
        return self._take(size)

    async def object(self) -> Any:
        """The next reply or push; pings are passed over."""
        while not (said := await self.message()):
            pass
        return schema.Reply.FromString(said)


async def open_protobuf(
    net: Network, make_pair: MakePair = memory_stream_pair, *behind: Any, **connect: Any
) -> ProtobufClient:
    """A client after its `connect`, with more commands in the same body if need be."""
    peer = ProtobufClient((await net.connect(make_pair)).stream)
    body = delimited(command(id=1, connect=schema.ConnectRequest(**connect)), *behind)
    await peer.ask("POST", "/connection/http_stream", body, PROTOBUF)
    assert peer.status == 200, await peer.receive_eof()
    reply = (await peer.object()).connect
    peer.fd, peer.session = int(reply.client), reply.session
    return peer


async def emulate_bytes(net: Network, session: str, data: bytes) -> tuple[int, str]:
    body = schema.EmulationRequest(session=session, node="1", data=data).SerializeToString()
    return await ask(net, "POST", "/emulation", body, PROTOBUF)


async def emulate_protobuf(net: Network, session: str, *commands: Any) -> int:
    return (await emulate_bytes(net, session, delimited(*commands)))[0]


async def test_protobuf_over_http_does_what_it_does_over_websocket(
    autojump_clock: MockClock, net: Network
) -> None:
    async with await open_protobuf(net) as client, await net.open_client() as other:
        assert client.header("content-type") == "application/octet-stream"
        [info] = [i for i in net.broker.connections() if i.fd == client.fd]
        assert (info.transport, info.protocol) == ("http_stream", "centrifuge-protobuf")
        subscribe = command(id=2, subscribe={"channel": "a"})
        assert await emulate_protobuf(net, client.session, subscribe) == 204
        assert await client.object() == schema.Reply(id=2, subscribe={})
        await other.request(publish={"channel": "a", "data": {"text": "你好"}})
        push = (await client.object()).push
        assert (push.channel, push.pub.data) == ("a", '{"text":"你好"}'.encode())
        publish = command(id=3, publish={"channel": "a", "data": b"\xff\n\0"})
        stats = command(id=4, presence_stats={"channel": "a"})
        assert await emulate_protobuf(net, client.session, publish, stats) == 204
        push = (await client.object()).push
        assert (push.pub.data, push.pub.info.client) == (b"\xff\n\0", str(client.fd))
        assert await client.object() == schema.Reply(id=3, publish={})
        assert (await client.object()).presence_stats.num_clients == 1
        net.broker.push(client.fd, b"\x80 any bytes")
        assert (await client.object()).push.message.data == b"\x80 any bytes"


async def test_a_post_in_protobuf_may_hold_more_than_connect(
    autojump_clock: MockClock, net: Network
) -> None:
    more = (command(id=2, subscribe={"channel": "a"}), command(id=3, rpc={"method": "x"}))
    async with await open_protobuf(net, memory_stream_pair, *more) as client:
        assert (await client.object()).HasField("subscribe")
        assert (await client.object()).error.code == 104


@pytest.mark.parametrize("size", [1, 120, 125, 126, 16_384, 70_000, 900_000])
async def test_bytes_of_any_size_come_whole_in_protobuf(
    autojump_clock: MockClock, net: Network, size: int
) -> None:
    async with await open_protobuf(net) as client, net.broker.subscribe("a") as messages:
        subscribe = command(id=2, subscribe={"channel": "a"})
        assert await emulate_protobuf(net, client.session, subscribe) == 204
        await client.object()
        for n in range(3):
            data = bytes((0xF0 + n,)) * size
            publish = command(id=n + 3, publish={"channel": "a", "data": data})
            assert await emulate_protobuf(net, client.session, publish) == 204
            assert (await messages.receive()).data == data
            assert (await client.object()).push.pub.data == data
            assert (await client.object()).id == n + 3


@pytest.mark.parametrize("told", [True, False])
async def test_however_frames_are_cut_protobuf_says_their_payloads(told: bool) -> None:
    codec = CENTRIFUGE_PROTOBUF
    replies = [codec.reply(1, "connect", {"client": "1"}), codec.error(2, 100, "x" * 200, True)]
    written = [codec.ping(), codec.frame(replies), codec.message(b"x" * 70_000)]
    reason = "r" * 123
    farewell = codec.disconnect(3001, reason)
    if told:
        written.append(farewell)
    expected = b"".join(each[_header_size(each) :] for each in [*written[:3], farewell])
    written.insert(1, frames.encode(frames.PING, b"nobody hears"))
    stream = b"".join([*written, frames.close_frame(3001, reason)])
    for cuts in (1, 2, 3, 7, 64, 1000, 10**6):
        ours, theirs = memory_stream_pair()
        line = ProtobufStream(theirs)
        await line.send_all(b"HTTP/1.1 200 OK\r\n\r\n")
        for start in range(0, len(stream), cuts):
            await line.send_all(stream[start : start + cuts])
        said = b"".join([bytes(data) async for data in ours])
        assert said == b"HTTP/1.1 200 OK\r\n\r\n" + expected
        await ours.aclose()


def _header_size(frame: bytes) -> int:
    header = frames.read_header(frame)
    assert header is not None
    return header.size


async def test_pings_in_protobuf_are_empty_messages_and_are_to_be_answered(
    autojump_clock: MockClock, net: Network
) -> None:
    async with await open_protobuf(net) as client:
        for _ in range(3):
            assert await client.message() == b""
            assert await emulate_protobuf(net, client.session, command()) == 204
        assert trio.current_time() > 59
        assert await client.message() == b""
        with trio.fail_after(15):  # else there may be pings for ever
            told = (await client.object()).push.disconnect
        assert (told.code, told.reason) == (3012, "no pong")
        assert await client.receive_eof() == b""


@pytest.mark.parametrize("reason", ["", "off you go", "long " * 60])
async def test_a_client_that_is_sent_away_in_protobuf_gets_the_reason_once(
    autojump_clock: MockClock, net: Network, reason: str
) -> None:
    async with await open_protobuf(net) as client:
        net.broker.push(client.fd, b"before")
        net.broker.disconnect(client.fd, 3503, reason)
        assert (await client.object()).push.message.data == b"before"
        told = schema.Disconnect(code=3503, reason=reason)
        assert await client.object() == schema.Reply(push=schema.Push(disconnect=told))
        assert await client.receive_eof() == b""
        assert trio.current_time() == 0


async def test_a_bad_token_in_protobuf_is_told_in_protobuf(
    autojump_clock: MockClock, guarded: Network
) -> None:
    async with ProtobufClient((await guarded.connect()).stream) as peer:
        body = delimited(command(id=1, connect={"token": "x.y.z"}))
        await peer.ask("POST", "/connection/http_stream", body, PROTOBUF)
        told = (await peer.object()).push.disconnect
        assert (told.code, told.reason) == (3500, "invalid token")
        assert await peer.receive_eof() == b""


HOSTILE_BODIES = [
    *(b"", b"\x05", b"\x80", b"\xff" * 11, b"\xff\xff\xff\xff\x0f", b"{}", b"\x00\x02\x0b\x0c"),
    delimited(command(id=1, connect={}))[:-1],
    delimited(command(id=1, connect={"name": "cut"}))[:-2],
    b"\x04\x22\x02\x0a\x05",  # a token longer than all of it
    b"\x05\x22\x03\x0a\x01\xff",  # a token that is no text
    b"\x02\x0b\x0c",  # a group
    bytes(70_000),
    json.dumps(CONNECT).encode(),
]


@pytest.mark.parametrize("body", HOSTILE_BODIES, ids=lambda body: body[:12].hex())
async def test_a_body_that_is_no_connect_in_protobuf_opens_nothing(
    autojump_clock: MockClock, net: Network, body: bytes
) -> None:
    status, text = await ask(net, "POST", "/connection/http_stream", body, PROTOBUF)
    assert status == 400
    assert text.startswith(("not a connect command: ", "the first command is connect, with an id"))
    assert text.count("\n") == 1
    assert net.broker.connections() == []


@pytest.mark.parametrize("first", [command(id=1), command(connect={}), command(id=1, rpc={})])
async def test_a_stream_in_protobuf_begins_with_connect(
    autojump_clock: MockClock, net: Network, first: Any
) -> None:
    body = delimited(first)
    status, text = await ask(net, "POST", "/connection/http_stream", body, PROTOBUF)
    assert (status, text) == (400, "the first command is connect, with an id\n")


async def test_garbage_behind_connect_ends_with_3501(
    autojump_clock: MockClock, net: Network
) -> None:
    async with ProtobufClient((await net.connect()).stream) as peer:
        body = delimited(command(id=1, connect={})) + b"\x02\x0b\x0c"
        await peer.ask("POST", "/connection/http_stream", body, PROTOBUF)
        assert (peer.status, (await peer.object()).id) == (200, 1)
        assert (await peer.object()).push.disconnect.code == 3501
        assert await peer.receive_eof() == b""


@pytest.mark.parametrize(
    "body",
    [
        *(b"\x12", b"\x12\x05ab", b"\x12\x01\xff", b"\x1a\xff\xff\xff\xff\x0fx", b"\x0b\x0c"),
        *(b"\xff" * 1000, b"\x1d\x00", b"\x20\x01" * 20_000),
        json.dumps({"session": "1.x", "data": "{}"}).encode(),
    ],
    ids=lambda body: body[:12].hex(),
)
async def test_a_body_that_is_no_emulation_request_in_protobuf_gets_400(
    autojump_clock: MockClock, net: Network, body: bytes
) -> None:
    status, text = await ask(net, "POST", "/emulation", body, PROTOBUF)
    assert status == 400
    assert text.startswith("not an emulation request: ")
    assert text.count("\n") == 1


async def test_an_emulation_request_in_protobuf_reaches_its_own_session_only(
    autojump_clock: MockClock, net: Network
) -> None:
    async with await open_protobuf(net) as client:
        fd, secret = client.session.split(".")
        for session in ("", fd, f"{fd}.", f"{fd}.{secret[:-1]}", f"{int(fd) + 1}.{secret}", "\0"):
            assert await emulate_protobuf(net, session, command()) == 404
        assert await ask(net, "POST", "/emulation", b"", PROTOBUF) == (
            404,
            "no such session: connect again\n",
        )
        # A field of a newer client's is skipped.
        body = schema.EmulationRequest(
            session=client.session, data=delimited(command(id=7, rpc={"method": "x"}))
        ).SerializeToString()
        status, _ = await ask(net, "POST", "/emulation", body + b"\xa2\x06\x02hi", PROTOBUF)
        assert status == 204
        assert (await client.object()).id == 7


@pytest.mark.parametrize(
    "data", [b"", b"\x05", b"\xff" * 11, b"\x02\x0b\x0c", b"{}", b"\x05\x22\x03\x0a\x01\xff"]
)
async def test_bad_commands_in_protobuf_end_their_own_session(
    autojump_clock: MockClock, net: Network, data: bytes
) -> None:
    async with await open_protobuf(net) as client, await open_protobuf(net) as bystander:
        assert (await emulate_bytes(net, client.session, data))[0] == 204
        assert (await client.object()).push.disconnect.code == 3501
        assert await client.receive_eof() == b""
        rpc = command(id=2, rpc={"method": "x"})
        assert await emulate_protobuf(net, bystander.session, rpc) == 204
        assert (await bystander.object()).error.code == 104


async def test_a_message_in_protobuf_has_the_size_of_any_other(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker(Config(max_message_bytes=1000))) as net:
        connect = delimited(command(id=1, connect={"name": "x" * 1000}))
        path = "/connection/http_stream"
        assert (await ask(net, "POST", path, connect, PROTOBUF))[0] == 413
        async with await open_protobuf(net) as client:
            fits = delimited(command(id=2, rpc={"method": "x", "data": b"\xff" * 987}))
            assert len(fits) == 1000
            assert (await emulate_bytes(net, client.session, fits))[0] == 204
            assert (await client.object()).id == 2
            status, text = await emulate_bytes(net, client.session, fits + b"\0")
            assert (status, text) == (413, "a message has at most 1000 bytes\n")
            assert (await emulate_bytes(net, client.session, bytes(5000)))[0] == 413
            assert net.broker.is_established(client.fd)


async def test_a_session_is_spoken_to_as_it_began(autojump_clock: MockClock, net: Network) -> None:
    async with await open_protobuf(net) as one, await open_stream(net) as other:
        for session in (one.session, other.session):
            commands: tuple[int, str]
            if session == one.session:
                body = json.dumps({"session": session, "data": '{"id":2,"rpc":{}}'}).encode()
                commands = await ask(net, "POST", "/emulation", body)
                speaks = "centrifuge-protobuf"
            else:
                commands = await emulate_bytes(net, session, delimited(command(id=2, rpc={})))
                speaks = "centrifuge-json"
            assert commands == (415, f"this session speaks {speaks}\n")
        assert await emulate_protobuf(net, one.session, command(id=3, rpc={})) == 204
        assert (await one.object()).id == 3
        assert await emulate(net, other.session, {"id": 3, "rpc": {}}) == 204
        assert (await other.object())["id"] == 3


@pytest.mark.parametrize("path", ["/connection/sse", "/connection/uni_sse"])
async def test_there_are_no_events_in_protobuf(
    autojump_clock: MockClock, net: Network, path: str
) -> None:
    body = delimited(command(id=1, connect={}))
    status, text = await ask(net, "POST", path, body, PROTOBUF)
    assert (status, text) == (
        415,
        "events are text: for protobuf there is /connection/http_stream\n",
    )
    # Of a GET it says nothing: there is no body.
    target = f"{path}?cf_connect={quote(json.dumps(CONNECT))}"
    async with Stream((await net.connect()).stream) as peer:
        await peer.ask("GET", target, headers=PROTOBUF)
        assert (peer.status, peer.header("content-type")) == (200, "text/event-stream")


@pytest.mark.parametrize("path", ["/emulation", *STREAMS])
@pytest.mark.parametrize(
    "said", ["application/x-protobuf", "image/png", "multipart/form-data", ","]
)
async def test_a_body_of_another_kind_is_told_which_there_are(
    autojump_clock: MockClock, net: Network, path: str, said: str
) -> None:
    status, text = await ask(net, "POST", path, b"{}", {"Content-Type": said})
    assert (status, text) == (
        415,
        "a body is application/json, or protobuf as application/octet-stream\n",
    )


@pytest.mark.parametrize(
    "said",
    [
        *("", "application/json", "Application/JSON ; charset=utf-8", "text/plain;charset=UTF-8"),
        *("application/x-www-form-urlencoded", "application/x-ndjson"),
    ],
)
async def test_json_is_taken_by_all_its_names(
    autojump_clock: MockClock, net: Network, said: str
) -> None:
    async with Stream((await net.connect()).stream) as peer:
        body, fields = json.dumps(CONNECT).encode(), {"Content-Type": said}
        await peer.ask("POST", "/connection/http_stream", body, fields)
        assert (peer.status, peer.header("content-type")) == (200, "application/x-ndjson")


async def test_so_is_protobuf_whatever_the_case(autojump_clock: MockClock, net: Network) -> None:
    async with ProtobufClient((await net.connect()).stream) as peer:
        fields = {"Content-Type": "Application/Octet-Stream; x=y"}
        body = delimited(command(id=1, connect={}))
        await peer.ask("POST", "/connection/http_stream", body, fields)
        assert (peer.status, peer.header("content-type")) == (200, "application/octet-stream")


# memory that is short


async def half_a_body(net: Network, path: str, size: int) -> Stream:
    """A request of which all but the last byte was sent."""
    peer = Stream((await net.connect()).stream)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {size}\r\n\r\n"
    await peer.send(head.encode() + b" " * (size - 1))
    await wait_all_tasks_blocked()
    return peer


def broker_that_reads(**fields: Any) -> Broker:
    """A broker whose app reads all of a request's body."""
    broker = Broker(Config(**fields))

    @broker.on_request
    async def read(request: Request) -> Response:
        return PlainTextResponse(str(len(await request.body())))

    return broker


@pytest.mark.parametrize("path", [*STREAMS, "/emulation", "/elsewhere"])
async def test_a_body_is_charged_as_it_comes_and_the_heaviest_gives_way(
    autojump_clock: MockClock, path: str
) -> None:
    async with open_test_broker(broker_that_reads(max_memory_bytes=2 * 2**20)) as net:
        heavy = await half_a_body(net, path, 900_000)
        assert net.broker.stats().memory.parts["incoming"] == pytest.approx(900_000, rel=0.01)
        light = await half_a_body(net, path, 200_000)
        client = await net.open_client()
        for size in (500_000, 520_000):
            await client.send(frames.masked_frame(frames.TEXT, b"x" * size)[:-1])
            client = await net.open_client()
        await heavy.read_answer()
        assert heavy.status == 503
        await light.send(b" ")
        await light.read_answer()
        assert light.status in (200, 400)
        assert net.broker.stats().memory.gave_way == 1
        for peer in (heavy, light):
            await peer.aclose()
        await trio.sleep(3)
        held = net.broker.stats().memory.parts["incoming"]
        assert 0 <= held - 500_013 - 520_013 < 2 * PIECE  # with their headers, in whole pieces


@pytest.mark.parametrize("path", [*STREAMS, "/emulation", "/elsewhere"])
async def test_close_to_the_limit_a_large_body_is_refused_unread_and_a_small_one_is_not(
    autojump_clock: MockClock, path: str
) -> None:
    async with open_test_broker(broker_that_reads(max_memory_bytes=2 * 2**20)) as net:
        for _ in range(2):
            client = await net.open_client()
            await client.send(frames.masked_frame(frames.TEXT, b"x" * 850_000)[:-1])
        await wait_all_tasks_blocked()
        large = await half_a_body(net, path, 300_000)
        await large.read_answer()
        assert large.status == 503
        small = await half_a_body(net, path, 10_000)
        await small.send(b" ")
        await small.read_answer()
        assert small.status in (200, 400)
        for peer in (large, small):
            await peer.aclose()


async def test_large_bodies_that_end_together_are_decoded_in_turns(
    autojump_clock: MockClock,
) -> None:
    async with open_test_broker(Broker()) as net:
        peers = [await half_a_body(net, "/emulation", 900_000) for _ in range(10)]
        decoded = [0]
        async with trio.open_nursery() as nursery:
            for peer in peers:
                nursery.start_soon(peer.send, b" ")
            while decoded[-1] < 10:
                await trio.lowlevel.checkpoint()
                decoded.append(net.node.services.counts.refused)
        assert max(after - before for before, after in pairwise(decoded)) <= 2
        for peer in peers:
            await peer.aclose()


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_long_lists_of_topics_that_come_together_are_read_in_turns(
    autojump_clock: MockClock, method: str
) -> None:
    """A topic in nine bytes takes as long as a hundred bytes of another body."""
    async with open_test_broker(Broker()) as net:
        query, body = "&".join(f"topic={n}" for n in range(600)), ""
        if method == "POST":
            query, body = "", json.dumps({"subs": {f"t{n}": {} for n in range(600)}})
        asked = f"{method} /connection/uni_sse?{query} HTTP/1.1\r\nHost: localhost\r\n"
        asked += f"Content-Length: {len(body)}\r\n\r\n{body}"
        begun = [0]
        async with trio.open_nursery() as nursery:
            peers = [await net.connect() for _ in range(20)]
            for peer in peers:
                await peer.send(asked[:-1].encode())
            await wait_all_tasks_blocked()
            for peer in peers:
                nursery.start_soon(peer.send, asked[-1:].encode())
            while begun[-1] < 20:
                await trio.lowlevel.checkpoint()
                begun.append(len(net.node.services.connections))
        # A round of the queue has room for three of them, and they pass through some tasks.
        assert max(after - before for before, after in pairwise(begun)) <= 6
        for peer in peers:
            await peer.aclose()


async def test_messages_behind_a_busy_session_are_bounded_together(
    autojump_clock: MockClock,
) -> None:
    bounds: dict[str, Any] = {"max_message_bytes": 10_000, "outbox_bytes": 10_000}
    broker = Broker(Config(connection_bytes=70_000, **bounds))
    door = trio.Event()

    @broker.on_rpc
    async def wait(_: Connection, __: str, ___: object) -> None:
        await door.wait()

    async with open_test_broker(broker) as net:
        client = await open_stream(net)
        statuses: list[int] = []

        async def say(*commands: object) -> None:
            statuses.append(await emulate(net, client.session, *commands))

        assert await emulate(net, client.session, {"id": 2, "rpc": {"method": "x"}}) == 204
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(say, {"publish": {"channel": "a", "data": "x" * 9_000}})
            await trio.sleep(1)
            # There is room for 37,500 bytes besides its outbox: of these, four messages.
            assert statuses.count(503) >= 6
            assert set(statuses) == {204, 503}
            door.set()
        assert len(statuses) == 10
        assert statuses.count(503) == 6
        await client.aclose()
        await trio.sleep(1)
        assert net.broker.stats().memory.parts["incoming"] == 0


async def test_what_a_one_way_stream_has_in_hand_is_counted(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker()) as net:
        for _ in range(3):
            net.broker.publish_nowait("a", "x" * 500_000)
        _, top = await net.broker.history("a")
        since = {"recover": True, "epoch": top.epoch, "offset": 0}
        before = net.broker.stats().memory.parts["outboxes"]
        reader = Stream((await net.connect(lockstep_stream_pair)).stream)
        body = json.dumps({"subs": {"a": since}}).encode()
        await reader.ask("POST", "/connection/uni_sse", body)
        await reader.object()
        await wait_all_tasks_blocked()
        # The reply, as it waits in the outbox, and what it has become.
        assert net.broker.stats().memory.parts["outboxes"] - before > 2 * 1_500_000
        assert len((await reader.object())["subscribe"]["publications"]) == 3
        await wait_all_tasks_blocked()
        assert net.broker.stats().memory.parts["outboxes"] == before
        await reader.aclose()
