"""Brokers that share a Redis: what clients of one see of what happens at the other.

Time is real, as a server knows no other.
"""

import json
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from broker import Broker, Config, Refused, TopicPattern, TopicRules
from broker.testing import Network, Peer, name_users_by_token, open_test_broker
from tests.conftest import code_of, done, next_pub, rpc, subscribe
from tests.engines.servers import BINARIES, Server, serving
from tests.http.test_asgi import ask_node

PASSING = TopicPattern("passing", TopicRules(history_size=0))
LAST = TopicPattern("last", TopicRules(retain=True))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(BINARIES["valkey"], tmp_path) as server:
        yield server


@pytest.fixture
def config(server: Server) -> Config:
    engine = f"redis+unix://{server.socket}"
    return Config(
        engine=engine,
        patterns=(PASSING, LAST),
        personal_topic=True,
        drain_seconds=0.01,
        log_level="error",
    )


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for long."""
    monkeypatch.setattr("broker.engines.redis.FETCH_SECONDS", 0.2)
    monkeypatch.setattr("broker.engines.redis_outgoing.PUBLISH_SECONDS", 0.3)
    monkeypatch.setattr("broker.engines.redis_log.PATIENCE_SECONDS", 0.3)
    monkeypatch.setattr("broker.engines.redis_wire.CALL_SECONDS", 0.1)


@asynccontextmanager
async def one(config: Config) -> AsyncGenerator[Network]:
    with trio.fail_after(60):
        async with open_test_broker(name_users_by_token(Broker(config))) as net:
            yield net


@asynccontextmanager
async def two(config: Config) -> AsyncGenerator[tuple[Network, Network]]:
    async with one(config) as here, one(config) as there:
        yield here, there


def since(result: Any) -> dict[str, Any]:
    """What to ask for, to go on from where a reply was."""
    return {"recover": True, "offset": result.get("offset", 0), "epoch": result["epoch"]}


async def connect(net: Network, **fields: Any) -> tuple[Peer, Any]:
    """A client, and what its connect was answered."""
    peer = await net.open_websocket()
    return peer, (await peer.request(connect=fields))["connect"]


async def until(peer: Peer, what: str) -> Any:
    """The first push of a kind; what comes before it is dropped."""
    while True:
        came = await peer.receive_json()
        if what in came.get("push", {}):
            return came["push"]


# publishing


async def test_what_is_published_at_one_is_delivered_at_all_and_then_answered(
    config: Config,
) -> None:
    async with two(config) as (here, there):
        ann, bob = await here.open_client(token="ann"), await there.open_client()
        for peer in (ann, bob):
            await subscribe(peer, "a", recoverable=True)
            await subscribe(peer, "passing")
        await ann.send_json({"id": 7, "publish": {"channel": "a", "data": 1}})
        own = await ann.receive_json()
        assert own["push"]["pub"]["data"] == 1
        assert await ann.receive_json() == {"id": 7, "publish": {}}
        came = await next_pub(bob)
        assert came == own["push"]["pub"]
        assert came["info"]["user"] == "ann"
        await there.broker.publish("passing", 2, exclude=[99])
        assert (await next_pub(bob))["data"] == 2
        await there.broker.publish("passing", 3, tags={"k": "v"})
        assert (await next_pub(ann))["data"] == 2
        came = await next_pub(ann)
        assert (came["data"], came["tags"]) == (3, {"k": "v"})


async def test_a_client_recovers_at_another_broker(config: Config) -> None:
    async with two(config) as (here, there):
        peer = await here.open_client()
        result = await subscribe(peer, "a", recoverable=True)
        await peer.aclose()
        for number in (1, 2):
            await here.broker.publish("a", number)
        again = await subscribe(await there.open_client(), "a", **since(result))
        assert again["recovered"]
        assert [each["data"] for each in again["publications"]] == [1, 2]
        reader = await there.open_client()
        await subscribe(reader, "b")
        page = await reader.request(history={"channel": "b", "limit": 5})
        assert page["history"]["epoch"] != result["epoch"]
        assert [each.value for each in (await there.broker.history("a"))[0]] == [1, 2]


async def test_what_the_server_subscribes_is_recovered_too(config: Config) -> None:
    async with two(config) as (here, there):
        ann, connected = await connect(here, token="ann")
        subs = {"#ann": since(connected["subs"]["#ann"])}
        await ann.aclose()
        await there.broker.publish("#ann", 1)
        again, connected = await connect(there, token="ann", subs=subs)
        sub = connected["subs"]["#ann"]
        assert sub["recovered"]
        assert [each["data"] for each in sub["publications"]] == [1]
        # The app's own word: accepted at once, begun when it is known where the topic is.
        await here.broker.publish("later", 1)
        assert there.broker.add_subscription(again.fd, "later")
        assert not there.broker.add_subscription(again.fd, "later")
        push = await until(again, "subscribe")
        assert (push["channel"], push["subscribe"]["offset"]) == ("later", 1)
        await here.broker.publish("later", 2)
        assert (await next_pub(again))["data"] == 2


async def test_a_report_counts_all_also_those_where_nobody_listens(config: Config) -> None:
    async with two(config) as (here, there):
        for topic in ("a", "passing", "last"):
            delivery = await here.broker.publish(topic, 1, report=True)
            assert (delivery.complete, delivery.matched) == (True, 0)
            await subscribe(await there.open_client(), topic)
            delivery = await here.broker.publish(topic, 2, report=True)
            assert (delivery.complete, delivery.matched) == (True, 1)


async def test_what_is_known_stays_true_where_nobody_listens(config: Config) -> None:
    async with two(config) as (here, there):
        for number in (1, 2, 3):
            await here.broker.publish("a", number)
            await there.broker.publish("b", number)  # answered behind what is in "a"
            publications, _ = await there.broker.history("a")
            assert [each.value for each in publications] == list(range(1, number + 1))


async def test_a_key_counts_at_all(config: Config) -> None:
    async with two(config) as (here, there):
        first = await here.broker.publish("a", 1, key="k")
        again = await there.broker.publish("a", 1, key="k")
        assert first.position == again.position
        assert [each.value for each in (await there.broker.history("a"))[0]] == [1]


async def test_the_last_value_is_known_to_all_and_after_a_restart(config: Config) -> None:
    async with one(config) as here:
        async with one(config) as there:
            await here.broker.publish("last", {"x": 1})
            await there.broker.publish("other", 2, retain=True)
            await there.broker.publish("gone", 3, retain=True)
            await there.broker.publish("gone", None, retain=True)
        async with one(config) as again:
            for net in (here, again):
                peer = await net.open_client()
                for topic, data in (("last", {"x": 1}), ("other", 2)):
                    await subscribe(peer, topic)
                    assert (await next_pub(peer))["data"] == data
                assert [each.topic for each in net.node.router.retained.values()] == [
                    "last",
                    "other",
                ]


# others


async def test_fds_users_presence_requests_and_groups_are_those_of_all(config: Config) -> None:
    async with two(config) as (here, there):
        ann, bob = await here.open_client(token="ann"), await there.open_client(token="bob")
        assert ann.fd != bob.fd
        await done(ann, "publish", topic=f"fd:{bob.fd}", data=1)
        assert (await next_pub(bob))["data"] == 1
        await done(ann, "publish", topic="user:bob", data=2)
        assert (await next_pub(bob))["data"] == 2
        assert (await rpc(ann, "publish", topic="user:eve", data=3))["error"]["code"] == 102
        for peer in (ann, bob):
            await subscribe(peer, "a")
            await subscribe(peer, "work", group="g")
        reply = await ann.request(presence={"channel": "a"})
        assert set(reply["presence"]["presence"]) == {str(ann.fd), str(bob.fd)}
        reply = await bob.request(presence_stats={"channel": "a"})
        assert reply["presence_stats"] == {"num_clients": 2, "num_users": 2}
        for number in range(20):
            await here.broker.publish("work", number)
        await there.broker.publish("a", "end")
        got: dict[Peer, list[int]] = {ann: [], bob: []}
        for peer, found in got.items():
            while (data := (await next_pub(peer))["data"]) != "end":
                found.append(data)
        assert sorted(got[ann] + got[bob]) == list(range(20))
        assert got[ann]
        assert got[bob]


# what goes wrong


async def test_who_counts_on_getting_all_is_told_of_a_loss(server: Server, config: Config) -> None:
    async with two(config) as (here, there):
        peer, plain = await there.open_client(), await there.open_client()
        served = await there.open_client(token="ann")
        await here.broker.publish("a", 1)
        result = await subscribe(peer, "a", recoverable=True)
        await subscribe(plain, "a")
        await server.call("FLUSHALL")
        await here.broker.publish("a", 2)
        push = await until(peer, "unsubscribe")
        assert push["unsubscribe"]["code"] == 2500
        assert (await served.receive_close())[0] == 3010
        assert (await next_pub(plain))["data"] == 2
        again = await subscribe(peer, "a", **since(result))
        assert not again["recovered"]
        assert again["epoch"] != result["epoch"]


async def test_what_is_known_is_answered_while_redis_is_away(
    server: Server, config: Config, hurried: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with two(config) as (here, there):
        peer = await there.open_client()
        result = await subscribe(peer, "a", recoverable=True)
        await here.broker.publish("a", 1)
        assert (await next_pub(peer))["data"] == 1
        server.pause()
        other = await there.open_client()
        assert (await subscribe(other, "a", **since(result)))["recovered"]
        await subscribe(other, "not known")
        reply = await other.request(subscribe={"channel": "not known 2", "recoverable": True})
        assert (reply["error"]["code"], reply["error"]["temporary"]) == (100, True)
        reply = await other.request(history={"channel": "not known"})
        assert (reply["error"]["code"], reply["error"]["temporary"]) == (100, True)
        reply = await other.request(publish={"channel": "a", "data": 2})
        assert (reply["error"]["code"], reply["error"]["temporary"]) == (100, True)
        with pytest.raises(Refused, match="not kept"):
            await there.broker.publish("a", 3)
        status, _, body = await ask_node(there.node, "/readyz")
        assert (status, json.loads(body)["status"]) == (503, "not ready")
        assert (await ask_node(there.node, "/healthz"))[0] == 200
        await rpc(other, "publish", topic=f"fd:{peer.fd}", data=4)
        assert (await next_pub(peer))["data"] == 4
        monkeypatch.setattr("broker.engines.redis.FETCH_SECONDS", 30)
        monkeypatch.setattr("broker.engines.redis_wire.CALL_SECONDS", 2)
        server.go_on()
        assert await code_of(other, subscribe={"channel": "not known 2", "recoverable": True}) == 0
        assert (await ask_node(there.node, "/readyz"))[0] == 200


async def test_rights_are_asked_again_after_redis_was_waited_for(
    server: Server, config: Config
) -> None:
    async with one(config) as net:
        peer = await net.open_client()
        server.pause()
        replies: list[int] = []

        async def ask(**command: Any) -> None:
            replies.append(await code_of(peer, **command))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(ask, subscribe={"channel": "a", "recoverable": True}))
            await trio.sleep(0.05)
            rules = TopicRules(may_subscribe="none")
            net.broker.reload(attrs.evolve(config, topics=rules))
            server.go_on()
        assert replies == [103]
