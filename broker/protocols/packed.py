"""Codecs for peers who have agreed to compression: the same messages, in frames that a packer has seen.

They are codecs of their own, so such peers are audiences of their own, and nothing on the way of a
publication asks whether somebody wants it compressed.
"""

from collections.abc import Sequence
from typing import ClassVar

from broker.core.messages import Publication
from broker.protocols.centrifuge_json import CENTRIFUGE_JSON, CentrifugeJson
from broker.protocols.centrifuge_protobuf import CENTRIFUGE_PROTOBUF, CentrifugeProtobuf
from broker.protocols.codec import Codec, PeerCodec
from broker.protocols.plain import PLAIN, Plain
from broker.transport.packing import Packer


class _Packed:
    """The frames of `writer`, packed."""

    writer: ClassVar[PeerCodec]

    def __init__(self, packer: Packer) -> None:
        super().__init__()
        self._packer = packer

    def publication(self, name: str, publication: Publication) -> bytes:
        return self._packer.pack(self.writer.publication(name, publication))

    def publications(self, name: str, publications: Sequence[Publication]) -> Sequence[bytes]:
        return [*map(self._packer.pack, self.writer.publications(name, publications))]

    def pieces(self, name: str, publication: Publication) -> tuple[bytes, bytes, bytes]:
        return self._packer.pack_pieces(self.writer.pieces(name, publication))


class PackedJson(_Packed, CentrifugeJson):
    """As `CENTRIFUGE_JSON`."""

    writer: ClassVar[PeerCodec] = CENTRIFUGE_JSON

    def frame(self, replies: Sequence[bytes]) -> bytes:
        return self._packer.pack(super().frame(replies))


class PackedProtobuf(_Packed, CentrifugeProtobuf):
    """As `CENTRIFUGE_PROTOBUF`."""

    writer: ClassVar[PeerCodec] = CENTRIFUGE_PROTOBUF

    def frame(self, replies: Sequence[bytes]) -> bytes:
        return self._packer.pack(super().frame(replies))


class PackedPlain(_Packed, Plain):
    """As `PLAIN`."""

    writer: ClassVar[PeerCodec] = PLAIN

    def message(self, data: bytes) -> bytes:
        return self._packer.pack(super().message(data))

    def text_frame(self, payload: bytes) -> bytes:
        return self._packer.pack(super().text_frame(payload))

    def binary_frame(self, payload: bytes) -> bytes:
        return self._packer.pack(super().binary_frame(payload))


class PackedCodecs:
    """The codecs of all peers whose frames go through one packer."""

    def __init__(self, packer: Packer) -> None:
        self.plain: PackedPlain = PackedPlain(packer)
        self._by_name: dict[str, Codec] = {
            codec.name: codec for codec in (PackedJson(packer), PackedProtobuf(packer))
        }

    def of(self, codec: Codec) -> Codec:
        """The one that says the same as `codec`."""
        return self._by_name[codec.name]
