"""Of a broker alone, the cluster is this node."""

import pytest
from trio.testing import MockClock

from broker import Broker, Refused
from broker.testing import BusNode, open_test_broker
from tests.conftest import ask
from tests.nodes.conftest import came, settle


async def test_orders_reach_connections_of_any_node(
    autojump_clock: MockClock, one: BusNode, two: BusNode
) -> None:
    cluster = one.broker.cluster
    for net in (one, two):
        peer = await net.open_client(token="ann")
        fd = peer.fd
        assert await cluster.add_subscription(fd, "t", data={"a": 1})
        assert not await cluster.add_subscription(fd, "t")
        assert await cluster.end_subscription(fd, "t")
        assert not await cluster.end_subscription(fd, "t")
        assert await cluster.expire(fd, one.broker.wall_clock() + 1000)
        await cluster.bind(fd, "eve")
        assert await cluster.fds_of("eve") == [fd]
        info = await cluster.connection_info(fd)
        assert info is not None
        assert (info.fd, info.user, info.node) == (fd, "eve", net.node.name)
        assert await cluster.disconnect(fd, 4001, "enough")
        assert not await cluster.disconnect(fd, 4001, "enough")
        pushes = await came(peer)
        assert [next(iter(each)) for each in pushes[:2]] == ["channel", "channel"]
        assert pushes[0]["subscribe"]["data"] == {"a": 1}
        assert pushes[-1] == 4001
        assert await cluster.fds_of("eve") == []
        await peer.aclose()
        await settle()
        assert await cluster.connection_info(fd) is None
        with pytest.raises(KeyError):
            await cluster.bind(fd, "x")
    ann = await two.open_client()
    with pytest.raises(Refused, match="107"):
        await cluster.add_subscription(ann.fd, "")
    with pytest.raises(ValueError, match="close code"):
        await cluster.disconnect(1, 1)


async def test_alone_the_cluster_is_this_node(autojump_clock: MockClock) -> None:
    broker = Broker()
    with pytest.raises(RuntimeError, match="not serving"):
        await broker.cluster.nodes()
    async with open_test_broker(broker) as net:
        ann = await net.open_client()
        await ask(ann, {"id": 1, "subscribe": {"channel": "t"}})
        (report,) = await broker.cluster.nodes()
        assert (report.connections, report.alive) == (1, True)
        assert await broker.cluster.topics() == {"t": 1}
        assert [info.node for info in await broker.cluster.connections()] == [""]
        assert not await broker.cluster.disconnect(99)
        assert await broker.cluster.disconnect(ann.fd)
