"""The server's say over one peer: messages, topics and users that it has not asked for."""

import msgspec
import pytest
import trio
import trio.testing
from trio.testing import MockClock, wait_all_tasks_blocked

from broker import (
    Broker,
    Config,
    Connection,
    Frame,
    PushResult,
    Refused,
    TopicRules,
)
from broker.testing import Network, open_test_broker
from broker.transport import frames
from tests.routing.conftest import receive_pushes


async def test_a_client_is_pushed_messages(autojump_clock: MockClock, net: Network) -> None:
    client = await net.open_client()
    for data in ("x", {"a": 1}, None):
        assert net.broker.push(client.fd, data) is PushResult.QUEUED
    assert await client.receive_all() == [
        {"push": {"message": {"data": data}}} for data in ("x", {"a": 1}, None)
    ]


LOCKSTEP = trio.testing.lockstep_stream_pair


@pytest.mark.parametrize(
    "data, opcode, payload",
    [
        ("hello", frames.TEXT, b"hello"),
        ("", frames.TEXT, b""),
        ("服务端", frames.TEXT, "服务端".encode()),
        (b"\x00\xff", frames.BINARY, b"\x00\xff"),
        ({"a": [1, None]}, frames.TEXT, b'{"a":[1,null]}'),
        (7, frames.TEXT, b"7"),
        (None, frames.TEXT, b"null"),
        (msgspec.Raw(b'{"a": 1}'), frames.TEXT, b'{"a": 1}'),
        (msgspec.Raw(b'"text"'), frames.TEXT, b"text"),
    ],
)
async def test_a_push_to_a_plain_peer(
    autojump_clock: MockClock, data: object, opcode: int, payload: bytes
) -> None:
    async with open_test_broker(Broker()) as net:
        peer = await net.open_plain()
        assert net.broker.push(peer.fd, data) is PushResult.QUEUED
        assert await peer.receive_frame() == (opcode, payload)


@pytest.mark.parametrize(
    "data, shown",
    [
        ("hello", "hello"),
        ({"a": [1, None]}, {"a": [1, None]}),
        (msgspec.Raw(b'{\n"a": 1}'), {"a": 1}),
        (b"\x00\xff", "AP8="),
    ],
)
async def test_a_push_to_a_centrifuge_client(
    autojump_clock: MockClock, data: object, shown: object
) -> None:
    async with open_test_broker(Broker()) as net:
        client = await net.open_client()
        assert net.broker.push(client.fd, data) is PushResult.QUEUED
        assert await client.receive_json() == {"push": {"message": {"data": shown}}}


async def test_a_push_that_finds_no_room_is_full_and_its_peer_is_cut(
    autojump_clock: MockClock,
) -> None:
    rules = TopicRules(history_size=0, slow_consumer="drop_oldest")
    async with open_test_broker(Broker(Config(outbox_messages=3, topics=rules))) as net:
        client = await net.open_client(make_pair=LOCKSTEP)
        await client.request(subscribe={"channel": "news"})
        for number in range(6):
            net.broker.publish("news", number)
            await wait_all_tasks_blocked()  # the writer has its hands full
        assert net.broker.push(client.fd, "x") is PushResult.FULL
        assert net.broker.push(client.fd, "x") is PushResult.CLOSED
        code, _ = await client.receive_close()
        assert code == 3008


async def test_a_push_comes_behind_what_a_client_published_in_the_same_turn(
    autojump_clock: MockClock,
) -> None:
    broker = Broker()
    pushed = []

    @broker.on_message
    async def push(connection: Connection, frame: Frame) -> None:
        pushed.append(broker.push(1, "pushed"))  # no checkpoint since the publish before it

    async with open_test_broker(broker) as net:
        reader, writer = await net.open_client(), await net.open_client()
        await reader.request(subscribe={"channel": "news"})
        await writer.send_json({"publish": {"channel": "news", "data": 1}}, {"send": {"data": 2}})
        assert (await reader.receive_json())["push"]["pub"]["data"] == 1
        assert (await reader.receive_json())["push"]["message"] == {"data": "pushed"}
    assert pushed == [PushResult.QUEUED]


async def test_pushes_and_publications_keep_their_order(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker()) as net:
        peer = await net.open_plain()
        net.broker.push(peer.fd, "1")
        net.broker.publish(f"fd:{peer.fd}", "2")
        net.broker.push(peer.fd, "3")
        assert [await peer.receive_text() for _ in range(3)] == ["1", "2", "3"]


async def test_a_client_is_told_of_a_subscription_it_did_not_ask_for(
    autojump_clock: object,
) -> None:
    async with open_test_broker(Broker()) as net:
        peer = await net.open_client()
        assert net.broker.add_subscription(peer.fd, "news", data={"why": "vip"}, info="seat 4")
        (push,) = await receive_pushes(peer, 1)
        epoch = push["subscribe"].pop("epoch")
        assert epoch
        assert push == {
            "channel": "news",
            "subscribe": {
                "recoverable": True,
                "positioned": True,
                "offset": 0,
                "data": {"why": "vip"},
            },
        }
        net.broker.publish("news", 1)
        (push,) = await receive_pushes(peer, 1)
        assert push == {"channel": "news", "pub": {"data": 1, "offset": 1}}
        presence = await peer.request(presence={"channel": "news"})
        (info,) = presence["presence"]["presence"].values()
        assert info["chan_info"] == "seat 4"


async def test_it_ends_as_the_server_says_or_the_client(autojump_clock: object) -> None:
    async with open_test_broker(Broker()) as net:
        peer = await net.open_client()
        for topic in ("a", "b"):
            net.broker.add_subscription(peer.fd, topic)
        await receive_pushes(peer, 2)
        assert net.broker.end_subscription(peer.fd, "a")
        assert not net.broker.end_subscription(peer.fd, "a")
        (push,) = await receive_pushes(peer, 1)
        assert push["unsubscribe"] == {"code": 2000, "reason": "server unsubscribe"}
        await peer.request(unsubscribe={"channel": "b"})
        assert net.broker.connections()[0].topics == ()


async def test_who_watches_sees_it_come_and_go(autojump_clock: object) -> None:
    async with open_test_broker(Broker()) as net:
        peer, watcher = await net.open_client(), await net.open_client()
        await watcher.request(subscribe={"channel": "news", "join_leave": True})
        await watcher.receive_json()
        net.broker.add_subscription(peer.fd, "news", join_leave=True)
        first, second = await receive_pushes(peer, 2)
        assert "subscribe" in first
        assert second["join"]["info"]["client"] == str(peer.fd)
        net.broker.end_subscription(peer.fd, "news")
        joined, left = await receive_pushes(watcher, 2)
        assert joined["join"] == left["leave"] == {"info": {"user": "", "client": str(peer.fd)}}


async def test_what_cannot_be_subscribed_to(autojump_clock: object) -> None:
    async with open_test_broker(Broker(Config(max_topics=2))) as net:
        peer = await net.open_client()
        add = net.broker.add_subscription
        assert add(peer.fd, "a")
        assert not add(peer.fd, "a")
        assert not add(99, "a")
        for topic, code in [("", 107), ("fd:99", 103), (f"fd:{peer.fd}", 105)]:
            with pytest.raises(Refused) as refused:
                add(peer.fd, topic)
            assert refused.value.code == code
        assert add(peer.fd, "b.*")
        with pytest.raises(Refused) as refused:
            add(peer.fd, "c")
        assert refused.value.code == 106
        reply = await peer.request(subscribe={"channel": "a"})
        assert reply["error"]["code"] == 105
        net.broker.disconnect(peer.fd)
        assert not add(peer.fd, "d")
        assert net.broker.stats().hub.subscriptions == 0


async def test_a_plain_peer_may_be_subscribed_too(autojump_clock: object) -> None:
    async with open_test_broker(Broker()) as net:
        peer = await net.open_plain()
        assert net.broker.add_subscription(peer.fd, "news")
        net.broker.publish("news", "hello")
        assert net.broker.end_subscription(peer.fd, "news")
        net.broker.publish("news", "unheard")
        net.broker.push(peer.fd, "last")
        assert [await peer.receive_text() for _ in range(2)] == ["hello", "last"]


async def test_what_was_subscribed_at_open_is_in_the_connect_reply(autojump_clock: object) -> None:
    broker = Broker()

    @broker.on_open
    async def subscribe(connection: Connection) -> None:
        broker.add_subscription(connection.fd, "news")

    async with open_test_broker(broker) as net:
        plain, client = await net.open_plain(), await net.open_websocket()
        reply = await client.request(connect={})
        assert {*reply["connect"]["subs"]} == {"news", f"fd:{client.fd}"}
        broker.publish("news", 1)
        assert (await client.receive_json())["push"]["pub"] == {"data": 1, "offset": 1}
        assert await plain.receive_text() == "1"
