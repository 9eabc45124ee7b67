"""A heap from whose middle nothing is taken out: an entry that counts no more stays until it is swept away.

Rule: no step takes long, however many entries there are. Where those that do not count are the most, each push
sweeps a few, and so does whoever makes one cease to count; to build the heap anew would be one step of 60 ms with
50,000 entries.
"""

import heapq
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

import attrs

E = TypeVar("E", bound=tuple[Any, ...])

SWEPT: Final = 4
"""Entries that are looked at in one sweep: so a heap is swept before it is twice as large again."""

_FEW: Final = 64
"""Entries that are not worth a sweep."""


@attrs.define(eq=False)
class LazyHeap(Generic[E]):
    """Entries, the least first. `counts` says whether one still counts.

    After a push it has no more of them than three times those that count, and a hundred; at any time where
    `sweep` is called for each that counts no more.
    """

    counts: Callable[[E], bool]
    _entries: list[E] = attrs.field(init=False, factory=list)
    _unswept: list[E] = attrs.field(init=False, factory=list)
    """A heap too: to take the last of a heap leaves it one."""

    def __len__(self) -> int:
        return len(self._entries) + len(self._unswept)

    def push(self, entry: E, counted: int) -> None:
        """Add an entry; `counted` of all entries count, or more. Logarithmic, and not amortised."""
        heapq.heappush(self._entries, entry)
        self.sweep(counted)

    def sweep(self, counted: int) -> None:
        """Look at a few entries where many count no more; `counted` do, or more."""
        if self._unswept:
            for each in self._unswept[-SWEPT:]:
                if self.counts(each):
                    heapq.heappush(self._entries, each)
            del self._unswept[-SWEPT:]
        elif len(self._entries) > 2 * counted + _FEW:
            self._entries, self._unswept = self._unswept, self._entries

    def first(self) -> E | None:
        """The least entry, whether it counts or not; None if there is none."""
        heap = self._least()
        return heap[0] if heap else None

    def pop(self) -> E:
        """Take out the least entry. Raises `IndexError` if there is none."""
        return heapq.heappop(self._least())

    def _least(self) -> list[E]:
        entries, unswept = self._entries, self._unswept
        is_unswept = unswept and not (entries and entries[0] <= unswept[0])
        return unswept if is_unswept else entries
