"""Events of connections, numbered, and kept until their reader has them.

Rules:

1. Within an epoch events are numbered 1, 2, 3 … without a gap. The first is `started`; with it the reader
   forgets everybody who was here in an earlier epoch. A node that was cut off from its neighbours for so long
   that they told its end begins a new one.
2. Writing never fails and never waits: when a queue is full, its oldest event is dropped.
3. Nothing is lost without a word: where events were dropped, the reader gets `lost` in their place,
   which has the number of the last of them. `started` is never dropped.
4. An event is kept until its reader says that it is done with it. So a reader that is cut short
   gets it again, and tells by the number what it has had.
"""

from collections import deque
from collections.abc import Collection, Sequence
from enum import StrEnum
from itertools import islice
from typing import Final, TypedDict, Unpack

import attrs
import msgspec

from broker.core.histogram import Histogram, HistogramStatistics

EVENT_BYTES: Final = 400
"""About what one event takes that waits, with its texts."""


class EventKind(StrEnum):
    """The kinds of events."""

    STARTED = "started"
    """The broker has started: nobody is connected to it."""
    OPENED = "opened"
    """A WebSocket was opened, or what stands in for one; its user comes later, if ever."""
    CONNECTED = "connected"
    """A Centrifuge client was let in."""
    BOUND = "bound"
    """Your program said that a connection is another user's."""
    SUBSCRIBED = "subscribed"
    UNSUBSCRIBED = "unsubscribed"
    DISCONNECTED = "disconnected"
    """A connection has ended; one for each `opened`."""
    LOST = "lost"
    """Events were dropped here, because the queue was full."""
    DIED = "died"
    """Another node that shares the engine has died without a goodbye: nobody is connected to it."""
    STOPPED = "stopped"
    """The broker has stopped in good order: nobody is connected to it."""


CHOICES = (
    EventKind.OPENED,
    EventKind.CONNECTED,
    EventKind.BOUND,
    EventKind.SUBSCRIBED,
    EventKind.UNSUBSCRIBED,
    EventKind.DISCONNECTED,
)
"""The kinds that a reader may do without; of the others it is always told."""


class Event(msgspec.Struct, frozen=True, kw_only=True, gc=False, omit_defaults=True):
    """One thing that has happened. Fields that do not apply to its kind are None.

    `epoch` names one run of the broker `node`, `seq` counts within it. `time` is in Unix seconds.
    `user` is who the connection belonged to then; empty for nobody in particular. Of a `lost`,
    `missed` is how many were dropped, the numbers `first` to `seq`. Of a `died`, `dead` is the name of
    the node that has, and `dead_epoch` the epoch that ends with it.
    """

    kind: str
    node: str
    epoch: str
    seq: int
    time: float
    fd: int | None = None
    user: str | None = None
    address: str | None = None
    path: str | None = None
    transport: str | None = None
    protocol: str | None = None
    topic: str | None = None
    code: int | None = None
    reason: str | None = None
    initiator: str | None = None
    undelivered: int | None = None
    first: int | None = None
    missed: int | None = None
    dead: str | None = None
    dead_epoch: str | None = None


class EventFields(TypedDict, total=False):
    """The fields of an event that apply to some kinds only; see `Event`."""

    address: str
    path: str
    transport: str
    protocol: str
    topic: str
    code: int
    reason: str
    initiator: str
    undelivered: int
    dead: str
    dead_epoch: str


@attrs.frozen
class EventStatistics:
    """A snapshot. `seq` is the number of the last event that has happened; `waiting` are those not
    delivered yet. `failures` are attempts to deliver, not events; `seconds` is how long each attempt
    took that went over the network."""

    node: str
    epoch: str
    seq: int
    waiting: int
    delivered: int
    dropped: int
    failures: int
    seconds: HistogramStatistics


class EventQueue:
    """The events of one epoch for one reader, who wants `kinds` of those it may do without."""

    def __init__(
        self, node: str, epoch: str, now: float, capacity: int, kinds: Collection[str] = CHOICES
    ) -> None:
        self._node = node
        self._capacity = capacity
        self._unwanted = frozenset(CHOICES) - frozenset(kinds)
        self._waiting: deque[Event] = deque()
        self.begin(epoch, now)
        self._delivered = self._dropped = 0
        self.failures = 0
        self.seconds: Histogram = Histogram()

    def begin(self, epoch: str, now: float) -> None:
        """Begin a new epoch. Events that wait are forgotten: the epoch tells that everybody has gone."""
        self._epoch = epoch
        # Beside the others, so that it cannot be dropped.
        self._started = Event(kind=EventKind.STARTED, node=self._node, epoch=epoch, seq=1, time=now)
        self._waiting.clear()
        self._seq = 1
        self._done = 0
        self._batch: list[Event] = []

    def has_told(self, epoch: str, seq: int) -> bool:
        """Whether the reader has had an event, or the epoch in which it happened is over."""
        return epoch != self._epoch or seq <= self._done

    @property
    def bytes_held(self) -> int:
        """About what the events take that wait."""
        return EVENT_BYTES * len(self._waiting)

    def statistics(self) -> EventStatistics:
        waiting = len(self._waiting) + (not self._done)
        return EventStatistics(
            self._node,
            self._epoch,
            self._seq,
            waiting,
            self._delivered,
            self._dropped,
            self.failures,
            self.seconds.statistics(),
        )

    def put(
        self,
        kind: EventKind,
        now: float,
        fd: int | None = None,
        user: str | None = None,
        **fields: Unpack[EventFields],
    ) -> bool:
        """Add an event, unless its kind is not wanted. False if another one was dropped for it."""
        if kind in self._unwanted:
            return True
        self._seq += 1
        fits = len(self._waiting) < self._capacity
        if not fits:
            self._waiting.popleft()
            self._dropped += 1
            self._batch = []
        node, epoch, seq = self._node, self._epoch, self._seq
        event = Event(
            kind=kind, node=node, epoch=epoch, seq=seq, time=now, fd=fd, user=user, **fields
        )
        self._waiting.append(event)
        return fits

    def batch(self, limit: int) -> Sequence[Event]:
        """The oldest events that are not done, at most `limit`; empty if there are none.

        Asked again before they are done it is the same batch, unless one of them was dropped.
        """
        if self._batch:
            return self._batch
        batch, after = [], self._done
        if not after:
            batch.append(self._started)
            after = self._started.seq
        if self._waiting and self._waiting[0].seq > after + 1:
            batch.append(self._lost(after + 1, self._waiting[0].seq - 1, self._waiting[0].time))
        batch += islice(self._waiting, max(0, limit - len(batch)))
        self._batch = batch[:limit]
        return self._batch

    def _lost(self, first: int, last: int, now: float) -> Event:
        return Event(
            kind=EventKind.LOST,
            node=self._node,
            epoch=self._epoch,
            seq=last,
            time=now,
            first=first,
            missed=last - first + 1,
        )

    def done(self, batch: Sequence[Event]) -> None:
        """The reader has had this batch, which `batch` gave it: forget it."""
        if batch[0].epoch != self._epoch:
            return  # a new one has begun meanwhile
        self._done = batch[-1].seq
        self._delivered += len(batch)
        self._batch = []
        while self._waiting and self._waiting[0].seq <= self._done:
            self._waiting.popleft()
