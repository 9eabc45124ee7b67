"""The stream under a connection whose peer has no WebSocket: one HTTP response that goes on.

The connection reads frames from it and writes frames to it, as with a WebSocket. Written
frames become lines or events, or in protobuf the same as in frames; the frames it reads came by other
requests, whose tasks call `deliver`.

Rule 1  Frames are passed on as they come, in pieces: a large one is not gathered first, so the outbox
        sees how fast its peer takes it.
Rule 2  An event is one line. A line end inside a payload must not end it, as any publisher could
        then cut short what every subscriber gets.
Rule 3  A client that is sent away gets the code: a Close frame becomes a `disconnect` push, unless
        that was the last push already.
Rule 4  A stream has no task, and holds one message at most that was not read yet; or the subscribe
        commands of a one-way client, each as large as any message may be.
"""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Final

import msgspec
import trio

from broker.core.memory import UNCOUNTED, Holding, Part
from broker.core.messages import Position
from broker.errors import CloseCode, ErrorCode
from broker.http.event_ids import Positions
from broker.protocols.centrifuge_json import CENTRIFUGE_JSON
from broker.protocols.centrifuge_protobuf import CENTRIFUGE_PROTOBUF, is_disconnect
from broker.protocols.codec import Codec
from broker.protocols.json_text import to_json
from broker.transport import frames
from broker.transport.sockets import RelayStream

if TYPE_CHECKING:
    from broker.session.connection import Connection

_PUSH = b'{"push":'
_DISCONNECT = b'{"push":{"disconnect":'
_IGNORED = 4096

# A reply of many megabytes may have to be put together first. It goes out in pieces all the same, so
# that the outbox sees its peer take them: one TLS record each.
_PIECE = 16 * 2**10

CONNECT_ID = 1
"""Of the `connect` command of a one-way client; its subscribe commands have those that follow."""


class HttpStream(RelayStream):
    """A response in NDJSON: each reply and push is a line. `http_stream` of the SDKs.

    First comes a response head, which goes out as it is. `connection` is set before that.
    """

    media_type: ClassVar[str] = "application/x-ndjson"
    codec: ClassVar[Codec] = CENTRIFUGE_JSON
    opcode: ClassVar[int] = frames.TEXT
    """Of the frames in which that codec's messages go both ways."""
    connection: "Connection"
    pieces: int
    holding: Holding = UNCOUNTED
    """The holding that is charged for its data: that of its connection, once there is one."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.transport_stream: trio.abc.Stream = stream
        self._stream = stream
        self._is_head = True
        self._buffer = bytearray()
        self._frame = -1  # opcode of the frame that is being passed on; -1 between frames
        self._left = 0  # of its payload
        self._start = b""  # of that payload
        self._close = b""
        self._is_over = False
        self._turn = trio.StrictFIFOLock()
        self._unread = b""  # frames of the peer's that were not read yet
        self._listening = trio.CancelScope()
        self._heard = trio.Event()
        self._has_ended = False
        self._was_cut_off = False  # in the middle of what was to be read

    async def deliver(self, message: bytes) -> bool:
        """Have a message be read; false if the end came before that.

        Waits for its turn, and until the connection reads, which is its way to slow a peer down.
        """
        async with self._turn:
            if self._has_ended:
                return False
            self._heard = trio.Event()
            self._queue(message)
            await self._heard.wait()
            return not self._was_cut_off

    @classmethod
    def client_frame(cls, message: bytes) -> bytes:
        """The frame in which a client sends this; a mask of zeros changes nothing."""
        header = bytearray(frames.encode(cls.opcode, message))
        del header[len(header) - len(message) :]
        header[1] |= 0x80
        return bytes(header) + bytes(4) + message

    def _queue(self, *messages: bytes) -> None:
        self._unread += b"".join(map(self.client_frame, messages))
        self._listening.cancel()

    def _go_on(self) -> bool:
        """Queue what is left to be said for the peer, if anything is; whether it is."""
        return False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send these bytes of frames, translated; the stream is closed behind a Close frame."""
        written = memoryview(self._translate(bytes(data)))
        more = max(0, len(written) - len(data))
        self.holding.charge(Part.OUTBOXES, more)
        try:
            for start in range(0, len(written), _PIECE):
                await self._stream.send_all(written[start : start + _PIECE])
                self.pieces += 1
        finally:
            self.holding.charge(Part.OUTBOXES, -more)
        if self._is_over:
            await self._stream.aclose()

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """The peer's next frames; nothing once it is gone. All else that it sends on this stream
        belongs to no request."""
        await trio.lowlevel.checkpoint()
        while not (self._unread or self._go_on()):
            with trio.CancelScope() as self._listening:
                if not await self._stream.receive_some(_IGNORED):
                    return b""
        most = len(self._unread) if max_bytes is None else max_bytes
        data, self._unread = self._unread[:most], self._unread[most:]
        if not self._unread:
            self._heard.set()
        return data

    async def aclose(self) -> None:
        """Close the stream; requests that wait to deliver need not, and unread data are dropped."""
        self._has_ended = True
        self._was_cut_off = bool(self._unread)
        self._unread = b""
        self._heard.set()
        del self.connection  # which points back here
        await self._stream.aclose()

    def _translate(self, data: bytes) -> bytes:
        written = []
        if self._is_head:  # the first entry of the outbox, so all of it is in the first bytes
            end = data.index(b"\r\n\r\n") + 4
            written.append(data[:end])
            data = data[end:]
            self._is_head = False
        self._buffer += data
        while True:
            if self._frame < 0:
                header = frames.read_header(self._buffer)
                if header is None:
                    break
                del self._buffer[: header.size]
                self._frame, self._left = header.opcode, header.length
                if header.opcode == self.opcode:
                    self._start = b""
            piece = bytes(self._buffer[: self._left])
            del self._buffer[: len(piece)]
            self._left -= len(piece)
            if self._frame == self.opcode:
                self._start += piece[: len(_DISCONNECT) - len(self._start)]
                written.append(self._translate_piece(piece, not self._left))
            elif self._frame == frames.CLOSE:
                self._close += piece
                if not self._left:
                    written.append(self._farewell())
            if self._left:
                break
            self._frame = -1
        return b"".join(written)

    def _farewell(self) -> bytes:
        self._is_over = True
        if self._is_disconnect(self._start):
            return b""
        code, reason = frames.close_content(self._close)
        push = {"push": {"disconnect": {"code": code, "reason": reason}}}
        return self._translate_piece(self.codec.encode(push), True)

    def _is_disconnect(self, start: bytes) -> bool:
        return start == _DISCONNECT

    def _translate_piece(self, piece: bytes, is_last: bool) -> bytes:
        """Translate a piece of a frame's payload, which holds one or more replies."""
        return piece + b"\n" if is_last else piece


class ProtobufStream(HttpStream):
    """A response in protobuf: each reply and push is behind its length, as it is in a frame."""

    media_type: ClassVar[str] = "application/octet-stream"
    codec: ClassVar[Codec] = CENTRIFUGE_PROTOBUF
    opcode: ClassVar[int] = frames.BINARY

    def _is_disconnect(self, start: bytes) -> bool:
        return is_disconnect(start)

    def _translate_piece(self, piece: bytes, is_last: bool) -> bytes:
        return piece


class SseStream(HttpStream):
    """A response in server-sent events: each reply and push is one."""

    media_type = "text/event-stream"

    def __init__(self, stream: trio.abc.Stream) -> None:
        super().__init__(stream)
        self._is_open = False

    def _translate_piece(self, piece: bytes, is_last: bool) -> bytes:
        start = b"" if self._is_open else b"data: "
        self._is_open = not is_last
        # In valid JSON a bare CR is white space, but to server-sent events it is a line end.
        body = piece.replace(b"\r", b" ").replace(b"\n", b"\n\ndata: ")
        return start + body + (b"\n\n" if is_last else b"")


class _Error(msgspec.Struct):
    code: int
    message: str = ""
    temporary: bool = False


class _Listed(msgspec.Struct):
    offset: int = 0


class _Subscribed(msgspec.Struct):
    """The fields of a subscription's outcome that say where its reader is."""

    offset: int = 0
    epoch: str = ""
    publications: list[_Listed] = []

    @property
    def position(self) -> Position | None:
        """The place behind all that came with it; None where nothing can be recovered."""
        if not self.epoch:
            return None
        last = self.publications[-1].offset if self.publications else 0
        return Position(max(self.offset, last), self.epoch)


class _Connected(msgspec.Struct):
    subs: dict[str, _Subscribed] = {}


class _Reply(msgspec.Struct):
    id: int
    connect: msgspec.Raw = msgspec.Raw(b"{}")
    subscribe: msgspec.Raw = msgspec.Raw(b"{}")
    error: _Error | None = None


class _Push(msgspec.Struct):
    channel: str = ""
    subscribe: _Subscribed | None = None
    unsubscribe: dict[str, msgspec.Raw] | None = None


_replies = msgspec.json.Decoder(_Reply)
_subscribed = msgspec.json.Decoder(_Subscribed)
_connected = msgspec.json.Decoder(_Connected)
_pushes = msgspec.json.Decoder(_Push)
_topics = msgspec.json.Decoder(str)

_publication = re.compile(rb'{"channel":("(?:[^"\\]|\\.)*"),"pub":').match
# The codec writes the offset last. In a payload as many braces would follow, and then those of the push.
_offset = re.compile(rb',"offset":([0-9]+)}}$').search
_OFFSET_BYTES = 40
"""The end of a push that is kept, to find the offset in it."""
_FIRST_BYTES = 4096
"""The beginning of a push that is kept: longer than any topic, and than most subscriptions."""
ASKED_AT_ONCE: Final = 32
"""Subscribe commands that are made and read in one step: less than a slice of work."""

_SHORT_ID = 256
"""Bytes of an id that goes with every event; a longer one goes when as many bytes of events have gone."""


class UniSseStream(HttpStream):
    """Server-sent events for a reader that can send nothing: pushes, without `push` around them.

    `subs` are the topics it asked for, with the fields of their subscribe commands; each is
    subscribed to once it is connected, unless its token did so. The outcome is a push. `positions` is
    where the reader was before; what moves it on has an id that names them all.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        stream: trio.abc.Stream,
        subs: Mapping[str, Mapping[str, msgspec.Raw]],
        positions: Positions | None = None,
    ) -> None:
        super().__init__(stream)
        self._subs = dict(subs)
        self._topics: Sequence[str] = ()  # of the subscribe commands, in order
        self._asked = 0  # how many of them have been queued
        self._line = bytearray()  # the part of one that has come and was not passed on
        self._is_push = False
        self._first, self._size, self._last = b"", 0, b""  # of the push that is passed on
        self._positions = Positions() if positions is None else positions
        self._has_moved = False  # since its last id
        self._since_id = 0  # bytes

    def _translate(self, data: bytes) -> bytes:
        written = super()._translate(data)
        if self._has_moved and self._frame < 0:
            # Behind all that goes out at once: an id without data is no event, and is kept all the same.
            written += self._id() + b"\n"
        return written

    def _translate_piece(self, piece: bytes, is_last: bool) -> bytes:
        *whole, rest = piece.split(b"\n")
        written = [self._pass_on(part, True) for part in whole]
        written.append(self._pass_on(rest, is_last))
        return b"".join(written)

    def _pass_on(self, part: bytes, is_end: bool) -> bytes:
        line = self._line
        line += part.replace(b"\r", b" ")
        written = b""
        if not self._is_push and line.startswith(_PUSH):
            del line[: len(_PUSH)]
            self._is_push, written = True, b"data: "
        if self._is_push:
            text = bytes(line[:-1])  # the last byte may be the brace that closes what was opened
            del line[:-1]
            self._note(text)
            written += text
        if is_end:
            if self._is_push:
                written += self._end_of_push()
                line.clear()
            else:
                answer = bytes(line)
                line.clear()  # before it is translated: it may hold all of a history
                written += self._answer(answer)
            self._is_push = False
        return written

    def _note(self, text: bytes) -> None:
        """Keep of a push what says where the reader is then."""
        if self._size < _FIRST_BYTES:
            self._first += text[: _FIRST_BYTES - self._size]
        self._size += len(text)
        self._last = (self._last + text)[-_OFFSET_BYTES:]

    def _end_of_push(self) -> bytes:
        first, size, last = self._first, self._size, self._last
        self._first, self._size, self._last = b"", 0, b""
        self._since_id += size
        if match := _publication(first):
            offset = _offset(last)
            if offset and self._positions.move(_topics.decode(match[1]), int(offset[1])):
                self._has_moved = True
        elif size > _FIRST_BYTES:
            self._positions.has_others = True  # perhaps a subscription: its place is not known
        else:
            push = _pushes.decode(first)
            if push.subscribe is not None:
                self._begin_at(push.channel, push.subscribe.position)
            elif push.unsubscribe is not None:
                self._begin_at(push.channel, None)
        return b"\n" + self._end_of_event()

    def _begin_at(self, topic: str, position: Position | None) -> None:
        if position is not None:
            self._positions.set(topic, position)
        elif topic in self._positions:
            self._positions.forget(topic)
        else:
            return
        self._has_moved = True

    def _end_of_event(self) -> bytes:
        """The rest of an event behind its data: its id, if it has one."""
        if not self._has_moved:
            return b"\n"
        size = self._positions.size
        if size > _SHORT_ID and self._since_id < size:
            return b"\n"
        return self._id() + b"\n"

    def _id(self) -> bytes:
        self._has_moved, self._since_id = False, 0
        return b"id: %b\n" % self._positions.written()

    def _answer(self, line: bytes) -> bytes:
        """Translate a ping, or the reply to one of our commands."""
        if line == b"{}":
            return b":\n\n"
        self._since_id += len(line)
        reply = _replies.decode(line)
        if reply.id == CONNECT_ID:
            return self._connected(reply)
        topic = self._topics[reply.id - CONNECT_ID - 1]
        outcome: bytes | msgspec.Raw
        if reply.error is not None:
            kind, outcome = b"unsubscribe", _coded(reply.error.code, reply.error.message)
            if not reply.error.temporary:
                self._begin_at(topic, None)
        else:
            kind, outcome = b"subscribe", reply.subscribe
            self._begin_at(topic, _subscribed.decode(outcome).position)
        end = self._end_of_event()
        return b'data: {"channel":%b,"%b":%b}\n%b' % (to_json(topic), kind, outcome, end)

    def _go_on(self) -> bool:
        """Ask for the next few topics: a thousand in one step would be 10 ms."""
        first = self._asked
        self._asked = min(first + ASKED_AT_ONCE, len(self._topics))
        commands = [
            to_json({"id": number, "subscribe": {**self._subs.pop(topic), "channel": topic}})
            for number, topic in enumerate(
                self._topics[first : self._asked], CONNECT_ID + 1 + first
            )
        ]
        self._queue(*commands)  # one by one: together they may be too large for a message
        return bool(commands)

    def _connected(self, reply: _Reply) -> bytes:
        if reply.error is not None:
            # Told by the Close frame behind it.
            self.connection.close(_close_code(reply.error), reply.error.message)
            return b""
        there = _connected.decode(reply.connect).subs
        self._topics = [topic for topic in self._subs if topic not in there]
        self._queue()
        self._positions.keep({*there, *self._topics})
        for topic, subscribed in there.items():
            self._begin_at(topic, subscribed.position)
        return b'data: {"connect":%b}\n%b' % (reply.connect, self._end_of_event())


def _close_code(error: _Error) -> CloseCode:
    """How a one-way client is sent away whose `connect` was answered with an error."""
    if error.code == ErrorCode.TOKEN_EXPIRED:
        return CloseCode.EXPIRED
    return CloseCode.SERVER_ERROR if error.temporary else CloseCode.PERMISSION_DENIED


def _coded(code: int, reason: str) -> bytes:
    return to_json({"code": code, "reason": reason})
