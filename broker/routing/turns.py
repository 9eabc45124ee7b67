"""The queue of those who have used up their share of the loop, and one party's share of it.

A party is whoever causes work: a session, or one connection of a backend. How much it may do at once,
and how fast it may do more, is said in `core.work`; here it waits for its turn.
"""

import attrs
import trio

from broker.core.work import SLICE, Allowance


@attrs.define(eq=False)
class Share:
    """The work that one party may do now. `turns` is the one queue of its broker: strictly first
    come, first served."""

    turns: trio.Lock
    is_used_up: bool = attrs.field(init=False, default=False)
    """Whether there was no room when it was last asked."""
    _allowance: Allowance = attrs.field(init=False, factory=Allowance)
    _slice: float = attrs.field(init=False, default=0.0)  # left of its last turn in the queue

    def refill(self) -> None:
        """Count the time that has passed, if that is worth it. Before each step that begins of itself."""
        if self._slice <= 0 and self._allowance.is_low:
            self._allowance.refill(trio.current_time())

    def has_room(self, work: float = 0.0) -> bool:
        """Whether so much may be done in this step.

        A turn in the queue has room for one act of any size, and else for its slice.
        """
        has_room = self._slice > 0 or self._allowance.admits(work)
        self.is_used_up = not has_room
        return has_room

    def spend(self, work: float) -> None:
        """Count what was done."""
        self._slice -= work
        self._allowance.spend(work)

    async def wait_turn(self) -> None:
        """Wait for a place in the queue to come up: all others have their turn first.

        Cancelled, the place is given up.
        """
        async with self.turns:
            self._slice = SLICE

    async def wait_room(self, work: float = 0.0) -> None:
        """Wait until so much may be done; returns at once, without a checkpoint, if that is so now."""
        self._allowance.refill(trio.current_time())
        if not self.has_room(work):
            await self.wait_turn()
