"""A node among the others: cut off for a moment, for too long, and while the store is away."""

import trio
from structlog.testing import capture_logs
from trio.testing import MockClock

from broker.engines.cluster import LEASE_SECONDS
from broker.testing import Bus, BusNode, open_test_node
from tests.conftest import ask, code_of
from tests.nodes.conftest import DEAD, Backend, came, present, seen, settle, watch


async def test_a_node_that_was_cut_off_for_too_long_begins_anew(
    autojump_clock: MockClock, bus: Bus, one: BusNode, two: BusNode
) -> None:
    """Others were told that its clients have left, so it makes that true; they come back at once."""
    ann, bob = await one.open_client(token="ann"), await two.open_client(token="bob")
    await watch(ann, "t")
    await watch(bob, "t")
    will = {"topic": "t", "data": "my will"}
    await bob.request(rpc={"method": "will", "data": will})
    await came(ann)
    before = two.engine.node
    two.cut()
    await trio.sleep(DEAD)
    told = await came(ann)
    assert seen(told) == [("leave", "bob")]
    assert "my will" in told
    assert await present(ann, "t") == {str(ann.fd): "ann"}
    assert (await bob.receive_all())[-1:] != [3011], "it serves on, as long as it knows of nothing"
    two.mend()
    await trio.sleep(5)
    assert (await bob.receive_all())[-1] == 3011
    assert two.engine.node != before
    assert await came(ann) == [], "neither the leave nor the will is told again"
    again = await two.open_client(token="bob")
    assert again.fd > bob.fd
    await watch(again, "t")
    assert seen(await came(ann)) == [("join", "bob")]
    assert await code_of(ann, publish={"channel": f"fd:{again.fd}", "data": "hi"}) == 0
    assert await code_of(ann, publish={"channel": f"fd:{bob.fd}", "data": "hi"}) == 102
    assert "hi" in await came(again)
    assert [each.name for each in await one.broker.cluster.nodes()] == ["one", "two"]


async def test_a_node_that_begins_anew_does_not_tell_of_its_former_self(
    autojump_clock: MockClock, bus: Bus, one: BusNode, two: BusNode
) -> None:
    before = two.engine.node
    two.cut()
    with capture_logs() as lines:
        await trio.sleep(DEAD)
        two.mend()
        await trio.sleep(5)
        # On Redis it reads on where it was, and so comes to its own end.
        two.engine.listener.gone(before)
    assert two.engine.node != before
    gone = [each["id"] for each in lines if each["event"] == "node_gone"]
    assert gone == [before], "by the other one, and not by itself"


async def test_a_short_cut_is_not_noticed(
    autojump_clock: MockClock, bus: Bus, one: BusNode, two: BusNode
) -> None:
    ann, bob = await one.open_client(token="ann"), await two.open_client(token="bob")
    await watch(ann, "t")
    two.cut()
    await ask(bob, {"id": 1, "subscribe": {"channel": "t"}})
    await trio.sleep(5)
    two.mend()
    assert await present(ann, "t") == {str(ann.fd): "ann", str(bob.fd): "bob"}
    await trio.sleep(DEAD)
    assert await present(ann, "t") == {str(ann.fd): "ann", str(bob.fd): "bob"}


async def test_an_outage_of_the_store_kills_nobody(
    autojump_clock: MockClock, bus: Bus, one: BusNode, two: BusNode
) -> None:
    ann, bob = await one.open_client(token="ann"), await two.open_client(token="bob")
    for peer in (ann, bob):
        await watch(peer, "t")
    for net in (one, two):
        net.cut()
    await trio.sleep(DEAD)
    for net in (one, two):
        net.mend()
    await trio.sleep(LEASE_SECONDS)
    assert set(await present(ann, "t")) == {str(ann.fd), str(bob.fd)}
    assert await code_of(ann, publish={"channel": f"fd:{bob.fd}", "data": "hi"}) == 0


async def test_a_node_that_was_cut_off_begins_a_new_epoch_of_events(
    autojump_clock: MockClock, bus: Bus
) -> None:
    backend = Backend()
    async with open_test_node(bus, backend.broker("one")):
        async with open_test_node(bus, backend.broker("two")) as two:
            await two.open_client(token="bob")
            await settle()
            (before,) = [each for each in backend.take("started") if each.node == "two"]
            two.cut()
            await trio.sleep(DEAD)
            two.mend()
            await trio.sleep(DEAD)
            events = backend.take("started", "died")
            assert {(each.kind, each.node) for each in events} == {
                ("died", "one"),
                ("started", "two"),
            }
            for each in events:
                if each.kind == "died":
                    assert each.dead_epoch == before.epoch
                else:
                    assert each.epoch != before.epoch
