"""The topics in Redis that this node knows: their whole history, or the position alone.

Rules:

1. A topic that is known is true up to the place in the log that was read: each run is added as it is read,
   or the topic is known no longer.
2. Bounded in bytes. Beyond that the topic that was asked for longest ago gives way, and is fetched again when
   it is asked for. A topic that somebody listens to keeps its position, because the next run follows it.
3. A topic that is asked for at this moment, `pinned`, does not give way.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import attrs
import trio

from broker.core.history import HistoryStore
from broker.core.messages import Position, Publication, Series
from broker.core.work import COMMAND, PUBLICATION, SLICE
from broker.engines.redis_log import Logged
from broker.engines.redis_outgoing import decode_posted

UNBOUNDED: Final = 2**62
"""Bytes that the store itself may hold: the bound is kept here."""


def numbered(batches: Sequence[Sequence[Publication]], first: int) -> list[Sequence[Publication]]:
    """The same publications with their offsets; as they are where they have none."""
    if not first:
        return list(batches)
    found: list[Sequence[Publication]] = []
    for batch in batches:
        if isinstance(batch, Series):
            said = batch
            found.append(Series(said.topic, said.contents, said.info, first, said.opaque))
        else:
            found.append(
                [
                    Publication(p.topic, p.data, p.info, offset, p.time, p.tags, p.opaque)
                    for offset, p in enumerate(batch, first)
                ]
            )
        first += len(batch)
    return found


@attrs.define(eq=False)
class Snapshot:
    """The history of a topic in Redis, as of a place in the log, fetched in pieces: take each that comes until
    it `is_whole`, then `settle`.

    Nothing tears it: all that is published meanwhile is above its top, and all that leaves the history meanwhile
    does so in the log, behind its place. The caller sees to it that all pieces are of one epoch.
    """

    topic: str
    place: int
    position: Position
    size: int
    ttl: float
    now: int
    """When, in milliseconds by the clock of Redis."""
    is_whole: bool = False
    runs: list[tuple[float, list[Publication]]] = attrs.field(factory=list)
    """Each with its age in seconds; without offsets, the last ends at the position."""
    _ends: list[int] = attrs.field(factory=list)

    @classmethod
    def of(cls, topic: str, view: Sequence[Any]) -> "tuple[Snapshot, Sequence[Any]]":
        """The state of a topic as a script tells it, and the first piece."""
        place, now, epoch, top, size, ttl, entries = view
        position = Position(int(top), epoch.decode())
        return cls(topic, place, position, int(size), int(ttl) / 1000, int(now)), entries

    @property
    def next_offset(self) -> int:
        """The first offset that the next piece may end a run at."""
        return self._ends[-1] + 1

    async def take(self, entries: Sequence[Any]) -> None:
        """Decode a piece. Others run meanwhile. Raises one of `UNREADABLE`."""
        work = 0.0
        for name, (at, data) in entries:
            batches = decode_posted(data).batches
            run = [each for batch in batches for each in batch.publications(self.topic)]
            self.runs.append(((self.now - int(at)) / 1000, run))
            self._ends.append(int(name.split(b"-")[0]))
            work += COMMAND + PUBLICATION * len(run)
            if work >= SLICE:
                work = 0.0
                await trio.lowlevel.checkpoint()
        self.is_whole = not entries or self._ends[-1] >= self.position.offset

    def settle(self) -> None:
        """Keep what leads up to the top. Other entries are of no use: keys may have been evicted."""
        runs, ends = self.runs, self._ends
        if not ends or ends[-1] != self.position.offset:
            self.runs = []
            return
        for number in range(len(ends) - 1, 0, -1):
            if ends[number - 1] != ends[number] - len(runs[number][1]):
                self.runs = runs[number:]
                break


@attrs.define(eq=False)
class KnownTopics:
    """See the module. `is_listened_to` says whether a topic has listeners here."""

    store: HistoryStore
    max_bytes: int
    is_listened_to: Callable[[str], bool]
    # The topic that was asked for longest ago comes first.
    _asked: OrderedDict[str, None] = attrs.field(init=False, factory=OrderedDict)
    _positions_only: set[str] = attrs.field(init=False, factory=set)
    _pins: Counter[str] = attrs.field(init=False, factory=Counter)
    # Put, and not known yet: what is in the store of it is nobody's.
    _coming: set[str] = attrs.field(init=False, factory=set)

    def __contains__(self, topic: str) -> bool:
        return topic in self._asked and topic not in self._positions_only

    def reaches(self, topic: str, since: Position) -> bool:
        """Whether a topic that is known has been there."""
        state = self.store.state(topic)
        return state is not None and state[0].reaches(since)

    def names(self) -> Iterable[str]:
        """All that anything is known of, in no order."""
        return dict.keys(self._asked)

    def empty(self) -> list[str]:
        """The topics in which nothing was published. Linear in all."""
        states = ((topic, self.store.state(topic)) for topic in self._asked)
        return [topic for topic, state in states if state is not None and not state[0].offset]

    def follows(self, topic: str) -> bool:
        """Whether anything is known of a topic, and so has to be kept true."""
        return topic in self._asked

    def touch(self, topic: str) -> None:
        """It is asked for."""
        self._asked.move_to_end(topic)

    @contextmanager
    def pinned(self, topics: Sequence[str]) -> Iterator[None]:
        self._pins.update(topics)
        try:
            yield
        finally:
            self._pins.subtract(topics)
            self._pins += Counter()  # without those that are 0

    async def put(self, snapshot: Snapshot) -> None:
        """Know a topic as it was when the snapshot was taken, from the end of this on; what was known of it before
        is forgotten. Others run meanwhile. Cancelled, nothing is known of it."""
        topic, now, work = snapshot.topic, trio.current_time(), 0.0
        self.drop(topic)
        self._coming.add(topic)
        try:
            first = snapshot.position.offset - sum([len(run) for _, run in snapshot.runs])
            self.store.restore(topic, Position(first, snapshot.position.epoch), now)
            for age, run in snapshot.runs:
                when = now - max(0.0, age)
                self.store.extend(topic, run, when, max(1, snapshot.size), snapshot.ttl)
                work += COMMAND + PUBLICATION * len(run)
                if work >= SLICE:
                    work = 0.0
                    await trio.lowlevel.checkpoint()
        except BaseException:
            self._coming.discard(topic)
            self.drop(topic)
            raise
        self._coming.discard(topic)
        self._asked[topic] = None
        self._asked.move_to_end(topic)
        self._positions_only.discard(topic)

    def precedes(self, logged: Logged) -> bool:
        """Whether what is known of a topic is all that was before a run; true of one that is not followed."""
        state = self.store.state(logged.topic) if self.follows(logged.topic) else None
        return state is None or state[0] == Position(logged.first - 1, logged.epoch)

    def add(
        self, logged: Logged, batches: Sequence[Sequence[Publication]]
    ) -> list[Sequence[Publication]] | None:
        """Add a run to a topic that is followed; return it with its offsets. None, and nothing is known of it
        any more, where it does not follow what is known."""
        topic, now = logged.topic, trio.current_time()
        if self.store.state(topic) is None or not self.precedes(logged):
            self.drop(topic)
            return None
        if topic in self._positions_only:
            found = numbered(batches, logged.first)
            top = logged.first - 1 + sum(map(len, batches))
            self.store.restore(topic, Position(top, logged.epoch), now)
            return found
        size, ttl = max(1, logged.size), logged.ttl
        found = [self.store.extend(topic, each, now, size, ttl) for each in batches]
        if self.store.bytes_held > self.max_bytes:
            self.shrink(self.max_bytes)
        return found

    def remove(self, topic: str) -> None:
        """It keeps nothing any more; its position stays."""
        self.store.remove(topic, trio.current_time())

    def drop(self, topic: str) -> None:
        """Know nothing of it. One that is coming is not touched: who puts it has heard of that, too."""
        if topic not in self._coming:
            self.store.forget_topic(topic)
        self._asked.pop(topic, None)
        self._positions_only.discard(topic)

    def clear(self) -> None:
        for topic in list(self._asked):
            self.drop(topic)

    def shrink(self, most: int) -> None:
        """Come back under a bound. Linear in what is looked at: each topic once at most."""
        for _ in range(len(self._asked)):
            if self.store.bytes_held <= most:
                break
            topic = next(iter(self._asked))
            self._asked.move_to_end(topic)
            if topic in self._pins:
                continue
            if self.is_listened_to(topic):
                self.remove(topic)
                self._positions_only.add(topic)
            else:
                self.drop(topic)
