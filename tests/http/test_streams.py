"""A response that goes on: what is written to it goes out in pieces, however it comes."""

import json
import tracemalloc
from typing import cast

import pytest
import trio
from trio.testing import MockClock, lockstep_stream_pair, memory_stream_pair, wait_all_tasks_blocked

from broker.http.streams import ASKED_AT_ONCE, HttpStream, ProtobufStream, SseStream, UniSseStream
from broker.session.connection import Connection
from broker.transport import frames

HEAD = b"HTTP/1.1 200 OK\r\n\r\n"


@pytest.mark.parametrize("kind", [HttpStream, SseStream, ProtobufStream])
async def test_a_large_reply_goes_out_in_pieces_that_are_counted(kind: type[HttpStream]) -> None:
    ours, theirs = lockstep_stream_pair()
    line = kind(ours)
    reply = frames.encode(kind.opcode, b"x" * 100_000)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(line.send_all, HEAD + reply)
        came = 0
        while came < 100_000:
            await wait_all_tasks_blocked()
            assert came // 2**14 == line.pieces
            came += len(await theirs.receive_some(2**14))
        nursery.cancel_scope.deadline = trio.current_time() + 5
    assert line.pieces == 7


async def test_frames_that_are_put_together_first_go_out_in_pieces_too() -> None:
    ours, theirs = memory_stream_pair()
    line = UniSseStream(ours, {})
    reply = b'{"id":1,"connect":{"data":"%b"}}' % (b"x" * 1_000_000)
    wire = HEAD + frames.text_frame(reply)
    for start in range(0, len(wire), 2**16):
        assert line.pieces <= 1  # the head
        await line.send_all(wire[start : start + 2**16])
    assert 60 < line.pieces < 70
    assert b'data: {"connect":{"data":"xxx' in await theirs.receive_some(1000)


async def test_a_large_reply_is_translated_with_few_copies() -> None:
    """Of ours: the line that came, the event, and what goes out."""
    size = 4_000_000
    ours, theirs = memory_stream_pair()
    line = UniSseStream(ours, {"news": {}})
    await line.send_all(HEAD + frames.text_frame(b'{"id":1,"connect":{}}'))
    reply = frames.text_frame(b'{"id":2,"subscribe":{"data":"%b"}}' % (b"x" * size))
    tracemalloc.start()
    try:
        for start in range(0, len(reply), 2**16):
            await line.send_all(reply[start : start + 2**16])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3.5 * size
    assert len(await theirs.receive_some()) > size


async def test_the_stream_below_is_known() -> None:
    ours, _ = memory_stream_pair()
    assert HttpStream(ours).transport_stream is ours


async def test_a_message_that_was_not_read_by_the_end_was_not_delivered() -> None:
    ours, _ = memory_stream_pair()
    line = HttpStream(ours)
    line.connection = cast("Connection", None)
    outcomes: dict[bytes, bool] = {}

    async def deliver(message: bytes) -> None:
        outcomes[message] = await line.deliver(message)

    async with trio.open_nursery() as nursery:
        for message in (b"read", b"read in part", b"waiting"):
            nursery.start_soon(deliver, message)
            await wait_all_tasks_blocked()
        assert (await line.receive_some(2**16)).endswith(b"read")
        await wait_all_tasks_blocked()
        await line.receive_some(10)
        await line.aclose()
    assert outcomes == {b"read": True, b"read in part": False, b"waiting": False}
    assert not await line.deliver(b"behind the end")


async def test_the_topics_of_a_one_way_client_are_asked_for_a_few_at_a_time(
    autojump_clock: MockClock,
) -> None:
    ours, _ = memory_stream_pair()
    topics = [f"t{number}" for number in range(2 * ASKED_AT_ONCE + 5)]
    line = UniSseStream(ours, {topic: {} for topic in topics})
    await line.send_all(HEAD + frames.text_frame(b'{"id":1,"connect":{"subs":{"t3":{}}}}'))
    asked: list[list[str]] = []
    for _ in range(3):
        came, _ = frames.take_messages(await line.receive_some(), 2**16)
        asked.append([json.loads(message)["subscribe"]["channel"] for _, message in came])
    assert [len(each) for each in asked] == [ASKED_AT_ONCE, ASKED_AT_ONCE, 4]
    assert [topic for each in asked for topic in each] == [
        topic for topic in topics if topic != "t3"
    ]
    with trio.move_on_after(0.01) as waiting:
        await line.receive_some()
    assert waiting.cancelled_caught, "there is no more to ask for"
