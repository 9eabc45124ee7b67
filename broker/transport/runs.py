"""Runs, of which outboxes hold lists, and the memory that the runs of a post office take.

A run is shared by all outboxes that it was put into, so it is never changed. An outbox that drops
the front of one keeps a `Rest` of it, which is its own; the bytes stay shared.
"""

import sys
from collections.abc import Iterator, Sequence

from broker.core.memory import Ledger
from broker.core.session import SlowRule

# Memory that Python needs beside the bytes, on 64-bit CPython 3.11: a run is an object of 104 bytes and a
# sequence of 64, a frame a bytes object with 33 of its own and a place in that sequence.
_RUN_OVERHEAD = 168
_FRAME_OVERHEAD = 41


class Run:
    """One outbox entry: the frames of `len(frames)` messages that go to everyone alike.

    `topic` is empty for what is not a publication; such a run is never dropped. Control frames
    are no messages: `messages` is 0 for them. `data` is all frames, joined.
    """

    __slots__ = (
        "_ledger",
        "bytes_held",
        "data",
        "first",
        "frames",
        "messages",
        "rule",
        "size",
        "topic",
    )

    frames: Sequence[bytes]
    data: bytes | memoryview
    size: int
    """Bytes that go out."""
    bytes_held: int
    """Bytes of memory that this run takes: where it has several frames, each byte twice."""

    def __init__(
        self,
        frames: Sequence[bytes],
        topic: str = "",
        rule: SlowRule = "close",
        *,
        messages: int = -1,
    ) -> None:
        self._ledger: Ledger | None = None
        count = len(frames)
        self.frames = frames
        self.first: int = 0
        """Which of the frames is the first that goes out."""
        self.topic: str = topic
        self.rule: SlowRule = rule
        if count == 1:
            self.data = data = frames[0]
            self.size = size = len(data)
            self.bytes_held = _RUN_OVERHEAD + _FRAME_OVERHEAD + size
        else:
            self.data = data = b"".join(frames)
            self.size = size = len(data)
            self.bytes_held = _RUN_OVERHEAD + count * _FRAME_OVERHEAD + 2 * size
        self.messages: int = count if messages < 0 else messages

    def enter(self, ledger: Ledger) -> None:
        """Count this run in `ledger` for as long as somebody needs it; once, in the first."""
        if self._ledger is None:
            self._ledger = ledger
            ledger.bytes_held += self.bytes_held

    def __del__(self) -> None:
        if self._ledger is not None:
            self._ledger.bytes_held -= self.bytes_held

    @property
    def last_size(self) -> int:
        """The bytes of its last frame."""
        return len(self.frames[-1]) if self.frames else 0

    def previews(self, most: int) -> Iterator[tuple[bytes, int]]:
        """The first bytes of each frame that goes out, at most so many, and its size. Nothing is put
        together for it."""
        for frame in self.frames[self.first :]:
            yield frame[:most], len(frame)

    @property
    def count(self) -> int:
        """How many frames go out; control frames are some."""
        return len(self.frames) - self.first

    def only(self, first: int, end: int) -> "Run":
        """A run of some of these frames, in the same ledger. Linear in them."""
        frames = self.frames[first:end]
        part = Run(frames, self.topic, self.rule, messages=min(len(frames), self.messages))
        if self._ledger is not None:
            part.enter(self._ledger)
        return part


class Rest(Run):
    """The frames that one outbox keeps of a run whose first ones it dropped: those from `first` on."""

    __slots__ = ("_whole",)

    def __init__(self, whole: Run) -> None:
        self._ledger = None
        self.bytes_held: int = _RUN_OVERHEAD + whole.bytes_held
        self._whole = whole  # is held, and counted, for as long as a part of it is
        self.frames: Sequence[bytes] = whole.frames
        self.first: int = whole.first
        self.topic: str = whole.topic
        self.rule: SlowRule = whole.rule
        self.data: bytes | memoryview = memoryview(whole.data)
        self.size: int = whole.size
        self.messages: int = whole.messages

    def drop_front(self, count: int, size: int) -> None:
        """Drop the next `count` frames, of `size` bytes together. Constant in what stays."""
        self.first += count
        self.messages -= count
        self.data = self.data[size:]
        self.size -= size

    def only(self, first: int, end: int) -> Run:
        return self._whole.only(first, end)


class SharedData:
    """Data that many late runs have in common: in `ledger`, once, for as long as one of them is there."""

    __slots__ = ("_ledger", "_size")

    def __init__(self, data: bytes, ledger: Ledger) -> None:
        self._ledger, self._size = ledger, len(data)
        ledger.bytes_held += self._size

    def __del__(self) -> None:
        self._ledger.bytes_held -= self._size


class LateRun(Run):
    """One large frame, put together when it begins to go out.

    Many runs of this kind have the same data, each with a few bytes of its own around it. Of a
    thousand that wait none has to be copied, and of those for one peer only the first. `shared` is
    held for as long as this is.
    """

    __slots__ = ("_pieces", "_shared")

    def __init__(
        self, pieces: tuple[bytes, bytes, bytes], topic: str, rule: SlowRule, shared: object
    ) -> None:
        self._ledger = None
        self._pieces = pieces
        self._shared = shared
        self.first = 0
        self.topic = topic
        self.rule: SlowRule = rule
        self.messages = 1
        self.size: int = sum(map(len, pieces))
        self.bytes_held: int = _RUN_OVERHEAD + 3 * _FRAME_OVERHEAD + self.size - len(pieces[1])

    def __getattr__(self, name: str) -> object:
        # Only asked for what has not been set.
        if name not in ("data", "frames"):
            raise AttributeError(name)
        data = b"".join(self._pieces)
        self.data: bytes | memoryview = data
        self.frames: Sequence[bytes] = (data,)
        self.bytes_held += self.size
        if self._ledger is not None:
            self._ledger.bytes_held += self.size
        return getattr(self, name)

    @property
    def last_size(self) -> int:
        return self.size

    @property
    def count(self) -> int:
        return 1

    def previews(self, most: int) -> Iterator[tuple[bytes, int]]:
        head, data, tail = self._pieces
        yield b"".join((head, data[:most], tail[: max(0, most - len(data))]))[:most], self.size


def _references_of_a_variable() -> int:
    run = Run(())
    return sys.getrefcount(run)


_OF_A_VARIABLE = _references_of_a_variable()


def share_of(runs: Sequence[Run], first: int, step: int) -> float:
    """The part of the memory of some runs, each `step`th from `first` on, that the holder of this list
    would set free by emptying it: what `n` lists hold belongs to each by an `n`th.

    CPython counts who holds a run, so no publication has to. 0.3 µs for each that is looked at.
    """
    whole = share = 0
    for place in range(first, len(runs), step):
        run = runs[place]
        if run is not GONE:
            held = run.bytes_held
            whole += held
            share += held // max(1, sys.getrefcount(run) - _OF_A_VARIABLE)
    return share / whole if whole else 0.0


GONE = Run(())
"""Stands in the place of a run that was dropped or is out, until the places are swept up."""
