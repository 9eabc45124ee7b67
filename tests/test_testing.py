"""The test kit: peers that do just what they are told, on virtual time."""

import time

import pytest
import trio
from trio.testing import MockClock, lockstep_stream_pair, wait_all_tasks_blocked

from broker import Broker, Config
from broker.testing import (
    Closed,
    MemoryListener,
    Network,
    client_frame,
    handshake,
    name_users_by_token,
    open_test_broker,
)
from broker.transport import frames

# listeners


async def test_streams_are_accepted_in_the_order_they_came() -> None:
    listener = MemoryListener()
    first, second = [await listener.connect() for _ in "12"]
    for stream in (first, second):
        accepted = await listener.accept()
        await accepted.send_all(b"hi")
        assert await stream.receive_some() == b"hi"


async def test_a_closed_listener_refuses_also_those_nobody_has_accepted() -> None:
    listener = MemoryListener()
    waiting = await listener.connect()
    await listener.aclose()
    with pytest.raises(trio.BrokenResourceError):
        await waiting.send_all(b"?")
    with pytest.raises(trio.ClosedResourceError):
        await listener.accept()
    with pytest.raises(trio.ClosedResourceError):
        await listener.connect()


async def test_an_accept_that_waits_ends_with_its_listener(autojump_clock: MockClock) -> None:
    listener = MemoryListener()
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def wait() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await listener.accept()

        await wait_all_tasks_blocked()
        await listener.aclose()


# bytes


def test_a_handshake_has_headers_added_or_replaced() -> None:
    request = handshake("/a", {"Origin": "https://x", "Upgrade": "h2c"}, host="b")
    lines = request.decode().split("\r\n")
    assert lines[0] == "GET /a HTTP/1.1"
    assert lines[-2:] == ["", ""]
    assert {"Host: b", "Origin: https://x", "Upgrade: h2c"} <= set(lines)
    assert sum(line.startswith("Upgrade:") for line in lines) == 1


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65_535, 65_536])
@pytest.mark.parametrize("fin", [True, False])
def test_a_client_frame_is_masked_and_says_its_length(size: int, fin: bool) -> None:
    frame = client_frame(frames.BINARY, b"x" * size, fin=fin)
    header = frames.read_header(bytearray(frame))
    assert header is not None
    assert header.masked
    assert (header.opcode, header.length, bool(frame[0] & 0x80)) == (frames.BINARY, size, fin)
    key = frame[header.size - 4 : header.size]
    assert frames.unmask(frame[header.size :], key) == b"x" * size


# peers


async def test_all_that_comes_is_received_in_order_with_the_close_at_the_end(
    autojump_clock: MockClock, net: Network
) -> None:
    peer = await net.open_plain()
    for data in ({"a": 1}, "text", 7, "two\nlines"):
        net.broker.push(peer.fd, data)
    assert await peer.receive_all() == [{"a": 1}, "text", "7", "two", "lines"]
    assert await peer.receive_all() == []
    net.broker.disconnect(peer.fd, 4000, "bye")
    assert await peer.receive_all() == [4000]


async def test_a_stream_that_ends_without_a_close_frame_has_no_code(
    autojump_clock: MockClock, net: Network
) -> None:
    peer = await net.open_plain()
    await peer.send(client_frame(frames.TEXT, b"\xff"))
    assert (await peer.receive_close())[0] == 1007
    await peer.send_close(1007)
    assert await peer.receive_all() == [None]
    with pytest.raises(Closed, match="None: end of stream"):
        await peer.receive_frame()


async def test_a_peer_takes_a_request_s_reply_and_drops_what_came_before(
    autojump_clock: MockClock, net: Network
) -> None:
    peer = await net.open_client()
    net.broker.push(peer.fd, 1)
    assert await peer.request(subscribe={"channel": "a"}) == {"id": 1, "subscribe": {}}


async def test_a_peer_that_goes_says_no_word(autojump_clock: MockClock, net: Network) -> None:
    async with await net.open_client() as peer:
        assert net.broker.is_established(peer.fd)
    await wait_all_tasks_blocked()
    assert not net.broker.exists(peer.fd)
    assert net.streams == 0


# networks


async def test_three_kinds_of_peers_are_opened(autojump_clock: MockClock, net: Network) -> None:
    unknown, plain, client = [
        await net.open_websocket(),
        await net.open_plain(),
        await net.open_client(),
    ]
    assert [unknown.fd, plain.fd, client.fd] == [1, 2, 3]
    protocols = [info.protocol for info in net.broker.connections()]
    assert protocols == ["plain", "plain", "centrifuge-json"]
    for peer, messages in ((unknown, 0), (plain, 1), (client, 1)):
        net.broker.push(peer.fd, "x")
        assert net.outbox(peer.fd).messages == messages
    with pytest.raises(KeyError):
        net.outbox(99)


async def test_a_handshake_that_is_refused_fails_the_test(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker(Config(max_connections=1))) as net:
        await net.open_websocket()
        with pytest.raises(AssertionError, match="503"):
            await net.open_websocket()


async def test_a_lockstep_peer_takes_nothing_until_it_reads(
    autojump_clock: MockClock, net: Network
) -> None:
    peer = await net.open_plain(make_pair=lockstep_stream_pair)
    net.broker.push(peer.fd, "x")
    await wait_all_tasks_blocked()
    assert net.outbox(peer.fd).messages == 1
    assert await peer.receive_text() == "x"
    await wait_all_tasks_blocked()
    assert net.outbox(peer.fd).messages == 0


async def test_a_token_is_its_user(autojump_clock: MockClock) -> None:
    async with open_test_broker(name_users_by_token(Broker())) as net:
        ann, nobody = await net.open_client(token="ann"), await net.open_client()
        assert net.broker.fds_of("ann") == [ann.fd]
        info = net.broker.connection_info(nobody.fd)
        assert info is not None
        assert info.user == ""


async def test_the_wall_clock_goes_with_virtual_time(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker()) as net:
        before = net.broker.wall_clock()
        assert abs(before - time.time()) < 60
        await trio.sleep(600)
        assert net.broker.wall_clock() - before == pytest.approx(600)


async def test_the_inside_may_be_looked_at_after_the_end(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker()) as net:
        node = net.node
        await net.open_client()
    assert net.node is node
    assert node.figures.statistics().connections == 0
    with pytest.raises(RuntimeError, match="not serving"):
        net.broker.node  # noqa: B018 - to look is to ask
