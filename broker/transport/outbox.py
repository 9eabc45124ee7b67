"""What one peer has yet to get, its bounds, and what happens when they are reached.

An outbox holds runs. It is filled by `PostOffice.deliver` and `offer`, emptied by `flush` (which
the postman calls) and, once a socket would block, by a writer task that lives only as long as
there is something to write.

Rules:

1. Only the outbox writes to its stream, so frames never interleave.
2. Filling never waits. Who is too slow is dealt with by the rule of the topic, at once.
3. Bounds are judged on what the socket did not take: before a rule is applied, we try to write.
4. What has begun to go out is finished or the connection is dead; nothing is sent twice.
"""

import fcntl
import os
import sys
import termios
from collections.abc import Awaitable, Callable, Mapping, Sequence
from enum import Enum
from typing import Literal, TypeAlias

import attrs
import trio

from broker.transport.sockets import fileno_of

Writer: TypeAlias = Callable[[], Awaitable[None]]
SlowRule: TypeAlias = Literal["close", "drop_oldest", "latest"]

# One TLS record is 16 KiB; four of them in one call, yet progress is seen often enough to tell a
# slow peer from a dead one.
_STREAM_CHUNK = 64 * 2**10

# How often all other tasks may run before a stream that still has a chunk is taken to wait for its
# peer. TLS over a socket with room takes two.
_TICKS = 5


def _unacknowledged(fileno: int) -> int:
    """How many bytes the system holds for the peer of a socket; 0 where it does not say."""
    try:
        return int.from_bytes(fcntl.ioctl(fileno, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
    except OSError:
        return 0


@attrs.define(eq=False, slots=True)
class Run:
    """One outbox entry: the frames of `len(frames)` messages that go to everyone alike.

    `topic` is empty for what is not a publication; such a run is never dropped. Control frames
    are no messages: `messages` is 0 for them.
    """

    frames: Sequence[bytes]
    topic: str = ""
    rule: SlowRule = "close"
    data: bytes = b""
    messages: int = -1

    def __attrs_post_init__(self) -> None:
        frames = self.frames
        self.data = frames[0] if len(frames) == 1 else b"".join(frames)
        if self.messages < 0:
            self.messages = len(frames)


class Offer(Enum):
    """What became of an offer."""

    TAKEN = "taken"
    FULL = "full"
    SEALED = "sealed"


@attrs.frozen
class OutboxStatistics:
    """`bytes_waiting` and `messages_waiting` are not yet with the system; the rest only grows."""

    bytes_waiting: int
    messages_waiting: int
    messages_dropped: int
    blocked: bool


class Outbox:
    """The frames that wait for one peer.

    `post` is called with the outbox when it goes from empty to not empty; whoever is behind it
    owes a call to `flush`. `start_writer` starts a task in the connection's own nursery.
    `on_slow` is called when the peer must be closed, `on_drop` with the number of messages dropped
    by topic, `on_broken` when the stream is dead. All are called without a checkpoint.
    """

    __slots__ = (
        "_bound",
        "_drained",
        "_fileno",
        "_in_flight",
        "_on_broken",
        "_on_drop",
        "_on_slow",
        "_post",
        "_sent",
        "_stall_seconds",
        "_start_writer",
        "_stream",
        "_watched",
        "_writing",
        "blocked",
        "bytes",
        "chunks",
        "dropped",
        "mail",
        "max_bytes",
        "max_messages",
        "messages",
        "sealed",
        "stalled",
    )

    def __init__(
        self,
        stream: trio.abc.SendStream,
        *,
        post: Callable[[list["Outbox"]], None],
        start_writer: Callable[[Writer], None],
        on_slow: Callable[[], None],
        on_drop: Callable[[Mapping[str, int]], None],
        on_broken: Callable[[], None],
        max_bytes: int,
        max_messages: int,
        stall_seconds: float,
    ) -> None:
        self.mail: list[Run] = []
        self.bytes = 0
        self.messages = 0
        self.max_bytes = self._bound = max_bytes
        self.max_messages = max_messages
        self.dropped = 0
        self.chunks = 0
        """How many pieces a stream has taken; 0 for a bare socket, which says when it is blocked."""
        self.blocked = False
        """The system would not take more: what is here now has to wait for the peer."""
        self.sealed = False
        """Nothing more is taken; what is queued still goes out."""
        self.stalled = False
        """The peer took nothing for `stall_seconds`, so it was given up."""
        self._stream = stream
        self._fileno = fileno_of(stream)
        self._sent = 0  # bytes of mail[0] that have gone out
        self._in_flight = 0  # bytes behind those, handed to a stream that has yet to take them
        self._writing = False
        self._watched = False
        self._drained: trio.Event | None = None
        self._post = post
        self._start_writer = start_writer
        self._on_slow = on_slow
        self._on_drop = on_drop
        self._on_broken = on_broken
        self._stall_seconds = stall_seconds

    def statistics(self) -> OutboxStatistics:
        return OutboxStatistics(self.bytes, self.messages, self.dropped, self.blocked)

    @property
    def keeps_up(self) -> bool:
        """Whether the peer reads what it gets: nothing is stuck, and half of the room is free."""
        return (
            not self.blocked
            and 2 * self.bytes <= self.max_bytes
            and 2 * self.messages <= self.max_messages
        )

    def bound(self, max_bytes: int, max_messages: int) -> None:
        """Hold no more than this from now on; what is here already is judged when more comes.

        The room that a large reply was given stays until that is out.
        """
        if not self.replies_wait:
            self.max_bytes = max_bytes
        self._bound = max_bytes
        self.max_messages = max_messages

    def holds(self, run: Run) -> bool:
        """Whether some of this very run has yet to be taken by the system. Linear in what waits."""
        return any(waiting is run for waiting in self.mail)

    # filling

    def offer(self, run: Run) -> Offer:
        """Queue `run`; never waits. FULL: there was no room, and the peer is being cut for it."""
        if self.sealed:
            return Offer.SEALED
        mail = self.mail
        if not mail:
            self._post([self])
        mail.append(run)
        self.bytes += len(run.data)
        self.messages += run.messages
        if self.bytes > self.max_bytes or self.messages > self.max_messages:
            return Offer.TAKEN if self.overflow() else Offer.FULL
        return Offer.TAKEN

    def offer_reply(self, run: Run) -> Offer:
        """Queue what the peer has asked for, whatever its size: who gets a lot is not slow for that.

        Until all is out there is room for the reply and, beside it, for as much as ever. The caller
        serves the peer nothing more while `replies_wait`, so no second reply widens the bound.
        """
        total = self.bytes + len(run.data)
        if total > self._bound:
            self.max_bytes = total + self._bound
        return self.offer(run)

    @property
    def replies_wait(self) -> bool:
        """Whether a reply that was too large for the bound has yet to go out."""
        return self.max_bytes > self._bound

    def overflow(self) -> bool:
        """Bring the outbox back within its bounds: write, else apply the newest run's rule.

        False if that was not to be had, and the peer is being cut.
        """
        if self._fileno >= 0 and self._writing:
            # It would not take more a moment ago; a peer that reads has made room since.
            self._write_now()
        else:
            self.flush()
        if not self.mail or not self._is_over():
            return True
        # With no write that waits the stream keeps up, and this tick was merely a busy one.
        if not self.blocked:
            if self._fileno < 0 and not self._watched:
                self._watched = True
                self._start_writer(self._watch)
            return True
        rule = self.mail[-1].rule
        if rule == "drop_oldest":
            self._drop(self._oldest_dropped())
        elif rule == "latest":
            self._drop(self._only_latest())
        if not self._is_over():
            return True
        self._on_slow()
        return False

    def seal(self, last: Run | None = None) -> None:
        """Take nothing more, after `last`. What is queued still goes out."""
        if not self.sealed:
            if last is not None:
                if not self.mail:
                    self._post([self])
                self.mail.append(last)
                self.bytes += len(last.data)
            self.sealed = True

    def discard(self) -> int:
        """Forget all that has not begun to go out; return how many messages that were.

        The frame that is on its way is finished, so that a Close frame can still follow it.
        """
        before = self.messages
        kept = self.mail[: self._begun()]
        if kept:
            last = kept.pop()
            out = self._sent + self._in_flight - sum([len(run.data) for run in kept])
            frames = []
            for frame in last.frames:
                if out <= 0:
                    break
                frames.append(frame)
                out -= len(frame)
            kept.append(
                Run(frames, last.topic, last.rule, messages=min(len(frames), last.messages))
            )
        self._replace(kept)
        return before - self.messages

    def abandon(self) -> None:
        """The stream is dead or about to be closed: not another byte. Counts stay as they are."""
        self.sealed = True
        self._fileno = -1
        self.mail.clear()
        self._sent = self._in_flight = 0
        self._set_drained()

    async def wait_empty(self) -> None:
        """Wait until everything queued is with the system, or the stream is dead."""
        while self.mail:
            if self._drained is None:
                self._drained = trio.Event()
            await self._drained.wait()

    # emptying

    def flush(self) -> None:
        """Write what is queued, as far as the socket takes it without waiting."""
        if not self.mail or self._writing:
            return
        if self._fileno < 0:
            self._begin_writer(self._write_stream)
        elif not self._write_now() and self.mail:
            self.blocked = True
            self._begin_writer(self._write_blocked)

    def _begin_writer(self, writer: Writer) -> None:
        self._writing = True
        self._start_writer(writer)

    def _write_now(self) -> bool:
        """One non-blocking write of all that is queued; true if all of it went."""
        mail = self.mail
        data: bytes | memoryview
        data = mail[0].data if len(mail) == 1 else b"".join([run.data for run in mail])
        if self._sent:
            data = memoryview(data)[self._sent :]
        try:
            written = os.write(self._fileno, data)
        except BlockingIOError:
            return False
        except OSError:
            self._break()
            return False
        if written == len(data):
            mail.clear()
            self.bytes = self.messages = self._sent = 0
            self.max_bytes = self._bound
            if self._drained is not None:
                self._set_drained()
            return True
        self._advance(written)
        return False

    def _advance(self, written: int) -> None:
        """Account for a write that took only a part."""
        mail = self.mail
        self.bytes -= written
        written += self._sent
        done = 0
        for run in mail:
            if written < len(run.data):
                break
            written -= len(run.data)
            self.messages -= run.messages
            done += 1
        del mail[:done]
        self._sent = written
        if not mail:
            self._set_drained()

    async def _write_blocked(self) -> None:
        """Writer task of a bare socket: runs until the outbox is empty.

        Cancelled, it leaves the outbox as it is; the connection's end abandons it.
        """
        try:
            while self.mail:
                waiting = _unacknowledged(self._fileno)
                with trio.move_on_after(self._stall_seconds) as progress:
                    await trio.lowlevel.wait_writable(self._fileno)
                if progress.cancelled_caught:
                    # Writable means a third of a large buffer is free; slow is not yet stalled.
                    if _unacknowledged(self._fileno) < waiting:
                        continue
                    self.stalled = True
                    self._break()
                elif self.mail:  # a rule may have emptied it meanwhile
                    self._write_now()
        except (trio.ClosedResourceError, OSError, ValueError):
            self._break()
        finally:
            self.blocked = self._writing = False

    async def _watch(self) -> None:
        """See whether a stream is blocked, which unlike a socket it will not say."""
        before = self.chunks
        for _ in range(_TICKS):
            await trio.lowlevel.checkpoint()
        self._watched = False
        if self._in_flight and self.chunks == before:
            self.blocked = True
            self.overflow()

    async def _write_stream(self) -> None:
        """Writer task of any other stream (TLS, memory): runs until the outbox is empty.

        Cancelled in mid-write, nothing may follow: the outbox is abandoned.
        """
        try:
            while self.mail:
                waiting = b"".join([run.data for run in self.mail])
                chunk = memoryview(waiting)[self._sent : self._sent + _STREAM_CHUNK]
                sent_whole = False
                self._in_flight = len(chunk)
                try:
                    with trio.move_on_after(self._stall_seconds) as progress:
                        await self._stream.send_all(chunk)
                        sent_whole = True
                finally:
                    self.blocked = False
                    self._in_flight = 0
                    if not sent_whole:
                        self.stalled = progress.cancelled_caught
                        self._break()
                self.chunks += 1
                if self.mail:
                    self._advance(len(chunk))
        except (trio.ClosedResourceError, trio.BrokenResourceError):
            self._break()
        finally:
            self._writing = False

    def _break(self) -> None:
        if self.mail or not self.sealed:
            self.abandon()
            self._on_broken()

    def _set_drained(self) -> None:
        self.max_bytes = self._bound
        if self._drained is not None:
            self._drained.set()
            self._drained = None

    # rules

    def _is_over(self) -> bool:
        return self.bytes > self.max_bytes or self.messages > self.max_messages

    def _begun(self) -> int:
        """How many runs at the front have a byte out or on its way: these cannot be dropped."""
        out = self._sent + self._in_flight
        count = 0
        while out > 0:
            out -= len(self.mail[count].data)
            count += 1
        return count

    def _oldest_dropped(self) -> list[Run]:
        """The mail without as many of its oldest publications as brings it within its bounds."""
        excess_messages = self.messages - self.max_messages
        excess_bytes = self.bytes - self.max_bytes
        begun = self._begun()
        kept = self.mail[:begun]
        for run in self.mail[begun:]:
            if not run.topic or (excess_messages <= 0 and excess_bytes <= 0):
                kept.append(run)
                continue
            count = 0
            for frame in run.frames:
                if excess_messages <= 0 and excess_bytes <= 0:
                    break
                excess_messages -= 1
                excess_bytes -= len(frame)
                count += 1
            if count < len(run.frames):
                kept.append(Run(run.frames[count:], run.topic, run.rule))
        return kept

    def _only_latest(self) -> list[Run]:
        """The mail with only the newest publication of each topic whose rule is `latest`."""
        seen: set[str] = set()
        begun = self._begun()
        kept: list[Run] = []
        for run in reversed(self.mail[begun:]):
            if run.rule != "latest":
                kept.append(run)
            elif run.topic not in seen:
                seen.add(run.topic)
                kept.append(Run(run.frames[-1:], run.topic, run.rule))
        return self.mail[:begun] + kept[::-1]

    def _drop(self, kept: list[Run]) -> None:
        dropped: dict[str, int] = {}
        for run in self.mail:
            if run.topic:
                dropped[run.topic] = dropped.get(run.topic, 0) + run.messages
        for run in kept:
            if run.topic:
                dropped[run.topic] -= run.messages
        dropped = {topic: count for topic, count in dropped.items() if count}
        self._replace(kept)
        self.dropped += sum(dropped.values())
        if dropped:
            self._on_drop(dropped)

    def drop_topic(self, topic: str) -> None:
        """Drop what waits of one topic, as far as it has not begun to go out."""
        begun = self._begun()
        kept = self.mail[:begun] + [run for run in self.mail[begun:] if run.topic != topic]
        before = self.messages
        self._replace(kept)
        self.dropped += before - self.messages

    def _replace(self, kept: list[Run]) -> None:
        self.mail[:] = kept
        self.bytes = sum([len(run.data) for run in kept]) - self._sent
        self.messages = sum([run.messages for run in kept])
        if not kept:
            self._set_drained()
