"""The stream between the socket and trio-websocket.

trio-websocket is given a `Lane` instead of a socket, through its public API, and applies RFC 6455
to whatever the lane lets through:

- **In**, whole simple data frames are taken straight from the read buffer (the fast lane) and go
  to the session in batches. Everything else, whole frame by whole frame, passes through
  trio-websocket (the slow lane). A frame is handed over only when the one before it has been dealt
  with, so the two lanes cannot overtake each other.
- **Out**, each frame that trio-websocket sends goes into the outbox like any other frame.

Rules the lane keeps:

1. Before accept nothing is read past the request head; what came with the head is delivered.
2. A message's size is bytes, judged on frame headers: over the limit is 1009, nothing buffered.
3. A message has a number of fragments and a time to be whole; control frames have a rate.
4. A protocol error is answered with a Close frame (trio-websocket alone just drops the connection).
5. After our Close, all but the peer's Close is thrown away (trio-websocket fails on a Ping then:
   its issue #184).
6. The lane always reads, up to the inbox's bound, so pings, closes and EOF are seen while a session
   is busy.
7. The lane never closes the socket: the connection does, when the last words are out.
"""

from collections.abc import Callable
from typing import TypeAlias

import attrs
import trio
import trio_websocket

from . import frames
from .outbox import Outbox, Run

Batch: TypeAlias = list[frames.Message]

# A read may hold hundreds of small frames: 64 KiB is what one system call returns under load.
_READ = 64 * 2**10
# While the session lags we read in small bites, so that `inbox_batches` of them stay small too.
_READ_WHEN_BUSY = 4 * 2**10

# The one close code that is registered and that wsproto takes for an error: we answer it ourselves.
_BAD_GATEWAY = 1014


@attrs.frozen(kw_only=True)
class LaneLimits:
    """See the fields of the same name in `broker.config.Config`."""

    max_message_bytes: int
    max_fragments: int
    message_seconds: float
    control_rate: float
    control_burst: int
    inbox_batches: int


class Lane(trio.abc.Stream):
    """A `trio.abc.Stream` for `trio_websocket.wrap_server_stream`.

    `replay` is what was already read from `stream`: the request head and what followed it.
    Batches of messages come out of `inbox`, which ends when no more can come; then `peer_close`
    says how the peer ended it, or is None if it just went away or we closed first. `on_end` is
    called when `inbox` ends, possibly more than once.
    """

    def __init__(
        self,
        stream: trio.abc.ReceiveStream,
        replay: tuple[bytes, bytes],
        limits: LaneLimits,
        on_end: Callable[[], None],
    ) -> None:
        self._stream = stream
        self._head: bytes = replay[0]
        self._buffer: bytes | bytearray = replay[1]
        self._limits = limits
        self._on_end = on_end
        self._to_session, self.inbox = trio.open_memory_channel[Batch](limits.inbox_batches)
        self.outbox: Outbox
        self._websocket: trio_websocket.WebSocketConnection
        self._accepted = trio.Event()
        self._ended = trio.Event()
        self._slow_opcode = 0  # of the message whose last frame trio-websocket has just been given
        self._open_opcode = 0  # of the fragmented message that is open
        self._open_fragments = 0
        self._open_bytes = 0
        self._skip = 0  # bytes to come that belong to a frame nobody wants
        self._deadline: float | None = None  # for the message that is not whole yet
        self._control_tokens = float(limits.control_burst)
        self._control_seen = 0.0
        self.heard_at = trio.current_time()
        self.reading = True
        """False while the session has too much to do: its peer's silence then means nothing."""
        self.close_sent: tuple[int, str] | None = None
        self.close_began_here = False
        self.peer_close: tuple[int, str] | None = None
        self.eof = False

    def accepted(self, websocket: trio_websocket.WebSocketConnection) -> None:
        """The handshake is done: read on."""
        self._websocket = websocket
        # The head may hold credentials, and nobody reads it again.
        self._head = b""
        self._accepted.set()

    def close(self, code: int, reason: str) -> None:
        """Send a Close frame behind what is queued; from now on only the peer's Close counts."""
        if self.close_sent is None:
            self.close_began_here = self.peer_close is None
            self.close_sent = (code, reason)
            self.outbox.seal(Run((frames.close_frame(code, reason),), messages=0))
        self._deadline = None
        self._stop_messages()

    def lost(self) -> None:
        """Nothing can be sent any more, so nothing more is read."""
        self.eof = True
        self._end()

    @property
    def is_ending(self) -> bool:
        """Whether no more messages will come, whoever began it."""
        return self.close_sent is not None or self.peer_close is not None or self.eof

    async def wait_ended(self) -> None:
        """Wait until the peer has answered our Close, or is gone."""
        await self._ended.wait()

    # what trio-websocket calls

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """The next whole frame for the slow lane; meanwhile messages go to the inbox.

        Called by trio-websocket's reader only. Returns b"" when the peer is done.
        """
        if self._head:
            head, self._head = self._head, b""
            await trio.lowlevel.checkpoint()
            return head
        await self._accepted.wait()
        try:
            await self._collect_slow()
            while True:
                if self._ended.is_set():
                    return b""
                if self.close_sent is None:
                    await self._take_fast()
                frame = self._next_slow()
                if frame is not None:
                    return frame
                if not await self._read():
                    self.eof = True
                    self._end()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self.eof = True
            self._end()
            raise

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Put one frame into the outbox: trio-websocket sends each with a call of its own."""
        await trio.lowlevel.checkpoint()
        data = bytes(data)
        if data[0] == 0x80 | frames.CLOSE:
            # trio-websocket answers the peer's Close; the connection will follow.
            if self.close_sent is None:
                code = int.from_bytes(data[2:4], "big") if len(data) >= 4 else 1005
                self.close_sent = (code, "")
                self.outbox.seal(Run((data,), messages=0))
            return
        self.outbox.offer(Run((data,), messages=0))

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        """trio-websocket is done with this peer: after a closing handshake, or an error of its."""
        await trio.lowlevel.checkpoint()
        reason = self._websocket.closed if self._accepted.is_set() else None
        if reason is not None and reason.code != 1006:
            self.close(reason.code, reason.reason or "")
        if self.peer_close is not None:
            self._end()

    # the two lanes

    async def _take_fast(self) -> None:
        """Send to the session what the front of the buffer has for the fast lane."""
        if not self._buffer or self._open_opcode:
            return
        batch, used = frames.take_messages(self._buffer, self._limits.max_message_bytes)
        if used:
            self._drop_front(used)
            self._deadline = None
            await self._deliver(batch)

    async def _collect_slow(self) -> None:
        """Fetch the message that trio-websocket has finished, if it has."""
        if not self._slow_opcode:
            return
        opcode, self._slow_opcode = self._slow_opcode, 0
        if self._websocket.closed is not None or self.close_sent is not None:
            return  # it was not valid, so there is no message
        message = await self._websocket.get_message()
        payload = message.encode() if isinstance(message, str) else message
        await self._deliver([(opcode, payload)])

    async def _deliver(self, batch: Batch) -> None:
        try:
            self._to_session.send_nowait(batch)
        except trio.WouldBlock:
            self.reading = False
            try:
                await self._to_session.send(batch)
            except (trio.ClosedResourceError, trio.BrokenResourceError):
                pass
            finally:
                self.reading = True
                self.heard_at = trio.current_time()
        except (trio.ClosedResourceError, trio.BrokenResourceError):
            pass  # the session has ended: what is left goes the way of all after our Close

    def _next_slow(self) -> bytes | None:
        """The whole frame at the front of the buffer; None when more bytes are needed."""
        while self._buffer:
            header = frames.read_header(self._buffer)
            if header is None:
                self._start_deadline()
                return None
            size = header.size + header.length
            if self.close_sent is not None:
                if not header.is_legal:
                    self._end()
                    return b""
                if header.opcode != frames.CLOSE:
                    self._skip_front(size)
                    continue
            elif not header.is_legal:
                # trio-websocket finds the words for it, and needs no more than the header.
                return self._take_front(header.size)
            elif not header.is_control:
                broken_limit = self._judge_size(header)
                if broken_limit:
                    self.close(1009, broken_limit)
                    self._skip_front(size)
                    continue
            if len(self._buffer) < size:
                self._start_deadline()
                return None
            if header.opcode == frames.CLOSE:
                return self._take_close(header)
            if not header.is_control:
                self._count_fragment(header)
            elif not self._control_allowed():
                self.close(1008, "too many control frames")
                continue
            elif not self._open_opcode:
                self._deadline = None
            return self._take_front(size)
        return None

    def _judge_size(self, header: frames.Header) -> str:
        """Which limit this data frame breaks, by its header alone; empty if none."""
        total, fragments = header.length, 1
        if header.opcode == frames.CONTINUATION:
            total += self._open_bytes
            fragments += self._open_fragments
        if total > self._limits.max_message_bytes:
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
            if self._open_opcode:
                self._slow_opcode = self._open_opcode
            self._open_opcode = self._open_bytes = self._open_fragments = 0
            self._deadline = None
        else:
            self._start_deadline()

    def _take_close(self, header: frames.Header) -> bytes:
        frame = self._take_front(header.size + header.length)
        self.peer_close = _close_content(frame, header)
        if self.close_sent is not None:
            # The answer to ours: done, and nobody else needs to see it.
            self._end()
            return b""
        code, reason = self.peer_close
        if code == _BAD_GATEWAY and "\ufffd" not in reason:
            self.close_sent = self.peer_close
            self.outbox.seal(Run((frames.close_frame(code, reason),), messages=0))
            self._end()
            return b""
        self._stop_messages()
        return frame

    def _control_allowed(self) -> bool:
        now = trio.current_time()
        elapsed, self._control_seen = now - self._control_seen, now
        burst = self._limits.control_burst
        tokens = min(burst, self._control_tokens + elapsed * self._limits.control_rate) - 1
        self._control_tokens = max(0.0, tokens)
        return tokens >= 0

    # the buffer

    async def _read(self) -> bool:
        """Read once more from the socket; false at its end."""
        busy = self.inbox.statistics().current_buffer_used
        size = _READ_WHEN_BUSY if busy else _READ
        if self._deadline is None:
            data = await self._stream.receive_some(size)
        else:
            with trio.move_on_at(self._deadline) as whole:
                data = await self._stream.receive_some(size)
            if whole.cancelled_caught:
                self._deadline = None
                self.close(1008, f"a message took more than {self._limits.message_seconds:g} s")
                return True
        if not data:
            return False
        self.heard_at = trio.current_time()
        if self._skip:
            skipped = min(self._skip, len(data))
            self._skip -= skipped
            data = data[skipped:]
        if not self._buffer:
            self._buffer = data
        elif isinstance(self._buffer, bytearray):
            self._buffer += data
        else:
            # A bytearray from here on: many small reads would copy all of a bytes object each time.
            self._buffer = bytearray(self._buffer) + data
        return True

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
        self._to_session.close()
        self._on_end()

    def _end(self) -> None:
        self._stop_messages()
        self._ended.set()


def _close_content(frame: bytes, header: frames.Header) -> tuple[int, str]:
    payload = frames.unmask(frame[header.size :], frame[header.size - 4 : header.size])
    if len(payload) < 2:
        return 1005, ""
    return int.from_bytes(payload[:2], "big"), payload[2:].decode(errors="replace")
