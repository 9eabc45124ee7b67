"""Peers with their outboxes, and audiences: who is encoded for, and what each gets."""

from collections.abc import Sequence

import attrs
import pytest

from broker.core.messages import ClientInfo, Publication
from broker.core.session import Parcel, PhaseEvent, Report, Subscription
from broker.protocols.centrifuge_json import CENTRIFUGE_JSON
from broker.protocols.centrifuge_protobuf import CENTRIFUGE_PROTOBUF
from broker.protocols.codec import PeerCodec
from broker.protocols.plain import PLAIN
from broker.routing.recipients import Peer, PeerAudience
from broker.transport.postman import PostOffice
from broker.transport.runs import LateRun
from tests.routing.conftest import listen, make_outbox, make_router, runs, subscription


@attrs.define(eq=False)
class Counting:
    """A plain codec that counts what it encodes."""

    name = "plain"
    opaque_payloads = True
    encoded: int = 0

    def publication(self, name: str, publication: Publication) -> bytes:
        self.encoded += 1
        return PLAIN.publication(name, publication)

    def pieces(self, name: str, publication: Publication) -> tuple[bytes, bytes, bytes]:
        return PLAIN.pieces(name, publication)

    def publications(self, name: str, publications: Sequence[Publication]) -> Sequence[bytes]:
        return [self.publication(name, each) for each in publications]

    def message(self, data: bytes) -> bytes:
        return PLAIN.message(data)


def make_peer(fd: int = 7, codec: PeerCodec = PLAIN) -> Peer:
    office = PostOffice()
    peer = Peer(fd, office=office, codec=codec)
    peer.outbox = make_outbox(office)
    peer.transition(PhaseEvent.MESSAGE)
    return peer


def audience_of(*peers: Peer) -> PeerAudience:
    """An audience under the name `a` of peers that share an office."""
    assert peers[0].codec is not None
    audience = PeerAudience("a", peers[0].codec, peers[0].office)
    for peer in peers:
        member = subscription(peer, "a")
        peer.subscriptions["a"] = member
        audience.add(member)
    return audience


def parcel(*data: bytes) -> Parcel:
    return Parcel("a", "close", [[Publication("a", each) for each in data]])


# one peer


@pytest.mark.parametrize("event", PhaseEvent)
def test_a_peer_is_reachable_once_it_has_spoken_and_until_it_closes(event: PhaseEvent) -> None:
    peer = Peer(7, office=PostOffice(), codec=PLAIN)
    peer.outbox = make_outbox(peer.office)
    assert not peer.is_reachable
    peer.transition(event)
    assert peer.is_reachable is (event in (PhaseEvent.MESSAGE, PhaseEvent.CONNECT))


def test_a_peer_whose_outbox_is_sealed_is_not_reachable() -> None:
    peer = make_peer()
    assert peer.is_reachable
    peer.outbox.seal()  # as a Close does
    assert not peer.is_reachable


def test_a_peer_takes_what_is_for_it_alone() -> None:
    peer = make_peer()
    news = [Publication("news", b"1"), Publication("news", b"2")]
    assert peer.take("news", news, "latest") == 2
    assert runs(peer) == [["1", "2"]]
    (run,) = peer.outbox.mail
    assert (run.topic, run.rule) == ("news", "latest")
    assert peer.bytes_waiting == len(run.data)
    peer.outbox.seal()  # as a Close does
    assert peer.take("news", news, "latest") == 0


def test_those_with_one_codec_are_one_audience() -> None:
    json, twin = make_peer(7, CENTRIFUGE_JSON), make_peer(8, CENTRIFUGE_JSON)
    others = [make_peer(9, codec) for codec in (CENTRIFUGE_PROTOBUF, PLAIN)]
    assert len({each.audience_key for each in (json, *others)}) == 3
    assert twin.audience_key == json.audience_key
    audience = json.new_audience("a")
    assert isinstance(audience, PeerAudience)
    assert (audience.name, audience.codec) == ("a", CENTRIFUGE_JSON)
    assert len(audience) == 0


# audiences


def test_an_audience_holds_subscriptions_as_they_are_now() -> None:
    one, two = make_peer(1), make_peer(2)
    audience = audience_of(one, two)
    assert list(audience) == [one.subscriptions["a"], two.subscriptions["a"]]
    one.user = "ann"
    assert [member.info for member in audience] == [ClientInfo("1", "ann"), ClientInfo("2")]
    audience.remove(one.subscriptions["a"])
    assert list(audience) == [two.subscriptions["a"]]
    assert len(audience) == 1


def test_a_parcel_is_encoded_once_for_all_and_queued_as_one_run() -> None:
    codec = Counting()
    peers = [make_peer(fd, codec) for fd in (1, 2, 3)]
    audience_of(*peers).deliver(parcel(b"1", b"2"))
    assert codec.encoded == 2
    first, *others = [peer.outbox.mail[0] for peer in peers]
    assert all(run is first for run in others)


def test_nothing_is_encoded_for_nobody() -> None:
    codec = Counting()
    peer = make_peer(1, codec)
    audience = audience_of(peer)
    audience.deliver(attrs.evolve(parcel(b"1"), exclude=frozenset({1}), report=Report()))
    audience.remove(peer.subscriptions["a"])
    audience.deliver(parcel(b"1"))
    assert codec.encoded == 0
    assert runs(peer) == []


def test_batches_of_several_publishers_are_one_run() -> None:
    peer = make_peer()
    batches = [[Publication("a", b"1"), Publication("a", b"2")], [Publication("a", b"3")]]
    audience_of(peer).deliver(Parcel("a", "close", [*batches]))
    assert runs(peer) == [["1", "2", "3"]]


def test_a_late_parcel_is_encoded_when_it_goes_out() -> None:
    codec = Counting()
    peers = [make_peer(fd, codec) for fd in (1, 2)]
    audience_of(*peers).deliver(attrs.evolve(parcel(b"1"), shared=object()))
    assert codec.encoded == 0
    (run,), (other,) = [peer.outbox.mail for peer in peers]
    assert run is other
    assert isinstance(run, LateRun)
    assert (run.topic, run.rule, run.data) == ("a", "close", PLAIN.message(b"1"))


def test_those_who_are_left_out_are_in_no_report() -> None:
    peers = [make_peer(fd) for fd in (1, 2, 3)]
    report = Report()
    sent = attrs.evolve(parcel(b"1"), exclude=frozenset({2}), report=report)
    audience_of(*peers).deliver(sent)
    assert [runs(peer) for peer in peers] == [[["1"]], [], [["1"]]]
    report.settle()
    assert (report.matched, report.queued, report.failed) == (2, 2, [])


def test_a_report_names_those_that_did_not_take_it() -> None:
    peers = [make_peer(fd) for fd in (1, 2)]
    peers[0].outbox.seal()
    report = Report()
    audience_of(*peers).deliver(attrs.evolve(parcel(b"1"), report=report))
    report.settle()
    assert (report.matched, report.queued, report.failed) == (2, 1, [1])


async def test_a_peer_that_leaves_while_it_is_delivered_to_is_reported_and_disturbs_nobody() -> (
    None
):
    """A full outbox ends its peer's subscriptions in the very step that fills it."""
    router = make_router()
    before, leaver, after = [listen(router, "a") for _ in range(3)]

    def leave() -> None:
        router.leave(leaver)
        leaver.outbox.seal()

    router.leave(leaver)
    leaver.outbox = make_outbox(router.office, max_messages=0, on_slow=leave)
    leaver.outbox.blocked = True  # its stream takes no more
    router.subscribe(subscription(leaver, "a"))
    (listeners,) = router.hub.listeners("a")
    (audience,) = listeners.audiences.values()
    report = Report()
    audience.deliver(attrs.evolve(parcel(b"1"), report=report))
    assert leaver.subscriptions == {}
    report.settle()
    assert (report.matched, report.queued, report.failed) == (3, 2, [leaver.fd])
    assert runs(before) == runs(after) == [[1]]
    audience.deliver(parcel(b"2"))
    assert runs(before) == runs(after) == [[1], [2]]


def test_a_narrowed_audience_is_a_copy_of_those_let_in() -> None:
    one, two = make_peer(1), make_peer(2)
    audience = audience_of(one, two)

    def is_first(member: Subscription) -> bool:
        return member.subscriber is one

    few = audience.narrowed(is_first)
    few.deliver(parcel(b"1"))
    assert (runs(one), runs(two)) == ([["1"]], [])
    audience.deliver(parcel(b"2"))
    assert (runs(one), runs(two)) == ([["1"], ["2"]], [["2"]])
