"""Queue groups at work: each publication goes to one live member that keeps up.

Rule: round robin among those with room; a slow member is passed over, and gets something only when
nobody else is left. A group has no member for a moment while its last one reconnects: a
publication in that moment is lost to it, unless the topic's history is read.
"""

from collections.abc import Callable, Collection, Mapping

import attrs

from broker.core.messages import Fd, Publication
from broker.core.queue_group import QueueGroup
from broker.core.session import Parcel, Subscription


@attrs.frozen
class GroupRecipient:
    """A group as one recipient of a parcel: it deals out.

    `admits` is asked of each member, where not all may have what is published; None if all may.
    """

    group: QueueGroup
    admits: Callable[[Subscription], bool] | None = None

    def deliver(self, parcel: Parcel) -> None:
        """Give each publication to one member."""
        self.deal(parcel)

    def deal(self, parcel: Parcel) -> bool:
        """The same; false if there is nobody to give them to."""
        publications = [each for batch in parcel.batches for each in batch]
        tags = publications[0].tags
        shares: dict[Subscription, list[Publication]] = {}
        for member, publication in zip(
            self._choose(len(publications), tags, parcel.exclude), publications, strict=False
        ):
            shares.setdefault(member, []).append(publication)
        taken = sum(
            [
                member.subscriber.take(member.name, share, parcel.rule)
                for member, share in shares.items()
            ]
        )
        if parcel.report is not None and (shares or self._wants(tags)):
            parcel.report.matched += 1
            parcel.report.queued += taken
        return bool(shares)

    def choose(
        self, tags: Mapping[str, str] | None, exclude: Collection[Fd] = ()
    ) -> Subscription | None:
        """The member whose turn it is, of those who want publications with these tags: one with room, else
        the live one with least to do. None if nobody is left."""
        return next(iter(self._choose(1, tags, exclude)), None)

    def _choose(
        self, count: int, tags: Mapping[str, str] | None, exclude: Collection[Fd]
    ) -> list[Subscription]:
        """The members that `count` publications with these tags go to, in their order. Nothing
        is taken meanwhile, so each member is as fit for the last as for the first."""

        def is_live(member: Subscription) -> bool:
            subscriber = member.subscriber
            return (
                subscriber.is_reachable
                and subscriber.fd not in exclude
                and (self.admits is None or self.admits(member))
                and member.wants(tags)
            )

        turns = self.group.deal(count, lambda each: each.subscriber.keeps_up and is_live(each))
        if turns:
            return turns
        live = [each for each in self.group.members.values() if is_live(each)]
        least = min(live, key=lambda each: each.subscriber.bytes_waiting, default=None)
        return [] if least is None else [least] * count

    def _wants(self, tags: Mapping[str, str] | None) -> bool:
        """Whether any member wants what carries these tags. Linear in them."""
        return any(member.wants(tags) for member in self.group.members.values())
