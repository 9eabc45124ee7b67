"""Subscribers as the core sees them, with no outbox and no wire."""

from collections.abc import Callable, Hashable, Iterator, Sequence

import attrs

from broker.core.hub import Hub
from broker.core.messages import Publication
from broker.core.session import (
    Audience,
    Decider,
    Grant,
    Parcel,
    Recipient,
    Session,
    Subscriber,
    Subscription,
)
from broker.core.tags import CompiledFilter


@attrs.define(eq=False)
class Crowd:
    """An audience that delivers nothing: only who is in it counts here."""

    of: list[Subscription] = attrs.field(factory=list)

    def add(self, subscription: Subscription) -> None:
        self.of.append(subscription)

    def remove(self, subscription: Subscription) -> None:
        self.of.remove(subscription)

    def __len__(self) -> int:
        return len(self.of)

    def __iter__(self) -> Iterator[Subscription]:
        return iter(self.of)

    def narrowed(self, admits: Callable[[Subscription], bool]) -> Recipient:
        return Crowd(list(filter(admits, self.of)))

    def deliver(self, parcel: Parcel) -> None:
        raise AssertionError("the hub delivers nothing")


@attrs.define(eq=False)
class Listener(Session):
    """A session as the hub sees it: all who speak one codec get the same."""

    codec: str = attrs.field(default="plain", kw_only=True)
    is_reachable = keeps_up = True
    bytes_waiting = 0

    @property
    def audience_key(self) -> Hashable:
        return self.codec

    def new_audience(self, name: str) -> Audience:
        return Crowd()

    def take(self, name: str, publications: Sequence[Publication], rule: str) -> int:
        raise AssertionError("the hub delivers nothing")


def attach(hub: Hub[Listener], codec: str = "plain") -> Listener:
    return hub.sessions.attach(lambda fd: Listener(fd, codec=codec))


def join(
    subscriber: Subscriber,
    name: str,
    *,
    join_leave: bool = False,
    group: str = "",
    wanted: CompiledFilter | None = None,
) -> Subscription:
    """A subscription that the rules allow."""
    grant = Grant(name, Decider.RULES)
    return Subscription(subscriber, name, grant, join_leave=join_leave, group=group, wanted=wanted)
