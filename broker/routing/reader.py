"""Readers in this very program: `async for publication in reader`."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from math import inf

import trio

from broker.core.messages import PUBLICATION_BYTES, ClientInfo, Fd, Publication
from broker.core.session import Audience, Parcel, Recipient, SlowRule, Subscription
from broker.errors import Lagged


class Reader:
    """Publications for one reader in this program, as they come.

    At most `capacity` of them wait, and `max_bytes`, but for one of any size; a reader that is slower
    than that loses some, and is told so.
    """

    fd: Fd = 0
    user = ""

    def __init__(self, capacity: int, max_bytes: float = inf) -> None:
        self.bytes_held: int = 0
        """Bytes of the publications that wait."""
        self._max_bytes = max_bytes
        self.subscriptions: dict[str, Subscription] = {}
        self._capacity = capacity
        # With each publication, how many were dropped right before it.
        self._send, self._receive = trio.open_memory_channel[tuple[int, Publication]](capacity)
        self._missed = 0
        self._next: Publication | None = None
        self._has_ended = False

    # as the router sees it

    @property
    def is_reachable(self) -> bool:
        return not self._has_ended

    @property
    def keeps_up(self) -> bool:
        """Whether there is room."""
        return self.bytes_waiting < self._capacity

    @property
    def bytes_waiting(self) -> int:
        """Publications that wait; a reader in this program is not weighed in bytes."""
        return self._receive.statistics().current_buffer_used

    def info_on(self, chan_info: bytes | None) -> ClientInfo | None:
        """None: a reader in this program is no client."""
        return None

    @property
    def audience_key(self) -> Hashable:
        return self

    def new_audience(self, name: str) -> Audience:
        return _ReaderAudience(name, self)

    def take(self, name: str, publications: Sequence[Publication], rule: SlowRule) -> int:
        """Return how many fitted. The others are counted, and told where they are missing."""
        taken = 0
        for publication in publications:
            size = PUBLICATION_BYTES + len(publication.data)
            if self.bytes_held and self.bytes_held + size > self._max_bytes:
                self._missed += 1
                continue
            try:
                self._send.send_nowait((self._missed, publication))
                self._missed = 0
                self.bytes_held += size
                taken += 1
            except trio.WouldBlock:
                self._missed += 1
            except trio.ClosedResourceError:  # the broker stopped, and this reader is still here
                break
        return taken

    def end(self) -> None:
        """No more will come; publications that are here can still be read."""
        self._send.close()
        self._has_ended = True

    # as the program sees it

    def __aiter__(self) -> "Reader":
        return self

    async def __anext__(self) -> Publication:
        try:
            return await self.receive()
        except trio.EndOfChannel:
            raise StopAsyncIteration from None

    async def receive(self) -> Publication:
        """The next publication.

        Raises `Lagged` in place of publications that were dropped because this reader was too slow,
        and `trio.EndOfChannel` after the last one when the broker has stopped. Cancelled, it loses
        nothing.
        """
        if self._next is not None or self._missed:
            await trio.lowlevel.checkpoint()
            if self._next is not None:
                publication, self._next = self._next, None
                return publication
            if self._missed and not self.bytes_waiting:
                missed, self._missed = self._missed, 0
                raise Lagged(missed)
        missed, publication = await self._receive.receive()
        self.bytes_held -= PUBLICATION_BYTES + len(publication.data)
        if missed:
            self._next = publication
            raise Lagged(missed)
        return publication


class _ReaderAudience:
    """An audience of one reader, which stands for itself."""

    def __init__(self, name: str, reader: Reader) -> None:
        self._name = name
        self._reader = reader

    def add(self, subscription: Subscription) -> None:
        pass  # it was made for the one that there is

    def remove(self, subscription: Subscription) -> None:
        pass

    def __len__(self) -> int:
        return int(self._name in self._reader.subscriptions)

    def __iter__(self) -> Iterator[Subscription]:
        yield self._reader.subscriptions[self._name]

    def narrowed(self, admits: Callable[[Subscription], bool]) -> Recipient:
        return self  # this program may read everything

    def deliver(self, parcel: Parcel) -> None:
        for batch in parcel.batches:
            taken = self._reader.take(self._name, batch, parcel.rule)
            if parcel.report is not None:
                parcel.report.matched += 1
                parcel.report.queued += int(taken == len(batch))
