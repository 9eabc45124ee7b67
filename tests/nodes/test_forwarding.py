"""Messages to connections of other nodes."""

import pytest
import trio
from trio.testing import MockClock

from broker import Opcode, Refused
from broker.core.messages import Delivery, PushResult
from broker.routing.forwarding import MOST_BYTES, SHARE
from broker.testing import Bus, BusNode
from tests.conftest import ask, code_of
from tests.nodes.conftest import came, node, settle


async def test_a_client_writes_to_a_client_of_another_node(
    autojump_clock: MockClock, one: BusNode, two: BusNode
) -> None:
    ann, bob = await one.open_client(token="ann"), await two.open_client(token="bob")
    said = [{"publish": {"channel": f"fd:{bob.fd}", "data": n}} for n in range(3)]
    answers = await ask(ann, *({"id": n + 1, **each} for n, each in enumerate(said)))
    assert sorted(each["id"] for each in answers) == [1, 2, 3]
    assert not any("error" in each for each in answers)
    pushes = [each["push"] for each in await bob.receive_all()]
    assert [push["pub"]["data"] for push in pushes] == [0, 1, 2]
    assert pushes[0]["channel"] == f"fd:{bob.fd}"
    assert pushes[0]["pub"]["info"] == {"client": str(ann.fd), "user": "ann"}


async def test_who_is_not_there_is_told_as_on_one_node(
    autojump_clock: MockClock, one: BusNode, two: BusNode
) -> None:
    ann, bob = await one.open_client(), await two.open_client()
    silent = await two.open_websocket()
    for fd in (bob.fd + 50, 10**9, silent.fd):
        assert await code_of(ann, publish={"channel": f"fd:{fd}", "data": 1}) == 102
    await bob.aclose()
    await settle()
    assert await code_of(ann, publish={"channel": f"fd:{bob.fd}", "data": 1}) == 102


async def test_the_program_publishes_to_other_nodes_and_gets_their_report(
    autojump_clock: MockClock, one: BusNode, two: BusNode
) -> None:
    bob = await two.open_client()
    to = f"fd:{bob.fd}"
    assert await one.broker.publish(to, "hi", tags={"a": "b"}) == Delivery(1, 1, 0)
    assert await one.broker.publish(to, "out", exclude=[bob.fd]) == Delivery(0, 0, 0)
    (push,) = [each["push"] for each in await bob.receive_all()]
    assert push["pub"] == {"data": "hi", "tags": {"a": "b"}}
    with pytest.raises(Refused, match="no connection has fd 99999"):
        await one.broker.publish("fd:99999", 1)
    one.broker.publish_nowait(to, "soon")
    assert await came(bob) == ["soon"]


async def test_a_push_goes_to_any_node(
    autojump_clock: MockClock, one: BusNode, two: BusNode
) -> None:
    plain, client = await two.open_plain(), await two.open_client()
    for data in ("text", b"bytes", {"a": 1}):
        assert one.broker.push(plain.fd, data) is PushResult.FORWARDED
        assert one.broker.push(client.fd, data) is PushResult.FORWARDED
    assert await plain.receive_text() == "text"
    assert await plain.receive_frame() == (2, b"bytes")
    assert await plain.receive_text() == '{"a":1}'
    assert await came(client) == ["text", "Ynl0ZXM=", {"a": 1}]
    one.broker.push(plain.fd, "text", opcode=Opcode.BINARY)
    one.broker.push(plain.fd, [1] * 100, fragment_bytes=125)
    assert await plain.receive_frame() == (2, b"text")
    assert [len((await plain.receive_frame())[1]) for _ in range(2)] == [125, 76]
    assert one.broker.push(10**9, "x") is PushResult.CLOSED
    with pytest.raises(TypeError):
        one.broker.push(plain.fd, object())


async def test_a_node_that_hangs_costs_those_who_write_to_it(
    autojump_clock: MockClock, one: BusNode, two: BusNode
) -> None:
    """Of what waits for an answer of one node, one publisher has a quarter; others still get through."""
    ann, eve = await one.open_client(token="ann"), await one.open_client(token="eve")
    bob, carl = await two.open_client(), await one.open_client()
    two.engine.lag = 1.0
    large = "x" * (MOST_BYTES // SHARE // 4)
    for _ in range(6):
        await eve.send_json({"id": 1, "publish": {"channel": f"fd:{bob.fd}", "data": large}})
    (first, second) = await eve.receive_all()
    assert (first["error"]["code"], second["error"]["code"]) == (111, 111)
    assert await code_of(ann, publish={"channel": f"fd:{carl.fd}", "data": 1}) == 0
    await trio.sleep(1.5)
    assert len(await eve.receive_all()) == 4
    await bob.receive_all()
    two.engine.lag = 0.0
    assert await code_of(ann, publish={"channel": f"fd:{bob.fd}", "data": 1}) == 0
    assert await code_of(eve, publish={"channel": f"fd:{bob.fd}", "data": 1}) == 0


async def test_a_node_that_does_not_answer_leaves_nobody_waiting(
    autojump_clock: MockClock, one: BusNode, two: BusNode
) -> None:
    ann, bob = await one.open_client(), await two.open_client()
    two.cut()
    before = trio.current_time()
    reply = await ann.request(publish={"channel": f"fd:{bob.fd}", "data": 1})
    assert reply["error"]["code"] == 100
    assert reply["error"]["temporary"]
    assert 1.9 < trio.current_time() - before < 2.2
    two.mend()
    assert await came(bob) == [1], "which is why nobody knew"


async def test_when_a_node_dies_those_who_wait_for_it_learn_so(
    autojump_clock: MockClock, bus: Bus, one: BusNode
) -> None:
    ann = await one.open_client()
    async with node(bus, "two") as two:
        bob = await two.open_client()
        two.kill()
        await trio.sleep(9.5)
        await ann.send_json({"id": 7, "publish": {"channel": f"fd:{bob.fd}", "data": 1}})
        await trio.sleep(7)
        (reply,) = await ann.receive_all()
        assert reply["error"]["code"] == 100
        assert await code_of(ann, publish={"channel": f"fd:{bob.fd}", "data": 1}) == 102
        assert one.broker.push(bob.fd, "x") is PushResult.CLOSED


async def test_nothing_is_sent_while_a_node_is_cut_off(
    autojump_clock: MockClock, one: BusNode, two: BusNode
) -> None:
    ann, bob = await one.open_client(), await two.open_client()
    one.cut()
    assert await code_of(ann, publish={"channel": f"fd:{bob.fd}", "data": 1}) == 100
    assert one.broker.push(bob.fd, "x") is PushResult.CLOSED
    one.mend()
    assert await came(bob) == []
    assert await code_of(ann, publish={"channel": f"fd:{bob.fd}", "data": 2}) == 0


async def test_a_user_gets_what_is_sent_to_it_wherever_it_is(
    autojump_clock: MockClock, one: BusNode, two: BusNode
) -> None:
    here, there = await one.open_client(token="ann"), await two.open_client(token="ann")
    bob = await one.open_client(token="bob")
    assert await code_of(bob, publish={"channel": "user:ann", "data": 1}) == 0
    assert await came(here) == await came(there) == [1]
    await here.aclose()
    await settle()
    assert await code_of(bob, publish={"channel": "user:ann", "data": 2}) == 0
    assert await came(there) == [2]
    await there.aclose()
    await settle()
    assert await code_of(bob, publish={"channel": "user:ann", "data": 3}) == 102
    with pytest.raises(Refused, match="'ann' has no connection"):
        await one.broker.publish("user:ann", 4)


async def test_what_goes_to_a_user_stays_in_order_with_what_goes_to_topics(
    autojump_clock: MockClock, one: BusNode, two: BusNode
) -> None:
    ann = await two.open_client(token="ann")
    await ask(ann, {"id": 1, "subscribe": {"channel": "t"}})
    for n in range(5):
        one.broker.publish_nowait("t", f"t{n}")
        one.broker.publish_nowait("user:ann", f"u{n}")
    assert await came(ann) == [f"{kind}{n}" for n in range(5) for kind in "tu"]


async def test_publications_reach_every_node_by_topic_and_by_pattern(
    autojump_clock: MockClock, one: BusNode, two: BusNode
) -> None:
    ann, bob = await one.open_client(), await two.open_client()
    await ask(ann, {"id": 1, "subscribe": {"channel": "news.*"}})
    await ask(bob, {"id": 1, "subscribe": {"channel": "news.eu"}})
    assert await code_of(bob, publish={"channel": "news.eu", "data": 1}) == 0
    assert await came(ann) == [1]
    assert await bob.receive_all() == []
