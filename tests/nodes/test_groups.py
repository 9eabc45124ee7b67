"""Queue groups, requests and reports over nodes."""

from collections import Counter
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from broker import Refused
from broker.engines.cluster import LEASE_SECONDS
from broker.testing import Bus, BusNode, Peer
from tests.conftest import ask, code_of, done, next_pub, rpc
from tests.nodes.conftest import came, node, settle
from tests.nodes.test_orders import api


async def join(peer: Peer, topic: str, group: str = "g", **more: Any) -> None:
    subscribe = {"channel": topic, "data": {"group": group}, **more}
    reply = await peer.request(subscribe=subscribe)
    assert "error" not in reply, reply
    await settle()


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


async def test_a_client_of_another_node_answers(
    autojump_clock: MockClock, one: BusNode, two: BusNode
) -> None:
    asker, responder = await one.open_client(token="ann"), await two.open_client()
    data = {"to": f"fd:{responder.fd}", "data": [1]}
    await asker.send_json({"id": 7, "rpc": {"method": "request", "data": data}})
    pub = await next_pub(responder)
    assert (pub["data"], pub["info"]["user"]) == ([1], "ann")
    assert await done(asker, "publish", topic="t", data=1) == {}, "it is free meanwhile"
    assert await done(responder, "reply", reply_to=pub["tags"]["reply_to"], data={"x": 1}) == {}
    assert await asker.receive_json() == {"id": 7, "rpc": {"data": {"x": 1}}}
    await asker.send_json({"id": 8, "rpc": {"method": "request", "data": data}})
    reply_to = (await next_pub(responder))["tags"]["reply_to"]
    await done(responder, "reply", reply_to=reply_to, error={"code": 400, "message": "no"})
    assert await asker.receive_json() == {"id": 8, "error": {"code": 400, "message": "no"}}
    assert (one.open_requests, two.open_requests) == (0, 0)


async def test_a_member_of_a_group_on_another_node_answers(
    autojump_clock: MockClock, bus: Bus, one: BusNode, two: BusNode
) -> None:
    async with node(bus, "three") as three:
        responders = [await net.open_client() for net in (two, three)]
        for peer in responders:
            await join(peer, "sums.*")
        asked: Counter[int] = Counter()

        async def serve(peer: Peer) -> None:
            while True:
                reply_to = (await next_pub(peer))["tags"]["reply_to"]
                asked[peer.fd] += 1
                await done(peer, "reply", reply_to=reply_to, data=peer.fd)

        async with trio.open_nursery() as nursery:
            for peer in responders:
                nursery.start_soon(serve, peer)
            for _ in range(6):
                assert await one.broker.request("sums.a", 1) in asked
            nursery.cancel_scope.cancel()
        assert sorted(asked.values()) == [3, 3]


async def test_a_node_without_a_member_left_has_another_asked(
    autojump_clock: MockClock, bus: Bus, one: BusNode, two: BusNode
) -> None:
    async with node(bus, "three") as three:
        stays, leaves = await two.open_client(), await three.open_client()
        for peer in (stays, leaves):
            await join(peer, "sums")
        one.engine.lag = 1.0  # it does not know yet
        await leaves.request(unsubscribe={"channel": "sums"})
        answers: list[object] = []
        async with trio.open_nursery() as nursery:

            async def ask_once() -> None:
                answers.append(await one.broker.request("sums", 1))

            for _ in range(2):
                nursery.start_soon(ask_once)
            for _ in range(2):
                reply_to = (await next_pub(stays))["tags"]["reply_to"]
                await done(stays, "reply", reply_to=reply_to, data="yes")
        assert answers == ["yes", "yes"]
        one.engine.lag = 0.0


async def test_nobody_waits_for_one_that_is_not_there(
    autojump_clock: MockClock, bus: Bus, one: BusNode
) -> None:
    asker = await one.open_client()
    assert (await rpc(asker, "request", to="fd:99999", data=1))["error"]["code"] == 503
    assert (await rpc(asker, "request", to="sums", data=1))["error"]["code"] == 503
    async with node(bus, "two") as two:
        gone, dies = await two.open_client(), await two.open_client()
        for peer in (gone, dies):
            data = {"to": f"fd:{peer.fd}", "data": 1, "seconds": 60}
            await asker.send_json({"id": 7, "rpc": {"method": "request", "data": data}})
            await next_pub(peer)
        await gone.aclose()
        assert (await asker.receive_json())["error"]["code"] == 503
        assert (await rpc(asker, "request", to=f"fd:{gone.fd}", data=1))["error"]["code"] == 503
        two.kill()
        await trio.sleep(LEASE_SECONDS + 4)
        assert (await asker.receive_json())["error"]["code"] == 503
    assert one.open_requests == 0


async def test_a_request_ends_when_its_time_is_over_and_is_taken_back(
    autojump_clock: MockClock, one: BusNode, two: BusNode
) -> None:
    asker, silent = await one.open_client(), await two.open_client()
    to = f"fd:{silent.fd}"
    reply = await rpc(asker, "request", to=to, data=1, seconds=3)
    assert reply["error"]["code"] == 504
    with trio.move_on_after(1):
        await one.broker.request(to, 1)
    data = {"to": to, "data": 1}
    await asker.send_json({"id": 7, "rpc": {"method": "request", "data": data}})
    await settle()
    assert two.open_requests == 1
    await asker.aclose()
    await settle()
    assert (one.open_requests, two.open_requests) == (0, 0)


async def test_requests_of_a_node_that_died_wait_for_nothing(
    autojump_clock: MockClock, bus: Bus, one: BusNode
) -> None:
    responder = await one.open_client()
    async with node(bus, "two") as two:
        asker = await two.open_client()
        data = {"to": f"fd:{responder.fd}", "data": 1, "seconds": 60}
        await asker.send_json({"id": 7, "rpc": {"method": "request", "data": data}})
        await next_pub(responder)
        two.kill()
        assert one.open_requests == 1
        await trio.sleep(LEASE_SECONDS + 4)
        assert one.open_requests == 0


# reports


async def test_a_report_counts_all_nodes(
    autojump_clock: MockClock, one: BusNode, two: BusNode
) -> None:
    ann, bob = await one.open_client(token="ann"), await two.open_client(token="bob")
    for peer in (ann, bob):
        await ask(peer, {"id": 1, "subscribe": {"channel": "t"}})
    await join(await two.open_client(), "t")
    delivery = await one.broker.publish("t", 1, report=True)
    assert (delivery.matched, delivery.queued, delivery.complete) == (3, 3, True)
    assert delivery.position is not None
    assert (await one.broker.publish("t", 1)).matched == 1
    report = await done(ann, "publish", topic="t", data=1, report=True)
    assert report == {"matched": 3, "queued": 3, "dropped": 0, "failed": []}
    result = await api(one, "publish", channel="user:bob", data=1, report=True)
    assert (result["matched"], result["queued"]) == (1, 1)
    result = await api(one, "publish", channel=f"fd:{bob.fd}", data=1, report=True)
    assert (result["matched"], result["queued"]) == (1, 1)
    delivery = await one.broker.publish("nobody", 1, report=True)
    assert (delivery.matched, delivery.complete) == (0, True)


async def test_a_report_does_not_wait_for_a_node_that_has_gone(
    autojump_clock: MockClock, one: BusNode, two: BusNode
) -> None:
    two.engine.lag = 0.5
    before = trio.current_time()
    async with trio.open_nursery() as nursery:

        async def leave() -> None:
            await trio.sleep(0.1)
            one.bus.leave(two.engine.node)

        nursery.start_soon(leave)
        assert (await one.broker.publish("t", 1, report=True)).complete
    assert trio.current_time() - before < 0.2
    two.engine.lag = 0.0


async def test_a_report_without_a_node_says_so(
    autojump_clock: MockClock, bus: Bus, one: BusNode, two: BusNode
) -> None:
    ann, bob = await one.open_client(), await two.open_client()
    for peer in (ann, bob):
        await ask(peer, {"id": 1, "subscribe": {"channel": "t"}})
    two.cut()
    before = trio.current_time()
    report = await done(ann, "publish", topic="t", data=1, report=True)
    assert report == {"matched": 1, "queued": 1, "dropped": 0, "failed": [], "complete": False}
    assert trio.current_time() - before == pytest.approx(1, abs=0.1)
    two.mend()
    async with node(bus, "three") as three:
        three.kill()
        await trio.sleep(LEASE_SECONDS + 4)
        delivery = await one.broker.publish("t", 1, report=True)
        assert (delivery.matched, delivery.complete) == (2, True)
    one.cut()
    with pytest.raises(Refused):
        await one.broker.publish("t", 1, report=True)
    one.mend()
    assert await code_of(ann, publish={"channel": "t", "data": 1}) == 0
