"""The cluster side of an engine: for a node with neighbours, the way to them, and the facts about them.

Nodes that share an engine are one broker. Everything that one of them tells the others goes the way
of its publications: it is written behind, in the order in which it was said, and read from the log, or
from the inbox of the node it is for.

Four kinds of things, each with the least that a store has to do for it:

==============  ===============================================================================
messages        to one node (`tell`), or to all in the order of the log (`announce`)
notices         small facts of a node that every other holds in memory (`post`): its name, its blocks
                of fds, the members of its queue groups
cards           facts of a node that are asked for (`file`, `read`, `count`): who is in a topic, which
                fds a user has; and what is left to do when it dies
fds             numbers that no connection of any node had (`lease_fds`)
==============  ===============================================================================

Rules:

1. A node that has not beaten for `LEASE_SECONDS` may be declared dead, by one other node and once.
   From that place in the log on it is gone for all: its notices are down, its cards count no more, and
   whatever it still writes is refused. It learns so (`Listener.lapsed`) and goes on as a new node.
2. A node that has not been beating itself for a whole lease declares no other dead: after an outage of the
   store everybody is late.
3. The cards of a dead node stay until they were dealt with, and so a reaper may die as well.

Nothing here knows what messages, notices and cards say: that is the business of `routing`.
"""

from collections.abc import Mapping, Sequence
from typing import Final, Protocol

import attrs

from broker.core.messages import Fd

LEASE_SECONDS: Final = 10.0
"""A node that was not heard of for so long may be dead: three beats were lost, or its loop hangs."""

BEAT_SECONDS: Final = 3.0
"""Between two beats of a node."""


@attrs.frozen
class Card:
    """A card as its node has filed it."""

    drawer: str
    name: str
    value: bytes


class Listener(Protocol):
    """Gets what comes from other nodes, in the order of the log, between the publications that
    `Sink.deliver` gets. No method has a checkpoint, and none raises."""

    def heard(self, sender: str, message: bytes) -> float:
        """A message of a node, told to this one alone or announced to all; its own announcements come
        back as well. Return the work of it, as `core.work` weighs it, so that the engine lets others
        run in between."""

    def noticed(self, node: str, name: str, value: bytes | None) -> None:
        """A notice was posted, by this node or another; None: taken down. Those that hang already
        when `Engine.running` begins come before its block is entered."""

    def gone(self, node: str) -> None:
        """A node has left, or was declared dead: its notices are down. Never this node's own."""

    def bury(self, node: str) -> None:
        """The same node was declared dead, and it is on this one to deal with its `leftovers`. Asked again
        where another has begun with that and died."""

    def restate(self) -> None:
        """The store has lost what nodes had posted and filed: say all of it anew. All notices are down
        at this place of the log; those of others come as they post them again."""

    def lapsed(self) -> None:
        """This node was declared dead: others were told that its clients have left. `ClusterLink.node` is
        a new one now, without notices, cards and fds; the notices that hang are told anew after this."""


class ClusterLink(Protocol):
    """The other nodes that share an engine. Every method is called in Trio's thread.

    Messages, notices and cards count among the bytes that wait for the engine (`Engine.full`).
    """

    @property
    def is_shared(self) -> bool:
        """Whether there can be other nodes. If not, nothing but `node` is of use here, and nobody has to
        ask for more. Constant."""

    @property
    def node(self) -> str:
        """This node: random, and new with each run. See `Listener.lapsed`."""

    def listen(self, listener: Listener) -> None:
        """Have this one told. Called once, before `Engine.running`."""

    # messages

    def tell(self, node: str, message: bytes) -> None:
        """Send a message to one other node, of as many bytes as a publication may have and 1 KiB. Never
        waits.

        It comes behind all that this node has told it before, once or, where that node has died, not
        at all. Raises `Refused` (100, temporary), with nothing sent, while nothing can be.
        """

    def announce(self, message: bytes) -> None:
        """The same to all nodes, this one among them, at one place of the log. Raises as `tell` does."""

    # notices

    def post(self, name: str, value: bytes | None) -> None:
        """Put up a notice of this node, in place of the last of this name; None takes it down.

        Never waits, never raises: a notice that cannot be written now is asked for by `Listener.restate`. In
        the log, so all nodes know the same at the same place. For few and small ones: every node holds them.
        """

    # cards

    def file(self, drawer: str, name: str, value: bytes | None, owner: str = "") -> None:
        """File a card of this node, in place of the last of this name in this drawer; None takes it
        out. `owner` is for `count`. As `post`, but no node is told."""

    async def read(self, drawer: str, most: int) -> Mapping[str, bytes]:
        """The cards in a drawer, by name, of all nodes that are not dead. Cards that this node filed before
        are in it. Raises `Refused`: 106 for more than `most` cards, 100 (temporary) while the store does not
        answer, or after 2 s. Cancelled, nothing happens."""

    async def count(self, drawer: str) -> tuple[int, int]:
        """How many cards are in a drawer, and of how many owners. Many are looked at piece by piece: one that is filed
        or taken out meanwhile counts or does not. Raises as `read` does, 100 where a piece takes 2 s."""

    # fds

    async def lease_fds(self, count: int, above: Fd) -> range:
        """Numbers for new connections, in a row: larger than `above`, and than all that any node was
        given before. Raises `Refused` (100, temporary)."""

    # the dead

    async def leftovers(self, node: str, most: int) -> Sequence[Card]:
        """Cards of a dead node which is this one's to bury; empty when all are cleared. Raises as `read`
        does."""

    async def clear(self, node: str, cards: Sequence[Card]) -> None:
        """These have been dealt with. When the last is cleared nothing is left of the node. Raises as
        `read` does."""


class Alone:
    """The cluster of a node that has no neighbours: memory and sqlite. Costs nothing."""

    is_shared = False

    def __init__(self, node: str = "") -> None:
        self.node = node

    def listen(self, listener: Listener) -> None:
        raise AssertionError("nobody is there to listen to")

    def tell(self, node: str, message: bytes) -> None:
        raise AssertionError("nobody is there to be told")

    def announce(self, message: bytes) -> None:
        raise AssertionError("nobody is there to be told")

    def post(self, name: str, value: bytes | None) -> None:
        raise AssertionError("nobody is there to read it")

    def file(self, drawer: str, name: str, value: bytes | None, owner: str = "") -> None:
        raise AssertionError("nobody is there to read it")

    async def read(self, drawer: str, most: int) -> Mapping[str, bytes]:
        raise AssertionError("the hub answers")

    async def count(self, drawer: str) -> tuple[int, int]:
        raise AssertionError("the hub answers")

    async def lease_fds(self, count: int, above: Fd) -> range:
        raise AssertionError("all numbers are its own")

    async def leftovers(self, node: str, most: int) -> Sequence[Card]:
        raise AssertionError("nobody is there to die")

    async def clear(self, node: str, cards: Sequence[Card]) -> None:
        raise AssertionError("nobody is there to die")


ALONE: Final = Alone()
