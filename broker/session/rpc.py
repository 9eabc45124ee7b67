"""Calls of clients: the broker's own methods, and behind them the app's `on_rpc`.

=========  ======================================================  =================================
method     asks with                                               answered with
=========  ======================================================  =================================
publish    topic, data, echo, exclude, report, key, retain         {}, or the report, for who may
                                                                   read the topic's presence
request    to, data, seconds                                       what the other client answered
reply      reply_to, and data or error {code, message}             {}
will       topic, data, retain; without a topic: none any more     {}
=========  ======================================================  =================================
"""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Final, TypeAlias

import attrs
import trio
from msgspec import DecodeError, Meta, Raw, Struct
from msgspec.json import Decoder

from broker.core.json_reader import BadJson, read
from broker.core.messages import Delivery, Fd
from broker.core.names import is_connection_name
from broker.core.work import CALLED
from broker.errors import CloseCode, Disconnect, ErrorCode, Refused
from broker.protocols.codec import Result
from broker.protocols.commands import BadCommand, Command
from broker.protocols.json_text import check_json, one_line, to_json
from broker.routing.publishing import PublishOptions
from broker.routing.wills import Will
from broker.session.commands import Handler, ask_publish, ask_read, hand_to_app
from broker.session.replies import NOTHING, Client
from broker.transport import frames

_ABSENT: Final = Raw(b"")


class PublishParams(Struct, forbid_unknown_fields=True):
    topic: str
    data: Raw = _ABSENT
    echo: bool = True
    exclude: list[Fd] = []
    report: bool = False
    key: str = ""
    retain: bool = False

    @property
    def target(self) -> str:
        return self.topic


class RequestParams(Struct, forbid_unknown_fields=True):
    to: str
    data: Raw = _ABSENT
    seconds: Annotated[float, Meta(gt=0, le=60)] = 10.0
    """As long as a person waits; a minute is what most proxies wait."""

    @property
    def target(self) -> str:
        return self.to


class ReplyError(Struct):
    code: Annotated[int, Meta(ge=100, le=4_999)]
    message: str = ""


class ReplyParams(Struct, forbid_unknown_fields=True):
    reply_to: str
    data: Raw = _ABSENT
    error: ReplyError | None = None

    @property
    def target(self) -> str:
        return ""


class WillParams(Struct, forbid_unknown_fields=True):
    topic: str = ""
    data: Raw = _ABSENT
    retain: bool = False

    @property
    def target(self) -> str:
        return self.topic


Params: TypeAlias = PublishParams | RequestParams | ReplyParams | WillParams


def _counts(params: Params) -> bool:
    """Whether the answer tells how many subscribe to a topic."""
    return (
        isinstance(params, PublishParams) and params.report and not is_connection_name(params.topic)
    )


def _publish(client: Client, request_id: int, params: PublishParams, data: bytes) -> bytes | None:
    left_out = params.exclude if params.echo else [*params.exclude, client.peer.fd]
    options = PublishOptions(
        exclude=left_out, key=params.key, retain=params.retain, report=params.report
    )
    answer = partial(_publish_kept, client, request_id, params)
    delivery = client.services.publisher.publish(params.topic, data, client.peer, options, answer)
    if delivery is None:
        client.pending += 1
        return None
    return _published(params, delivery)


def _publish_kept(
    client: Client, request_id: int, params: PublishParams, result: Delivery | Refused
) -> None:
    if isinstance(result, Refused):
        reply = client.error(request_id, result)
    else:
        data = Raw(_published(params, result))
        reply = client.codec.reply(request_id, "rpc", {"data": data})
    client.kept([reply])


def _published(params: PublishParams, delivery: Delivery) -> bytes:
    return to_json(report(delivery)) if params.report else b"{}"


def _request(client: Client, request_id: int, params: RequestParams, data: bytes) -> None:
    due = trio.current_time() + params.seconds
    answer = partial(_answer_later, client, request_id)
    client.services.requests.ask(params.to, data, client.peer, answer, due=due)


def _answer_later(client: Client, request_id: int, result: bytes | Refused) -> None:
    """Answer a call that was not answered when it came, if the client is still here."""
    if not client.peer.is_established:
        return
    outbox = client.peer.outbox
    if isinstance(result, Refused):
        client.refuse(request_id, result)
    elif outbox.bytes and outbox.bytes + len(result) > client.services.config.outbox_bytes:
        text = "the answers before this one have yet to be taken"
        client.refuse(request_id, Refused(ErrorCode.LIMIT_EXCEEDED, text))
    else:
        client.reply(request_id, "rpc", {"data": Raw(result)})


def _reply(client: Client, _: int, params: ReplyParams, data: bytes) -> bytes:
    if not (params.reply_to.isascii() and params.reply_to.isdigit()):
        raise Refused(ErrorCode.BAD_REQUEST, "reply: reply_to is a tag of the request")
    answer: bytes | Refused
    if params.error is not None:
        answer = Refused(params.error.code, params.error.message)
    else:
        answer = _line(params.data)
    client.services.requests.reply(client.peer.fd, int(params.reply_to[:18]), answer)
    return b"{}"


def _will(client: Client, _: int, params: WillParams, data: bytes) -> bytes:
    will = Will(params.topic, data, params.retain) if params.topic else None
    client.services.wills.put(client.peer, will)
    return b"{}"


@attrs.frozen
class _Method:
    """One of the broker's own methods. `carry_out` returns raw JSON, or None to answer later."""

    params: type[Params]
    carry_out: Callable[[Client, int, Any, bytes], bytes | None]


METHODS: Final[dict[str, _Method]] = {
    "publish": _Method(PublishParams, _publish),
    "request": _Method(RequestParams, _request),
    "reply": _Method(ReplyParams, _reply),
    "will": _Method(WillParams, _will),
}


def target_of(command: Command) -> str | None:
    """The topic, fd or user that a call of one of our methods is about; None for any other call, and
    for one that cannot be read."""
    request = command.rpc
    method = METHODS.get(request.method) if request is not None else None
    if request is None or method is None:
        return None
    try:
        params: Params = read(bytes(request.data) or b"{}", method.params)
    except BadJson:
        return None
    return params.target or None


class _Aim(Struct):
    """As much of the parameters as tells whom a call is going to reach."""

    topic: str = ""
    to: str = ""


_aims: Final = Decoder(_Aim)


class Rpc(Handler):
    """A call of one of our methods, or else of the app's."""

    def weigh(self, client: Client, command: Command, answer: object = None) -> float:
        assert command.rpc is not None
        if command.rpc.method not in ("publish", "request"):
            return 0.0
        try:
            aim = _aims.decode(command.rpc.data)
        except DecodeError:
            # It is refused, or written in a way that this decoder refuses and `_params` reads.
            try:
                aim = read(bytes(command.rpc.data), _Aim)
            except BadJson:
                return 0.0
        return client.services.publisher.weigh(aim.topic or aim.to)

    def must_ask(self, client: Client, command: Command) -> bool:
        assert command.rpc is not None
        if command.rpc.method in METHODS:
            hooks = client.services.hooks
            reads = command.rpc.method == "publish" and hooks.presence is not None
            return reads or hooks.publish is not None
        return client.services.hooks.rpc is not None

    async def ask(self, client: Client, command: Command) -> object:
        request, hooks = command.rpc, client.services.hooks
        assert request is not None
        if request.method in METHODS:
            params = self._params(client, command)
            if not params.target:
                return b""
            if _counts(params):
                await ask_read(client, params.target, "presence")
            return await ask_publish(client, params.target, _line(params.data))
        assert hooks.rpc is not None, "must_ask is false without it"
        data = await hooks.rpc(client.connection, request.method, client.value(request.data))
        return client.written(data)

    def is_held(self, client: Client, command: Command) -> bool:
        assert command.rpc is not None
        if command.rpc.method == "publish":
            size = len(command.rpc.data)
            return client.services.router.engine.is_full(client.peer.allowance, size)
        return super().is_held(client, command)

    def act(self, client: Client, command: Command, answer: object) -> Result | None:
        request = command.rpc
        assert request is not None
        method = METHODS.get(request.method)
        if method is None:
            if not isinstance(answer, Raw):
                raise Refused(ErrorCode.METHOD_NOT_FOUND)
            return {"data": answer}
        client.services.router.meter.add(CALLED)
        params = self._params(client, command)
        data = b""
        if params.target:
            client.services.rights.check_publish(client.peer, params.target)
            if _counts(params):
                client.services.rights.check_read(client.peer, params.target, "presence")
            data = answer if isinstance(answer, bytes) else _line(params.data)
        result = method.carry_out(client, command.id, params, data)
        return None if result is None else {"data": Raw(result)}

    def _params(self, client: Client, command: Command) -> Params:
        request = command.rpc
        assert request is not None
        kind = METHODS[request.method].params
        try:
            return read(bytes(request.data) or b"{}", kind)
        except BadJson as error:
            raise Refused(ErrorCode.BAD_REQUEST, f"{request.method}: {error}") from None


def report(delivery: Delivery) -> dict[str, object]:
    """A report of a publication, as the wire has it."""
    shown: dict[str, object] = {
        "matched": delivery.matched,
        "queued": delivery.queued,
        "dropped": delivery.dropped,
        "failed": delivery.failed,
    }
    return shown if delivery.complete else {**shown, "complete": False}


def _line(data: Raw) -> bytes:
    if not data:
        raise Refused(ErrorCode.BAD_REQUEST, "data is missing")
    return one_line(bytes(data))


class Send(Handler):
    """A message for the app, which wants no reply."""

    def must_ask(self, client: Client, command: Command) -> bool:
        return client.services.hooks.message is not None

    async def ask(self, client: Client, command: Command) -> object:
        assert command.send is not None
        data, opcode = bytes(command.send.data), frames.TEXT
        if client.codec.opaque_payloads:
            try:
                data = check_json(data)
            except BadCommand:
                opcode = frames.BINARY
        await hand_to_app(client.services, client.connection, opcode, data)
        return NOTHING

    def act(self, client: Client, command: Command, answer: object) -> Result | None:
        if answer is None:
            raise Disconnect(CloseCode.NOT_AVAILABLE, "not available")
        return None
