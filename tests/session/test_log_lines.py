"""Lines of the log about connections and their commands: who it was, how long, how it ended."""

from typing import Any

import centrifuge.protocol.client_pb2 as schema
import pytest
import structlog
import trio
from trio.testing import MockClock

from broker import Broker, Config, Connection, ErrorCode, PublishEvent, PublishReply, Refused
from broker.session.connect import NAME_LENGTH
from broker.testing import Network, client_frame, name_users_by_token, open_test_broker
from broker.transport import frames
from tests.conftest import ask, delimited, served

pytestmark = pytest.mark.usefixtures("logging_restored")

LINES = list[Any]


def named(lines: LINES, event: str) -> LINES:
    return [line for line in lines if line["event"] == event]


# connections


async def test_a_close_says_who_it_was_and_how_long(autojump_clock: MockClock) -> None:
    async with served() as net:
        with structlog.testing.capture_logs() as lines:
            peer = await net.open_client(token="ann", name="chat-app", version="1.2.3")
            await trio.sleep(15.5)
            net.broker.disconnect(peer.fd, 3503, "bye")
            await peer.receive_close()
            await peer.aclose()
            await trio.sleep(1)
    who = {"fd": peer.fd, "user": "ann", "peer": "memory"}
    program = {"app_name": "chat-app", "app_version": "1.2.3"}
    [opened], [connected], [closed] = (named(lines, x) for x in ("open", "connected", "close"))
    assert opened.items() >= {"fd": peer.fd, "peer": "memory", "path": "/"}.items()
    assert opened["transport"] == "websocket"
    assert connected.items() >= {**who, **program, "protocol": "centrifuge-json"}.items()
    assert closed.items() >= {**who, **program, "code": 3503, "reason": "bye"}.items()
    assert closed["initiator"] == "server"
    assert 15.5 <= closed["seconds"] <= 16.5


async def test_a_plain_peer_has_no_name(autojump_clock: MockClock) -> None:
    async with served() as net:
        with structlog.testing.capture_logs() as lines:
            peer = await net.open_plain()
            await peer.send_close()
            await trio.sleep(1)
    assert not named(lines, "connected")
    [closed] = named(lines, "close")
    assert (closed["user"], closed["app_name"], closed["app_version"]) == ("", "", "")


async def test_of_a_long_name_the_beginning_is_kept(autojump_clock: MockClock) -> None:
    async with served() as net:
        peer = await net.open_client(token="ann", name="n" * 100_000, version="v" * 100_000)
        info = net.broker.connection_info(peer.fd)
        assert info is not None
        assert (info.app_name, info.app_version) == ("n" * NAME_LENGTH, "v" * NAME_LENGTH)


async def test_the_api_tells_the_name_too(autojump_clock: MockClock) -> None:
    async with served() as net:
        peer = await net.open_client(token="ann", name="chat-app")
        [info] = net.broker.connections()
        assert (info.fd, info.app_name, info.app_version) == (peer.fd, "chat-app", "")


# names


@pytest.mark.parametrize("protocol", ["centrifuge", "program", "plain"])
async def test_a_topic_that_looks_like_a_pattern_is_subscribed_to_and_told(
    autojump_clock: MockClock, protocol: str
) -> None:
    broker = name_users_by_token(Broker())
    async with open_test_broker(broker) as net:
        with structlog.testing.capture_logs() as lines:
            if protocol == "plain":
                plain = await net.open_plain()
                assert broker.add_subscription(plain.fd, "news*")
            else:
                peer = await net.open_client(token="ann")
                if protocol == "program":
                    assert broker.add_subscription(peer.fd, "news*")
                else:
                    await ask(peer, {"id": 2, "subscribe": {"channel": "news*"}})
                    await ask(peer, {"id": 3, "subscribe": {"channel": "news.*"}})
            await trio.sleep(1)
        assert (await broker.publish("news*", 1)).matched == 1
    [line] = named(lines, "no_pattern")
    assert (line["topic"], line["log_level"]) == ("news*", "info")
    assert "did you mean 'news.*'?" in line["detail"]


async def test_a_name_for_users_alone_says_so_and_which_pattern_was_meant(
    autojump_clock: MockClock,
) -> None:
    async with served() as net:
        peer = await net.open_client(token="ann")
        for name, text in (
            ("news.#", "'news.#' is the name of one topic, no pattern: did you mean 'news.>'?"),
            ("news#bob", "behind '#' this name lists users, and this one is not among them"),
        ):
            reply = await peer.request(subscribe={"channel": name})
            assert reply["error"] == {"code": 103, "message": text}


# commands


async def commands_of(broker: Broker, *commands: object) -> LINES:
    """The lines that these commands leave, as one message of a client."""
    async with open_test_broker(broker) as net:
        peer = await net.open_client(token="ann")
        with structlog.testing.capture_logs() as lines:
            await ask(peer, *commands)
    return named(lines, "command")


def debugging(**fields: Any) -> Broker:
    return name_users_by_token(Broker(Config(log_level="debug", **fields)))


def short(line: Any) -> tuple[object, ...]:
    return line["request"], line["method"], line["about"], line["outcome"], line.get("code")


async def test_every_command_has_a_line_with_its_outcome(autojump_clock: MockClock) -> None:
    broker = debugging(max_topic_bytes=20)

    @broker.on_rpc
    async def answer(connection: Connection, method: str, data: object) -> object:
        if method == "refuse":
            raise Refused(4001, "no")
        if method == "fail":
            raise RuntimeError("on purpose")
        return data

    lines = await commands_of(
        broker,
        {"id": 2, "subscribe": {"channel": "t"}},
        {"id": 3, "subscribe": {"channel": "t"}},
        {"id": 4, "publish": {"channel": "t", "data": "secret"}},
        {"id": 5, "publish": {"channel": "x" * 30, "data": 1}},
        {"publish": {"channel": "t", "data": 1}},
        {"id": 6, "publish": {"channel": "fd:99", "data": 1}},
        {"id": 7, "history": {"channel": "t"}},
        {"id": 8, "presence": {"channel": "t"}},
        {"id": 9, "presence_stats": {"channel": "t"}},
        {"id": 10, "rpc": {"method": "echo", "data": "secret"}},
        {"id": 11, "rpc": {"method": "refuse"}},
        {"id": 12, "rpc": {"method": "fail"}},
        {"id": 13, "refresh": {"token": "secret"}},
        {"id": 14, "unsubscribe": {"channel": "t"}},
        {"id": 15},
        {"id": 16, "publish": {"channel": 1}},
        {},
        {"id": 17, "connect": {}},
    )
    assert [short(line) for line in lines] == [
        (2, "subscribe", "t", "ok", None),
        (3, "subscribe", "t", "error", 105),
        (4, "publish", "t", "ok", None),
        (5, "publish", "x" * 30, "error", 107),
        (0, "publish", "t", "ok", None),
        (6, "publish", "fd:99", "error", 102),
        (7, "history", "t", "ok", None),
        (8, "presence", "t", "ok", None),
        (9, "presence_stats", "t", "ok", None),
        (10, "rpc", "echo", "ok", None),
        (11, "rpc", "refuse", "error", 4001),
        (12, "rpc", "fail", "error", ErrorCode.INTERNAL),
        (13, "refresh", "", "error", ErrorCode.NOT_AVAILABLE),
        (14, "unsubscribe", "t", "ok", None),
        (15, "none", "", "error", ErrorCode.METHOD_NOT_FOUND),
        (16, "none", "", "error", ErrorCode.BAD_REQUEST),
        (17, "none", "", "disconnect", 3501),
    ]
    assert {line["log_level"] for line in lines} == {"debug"}
    assert {line["user"] for line in lines} == {"ann"}
    assert "secret" not in str(lines), "neither data nor tokens"


async def test_publishes_in_one_read_have_a_line_each(autojump_clock: MockClock) -> None:
    async with open_test_broker(debugging()) as net:
        peer = await net.open_client(token="ann")
        publishes = b"".join(
            client_frame(1, b'{"id":%d,"publish":{"channel":"t","data":1}}' % n)
            for n in range(1, 6)
        )
        await peer.request(publish={"channel": "t", "data": 1})  # so the next go as one
        with structlog.testing.capture_logs() as lines:
            await peer.send(publishes)
            await peer.receive_all()
    assert [line["request"] for line in named(lines, "command")] == [1, 2, 3, 4, 5]


async def test_a_publish_that_a_hook_decides_has_one_line(autojump_clock: MockClock) -> None:
    broker = debugging()

    @broker.on_publish
    async def decide(event: PublishEvent) -> PublishReply | None:
        if event.topic == "no":
            raise Refused(4001, "no")
        return None

    lines = await commands_of(
        broker,
        {"id": 2, "publish": {"channel": "yes", "data": 1}},
        {"id": 3, "publish": {"channel": "no", "data": 1}},
    )
    assert [short(line) for line in lines] == [
        (2, "publish", "yes", "ok", None),
        (3, "publish", "no", "error", 4001),
    ]


@pytest.mark.parametrize("with_hook", [False, True])
async def test_a_command_beyond_the_limits_has_one_line(
    autojump_clock: MockClock, with_hook: bool
) -> None:
    broker = debugging(message_rate=1.0, message_burst=2)
    if with_hook:

        @broker.on_publish
        async def decide(event: PublishEvent) -> PublishReply | None:
            return None

    commands = [{"id": n, "publish": {"channel": "t", "data": 1}} for n in range(2, 6)]
    lines = await commands_of(broker, *commands)
    assert [short(line)[0] for line in lines] == [2, 3, 4, 5]
    assert short(lines[-1]) == (5, "publish", "t", "error", ErrorCode.TOO_MANY_REQUESTS)


async def test_commands_over_protobuf_have_lines_too(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker(Config(log_level="debug"))) as net:
        peer = await net.open_websocket(headers={"Sec-WebSocket-Protocol": "centrifuge-protobuf"})
        with structlog.testing.capture_logs() as lines:
            for command in (
                schema.Command(id=1, connect=schema.ConnectRequest(name="app")),
                schema.Command(id=2, publish=schema.PublishRequest(channel="t", data=b"\xff")),
                schema.Command(id=3, history=schema.HistoryRequest(channel="")),
            ):
                message = delimited(command.SerializeToString())
                await peer.send(client_frame(frames.BINARY, message))
                await trio.sleep(0.1)
    assert [short(line)[:2] for line in named(lines, "command")] == [
        (1, "connect"),
        (2, "publish"),
        (3, "history"),
    ]


async def test_without_debug_no_command_has_a_line(autojump_clock: MockClock) -> None:
    broker = name_users_by_token(Broker(Config(log_level="info")))
    commands = [{"id": n, "subscribe": {"channel": "t"}} for n in range(2, 4)]
    assert await commands_of(broker, *commands) == []


async def test_a_reload_turns_the_lines_on(autojump_clock: MockClock) -> None:
    async def lines_of(net: Network) -> LINES:
        with structlog.testing.capture_logs() as lines:
            peer = await net.open_client(token="ann")
            await peer.request(publish={"channel": "t", "data": 1})
        return named(lines, "command")

    async with served(log_level="info") as net:
        assert await lines_of(net) == []
        net.broker.reload(Config(log_level="debug"))
        assert [line["method"] for line in await lines_of(net)] == ["connect", "publish"]
