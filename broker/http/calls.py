"""One request to the HTTP API while it is carried out: its turns on the loop, and the room in its answer.

Rules:

1. The work between two turns is one atomic step. The connection that asked pays for it before anybody else
   runs, by the work that was done.
2. A list is written piece by piece, each in a turn of its own; it is of the moment in which it was begun,
   less what has gone since.
3. Before each step the key is asked for again: a reload may have changed it. Nothing that was done is taken back.
4. A method that only reads is bounded by the room that the answer has left. A change is always told.
"""

from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Final, TypeVar

import attrs
from msgspec import Raw

from broker.core.work import Meter
from broker.errors import ErrorCode, Refused
from broker.protocols.json_text import written
from broker.routing.turns import Share

T = TypeVar("T")


class KeyGone(Exception):
    """The key that a request has shown is no longer the one that is set."""


PIECE: Final = 100
"""Entries of a list between two turns: 0.2 ms."""


def pieces(entries: Sequence[T], size: int = PIECE) -> Iterator[Sequence[T]]:
    """The entries in their order, so many at a time."""
    for start in range(0, len(entries), size):
        yield entries[start : start + size]


@attrs.define(eq=False)
class Call:
    """One request. `share` is that of the connection that asked, `room` the bytes that lists may still
    take of its answer."""

    share: Share
    meter: Meter
    room: int
    traceparent: str = ""
    """The trace that the request belongs to (W3C Trace Context)."""
    may_go_on: Callable[[], bool] = lambda: True
    """Whether its key is still the one that is set."""
    _begun_at: float = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._begun_at = self.meter.done

    async def turn(self, work: float = 0.0) -> None:
        """End a step, and wait until the next, of about so much work, may begin.

        Returns at once, without a checkpoint, if it may now. Cancelled, what was done is done. Raises `KeyGone`.
        """
        done = self.meter.done
        self.share.spend(done - self._begun_at)
        await self.share.wait_room(work)
        self._begun_at = self.meter.done
        self.check()

    def check(self) -> None:
        """Raise `KeyGone` where the request may no longer be carried out."""
        if not self.may_go_on():
            raise KeyGone

    async def aside(self, wait: Callable[[], Awaitable[T]]) -> T:
        """End a step, and wait for something that is no turn, such as what other nodes answer. Raises `KeyGone`
        behind it."""
        result = await self.finish(wait)
        self.check()
        return result

    async def finish(self, wait: Callable[[], Awaitable[T]]) -> T:
        """The same for the end of a change that has begun, which is told whatever has become of the key."""
        self.settle()
        result = await wait()
        self._begun_at = self.meter.done
        return result

    def settle(self) -> None:
        """Charge what was done since the last turn. To be called before anybody else runs."""
        self.share.spend(self.meter.done - self._begun_at)
        self._begun_at = self.meter.done


@attrs.define(eq=False)
class Listing:
    """A JSON list or object that is written entry by entry."""

    room: int | None
    """The most bytes that it may take; None where all of it has to be told."""
    size: int = attrs.field(init=False, default=2)
    _entries: list[bytes] = attrs.field(init=False, factory=list)

    def __len__(self) -> int:
        return len(self._entries)

    def fits(self, entry: bytes) -> bool:
        """Whether there is room for this one as well."""
        return self.room is None or self.size + len(entry) + 1 <= self.room

    def add(self, entry: bytes) -> None:
        """Put one entry behind the others. Raises `Refused` (106) if there is no room for it."""
        if not self.fits(entry):
            text = "the answer would be too long: ask for less, or in a request of its own"
            raise Refused(ErrorCode.LIMIT_EXCEEDED, text)
        self.size += len(entry) + 1
        self._entries.append(entry)

    def as_list(self) -> Raw:
        return Raw(b"[%b]" % b",".join(self._entries))

    def as_object(self) -> Raw:
        return Raw(b"{%b}" % b",".join(self._entries))


def member(name: str, value: object) -> bytes:
    """One member of a JSON object, as it is written."""
    return b"%b:%b" % (written(name), written(value))
