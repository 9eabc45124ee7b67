"""Compression of one broker's messages: who may have it, and how much was saved.

Rule: a window that a client keeps is memory that cannot be taken back while it is connected. So all of them
have one bound together; a client that comes when it is reached has its messages compressed one by one.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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

_NO_WINDOW: Final = nullcontext()


@attrs.define(eq=False)
class Compression:
    """See the module. `packing` and `inflated` count what was done so far."""

    settings: Settings
    meter: Meter
    memory: MemoryBudget
    packing: Packing = attrs.field(init=False)
    inflated: Inflated = attrs.field(init=False, factory=Inflated)
    windows_bytes: int = attrs.field(init=False, default=0)
    """Bytes of the windows that are kept for clients now."""
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

    def window(self, deflate: Deflate | None, holding: Holding) -> AbstractContextManager[None]:
        """Hold what the client keeps for as long as the block."""
        if deflate is None or not deflate.kept_bytes:
            return _NO_WINDOW
        return self._held(deflate.kept_bytes, holding)

    @contextmanager
    def _held(self, size: int, holding: Holding) -> Iterator[None]:
        self.windows_bytes += size
        holding.charge(Part.WINDOWS, size)
        try:
            yield
        finally:
            self.windows_bytes -= size
            holding.charge(Part.WINDOWS, -size)

    def codecs(self, deflate: Deflate) -> PackedCodecs:
        """The codecs for all who can read what this one can."""
        bits = deflate.server_bits
        if bits not in self._packed:
            self._packed[bits] = PackedCodecs(Packer(self.packing, bits))
        return self._packed[bits]
