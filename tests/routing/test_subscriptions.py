"""Subscriptions that the server begins and ends, and those that pick by tags."""

import pytest
import trio
import trio.testing

from broker import (
    Broker,
    Config,
    ConnectEvent,
    ConnectReply,
    SubscribeEvent,
    SubscribeReply,
    TopicRules,
)
from broker.testing import open_test_broker
from tests.conftest import code_of
from tests.routing.conftest import PRICEY, receive_pushes


async def test_a_map_or_a_poll_is_declined_by_name(autojump_clock: object) -> None:
    async with open_test_broker(Broker()) as net:
        peer = await net.open_client()
        reply = await peer.request(subscribe={"channel": "news", "type": 1})
        assert reply["error"]["code"] == 108
        assert "type 1" in reply["error"]["message"]
        assert "subscribe" in await peer.request(subscribe={"channel": "news", "type": 0})


# at connect, with recovery


def broker_with_topics(*topics: str) -> Broker:
    broker = Broker()

    @broker.on_connect
    async def let_in(event: ConnectEvent) -> ConnectReply:
        return ConnectReply(user="alice", topics=topics)

    return broker


async def test_topics_of_the_connect_reply_are_recovered_through_connect(
    autojump_clock: object,
) -> None:
    async with open_test_broker(broker_with_topics("news", "chat")) as net:
        peer = await net.open_websocket()
        subs = (await peer.request(connect={}))["connect"]["subs"]
        assert {*subs} == {"news", "chat", f"fd:{peer.fd}", "user:alice"}
        assert "recovered" not in subs["news"]
        await peer.aclose()
        for n in (1, 2):
            net.broker.publish_nowait("news", n)
        back = await net.open_websocket()
        seen = {
            topic: {"recover": True, "offset": subs[topic]["offset"], "epoch": subs[topic]["epoch"]}
            for topic in ("news", "chat")
        }
        seen["chat"]["epoch"] = "gone"
        seen["secret"] = {"recover": True}  # nobody subscribes it to that
        again = (await back.request(connect={"subs": seen}))["connect"]["subs"]
        assert {*again} == {"news", "chat", f"fd:{back.fd}", "user:alice"}
        assert (again["news"]["recovered"], again["chat"]["recovered"]) == (True, False)
        assert [pub["data"] for pub in again["news"]["publications"]] == [1, 2]
        # A client counts on from what it has asked for; one that has lost its place goes on from the top.
        assert again["news"]["offset"] == subs["news"]["offset"] == 0
        net.broker.publish_nowait("news", 3)
        (push,) = await receive_pushes(back, 1)
        assert push["pub"] == {"data": 3, "offset": 3}


async def test_one_connect_recovers_no_more_than_a_reply_may_hold(autojump_clock: object) -> None:
    names = [f"t{number}" for number in range(5)]
    broker = broker_with_topics(*names)
    broker.config = Config(history_reply_bytes=3000, direct_topics=False)
    async with open_test_broker(broker) as net:
        peer = await net.open_websocket()
        subs = (await peer.request(connect={}))["connect"]["subs"]
        await peer.aclose()
        for name, size in zip(names, (1000, 1000, 1000, 100, 0), strict=True):
            if size:
                net.broker.publish_nowait(name, "x" * size)
        seen = {
            name: {"recover": True, "offset": 0, "epoch": subs[name]["epoch"]} for name in names
        }
        back = await net.open_websocket()
        again = (await back.request(connect={"subs": seen}))["connect"]["subs"]
        assert [again[name]["recovered"] for name in names] == [True, True, False, True, True]
        assert [len(again[name]["publications"]) for name in names] == [1, 1, 0, 1, 0]
        assert again["t2"]["offset"] == 1, "it goes on from there"


async def test_a_filter_on_what_the_server_subscribes_to_is_not_looked_at(
    autojump_clock: object,
) -> None:
    """Nor is it a reason to refuse the connect, or to ask for an error."""
    async with open_test_broker(broker_with_topics("news", "chat")) as net:
        peer = await net.open_websocket()
        gone = {"recover": True, "epoch": "gone", "flag": 2, "tf": PRICEY}
        odd = {"news": {"tf": {"op": "xor"}}, "chat": gone}
        subs = (await peer.request(connect={"subs": odd}))["connect"]["subs"]
        assert not subs["chat"]["recovered"]
        for topic in ("news", "chat"):
            net.broker.publish_nowait(topic, topic)
        pushes = await receive_pushes(peer, 2)
        assert [push["pub"]["data"] for push in pushes] == ["news", "chat"]


async def test_a_topic_that_cannot_be_is_left_out_and_the_client_is_let_in(
    autojump_clock: object,
) -> None:
    async with open_test_broker(broker_with_topics("a", "a", "\x00", "fd:77")) as net:
        peer = await net.open_websocket()
        subs = (await peer.request(connect={}))["connect"]["subs"]
        assert {*subs} == {"a", f"fd:{peer.fd}", "user:alice"}


async def test_a_gap_in_a_subscription_of_the_server_sends_the_client_to_reconnect(
    autojump_clock: object,
) -> None:
    """It cannot subscribe again by itself; connecting again recovers."""
    config = Config(outbox_messages=5, topics=TopicRules(slow_consumer="drop_oldest"))
    async with open_test_broker(Broker(config)) as net:
        peer = await net.open_client(make_pair=trio.testing.lockstep_stream_pair)
        net.broker.add_subscription(peer.fd, "news")
        for n in range(20):
            net.broker.publish_nowait("news", n)
            await trio.testing.wait_all_tasks_blocked()
        assert (await peer.receive_close())[0] == 3010


# tags


async def test_publications_are_picked_by_their_tags(autojump_clock: object) -> None:
    async with open_test_broker(Broker()) as net:
        picky, twin, other = [await net.open_client() for _ in range(3)]
        for peer in (picky, twin):
            await peer.request(subscribe={"channel": "news", "tf": PRICEY, "recoverable": True})
        await other.request(subscribe={"channel": "news"})
        assert net.broker.stats().hub.subscriptions == 3
        for n in (99, 101, 100, 102):
            net.broker.publish_nowait("news", n, tags={"price": str(n)})
        net.broker.publish_nowait("news", 200)
        for peer in (picky, twin):
            assert await receive_pushes(peer, 2) == [
                {"channel": "news", "pub": {"data": n, "offset": i, "tags": {"price": str(n)}}}
                for i, n in ((2, 101), (4, 102))
            ]
        assert [p["pub"]["data"] for p in await receive_pushes(other, 5)] == [
            *(99, 101, 100, 102),
            200,
        ]
        await picky.request(unsubscribe={"channel": "news"})
        await twin.aclose()
        assert net.broker.stats().hub.subscriptions <= 2


async def test_publications_of_clients_have_no_tags(autojump_clock: object) -> None:
    async with open_test_broker(Broker()) as net:
        tagged, untagged, publisher = [await net.open_client() for _ in range(3)]
        for peer, cmp in ((tagged, "ex"), (untagged, "nex")):
            wanted = {"key": "price", "cmp": cmp}
            await peer.request(subscribe={"channel": "news", "tf": wanted})
        await publisher.send_json(*({"publish": {"channel": "news", "data": n}} for n in (1, 2)))
        pushes = await receive_pushes(untagged, 2)
        assert [push["pub"]["data"] for push in pushes] == [1, 2]
        net.broker.push(tagged.fd, "end")
        assert await tagged.receive_json() == {"push": {"message": {"data": "end"}}}
        assert net.broker.connections()[0].fd == tagged.fd


async def test_recovery_picks_too_and_a_pattern_says_its_topic_beside_the_tags(
    autojump_clock: object,
) -> None:
    async with open_test_broker(Broker()) as net:
        peer = await net.open_client()
        for n in (99, 101):
            net.broker.publish_nowait("news.a", n, tags={"price": str(n)})
        reply = await peer.request(subscribe={"channel": "news.a", "tf": PRICEY, "recover": True})
        missed = reply["subscribe"]["publications"]
        assert reply["subscribe"]["recovered"]
        assert missed == [{"data": 101, "offset": 2, "tags": {"price": "101"}}]
        await peer.request(unsubscribe={"channel": "news.a"})
        await peer.request(subscribe={"channel": "news.*", "tf": PRICEY})
        net.broker.publish_nowait("news.a", 102, tags={"price": "102"})
        (push,) = await receive_pushes(peer, 1)
        assert push["pub"]["tags"] == {"topic": "news.a", "price": "102"}


@pytest.mark.parametrize(
    "node",
    [
        {"op": "xor"},
        {"key": "a", "cmp": "gt", "val": "b"},
        {"op": "or", "nodes": [{"key": "a", "cmp": "ex"}] * 100},
        {"op": "and", "nodes": [{"key": "a", "cmp": "in", "vals": ["b"] * 501}] * 2},
    ],
)
async def test_a_filter_that_makes_no_sense_is_refused(
    autojump_clock: object, node: dict[str, object]
) -> None:
    async with open_test_broker(Broker()) as net:
        peer = await net.open_client()
        reply = await peer.request(subscribe={"channel": "news", "tf": node})
        assert reply["error"]["code"] == 107
        assert reply["error"]["message"].startswith("tags filter: ")
        assert net.broker.stats().hub.subscriptions == 0


async def test_subscriptions_are_bounded_in_bytes_and_filters_in_nodes(
    autojump_clock: object,
) -> None:
    config = Config(max_subscription_bytes=20_000, max_filter_nodes=10)
    async with open_test_broker(Broker(config)) as net:
        peer = await net.open_client()

        async def code(name: str, nodes: int = 0, size: int = 0) -> int:
            leaf = {"key": "a", "cmp": "neq", "val": "b" * size}
            tf = {"tf": {"op": "or", "nodes": [leaf] * (nodes - 1)}} if nodes else {}
            return await code_of(peer, subscribe={"channel": name, **tf})

        assert [await code(f"a{n}", nodes=4) for n in range(3)] == [0, 0, 106]
        assert await code("b", nodes=2) == 0
        for n in range(3):
            await peer.request(unsubscribe={"channel": f"a{n}"})
        assert await code("c", nodes=2, size=20_000) == 106
        codes = [await code(f"{n:0250}") for n in range(30)]
        fit = codes.index(106)
        assert codes == [0] * fit + [106] * (30 - fit)
        assert 15 < fit < 20
        # What is given up makes room again.
        await peer.request(unsubscribe={"channel": f"{0:0250}"})
        assert await code(f"{99:0250}") == 0
        assert await code(f"{98:0250}") == 106


async def test_a_retained_value_comes_with_what_the_server_subscribes_to(
    autojump_clock: object,
) -> None:
    """Behind the reply or push that says so, unless the client has recovered it."""
    async with open_test_broker(broker_with_topics("news")) as net:
        net.broker.publish_nowait("news", 1, retain=True)
        peer = await net.open_websocket()
        news = (await peer.request(connect={}))["connect"]["subs"]["news"]
        (push,) = await receive_pushes(peer, 1)
        assert push["pub"] == {"data": 1, "tags": {"retained": "true"}}
        back = await net.open_websocket()
        seen = {"recover": True, "offset": 0, "epoch": news["epoch"]}
        subs = (await back.request(connect={"subs": {"news": seen}}))["connect"]["subs"]
        assert subs["news"]["recovered"]
        net.broker.publish_nowait("news", 2)
        (push,) = await receive_pushes(back, 1)
        assert push["pub"] == {"data": 2, "offset": 2}


async def test_a_hooks_data_that_json_cannot_say_leaves_nothing_behind(
    autojump_clock: object,
) -> None:
    broker = Broker()

    @broker.on_subscribe
    async def let_in(event: SubscribeEvent) -> SubscribeReply:
        return SubscribeReply(data=object())

    async with open_test_broker(broker) as net:
        peer = await net.open_client()
        reply = await peer.request(subscribe={"channel": "news"})
        assert reply["error"]["code"] == 100
        assert broker.stats().hub.subscriptions == 0
