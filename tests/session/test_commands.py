"""Every command of the Centrifuge protocol, asked by a client in memory; sections 2 and 3 of the
wire reference."""

from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from broker import (
    Broker,
    Config,
    ConnectEvent,
    Connection,
    ConnectReply,
    Disconnect,
    PublishEvent,
    PublishReply,
    ReadEvent,
    Refused,
    SubscribeEvent,
    SubscribeReply,
    TopicRules,
)
from broker.testing import Network, Peer, open_test_broker
from tests.conftest import ask, data_of, served
from tests.session.conftest import (
    INTERNAL,
    connect,
    error_of,
    missed,
    pub,
    pushed,
    refused,
    token,
)

# publish and subscribe


async def test_a_publication_reaches_all_subscribers_and_its_publisher_too(
    autojump_clock: MockClock, net: Network
) -> None:
    one, two, other = [await net.open_client() for _ in range(3)]
    for client in (one, two):
        assert await ask(client, {"id": 2, "subscribe": {"channel": "news"}}) == [
            {"id": 2, "subscribe": {}}
        ]
    assert await ask(one, {"id": 3, "publish": {"channel": "news", "data": {"a": "ü"}}}) == [
        pub("news", {"a": "ü"}, one, offset=1),
        {"id": 3, "publish": {}},
    ]
    assert await two.receive_all() == [pub("news", {"a": "ü"}, one, offset=1)]
    assert await other.receive_all() == []


async def test_a_topic_without_history_has_no_offsets(autojump_clock: MockClock) -> None:
    config = Config(topics=TopicRules(history_size=0))
    async with open_test_broker(Broker(config)) as net:
        client = await net.open_client()
        fields = {"channel": "news", "recoverable": True, "recover": True}
        assert await ask(client, {"id": 2, "subscribe": fields}) == [{"id": 2, "subscribe": {}}]
        await client.send_json({"publish": {"channel": "news", "data": 1}})
        assert await client.receive_all() == [pub("news", 1, client)]
        assert await error_of(client, history={"channel": "news"}) == 108


async def test_a_publication_of_the_broker_has_no_sender(
    autojump_clock: MockClock, net: Network
) -> None:
    client = await net.open_client()
    await client.request(subscribe={"channel": "news"})
    net.broker.publish_nowait("news", ["x"])
    assert await client.receive_all() == [pub("news", ["x"], offset=1)]


async def test_an_unsubscribed_client_gets_nothing(autojump_clock: MockClock, net: Network) -> None:
    client = await net.open_client()
    await client.request(subscribe={"channel": "news"})
    assert await ask(client, {"id": 2, "unsubscribe": {"channel": "news"}}) == [
        {"id": 2, "unsubscribe": {}}
    ]
    net.broker.publish_nowait("news", 1)
    assert await client.receive_all() == []
    assert await ask(client, {"id": 3, "unsubscribe": {"channel": "news"}}) == [
        {"id": 3, "unsubscribe": {}}
    ]


async def test_a_publish_without_an_id_is_not_answered_even_if_it_is_refused(
    autojump_clock: MockClock, net: Network
) -> None:
    client = await net.open_client()
    await client.request(subscribe={"channel": "news"})
    commands = [
        {"publish": {"channel": "news", "data": 1}},
        {"publish": {"channel": "*", "data": 2}},
        {"publish": {"channel": "news"}},
        {"publish": {"channel": "fd:99", "data": 3}},
    ]
    assert data_of(await ask(client, *commands)) == [1]

    @net.broker.on_publish
    async def refuse(event: PublishEvent) -> None:
        if event.data == b"1":
            raise Refused(103)
        raise ZeroDivisionError

    assert await ask(client, *commands) == []


@pytest.mark.parametrize(
    "topic, code",
    [
        ("news.*", 107),
        (">", 107),
        ("a.>.b", 107),
        ("", 107),
        ("a\x00b", 107),
        ("a\nb", 107),
        ("x" * 256, 107),
        ("é" * 128, 107),
        ("x" * 2**19, 107),
        ("fd:", 102),
        ("fd:0", 102),
        ("fd:01", 102),
        ("fd:99", 102),
        ("fd:-1", 102),
        ("fd:1 ", 102),
        ("fd:１", 102),
        ("fd:18446744073709551616", 102),
        ("fd:" + "9" * 200, 102),
    ],
)
async def test_a_name_that_is_no_topic_here_cannot_be_published_to(
    autojump_clock: MockClock, net: Network, topic: str, code: int
) -> None:
    client = await net.open_client()
    assert await error_of(client, publish={"channel": topic, "data": 1}) == code
    assert net.broker.stats().published == 0
    assert "publish" in await client.request(publish={"channel": "é" * 127, "data": 1})


@pytest.mark.parametrize(
    "name, code",
    [
        ("", 107),
        ("a\x7fb", 107),
        ("x" * 256, 107),
        ("a.>.b", 107),
        (">.>", 107),
        ("*." * 10_000 + ">", 107),
        ("*." * 9 + "*", 107),
        (".".join("a" * 32) + ".*", 107),
        ("fd:99", 103),
        ("fd:x", 103),
        ("fd:*", 103),
        ("fd:1.>", 103),
    ],
)
async def test_a_bad_name_or_a_foreign_fd_cannot_be_subscribed_to(
    autojump_clock: MockClock, net: Network, name: str, code: int
) -> None:
    client = await net.open_client()
    assert await error_of(client, subscribe={"channel": name}) == code
    assert net.broker.stats().hub.subscriptions == 0


async def test_nobody_subscribes_twice(autojump_clock: MockClock, net: Network) -> None:
    client = await net.open_client()
    await client.request(subscribe={"channel": "news"})
    assert await error_of(client, subscribe={"channel": "news"}) == 105
    assert await error_of(client, subscribe={"channel": f"fd:{client.fd}"}) == 105
    net.broker.publish_nowait("news", 1)
    assert data_of(await client.receive_all()) == [1]


async def test_a_connection_has_a_number_of_subscriptions(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker(Config(max_topics=2))) as net:
        client = await net.open_client()
        for name in ("a", "b.*"):
            assert "subscribe" in await client.request(subscribe={"channel": name})
        for name in ("c", "d.*"):
            assert await error_of(client, subscribe={"channel": name}) == 106
        await client.request(unsubscribe={"channel": "a"})
        assert "subscribe" in await client.request(subscribe={"channel": "c"})


async def test_a_pattern_is_told_each_publications_topic(
    autojump_clock: MockClock, net: Network
) -> None:
    client = await net.open_client()
    for name in ("news.*", "news.>"):
        assert await ask(
            client, {"id": 2, "subscribe": {"channel": name, "recoverable": True}}
        ) == [{"id": 2, "subscribe": {}}]
    for topic in ("news", "news.eu", "news.eu.fr"):
        net.broker.publish_nowait(topic, topic)
    assert await client.receive_all() == [
        pub("news.>", "news.eu", offset=1, channel="news.eu", tags={"topic": "news.eu"}),
        pub("news.*", "news.eu", offset=1, channel="news.eu", tags={"topic": "news.eu"}),
        pub("news.>", "news.eu.fr", offset=1, channel="news.eu.fr", tags={"topic": "news.eu.fr"}),
    ]


# direct messages


async def test_a_direct_message_reaches_one_fd_and_says_who_sent_it(
    autojump_clock: MockClock, net: Network
) -> None:
    alice, bob, carol = [await net.open_client() for _ in range(3)]
    for listener in (carol, bob):
        for name in ("*", ">"):
            await listener.request(subscribe={"channel": name})
    fd = bob.fd
    objects = await ask(alice, {"id": 2, "publish": {"channel": f"fd:{fd}", "data": "hi"}})
    assert objects == [{"id": 2, "publish": {}}]
    assert await bob.receive_all() == [pub(f"fd:{fd}", "hi", alice)]
    assert await carol.receive_all() == []


async def test_a_plain_peer_gets_a_direct_message_as_it_is(
    autojump_clock: MockClock, net: Network
) -> None:
    client, plain = await net.open_client(), await net.open_plain()
    for data in ("hi", {"a": 1}):
        await client.request(publish={"channel": f"fd:{plain.fd}", "data": data})
    assert [await plain.receive_text() for _ in range(2)] == ["hi", '{"a":1}']


async def test_a_client_that_is_gone_or_leaving_gets_no_direct_message(
    autojump_clock: MockClock, net: Network
) -> None:
    client, gone, leaving = [await net.open_client() for _ in range(3)]
    await gone.aclose()
    await wait_all_tasks_blocked()
    net.broker.disconnect(leaving.fd)
    for fd in (gone.fd, leaving.fd, 99):
        reply = await client.request(publish={"channel": f"fd:{fd}", "data": 1})
        assert reply["error"] == {"code": 102, "message": f"no connection has fd {fd}"}


async def test_nobody_sends_to_itself_or_reads_what_is_sent_to_others(
    autojump_clock: MockClock, net: Network
) -> None:
    client, other = await net.open_client(), await net.open_client()
    assert await error_of(client, publish={"channel": f"fd:{client.fd}", "data": 1}) == 107
    for method, code in [("subscribe", 103), ("history", 108), ("presence", 108)]:
        assert await error_of(client, **{method: {"channel": f"fd:{other.fd}"}}) == code


async def test_an_own_fd_cannot_be_unsubscribed_from(
    autojump_clock: MockClock, net: Network
) -> None:
    client, other = await net.open_client(), await net.open_client()
    await client.request(unsubscribe={"channel": f"fd:{client.fd}"})
    await other.request(publish={"channel": f"fd:{client.fd}", "data": "still here"})
    assert data_of(await client.receive_all()) == ["still here"]


# presence


async def test_presence_tells_who_is_subscribed(autojump_clock: MockClock, net: Network) -> None:
    one, two = await net.open_client(), await net.open_client()
    net.broker.bind(one.fd, "alice")
    await one.request(subscribe={"channel": "news"})
    await two.request(subscribe={"channel": "news"})
    await two.request(subscribe={"channel": "*"})
    objects = await ask(
        two,
        {"id": 2, "presence": {"channel": "news"}},
        {"id": 3, "presence_stats": {"channel": "news"}},
    )
    clients = {
        str(p.fd): {"user": user, "client": str(p.fd)} for p, user in ((one, "alice"), (two, ""))
    }
    assert objects == [
        {"id": 2, "presence": {"presence": clients}},
        {"id": 3, "presence_stats": {"num_clients": 2, "num_users": 2}},
    ]
    await one.aclose()
    await wait_all_tasks_blocked()
    reply = await two.request(presence={"channel": "news"})
    assert list(reply["presence"]["presence"]) == [str(two.fd)]


async def test_a_presence_that_is_too_long_is_refused_and_can_be_counted(
    autojump_clock: MockClock,
) -> None:
    async with served(presence_max_clients=2) as net:
        one, two, three = [await net.open_client() for _ in range(3)]
        for client in (one, two):
            await client.request(subscribe={"channel": "t"})
        assert len((await three.request(presence={"channel": "t"}))["presence"]["presence"]) == 2
        await three.request(subscribe={"channel": "t"})
        reply = await three.request(presence={"channel": "t"})
        text = "more than 2 clients: ask for presence_stats"
        assert reply["error"] == {"code": 106, "message": text}
        reply = await three.request(presence_stats={"channel": "t"})
        assert reply["presence_stats"]["num_clients"] == 3


async def test_presence_stats_count_users_once(autojump_clock: MockClock, net: Network) -> None:
    @net.broker.on_connect
    async def name(event: ConnectEvent) -> ConnectReply:
        return ConnectReply(user=event.token)

    for user in ("alice", "alice", "bob"):
        client = await net.open_client(token=user)
        await client.request(subscribe={"channel": "news"})
    reply = await client.request(presence_stats={"channel": "news"})
    assert reply["presence_stats"] == {"num_clients": 3, "num_users": 2}


@pytest.mark.parametrize("method", ["presence", "presence_stats"])
async def test_presence_may_be_switched_off(autojump_clock: MockClock, method: str) -> None:
    async with open_test_broker(Broker(Config(topics=TopicRules(presence=False)))) as net:
        client = await net.open_client()
        assert await error_of(client, **{method: {"channel": "news"}}) == 108


@pytest.mark.parametrize("method", ["presence", "presence_stats", "history"])
async def test_only_topics_can_be_read(
    autojump_clock: MockClock, net: Network, method: str
) -> None:
    client = await net.open_client()
    assert await error_of(client, **{method: {"channel": "news.*"}}) == 108
    assert await error_of(client, **{method: {"channel": ""}}) == 107


# history


async def topic_with_history(net: Network, count: int = 5) -> tuple[Peer, str]:
    """A client that does not listen, and the epoch of `news`, which has 1..count."""
    for number in range(1, count + 1):
        net.broker.publish_nowait("news", number)
    client = await net.open_client()
    reply = await client.request(history={"channel": "news"})
    return client, reply["history"]["epoch"]


@pytest.mark.parametrize(
    "request_fields, expected",
    [
        ({}, []),
        ({"limit": 0}, []),
        ({"limit": -1}, [1, 2, 3, 4, 5]),
        ({"limit": 2}, [1, 2]),
        ({"limit": 2**64}, [1, 2, 3, 4, 5]),
        ({"limit": -1, "reverse": True}, [5, 4, 3, 2, 1]),
        ({"limit": 2, "reverse": True}, [5, 4]),
        ({"limit": -1, "since": {"offset": 3}}, [4, 5]),
        ({"limit": 1, "since": {"offset": 3}}, [4]),
        ({"limit": -1, "since": {"offset": 0}}, [1, 2, 3, 4, 5]),
        ({"limit": -1, "since": {"offset": 3}, "reverse": True}, [2, 1]),
        ({"limit": -1, "since": {"offset": 5}}, []),
        ({"limit": -1, "since": {"offset": 2**64}}, []),
    ],
)
async def test_history(
    autojump_clock: MockClock, net: Network, request_fields: dict[str, object], expected: list[int]
) -> None:
    client, epoch = await topic_with_history(net)
    reply = await client.request(history={"channel": "news", **request_fields})
    assert reply["history"] == {
        "publications": [{"data": number, "offset": number} for number in expected],
        "epoch": epoch,
        "offset": 5,
    }


async def test_history_says_who_published(autojump_clock: MockClock, net: Network) -> None:
    client = await net.open_client()
    await client.request(publish={"channel": "news", "data": 1})
    reply = await client.request(history={"channel": "news", "limit": 1})
    info = {"user": "", "client": str(client.fd)}
    assert reply["history"]["publications"] == [{"data": 1, "offset": 1, "info": info}]


@pytest.mark.parametrize(
    "request_fields, code",
    [
        ({"since": {"offset": 3, "epoch": "other"}}, 112),
        ({"since": {"offset": 0}, "reverse": True}, 107),
        ({"since": {}, "reverse": True}, 107),
    ],
)
async def test_history_that_cannot_be_told(
    autojump_clock: MockClock, net: Network, request_fields: dict[str, object], code: int
) -> None:
    client, _ = await topic_with_history(net)
    fields = {"channel": "news", "limit": -1, **request_fields}
    assert await error_of(client, history=fields) == code


async def test_history_is_forgotten_after_its_time(autojump_clock: MockClock) -> None:
    config = Config(topics=TopicRules(history_ttl=60, history_size=3))
    async with open_test_broker(Broker(config)) as net:
        client, epoch = await topic_with_history(net)
        reply = await client.request(history={"channel": "news", "limit": -1})
        assert [p["data"] for p in reply["history"]["publications"]] == [3, 4, 5]
        await client.aclose()
        await trio.sleep(61)
        client = await net.open_client()
        reply = await client.request(history={"channel": "news", "limit": -1})
        assert reply["history"] == {"publications": [], "offset": 5, "epoch": epoch}


async def test_history_ends_where_a_reply_is_full_and_goes_on_from_there(
    autojump_clock: MockClock,
) -> None:
    async with served(history_reply_bytes=3000, topics=TopicRules(history_size=10)) as net:
        client = await net.open_client()
        for number in range(5):
            net.broker.publish_nowait("news", f"{number}" * 1000)
        got: list[str] = []
        offset, top = 0, 5
        while offset < top:
            since = {"offset": offset, "epoch": ""}
            asked = {"channel": "news", "limit": -1, "since": since}
            page = (await client.request(history=asked))["history"]
            assert page["offset"] == top
            assert len(page["publications"]) <= 2
            got += [each["data"][0] for each in page["publications"]]
            offset = page["publications"][-1]["offset"]
        assert got == list("01234")


# recovery


@pytest.mark.parametrize("flag", [0, 2])
async def test_a_recovery_of_more_than_a_reply_may_hold_is_none(
    autojump_clock: MockClock, flag: int
) -> None:
    async with served(history_reply_bytes=3000, topics=TopicRules(history_size=10)) as net:
        client = await net.open_client()
        epoch = (await client.request(history={"channel": "news"}))["history"]["epoch"]
        for _ in range(3):
            net.broker.publish_nowait("news", "x" * 1000)
        reply = await subscribe_at(client, 0, epoch, flag=flag)
        if flag:
            assert reply["error"]["code"] == 112
        else:
            assert (missed(reply), reply["subscribe"]["recovered"]) == ([], False)
            await client.request(unsubscribe={"channel": "news"})
        reply = await subscribe_at(client, 1, epoch, flag=flag)
        assert (len(missed(reply)), reply["subscribe"]["recovered"]) == (2, True)
        await client.request(unsubscribe={"channel": "news"})
        net.broker.publish_nowait("news", "x" * 10_000)
        reply = await subscribe_at(client, 3, epoch, flag=flag)
        assert (len(missed(reply)), reply["subscribe"]["recovered"]) == (1, True), "one of any size"


async def subscribe_at(client: Peer, offset: int, epoch: str, **fields: object) -> Any:
    return await client.request(
        subscribe={
            "channel": "news",
            "recover": True,
            "offset": offset,
            "epoch": epoch,
            **fields,
        }
    )


async def test_a_first_subscribe_says_where_the_topic_stands(
    autojump_clock: MockClock, net: Network
) -> None:
    client, epoch = await topic_with_history(net)
    for wish in ("recoverable", "positioned"):
        reply = await client.request(subscribe={"channel": "news", wish: True})
        assert reply["subscribe"] == {
            "recoverable": True,
            "positioned": True,
            "publications": [],
            "offset": 5,
            "epoch": epoch,
        }
        await client.request(unsubscribe={"channel": "news"})


@pytest.mark.parametrize("offset", [0, 2, 4, 5])
@pytest.mark.parametrize("tell_epoch", [True, False])
async def test_missed_publications_come_in_the_reply_and_once(
    autojump_clock: MockClock, net: Network, offset: int, tell_epoch: bool
) -> None:
    client, epoch = await topic_with_history(net)
    reply = await subscribe_at(client, offset, epoch if tell_epoch else "")
    assert reply["subscribe"] == {
        "recoverable": True,
        "positioned": True,
        "was_recovering": True,
        "recovered": True,
        "publications": [{"data": n, "offset": n} for n in range(offset + 1, 6)],
        # The position that was asked for: a client keeps it before it hands out what was missed.
        "offset": offset,
        "epoch": epoch,
    }
    net.broker.publish_nowait("news", 6)
    assert await client.receive_all() == [pub("news", 6, offset=6)]


@pytest.mark.parametrize(
    "offset, epoch", [(6, None), (2**64, None), (3, "other"), (0, "other"), (5, "other")]
)
async def test_a_position_that_is_not_of_this_topic_is_not_recovered_from(
    autojump_clock: MockClock, net: Network, offset: int, epoch: str | None
) -> None:
    client, current = await topic_with_history(net)
    epoch = current if epoch is None else epoch
    reply = await subscribe_at(client, offset, epoch, flag=2)
    assert reply["error"] == {"code": 112, "message": "unrecoverable position"}
    assert net.broker.stats().hub.subscriptions == 0
    reply = await subscribe_at(client, offset, epoch)
    subscribed = reply["subscribe"]
    assert (subscribed["was_recovering"], subscribed["recovered"]) == (True, False)
    assert (subscribed["publications"], subscribed["offset"]) == ([], 5)
    assert subscribed["epoch"] == current


async def test_a_recovery_is_never_partial(autojump_clock: MockClock) -> None:
    config = Config(topics=TopicRules(history_size=3))
    async with open_test_broker(Broker(config)) as net:
        client, epoch = await topic_with_history(net)
        reply = await subscribe_at(client, 2, epoch)
        assert missed(reply) == [3, 4, 5]
        await client.request(unsubscribe={"channel": "news"})
        reply = await subscribe_at(client, 1, epoch)
        assert (missed(reply), reply["subscribe"]["recovered"]) == ([], False)


async def test_a_client_that_has_seen_nothing_recovers_all_since_it_subscribed(
    autojump_clock: MockClock, net: Network
) -> None:
    client = await net.open_client()
    reply = await client.request(subscribe={"channel": "news", "recoverable": True})
    assert reply["subscribe"]["offset"] == 0
    await client.request(unsubscribe={"channel": "news"})
    net.broker.publish_nowait("news", "first")
    assert missed(await subscribe_at(client, 0, reply["subscribe"]["epoch"])) == ["first"]


@pytest.mark.parametrize("pauses", range(5))
async def test_publications_during_a_subscribe_come_once(
    autojump_clock: MockClock, net: Network, pauses: int
) -> None:
    """However long the authorizer takes beside a busy publisher: no gap, nothing twice."""
    client, epoch = await topic_with_history(net)

    @net.broker.on_subscribe
    async def look(event: SubscribeEvent) -> None:
        for _ in range(pauses):
            await trio.sleep(0.01)

    async def publish() -> None:
        for number in range(6, 30):
            net.broker.publish_nowait("news", number)
            await trio.sleep(0.003)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(publish)
        reply, *pushes = await ask(
            client,
            {
                "id": 2,
                "subscribe": {"channel": "news", "recover": True, "offset": 3, "epoch": epoch},
            },
        )
    seen = missed(reply) + data_of(pushes) + data_of(await client.receive_all())
    assert seen == list(range(4, 30))
    assert reply["subscribe"]["offset"] == 3


# join and leave


async def test_a_client_with_join_leave_sees_others_come_and_go(
    autojump_clock: MockClock, net: Network
) -> None:
    watcher, other, quiet = [await net.open_client() for _ in range(3)]
    shown = [{"user": "", "client": str(p.fd)} for p in (watcher, other, quiet)]
    fields = {"channel": "news", "join_leave": True}
    assert await ask(watcher, {"id": 2, "subscribe": fields}) == [
        {"id": 2, "subscribe": {}},
        pushed("news", join={"info": shown[0]}),
    ]
    assert await ask(quiet, {"id": 2, "subscribe": {"channel": "news"}}) == [
        {"id": 2, "subscribe": {}}
    ]
    await other.request(subscribe={"channel": "news"})
    await other.request(unsubscribe={"channel": "news"})
    await other.request(subscribe={"channel": "news"})
    await other.aclose()
    told = [(2, "join"), (1, "join"), (1, "leave"), (1, "join"), (1, "leave")]
    assert await watcher.receive_all() == [
        pushed("news", **{what: {"info": shown[who]}}) for who, what in told
    ]
    assert await quiet.receive_all() == []
    assert await ask(watcher, {"id": 3, "unsubscribe": {"channel": "news"}}) == [
        {"id": 3, "unsubscribe": {}}
    ]


async def test_joins_stay_in_order_with_publications(
    autojump_clock: MockClock, net: Network
) -> None:
    watcher, other = await net.open_client(), await net.open_client()
    await ask(watcher, {"id": 2, "subscribe": {"channel": "news", "join_leave": True}})
    await ask(
        other,
        {"id": 1, "publish": {"channel": "news", "data": 1}},
        {"id": 2, "subscribe": {"channel": "news"}},
        {"id": 3, "publish": {"channel": "news", "data": 2}},
        {"id": 4, "unsubscribe": {"channel": "news"}},
    )
    kinds = [next(k for k in o["push"] if k != "channel") for o in await watcher.receive_all()]
    assert kinds == ["pub", "join", "pub", "leave"]


async def test_joins_may_be_switched_off(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker(Config(topics=TopicRules(join_leave=False)))) as net:
        watcher, other = await net.open_client(), await net.open_client()
        await ask(watcher, {"id": 2, "subscribe": {"channel": "news", "join_leave": True}})
        await other.request(subscribe={"channel": "news"})
        assert await watcher.receive_all() == []


# hooks


async def test_the_subscribe_hook_sees_and_says(autojump_clock: MockClock, net: Network) -> None:
    events = []

    @net.broker.on_subscribe
    async def look(event: SubscribeEvent) -> SubscribeReply:
        events.append(event)
        return SubscribeReply(info={"role": "reader"}, data=["welcome"])

    client = await net.open_client()
    fields = {"channel": "news.eu", "token": "t", "data": {"a": 1}}
    reply = await client.request(subscribe=fields)
    assert reply["subscribe"] == {"data": ["welcome"]}
    (event,) = events
    assert (event.topic, event.token, event.data) == ("news.eu", "t", {"a": 1})
    await client.request(subscribe={"channel": "news", "join_leave": True})
    reply = await client.request(presence={"channel": "news"})
    info = {"user": "", "client": str(client.fd), "chan_info": {"role": "reader"}}
    assert reply["presence"]["presence"] == {str(client.fd): info}


async def test_the_publish_hook_may_rewrite(autojump_clock: MockClock, net: Network) -> None:
    @net.broker.on_publish
    async def rewrite(event: PublishEvent) -> PublishReply | None:
        assert event.connection.fd == client.fd
        return PublishReply(b'{"was":%b}' % event.data) if event.topic == "news" else None

    client = await net.open_client()
    for name in ("news", "other"):
        await client.request(subscribe={"channel": name})
    objects = await ask(
        client,
        {"id": 2, "publish": {"channel": "news", "data": [1]}},
        {"id": 3, "publish": {"channel": "other", "data": [2]}},
    )
    assert data_of(objects) == [{"was": [1]}, [2]]
    assert [o["id"] for o in objects if "id" in o] == [2, 3]


async def test_a_publish_hook_that_writes_no_json_publishes_nothing(
    autojump_clock: MockClock, net: Network
) -> None:
    @net.broker.on_publish
    async def rewrite(event: PublishEvent) -> PublishReply:
        return PublishReply(b"{")

    client = await net.open_client()
    await client.request(subscribe={"channel": "news"})
    assert await ask(client, {"id": 2, "publish": {"channel": "news", "data": 1}}) == [
        {"id": 2, "error": INTERNAL}
    ]


COMMANDS: dict[str, dict[str, object]] = {
    "connect": {},
    "subscribe": {"channel": "news"},
    "publish": {"channel": "news", "data": 1},
    "presence": {"channel": "news"},
    "presence_stats": {"channel": "news"},
    "history": {"channel": "news", "limit": -1},
    "rpc": {"method": "add"},
}


def set_hook(broker: Broker, method: str, act: Any) -> None:
    """Have `act` run, with the connection, by whichever hook `method` asks."""

    async def on_event(event: Any) -> None:
        await act(event.connection)

    async def on_call(connection: Connection, method: str, data: object) -> None:
        await act(connection)

    if method == "rpc":
        broker.on_rpc(on_call)
    else:
        getattr(broker, f"on_{method.partition('_')[0]}")(on_event)


@pytest.fixture(params=COMMANDS)
def method(request: pytest.FixtureRequest) -> str:
    assert isinstance(request.param, str)
    return request.param


async def hooked(net: Network, method: str, act: Any) -> list[Any]:
    """The objects that a client gets for `method` while its hook does `act`."""
    peer = await (net.open_websocket() if method == "connect" else net.open_client())
    set_hook(net.broker, method, act)
    return await ask(peer, {"id": 2, method: COMMANDS[method]})


async def test_each_hook_may_allow(autojump_clock: MockClock, net: Network, method: str) -> None:
    async def allow(connection: Connection) -> None:
        await trio.sleep(0.01)

    (reply,) = await hooked(net, method, allow)
    assert sorted(reply) == sorted(["id", method])


@pytest.mark.parametrize(
    "refusal, error",
    [
        (Refused(103), {"code": 103, "message": "permission denied"}),
        (Refused(111), {"code": 111, "message": "too many requests", "temporary": True}),
        (Refused(4242, "over quota"), {"code": 4242, "message": "over quota"}),
        (ZeroDivisionError("secret"), INTERNAL),
        (ExceptionGroup("secret", [ZeroDivisionError()]), INTERNAL),
    ],
    ids=repr,
)
async def test_each_hook_may_refuse_or_fail_and_the_client_stays(
    autojump_clock: MockClock, net: Network, method: str, refusal: Exception, error: object
) -> None:
    async def refuse(connection: Connection) -> None:
        await trio.sleep(0.01)
        raise refusal

    assert await hooked(net, method, refuse) == [{"id": 2, "error": error}]
    assert net.broker.is_established(1)
    assert net.broker.stats().hub.subscriptions == net.broker.stats().published == 0


async def test_each_hook_may_send_its_client_away(
    autojump_clock: MockClock, net: Network, method: str
) -> None:
    async def send_away(connection: Connection) -> None:
        raise Disconnect(4001, "banned")

    *_, code = await hooked(net, method, send_away)
    assert code == 4001
    assert not net.broker.exists(1) or not net.broker.is_established(1)


async def test_a_client_closed_while_a_hook_runs_gets_nothing_and_does_nothing(
    autojump_clock: MockClock, net: Network, method: str
) -> None:
    async def close(connection: Connection) -> None:
        net.broker.disconnect(connection.fd, 4001, "meanwhile")
        await trio.sleep(0.01)

    objects = await hooked(net, method, close)
    assert objects[-1] == 4001
    await trio.sleep(1)  # it never answers our Close, so it is still here
    assert net.broker.exists(1)
    assert [o for o in objects[:-1] if "id" in o] == []
    assert net.broker.stats().hub.subscriptions == net.broker.stats().published == 0


async def test_a_client_that_goes_away_while_a_hook_runs_is_gone(
    autojump_clock: MockClock, net: Network, method: str
) -> None:
    done = trio.Event()

    async def work(connection: Connection) -> None:
        await trio.sleep(1)
        done.set()

    peer = await (net.open_websocket() if method == "connect" else net.open_client())
    set_hook(net.broker, method, work)
    await peer.send_json({"id": 2, method: COMMANDS[method]})
    await wait_all_tasks_blocked()
    await peer.aclose()
    await done.wait()
    await wait_all_tasks_blocked()
    assert not net.broker.exists(peer.fd)
    assert net.broker.stats().hub.subscriptions == 0


async def test_a_limit_that_was_reached_while_the_hook_ran_holds(
    autojump_clock: MockClock, net: Network
) -> None:
    """One subscribes, and is unsubscribed, only in its own turn; yet the server may do it too."""

    @net.broker.on_subscribe
    async def look(event: SubscribeEvent) -> None:
        if event.topic == "second":
            net.broker.end_subscription(event.connection.fd, "first", 2000, "server")

    client = await net.open_client()
    await client.request(subscribe={"channel": "first"})
    assert await ask(client, {"id": 2, "subscribe": {"channel": "second"}}) == [
        pushed("first", unsubscribe={"code": 2000, "reason": "server"}),
        {"id": 2, "subscribe": {}},
    ]


async def test_the_read_hooks_are_told_the_topic(autojump_clock: MockClock, net: Network) -> None:
    asked: list[tuple[str, str]] = []

    @net.broker.on_presence
    async def presence(event: ReadEvent) -> None:
        asked.append(("presence", event.topic))

    @net.broker.on_history
    async def history(event: ReadEvent) -> None:
        asked.append(("history", event.topic))

    client = await net.open_client()
    for method in ("presence", "presence_stats", "history"):
        await client.request(**{method: {"channel": method}})
    assert asked == [
        ("presence", "presence"),
        ("presence", "presence_stats"),
        ("history", "history"),
    ]


@pytest.mark.parametrize("group", [1, "", "g" * 256, ["a"]])
async def test_a_bad_group_is_refused(autojump_clock: MockClock, group: object) -> None:
    async with served() as net:
        peer = await net.open_client()
        reply = await peer.request(subscribe={"channel": "jobs", "data": {"group": group}})
        assert reply["error"]["code"] == 107
        assert "group" in reply["error"]["message"]


async def test_a_private_topic_is_for_who_has_a_token_for_it(
    autojump_clock: MockClock, keyed: Network
) -> None:
    peer = await connect(keyed, sub="alice")
    for name in ("$room", "$room.*", ">", "*.a"):
        assert await refused(peer, subscribe={"channel": name}) == 103
    assert await refused(peer, history={"channel": "$room"}) == 103
    assert await refused(peer, presence={"channel": "$room"}) == 103
    assert "subscribe" in await peer.request(subscribe={"channel": "room"})
    claims: dict[str, Any] = {
        "sub": "alice",
        "channel": "$room",
        "info": {"role": 1},
        "data": {"hello": 1},
    }
    reply = await peer.request(subscribe={"channel": "$room", "token": token(keyed, **claims)})
    assert reply["subscribe"] == {"data": {"hello": 1}}
    presence = (await peer.request(presence={"channel": "$room"}))["presence"]["presence"]
    assert presence[str(peer.fd)]["chan_info"] == {"role": 1}
    assert "history" in await peer.request(history={"channel": "$room"})
    wide = token(keyed, sub="alice", channel=">")
    assert "subscribe" in await peer.request(subscribe={"channel": ">", "token": wide})


@pytest.mark.parametrize("channel", ["room", "$room"])
@pytest.mark.parametrize(
    "claims, expires, code",
    [
        ({"sub": "alice", "channel": "$other"}, 60, 103),
        ({"sub": "bob", "channel": "CHANNEL"}, 60, 103),
        ({"channel": "CHANNEL"}, 60, 103),
        ({"sub": "alice"}, 60, 103),
        ({"sub": "alice", "channel": "CHANNEL", "client": "999"}, 60, 103),
        ({"sub": "alice", "channel": "CHANNEL"}, -6, 109),
        ({"sub": "alice", "channel": "CHANNEL", "expire_at": 1}, 60, 110),
    ],
)
async def test_a_token_that_is_given_must_be_good(
    autojump_clock: MockClock,
    keyed: Network,
    channel: str,
    claims: dict[str, Any],
    expires: float,
    code: int,
) -> None:
    peer = await connect(keyed, sub="alice")
    if "channel" in claims:
        claims = {**claims, "channel": claims["channel"].replace("CHANNEL", channel)}
    given = token(keyed, expires, **claims)
    assert await refused(peer, subscribe={"channel": channel, "token": given}) == code
    assert await refused(peer, subscribe={"channel": channel, "token": "garbage"}) == 103
    assert keyed.broker.connections()[0].topics == ()


async def test_a_subscription_token_of_old_may_name_the_connection(
    autojump_clock: MockClock, keyed: Network
) -> None:
    peer = await connect(keyed, sub="alice")
    given = token(keyed, sub="alice", channel="$a", client=str(peer.fd))
    assert "subscribe" in await peer.request(subscribe={"channel": "$a", "token": given})


async def test_the_subscribe_hook_sees_the_claims_and_has_the_last_word(
    autojump_clock: MockClock, keyed: Network
) -> None:
    seen: list[SubscribeEvent] = []

    @keyed.broker.on_subscribe
    async def check(event: SubscribeEvent) -> SubscribeReply | None:
        seen.append(event)
        if event.topic == "$no":
            raise Refused(103)
        return SubscribeReply(info=2, data=2) if event.topic == "$other" else None

    peer = await connect(keyed, sub="alice")
    assert await refused(peer, subscribe={"channel": "$a"}) == 103
    assert seen == []
    for topic, said in (("$a", 1), ("$other", 2), ("$no", None)):
        claims: dict[str, Any] = {"sub": "alice", "channel": topic, "info": 1, "data": 1}
        reply = await peer.request(subscribe={"channel": topic, "token": token(keyed, **claims)})
        assert seen[-1].claims == claims
        if said is None:
            assert reply["error"]["code"] == 103
            continue
        assert reply["subscribe"]["data"] == said
        presence = (await peer.request(presence={"channel": topic}))["presence"]["presence"]
        assert presence[str(peer.fd)]["chan_info"] == said
    await peer.request(subscribe={"channel": "open"})
    assert seen[-1].claims is None
