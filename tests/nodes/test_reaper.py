"""The burial of a dead node: its clients have left, its wills are published, readers of events are told."""

from collections.abc import Sequence

import pytest
import trio
from trio.testing import MockClock

from broker import Broker, Config, TopicRules
from broker.core.event_queue import Event
from broker.engines.cluster import LEASE_SECONDS, Card
from broker.testing import Bus, BusNode, name_users_by_token, open_test_node
from tests.conftest import ask
from tests.nodes.conftest import DEAD, Backend, came, node, present, seen, settle, watch


async def test_the_clients_of_a_node_that_died_have_left(
    autojump_clock: MockClock, bus: Bus, one: BusNode
) -> None:
    ann = await one.open_client(token="ann")
    await watch(ann, "t")
    async with node(bus, "two") as two:
        bob = await two.open_client(token="bob")
        await ask(bob, {"id": 1, "subscribe": {"channel": "t"}})
        assert seen(await came(ann)) == [("join", "bob")]
        two.kill()
        await trio.sleep(LEASE_SECONDS - 2)
        assert set(await present(ann, "t")) == {str(ann.fd), str(bob.fd)}
        await trio.sleep(6)
        assert seen(await came(ann)) == [("leave", "bob")]
        assert await present(ann, "t") == {str(ann.fd): "ann"}
        assert await one.broker.cluster.fds_of("bob") == []
        assert len(bus.seats) == 1, "nothing is left of it"


async def test_a_will_of_a_killed_node_is_published_once(
    autojump_clock: MockClock, bus: Bus, one: BusNode
) -> None:
    ann = await one.open_client(token="ann")
    await ask(ann, {"id": 1, "subscribe": {"channel": "t"}})
    async with node(bus, "two") as two, node(bus, "three") as three:
        bob, eve = await two.open_client(token="bob"), await two.open_client(token="eve")
        carl = await three.open_client(token="carl")
        for peer, data in ((bob, "bob's"), (eve, "eve's"), (carl, "carl's")):
            will = {"topic": "t", "data": data, "retain": peer is bob}
            assert "rpc" in await peer.request(rpc={"method": "will", "data": will})
        await eve.request(rpc={"method": "will", "data": {}})
        two.kill()
        await trio.sleep(DEAD)
        pushes = [each["push"]["pub"] for each in await ann.receive_all()]
        assert [(each["data"], each["info"]["user"]) for each in pushes] == [("bob's", "bob")]
        newcomer = await three.open_client()
        (_, push) = await ask(newcomer, {"id": 1, "subscribe": {"channel": "t"}})
        assert push["push"]["pub"]["data"] == "bob's"


@pytest.mark.parametrize(
    ("topic", "user", "rules", "is_published"),
    [
        ("t", "", TopicRules(), True),
        ("t", "", TopicRules(may_publish="users"), False),
        ("t", "bob", TopicRules(may_publish="users"), True),
        ("t", "bob", TopicRules(may_publish="none"), False),
        ("t", "bob", TopicRules(may_publish="subscribers"), True),
    ],
)
async def test_a_will_of_a_killed_node_is_published_by_the_rules_of_then(
    autojump_clock: MockClock,
    bus: Bus,
    one: BusNode,
    topic: str,
    user: str,
    rules: TopicRules,
    is_published: bool,
) -> None:
    reader = await one.open_client(token="reader")
    await reader.request(subscribe={"channel": topic})
    async with node(bus, "two") as two:
        peer = await two.open_client(token=user)
        assert "rpc" in await peer.request(
            rpc={"method": "will", "data": {"topic": topic, "data": 1}}
        )
        two.kill()
        one.broker.reload(Config(name="one", topics=rules))
        await trio.sleep(DEAD)
        assert await came(reader) == [1] * is_published


async def test_a_direct_will_of_a_killed_node_is_for_who_may_send_then(
    autojump_clock: MockClock, bus: Bus, one: BusNode
) -> None:
    reader = await one.open_client(token="reader")
    async with node(bus, "two") as two:
        for name in ("", "bob"):
            peer = await two.open_client(token=name)
            will = {"topic": f"fd:{reader.fd}", "data": name}
            assert "rpc" in await peer.request(rpc={"method": "will", "data": will})
        two.kill()
        one.broker.reload(Config(name="one", may_send="users"))
        await trio.sleep(DEAD)
        assert await came(reader) == ["bob"]


async def test_a_will_is_published_once_though_the_node_that_did_so_dies_before_it_is_cleared(
    autojump_clock: MockClock, bus: Bus, one: BusNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    clearing = trio.Event()

    async def never_get_to_it(node: str, cards: Sequence[Card]) -> None:
        clearing.set()
        await trio.sleep_forever()

    monkeypatch.setattr(one.engine, "clear", never_get_to_it)
    async with node(bus, "two") as two, node(bus, "three") as three:
        ann, bob = await two.open_client(token="ann"), await three.open_client(token="bob")
        await ask(ann, {"id": 1, "subscribe": {"channel": "t"}})
        await bob.request(rpc={"method": "will", "data": {"topic": "t", "data": "bob's"}})
        two.engine.beating_since = trio.current_time() + 5  # and so is not the first
        three.kill()
        with trio.fail_after(DEAD):
            await clearing.wait()
        assert await came(ann) == ["bob's"]
        one.kill()
        await trio.sleep(DEAD)
        assert bus.seats.keys() == {two.engine.node}, "it has gone on with that"
        assert await came(ann) == []


async def test_two_nodes_bury_a_dead_one_once(
    autojump_clock: MockClock, bus: Bus, one: BusNode, two: BusNode
) -> None:
    watchers = [await net.open_client(token=f"w{n}") for n, net in enumerate((one, two))]
    for peer in watchers:
        await watch(peer, "t")
    async with node(bus, "three") as three:
        bob = await three.open_client(token="bob")
        await ask(bob, {"id": 1, "subscribe": {"channel": "t"}})
        for peer in watchers:
            await peer.receive_all()
        three.kill()
        await trio.sleep(DEAD)
        for peer in watchers:
            assert seen(await came(peer)) == [("leave", "bob")]


async def test_another_goes_on_when_the_one_that_buries_dies(
    autojump_clock: MockClock, bus: Bus, one: BusNode
) -> None:
    ann = await one.open_client(token="ann")
    await watch(ann, "t")
    async with node(bus, "two") as two, node(bus, "three") as three:
        for name, net in (("bob", two), ("eve", three)):
            peer = await net.open_client(token=name)
            await ask(peer, {"id": 1, "subscribe": {"channel": "t"}})
        await ann.receive_all()
        two.engine.lag = 60.0  # it never gets to what it is told to do
        one.engine.beating_since = trio.current_time() + 5  # and so is not the first
        three.kill()
        await trio.sleep(DEAD)
        (dead,) = [seat for seat in bus.seats.values() if seat.is_dead]
        assert dead.buried_by == two.engine.node
        assert seen(await came(ann)) == []
        two.kill()
        await trio.sleep(DEAD)
        assert sorted(seen(await came(ann))) == [("leave", "bob"), ("leave", "eve")]
        assert len(bus.seats) == 1


async def test_the_backend_is_told_of_a_node_that_died(autojump_clock: MockClock, bus: Bus) -> None:
    backend = Backend()
    async with open_test_node(bus, backend.broker("one")) as one:
        async with open_test_node(bus, backend.broker("two")) as two:
            await two.open_client(token="bob")
            await settle()
            (started,) = [each for each in backend.take("started") if each.node == "two"]
            two.kill()
            await trio.sleep(DEAD)
            (died,) = backend.take("died")
            assert (died.node, died.dead, died.dead_epoch) == ("one", "two", started.epoch)
            assert died.epoch != started.epoch
            assert len(bus.seats) == 1
        assert one.node.router.events is not None
    await settle()


async def test_a_burial_lasts_until_the_backend_was_told(
    autojump_clock: MockClock, bus: Bus
) -> None:
    """So another node tells it, if this one dies with the event in its queue."""
    backend, silent = Backend(), name_users_by_token(Broker(Config(name="one")))
    heard = trio.Event()

    @silent.on_event
    async def hang(event: Event) -> None:
        if event.kind == "died":
            heard.set()
            await trio.sleep_forever()

    async with open_test_node(bus, silent) as one:
        async with open_test_node(bus, backend.broker("two")) as two:
            async with open_test_node(bus, backend.broker("three")) as three:
                two.engine.beating_since = trio.current_time() + 5  # so it is not the first
                three.kill()
                await heard.wait()
                await trio.sleep(5)
                assert len(bus.seats) == 3
                one.kill()
                await trio.sleep(2 * DEAD)
                assert {each.dead for each in backend.take("died")} == {"one", "three"}
                assert bus.seats.keys() == {two.engine.node}


async def test_a_node_that_stops_in_good_order_has_not_died(
    autojump_clock: MockClock, bus: Bus
) -> None:
    backend = Backend()
    async with open_test_node(bus, backend.broker("one")) as one:
        async with open_test_node(bus, backend.broker("two")) as two:
            await two.open_client(token="bob")
        await trio.sleep(DEAD)
        assert backend.take("died") == []
        assert one.engine.bus.seats.keys() == {one.engine.node}
