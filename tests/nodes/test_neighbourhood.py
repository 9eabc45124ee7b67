"""The parts of a node that has neighbours: there from the start, at work while it serves, and gone with it."""

import trio
from trio.testing import MockClock

from broker.routing.neighbourhood import Neighbourhood
from broker.testing import BusNode
from tests.nodes.conftest import settle


def of(net: BusNode) -> Neighbourhood:
    found = net.node.services.neighbourhood
    assert found is not None
    return found


async def test_all_parts_are_where_the_router_asks_for_them(
    autojump_clock: MockClock, one: BusNode
) -> None:
    parts, router = of(one), one.node.router
    assert router.ways is parts.forwarding
    assert router.groups is parts.groups
    assert router.watchers.roster is parts.roster


async def test_another_nodes_work_has_a_task_that_ends_with_the_node(
    autojump_clock: MockClock, one: BusNode
) -> None:
    ended = trio.Event()

    async def work() -> None:
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    of(one).start_soon(work)
    await settle()
    assert not ended.is_set()
    one.broker.stop()
    await ended.wait()


async def test_nothing_is_begun_for_others_before_a_node_runs_or_after(
    autojump_clock: MockClock, one: BusNode
) -> None:
    parts = of(one)
    begun = list[bool]()

    async def work() -> None:
        begun.append(True)

    parts.start_soon(work)
    await settle()
    one.broker.stop()
    await trio.sleep(60)
    parts.start_soon(work)
    await settle()
    assert begun == [True]


async def test_a_node_that_stops_is_gone_for_its_neighbours(
    autojump_clock: MockClock, one: BusNode, two: BusNode
) -> None:
    await settle()
    assert of(two).neighbours.others()
    one.broker.stop()
    await trio.sleep(60)
    assert not of(two).neighbours.others()
