"""The counters of several nodes as those of one broker."""

import pytest
import trio
from trio.testing import MockClock

from broker.http.sums import whole
from broker.routing.neighbours import NodeInfo
from broker.session.views import Seen
from broker.testing import Bus, BusNode
from tests.nodes.conftest import api, node, settle


async def test_counters_are_summed_and_each_node_has_its_own(
    autojump_clock: MockClock, one: BusNode, two: BusNode
) -> None:
    ann, bob, eve = [await net.open_client() for net in (one, two, two)]
    for peer in (ann, bob):
        await peer.request(subscribe={"channel": "t"})
    await bob.request(publish={"channel": "t", "data": 1})
    await two.broker.cluster.disconnect(eve.fd, 4001, "enough")
    await settle()
    await eve.aclose()
    await trio.sleep(10)
    stats = await api(one, "stats", rows=5)
    assert (stats["node"], stats["connections"], stats["subscriptions"]) == ("one", 2, 2)
    assert (stats["published"], stats["delivered"]) == (1, 2)
    assert [(row["node"], row["alive"], row["connections"]) for row in stats["nodes"]] == [
        ("one", True, 1),
        ("two", True, 1),
    ]
    assert sum(stats["queues"]["bytes"]["counts"]) == 2
    assert sum(row["count"] for row in stats["connections_by"]) == 2
    assert len(stats["connections_by"]) == 1
    assert {row["fd"]: row["node"] for row in stats["heaviest"]} == {ann.fd: "one", bob.fd: "two"}
    (ended,) = stats["closed_last"]
    assert (ended["fd"], ended["node"], ended["reason"]) == (eve.fd, "two", "enough")
    alone = await api(one, "stats", node="two")
    assert (alone["node"], alone["connections"], len(alone["nodes"])) == ("two", 1, 1)
    assert await api(one, "stats", node="three") == 107
    assert await api(one, "stats", rows=101) == 107


async def test_a_node_that_does_not_answer_is_named_and_the_others_are_told(
    autojump_clock: MockClock, bus: Bus, one: BusNode, two: BusNode
) -> None:
    async with node(bus, "three") as three:
        await three.open_client()
        two.cut()
        began = trio.current_time()
        stats = await api(one, "stats")
        assert trio.current_time() - began == pytest.approx(2, abs=0.1)
        rows = [(row["node"], row["alive"]) for row in stats["nodes"]]
        assert rows == [("one", True), ("three", True), ("two", False)]
        assert "does not answer" in stats["nodes"][2]["reason"]
        assert stats["connections"] == 1
        assert await api(one, "stats", node="two") == 100
        two.mend()


def histogram(bounds: list[float], counts: list[int]) -> bytes:
    fields = f'"bounds":{bounds},"counts":{counts},"count":{sum(counts)},"sum":1.5'
    return b'{"node":"n","version":"1","uptime":1,"draining":false,"lag":{%b}}' % fields.encode()


def test_histograms_of_two_versions_are_summed_by_the_bounds_that_both_have() -> None:
    first, other = histogram([1, 2, 5], [1, 2, 3, 4]), histogram([0.5, 2, 7], [10, 20, 30, 40])
    found = whole([Seen(NodeInfo("1", "a"), first), Seen(NodeInfo("2", "b"), other)], 0)
    assert found["lag"] == {"bounds": [2], "counts": [33, 77], "count": 110, "sum": 3.0}
