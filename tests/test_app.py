"""The methods that an app has of a `Broker`, served in memory."""

from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing
from trio.testing import MockClock, wait_all_tasks_blocked

from broker import (
    Broker,
    Close,
    Config,
    ConfigError,
    Connection,
    Frame,
    Initiator,
    PushResult,
    Refused,
    TokenRules,
    TopicRules,
)
from broker.testing import MemoryListener, client_frame, open_test_broker
from broker.transport import frames

LOCKSTEP = trio.testing.lockstep_stream_pair

# sending


async def test_data_that_json_cannot_say_is_not_sent(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker()) as net:
        peer = await net.open_plain()
        with pytest.raises(TypeError):
            net.broker.push(peer.fd, object())
        with pytest.raises(TypeError):
            net.broker.publish_nowait("news", {1: object()})
        assert net.broker.stats().published == 0


async def test_a_push_to_nobody_is_closed(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker()) as net:
        peer = await net.open_plain()
        for fd in (0, 99, peer.fd + 1, -1):
            assert net.broker.push(fd, "x") is PushResult.CLOSED
        await peer.aclose()
        await wait_all_tasks_blocked()
        assert net.broker.push(peer.fd, "x") is PushResult.CLOSED


@pytest.mark.parametrize(
    "topic, code", [("", 107), ("*", 107), ("a\n", 107), ("fd:99", 102), ("fd:x", 102)]
)
async def test_a_broker_publishes_by_the_same_rules_as_all(
    autojump_clock: MockClock, topic: str, code: int
) -> None:
    async with open_test_broker(Broker()) as net:
        with pytest.raises(Refused) as caught:
            net.broker.publish_nowait(topic, 1)
        assert caught.value.code == code


# serving


async def test_a_broker_serves_once_at_a_time(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker()) as net:
        peer = await net.open_plain()
        with pytest.raises(RuntimeError, match="serving already"):
            await net.broker.serve(listeners=[MemoryListener()])
        net.broker.push(peer.fd, "still here")
        assert await peer.receive_text() == "still here"


async def test_two_that_begin_to_serve_at_once_are_one_too_many() -> None:
    broker = Broker(Config(port=0, host="127.0.0.1"))
    with pytest.raises(ExceptionGroup) as caught:  # noqa: PT012
        async with trio.open_nursery() as nursery:
            nursery.start_soon(broker.serve)
            nursery.start_soon(broker.serve)
    assert caught.group_contains(RuntimeError, match="serving already")


async def test_serve_reports_where_it_listens_once_one_can_connect() -> None:
    broker = Broker(Config(port=0, host="127.0.0.1"))
    async with trio.open_nursery() as nursery:
        (address,) = await nursery.start(broker.serve)
        host, _, port = address.removeprefix("ws://").partition(":")
        assert host == "127.0.0.1"
        stream = await trio.open_tcp_stream(host, int(port))
        await stream.aclose()
        broker.stop()


async def test_a_stop_that_comes_while_serve_starts_counts() -> None:
    broker = Broker(Config(port=0, host="127.0.0.1"))
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(broker.serve)
            while not broker._is_taken:  # noqa: ASYNC110 - there is no event for it
                await trio.lowlevel.checkpoint()
            assert broker.push(1, "x") is PushResult.CLOSED  # it does not serve yet
            broker.stop()


async def test_a_method_that_needs_a_serving_broker_says_so() -> None:
    broker = Broker()
    for call in (partial(broker.publish_nowait, "news", 1), broker.stats):
        with pytest.raises(RuntimeError, match=r"broker\.serve"):
            call()
    for wait in (partial(broker.publish, "news", 1), partial(broker.remove_history, "news")):
        with pytest.raises(RuntimeError, match=r"broker\.serve"):
            await wait()
    with pytest.raises(RuntimeError, match=r"broker\.serve"):
        async with broker.subscribe("news"):
            pytest.fail("unreachable")
    assert broker.push(1, "x") is PushResult.CLOSED
    assert not broker.disconnect(1)
    assert not broker.exists(1)
    assert broker.connections() == []
    assert broker.connection_info(1) is None


async def test_a_broker_that_has_stopped_may_serve_again_and_its_fds_go_on(
    autojump_clock: MockClock,
) -> None:
    broker = Broker()
    fds, states = [], []
    for history in (5, 0):
        broker.config = Config(topics=TopicRules(history_size=history))
        async with open_test_broker(broker) as net:
            client = await net.open_client()
            fds.append(client.fd)
            broker.publish_nowait("news", 1)
            assert broker.stats().published == 1
            assert broker.stats().history.publications == min(history, 1)
            states.append(broker.draining)
        states.append(broker.draining)
        assert broker.push(client.fd, 1) is PushResult.CLOSED
        with pytest.raises(RuntimeError):
            broker.stats()
    assert fds == [1, 2]
    assert states == [False, True] * 2


async def test_a_key_that_cannot_be_read_keeps_the_broker_from_starting(tmp_path: Path) -> None:
    rules = TokenRules(public_keys=(str(tmp_path / "none.pem"),))
    with pytest.raises(ConfigError, match=r"none\.pem: No such file"):
        await Broker(Config(port=0, tokens=rules)).serve()


# hooks


async def test_hooks_run_in_order_open_messages_close(autojump_clock: MockClock) -> None:
    broker = Broker()
    seen: list[object] = []

    @broker.on_open
    async def on_open(connection: Connection) -> None:
        seen.append("opening")
        await trio.sleep(0.1)
        seen.append("open")

    @broker.on_message
    async def on_message(connection: Connection, frame: Frame) -> None:
        await trio.sleep(0.1)
        seen.append((frame.data, frame.opcode, frame.fin))

    @broker.on_close
    async def on_close(connection: Connection, close: Close) -> None:
        await trio.sleep(0.1)
        seen.append(close)

    async with open_test_broker(broker) as net:
        peer = await net.open_plain()
        await peer.send_text("first")
        await peer.send(client_frame(frames.BINARY, b"\xff"))
        await peer.send(client_frame(frames.TEXT, b"in ", fin=False))
        await peer.send(client_frame(frames.CONTINUATION, b"pieces"))
        await peer.send_text("last")
        await peer.send_close(1000, "bye")
        await peer.receive_eof()
    assert seen == [
        "opening",
        "open",
        ("first", frames.TEXT, True),
        (b"\xff", frames.BINARY, True),
        ("in pieces", frames.TEXT, True),
        ("last", frames.TEXT, True),
        Close(1000, "bye", Initiator.CLIENT),
    ]


async def test_a_hook_knows_its_connection(autojump_clock: MockClock) -> None:
    broker = Broker()
    seen: list[object] = []

    @broker.on_open
    async def on_open(connection: Connection) -> None:
        connection.data["n"] = 7
        broker.bind(connection.fd, "alice")
        broker.push(connection.fd, f"welcome {connection.headers['x-name']}")

    @broker.on_close
    async def on_close(connection: Connection, close: Close) -> None:
        seen.append((connection.fd, connection.user, connection.data, connection.path))

    async with open_test_broker(broker) as net:
        peer = await net.open_plain(headers={"X-Name": "Alice"})
        assert await peer.receive_text() == "welcome Alice"
    assert seen == [(1, "alice", {"n": 7}, "/")]


async def test_a_handshake_that_fails_opens_and_closes_nothing(autojump_clock: MockClock) -> None:
    broker = Broker()
    seen: list[object] = []

    @broker.on_open
    async def on_open(connection: Connection) -> None:
        seen.append("open")

    @broker.on_close
    async def on_close(connection: Connection, close: Close) -> None:
        seen.append("close")

    async with open_test_broker(broker) as net:
        for request in (b"", b"GET", b"GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\n\r\n"):
            peer = await net.connect()
            if request:
                await peer.send(request)
            await peer.aclose()
        await wait_all_tasks_blocked()
        assert broker.connections() == []
    assert seen == []


async def test_new_objects_are_looked_at_once_a_second(autojump_clock: MockClock) -> None:
    looks: list[float] = []
    broker = Broker()
    broker.collect = lambda: looks.append(trio.current_time())
    async with open_test_broker(broker):
        await trio.sleep(3.5)
    assert len(looks) == 3
