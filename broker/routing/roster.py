"""The roster that all nodes read: cards of connections, users, topics and wills.

==================  ===========  ==================================================================
drawer              card         says
==================  ===========  ==================================================================
`in:TOPIC`          client id    user, connection info, topic info: presence
`user:NAME`         fd           nothing: the connections of a user
`wills`             fd           topic, data, retain, and the client's info
`events`            node's name  the epoch of its events, if anybody reads them
==================  ===========  ==================================================================

Rules:

1. A card is filed in the step in which what it says becomes true.
2. Topics whose rules have no presence have no cards: nobody asks. Patterns have none, as on one node.
3. After the store has lost them, cards are filed anew in turns with all else; what changes meanwhile
   is filed as it comes, so in the end they are true.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Final, Literal, TypeVar

import attrs
import msgspec
import structlog
import trio

from broker.core.messages import ClientInfo, Fd
from broker.core.names import PERSONAL
from broker.core.session import Subscription
from broker.core.topics import is_pattern
from broker.core.work import COMMAND, SLICE
from broker.engines.cluster import ClusterLink
from broker.errors import ErrorCode, Refused
from broker.routing.group_shares import GroupShares
from broker.routing.mail import Came, Left
from broker.routing.neighbours import Neighbours
from broker.routing.open_calls import Answer
from broker.routing.recipients import Peer
from broker.routing.router import Router
from broker.routing.wills import Will, Wills

T = TypeVar("T")

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("broker.nodes")

IN: Final = "in:"
WILLS: Final = "wills"
EVENTS: Final = "events"

FILED: Final = 2.0
"""Work of a card: written, sent with many others."""


class Presence(msgspec.Struct, frozen=True, array_like=True):
    """A client in a topic, besides its id."""

    user: str
    conn_info: bytes | None = None
    chan_info: bytes | None = None


class LastWill(msgspec.Struct, frozen=True, array_like=True):
    """A will, and who leaves it."""

    topic: str
    data: bytes
    retain: bool
    info: ClientInfo


encode: Final = msgspec.msgpack.Encoder().encode
_presence: Final = msgspec.msgpack.Decoder(Presence)


@attrs.define(eq=False)
class CardRoster:
    """The `Roster` of a node that has neighbours."""

    neighbours: Neighbours
    router: Router
    wills: Wills
    groups: GroupShares
    _former: Fd = attrs.field(init=False, default=0)
    """Fds up to this one were of a node that is dead for the others."""
    _restating: trio.Event = attrs.field(init=False, factory=trio.Event)

    def __attrs_post_init__(self) -> None:
        self.router.hub.sessions.on_claim = self.claimed
        self.router.watchers.roster = self
        self.wills.on_put = self.willed
        self.neighbours.on(Came, self._came)
        self.neighbours.on(Left, self._left)
        self.neighbours.on_restate.append(self._restate)
        self.neighbours.on_lapse.append(self._lapsed)

    @property
    def _cluster(self) -> ClusterLink:
        return self.neighbours.cluster

    # what happens here

    def begin(self) -> None:
        """This node is here."""
        if self.router.events is not None:
            name = self.neighbours.name
            self._cluster.file(EVENTS, name, self.router.events.epoch.encode())

    def end(self) -> None:
        """This node stops, and tells so itself."""
        self._cluster.file(EVENTS, self.neighbours.name, None)

    def claimed(self, fd: Fd, user: str, before: str) -> None:
        if before:
            self._file(PERSONAL + before, fd, None)
        if user:
            self._file(PERSONAL + user, fd, b"")
            will, peer = self.wills.get(fd), self.router.hub.sessions.get(fd)
            if will is not None and peer is not None:
                self.willed(peer, will)

    def willed(self, peer: Peer, will: Will | None) -> None:
        """A connection leaves this will, or none any more."""
        if will is None:
            self._file(WILLS, peer.fd, None)
        else:
            last = LastWill(will.topic, will.data, will.retain, peer.info)
            self._file(WILLS, peer.fd, encode(last))

    def entered(self, subscription: Subscription) -> None:
        if subscription.group:
            self.groups.changed(subscription.name, subscription.group)
        info = subscription.info
        if info is None or not self._is_listed(subscription.name):
            return
        card = Presence(info.user, info.conn_info, info.chan_info)
        self.router.meter.add(FILED)
        fd = subscription.subscriber.fd
        self._file(IN + subscription.name, fd, encode(card), owner=info.user)

    def left(self, subscription: Subscription) -> None:
        if subscription.group:
            self.groups.changed(subscription.name, subscription.group)
        # The rules may be others by now. A card that is not there is no fault.
        fd = subscription.subscriber.fd
        if fd and not is_pattern(subscription.name):
            self._file(IN + subscription.name, fd, None)

    def announce(self, topic: str, info: ClientInfo, what: Literal["join", "leave"]) -> None:
        if not self.is_former(info.client):
            self.router.meter.add(FILED)
            self.neighbours.announce((Came if what == "join" else Left)(topic, info))

    def is_former(self, client: str) -> bool:
        """Whether it is one of this node of which others were told that it has left, when this node
        lapsed."""
        fd = int(client)
        return fd <= self._former and self.router.hub.sessions.get(fd) is not None

    def _is_listed(self, name: str) -> bool:
        rules = self.router.rights.book.find(name)
        return rules is not None and rules.presence and not is_pattern(name)

    def _file(self, drawer: str, fd: Fd, value: bytes | None, *, owner: str = "") -> None:
        self._cluster.file(drawer, str(fd), value, owner)

    # what happens elsewhere

    def _came(self, sender: str, came: Came, answer: Answer) -> float:
        return self._tell(came.topic, came.info, "join")

    def _left(self, sender: str, left: Left, answer: Answer) -> float:
        return self._tell(left.topic, left.info, "leave")

    def _tell(self, topic: str, info: ClientInfo, what: Literal["join", "leave"]) -> float:
        before = self.router.meter.done
        self.router.watchers.tell(topic, info, what)
        return self.router.meter.done - before

    # reading

    async def presence(self, topic: str, most: int) -> Mapping[str, ClientInfo]:
        """The clients that are subscribed to a topic, on all nodes, by client id; charged to nobody yet.

        Raises `Refused`: 106 for more than `most`, 108 where the topic's rules have no presence, 100
        where the engine does not answer.
        """
        self._check_listed(topic)
        cards = await self._cluster.read(IN + topic, most)
        return dict(_readable(cards, info_of))

    async def counts(self, topic: str) -> tuple[int, int]:
        """How many clients are subscribed to a topic, and how many users. Raises as `presence` does."""
        self._check_listed(topic)
        return await self._cluster.count(IN + topic)

    async def fds_of(self, user: str, most: int) -> list[Fd]:
        """The connections of a user, on all nodes. Raises `Refused` as `presence` does."""
        if not user:
            return []
        cards = await self._cluster.read(PERSONAL + user, most)
        return sorted([fd for _, fd in _readable(cards, lambda fd, card: int(fd))])

    def _check_listed(self, topic: str) -> None:
        if not self._is_listed(topic):
            text = "presence is off for this topic: nodes do not tell each other who is there"
            raise Refused(ErrorCode.NOT_AVAILABLE, text)

    # after a loss

    def _restate(self) -> None:
        self._restating.set()

    def _lapsed(self) -> None:
        self._former = self.router.hub.sessions.next_fd - 1
        if self.router.events is not None:
            self.router.events.begin_anew()
        self.begin()

    async def keep(self) -> None:
        """File all cards anew each time that the store has lost them, until cancelled."""
        while True:
            await self._restating.wait()
            self._restating = trio.Event()
            work = 0.0
            for step in self._file_all():
                work += step
                if work >= SLICE:
                    await self.router.turns.wait(work)
                    work = 0.0

    def _file_all(self) -> Iterator[float]:
        self.begin()
        sessions = self.router.hub.sessions
        for fd in [peer.fd for peer in sessions]:
            peer = sessions.get(fd)
            if peer is None:
                continue
            # Not for one that is on its way out, and is nobody's any more.
            self.claimed(fd, peer.user if fd in sessions.fds_of(peer.user) else "", "")
            will = self.wills.get(fd)
            if will is not None:
                self.willed(peer, will)
            yield COMMAND
            for name in list(peer.subscriptions):
                subscription = peer.subscriptions.get(name)
                if subscription is not None:
                    self.entered(subscription)
                    yield FILED


def _readable(
    cards: Mapping[str, bytes], read: Callable[[str, bytes], T]
) -> Iterator[tuple[str, T]]:
    """Cards as they are read; those that cannot be are passed over, and told of: another program has put them
    where ours are."""
    for name, card in cards.items():
        try:
            yield name, read(name, card)
        except ValueError as error:
            log.error("card_misread", name=name, reason=str(error)[:200])


def info_of(client: str, card: bytes) -> ClientInfo:
    """The fields of a client that others see, by its id and its card in a topic."""
    read = _presence.decode(card)
    return ClientInfo(client, read.user, read.conn_info, read.chan_info)
