"""What has arrived for the app and was not taken yet: what it iterates over."""

import math
from collections.abc import AsyncIterator, Callable
from typing import Any, Generic, TypeVar, cast

import attrs
import trio

from broker.client.wire import Pub, Subscribed
from broker.core.messages import ClientInfo, Position, Publication
from broker.errors import ClientError, RequestFailed, Unavailable

INBOX_MESSAGES = 256
"""Publications that wait in one subscription before we stop reading from the socket: two
full reads of small messages."""


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
    """Stands between publications where a subscription began anew after a gap."""

    position: Position | None


_Item = TypeVar("_Item", Publication, Publication | Join | Leave)


class Inbox:
    """What arrived and was not taken yet. Putting never waits; `full` makes the reader pause."""

    def __init__(self, taken: Callable[[], None]) -> None:
        self._send, self._receive = trio.open_memory_channel[Any](math.inf)
        self._taken = taken

    @property
    def full(self) -> bool:
        return self._receive.statistics().current_buffer_used >= INBOX_MESSAGES

    def put(self, item: object) -> None:
        self._send.send_nowait(item)

    async def take(self) -> Any:
        item = await self._receive.receive()
        self._taken()
        return item

    def drop_oldest(self) -> None:
        self._receive.receive_nowait()

    def finish(self) -> None:
        """What is in it can still be taken; then comes the end."""
        self._send.close()

    def discard(self) -> None:
        self._send.close()
        self._receive.close()
        self._taken()


class Subscription(AsyncIterator[_Item], Generic[_Item]):
    """What arrives on one topic or pattern; made by `Client.subscribe`.

    Iterating yields each `Publication` once, in the order of its topic, over reconnects as well.
    It ends with `Unavailable` when the connection is gone for good, and with `RequestFailed`
    when the broker ended the subscription.

    Iterate over every subscription you hold, in a task of its own if there are several: when
    more than 256 publications wait in one, the client stops reading from the socket until some
    are taken. The broker then sees a slow consumer; if it closes the connection for that, the
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
    ) -> None:
        self.topic = topic
        """The topic or pattern asked for."""
        self.position: Position | None = since
        """Where the iterator is: pass it as `since` later, in another process too. None for a
        pattern, and where the topic keeps no history."""
        self.recovered = False
        """Whether the last subscribe that had a past to recover got all of it."""
        self.gaps = 0
        """How often publications may have been missed before what the iterator yields next:
        after a reconnect or an "insufficient state" that could not be recovered from. To be
        told at once, compare it after each item; then load what you need anew."""
        self._recoverable = recoverable
        self._join_leave = join_leave
        self._group = group
        # `position` is what the consumer has seen; this is what has arrived, to recover from.
        self._reached = since
        self._resuming = since is not None
        self._granted: object = None  # the connection on which the broker has said yes
        self._inbox = Inbox(taken)
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
            if self.position is not None and isinstance(item, Publication) and item.offset:
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
        tracked = result.recoverable or result.positioned
        top = Position(result.offset, result.epoch) if tracked else None
        self.recovered = self._resuming and self._reached is not None and result.recovered
        if self.recovered:
            assert self._reached is not None
            self._reached = Position(self._reached.offset, result.epoch)
        else:
            self._reached = top
        if not self._settled.is_set():
            self.position = self._reached
            self.gaps = int(self._resuming and not self.recovered)
        elif not self.recovered:
            self._inbox.put(Mark(top))
        self._resuming = True
        for pub in result.publications:
            self._deliver(pub)
        if self.recovered:
            self._reached = top
        self._settled.set()

    def _deliver(self, pub: Pub) -> None:
        if pub.offset and self._reached is not None and not pub.channel:
            if pub.offset <= self._reached.offset:
                return  # came with the recovery already
            self._reached = Position(pub.offset, self._reached.epoch)
        self._inbox.put(pub.freeze(self.topic))

    def _fail(self, error: ClientError) -> None:
        if self._error is None:
            self._error = error
            self._inbox.finish()
            self._settled.set()


class Messages(AsyncIterator[Publication]):
    """What arrives for this fd: direct messages and what the server pushes; all on topic `fd:N`.

    Publications on topics that the server subscribed this connection to come here as well.
    At most once: a message sent while we are away finds no such fd, and its sender is told.
    Until somebody iterates, the 256 newest are kept and `dropped` counts the others; from then
    on, not taking them makes the client stop reading, as with a `Subscription`.
    """

    def __init__(self, taken: Callable[[], None]) -> None:
        self.dropped = 0
        self._inbox = Inbox(taken)
        self._wanted = False
        self._error: ClientError | None = None

    def __aiter__(self) -> "Messages":
        return self

    async def __anext__(self) -> Publication:
        self._wanted = True
        try:
            return cast("Publication", await self._inbox.take())
        except trio.EndOfChannel:
            assert self._error is not None
            raise again(self._error) from None

    def _deliver(self, publication: Publication) -> None:
        if not self._wanted and self._inbox.full:
            self._inbox.drop_oldest()
            self.dropped += 1
        self._inbox.put(publication)

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
