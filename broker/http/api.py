"""The HTTP API for backends: `POST /api/<method>`, named and shaped as Centrifugo's, so that `cent`
and the other server SDKs work.

Rule 1  Nothing is looked at before the key: a caller without one learns only whether there is an API.
Rule 2  A fault in the request as HTTP is a status (400, 401, 413); a fault in the command that it
        carries is `{"error": {"code", "message"}}` with 200, which is what those SDKs expect.
Rule 3  What a request asks for is carried out in its order, `parallel` or not, and not in one step:
        between two commands of a batch, two topics of a broadcast, two connections of a user and two
        pieces of a list others have their turn (ADR 15). One publication is one step, and so are plain ones to
        one topic in a row, as far as they are short together (`http.publications.TOGETHER`). Where the engine
        has to keep it first, publications in a row are kept together, and any other command waits for
        those before it.
"""

import hmac
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from fnmatch import translate
from functools import partial
from http import HTTPStatus
from typing import Annotated, Any, Final, TypeAlias, TypeVar

import attrs
import structlog
from msgspec import Meta, Raw, Struct, field
from starlette.requests import Request
from starlette.responses import Response

from broker.config.effective import effective
from broker.core.braces import TooMany, alternatives
from broker.core.history import UnrecoverablePosition
from broker.core.hub import Listeners
from broker.core.json_reader import AsSent, BadJson, one_text, read, read_members, read_strictly
from broker.core.messages import (
    ClientInfo,
    ClosedConnection,
    ConnectionDetails,
    Fd,
    Position,
    Publication,
)
from broker.core.session import ServerSub, Subscription
from broker.core.trace import Target
from broker.core.work import (
    BATCHED,
    CALL,
    COMMAND,
    DETAILS,
    ENDING,
    FIGURES,
    LISTED,
    LOOKED,
    MEMBER,
    NAMED,
    READ_KILOBYTE,
    REPORT,
    SETTING,
    SHOWN,
    SPARED,
    SUBSCRIPTION,
    SURVEYED_AT_ONCE,
)
from broker.errors import CloseCode, ErrorCode, Refused, UnsubscribeCode, check_close_code
from broker.events.spans import TAG, is_sampled
from broker.http.calls import Call, KeyGone, Listing, member, pieces
from broker.http.publications import (
    Broadcast,
    Publish,
    Row,
    error_of,
    payload,
    plain_data,
    plain_results,
    publication_of,
    read_plain,
    read_plain_command,
    response_of,
    responses_later,
    result_later,
    result_of,
)
from broker.http.stats import VIEW, Rows
from broker.http.sums import whole
from broker.node import Node, Publishing
from broker.protocols.centrifuge_json import CENTRIFUGE_JSON
from broker.protocols.json_text import to_json, written
from broker.routing import mail
from broker.routing.reading import history_page, listing_work, presence_counts
from broker.routing.turns import Share
from broker.session.everywhere import ForFds
from broker.session.figures import NodeReport
from broker.session.search import ConnectionQuery

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("broker.http")

S = TypeVar("S", bound=Struct)

Offset = Annotated[int, Meta(ge=0)]
Count = Annotated[int, Meta(ge=1, le=10_000)]

MAX_COMMANDS: Final = 25_000
"""In one batch: as many of the shortest publications as 1 MiB has. Each of what is nothing at all would
be answered with twenty times its size."""

MAX_ALTERNATIVES: Final = 100
"""Each is tried on every topic, and `{a,b}{a,b}…` doubles them with every pair of braces."""

MAX_PATTERN: Final = 1024
"""Characters of a pattern, and a fourth of those that it may stand for: four topics of the longest. One
that is nothing but stars takes 12 ms to be compiled."""

MAX_WAIT: Final = 25.0
"""Seconds that a request may wait for something to be traced: below the 30 after which proxies and
clients give a request up."""

_FD = re.compile("[1-9][0-9]{0,17}", re.ASCII)
"""As `fd:N` has it: more digits than that are nobody's, and too many are no number in Python."""


class _Target(Struct, kw_only=True):
    """All connections of `user`, or those of them that `client` (an fd in decimal) names."""

    user: str = ""
    client: str = ""
    session: str = ""


class Subscribe(_Target, kw_only=True):
    channel: str
    info: Raw = field(default_factory=Raw)
    b64info: str = ""
    data: Raw = field(default_factory=Raw)
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


class AskStats(Struct):
    node: str = ""
    """The name of one; else all are asked."""
    rows: Rows = 0


class Push(Struct):
    fd: Fd
    data: Raw = field(default_factory=Raw)


class Connections(Struct):
    user: str = ""
    node: str = ""
    topic: str = ""
    address: str = ""
    app: str = ""
    expression: str = ""
    after: Annotated[int, Meta(ge=0)] = 0
    limit: Count = 100


class OneConnection(Struct):
    fd: Fd


class ClosedOnes(Struct):
    fd: Annotated[int, Meta(ge=0)] = 0
    user: str = ""
    limit: Count = 100


class BeginTrace(Struct):
    fd: Annotated[int, Meta(ge=0)] = 0
    user: str = ""
    topic: str = ""


class ReadTrace(Struct):
    trace: str
    wait: Annotated[float, Meta(ge=0, le=MAX_WAIT)] = 0.0


class EndTrace(Struct):
    trace: str


class Batch(Struct):
    commands: list[AsSent]
    parallel: bool = False


PARAMETERS: Final[Mapping[str, type[Struct]]] = {
    "publish": Publish,
    "broadcast": Broadcast,
    "subscribe": Subscribe,
    "unsubscribe": Unsubscribe,
    "disconnect": DisconnectParams,
    "refresh": Refresh,
    "presence": Channel,
    "presence_stats": Channel,
    "history": History,
    "history_remove": Channel,
    "channels": Channels,
    "info": Info,
    "push": Push,
    "connections": Connections,
    "connection": OneConnection,
    "closed_connections": ClosedOnes,
    "trace": BeginTrace,
    "trace_read": ReadTrace,
    "trace_end": EndTrace,
    "stats": AskStats,
    "config": Info,
}
"""The methods, each with the kind of its parameters. `batch` is none of them: it holds such."""

CarryOut: TypeAlias = "Callable[[Any, Call], Awaitable[object]]"


@attrs.frozen
class ApiResponse:
    """The response of the API to one request: status, body, type."""

    status: HTTPStatus
    body: bytes
    media_type: str = "text/plain; charset=utf-8"
    headers: Mapping[str, str] = attrs.field(factory=dict)


@attrs.frozen
class _Later:
    """A method that has begun, and is answered when the engine has kept its publication."""

    wait: Callable[[], Awaitable[Any]]


class Api:
    """Answers requests under `/api` on behalf of a node."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._methods = _Methods(node).by_name()

    async def __call__(self, request: Request) -> Response:
        """One request by way of Starlette. The server in front has bounded its body."""
        method = request.path_params["method"]
        answer = self.refuse(method, shown_key(request.headers.get), peer_of(request))
        if answer is None:
            trace = request.headers.get(TAG, "")
            shown, share = shown_key(request.headers.get), self._node.new_share()
            answer = await self.answer(method, await request.body(), share, trace, shown)
        return Response(
            answer.body, answer.status, headers=answer.headers, media_type=answer.media_type
        )

    def described(
        self, description: Callable[[], object]
    ) -> Callable[[Request], Awaitable[Response]]:
        """An endpoint with a description of the API, for those who may use the API: there are names in it."""

        async def answer(request: Request) -> Response:
            name = request.url.path.rpartition("/")[2]
            refusal = self._refuse_key(name, shown_key(request.headers.get), peer_of(request))
            if refusal is not None:
                return Response(
                    *(refusal.body, refusal.status),
                    headers=refusal.headers,
                    media_type=refusal.media_type,
                )
            return Response(written(description()), media_type="application/json")

        return answer

    def refuse(self, method: str, key: str, peer: str) -> "ApiResponse | None":
        """The answer to a client that may not call `method`, or to a method that is not there; else None.

        Asked before the body is read. A wrong key is logged with the address of its peer.
        """
        refusal = self._refuse_key(method, key, peer)
        if refusal is None and method not in self._methods and method != "batch":
            text = f"No such method; known are {', '.join([*self._methods, 'batch'])}."
            return ApiResponse(HTTPStatus.NOT_FOUND, text.encode())
        return refusal

    def is_key(self, key: str) -> bool:
        """Whether this is the key. It takes as long for any of that length."""
        ours = self._node.config.api_key
        return ours is not None and hmac.compare_digest(key.encode(), ours.encode())

    def _refuse_key(self, method: str, key: str, peer: str) -> "ApiResponse | None":
        if self._node.config.api_key is None:
            text = "The HTTP API is off: set api_key, or BROKER_API_KEY, to turn it on."
            return ApiResponse(HTTPStatus.NOT_FOUND, text.encode())
        if not self.is_key(key):
            return _unauthorized(method, "wrong key" if key else "no key", peer=peer)
        return None

    def _while_key(self, key: str) -> Callable[[], bool]:
        """Tells whether this is the key still; a comparison where no settings have changed."""
        settings = self._node.services.settings
        asked, is_ours = -1, False

        def may_go_on() -> bool:
            nonlocal asked, is_ours
            if asked != settings.version:
                asked, is_ours = settings.version, self.is_key(key)
            return is_ours

        return may_go_on

    async def answer(
        self,
        method: str,
        body: bytes,
        share: Share,
        traceparent: str = "",
        key: str | None = None,
    ) -> "ApiResponse":
        """Carry out a method that `refuse` let pass, for the connection whose share of the loop it is.
        `traceparent` names the trace that its publications belong to, where they say nothing themselves, and
        `key` what it has shown; None where nobody has to show any.

        A request with little to do is done in one step. Cancelled, what was done is done; and so it is where
        a reload has changed the key, which is a 401.
        """
        call = Call(share, self._node.router.meter, self._node.config.api_reply_bytes)
        if key is not None:
            call.may_go_on = self._while_key(key)
        if self._node.router.spans is not None:
            call.traceparent = traceparent
        try:
            reading = len(body) / 1024 * READ_KILOBYTE
            await call.turn(reading)
            call.meter.add(CALL + reading)
            # A body that can be read so is JSON; any other is looked at twice, to say what is wrong.
            params = read_strictly(body, Batch if method == "batch" else PARAMETERS[method])
            if params is None:
                one_text(body)
            await call.aside(self._node.wait_room)
            if method == "batch":
                answer = await self._batch(params or body, call)
            else:
                begun = await self._answer(method, params or body, "result", call)
                answer = await call.finish(begun.wait) if isinstance(begun, _Later) else begun
        except BadJson as error:
            return ApiResponse(HTTPStatus.BAD_REQUEST, f"The body is {error}".encode())
        except KeyGone:
            return _unauthorized(method, "the key has changed")
        finally:
            call.settle()
        return ApiResponse(HTTPStatus.OK, answer, "application/json")

    def answer_now(self, body: bytes, share: Share, traceparent: str = "") -> bytes | None:
        """The answer to a plain publish, carried out in this very step; None, with nothing published, for any
        other, and where somebody has to be waited for: `answer` does it then. Never waits.

        As `answer` has it: what is read strictly it would read alike, the price is the same, and the share
        has room for all of it.
        """
        services = self._node.services
        router, publisher = services.router, services.publisher
        meter, before = router.meter, router.meter.done
        publish = read_plain(body)
        is_traced = router.spans is not None and is_sampled(traceparent)
        if publish is None or is_traced or router.engine.is_full():
            return None
        answer = None
        contents = (plain_data(publish),)
        fan_out = publisher.weigh_plainly(publish.channel, contents)
        work = COMMAND + len(body) / 1024 * READ_KILOBYTE
        if fan_out is not None and share.may_do(work + fan_out):
            try:
                last = publisher.publish_plainly(publish.channel, contents, share)
                answer = plain_results(b"result", last)[0]
            except Exception as error:  # noqa: BLE001 - it is the reply
                answer = _failure("publish", error)
            meter.done += work
        share.spend(meter.done - before)
        return answer

    def _publish_plainly(
        self, name: str, topic: str, contents: Sequence[bytes], share: Share
    ) -> list[bytes] | None:
        """The replies to plain publishes in a row, under this name, each its result or the error. None, with
        nothing published, where somebody has to be waited for."""
        try:
            return _plain_results(self._node, name, topic, contents, share)
        except Exception as error:  # noqa: BLE001 - it is the reply
            return [_failure("publish", error)] * len(contents)

    async def _batch(self, params: Struct | bytes, call: Call) -> bytes:
        try:
            batch = _decode(params, Batch) if isinstance(params, bytes) else params
        except Refused as refusal:
            return written(error_of(refusal))
        assert isinstance(batch, Batch)
        if len(batch.commands) > MAX_COMMANDS:
            text = f"a batch has at most {MAX_COMMANDS} commands"
            return written(error_of(Refused(ErrorCode.LIMIT_EXCEEDED, text)))
        replies: list[bytes] = []
        begun: list[bytes | _Later] = []

        async def settle() -> None:
            for each in begun:
                reply = await call.finish(each.wait) if isinstance(each, _Later) else each
                replies.append(reply)
                call.room -= len(reply)
            begun.clear()

        row: Row | None = None
        takes_rows = not is_sampled(call.traceparent)
        for command in map(bytes, batch.commands):
            publish = read_plain_command(command) if takes_rows else None
            if row is not None and (publish is None or not row.takes(publish)):
                begun += await self._row(row, call)
                row = None
            if publish is not None:
                row = row or Row(publish.channel)
                row.add(publish)
                continue
            publishes = command.lstrip(b" \t\r\n{").startswith((b'"publish"', b'"broadcast"'))
            if not publishes:
                await settle()
            begun.append(await self._command(command, call))
            if not publishes:
                await settle()
        if row is not None:
            begun += await self._row(row, call)
        await settle()
        # Without a `result` around it, and each reply under its method's name: as Centrifugo.
        return b'{"replies":[%b]}' % b",".join(replies)

    async def _row(self, row: Row, call: Call) -> Sequence[bytes | _Later]:
        """Carry out a row, in one step if that may be; else each as a command by itself."""
        await call.turn(self._node.router.weigh(row.topic) + row.work)
        replies = self._publish_plainly("publish", row.topic, row.contents, call.share)
        if replies is not None:
            call.meter.add(COMMAND + len(replies) * BATCHED)
            return replies
        begun: list[bytes | _Later] = []
        for publish in row.publishes:
            await call.turn()
            call.meter.add(COMMAND)
            begun.append(await self._answer("publish", publish, "publish", call))
        return begun

    async def _command(self, command: bytes, call: Call) -> bytes | _Later:
        await call.turn()
        call.meter.add(COMMAND)
        try:
            method, params = _method_of(command)
            if method not in self._methods:
                raise Refused(ErrorCode.METHOD_NOT_FOUND)
        except Refused as refusal:
            return written(error_of(refusal))
        return await self._answer(method, params, method, call)

    async def _answer(
        self, method: str, params: Struct | bytes, name: str, call: Call
    ) -> bytes | _Later:
        """The result under this name, or the error; or `_Later` for one of them."""
        try:
            if isinstance(params, bytes):
                params = _decode(params, PARAMETERS[method])
            result = await self._methods[method](params, call)
            if isinstance(result, _Later):
                return _Later(partial(self._finish, method, name, result))
            return written({name: result})
        except KeyGone:
            raise
        except Exception as error:  # noqa: BLE001 - it is the reply
            return _failure(method, error)

    async def _finish(self, method: str, name: str, later: _Later) -> bytes:
        try:
            return written({name: await later.wait()})
        except Exception as error:  # noqa: BLE001 - it is the reply
            return _failure(method, error)


class _Methods:
    """The methods of the API. Each waits for its turns by its `Call`, and decides anew in each."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def by_name(self) -> dict[str, CarryOut]:
        """The function that carries out each method; the type of its parameters is in `PARAMETERS`."""
        return {
            "publish": self._publish,
            "broadcast": self._broadcast,
            "subscribe": self._subscribe,
            "unsubscribe": self._unsubscribe,
            "disconnect": self._disconnect,
            "refresh": self._refresh,
            "presence": self._presence,
            "presence_stats": self._presence_stats,
            "history": self._history,
            "history_remove": self._history_remove,
            "channels": self._channels,
            "info": self._info,
            "push": self._push,
            "connections": self._connections,
            "connection": self._connection,
            "closed_connections": self._closed,
            **_Inspection(self._node).by_name(),
        }

    # publications

    async def _publish(self, params: Publish, call: Call) -> object:
        data, options = publication_of(params, call.traceparent)
        await call.turn(self._node.router.weigh(params.channel))
        publishing = self._node.publish_soon(params.channel, data, options)
        if publishing.result is None:
            return _Later(partial(result_later, publishing, params))
        return result_of(publishing.result, params)

    async def _broadcast(self, params: Broadcast, call: Call) -> object:
        data, options = publication_of(params, call.traceparent)
        is_plain = params.is_plain and not is_sampled(call.traceparent)
        begun: list[Publishing | bytes] = []
        is_kept = True
        for channel in params.channels:
            await call.turn(self._node.router.weigh(channel))
            try:
                results = None
                if is_plain:
                    results = _plain_results(self._node, "result", channel, (data,), call.share)
                if results is not None:
                    call.meter.add(COMMAND)
                    begun += results
                    continue
                publishing = self._node.publish_soon(channel, data, options)
            except Refused as refusal:
                call.meter.add(COMMAND)
                begun.append(written(error_of(refusal)))
                continue
            if publishing.result is None:
                is_kept = False
                begun.append(publishing)
            else:
                begun.append(response_of(publishing, params))
        wait = partial(responses_later, begun, params)
        return await wait() if is_kept else _Later(wait)

    # connections of a user, one by one

    async def _subscribe(self, params: Subscribe, call: Call) -> object:
        if params.recover_since:
            text = "subscribe cannot recover: leave recover_since out, and read history"
            raise Refused(ErrorCode.NOT_AVAILABLE, text)
        if params.override:
            text = "subscribe goes by the topic's rules: leave override out"
            raise Refused(ErrorCode.NOT_AVAILABLE, text)
        info = payload("info", params.info, params.b64info, needed=False)
        data = payload("data", params.data, params.b64data, needed=False)
        sub = ServerSub(
            None if info is None else to_json(info), None if data is None else to_json(data)
        )
        await self._each(
            params,
            call,
            lambda fd: self._node.add_subscription(fd, params.channel, sub),
            lambda fds: mail.Subscribe(
                fds, params.channel, sub.info, sub.data, sub.join_leave, params.user
            ),
        )
        return {}

    async def _unsubscribe(self, params: Unsubscribe, call: Call) -> object:
        reason = UnsubscribeCode.SERVER, "server unsubscribe"
        await self._each(
            params,
            call,
            lambda fd: self._node.end_subscription(fd, params.channel, *reason),
            lambda fds: mail.Unsubscribe(fds, params.channel, *reason, params.user),
        )
        return {}

    async def _disconnect(self, params: DisconnectParams, call: Call) -> object:
        order = params.disconnect or DisconnectOrder()
        try:
            check_close_code(order.code)
        except ValueError as error:
            raise Refused(ErrorCode.BAD_REQUEST, str(error)) from None

        spared = frozenset(params.whitelist)
        call.meter.add(len(spared) * SPARED)

        def close(fd: Fd) -> None:
            if str(fd) not in spared:
                call.meter.add(ENDING)
                self._node.disconnect(fd, order.code, order.reason)

        def closing(fds: list[Fd]) -> ForFds:
            left = [fd for fd in fds if str(fd) not in spared]
            return mail.Disconnect(left, order.code, order.reason, params.user)

        await self._each(params, call, close, closing)
        return {}

    async def _refresh(self, params: Refresh, call: Call) -> object:
        def refresh(fd: Fd) -> None:
            if params.expired:
                call.meter.add(ENDING)
                self._node.disconnect(fd, CloseCode.EXPIRED, "expired")
            else:
                self._node.expire(fd, params.expire_at or None)

        def refreshing(fds: list[Fd]) -> ForFds:
            if params.expired:
                return mail.Disconnect(fds, CloseCode.EXPIRED, "expired", params.user)
            return mail.Expire(fds, params.expire_at or None, params.user)

        await self._each(params, call, refresh, refreshing)
        return {}

    async def _each(
        self,
        target: _Target,
        call: Call,
        act: Callable[[Fd], object],
        order: Callable[[list[Fd]], ForFds],
    ) -> None:
        """Do something to each connection of a target that is there when its turn comes; and have other
        nodes do it to theirs, by this `order`, some at a time."""
        everywhere = self._node.everywhere
        named = {name for name in (target.client, target.session) if name}
        if target.user:
            fds = await call.aside(partial(everywhere.fds_of, target.user))
        elif named:
            fds = [int(name) for name in named if _FD.fullmatch(name)]
        else:
            raise Refused(ErrorCode.BAD_REQUEST, "user is missing, and so are client and session")
        elsewhere: dict[str, list[Fd]] = {}
        for fd in fds:
            await call.turn()
            call.meter.add(LOOKED)
            node = everywhere.node_of(fd)
            if not named <= {str(fd)}:
                continue
            if node is not None:
                elsewhere.setdefault(node, []).append(fd)
                continue
            call.meter.add(COMMAND)
            peer = self._node.router.hub.sessions.get(fd)
            if peer is not None and target.user in ("", peer.user):
                act(fd)
        for theirs in elsewhere.values():
            for piece in pieces(theirs):
                await call.turn()
                await call.finish(partial(everywhere.order, piece, order))

    # topics

    async def _presence(self, params: Channel, call: Call) -> object:
        everywhere, found = self._node.everywhere, Listing(call.room)
        here: Sequence[Subscription | ClientInfo]
        if everywhere.neighbourhood is None:
            here = self._node.router.hub.subscriptions(params.channel)
        else:
            read = await call.aside(partial(everywhere.presence, params.channel))
            here = list(read.values())
        for piece in pieces(here):
            await call.turn(len(piece) * MEMBER)
            call.meter.add(len(piece) * MEMBER)
            for each in piece:
                info = each.info if isinstance(each, Subscription) else each
                if info is not None:
                    found.add(member(info.client, _client_info(info)))
        return {"presence": found.as_object()}

    async def _presence_stats(self, params: Channel, call: Call) -> object:
        everywhere = self._node.everywhere
        if everywhere.neighbourhood is None:
            clients, users = presence_counts(self._node.router, params.channel)
        else:
            clients, users = await call.aside(partial(everywhere.presence_stats, params.channel))
        return {"num_clients": clients, "num_users": users}

    async def _history(self, params: History, call: Call) -> object:
        since = None
        if params.since is not None:
            since = Position(params.since.offset, params.since.epoch)
        engine = self._node.router.engine
        if not engine.knows(params.channel, since):
            await call.aside(partial(engine.fetch, (params.channel,), {params.channel: since}))
        try:
            publications, top = history_page(
                self._node.router, params.channel, since, params.limit, params.reverse
            )
        except UnrecoverablePosition:
            raise Refused(ErrorCode.UNRECOVERABLE_POSITION) from None
        listed = Listing(call.room)
        for publication in publications:
            work = listing_work((publication,))
            await call.turn(work)
            call.meter.add(work)
            listed.add(written(_publication(publication)))
        return {"publications": listed.as_list(), "offset": top.offset, "epoch": top.epoch}

    async def _history_remove(self, params: Channel, call: Call) -> object:
        await call.finish(partial(self._node.remove_history, params.channel))
        return {}

    async def _channels(self, params: Channels, call: Call) -> object:
        globs = [re.compile(translate(glob)).match for glob in _alternatives(params.pattern or "*")]
        found = Listing(call.room)
        everywhere = self._node.everywhere
        named: Sequence[Listeners | tuple[str, int]] = self._node.router.hub.named()
        if everywhere.neighbourhood is not None:
            named = list((await call.aside(everywhere.topics)).items())
        for piece in pieces(named):
            work = len(piece) * len(globs) * NAMED
            await call.turn(work)
            call.meter.add(work)
            for each in piece:
                name, count = each if isinstance(each, tuple) else (each.name, len(each))
                if count and any(matches(name) for matches in globs):
                    found.add(member(name, {"num_clients": count}))
        return {"channels": found.as_object()}

    async def _info(self, params: Info, call: Call) -> object:
        reports = await call.aside(self._node.everywhere.nodes)
        call.meter.add(REPORT)
        return {"nodes": [_node_info(report) for report in reports]}

    # connections by fd

    async def _push(self, params: Push, call: Call) -> object:
        return {"status": self._node.push(params.fd, payload("data", params.data, ""))}

    async def _connections(self, params: Connections, call: Call) -> object:
        if params.expression:
            raise Refused(ErrorCode.NOT_AVAILABLE, "connections cannot be asked by expression")
        if self._node.everywhere.neighbourhood is not None:
            return await self._all_connections(params, call)
        if params.node not in ("", self._node.name):
            raise Refused(ErrorCode.BAD_REQUEST, f"no node is named {params.node!r}")
        # The result holds after this event: changes while it is written may be in it or not.
        events = self._node.figures.webhooks
        found = Listing(call.room)
        query = ConnectionQuery(params.after, params.user, params.topic, params.address, params.app)
        walk = self._node.search(query)
        await call.turn(SURVEYED_AT_ONCE * NAMED)
        while (fds := next(walk, None)) is not None:
            call.meter.add(SURVEYED_AT_ONCE * NAMED)
            if not await self._list(fds, found, params.limit, call):
                break
            await call.turn(SURVEYED_AT_ONCE * NAMED)
        result: dict[str, object] = {"connections": found.as_object()}
        if events is not None:
            result |= {"node": events.node, "epoch": events.epoch, "seq": events.seq}
        return result

    async def _all_connections(self, params: Connections, call: Call) -> object:
        """The same of several nodes."""
        query = ConnectionQuery(params.after, params.user, params.topic, params.address, params.app)
        ask = partial(self._node.everywhere.connections, query, params.limit, params.node)
        listed = await call.aside(ask)
        found = Listing(call.room)
        for details in listed.connections:
            await call.turn(SHOWN)
            call.meter.add(SHOWN + len(details.topics) * NAMED)
            shown = member(str(details.fd), _connection_details(details))
            if found and not found.fits(shown):
                break
            found.add(shown)
        result: dict[str, object] = {"connections": found.as_object()}
        told = {name: mark for name, mark in listed.marks.items() if mark.epoch}
        if told:
            result["nodes"] = {
                name: {"epoch": mark.epoch, "seq": mark.seq} for name, mark in told.items()
            }
        if params.node in told:
            mark = told[params.node]
            result |= {"node": params.node, "epoch": mark.epoch, "seq": mark.seq}
        return result

    async def _list(self, fds: Sequence[Fd], found: Listing, limit: int, call: Call) -> bool:
        """Put these connections on a list; false if that is full."""
        for fd in fds:
            await call.turn(DETAILS)
            details = self._node.connection_details(fd)
            if details is None:
                continue
            call.meter.add(DETAILS + len(details.topics) * NAMED)
            shown = member(str(fd), _connection_details(details))
            if found and not found.fits(shown):
                return False
            found.add(shown)
            if len(found) == limit:
                return False
        return True

    async def _connection(self, params: OneConnection, call: Call) -> object:
        find = partial(self._node.everywhere.connection_details, params.fd)
        details = await call.aside(find)
        if details is None:
            raise Refused(ErrorCode.UNKNOWN_CHANNEL, f"no connection has fd {params.fd}")
        call.meter.add(DETAILS + len(details.topics) * NAMED)
        return _connection_details(details)

    async def _closed(self, params: ClosedOnes, call: Call) -> object:
        inspection = self._node.inspection
        listed = Listing(call.room)
        ask = partial(inspection.closed, params.fd, params.user, params.limit)
        call.meter.add(len(self._node.services.closed) * NAMED)
        for closed in await call.aside(ask):
            await call.turn(DETAILS)
            call.meter.add(DETAILS + len(closed.details.topics) * NAMED)
            listed.add(written(_closed_connection(closed)))
        return {"connections": listed.as_list()}


class _Inspection:
    """The methods by which a person looks inside: traces, what has been counted, the settings."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def by_name(self) -> dict[str, CarryOut]:
        return {
            "trace": self._trace,
            "trace_read": self._trace_read,
            "trace_end": self._trace_end,
            "stats": self._stats,
            "config": self._config,
        }

    async def _trace(self, params: BeginTrace, call: Call) -> object:
        if sum(map(bool, (params.fd, params.user, params.topic))) != 1:
            raise Refused(ErrorCode.BAD_REQUEST, "give one of fd, user and topic")
        call.meter.add(SUBSCRIPTION)
        target = Target(params.fd, params.user, params.topic)
        begin = partial(self._node.inspection.begin, target)
        return {"trace": await call.finish(begin)}

    async def _trace_read(self, params: ReadTrace, call: Call) -> object:
        read = await call.aside(partial(self._node.inspection.read, params.trace, params.wait))
        call.meter.add(len(read.entries) * LISTED)
        return {"entries": read.entries, "missed": read.missed, "ended": read.has_ended}

    async def _trace_end(self, params: EndTrace, call: Call) -> object:
        await call.finish(partial(self._node.inspection.end, params.trace))
        return {}

    async def _stats(self, params: AskStats, call: Call) -> object:
        views = self._node.views
        ids = [each.id for each in views.nodes() if params.node in ("", each.name)]
        if not ids:
            raise Refused(ErrorCode.BAD_REQUEST, f"no node is named {params.node!r}")
        seen = await call.aside(partial(views.of_all, VIEW, {"rows": params.rows}, ids))
        call.meter.add(FIGURES)
        return whole(seen, params.rows)

    async def _config(self, params: Info, call: Call) -> object:
        settings = effective(self._node.config, self._node.services.settings.sources)
        call.meter.add(len(settings) * SETTING)
        return {"settings": [attrs.asdict(setting) for setting in settings]}


def _unauthorized(method: str, reason: str, **about: str) -> ApiResponse:
    log.warning("api_key_refused", method=method, reason=reason, **about)
    text = "Wrong or missing API key: send it as X-API-Key."
    headers = {"WWW-Authenticate": "apikey"}
    return ApiResponse(HTTPStatus.UNAUTHORIZED, text.encode(), headers=headers)


def shown_key(header: Callable[[str], str | None]) -> str:
    """The key that a request shows, "" if none; `header` looks one up by its lower-case name."""
    key = header("x-api-key")
    if key is not None:
        return key
    scheme, _, key = (header("authorization") or "").partition(" ")
    return key.strip() if scheme.lower() == "apikey" else ""


def peer_of(request: Request) -> str:
    if request.client is None:
        return "unix"
    host, port = request.client
    if not port:  # a proxy has told the address, which as a rule is all that it tells
        return host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _plain_results(
    node: Node, name: str, topic: str, contents: Sequence[bytes], share: Share
) -> list[bytes] | None:
    """Publish plain publications in a row, in one step, for the party whose share it is; their results under
    this name. None, with nothing published, where they have to wait for somebody. Raises `Refused`."""
    publisher = node.services.publisher
    if publisher.weigh_plainly(topic, contents) is None:
        return None
    last = publisher.publish_plainly(topic, contents, share)
    return plain_results(name.encode(), last, len(contents))


def _decode(params: bytes, kind: type[S]) -> S:
    """Parameters as a struct. Raises `Refused`, and names the one that is wrong."""
    try:
        return read(params, kind)
    except BadJson as error:
        raise Refused(ErrorCode.BAD_REQUEST, str(error)) from None


def _method_of(command: bytes) -> tuple[str, bytes]:
    """The method of a command of a batch, and its parameters. Raises `Refused` (107)."""
    try:
        members = read_members(command)
    except BadJson as error:
        raise Refused(ErrorCode.BAD_REQUEST, str(error)) from None
    if len(members) != 1:
        raise Refused(ErrorCode.BAD_REQUEST, "a command has exactly one method")
    ((method, params),) = members.items()
    return method, bytes(params)


def _failure(method: str, error: Exception) -> bytes:
    """The reply to a method that has raised."""
    if isinstance(error, Refused):
        return written(error_of(error))
    log.error("api_failed", method=method, exc_info=error)
    return written(error_of(Refused(ErrorCode.INTERNAL)))


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


def _client_info(info: ClientInfo) -> object:
    shown: dict[str, object] = {"client": info.client, "user": info.user}
    for name in ("conn_info", "chan_info"):
        raw = getattr(info, name)
        if raw is not None:
            shown[name] = Raw(raw)
    return shown


def _publication(publication: Publication) -> object:
    data = CENTRIFUGE_JSON.payload(publication)
    shown: dict[str, object] = {"data": data, "offset": publication.offset}
    if publication.tags:
        shown["tags"] = publication.tags
    if publication.info is not None:
        shown["info"] = _client_info(publication.info)
    return shown


def _connection_details(details: ConnectionDetails) -> dict[str, object]:
    """As Centrifugo PRO has it, with what we know besides."""
    shown = attrs.asdict(details)
    if not details.node:
        del shown["node"]
    shown["protocol"] = details.protocol.removeprefix("centrifuge-")
    return shown


def _closed_connection(closed: ClosedConnection) -> dict[str, object]:
    close = {**attrs.asdict(closed.close), "initiator": closed.close.initiator.value}
    ended = {"closed_at": closed.closed_at, "topic_count": closed.topic_count}
    return {**_connection_details(closed.details), **close, **ended}


def _node_info(report: NodeReport) -> object:
    """As Centrifugo has it; what it lacks is whether the node has answered."""
    return {
        "uid": report.name,
        "name": "trio-broker",
        "version": report.version,
        "alive": report.alive,
        "num_clients": report.connections,
        "num_users": report.users,
        "num_subs": report.subscriptions,
        "num_channels": report.topics,
        "uptime": int(report.uptime),
        # Counted since the start, so that is the interval.
        "metrics": {
            "interval": report.uptime,
            "items": {
                "messages_published": report.messages_published,
                "messages_delivered": report.messages_delivered,
                "connections_refused": report.connections_refused,
                "history_publications_evicted": report.history_publications_evicted,
            },
        },
    }
