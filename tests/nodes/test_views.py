"""What is to be seen of all nodes: counters, connections, topics, and who does not answer."""

from functools import partial
from typing import Any

import pytest
import trio
from msgspec import Struct
from trio.testing import MockClock

from broker.errors import Refused
from broker.session import views
from broker.session.views import view_of
from broker.testing import BusNode
from tests.nodes.conftest import settle


class Params(Struct):
    size: int = 0
    seconds: float = 0.0


def offer(net: BusNode, seen: list[str]) -> None:
    """A view `test` of a node, which takes its time, and notes when it is done or cancelled."""

    async def look(params: Params) -> object:
        try:
            await trio.sleep(params.seconds)
        except trio.Cancelled:
            seen.append("cancelled")
            raise
        seen.append("done")
        return {"of": net.node.name, "text": "x" * params.size}

    net.node.views.add("test", view_of(Params, look))


async def test_a_node_that_is_asked_too_much_says_so_and_goes_on(
    autojump_clock: MockClock, one: BusNode, two: BusNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views, "AT_ONCE", 2)
    seen: list[str] = []
    for net in (one, two):
        offer(net, seen)
    other = two.node.views.here.id
    answers: list[Any] = []

    async def look(params: Params) -> None:
        try:
            answers.append(await one.node.views.of(other, "test", params))
        except Refused as refusal:
            answers.append(refusal.code)

    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(look, Params(seconds=1.0))
    assert sorted(map(str, answers))[:2] == ["111", "111"]
    await look(Params(size=views.MOST_BYTES))
    await look(Params(size=views.MOST_BYTES - 100))
    assert answers[4] == 106
    assert len(answers[5]) > views.MOST_BYTES - 100
    seen.clear()
    await look(Params(seconds=60.0))
    await settle()
    assert (answers[6], seen) == (100, ["cancelled"]), "nobody waits for it any more"
    await look(Params())
    assert answers[7] == b'{"of":"two","text":""}'


async def test_what_no_node_has_is_refused(
    autojump_clock: MockClock, one: BusNode, two: BusNode
) -> None:
    offer(two, [])
    look = partial(one.node.views.of, two.node.views.here.id)
    for call, code in (
        (look("test", {"size": "x"}), 107),
        (look("other", {}), 104),
        (one.node.views.of("nobody", "test", {}), 102),
        (one.node.views.of("", "test", {}), 104),
    ):
        with pytest.raises(Refused) as caught:
            await call
        assert caught.value.code == code
