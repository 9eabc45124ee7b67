"""A peer's side of permessage-deflate (RFC 7692), by zlib alone: what it sends, and what it can read."""

import zlib

from broker.testing import Closed, Peer, client_frame
from broker.transport import frames

OFFER = {"Sec-WebSocket-Extensions": "permessage-deflate; client_max_window_bits"}
"""As Chromium has it."""

TEXT = ('{"symbol":"ACME","price":101.25,"volume":1200,"venue":"XETR"}' * 20).encode()
"""1.2 KB that compress well."""


def deflated(data: bytes, bits: int = 15, *, final: bool = False, level: int = 9) -> bytes:
    """What stands in a compressed message of these data; `final`: in a last block, as some write it."""
    deflater = zlib.compressobj(level, zlib.DEFLATED, -bits)
    if final:
        return deflater.compress(data) + deflater.flush() + b"\x00"
    return (deflater.compress(data) + deflater.flush(zlib.Z_SYNC_FLUSH))[:-4]


def inflated(payload: bytes, bits: int = 15) -> bytes:
    """What a compressed message says, by itself."""
    return zlib.decompressobj(-bits).decompress(payload + b"\x00\x00\xff\xff")


def deflated_frame(opcode: int, payload: bytes, *, fin: bool = True, rsv: int = 0x40) -> bytes:
    """A masked frame with these bits set, around a payload that is compressed already."""
    frame = bytearray(client_frame(opcode, payload, fin=fin))
    frame[0] |= rsv
    return bytes(frame)


def message(data: bytes, opcode: int = frames.TEXT) -> bytes:
    """One compressed message of a client, in one frame."""
    return deflated_frame(opcode, deflated(data))


class DeflatingPeer(Peer):
    """A peer that knows which of the messages it gets were compressed."""

    def __init__(self, peer: Peer) -> None:
        super().__init__(peer.stream)
        self._buffer = peer._buffer
        self.fd = peer.fd

    async def receive_message(self) -> tuple[bool, bytes]:
        """The next message: whether it was compressed, and what it says. Raises `Closed` on a Close."""
        while (header := frames.read_header(self._buffer)) is None:
            await self._read()
        opcode, payload = await self.receive_frame()
        if opcode == frames.CLOSE:
            raise Closed(int.from_bytes(payload[:2], "big"), payload[2:].decode())
        return bool(header.rsv), inflated(payload) if header.rsv else payload
