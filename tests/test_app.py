"""What an app may do with a `Broker`, served in memory."""

import time
from functools import partial
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from trio.testing import MockClock, assert_no_checkpoints, wait_all_tasks_blocked

from broker import (
    Broker,
    Close,
    Config,
    Connection,
    Disconnect,
    Frame,
    Initiator,
    PushResult,
    Refused,
    TopicRules,
)
from broker.testing import Closed, MemoryListener, Network, Peer, client_frame, open_test_broker
from broker.transport import frames

LOCKSTEP = trio.testing.lockstep_stream_pair

# sending


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


async def test_what_json_cannot_say_is_not_sent(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker()) as net:
        peer = await net.open_plain()
        with pytest.raises(TypeError):
            net.broker.push(peer.fd, object())
        with pytest.raises(TypeError):
            net.broker.publish("news", {1: object()})
        assert net.broker.stats().published == 0


async def test_a_push_to_nobody_is_closed(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker()) as net:
        peer = await net.open_plain()
        for fd in (0, 99, peer.fd + 1, -1):
            assert net.broker.push(fd, "x") is PushResult.CLOSED
        await peer.aclose()
        await wait_all_tasks_blocked()
        assert net.broker.push(peer.fd, "x") is PushResult.CLOSED


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


@pytest.mark.parametrize(
    "topic, code", [("", 107), ("*", 107), ("a\n", 107), ("fd:99", 102), ("fd:x", 102)]
)
async def test_a_broker_publishes_by_the_same_rules_as_all(
    autojump_clock: MockClock, topic: str, code: int
) -> None:
    async with open_test_broker(Broker()) as net:
        with pytest.raises(Refused) as caught:
            net.broker.publish(topic, 1)
        assert caught.value.code == code


# connections


async def test_connections_are_told_page_by_page(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker()) as net:
        peers = [await net.open_plain() for _ in range(5)]
        await peers[1].aclose()
        await wait_all_tasks_blocked()
        pages = [(0, 2), (3, 2), (5, 2), (0, 100), (0, 0), (4, 1)]
        told = [[info.fd for info in net.broker.connections(*page)] for page in pages]
        assert told == [[1, 3], [4, 5], [], [1, 3, 4, 5], [], [5]]
        assert [info.fd for info in net.broker.connections()] == [1, 3, 4, 5]


async def test_a_connection_is_known_by_its_fd(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker()) as net:
        await net.open_websocket()
        client = await net.open_websocket("/connection/websocket")
        info = net.broker.connection_info(client.fd)
        assert info is not None
        assert (info.fd, info.user, info.address, info.path, info.protocol, info.topics) == (
            *(2, "", "memory", "/connection/websocket", "plain", ()),
        )
        assert abs(info.opened_at - time.time()) < 60
        await client.request(connect={})
        for name in ("news", "a.*"):
            await client.request(subscribe={"channel": name})
        net.broker.bind(client.fd, "alice")
        info = net.broker.connection_info(client.fd)
        assert info is not None
        assert (info.user, info.protocol) == ("alice", "centrifuge-json")
        assert info.topics == ("news", "a.*")
        assert net.broker.connection_info(99) is None


async def test_a_connection_that_is_closing_exists_but_can_be_sent_nothing(
    autojump_clock: MockClock,
) -> None:
    async with open_test_broker(Broker()) as net:
        peer = await net.open_plain()
        fd = peer.fd

        def state() -> tuple[bool, bool]:
            return net.broker.exists(fd), net.broker.is_established(fd)

        assert state() == (True, True)
        assert net.broker.disconnect(fd)
        assert state() == (True, False)
        assert net.broker.push(fd, "x") is PushResult.CLOSED
        assert not net.broker.disconnect(fd)
        assert await peer.receive_close() == (3503, "force disconnect")
        await peer.send_close(3503)
        await wait_all_tasks_blocked()
        assert state() == (False, False)
        assert not net.broker.disconnect(fd)
        assert not net.broker.disconnect(99)


@pytest.mark.parametrize("code", [0, 999, 1004, 1005, 1006, 1015, 2999, 5000, 2**16, -1])
async def test_a_code_that_cannot_be_sent_is_told_and_closes_nobody(
    autojump_clock: MockClock, code: int
) -> None:
    with pytest.raises(ValueError, match=f"close code {code} cannot be sent"):
        Disconnect(code)
    async with open_test_broker(Broker()) as net:
        peer = await net.open_plain()
        with pytest.raises(ValueError, match=f"close code {code} cannot be sent"):
            net.broker.disconnect(peer.fd, code)
        assert net.broker.is_established(peer.fd)


async def test_users_have_fds(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker()) as net:
        one, two, three = [await net.open_plain() for _ in range(3)]
        for peer in (three, one):
            net.broker.bind(peer.fd, "alice")
        assert net.broker.fds_of("alice") == [1, 3]
        await one.aclose()
        await wait_all_tasks_blocked()
        assert net.broker.fds_of("alice") == [3]
        net.broker.bind(three.fd, "")
        assert net.broker.fds_of("alice") == net.broker.fds_of("") == []
        with pytest.raises(KeyError):
            net.broker.bind(one.fd, "alice")
        assert net.broker.fds_of("bob") == []
        assert net.broker.is_established(two.fd)


async def test_statistics_count_what_is_here_and_what_was_done(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker()) as net:
        client = await net.open_client()
        for name in ("news", "a.*"):
            await client.request(subscribe={"channel": name})
        for topic in ("news", "a.b", "nobody"):
            net.broker.publish(topic, 1)
        bare = await net.connect()
        await bare.send(b"rubbish\r\n\r\n")
        await bare.receive_head()
        stats = net.broker.stats()
        assert (stats.connections, stats.published, stats.refused) == (1, 3, 1)
        assert (stats.hub.sessions, stats.hub.topics, stats.hub.patterns) == (1, 1, 1)
        assert stats.hub.subscriptions == 2
        assert stats.history.publications == 3
        assert stats.post.messages_delivered == 2


async def test_nothing_that_an_app_calls_waits(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker()) as net:
        peer = await net.open_plain()
        client = await net.open_client()
        await client.request(subscribe={"channel": "news"})
        with assert_no_checkpoints():
            net.broker.push(peer.fd, "x")
            net.broker.publish("news", 1)
            net.broker.bind(peer.fd, "alice")
            net.broker.connections()
            net.broker.stats()
            net.broker.disconnect(peer.fd)
            net.broker.stop()


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


async def test_what_needs_a_serving_broker_says_so() -> None:
    broker = Broker()
    for call in (partial(broker.publish, "news", 1), broker.stats):
        with pytest.raises(RuntimeError, match=r"broker\.serve"):
            call()
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
            broker.publish("news", 1)
            assert broker.stats().published == 1
            assert broker.stats().history.publications == min(history, 1)
            states.append(broker.draining)
        states.append(broker.draining)
        assert broker.push(client.fd, 1) is PushResult.CLOSED
        with pytest.raises(RuntimeError):
            broker.stats()
    assert fds == [1, 2]
    assert states == [False, True] * 2


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


# the whole truth about the end of a connection


class Ends:
    """A broker that notes how its connections end."""

    def __init__(self, **config: Any) -> None:
        self.broker = Broker(Config(**config))
        self.closes: list[Close] = []

        @self.broker.on_close
        async def on_close(connection: Connection, close: Close) -> None:
            await trio.sleep(0.1)  # it may take its time, also while all is being cancelled
            self.closes.append(close)

        @self.broker.on_message
        async def on_message(connection: Connection, frame: Frame) -> None:
            if frame.data == "raise":
                raise ZeroDivisionError
            if frame.data == "disconnect":
                raise Disconnect(4002, "go")


async def by_close(net: Network, peer: Peer) -> None:
    await peer.send_close(4000, "bye ü")


async def by_empty_close(net: Network, peer: Peer) -> None:
    await peer.send(client_frame(frames.CLOSE))


async def by_leaving(net: Network, peer: Peer) -> None:
    await peer.aclose()


async def by_leaving_in_a_message(net: Network, peer: Peer) -> None:
    await peer.send(client_frame(frames.TEXT, b"hello")[:-1])
    await peer.aclose()


async def by_disconnect(net: Network, peer: Peer) -> None:
    net.broker.disconnect(peer.fd, 4001, "out")


async def by_raising(net: Network, peer: Peer) -> None:
    await peer.send_text("raise")


async def by_order(net: Network, peer: Peer) -> None:
    await peer.send_text("disconnect")


async def by_size(net: Network, peer: Peer) -> None:
    await peer.send(client_frame(frames.TEXT, b"x" * 101)[:20])


async def by_bad_frame(net: Network, peer: Peer) -> None:
    await peer.send(client_frame(0x3, b"x"))


async def by_bad_text(net: Network, peer: Peer) -> None:
    await peer.send(client_frame(frames.TEXT, b"\xff"))


async def by_silence(net: Network, peer: Peer) -> None:
    await trio.sleep(32)


async def by_bad_command(net: Network, peer: Peer) -> None:
    await peer.send_text("rubbish")


async def by_stopping(net: Network, peer: Peer) -> None:
    net.broker.stop()


C, S, H, D, N = (
    *(Initiator.CLIENT, Initiator.SERVER, Initiator.HEARTBEAT),
    *(Initiator.SHUTDOWN, Initiator.NETWORK),
)


@pytest.mark.parametrize(
    "how, speaks, close",
    [
        (by_close, "plain", Close(4000, "bye ü", C)),
        (by_close, "centrifuge", Close(4000, "bye ü", C)),
        (by_empty_close, "plain", Close(1005, "", C)),
        (by_leaving, "plain", Close(1006, "connection lost", N)),
        (by_leaving, "centrifuge", Close(1006, "connection lost", N)),
        (by_leaving_in_a_message, "plain", Close(1006, "connection lost", N)),
        (by_disconnect, "plain", Close(4001, "out", S)),
        (by_disconnect, "centrifuge", Close(4001, "out", S)),
        (by_raising, "plain", Close(1011, "internal error", S)),
        (by_order, "plain", Close(4002, "go", S)),
        (by_size, "plain", Close(1009, "a message of more than 100 bytes", S)),
        (by_bad_frame, "plain", Close(1002, "*", S)),
        (by_bad_text, "plain", Close(1007, "*", S)),
        (by_silence, "plain", Close(1011, "no pong", H)),
        (by_silence, "centrifuge", Close(3012, "no pong", H)),
        (by_bad_command, "centrifuge", Close(3501, "*", S)),
        (by_stopping, "plain", Close(1001, "shutdown", D)),
        (by_stopping, "centrifuge", Close(3001, "shutdown", D)),
    ],
)
@pytest.mark.parametrize("answers", [True, False])
async def test_the_close_hook_is_told_once_who_began_it_and_why(
    autojump_clock: MockClock, how: Any, speaks: str, close: Close, answers: bool
) -> None:
    ends = Ends(max_message_bytes=100)
    async with open_test_broker(ends.broker) as net:
        peer = await (net.open_plain() if speaks == "plain" else net.open_client())
        await how(net, peer)
        if answers and how not in (by_leaving, by_leaving_in_a_message):
            code, _ = await peer.receive_close()
            assert code == (0 if how is by_empty_close else close.code)
            if how not in (by_close, by_empty_close):
                await peer.send_close(close.code)
        await trio.sleep(60)
        assert net.broker.connections() == []
    (told,) = ends.closes
    if close.reason == "*":
        assert told.reason
        close = Close(close.code, told.reason, close.initiator)
    assert told == close


async def test_a_slow_peer_is_told_apart(autojump_clock: MockClock) -> None:
    ends = Ends(outbox_messages=5)
    async with open_test_broker(ends.broker) as net:
        client = await net.open_client(make_pair=LOCKSTEP)
        for number in range(6):
            net.broker.push(client.fd, number)
            await wait_all_tasks_blocked()
    (close,) = ends.closes
    assert (close.code, close.reason, close.initiator) == (3008, "slow", Initiator.SLOW)
    assert close.undelivered == 6


async def test_a_peer_that_takes_nothing_is_slow_even_with_little_to_take(
    autojump_clock: MockClock,
) -> None:
    ends = Ends()
    async with open_test_broker(ends.broker) as net:
        peer = await net.open_plain(make_pair=LOCKSTEP)
        net.broker.push(peer.fd, "x")
        net.broker.push(peer.fd, "y")
        await trio.sleep(11)
    reason = "took nothing for 10 s"
    assert ends.closes == [Close(1006, reason, Initiator.SLOW, undelivered=2)]


async def test_what_was_queued_when_a_peer_left_is_undelivered(autojump_clock: MockClock) -> None:
    ends = Ends()
    async with open_test_broker(ends.broker) as net:
        peer = await net.open_plain(make_pair=LOCKSTEP)
        for number in range(3):
            net.broker.push(peer.fd, number)
        await wait_all_tasks_blocked()
        await peer.aclose()
        await wait_all_tasks_blocked()
    assert ends.closes == [Close(1006, "connection lost", Initiator.NETWORK, undelivered=3)]


async def test_who_is_cut_with_the_whole_broker_is_told_too(autojump_clock: MockClock) -> None:
    ends = Ends()
    with trio.CancelScope() as scope:
        async with open_test_broker(ends.broker) as net:
            peer = await net.open_plain()
            scope.cancel()
            await trio.sleep_forever()
    assert ends.closes == [Close(1006, "cut", Initiator.SHUTDOWN)]
    with pytest.raises(Closed, match="None"):
        await peer.receive_text()
