"""Hooks: which functions may be one, which replies pass, and what type checkers make of them."""

import asyncio
import functools
import json
import re
import shutil
import subprocess
import sys
import types
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import attrs
import msgspec
import pytest
import structlog
import trio
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from structlog.testing import capture_logs
from trio.testing import (
    MockClock,
    lockstep_stream_pair,
    memory_stream_pair,
    wait_all_tasks_blocked,
)

from broker import (
    Broker,
    Config,
    Connection,
    ConnectReply,
    Handshake,
    PublishReply,
    SubscribeReply,
    WebhookRules,
)
from broker.hooks import KINDS, HookFailed, Hooks
from broker.testing import Closed, MemoryListener, Network, Peer, handshake, open_test_broker

pytestmark = pytest.mark.usefixtures("logging_restored")

ROOT = Path(__file__).parent.parent
INTERNAL = {"code": 100, "message": "internal", "temporary": True}


async def may_read(event: object) -> None: ...


def called(function: Callable[..., Awaitable[Any]], *more: object) -> Callable[..., Awaitable[Any]]:
    """A decorator that is a plain function, and says by `functools.wraps` what it is around."""

    @functools.wraps(function)
    def wrapper(*args: object) -> Awaitable[Any]:
        return function(*args, *more)

    return wrapper


class App:
    async def may_read(self, event: object) -> None: ...

    async def __call__(self, event: object, *, more: int = 0) -> None: ...

    @staticmethod
    async def plain(event: object) -> None: ...

    @classmethod
    async def of_class(cls, event: object) -> None: ...


async def with_more(more: object, event: object) -> None: ...


async def with_more_behind(event: object, more: object) -> None: ...


# registration


def test_each_kind_has_a_place_and_a_decorator() -> None:
    places = [each.name for each in attrs.fields(Hooks) if not each.name.startswith("_")]
    decorators = [name for name in dir(Broker) if name.startswith("on_")]
    assert sorted(KINDS) == sorted(places) == sorted(name[3:] for name in decorators)


@pytest.mark.parametrize("kind", KINDS)
def test_a_decorator_gives_back_the_function_that_it_was_given(kind: str) -> None:
    broker = Broker()
    assert getattr(broker.hooks, kind) is None
    assert broker.hooks.owner(kind) == ""

    async def hook(*_: object) -> None: ...

    assert getattr(broker, f"on_{kind}")(hook) is hook
    assert getattr(broker.hooks, kind) is not None
    assert broker.hooks.owner(kind) == f"{__name__}.{hook.__qualname__}"
    others = {other for other in KINDS if getattr(broker.hooks, other) is not None}
    assert others == {kind}


@pytest.mark.parametrize(
    "function",
    [
        may_read,
        App().may_read,
        App(),
        App.plain,
        App.__dict__["plain"],
        App.of_class,
        functools.partial(with_more, 1),
        functools.partial(functools.partial(with_more), 1),
        functools.partial(with_more_behind, more=1),
        functools.partial(App(), more=1),
        called(may_read),
        called(called(may_read)),
        called(App()),
        called(functools.partial(with_more, 1)),
        functools.partial(called(with_more), 1),
        # It gives what it wraps an argument more, so it takes one less itself.
        called(with_more_behind, 1),
    ],
)
async def test_every_way_to_write_an_async_function_may_be_a_hook(
    function: Callable[..., Awaitable[None]],
) -> None:
    hooks = Hooks()
    hooks.set("presence", function)
    assert hooks.presence is not None
    event: Any = object()
    await hooks.presence(event)


def at_once(event: object) -> None: ...


async def yields(event: object) -> AsyncGenerator[None]:
    yield


async def nothing() -> None: ...


async def two(connection: object, topic: object = None) -> None: ...


async def three(self: object, connection: object, frame: object) -> None: ...


async def by_keyword(event: object, *, db: object) -> None: ...


@functools.wraps(at_once)
def around(*args: object) -> None: ...


class Sync:
    def __call__(self, event: object) -> None: ...


def circle() -> object:
    def function(event: object) -> None: ...

    function.__wrapped__ = function  # type: ignore[attr-defined]
    return function


HERE = re.escape(__name__)
READS = r"; it has to be async def \(event: SubscribeEvent\) -> SubscribeReply \| None"


@pytest.mark.parametrize(
    "given, text",
    [
        (None, "None is no function"),
        ("news", "a str is no function"),
        (App.__dict__["of_class"], "a classmethod is no function"),
        (at_once, f"{HERE}.at_once is no async function"),
        (lambda event: None, f"{HERE}.<lambda> is no async function"),
        (functools.partial(at_once), f"{HERE}.at_once is no async function"),
        (around, f"{HERE}.at_once is no async function"),
        (Sync(), f"{HERE}.Sync is no async function"),
        (Sync().__call__, f"{HERE}.Sync.__call__ is no async function"),
        (App, f"{HERE}.App is no async function"),
        (SubscribeReply, "broker.hooks.SubscribeReply is no async function"),
        (print, "builtins.print is no async function"),
        (circle(), f"{HERE}.circle.<locals>.function is no async function"),
        (yields, f"{HERE}.yields yields, and a hook returns"),
        (functools.partial(yields), f"{HERE}.yields yields, and a hook returns"),
        (nothing, rf"{HERE}.nothing takes \(\)"),
        (three, rf"{HERE}.three takes \(self, connection, frame\)"),
        (with_more, rf"{HERE}.with_more takes \(more, event\)"),
        (by_keyword, rf"{HERE}.by_keyword takes \(event, \*, db\)"),
        (App.may_read, rf"{HERE}.App.may_read takes \(self, event\)"),
        (functools.partial(may_read, 1), rf"{HERE}.may_read takes \(\)"),
    ],
)
def test_another_thing_is_refused_in_one_line_with_the_right_signature(
    given: Any, text: str
) -> None:
    broker = Broker()
    with pytest.raises(TypeError, match=f"^on_subscribe: {text}{READS}$"):
        broker.on_subscribe(given)
    assert broker.hooks.subscribe is None
    broker.on_subscribe(may_read)  # the place is still free


@pytest.mark.parametrize(
    "kind, signature",
    [
        ("open", "(connection: Connection) -> None"),
        ("message", "(connection: Connection, frame: Frame) -> None"),
        ("close", "(connection: Connection, close: Close) -> None"),
        ("rpc", "(connection: Connection, method: str, data: object) -> object"),
        ("request", "(request: Request) -> Response | None"),
        ("connect", "(event: ConnectEvent) -> ConnectReply | None"),
        ("subscribe", "(event: SubscribeEvent) -> SubscribeReply | None"),
        ("publish", "(event: PublishEvent) -> PublishReply | None"),
        ("presence", "(event: ReadEvent) -> None"),
        ("history", "(event: ReadEvent) -> None"),
        ("event", "(event: Event) -> None"),
    ],
)
def test_each_kind_names_its_own_signature(kind: str, signature: str) -> None:
    async def four(a: object, b: object, c: object, d: object) -> None: ...

    async def none() -> None: ...

    for function, taken in ((four, "(a, b, c, d)"), (none, "()")):
        with pytest.raises(TypeError) as raised:
            getattr(Broker(), f"on_{kind}")(function)
        assert str(raised.value) == (
            f"on_{kind}: {__name__}.{function.__qualname__} takes {taken}; "
            f"it has to be async def {signature}"
        )


def test_optional_arguments_beyond_those_of_the_kind_do_no_harm() -> None:
    Broker().on_subscribe(two)
    Broker().on_message(two)


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_hook_of_a_kind_is_refused_and_the_first_one_named(kind: str) -> None:
    broker = Broker()

    async def first(*_: object) -> None: ...

    async def second(*_: object) -> None: ...

    getattr(broker, f"on_{kind}")(first)
    hook = getattr(broker.hooks, kind)
    for again in (second, first):  # a module that is loaded twice does the latter
        with pytest.raises(RuntimeError) as raised:
            getattr(broker, f"on_{kind}")(again)
        assert str(raised.value) == (
            f"on_{kind} is {__name__}.{first.__qualname__} already, and has one hook only: "
            f"keep that or {__name__}.{again.__qualname__}, or make one function of both"
        )
    assert getattr(broker.hooks, kind) is hook


def test_one_function_may_be_the_hook_of_several_kinds_and_brokers() -> None:
    for broker in (Broker(), Broker()):
        broker.on_presence(may_read)
        broker.on_history(may_read)


@pytest.mark.parametrize("kind", ["connect", "subscribe", "publish", "rpc"])
async def test_while_a_url_answers_a_hook_of_that_kind_is_a_second_one(
    kind: str, autojump_clock: MockClock
) -> None:
    pytest.importorskip("httpx2")
    url = f"{kind}_url"
    rules = WebhookRules(**{url: "https://backend.example/"})  # type: ignore[arg-type]
    broker = Broker(Config(webhooks=rules))

    async def hook(*_: object) -> None: ...

    register = getattr(broker, f"on_{kind}")
    async with open_test_broker(broker):
        with pytest.raises(RuntimeError, match=f"^on_{kind} is webhooks.{url} already"):
            register(hook)
    register(hook)


def test_a_hook_is_lent_for_as_long_as_the_block_even_if_it_raises() -> None:
    hooks = Hooks()
    with suppress(ZeroDivisionError), hooks.lend("presence", may_read, "a setting"):
        assert (hooks.owner("presence"), hooks.presence is None) == ("a setting", False)
        raise ZeroDivisionError
    assert (hooks.owner("presence"), hooks.presence) == ("", None)


def test_a_hook_that_is_lent_in_vain_leaves_the_first_one() -> None:
    hooks = Hooks()
    hooks.set("presence", may_read)
    with pytest.raises(RuntimeError):
        with hooks.lend("presence", may_read, "a setting"):
            raise AssertionError
    assert hooks.owner("presence") == f"{__name__}.may_read"


def test_nobody_sets_a_hook_past_the_checks() -> None:
    with pytest.raises(attrs.exceptions.FrozenAttributeError):
        Hooks().presence = may_read


async def test_an_event_hook_is_set_before_serve_or_not_at_all(autojump_clock: MockClock) -> None:
    broker = Broker()
    async with open_test_broker(broker):
        with pytest.raises(RuntimeError, match=r"^on_event: set it before `serve`"):
            broker.on_event(may_read)
    broker.on_event(may_read)


# replies of the wrong kind


@pytest.fixture
def failures() -> list[tuple[str, str]]:
    """The hooks that have failed from here on, each with the text of its exception."""
    failed: list[tuple[str, str]] = []

    def keep(_: object, __: object, line: Mapping[str, Any]) -> Any:
        if line["event"] == "hook_failed":
            failed.append((line["hook"], str(sys.exc_info()[1])))
        raise structlog.DropEvent

    structlog.configure(processors=[keep])
    return failed


@pytest.fixture
def config(failures: object) -> Config:
    """A config whose hook of subscriptions decides about patterns as well."""
    return Config(hook_decides_patterns=True)


NAY: tuple[object, ...] = (
    False,
    True,
    0,
    "",
    "no",
    b"",
    (),
    [],
    {},
    {"user": "bob"},
    object(),
    NotImplemented,
)
"""Values that are nobody's reply."""

COMMANDS: list[tuple[str, str, dict[str, Any], object]] = [
    ("connect", "ConnectReply | None", {"connect": {}}, SubscribeReply()),
    ("subscribe", "SubscribeReply | None", {"subscribe": {"channel": "a"}}, ConnectReply()),
    ("subscribe", "SubscribeReply | None", {"subscribe": {"channel": "a.>"}}, SubscribeReply),
    ("publish", "PublishReply | None", {"publish": {"channel": "a", "data": 1}}, SubscribeReply()),
    (
        "publish",
        "PublishReply | None",
        {"rpc": {"method": "publish", "data": {"topic": "a", "data": 1}}},
        ConnectReply(),
    ),
    ("presence", "None", {"presence": {"channel": "a"}}, SubscribeReply()),
    ("presence", "None", {"presence_stats": {"channel": "a"}}, PublishReply()),
    ("history", "None", {"history": {"channel": "a", "limit": -1}}, PublishReply()),
]


def returning(value: object) -> Callable[..., Awaitable[Any]]:
    async def hook(*_: object) -> object:
        return value

    return hook


@pytest.mark.parametrize("kind, gives, command, other", COMMANDS)
async def test_a_reply_of_another_kind_answers_the_request_with_100_and_says_why_in_the_log(
    kind: str,
    gives: str,
    command: dict[str, Any],
    other: object,
    autojump_clock: MockClock,
    net: Network,
    failures: list[tuple[str, str]],
) -> None:
    (method,) = command
    values = iter([*NAY, other])

    async def hook(event: object) -> Any:
        return next(values)

    peer = await (net.open_websocket() if kind == "connect" else net.open_client())
    getattr(net.broker, f"on_{kind}")(hook)
    for value in (*NAY, other):
        reply = await peer.request(**command)
        assert reply == {"id": reply["id"], "error": INTERNAL}
        where, text = failures.pop()
        name = type(value).__name__
        article = "an" if name in ("int", "object") else "a"
        shown = str(value) if isinstance(value, bool) else f"{article} {name}"
        returned = f"on_{kind}: {__name__}.{hook.__qualname__} returned {shown}"
        said = f"{returned}; it may return {gives}; to say no, raise Refused"
        assert (where, text) == (method, said)
    assert failures == []
    assert net.broker.is_established(peer.fd)
    stats = net.broker.stats()
    assert (stats.hub.subscriptions, stats.published) == (0, 0)
    info = net.broker.connection_info(peer.fd)
    assert info is not None
    assert (info.user, info.protocol == "plain") == ("", kind == "connect")


@pytest.mark.parametrize("kind, gives, command, other", COMMANDS)
async def test_the_reply_of_its_kind_passes_and_none_does(
    kind: str,
    gives: str,
    command: dict[str, Any],
    other: object,
    autojump_clock: MockClock,
    net: Network,
    failures: list[tuple[str, str]],
) -> None:
    right = {"connect": ConnectReply(), "subscribe": SubscribeReply(), "publish": PublishReply()}
    values = iter([None, right.get(kind)])

    async def hook(event: object) -> Any:
        return next(values)

    (method,) = command
    getattr(net.broker, f"on_{kind}")(hook)
    for _ in (None, right.get(kind)):
        peer = await (net.open_websocket() if kind == "connect" else net.open_client())
        assert method in await peer.request(**command)
    assert failures == []


async def test_an_anonymous_client_does_not_read_what_false_was_to_keep_from_it(
    autojump_clock: MockClock, net: Network, failures: list[tuple[str, str]]
) -> None:
    net.broker.on_subscribe(returning(False))
    peer = await net.open_client()
    assert (await peer.request(subscribe={"channel": "$payroll"}))["error"] == INTERNAL
    net.broker.publish_nowait("$payroll", 5000)
    with trio.move_on_after(1) as silence:
        await peer.receive_json()
    assert silence.cancelled_caught
    assert len(failures) == 1


async def test_a_subclass_of_a_reply_is_one(autojump_clock: MockClock, net: Network) -> None:
    @attrs.frozen
    class Mine(SubscribeReply):
        more: int = 0

    net.broker.on_subscribe(returning(Mine(data="hello")))
    peer = await net.open_client()
    assert (await peer.request(subscribe={"channel": "a"}))["subscribe"]["data"] == "hello"


async def closed_with(peer: Peer) -> int | None:
    with pytest.raises(Closed) as closed:
        await peer.receive_text()
    return closed.value.code


@pytest.mark.parametrize("value", NAY)
async def test_an_open_hook_that_returns_something_ends_its_connection(
    autojump_clock: MockClock, net: Network, failures: list[tuple[str, str]], value: object
) -> None:
    net.broker.on_open(returning(value))
    peer = await net.open_plain()
    assert await closed_with(peer) == 1011
    ((kind, text),) = failures
    assert kind == "open"
    assert text.endswith("; it may return None; to send the peer away, raise Disconnect")


@pytest.mark.parametrize("is_client", [False, True])
async def test_a_message_hook_that_returns_something_ends_its_connection(
    autojump_clock: MockClock, net: Network, failures: list[tuple[str, str]], is_client: bool
) -> None:
    net.broker.on_message(returning(False))
    if is_client:
        peer = await net.open_client()
        await peer.send_json({"send": {"data": 1}})
        assert (await peer.receive_json())["push"]["disconnect"]["code"] == 1011
    else:
        peer = await net.open_plain()
        await peer.send_text("hello")
    assert await closed_with(peer) == 1011
    ((kind, text),) = failures
    assert kind == "message"
    assert "returned False; it may return None" in text


async def test_a_close_hook_that_returns_something_is_logged(
    autojump_clock: MockClock, net: Network, failures: list[tuple[str, str]]
) -> None:
    net.broker.on_close(returning(True))
    await (await net.open_plain()).aclose()
    await trio.sleep(1)
    ((kind, text),) = failures
    assert kind == "close"
    assert text.endswith("returned True; it may return None")


async def test_an_event_hook_that_returns_something_is_logged_and_the_next_event_comes(
    autojump_clock: MockClock, failures: list[tuple[str, str]]
) -> None:
    broker = Broker()
    broker.on_event(returning(False))
    async with open_test_broker(broker):
        pass
    assert [kind for kind, _ in failures] == ["event", "event"]  # started, stopped
    assert failures[0][1].endswith("returned False; it may return None")


async def get(net: Network) -> str:
    peer = await net.connect()
    await peer.send(b"GET /mine HTTP/1.1\r\nHost: localhost\r\n\r\n")
    head = await peer.receive_head()
    await peer.receive_eof()
    return head.split("\r\n")[0]


@pytest.mark.parametrize("value", [*NAY, Starlette(), Response])
async def test_a_request_hook_that_returns_no_response_costs_500_and_one_log_line(
    autojump_clock: MockClock, net: Network, value: object, caplog: pytest.LogCaptureFixture
) -> None:
    net.broker.on_request(returning(value))
    assert (await get(net)).startswith("HTTP/1.1 500 ")
    (record,) = caplog.records
    assert record.exc_info is not None
    assert "; it may return Response | None" in str(record.exc_info[1])


async def test_a_request_hook_may_return_any_response_or_none(
    autojump_clock: MockClock, net: Network
) -> None:
    values = iter([Response(status_code=418), PlainTextResponse("mine"), None])

    async def hook(request: object) -> Response | None:
        return next(values)

    net.broker.on_request(hook)
    statuses = [(await get(net)).split()[1] for _ in range(3)]
    assert statuses == ["418", "200", "404"]


@pytest.mark.parametrize("value", [None, False, True, 0, "", [], {"a": [1.5]}, msgspec.Raw(b"7")])
async def test_an_rpc_hook_may_return_any_value_that_json_can_say(
    autojump_clock: MockClock, net: Network, value: object, failures: list[tuple[str, str]]
) -> None:
    net.broker.on_rpc(returning(value))
    reply = await (await net.open_client()).request(rpc={"method": "mine"})
    said = 7 if isinstance(value, msgspec.Raw) else value
    assert reply["rpc"] == {"data": said}
    assert failures == []


async def test_an_rpc_hook_that_returns_anything_else_fails(
    autojump_clock: MockClock, net: Network, failures: list[tuple[str, str]]
) -> None:
    net.broker.on_rpc(returning(object()))
    reply = await (await net.open_client()).request(rpc={"method": "mine"})
    assert reply["error"] == INTERNAL
    assert [kind for kind, _ in failures] == ["rpc"]


async def test_a_decorator_that_makes_a_hook_sync_after_all_lets_nobody_in(
    autojump_clock: MockClock, net: Network, failures: list[tuple[str, str]]
) -> None:
    @functools.wraps(may_read)
    def hook(event: object) -> SubscribeReply:
        return SubscribeReply()

    net.broker.on_subscribe(hook)  # type: ignore[type-var]
    reply = await (await net.open_client()).request(subscribe={"channel": "a"})
    assert reply["error"] == INTERNAL
    name = f"{__name__}.may_read"
    text = f"on_subscribe: {name} is not async after all: it returned a SubscribeReply"
    assert failures == [("subscribe", text)]


async def test_a_value_is_named_by_its_type_as_it_may_be_secret(
    autojump_clock: MockClock, net: Network, failures: list[tuple[str, str]]
) -> None:
    net.broker.on_connect(returning({"password": "hunter2"}))
    await (await net.open_websocket()).request(connect={})
    ((_, text),) = failures
    assert "hunter2" not in text


async def test_one_failure_is_one_log_line(autojump_clock: MockClock) -> None:
    broker = Broker()
    broker.on_subscribe(returning(False))
    async with open_test_broker(broker) as net:
        peer = await net.open_client()
        with capture_logs() as lines:
            await peer.request(subscribe={"channel": "a"})
    assert [(line["event"], line["fd"]) for line in lines] == [("hook_failed", peer.fd)]


# replies check themselves


class Text(str):
    __slots__ = ()


@pytest.mark.parametrize(
    "topics, found",
    [
        (("a", "b"), ("a", "b")),
        (["a"], ("a",)),
        ({"a"}, ("a",)),
        (frozenset(["a"]), ("a",)),
        ({"a": 1}.keys(), ("a",)),
        ((Text("a"),), ("a",)),
        ((), ()),
        ([], ()),
    ],
)
def test_topics_are_a_tuple_whichever_collection_they_came_in(
    topics: Any, found: tuple[str, ...]
) -> None:
    assert ConnectReply(topics=topics).topics == found


@pytest.mark.parametrize(
    "reply, fields, text",
    [
        (ConnectReply, {"topics": "news"}, 'not a str: topics=["news"]'),
        (ConnectReply, {"topics": Text("news")}, "not a Text"),
        (ConnectReply, {"topics": b"news"}, "not a bytes"),
        (ConnectReply, {"topics": {"news": 1}}, "not a dict"),
        (ConnectReply, {"topics": None}, "not None"),
        (ConnectReply, {"topics": (name for name in ["news"])}, "not a generator"),
        (ConnectReply, {"topics": ["news", 5]}, "each of topics is a str, not an int"),
        (ConnectReply, {"topics": [("news",)]}, "each of topics is a str, not a tuple"),
        (ConnectReply, {"topics": (b"news",)}, "each of topics is a str, not a bytes"),
        (ConnectReply, {"user": None}, "user is a str, not None"),
        (ConnectReply, {"user": 5}, "user is a str, not an int"),
        (ConnectReply, {"user": True}, "user is a str, not True"),
        (ConnectReply, {"user": b"ann"}, "user is a str, not a bytes"),
        (ConnectReply, {"user": {"sub": "ann"}}, "user is a str, not a dict"),
        (ConnectReply, {"data": [1]}, "data is a dict, .* not a list"),
        (ConnectReply, {"data": "hello"}, "data is a dict, .* not a str"),
        (ConnectReply, {"data": False}, "data is a dict, .* not False"),
        (ConnectReply, {"data": msgspec.Raw(b"{}")}, "data is a dict, .* not a Raw"),
        (PublishReply, {"data": "text"}, "data is JSON as bytes, or None, not a str"),
        (PublishReply, {"data": {"a": 1}}, "data is JSON as bytes, or None, not a dict"),
        (PublishReply, {"data": False}, "data is JSON as bytes, or None, not False"),
        (
            PublishReply,
            {"data": bytearray(b"1")},
            "data is JSON as bytes, or None, not a bytearray",
        ),
    ],
)
def test_a_reply_with_a_field_of_another_type_is_not_made(
    reply: Callable[..., object], fields: dict[str, object], text: str
) -> None:
    with pytest.raises(TypeError) as raised:
        reply(**fields)
    assert re.search(text if ".*" in text else re.escape(text), str(raised.value))
    assert re.fullmatch(r"(Connect|Publish)Reply: .*", str(raised.value))  # and that in one line


def test_half_an_emoji_is_no_user_and_no_topic() -> None:
    with pytest.raises(ValueError, match=r"^ConnectReply: user has a lone surrogate at 1:"):
        ConnectReply("a\ud83d")
    with pytest.raises(
        ValueError, match=r"^ConnectReply: each of topics has a lone surrogate at 0"
    ):
        ConnectReply(topics=["a", "\ude00"])


def test_the_data_of_a_reply_is_the_reply_s_own() -> None:
    data = {"a": 1}
    reply = ConnectReply(data=data)
    data["b"] = 2
    assert reply.data == {"a": 1}


# a connection


async def test_a_connection_has_all_that_its_protocol_says(
    autojump_clock: MockClock, net: Network
) -> None:
    seen: list[Connection] = []

    @net.broker.on_open
    async def keep(connection: Connection) -> None:
        seen.append(connection)

    peer = await net.open_websocket("/?a=1", {"X-Mine": "yes"})
    (connection,) = seen
    of_both = [*vars(Handshake), *vars(Connection)]
    members = [name for name in of_both if not name.startswith("_")]
    assert len(members) == 20
    before = {name: getattr(connection, name) for name in members}
    assert before["info"]() == net.broker.connection_info(peer.fd)
    assert before["headers"]["x-mine"] == "yes"
    assert (before["fd"], before["path"], before["user"]) == (peer.fd, "/", "")
    assert (before["protocol"], before["subprotocol"]) == ("plain", None)
    assert (before["transport"], before["address"]) == ("websocket", "memory")
    assert before["peer_address"] == "memory"
    assert (before["query"], before["params"]) == ("a=1", {"a": "1"})
    assert (before["claims"], before["data"], before["is_established"]) == ({}, {}, True)
    await peer.request(connect={})
    assert connection.protocol == "centrifuge-json"
    await peer.aclose()
    await trio.sleep(1)
    # One that has ended can be read all the same.
    after = {name: getattr(connection, name) for name in members}
    assert (after["fd"], after["is_established"]) == (peer.fd, False)


def test_a_connection_is_for_annotations_only() -> None:
    with pytest.raises(TypeError):
        isinstance(object(), Connection)  # type: ignore[misc]


# type checkers


def checker(tool: str) -> str:
    """The path of a type checker beside this interpreter, or wherever; skips without one."""
    beside = Path(sys.executable).with_name(tool)
    found = str(beside) if beside.exists() else shutil.which(tool)
    if found is None:
        pytest.skip(f"{tool} is not installed")
    return found


SIGNATURES = ROOT / "tests" / "hook_signatures.py"
COMPLAINT = re.compile(r"  # type: ignore\[[a-z-]+\].*")


def complaints_wanted(page: str) -> list[int]:
    lines = enumerate(page.splitlines(), 1)
    return [number for number, line in lines if COMPLAINT.search(line)]


def complaints(output: str) -> list[int]:
    """The lines that mypy or pyright has an error for, each once."""
    return sorted({int(line) for line in re.findall(r"\.py:(\d+)(?::\d+)?.* error: ", output)})


def check(command: list[str], folder: Path) -> list[int]:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return complaints(done.stdout)


@pytest.mark.parametrize("tool", ["mypy", "pyright"])
def test_type_checkers_complain_of_every_wrong_hook_and_of_no_right_one(
    tool: str, tmp_path: Path
) -> None:
    command = [checker(tool)]
    page = SIGNATURES.read_text("utf-8")
    wanted = complaints_wanted(page)
    assert len(wanted) > 30
    (tmp_path / "page.py").write_text(COMPLAINT.sub("", page), "utf-8")
    if tool == "mypy":
        (tmp_path / "mypy.ini").write_text("[mypy]\nstrict = true\n", "utf-8")
        # The package as it is here, and not as it may be installed.
        (tmp_path / "broker").symlink_to(ROOT / "broker")
        command += ["--follow-imports=silent", "page.py"]
    else:
        settings = {
            "include": ["page.py"],
            "extraPaths": [str(ROOT)],
            "typeCheckingMode": "standard",
            "reportAttributeAccessIssue": "error",
        }
        (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings), "utf-8")
        command += ["--project", ".", "--pythonpath", sys.executable]
    assert check(command, tmp_path) == wanted


# what is no Exception


class OddError(BaseException):
    """An exception that nobody should raise."""


def a_cancellation() -> BaseException:
    """A cancellation of another scope, as somebody may keep it and raise it again."""

    async def be_cancelled() -> BaseException:
        with trio.CancelScope() as scope:
            scope.cancel()
            try:
                await trio.sleep_forever()
            except trio.Cancelled as error:  # noqa: ASYNC103 - kept, to be raised elsewhere
                return error  # noqa: ASYNC104
        raise AssertionError

    return trio.run(be_cancelled)


ODD: dict[str, Callable[[], BaseException]] = {
    "BaseException": lambda: OddError("odd"),
    "GeneratorExit": GeneratorExit,
    "asyncio.CancelledError": asyncio.CancelledError,
    "trio.Cancelled": a_cancellation,
    "group": lambda: BaseExceptionGroup("two", [OddError(), ValueError()]),
    "group of cancellations": lambda: BaseExceptionGroup("one", [a_cancellation()]),
}
ENDS: dict[str, Callable[[], BaseException]] = {
    "SystemExit": lambda: SystemExit(3),
    "KeyboardInterrupt": KeyboardInterrupt,
    "group": lambda: BaseExceptionGroup("two", [ValueError(), SystemExit(3)]),
    "nested": lambda: BaseExceptionGroup("", [OddError(), BaseExceptionGroup("", [SystemExit(3)])]),
}


def raising(kind: str, make: Callable[[], BaseException]) -> Callable[..., Awaitable[Any]]:
    """A hook of a kind that raises."""
    error = make()  # before there is a loop

    async def one(event: object) -> Any:
        raise error

    async def two(connection: object, more: object) -> Any:
        raise error

    async def three(connection: object, method: str, data: object) -> Any:
        raise error

    hooks: dict[str, Callable[..., Awaitable[Any]]] = {"message": two, "close": two, "rpc": three}
    return hooks.get(kind, one)


ASKED: dict[str, dict[str, object]] = {
    "connect": {},
    "subscribe": {"channel": "a"},
    "publish": {"channel": "a", "data": 1},
    "presence": {"channel": "a"},
    "history": {"channel": "a"},
    "rpc": {"method": "mine"},
}
LATER = ASKED.keys() - {"connect"}
MINE = b"GET /mine HTTP/1.1\r\nHost: localhost\r\n\r\n"


async def call(net: Network, kind: str) -> Any:
    """Have a hook called; the outcome: code of the Close, error reply, or status."""
    if kind in ("request", "handshake"):
        async with await net.connect() as peer:
            await peer.send(MINE if kind == "request" else handshake())
            return int((await peer.receive_head()).split()[1])
    make_pair = lockstep_stream_pair if kind.startswith("buffer") else memory_stream_pair
    opening = net.open_client() if kind in LATER else net.open_websocket(make_pair=make_pair)
    async with await opening as peer:
        if kind in ASKED:
            await peer.send_json({"id": 7, kind: ASKED[kind]})
            try:
                while (reply := await peer.receive_json()).get("id") != 7:
                    assert reply["push"]["disconnect"]["code"] == 3001
            except Closed as closed:
                return closed.code
            return reply["error"]
        if kind == "message":
            await peer.send_text("x")
        elif kind.startswith("buffer"):
            net.broker.declare_plain(peer.fd)
            net.broker.push(peer.fd, "x" * 700_000)
            await wait_all_tasks_blocked()
        elif kind == "close":
            await peer.send_close()
        code, _ = await peer.receive_close()
        return code


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("kind", KINDS)
def test_an_odd_exception_is_contained_like_any_other(kind: str, odd: str) -> None:
    hook = raising(kind, ODD[odd])

    async def main() -> None:
        broker = Broker()
        async with open_test_broker(broker) as net:
            bystander = await net.open_client()
            if kind != "event":
                getattr(broker, f"on_{kind}")(hook)
                failed = await call(net, kind)
            assert net.broker.is_established(bystander.fd)
            await bystander.aclose()
        expected = dict.fromkeys(("open", "message", "buffer_full", "buffer_empty"), 1011)
        expected |= {"close": 1000, "request": 500, "handshake": 500}
        if kind != "event":
            assert failed == expected.get(kind, INTERNAL)

    if kind == "event":
        run_with_event_hook(hook)
    else:
        with capture_logs() as lines:
            trio.run(main, clock=MockClock(autojump_threshold=0))
        failures = [line for line in lines if line["event"] == "hook_failed"]
        # `broker.http` logs a failed request; the bystander has a close hook, too.
        assert len(failures) == {"request": 0, "close": 2}.get(kind, 1)


def run_with_event_hook(hook: Callable[..., Awaitable[Any]]) -> None:
    async def main() -> None:
        broker = Broker()
        broker.on_event(hook)
        async with open_test_broker(broker) as net:
            await net.open_client()

    with capture_logs() as lines:
        trio.run(main, clock=MockClock(autojump_threshold=0))
    kinds = [line["kind"] for line in lines if line["event"] == "hook_failed"]
    assert kinds == ["started", "opened", "connected", "disconnected", "stopped"]


@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_hook_that_ends_the_process_has_everybody_told_before(kind: str, how: str) -> None:
    hook = raising(kind, ENDS[how])
    heard: list[int | None] = []
    told: list[object] = []

    async def main() -> None:
        broker, listener = Broker(), MemoryListener()
        if kind == "event":
            broker.on_event(hook)

        async def listen(peer: Peer) -> None:
            heard.append((await peer.receive_close())[0])
            await peer.send_close()

        async with trio.open_nursery() as nursery:
            await nursery.start(lambda **start: broker.serve(listeners=[listener], **start))
            net = Network(broker, listener)
            if kind != "event":
                nursery.start_soon(listen, await net.open_plain())
                nursery.start_soon(listen, await net.open_client())
                await wait_all_tasks_blocked()
                getattr(broker, f"on_{kind}")(hook)
                with suppress(trio.ClosedResourceError, trio.BrokenResourceError):
                    told.append(await call(net, kind))

    with capture_logs() as lines, pytest.raises(BaseExceptionGroup) as caught:
        trio.run(main, clock=MockClock(autojump_threshold=0))
    # The group is of the nursery here.
    (error,) = caught.value.exceptions
    assert isinstance(error, KeyboardInterrupt if how == "KeyboardInterrupt" else SystemExit)
    if kind != "event":
        assert sorted(filter(None, heard)) == [1001, 3001]
        closed = {
            "open": 1001,
            "message": 1001,
            "buffer_full": 1001,
            "buffer_empty": 1001,
            "connect": 1001,
            "request": 503,
            "close": 1000,
            "handshake": 503,
        }
        assert told == [closed.get(kind, 3001)]
    said = [line for line in lines if line["log_level"] in ("error", "critical", "warning")]
    assert {line["event"] for line in said} == {"hook_ended_the_process"}
    assert said[0]["hook"] == kind
    assert said[0]["error"] in ("SystemExit(3)", "KeyboardInterrupt()")
    assert (said[0]["fd"] > 0) is (kind not in ("request", "event", "handshake"))


@pytest.mark.parametrize("where", ["body", "background"])
@pytest.mark.parametrize("how", ["SystemExit", "GeneratorExit"])
def test_a_response_is_contained_as_its_hook_is(where: str, how: str) -> None:
    error = {**ODD, **ENDS}[how]()

    async def fail() -> None:
        raise error

    async def body() -> AsyncIterator[bytes]:
        yield b"some"
        raise error

    async def main() -> None:
        broker = Broker()

        @broker.on_request
        async def on_request(request: Request) -> Response:
            if where == "body":
                return StreamingResponse(body())
            return PlainTextResponse("done", background=BackgroundTask(fail))

        async with open_test_broker(broker) as net:
            bystander = await net.open_client()
            peer = await net.connect()
            await peer.send(MINE)
            assert " 200 " in await peer.receive_head()
            await peer.receive_eof()
            if how == "SystemExit":
                assert (await bystander.receive_close())[0] == 3001
                await bystander.send_close()
            else:
                assert net.broker.is_established(bystander.fd)

    ends = how == "SystemExit"
    with pytest.raises(BaseExceptionGroup) if ends else nullcontext():
        trio.run(main, clock=MockClock(autojump_threshold=0))


def test_a_cancellation_that_was_asked_for_reaches_its_scope_with_what_else_came() -> None:
    """A hook that hangs is cancelled, and fails at cleaning up: each part goes its own way."""
    ended: list[tuple[str, int, BaseException]] = []
    hooks = Hooks(lambda *what: ended.append(what))

    async def leave(*errors: BaseException) -> BaseException | None:
        with trio.CancelScope() as scope:
            scope.cancel()
            try:
                with hooks.contained("open", 7):
                    try:
                        await trio.sleep_forever()
                    except trio.Cancelled as cancelled:
                        raise BaseExceptionGroup("", [cancelled, *errors]) from None  # noqa: ASYNC104
            except Exception as error:  # noqa: BLE001 - whatever it is
                return error
            except BaseExceptionGroup as group:
                return group.split(trio.Cancelled)[1]
        return None

    async def main() -> None:
        assert await leave() is None
        plain = await leave(ValueError())
        assert isinstance(plain, ExceptionGroup)
        odd = await leave(OddError())
        assert isinstance(odd, ExceptionGroup)
        assert isinstance(odd.exceptions[0], HookFailed)
        assert ended == []
        assert await leave(SystemExit(1), OddError()) is None
        ((kind, fd, error),) = ended
        assert (kind, fd, type(error)) == ("open", 7, SystemExit)

    trio.run(main)


def test_without_anybody_to_end_the_process_the_exception_goes_on() -> None:
    async def main() -> None:
        with Hooks().contained("open"):
            raise SystemExit(4)

    with pytest.raises(SystemExit, match="4"):
        trio.run(main)


def test_a_close_of_a_hook_from_outside_of_the_loop_is_let_through() -> None:
    @types.coroutine
    def suspend() -> Iterator[None]:
        yield

    async def hook(event: object) -> None:
        await suspend()

    hooks = Hooks()
    hooks.set("event", hook)
    assert hooks.event is not None
    coroutine = hooks.event(None)  # type: ignore[arg-type]
    coroutine.send(None)  # type: ignore[attr-defined]
    coroutine.close()  # type: ignore[attr-defined]
