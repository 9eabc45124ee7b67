"""Reports that count all nodes."""

import pytest
import trio
from trio.testing import MockClock

from broker import Refused
from broker.engines.cluster import LEASE_SECONDS
from broker.testing import Bus, BusNode
from tests.conftest import ask, code_of, done
from tests.nodes.conftest import api, join, node


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
