"""The post office: one task that carries mail from outboxes to sockets.

Measured on one core with 1,000 subscribers: waking a writer task per subscriber costs about 10 µs,
a write about 4 µs, an append to a list 0.1 µs. So a delivery is an append; the outboxes that
have mail go to the postman as one list, for which he is woken once; and each is written to once,
however many messages have gathered by then.

Rules:

1. The postman knows no topic and no protocol, and nothing that a peer does can end it.
2. A round may be ten thousand writes, and one to a stream counts as several (`Outbox.writes`). Behind every
   `AT_ONCE` of them others have their turn: what they deliver
   meanwhile goes along to those who wait for this round, and with the next one to the rest.
3. A party whose mail is all there is has it carried in its own step, if that is a few writes (`FEW`): to wake
   the postman costs a turn of the loop. Where others have mail as well, one round is for all.
4. Where a thousand rooms have mail, each peer is cold in the processor's caches when it is delivered to and again
   when it is written to. So a full bag is carried by those who fill it, before they go on: unless peers have mail of
   several topics, which one write is to carry together. The rounds before tell (`_is_loose`).
5. Runs that nobody is going to get are freed a few at a time: a hundred outboxes may end in one turn of the loop.
"""

from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Final

import attrs
import trio

from broker.core.memory import Ledger
from broker.core.scopes import name_scope
from broker.core.work import WRITE, Meter
from broker.transport.outbox import Outbox
from broker.transport.runs import Run

AT_ONCE: Final = 1024
"""Writes in one step: 5 ms."""

FREED_AT_ONCE: Final = 2048
"""Runs of an outbox that ended, which are freed in one step: 0.4 ms. It may hold 32,000."""

FEW: Final = 8
"""Writes that are made without the postman: 35 µs. A turn of the loop takes 20 to 30."""

BAG: Final = 64
"""Outboxes of a full bag: what is touched of them fits into a cache, and their writes take 0.3 ms."""

_BAG_MOST: Final = 4 * BAG  # or it would be a step too long for a publisher
_LOOSE: Final = 8  # of so many writes one at most might have carried more
_SOON = 0.005  # seconds: peers that are written to twice within them are better written to once


@attrs.frozen
class PostStatistics:
    """Counters since the start: messages put into outboxes, and lists of outboxes carried.

    `bytes_held` is what the runs take that wait in any outbox now, each counted once. `delivered` is
    what fans out; `queued` is all that was put into outboxes, with replies, pushes and control frames.
    """

    messages_delivered: int
    rounds: int
    bytes_held: int
    messages_queued: int
    bytes_queued: int


class PostOffice:
    """Delivers runs to outboxes; see `open_post_office`."""

    def __init__(self) -> None:
        # The postman is woken when a bag is opened, and it is filled until he has it: once a round, however
        # many runs and outboxes that takes. A memory channel would cost 3 µs more.
        self._open_bag: list[Outbox] | None = None
        self._waiting: trio.lowlevel.Task | None = None  # the postman, for a bag
        self._closed = False
        self._holds = False
        self._latest: object = None  # the party that has posted last, if nobody else has since
        self._is_alone = False  # whether that is the one for which it holds
        self._over: dict[Outbox, None] = {}
        self._judging = False
        self._has_streams = False  # whether a write may count as several
        self._messages_delivered = 0
        self._bytes_delivered = 0
        self._rounds = 0
        self._joined = 0  # since the last round: what came to outboxes that had mail, or had just been carried early
        self._carried = 0  # and how many have been
        self._is_loose = False
        self._waste: list[list[Run]] = []
        self._is_wasted = trio.Event()
        self.ledger: Ledger = Ledger(throw_away=self._throw_away)
        """Of all runs that this office delivers; its outboxes enter in it what is offered."""
        self.meter: Meter = Meter()
        """The writes that a delivery causes are added to it."""
        self.written: float = 0.0
        """Work of all these, which is done in a later step than the delivery."""
        self.before_round: Callable[[], None] = _nothing
        """Called at the start of each round: the last chance to deliver something with it."""
        self.judged: int = 0
        """How many full outboxes were judged by their rules since the last `take_judged`."""

    def deliver(self, run: Run, outboxes: Iterable[Outbox]) -> int:
        """Put one run into each outbox; return how many took it: a sealed one does not.

        Sync, so one publication is one atomic step. Linear in the outboxes, about 0.1 µs each: the
        loop is written out because a method call per outbox would double that.
        """
        run.enter(self.ledger)
        size = run.size
        messages = run.messages
        ready = self._open_bag
        if ready is None:
            ready = self._bag()
        known = len(ready)
        full = []
        count = 0
        for outbox in outboxes:
            if outbox.sealed:
                continue  # nothing may follow a Close frame, or a write that was cut off
            count += 1
            mail = outbox.mail
            if not mail:
                ready.append(outbox)
            mail.append(run)
            outbox.bytes += size
            outbox.messages += messages
            if outbox.bytes > outbox.alarm_bytes or outbox.messages > outbox.max_messages:
                full.append(outbox)
        self._messages_delivered += count * messages
        self._bytes_delivered += count * size
        writes = len(ready) - known
        self._joined += count - writes
        if writes:
            if self._has_streams:
                writes = sum([outbox.writes for outbox in ready[known:]])
            self.meter.done += writes * WRITE
            self.written += writes * WRITE
        if full:
            self._judge(full)
        return count

    def _judge(self, full: Iterable[Outbox]) -> None:
        """Bring these outboxes back within their bounds, after those that came before them.

        After a fan-out, because a rule may end subscriptions and so change the collection that is iterated
        over. And one by one: a peer that is closed leaves, others are notified, and their outboxes fill by
        that. If that were one call inside another, a hundred slow readers would end the process.
        """
        self._over.update(dict.fromkeys(full))
        if self._judging:
            return
        self._judging = True
        try:
            while self._over:
                over, self._over = self._over, {}
                for outbox in over:
                    self.judged += 1
                    outbox.overflow()
        finally:
            self._judging = False

    @contextmanager
    def judging_later(self) -> Iterator[None]:
        """Judge outboxes that are full, each once, when the block ends."""
        if self._judging:
            yield
            return
        self._judging = True
        try:
            yield
        finally:
            self._judging = False
            self._judge(())

    def take_judged(self) -> int:
        """How many full outboxes were judged since this was last asked, for the one who pays for them."""
        judged, self.judged = self.judged, 0
        return judged

    def post(self, outboxes: list[Outbox]) -> None:
        """Have these outboxes flushed soon."""
        self._bag().extend(outboxes)

    def wake(self) -> None:
        """Have a round soon, if only for the sake of `before_round`."""
        if self._open_bag is None:
            self._bag()

    def _bag(self) -> list[Outbox]:
        """The outboxes of the next round; an outbox is in it once, unless it ran empty meanwhile."""
        if self._open_bag is None:
            self._open_bag = []
            if not self._holds:
                self._latest = None
                self._wake_postman()
        return self._open_bag

    def carry_full(self) -> None:
        """Carry the bag in this very step if it is full, and nothing more is likely to come for those in it before
        the next round."""
        outboxes = self._open_bag
        if outboxes is None or not self._is_loose or not BAG <= len(outboxes) <= _BAG_MOST:
            return
        self._open_bag = []  # the postman comes for it: he was woken, or is about to be
        self._carried += len(outboxes)
        now = trio.current_time()
        since = now - _SOON
        for outbox in outboxes:
            if outbox.sent_at > since:
                self._joined += 1
            outbox.flush(now)

    def hold(self, party: object) -> None:
        """Wake nobody for what `party` posts now; `let_go` has to follow in the same step."""
        self._holds, self._is_alone, self._latest = True, party is self._latest, party

    def let_go(self) -> None:
        """Have a round soon, if there is mail; or right now, if nobody but the party of `hold` has had any since
        it held before, and it is a few writes."""
        self._holds = False
        if self._open_bag is None or self._waiting is None:
            return  # or he has been woken already
        try:
            if self._is_alone:
                self._carry_few()
        finally:
            if self._open_bag is not None:
                self._wake_postman()

    def _carry_few(self) -> None:
        """A round in this very step; none if that is more than `FEW` writes."""
        self.before_round()
        outboxes = self._open_bag
        if outboxes is None or len(outboxes) > FEW:
            return
        if sum([outbox.writes for outbox in outboxes]) > FEW:
            return
        self._open_bag = None
        self._rounds += 1
        now = trio.current_time()
        for outbox in outboxes:
            outbox.flush(now)
        self._check_room()

    def _wake_postman(self) -> None:
        postman, self._waiting = self._waiting, None
        if postman is not None:
            trio.lowlevel.reschedule(postman)

    async def _wait_bag(self) -> bool:
        """Wait until there is a bag, with others having had their turn since the last; false when none can come
        any more."""
        if self._open_bag is not None:
            await trio.lowlevel.checkpoint()
        elif not self._closed:
            self._waiting = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(self._stop_waiting)
        return self._open_bag is not None

    def _stop_waiting(self, _: object) -> trio.lowlevel.Abort:
        self._waiting = None
        return trio.lowlevel.Abort.SUCCEEDED

    def _throw_away(self, runs: list[Run]) -> None:
        if len(runs) > FREED_AT_ONCE:
            self._waste.append(runs)
            self._is_wasted.set()

    async def wait_freed(self) -> None:
        """Free what outboxes held that have ended, with others having had their turn after each step. Cancelled,
        the rest is freed all the same."""
        while self._waste:
            del self._waste[-1][-FREED_AT_ONCE:]
            if not self._waste[-1]:
                self._waste.pop()
            await trio.lowlevel.checkpoint()

    async def _sweep(self) -> None:
        while not self._closed:
            await self._is_wasted.wait()
            self._is_wasted = trio.Event()
            await self.wait_freed()

    def close(self) -> None:
        """Have the postman end when he has carried what is there."""
        self._closed = True
        self._is_wasted.set()
        self._wake_postman()

    def statistics(self) -> PostStatistics:
        ledger = self.ledger
        return PostStatistics(
            self._messages_delivered,
            self._rounds,
            ledger.bytes_held,
            self._messages_delivered + ledger.messages_offered,
            self._bytes_delivered + ledger.bytes_offered,
        )

    async def _carry(self) -> None:
        while await self._wait_bag():
            self._rounds += 1
            self.before_round()
            outboxes, self._open_bag = self._open_bag or [], None
            now, writes, pause_at = trio.current_time(), 0, AT_ONCE
            for outbox in outboxes:
                if writes >= pause_at:
                    await trio.lowlevel.checkpoint()
                    now, pause_at = trio.current_time(), writes + AT_ONCE
                writes += outbox.writes
                outbox.flush(now)
            if writes > len(outboxes):
                self._has_streams = True
            self._note_joined(len(outboxes))
            self._check_room()

    def _note_joined(self, carried: int) -> None:
        """See, at the end of a round, whether full bags may be carried early in the next."""
        carried += self._carried
        if carried > _BAG_MOST:
            self._is_loose = _LOOSE * self._joined <= carried
        self._joined = self._carried = 0

    def _check_room(self) -> None:
        ledger = self.ledger
        if ledger.bytes_held > ledger.most:
            ledger.on_full()


def _nothing() -> None:
    pass


@asynccontextmanager
async def open_post_office() -> AsyncGenerator[PostOffice, None]:
    """Run the postman for as long as the block. Opened outside of the sessions, so that last
    words get out; runs that are still queued in outboxes when the block ends are not written."""
    office = PostOffice()
    async with trio.open_nursery() as postman:
        name_scope(postman, "post office")
        postman.start_soon(office._carry, name="postman")
        postman.start_soon(office._sweep, name="sweeper")
        try:
            yield office
        finally:
            office.close()
