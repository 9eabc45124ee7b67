"""Compression as the peers of a whole broker see it: agreed on, once for all, and bounded (RFC 7692)."""

import os
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
import structlog.testing
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from broker import Broker, Config, Connection, Frame
from broker.core.memory import Part
from broker.core.trace import Target
from broker.core.work import INFLATED, SLICE, UNMASKED_KILOBYTE, WRITE
from broker.session.compression import WINDOWS
from broker.testing import Network, client_frame, handshake, open_test_broker
from broker.transport import frames
from broker.transport.extensions import Deflate
from broker.transport.frames import BINARY, CONTINUATION, PING, PONG
from tests.deflated import (
    OFFER,
    TEXT,
    DeflatingPeer,
    deflated,
    deflated_frame,
    inflated,
    message,
)

ANSWER = "permessage-deflate; server_no_context_takeover; client_no_context_takeover"


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


def make_broker(**settings: Any) -> Broker:
    """It echoes what plain peers send."""
    broker = Broker(Config(**{"compression": True, **settings}))

    @broker.on_message
    async def echo(connection: Connection, frame: Frame) -> None:
        broker.push(connection.fd, frame.data)

    return broker


async def open_plain(net: Network, offer: str = OFFER["Sec-WebSocket-Extensions"]) -> DeflatingPeer:
    return DeflatingPeer(await net.open_plain(headers={"Sec-WebSocket-Extensions": offer}))


async def subscriber(net: Network, name: str, headers: dict[str, str] = OFFER) -> DeflatingPeer:
    peer = await net.open_websocket(headers=headers)
    await peer.request(connect={})
    await peer.request(subscribe={"channel": name})
    return DeflatingPeer(peer)


async def head_of(net: Network, *headers: tuple[str, str]) -> str:
    peer = await net.connect()
    lines = b"".join(f"{name}: {value}\r\n".encode() for name, value in headers)
    await peer.send(handshake()[:-2] + lines + b"\r\n")
    return await peer.receive_head()


# what is agreed on


async def test_without_the_setting_nobody_gets_it_and_nobody_may_send_it() -> None:
    async with open_test_broker(Broker()) as net:
        assert "Extensions" not in await head_of(net, ("Sec-WebSocket-Extensions", "@ no list;"))
        peer = await open_plain(net)
        await peer.send(message(TEXT))
        assert (await peer.receive_close())[0] == 1002
        assert not net.node.services.compression.packing.messages


async def test_offers_may_come_in_several_lines() -> None:
    name = "Sec-WebSocket-Extensions"
    async with open_test_broker(make_broker()) as net:
        assert f"{name}: {ANSWER}\r\n" in await head_of(
            net, (name, "x"), (name, "permessage-deflate")
        )
        assert name not in await head_of(net)
        assert name not in await head_of(net, (name, "permessage-deflate; unknown"))
        assert "HTTP/1.1 400" in await head_of(net, (name, "permessage-deflate;"))
        assert not net.node.services.connections.keys() - {1, 2, 3}


async def test_who_has_not_offered_it_gets_none_and_may_send_none() -> None:
    async with open_test_broker(make_broker()) as net:
        peer = DeflatingPeer(await net.open_plain())
        await peer.send(client_frame(frames.TEXT, TEXT))
        assert await peer.receive_message() == (False, TEXT)
        await peer.send(message(TEXT))
        assert (await peer.receive_close())[0] == 1002


# what goes out


async def test_a_broadcast_is_compressed_once_for_all_who_want_it_so(
    autojump_clock: MockClock,
) -> None:
    async with open_test_broker(make_broker()) as net:
        many = [await subscriber(net, "news") for _ in range(50)]
        others = [await subscriber(net, "news", {}) for _ in range(3)]
        data = {"text": TEXT.decode()}
        await net.broker.publish("news", data)
        came = [await peer.receive_message() for peer in many]
        plain = [await peer.receive_message() for peer in others]
        assert {was_compressed for was_compressed, _ in came} == {True}
        assert {was_compressed for was_compressed, _ in plain} == {False}
        assert len({text for _, text in came + plain}) == 1
        assert net.node.services.compression.packing.messages == 1
        run_sizes = net.node.router.office.statistics()
        assert run_sizes.messages_delivered == 53


async def test_only_messages_that_are_large_enough_are_compressed(
    autojump_clock: MockClock,
) -> None:
    async with open_test_broker(make_broker(compression_min_bytes=1000)) as net:
        peer = await open_plain(net)
        for size in (0, 1, 999, 1000, 100_000):
            data = (TEXT * 100)[:size]
            await peer.send(client_frame(frames.TEXT, data))
            assert await peer.receive_message() == (size >= 1000, data)


async def test_those_with_other_windows_have_what_they_can_read(autojump_clock: MockClock) -> None:
    data = os.urandom(600)
    async with open_test_broker(make_broker()) as net:
        peers = {
            bits: await open_plain(net, f"permessage-deflate; server_max_window_bits={bits}")
            for bits in range(9, 16)
        }
        for bits, peer in peers.items():
            net.broker.push(peer.fd, data * 4)  # the same again, 600 bytes back
            _, payload = await peer.receive_frame()
            assert (
                inflated(payload, bits) == data * 4 if len(payload) < 2400 else payload == data * 4
            )
        assert len(net.node.services.compression._packed) == 7


async def test_a_large_publication_to_many_audiences_is_compressed_once(
    autojump_clock: MockClock,
) -> None:
    async with open_test_broker(make_broker()) as net:
        patterns = ["a.b", "a.*", "*.b", "a.>", ">", "*.*"]
        peers = [await subscriber(net, pattern) for pattern in patterns]
        data = TEXT.decode() * 10
        before = net.node.router.meter.done
        await net.broker.publish("a.b", {"text": data})
        for peer in peers:
            was_compressed, text = await peer.receive_message()
            assert was_compressed
            assert TEXT.decode() in text.decode().replace("\\", "")
        packing = net.node.services.compression.packing
        assert packing.messages == len(patterns)
        assert packing.bytes_after < packing.bytes_before / 4
        # once, and not six times
        done = net.node.router.meter.done - before - len(patterns) * WRITE
        assert done < 2 * 10 * len(data) / 1024


async def test_the_trace_of_a_connection_shows_what_is_said(autojump_clock: MockClock) -> None:
    async with open_test_broker(make_broker()) as net:
        peer = await open_plain(net)
        async with net.node.traces.open(Target(fd=peer.fd)) as trace:
            short = b"<" + b"a" * 700 + b">"
            for data in (short, TEXT * 100):
                await peer.send(message(data))
                assert await peer.receive_message() == (True, data)
            await wait_all_tasks_blocked()
            entries = trace.buffer.take()
        assert [each.kind for each in entries] == ["received", "sent"] * 2
        for received, sent in (entries[:2], entries[2:]):
            assert received.text == sent.text
            assert received.is_cut == sent.is_cut
            assert received.size > 5 * sent.size


# what comes


async def test_messages_come_compressed_or_not_as_the_peer_likes(autojump_clock: MockClock) -> None:
    async with open_test_broker(make_broker(compression_min_bytes=10**6)) as net:
        peer = await open_plain(net)
        for data in (b"", b"x", TEXT, "naïve ☃".encode(), TEXT * 500):
            for frame in (message(data), client_frame(frames.TEXT, data)):
                await peer.send(frame)
                assert await peer.receive_message() == (False, data)
            for final in (False, True):
                await peer.send(deflated_frame(frames.TEXT, deflated(data, final=final)))
                assert await peer.receive_message() == (False, data)
        await peer.send(message(b"\xff\x00", BINARY))
        assert await peer.receive_frame() == (BINARY, b"\xff\x00")


async def test_a_compressed_message_may_come_in_fragments_with_pings_between(
    autojump_clock: MockClock,
) -> None:
    async with open_test_broker(make_broker()) as net:
        peer = await open_plain(net)
        payload = deflated(TEXT)
        parts = [payload[at : at + 7] for at in range(0, len(payload), 7)]
        await peer.send(deflated_frame(frames.TEXT, parts[0], fin=False))
        for part in parts[1:-1]:
            await peer.send(client_frame(PING, b"?"))
            await peer.send(client_frame(CONTINUATION, part, fin=False))
            assert await peer.receive_frame() == (PONG, b"?")
        await peer.send(client_frame(CONTINUATION, b"", fin=False))
        await peer.send(client_frame(CONTINUATION, parts[-1]))
        assert await peer.receive_message() == (True, TEXT)
        # as good as ever, whatever comes next
        await peer.send(
            client_frame(frames.TEXT, b"a", fin=False) + client_frame(CONTINUATION, b"b")
        )
        assert await peer.receive_message() == (False, b"ab")
        await peer.send(message(b"c"))
        assert await peer.receive_message() == (False, b"c")


async def test_bytes_may_come_one_by_one(autojump_clock: MockClock) -> None:
    async with open_test_broker(make_broker()) as net:
        peer = await open_plain(net)
        payload = deflated(b"hello" * 200)
        sent = message(b"first") + deflated_frame(frames.TEXT, payload[:9], fin=False)
        for byte in sent + client_frame(CONTINUATION, payload[9:]):
            await peer.send(bytes((byte,)))
            await wait_all_tasks_blocked()
        assert await peer.receive_message() == (False, b"first")
        assert await peer.receive_message() == (True, b"hello" * 200)


OPEN = deflated_frame(frames.TEXT, deflated(TEXT)[:20], fin=False)
"""A compressed message that has begun."""

BROKEN = {
    "RSV2": (1002, deflated_frame(frames.TEXT, deflated(TEXT), rsv=0x60)),
    "RSV1 on a ping": (1002, deflated_frame(PING, b"")),
    "RSV1 on a close": (1002, deflated_frame(frames.CLOSE, b"\x03\xe8")),
    "RSV1 on a continuation": (1002, OPEN + deflated_frame(CONTINUATION, b"x")),
    "RSV1 on a continuation of nothing": (1002, deflated_frame(CONTINUATION, b"x")),
    "RSV1 on a continuation of a plain message": (
        1002,
        client_frame(frames.TEXT, b"a", fin=False) + deflated_frame(CONTINUATION, b"x"),
    ),
    "RSV1 on an unknown opcode": (1002, deflated_frame(3, b"x")),
    "a new message in a compressed one": (1002, OPEN + client_frame(frames.TEXT, b"x")),
    "a new compressed message in one": (1002, OPEN + message(b"x")),
    "a compressed message in a plain one": (
        1002,
        client_frame(frames.TEXT, b"a", fin=False) + message(b"x"),
    ),
    "no mask": (1002, b"\xc1\x01\x00"),
    "a length in more bytes than it needs": (1002, b"\xc1\xfe\x00\x01" + bytes(4) + b"\x00"),
    "bad data": (1007, deflated_frame(frames.TEXT, b"\xff\xff\xff")),
    "bad data in a second fragment": (1007, OPEN + client_frame(CONTINUATION, b"\xff" * 9)),
    "data without an end": (1007, deflated_frame(frames.TEXT, deflated(TEXT[:900])[:-4])),
    "a reference to another message": (
        1007,
        deflated_frame(
            frames.TEXT, zlib.compressobj(9, zlib.DEFLATED, -15).flush()[:0] + b"\x03\x02"
        ),
    ),
    "text that is no UTF-8": (1007, message(b"\xff")),
    "text that is no UTF-8 in the end": (
        1007,
        deflated_frame(frames.TEXT, deflated(b"a\xe2\x98"), fin=False) + client_frame(CONTINUATION),
    ),
    "a bomb": (1009, message(bytes(10**7), BINARY)),
    "a byte too much": (1009, message(b"x" * 1001)),
    "a bomb in fragments": (
        1009,
        deflated_frame(BINARY, deflated(bytes(900)) + b"\x00\x00\xff\xff", fin=False)
        + client_frame(CONTINUATION, deflated(bytes(900))),
    ),
    "a frame too large to be one": (1009, deflated_frame(BINARY, bytes(1200))),
    "a frame too large to be one, of which nothing has come": (
        1009,
        b"\xc2\xff" + b"\x7f" * 8 + bytes(4),
    ),
    "too many fragments": (
        1009,
        deflated_frame(BINARY, b"\x00", fin=False)
        + client_frame(CONTINUATION, b"\x00\x00\xff\xff\x00", fin=False) * 20,
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
async def test_what_breaks_the_rules_is_answered_with_a_close_and_nothing_behind_it_counts(
    kind: str, autojump_clock: MockClock
) -> None:
    code, sent = BROKEN[kind]
    came = []
    broker = Broker(Config(compression=True, max_message_bytes=1000, max_fragments=10))

    @broker.on_message
    async def note(connection: Connection, frame: Frame) -> None:
        came.append(frame.data)

    async with open_test_broker(broker) as net:
        other = await open_plain(net)
        peer = await open_plain(net)
        await peer.send(sent + client_frame(frames.TEXT, b"behind") + message(b"behind"))
        assert (await peer.receive_close())[0] == code
        await peer.aclose()
        assert came == []
        await other.send(message(b"others go on"))
        await wait_all_tasks_blocked()
        assert came == ["others go on"]
        assert list(net.node.services.connections) == [other.fd]
        assert net.node.services.memory.statistics().parts[Part.INCOMING] == 0


async def test_the_largest_message_passes_compressed_or_not(autojump_clock: MockClock) -> None:
    async with open_test_broker(make_broker(max_message_bytes=1000)) as net:
        peer = await open_plain(net)
        noise = os.urandom(1000)
        for data in (bytes(1000), noise):
            payload = deflated(data)
            await peer.send(deflated_frame(BINARY, payload))
            await peer.send(deflated_frame(BINARY, payload[:5], fin=False))
            await peer.send(client_frame(CONTINUATION, payload[5:]))
            assert (await peer.receive_message())[1] == data
            assert (await peer.receive_message())[1] == data
        assert len(deflated(noise)) > 1000


async def test_a_peer_that_is_closed_may_go_on_with_compressed_messages_until_it_answers(
    autojump_clock: MockClock,
) -> None:
    async with open_test_broker(make_broker()) as net:
        peer = await open_plain(net)
        net.broker.disconnect(peer.fd, 3000, "away")
        await peer.send(message(TEXT) + message(TEXT) + OPEN + client_frame(PING))
        assert await peer.receive_close() == (3000, "away")
        await peer.send_close(3000)
        began = trio.current_time()
        assert await peer.receive_eof() == b""
        assert trio.current_time() == began


async def test_an_open_message_has_its_time_and_then_it_is_cut(autojump_clock: MockClock) -> None:
    async with open_test_broker(make_broker(message_seconds=3, pong_seconds=60)) as net:
        peer = await open_plain(net)
        await peer.send(OPEN)
        began = trio.current_time()
        assert (await peer.receive_close())[0] == 1008
        assert trio.current_time() - began == 3


# what it costs others


async def test_bombs_wait_their_turn_and_a_bystander_does_not(autojump_clock: MockClock) -> None:
    """The work between two of a bystander's answers is bounded, however many send bombs."""
    bomb = deflated_frame(BINARY, deflated(bytes(10**6)))
    nothing = deflated_frame(BINARY, b"\x00\x00\x00\xff\xff" * 50_000 + b"\x00")
    async with open_test_broker(make_broker()) as net:
        meter = net.node.router.meter
        bystander = await open_plain(net)
        bombers = [await open_plain(net) for _ in range(100)]
        for number, peer in enumerate(bombers):
            await peer.send(bomb if number % 2 else nothing)
        before, took = meter.done, []
        for _ in range(30):  # as many as he may send at once himself
            start = meter.done
            await bystander.send(client_frame(frames.TEXT, b"?"))
            assert await bystander.receive_message() == (False, b"?")
            took.append(meter.done - start)
        assert max(took) < 10 * SLICE  # his message passes through some tasks
        assert meter.done - before > 100_000  # and it was never his turn by chance alone
        for peer in bombers:
            assert len((await peer.receive_message())[1]) in (0, 10**6)


async def test_a_thousand_messages_in_one_read_leave_others_their_turn(
    autojump_clock: MockClock,
) -> None:
    """Each is handed on by itself, with nobody else in between: which is no reason for a new slice."""
    command = deflated(b'{"id":1,"presence_stats":{"channel":"t"}}')
    async with open_test_broker(make_broker()) as net:
        peer = await net.open_websocket(headers=OFFER)
        await peer.request(connect={})
        meter, longest = net.node.router.meter, 0.0
        async with trio.open_nursery() as nursery:

            async def look() -> None:
                nonlocal longest
                done = meter.done
                while True:
                    await trio.lowlevel.checkpoint()
                    longest, done = max(longest, meter.done - done), meter.done

            await peer.send(deflated_frame(frames.TEXT, command) * 1000)
            nursery.start_soon(look)
            got = 0
            while got < 1000:
                got += (await peer.receive_text()).count("presence_stats")
            nursery.cancel_scope.cancel()
        assert meter.done > 1000 * INFLATED
        assert longest < 3 * SLICE


async def test_large_frames_that_come_at_once_are_unmasked_in_turns(
    autojump_clock: MockClock,
) -> None:
    """A frame of a mebibyte takes 4 ms before anybody can look into it."""
    large = deflated_frame(BINARY, b"\xff" * 2**20)
    async with open_test_broker(make_broker()) as net:
        bystander = await open_plain(net)
        peers = [await open_plain(net) for _ in range(50)]
        meter = net.node.router.meter
        before, each = meter.done, 1024 * UNMASKED_KILOBYTE
        for peer in peers:
            await peer.send(large)
        sent = meter.done
        await bystander.send(client_frame(frames.TEXT, b"?"))
        assert await bystander.receive_message() == (False, b"?")
        assert meter.done - sent < 10 * each
        for peer in peers:
            assert (await peer.receive_close())[0] == 1007
        assert meter.done - before > 50 * each


async def test_a_message_that_is_open_is_charged_with_its_window(autojump_clock: MockClock) -> None:
    async with open_test_broker(make_broker()) as net:
        statistics = net.node.services.memory.statistics
        peers = [await open_plain(net) for _ in range(10)]
        for peer in peers:
            payload = deflated(bytes(100_000))
            await peer.send(deflated_frame(BINARY, payload[:-1], fin=False))
        await wait_all_tasks_blocked()
        held = statistics().parts[Part.INCOMING]
        assert 10 * 90_000 < held < 10 * 150_000
        for peer in peers[1:]:
            await peer.aclose()
        await peers[0].send(client_frame(CONTINUATION, payload[-1:]))
        assert (await peers[0].receive_message())[1] == bytes(100_000)
        await wait_all_tasks_blocked()
        assert statistics().parts[Part.INCOMING] == 0


# windows that clients keep


async def test_clients_keep_their_windows_where_the_settings_say_so(
    autojump_clock: MockClock,
) -> None:
    async with open_test_broker(make_broker(compression_client_context=True)) as net:
        peer = await open_plain(net)
        deflater = zlib.compressobj(9, zlib.DEFLATED, -15)
        sizes = []
        for _ in range(3):
            payload = (deflater.compress(TEXT) + deflater.flush(zlib.Z_SYNC_FLUSH))[:-4]
            sizes.append(len(payload))
            await peer.send(deflated_frame(frames.TEXT, payload))
            assert await peer.receive_message() == (True, TEXT)
        assert sizes[1] < sizes[0] / 3
        services = net.node.services
        window = Deflate(client_keeps=True).kept_bytes
        assert services.memory.statistics().parts[Part.WINDOWS] == window
        assert services.connections[peer.fd].holding.bytes >= window
        await peer.aclose()
        await wait_all_tasks_blocked()
        assert services.memory.statistics().parts[Part.WINDOWS] == 0
        assert services.compression.windows_bytes == 0


async def test_windows_have_a_part_of_the_memory_and_who_comes_then_has_none(
    autojump_clock: MockClock,
) -> None:
    window = Deflate(client_keeps=True).kept_bytes
    settings = {"compression_client_context": True, "max_memory_bytes": WINDOWS * window * 3 + 100}
    async with open_test_broker(make_broker(**settings)) as net:
        compression = net.node.services.compression
        peers = [await open_plain(net) for _ in range(5)]
        assert compression.windows_bytes == 3 * window
        for peer in peers:  # all are served
            await peer.send(message(TEXT))
            assert await peer.receive_message() == (True, TEXT)
        await peers[0].aclose()
        await wait_all_tasks_blocked()
        small = await open_plain(net, "permessage-deflate; client_max_window_bits=9")
        await small.send(deflated_frame(frames.TEXT, deflated(TEXT, 9)))
        assert await small.receive_message() == (True, TEXT)
        assert 2 * window < compression.windows_bytes < 3 * window


async def test_a_reload_turns_it_off_for_what_comes_next_and_breaks_nobody(
    autojump_clock: MockClock,
) -> None:
    broker = make_broker()
    async with open_test_broker(broker) as net:
        peer = await open_plain(net)
        net.node.services.settings.replace(Config(compression=False))
        await peer.send(message(TEXT))
        assert await peer.receive_message() == (False, TEXT)
        assert "Extensions" not in await head_of(net, *OFFER.items())
