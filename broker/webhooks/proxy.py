"""Questions to a backend over HTTP: may this client connect, subscribe, publish; what is the answer
to this rpc.

Rules:

1. A question is asked by a hook, so the rules for hooks hold here: the client that asks waits, and nobody
   else does. Only the end is another: the question of a client that has gone is cancelled at once, and its
   place is free.
2. A backend that does not answer, or not in the way that is agreed, has said neither yes nor no:
   the client is told to try again.
3. Each kind of question has places of its own, and each user a share of these. To wait for one is not
   the backend's time.
4. A header of a stranger that says for whom a proxy asks goes no further.
5. Names and shapes are those of Centrifugo's proxies, as far as they go; a field that we do not know
   is no answer, rather than one that is half done.
"""

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import ExitStack, asynccontextmanager
from typing import Annotated, Any, Final, Generic, TypeVar
from urllib.parse import urlsplit
from uuid import uuid4

import attrs
import msgspec
import structlog
import trio
from msgspec import UNSET, Meta, Raw, Struct

from broker.access.proxies import (
    FORWARDED_FOR,
    REAL_IP,
    host_of,
    is_set_by_proxies,
    trusted_proxies,
)
from broker.config.reload import Settings
from broker.config.settings import WebhookRules
from broker.errors import CloseCode, ConfigError, Disconnect, ErrorCode, Refused, check_close_code
from broker.hooks import (
    AnyHook,
    ConnectEvent,
    Connection,
    ConnectReply,
    Hooks,
    PublishEvent,
    PublishReply,
    SubscribeEvent,
    SubscribeReply,
)
from broker.protocols.centrifuge_json import CENTRIFUGE_JSON
from broker.protocols.json_text import opaque_json, to_json
from broker.transport.http_client import Backend, HttpFailed, open_http_client
from broker.webhooks.places import NoPlace, Places

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("broker")

KINDS = ("connect", "subscribe", "publish", "rpc")


class _Connect(Struct, forbid_unknown_fields=True):
    user: str = ""
    info: object = None
    data: dict[str, Any] | None = None
    channels: tuple[str, ...] = ()


class _Subscribe(Struct, forbid_unknown_fields=True):
    info: object = None
    data: object = None


class _Data(Struct, forbid_unknown_fields=True):
    data: object = UNSET


class _Error(Struct):
    code: Annotated[int, Meta(ge=100, le=4_999)]
    message: str = ""


class _Disconnect(Struct):
    code: int
    reason: str = ""


R = TypeVar("R", _Connect, _Subscribe, _Data)


class _Answer(Struct, Generic[R]):
    result: R | None = None
    error: _Error | None = None
    disconnect: _Disconnect | None = None


class _NoAnswer(Exception):
    """The backend has said neither yes nor no; the message says why."""


_QUIET_SECONDS: Final = 10.0
"""A backend that fails and recovers in turn, as one does that fails on some questions only, is told of
no more often: a client that knows which could fill the log."""


@attrs.define(eq=False)
class _Trouble:
    """Something that goes wrong for a while: a line when it begins, another when it is over."""

    event: str
    kind: str
    _is_told: bool = False
    _failures: int = 0
    _quiet_until: float = 0.0

    def note(self, **details: object) -> None:
        """It has gone wrong, perhaps again."""
        self._failures += 1
        if not self._is_told and trio.current_time() >= self._quiet_until:
            self._is_told = True
            log.warning(self.event, kind=self.kind, **details)

    def note_over(self, event: str = "") -> None:
        """It has gone well; that is logged as `event`, if it has a name."""
        if self._is_told:
            self._is_told = False
            self._quiet_until = trio.current_time() + _QUIET_SECONDS
            if event:
                log.info(event, kind=self.kind, failures=self._failures)
            self._failures = 0


def forwarded(
    settings: Settings, names: tuple[str, ...], peer_address: str, headers: Mapping[str, str]
) -> dict[str, str]:
    """The headers of a handshake that a backend is shown, of those that `names` lists.

    Headers that only proxies set are left out unless the peer is one of ours; `X-Forwarded-For` and
    `X-Real-IP` then say the peer's own address, where it has one.
    """
    peer = host_of(peer_address)
    from_proxy = trusted_proxies(settings.config.trusted_proxies).trusts(peer_address)
    shown: dict[str, str] = {}
    for name in map(str.lower, names):
        if from_proxy or not is_set_by_proxies(name):
            if name in headers:
                shown[name] = headers[name]
        elif name in (FORWARDED_FOR, REAL_IP) and peer is not None:
            shown[name] = str(peer)
    return shown


@attrs.define(eq=False)
class Question(Generic[R]):
    """One kind of question, and where it is asked."""

    kind: str
    url: str
    settings: Settings
    backend: Backend
    _decoder: "msgspec.json.Decoder[_Answer[R]]"
    places: Places = attrs.field(init=False)
    _failing: _Trouble = attrs.field(init=False)
    _crowded: _Trouble = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.places = Places(self.rules.pool_requests, self.rules.pool_share)
        self._failing = _Trouble("question_failed", self.kind)
        self._crowded = _Trouble("questions_crowded", self.kind)

    @property
    def rules(self) -> WebhookRules:
        return self.settings.config.webhooks

    async def ask(
        self, connection: Connection, fields: dict[str, object], user: str | None = None
    ) -> R:
        """Ask, and return what was answered. `user` is who asks, if that is not the connection's.

        Raises `Refused` and `Disconnect` if that is the answer; and if there is none, the one after
        which clients ask again. Cancelled, the backend's request is cancelled too.
        """
        is_json = connection.subprotocol in (None, CENTRIFUGE_JSON.name)
        question = {
            "client": str(connection.fd),
            "transport": connection.transport,
            "protocol": "json" if is_json else "protobuf",
            "encoding": "json",
            "user": connection.user,
            "address": connection.address,
            **fields,
        }
        body, rules = to_json(question), self.rules
        headers = forwarded(
            self.settings, rules.forward_headers, connection.peer_address, connection.headers
        )
        party = trusted_proxies(self.settings.config.trusted_proxies).party_of(
            connection.user if user is None else user,
            connection.address,
            f"fd {connection.fd}",
        )
        try:
            async with self.places.place(party, rules.pool_seconds):
                answer = self._read(await self._post(body, headers))
        except NoPlace as error:
            self._crowded.note(reason=str(error))
            raise self._come_back(crowded=error.own_fault) from None
        except _NoAnswer as error:
            host = urlsplit(self.url).hostname
            self._failing.note(backend=host, reason=str(error))
            raise self._come_back() from None
        self._failing.note_over("question_recovered")
        self._crowded.note_over()
        if answer.disconnect is not None:
            raise Disconnect(answer.disconnect.code, answer.disconnect.reason)
        if answer.error is not None:
            raise Refused(answer.error.code, answer.error.message)
        assert answer.result is not None
        return answer.result

    def _come_back(self, *, crowded: bool = False) -> Exception:
        if self.kind == "connect":
            reason = "too many at once" if crowded else "backend unavailable"
            return Disconnect(CloseCode.SERVER_ERROR, reason)
        return Refused(ErrorCode.TOO_MANY_REQUESTS if crowded else ErrorCode.INTERNAL)

    async def _post(self, body: bytes, headers: dict[str, str]) -> bytes:
        seconds = self.rules.answer_seconds
        try:
            answer = await self.backend.post(self.url, uuid4().hex, body, seconds, headers)
        except HttpFailed as error:
            raise _NoAnswer(str(error)) from None
        if answer.status != 200:
            raise _NoAnswer(f"status {answer.status}")
        if answer.body is None:
            raise _NoAnswer("the answer is too long")
        return answer.body

    def _read(self, body: bytes) -> _Answer[R]:
        try:
            answer = self._decoder.decode(body)
            if answer.disconnect is not None:
                check_close_code(answer.disconnect.code)
        except (ValueError, RecursionError) as error:  # msgspec's own are ValueErrors
            raise _NoAnswer(f"not an answer: {error}") from None
        if answer.result is None and answer.error is None and answer.disconnect is None:
            raise _NoAnswer("not an answer: it has neither result nor error nor disconnect")
        return answer


@asynccontextmanager
async def open_questions(
    settings: Settings, hooks: Hooks, now: Callable[[], float]
) -> AsyncGenerator[None]:
    """For as long as the block, have the hooks ask whose URLs the settings have.

    Raises `ConfigError` where the app has such a hook itself, and if a package is missing.
    """
    rules = settings.config.webhooks
    asked = [kind for kind in KINDS if getattr(rules, f"{kind}_url")]
    if not asked:
        yield
        return
    for kind in asked:
        if owner := hooks.owner(kind):
            raise ConfigError(
                f"webhooks.{kind}_url is set, and your program has an on_{kind} hook, {owner}: "
                "which of them decides? Keep one"
            )
    async with open_http_client(f"webhooks.{asked[0]}_url", "webhooks") as client:
        backend = Backend(client, rules.secret, now)
        with ExitStack() as lent:
            for kind in asked:
                hook = _HOOKS[kind](settings, backend)
                lent.enter_context(hooks.lend(kind, hook, f"webhooks.{kind}_url"))
            yield


def _connect(settings: Settings, backend: Backend) -> AnyHook:
    decoder = msgspec.json.Decoder(_Answer[_Connect])
    question = Question("connect", settings.config.webhooks.connect_url, settings, backend, decoder)

    async def hook(event: ConnectEvent) -> ConnectReply:
        fields: dict[str, object] = {
            "token": event.token,
            "data": event.data,
            "name": event.name,
            "version": event.version,
        }
        if event.claims is not None:
            fields["claims"] = event.claims
        named = (event.claims or {}).get("sub")
        user = named if isinstance(named, str) else None
        result = await question.ask(event.connection, fields, user)
        return ConnectReply(result.user, result.info, result.data, result.channels)

    return hook


def _subscribe(settings: Settings, backend: Backend) -> AnyHook:
    decoder = msgspec.json.Decoder(_Answer[_Subscribe])
    question = Question(
        "subscribe", settings.config.webhooks.subscribe_url, settings, backend, decoder
    )

    async def hook(event: SubscribeEvent) -> SubscribeReply:
        fields: dict[str, object] = {
            "channel": event.topic,
            "token": event.token,
            "data": event.data,
        }
        if event.claims is not None:
            fields["claims"] = event.claims
        result = await question.ask(event.connection, fields)
        return SubscribeReply(result.info, result.data)

    return hook


def _publish(settings: Settings, backend: Backend) -> AnyHook:
    decoder = msgspec.json.Decoder(_Answer[_Data])
    question = Question("publish", settings.config.webhooks.publish_url, settings, backend, decoder)

    async def hook(event: PublishEvent) -> PublishReply:
        fields: dict[str, object] = {"channel": event.topic, "data": Raw(opaque_json(event.data))}
        result = await question.ask(event.connection, fields)
        return PublishReply(None if result.data is UNSET else to_json(result.data))

    return hook


def _rpc(settings: Settings, backend: Backend) -> AnyHook:
    decoder = msgspec.json.Decoder(_Answer[_Data])
    question = Question("rpc", settings.config.webhooks.rpc_url, settings, backend, decoder)

    async def hook(connection: Connection, method: str, data: object) -> object:
        result = await question.ask(connection, {"method": method, "data": data})
        return None if result.data is UNSET else result.data

    return hook


_HOOKS = {"connect": _connect, "subscribe": _subscribe, "publish": _publish, "rpc": _rpc}
