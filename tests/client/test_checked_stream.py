"""The stream under trio-websocket, at the level of bytes; what the client makes of it: see
`test_hostile_server.py`."""

import itertools
import random

import pytest
import trio
from trio.testing import MockClock, memory_stream_pair

from broker.client.checked_stream import (
    CONTROL_FRAMES_BURST,
    HEAD_BYTES,
    MAX_FRAGMENTS,
    MAX_MESSAGE_BYTES,
    CheckedStream,
    FrameWatch,
    Handshake,
)
from broker.client.loss import Lost, TooLarge
from broker.client.testing import acceptance, server_frame
from broker.errors import CloseCode

KEY = b"dGhlIHNhbXBsZSBub25jZQ=="
REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\nSec-WebSocket-Key: " + KEY + b"\r\n\r\n"


def asked() -> Handshake:
    handshake = Handshake()
    handshake.send(REQUEST)
    return handshake


def test_bytes_behind_the_head_are_given_back() -> None:
    assert asked().receive(acceptance(KEY) + b"\x81\x00") == b"\x81\x00"


def test_a_head_is_read_however_it_is_cut() -> None:
    head = acceptance(KEY)
    for at in range(len(head)):
        handshake = asked()
        assert handshake.receive(head[:at]) is None
        assert handshake.receive(head[at:]) == b""


@pytest.mark.parametrize(
    "old, new",
    [
        (b"Connection: Upgrade", b"connection: keep-alive , UPGRADE"),
        (b"Upgrade: websocket", b"uPGRADE:\tWebSocket  "),
        (b"101 Switching Protocols", b"101"),
        (b"101 Switching Protocols", b"101 "),
        (b"101 Switching Protocols", b"101 \xe4\xb8\xad"),
        (b"Upgrade: websocket", b"Upgrade: websocket\r\nServer: \xe4\xb8\xad\r\nX: "),
    ],
)
def test_a_head_that_h11_and_wsproto_take_passes(old: bytes, new: bytes) -> None:
    assert asked().receive(acceptance(KEY).replace(old, new)) == b""


@pytest.mark.parametrize(
    "old, new, message",
    [
        (b"HTTP/1.1", b"HTTP/1.0", "it is HTTP/1.0"),
        (b"Connection: Upgrade", b"Connection: close", "Connection: Upgrade is missing"),
        (b"Connection: Upgrade", b"Connection: upgraded", "Connection: Upgrade is missing"),
        (b"Connection: Upgrade", b"Connection: Upgrade, \xff", "Connection is not ASCII"),
        (b"Upgrade: websocket", b"Upgrade: h2c", "Upgrade: websocket is missing"),
        (
            b"Upgrade: websocket",
            b"Upgrade: websocket\r\nUpgrade: websocket",
            "Upgrade: websocket is missing",
        ),
        (b"Accept: ", b"Accept: x", "does not fit our key"),
        (b"Sec-WebSocket-Accept", b"X", "does not fit our key"),
        (b"Upgrade: ", b"Sec-WebSocket-Protocol: x\r\nUpgrade: ", "what was not asked for"),
        (b"Upgrade: ", b"Sec-WebSocket-Extensions: x\r\nUpgrade: ", "what was not asked for"),
        (b"Upgrade: ", b"Content-Length: x\r\nUpgrade: ", "announces a body"),
        (b"Upgrade: ", b"Transfer-Encoding: x\r\nUpgrade: ", "announces a body"),
        (b"Upgrade: ", b"Up grade: ", "a header line is wrong"),
        (b"Upgrade: ", b"X: \0\r\nUpgrade: ", "a header line is wrong"),
        (b"Upgrade: ", b"\r\nUpgrade: ", "Upgrade is missing"),
        (b"101 ", b"101 \x01", "not HTTP"),
    ],
)
def test_a_handshake_that_is_wrong_is_refused_with_the_reason(
    old: bytes, new: bytes, message: str
) -> None:
    answer = acceptance(KEY).replace(old, new, 1)
    assert answer != acceptance(KEY)
    with pytest.raises(Lost, match=message):
        asked().receive(answer)


def test_a_head_has_a_bound_and_may_reach_it() -> None:
    head = acceptance(KEY)
    filler = b"X: " + b"y" * (HEAD_BYTES - len(head) - 1) + b"\r\n\r\n"
    assert asked().receive(head[:-2] + filler) == b""
    with pytest.raises(Lost, match="longer than 16,384 bytes"):
        asked().receive(head[:-2] + b"y" + filler)


SIZES = [0, 1, 125, 126, 127, 65535, 65536, 70_000]


def test_frames_are_followed_however_they_are_cut() -> None:
    chance = random.Random(1)
    frames = b"".join(
        server_frame(b"x" * size, first) for size, first in itertools.product(SIZES, (0x81, 0x82))
    )
    frames += b"\x01\x01x\x89\x01x\x00\x01x\x80\x00"
    for _ in range(20):
        watch = FrameWatch()
        at = 0
        while at < len(frames):
            step = chance.choice([1, 2, 3, 10, 1000, 10_000])
            watch.receive(frames[at : at + step], 0)
            at += step
        with pytest.raises(Lost, match="a masked frame"):
            watch.receive(b"\x81\x80", 0)  # so the watch knew where it was


def test_bytes_like_a_header_inside_a_payload_are_no_header() -> None:
    FrameWatch().receive(server_frame(b"\xc1\xff" * 60_000), 0)


def test_the_largest_message_passes_whole_and_in_fragments() -> None:
    watch = FrameWatch()
    for _ in range(2):
        watch.receive(server_frame(b" " * MAX_MESSAGE_BYTES), 0)
    size = MAX_MESSAGE_BYTES // MAX_FRAGMENTS
    for number in range(MAX_FRAGMENTS):
        last = number == MAX_FRAGMENTS - 1
        watch.receive(server_frame(b" " * size, (0x80 if last else 0) | (0 if number else 1)), 0)
    watch.receive(b"\x01\x01x", 0)
    watch.receive(b"\x00\x7f" + (MAX_MESSAGE_BYTES - 1).to_bytes(8, "big"), 0)
    with pytest.raises(TooLarge) as caught:
        FrameWatch().receive(b"\x81\x7f" + (MAX_MESSAGE_BYTES + 1).to_bytes(8, "big"), 0)
    assert caught.value.code == CloseCode.TOO_BIG


def test_twenty_control_frames_a_second_are_no_flood_and_a_burst_is_none() -> None:
    watch = FrameWatch()
    for tick in range(1000):
        watch.receive(b"\x89\x00", tick / 20)
    watch = FrameWatch()
    for second in (0, 10, 20):
        watch.receive(b"\x89\x00" * CONTROL_FRAMES_BURST, second)
    with pytest.raises(Lost, match="more than 20 control frames a second"):
        watch.receive(b"\x89\x00", 20)


async def test_the_stream_passes_on_what_it_takes_and_keeps_what_it_found_wrong(
    autojump_clock: MockClock,
) -> None:
    ours, theirs = memory_stream_pair()
    checked = CheckedStream(ours)
    await checked.send_all(REQUEST)
    assert await theirs.receive_some(1000) == REQUEST
    await theirs.send_all(acceptance(KEY) + b"\x81\x01x")
    assert await checked.receive_some() == acceptance(KEY) + b"\x81\x01x"
    await theirs.send_all(b"\x83")
    assert await checked.receive_some() == b"\x83"
    await theirs.send_all(b"\x00")
    with pytest.raises(Lost, match="unknown kind 3") as caught:
        await checked.receive_some()
    assert checked.lost is caught.value
    await checked.aclose()
    with pytest.raises(trio.ClosedResourceError):
        await checked.receive_some()


async def test_an_end_is_an_error_only_until_the_handshake_is_answered(
    autojump_clock: MockClock,
) -> None:
    ours, theirs = memory_stream_pair()
    checked = CheckedStream(ours)
    await checked.send_all(REQUEST)
    await theirs.send_all(acceptance(KEY))
    await checked.receive_some()
    await theirs.aclose()
    assert await checked.receive_some() == b""
    with pytest.raises(trio.BrokenResourceError):
        await checked.send_all(b"x")
    ours, theirs = memory_stream_pair()
    await theirs.aclose()
    for use in (CheckedStream(ours).receive_some(), CheckedStream(ours).send_all(REQUEST)):
        with pytest.raises(Lost, match="closed before the WebSocket handshake was answered"):
            await use
