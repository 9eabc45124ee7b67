"""The two readers of client frames and the writer of ours, against wsproto's as the oracle."""

from itertools import product

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from wsproto.frame_protocol import (
    CloseReason,
    FrameDecoder,
    FrameProtocol,
    Opcode,
    ParseFailed,
)

from broker.testing import client_frame
from broker.transport import frames
from broker.transport.frames import (
    BINARY,
    CLOSE,
    CONTINUATION,
    PING,
    PONG,
    TEXT,
    masked_frame,
    pass_over,
    read_header,
    take_fragments,
    take_messages,
    unmask,
)

LIMIT = 70_000

# Every form of the length field, and both sides of each of its bounds.
LENGTHS = (0, 1, 4, 5, 125, 126, 127, 65_535, 65_536, LIMIT)

OPCODES = st.sampled_from([TEXT, BINARY])
TEXTS = st.text(max_size=300).map(str.encode)
SIMPLE = st.one_of(
    st.tuples(st.just(TEXT), TEXTS),
    st.tuples(st.just(BINARY), st.binary(max_size=300)),
)


def header_of(fin: int, opcode: int, length_field: bytes, *, masked: bool = True) -> bytes:
    """A header byte by byte, legal or not; the mask is all zeros, so payloads stay readable."""
    first = fin << 7 | opcode
    second = length_field[0] | (0x80 if masked else 0)
    return bytes((first, second)) + length_field[1:] + bytes(4 if masked else 0)


# writing


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("opcode", [TEXT, BINARY])
def test_a_frame_is_written_as_wsproto_writes_it(opcode: int, length: int) -> None:
    payload = b"x" * length
    theirs = FrameProtocol(client=False, extensions=[]).send_data(
        payload.decode() if opcode == TEXT else payload
    )
    assert frames.encode(opcode, payload) == theirs
    if opcode == TEXT:
        assert frames.text_frame(payload) == theirs


@pytest.mark.parametrize("count", [0, 1, 2, 3, 15])
@pytest.mark.parametrize("first", [1, 8, 95, 99, 100, 99_990])
def test_frames_are_numbered_and_sized_as_if_each_were_written_by_itself(
    first: int, count: int
) -> None:
    contents = [b"x" * size for size in (0, 95, 96, 97, 98, 99, 100, 101, 65_500, 1, 2, 3, 4, 5, 6)]
    before, behind, end = b"100 %d of %% ", b" %b: ", b"%"
    numbered = enumerate(contents[:count], first)
    assert frames.text_frames(before, contents[:count], behind, first, end) == [
        frames.encode(TEXT, before + data + behind + str(number).encode() + end)
        for number, data in numbered
    ]
    assert frames.text_frames(before, contents[:count], behind) == [
        frames.encode(TEXT, before + data + behind) for data in contents[:count]
    ]


@given(st.integers(1000, 4999), st.text(max_size=200))
@example(1000, "x" * 124)
@example(1000, "é" * 62)
def test_a_close_frame_is_read_by_others_and_its_reason_cut_between_characters(
    code: int, reason: str
) -> None:
    frame = frames.close_frame(code, reason)
    assert len(frame) <= 127
    code_there, reason_there = frame[2:4], frame[4:].decode()
    assert int.from_bytes(code_there, "big") == code
    assert reason.startswith(reason_there)
    if len(reason.encode()) <= 123:
        assert reason_there == reason
    else:
        assert len(frame[4:]) > 123 - 4


def test_a_close_frame_is_what_wsproto_sends() -> None:
    theirs = FrameProtocol(client=False, extensions=[]).close(CloseReason.GOING_AWAY, "bye é")
    assert frames.close_frame(1001, "bye é") == theirs


@given(st.binary(max_size=300), st.binary(min_size=4, max_size=4))
def test_masking_twice_is_nothing_and_once_is_the_rfc_formula(payload: bytes, mask: bytes) -> None:
    masked = frames.unmask(payload, mask)
    assert masked == bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))
    assert frames.unmask(masked, mask) == payload


# the fast lane


@given(st.lists(SIMPLE, max_size=8))
def test_whole_simple_messages_are_taken_as_wsproto_would(
    messages: list[tuple[int, bytes]],
) -> None:
    wire = b"".join(client_frame(opcode, payload) for opcode, payload in messages)
    oracle = FrameProtocol(client=False, extensions=[])
    oracle.receive_bytes(wire)
    theirs = []
    for frame in oracle.received_frames():
        payload = frame.payload
        assert not isinstance(payload, tuple)
        theirs.append((frame.opcode, payload.encode() if isinstance(payload, str) else payload))
    assert frames.take_messages(wire, LIMIT) == (messages, len(wire))
    assert frames.take_messages(bytearray(wire), LIMIT) == (messages, len(wire))
    assert theirs == messages


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("opcode", [TEXT, BINARY])
def test_every_form_of_length_is_taken(opcode: int, length: int) -> None:
    payload = bytes(i % 128 for i in range(length))
    wire = client_frame(opcode, payload)
    assert frames.take_messages(wire, LIMIT) == ([(opcode, payload)], len(wire))


STOPS = {
    "ping": client_frame(PING, b"x"),
    "pong": client_frame(PONG),
    "close": client_frame(CLOSE, b"\x03\xe8"),
    "reserved opcode 3": header_of(1, 0x3, b"\x00"),
    "reserved opcode 11": header_of(1, 0xB, b"\x00"),
    "first fragment of text": client_frame(TEXT, b"x", fin=False),
    "first fragment of binary": client_frame(BINARY, b"x", fin=False),
    "last fragment": client_frame(CONTINUATION, b"x"),
    "RSV1": header_of(1, 0x40 | TEXT, b"\x00"),
    "RSV2": header_of(1, 0x20 | TEXT, b"\x00"),
    "RSV3": header_of(1, 0x10 | BINARY, b"\x00"),
    "unmasked": header_of(1, TEXT, b"\x04", masked=False) + b"four",
    "unmasked, 16-bit length": header_of(1, TEXT, b"\x7e\x00\x7e", masked=False) + bytes(126),
    "over the limit": client_frame(BINARY, bytes(LIMIT + 1)),
    "header that says 2^63 - 1": header_of(1, TEXT, b"\x7f" + (2**63 - 1).to_bytes(8, "big")),
    "length 5 in 16 bits": header_of(1, TEXT, b"\x7e\x00\x05") + b"fives",
    "length 125 in 16 bits": header_of(1, BINARY, b"\x7e\x00\x7d") + bytes(125),
    "length 5 in 64 bits": header_of(1, TEXT, b"\x7f" + (5).to_bytes(8, "big")) + b"fives",
    "length 65535 in 64 bits": header_of(1, BINARY, b"\x7f" + (65_535).to_bytes(8, "big"))
    + bytes(65_535),
    "text that is not UTF-8": client_frame(TEXT, b"\xff"),
    "text that ends within a character": client_frame(TEXT, "é".encode()[:1]),
    "text with a surrogate": client_frame(TEXT, b"\xed\xa0\x80"),
    "text with an overlong slash": client_frame(TEXT, b"\xc0\xaf"),
}


@pytest.mark.parametrize("stop", STOPS.values(), ids=STOPS.keys())
def test_the_fast_lane_leaves_what_is_not_simple_byte_for_byte(stop: bytes) -> None:
    before = client_frame(TEXT, b"before")
    behind = client_frame(TEXT, b"behind")
    assert frames.take_messages(stop + behind, LIMIT) == ([], 0)
    assert frames.take_messages(before + stop + behind, LIMIT) == ([(TEXT, b"before")], len(before))


def test_bytes_that_are_not_utf_8_are_fine_in_a_binary_message() -> None:
    wire = client_frame(BINARY, b"\xff\xfe")
    assert frames.take_messages(wire, LIMIT) == ([(BINARY, b"\xff\xfe")], len(wire))


def test_the_limit_itself_is_within_the_limit() -> None:
    assert frames.take_messages(client_frame(TEXT, b"12345"), 5)[0] == [(TEXT, b"12345")]
    assert frames.take_messages(client_frame(TEXT, b"123456"), 5)[0] == []


def test_the_limit_counts_bytes_not_characters() -> None:
    assert frames.take_messages(client_frame(TEXT, "ééé".encode()), 5)[0] == []


@pytest.mark.parametrize("length", [0, 3, 125, 126, 65_536])
def test_a_frame_that_is_not_whole_is_left_at_whichever_byte_it_ends(length: int) -> None:
    before = client_frame(BINARY, b"before")
    frame = client_frame(BINARY, bytes(length))
    for have in [*range(min(len(frame), 20)), len(frame) - 1]:
        wire = before + frame[:have]
        assert frames.take_messages(wire, LIMIT) == ([(BINARY, b"before")], len(before))
        assert frames.take_messages(frame[:have], LIMIT) == ([], 0)


@given(st.lists(SIMPLE, max_size=5), st.data())
def test_however_the_bytes_come_the_messages_are_the_same(
    messages: list[tuple[int, bytes]], data: st.DataObject
) -> None:
    wire = b"".join(client_frame(opcode, payload) for opcode, payload in messages)
    one_by_one = data.draw(st.booleans())
    buffer = bytearray()
    taken: list[tuple[int, bytes]] = []
    start = 0
    while start < len(wire):
        size = 1 if one_by_one else data.draw(st.integers(1, 400))
        buffer += wire[start : start + size]
        start += size
        batch, used = frames.take_messages(buffer, LIMIT)
        taken += batch
        del buffer[:used]
    assert taken == messages
    assert not buffer


@given(st.binary(max_size=40))
def test_bytes_of_any_kind_are_taken_or_left_and_nothing_raises(wire: bytes) -> None:
    messages, used = frames.take_messages(wire, LIMIT)
    assert 0 <= used <= len(wire)
    assert sum(len(payload) + 6 for _, payload in messages) <= used
    frames.read_header(wire)


# headers


@given(
    st.booleans(),
    st.sampled_from([CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG, 0x3, 0xF]),
    st.integers(0, 7),
    st.booleans(),
    st.sampled_from([*LENGTHS, 2**32, 2**63 - 1]),
    st.integers(0, 3),
)
def test_a_header_is_read_back_once_it_is_whole(
    fin: bool, opcode: int, rsv: int, masked: bool, length: int, offset: int
) -> None:
    if length < 126:
        field = bytes((length,))
    elif length < 2**16:
        field = b"\x7e" + length.to_bytes(2, "big")
    else:
        field = b"\x7f" + length.to_bytes(8, "big")
    wire = header_of(fin, rsv << 4 | opcode, field, masked=masked)
    for have in range(len(wire)):
        assert frames.read_header(bytes(offset) + wire[:have], offset) is None
    header = frames.read_header(bytes(offset) + wire + b"more", offset)
    assert header == (fin, rsv << 4, opcode, masked, length, len(wire))


def test_a_header_is_legal_just_when_wsproto_lets_it_pass() -> None:
    kinds = product(range(16), (True, False), (0, 0x40, 0x20, 0x10), (0, 125, 126), (True, False))
    for opcode, fin, rsv, length, masked in kinds:
        field = bytes((length,)) if length < 126 else b"\x7e" + length.to_bytes(2, "big")
        wire = header_of(fin, rsv | opcode, field, masked=masked)
        header = frames.read_header(wire)
        assert header is not None
        assert header.is_control == (opcode >= Opcode.CLOSE)
        decoder = FrameDecoder(client=False)
        decoder.receive_bytes(wire + bytes(length))
        try:
            decoder.process_buffer()
        except ParseFailed:
            assert not header.is_legal, header
        else:
            assert header.is_legal, header


# fragments, and what nobody wants


def fragment(payload: bytes, *, fin: bool = False) -> bytes:
    return masked_frame(CONTINUATION, payload, fin=fin)


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65_535, 65_536])
def test_a_masked_frame_is_one_that_a_client_may_send(size: int) -> None:
    frame = masked_frame(BINARY, bytes(size))
    assert take_messages(frame, size) == ([(BINARY, bytes(size))], len(frame))
    header = read_header(masked_frame(TEXT, bytes(size), fin=False))
    assert header is not None
    assert (header.fin, header.opcode, header.length) == (False, TEXT, size)
    assert header.is_legal
    assert header.is_shortest


def test_at_most_so_many_messages_are_taken() -> None:
    wire = masked_frame(TEXT, b"") * 2000
    assert take_messages(wire, 10)[1] == 1024 * 6
    assert take_messages(wire, 10, most=3) == ([(TEXT, b"")] * 3, 18)


@pytest.mark.parametrize("size", [1, 125, 126, 65_535, 65_536])
def test_fragments_are_joined_up_to_the_last_of_their_message(size: int) -> None:
    mask = b"\x01\x02\x03\x04"
    one = bytearray(fragment(bytes(size)))
    one[-size - 4 : -size] = mask
    wire = bytes(one) + fragment(b"") + fragment(b"end", fin=True)
    payload, count, used, fin = take_fragments(wire + fragment(b"next"), 10**6)
    assert payload == unmask(bytes(size), mask) + b"end"
    assert (count, used, fin) == (3, len(wire), True)


@pytest.mark.parametrize(
    "stop",
    [
        masked_frame(PING, b""),
        masked_frame(TEXT, b""),
        b"",
        b"\x00",
        fragment(b"abc")[:-1],
        fragment(bytes(300))[:5],
        b"\x40\x80" + bytes(4),
        b"\x00\x00",
        b"\x00\xfe\x00\x01" + bytes(5),
        b"\x00\xff" + bytes(8 + 4),
        b"\x00\x7e\x00\x7e" + bytes(126),
    ],
    ids=[
        *("control", "message", "end", "header", "payload", "long header", "RSV", "unmasked"),
        *("126, not shortest", "127, not shortest", "unmasked 126"),
    ],
)
def test_fragments_end_before_anything_else(stop: bytes) -> None:
    wire = fragment(b"a") * 2
    assert take_fragments(wire + stop, 100) == (b"aa", 2, len(wire), False)


def test_fragments_end_at_the_limits() -> None:
    wire = fragment(b"abc") * 5
    assert take_fragments(wire, 8)[:2] == (b"abcabc", 2)
    assert take_fragments(wire, 9)[:2] == (b"abcabcabc", 3)
    assert take_fragments(wire, 99, most=4)[:2] == (b"abc" * 4, 4)
    assert take_fragments(wire, 99, most=0) == (b"", 0, 0, False)


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65_535, 65_536])
def test_frames_that_nobody_wants_are_passed_over(size: int) -> None:
    kinds = [CONTINUATION, TEXT, BINARY]
    wire = b"".join(masked_frame(kind, bytes(size)) for kind in kinds)
    wire += b"".join(masked_frame(kind, b"x", fin=False) for kind in kinds)
    wire += masked_frame(PING, b"") + masked_frame(PONG, b"x")
    assert pass_over(wire, 100) == (len(wire), 8)
    assert pass_over(wire, 3) == (len(wire) - 6 - 7 - 7 * 3, 3)
    # The end of a frame that has not come whole is known all the same.
    assert pass_over(wire[:-1], 100) == (len(wire), 8)


@pytest.mark.parametrize(
    "stop",
    [
        masked_frame(CLOSE, b""),
        b"\x81\x00" + bytes(8),
        b"\xc1\x80" + bytes(8),
        b"\x81",
        b"\x83\x80",
    ],
    ids=["close", "unmasked", "RSV", "header", "opcode"],
)
def test_nothing_but_frames_is_passed_over(stop: bytes) -> None:
    wire = masked_frame(TEXT, b"abc")
    assert pass_over(wire + stop, 100) == (len(wire), 1)
    assert pass_over(masked_frame(TEXT, bytes(70_000))[:9], 100) == (0, 0)


@pytest.mark.parametrize("least", [126, 2**16])
def test_a_length_in_more_bytes_than_it_needs_is_not_the_shortest(least: int) -> None:
    form = b"\xfe" if least == 126 else b"\xff"
    width = 2 if least == 126 else 8
    for length, shortest in ((least - 1, False), (least, True)):
        header = read_header(b"\x82" + form + length.to_bytes(width, "big") + bytes(4))
        assert header is not None
        assert header.is_shortest is shortest
