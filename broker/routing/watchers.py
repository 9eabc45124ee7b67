"""Watchers of topics: clients that asked to be told who comes and goes.

Rule: they are told in the step in which it happens; those on other nodes by the roster, at its place
in the log.
"""

from collections.abc import Callable
from typing import Literal

import attrs

from broker.access.rights import Rights
from broker.core.hub import Hub
from broker.core.messages import ClientInfo
from broker.core.session import Subscription
from broker.core.work import LEFT, PEER, WRITE, Meter
from broker.protocols.codec import Codec
from broker.routing.elsewhere import Roster
from broker.routing.recipients import Peer
from broker.transport.outbox import Outbox, Run
from broker.transport.postman import PostOffice


@attrs.define(eq=False)
class Watchers:
    """See the module."""

    hub: Hub[Peer]
    rights: Rights
    office: PostOffice
    meter: Meter
    end_run: Callable[[], None]
    """Sends out the open run: all that it reaches were here before."""
    roster: Roster | None = None

    def weigh(self, name: str) -> float:
        """The work of telling those who watch a topic of somebody, at most."""
        watching = self.hub.watching(name)
        return watching * (PEER + WRITE) if watching and self._are_told(name) else 0.0

    def weigh_leaving(self, peer: Peer) -> float:
        """The work of removing the next subscription of a peer that goes; 0 where it has none."""
        name = next(iter(peer.subscriptions), None)
        return 0.0 if name is None else LEFT + self.weigh(name)

    def joined(self, subscription: Subscription) -> None:
        """Tell those who watch a topic that somebody subscribed, the subscriber among them."""
        if self._has_ears(subscription.name):
            self._notify(subscription.name, subscription.info, "join")

    def left(self, subscription: Subscription) -> None:
        """Tell them that somebody is subscribed no longer."""
        if self._has_ears(subscription.name):
            self._notify(subscription.name, subscription.info, "leave")

    def left_as(self, subscription: Subscription, info: ClientInfo | None) -> None:
        """Tell them of the end of a subscription of somebody who was this one to them."""
        self._notify(subscription.name, info, "leave")

    def _has_ears(self, name: str) -> bool:
        """Whether anybody may be there to be told, here or on other nodes. Mostly not: so what others see of a
        client is made when it is needed."""
        return self.roster is not None or self.hub.watching(name) > 0

    def left_for_good(self, topic: str, info: ClientInfo) -> None:
        """Tell them, on all nodes, of somebody who has left because its node has died."""
        self._notify(topic, info, "leave")

    def _notify(self, name: str, info: ClientInfo | None, what: Literal["join", "leave"]) -> None:
        if info is None or not self._are_told(name):
            return
        self.tell(name, info, what)
        if self.roster is not None:
            self.roster.announce(name, info, what)

    def tell(self, name: str, info: ClientInfo, what: Literal["join", "leave"]) -> None:
        """Tell those who watch here of somebody, wherever that is."""
        if not self._are_told(name):
            return
        self.end_run()
        watchers: dict[Codec, list[Outbox]] = {}
        for watcher in self.hub.watchers(name):
            self.meter.done += PEER
            if isinstance(watcher, Peer) and isinstance(watcher.codec, Codec):
                watchers.setdefault(watcher.codec, []).append(watcher.outbox)
        for codec, outboxes in watchers.items():
            frame = codec.join(name, info) if what == "join" else codec.leave(name, info)
            self.office.deliver(Run((frame,)), outboxes)

    def _are_told(self, name: str) -> bool:
        # A namespace that a reload took away may still have subscribers, who leave one day.
        rules = self.rights.book.find(name)
        return rules is not None and rules.join_leave
