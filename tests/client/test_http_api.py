"""The HTTP API from outside, over a real broker in memory, and over peers that are none."""

import ssl
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager

import pytest
import trio
import trio.testing
import trustme
from trio.testing import MockClock

from broker import Broker, Config
from broker.client.http_api import MAX_ANSWER_BYTES, ApiClient, open_api
from broker.errors import CannotConnect, ClientError, ConnectionLost, RequestFailed
from broker.testing import Network, open_test_broker

KEY = "s3cret"


def api_of(
    net: Network, key: str = KEY, url: str = "ws://test"
) -> AbstractAsyncContextManager[ApiClient]:
    async def connect(host: str, port: int) -> trio.abc.Stream:
        return await net.listener.connect()

    return open_api(url, key, open_stream=connect)


@pytest.mark.parametrize("url", ["ws://test/connection/websocket", "http://test", "https://test/"])
async def test_calls_go_one_after_the_other_over_one_connection(
    autojump_clock: MockClock, url: str
) -> None:
    async with open_test_broker(Broker(Config(api_key=KEY))) as net, api_of(net, url=url) as api:
        for number in range(3):
            result = await api.call("publish", {"channel": "t", "data": number})
            assert result["offset"] == number + 1
        assert len((await api.call("info"))["nodes"]) == 1
        assert net.streams == 1


async def test_an_error_reply_is_raised_and_the_connection_goes_on(
    autojump_clock: MockClock,
) -> None:
    async with open_test_broker(Broker(Config(api_key=KEY))) as net, api_of(net) as api:
        with pytest.raises(RequestFailed, match="no connection has fd 9") as failed:
            await api.call("connection", {"fd": 9})
        assert failed.value.code == 102
        with pytest.raises(TypeError, match="a set has no order"):
            await api.call("publish", {"channel": "t", "data": {1, 2}})
        await api.call("info")
        assert net.streams == 1


async def test_a_wrong_key_a_missing_api_and_an_unknown_method_are_told(
    autojump_clock: MockClock,
) -> None:
    async with open_test_broker(Broker(Config(api_key=KEY))) as net:
        async with api_of(net, "wrong") as api:
            with pytest.raises(ClientError, match="does not take this key; give the broker's api"):
                await api.call("info")
        async with api_of(net) as api:
            with pytest.raises(ClientError, match=r"No such method; known are publish.* \(404\)"):
                await api.call("nonsense")
    async with open_test_broker(Broker()) as net, api_of(net) as api:
        with pytest.raises(ClientError, match=r"The HTTP API is off: set api_key.* \(404\)"):
            await api.call("info")


async def answering(
    *answers: bytes,
) -> tuple[Callable[[str, int], Awaitable[trio.abc.Stream]], list[bytes]]:
    asked: list[bytes] = []
    left = list(answers)

    async def connect(host: str, port: int) -> trio.abc.Stream:
        ours, theirs = trio.testing.memory_stream_pair()
        answer = left.pop(0)
        trio.lowlevel.spawn_system_task(_answer, theirs, answer, asked)
        return ours

    return connect, asked


async def _answer(stream: trio.abc.Stream, answer: bytes, asked: list[bytes]) -> None:
    asked.append(bytes(await stream.receive_some(2**16)))
    try:
        await stream.send_all(answer)
        await stream.aclose()
    except trio.BrokenResourceError:
        pass  # they have heard enough


def ok(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (b"", ConnectionLost, "connection lost before the reply"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}", ConnectionLost, "connection lost"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", ClientError, "does not speak HTTP"),
        (ok(b"not json"), ClientError, "not of this broker's HTTP API"),
        (ok(b"[1]"), ClientError, "not of this broker's HTTP API"),
        (ok(b"7"), ClientError, "not of this broker's HTTP API"),
        (ok(b"{}"), ClientError, "not of this broker's HTTP API"),
        (ok(b'{"error":7}'), ClientError, "not of this broker's HTTP API"),
        (ok(b"[" * 100_000), ClientError, "not of this broker's HTTP API"),
        (b"HTTP/1.1 502 Bad\r\nContent-Length: 3\r\n\r\nbad", ClientError, r"bad \(502\)"),
        (
            b"HTTP/1.1 500 No\r\nConnection: close\r\n\r\n" + b"x" * 10_000,
            ClientError,
            r"x{10,499}… \(500\)",
        ),
    ],
)
async def test_what_is_no_broker_is_told_in_one_line(
    autojump_clock: MockClock, answer: bytes, error: type[Exception], words: str
) -> None:
    connect, _ = await answering(answer)
    async with open_api("ws://test", KEY, open_stream=connect) as api:
        with pytest.raises(error, match=words) as raised:
            await api.call("info")
        assert type(raised.value) is error
        assert "\n" not in str(raised.value)


async def test_an_endless_answer_is_cut_off(autojump_clock: MockClock) -> None:
    endless = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + b"x" * (MAX_ANSWER_BYTES + 1)
    connect, _ = await answering(endless)
    async with open_api("ws://test", KEY, open_stream=connect) as api:
        with pytest.raises(ClientError, match="an answer of more than"):
            await api.call("info")


async def test_after_a_lost_connection_the_next_call_makes_another(
    autojump_clock: MockClock,
) -> None:
    connect, asked = await answering(b"", ok(b'{"result":{"a":1}}'), ok(b'{"result":2}'))
    async with open_api("ws://test:9501", KEY, open_stream=connect) as api:
        with pytest.raises(ConnectionLost):
            await api.call("info")
        assert await api.call("info") == {"a": 1}
    assert asked[1].startswith(b"POST /api/info HTTP/1.1\r\nHost: test:9501\r\n")
    assert b"X-API-Key: s3cret\r\n" in asked[1]


async def test_what_stands_before_the_api_in_an_http_url_is_kept(autojump_clock: MockClock) -> None:
    connect, asked = await answering(ok(b'{"result":{}}'))
    async with open_api("https://test/chat/", KEY, open_stream=connect) as api:
        await api.call("info")
    assert asked[0].startswith(b"POST /chat/api/info HTTP/1.1\r\n")


@pytest.mark.parametrize("url", ["ftp://test", "ws://", "http://", "test", "http://a..b"])
async def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ClientError, match=r"is not a WebSocket URL|must look like"):
        async with open_api(url, KEY):
            pytest.fail("entered")


async def test_a_key_that_no_header_holds_is_refused() -> None:
    for key in ("a\r\nX: 1", "é"):
        with pytest.raises(ClientError, match="no header field may have"):
            async with open_api("ws://test", key):
                pytest.fail("entered")


async def test_nobody_there_is_told() -> None:
    async with open_api("ws://127.0.0.1:1", KEY) as api:
        with pytest.raises(
            CannotConnect, match=r"cannot connect to ws://127\.0\.0\.1:1: connection"
        ):
            await api.call("info")


async def test_tls_is_by_the_context_that_is_given() -> None:
    ca = trustme.CA()
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("localhost").configure_cert(server_context)
    client_context = ssl.create_default_context()
    ca.configure_trust(client_context)

    async def answer(stream: trio.abc.Stream) -> None:
        async with stream:
            await stream.receive_some(2**16)
            await stream.send_all(ok(b'{"result":{}}'))

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_ssl_over_tcp, answer, 0, server_context)
        port = listeners[0].transport_listener.socket.getsockname()[1]
        url = f"wss://localhost:{port}"
        async with open_api(url, KEY, ssl_context=client_context) as api:
            assert await api.call("info") == {}
        nursery.cancel_scope.cancel()
