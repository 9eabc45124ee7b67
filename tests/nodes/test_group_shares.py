"""Queue groups with members on several nodes."""

from collections import Counter
from typing import Any

import trio
from trio.testing import MockClock

from broker.engines.cluster import LEASE_SECONDS
from broker.testing import Bus, BusNode
from tests.conftest import ask
from tests.nodes.conftest import came, join, node, settle

# queue groups


async def test_each_publication_goes_to_one_member_whatever_node_it_is_on(
    autojump_clock: MockClock, one: BusNode, two: BusNode
) -> None:
    members = [await net.open_client() for net in (one, two, two)]
    for peer in members:
        await join(peer, "jobs")
    for number in range(300):
        (one, two)[number % 2].broker.publish_nowait("jobs", number)
    got = [await came(peer) for peer in members]
    assert sorted(number for each in got for number in each) == list(range(300))
    assert all(80 <= len(each) <= 120 for each in got), list(map(len, got))
    for each in got:
        for rest in (0, 1):
            of_one = [number for number in each if number % 2 == rest]
            assert of_one == sorted(of_one), "in the order of their publisher"


async def test_each_group_gets_all_and_so_does_who_is_in_none(
    autojump_clock: MockClock, one: BusNode, two: BusNode
) -> None:
    groups = [await two.open_client(), await two.open_client()]
    for number, peer in enumerate(groups):
        await join(peer, "jobs.*", f"g{number}")
    alone = await one.open_client()
    await ask(alone, {"id": 1, "subscribe": {"channel": "jobs.a"}})
    for number in range(5):
        await one.broker.publish("jobs.a", number)
    for peer in (*groups, alone):
        assert await came(peer) == list(range(5))


async def test_a_member_that_leaves_gets_nothing_more_and_nothing_is_lost(
    autojump_clock: MockClock, one: BusNode, two: BusNode
) -> None:
    """What falls to its node, before the log says that it has left, is passed on."""
    stays, leaves = await one.open_client(), await two.open_client()
    for peer in (stays, leaves):
        await join(peer, "jobs")
    two.engine.lag = 0.05
    for number in range(20):
        one.broker.publish_nowait("jobs", number)
    await leaves.request(unsubscribe={"channel": "jobs"})
    for number in range(20, 40):
        one.broker.publish_nowait("jobs", number)
    await trio.sleep(1)
    assert await came(leaves) == []
    assert sorted(await came(stays)) == list(range(40))
    two.engine.lag = 0.0


async def test_what_nobody_here_wants_is_passed_on(
    autojump_clock: MockClock, one: BusNode, two: BusNode
) -> None:
    picky, other = await one.open_client(), await two.open_client()
    await join(picky, "jobs", tf={"op": "and", "nodes": [{"key": "k", "cmp": "eq", "val": "a"}]})
    await join(other, "jobs", tf={"op": "and", "nodes": [{"key": "k", "cmp": "eq", "val": "b"}]})
    for number in range(20):
        await one.broker.publish("jobs", number, tags={"k": "ab"[number % 2]})
    assert sorted(await came(picky)) == list(range(0, 20, 2))
    assert sorted(await came(other)) == list(range(1, 20, 2))


async def test_what_nobody_anywhere_wants_goes_round_once(
    autojump_clock: MockClock, one: BusNode, two: BusNode
) -> None:
    wanted = {"op": "and", "nodes": [{"key": "k", "cmp": "eq", "val": "a"}]}
    for net in (one, two):
        await join(await net.open_client(), "jobs", tf=wanted)
    told = 0

    class Counting(Bus):
        def tell(self, sender: str, to: str, message: bytes) -> None:
            nonlocal told
            told += 1
            super().tell(sender, to, message)

    one.engine.bus.__class__ = Counting
    for _ in range(10):
        await one.broker.publish("jobs", 1, tags={"k": "b"})
    await settle()
    assert told == 10


async def test_it_is_passed_on_until_somebody_wants_it(
    autojump_clock: MockClock, bus: Bus, one: BusNode, two: BusNode
) -> None:
    def wanting(value: str) -> dict[str, Any]:
        return {"op": "and", "nodes": [{"key": "k", "cmp": "eq", "val": value}]}

    async with node(bus, "three") as three:
        for net, value in ((one, "x"), (two, "x"), (three, "a")):
            peer = await net.open_client()
            await join(peer, "jobs", tf=wanting(value))
        for number in range(20):
            await one.broker.publish("jobs", number, tags={"k": "a"})
        assert sorted(await came(peer)) == list(range(20))


async def test_the_share_of_a_dead_node_falls_to_the_others_when_that_is_known(
    autojump_clock: MockClock, bus: Bus, one: BusNode
) -> None:
    stays = await one.open_client()
    await join(stays, "jobs")
    async with node(bus, "two") as two:
        await join(await two.open_client(), "jobs")
        two.kill()
        for number in range(40):
            one.broker.publish_nowait("jobs", number)
        lost = 40 - len(await came(stays))
        assert 10 < lost < 30, "as the docs say"
        await trio.sleep(LEASE_SECONDS + 4)
        for number in range(40):
            one.broker.publish_nowait("jobs", number)
        assert await came(stays) == list(range(40))


async def test_groups_are_told_anew_to_a_store_that_lost_them(
    autojump_clock: MockClock, bus: Bus, one: BusNode, two: BusNode
) -> None:
    members = [await net.open_client() for net in (one, two)]
    for peer in members:
        await join(peer, "jobs")
    bus.lose_all()
    await settle()
    for number in range(40):
        one.broker.publish_nowait("jobs", number)
    got = [await came(peer) for peer in members]
    assert sorted(number for each in got for number in each) == list(range(40))
    assert all(each for each in got)


async def test_a_reader_of_the_program_is_a_member(
    autojump_clock: MockClock, one: BusNode, two: BusNode
) -> None:
    async with (
        one.broker.subscribe("jobs", group="g") as here,
        two.broker.subscribe("jobs", group="g") as there,
    ):
        await settle()
        for number in range(20):
            one.broker.publish_nowait("jobs", number)
        await settle()
        got: Counter[int] = Counter()
        for reader in (here, there):
            with trio.move_on_after(0.1):
                async for publication in reader:
                    got[publication.value] += 1  # type: ignore[index]
        assert got == Counter(range(20))


async def test_readers_are_told_anew_to_a_store_that_lost_them(
    autojump_clock: MockClock, bus: Bus, one: BusNode
) -> None:
    async with one.broker.subscribe("jobs", group="g") as reader:
        await settle()
        bus.lose_all()
        await settle()
        one.broker.publish_nowait("jobs", 1)
        with trio.fail_after(1):
            assert (await reader.receive()).value == 1


# requests


# reports
