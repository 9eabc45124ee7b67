"""The outbox: the runs that one peer has yet to get, their bounds, and the rules for a full one.

An outbox holds runs. It is filled by `PostOffice.deliver` and `offer`, emptied by `flush` (which
the postman calls) and, once a socket would block, by a writer task that lives only as long as
there is something to write.

Rules:

1. Only the outbox writes to its stream, so frames never interleave.
2. Filling never waits. A peer that is too slow is dealt with by the rule of the topic, at once.
3. Bounds are judged on what the socket did not take: before a rule is applied, we try to write.
4. A frame that has begun to go out is finished or the connection is dead; nothing is sent twice.
5. One write, one wait and one drop cost the same however much waits: one write is
   bounded, and a place in the mail is looked at once (see `backlog`).
6. Delivery costs no more where somebody wants to know when much waits, or waits for room: it looks at one
   bound, `alarm_bytes`.
7. A peer is given up when it has taken nothing for `stall_seconds`. Only bytes that the
   peer's system acknowledges count: a socket may not turn writable for long while its peer reads on.
"""

import os
from collections.abc import Awaitable, Callable, Iterable, Mapping
from enum import Enum
from math import inf
from typing import Final, Protocol, TypeAlias

import attrs
import trio

from broker.core.memory import Ledger
from broker.transport.backlog import Backlog, Dropped
from broker.transport.runs import GONE, Run, share_of
from broker.transport.sockets import (
    ROOM,
    RelayStream,
    acknowledged,
    fileno_of,
    has_room,
    socket_below,
    unacknowledged,
)
from broker.transport.tasks import StartSoon, Work

__all__ = ["Offer", "Outbox", "OutboxStatistics", "Owner", "Run", "Writer"]

Writer: TypeAlias = Callable[[], Awaitable[None]]

# At once we write no more than this: IOV_MAX of Linux and the BSDs, and bytes that the system copies
# in about 50 µs, so that a reader of gigabytes gives way to others as often as anyone.
_WRITE_RUNS = 1024
_WRITE_BYTES = 256 * 2**10

# With how many runs we ask a blocked socket whether it takes more: the answer is mostly no, and 8
# are prepared in the time that the system needs to say so.
_PROBE_RUNS = 8

# One TLS record is 16 KiB; four of them in one call, yet progress is seen often enough to tell a
# slow peer from a dead one.
_STREAM_CHUNK = 64 * 2**10

# Runs that are no message may wait beside `max_messages` of those that are: the ends of all
# subscriptions that a client has, many times over, and 4 MiB at most.
_SPARE_RUNS = 16 * 2**10

STREAM_WRITES: Final = 16
"""Writes to a bare socket that take as long as one through a stream over it, TLS or a client's without WebSocket:
that has a task, which is begun each time. Measured 60 to 100 µs."""

# A chunk is held by us, and by the stream as what it makes of it.
_HANDS = 2

# How often in `stall_seconds` we look whether a peer has taken something.
_LOOKS = 8

# How often all other tasks may run before a stream that still has a chunk is taken to wait for its
# peer. TLS over a socket with room takes two.
_TICKS = 5

# Of so many runs it is asked how many outboxes hold them: 20 µs, and all of the large ones.
_SHARES = 64

# Places of runs that are gone may be half of the mail, and these besides: sweeping up costs a
# constant time per run then.
_SPARE_PLACES = 64


@attrs.frozen
class Watermarks:
    """Bytes that wait from which on, beyond `high`, an outbox counts as filling, until no more than `low`
    wait; `notify` is then called with whether it is. It must not wait."""

    high: int
    low: int
    notify: Callable[[bool], None]


class Offer(Enum):
    """The outcome of an offer."""

    TAKEN = "taken"
    FULL = "full"
    SEALED = "sealed"


@attrs.frozen
class OutboxStatistics:
    """`bytes_waiting` and `messages_waiting` are not yet with the system; `messages_dropped` only
    grows. `bytes_held` is memory: the runs that wait, whole, also where other outboxes share them.
    """

    bytes_waiting: int
    messages_waiting: int
    messages_dropped: int
    blocked: bool
    bytes_held: int


class Owner(Protocol):
    """The connection of an outbox. All are called without a checkpoint."""

    @property
    def start_soon(self) -> StartSoon:
        """Starts the writer."""

    def give_up(self) -> None:
        """The peer is too slow, and must be closed."""

    def note_dropped(self, topics: Mapping[str, int], /) -> None:
        """So many messages were dropped, by topic."""

    def note_broken(self) -> None:
        """The stream is dead."""


class _Nobody:
    """The owner once nobody is called any more."""

    def start_soon(self, work: Work, /, *args: object) -> None: ...
    def give_up(self) -> None: ...
    def note_dropped(self, topics: Mapping[str, int], /) -> None: ...
    def note_broken(self) -> None: ...


NOBODY: Final = _Nobody()


class _Hot:
    """The fields that each delivery and each write touches, side by side in memory: a room's outboxes are
    cold when its turn comes, and each line of 64 bytes that has to be fetched takes 0.1 µs."""

    __slots__ = (
        "_fileno",
        "_plain",
        "_sent",
        "_writing",
        "alarm_bytes",
        "bytes",
        "bytes_sent",
        "mail",
        "max_messages",
        "messages",
        "messages_sent",
        "sealed",
        "sent_at",
        "writes",
    )


class Outbox(_Hot):
    """The frames that wait for one peer.

    `post` is called with the outbox when it goes from empty to not empty; the function owes
    a call to `flush`. `owner` is told what becomes of it.
    Offered runs are counted in `ledger`.

    The bound in bytes is `max_bytes`, for messages of an ordinary size. One that is larger than a
    quarter of it is judged by what waits between the run that is on its way and itself: at most
    the bound. So a peer that reads gets two messages of any size in a row, and the newest message
    fits always when all that may be dropped is dropped. An outbox holds no more than its bound, a
    quarter of it, the run on its way and a message of the largest size; and a reply, see
    `offer_reply`.
    """

    __slots__ = (
        "_backlog",
        "_begun",
        "_below",
        "_bound",
        "_cut",
        "_ease_at",
        "_eased",
        "_first",
        "_gone",
        "_guarded",
        "_in_flight",
        "_ledger",
        "_marks",
        "_owner",
        "_post",
        "_seen",
        "_seen_at",
        "_stall_seconds",
        "_stream",
        "_watched",
        "_went",
        "blocked",
        "chunks",
        "dropped",
        "is_filling",
        "max_bytes",
        "replies_wait",
        "stalled",
    )

    mail: list[Run]
    """The runs that wait, `GONE` where one has left its place; empty when nothing waits."""
    messages: int
    max_bytes: int
    alarm_bytes: int
    """Beyond so many bytes `overflow` has to be called."""
    max_messages: int
    dropped: int
    bytes_sent: int
    """Taken by the system, or by a stream that is no socket. Counted once a write."""
    messages_sent: int
    sent_at: float
    """When the system took something last, on Trio's clock."""
    chunks: int
    """How often a stream, or the peer behind it, was seen to take something; 0 for a bare socket,
    which says when it is blocked."""
    blocked: bool
    """The system would not take more: the runs that are here have to wait for the peer."""
    is_filling: bool
    """Whether more than the high watermark waits, or has and not yet less than the low one."""
    replies_wait: bool
    """Whether a reply that was too large for the bound has yet to go out."""
    sealed: bool
    """Nothing more is taken; queued runs still go out."""
    stalled: bool
    """The peer took nothing for `stall_seconds`, so it was given up."""

    def __init__(
        self,
        stream: trio.abc.SendStream,
        *,
        post: Callable[[list["Outbox"]], None],
        owner: Owner,
        max_bytes: int,
        max_messages: int,
        stall_seconds: float,
        ledger: Ledger | None = None,
    ) -> None:
        self.mail = []
        self.bytes: int = 0
        self.messages = self.dropped = 0
        self.max_bytes = self.alarm_bytes = self._bound = max_bytes
        self.max_messages = max_messages
        self.bytes_sent = self.messages_sent = self.chunks = 0
        self.sent_at = -inf
        self.blocked = self.is_filling = self.replies_wait = False
        self.sealed = self.stalled = False
        self._stream = stream
        self._fileno = fileno_of(stream)
        self._below = None if self._fileno >= 0 else socket_below(stream)
        self.writes: int = 1 if self._below is None else STREAM_WRITES
        self._ledger = ledger
        self._plain = True  # all of the next few are as they are here, and nobody waits
        self._first = 0  # before this place all is gone
        self._gone = 0  # how many places are
        self._sent = 0  # bytes of mail[_first] that have gone out
        self._in_flight = 0  # bytes behind those, handed to a stream that has yet to take them
        self._begun = 0  # before this place all has gone out or is on its way, at least in part
        self._backlog: Backlog | None = None
        self._went = 0  # bytes that a blocked socket took while its writer waited
        self._cut: trio.CancelScope | None = None  # of the chunk that a stream is given
        self._seen: tuple[int, ...] = ()  # how much a stream had taken when the guard looked
        self._seen_at = 0.0
        self._guarded = False
        self._writing = False
        self._watched = False
        self._eased: trio.Event | None = None
        self._ease_at = 0
        self._marks: Watermarks | None = None
        self._post = post
        self._owner = owner
        self._stall_seconds = stall_seconds

    def statistics(self) -> OutboxStatistics:
        """A snapshot. Linear in the runs that wait; `bytes` and `messages` are at hand."""
        held = sum([run.bytes_held for run in self.mail if run is not GONE])
        return OutboxStatistics(self.bytes, self.messages, self.dropped, self.blocked, held)

    def own_bytes(self) -> int:
        """About how much memory would be free if all that waits were dropped: runs that other outboxes hold
        as well count by a share. Looks at some of the runs only."""
        if not self.mail:
            return 0
        waiting = len(self.mail) - self._first
        share = share_of(self.mail, self._first, max(1, waiting // _SHARES))
        return max(int(self.bytes * share), self.bytes - self._bound)

    @property
    def keeps_up(self) -> bool:
        """Whether the peer reads what it gets: nothing is stuck, and half of the room is free."""
        return not self.blocked and self._has_room(2)

    def bound(self, max_bytes: int, max_messages: int) -> None:
        """Hold no more than this from now on; runs that are here already are judged when more come.

        The room that a large reply or message was given stays until that is out.
        """
        widened = self.max_bytes > self._bound
        self._bound = max_bytes
        self._set_max_bytes(max(self.max_bytes, max_bytes) if widened else max_bytes)
        self.max_messages = max_messages

    def mark(self, marks: Watermarks) -> None:
        """Tell of these watermarks from now on."""
        self._marks = marks
        self._set_max_bytes(self.max_bytes)

    def _set_max_bytes(self, max_bytes: int) -> None:
        self.max_bytes = self.alarm_bytes = max_bytes
        if self._marks is not None and not self.is_filling:
            self.alarm_bytes = min(max_bytes, self._marks.high)

    def holds(self, run: Run) -> bool:
        """Whether some of this very run has yet to be taken by the system. Linear in what waits."""
        return run in self.mail

    # filling

    def offer(self, run: Run) -> Offer:
        """Queue `run`; never waits. FULL: there was no room, and the peer is being cut for it."""
        if self.sealed:
            return Offer.SEALED
        self._append(run)
        if self.bytes > self.alarm_bytes or self._is_over():
            return self._offer_to_full()
        return Offer.TAKEN

    def _offer_to_full(self) -> Offer:
        if not self.overflow():
            return Offer.FULL
        return Offer.SEALED if self.sealed else Offer.TAKEN  # the stream may turn out to be dead

    def offer_reply(self, run: Run) -> Offer:
        """Queue a reply that the peer has asked for, of any size: to get a lot is not to be slow.

        Until all is out there is room for the reply and, beside it, for as much as ever. The caller
        serves the peer nothing more while `replies_wait`, so no second reply widens the bound.
        """
        total = self.bytes + run.size
        if total > self._bound and not self.sealed:
            self._set_max_bytes(max(self.max_bytes, total + self._bound))
            self.replies_wait = True
            self._plain = False
        return self.offer(run)

    def is_behind(self) -> bool:
        """Whether the peer leaves more than an eighth of the bound waiting, after all that can go has gone.

        A stream that is no socket does not say whether it would take more. It is behind when it was
        seen to be, a few turns of the loop later, and when a half is waiting.
        """
        if self._has_room(8):
            return False
        self._write_what_goes()
        if self._fileno >= 0 or self.blocked:
            return self.blocked and not self._has_room(8)
        self._look_whether_it_is_blocked()
        return not self._has_room(2)

    def overflow(self) -> bool:
        """Bring the outbox back within its bounds: write, else apply the newest run's rule.

        False if that was not to be had, and the peer is being cut.
        """
        self._write_what_goes()
        if self.blocked and self.bytes > self.alarm_bytes:
            self._note_filling()
        if not self.mail or (self.bytes <= self.alarm_bytes and not self._is_over()):
            return True
        # With no write that waits the stream keeps up, and this tick was merely a busy one.
        if not self.blocked:
            self._look_whether_it_is_blocked()
            return True
        newest = next(run for run in reversed(self.mail) if run is not GONE)
        if self._make_room(newest):
            return True
        if newest.rule == "drop_oldest":
            self._drop_oldest(newest)
        elif newest.rule == "latest":
            self._account(self._sorted().thin(self._begun))
        if not self._is_over() or self._make_room(newest):
            return True
        self._owner.give_up()
        return False

    def seal(self, last: Run | None = None) -> None:
        """Take nothing more, after `last`. Queued runs still go out."""
        if not self.sealed:
            if last is not None:
                self._append(last)
            self.sealed = True
            self.wake()

    def discard(self) -> int:
        """Forget all that has not begun to go out; return how many messages that were.

        The frame that is on its way is finished, so that a Close frame can still follow it.
        """
        before = self.messages
        kept = [run for run in self.mail[self._first : self._begun] if run is not GONE]
        if kept:
            last = kept.pop()
            out = self._sent + self._in_flight - sum([run.size for run in kept])
            end = last.first
            while out > 0:
                out -= len(last.frames[end])
                end += 1
            kept.append(last.only(last.first, end))
        self._throw_away()
        self.mail += kept
        self._first = self._gone = 0
        self._begun = len(kept)
        self._backlog = None
        self.bytes = sum([run.size for run in kept]) - self._sent
        self.messages = sum([run.messages for run in kept])
        self._ease()
        return before - self.messages

    def note_gap(self, topic: str) -> None:
        """Something of a topic was lost on the way here: as if it had been dropped here."""
        self._owner.note_dropped({topic: 1})

    def drop_topic(self, topic: str) -> None:
        """Drop what waits of one topic, as far as it has not begun to go out."""
        if self.mail:
            dropped = self._sorted().drop_topic(topic, self._begun)
            self._take_off(dropped)

    def abandon(self) -> None:
        """The stream is dead or about to be closed: not another byte. Counts stay as they are, and
        nobody is called any more, nor kept for that."""
        self.sealed = True
        self._owner = NOBODY
        self._fileno = -1
        self._marks = None
        self._throw_away()
        self._reset()

    def _throw_away(self) -> None:
        """Have no more mail; the runs may be in memory for a while, if they are many."""
        if self._ledger is not None:
            self._ledger.throw_away([*self.mail])
        self.mail.clear()

    def show(self, see: Callable[[Run], None] | None) -> None:
        """Show each run that is queued from now on to `see`; None: to nobody any more. One at a time.

        While nobody looks it costs nothing: the list that holds the runs is another one.
        """
        self.mail = list(self.mail) if see is None else _ShownMail(self.mail, see)
        self._backlog = None

    # waiting

    async def wait_empty(self) -> None:
        """Wait until everything queued is with the system, or the stream is dead.

        Cancelled, nothing has changed: queued runs still go out.
        """
        await self.wait_below(0)

    async def wait_below(self, size: int) -> None:
        """Wait until at most `size` bytes are queued, or the stream is dead (then it is `sealed`).

        A caller with many runs for one peer offers them one by one with this in between, and so goes
        on as fast as the peer takes them: `size` is half of the bound, or less. Returns at once,
        without a checkpoint, if that is so now; somebody else may have filled the outbox by the
        time the caller runs. Cancelled, nothing has changed: offered runs still go out, in
        their order, and runs that the caller has not offered yet are nowhere.
        """
        while self.mail and (self.bytes > size or not size):
            self._plain = False
            if self._eased is None:
                self._eased = trio.Event()
                self._ease_at = size
            self._ease_at = max(self._ease_at, size)
            await self._eased.wait()

    def has_room(self, size: int, most: int) -> bool:
        """Whether a message of so many bytes may be offered by a sender that can wait: no more than `most`
        wait then, and half as many messages as may; or nothing waits at all."""
        return not self.mail or (
            self.bytes + size <= most and 2 * (self.messages + 1) <= self.max_messages
        )

    async def wait_eased(self, size: int) -> None:
        """Wait until no more than `size` bytes wait, nothing at all where that is less than nothing, or
        something else has changed: look again. Cancelled, nothing has changed by it."""
        self._plain = False
        if self._eased is None:
            self._eased = trio.Event()
            self._ease_at = 0
        self._ease_at = max(self._ease_at, size)
        await self._eased.wait()

    def wake(self) -> None:
        """Have those who wait look again."""
        if self._eased is not None:
            self._eased.set()
            self._eased = None

    # emptying

    def flush(self, now: float) -> None:
        """Write what is queued, as far as the socket takes it without waiting; 256 KiB at most.

        `now` is `trio.current_time()`, asked for once for all that are flushed together.
        """
        mail = self.mail
        if not mail or self._writing:
            return
        if self._fileno < 0:
            self._begin_writer(self._write_stream)
            return
        count = len(mail)
        if self.bytes > _WRITE_BYTES or count > _WRITE_RUNS or self._sent:
            self._write_slices()
        else:
            # As that does it, but joined, which is faster, and in line: this is the hot path.
            data = mail[0].data if count == 1 else b"".join([run.data for run in mail])
            try:
                written = os.write(self._fileno, data)
            except BlockingIOError:
                self.blocked = True
            except OSError:
                self._break()
            else:
                if written == len(data):
                    mail.clear()
                    self.bytes_sent += written
                    self.messages_sent += self.messages
                    self.sent_at = now
                    self.bytes = self.messages = 0
                    if not self._plain:
                        self._reset()
                    return
                self.blocked = True
                self._advance(written)
        if mail:
            self._begin_writer(self._write_blocked)

    def _append(self, run: Run) -> None:
        ledger = self._ledger
        if ledger is not None:
            run.enter(ledger)
            ledger.messages_offered += run.messages
            ledger.bytes_offered += len(run.data)
        if not self.mail:
            self._post([self])
        self.mail.append(run)
        self.bytes += run.size
        self.messages += run.messages

    def _begin_writer(self, writer: Writer) -> None:
        self._writing = True
        self._owner.start_soon(writer)

    def _write_what_goes(self) -> None:
        """Write until the outbox is within its bounds, or the system takes no more."""
        if not self._writing:
            self.flush(trio.current_time())
            if self.blocked:
                return
        if self._fileno >= 0 and self.mail:
            # It would not take more a moment ago; a peer that reads has made room since.
            before = self.bytes
            while self._write_slices() and self._is_over():
                pass
            self._went += before - self.bytes

    def _front(self, runs: int, most: int) -> tuple[list[bytes | memoryview], int]:
        """The parts that go out next, of at most so many runs and `most` bytes; and their size in bytes."""
        parts: list[bytes | memoryview] = []
        size = -self._sent
        for run in self.mail[self._first : self._first + runs]:
            parts.append(run.data)
            size += run.size
            if size >= most:
                break
        if self._sent:
            parts[0] = memoryview(parts[0])[self._sent :]
        if size > most:
            last = parts[-1]
            parts[-1] = memoryview(last)[: len(last) - (size - most)]
            size = most
        return parts, size

    def _write_slices(self) -> bool:
        """One non-blocking write of a bounded part: the runs as they are, nothing joined.

        True if the system took all of that, and more waits.
        """
        parts, size = self._front(_PROBE_RUNS if self.blocked else _WRITE_RUNS, _WRITE_BYTES)
        try:
            written = os.writev(self._fileno, parts)
        except BlockingIOError:
            self.blocked = True
            return False
        except OSError:
            self._break()
            return False
        self.blocked = written < size
        self._advance(written)
        return not self.blocked and bool(self.mail)

    def _advance(self, written: int) -> None:
        """Account for a write that may have taken only a part. Linear in the runs that are out."""
        mail = self.mail
        self._plain = False
        self.bytes -= written
        self.bytes_sent += written
        self.sent_at = trio.current_time()
        written += self._sent
        place = self._first
        while place < len(mail):
            run = mail[place]
            if written < run.size:
                break
            written -= run.size
            if run is not GONE:
                self.messages -= run.messages
                self.messages_sent += run.messages
                self._gone += 1
                mail[place] = GONE
            place += 1
        self._first = place
        self._sent = written
        self._begun = place + (written > 0)
        self._sweep_up()
        self._ease()

    def _sweep_up(self) -> None:
        """Give up the places of what is gone, once they are half of all."""
        mail = self.mail
        if self._gone == len(mail):
            mail.clear()
        elif self._gone > _SPARE_PLACES and 2 * self._gone > len(mail):
            begun = sum([run is not GONE for run in mail[self._first : self._begun]])
            mail[:] = [run for run in mail if run is not GONE]
            self._first = self._gone = 0
            self._begun = begun
            self._backlog = None

    def _ease(self) -> None:
        """Some bytes have gone: tell those who wait for that, and give back room that is not needed now."""
        if not self.mail:
            self.bytes = self.messages = 0
            self._reset()
        elif self._eased is not None and self.bytes <= self._ease_at and self._ease_at:
            self.wake()
        if self.is_filling and self._marks is not None and self.bytes <= self._marks.low:
            self._note_emptied()
        if self.bytes <= self._bound and not self.replies_wait:
            self._set_max_bytes(self._bound)

    def _reset(self) -> None:
        """Nothing waits: all is as at the beginning. Counts stay as they are."""
        self._plain = True
        self._first = self._gone = self._sent = self._in_flight = self._begun = 0
        self._backlog = None
        self.replies_wait = False
        if self.is_filling:
            self._note_emptied()
        self._set_max_bytes(self._bound)
        self.wake()

    async def _write_blocked(self) -> None:
        """Writer task of a bare socket: runs until the outbox is empty.

        Cancelled, it leaves the outbox as it is; the connection's end abandons it.
        """
        try:
            while self.mail:
                self._note_filling()
                self._went = 0
                before = unacknowledged(self._fileno)
                with trio.move_on_after(self._stall_seconds) as progress:
                    await trio.lowlevel.wait_writable(self._fileno)
                if progress.cancelled_caught:
                    # The peer has taken the bytes that the system took meanwhile and holds no more.
                    if before + self._went > unacknowledged(self._fileno):
                        continue
                    self.stalled = True
                    self._break()
                elif self.mail:  # a rule may have emptied it meanwhile
                    self.blocked = False
                    self._write_slices()
        except (trio.ClosedResourceError, OSError, ValueError):
            self._break()
        finally:
            self.blocked = self._writing = False

    def _look_whether_it_is_blocked(self) -> None:
        if self._fileno < 0 and not self._watched:
            self._watched = True
            self._owner.start_soon(self._watch)

    async def _watch(self) -> None:
        """See whether a stream is blocked, which unlike a socket it will not say."""
        before = self._progress()
        for _ in range(_TICKS):
            await trio.lowlevel.checkpoint()
        self._watched = False
        if self._in_flight and self._progress() == before:
            self.blocked = True
            self.overflow()

    def _progress(self) -> tuple[int, int]:
        """Marks that change when a stream takes some of the bytes it was given."""
        stream = self._stream
        return self.chunks, stream.pieces if isinstance(stream, RelayStream) else 0

    async def _write_stream(self) -> None:
        """Writer task of any other stream (TLS, memory): runs until the outbox is empty.

        Cancelled in mid-write, nothing may follow: the outbox is abandoned.
        """
        try:
            while self.mail:
                if not self._guarded and not self._goes_at_once():
                    self._guarded = True
                    self._owner.start_soon(self._guard)
                await self._send_chunk()
                self._note_filling()
        finally:
            self._writing = False

    def _goes_at_once(self) -> bool:
        """Whether the next chunk needs no guard: it tells by itself whether the peer takes anything."""
        if isinstance(self._stream, RelayStream):
            return False  # however it translates the chunk
        if self._below is None:
            return True  # in memory, with nothing below to look at
        return self.bytes <= ROOM and has_room(self._below)

    async def _send_chunk(self) -> None:
        """Have the stream take what is at the front, unless the peer takes nothing for too long."""
        chunk = self._next_chunk()
        in_hand = _HANDS * len(chunk)
        if self._ledger is not None:
            self._ledger.bytes_held += in_hand
        if self._guarded:
            self._see()
        deadline = inf if self._guarded else trio.current_time() + self._stall_seconds
        sent_whole = False
        try:
            with trio.CancelScope(deadline=deadline) as cut:
                self._cut = cut
                await self._stream.send_all(chunk)
                sent_whole = True
        except (trio.ClosedResourceError, trio.BrokenResourceError):
            pass
        finally:
            self.blocked = False
            self._in_flight = 0
            if self._ledger is not None:
                self._ledger.bytes_held -= in_hand
            if not sent_whole:
                self.stalled = cut.cancelled_caught
                self._break()
        self.chunks += 1
        if self.mail:
            self._advance(len(chunk))

    def _next_chunk(self) -> bytes:
        parts, self._in_flight = self._front(_WRITE_RUNS, _STREAM_CHUNK)
        self._plain = False
        self._begun = self._first + len(parts)
        return b"".join(parts)

    async def _guard(self) -> None:
        """Give the peer up when it has taken nothing for `stall_seconds`: cut off what is sent.

        A task of its own, for as long as every look at the stream finds it at work: there are few
        of these, where a stream is written to often. Cancelled, it leaves all to the writer.
        """
        while self._writing:
            next_look = trio.current_time() + self._stall_seconds / _LOOKS
            await trio.sleep_until(min(next_look, self._seen_at + self._stall_seconds))
            if self._taken() != self._seen:
                self.chunks += 1
                self._see()
            elif trio.current_time() >= self._seen_at + self._stall_seconds:
                assert self._cut is not None, "a guard comes with a chunk"
                self._cut.cancel()
                break
        self._guarded = False

    def _see(self) -> None:
        """Note how much has been taken by now."""
        self._seen, self._seen_at = self._taken(), trio.current_time()

    def _taken(self) -> tuple[int, ...]:
        below = self._below
        return *self._progress(), 0 if below is None else acknowledged(below)

    def _break(self) -> None:
        if self.mail or not self.sealed:
            owner = self._owner
            self.abandon()
            owner.note_broken()

    # watermarks

    def _note_filling(self) -> None:
        if self._marks is not None and not self.is_filling and self.bytes > self._marks.high:
            self.is_filling = True
            self._plain = False
            self._set_max_bytes(self.max_bytes)
            self._marks.notify(True)

    def _note_emptied(self) -> None:
        self.is_filling = False
        self._set_max_bytes(self.max_bytes)
        if self._marks is not None:
            self._marks.notify(False)

    # rules

    def _has_room(self, divisor: int) -> bool:
        """Whether no more than this part of the bounds waits."""
        return (
            divisor * self.bytes <= self.max_bytes and divisor * self.messages <= self.max_messages
        )

    def _is_over(self) -> bool:
        return (
            self.bytes > self.max_bytes
            or self.messages > self.max_messages
            # Control frames are no messages, but each takes memory as well.
            or len(self.mail) - self._gone > self.max_messages + _SPARE_RUNS
        )

    def _on_its_way(self) -> int:
        """How many bytes are left of the run that has begun to go out."""
        return self.mail[self._first].size - self._sent if self._begun > self._first else 0

    def _make_room(self, newest: Run) -> bool:
        """Let a large message in that was judged too strictly; see the class."""
        size = newest.last_size
        behind = self.bytes - self._on_its_way() - size
        if 4 * size <= self._bound or behind > self._bound:
            return False
        self._set_max_bytes(max(self.max_bytes, self.bytes + self._bound // 4))
        self._plain = False
        return not self._is_over()

    def _drop_oldest(self, newest: Run) -> None:
        most = self.max_bytes
        size = newest.last_size
        if 4 * size > self._bound:
            most = max(most, self._on_its_way() + self._bound + size)
        excess = self.messages - self.max_messages
        self._account(self._sorted().drop_oldest(self._begun, excess, self.bytes - most))

    def _sorted(self) -> Backlog:
        if self._backlog is None:
            self._plain = False
            self._backlog = Backlog(self.mail)
        return self._backlog

    def _account(self, dropped: Dropped) -> None:
        """Take off what a rule has dropped, then tell of it."""
        self._take_off(dropped)
        if dropped.messages:
            self._owner.note_dropped(dropped.topics)

    def _take_off(self, dropped: Dropped) -> None:
        self.bytes -= dropped.size
        self.messages -= dropped.messages
        self.dropped += dropped.messages
        self._gone += dropped.places
        while self._first < len(self.mail) and self.mail[self._first] is GONE:
            self._first += 1  # a write begins with what is there
        self._begun = max(self._begun, self._first)
        self._sweep_up()
        self._ease()


class _ShownMail(list[Run]):
    """The runs that wait, each shown to `see` when it comes."""

    def __init__(self, runs: Iterable[Run], see: Callable[[Run], None]) -> None:
        super().__init__(runs)
        self._see = see

    def append(self, run: Run) -> None:
        self._see(run)
        super().append(run)
