"""Every command of the Centrifuge protocol, asked by a client in memory; sections 2 and 3 of the
wire reference."""

import json
import math
import socket
from typing import Any

import pytest
import trio
from trio.testing import MockClock, lockstep_stream_pair, wait_all_tasks_blocked

from broker import (
    Broker,
    Config,
    ConnectEvent,
    Connection,
    ConnectReply,
    Disconnect,
    Frame,
    PublishEvent,
    PublishReply,
    PushResult,
    ReadEvent,
    Refused,
    SubscribeEvent,
    SubscribeReply,
    TopicRules,
)
from broker.core.work import COMMAND, SLICE
from broker.testing import Network, Peer, client_frame, open_test_broker
from broker.transport import frames
from tests.conftest import ask, data_of, served
from tests.session.conftest import (
    INTERNAL,
    disconnected,
    error_of,
    missed,
    pub,
    pushed,
)

# connect


async def test_connect_says_which_fd_this_is(autojump_clock: MockClock, net: Network) -> None:
    await net.open_websocket()
    peer = await net.open_websocket("/connection/websocket")
    (reply,) = await ask(peer, {"id": 5, "connect": {"name": "js", "version": "1"}})
    version = reply["connect"].pop("version")
    assert version
    assert reply == {
        "id": 5,
        "connect": {
            "client": "2",
            "data": {"fd": 2},
            "subs": {"fd:2": {}},
            "ping": 20,
            "pong": True,
        },
    }
    info = net.broker.connection_info(2)
    assert info is not None
    assert (info.protocol, info.topics) == ("centrifuge-json", ())


@pytest.mark.parametrize(
    "first, plain",
    [
        ('{"id":1,"connect":{}}', False),
        ('{"id":1,"subscribe":{"channel":"news"}}', True),
        ('{"connect":{}}', True),
        ("connect", True),
        ("", True),
    ],
)
async def test_a_first_message_that_is_no_connect_makes_a_peer_plain_for_good(
    autojump_clock: MockClock, net: Network, first: str, plain: bool
) -> None:
    @net.broker.on_message
    async def echo(connection: Connection, frame: Frame) -> None:
        net.broker.push(connection.fd, f"got {frame.data!r}")

    peer = await net.open_websocket()
    await peer.send_text(first)
    text = await peer.receive_text()
    assert (text == f"got {first!r}") is plain
    if plain:
        await peer.send_text('{"id":1,"connect":{}}')
        assert (await peer.receive_text()).startswith("got ")


@pytest.mark.parametrize(
    "first, code",
    [
        ({"id": 1, "subscribe": {"channel": "news"}}, 3501),
        ({"id": 1, "publish": {"channel": "news", "data": 1}}, 3501),
        ({"publish": {"channel": "news", "data": 1}}, 3501),
        ({"send": {"data": 1}}, 3501),
        ({"connect": {}}, 3501),
        ("connect", 3501),
    ],
)
async def test_with_its_subprotocol_a_client_must_begin_with_connect(
    autojump_clock: MockClock, net: Network, first: object, code: int
) -> None:
    peer = await net.open_websocket(headers={"Sec-WebSocket-Protocol": "centrifuge-json"})
    assert await ask(peer, first) == [code]


async def test_what_a_client_sends_behind_its_connect_waits_for_it(
    autojump_clock: MockClock, net: Network
) -> None:
    @net.broker.on_connect
    async def slowly(event: ConnectEvent) -> None:
        await trio.sleep(0.05)

    peer = await net.open_websocket()
    replies = await ask(
        peer,
        {"id": 1, "connect": {}},
        {"id": 2, "subscribe": {"channel": "news"}},
        {"id": 3, "publish": {"channel": "news", "data": "x"}},
    )
    kinds = [
        next(k for k in ("connect", "subscribe", "push", "publish") if k in r) for r in replies
    ]
    assert kinds == ["connect", "subscribe", "push", "publish"]


async def test_to_connect_twice_is_a_bad_request(autojump_clock: MockClock, net: Network) -> None:
    client = await net.open_client()
    code, reason = await disconnected(client, {"id": 2, "connect": {}})
    assert code == 3501
    assert "connect" in reason


async def test_the_connect_hook_says_who_this_is(autojump_clock: MockClock, net: Network) -> None:
    events = []

    @net.broker.on_connect
    async def let_in(event: ConnectEvent) -> ConnectReply:
        events.append(event)
        return ConnectReply(user="alice", info={"name": "Alice"}, data={"motd": "hi"})

    client = await net.open_websocket()
    sent = {"token": "t", "data": {"a": 1}, "name": "js", "version": "5"}
    (reply,) = await ask(client, {"id": 1, "connect": sent})
    assert reply["connect"]["data"] == {"fd": client.fd, "motd": "hi"}
    (event,) = events
    assert (event.token, event.data, event.name, event.version) == ("t", {"a": 1}, "js", "5")
    assert event.connection.fd == client.fd
    assert net.broker.fds_of("alice") == [client.fd]
    await client.request(subscribe={"channel": "news"})
    reply = await client.request(presence={"channel": "news"})
    info = {"user": "alice", "client": str(client.fd), "conn_info": {"name": "Alice"}}
    assert reply["presence"]["presence"] == {str(client.fd): info}


async def test_a_user_that_was_bound_before_is_kept(
    autojump_clock: MockClock, net: Network
) -> None:
    peer = await net.open_websocket()
    net.broker.bind(peer.fd, "bob")
    await peer.request(connect={})
    assert net.broker.fds_of("bob") == [peer.fd]
    await peer.request(subscribe={"channel": "news"})
    reply = await peer.request(presence={"channel": "news"})
    assert reply["presence"]["presence"][str(peer.fd)]["user"] == "bob"


@pytest.mark.parametrize("what", ["refused", "raised", "not json"])
async def test_a_client_that_was_not_let_in_may_try_again(
    autojump_clock: MockClock, net: Network, what: str
) -> None:
    @net.broker.on_connect
    async def check(event: ConnectEvent) -> ConnectReply | None:
        if event.token == "good":
            return None
        if what == "refused":
            raise Refused(101)
        if what == "raised":
            raise ZeroDivisionError
        return ConnectReply(user="alice", data={"a": object()})

    peer = await net.open_websocket()
    code = await error_of(peer, connect={"token": "bad"})
    assert code == (101 if what == "refused" else 100)
    assert net.broker.fds_of("alice") == []
    assert "connect" in await peer.request(connect={"token": "good"})


async def test_the_connect_hook_may_send_a_client_away(
    autojump_clock: MockClock, net: Network
) -> None:
    @net.broker.on_connect
    async def check(event: ConnectEvent) -> None:
        raise Disconnect(3500, "invalid token")

    peer = await net.open_websocket()
    assert await ask(peer, {"id": 1, "connect": {}}) == [3500]


async def test_who_was_disconnected_while_the_connect_hook_ran_is_not_let_in(
    autojump_clock: MockClock, net: Network
) -> None:
    @net.broker.on_connect
    async def disconnect(event: ConnectEvent) -> ConnectReply:
        net.broker.disconnect(event.connection.fd, 3507, "no")
        return ConnectReply(user="alice")

    peer = await net.open_websocket()
    assert await ask(peer, {"id": 1, "connect": {}}) == [3507]
    assert net.broker.fds_of("alice") == []


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


async def test_what_a_broker_publishes_has_no_sender(
    autojump_clock: MockClock, net: Network
) -> None:
    client = await net.open_client()
    await client.request(subscribe={"channel": "news"})
    net.broker.publish("news", ["x"])
    assert await client.receive_all() == [pub("news", ["x"], offset=1)]


async def test_who_has_unsubscribed_gets_nothing(autojump_clock: MockClock, net: Network) -> None:
    client = await net.open_client()
    await client.request(subscribe={"channel": "news"})
    assert await ask(client, {"id": 2, "unsubscribe": {"channel": "news"}}) == [
        {"id": 2, "unsubscribe": {}}
    ]
    net.broker.publish("news", 1)
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
async def test_what_cannot_be_published_to(
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
async def test_what_cannot_be_subscribed_to(
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
    net.broker.publish("news", 1)
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
        net.broker.publish(topic, topic)
    assert await client.receive_all() == [
        pub("news.>", "news.eu", offset=1, channel="news.eu", tags={"topic": "news.eu"}),
        pub("news.*", "news.eu", offset=1, channel="news.eu", tags={"topic": "news.eu"}),
        pub("news.>", "news.eu.fr", offset=1, channel="news.eu.fr", tags={"topic": "news.eu.fr"}),
    ]


async def test_publications_that_came_in_many_lines_go_out_in_one(
    autojump_clock: MockClock, net: Network
) -> None:
    client = await net.open_client()
    await client.request(subscribe={"channel": "news"})
    await client.send_text('{"publish":{"channel":"news",\n"data":{\n"a": [1,\n2]}}}')
    assert data_of(await client.receive_all()) == [{"a": [1, 2]}]

    @net.broker.on_publish
    async def rewrite(event: PublishEvent) -> PublishReply:
        return PublishReply(b'{\n"b":\n2}')

    await client.send_json({"publish": {"channel": "news", "data": 1}})
    assert data_of(await client.receive_all()) == [{"b": 2}]


async def test_bytes_that_are_not_utf_8_reach_nobody(
    autojump_clock: MockClock, net: Network
) -> None:
    client, reader = await net.open_client(), await net.open_client()
    await reader.request(subscribe={"channel": "news"})
    command = b'{"publish":{"channel":"news","data":"\xff"}}'
    await client.send(client_frame(frames.BINARY, command))
    assert (await client.receive_all())[-1] == 3501
    assert await reader.receive_all() == []


@pytest.mark.parametrize("joined", [True, False])
async def test_a_thousand_commands_at_once_leave_others_their_turn(
    autojump_clock: MockClock, net: Network, joined: bool
) -> None:
    client = await net.open_client()
    lines = [json.dumps({"id": 1, "presence_stats": {"channel": "t"}}) for _ in range(1000)]
    if joined:
        sent = client_frame(frames.TEXT, "\n".join(lines).encode())
    else:
        sent = b"".join(client_frame(frames.TEXT, line.encode()) for line in lines)
    turns = 0
    async with trio.open_nursery() as nursery:

        async def take_turns() -> None:
            nonlocal turns
            while True:
                turns += 1
                await trio.lowlevel.checkpoint()

        await client.send(sent)
        nursery.start_soon(take_turns)
        got = 0
        while got < 1000:
            got += (await client.receive_text()).count("presence_stats")
        nursery.cancel_scope.cancel()
    # They are 6 ms of work, of which others are let in between two slices.
    assert turns > 1000 * COMMAND / SLICE


# the order of things


async def test_replies_to_publishes_come_behind_the_publications_of_their_batch(
    autojump_clock: MockClock,
    net: Network,
) -> None:
    client = await net.open_client()
    await client.request(subscribe={"channel": "a"})
    await client.request(subscribe={"channel": "b"})
    names = "aababb"
    commands = [
        {"id": number, "publish": {"channel": name, "data": number}}
        for number, name in enumerate(names, 1)
    ]
    objects = await ask(client, *commands)
    assert data_of(objects[: len(names)]) == [1, 2, 3, 4, 5, 6]
    assert objects[len(names) :] == [{"id": n, "publish": {}} for n in range(1, 7)]


async def test_every_other_reply_comes_at_once_behind_all_before_it(
    autojump_clock: MockClock, net: Network
) -> None:
    client = await net.open_client()
    objects = await ask(
        client,
        {"id": 1, "publish": {"channel": "a", "data": "before"}},
        {"id": 2, "subscribe": {"channel": "a"}},
        {"id": 3, "publish": {"channel": "a", "data": "x"}},
        {"id": 4, "publish": {"channel": "*", "data": "bad"}},
        {"id": 5, "presence_stats": {"channel": "a"}},
        {"id": 6, "publish": {"channel": "a", "data": "y"}},
        {"id": 7, "unsubscribe": {"channel": "a"}},
        {"id": 8, "publish": {"channel": "a", "data": "after"}},
    )
    order = [o["id"] if "id" in o else o["push"]["pub"]["data"] for o in objects]
    assert order == [1, 2, "x", 3, 4, 5, "y", 6, 7, 8]


async def test_many_messages_in_one_write_keep_their_order(
    autojump_clock: MockClock, net: Network
) -> None:
    client = await net.open_client()
    await client.request(subscribe={"channel": "a"})
    texts = [f'{{"id":{n},"publish":{{"channel":"a","data":{n}}}}}' for n in range(1, 101)]
    await client.send(b"".join(client_frame(frames.TEXT, text.encode()) for text in texts))
    objects = await client.receive_all()
    assert data_of(objects) == list(range(1, 101))
    assert [o["id"] for o in objects if "id" in o] == list(range(1, 101))


@pytest.mark.parametrize("bad", ["hello", '{"id":2,"connect":{}}'])
async def test_what_came_before_a_bad_message_is_done_and_answered(
    autojump_clock: MockClock, net: Network, bad: str
) -> None:
    client, reader = await net.open_client(), await net.open_client()
    await reader.request(subscribe={"channel": "a"})
    publish = b'{"id":1,"publish":{"channel":"a","data":1}}'
    await client.send(client_frame(frames.TEXT, publish) + client_frame(frames.TEXT, bad.encode()))
    first, *_, code = await client.receive_all()
    assert (first, code) == ({"id": 1, "publish": {}}, 3501)
    assert data_of(await reader.receive_all()) == [1]


async def test_a_publication_is_out_before_a_hook_is_waited_for(
    autojump_clock: MockClock, net: Network
) -> None:
    @net.broker.on_rpc
    async def call(connection: Connection, method: str, data: object) -> None:
        await trio.sleep(60)

    client, reader = await net.open_client(), await net.open_client()
    await reader.request(subscribe={"channel": "a"})
    publish = {"id": 1, "publish": {"channel": "a", "data": 1}}
    assert await ask(client, publish, {"id": 2, "rpc": {}}) == [{"id": 1, "publish": {}}]
    assert data_of(await reader.receive_all()) == [1]


async def test_what_comes_behind_the_command_that_ended_a_client_is_not_done(
    autojump_clock: MockClock, net: Network
) -> None:
    @net.broker.on_rpc
    async def call(connection: Connection, method: str, data: object) -> None:
        net.broker.disconnect(connection.fd)

    client, reader = await net.open_client(), await net.open_client()
    await reader.request(subscribe={"channel": "a"})
    publish = {"id": 2, "publish": {"channel": "a", "data": 1}}
    await ask(client, {"id": 1, "rpc": {}}, publish, {"send": {"data": 1}})
    assert await reader.receive_all() == []


async def test_what_comes_behind_a_bad_command_is_not_done(
    autojump_clock: MockClock, net: Network
) -> None:
    client = await net.open_client()
    commands = [{"id": 1, "connect": {}}, {"id": 2, "publish": {"channel": "a", "data": 1}}]
    assert (await ask(client, *commands))[-1] == 3501
    assert net.broker.stats().published == 0


# bad commands


@pytest.mark.parametrize(
    "text",
    [
        "hello",
        "",
        "[]",
        "null",
        '{"id":-1,"subscribe":{}}',
        '{"id":4294967296,"subscribe":{}}',
        '{"id":18446744073709551616,"subscribe":{}}',
        '{"id":0,"subscribe":{"channel":"a"}}',
        '{"rpc":{"method":"a"}}',
        '{"publish":{"channel":"a","data":1},"send":{"data":1}}',
        '{"publish":{"channel":"a","data":1},"id":1}}',
        "\n\n",
        " ",
        '{"id":1}{"id":2}',
        '{"id":1,"rpc":{"data":' + "[" * 10_000 + "]" * 10_000 + "}}",
    ],
    ids=lambda text: repr(text[:40]),
)
async def test_who_does_not_speak_the_protocol_is_sent_away(
    autojump_clock: MockClock, net: Network, text: str
) -> None:
    client = await net.open_client()
    await client.send_text(text)
    push, code = await client.receive_all()
    assert code == 3501
    assert push["push"]["disconnect"]["code"] == 3501
    assert push["push"]["disconnect"]["reason"].startswith("bad request")


@pytest.mark.parametrize(
    "command, code",
    [
        ({}, 104),
        ({"dance": {}}, 104),
        ({"rpc": {"method": "x"}}, 104),
        ({"publish": {"channel": "a"}}, 107),
        ({"publish": {}}, 107),
        ({"subscribe": {}}, 107),
        ({"subscribe": {"channel": "a"}, "unsubscribe": {"channel": "a"}}, 107),
        ({"publish": {"channel": "a", "data": 1}, "rpc": {}}, 107),
        ({"connect": {}, "publish": {"channel": "a", "data": 1}}, 107),
        ({"refresh": {"token": "t"}}, 108),
        ({"sub_refresh": {"channel": "a", "token": "t"}}, 108),
    ],
)
async def test_a_bad_request_is_answered_and_its_client_stays(
    autojump_clock: MockClock, net: Network, command: dict[str, object], code: int
) -> None:
    client = await net.open_client()
    assert await error_of(client, **command) == code
    assert "publish" in await client.request(publish={"channel": "a", "data": 1})


async def test_an_error_has_the_words_that_clients_know(
    autojump_clock: MockClock, net: Network
) -> None:
    client = await net.open_client()
    assert await ask(client, {"id": 9, "rpc": {"method": "x"}}) == [
        {"id": 9, "error": {"code": 104, "message": "method not found"}}
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


async def test_who_is_gone_or_leaving_gets_no_direct_message(
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


# send and rpc


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


async def test_presence_stats_count_users_once(autojump_clock: MockClock, net: Network) -> None:
    @net.broker.on_connect
    async def name(event: ConnectEvent) -> ConnectReply:
        return ConnectReply(user=event.token)

    for token in ("alice", "alice", "bob"):
        client = await net.open_client(token=token)
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
        net.broker.publish("news", number)
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


@pytest.mark.parametrize("command", ["history", "recovery"])
async def test_a_client_that_asks_for_a_lot_gets_all_of_it_one_after_the_other(
    autojump_clock: MockClock, command: str
) -> None:
    """Each reply is ten times what its outbox holds."""
    async with open_test_broker(Broker(Config(outbox_bytes=10_000))) as net:
        client = await net.open_client(lockstep_stream_pair)
        outbox = net.outbox(client.fd)
        for number in range(100):
            net.broker.publish("t", f"{number:01000}")
        history = {"id": 1, "history": {"channel": "t", "limit": -1}}
        position = {"recover": True, "epoch": net.node.services.router.engine.position("t").epoch}
        recovery = {"id": 1, "subscribe": {"channel": "t", **position}}
        await client.send_json(recovery if command == "recovery" else history, history, history)
        most = 0
        replies: list[Any] = []
        while len(replies) < 3:
            await trio.sleep(5)
            most = max(most, outbox.bytes)
            replies += [json.loads(line) for line in (await client.receive_text()).split("\n")]
        assert most < 130_000
        for reply in replies:
            (result,) = [value for key, value in reply.items() if key != "id"]
            assert len(result["publications"]) == 100


async def test_a_ping_behind_what_a_client_has_yet_to_take_is_not_yet_due(
    autojump_clock: MockClock,
) -> None:
    def narrow_pair() -> tuple[trio.abc.Stream, trio.abc.Stream]:
        ours, theirs = trio.socket.socketpair()
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the least the system has
        return trio.SocketStream(ours), trio.SocketStream(theirs)

    async with open_test_broker(Broker()) as net:
        client = await net.open_client(narrow_pair)
        for number in range(100):
            net.broker.publish("t", f"{number:01000}")
        await client.send_json({"id": 1, "history": {"channel": "t", "limit": -1}})
        for _ in range(12):
            await trio.sleep(5)
            await client.stream.receive_some(5000)
        assert net.broker.is_established(client.fd)
        await client.aclose()


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


# recovery


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
async def test_what_was_missed_comes_in_the_reply_and_once(
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
    net.broker.publish("news", 6)
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


async def test_who_has_seen_nothing_yet_recovers_all_since_it_subscribed(
    autojump_clock: MockClock, net: Network
) -> None:
    client = await net.open_client()
    reply = await client.request(subscribe={"channel": "news", "recoverable": True})
    assert reply["subscribe"]["offset"] == 0
    await client.request(unsubscribe={"channel": "news"})
    net.broker.publish("news", "first")
    assert missed(await subscribe_at(client, 0, reply["subscribe"]["epoch"])) == ["first"]


@pytest.mark.parametrize("pauses", range(5))
async def test_what_is_published_while_a_subscribe_is_looked_at_comes_once(
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
            net.broker.publish("news", number)
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


async def test_who_asks_is_told_who_comes_and_goes(autojump_clock: MockClock, net: Network) -> None:
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


# heartbeats


async def test_a_client_is_pinged_every_20_seconds_and_stays_while_it_answers(
    autojump_clock: MockClock, net: Network
) -> None:
    client = await net.open_client()
    for _ in range(4):
        began = trio.current_time()
        assert await client.receive_json() == {}
        assert trio.current_time() - began == pytest.approx(20, abs=1.1)
        await client.send_text("{}")
    assert net.broker.is_established(client.fd)


@pytest.mark.parametrize("seconds, told", [(math.inf, 0), (0.4, 1), (20, 20), (20.5, 21)])
async def test_a_client_is_told_in_whole_seconds_how_often_it_will_be_pinged(
    autojump_clock: MockClock, seconds: float, told: int
) -> None:
    async with open_test_broker(Broker(Config(ping_seconds=seconds))) as net:
        client = await net.open_websocket()
        assert (await client.request(connect={}))["connect"]["ping"] == told


async def test_a_busy_client_is_pinged_as_well(autojump_clock: MockClock, net: Network) -> None:
    client = await net.open_client()
    pings = 0
    with trio.move_on_after(65):
        while True:
            await trio.sleep(1)
            pings += (await ask(client, {"id": 2, "publish": {"channel": "a", "data": 1}})).count(
                {}
            )
    assert pings == 3


async def test_a_client_that_does_not_answer_is_sent_away(
    autojump_clock: MockClock, net: Network
) -> None:
    client = await net.open_client()
    began = trio.current_time()
    assert await client.receive_json() == {}
    assert await client.receive_json() == {
        "push": {"disconnect": {"code": 3012, "reason": "no pong"}}
    }
    assert await client.receive_close() == (3012, "no pong")
    assert trio.current_time() - began == pytest.approx(30, abs=2.1)


async def test_a_slow_client_is_not_blamed_for_a_ping_behind_what_it_still_takes(
    autojump_clock: MockClock,
) -> None:
    rules = TopicRules(history_size=100, history_ttl=1000)
    async with open_test_broker(Broker(Config(topics=rules))) as net:
        for _ in range(100):
            net.broker.publish("a", "x" * 20_000)
        client = await net.open_client(lockstep_stream_pair)
        await client.send_json({"id": 2, "history": {"channel": "a", "limit": -1}})
        got = b""
        while not got.endswith(b"{}"):  # the ping
            await trio.sleep(1)
            data = await client.stream.receive_some(32_000)
            assert data, "cut"
            got += data
        assert len(got) > 2_000_000
        assert trio.current_time() > 60
        await client.send_text("{}")
        assert await client.receive_json() == {}
        # Whoever has got it and is silent is not slow.
        assert await client.receive_close() == (3012, "no pong")


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
    """What a client gets for `method` while its hook does `act`."""
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


async def test_who_is_closed_while_a_hook_runs_gets_nothing_and_does_nothing(
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


async def test_who_goes_away_while_a_hook_runs_is_gone(
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


async def test_a_client_is_pushed_messages(autojump_clock: MockClock, net: Network) -> None:
    client = await net.open_client()
    for data in ("x", {"a": 1}, None):
        assert net.broker.push(client.fd, data) is PushResult.QUEUED
    assert await client.receive_all() == [
        {"push": {"message": {"data": data}}} for data in ("x", {"a": 1}, None)
    ]


async def test_the_last_push_says_why_and_the_close_code_says_it_again(
    autojump_clock: MockClock, net: Network
) -> None:
    client = await net.open_client()
    net.broker.publish(f"fd:{client.fd}", "last words")
    net.broker.disconnect(client.fd, 3503, 'because "so"')
    assert await client.receive_all() == [
        pub(f"fd:{client.fd}", "last words"),
        {"push": {"disconnect": {"code": 3503, "reason": 'because "so"'}}},
        3503,
    ]


@pytest.mark.parametrize("group", [1, "", "g" * 256, ["a"]])
async def test_a_bad_group_is_refused(autojump_clock: MockClock, group: object) -> None:
    async with served() as net:
        peer = await net.open_client()
        reply = await peer.request(subscribe={"channel": "jobs", "data": {"group": group}})
        assert reply["error"]["code"] == 107
        assert "group" in reply["error"]["message"]
