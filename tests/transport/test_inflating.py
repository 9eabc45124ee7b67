"""Messages that come compressed, as the inflater takes them."""

import itertools
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.core.work import INFLATE_STEP, INFLATED, OVERHEAD_KILOBYTE
from broker.transport.extensions import Deflate, window_bytes
from broker.transport.frames import BINARY, TEXT
from broker.transport.inflating import (
    PIECE_BYTES,
    STEP_BYTES,
    BadDeflate,
    Inflated,
    Inflater,
    TooLarge,
    preview,
)
from tests.deflated import TEXT as SOME
from tests.deflated import deflated
from tests.hostile.bombs import tables

ALONE = Deflate()
KEEPS = Deflate(client_keeps=True)


def inflate(
    inflater: Inflater, *payloads: bytes, opcode: int = BINARY, limit: int = 2**20
) -> bytes:
    """One message in so many frames."""
    inflater.begin(opcode)
    for number, payload in enumerate(payloads, 1):
        for _ in inflater.inflate(payload, limit, is_last=number == len(payloads)):
            pass
    taken, message = inflater.take()
    assert taken == opcode
    return message


def make(deflate: Deflate = ALONE) -> Inflater:
    return Inflater(deflate, Inflated())


@given(st.binary(max_size=10_000), st.lists(st.integers(0, 10_000), max_size=5), st.booleans())
def test_what_was_deflated_comes_out_however_it_was_cut(
    data: bytes, cuts: list[int], final: bool
) -> None:
    payload = deflated(data, final=final)
    ends = [0, *sorted(min(cut, len(payload)) for cut in cuts), len(payload)]
    pieces = [payload[a:b] for a, b in itertools.pairwise(ends)]
    for deflate in (ALONE, KEEPS):
        inflater = make(deflate)
        assert inflate(inflater, *pieces) == data
        assert not inflater.is_open
        assert inflate(inflater, deflated(b"and once more")) == b"and once more"


def test_a_message_may_refer_to_those_before_it_where_that_was_agreed_on() -> None:
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15)
    first, second = [
        (deflater.compress(SOME) + deflater.flush(zlib.Z_SYNC_FLUSH))[:-4] for _ in range(2)
    ]
    assert len(second) < 20
    inflater = make(KEEPS)
    assert [inflate(inflater, first), inflate(inflater, second)] == [SOME, SOME]
    inflater = make(ALONE)
    assert inflate(inflater, first) == SOME
    with pytest.raises(BadDeflate, match="bad deflate data"):
        inflate(inflater, second)


@pytest.mark.parametrize("deflate", [ALONE, KEEPS])
def test_an_empty_message_is_empty_however_it_is_written(deflate: Deflate) -> None:
    inflater = make(deflate)
    for payloads in ([b""], [b"\x00"], [b"", b""], [b"", b"\x00", b""], [b"\x03\x00\x00"]):
        assert inflate(inflater, *payloads) == b""
    assert inflate(inflater, deflated(SOME)) == SOME


@pytest.mark.parametrize("deflate", [ALONE, KEEPS])
def test_a_last_block_ends_a_stream_and_not_the_message(deflate: Deflate) -> None:
    # RFC 7692 section 7.2.3.4; without the byte behind it as well, as all of it is there
    hello = b"\xf3\x48\xcd\xc9\xc9\x07\x00"
    inflater = make(deflate)
    assert inflate(inflater, hello + b"\x00") == b"Hello"
    assert inflate(inflater, hello) == b"Hello"
    assert inflate(inflater, hello * 3 + b"\x00") == b"HelloHelloHello"
    assert inflate(inflater, hello, hello + b"\x00") == b"HelloHello"
    assert inflate(inflater, hello + deflated(b"x")) == b"Hellox"


@pytest.mark.parametrize(
    "payload",
    [
        b"\xff",
        b"\x07",
        b"junk that is none",
        b"\x01\x05\x00\xfa\xffhel",  # a stored block of five bytes with three
        deflated(SOME)[:-3],
        deflated(SOME) + b"\xff",
        b"\xf3\x48\xcd\xc9\xc9\x07\x00\xff",
        b"\x00\x00\x00",
    ],
)
@pytest.mark.parametrize("deflate", [ALONE, KEEPS])
def test_what_is_no_deflate_to_its_end_is_refused(payload: bytes, deflate: Deflate) -> None:
    with pytest.raises(BadDeflate):
        inflate(make(deflate), payload)


def test_text_is_utf_8_when_it_is_inflated() -> None:
    assert inflate(make(), deflated("naïve".encode()), opcode=TEXT) == "naïve".encode()
    with pytest.raises(BadDeflate, match="UTF-8"):
        inflate(make(), deflated(b"\xff"), opcode=TEXT)
    assert inflate(make(), deflated(b"\xff"), opcode=BINARY) == b"\xff"


def test_a_message_has_just_the_limit_and_not_a_byte_more() -> None:
    data = bytes(100_000)
    assert inflate(make(), deflated(data), limit=100_000) == data
    inflater = make()
    with pytest.raises(TooLarge):
        inflate(inflater, deflated(data), limit=99_999)
    assert inflater.size == 100_000  # of a bomb no more than this is ever there
    inflater = make()
    with pytest.raises(TooLarge):
        inflate(inflater, deflated(bytes(10**8)), limit=99_999)
    assert inflater.size == 100_000


@pytest.mark.parametrize("bits", range(9, 16))
def test_a_window_that_was_agreed_on_is_wide_enough(bits: int) -> None:
    inflater = make(Deflate(client_bits=bits, client_keeps=True))
    data = SOME + bytes(2**bits) + SOME
    for _ in range(3):
        assert inflate(inflater, deflated(data, bits)) == data


def test_each_step_is_small_and_its_price_is_known_before_it() -> None:
    inflater = make()
    inflater.begin(BINARY)
    size, prices = 0, []
    for price in inflater.inflate(deflated(bytes(10**6)), 2**20, is_last=True):
        prices.append(price)
        assert inflater.size - size <= PIECE_BYTES
        size = inflater.size
    assert len(prices) > 10**6 // PIECE_BYTES
    assert max(prices) < 250  # what a session may do at once
    assert sum(prices) > 2000


def test_what_is_all_tables_and_no_data_is_dear() -> None:
    """A block without data, in 90 bits: its tables are the work."""
    blocks = tables(1000)
    inflater = make()
    inflater.begin(BINARY)
    prices = list(inflater.inflate(blocks, 2**20, is_last=True))
    assert inflater.take() == (BINARY, b"")
    assert len(prices) > len(blocks) // STEP_BYTES
    assert sum(prices) > len(blocks) / 1024 * OVERHEAD_KILOBYTE
    assert max(prices) < 1000


def test_a_stream_that_ends_and_begins_anew_costs_each_time() -> None:
    inflater = make()
    inflater.begin(BINARY)
    prices = list(inflater.inflate(b"\x03\x00" * 10_000, 2**20, is_last=True))
    assert inflater.take() == (BINARY, b"")
    assert sum(prices) > 10_000 * INFLATE_STEP


def test_a_small_message_costs_little() -> None:
    inflater = make()
    inflater.begin(TEXT)
    prices = list(inflater.inflate(deflated(b"hi"), 1000, is_last=True))
    assert INFLATED < sum(prices) < 2 * INFLATED
    assert len(prices) == 2


def test_what_is_held_is_known() -> None:
    inflated = Inflated()
    for deflate, window in ((ALONE, window_bytes(15)), (KEEPS, 0)):
        inflater = Inflater(deflate, inflated)
        inflater.begin(BINARY)
        list(inflater.inflate(deflated(bytes(5000)) + b"", 10**6, is_last=False))
        assert inflater.open_bytes == window + 5000
        inflater.drop()
        assert inflater.size == 0
        inflater.let_go()
    assert inflated.messages == 0
    assert inflated.bytes_after == 10_000
    assert 0 < inflated.bytes_before < 100


def test_the_beginning_of_a_message_of_ours_can_be_shown() -> None:
    payload = deflated(SOME)
    assert preview(payload, 50) == SOME[:50]
    assert SOME.startswith(preview(payload[:20], 50))
    assert preview(b"\xff\xff", 50) == b""
