"""The queue of those who have used up their share of the loop, and one party's share of it.

A party is a cause of work: a session, or one connection of a backend. How much it may do at once, and how
fast it may do more, is said in `core.work`; here it waits for its turn.

Rules:

1. Strictly first come, first served. Between two rounds of the queue everybody else runs.
2. A party that waits says how much work its next act takes, and may do all of it. As many have their turn in
   one round as fill it: so publications of several reach a listener in one write.
3. Beyond its act each may do an equal part of one slice. A party that cannot say how much comes is alone in
   its round, and has a slice.
4. Nobody queues behind itself: a party that had the last turn, and has let everybody run since, has the
   next one at once, unless somebody waits.
5. A thousand may come at one moment, each with a burst to spare: those who come enter as many at a time as
   fill a round, and those who are here do not wait for them.
6. So may a thousand who are here. Once their bursts have filled a round, each of the others may do a little at once;
   for more it waits for its turn. One that wants little, as most do, is not behind a thousand who want more.
7. Behind so much work (`SWEEP`) new objects are looked at, by the one who waits then.
"""

from collections.abc import Callable

import attrs
import trio

from broker.core.work import COMMAND, LITTLE, ROUND, SLICE, SWEEP, Allowance, Meter


@attrs.define(eq=False)
class Turns:
    """The one queue of a broker. `meter` is that of the broker."""

    meter: Meter = attrs.field(factory=Meter)
    _lot: trio.lowlevel.ParkingLot = attrs.field(init=False, factory=trio.lowlevel.ParkingLot)
    _wanted: dict[trio.lowlevel.Task, float] = attrs.field(init=False, factory=dict)
    """By what they want to do, those who wait in the lot fill a round."""
    _called: int = attrs.field(init=False, default=0)
    """How many have been called, and have yet to take their turn."""
    _more: float = attrs.field(init=False, default=0.0)
    """For each that was called: its part of a slice, beyond what it wants to do."""
    _entered: float = attrs.field(init=False, default=0.0)
    """Work that `enter` has let in since everybody else ran."""
    at_once: Meter = attrs.field(init=False, factory=Meter)
    """Work that parties have done without a turn since the last one that waited for none, or a round, began."""
    collect: Callable[[], object] = attrs.field(default=lambda: None)
    """Has Python's collector look at new objects; does nothing in a process that is not the broker's own."""
    _sweep_at: float = attrs.field(init=False, default=SWEEP)  # by the meter
    latest: "Share | None" = attrs.field(init=False, default=None)
    """The share whose turn was the last; None if that was no share's."""

    @property
    def is_free(self) -> bool:
        """Whether nobody waits for a turn. Of those who wanted one, some may have been cancelled, and not be
        told yet: nobody will be called behind them."""
        return not (self._called or self._lot)

    @property
    def waiting(self) -> int:
        """How many wait for their turn."""
        return len(self._wanted)

    async def wait(self, work: float | None = None) -> float:
        """Wait for a turn in which so much may be done, with all others before it having had theirs;
        return how much may be done in it. None: nobody knows.

        Cancelled while it waits, the place is given up.
        """
        if self.meter.done >= self._sweep_at:
            self.sweep()
        if not self.is_free:
            task = trio.lowlevel.current_task()
            self._wanted[task] = ROUND if work is None else work
            try:
                await self._lot.park()
            finally:
                del self._wanted[task]
            self._entered = ROUND
        else:
            await trio.lowlevel.checkpoint_if_cancelled()
            self._called, self._more = 1, SLICE
            await trio.lowlevel.cancel_shielded_checkpoint()
            self._entered = self.at_once.done = 0.0
        granted = SLICE if work is None else work + self._more
        self._called -= 1
        self.latest = None
        if not self._called:
            self._call()
        return granted

    def sweep(self) -> None:
        """Have new objects looked at, and again behind so much work: see `SWEEP`."""
        self.collect()
        self._sweep_at = self.meter.done + SWEEP

    async def pay(self, work: float) -> None:
        """Wait for a turn in which so much may be done, and count it. Cancelled, it has counted nothing."""
        await self.wait(work)
        self.meter.add(work)

    async def enter(self, work: float) -> None:
        """Count work by which somebody comes, of whom there may be many at once. Returns at once, without a
        checkpoint, until such work has filled a round; from then on it is as `pay`."""
        if self._entered < ROUND and self.is_free:
            self._entered += work
            self.meter.done += work
        else:
            await self.pay(work)

    def _call(self) -> None:
        """Call those whose turn is in the next round."""
        self.at_once.done = 0.0
        left = ROUND
        while self._lot and left > 0:
            for task in self._lot.unpark():
                left -= self._wanted[task]
                self._called += 1
        self._more = SLICE / max(1, self._called)


@attrs.define(eq=False)
class Share(Allowance):
    """The work that one party may do now, and its place in the queue when that is used up."""

    turns: Turns = attrs.field(kw_only=True)
    at_once: Meter = attrs.field(
        init=False, default=attrs.Factory(lambda share: share.turns.at_once, takes_self=True)
    )
    is_used_up: bool = attrs.field(init=False, default=False)
    """Whether there was no room when it was last asked."""
    _wanted: float | None = attrs.field(init=False, default=None)  # when there was no room for it

    def narrow(self) -> None:
        """Leave no more than a little to be done without a turn, where others have filled a round so."""
        if self.at_once.done >= ROUND and self.slice <= 0:
            self.refill(trio.current_time())
            self.left: float = min(self.left, LITTLE)

    def renew(self) -> None:
        """Have the next turn now, if rule 4 gives it; the caller has come through a checkpoint since its
        last work, at which everybody else ran."""
        if self.turns.latest is self and self.turns.is_free:
            self.slice: float = SLICE

    def begin(self) -> bool:
        """Count the time that has passed; whether anything at all may be done."""
        self.refill(trio.current_time())
        self.is_used_up = not self.admits(0.0)
        self._wanted = None  # nobody knows what comes
        return not self.is_used_up

    def has_room(self, work: float = 0.0) -> bool:
        """Whether an act of so much work, besides that of every command, may be done in this step."""
        if self.admits(work):
            return True
        self.is_used_up = True
        self._wanted = work + COMMAND
        return False

    def want_turn(self) -> None:
        """Note that the next work has to wait for a turn, because nobody knows how much it is."""
        self.is_used_up = True
        self._wanted = None

    async def wait_turn(self) -> None:
        """Wait for a turn in which there is room for what there was none for."""
        self.slice = await self.turns.wait(self._wanted)
        self.turns.latest = self
        self.is_used_up = False

    async def wait_room(self, work: float = 0.0) -> None:
        """Wait until an act of so much work may be done; returns at once, without a checkpoint, if that
        is so now."""
        if not (self.may_do(work) or self.has_room(work)):
            await self.wait_turn()

    def may_do(self, work: float) -> bool:
        """Whether `wait_room` would return at once for so much work."""
        self.narrow()
        if self.is_low():
            self.refill(trio.current_time())
        return self.admits(work)

    async def wait_slice(self, work: float) -> None:
        """As `wait_room`, for what nobody gains by if others do theirs in the same round: alone in it, for
        a slice."""
        if not self.may_do(work):
            self.want_turn()
            await self.wait_turn()
