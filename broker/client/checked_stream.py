"""The stream under trio-websocket: bytes of a broker are checked before anything parses it.

trio-websocket waits for ever, or raises what h11 raises, when the handshake fails; it keeps any
number of empty fragments and of a refusal's bytes, and knows no bound for control frames. Here each
of these ends the connection with a `Lost` that says why.

Rules:

1. Rules for the handshake are at least as strict as those of h11 and wsproto.
2. `Handshake` and `FrameWatch` see bytes only: no stream, no clock.
3. Nothing is changed or kept back: bytes that pass are those that the broker sent.
4. Checks that trio-websocket makes well are left to it: UTF-8, the order of fragments, Close frames.
"""

import base64
import hashlib
import re
from typing import Final

import attrs
import trio

from broker.client.loss import Lost, TooLarge, foreign
from broker.errors import CloseCode

MAX_MESSAGE_BYTES: Final = 16 * 2**20
"""Bytes of one message, whole or in fragments. A recovery reply holds all that a topic keeps:
100 publications by default, of 160 KiB each to fill this."""

HEAD_BYTES: Final = 16 * 2**10
"""Bytes of the head of the broker's answer: as many as h11 takes, and twice as many as our broker
takes."""

MAX_FRAGMENTS: Final = 1024
"""Frames of one message: as many as our broker allows its peers. 1,024 of 16 KiB are the largest."""

CONTROL_FRAMES_PER_SECOND: Final = 20
CONTROL_FRAMES_BURST: Final = 100
"""Pings, pongs and Closes: as many as our broker allows its peers. One ping in 20 s is usual."""

# RFC 9112 sections 4 and 5, and no laxer than h11, which raises for the rest.
_STATUS_LINE: Final = re.compile(rb"HTTP/1\.([01]) ([0-9]{3})(?: [\t -~\x80-\xff]*)?")
_FIELD_LINE: Final = re.compile(
    rb"([-!#$%&'*+.^_`|~0-9A-Za-z]+):[ \t]*([\t -~\x80-\xff]*?)[ \t]*",
)
_ACCEPT_GUID: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 section 1.3
_KEY: Final = re.compile(rb"\r\nSec-WebSocket-Key: *([^\r\n]*)", re.IGNORECASE)

_CONTINUATION: Final = 0x0
_DATA: Final = (0x0, 0x1, 0x2)
_CONTROL: Final = (0x8, 0x9, 0xA)


class Handshake:
    """Our request, and the head of the broker's answer as far as it has come."""

    def __init__(self) -> None:
        self._key: bytes | None = None
        self._head = bytearray()

    def send(self, request: bytes) -> None:
        """Learn the key that a good answer proves to have read."""
        if self._key is None and (match := _KEY.search(request)) is not None:
            self._key = match[1]

    def receive(self, data: bytes | bytearray) -> bytes | None:
        """Take bytes; return those behind the head once that is complete, None before.

        Raises `Lost` when the answer is not HTTP, its head too long, not a 101, or not the one
        that RFC 6455 section 4.1 asks for. An answer that passes makes neither h11 nor wsproto raise.
        """
        searched = max(0, len(self._head) - 3)
        self._head += data
        if not b"HTTP/1.".startswith(bytes(self._head[:7])):
            raise Lost(CloseCode.ABNORMAL, "the answer is not HTTP")
        end = self._head.find(b"\r\n\r\n", searched)
        if end < 0 and len(self._head) <= HEAD_BYTES:
            return None
        if end < 0 or end > HEAD_BYTES:
            raise Lost(
                CloseCode.ABNORMAL, f"the head of the answer is longer than {HEAD_BYTES:,} bytes"
            )
        head, behind = bytes(self._head[:end]), bytes(self._head[end + 4 :])
        self._head = bytearray()
        self._check(head)
        return behind

    def _check(self, head: bytes) -> None:
        first, *lines = head.split(b"\r\n")
        match = _STATUS_LINE.fullmatch(first)
        if match is None:
            raise Lost(CloseCode.ABNORMAL, "the answer is not HTTP")
        minor, status = match[1], int(match[2])
        fields: dict[bytes, list[bytes]] = {}
        for line in lines:
            field = _FIELD_LINE.fullmatch(line)
            if field is None:
                raise Lost(CloseCode.ABNORMAL, "the answer is not HTTP: a header line is wrong")
            fields.setdefault(field[1].lower(), []).append(field[2])
        if status != 101:
            text = f"the answer is HTTP {status}, not WebSocket"
            if 300 <= status < 400 and b"location" in fields:
                location = fields[b"location"][0].decode("latin-1")[:200]
                text += f"; it points to {location!r}"
            raise Lost(CloseCode.ABNORMAL, text)
        wrong = self._wrong(fields) if minor == b"1" else "it is HTTP/1.0"
        if wrong is not None:
            raise Lost(
                CloseCode.ABNORMAL,
                f"the answer is HTTP 101, but no valid WebSocket handshake: {wrong}",
            )

    def _wrong(self, fields: dict[bytes, list[bytes]]) -> str | None:
        """The fault in the fields of a 101; None if there is none."""
        digest = hashlib.sha1((self._key or b"") + _ACCEPT_GUID, usedforsecurity=False).digest()
        connection = b",".join(fields.get(b"connection", [])).lower()
        if b"upgrade" not in [token.strip() for token in connection.split(b",")]:
            return "the header Connection: Upgrade is missing"
        if not connection.isascii():
            return "the header Connection is not ASCII"
        if [value.lower() for value in fields.get(b"upgrade", [])] != [b"websocket"]:
            return "the header Upgrade: websocket is missing"
        if fields.get(b"sec-websocket-accept") != [base64.b64encode(digest)]:
            return "Sec-WebSocket-Accept does not fit our key"
        for name in (b"sec-websocket-extensions", b"sec-websocket-protocol"):
            if name in fields:
                return f"{name.decode()} names what was not asked for"
        if b"content-length" in fields or b"transfer-encoding" in fields:
            return "it announces a body"
        return None


class FrameWatch:
    """Where one frame ends and the next begins, and whether a server may send such frames."""

    def __init__(self) -> None:
        self._header = bytearray()  # of a frame whose header is not complete
        self._to_skip = 0  # bytes of payload that are yet to come
        self._message_bytes = 0
        self._fragments = 0
        self._allowance = float(CONTROL_FRAMES_BURST)
        self._counted_at = 0.0

    def receive(self, data: bytes | bytearray, now: float) -> None:
        """Follow what came at the time `now`, in seconds of any clock.

        Raises `Lost`: 1002 for a frame that no server may send (RFC 6455 sections 5.1 to 5.5),
        1009 for a message that is too large, as soon as a header says so, or in too many
        fragments, 1008 for a flood of control frames.
        """
        at, end = 0, len(data)
        while at < end:
            if self._to_skip:
                step = min(self._to_skip, end - at)
                self._to_skip -= step
                at += step
                continue
            header = self._header
            if len(header) < 2:
                header.append(data[at])
                at += 1
                if len(header) < 2:
                    continue
            wanted = {126: 4, 127: 10}.get(header[1] & 0x7F, 2)
            step = min(wanted - len(header), end - at)
            header += data[at : at + step]
            at += step
            if len(header) == wanted:
                length = int.from_bytes(header[2:], "big") if wanted > 2 else header[1] & 0x7F
                self._begin(header[0], bool(header[1] & 0x80), length, now)
                self._to_skip = length
                header.clear()

    def _begin(self, first: int, masked: bool, length: int, now: float) -> None:
        opcode = first & 0x0F
        if masked:
            raise foreign("a masked frame")
        if first & 0x70:
            raise foreign("a compressed frame, which nobody has asked for")
        if opcode in _CONTROL:
            self._count_control(now)
            return  # fragmented or too long: for wsproto to say
        if opcode not in _DATA:
            raise foreign(f"a frame of the unknown kind {opcode}")
        if opcode != _CONTINUATION:
            self._message_bytes = self._fragments = 0
        self._fragments += 1
        self._message_bytes += length
        if self._message_bytes > MAX_MESSAGE_BYTES:
            raise TooLarge(f"a message of more than {MAX_MESSAGE_BYTES:,} bytes")
        if self._fragments > MAX_FRAGMENTS:
            raise TooLarge(f"a message in more than {MAX_FRAGMENTS:,} fragments")

    def _count_control(self, now: float) -> None:
        earned = (now - self._counted_at) * CONTROL_FRAMES_PER_SECOND
        self._allowance = min(CONTROL_FRAMES_BURST, self._allowance + earned) - 1
        self._counted_at = now
        if self._allowance < 0:
            raise foreign(
                f"more than {CONTROL_FRAMES_PER_SECOND} control frames a second",
                CloseCode.POLICY_VIOLATION,
            )


@attrs.define(eq=False)
class CheckedStream(trio.abc.Stream):
    """A stream to a broker that raises `Lost` for an answer which cannot be a broker's.

    trio-websocket lets that exception out, and so ends with it. It may wrap it meanwhile, which
    is of no interest, so `lost` has it too.
    """

    _stream: trio.abc.Stream
    lost: Lost | None = None
    _handshake: Handshake | None = attrs.field(factory=Handshake)
    _frames: FrameWatch = attrs.field(factory=FrameWatch)

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        try:
            data = await self._stream.receive_some(max_bytes)
        except trio.BrokenResourceError as error:
            raise self._unanswered(error) from error
        try:
            self._check(data)
        except Lost as lost:
            self.lost = lost
            raise
        return data

    def _check(self, data: bytes | bytearray) -> None:
        frames: bytes | bytearray | None = data
        if self._handshake is not None:
            if not data:
                raise _ended(None)
            frames = self._handshake.receive(data)
            if frames is not None:
                self._handshake = None
        if frames:
            self._frames.receive(frames, trio.current_time())

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if self._handshake is not None:
            self._handshake.send(bytes(data))
        try:
            await self._stream.send_all(data)
        except trio.BrokenResourceError as error:
            raise self._unanswered(error) from error

    def _unanswered(self, error: trio.BrokenResourceError) -> Exception:
        """Until the handshake is answered, trio-websocket would wait for ever after an end."""
        if self._handshake is None:
            return error
        self.lost = _ended(error)
        return self.lost

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self._stream.aclose()


def _ended(error: BaseException | None) -> Lost:
    why = "" if error is None or error.__cause__ is None else f": {error.__cause__}"
    return Lost(CloseCode.ABNORMAL, f"closed before the WebSocket handshake was answered{why}")
