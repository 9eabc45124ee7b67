"""Questions to a backend: what is asked, what an answer does, and what happens without one."""

import json
import re
import sys
import textwrap
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import httpx2
import pytest
import trio
from standardwebhooks import Webhook as StandardWebhook
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from structlog.testing import capture_logs
from trio.testing import MockClock

from broker import (
    Broker,
    Config,
    ConfigError,
    ConnectEvent,
    Connection,
    PublishEvent,
    PublishReply,
    TokenRules,
    WebhookRules,
)
from broker.access.minting import mint
from broker.core.signing import signature
from broker.testing import Closed, Network, Peer, handshake, open_test_broker
from broker.webhooks import proxy as questions
from tests.conftest import WEBHOOK_SECRET

pytestmark = pytest.mark.usefixtures("logging_restored")

URL = "https://backend.example/"
RULES = WebhookRules(
    connect_url=URL + "connect",
    subscribe_url=URL + "subscribe",
    publish_url=URL + "publish",
    rpc_url=URL + "rpc",
    secret=WEBHOOK_SECRET,
)


def reply(body: bytes, status: int = 200, **headers: str) -> httpx2.Response:
    async def chunks() -> AsyncIterator[bytes]:
        yield body

    return httpx2.Response(status, content=chunks(), headers=headers)


@attrs.define
class Backend:
    """Answers each kind of question as `says` has it: by what, or by a function that does it."""

    says: dict[str, Any] = attrs.field(factory=dict)
    asked: list[tuple[str, dict[str, Any]]] = attrs.field(factory=list)
    requests: list[httpx2.Request] = attrs.field(factory=list)

    async def handle(self, request: httpx2.Request) -> httpx2.Response:
        kind = request.url.path.strip("/")
        self.requests.append(request)
        self.asked.append((kind, json.loads(request.content)))
        say = self.says.get(kind, {"result": {}})
        if callable(say):
            made = await say()
            assert isinstance(made, httpx2.Response)
            return made
        return reply(json.dumps(say).encode())

    @asynccontextmanager
    async def open_http_client(
        self, setting: str, extra: str
    ) -> AsyncGenerator[httpx2.AsyncClient]:
        transport = httpx2.MockTransport(self.handle)
        async with httpx2.AsyncClient(transport=transport, timeout=None) as client:
            yield client


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Backend:
    backend = Backend()
    monkeypatch.setattr(questions, "open_http_client", backend.open_http_client)
    return backend


def broker_of(**settings: Any) -> Broker:
    return Broker(Config(webhooks=RULES, **settings))


async def ask(peer: Peer, kind: str) -> Any:
    commands: dict[str, dict[str, Any]] = {
        "connect": {"connect": {}},
        "subscribe": {"subscribe": {"channel": "news"}},
        "publish": {"publish": {"channel": "news", "data": 1}},
        "rpc": {"rpc": {"method": "add", "data": [1, 2]}},
    }
    return await peer.request(**commands[kind])


async def peer_for(net: Network, kind: str) -> Peer:
    return await (net.open_websocket() if kind == "connect" else net.open_client())


async def test_each_kind_is_asked_in_centrifugo_s_words(
    autojump_clock: MockClock, backend: Backend
) -> None:
    backend.says["connect"] = {"result": {"user": "ann"}}
    async with open_test_broker(broker_of()) as net:
        peer = await net.open_client(token="t", data={"a": 1}, name="js", version="5")
        await peer.request(subscribe={"channel": "news", "token": "s", "data": 2})
        await peer.request(publish={"channel": "news", "data": {"x": [1.50]}})
        await peer.request(rpc={"method": "add", "data": [1, 2]})
    common = {
        "client": "1",
        "transport": "websocket",
        "protocol": "json",
        "encoding": "json",
        "address": "memory",
    }
    assert backend.asked == [
        (
            "connect",
            {**common, "user": "", "token": "t", "data": {"a": 1}, "name": "js", "version": "5"},
        ),
        ("subscribe", {**common, "user": "ann", "channel": "news", "token": "s", "data": 2}),
        ("publish", {**common, "user": "ann", "channel": "news", "data": {"x": [1.5]}}),
        ("rpc", {**common, "user": "ann", "method": "add", "data": [1, 2]}),
    ]


async def test_what_is_answered_counts(autojump_clock: MockClock, backend: Backend) -> None:
    backend.says = {
        "connect": {
            "result": {
                "user": "ann",
                "info": {"name": "Ann"},
                "data": {"motd": "hi"},
                "channels": ["a"],
            }
        },
        "subscribe": {"result": {"info": {"role": "boss"}, "data": "welcome"}},
        "publish": {"result": {"data": {"clean": True}}},
        "rpc": {"result": {"data": 3}},
    }
    async with open_test_broker(broker_of()) as net:
        peer = await net.open_websocket()
        reply = await peer.request(connect={})
        assert reply["connect"]["data"] == {"fd": 1, "motd": "hi"}
        assert net.broker.fds_of("ann") == [1]
        assert net.broker.topics() == {"a": 1}
        assert (await ask(peer, "subscribe"))["subscribe"]["data"] == "welcome"
        (info,) = net.broker.presence("news").values()
        assert (info.user, info.conn_info, info.chan_info) == (
            *("ann", b'{"name":"Ann"}', b'{"role":"boss"}'),
        )
        assert "publish" in await ask(peer, "publish")
        assert net.broker.history("news")[0][0].value == {"clean": True}
        assert (await ask(peer, "rpc"))["rpc"] == {"data": 3}


async def test_an_empty_result_is_a_yes(autojump_clock: MockClock, backend: Backend) -> None:
    async with open_test_broker(broker_of()) as net:
        peer = await net.open_client()
        assert "subscribe" in await ask(peer, "subscribe")
        assert "publish" in await ask(peer, "publish")
        assert net.broker.history("news")[0][0].value == 1
        assert (await ask(peer, "rpc"))["rpc"] == {"data": None}
        backend.says["publish"] = {"result": {"data": None}}
        await ask(peer, "publish")
        assert net.broker.history("news")[0][1].value is None


@pytest.mark.parametrize("kind", questions.KINDS)
async def test_a_backend_may_refuse_one_request(
    autojump_clock: MockClock, backend: Backend, kind: str
) -> None:
    async with open_test_broker(broker_of()) as net:
        peer = await peer_for(net, kind)
        backend.says[kind] = {"error": {"code": 1234, "message": "too late"}}
        assert (await ask(peer, kind))["error"] == {"code": 1234, "message": "too late"}
        backend.says[kind] = {"result": {}}
        assert kind in await ask(peer, kind)


@pytest.mark.parametrize("kind", questions.KINDS)
async def test_a_backend_may_send_a_client_away(
    autojump_clock: MockClock, backend: Backend, kind: str
) -> None:
    async with open_test_broker(broker_of()) as net:
        peer = await peer_for(net, kind)
        backend.says[kind] = {"disconnect": {"code": 4500, "reason": "banned"}}
        with pytest.raises(Exception, match="4500: banned"):
            await ask(peer, kind)


def raises(error: Exception) -> Callable[[], Any]:
    async def say() -> httpx2.Response:
        raise error

    return say


def says(body: bytes, status: int = 200, **headers: str) -> Callable[[], Any]:
    async def say() -> httpx2.Response:
        return reply(body, status, **headers)

    return say


async def hang() -> httpx2.Response:
    await trio.sleep_forever()
    raise AssertionError


async def endless() -> httpx2.Response:
    async def chunks() -> AsyncIterator[bytes]:
        while True:
            await trio.lowlevel.checkpoint()
            yield b" " * 2**16

    return httpx2.Response(200, content=chunks())


NO_ANSWERS = [
    (raises(httpx2.ConnectError("nobody there")), "ConnectError: nobody there"),
    (raises(ExceptionGroup("both", [OSError()])), "ExceptionGroup"),
    (hang, "no answer within 4 s"),
    (endless, "the answer is too long"),
    (says(b'{"result": {}}', 403), "status 403"),
    (says(b'{"result": {}}', 204), "status 204"),
    (says(b"", 307, location="https://evil.example/"), "status 307"),
    (says(b""), "not an answer"),
    (says(b"\xff"), "not an answer"),
    (says(b"[" * 20_000), "not an answer"),
    (says(b"[]"), "not an answer"),
    (says(b'{"result": {"data": ' + b"[" * 20_000), "not an answer"),
    (says(b"{}"), "neither result nor error"),
    (says(b'{"result": {"subs": {}}}'), "unknown field `subs`"),
    (says(b'{"error": {"code": 5}}'), "not an answer"),
    (says(b'{"disconnect": {"code": 1005}}'), "close code 1005 cannot be sent"),
    (says(b'{"disconnect": {"code": "x"}}'), "not an answer"),
]


@pytest.mark.parametrize("say, reason", NO_ANSWERS)
async def test_without_an_answer_a_client_is_told_to_try_again(
    autojump_clock: MockClock, backend: Backend, say: Any, reason: str
) -> None:
    async with open_test_broker(broker_of()) as net:
        peer, new = await net.open_client(), await net.open_websocket()
        backend.says = dict.fromkeys(questions.KINDS, say)
        with capture_logs() as lines:
            for kind in ("subscribe", "publish", "rpc", "subscribe"):
                error = (await ask(peer, kind))["error"]
                assert error == {"code": 100, "message": "internal", "temporary": True}
            with pytest.raises(Exception, match="3004: backend unavailable"):
                await ask(new, "connect")
            told = [line for line in lines if line["event"] == "question_failed"]
            assert [line["kind"] for line in told] == ["subscribe", "publish", "rpc", "connect"]
            for line in told:
                assert reason in line["reason"]
                assert line["backend"] == "backend.example"
            assert not [line for line in lines if line["event"] == "hook_failed"]
            backend.says.clear()
            for _ in range(2):
                await ask(peer, "publish")
            recovered = [line for line in lines if line["event"] == "question_recovered"]
            assert [line["kind"] for line in recovered] == ["publish"]


@pytest.mark.parametrize("data", [[1], "hello", False, 5])
async def test_data_of_a_connect_that_is_no_object_is_no_answer(
    autojump_clock: MockClock, backend: Backend, data: object
) -> None:
    backend.says["connect"] = {"result": {"data": data}}
    async with open_test_broker(broker_of()) as net:
        peer = await net.open_websocket()
        with capture_logs() as lines, pytest.raises(Exception, match="3004: backend unavailable"):
            await ask(peer, "connect")
    (failed,) = [line for line in lines if line["event"] == "question_failed"]
    assert "Expected `object | null`" in failed["reason"]


async def test_a_question_takes_so_long_at_most_and_holds_up_nobody_else(
    autojump_clock: MockClock, backend: Backend
) -> None:
    async with open_test_broker(broker_of()) as net:
        peer, other = await net.open_client(), await net.open_client()
        backend.says["rpc"] = hang
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, peer, "rpc")
            await trio.sleep(0.5)
            await ask(other, "publish")
            assert trio.current_time() - began == 0.5
        assert trio.current_time() - began == 4


async def test_bytes_of_a_client_over_protobuf_are_asked_about_in_base64(
    autojump_clock: MockClock, backend: Backend
) -> None:
    broker = broker_of()
    opened: list[Connection] = []

    @broker.on_open
    async def keep(connection: Connection) -> None:
        opened.append(connection)

    async with open_test_broker(broker) as net:
        await net.open_websocket(headers={"Sec-WebSocket-Protocol": "centrifuge-protobuf"})
        assert broker.hooks.publish is not None
        reply = await broker.hooks.publish(PublishEvent(opened[0], "news", b"\xff\x00"))
    assert reply == PublishReply(None)
    ((_, asked),) = backend.asked
    assert (asked["protocol"], asked["encoding"], asked["data"]) == ("protobuf", "json", "/wA=")


async def test_questions_are_signed_each_with_an_id_of_its_own(
    autojump_clock: MockClock, backend: Backend
) -> None:
    async with open_test_broker(broker_of()) as net:
        await ask(await net.open_client(), "rpc")
    for request in backend.requests:
        StandardWebhook(WEBHOOK_SECRET).verify(request.content, dict(request.headers))
    assert len({request.headers["webhook-id"] for request in backend.requests}) == 2


async def test_headers_of_the_handshake_go_along_if_they_are_listed(
    autojump_clock: MockClock, backend: Backend
) -> None:
    broker = broker_of(allowed_origins=("*",))
    async with open_test_broker(broker) as net:
        headers = {"Cookie": "id=7", "user-agent": "Phone", "X-Secret": "no", "Origin": "http://a"}
        peer = await net.open_websocket(headers=headers)
        await peer.request(connect={})
    shown = backend.requests[0].headers
    assert (shown["cookie"], shown["user-agent"], shown["origin"]) == ("id=7", "Phone", "http://a")
    assert "x-secret" not in shown
    assert shown["host"] == "backend.example"


async def test_headers_go_along_whole_and_in_utf_8(
    autojump_clock: MockClock, backend: Backend
) -> None:
    async with open_test_broker(broker_of()) as net:
        peer = await net.connect()
        lines = handshake().removesuffix(b"\r\n") + (
            b"Cookie: nick=\xe5\xbc\xa0\xe4\xb8\x89\r\nCookie: old=caf\xe9\r\n"
            b"X-Forwarded-For: 1.1.1.1\r\nX-Forwarded-For: 2.2.2.2\r\n\r\n"
        )
        await peer.send(lines)
        await peer.receive_head()
        assert "connect" in await peer.request(connect={})
    shown = dict(backend.requests[0].headers.raw)
    named = {name.lower(): value for name, value in shown.items()}
    assert named[b"cookie"] == "nick=张三; old=café".encode()
    assert named[b"x-forwarded-for"] == b"1.1.1.1, 2.2.2.2"


async def test_what_a_token_says_is_told(autojump_clock: MockClock, backend: Backend) -> None:
    broker = broker_of(tokens=TokenRules(hmac_secret="x" * 32))
    token = mint({"sub": "ann", "meta": {"a": 1}}, b"x" * 32, "HS256")
    async with open_test_broker(broker) as net:
        peer = await net.open_client(token=token)
        topic_token = mint({"sub": "ann", "channel": "$in"}, b"x" * 32, "HS256")
        await peer.request(subscribe={"channel": "$in", "token": topic_token})
        assert net.broker.fds_of("ann") == [peer.fd]
    (_, connect), (_, subscribe) = backend.asked
    assert connect["claims"] == {"sub": "ann", "meta": {"a": 1}}
    assert subscribe["claims"] == {"sub": "ann", "channel": "$in"}


@pytest.mark.parametrize("kind", questions.KINDS)
async def test_a_hook_and_a_url_for_the_same_are_a_mistake(kind: str, backend: Backend) -> None:
    broker = Broker(Config(webhooks=WebhookRules(**{f"{kind}_url": URL})))  # type: ignore[arg-type]

    async def hook(*_: object) -> None: ...

    getattr(broker, f"on_{kind}")(hook)
    with pytest.raises(ConfigError) as raised:
        await broker.serve(listeners=[])
    assert str(raised.value) == (
        f"webhooks.{kind}_url is set, and your program has an on_{kind} hook, "
        f"{hook.__module__}.{hook.__qualname__}: which of them decides? Keep one"
    )
    assert getattr(broker.hooks, kind) is not None


async def test_hooks_without_a_url_stay_the_app_s(
    autojump_clock: MockClock, backend: Backend
) -> None:
    broker = Broker(Config(webhooks=WebhookRules(rpc_url=URL + "rpc")))

    @broker.on_connect
    async def let_in(event: ConnectEvent) -> None: ...

    async with open_test_broker(broker) as net:
        await ask(await net.open_client(), "rpc")
        assert [kind for kind, _ in backend.asked] == ["rpc"]
        assert broker.hooks.owner("connect").endswith(".let_in")
        assert broker.hooks.publish is None
        assert broker.hooks.owner("rpc") == "webhooks.rpc_url"
    assert broker.hooks.rpc is None


async def test_without_its_package_a_url_is_a_mistake_in_the_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(ConfigError, match=r"webhooks\.connect_url needs the package"):
        await broker_of().serve(listeners=[])


@pytest.mark.parametrize("name", ["Host", "content-length", "Webhook-Signature", "a b", "", "a:"])
def test_headers_that_are_ours_cannot_be_forwarded(name: str) -> None:
    with pytest.raises(ValueError, match="must be a header that is not ours"):
        WebhookRules(forward_headers=(name,))


async def test_what_json_cannot_carry_on_is_refused_not_logged_as_a_bug(
    autojump_clock: MockClock, backend: Backend
) -> None:
    async with open_test_broker(broker_of()) as net:
        peer = await net.open_client()
        with capture_logs() as lines:
            for data in (10**40, -(10**40)):
                reply = await peer.request(rpc={"method": "a", "data": data})
                assert "rpc" in reply or reply["error"]["code"] == 107
        assert not [line for line in lines if line["event"] == "hook_failed"]


async def test_over_a_real_socket_to_a_real_server(
    serve_backend: Callable[[Callable[..., Any]], AbstractAsyncContextManager[str]],
) -> None:
    async def connect(request: Request) -> Response:
        StandardWebhook(WEBHOOK_SECRET).verify(await request.body(), dict(request.headers))
        return JSONResponse({"result": {"user": request.cookies["user"]}})

    async with serve_backend(connect) as url:
        rules = WebhookRules(connect_url=url, secret=WEBHOOK_SECRET)
        async with open_test_broker(Broker(Config(webhooks=rules))) as net:
            for user in ("ann", "ben"):
                peer = await net.open_websocket(headers={"Cookie": f"user={user}"})
                await peer.request(connect={})
                assert net.broker.fds_of(user) == [peer.fd]


async def test_a_page_of_another_program_may_not_use_the_user_s_cookies(
    autojump_clock: MockClock, backend: Backend
) -> None:
    async with open_test_broker(broker_of()) as net:
        peer = await net.connect()
        await peer.send(handshake(headers={"Origin": "http://localhost:1"}, host="localhost:9501"))
        assert (await peer.receive_head()).startswith("HTTP/1.1 403 ")


# what the documentation shows


def shown(page: str) -> dict[str, Any]:
    text = (Path(__file__).parents[2] / "docs" / "howto" / page).read_text("utf-8")
    found = re.search(r"^( *)```python\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    assert found is not None
    made: dict[str, Any] = {}
    exec(textwrap.dedent(found[2]), made)
    return made


async def test_the_backend_of_the_how_to_decides(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = shown("ask-a-backend.md")["app"]

    @asynccontextmanager
    async def open_http_client(setting: str, extra: str) -> AsyncGenerator[httpx2.AsyncClient]:
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app)) as client:
            yield client

    monkeypatch.setattr(questions, "open_http_client", open_http_client)
    url = "https://example.com/broker/"
    rules = WebhookRules(connect_url=url + "connect", subscribe_url=url + "subscribe")
    async with open_test_broker(Broker(Config(webhooks=rules))) as net:
        alice = await net.open_websocket(headers={"Cookie": "session=s3cret"})
        await alice.request(connect={})
        assert net.broker.fds_of("alice") == [alice.fd]
        assert "subscribe" in await alice.request(subscribe={"channel": "staff.plans"})
        bob = await net.open_websocket()
        with pytest.raises(Closed, match="4501: log in first"):
            await bob.request(connect={})


def test_the_check_of_the_how_to_knows_who_signed() -> None:
    verify = shown("webhooks.md")["verify"]
    headers = signature(WEBHOOK_SECRET, "a", time.time(), b"{}")
    assert verify(WEBHOOK_SECRET, headers, b"{}")
    assert not verify(WEBHOOK_SECRET, headers, b"[]")
    assert not verify(
        WEBHOOK_SECRET, signature(WEBHOOK_SECRET, "a", time.time() - 400, b"{}"), b"{}"
    )
