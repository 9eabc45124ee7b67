"""Publications that an engine has yet to keep, or topics to read back: in whose turn each goes, and whether there is
room for more.

Rules:

1. The parties that publish have fair parts of each batch (`core.fair_queue`): one that floods waits for
   itself.
2. Room is for all together, and for little of a party there always is some. So parties that fill it keep
   nobody else waiting.
"""

from collections.abc import Callable, Iterator
from typing import Final, Generic, Protocol, TypeVar

import attrs
import trio

from broker.core.fair_queue import FairQueue

FULL_BYTES: Final = 4 * 2**20
"""So much may be on its way until publishers wait."""

BATCH_PUBLICATIONS: Final = 2048
BATCH_BYTES: Final = 2**20
"""Publications, and bytes of them, that are kept together: 10 ms to commit and 4 ms to give back. Four times as
many are no faster, and whoever publishes one waits for all that is under way, and then for its own."""

LITTLE_BYTES: Final = 16 * 2**10
"""A party that will have no more than that on its way does not wait: a second of a usual client, and of a
thousand of them four times as much as may be on its way of all others."""


class Waits(Protocol):
    """Something that is put: `party` is who pays for it, None this program; `weight` in bytes."""

    @property
    def weight(self) -> int: ...
    @property
    def party(self) -> object: ...


W = TypeVar("W", bound=Waits)


@attrs.define(eq=False)
class Waiting(Generic[W]):
    """See the module. Something that was taken counts until it is `over`."""

    bytes: int = attrs.field(init=False, default=0)
    _queue: FairQueue[W] = attrs.field(init=False, factory=FairQueue)
    _of: dict[object, int] = attrs.field(init=False, factory=dict)
    _room: trio.Event = attrs.field(init=False, factory=trio.Event)

    def __len__(self) -> int:
        """How many have yet to be taken."""
        return len(self._queue)

    def __iter__(self) -> Iterator[W]:
        return iter(self._queue)

    def put(self, item: W, topic: str = "") -> None:
        """Add something; of one topic all is taken in the order in which it was put."""
        weight, party = item.weight, item.party
        self.bytes += weight
        self._of[party] = self._of.get(party, 0) + weight
        self._queue.put(item, weight, party, topic)

    def take(self) -> W:
        """Take what is next. Raises `IndexError` if there is nothing."""
        return self._queue.take()

    def take_row(self, joins: Callable[[W, W], bool]) -> list[W]:
        """Take what is next, and with it what is right behind it in its line and joins it; see `FairQueue`."""
        return self._queue.take_row(joins)

    def remove(self, goes: Callable[[W], bool]) -> list[W]:
        """Take out those of which this is true. Linear in all."""
        return self._queue.remove(goes)

    def clear(self) -> list[W]:
        """Take out all."""
        return self._queue.clear()

    def over(self, item: W) -> None:
        """It is on its way no longer; say so once."""
        was_full = self.bytes >= FULL_BYTES
        weight, party = item.weight, item.party
        self.bytes -= weight
        left = self._of[party] - weight
        if left:
            self._of[party] = left
        else:
            del self._of[party]
        if was_full:
            room, self._room = self._room, trio.Event()
            room.set()

    def is_full(self, party: object = None, size: int = LITTLE_BYTES) -> bool:
        """Whether a party should wait with so many bytes more."""
        return self.bytes >= FULL_BYTES and self._of.get(party, 0) + size > LITTLE_BYTES

    async def wait_room(self) -> None:
        """Wait until there is room for all. Cancelled, nothing happens."""
        await trio.lowlevel.checkpoint()
        while self.bytes >= FULL_BYTES:
            await self._room.wait()
