"""Where clients are, as proxies tell it; and the path that a proxy passes on: by real sockets."""

import json
import re
import socket
import ssl
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import structlog
import trio
import trustme
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from broker import Broker, Config, ConfigError, Connection
from broker.testing import Peer, handshake
from tests.ports import free_port

Connect = Callable[[], Any]


@asynccontextmanager
async def served(
    path: Path, *, asks_app: bool = True, **fields: Any
) -> AsyncGenerator[tuple[Callable[[], Any], list[tuple[str, str, str, int]]], None]:
    """A broker on a Unix socket; what connects to it; and address, proxy, host and port of each that
    was let in."""
    broker, seen = Broker(Config(unix=path, **fields)), []

    @broker.on_open
    async def look(connection: Connection) -> None:
        seen.append(
            (
                connection.address,
                connection.peer_address,
                connection.remote_host,
                connection.remote_port,
            )
        )

    async def answer(request: Request) -> Response | None:
        if request.url.path != "/whoami":
            return None
        client = request.client
        return PlainTextResponse("nobody" if client is None else f"{client.host} {client.port}")

    if asks_app:
        broker.on_request(answer)
    async with trio.open_nursery() as nursery:
        await nursery.start(broker.serve)

        async def connect() -> Peer:
            return Peer(await trio.open_unix_socket(path))

        yield connect, seen
        broker.stop()


async def enter(peer: Peer, path: str = "/", **fields: str) -> str:
    """Shake hands; the head of the answer. It may be refused."""
    headers = {name.replace("_", "-"): value for name, value in fields.items()}
    await peer.send(handshake(path, headers=headers, host="localhost"))
    return await peer.receive_head()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "broker.sock"


async def test_the_client_is_who_the_proxy_says(path: Path) -> None:
    async with served(path, trusted_proxies=("unix",)) as (connect, seen):
        async with await connect() as peer:
            assert " 101 " in await enter(peer, X_Forwarded_For="6.6.6.6, 192.0.2.7")
        async with await connect() as peer:
            assert " 101 " in await enter(peer, Forwarded="for=6.6.6.6")
        async with await connect() as peer:
            await peer.send(
                b"GET /whoami HTTP/1.1\r\nHost: localhost\r\nX-Forwarded-For: 2001:db8::7\r\n\r\n"
            )
            assert (await peer.receive_eof()).endswith(b"2001:db8::7 0")
    assert seen == [("192.0.2.7", "unix", "192.0.2.7", 0), ("unix", "unix", "", 0)]


async def test_it_is_in_the_log_in_the_api_and_in_the_lines_of_requests(path: Path) -> None:
    fields: dict[str, Any] = {"api_key": "k", "access_log": True, "asks_app": False}
    fields["trusted_proxies"] = ("unix",)
    body = b"{}"
    call = (
        b"POST /api/connections HTTP/1.1\r\nHost: localhost\r\nX-API-Key: %b\r\n"
        b"X-Forwarded-For: %b\r\nContent-Length: 2\r\n\r\n" + body
    )
    with structlog.testing.capture_logs() as lines:
        async with served(path, **fields) as (connect, _), await connect() as peer:
            await enter(peer, X_Forwarded_For="192.0.2.7")
            async with await connect() as other:
                # Two requests of two clients on one connection of the proxy.
                await other.send(call % (b"k", b"192.0.2.8") + call % (b"wrong", b"192.0.2.9"))
                heard = await other.receive_eof()
    listed = json.loads(heard.split(b"\r\n\r\n")[1].split(b"HTTP/1.1")[0])["result"]["connections"]
    assert [each["address"] for each in listed.values()] == ["192.0.2.7"]
    by_event = {(line["event"], line.get("peer")) for line in lines}
    assert {
        ("open", "192.0.2.7"),
        ("request", "192.0.2.8"),
        ("request", "192.0.2.9"),
        ("api_key_refused", "192.0.2.9"),
    } <= by_event


async def test_who_is_turned_away_is_in_the_log_as_the_proxy_says(path: Path) -> None:
    with structlog.testing.capture_logs() as lines:
        async with served(path, trusted_proxies=("unix",), path_prefix="/chat") as (connect, seen):
            for number, (where, origin) in enumerate(
                (
                    ("/chat/", "https://evil.example"),
                    ("/", "http://localhost"),
                    ("/chat/nowhere", "http://localhost"),
                )
            ):
                async with await connect() as peer:
                    forwarded = {"X_Forwarded_For": f"192.0.2.{number}", "Origin": origin}
                    assert " 40" in await enter(peer, where, **forwarded)
            async with await connect() as peer:
                await peer.send(b"no request\r\n\r\n")
                assert b" 400 " in await peer.receive_eof()
    assert seen == []
    refused = [(line["status"], line["peer"]) for line in lines if line["event"] == "refused"]
    assert refused == [(403, "192.0.2.0"), (404, "192.0.2.1"), (404, "192.0.2.2"), (400, "unix")]


async def test_nobody_else_may_say_so(path: Path) -> None:
    async with served(path) as (connect, seen), await connect() as peer:
        assert " 101 " in await enter(peer, X_Forwarded_For="192.0.2.7")
    assert seen == [("unix", "unix", "", 0)]


SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
V1 = b"PROXY TCP4 192.0.2.7 10.0.0.1 4711 443\r\n"


async def test_by_the_proxy_protocol_it_has_a_port(path: Path) -> None:
    fields: dict[str, Any] = {"proxy_protocol": True, "trusted_proxies": ("unix",)}
    async with served(path, **fields) as (connect, seen):
        async with await connect() as peer:
            await peer.send(V1)
            # It passes on bytes: what stands in there is the client's own word.
            assert " 101 " in await enter(peer, X_Forwarded_For="6.6.6.6")
        async with await connect() as peer:
            await peer.send(b"PROXY UNKNOWN\r\n")
            # And nothing else says more, where the proxy does not know.
            assert " 101 " in await enter(peer, X_Forwarded_For="6.6.6.6")
        async with await connect() as peer:
            assert "400 Bad Request" in await enter(peer)
    assert seen == [("192.0.2.7:4711", "unix", "192.0.2.7", 4711), ("unix", "unix", "", 0)]


@pytest.mark.parametrize("fields", [{}, {"proxy_protocol": True, "trusted_proxies": ("10.0.0.1",)}])
async def test_from_others_it_is_no_request(path: Path, fields: dict[str, Any]) -> None:
    async with served(path, **fields) as (connect, seen), await connect() as peer:
        await peer.send(V1)
        assert "400 Bad Request" in await enter(peer)
    assert seen == []


async def test_it_stands_before_tls(path: Path, tmp_path: Path) -> None:
    authority, context = trustme.CA(), ssl.create_default_context()
    authority.configure_trust(context)
    issued = authority.issue_cert("localhost")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    issued.private_key_pem.write_to_path(key)
    issued.cert_chain_pems[0].write_to_path(cert)
    fields: dict[str, Any] = {"tls_cert": cert, "tls_key": key, "proxy_protocol": True}
    async with served(path, trusted_proxies=("unix",), **fields) as (_, seen):
        plain = await trio.open_unix_socket(path)
        await plain.send_all(V1)
        stream = trio.SSLStream(plain, context, server_hostname="localhost", https_compatible=True)
        async with Peer(stream) as peer:
            assert " 101 " in await enter(peer)
    assert seen == [("192.0.2.7:4711", "unix", "192.0.2.7", 4711)]


async def test_a_proxy_that_says_nothing_is_cut_as_anybody_is(path: Path) -> None:
    fields: dict[str, Any] = {"proxy_protocol": True, "open_seconds": 0.05}
    fields["trusted_proxies"] = ("unix",)
    async with served(path, **fields) as (connect, _), await connect() as peer:
        assert b"408 Request Timeout" in await peer.receive_eof()


def test_whose_word_counts_must_be_said() -> None:
    with pytest.raises(ValueError, match="proxy_protocol is true but trusted_proxies is not set"):
        Config(proxy_protocol=True)


# the prefix


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("/chat", 308),
        ("/chat/", 200),
        ("/chat/static/page.css", 200),
        ("/chat/healthz", 200),
        ("/healthz", 200),
        ("/readyz", 200),
        ("/", 404),
        ("/chatter", 404),
        ("/static/page.css", 404),
        ("http://localhost/chat/", 404),
        ("/chat/connection/websocket", 426),
        ("/connection/websocket", 404),
        ("/chat/chat", 404),
    ],
)
async def test_all_is_below_the_prefix_but_for_its_health(
    path: Path, target: str, status: int
) -> None:
    async with served(path, path_prefix="/chat") as (connect, _), await connect() as peer:
        await peer.send(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert (await peer.receive_eof()).startswith(f"HTTP/1.1 {status} ".encode())


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("/chat", 101),
        ("/chat/", 101),
        ("/chat?x=1", 101),
        ("/chat/connection/websocket?x=1", 101),
        ("/", 404),
        ("/connection/websocket", 404),
    ],
)
async def test_websockets_are_below_it_as_well(path: Path, target: str, status: int) -> None:
    async with served(path, path_prefix="/chat") as (connect, _), await connect() as peer:
        assert f" {status} " in await enter(peer, target)


@pytest.mark.parametrize("target", ["/chat/admin", "/chat/admin/"])
async def test_the_dashboard_finds_its_files_below_it(path: Path, target: str) -> None:
    fields: dict[str, Any] = {"path_prefix": "/chat", "admin_key": "k" * 32, "asks_app": False}
    async with served(path, **fields) as (connect, _), await connect() as peer:
        await peer.send(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        page = (await peer.receive_eof()).decode()
    links = re.findall(r'(?:href|src)="(/[^"]*)"', page)
    assert len(links) > 3
    assert all(link.startswith("/chat/static/") for link in links)


@pytest.mark.parametrize("prefix", ["chat", "/chat/", "/", "//", "/a b", "/a?b", "/a#b"])
def test_a_prefix_is_a_path_without_a_slash_at_its_end(prefix: str) -> None:
    with pytest.raises(ValueError, match="must be like"):
        Config(path_prefix=prefix)


# requests of backends, many on one connection


async def call(peer: Peer, target: str = "/api/publish", key: str = "k", **fields: str) -> str:
    """The head of the answer to a publish."""
    body = '{"channel":"a","data":1}'
    head = f"POST {target} HTTP/1.1\r\nHost: localhost\r\nX-API-Key: {key}\r\n"
    head += "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in fields.items())
    await peer.send(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    return (await peer.stream.receive_some()).decode()


BY_BYTES: dict[str, Any] = {"proxy_protocol": True, "trusted_proxies": ("unix",)}


@pytest.mark.parametrize(
    ("fields", "header", "seen"),
    [
        ({"trusted_proxies": ("unix",)}, ("192.0.2.8", "192.0.2.9"), ["192.0.2.8", "192.0.2.9"]),
        ({}, ("192.0.2.8", "192.0.2.9"), ["unix", "unix"]),
        (BY_BYTES, ("6.6.6.6", "7.7.7.7"), ["192.0.2.7:4711", "192.0.2.7:4711"]),
    ],
)
async def test_each_request_on_a_connection_is_of_whom_the_same_word_says(
    path: Path, fields: dict[str, Any], header: tuple[str, str], seen: list[str]
) -> None:
    with structlog.testing.capture_logs() as lines:
        served_now = served(path, asks_app=False, api_key="k", access_log=True, **fields)
        async with served_now as (connect, _), await connect() as peer:
            if fields == BY_BYTES:
                await peer.send(V1)
            assert " 200 " in await call(peer, X_Forwarded_For=header[0])
            assert " 401 " in await call(peer, key="wrong", X_Forwarded_For=header[1])
    asked = [line["peer"] for line in lines if line["event"] == "request"]
    refused = [line["peer"] for line in lines if line["event"] == "api_key_refused"]
    assert (asked, refused) == (seen, seen[1:])


@pytest.mark.parametrize("begin", [b"PROXY UNKNOWN\r\n", SIGNATURE + b"\x21\x31\0\0"])
async def test_of_whom_the_proxy_does_not_know_nothing_is_believed(
    path: Path, begin: bytes
) -> None:
    with structlog.testing.capture_logs() as lines:
        async with served(path, api_key="k", access_log=True, **BY_BYTES) as (connect, _):
            async with await connect() as peer:
                await peer.send(begin)
                for key in ("k", "k", "wrong"):
                    await call(peer, key=key, X_Forwarded_For="6.6.6.6")
            async with await connect() as peer:
                await peer.send(begin + b"GET /whoami HTTP/1.1\r\nHost: localhost\r\n")
                await peer.send(b"X-Forwarded-For: 6.6.6.6\r\n\r\n")
                assert b"nobody" in await peer.receive_eof()
    assert {line["peer"] for line in lines if "peer" in line} == {"unix"}


async def test_no_request_on_a_connection_is_beside_the_prefix(path: Path) -> None:
    served_now = served(path, asks_app=False, api_key="k", path_prefix="/chat")
    async with served_now as (connect, _), await connect() as peer:
        for _ in range(3):
            assert " 200 " in await call(peer, "/chat/api/publish")
        assert " 200 " in await call(peer, "/chat/api/publish", X_More="1")
        assert " 404 " in await call(peer, "/api/publish")


# a port of the API's own


@pytest.mark.parametrize(
    ("where", "request_line", "status"),
    [
        ("api", "POST /api/info", 200),
        ("api", "GET /metrics", 200),
        ("api", "GET /healthz", 200),
        ("api", "GET /readyz", 200),
        ("api", "GET /", 404),
        ("api", "GET /static/page.css", 404),
        ("api", "GET /connection/websocket", 404),
        ("api", "POST /emulation", 404),
        ("public", "POST /api/info", 404),
        ("public", "GET /metrics", 404),
        ("public", "GET /metrics/", 404),
        ("public", "POST /%61pi/info", 404),
        ("public", "GET /%6Detrics", 404),
        ("public", "GET /%6detrics%2F", 404),
        ("public", "POST /api%2finfo", 404),
        ("public", "POST //api/info", 404),
        ("public", "POST /x/../api/info", 404),
        ("public", "POST /.%2e/api/info", 404),
        ("public", "POST /./api/info", 404),
        ("public", "POST /%2561pi/info", 404),
        ("public", "POST /api\\info", 404),
        ("public", "POST /API/info", 404),
        ("public", "POST http://localhost/api/info", 404),
        ("public", "GET http://elsewhere/metrics", 404),
        ("public", "GET /metrics;x", 404),
        ("public", "GET /metrics#x", 404),
        ("api", "GET /api/../admin", 404),
        ("api", "GET /api/%2e%2e/admin", 404),
        ("api", "GET /metrics/../admin", 404),
        ("api", "GET http://localhost/metrics", 404),
        ("public", "GET /healthz", 200),
        ("public", "GET /readyz", 200),
        ("public", "GET /", 200),
    ],
)
async def test_the_api_has_a_port_of_its_own(
    path: Path, where: str, request_line: str, status: int
) -> None:
    port = free_port()
    fields: dict[str, Any] = {"api_listen": f"127.0.0.1:{port}", "api_key": "k"}
    async with served(path, asks_app=False, **fields) as (connect, _):
        if where == "api":
            peer = Peer(await trio.open_tcp_stream("127.0.0.1", port))
        else:
            peer = await connect()
        async with peer:
            await peer.send(
                f"{request_line} HTTP/1.1\r\nHost: localhost\r\nX-API-Key: k\r\n"
                "Connection: close\r\nContent-Length: 2\r\n\r\n{}".encode()
            )
            assert (await peer.receive_eof()).startswith(f"HTTP/1.1 {status} ".encode())


WEBSOCKET_PATHS = ["/", "/connection/websocket", "/api/info", "/metrics", "/healthz", "/%61pi/x"]


@pytest.mark.parametrize("target", WEBSOCKET_PATHS)
@pytest.mark.parametrize("served_paths", [("/", "/connection/websocket"), ("/*",)])
async def test_a_websocket_is_not_to_be_had_at_the_port_of_the_api(
    path: Path, target: str, served_paths: tuple[str, ...]
) -> None:
    port = free_port()
    async with (
        served(path, api_listen=f"127.0.0.1:{port}", websocket_paths=served_paths),
        Peer(await trio.open_tcp_stream("127.0.0.1", port)) as peer,
    ):
        assert " 404 " in await enter(peer, target)


async def test_a_port_of_the_api_that_is_taken_is_named(path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = Config(unix=path, api_listen=f"127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(
            ConfigError, match=r"api_listen: port \d+ on 127.0.0.1 is already in use$"
        ):
            await Broker(config).serve()


@pytest.mark.parametrize("place", ["9502", "localhost", "unix:", "::1:80", "localhost:x"])
def test_a_place_is_written_as_for_listen(place: str) -> None:
    with pytest.raises(ValueError, match="api_listen: "):
        Config(api_listen=place)
