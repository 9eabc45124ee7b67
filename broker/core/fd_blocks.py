"""The blocks of fds that nodes have leased: which node a connection is on, told by its number.

Rule: blocks do not overlap. A number in no block was never given out, or its node has gone.
"""

from bisect import bisect_right, insort

import attrs

from broker.core.messages import Fd


@attrs.define(eq=False)
class FdBlocks:
    """The blocks of all nodes."""

    _blocks: list[tuple[Fd, Fd, str]] = attrs.field(init=False, factory=list)
    """First, one behind the last, node; in order."""
    top: Fd = attrs.field(init=False, default=0)
    """The largest number that was ever in a block."""

    def __len__(self) -> int:
        return len(self._blocks)

    def add(self, node: str, fds: range) -> None:
        """A node has leased these; said again it changes nothing. Linear in the blocks, as is all that
        changes them."""
        self.remove(node, fds.start)
        self.top = max(self.top, fds.stop - 1)
        insort(self._blocks, (fds.start, fds.stop, node))

    def remove(self, node: str, first: Fd) -> None:
        """A node has no use any more for its block that begins with this number."""
        self._blocks = [each for each in self._blocks if (each[0], each[2]) != (first, node)]

    def forget(self, node: str) -> None:
        """A node has gone."""
        self._blocks = [each for each in self._blocks if each[2] != node]

    def node_of(self, fd: Fd) -> str | None:
        """The node that may have given out a number; None if no node has."""
        at = bisect_right(self._blocks, fd, key=lambda each: each[0])
        if not at:
            return None
        _, stop, node = self._blocks[at - 1]
        return node if fd < stop else None
