"""One peer: its fd, its user, its subscriptions, and the phases of its life.

Rule: the phases are a table. An event that is not in it raises and changes nothing.
"""

from collections.abc import Hashable, Mapping
from enum import StrEnum
from math import inf
from typing import Protocol

import attrs

from broker.core.messages import ClientInfo, Fd
from broker.core.tags import FilterNode, matches


class Phase(StrEnum):
    """Where a session is in its life."""

    OPEN = "open"
    """The first message will tell which protocol the peer speaks."""
    PLAIN = "plain"
    """Each message goes to the app."""
    CONNECTED = "connected"
    """The peer speaks the Centrifuge protocol, and was let in."""
    CLOSING = "closing"
    """The session was told to end: nothing more reaches its outbox."""
    CLOSED = "closed"


class Happening(StrEnum):
    """What moves a session from phase to phase."""

    MESSAGE = "message"
    CONNECT = "connect"
    CLOSE = "close"
    GONE = "gone"


TRANSITIONS: dict[tuple[Phase, Happening], Phase] = {
    (Phase.OPEN, Happening.MESSAGE): Phase.PLAIN,
    (Phase.OPEN, Happening.CONNECT): Phase.CONNECTED,
    (Phase.PLAIN, Happening.MESSAGE): Phase.PLAIN,
    (Phase.CONNECTED, Happening.MESSAGE): Phase.CONNECTED,
    (Phase.OPEN, Happening.CLOSE): Phase.CLOSING,
    (Phase.PLAIN, Happening.CLOSE): Phase.CLOSING,
    (Phase.CONNECTED, Happening.CLOSE): Phase.CLOSING,
    (Phase.OPEN, Happening.GONE): Phase.CLOSED,
    (Phase.PLAIN, Happening.GONE): Phase.CLOSED,
    (Phase.CONNECTED, Happening.GONE): Phase.CLOSED,
    (Phase.CLOSING, Happening.GONE): Phase.CLOSED,
}


class IllegalTransition(RuntimeError):
    """A session was moved in a way that its table does not have: a bug of ours."""


class Subscriber(Protocol):
    """Whoever can listen: a session, or a piece of this very program.

    `codec` says how publications are written for it, so all that share a codec share the frames;
    `outbox` is where they go. The core only compares them.
    """

    @property
    def codec(self) -> Hashable: ...
    @property
    def outbox(self) -> Hashable: ...
    @property
    def subscriptions(self) -> "dict[str, Subscription]": ...


@attrs.frozen
class Filtered:
    """The audience of those who share a codec and a tags filter."""

    codec: Hashable
    wanted: FilterNode


@attrs.define(eq=False)
class Subscription:
    """One subscriber's interest in one topic or pattern. `info` is None for who is not a client.

    With a `group`, it gets what falls to it of what the group gets. `server_side`: the client has
    not asked for it, and will not subscribe again by itself. `wanted` picks publications by their
    tags. `expires_at` is on the clock of whoever ends it then; it alone may change.
    """

    subscriber: Subscriber
    name: str
    info: ClientInfo | None = None
    join_leave: bool = False
    recoverable: bool = False
    group: str = ""
    server_side: bool = False
    expires_at: float = inf
    wanted: FilterNode | None = None

    def wants(self, tags: Mapping[str, str] | None) -> bool:
        """Whether it gets what carries these tags."""
        return self.wanted is None or matches(self.wanted, tags or {})

    @property
    def audience(self) -> Hashable:
        """All with the same get the same, frame by frame."""
        codec = self.subscriber.codec
        return codec if self.wanted is None else Filtered(codec, self.wanted)


@attrs.define(eq=False)
class Session:
    """One peer. `codec` changes once, when its first message tells which protocol it speaks."""

    fd: Fd
    codec: Hashable
    outbox: Hashable
    info: ClientInfo
    phase: Phase = Phase.OPEN
    subscriptions: dict[str, Subscription] = attrs.field(factory=dict)

    @property
    def is_established(self) -> bool:
        """Whether the peer can be sent something."""
        return self.phase in (Phase.OPEN, Phase.PLAIN, Phase.CONNECTED)

    def note(self, happening: Happening) -> None:
        """Move on; raise `IllegalTransition`, with nothing changed, where the table has no entry."""
        try:
            self.phase = TRANSITIONS[self.phase, happening]
        except KeyError:
            raise IllegalTransition(f"{happening} while {self.phase} (fd {self.fd})") from None
