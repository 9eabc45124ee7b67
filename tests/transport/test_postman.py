"""One publication into many outboxes, and the one task that brings them to the sockets."""

import socket
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from itertools import pairwise

import attrs
import pytest
import trio
from trio.testing import assert_no_checkpoints, memory_stream_pair, wait_all_tasks_blocked

from broker.core.work import WRITE
from broker.http.streams import HttpStream
from broker.transport import frames, postman
from broker.transport.outbox import STREAM_WRITES, Outbox
from broker.transport.postman import (
    FREED_AT_ONCE,
    PostOffice,
    PostStatistics,
    open_post_office,
)
from broker.transport.runs import Run
from tests.transport.calls import Calls


class Subscriber:
    """An outbox over a real socket, and the socket's other end."""

    def __init__(self, office: PostOffice, nursery: trio.Nursery, **bounds: int) -> None:
        self.ours, self.peer = socket.socketpair()
        self.peer.setblocking(False)
        self.stream = trio.SocketStream(trio.socket.from_stdlib_socket(self.ours))
        self.slow = 0
        self.broken = 0
        self.on_slow: Callable[[], object] = lambda: None
        self.outbox = Outbox(
            self.stream,
            post=office.post,
            owner=Calls(start=nursery.start_soon, slow=self._slow, broken=self._broken),
            max_bytes=bounds.get("max_bytes", 10**6),
            max_messages=bounds.get("max_messages", 10**6),
            stall_seconds=10,
            ledger=office.ledger,
        )

    def _slow(self) -> None:
        self.slow += 1
        self.on_slow()

    def _broken(self) -> None:
        self.broken += 1

    async def received(self) -> bytes:
        """The bytes that have come by now."""
        await wait_all_tasks_blocked()
        try:
            return self.peer.recv(10_000)
        except BlockingIOError:
            return b""

    def close(self) -> None:
        self.stream.socket.close()
        self.peer.close()


@attrs.define
class Exchange:
    """A post office with subscribers; `io` is the nursery of their writer tasks."""

    office: PostOffice
    io: trio.Nursery
    subscribers: list[Subscriber]

    def subscribe(self, **bounds: int) -> Subscriber:
        self.subscribers.append(Subscriber(self.office, self.io, **bounds))
        return self.subscribers[-1]

    def deliver(self, run: Run) -> int:
        return self.office.deliver(run, [one.outbox for one in self.subscribers])


@asynccontextmanager
async def open_exchange() -> AsyncGenerator[Exchange, None]:
    subscribers: list[Subscriber] = []
    try:
        async with open_post_office() as office, trio.open_nursery() as io:
            yield Exchange(office, io, subscribers)
            io.cancel_scope.cancel()
    finally:
        for one in subscribers:
            one.close()


def run_of(*words: str) -> Run:
    return Run([frames.text_frame(word.encode()) for word in words], "t")


async def test_a_run_goes_to_all_and_is_counted_in_messages() -> None:
    async with open_exchange() as exchange:
        everyone = [exchange.subscribe() for _ in range(5)]
        with assert_no_checkpoints():
            run = run_of("a", "b")
            assert exchange.deliver(run) == 5
            assert exchange.deliver(run_of("c")) == 5
        assert [one.outbox.messages for one in everyone] == [3] * 5
        assert [one.outbox.bytes for one in everyone] == [9] * 5
        for one in everyone:
            assert await one.received() == b"\x81\x01a\x81\x01b\x81\x01c"
        # All five went to the postman as one list, and what came later went along.
        held = run.bytes_held
        assert exchange.office.statistics() == PostStatistics(15, 1, held, 15, 45)
        del run
        assert exchange.office.statistics().bytes_held == 0


async def test_one_write_carries_all_that_has_gathered() -> None:
    async with open_exchange() as exchange:
        one = exchange.subscribe()
        for word in "abc":
            one.outbox.offer(run_of(word))
            exchange.deliver(run_of(word.upper()))
        assert await one.received() == b"".join(b"\x81\x01" + bytes([c]) for c in b"aAbBcC")
        assert exchange.office.statistics().rounds == 1


async def test_what_an_outbox_held_that_has_ended_is_freed_a_few_runs_at_a_time() -> None:
    async with open_exchange() as exchange:
        office, one = exchange.office, exchange.subscribe()
        for _ in range(3 * FREED_AT_ONCE):
            exchange.deliver(run_of("a"))
        held = [office.ledger.bytes_held]
        one.outbox.abandon()
        while held[-1]:
            await trio.lowlevel.checkpoint()
            held.append(office.ledger.bytes_held)
        # Between two looks there may be a step at the end of one turn and one at the beginning of the next.
        assert max(a - b for a, b in pairwise(held)) <= held[0] * 2 / 3
        await wait_all_tasks_blocked()  # and it goes on waiting
        office.ledger.throw_away([run_of("a") for _ in range(FREED_AT_ONCE + 1)])


async def test_who_waits_until_all_is_freed_frees_it() -> None:
    async with open_exchange() as exchange:
        office, one = exchange.office, exchange.subscribe()
        for _ in range(3 * FREED_AT_ONCE):
            exchange.deliver(run_of("a"))
        one.outbox.abandon()
        assert office.ledger.bytes_held
        await office.wait_freed()
        assert not office.ledger.bytes_held
        await office.wait_freed()


def post_as(exchange: Exchange, party: object, *words: str) -> bytes:
    """What has come to the first subscriber by the end of the step in which this party posts."""
    exchange.office.hold(party)
    for word in words:
        exchange.deliver(run_of(word))
    exchange.office.let_go()
    with suppress(BlockingIOError):
        return exchange.subscribers[0].peer.recv(100)
    return b""


async def test_who_alone_has_mail_has_it_carried_in_its_own_step() -> None:
    async with open_exchange() as exchange:
        one, me, other = exchange.subscribe(), object(), object()
        assert post_as(exchange, me, "a") == b"", "nobody knows yet who else has some"
        assert await one.received() == b"\x81\x01a"
        assert post_as(exchange, me, "b", "c") == b"\x81\x01b\x81\x01c"
        assert post_as(exchange, me, "d") == b"\x81\x01d"
        assert exchange.office.statistics().rounds == 3
        exchange.deliver(run_of("e"))
        assert await one.received() == b"\x81\x01e"
        assert post_as(exchange, me, "f") == b"", "somebody else had some meanwhile"
        assert await one.received() == b"\x81\x01f"
        assert post_as(exchange, other, "g") == b""
        assert post_as(exchange, me, "h") == b""
        assert await one.received() == b"\x81\x01g\x81\x01h", "one round is for all"


async def test_what_waits_for_the_postman_already_waits_with_what_is_posted_alone() -> None:
    async with open_exchange() as exchange:
        one, me = exchange.subscribe(), object()
        post_as(exchange, me, "a")
        assert post_as(exchange, me, "b") == b"", "he has been woken, and others run before him"
        assert await one.received() == b"\x81\x01a\x81\x01b"


@pytest.mark.parametrize("few", [3, 2])
async def test_only_a_few_writes_are_made_without_the_postman(
    monkeypatch: pytest.MonkeyPatch, few: int
) -> None:
    monkeypatch.setattr(postman, "FEW", few)
    async with open_exchange() as exchange:
        everyone, me = [exchange.subscribe() for _ in range(3)], object()
        post_as(exchange, me, "a")
        for one in everyone:
            assert await one.received() == b"\x81\x01a"
        assert bool(post_as(exchange, me, "b")) is (few == 3)
        await wait_all_tasks_blocked()
        assert [one.outbox.messages for one in everyone] == [0, 0, 0]


@asynccontextmanager
async def open_rooms(monkeypatch: pytest.MonkeyPatch, bag: int) -> AsyncGenerator[Exchange, None]:
    """Six rooms of one, and a full bag is as large."""
    monkeypatch.setattr(postman, "BAG", bag)
    monkeypatch.setattr(postman, "_BAG_MOST", 5)
    async with open_exchange() as exchange:
        for _ in range(6):
            exchange.subscribe()
        yield exchange


def deliver_to_rooms(exchange: Exchange, *rooms: int) -> list[bool]:
    """Deliver something to each room, in that order; and who has it before others have had their turn."""
    for room in rooms:
        exchange.office.deliver(run_of("a"), [exchange.subscribers[room].outbox])
        exchange.office.carry_full()
    return [not exchange.subscribers[room].outbox.mail for room in rooms]


async def test_a_full_bag_is_carried_by_those_who_fill_it(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: object
) -> None:
    async with open_rooms(monkeypatch, 3) as exchange:
        assert deliver_to_rooms(exchange, *range(6)) == [False] * 6, "nobody knows yet what comes"
        await trio.sleep(1)
        assert deliver_to_rooms(exchange, *range(5)) == [True] * 3 + [False] * 2
        await wait_all_tasks_blocked()
        assert [len(await one.received()) for one in exchange.subscribers] == [6] * 5 + [3]
        with assert_no_checkpoints():
            exchange.deliver(run_of("too many for a step of a publisher's"))
            exchange.office.carry_full()
        assert all(one.outbox.mail for one in exchange.subscribers)


async def test_a_bag_is_not_carried_early_where_peers_have_mail_of_several_topics(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: object
) -> None:
    async with open_rooms(monkeypatch, 3) as exchange:
        deliver_to_rooms(exchange, *range(6), 0)
        await trio.sleep(1)
        assert deliver_to_rooms(exchange, *range(5)) == [False] * 5
        await wait_all_tasks_blocked()
        assert deliver_to_rooms(exchange, *range(5)) == [False] * 5, "a small round tells nothing"


async def test_no_bag_is_carried_early_once_peers_have_had_two_one_soon_after_the_other(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: object
) -> None:
    async with open_rooms(monkeypatch, 3) as exchange:
        deliver_to_rooms(exchange, *range(6))
        for _ in range(3):
            await trio.sleep(1)
            assert deliver_to_rooms(exchange, *range(6)) == [True] * 6
        deliver_to_rooms(exchange, *range(6))
        await wait_all_tasks_blocked()
        assert deliver_to_rooms(exchange, *range(6)) == [False] * 6


async def test_a_write_through_a_stream_is_the_postmans(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_exchange() as exchange:
        one, me = exchange.subscribe(), object()
        post_as(exchange, me, "a")
        await one.received()
        monkeypatch.setattr(Outbox, "writes", STREAM_WRITES)
        assert post_as(exchange, me, "b") == b""
        assert await one.received() == b"\x81\x01b"


async def test_a_round_that_fails_keeps_the_postman_from_nothing() -> None:
    def fail() -> None:
        exchange.office.before_round = lambda: None
        raise RuntimeError

    async with open_exchange() as exchange:
        one, me = exchange.subscribe(), object()
        post_as(exchange, me, "a")
        await one.received()
        exchange.office.before_round = fail
        with pytest.raises(RuntimeError):
            post_as(exchange, me, "b")
        assert await one.received() == b"\x81\x01b"


async def check_that_few_were_written_to(everyone: list[Subscriber]) -> None:
    """Of twelve that wait, three at a time: one step has written to some of them, and others had their turn."""
    waiting = 12
    while waiting == 12:
        await trio.lowlevel.checkpoint()
        waiting = sum(1 for one in everyone if one.outbox.messages)
    assert waiting in (9, 6), "two steps, if it was the last of one turn and the first of the next"


async def test_a_long_round_lets_others_have_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postman, "AT_ONCE", 3)
    async with open_exchange() as exchange:
        everyone = [exchange.subscribe() for _ in range(12)]
        exchange.deliver(run_of("a"))
        await check_that_few_were_written_to(everyone)
        exchange.deliver(run_of("b"))
        assert [await one.received() for one in everyone] == [b"\x81\x01a\x81\x01b"] * 12
        # It went along to those who waited, and with another round to those who had the first.
        assert exchange.office.statistics().rounds == 2


async def test_a_write_through_a_stream_counts_as_several(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a thousand clients without WebSocket are not written to in one step; and their publisher pays for it."""
    monkeypatch.setattr(postman, "AT_ONCE", 3 * STREAM_WRITES)
    async with open_exchange() as exchange:
        everyone = [exchange.subscribe() for _ in range(12)]
        for one in everyone:
            one.outbox.writes = STREAM_WRITES
        exchange.deliver(run_of("a"))
        await check_that_few_were_written_to(everyone)
        assert [await one.received() for one in everyone] == [b"\x81\x01a"] * 12
        before = exchange.office.meter.done
        exchange.deliver(run_of("b"))
        assert exchange.office.meter.done - before == 12 * STREAM_WRITES * WRITE


async def test_which_outboxes_write_through_a_stream() -> None:
    async with open_exchange() as exchange:
        one = exchange.subscribe()
        assert one.outbox.writes == 1
        for stream, writes in (
            (HttpStream(one.stream), STREAM_WRITES),
            (memory_stream_pair()[0], 1),
        ):
            outbox = Outbox(
                stream,
                post=exchange.office.post,
                owner=Calls(),
                max_bytes=1,
                max_messages=1,
                stall_seconds=10,
            )
            assert outbox.writes == writes


async def test_a_sealed_outbox_gets_nothing_behind_its_last_frame() -> None:
    async with open_exchange() as exchange:
        sealed, other = exchange.subscribe(), exchange.subscribe()
        sealed.outbox.seal(Run((frames.close_frame(1000),), messages=0))
        assert exchange.deliver(run_of("a")) == 1
        assert await other.received() == b"\x81\x01a"
        assert await sealed.received() == b"\x88\x02\x03\xe8"
        assert exchange.office.statistics().messages_delivered == 1


async def test_an_abandoned_outbox_sends_not_another_byte_and_needs_no_nursery() -> None:
    async with open_exchange() as exchange:
        async with trio.open_nursery() as exchange.io:
            one = exchange.subscribe()
            one.outbox.abandon()
        # Its nursery is closed: to start a writer task there would end the postman, and everybody with it.
        assert exchange.deliver(run_of("a")) == 0
        assert await one.received() == b""


async def test_an_outbox_over_its_bound_is_dealt_with_after_all_have_theirs() -> None:
    async with open_exchange() as exchange:
        full = exchange.subscribe(max_messages=1)
        other = exchange.subscribe()
        full.outbox.offer(Run((bytes(300_000),)))
        await wait_all_tasks_blocked()
        # As when a rule ends a subscription: the very outboxes that are being walked through.
        outboxes = {full.outbox: None, other.outbox: None}
        full.on_slow = outboxes.clear
        assert exchange.office.deliver(run_of("a"), outboxes) == 2
        assert not outboxes
        assert await other.received() == b"\x81\x01a"


async def test_an_outbox_that_many_runs_go_into_is_judged_once_when_all_are_there() -> None:
    async with open_exchange() as exchange:
        full = exchange.subscribe(max_messages=10)
        exchange.deliver(run_of("x" * 10**6))  # more than the system holds for a socket
        await wait_all_tasks_blocked()
        assert full.outbox.blocked
        office = exchange.office
        office.judged = 0
        with office.judging_later():
            for _ in range(100):
                exchange.deliver(run_of("a"))
            with office.judging_later():
                exchange.deliver(run_of("b"))
            assert full.slow == office.judged == 0
        assert office.judged == full.slow == 1
        full.outbox.discard()  # as who is cut does
        exchange.deliver(run_of("c"))
        assert office.judged == full.slow == 1, "it is not full any more"
        with pytest.raises(ZeroDivisionError), office.judging_later():  # noqa: PT012
            exchange.deliver(run_of(*"defghijklmn"))
            raise ZeroDivisionError
        assert full.slow == 2


async def test_a_busy_tick_is_no_reason_to_cut_a_socket_that_keeps_up() -> None:
    async with open_exchange() as exchange:
        one = exchange.subscribe(max_messages=10, max_bytes=100)
        for _ in range(300):
            exchange.deliver(run_of("a"))
        assert await one.received() == b"\x81\x01a" * 300
        assert one.slow == 0


async def test_a_peer_that_is_gone_or_reads_nothing_does_not_delay_others() -> None:
    async with open_exchange() as exchange:
        gone, silent, other = (exchange.subscribe() for _ in range(3))
        gone.peer.close()
        silent.outbox.offer(Run((bytes(300_000),)))
        await wait_all_tasks_blocked()
        for word in "abc":
            exchange.deliver(run_of(word))
            assert await other.received() == b"\x81\x01" + word.encode()
        assert gone.broken == 1


async def test_the_block_ends_the_postman_also_when_it_raises() -> None:
    with pytest.raises(ExceptionGroup) as caught:
        async with open_post_office():
            raise KeyError
    assert caught.group_contains(KeyError)


async def test_what_is_delivered_in_the_last_step_is_carried_before_the_block_ends() -> None:
    async with open_exchange() as exchange:
        one = exchange.subscribe()
        exchange.deliver(run_of("a"))
        await wait_all_tasks_blocked()
        exchange.deliver(run_of("b"))
    assert one.outbox.messages_sent == 2


async def test_others_have_their_turn_between_rounds_that_each_fill_the_next_bag() -> None:
    async with open_exchange() as exchange:
        one, office = exchange.subscribe(), exchange.office
        rounds = 0
        seen: list[int] = []

        def deliver_more() -> None:
            nonlocal rounds
            rounds += 1
            if rounds < 100:
                exchange.deliver(run_of("b"))

        async def look() -> None:
            for _ in range(100):
                seen.append(rounds)
                await trio.lowlevel.checkpoint()

        office.ledger.most = -1
        office.ledger.on_full = deliver_more
        exchange.deliver(run_of("a"))
        exchange.io.start_soon(look)
        await wait_all_tasks_blocked()
        assert one.outbox.messages_sent == rounds == 100
        assert max(after - before for before, after in pairwise(seen)) <= 2


async def test_however_many_are_cut_at_once_and_tell_each_other_of_it() -> None:
    """A peer that is cut leaves, and the others are told: which is too much for the next one."""
    async with open_exchange() as exchange:
        everyone = [exchange.subscribe(max_messages=1) for _ in range(200)]

        def leave(one: Subscriber) -> None:
            one.outbox.discard()
            one.outbox.seal()
            exchange.deliver(run_of("somebody left"))

        for one in everyone:
            one.on_slow = partial(leave, one)
        exchange.deliver(run_of("x" * 10**6))  # more than the system holds for a socket
        await wait_all_tasks_blocked()
        assert all(one.outbox.blocked for one in everyone)
        exchange.deliver(run_of("one too many"))
        assert [one.slow for one in everyone] == [1] * 200


async def test_a_round_that_leaves_too_much_in_outboxes_is_told_of() -> None:
    calls: list[int] = []
    async with open_post_office() as office, trio.open_nursery() as nursery:
        reader = Subscriber(office, nursery)
        office.ledger.most = 100_000
        office.ledger.on_full = lambda: calls.append(office.ledger.bytes_held)
        for _ in range(3):
            office.deliver(Run((bytes(30_000),)), [reader.outbox])
        await wait_all_tasks_blocked()
        assert calls == []
        for _ in range(20):
            office.deliver(Run((bytes(30_000),)), [reader.outbox])
        await wait_all_tasks_blocked()
        assert len(calls) == 1
        assert calls[0] > 100_000
        nursery.cancel_scope.cancel()
        reader.close()
