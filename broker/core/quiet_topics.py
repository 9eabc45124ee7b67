"""The topics of which no publication is left: where each of them was, for those who missed nothing.

Words are those of `history`. A topic has a *payer*, who published there last, or is *unpaid*: it was only asked for.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Final

import attrs

from broker.core.charges import Charges
from broker.core.messages import Position
from broker.core.shares import text_bytes
from broker.core.topic_history import Publisher

QUIET_BYTES: Final = 512
"""Bytes of one quiet topic besides its name's characters. Counted, because subscribing is enough
to make one."""


@attrs.frozen
class Quiet:
    """One topic: its position, when it was last asked for, and who is charged for it; None is nobody."""

    position: Position
    asked: float
    payer: Publisher | None


@attrs.define(eq=False)
class QuietTopics:
    """All of them, that asked for longest ago first. Every method is one step."""

    _charges: Charges
    _topics: OrderedDict[str, Quiet] = attrs.field(init=False, factory=OrderedDict)
    # Those of them that nobody is charged for, in the same order.
    _unpaid: OrderedDict[str, None] = attrs.field(init=False, factory=OrderedDict)

    def __len__(self) -> int:
        return len(self._topics)

    def __iter__(self) -> Iterator[str]:
        return iter(self._topics)

    def get(self, topic: str) -> Quiet | None:
        return self._topics.get(topic)

    def put(self, topic: str, position: Position, now: float, payer: Publisher | None) -> None:
        """A topic that is none of them has turned quiet, or was asked for."""
        if payer is None:
            self._unpaid[topic] = None
        else:
            payer = self._charges.shares.account(payer.owner)  # the same, if it has anything else
            payer.quiet[topic] = None
        self._topics[topic] = Quiet(position, now, payer)
        self._charges.add(QUIET_BYTES + text_bytes(topic), payer)

    def pop(self, topic: str) -> Quiet | None:
        """Forget a topic, and return what was known of it."""
        quiet = self._topics.pop(topic, None)
        if quiet is not None:
            payer = quiet.payer
            del (self._unpaid if payer is None else payer.quiet)[topic]
            self._charges.add(-QUIET_BYTES - text_bytes(topic), payer)
        return quiet

    def renew(self, epoch_of: Callable[[str], str]) -> None:
        """Give each another epoch, made of its own. Linear in the topics."""
        for topic, each in self._topics.items():
            former = each.position
            position = Position(former.offset, epoch_of(former.epoch))
            self._topics[topic] = Quiet(position, each.asked, each.payer)

    def asked_longest_ago(self, before: float) -> str | None:
        """The first of those that were last asked for up to then."""
        for topic, quiet in self._topics.items():
            return topic if quiet.asked <= before else None
        return None

    def first_to_go(self, account: Publisher | None, most: int) -> str | None:
        """The topic that gives way before a publication does: one of the heaviest owner's, or one that nobody is
        charged for where those take more than `most` bytes, or where nobody has anything else."""
        if account is None or len(self._unpaid) * QUIET_BYTES > most:
            return next(iter(self._unpaid))
        if len(account.quiet) * QUIET_BYTES > account.bytes // 2 or not (
            account.own or account.shared
        ):
            return next(iter(account.quiet))
        return None
