"""Payloads are not the peer's fault: half of an emoji and null, from every door to every reader."""

import json
from base64 import b64encode
from collections.abc import Callable
from typing import Any

import centrifuge.protocol.client_pb2 as schema
import jwt
import msgspec
import pytest
from trio.testing import MockClock, wait_all_tasks_blocked

from broker import (
    Broker,
    Config,
    ConnectEvent,
    Connection,
    Frame,
    PublishEvent,
    PublishReply,
    SubscribeEvent,
    TokenRules,
)
from broker.testing import Network, Peer, client_frame, open_test_broker
from broker.transport import frames
from tests.http.conftest import KEY, ask
from tests.test_protobuf import ProtobufPeer
from tests.test_protobuf import connect as connect_protobuf

HALF = r'"cut \ud83d"'
SEEN = "cut \ufffd"
SECRET = "0123456789abcdef0123456789abcdef"


def filled(text: str, value: str) -> str:
    """JSON text with a value in place of its `@`."""
    return text.replace("@", value)


async def say(client: Peer, text: str) -> Any:
    """The one object that answers a message."""
    await client.send_text(text)
    return await client.receive_json()


async def is_well(client: Peer) -> bool:
    """Whether a client is served as before."""
    return "presence_stats" in await client.request(presence_stats={"channel": "well"})


async def over_json(net: Network, data: str) -> None:
    client = await net.open_client()
    reply = await say(client, filled('{"id":1,"publish":{"channel":"news","data":@}}', data))
    assert reply == {"id": 1, "publish": {}}


async def in_a_row(net: Network, data: str) -> None:
    """As one read of several messages, which a busy publisher's are."""
    client = await net.open_client()
    message = filled('{"publish":{"channel":"news","data":@}}', data)
    await client.send(client_frame(frames.TEXT, message.encode()))
    assert await is_well(client)


async def over_protobuf(net: Network, data: str) -> None:
    client = await connect_protobuf(net)
    reply = await client.request(publish={"channel": "news", "data": data.encode()})
    assert not reply.HasField("error")


async def over_rpc(net: Network, data: str) -> None:
    client = await net.open_client()
    params = filled('{"topic":"news","data":@,"key":null,"exclude":null}', data)
    reply = await say(client, filled('{"id":1,"rpc":{"method":"publish","data":@}}', params))
    assert reply == {"id": 1, "rpc": {"data": {}}}


async def over_rpc_in_protobuf(net: Network, data: str) -> None:
    client = await connect_protobuf(net)
    params = filled('{"topic":"news","data":@,"report":null}', data)
    reply = await client.request(rpc={"method": "publish", "data": params.encode()})
    assert reply.rpc.data == b"{}"


async def by_a_will(net: Network, data: str) -> None:
    client = await net.open_client()
    params = filled('{"topic":"news","data":@}', data)
    await say(client, filled('{"id":1,"rpc":{"method":"will","data":@}}', params))
    await client.aclose()


async def by_a_backend(net: Network, data: str) -> None:
    body = filled('{"channel":"news","data":@,"tags":null,"b64data":null}', data)
    status, answer = await ask(net, "publish", body.encode())
    assert (status, json.loads(answer)["result"]["offset"]) == (200, 1)


async def in_a_batch(net: Network, data: str) -> None:
    body = filled('{"commands":[{"publish":{"channel":"news","data":@}}],"parallel":null}', data)
    status, answer = await ask(net, "batch", body.encode())
    assert (status, json.loads(answer)["replies"][0]["publish"]["offset"]) == (200, 1)


async def in_a_broadcast(net: Network, data: str) -> None:
    body = filled('{"channels":["news"],"data":@}', data)
    status, answer = await ask(net, "broadcast", body.encode())
    assert (status, json.loads(answer)["result"]["responses"][0]["result"]["offset"]) == (200, 1)


async def by_the_app(net: Network, data: str) -> None:
    net.broker.publish_nowait("news", data.encode())


DOORS = [
    *(over_json, in_a_row, over_protobuf, over_rpc, over_rpc_in_protobuf, by_a_will),
    *(by_a_backend, in_a_batch, in_a_broadcast, by_the_app),
]


@pytest.mark.parametrize("data, seen", [(HALF, SEEN), (f'{{"a":[{HALF}]}}', {"a": [SEEN]})])
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("publish", DOORS)
async def test_half_an_emoji_reaches_every_reader_as_json(
    autojump_clock: MockClock,
    publish: Callable[[Network, str], Any],
    hooked: bool,
    data: str,
    seen: object,
) -> None:
    broker = Broker(Config(api_key=KEY))
    if hooked:

        @broker.on_publish
        async def look(event: PublishEvent) -> None:
            assert event.topic.encode() == b"news"

    async with open_test_broker(broker) as net:
        reader, plain, protobuf = (
            await net.open_client(),
            await net.open_plain(),
            await connect_protobuf(net),
        )
        await reader.request(subscribe={"channel": "news"})
        await protobuf.request(subscribe={"channel": "news"})
        broker.add_subscription(plain.fd, "news")
        async with broker.subscribe("news") as messages:
            await publish(net, data)
            assert (await anext(messages)).value == seen
        # `receive_json` is a strict parser, that takes no halves.
        assert (await reader.receive_json())["push"]["pub"]["data"] == seen
        got = await plain.receive_text()
        assert (got if isinstance(seen, str) else json.loads(got)) == seen
        pushed = (await protobuf.receive()).push.pub.data
        assert json.loads(pushed.replace(rb"\ud83d", rb"\ufffd")) == seen
        history = await reader.request(history={"channel": "news", "limit": -1})
        assert history["history"]["publications"][0]["data"] == seen
        status, answer = await ask(net, "history", b'{"channel":"news","limit":-1,"since":null}')
        assert (status, json.loads(answer)["result"]["publications"][0]["data"]) == (200, seen)
        assert await is_well(reader)


@pytest.mark.parametrize("data, seen", [(HALF, SEEN), ("null", None), ("1e999", float("inf"))])
async def test_hooks_see_whatever_data_came(
    autojump_clock: MockClock, data: str, seen: object
) -> None:
    broker = Broker()
    found: dict[str, object] = {}

    @broker.on_connect
    async def connect(event: ConnectEvent) -> None:
        found["connect"] = event.data

    @broker.on_subscribe
    async def subscribe(event: SubscribeEvent) -> None:
        found["subscribe"] = event.data

    @broker.on_rpc
    async def rpc(connection: Connection, method: str, data: object) -> None:
        found["rpc"] = data

    @broker.on_message
    async def message(connection: Connection, frame: Frame) -> None:
        found["send"] = frame.data

    sent = {
        "connect": '{"id":1,"connect":{"data":@,"token":null,"subs":null,"headers":null}}',
        "subscribe": '{"id":2,"subscribe":{"channel":"a","data":@,"tf":null,"recover":null}}',
        "rpc": '{"id":3,"rpc":{"method":"m","data":@}}',
        "send": '{"send":{"data":@}}',
    }
    async with open_test_broker(broker) as net:
        client = await net.open_websocket()
        for method, command in sent.items():
            await client.send_text(filled(command, data))
            if method != "send":
                assert method in await client.receive_json()
        await wait_all_tasks_blocked()
        send = found.pop("send")
        assert send == data.replace(r"\ud83d", r"\ufffd")
        assert found == dict.fromkeys(["connect", "subscribe", "rpc"], seen)

        protobuf = ProtobufPeer(
            await net.open_websocket(headers={"Sec-WebSocket-Protocol": PROTOBUF})
        )
        found.clear()
        await protobuf.request(connect={"data": data.encode()})
        await protobuf.request(subscribe={"channel": "a", "data": data.encode()})
        await protobuf.request(rpc={"method": "m", "data": data.encode()})
        await protobuf.send(schema.Command(send={"data": data.encode()}))
        await wait_all_tasks_blocked()
        assert found.pop("send") == send
        assert found == dict.fromkeys(["connect", "subscribe", "rpc"], seen)


PROTOBUF = "centrifuge-protobuf"


async def test_half_an_emoji_in_a_request_and_its_answer(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker()) as net:
        asker, answerer = await net.open_client(), await net.open_client()
        params = filled('{"to":"fd:N","data":@,"seconds":null}', HALF).replace(
            "N", str(answerer.fd)
        )
        await asker.send_text(filled('{"id":1,"rpc":{"method":"request","data":@}}', params))
        pub = (await answerer.receive_json())["push"]["pub"]
        assert pub["data"] == SEEN
        answer = filled('{"reply_to":"T","data":@,"error":null}', HALF).replace(
            "T", pub["tags"]["reply_to"]
        )
        await answerer.send_text(filled('{"id":1,"rpc":{"method":"reply","data":@}}', answer))
        assert await asker.receive_json() == {"id": 1, "rpc": {"data": SEEN}}


NOT_JSON = ["NaN", "Infinity", '{"a":-Infinity}', "[1,]", "nul"]


@pytest.mark.parametrize("data", NOT_JSON)
async def test_what_is_no_json_never_goes_out_as_json(autojump_clock: MockClock, data: str) -> None:
    """JavaScript has no word for `NaN` in JSON: it could read nothing of a frame with one."""
    broker = Broker(Config(api_key=KEY))

    @broker.on_rpc
    async def answer(connection: Connection, method: str, params: object) -> object:
        return msgspec.Raw(data.encode())

    @broker.on_publish
    async def replace(event: PublishEvent) -> PublishReply:
        return PublishReply(data.encode())

    async with open_test_broker(broker) as net:
        reader, protobuf = await net.open_client(), await connect_protobuf(net)
        await reader.request(subscribe={"channel": "news"})
        # Those of others: the frame, the request or the one command is refused.
        rude = await net.open_client()
        await rude.send_text(filled('{"id":1,"publish":{"channel":"news","data":@}}', data))
        assert (await rude.receive_close())[0] == 3501
        body = filled('{"channel":"news","data":@}', data).encode()
        assert (await ask(net, "publish", body))[0] == 400
        batch = filled('{"commands":[{"publish":{"channel":"news","data":@}}]}', data).encode()
        assert (await ask(net, "batch", batch))[0] == 400
        rpc = filled('{"topic":"news","data":@}', data).encode()
        for method in ("publish", "will"):
            reply = await protobuf.request(rpc={"method": method, "data": rpc})
            assert reply.error.code == 107
        # Those of the app's own: it is told.
        ready = msgspec.Raw(data.encode())
        for value in (ready, {"a": [ready]}):
            with pytest.raises(ValueError, match="not JSON"):
                broker.publish_nowait("news", value)
            with pytest.raises(ValueError, match="not JSON"):
                broker.push(reader.fd, value)
            with pytest.raises(ValueError, match="not JSON"):
                broker.add_subscription(reader.fd, "other", info=value)
        for command in ({"rpc": {"method": "m"}}, {"publish": {"channel": "news", "data": 1}}):
            assert (await reader.request(**command))["error"]["code"] == 100
        # Bytes of which nothing is known are a text in base64.
        broker.publish_nowait("news", data.encode())
        broker.publish_nowait("news", float("nan"))
        got = [(await reader.receive_json())["push"]["pub"]["data"] for _ in range(2)]
        assert got == [b64encode(data.encode()).decode(), None]


NO_CHARACTER = "half of a surrogate pair is no character"


@pytest.mark.parametrize(
    "command, field",
    [
        (r'"publish":{"channel":"\ud83d","data":1}', "publish.channel"),
        (r'"subscribe":{"channel":"\ud83d"}', "subscribe.channel"),
        (r'"subscribe":{"channel":"a","token":"\ud83d"}', "subscribe.token"),
        (r'"unsubscribe":{"channel":"\ud83d"}', "unsubscribe.channel"),
        (r'"presence":{"channel":"\ud83d"}', "presence.channel"),
        (r'"presence_stats":{"channel":"\ud83d"}', "presence_stats.channel"),
        (r'"history":{"channel":"\ud83d"}', "history.channel"),
        (r'"rpc":{"method":"\ud83d"}', "rpc.method"),
        (r'"rpc":{"method":"publish","data":{"topic":"\ud83d","data":1}}', "publish: topic"),
        (
            r'"rpc":{"method":"publish","data":{"topic":"a","data":1,"key":"\ud83d"}}',
            "publish: key",
        ),
        (r'"rpc":{"method":"request","data":{"to":"\ud83d","data":1}}', "request: to"),
        (r'"rpc":{"method":"reply","data":{"reply_to":"\ud83d"}}', "reply: reply_to"),
        (r'"rpc":{"method":"will","data":{"topic":"\ud83d"}}', "will: topic"),
        (
            r'"rpc":{"method":"reply","data":{"reply_to":"1","error":{"code":107,"message":"\ud83d"}}}',
            "reply: error.message",
        ),
        (r'"refresh":{"token":"\ud83d"}', "refresh.token"),
        (r'"sub_refresh":{"channel":"\ud83d"}', "sub_refresh.channel"),
    ],
)
async def test_a_name_with_half_an_emoji_is_refused_and_named(
    autojump_clock: MockClock, command: str, field: str
) -> None:
    async with open_test_broker(Broker()) as net:
        client = await net.open_client()
        reply = await say(client, filled('{"id":7,@}', command))
        error = {"code": 107, "message": f"{field}: {NO_CHARACTER}"}
        assert reply == {"id": 7, "error": error}
        assert await is_well(client)
        if "rpc" in command and "data" in command:
            # In protobuf too, where the data are bytes.
            rpc = json.loads(command.replace(r"\ud83d", "@@").join("{}"))["rpc"]
            data = json.dumps(rpc["data"]).replace("@@", r"\ud83d").encode()
            protobuf = await connect_protobuf(net)
            answer = await protobuf.request(rpc={"method": rpc["method"], "data": data})
            assert (answer.error.code, answer.error.message) == (107, error["message"])


async def test_a_bad_command_among_several_is_refused_alone(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker()) as net:
        client = await net.open_client()
        lines = [
            '{"id":1,"publish":{"channel":"a","data":1}}',
            r'{"id":2,"publish":{"channel":"\ud83d","data":1}}',
            '{"publish":{"channel":5,"data":1}}',
            '{"id":3,"publish":{"channel":"a","data":null}}',
            '{"id":4,"history":{"channel":"a","limit":-1,"since":null,"reverse":null}}',
        ]
        await client.send_text("\n".join(lines))
        replies: list[Any] = []
        while len(replies) < 4:
            replies += map(json.loads, (await client.receive_text()).split("\n"))
        assert [reply["id"] for reply in replies] == [1, 2, 3, 4]
        assert [next(key for key in reply if key != "id") for reply in replies] == [
            *("publish", "error", "publish", "history")
        ]
        assert [p["data"] for p in replies[3]["history"]["publications"]] == [1, None]
        assert await is_well(client)


@pytest.mark.parametrize("line_ends", ["\n", "\n\n", " \r\n"])
async def test_a_message_of_line_ends_says_why_it_closes(
    autojump_clock: MockClock, line_ends: str
) -> None:
    closes = []
    broker = Broker()

    @broker.on_close
    async def closed(connection: Connection, close: Any) -> None:
        closes.append((close.code, close.reason, close.initiator))

    async with open_test_broker(broker) as net:
        client = await net.open_client()
        await client.send_text(line_ends)
        assert await client.receive_close() == (3501, "bad request: empty")
        protobuf = await connect_protobuf(net)
        await protobuf.peer.send(client_frame(frames.BINARY, b""))
        assert await protobuf.close_code() == 3501
        await client.aclose()
        await protobuf.peer.aclose()
        await wait_all_tasks_blocked()
    assert closes == [(3501, "bad request: empty", "server")] * 2


async def test_a_token_may_show_half_an_emoji_and_leave_claims_null(
    autojump_clock: MockClock,
) -> None:
    broker = Broker(Config(tokens=TokenRules(hmac_secret=SECRET)))
    claims = {"sub": "alice", "info": {"nick": "\ud83d"}, "jti": 5, "exp": None, "channels": None}
    token = jwt.PyJWS().encode(json.dumps(claims).encode(), SECRET, "HS256")
    async with open_test_broker(broker) as net:
        watcher = await net.open_client(token=token)
        await watcher.request(subscribe={"channel": "room"})
        present = await watcher.request(presence={"channel": "room"})
        (info,) = present["presence"]["presence"].values()
        assert (info["user"], info["conn_info"]) == ("alice", {"nick": "\ufffd"})


async def test_an_app_may_name_its_users_as_it_likes(autojump_clock: MockClock) -> None:
    broker = Broker(Config(api_key=KEY))
    async with open_test_broker(broker) as net:
        reader, client = await net.open_client(), await net.open_client()
        for each in (reader, client):
            await each.request(subscribe={"channel": "news"})
        broker.bind(client.fd, "al\ud83d")
        connections = json.loads((await ask(net, "connections", b'{"user":null}'))[1])
        users = [each["user"] for each in connections["result"]["connections"].values()]
        assert users == ["", "al\ufffd"]
        assert await is_well(reader)


@pytest.mark.parametrize(
    "method, body, reason",
    [
        ("publish", rb'{"channel":"\ud83d","data":1}', f"channel: {NO_CHARACTER}"),
        ("publish", rb'{"channel":"a","data":1,"tags":{"\ud83d":"a"}}', f"tags: {NO_CHARACTER}"),
        (
            "publish",
            rb'{"channel":"a","data":1,"tags":{"a":"\ud83d"}}',
            f"tags['a']: {NO_CHARACTER}",
        ),
        (
            "publish",
            rb'{"channel":"a","data":1,"idempotency_key":"\ud83d"}',
            f"idempotency_key: {NO_CHARACTER}",
        ),
        ("broadcast", rb'{"channels":["a","\ud83d"],"data":1}', f"channels: {NO_CHARACTER}"),
        ("disconnect", rb'{"user":"\ud83d"}', f"user: {NO_CHARACTER}"),
        (
            "disconnect",
            rb'{"user":"a","disconnect":{"code":4000,"reason":"\ud83d"}}',
            f"disconnect.reason: {NO_CHARACTER}",
        ),
        ("channels", rb'{"pattern":"\ud83d"}', f"pattern: {NO_CHARACTER}"),
        ("publish", b'{"channel":null,"data":1}', "channel is missing"),
        ("publish", b'{"channel":"a","data":1,"exclude":[null]}', "exclude: Expected `int`"),
        ("push", b'{"fd":null,"data":1}', "fd is missing"),
        ("connection", b'{"fd":"1"}', "fd: Expected `int`, got `str`"),
        ("info", b"null", "this is no object"),
    ],
)
async def test_a_wrong_parameter_is_named_alone_and_in_a_batch(
    autojump_clock: MockClock, method: str, body: bytes, reason: str
) -> None:
    async with open_test_broker(Broker(Config(api_key=KEY))) as net:
        status, answer = await ask(net, method, body)
        error = json.loads(answer)["error"]
        assert (status, error["code"], error["message"][: len(reason)]) == (200, 107, reason)
        good = b'{"publish":{"channel":"a","data":1}}'
        batch = b'{"commands":[%b,{"%b":%b},%b]}' % (good, method.encode(), body, good)
        status, answer = await ask(net, "batch", batch)
        first, second, third = json.loads(answer)["replies"]
        assert status == 200
        assert second == {"error": error}
        assert (first["publish"]["offset"], third["publish"]["offset"]) == (1, 2)


@pytest.mark.parametrize(
    "method, params",
    [
        ("publish", '"channel":"a","data":1,"b64data":N,"tags":N,"skip_history":N,"retain":N'),
        ("publish", '"channel":"a","data":1,"idempotency_key":N,"exclude":N,"report":N'),
        ("publish", '"channel":"a","data":1,"tags":{"a":N}'),
        ("broadcast", '"channels":["a"],"data":1,"tags":N'),
        ("subscribe", '"user":"u","client":N,"session":N,"channel":"a","info":N,"b64info":N'),
        ("subscribe", '"user":"u","channel":"a","data":N,"recover_since":N,"override":N'),
        ("unsubscribe", '"user":"u","client":N,"channel":"a"'),
        ("disconnect", '"user":"u","whitelist":N,"disconnect":N'),
        ("disconnect", '"user":"u","disconnect":{"code":N,"reason":N}'),
        ("refresh", '"user":"u","expired":N,"expire_at":N'),
        ("history", '"channel":"a","limit":N,"since":N,"reverse":N'),
        ("history", '"channel":"a","since":{"offset":N,"epoch":N}'),
        ("channels", '"pattern":N'),
        ("info", '"anything":N'),
        ("connections", '"user":N,"expression":N,"after":N,"limit":N'),
    ],
)
async def test_a_parameter_that_is_null_is_absent(
    autojump_clock: MockClock, method: str, params: str
) -> None:
    async with open_test_broker(Broker(Config(api_key=KEY))) as net:
        status, answer = await ask(net, method, filled("{@}", params).replace("N", "null").encode())
        assert (status, list(json.loads(answer))) == (200, ["result"]), answer


async def test_an_info_that_is_null_is_none(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker(Config(api_key=KEY))) as net:
        client = await net.open_client()
        params = filled('{"client":"@","channel":"news","info":null,"data":null}', str(client.fd))
        await ask(net, "subscribe", params.encode())
        assert "data" not in (await client.receive_json())["push"]["subscribe"]
        present = await client.request(presence={"channel": "news"})
        assert "chan_info" not in present["presence"]["presence"][str(client.fd)]


@pytest.mark.parametrize(
    "path", ["/connection/uni_sse", "/connection/sse", "/connection/http_stream"]
)
async def test_the_other_transports_read_the_same(autojump_clock: MockClock, path: str) -> None:
    seen = []
    broker = Broker()

    @broker.on_connect
    async def connect(event: ConnectEvent) -> None:
        seen.append(event.data)

    async with open_test_broker(broker) as net:
        request = filled('{"data":@,"token":null,"subs":{"news":{"recover":null}}}', HALF)
        body = request if "uni" in path else filled('{"id":1,"connect":@}', request)
        for sent, status in ((body, b" 200 "), ("\n\n", b" 400 "), (" ", b" 400 ")):
            stream = await net.listener.connect()
            head = f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Length: {len(sent)}\r\n\r\n"
            await stream.send_all((head + sent).encode())
            answer = await stream.receive_some()
            assert status in answer[:20], answer
            await stream.aclose()
        assert seen == [SEEN]
