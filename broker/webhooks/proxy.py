"""Questions to a backend over HTTP: may this client connect, subscribe, publish; what is the answer
to this rpc.

Rules:

1. A question is asked by an ordinary hook, so what holds for hooks holds here: the client that asks
   waits, in order, and nobody else does.
2. A backend that does not answer, or not in the way that is agreed, has said neither yes nor no:
   the client is told to try again.
3. Names and shapes are those of Centrifugo's proxies, as far as they go; a field that we do not know
   is no answer, rather than one that is half done.
"""

from collections.abc import AsyncGenerator, Callable
from contextlib import ExitStack, asynccontextmanager
from typing import Annotated, Any, Generic, TypeVar
from urllib.parse import urlsplit
from uuid import uuid4

import attrs
import msgspec
import structlog
import trio
from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from broker.config.settings import Config, WebhookRules
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
from broker.transport.http_client import Backend, open_http_client

log = structlog.get_logger("broker")

KINDS = ("connect", "subscribe", "publish", "rpc")


class _Connect(Struct, forbid_unknown_fields=True):
    user: str = ""
    info: Any = None
    data: dict[str, Any] | None = None
    channels: tuple[str, ...] = ()


class _Subscribe(Struct, forbid_unknown_fields=True):
    info: Any = None
    data: Any = None


class _Data(Struct, forbid_unknown_fields=True):
    data: Any | UnsetType = UNSET


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


@attrs.define(eq=False)
class Question(Generic[R]):
    """One kind of question, and where it is asked."""

    kind: str
    url: str
    rules: WebhookRules
    backend: Backend
    _decoder: "msgspec.json.Decoder[_Answer[R]]"
    _failing: bool = False

    async def ask(self, connection: Connection, fields: dict[str, object]) -> R:
        """Ask, and return what was answered.

        Raises `Refused` and `Disconnect` if that is the answer; and if there is none, the one after
        which clients ask again.
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
        names = map(str.lower, self.rules.forward_headers)
        headers = {name: connection.headers[name] for name in names if name in connection.headers}
        try:
            answer = self._read(await self._post(to_json(question), headers))
        except _NoAnswer as error:
            if not self._failing:
                self._failing = True
                host = urlsplit(self.url).hostname
                log.warning("question_failed", kind=self.kind, backend=host, reason=str(error))
            raise self._come_back() from None
        if self._failing:
            self._failing = False
            log.info("question_recovered", kind=self.kind)
        if answer.disconnect is not None:
            raise Disconnect(answer.disconnect.code, answer.disconnect.reason)
        if answer.error is not None:
            raise Refused(answer.error.code, answer.error.message)
        assert answer.result is not None
        return answer.result

    def _come_back(self) -> Exception:
        if self.kind == "connect":
            return Disconnect(CloseCode.SERVER_ERROR, "backend unavailable")
        return Refused(ErrorCode.INTERNAL)

    async def _post(self, body: bytes, headers: dict[str, str]) -> bytes:
        seconds = self.rules.answer_seconds
        try:
            answer = await self.backend.post(self.url, uuid4().hex, body, seconds, headers)
        except trio.TooSlowError:
            raise _NoAnswer(f"no answer within {seconds:g} s") from None
        except Exception as error:  # noqa: BLE001 - whatever it is, the client may ask again
            raise _NoAnswer(f"{type(error).__name__}: {error}") from None
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
    config: Config, hooks: Hooks, now: Callable[[], float]
) -> AsyncGenerator[None]:
    """For as long as the block, have the hooks ask whose URLs the settings have.

    Raises `ConfigError` where the app has such a hook itself, and if a package is missing.
    """
    rules = config.webhooks
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
                hook = _HOOKS[kind](rules, backend)
                lent.enter_context(hooks.lend(kind, hook, f"webhooks.{kind}_url"))
            yield


def _connect(rules: WebhookRules, backend: Backend) -> AnyHook:
    decoder = msgspec.json.Decoder(_Answer[_Connect])
    question = Question("connect", rules.connect_url, rules, backend, decoder)

    async def hook(event: ConnectEvent) -> ConnectReply:
        fields: dict[str, object] = {
            "token": event.token,
            "data": event.data,
            "name": event.name,
            "version": event.version,
        }
        if event.claims is not None:
            fields["claims"] = event.claims
        result = await question.ask(event.connection, fields)
        return ConnectReply(result.user, result.info, result.data, result.channels)

    return hook


def _subscribe(rules: WebhookRules, backend: Backend) -> AnyHook:
    decoder = msgspec.json.Decoder(_Answer[_Subscribe])
    question = Question("subscribe", rules.subscribe_url, rules, backend, decoder)

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


def _publish(rules: WebhookRules, backend: Backend) -> AnyHook:
    decoder = msgspec.json.Decoder(_Answer[_Data])
    question = Question("publish", rules.publish_url, rules, backend, decoder)

    async def hook(event: PublishEvent) -> PublishReply:
        fields: dict[str, object] = {"channel": event.topic, "data": Raw(opaque_json(event.data))}
        result = await question.ask(event.connection, fields)
        return PublishReply(None if result.data is UNSET else to_json(result.data))

    return hook


def _rpc(rules: WebhookRules, backend: Backend) -> AnyHook:
    decoder = msgspec.json.Decoder(_Answer[_Data])
    question = Question("rpc", rules.rpc_url, rules, backend, decoder)

    async def hook(connection: Connection, method: str, data: object) -> object:
        result = await question.ask(connection, {"method": method, "data": data})
        return None if result.data is UNSET else result.data

    return hook


_HOOKS = {"connect": _connect, "subscribe": _subscribe, "publish": _publish, "rpc": _rpc}
