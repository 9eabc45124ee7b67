"""Direct messages that wait for a peer that is behind: each publisher has a share of its outbox.

Rules:

1. A publisher that floods an fd is refused; the connection of that fd is not cut. Of what an outbox may hold,
   the direct messages of one publisher are a quarter, and those of all together a half; and one message more.
2. A peer that takes what it gets costs nothing here: messages are counted while it is behind.
3. A user is one publisher on all connections; a client without a user is one by itself. This
   program is none: the app decides what it sends to whom.
"""

from collections.abc import Sequence
from typing import Final

import attrs

from broker.core.messages import ClientInfo
from broker.core.shares import Owner, owner_of
from broker.errors import ErrorCode, Refused
from broker.transport.outbox import Outbox, Run

SHARE: Final = 4
"""The part of an outbox for one publisher, as a divisor. Two leave half of it for topics and replies."""


@attrs.define(eq=False)
class Amount:
    """The bytes and messages of one publisher that wait, as an outbox bounds them."""

    bytes: int = 0
    messages: int = 0

    def add(self, bytes: int, messages: int) -> None:  # noqa: A002 - the unit is the name
        self.bytes += bytes
        self.messages += messages

    def is_over(self, outbox: Outbox, divisor: int) -> bool:
        return (
            divisor * self.bytes > outbox.max_bytes or divisor * self.messages > outbox.max_messages
        )


@attrs.define(eq=False)
class Letters:
    """The direct messages in one outbox that were sent since its peer is behind, by publisher."""

    outbox: Outbox
    _total: Amount = attrs.field(init=False, factory=Amount)
    _of: dict[Owner, Amount] = attrs.field(init=False, factory=dict)

    def __len__(self) -> int:
        """How many publishers have something waiting."""
        return len(self._of)

    def refuses(self, info: ClientInfo | None) -> bool:
        """Whether nothing more is taken of this publisher, until some has gone out."""
        if info is None:
            return False
        own = self._of.get(owner_of(info))
        return self._total.is_over(self.outbox, SHARE // 2) or (
            own is not None and own.is_over(self.outbox, SHARE)
        )

    def check(self, info: ClientInfo | None, fd: int) -> None:
        """Raise `Refused` (111) where nothing more is taken of this publisher."""
        if self.refuses(info):
            raise Refused(ErrorCode.TOO_MANY_REQUESTS, f"fd {fd} is behind: try again later")

    def write(self, frames: Sequence[bytes], topic: str, info: ClientInfo | None) -> Run:
        """A run of direct messages of one publisher, to be put into the outbox."""
        return Run(frames, topic) if info is None else _Letter(frames, topic, self, owner_of(info))

    def count(self, owner: Owner, size: int, messages: int) -> None:
        """Count what has come to wait, or no longer does."""
        own = self._of.setdefault(owner, Amount())
        for amount in (own, self._total):
            amount.add(size, messages)
        if not own.bytes:
            del self._of[owner]


class _Letter(Run):
    """A run that is counted for its publisher until it is out, or was dropped."""

    __slots__ = ("_letters", "_owner")

    def __init__(self, frames: Sequence[bytes], topic: str, letters: Letters, owner: Owner) -> None:
        super().__init__(frames, topic)
        self._letters = letters
        self._owner = owner
        letters.count(owner, len(self.data), self.messages)

    def __del__(self) -> None:
        self._letters.count(self._owner, -len(self.data), -self.messages)
        super().__del__()
