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
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Final

import attrs

from broker.core.lazy_heap import LazyHeap
from broker.core.messages import ClientInfo, Position, Publication, Series
from broker.core.ring import Ring
from broker.core.shares import Account, Shares, owner_of, text_bytes
from broker.core.work import EVICTED, FIRST, Meter
from broker.errors import BrokerError

TOPIC_BYTES: Final = 1216
"""Bytes of one topic that has publications, besides these and its name's characters: a ring
takes 440 bytes of these."""

QUIET_BYTES: Final = 512
"""Bytes of one quiet topic besides its name's characters. Counted, because subscribing is enough
to make one."""

LOOKS: Final = 8
"""Of the topics in which an owner's publications lie behind others', so many are looked at for one
whose front has become its own before another's front is dropped: each look costs 0.2 µs."""

OWNER_BYTES: Final = 1536
"""Bytes of one owner that is charged for something: its account, the orders of its topics and
what is known of the client come to 1,510 bytes."""

EXPIRED_AT_ONCE: Final = 500
"""Topics that expire in one step: 2 ms. A hundred thousand that were published to at one time would take
half a second."""

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


_NO_TOPIC: Final = "", (Position(0, ""), math.inf, None)


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


@attrs.define(eq=False)
class Publisher(Account):
    """The account of one owner in the store: its bytes, and the topics where they are.

    Each topic in which it has charged publications, or which is charged to it, is in one of the
    two. One in which nothing of it is left may be there too, until somebody looks.
    """

    own: "OrderedDict[History, None]" = attrs.field(repr=False, factory=OrderedDict)
    """Topics whose front was its own when it was last looked at; that published to longest ago
    first, as far as it is the only publisher."""
    shared: "OrderedDict[History, None]" = attrs.field(repr=False, factory=OrderedDict)
    """Topics whose front was another's."""
    quiet: "OrderedDict[str, None]" = attrs.field(repr=False, factory=OrderedDict)
    """Its quiet topics; that asked for longest ago first."""


@attrs.define(eq=False)
class History:
    """One topic that has publications: its epoch, its top, and what is kept up to there."""

    topic: str
    epoch: str
    top: int
    ttl: float
    due: float
    """When the store looks at this topic again: at or before its oldest publication's end."""
    bytes: int
    """Of the topic itself."""
    ring: Ring = attrs.field(init=False, factory=Ring)
    charged: int = attrs.field(init=False, default=0)
    """Up to this offset the publications are charged to their owners."""
    payer: Publisher | None = attrs.field(init=False, repr=False, default=None)
    """Charged for the topic itself; None while nothing of it is charged."""
    members: dict[Publisher, int] = attrs.field(init=False, repr=False, factory=dict)
    """Those who have this topic among theirs, and the offset of the last that was charged to it."""

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
        places = range(start, stop)
        topic, first = self.topic, self.top + 1 - len(ring)
        return [
            ring.publication(place, topic, first + place)
            for place in (reversed(places) if reverse else places)
        ]

    def dated(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[float, Publication]]:
        """When each was published, and the publication; oldest first. Of those kept from the `start`-th on, up
        to before the `stop`-th."""
        ring, first = self.ring, self.top + 1 - len(self.ring)
        for place in range(len(ring))[start:stop]:
            yield ring.when(place), ring.publication(place, self.topic, first + place)


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
    # Least recently published to first.
    _kept: OrderedDict[str, History] = attrs.field(init=False, factory=OrderedDict)
    # With the time each was last asked for, longest ago first, and who is charged for it. A topic
    # is in one of the two.
    _quiet: OrderedDict[str, tuple[Position, float, Publisher | None]] = attrs.field(
        init=False, factory=OrderedDict
    )
    # Those of them that nobody is charged for, in the same order.
    _unpaid: OrderedDict[str, None] = attrs.field(init=False, factory=OrderedDict)
    # (when, topic). An entry counts only while it agrees with that topic's `due`.
    _due: LazyHeap[tuple[float, str]] = attrs.field(init=False)
    _bytes: int = attrs.field(init=False, default=0)
    _publications: int = attrs.field(init=False, default=0)
    _evicted: int = attrs.field(init=False, default=0)
    _shares: Shares[Publisher] = attrs.field(
        init=False, factory=lambda: Shares(Publisher, OWNER_BYTES)
    )
    # Beyond so many bytes publications are charged: half of the room, and none once they are.
    _charge_from: int = attrs.field(init=False)
    # Topics that may hold what is not charged yet; those least recently published to last.
    _uncharged: list[History] = attrs.field(init=False, factory=list)

    def __attrs_post_init__(self) -> None:
        self._charge_from = self.max_bytes // 2
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
        before, more = len(ring), 0
        published: list[Publication] = []
        payer = None
        if history.payer is not None:
            payer = self._sole_publisher(history, history.payer, publications)
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
        before, count, more = len(ring), len(contents), 0
        payer = history.payer
        if payer is not None:
            payer = self._payer_if_sole(history, payer, info)
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
        self._bytes += more
        if self._bytes > self._charge_from:
            self._charge(history, now)
        return published

    def _to_extend(self, topic: str, now: float, ttl: float) -> History:
        """The history of a topic that is published to now, with this ttl."""
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
        count = len(history.ring)
        if count > size:
            more -= self._drop(history, payer, count - size)
            count = size
        self._bytes += more
        self._publications += count - before
        if payer is not None:
            self._charge_sole(history, payer, more, now)
        elif self._bytes > self._charge_from:
            self._charge(history, now)

    def _drop(self, history: History, payer: Publisher | None, count: int) -> int:
        """Drop the oldest of a topic; return their bytes, which its sole publisher is yet to be given back."""
        if history.charged and payer is None:
            return sum([self._drop_charged(history) for _ in range(count)])
        return history.ring.drop(count) if count else 0

    def position(self, topic: str, now: float) -> Position:
        """The topic's top and epoch.

        Begins an epoch if there is none, so that a subscriber to a topic without publications can recover all
        that come from then on.
        """
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
        history = self._kept.get(topic)
        if history is not None:
            while len(history.ring):
                self._drop_oldest(history)
            self._quieten(history, now)

    def forget(self, is_over: Callable[[str], bool]) -> list[str]:
        """Forget the topics that this is true of, with their epochs; return them. Linear in all
        topics."""
        over = [topic for topic in self.topics() if is_over(topic)]
        for topic in over:
            self.forget_topic(topic)
        return over

    # keeping it elsewhere as well

    def topics(self) -> list[str]:
        """All topics that have an epoch."""
        return [*self._kept, *self._quiet]

    def state(self, topic: str) -> tuple[Position, History | None] | None:
        """Where a topic is, and what it keeps if that is anything; None if it has no epoch. It does
        not count as asking for it."""
        history = self._kept.get(topic)
        if history is not None:
            return history.position, history
        quiet = self._quiet.get(topic)
        return None if quiet is None else (quiet[0], None)

    def restore(self, topic: str, position: Position, now: float) -> None:
        """Put a topic where it was, with nothing kept; what it has here is forgotten."""
        self.forget_topic(topic)
        self._put_quiet(topic, position, now, None)

    def renew(self, epoch_of: Callable[[str], str]) -> None:
        """Begin all epochs anew, each by a name made of the old one; offsets and publications stay.
        Linear in the topics."""
        for history in self._kept.values():
            history.epoch = epoch_of(history.epoch)
        for topic, (position, asked, payer) in list(self._quiet.items()):
            renewed = Position(position.offset, epoch_of(position.epoch))
            self._quiet[topic] = renewed, asked, payer

    def expire(self, now: float) -> bool:
        """Free what is past its time, in `EXPIRED_AT_ONCE` topics at most; whether there is more. Call it
        about once a second, and again, when others have run, while it is true.

        The cost follows what is freed, not the number of topics: a topic is looked at when its
        oldest publication ends, so at least one was freed, or pushed out by `size`, since the last
        look.
        """
        for _ in range(EXPIRED_AT_ONCE):
            first = self._due.first()
            if first is not None and first[0] <= now:
                self._due.pop()
                topic = first[1]
                if self._is_due(first) and self._fresh(topic, now):
                    self._schedule(self._kept[topic])
                continue
            topic, (_, asked, _) = next(iter(self._quiet.items()), _NO_TOPIC)
            if asked + self.meta_ttl > now:
                return False
            self.forget_topic(topic)
        return True

    def prepare(self, size: int) -> bool:
        """Get ready to `give_back`: charge about so many bytes of what was put off. True when there is
        nothing left to charge."""
        self._begin_charging()
        while size > 0 and self._uncharged:
            size -= self._charge_topic(self._uncharged.pop())
        return not self._uncharged

    @property
    def heaviest_bytes(self) -> int:
        """The bytes of the owner that would give way first, as far as they are charged."""
        heaviest = self._shares.heaviest()
        return 0 if heaviest is None else heaviest.bytes

    def give_back(self, size: int, now: float) -> int:
        """Forget so many bytes, as when there is less room; how many that were."""
        before = self.bytes_held
        self._evict(now, max(0, before - size))
        return before - self.bytes_held

    def statistics(self) -> HistoryStatistics:
        return HistoryStatistics(
            topics=len(self._kept),
            quiet_topics=len(self._quiet),
            publications=self._publications,
            bytes=self.bytes_held,
            publications_evicted=self._evicted,
            owners=len(self._shares),
        )

    @property
    def bytes_held(self) -> int:
        """Everything that is kept, with what is needed to keep it."""
        return self._bytes + OWNER_BYTES * len(self._shares)

    def _fresh(self, topic: str, now: float) -> History | None:
        """The topic's history without what is past its time, or None if nothing is left."""
        history = self._kept.get(topic)
        if history is None:
            return None
        ring = history.ring
        while len(ring) and ring.when(0) + history.ttl <= now:
            self._drop_oldest(history)
        if len(ring):
            return history
        self._quieten(history, now)
        return None

    # quiet topics

    def _quiet_position(self, topic: str, now: float) -> Position:
        """The position of a topic that is quiet or new, which counts as asking for it."""
        former = self._quiet.get(topic)
        position = self._take_quiet(topic, now)
        # Asking does not free who is charged, or a flooder would ask for its topics.
        self._put_quiet(topic, position, now, None if former is None else former[2])
        if self.bytes_held > self.max_bytes:
            self._evict(now, self.max_bytes)
        return position

    def _put_quiet(
        self, topic: str, position: Position, now: float, payer: Publisher | None
    ) -> None:
        if payer is None:
            self._unpaid[topic] = None
        else:
            payer = self._shares.account(payer.owner)  # the same, if it has anything else
            payer.quiet[topic] = None
        self._quiet[topic] = position, now, payer
        self._count_quiet(QUIET_BYTES + text_bytes(topic), payer)

    def _take_quiet(self, topic: str, now: float) -> Position:
        position, asked = self._pop_quiet(topic)
        if position is None or asked + self.meta_ttl <= now:
            return Position(0, self.new_epoch(topic))
        return position

    def _pop_quiet(self, topic: str) -> tuple[Position | None, float]:
        if topic not in self._quiet:
            return None, 0.0
        position, asked, payer = self._quiet.pop(topic)
        del (self._unpaid if payer is None else payer.quiet)[topic]
        self._count_quiet(-QUIET_BYTES - text_bytes(topic), payer)
        return position, asked

    def _count_quiet(self, more: int, payer: Publisher | None) -> None:
        self._bytes += more
        if payer is not None:
            self._shares.charge(payer, more)

    # topics with publications

    def _wake(self, topic: str, now: float, ttl: float) -> History:
        """Open the ring of a topic that is quiet or new, to be filled at once."""
        self.meter.add(FIRST)
        position = self._take_quiet(topic, now)
        size = TOPIC_BYTES + text_bytes(topic)
        history = History(topic, position.epoch, position.offset, ttl, 0.0, size)
        self._kept[topic] = history
        self._bytes += size
        self._schedule(history, now)
        return history

    def _quieten(self, history: History, now: float) -> None:
        """Close an empty ring; the topic's epoch and top stay."""
        self._close(history)
        self._put_quiet(history.topic, history.position, now, history.payer)

    def forget_topic(self, topic: str) -> None:
        """Forget everything about a topic, if there is anything."""
        history = self._kept.get(topic)
        if history is not None:
            while len(history.ring):
                self._drop_oldest(history)
            self._close(history)
        else:
            self._pop_quiet(topic)

    def _close(self, history: History) -> None:
        """Take a topic whose ring is empty from all who have it."""
        del self._kept[history.topic]
        self._bytes -= history.bytes
        for account in history.members:
            account.own.pop(history, None)
            account.shared.pop(history, None)
        if history.payer is not None:
            self._shares.charge(history.payer, -history.bytes)

    def _drop_oldest(self, history: History) -> None:
        self._publications -= 1
        self._bytes -= self._drop_charged(history)

    def _drop_charged(self, history: History) -> int:
        """Drop the front and take its bytes, which come back, from its owner's account."""
        ring = history.ring
        offset, info = history.top + 1 - len(ring), ring.info(0)
        less = ring.drop(1)
        if offset <= history.charged:
            self._shares.charge(self._shares.account(owner_of(info)), -less)
        return less

    # charges to owners

    def _charge(self, history: History, now: float) -> None:
        """Charge what was just published to a topic, and come back under the bound."""
        self._begin_charging()
        more = 2 * self._charge_topic(history)
        while more > 0 and self._uncharged:
            more -= self._charge_topic(self._uncharged.pop())
        self._come_back(now)

    def _come_back(self, now: float) -> None:
        """Come back under the bound; charge no more when the store is nearly empty."""
        if self.bytes_held > self.max_bytes:
            self._evict(now, self.max_bytes)
        elif self._bytes < self.max_bytes // 4:
            self._charge_from = self.max_bytes // 2
            self._uncharged = []

    def _sole_publisher(
        self, history: History, payer: Publisher, publications: Sequence[Publication]
    ) -> Publisher | None:
        """Its payer, if that is the owner of all that is kept of a topic and of all that comes, and
        everything is charged already: then a sum is charged, in a fifth of the time."""
        info = publications[0].info
        for each in publications:
            if each.info is not info:
                return None
        return self._payer_if_sole(history, payer, info)

    def _payer_if_sole(
        self, history: History, payer: Publisher, info: ClientInfo | None
    ) -> Publisher | None:
        """The same where one publisher has said all that comes."""
        if self._uncharged or len(history.members) > 1:
            return None
        if history.charged < history.top or payer not in history.members:
            return None
        return payer if owner_of(info) == payer.owner else None

    def _charge_sole(self, history: History, payer: Publisher, more: int, now: float) -> None:
        """Charge a new publication, less those that it pushed out, to the sole publisher of a topic."""
        history.members[payer] = history.charged = history.top
        if history in payer.own:
            payer.own.move_to_end(history)
        if more:  # not so where a full topic keeps messages of one size
            self._shares.charge(payer, more)
            self._come_back(now)

    def _begin_charging(self) -> None:
        if self._charge_from >= 0:
            self._charge_from = -1
            self._uncharged = list(reversed(self._kept.values()))

    def _charge_topic(self, history: History) -> int:
        """Charge what has not been charged of a topic, and say how many bytes that was."""
        if self._kept.get(history.topic) is not history:
            return 0  # gone since it was listed
        ring, charged = history.ring, history.charged
        first = max(0, charged + len(ring) - history.top)
        if first == len(ring):
            return 0
        total = 0
        for place in range(first, len(ring)):
            size = ring.weight(place)
            account = self._shares.account(owner_of(ring.info(place)))
            self._shares.charge(account, size)
            total += size
            if account not in history.members:
                self._join(history, account, is_front=not place)
            history.members[account] = history.top + 1 - len(ring) + place
        history.charged = history.top
        if history.payer is None:
            history.payer = self._owner_of_front(history)
            self._shares.charge(history.payer, history.bytes)
            total += history.bytes
        if len(history.members) == 1 and history in history.payer.own:
            history.payer.own.move_to_end(history)
        return total

    def _join(self, history: History, account: Publisher, *, is_front: bool) -> None:
        (account.own if is_front else account.shared)[history] = None
        # Of a busy topic, those go who have nothing left there; constant per member.
        if len(history.members) > 2 * len(history.ring) + 16:
            for each in [each for each in history.members if self._is_gone(history, each)]:
                self._leave(history, each)

    def _owner_of_front(self, history: History) -> Publisher:
        return self._shares.account(owner_of(history.ring.info(0)))

    def _is_gone(self, history: History, account: Publisher) -> bool:
        """Whether all that `account` has published to this topic has been dropped."""
        return history.members[account] <= history.top - len(history.ring)

    def _leave(self, history: History, account: Publisher) -> None:
        """Take a topic from a member that has nothing left there; the payer hands it on."""
        del history.members[account]
        account.own.pop(history, None)
        account.shared.pop(history, None)
        if account is history.payer:
            history.payer = self._owner_of_front(history)
            self._shares.charge(history.payer, history.bytes)
            self._shares.charge(account, -history.bytes)

    # the bound on all topics

    def _evict(self, now: float, most: int) -> None:
        """Come back under a bound.

        Each turn frees something, so the cost is what is freed: the looks at topics that free
        nothing are bounded, but for those that take a topic from where it does not belong.
        """
        self._begin_charging()  # quiet topics may have filled it while nothing was published
        while self._uncharged:
            self._charge_topic(self._uncharged.pop())
        while self.bytes_held > most:
            self.meter.add(EVICTED)
            account = self._shares.heaviest()
            if account is None or len(self._unpaid) * QUIET_BYTES > self.max_bytes // 2:
                self.forget_topic(next(iter(self._unpaid)))
                continue
            if len(account.quiet) * QUIET_BYTES > account.bytes // 2 or not (
                account.own or account.shared
            ):
                self.forget_topic(next(iter(account.quiet)))
                continue
            history = self._topic_to_trim(account)
            if history is not None:
                self._drop_oldest(history)
                self._evicted += 1
                if not len(history.ring):
                    self._quieten(history, now)

    def _topic_to_trim(self, account: Publisher) -> History | None:
        """The topic whose front goes when this owner is the heaviest.

        None if it has no publication any more in a topic looked at: ask again.
        """
        while account.own:
            history = next(iter(account.own))
            if self._owner_of_front(history) is account:
                return history
            del account.own[history]
            account.shared[history] = None
        for history in list(islice(account.shared, LOOKS)):
            if self._is_gone(history, account):
                self._leave(history, account)
            elif self._owner_of_front(history) is account:
                del account.shared[history]
                account.own[history] = None
                return history
        if not account.shared:
            return None
        history = next(iter(account.shared))
        account.shared.move_to_end(history)
        return None if self._is_gone(history, account) else history

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
