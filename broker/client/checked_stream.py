"""The stream under trio-websocket: what a broker sends is checked before anything parses it.

trio-websocket waits for ever when the handshake fails, keeps any number of empty fragments and
of refusals' bytes, and knows no bound for control frames. Here each of these ends the connection
with a `Lost` that says why.

Rules:

1. `Handshake` and `FrameWatch` see bytes only: no stream, no clock.
2. Nothing is changed or kept back: what passes is what the broker sent.
3. What trio-websocket judges well itself is left to it: UTF-8, the order of fragments, Close frames.
"""

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
"""Bytes of the head of the broker's answer: what h11 takes, and twice what our broker takes."""

MAX_FRAGMENTS: Final = 1024
"""Frames of one message: what our broker allows its peers. 1,024 of 16 KiB are the largest."""

CONTROL_FRAMES_PER_SECOND: Final = 20
CONTROL_FRAMES_BURST: Final = 100
"""Pings, pongs and Closes: what our broker allows its peers. One ping in 20 s is usual."""

_STATUS_LINE: Final = re.compile(rb"HTTP/1\.[01] ([0-9]{3})(?: [^\r\n]*)?\r\n")
_LOCATION: Final = re.compile(rb"\r\nlocation:[ \t]*([^\r\n]*)", re.IGNORECASE)
# Which fields wsproto reads as ASCII.
_UPGRADE_FIELDS: Final = re.compile(
    rb"\r\n(?:connection|upgrade|sec-websocket-[a-z]+):[^\r\n]*[^\x00-\x7f\r\n]", re.IGNORECASE
)
_CONTINUATION: Final = 0x0
_DATA: Final = (0x0, 0x1, 0x2)
_CONTROL: Final = (0x8, 0x9, 0xA)


class Handshake:
    """The head of the broker's answer to the handshake, as far as it has come."""

    def __init__(self) -> None:
        self._head = bytearray()

    def receive(self, data: bytes | bytearray) -> bytes | None:
        """Take bytes; what came behind the head once that is complete, None before.

        Raises `Lost` when the answer is not HTTP, not a 101, or its head too long.
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
        head, behind = bytes(self._head[: end + 4]), bytes(self._head[end + 4 :])
        self._head = bytearray()
        _check_answer(head)
        return behind


def _check_answer(head: bytes) -> None:
    match = _STATUS_LINE.match(head)
    if match is None:
        raise Lost(CloseCode.ABNORMAL, "the answer is not HTTP")
    status = int(match[1])
    if status != 101:
        text = f"the answer is HTTP {status}, not WebSocket"
        location = _LOCATION.search(head)
        if 300 <= status < 400 and location is not None:
            text += f"; it points to {location[1].decode('latin-1')[:200]!r}"
        raise Lost(CloseCode.ABNORMAL, text)
    if _UPGRADE_FIELDS.search(head):
        raise _bad_handshake()


def _bad_handshake() -> Lost:
    # A wrong accept key, another protocol or an extension that nobody asked for.
    return Lost(CloseCode.ABNORMAL, "the answer is HTTP 101, but no valid WebSocket handshake")


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

    trio-websocket lets that exception out, and so ends with it. `opened` is for its owner to set,
    once the handshake is done: from then on closing is nothing unusual.
    """

    _stream: trio.abc.Stream
    opened: bool = False
    _handshake: Handshake | None = attrs.field(factory=Handshake)
    _frames: FrameWatch = attrs.field(factory=FrameWatch)

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        try:
            data = await self._stream.receive_some(max_bytes)
        except trio.BrokenResourceError as error:
            if self.opened:
                raise
            raise _unanswered(error) from error
        if not data and not self.opened:
            raise _unanswered(None)
        frames: bytes | bytearray | None = data
        if self._handshake is not None:
            frames = self._handshake.receive(data)
            if frames is not None:
                self._handshake = None
        if frames:
            self._frames.receive(frames, trio.current_time())
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        try:
            await self._stream.send_all(data)
        except trio.BrokenResourceError as error:
            if self.opened:
                raise
            raise _unanswered(error) from error

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self._stream.aclose()
        if not self.opened:
            # Who closes now is trio-websocket, on an answer that it does not like; it would then
            # wait for another one for ever.
            raise _bad_handshake()


def _unanswered(error: BaseException | None) -> Lost:
    why = "" if error is None or error.__cause__ is None else f": {error.__cause__}"
    return Lost(CloseCode.ABNORMAL, f"closed before the WebSocket handshake was answered{why}")
