"""The other nodes, as the router sees them. Where there can be none, it has neither of these."""

from collections.abc import Callable, Iterable
from typing import Literal, Protocol

import attrs

from broker.config.settings import TopicRules
from broker.core.messages import ClientInfo, Fd
from broker.core.session import Parcel, Recipient, Subscription
from broker.engines.engine import Done


@attrs.frozen(eq=False)
class Way:
    """The way to a connection of another node: the one recipient of what goes to its `fd:N`.

    `check` is asked before anything is published, and raises `Refused` where this publisher has too
    much on its way already.
    """

    check: Callable[[ClientInfo | None], None]
    send: Callable[[Parcel, list[Done]], None]
    """Send publications of one publisher. Never waits, and calls no `Done` itself."""

    def deliver(self, parcel: Parcel) -> None:
        raise AssertionError("it is sent, and answered for")


class Ways(Protocol):
    """The ways to connections of other nodes."""

    def way_to(self, topic: str, fd: Fd) -> Way:
        """The way to a connection that is not here. Raises `Refused`: 102 where no node can have it."""


class Groups(Protocol):
    """Queue groups, with members on all nodes."""

    def recipients(self, topic: str, rules: TopicRules) -> Iterable[Recipient]:
        """The groups that have members here and listen to a topic."""


class Roster(Protocol):
    """The list, open to all nodes, of who is here. Every method is one atomic step, and never waits."""

    def entered(self, subscription: Subscription) -> None:
        """Somebody has subscribed here, or is another user by now."""

    def left(self, subscription: Subscription) -> None:
        """Somebody is subscribed here no longer."""

    def claimed(self, fd: Fd, user: str, before: str) -> None:
        """A connection is this user's, and was that one's; "" is nobody."""

    def announce(self, topic: str, info: ClientInfo, what: Literal["join", "leave"]) -> None:
        """Tell those who watch a topic on other nodes."""
