"""The codecs that pack: they say the same as those that do not, in every frame they write."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker import Config
from broker.config.reload import Settings
from broker.core.messages import ClientInfo, Position, Publication
from broker.core.work import Meter
from broker.protocols.centrifuge_json import CENTRIFUGE_JSON
from broker.protocols.centrifuge_protobuf import CENTRIFUGE_PROTOBUF
from broker.protocols.codec import Codec, PeerCodec
from broker.protocols.packed import PackedCodecs
from broker.protocols.plain import PLAIN
from broker.transport import frames
from broker.transport.packing import Packer, Packing
from tests.deflated import TEXT, inflated

CONFIG = Config(compression=True, compression_min_bytes=0)


class Untimed(Packing):
    """Compresses whatever it takes."""

    def admits(self, size: int) -> bool:
        return True


@pytest.fixture
def packed() -> PackedCodecs:
    return PackedCodecs(Packer(Untimed(Settings(CONFIG), Meter()), 15))


def said(frame: bytes) -> bytes:
    """A frame as it was before it was packed."""
    header = frames.read_header(frame)
    assert header is not None
    payload = frames.payload_of(frame)
    if header.rsv:
        payload = inflated(payload)
    return frames.encode(header.opcode, payload)


LONG = b'{"long":"' + b"text " * 2000 + b'"}'
PUBLICATIONS = [
    Publication("a", data, info, offset, 0, tags, opaque)
    for data in (b"1", b'"text"', LONG)
    for info in (None, ClientInfo("7", "ann"))
    for offset in (0, 9)
    for tags in (None, {"k": "v" * 100})
    for opaque in (False, True)
]


@pytest.mark.parametrize("plain", [CENTRIFUGE_JSON, CENTRIFUGE_PROTOBUF, PLAIN])
def test_publications_are_the_same(packed: PackedCodecs, plain: PeerCodec) -> None:
    codec: PeerCodec = packed.of(plain) if isinstance(plain, Codec) else packed.plain
    assert codec.name == plain.name
    assert codec.opaque_payloads == plain.opaque_payloads
    for each in PUBLICATIONS:
        for name in ("a", "*"):
            whole = plain.publication(name, each)
            assert said(codec.publication(name, each)) == whole
            assert [*map(said, codec.publications(name, [each, each]))] == [whole] * 2
            assert said(b"".join(codec.pieces(name, each))) == whole
            if len(whole) > 1000:
                assert len(codec.publication(name, each)) < len(whole) / 5


@pytest.mark.parametrize("plain", [CENTRIFUGE_JSON, CENTRIFUGE_PROTOBUF])
def test_replies_and_pushes_are_the_same(packed: PackedCodecs, plain: Codec) -> None:
    codec = packed.of(plain)
    info = ClientInfo("7", "ann", b'{"name":"%b"}' % (b"x" * 1000))
    stream = plain.stream(PUBLICATIONS[-5:], Position(9, "e"))
    replies = [plain.reply(1, "history", stream), plain.error(2, 107, "no" * 500, False)]
    assert said(codec.frame(replies)) == plain.frame(replies)
    assert len(codec.frame(replies)) < len(plain.frame(replies)) / 2
    for method in (Codec.join, Codec.leave):
        assert said(getattr(codec, method.__name__)("a", info)) == method(plain, "a", info)
    assert said(codec.message(LONG)) == plain.message(LONG)
    assert said(codec.disconnect(3000, "x" * 999)) == plain.disconnect(3000, "x" * 999)
    assert said(codec.ping()) == plain.ping()


@given(st.text(max_size=3000), st.binary(max_size=3000))
def test_plain_messages_are_the_same(text: str, data: bytes) -> None:
    codec = PackedCodecs(Packer(Untimed(Settings(CONFIG), Meter()), 15)).plain
    assert said(codec.text_frame(text.encode())) == PLAIN.text_frame(text.encode())
    assert said(codec.binary_frame(data)) == PLAIN.binary_frame(data)
    assert said(codec.message(TEXT)) == PLAIN.message(TEXT)


def test_peers_with_other_windows_are_other_audiences(packed: PackedCodecs) -> None:
    other = PackedCodecs(Packer(Untimed(Settings(CONFIG), Meter()), 9))
    for codec in (CENTRIFUGE_JSON, CENTRIFUGE_PROTOBUF):
        assert packed.of(codec) is packed.of(codec)
        assert len({codec, packed.of(codec), other.of(codec)}) == 3
