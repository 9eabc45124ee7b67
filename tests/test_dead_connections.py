"""Memory of connections that have ended, and of commands that were refused: all of it is given back at
once, without the garbage collector, which a broker that holds many connections runs seldom."""

import gc
import re
import ssl
import tracemalloc
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import msgspec
import pytest
import trio
import trustme
from trio.testing import MockClock, lockstep_stream_pair, memory_stream_pair, wait_all_tasks_blocked

from broker import (
    Broker,
    Close,
    Config,
    ConnectEvent,
    Connection,
    ConnectReply,
    PublishEvent,
    Refused,
    SubscribeEvent,
    TopicRules,
)
from broker.errors import ErrorCode
from broker.http.fallbacks import HttpConnection
from broker.testing import Network, Peer, StreamPair, client_frame, handshake, open_test_broker
from broker.transport.frames import CONTINUATION, TEXT
from tests.conftest import code_of, subscribe

KEY = "an API key of some length"
LARGE = b"x" * 900_000
SMALL = 64 * 2**10
"""Far less than any of the messages here."""

Leaver: TypeAlias = Callable[[Network], Awaitable[Peer]]


def post(path: str, body: bytes, *fields: str, missing: int = 0) -> bytes:
    """A request whose body lacks as many bytes."""
    lines = (
        f"POST {path} HTTP/1.1",
        "Host: testserver",
        f"Content-Length: {len(body) + missing}",
        *fields,
    )
    return "\r\n".join([*lines, "", ""]).encode() + body


async def asking(net: Network, request: bytes) -> Peer:
    peer = await net.connect()
    await peer.send(request)
    return peer


async def silent(net: Network) -> Peer:
    return await net.connect()


async def idle_client(net: Network) -> Peer:
    return await net.open_client()


async def half_a_message(net: Network) -> Peer:
    peer = await net.open_client()
    await peer.send(client_frame(TEXT, LARGE)[:-1])
    return peer


async def half_a_plain_message(net: Network) -> Peer:
    peer = await net.open_plain()
    await peer.send(client_frame(TEXT, LARGE)[:-1])
    return peer


async def a_fragment(net: Network) -> Peer:
    peer = await net.open_client()
    await peer.send(client_frame(TEXT, LARGE, fin=False))
    return peer


async def half_of_a_second_fragment(net: Network) -> Peer:
    peer = await net.open_client()
    first = client_frame(TEXT, b"x" * 200_000, fin=False)
    await peer.send(first + client_frame(CONTINUATION, b"x" * 700_000)[:-1])
    return peer


async def a_message_that_was_refused(net: Network) -> Peer:
    peer = await net.open_client()
    await peer.send(client_frame(TEXT, LARGE))
    return peer


async def many_commands(net: Network) -> Peer:
    peer = await net.open_client()
    await peer.send(client_frame(TEXT, b"\n".join([b'{"id":2,"rpc":{"method":"x"}}'] * 1000)))
    return peer


async def a_large_subscription(net: Network) -> Peer:
    peer = await net.open_client()
    await subscribe(peer, "news", data="x" * 800_000)
    return peer


async def a_reader_that_stops(net: Network) -> Peer:
    peer = await net.open_client(lockstep_stream_pair)
    await subscribe(peer, "mail")
    for _ in range(3):
        net.broker.publish_nowait("mail", LARGE.decode())
    return peer


async def an_http_stream(net: Network) -> Peer:
    return await asking(net, post("/connection/http_stream", b'{"id":1,"connect":{}}'))


async def an_event_stream(net: Network) -> Peer:
    return await asking(net, post("/connection/sse", b'{"id":1,"connect":{}}'))


async def a_one_way_stream(net: Network) -> Peer:
    body = b'{"subs":{"mail":{"data":"%b"}}}' % LARGE
    return await asking(net, post("/connection/uni_sse", body))


async def half_a_first_message(net: Network) -> Peer:
    return await asking(net, post("/connection/http_stream", LARGE, missing=1))


async def half_a_later_message(net: Network) -> Peer:
    return await asking(net, post("/emulation", LARGE, missing=1))


async def half_a_call_of_the_api(net: Network) -> Peer:
    return await asking(net, post("/api/publish", LARGE, f"X-API-Key: {KEY}", missing=1))


KINDS = (
    silent,
    idle_client,
    half_a_message,
    half_a_plain_message,
    a_fragment,
    half_of_a_second_fragment,
    a_message_that_was_refused,
    many_commands,
    a_large_subscription,
    a_reader_that_stops,
    an_http_stream,
    an_event_stream,
    a_one_way_stream,
    half_a_first_message,
    half_a_later_message,
    half_a_call_of_the_api,
)


@contextmanager
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.fixture
async def net(autojump_clock: MockClock) -> AsyncIterator[Network]:
    config = Config(api_key=KEY, topics=TopicRules(history_size=0))
    async with open_test_broker(Broker(config)) as network:
        yield network


async def come_and_go(net: Network, kind: Leaver) -> None:
    peer = await kind(net)
    await wait_all_tasks_blocked()
    await peer.aclose()
    del peer
    await trio.sleep(40)  # a request has 30 s; and deadlines that are past leave Trio's own list
    assert net.streams == 0


def ours() -> "Counter[str]":
    """How many objects there are of each class of ours, but for those of the log, and for what is remembered
    of the connections that ended last."""
    names = (f"{type(each).__module__}.{type(each).__qualname__}" for each in gc.get_objects())
    return Counter(
        name
        for name in names
        if re.match(r"broker\.(?!logs|core\.messages\.(Close|Connection))", name)
    )


async def check_nothing_is_left(net: Network, kind: Leaver) -> None:
    await come_and_go(net, kind)  # caches, and code that is imported late
    with no_collector():
        before = ours()
        tracemalloc.start()
        try:
            for _ in range(2):
                await come_and_go(net, kind)
            size, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert ours() - before == Counter()
        # The two ends of a stream in memory stay, 13 KiB: they are cycles of Trio's kit.
        assert size < 2 * SMALL


@pytest.mark.parametrize("kind", KINDS)
async def test_nothing_is_left_for_the_collector(
    autojump_clock: MockClock, net: Network, kind: Leaver
) -> None:
    await check_nothing_is_left(net, kind)


@pytest.mark.parametrize("hangs", [False, True])
async def test_nothing_is_left_of_a_client_that_hooks_are_asked_about(
    autojump_clock: MockClock, hangs: bool
) -> None:
    broker = Broker(Config(topics=TopicRules(history_size=0)))

    @broker.on_connect
    async def let_in(event: ConnectEvent) -> ConnectReply:
        return ConnectReply()

    @broker.on_rpc
    async def answer(connection: Connection, method: str, data: object) -> object:
        if hangs:
            await trio.sleep_forever()
        return data

    async def half_a_message_behind_a_call(net: Network) -> Peer:
        peer = await net.open_client()
        call = b'{"id":2,"rpc":{"method":"echo","data":"%b"}}' % LARGE
        await peer.send(client_frame(TEXT, call) * 2)
        await peer.send(client_frame(TEXT, LARGE)[:-1])
        return peer

    async with open_test_broker(broker) as net:
        await check_nothing_is_left(net, half_a_message_behind_a_call)


TEXT_OF_100_KB = "x" * 100_000

COMMANDS: dict[str, tuple[dict[str, object], int]] = {
    "publish": ({"publish": {"channel": "a"}}, 0),
    "publish to a pattern": ({"publish": {"channel": "a.*"}}, 107),
    "publish to who is gone": ({"publish": {"channel": "fd:999"}}, 102),
    "publish to nobody": ({"publish": {"channel": ""}}, 107),
    "publish, refused": ({"publish": {"channel": "no"}}, 103),
    "publish, the hook fails": ({"publish": {"channel": "bug"}}, 100),
    "publish, a number for a channel": ({"publish": {"channel": 7}}, 107),
    "publish, null": ({"publish": {"channel": None}}, 107),
    "subscribe to an fd": ({"subscribe": {"channel": "fd:9"}}, 103),
    "subscribe, refused": ({"subscribe": {"channel": "no"}}, 103),
    "subscribe, the hook fails": ({"subscribe": {"channel": "bug"}}, 100),
    "rpc": ({"rpc": {"method": "echo"}}, 0),
    "rpc, refused": ({"rpc": {"method": "no"}}, 103),
    "rpc, the hook fails": ({"rpc": {"method": "bug"}}, 100),
    "rpc publish to a pattern": ({"rpc": {"method": "publish", "data": {"topic": "a.*"}}}, 107),
    "rpc publish, refused": ({"rpc": {"method": "publish", "data": {"topic": "no"}}}, 103),
    "rpc publish, unknown field": (
        {"rpc": {"method": "publish", "data": {"topic": "a", "frob": 1}}},
        107,
    ),
    "request to who is gone": ({"rpc": {"method": "request", "data": {"to": "fd:999"}}}, 503),
    "will for a pattern": ({"rpc": {"method": "will", "data": {"topic": ">"}}}, 107),
    "unknown": ({"frobnicate": {}}, 104),
}
CASES = [
    pytest.param(command, code, hooks, id=f"{name}, {'hooks' if hooks else 'no hooks'}")
    for name, (command, code) in COMMANDS.items()
    for hooks in (False, True)
    if hooks or not any(word in str(command) for word in ("'no'", "'bug'", "'echo'"))
]


def decided(name: str) -> None:
    """What the hooks of these tests do about a topic or a method."""
    if name == "no":
        raise Refused(ErrorCode.PERMISSION_DENIED)
    if name == "bug":
        raise ValueError(name)


def with_hooks(broker: Broker) -> Broker:
    @broker.on_publish
    async def publish(event: PublishEvent) -> None:
        await trio.lowlevel.checkpoint()
        decided(event.topic)

    @broker.on_subscribe
    async def subscribed(event: SubscribeEvent) -> None:
        await trio.lowlevel.checkpoint()
        decided(event.topic)

    @broker.on_rpc
    async def call(connection: Connection, method: str, data: object) -> object:
        await trio.lowlevel.checkpoint()
        decided(method)
        if method != "echo":
            raise Refused(ErrorCode.METHOD_NOT_FOUND)
        return None

    return broker


@pytest.mark.parametrize(("command", "code", "hooks"), CASES)
async def test_a_command_leaves_nothing_of_what_it_said(
    autojump_clock: MockClock, command: dict[str, dict[str, Any]], code: int, hooks: bool
) -> None:
    """An exception that is kept anywhere would hold the frames that it came through."""
    ((method, fields),) = command.items()
    data = {**fields.get("data", {}), "data": TEXT_OF_100_KB} if method == "rpc" else TEXT_OF_100_KB
    broker = Broker(Config(topics=TopicRules(history_size=0)))
    async with open_test_broker(with_hooks(broker) if hooks else broker) as net:
        peer = await net.open_client()

        async def ask() -> None:
            assert await code_of(peer, **{method: {**fields, "data": data}}) == code

        for _ in range(2):
            await ask()
        with no_collector():
            tracemalloc.start()
            try:
                for _ in range(4):
                    await ask()
                await wait_all_tasks_blocked()
                size, _ = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
    # What was published last is still there, whoever did.
    assert size < 2 * len(TEXT_OF_100_KB)


async def test_a_connection_that_the_app_keeps_is_small(autojump_clock: MockClock) -> None:
    broker, kept = Broker(), list[Connection]()

    @broker.on_close
    async def keep(connection: Connection, close: Close) -> None:
        kept.append(connection)
        sizes.append(tracemalloc.get_traced_memory()[0])

    sizes: list[int] = []
    async with open_test_broker(broker) as net:
        await come_and_go(net, half_a_message)
        with no_collector():
            tracemalloc.start()
            try:
                await come_and_go(net, half_a_message)
            finally:
                tracemalloc.stop()
        assert sizes[1] < 2 * SMALL
        assert [each.fd for each in kept] == [1, 2]
        assert not any(each.is_established for each in kept)


async def test_a_goodbye_does_not_keep_what_came(autojump_clock: MockClock, net: Network) -> None:
    """Peer and broker have closed, and the peer does not read: 5 s in which nothing is of use."""
    await come_and_go(net, half_a_message)
    peer = await net.open_client(lockstep_stream_pair)
    await subscribe(peer, "mail")
    tracemalloc.start()
    try:
        with trio.move_on_after(1):
            await peer.send(client_frame(TEXT, LARGE)[:-1])
        net.broker.publish_nowait("mail", "a message that is not read")
        await peer.stream.send_eof()  # type: ignore[attr-defined]
        await trio.sleep(1)
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert net.streams == 1
    assert size < SMALL


@pytest.mark.parametrize("path", ["/connection/http_stream", "/emulation"])
async def test_a_refusal_that_is_read_on_does_not_keep_the_body(
    autojump_clock: MockClock, net: Network, path: str
) -> None:
    await come_and_go(net, half_a_first_message)
    peer = await net.connect()
    tracemalloc.start()
    try:
        await peer.send(post(path, LARGE, missing=1))
        await trio.sleep(31)
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert net.streams == 1
    assert (await peer.receive_head()).startswith("HTTP/1.1 408 ")
    assert size < SMALL


async def test_a_later_message_is_kept_once(autojump_clock: MockClock) -> None:
    """While it waits to be taken without the request's body, and once it is taken not at all."""
    broker, may_go_on = Broker(Config(inbox_batches=1)), trio.Event()

    @broker.on_connect
    async def wait(event: ConnectEvent) -> ConnectReply:
        await may_go_on.wait()
        return ConnectReply()

    async with open_test_broker(broker) as net:
        stream = await an_http_stream(net)
        await stream.receive_head()
        (connection,) = net.node.services.connections.values()
        assert isinstance(connection, HttpConnection)
        message = b'{"id":2,"rpc":{"method":"%b"}}' % LARGE
        body = msgspec.json.encode(
            {"session": connection.connect_fields()["session"], "data": message.decode()}
        )
        tracemalloc.start()
        try:
            # One is in the inbox, one is not read and is there as a frame as well, two wait for it.
            for _ in range(4):
                await asking(net, post("/emulation", body))
            await wait_all_tasks_blocked()
            waiting, _ = tracemalloc.get_traced_memory()
            may_go_on.set()
            await trio.sleep(1)
            taken, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert waiting < 5.5 * len(LARGE)
    assert taken < 4 * SMALL  # and not a message, nor a part of one


async def test_tls_leaves_nothing_either(autojump_clock: MockClock) -> None:
    authority = trustme.CA()
    ours_context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("testserver").configure_cert(ours_context)
    theirs_context = ssl.create_default_context()
    authority.configure_trust(theirs_context)

    def make_pair() -> StreamPair:
        client, server = memory_stream_pair()
        return (
            trio.SSLStream(client, theirs_context, server_hostname="testserver"),
            trio.SSLStream(server, ours_context, server_side=True),
        )

    async def come_and_go_by_tls(net: Network) -> None:
        peer = await net.connect(make_pair)
        await peer.send(handshake())
        await peer.receive_head()
        await peer.send(client_frame(TEXT, LARGE)[:-1])
        await peer.aclose()
        await trio.sleep(40)
        assert net.streams == 0

    def sessions() -> int:
        return sum(isinstance(each, ssl.SSLObject) for each in gc.get_objects())

    async with open_test_broker(Broker()) as net:
        await come_and_go_by_tls(net)
        with no_collector():
            before = sessions()
            await come_and_go_by_tls(net)
            # One is our peer's.
            assert sessions() == before + 1
