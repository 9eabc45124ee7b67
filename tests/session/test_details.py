"""What is known of one connection: while it is here, and once it has ended."""

import pytest
import trio
from trio.testing import MockClock, lockstep_stream_pair, wait_all_tasks_blocked

from broker import Broker, Close, CloseCode, Config, Connection, Initiator, TopicRules
from broker.core.messages import ConnectionDetails
from broker.testing import Network, Peer, client_frame, name_users_by_token, open_test_broker
from broker.transport.frames import PING, PONG


def details(net: Network, peer: Peer) -> ConnectionDetails:
    found = net.node.connection_details(peer.fd)
    assert found is not None
    return found


async def test_messages_and_bytes_are_counted_both_ways(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker()) as net:
        peer = await net.open_plain()
        before = details(net, peer)
        await peer.send_text("hello")
        await peer.send(client_frame(PING, b"?"))
        net.broker.push(peer.fd, "abc")
        net.broker.push(peer.fd, "defg")
        await trio.sleep(1)
        after = details(net, peer)
        assert after.messages_received - before.messages_received == 1
        assert after.bytes_received - before.bytes_received == 6 + 5 + 6 + 1
        assert after.messages_sent - before.messages_sent == 2, "control frames are no messages"
        assert after.bytes_sent - before.bytes_sent == 2 + 3 + 2 + 4 + 2 + 1


@pytest.mark.parametrize("size", [10, 20_000])
async def test_what_a_socket_takes_is_counted_in_one_write_or_in_many(
    net: Network, size: int
) -> None:
    ours, theirs = trio.socket.socketpair()
    peer = await net.open_plain(
        make_pair=lambda: (trio.SocketStream(ours), trio.SocketStream(theirs))
    )
    before = details(net, peer)
    for _ in range(30):
        net.broker.push(peer.fd, "x" * size)
    for _ in range(30):
        await peer.receive_text()
    after = details(net, peer)
    assert after.messages_sent - before.messages_sent == 30
    header = 2 if size < 126 else 4
    assert after.bytes_sent - before.bytes_sent == 30 * (size + header)
    assert (after.messages_queued, after.bytes_queued) == (0, 0)
    await peer.aclose()


async def test_what_waits_and_what_was_dropped_is_shown(autojump_clock: MockClock) -> None:
    config = Config(outbox_messages=4, topics=TopicRules(slow_consumer="drop_oldest"))
    async with open_test_broker(Broker(config)) as net:
        peer = await net.open_client(lockstep_stream_pair)
        await peer.request(subscribe={"channel": "t"})
        for number in range(10):
            net.broker.publish_nowait("t", number)
            await wait_all_tasks_blocked()
        shown = details(net, peer)
        assert shown.blocked
        assert shown.messages_queued == 4
        assert shown.bytes_queued > 0
        assert shown.messages_dropped == 6
        limits = shown.limits
        assert (limits.messages_queued, limits.topics) == (4, config.max_topics)
        assert limits.bytes_queued == config.outbox_bytes
        assert (limits.message_rate, limits.byte_rate) == (None, None)


async def test_a_round_trip_is_that_of_the_last_ping_that_was_answered(
    autojump_clock: MockClock,
) -> None:
    async with open_test_broker(Broker(Config(ping_seconds=10, pong_seconds=9))) as net:
        client = await net.open_client()
        plain = await net.open_plain()
        assert details(net, client).rtt_seconds is None
        assert await client.receive_json() == {}
        assert (await plain.receive_frame())[0] == PING
        await trio.sleep(0.25)
        await client.send_json({})
        await trio.sleep(0.25)
        await plain.send(client_frame(PONG))
        await trio.sleep(0.1)
        assert details(net, client).rtt_seconds == pytest.approx(0.25)
        assert details(net, plain).rtt_seconds == pytest.approx(0.5)
        assert details(net, client).idle_seconds == pytest.approx(0.35)
        # Other words are no answer, and until there is one the last counts.
        assert await client.receive_json() == {}
        await client.request(subscribe={"channel": "t"})
        assert details(net, client).rtt_seconds == pytest.approx(0.25)
        await trio.sleep(0.125)
        await client.send_json({})
        await trio.sleep(0.01)
        assert details(net, client).rtt_seconds == pytest.approx(0.125)


async def test_what_was_known_of_a_closed_connection_is_kept(autojump_clock: MockClock) -> None:
    async with open_test_broker(name_users_by_token(Broker())) as net:
        client = await net.open_client(token="ann", name="js", version="5")
        await client.request(subscribe={"channel": "news"})
        await client.request(subscribe={"channel": "a.*"})
        await trio.sleep(3)
        net.broker.disconnect(client.fd, 4001, "kicked")
        assert net.node.closed_connection(client.fd) is None
        assert await client.receive_close() == (4001, "kicked")
        await client.send_close(4001)
        await trio.sleep(1)
        assert net.node.connection_details(client.fd) is None
        closed = net.node.closed_connection(client.fd)
        assert closed is not None
        assert list(net.node.closed_connections()) == [closed]
        assert closed.close == Close(4001, "kicked", Initiator.SERVER)
        known = closed.details
        assert (known.user, known.app_name, known.app_version) == ("ann", "js", "5")
        assert known.topics == ("news", "a.*")
        assert known.messages_received == 3
        assert known.messages_sent >= 3
        assert closed.closed_at - known.opened_at < 60


async def test_a_lost_connection_is_remembered_with_its_topics(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker()) as net:
        client = await net.open_client()
        for number in range(100):  # more than are left at once
            await client.request(subscribe={"channel": f"t{number}"})
        await client.aclose()
        await trio.sleep(1)
        closed = net.node.closed_connection(client.fd)
        assert closed is not None
        assert closed.close.code == CloseCode.ABNORMAL
        assert closed.topic_count == 100
        assert len(closed.details.topics) == 100


async def test_in_the_close_hook_a_connection_is_no_longer_here(autojump_clock: MockClock) -> None:
    broker, seen = Broker(), []

    @broker.on_close
    async def look(connection: Connection, close: Close) -> None:
        fd = connection.fd
        seen.append((broker.exists(fd), broker.connection_info(fd), broker.connections()))
        assert connection.info().fd == fd, "it tells what it knows all the same"

    async with open_test_broker(broker) as net:
        peer = await net.open_plain()
        assert broker.exists(peer.fd)
        await peer.aclose()
        await trio.sleep(1)
    assert seen == [(False, None, [])]
