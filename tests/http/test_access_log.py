"""A line for each HTTP request, if that is wanted."""

import json
from collections.abc import AsyncIterator
from typing import Any

import attrs
import pytest
import structlog
import trio
from starlette.requests import Request
from starlette.responses import Response
from trio.testing import MockClock

from broker import Broker, Config
from broker.http.access_log import Exchange
from broker.testing import Network, handshake, open_test_broker
from broker.transport.head import parse_head

KEY = "s3cret"


@pytest.fixture
async def net(autojump_clock: MockClock) -> AsyncIterator[Network]:
    async with open_test_broker(Broker(Config(api_key=KEY, access_log=True))) as network:
        yield network


def request(line: str, *fields: str, body: bytes = b"") -> bytes:
    length = [f"Content-Length: {len(body)}"] if body else []
    lines = [f"{line} HTTP/1.1", "Host: localhost", *fields, *length, "", ""]
    return "\r\n".join(lines).encode() + body


async def lines_of(net: Network, sent: bytes) -> list[Any]:
    """The lines of the access log for one connection, and what it was answered."""
    with structlog.testing.capture_logs() as lines:
        peer = await net.connect()
        await peer.send(sent)
        await peer.receive_head()
        await trio.sleep(1)
        await peer.aclose()
        await trio.sleep(1)
    return [line for line in lines if line["event"] == "request"]


@pytest.mark.parametrize(
    "sent, method, path, status",
    [
        (request("GET /healthz"), "GET", "/healthz", 200),
        (request("GET /nothing?token=secret"), "GET", "/nothing", 404),
        (request("HEAD /healthz"), "HEAD", "/healthz", 200),
        (request("GET /metrics"), "GET", "/metrics", 401),
        (request("POST /api/info", f"X-API-Key: {KEY}", body=b"{}"), "POST", "/api/info", 200),
        (request("POST /api/info", "X-API-Key: no", body=b"{}"), "POST", "/api/info", 401),
        (request("POST /api/none", f"X-API-Key: {KEY}", body=b"{}"), "POST", "/api/none", 404),
        (request("OPTIONS /emulation"), "OPTIONS", "/emulation", 204),
        (
            request("POST /emulation", body=b'{"session":"1.x","data":"{}"}'),
            *("POST", "/emulation", 404),
        ),
        (request("POST /", "Content-Length: 2000000"), "POST", "/", 413),
        (request("POST /", "Expect: 100-continue", "Content-Length: 1"), "POST", "/", 405),
    ],
)
async def test_a_request_has_one_line(
    autojump_clock: MockClock, net: Network, sent: bytes, method: str, path: str, status: int
) -> None:
    [line] = await lines_of(net, sent)
    assert (line["method"], line["path"], line["status"]) == (method, path, status)
    assert (line["peer"], line["log_level"]) == ("memory", "info")
    assert line["bytes"] > 50
    assert line["seconds"] >= 0
    assert "secret" not in str(line)


@pytest.mark.parametrize(
    "sent",
    [
        handshake(),
        request("POST /connection/http_stream", body=json.dumps({"id": 1, "connect": {}}).encode()),
        request("GET /connection/uni_sse"),
    ],
)
async def test_a_connection_is_no_entry(
    autojump_clock: MockClock, net: Network, sent: bytes
) -> None:
    assert await lines_of(net, sent) == []


async def test_requests_on_a_kept_connection_have_a_line_each(
    autojump_clock: MockClock, net: Network
) -> None:
    one = request("POST /api/info", f"X-API-Key: {KEY}", "User-Agent: cent", body=b"{}")
    lines = await lines_of(net, one * 3)
    assert [line["agent"] for line in lines] == ["cent"] * 3


async def test_a_client_cannot_make_a_long_line(autojump_clock: MockClock, net: Network) -> None:
    [line] = await lines_of(net, request(f"GET /{'x' * 3000}", f"User-Agent: {'y' * 3000}"))
    assert len(line["path"]) == len(line["agent"]) == 200


async def test_it_is_off_unless_asked_for_and_a_reload_turns_it_on(
    autojump_clock: MockClock,
) -> None:
    async with open_test_broker(Broker(Config(api_key=KEY))) as net:
        assert await lines_of(net, request("GET /healthz")) == []
        net.broker.reload(attrs.evolve(net.broker.config, access_log=True))
        assert len(await lines_of(net, request("GET /healthz"))) == 1


async def test_an_app_that_raises_is_a_500(autojump_clock: MockClock) -> None:
    broker = Broker(Config(access_log=True))

    @broker.on_request
    async def broken(request: Request) -> Response | None:
        raise RuntimeError("on purpose")

    async with open_test_broker(broker) as net:
        [line] = await lines_of(net, request("GET /mine"))
    assert line["status"] == 500


async def test_the_status_is_that_behind_a_continue() -> None:
    exchange = Exchange.begin(parse_head(request("POST /x")), "memory", is_logged=True)
    exchange.note_sent(b"HTTP/1.1 100 Continue\r\n\r\n")
    exchange.note_sent(b"HTTP/1.1 201 Created\r\n\r\n")
    exchange.note_sent(b"HTTP/1.1 500 is what a body may begin with")
    assert exchange.status == 201
