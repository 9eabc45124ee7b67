"""`broker.session.handshake`: the app's say in who connects, at every door, before anything is answered."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock

from broker import (
    Broker,
    Config,
    Connection,
    Disconnect,
    ErrorCode,
    Handshake,
    HandshakeReply,
    Refused,
)
from broker.testing import Network, Peer, handshake, open_test_broker

CONNECT = b'{"id":1,"connect":{}}'
DOORS = {
    "websocket": handshake("/"),
    "http_stream": b"POST /connection/http_stream HTTP/1.1\r\nHost: localhost\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(CONNECT), CONNECT),
    "sse": b"GET /connection/sse?cf_connect=%7B%22id%22%3A1%2C%22connect%22%3A%7B%7D%7D HTTP/1.1\r\n"
    b"Host: localhost\r\n\r\n",
    "uni_sse": b"GET /connection/uni_sse?topic=news HTTP/1.1\r\nHost: localhost\r\n\r\n",
}

Hook = Callable[[Handshake], Awaitable[HandshakeReply | None]]


def broker_with(hook: Hook, **config: Any) -> Broker:
    broker = Broker(Config(**config))
    broker.on_handshake(hook)
    return broker


def raising(error: Exception) -> Hook:
    async def hook(_: Handshake) -> None:
        raise error

    return hook


def giving(reply: HandshakeReply | None) -> Hook:
    async def hook(_: Handshake) -> HandshakeReply | None:
        return reply

    return hook


async def answer_to(net: Network, request: bytes) -> str:
    """The head of the answer, and what of the body came with it."""
    async with await net.connect() as peer:
        await peer.send(request)
        return await peer.receive_head()


@pytest.mark.parametrize("door", DOORS)
async def test_who_is_refused_comes_in_by_no_door(autojump_clock: MockClock, door: str) -> None:
    opened: list[int] = []
    broker = broker_with(
        raising(Refused(401, "log in first", {"WWW-Authenticate": 'Bearer realm="chat"'}))
    )

    @broker.on_open
    async def count(connection: Connection) -> None:
        opened.append(connection.fd)

    async with open_test_broker(broker) as net:
        async with await net.connect() as peer:
            await peer.send(DOORS[door])
            answer = (await peer.receive_eof()).decode()
        head, _, body = answer.partition("\r\n\r\n")
        assert head.startswith("HTTP/1.1 401 Unauthorized\r\n")
        assert '\r\nWWW-Authenticate: Bearer realm="chat"' in head
        assert body == "log in first\n"
        assert net.broker.stats().ends.refused["app"] == 1
        assert net.broker.connections() == []
    assert opened == []


@pytest.mark.parametrize("door", DOORS)
async def test_headers_and_cookies_go_along_with_the_answer_and_data_stays(
    autojump_clock: MockClock, door: str
) -> None:
    seen: list[tuple[str, object]] = []
    broker = Broker()

    @broker.on_handshake
    async def welcome(asked: Handshake) -> HandshakeReply:
        asked.data["visit"] = 7
        seen.append((asked.transport, dict(asked.data)))
        return HandshakeReply(
            headers={"X-Served-By": "a"}, cookies={"seen": "1; Max-Age=60", "b": "2"}
        )

    @broker.on_open
    async def opened(connection: Connection) -> None:
        seen.append((connection.transport, dict(connection.data)))

    async with open_test_broker(broker) as net:
        head = await answer_to(net, DOORS[door])
        assert head.startswith(("HTTP/1.1 101 ", "HTTP/1.1 200 "))
        lines = head.split("\r\n")
        assert {"X-Served-By: a", "Set-Cookie: seen=1; Max-Age=60", "Set-Cookie: b=2"} <= {*lines}
    assert seen == [(door, {"visit": 7})] * 2


async def test_hooks_see_the_whole_request(autojump_clock: MockClock) -> None:
    seen: list[object] = []
    broker = Broker(Config(websocket_paths=("/rooms/*",)))

    def look(asked: Handshake) -> None:
        seen.append(
            (
                (asked.path, asked.query, dict(asked.params)),
                (dict(asked.cookies), asked.headers["x-a"], asked.subprotocols),
                (asked.address, asked.remote_host, asked.remote_port, asked.transport),
            )
        )

    @broker.on_handshake
    async def welcome(asked: Handshake) -> None:
        look(asked)

    @broker.on_open
    async def opened(connection: Connection) -> None:
        look(connection)

    async with open_test_broker(broker) as net:
        request = handshake(
            "/rooms/a%20b?user=J%C3%BCrgen+1&empty=&twice=1&twice=2&bad=%ff",
            {
                "Cookie": 'sid=abc; name="J. R."; sid=evil; no-value',
                "Sec-WebSocket-Protocol": "chat.v2, centrifuge-json",
                "X-A": "1",
            },
        )
        request = request.removesuffix(b"\r\n") + b"X-A: 2\r\nCookie: more=1\r\n\r\n"
        assert (await answer_to(net, request)).startswith("HTTP/1.1 101 ")
    first, second = seen
    assert first == second
    assert first == (
        (
            "/rooms/a%20b",
            "user=J%C3%BCrgen+1&empty=&twice=1&twice=2&bad=%ff",
            {"user": "Jürgen 1", "empty": "", "twice": "2", "bad": "\ufffd"},
        ),
        (
            {"sid": "abc", "name": "J. R.", "more": "1"},
            "1, 2",
            ("chat.v2", "centrifuge-json"),
        ),
        ("memory", "", 0, "websocket"),
    )


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_the_address_has_a_host_and_a_port(host: str) -> None:
    seen: list[tuple[str, str, int]] = []
    broker = Broker(Config(port=0, host=host))

    @broker.on_open
    async def opened(connection: Connection) -> None:
        seen.append((connection.address, connection.remote_host, connection.remote_port))

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            try:
                (url,) = await nursery.start(broker.serve)
            except Exception:  # noqa: BLE001 - this machine has no IPv6
                pytest.skip(f"{host} is not to be had")
            port = int(url.rpartition(":")[2])
            async with await trio.open_tcp_stream(host, port) as stream:
                ours = stream.socket.getsockname()[1]
                peer = Peer(stream)
                await peer.send(handshake())
                await peer.receive_head()
            broker.stop()
    shown = f"[{host}]" if ":" in host else host
    assert seen == [(f"{shown}:{ours}", host, ours)]


@pytest.mark.parametrize(
    ("offered", "reply", "agreed"),
    [
        ("chat.v2, centrifuge-json", None, "centrifuge-json"),
        ("chat.v2, centrifuge-json", HandshakeReply(), "centrifuge-json"),
        ("chat.v2, centrifuge-json", HandshakeReply(subprotocol="chat.v2"), "chat.v2"),
        ("chat.v2, centrifuge-json", HandshakeReply(subprotocol=""), None),
        ("chat.v2", None, None),
    ],
)
async def test_the_app_chooses_among_the_subprotocols_that_are_offered(
    autojump_clock: MockClock, offered: str, reply: HandshakeReply | None, agreed: str | None
) -> None:
    broker = broker_with(giving(reply))
    chosen: list[str | None] = []

    @broker.on_open
    async def opened(connection: Connection) -> None:
        chosen.append(connection.subprotocol)

    async with open_test_broker(broker) as net:
        head = await answer_to(net, handshake("/", {"Sec-WebSocket-Protocol": offered}))
    lines = [line for line in head.split("\r\n") if line.lower().startswith("sec-websocket-p")]
    assert lines == ([f"Sec-WebSocket-Protocol: {agreed}"] if agreed else [])
    assert chosen == [agreed]


async def test_a_subprotocol_is_for_websockets_alone(autojump_clock: MockClock) -> None:
    broker = broker_with(giving(HandshakeReply(subprotocol="chat.v2")))
    async with open_test_broker(broker) as net:
        assert (await answer_to(net, DOORS["sse"])).startswith("HTTP/1.1 200 ")


def test_a_cookie_may_have_the_name_of_a_header() -> None:
    assert HandshakeReply(cookies={"date": "1"}).lines == (("Set-Cookie", "date=1"),)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Refused(403), 403),
        (Refused(302, "elsewhere", {"Location": "/login"}), 302),
        (Refused(499, "a status without a name"), 499),
        (Refused(ErrorCode.UNAUTHORIZED), 401),
        (Refused(ErrorCode.TOO_MANY_REQUESTS), 429),
        (Refused(ErrorCode.PERMISSION_DENIED), 403),
        (Refused(200, "not how to let in"), 403),
        (Refused(403, "half a pair: \ud83d"), 403),
        (Disconnect(3500, "go away"), 403),
        (Refused(403, "x", {"X-A": "1\r\nX-B: 2"}), 500),
        (Refused(403, "x", {"Content-Length": "1"}), 500),
        (ZeroDivisionError(), 500),
    ],
)
async def test_a_hook_that_raises_refuses_with_a_status(
    autojump_clock: MockClock, error: Exception, status: int
) -> None:
    async with open_test_broker(broker_with(raising(error))) as net:
        head = await answer_to(net, handshake())
        assert head.startswith(f"HTTP/1.1 {status} ")
        assert "X-B" not in head
        assert net.broker.connections() == []


async def test_a_subprotocol_that_nobody_offers_is_the_app_s_mistake(
    autojump_clock: MockClock,
) -> None:
    broker = broker_with(giving(HandshakeReply(subprotocol="chat.v3")))
    async with open_test_broker(broker) as net:
        with capture_logs() as lines:
            head = await answer_to(net, handshake("/", {"Sec-WebSocket-Protocol": "chat.v2"}))
        assert head.startswith("HTTP/1.1 500 ")
    assert [line["hook"] for line in lines if line["event"] == "hook_failed"] == ["handshake"]


async def test_a_hook_has_open_seconds_and_nobody_else_waits_for_it(
    autojump_clock: MockClock,
) -> None:
    async def hook(asked: Handshake) -> None:
        if asked.query == "slow":
            await trio.sleep_forever()

    async with open_test_broker(broker_with(hook, open_seconds=3)) as net:
        async with await net.connect() as slow:
            await slow.send(handshake("/?slow"))
            bystander = await net.open_plain()
            began = trio.current_time()
            assert (await slow.receive_head()).startswith("HTTP/1.1 503 ")
            assert trio.current_time() - began == pytest.approx(3)
            await bystander.aclose()


async def test_while_the_app_is_asked_the_broker_may_stop(autojump_clock: MockClock) -> None:
    asked = trio.Event()

    async def hook(_: Handshake) -> None:
        asked.set()
        await trio.sleep(1)

    async with open_test_broker(broker_with(hook)) as net:
        async with await net.connect() as peer:
            await peer.send(handshake())
            await asked.wait()
            net.broker.stop()
            assert (await peer.receive_head()).startswith("HTTP/1.1 503 ")


async def test_while_the_app_is_asked_the_last_place_may_be_taken(
    autojump_clock: MockClock,
) -> None:
    async def hook(asked: Handshake) -> None:
        if asked.query == "slow":
            await trio.sleep(1)

    async with open_test_broker(broker_with(hook, max_connections=1)) as net:
        async with await net.connect() as late:
            await late.send(handshake("/?slow"))
            await trio.sleep(0.5)
            first = await net.open_plain()
            assert (await late.receive_head()).startswith("HTTP/1.1 503 ")
            await first.aclose()


async def test_what_waits_for_the_app_is_charged(autojump_clock: MockClock) -> None:
    held: list[int] = []

    async with open_test_broker(Broker()) as net:

        async def hook(_: Handshake) -> None:
            held.append(net.broker.stats().memory.parts["incoming"])

        net.broker.on_handshake(hook)
        padding = "x" * 5000
        await (await net.open_websocket("/", {"X-Padding": padding})).aclose()
        assert held[0] > 5000
        await trio.sleep(1)
        assert net.broker.stats().memory.parts["incoming"] == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"headers": {"X-A": "a\r\nb"}},
        {"headers": {"X A": "a"}},
        {"headers": {"X-A": "ü"}},
        {"headers": {"Upgrade": "h2c"}},
        {"headers": {"Sec-WebSocket-Accept": "x"}},
        {"headers": {"transfer-encoding": "chunked"}},
        {"headers": {"X-A": 1}},
        {"headers": [("X-A", "1")]},
        {"cookies": {"a": "1\r\nSet-Cookie: b=2"}},
        {"cookies": {"a=b": "1"}},
        {"cookies": ["a"]},
        {"subprotocol": "a, b"},
        {"subprotocol": "a\r\n"},
        {"subprotocol": 1},
    ],
)
def test_what_no_header_line_may_hold_raises_where_it_is_written(fields: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        HandshakeReply(**fields)


@pytest.mark.parametrize(
    ("served", "path", "status"),
    [
        (("/*",), "/", 101),
        (("/*",), "/a/b?c", 101),
        (("/rooms/*",), "/rooms/", 101),
        (("/rooms/*",), "/rooms/a/b", 101),
        (("/rooms/*",), "/rooms", 404),
        (("/rooms/*",), "/rooms2/a", 404),
        (("/rooms/*", "/ws"), "/ws/", 101),
    ],
)
async def test_a_path_may_stand_for_all_below_it(
    autojump_clock: MockClock, served: tuple[str, ...], path: str, status: int
) -> None:
    async with open_test_broker(Broker(Config(websocket_paths=served))) as net:
        assert (await answer_to(net, handshake(path))).startswith(f"HTTP/1.1 {status} ")


@pytest.mark.parametrize("path", ["/a*", "*", "/*/a", "/**"])
def test_a_star_stands_at_the_end_alone(path: str) -> None:
    with pytest.raises(ValueError, match="websocket_paths"):
        Config(websocket_paths=(path,))
