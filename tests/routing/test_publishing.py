"""Publish with options: exclude fds, report, key, retain."""

from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from broker import (
    Broker,
    Config,
)
from broker.core.idempotency import TTL
from broker.core.messages import Delivery
from broker.core.session import Decider
from broker.errors import Refused
from broker.routing.publishing import Publisher, PublishOptions
from broker.routing.reader import Reader
from broker.testing import Peer, handshake, open_test_broker
from tests.conftest import received, served, subscribe
from tests.routing.conftest import (
    PRICEY,
    attach,
    listen,
    make_router,
    publish,
    receive_pushes,
    runs,
    subscription,
)


async def test_a_long_list_of_the_excluded_costs_each_subscriber_one_look(
    autojump_clock: MockClock,
) -> None:
    class Listed(list[int]):
        def __contains__(self, fd: object) -> bool:
            raise AssertionError("a walk through the list")

    async with served() as net:
        peers = [await net.open_client() for _ in range(4)]
        for peer, data in zip(peers, [{}, {}, {"group": "g"}, {"group": "g"}], strict=True):
            await peer.request(subscribe={"channel": "news", "data": data})
        net.broker.publish_nowait("news", 1, exclude=Listed([peers[0].fd, peers[2].fd]))
        assert [await received(net, peer) for peer in peers] == [[], [1], [], [1]]


async def test_the_report_names_who_failed() -> None:
    """Over a real socket: only the system says that it would not take more."""
    broker = Broker(Config(port=0, host="127.0.0.1", outbox_bytes=100_000, log_level="error"))
    async with trio.open_nursery() as nursery:
        (address,) = await nursery.start(broker.serve)
        with trio.fail_after(30):
            stalled = Peer(await trio.open_tcp_stream("127.0.0.1", int(address.rpartition(":")[2])))
            async with stalled, broker.subscribe("news") as messages:
                await stalled.send(handshake())
                await stalled.receive_head()
                await stalled.request(connect={})
                await subscribe(stalled, "news")
                delivery = await broker.publish("news", "x")
                assert (delivery.matched, delivery.queued, delivery.failed) == (2, 2, ())
                while not delivery.failed:
                    delivery = await broker.publish("news", "x" * 50_000)
                    await trio.lowlevel.checkpoint()
                assert (delivery.matched, delivery.queued, delivery.dropped) == (2, 1, 1)
                assert delivery.failed == (1,)
                assert not broker.is_established(1)
                assert messages.bytes_waiting > 1
        broker.stop()


async def test_a_report_counts_those_who_want_what_was_published(autojump_clock: object) -> None:
    async with open_test_broker(Broker()) as net:
        picky, other, member = [await net.open_client() for _ in range(3)]
        await picky.request(subscribe={"channel": "news", "tf": PRICEY})
        await other.request(subscribe={"channel": "news"})
        group = {"channel": "news", "tf": PRICEY, "data": {"group": "workers"}}
        await member.request(subscribe=group)
        cheap = await net.broker.publish("news", 1, tags={"price": "1"})
        assert (cheap.matched, cheap.queued, cheap.dropped) == (1, 1, 0)
        dear = await net.broker.publish("news", 101, tags={"price": "101"}, exclude=[other.fd])
        assert (dear.matched, dear.queued, dear.dropped) == (2, 2, 0)
        for peer in (picky, member):
            (push,) = await receive_pushes(peer, 1)
            assert push["pub"]["data"] == 101
        assert (await net.broker.publish("news", 102, exclude=[picky.fd])).matched == 1
        pushes = await receive_pushes(other, 2)
        assert [push["pub"]["data"] for push in pushes] == [1, 102]


# by itself


def make_publisher(**rules: Any) -> Publisher:
    return Publisher(make_router(**rules))


def at_once(delivery: Delivery | None) -> Delivery:
    assert delivery is not None, "the memory engine keeps nobody waiting"
    return delivery


async def test_without_options_it_is_fanned_out_at_once_behind_what_came_before() -> None:
    publisher = make_publisher()
    one, other = listen(publisher.router, "a"), listen(publisher.router, "a")
    publish(publisher.router, "a", b"1")
    delivery = publisher.publish("a", b"2")
    assert delivery == Delivery(matched=2, queued=2, dropped=0)
    assert runs(one) == runs(other) == [[1], [2]]


async def test_a_delivery_says_where_the_publication_stands_in_the_history() -> None:
    publisher = make_publisher(history_size=2)
    engine = publisher.router.engine
    for offset in (1, 2, 3):
        position = at_once(publisher.publish("a", b"1")).position
        assert position == engine.position("a")
        assert position is not None
        assert position.offset == offset
    skipped = at_once(publisher.publish("a", b"1", options=PublishOptions(skip_history=True)))
    assert skipped.position is None
    assert engine.position("a").offset == 3
    assert at_once(make_publisher().publish("a", b"1")).position is None


async def test_a_client_is_shown_as_it_is_when_it_publishes() -> None:
    publisher = make_publisher()
    client, reader = attach(publisher.router, user="ann"), Reader(10)
    publisher.router.subscribe(subscription(reader, "a", by=Decider.PROGRAM))
    publisher.publish("a", b"1", client)
    publisher.router.bind(client, "bob")
    publisher.publish("a", b"2", client)
    publisher.publish("a", b"3")
    infos = [(await reader.receive()).info for _ in range(3)]
    assert [info and info.user for info in infos] == ["ann", "bob", None]


async def test_the_excluded_get_nothing_wherever_they_listen() -> None:
    publisher = make_publisher()
    router = publisher.router
    spared, other = listen(router, "a", "*"), listen(router, "a", ">")
    direct = PublishOptions(exclude=(spared.fd,))
    assert at_once(publisher.publish("a", b"1", options=direct)).matched == 2
    to_itself = publisher.publish(f"fd:{spared.fd}", b"2", options=direct)
    assert at_once(to_itself).matched == 0
    assert (runs(spared), runs(other)) == ([], [[1], [1]])


@pytest.mark.parametrize("topic", ["fd:1", "user:ann"])
async def test_nothing_is_retained_where_there_is_no_topic(topic: str) -> None:
    publisher = make_publisher()
    peer = attach(publisher.router, user="ann")
    with pytest.raises(Refused, match=f"107: {topic} retains nothing: it is no topic"):
        publisher.publish(topic, b"1", options=PublishOptions(retain=True))
    assert runs(peer) == []
    assert len(publisher.router.retained) == 0


@pytest.mark.parametrize(
    "topic, code", [("", 107), ("a.*", 107), ("fd:9", 102), ("fd:x", 102), ("user:eve", 102)]
)
async def test_a_publication_to_nobody_that_is_there_is_refused(topic: str, code: int) -> None:
    publisher = make_publisher()
    for key in ("", "k"):
        for _ in range(2):  # a refusal is not kept with its key
            with pytest.raises(Refused, match=str(code)):
                publisher.publish(topic, b"1", options=PublishOptions(key=key))
    assert publisher.router.published == 0


# keys


async def test_a_key_is_its_publishers_own_and_its_topics() -> None:
    publisher = make_publisher(history_size=10)
    router = publisher.router
    keyed = PublishOptions(key="k")
    ann, phone, bob = [attach(router, user=user) for user in ("ann", "ann", "bob")]
    nobody, stranger = attach(router), attach(router)
    publishers = (ann, bob, nobody, stranger, None)
    first = [at_once(publisher.publish("a", b"1", by, keyed)) for by in publishers]
    assert [each.position and each.position.offset for each in first] == [1, 2, 3, 4, 5]
    # The same once more, ann by another of her connections.
    again = [publisher.publish("a", b"2", by, keyed) for by in (phone, *publishers[1:])]
    assert again == first
    other = at_once(publisher.publish("b", b"1", ann, keyed))
    assert other.position == router.engine.position("b")
    assert router.published == 6


async def test_a_key_counts_for_five_minutes(autojump_clock: MockClock) -> None:
    publisher = make_publisher()
    keyed = PublishOptions(key="k")
    publisher.publish("a", b"1", options=keyed)
    await trio.sleep(TTL - 1)
    publisher.publish("a", b"1", options=keyed)
    assert publisher.router.published == 1
    await trio.sleep(2)
    publisher.publish("a", b"1", options=keyed)
    assert publisher.router.published == 2


async def test_keys_of_an_anonymous_client_go_with_it_and_those_of_a_user_stay() -> None:
    publisher = make_publisher()
    router = publisher.router
    keyed = PublishOptions(key="k")
    gone, alice = attach(router), attach(router, user="alice")
    for _ in range(2):
        for by in (gone, alice):
            publisher.publish("a", b"1", by, keyed)
    assert router.published == 2
    for by in (gone, alice):
        publisher.forget(by)
    publisher.publish("a", b"1", alice, keyed)  # she has come back
    assert router.published == 2
    publisher.publish("a", b"1", gone, keyed)
    assert router.published == 3


@pytest.mark.parametrize("key", ["k" * 256, "é" * 128, "\ud800" * 256])
async def test_a_key_that_is_too_long_publishes_nothing(key: str) -> None:
    publisher = make_publisher()
    with pytest.raises(Refused, match="107: key: more than 255 bytes"):
        publisher.publish("a", b"1", options=PublishOptions(key=key))
    assert publisher.router.published == 0
