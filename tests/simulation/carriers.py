"""How clients are carried: what each kind writes, and what it reads.

A carrier turns commands into bytes and bytes into what was said, in the terms of Centrifuge's JSON
whatever is on the wire: a reply, or a push under `push`. It keeps no account of anything else.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from typing import Any, ClassVar
from urllib.parse import quote

import centrifuge.protocol.client_pb2 as schema

from broker.testing import client_frame, handshake
from broker.transport import frames
from tests.conftest import delimited

Said = dict[str, Any]

PING: Said = {}
"""What a server says that wants to know whether we are here."""


class Carrier(ABC):
    """One connection's; `number` is the client's own for it, which hooks find in the query."""

    speaks: ClassVar = True
    """Whether we may say anything behind the first."""
    has_commands: ClassVar = True
    """Whether that may be commands."""
    by_requests: ClassVar = False
    """Whether each of these is a request of its own, to `/emulation`."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.refused = 0
        """The HTTP status, where the broker did not let us in."""
        self.close: tuple[int, str] | None = None
        """The Close frame that came, or what a `disconnect` said where there are no frames."""
        self._buffer = b""
        self._head = True

    @abstractmethod
    def begin(self, connect: Said, more: Sequence[Said]) -> bytes:
        """What is sent first: the request, with the connect command and others behind it."""

    @abstractmethod
    def write(self, commands: Sequence[Said]) -> bytes:
        """Commands that come later, as they are sent on the wire; for `by_requests` one message."""

    @abstractmethod
    def _read(self) -> Iterator[Said]:
        """What stands in the buffer, as far as it is whole."""

    def hear(self, data: bytes) -> Iterator[Said]:
        self._buffer += data
        if self._head:
            head, end, rest = self._buffer.partition(b"\r\n\r\n")
            if not end:
                return
            self._head, self._buffer = False, rest
            status = int(head.split()[1])
            if status not in (101, 200):
                self.refused = status
        if not self.refused:
            yield from self._read()


class WebSocket(Carrier):
    subprotocol = ""

    def begin(self, connect: Said, more: Sequence[Said]) -> bytes:
        extra = {"Sec-WebSocket-Protocol": self.subprotocol} if self.subprotocol else None
        path = f"/connection/websocket?c={self.number}"
        return handshake(path, extra) + self.write([connect, *more])

    def write(self, commands: Sequence[Said]) -> bytes:
        return client_frame(frames.TEXT, "\n".join(map(json.dumps, commands)).encode())

    def _read(self) -> Iterator[Said]:
        while (header := frames.read_header(self._buffer)) is not None:
            end = header.size + header.length
            if len(self._buffer) < end:
                return
            payload, self._buffer = self._buffer[header.size : end], self._buffer[end:]
            if header.opcode == frames.CLOSE:
                code = int.from_bytes(payload[:2], "big") if payload else 1005
                self.close = code, payload[2:].decode()
            elif header.opcode == frames.PING:
                yield {"pong": payload}
            elif header.opcode in (frames.TEXT, frames.BINARY):
                yield from self._said(payload)

    def _said(self, payload: bytes) -> Iterator[Said]:
        for line in payload.split(b"\n"):
            yield json.loads(line)


class Plain(WebSocket):
    """A peer that speaks no protocol: it says texts and hears texts."""

    has_commands = False

    def begin(self, connect: Said, more: Sequence[Said]) -> bytes:
        return handshake(f"/?c={self.number}") + self.write([{"text": "hello"}])

    def write(self, commands: Sequence[Said]) -> bytes:
        return b"".join(client_frame(frames.TEXT, each["text"].encode()) for each in commands)

    def _said(self, payload: bytes) -> Iterator[Said]:
        yield {"text": payload.decode()}


class _Protobuf:
    @staticmethod
    def encoded(commands: Sequence[Said]) -> bytes:
        return delimited(*map(_command, commands))

    @staticmethod
    def decoded(payload: bytes) -> Generator[Said, None, bytes]:
        """Whole replies; the generator's value is what is left."""
        while payload:
            size = shift = place = 0
            while True:
                if place == len(payload):
                    return payload
                size |= (payload[place] & 0x7F) << shift
                shift += 7
                place += 1
                if payload[place - 1] < 0x80:
                    break
            if len(payload) < place + size:
                return payload
            yield _plain(schema.Reply.FromString(payload[place : place + size]))
            payload = payload[place + size :]
        return b""


class ProtobufWebSocket(WebSocket):
    subprotocol = "centrifuge-protobuf"

    def write(self, commands: Sequence[Said]) -> bytes:
        return client_frame(frames.BINARY, _Protobuf.encoded(commands))

    def _said(self, payload: bytes) -> Iterator[Said]:
        rest = yield from _Protobuf.decoded(payload)
        assert not rest, "a frame holds whole messages"


class HttpStream(Carrier):
    """NDJSON over HTTP; what we say later goes by `/emulation`."""

    by_requests = True
    path = "/connection/http_stream"
    media_type = "application/json"

    def begin(self, connect: Said, more: Sequence[Said]) -> bytes:
        body = self.write([connect, *more])
        return post(f"{self.path}?c={self.number}", body, self.media_type)

    def write(self, commands: Sequence[Said]) -> bytes:
        return "\n".join(map(json.dumps, commands)).encode()

    def emulate(self, session: str, node: str, message: bytes) -> bytes:
        """The request that carries a message."""
        body = {"session": session, "node": node, "data": message.decode()}
        return post("/emulation", json.dumps(body).encode(), self.media_type)

    def _read(self) -> Iterator[Said]:
        *whole, self._buffer = self._buffer.split(b"\n")
        for line in whole:
            yield json.loads(line)


class ProtobufStream(HttpStream):
    media_type = "application/octet-stream"

    def write(self, commands: Sequence[Said]) -> bytes:
        return _Protobuf.encoded(commands)

    def emulate(self, session: str, node: str, message: bytes) -> bytes:
        request = schema.EmulationRequest(session=session, node=node, data=message)
        return post("/emulation", request.SerializeToString(), self.media_type)

    def _read(self) -> Iterator[Said]:
        self._buffer = yield from _Protobuf.decoded(self._buffer)


class Sse(HttpStream):
    path = "/connection/sse"

    def _read(self) -> Iterator[Said]:
        *whole, self._buffer = self._buffer.split(b"\n\n")
        for event in whole:
            if event.startswith(b"data: "):
                yield json.loads(event[6:])


class SseByGet(Sse):
    def begin(self, connect: Said, more: Sequence[Said]) -> bytes:
        assert not more, "a GET carries the connect command alone"
        return get(f"{self.path}?c={self.number}&cf_connect={quote(json.dumps(connect))}")


class UniSse(Sse):
    """One way: its topics are in the request, and pushes have nothing around them."""

    speaks = has_commands = False
    by_requests = False
    path = "/connection/uni_sse"

    def begin(self, connect: Said, more: Sequence[Said]) -> bytes:
        request = {**connect["connect"], "subs": {each["channel"]: {} for each in more}}
        return get(f"{self.path}?c={self.number}&cf_connect={quote(json.dumps(request))}")

    def _read(self) -> Iterator[Said]:
        for said in super()._read():
            yield {"id": 1, **said} if "connect" in said else {"push": said}


CARRIERS: dict[str, type[Carrier]] = {
    "websocket": WebSocket,
    "protobuf": ProtobufWebSocket,
    "http_stream": HttpStream,
    "http_stream_protobuf": ProtobufStream,
    "sse": Sse,
    "sse_get": SseByGet,
    "uni_sse": UniSse,
    "plain": Plain,
}


def post(target: str, body: bytes, media_type: str = "application/json", key: str = "") -> bytes:
    lines = [
        f"POST {target} HTTP/1.1",
        "Host: testserver",
        f"Content-Type: {media_type}",
        f"Content-Length: {len(body)}",
        "Connection: close",
    ]
    lines += [f"X-API-Key: {key}"] if key else []
    return "\r\n".join([*lines, "", ""]).encode() + body


def get(target: str) -> bytes:
    return f"GET {target} HTTP/1.1\r\nHost: testserver\r\n\r\n".encode()


def _command(command: Said) -> Any:
    """A command as the official schema has it; `data` is JSON in it."""
    made = schema.Command()
    for method, fields in command.items():
        if method == "id":
            made.id = fields
        else:
            part = getattr(made, method)
            part.SetInParent()
            _fill(part, fields)
    return made


def _fill(message: Any, fields: Said) -> None:
    for name, value in fields.items():
        if name == "data":
            message.data = json.dumps(value).encode()
        elif name == "subs":
            for topic, sub in value.items():
                _fill(message.subs[topic], sub)
        elif name == "vals":
            message.vals.extend(value)
        elif isinstance(value, dict):
            part = getattr(message, name)
            part.SetInParent()
            _fill(part, value)
        else:
            setattr(message, name, value)


def _plain(message: Any) -> Said:
    """A message of the library's as JSON would have it; what is not set is left out."""
    found: Said = {}
    for field, value in message.ListFields():
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            of = field.message_type.fields_by_name["value"]
            found[field.name] = {k: _plain(v) if of.message_type else v for k, v in value.items()}
        elif hasattr(value, "extend"):
            found[field.name] = [_plain(v) if field.message_type else v for v in value]
        elif field.message_type is not None:
            found[field.name] = _plain(value)
        elif field.type == field.TYPE_BYTES:
            found[field.name] = json.loads(value)
        else:
            found[field.name] = value
    return found
