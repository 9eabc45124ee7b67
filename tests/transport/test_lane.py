"""The rules of the lane: alone with trio-websocket, and as peers of a whole broker see them."""

from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager

import attrs
import pytest
import structlog.testing
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, lockstep_stream_pair, memory_stream_pair, wait_all_tasks_blocked

from broker import Broker
from broker.core.memory import UNCOUNTED, Holding, MemoryBudget, Part
from broker.testing import MakePair, Peer, client_frame, open_test_broker
from broker.transport.frames import (
    BINARY,
    CLOSE,
    CONTINUATION,
    PING,
    PONG,
    TEXT,
    Message,
    close_frame,
    read_header,
)
from broker.transport.lane import Lane, LaneLimits
from broker.transport.outbox import Outbox
from broker.transport.pieces import PIECE
from broker.transport.slow_lane import SlowLane
from tests.transport.calls import Calls

LIMITS = LaneLimits(
    max_message_bytes=1000,
    max_fragments=10,
    message_seconds=30,
    control_rate=20,
    control_burst=100,
    inbox_batches=4,
    inbox_bytes=10**6,
)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


@attrs.define
class Bench:
    """A lane alone with trio-websocket, and the peer at its other end."""

    nursery: trio.Nursery
    lane: Lane
    outbox: Outbox
    stream: trio.abc.Stream
    peer: Peer
    ends: list[float]

    async def accept(self) -> None:
        self.nursery.start_soon(self.lane.run, self.nursery.start_soon)

    async def messages(self) -> list[Message]:
        """All that came, once the inbox has ended."""
        return [message async for batch in self.lane.inbox for message in batch]


@asynccontextmanager
async def open_bench(
    behind: bytes = b"",
    limits: LaneLimits = LIMITS,
    make_pair: MakePair = memory_stream_pair,
    holding: Holding = UNCOUNTED,
) -> AsyncGenerator[Bench, None]:
    """`behind` is what came in one read with the request head. Who waits in the block for what never comes
    fails in the end, with `trio.TooSlowError`."""
    stream, theirs = make_pair()
    ends: list[float] = []
    is_virtual = isinstance(trio.lowlevel.current_clock(), MockClock)
    lane = Lane(stream, behind, limits, lambda: ends.append(trio.current_time()), holding=holding)
    most = 10_000 if is_virtual else 30
    with trio.fail_after(most):  # noqa: ASYNC100 - for the block of the caller
        async with trio.open_nursery() as nursery:
            lane.outbox = outbox = Outbox(
                stream,
                # There is no postman here: flushed when the task that offers comes to wait.
                post=lambda outboxes: nursery.start_soon(_flush, outboxes),
                owner=Calls(start=nursery.start_soon, broken=lane.lost),
                max_bytes=10**6,
                max_messages=10**6,
                stall_seconds=10,
            )
            yield Bench(nursery, lane, outbox, stream, Peer(theirs), ends)
            nursery.cancel_scope.cancel()


async def _flush(outboxes: list[Outbox]) -> None:
    for outbox in outboxes:
        outbox.flush(trio.current_time())


def unfinished(length: int, opcode: int = BINARY) -> bytes:
    """A header that promises `length` bytes, up to 65,535; the mask is zeros."""
    return bytes((0x80 | opcode, 0xFE)) + length.to_bytes(2, "big") + bytes(4)


async def close_code(bench: Bench) -> int:
    opcode, payload = await bench.peer.receive_frame()
    assert opcode == CLOSE
    return int.from_bytes(payload[:2], "big")


# rule 1: nothing is read before its time, and what came with the request head is delivered


async def test_before_it_runs_nothing_is_read() -> None:
    async with open_bench() as bench:
        await bench.peer.send(b"x" * 10_000)
        await wait_all_tasks_blocked()
        assert len(await bench.stream.receive_some()) == 10_000


async def test_whole_messages_and_control_frames_need_no_trio_websocket() -> None:
    async with open_bench() as bench:
        await bench.accept()
        await wait_all_tasks_blocked()
        tasks = len(bench.nursery.child_tasks)
        for frame in (client_frame(TEXT, b"hi"), client_frame(PONG, b"?"), client_frame(PING)):
            await bench.peer.send(frame)
            await wait_all_tasks_blocked()
        assert await bench.peer.receive_frame() == (PONG, b"")
        await bench.peer.send(client_frame(PING, b"?" * 125))
        assert await bench.peer.receive_frame() == (PONG, b"?" * 125)
        assert len(bench.nursery.child_tasks) == tasks
        await bench.peer.send(client_frame(TEXT, b"a", fin=False) + client_frame(CONTINUATION))
        await wait_all_tasks_blocked()
        assert len(bench.nursery.child_tasks) == tasks + 1
        await bench.peer.send_close(3000, "bye")
        assert await bench.messages() == [(TEXT, b"hi"), (TEXT, b"a")]
        assert await bench.peer.receive_frame() == (CLOSE, close_frame(3000, "bye")[2:])


async def test_messages_that_came_with_the_head_are_delivered() -> None:
    async with open_bench(behind=client_frame(TEXT, b"early") + client_frame(PING, b"?")) as bench:
        await bench.accept()
        assert await bench.lane.inbox.receive() == [(TEXT, b"early")]
        assert await bench.peer.receive_frame() == (PONG, b"?")


# rule 2: a message's size is judged on its headers


@pytest.mark.parametrize(
    ("wire", "left"),
    [
        (unfinished(1001), 1001),
        (client_frame(TEXT, bytes(600), fin=False) + unfinished(401, CONTINUATION), 401),
    ],
    ids=["whole", "sum of fragments"],
)
async def test_over_the_limit_nothing_is_kept_and_the_close_behind_is_seen(
    wire: bytes, left: int
) -> None:
    async with open_bench() as bench:
        await bench.accept()
        await bench.peer.send(wire)
        assert await close_code(bench) == 1009
        for byte in bytes(left):
            await bench.peer.send(bytes((byte,)))
        await wait_all_tasks_blocked()
        assert not bench.lane._buffer
        await bench.peer.send_close(1009)
        await bench.lane.wait_ended()
        assert bench.lane.peer_close == (1009, "")
        assert await bench.messages() == []


async def test_the_limit_itself_passes_in_both_lanes() -> None:
    async with open_bench() as bench:
        await bench.accept()
        whole = client_frame(BINARY, bytes(1000))
        halves = client_frame(BINARY, bytes(600), fin=False) + client_frame(
            CONTINUATION, bytes(400)
        )
        await bench.peer.send(whole + halves + whole)
        await bench.peer.send_close()
        assert await bench.messages() == [(BINARY, bytes(1000))] * 3


# rule 3: fragments are counted, messages and control frames have their time


async def test_ten_fragments_pass_and_eleven_do_not() -> None:
    async with open_bench() as bench:
        await bench.accept()
        first, last = client_frame(TEXT, b"a", fin=False), client_frame(CONTINUATION, b"z")
        middle = client_frame(CONTINUATION, fin=False)
        await bench.peer.send((first + middle * 8 + last) * 2)
        assert await bench.lane.inbox.receive() == [(TEXT, b"az")]
        assert await bench.lane.inbox.receive() == [(TEXT, b"az")]
        await bench.peer.send(first + middle * 9 + last)
        await wait_all_tasks_blocked()
        assert bench.lane.close_sent is not None
        assert await close_code(bench) == 1009


@pytest.mark.parametrize(
    "begun",
    [b"\x81", unfinished(500) + b"x", client_frame(TEXT, b"x", fin=False)],
    ids=["a byte", "half a frame", "a fragment"],
)
async def test_a_message_that_is_not_whole_in_time_is_a_violation(
    begun: bytes, autojump_clock: MockClock
) -> None:
    async with open_bench() as bench:
        await bench.accept()
        await trio.sleep(100)  # silence between messages is no crime
        await bench.peer.send(client_frame(TEXT, b"whole") + begun)
        await trio.sleep(29.9)
        assert not bench.lane.is_ending
        await trio.sleep(0.2)
        assert bench.lane.close_sent is not None
        assert await close_code(bench) == 1008


async def test_a_message_that_is_done_leaves_no_deadline_behind(autojump_clock: MockClock) -> None:
    async with open_bench() as bench:
        await bench.accept()
        for wire in (
            client_frame(TEXT, b"fast"),
            client_frame(TEXT, b"slow ", fin=False) + client_frame(CONTINUATION, b"lane"),
            client_frame(PING, b"ping"),
        ):
            await bench.peer.send(wire[:-1])
            await trio.sleep(20)
            await bench.peer.send(wire[-1:])
            await trio.sleep(20)
        await trio.sleep(1000)
        assert not bench.lane.is_ending
        assert await bench.lane.inbox.receive() == [(TEXT, b"fast")]
        assert await bench.lane.inbox.receive() == [(TEXT, b"slow lane")]


async def test_control_frames_have_a_burst_and_then_a_rate(autojump_clock: MockClock) -> None:
    async with open_bench() as bench:
        await bench.accept()
        await trio.sleep(1000)  # saves up no more than the burst
        await bench.peer.send(client_frame(PONG) * 100)
        for _ in range(10):
            await trio.sleep(1)
            await bench.peer.send(client_frame(PONG) * 20)
        await wait_all_tasks_blocked()
        assert not bench.lane.is_ending
        await bench.peer.send(client_frame(PONG))
        await wait_all_tasks_blocked()
        assert bench.lane.close_sent is not None
        assert await close_code(bench) == 1008


# rule 4: a protocol error is answered with a Close frame


@pytest.mark.parametrize(
    ("wire", "code"),
    [
        (b"\xc1\x80" + bytes(4), 1002),
        (client_frame(CONTINUATION, b"x"), 1002),
        (client_frame(TEXT, b"a", fin=False) + client_frame(TEXT, b"b"), 1002),
        (client_frame(TEXT, b"\xff"), 1007),
    ],
    ids=["RSV", "stray fragment", "message within", "UTF-8"],
)
async def test_an_error_comes_behind_what_was_sound_and_ends_the_inbox(
    wire: bytes, code: int
) -> None:
    async with open_bench() as bench:
        await bench.accept()
        await bench.peer.send(client_frame(TEXT, b"sound") + wire + client_frame(TEXT, b"behind"))
        assert await close_code(bench) == code
        assert await bench.messages() == [(TEXT, b"sound")]
        assert bench.lane.close_began_here
        assert bench.ends


# rule 5: after our Close only the peer's Close counts


@pytest.mark.parametrize("cut", range(0, 30, 3))
async def test_after_our_close_all_is_thrown_away_up_to_the_peers(cut: int) -> None:
    wire = client_frame(TEXT, b"text") + client_frame(PING, b"ping") + client_frame(TEXT, b"more")
    async with open_bench() as bench:
        await bench.accept()
        await bench.peer.send(wire[:cut])
        await wait_all_tasks_blocked()
        bench.lane.close(3000, "enough")
        await bench.peer.send(wire[cut:])
        await wait_all_tasks_blocked()
        assert not bench.lane.has_ended
        await bench.peer.send_close(3000)
        await bench.lane.wait_ended()
        got = []
        while True:
            got.append(await bench.peer.receive_frame())
            if got[-1][0] == CLOSE:
                break
        assert got[-1] == (CLOSE, close_frame(3000, "enough")[2:])
        assert len(got) <= 2  # at most a pong, for a ping that came before
        await wait_all_tasks_blocked()
        assert not bench.outbox.mail


async def test_closing_twice_sends_one_close() -> None:
    async with open_bench() as bench:
        await bench.accept()
        bench.lane.close(3000, "a")
        bench.lane.close(3001, "b")
        assert await close_code(bench) == 3000
        assert bench.lane.close_sent == (3000, "a")


# rule 6: the lane reads on while the session is busy, up to the inbox's bound


async def test_a_busy_session_leaves_all_but_a_few_batches_unread() -> None:
    limits = attrs.evolve(LIMITS, inbox_batches=4)
    async with open_bench(limits=limits) as bench:
        await bench.accept()
        for number in range(10):
            await bench.peer.send(client_frame(TEXT, b"%d" % number))
            await wait_all_tasks_blocked()
        assert not bench.lane.reading
        assert bench.lane.inbox.statistics().current_buffer_used == 4
        unread = len(await bench.stream.receive_some())
        assert unread == 5 * len(client_frame(TEXT, b"0"))
        await bench.peer.send(client_frame(TEXT, b"end"))
        taken = [await bench.lane.inbox.receive() for _ in range(6)]
        assert taken == [[(TEXT, b"%d" % n)] for n in range(5)] + [[(TEXT, b"end")]]
        await wait_all_tasks_blocked()
        assert bench.lane.reading


@pytest.mark.parametrize("fragments", [1, 4])
async def test_a_busy_session_leaves_large_messages_unread_too(fragments: int) -> None:
    limits = attrs.evolve(LIMITS, inbox_batches=32, inbox_bytes=2**21, max_message_bytes=2**20)
    piece = bytes(2**20 // fragments)
    message = client_frame(BINARY, piece, fin=fragments == 1)
    for left in range(fragments - 2, -1, -1):
        message += client_frame(CONTINUATION, piece, fin=left == 0)
    async with open_bench(limits=limits) as bench:
        await bench.accept()
        for _ in range(10):
            await bench.peer.send(message)
            await wait_all_tasks_blocked()
        waiting = bench.lane.inbox.statistics().current_buffer_used
        assert (waiting, bench.lane.reading) == (2, False)
        sizes = []
        for _ in range(10):
            batch = await bench.lane.inbox.receive()
            sizes += [len(data) for _, data in batch]
            await wait_all_tasks_blocked()
            # What was taken is held until it is dealt with.
            assert bench.lane.inbox.statistics().current_buffer_used < 2
            bench.lane.note_done(batch)
            await wait_all_tasks_blocked()
        assert sizes == [2**20] * 10
        assert bench.lane.reading


async def test_what_was_read_and_is_not_dealt_with_is_charged() -> None:
    limits = attrs.evolve(LIMITS, max_message_bytes=2**20)
    holding = Holding()
    message = client_frame(TEXT, b"x" * 100_000)
    async with open_bench(limits=limits, holding=holding) as bench:
        await bench.accept()
        await bench.peer.send(message[:10_000])
        await wait_all_tasks_blocked()
        assert holding.bytes == 0  # most reads of a busy publisher end so
        await bench.peer.send(message[10_000:60_000])
        await wait_all_tasks_blocked()
        assert holding.bytes == 10_000 + -(-50_000 // PIECE) * PIECE  # in whole pieces
        await bench.peer.send(message[60_000:])
        await wait_all_tasks_blocked()
        assert 100_000 < holding.bytes < 100_200
        batch = await bench.lane.inbox.receive()
        assert 100_000 < holding.bytes < 100_200
        bench.lane.note_done(batch)
        assert holding.bytes == 0


@pytest.mark.parametrize("size", [1000, 30_000, 100_000])
async def test_a_large_message_is_kept_in_the_pieces_that_came_until_it_is_whole(size: int) -> None:
    limits = attrs.evolve(LIMITS, max_message_bytes=2**20, inbox_bytes=2**22)
    payload = bytes(range(256)) * 4000
    wire = client_frame(BINARY, payload) + client_frame(TEXT, b"behind")
    async with open_bench(limits=limits) as bench:
        await bench.accept()
        for start in range(0, 1_000_000, size):
            await bench.peer.send(wire[start : min(start + size, 1_000_000)])
            await wait_all_tasks_blocked()
        tail = bench.lane._tail
        assert tail is not None
        assert len(bench.lane._buffer) + len(tail) == 1_000_000
        assert tail.held < len(tail) + PIECE, "small reads are put together"
        await bench.peer.send(wire[1_000_000:])
        await bench.peer.send_close()
        assert await bench.messages() == [(BINARY, payload), (TEXT, b"behind")]


async def test_a_close_of_ours_in_the_middle_of_a_large_message_passes_over_the_rest_of_it() -> (
    None
):
    limits = attrs.evolve(LIMITS, max_message_bytes=2**20)
    wire = client_frame(TEXT, bytes(2**20))
    async with open_bench(limits=limits) as bench:
        await bench.accept()
        await bench.peer.send(wire[:10_000])
        await wait_all_tasks_blocked()
        await bench.peer.send(wire[10_000:500_000])
        await wait_all_tasks_blocked()
        bench.lane.close(1000, "")
        await bench.peer.send(wire[500_000:])
        await wait_all_tasks_blocked()
        await bench.peer.send_close()
        await bench.lane.wait_ended()
        assert bench.lane.peer_close == (1000, "")


async def test_fragments_are_charged_while_their_message_is_open() -> None:
    limits = attrs.evolve(LIMITS, max_message_bytes=2**20)
    holding = Holding()
    async with open_bench(limits=limits, holding=holding) as bench:
        await bench.accept()
        await bench.peer.send(client_frame(TEXT, b"x" * 50_000, fin=False))
        await bench.peer.send(client_frame(CONTINUATION, b"y" * 30_000, fin=False))
        await wait_all_tasks_blocked()
        assert holding.bytes == 80_000
        await bench.peer.send(client_frame(CONTINUATION, b"z"))
        await wait_all_tasks_blocked()
        bench.lane.note_done(await bench.lane.inbox.receive())
        assert holding.bytes == 0


async def test_nothing_more_is_read_while_a_connection_holds_more_than_it_may() -> None:
    holding = Holding(MemoryBudget(connection_room=10_000))
    holding.charge(Part.WILLS, 9_000)
    async with open_bench(holding=holding) as bench:
        await bench.accept()
        for _ in range(5):
            await bench.peer.send(client_frame(TEXT, b"x" * 950))
            await wait_all_tasks_blocked()
        states = [bench.lane.reading]
        assert bench.lane.inbox.statistics().current_buffer_used == 1
        for count in (1, 4):  # those that wait come in one read
            batch = await bench.lane.inbox.receive()
            assert len(batch) == count
            await wait_all_tasks_blocked()
            states.append(bench.lane.reading)  # it is held until it is dealt with
            bench.lane.note_done(batch)
            await wait_all_tasks_blocked()
        assert [*states, bench.lane.reading] == [False, False, False, True]
        # What it holds for good keeps nobody from being heard: how else would it be taken back?
        holding.charge(Part.WILLS, 5_000)
        await bench.peer.send(client_frame(TEXT, b"take it back"))
        for _ in range(3):
            batch = await bench.lane.inbox.receive()
            assert batch == [(TEXT, b"take it back")]
            bench.lane.note_done(batch)
            await bench.peer.send(client_frame(TEXT, b"take it back"))


async def test_a_close_ends_the_wait_for_a_session_that_is_busy() -> None:
    limits = attrs.evolve(LIMITS, inbox_bytes=100)
    async with open_bench(limits=limits) as bench:
        await bench.accept()
        await bench.peer.send(client_frame(TEXT, b"x" * 100))
        await wait_all_tasks_blocked()
        assert not bench.lane.reading
        bench.lane.close(3000, "enough")
        assert await close_code(bench) == 3000
        await bench.peer.send_close(3000)
        await bench.lane.wait_ended()


async def test_a_ping_a_close_and_the_end_are_seen_before_the_messages_are_read() -> None:
    async with open_bench() as bench:
        await bench.accept()
        await bench.peer.send(client_frame(TEXT, b"a") + client_frame(PING, b"?"))
        assert await bench.peer.receive_frame() == (PONG, b"?")
        await bench.peer.send(client_frame(TEXT, b"b"))
        await bench.peer.send_close(4000, "bye")
        assert await bench.peer.receive_frame() == (CLOSE, close_frame(4000, "bye")[2:])
        assert bench.lane.peer_close == (4000, "bye")
        assert not bench.lane.close_began_here
        assert bench.ends
        assert await bench.messages() == [(TEXT, b"a"), (TEXT, b"b")]


async def test_the_end_of_the_stream_ends_the_inbox_behind_what_has_come() -> None:
    async with open_bench() as bench:
        await bench.accept()
        await bench.peer.send(client_frame(TEXT, b"a") + client_frame(TEXT, b"b")[:4])
        await bench.peer.aclose()
        assert await bench.messages() == [(TEXT, b"a")]
        assert bench.lane.eof
        assert bench.lane.peer_close is None


async def test_when_nothing_can_be_sent_the_inbox_ends() -> None:
    async with open_bench() as bench:
        await bench.accept()
        await bench.peer.send(client_frame(TEXT, b"a"))
        await wait_all_tasks_blocked()
        bench.lane.lost()
        assert await bench.messages() == [(TEXT, b"a")]
        await bench.lane.wait_ended()


# rule 7: the socket is the connection's to close


async def test_the_lane_leaves_the_stream_open(autojump_clock: MockClock) -> None:
    async with open_bench() as bench:
        await bench.accept()
        await bench.peer.send_close()
        await bench.lane.wait_ended()
        await wait_all_tasks_blocked()
        await bench.stream.send_all(b"still open")
        assert await bench.peer.receive_frame() == (CLOSE, b"\x03\xe8")
        with trio.move_on_after(5) as scope:
            await bench.peer.receive_eof()
        assert scope.cancelled_caught


async def test_each_close_of_a_peer_is_answered_before_its_socket_is_closed() -> None:
    async with open_test_broker(Broker()) as net:
        for _ in range(50):  # it was once a matter of which task ran first
            peer = await net.open_plain()
            await peer.send_close(4321, "bye")
            assert await peer.receive_close() == (4321, "bye")


# no message overtakes another

PIECES = st.lists(
    st.one_of(
        st.tuples(st.just("whole"), st.sampled_from([TEXT, BINARY]), st.text(max_size=200)),
        st.tuples(st.just("fragments"), st.sampled_from([TEXT, BINARY]), st.text(max_size=40)),
        st.tuples(st.just("ping"), st.just(PING), st.text(max_size=3)),
    ),
    max_size=12,
)


@given(PIECES, st.integers(1, 60))
@settings(deadline=None, max_examples=150)
def test_whichever_lane_a_message_takes_it_keeps_its_place(
    pieces: list[tuple[str, int, str]], size: int
) -> None:
    trio.run(_check_order, pieces, size)


async def _check_order(pieces: list[tuple[str, int, str]], size: int) -> None:
    wire = b""
    sent: list[Message] = []
    pings = []
    for kind, opcode, text in pieces:
        payload = text.encode()
        if kind == "ping":
            wire += client_frame(PING, payload)
            pings.append((PONG, payload))
            continue
        sent.append((opcode, payload))
        if kind == "whole":
            wire += client_frame(opcode, payload)
        else:
            third = len(payload) // 3
            wire += client_frame(opcode, payload[:third], fin=False)
            wire += client_frame(PING, b"within")
            pings.append((PONG, b"within"))
            wire += client_frame(CONTINUATION, payload[third : 2 * third], fin=False)
            wire += client_frame(CONTINUATION, payload[2 * third :])
    wire += client_frame(CLOSE)
    async with open_bench(limits=attrs.evolve(LIMITS, inbox_batches=1000)) as bench:
        await bench.accept()
        for start in range(0, len(wire), size):
            await bench.peer.send(wire[start : min(start + size, 1_000_000)])
            await trio.lowlevel.checkpoint()
        assert await bench.messages() == sent
        answers = [await bench.peer.receive_frame() for _ in range(len(pings) + 1)]
        assert answers == [*pings, (CLOSE, b"")]


@pytest.mark.parametrize("size", range(1, 30))
async def test_a_whole_message_behind_a_ping_takes_the_fast_lane(size: int) -> None:
    """The slow one takes five rounds of the loop, each as long as what others have to do."""
    wire = client_frame(PING) + client_frame(TEXT, b"a") + client_frame(PING) + client_frame(PONG)
    wire += client_frame(TEXT, b"b")
    async with open_bench() as bench:
        await bench.accept()
        for start in range(0, len(wire), size):
            await bench.peer.send(wire[start : start + size])
            await wait_all_tasks_blocked()
        assert bench.lane._slow is None
        assert [await bench.lane.inbox.receive() for _ in "ab"] == [[(TEXT, b"a")], [(TEXT, b"b")]]
        assert [(await bench.peer.receive_frame())[0] for _ in range(2)] == [PONG, PONG]
        await bench.peer.send(client_frame(TEXT, fin=False))
        await wait_all_tasks_blocked()
        assert bench.lane._slow is not None


# rule 8: behind a broken frame nothing is parsed


BROKEN = {
    "RSV": b"\xc1\x80" + bytes(4),
    "RSV, with a payload that looks like a Close": b"\xc1\x86" + bytes(4) + client_frame(CLOSE),
    "opcode": b"\x83\x80" + bytes(4),
    "not masked": b"\x81\x01x",
    "a long ping": b"\x89\xfe\x00\x7e" + bytes(4 + 126),
    "a ping of a length that is not the shortest": b"\x89\xfe\x00\x01" + bytes(5),
    "a fragment of a length that is not the shortest": (
        client_frame(TEXT, fin=False) + b"\x80\xfe\x00\x01" + bytes(5)
    ),
    "a split ping": b"\x09\x80" + bytes(4),
    "a fragment of nothing": client_frame(CONTINUATION, b"x"),
    "a message within another": client_frame(TEXT, fin=False) + client_frame(TEXT),
    "half a character": client_frame(TEXT, b"\xc3", fin=False) + client_frame(CONTINUATION),
}


@pytest.mark.parametrize("wire", BROKEN.values(), ids=BROKEN.keys())
@pytest.mark.parametrize("size", [1, 10**9], ids=["byte by byte", "at once"])
async def test_behind_a_broken_frame_nothing_counts_and_the_next_word_is_the_end(
    wire: bytes, size: int, autojump_clock: MockClock
) -> None:
    behind = (
        client_frame(TEXT, b"text") + client_frame(PING, b"?") + client_frame(CLOSE, b"\x0b\xb8")
    )
    async with open_bench() as bench:
        await bench.accept()
        for start in range(0, len(wire), size):
            await bench.peer.send(wire[start : min(start + size, 1_000_000)])
            await trio.sleep(0.01)
        assert await close_code(bench) in (1002, 1007)
        assert not bench.lane.has_ended
        await bench.peer.send(behind)
        await bench.lane.wait_ended()
        assert bench.lane.peer_close is None
        assert await bench.messages() == []
        assert not bench.outbox.mail


async def test_a_peer_that_goes_on_sending_and_does_not_read_our_close_is_read_slowly(
    autojump_clock: MockClock,
) -> None:
    async with open_bench(make_pair=lockstep_stream_pair) as bench:
        await bench.accept()
        sent = 0
        with trio.move_on_after(3):
            await bench.peer.send(BROKEN["RSV"])
            while True:
                await bench.peer.send(bytes(2**16))
                sent += 2**16
        assert 2**20 < sent < 4 * 2**20
        assert not bench.lane.has_ended
        assert await close_code(bench) == 1002
        await bench.peer.aclose()
        await bench.lane.wait_ended()


# rule 9: others get their turn, and whoever was sent away is not listened to for long


async def most_at_once(bench: Bench, wire: bytes) -> int:
    """How many bytes a lane deals with, at most, until another task has its turn.

    In a turn of all, Trio runs the tasks in any order: so that is up to two shares of the lane.
    """
    await bench.peer.send(wire)
    most, before = 0, len(wire)
    while before:
        await trio.lowlevel.checkpoint()
        # The bytes in the lane's buffer; before it has been read, all of them.
        left = len(bench.lane._buffer) if bench.lane.heard_at else before
        most, before = max(most, before - left), left
    return most


async def test_a_read_of_the_shortest_messages_comes_in_batches_with_turns_between() -> None:
    limits = attrs.evolve(LIMITS, inbox_batches=1000)
    async with open_bench(limits=limits) as bench:
        await bench.accept()
        await wait_all_tasks_blocked()
        bench.lane.heard_at = 0
        assert await most_at_once(bench, client_frame(TEXT) * 10_000) <= 2 * 1024 * 6
        await bench.peer.send_close()
        batches = [len(batch) async for batch in bench.lane.inbox]
        assert batches == [1024] * 9 + [10_000 - 9 * 1024]


async def test_an_ordinary_read_is_one_batch() -> None:
    async with open_bench() as bench:
        await bench.accept()
        await bench.peer.send(client_frame(TEXT, bytes(120)) * 500)
        assert len(await bench.lane.inbox.receive()) == 500


class CountingSlowLane(SlowLane):
    frames_put = 0

    async def put(self, slow: bytes) -> None:
        start = 0
        while (header := read_header(slow, start)) is not None:
            start += header.size + header.length
            self.frames_put += 1
        await super().put(slow)


@pytest.mark.parametrize("payload", [b"", b"x"])
async def test_fragments_that_come_together_reach_trio_websocket_as_few(payload: bytes) -> None:
    limits = attrs.evolve(LIMITS, max_fragments=10_000, max_message_bytes=20_000)
    async with open_bench(limits=limits) as bench:
        bench.lane._slow = slow = CountingSlowLane(bench.lane._answer)
        await slow.open(bench.nursery, limits.max_message_bytes)
        await bench.accept()
        await bench.peer.send(client_frame(TEXT, b"a", fin=False))
        await bench.peer.send(client_frame(CONTINUATION, payload, fin=False) * 5_000)
        await bench.peer.send(client_frame(CONTINUATION, b"z"))
        assert await bench.lane.inbox.receive() == [(TEXT, b"a" + payload * 5_000 + b"z")]
        assert slow.frames_put < 50


@pytest.mark.parametrize("size", [1, 7, 10**9])
@pytest.mark.parametrize("behind", [0, 100_000])
async def test_the_peers_close_is_found_behind_whatever_it_had_sent(size: int, behind: int) -> None:
    wire = (
        client_frame(TEXT) * 20 + client_frame(BINARY, bytes(200)) + client_frame(PONG, b"x" * 125)
    )
    wire += client_frame(BINARY, bytes(behind)) + client_frame(TEXT, b"a", fin=False)
    wire += client_frame(CONTINUATION, b"b") + client_frame(CLOSE, b"\x0b\xb8")
    if size < 10:
        wire = wire[-40_000:] if behind == 0 else client_frame(CLOSE, b"\x0b\xb8")
    async with open_bench() as bench:
        await bench.accept()
        await wait_all_tasks_blocked()
        bench.lane.close(3000, "enough")
        for start in range(0, len(wire), size):
            await bench.peer.send(wire[start : min(start + size, 1_000_000)])
            await trio.lowlevel.checkpoint()
        await bench.lane.wait_ended()
        assert bench.lane.peer_close == (3000, "")
        assert await bench.messages() == []


async def test_passing_over_what_nobody_wants_gives_turns_to_others() -> None:
    async with open_bench() as bench:
        await bench.accept()
        await wait_all_tasks_blocked()
        bench.lane.close(3000, "enough")
        bench.lane.heard_at = 0
        assert await most_at_once(bench, client_frame(TEXT) * 10_000) <= 2 * 4096 * 6


@pytest.mark.parametrize(
    ("frame", "count"),
    [(client_frame(TEXT), 66_000), (client_frame(BINARY, bytes(10**6)), 11)],
    ids=["frames", "bytes"],
)
async def test_a_peer_that_goes_on_for_long_after_our_close_has_ended(
    frame: bytes, count: int, autojump_clock: MockClock
) -> None:
    async with open_bench() as bench:
        await bench.accept()
        await wait_all_tasks_blocked()
        bench.lane.close(3000, "enough")
        assert await close_code(bench) == 3000
        await bench.peer.send(frame * (count // 2))
        await trio.sleep(1)
        assert not bench.lane.has_ended
        await bench.peer.send(frame * count)
        with trio.fail_after(1):
            await bench.lane.wait_ended()
        assert bench.lane.peer_close is None


async def test_a_flood_of_pings_is_answered_up_to_the_burst_and_not_looked_at_beyond(
    autojump_clock: MockClock,
) -> None:
    async with open_bench() as bench:
        began = trio.current_time()
        await bench.accept()
        await bench.peer.send(client_frame(PING, b"?") * 5_000 + client_frame(CLOSE, b"\x03\xf0"))
        answers = [await bench.peer.receive_frame() for _ in range(101)]
        assert [opcode for opcode, _ in answers] == [PONG] * 100 + [CLOSE]
        await bench.lane.wait_ended()
        assert bench.lane.peer_close == (1008, "")
        assert trio.current_time() < began + 5
