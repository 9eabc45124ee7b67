"""The publications that are kept of one topic, and the accounts of those who have published there.

Words are those of `history`: *epoch*, *top*, *front*, *owner*.
"""

from collections import OrderedDict
from collections.abc import Iterator

import attrs

from broker.core.messages import Position, Publication
from broker.core.ring import Ring
from broker.core.shares import Account


@attrs.define(eq=False)
class Publisher(Account):
    """The account of one owner in the store: its bytes, and the topics where they are.

    Each topic in which it has charged publications, or which is charged to it, is in one of the
    two. One in which nothing of it is left may be there too, until somebody looks.
    """

    own: "OrderedDict[History, None]" = attrs.field(repr=False, factory=OrderedDict)
    """Topics whose front was its own when it was last looked at; that published to longest ago
    first, as far as it is the only publisher."""
    shared: "OrderedDict[History, None]" = attrs.field(repr=False, factory=OrderedDict)
    """Topics whose front was another's."""
    quiet: "OrderedDict[str, None]" = attrs.field(repr=False, factory=OrderedDict)
    """Its quiet topics; that asked for longest ago first."""


@attrs.define(eq=False)
class History:
    """One topic that has publications: its epoch, its top, and what is kept up to there."""

    topic: str
    epoch: str
    top: int
    ttl: float
    due: float
    """When the store looks at this topic again: at or before its oldest publication's end."""
    bytes: int
    """Of the topic itself."""
    ring: Ring = attrs.field(init=False, factory=Ring)
    charged: int = attrs.field(init=False, default=0)
    """Up to this offset the publications are charged to their owners."""
    payer: Publisher | None = attrs.field(init=False, repr=False, default=None)
    """Charged for the topic itself; None while nothing of it is charged."""
    members: dict[Publisher, int] = attrs.field(init=False, repr=False, factory=dict)
    """Those who have this topic among theirs, and the offset of the last that was charged to it."""

    @property
    def position(self) -> Position:
        return Position(self.top, self.epoch)

    def select(self, since: int | None, limit: int, reverse: bool) -> list[Publication]:
        """Those after offset `since`, oldest first; or, reversed, those before it, newest first.

        At most `limit` of them, all if it is negative.
        """
        ring = self.ring
        start, stop = 0, ring.count
        if since is not None:
            first = self.top + 1 - ring.count
            if reverse:
                stop = min(stop, max(0, since - first))
            else:
                start = min(stop, max(0, since + 1 - first))
        if limit >= 0:
            if reverse:
                start = max(0, stop - limit)
            else:
                stop = min(stop, start + limit)
        places = range(start, stop)
        topic, first = self.topic, self.top + 1 - ring.count
        return [
            ring.publication(place, topic, first + place)
            for place in (reversed(places) if reverse else places)
        ]

    def dated(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[float, Publication]]:
        """When each was published, and the publication; oldest first. Of those kept from the `start`-th on, up
        to before the `stop`-th."""
        ring, first = self.ring, self.top + 1 - self.ring.count
        for place in range(ring.count)[start:stop]:
            yield ring.when(place), ring.publication(place, self.topic, first + place)
