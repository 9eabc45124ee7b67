"""A queue of what several parties have put, each with a fair part: a party that puts a thousand times as much
as another waits for itself, and not the other for it.

Words: a *line* is what waits of one party, in its order; *time* here is what every line has been given, in the
weight of its items, and no clock's.

Rules:

1. The next item is the one with which its line will have been given least: so what is small does not wait for
   what is large. A line that comes, or comes back, begins at the time of now: nobody saves up.
2. Items of one topic are taken in the order in which they were put, whoever puts them: while any of it waits,
   more joins that line. So who publishes to a topic that somebody floods shares the line of the flood.
3. Nothing is linear in what waits, nor in the parties.
"""

import heapq
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final, Generic, TypeVar

import attrs

I = TypeVar("I")  # noqa: E741 - an item

SWEPT: Final = 2
"""Lines that a put looks at, to forget those that nothing waits in: so there are soon no more of them than
parties that put."""


@attrs.define(eq=False)
class _Line(Generic[I]):
    """`given` is the time up to which it had its part."""

    given: float
    items: deque[tuple[I, str, int]] = attrs.field(factory=deque)


@attrs.define(eq=False)
class FairQueue(Generic[I]):
    """See the module. A party is any object that can be a key; None is one as well."""

    _lines: dict[object, _Line[I]] = attrs.field(init=False, factory=dict)
    _due: list[tuple[float, int, _Line[I]]] = attrs.field(init=False, factory=list)
    """A heap of the lines in which something waits."""
    _of_topic: dict[str, tuple[_Line[I], int]] = attrs.field(init=False, factory=dict)
    """The line in which a topic waits, and how many of its items do."""
    _now: float = attrs.field(init=False, default=0.0)
    _length: int = attrs.field(init=False, default=0)
    _puts: int = attrs.field(init=False, default=0)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[I]:
        """All that waits, line by line. Nothing may be put or taken meanwhile."""
        for _, _, line in sorted(self._due, key=lambda due: due[:2]):
            for item, _, _ in line.items:
                yield item

    @property
    def parties(self) -> int:
        """How many have something that waits."""
        return len(self._due)

    def put(self, item: I, weight: int, party: object = None, topic: str = "") -> None:
        """Add an item of this weight; without a topic it keeps no order but its line's."""
        line, count = self._of_topic.get(topic, (None, 0)) if topic else (None, 0)
        if line is None:
            line = self._line_of(party)
        if topic:
            self._of_topic[topic] = line, count + 1
        if not line.items:
            line.given = max(line.given, self._now)
            self._puts += 1
            heapq.heappush(self._due, (line.given + weight, self._puts, line))
        line.items.append((item, topic, weight))
        self._length += 1

    def _line_of(self, party: object) -> _Line[I]:
        lines = self._lines
        line = lines.get(party)
        if line is None:
            line = lines[party] = _Line(self._now)
            for _ in range(SWEPT):
                oldest = next(iter(lines))
                each = lines.pop(oldest)
                if each is line or each.items or each.given > self._now:
                    lines[oldest] = each
        return line

    def take(self) -> I:
        """Take out the next item. Raises `IndexError` if there is none."""
        return self.take_row(_joins_nothing)[0]

    def take_row(self, joins: Callable[[I, I], bool]) -> list[I]:
        """Take out the next item, and with it those right behind it in its line, for as long as `joins` is true of
        the first of them and the one that would follow, of which it is asked once. The line pays for all of them.
        Raises `IndexError` if there is none."""
        due, _, line = self._due[0]
        waits = line.items
        item, topic, weight = waits.popleft()
        # Of now, and not of the last of the row: who comes next does not wait for what went out of its turn.
        self._now = due - weight
        row = [item]
        self._note_taken(topic)
        while waits and joins(row[0], waits[0][0]):
            item, topic, weight = waits.popleft()
            due += weight
            row.append(item)
            self._note_taken(topic)
        line.given = due
        if waits:
            self._puts += 1
            heapq.heapreplace(self._due, (due + waits[0][2], self._puts, line))
        else:
            heapq.heappop(self._due)
        self._length -= len(row)
        if not self._length:  # all begin anew
            self._lines.clear()
            self._now = 0.0
        return row

    def _note_taken(self, topic: str) -> None:
        if topic:
            line, count = self._of_topic[topic]
            if count > 1:
                self._of_topic[topic] = line, count - 1
            else:
                del self._of_topic[topic]

    def remove(self, goes: Callable[[I], bool]) -> list[I]:
        """Take out the items of which this is true; those that stay keep their order. Linear in all."""
        gone: list[I] = []
        for _, _, line in self._due:
            for item, topic, _ in line.items:
                if goes(item):
                    gone.append(item)
                    if topic:
                        _, count = self._of_topic[topic]
                        self._of_topic[topic] = line, count - 1
            line.items = deque(entry for entry in line.items if not goes(entry[0]))
        self._due = [entry for entry in self._due if entry[2].items]
        heapq.heapify(self._due)
        self._of_topic = {topic: on for topic, on in self._of_topic.items() if on[1]}
        self._length -= len(gone)
        return gone

    def clear(self) -> list[I]:
        """Take out all, in no order but each line's."""
        return self.remove(lambda item: True)


def _joins_nothing(first: object, item: object) -> bool:
    return False
