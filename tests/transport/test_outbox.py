"""The output of an outbox: whole frames, in order, all but those that a rule has dropped."""

import os
import socket
import ssl
import tracemalloc
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import TypeAlias

import pytest
import trio
import trustme
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import (
    MockClock,
    lockstep_stream_pair,
    memory_stream_pair,
    wait_all_tasks_blocked,
)

from broker.core.session import SlowRule
from broker.transport import frames
from broker.transport.outbox import Offer, Outbox
from broker.transport.runs import LateRun, Run
from broker.transport.sockets import RelayStream
from tests.transport.calls import Calls

StreamPair: TypeAlias = tuple[trio.abc.Stream, trio.abc.Stream]


def narrow_socket_pair() -> StreamPair:
    """A connected pair of real sockets that holds a few kilobytes and then would block."""
    ours, theirs = trio.socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the system makes the least of it
    return trio.SocketStream(ours), trio.SocketStream(theirs)


AUTHORITY = trustme.CA(key_type=trustme.KeyType.ECDSA)


def tls_pair() -> StreamPair:
    """TLS over memory; `open_desk` sees to the handshake."""
    return tls_over(*memory_stream_pair())


def tls_over(ours: trio.abc.Stream, theirs: trio.abc.Stream) -> StreamPair:
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    AUTHORITY.issue_cert("testserver").configure_cert(server)
    client = ssl.create_default_context()
    AUTHORITY.configure_trust(client)
    return (
        trio.SSLStream(ours, server, server_side=True),
        trio.SSLStream(theirs, client, server_hostname="testserver"),
    )


PAIRS: dict[str, Callable[[], StreamPair]] = {
    "socket": narrow_socket_pair,
    "lockstep": lockstep_stream_pair,
    "memory": memory_stream_pair,
    "tls": tls_pair,
}


def roomy_tcp_pair() -> StreamPair:
    """TCP whose sending side holds far more than its receiving side takes at a time."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        ours = socket.socket()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 400_000)
        ours.connect(listener.getsockname())
        peer, _ = listener.accept()
    ours_async, peer_async = map(trio.socket.from_stdlib_socket, (ours, peer))
    return trio.SocketStream(ours_async), trio.SocketStream(peer_async)


def wide_socket_pair() -> StreamPair:
    """A connected pair of real sockets that holds a megabyte."""
    ours, theirs = trio.socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**20)
    return trio.SocketStream(ours), trio.SocketStream(theirs)


class Relay(RelayStream):
    """Passes on what it is given, in pieces."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.transport_stream = stream

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        for start in range(0, len(data), 1000):
            await self.transport_stream.send_all(data[start : start + 1000])
            self.pieces += 1

    async def wait_send_all_might_not_block(self) -> None:
        await self.transport_stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        return await self.transport_stream.receive_some(max_bytes)

    async def aclose(self) -> None:
        await self.transport_stream.aclose()


def relay_pair() -> StreamPair:
    ours, theirs = lockstep_stream_pair()
    return Relay(ours), theirs


def relay_memory_pair() -> StreamPair:
    ours, theirs = memory_stream_pair()
    return Relay(ours), theirs


def relay_tcp_pair() -> StreamPair:
    ours, theirs = roomy_tcp_pair()
    return Relay(ours), theirs


def tls_tcp_pair() -> StreamPair:
    ours, theirs = roomy_tcp_pair()
    return tls_over(ours, theirs)


every_stream = pytest.mark.parametrize("make_pair", PAIRS.values(), ids=PAIRS.keys())
blocking_streams = pytest.mark.parametrize(
    "make_pair", [narrow_socket_pair, lockstep_stream_pair], ids=["socket", "lockstep"]
)


class Desk:
    """An outbox, its peer, and what the outbox had to say."""

    def __init__(
        self, nursery: trio.Nursery, pair: StreamPair, max_bytes: int, max_messages: int
    ) -> None:
        self.ours, self.peer = pair
        self.posted = 0
        self.slow = 0
        self.broken = 0
        self.dropped: Counter[str] = Counter()
        self.on_slow: Callable[[], object] = lambda: None
        self.outbox = Outbox(
            self.ours,
            post=self._post,
            owner=Calls(
                start=nursery.start_soon, slow=self._slow, dropped=self._drop, broken=self._broken
            ),
            max_bytes=max_bytes,
            max_messages=max_messages,
            stall_seconds=10,
        )

    def _post(self, outboxes: list[Outbox]) -> None:
        assert outboxes == [self.outbox]
        self.posted += 1

    def _slow(self) -> None:
        self.slow += 1
        self.on_slow()

    def _drop(self, dropped: Mapping[str, int]) -> None:
        self.dropped.update(dropped)

    def _broken(self) -> None:
        self.broken += 1

    def waiting(self) -> list[bytes]:
        return [frame for run in self.outbox.mail for frame in run.frames[run.first :]]

    def counts(self) -> tuple[int, int, int, bool]:
        """Bytes and messages that wait, messages that were dropped, and whether it is blocked."""
        now = self.outbox.statistics()
        return now.bytes_waiting, now.messages_waiting, now.messages_dropped, now.blocked

    async def block(self) -> bytes:
        """Offer one large frame and have it begun, so that the stream takes no more."""
        frame = frames.encode(frames.BINARY, bytes(300_000))
        self.outbox.offer(Run((frame,)))
        self.outbox.flush(trio.current_time())
        await wait_all_tasks_blocked()
        assert self.outbox.mail
        return frame

    async def read_frames(self, wanted: int = 10**9) -> list[bytes]:
        """Read whole frames until there were `wanted`, or all is out."""
        wire = bytearray()
        taken: list[bytes] = []
        while len(taken) < wanted:
            while (header := frames.read_header(wire)) and len(wire) >= sum(header[4:]):
                size = header.size + header.length
                taken.append(bytes(wire[:size]))
                del wire[:size]
            if len(taken) >= wanted:
                break
            with trio.move_on_after(1) as scope:
                wire += await self.peer.receive_some(10_000)
            if scope.cancelled_caught:
                break
        assert not wire
        return taken


@asynccontextmanager
async def open_desk(
    make_pair: Callable[[], StreamPair] = narrow_socket_pair,
    *,
    max_bytes: int = 10**9,
    max_messages: int = 10**9,
) -> AsyncGenerator[Desk, None]:
    pair = make_pair()
    async with trio.open_nursery() as nursery:
        for stream in pair:
            if isinstance(stream, trio.SSLStream):
                nursery.start_soon(stream.do_handshake)
    async with trio.open_nursery() as nursery:
        yield Desk(nursery, pair, max_bytes, max_messages)
        nursery.cancel_scope.cancel()
    for stream in pair:
        await trio.aclose_forcefully(stream)


def text(content: object, size: int = 0) -> bytes:
    return frames.text_frame(str(content).encode().ljust(size, b"."))


def run_of(*contents: object, topic: str = "t", rule: SlowRule = "close", size: int = 0) -> Run:
    return Run([text(content, size) for content in contents], topic, rule)


def contents(taken: list[bytes]) -> list[str]:
    """The texts that `text` was given; a frame that `Desk.block` sent is left out."""
    return [frame[2:].decode().rstrip(".") for frame in taken if len(frame) < 128]


# going out


@every_stream
async def test_frames_arrive_whole_and_in_order(
    make_pair: Callable[[], StreamPair], autojump_clock: MockClock
) -> None:
    async with open_desk(make_pair) as desk:
        sent = [frames.encode(frames.BINARY, bytes([n % 256]) * (n * 37)) for n in range(200)]
        for n in range(0, 200, 2):
            assert desk.outbox.offer(Run(sent[n : n + 2])) is Offer.TAKEN
        desk.outbox.flush(trio.current_time())
        assert await desk.read_frames(200) == sent
        await wait_all_tasks_blocked()
        assert desk.counts() == (0, 0, 0, False)
        assert not desk.outbox.mail


async def test_nothing_is_written_before_flush_and_the_post_is_told_once() -> None:
    async with open_desk() as desk:
        desk.outbox.offer(run_of("a", "b"))
        desk.outbox.offer(run_of("c"))
        assert desk.posted == 1
        assert desk.counts() == (9, 3, 0, False)
        desk.outbox.flush(trio.current_time())
        assert contents(await desk.read_frames(3)) == ["a", "b", "c"]
        desk.outbox.offer(run_of("d"))
        assert desk.posted == 2


async def test_a_socket_with_room_is_written_to_at_once_without_a_task() -> None:
    async with open_desk() as desk:
        desk.outbox.offer(run_of("a"))
        tasks = len(trio.lowlevel.current_task().child_nurseries[-1].child_tasks)
        desk.outbox.flush(trio.current_time())
        assert len(trio.lowlevel.current_task().child_nurseries[-1].child_tasks) == tasks == 0
        assert not desk.outbox.mail


@blocking_streams
async def test_bytes_and_messages_waiting_go_down_as_the_peer_takes_them(
    make_pair: Callable[[], StreamPair], autojump_clock: MockClock
) -> None:
    async with open_desk(make_pair) as desk:
        frame = await desk.block()
        before = desk.outbox.statistics()
        assert before.messages_waiting == 1
        assert len(frame) - 2**16 <= before.bytes_waiting <= len(frame)
        desk.outbox.offer(run_of("a", "b"))
        assert desk.outbox.statistics().bytes_waiting == before.bytes_waiting + 6
        assert desk.outbox.statistics().messages_waiting == 3
        await desk.peer.receive_some(70_000)
        await wait_all_tasks_blocked()
        after = desk.outbox.statistics()
        assert 0 < after.bytes_waiting < before.bytes_waiting + 6
        assert after.messages_waiting == 3


async def test_control_frames_are_weighed_but_are_no_messages() -> None:
    async with open_desk() as desk:
        desk.outbox.offer(Run((frames.encode(frames.PING, b"x"),), messages=0))
        assert desk.counts() == (3, 0, 0, False)


# bounds


@pytest.mark.parametrize(
    ("bound", "fits", "too_many"),
    [({"max_messages": 4}, 3, 4), ({"max_bytes": 300_014 + 3 * 102}, 3, 4)],
    ids=["messages", "bytes"],
)
@blocking_streams
async def test_over_its_bound_an_outbox_is_slow_and_not_before(
    make_pair: Callable[[], StreamPair], bound: dict[str, int], fits: int, too_many: int
) -> None:
    async with open_desk(make_pair, **bound) as desk:
        await desk.block()
        if "max_bytes" in bound:  # what the system has taken does not count
            desk.outbox.bound(desk.outbox.bytes + fits * 102, 10**9)
        for n in range(fits):
            assert desk.outbox.offer(run_of(n, size=100)) is Offer.TAKEN
        await wait_all_tasks_blocked()
        assert desk.slow == 0
        desk.outbox.offer(run_of(too_many, size=100))
        await wait_all_tasks_blocked()
        assert desk.slow == 1
        assert not desk.dropped


async def test_an_outbox_weighs_what_no_other_holds() -> None:
    async with open_desk(max_bytes=1000) as desk:
        assert desk.outbox.own_bytes() == 0
        await desk.block()
        others: list[Run] = []
        for n in range(300):
            others += [run_of(n, size=100)] * 99
            desk.outbox.offer(others[-1])
        # A hundredth of 30,600 bytes, and all of the frame that was there before.
        waiting = desk.outbox.bytes
        assert waiting - 31_000 < desk.outbox.own_bytes() < waiting
        desk.outbox.abandon()
        assert desk.outbox.own_bytes() == 0


async def test_a_large_reply_is_its_askers_alone_however_much_waits_behind_it() -> None:
    async with open_desk(lockstep_stream_pair, max_bytes=1000, max_messages=10**6) as desk:
        others = [run_of(n) for n in range(20_000)]
        for run in others[:100]:
            desk.outbox.offer(run)
        desk.outbox.offer_reply(Run((text("reply", 500_000),)))
        for run in others[100:]:
            desk.outbox.offer(run)
        assert desk.outbox.own_bytes() > 500_000


async def test_a_full_outbox_of_a_socket_says_so() -> None:
    async with open_desk(max_messages=1) as desk:
        await desk.block()
        desk.on_slow = desk.outbox.seal
        assert desk.outbox.offer(run_of("a")) is Offer.FULL
        assert desk.outbox.offer(run_of("b")) is Offer.SEALED


@every_stream
async def test_a_burst_that_the_stream_takes_is_no_reason_to_cut(
    make_pair: Callable[[], StreamPair], autojump_clock: MockClock
) -> None:
    async with (
        open_desk(make_pair, max_bytes=2000, max_messages=10) as desk,
        trio.open_nursery() as n,
    ):
        taken: list[bytes] = []

        async def read() -> None:
            taken.extend(await desk.read_frames(3000))

        n.start_soon(read)
        for burst in range(60):
            for number in range(50):
                desk.outbox.offer(run_of(burst * 50 + number))
                if number == 8:
                    desk.outbox.flush(trio.current_time())
                    # The rest comes while a write is on its way through the stream.
                    for _ in range(burst % 4):
                        await trio.lowlevel.checkpoint()
            desk.outbox.flush(trio.current_time())
            await wait_all_tasks_blocked()
        await trio.sleep(5)
        assert desk.slow == 0
        assert contents(taken) == [str(number) for number in range(3000)]


@blocking_streams
async def test_a_reply_makes_itself_room_until_it_is_out(
    make_pair: Callable[[], StreamPair], autojump_clock: MockClock
) -> None:
    async with open_desk(make_pair, max_bytes=1000) as desk:
        reply = Run((frames.encode(frames.BINARY, bytes(500_000)),))
        assert desk.outbox.offer_reply(reply) is Offer.TAKEN
        desk.outbox.flush(trio.current_time())
        await wait_all_tasks_blocked()
        assert desk.outbox.max_bytes > 500_000
        # Beside it there is room for what there always was; not for more.
        while desk.outbox.bytes + 102 <= desk.outbox.max_bytes:
            desk.outbox.offer(run_of("a", size=100))
        await wait_all_tasks_blocked()
        assert desk.slow == 0
        assert desk.outbox.bytes <= 500_000 + 10 + 1000
        taken = await desk.read_frames()
        assert len(taken[0]) == len(reply.data)
        assert not desk.outbox.replies_wait
        await desk.block()
        for _ in range(3):
            desk.outbox.offer(run_of("b", size=100))
        await wait_all_tasks_blocked()
        assert desk.slow


@blocking_streams
async def test_another_bound_leaves_a_reply_its_room_until_it_is_out(
    make_pair: Callable[[], StreamPair], autojump_clock: MockClock
) -> None:
    async with open_desk(make_pair, max_bytes=1000) as desk:
        desk.outbox.bound(2000, 50)
        assert (desk.outbox.max_bytes, desk.outbox.replies_wait) == (2000, False)
        desk.outbox.offer_reply(Run((frames.encode(frames.BINARY, bytes(500_000)),)))
        desk.outbox.bound(3000, 60)
        desk.outbox.flush(trio.current_time())
        await wait_all_tasks_blocked()
        assert desk.outbox.offer(run_of("a", size=100)) is Offer.TAKEN
        assert (desk.slow, desk.outbox.replies_wait) == (0, True)
        await desk.read_frames()
        assert (desk.outbox.max_bytes, desk.outbox.max_messages) == (3000, 60)


async def test_small_replies_widen_no_bound() -> None:
    async with open_desk(max_bytes=1000) as desk:
        for _ in range(8):
            desk.outbox.offer_reply(run_of("a", size=100))
        assert not desk.outbox.replies_wait
        assert desk.outbox.max_bytes == 1000


async def test_a_peer_that_has_just_made_room_is_not_slow() -> None:
    async with open_desk(max_bytes=300_100) as desk:
        await desk.block()
        desk.outbox.bound(desk.outbox.bytes, 10**9)
        assert isinstance(desk.peer, trio.SocketStream)
        os.read(desk.peer.socket.fileno(), 10_000)  # no checkpoint: the writer task still waits
        assert desk.outbox.offer(run_of("a")) is Offer.TAKEN
        assert desk.slow == 0


# the rules


@blocking_streams
async def test_drop_oldest_drops_just_as_many_as_it_must(
    make_pair: Callable[[], StreamPair], autojump_clock: MockClock
) -> None:
    async with open_desk(make_pair, max_messages=6) as desk:
        await desk.block()
        desk.outbox.offer(run_of(0, 1, 2, topic="a", rule="drop_oldest"))
        desk.outbox.offer(Run((text("reply"),)))
        desk.outbox.offer(run_of(3, topic="b", rule="drop_oldest"))
        assert not desk.dropped
        # Nine in all: three too many, of which two are the front of a run.
        desk.outbox.offer(run_of(4, 5, topic="b", rule="drop_oldest"))
        await wait_all_tasks_blocked()
        assert desk.dropped == {"a": 2}
        assert desk.outbox.statistics().messages_waiting == 6
        desk.outbox.offer(run_of(6, 7, topic="b", rule="drop_oldest"))
        await wait_all_tasks_blocked()
        assert desk.dropped == {"a": 3, "b": 1}
        assert desk.outbox.statistics().messages_dropped == 4
        assert desk.slow == 0
        assert contents(await desk.read_frames()) == ["reply", "4", "5", "6", "7"]


async def test_drop_oldest_goes_by_bytes_as_well() -> None:
    async with open_desk() as desk:
        await desk.block()
        desk.outbox.bound(desk.outbox.bytes + 3 * 102, 10**9)
        for n in range(5):
            desk.outbox.offer(run_of(n, rule="drop_oldest", size=100))
        assert desk.dropped == {"t": 2}
        desk.outbox.offer(run_of("x" * 50, rule="drop_oldest", size=100))
        assert desk.dropped == {"t": 3}


@blocking_streams
async def test_latest_keeps_the_newest_of_each_topic_and_all_else(
    make_pair: Callable[[], StreamPair], autojump_clock: MockClock
) -> None:
    async with open_desk(make_pair, max_messages=6) as desk:
        await desk.block()
        desk.outbox.offer(run_of("a1", "a2", topic="a", rule="latest"))
        desk.outbox.offer(Run((text("reply"),)))
        desk.outbox.offer(run_of("b1", topic="b", rule="latest"))
        desk.outbox.offer(run_of("c1", topic="c", rule="close"))
        desk.outbox.offer(run_of("a3", "a4", topic="a", rule="latest"))
        await wait_all_tasks_blocked()
        assert desk.dropped == {"a": 3}
        assert desk.slow == 0
        assert contents(await desk.read_frames()) == ["reply", "b1", "c1", "a4"]


@pytest.mark.parametrize("rule", ["drop_oldest", "latest"])
async def test_when_dropping_does_not_help_the_peer_is_slow(rule: SlowRule) -> None:
    async with open_desk(max_messages=3) as desk:
        await desk.block()
        for n in range(3):
            desk.outbox.offer(Run((text(n),)))
        assert desk.slow == 1  # by the replies alone
        desk.outbox.offer(run_of("a", rule=rule))
        assert desk.slow == 2


@blocking_streams
async def test_a_run_that_has_begun_to_go_out_is_not_dropped(
    make_pair: Callable[[], StreamPair], autojump_clock: MockClock
) -> None:
    async with open_desk(make_pair, max_messages=3) as desk:
        big = [frames.text_frame(bytes([65 + n]) * 150_000) for n in range(2)]
        desk.outbox.offer(Run(big, "t", "drop_oldest"))
        desk.outbox.flush(trio.current_time())
        await wait_all_tasks_blocked()
        desk.outbox.offer(run_of(0, 1, 2, rule="drop_oldest"))
        await wait_all_tasks_blocked()
        assert desk.dropped == {"t": 2}
        assert await desk.read_frames() == [*big, text(2)]


@blocking_streams
async def test_a_topic_that_is_dropped_is_gone_but_for_what_has_begun(
    make_pair: Callable[[], StreamPair], autojump_clock: MockClock
) -> None:
    async with open_desk(make_pair) as desk:
        big = frames.text_frame(b"x" * 150_000)
        desk.outbox.offer(Run((big,), "t"))
        desk.outbox.flush(trio.current_time())
        await wait_all_tasks_blocked()
        desk.outbox.offer(run_of(0, 1))
        desk.outbox.offer(run_of("kept", topic="u"))
        desk.outbox.offer(run_of(2))
        desk.outbox.drop_topic("t")
        assert desk.outbox.statistics().messages_dropped == 3
        assert await desk.read_frames() == [big, text("kept")]


# ends


@blocking_streams
async def test_discard_finishes_the_frame_that_is_on_its_way_and_counts_the_others(
    make_pair: Callable[[], StreamPair], autojump_clock: MockClock
) -> None:
    async with open_desk(make_pair) as desk:
        big = [frames.text_frame(bytes([65 + n]) * 150_000) for n in range(3)]
        desk.outbox.offer(Run(big, "t"))
        desk.outbox.flush(trio.current_time())
        await wait_all_tasks_blocked()
        desk.outbox.offer(run_of("a", "b"))
        assert desk.outbox.discard() == 4
        close = frames.close_frame(1000)
        desk.outbox.seal(Run((close,), messages=0))
        assert await desk.read_frames() == [big[0], close]
        assert desk.outbox.statistics().bytes_waiting == 0


async def test_discard_drops_a_frame_of_which_no_byte_is_on_its_way(
    autojump_clock: MockClock,
) -> None:
    async with open_desk(lockstep_stream_pair) as desk:
        chunk = frames.encode(frames.BINARY, bytes(2**16 - 4))
        desk.outbox.offer(Run((chunk, text("a"))))
        desk.outbox.flush(trio.current_time())
        await wait_all_tasks_blocked()
        assert desk.outbox.discard() == 1
        assert await desk.read_frames() == [chunk]


async def test_discard_of_what_has_not_begun_leaves_nothing() -> None:
    async with open_desk() as desk:
        desk.outbox.offer(run_of("a", "b"))
        desk.outbox.offer(run_of("c"))
        assert desk.outbox.discard() == 3
        assert desk.counts() == (0, 0, 0, False)


async def test_a_sealed_outbox_takes_nothing_and_still_empties() -> None:
    async with open_desk() as desk:
        desk.outbox.offer(run_of("a"))
        desk.outbox.seal(run_of("last"))
        desk.outbox.seal(run_of("no"))
        assert desk.outbox.offer(run_of("no")) is Offer.SEALED
        desk.outbox.flush(trio.current_time())
        assert contents(await desk.read_frames(2)) == ["a", "last"]


async def test_a_seal_with_a_last_word_is_posted() -> None:
    async with open_desk() as desk:
        desk.outbox.seal(run_of("last"))
        assert desk.posted == 1


@blocking_streams
async def test_a_peer_that_takes_nothing_for_the_stall_time_is_given_up(
    make_pair: Callable[[], StreamPair], autojump_clock: MockClock
) -> None:
    async with open_desk(make_pair) as desk:
        await desk.block()
        broken = []
        for pause in (9.9, 0.2, 20):
            await trio.sleep(pause)
            broken.append(desk.broken)
        assert broken == [0, 1, 1]
        assert desk.outbox.stalled
        assert desk.outbox.offer(run_of("a")) is Offer.SEALED


async def test_a_peer_that_takes_a_little_now_and_then_is_not_given_up(
    autojump_clock: MockClock,
) -> None:
    async with open_desk(lockstep_stream_pair) as desk:
        await desk.block()  # five chunks
        for _ in range(4):
            await trio.sleep(9)
            await desk.peer.receive_some(2**16)
        assert not desk.broken
        assert not desk.outbox.stalled


async def test_a_slow_reader_whose_socket_does_not_turn_writable_is_not_given_up(
    autojump_clock: MockClock,
) -> None:
    async with open_desk(roomy_tcp_pair) as desk:
        desk.outbox.offer(Run((bytes(4_000_000),)))
        desk.outbox.flush(trio.current_time())
        for _ in range(4):
            await trio.sleep(9)
            assert desk.outbox.blocked
            await desk.peer.receive_some(20_000)
        assert not desk.outbox.stalled
        await trio.sleep(21)
        assert desk.outbox.stalled


@every_stream
async def test_a_dead_stream_is_told_of_once(make_pair: Callable[[], StreamPair]) -> None:
    async with open_desk(make_pair) as desk:
        await trio.aclose_forcefully(desk.peer)
        for _ in range(3):
            desk.outbox.offer(run_of("a"))
            desk.outbox.flush(trio.current_time())
            await wait_all_tasks_blocked()
        assert desk.broken == 1
        assert not desk.outbox.stalled
        assert desk.outbox.sealed


async def test_a_socket_that_dies_while_it_is_full_breaks_the_outbox_and_not_the_sender() -> None:
    async with open_desk(max_messages=1) as desk:
        await desk.block()
        assert isinstance(desk.peer, trio.SocketStream)
        desk.peer.socket.close()  # no checkpoint, so the writer task has not seen it
        desk.outbox.offer(run_of("a"))
        assert desk.broken == 1
        assert desk.slow == 0
        assert desk.outbox.offer(run_of("b")) is Offer.SEALED


async def test_a_write_that_was_cut_off_is_followed_by_nothing(autojump_clock: MockClock) -> None:
    ours, peer = lockstep_stream_pair()
    async with trio.open_nursery() as outer:
        async with trio.open_nursery() as io:
            desk = Desk(io, (ours, peer), 10**9, 10**9)
            await desk.block()
            io.cancel_scope.cancel()
        assert desk.broken == 1
        assert not desk.outbox.stalled
        assert desk.outbox.offer(run_of("a")) is Offer.SEALED
        desk.outbox.flush(trio.current_time())
        got = bytearray()

        async def read() -> None:
            with trio.move_on_after(5):
                while True:
                    got.extend(await peer.receive_some())

        outer.start_soon(read)
    assert len(got) == 2**16  # the chunk that was on its way, a fifth of the frame


@blocking_streams
async def test_after_abandon_not_another_byte(
    make_pair: Callable[[], StreamPair], autojump_clock: MockClock
) -> None:
    async with open_desk(make_pair) as desk:
        desk.outbox.offer(run_of("a"))
        desk.outbox.abandon()
        assert desk.outbox.offer(run_of("b")) is Offer.SEALED
        desk.outbox.flush(trio.current_time())
        await wait_all_tasks_blocked()
        assert await desk.read_frames() == []


@blocking_streams
async def test_wait_empty_waits_for_the_last_byte(
    make_pair: Callable[[], StreamPair], autojump_clock: MockClock
) -> None:
    async with open_desk(make_pair) as desk, trio.open_nursery() as nursery:
        await desk.outbox.wait_empty()
        frame = await desk.block()
        empty: list[bool] = []

        async def wait() -> None:
            await desk.outbox.wait_empty()
            empty.append(not desk.outbox.mail)

        nursery.start_soon(wait)
        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        assert not empty
        assert await desk.read_frames(1) == [frame]
        await wait_all_tasks_blocked()
        assert empty == [True, True]


@pytest.mark.parametrize("end", ["abandon", "discard"])
async def test_wait_empty_ends_when_there_is_nothing_left_to_wait_for(end: str) -> None:
    async with open_desk() as desk, trio.open_nursery() as nursery:
        desk.outbox.offer(run_of("a"))
        nursery.start_soon(desk.outbox.wait_empty)
        await wait_all_tasks_blocked()
        getattr(desk.outbox, end)()


# all of it at once, against a list

Step: TypeAlias = tuple[str, int, int, int]

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("publish"), st.integers(0, 2), st.integers(1, 5), st.integers(1, 3000)),
        st.tuples(st.just("late"), st.integers(0, 2), st.just(1), st.integers(1, 3000)),
        st.tuples(st.just("reply"), st.just(0), st.just(1), st.integers(1, 200)),
        st.tuples(st.just("ping"), st.just(0), st.just(0), st.just(0)),
        st.tuples(st.just("flush"), st.just(0), st.just(0), st.just(0)),
        st.tuples(st.just("read"), st.integers(1, 9000), st.just(0), st.just(0)),
        st.tuples(st.just("drop_topic"), st.integers(0, 2), st.just(0), st.just(0)),
        st.tuples(st.just("rest"), st.just(0), st.just(0), st.just(0)),
    ),
    min_size=5,
    max_size=60,
)


@pytest.mark.parametrize("kind", ["socket", "lockstep"])
@given(
    st.sampled_from(["close", "drop_oldest", "latest"]),
    st.integers(2, 12),
    st.integers(1, 9),
    STEPS,
)
@settings(deadline=None, max_examples=60)
def test_an_outbox_gives_out_all_that_was_not_dropped(
    kind: str, rule: SlowRule, max_messages: int, max_kilobytes: int, steps: list[Step]
) -> None:
    trio.run(
        _run_model,
        PAIRS[kind],
        rule,
        max_messages,
        max_kilobytes * 1000,
        steps,
        clock=MockClock(autojump_threshold=0),
    )


async def _run_model(
    make_pair: Callable[[], StreamPair],
    rule: SlowRule,
    max_messages: int,
    max_bytes: int,
    steps: list[Step],
) -> None:
    offered: list[bytes] = []
    wire = bytearray()
    largest = 0
    async with open_desk(make_pair, max_bytes=max_bytes, max_messages=max_messages) as desk:
        outbox = desk.outbox
        for what, which, count, size in steps:
            names = [b"t%d%06d" % (which, len(offered) + n) for n in range(max(1, count))]
            if what == "publish":
                made = [frames.text_frame(b"." * size + name) for name in names]
                run = Run(made, f"t{which}", rule)
            elif what == "late":
                (frame,) = made = [frames.text_frame(b"." * size + names[0])]
                run = LateRun((frame[:3], frame[3:-2], frame[-2:]), f"t{which}", rule, None)
            elif what == "reply":
                made = [frames.text_frame(b"." * size + b"--" + names[0][2:])]
                run = Run(made)
            elif what == "ping":
                made = [frames.encode(frames.PING, b"--" + names[0][2:])]
                run = Run(made, messages=0)
            else:
                if what == "flush":
                    outbox.flush(trio.current_time())
                elif what == "read":
                    with trio.move_on_after(1):
                        wire += await desk.peer.receive_some(which)
                elif what == "drop_topic":
                    before = outbox.statistics().messages_dropped
                    outbox.drop_topic(f"t{which}")
                    desk.dropped[f"t{which}"] += outbox.statistics().messages_dropped - before
                else:
                    await wait_all_tasks_blocked()
                continue
            slow_before = desk.slow
            offer = outbox.offer(run)
            assert offer is (Offer.FULL if desk.slow > slow_before else Offer.TAKEN)
            offered += made
            assert outbox.messages <= len(desk.waiting())
            # Frames of one run begin to go out together.
            largest = max(largest, run.size)
            if outbox.blocked and not desk.slow:
                assert outbox.bytes <= outbox.max_bytes <= max_bytes * 5 // 4 + 2 * largest
                assert outbox.messages <= max_messages
        outbox.flush(trio.current_time())
        with trio.move_on_after(1) as scope:
            while True:
                wire += await desk.peer.receive_some(5000)
                scope.deadline = trio.current_time() + 1
        assert (outbox.bytes, outbox.messages) == (0, 0)
    taken: list[bytes] = []
    while wire:
        header = frames.read_header(wire)
        assert header is not None
        size = header.size + header.length
        assert len(wire) >= size
        taken.append(bytes(wire[:size]))
        del wire[:size]
    remaining = iter(offered)
    assert all(frame in remaining for frame in taken)  # in order, none twice
    missing = set(offered) - set(taken)
    assert Counter(frame[-8:-6].decode() for frame in missing) == +desk.dropped
    assert desk.dropped.total() == outbox.statistics().messages_dropped


# what waits costs no more per wake-up, whatever its size


@pytest.mark.parametrize("make_pair", [narrow_socket_pair, lockstep_stream_pair, tls_tcp_pair])
async def test_a_slow_reader_of_a_large_reply_has_nothing_copied_but_what_it_takes(
    make_pair: Callable[[], StreamPair], autojump_clock: MockClock
) -> None:
    async with open_desk(make_pair) as desk:
        desk.outbox.offer_reply(Run((bytes(20_000_000),)))
        desk.outbox.offer(run_of("small", "messages"))
        desk.outbox.flush(trio.current_time())
        await wait_all_tasks_blocked()
        desk.outbox.offer(run_of("behind"))
        tracemalloc.start()
        try:
            for _ in range(20):
                await desk.peer.receive_some(10_000)
                await wait_all_tasks_blocked()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 1_000_000


async def test_one_flush_writes_a_bounded_part_and_the_writer_goes_on() -> None:
    async with open_desk(wide_socket_pair) as desk:
        for _ in range(30):
            desk.outbox.offer(Run((bytes(10_000),)))
        desk.outbox.flush(trio.current_time())
        assert desk.outbox.bytes == 300_000 - 256 * 1024
        assert not desk.outbox.blocked
        await wait_all_tasks_blocked()
        assert desk.outbox.bytes == 0


async def test_a_thousand_runs_and_more_come_in_order_past_those_that_were_dropped(
    autojump_clock: MockClock,
) -> None:
    async with open_desk() as desk:
        frame = await desk.block()
        for n in range(5000):
            desk.outbox.offer(run_of(n, topic=f"t{n % 10}"))
        for topic in ("t0", "t3", "t9"):
            desk.outbox.drop_topic(topic)
        kept = [str(n) for n in range(5000) if n % 10 not in (0, 3, 9)]
        assert desk.outbox.messages == len(kept) + 1
        taken = await desk.read_frames()
        assert taken[0] == frame
        assert contents(taken[1:]) == kept
        assert desk.counts() == (0, 0, 1500, False)


# progress is seen on every kind of stream


SLOWLY_READ: dict[str, Callable[[], StreamPair]] = {
    "socket": roomy_tcp_pair,
    "unix": narrow_socket_pair,
    "tls": tls_tcp_pair,
    "relay": relay_pair,
    "relay-tcp": relay_tcp_pair,
}


@pytest.mark.parametrize("make_pair", SLOWLY_READ.values(), ids=SLOWLY_READ.keys())
@pytest.mark.parametrize("rule", ["close", "drop_oldest", "latest"])
async def test_a_steady_slow_reader_is_not_given_up_and_one_that_stops_is(
    make_pair: Callable[[], StreamPair], rule: SlowRule, autojump_clock: MockClock
) -> None:
    async with open_desk(make_pair, max_messages=50) as desk:
        desk.on_slow = lambda: None
        for n in range(40):
            desk.outbox.offer(Run((bytes(100_000),), f"t{n}", rule))
        desk.outbox.flush(trio.current_time())
        reader = desk.peer
        while isinstance(reader, trio.SSLStream):  # read what it is carried by: any part will do
            reader = reader.transport_stream
        for _ in range(12):
            await trio.sleep(4.5)
            with trio.fail_after(1):
                await reader.receive_some(20_000)
            await trio.sleep(4.5)
            if rule != "close":
                for n in range(15):  # which the outbox tries to write, whatever becomes of it
                    desk.outbox.offer(Run((bytes(100_000),), f"t{n}", rule))
        assert desk.outbox.mail
        broken = [desk.broken, desk.outbox.stalled]
        await trio.sleep(21)
        assert [*broken, desk.broken, desk.outbox.stalled] == [0, False, 1, True]


@pytest.mark.parametrize("pause", range(12))
async def test_frames_that_come_while_a_writer_ends_are_written_too(
    pause: int, autojump_clock: MockClock
) -> None:
    async with open_desk(relay_memory_pair) as desk:
        for n in range(20):
            desk.outbox.offer(run_of(n))
            desk.outbox.flush(trio.current_time())
            for _ in range(pause):
                await trio.lowlevel.checkpoint()
        assert contents(await desk.read_frames(20)) == [str(n) for n in range(20)]


# proportion: messages of any permitted size

MIB = 2**20


def large(content: str) -> bytes:
    """As large as a message may be, which with what is around it is more than an outbox holds."""
    return frames.encode(frames.TEXT, content.encode().ljust(MIB + 60, b"."))


def names(taken: list[bytes]) -> list[str]:
    return [frame[10:].decode().rstrip(".") for frame in taken]


@blocking_streams
async def test_two_messages_of_the_largest_size_and_small_ones_behind_are_no_reason_to_cut(
    make_pair: Callable[[], StreamPair], autojump_clock: MockClock
) -> None:
    async with open_desk(make_pair, max_bytes=MIB) as desk:
        for name in "ab":
            desk.outbox.offer(Run((large(name),), "t"))
            desk.outbox.flush(trio.current_time())
            await wait_all_tasks_blocked()
        for n in range(100):
            desk.outbox.offer(run_of(n, size=100))
        await wait_all_tasks_blocked()
        assert desk.slow == 0
        assert not desk.outbox.replies_wait
        taken = await desk.read_frames()
        assert names(taken[:2]) == ["a", "b"]
        assert len(taken) == 102
        assert desk.outbox.max_bytes == MIB


@blocking_streams
async def test_a_peer_that_reads_nothing_of_many_large_messages_is_cut(
    make_pair: Callable[[], StreamPair], autojump_clock: MockClock
) -> None:
    async with open_desk(make_pair, max_bytes=MIB) as desk:
        most = 0
        desk.on_slow = desk.outbox.seal
        for name in "abcd":
            desk.outbox.offer(Run((large(name),), "t"))
            desk.outbox.flush(trio.current_time())
            await wait_all_tasks_blocked()
            most = max(most, desk.outbox.bytes)
        assert desk.slow == 1
        assert most <= 3.25 * (MIB + 100)


@blocking_streams
@pytest.mark.parametrize("rule", ["drop_oldest", "latest"])
@pytest.mark.parametrize("replies", [0, 900_000])
async def test_the_newest_message_of_any_size_fits_when_the_older_are_dropped(
    make_pair: Callable[[], StreamPair], rule: SlowRule, replies: int, autojump_clock: MockClock
) -> None:
    async with open_desk(make_pair, max_bytes=MIB) as desk:
        desk.outbox.offer(Run((large("first"),), "t", rule))
        desk.outbox.flush(trio.current_time())
        await wait_all_tasks_blocked()
        if replies:
            desk.outbox.offer(Run((frames.text_frame(bytes(replies)),)))
        for name in "abcdefgh":
            assert desk.outbox.offer(Run((large(name),), "t", rule)) is Offer.TAKEN
            await wait_all_tasks_blocked()
            assert desk.outbox.bytes <= 3.25 * (MIB + 100)
            for n in range(3):
                desk.outbox.offer(run_of(n, topic="u", rule=rule))
        assert desk.slow == 0
        taken = [frame for frame in await desk.read_frames() if len(frame) > MIB]
        assert names(taken)[0] == "first"
        assert names(taken)[-1] == "h"


@blocking_streams
async def test_a_message_larger_than_those_before_it_takes_their_place(
    make_pair: Callable[[], StreamPair], autojump_clock: MockClock
) -> None:
    async with open_desk(make_pair, max_bytes=MIB) as desk:
        begun = await desk.block()
        first, last = large("first"), frames.encode(frames.TEXT, b"last".ljust(3 * MIB, b"."))
        assert desk.outbox.offer(Run((first,), "t", "drop_oldest")) is Offer.TAKEN
        for n in range(1000):
            desk.outbox.offer(run_of(n, rule="drop_oldest", size=100))
        assert desk.outbox.offer(Run((last,), "t", "drop_oldest")) is Offer.TAKEN
        await wait_all_tasks_blocked()
        assert desk.slow == 0
        assert desk.dropped == {"t": 1}
        taken = await desk.read_frames()
        assert (taken[0], len(taken), taken[-1]) == (begun, 1002, last)


async def test_control_frames_are_bounded_in_number_too() -> None:
    async with open_desk(max_messages=10) as desk:
        await desk.block()
        for number in range(20_000):
            desk.outbox.offer(Run((frames.encode(frames.PONG, b""),), messages=0))
            assert desk.slow == (number + 1 >= 16 * 1024 + 10)
            if desk.slow:
                break
        assert desk.slow


# waiting for room


@pytest.mark.parametrize("make_pair", [narrow_socket_pair, lockstep_stream_pair, tls_pair])
async def test_many_runs_go_out_as_fast_as_the_peer_takes_them(
    make_pair: Callable[[], StreamPair], autojump_clock: MockClock
) -> None:
    async with open_desk(make_pair, max_bytes=100_000) as desk, trio.open_nursery() as nursery:
        most = 0

        async def send() -> None:
            nonlocal most
            for n in range(1000):
                assert desk.outbox.offer(run_of(f"{n:04}", size=100)) is Offer.TAKEN
                desk.outbox.flush(trio.current_time())
                most = max(most, desk.outbox.bytes)
                await desk.outbox.wait_below(10_000)

        nursery.start_soon(send)
        assert contents(await desk.read_frames(1000)) == [f"{n:04}" for n in range(1000)]
        assert most <= 10_102
        assert desk.slow == 0


async def test_waits_for_different_room_end_each_at_its_time(autojump_clock: MockClock) -> None:
    async with open_desk() as desk, trio.open_nursery() as nursery:
        await desk.block()
        ends: dict[int, int] = {}

        async def wait(size: int) -> None:
            await desk.outbox.wait_below(size)
            ends[size] = desk.outbox.bytes

        for size in (0, 100_000, 200_000):
            nursery.start_soon(wait, size)
        await wait_all_tasks_blocked()
        assert not ends
        while desk.outbox.mail:
            await desk.peer.receive_some(1000)
            await wait_all_tasks_blocked()
        assert ends[0] == 0
        assert 0 < ends[100_000] <= 100_000 < ends[200_000] <= 200_000


@pytest.mark.parametrize("end", ["abandon", "discard"])
async def test_a_wait_for_room_ends_with_the_outbox(end: str) -> None:
    async with open_desk() as desk, trio.open_nursery() as nursery:
        desk.outbox.offer(run_of("a" * 100))
        nursery.start_soon(desk.outbox.wait_below, 10)
        await wait_all_tasks_blocked()
        getattr(desk.outbox, end)()


async def test_a_cancelled_wait_for_room_changes_nothing(autojump_clock: MockClock) -> None:
    async with open_desk() as desk:
        frame = await desk.block()
        before = desk.counts()
        with trio.move_on_after(1) as scope:
            await desk.outbox.wait_below(10)
        assert scope.cancelled_caught
        assert desk.counts() == before
        assert await desk.read_frames() == [frame]


# memory


async def test_an_outbox_reports_the_memory_it_holds_until_it_is_out(
    autojump_clock: MockClock,
) -> None:
    async with open_desk() as desk:
        assert desk.outbox.statistics().bytes_held == 0
        frame = await desk.block()
        assert len(frame) < desk.outbox.statistics().bytes_held < len(frame) + 500
        desk.outbox.offer(run_of(*range(100)))
        assert len(frame) + 100 * 40 < desk.outbox.statistics().bytes_held
        await desk.read_frames(101)
        assert desk.outbox.statistics().bytes_held == 0


# who is behind


@blocking_streams
async def test_a_peer_is_behind_once_it_leaves_an_eighth_waiting(
    make_pair: Callable[[], StreamPair], autojump_clock: MockClock
) -> None:
    is_socket = make_pair is narrow_socket_pair
    async with open_desk(make_pair, max_bytes=1_000_000) as desk:
        assert not desk.outbox.is_behind()
        await desk.block()
        # A socket says so at once, of another stream it is seen.
        assert desk.outbox.is_behind() is is_socket
        await trio.sleep(1)
        assert desk.outbox.is_behind()
        await desk.read_frames()
        assert not desk.outbox.is_behind()


@blocking_streams
async def test_a_peer_that_leaves_less_waiting_is_not_behind(
    make_pair: Callable[[], StreamPair], autojump_clock: MockClock
) -> None:
    async with open_desk(make_pair, max_bytes=8 * 300_100) as desk:
        await desk.block()
        await trio.sleep(1)
        assert not desk.outbox.is_behind()
        desk.outbox.offer(run_of("x", size=20_000))
        desk.outbox.is_behind()
        await trio.sleep(1)
        assert desk.outbox.is_behind()


async def test_a_stream_is_behind_when_a_half_waits(autojump_clock: MockClock) -> None:
    async with open_desk(lockstep_stream_pair, max_bytes=500_000) as desk:
        await desk.block()
        assert desk.outbox.is_behind()


async def test_messages_count_as_bytes_do(autojump_clock: MockClock) -> None:
    async with open_desk(max_messages=80) as desk:
        await desk.block()
        for number in range(1, 11):
            assert not desk.outbox.is_behind(), number
            desk.outbox.offer(run_of(number))
        assert desk.outbox.is_behind()


async def test_what_came_a_moment_ago_is_written_first(autojump_clock: MockClock) -> None:
    async with open_desk(wide_socket_pair, max_bytes=400_000) as desk:
        desk.outbox.offer(run_of("x", size=200_000))
        assert not desk.outbox.is_behind()
        assert not desk.outbox.mail
