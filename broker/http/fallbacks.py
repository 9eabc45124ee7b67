"""Clients without WebSocket: they get one long response, and send their commands by requests.

A request for a stream becomes a `Connection` like any other, on an `HttpStream`, which carries in
HTTP what it writes. So each rule that holds for a WebSocket, from the bounds of the outbox to the codes of the end,
holds here by being the same. The paths and shapes are those of the official JavaScript SDK.

Rule 1  The app's `on_request` is not asked: these are connections, of which `on_open` tells.
Rule 2  Clients that may connect are those that may open a WebSocket: the same origins, with CORS to say so.
Rule 3  A GET carries `connect` and nothing else. A page can make a browser ask for any URL without
        saying where the request comes from, and must not publish by that.
Rule 4  A session is 128 random bits that only its client was told; `/emulation` reaches that one.
"""

import re
from collections.abc import Awaitable, Callable
from email.utils import formatdate
from hmac import compare_digest
from secrets import token_urlsafe
from typing import Final
from urllib.parse import parse_qs

import attrs
import msgspec
import trio

from broker.core.json_reader import MAX_MEMBERS, BadJson, members, one_text, read
from broker.core.memory import Holding, Part
from broker.core.messages import ONE_WAY, Position, Transport
from broker.core.work import PART, READ_KILOBYTE, READ_OBJECT
from broker.errors import HeadError
from broker.http.access_log import Exchange
from broker.http.event_ids import Positions
from broker.http.server import REQUEST_SECONDS
from broker.http.streams import CONNECT_ID, HttpStream, ProtobufStream, SseStream, UniSseStream
from broker.protocols.centrifuge_json import CENTRIFUGE_JSON
from broker.protocols.centrifuge_protobuf import CENTRIFUGE_PROTOBUF, read_emulation
from broker.protocols.codec import Codec, steps_of
from broker.protocols.commands import BadCommand, ConnectRequest, FaultyCommand, Unread
from broker.protocols.json_text import to_json
from broker.session.accept import ask_welcome, check_page, check_welcome
from broker.session.connection import Connection
from broker.session.handshake import Welcome
from broker.session.memory import hold_request
from broker.session.services import Services
from broker.transport.head import Head, Request, refusal
from broker.transport.sockets import answer_and_linger

EMULATION: Final = "/emulation"

STREAMS: Final[dict[str, Transport]] = {
    "/connection/http_stream": "http_stream",
    "/connection/sse": "sse",
    "/connection/uni_sse": "uni_sse",
}

PREFLIGHT_SECONDS = 7200
"""How long a browser may remember that a page may ask: as long as Chromium does at most."""

PROTOBUF: Final = "application/octet-stream"
JSON: Final = frozenset(
    {
        *("", "application/json", "application/x-ndjson", "text/plain"),
        "application/x-www-form-urlencoded",  # `curl -d` says so of anything
    }
)
"""The media types of bodies, as the official SDKs have them, and of what says nothing better."""

FREE_WORK: Final = 50.0
"""µs of decoding for which nobody waits for a turn: as long as a turn takes to come."""

_SESSION = re.compile(r"([0-9]{1,18})\.(.+)")


class HttpConnection(Connection):
    """A client without WebSocket, as hooks see it. `message` is the first that it sends, and `answer`
    the head of the response that its stream is; `welcome` is what the app has said."""

    __slots__ = ("_line", "_secret")

    def __init__(
        self,
        services: Services,
        line: HttpStream,
        head: Head,
        message: bytes,
        address: str,
        transport: Transport,
        answer: bytes,
        welcome: Welcome,
    ) -> None:
        behind = line.client_frame(message)
        super().__init__(
            services,
            line,
            head,
            behind,
            address,
            transport=transport,
            answer=answer,
            welcome=welcome,
        )
        self.subprotocol: str = line.codec.name
        line.connection, line.holding = self, self.holding
        self._line = line
        self._secret = token_urlsafe(16)

    @property
    def is_one_way(self) -> bool:
        return self.transport in ONE_WAY

    @property
    def answers_pings(self) -> bool:
        # Nobody answers a WebSocket's Ping here, which is what there is before `connect`.
        return not self.is_one_way and self.orders.codec is not None

    def connect_fields(self) -> dict[str, object]:
        if self.is_one_way:
            return {"pong": False}
        return {"session": f"{self.fd}.{self._secret}", "node": self._services.name}

    def is_session(self, secret: str) -> bool:
        """Whether this is the second half of the session that its client was told."""
        return compare_digest(self._secret.encode(), secret.encode())

    async def deliver(self, message: bytes) -> bool:
        """Take a message that came by another request; false if it is too late for any.

        Waits while the session has too much to do, and no longer than it is there. Raises `HeadError`
        (503) where too much waits already.
        """
        if not self.is_established:
            return False
        if reason := self.holding.refusal(len(message)):
            raise HeadError(503, reason)
        self.holding.charge(Part.INCOMING, len(message))
        try:
            return await self._line.deliver(message)
        finally:
            self.holding.charge(Part.INCOMING, -len(message))


class _Emulated(msgspec.Struct):
    """The body of a request to `/emulation` in JSON; `data` is one message."""

    session: str
    data: str


class _OneWay(msgspec.Struct):
    subs: dict[str, dict[str, msgspec.Raw]] = {}


class Fallbacks:
    """Serves the paths above; `http` gets what is for others, and returns a request that is for none
    of those it serves."""

    def __init__(
        self, http: Callable[[trio.abc.Stream, Request], Awaitable[Request | None]]
    ) -> None:
        self._http = http

    async def serve(
        self, services: Services, stream: trio.abc.Stream, request: Request, address: str
    ) -> Connection | Request | None:
        """See to one request; a connection where it opens one, that the caller runs, or the next
        request on this stream, which may be for any.

        Raises `HeadError` for a request that is not acceptable, and what the stream raises.
        """
        head = request.head
        if not services.config.fallbacks or head.route not in (EMULATION, *STREAMS):
            return await self._http(stream, request)
        check_page(services, head)
        cors = _cors(head)
        exchange = Exchange.begin(head, address, is_logged=services.config.access_log)
        try:
            answering = _Request(services, stream, head, request.behind, cors, address, exchange)
            if head.method == "OPTIONS":
                await answering.answer_preflight()
            elif head.route == EMULATION:
                await answering.emulate()
            else:
                return await answering.open()
        except HeadError as error:
            # A page may not even see the status of an answer without these.
            error.headers = (*error.headers, *cors)
            exchange.note_sent(refusal(error.status, error.reason, error.headers))
            raise
        finally:
            if exchange.status:  # else it is a connection, or nobody is there any more
                exchange.end()
        return None


@attrs.frozen
class _Request:
    """One request to one of the paths here, from an origin that may."""

    services: Services
    stream: trio.abc.Stream
    head: Head
    behind: bytes
    cors: tuple[tuple[str, str], ...]
    address: str
    exchange: Exchange

    async def answer_preflight(self) -> None:
        """Say what a page of another origin may ask."""
        await self._answer(
            ("Access-Control-Allow-Methods", "GET, POST"),
            ("Access-Control-Allow-Headers", "Content-Type, Last-Event-ID"),
            ("Access-Control-Max-Age", str(PREFLIGHT_SECONDS)),
        )

    async def emulate(self) -> None:
        """Hand a message to the session that it names; answered when that has taken it."""
        self._check_method("POST")
        await self._hand_over(self._codec())
        await self._answer()

    async def _hand_over(self, codec: Codec) -> None:
        # In JSON a message grows by its quotes and backslashes: to twice its size at most.
        limit = 2 * self.services.config.max_message_bytes + 1024
        # The body itself is not kept while the message waits to be taken.
        session, message = _emulated(codec, await self._body(limit))
        self._checked(message)
        connection = self._find(session)
        if connection is not None and connection.subprotocol != codec.name:
            raise HeadError(415, f"this session speaks {connection.subprotocol}")
        if connection is None or not await connection.deliver(message):
            raise HeadError(404, "no such session: connect again")

    async def open(self) -> Connection:
        """Make the connection that this request asks for."""
        services, head = self.services, self.head
        transport = STREAMS[head.route]
        self._check_method(*(["POST"] if transport == "http_stream" else ["GET", "POST"]))
        check_welcome(services, head)
        fetched_for = head.header("sec-fetch-site")
        if head.origin is None and fetched_for in ("cross-site", "same-site"):
            # An image or a frame of another page; only a browser sends this.
            raise HeadError(403, "asked for by a page of another site")
        codec = self._codec() if head.method == "POST" else CENTRIFUGE_JSON
        if codec is not CENTRIFUGE_JSON and transport != "http_stream":
            raise HeadError(415, "events are text: for protobuf there is /connection/http_stream")
        line: HttpStream
        if transport == "uni_sse":
            positions = Positions.read(head.header("last-event-id") or "")
            first, subs = await self._one_way(positions)
            line = UniSseStream(self.stream, subs, positions)
        else:
            first = await self._first_message(codec)
            if transport == "sse":
                line = SseStream(self.stream)
            else:
                line = (HttpStream if codec is CENTRIFUGE_JSON else ProtobufStream)(self.stream)
        message = self._checked(first)
        welcome = await ask_welcome(services, head, self.address, transport, len(message))
        answer = self._accept(line, welcome)
        return HttpConnection(
            services, line, head, message, self.address, transport, answer, welcome
        )

    # requests

    def _check_method(self, *allowed: str) -> None:
        if self.head.method not in allowed:
            raise HeadError(
                405,
                f"{self.head.path} is asked with {' or '.join(allowed)}",
                [("Allow", ", ".join([*allowed, "OPTIONS"]))],
            )

    def _codec(self) -> Codec:
        """The codec that the body is in."""
        value = self.head.header("content-type") or ""
        media_type = value.partition(";")[0].strip().lower()
        if media_type == PROTOBUF:
            return CENTRIFUGE_PROTOBUF
        if media_type not in JSON:
            raise HeadError(415, f"a body is application/json, or protobuf as {PROTOBUF}")
        return CENTRIFUGE_JSON

    async def _first_message(self, codec: Codec) -> bytes:
        """The message that a stream begins with: `connect`, and in a POST perhaps more."""
        if self.head.method == "POST":
            message = await self._body(self.services.config.max_message_bytes)
        else:
            message = self._parameters().get("cf_connect", [""])[0].encode()
        if not message:
            place = "the body" if self.head.method == "POST" else "cf_connect"
            raise HeadError(400, f"not a connect command: {place} is empty")
        try:
            commands = codec.decode(message)
            first = None
            for step in steps_of(commands):
                if not isinstance(step, Unread):
                    first = step
                    break
                await self._take_turn(step.work)
        except BadCommand as error:
            raise HeadError(400, f"not a connect command: {error}") from None
        if first is None:
            raise HeadError(400, "not a connect command: there is none between the line ends")
        if isinstance(first, FaultyCommand):
            raise HeadError(400, f"not a connect command: {first.fault}")
        if first.connect is None or not first.id:
            raise HeadError(400, "the first command is connect, with an id")
        if len(commands) > 1 and self.head.method == "GET":
            raise HeadError(400, "cf_connect holds the connect command alone")
        return message

    async def _one_way(
        self, positions: Positions
    ) -> tuple[bytes, dict[str, dict[str, msgspec.Raw]]]:
        """The connect command of a one-way client, and the topics it asks for, from where it was."""
        if self.head.method == "POST":
            command = await self._body(self.services.config.max_message_bytes)
            topics, token = [], ""
        else:
            parameters = self._parameters()
            command = parameters.get("cf_connect", ["{}"])[0].encode()
            topics = parameters.get("topic", [])
            await self._take_turn(_reading_work(command) + len(topics) * READ_OBJECT)
            token = parameters.get("token", [""])[0]
        try:
            request = members(one_text(command))
            asked = request.get("subs", b"")
            names = members(one_text(asked)) if asked.startswith(b"{") else ()
            most = self.services.config.max_topics
            if len({*names, *topics}) > most:  # before there is a struct of each
                raise HeadError(400, f"more than {most} topics")
            read(command, ConnectRequest, few=True)
            subs = read(command, _OneWay, few=True).subs
        except BadJson as error:
            raise HeadError(400, f"not a connect request: {error}") from None
        subs |= {topic: {} for topic in topics if topic not in subs}
        subs = {topic: {"recoverable": msgspec.Raw(b"true"), **sub} for topic, sub in subs.items()}
        fields: dict[str, object] = {name: msgspec.Raw(value) for name, value in request.items()}
        fields |= {"token": token} if token else {}
        first = to_json({"id": CONNECT_ID, "connect": fields})
        # A topic that it did not ask for may be one that the server gives it.
        given: dict[str, object] = dict(subs)
        for topic, position in positions.of(subs).items():
            since = _recovering(position)
            given[topic] = {**subs.get(topic, {}), **since}
            if topic in subs:
                subs[topic] |= since
        recovering = to_json({"id": CONNECT_ID, "connect": {**fields, "subs": given}})
        # Its own command fits, and an id must not be the reason for a refusal.
        fits = len(recovering) <= self.services.config.max_message_bytes
        return recovering if positions and fits else first, subs

    def _parameters(self) -> dict[str, list[str]]:
        try:
            return parse_qs(self.head.query, errors="strict")
        except ValueError:
            raise HeadError(400, "the query is not UTF-8") from None

    async def _body(self, limit: int) -> bytes:
        length = self.head.header("content-length")
        if length is None:
            raise HeadError(411, "a POST says its Content-Length")
        size = int(length)
        if size > limit:
            raise HeadError(413, f"the body has at most {limit} bytes")
        short = trio.CancelScope()
        with hold_request(self.services, self.address, self.head, short.cancel) as holding:
            if reason := holding.refusal(size):
                raise HeadError(503, reason)
            with trio.move_on_after(REQUEST_SECONDS) as reading, short:
                body = await self._read(size, holding)
                await self._take_turn(_reading_work(body))
        if short.cancelled_caught:
            raise HeadError(503, "memory is short")
        if reading.cancelled_caught:
            raise HeadError(408, f"a body comes within {REQUEST_SECONDS:g} s")
        return body

    async def _take_turn(self, work: float) -> None:
        """Wait for the turn in which what was asked is decoded: others may have come to their end with it."""
        if work > FREE_WORK:
            await self.services.router.turns.pay(work)

    async def _read(self, size: int, holding: Holding) -> bytes:
        body = bytearray(self.behind)
        if len(body) < size and (self.head.header("expect") or "").lower() == "100-continue":
            await self.stream.send_all(b"HTTP/1.1 100 Continue\r\n\r\n")
        while len(body) < size:
            data = await self.stream.receive_some(2**16)
            if not data:
                raise HeadError(400, "the connection ended in the middle of the body")
            holding.charge(Part.INCOMING, len(data))
            body += data
        del body[size:]
        return bytes(body)

    def _checked(self, message: bytes) -> bytes:
        limit = self.services.config.max_message_bytes
        if len(message) > limit:
            raise HeadError(413, f"a message has at most {limit} bytes")
        return message

    def _find(self, session: str) -> "HttpConnection | None":
        match = _SESSION.fullmatch(session)
        if match is None:
            return None
        connection = self.services.connections.get(int(match[1]))
        if isinstance(connection, HttpConnection) and connection.is_session(match[2]):
            return connection
        return None

    # responses

    def _accept(self, line: HttpStream, welcome: Welcome) -> bytes:
        """The head of a response that ends when its connection does, for HTTP/1.0 peers too."""
        return _head(
            "200 OK",
            ("Content-Type", line.media_type),
            # No proxy may keep it, change it, or hold it back until there is more.
            ("Cache-Control", "no-store, no-transform"),
            ("X-Accel-Buffering", "no"),
            ("X-Content-Type-Options", "nosniff"),
            *self.cors,
            *welcome.reply.lines,
        )

    async def _answer(self, *fields: tuple[str, str]) -> None:
        answer = _head("204 No Content", *fields, *self.cors)
        self.exchange.note_sent(answer)
        await answer_and_linger(self.stream, answer, self.services.config.close_seconds)


def _reading_work(body: bytes) -> float:
    """The work of decoding it, at worst: member by member."""
    parts = min(body.count(b","), MAX_MEMBERS)
    return len(body) / 1024 * READ_KILOBYTE + body.count(b"{") * READ_OBJECT + parts * PART


def _recovering(position: Position) -> dict[str, msgspec.Raw]:
    """The fields of a subscribe command that goes on from there."""
    return {
        "recover": msgspec.Raw(b"true"),
        "epoch": msgspec.Raw(to_json(position.epoch)),
        "offset": msgspec.Raw(b"%d" % position.offset),
    }


def _emulated(codec: Codec, body: bytes) -> tuple[str, bytes]:
    """The session and the message of a request to `/emulation`."""
    try:
        if codec is CENTRIFUGE_PROTOBUF:
            request = read_emulation(body)
            return request.session, bytes(request.data)
        emulated = msgspec.json.decode(body, type=_Emulated)
        return emulated.session, emulated.data.encode()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, BadCommand) as error:
        raise HeadError(400, f"not an emulation request: {error}") from None


def _cors(head: Head) -> tuple[tuple[str, str], ...]:
    """Headers that let a page of an origin that may connect read the answer."""
    if head.origin is None:
        return ()
    return ("Access-Control-Allow-Origin", head.origin), ("Vary", "Origin")


def _head(status: str, *fields: tuple[str, str]) -> bytes:
    all_fields = [("Date", formatdate(usegmt=True)), *fields, ("Connection", "close")]
    lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in all_fields)]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")
