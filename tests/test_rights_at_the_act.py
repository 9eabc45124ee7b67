"""Rights are asked at the act, by every door: a whole broker, and what comes of a word from inside.

Each test stands for a kind of fault: who gets what he may not have, or is not told what is true.
"""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from broker import (
    Broker,
    Config,
    Connection,
    ConnectReply,
    PublishEvent,
    PushResult,
    ReadEvent,
    Refused,
    SubscribeEvent,
    TokenRules,
    TopicRules,
)
from broker.access.minting import mint
from broker.testing import Closed, Network, Peer, open_test_broker

SECRET = "0123456789abcdef0123456789abcdef"


async def pushes_to(peer: Peer) -> list[Any]:
    """The pushes that come until nothing more does."""
    found: list[Any] = []
    while True:
        with trio.move_on_after(0.1) as silence:
            push = (await peer.receive_json())["push"]
        if silence.cancelled_caught:
            return found
        found.append(push)


async def data_to(peer: Peer) -> list[Any]:
    return [push["pub"]["data"] for push in await pushes_to(peer) if "pub" in push]


def code_of(reply: Any) -> int:
    return int(reply["error"]["code"]) if "error" in reply else 0


# a peer that has not spoken

Send = Callable[[Broker, int], object]


def publish_to(broker: Broker, fd: int, topic: str) -> None:
    broker.add_subscription(fd, topic)
    broker.publish_nowait(topic, {"push": {"disconnect": {"code": 3500}}})


ROADS: dict[str, Send] = {
    "push": lambda broker, fd: broker.push(fd, {"push": {"disconnect": {"code": 3500}}}),
    "push of text": lambda broker, fd: broker.push(fd, '{"push":{"disconnect":{"code":3500}}}'),
    "push of bytes": lambda broker, fd: broker.push(fd, b'{"push":{}}'),
    "a topic of the app's": lambda broker, fd: publish_to(broker, fd, "news"),
}


@pytest.mark.parametrize("road", ROADS)
async def test_a_peer_that_has_not_spoken_is_not_written_to(
    autojump_clock: MockClock, road: str
) -> None:
    async with open_test_broker(Broker()) as net:
        peer = await net.open_websocket()
        ROADS[road](net.broker, peer.fd)
        with trio.move_on_after(1) as silence:
            await peer.receive_text()
        assert silence.cancelled_caught
        reply = await peer.request(connect={})
        assert reply["connect"]["client"] == str(peer.fd)
        assert all("disconnect" not in push for push in await pushes_to(peer))


@pytest.mark.parametrize("topic", ["fd:{}", "user:alice"])
async def test_a_direct_message_to_a_peer_that_has_not_spoken_is_refused(
    autojump_clock: MockClock, topic: str
) -> None:
    async with open_test_broker(Broker()) as net:
        attacker, victim = await net.open_client(), await net.open_websocket()
        net.broker.bind(victim.fd, "alice")
        name = topic.format(victim.fd)
        data = {"push": {"disconnect": {"code": 3500}}}
        for command in (
            {"publish": {"channel": name, "data": data}},
            {"rpc": {"method": "publish", "data": {"topic": name, "data": data}}},
        ):
            assert code_of(await attacker.request(**command)) == 102
        with pytest.raises(Refused, match="102"):
            net.broker.publish_nowait(name, data)
        reply = await victim.request(connect={})
        assert "connect" in reply


async def test_a_push_that_waited_comes_behind_the_connect_reply(autojump_clock: MockClock) -> None:
    broker = Broker()

    @broker.on_open
    async def greet(connection: Connection) -> None:
        assert broker.push(connection.fd, {"hello": 1}) is PushResult.QUEUED
        assert broker.push(connection.fd, "there") is PushResult.QUEUED

    async with open_test_broker(broker) as net:
        client = await net.open_client()
        assert [push["message"]["data"] for push in await pushes_to(client)] == [
            {"hello": 1},
            "there",
        ]
        plain = await net.open_websocket()
        await plain.send_text("hi")
        assert [await plain.receive_text() for _ in range(2)] == ['{"hello":1}', "there"]
        listener = await net.open_plain()
        assert [await listener.receive_text() for _ in range(2)] == ['{"hello":1}', "there"]


async def test_messages_that_wait_are_bounded(autojump_clock: MockClock) -> None:
    config = Config(outbox_bytes=10_000, max_topics=3)
    async with open_test_broker(Broker(config)) as net:
        peer = await net.open_websocket()
        results = [net.broker.push(peer.fd, "x" * 1000) for _ in range(12)]
        assert results == [PushResult.QUEUED] * 9 + [PushResult.FULL] * 3
        for name in "abc":
            assert net.broker.add_subscription(peer.fd, name)
        with pytest.raises(Refused, match="106"):
            net.broker.add_subscription(peer.fd, "d")
        assert net.broker.end_subscription(peer.fd, "a")
        reply = await peer.request(connect={})
        assert {"b", "c"} <= set(reply["connect"]["subs"])
        assert "a" not in reply["connect"]["subs"]


async def test_a_client_with_a_subprotocol_is_never_plain(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker()) as net:
        peer = await net.open_websocket(headers={"Sec-WebSocket-Protocol": "centrifuge-json"})
        assert not net.broker.declare_plain(peer.fd)
        await peer.send_text("hello")
        assert (await peer.receive_close())[0] == 3501


# recovery


async def test_a_recovery_is_answered_with_the_position_that_was_asked_for(
    autojump_clock: MockClock,
) -> None:
    broker = Broker()

    @broker.on_connect
    async def let_in(event: object) -> ConnectReply:
        return ConnectReply(topics=("served",))

    async with open_test_broker(broker) as net:
        peer = await net.open_client()
        for number in range(5):
            for topic in ("own", "served"):
                broker.publish_nowait(topic, number)
        epochs = {topic: (await broker.history(topic))[1].epoch for topic in ("own", "served")}
        asked = {"recover": True, "offset": 2, "epoch": epochs["own"]}
        own = (await peer.request(subscribe={"channel": "own", **asked}))["subscribe"]
        back = await net.open_websocket()
        subs = {"served": {"recover": True, "offset": 2, "epoch": epochs["served"]}}
        reply = await back.request(connect={"subs": subs})
        for result in (own, reply["connect"]["subs"]["served"]):
            assert (result["recovered"], result["offset"]) == (True, 2)
            assert [each["offset"] for each in result["publications"]] == [3, 4, 5]


# a hook decides


def broker_with_plans(**settings: Any) -> Broker:
    broker = Broker(Config(**settings))

    @broker.on_subscribe
    async def decide(event: SubscribeEvent) -> None:
        if event.topic.startswith("staff.") and event.connection.user != "alice":
            raise Refused(103)

    @broker.on_connect
    async def name(event: Any) -> ConnectReply:
        return ConnectReply(user=event.token)

    return broker


@pytest.mark.parametrize("pattern", [">", "*.plans", "staff.*", "staff.>", "*.*"])
async def test_a_refused_topic_does_not_come_through_a_pattern(
    autojump_clock: MockClock, pattern: str
) -> None:
    async with open_test_broker(broker_with_plans()) as net:
        bob = await net.open_client(token="bob")
        net.broker.publish_nowait("staff.plans", "old secret", retain=True)
        assert code_of(await bob.request(subscribe={"channel": pattern})) == 103
        net.broker.publish_nowait("staff.plans", "secret")
        assert await data_to(bob) == []


@pytest.mark.parametrize("command", ["history", "presence", "presence_stats"])
async def test_a_topic_is_read_by_subscribers_alone_where_a_hook_decides(
    autojump_clock: MockClock, command: str
) -> None:
    async with open_test_broker(broker_with_plans()) as net:
        bob, alice = await net.open_client(token="bob"), await net.open_client(token="alice")
        net.broker.publish_nowait("staff.plans", "secret")
        asked: dict[str, Any] = {command: {"channel": "staff.plans"}}
        assert code_of(await bob.request(**asked)) == 103
        assert code_of(await bob.request(subscribe={"channel": "staff.plans"})) == 103
        assert code_of(await alice.request(**asked)) == 103
        assert "subscribe" in await alice.request(subscribe={"channel": "staff.plans"})
        assert command in await alice.request(**asked)


async def test_a_yes_to_a_pattern_counts_where_the_settings_say_so(
    autojump_clock: MockClock,
) -> None:
    async with open_test_broker(broker_with_plans(hook_decides_patterns=True)) as net:
        bob = await net.open_client(token="bob")
        assert "subscribe" in await bob.request(subscribe={"channel": "news.*"})
        net.broker.publish_nowait("news.eu", 1)
        assert await data_to(bob) == [1]
        # A reload that closes it is asked at the act, too.
        net.broker.reload(Config())
        net.broker.publish_nowait("news.eu", 2)
        assert await data_to(bob) == []


async def test_reading_is_closed_to_those_who_may_not_subscribe(autojump_clock: MockClock) -> None:
    config = Config(topics=TopicRules(may_subscribe="users"))
    broker = Broker(config)

    @broker.on_connect
    async def name(event: Any) -> ConnectReply:
        return ConnectReply(user=event.token)

    async with open_test_broker(broker) as net:
        stranger, user = await net.open_client(), await net.open_client(token="u")
        broker.publish_nowait("news", 1, retain=True)
        for command in ("history", "presence", "presence_stats", "subscribe"):
            asked: dict[str, Any] = {command: {"channel": "news"}}
            assert code_of(await stranger.request(**asked)) == 103, command
            assert command in await user.request(**asked)
        assert code_of(await stranger.request(subscribe={"channel": "*"})) == 103


# after an await


Act = Callable[[Peer], Awaitable[Any]]

ACTS: dict[str, Act] = {
    "publish": lambda peer: peer.request(publish={"channel": "news", "data": 1}),
    "rpc publish": lambda peer: peer.request(
        rpc={"method": "publish", "data": {"topic": "news", "data": 1}}
    ),
    "request": lambda peer: peer.request(
        rpc={"method": "request", "data": {"to": "news", "data": 1}}
    ),
    "will": lambda peer: peer.request(rpc={"method": "will", "data": {"topic": "news", "data": 1}}),
}


@pytest.mark.parametrize("act", ACTS)
async def test_a_right_that_goes_while_a_hook_waits_is_gone(
    autojump_clock: MockClock, act: str
) -> None:
    broker = Broker()

    @broker.on_publish
    async def wait(event: PublishEvent) -> None:
        await trio.sleep(1)

    async with open_test_broker(broker) as net:
        reader, peer = await net.open_client(), await net.open_client()
        await reader.request(subscribe={"channel": "news", "data": {"group": "g"}})
        replies: list[Any] = []

        async def run() -> None:
            replies.append(await ACTS[act](peer))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await trio.sleep(0.5)
            broker.reload(Config(topics=TopicRules(may_publish="none")))
        assert code_of(replies[0]) == 103
        await peer.aclose()
        assert await data_to(reader) == []


EXPIRING: dict[str, Act] = {
    **ACTS,
    **{
        method: lambda peer, method=method: peer.request(**{method: {"channel": "news"}})  # type: ignore[misc]
        for method in ("subscribe", "history", "presence", "presence_stats")
    },
    "rpc": lambda peer: peer.request(rpc={"method": "x"}),
}


@pytest.mark.parametrize("act", EXPIRING)
async def test_a_token_that_is_over_while_a_hook_waits_is_over(
    autojump_clock: MockClock, act: str
) -> None:
    """To the moment, and not when the broker looks at it next."""
    broker = Broker(Config(tokens=TokenRules(hmac_secret=SECRET), ping_seconds=500))

    async def wait(*about: Any) -> None:
        await trio.sleep(0.2)

    for hook in (broker.on_subscribe, broker.on_publish, broker.on_history, broker.on_presence):
        hook(wait)
    broker.on_rpc(wait)
    async with open_test_broker(broker) as net:
        await trio.sleep(0.45)
        now = net.node.now()
        claims = {"sub": "alice", "exp": now + 60, "subs": {"news": {"data": "x"}}}
        reader = await net.open_client(token=mint({"sub": "bob"}, SECRET.encode(), "HS256"))
        net.broker.add_subscription(reader.fd, "news")
        if act == "subscribe":
            del claims["subs"]
        peer = await net.open_client(token=mint(claims, SECRET.encode(), "HS256"))
        await trio.sleep(60 + 25 - 0.1)
        with pytest.raises(Closed, match="3005"):
            await EXPIRING[act](peer)
        pushes = await pushes_to(reader)
        assert [push for push in pushes if "pub" in push] == []
        assert broker.fds_of("alice") == []


async def test_a_subscription_that_is_over_while_a_hook_waits_reads_nothing(
    autojump_clock: MockClock,
) -> None:
    rules = TopicRules(may_read_history="subscribers")
    tokens = TokenRules(hmac_secret=SECRET)
    broker = Broker(Config(tokens=tokens, topics=rules, ping_seconds=500))

    @broker.on_history
    async def wait(event: ReadEvent) -> None:
        await trio.sleep(0.2)

    async with open_test_broker(broker) as net:
        await trio.sleep(0.45)
        peer = await net.open_client(token=mint({"sub": "alice"}, SECRET.encode(), "HS256"))
        claims = {"sub": "alice", "channel": "$plans", "exp": net.node.now() + 60}
        token = mint(claims, SECRET.encode(), "HS256")
        assert "subscribe" in await peer.request(subscribe={"channel": "$plans", "token": token})
        await trio.sleep(60 + 25 - 0.1)
        assert code_of(await peer.request(history={"channel": "$plans"})) == 103


READS: dict[str, Act] = {
    "subscribe": lambda peer: peer.request(subscribe={"channel": "news", "recover": True}),
    "history": lambda peer: peer.request(history={"channel": "news", "limit": -1}),
    "a page of it": lambda peer: peer.request(
        history={"channel": "news", "limit": 1, "since": {"offset": 1, "epoch": ""}}
    ),
}


@pytest.mark.parametrize("loss", ["the rules", "the user"])
@pytest.mark.parametrize("read", READS)
async def test_a_right_that_goes_while_a_history_is_fetched_is_gone(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, read: str, loss: str
) -> None:
    """As on Redis, where what a topic keeps comes in pieces."""
    broker = Broker(Config(topics=TopicRules(may_subscribe="users")))
    asked: list[str] = []

    async def fetch(topics: Any, *seen: Any) -> None:
        asked.extend(topics)
        await trio.sleep(1)

    async with open_test_broker(broker) as net:
        engine = net.node.router.engine
        monkeypatch.setattr(engine, "durability", "shared")
        monkeypatch.setattr(engine, "knows", lambda *_: "news" in asked)
        monkeypatch.setattr(engine, "fetch", fetch)
        peer = await net.open_client()
        broker.bind(peer.fd, "alice")
        for number in range(3):
            broker.publish_nowait("news", number)
        replies: list[Any] = []

        async def run() -> None:
            replies.append(await READS[read](peer))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await trio.sleep(0.5)
            if loss == "the user":
                broker.bind(peer.fd, "")
            else:
                broker.reload(Config(topics=TopicRules(may_subscribe="none")))
        assert asked == ["news"]
        assert code_of(replies[0]) == 103
        assert await data_to(peer) == []


def asking_broker(seen: list[str], wait: Callable[[Connection], Awaitable[None]]) -> Broker:
    """All hooks about topics wait, and then say yes to alice alone."""
    broker = Broker()

    async def decide(event: SubscribeEvent | PublishEvent | ReadEvent) -> None:
        seen.append(event.connection.user)
        await wait(event.connection)
        if seen[-1] != "alice":
            raise Refused(103)

    broker.on_subscribe(decide)
    broker.on_publish(decide)
    broker.on_history(decide)
    broker.on_presence(decide)
    return broker


QUESTIONS: dict[str, Act] = {
    **ACTS,
    **{
        method: lambda peer, method=method: peer.request(**{method: {"channel": "news"}})  # type: ignore[misc]
        for method in ("subscribe", "history", "presence", "presence_stats")
    },
}


@pytest.mark.parametrize("question", QUESTIONS)
async def test_a_hooks_yes_is_for_the_user_that_it_was_asked_about(
    autojump_clock: MockClock, question: str
) -> None:
    seen: list[str] = []

    async def wait(connection: Connection) -> None:
        await trio.sleep(1)

    async with open_test_broker(asking_broker(seen, wait)) as net:
        reader, peer = await net.open_client(), await net.open_client()
        net.broker.add_subscription(reader.fd, "news")
        net.broker.bind(peer.fd, "alice")
        replies: list[Any] = []

        async def run() -> None:
            replies.append(await QUESTIONS[question](peer))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await trio.sleep(0.5)
            net.broker.bind(peer.fd, "bob")
        assert (code_of(replies[0]), seen) == (103, ["alice", "bob"])
        await peer.aclose()
        assert await data_to(reader) == []


@pytest.mark.parametrize(
    ("users", "code", "asked"),
    [
        (["alice"], 0, ["", "alice"]),
        (["bob"], 103, ["", "bob"]),
    ],
)
async def test_a_hook_that_says_itself_who_it_is_is_asked_once_more(
    autojump_clock: MockClock, users: list[str], code: int, asked: list[str]
) -> None:
    seen: list[str] = []
    broker = Broker()

    @broker.on_subscribe
    async def name(event: SubscribeEvent) -> None:
        seen.append(event.connection.user)
        if not seen[-1]:
            broker.bind(event.connection.fd, users[0])
        elif seen[-1] != "alice":
            raise Refused(103)

    async with open_test_broker(broker) as net:
        peer = await net.open_client()
        assert code_of(await peer.request(subscribe={"channel": "news"})) == code
        assert seen == asked


async def test_a_hook_that_makes_it_another_each_time_is_not_asked_for_ever(
    autojump_clock: MockClock,
) -> None:
    seen: list[str] = []
    broker = Broker()

    @broker.on_subscribe
    async def name(event: SubscribeEvent) -> None:
        seen.append(event.connection.user)
        broker.bind(event.connection.fd, f"user{len(seen)}")

    async with open_test_broker(broker) as net:
        peer = await net.open_client()
        assert code_of(await peer.request(subscribe={"channel": "news"})) == 100
        assert seen == ["", "user1", "user2", "user3"]
        assert "unsubscribe" in await peer.request(unsubscribe={"channel": "news"})


async def test_a_client_that_goes_while_a_hook_is_asked_once_more_leaves_nothing(
    autojump_clock: MockClock,
) -> None:
    seen: list[str] = []
    broker = Broker()

    @broker.on_subscribe
    async def wait(event: SubscribeEvent) -> None:
        seen.append(event.connection.user)
        await trio.sleep(1)

    async with open_test_broker(broker) as net:
        peer = await net.open_client()
        await peer.send_json({"id": 7, "subscribe": {"channel": "news"}})
        await trio.sleep(0.5)
        net.broker.bind(peer.fd, "alice")
        await trio.sleep(1)
        assert seen == ["", "alice"]
        net.broker.disconnect(peer.fd)
        await trio.sleep(3)
        assert net.broker.topics() == {}


async def test_a_right_that_goes_while_a_subscribe_is_looked_at_is_gone(
    autojump_clock: MockClock,
) -> None:
    broker = Broker()

    @broker.on_subscribe
    async def wait(event: SubscribeEvent) -> None:
        await trio.sleep(1)
        broker.bind(event.connection.fd, "bob")

    async with open_test_broker(broker) as net:
        peer = await net.open_client()
        net.broker.bind(peer.fd, "alice")
        reply = await peer.request(subscribe={"channel": "room#alice,carol"})
        assert code_of(reply) == 103


async def test_a_will_is_held_to_the_rules_of_its_time(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker()) as net:
        reader, peer = await net.open_client(), await net.open_client()
        await reader.request(subscribe={"channel": "news"})
        will = {"method": "will", "data": {"topic": "news", "data": 1}}
        assert "rpc" in await peer.request(rpc=will)
        net.broker.reload(Config(topics=TopicRules(may_publish="none")))
        await peer.aclose()
        await wait_all_tasks_blocked()
        assert await data_to(reader) == []


async def test_a_will_may_be_for_subscribers_alone_and_may_be_retained(
    autojump_clock: MockClock,
) -> None:
    config = Config(topics=TopicRules(may_publish="subscribers"))
    async with open_test_broker(Broker(config)) as net:
        peer = await net.open_client()
        await peer.request(subscribe={"channel": "seen"})
        will = {"topic": "seen", "data": "gone", "retain": True}
        assert "rpc" in await peer.request(rpc={"method": "will", "data": will})
        await peer.aclose()
        await wait_all_tasks_blocked()
        later = await net.open_client()
        await later.request(subscribe={"channel": "seen"})
        assert await data_to(later) == ["gone"]


# identities


async def test_a_bound_connection_is_the_new_user_everywhere(autojump_clock: MockClock) -> None:
    broker = Broker(Config(personal_topic=True))

    @broker.on_connect
    async def name(event: Any) -> ConnectReply:
        return ConnectReply(user=event.token)

    async with open_test_broker(broker) as net:
        watcher, peer = await net.open_client(token="w"), await net.open_client(token="alice")
        await watcher.request(subscribe={"channel": "news", "join_leave": True})
        await peer.request(subscribe={"channel": "news"})
        await peer.request(subscribe={"channel": "room#alice,carol"})
        await pushes_to(watcher)
        broker.bind(peer.fd, "bob")
        told = await pushes_to(peer)
        ended = {push["channel"] for push in told if "unsubscribe" in push}
        begun = {push["channel"] for push in told if "subscribe" in push}
        assert ended == {"#alice", "room#alice,carol", "user:alice"}
        assert begun == {"user:bob", "#bob"}
        seen = [(next(iter(push.keys() - {"channel"})), push) for push in await pushes_to(watcher)]
        who = {"client": str(peer.fd)}
        assert [(kind, push[kind]["info"]) for kind, push in seen] == [
            ("leave", {"user": "alice", **who}),
            ("join", {"user": "bob", **who}),
        ]
        presence = (await watcher.request(presence={"channel": "news"}))["presence"]["presence"]
        assert presence[str(peer.fd)]["user"] == "bob"
        await peer.send_json({"publish": {"channel": "news", "data": 1}})
        (push,) = await pushes_to(watcher)
        assert push["pub"]["info"]["user"] == "bob"
        assert broker.fds_of("alice") == []
        for topic in ("#alice", "room#alice,carol"):
            broker.publish_nowait(topic, "for alice")
        with pytest.raises(Refused, match="102"):
            broker.publish_nowait("user:alice", "for alice")
        assert {each["channel"] for each in await pushes_to(peer)} == {"news"}


Become = Callable[[Network, Peer], Awaitable[Any]]


async def connect_as(net: Network, peer: Peer, user: str = "") -> Any:
    return (await peer.request(connect={"token": user}))["connect"]["subs"]


async def bound_before(net: Network, peer: Peer) -> Any:
    net.broker.bind(peer.fd, "bob")
    return await connect_as(net, peer)


async def bound_back(net: Network, peer: Peer) -> Any:
    net.broker.bind(peer.fd, "bob")
    net.broker.bind(peer.fd, "alice")
    return await connect_as(net, peer)


async def bound_at_connect(net: Network, peer: Peer) -> Any:
    return await connect_as(net, peer, "bob")


async def the_same(net: Network, peer: Peer) -> Any:
    return await connect_as(net, peer, "alice")


BECOMES: dict[str, tuple[Become, set[str]]] = {
    "bound": (bound_before, {"news", "room#alice,bob"}),
    "bound there and back": (bound_back, {"news", "room#alice,bob"}),
    "by its connect": (bound_at_connect, {"news", "room#alice,bob"}),
    "nobody else": (the_same, {"news", "room#alice,bob", "#alice", "room#alice,carol"}),
}


@pytest.mark.parametrize("become", BECOMES)
async def test_topics_that_wait_are_held_to_the_user_too(
    autojump_clock: MockClock, become: str
) -> None:
    """As those are that a bind finds begun: a topic that names users ends with the last of them."""
    broker = Broker(Config(direct_topics=False))

    @broker.on_connect
    async def name(event: Any) -> ConnectReply:
        return ConnectReply(user=event.token)

    async with open_test_broker(broker) as net:
        peer = await net.open_websocket()
        broker.bind(peer.fd, "alice")
        for topic in ("news", "#alice", "room#alice,carol", "room#alice,bob"):
            assert broker.add_subscription(peer.fd, topic)
        act, kept = BECOMES[become]
        assert set(await act(net, peer)) == kept


async def test_a_subscription_by_token_ends_with_its_user(autojump_clock: MockClock) -> None:
    broker = Broker(Config(tokens=TokenRules(hmac_secret=SECRET)))
    async with open_test_broker(broker) as net:
        token = mint({"sub": "alice"}, SECRET.encode(), "HS256")
        peer = await net.open_client(token=token)
        sub = mint({"sub": "alice", "channel": "$plans"}, SECRET.encode(), "HS256")
        assert "subscribe" in await peer.request(subscribe={"channel": "$plans", "token": sub})
        broker.bind(peer.fd, "bob")
        broker.publish_nowait("$plans", "secret")
        assert await data_to(peer) == []
        assert code_of(await peer.request(history={"channel": "$plans"})) == 103


async def test_keys_of_anonymous_clients_are_their_own(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker()) as net:
        reader, one, two = [await net.open_client() for _ in range(3)]
        await reader.request(subscribe={"channel": "news"})
        for peer, data in ((one, 1), (two, 2), (two, 3)):
            params = {"topic": "news", "data": data, "key": "1"}
            assert "rpc" in await peer.request(rpc={"method": "publish", "data": params})
        assert await data_to(reader) == [1, 2]


async def test_a_closing_connection_is_no_longer_its_users(autojump_clock: MockClock) -> None:
    config = Config(max_connections_per_user=1)
    broker = Broker(config)

    @broker.on_connect
    async def name(event: Any) -> ConnectReply:
        return ConnectReply(user=event.token)

    async with open_test_broker(broker) as net:
        first = await net.open_client(token="u")
        broker.disconnect(first.fd)
        assert broker.fds_of("u") == []
        # The first has not even read its Close.
        assert (await net.open_client(token="u")).fd != first.fd


@pytest.mark.parametrize(
    ("direct_topics", "user", "name", "code"),
    [
        (True, "alice", "fd:1", 105),
        (True, "alice", "user:alice", 105),
        (True, "alice", "user:bob", 103),
        (True, "alice", "fd:2", 103),
        (True, "", "fd:1", 105),
        (True, "", "user:", 103),
        (False, "alice", "fd:1", 103),
        (False, "alice", "user:alice", 103),
        (False, "", "user:", 103),
    ],
)
async def test_nobody_is_told_that_he_has_what_he_has_not(
    autojump_clock: MockClock, direct_topics: bool, user: str, name: str, code: int
) -> None:
    async with open_test_broker(Broker(Config(direct_topics=direct_topics))) as net:
        peer = await net.open_client()
        net.broker.bind(peer.fd, user)
        assert code_of(await peer.request(subscribe={"channel": name})) == code


@pytest.mark.parametrize("first", [7, "clock"])
async def test_fds_begin_where_the_settings_say(autojump_clock: MockClock, first: Any) -> None:
    seen = []
    for _ in range(2):
        async with open_test_broker(Broker(Config(first_fd=first))) as net:
            seen += [(await net.open_client()).fd for _ in range(2)]
    if first == 7:
        assert seen == [7, 8, 7, 8]
    else:
        assert len(set(seen)) == 4
        assert seen == sorted(seen)
        assert all(fd < 2**53 for fd in seen)


# whole or not at all


@pytest.mark.parametrize(
    "connect",
    [
        {"subs": {"news": {"type": 1}}},
        {"subs": {"other": {"type": 2}}},
    ],
)
async def test_a_refused_connect_leaves_nothing(
    autojump_clock: MockClock, connect: dict[str, Any]
) -> None:
    broker = Broker()

    @broker.on_connect
    async def let_in(event: Any) -> ConnectReply:
        return ConnectReply(user="u", topics=("news", "more"))

    async with open_test_broker(broker) as net:
        peer = await net.open_websocket()
        assert code_of(await peer.request(connect=connect)) == 108
        assert broker.stats().hub.subscriptions == 0
        assert broker.fds_of("u") == []
        assert await states(net, peer) == "plain"
        reply = await peer.request(connect={})
        assert {"news", "more"} <= set(reply["connect"]["subs"])


async def states(net: Network, peer: Peer) -> str:
    info = net.broker.connection_info(peer.fd)
    assert info is not None
    return info.protocol
