"""Recipients that are clients: a peer with its outbox, and audiences of peers who get the same.

Rule: a frame is encoded once for all who speak one codec under one name, and only if there is
somebody to get it.
"""

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import cast

import attrs

from broker.core.messages import ClientInfo, Publication
from broker.core.names import DIRECT
from broker.core.session import Audience, Parcel, Recipient, Session, SlowRule, Subscription
from broker.protocols.codec import PeerCodec
from broker.protocols.packed import PackedCodecs
from broker.routing.letters import Letters
from broker.transport.outbox import Outbox, Run
from broker.transport.postman import PostOffice
from broker.transport.runs import LateRun
from broker.transport.tasks import StartSoon


@attrs.frozen(eq=False)
class Search:
    """The retained values that a subscription has found and has yet to be sent: in slices, the next of which
    is searched for when it is asked for."""

    subscription: Subscription
    slices: Iterator[Sequence[Publication]]
    recovered: bool

    @property
    def is_wanted(self) -> bool:
        """Whether its subscription has not ended."""
        name = self.subscription.name
        return self.subscription.subscriber.subscriptions.get(name) is self.subscription


@attrs.define(eq=False)
class Peer(Session):
    """A session with the way to its client.

    `codec` says how it is written to; it is set once, when the first message tells which protocol
    the peer speaks. `outbox` and `start_soon` are there as soon as the connection runs.
    """

    office: PostOffice = attrs.field(kw_only=True)
    codec: PeerCodec | None = None
    packed: PackedCodecs | None = attrs.field(init=False, default=None)
    """Where it wants compressed frames, the codecs that write them: `codec` is one of these then."""
    is_apps: bool = attrs.field(init=False, default=True)
    """Whether it is the app's: an operator is nobody's correspondent."""
    outbox: Outbox = attrs.field(init=False)
    start_soon: StartSoon = attrs.field(init=False)
    """Starts a task that ends with the connection at the latest."""
    _mailbox: "PeerAudience | None" = attrs.field(init=False, default=None)
    _letters: Letters | None = attrs.field(init=False, default=None)
    # None while nobody sends what they find.
    _searches: "deque[Search] | None" = attrs.field(init=False, default=None)

    @property
    def takes_direct(self) -> bool:
        """Whether clients can write to it: it is known how, and it is the app's."""
        return self.speaks and self.is_apps

    @property
    def is_reachable(self) -> bool:
        return self.speaks and not self.outbox.sealed

    @property
    def mailbox(self) -> "PeerAudience":
        """This peer alone, as the audience of its own `fd:N`. It has a codec by then."""
        if self._mailbox is None:
            assert self.codec is not None, "it is known which protocol a peer speaks"
            name = f"{DIRECT}{self.fd}"
            self._mailbox = PeerAudience(name, self.codec, self.office, {self.outbox: self})
        return self._mailbox

    @property
    def letters(self) -> Letters:
        """The direct messages that wait for this peer while it is behind."""
        if self._letters is None:
            self._letters = Letters(self.outbox)
        return self._letters

    # what was retained

    @property
    def searches_waiting(self) -> int:
        """Searches that are left to be sent, besides the one that is being sent."""
        return len(self._searches or ())

    def add_search(self, search: Search) -> bool:
        """Have what is left of a search sent, behind all before it; whether somebody has to begin to do so. Those
        whose subscriptions have ended go when they outnumber the others: constant per search."""
        if self._searches is None:
            self._searches = deque((search,))
            return True
        if len(self._searches) > 2 * len(self.subscriptions):
            self._searches = deque(each for each in self._searches if each.is_wanted)
        self._searches.append(search)
        return False

    def next_search(self) -> Search | None:
        """The search that is next, with whoever sends what it finds; None if there is none any more."""
        if not self._searches:
            self._searches = None
            return None
        return self._searches.popleft()

    @property
    def keeps_up(self) -> bool:
        return self.outbox.keeps_up

    @property
    def bytes_waiting(self) -> int:
        return self.outbox.bytes

    @property
    def audience_key(self) -> Hashable:
        return cast(Hashable, self.codec)

    def new_audience(self, name: str) -> Audience:
        assert self.codec is not None, "it is known which protocol a subscriber speaks"
        return PeerAudience(name, self.codec, self.office)

    def take(self, name: str, publications: Sequence[Publication], rule: SlowRule) -> int:
        """Queue publications for this peer alone, under the name that it listens to."""
        assert self.codec is not None, "it is known which protocol a subscriber speaks"
        frames = self.codec.publications(name, publications)
        run = Run(frames, publications[0].topic, rule)
        return len(publications) * self.office.deliver(run, (self.outbox,))


@attrs.define(eq=False)
class PeerAudience:
    """Peers who listen under one name, share a codec and want the same."""

    name: str
    codec: PeerCodec
    office: PostOffice
    outboxes: dict[Outbox, Peer] = attrs.field(factory=dict)

    def add(self, subscription: Subscription) -> None:
        peer = cast(Peer, subscription.subscriber)  # `new_audience` of a peer has made this one
        self.outboxes[peer.outbox] = peer

    def remove(self, subscription: Subscription) -> None:
        del self.outboxes[cast(Peer, subscription.subscriber).outbox]

    def __len__(self) -> int:
        return len(self.outboxes)

    def __iter__(self) -> Iterator[Subscription]:
        for peer in self.outboxes.values():
            yield peer.subscriptions[self.name]

    def narrowed(self, admits: Callable[[Subscription], bool]) -> Recipient:
        """A copy with those peers whom `admits` lets in. Linear in them."""
        few = {
            outbox: peer
            for outbox, peer in self.outboxes.items()
            if admits(peer.subscriptions[self.name])
        }
        return attrs.evolve(self, outboxes=few)

    def deliver(self, parcel: Parcel) -> None:
        """Queue a parcel in each outbox, as one run. Linear in the peers."""
        if parcel.report is not None or parcel.exclude or parcel.shared is not None:
            self._deliver_apart(parcel)
            return
        if not self.outboxes:
            return
        if len(parcel.batches) == 1:  # as nearly always
            frames = self.codec.publications(self.name, parcel.batches[0])
        else:
            frames = self._encode(parcel)
        self.office.deliver(Run(frames, parcel.topic, parcel.rule), self.outboxes)

    def _deliver_apart(self, parcel: Parcel) -> None:
        """The same, where some peers are left out, a report is wanted, or it is to be encoded later."""
        left_out = parcel.exclude
        # A copy: a peer that is cut for being too slow leaves the very map that is walked here.
        chosen = [
            (outbox, peer) for outbox, peer in self.outboxes.items() if peer.fd not in left_out
        ]
        if not chosen:
            return
        self.office.deliver(self._make_run(parcel), [outbox for outbox, _ in chosen])
        if parcel.report is not None:
            parcel.report.clients += [peer for _, peer in chosen]

    def _make_run(self, parcel: Parcel) -> Run:
        if parcel.shared is not None:
            ((publication,),) = parcel.batches
            pieces = self.codec.pieces(self.name, publication)
            return LateRun(pieces, parcel.topic, parcel.rule, parcel.shared)
        return Run(self._encode(parcel), parcel.topic, parcel.rule)

    def _encode(self, parcel: Parcel) -> Sequence[bytes]:
        name, publications = self.name, self.codec.publications
        frames: list[bytes] = []
        for batch in parcel.batches:
            frames += publications(name, batch)
        return frames


@attrs.frozen(eq=False)
class SlowMailbox:
    """A peer that is behind, as the recipient of direct messages under `name`.

    Where it is one of several, what a publisher has no room for here is dropped: the others get it.
    Else it is for the caller to `check` before.
    """

    name: str
    peer: Peer
    is_one_of_several: bool

    def check(self, info: ClientInfo | None) -> None:
        """Raise `Refused` (111) where a publisher has too much waiting here already."""
        self.peer.letters.check(info, self.peer.fd)

    def deliver(self, parcel: Parcel) -> None:
        """Queue a parcel, as one run for each publisher in it."""
        peer = self.peer
        if peer.fd in parcel.exclude:
            return
        assert peer.codec is not None, "it is known which protocol a peer speaks"
        for batch in parcel.batches:
            info = batch[0].info
            has_room = not (self.is_one_of_several and peer.letters.refuses(info))
            if has_room:
                frames = peer.codec.publications(self.name, batch)
                run = peer.letters.write(frames, parcel.topic, info)
                peer.office.deliver(run, (peer.outbox,))
                if parcel.report is not None:
                    parcel.report.clients.append(peer)
            elif parcel.report is not None:
                parcel.report.matched += 1
