"""A client as its commands see it: replies in their order, rights that are asked once, payloads."""

from typing import Any

import msgspec
import pytest
import trio
from msgspec import Raw
from trio.testing import MockClock

from broker import Broker, Config, TopicRules
from broker.errors import Refused
from broker.protocols.centrifuge_json import CENTRIFUGE_JSON
from broker.protocols.centrifuge_protobuf import CENTRIFUGE_PROTOBUF
from broker.protocols.codec import Codec
from broker.session.connection import Connection
from broker.session.replies import Client
from broker.testing import Network, Peer, open_test_broker


async def client_of(net: Network, codec: Codec = CENTRIFUGE_JSON) -> tuple[Client, Peer]:
    """The broker's side of a client that has connected, and the client."""
    peer = await net.open_client()
    served = net.node.services.connections[peer.fd]
    assert isinstance(served, Connection)
    return Client(net.node.services, served.peer, served.orders, served, codec), peer


async def test_replies_to_publishes_wait_for_the_end_of_their_batch_or_another_reply(
    autojump_clock: MockClock, net: Network
) -> None:
    client, peer = await client_of(net)
    for number in (1, 2):
        client.answer_publishes([number], None)
    assert net.outbox(peer.fd).messages == 0
    client.reply(3, "presence_stats", {"num_clients": 1})
    client.settle()
    client.refuse(4, Refused(103))
    client.answer_publishes([5], None)
    for _ in range(2):  # once
        client.settle()
    texts = [await peer.receive_text() for _ in range(4)]
    assert [[msgspec.json.decode(line) for line in text.split("\n")] for text in texts] == [
        [{"id": 1, "publish": {}}, {"id": 2, "publish": {}}],
        [{"id": 3, "presence_stats": {"num_clients": 1}}],
        [{"id": 4, "error": {"code": 103, "message": "permission denied"}}],
        [{"id": 5, "publish": {}}],
    ]


async def test_a_reply_comes_behind_what_was_published_before(
    autojump_clock: MockClock, net: Network
) -> None:
    client, peer = await client_of(net)
    await peer.request(subscribe={"channel": "a"})
    net.node.services.router.publish_all("a", (b"1",))
    client.reply(3, "rpc", {})
    first, second = [await peer.receive_json() for _ in "12"]
    assert first["push"]["pub"]["data"] == 1
    assert second == {"id": 3, "rpc": {}}


async def test_a_command_without_an_id_is_refused_in_silence(
    autojump_clock: MockClock, net: Network
) -> None:
    client, peer = await client_of(net)
    client.refuse(0, Refused(103))
    with trio.move_on_after(1) as silence:
        await peer.receive_text()
    assert silence.cancelled_caught


async def test_a_topic_that_is_open_to_all_is_asked_about_once_for_each_version_of_the_settings(
    autojump_clock: MockClock, net: Network
) -> None:
    client, _ = await client_of(net)
    assert client.open_topic() == ""
    client.check_publish("a")
    assert client.open_topic() == "a"
    client.check_publish("b")
    assert client.open_topic() == "b"
    net.broker.reload(Config(topics=TopicRules(may_publish="none")))
    assert client.open_topic() == ""
    with pytest.raises(Refused, match="103"):
        client.check_publish("b")
    assert client.open_topic() == ""


@pytest.mark.parametrize("topic", ["$a", "a#ann", "users:a"])
async def test_a_topic_that_is_not_open_to_all_is_asked_about_each_time(
    autojump_clock: MockClock, topic: str
) -> None:
    rules = TopicRules(may_publish="users")
    async with open_test_broker(Broker(Config(namespaces={"users": rules}))) as net:
        client, peer = await client_of(net)
        net.broker.bind(peer.fd, "ann")
        net.broker.add_subscription(peer.fd, topic)
        client.check_publish(topic)
        assert client.open_topic() == ""


@pytest.mark.parametrize("name", ["", "a.*"])
async def test_no_name_is_open_before_it_was_asked_about(
    autojump_clock: MockClock, net: Network, name: str
) -> None:
    client, _ = await client_of(net)
    if name == "":
        with pytest.raises(Refused, match="107"):
            client.check_publish(name)
    else:
        client.check_publish(name)  # what is no topic is refused when it is published to
        with pytest.raises(Refused, match="107"):
            net.broker.publish_nowait(name, 1)


# payloads


@pytest.mark.parametrize(
    "codec, data, payload",
    [
        (CENTRIFUGE_JSON, b'{"a": 1}', b'{"a": 1}'),
        (CENTRIFUGE_JSON, b'{\n"a":\r\n1}', b'{ "a":  1}'),
        (CENTRIFUGE_PROTOBUF, b"a\nb\xff", b"a\nb\xff"),
    ],
)
async def test_a_payload_goes_on_as_it_came_but_in_one_line_where_that_matters(
    autojump_clock: MockClock, net: Network, codec: Codec, data: bytes, payload: bytes
) -> None:
    client, _ = await client_of(net, codec)
    got = client.payload(Raw(data))
    assert b"\n" not in got or codec.opaque_payloads
    assert got == payload or msgspec.json.decode(got) == msgspec.json.decode(payload)


@pytest.mark.parametrize(
    "codec, data, value",
    [
        (CENTRIFUGE_JSON, b"", None),
        (CENTRIFUGE_JSON, b"null", None),
        (CENTRIFUGE_JSON, b'{"a":[1]}', {"a": [1]}),
        (CENTRIFUGE_PROTOBUF, b'{"a":[1]}', {"a": [1]}),
        (CENTRIFUGE_PROTOBUF, b"\xff", b"\xff"),
        (CENTRIFUGE_PROTOBUF, b"", None),
    ],
)
async def test_hooks_see_a_payload_decoded_or_as_bytes(
    autojump_clock: MockClock, net: Network, codec: Codec, data: bytes, value: object
) -> None:
    client, _ = await client_of(net, codec)
    assert client.value(Raw(data)) == value


async def test_json_that_python_cannot_hold_is_refused_where_only_json_may_come(
    autojump_clock: MockClock, net: Network
) -> None:
    deep = Raw(b"[" * 10_000 + b"]" * 10_000)
    client, _ = await client_of(net)
    with pytest.raises(Refused, match="107: data: "):
        client.value(deep)
    client, _ = await client_of(net, CENTRIFUGE_PROTOBUF)
    assert client.value(deep) == bytes(deep)


@pytest.mark.parametrize(
    "codec, value, written",
    [
        (CENTRIFUGE_JSON, {"a": 1}, b'{"a":1}'),
        (CENTRIFUGE_JSON, b"\xff", b'"/w=="'),
        (CENTRIFUGE_PROTOBUF, {"a": 1}, b'{"a":1}'),
        (CENTRIFUGE_PROTOBUF, b"\xff", b"\xff"),
    ],
)
async def test_a_value_of_the_app_is_written_as_its_client_reads_it(
    autojump_clock: MockClock, net: Network, codec: Codec, value: Any, written: bytes
) -> None:
    client, _ = await client_of(net, codec)
    assert bytes(client.written(value)) == written
    with pytest.raises(TypeError):
        client.written(object())
