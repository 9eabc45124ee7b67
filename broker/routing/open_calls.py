"""Calls to other nodes that wait for their answer, each ended once: by that, or when its time is over."""

import heapq
from collections.abc import Callable
from math import inf
from typing import Final, TypeAlias

import attrs
import trio

from broker.errors import ErrorCode, Refused

CALL_SECONDS: Final = 2.0
"""As long as an answer may take: it is a matter of milliseconds. A node that takes longer hangs, and is
declared dead soon."""

Answer: TypeAlias = Callable[[bytes | Refused], None]
"""Called once, with the answer or with the fault. Never waits."""


@attrs.frozen(eq=False)
class _Open:
    node: str
    answer: Answer


@attrs.define(eq=False)
class OpenCalls:
    """See the module. `settle` is called when those that ended together were all told."""

    settle: Callable[[], None] = attrs.field(init=False, default=lambda: None)
    _calls: dict[int, _Open] = attrs.field(init=False, factory=dict)
    _due: list[tuple[float, int]] = attrs.field(init=False, factory=list)
    _sooner: trio.Event = attrs.field(init=False, factory=trio.Event)
    _last: int = attrs.field(init=False, default=0)

    def __len__(self) -> int:
        return len(self._calls)

    @property
    def deadlines(self) -> int:
        """Deadlines that are remembered, of calls too that were answered in the last seconds."""
        return len(self._due)

    def next_number(self) -> int:
        """A number that no call had."""
        self._last += 1
        return self._last

    def add(self, number: int, node: str, answer: Answer, seconds: float) -> None:
        """A node was asked, and has so many seconds to answer; with `inf` as long as it lives."""
        self._calls[number] = _Open(node, answer)
        if seconds == inf:
            return
        due = trio.current_time() + seconds
        if not self._due or due < self._due[0][0]:
            self._sooner.set()
        heapq.heappush(self._due, (due, number))

    def end(self, number: int, answer: bytes | Refused) -> None:
        """This is the answer; one that nobody waits for any more is dropped."""
        call = self._calls.pop(number, None)
        if call is not None:
            call.answer(answer)
            self.settle()

    def forget(self, number: int) -> None:
        """Nobody waits for this answer any more."""
        self._calls.pop(number, None)

    def end_all(self, why: str, node: str | None = None) -> None:
        """No answers will come, from this node or from any."""
        ended = [n for n, call in self._calls.items() if node in (None, call.node)]
        for number in ended:
            self._calls.pop(number).answer(unanswered(why))
        self.settle()

    async def keep_time(self) -> None:
        """End what has waited for too long, until cancelled."""
        while True:
            self._sooner = trio.Event()
            with trio.move_on_at(self._due[0][0] if self._due else inf):
                await self._sooner.wait()
            now = trio.current_time()
            # Those that were answered go when they come first, or their time comes: two seconds at most.
            while self._due and (self._due[0][0] <= now or self._due[0][1] not in self._calls):
                _, number = heapq.heappop(self._due)
                if number in self._calls:
                    self.end(number, unanswered("a node does not answer"))


class Unanswered(Refused):
    """Nobody has answered: it may have been done or not. An error 100, temporary."""


def unanswered(why: str) -> Unanswered:
    """The answer to a call that nobody has answered."""
    return Unanswered(ErrorCode.INTERNAL, f"{why}: not known whether it was done")
