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
from broker.config.reload import Settings
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
        (info,) = (await net.broker.presence("news")).values()
        assert (info.user, info.conn_info, info.chan_info) == (
            *("ann", b'{"name":"Ann"}', b'{"role":"boss"}'),
        )
        assert "publish" in await ask(peer, "publish")
        assert (await net.broker.history("news"))[0][0].value == {"clean": True}
        assert (await ask(peer, "rpc"))["rpc"] == {"data": 3}


async def test_an_empty_result_is_a_yes(autojump_clock: MockClock, backend: Backend) -> None:
    async with open_test_broker(broker_of()) as net:
        peer = await net.open_client()
        assert "subscribe" in await ask(peer, "subscribe")
        assert "publish" in await ask(peer, "publish")
        assert (await net.broker.history("news"))[0][0].value == 1
        assert (await ask(peer, "rpc"))["rpc"] == {"data": None}
        backend.says["publish"] = {"result": {"data": None}}
        await ask(peer, "publish")
        assert (await net.broker.history("news"))[0][1].value is None


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
            b"Authorization: a\r\nAuthorization: b\r\n\r\n"
        )
        await peer.send(lines)
        await peer.receive_head()
        assert "connect" in await peer.request(connect={})
    shown = dict(backend.requests[0].headers.raw)
    named = {name.lower(): value for name, value in shown.items()}
    assert named[b"cookie"] == "nick=张三; old=café".encode()
    assert named[b"authorization"] == b"a, b"


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


# places


async def answer_late() -> httpx2.Response:
    await trio.sleep(3)
    return reply(b'{"result": {}}')


def slow_rules(**fields: Any) -> WebhookRules:
    return attrs.evolve(RULES, connect_url="", **fields)


@asynccontextmanager
async def users(
    rules: WebhookRules = RULES, **settings: Any
) -> AsyncGenerator[tuple[Network, Callable[[str], Any]]]:
    """A broker whose backend decides, with keys so that each client may have a user."""
    tokens = TokenRules(hmac_secret="x" * 32, allow_anonymous=True)
    broker = Broker(Config(webhooks=rules, tokens=tokens, **settings))

    async def come(user: str) -> Peer:
        return await net.open_client(token=mint({"sub": user}, b"x" * 32, "HS256"))

    async with open_test_broker(broker) as net:
        yield net, come


async def test_one_user_with_500_connections_and_a_slow_backend_harms_nobody_else(
    autojump_clock: MockClock, backend: Backend
) -> None:
    backend.says["rpc"] = hang
    async with users() as (_, come), trio.open_nursery() as nursery:
        for _ in range(500):
            peer = await come("mallory")
            await peer.send_json({"id": 2, "rpc": {"method": "slow"}})
        await trio.testing.wait_all_tasks_blocked()
        assert [kind for kind, _ in backend.asked].count("rpc") == 16
        # All other kinds of questions are answered, for this user too.
        began = trio.current_time()
        ann, mallory = await come("ann"), await come("mallory")
        for peer in (ann, mallory):
            for kind in ("subscribe", "publish"):
                assert kind in await ask(peer, kind)
        # And of this kind those of others.
        backend.says["rpc"] = {"result": {"data": 5}}
        assert (await ask(ann, "rpc"))["rpc"] == {"data": 5}
        assert trio.current_time() == began
        nursery.cancel_scope.cancel()


async def test_waiting_for_a_place_is_not_the_backend_s_time(
    autojump_clock: MockClock, backend: Backend
) -> None:
    backend.says["rpc"] = answer_late
    async with users(slow_rules(pool_requests=1, pool_requests_per_user=1)) as (_, come):
        first, second = await come("ann"), await come("bob")
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, first, "rpc")
            await trio.testing.wait_all_tasks_blocked()
            # 3 s for a place and 3 s for the answer: each within its bound.
            assert "rpc" in await ask(second, "rpc")
        assert trio.current_time() - began == 6


@pytest.mark.parametrize("kind", questions.KINDS)
@pytest.mark.parametrize("own", [False, True])
async def test_without_a_place_a_client_is_told_to_try_again_and_the_log_says_which_wait_it_was(
    autojump_clock: MockClock, backend: Backend, kind: str, own: bool
) -> None:
    rules = attrs.evolve(RULES, pool_requests=2, pool_requests_per_user=1, answer_seconds=60)
    async with users(rules) as (net, _), trio.open_nursery() as nursery:

        async def peer_of(user: str) -> Peer:
            token = mint({"sub": user}, b"x" * 32, "HS256")
            if kind != "connect":
                return await net.open_client(token=token)
            peer = await net.open_websocket()
            await peer.send_json({"id": 9, "connect": {"token": token}})
            return peer

        names = ("ann", "ann") if own else ("ann", "bob", "cid")
        if kind != "connect":
            peers = [await peer_of(name) for name in names]
        backend.says[kind] = hang
        with capture_logs() as lines:
            if kind == "connect":
                peers = [await peer_of(name) for name in names]
                await trio.sleep(4.1)
                reason = "too many at once" if own else "backend unavailable"
                assert await peers[-1].receive_close() == (3004, reason)
            else:
                for peer in peers[:-1]:
                    nursery.start_soon(ask, peer, kind)
                    await trio.testing.wait_all_tasks_blocked()
                error = (await ask(peers[-1], kind))["error"]
                assert error["code"] == (111 if own else 100)
                assert error["temporary"] is True
        (line,) = [line for line in lines if line["event"] == "questions_crowded"]
        held = "user 'ann' held its share, 1 of 2 at once, for 4 s"
        assert line["reason"] == (held if own else "all 2 places were taken for 4 s")
        assert line["kind"] == kind
        assert not [line for line in lines if line["event"] == "question_failed"]
        nursery.cancel_scope.cancel()


def test_a_share_is_a_quarter_unless_it_is_set() -> None:
    assert WebhookRules().pool_share == 16
    assert WebhookRules(pool_requests=3).pool_share == 1
    assert WebhookRules(pool_requests=8, pool_requests_per_user=5).pool_share == 5
    for field in ("pool_requests", "pool_requests_per_user", "pool_seconds"):
        with pytest.raises(ValueError, match=f"{field} is 0"):
            WebhookRules(**{field: 0})  # type: ignore[arg-type]


def test_files_for_questions_are_counted() -> None:
    assert WebhookRules().most_requests == 0
    assert WebhookRules(url=URL).most_requests == 1
    assert RULES.most_requests == 4 * 64


# who has gone


@pytest.mark.parametrize("kind", questions.KINDS)
@pytest.mark.parametrize("end", ["eof", "close frame", "disconnect", "stop"])
async def test_a_question_of_a_client_that_has_gone_is_cancelled_at_once(
    autojump_clock: MockClock, backend: Backend, kind: str, end: str
) -> None:
    cancelled: list[float] = []

    async def note() -> httpx2.Response:
        try:
            await trio.sleep_forever()
        finally:
            cancelled.append(trio.current_time())
        raise AssertionError

    async with open_test_broker(broker_of()) as net:
        peer = await peer_for(net, kind)
        backend.says[kind] = note
        commands: dict[str, dict[str, Any]] = {
            "connect": {"connect": {}},
            "subscribe": {"subscribe": {"channel": "a"}},
            "publish": {"publish": {"channel": "a", "data": 1}},
            "rpc": {"rpc": {"method": "m"}},
        }
        asked = len(backend.asked)
        await peer.send_json(
            {"id": 2, **commands[kind]}, {"id": 3, "publish": {"channel": "b", "data": 1}}
        )
        await trio.sleep(1)
        began = trio.current_time()
        if end == "eof":
            await peer.aclose()
        elif end == "close frame":
            await peer.send_close()
        elif end == "disconnect":
            net.broker.disconnect(1)
        else:
            net.broker.stop()
        await trio.testing.wait_all_tasks_blocked()
        assert set(cancelled) == {began}
        # It is not carried out, and nothing is asked any more.
        at_the_end = len(backend.asked)
        await trio.sleep(1)
        assert len(backend.asked) == at_the_end <= asked + 2
        assert (await net.broker.history("a"))[0] == []
        assert net.broker.topics() == {}


@pytest.mark.parametrize("kind", ["subscribe", "publish", "rpc"])
async def test_nothing_is_asked_any_more_for_a_client_that_has_gone(
    autojump_clock: MockClock, backend: Backend, kind: str
) -> None:
    async with open_test_broker(broker_of()) as net:
        peer = await net.open_client()
        backend.says[kind] = hang
        commands: dict[str, dict[str, Any]] = {
            "subscribe": {"subscribe": {"channel": "t{}"}},
            "publish": {"publish": {"channel": "t{}", "data": 1}},
            "rpc": {"rpc": {"method": "m{}"}},
        }
        text = json.dumps(commands[kind])
        many = [{"id": n, **json.loads(text.replace("{}", str(n)))} for n in range(2, 42)]
        await peer.send_json(*many)
        await trio.testing.wait_all_tasks_blocked()
        asked = len(backend.asked)
        assert asked == 1 + (1 if kind == "rpc" else 8)
        await peer.send_close()
        await trio.sleep(1)
        assert len(backend.asked) == asked


async def test_the_place_of_a_client_that_has_gone_is_free(
    autojump_clock: MockClock, backend: Backend
) -> None:
    backend.says["rpc"] = hang
    async with users(slow_rules(pool_requests=2, pool_requests_per_user=1)) as (_, come):
        gone, other = await come("ann"), await come("ann")
        await gone.send_json({"id": 2, "rpc": {"method": "m"}})
        await trio.testing.wait_all_tasks_blocked()
        backend.says["rpc"] = {"result": {"data": 5}}
        await other.send_json({"id": 2, "rpc": {"method": "m"}})
        await trio.testing.wait_all_tasks_blocked()
        began = trio.current_time()
        await gone.aclose()
        assert (await other.receive_json())["rpc"] == {"data": 5}
        assert trio.current_time() == began


async def test_a_real_backend_sees_that_its_client_has_gone(
    serve_backend: Callable[[Callable[..., Any]], AbstractAsyncContextManager[str]],
) -> None:
    came, left = trio.Event(), trio.Event()

    async def rpc(request: Request) -> Response:
        await request.body()
        came.set()
        while (await request.receive())["type"] != "http.disconnect":
            pass
        left.set()
        return Response()

    async with serve_backend(rpc) as url:
        async with open_test_broker(Broker(Config(webhooks=WebhookRules(rpc_url=url)))) as net:
            peer = await net.open_client()
            await peer.send_json({"id": 2, "rpc": {"method": "m"}})
            await came.wait()
            await peer.aclose()
            await left.wait()


# headers that proxies set


PROXY_HEADERS = {
    "X-Forwarded-For": "1.1.1.1, 2.2.2.2",
    "X-Real-IP": "1.1.1.1",
    "X-Forwarded-User": "root",
    "Forwarded": "for=1.1.1.1",
    "CF-Connecting-IP": "1.1.1.1",
    "Cookie": "a=b",
}


@pytest.mark.parametrize(
    "proxies, address, shown",
    [
        ((), "203.0.113.9:5", {"x-forwarded-for": "203.0.113.9", "x-real-ip": "203.0.113.9"}),
        ((), "127.0.0.1:5", {"x-forwarded-for": "127.0.0.1", "x-real-ip": "127.0.0.1"}),
        (
            ("10.0.0.0/8",),
            "[2001:db8::7]:5",
            dict.fromkeys(("x-forwarded-for", "x-real-ip"), "2001:db8::7"),
        ),
        ((), "unix", {}),
        (("127.0.0.1",), "unix", {}),
        (("unix",), "unix", None),
        (("127.0.0.1",), "127.0.0.1:5", None),
    ],
)
def test_headers_of_proxies_are_passed_on_from_trusted_ones_alone(
    proxies: tuple[str, ...], address: str, shown: dict[str, str] | None
) -> None:
    came = {name.lower(): value for name, value in PROXY_HEADERS.items()}
    settings = Settings(Config(trusted_proxies=proxies))
    names = (*PROXY_HEADERS, "Accept")
    expected = came if shown is None else {**shown, "cookie": "a=b"}
    assert questions.forwarded(settings, names, address, came) == expected


def test_a_proxy_is_trusted_from_the_next_question_on() -> None:
    settings, came = Settings(Config()), {"x-real-ip": "1.1.1.1"}
    for proxies, shown in (((), {}), (("unix",), came), (("127.0.0.1",), {})):
        settings.replace(Config(trusted_proxies=proxies))
        assert questions.forwarded(settings, ("X-Real-IP",), "unix", came) == shown


async def test_a_stranger_s_word_for_its_address_reaches_no_backend(
    autojump_clock: MockClock, backend: Backend
) -> None:
    async with open_test_broker(broker_of()) as net:
        for _ in range(2):
            peer = await net.open_websocket(headers=PROXY_HEADERS)
            await peer.request(connect={})
            net.broker.reload(attrs.evolve(net.broker.config, trusted_proxies=("unix",)))
    for request in backend.requests:  # over a stream in memory, which is no proxy's
        assert not {"x-forwarded-for", "x-real-ip", "forwarded"} & set(request.headers)
        assert request.headers["cookie"] == "a=b"


# the log


async def test_a_backend_that_fails_now_and_then_does_not_fill_the_log(
    autojump_clock: MockClock, backend: Backend
) -> None:
    """Which a client may bring about that knows what to ask."""
    async with open_test_broker(broker_of()) as net:
        peer = await net.open_client()
        with capture_logs() as lines:
            for n in range(600):
                backend.says["rpc"] = says(b"", 500) if n % 2 else {"result": {}}
                await ask(peer, "rpc")
                await trio.sleep(0.1)
        told = [line["event"] for line in lines if line["event"].startswith("question_")]
        assert told == ["question_failed", "question_recovered"] * (len(told) // 2)
        assert 2 <= len(told) <= 14  # in a minute


async def test_recovery_says_how_many_questions_have_failed(
    autojump_clock: MockClock, backend: Backend
) -> None:
    backend.says["rpc"] = says(b"", 500)
    async with open_test_broker(broker_of()) as net:
        peer = await net.open_client()
        with capture_logs() as lines:
            for _ in range(5):
                await ask(peer, "rpc")
            backend.says.clear()
            await ask(peer, "rpc")
        (line,) = [line for line in lines if line["event"] == "question_recovered"]
        assert line["failures"] == 5


async def test_questions_of_one_client_go_side_by_side(
    autojump_clock: MockClock, backend: Backend
) -> None:
    async def answer() -> httpx2.Response:
        await trio.sleep(0.1)
        return reply(b'{"result": {}}')

    backend.says["subscribe"] = answer
    async with open_test_broker(broker_of()) as net:
        peer = await net.open_client()
        began = trio.current_time()
        await peer.send_json(*({"id": n, "subscribe": {"channel": f"t{n}"}} for n in range(2, 82)))
        for n in range(2, 82):
            assert (await peer.receive_json())["id"] == n
        assert trio.current_time() - began == pytest.approx(1.0)


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
