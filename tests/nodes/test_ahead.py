"""Clients that come from a node which has read more than the one that they come to: they are told of no loss that
there was not."""

from typing import Any

import pytest
import trio
from trio.testing import MockClock

from broker.testing import BusNode

LATE = 0.5


async def left(one: BusNode, two: BusNode) -> dict[str, Any]:
    """Where a client is that has left one node, when the other has yet to read the end of a topic."""
    ann = await one.open_client(token="ann")
    await one.broker.publish("news", b"1")
    await trio.sleep(0.1)
    two.engine.lag = LATE
    await one.broker.publish("news", b"2")
    reply = await ann.request(subscribe={"channel": "news", "recoverable": True})
    return {"epoch": reply["subscribe"]["epoch"], "offset": reply["subscribe"]["offset"]}


async def test_who_comes_to_a_node_that_is_behind_recovers(
    autojump_clock: MockClock, one: BusNode, two: BusNode
) -> None:
    position = await left(one, two)
    ann, began = await two.open_client(token="ann"), trio.current_time()
    reply = await ann.request(subscribe={"channel": "news", "recover": True, **position})
    assert (position["offset"], reply["subscribe"]["recovered"]) == (2, True)
    assert trio.current_time() - began <= LATE + 0.1


async def test_who_asks_a_node_that_is_behind_is_told_what_came_since(
    autojump_clock: MockClock, one: BusNode, two: BusNode
) -> None:
    position = await left(one, two)
    await one.broker.publish("news", b"3")
    bob = await two.open_client(token="bob")
    reply = await bob.request(history={"channel": "news", "limit": -1, "since": position})
    assert [each["data"] for each in reply["history"]["publications"]] == [3]


async def test_an_app_that_asks_a_node_that_is_behind_is_told_where_the_topic_is(
    autojump_clock: MockClock, one: BusNode, two: BusNode
) -> None:
    position = await left(one, two)
    await one.broker.publish("news", b"3")
    since = one.engine.position("news")
    found, top = await two.broker.history("news", since=since, limit=-1)
    assert (found, top, top.offset) == ([], since, position["offset"] + 1)


@pytest.mark.parametrize("lost", [{"offset": 9}, {"epoch": "another"}])
async def test_a_position_that_nobody_has_is_a_loss(
    autojump_clock: MockClock, one: BusNode, two: BusNode, lost: dict[str, Any]
) -> None:
    position = await left(one, two)
    ann = await two.open_client(token="ann")
    request = {"channel": "news", "recover": True, **position, **lost}
    reply = await ann.request(subscribe=request)
    assert (reply["subscribe"]["recovered"], reply["subscribe"]["offset"]) == (False, 2)


async def test_who_comes_to_a_node_that_is_cut_off_is_to_try_again(
    autojump_clock: MockClock, bus: Any, one: BusNode, two: BusNode
) -> None:
    position = await left(one, two)
    ann = await two.open_client(token="ann")
    bus.cut(two.engine.node)
    reply = await ann.request(subscribe={"channel": "news", "recover": True, **position})
    assert (reply["error"]["code"], reply["error"]["temporary"]) == (100, True)
    bus.mend(two.engine)
    reply = await ann.request(subscribe={"channel": "news", "recover": True, **position})
    assert reply["subscribe"]["recovered"]
