"""Queue groups at work: turns, members that are slow or gone, and what a group does not get."""

from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock, lockstep_stream_pair, wait_all_tasks_blocked

from broker import (
    Broker,
    Config,
    Refused,
    TopicRules,
)
from broker.core.messages import Publication
from broker.core.queue_group import QueueGroup
from broker.core.session import Parcel, PhaseEvent, Report
from broker.core.tags import CompiledFilter, FilterNode
from broker.protocols.plain import PLAIN
from broker.routing.queue_groups import GroupRecipient
from broker.routing.recipients import Peer
from broker.testing import open_test_broker
from broker.transport.postman import PostOffice
from tests.conftest import done, next_pub, received, served, subscribe
from tests.routing.conftest import PRICEY, make_outbox, receive_pushes, runs, subscription


async def test_each_publication_goes_to_one_member_in_turn(autojump_clock: MockClock) -> None:
    async with served() as net:
        workers = [await net.open_client() for _ in range(3)]
        for worker in workers:
            await subscribe(worker, "jobs", "workers")
        everybody = await net.open_client()
        await subscribe(everybody, "jobs")
        publisher = await net.open_client()
        # In one message, so in one run.
        await publisher.send_json(*({"publish": {"channel": "jobs", "data": n}} for n in range(6)))
        await wait_all_tasks_blocked()
        assert [await received(net, worker) for worker in workers] == [[0, 3], [1, 4], [2, 5]]
        assert await received(net, everybody) == [0, 1, 2, 3, 4, 5]


async def test_each_group_gets_all_and_patterns_have_groups_too(
    autojump_clock: MockClock,
) -> None:
    async with served() as net:
        a, b = await net.open_client(), await net.open_client()
        await subscribe(a, "jobs.*", "workers")
        await subscribe(b, "jobs.x", "auditors")
        for n in (1, 2):
            net.broker.publish_nowait("jobs.x", n)
        assert await received(net, a) == [1, 2]
        assert await received(net, b) == [1, 2]


async def test_a_member_that_is_gone_or_slow_is_passed_over(autojump_clock: MockClock) -> None:
    async with served(outbox_bytes=4000, ping_seconds=1000) as net:
        gone, quick = await net.open_client(), await net.open_client()
        slow = await net.open_client(make_pair=lockstep_stream_pair)
        for member in (gone, slow, quick):
            await subscribe(member, "jobs", "workers")
        await gone.aclose()
        await wait_all_tasks_blocked()
        for n in range(20):
            net.broker.publish_nowait("jobs", str(n) * 500)
            await wait_all_tasks_blocked()
            if n > 8:
                assert await next_pub(quick)
        # The slow one got some until it was seen to be slow, and is still here.
        assert net.broker.is_established(slow.fd)
        slow_outbox = net.outbox(slow.fd)
        assert 0 < slow_outbox.bytes <= 4000


async def test_with_only_slow_members_the_one_with_least_to_do_gets_it(
    autojump_clock: MockClock,
) -> None:
    async with served(outbox_bytes=10_000, ping_seconds=1000) as net:
        peers = [await net.open_client(make_pair=lockstep_stream_pair) for _ in "ab"]
        for peer in peers:
            await subscribe(peer, "jobs", "workers")
        reports = []
        for _ in range(10):
            reports.append(await net.broker.publish("jobs", "x" * 1500))
            await wait_all_tasks_blocked()
        assert all(each.queued == 1 for each in reports)
        waiting = [net.outbox(peer.fd).bytes for peer in peers]
        assert all(bytes_ > 5000 for bytes_ in waiting)


async def test_a_member_neither_recovers_nor_gets_retained_values(
    autojump_clock: MockClock,
) -> None:
    async with served() as net:
        net.broker.publish_nowait("jobs", 1, retain=True)
        peer = await net.open_client()
        got = await subscribe(peer, "jobs", "workers", recoverable=True, recover=True)
        assert "recoverable" not in got
        assert "publications" not in got
        assert await received(net, peer) == []


async def test_a_reader_in_this_program_may_be_a_member(autojump_clock: MockClock) -> None:
    async with served() as net, net.broker.subscribe("jobs", group="workers") as messages:
        peer = await net.open_client()
        await subscribe(peer, "jobs", "workers")
        for n in range(4):
            net.broker.publish_nowait("jobs", n)
        assert [(await messages.receive()).value for _ in "12"] == [0, 2]
        assert await received(net, peer) == [1, 3]


async def test_exclude_holds_within_a_group(autojump_clock: MockClock) -> None:
    async with served() as net:
        a, b = await net.open_client(), await net.open_client()
        for peer in (a, b):
            await subscribe(peer, "jobs", "workers")
        for n in range(3):
            await done(a, "publish", topic="jobs", data=n, echo=False)
        assert await received(net, b) == [0, 1, 2]
        both = await done(a, "publish", topic="jobs", data=1, exclude=[a.fd, b.fd], report=True)
        assert both == {"matched": 1, "queued": 0, "dropped": 1, "failed": []}


async def test_a_member_of_a_group_gets_what_it_picks(autojump_clock: object) -> None:
    async with open_test_broker(Broker()) as net:
        picky, other = await net.open_client(), await net.open_client()
        group = {"data": {"group": "workers"}}
        await picky.request(subscribe={"channel": "jobs", "tf": PRICEY, **group})
        for n in (1, 2):  # for nobody
            net.broker.publish_nowait("jobs", n, tags={"price": str(n)})
        await other.request(subscribe={"channel": "jobs", **group})
        for n in (101, 3, 4, 102, 5):
            net.broker.publish_nowait("jobs", n, tags={"price": str(n)})
        for peer, data in ((picky, [101, 102]), (other, [3, 4, 5])):
            pushes = await receive_pushes(peer, len(data))
            assert [push["pub"]["data"] for push in pushes] == data
        await other.request(unsubscribe={"channel": "jobs"})
        # A publication that nobody picks is for nobody, also when a client publishes it.
        await other.request(publish={"channel": "jobs", "data": 6})
        # A request asks a member that picks it: it carries `reply_to`, and no price.
        with pytest.raises(Refused, match="503"):
            await net.broker.request("jobs", 1)
        only_requests = {"key": "reply_to", "cmp": "ex"}
        await other.request(subscribe={"channel": "jobs", "tf": only_requests, **group})
        with trio.move_on_after(1):
            await net.broker.request("jobs", 7)
        (push,) = await receive_pushes(other, 1)
        assert push["pub"]["data"] == 7
        net.broker.push(picky.fd, "end")
        (push,) = await receive_pushes(picky, 1)
        assert "message" in push


async def test_a_member_of_a_group_that_the_rules_make_recoverable_is_not(
    autojump_clock: object,
) -> None:
    config = Config(topics=TopicRules(force_recovery=True))
    async with open_test_broker(Broker(config)) as net:
        peer = await net.open_client()
        alone = await peer.request(subscribe={"channel": "a"})
        assert alone["subscribe"]["recoverable"]
        member = await peer.request(subscribe={"channel": "b", "data": {"group": "workers"}})
        assert member["subscribe"] == {}


# by itself


def member(fd: int, group: QueueGroup, wanted: CompiledFilter | None = None) -> Peer:
    """A new member of a group: a peer that keeps up."""
    office = PostOffice()
    peer = Peer(fd, office=office, codec=PLAIN)
    peer.outbox = make_outbox(office)
    peer.transition(PhaseEvent.MESSAGE)
    group.members[peer] = subscription(peer, "jobs", group="workers", wanted=wanted)
    return peer


def crowd(size: int) -> tuple[QueueGroup, list[Peer]]:
    group = QueueGroup()
    return group, [member(fd, group) for fd in range(1, size + 1)]


def chosen(recipient: GroupRecipient, times: int, **of: Any) -> list[int]:
    """The fds of those whose turn it is, one after the other; 0 for nobody."""
    members = [recipient.choose(of.get("tags"), of.get("exclude", ())) for _ in range(times)]
    return [0 if each is None else each.subscriber.fd for each in members]


def test_members_that_keep_up_take_turns() -> None:
    group, peers = crowd(3)
    assert chosen(GroupRecipient(group), 4) == [1, 2, 3, 1]
    peers[1].outbox.blocked = True
    assert chosen(GroupRecipient(group), 3) == [3, 1, 3]
    peers[1].outbox.blocked = False
    assert chosen(GroupRecipient(group), 3) == [2, 1, 3]


def test_only_when_no_member_keeps_up_a_slow_one_gets_it() -> None:
    group, peers = crowd(3)
    for peer, size in zip(peers, (30, 10, 20), strict=True):
        peer.outbox.blocked = True
        peer.take("jobs", [Publication("jobs", b"1" * size)], "close")
    assert chosen(GroupRecipient(group), 2) == [2, 2]  # the one with least to do
    peers[1].outbox.seal()
    assert chosen(GroupRecipient(group), 1) == [3]


def test_a_member_that_is_closing_left_out_or_not_admitted_gets_nothing() -> None:
    group, peers = crowd(4)
    peers[0].transition(PhaseEvent.CLOSE)
    peers[1].outbox.seal()
    recipient = GroupRecipient(group, lambda each: each.subscriber is not peers[2])
    assert chosen(recipient, 2) == [4, 4]
    assert chosen(recipient, 1, exclude=(4,)) == [0]
    assert chosen(GroupRecipient(QueueGroup()), 1) == [0]


def test_a_member_gets_what_it_picks() -> None:
    group = QueueGroup()
    member(1, group, CompiledFilter(FilterNode(key="a", cmp="ex")))
    member(2, group, CompiledFilter(FilterNode(key="a", cmp="nex")))
    assert chosen(GroupRecipient(group), 2, tags={"a": "1"}) == [1, 1]
    assert chosen(GroupRecipient(group), 2) == [2, 2]


@pytest.mark.parametrize(
    "data, exclude, matched, queued",
    [
        ((b"1",), (), 1, 1),
        ((b"1", b"2"), (), 1, 2),
        ((b"1",), (1,), 1, 1),
        ((b"1",), (1, 2), 1, 0),  # it was meant for the group, of whom nobody is left
    ],
)
def test_a_group_counts_as_one(
    data: tuple[bytes, ...], exclude: tuple[int, ...], matched: int, queued: int
) -> None:
    group, peers = crowd(2)
    report = Report()
    publications = [Publication("jobs", each) for each in data]
    parcel = Parcel("jobs", "close", [publications], frozenset(exclude), report)
    GroupRecipient(group).deliver(parcel)
    assert (report.matched, report.queued, report.failed) == (matched, queued, [])
    assert sum(len(run.frames) for peer in peers for run in peer.outbox.mail) == queued


def test_those_who_want_none_of_it_make_no_match() -> None:
    group = QueueGroup()
    picky = member(1, group, CompiledFilter(FilterNode(key="a", cmp="ex")))
    report = Report()
    GroupRecipient(group).deliver(
        Parcel("jobs", "close", [[Publication("jobs", b"1")]], report=report)
    )
    assert report.matched == 0
    assert picky.outbox.mail == []


def test_a_run_is_dealt_out_as_one_share_each() -> None:
    group, peers = crowd(2)
    batches = [[Publication("jobs", b"%d" % n)] for n in range(5)]
    GroupRecipient(group).deliver(Parcel("jobs", "close", [*batches]))
    assert [runs(peer) for peer in peers] == [[["0", "2", "4"]], [["1", "3"]]]
