"""Frames that trio-websocket judges: whole ones go in, messages, answers and verdicts come out."""

from collections.abc import AsyncIterator

import attrs
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from broker.testing import client_frame
from broker.transport import frames
from broker.transport.slow_lane import SlowLane, open_slow_lane


@attrs.define
class Bench:
    lane: SlowLane
    answers: list[bytes]


@pytest.fixture
async def bench(autojump_clock: MockClock) -> AsyncIterator[Bench]:
    """A slow lane with room for messages of 1000 bytes."""
    answers: list[bytes] = []
    async with trio.open_nursery() as nursery:
        yield Bench(await open_slow_lane(nursery, answers.append, 1000), answers)
        nursery.cancel_scope.cancel()


async def test_its_handshake_goes_nowhere(autojump_clock: MockClock, bench: Bench) -> None:
    await wait_all_tasks_blocked()
    assert bench.answers == []
    assert bench.lane.error is None


async def test_a_message_in_fragments_is_complete_with_the_last(
    autojump_clock: MockClock, bench: Bench
) -> None:
    await bench.lane.put(client_frame(frames.TEXT, b"\xe4\xbd", fin=False))
    await bench.lane.put(client_frame(frames.CONTINUATION, b"\xa0", fin=False))
    await bench.lane.put(client_frame(frames.CONTINUATION, b"!"))
    with trio.fail_after(1):
        assert await bench.lane.get_message() == "你!".encode()


async def test_bytes_come_as_they_are(autojump_clock: MockClock, bench: Bench) -> None:
    await bench.lane.put(client_frame(frames.BINARY, b"\xff", fin=False))
    await bench.lane.put(client_frame(frames.CONTINUATION, b"\x00"))
    assert await bench.lane.get_message() == b"\xff\x00"


async def test_a_ping_is_answered_in_the_midst_of_a_message(
    autojump_clock: MockClock, bench: Bench
) -> None:
    await bench.lane.put(client_frame(frames.TEXT, b"a", fin=False))
    await bench.lane.put(client_frame(frames.PING, b"?"))
    await wait_all_tasks_blocked()
    assert bench.answers == [frames.encode(frames.PONG, b"?")]
    await bench.lane.put(client_frame(frames.CONTINUATION, b"b"))
    assert await bench.lane.get_message() == b"ab"


@pytest.mark.parametrize(
    "put, code",
    [
        ([client_frame(frames.CONTINUATION, b"a")], 1002),
        ([client_frame(frames.TEXT, b"a", fin=False), client_frame(frames.TEXT, b"b")], 1002),
        ([client_frame(frames.PING, b"a", fin=False)], 1002),
        ([client_frame(frames.PING, b"a" * 126)], 1002),
        ([client_frame(3, b"a")], 1002),
        ([client_frame(frames.TEXT, b"\xff\xff")], 1007),
    ],
)
async def test_a_peer_that_breaks_the_rules_is_given_up_with_a_code(
    autojump_clock: MockClock, bench: Bench, put: list[bytes], code: int
) -> None:
    with trio.fail_after(5):
        for each in put:
            await bench.lane.put(each)
        await wait_all_tasks_blocked()
    assert bench.lane.error is not None
    assert bench.lane.error[0] == code
    # The Close frame is ours to send.
    assert not any(answer[0] == 0x80 | frames.CLOSE for answer in bench.answers)
