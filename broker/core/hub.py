"""Who is connected, and who listens to what, on this node. Plain data, no I/O.

Rules:

1. Never waits: each method is one atomic step.
2. What a subscriber listens to and who listens to a name are two sides of one thing; they change
   together in `subscribe` and `unsubscribe`, and a name nobody listens to is dropped there.
3. Exact topics are one look-up; the pattern index is asked only when there are patterns.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import attrs

from broker.core.messages import ClientInfo, Fd
from broker.core.queue_group import Group
from broker.core.registry import Registry
from broker.core.session import Happening, Session, Subscriber, Subscription
from broker.core.topics import PatternIndex, is_pattern


@attrs.frozen
class HubStatistics:
    sessions: int
    topics: int
    patterns: int
    subscriptions: int


@attrs.define(eq=False)
class Listeners:
    """Who listens to one topic or pattern, ready for a fan-out.

    `audiences` has the outboxes by codec, or by codec and filter, in order of arrival; a plain loop
    over one of them is all that a delivery needs.
    """

    name: str
    audiences: dict[Hashable, dict[Any, Subscription]] = attrs.field(factory=dict)
    watchers: dict[Subscriber, None] = attrs.field(factory=dict)
    """Those who want to know who joins and leaves."""
    groups: dict[str, Group] = attrs.field(factory=dict)
    """The queue groups; their members are in no audience."""

    def __len__(self) -> int:
        members = sum(map(len, self.groups.values())) if self.groups else 0
        return sum(map(len, self.audiences.values())) + members

    def __iter__(self) -> Iterator[Subscription]:
        for audience in self.audiences.values():
            yield from audience.values()
        for group in self.groups.values():
            yield from group.members.values()


class Hub:
    """See the module."""

    def __init__(self) -> None:
        self.sessions: Registry[Session] = Registry()
        self._topics: dict[str, Listeners] = {}
        self._patterns: PatternIndex[Listeners] = PatternIndex()
        self._subscriptions = 0

    def statistics(self) -> HubStatistics:
        return HubStatistics(
            len(self.sessions), len(self._topics), len(self._patterns), self._subscriptions
        )

    @contextmanager
    def attached(self, make: Callable[[Fd], Session]) -> Iterator[Session]:
        """Have a session here for as long as the block; sync, so the registry is never stale."""
        session = self.sessions.attach(make)
        try:
            yield session
        finally:
            self.leave_all(session)
            self.sessions.detach(session.fd)
            session.note(Happening.GONE)

    def subscribe(self, subscription: Subscription) -> None:
        """Add it. Raises `KeyError` if this subscriber already listens to that name."""
        subscriber, name = subscription.subscriber, subscription.name
        if name in subscriber.subscriptions:
            raise KeyError(name)
        listeners = self._find(name)
        if listeners is None:
            listeners = Listeners(name)
            if is_pattern(name):
                self._patterns.insert(name, listeners)
            else:
                self._topics[name] = listeners
        if subscription.group:
            group = listeners.groups.setdefault(subscription.group, Group())
            group.members[subscriber.outbox] = subscription
        else:
            audience = listeners.audiences.setdefault(subscription.audience, {})
            audience[subscriber.outbox] = subscription
        if subscription.join_leave:
            listeners.watchers[subscriber] = None
        subscriber.subscriptions[name] = subscription
        self._subscriptions += 1

    def unsubscribe(self, subscriber: Subscriber, name: str) -> Subscription | None:
        """Remove and return a subscription; None if there was none."""
        subscription = subscriber.subscriptions.pop(name, None)
        if subscription is None:
            return None
        self._subscriptions -= 1
        listeners = self._find(name)
        assert listeners is not None
        if subscription.group:
            group = listeners.groups[subscription.group]
            del group.members[subscriber.outbox]
            if not group:
                del listeners.groups[subscription.group]
        else:
            audience = listeners.audiences[subscription.audience]
            del audience[subscriber.outbox]
            if not audience:
                del listeners.audiences[subscription.audience]
        listeners.watchers.pop(subscriber, None)
        if not listeners.audiences and not listeners.groups:
            if is_pattern(name):
                self._patterns.remove(name)
            else:
                del self._topics[name]
        return subscription

    def leave_all(self, subscriber: Subscriber) -> list[Subscription]:
        """Remove and return all subscriptions of one subscriber. Linear in them."""
        names = list(subscriber.subscriptions)
        removed = [self.unsubscribe(subscriber, name) for name in names]
        return [subscription for subscription in removed if subscription is not None]

    def listeners(self, topic: str) -> Sequence[Listeners]:
        """Who gets what is published to `topic`: those of the topic, then of each pattern.

        A subscriber with two subscriptions that match is in two of them, and gets it twice: once
        for each, as a client's own subscriptions are told apart by name.
        """
        exact = self._topics.get(topic)
        if not len(self._patterns):
            return () if exact is None else (exact,)
        matching = self._patterns.match(topic)
        return matching if exact is None else [exact, *matching]

    def watchers(self, topic: str) -> Sequence[Subscriber]:
        """Who wants to know of joins and leaves on `topic`."""
        listeners = self._topics.get(topic)
        return () if listeners is None else tuple(listeners.watchers)

    def presence(self, topic: str) -> dict[str, ClientInfo]:
        """The clients subscribed to `topic` itself, by client id. Linear in them."""
        listeners = self._topics.get(topic, ())
        return {s.info.client: s.info for s in listeners if s.info is not None}

    def topics(self) -> dict[str, int]:
        """How many subscriptions each topic and pattern has. Linear in these."""
        return {
            listeners.name: len(listeners)
            for listeners in (*self._topics.values(), *self._patterns.values())
        }

    def _find(self, name: str) -> Listeners | None:
        return self._patterns.get(name) if is_pattern(name) else self._topics.get(name)
