"""`broker.session.flow`: what the app may say about what comes from one connection and goes to it."""

from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing
from structlog.testing import capture_logs
from trio.testing import MockClock, wait_all_tasks_blocked

from broker import Broker, Config, Connection, Disconnect, Frame, Opcode, PushResult
from broker.testing import Closed, Network, Peer, client_frame, handshake, open_test_broker
from broker.transport import frames

KIB = 2**10
LOCKSTEP = trio.testing.lockstep_stream_pair
SMALL: dict[str, Any] = {"outbox_bytes": 64 * KIB, "max_message_bytes": 64 * KIB}
CONNECT = b'{"id":1,"connect":{}}'


async def plain(net: Network) -> Peer:
    """A plain peer that takes nothing until it reads."""
    peer = await net.open_plain(make_pair=LOCKSTEP)
    await wait_all_tasks_blocked()
    return peer


async def fill(net: Network, peer: Peer, size: int = 40 * KIB) -> None:
    """Push so much that a send has to wait."""
    assert net.broker.push(peer.fd, "x" * size) is PushResult.QUEUED
    await wait_all_tasks_blocked()


class Sender:
    """A send in a task of its own."""

    def __init__(self, net: Network, nursery: trio.Nursery, fd: int, data: object) -> None:
        self.result: PushResult | None = None
        self.scope = trio.CancelScope()
        nursery.start_soon(self._send, net.broker, fd, data)

    async def _send(self, broker: Broker, fd: int, data: object) -> None:
        with self.scope:
            self.result = await broker.send(fd, data)


# shapes of messages


@pytest.mark.parametrize(
    ("data", "options", "expected"),
    [
        ("text", {"opcode": Opcode.BINARY}, [(2, b"text")]),
        (b"text", {"opcode": Opcode.TEXT}, [(1, b"text")]),
        (b"text", {"opcode": 1}, [(1, b"text")]),
        (b"\xff", {"opcode": 2}, [(2, b"\xff")]),
        ({"a": 1}, {"opcode": Opcode.BINARY}, [(2, b'{"a":1}')]),
        ("a" * 250, {"fragment_bytes": 125}, [(1, b"a" * 125), (0, b"a" * 125)]),
        (
            b"b" * 300,
            {"fragment_bytes": 125},
            [(2, b"b" * 125), (0, b"b" * 125), (0, b"b" * 50)],
        ),
        ("short", {"fragment_bytes": 125}, [(1, b"short")]),
        ("", {"fragment_bytes": 125}, [(1, b"")]),
    ],
)
async def test_a_plain_peer_gets_a_message_in_the_frames_that_were_asked_for(
    autojump_clock: MockClock, data: object, options: dict[str, int], expected: list[object]
) -> None:
    async with open_test_broker(Broker()) as net, await net.open_plain() as peer:
        assert net.broker.push(peer.fd, data, **options) is PushResult.QUEUED
        assert await net.broker.send(peer.fd, data, **options) is PushResult.QUEUED
        net.broker.push(peer.fd, "end")
        got = []
        while (frame := await peer.receive_frame()) != (1, b"end"):
            got.append(frame)
    assert got == expected * 2


async def test_fragments_are_one_message_to_a_client_that_we_did_not_write(
    autojump_clock: MockClock,
) -> None:
    from wsproto.connection import Connection as WsConnection
    from wsproto.connection import ConnectionType

    client = WsConnection(ConnectionType.CLIENT)
    sent = bytes(range(256)) * 700
    client.receive_data(frames.fragments(frames.BINARY, sent, 65_536 + 1))
    events: list[Any] = list(client.events())
    assert b"".join(event.data for event in events) == sent
    assert [event.message_finished for event in events][-1] is True
    client.receive_data(frames.text_frame(b"next"))
    after: list[Any] = list(client.events())
    assert [event.data for event in after] == ["next"]


async def test_a_centrifuge_client_gets_a_push_whatever_was_asked_for(
    autojump_clock: MockClock,
) -> None:
    async with open_test_broker(Broker()) as net, await net.open_client() as client:
        net.broker.push(client.fd, "a" * 300, opcode=2, fragment_bytes=125)
        assert await client.receive_json() == {"push": {"message": {"data": "a" * 300}}}


async def test_a_peer_that_is_not_known_gets_the_shape_once_it_is(
    autojump_clock: MockClock,
) -> None:
    async with open_test_broker(Broker()) as net, await net.open_websocket() as peer:
        net.broker.push(peer.fd, "text", opcode=Opcode.BINARY)
        net.broker.declare_plain(peer.fd)
        assert await peer.receive_frame() == (2, b"text")


@pytest.mark.parametrize(
    ("data", "options"),
    [
        ("x", {"opcode": 0}),
        ("x", {"opcode": 8}),
        ("x", {"opcode": 9}),
        ("x", {"opcode": 3}),
        (b"\xff", {"opcode": 1}),
        ("\ud83d", {"opcode": 2}),
        ("x", {"fragment_bytes": 124}),
        ("x", {"fragment_bytes": 0}),
        ("x", {"fragment_bytes": -1}),
    ],
)
async def test_a_shape_that_no_message_has_raises_and_sends_nothing(
    autojump_clock: MockClock, data: object, options: dict[str, int]
) -> None:
    async with open_test_broker(Broker()) as net, await net.open_plain() as peer:
        with pytest.raises(ValueError):
            net.broker.push(peer.fd, data, **options)
        with pytest.raises(ValueError):
            await net.broker.send(peer.fd, data, **options)
        net.broker.push(peer.fd, "end")
        assert await peer.receive_text() == "end"


# what a push says


@pytest.mark.parametrize("size", [10, 1000, 10_000, 60_000, 200_000])
@pytest.mark.parametrize("make_pair", [LOCKSTEP, trio.testing.memory_stream_pair])
@pytest.mark.parametrize("known", [True, False])
async def test_what_is_queued_is_delivered_and_nothing_else_is(
    autojump_clock: MockClock, size: int, make_pair: Any, known: bool
) -> None:
    """To a peer that reads nothing while it is pushed to, and everything afterwards."""
    async with open_test_broker(Broker(Config(**SMALL))) as net:
        peer = await net.open_websocket(make_pair=make_pair)
        if known:
            net.broker.declare_plain(peer.fd)
        results = []
        for number in range(30):
            results.append(net.broker.push(peer.fd, f"{number:04}".ljust(size)))
            if number % 7 == 0:
                await wait_all_tasks_blocked()
        net.broker.declare_plain(peer.fd)
        got, code = [], None
        try:
            while True:
                with trio.move_on_after(1) as silence:
                    got.append(int(await peer.receive_text()))
                if silence.cancelled_caught:
                    break
        except Closed as closed:
            code = closed.code
        queued = [n for n, result in enumerate(results) if result is PushResult.QUEUED]
        if code is None:
            assert got == queued
        else:
            # It was cut as too slow: some that were queued are lost, as `Close.undelivered` tells.
            assert code == 3008
            assert got == queued[: len(got)]
        await peer.aclose()


# ping


async def test_a_ping_carries_data_and_its_answer_is_the_last_that_was_heard(
    autojump_clock: MockClock,
) -> None:
    async with open_test_broker(Broker()) as net, await net.open_websocket() as peer:
        await trio.sleep(3)
        assert net.broker.ping(peer.fd, b"here?")
        assert await peer.receive_frame() == (frames.PING, b"here?")
        await peer.send(client_frame(frames.PONG, b"here?"))
        await wait_all_tasks_blocked()
        info = net.broker.connection_info(peer.fd)
        assert info is not None
        assert info.last_received_at == pytest.approx(info.opened_at + 3)
        # It is no word of a plain peer: which protocol this one speaks is not known yet.
        assert (await peer.request(connect={}))["connect"]["client"] == str(peer.fd)


async def test_a_ping_has_its_bounds_and_goes_to_websockets_alone(
    autojump_clock: MockClock,
) -> None:
    async with open_test_broker(Broker()) as net, await net.open_plain() as peer:
        assert net.broker.ping(peer.fd, bytes(125))
        with pytest.raises(ValueError, match="125"):
            net.broker.ping(peer.fd, bytes(126))
        async with await net.connect() as sse:
            await sse.send(b"GET /connection/uni_sse?topic=a HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await sse.receive_head()
            assert not net.broker.ping(peer.fd + 1)
        assert not net.broker.ping(99)
    assert not net.broker.ping(peer.fd)


# pause and resume


async def test_a_paused_connection_is_not_read_and_loses_nothing(
    autojump_clock: MockClock,
) -> None:
    heard: list[object] = []
    broker = Broker()

    @broker.on_message
    async def hear(connection: Connection, frame: Frame) -> None:
        heard.append(frame.data)

    async with open_test_broker(broker) as net, await net.open_plain() as peer:
        await peer.send_text("before")
        await wait_all_tasks_blocked()
        assert broker.pause(peer.fd)
        for number in range(5):
            await peer.send_text(f"{number}")
            await wait_all_tasks_blocked()
        assert heard == ["before"]
        held = broker.stats().memory.parts["incoming"]
        assert held > 0
        # Its silence is our doing.
        await trio.sleep(120)
        assert broker.is_established(peer.fd)
        assert broker.resume(peer.fd)
        await wait_all_tasks_blocked()
        assert heard == ["before", "0", "1", "2", "3", "4"]
        assert broker.stats().memory.parts["incoming"] == 0
        # Both may be said twice, and in vain.
        assert broker.resume(peer.fd)
        assert not broker.pause(99)
        assert not broker.resume(99)


@pytest.mark.parametrize("end", ["disconnect", "stop", "cut"])
async def test_a_paused_connection_ends_like_any_other(autojump_clock: MockClock, end: str) -> None:
    heard: list[object] = []
    broker = Broker(Config(drain_seconds=1))

    @broker.on_message
    async def hear(connection: Connection, frame: Frame) -> None:
        heard.append(frame.data)

    async with open_test_broker(broker) as net:
        peer = await net.open_plain()
        broker.pause(peer.fd)
        await peer.send_text("held")
        await wait_all_tasks_blocked()
        if end == "disconnect":
            broker.disconnect(peer.fd, 4000, "bye")
            assert await peer.receive_close() == (4000, "bye")
        elif end == "stop":
            broker.stop()
            assert (await peer.receive_close())[0] == 1001
        await peer.aclose()
        await trio.sleep(20)
    assert heard == []
    assert broker.connections() == []


async def test_a_peer_that_leaves_while_nothing_of_it_waits_is_noticed(
    autojump_clock: MockClock,
) -> None:
    async with open_test_broker(Broker()) as net:
        peer = await net.open_plain()
        net.broker.pause(peer.fd)
        await peer.aclose()
        await trio.sleep(1)
        assert not net.broker.exists(peer.fd)


# send


async def test_a_send_waits_for_room_and_cuts_nobody(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker(Config(**SMALL))) as net:
        peer = await plain(net)
        results = []

        async def send_all() -> None:
            for number in range(50):
                result = await net.broker.send(peer.fd, f"{number:04}".ljust(10_000))
                results.append(result)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_all)
            await wait_all_tasks_blocked()
            assert 0 < len(results) < 10  # the rest waits
            assert net.outbox(peer.fd).bytes <= 32 * KIB + 10_100
            got = [int(await peer.receive_text()) for _ in range(50)]
        assert got == list(range(50))
        assert results == [PushResult.QUEUED] * 50
        await peer.aclose()


async def test_sends_of_many_tiny_messages_wait_too(autojump_clock: MockClock) -> None:
    config = Config(outbox_messages=20)
    async with open_test_broker(Broker(config)) as net:
        peer = await plain(net)

        async def send_all() -> None:
            for number in range(200):
                assert await net.broker.send(peer.fd, f"{number}") is PushResult.QUEUED

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_all)
            await wait_all_tasks_blocked()
            assert net.outbox(peer.fd).messages <= 10
            assert [int(await peer.receive_text()) for _ in range(200)] == list(range(200))
        await peer.aclose()


@pytest.mark.parametrize("size", [10_000, 60_000, 300_000])
async def test_sends_from_many_tasks_go_out_in_the_order_in_which_they_began(
    autojump_clock: MockClock, size: int
) -> None:
    async with open_test_broker(Broker(Config(**SMALL))) as net:
        peer = await plain(net)
        async with trio.open_nursery() as nursery:
            senders = []
            for number in range(8):
                senders.append(Sender(net, nursery, peer.fd, f"{number}".ljust(size)))
                await wait_all_tasks_blocked()
            assert [int(await peer.receive_text()) for _ in range(8)] == list(range(8))
        assert {each.result for each in senders} == {PushResult.QUEUED}
        assert net.broker.is_established(peer.fd)
        await peer.aclose()


async def test_a_send_has_the_deadline_of_its_caller_and_is_not_sent_then(
    autojump_clock: MockClock,
) -> None:
    async with open_test_broker(Broker(Config(**SMALL))) as net:
        peer = await plain(net)
        await fill(net, peer)
        with trio.move_on_after(3) as deadline:
            await net.broker.send(peer.fd, "too late")
        assert deadline.cancelled_caught
        with trio.CancelScope() as scope:
            scope.cancel()
            await net.broker.send(peer.fd, "cancelled before it began")
        assert net.broker.stats().memory.parts["outboxes"] < 41 * KIB + 70 * KIB * 2
        assert (await peer.receive_text()).strip("x") == ""
        assert await net.broker.send(peer.fd, "next") is PushResult.QUEUED
        assert await peer.receive_text() == "next"
        await peer.aclose()


async def test_the_one_that_is_cancelled_leaves_its_turn_to_the_next(
    autojump_clock: MockClock,
) -> None:
    async with open_test_broker(Broker(Config(**SMALL))) as net:
        peer = await plain(net)
        await fill(net, peer)
        async with trio.open_nursery() as nursery:
            senders = []
            for number in range(4):
                senders.append(Sender(net, nursery, peer.fd, f"{number}"))
                await wait_all_tasks_blocked()
            senders[0].scope.cancel()  # has its turn
            senders[2].scope.cancel()  # waits for it
            await wait_all_tasks_blocked()
            await peer.receive_text()
            assert [await peer.receive_text() for _ in range(2)] == ["1", "3"]
        assert [each.result for each in senders[::2]] == [None, None]
        await peer.aclose()


def _disconnect(net: Network, peer: Peer) -> None:
    net.broker.disconnect(peer.fd)


def _stop(net: Network, peer: Peer) -> None:
    net.broker.stop()


def _bind(net: Network, peer: Peer) -> None:
    net.broker.bind(peer.fd, "ben")


def _overflow(net: Network, peer: Peer) -> None:
    for _ in range(20):
        net.broker.push(peer.fd, "y" * 30_000)


@pytest.mark.parametrize(
    ("change", "result"),
    [
        (_disconnect, PushResult.CLOSED),
        (_stop, PushResult.CLOSED),
        (_overflow, PushResult.CLOSED),
        (_bind, PushResult.REBOUND),
    ],
)
async def test_sends_that_wait_notice_at_once_that_the_peer_is_not_what_it_was(
    autojump_clock: MockClock, change: Callable[[Network, Peer], None], result: PushResult
) -> None:
    async with open_test_broker(Broker(Config(**SMALL))) as net:
        peer = await plain(net)
        net.broker.bind(peer.fd, "ann")
        await fill(net, peer)
        async with trio.open_nursery() as nursery:
            senders = [Sender(net, nursery, peer.fd, f"for ann {n}") for n in range(3)]
            await wait_all_tasks_blocked()
            assert [each.result for each in senders] == [None] * 3
            began = trio.current_time()
            change(net, peer)
            await wait_all_tasks_blocked()
            assert [each.result for each in senders] == [result] * 3
            assert trio.current_time() == began
        assert not [line for line in await peer.receive_all() if "for ann" in str(line)]
        await peer.aclose()


async def test_a_peer_that_goes_away_ends_the_sends_that_wait_for_it(
    autojump_clock: MockClock,
) -> None:
    async with open_test_broker(Broker(Config(**SMALL))) as net:
        peer = await plain(net)
        await fill(net, peer)
        async with trio.open_nursery() as nursery:
            sender = Sender(net, nursery, peer.fd, "x")
            await wait_all_tasks_blocked()
            await peer.aclose()
        assert sender.result is PushResult.CLOSED
        assert net.broker.stats().memory.parts["outboxes"] == 0


async def test_a_send_to_nobody_is_closed(autojump_clock: MockClock) -> None:
    broker = Broker()
    assert await broker.send(1, "x") is PushResult.CLOSED
    async with open_test_broker(broker):
        assert await broker.send(1, "x") is PushResult.CLOSED
        with pytest.raises(TypeError):
            await broker.send(1, object())


async def test_a_peer_that_has_not_spoken_is_waited_for_and_written_to_as_what_it_is(
    autojump_clock: MockClock,
) -> None:
    config = Config(outbox_bytes=1000, max_message_bytes=1000)
    for protocol in ("plain", "centrifuge"):
        async with open_test_broker(Broker(config)) as net:
            peer = await net.open_websocket()
            async with trio.open_nursery() as nursery:
                senders = [Sender(net, nursery, peer.fd, f"{n}".ljust(500)) for n in range(3)]
                await wait_all_tasks_blocked()
                assert [each.result for each in senders].count(PushResult.QUEUED) == 1
                await peer.send(client_frame(1, CONNECT if protocol == "centrifuge" else b"hi"))
                texts = [await peer.receive_text() for _ in range(3 + (protocol != "plain"))]
            assert {each.result for each in senders} == {PushResult.QUEUED}
            if protocol == "plain":
                assert sorted(int(text) for text in texts) == [0, 1, 2]
            else:
                assert all(text.startswith("{") for text in texts)
                assert '"connect"' in texts[0]
            await peer.aclose()


async def test_who_connects_as_somebody_does_not_get_what_waited_for_nobody(
    autojump_clock: MockClock,
) -> None:
    from broker.testing import name_users_by_token

    config = Config(outbox_bytes=1000, max_message_bytes=1000)
    async with open_test_broker(name_users_by_token(Broker(config))) as net:
        peer = await net.open_websocket()
        async with trio.open_nursery() as nursery:
            senders = [Sender(net, nursery, peer.fd, f"{n}".ljust(500)) for n in range(2)]
            await wait_all_tasks_blocked()
            await peer.request(connect={"token": "ann"})
        results = sorted(str(each.result) for each in senders)
        assert results == ["queued", "rebound"]
        await peer.aclose()


async def test_sends_that_wait_are_charged_and_bounded(autojump_clock: MockClock) -> None:
    config = Config(**SMALL, connection_bytes=280_000)
    async with open_test_broker(Broker(config)) as net:
        peer = await plain(net)
        await fill(net, peer)
        before = net.broker.stats().memory.parts["outboxes"]
        async with trio.open_nursery() as nursery:
            senders = [Sender(net, nursery, peer.fd, "z" * 1000) for _ in range(60)]
            await wait_all_tasks_blocked()
            waiting = [each for each in senders if each.result is None]
            full = [each for each in senders if each.result is PushResult.FULL]
            assert 5 < len(waiting) < 40
            assert len(waiting) + len(full) == 60
            assert net.broker.stats().memory.parts["outboxes"] > before + len(waiting) * 5000
            bystander = await net.open_plain()
            assert await net.broker.send(bystander.fd, "hello") is PushResult.QUEUED
            nursery.cancel_scope.cancel()
        assert net.broker.stats().memory.parts["outboxes"] <= before + 500
        assert net.broker.is_established(peer.fd)
        await peer.aclose()
        await bystander.aclose()


async def test_a_hook_that_waits_for_its_own_peer_ends_with_it(autojump_clock: MockClock) -> None:
    results: list[PushResult] = []
    broker = Broker(Config(**SMALL))

    @broker.on_message
    async def echo(connection: Connection, frame: Frame) -> None:
        for _ in range(20):
            result = await broker.send(connection.fd, "e" * 10_000)
            results.append(result)

    async with open_test_broker(broker) as net:
        peer = await plain(net)
        await peer.send_text("go")
        await wait_all_tasks_blocked()
        assert PushResult.CLOSED not in results
        broker.disconnect(peer.fd)
        await wait_all_tasks_blocked()
        assert results[-1] is PushResult.CLOSED
        assert len(results) == 20
        await peer.aclose()


# watermarks


class Marks:
    """A broker that notes its watermark hooks."""

    def __init__(self, **config: Any) -> None:
        self.told: list[str] = []
        self.broker = Broker(Config(**(SMALL | config)))

        @self.broker.on_buffer_full
        async def full(connection: Connection) -> None:
            self.told.append(f"full {connection.fd}")

        @self.broker.on_buffer_empty
        async def empty(connection: Connection) -> None:
            self.told.append(f"empty {connection.fd}")


async def read_until(peer: Peer, text: str) -> None:
    while await peer.receive_text() != text:
        pass


@pytest.mark.parametrize("how", ["one large", "many small", "published"])
async def test_hooks_tell_when_much_waits_and_when_it_is_gone(
    autojump_clock: MockClock, how: str
) -> None:
    marks = Marks()
    async with open_test_broker(marks.broker) as net:
        peer = await plain(net)
        if how == "one large":
            net.broker.push(peer.fd, "x" * 40 * KIB)
        elif how == "many small":
            for _ in range(400):
                net.broker.push(peer.fd, "x" * 100)
                await trio.lowlevel.checkpoint()
        else:
            net.broker.add_subscription(peer.fd, "news")
            for _ in range(400):
                net.broker.publish_nowait("news", "x" * 100)
        await wait_all_tasks_blocked()
        assert marks.told == [f"full {peer.fd}"]
        net.broker.push(peer.fd, "more")  # it is told once
        await read_until(peer, "more")
        await wait_all_tasks_blocked()
        assert marks.told == [f"full {peer.fd}", f"empty {peer.fd}"]
        net.broker.push(peer.fd, "x" * 40 * KIB)
        await wait_all_tasks_blocked()
        assert len(marks.told) == 3
        await peer.aclose()


async def test_sockets_have_watermarks_too() -> None:
    marks = Marks(outbox_bytes=8 * KIB * KIB, port=0, host="127.0.0.1")
    full = trio.Event()

    async def notice() -> None:
        while not marks.told:  # noqa: ASYNC110 - a socket has no virtual time
            await trio.sleep(0.01)
        full.set()

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            (url,) = await nursery.start(marks.broker.serve)
            stream = await trio.open_tcp_stream("127.0.0.1", int(url.rpartition(":")[2]))
            async with Peer(stream) as peer:
                await peer.send(handshake())
                await peer.receive_head()
                marks.broker.declare_plain(1)
                nursery.start_soon(notice)
                # One burst, and nothing behind it.
                for _ in range(110):
                    marks.broker.push(1, "x" * 64 * KIB)
                await full.wait()
                assert marks.told == ["full 1"]
                marks.broker.push(1, "end")
                await read_until(peer, "end")
                while len(marks.told) < 2:  # noqa: ASYNC110
                    await trio.sleep(0.01)
                assert marks.told == ["full 1", "empty 1"]
            marks.broker.stop()


async def test_little_and_what_goes_at_once_is_not_told(autojump_clock: MockClock) -> None:
    marks = Marks()
    async with open_test_broker(marks.broker) as net:
        slow, fast = await plain(net), await net.open_plain()
        net.broker.push(slow.fd, "x" * 31 * KIB)
        for _ in range(20):
            net.broker.push(fast.fd, "x" * 20 * KIB)
            await wait_all_tasks_blocked()
        assert marks.told == []
        await slow.aclose()
        await fast.aclose()


async def test_marks_are_settings_that_a_reload_changes(autojump_clock: MockClock) -> None:
    marks = Marks(high_watermark_bytes=60 * KIB, low_watermark_bytes=0)
    async with open_test_broker(marks.broker) as net:
        peer = await plain(net)
        net.broker.push(peer.fd, "x" * 50 * KIB)
        await wait_all_tasks_blocked()
        assert marks.told == []
        net.broker.reload(Config(**SMALL, high_watermark_bytes=10 * KIB))
        net.broker.push(peer.fd, "x")
        await wait_all_tasks_blocked()
        assert marks.told == [f"full {peer.fd}"]
        await peer.aclose()


@pytest.mark.parametrize(
    ("high", "low"), [(1000, 1000), (10, 20), (65 * KIB, 0), (-1, 0), (None, 33 * KIB)]
)
def test_marks_lie_one_above_the_other_within_the_outbox(high: int | None, low: int) -> None:
    with pytest.raises(ValueError, match="watermark_bytes"):
        Config(**SMALL, high_watermark_bytes=high, low_watermark_bytes=low)


async def test_a_hook_of_a_mark_waits_for_no_other_and_hears_the_last(
    autojump_clock: MockClock,
) -> None:
    """A message hook sends more than there is room for; one of a mark is slow."""
    told: list[str] = []
    broker = Broker(Config(**SMALL))

    @broker.on_buffer_full
    async def full(connection: Connection) -> None:
        told.append("full")
        await trio.sleep(5)

    @broker.on_buffer_empty
    async def empty(connection: Connection) -> None:
        told.append("empty")

    @broker.on_message
    async def echo(connection: Connection, frame: Frame) -> None:
        for _ in range(20):
            await broker.send(connection.fd, "e" * 20_000)
        broker.push(connection.fd, "end")

    async with open_test_broker(broker) as net:
        peer = await plain(net)
        await peer.send_text("go")
        await wait_all_tasks_blocked()
        net.broker.push(peer.fd, "x" * 20_000)
        await wait_all_tasks_blocked()
        assert told == ["full"]
        await read_until(peer, "end")
        await trio.sleep(6)
        assert told == ["full", "empty"]
        await peer.aclose()


@pytest.mark.parametrize(
    ("error", "code"), [(ZeroDivisionError(), 1011), (Disconnect(4001, "too slow"), 4001)]
)
async def test_a_hook_of_a_mark_that_raises_ends_its_connection(
    autojump_clock: MockClock, error: Exception, code: int
) -> None:
    broker = Broker(Config(**SMALL))

    @broker.on_buffer_full
    async def full(connection: Connection) -> None:
        raise error

    with capture_logs() as lines:
        async with open_test_broker(broker) as net:
            peer = await plain(net)
            net.broker.push(peer.fd, "x" * 40 * KIB)
            await wait_all_tasks_blocked()
            assert (await peer.receive_close())[0] == code
    failed = [line["hook"] for line in lines if line["event"] == "hook_failed"]
    assert failed == (["buffer_full"] if code == 1011 else [])


async def test_no_hook_of_a_mark_is_called_behind_the_end(autojump_clock: MockClock) -> None:
    marks = Marks()
    async with open_test_broker(marks.broker) as net:
        peer = await plain(net)
        net.broker.push(peer.fd, "x" * 40 * KIB)
        await wait_all_tasks_blocked()
        await peer.aclose()
        await trio.sleep(10)
        assert marks.told == [f"full {peer.fd}"]


# what is known


async def test_a_connection_tells_what_came_went_and_waits(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker(Config(ping_seconds=10**6))) as net:
        peer = await plain(net)
        await trio.sleep(10)
        await peer.send_text("hello")
        await trio.sleep(20)
        with trio.move_on_after(0):
            await peer.receive_frame()
        net.broker.push(peer.fd, "x" * 1000)
        await wait_all_tasks_blocked()
        info = net.broker.connection_info(peer.fd)
        assert info is not None
        assert info.last_received_at == pytest.approx(info.opened_at + 10)
        assert (info.messages_received, info.messages_queued) == (1, 1)
        assert info.bytes_received == len(client_frame(1, b"hello"))
        assert info.bytes_queued == 1004
        await peer.receive_text()
        await trio.sleep(1.5)
        info = net.broker.connection_info(peer.fd)
        assert info is not None
        assert info.bytes_queued == 0
        assert 30 <= info.last_sent_at - info.opened_at <= 32
        await trio.sleep(60)
        later = net.broker.connection_info(peer.fd)
        assert later is not None
        assert later.last_sent_at == info.last_sent_at
        await peer.aclose()


async def test_statistics_tell_how_long_how_many_and_how_much(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker()) as net:
        gone, here = await net.open_plain(), await net.open_plain()
        for peer in (gone, here):
            await peer.send_text("x" * 1000)
        await wait_all_tasks_blocked()
        await gone.aclose()
        await trio.sleep(10)
        stats = net.broker.stats()
        assert stats.uptime_seconds == pytest.approx(10)
        assert (stats.accepted, stats.closed, stats.connections) == (2, 1, 1)
        assert stats.bytes_received == 2 * len(client_frame(1, b"x" * 1000))
        before = stats.bytes_queued
        net.broker.push(here.fd, "y" * 1000)
        assert net.broker.stats().bytes_queued - before == 1004
        await here.aclose()


async def test_in_a_close_hook_the_connection_is_gone_for_all_who_ask(
    autojump_clock: MockClock,
) -> None:
    seen: list[object] = []
    broker = Broker()

    @broker.on_close
    async def closed(connection: Connection, _: object) -> None:
        fd = connection.fd
        seen.extend((broker.exists(fd), broker.connection_info(fd), connection.info().fd))

    async with open_test_broker(broker) as net:
        await (await net.open_plain()).aclose()
        await trio.sleep(1)
    assert seen == [False, None, 1]
