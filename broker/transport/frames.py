"""WebSocket frames, sans I/O: client frames in, server frames out (RFC 6455 section 5).

Four readers of the same bytes:

- `take_messages` is the fast lane. It takes whole, simple messages off the front of a buffer and
  stops at the first byte that is anything else: a control frame, a fragment, a frame that is not
  complete yet, or one that is illegal in any way.
- `take_fragments` takes the fragments of one message that is open, and joins them.
- `pass_over` finds where frames end that nobody wants.
- `read_header` looks at whatever the others stopped at.

Rule: nothing here judges a peer. Frames that these do not take are left, byte for byte, for the
full RFC 6455 implementation behind it.

The loops over bytes are there in C as well, in compiled_frames.c, for builds that were asked for it. They
replace those of here at the end of this module; `BUILD` says which there are.
"""

import struct
from functools import lru_cache
from typing import NamedTuple, TypeAlias

CONTINUATION = 0x0
TEXT = 0x1
BINARY = 0x2
CLOSE = 0x8
PING = 0x9
PONG = 0xA

RSV1 = 0x40
"""The bit of a first byte by which a message says that it is compressed (RFC 7692 section 6)."""

Buffer: TypeAlias = bytes | bytearray
Message: TypeAlias = tuple[int, bytes]
"""Opcode (TEXT or BINARY) and payload. A text payload is valid UTF-8."""

MAX_CLOSE_REASON = 123
"""A control frame carries at most 125 bytes (section 5.5), two of which are the close code."""

HEADER_MOST = 10
"""Bytes of the header of one of our own frames, at most."""

MAX_BATCH = 1024
"""Frames that are taken at once: as many publications as a read of 64 KiB holds, if each is of 64
bytes or more, so the publications of one read are written to each subscriber in one go. Of the shortest a
read holds 10,000, and others would wait until all of these are dealt with."""

_FIN_TEXT = 0x80 | TEXT
_FIN_BINARY = 0x80 | BINARY
_SHORTEST = 6  # two bytes of header and a mask, no payload

# The least length that needs a header of this size, less the mask.
_LEAST = {2: 0, 4: 126, 10: 2**16}

# How legal frames begin that are no Close.
_NO_CLOSE = frozenset((CONTINUATION, TEXT, BINARY, *(0x80 | o for o in (0, 1, 2, PING, PONG))))

# The whole header of a short frame, looked up: a call to struct.pack costs three times as much.
_SHORT_TEXT = tuple(bytes((_FIN_TEXT, length)) for length in range(126))
_MEDIUM = struct.Struct("!BBH").pack
_SHORT_BINARY = tuple(bytes((_FIN_BINARY, length)) for length in range(126))


def text_frame(payload: bytes) -> bytes:
    """One unmasked, unfragmented text frame around `payload`, which must be UTF-8."""
    length = len(payload)
    if length < 126:
        return _SHORT_TEXT[length] + payload
    if length < 2**16:  # as `encode` has it, less a call: these two are on the hot path
        return _MEDIUM(_FIN_TEXT, 126, length) + payload
    return encode(TEXT, payload)


def binary_frame(payload: bytes) -> bytes:
    """One unmasked, unfragmented binary frame."""
    if len(payload) < 126:
        return _SHORT_BINARY[len(payload)] + payload
    return encode(BINARY, payload)


def text_frames(
    before: bytes, contents: list[bytes], behind: bytes, first: int = 0, end: bytes = b"", /
) -> list[bytes]:
    """A text frame for each of `contents`, with what stands before and behind; and with `end` behind a
    number, which is `first`, 0 or more, in the first frame and grows by one."""
    count = len(contents)
    if count == 1:  # a third of what the loops take for one
        number = b"%d" % first if end else b""
        return [text_frame(b"".join((before, contents[0], behind, number, end)))]
    if not end:
        return [text_frame(before + data + behind) for data in contents]
    digits = len(b"%d" % first)
    longer = 10**digits - first
    if count > longer:  # below, the size of a frame follows from that of its content
        shorter = text_frames(before, contents[:longer], behind, first, end)
        return shorter + text_frames(before, contents[longer:], behind, 10**digits, end)
    around = len(before) + len(behind) + digits + len(end)
    if b"%" in b"".join((before, behind, end)):
        before, behind, end = map(_literal, (before, behind, end))
    frame = b"%%b%b%%b%b%%d%b" % (before, behind, end)
    return [
        frame % (_kept_header(around + len(data)), data, number)
        for number, data in enumerate(contents, first)
    ]


def _literal(text: bytes) -> bytes:
    """A text as it stands in a format."""
    return text.replace(b"%", b"%%")


def encode(opcode: int, payload: bytes) -> bytes:
    """One unmasked, unfragmented frame."""
    return header(opcode, len(payload)) + payload


def fragments(opcode: int, payload: bytes, size: int) -> bytes:
    """One unmasked message in fragments of `size` bytes, the last of which may be shorter (section 5.4)."""
    if len(payload) <= size:
        return encode(opcode, payload)
    parts: list[Buffer] = []
    for start in range(0, len(payload), size):
        part = payload[start : start + size]
        head = bytearray(header(CONTINUATION if start else opcode, len(part)))
        if start + size < len(payload):
            head[0] &= 0x7F
        parts += [head, part]
    return b"".join(parts)


def header(opcode: int, length: int) -> bytes:
    """The header of one unmasked, unfragmented frame with a payload of so many bytes."""
    if length < 126:
        return bytes((0x80 | opcode, length))
    if length < 2**16:
        return _MEDIUM(0x80 | opcode, 126, length)
    return struct.pack("!BBQ", 0x80 | opcode, 127, length)


def text_header(length: int) -> bytes:
    """The same of a text frame; faster for short ones."""
    return _SHORT_TEXT[length] if length < 126 else header(TEXT, length)


_kept_header = lru_cache(maxsize=4096)(text_header)


def binary_header(length: int) -> bytes:
    """The same of a binary frame; faster for short ones."""
    return _SHORT_BINARY[length] if length < 126 else header(BINARY, length)


def payload_of(start: bytes) -> bytes:
    """The payload of one of our own frames, as far as these first bytes of it go."""
    long = {126: 4, 127: 10}
    return start[long.get(start[1], 2) :]


def close_frame(code: int, reason: str = "") -> bytes:
    """A Close frame (section 5.5.1). A reason that is too long is cut between characters."""
    text = reason.encode()[:MAX_CLOSE_REASON].decode(errors="ignore")
    return encode(CLOSE, code.to_bytes(2, "big") + text.encode())


def close_content(payload: bytes) -> tuple[int, str]:
    """Code and reason of a Close frame's payload; 1005 where it has none (section 7.1.5)."""
    if len(payload) < 2:
        return 1005, ""
    return int.from_bytes(payload[:2], "big"), payload[2:].decode(errors="replace")


def is_legal_close(payload: bytes) -> bool:
    """Whether a peer may send this in a Close frame (sections 5.5.1 and 7.4)."""
    if not payload:
        return True
    code = int.from_bytes(payload[:2], "big")
    try:
        payload[2:].decode()
    except UnicodeDecodeError:
        return False
    # 1004 is not defined; 1005, 1006 and 1015 are never sent; 1012-1014 were registered later.
    named = code in (1000, 1001, 1002, 1003) or 1007 <= code <= 1014
    return len(payload) >= 2 and (named or 3000 <= code <= 4999)


def unmask(payload: Buffer, mask: Buffer, /) -> bytes:
    """Apply a 4-byte mask (section 5.3). The same call masks and unmasks."""
    length = len(payload)
    # One XOR over two big integers: linear, and about 1 GB/s.
    key = int.from_bytes((bytes(mask) * (length // 4 + 1))[:length], "little")
    return (int.from_bytes(payload, "little") ^ key).to_bytes(length, "little")


def take_messages(buffer: Buffer, limit: int, most: int = MAX_BATCH) -> tuple[list[Message], int]:
    """Take up to `most` whole simple messages off the front; return them and how many bytes they
    were.

    Simple is: FIN set, RSV clear, text or binary, masked, at most `limit` bytes, the length in
    its shortest form, text valid as UTF-8. The caller makes sure that no fragmented message is open.
    """
    messages: list[Message] = []
    append, number = messages.append, int.from_bytes
    start = 0
    end = len(buffer)
    try:
        for _ in range(most):
            first = buffer[start]
            if first != _FIN_TEXT and first != _FIN_BINARY:
                break
            length = buffer[start + 1] - 128
            body = start + 6
            if length == 126:
                length = (buffer[start + 2] << 8) | buffer[start + 3]
                body = start + 8
                if length < 126:
                    break
            elif length == 127:
                if end - start < 14:
                    break
                length = number(buffer[start + 2 : start + 10], "big")
                body = start + 14
                if length < 2**16:
                    break
            elif length < 0:  # not masked
                break
            stop = body + length
            if stop > end or length > limit:
                break
            # As `unmask` does it: in line, because this is the hottest loop of all.
            key = number((buffer[body - 4 : body] * (length // 4 + 1))[:length], "little")
            payload = (number(buffer[body:stop], "little") ^ key).to_bytes(length, "little")
            if first == _FIN_TEXT and not payload.isascii():
                payload.decode()
            append((first & 0x0F, payload))
            start = stop
            if stop == end:  # as nearly always; an exception would take as long as a message
                break
    except IndexError:  # the rest of a header is yet to come
        pass
    except UnicodeDecodeError:  # the slow lane says so
        pass
    return messages, start


def take_fragments(
    buffer: Buffer, limit: int, most: int = MAX_BATCH
) -> tuple[bytes, int, int, bool]:
    """Take up to `most` whole fragments off the front, up to the last of their message.

    Return their payloads, joined, of `limit` bytes at most; how many there were, how many bytes
    with their headers, and whether the last one ends the message. An illegal header ends them, and
    any that is no CONTINUATION. The caller makes sure that a fragmented message is open.
    """
    payloads = []
    start = count = total = 0
    end = len(buffer)
    fin = False
    while count < most and not fin and end - start >= _SHORTEST:
        first = buffer[start]
        length = buffer[start + 1] - 128
        body = start + 6
        if first & 0x7F != CONTINUATION:
            break
        if not 0 <= length < 126:
            header = read_header(buffer, start)
            if header is None or not (header.is_legal and header.is_shortest):
                break
            length = header.length
            body = start + header.size
        stop = body + length
        total += length
        if stop > end or total > limit:
            break
        if length:  # an empty one costs its sender six bytes, so it must not cost us much
            payloads.append(unmask(buffer[body:stop], buffer[body - 4 : body]))
        fin = first >= 0x80
        count += 1
        start = stop
    return b"".join(payloads), count, start, fin


def pass_over(buffer: Buffer, most: int) -> tuple[int, int]:
    """Find the end of up to `most` frames at the front which are legal, and no Close.

    Return where that is, which may be behind the buffer's own end, and how many frames there were.
    """
    start = count = 0
    end = len(buffer)
    while count < most and end - start >= _SHORTEST and buffer[start] in _NO_CLOSE:
        length = buffer[start + 1] - 128
        if length < 0:  # not masked
            break
        if length < 126:
            start += 6 + length
        elif length == 126:
            start += 8 + (buffer[start + 2] << 8 | buffer[start + 3])
        elif end - start >= 10:
            start += 14 + int.from_bytes(buffer[start + 2 : start + 10], "big")
        else:
            break
        count += 1
    return start, count


def masked_frame(opcode: int, payload: bytes, *, fin: bool = True) -> bytes:
    """One frame as a client sends it, under a mask of zeros, which changes nothing."""
    header = bytearray(encode(opcode, payload))
    del header[len(header) - len(payload) :]
    if not fin:
        header[0] &= 0x7F
    header[1] |= 0x80
    return bytes(header) + bytes(4) + payload


class Header(NamedTuple):
    """A frame header as it stands on the wire; `size` is its own length, mask included."""

    fin: bool
    rsv: int
    opcode: int
    masked: bool
    length: int
    size: int

    @property
    def is_control(self) -> bool:
        return self.opcode >= CLOSE

    @property
    def is_legal(self) -> bool:
        """Whether section 5.2 and 5.5 allow this header from a client, by itself."""
        if self.rsv or not self.masked:
            return False
        if self.opcode in (CLOSE, PING, PONG):
            return self.fin and self.length <= 125
        return self.opcode in (CONTINUATION, TEXT, BINARY)

    @property
    def is_shortest(self) -> bool:
        """Whether the length has the shortest form that it can have, as section 5.2 wants it."""
        return self.length >= _LEAST[self.size - 4 * self.masked]


def read_header(buffer: Buffer, start: int = 0) -> Header | None:
    """Read the header at `start`; None when more bytes are needed to know it."""
    have = len(buffer) - start
    if have < 2:
        return None
    first, second = buffer[start], buffer[start + 1]
    length = second & 0x7F
    size = 2
    if length == 126:
        size, length_bytes = 4, 2
    elif length == 127:
        size, length_bytes = 10, 8
    else:
        length_bytes = 0
    if have < size:
        return None
    if length_bytes:
        length = int.from_bytes(buffer[start + 2 : start + size], "big")
    masked = second >= 0x80
    if masked:
        size += 4
        if have < size:
            return None
    return Header(first >= 0x80, first & 0x70, first & 0x0F, masked, length, size)


BUILD = "pure"
"""`compiled` where the loops over bytes are those in C; see docs/howto/compile.md."""

try:
    import broker.transport.compiled_frames as compiled_frames
except ImportError:  # nobody has asked for it
    pass
else:
    BUILD = "compiled"
    unmask = compiled_frames.unmask
    take_messages = compiled_frames.take_messages
    text_frames = compiled_frames.text_frames
