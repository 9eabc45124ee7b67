"""The histories that a cleaning has copied in pieces, as the log is read again.

A topic that is too large for one piece is copied like this, and what is published to it meanwhile stands in
between::

    Stands("a", "e1", 500)   Older(first=401)   Run   Older(first=451)   Run   Older(first=481, is_last=True)

Rules:

1. All pieces are in the log before a row is deleted that they stand for. So wherever the log is cut, a topic is
   whole before `Stands`, or by the pieces behind it; where it is both, it is the same.
2. A piece says its epoch and its offsets, and so is told from an original, and from a piece of another cleaning.
3. A history gets the pieces when the last one was read: without that they have no use.
"""

from collections.abc import Callable, Sequence
from typing import Final

import attrs

from broker.core.history import HistoryStore
from broker.core.messages import Position, Publication
from broker.core.topic_history import History
from broker.engines.records import Older, Stands

NO_BOUND: Final = 2**62
"""Publications of a topic: what was copied is what was kept."""


@attrs.frozen
class _Part:
    """Publications in a row, the first of them at this offset."""

    first: int
    when: float
    ttl: float
    publications: Sequence[Publication]

    @property
    def end(self) -> int:
        """The offset behind them."""
        return self.first + len(self.publications)

    def between(self, first: int, end: int) -> "_Part":
        """Those from one offset up to before the other."""
        start = max(0, first - self.first)
        some = self.publications[start : max(start, end - self.first)]
        return _Part(self.first + start, self.when, self.ttl, some)


@attrs.define(eq=False)
class Copies:
    """The pieces that were read of topics whose last piece was not. At the end of a log they are of no use."""

    store: HistoryStore
    _of: dict[str, tuple[str, list[_Part]]] = attrs.field(init=False, factory=dict)
    """By topic its epoch, and the parts, without a gap."""

    def begin(self, record: Stands, now: float) -> None:
        """A topic stands here, and pieces follow."""
        topic, position = record.topic, Position(record.top, record.epoch)
        state = self.store.state(topic)
        if state is None or state[0] != position:  # what came before was deleted, or a part of that
            self.store.restore(topic, position, now)
        self._of[topic] = record.epoch, []

    def drop(self, topic: str) -> None:
        """All that a topic had up to here is gone."""
        self._of.pop(topic, None)

    def take(self, record: Older, now: float, when: Callable[[int], float]) -> None:
        """Read a piece. `when` gives the store's time for a record's."""
        topic = record.topic
        epoch, parts = self._of.get(topic, ("", []))
        state = self.store.state(topic)
        if state is None or not record.epoch == epoch == state[0].epoch:
            self.drop(topic)  # of another cleaning, whose beginning was deleted
            return
        front = _front(*state)
        if record.first < front:  # else the originals are here
            first = record.first
            for run in record.runs:
                for batch in run.batches:
                    part = _Part(first, when(run.at), run.ttl, batch.publications(topic))
                    if parts and parts[-1].end != first:
                        parts.clear()  # all before is gone, as that between is
                    parts.append(part)
                    first = part.end
        if record.is_last:
            self.drop(topic)
            fitting = [part.between(record.front, front) for part in parts]
            fitting = [part for part in fitting if part.publications]
            if fitting and fitting[-1].end == front:
                self._put_before(topic, fitting, *state, now)

    def _put_before(
        self,
        topic: str,
        parts: list[_Part],
        position: Position,
        history: History | None,
        now: float,
    ) -> None:
        """Put publications in front of those that a topic has. Linear in both."""
        if history is not None:
            parts += [
                _Part(each.offset, when, history.ttl, [each]) for when, each in history.dated()
            ]
        self.store.restore(topic, Position(parts[0].first - 1, position.epoch), now)
        for part in parts:
            self.store.extend(topic, part.publications, part.when, NO_BOUND, part.ttl)


def _front(position: Position, history: History | None) -> int:
    """The offset of the oldest publication that a topic has, or will have."""
    return position.offset + 1 - (0 if history is None else history.ring.count)
