"""Presence, joins and leaves over nodes, and what becomes of them when a node dies."""

from collections.abc import Sequence
from typing import Any

import attrs
import pytest
import trio
from trio.testing import MockClock

from broker import Broker, Config, TopicRules
from broker.core.event_queue import Event
from broker.engines.cluster import LEASE_SECONDS, Card
from broker.testing import Bus, BusNode, Peer, name_users_by_token, open_test_node
from tests.conftest import ask, code_of
from tests.nodes.conftest import came, node, settle

DEAD = LEASE_SECONDS + 4
"""By then a node that was killed is buried."""


async def present(peer: Peer, topic: str) -> dict[str, str]:
    """The clients that a client is told of, each with its user."""
    reply = await peer.request(presence={"channel": topic})
    return {fd: info.get("user", "") for fd, info in reply["presence"]["presence"].items()}


async def watch(peer: Peer, topic: str) -> None:
    await ask(peer, {"id": 1, "subscribe": {"channel": topic, "join_leave": True}})


def seen(pushes: list[Any]) -> list[tuple[str, str]]:
    """Who joined and left, by user."""
    return [
        (kind, push[kind]["info"]["user"])
        for push in pushes
        for kind in ("join", "leave")
        if isinstance(push, dict) and kind in push
    ]


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


async def test_who_watches_learns_of_those_on_other_nodes(
    autojump_clock: MockClock, one: BusNode, two: BusNode
) -> None:
    ann = await one.open_client(token="ann")
    await watch(ann, "t")
    bob = await two.open_client(token="bob")
    await ask(bob, {"id": 1, "subscribe": {"channel": "t"}})
    assert seen(await came(ann)) == [("join", "bob")]
    two.broker.bind(bob.fd, "eve")
    assert seen(await came(ann)) == [("leave", "bob"), ("join", "eve")]
    await bob.aclose()
    assert seen(await came(ann)) == [("leave", "eve")]


async def test_a_join_stands_behind_what_was_published_before_it(
    autojump_clock: MockClock, one: BusNode, two: BusNode
) -> None:
    ann, bob = await one.open_client(token="ann"), await two.open_client(token="bob")
    await watch(ann, "t")
    await bob.send_json(
        {"id": 1, "publish": {"channel": "t", "data": 1}},
        {"id": 2, "subscribe": {"channel": "t"}},
        {"id": 3, "publish": {"channel": "t", "data": 2}},
    )
    first, join, second = await came(ann)
    assert (first, second) == (1, 2)
    assert join["join"]["info"]["user"] == "bob"


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


async def test_a_node_that_was_cut_off_for_too_long_begins_anew(
    autojump_clock: MockClock, bus: Bus, one: BusNode, two: BusNode
) -> None:
    """Others were told that its clients have left, so it makes that true; they come back at once."""
    ann, bob = await one.open_client(token="ann"), await two.open_client(token="bob")
    await watch(ann, "t")
    await watch(bob, "t")
    will = {"topic": "t", "data": "my will"}
    await bob.request(rpc={"method": "will", "data": will})
    await came(ann)
    before = two.engine.node
    two.cut()
    await trio.sleep(DEAD)
    told = await came(ann)
    assert seen(told) == [("leave", "bob")]
    assert "my will" in told
    assert await present(ann, "t") == {str(ann.fd): "ann"}
    assert (await bob.receive_all())[-1:] != [3011], "it serves on, as long as it knows of nothing"
    two.mend()
    await trio.sleep(5)
    assert (await bob.receive_all())[-1] == 3011
    assert two.engine.node != before
    assert await came(ann) == [], "neither the leave nor the will is told again"
    again = await two.open_client(token="bob")
    assert again.fd > bob.fd
    await watch(again, "t")
    assert seen(await came(ann)) == [("join", "bob")]
    assert await code_of(ann, publish={"channel": f"fd:{again.fd}", "data": "hi"}) == 0
    assert await code_of(ann, publish={"channel": f"fd:{bob.fd}", "data": "hi"}) == 102
    assert "hi" in await came(again)
    assert [each.name for each in await one.broker.cluster.nodes()] == ["one", "two"]


async def test_a_short_cut_is_not_noticed(
    autojump_clock: MockClock, bus: Bus, one: BusNode, two: BusNode
) -> None:
    ann, bob = await one.open_client(token="ann"), await two.open_client(token="bob")
    await watch(ann, "t")
    two.cut()
    await ask(bob, {"id": 1, "subscribe": {"channel": "t"}})
    await trio.sleep(5)
    two.mend()
    assert await present(ann, "t") == {str(ann.fd): "ann", str(bob.fd): "bob"}
    await trio.sleep(DEAD)
    assert await present(ann, "t") == {str(ann.fd): "ann", str(bob.fd): "bob"}


async def test_an_outage_of_the_store_kills_nobody(
    autojump_clock: MockClock, bus: Bus, one: BusNode, two: BusNode
) -> None:
    ann, bob = await one.open_client(token="ann"), await two.open_client(token="bob")
    for peer in (ann, bob):
        await watch(peer, "t")
    for net in (one, two):
        net.cut()
    await trio.sleep(DEAD)
    for net in (one, two):
        net.mend()
    await trio.sleep(LEASE_SECONDS)
    assert set(await present(ann, "t")) == {str(ann.fd), str(bob.fd)}
    assert await code_of(ann, publish={"channel": f"fd:{bob.fd}", "data": "hi"}) == 0


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


@attrs.define
class Backend:
    """What an app is told of, as `clients/online.py` reads it."""

    events: list[Event] = attrs.field(factory=list)

    def broker(self, name: str) -> Broker:
        broker = name_users_by_token(Broker(Config(name=name)))

        @broker.on_event
        async def note(event: Event) -> None:
            self.events.append(event)

        return broker

    def take(self, *kinds: str) -> list[Event]:
        events, self.events = self.events, []
        return [event for event in events if event.kind in kinds]


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


async def test_a_node_that_was_cut_off_begins_a_new_epoch_of_events(
    autojump_clock: MockClock, bus: Bus
) -> None:
    backend = Backend()
    async with open_test_node(bus, backend.broker("one")):
        async with open_test_node(bus, backend.broker("two")) as two:
            await two.open_client(token="bob")
            await settle()
            (before,) = [each for each in backend.take("started") if each.node == "two"]
            two.cut()
            await trio.sleep(DEAD)
            two.mend()
            await trio.sleep(DEAD)
            events = backend.take("started", "died")
            assert {(each.kind, each.node) for each in events} == {
                ("died", "one"),
                ("started", "two"),
            }
            for each in events:
                if each.kind == "died":
                    assert each.dead_epoch == before.epoch
                else:
                    assert each.epoch != before.epoch
