"""Compression of one broker's messages: who may have it, and how much was saved.

Rule: a window that a client keeps is memory that cannot be taken back while it is connected. So all of them
have one bound together; a client that comes when it is reached has its messages compressed one by one.
"""

from typing import Final

import attrs

from broker.config.reload import Settings
from broker.core.memory import Holding, MemoryBudget, Part
from broker.core.work import Meter
from broker.protocols.packed import PackedCodecs
from broker.transport.extensions import Deflate, choose_deflate
from broker.transport.head import Head
from broker.transport.inflating import Inflated
from broker.transport.packing import Packer, Packing

WINDOWS: Final = 8
"""The part of all memory for windows that clients keep, as a divisor: 12,000 of them in 4 GiB."""


@attrs.define(eq=False)
class Compression:
    """See the module. `packing` and `inflated` count what was done so far."""

    settings: Settings
    meter: Meter
    memory: MemoryBudget
    packing: Packing = attrs.field(init=False)
    inflated: Inflated = attrs.field(init=False, factory=Inflated)
    _packed: dict[int, PackedCodecs] = attrs.field(init=False, factory=dict)

    def __attrs_post_init__(self) -> None:
        self.packing = Packing(self.settings, self.meter)

    def agree(self, head: Head) -> Deflate | None:
        """Choose from the offers of a handshake; None for no compression. Raises `HeadError`."""
        config = self.settings.config
        offers = head.header("sec-websocket-extensions") if config.compression else None
        if not offers:
            return None
        deflate = choose_deflate(offers, config.compression_client_context)
        if deflate is not None and not self._has_room(deflate.kept_bytes):
            deflate = choose_deflate(offers)
        return deflate

    def _has_room(self, size: int) -> bool:
        return not size or WINDOWS * (self.windows_bytes + size) <= self.memory.limit

    def keep_window(self, deflate: Deflate, holding: Holding) -> None:
        """Charge what the client keeps, until its holding is closed."""
        if deflate.kept_bytes:
            holding.charge(Part.WINDOWS, deflate.kept_bytes)

    @property
    def windows_bytes(self) -> int:
        """Bytes of the windows that are kept for clients now."""
        return self.memory.charged(Part.WINDOWS)

    def codecs(self, deflate: Deflate) -> PackedCodecs:
        """The codecs for all who can read what this one can."""
        bits = deflate.server_bits
        if bits not in self._packed:
            self._packed[bits] = PackedCodecs(Packer(self.packing, bits))
        return self._packed[bits]
