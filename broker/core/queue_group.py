"""Queue groups: of the members that listen to one name together, each publication goes to one.

Rule: plain data. The caller decides which member is fit to get a publication.
"""

from collections import OrderedDict
from collections.abc import Callable
from itertools import cycle, islice
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from broker.core.session import Subscriber, Subscription


@attrs.define(eq=False)
class QueueGroup:
    """The members of one group on one topic or pattern; the one whose turn is next stands first."""

    members: "OrderedDict[Subscriber, Subscription]" = attrs.field(factory=OrderedDict)
    looks: int = attrs.field(init=False, default=0)
    """How many members were looked at when something was last dealt out. A member that was not fit then is
    rarely fit a moment later, so the next deal will cost as much."""

    def __len__(self) -> int:
        return len(self.members)

    def deal(self, count: int, is_fit: "Callable[[Subscription], bool]") -> "list[Subscription]":
        """The members whose turn it is, so many times in a row; empty if no member is fit.

        They go to the end of the queue. Each member is asked once at most, so it is linear in
        `count`, and in the members that stand before them and are not fit.
        """
        fit: list[Subscription] = []
        self.looks = 0
        for member in self.members.values():
            self.looks += 1
            if is_fit(member):
                fit.append(member)
                if len(fit) == count:
                    break
        if not fit:
            return []
        turns = list(islice(cycle(fit), count))
        for member in turns[-len(fit) :]:
            self.members.move_to_end(member.subscriber)
        return turns
