"""Peers at the level of bytes: sockets, frames and HTTP, written anew.

Rule: nothing of the broker's is imported. A frame that both ends build with the same code
would hide the mistake that they share.
"""

import socket
import ssl
import struct
from collections.abc import Iterable, Mapping
from typing import Any, Final, TypeAlias

import attrs
import msgspec
import trio

CONTINUATION: Final = 0x0
TEXT: Final = 0x1
BINARY: Final = 0x2
CLOSE: Final = 0x8
PING: Final = 0x9
PONG: Final = 0xA

MASK: Final = bytes(4)
"""A mask that changes nothing: legal (RFC 6455 section 5.3), and a message of 1 MB costs no CPU."""

KEY: Final = "dGhlIHNhbXBsZSBub25jZQ=="

Json: TypeAlias = dict[str, Any]
Address: TypeAlias = "Tcp | Unix"


class Ended(Exception):
    """The other side ended it, and how: `close 1008`, `EOF`, `RST`, or an HTTP status."""

    def __init__(self, how: str) -> None:
        super().__init__(how)
        self.how = how


@attrs.frozen
class Tcp:
    """Where a broker listens; `ca` is the PEM file that signs for it, and makes it TLS."""

    port: int
    ca: str = ""
    host: str = "127.0.0.1"

    @property
    def name(self) -> str:
        """The value of `Host`."""
        return f"localhost:{self.port}"


@attrs.frozen
class Unix:
    path: str

    @property
    def name(self) -> str:
        return "localhost"


def frame(opcode: int, payload: bytes = b"", *, fin: bool = True, rsv: int = 0) -> bytes:
    """A masked frame as a client sends it, its length in the shortest form."""
    first = (0x80 if fin else 0) | rsv | opcode
    length = len(payload)
    if length < 126:
        header = bytes((first, 0x80 | length))
    elif length < 2**16:
        header = struct.pack("!BBH", first, 0xFE, length)
    else:
        header = struct.pack("!BBQ", first, 0xFF, length)
    return header + MASK + payload


def header_of(length: int, opcode: int = BINARY) -> bytes:
    """The header of a frame that promises `length` bytes, in the longest form."""
    return struct.pack("!BBQ", 0x80 | opcode, 0xFF, length) + MASK


def close(code: int, reason: bytes = b"") -> bytes:
    return frame(CLOSE, code.to_bytes(2, "big") + reason)


def text(*commands: object) -> bytes:
    """Centrifuge commands, joined into one text frame."""
    return frame(TEXT, b"\n".join(map(msgspec.json.encode, commands)))


def request(
    line: str, fields: Iterable[tuple[str, str]] = (), body: bytes = b"", *, host: str = "localhost"
) -> bytes:
    """An HTTP request; `line` is `METHOD TARGET`. `Host` is left out where `host` is empty."""
    lines = [f"{line} HTTP/1.1", *([f"Host: {host}"] if host else [])]
    lines += [f"{name}: {value}" for name, value in fields]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def handshake(
    path: str = "/", fields: Mapping[str, str | None] | None = None, *, host: str = "localhost"
) -> bytes:
    """A WebSocket upgrade request. `fields` are added, or replace; None takes one out."""
    all_fields: dict[str, str | None] = {
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Key": KEY,
        "Sec-WebSocket-Version": "13",
        **(fields or {}),
    }
    given = [(name, value) for name, value in all_fields.items() if value is not None]
    return request(f"GET {path}", given, host=host)


@attrs.frozen
class Response:
    """An HTTP response, as far as it came."""

    status: int
    fields: Mapping[str, str]
    body: bytes = b""


async def connect(address: Address, *, receive_buffer: int = 0) -> trio.abc.Stream:
    """Connect; `receive_buffer` in bytes makes a peer that is slow to read felt at once.

    Raises `Ended` with `refused` where nobody listens or TLS fails.
    """
    family = socket.AF_UNIX if isinstance(address, Unix) else socket.AF_INET
    sock = trio.socket.socket(family, socket.SOCK_STREAM)
    try:
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        if isinstance(address, Unix):
            await sock.connect(address.path)
            return trio.SocketStream(sock)
        await sock.connect((address.host, address.port))
        stream = trio.SocketStream(sock)
        if not address.ca:
            return stream
        context = ssl.create_default_context(cafile=address.ca)
        secure = trio.SSLStream(stream, context, server_hostname="localhost", https_compatible=True)
        await secure.do_handshake()
        return secure
    except (OSError, trio.BrokenResourceError):
        sock.close()
        raise Ended("refused") from None
    except BaseException:
        sock.close()
        raise


class Peer:
    """One connection that does just what it is told, however rude."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.fd = 0
        self.pushes: list[Json] = []
        self.received = 0
        self._buffer = bytearray()
        self._last_id = 0
        self._most = 2**18
        self._was_reset = False  # which the system tells once, to a write or to a read
        self._sending = trio.StrictFIFOLock()  # an answer to a ping waits for what is half sent

    # out

    async def send(self, data: bytes) -> None:
        """Raw bytes. Raises `Ended` when the other side has gone."""
        try:
            async with self._sending:
                await self.stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._was_reset = True
            raise Ended("RST") from None

    async def drip(self, data: bytes, seconds: float) -> None:
        """One byte at a time."""
        for byte in data:
            await self.send(bytes((byte,)))
            await trio.sleep(seconds)

    async def say(self, *commands: object) -> None:
        await self.send(text(*commands))

    async def finish(self) -> None:
        """Send no more, and read on."""
        assert isinstance(self.stream, trio.SocketStream)
        await self.stream.send_eof()

    def reset(self) -> None:
        """End as a crashed process does: the other side gets RST, not FIN."""
        stream = self.stream
        if isinstance(stream, trio.SSLStream):
            stream = stream.transport_stream
        assert isinstance(stream, trio.SocketStream)
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        stream.socket.close()

    # in

    async def read(self, most: int = 2**18) -> bytes:
        """The bytes that come next. Raises `Ended` at the end."""
        if self._buffer:
            return self._take(min(most, len(self._buffer)))
        await self._more(most)
        return self._take(len(self._buffer))

    async def until(self, mark: bytes) -> bytes:
        """Everything up to and including `mark`."""
        while (end := self._buffer.find(mark)) < 0:
            await self._more()
        return self._take(end + len(mark))

    async def head(self) -> Response:
        """The head of an HTTP response."""
        lines = (await self.until(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in lines[1:] if line)
        fields = {name.lower(): value.strip() for name, _, value in pairs}
        return Response(int(lines[0].split(" ")[1]), fields)

    async def response(self) -> Response:
        """A whole response: as long as it says, else up to the end."""
        head = await self.head()
        length = head.fields.get("content-length")
        if head.status in (101, 204, 304):
            return head
        if length is not None:
            while len(self._buffer) < int(length):
                await self._more()
            return attrs.evolve(head, body=self._take(int(length)))
        try:
            while True:
                await self._more()
        except Ended:
            return attrs.evolve(head, body=self._take(len(self._buffer)))

    async def frame(self) -> tuple[int, bytes]:
        """The next frame, whatever it is."""
        while True:
            have = self._buffer
            if len(have) >= 2:
                length, size = have[1] & 0x7F, 2
                if length == 126:
                    size = 4
                elif length == 127:
                    size = 10
                if len(have) >= size:
                    if size > 2:
                        length = int.from_bytes(have[2:size], "big")
                    if len(have) >= size + length:
                        opcode = have[0] & 0x0F
                        return opcode, self._take(size + length)[size:]
            await self._more()

    async def message(self) -> bytes:
        """The next data message. Answers pings of both kinds; raises `Ended` on a Close frame."""
        while True:
            opcode, payload = await self.frame()
            if opcode == CLOSE:
                raise Ended(f"close {int.from_bytes(payload[:2], 'big') or 1005}")
            if opcode == PING:
                await self.send(frame(PONG, payload))
            elif opcode in (TEXT, BINARY):
                if payload != b"{}":
                    return payload
                await self.send(frame(TEXT, b"{}"))

    async def lines(self) -> list[Json]:
        """The objects of the next text message. Raises `Ended` for what is no JSON."""
        message = await self.message()
        try:
            return [msgspec.json.decode(line) for line in message.split(b"\n") if line]
        except msgspec.DecodeError:
            raise Ended(f"plain text: {message[:20].decode(errors='replace')}") from None

    async def call(self, **command: object) -> Json:
        """Send one command and return its reply; pushes meanwhile go to `pushes`."""
        self._last_id += 1
        await self.say({"id": self._last_id, **command})
        return await self.reply(self._last_id)

    async def rpc(self, method: str, **data: object) -> Json:
        return await self.call(rpc={"method": method, "data": data})

    async def reply(self, number: int = 0) -> Json:
        """The reply to the command of this id; of any where it is 0."""
        while True:
            found: Json | None = None
            for line in await self.lines():
                if "id" in line and number in (0, line["id"]):
                    found = line
                else:
                    self.pushes.append(line.get("push", line))
            if found is not None:
                return found

    async def publications(self) -> list[Json]:
        """Publications to it: those that wait in `pushes`, or the next that come."""
        while True:
            found = [push["pub"] for push in self.pushes if "pub" in push]
            self.pushes.clear()
            if found:
                return found
            for line in await self.lines():
                self.pushes.append(line.get("push", line))

    async def ending(self, seconds: float = 10.0) -> str:
        """Read on to the end: `close CODE`, `EOF` or `RST`; `open` if none comes."""
        with trio.move_on_after(seconds):
            try:
                while True:
                    await self.message()
            except Ended as ended:
                return ended.how
        return "open"

    async def drain(self, rate: float = 0.0, chunk: int = 2**18) -> None:
        """Read on and throw away, at most `rate` bytes a second if one is given."""
        began = trio.current_time()
        received = 0
        while True:
            received += len(await self.read(chunk))
            if rate:
                await trio.sleep_until(began + received / rate)

    async def follow(self, rate: float, most: int = 2**16) -> None:
        """The same for a WebSocket, which is told of a Close frame long before the end: raises
        `Ended` there. Pings are answered. At most `most` bytes are taken at a time."""
        began, before = trio.current_time(), self.received
        self._most = most
        while True:
            await self.message()
            await trio.sleep_until(began + (self.received - before) / rate)

    async def aclose(self) -> None:
        """Go away without a word."""
        await trio.aclose_forcefully(self.stream)

    async def _more(self, most: int = 2**18) -> None:
        try:
            data = await self.stream.receive_some(min(most, self._most))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise Ended("RST") from None
        if not data:
            raise Ended("RST" if self._was_reset else "EOF")
        self.received += len(data)
        self._buffer += data

    def _take(self, size: int) -> bytes:
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken


def said(reply: Json) -> str:
    """The word of a reply: `ok`, or `error 107`."""
    return f"error {reply['error']['code']}" if "error" in reply else "ok"


def result(reply: Json) -> Json:
    """The result in a reply. Raises `Ended` with `error 107` where it is a refusal."""
    if "error" in reply:
        raise Ended(said(reply))
    found: Json = next(value for key, value in reply.items() if key != "id")
    return found
