"""The last publications of each topic, so that a client that was away gets what it missed.

Words: a topic's *epoch* names one unbroken count of offsets; its *top* is the offset of the last
publication, kept or not; its *front* is the oldest publication kept; a topic is *quiet* when none of
its publications is left; an *owner* is a user, an anonymous connection or the app, as in `shares`.

Rules:

- Offsets start at 1 and grow by one; the kept publications of a topic have no gap and end at its top.
- A topic that is quiet keeps its epoch and top, so a client that missed nothing still learns so.
  When that is forgotten as well, the next use begins a new epoch and counts from 1.
- A recovery is complete or it is none.
- Bytes are charged to the owner who published them, those of a topic itself to one that has
  publications there, and when it turns quiet to the last of these. Quiet topics that were only asked
  for are charged to nobody, and take half of the room at most. Beyond the bound on all topics the owner with the most bytes gives way, and
  all strangers together are one such owner.
- Such an owner gives way by topics whose front is its own: nobody else loses anything. An owner that
  has only publications behind those of others loses the fronts of just these topics, one in each in
  turn: no more than its publishing pushes out of a full topic anyway. So a publisher takes nothing from
  others in topics that are not open to it.
- `now` is any clock in seconds that does not go backwards; a publication is kept while it is
  younger than its topic's `ttl`.

Charging is put off while the store is less than half full, so that a publication costs nothing more
until then. From there on each is charged as it comes, and those that were kept before are charged
along with them, twice as fast as new ones come: all are before the store is full.

Not promised: that a publication is kept for its whole `ttl`. The bounds on the topic and on all
topics together come first. Nor a share in one topic: any client that may publish there may push out what
others have published, by the topic's `size`.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final

import attrs

from broker.core.charges import Charges
from broker.core.lazy_heap import LazyHeap
from broker.core.messages import ClientInfo, Position, Publication, Series
from broker.core.quiet_topics import Quiet, QuietTopics
from broker.core.shares import text_bytes
from broker.core.sweeps import Sweeps
from broker.core.topic_history import History, Publisher
from broker.core.work import EVICTED, FIRST, Meter
from broker.errors import BrokerError

TOPIC_BYTES: Final = 1216
"""Bytes of one topic that has publications, besides these and its name's characters: a ring
takes 440 bytes of these."""

EXPIRED_AT_ONCE: Final = 500
"""Topics that expire in one step, or are asked whether they are to be forgotten: 2 ms. A hundred thousand that were
published to at one time would take half a second."""

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

    `publications_evicted` counts those lost to the bound on all bytes; those that went by age or
    by their topic's size are not in it.
    """

    topics: int
    quiet_topics: int
    publications: int
    bytes: int
    publications_evicted: int
    owners: int
    """Owners who are charged for something; nobody while the store is less than half full."""


def _numbered(topic: str, publications: Sequence[Publication], top: int) -> list[Publication]:
    """Publications that get their offsets and are not kept, because a ring would not hold them."""
    return [
        Publication(topic, p.data, p.info, offset, p.time, p.tags, p.opaque)
        for offset, p in enumerate(publications, top + 1)
    ]


@attrs.define(eq=False)
class HistoryStore:
    """The histories of all topics, within `max_bytes`.

    Beyond the bound, the heaviest owner gives way, as the module says; of its own topics, that
    published to longest ago first. Quiet topics give way before any publication once they take more
    than half of what their owner has; those charged to nobody, which anyone who may subscribe can make,
    once they take more than half of all. Until then an epoch outlives the publications, as to lose
    one costs a subscriber that missed nothing a false alarm.

    `new_epoch` makes a text for a topic that no epoch ever had, also before a restart.
    """

    max_bytes: int
    new_epoch: Callable[[str], str]
    meta_ttl: float = META_TTL
    meter: Meter = attrs.field(factory=Meter)
    """To which the work is added that not every publication causes."""
    note_forgotten: Callable[[str], None] = lambda topic: None
    """Told of each topic that is forgotten because of `forget`, in that step."""
    charges: Charges = attrs.field(init=False)
    """All bytes, and whose they are."""
    quiet: QuietTopics = attrs.field(init=False)
    # Least recently published to first. A topic that has an epoch is in one of the two.
    _kept: OrderedDict[str, History] = attrs.field(init=False, factory=OrderedDict)
    # (when, topic). An entry counts only while it agrees with that topic's `due`.
    _due: LazyHeap[tuple[float, str]] = attrs.field(init=False)
    _sweeps: Sweeps = attrs.field(init=False, factory=Sweeps)
    _publications: int = attrs.field(init=False, default=0)
    _evicted: int = attrs.field(init=False, default=0)

    def __attrs_post_init__(self) -> None:
        # Publications are charged once the store is half full.
        self.charges = Charges(self.max_bytes // 2)
        self.quiet = QuietTopics(self.charges)
        self._due = LazyHeap(self._is_due)

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
        not above 0 the topic keeps no history: its publications and its epoch are forgotten, and the
        publications come back as they are.
        """
        if size <= 0 or ttl <= 0:
            self.forget_topic(topic)
            return publications
        if isinstance(publications, Series):
            said = publications
            return self.extend_run(topic, said.contents, said.info, said.opaque, now, size, ttl)
        if not publications:
            return publications
        history = self._to_extend(topic, now, ttl)
        # Called directly, because this is a hot line: attrs.evolve takes several times as long. The topic is
        # the text we have, so that a thousand publications share one.
        topic, offset, ring = history.topic, history.top, history.ring
        before, more = ring.count, 0
        published: list[Publication] = []
        payer = None
        if history.payer is not None:
            payer = self.charges.sole_publisher(history, history.payer, publications)
        if len(publications) > size:  # more than a ring holds, so nothing of before stays
            more -= self._drop(history, payer, before)
            published = _numbered(topic, publications[:-size], offset)
            offset += len(published)
            publications = publications[-size:]
        for p in publications:
            offset += 1
            published.append(Publication(topic, p.data, p.info, offset, p.time, p.tags, p.opaque))
            more += ring.append(p, now)
        history.top = offset
        self._settle(history, payer, before, more, now, size)
        return published

    def extend_run(
        self,
        topic: str,
        contents: Sequence[bytes],
        info: ClientInfo | None,
        opaque: bool,
        now: float,
        size: int,
        ttl: float,
    ) -> Sequence[Publication]:
        """`extend` by what one publisher says in a row, without tags: a seventh of the work."""
        if size <= 0 or ttl <= 0:
            self.forget_topic(topic)
            return Series(topic, contents, info, 0, opaque)
        if not contents:
            return ()
        history = self._to_extend(topic, now, ttl)
        ring = history.ring
        before, count, more = ring.count, len(contents), 0
        payer = history.payer
        if payer is not None:
            payer = self.charges.payer_if_sole(history, payer, info)
        published = Series(history.topic, contents, info, history.top + 1, opaque)
        if count > size:  # more than a ring holds, so nothing of before stays
            more -= self._drop(history, payer, before)
            contents = contents[-size:]
        more += ring.extend(contents, info, opaque, now)
        history.top += count
        if payer is not None or history.charged or count > size or before + count > size + 1:
            self._settle(history, payer, before, more, now, size)
            return published
        # As `_settle` has it, in line: one publication, or a ring that is not full, before anybody is charged.
        if before + count > size:
            more -= ring.drop(1)
            count -= 1
        self._publications += count
        charges = self.charges
        charges.bytes += more
        if charges.bytes > charges.charge_from:
            self._charge(history, now)
        return published

    def _to_extend(self, topic: str, now: float, ttl: float) -> History:
        """The history of a topic that is published to now, with this ttl."""
        if self._sweeps.begun:
            self.touch(topic)
        history = self._kept.get(topic)
        if history is None:
            return self._wake(topic, now, ttl)
        self._kept.move_to_end(history.topic)
        if history.ttl != ttl:
            history.ttl = ttl
            self._schedule(history)
        return history

    def _settle(
        self,
        history: History,
        payer: Publisher | None,
        before: int,
        more: int,
        now: float,
        size: int,
    ) -> None:
        """Account for `more` bytes of publications at the top, of a ring that had `before`, and drop those
        beyond `size`."""
        count = history.ring.count
        if count > size:
            more -= self._drop(history, payer, count - size)
            count = size
        charges = self.charges
        charges.bytes += more
        self._publications += count - before
        if payer is not None:
            charges.charge_sole(history, payer, more)
            if more:
                self._come_back(now)
        elif charges.bytes > charges.charge_from:
            self._charge(history, now)

    def _charge(self, history: History, now: float) -> None:
        """Charge what was just published to a topic, and come back under the bound."""
        charges = self.charges
        charges.begin(self._kept.values())
        charges.catch_up(2 * charges.charge_topic(history))
        self._come_back(now)

    def _drop(self, history: History, payer: Publisher | None, count: int) -> int:
        """Drop the oldest of a topic; return their bytes, which its sole publisher is yet to be given back."""
        if history.charged and payer is None:
            return sum([self.charges.drop_oldest(history) for _ in range(count)])
        return history.ring.drop(count) if count else 0

    def position(self, topic: str, now: float) -> Position:
        """The topic's top and epoch.

        Begins an epoch if there is none, so that a subscriber to a topic without publications can recover all
        that come from then on.
        """
        if self._sweeps.begun:
            self.touch(topic)
        history = self._kept.get(topic)
        return self._quiet_position(topic, now) if history is None else history.position

    def read(
        self, topic: str, now: float, since: Position | None, limit: int, reverse: bool = False
    ) -> tuple[list[Publication], Position]:
        """Publications of a topic, oldest first, and its top.

        With `since`, those after its offset; reversed, those before it, newest first. Publications no
        longer kept are left out without a word. A `limit` of 0 asks for the top alone, a negative
        one for everything. An empty epoch in `since` stands for the current one; another epoch
        raises `UnrecoverablePosition`. All this as Centrifuge has it (`Node.History` and its
        memory broker), except that there `reverse` with offset 0 is a bad request; here nothing
        lies before it.
        """
        if self._sweeps.begun:
            self.touch(topic)
        history = self._fresh(topic, now)
        top = self._quiet_position(topic, now) if history is None else history.position
        if since is not None and since.epoch not in ("", top.epoch):
            raise UnrecoverablePosition(top)
        if history is None:
            return [], top
        return history.select(None if since is None else since.offset, limit, reverse), top

    def peek(
        self, topic: str, since: int | None, limit: int, reverse: bool = False
    ) -> list[Publication]:
        """About the publications that `read` would list of a topic, to know its cost before: whatever their
        age, and without asking for the topic."""
        if self._sweeps.begun:
            self.touch(topic)
        history = self._kept.get(topic)
        return [] if history is None else history.select(since, limit, reverse)

    def recover(
        self, topic: str, now: float, since: Position
    ) -> tuple[list[Publication], bool, Position]:
        """All that was published after `since`, whether that is so, and the topic's top.

        Recovered means: a subscriber that had everything up to `since`, and takes these, has
        everything up to the top. Otherwise the list is empty: an older epoch, an offset that is yet to come, or
        one of the missed publications is gone. The rule is Centrifuge's (`isStreamRecovered`).
        """
        try:
            missed, top = self.read(topic, now, since, -1)
        except UnrecoverablePosition as error:
            return [], False, error.position
        # The ring has no gap and ends at the top, so a fitting first one is enough.
        following = missed[0].offset if missed else top.offset + 1
        if following != since.offset + 1:
            return [], False, top
        return missed, True, top

    def remove(self, topic: str, now: float) -> None:
        """Forget a topic's publications. Its epoch and count go on, as in Centrifugo.

        So a client that had them all still recovers; one that missed some learns that it did.
        """
        if self._sweeps.begun:
            self.touch(topic)
        history = self._kept.get(topic)
        if history is not None:
            while history.ring.count:
                self._drop_oldest(history)
            self._quieten(history, now)

    def forget(self, is_over: Callable[[str], bool]) -> None:
        """Forget the topics that this is true of now, with their epochs: each before it is used again, and all
        others by `expire`, in pieces. Linear in all topics, 30 ns each."""
        self._sweeps.begin(is_over, (*dict.keys(self._kept), *self.quiet.names()))

    def touch(self, topic: str) -> None:
        """Forget a topic now, if it is one of those."""
        if not self._sweeps.begun or not self._sweeps.touch(topic):
            return
        if topic in self._kept or self.quiet.get(topic) is not None:
            self.forget_topic(topic)
            self.note_forgotten(topic)

    # keeping it elsewhere as well

    def topics(self) -> list[str]:
        """All topics that have an epoch, in no order. Linear in them, 30 ns each."""
        return [*dict.keys(self._kept), *self.quiet.names()]

    def used_at(self, topic: str) -> float:
        """When a topic was published to last, or, where it keeps nothing, asked for; 0 if it has no epoch. It
        does not count as asking for it."""
        history = self._kept.get(topic)
        if history is not None:
            return history.ring.when(history.ring.count - 1)
        quiet = self.quiet.get(topic)
        return 0.0 if quiet is None else quiet.asked

    def state(self, topic: str) -> tuple[Position, History | None] | None:
        """Where a topic is, and what it keeps if that is anything; None if it has no epoch. It does
        not count as asking for it."""
        if self._sweeps.begun:
            self.touch(topic)
        history = self._kept.get(topic)
        if history is not None:
            return history.position, history
        quiet = self.quiet.get(topic)
        return None if quiet is None else (quiet.position, None)

    def restore(self, topic: str, position: Position, now: float) -> None:
        """Put a topic where it was, with nothing kept; what it has here is forgotten."""
        self._sweeps.touch(topic)  # what it is from here on is another
        self.forget_topic(topic)
        self.quiet.put(topic, position, now, None)

    def renew(self, epoch_of: Callable[[str], str]) -> None:
        """Begin all epochs anew, each by a name made of the old one; offsets and publications stay.
        Linear in the topics."""
        for history in self._kept.values():
            history.epoch = epoch_of(history.epoch)
        self.quiet.renew(epoch_of)

    def expire(self, now: float) -> bool:
        """Free what is past its time or to be forgotten, in `EXPIRED_AT_ONCE` topics at most; whether there is more.
        Call it about once a second, and again, when others have run, while it is true.

        The cost follows what is freed, not the number of topics: a topic is looked at when its
        oldest publication ends, so at least one was freed, or pushed out by `size`, since the last
        look.
        """
        for _ in range(EXPIRED_AT_ONCE):
            over = self._sweeps.take()
            if over is not None:
                self.touch(over)
                continue
            first = self._due.first()
            if first is not None and first[0] <= now:
                self._due.pop()
                topic = first[1]
                if self._is_due(first) and self._fresh(topic, now):
                    self._schedule(self._kept[topic])
                continue
            forgotten = self.quiet.asked_longest_ago(now - self.meta_ttl)
            if forgotten is None:
                return False
            self.forget_topic(forgotten)
        return True

    def prepare(self, size: int) -> bool:
        """Get ready to `give_back`: charge about so many bytes of what was put off. True when there is
        nothing left to charge."""
        self.charges.begin(self._kept.values())
        self.charges.catch_up(size)
        return not self.charges.is_behind

    @property
    def heaviest_bytes(self) -> int:
        """The bytes of the owner that would give way first, as far as they are charged."""
        heaviest = self.charges.shares.heaviest()
        return 0 if heaviest is None else heaviest.bytes

    def give_back(self, size: int, now: float) -> int:
        """Forget so many bytes, as when there is less room; how many that were."""
        before = self.bytes_held
        self._evict(now, max(0, before - size))
        return before - self.bytes_held

    def statistics(self) -> HistoryStatistics:
        return HistoryStatistics(
            topics=len(self._kept),
            quiet_topics=len(self.quiet),
            publications=self._publications,
            bytes=self.bytes_held,
            publications_evicted=self._evicted,
            owners=len(self.charges.shares),
        )

    @property
    def bytes_held(self) -> int:
        """Everything that is kept, with what is needed to keep it."""
        return self.charges.held

    def _fresh(self, topic: str, now: float) -> History | None:
        """The topic's history without what is past its time, or None if nothing is left."""
        history = self._kept.get(topic)
        if history is None:
            return None
        ring = history.ring
        while ring.count and ring.when(0) + history.ttl <= now:
            self._drop_oldest(history)
        if ring.count:
            return history
        self._quieten(history, now)
        return None

    # topics that are quiet, and those with publications

    def _quiet_position(self, topic: str, now: float) -> Position:
        """The position of a topic that is quiet or new, which counts as asking for it."""
        former = self.quiet.pop(topic)
        position = self._position_of(topic, former, now)
        # Asking does not free who is charged, or a flooder would ask for its topics.
        self.quiet.put(topic, position, now, None if former is None else former.payer)
        if self.bytes_held > self.max_bytes:
            self._evict(now, self.max_bytes)
        return position

    def _position_of(self, topic: str, quiet: Quiet | None, now: float) -> Position:
        if quiet is None or quiet.asked + self.meta_ttl <= now:
            return Position(0, self.new_epoch(topic))
        return quiet.position

    def _wake(self, topic: str, now: float, ttl: float) -> History:
        """Open the ring of a topic that is quiet or new, to be filled at once."""
        self.meter.add(FIRST)
        position = self._position_of(topic, self.quiet.pop(topic), now)
        size = TOPIC_BYTES + text_bytes(topic)
        history = History(topic, position.epoch, position.offset, ttl, 0.0, size)
        self._kept[topic] = history
        self.charges.bytes += size
        self._schedule(history, now)
        return history

    def _quieten(self, history: History, now: float) -> None:
        """Close an empty ring; the topic's epoch and top stay."""
        self._close(history)
        self.quiet.put(history.topic, history.position, now, history.payer)

    def forget_topic(self, topic: str) -> None:
        """Forget everything about a topic, if there is anything."""
        history = self._kept.get(topic)
        if history is not None:
            while history.ring.count:
                self._drop_oldest(history)
            self._close(history)
        else:
            self.quiet.pop(topic)

    def _close(self, history: History) -> None:
        del self._kept[history.topic]
        self.charges.close(history)

    def _drop_oldest(self, history: History) -> None:
        self._publications -= 1
        self.charges.bytes -= self.charges.drop_oldest(history)

    def _come_back(self, now: float) -> None:
        """Come back under the bound; charge no more when the store is nearly empty."""
        if self.bytes_held > self.max_bytes:
            self._evict(now, self.max_bytes)
        elif self.charges.bytes < self.max_bytes // 4:
            self.charges.put_off(self.max_bytes // 2)

    # the bound on all topics

    def _evict(self, now: float, most: int) -> None:
        """Come back under a bound.

        Each turn frees something, so the cost is what is freed: the looks at topics that free
        nothing are bounded, but for those that take a topic from where it does not belong.
        """
        charges = self.charges
        # Quiet topics may have filled it while nothing was published.
        charges.begin(self._kept.values())
        charges.catch_up(math.inf)
        while self.bytes_held > most:
            self.meter.add(EVICTED)
            account = charges.shares.heaviest()
            topic = self.quiet.first_to_go(account, self.max_bytes // 2)
            if topic is not None:
                self.forget_topic(topic)
                continue
            assert account is not None
            history = charges.topic_to_trim(account)
            if history is not None:
                self._drop_oldest(history)
                self._evicted += 1
                if not history.ring.count:
                    self._quieten(history, now)

    def _schedule(self, history: History, published: float | None = None) -> None:
        """Look at this topic again when its oldest publication, from `published`, ends."""
        if published is None:
            published = history.ring.when(0)
        history.due = published + history.ttl
        self._due.push((history.due, history.topic), len(self._kept))

    def _is_due(self, entry: tuple[float, str]) -> bool:
        due, topic = entry
        history = self._kept.get(topic)
        return history is not None and history.due == due
