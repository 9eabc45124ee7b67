"""The roster: presence over nodes, and cards that are filed anew."""

import trio
from trio.testing import MockClock

from broker import TopicRules
from broker.testing import Bus, BusNode
from tests.conftest import ask, code_of
from tests.nodes.conftest import DEAD, came, node, present, settle, watch


async def test_presence_is_that_of_all_nodes(
    autojump_clock: MockClock, one: BusNode, two: BusNode
) -> None:
    ann, bob = await one.open_client(token="ann"), await two.open_client(token="bob")
    for peer in (ann, bob):
        await ask(peer, {"id": 1, "subscribe": {"channel": "t"}})
        assert await present(peer, "t")
    everybody = {str(ann.fd): "ann", str(bob.fd): "bob"}
    assert await present(ann, "t") == await present(bob, "t") == everybody
    assert {each.user for each in (await one.broker.presence("t")).values()} == {"ann", "bob"}
    stats = await ann.request(presence_stats={"channel": "t"})
    assert stats["presence_stats"] == {"num_clients": 2, "num_users": 2}
    two.broker.bind(bob.fd, "ann")
    stats = await ann.request(presence_stats={"channel": "t"})
    assert stats["presence_stats"] == {"num_clients": 2, "num_users": 1}
    await bob.request(unsubscribe={"channel": "t"})
    assert await present(ann, "t") == {str(ann.fd): "ann"}
    await ann.aclose()
    await settle()
    assert await present(bob, "t") == {}


async def test_presence_is_asked_within_the_rules_of_the_asker(
    autojump_clock: MockClock, bus: Bus
) -> None:
    rules = {"namespaces": {"off": TopicRules(presence=False)}, "presence_max_clients": 1}
    async with node(bus, "one", **rules) as one:
        ann, bob = await one.open_client(token="ann"), await one.open_client(token="bob")
        for peer in (ann, bob):
            await ask(peer, {"id": 1, "subscribe": {"channel": "t"}})
        assert await code_of(ann, presence={"channel": "t"}) == 106
        assert await code_of(ann, presence={"channel": "off:t"}) == 108
        assert await code_of(ann, presence={"channel": ""}) == 107
        assert bus.read("in:off:t") == {}


async def test_presence_of_a_store_that_does_not_answer_is_no_empty_one(
    autojump_clock: MockClock, one: BusNode
) -> None:
    ann = await one.open_client()
    one.cut()
    assert await code_of(ann, presence={"channel": "t"}) == 100
    one.mend()


async def test_a_store_that_has_lost_all_is_told_anew(
    autojump_clock: MockClock, bus: Bus, one: BusNode, two: BusNode
) -> None:
    ann, bob = await one.open_client(token="ann"), await two.open_client(token="bob")
    for peer in (ann, bob):
        await watch(peer, "t")
    await bob.request(rpc={"method": "will", "data": {"topic": "t", "data": "my will"}})
    bus.lose_all()
    await settle()
    assert set(await present(ann, "t")) == {str(ann.fd), str(bob.fd)}
    assert await one.broker.cluster.fds_of("bob") == [bob.fd]
    assert await code_of(ann, publish={"channel": f"fd:{bob.fd}", "data": "hi"}) == 0
    assert await code_of(ann, publish={"channel": "user:bob", "data": "hi"}) == 0
    await came(ann)
    fds = {ann.fd, bob.fd} | {(await net.open_client()).fd for net in (one, two)}
    async with node(bus, "three") as three:
        fds.add((await three.open_client()).fd)
    assert len(fds) == 5, "no number is given out twice"
    two.kill()
    await trio.sleep(DEAD)
    assert "my will" in await came(ann)
