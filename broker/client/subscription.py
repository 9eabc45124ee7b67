"""Subscriptions of a client: publications that have arrived and wait for the app to take them."""

from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any, Generic, TypeVar, cast

import attrs
import trio

from broker.client.backoff import RECONNECT_MOST_SECONDS, backoff
from broker.client.wire import Pub, Subscribed, encode
from broker.core.messages import ClientInfo, Position, Publication
from broker.errors import ClientError, RequestFailed, Unavailable

INBOX_MESSAGES = 256
"""Publications that wait in one subscription before we stop reading from the socket: two
full reads of small messages."""

INBOX_BYTES = 2**20
"""The same in bytes: one of the largest messages that a broker takes by default."""

HELD_BYTES = 64 * 2**20
"""Bytes that wait in all subscriptions of a client together. With a quarter of it we stop reading;
beyond it, while we have to read on for a reply, the connection is given up. An honest broker
can have far less on its way: an outbox of 4 MiB, two socket buffers and one message."""

ITEM_BYTES = 400
"""Bytes that an item that waits takes beside its data, as measured: the object, its info, its place."""

RECOVER_BYTES = 2**19
"""Bytes of a connect command for the topics to recover: half of the largest message that a broker takes
by default, as a token and data of the app's are in it too."""

RECOVER_EACH = 100
"""Bytes there of one topic, beside its name and its epoch: braces, the names of fields, an offset."""

TAG_BYTES = 150
"""Bytes that a tag takes beside its key and value, as measured."""


@attrs.frozen
class Join:
    """Somebody subscribed to `topic`."""

    topic: str
    info: ClientInfo


@attrs.frozen
class Leave:
    """Somebody left `topic`, or their connection ended."""

    topic: str
    info: ClientInfo


@attrs.frozen
class Mark:
    """Stands between publications where a subscription began, or ended, or began anew after a gap."""

    position: Position | None
    topic: str = ""
    is_gap: bool = True


_Item = TypeVar("_Item", Publication, Publication | Join | Leave)


class Held:
    """Bytes that wait in all inboxes of one client."""

    def __init__(self) -> None:
        self.bytes = 0

    @property
    def much(self) -> bool:
        """Whether reading should pause if it can."""
        return self.bytes >= HELD_BYTES // 4

    @property
    def too_much(self) -> bool:
        return self.bytes > HELD_BYTES


class Inbox:
    """Items that arrived and were not taken yet. Putting never waits; `full` makes the reader pause."""

    def __init__(self, taken: Callable[[], None], held: Held) -> None:
        self._items: deque[tuple[object, int]] = deque()
        self._bytes = 0
        self._held = held
        self._taken = taken
        self._waiting = trio.lowlevel.ParkingLot()
        self._finished = False
        self._discarded = False

    @property
    def full(self) -> bool:
        return len(self._items) >= INBOX_MESSAGES or self._bytes >= INBOX_BYTES

    def count_in(self, held: Held) -> None:
        """From now on what waits here counts there."""
        self._held.bytes -= self._bytes
        self._held = held
        held.bytes += self._bytes

    def put(self, item: object) -> None:
        """Add an item; nothing happens once the inbox is finished or discarded."""
        if self._finished or self._discarded:
            return
        last = self._items[-1][0] if self._items else None
        if isinstance(item, Mark) and isinstance(last, Mark) and last.topic == item.topic:
            # Nothing came between two gaps: they are one.
            item = attrs.evolve(item, is_gap=item.is_gap or last.is_gap)
            self._items[-1] = (item, self._items[-1][1])
            return
        size = ITEM_BYTES
        if isinstance(item, Publication):
            size += len(item.data) + len(item.topic)
            for key, value in (item.tags or {}).items():
                size += TAG_BYTES + len(key) + len(value)
        self._items.append((item, size))
        self._bytes += size
        self._held.bytes += size
        self._waiting.unpark()

    async def take(self) -> Any:
        """The oldest item, once there is one. Cancelled, nothing is lost.

        Raises `trio.EndOfChannel` when it is finished and empty, `trio.ClosedResourceError` when
        it was discarded.
        """
        await trio.lowlevel.checkpoint()
        while not self._items:
            if self._discarded:
                raise trio.ClosedResourceError
            if self._finished:
                raise trio.EndOfChannel
            await self._waiting.park()
        item = self.pop_oldest()
        self._taken()
        return item

    @property
    def empty(self) -> bool:
        return not self._items

    def pop_oldest(self) -> object:
        item, size = self._items.popleft()
        self._bytes -= size
        self._held.bytes -= size
        return item

    def finish(self) -> None:
        """Take no more. Items that are here can still be taken; then comes the end."""
        self._finished = True
        self._waiting.unpark_all()

    def discard(self) -> None:
        self._discarded = True
        while self._items:
            self.pop_oldest()
        self._waiting.unpark_all()
        self._taken()


class Subscription(AsyncIterator[_Item], Generic[_Item]):
    """Publications on one topic or pattern; made by `Client.subscribe`.

    Iterating yields each `Publication` once, in the order of its topic, over reconnects as well.
    It ends with `Unavailable` when the connection is gone for good, and with `RequestFailed`
    when the broker ended the subscription.

    Iterate over every subscription you hold, in a task of its own if there are several: when
    256 publications or 1 MiB wait in one, or 16 MiB in all, the client stops reading from the
    socket until some are taken. The broker then sees a slow consumer; if it closes the connection for that, the
    client comes back and recovers.
    """

    def __init__(
        self,
        topic: str,
        *,
        recoverable: bool,
        join_leave: bool,
        since: Position | None,
        group: str,
        taken: Callable[[], None],
        held: Held,
    ) -> None:
        self.topic = topic
        """The topic or pattern asked for."""
        self.position: Position | None = since
        """Where the iterator is: pass it as `since` later, in another process too. None for a
        pattern, and where the topic keeps no history."""
        self.recovered: bool = False
        """Whether the last subscribe that had a past to recover got all of it."""
        self.gaps: int = 0
        """How often publications may have been missed before what the iterator yields next:
        after a reconnect or an "insufficient state" that could not be recovered from. To be
        told at once, compare it after each item; then load what you need anew."""
        self._recoverable = recoverable
        self._join_leave = join_leave
        self._group = group
        # `position` is what the consumer has seen; this is what has arrived, to recover from.
        self._reached = since
        self._resuming = since is not None
        self._requested: object = None  # the connection on which the broker was asked last
        self._granted: object = None  # the connection on which the broker has said yes
        self._attempts = 0
        self._granted_at = 0.0
        self._inbox = Inbox(taken, held)
        self._settled = trio.Event()
        self._error: ClientError | None = None

    def __aiter__(self) -> "Subscription[_Item]":
        return self

    async def __anext__(self) -> _Item:
        while True:
            try:
                item = await self._inbox.take()
            except trio.ClosedResourceError:
                raise StopAsyncIteration from None  # its block was left
            except trio.EndOfChannel:
                assert self._error is not None
                raise again(self._error) from None
            if isinstance(item, Mark):
                self.gaps += 1
                self.position = item.position
                continue
            if (
                self.position is not None
                and isinstance(item, Publication)
                and item.offset
                and item.topic == self.topic
            ):
                self.position = Position(item.offset, self.position.epoch)
            return cast("_Item", item)

    def _params(self) -> dict[str, object]:
        params: dict[str, object] = {"channel": self.topic}
        if self._recoverable:
            params["recoverable"] = True
        if self._join_leave:
            params["join_leave"] = True
        if self._group:
            params["data"] = {"group": self._group}
        if self._reached is not None:
            params |= {
                "recover": True,
                "offset": self._reached.offset,
                "epoch": self._reached.epoch,
            }
        return params

    def _subscribed(self, result: Subscribed) -> None:
        """Begin, or go on, where the reply says; its publications come next."""
        tracked = result.recoverable or result.positioned
        since = self._reached
        self.recovered = (
            self._resuming
            and tracked
            and result.recovered
            and since is not None
            # Offsets of another epoch are of another history, whatever the broker calls it.
            and since.epoch in ("", result.epoch)
        )
        if since is not None and self.recovered:
            self._reached = Position(since.offset, result.epoch)
        else:
            self._reached = Position(result.offset, result.epoch) if tracked else None
        if not self._settled.is_set():
            self.position = self._reached
            self.gaps = int(self._resuming and not self.recovered)
        elif not self.recovered:
            self._inbox.put(Mark(self._reached))
        self._resuming = True
        self._settled.set()

    def _caught_up(self, result: Subscribed) -> None:
        """All publications of the reply are delivered.

        Some brokers reply to a recovery with the newest offset, others (as Centrifugo) with the
        one that was asked for: so the position moves with the publications, and never back.
        """
        if self._reached is not None and result.offset > self._reached.offset:
            self._reached = Position(result.offset, self._reached.epoch)

    def _pause_before_next(self, now: float) -> float:
        """Seconds to wait before a subscription that the broker ended for now is made again.

        None for the first time: the broker knows why. A broker that grants and ends it in turns is
        not hammered.
        """
        if now - self._granted_at >= RECONNECT_MOST_SECONDS:
            self._attempts = 0
        self._attempts += 1
        return 0.0 if self._attempts == 1 else backoff(self._attempts - 2)

    def _give_up_recovery(self) -> None:
        """Give up: more was missed than can be taken, so the next time is a gap."""
        self._reached = None

    def _deliver(self, pub: Pub) -> None:
        if pub.offset and self._reached is not None and pub.channel in ("", self.topic):
            if pub.offset <= self._reached.offset:
                return  # came with the recovery already
            self._inbox.put(pub.freeze(self.topic))
            self._reached = Position(pub.offset, self._reached.epoch)
        else:
            self._inbox.put(pub.freeze(self.topic))

    def _fail(self, error: ClientError) -> None:
        if self._error is None:
            self._error = error
            self._inbox.finish()
            self._settled.set()


class Messages(AsyncIterator[Publication]):
    """Publications for this fd: direct messages and pushes of the server; all on topic `fd:N`.

    At most once: a message sent while we are away finds no such fd, and its sender is told.
    Until somebody iterates, the 256 newest are kept, or 1 MiB of them, and `dropped` counts the
    others; from then on, not taking them makes the client stop reading, as with a `Subscription`.

    Publications on topics that the server subscribed this connection to come here as well. They
    are recovered after a reconnect where the topic keeps history, and what may be missing is in
    `gaps`.
    """

    def __init__(self, taken: Callable[[], None], held: Held) -> None:
        self.dropped: int = 0
        """Publications that had no room before somebody iterated."""
        self.positions: dict[str, Position] = {}
        """Where the iterator is in each topic that the server subscribed us to and that keeps
        history."""
        self.gaps: dict[str, int] = {}
        """By topic, how often publications may have been missed before what the iterator yields next.
        No entry means never; a topic that the server ends has none any more."""
        # Publications that nobody has asked for have bounds of their own, and make nobody wait.
        self._inbox = Inbox(taken, Held())
        self._held = held
        self._wanted = False
        self._error: ClientError | None = None
        # The position reached in each topic of the server's, to recover from; None without history.
        self._reached: dict[str, Position | None] = {}
        self._granted: set[str] = set()  # those of them that are of the newest connection

    def __aiter__(self) -> "Messages":
        return self

    async def __anext__(self) -> Publication:
        if not self._wanted:
            self._wanted = True
            self._inbox.count_in(self._held)
        while True:
            try:
                item = await self._inbox.take()
            except trio.EndOfChannel:
                assert self._error is not None
                raise again(self._error) from None
            if isinstance(item, Mark):
                self._pass(item)
                continue
            publication = cast("Publication", item)
            position = self.positions.get(publication.topic)
            if position is not None and publication.offset:
                self.positions[publication.topic] = Position(publication.offset, position.epoch)
            return publication

    def _deliver(self, publication: Publication) -> None:
        self._make_room()
        self._inbox.put(publication)

    def _make_room(self) -> None:
        while not self._wanted and self._inbox.full:
            item = self._inbox.pop_oldest()
            if isinstance(item, Mark):
                self._pass(item)
            else:
                self.dropped += 1

    def _mark(self, mark: Mark) -> None:
        if self._inbox.empty:
            self._pass(mark)
        else:
            self._make_room()
            self._inbox.put(mark)

    def _pass(self, mark: Mark) -> None:
        """The iterator comes by a mark."""
        self.positions.pop(mark.topic, None)
        if mark.position is not None:
            self.positions[mark.topic] = mark.position
        if mark.is_gap:
            self.gaps[mark.topic] = self.gaps.get(mark.topic, 0) + 1

    # Topics that the server has subscribed us to.

    def _to_recover(self) -> dict[str, object]:
        """The topics that the connect command asks for; those that are too much for one become gaps."""
        asked: dict[str, object] = {}
        room = RECOVER_BYTES
        for topic, position in self._reached.items():
            if position is not None:
                room -= len(encode({topic: position.epoch})) + RECOVER_EACH
                if room < 0:
                    break
                asked[topic] = {
                    "recover": True,
                    "offset": position.offset,
                    "epoch": position.epoch,
                }
        return asked

    def _reconnected(self) -> None:
        """A connection begins. Topics of the one before are remembered until it ends: the server may
        give them back later."""
        for topic in [each for each in self._reached if each not in self._granted]:
            self._ended(topic)
        self._granted = set()

    def _began(self, topic: str, result: Subscribed) -> None:
        """The server has subscribed us to a topic, perhaps again; the publications of `result` come
        next."""
        if topic in self._granted:
            return
        self._granted.add(topic)
        since, is_known = self._reached.get(topic), topic in self._reached
        tracked = result.recoverable or result.positioned
        now = Position(result.offset, result.epoch) if tracked else None
        # Offsets of another epoch are of another history, whatever the broker calls it.
        if now and since and result.recovered and since.epoch in ("", result.epoch):
            self._reached[topic] = Position(since.offset, result.epoch)
            return
        self._reached[topic] = now
        if is_known and (now is None or now != since):
            self._mark(Mark(now, topic))
        elif now is not None:
            self._mark(Mark(now, topic, is_gap=False))

    def _took_up(self, topic: str, result: Subscribed) -> None:
        """All publications of the result are delivered."""
        reached = self._reached.get(topic)
        if reached is not None and result.offset > reached.offset:
            self._reached[topic] = Position(result.offset, reached.epoch)

    def _published(self, topic: str, pub: Pub) -> None:
        """A publication on a topic of the server's."""
        reached = self._reached.get(topic)
        if pub.offset and reached is not None and pub.channel in ("", topic):
            if pub.offset <= reached.offset:
                return  # came with the recovery already
            self._reached[topic] = Position(pub.offset, reached.epoch)
        self._deliver(pub.freeze(topic))

    def _ended(self, topic: str) -> None:
        self._granted.discard(topic)
        if topic in self._reached:
            del self._reached[topic]
            self._mark(Mark(None, topic, is_gap=False))

    def _give_up_recovery(self) -> None:
        """More was missed than can be taken, so the next time is a gap."""
        self._reached = dict.fromkeys(self._reached)

    def _fail(self, error: ClientError) -> None:
        if self._error is None:
            self._error = error
            self._inbox.finish()


def again(error: ClientError) -> ClientError:
    # An exception that is raised twice drags the first traceback along.
    if isinstance(error, Unavailable):
        return Unavailable(error.code, error.reason)
    if isinstance(error, RequestFailed):
        return RequestFailed(error.code, error.message, error.temporary)
    return error
