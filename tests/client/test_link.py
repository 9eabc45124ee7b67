"""One connection: what is queued, heartbeats, and how it is left."""

from functools import partial

import msgspec
import pytest
import trio
import trio_websocket
from trio.testing import MockClock, lockstep_stream_pair, wait_all_tasks_blocked

from broker.client import (
    INBOX_MESSAGES,
    open_client,
)
from broker.client.link import FRAME_BYTES, OUTBOX_COMMANDS
from broker.client.testing import KEPT, URL, FakeBroker, FakePeer, handshake_by_hand, server_frame
from broker.errors import Unavailable

WELCOME = server_frame(b'{"id":1,"connect":{"client":"1"}}')


async def test_leaving_sends_what_is_queued_closes_with_1000_and_leaves_no_task(
    fake: FakeBroker,
    autojump_clock: MockClock,
) -> None:
    await wait_all_tasks_blocked()
    before = trio.lowlevel.current_statistics().tasks_living
    got: list[object] = []

    async def serve(peer: FakePeer) -> None:
        got.append((await peer.expect("publish"))["publish"])
        with pytest.raises(trio_websocket.ConnectionClosed) as caught:
            await peer.expect("nothing more")
        assert caught.value.reason is not None
        got.append(caught.value.reason.code)

    async with fake.client() as (client, peer):
        fake.nursery.start_soon(serve, peer)
        await client.publish("news", 1, reply=False)
    await wait_all_tasks_blocked()
    assert got == [{"channel": "news", "data": 1}, 1000]
    assert trio.lowlevel.current_statistics().tasks_living == before
    with pytest.raises(Unavailable, match="closed here"):
        await client.publish("news", 1)
    assert len(fake.dials) == 1


async def test_leaving_waits_2_s_for_a_broker_that_does_not_close(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async def serve() -> None:
        await handshake_by_hand(await fake.stream(), WELCOME)

    fake.nursery.start_soon(serve)
    async with open_client(URL, open_stream=fake.open_stream):
        left = trio.current_time()
    assert trio.current_time() == pytest.approx(left + 2)


async def test_a_ping_after_our_close_is_contained(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    """trio-websocket raises LocalProtocolError for it (its issue #184)."""
    pinged = trio.Event()

    async def serve() -> None:
        stream = await fake.stream()
        await handshake_by_hand(stream, WELCOME)
        while data := await stream.receive_some(1000):
            if data[0] == 0x88:
                await stream.send_all(b"\x89\x00")
                pinged.set()

    fake.nursery.start_soon(serve)
    async with open_client(URL, open_stream=fake.open_stream):
        left = trio.current_time()
    assert pinged.is_set()
    assert trio.current_time() == left


async def test_ready_json_may_hold_newlines(fake: FakeBroker, autojump_clock: MockClock) -> None:
    async with fake.client() as (client, peer):
        await client.publish("news", msgspec.Raw(b'{\n "a": "b\\nc"\n}'), reply=False)
        assert (await peer.expect("publish"))["publish"]["data"] == {"a": "b\nc"}


async def test_commands_that_wait_share_a_frame_unless_it_gets_too_large(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client() as (client, peer), trio.open_nursery() as nursery:
        for size in (10, 20, FRAME_BYTES, 30):
            nursery.start_soon(partial(client.publish, "news", "x" * size, reply=False))
        await wait_all_tasks_blocked()
        frames: list[str] = []
        while "".join(frames).count('"publish"') < 4:
            frames.append(str(await peer.ws.get_message()))
    assert len(frames) < 4
    assert all(len(frame) < FRAME_BYTES or "\n" not in frame for frame in frames)


async def test_a_publish_without_reply_waits_while_a_thousand_are_queued(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    fake.pair = lockstep_stream_pair
    sent = 0
    async with fake.client() as (client, peer), trio.open_nursery() as nursery:

        async def flood() -> None:
            nonlocal sent
            while True:
                await client.publish("news", "x" * 1000, reply=False)
                sent += 1

        nursery.start_soon(flood)
        await wait_all_tasks_blocked()
        # Beyond the bound: one frame on its way and two in the peer's hands, 60 commands each.
        assert OUTBOX_COMMANDS <= sent < OUTBOX_COMMANDS + 4 * 65
        held = sent
        for _ in range(held):
            await peer.expect("publish")
        await wait_all_tasks_blocked()
        assert sent > held
        nursery.cancel_scope.cancel()


async def test_pings_are_answered(fake: FakeBroker, autojump_clock: MockClock) -> None:
    async with fake.client(ping=20, pong=True) as (_, peer):
        await trio.sleep(20)
        await peer.send({})
        assert await peer.ws.get_message() == "{}"
        await trio.sleep(29)
        assert len(fake.dials) == 1


async def test_a_silent_broker_is_left_after_ping_and_10_s(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client(ping=20, pong=True) as (client, _):
        fake.nursery.start_soon(partial(fake.greet, ping=20, pong=True))
        await trio.sleep(29.9)
        assert client.connected
        await trio.sleep(0.5)
        assert client.connected
        assert client.fd == 2


async def test_silence_of_a_broker_we_do_not_read_is_not_death(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client(ping=20, pong=True) as (client, peer):
        peer.soon("subscribe", **KEPT)
        async with client.subscribe("news"):
            for offset in range(1, 2 * INBOX_MESSAGES):
                await peer.publish(offset)
            await trio.sleep(100)
            assert len(fake.dials) == 1
        # Nobody is behind any more, so the reading goes on.
        await peer.answer("unsubscribe")
        peer.soon("publish")
        await client.publish("news", 1)
