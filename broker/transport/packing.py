"""Frames that go out compressed, where a peer has agreed to that (RFC 7692 section 7.2.1).

Rules:

1. Each message is compressed by itself, so one result is right for all with the same window, and
   nothing is kept for a peer: zlib's 100 KB are there for the moment.
2. A message goes as it is when it is small, when that is no larger, and when compressing has had
   its part of the time (`core.work.DEFLATE_SHARE`). Each says by itself which of the two it is.
3. The work is charged in the step in which it is done, and so to the sender of the message.
"""

import zlib
from typing import Final

import attrs
import trio

from broker.config.reload import Settings
from broker.core.work import (
    DEFLATE_BURST,
    DEFLATE_SHARE,
    DEFLATED,
    DEFLATED_KILOBYTE,
    Meter,
)
from broker.transport import frames
from broker.transport.extensions import NARROWEST

LEVEL: Final = 3
"""zlib's. Of 1 KiB of JSON it makes 355 bytes in 10 µs; level 1 makes 363 as fast, level 6 339 in 13. Of 64 KiB
20, 23 and 17 %, in 620, 375 and 1,740 µs."""

MEMORY_LEVEL: Final = 5
"""zlib's. With 8, which is usual, most of the time goes into clearing tables: 1 KiB takes 35 µs, of which
a window of full size makes 85. The result is as small."""

_LOOKAHEAD = 262  # by so much zlib looks less far back than its window is wide

_DATA = (0x80 | frames.TEXT, 0x80 | frames.BINARY)
_STORED_MOST = 0xFFFF


@attrs.define(eq=False)
class Packing:
    """Counts of all messages that were compressed: how many, their bytes before and after. And the time that
    this may take."""

    settings: Settings
    meter: Meter
    messages: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    _left: float = attrs.field(init=False, default=DEFLATE_BURST)
    _at: float = attrs.field(init=False, default=0.0)

    def admits(self, size: int) -> bool:
        """Whether data of so many bytes are to be compressed now; they count as if they were."""
        config = self.settings.config
        if size < config.compression_min_bytes or not config.compression:
            return False
        work = DEFLATED + size / 1024 * DEFLATED_KILOBYTE
        now = trio.current_time()
        refill = (now - self._at) * DEFLATE_SHARE * 1_000_000
        self._left, self._at = min(DEFLATE_BURST, self._left + refill), now
        if work > self._left:
            return False
        self._left -= work
        self.meter.add(work)
        return True

    def note(self, before: int, after: int) -> None:
        self.messages += 1
        self.bytes_before += before
        self.bytes_after += after


@attrs.define(eq=False)
class Packer:
    """Compresses ready frames for peers who can read a window of so many `bits`."""

    packing: Packing
    bits: int
    _shared: bytes = attrs.field(init=False, default=b"")
    _shared_deflated: bytes = attrs.field(init=False, default=b"")

    def pack(self, frame: bytes) -> bytes:
        """One whole message in one frame, compressed if that is worth it. A control frame stays as it is.
        Costs 6 µs, and 10 for each kibibyte."""
        if frame[0] not in _DATA:
            return frame
        payload = frames.payload_of(frame)
        if not self.packing.admits(len(payload)):
            return frame
        deflated = _deflate(payload, self.bits)[:-4]
        if len(deflated) >= len(payload):
            self.packing.note(len(payload), len(payload))
            return frame
        self.packing.note(len(payload), len(deflated))
        return _header(frame[0], len(deflated)) + deflated

    def pack_pieces(self, pieces: tuple[bytes, bytes, bytes]) -> tuple[bytes, bytes, bytes]:
        """The same for a frame in three pieces, of which the middle one, the data, is compressed once for all
        in a row who have it between others."""
        head, data, tail = pieces
        start = frames.payload_of(head)
        if max(len(start), len(tail)) > _STORED_MOST or head[0] not in _DATA:
            return pieces
        if data != self._shared:  # most often it is the very same
            if not self.packing.admits(len(data)):
                return pieces
            self._shared, self._shared_deflated = data, _deflate(data, self.bits)
        # A block of each, and one more with nothing in it but its first byte: so the frame ends
        # as a message does whose last four bytes were taken off.
        head, deflated, tail = _stored(start), self._shared_deflated, _stored(tail) + b"\x00"
        before = len(start) + len(data) + len(pieces[2])
        size = len(head) + len(deflated) + len(tail)
        if size >= before:
            self.packing.note(before, before)
            return pieces
        self.packing.note(before, size)
        return _header(pieces[0][0], size) + head, deflated, tail


def _header(first: int, size: int) -> bytes:
    header = frames.header(first & 0x0F, size)
    return bytes((first | frames.RSV1,)) + header[1:]


def _deflate(data: bytes, bits: int) -> bytes:
    """DEFLATE blocks of all data, and an empty one, whose last four bytes are 00 00 ff ff."""
    # As wide as to see all of the data, and no wider: a window has to be cleared before.
    wanted = (len(data) + _LOOKAHEAD).bit_length()
    bits = min(bits, max(NARROWEST, wanted))
    deflater = zlib.compressobj(LEVEL, zlib.DEFLATED, -bits, MEMORY_LEVEL)
    return deflater.compress(data) + deflater.flush(zlib.Z_SYNC_FLUSH)


def _stored(data: bytes) -> bytes:
    """A block of up to 65,535 bytes as they are; nothing for nothing."""
    if not data:
        return b""
    size = len(data)
    return b"\x00" + size.to_bytes(2, "little") + (size ^ 0xFFFF).to_bytes(2, "little") + data
