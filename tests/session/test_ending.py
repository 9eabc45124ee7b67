"""The whole truth about the end of a connection: who began it, why, and what was left."""

from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock, wait_all_tasks_blocked

from broker import (
    Broker,
    Close,
    Config,
    Connection,
    Disconnect,
    Frame,
    Initiator,
)
from broker.testing import Closed, Network, Peer, client_frame, open_test_broker
from broker.transport import frames

LOCKSTEP = trio.testing.lockstep_stream_pair


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


async def test_messages_queued_when_a_peer_left_are_undelivered(autojump_clock: MockClock) -> None:
    ends = Ends()
    async with open_test_broker(ends.broker) as net:
        peer = await net.open_plain(make_pair=LOCKSTEP)
        for number in range(3):
            net.broker.push(peer.fd, number)
        await wait_all_tasks_blocked()
        await peer.aclose()
        await wait_all_tasks_blocked()
    assert ends.closes == [Close(1006, "connection lost", Initiator.NETWORK, undelivered=3)]


async def test_the_close_hook_runs_also_where_the_whole_broker_is_cut(
    autojump_clock: MockClock,
) -> None:
    ends = Ends()
    with trio.CancelScope() as scope:
        async with open_test_broker(ends.broker) as net:
            peer = await net.open_plain()
            scope.cancel()
            await trio.sleep_forever()
    assert ends.closes == [Close(1006, "cut", Initiator.SHUTDOWN)]
    with pytest.raises(Closed, match="None"):
        await peer.receive_text()


async def test_a_goodbye_that_nobody_takes_is_over_close_seconds_later(
    autojump_clock: MockClock,
) -> None:
    """What is queued has `close_seconds` to go out, however patient the outbox is."""
    ends = Ends(stall_seconds=1000, ping_seconds=1000, close_seconds=3)
    async with open_test_broker(ends.broker) as net:
        peer = await net.open_plain(make_pair=LOCKSTEP)
        ends.broker.push(peer.fd, "nobody reads this")
        await wait_all_tasks_blocked()
        assert ends.broker.disconnect(peer.fd, 4000)
        await trio.sleep(2.9)
        assert not ends.closes
        await trio.sleep(0.3)
        assert [close.code for close in ends.closes] == [4000]
        assert not net.streams


async def test_a_close_stands_behind_what_was_published_in_the_same_step() -> None:
    broker = Broker()
    async with open_test_broker(broker) as net:
        plain, client = await net.open_plain(), await net.open_client()
        for peer in (plain, client):
            assert broker.add_subscription(peer.fd, "news")
        await client.receive_text()  # the push that tells so
        net.node.router.publish_all("news", [b"1"])  # a run that is open still
        for peer in (plain, client):
            broker.disconnect(peer.fd, 4000, "done")
        assert await plain.receive_text() == "1"
        assert (await client.receive_json())["push"]["pub"]["data"] == 1
        for peer in (plain, client):
            assert await peer.receive_close() == (4000, "done")
