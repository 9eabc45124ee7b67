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
from email.utils import formatdate
from http import HTTPStatus
from typing import Final

import trio

from broker.core.memory import Part
from broker.errors import HeadError
from broker.events.spans import TAG
from broker.http.access_log import Exchange
from broker.http.api import Api, ApiResponse, shown_key
from broker.http.server import BODY_BYTES, REQUEST_SECONDS, HttpServer, end_politely
from broker.node import Node
from broker.routing.turns import Share
from broker.transport.head import Head, Request, parse_head, read_head
from broker.transport.sockets import address_of

logger: logging.Logger = logging.getLogger("broker.http")

IDLE_SECONDS: Final = 75.0
"""As nginx: longer than connection pools keep what they do not use, so they close first."""

SEND_BYTES: Final = 64 * 2**10
"""Handed to a stream at once: four TLS records, 0.1 ms."""

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
        if not self._is_ours(request.head):
            await self._http.serve(stream, request)
            return None
        stays_open = False
        try:
            source = _Source(stream, request.behind)
            following = await self._serve(stream, source, request)
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
        self, stream: trio.abc.Stream, source: "_Source", request: Request
    ) -> Request | None:
        """The next request on the stream that is for others; None if nothing may follow."""
        share, head = self._node.new_share(), request.head
        peer, address = address_of(stream), request.address
        while self._is_ours(head):
            address = address or self._node.services.proxies.address_of(peer, head.header)
            if not await self._answer(stream, source, head, address, share):
                return None
            address = ""
            following = await self._next_head(source)
            if following is None:
                return None
            head = following
        return Request(head, source.take_rest())

    async def _next_head(self, source: "_Source") -> Head | None:
        if self._node.draining and not source.has_more:
            return None  # the stop came while the last answer was on its way
        with trio.move_on_after(IDLE_SECONDS) as idle:
            self._idle.add(idle)
            try:
                both = await read_head(source, self._node.config.head_bytes)
            finally:
                self._idle.discard(idle)
            if both is not None:
                source.put_back(both[1])
                return parse_head(both[0])
        return None

    def _is_ours(self, head: Head) -> bool:
        return (
            head.method == "POST"
            and head.path.startswith(PREFIX)
            and head.version == "1.1"
            and head.header("content-length") is not None
            and head.header("expect") is None
            and not head.is_upgrade
            and self._node.hooks.request is None  # else the app is asked first
        )

    async def _answer(
        self, stream: trio.abc.Stream, source: "_Source", head: Head, address: str, share: Share
    ) -> bool:
        """Answer one request; whether another may follow."""
        is_logged = self._node.config.access_log
        exchange = Exchange.begin(head, address, is_logged=is_logged)
        length = int(head.header("content-length") or 0)
        method = head.route.removeprefix(PREFIX)
        answer = self._api.refuse(method, shown_key(head.header), address)
        if answer is None and length > BODY_BYTES:
            text = f"the body of a request has at most {BODY_BYTES} bytes"
            answer = ApiResponse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, text.encode())
        body_read = answer is None
        with self._node.services.memory.hold() as holding:
            if answer is None:
                self._node.services.admission.trust(stream)
                holding.charge(Part.INCOMING, length)
                body = None
                with trio.move_on_after(REQUEST_SECONDS):
                    body = await source.read(length)
                if body is None:
                    return False
                # However long it takes while others have their turns: it is done to its end.
                trace = head.header(TAG) or ""
                answer = await self._api.answer(method, body, share, trace)
            holding.charge(Part.OUTBOXES, len(answer.body))
            closing = (
                not body_read
                or self._node.draining
                or "close" in (head.header("connection") or "").lower()
            )
            response = _response(answer, closing=closing)
            exchange.note_sent(response)
            exchange.end()
            with trio.move_on_after(REQUEST_SECONDS) as sending:
                await _send(stream, response)
                if closing:
                    await end_politely(stream)
        return not (closing or sending.cancelled_caught)


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
        return await self._stream.receive_some(max_bytes)

    @property
    def has_more(self) -> bool:
        """Whether something was read already."""
        return bool(self._pending)

    def put_back(self, data: bytes) -> None:
        self._pending = data + self._pending

    def take_rest(self) -> bytes:
        rest, self._pending = self._pending, b""
        return rest

    async def read(self, size: int) -> bytes | None:
        """Exactly `size` bytes; None if the stream ends before."""
        data = bytearray(self.take_rest())
        while len(data) < size:
            more = await self._stream.receive_some(2**16)
            if not more:
                return None
            data += more
        self._pending = bytes(data[size:])
        return bytes(data[:size])

    async def aclose(self) -> None:
        await self._stream.aclose()


async def _send(stream: trio.abc.SendStream, data: bytes) -> None:
    """Send all of it, in pieces: TLS would encrypt megabytes in one step."""
    whole = memoryview(data)
    for start in range(0, len(whole), SEND_BYTES):
        await stream.send_all(whole[start : start + SEND_BYTES])


def _response(answer: ApiResponse, *, closing: bool) -> bytes:
    lines = [
        f"HTTP/1.1 {answer.status:d} {answer.status.phrase}",
        f"Date: {formatdate(usegmt=True)}",
        f"Content-Type: {answer.media_type}",
        f"Content-Length: {len(answer.body)}",
        *(f"{name}: {value}" for name, value in answer.headers.items()),
    ]
    if closing:
        lines.append("Connection: close")
    return "\r\n".join([*lines, "", ""]).encode("ascii") + answer.body
