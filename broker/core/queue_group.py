"""Queue groups: of the members that listen to one name together, each publication goes to one.

Rule: plain data. The caller decides which member is fit to get a publication.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from broker.core.session import Subscriber, Subscription


@attrs.define(eq=False)
class QueueGroup:
    """The members of one group on one topic or pattern; the one whose turn is next stands first."""

    members: "OrderedDict[Subscriber, Subscription]" = attrs.field(factory=OrderedDict)

    def __len__(self) -> int:
        return len(self.members)

    def next(self, is_fit: "Callable[[Subscription], bool]") -> "Subscription | None":
        """The first member that is fit, which then goes to the end of the queue; None if none is.

        Linear in the members that are not fit.
        """
        for subscriber, member in self.members.items():
            if is_fit(member):
                self.members.move_to_end(subscriber)
                return member
        return None
