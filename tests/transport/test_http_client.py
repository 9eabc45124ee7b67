"""Requests that the broker makes of a backend: signed, bounded, and each with its deadline."""

import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from itertools import pairwise

import httpx2
import pytest
import trio
import trustme
from standardwebhooks.webhooks import Webhook
from trio.testing import MockClock

from broker.errors import ConfigError
from broker.transport.http_client import (
    MAX_ANSWER_BYTES,
    REASON_LENGTH,
    Answer,
    Backend,
    HttpFailed,
    open_http_client,
    reason_of,
)
from broker.version import VERSION
from tests.conftest import WEBHOOK_SECRET

URL = "https://backend.example/events"
Handler = Callable[[httpx2.Request], httpx2.Response]


def backend_of(handler: Handler, secret: str = WEBHOOK_SECRET) -> Backend:
    client = httpx2.AsyncClient(transport=httpx2.MockTransport(handler), timeout=None)
    return Backend(client, secret, lambda: 1_614_265_330.5)


def answered(
    status: int = 200, body: bytes = b"{}", headers: Mapping[str, str] | None = None
) -> httpx2.Response:
    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 1000):
            yield body[start : start + 1000]

    return httpx2.Response(status, content=chunks(), headers=headers or {})


async def post(
    backend: Backend, body: bytes = b"[]", more: Mapping[str, str] | None = None
) -> Answer:
    return await backend.post(URL, "1.2", body, 5, more or {})


async def test_a_request_says_who_sent_it_and_is_signed() -> None:
    requests: list[httpx2.Request] = []

    def handle(request: httpx2.Request) -> httpx2.Response:
        requests.append(request)
        return answered(201, b'{"ok":1}', {"retry-after": "7"})

    answer = await post(backend_of(handle), b'{"a":1}', {"cookie": "a=b"})
    assert answer == Answer(201, "7", b'{"ok":1}')
    (request,) = requests
    assert (request.method, str(request.url), request.content) == ("POST", URL, b'{"a":1}')
    headers = request.headers
    assert headers["user-agent"] == f"trio-broker/{VERSION}"
    assert headers["content-type"] == "application/json"
    assert headers["accept-encoding"] == "identity"
    assert headers["cookie"] == "a=b"
    assert (headers["webhook-id"], headers["webhook-timestamp"]) == ("1.2", "1614265330")
    expected = Webhook(WEBHOOK_SECRET).sign("1.2", _moment(1_614_265_330), '{"a":1}')
    assert headers["webhook-signature"] == expected


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


async def test_no_other_header_takes_the_place_of_ours() -> None:
    requests: list[httpx2.Request] = []

    def handle(request: httpx2.Request) -> httpx2.Response:
        requests.append(request)
        return answered()

    forged = {"webhook-id": "9", "webhook-signature": "v1,x", "content-type": "text/plain"}
    await post(backend_of(handle), more=forged)
    (request,) = requests
    assert request.headers["webhook-id"] == "1.2"
    assert request.headers["webhook-signature"] != "v1,x"
    assert request.headers["content-type"] == "application/json"


async def test_without_a_secret_nothing_is_signed() -> None:
    def handle(request: httpx2.Request) -> httpx2.Response:
        assert "webhook-signature" not in request.headers
        return answered()

    assert (await post(backend_of(handle, ""))).status == 200


async def test_a_redirect_is_an_answer_and_no_cookie_is_kept() -> None:
    seen: list[str | None] = []

    def handle(request: httpx2.Request) -> httpx2.Response:
        seen.append(request.headers.get("cookie"))
        return answered(
            307, headers={"location": "https://elsewhere.example/", "set-cookie": "a=b"}
        )

    backend = backend_of(handle)
    assert [(await post(backend)).status for _ in "12"] == [307, 307]
    assert seen == [None, None]


@pytest.mark.parametrize("size", [0, 1, MAX_ANSWER_BYTES])
async def test_an_answer_of_that_size_is_taken(size: int) -> None:
    answer = await post(backend_of(lambda request: answered(body=b"x" * size)))
    assert answer.body == b"x" * size


async def test_of_an_answer_that_is_too_long_no_more_is_read_than_shows_it() -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 1000
            await trio.lowlevel.checkpoint()  # as a socket has one for each read
            yield b"x" * 1000

    def handle(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, content=endless())

    answer = await post(backend_of(handle))
    assert (answer.status, answer.body) == (200, None)
    assert sent <= MAX_ANSWER_BYTES + 2000


async def test_an_answer_that_takes_too_long_is_given_up(autojump_clock: MockClock) -> None:
    async def slow() -> AsyncIterator[bytes]:
        while True:
            yield b"x"
            await trio.sleep(1)

    before = trio.current_time()
    with pytest.raises(HttpFailed, match=r"^no answer within 5 s$"):
        await post(backend_of(lambda request: httpx2.Response(200, content=slow())))
    assert trio.current_time() - before == 5


def test_a_backend_does_not_show_its_secret() -> None:
    assert WEBHOOK_SECRET not in repr(backend_of(lambda request: answered()))


async def test_a_client_has_no_deadline_of_its_own_and_ends_with_its_block() -> None:
    async with open_http_client("webhooks.url", "webhooks") as client:
        assert client.timeout == httpx2.Timeout(None)
        assert not client.is_closed
    assert client.is_closed


async def test_without_its_package_the_setting_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(
        ConfigError, match=r"^webhooks\.url needs the package `httpx2`: pip install"
    ):
        async with open_http_client("webhooks.url", "webhooks"):
            pytest.fail("unreachable")


# over real sockets: how a request fails, and with which words

StreamHandler = Callable[[trio.abc.Stream], Awaitable[None]]


@asynccontextmanager
async def served(
    handler: StreamHandler, *, tls: ssl.SSLContext | None = None
) -> AsyncIterator[str]:
    """A server on loopback that does with each connection what a test says."""
    async with trio.open_nursery() as nursery:
        (tcp,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = tcp.socket.getsockname()[1]
        listener = tcp if tls is None else trio.SSLListener(tcp, tls)
        await nursery.start(partial(trio.serve_listeners, handler, [listener]))
        with trio.fail_after(20):  # noqa: ASYNC100 - the block that it yields to has them
            yield f"{'http' if tls is None else 'https'}://127.0.0.1:{port}/"
        nursery.cancel_scope.cancel()


async def post_to(url: str, seconds: float = 10) -> Answer:
    async with open_http_client("webhooks.rpc_url", "webhooks") as client:
        return await Backend(client, "", lambda: 0.0).post(url, "1", b"{}", seconds)


async def failure_of(url: str, seconds: float = 10) -> str:
    with pytest.raises(HttpFailed) as raised:
        await post_to(url, seconds)
    return str(raised.value)


async def hang_up(stream: trio.abc.Stream) -> None:
    await stream.receive_some()
    await stream.aclose()


def saying(answer: bytes) -> StreamHandler:
    async def say(stream: trio.abc.Stream) -> None:
        async with stream:
            await stream.receive_some()
            await stream.send_all(answer)

    return say


def certificate() -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    return context


async def test_a_certificate_that_is_not_trusted_is_the_reason() -> None:
    async with served(hang_up, tls=certificate()) as url:
        reason = await failure_of(url)
    assert reason.startswith("ConnectError: ")
    assert "certificate verify failed" in reason


async def test_plain_http_behind_a_url_for_tls_is_the_reason() -> None:
    async with served(saying(b"HTTP/1.1 400 Bad Request\r\n\r\n")) as url:
        reason = await failure_of(url.replace("http://", "https://"))
    assert reason.startswith("ConnectError: ")
    assert "SSL" in reason


async def test_nobody_who_listens_is_the_reason() -> None:
    async with served(hang_up) as url:
        pass
    assert "Connection refused" in await failure_of(url)


async def test_a_server_that_hangs_up_is_the_reason() -> None:
    async with served(hang_up) as url:
        reason = await failure_of(url)
    assert reason == ("RemoteProtocolError: Server disconnected without sending a response.")


async def test_a_server_that_speaks_something_else_is_the_reason() -> None:
    async with served(saying(b"220 smtp ready\r\n\r\n")) as url:
        reason = await failure_of(url)
    assert reason.startswith("RemoteProtocolError: ")
    assert len(reason) > len("RemoteProtocolError: ")


async def test_no_whole_answer_in_time_is_the_reason() -> None:
    async def begin(stream: trio.abc.Stream) -> None:
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{")
        await trio.sleep_forever()

    async with served(begin) as url:
        assert await failure_of(url, 0.1) == "no answer within 0.1 s"


async def test_more_requests_than_a_pool_usually_has_go_at_once() -> None:
    arrived, all_here = 0, trio.Event()

    async def answer_together(stream: trio.abc.Stream) -> None:
        nonlocal arrived
        async with stream:
            await stream.receive_some()
            arrived += 1
            if arrived == 150:
                all_here.set()
            await all_here.wait()
            await stream.send_all(b"HTTP/1.1 204 OK\r\n\r\n")

    async with served(answer_together) as url, open_http_client("x", "webhooks") as client:
        backend = Backend(client, "", lambda: 0.0)
        async with trio.open_nursery() as nursery:
            for _ in range(150):
                nursery.start_soon(backend.post, url, "1", b"{}", 20.0)


async def test_a_cancelled_request_closes_its_connection() -> None:
    came, ended = trio.Event(), trio.Event()

    async def watch(stream: trio.abc.Stream) -> None:
        async with stream:
            await stream.receive_some()
            came.set()
            while await stream.receive_some():
                pass
            ended.set()

    async with served(watch) as url, open_http_client("x", "webhooks") as client:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Backend(client, "", lambda: 0.0).post, url, "1", b"{}", 20.0)
            await came.wait()
            nursery.cancel_scope.cancel()
        await ended.wait()


def chained(*errors: BaseException) -> BaseException:
    for error, cause in pairwise(errors):
        error.__cause__ = cause
    return errors[0]


@pytest.mark.parametrize(
    "error, reason",
    [
        (ValueError("a"), "ValueError: a"),
        (ValueError(), "ValueError"),
        (ValueError(" a\n b\r\n"), "ValueError: a b"),
        (chained(ValueError(), OSError(), KeyError("why")), "ValueError: 'why'"),
        (chained(ValueError("a"), OSError("b")), "ValueError: a (b)"),
        (chained(ValueError("a: b"), OSError("b")), "ValueError: a: b"),
        (ExceptionGroup("both", [OSError("x"), OSError("y")]), "ExceptionGroup: x"),
        (
            chained(OSError("all"), ExceptionGroup("", [OSError("refused")])),
            "OSError: all (refused)",
        ),
    ],
)
def test_a_reason_has_the_words_of_the_error_or_of_its_cause(
    error: BaseException, reason: str
) -> None:
    assert reason_of(error) == reason


def test_a_reason_is_bounded_whatever_the_chain() -> None:
    ring = ValueError("a" * 1_000)
    ring.__cause__ = OSError("b")
    ring.__cause__.__cause__ = ring
    assert len(reason_of(ring)) == REASON_LENGTH


def test_the_cause_that_was_put_aside_has_the_words_too() -> None:
    error = ValueError()
    error.__context__ = OSError("aside")
    error.__suppress_context__ = True
    assert reason_of(error) == "ValueError: aside"
