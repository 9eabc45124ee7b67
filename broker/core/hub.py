"""The sessions that are here, and who listens to what, on this node. Plain data, no I/O.

Rules:

1. Never waits: each method is one atomic step.
2. The names a subscriber listens to and the listeners of a name are two sides of one thing; they
   change together in `subscribe` and `unsubscribe`, and a name nobody listens to is dropped there.
3. Exact topics are one look-up; the pattern index is asked only when there are patterns.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import chain
from typing import Generic, Protocol, TypeVar

import attrs

from broker.core.audience_index import AudienceIndex
from broker.core.messages import ClientInfo, Fd
from broker.core.queue_group import QueueGroup
from broker.core.registry import Registry
from broker.core.session import (
    Audience,
    PhaseEvent,
    Subscriber,
    Subscription,
)
from broker.core.topics import PatternIndex, is_pattern


class Attachable(Subscriber, Protocol):
    """A session, as a hub has it here."""

    user: str

    def transition(self, event: PhaseEvent) -> None: ...


S = TypeVar("S", bound=Attachable)


@attrs.frozen
class HubStatistics:
    sessions: int
    topics: int
    patterns: int
    subscriptions: int


@attrs.define(eq=False)
class Listeners:
    """Subscribers to one topic or pattern, ready for a fan-out: by audience, and by queue group.

    `audiences` want everything, `picky` ones pick by tags; None if there are none of these.
    `watchers` want to know who joins and leaves. Members of a queue group are in no audience.
    """

    name: str
    audiences: dict[Hashable, Audience] = attrs.field(factory=dict)
    picky: AudienceIndex | None = None
    watchers: dict[Subscriber, None] = attrs.field(factory=dict)
    groups: dict[str, QueueGroup] = attrs.field(factory=dict)
    members: int = 0
    """How many subscriptions these are, counted as they come and go."""

    @property
    def is_plain(self) -> bool:
        """Whether all get everything that is published: nobody picks, and nobody takes turns."""
        return self.picky is None and not self.groups

    @property
    def width(self) -> int:
        """How many have a publication encoded for them, or dealt out, if all want it."""
        picky = 0 if self.picky is None else len(self.picky)
        return len(self.audiences) + picky + len(self.groups)

    def __len__(self) -> int:
        return self.members

    def __iter__(self) -> Iterator[Subscription]:
        for audience in chain(self.audiences.values(), self.picky or ()):
            yield from audience
        for group in self.groups.values():
            yield from group.members.values()

    def add(self, subscription: Subscription) -> None:
        subscriber = subscription.subscriber
        self.members += 1
        if subscription.group:
            group = self.groups.setdefault(subscription.group, QueueGroup())
            group.members[subscriber] = subscription
        elif subscription.wanted is not None:
            if self.picky is None:
                self.picky = AudienceIndex()
            self.picky.add(subscription)
        else:
            key = subscriber.audience_key
            audience = self.audiences.get(key)
            if audience is None:
                audience = self.audiences[key] = subscriber.new_audience(self.name)
            audience.add(subscription)
        if subscription.join_leave:
            self.watchers[subscriber] = None

    def remove(self, subscription: Subscription) -> None:
        subscriber = subscription.subscriber
        self.members -= 1
        if subscription.group:
            group = self.groups[subscription.group]
            del group.members[subscriber]
            if not group:
                del self.groups[subscription.group]
        elif subscription.wanted is not None:
            assert self.picky is not None, "it is there as long as somebody picks"
            self.picky.remove(subscription)
            if not self.picky:
                self.picky = None
        else:
            audience = self.audiences[subscriber.audience_key]
            audience.remove(subscription)
            if not len(audience):
                del self.audiences[subscriber.audience_key]
        self.watchers.pop(subscriber, None)


class Hub(Generic[S]):
    """See the module. `first_fd` is that of the first session."""

    def __init__(self, first_fd: Fd = 1) -> None:
        self.sessions: Registry[S] = Registry(first_fd)
        self._topics: dict[str, Listeners] = {}
        self._patterns: PatternIndex[Listeners] = PatternIndex()
        self._subscriptions = 0
        self.changes: int = 0
        """Grows with each subscription that begins or ends: what was found before is as good until then."""

    def statistics(self) -> HubStatistics:
        return HubStatistics(
            len(self.sessions), len(self._topics), len(self._patterns), self._subscriptions
        )

    def attach(self, make: Callable[[Fd], S]) -> S:
        """Have a session here, with the next fd, until `detach`; see `Registry.attach`."""
        return self.sessions.attach(make)

    def detach(self, session: S) -> None:
        """Forget a session, and all that it was subscribed to. Sync, so nothing here is ever stale."""
        self.leave_all(session)
        self.sessions.detach(session.fd)
        session.transition(PhaseEvent.GONE)

    def subscribe(self, subscription: Subscription) -> None:
        """Add it. Raises `KeyError` if this subscriber already listens to that name."""
        subscriber, name = subscription.subscriber, subscription.name
        if name in subscriber.subscriptions:
            raise KeyError(name)
        listeners = self.find(name)
        if listeners is None:
            listeners = Listeners(name)
            if is_pattern(name):
                self._patterns.insert(name, listeners)
            else:
                self._topics[name] = listeners
        listeners.add(subscription)
        subscriber.subscriptions[name] = subscription
        self._subscriptions += 1
        self.changes += 1

    def unsubscribe(self, subscriber: Subscriber, name: str) -> Subscription | None:
        """Remove and return a subscription; None if there was none."""
        subscription = subscriber.subscriptions.pop(name, None)
        if subscription is None:
            return None
        self._subscriptions -= 1
        self.changes += 1
        listeners = self.find(name)
        assert listeners is not None
        listeners.remove(subscription)
        if not listeners.members:
            if is_pattern(name):
                self._patterns.remove(name)
            else:
                del self._topics[name]
        return subscription

    def stop_watching(self, subscriber: Subscriber) -> None:
        """Tell a subscriber no longer who joins and leaves. Linear in its subscriptions."""
        for name, subscription in subscriber.subscriptions.items():
            if subscription.join_leave:
                listeners = self.find(name)
                assert listeners is not None
                listeners.watchers.pop(subscriber, None)

    def leave_all(self, subscriber: Subscriber) -> list[Subscription]:
        """Remove and return all subscriptions of one subscriber. Linear in them."""
        names = list(subscriber.subscriptions)
        removed = [self.unsubscribe(subscriber, name) for name in names]
        return [subscription for subscription in removed if subscription is not None]

    def listeners(self, topic: str) -> Sequence[Listeners]:
        """Listeners of what is published to `topic`: those of the topic, then of each pattern.

        A subscriber with two subscriptions that match is in two of them, and gets it twice: once for each,
        because a client tells its own subscriptions apart by name.
        """
        exact = self._topics.get(topic)
        if not len(self._patterns):
            return () if exact is None else (exact,)
        matching = self._patterns.match(topic)
        return matching if exact is None else [exact, *matching]

    def is_plain(self, topic: str) -> bool:
        """Whether all who listen to `topic` do so by its own name, and get everything that is published."""
        if len(self._patterns):
            return False
        exact = self._topics.get(topic)
        return exact is None or exact.is_plain

    def watchers(self, topic: str) -> Sequence[Subscriber]:
        """Subscribers that want to know of joins and leaves on `topic`."""
        listeners = self._topics.get(topic)
        return () if listeners is None else tuple(listeners.watchers)

    def watching(self, topic: str) -> int:
        """How many these are."""
        listeners = self._topics.get(topic)
        return 0 if listeners is None else len(listeners.watchers)

    def presence(self, topic: str) -> dict[str, ClientInfo]:
        """The clients subscribed to `topic` itself, by client id. Linear in them."""
        infos = [subscription.info for subscription in self._topics.get(topic, ())]
        return {info.client: info for info in infos if info is not None}

    def presence_stats(self, topic: str) -> tuple[int, int]:
        """How many clients are subscribed to `topic` itself, and how many users these are. Linear in
        them, a tenth of the price of `presence`."""
        users = [
            subscription.subscriber.user
            for subscription in self._topics.get(topic, ())
            if subscription.subscriber.fd  # not this very program
        ]
        return len(users), len(set(users))

    def group(self, name: str, group: str) -> QueueGroup | None:
        """The members of a queue group on a topic or pattern; None if it has none here."""
        listeners = self.find(name)
        return None if listeners is None else listeners.groups.get(group)

    def subscriptions(self, topic: str) -> list[Subscription]:
        """The present subscriptions to `topic` itself, to be looked at one by one."""
        return list(self._topics.get(topic, ()))

    def named(self) -> list[Listeners]:
        """The present listeners of each topic and pattern, to be looked at one by one."""
        return [*self._topics.values(), *self._patterns.values()]

    def count(self, name: str) -> int:
        """How many subscriptions a topic or pattern has."""
        listeners = self.find(name)
        return 0 if listeners is None else len(listeners)

    def topics(self) -> dict[str, int]:
        """How many subscriptions each topic and pattern has. Linear in these."""
        return {listeners.name: len(listeners) for listeners in self.named()}

    def find(self, name: str) -> Listeners | None:
        """The listeners of one topic or pattern, by its very name."""
        return self._patterns.get(name) if is_pattern(name) else self._topics.get(name)
