"""Requests that the broker makes of a backend: signed, bounded, and each with its deadline."""

import sys
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import UTC, datetime

import httpx2
import pytest
import trio
from standardwebhooks.webhooks import Webhook
from trio.testing import MockClock

from broker.errors import ConfigError
from broker.transport.http_client import MAX_ANSWER_BYTES, Answer, Backend, open_http_client
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
    with pytest.raises(trio.TooSlowError):
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
