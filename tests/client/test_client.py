"""The client against a broker that misbehaves on purpose.

`FakeBroker` speaks just enough of the protocol to do what the real one cannot be made to do: drop
the connection at a chosen point, hold a reply back, forget a history, say nothing. It lives on
memory streams, so waits take no time. The client against the real broker: `test_scripts.py`.
"""

import base64
import hashlib
import json
import math
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import msgspec
import pytest
import trio
import trio_websocket
from trio.testing import MockClock, lockstep_stream_pair, memory_stream_pair, wait_all_tasks_blocked

from broker.client import (
    FRAME_BYTES,
    INBOX_MESSAGES,
    OUTBOX_COMMANDS,
    Client,
    Join,
    Leave,
    PresenceStats,
    Subscription,
    open_client,
)
from broker.client.loss import Lost
from broker.core.messages import ClientInfo, Position, Publication
from broker.errors import ClientError, ConnectionLost, RequestFailed, Unavailable

URL = "ws://broker.test:9501"
KEPT = {"recoverable": True, "positioned": True, "epoch": "e", "offset": 0}
"""The answer to a subscribe: the topic keeps history, nothing was published yet."""


class Peer:
    """The broker's end of one connection."""

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
        """The next command, which must be `method`."""
        while not self._commands:
            text = str(await self.ws.get_message())
            self._commands += [json.loads(line) for line in text.split("\n")]
        command = self._commands.pop(0)
        assert method in command, command
        return command

    async def send(self, *objects: object) -> None:
        await self.ws.send_message("\n".join(json.dumps(each) for each in objects))

    async def answer(self, method: str, **result: object) -> Any:
        command = await self.expect(method)
        await self.send({"id": command["id"], method: result})
        return command[method]

    async def refuse(self, method: str, code: int, *, temporary: bool = False) -> None:
        command = await self.expect(method)
        error = {"code": code, "message": "no", "temporary": temporary}
        await self.send({"id": command["id"], "error": error})

    def soon(self, method: str, **result: object) -> None:
        """Answer the next command while the test goes on to send it."""
        self.nursery.start_soon(partial(self.answer, method, **result))

    async def publish(self, *offsets: int) -> None:
        await self.send(*({"push": {"channel": "news", "pub": pub(each)}} for each in offsets))

    async def drop(self) -> None:
        await trio.aclose_forcefully(self.stream)


def pub(offset: int) -> dict[str, Any]:
    return {"data": f"n{offset}", "offset": offset}


class FakeBroker:
    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.dials: list[float] = []
        self.down = False
        self.fds = 0
        self.pair: Callable[[], tuple[trio.abc.Stream, trio.abc.Stream]] = memory_stream_pair
        self._send, self._dialled = trio.open_memory_channel[trio.abc.Stream](math.inf)

    async def open_stream(self, host: str, port: int) -> trio.abc.Stream:
        assert (host, port) == ("broker.test", 9501)
        await trio.lowlevel.checkpoint()
        self.dials.append(trio.current_time())
        if self.down:
            raise ConnectionRefusedError(111, "Connection refused")
        ours, theirs = self.pair()
        self._send.send_nowait(theirs)
        return ours

    async def request(self) -> tuple[trio_websocket.WebSocketRequest, trio.abc.Stream]:
        """The next connection, before the WebSocket handshake is answered."""
        stream = await self._dialled.receive()
        return await trio_websocket.wrap_server_stream(self.nursery, stream), stream

    async def stream(self) -> trio.abc.Stream:
        """The next connection, before anything."""
        return await self._dialled.receive()

    async def accept(self) -> Peer:
        """The next connection, before its connect command."""
        request, stream = await self.request()
        return Peer(self.nursery, stream, await request.accept())

    async def greet(self, **reply: object) -> Peer:
        """The next connection, after its connect command."""
        peer = await self.accept()
        self.fds += 1
        await peer.answer("connect", client=str(self.fds), **reply)
        return peer

    @asynccontextmanager
    async def client(self, **reply: object) -> AsyncIterator[tuple[Client, Peer]]:
        """A connected client and the broker's end of its first connection."""
        peers: list[Peer] = []
        greeted = trio.Event()

        async def greet() -> None:
            peers.append(await self.greet(**reply))
            greeted.set()

        self.nursery.start_soon(greet)
        # An hour of virtual time passes at once: what would hang fails.
        with trio.fail_after(3600):
            async with open_client(URL, open_stream=self.open_stream) as client:
                await greeted.wait()
                yield client, peers[0]

    @asynccontextmanager
    async def subscriber(self) -> AsyncIterator[tuple[Subscription[Publication], Peer]]:
        """A client that is subscribed to `news`, which keeps history."""
        async with self.client() as (client, peer):
            peer.soon("subscribe", **KEPT)
            async with client.subscribe("news") as subscription:
                yield subscription, peer


@pytest.fixture
async def fake(nursery: trio.Nursery) -> FakeBroker:
    return FakeBroker(nursery)


async def take(subscription: Subscription[Publication], count: int) -> list[object]:
    return [(await anext(subscription)).value for _ in range(count)]


async def cannot_open(fake: FakeBroker) -> ClientError:
    """The error that opening a client ends with."""
    with pytest.raises(ClientError) as caught:
        async with open_client(URL, open_stream=fake.open_stream):
            pytest.fail("connected")
    return caught.value


# Connecting.


async def test_connects_with_token_name_data_and_headers(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    seen: list[object] = []

    async def serve() -> None:
        request, stream = await fake.request()
        seen.extend([request.path, (b"x-tenant", b"blue") in request.headers])
        peer = Peer(fake.nursery, stream, await request.accept())
        seen.append(await peer.answer("connect", client="7", data={"fd": 7}))

    fake.nursery.start_soon(serve)
    async with open_client(
        f"{URL}/connection/websocket?a=1",
        token="secret",
        name="meter",
        data={"room": 1},
        headers=[("X-Tenant", "blue")],
        open_stream=fake.open_stream,
    ) as client:
        assert client.fd == 7
    assert not client.connected
    connect = {"token": "secret", "name": "meter", "data": {"room": 1}}
    assert seen == ["/connection/websocket?a=1", True, connect]


async def test_a_refused_connection_is_one_line_that_names_the_url(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    fake.down = True
    assert str(await cannot_open(fake)) == f"cannot connect to {URL}: connection refused"
    assert len(fake.dials) == 1


async def test_a_real_port_where_nobody_listens_is_named_too() -> None:
    with trio.socket.socket() as taken:
        await taken.bind(("127.0.0.1", 0))  # bound and not listening
        url = f"ws://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ClientError, match=f"^cannot connect to {url}: connection refused$"):
            async with open_client(url):
                pytest.fail("connected")


@pytest.mark.parametrize(
    "url", ["http://broker.test", "broker.test:9501", "ws://", "ws://host:port", "ws://[::1"]
)
async def test_a_bad_url_is_named(url: str) -> None:
    with pytest.raises(ClientError, match="is not a WebSocket URL"):
        async with open_client(url):
            pytest.fail("connected")


async def test_an_answer_that_is_not_websocket_is_named(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async def serve() -> None:
        request, _ = await fake.request()
        await request.reject(403)

    fake.nursery.start_soon(serve)
    assert "the answer is HTTP 403, not WebSocket" in str(await cannot_open(fake))


async def test_an_end_during_the_handshake_is_told_at_once(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async def serve() -> None:
        stream = await fake.stream()
        await stream.receive_some()
        await trio.aclose_forcefully(stream)

    fake.nursery.start_soon(serve)
    assert "closed before the WebSocket handshake" in str(await cannot_open(fake))
    assert trio.current_time() == fake.dials[0]


async def test_a_broker_that_does_not_answer_is_given_up_after_10_s(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    assert "no answer within 10 s" in str(await cannot_open(fake))
    assert trio.current_time() == pytest.approx(fake.dials[0] + 10)


@pytest.mark.parametrize("answer", ["this is server", '{"id":1}', '{"id":1,"connect":{}}', "[1]"])
async def test_a_server_of_another_protocol_is_named(
    fake: FakeBroker, autojump_clock: MockClock, answer: str
) -> None:
    async def serve() -> None:
        peer = await fake.accept()
        await peer.expect("connect")
        await peer.ws.send_message(answer)

    fake.nursery.start_soon(serve)
    assert "not this broker's protocol" in str(await cannot_open(fake))


async def test_refused_for_good_is_unavailable_with_the_code(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async def by_close() -> None:
        await (await fake.accept()).ws.aclose(3500, "invalid token")

    async def by_reply() -> None:
        await (await fake.accept()).refuse("connect", 109)

    for serve, code in ((by_close, 3500), (by_reply, 109)):
        fake.nursery.start_soon(serve)
        error = await cannot_open(fake)
        assert isinstance(error, Unavailable)
        assert error.code == code


async def test_before_the_first_connection_a_temporary_refusal_is_an_error(
    fake: FakeBroker,
    autojump_clock: MockClock,
) -> None:
    async def by_reply() -> None:
        await (await fake.accept()).refuse("connect", 111, temporary=True)

    async def by_close() -> None:
        await (await fake.accept()).ws.aclose(3004, "internal")

    for serve, code in ((by_reply, 111), (by_close, 3004)):
        fake.nursery.start_soon(serve)
        error = await cannot_open(fake)
        assert isinstance(error, RequestFailed)  # and no `Unavailable`, which is for good
        assert error.temporary
        assert error.code == code
    assert len(fake.dials) == 2


# Leaving.


async def test_leaving_sends_what_is_queued_closes_with_1000_and_leaves_no_task(
    fake: FakeBroker,
    autojump_clock: MockClock,
) -> None:
    await wait_all_tasks_blocked()
    before = trio.lowlevel.current_statistics().tasks_living
    got: list[object] = []

    async def serve(peer: Peer) -> None:
        got.append((await peer.expect("publish"))["publish"])
        with pytest.raises(trio_websocket.ConnectionClosed) as caught:
            await peer.expect("nothing more")
        assert caught.value.reason is not None
        got.append(caught.value.reason.code)

    async with fake.client() as (client, peer):
        fake.nursery.start_soon(serve, peer)
        await client.publish("news", 1, reply=False)
    await wait_all_tasks_blocked()
    assert got == [{"channel": "news", "data": 1}, 1000]
    assert trio.lowlevel.current_statistics().tasks_living == before
    with pytest.raises(Unavailable, match="closed here"):
        await client.publish("news", 1)
    assert len(fake.dials) == 1


async def raw_handshake(stream: trio.abc.Stream) -> None:
    """Accept by hand, for a peer that trio-websocket is too polite to be."""
    head = b""
    while b"\r\n\r\n" not in head:
        head += await stream.receive_some(1000)
    key = head.split(b"Sec-WebSocket-Key: ")[1].split(b"\r\n")[0]
    accept = hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
    await stream.send_all(
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: " + base64.b64encode(accept) + b"\r\n\r\n"
    )
    reply = b'{"id":1,"connect":{"client":"1"}}'
    await stream.send_all(bytes([0x81, len(reply)]) + reply)


async def test_leaving_waits_2_s_for_a_broker_that_does_not_close(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async def serve() -> None:
        await raw_handshake(await fake.stream())

    fake.nursery.start_soon(serve)
    async with open_client(URL, open_stream=fake.open_stream):
        left = trio.current_time()
    assert trio.current_time() == pytest.approx(left + 2)


async def test_a_ping_after_our_close_is_contained(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    """trio-websocket raises LocalProtocolError for it (its issue #184)."""
    pinged = trio.Event()

    async def serve() -> None:
        stream = await fake.stream()
        await raw_handshake(stream)
        while data := await stream.receive_some(1000):
            if data[0] == 0x88:
                await stream.send_all(b"\x89\x00")
                pinged.set()

    fake.nursery.start_soon(serve)
    async with open_client(URL, open_stream=fake.open_stream):
        left = trio.current_time()
    assert pinged.is_set()
    assert trio.current_time() == left


@pytest.mark.parametrize("error", [RequestFailed(103, "no"), KeyboardInterrupt(), ValueError("x")])
async def test_what_the_block_raises_comes_out_unwrapped(
    fake: FakeBroker, autojump_clock: MockClock, error: BaseException
) -> None:
    with pytest.raises(type(error)) as caught:
        async with fake.subscriber():
            raise error
    assert caught.value is error


async def test_cancelling_the_block_ends_it(fake: FakeBroker, autojump_clock: MockClock) -> None:
    with trio.move_on_after(5) as scope:
        async with fake.subscriber():
            await trio.sleep_forever()
    assert scope.cancelled_caught


async def test_leaving_while_reconnecting_is_immediate(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client() as (_, peer):
        fake.down = True
        await peer.drop()
        await trio.sleep(50)
        left = trio.current_time()
    assert trio.current_time() == left


# Requests.


async def test_publish_waits_for_its_reply(fake: FakeBroker, autojump_clock: MockClock) -> None:
    async with fake.client() as (client, peer):

        async def serve() -> None:
            command = await peer.expect("publish")
            await trio.sleep(3)
            await peer.send({"id": command["id"], "publish": {}})

        began = trio.current_time()
        fake.nursery.start_soon(serve)
        await client.publish("news", {"a": "é"})
        assert trio.current_time() == pytest.approx(began + 3)


async def test_an_error_reply_is_raised_to_its_own_caller(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client() as (client, peer), trio.open_nursery() as nursery:

        async def push() -> None:
            with pytest.raises(RequestFailed, match="102: no"):
                await client.push(99, "hello")

        nursery.start_soon(push)
        await wait_all_tasks_blocked()
        nursery.start_soon(client.publish, "news", 1)
        first = await peer.expect("publish")
        assert first["publish"] == {"channel": "fd:99", "data": "hello"}
        await peer.answer("publish")
        await peer.send({"id": first["id"], "error": {"code": 102, "message": "no"}})


async def test_ready_json_may_hold_newlines(fake: FakeBroker, autojump_clock: MockClock) -> None:
    async with fake.client() as (client, peer):
        await client.publish("news", msgspec.Raw(b'{\n "a": "b\\nc"\n}'), reply=False)
        assert (await peer.expect("publish"))["publish"]["data"] == {"a": "b\nc"}


async def test_commands_that_wait_share_a_frame_unless_it_gets_too_large(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client() as (client, peer), trio.open_nursery() as nursery:
        for size in (10, 20, FRAME_BYTES, 30):
            nursery.start_soon(partial(client.publish, "news", "x" * size, reply=False))
        await wait_all_tasks_blocked()
        frames: list[str] = []
        while "".join(frames).count('"publish"') < 4:
            frames.append(str(await peer.ws.get_message()))
    assert len(frames) < 4
    assert all(len(frame) < FRAME_BYTES or "\n" not in frame for frame in frames)


async def test_a_publish_without_reply_waits_while_a_thousand_are_queued(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    fake.pair = lockstep_stream_pair
    sent = 0
    async with fake.client() as (client, peer), trio.open_nursery() as nursery:

        async def flood() -> None:
            nonlocal sent
            while True:
                await client.publish("news", "x" * 1000, reply=False)
                sent += 1

        nursery.start_soon(flood)
        await wait_all_tasks_blocked()
        # Beyond the bound: one frame on its way and two in the peer's hands, 60 commands each.
        assert OUTBOX_COMMANDS <= sent < OUTBOX_COMMANDS + 4 * 65
        held = sent
        for _ in range(held):
            await peer.expect("publish")
        await wait_all_tasks_blocked()
        assert sent > held
        nursery.cancel_scope.cancel()


async def test_a_cancelled_publish_leaves_the_client_usable(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client() as (client, peer):
        with trio.move_on_after(1):
            await client.publish("news", 1)
        await peer.answer("publish")
        peer.soon("publish")
        await client.publish("news", 2)


async def test_history_presence_rpc_and_send(fake: FakeBroker, autojump_clock: MockClock) -> None:
    async with fake.client() as (client, peer):
        kept = pub(4) | {"time": 9, "info": {"client": "3", "user": "al"}}
        peer.soon("history", publications=[kept], epoch="e", offset=5)
        page = await client.history("news", limit=1)
        assert page.position == Position(5, "e")
        assert page.publications == (Publication("news", b'"n4"', ClientInfo("3", "al"), 4, 9),)

        info = {"client": "3", "user": "al", "conn_info": {"name": "A"}}
        peer.soon("presence", presence={"3": info})
        there = await client.presence("news")
        assert there == {"3": ClientInfo("3", "al", b'{"name": "A"}')}

        peer.soon("presence_stats", num_clients=2, num_users=1)
        assert await client.presence_stats("news") == PresenceStats(2, 1)

        peer.soon("rpc", data={"sum": 3})
        assert await client.rpc("add", [1, 2]) == {"sum": 3}

        await client.send("hello")
        assert await peer.expect("send") == {"send": {"data": "hello"}}


async def test_history_asks_for_what_it_says(fake: FakeBroker, autojump_clock: MockClock) -> None:
    asked: list[object] = []
    async with fake.client() as (client, peer):

        async def serve() -> None:
            asked.extend([await peer.answer("history"), await peer.answer("history")])

        fake.nursery.start_soon(serve)
        await client.history("news")
        await client.history("news", limit=0, since=Position(3, "e"), reverse=True)
    since = {"offset": 3, "epoch": "e"}
    assert asked == [
        {"channel": "news", "limit": -1},
        {"channel": "news", "limit": 0, "since": since, "reverse": True},
    ]


async def test_requests_in_flight_fail_when_the_connection_drops(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client() as (client, peer):

        async def serve() -> None:
            await peer.expect("publish")
            await peer.drop()

        fake.nursery.start_soon(serve)
        with pytest.raises(ConnectionLost, match="may or may not have been carried out"):
            await client.publish("news", 1)


async def test_a_request_made_while_reconnecting_waits_for_the_connection(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client() as (client, peer):
        await peer.drop()
        await wait_all_tasks_blocked()
        assert not client.connected

        async def serve() -> None:
            await (await fake.greet()).answer("publish")

        fake.nursery.start_soon(serve)
        await client.publish("news", 1)
        assert client.fd == 2


# Coming back.


async def test_waits_grow_with_jitter_and_stay_within_20_s(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    random.seed(1)
    async with fake.client() as (_, peer):
        fake.down = True
        await peer.drop()
        await trio.sleep(400)
    waits = [after - before for before, after in zip(fake.dials, fake.dials[1:], strict=False)]
    for attempt, wait in enumerate(waits):
        assert wait <= min(20, 0.2 * 2**attempt) + 1e-6
    assert max(waits) > 15
    assert len(set(waits)) == len(waits)
    assert 20 < len(waits) < 80  # 10 s each on average


async def test_a_broker_that_greets_and_hangs_up_is_not_hammered(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client() as (_, peer):
        await peer.drop()
        with trio.move_on_after(400):
            while True:
                await (await fake.greet()).drop()
    assert len(fake.dials) < 90


async def test_after_a_long_connection_the_waits_are_short_again(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client() as (_, peer):
        fake.down = True
        await peer.drop()
        await trio.sleep(100)
        fake.down = False
        peer = await fake.greet()
        await trio.sleep(30)
        dropped = trio.current_time()
        await peer.drop()
        await fake.greet()
        assert trio.current_time() - dropped <= 0.2


async def test_pings_are_answered(fake: FakeBroker, autojump_clock: MockClock) -> None:
    async with fake.client(ping=20, pong=True) as (_, peer):
        await trio.sleep(20)
        await peer.send({})
        assert await peer.ws.get_message() == "{}"
        await trio.sleep(29)
        assert len(fake.dials) == 1


async def test_a_silent_broker_is_left_after_ping_and_10_s(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client(ping=20, pong=True) as (client, _):
        fake.nursery.start_soon(partial(fake.greet, ping=20, pong=True))
        await trio.sleep(29.9)
        assert client.connected
        await trio.sleep(0.5)
        assert client.connected
        assert client.fd == 2


async def test_close_3500_ends_it_for_everybody(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client() as (client, peer):
        peer.soon("subscribe", **KEPT)
        async with client.subscribe("news") as subscription, trio.open_nursery() as nursery:

            async def ends(function: Callable[[], Any]) -> None:
                with pytest.raises(Unavailable, match="3500: invalid token"):
                    await function()

            nursery.start_soon(ends, partial(client.publish, "news", 1))
            nursery.start_soon(ends, client.messages.__anext__)
            await peer.publish(1)
            await wait_all_tasks_blocked()
            await peer.ws.aclose(3500, "invalid token")
            await trio.sleep(60)
            assert await take(subscription, 1) == ["n1"]
            await ends(subscription.__anext__)
            await ends(partial(client.publish, "news", 1, reply=False))
            await ends(client.subscribe("more").__aenter__)
        assert len(fake.dials) == 1
        assert not client.connected


@pytest.mark.parametrize("code", [1001, 3001, 3012, 4000])
async def test_other_close_codes_and_disconnect_pushes_come_back(
    fake: FakeBroker, autojump_clock: MockClock, code: int
) -> None:
    async with fake.client() as (client, peer):
        await peer.ws.aclose(code, "bye")
        peer = await fake.greet()
        await peer.send({"push": {"disconnect": {"code": code, "reason": "bye"}}})
        await fake.greet()
        await wait_all_tasks_blocked()
        assert client.fd == 3


async def test_a_disconnect_push_for_good_ends_it(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client() as (client, peer):
        await peer.send({"push": {"disconnect": {"code": 3503, "reason": "out"}}})
        with pytest.raises(Unavailable, match="3503: out"):
            await anext(client.messages)


async def test_garbage_from_the_broker_is_a_lost_connection(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client() as (client, peer):
        await peer.ws.send_message("{")
        await fake.greet()
        await wait_all_tasks_blocked()
        assert client.fd == 2


# Subscriptions.


async def test_what_was_missed_arrives_once_and_in_order(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.subscriber() as (subscription, peer):
        await peer.publish(1, 2)
        await wait_all_tasks_blocked()
        await peer.drop()
        peer = await fake.greet()
        result = KEPT | {"publications": [pub(3), pub(4)], "offset": 4, "recovered": True}
        asked = await peer.answer("subscribe", **result)
        assert (asked["recover"], asked["offset"], asked["epoch"]) == (True, 2, "e")
        await peer.publish(4, 5)
        await wait_all_tasks_blocked()
        await peer.drop()
        peer = await fake.greet()
        asked = await peer.answer("subscribe", **KEPT | {"offset": 5, "recovered": True})
        assert asked["offset"] == 5
        await peer.publish(6)

        assert await take(subscription, 1) == ["n1"]
        assert subscription.position == Position(1, "e")
        assert await take(subscription, 5) == ["n2", "n3", "n4", "n5", "n6"]
        assert subscription.position == Position(6, "e")
        assert subscription.recovered
        assert subscription.gaps == 0


async def test_a_client_that_has_seen_nothing_recovers_from_offset_0(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.subscriber() as (subscription, peer):
        await peer.drop()
        peer = await fake.greet()
        result = KEPT | {"publications": [pub(1)], "offset": 1, "recovered": True}
        asked = await peer.answer("subscribe", **result)
        assert (asked["recover"], asked["offset"]) == (True, 0)
        assert await take(subscription, 1) == ["n1"]


async def test_a_gap_is_counted_where_it_is_and_not_before(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.subscriber() as (subscription, peer):
        await peer.publish(1)
        await wait_all_tasks_blocked()
        await peer.drop()
        peer = await fake.greet()
        await peer.answer("subscribe", **KEPT | {"epoch": "f", "offset": 40, "recovered": False})
        await peer.publish(41)
        await wait_all_tasks_blocked()
        assert await take(subscription, 1) == ["n1"]
        assert subscription.gaps == 0
        assert await take(subscription, 1) == ["n41"]
        assert subscription.gaps == 1
        assert not subscription.recovered
        assert subscription.position == Position(41, "f")


async def test_without_history_each_reconnect_is_a_gap(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client() as (client, peer):
        peer.soon("subscribe")
        async with client.subscribe("news") as subscription:
            assert subscription.gaps == 0
            await peer.drop()
            peer = await fake.greet()
            assert "recover" not in await peer.answer("subscribe")
            await peer.publish(0)
            assert await take(subscription, 1) == ["n0"]
            assert subscription.gaps == 1
            assert subscription.position is None


async def test_since_recovers_from_a_saved_position(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client() as (client, peer):
        result = KEPT | {"publications": [pub(9)], "offset": 9, "recovered": True}
        peer.soon("subscribe", **result)
        async with client.subscribe("news", since=Position(8, "e")) as subscription:
            assert subscription.recovered
            assert subscription.position == Position(8, "e")
            assert await take(subscription, 1) == ["n9"]
            assert subscription.position == Position(9, "e")
            assert subscription.gaps == 0
        await peer.answer("unsubscribe")

        peer.soon("subscribe", **KEPT | {"offset": 9, "recovered": False})
        async with client.subscribe("news", since=Position(8, "d")) as subscription:
            assert not subscription.recovered
            assert subscription.position == Position(9, "e")
            assert subscription.gaps == 1


async def test_insufficient_state_subscribes_again_and_recovers(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.subscriber() as (subscription, peer):
        await peer.publish(1)
        await peer.send({"push": {"channel": "news", "unsubscribe": {"code": 2500}}})
        result = KEPT | {"publications": [pub(2)], "offset": 2, "recovered": True}
        assert (await peer.answer("subscribe", **result))["offset"] == 1
        assert await take(subscription, 2) == ["n1", "n2"]
        assert subscription.gaps == 0


async def test_unsubscribed_by_the_broker_ends_the_iteration(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client() as (client, peer):
        peer.soon("subscribe", **KEPT)
        async with client.subscribe("news") as subscription:
            await peer.publish(1)
            end = {"channel": "news", "unsubscribe": {"code": 2000, "reason": "kicked"}}
            await peer.send({"push": end})
            assert await take(subscription, 1) == ["n1"]
            for _ in range(2):
                with pytest.raises(RequestFailed, match="2000: kicked"):
                    await anext(subscription)
            peer.soon("subscribe", **KEPT)
            async with client.subscribe("news"):
                pass  # the topic is free again


async def test_a_refused_subscription_raises_when_entered(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client() as (client, peer):
        fake.nursery.start_soon(peer.refuse, "subscribe", 103)
        with pytest.raises(RequestFailed, match="103"):
            async with client.subscribe("secret"):
                pytest.fail("subscribed")


async def test_refused_after_a_reconnect_ends_the_iteration(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.subscriber() as (subscription, peer):
        await peer.drop()
        await (await fake.greet()).refuse("subscribe", 103)
        with pytest.raises(RequestFailed, match="103"):
            await anext(subscription)


async def test_a_temporary_refusal_is_asked_again(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client() as (client, peer):

        async def serve() -> None:
            for _ in range(5):
                await peer.refuse("subscribe", 100, temporary=True)
            await peer.answer("subscribe", **KEPT)

        fake.nursery.start_soon(serve)
        async with client.subscribe("news"):
            pass


async def test_subscribing_survives_a_drop_before_the_reply(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client() as (client, peer):

        async def serve() -> None:
            await peer.expect("subscribe")
            await peer.drop()
            again = await fake.greet()
            assert "recover" not in await again.answer("subscribe", **KEPT)
            await again.publish(1)

        fake.nursery.start_soon(serve)
        async with client.subscribe("news") as subscription:
            assert await take(subscription, 1) == ["n1"]
            assert subscription.gaps == 0


async def test_one_subscription_per_topic_and_leaving_unsubscribes(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client() as (client, peer):
        peer.soon("subscribe", **KEPT)
        async with client.subscribe("news") as subscription:
            with pytest.raises(ClientError, match="already subscribed to 'news'"):
                async with client.subscribe("news"):
                    pytest.fail("subscribed twice")
        assert (await peer.expect("unsubscribe"))["unsubscribe"] == {"channel": "news"}
        with pytest.raises(StopAsyncIteration):
            await anext(subscription)
        await peer.publish(1)  # was on its way
        peer.soon("subscribe", **KEPT)
        async with client.subscribe("news") as subscription:
            await peer.publish(2)
            assert await take(subscription, 1) == ["n2"]


async def test_cancelled_while_subscribing_unsubscribes(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client() as (client, peer):
        with trio.move_on_after(1):
            async with client.subscribe("news"):
                pytest.fail("subscribed")
        await peer.answer("subscribe", **KEPT)
        await peer.expect("unsubscribe")
        peer.soon("subscribe", **KEPT)
        async with client.subscribe("news"):
            pass


async def test_a_pattern_gives_the_concrete_topics(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client() as (client, peer):
        peer.soon("subscribe", **KEPT)
        async with client.subscribe("news.*") as subscription:
            for topic, offset in (("news.a", 7), ("news.b", 2)):
                one = pub(offset) | {"channel": topic}
                await peer.send({"push": {"channel": "news.*", "pub": one}})
            got = [await anext(subscription) for _ in range(2)]
            assert [(each.topic, each.offset) for each in got] == [("news.a", 7), ("news.b", 2)]


async def test_join_and_leave_come_in_order_with_publications(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client() as (client, peer):
        asked: list[Any] = []

        async def serve() -> None:
            asked.append(await peer.answer("subscribe", **KEPT))
            somebody = {"info": {"client": "3", "user": ""}}
            await peer.send({"push": {"channel": "news", "join": somebody}})
            await peer.publish(1)
            await peer.send({"push": {"channel": "news", "leave": somebody}})

        fake.nursery.start_soon(serve)
        async with client.subscribe("news", join_leave=True) as subscription:
            items = [await anext(subscription) for _ in range(3)]
        assert asked[0]["join_leave"] is True
        assert items == [
            Join("news", ClientInfo("3")),
            Publication("news", b'"n1"', None, 1),
            Leave("news", ClientInfo("3")),
        ]


# Slow consumers.


async def test_a_slow_consumer_stops_the_reading_and_loses_nothing(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    fake.pair = lockstep_stream_pair
    count = 4 * INBOX_MESSAGES
    sent = 0
    async with fake.subscriber() as (subscription, peer), trio.open_nursery() as nursery:

        async def flood() -> None:
            nonlocal sent
            for offset in range(1, count + 1):
                await peer.publish(offset)
                sent = offset

        nursery.start_soon(flood)
        await trio.sleep(100)
        # Beyond the bound: what trio-websocket holds, and what is in its hands.
        assert INBOX_MESSAGES <= sent <= INBOX_MESSAGES + 3
        assert await take(subscription, count) == [f"n{n}" for n in range(1, count + 1)]
        assert len(fake.dials) == 1


async def test_a_consumer_may_ask_while_far_more_waits_than_the_bound(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    count = 4 * INBOX_MESSAGES
    async with fake.client() as (client, peer):
        peer.soon("subscribe", **KEPT)
        async with client.subscribe("news") as subscription:
            for offset in range(1, count + 1):
                await peer.publish(offset)
            await wait_all_tasks_blocked()
            assert await take(subscription, 1) == ["n1"]
            peer.soon("publish")
            with trio.fail_after(5):
                await client.publish("echo", 1)
            assert len(await take(subscription, count - 1)) == count - 1


async def test_silence_of_a_broker_we_do_not_read_is_not_death(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client(ping=20, pong=True) as (client, peer):
        peer.soon("subscribe", **KEPT)
        async with client.subscribe("news"):
            for offset in range(1, 2 * INBOX_MESSAGES):
                await peer.publish(offset)
            await trio.sleep(100)
            assert len(fake.dials) == 1
        # Nobody is behind any more, so the reading goes on.
        await peer.answer("unsubscribe")
        peer.soon("publish")
        await client.publish("news", 1)


# Messages to this fd.


async def test_messages_are_direct_messages_and_what_the_server_pushes(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client() as (client, peer):
        direct = {"data": "hello", "info": {"client": "3", "user": "al"}}
        await peer.send(
            {"push": {"channel": "fd:1", "pub": direct}},
            {"push": {"message": {"data": {"a": 1}}}},
            {"push": {"channel": "user:al", "subscribe": {}}},
            {"push": {"channel": "user:al", "pub": {"data": 2}}},
            {"push": {"channel": "stray", "pub": {"data": 3}}},
            {"push": {"channel": "user:al", "unsubscribe": {"code": 2000}}},
            {"push": {"channel": "user:al", "pub": {"data": 4}}},
            {"push": {"message": {"data": 5}}},
        )
        got = [await anext(client.messages) for _ in range(4)]
        assert got[0] == Publication("fd:1", b'"hello"', ClientInfo("3", "al"))
        assert [(each.topic, each.value) for each in got[1:]] == [
            ("fd:1", {"a": 1}),
            ("user:al", 2),
            ("fd:1", 5),
        ]


async def test_messages_nobody_asked_for_do_not_stop_the_client(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client() as (client, peer):
        for number in range(INBOX_MESSAGES + 10):
            await peer.send({"push": {"message": {"data": number}}})
        peer.soon("publish")
        await client.publish("news", 1)
        assert client.messages.dropped == 10
        assert (await anext(client.messages)).value == 10


def test_a_close_code_says_whether_to_come_back() -> None:
    final = [code for code in range(1000, 5000) if Lost(code, "").final]
    assert final == [*range(3500, 4000), *range(4500, 5000)]
