"""The broker's HTTP API from outside, for those who have its key: one request after the other.

Rule: foreign exceptions become a `ClientError` here, and nothing that the other side sends is kept
beyond `MAX_ANSWER_BYTES`.
"""

import ssl
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit

import h11
import msgspec
import trio

from broker.client.address import OpenStream, host_header, opener, split_url
from broker.client.client import CONNECT_SECONDS
from broker.client.loss import LOSSES, explain, shorten
from broker.core.values import check_values
from broker.errors import CannotConnect, ClientError, ConnectionLost, RequestFailed

MAX_ANSWER_BYTES: Final = 64 * 2**20
"""Eight times what a broker answers at most, unless it is told otherwise."""

_READ: Final = 64 * 2**10

_KEY: Final = "give the broker's api_key by --api-key or BROKER_API_KEY"


class ApiClient:
    """Calls the methods of one broker's HTTP API; made by `open_api`. One task at a time."""

    def __init__(
        self,
        url: str,
        key: str,
        ssl_context: ssl.SSLContext | None,
        open_stream: OpenStream | None,
    ) -> None:
        if not (key.isascii() and key.isprintable()):
            raise ClientError("the API key holds a character that no header field may have")
        self.url = url
        self._key = key
        parts = urlsplit(url)
        # As for a WebSocket; whose path is that of the WebSocket, and of http that of the API.
        as_websocket = parts._replace(
            scheme={"http": "ws", "https": "wss"}.get(parts.scheme, parts.scheme)
        )
        ws_url = urlunsplit(as_websocket)
        self._host, self._port, path = split_url(ws_url)
        self._prefix = path.rstrip("/") if parts.scheme.startswith("http") else ""
        self._open_stream = open_stream or opener(ws_url, ssl_context)
        self._stream: trio.abc.Stream | None = None
        self._connection = h11.Connection(h11.CLIENT)

    async def call(self, method: str, params: Mapping[str, object] | None = None) -> Any:
        """Carry out a method, and return its result: dicts, lists and so on.

        Raises `RequestFailed` for an error reply, `CannotConnect` if nobody is there, `ConnectionLost`
        if the connection drops before the answer, and `ClientError` where the key is wrong or what
        answers has no such API; `TypeError` for parameters that JSON cannot hold, such as a set.
        Cancelled, the request may have been carried out.
        """
        check_values(params or {})
        body = msgspec.json.encode(params or {})
        status, answer = await self._post(f"{self._prefix}/api/{method}", body)
        if status == 401:
            raise ClientError(f"{self.url}: the HTTP API does not take this key; {_KEY}")
        if status != 200:
            raise ClientError(
                f"{self.url}: {shorten(answer.decode(errors='replace').strip())} ({status})"
            )
        try:
            fields = msgspec.json.decode(answer)
            if "error" in fields:
                code, message = int(fields["error"]["code"]), str(fields["error"]["message"])
                raise RequestFailed(code, shorten(message), code in (100, 111))
            return fields["result"]
        except (msgspec.DecodeError, TypeError, KeyError, ValueError, RecursionError):
            raise ClientError(f"{self.url}: the answer is not of this broker's HTTP API") from None

    async def _post(self, path: str, body: bytes) -> tuple[int, bytes]:
        stream = await self._connected()
        headers = [
            ("Host", host_header(self._host, self._port)),
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(body))),
            ("X-API-Key", self._key),
        ]
        request = h11.Request(method="POST", target=path, headers=headers)
        parts = [
            self._connection.send(each) for each in (request, h11.Data(body), h11.EndOfMessage())
        ]
        is_whole = False
        try:
            await stream.send_all(b"".join(filter(None, parts)))
            answer = await self._answer(stream)
            is_whole = self._connection.their_state is h11.DONE
            return answer
        except h11.RemoteProtocolError as error:
            raise ClientError(f"{self.url} does not speak HTTP: {error}") from None
        except LOSSES as error:
            lost = explain(error)
            raise ConnectionLost(lost.code, lost.reason) from None
        finally:
            if is_whole:
                self._connection.start_next_cycle()
            else:
                await self.aclose()

    async def _answer(self, stream: trio.abc.Stream) -> tuple[int, bytes]:
        status, answer = 0, bytearray()
        while not isinstance(event := await self._next_event(stream), h11.EndOfMessage):
            if isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                answer += event.data
            if len(answer) > MAX_ANSWER_BYTES:
                raise ClientError(f"{self.url}: an answer of more than {MAX_ANSWER_BYTES:,} bytes")
        return status, bytes(answer)

    async def _next_event(self, stream: trio.abc.Stream) -> object:
        data = b"?"
        while True:
            try:
                event = self._connection.next_event()
            except h11.RemoteProtocolError:
                if data:
                    raise
                raise trio.BrokenResourceError("connection closed") from None
            if event is not h11.NEED_DATA:
                return event
            data = bytes(await stream.receive_some(_READ))
            self._connection.receive_data(data)

    async def _connected(self) -> trio.abc.Stream:
        if self._stream is None:
            self._connection = h11.Connection(h11.CLIENT)
            try:
                with trio.fail_after(CONNECT_SECONDS):
                    stream = await self._open_stream(self._host, self._port)
                    self._stream = stream
                    if isinstance(stream, trio.SSLStream):
                        await stream.do_handshake()
            except trio.TooSlowError:
                await self.aclose()
                text = f"cannot connect to {self.url}: no answer within {CONNECT_SECONDS:g} s"
                raise CannotConnect(text) from None
            except LOSSES as error:
                await self.aclose()
                raise CannotConnect(
                    f"cannot connect to {self.url}: {explain(error).reason}"
                ) from None
        return self._stream

    async def aclose(self) -> None:
        """Drop the connection; the next call makes another."""
        stream, self._stream = self._stream, None
        if stream is not None:
            await trio.aclose_forcefully(stream)


@asynccontextmanager
async def open_api(
    url: str,
    key: str,
    *,
    ssl_context: ssl.SSLContext | None = None,
    open_stream: OpenStream | None = None,
) -> AsyncGenerator[ApiClient]:
    """The HTTP API of the broker at `url` for as long as the block; nothing is sent before a call.

    `url` is that of the WebSocket, `ws://…` or `wss://…`, or of HTTP with whatever path stands before `/api`.
    `ssl_context` and `open_stream` are as for `open_client`. Raises `ClientError` for a URL that is none.
    """
    async with aclosing(ApiClient(url, key, ssl_context, open_stream)) as api:
        yield api
