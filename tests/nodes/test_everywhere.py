"""The connections of all nodes, as if they were here: orders to them, and lists of them."""

from functools import partial

import attrs
import pytest
import trio
from trio.testing import MockClock

from broker import Refused
from broker.core.work import (
    CALL,
    COLLECTED,
    COMMAND,
    LOOKED,
    NAMED,
    SHOWN,
    SPARED,
    SURVEYED_AT_ONCE,
)
from broker.http.api import Api
from broker.http.calls import PIECE
from broker.session.everywhere import Everywhere
from broker.testing import BusNode
from tests.nodes.conftest import api, came


async def test_an_order_for_a_connection_that_has_gone_does_nothing(
    autojump_clock: MockClock, one: BusNode, two: BusNode
) -> None:
    ann = await two.open_client(token="ann")
    two.engine.lag = 0.5
    async with trio.open_nursery() as nursery:

        async def order() -> None:
            assert not await one.broker.cluster.disconnect(ann.fd)

        nursery.start_soon(order)
        await trio.sleep(0.1)
        await ann.aclose()
    two.engine.lag = 0.0


async def test_a_key_that_is_taken_away_orders_nothing_more_of_other_nodes(
    autojump_clock: MockClock, one: BusNode, two: BusNode
) -> None:
    """Each order takes half a second here."""
    ann = [await two.open_client(token="ann") for _ in range(PIECE + 1)]
    two.engine.lag = 0.5
    config = attrs.evolve(one.node.config, api_key="a key of today's")
    one.node.reload(config)
    answers = []

    async def ask() -> None:
        share, body = one.node.new_share(), b'{"user":"ann"}'
        answers.append(await Api(one.node).answer("disconnect", body, share, key=config.api_key))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await trio.sleep(0.2)
        one.node.reload(attrs.evolve(config, api_key="tomorrow's"))
    assert [answer.status for answer in answers] == [401]
    two.engine.lag = 0.0
    assert [peer for peer in ann if await came(peer) == []] == ann[PIECE:]


@pytest.mark.parametrize("method", ["channels", "connections", "info"])
async def test_a_key_that_is_taken_away_reads_nothing_more_of_other_nodes(
    autojump_clock: MockClock, one: BusNode, two: BusNode, method: str
) -> None:
    two.engine.lag = one.engine.lag = 0.5
    config = attrs.evolve(one.node.config, api_key="a key of today's")
    one.node.reload(config)
    answers = []

    async def ask() -> None:
        share = one.node.new_share()
        answers.append(
            await Api(one.node).answer(method, b'{"channel":"news"}', share, key=config.api_key)
        )

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await trio.sleep(0.2)
        assert answers == []
        one.node.reload(attrs.evolve(config, api_key="tomorrow's"))
    assert [answer.status for answer in answers] == [401]


class _Compared(int):
    """An fd that counts how often it is compared with another."""

    times = 0

    def __eq__(self, other: object) -> bool:
        _Compared.times += 1
        return int.__eq__(self, other)

    __hash__ = int.__hash__


async def test_an_order_to_many_on_other_nodes_looks_at_each_once(
    autojump_clock: MockClock, one: BusNode, two: BusNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = await two.open_client(token="ann")
    many = [_Compared(there.fd + number) for number in range(500)]
    ordered: list[int] = []

    async def fds_of(self: Everywhere, user: str) -> list[int]:
        return list(many)

    async def order(self: Everywhere, fds: list[int], make: object) -> int:
        assert len(fds) <= PIECE
        ordered.extend(fds)
        return len(fds)

    monkeypatch.setattr(Everywhere, "fds_of", fds_of)
    monkeypatch.setattr(Everywhere, "order", order)
    meter = one.node.services.router.meter
    before = meter.done
    assert await api(one, "disconnect", user="ann", whitelist=["x"] * 9 + ["y"]) == {}
    assert meter.done - before >= 500 * LOOKED + 2 * SPARED
    assert _Compared.times < 5 * len(many)
    assert ordered == many


ORDERS: dict[str, dict[str, object]] = {
    "subscribe": {"channel": "of-ann"},
    "unsubscribe": {"channel": "news"},
    "disconnect": {},
    "refresh": {"expired": True},
}


@pytest.mark.parametrize("method", ORDERS)
@pytest.mark.parametrize("lag", [0.0, 0.5])
async def test_an_order_for_a_user_is_not_followed_by_who_is_another_by_then(
    autojump_clock: MockClock, one: BusNode, two: BusNode, method: str, lag: float
) -> None:
    """The node of a connection knows whose it is when the order comes."""
    ann, other = await two.open_client(token="ann"), await two.open_client(token="ann")
    for peer in (ann, other):
        await peer.request(subscribe={"channel": "news"})
    two.engine.lag = lag
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(api, one, method, user="ann", **ORDERS[method]))
        await trio.sleep(0.2)
        before = two.broker.connection_info(ann.fd)
        if lag:
            two.broker.bind(ann.fd, "bob")
    two.engine.lag = 0.0
    assert (before is not None and before.topics == ("news",)) == bool(lag)
    pushes = await came(other)
    assert pushes != [], "she herself has followed it"
    if lag:
        bob = two.broker.connection_info(ann.fd)
        assert bob is not None
        assert (bob.user, bob.topics) == ("bob", ("news",))


async def test_a_node_that_does_not_answer_is_no_empty_answer(
    autojump_clock: MockClock, one: BusNode, two: BusNode
) -> None:
    ann = await two.open_client()
    two.cut()
    for call in (
        one.broker.cluster.disconnect(ann.fd),
        one.broker.cluster.connections(),
        one.broker.cluster.topics(),
        one.broker.cluster.connection_info(ann.fd),
    ):
        with pytest.raises(Refused) as caught:
            await call
        assert caught.value.temporary
    first, second = await one.broker.cluster.nodes()
    assert (first.name, first.alive) == ("one", True)
    assert (second.name, second.alive, second.connections) == ("two", False, 0)
    two.mend()


async def test_connections_of_all_nodes_are_listed_in_the_order_of_their_fds(
    autojump_clock: MockClock, one: BusNode, two: BusNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broker.session.everywhere.MOST_INFOS", 2)
    peers = [await net.open_client() for net in (one, two, one, two, one)]
    fds = sorted(peer.fd for peer in peers)
    for limit in (1, 2, 3, 4, 5, 6, 100):
        listed: list[int] = []
        after = 0
        while page := await one.broker.cluster.connections(after, limit):
            assert len(page) <= limit
            listed += [info.fd for info in page]
            after = listed[-1]
        assert listed == fds


async def test_a_page_is_counted_by_the_node_that_makes_it(
    autojump_clock: MockClock, one: BusNode, two: BusNode
) -> None:
    for net in (one, two, two):
        await net.open_client()
    meters = [net.node.router.meter for net in (one, two)]
    before = [meter.done for meter in meters]
    assert len(await one.broker.cluster.connections()) == 3
    done = [meter.done - each for meter, each in zip(meters, before, strict=True)]
    assert done[0] >= SURVEYED_AT_ONCE * NAMED + COLLECTED
    assert done[1] >= SURVEYED_AT_ONCE * NAMED + 2 * COLLECTED


async def test_a_connection_that_the_api_lists_is_collected_once_and_written_once(
    autojump_clock: MockClock, one: BusNode
) -> None:
    for _ in range(50):
        await one.open_client()
    meter = one.node.router.meter
    before = meter.done
    assert len((await api(one, "connections", limit=100))["connections"]) == 50
    rest = meter.done - before - SURVEYED_AT_ONCE * NAMED - 50 * (COLLECTED + SHOWN)
    assert 0 <= rest <= CALL + 2 * COMMAND


async def test_the_api_reaches_every_node(
    autojump_clock: MockClock, one: BusNode, two: BusNode
) -> None:
    here, there = await one.open_client(token="ann"), await two.open_client(token="ann")
    assert await api(one, "subscribe", user="ann", channel="t") == {}
    assert await api(one, "publish", channel="t", data=1) != 0
    for peer in (here, there):
        assert (await came(peer))[-1] == 1
    presence = await api(one, "presence", channel="t")
    assert set(presence["presence"]) == {str(here.fd), str(there.fd)}
    assert await api(two, "presence_stats", channel="t") == {"num_clients": 2, "num_users": 1}
    assert (await api(two, "channels"))["channels"] == {"t": {"num_clients": 2}}
    assert await api(one, "push", fd=there.fd, data="hi") == {"status": "forwarded"}
    assert await came(there) == ["hi"]
    listed = await api(one, "connections")
    assert {fd: each["node"] for fd, each in listed["connections"].items()} == {
        str(here.fd): "one",
        str(there.fd): "two",
    }
    assert list((await api(one, "connections", node="two"))["connections"]) == [str(there.fd)]
    assert list((await api(one, "connections", user="ann", after=here.fd))["connections"]) == [
        str(there.fd)
    ]
    assert await api(one, "connections", node="three") == 107
    assert (await api(one, "connection", fd=there.fd))["user"] == "ann"
    nodes = (await api(one, "info"))["nodes"]
    assert [(each["uid"], each["num_clients"]) for each in nodes] == [("one", 1), ("two", 1)]
    assert await api(one, "unsubscribe", user="ann", channel="t") == {}
    assert (await api(one, "presence", channel="t"))["presence"] == {}
    assert await api(one, "refresh", user="ann", expired=True, client=str(there.fd)) == {}
    assert (await there.receive_all())[-1] == 3005
    kept = await two.open_client(token="ann")
    assert await api(one, "disconnect", user="ann", whitelist=[str(kept.fd)]) == {}
    assert (await here.receive_all())[-1] == 3503
    assert await came(kept) == []
    assert await api(one, "disconnect", client=str(kept.fd)) == {}
    assert (await came(kept))[-1] == 3503
