"""The HTTP API for backends: `POST /api/<method>`, named and shaped as Centrifugo's, so that `cent`
and the other server SDKs work.

Rule 1  Nothing is looked at before the key: a caller without one learns only whether there is an API.
Rule 2  A fault in the request as HTTP is a status (400, 401, 413); a fault in the command that it
        carries is `{"error": {"code", "message"}}` with 200, which is what those SDKs expect.
Rule 3  A method is one atomic step, without a checkpoint. So the commands of a batch are carried
        out one after another, `parallel` or not, and nothing comes between them.
"""

import base64
import hmac
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from http import HTTPStatus
from typing import Annotated, Any, Final, TypeVar

import attrs
import structlog
from msgspec import Meta, Raw, Struct
from starlette.requests import Request
from starlette.responses import Response

from broker.core.braces import TooMany, alternatives
from broker.core.history import UnrecoverablePosition
from broker.core.json_reader import AsSent, BadJson, read
from broker.core.messages import ClientInfo, ConnectionInfo, Fd, Position, Publication
from broker.errors import CloseCode, ErrorCode, Refused, UnsubscribeCode
from broker.node import Node
from broker.protocols.centrifuge_json import CENTRIFUGE_JSON
from broker.protocols.commands import BadCommand
from broker.protocols.json_text import check_json, to_json, written
from broker.routing.publishing import PublishOptions
from broker.session.orders import ServerSub
from broker.session.rpc import report
from broker.version import VERSION

log = structlog.get_logger("broker.http")

S = TypeVar("S", bound=Struct)

Offset = Annotated[int, Meta(ge=0)]
Count = Annotated[int, Meta(ge=1, le=10_000)]
_ABSENT = Raw(b"")
_UNSUBSCRIBED: Final = "server unsubscribe"

MAX_ALTERNATIVES: Final = 100
"""Each is tried on every topic, and `{a,b}{a,b}…` doubles them with every pair of braces."""

MAX_PATTERN: Final = 1024
"""Characters of a pattern, and a fourth of those that it may stand for: four topics of the longest. One
that is nothing but stars takes 12 ms to be compiled."""

_FD = re.compile("[1-9][0-9]{0,17}", re.ASCII)
"""As `fd:N` has it: more digits than that are nobody's, and too many are no number in Python."""


class _Content(Struct, kw_only=True):
    data: Raw = _ABSENT
    b64data: str = ""
    """Base64 of any bytes; those that are JSON are taken for it."""
    tags: dict[str, str] | None = None
    skip_history: bool = False
    idempotency_key: str = ""
    retain: bool = False
    exclude: list[Fd] = []
    report: bool = False


class Publish(_Content, kw_only=True):
    channel: str


class Broadcast(_Content, kw_only=True):
    channels: list[str]


class _Target(Struct, kw_only=True):
    """All connections of `user`, or those of them that `client` (an fd in decimal) names."""

    user: str = ""
    client: str = ""
    session: str = ""


class Subscribe(_Target, kw_only=True):
    channel: str
    info: Raw = _ABSENT
    b64info: str = ""
    data: Raw = _ABSENT
    b64data: str = ""
    recover_since: dict[str, object] | None = None
    override: dict[str, object] | None = None


class Unsubscribe(_Target, kw_only=True):
    channel: str


class DisconnectOrder(Struct):
    code: int = int(CloseCode.FORCE_DISCONNECT)
    reason: str = "force disconnect"


class DisconnectParams(_Target, kw_only=True):
    whitelist: list[str] = []
    disconnect: DisconnectOrder | None = None


class Refresh(_Target, kw_only=True):
    expired: bool = False
    expire_at: Annotated[int, Meta(ge=0, le=2**53)] = 0


class Channel(Struct):
    channel: str


class StreamPosition(Struct):
    offset: Offset = 0
    epoch: str = ""


class History(Struct):
    channel: str
    limit: int = 0
    since: StreamPosition | None = None
    reverse: bool = False


class Channels(Struct):
    pattern: str = ""


class Info(Struct):
    pass


class Push(Struct):
    fd: Fd
    data: Raw = _ABSENT


class Connections(Struct):
    user: str = ""
    expression: str = ""
    after: Annotated[int, Meta(ge=0)] = 0
    limit: Count = 100


class OneConnection(Struct):
    fd: Fd


class Batch(Struct):
    commands: list[dict[str, AsSent]]
    parallel: bool = False


@attrs.frozen
class ApiResponse:
    """The response of the API to one request: status, body, type."""

    status: HTTPStatus
    body: bytes
    media_type: str = "text/plain; charset=utf-8"
    headers: Mapping[str, str] = attrs.field(factory=dict)


class Api:
    """Answers requests under `/api` on behalf of a node."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._methods: dict[str, tuple[type[Struct], Callable[[Any], object]]] = {
            "publish": (Publish, self._publish),
            "broadcast": (Broadcast, self._broadcast),
            "subscribe": (Subscribe, self._subscribe),
            "unsubscribe": (Unsubscribe, self._unsubscribe),
            "disconnect": (DisconnectParams, self._disconnect),
            "refresh": (Refresh, self._refresh),
            "presence": (Channel, self._presence),
            "presence_stats": (Channel, self._presence_stats),
            "history": (History, self._history),
            "history_remove": (Channel, self._history_remove),
            "channels": (Channels, self._channels),
            "info": (Info, self._info),
            "push": (Push, self._push),
            "connections": (Connections, self._connections),
            "connection": (OneConnection, self._connection),
        }

    async def __call__(self, request: Request) -> Response:
        """One request by way of Starlette. The server in front has bounded its body."""
        method = request.path_params["method"]
        answer = self.refuse(method, shown_key(request.headers.get))
        if answer is None:
            answer = self.answer(method, await request.body())
        return Response(
            answer.body, answer.status, headers=answer.headers, media_type=answer.media_type
        )

    def refuse(self, method: str, key: str) -> "ApiResponse | None":
        """The answer to who may not call `method`, or to a method that is not there; else None.

        Asked before the body is read. The comparison takes as long for any key of that length.
        """
        ours = self._node.config.api_key
        if ours is None:
            text = "The HTTP API is off: set api_key, or BROKER_API_KEY, to turn it on."
            return ApiResponse(HTTPStatus.NOT_FOUND, text.encode())
        if not hmac.compare_digest(key.encode(), ours.encode()):
            text = "Wrong or missing API key: send it as X-API-Key."
            headers = {"WWW-Authenticate": "apikey"}
            return ApiResponse(HTTPStatus.UNAUTHORIZED, text.encode(), headers=headers)
        if method not in self._methods and method != "batch":
            text = f"No such method; known are {', '.join([*self._methods, 'batch'])}."
            return ApiResponse(HTTPStatus.NOT_FOUND, text.encode())
        return None

    def answer(self, method: str, body: bytes) -> "ApiResponse":
        """Carry out a method that `refuse` let pass. Never waits."""
        try:
            check_json(body)
        except BadCommand as error:
            return ApiResponse(HTTPStatus.BAD_REQUEST, f"The body is {error}".encode())
        if method == "batch":
            result = self._batch(body)
        else:
            result = self._answer(method, body, lambda result: {"result": result})
        return ApiResponse(HTTPStatus.OK, written(result), "application/json")

    def _batch(self, body: bytes) -> object:
        try:
            batch = _decode(body, Batch)
        except Refused as refusal:
            return _error(refusal)
        # Without a `result` around it, and each reply under its method's name: as Centrifugo.
        return {"replies": [self._command(command) for command in batch.commands]}

    def _command(self, command: dict[str, Raw]) -> object:
        if len(command) != 1:
            text = "a command has exactly one method"
            return _error(Refused(ErrorCode.BAD_REQUEST, text))
        ((method, params),) = command.items()
        if method not in self._methods:
            return _error(Refused(ErrorCode.METHOD_NOT_FOUND))
        return self._answer(method, bytes(params), lambda result: {method: result})

    def _answer(self, method: str, params: bytes, wrap: Callable[[object], object]) -> object:
        kind, carry_out = self._methods[method]
        try:
            return wrap(carry_out(_decode(params, kind)))
        except Refused as refusal:
            return _error(refusal)
        except Exception:
            log.exception("api_failed", method=method)
            return _error(Refused(ErrorCode.INTERNAL))

    # methods

    def _publish(self, params: Publish) -> object:
        return self._publish_to(params.channel, params)

    def _broadcast(self, params: Broadcast) -> object:
        responses: list[object] = []
        for channel in params.channels:
            try:
                responses.append({"result": self._publish_to(channel, params)})
            except Refused as refusal:
                responses.append(_error(refusal))
        return {"responses": responses}

    def _publish_to(self, topic: str, content: _Content) -> object:
        opaque = _bytes(content.b64data)
        options = PublishOptions(
            exclude=content.exclude,
            tags=content.tags,
            opaque=bool(opaque),
            skip_history=content.skip_history,
            retain=content.retain,
            key=content.idempotency_key,
        )
        data = opaque or to_json(_payload("data", content.data, ""))
        delivery = self._node.publish(topic, data, options)
        result: dict[str, object] = {}
        if delivery.position is not None:
            result |= {"offset": delivery.position.offset, "epoch": delivery.position.epoch}
        if content.report:
            result |= report(delivery)
        return result

    def _subscribe(self, params: Subscribe) -> object:
        if params.recover_since:
            text = "subscribe cannot recover: leave recover_since out, and read history"
            raise Refused(ErrorCode.NOT_AVAILABLE, text)
        if params.override:
            text = "subscribe goes by the topic's rules: leave override out"
            raise Refused(ErrorCode.NOT_AVAILABLE, text)
        info = _payload("info", params.info, params.b64info, needed=False)
        data = _payload("data", params.data, params.b64data, needed=False)
        sub = ServerSub(
            None if info is None else to_json(info), None if data is None else to_json(data)
        )
        for fd in self._targets(params):
            self._node.add_subscription(fd, params.channel, sub)
        return {}

    def _unsubscribe(self, params: Unsubscribe) -> object:
        for fd in self._targets(params):
            self._node.end_subscription(fd, params.channel, UnsubscribeCode.SERVER, _UNSUBSCRIBED)
        return {}

    def _disconnect(self, params: DisconnectParams) -> object:
        order = params.disconnect or DisconnectOrder()
        for fd in self._targets(params):
            if str(fd) not in params.whitelist:
                self._close(fd, order.code, order.reason)
        return {}

    def _close(self, fd: Fd, code: int, reason: str) -> None:
        try:
            self._node.disconnect(fd, code, reason)
        except ValueError as error:
            raise Refused(ErrorCode.BAD_REQUEST, str(error)) from None

    def _refresh(self, params: Refresh) -> object:
        for fd in self._targets(params):
            if params.expired:
                self._close(fd, CloseCode.EXPIRED, "expired")
            else:
                self._node.expire(fd, params.expire_at or None)
        return {}

    def _presence(self, params: Channel) -> object:
        clients = self._node.presence(params.channel)
        return {"presence": {client: _client_info(info) for client, info in clients.items()}}

    def _presence_stats(self, params: Channel) -> object:
        clients = self._node.presence(params.channel)
        users = {info.user for info in clients.values()}
        return {"num_clients": len(clients), "num_users": len(users)}

    def _history(self, params: History) -> object:
        since = None
        if params.since is not None:
            since = Position(params.since.offset, params.since.epoch)
        try:
            publications, top = self._node.history(
                params.channel, since, params.limit, params.reverse
            )
        except UnrecoverablePosition:
            raise Refused(ErrorCode.UNRECOVERABLE_POSITION) from None
        listed = [_publication(publication) for publication in publications]
        return {"publications": listed, "offset": top.offset, "epoch": top.epoch}

    def _history_remove(self, params: Channel) -> object:
        self._node.remove_history(params.channel)
        return {}

    def _channels(self, params: Channels) -> object:
        globs = _alternatives(params.pattern or "*")
        return {
            "channels": {
                topic: {"num_clients": count}
                for topic, count in self._node.topics().items()
                if any(fnmatchcase(topic, glob) for glob in globs)
            }
        }

    def _info(self, params: Info) -> object:
        statistics = self._node.stats()
        hub = statistics.hub
        uptime = time.time() - self._node.started_at
        node = {
            "uid": self._node.name,
            "name": "trio-broker",
            "version": VERSION,
            "num_clients": statistics.connections,
            "num_users": statistics.users,
            "num_subs": hub.subscriptions,
            "num_channels": hub.topics + hub.patterns,
            "uptime": int(uptime),
            # Counted since the start, so that is the interval.
            "metrics": {
                "interval": uptime,
                "items": {
                    "messages_published": statistics.published,
                    "messages_delivered": statistics.post.messages_delivered,
                    "connections_refused": statistics.refused,
                    "history_publications_evicted": statistics.history.publications_evicted,
                },
            },
        }
        return {"nodes": [node]}

    def _push(self, params: Push) -> object:
        return {"status": self._node.push(params.fd, _payload("data", params.data, ""))}

    def _connections(self, params: Connections) -> object:
        if params.expression:
            raise Refused(ErrorCode.NOT_AVAILABLE, "connections cannot be asked by expression")
        found: Iterable[ConnectionInfo]
        if params.user:
            found = self._infos(fd for fd in self._node.fds_of(params.user) if fd > params.after)
            found = list(found)[: params.limit]
        else:
            found = self._node.connections(params.after, params.limit)
        result: dict[str, object] = {
            "connections": {str(info.fd): _connection_info(info) for info in found}
        }
        statistics = self._node.stats().events.get("webhooks")
        if statistics is not None:  # the result holds after this event
            result |= {"node": statistics.node, "epoch": statistics.epoch, "seq": statistics.seq}
        return result

    def _connection(self, params: OneConnection) -> object:
        info = self._node.connection_info(params.fd)
        if info is None:
            raise Refused(ErrorCode.UNKNOWN_CHANNEL, f"no connection has fd {params.fd}")
        return _connection_info(info)

    def _infos(self, fds: Iterable[Fd]) -> Iterator[ConnectionInfo]:
        for fd in fds:
            info = self._node.connection_info(fd)
            if info is not None:
                yield info

    def _targets(self, target: _Target) -> list[Fd]:
        named = {name for name in (target.client, target.session) if name}
        if target.user:
            fds = self._node.fds_of(target.user)
        elif named:
            fds = [int(name) for name in named if _FD.fullmatch(name)]
        else:
            raise Refused(ErrorCode.BAD_REQUEST, "user is missing, and so are client and session")
        return [fd for fd in fds if self._node.exists(fd) and named <= {str(fd)}]


def shown_key(header: Callable[[str], str | None]) -> str:
    """The key that a request shows, "" if none; `header` looks one up by its lower-case name."""
    key = header("x-api-key")
    if key is not None:
        return key
    scheme, _, key = (header("authorization") or "").partition(" ")
    return key.strip() if scheme.lower() == "apikey" else ""


def _decode(params: bytes, kind: type[S]) -> S:
    """Parameters as a struct. Raises `Refused`, and names the one that is wrong."""
    try:
        return read(params, kind)
    except BadJson as error:
        raise Refused(ErrorCode.BAD_REQUEST, str(error)) from None


def _payload(name: str, data: Raw, b64: str, *, needed: bool = True) -> Raw | None:
    """A payload in one line; where it is `needed`, null is one, and elsewhere none is given then."""
    if b64:
        try:
            return Raw(check_json(base64.b64decode(b64, validate=True)))
        except ValueError as error:
            text = f"b64{name} is not base64 of JSON: {error}"
            raise Refused(ErrorCode.BAD_REQUEST, text) from None
    if data and (needed or bytes(data) != b"null"):
        return Raw(bytes(data))
    if needed:
        raise Refused(ErrorCode.BAD_REQUEST, f"{name} is missing")
    return None


def _alternatives(pattern: str) -> set[str]:
    """The patterns that one with `{a,b}` in it stands for; braces without a partner are text.

    Raises `Refused` for one that is too long, or stands for too much.
    """
    if len(pattern) > MAX_PATTERN:
        text = f"pattern has more than {MAX_PATTERN} characters"
        raise Refused(ErrorCode.BAD_REQUEST, text)
    try:
        return alternatives(pattern, MAX_ALTERNATIVES, 4 * MAX_PATTERN)
    except TooMany as error:
        raise Refused(ErrorCode.BAD_REQUEST, f"pattern stands for {error}") from None


def _bytes(b64data: str) -> bytes:
    try:
        return base64.b64decode(b64data, validate=True)
    except ValueError as error:
        raise Refused(ErrorCode.BAD_REQUEST, f"b64data is not base64: {error}") from None


def _client_info(info: ClientInfo) -> object:
    shown: dict[str, object] = {"client": info.client, "user": info.user}
    for field in ("conn_info", "chan_info"):
        raw = getattr(info, field)
        if raw is not None:
            shown[field] = Raw(raw)
    return shown


def _publication(publication: Publication) -> object:
    data = CENTRIFUGE_JSON.payload(publication)
    shown: dict[str, object] = {"data": data, "offset": publication.offset}
    if publication.tags:
        shown["tags"] = publication.tags
    if publication.info is not None:
        shown["info"] = _client_info(publication.info)
    return shown


def _connection_info(info: ConnectionInfo) -> object:
    """As Centrifugo PRO has it, with what we know besides."""
    shown = attrs.asdict(info)
    protocol = shown["protocol"]
    shown["protocol"] = protocol.removeprefix("centrifuge-")
    return shown


def _error(refusal: Refused) -> object:
    return {"error": {"code": refusal.code, "message": refusal.message}}
