"""Plain HTTP on a connection that has already shown its request head: Hypercorn behind a link.

Rule 1  One request, the last of its connection, answered with `Connection: close`. So each request has
        had its head checked (a WebSocket upgrade can never come second, unseen), there is no idle
        connection to end at a stop, and one deadline bounds all. The price is a new connection
        per request. Bytes behind the request are dropped, as the answer says: a client that sends
        requests ahead repeats them (RFC 9112 section 9.3.2).
Rule 2  A peer's fault ends with its connection: nothing but a cancellation leaves `serve`.
Rule 3  HTTP/2 and WebSockets are not spoken here: `Upgrade` headers do not reach Hypercorn.
"""

import logging
import socket
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any, TypeAlias, TypeVar, cast

import attrs
import h11
import structlog
import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import LifespanState
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from broker.access.proxies import ClientAddress, split_address
from broker.core.memory import UNCOUNTED, Holding, Part
from broker.http.access_log import Exchange
from broker.transport.head import Head, Request, refusal
from broker.transport.sockets import address_of, socket_below

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("broker.http")
logger: logging.Logger = logging.getLogger("broker.http")  # Hypercorn's as well

REQUEST_SECONDS = 30.0
"""For all of one request: its body, the app's work and the response; our largest page at 6 KB/s."""

BODY_BYTES = 2**20
"""Bytes that a peer may send behind its head."""

FREE_CHUNKS = 64
CHUNK_SIZE = 256
"""Bytes that a chunk of a body has at least, on average, behind the first few. Each takes 35 µs however small
it is, and a read may hold ten thousand of one byte. A client that sends its body in chunks sends kilobytes at
a time."""

LINGER_SECONDS = 1.0
"""How long we read on after the answer. To close with bytes unread makes TCP send a reset, which
can destroy the answer on its way (RFC 9112 section 9.6); nginx lingers 5 s for large uploads."""

LINGER_BYTES = 2**20

TOO_MANY_CHUNKS = (
    f"comes in chunks of {CHUNK_SIZE} bytes on average, behind the first {FREE_CHUNKS}"
)

NOT_REPLAYED = {b"upgrade", b"http2-settings"}

T = TypeVar("T")

Hold: TypeAlias = Callable[[str, Head, Callable[[], None]], Holding]
"""Makes the holding of a request, by the address of its peer; the function is called to end the request."""


class HttpServer:
    """Serves an ASGI app to connections that others have accepted.

    `request_seconds` is for all of one request, `body_bytes` what a peer may send behind its head;
    bytes that it has sent are charged to the holding that `hold` returns. Requests are logged while
    `is_logged` says so.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        request_seconds: float = REQUEST_SECONDS,
        body_bytes: int = BODY_BYTES,
        hold: Hold = lambda *_: Holding(),
        is_logged: Callable[[], bool] = lambda: False,
    ) -> None:
        self._app = app
        self._hold = hold
        self._is_logged = is_logged
        self._request_seconds = request_seconds
        self._body_bytes = body_bytes
        self._context = WorkerContext(None)
        self._config = Config()
        self._config.errorlog = logger
        self._config.include_server_header = False
        self._config.keep_alive_max_requests = 0
        # Hypercorn waits for ever to hand a chunk to an app that has ended without reading its
        # body. `body_bytes` bounds this queue instead.
        self._config.max_app_queue_size = sys.maxsize

    async def serve(self, stream: trio.abc.Stream, request: Request) -> None:
        """Answer one request, with as much of its body as is still to come from `stream`.

        The stream is closed on return, also after a cancellation. A body over `body_bytes` gets
        413, a request that takes longer than `request_seconds` 408 (if its answer has not begun),
        one for whose body memory is too short 503.
        An app that raises is logged once, to `broker.http`, and its peer gets 500. A peer that
        ends its sending side has gone: the app is told, and no answer is sent.
        """
        # Taken now: after a reset there is nobody to ask.
        address = request.address or address_of(stream)
        exchange = Exchange.begin(request.head, address, is_logged=self._is_logged())
        try:
            try:
                await self._answer(stream, request, address, exchange)
            except* Exception:
                logger.exception("Serving an HTTP request failed")
        finally:
            exchange.end()
            await trio.aclose_forcefully(stream)

    async def _answer(
        self, stream: trio.abc.Stream, request: Request, peer: str, exchange: Exchange
    ) -> None:
        secure = isinstance(stream, trio.SSLStream)
        link = (_TlsLink if secure else _Link)(stream, request, exchange, self._body_bytes)
        length = int(request.head.header("content-length") or 0)
        held = self._hold(peer, request.head, link.give_way)
        with trio.move_on_after(self._request_seconds) as request_bound, held as link.holding:
            link.check_body(length)
            if link.overrun:
                pass
            elif held.refusal(length):
                link.short = True
            else:
                await self._run_hypercorn(link)
        if link.torn:
            return
        # Nothing below waits longer than LINGER_SECONDS for the peer.
        with trio.move_on_after(LINGER_SECONDS), suppress(trio.BrokenResourceError):
            if link.answered:
                pass
            elif link.overrun:
                text = f"the body of a request {link.overrun}"
                await _refuse(stream, exchange, 413, text, peer)
            elif link.short:
                await _refuse(stream, exchange, 503, "memory is short", peer)
            elif request_bound.cancelled_caught:
                text = f"a request is done within {self._request_seconds:g} s"
                await _refuse(stream, exchange, 408, text, peer)
            await _end(stream)

    async def _run_hypercorn(self, link: "_Link") -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                with suppress(ClientDisconnect):  # Hypercorn would log it as the app's error
                    await self._app(scope, receive, send)
            finally:
                link.app_has_ended()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(link.close_when_cancelled)
            wrapped = ASGIWrapper(cast("Any", app))
            with link.over:
                await TCPServer(
                    wrapped, self._config, self._context, LifespanState(), cast("Any", link)
                )
            nursery.cancel_scope.cancel()


async def _refuse(
    stream: trio.abc.SendStream, exchange: Exchange, status: int, reason: str, peer: str
) -> None:
    log.info("refused", status=status, reason=reason, peer=peer)
    answer = refusal(status, reason)
    exchange.note_sent(answer)
    await stream.send_all(answer)


async def end_politely(stream: trio.abc.Stream) -> None:
    """`_end`, for no longer than `LINGER_SECONDS`, and whatever the peer does."""
    with trio.move_on_after(LINGER_SECONDS), suppress(trio.BrokenResourceError):
        await _end(stream)


async def _end(stream: trio.abc.Stream) -> None:
    """Say that no more comes, then read on until the peer has closed as well."""
    if not isinstance(stream, trio.abc.HalfCloseableStream):
        await stream.aclose()  # TLS: says goodbye, and cannot be read after that
        return
    await stream.send_eof()
    left = LINGER_BYTES
    while left > 0 and (data := await stream.receive_some(2**16)):
        left -= len(data)


@attrs.frozen
class _Address:
    """The addresses that Hypercorn asks a socket for. Taken once: a socket forgets its peer after a reset."""

    family: int = socket.AF_UNIX  # Hypercorn's word for: no address
    peer: object = ""
    name: object = ""

    @classmethod
    def of(cls, stream: trio.abc.Stream, client: str) -> "_Address":
        """Those of a stream; that of its peer is the client's, where a proxy has told that."""
        if isinstance(client, ClientAddress) and client.is_known:
            return cls(socket.AF_INET, split_address(client), ("", 0))
        below = socket_below(stream)
        if below is not None:
            with suppress(OSError):
                sock = below.socket
                return cls(sock.family, sock.getpeername(), sock.getsockname())
        return cls()

    def getpeername(self) -> object:
        return self.peer

    def getsockname(self) -> object:
        return self.name


def _replayed(head: Head) -> bytes:
    lines = head.raw.split(b"\r\n")
    return b"\r\n".join(x for x in lines if x.partition(b":")[0].lower() not in NOT_REPLAYED)


class _OneRequest:
    """Where one request ends. h11 says it, as it does to Hypercorn, so both see the same end."""

    def __init__(self) -> None:
        self._parser = h11.Connection(h11.SERVER)
        self._chunks = 0
        self._bytes = 0
        self.is_whole = False
        self.is_crumbled = False
        """Whether its body comes in too many chunks; then it is whole, as nothing more is of interest."""

    def take(self, data: bytes) -> bytes:
        """Of the bytes that come next, those that belong to the request; none are the end of all."""
        if self.is_whole:
            return b""
        try:
            self._parser.receive_data(data)
            while (event := self._parser.next_event()) is not h11.NEED_DATA:
                if isinstance(event, h11.Data):
                    self._bytes += len(event.data)
                    self._chunks += event.chunk_start
                    if self._chunks > FREE_CHUNKS + self._bytes / CHUNK_SIZE:
                        self.is_whole = self.is_crumbled = True
                        return b""
                elif isinstance(event, h11.EndOfMessage):
                    self.is_whole = True
                    behind, _ = self._parser.trailing_data
                    return data[: len(data) - len(behind)]
        except h11.RemoteProtocolError:
            self.is_whole = True  # it will be refused, so nothing more is of interest
        return data


class _Link:
    """The stream as Hypercorn sees it: one request alone, its body bounded; closed but not ended.

    With bytes behind the request, Hypercorn may close before it has answered. It shields its writes
    from cancellation, so `close_when_cancelled` runs beside it. And it waits for ever for an answer
    to end whose peer has gone while it had more to say, so `over` is cancelled when the app ends on
    a closed link.
    """

    def __init__(
        self, stream: trio.abc.Stream, request: Request, exchange: Exchange, body_bytes: int
    ) -> None:
        self.socket = _Address.of(stream, request.address)
        self.answered = False
        self.torn = False  # a write is under way, or was cut off
        self.overrun = ""  # the bound that its body breaks, in words
        self.short = False  # memory is, so no more of the body is taken
        self.holding = UNCOUNTED
        self._stream = stream
        self._exchange = exchange
        self._request = _OneRequest()
        head = _replayed(request.head)
        self._pending = self._request.take(head + request.behind)
        self._body_bytes = self._body_left = body_bytes
        self._body_left -= max(0, len(self._pending) - len(head))
        self._behind_left = LINGER_BYTES
        self.over = trio.CancelScope()
        self._closed = False
        self._waiting: set[trio.CancelScope] = set()

    async def receive_some(self, max_bytes: int) -> bytes | bytearray:
        data: bytes | bytearray
        if self._pending:
            await trio.lowlevel.checkpoint()
            data, self._pending = self._pending[:max_bytes], self._pending[max_bytes:]
            return data
        if self._request.is_whole:
            await self._unless_closed(self._see_the_peer_leave)
            return b""
        data = await self._unless_closed(partial(self._stream.receive_some, max_bytes))
        body = self._request.take(bytes(data))
        self._body_left -= len(body)
        self.holding.charge(Part.INCOMING, len(body))
        self.check_body()
        if self.overrun:
            self._close()
            raise trio.ClosedResourceError
        return body

    def check_body(self, length: int = 0) -> None:
        """Note whether the body breaks a bound: what came of it, or so many bytes that are to come."""
        if self._request.is_crumbled:
            self.overrun = TOO_MANY_CHUNKS
        elif self._body_left < 0 or length > self._body_bytes:
            self.overrun = f"has at most {self._body_bytes} bytes"

    async def _see_the_peer_leave(self) -> None:
        """Return when the peer has ended its side, whatever it sends before that."""
        while self._behind_left > 0:
            data = await self._stream.receive_some(2**16)
            if not data:
                return
            self._behind_left -= len(data)
        await trio.sleep_forever()  # so much that we would rather not read the rest

    async def send_all(self, data: bytes) -> None:
        async def write() -> None:
            self.answered = self.torn = True
            self._exchange.note_sent(data)
            try:
                await self._stream.send_all(data)
            except trio.BrokenResourceError:
                self._close()
                raise
            self.torn = False

        await self._unless_closed(write)

    async def aclose(self) -> None:
        self._close()
        await trio.lowlevel.checkpoint()

    async def close_when_cancelled(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            self._close()

    def give_way(self) -> None:
        """Memory is short: take no more, and answer so if nothing was answered yet."""
        self.short = True
        self._close()

    def app_has_ended(self) -> None:
        if self._closed:
            self.over.cancel()

    def _close(self) -> None:
        self._closed = True
        for scope in self._waiting:
            scope.cancel()

    async def _unless_closed(self, wait: Callable[[], Awaitable[T]]) -> T:
        if self._closed:
            raise trio.ClosedResourceError
        with trio.CancelScope() as scope:
            self._waiting.add(scope)
            try:
                return await wait()
            finally:
                self._waiting.discard(scope)
        raise trio.ClosedResourceError  # by `_close`


class _TlsLink(_Link):
    """A link by which Hypercorn knows the scheme is https; the handshake was before the head."""

    async def do_handshake(self) -> None:
        await trio.lowlevel.checkpoint()

    def selected_alpn_protocol(self) -> str:
        return "http/1.1"

    @property
    def transport_stream(self) -> _Link:
        return self
