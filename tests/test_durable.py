"""A whole broker whose engine keeps everything in a file: what clients, backends and the program see."""

import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from broker import Broker, Config, Delivery, Position, Refused, TopicPattern, TopicRules
from broker.engines.waiting import LITTLE_BYTES
from broker.http.api import Api
from broker.testing import Network, Peer, name_users_by_token, open_test_broker
from tests.conftest import Disk, ask, data_of, rpc, subscribe

PASSING = TopicPattern("passing", TopicRules(history_size=0))


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(engine=f"sqlite:{tmp_path / 'log.db'}", patterns=(PASSING,), log_level="error")


@pytest.fixture
def disk() -> Disk:
    return Disk()


@asynccontextmanager
async def serving(config: Config, disk: Disk | None = None) -> AsyncGenerator[Network]:
    broker = name_users_by_token(Broker(config))
    if disk is not None:
        broker.run_blocking = disk
    async with open_test_broker(broker) as net:
        yield net


async def leave(*peers: Peer) -> None:
    """Go away, so that a stop waits for nobody."""
    for peer in peers:
        await peer.aclose()
    await wait_all_tasks_blocked()


async def publishes(peer: Peer, *what: tuple[int, str, object]) -> None:
    await peer.send_json(
        *({"id": number, "publish": {"channel": t, "data": d}} for number, t, d in what)
    )


async def api(net: Network, method: str, **params: object) -> Any:
    share = net.node.new_share()
    answer = await Api(net.node).answer(method, json.dumps(params).encode(), share)
    return json.loads(answer.body)


# clients


async def test_a_publish_is_delivered_and_then_answered_once_the_disk_has_it(
    autojump_clock: MockClock, config: Config, disk: Disk
) -> None:
    async with serving(config, disk) as net:
        peer = await net.open_client()
        await subscribe(peer, "a")
        disk.hold()
        await publishes(peer, (5, "a", 1), (6, "a", 2))
        await publishes(peer, (7, "a", 3))
        assert await peer.receive_all() == []
        disk.release()
        came = await peer.receive_all()
        seen = [each.get("id") or each["push"]["pub"]["data"] for each in came]
        assert seen == [1, 2, 5, 6, 3, 7]  # two commits
        await leave(peer)


async def test_publishes_in_a_row_share_a_commit_and_everything_else_waits_for_them(
    autojump_clock: MockClock, config: Config, disk: Disk
) -> None:
    async with serving(config, disk) as net:
        peer = await net.open_client()
        disk.hold()
        await publishes(peer, (5, "a", 0))
        await wait_all_tasks_blocked()
        works = disk.works
        for number in range(1, 10):
            await publishes(peer, (5 + number, f"t{number % 3}", number))
        await peer.send_json({"id": 20, "history": {"channel": "a", "limit": 5}})
        await publishes(peer, (21, "a", 21))
        assert await peer.receive_all() == []
        disk.release()
        came = await peer.receive_all()
        assert [each["id"] for each in came] == [*range(5, 15), 20, 21]
        assert [each["data"] for each in came[10]["history"]["publications"]] == [0]
        assert disk.works == works + 3
        await leave(peer)


async def test_what_needs_no_disk_goes_on_meanwhile(
    autojump_clock: MockClock, config: Config, disk: Disk
) -> None:
    async with serving(config, disk) as net:
        peer, other = await net.open_client(), await net.open_client()
        await subscribe(other, "passing")
        disk.hold()
        await publishes(peer, (5, "a", 1), (6, "passing", 2), (7, f"fd:{other.fd}", 3))
        assert data_of(await other.receive_all()) == [2, 3]
        assert [each["id"] for each in await peer.receive_all()] == [6, 7]
        assert (await other.request(history={"channel": "a"}))["history"]["offset"] == 0
        disk.release()
        assert [each["id"] for each in await peer.receive_all()] == [5]
        await leave(peer, other)


async def test_a_full_disk_is_an_error_that_passes_and_the_health_says_so(
    autojump_clock: MockClock, config: Config, disk: Disk
) -> None:
    async with serving(config, disk) as net:
        peer = await net.open_client()
        await subscribe(peer, "passing")
        disk.failure = "database or disk is full"
        await publishes(peer, (5, "a", 1), (6, "passing", 2))
        await publishes(peer, (7, "a", 3))
        came = await peer.receive_all()
        assert data_of(came) == [2]
        errors = [each["error"] for each in came if "error" in each]
        text = "not kept: database or disk is full"
        assert errors == [{"code": 100, "message": text, "temporary": True}] * 2
        with pytest.raises(Refused):
            await net.broker.publish("a", 4)
        with pytest.raises(Refused):
            net.broker.publish_nowait("a", 4)
        assert await api(net, "publish", channel="a", data=4) == {
            "error": {"code": 100, "message": text}
        }
        assert net.broker.stats().engine.failing == "database or disk is full"
        disk.failure = ""
        await trio.sleep(2)
        assert (await ask(peer, {"id": 9, "publish": {"channel": "a", "data": 5}}))[0][
            "publish"
        ] == {}
        publications, top = await net.broker.history("a")
        assert [each.value for each in publications] == [5]
        assert top.offset == 1
        await leave(peer)


async def test_a_publisher_waits_while_as_much_is_on_its_way_as_may_be_and_others_do_not(
    autojump_clock: MockClock, config: Config, disk: Disk
) -> None:
    async with serving(config, disk) as net:
        flood, other = await net.open_client(), await net.open_client()
        disk.hold()
        for number in range(30):
            await publishes(flood, (number + 1, "a", "x" * 300_000))
        await wait_all_tasks_blocked()
        waiting = net.broker.stats().engine.waiting
        assert 4 * 2**20 <= waiting < 5 * 2**20
        net.broker.publish_nowait("a", "x" * LITTLE_BYTES)  # this much of each has room
        with pytest.raises(trio.WouldBlock):
            net.broker.publish_nowait("a", 1)
        assert "history" in await other.request(history={"channel": "b"})
        disk.release()
        replies = await flood.receive_all()
        assert [each["id"] for each in replies] == list(range(1, 31))
        assert (await net.broker.history("a", limit=0))[1].offset == 31
        await leave(flood, other)


async def test_a_client_that_goes_before_the_answer_disturbs_nobody(
    autojump_clock: MockClock, config: Config, disk: Disk
) -> None:
    async with serving(config, disk) as net:
        peer, other = await net.open_client(), await net.open_client()
        await subscribe(other, "a")
        disk.hold()
        await publishes(peer, (5, "a", 1))
        await wait_all_tasks_blocked()
        await leave(peer)
        disk.release()
        assert data_of(await other.receive_all()) == [1]
        await leave(other)


# options


async def test_a_key_that_is_under_way_publishes_once_also_after_a_restart(
    autojump_clock: MockClock, config: Config, disk: Disk
) -> None:
    async with serving(config, disk) as net:
        peer = await net.open_client(token="ann")
        disk.hold()
        call = {"method": "publish", "data": {"topic": "a", "data": 1, "key": "k", "report": True}}
        await peer.send_json({"id": 5, "rpc": call}, {"id": 6, "rpc": call})
        assert await peer.receive_all() == []
        disk.release()
        first, second = await peer.receive_all()
        assert (first["id"], second["id"]) == (5, 6)
        assert first["rpc"] == second["rpc"] != {}
        assert (await net.broker.history("a", limit=0))[1].offset == 1
        await leave(peer)
    async with serving(config, disk) as net:
        peer = await net.open_client(token="ann")
        assert "rpc" in await rpc(peer, "publish", topic="a", data=1, key="k")
        other = await net.open_client(token="bob")
        assert "rpc" in await rpc(other, "publish", topic="a", data=2, key="k")
        assert [each.value for each in (await net.broker.history("a"))[0]] == [1, 2]
        await leave(peer, other)


async def test_a_refused_key_may_be_used_again(
    autojump_clock: MockClock, config: Config, disk: Disk
) -> None:
    async with serving(config, disk) as net:
        disk.failure = "disk I/O error"
        with pytest.raises(Refused):
            await net.broker.publish("a", 1, key="k")
        disk.failure = ""
        await trio.sleep(2)
        delivery = await net.broker.publish("a", 2, key="k")
        assert delivery.position is not None
        assert delivery.position.offset == 1
        assert await net.broker.publish("a", 3, key="k") == delivery


async def test_a_delivery_counts_those_who_listen_when_it_is_kept(
    autojump_clock: MockClock, config: Config, disk: Disk
) -> None:
    async with serving(config, disk) as net:
        peer, late = await net.open_client(), await net.open_client()
        await subscribe(peer, "a")
        disk.hold()
        deliveries: list[Delivery] = []

        async def publish() -> None:
            deliveries.append(await net.broker.publish("a", 1, exclude=(peer.fd,)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(publish)
            await wait_all_tasks_blocked()
            await subscribe(late, "a")
            disk.release()
        (delivery,) = deliveries
        assert (delivery.matched, delivery.queued) == (1, 1)
        await leave(peer, late)


# a restart


async def test_a_client_comes_back_after_a_restart_and_has_missed_nothing(
    autojump_clock: MockClock, config: Config
) -> None:
    async with serving(config) as net:
        peer = await net.open_client()
        result = await subscribe(peer, "a", recoverable=True)
        await net.broker.publish("a", 1, retain=True)
        await net.broker.publish("a", 2)
        fd = peer.fd
        await leave(peer)
    async with serving(config) as net:
        await net.broker.publish("a", 3)
        peer = await net.open_client()
        assert peer.fd > fd
        since = {"recover": True, "offset": 1, "epoch": result["epoch"]}
        recovered = await subscribe(peer, "a", recoverable=True, **since)
        assert recovered["recovered"] is True
        assert [each["data"] for each in recovered["publications"]] == [2, 3]
        fresh = await net.open_client()
        await fresh.send_json({"id": 2, "subscribe": {"channel": "a"}})
        (pub,) = [each["push"]["pub"] for each in await fresh.receive_all() if "push" in each]
        assert (pub["data"], pub["tags"]) == (1, {"retained": "true"})
        await leave(peer, fresh)


async def test_a_stop_keeps_the_will_of_who_is_cut(
    autojump_clock: MockClock, config: Config
) -> None:
    async with serving(config) as net:
        peer = await net.open_client()
        assert "rpc" in await rpc(peer, "will", topic="left", data="gone", retain=True)
        net.broker.stop()
        await trio.sleep(10)
    async with serving(config) as net:
        assert [each.value for each in (await net.broker.history("left"))[0]] == ["gone"]


async def test_history_that_was_off_for_a_while_is_of_another_epoch_also_after_a_restart(
    autojump_clock: MockClock, config: Config
) -> None:
    off = attrs.evolve(config, topics=TopicRules(history_size=0))
    async with serving(config) as net:
        before = (await net.broker.publish("a", 1)).position
        net.broker.reload(off)
        await net.broker.publish("a", 2)
        net.broker.reload(config)
        after = (await net.broker.publish("a", 3)).position
        assert before is not None
        assert after is not None
        assert after.epoch != before.epoch
    async with serving(config) as net:
        publications, top = await net.broker.history("a")
        assert ([each.value for each in publications], top) == ([3], after)
    async with serving(off) as net:  # and so it is where the settings change meanwhile
        await net.broker.publish("a", 4)
    async with serving(config) as net:
        assert (await net.broker.history("a"))[1].epoch != after.epoch


# backends


async def test_a_batch_keeps_its_order_and_a_broadcast_its_places(
    autojump_clock: MockClock, config: Config, disk: Disk
) -> None:
    async with serving(config, disk) as net:
        works = disk.works
        batch = await api(
            net,
            "batch",
            commands=[
                {"publish": {"channel": "a", "data": 1}},
                {"publish": {"channel": "a", "data": 2}},
                {"broadcast": {"channels": ["b", "", "passing"], "data": 3}},
                {"history": {"channel": "a", "limit": 5}},
                {"history_remove": {"channel": "a"}},
                {"publish": {"channel": "a", "data": 4}},
                {"history": {"channel": "a", "limit": 5}},
                {"presence": {"channel": ""}},
            ],
        )
        replies = batch["replies"]
        assert [replies[n]["publish"]["offset"] for n in (0, 1, 5)] == [1, 2, 3]
        responses = replies[2]["broadcast"]["responses"]
        assert responses[0]["result"]["offset"] == 1
        assert responses[1]["error"]["code"] == 107
        assert responses[2] == {"result": {}}
        assert [each["data"] for each in replies[3]["history"]["publications"]] == [1, 2]
        assert [each["data"] for each in replies[6]["history"]["publications"]] == [4]
        assert disk.works <= works + 4


async def test_what_this_program_hands_over_is_kept_in_its_order(
    autojump_clock: MockClock, config: Config
) -> None:
    async with serving(config) as net, net.broker.subscribe("a") as reader:
        net.broker.publish_nowait("a", 1)
        net.broker.publish_nowait("a", 2)
        delivery = await net.broker.publish("a", 3)
        assert delivery.position == Position(3, (await net.broker.history("a", limit=0))[1].epoch)
        assert [(await reader.receive()).value for _ in range(3)] == [1, 2, 3]
        await net.broker.remove_history("a")
        assert (await net.broker.history("a"))[0] == []
