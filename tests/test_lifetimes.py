"""The ends of all that lives: handshakes, stops, drains, hooks that hang, peers that do not read, cancellation
at any moment. After each test nothing may be left running."""

import json
import random
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import structlog.testing
import trio
import trio.testing
import trustme
from trio.testing import MockClock, wait_all_tasks_blocked

from broker import (
    Broker,
    Close,
    Config,
    ConnectEvent,
    Connection,
    ConnectReply,
    Disconnect,
    Frame,
    Initiator,
    Refused,
    SubscribeEvent,
    TopicPattern,
    TopicRules,
    WebhookRules,
)
from broker.testing import (
    Closed,
    MemoryListener,
    Network,
    Peer,
    client_frame,
    handshake,
    open_test_broker,
)
from broker.transport import frames

LOCKSTEP = trio.testing.lockstep_stream_pair


@pytest.fixture(autouse=True)
async def nothing_is_left(nursery: trio.Nursery) -> AsyncIterator[None]:
    """No task and no deadline more than there were."""
    before = trio.lowlevel.current_statistics()
    yield
    after = trio.lowlevel.current_statistics()
    assert after.tasks_living == before.tasks_living


# the handshake


@pytest.mark.parametrize("steps", range(12))
async def test_nothing_is_sent_before_the_handshake_is_answered(
    autojump_clock: MockClock, steps: int
) -> None:
    """Anything may be done to an fd that nobody can have yet, at each step of its handshake."""
    async with open_test_broker(Broker()) as net:
        peer = await net.connect()
        await peer.send(handshake())
        for _ in range(steps):
            await trio.lowlevel.checkpoint()
        net.broker.push(1, "too early")
        with suppress(Refused):
            net.broker.publish_nowait("fd:1", "too early")
        net.broker.disconnect(1)
        head = await peer.receive_head()
        assert head.startswith("HTTP/1.1 101 ")


@pytest.mark.parametrize("steps", range(20))
async def test_a_stop_in_the_middle_of_a_handshake_is_told_after_it(
    autojump_clock: MockClock, steps: int
) -> None:
    async with open_test_broker(Broker()) as net:
        peer = await net.connect()
        await peer.send(handshake())
        for _ in range(steps):
            await trio.lowlevel.checkpoint()
        net.broker.stop()
        head = await peer.receive_head()
        if head.startswith("HTTP/1.1 101 "):
            assert await peer.receive_close() == (1001, "shutdown")
        else:
            assert head.startswith("HTTP/1.1 503 ")


# stopping


async def test_200_clients_at_a_stop_each_get_what_was_queued_and_their_code(
    autojump_clock: MockClock,
) -> None:
    broker = Broker()
    ends: Counter[tuple[bool, Any]] = Counter()

    async def follow(peer: Peer, plain: bool) -> None:
        *seen, last = [o async for o in objects(peer)]
        words = "last words" if plain else {"data": "last words"}
        assert words in (seen if plain else [o.get("push", {}).get("pub") for o in seen])
        if not plain:
            assert seen[-1] == {"push": {"disconnect": {"code": 3001, "reason": "shutdown"}}}
        ends[plain, last] += 1
        await peer.send_close(1000)
        assert await peer.receive_eof() == b""

    async with trio.open_nursery() as clients:
        async with open_test_broker(broker) as net:
            for number in range(200):
                plain = number % 2 == 0
                peer = await (net.open_plain() if plain else net.open_client())
                clients.start_soon(follow, peer, plain)
            for info in broker.connections(limit=200):
                broker.publish_nowait(f"fd:{info.fd}", "last words")
            began = trio.current_time()
        assert trio.current_time() - began < Config().drain_seconds
    assert ends == {(True, 1001): 100, (False, 3001): 100}


async def objects(peer: Peer) -> AsyncIterator[Any]:
    try:
        while True:
            for line in (await peer.receive_text()).split("\n"):
                yield json.loads(line) if line[:1] == "{" else line
    except Closed as closed:
        yield closed.code


async def test_before_a_stop_balancers_are_told_and_all_goes_on(autojump_clock: MockClock) -> None:
    broker = Broker(Config(drain_notice_seconds=10))

    async def status(net: Network, path: str) -> str:
        async with await net.connect() as peer:
            await peer.send(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            return (await peer.receive_head()).split()[1]

    async with open_test_broker(broker) as net:
        early = await net.open_plain()
        assert [await status(net, path) for path in ("/readyz", "/healthz")] == ["200", "200"]
        began = trio.current_time()
        broker.stop()
        await trio.sleep(9)
        assert [await status(net, path) for path in ("/readyz", "/healthz")] == ["503", "200"]
        late = await net.open_plain()
        for peer in (early, late):
            assert await peer.receive_close() == (1001, "shutdown")
            assert trio.current_time() - began == pytest.approx(10, abs=0.5)
            await peer.aclose()


@pytest.mark.parametrize(
    ("clients", "rate", "seconds"), [(50, 1000, 0), (200, 100, 2), (200, 1, 2.5)]
)
async def test_goodbyes_are_spread_where_many_would_come_back_at_once(
    autojump_clock: MockClock, clients: int, rate: float, seconds: float
) -> None:
    """Over no more than half of what a stop has, whatever the rate."""
    broker, heard = Broker(Config(goodbye_rate=rate, drain_seconds=5)), []

    async def follow(peer: Peer) -> None:
        assert await peer.receive_close() == (1001, "shutdown")
        heard.append(trio.current_time())
        await peer.aclose()

    async with trio.open_nursery() as nursery:
        async with open_test_broker(broker) as net:
            for _ in range(clients):
                peer = await net.open_plain()
                nursery.start_soon(follow, peer)
            began = trio.current_time()
    assert len(heard) == clients
    assert max(heard) - began == pytest.approx(seconds, abs=0.1)
    lots = Counter(round(when - began, 1) for when in heard)
    assert max(lots.values()) <= max(clients / max(1, 10 * seconds) * 1.5, 50)


@pytest.mark.parametrize("make_pair", [trio.testing.memory_stream_pair, LOCKSTEP])
async def test_a_peer_that_does_not_leave_at_a_stop_is_cut_at_the_drain_deadline(
    autojump_clock: MockClock, make_pair: Any
) -> None:
    broker = Broker(Config(drain_seconds=3, close_seconds=60))
    async with open_test_broker(broker) as net:
        peers = [await net.open_plain(make_pair=make_pair) for _ in range(3)]
        for peer in peers:
            broker.push(peer.fd, "x")
        began = trio.current_time()
    assert trio.current_time() - began == pytest.approx(3)
    for peer in peers:
        await peer.receive_eof()


async def test_the_order_of_stopping(autojump_clock: MockClock) -> None:
    broker = Broker()
    listener = MemoryListener()
    seen: list[str] = []

    @broker.on_message
    async def on_message(connection: Connection, frame: Frame) -> None:
        seen.append(f"begin {frame.data!r}")
        await trio.sleep(2)
        broker.publish_nowait("news", "from a hook that was running")
        seen.append("end")

    @broker.on_close
    async def on_close(connection: Connection, close: Close) -> None:
        await trio.sleep(0.5)
        broker.publish_nowait("news", "from a close hook")
        seen.append("closed")

    async with trio.open_nursery() as nursery:
        await nursery.start(lambda **kw: broker.serve(listeners=[listener], **kw))
        net = Network(broker, listener)
        peer = await net.open_plain()
        await peer.send_text("work")
        await wait_all_tasks_blocked()
        broker.stop()
        assert broker.draining
        await wait_all_tasks_blocked()
        with pytest.raises((trio.BrokenResourceError, trio.ClosedResourceError)):
            await net.connect()
        # It was told at once; what it is busy with is finished.
        assert await peer.receive_all() == [1001]
        await peer.send_close(1001)
    assert seen == ["begin 'work'", "end", "closed"]


async def test_a_stop_while_nobody_is_there_is_done_at_once(autojump_clock: MockClock) -> None:
    began = trio.current_time()
    async with open_test_broker(Broker()):
        pass
    assert trio.current_time() == began


async def test_a_connection_that_has_said_nothing_yet_is_cut_at_the_drain_deadline(
    autojump_clock: MockClock,
) -> None:
    async with open_test_broker(Broker(Config(drain_seconds=2, open_seconds=60))) as net:
        peer = await net.connect()
        await wait_all_tasks_blocked()
        began = trio.current_time()
    assert trio.current_time() - began == pytest.approx(2)
    assert await peer.receive_eof() == b""


async def test_to_cancel_serve_leaves_no_task_and_no_open_stream(autojump_clock: MockClock) -> None:
    theirs: list[trio.abc.Stream] = []

    def make_pair() -> Any:
        pair = trio.testing.memory_stream_pair()
        theirs.append(pair[1])
        return pair

    broker = Broker()
    tasks = trio.lowlevel.current_statistics().tasks_living
    with trio.CancelScope() as scope:
        async with open_test_broker(broker) as net:
            await net.connect(make_pair)
            half = await net.connect(make_pair)
            await half.send(handshake()[:20])
            await net.open_plain(make_pair=make_pair)
            client = await net.open_client(make_pair)
            await client.request(subscribe={"channel": "news"})
            stuck = await net.open_plain(make_pair=LOCKSTEP)
            broker.push(stuck.fd, "x" * 1000)
            await wait_all_tasks_blocked()
            scope.cancel()
            await trio.sleep_forever()
    assert trio.lowlevel.current_statistics().tasks_living == tasks
    assert len(theirs) == 4
    for stream in theirs:
        with pytest.raises(trio.ClosedResourceError):
            await stream.send_all(b"x")
    assert not broker.exists(client.fd)


# hooks


async def hang(*_: object) -> None:
    await trio.sleep_forever()


async def by_leaving(net: Network, peer: Peer) -> None:
    await peer.aclose()


async def by_close(net: Network, peer: Peer) -> None:
    await peer.send_close()


async def by_disconnect(net: Network, peer: Peer) -> None:
    net.broker.disconnect(peer.fd)


@pytest.mark.parametrize("hook", ["on_open", "on_message"])
@pytest.mark.parametrize("how", [by_leaving, by_close, by_disconnect])
async def test_a_hook_that_hangs_is_cancelled_close_seconds_after_the_end(
    autojump_clock: MockClock, hook: str, how: Callable[[Network, Peer], Awaitable[None]]
) -> None:
    broker = Broker(Config(close_seconds=3))
    getattr(broker, hook)(hang)
    closed: list[float] = []

    @broker.on_close
    async def on_close(connection: Connection, close: Close) -> None:
        closed.append(trio.current_time())

    async with open_test_broker(broker) as net:
        peer = await net.open_plain()
        await peer.send_text("x")
        await trio.sleep(15)
        assert broker.exists(peer.fd)
        await how(net, peer)
        began = trio.current_time()
        await trio.sleep(20)
        assert not broker.exists(peer.fd)
    ((at),) = closed
    # A peer that was sent our Close, and does not answer, has that time once more.
    assert at - began == pytest.approx(6 if how is by_disconnect else 3)


async def test_a_close_hook_that_hangs_is_cancelled_too(autojump_clock: MockClock) -> None:
    broker = Broker(Config(close_seconds=3))
    broker.on_close(hang)
    async with open_test_broker(broker) as net:
        peer = await net.open_plain()
        await peer.aclose()
        await trio.sleep(2.9)
        assert len(net.node.router.hub.sessions) == 1
        await trio.sleep(0.2)
        assert len(net.node.router.hub.sessions) == 0


async def by_answered_close(net: Network, peer: Peer) -> None:
    net.broker.disconnect(peer.fd)
    await peer.send_close()


@pytest.mark.parametrize(
    ("how", "fallback"),
    [
        (by_leaving, False),
        (by_close, False),
        (by_answered_close, False),
        (by_leaving, True),
        (by_disconnect, True),
    ],
)
async def test_the_socket_closes_before_the_close_hook_begins(
    autojump_clock: MockClock, how: Callable[[Network, Peer], Awaitable[None]], fallback: bool
) -> None:
    broker = Broker()
    theirs: list[trio.abc.Stream] = []
    closed: list[tuple[int, float]] = []

    def make_pair() -> Any:
        pair = trio.testing.memory_stream_pair()
        theirs.append(pair[1])
        return pair

    @broker.on_close
    async def on_close(connection: Connection, close: Close) -> None:
        with pytest.raises(trio.ClosedResourceError):
            await theirs[0].send_all(b"?")
        closed.append((connection.fd, trio.current_time()))
        await trio.sleep(3)

    async with open_test_broker(broker) as net:
        if fallback:
            peer = await net.connect(make_pair)
            await peer.send(b"GET /connection/uni_sse HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert " 200 " in await peer.receive_head()
            peer.fd = 1
        else:
            peer = await net.open_plain(make_pair=make_pair)
        began = trio.current_time()
        await how(net, peer)
        if how is not by_leaving:
            await peer.receive_eof()
            assert trio.current_time() == began
        await trio.sleep(1)
        assert len(net.node.router.hub.sessions) == 1
        await trio.sleep(3)
        assert len(net.node.router.hub.sessions) == 0
    assert closed == [(peer.fd, began)]


EVERY_HOOK = (
    *("open", "message", "close", "connect", "subscribe", "publish", "presence", "history", "rpc"),
    *("request", "event"),
)
ASKS: dict[str, dict[str, object]] = {
    "subscribe": {"channel": "a"},
    "publish": {"channel": "a", "data": 1},
    "presence": {"channel": "a"},
    "history": {"channel": "a"},
    "rpc": {"method": "mine"},
    "message": {"data": 1},
}


async def ask_all(net: Network, kinds: tuple[str, ...]) -> None:
    """Have each of these hooks called once, by peers that go on and by one that takes nothing."""
    for kind in kinds:
        if kind == "request":
            peer = await net.connect()
            await peer.send(b"GET /mine HTTP/1.1\r\nHost: a\r\n\r\n")
        elif kind in ASKS and "connect" not in kinds:
            peer = await net.open_client()
            method = "send" if kind == "message" else kind
            await peer.send_json({"id": 0 if method == "send" else 2, method: ASKS[kind]})
        else:
            peer = await net.open_websocket()
            await peer.send_json({"id": 1, "connect": {}})
    stuck = await net.open_plain(make_pair=LOCKSTEP)
    net.broker.push(stuck.fd, "x")
    leaving = await net.open_plain()
    await wait_all_tasks_blocked()
    await leaving.aclose()  # its close hook is under way when the stop comes
    await wait_all_tasks_blocked()


@pytest.mark.parametrize(
    ("config", "bound"),
    [
        (Config(), 5 + 1 + 3),
        (Config(close_seconds=60), 5 + 1 + 3),
        (Config(drain_seconds=0), 0 + 1 + 3),
        (Config(drain_seconds=3, webhooks=WebhookRules(flush_seconds=0)), 3 + 1 + 0),
    ],
)
@pytest.mark.parametrize("kinds", [*((kind,) for kind in EVERY_HOOK), EVERY_HOOK])
async def test_a_stop_has_its_bound_however_the_hooks_hang(
    autojump_clock: MockClock, config: Config, bound: float, kinds: tuple[str, ...]
) -> None:
    """`drain_seconds`, a second for last words, `flush_seconds`."""
    broker = Broker(config)
    for kind in kinds:
        if kind in ("message", "rpc"):
            signature: Any = {"message": hang_two, "rpc": hang_three}[kind]
            getattr(broker, f"on_{kind}")(signature)
        else:
            getattr(broker, f"on_{kind}")(hang_two if kind == "close" else hang_one)
    async with open_test_broker(broker) as net:
        await ask_all(net, kinds)
        began = trio.current_time()
    took = trio.current_time() - began
    assert took <= bound + 0.001
    if kinds == EVERY_HOOK:
        assert took == pytest.approx(bound)


async def hang_one(event: object) -> None:
    await trio.sleep_forever()


async def hang_two(connection: object, more: object) -> None:
    await trio.sleep_forever()


async def hang_three(connection: object, method: str, data: object) -> object:
    await trio.sleep_forever()


async def test_to_cancel_serve_leaves_a_second_for_close_hooks(autojump_clock: MockClock) -> None:
    broker = Broker()
    broker.on_close(hang_two)
    with trio.CancelScope() as scope:
        async with open_test_broker(broker) as net:
            for _ in range(3):
                peer = await net.open_plain()
            await peer.aclose()
            await wait_all_tasks_blocked()
            began = trio.current_time()
            scope.cancel()
            await trio.sleep_forever()
    assert trio.current_time() - began == pytest.approx(1)


def tls_pair() -> tuple[trio.abc.Stream, trio.abc.Stream]:
    """Two ends of TLS, in memory."""
    authority = trustme.CA()
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("a").configure_cert(server)
    client = ssl.create_default_context()
    authority.configure_trust(client)
    ours, theirs = trio.testing.memory_stream_pair()
    return (
        trio.SSLStream(ours, client, server_hostname="a"),
        trio.SSLStream(theirs, server, server_side=True),
    )


@pytest.mark.parametrize("hook", ["open", "close", "none"])
@pytest.mark.parametrize("make_pair", [trio.testing.memory_stream_pair, tls_pair])
async def test_without_time_to_drain_everybody_is_still_told(
    autojump_clock: MockClock, make_pair: Any, hook: str
) -> None:
    broker = Broker(Config(drain_seconds=0))
    if hook == "open":
        broker.on_open(hang_one)
    elif hook == "close":
        broker.on_close(hang_two)
    heard = []

    async def listen(peer: Peer) -> None:
        heard.append((peer, *await peer.receive_close()))

    async with trio.open_nursery() as listeners:
        async with open_test_broker(broker) as net:
            for _ in range(20):
                listeners.start_soon(listen, await net.open_plain(make_pair=make_pair))  # noqa: ASYNC111 - peers outlive the broker
                if hook != "open":
                    listeners.start_soon(listen, await net.open_client(make_pair))  # noqa: ASYNC111
            for info in broker.connections(limit=100):
                broker.push(info.fd, "last words")
            began = trio.current_time()
        assert trio.current_time() - began == (1 if hook == "close" else 0)
    assert Counter(code for _, code, _ in heard) == (
        {1001: 20} if hook == "open" else {1001: 20, 3001: 20}
    )


async def raise_one(*_: object) -> None:
    raise ZeroDivisionError


async def raise_group(*_: object) -> None:
    raise ExceptionGroup("two", [ZeroDivisionError(), ExceptionGroup("one", [KeyError()])])


async def raise_in_a_nursery(*_: object) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(raise_one)
        nursery.start_soon(trio.sleep_forever)


@pytest.mark.parametrize("hook", ["on_open", "on_message", "on_close"])
@pytest.mark.parametrize("fail", [raise_one, raise_group, raise_in_a_nursery])
async def test_a_hook_that_raises_ends_its_own_connection_only(
    autojump_clock: MockClock,
    hook: str,
    fail: Callable[..., Awaitable[None]],
) -> None:
    """And it is the hook that the log names, not the connection."""
    broker = Broker()
    with structlog.testing.capture_logs() as lines:
        async with open_test_broker(broker) as net:
            bystander, reader = await net.open_client(), await net.open_client()
            await reader.request(subscribe={"channel": "news"})
            getattr(broker, hook)(fail)
            peer = await net.open_plain()
            await peer.send_text("x")
            if hook == "on_close":
                await peer.aclose()
            else:
                assert await peer.receive_close() == (1011, "internal error")
                await peer.send_close(1011)
            await wait_all_tasks_blocked()
            assert not broker.exists(peer.fd)
            await bystander.request(publish={"channel": "news", "data": "still here"})
            assert (await reader.receive_json())["push"]["pub"]["data"] == "still here"
    failures = [line for line in lines if line["log_level"] == "error"]
    assert {(line["event"], line.get("hook")) for line in failures} == {
        ("hook_failed", hook.removeprefix("on_"))
    }


async def test_a_hook_may_clean_up_slowly_and_even_fail_at_it_when_it_is_cancelled(
    autojump_clock: MockClock,
) -> None:
    broker = Broker(Config(close_seconds=1))

    @broker.on_message
    async def on_message(connection: Connection, frame: Frame) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            try:
                await trio.sleep_forever()
            finally:
                raise ZeroDivisionError

    async with open_test_broker(broker) as net:
        peer = await net.open_plain()
        await peer.send_text("x")
        await peer.send_close()
        await peer.receive_eof()
        await wait_all_tasks_blocked()
        assert not broker.exists(peer.fd)
        assert (await net.open_plain()).fd == 2


# messages and the end


@pytest.mark.parametrize("how", [by_close, by_leaving])
async def test_messages_sent_right_before_the_end_are_still_handled(
    autojump_clock: MockClock, how: Callable[[Network, Peer], Awaitable[None]]
) -> None:
    broker = Broker()
    seen: list[str | bytes] = []

    @broker.on_message
    async def on_message(connection: Connection, frame: Frame) -> None:
        await trio.sleep(0.01)
        seen.append(frame.data)

    async with open_test_broker(broker) as net:
        reader = await net.open_client()
        await reader.request(subscribe={"channel": "news"})
        peer, client = await net.open_plain(), await net.open_client()
        for number in range(20):
            await peer.send_text(str(number))
            await client.send_json({"publish": {"channel": "news", "data": number}})
        await how(net, peer)
        await how(net, client)
        pushes = [o["push"]["pub"]["data"] for o in await reader.receive_all()]
        await trio.sleep(1)
    assert pushes == list(range(20))
    assert seen == [str(number) for number in range(20)]


async def test_nothing_is_handled_after_our_close(autojump_clock: MockClock) -> None:
    broker = Broker()
    seen: list[str | bytes] = []

    @broker.on_message
    async def on_message(connection: Connection, frame: Frame) -> None:
        seen.append(frame.data)
        if frame.data == "2":
            raise Disconnect(4000, "enough")

    async with open_test_broker(broker) as net:
        peer = await net.open_plain()
        texts = [client_frame(frames.TEXT, text) for text in (b"1", b"2", b"3")]
        await peer.send(b"".join(texts))
        assert await peer.receive_close() == (4000, "enough")
        await peer.send_text("4")
    assert seen == ["1", "2"]


@pytest.mark.parametrize("began", ["by the peer", "by a limit"])
async def test_nothing_follows_the_close_frame_while_a_hook_is_still_busy(
    autojump_clock: MockClock, began: str
) -> None:
    broker = Broker(Config(max_message_bytes=100))

    @broker.on_rpc
    async def on_rpc(connection: Connection, method: str, data: object) -> None:
        await trio.sleep(1)

    async with open_test_broker(broker) as net:
        client = await net.open_client()
        await client.request(subscribe={"channel": "news"})
        await client.send_json({"id": 2, "rpc": {}})
        if began == "by the peer":
            await client.send_close()
        else:
            await client.send(client_frame(frames.TEXT, b"x" * 101))
        await wait_all_tasks_blocked()
        broker.publish_nowait("news", "late")
        broker.publish_nowait("news", "later")
        opcode, _ = await client.receive_frame()
        assert opcode == frames.CLOSE
        with pytest.raises(Closed):
            await client.receive_frame()


# heartbeats


@pytest.mark.parametrize("make_pair", [trio.testing.memory_stream_pair, LOCKSTEP])
@pytest.mark.parametrize("speaks", ["plain", "centrifuge"])
async def test_a_half_open_peer_is_given_up_after_a_ping_and_its_time(
    autojump_clock: MockClock, make_pair: Any, speaks: str
) -> None:
    broker = Broker(Config(ping_seconds=20, pong_seconds=8, close_seconds=3))
    closes: list[Close] = []

    @broker.on_close
    async def on_close(connection: Connection, close: Close) -> None:
        closes.append(close)

    async with open_test_broker(broker) as net:
        opened = net.open_plain if speaks == "plain" else net.open_client
        peer = await opened(make_pair=make_pair)
        await trio.sleep(27.9)
        assert broker.is_established(peer.fd)
        await trio.sleep(8.2)
        assert not broker.exists(peer.fd)
    (close,) = closes
    assert close.initiator is Initiator.HEARTBEAT
    assert close.code == (1011 if speaks == "plain" else 3012)


async def test_a_plain_peer_is_pinged_when_it_is_silent_and_stays_if_it_answers(
    autojump_clock: MockClock,
) -> None:
    async with open_test_broker(Broker()) as net:
        peer = await net.open_plain()
        for _ in range(3):
            began = trio.current_time()
            assert await peer.receive_frame() == (frames.PING, b"")
            assert trio.current_time() - began == pytest.approx(20, abs=1.1)
            await trio.sleep(9)
            await peer.send(client_frame(frames.PONG))
        assert net.broker.is_established(peer.fd)


async def test_a_plain_peer_that_talks_is_not_pinged(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker()) as net:
        peer = await net.open_plain()
        for _ in range(10):
            await trio.sleep(15)
            await peer.send_text("x")
        with trio.move_on_after(15):
            await peer.receive_frame()
            pytest.fail("nothing was due")


async def test_a_peer_that_is_not_read_because_its_session_is_busy_is_not_called_dead(
    autojump_clock: MockClock,
) -> None:
    broker = Broker(Config(inbox_batches=1))
    handled: list[str | bytes] = []

    @broker.on_message
    async def on_message(connection: Connection, frame: Frame) -> None:
        await trio.sleep(60)
        handled.append(frame.data)

    async with open_test_broker(broker) as net:
        peer = await net.open_plain()
        for number in range(6):
            await peer.send_text(str(number))
            await wait_all_tasks_blocked()
        for _ in range(80):
            await trio.sleep(5)
            await peer.send(client_frame(frames.PONG))  # it is alive, though we do not read that
        assert broker.is_established(peer.fd)
        assert handled == [str(number) for number in range(6)]


# slow readers


def outbox_of(net: Network, peer: Peer) -> Any:
    return net.outbox(peer.fd)


async def test_a_reader_that_never_reads_delays_nobody_and_is_cut(
    autojump_clock: MockClock,
) -> None:
    broker = Broker(Config(outbox_messages=50, outbox_bytes=10_000))
    closes: list[Close] = []

    @broker.on_close
    async def on_close(connection: Connection, close: Close) -> None:
        closes.append(close)

    async with open_test_broker(broker) as net:
        stalled = await net.open_client(make_pair=LOCKSTEP)
        fast, publisher = await net.open_client(), await net.open_client()
        for client in (stalled, fast):
            await client.request(subscribe={"channel": "news"})
        outbox = outbox_of(net, stalled)
        most = 0
        with trio.fail_after(1):  # virtual: nobody waits at all
            for number in range(500):
                data = {"channel": "news", "data": f"{number:0200}"}
                await publisher.send_json({"publish": data})
                got = await fast.receive_json()
                assert int(got["push"]["pub"]["data"]) == number
                most = max(most, outbox.bytes)
        assert most < 10_000 + 1000
        assert not broker.is_established(stalled.fd)
        await trio.sleep(30)
        assert not broker.exists(stalled.fd)
    assert closes[0].code == 3008
    assert closes[0].initiator is Initiator.SLOW
    assert closes[0].undelivered > 10


async def test_a_slow_client_that_reads_on_is_told_3008(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker(Config(outbox_messages=5))) as net:
        slow = await net.open_client(make_pair=LOCKSTEP)
        await slow.request(subscribe={"channel": "news"})
        for number in range(20):
            net.broker.publish_nowait("news", number)
            await wait_all_tasks_blocked()
        *seen, push, close = await slow.receive_all()
        assert push == {"push": {"disconnect": {"code": 3008, "reason": "slow"}}}
        assert close == 3008
        numbers = [o["push"]["pub"]["data"] for o in seen]
        assert numbers == list(range(len(numbers)))


async def publish_slowly(net: Network, topic: str, numbers: range) -> None:
    for number in numbers:
        net.broker.publish_nowait(topic, number)
        await wait_all_tasks_blocked()


async def test_drop_oldest_keeps_the_newest(autojump_clock: MockClock) -> None:
    rules = TopicRules(history_size=0, slow_consumer="drop_oldest")
    async with open_test_broker(Broker(Config(outbox_messages=5, topics=rules))) as net:
        slow = await net.open_client(make_pair=LOCKSTEP)
        await slow.request(subscribe={"channel": "news"})
        await publish_slowly(net, "news", range(30))
        outbox = outbox_of(net, slow)
        assert outbox.messages == 5
        numbers = [o["push"]["pub"]["data"] for o in await slow.receive_all()]
        assert outbox.dropped == 30 - len(numbers)
        assert numbers == sorted(numbers)
        assert numbers[-4:] == [26, 27, 28, 29]
        await publish_slowly(net, "news", range(30, 33))
        assert [o["push"]["pub"]["data"] for o in await slow.receive_all()] == [30, 31, 32]


async def test_latest_keeps_the_newest_of_each_topic(autojump_clock: MockClock) -> None:
    rules = TopicRules(history_size=0, slow_consumer="latest")
    async with open_test_broker(Broker(Config(outbox_messages=5, topics=rules))) as net:
        slow = await net.open_client(make_pair=LOCKSTEP)
        for name in ("a", "b"):
            await slow.request(subscribe={"channel": name})
        net.broker.publish_nowait("b", "only b")
        await publish_slowly(net, "a", range(30))
        seen = [(o["push"]["channel"], o["push"]["pub"]["data"]) for o in await slow.receive_all()]
        assert seen[0] == ("b", "only b")
        assert seen[-1] == ("a", 29)
        assert len(seen) <= 7
        assert net.broker.is_established(slow.fd)


@pytest.mark.parametrize("rule", ["drop_oldest", "latest"])
@pytest.mark.parametrize("asks", [True, False])
async def test_a_client_that_can_recover_learns_of_the_gap_and_loses_nothing(
    autojump_clock: MockClock, rule: Any, asks: bool
) -> None:
    rules = TopicRules(slow_consumer=rule)
    async with open_test_broker(Broker(Config(outbox_messages=5, topics=rules))) as net:
        slow = await net.open_client(make_pair=LOCKSTEP)
        reply = await slow.request(subscribe={"channel": "news", "recoverable": asks})
        epoch = reply["subscribe"].get("epoch", "")
        await publish_slowly(net, "news", range(1, 31))
        seen = await slow.receive_all()
        pushes = [o["push"] for o in seen]
        numbers = [push["pub"]["data"] for push in pushes if "pub" in push]
        gaps = [push for push in pushes if "unsubscribe" in push]
        if not asks:  # no gap for whom a gap is no use: the rule's own pick arrives
            assert gaps == []
            assert numbers[-1] == 30
            return
        gap = {"code": 2500, "reason": "insufficient state"}
        assert pushes[-1] == {"channel": "news", "unsubscribe": gap}
        assert numbers == list(range(1, len(numbers) + 1))
        fields = {"channel": "news", "recover": True, "offset": len(numbers), "epoch": epoch}
        reply = await slow.request(subscribe=fields)
        assert reply["subscribe"]["recovered"]
        numbers += [p["data"] for p in reply["subscribe"]["publications"]]
        await publish_slowly(net, "news", range(31, 33))
        numbers += [o["push"]["pub"]["data"] for o in await slow.receive_all()]
        assert numbers == list(range(1, 33))


async def test_a_reason_that_cannot_be_sent_still_ends_the_connection(
    autojump_clock: MockClock,
) -> None:
    async with open_test_broker(Broker()) as net:
        plain, client = await net.open_plain(), await net.open_client()
        for peer in (plain, client):
            assert net.broker.disconnect(peer.fd, 4000, "no \ud800")
            assert await peer.receive_close() == (4000, "no ?")


NOISE = TopicPattern("noise", TopicRules(history_size=0, slow_consumer="drop_oldest"))


@pytest.mark.parametrize("rule, room", [("close", 10), ("drop_oldest", 2), ("latest", 10)])
async def test_a_run_about_to_fan_out_does_not_come_behind_a_gap(
    autojump_clock: MockClock, rule: Any, room: int
) -> None:
    rules = TopicRules(slow_consumer=rule)
    config = Config(outbox_messages=8, topics=rules, patterns=(NOISE,))
    async with open_test_broker(Broker(config)) as net:
        slow = await net.open_client(make_pair=LOCKSTEP)
        await slow.request(subscribe={"channel": "noise"})
        await slow.request(subscribe={"channel": "news", "recoverable": True})
        await publish_slowly(net, "noise", range(20))
        outbox = outbox_of(net, slow)
        assert (outbox.blocked, outbox.messages) == (True, 8)
        outbox.max_messages = 100
        for number in (1, 2, 3):
            net.broker.publish_nowait("news", number)
        net.node.services.router.publish_all("news", [b"4"])  # in a run that is still open
        outbox.max_messages = room
        outbox.overflow()
        *seen, last = await slow.receive_all()
        pushes = [o["push"] for o in seen]
        assert [p["pub"]["data"] for p in pushes if p.get("channel") == "news"] == []
        gap = {"channel": "news", "unsubscribe": {"code": 2500, "reason": "insufficient state"}}
        assert last == (3008 if rule == "close" else {"push": gap})


@pytest.mark.parametrize("at_once", [True, False])
async def test_a_gap_in_two_topics_lets_nothing_of_either_through(
    autojump_clock: MockClock, at_once: bool
) -> None:
    """Both at once, or the second by what is flushed on behalf of the first."""
    news = TopicPattern("news", TopicRules(slow_consumer="drop_oldest" if at_once else "latest"))
    rules = TopicRules(slow_consumer="drop_oldest")
    config = Config(outbox_messages=8, topics=rules, patterns=(NOISE, news), personal_topic=True)
    broker = Broker(config)

    @broker.on_connect
    async def welcome(event: ConnectEvent) -> ConnectReply:
        return ConnectReply(user="u")

    async with open_test_broker(broker) as net:
        slow = await net.open_client(make_pair=LOCKSTEP)
        await slow.request(subscribe={"channel": "noise"})
        await slow.request(subscribe={"channel": "news", "recoverable": True})
        await publish_slowly(net, "noise", range(20))
        outbox = outbox_of(net, slow)
        assert (outbox.blocked, outbox.messages) == (True, 8)
        outbox.max_messages = 100
        if at_once:
            for topic in ("#u", "news", "news", "news"):
                net.broker.publish_nowait(topic, 1)
            outbox.max_messages = 3  # the last two of the topic would stay
        else:
            for topic in ("news", "#u", "#u", "news"):
                net.broker.publish_nowait(topic, 1)
            for _ in range(9):
                net.node.services.router.publish_all("#u", [b"1"])
            outbox.max_messages = 11  # the last of the topic would stay
        outbox.overflow()
        # The server's own subscription is for the client to recover when it is back.
        *seen, push, close = await slow.receive_all()
        assert (push["push"]["disconnect"]["code"], close) == (3010, 3010)
        assert {o["push"]["channel"] for o in seen} == {"noise"}


# cancellation at any moment


@asynccontextmanager
async def a_busy_broker() -> AsyncIterator[tuple[Network, Counter[str]]]:
    """Every hook waits a little, so there is always something to interrupt."""
    broker = Broker(Config(close_seconds=1, outbox_messages=20, inbox_batches=2, ping_seconds=1000))
    counts: Counter[str] = Counter()

    @broker.on_connect
    async def on_connect(event: ConnectEvent) -> None:
        await trio.sleep(0.001)

    @broker.on_subscribe
    async def on_subscribe(event: SubscribeEvent) -> None:
        await trio.sleep(0.002)

    @broker.on_rpc
    async def on_rpc(connection: Connection, method: str, data: object) -> object:
        await trio.sleep(0.003)
        if method == "raise":
            raise ZeroDivisionError
        return data

    @broker.on_message
    async def on_message(connection: Connection, frame: Frame) -> None:
        await trio.sleep(0.001)
        if frame.data == "raise":
            raise ZeroDivisionError
        broker.push(connection.fd, frame.data)

    @broker.on_open
    async def on_open(connection: Connection) -> None:
        counts["open"] += 1
        await trio.sleep(0.001)

    @broker.on_close
    async def on_close(connection: Connection, close: Close) -> None:
        counts["close"] += 1
        await trio.sleep(0.001)

    async with open_test_broker(broker) as net:
        yield net, counts


async def live(net: Network, dice: random.Random) -> None:
    """One client's life: it does what the dice say, answers nothing, and may stop anywhere."""
    make_pair = dice.choice([trio.testing.memory_stream_pair] * 3 + [LOCKSTEP])
    peer = await net.connect(make_pair)
    request = handshake(dice.choice(["/", "/connection/websocket", "/nothing"]))
    await peer.send(request[: dice.choice([10, len(request), len(request), len(request)])])
    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        for _ in range(dice.randrange(12)):
            topic = dice.choice(["a", "b", "a.b", "fd:1", "fd:5", "*", "a.>"])
            actions: list[dict[str, object] | str] = [
                {"id": 1, "connect": {}},
                {"id": 2, "subscribe": {"channel": topic, "join_leave": True}},
                {"id": 2, "subscribe": {"channel": topic, "recoverable": True}},
                {"id": 3, "unsubscribe": {"channel": topic}},
                {"id": 4, "publish": {"channel": topic, "data": "x" * 100}},
                {"id": 4, "publish": {"channel": topic, "data": "x" * 100}},
                {"id": 5, "rpc": {"method": dice.choice(["echo", "raise"])}},
                {"id": 6, "presence": {"channel": topic}},
                {"send": {"data": 1}},
                "raise",
                "rubbish",
                "close",
            ]
            action = dice.choice(actions)
            if isinstance(action, dict):
                await peer.send_json(*[action] * dice.choice([1, 1, 30]))
            elif action == "close":
                await peer.send_close()
            else:
                await peer.send_text(action)
            if dice.random() < 0.3:
                net.broker.disconnect(dice.randrange(2, 30))
            with trio.move_on_after(dice.choice([0, 0.001, 0.01])):
                await peer.stream.receive_some(1000)
    if dice.random() < 0.8:
        await peer.aclose()


@pytest.mark.parametrize("seed", range(15))
async def test_a_peer_killed_at_any_moment_leaves_nothing_behind(
    autojump_clock: MockClock, seed: int
) -> None:
    dice = random.Random(seed)
    tasks = trio.lowlevel.current_statistics().tasks_living
    async with a_busy_broker() as (net, counts):
        watcher = await net.open_client()
        await watcher.request(subscribe={"channel": "a", "join_leave": True})
        async with trio.open_nursery() as clients:
            for _ in range(30):
                life = dice.choice([0.0005, 0.002, 0.01, 1])

                async def short_life(life: float = life, seed: float = dice.random()) -> None:
                    with trio.move_on_after(life):
                        await live(net, random.Random(seed))

                clients.start_soon(short_life)
                await trio.sleep(dice.choice([0, 0.001]))
        for info in net.broker.connections(limit=1000):
            if info.fd != watcher.fd:
                net.broker.disconnect(info.fd)
        await trio.sleep(60)
        here = [info.fd for info in net.broker.connections(limit=1000)]
        assert here == [watcher.fd]
        stats = net.broker.stats()
        assert (stats.connections, stats.hub.sessions, stats.hub.subscriptions) == (1, 1, 1)
        assert (stats.hub.topics, stats.hub.patterns) == (1, 0)
        joined: Counter[str] = Counter()
        for o in await watcher.receive_all():
            push = o.get("push", {})
            for what in ("join", "leave"):
                if what in push:
                    joined[push[what]["info"]["client"]] += 1 if what == "join" else -1
        assert {client for client, count in joined.items() if count} == {str(watcher.fd)}
        reply = await watcher.request(presence={"channel": "a"})
        assert list(reply["presence"]["presence"]) == [str(watcher.fd)]
        assert net.streams == 1
    assert counts["open"] == counts["close"] > 10
    assert trio.lowlevel.current_statistics().tasks_living == tasks


@pytest.mark.parametrize("seed", range(25))
async def test_serve_may_be_cancelled_at_any_step(autojump_clock: MockClock, seed: int) -> None:
    dice = random.Random(seed)
    tasks = trio.lowlevel.current_statistics().tasks_living
    opened: Counter[str] = Counter()
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as clients:
            async with a_busy_broker() as (net, counts):
                opened, node = counts, net.node
                for _ in range(8):

                    async def run(seed: float = dice.random()) -> None:
                        with suppress(Closed):
                            await live(net, random.Random(seed))

                    clients.start_soon(run)
                for _ in range(dice.randrange(150)):
                    await trio.lowlevel.checkpoint()
                scope.cancel()
    assert trio.lowlevel.current_statistics().tasks_living == tasks
    assert opened["open"] == opened["close"]
    assert net.broker.connections() == []
    assert node.services.router.hub.statistics().subscriptions == 0
    assert len(node.services.router.hub.sessions) == 0
