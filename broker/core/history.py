"""The last publications of each topic, so that a client that was away gets what it missed.

Words: a topic's *epoch* names one unbroken count of offsets; its *top* is the offset of the last
publication, kept or not; a topic is *quiet* when none of its publications is left.

Rules:

- Offsets start at 1 and grow by one; what is kept of a topic has no gap and ends at its top.
- A topic that is quiet keeps its epoch and top, so a client that missed nothing still learns so.
  When that is forgotten as well, the next use begins a new epoch and counts from 1.
- A recovery is complete or it is none.
- `now` is any clock in seconds that does not go backwards; a publication is kept while it is
  younger than its topic's `ttl`.

Not promised: that a publication is kept for its whole `ttl`. The bounds on the topic and on all
topics together come first.
"""

import heapq
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Final

import attrs

from broker.core.messages import Position, Publication
from broker.errors import BrokerError

PUBLICATION_BYTES: Final = 288
"""What one kept publication costs besides its data: 236 bytes for its fields and its place in the
ring and 33 to hold the data, as tracemalloc counts them on CPython 3.11, rounded up."""

TOPIC_BYTES: Final = 1280
"""What one topic costs while it has publications: an empty ring alone takes 624 bytes."""

QUIET_BYTES: Final = 512
"""What one quiet topic costs. Counted, because subscribing is enough to make one."""

META_TTL: Final = 86400.0
"""Seconds that a quiet topic keeps its epoch after it was last asked for: a laptop that was closed
overnight learns that it missed nothing. Long is cheap, since quiet topics are bounded in bytes."""


class UnrecoverablePosition(BrokerError):
    """A position from another epoch: its offset means nothing here. `position` is the top now.

    Clients know it as error 112, "unrecoverable position".
    """

    def __init__(self, position: Position) -> None:
        super().__init__(f"the epoch is {position.epoch}")
        self.position = position


@attrs.frozen
class HistoryStatistics:
    """A snapshot. `topics` have publications, `quiet_topics` have none left.

    `publications_evicted` counts what the bound on all bytes cost; what went by age or by its
    topic's size is not in it.
    """

    topics: int
    quiet_topics: int
    publications: int
    bytes: int
    publications_evicted: int


@attrs.define(eq=False)
class History:
    """One topic that has publications: its epoch, its top, and what is kept up to there."""

    topic: str
    epoch: str
    top: int
    ttl: float
    due: float
    """When the store looks at this topic again: at or before its oldest publication's end."""
    ring: deque[tuple[float, Publication]] = attrs.field(init=False, factory=deque)
    """When each was published, and the publication; oldest first."""

    @property
    def position(self) -> Position:
        return Position(self.top, self.epoch)

    def select(self, since: int | None, limit: int, reverse: bool) -> list[Publication]:
        """Those after offset `since`, oldest first; or, reversed, those before it, newest first.

        At most `limit` of them, all if it is negative.
        """
        ring = self.ring
        start, stop = 0, len(ring)
        if since is not None:
            first = self.top + 1 - len(ring)
            if reverse:
                stop = min(stop, max(0, since - first))
            else:
                start = min(stop, max(0, since + 1 - first))
        if limit >= 0:
            if reverse:
                start = max(0, stop - limit)
            else:
                stop = min(stop, start + limit)
        # By index: the few last ones of a long ring are found from its end.
        places = range(start, stop)
        return [ring[i][1] for i in (reversed(places) if reverse else places)]


@attrs.define(eq=False)
class HistoryStore:
    """The histories of all topics, within `max_bytes`.

    Beyond the bound, the oldest publication of the topic published to longest ago goes first.
    Quiet topics, which anyone who may subscribe can make, give way before any publication once
    they take more than half of it.

    `new_epoch` makes a text that no epoch ever had, also before a restart.
    """

    max_bytes: int
    new_epoch: Callable[[], str]
    meta_ttl: float = META_TTL
    # Least recently published to first.
    _kept: OrderedDict[str, History] = attrs.field(init=False, factory=OrderedDict)
    # With the time each was last asked for; longest ago first. A topic is in one of the two.
    _quiet: OrderedDict[str, tuple[Position, float]] = attrs.field(init=False, factory=OrderedDict)
    # A heap of (when, topic). An entry counts only while it agrees with that topic's `due`.
    _due: list[tuple[float, str]] = attrs.field(init=False, factory=list)
    _bytes: int = attrs.field(init=False, default=0)
    _publications: int = attrs.field(init=False, default=0)
    _evicted: int = attrs.field(init=False, default=0)

    def append(self, publication: Publication, now: float, size: int, ttl: float) -> Publication:
        """Keep a publication and return it with its offset: see `extend`."""
        return self.extend(publication.topic, (publication,), now, size, ttl)[0]

    def extend(
        self,
        topic: str,
        publications: Sequence[Publication],
        now: float,
        size: int,
        ttl: float,
    ) -> Sequence[Publication]:
        """Keep publications of one topic and return them with their offsets.

        The topic then keeps its last `size` publications of the last `ttl` seconds. If either is
        not above 0 the topic keeps no history: what it had is forgotten, with its epoch, and the
        publications come back as they are.
        """
        if size <= 0 or ttl <= 0:
            self._forget(topic)
            return publications
        history = self._kept.get(topic)
        if history is None:
            history = self._wake(topic, now, ttl)
        else:
            self._kept.move_to_end(history.topic)
            if history.ttl != ttl:
                history.ttl = ttl
                self._schedule(history)
        # Called directly, as this is a hot line: attrs.evolve takes several times as long. The topic
        # is the text we have, so that a thousand publications share one.
        topic, offset = history.topic, history.top
        published = []
        for p in publications:
            offset += 1
            published.append(Publication(topic, p.data, p.info, offset, p.time, p.tags, p.opaque))
        history.top = offset
        kept = published if len(published) <= size else published[-size:]
        ring = history.ring
        while len(ring) + len(kept) > size:
            self._drop_oldest(ring)
        for publication in kept:
            ring.append((now, publication))
            self._bytes += len(publication.data) + PUBLICATION_BYTES
        self._publications += len(kept)
        if self._bytes > self.max_bytes:
            self._evict(now)
        return published

    def position(self, topic: str, now: float) -> Position:
        """The topic's top and epoch.

        Begins an epoch if there is none, so that who subscribes to a topic that was never
        published to can recover what comes from then on.
        """
        history = self._kept.get(topic)
        return self._quiet_position(topic, now) if history is None else history.position

    def read(
        self, topic: str, now: float, since: Position | None, limit: int, reverse: bool = False
    ) -> tuple[list[Publication], Position]:
        """Publications of a topic, oldest first, and its top.

        With `since`, those after its offset; reversed, those before it, newest first. What is no
        longer kept is left out without a word. A `limit` of 0 asks for the top alone, a negative
        one for everything. An empty epoch in `since` stands for the current one; another epoch
        raises `UnrecoverablePosition`. All this as Centrifuge has it (`Node.History` and its
        memory broker), except that there `reverse` with offset 0 is a bad request; here nothing
        lies before it.
        """
        history = self._fresh(topic, now)
        top = self._quiet_position(topic, now) if history is None else history.position
        if since is not None and since.epoch not in ("", top.epoch):
            raise UnrecoverablePosition(top)
        if history is None:
            return [], top
        return history.select(None if since is None else since.offset, limit, reverse), top

    def recover(
        self, topic: str, now: float, since: Position
    ) -> tuple[list[Publication], bool, Position]:
        """All that was published after `since`, whether that is so, and the topic's top.

        Recovered means: whoever had everything up to `since`, and takes these, has everything up
        to the top. Otherwise the list is empty: an older epoch, an offset that is yet to come, or
        one of the missed publications is gone. The rule is Centrifuge's (`isStreamRecovered`).
        """
        try:
            missed, top = self.read(topic, now, since, -1)
        except UnrecoverablePosition as error:
            return [], False, error.position
        # What is kept has no gap and ends at the top, so a fitting first one is enough.
        following = missed[0].offset if missed else top.offset + 1
        if following != since.offset + 1:
            return [], False, top
        return missed, True, top

    def remove(self, topic: str, now: float) -> None:
        """Forget a topic's publications. Its epoch and count go on, as in Centrifugo.

        So a client that had them all still recovers; one that missed some learns that it did.
        """
        history = self._kept.get(topic)
        if history is not None:
            while history.ring:
                self._drop_oldest(history.ring)
            self._quieten(history, now)

    def forget(self, is_over: Callable[[str], bool]) -> None:
        """Forget the topics that this is true of, with their epochs. Linear in all topics."""
        for topic in [topic for topics in (self._kept, self._quiet) for topic in topics]:
            if is_over(topic):
                self._forget(topic)

    def expire(self, now: float) -> None:
        """Free what is past its time. Call it about once a second.

        The cost follows what is freed, not the number of topics: a topic is looked at when its
        oldest publication ends, so at least one was freed, or pushed out by `size`, since the last
        look.
        """
        while self._due and self._due[0][0] <= now:
            due, topic = heapq.heappop(self._due)
            history = self._kept.get(topic)
            if history is not None and history.due == due and self._fresh(topic, now):
                self._schedule(history)
        while self._quiet:
            topic, (_, asked) = next(iter(self._quiet.items()))
            if asked + self.meta_ttl > now:
                break
            self._forget(topic)

    def statistics(self) -> HistoryStatistics:
        return HistoryStatistics(
            topics=len(self._kept),
            quiet_topics=len(self._quiet),
            publications=self._publications,
            bytes=self._bytes,
            publications_evicted=self._evicted,
        )

    def _fresh(self, topic: str, now: float) -> History | None:
        """The topic's history without what is past its time, or None if nothing is left."""
        history = self._kept.get(topic)
        if history is None:
            return None
        ring = history.ring
        while ring and ring[0][0] + history.ttl <= now:
            self._drop_oldest(ring)
        if ring:
            return history
        self._quieten(history, now)
        return None

    def _quiet_position(self, topic: str, now: float) -> Position:
        """The position of a topic that is quiet or new, which counts as asking for it."""
        position = self._take_quiet(topic, now)
        self._quiet[topic] = position, now
        self._bytes += QUIET_BYTES
        if self._bytes > self.max_bytes:
            self._evict(now)
        return position

    def _take_quiet(self, topic: str, now: float) -> Position:
        position, asked = self._quiet.pop(topic, (None, 0.0))
        if position is not None:
            self._bytes -= QUIET_BYTES
            if asked + self.meta_ttl > now:
                return position
        return Position(0, self.new_epoch())

    def _wake(self, topic: str, now: float, ttl: float) -> History:
        """Open the ring of a topic that is quiet or new."""
        position = self._take_quiet(topic, now)
        history = History(topic, position.epoch, position.offset, ttl, due=0.0)
        self._kept[topic] = history
        self._bytes += TOPIC_BYTES
        self._schedule(history, now)
        return history

    def _quieten(self, history: History, now: float) -> None:
        """Close an empty ring; the topic's epoch and top stay."""
        del self._kept[history.topic]
        self._quiet[history.topic] = history.position, now
        self._bytes += QUIET_BYTES - TOPIC_BYTES

    def _forget(self, topic: str) -> None:
        """Forget everything about a topic, if there is anything."""
        history = self._kept.pop(topic, None)
        if history is not None:
            while history.ring:
                self._drop_oldest(history.ring)
            self._bytes -= TOPIC_BYTES
        elif self._quiet.pop(topic, None) is not None:
            self._bytes -= QUIET_BYTES

    def _drop_oldest(self, ring: deque[tuple[float, Publication]]) -> None:
        publication = ring.popleft()[1]
        self._publications -= 1
        self._bytes -= len(publication.data) + PUBLICATION_BYTES

    def _evict(self, now: float) -> None:
        """Come back under the bound. Each turn frees something, so the cost is what is freed."""
        while self._bytes > self.max_bytes:
            if len(self._quiet) * QUIET_BYTES > self.max_bytes // 2:
                self._forget(next(iter(self._quiet)))
                continue
            history = next(iter(self._kept.values()))
            self._drop_oldest(history.ring)
            self._evicted += 1
            if not history.ring:
                self._quieten(history, now)

    def _schedule(self, history: History, published: float | None = None) -> None:
        """Look at this topic again when its oldest publication, from `published`, ends."""
        if published is None:
            published = history.ring[0][0]
        history.due = published + history.ttl
        heapq.heappush(self._due, (history.due, history.topic))
        # Entries that no longer count go when they outnumber the others: constant per push.
        if len(self._due) > 2 * len(self._kept) + 64:
            self._due = [(each.due, each.topic) for each in self._kept.values()]
            heapq.heapify(self._due)
