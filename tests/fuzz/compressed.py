"""Targets of compression: how it is offered, and messages that come compressed."""

import zlib
from typing import Final, cast

from wsproto.extensions import PerMessageDeflate
from wsproto.frame_protocol import FrameProtocol, ParseFailed

from broker.errors import HeadError
from broker.transport.extensions import Deflate, choose_deflate
from broker.transport.frames import BINARY, masked_frame
from broker.transport.inflating import (
    PIECE_BYTES,
    BadDeflate,
    Inflated,
    Inflater,
    TooLarge,
)
from tests.deflated import deflated
from tests.fuzz.target import target

LIMIT: Final = 2**16
RSV1: Final = 0x40


@target(
    "extensions",
    b"permessage-deflate; client_max_window_bits", b"x-webkit-deflate-frame, permessage-deflate",
    b'permessage-deflate; server_max_window_bits="1\\0"; client_no_context_takeover, permessage-deflate',
    words=(b",", b";", b"=", b'"', b"\\", b"permessage-deflate", b"; client_max_window_bits=8", b" \t", b"=15", b"\xff"),
)  # fmt: skip
def extensions(data: bytes) -> None:
    """What is answered is one that the other side may take, by wsproto's reading of it."""
    text = data.decode("latin-1")
    for may_keep in (False, True):
        try:
            chosen = choose_deflate(text, may_keep)
        except HeadError as error:
            assert error.status == 400
            continue
        if chosen is None:
            continue
        assert 9 <= chosen.server_bits <= 15
        assert 8 <= chosen.client_bits <= 15
        assert may_keep or not chosen.client_keeps
        if chosen.client_bits > 8:  # which RFC 7692 section 7.1.2.2 has, and wsproto does not take
            client = PerMessageDeflate()
            client.offer()
            client.finalize(chosen.answer)
            assert client.enabled()
            assert client.server_no_context_takeover
        assert choose_deflate(chosen.answer) is not None, "what is answered could be offered"


def _inflated(data: bytes, size: int, *, keeps: bool) -> "tuple[str, bytes]":
    """What becomes of a message in frames of so many bytes, and how it ends."""
    inflater = Inflater(Deflate(client_keeps=keeps), Inflated())
    inflater.begin(BINARY)
    pieces = [data[start : start + size] for start in range(0, len(data), size)] or [b""]
    try:
        for number, piece in enumerate(pieces):
            for work in inflater.inflate(piece, LIMIT, is_last=number == len(pieces) - 1):
                assert work > 0
                assert inflater.size <= LIMIT + PIECE_BYTES
        _, payload = inflater.take()
    except BadDeflate:
        return "bad", b""
    except TooLarge:
        return "too large", b""
    finally:
        inflater.let_go()
    assert len(payload) <= LIMIT
    return "whole", payload


def _by_wsproto(data: bytes) -> bytes | None:
    """The same message as another implementation reads it; None for one that it refuses."""
    extension = PerMessageDeflate()
    extension.accept("permessage-deflate; client_no_context_takeover")
    protocol = FrameProtocol(client=False, extensions=[extension])
    frame = bytearray(masked_frame(BINARY, data))
    frame[0] |= RSV1
    protocol.receive_bytes(bytes(frame))
    try:
        return b"".join(cast(bytes, each.payload) for each in protocol.received_frames())
    except (ParseFailed, zlib.error):
        return None


SEEDS: Final = (
    deflated(b'{"id":1,"connect":{}}'),
    deflated(b"a" * 5000),
    deflated(b"stored", level=0),
    deflated(bytes(2**18)),
    b"\x00",
    b"\xf2\x48\xcd\xc9\xc9\x07\x00",  # "Hello" (RFC 7692 section 7.2.3.1)
    b"\xf3\x48\xcd\xc9\xc9\x07\x00\x00",  # with a block that is the last (section 7.2.3.4)
)


@target(
    "inflating", *SEEDS, words=(b"\x00\x00\xff\xff", b"\x03\x00", b"\x01\x00\x00\xff\xff", b"\xff", *SEEDS[:3]), share=15
)  # fmt: skip
def inflating(data: bytes) -> None:
    """The same whether in one frame or many, bounded, and what wsproto makes of it."""
    for keeps in (False, True):
        whole = _inflated(data, 2**20, keeps=keeps)
        assert _inflated(data, max(3, len(data) // 50), keeps=keeps) == whole
    how, payload = _inflated(data, 2**20, keeps=False)
    theirs = _by_wsproto(data)
    if how == "whole" and theirs is not None:
        # What stands behind a last block, wsproto does not read (section 7.2.3.4).
        assert payload.startswith(theirs)
    packed = deflated(data[:LIMIT])
    assert _inflated(packed, 100, keeps=True) == ("whole", data[:LIMIT])
