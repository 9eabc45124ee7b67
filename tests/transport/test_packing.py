"""Frames that go out compressed: which, when, and that each peer can read them."""

import random

import pytest
import trio

from broker import Config
from broker.config.reload import Settings
from broker.core.work import DEFLATE_BURST, DEFLATED, DEFLATED_KILOBYTE, Meter
from broker.transport import frames
from broker.transport.packing import Packer, Packing
from tests.deflated import TEXT, inflated


@pytest.fixture
async def packing(autojump_clock: trio.testing.MockClock) -> Packing:
    return Packing(Settings(Config(compression=True, compression_min_bytes=100)), Meter())


def rsv(frame: bytes) -> int:
    header = frames.read_header(frame)
    assert header is not None
    assert len(frame) == header.size + header.length
    return header.rsv


@pytest.mark.parametrize("bits", range(9, 16))
@pytest.mark.parametrize("size", [100, 500, 5000, 70_000, 200_000])
async def test_a_message_can_be_read_with_the_window_that_was_agreed_on(
    packing: Packing, bits: int, size: int
) -> None:
    data = random.Random(size).choices(TEXT, k=size)
    frame = Packer(packing, bits).pack(frames.encode(frames.TEXT, bytes(data)))
    assert rsv(frame) == frames.RSV1
    assert frame[0] == 0xC1
    assert inflated(frames.payload_of(frame), bits) == bytes(data)
    assert len(frame) < size


async def test_small_messages_and_those_that_would_get_no_smaller_go_as_they_are(
    packing: Packing,
) -> None:
    pack = Packer(packing, 15).pack
    small = frames.text_frame(TEXT[:99])
    assert pack(small) is small
    assert packing.meter.done == 0
    noise = frames.binary_frame(random.Random(1).randbytes(1000))
    assert pack(noise) is noise
    assert packing.meter.done > 0
    assert rsv(pack(frames.text_frame(TEXT[:100])))
    assert packing.messages == 2
    assert packing.bytes_before == 1100
    assert 1000 < packing.bytes_after < 1100


async def test_what_is_no_whole_message_goes_as_it_is(packing: Packing) -> None:
    pack = Packer(packing, 15).pack
    others = [
        frames.encode(frames.PING, bytes(120)),
        frames.close_frame(1000, "x" * 123),
        frames.fragments(frames.TEXT, bytes(1000), 300),
        b"HTTP/1.1 101 Switching Protocols\r\n" + b"X: y\r\n" * 100,
        pack(frames.text_frame(TEXT)),
    ]
    for other in others:
        assert pack(other) is other


async def test_nothing_is_compressed_any_more_when_that_was_turned_off() -> None:
    settings = Settings(Config(compression=True))
    pack = Packer(Packing(settings, Meter()), 15).pack
    frame = frames.text_frame(TEXT)
    assert pack(frame) != frame
    settings.replace(Config(compression=False))
    assert pack(frame) is frame


async def test_compressing_has_a_part_of_the_time_and_no_more(
    packing: Packing, autojump_clock: trio.testing.MockClock
) -> None:
    pack = Packer(packing, 15).pack
    frame = frames.text_frame(TEXT)
    price = DEFLATED + len(TEXT) / 1024 * DEFLATED_KILOBYTE
    assert [rsv(pack(frame)) > 0 for _ in range(1000)].count(True) == DEFLATE_BURST // price
    assert packing.meter.done <= DEFLATE_BURST
    await trio.sleep(0.001)  # of which a half is for this
    assert [rsv(pack(frame)) > 0 for _ in range(1000)].count(True) in (
        500 // price,
        500 // price + 1,
    )
    await trio.sleep(60)
    huge = frames.encode(frames.TEXT, bytes(400_000))
    assert pack(huge) is huge  # nobody waits for that
    assert rsv(pack(frame))


@pytest.mark.parametrize("tail", [b"", b',"offset":1}}}'])
@pytest.mark.parametrize("opcode", [frames.TEXT, frames.BINARY])
async def test_what_many_share_is_compressed_once_for_all_of_them(
    packing: Packing, opcode: int, tail: bytes
) -> None:
    packer = Packer(packing, 15)
    data = TEXT * 10
    shared = set()
    for name in range(100):
        start = b'{"push":{"channel":"%d"' % name
        header = frames.header(opcode, len(start) + len(data) + len(tail))
        pieces = packer.pack_pieces((header + start, data, tail))
        shared.add(id(pieces[1]))
        assert rsv(b"".join(pieces))
        assert inflated(frames.payload_of(b"".join(pieces))) == start + data + tail
    assert len(shared) == 1
    assert packing.meter.done == DEFLATED + len(data) / 1024 * DEFLATED_KILOBYTE


async def test_pieces_go_as_they_are_where_that_is_better(packing: Packing) -> None:
    packer = Packer(packing, 15)

    def pieces(start: bytes, data: bytes, tail: bytes = b"") -> tuple[bytes, bytes, bytes]:
        return frames.header(frames.TEXT, len(start) + len(data)) + start, data, tail

    noise = random.Random(1).randbytes(1000)
    for each in (pieces(b"", noise), pieces(b"", TEXT[:99]), pieces(bytes(70_000), TEXT)):
        assert packer.pack_pieces(each) == each
    assert packer.pack_pieces(pieces(b"", TEXT)) != pieces(b"", TEXT)
