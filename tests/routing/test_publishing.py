"""Publish with options: exclude fds, report, key, retain."""

import trio
import trio.testing
from trio.testing import MockClock

from broker import (
    Broker,
    Config,
)
from broker.testing import Peer, handshake, open_test_broker
from tests.conftest import received, served, subscribe
from tests.routing.conftest import PRICEY, receive_pushes


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
        net.broker.publish("news", 1, exclude=Listed([peers[0].fd, peers[2].fd]))
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
                delivery = broker.publish("news", "x")
                assert (delivery.matched, delivery.queued, delivery.failed) == (2, 2, ())
                while not delivery.failed:
                    delivery = broker.publish("news", "x" * 50_000)
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
        cheap = net.broker.publish("news", 1, tags={"price": "1"})
        assert (cheap.matched, cheap.queued, cheap.dropped) == (1, 1, 0)
        dear = net.broker.publish("news", 101, tags={"price": "101"}, exclude=[other.fd])
        assert (dear.matched, dear.queued, dear.dropped) == (2, 2, 0)
        for peer in (picky, member):
            (push,) = await receive_pushes(peer, 1)
            assert push["pub"]["data"] == 101
        assert net.broker.publish("news", 102, exclude=[picky.fd]).matched == 1
        pushes = await receive_pushes(other, 2)
        assert [push["pub"]["data"] for push in pushes] == [1, 102]
