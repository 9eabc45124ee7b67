"""Lanes: they carry the frames of a peer from its socket to its session.

- The **fast lane** takes whole simple data frames straight from the read buffer, and hands them to the
  session in batches. A well-formed Close or Ping is answered here as well, and a Pong needs no answer.
- A **compressed** message, where compression was agreed on, is inflated here, a step at a time, and its peer
  pays for each step. One of several frames is put together here as well.
- The **slow lane** is trio-websocket, which applies RFC 6455 to everything else: fragments, and
  whatever is illegal. It is opened when it is first needed: most peers never need it. Fragments that came
  together are joined before, because it takes 11 µs for each.

A frame goes to the slow lane only when the one before it has been dealt with, so the two lanes cannot
overtake each other.

Rules the lane keeps:

1. Nothing is read before `run`; bytes that had come with the request head are delivered.
2. A message's size is bytes, judged on frame headers: over the limit is 1009, nothing buffered.
3. A message has a number of fragments and a time to be whole; control frames have a rate.
4. A protocol error is answered with a Close frame (trio-websocket alone just drops the connection).
5. After our Close, all but the peer's Close is thrown away (trio-websocket fails on a Ping then:
   its issue #184).
6. The lane always reads, up to the bounds of the inbox and of what one connection may hold, so pings,
   closes and EOF are seen while a session is busy. Bytes that it has read and nobody has dealt with are
   charged to the connection.
7. The lane never closes the socket: the connection does, when the last words are out.
8. Behind a broken frame nothing is parsed, the peer's Close neither (RFC 6455 section 7.1.7). It is
   read and dropped, so that no reset overtakes our Close.
9. Others get their turn after each batch, however much came in one read; and a peer that was sent
   away is not listened to for long.
"""

from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from math import inf
from typing import TypeAlias

import attrs
import trio

from broker.core.memory import UNCOUNTED, Holding, Part
from broker.core.work import UNMASKED_KILOBYTE
from broker.transport import frames
from broker.transport.inflating import BadDeflate, Inflater, TooLarge
from broker.transport.outbox import Outbox, Run
from broker.transport.pieces import Pieces
from broker.transport.slow_lane import SlowLane, open_slow_lane
from broker.transport.sockets import receive_some
from broker.transport.tasks import StartSoon

Batch: TypeAlias = list[frames.Message]

# A read may hold hundreds of small frames: 64 KiB is what one system call returns under load.
_READ = 64 * 2**10
# Bytes in which we look for the peer's Close after ours: as many as the buffers of both systems may
# hold (6 and 4 MiB by default on Linux), in frames of 160 bytes. Bytes beyond are dropped unseen.
_CLOSING_BYTES = 10 * 2**20
_CLOSING_FRAMES = 2**16

# Bytes that nobody looks at are read at full speed up to here, because they may have been on their way when
# we sent our Close; then ten times a second, which slows their sender.
_IGNORED_BYTES = 2**20
_IGNORED_PAUSE = 0.1

# Frames that are passed over before others get their turn: a millisecond.
_PASSED_AT_ONCE = 4096

# A frame that is larger waits for its turn before it is unmasked: a mebibyte takes 4 ms, and fifty peers may
# send the last byte of one at the same moment. A smaller frame came in two reads.
_UNMASKED_AT_ONCE = 2 * _READ

# The parts of a message that is not whole are charged once they are more than this: so nothing is charged for
# the part of a frame that most reads of a busy publisher end with.
_CHARGED_FROM = 16 * 2**10

# A message in the inbox: a tuple, a bytes object, and a place in its batch, besides what it says.
_MESSAGE_OVERHEAD = 97

# While the session lags we read in small bites, so that `inbox_batches` of them stay small too.
_READ_WHEN_BUSY = 4 * 2**10


@attrs.frozen(kw_only=True)
class LaneLimits:
    """See the fields of the same name in `broker.config.Config`."""

    max_message_bytes: int
    max_fragments: int
    message_seconds: float
    control_rate: float
    control_burst: int
    inbox_batches: int
    inbox_bytes: int


def _bytes_of(batch: Batch) -> int:
    return sum([len(payload) for _, payload in batch]) + _MESSAGE_OVERHEAD * len(batch)


@attrs.define(eq=False)
class Traffic:
    """Messages that came, and bytes: of all frames, with their headers. Counted once a read.

    Of one connection also, on Trio's clock: when its lane was made, and when bytes came last.
    """

    messages: int = 0
    bytes: int = 0
    began_at: float = 0.0
    heard_at: float = 0.0

    def add_all(self, others: "Sequence[Traffic]") -> None:
        """Linear in them, 0.1 µs each."""
        self.messages += sum([each.messages for each in others])
        self.bytes += sum([each.bytes for each in others])


async def _pay_nothing(work: float) -> None:
    pass


def _take_nothing(batch: Batch) -> Batch:
    return batch


async def _take_no_more(batch: Batch) -> Batch:
    return batch


@attrs.frozen
class _Shown:
    """Takes batches, each of which `see` has seen."""

    see: Callable[[Batch], None]
    take: Callable[[Batch], Batch]

    def __call__(self, batch: Batch) -> Batch:
        self.see(batch)
        return self.take(batch)


_Inbox: TypeAlias = tuple[trio.MemorySendChannel[Batch], trio.MemoryReceiveChannel[Batch]]


class Lane:
    """Reads one peer, once `run` is started.

    `behind` is what was already read from `stream` behind the request head. Batches of messages
    come out of `inbox`, each to be handed to `note_done` when it is dealt with; it ends when no more
    can come; then `peer_close` says how the peer ended it, or is None if it just went away or we
    closed first. `on_end` is called when `inbox` ends, possibly more than once. `take_now` is shown
    each batch first, without a coroutine, as it mostly takes all; what it leaves is for `take_on`, which may
    wait, and what that returns for `inbox`. The bytes held are charged to `holding`.
    """

    __slots__ = (
        "_bad_close",
        "_buffer",
        "_charged",
        "_closing_bytes",
        "_closing_frames",
        "_control_seen",
        "_control_tokens",
        "_deadline",
        "_deflated",
        "_eased",
        "_end_seen",
        "_hands_on",
        "_holding",
        "_ignored",
        "_ignores",
        "_inbox",
        "_is_paused",
        "_limits",
        "_on_end",
        "_open_bytes",
        "_open_fragments",
        "_open_opcode",
        "_pay",
        "_skip",
        "_slow",
        "_slow_opcode",
        "_stream",
        "_tail",
        "_take_now",
        "_take_on",
        "_waiting",
        "_whole",
        "answered_at",
        "close_began_here",
        "close_sent",
        "eof",
        "has_ended",
        "heard_at",
        "inflater",
        "outbox",
        "peer_close",
        "reading",
        "traffic",
    )

    outbox: Outbox
    """Set before `run`."""

    def __init__(
        self,
        stream: trio.abc.ReceiveStream,
        behind: bytes,
        limits: LaneLimits,
        on_end: Callable[[], None],
        take_now: Callable[[Batch], Batch] = _take_nothing,
        take_on: Callable[[Batch], Awaitable[Batch]] = _take_no_more,
        holding: Holding = UNCOUNTED,
    ) -> None:
        self._stream = stream
        self._holding = holding
        self._charged = 0  # for a message that is not whole
        self._waiting = 0  # in the inbox, or taken from it and not dealt with
        self._eased: trio.Event | None = None
        self._is_paused = False
        self._buffer: bytes | bytearray = behind
        self._tail: Pieces | None = None  # that came behind it, of the same frame
        self._whole = 0  # bytes of the frame at the front; 0 where it may be whole
        self._limits = limits
        self._on_end = on_end
        self._take_now = take_now
        self._take_on = take_on
        self._inbox: _Inbox | None = None
        self._hands_on = True
        self.has_ended: bool = False
        self._end_seen: trio.Event | None = None
        self._slow: SlowLane | None = None
        self._slow_opcode = 0  # of the message whose last frame trio-websocket has just been given
        self._open_opcode = 0  # of the fragmented message that is open
        self._open_fragments = 0
        self._open_bytes = 0
        self._bad_close = False
        self._closing_bytes = self._closing_frames = 0  # that came after our Close
        self._ignores = False  # all that comes, but for the end
        self._ignored = 0  # bytes of it
        self._skip = 0  # bytes to come that belong to a frame nobody wants
        self.inflater: Inflater | None = None
        """Where the peer may send compressed messages; set before `run`."""
        self._pay: Callable[[float], Awaitable[None]] = _pay_nothing
        self._deflated: frames.Header | None = None  # of the compressed frame that has come
        self._deadline: float | None = None  # for the message that is not whole yet
        self._control_tokens = float(limits.control_burst)
        self._control_seen = 0.0
        self.traffic: Traffic = Traffic(bytes=len(behind))
        self.heard_at: float = trio.current_time()
        self.traffic.began_at = self.traffic.heard_at = self.heard_at
        self.answered_at: float = -inf  # when a Pong came last
        self.reading: bool = True
        # False while the session has too much to do: its peer's silence then means nothing.
        self.close_sent: tuple[int, str] | None = None
        self.close_began_here: bool = False
        self.peer_close: tuple[int, str] | None = None
        self.eof: bool = False

    async def run(self, start_soon: StartSoon) -> None:
        """Read until the peer is done. The slow lane lives in a task of the connection's."""
        try:
            while not self.has_ended:
                if self._ignores:
                    await self._ignore()
                    continue
                closing = self.close_sent
                if closing is None:
                    if len(self._buffer) > _UNMASKED_AT_ONCE:
                        await self._pay_for_front()
                    await self._take_fast()
                else:
                    self._join()
                    await self._pass_over()
                # Most reads leave nothing here: then there is no need to look.
                left = len(self._buffer)
                slow = self._next_slow() if left else b""
                if slow:
                    await self._take_slow(slow, start_soon)
                elif self._deflated is not None:
                    await self._take_deflated(self._deflated)
                elif self.close_sent is not closing or 0 < len(self._buffer) < left:
                    continue  # the rest is for the other way of looking at it, or the fast lane again
                elif not await self._read():
                    self.lost()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self.lost()
        finally:
            # The goodbye may take a while, and nobody will read what is left of a message.
            self._buffer, self._tail = b"", None
            self._holding.charge(Part.INCOMING, -self._charged)
            self._charged = 0
            if self.inflater is not None:
                self._forget_deflated()
                self.inflater = None
            if self._slow is not None:
                self._slow.let_go()
                self._slow = None

    def close(self, code: int, reason: str) -> None:
        """Send a Close frame behind what is queued; from now on only the peer's Close counts."""
        if self.close_sent is None:
            self.close_began_here = self.peer_close is None
            self.close_sent = (code, reason)
            self.outbox.seal(Run((frames.close_frame(code, reason),), messages=0))
        self._deadline = None
        self._stop_messages()

    def pay_by(self, pay: Callable[[float], Awaitable[None]]) -> None:
        """Tell `pay`, before each step that takes long, what that costs; it waits until it may be taken.
        Called before `run`; without it nobody waits."""
        self._pay = pay

    def pause(self) -> None:
        """Hand on no more messages from now on; so the lane soon stops reading. The session goes on with the
        messages that it has."""
        self._is_paused = True

    def resume(self) -> None:
        """Go on after `pause`."""
        self._is_paused = False
        self._ease()

    def lost(self) -> None:
        """Nothing can be sent any more, so nothing more is read."""
        self.eof = True
        self._end()

    def show(self, see: Callable[[Batch], None] | None) -> None:
        """Show each batch that comes from now on to `see`, before it is taken; None: to nobody any
        more. One at a time. While nobody looks it costs nothing."""
        take = self._take_now
        if isinstance(take, _Shown):
            take = take.take
        self._take_now = take if see is None else _Shown(see, take)

    @property
    def is_ending(self) -> bool:
        """Whether no more messages will come, whoever began it."""
        return self.close_sent is not None or self.peer_close is not None or self.eof

    async def wait_ended(self) -> None:
        """Wait until the peer has answered our Close, or is gone; returns at once if it has."""
        if not self.has_ended:
            self._end_seen = self._end_seen or trio.Event()
            await self._end_seen.wait()

    @property
    def inbox(self) -> trio.MemoryReceiveChannel[Batch]:
        """The batches that wait for the session, made when the first does: it takes 2 KiB, and most
        sessions never let any wait."""
        return self._open_inbox()[1]

    def _open_inbox(self) -> "_Inbox":
        if self._inbox is None:
            # Not `open_memory_channel[Batch]`, which costs 12 µs more.
            inbox: _Inbox = trio.open_memory_channel(self._limits.inbox_batches)
            self._inbox = inbox
            if not self._hands_on:
                inbox[0].close()
        return self._inbox

    # the two lanes

    async def _pay_for_front(self) -> None:
        """Wait for the turn in which a large frame is unmasked that has come; a compressed one has its own."""
        header = frames.read_header(self._buffer)
        if header is None or header.rsv or self._inflates or header.length <= _UNMASKED_AT_ONCE:
            return
        if header.size + header.length <= len(self._buffer):
            await self._pay(header.length / 1024 * UNMASKED_KILOBYTE)

    async def _take_fast(self) -> None:
        """Send to the session what the front of the buffer has for the fast lane."""
        while self._buffer and not self._open_opcode and self.close_sent is None:
            batch, used = frames.take_messages(self._buffer, self._limits.max_message_bytes)
            if not used:
                return
            self._drop_front(used)
            self._deadline = None
            if self._is_paused:
                await self._deliver(batch)
            else:  # as that has it, less a coroutine
                self.traffic.messages += len(batch)
                rest = self._take_now(batch)
                if rest:
                    await self._hand_on(rest)
            if len(batch) < frames.MAX_BATCH:
                return
            await trio.lowlevel.checkpoint()

    async def _pass_over(self) -> None:
        """After our Close: drop what the front of the buffer has, up to the peer's."""
        while self._buffer and not self._skip:
            end, count = frames.pass_over(self._buffer, _PASSED_AT_ONCE)
            self._skip_front(end)
            self._closing_frames += count
            if self._closing_frames > _CLOSING_FRAMES or self._closing_bytes > _CLOSING_BYTES:
                self._begin_to_ignore()
            if count < _PASSED_AT_ONCE:
                return
            await trio.lowlevel.checkpoint()

    def _begin_to_ignore(self) -> None:
        self._ignores = True
        self._buffer = b""

    async def _ignore(self) -> None:
        """Read once, and drop that. The lane ends with what seems to be the answer to our Close:
        bytes that come once that is out, and are all there was."""
        data = await receive_some(self._stream, _READ)
        self._ignored += len(data)
        skipped = min(self._skip, len(data))  # of the broken frame itself
        self._skip -= skipped
        is_answer = skipped < len(data) < _READ
        if not data:
            self.lost()
        elif not self.outbox.mail and (is_answer or self._ignored > _IGNORED_BYTES):
            self._end()
        elif self._ignored > _IGNORED_BYTES:
            await trio.sleep(_IGNORED_PAUSE)

    async def _take_slow(self, slow: bytes, start_soon: StartSoon) -> None:
        """Have trio-websocket deal with frames, and fetch the message that they may complete."""
        if self._slow is None:
            opened = trio.Event()
            start_soon(self._keep_slow, opened)
            await opened.wait()
        if self._slow is not None:
            await self._slow.put(slow)
        if self._slow is None or self.has_ended:
            return  # the connection was cut
        error = self._slow.error
        opcode, self._slow_opcode = self._slow_opcode, 0
        if error is not None:
            self.close(*error)
            self._begin_to_ignore()
            if self._bad_close:
                self._end()  # it will not send another
        elif opcode and self.close_sent is None:
            payload = await self._slow.get_message()
            await self._deliver([(opcode, payload)])

    async def _keep_slow(self, opened: trio.Event) -> None:
        """Hold a slow lane open until it is cancelled, at the latest at the connection's end."""
        slow = None
        try:
            async with trio.open_nursery() as nursery:
                slow = await open_slow_lane(nursery, self._answer, self._limits.max_message_bytes)
                self._slow = slow
                opened.set()
        finally:
            if slow is not None:
                slow.settle()
            opened.set()

    # compressed messages

    @property
    def _inflates(self) -> bool:
        """Whether the message that is open is a compressed one."""
        return self.inflater is not None and self.inflater.is_open

    def _is_deflated(self, header: frames.Header) -> bool:
        """Whether this may be the first frame of a compressed message (RFC 7692 section 6.1)."""
        return (
            self.inflater is not None
            and header.rsv == frames.RSV1
            and header.opcode in (frames.TEXT, frames.BINARY)
            and header.masked
            and (not self._open_opcode or self.inflater.is_open)
        )

    async def _take_deflated(self, header: frames.Header) -> None:
        """Inflate the frame at the front, and hand on the message that it may complete."""
        self._deflated, inflater = None, self.inflater
        assert inflater is not None, "or no frame had come here"
        if header.length > _CHARGED_FROM:
            await self._pay(header.length / 1024 * UNMASKED_KILOBYTE)
            if self.close_sent is not None:
                return  # what is in the buffer is passed over now
        if (
            not isinstance(self._buffer, bytearray)
            and len(self._buffer) > header.size + header.length
        ):
            # A read may be thousands of these, and each would have all behind it copied.
            self._buffer = bytearray(self._buffer)
        mask = self._buffer[header.size - 4 : header.size]
        payload = frames.unmask(self._buffer[header.size : header.size + header.length], mask)
        self._drop_front(header.size + header.length)  # before much may come of it
        if (header.opcode == frames.CONTINUATION) != inflater.is_open or not header.is_shortest:
            self._refuse(1002, "expected the next frame of a compressed message")
            return
        if not inflater.is_open:
            inflater.begin(header.opcode)
            self._open_opcode = header.opcode
            self._open_bytes = self._open_fragments = 0
        self._open_fragments += 1
        try:
            await self._inflate(inflater, payload, header.fin)
            if header.fin and self.close_sent is None:
                self._open_opcode = self._open_bytes = self._open_fragments = 0
                self._deadline = None
                message = inflater.take()
                await self._deliver([message])
        except TooLarge:
            self.close(1009, f"a message of more than {self._limits.max_message_bytes} bytes")
            self._forget_deflated()
        except BadDeflate as error:
            self._refuse(1007, str(error))

    async def _inflate(self, inflater: Inflater, payload: bytes, fin: bool) -> None:
        """Inflate the payload of a frame in as many steps as that takes. Raises what `Inflater.inflate` does."""
        for work in inflater.inflate(payload, self._limits.max_message_bytes, is_last=fin):
            self._charge(len(self._buffer) + len(payload) + inflater.open_bytes)
            await self._pay(work)
            if self.close_sent is not None:
                return
        self._open_bytes = inflater.open_bytes
        if not fin:
            self._start_deadline()

    def _refuse(self, code: int, reason: str) -> None:
        """Close for what a peer has sent, behind which nothing is parsed."""
        self.close(code, reason)
        self._forget_deflated()
        self._begin_to_ignore()

    def _forget_deflated(self) -> None:
        if self.inflater is not None:
            self.inflater.drop()
        self._open_opcode = self._open_bytes = self._open_fragments = 0

    def _answer(self, frame: bytes) -> None:
        """Send the answer to a ping."""
        self.outbox.offer(Run((frame,), messages=0))

    async def _deliver(self, batch: Batch) -> None:
        """Have the session take a batch, at once or when it can."""
        self.traffic.messages += len(batch)
        if self._is_paused and not await self._wait_resumed(_bytes_of(batch)):
            return
        rest = self._take_now(batch)
        if rest:
            await self._hand_on(rest)

    async def _hand_on(self, batch: Batch) -> None:
        """Hand to the session what it has not taken at once; wait while the inbox is full."""
        batch = await self._take_on(batch)
        if not batch:
            return
        size = _bytes_of(batch)
        self._waiting += size
        self._holding.charge(Part.INCOMING, size)
        to_session, _ = self._open_inbox()
        try:
            to_session.send_nowait(batch)
        except trio.WouldBlock:
            with self._not_reading(), suppress(trio.ClosedResourceError, trio.BrokenResourceError):
                await to_session.send(batch)
        except (trio.ClosedResourceError, trio.BrokenResourceError):
            return  # the session has ended: the rest goes the way of all after our Close
        while self._is_full and not self.is_ending:
            await self._wait_eased()

    async def _wait_resumed(self, size: int) -> bool:
        """Keep so many bytes until they may be handed on; false if they come to nothing."""
        self._holding.charge(Part.INCOMING, size)
        try:
            while self._is_paused and not self.is_ending:
                await self._wait_eased()
        finally:
            self._holding.charge(Part.INCOMING, -size)
        return not self.is_ending

    async def _wait_eased(self) -> None:
        with self._not_reading():
            self._eased = trio.Event()
            await self._eased.wait()

    def note_done(self, batch: Batch) -> None:
        """The session has dealt with a batch of the inbox."""
        size = _bytes_of(batch)
        self._waiting -= size
        self._holding.charge(Part.INCOMING, -size)
        self._ease()

    def _ease(self) -> None:
        if self._eased is not None:
            self._eased.set()
            self._eased = None

    @property
    def _is_full(self) -> bool:
        """Whether nothing more should be read until the session has dealt with some of it."""
        return self._waiting > 0 and (
            self._waiting >= self._limits.inbox_bytes or self._holding.is_over
        )

    @contextmanager
    def _not_reading(self) -> Iterator[None]:
        self.reading = False
        try:
            yield
        finally:
            self.reading = True
            self.heard_at = trio.current_time()

    def _next_slow(self) -> bytes:
        """The whole frame at the front of the buffer, and fragments behind it, joined; empty when
        more bytes are needed."""
        slow = self._next_slow_frame()
        if slow is None or not self._open_opcode or self._inflates:
            return slow or b""
        return slow + self._take_fragments()

    def _take_fragments(self) -> bytes:
        """Take the next part of the open message, as one frame; as far as the limits allow."""
        limits = self._limits
        payload, count, used, fin = frames.take_fragments(
            self._buffer,
            limits.max_message_bytes - self._open_bytes,
            min(frames.MAX_BATCH, limits.max_fragments - self._open_fragments),
        )
        self._drop_front(used)
        self._open_bytes += len(payload)
        self._open_fragments += count
        if fin:
            self._end_message()
        elif not payload:
            return b""
        return frames.masked_frame(frames.CONTINUATION, payload, fin=fin)

    def _next_slow_frame(self) -> bytes | None:
        """The whole frame at the front of the buffer; None when more bytes are needed."""
        while self._buffer:
            header = frames.read_header(self._buffer)
            if header is None:
                self._start_deadline()
                return None
            size = header.size + header.length
            if self.close_sent is not None:
                if not (header.is_legal or self._is_deflated(header)):
                    self._end()
                    return None
                if header.opcode != frames.CLOSE:
                    self._skip_front(size)
                    continue
            elif not (header.is_legal or self._is_deflated(header)):
                # trio-websocket finds the words for it, and needs no more than the header.
                broken = self._take_front(header.size)
                self._skip_front(header.length)
                return broken
            elif not header.is_control:
                broken_limit = self._judge_size(header)
                if broken_limit:
                    self.close(1009, broken_limit)
                    self._skip_front(size)
                    return None
            if len(self._buffer) < size:
                self._whole = size
                self._start_deadline()
                return None
            if header.opcode == frames.CLOSE:
                frame = self._take_close(header)
                if frame is not None or self.has_ended:
                    return frame
                continue
            if not header.is_control:
                if header.rsv or self._inflates:
                    self._deflated = header
                    return None
                self._count_fragment(header)
            elif not self._control_allowed():
                self.close(1008, "too many control frames")
                return None
            else:
                if not self._open_opcode:
                    self._deadline = None
                if header.is_shortest:
                    self._take_ping(header)
                    if not self._open_opcode:
                        return None  # messages behind it are for the fast lane
                    continue
            return self._take_front(size)
        return None

    def _judge_size(self, header: frames.Header) -> str:
        """Which limit this data frame breaks, by its header alone; empty if none."""
        total, fragments = header.length, 1
        if header.opcode == frames.CONTINUATION:
            total += self._open_bytes
            fragments += self._open_fragments
        most = self._limits.max_message_bytes
        if self.inflater is not None and (header.rsv or self.inflater.is_open):
            # Data that cannot be compressed get larger by some per cent at worst.
            most += most // 16 + 64
            if self.inflater.is_open:
                most += self.inflater.open_bytes - self.inflater.size
        if total > most:
            return f"a message of more than {self._limits.max_message_bytes} bytes"
        if fragments > self._limits.max_fragments:
            return f"a message of more than {self._limits.max_fragments} fragments"
        return ""

    def _count_fragment(self, header: frames.Header) -> None:
        """A data frame goes to trio-websocket: note what it starts or ends."""
        if header.opcode != frames.CONTINUATION:
            if not self._open_opcode:
                self._open_opcode = header.opcode
            self._open_bytes = self._open_fragments = 0
        self._open_bytes += header.length
        self._open_fragments += 1
        if header.fin:
            self._end_message()
        else:
            self._start_deadline()

    def _end_message(self) -> None:
        if self._open_opcode:
            self._slow_opcode = self._open_opcode
        self._open_opcode = self._open_bytes = self._open_fragments = 0
        self._deadline = None

    def _take_close(self, header: frames.Header) -> bytes | None:
        """Answer the peer's Close, or take its answer to ours. A malformed one is returned."""
        frame = self._take_front(header.size + header.length)
        payload = frames.unmask(frame[header.size :], frame[header.size - 4 : header.size])
        if self.close_sent is None and not frames.is_legal_close(payload):
            self._stop_messages()
            self._bad_close = True
            return frame
        self.peer_close = frames.close_content(payload)
        if self.close_sent is None:
            self.close_sent = self.peer_close
            self.outbox.seal(Run((frames.encode(frames.CLOSE, payload),), messages=0))
        self._end()
        return None

    def _take_ping(self, header: frames.Header) -> None:
        """Answer a Ping; a Pong needs no answer."""
        frame = self._take_front(header.size + header.length)
        if header.opcode == frames.PING:
            payload = frames.unmask(frame[header.size :], frame[header.size - 4 : header.size])
            self._answer(frames.encode(frames.PONG, payload))
        else:
            self.answered_at = trio.current_time()

    def _control_allowed(self) -> bool:
        now = trio.current_time()
        elapsed, self._control_seen = now - self._control_seen, now
        burst = self._limits.control_burst
        tokens = min(burst, self._control_tokens + elapsed * self._limits.control_rate) - 1
        self._control_tokens = max(0.0, tokens)
        return tokens >= 0

    # the buffer

    async def _read(self) -> bool:
        """Read once more from the socket, unless the peer is done; false at its end."""
        if self.has_ended:
            return True
        unfinished = len(self._buffer) + self._open_bytes
        if self._tail is not None:
            unfinished += self._tail.held
        if self._charged or unfinished > _CHARGED_FROM:
            self._charge(unfinished)
        size = _READ_WHEN_BUSY if self._waiting else _READ
        if self._deadline is None:
            data = await receive_some(self._stream, size)
        else:
            with trio.move_on_at(self._deadline) as whole:
                data = await receive_some(self._stream, size)
            if whole.cancelled_caught:
                self._deadline = None
                self.close(1008, f"a message took more than {self._limits.message_seconds:g} s")
                return True
        if not data:
            return False
        traffic = self.traffic
        traffic.heard_at = self.heard_at = trio.current_time()
        traffic.bytes += len(data)
        if self.close_sent is not None:
            self._closing_bytes += len(data)
        if self._skip:
            skipped = min(self._skip, len(data))
            self._skip -= skipped
            data = data[skipped:]
        if self._buffer:
            self._keep(data)
        else:
            self._buffer = data
        return True

    def _keep(self, data: bytes | bytearray) -> None:
        """Put what was read behind what is in the buffer: beside it while the frame at its front is not whole."""
        tail = self._tail
        if len(self._buffer) + len(data) + (0 if tail is None else len(tail)) < self._whole:
            if tail is None:
                self._tail = tail = Pieces()
            tail.add(data)
        else:
            self._join(data)

    def _join(self, data: bytes | bytearray = b"") -> None:
        """Have all that has come in the buffer, and this behind it: in a bytearray from here on, because to take a
        frame from the front of a bytes object copies all of it."""
        self._whole = 0
        if self._tail is not None:
            self._buffer, self._tail = self._tail.join(self._buffer, data), None
        elif isinstance(self._buffer, bytearray):
            self._buffer += data
        elif data:
            self._buffer = bytearray().join((self._buffer, data))

    def _charge(self, unfinished: int) -> None:
        """Charge what is held for a message that is not whole."""
        self._holding.charge(Part.INCOMING, unfinished - self._charged)
        self._charged = unfinished

    def _start_deadline(self) -> None:
        if self._deadline is None:
            self._deadline = trio.current_time() + self._limits.message_seconds

    def _take_front(self, size: int) -> bytes:
        taken = bytes(self._buffer[:size])
        self._drop_front(size)
        return taken

    def _drop_front(self, size: int) -> None:
        if size == len(self._buffer):
            self._buffer = b""
        elif isinstance(self._buffer, bytearray):
            del self._buffer[:size]
        else:
            self._buffer = self._buffer[size:]

    def _skip_front(self, size: int) -> None:
        """Drop a frame, of which a part may not have come yet."""
        here = min(size, len(self._buffer))
        self._skip = size - here
        self._drop_front(here)

    def _stop_messages(self) -> None:
        self._hands_on = False
        if self._inbox is not None:
            self._inbox[0].close()
        self._ease()
        self._on_end()

    def _end(self) -> None:
        self.has_ended = True
        if self._end_seen is not None:
            self._end_seen.set()
        self._stop_messages()
