"""Hooks: the functions of an app that a broker calls, and the values they get and give.

Every hook is async and runs in the nursery of the connection it is about, for which it is called in
the order of what the peer sends; `on_handshake` runs before there is one, while the peer waits. `on_subscribe`, `on_publish`, `on_history` and `on_presence` may run
at the same time for one connection, each about another topic; what they decide is carried out in
order. Every other hook runs when all before it are done, and nothing else runs beside it.

An authorizer or `on_rpc` raises `Refused` to answer the one request with an error reply, and any
hook of a connection `Disconnect` to send the peer away. Any other exception is logged once
(`hook_failed`); the one request is answered with error 100, and where there is none (`on_open`,
`on_message`) the connection ends with 1011; the handshake is answered with 500. Cancellation reaches a hook when the connection has
ended and the hook is still busy `close_seconds` later.

`SystemExit` and `KeyboardInterrupt`, from any hook, end the process in good order: one line says so
(`hook_ended_the_process`), the broker stops as by `Broker.stop`, and `Broker.serve` raises the
exception when all is done. Any other `BaseException` counts as an `Exception`; so does a
cancellation that nobody has asked for, as a hook has when it raises what it had caught elsewhere.

`on_buffer_full` and `on_buffer_empty` run in a task of their own, one at a time for a connection, and
beside its other hooks: one of these may be the one that waits for room.

`on_event` is different: it runs in a task of its own and holds up nobody; an exception is logged,
and the next event comes. Cancellation reaches it `flush_seconds` after the last connection of a
broker that stops has ended.

Hooks are checked when they are set. `TypeError` tells of one that is no async function or takes
other arguments, `RuntimeError` of a second one of its kind, also where a URL in `[webhooks]`
answers in its place. Replies are checked each time: a hook that returns anything but None and the
reply of its kind has failed, as if it had raised. So `False` lets nobody in; to say no is to raise
`Refused`.
"""

import inspect
import re
from collections.abc import Awaitable, Callable, Generator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from functools import partial
from math import inf
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

import attrs
import trio

from broker.core.event_queue import Event
from broker.core.histogram import Histogram, HistogramStatistics
from broker.core.messages import Close, ConnectionInfo, Fd, Frame, Transport
from broker.errors import CloseCode, Disconnect, Refused

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response


class Handshake(Protocol):
    """The request by which a peer asks for a connection, over WebSocket or an HTTP fallback.

    Nothing here waits. Texts are as they were sent where nothing else is said. The values of headers and
    query are read anew each time, which takes some 15 µs: keep those that you need often. For annotations
    only: `isinstance` raises `TypeError`.
    """

    @property
    def path(self) -> str:
        """The path, not percent-decoded, without the query."""

    @property
    def query(self) -> str:
        """The text behind the `?`, not percent-decoded; empty where there is none."""

    @property
    def params(self) -> Mapping[str, str]:
        """The parameters of the query, percent-decoded; of several with one name the last."""

    @property
    def headers(self) -> Mapping[str, str]:
        """The header fields; names are in lower case. One that came in several lines is joined, by
        commas, and `cookie` by semicolons."""

    @property
    def cookies(self) -> Mapping[str, str]:
        """The cookies by their names; of several with one name the first, as browsers sort them."""

    @property
    def subprotocols(self) -> tuple[str, ...]:
        """The WebSocket subprotocols that the peer offers, its favourite first."""

    @property
    def address(self) -> str:
        """Where the client is: `HOST:PORT`, with brackets around an IPv6 host, as it was at accept; `unix`
        or `memory` where there is no address. Behind one of `trusted_proxies` it is what that has passed
        on: the bare host, or by the PROXY protocol also the port."""

    @property
    def peer_address(self) -> str:
        """The same of the peer that opened the connection to us: of the proxy, where there is one between."""

    @property
    def remote_host(self) -> str:
        """The host of `address`, without brackets; empty where there is no address."""

    @property
    def remote_port(self) -> int:
        """The port of `address`; 0 where there is no address."""

    @property
    def transport(self) -> Transport:
        """How the peer is carried: `websocket`, `http_stream`, `sse` or `uni_sse`."""

    @property
    def data(self) -> dict[str, Any]:
        """A dict for the app, to keep what it likes with the connection. The broker never looks."""


class Connection(Handshake, Protocol):
    """One peer, as an app sees it: a WebSocket, or a client of an HTTP fallback; with all that its
    handshake said.

    Nothing here waits. To act on a connection, give its `fd` to the broker: `Broker.push`,
    `Broker.bind`, `Broker.disconnect` and the rest. A connection that has ended may be read on.
    For annotations only: `isinstance` raises `TypeError`.
    """

    @property
    def fd(self) -> Fd:
        """The connection's number on this broker."""

    @property
    def user(self) -> str:
        """The user that a token, a hook or `Broker.bind` named; empty for nobody in particular."""

    @property
    def claims(self) -> Mapping[str, object]:
        """The claims of its token once that was verified, `meta` among them; empty without one."""

    @property
    def opened_at(self) -> float:
        """The time of accept, in Unix seconds."""

    @property
    def subprotocol(self) -> str | None:
        """The WebSocket subprotocol that was agreed on; None without one."""

    @property
    def protocol(self) -> str:
        """`plain` until a Centrifuge `connect` is accepted; then `centrifuge-json` or
        `centrifuge-protobuf`."""

    @property
    def is_established(self) -> bool:
        """Whether the peer can be sent something: it is here, and not closing."""

    def info(self) -> ConnectionInfo:
        """A snapshot, with the topics it is subscribed to. Linear in these."""


@attrs.frozen
class ConnectEvent:
    """A peer asks to be let in. `data` is what it sent along, decoded, or None.

    `claims` is what its token says, once that was verified; None without a token, or without a
    key to verify one.
    """

    connection: Connection
    token: str
    data: object
    name: str
    version: str
    claims: Mapping[str, object] | None = None


def _shown(value: object) -> str:
    """A value as an error names it: by its type, since what it holds may be secret."""
    if value is None or isinstance(value, bool):
        return repr(value)
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def _check_text(what: str, value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{what} is a str, not {_shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} has a lone surrogate at {error.start}: no UTF-8 has it") from None


def _check_user(reply: object, attribute: "attrs.Attribute[str]", value: str) -> None:
    _check_text(f"ConnectReply: {attribute.name}", value)


def _check_json(reply: object, attribute: "attrs.Attribute[bytes | None]", value: object) -> None:
    if not (value is None or isinstance(value, bytes)):
        raise TypeError(
            f"PublishReply: data is JSON as bytes, or None, not {_shown(value)}: "
            "PublishReply(json.dumps(value).encode())"
        )


def _to_object(data: Mapping[str, object] | None) -> dict[str, Any] | None:
    if not (data is None or isinstance(data, Mapping)):
        raise TypeError(
            f"ConnectReply: data is a dict, whose keys the client finds beside `fd`, "
            f"not {_shown(data)}"
        )
    return None if data is None else dict(data)


def _to_topics(topics: tuple[str, ...] | list[str] | AbstractSet[str]) -> tuple[str, ...]:
    if not isinstance(topics, (tuple, list, AbstractSet)):
        # A str is a sequence of str, and each of its letters a topic.
        raise TypeError(
            f"ConnectReply: topics is a list, tuple or set of str, not {_shown(topics)}: "
            'topics=["news"]'
        )
    for topic in topics:
        _check_text("ConnectReply: each of topics", topic)
    return tuple(topics)


# RFC 9110 section 5.6.2, and what goes without a doubt into a header line.
_V = TypeVar("_V")

_TOKEN = re.compile(r"[-!#$%&'*+.^_`|~0-9A-Za-z]+").fullmatch
_FIELD_VALUE = re.compile(r"[ -~]*").fullmatch
_OURS = frozenset(
    ("connection", "content-length", "content-type", "date", "transfer-encoding", "upgrade")
)


def check_headers(whose: str, headers: object) -> None:
    """Raise `ValueError` or `TypeError` for headers that cannot go along with an answer of ours."""
    if not isinstance(headers, Mapping):
        raise TypeError(f"{whose}: headers are a dict of str, not {_shown(headers)}")
    for name, value in headers.items():
        _check_pair(f"{whose}: the header", name, value)
        if name.lower() in _OURS or name.lower().startswith("sec-websocket-"):
            raise ValueError(f"{whose}: the header {name!r} is the broker's own")


def _check_pair(what: str, name: object, value: object) -> None:
    if not (isinstance(name, str) and isinstance(value, str)):
        raise TypeError(f"{what} {name!r} is a str and has one, not {_shown(value)}")
    if not (_TOKEN(name) and _FIELD_VALUE(value)):
        raise ValueError(f"{what} {name!r} is no name and value in ASCII")


def _check_reply_headers(reply: object, attribute: object, value: object) -> None:
    check_headers("HandshakeReply", value)


def _check_cookies(reply: object, attribute: object, value: object) -> None:
    if not isinstance(value, Mapping):
        raise TypeError(f"HandshakeReply: cookies are a dict of str, not {_shown(value)}")
    for name, text in value.items():
        _check_pair("HandshakeReply: the cookie", name, text)


def _check_subprotocol(reply: object, attribute: "attrs.Attribute[_V]", value: _V) -> None:
    if value and not (isinstance(value, str) and _TOKEN(value)):
        raise ValueError(f"HandshakeReply: {value!r} is no name of a subprotocol")


@attrs.frozen
class HandshakeReply:
    """The parts that go along with the answer to a handshake: `headers`, `cookies` and the subprotocol.

    A cookie is a name, with its value and attributes: `{"seen": "1; Max-Age=3600; Secure; HttpOnly"}`. The
    subprotocol is one that the peer offers; None leaves the choice to the broker, which takes one of
    Centrifuge's, and "" agrees on none.

    Raises `ValueError` for what no header line may hold, and for the headers of the handshake itself.
    """

    headers: Mapping[str, str] = attrs.field(factory=dict, validator=_check_reply_headers)
    cookies: Mapping[str, str] = attrs.field(factory=dict, validator=_check_cookies)
    subprotocol: str | None = attrs.field(default=None, validator=_check_subprotocol)

    @property
    def lines(self) -> tuple[tuple[str, str], ...]:
        """The header lines that these are."""
        cookies = [("Set-Cookie", f"{name}={text}") for name, text in self.cookies.items()]
        return *self.headers.items(), *cookies


@attrs.frozen
class ConnectReply:
    """`user` and `info` are what others will see of it; `data` goes to the peer itself.

    `user` and `info` that are given come before those of a token. `info` is any value that JSON can
    say; `data` is a mapping, and the peer finds its keys beside `fd`.
    The peer is subscribed to `topics` at once, and recovers what it missed of them.

    Raises `TypeError` for a field of another type, such as one str for `topics`, and `ValueError`
    for text with a lone surrogate.
    """

    user: str = attrs.field(default="", validator=_check_user)
    info: object = None
    data: dict[str, Any] | None = attrs.field(default=None, converter=_to_object)
    topics: tuple[str, ...] = attrs.field(default=(), converter=_to_topics)


@attrs.frozen
class SubscribeEvent:
    """A client asks to subscribe to `topic`, which may be a pattern.

    `claims` is what its subscription token says, once that was verified; None without one.
    """

    connection: Connection
    topic: str
    token: str
    data: object
    claims: Mapping[str, object] | None = None


@attrs.frozen
class SubscribeReply:
    """`info` is what others will see of it on this topic; `data` goes to the client itself.

    Each is any value that JSON can say. A field that is given here goes before that of a token.
    """

    info: object = None
    data: object = None


@attrs.frozen
class PublishEvent:
    """A client asks to publish `data` to `topic`; `fd:7` is a direct message to fd 7.

    `data` is raw JSON, or, from a client over protobuf, any bytes.
    """

    connection: Connection
    topic: str
    data: bytes


@attrs.frozen
class PublishReply:
    """`data`, raw JSON, is published in place of what came; None leaves it as it is.

    Raises `TypeError` for data that is neither bytes nor None.
    """

    data: bytes | None = attrs.field(default=None, validator=_check_json)


@attrs.frozen
class ReadEvent:
    """A client asks for the history or the presence of `topic`."""

    connection: Connection
    topic: str


HandshakeHook: TypeAlias = Callable[[Handshake], Awaitable[HandshakeReply | None]]
OpenHook: TypeAlias = Callable[[Connection], Awaitable[None]]
MessageHook: TypeAlias = Callable[[Connection, Frame], Awaitable[None]]
CloseHook: TypeAlias = Callable[[Connection, Close], Awaitable[None]]
RpcHook: TypeAlias = Callable[[Connection, str, object], Awaitable[object]]
RequestHook: TypeAlias = Callable[["Request"], Awaitable["Response | None"]]
ConnectHook: TypeAlias = Callable[[ConnectEvent], Awaitable[ConnectReply | None]]
SubscribeHook: TypeAlias = Callable[[SubscribeEvent], Awaitable[SubscribeReply | None]]
PublishHook: TypeAlias = Callable[[PublishEvent], Awaitable[PublishReply | None]]
ReadHook: TypeAlias = Callable[[ReadEvent], Awaitable[None]]
EventHook: TypeAlias = Callable[[Event], Awaitable[None]]

# So that a function which is decorated keeps its own type.
OnHandshake = TypeVar("OnHandshake", bound=HandshakeHook)
OnOpen = TypeVar("OnOpen", bound=OpenHook)
OnMessage = TypeVar("OnMessage", bound=MessageHook)
OnBuffer = TypeVar("OnBuffer", bound=OpenHook)
OnClose = TypeVar("OnClose", bound=CloseHook)
OnRpc = TypeVar("OnRpc", bound=RpcHook)
OnRequest = TypeVar("OnRequest", bound=RequestHook)
OnConnect = TypeVar("OnConnect", bound=ConnectHook)
OnSubscribe = TypeVar("OnSubscribe", bound=SubscribeHook)
OnPublish = TypeVar("OnPublish", bound=PublishHook)
OnRead = TypeVar("OnRead", bound=ReadHook)
OnEvent = TypeVar("OnEvent", bound=EventHook)

AnyHook: TypeAlias = Callable[..., Awaitable[object]]

OnEnding: TypeAlias = Callable[[str, Fd, BaseException], None]
"""Called with a hook's kind, the fd it was about (0 for none) and the exception that it raised to
end the process. Never waits."""


class HookFailed(Exception):
    """A hook raised what is no `Exception`, and no way to end anything: that is its cause."""


class EndsProcess(Disconnect):
    """A hook ends the process, which was said and is under way; its own peer may go."""

    def __init__(self) -> None:
        super().__init__(CloseCode.GOING_AWAY, "shutdown")


@attrs.frozen
class Kind:
    """One kind of hook: its signature, in words and for the checks.

    `accepts` tells whether a hook may return a value; `instead` is the way to refuse.
    """

    takes: tuple[str, ...]
    returns: str
    accepts: Callable[[object], bool]
    instead: str = ""

    def __str__(self) -> str:
        return f"async def ({', '.join(self.takes)}) -> {self.returns}"


def _is_none(value: object) -> bool:
    return value is None


def _is_anything(value: object) -> bool:
    return True  # whether JSON can say it is found out when it is sent


def _is_response(value: object) -> bool:
    from starlette.responses import Response

    return value is None or isinstance(value, Response)


def _reply(takes: str, reply: type) -> Kind:
    def is_reply(value: object) -> bool:
        return value is None or isinstance(value, reply)

    return Kind((takes,), f"{reply.__name__} | None", is_reply, _NO)


_CONNECTION = "connection: Connection"
_AWAY = "; to send the peer away, raise Disconnect"
_NO = "; to say no, raise Refused"

KINDS: Mapping[str, Kind] = {
    "handshake": _reply("handshake: Handshake", HandshakeReply),
    "open": Kind((_CONNECTION,), "None", _is_none, _AWAY),
    "message": Kind((_CONNECTION, "frame: Frame"), "None", _is_none, _AWAY),
    "close": Kind((_CONNECTION, "close: Close"), "None", _is_none),
    "rpc": Kind((_CONNECTION, "method: str", "data: object"), "object", _is_anything),
    "buffer_full": Kind((_CONNECTION,), "None", _is_none, _AWAY),
    "buffer_empty": Kind((_CONNECTION,), "None", _is_none, _AWAY),
    "request": Kind(("request: Request",), "Response | None", _is_response),
    "connect": _reply("event: ConnectEvent", ConnectReply),
    "subscribe": _reply("event: SubscribeEvent", SubscribeReply),
    "publish": _reply("event: PublishEvent", PublishReply),
    "presence": Kind(("event: ReadEvent",), "None", _is_none, _NO),
    "history": Kind(("event: ReadEvent",), "None", _is_none, _NO),
    "event": Kind(("event: Event",), "None", _is_none),
}
"""All kinds of hooks, by the names that `Hooks` has for them."""


@attrs.frozen
class HookStatistics:
    """A snapshot of one kind of hook: how long its calls took, in seconds, and how many of them raised
    what is no answer (`Refused` and `Disconnect` are)."""

    seconds: HistogramStatistics
    failures: int


@attrs.define(eq=False)
class _Calls:
    """The calls of one kind of hook."""

    seconds: Histogram = attrs.field(factory=Histogram)
    failures: int = 0

    @contextmanager
    def counted(self) -> Generator[None]:
        """Count a call, however it ends; 2 µs, where a hook that does nothing takes 5."""
        # Not Trio's clock: the interpreter may close a hook at its end, when there is no loop.
        began = perf_counter()
        try:
            yield
        except (Refused, Disconnect):
            raise
        except Exception:
            self.failures += 1
            raise
        finally:
            self.seconds.observe(perf_counter() - began)


@attrs.define(eq=False, on_setattr=attrs.setters.frozen)
class Hooks:
    """The hooks that an app has set; None where it has none.

    Each is its app's function with a check of what it returns, inside of `contained`. `set` and
    `lend` alone change them. Without `on_ending`, an exception that ends the process goes on.
    """

    _on_ending: OnEnding | None = None
    handshake: HandshakeHook | None = attrs.field(default=None, init=False)
    open: OpenHook | None = attrs.field(default=None, init=False)
    message: MessageHook | None = attrs.field(default=None, init=False)
    close: CloseHook | None = attrs.field(default=None, init=False)
    buffer_full: OpenHook | None = attrs.field(default=None, init=False)
    buffer_empty: OpenHook | None = attrs.field(default=None, init=False)
    rpc: RpcHook | None = attrs.field(default=None, init=False)
    request: RequestHook | None = attrs.field(default=None, init=False)
    connect: ConnectHook | None = attrs.field(default=None, init=False)
    subscribe: SubscribeHook | None = attrs.field(default=None, init=False)
    publish: PublishHook | None = attrs.field(default=None, init=False)
    presence: ReadHook | None = attrs.field(default=None, init=False)
    history: ReadHook | None = attrs.field(default=None, init=False)
    event: EventHook | None = attrs.field(default=None, init=False)
    _owners: dict[str, str] = attrs.field(factory=dict, init=False)
    _lent: set[str] = attrs.field(factory=set, init=False)
    _calls: dict[tuple[str, str], _Calls] = attrs.field(factory=dict, init=False)

    @property
    def watch_buffers(self) -> bool:
        """Whether the app is told when much waits for a peer, or little again."""
        return self.buffer_full is not None or self.buffer_empty is not None

    def owner(self, kind: str) -> str:
        """The name of the function that is the hook of a kind, or of the setting that stands in
        for it; empty if there is none."""
        return self._owners.get(kind, "")

    def is_lent(self, kind: str) -> bool:
        """Whether what stands in for a kind's hook asks a backend for a client, so that it is of no
        use once that client has gone."""
        return kind in self._lent

    def set(self, kind: str, function: AnyHook, owner: str = "") -> None:
        """Make `function` the hook of a kind, one of `KINDS`, from the next request on.

        Raises `TypeError` unless it is an async function of that kind's arguments, and
        `RuntimeError` if there is a hook of the kind already. `owner` is who is named then, if that
        is not the function.
        """
        self._set(kind, function, owner, "app")

    def _set(self, kind: str, function: AnyHook, owner: str, asked: str) -> None:
        _check_function(kind, function)
        owner = owner or _name(function)
        if kind in self._owners:
            raise RuntimeError(
                f"on_{kind} is {self._owners[kind]} already, and has one hook only: "
                f"keep that or {owner}, or make one function of both"
            )
        self._owners[kind] = owner
        calls = self._calls.setdefault((kind, asked), _Calls())
        object.__setattr__(self, kind, _checked(self, kind, function, calls))

    def statistics(self) -> dict[tuple[str, str], HookStatistics]:
        """By kind of hook and who is asked, `app` or `backend`: since the hooks were set."""
        return {
            key: HookStatistics(calls.seconds.statistics(), calls.failures)
            for key, calls in self._calls.items()
        }

    @contextmanager
    def lend(self, kind: str, function: AnyHook, owner: str) -> Generator[None]:
        """Have a hook for as long as the block, that asks a backend. Raises as `set` does."""
        self._set(kind, function, owner, "backend")
        self._lent.add(kind)
        try:
            yield
        finally:
            self._lent.discard(kind)
            del self._owners[kind]
            object.__setattr__(self, kind, None)

    @contextmanager
    def contained(self, kind: str, fd: Fd = 0) -> Generator[None]:
        """Let nothing but an `Exception`, and a cancellation that is one, leave a block of the app's
        code.

        Raises `EndsProcess` in place of `SystemExit` and `KeyboardInterrupt`, after `on_ending`, and
        `HookFailed` in place of any other `BaseException`.
        """
        try:
            yield
        except Exception:
            raise
        except BaseException as error:
            raised = self._in_place_of(kind, fd, error)
            if raised is error:
                raise
            raise raised from error  # noqa: ASYNC104 - all that was asked for goes on

    def _in_place_of(self, kind: str, fd: Fd, error: BaseException) -> BaseException:
        cancelled, rest = _without_cancellation(error)
        if rest is None or isinstance(rest, Exception):
            return error
        ending = _ending_in(rest)
        if ending is None:
            failed = HookFailed(f"on_{kind} raised {type(rest).__name__}, which is no Exception")
            failed.__cause__ = rest
            if cancelled is None:
                return failed
            return BaseExceptionGroup("a hook failed when it was cancelled", [cancelled, failed])
        if self._on_ending is None:
            return error
        self._on_ending(kind, fd, ending)
        return EndsProcess() if cancelled is None else cancelled


def _without_cancellation(
    error: BaseException,
) -> tuple[BaseException | None, BaseException | None]:
    """A cancellation that was asked for, which has to reach its scope, and the rest."""
    try:
        is_cancelled = trio.current_effective_deadline() == -inf
    except RuntimeError:
        return error, None  # not in a task: the interpreter closes what it finds at its end
    if not is_cancelled:
        return None, error
    if isinstance(error, BaseExceptionGroup):
        return error.split(trio.Cancelled)
    return (error, None) if isinstance(error, trio.Cancelled) else (None, error)


def _ending_in(error: BaseException) -> BaseException | None:
    """The first exception in `error` that is raised to end a process."""
    if isinstance(error, BaseExceptionGroup):
        return next(filter(None, map(_ending_in, error.exceptions)), None)
    return error if isinstance(error, SystemExit | KeyboardInterrupt) else None


def _fd_of(args: tuple[object, ...]) -> Fd:
    """The fd that a hook was called about; 0 for none."""
    about = getattr(args[0], "connection", args[0])
    fd = getattr(about, "fd", 0)
    return fd if isinstance(fd, int) else 0


def _checked(hooks: Hooks, kind: str, function: AnyHook, calls: _Calls) -> AnyHook:
    """A hook that is contained, and raises `TypeError` where `function` returns what its kind does
    not."""
    rule, name = KINDS[kind], _name(function)

    async def hook(*args: object) -> object:
        with calls.counted():
            with hooks.contained(kind, _fd_of(args)):
                answer = function(*args)
                # A plain function around an async one can do that.
                if not inspect.isawaitable(answer):
                    raise TypeError(
                        f"on_{kind}: {name} is not async after all: it returned {_shown(answer)}"
                    )
                reply = await answer
            if not rule.accepts(reply):
                raise TypeError(
                    f"on_{kind}: {name} returned {_shown(reply)}; "
                    f"it may return {rule.returns}{rule.instead}"
                )
            return reply

    return hook


def _check_function(kind: str, function: object) -> None:
    """Raise `TypeError`, in one line, for what cannot be the hook of a kind."""
    rule = KINDS[kind]
    if not callable(function):
        raise TypeError(f"on_{kind}: {_shown(function)} is no function; it has to be {rule}")
    name = _name(function)
    core = _core(function)
    if inspect.isasyncgenfunction(core):
        raise TypeError(f"on_{kind}: {name} yields, and a hook returns; it has to be {rule}")
    if not inspect.iscoroutinefunction(core):
        raise TypeError(f"on_{kind}: {name} is no async function; it has to be {rule}")
    try:
        # Of what is called itself: a decorator may give the function it wraps more arguments.
        signature = inspect.signature(function, follow_wrapped=False)
    except ValueError:  # it is not written in Python, and does not say
        return
    try:
        signature.bind(*rule.takes)
    except TypeError:
        bare = [
            each.replace(annotation=each.empty, default=each.empty)
            for each in signature.parameters.values()
        ]
        taken = signature.replace(parameters=bare, return_annotation=signature.empty)
        raise TypeError(f"on_{kind}: {name} takes {taken}; it has to be {rule}") from None


_DEPTH = 100
"""How many decorators are looked through; nobody stacks so many, and a circle of them ends."""


def _core(function: object) -> object:
    """The function that is behind partials, `functools.wraps` and an object's `__call__`."""
    for _ in range(_DEPTH):
        if inspect.iscoroutinefunction(function):
            break
        if isinstance(function, partial):
            function = function.func
        elif hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        elif inspect.isclass(function) or inspect.isroutine(function):
            break
        else:
            function = type(function).__call__
    return function


def _name(function: object) -> str:
    """The name by which errors call a hook, `module.function`."""
    while isinstance(function, partial):
        function = function.func
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"
