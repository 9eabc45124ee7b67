"""What the broker itself does for those who ask for more than a plain publish.

One place for three doors: methods of `Broker`, the HTTP API, and rpc methods of clients, which come
before the app's `on_rpc`:

=========  ======================================================  =================================
method     asks with                                               answered with
=========  ======================================================  =================================
publish    topic, data, echo, exclude, report, key, retain         {}, or the report
request    to, data, seconds                                       what the other client answered
reply      reply_to, and data or error {code, message}             {}
will       topic, data; without a topic: no will any more          {}
=========  ======================================================  =================================
"""

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Final, Protocol

import attrs
import msgspec
import trio
from msgspec import Meta, Raw, Struct

from broker.core.idempotency import MAX_KEY_BYTES, IdempotentResults
from broker.core.messages import ClientInfo, Close, Delivery, Fd, Initiator
from broker.core.shares import owner_of, text_bytes
from broker.errors import ErrorCode, Refused
from broker.protocols.json_text import one_line, to_json
from broker.routing.publishing import publish_apart
from broker.routing.requests import Requests
from broker.routing.router import Router

_ABSENT: Final = Raw(b"")

GOODBYES: Final = (1000, 1005)
"""Codes of a client that means to go: 1005 is a Close frame without a code, which is what a browser's
`close()` sends."""


class Caller(Protocol):
    """The client behind an rpc."""

    @property
    def fd(self) -> Fd: ...
    @property
    def info(self) -> ClientInfo: ...

    async def authorize(self, topic: str, data: bytes) -> bytes:
        """What may be published in place of `data`. Raises `Refused` or `Disconnect`."""

    def answer(self, result: bytes | Refused) -> None:
        """Answer the rpc, later."""


class PublishParams(Struct, forbid_unknown_fields=True):
    topic: str
    data: Raw = _ABSENT
    echo: bool = True
    exclude: list[Fd] = []
    report: bool = False
    key: str = ""
    retain: bool = False


class RequestParams(Struct, forbid_unknown_fields=True):
    to: str
    data: Raw = _ABSENT
    seconds: Annotated[float, Meta(gt=0, le=60)] = 10.0
    """As long as a person waits; a minute is what most proxies wait."""


class ReplyError(Struct):
    code: Annotated[int, Meta(ge=100, le=4_999)]
    message: str = ""


class ReplyParams(Struct, forbid_unknown_fields=True):
    reply_to: str
    data: Raw = _ABSENT
    error: ReplyError | None = None


class WillParams(Struct, forbid_unknown_fields=True):
    topic: str = ""
    data: Raw = _ABSENT


@attrs.define(eq=False)
class Methods:
    """See the module."""

    router: Router
    requests: Requests = attrs.field(init=False)
    _done: IdempotentResults[Delivery] = attrs.field(init=False, factory=IdempotentResults)
    _wills: dict[Fd, tuple[str, bytes, ClientInfo]] = attrs.field(init=False, factory=dict)

    def __attrs_post_init__(self) -> None:
        self.requests = Requests(self.router)

    def publish(
        self,
        topic: str,
        data: bytes,
        info: ClientInfo | None = None,
        *,
        tags: Mapping[str, str] | None = None,
        opaque: bool = False,
        exclude: Collection[Fd] = (),
        skip_history: bool = False,
        retain: bool = False,
        key: str = "",
    ) -> Delivery:
        """Publish, as `publish_apart` says.

        A second publish with the same `key`, by the same user to the same topic within five
        minutes, publishes nothing and gets the report of the first. Of a client without a user the
        connection counts instead.
        """
        now = trio.current_time()
        owner = owner_of(info)
        if key:
            if len(key.encode("utf-8", "replace")) > MAX_KEY_BYTES:
                limit = f"key: more than {MAX_KEY_BYTES} bytes"
                raise Refused(ErrorCode.BAD_REQUEST, limit)
            done = self._done.get(owner, (topic, key), now)
            if done is not None:
                return done
        delivery = publish_apart(
            self.router,
            topic,
            data,
            info,
            tags=tags,
            opaque=opaque,
            exclude=exclude,
            skip_history=skip_history,
            retain=retain,
        )
        if key:
            # An fd takes 36 bytes: a number and its place in the tuple.
            size = text_bytes(topic) + text_bytes(key) + 36 * len(delivery.failed)
            self._done.keep(owner, (topic, key), delivery, now, size)
        return delivery

    def end(self, fd: Fd, close: Close) -> None:
        """A connection has ended: its will is published, unless it said goodbye, and who waits for
        its answers learns that there will be none."""
        self.requests.leave(fd)
        self._done.forget(fd)
        topic, data, info = self._wills.pop(fd, ("", b"", None))
        if topic and not (close.initiator is Initiator.CLIENT and close.code in GOODBYES):
            try:
                self.router.publish(topic, data, info)
            except Refused:
                pass  # for an fd or a user that has gone by now
            else:
                self.router.flush()

    # of clients

    async def call(self, caller: Caller, method: str, params: bytes) -> bytes | None:
        """Carry out an rpc of `RPC`; None if it will be answered later, by `caller.answer`.

        Waits only for the app's `on_publish`. Raises `Refused`.
        """
        kind, carry_out = RPC[method]
        try:
            asked: Any = msgspec.json.decode(params or b"{}", type=kind)
        except (msgspec.DecodeError, RecursionError) as error:
            raise Refused(ErrorCode.BAD_REQUEST, f"{method}: {error}") from None
        answer: bytes | None = await carry_out(self, caller, asked)
        return answer

    async def _publish(self, caller: Caller, params: PublishParams) -> bytes:
        data = await caller.authorize(params.topic, _line(params.data))
        delivery = self.publish(
            params.topic,
            data,
            caller.info,
            exclude=params.exclude if params.echo else [*params.exclude, caller.fd],
            retain=params.retain,
            key=params.key,
        )
        return to_json(report(delivery)) if params.report else b"{}"

    async def _request(self, caller: Caller, params: RequestParams) -> None:
        data = await caller.authorize(params.to, _line(params.data))
        due = trio.current_time() + params.seconds
        self.requests.ask(params.to, data, caller.info, caller.answer, asker=caller.fd, due=due)

    async def _reply(self, caller: Caller, params: ReplyParams) -> bytes:
        if not (params.reply_to.isascii() and params.reply_to.isdigit()):
            raise Refused(ErrorCode.BAD_REQUEST, "reply: reply_to is a tag of the request")
        answer: bytes | Refused
        if params.error is not None:
            answer = Refused(params.error.code, params.error.message)
        else:
            answer = _line(params.data)
        self.requests.reply(caller.fd, int(params.reply_to[:18]), answer)
        return b"{}"

    async def _will(self, caller: Caller, params: WillParams) -> bytes:
        if params.topic:
            data = await caller.authorize(params.topic, _line(params.data))
            self._wills[caller.fd] = params.topic, data, caller.info
        else:
            self._wills.pop(caller.fd, None)
        return b"{}"


RPC: Final[dict[str, tuple[type[Struct], Any]]] = {
    "publish": (PublishParams, Methods._publish),
    "request": (RequestParams, Methods._request),
    "reply": (ReplyParams, Methods._reply),
    "will": (WillParams, Methods._will),
}


def report(delivery: Delivery) -> dict[str, object]:
    """What became of a publication, as the wire has it."""
    return {
        "matched": delivery.matched,
        "queued": delivery.queued,
        "dropped": delivery.dropped,
        "failed": delivery.failed,
    }


def _line(data: Raw) -> bytes:
    if not data:
        raise Refused(ErrorCode.BAD_REQUEST, "data is missing")
    return one_line(bytes(data))
