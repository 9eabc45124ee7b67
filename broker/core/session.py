"""One peer: its fd, its user, its subscriptions, and the phases of its life.

Rules:

1. The phases are a table. An event that is not in it raises and changes nothing.
2. A session is the only owner of its user, claims, usage and expiry. Its info for others is
   made from these when it is needed, so a change is seen everywhere at once.
3. Until its first message nobody knows which protocol a peer speaks: only messages that wait outside are
   meant for it.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from enum import StrEnum
from math import inf
from types import MappingProxyType
from typing import Final, Literal, Protocol, TypeAlias

import attrs

from broker.core.memory import Holding, Part
from broker.core.messages import ClientInfo, Fd, Publication
from broker.core.tags import CompiledFilter
from broker.core.usage import ConnectionUsage
from broker.core.work import Allowance

SlowRule: TypeAlias = Literal["close", "drop_oldest", "latest"]
"""The fate of a peer, or of what waits for it, when its outbox is full."""


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


_ESTABLISHED: Final = (Phase.OPEN, Phase.PLAIN, Phase.CONNECTED)
_SPEAKING: Final = (Phase.PLAIN, Phase.CONNECTED)


class PhaseEvent(StrEnum):
    """Causes that move a session from phase to phase."""

    MESSAGE = "message"
    CONNECT = "connect"
    CLOSE = "close"
    GONE = "gone"


TRANSITIONS: dict[tuple[Phase, PhaseEvent], Phase] = {
    (Phase.OPEN, PhaseEvent.MESSAGE): Phase.PLAIN,
    (Phase.OPEN, PhaseEvent.CONNECT): Phase.CONNECTED,
    (Phase.PLAIN, PhaseEvent.MESSAGE): Phase.PLAIN,
    (Phase.CONNECTED, PhaseEvent.MESSAGE): Phase.CONNECTED,
    (Phase.OPEN, PhaseEvent.CLOSE): Phase.CLOSING,
    (Phase.PLAIN, PhaseEvent.CLOSE): Phase.CLOSING,
    (Phase.CONNECTED, PhaseEvent.CLOSE): Phase.CLOSING,
    (Phase.OPEN, PhaseEvent.GONE): Phase.CLOSED,
    (Phase.PLAIN, PhaseEvent.GONE): Phase.CLOSED,
    (Phase.CONNECTED, PhaseEvent.GONE): Phase.CLOSED,
    (Phase.CLOSING, PhaseEvent.GONE): Phase.CLOSED,
}


class IllegalTransition(RuntimeError):
    """A session was moved in a way that its table does not have: a bug of ours."""


class Decider(StrEnum):
    """The authority that let somebody subscribe."""

    RULES = "rules"
    TOKEN = "token"
    HOOK = "hook"
    SERVER = "server"
    """The app, a connection token or a connect reply: the client has not asked for it."""
    PROGRAM = "program"
    """The subscriber is a reader in this very program."""


@attrs.frozen
class Grant:
    """The right to subscribe to one name, with its giver and the user it was given to.

    `info` is what others see of the subscriber on this topic, `data` goes to the client itself, both
    raw JSON. `expires_at` is in Unix seconds, None for never.
    """

    name: str
    by: Decider
    user: str = ""
    info: bytes | None = None
    data: bytes | None = None
    expires_at: float | None = None


@attrs.frozen
class ServerSub:
    """A topic that a client is subscribed to by the server. `info` and `data` are raw JSON."""

    info: bytes | None = None
    data: bytes | None = None
    join_leave: bool = False


@attrs.define(eq=False)
class Report:
    """Recipients that one publication was meant for, as they are counted.

    `failed` are the fds of clients that did not take it. Readers in this program have none. The outcome for
    clients is known when all have it, and a full outbox was judged: `settle` counts them.
    """

    matched: int = 0
    queued: int = 0
    failed: list[Fd] = attrs.field(factory=list)
    clients: "list[Subscriber]" = attrs.field(factory=list)

    def settle(self) -> None:
        """Count the clients that it was meant for, by whether they are there to get it. Linear in them."""
        failed = [client.fd for client in self.clients if not client.is_reachable]
        self.matched += len(self.clients)
        self.queued += len(self.clients) - len(failed)
        self.failed += failed
        self.clients.clear()


@attrs.define(eq=False)
class Parcel:
    """Publications to one topic, on their way to all who listen.

    All have the same tags, so their recipients were chosen by them. Those of one of the `batches`
    are of one publisher. `rule` says what
    happens to an outbox that is full. The fds of `exclude` get nothing. `report` is filled where it
    is asked for.
    """

    topic: str
    rule: SlowRule
    batches: list[Sequence[Publication]] = attrs.field(factory=list)
    exclude: frozenset[Fd] = frozenset()
    report: Report | None = None
    shared: object = None
    """To be held by all recipients that need its data later: where it is one large publication for many
    audiences, which share that until it goes out."""
    place: int = 0
    """Where its first publication stands in a log that nodes share: the same number on all of them."""
    payer: Allowance | None = None
    """The party that is charged for what is known only when they are delivered, in whosever step that is."""
    report_to: str = ""
    """The node that wants to know the outcome on other nodes, and its number for that, as it wrote them."""


class Recipient(Protocol):
    """Takes publications: an audience, a reader in this program, a queue group, retained values."""

    def deliver(self, parcel: Parcel) -> None:
        """Take all of a parcel, or as much as there is room for. Never waits.

        The parcel belongs to the caller, and to all other recipients as well.
        """


class Audience(Recipient, Protocol):
    """Subscribers to one name who want the same, and get the same, frame by frame."""

    def add(self, subscription: "Subscription") -> None: ...
    def remove(self, subscription: "Subscription") -> None: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator["Subscription"]: ...

    def narrowed(self, admits: "Callable[[Subscription], bool]") -> Recipient:
        """Those of this audience, of now, whom `admits` lets in. Linear in them."""


class Subscriber(Protocol):
    """A session, or a reader in this very program; the hub only compares them."""

    @property
    def fd(self) -> Fd:
        """The connection's number; 0 for a reader in this program."""

    @property
    def user(self) -> str: ...
    @property
    def subscriptions(self) -> "dict[str, Subscription]": ...

    @property
    def is_reachable(self) -> bool:
        """Whether it takes anything at all."""

    @property
    def keeps_up(self) -> bool:
        """Whether it takes what it gets in time."""

    @property
    def bytes_waiting(self) -> int:
        """A measure of what it has yet to take."""

    def info_on(self, chan_info: bytes | None) -> ClientInfo | None:
        """The info that others see of it; None for a reader in this program."""

    @property
    def audience_key(self) -> Hashable:
        """All with the same key get the same, frame by frame, of what they want."""

    def new_audience(self, name: str) -> Audience:
        """An empty audience for all with its key."""

    def take(self, name: str, publications: Sequence[Publication], rule: SlowRule) -> int:
        """Take publications that are for this one alone; return how many it took."""


@attrs.define(eq=False)
class Subscription:
    """One subscriber's interest in one topic or pattern.

    With a `group`, it gets its part of the group's publications. `server_side`: the client has not asked for
    it, and will not subscribe again by itself. `wanted` picks publications by their tags. `expires_at` is on
    the clock of the code that ends it then; it alone may change.
    """

    subscriber: Subscriber
    name: str
    grant: Grant
    join_leave: bool = False
    recoverable: bool = False
    group: str = ""
    server_side: bool = False
    expires_at: float = inf
    wanted: CompiledFilter | None = None

    @property
    def info(self) -> ClientInfo | None:
        """The info that others see of the subscriber now; None where it is no client."""
        return self.subscriber.info_on(self.grant.info)

    def wants(self, tags: Mapping[str, str] | None) -> bool:
        """Whether it gets what carries these tags."""
        return self.wanted is None or self.wanted.matches(tags)


SUBSCRIPTION_BYTES: Final = 700
"""A subscription besides its texts: itself, its grant, its places in two maps."""


def subscription_bytes(name: str, grant: Grant, wanted: CompiledFilter | None) -> int:
    """The memory that a subscription takes, about."""
    texts = [grant.info or b"", grant.data or b""]
    return SUBSCRIPTION_BYTES + len(name) + sum(map(len, texts)) + (wanted.bytes if wanted else 0)


NO_CLAIMS: Mapping[str, object] = MappingProxyType({})


@attrs.define(eq=False)
class Session:
    """One peer. `user` changes by `Registry.bind` alone, which knows who is whose.

    `conn_info` is raw JSON that others see of it. `app_name` and `app_version` are what the client calls
    itself. `claims` are those of its token, `token_user` who
    that is for. On Trio's clock are `expires_at` and `next_expiry`, when the connection ends unless
    it is refreshed, and when the first of it and its subscriptions does; and `look_at`, before which
    nothing about it is due: so a connection that is idle costs one comparison a second.
    """

    fd: Fd
    phase: Phase = Phase.OPEN
    user: str = ""
    conn_info: bytes | None = None
    app_name: str = ""
    app_version: str = ""
    claims: Mapping[str, object] = NO_CLAIMS
    token_user: str = ""
    expires_at: float = inf
    next_expiry: float = inf
    look_at: float = 0.0
    usage: ConnectionUsage | None = None
    subscriptions: dict[str, Subscription] = attrs.field(factory=dict)
    subscription_bytes: int = 0
    filter_nodes: int = 0
    holding: Holding = attrs.field(factory=Holding, kw_only=True)
    """The memory that is held for this peer."""
    answered_at: float = attrs.field(init=False, default=-inf)
    """When the client answered a ping of its protocol last, on Trio's clock."""
    allowance: Allowance | None = attrs.field(init=False, default=None)
    """The work that it may do: charged for what comes of it in a step of somebody else."""
    _info: ClientInfo | None = attrs.field(init=False, default=None)

    @property
    def is_established(self) -> bool:
        """Whether the peer is neither closing nor gone."""
        return self.phase in _ESTABLISHED

    @property
    def speaks(self) -> bool:
        """Whether it is known which protocol the peer speaks, so that it can be sent something."""
        return self.phase in _SPEAKING

    @property
    def info(self) -> ClientInfo:
        """The info that others see of this client, apart from any topic."""
        info = self._info
        if info is None or info.user != self.user or info.conn_info is not self.conn_info:
            self._info = info = ClientInfo(str(self.fd), self.user, self.conn_info)
        return info

    def info_on(self, chan_info: bytes | None) -> ClientInfo | None:
        """The info that others see of this client on a topic where it has `chan_info`."""
        if chan_info is None:
            return self.info
        return attrs.evolve(self.info, chan_info=chan_info)

    def weigh(self, subscription: Subscription, sign: int) -> None:
        """Count a subscription that has begun (1) or ended (-1) among what this session holds."""
        wanted = subscription.wanted
        more = sign * subscription_bytes(subscription.name, subscription.grant, wanted)
        self.subscription_bytes += more
        self.holding.charge(Part.SUBSCRIPTIONS, more)
        self.filter_nodes += 0 if wanted is None else sign * wanted.nodes

    def transition(self, event: PhaseEvent) -> None:
        """Move on; raise `IllegalTransition`, with nothing changed, where the table has no entry."""
        try:
            self.phase = TRANSITIONS[self.phase, event]
        except KeyError:
            raise IllegalTransition(f"{event} while {self.phase} (fd {self.fd})") from None
