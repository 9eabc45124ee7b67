"""Queue groups at work: each publication goes to one live member that keeps up.

Rule: round robin among those with room; a slow member is passed over, and gets something only when
nobody else is left. A group has no member for a moment while its last one reconnects: what is
published then is lost to it, unless the topic's history is read.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import attrs

from broker.config.settings import SlowConsumer
from broker.core.messages import Fd, Publication
from broker.core.queue_group import Group
from broker.core.session import Subscription
from broker.transport.outbox import Run
from broker.transport.postman import PostOffice


def _anyone(member: Subscription) -> bool:
    return True


@attrs.define(eq=False)
class Outlet:
    """A group as one recipient of a run: it stands where an outbox would, and deals out."""

    group: Group
    office: PostOffice
    rule: SlowConsumer
    exclude: Collection[Fd] = ()
    suits: Callable[[Subscription], bool] = _anyone

    def take(self, publications: Sequence[Publication]) -> int:
        """Give each publication to one member; return how many somebody took."""
        shares: dict[Subscription, list[Publication]] = {}
        for publication in publications:
            member = self.choose(publication.tags)
            if member is not None:
                shares.setdefault(member, []).append(publication)
        return sum([self._give(member, share) for member, share in shares.items()])

    def wants(self, tags: Mapping[str, str] | None) -> bool:
        """Whether any member wants what carries these tags. Linear in them."""
        return any(member.wants(tags) for member in self.group.members.values())

    def choose(self, tags: Mapping[str, str] | None) -> Subscription | None:
        """The member whose turn it is, of those who want what carries these tags: one with room,
        else the live one with least to do."""

        def keeps_up(member: Subscription) -> bool:
            outbox: Any = member.subscriber.outbox
            return self._is_live(member) and outbox.keeps_up and member.wants(tags)

        member = self.group.next(keeps_up)
        if member is not None:
            return member
        members = self.group.members.values()
        live = [each for each in members if self._is_live(each) and each.wants(tags)]
        return min(live, key=_waiting, default=None)

    def _is_live(self, member: Subscription) -> bool:
        fd = getattr(member.subscriber, "fd", 0)
        outbox: Any = member.subscriber.outbox
        return not outbox.sealed and fd not in self.exclude and self.suits(member)

    def _give(self, member: Subscription, share: list[Publication]) -> int:
        codec: Any = member.subscriber.codec
        outbox: Any = member.subscriber.outbox
        encoded = [codec.publication(member.name, publication) for publication in share]
        if hasattr(outbox, "take"):  # a reader in this very program
            return int(outbox.take(encoded))
        topic = share[0].topic
        return len(share) * self.office.deliver(Run(encoded, topic, self.rule), (outbox,))


def _waiting(member: Subscription) -> int:
    outbox: Any = member.subscriber.outbox
    return int(outbox.bytes)
