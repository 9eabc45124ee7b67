"""Requests of backends to `/api`, many on one connection; requests for other paths are handed on.

Backends publish a thousand times a second, and a new connection for each costs ten times what the
publish does. A request served here is in HTTP/1.1, a POST to `/api/…` with a Content-Length; each
has its head checked as a first one has. A first request that is none of this goes on to Hypercorn,
as the last of its connection; a later one goes back to where the first of a connection is told apart,
as a proxy sends the requests of many on one connection.

Rule 1  Only a backend that has shown the key may keep a connection, and when the broker stops, or
        nothing has come for `IDLE_SECONDS`, it ends. Requests under way are answered first.
Rule 2  A peer's fault ends with its connection: nothing leaves `serve` but a cancellation, and
        `HeadError` for a later request that is not acceptable.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from math import inf
from typing import Final

import attrs
import trio

from broker.core.memory import Part
from broker.core.work import FIELD, REQUEST, REQUEST_FIELD
from broker.errors import HeadError
from broker.events.spans import TAG
from broker.http.access_log import Exchange
from broker.http.api import Api, ApiResponse, shown_key
from broker.http.server import BODY_BYTES, REQUEST_SECONDS, HttpServer, end_politely
from broker.node import Node
from broker.routing.turns import Share
from broker.transport.head import CHUNK, Head, Request, below, parse_head, read_head
from broker.transport.sockets import receive_some, write_now

logger: logging.Logger = logging.getLogger("broker.http")

IDLE_SECONDS: Final = 75.0
"""As nginx: longer than connection pools keep what they do not use, so they close first."""

IDLE_SLACK: Final = 1.0
"""Seconds that it may take longer: so the alarm of a busy connection is set once in as many."""

SEND_BYTES: Final = 64 * 2**10
"""Handed to a stream at once, or read from it: four TLS records, 0.1 ms."""

SMALL: Final = 4096
"""A body or an answer of up to so many bytes is part of what any accepted stream is counted with."""

MAX_FIELDS: Final = 1500
"""Header fields of a request that is for Hypercorn, where each is read three times: 10 ms. Apache has 100,
Node.js 2,000."""

PREFIX: Final = "/api/"


class BackendServer:
    """Serves backends on connections that others have accepted; `http` gets what is not theirs."""

    def __init__(self, node: Node, http: HttpServer) -> None:
        self._node = node
        self._api = Api(node)
        self._http = http
        self._idle: set[trio.CancelScope] = set()

    def stop(self) -> None:
        """The broker stops: idle connections end, busy ones after their answer. Never waits."""
        for scope in self._idle:
            scope.cancel()

    async def serve(self, stream: trio.abc.Stream, request: Request) -> Request | None:
        """Answer `request`, and those behind it that are for the API too; see the module.

        Returns the first behind them that is not. Otherwise the stream is closed on return, as it is
        after a cancellation. Raises `HeadError` for what comes next and is not acceptable, with the
        stream left open for its answer.
        """
        asked = _Asked.of(request.head)
        if not self._is_ours(asked):
            fields = len(request.head.headers)
            if fields > MAX_FIELDS:
                raise HeadError(431, f"a request has at most {MAX_FIELDS} header fields here")
            # Nobody in there takes a turn.
            await self._node.router.turns.pay(REQUEST + fields * REQUEST_FIELD)
            await self._http.serve(stream, request)
            return None
        stays_open = False
        try:
            source = _Source(stream, request.behind)
            following = await self._serve(stream, source, asked, request)
            stays_open = following is not None
            return following
        except HeadError:
            stays_open = True
            raise
        except trio.BrokenResourceError:
            return None
        except Exception:
            logger.exception("Serving an API request failed")
            return None
        finally:
            if not stays_open:
                await trio.aclose_forcefully(stream)

    async def _serve(
        self, stream: trio.abc.Stream, source: "_Source", asked: "_Asked", first: Request
    ) -> Request | None:
        """The next request on the stream that is for others; None if nothing may follow."""
        share, peer, address = self._node.new_share(), first.peer, first.address
        prefix = self._node.config.path_prefix
        with trio.CancelScope() as idle, self._ending(idle):
            while self._is_ours(asked):
                is_answered, rest = self._answer_together(stream, source, asked, share)
                if rest:
                    with self._busy(idle):
                        if not await _send_rest(stream, rest, closing=False):
                            return None
                if not is_answered:
                    with self._busy(idle):
                        header = asked.head.header
                        address = address or self._node.services.proxies.address_of(peer, header)
                        if not await self._answer(stream, source, asked, address, share):
                            return None
                address = ""
                # A backend sends the same head again and again: the same bytes say the same.
                head = asked.head.raw
                if source.take_again(head):
                    continue
                _set_alarm(idle)
                if not source.has_more:
                    if self._node.draining:
                        return None  # the stop came while the last answer was on its way
                    most = min(SEND_BYTES, max(CHUNK, len(head) + asked.length))
                    data = await receive_some(stream, most)
                    if not data:
                        return None
                    source.put_back(bytes(data))
                    share.renew()
                    if len(head) <= self._node.config.head_bytes and source.take_again(head):
                        continue
                raw = await self._next_head(source)
                if raw is None:
                    return None
                if raw != head:
                    with self._busy(idle):
                        work = raw.count(b"\n") * FIELD
                        await share.wait_room(work)
                        share.spend(work)
                    asked = _Asked.of(parse_head(raw), prefix)
            return Request(asked.head, source.take_rest(), peer)
        return None  # nothing has come for so long

    async def _next_head(self, source: "_Source") -> bytes | None:
        """The next head; None if none comes."""
        both = await read_head(source, self._node.config.head_bytes)
        if both is None:
            return None
        raw, behind = both
        source.put_back(behind)
        return raw

    @contextmanager
    def _ending(self, idle: trio.CancelScope) -> Iterator[None]:
        """Cancel `idle` when the broker stops, but for the blocks in which its connection is `_busy`."""
        self._idle.add(idle)
        try:
            yield
        finally:
            self._idle.discard(idle)

    @contextmanager
    def _busy(self, idle: trio.CancelScope) -> Iterator[None]:
        """Wait for something else than the next head: neither a stop nor the alarm ends that."""
        idle.deadline = inf
        self._idle.discard(idle)
        try:
            yield
        finally:
            self._idle.add(idle)

    def _answer_together(
        self, stream: trio.abc.Stream, source: "_Source", asked: "_Asked", share: Share
    ) -> tuple[bool, bytes]:
        """Answer a publish whose head was taken, and those of the same head that came with it, as far as that
        can be in this very step, and in one write.

        Returns whether there is none left whose head was taken, and what the stream has not taken of the
        answers. Never waits.
        """
        office, head = self._node.router.office, asked.head.raw
        answers, is_answered, sent = b"", False, 0
        office.hold(share)
        try:
            while len(answers) <= SMALL and not is_answered:
                response = self._answer_now(stream, source, asked, share)
                if response is None:
                    break
                answers += response
                is_answered = not source.take_again(head)
            if answers:
                sent = write_now(stream, answers)
        finally:
            office.let_go()
        return is_answered, answers[sent:]

    def _answer_now(
        self, stream: trio.abc.Stream, source: "_Source", asked: "_Asked", share: Share
    ) -> bytes | None:
        """The response to a publish that can be carried out in this very step; None, with nothing done, for
        any other request: `_answer` has it then.

        It is what `_answer` comes to where the answer is no refusal, nothing is logged or has to be waited for,
        there is too little to charge for, and another request may follow. Never waits.
        """
        services = self._node.services
        if (
            asked.method != "publish"
            or asked.length > SMALL
            or asked.closing
            or services.draining
            or services.config.access_log
            or not self._api.is_key(asked.key)
        ):
            return None
        body = source.peek(asked.length)
        if body is None:
            return None
        answer = self._api.answer_now(body, share, asked.trace)
        if answer is None:
            return None
        source.skip(asked.length)
        services.admission.trust(stream)
        return b"%b%d\r\n\r\n%b" % (_ok(int(time.time())), len(answer), answer)

    def _is_ours(self, asked: "_Asked") -> bool:
        return asked.is_for_api and self._node.hooks.request is None  # else the app is asked first

    async def _answer(
        self,
        stream: trio.abc.Stream,
        source: "_Source",
        asked: "_Asked",
        address: str,
        share: Share,
    ) -> bool:
        """Answer one request; whether another may follow."""
        services, length = self._node.services, asked.length
        exchange = Exchange.begin(asked.within, address, is_logged=self._node.config.access_log)
        answer = self._api.refuse(asked.method, asked.key, address)
        if answer is None and length > BODY_BYTES:
            text = f"the body of a request has at most {BODY_BYTES} bytes"
            answer = ApiResponse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, text.encode())
        body_read = answer is None
        with services.memory.hold() as holding:
            if answer is None:
                services.admission.trust(stream)
                body = source.take(length)
                if body is None:
                    holding.charge(Part.INCOMING, length)
                    with trio.move_on_after(REQUEST_SECONDS):
                        body = await source.read(length)
                elif length > SMALL:
                    holding.charge(Part.INCOMING, length)
                if body is None:
                    return False
                # However long it takes while others have their turns: it is done to its end.
                answer = await self._api.answer(asked.method, body, share, asked.trace, asked.key)
            closing = not body_read or self._node.draining or asked.closing
            response = _response(answer, closing=closing, second=int(time.time()))
            if len(response) > SMALL:
                holding.charge(Part.OUTBOXES, len(response))
            exchange.note_sent(response)
            exchange.end()
            # Most go out at once; a long one in pieces, between which others have their turn.
            sent = write_now(stream, response) if len(response) <= SEND_BYTES else 0
            rest = response[sent:]
            if rest or closing:
                return await _send_rest(stream, rest, closing=closing)
        return True


@attrs.frozen
class _Asked:
    """A request head, and what it says to the API."""

    head: Head
    within: Head
    """The same without a prefix of its path, as all who see to a request have it."""
    is_for_api: bool
    length: int
    method: str
    key: str
    closing: bool
    """Whether the peer wants no other request to follow."""
    trace: str
    """The trace that the request is part of; "" for none."""

    @classmethod
    def of(cls, head: Head, prefix: str = "") -> "_Asked":
        """By a head, of whose path this prefix is taken off: what is not below it is not for the API."""
        length = head.header("content-length")
        within = below(head, prefix) if prefix else head
        return cls(
            head,
            within or head,
            within is not None
            and head.method == "POST"
            and within.path.startswith(PREFIX)
            and head.version == "1.1"
            and length is not None
            and head.header("expect") is None
            and not head.is_upgrade,
            int(length or 0),
            (within or head).route.removeprefix(PREFIX),
            shown_key(head.header),
            "close" in (head.header("connection") or "").lower(),
            head.header(TAG) or "",
        )


class _Source(trio.abc.ReceiveStream):
    """A stream of which some bytes were read already, and may be put back."""

    def __init__(self, stream: trio.abc.Stream, replay: bytes) -> None:
        self._stream = stream
        self._pending = replay

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        if self._pending:
            await trio.lowlevel.checkpoint()
            data, self._pending = self._pending[:max_bytes], self._pending[max_bytes:]
            return data
        return await receive_some(self._stream, max_bytes or CHUNK)

    @property
    def has_more(self) -> bool:
        """Whether something was read already."""
        return bool(self._pending)

    def put_back(self, data: bytes) -> None:
        self._pending = data + self._pending

    def take_rest(self) -> bytes:
        rest, self._pending = self._pending, b""
        return rest

    def take_again(self, head: bytes) -> bool:
        """Take a head that was read before, if the same comes next: as `read_head` takes it, because it has
        one blank line, at its end."""
        if not self._pending.startswith(head):
            return False
        self._pending = self._pending[len(head) :]
        return True

    def peek(self, size: int) -> bytes | None:
        """As `take`, and they stay where they are."""
        return self._pending[:size] if len(self._pending) >= size else None

    def skip(self, size: int) -> None:
        """Take as many bytes, which are here."""
        self._pending = self._pending[size:]

    def take(self, size: int) -> bytes | None:
        """Exactly `size` bytes, if they are here already."""
        taken = self.peek(size)
        if taken is not None:
            self.skip(size)
        return taken

    async def read(self, size: int) -> bytes | None:
        """Exactly `size` bytes; None if the stream ends before."""
        data = bytearray(self.take_rest())
        while len(data) < size:
            more = await receive_some(self._stream, 2**16)
            if not more:
                return None
            data += more
        self._pending = bytes(data[size:])
        return bytes(data[:size])

    async def aclose(self) -> None:
        await self._stream.aclose()


def _set_alarm(idle: trio.CancelScope) -> None:
    """Have this cancelled when the next head has not come in time, or `IDLE_SLACK` later.

    The alarm stays when a head has come, because to set it costs as much as a publication: nobody may wait
    for anything else by it.
    """
    due = trio.current_time() + IDLE_SECONDS
    if not due <= idle.deadline < inf:
        idle.deadline = due + IDLE_SLACK


async def _send_rest(stream: trio.abc.Stream, rest: bytes, *, closing: bool) -> bool:
    """Send the rest of an answer, and end the stream if nothing may follow; whether anything may."""
    with trio.move_on_after(REQUEST_SECONDS) as sending:
        await _send(stream, rest)
        if closing:
            await end_politely(stream)
    return not (closing or sending.cancelled_caught)


async def _send(stream: trio.abc.SendStream, data: bytes) -> None:
    """Send all of it, in pieces: TLS would encrypt megabytes in one step."""
    whole = memoryview(data)
    for start in range(0, len(whole), SEND_BYTES):
        await stream.send_all(whole[start : start + SEND_BYTES])


@lru_cache(maxsize=1)
def _date(second: int) -> str:
    """A time as HTTP has it (RFC 9110 section 5.6.7)."""
    return formatdate(second, usegmt=True)


@lru_cache(maxsize=1)
def _ok(second: int) -> bytes:
    """`_response` of an answer as nearly all are, as far as its length."""
    ok = ApiResponse(HTTPStatus.OK, b"", "application/json")
    return _response(ok, closing=False, second=second).removesuffix(b"0\r\n\r\n")


def _response(answer: ApiResponse, *, closing: bool, second: int) -> bytes:
    lines = [
        f"HTTP/1.1 {answer.status:d} {answer.status.phrase}",
        f"Date: {_date(second)}",
        f"Content-Type: {answer.media_type}",
        f"Content-Length: {len(answer.body)}",
        *(f"{name}: {value}" for name, value in answer.headers.items()),
    ]
    if closing:
        lines.append("Connection: close")
    return "\r\n".join([*lines, "", ""]).encode("ascii") + answer.body
