"""The fds that this node gives out, where nodes share them: leased by the block, before they are needed.

Rules:

1. A block is used when this node has read its own notice of it in the log: from then on every node that
   reads on knows whose its connections are.
2. The next block is leased when the half of the last is left, twice as large if that went within
   `SOON` seconds: a thousand clients that come back at once find numbers.
3. A block in which nobody is left, and of which no number is, is given up.
"""

from typing import Any, Final

import attrs
import structlog
import trio

from broker.core.registry import Registry
from broker.engines.cluster import ClusterLink
from broker.errors import Refused
from broker.routing.neighbours import FDS, Neighbours

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("broker.nodes")

FIRST_LEASE: Final = 1024
MOST_LEASED: Final = 2**16

SOON: Final = 10.0

RETRY_SECONDS: Final = 1.0
"""Between two attempts at a store that does not answer."""


@attrs.define(eq=False)
class FdLeases:
    """See the module. fds begin above `after`, which knows what was used before there was a cluster."""

    neighbours: Neighbours
    sessions: Registry[Any]
    after: int
    _blocks: list[range] = attrs.field(init=False, factory=list)
    _size: int = attrs.field(init=False, default=FIRST_LEASE)
    _noticed: trio.Event = attrs.field(init=False, factory=trio.Event)
    _low: trio.Event = attrs.field(init=False, factory=trio.Event)

    def __attrs_post_init__(self) -> None:
        self.sessions.on_low = self._ask
        self.neighbours.on_notice(FDS, self._notice)
        self.neighbours.on_restate.append(self._restate)
        self.neighbours.on_lapse.append(self._lapsed)

    @property
    def _cluster(self) -> ClusterLink:
        return self.neighbours.cluster

    async def lease(self) -> None:
        """Lease one block. Raises `Refused`. Cancelled, its numbers are nobody's."""
        while True:
            node = self._cluster.node
            above = max(self.after, self.neighbours.blocks.top)
            block = await self._cluster.lease_fds(self._size, above)
            if node == self._cluster.node and await self._post(block):
                break  # else it has lapsed meanwhile, and the block was that of who it was
        self._give_up_used()
        self._blocks.append(block)
        self.sessions.lease(block)

    async def _post(self, block: range) -> bool:
        """Say whose a block is; true when that is known, false if this is another node by then."""
        node = self._cluster.node
        self._cluster.post(f"{FDS}{block.start}", b"%d" % block.stop)
        while node == self._cluster.node:
            if self.neighbours.blocks.node_of(block.start) == node:
                return True
            self._noticed = trio.Event()
            await self._noticed.wait()
        return False

    async def keep(self) -> None:
        """Lease blocks before they are needed, until cancelled."""
        last = trio.current_time()
        while True:
            await self._low.wait()
            self._low = trio.Event()
            now = trio.current_time()
            self._size = min(2 * self._size, MOST_LEASED) if now < last + SOON else FIRST_LEASE
            last = now
            await self._lease_at_last()

    async def _lease_at_last(self) -> None:
        while True:
            try:
                await self.lease()
            except Refused as refusal:
                log.warning("no_fds_leased", reason=refusal.message)
                await trio.sleep(RETRY_SECONDS)
            else:
                return

    def _give_up_used(self) -> None:
        kept = []
        for block in self._blocks:
            if block.stop > self.sessions.next_fd or self.sessions.has_any(block):
                kept.append(block)
            else:
                self._cluster.post(f"{FDS}{block.start}", None)
        self._blocks = kept

    def _ask(self) -> None:
        self._low.set()

    def _notice(self, node: str, first: str, value: bytes | None) -> None:
        self._noticed.set()

    def _restate(self) -> None:
        for block in self._blocks:
            self._cluster.post(f"{FDS}{block.start}", b"%d" % block.stop)
        # The next lease is above all that are known: so the store learns of them.
        self._low.set()

    def _lapsed(self) -> None:
        self.sessions.revoke()
        self._blocks.clear()
        self._noticed.set()
