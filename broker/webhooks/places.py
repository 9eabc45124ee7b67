"""Places for requests at once, and who gets the next one.

Rules:

1. No party holds more than its share, so it takes several to fill a pool.
2. A place that becomes free goes to the parties that wait in turn, not to the one with most waiting. Among
   the requests of one party the first that came is the first.
3. To wait for a place is bounded, and is nobody's time but the pool's.
"""

from collections import Counter, deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import attrs
import trio


class NoPlace(Exception):
    """No place became free in time. `own_fault`: the party's own requests hold all of its share."""

    def __init__(self, reason: str, *, own_fault: bool) -> None:
        super().__init__(reason)
        self.own_fault = own_fault


@attrs.define(eq=False)
class _Waiter:
    has_place: bool = False
    called: trio.Event = attrs.field(factory=trio.Event)


@attrs.frozen
class PlaceStatistics:
    """Places that are taken, and requests that wait for one."""

    taken: int
    waiting: int


@attrs.define(eq=False)
class Places:
    """`total` places, of which one party may hold `share` at once."""

    total: int
    share: int
    _taken: int = attrs.field(init=False, default=0)
    _held: Counter[str] = attrs.field(init=False, factory=Counter)
    """Places by party; one that holds none is not in it."""
    _waiting: dict[str, deque[_Waiter]] = attrs.field(init=False, factory=dict)
    """By party, those whose turn it is first."""

    @asynccontextmanager
    async def place(self, party: str, seconds: float) -> AsyncGenerator[None]:
        """Hold a place for as long as the block.

        Raises `NoPlace` after that many `seconds` without one. Cancelled while it waits, it has none
        and is waited for no more.
        """
        if self._is_free_for(party):
            self._take(party)
        else:
            await self._wait(party, seconds)
        try:
            yield
        finally:
            self._give_back(party)

    def statistics(self) -> PlaceStatistics:
        """A snapshot."""
        return PlaceStatistics(self._taken, sum(map(len, self._waiting.values())))

    def _is_free_for(self, party: str) -> bool:
        # A party that waits while there are free places holds its share; so nobody is overtaken.
        return self._taken < self.total and self._held[party] < self.share

    def _take(self, party: str) -> None:
        self._taken += 1
        self._held[party] += 1

    async def _wait(self, party: str, seconds: float) -> None:
        waiter = _Waiter()
        self._waiting.setdefault(party, deque()).append(waiter)
        try:
            with trio.move_on_after(seconds):
                await waiter.called.wait()
                return
        except BaseException:
            # It may have been called in the very moment in which it was cancelled.
            if waiter.has_place:
                self._give_back(party)
            raise
        finally:
            if not waiter.has_place:
                self._leave(party, waiter)
        if waiter.has_place:
            return
        if self._held[party] >= self.share:
            reason = (
                f"{party} held its share, {self.share} of {self.total} at once, for {seconds:g} s"
            )
            raise NoPlace(reason, own_fault=True)
        raise NoPlace(f"all {self.total} places were taken for {seconds:g} s", own_fault=False)

    def _leave(self, party: str, waiter: _Waiter) -> None:
        self._waiting[party].remove(waiter)
        if not self._waiting[party]:
            del self._waiting[party]

    def _give_back(self, party: str) -> None:
        self._taken -= 1
        self._held[party] -= 1
        if not self._held[party]:
            del self._held[party]
        # Linear in the parties that hold their whole share: a few, because there is room for no more.
        for following in self._waiting:
            if self._is_free_for(following):
                self._call(following)
                break

    def _call(self, party: str) -> None:
        waiters = self._waiting.pop(party)
        waiter = waiters.popleft()
        if waiters:
            self._waiting[party] = waiters  # behind all other parties
        self._take(party)
        waiter.has_place = True
        waiter.called.set()
