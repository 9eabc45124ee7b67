"""Messages that come compressed, inflated in small steps (RFC 7692 section 7.2.2).

Rules:

1. One step takes at most `STEP_BYTES` and makes at most `PIECE_BYTES`, whatever the peer has sent. It
   says what it will cost before it is taken, so that the caller can let others go first.
2. Nothing here holds more than one message, and none that is larger than it may be.
3. A message that is not one whole DEFLATE stream up to its end is refused: nothing is guessed.
"""

import zlib
from collections.abc import Iterator
from typing import Final

import attrs

from broker.core.work import (
    INFLATE_STEP,
    INFLATED,
    INFLATED_KILOBYTE,
    OVERHEAD_KILOBYTE,
    TAKEN_KILOBYTE,
)
from broker.transport.extensions import Deflate, window_bytes
from broker.transport.frames import TEXT, Buffer

STEP_BYTES: Final = 4 * 2**10
"""Nobody but a fuzzer sends 4 KiB that become nothing; they may take 0.5 ms, all tables and no data."""

PIECE_BYTES: Final = 64 * 2**10
"""0.15 ms of the densest bomb."""

_TAIL = b"\x00\x00\xff\xff"  # which each sender takes off
_LAST = (
    b"\x03\x00"  # a last block with nothing in it: legal where a block has ended, and nowhere else
)


class BadDeflate(Exception):
    """A message is no DEFLATE, or its text is no UTF-8."""


class TooLarge(Exception):
    """More comes out of a message than one may have."""


@attrs.define(eq=False)
class Inflated:
    """Counts of all messages that came compressed: those that were whole, and bytes as they came and inflated."""

    messages: int = 0
    bytes_before: int = 0
    bytes_after: int = 0


class Inflater:
    """The messages of one peer with which `deflate` was agreed on, one after the other.

    A message begins with `begin`; its frames are given to `inflate`, and `take` returns it.
    """

    __slots__ = ("_came", "_deflate", "_inflated", "_opcode", "_pieces", "_zlib", "size")

    def __init__(self, deflate: Deflate, inflated: Inflated) -> None:
        self._deflate = deflate
        self._inflated = inflated
        self._opcode = 0
        self._came = 0  # bytes of the open message, as they came
        self._pieces: list[bytes] = []
        self._zlib: zlib._Decompress | None = None
        self.size: int = 0
        """Bytes of the open message so far, inflated."""

    @property
    def is_open(self) -> bool:
        """Whether a message has begun and not ended."""
        return bool(self._opcode)

    @property
    def open_bytes(self) -> int:
        """Bytes that are held for the open message. A window that stays in any case is counted elsewhere."""
        window = 0 if self._deflate.client_keeps else window_bytes(self._deflate.client_bits)
        return self.size + window

    def begin(self, opcode: int) -> None:
        self._opcode = opcode

    def inflate(self, data: bytes, limit: int, *, is_last: bool) -> Iterator[float]:
        """Inflate the payload of one frame; `is_last`: the message ends with it.

        Before each step it yields what that costs. Raises `BadDeflate`, and `TooLarge` as soon as
        there are more than `limit` bytes.
        """
        work = INFLATED
        self._inflated.bytes_before += len(data)
        self._came += len(data)
        for start in range(0, len(data) or 1, STEP_BYTES):
            rest = data[start : start + STEP_BYTES]
            if is_last and start + STEP_BYTES >= len(data) and self._came:
                rest += _TAIL
            work += len(rest) / 1024 * TAKEN_KILOBYTE
            while rest:
                yield work
                size, before = self.size, len(rest)
                rest = self._step(rest, limit)
                made = self.size - size
                overhead = max(0, before - len(rest) - made)
                work = (
                    INFLATE_STEP
                    + made / 1024 * INFLATED_KILOBYTE
                    + overhead / 1024 * OVERHEAD_KILOBYTE
                )
        yield work
        if is_last:
            self._check_end()

    def _step(self, rest: bytes, limit: int) -> bytes:
        """Inflate a piece, and return what was not needed for it."""
        if self._zlib is None:
            self._zlib = zlib.decompressobj(-self._deflate.client_bits)
        # One more than there may be, so that a message of just the limit is none too many.
        most = min(PIECE_BYTES, limit - self.size + 1)
        try:
            piece = self._zlib.decompress(rest, most)
        except zlib.error:
            raise BadDeflate("bad deflate data") from None
        if piece:
            self._pieces.append(piece)
            self.size += len(piece)
            self._inflated.bytes_after += len(piece)
        if self.size > limit:
            raise TooLarge
        if not self._zlib.eof:
            return self._zlib.unconsumed_tail
        # The last block of its stream. There may be another one behind it (section 7.2.3.4).
        rest, self._zlib = self._zlib.unused_data, None
        return b"" if rest == _TAIL else rest

    def _check_end(self) -> None:
        """Raise `BadDeflate` if the message has ended in the middle of a block."""
        stream = self._zlib
        if stream is None or not self._came:  # an empty message is not owed so much as a block
            return
        if self._deflate.client_keeps:
            stream = stream.copy()
        try:
            if stream.decompress(_LAST, 1) or not stream.eof:
                raise BadDeflate("deflate data without an end")
        except zlib.error:
            raise BadDeflate("bad deflate data") from None

    def take(self) -> tuple[int, bytes]:
        """End the open message and return it. Raises `BadDeflate` for text that is no UTF-8."""
        opcode, pieces = self._opcode, self._pieces
        self._inflated.messages += 1
        payload = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        self.drop()
        if opcode == TEXT and not payload.isascii():
            try:
                payload.decode()
            except UnicodeDecodeError:
                raise BadDeflate("text that is no UTF-8") from None
        return opcode, payload

    def drop(self) -> None:
        """Forget the open message, and what stays between two only if that was agreed on."""
        self._opcode = self._came = self.size = 0
        self._pieces = []
        if not self._deflate.client_keeps:
            self._zlib = None

    def let_go(self) -> None:
        """Forget everything. The last call."""
        self.drop()
        self._zlib = None


def preview(payload: Buffer, most: int) -> bytes:
    """The first bytes of what a message of ours says, by the first bytes of its payload; at most so many."""
    try:
        return zlib.decompressobj(-15).decompress(payload, most)
    except zlib.error:
        return b""
