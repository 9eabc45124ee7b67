"""Pings: when they are due, and what becomes of a peer that does not answer, or never connects."""

import math
import socket
from math import inf

import pytest
import trio
from trio.testing import MockClock, lockstep_stream_pair, wait_all_tasks_blocked

from broker import (
    Broker,
    Config,
    ConnectEvent,
    Refused,
    TokenRules,
    TopicRules,
)
from broker.access.minting import mint
from broker.testing import Network, open_test_broker
from tests.conftest import ask


async def test_a_ping_behind_what_a_client_has_yet_to_take_is_not_yet_due(
    autojump_clock: MockClock,
) -> None:
    def narrow_pair() -> tuple[trio.abc.Stream, trio.abc.Stream]:
        ours, theirs = trio.socket.socketpair()
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the least the system has
        return trio.SocketStream(ours), trio.SocketStream(theirs)

    async with open_test_broker(Broker()) as net:
        client = await net.open_client(narrow_pair)
        for number in range(100):
            net.broker.publish_nowait("t", f"{number:01000}")
        await client.send_json({"id": 1, "history": {"channel": "t", "limit": -1}})
        for _ in range(12):
            await trio.sleep(5)
            await client.stream.receive_some(5000)
        assert net.broker.is_established(client.fd)
        await client.aclose()


async def test_a_client_is_pinged_every_20_seconds_and_stays_while_it_answers(
    autojump_clock: MockClock, net: Network
) -> None:
    client = await net.open_client()
    for _ in range(4):
        began = trio.current_time()
        assert await client.receive_json() == {}
        assert trio.current_time() - began == pytest.approx(20, abs=1.1)
        await client.send_text("{}")
    assert net.broker.is_established(client.fd)


@pytest.mark.parametrize("seconds, told", [(math.inf, 0), (0.4, 1), (20, 20), (20.5, 21)])
async def test_a_client_is_told_in_whole_seconds_how_often_it_will_be_pinged(
    autojump_clock: MockClock, seconds: float, told: int
) -> None:
    async with open_test_broker(Broker(Config(ping_seconds=seconds))) as net:
        client = await net.open_websocket()
        assert (await client.request(connect={}))["connect"]["ping"] == told


async def test_a_busy_client_is_pinged_as_well(autojump_clock: MockClock, net: Network) -> None:
    client = await net.open_client()
    pings = 0
    with trio.move_on_after(65):
        while True:
            await trio.sleep(1)
            pings += (await ask(client, {"id": 2, "publish": {"channel": "a", "data": 1}})).count(
                {}
            )
    assert pings == 3


async def test_a_client_that_does_not_answer_is_sent_away(
    autojump_clock: MockClock, net: Network
) -> None:
    client = await net.open_client()
    began = trio.current_time()
    assert await client.receive_json() == {}
    assert await client.receive_json() == {
        "push": {"disconnect": {"code": 3012, "reason": "no pong"}}
    }
    assert await client.receive_close() == (3012, "no pong")
    assert trio.current_time() - began == pytest.approx(30, abs=2.1)


async def test_a_slow_client_is_not_blamed_for_a_ping_behind_what_it_still_takes(
    autojump_clock: MockClock,
) -> None:
    rules = TopicRules(history_size=100, history_ttl=1000)
    async with open_test_broker(Broker(Config(topics=rules))) as net:
        for _ in range(100):
            net.broker.publish_nowait("a", "x" * 20_000)
        client = await net.open_client(lockstep_stream_pair)
        await client.send_json({"id": 2, "history": {"channel": "a", "limit": -1}})
        got = b""
        while not got.endswith(b"{}"):  # the ping
            await trio.sleep(1)
            data = await client.stream.receive_some(32_000)
            assert data, "cut"
            got += data
        assert len(got) > 2_000_000
        assert trio.current_time() > 60
        await client.send_text("{}")
        assert await client.receive_json() == {}
        # A client that has got it and is silent is not slow.
        assert await client.receive_close() == (3012, "no pong")


# stale peers

STALE = (3502, "stale")
TOKENS = TokenRules(hmac_secret="0123456789abcdef0123456789abcdef")
ANONYMOUS = TokenRules(hmac_secret="0123456789abcdef0123456789abcdef", allow_anonymous=True)
SUBPROTOCOLS = {"Sec-WebSocket-Protocol": "centrifuge-json"}


@pytest.mark.parametrize(
    ("tokens", "headers", "says", "is_stale"),
    [
        # A subprotocol is a promise to connect, whoever may come.
        (TokenRules(), SUBPROTOCOLS, "", True),
        (ANONYMOUS, SUBPROTOCOLS, "", True),
        (TOKENS, SUBPROTOCOLS, "", True),
        (TokenRules(), {"Sec-WebSocket-Protocol": "centrifuge-protobuf"}, "", True),
        # Without one a peer may be plain, and type its first line after an hour.
        (TokenRules(), {}, "", False),
        (TokenRules(), {}, "a plain message", False),
        (TokenRules(), {"Sec-WebSocket-Protocol": "mqtt"}, "", False),
        (ANONYMOUS, {}, "", False),
        (ANONYMOUS, {}, "a plain message", False),
        # Where a token has to be shown, it shows none by saying something else.
        (TOKENS, {}, "", True),
        (TOKENS, {}, "a plain message", True),
    ],
)
async def test_a_peer_that_has_to_connect_and_does_not_is_stale(
    autojump_clock: MockClock,
    tokens: TokenRules,
    headers: dict[str, str],
    says: str,
    is_stale: bool,
) -> None:
    async with open_test_broker(Broker(Config(tokens=tokens))) as net:
        peer = await net.open_websocket(headers=headers)
        if says:
            await peer.send_text(says)
        await trio.sleep(net.broker.config.stale_seconds - 0.1)
        assert net.broker.is_established(peer.fd)
        await trio.sleep(1.2)
        assert net.broker.is_established(peer.fd) is not is_stale
        if is_stale:
            assert await peer.receive_close() == STALE


async def test_twenty_peers_without_a_token_hold_their_places_for_stale_seconds(
    autojump_clock: MockClock,
) -> None:
    config = Config(tokens=TOKENS, max_connections=20, stale_seconds=3)
    async with open_test_broker(Broker(config)) as net:
        strangers = [await net.open_websocket() for _ in range(20)]
        for stranger in strangers[:10]:
            await stranger.send_text("x")
        with pytest.raises(AssertionError, match="503"):
            await net.open_websocket()
        await trio.sleep(4.1)
        for stranger in strangers:
            assert await stranger.receive_close() == STALE
            await stranger.send_close()
        token = mint({"sub": "alice"}, TOKENS.hmac_secret.encode(), "HS256")
        client = await net.open_client(token=token)
        await trio.sleep(10)
        assert net.broker.fds_of("alice") == [client.fd]


async def test_a_client_that_was_refused_for_now_has_the_rest_of_its_time(
    autojump_clock: MockClock,
) -> None:
    broker = Broker(Config(stale_seconds=6))

    @broker.on_connect
    async def refuse(event: ConnectEvent) -> None:
        raise Refused(100, "later")

    async with open_test_broker(broker) as net:
        peer = await net.open_websocket(headers=SUBPROTOCOLS)
        await trio.sleep(5)
        assert "error" in await peer.request(connect={})
        await trio.sleep(2.1)
        assert await peer.receive_close() == STALE


@pytest.mark.parametrize("hook", ["open", "connect"])
async def test_a_peer_that_waits_for_a_hook_is_not_late(
    autojump_clock: MockClock, hook: str
) -> None:
    broker = Broker(Config(ping_seconds=inf))

    async def take_long(event: object) -> None:
        await trio.sleep(30)

    getattr(broker, f"on_{hook}")(take_long)
    async with open_test_broker(broker) as net:
        peer = await net.open_websocket(headers=SUBPROTOCOLS)
        await peer.send_json({"id": 1, "connect": {}})
        await trio.sleep(29)
        assert net.broker.is_established(peer.fd)
        await trio.sleep(15)
        info = net.broker.connection_info(peer.fd)
        assert info is not None
        assert info.protocol == "centrifuge-json"


@pytest.mark.parametrize("vouch", ["bind", "declare_plain", "declare_plain, too late"])
async def test_the_app_may_vouch_for_a_plain_peer(autojump_clock: MockClock, vouch: str) -> None:
    async with open_test_broker(Broker(Config(tokens=TOKENS))) as net:
        peer = await net.open_websocket()
        if vouch == "bind":
            net.broker.bind(peer.fd, "alice")
        elif vouch == "declare_plain":
            assert net.broker.declare_plain(peer.fd)
        else:
            await peer.send_text("x")
            await wait_all_tasks_blocked()
            assert not net.broker.declare_plain(peer.fd)
        await trio.sleep(19)
        assert net.broker.is_established(peer.fd)


async def test_nobody_vouches_for_a_client_with_a_subprotocol(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker()) as net:
        peer = await net.open_websocket(headers=SUBPROTOCOLS)
        net.broker.bind(peer.fd, "alice")
        assert not net.broker.declare_plain(peer.fd)
        await trio.sleep(11.1)
        assert await peer.receive_close() == STALE


async def test_a_stale_stream_over_http_is_told_the_code(autojump_clock: MockClock) -> None:
    broker = Broker(Config(stale_seconds=3))

    @broker.on_connect
    async def refuse(event: ConnectEvent) -> None:
        raise Refused(100, "later")

    async with open_test_broker(broker) as net:
        peer = await net.connect()
        body = b'{"id":1,"connect":{}}'
        head = f"POST /connection/http_stream HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
        await peer.send(head.encode() + b"\r\n\r\n" + body)
        await trio.sleep(4.1)
        assert b'{"push":{"disconnect":{"code":3502,"reason":"stale"}}}' in await peer.receive_eof()


async def test_stale_seconds_may_be_changed_and_be_never(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker(Config(stale_seconds=inf, ping_seconds=inf))) as net:
        peer = await net.open_websocket(headers=SUBPROTOCOLS)
        await trio.sleep(10_000)
        assert net.broker.is_established(peer.fd)
        net.broker.reload(Config(stale_seconds=20, ping_seconds=inf))
        await trio.sleep(1.1)
        assert await peer.receive_close() == STALE


async def test_a_peer_that_the_app_knows_no_longer_is_stale(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker(Config(tokens=TOKENS, ping_seconds=inf))) as net:
        peer = await net.open_websocket()
        net.broker.bind(peer.fd, "alice")
        await trio.sleep(60)
        assert net.broker.is_established(peer.fd)
        net.broker.bind(peer.fd, "")
        await trio.sleep(1.1)
        assert await peer.receive_close() == STALE


async def test_an_idle_connection_is_let_be_until_something_is_due(
    autojump_clock: MockClock, net: Network
) -> None:
    client, plain = await net.open_client(), await net.open_plain()
    await trio.sleep(12)  # of both it is known whether they are stale
    for peer in (client, plain):
        connection = net.node.services.connections[peer.fd]
        await trio.sleep(1.1)
        assert connection.peer.look_at > trio.current_time() + 1
        assert connection.peer.look_at <= trio.current_time() + 20
