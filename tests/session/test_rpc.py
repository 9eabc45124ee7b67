"""Calls of clients to the broker itself, and to the app: params, rules, reports, keys."""

import json
import math

import pytest
from trio.testing import MockClock, wait_all_tasks_blocked

from broker import (
    Broker,
    Connection,
    ErrorCode,
    Frame,
    PublishEvent,
    PublishReply,
    ReadEvent,
    Refused,
    TopicRules,
)
from broker.testing import Network
from broker.transport import frames
from tests.conftest import ask, done, next_pub, received, rpc, served, subscribe
from tests.session.conftest import (
    disconnected,
)

# rpc publish


async def test_a_plain_rpc_publish_is_a_publish(autojump_clock: MockClock) -> None:
    async with served() as net:
        peer = await net.open_client()
        await subscribe(peer, "news")
        await peer.send_json(
            {"id": 5, "rpc": {"method": "publish", "data": {"topic": "news", "data": 1}}}
        )
        assert await next_pub(peer) == {
            "data": 1,
            "offset": 1,
            "info": {"user": "", "client": str(peer.fd)},
        }
        assert await peer.receive_json() == {"id": 5, "rpc": {"data": {}}}


async def test_no_echo_exclude_and_report(autojump_clock: MockClock) -> None:
    async with served() as net:
        peers = [await net.open_client() for _ in range(4)]
        for peer in peers:
            await subscribe(peer, "news")
        me, spared, *_ = peers
        report = await done(
            me, "publish", topic="news", data=1, echo=False, exclude=[spared.fd], report=True
        )
        assert report == {"matched": 2, "queued": 2, "dropped": 0, "failed": []}
        assert [await received(net, peer) for peer in peers] == [[], [], [1], [1]]
        nobody = await done(me, "publish", topic="empty", data=1, report=True)
        assert nobody == {"matched": 0, "queued": 0, "dropped": 0, "failed": []}
        direct = await done(me, "publish", topic=f"fd:{spared.fd}", data=1, report=True)
        assert direct["queued"] == 1


async def test_a_report_is_for_who_may_read_the_presence(autojump_clock: MockClock) -> None:
    rules = TopicRules(may_read_presence="subscribers")
    async with served(topics=rules) as net:
        inside, stranger = await net.open_client(), await net.open_client()
        await subscribe(inside, "news")
        refused = await rpc(stranger, "publish", topic="news", data=1, report=True)
        assert refused["error"]["code"] == 103
        assert await received(net, inside) == []
        assert await done(stranger, "publish", topic="news", data=2) == {}
        assert (await done(inside, "publish", topic="news", data=3, report=True))["matched"] == 1
        direct = await done(stranger, "publish", topic=f"fd:{inside.fd}", data=4, report=True)
        assert direct["queued"] == 1


async def test_a_report_asks_the_hook_for_presence(autojump_clock: MockClock) -> None:
    async with served() as net:
        asked = []

        @net.broker.on_presence
        async def never(event: ReadEvent) -> None:
            asked.append(event.topic)
            raise Refused(103)

        peer = await net.open_client()
        refused = await rpc(peer, "publish", topic="news", data=1, report=True)
        assert refused["error"]["code"] == 103
        assert await done(peer, "publish", topic="news", data=2) == {}
        assert asked == ["news"]


async def test_a_key_makes_a_publish_happen_once_per_user(autojump_clock: MockClock) -> None:
    async with served() as net:
        async with net.broker.subscribe("news") as messages:
            alice, again, bob = [
                await net.open_client(token=user) for user in ("alice", "alice", "bob")
            ]
            params = {"topic": "news", "data": 1, "key": "k", "report": True}
            first = await done(alice, "publish", **params)
            assert await done(alice, "publish", **{**params, "data": 2}) == first
            # From another of her connections, as after a reconnect.
            assert await done(again, "publish", **params) == first
            await done(bob, "publish", **params)
            got = [await messages.receive() for _ in "12"]
            assert [each.info and each.info.user for each in got] == ["alice", "bob"]
            await wait_all_tasks_blocked()
            assert messages.bytes_waiting == 0


async def test_a_key_of_an_anonymous_client_is_its_connections_own(
    autojump_clock: MockClock,
) -> None:
    async with served() as net:
        async with net.broker.subscribe("news") as messages:
            one, other = [await net.open_client() for _ in "12"]
            params = {"topic": "news", "data": 1, "key": "1"}
            for client in (one, other, one, other):
                await done(client, "publish", **params)
            got = [await messages.receive() for _ in "12"]
            assert [each.info and each.info.client for each in got] == ["1", "2"]
            await wait_all_tasks_blocked()
            assert messages.bytes_waiting == 0


async def test_a_refused_publish_may_be_tried_again_with_its_key(
    autojump_clock: MockClock,
) -> None:
    async with served() as net:
        peer = await net.open_client()
        params = {"topic": "fd:2", "data": 1, "key": "k"}
        assert (await rpc(peer, "publish", **params))["error"]["code"] == 102
        other = await net.open_client()
        assert other.fd == 2
        await done(peer, "publish", **params)
        assert (await next_pub(other))["data"] == 1


async def test_the_app_is_asked_about_rpc_publishes_too(autojump_clock: MockClock) -> None:
    broker = Broker()

    @broker.on_publish
    async def look(event: PublishEvent) -> PublishReply | None:
        if event.topic == "secret":
            raise Refused(ErrorCode.PERMISSION_DENIED)
        return PublishReply(b'"censored"')

    async with served(broker) as net, broker.subscribe("news") as messages:
        peer = await net.open_client()
        for method, field in (("publish", "topic"), ("request", "to"), ("will", "topic")):
            reply = await rpc(peer, method, **{field: "secret", "data": 1})
            assert reply["error"]["code"] == 103
        await done(peer, "publish", topic="news", data=1)
        assert (await messages.receive()).value == "censored"


@pytest.mark.parametrize(
    "method, params",
    [
        ("publish", {}),
        ("publish", {"topic": "news"}),
        ("publish", {"topic": "news", "data": 1, "ehco": False}),
        ("publish", {"topic": "news.*", "data": 1}),
        ("publish", {"topic": "news", "data": 1, "key": "k" * 256}),
        ("publish", {"topic": "fd:1", "data": 1}),
        ("publish", {"topic": "user:u", "data": 1, "retain": True}),
        ("request", {"to": "fd:1", "data": 1}),
        ("request", {"to": "news.*", "data": 1}),
        ("request", {"to": "news", "data": 1, "seconds": 0}),
        ("request", {"to": "news", "data": 1, "seconds": 61}),
        ("reply", {"reply_to": "1", "data": 1}),
        ("reply", {"reply_to": "x", "data": 1}),
        ("reply", {"reply_to": "9" * 5000, "data": 1}),
        ("reply", {"reply_to": "1"}),
        ("will", {"topic": "news"}),
        ("will", {"topic": "news.*", "data": 1}),
        ("will", {"topic": ">", "data": 1}),
        ("will", {"topic": "t" * 256, "data": 1}),
        ("will", {"topic": "fd:9", "data": 1, "retain": True}),
        ("will", {"topic": "user:u", "data": 1, "retain": True}),
    ],
)
async def test_bad_params_are_error_107(
    autojump_clock: MockClock, method: str, params: dict[str, object]
) -> None:
    async with served() as net:
        peer = await net.open_client(token="u")
        reply = await rpc(peer, method, **params)
        assert reply["error"]["code"] == 107, reply


async def test_other_methods_are_the_apps(autojump_clock: MockClock) -> None:
    broker = Broker()

    @broker.on_rpc
    async def answer(connection: Connection, method: str, data: object) -> object:
        return [method, data]

    async with served(broker) as net:
        peer = await net.open_client()
        assert await done(peer, "mine", a=1) == ["mine", {"a": 1}]


# patterns and rules


async def test_rules_hold_for_rpc_publishes_too(autojump_clock: MockClock) -> None:
    async with served(topics=TopicRules(may_publish="none")) as net:
        peer = await net.open_client()
        for method, field in (("publish", "topic"), ("request", "to"), ("will", "topic")):
            reply = await rpc(peer, method, **{field: "news", "data": 1})
            assert reply["error"]["code"] == 103


async def test_send_reaches_the_app_and_is_not_answered(
    autojump_clock: MockClock, net: Network
) -> None:
    seen = []

    @net.broker.on_message
    async def note(connection: Connection, frame: Frame) -> None:
        seen.append((connection.fd, frame.data, frame.opcode, frame.fin))

    client = await net.open_client()
    assert await ask(client, {"send": {"data": {"a": "ü"}}}, {"send": {"data": 1}}) == []
    assert [(fd, json.loads(data), *rest) for fd, data, *rest in seen] == [
        (client.fd, {"a": "ü"}, frames.TEXT, True),
        (client.fd, 1, frames.TEXT, True),
    ]


async def test_send_to_an_app_that_takes_no_messages_ends_a_client(
    autojump_clock: MockClock, net: Network
) -> None:
    client = await net.open_client()
    assert await disconnected(client, {"send": {"data": 1}}) == (3508, "not available")


async def test_a_send_that_is_refused_is_not_answered_as_nobody_waits_for_it(
    autojump_clock: MockClock, net: Network
) -> None:
    @net.broker.on_message
    async def refuse(connection: Connection, frame: Frame) -> None:
        raise Refused(103)

    client = await net.open_client()
    assert await ask(client, {"send": {"data": 1}}) == []
    assert net.broker.is_established(client.fd)


async def test_a_send_whose_hook_raises_ends_a_client(
    autojump_clock: MockClock, net: Network
) -> None:
    @net.broker.on_message
    async def fail(connection: Connection, frame: Frame) -> None:
        raise ZeroDivisionError

    client = await net.open_client()
    assert await disconnected(client, {"send": {"data": 1}}) == (1011, "internal error")


@pytest.mark.parametrize("data", [None, 7, "ü", [1, {"a": None}]])
async def test_rpc_is_answered_with_what_the_hook_returns(
    autojump_clock: MockClock, net: Network, data: object
) -> None:
    @net.broker.on_rpc
    async def call(connection: Connection, method: str, data: object) -> object:
        return [connection.fd, method, data]

    client = await net.open_client()
    assert await ask(client, {"id": 2, "rpc": {"method": "add", "data": data}}) == [
        {"id": 2, "rpc": {"data": [client.fd, "add", data]}}
    ]
    assert await ask(client, {"id": 3, "rpc": {}}) == [
        {"id": 3, "rpc": {"data": [client.fd, "", None]}}
    ]


@pytest.mark.parametrize(
    "data, seen", [("1e999", math.inf), ('"a\\ud83d"', "a\ufffd"), ("null", None)]
)
async def test_rpc_data_is_seen_as_python_can_hold_it(
    autojump_clock: MockClock, net: Network, data: str, seen: object
) -> None:
    calls = []

    @net.broker.on_rpc
    async def call(connection: Connection, method: str, data: object) -> object:
        calls.append(data)
        return None

    client = await net.open_client()
    await client.send_text('{"id":2,"rpc":{"data":%s}}' % data)  # noqa: UP031 - braces
    assert await client.receive_all() == [{"id": 2, "rpc": {"data": None}}]
    assert calls == [seen]
