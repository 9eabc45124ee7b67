"""All that this node has for the shared log, until it is read back, or nobody waits for it any more."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, groupby
from math import inf
from typing import Final, cast

import attrs
import msgspec
import trio
from msgspec import Struct

from broker.core.messages import Position, Publication, Series
from broker.core.names import PERSONAL
from broker.engines.engine import SUBMISSION_BYTES, Done, IdempotencyKey, Submission
from broker.engines.records import Batch
from broker.engines.redis_log import Draft, Flight
from broker.engines.waiting import BATCH_BYTES, BATCH_PUBLICATIONS, Waiting
from broker.errors import ErrorCode, Refused

BATCH_RUNS: Final = 500
"""Runs in one batch: 4 ms of Redis, in which nobody else is served."""

NOTE_BYTES: Final = 256
"""A note to other nodes that waits costs so much besides its data."""

JOINED_BYTES: Final = 64 * 2**10
"""Runs on one topic that wait one behind the other go as one, of so many bytes: as much as one read from a publisher
holds. Each takes 70 µs besides its publications, from its read to its answer; and what comes back as one brings
the next as one."""

JOINED_SECONDS: Final = 0.25
"""What was said later than the first of them by more goes by itself: it may wait for longer."""

PUBLISH_SECONDS: Final = 5.0
"""How long a publisher waits for an answer: longer than most failovers take, shorter than clients wait for
a reply."""

LONGEST_TTL: Final = 10 * 365 * 86400.0
"""Seconds that a history lives at most, in numbers that Redis can take."""

NOT_KNOWN: Final = "not known whether it was kept: repeat it with a key"


class Posted(Struct, array_like=True):
    """The publications of a run as they travel, the fds that get nothing, and who wants a report."""

    batches: list[Batch]
    exclude: list[int] = []
    report_to: str = ""


_encode = msgspec.msgpack.Encoder().encode
_decoder: Final = msgspec.msgpack.Decoder(Posted)
decode_posted: Callable[[bytes], Posted] = _decoder.decode


@attrs.define(eq=False)
class Post:
    """A submission on its way."""

    submission: Submission
    due: float
    weight: int
    is_waited_for: bool = True
    is_over: bool = False
    _joined: list[tuple[int, list[Done]]] = attrs.field(init=False, factory=list)
    """Of each run in it, where it is several: how many publications are behind it, and who waits for it."""

    @property
    def topic(self) -> str:
        return self.submission.parcel.topic

    @property
    def party(self) -> object:
        return self.submission.party

    def end(self, result: Position | Refused | None) -> None:
        """Tell those who wait, once."""
        dones, self.submission.dones = self.submission.dones, []
        joined, self._joined = self._joined or [(0, dones)], []
        self.is_waited_for = False
        for behind, waiting in joined:
            answer = result
            if behind and isinstance(result, Position):
                answer = Position(result.offset - behind, result.epoch)
            for done in waiting:
                done(answer)

    def may_join(self, first: "Post") -> bool:
        """Whether this run may go as one with another, which comes right before it on its topic."""
        mine, its = self.submission, first.submission
        return (
            mine.parcel.topic == its.parcel.topic
            and mine.party is its.party
            and mine.rules is its.rules
            and mine.keep == its.keep
            and mine.retain == its.retain
            and self.due - first.due <= JOINED_SECONDS
            and _is_plain(mine)
            and _is_plain(its)
        )

    def join(self, others: "Sequence[Post]") -> None:
        """Take these in, which come right behind it: they are one run, and over when this is. Each is still told its
        own place."""
        submission = self.submission
        batches = submission.parcel.batches
        behind = sum([other.submission.count for other in others])
        self._joined = [(behind, submission.dones)]
        submission.count += behind
        for other in others:
            behind -= other.submission.count
            self._joined.append((behind, other.submission.dones))
            self.weight += other.weight
            batches += other.submission.parcel.batches
        submission.parcel.batches = _merged(batches)

    def draft(self) -> Draft:
        """Raises `ValueError` and `TypeError` for tags of the app's that are no texts."""
        submission = self.submission
        parcel, rules, key = submission.parcel, submission.rules, submission.key
        flags = "k" if submission.keep else ("n" if rules.history_size else "e")
        if parcel.topic.startswith(PERSONAL):
            flags = "u"
        if submission.retain:
            flags += "c" if parcel.batches[-1][-1].data == b"null" else "v"
        if parcel.report_to:
            flags += "r"
        ttl = int(min(rules.history_ttl, LONGEST_TTL) * 1000)
        count = submission.count
        once = "" if key is None else _name_of(key, parcel.topic)
        batches = list(map(Batch.of, parcel.batches))
        posted = Posted(batches, list(parcel.exclude), parcel.report_to)
        return Draft(
            flags, parcel.topic, rules.history_size, max(1, ttl), count, once, _encode(posted)
        )


def _is_plain(submission: Submission) -> bool:
    """Whether it is a run of what clients say, with nothing that is for itself alone."""
    parcel = submission.parcel
    return (
        submission.key is None
        and parcel.report is None
        and not parcel.report_to
        and not parcel.exclude
        and all(type(batch) is Series for batch in parcel.batches)
    )


def _merged(batches: Sequence[Sequence[Publication]]) -> list[Sequence[Publication]]:
    """The same, with what one publisher says in a row as one batch."""
    found: list[Sequence[Publication]] = []
    for _, row in groupby(cast("Sequence[Series]", batches), _speaker):
        first, *others = row
        if others:
            contents = [*chain(first.contents, *(other.contents for other in others))]
            first = Series(first.topic, contents, first.info, 0, first.opaque)
        found.append(first)
    return found


def _speaker(batch: Series) -> tuple[int, bool]:
    return id(batch.info), batch.opaque


def _name_of(key: IdempotencyKey, topic: str) -> str:
    """Another one for each owner, topic and key."""
    owner = "" if key.owner is None else f"u{key.owner}"
    return f"{len(owner)}:{owner}{len(topic)}:{topic}{key.key}"


@attrs.define(eq=False)
class Order:
    """A topic's publications are to be removed (`R`), or the topic is to be forgotten (`F`)."""

    flag: str
    topic: str
    due: float
    weight: int = SUBMISSION_BYTES
    is_waited_for: bool = True
    is_over: bool = False
    party: None = None
    ended: trio.Event = attrs.field(factory=trio.Event)
    refusal: Refused | None = None

    def end(self, result: Position | Refused | None) -> None:
        self.is_waited_for = False
        self.refusal = result if isinstance(result, Refused) else None
        self.ended.set()

    def draft(self) -> Draft:
        return Draft(self.flag, self.topic)


@attrs.define(eq=False)
class Note:
    """A message, a notice or a card for other nodes, in its order among all else. `draft` is appended. A
    message is not sent any more after `due`; notices and cards have none."""

    made: Draft
    due: float
    weight: int
    is_waited_for: bool = False
    is_over: bool = False
    party: None = None

    @property
    def topic(self) -> str:
        return self.made.topic

    def end(self, result: Position | Refused | None) -> None:
        """Nobody waits for it."""

    def draft(self) -> Draft:
        return self.made


Item = Post | Order | Note


@attrs.define(eq=False)
class Outgoing:
    """The items that wait to be appended, each party's in their order; their bytes, and the bytes of those
    that were sent."""

    wake: Callable[[], None]
    """Called when there is something to append."""
    submitted: int = 0
    orders: Counter[str] = attrs.field(init=False, factory=Counter)
    """Orders that are on their way, by topic."""
    noted: int = attrs.field(init=False, default=0)
    """How many notes there ever were; `taken`, how many of them wait no more. They are taken in their order."""
    taken: int = attrs.field(init=False, default=0)
    items: Waiting[Item] = attrs.field(init=False, factory=Waiting)

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Item]:
        return iter(self.items)

    @property
    def waiting(self) -> int:
        return self.items.bytes

    def post(self, submission: Submission) -> None:
        submission.weigh()
        self.submitted += submission.count
        due = trio.current_time() + PUBLISH_SECONDS
        self._put(Post(submission, due, submission.weight), submission.topic)

    def order(self, flag: str, topic: str) -> Order:
        order = Order(flag, topic, trio.current_time() + PUBLISH_SECONDS)
        self.orders[topic] += 1
        self._put(order, topic)
        return order

    def note(self, draft: Draft, *, lasts: bool) -> None:
        """Have this written; `lasts`: however long that takes."""
        due = inf if lasts else trio.current_time() + PUBLISH_SECONDS
        self.noted += 1
        self._put(Note(draft, due, len(draft.data) + len(draft.topic) + NOTE_BYTES))

    def _put(self, item: Item, topic: str = "") -> None:
        self.items.put(item, topic)
        self.wake()

    def gather(self) -> tuple[list[Draft], list[Item]]:
        """Take as much as a batch may hold. No checkpoint."""
        drafts: list[Draft] = []
        items: list[Item] = []
        size = count = 0
        while (
            self.items
            and len(items) < BATCH_RUNS
            and count < BATCH_PUBLICATIONS
            and size < BATCH_BYTES
        ):
            item = self._take()
            self.taken += isinstance(item, Note)
            try:
                draft = item.draft()
            except (ValueError, TypeError) as error:
                self.refuse(item, f"not kept: {error}")
                self.note_over(item)
                continue
            size += len(draft.data)
            count += draft.count
            drafts.append(draft)
            items.append(item)
        if self.items:
            self.wake()
        return drafts, items

    def _take(self) -> Item:
        """The next item; runs on one topic that are next are one."""
        weight = 0

        def joins(first: Item, item: Item) -> bool:
            nonlocal weight
            weight += item.weight
            return (
                weight + first.weight <= JOINED_BYTES
                and isinstance(item, Post)
                and isinstance(first, Post)
                and item.may_join(first)
            )

        row = self.items.take_row(joins)
        first = row[0]
        if isinstance(first, Post) and len(row) > 1:
            first.join([each for each in row[1:] if isinstance(each, Post)])
        return first

    def drop_notes(self) -> None:
        """Say nothing of what was said in the name of a node that is dead."""
        for item in self._remove(lambda item: isinstance(item, Note)):
            self.note_over(item)

    def _remove(self, goes: Callable[[Item], bool]) -> list[Item]:
        gone = self.items.remove(goes)
        self.taken += sum(isinstance(item, Note) for item in gone)
        return gone

    def note_over(self, item: Item) -> None:
        """It is on its way no longer. Once: later calls do nothing."""
        if item.is_over:
            return
        item.is_over = True
        self.items.over(item)
        if isinstance(item, Order):
            self.orders[item.topic] -= 1
            if not self.orders[item.topic]:
                del self.orders[item.topic]

    def refuse(self, item: Item, why: str) -> None:
        """Tell those who wait for it that it is not kept, or not known to be."""
        if item.is_waited_for:
            item.end(Refused(ErrorCode.INTERNAL, why))

    def refuse_all(self, why: str) -> None:
        """Give up all that was not sent."""
        for item in self._remove(lambda item: True):
            self.refuse(item, f"not kept: {why}")
            self.note_over(item)

    def refuse_overdue(self, flights: Sequence[Flight], why: str) -> bool:
        """Refuse the items that have waited for too long; whether there were any. Items that were sent stay
        on their way."""
        now = trio.current_time()
        is_any = any(item.due <= now for item in self.items)
        late = self._remove(lambda item: item.due <= now) if is_any else []
        for item in late:
            self.refuse(item, f"not kept: {why or 'it took too long'}")
            self.note_over(item)
        found = bool(late)
        for flight in flights:
            if flight.is_given_up or flight.sent_at > now:
                continue
            late = [each for each in flight.items if isinstance(each, Item) and each.due <= now]
            for item in late:
                found = found or item.is_waited_for
                self.refuse(item, NOT_KNOWN)
            flight.is_given_up = bool(flight.items) and len(late) == len(flight.items)
        return found
