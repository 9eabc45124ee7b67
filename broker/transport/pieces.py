"""The part of a frame that has come so far, in pieces of one size.

A read returns 64 KiB that are cut to what has come, and where such parts are kept, the heap is full of holes that the next
read does not fit in; a buffer that grows takes an eighth more than it needs. All that has come is copied, so that the
memory of the read is free at once, and pieces of one size fit in each other's place.
"""

from collections.abc import Iterator
from typing import Final

PIECE: Final = 4 * 2**10
"""Bytes of a piece. The last one may be nearly empty; all of it is charged."""


class Pieces:
    """Bytes that came one behind the other. `len` is how many."""

    __slots__ = ("_pieces", "_size")

    def __init__(self) -> None:
        self._pieces: list[bytearray] = []
        self._size = 0

    def __len__(self) -> int:
        return self._size

    @property
    def held(self) -> int:
        """Bytes of memory that they take."""
        return len(self._pieces) * PIECE

    def add(self, data: bytes | bytearray) -> None:
        """Copy these behind the others."""
        start = 0
        while start < len(data):
            at = self._size % PIECE
            if not at:
                self._pieces.append(bytearray(PIECE))
            part = data[start : start + PIECE - at]
            self._pieces[-1][at : at + len(part)] = part
            self._size += len(part)
            start += len(part)

    def join(self, before: bytes | bytearray, behind: bytes | bytearray) -> bytearray:
        """All of them between two others, in one."""
        return bytearray().join((before, *self._parts(), behind))

    def _parts(self) -> Iterator[bytearray]:
        left = self._size
        for piece in self._pieces:
            yield piece if left >= PIECE else piece[:left]
            left -= PIECE
