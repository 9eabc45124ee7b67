"""Requests of our own: how they fail, and with which words."""

import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from itertools import pairwise

import pytest
import trio
import trustme

from broker.errors import ConfigError
from broker.transport.http_client import (
    MAX_ANSWER_BYTES,
    REASON_LENGTH,
    Answer,
    Backend,
    RequestFailed,
    open_http_client,
    reason_of,
)

Handler = Callable[[trio.abc.Stream], Awaitable[None]]


@asynccontextmanager
async def served(handler: Handler, *, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """A server on loopback that does with each connection what a test says."""
    async with trio.open_nursery() as nursery:
        (tcp,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = tcp.socket.getsockname()[1]
        listener = tcp if tls is None else trio.SSLListener(tcp, tls)
        await nursery.start(partial(trio.serve_listeners, handler, [listener]))
        with trio.fail_after(20):
            yield f"{'http' if tls is None else 'https'}://127.0.0.1:{port}/"
        nursery.cancel_scope.cancel()


async def post(url: str, seconds: float = 10) -> Answer:
    async with open_http_client("webhooks.rpc_url", "webhooks") as client:
        return await Backend(client, "", lambda: 0.0).post(url, "1", b"{}", seconds)


async def failure_of(url: str, seconds: float = 10) -> str:
    with pytest.raises(RequestFailed) as raised:
        await post(url, seconds)
    return str(raised.value)


async def hang_up(stream: trio.abc.Stream) -> None:
    await stream.receive_some()
    await stream.aclose()


def saying(answer: bytes) -> Handler:
    async def say(stream: trio.abc.Stream) -> None:
        async with stream:
            await stream.receive_some()
            await stream.send_all(answer)

    return say


def certificate() -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    return context


async def test_an_answer_is_returned_whole() -> None:
    answer = b"HTTP/1.1 503 No\r\nRetry-After: 7\r\nContent-Length: 2\r\n\r\n{}"
    async with served(saying(answer)) as url:
        assert await post(url) == Answer(503, "7", b"{}")


async def test_of_an_answer_that_is_too_long_there_is_no_body() -> None:
    size = MAX_ANSWER_BYTES + 1
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + b" " * size
    async with served(saying(answer)) as url:
        assert await post(url) == Answer(200, "", None)


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


async def test_a_missing_package_is_told_with_the_way_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "httpx2", None)
    with pytest.raises(ConfigError, match=r"tokens.jwks_url needs .* 'trio-broker\[jwks\]'"):
        async with open_http_client("tokens.jwks_url", "jwks"):
            raise AssertionError


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
