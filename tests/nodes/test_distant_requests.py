"""Requests that are answered on another node."""

from collections import Counter

import trio
from trio.testing import MockClock

from broker.engines.cluster import LEASE_SECONDS
from broker.testing import Bus, BusNode, Peer
from tests.conftest import done, next_pub, rpc
from tests.nodes.conftest import join, node, settle


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
