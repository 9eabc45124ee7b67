"""One HTTP request on a stream whose head was read before, with kind peers and others."""

import logging
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import h11
import pytest
import structlog
import trio
import trustme
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from trio.testing import MockClock, lockstep_stream_pair, memory_stream_pair

from broker.http.server import FREE_CHUNKS, HttpServer
from broker.transport.head import Request as HeadAndBehind
from broker.transport.head import parse_head, read_head

CRUMB = b"1\r\nx\r\n"
USUAL = b"200\r\n%b\r\n" % (b"x" * 512)

Endpoint = Callable[[Request], Awaitable[Response]]


def app_of(endpoint: Endpoint) -> ASGIApp:
    return Starlette(routes=[Route("/{path:path}", endpoint, methods=["GET", "POST"])])


async def echo(request: Request) -> Response:
    body = await request.body()
    return PlainTextResponse(f"{request.method} {request.url} {len(body)}")


async def serve(server: HttpServer, stream: trio.abc.Stream) -> None:
    """Serve a connection that asks for no WebSocket, as the broker does."""
    read = await read_head(stream, 8192)
    assert read is not None
    await server.serve(stream, HeadAndBehind(parse_head(read[0]), read[1]))


def request(line: str = "GET / HTTP/1.1", *fields: str, body: bytes = b"") -> bytes:
    return "\r\n".join([line, "Host: localhost:9501", *fields, "", ""]).encode() + body


async def read_all(stream: trio.abc.ReceiveStream) -> bytes:
    return b"".join([bytes(data) async for data in stream])


def parsed(raw: bytes, method: str = "GET") -> tuple[h11.Response, bytes]:
    """The one answer in `raw`, with h11 as judge that there is nothing else."""
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method=method, target="/", headers=[("Host", "a")]))
    client.send(h11.EndOfMessage())
    client.receive_data(raw)
    client.receive_data(b"")
    answer = client.next_event()
    while isinstance(answer, h11.InformationalResponse):
        answer = client.next_event()
    assert isinstance(answer, h11.Response)
    body = b""
    while isinstance(event := client.next_event(), h11.Data):
        body += event.data
    assert isinstance(event, h11.EndOfMessage)
    assert client.trailing_data[0] == b""
    return answer, body


async def exchange(server: HttpServer, sent: bytes) -> bytes:
    """Everything a peer gets that sends `sent`, then reads to the end and closes."""
    ours, theirs = memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve, server, theirs)
        await ours.send_all(sent)
        answer = await read_all(ours)
        await ours.aclose()
    return answer


async def test_a_request_is_answered_and_the_connection_closed() -> None:
    answer, body = parsed(await exchange(HttpServer(app_of(echo)), request("GET /a?b HTTP/1.1")))
    assert answer.status_code == 200
    assert body == b"GET http://localhost:9501/a?b 0"
    headers = list(answer.headers)
    assert (b"connection", b"close") in headers
    assert b"server" not in dict(headers)


async def test_a_body_that_came_with_the_head_is_not_lost() -> None:
    sent = request("POST / HTTP/1.1", "Content-Length: 5", body=b"12345")
    assert parsed(await exchange(HttpServer(app_of(echo)), sent))[1].endswith(b" 5")


async def test_a_peer_that_waits_for_100_continue_gets_it() -> None:
    ours, theirs = memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve, HttpServer(app_of(echo)), theirs)
        await ours.send_all(request("POST / HTTP/1.1", "Content-Length: 5", "Expect: 100-continue"))
        assert (await ours.receive_some()).startswith(b"HTTP/1.1 100 ")
        await ours.send_all(b"12345")
        assert parsed(await read_all(ours))[1].endswith(b" 5")
        await ours.aclose()


@pytest.mark.parametrize(
    "first, length",
    [
        (request(), 0),
        (request("POST / HTTP/1.1", "Content-Length: 5", body=b"12345"), 5),
        (
            request("POST / HTTP/1.1", "Transfer-Encoding: chunked", body=b"3\r\nabc\r\n0\r\n\r\n"),
            3,
        ),
        (
            request(
                "POST / HTTP/1.1", "Transfer-Encoding: chunked", body=b"1\r\na\r\n0\r\nX: y\r\n\r\n"
            ),
            1,
        ),
        (request("GET / HTTP/1.0"), 0),
    ],
    ids=["no body", "length", "chunked", "trailer", "1.0"],
)
@pytest.mark.parametrize(
    "behind",
    [
        b"\r\n",
        b"\r\n" * 100,
        request(),
        request() * 20,
        request("GET / HTTP/1.1", "Upgrade: websocket", "Connection: Upgrade"),
        request("POST / HTTP/1.1", "Content-Length: 100000", body=b"x" * 100_000),
        b"\x00\xff nonsense",
        b"0\r\n\r\n",
    ],
    ids=["line end", "line ends", "request", "requests", "upgrade", "body", "nonsense", "chunk"],
)
@pytest.mark.parametrize("size", [100, 10_000_000])
async def test_bytes_behind_a_request_are_no_part_of_it(
    first: bytes, length: int, behind: bytes, size: int, autojump_clock: MockClock
) -> None:
    """Hypercorn alone leaves half of these without an answer."""
    sent = first + behind
    ours, theirs = memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve, HttpServer(app_of(echo)), theirs)
        for start in range(0, len(sent), size):
            await ours.send_all(sent[start : start + size])
        answer, body = parsed(await read_all(ours))
        await ours.aclose()
    assert (answer.status_code, body.rpartition(b" ")[2]) == (200, b"%d" % length)
    assert (b"connection", b"close") in list(answer.headers)
    assert trio.current_time() == 0


async def test_a_body_of_the_largest_size_may_have_a_request_behind_it() -> None:
    ours, theirs = memory_stream_pair()
    async with trio.open_nursery() as nursery:
        server = HttpServer(app_of(echo), body_bytes=1000)
        nursery.start_soon(serve, server, theirs)
        await ours.send_all(request("POST / HTTP/1.1", "Content-Length: 1000", body=b"x" * 500))
        await trio.testing.wait_all_tasks_blocked()
        await ours.send_all(b"x" * 500 + request() * 30)
        assert parsed(await read_all(ours))[0].status_code == 200
        await ours.aclose()


@pytest.mark.parametrize("protocol", ["h2c", "H2C", "websocket"])
async def test_an_upgrade_header_is_ignored(protocol: str) -> None:
    sent = request(
        "GET / HTTP/1.1",
        "Connection: Upgrade, HTTP2-Settings",
        f"Upgrade: {protocol}",
        "HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA",
    )
    answer, body = parsed(await exchange(HttpServer(app_of(echo)), sent))
    assert (answer.status_code, body) == (200, b"GET http://localhost:9501/ 0")


async def test_an_app_that_raises_costs_500_and_one_log_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def broken(request: Request) -> Response:
        raise RuntimeError("on purpose")

    answer, _ = parsed(await exchange(HttpServer(app_of(broken)), request()))
    assert answer.status_code == 500
    [record] = caplog.records
    assert (record.name, record.levelno) == ("broker.http", logging.ERROR)
    assert "on purpose" in caplog.text


# bounds


async def never(request: Request) -> Response:
    await trio.sleep_forever()
    raise AssertionError


async def big(request: Request) -> Response:
    return PlainTextResponse(b"x" * 2**20)


@pytest.mark.parametrize(
    "endpoint, sent",
    [
        (never, request()),
        (echo, request("POST / HTTP/1.1", "Content-Length: 5", body=b"1234")),
    ],
)
async def test_a_request_that_does_not_finish_is_answered_408(
    endpoint: Endpoint, sent: bytes, autojump_clock: MockClock
) -> None:
    server = HttpServer(app_of(endpoint), request_seconds=30)
    with structlog.testing.capture_logs() as lines:
        answer, _ = parsed(await exchange(server, sent))
    assert answer.status_code == 408
    (line,) = [each for each in lines if each["event"] == "refused"]
    assert (line["status"], line["reason"]) == (408, "a request is done within 30 s")
    assert trio.current_time() == pytest.approx(30)


async def test_a_peer_that_does_not_read_is_cut(autojump_clock: MockClock) -> None:
    ours, theirs = lockstep_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve, HttpServer(app_of(big), request_seconds=30), theirs)
        await ours.send_all(request())
    assert trio.current_time() == pytest.approx(30)


async def test_a_cancellation_does_not_wait_for_a_peer_that_does_not_read() -> None:
    ours, theirs = lockstep_stream_pair()
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, HttpServer(app_of(big)), theirs)
            await ours.send_all(request())
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        with pytest.raises(trio.ClosedResourceError):
            await theirs.receive_some()


async def test_a_peer_that_does_not_close_is_waited_for_a_second(
    autojump_clock: MockClock,
) -> None:
    ours, theirs = memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve, HttpServer(app_of(echo)), theirs)
        await ours.send_all(request())
    assert trio.current_time() == pytest.approx(1)
    assert parsed(await read_all(ours))[0].status_code == 200


async def test_a_body_over_the_limit_is_refused_by_its_length() -> None:
    server = HttpServer(app_of(echo), body_bytes=1000)
    sent = request("POST / HTTP/1.1", "Content-Length: 1001", "Expect: 100-continue")
    with structlog.testing.capture_logs() as lines:
        assert parsed(await exchange(server, sent))[0].status_code == 413
    (line,) = [each for each in lines if each["event"] == "refused"]
    assert (line["status"], line["peer"]) == (413, "memory")
    assert line["reason"] == "the body of a request has at most 1000 bytes"
    sent = request("POST / HTTP/1.1", "Content-Length: 1000", body=b"x" * 1000)
    assert parsed(await exchange(server, sent))[0].status_code == 200


async def test_a_chunked_body_over_the_limit_is_refused_once_it_is_there() -> None:
    server = HttpServer(app_of(echo), body_bytes=1000)
    sent = request("POST / HTTP/1.1", "Transfer-Encoding: chunked")
    chunk = b"64\r\n%b\r\n" % (b"x" * 100)
    with structlog.testing.capture_logs() as lines:
        assert parsed(await exchange(server, sent + chunk * 11))[0].status_code == 413
    assert lines[0]["reason"] == "the body of a request has at most 1000 bytes"
    assert parsed(await exchange(server, sent + chunk * 9 + b"0\r\n\r\n"))[0].status_code == 200


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize(
    "body, status",
    [
        (CRUMB * FREE_CHUNKS + b"0\r\n\r\n", 200),
        (USUAL * 1000 + b"0\r\n\r\n", 200),
        (CRUMB * (FREE_CHUNKS + 1), 413),
        (USUAL * 100 + CRUMB * 1000, 413),
    ],
)
async def test_a_body_in_crumbs_is_refused_before_all_are_looked_at(
    body: bytes, status: int, at_once: bool
) -> None:
    """Ten thousand chunks of a byte come in one read, and each takes as long as one of a kilobyte."""
    head = request("POST / HTTP/1.1", "Transfer-Encoding: chunked")
    ours, theirs = memory_stream_pair()
    with structlog.testing.capture_logs() as lines, trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, HttpServer(app_of(echo)), theirs)
            await ours.send_all(head + body if at_once else head)
            if not at_once:
                await trio.testing.wait_all_tasks_blocked()
                await ours.send_all(body)
            assert parsed(await read_all(ours))[0].status_code == status
            await ours.aclose()
    reasons = [each["reason"] for each in lines if each["event"] == "refused"]
    assert [reason.partition(" comes ")[2][:32] for reason in reasons] == (
        ["in chunks of 256 bytes on averag"] if status == 413 else []
    )


async def test_an_app_that_leaves_the_body_unread_is_no_deadlock() -> None:
    async def careless(request: Request) -> Response:
        await trio.testing.wait_all_tasks_blocked()
        return PlainTextResponse("done")

    chunk = b"100\r\n%b\r\n" % (b"x" * 256)
    sent = request("POST / HTTP/1.1", "Transfer-Encoding: chunked") + chunk * 1000
    with trio.fail_after(5):
        assert parsed(await exchange(HttpServer(app_of(careless)), sent))[1] == b"done"


# faults


async def test_a_peer_that_goes_away_is_told_to_the_app() -> None:
    told = trio.Event()

    async def watching(request: Request) -> Response:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        told.set()
        return PlainTextResponse("")

    ours, theirs = memory_stream_pair()
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, HttpServer(app_of(watching)), theirs)
            await ours.send_all(request())
            await trio.testing.wait_all_tasks_blocked()
            await ours.aclose()
    assert told.is_set()


class GivesUp(Response):
    """As Starlette's `FileResponse` does once it has heard that the peer is gone."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})


@pytest.mark.parametrize("behind", [b"", b"GET / HTTP/1.1", request()])
@pytest.mark.parametrize("response", [PlainTextResponse("whole"), GivesUp()])
async def test_a_peer_that_leaves_before_its_answer_is_not_waited_for(
    response: Response, behind: bytes, autojump_clock: MockClock
) -> None:
    """With more bytes behind its request, Hypercorn alone would wait for ever."""
    go = trio.Event()

    async def slow(request: Request) -> Response:
        await go.wait()
        return response

    ours, theirs = memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve, HttpServer(app_of(slow)), theirs)
        await ours.send_all(request() + behind)
        await trio.testing.wait_all_tasks_blocked()
        await ours.aclose()
        go.set()
    assert trio.current_time() < 1


@pytest.mark.parametrize(
    "behind",
    [
        b"",
        b"zz\r\n",
        b"5\r\n123",
        b"5\r\n12345\r\n0\r\nbad trailer\r\n\r\n",
        b"ffffffffffffffffffffff\r\n",
    ],
)
async def test_a_torn_or_bad_body_ends_quietly(
    behind: bytes, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    async def ignorant(request: Request) -> Response:
        return PlainTextResponse("answered")

    for endpoint in (echo, ignorant):
        ours, theirs = memory_stream_pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, HttpServer(app_of(endpoint)), theirs)
            await ours.send_all(
                request("POST / HTTP/1.1", "Transfer-Encoding: chunked", body=behind)
            )
            await ours.send_eof()
            await read_all(ours)
            await ours.aclose()
    assert caplog.text == ""


# real sockets


class Listening:
    """`HttpServer` behind a listener, as the broker has it; `context` for TLS."""

    def __init__(self, server: HttpServer, context: ssl.SSLContext | None = None) -> None:
        self._server = server
        self._context = context

    async def meet(self, stream: trio.SocketStream) -> None:
        if self._context is None:
            await serve(self._server, stream)
        else:
            await serve(self._server, trio.SSLStream(stream, self._context, server_side=True))

    async def start(self, nursery: trio.Nursery) -> int:
        listeners: list[trio.SocketListener] = await nursery.start(
            partial(trio.serve_tcp, self.meet, 0, host="127.0.0.1")
        )
        port: int = listeners[0].socket.getsockname()[1]
        return port


async def client_address(request: Request) -> Response:
    assert request.client is not None
    return PlainTextResponse(f"{request.url.scheme} {request.client.host} {request.client.port}")


async def test_over_tcp_the_app_sees_the_peers_address() -> None:
    async with trio.open_nursery() as nursery:
        port = await Listening(HttpServer(app_of(client_address))).start(nursery)
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        async with stream:
            await stream.send_all(request())
            _, body = parsed(await read_all(stream))
            assert body.decode() == f"http 127.0.0.1 {stream.socket.getsockname()[1]}"
        nursery.cancel_scope.cancel()


async def test_over_tls_the_app_sees_https() -> None:
    authority = trustme.CA()
    theirs, ours = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), ssl.create_default_context()
    authority.issue_cert("localhost").configure_cert(theirs)
    authority.configure_trust(ours)
    theirs.set_alpn_protocols(["h2", "http/1.1"])
    ours.set_alpn_protocols(["h2"])
    async with trio.open_nursery() as nursery:
        port = await Listening(HttpServer(app_of(client_address)), theirs).start(nursery)
        tcp = await trio.open_tcp_stream("127.0.0.1", port)
        async with trio.SSLStream(tcp, ours, server_hostname="localhost") as stream:
            await stream.send_all(request())
            _, body = parsed(await read_all(stream))
            assert body.decode() == f"https 127.0.0.1 {tcp.socket.getsockname()[1]}"
        nursery.cancel_scope.cancel()


async def test_over_a_unix_socket_there_is_no_address(tmp_path: Path) -> None:
    async def peer(request: Request) -> Response:
        return PlainTextResponse(str(request.client))

    with trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        await listener.bind(str(tmp_path / "broker"))
        listener.listen()
        async with trio.open_nursery() as nursery:
            stream = await trio.open_unix_socket(str(tmp_path / "broker"))
            accepted, _ = await listener.accept()
            nursery.start_soon(serve, HttpServer(app_of(peer)), trio.SocketStream(accepted))
            async with stream:
                await stream.send_all(request())
                assert parsed(await read_all(stream))[1] == b"None"


async def test_a_large_body_that_nobody_reads_does_not_cost_the_peer_its_answer() -> None:
    """Closing with bytes unread would reset the connection under the answer."""
    async with trio.open_nursery() as nursery:
        port = await Listening(HttpServer(app_of(echo))).start(nursery)
        for _ in range(20):
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                await stream.send_all(request("POST / HTTP/1.1", f"Content-Length: {2 * 2**20}"))
                await stream.send_all(b"x" * 2**19)
                await stream.send_all(b"x" * 2**18)
                assert parsed(await read_all(stream))[0].status_code == 413
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("sent", [request(), request("POST / HTTP/1.1", "Content-Length: 9")])
@pytest.mark.parametrize("endpoint", [echo, big])
async def test_a_reset_ends_one_connection_quietly(
    endpoint: Endpoint, sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            port = await Listening(HttpServer(app_of(endpoint))).start(nursery)
            for pause in range(4):
                stream = await trio.open_tcp_stream("127.0.0.1", port)
                await stream.send_all(sent)
                for _ in range(pause):
                    await trio.testing.wait_all_tasks_blocked()
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                await stream.aclose()
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                await stream.send_all(request())
                assert parsed(await read_all(stream))[0].status_code == 200
            nursery.cancel_scope.cancel()
    assert caplog.text == ""
