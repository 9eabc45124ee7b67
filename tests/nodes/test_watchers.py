"""Joins and leaves over nodes, each at its place in the log."""

from trio.testing import MockClock

from broker.testing import BusNode
from tests.conftest import ask
from tests.nodes.conftest import came, seen, watch


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
