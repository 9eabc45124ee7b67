"""A whole broker and clients over protobuf, beside clients over JSON."""

import json
from collections import deque
from typing import Any

import centrifuge.protocol.client_pb2 as schema
import pytest
import trio

from broker import (
    Broker,
    Config,
    Connection,
    Frame,
    PublishEvent,
    PublishReply,
    Refused,
    TokenRules,
)
from broker.access.minting import mint
from broker.testing import Closed, Network, Peer, client_frame, open_test_broker
from broker.transport import frames
from tests.conftest import HMAC_SECRET, delimited

PROTOBUF = {"Sec-WebSocket-Protocol": "centrifuge-protobuf"}


class ProtobufPeer:
    """A client that speaks protobuf, by the official library."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self._replies: deque[Any] = deque()

    async def send(self, *commands: Any) -> None:
        message = b"".join(delimited(command.SerializeToString()) for command in commands)
        await self.peer.send(client_frame(frames.BINARY, message))

    async def receive(self) -> Any:
        """The next reply or push."""
        while not self._replies:
            opcode, payload = await self.peer.receive_frame()
            if opcode == frames.CLOSE:
                raise Closed(int.from_bytes(payload[:2], "big"), payload[2:].decode())
            assert opcode == frames.BINARY
            while payload:
                size, at = payload[0], 1
                if size > 127:
                    size, at = size & 0x7F | payload[1] << 7, 2
                self._replies.append(schema.Reply.FromString(payload[at : at + size]))
                payload = payload[at + size :]
        return self._replies.popleft()

    async def receive_but_pings(self) -> Any:
        """The next push that says something; what comes before is answered."""
        while True:
            reply = await self.receive()
            if reply != schema.Reply():
                return reply
            await self.send(schema.Command())

    async def close_code(self) -> int:
        """The code of the Close frame, behind whatever comes before it."""
        try:
            while True:
                await self.receive()
        except Closed as closed:
            assert closed.code is not None
            return closed.code

    async def request(self, **method: Any) -> Any:
        await self.send(schema.Command(id=1, **method))
        while True:
            reply = await self.receive()
            if reply.id:
                return reply


async def connect(net: Network, **fields: Any) -> ProtobufPeer:
    peer = ProtobufPeer(await net.open_websocket(headers=PROTOBUF))
    reply = await peer.request(connect=schema.ConnectRequest(**fields))
    assert reply.connect.client == str(peer.peer.fd)
    return peer


async def test_the_connect_reply(autojump_clock: object) -> None:
    async with open_test_broker(Broker()) as net:
        peer = ProtobufPeer(await net.open_websocket(headers=PROTOBUF))
        reply = await peer.request(connect=schema.ConnectRequest())
        assert reply.connect.data == b'{"fd":1}'
        assert (reply.connect.ping, reply.connect.pong) == (20, True)
        assert list(reply.connect.subs) == ["fd:1"]
        assert net.broker.connections()[0].protocol == "centrifuge-protobuf"


async def test_messages_go_between_the_encodings_both_ways(autojump_clock: object) -> None:
    async with open_test_broker(Broker()) as net:
        one, other = await connect(net), await net.open_client()
        await one.request(subscribe={"channel": "news", "join_leave": True})
        assert (await one.receive()).push.join.info.client == "1"
        await other.request(subscribe={"channel": "news", "join_leave": True})
        assert (await one.receive()).push.join.info.client == "2"
        assert (await other.receive_json())["push"]["join"]["info"]["client"] == "2"

        await other.send_json({"publish": {"channel": "news", "data": {"a": 1}}})
        push = (await one.receive()).push
        assert (push.channel, push.pub.data, push.pub.offset) == ("news", b'{"a":1}', 1)
        assert push.pub.info.client == "2"
        await other.receive_json()

        await one.send(schema.Command(publish={"channel": "news", "data": b'{"b":2}'}))
        pub = (await other.receive_json())["push"]["pub"]
        assert (pub["data"], pub["info"]["client"]) == ({"b": 2}, "1")


async def test_bytes_that_come_together_are_told_apart_from_json(autojump_clock: object) -> None:
    async with open_test_broker(Broker()) as net:
        one, other = await connect(net), await net.open_client()
        await other.request(subscribe={"channel": "news"})
        for _ in range(2):  # the first opens the topic
            publishes = [
                schema.Command(publish={"channel": "news", "data": data})
                for data in (b"1", b"\xff\n", b'"a"')
            ]
            await one.peer.send(
                b"".join(
                    client_frame(frames.BINARY, delimited(command.SerializeToString()))
                    for command in publishes
                )
            )
            pushes = [(await other.receive_json())["push"]["pub"]["data"] for _ in range(3)]
            assert pushes == [1, "/wo=", "a"]


async def test_several_commands_of_a_frame_are_answered_in_order(autojump_clock: object) -> None:
    async with open_test_broker(Broker()) as net:
        peer = await connect(net)
        await peer.send(
            schema.Command(id=2, subscribe={"channel": "news"}),
            schema.Command(id=3, publish={"channel": "news", "data": b"1"}),
            schema.Command(id=4, publish={"channel": "news", "data": b"2"}),
            schema.Command(id=5, presence_stats={"channel": "news"}),
            schema.Command(id=6, history={"channel": "news", "limit": -1}),
            schema.Command(id=7, rpc={"method": "nothing"}),
            schema.Command(id=8, unsubscribe={"channel": "news"}),
        )
        got = [await peer.receive() for _ in range(9)]
        assert [reply.id for reply in got] == [2, 0, 0, 3, 4, 5, 6, 7, 8]
        assert [reply.push.pub.data for reply in got[1:3]] == [b"1", b"2"]
        assert got[5].presence_stats.num_clients == 1
        assert [pub.data for pub in got[6].history.publications] == [b"1", b"2"]
        assert (got[7].error.code, got[7].error.message) == (104, "method not found")


@pytest.mark.parametrize(
    "data, as_json",
    [
        (b"\xff\x00", "/wA="),
        (b"not JSON", "bm90IEpTT04="),
        (b'{"a":\n1}', {"a": 1}),  # JSON all the same, but in two lines
        (b"1e3", 1000.0),
    ],
)
async def test_bytes_that_are_not_json(
    autojump_clock: object, data: bytes, as_json: object
) -> None:
    """Over protobuf they arrive as they are; those who read JSON get them in base64."""
    async with open_test_broker(Broker()) as net:
        sender, reader, text = await connect(net), await connect(net), await net.open_client()
        for peer in (reader, text):
            await peer.request(subscribe={"channel": "bin"})
        async with net.broker.subscribe("bin") as messages:
            await sender.request(publish={"channel": "bin", "data": data})
            assert (await reader.receive()).push.pub.data == data
            assert (await text.receive_json())["push"]["pub"]["data"] == as_json
            publication = await messages.receive()
            assert publication.data == data
            assert publication.value in (as_json, data)
        listed = await reader.request(history={"channel": "bin", "limit": -1})
        assert [pub.data for pub in listed.history.publications] == [data]
        history = await text.request(history={"channel": "bin", "limit": -1})
        assert [pub["data"] for pub in history["history"]["publications"]] == [as_json]


async def test_a_plain_peer_gets_bytes_in_a_binary_frame(autojump_clock: object) -> None:
    async with open_test_broker(Broker()) as net:
        plain, sender = await net.open_plain(), await connect(net)
        for data in (b"\xff", b'"text"', b"[1,\n2]"):
            await sender.request(publish={"channel": f"fd:{plain.fd}", "data": data})
            net.broker.publish_nowait(f"fd:{plain.fd}", data)
        for frame in ((frames.BINARY, b"\xff"), (frames.TEXT, b"text"), (frames.TEXT, b"[1,2]")):
            assert [await plain.receive_frame() for _ in "12"] == [frame] * 2


async def test_the_app_gives_and_gets_bytes(autojump_clock: object) -> None:
    broker = Broker()
    seen: list[object] = []

    @broker.on_rpc
    async def rpc(connection: Connection, method: str, data: object) -> object:
        seen.append(data)
        return b"\xfe" if method == "bytes" else {"json": True}

    @broker.on_message
    async def message(connection: Connection, frame: Frame) -> None:
        seen.append(frame)

    async with open_test_broker(broker) as net:
        peer, text = await connect(net), await net.open_client()
        reply = await peer.request(rpc={"method": "bytes", "data": b"\xff"})
        assert reply.rpc.data == b"\xfe"
        reply = await peer.request(rpc={"method": "json", "data": b"[1]"})
        assert reply.rpc.data == b'{"json":true}'
        await peer.send(
            schema.Command(send={"data": b"\xff"}), schema.Command(send={"data": b"[1,\n2]"})
        )
        await peer.request(subscribe={"channel": "bin"})
        await text.request(subscribe={"channel": "bin"})
        assert seen == [b"\xff", [1], Frame(b"\xff", frames.BINARY), Frame("[1,2]", frames.TEXT)]
        broker.push(peer.peer.fd, b"\xfd")
        assert (await peer.receive()).push.message.data == b"\xfd"
        broker.push(text.fd, b"\xfd")
        assert (await text.receive_json())["push"]["message"]["data"] == "/Q=="
        broker.push(peer.peer.fd, "text")
        assert (await peer.receive()).push.message.data == b'"text"'
        broker.publish_nowait("bin", b"\xfd")
        assert (await peer.receive()).push.pub.data == b"\xfd"
        assert (await text.receive_json())["push"]["pub"]["data"] == "/Q=="


async def test_a_client_is_pinged_and_told_why_it_has_to_go(autojump_clock: object) -> None:
    async with open_test_broker(Broker(Config(ping_seconds=3, pong_seconds=2))) as net:
        peer = await connect(net)
        assert await peer.receive() == schema.Reply()
        push = (await peer.receive()).push
        assert (push.disconnect.code, push.disconnect.reason) == (3012, "no pong")
        with pytest.raises(Closed) as closed:
            await peer.receive()
        assert closed.value.code == 3012


async def test_an_answered_ping_keeps_a_client(autojump_clock: object) -> None:
    async with open_test_broker(Broker(Config(ping_seconds=3, pong_seconds=2))) as net:
        peer = await connect(net)
        for _ in range(3):
            assert await peer.receive() == schema.Reply()
            await peer.send(schema.Command())


@pytest.mark.parametrize("message", [b"", b"\x05\x08", b'{"id":1,"connect":{}}', b"\x02\x0b\x0c"])
async def test_a_message_that_is_no_command_closes_with_3501(
    autojump_clock: object, message: bytes
) -> None:
    async with open_test_broker(Broker()) as net:
        for peer in (await connect(net), ProtobufPeer(await net.open_plain(headers=PROTOBUF))):
            await peer.peer.send(client_frame(frames.BINARY, message))
            assert await peer.close_code() == 3501


HOSTILE = [
    b"\x80",  # a length that goes on behind the end
    b"\xff" * 9 + b"\x7f",  # 2^63 - 1 bytes
    b"\x80" * 9 + b"\x01",  # 2^63 bytes
    b"\x0c\x08\x09\x3a" + b"\x80" * 9 + b"\x01",  # a field of 2^63 bytes
    b"\x0c\x08\x09" + b"\x80" * 9 + b"\x01",  # field 2^60, of no wire type
    b"\x04\x3a\x02\x0a\x05",  # a publish that ends within its topic
    b"\x03\x08\x09\x3d",  # 4 bytes, of which none is there
    b"\x02\x08\x00\x01",  # a command, and one that is cut off
    bytes(2**16 + 1),
    bytes(range(256)) * 2**11,
]


@pytest.mark.parametrize("message", HOSTILE, ids=lambda message: message[:12].hex())
async def test_hostile_bytes_end_their_own_client_alone(
    autojump_clock: object, message: bytes
) -> None:
    broker = Broker()

    @broker.on_rpc  # so that messages are looked at: the app may have to be asked
    async def rpc(connection: Connection, method: str, data: object) -> None: ...

    async with open_test_broker(broker) as net:
        one, other, bad = await connect(net), await net.open_client(), await connect(net)
        await one.request(subscribe={"channel": "news"})
        await other.request(subscribe={"channel": "news"})
        await bad.request(publish={"channel": "news", "data": b"1"})
        await bad.peer.send(client_frame(frames.BINARY, message))
        assert await bad.close_code() == 3501
        await other.send_json({"publish": {"channel": "news", "data": 2}})
        assert [(await one.receive()).push.pub.data for _ in "12"] == [b"1", b"2"]
        pushes = [(await other.receive_json())["push"]["pub"]["data"] for _ in "12"]
        assert pushes == [1, 2]


async def test_more_than_a_message_may_have_is_not_read(autojump_clock: object) -> None:
    async with open_test_broker(Broker()) as net:
        one, bad = await connect(net), await connect(net)
        await bad.peer.send(client_frame(frames.BINARY, bytes(4 * 2**20)))
        assert await bad.close_code() == 1009
        assert (await one.request(rpc={"method": "nothing"})).error.code == 104


async def test_commands_before_a_bad_one_are_carried_out(autojump_clock: object) -> None:
    async with open_test_broker(Broker()) as net:
        one, bad = await connect(net), await connect(net)
        await one.request(subscribe={"channel": "news"})
        good = schema.Command(publish={"channel": "news", "data": b"1"}).SerializeToString()
        message = bytes((len(good),)) + good + b"\x02\x0b\x0c" + bytes((len(good),)) + good
        await bad.peer.send(client_frame(frames.BINARY, message))
        assert await bad.close_code() == 3501
        net.broker.publish_nowait("news", 2)
        assert [(await one.receive()).push.pub.data for _ in "12"] == [b"1", b"2"]


async def test_unknown_fields_and_wrong_types_are_skipped(autojump_clock: object) -> None:
    """As protobuf has it: a client may be newer than we are."""
    async with open_test_broker(Broker()) as net:
        peer = await connect(net)
        # Field 100, the id as text, then a publish whose topic comes as a number, too.
        publish = b"\x3a\x08\x08\x07\x0a\x01a\x12\x011"
        body = b"\xa2\x06\x02hi" + b"\x0a\x01x" + b"\x08\x09" + publish
        await peer.peer.send(client_frame(frames.BINARY, bytes((len(body),)) + body))
        assert await peer.receive() == schema.Reply(id=9, publish={})
        # A method of tomorrow is none that we know.
        body = b"\x08\x0a" + b"\xa2\x06\x00"
        await peer.peer.send(client_frame(frames.BINARY, bytes((len(body),)) + body))
        assert (await peer.receive()).error.code == 104


@pytest.mark.parametrize(
    "method, count, junk",
    [("publish", 10_000, 0), ("publish", 160, 2000), ("send", 20, 16_000)],
)
async def test_a_message_of_much_to_read_holds_up_nobody(
    autojump_clock: object, method: str, count: int, junk: int
) -> None:
    """Others are served between the commands of one message."""
    broker = Broker()
    heard: list[Frame] = []

    @broker.on_message
    async def message(connection: Connection, frame: Frame) -> None:
        heard.append(frame)

    async with open_test_broker(broker) as net:
        peer = await connect(net)
        fields: Any = {"publish": {"channel": "a", "data": b"1"}, "send": {"data": b"1"}}
        command = schema.Command(**{method: fields[method]}).SerializeToString()
        command += b"\xa0\x06\x01" * junk
        seen = set()

        async def look() -> None:
            while True:
                seen.add(net.broker.stats().published + len(heard))
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(look)
            commands = delimited(command) * count + b"\x02\x0b\x0c"
            await peer.peer.send(client_frame(frames.BINARY, commands))
            assert await peer.close_code() == 3501
            nursery.cancel_scope.cancel()
        # Between any two turns, one look in four goes amiss.
        assert len(seen - {0, count}) > 2


async def test_pings_answered_count_for_no_limit(autojump_clock: object) -> None:
    config = Config(message_rate=1, message_burst=2)
    async with open_test_broker(Broker(config)) as net:
        peer = await connect(net)
        await peer.send(*[schema.Command()] * 10)
        assert not (await peer.request(publish={"channel": "a", "data": b"1"})).error.code
        assert (await peer.request(publish={"channel": "a", "data": b"2"})).error.code == 111


# what the broker itself does for clients


async def test_clients_ask_each_other_across_the_encodings(autojump_clock: object) -> None:
    async with open_test_broker(Broker()) as net:
        one, other = await connect(net), await net.open_client()
        # From JSON to protobuf, and the answer back.
        ask = {"to": f"fd:{one.peer.fd}", "data": {"a": 1}}
        await other.send_json({"id": 5, "rpc": {"method": "request", "data": ask}})
        push = (await one.receive()).push
        assert (push.channel, push.pub.data) == (f"fd:{one.peer.fd}", b'{"a":1}')
        reply = {"reply_to": push.pub.tags["reply_to"], "data": [2]}
        answered = await one.request(rpc={"method": "reply", "data": json.dumps(reply).encode()})
        assert answered.rpc.data == b"{}"
        assert await other.receive_json() == {"id": 5, "rpc": {"data": [2]}}
        # From protobuf to JSON; the answer is an error, then one in two lines.
        for answer in ({"error": {"code": 418, "message": "no tea"}}, {"data": 3}):
            ask = {"to": f"fd:{other.fd}", "data": "tea?"}
            asked = json.dumps(ask, indent=1).encode()
            await one.send(schema.Command(id=6, rpc={"method": "request", "data": asked}))
            pub = (await other.receive_json())["push"]["pub"]
            assert pub["data"] == "tea?"
            params = {"reply_to": pub["tags"]["reply_to"], **answer}
            await other.request(rpc={"method": "reply", "data": params})
            reply = await one.receive()
            assert reply.id == 6
            if "error" in answer:
                assert (reply.error.code, reply.error.message) == (418, "no tea")
            else:
                assert reply.rpc.data == b"3"


@pytest.mark.parametrize("data", [b"\xff", b'{"topic":"a","data":"\xff"}', b"{"])
async def test_params_that_are_not_json_are_refused(autojump_clock: object, data: bytes) -> None:
    async with open_test_broker(Broker()) as net:
        peer = await connect(net)
        refused = await peer.request(rpc={"method": "publish", "data": data})
        assert (refused.error.code, net.broker.stats().published) == (107, 0)


async def test_a_report_over_protobuf_counts_both_encodings(autojump_clock: object) -> None:
    async with open_test_broker(Broker()) as net:
        one, other = await connect(net), await net.open_client()
        await one.request(subscribe={"channel": "news"})
        await other.request(subscribe={"channel": "news"})
        params = {"topic": "news", "data": 1, "echo": False, "report": True}
        reply = await one.request(rpc={"method": "publish", "data": json.dumps(params).encode()})
        report = json.loads(reply.rpc.data)
        assert (report["matched"], report["queued"]) == (1, 1)
        assert (await other.receive_json())["push"]["pub"]["data"] == 1


async def test_members_of_a_group_may_speak_either_encoding(autojump_clock: object) -> None:
    async with open_test_broker(Broker()) as net:
        one, other, sender = await connect(net), await net.open_client(), await connect(net)
        group = {"group": "workers"}
        await one.request(subscribe={"channel": "jobs", "data": json.dumps(group).encode()})
        await other.request(subscribe={"channel": "jobs", "data": group})
        for data in (b"\xff", b"\xfe"):
            await sender.request(publish={"channel": "jobs", "data": data})
        assert (await one.receive()).push.pub.data == b"\xff"
        assert (await other.receive_json())["push"]["pub"]["data"] == "/g=="
        # Data that is no JSON names no group.
        for data in (b'\xff{"group":"a"}', b'["group"]'):
            assert not (await sender.request(subscribe={"channel": "a", "data": data})).error.code
            await sender.request(unsubscribe={"channel": "a"})
        bad = await sender.request(subscribe={"channel": "a", "data": b'{"group":1}'})
        assert bad.error.code == 107


async def test_a_client_over_protobuf_is_told_of_another_user(autojump_clock: object) -> None:
    async with open_test_broker(Broker()) as net:
        peer = await connect(net)
        net.broker.bind(peer.peer.fd, "alice")
        assert (await peer.receive()).push == schema.Push(channel="user:alice", subscribe={})
        net.broker.bind(peer.peer.fd, "")
        push = (await peer.receive()).push
        assert (push.channel, push.unsubscribe.code) == ("user:alice", 2000)


async def test_the_app_may_publish_bytes_in_place_of_what_came(autojump_clock: object) -> None:
    broker = Broker()
    seen: list[bytes] = []

    @broker.on_publish
    async def ask(event: PublishEvent) -> PublishReply | None:
        seen.append(event.data)
        return PublishReply(b"[1]") if event.topic == "json" else None

    async with open_test_broker(broker) as net:
        peer, text = await connect(net), await net.open_client()
        for topic in ("json", "bytes"):
            await peer.request(subscribe={"channel": topic})
            await text.request(subscribe={"channel": topic})
        for topic in ("json", "bytes"):
            await peer.send(schema.Command(publish={"channel": topic, "data": b"\xff\n"}))
        assert [(await peer.receive()).push.pub.data for _ in "12"] == [b"[1]", b"\xff\n"]
        pushes = [(await text.receive_json())["push"]["pub"]["data"] for _ in "12"]
        assert pushes == [[1], "/wo="]
        assert seen == [b"\xff\n"] * 2


async def test_a_last_value_of_bytes_is_retained_and_null_clears_it(autojump_clock: object) -> None:
    async with open_test_broker(Broker()) as net:
        net.broker.publish_nowait("a", b"\xff", retain=True)
        peer, text = await connect(net), await net.open_client()
        await peer.request(subscribe={"channel": "a"})
        assert (await peer.receive()).push.pub.data == b"\xff"
        await text.request(subscribe={"channel": "a"})
        assert (await text.receive_json())["push"]["pub"]["data"] == "/w=="
        net.broker.publish_nowait("a", b"null", retain=True)
        assert (await text.receive_json())["push"]["pub"]["data"] is None
        await text.request(unsubscribe={"channel": "a"})
        await text.request(subscribe={"channel": "a"})
        net.broker.push(text.fd, "end")
        assert (await text.receive_json())["push"] == {"message": {"data": "end"}}


async def test_tokens_are_refreshed_over_protobuf(autojump_clock: object) -> None:
    config = Config(tokens=TokenRules(hmac_secret=HMAC_SECRET))
    async with open_test_broker(Broker(config)) as net:

        def token(seconds: float, **claims: object) -> str:
            claims |= {"sub": "alice", "exp": net.broker.wall_clock() + seconds}
            return mint(claims, HMAC_SECRET.encode(), "HS256")

        peer = ProtobufPeer(await net.open_websocket(headers=PROTOBUF))
        reply = await peer.request(connect={"token": token(60)})
        assert (reply.connect.expires, reply.connect.ttl) == (True, 60)
        assert "user:alice" in reply.connect.subs
        reply = await peer.request(refresh={"token": token(120)})
        refreshed = reply.refresh
        assert (refreshed.client, refreshed.expires, refreshed.ttl) == ("1", True, 120)
        reply = await peer.request(
            subscribe={"channel": "$a", "token": token(30, channel="$a"), "recoverable": True}
        )
        subscribed = reply.subscribe
        assert (subscribed.expires, subscribed.ttl, subscribed.recoverable) == (True, 30, True)
        reply = await peer.request(sub_refresh={"channel": "$a", "token": token(90, channel="$a")})
        assert (reply.sub_refresh.expires, reply.sub_refresh.ttl) == (True, 90)
        refused = await peer.request(
            sub_refresh={"channel": "$a", "token": token(-90, channel="$a")}
        )
        assert refused.error.code == 109
        for _ in range(5):  # past the grace period, answering pings
            await trio.sleep(21)
            await peer.send(schema.Command())
        push = (await peer.receive_but_pings()).push
        assert (push.channel, push.unsubscribe.code) == ("$a", 2501)


async def test_recovery_over_protobuf(autojump_clock: object) -> None:
    async with open_test_broker(Broker()) as net:
        peer = await connect(net)
        begun = await peer.request(subscribe={"channel": "news", "recoverable": True})
        position = {"epoch": begun.subscribe.epoch, "offset": begun.subscribe.offset}
        assert begun.subscribe.epoch
        await peer.request(unsubscribe={"channel": "news"})
        for n in range(3):
            net.broker.publish_nowait("news", n)
        again = await peer.request(subscribe={"channel": "news", "recover": True, **position})
        assert again.subscribe.recovered
        assert again.subscribe.was_recovering
        assert [pub.data for pub in again.subscribe.publications] == [b"0", b"1", b"2"]
        await peer.request(unsubscribe={"channel": "news"})
        gone = {"channel": "news", "recover": True, "epoch": "gone", "flag": 2}
        assert (await peer.request(subscribe=gone)).error.code == 112


async def test_features_offered_and_not_taken_do_no_harm(autojump_clock: object) -> None:
    """Deltas and numeric channel ids: a client that offers them works without."""
    async with open_test_broker(Broker()) as net:
        peer = await connect(net, flag=1)
        wish = {"channel": "news", "delta": "fossil", "flag": 1, "recoverable": True}
        reply = await peer.request(subscribe=wish)
        assert (reply.subscribe.delta, reply.subscribe.id) == (False, 0)
        for _ in range(2):
            net.broker.publish_nowait("news", "x" * 1000)
            push = (await peer.receive()).push
            assert (push.channel, push.id, push.pub.delta) == ("news", 0, False)
            assert len(push.pub.data) == 1002


async def test_connections_without_topics_of_their_own(autojump_clock: object) -> None:
    """For apps that take every server-side subscription for one of their own."""
    async with open_test_broker(Broker(Config(direct_topics=False))) as net:
        peer = ProtobufPeer(await net.open_websocket(headers=PROTOBUF))
        reply = await peer.request(connect=schema.ConnectRequest())
        assert not reply.connect.subs
        refused = await peer.request(publish={"channel": "fd:2", "data": b"1"})
        assert refused.error.code == 108
        for topic in ("fd:1", "user:alice"):
            with pytest.raises(Refused, match="direct_topics is off"):
                net.broker.publish_nowait(topic, 1)
        with pytest.raises(Refused, match="direct_topics is off"):
            await net.broker.request("fd:1", 1)
        # Nobody is told of a topic that it has not.
        net.broker.bind(1, "alice")
        net.broker.push(1, 1)
        assert (await peer.receive()).push.message.data == b"1"
        net.broker.reload(Config())
        net.broker.publish_nowait("fd:1", 1)
        assert (await peer.receive()).push.pub.data == b"1"
