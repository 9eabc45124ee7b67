"""Memory that is short, in whole brokers: who is refused, who gives way, and who notices nothing."""

import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import attrs
import pytest
import structlog.testing
import trio
from trio.testing import MockClock, lockstep_stream_pair, wait_all_tasks_blocked

from broker import Broker, Config, TopicRules
from broker.core.memory import STREAM_BYTES, MemoryBudget, MemoryStatistics, Part
from broker.session.memory import (
    BEAT,
    GARBAGE_BYTES,
    MUCH_GARBAGE_BYTES,
    PAUSE,
    QUIET,
    Heap,
)
from broker.testing import (
    Closed,
    Network,
    Peer,
    client_frame,
    handshake,
    name_users_by_token,
    open_test_broker,
)
from broker.transport.frames import TEXT
from tests.conftest import code_of, next_pub, rpc, subscribe

MIB = 2**20
BIG = "x" * 800_000
ALIVE = ("connections", "outboxes", "incoming", "subscriptions", "wills", "requests", "readers")
"""The parts that go when everybody has gone."""


@asynccontextmanager
async def short_of(
    mib: float, broker: Broker | None = None, **fields: Any
) -> AsyncGenerator[Network, None]:
    """A broker with so many MiB for its clients."""
    broker = broker or Broker()
    broker.config = Config(max_memory_bytes=int(mib * MIB), **fields)
    async with open_test_broker(broker) as net:
        yield net


def memory(net: Network) -> MemoryStatistics:
    return net.broker.stats().memory


async def fate(peer: Peer) -> tuple[int | None, str]:
    """How a client was ended: by a push, and the Close frame behind it."""
    while True:
        try:
            lines = (await peer.receive_text()).split("\n")
        except Closed as closed:
            return closed.code, closed.reason
        for line in lines:
            push = json.loads(line).get("push", {})
            assert push.get("disconnect", {"code": 3008})["code"] == 3008


async def half_a_message(net: Network, size: int = len(BIG), token: str = "") -> Peer:
    """A client that has sent so many bytes of a message that is not whole."""
    peer = await net.open_client(token=token)
    await peer.send(client_frame(TEXT, b"x" * (size + 1))[:-1])
    await wait_all_tasks_blocked()
    return peer


@attrs.define
class Innocent:
    """Two clients that hold next to nothing: what one publishes the other gets, at once."""

    net: Network
    publisher: Peer
    listener: Peer
    count: int = 0

    async def talk(self) -> None:
        self.count += 1
        began = trio.current_time()
        await self.publisher.send_json({"publish": {"channel": "talk", "data": self.count}})
        assert (await next_pub(self.listener))["data"] == self.count
        assert trio.current_time() == began


async def open_innocent(net: Network) -> Innocent:
    publisher, listener = [await net.open_client() for _ in range(2)]
    await subscribe(listener, "talk")
    return Innocent(net, publisher, listener)


# who gives way


async def test_the_heaviest_gives_way_and_the_small_notice_nothing(
    autojump_clock: MockClock,
) -> None:
    async with short_of(3.3) as net:
        innocent = await open_innocent(net)
        medium = await half_a_message(net, 300_000)
        heavy = [await half_a_message(net) for _ in range(3)]
        assert memory(net).gave_way == 0
        last = await half_a_message(net)
        await wait_all_tasks_blocked()
        # A tenth of all comes free, of those that hold the most.
        assert memory(net).gave_way == 1
        await innocent.talk()
        await trio.sleep(2 * PAUSE)
        assert memory(net).held <= 3.3 * MIB
        ends = []
        async with trio.open_nursery() as nursery:

            async def see(peer: Peer) -> None:
                with trio.move_on_after(0.5):
                    ends.append(await fate(peer))

            for peer in (*heavy, last, medium):
                nursery.start_soon(see, peer)
        assert ends == [(3008, "memory is short")]
        await innocent.talk()


async def test_a_user_weighs_what_all_its_connections_hold(autojump_clock: MockClock) -> None:
    broker = name_users_by_token(Broker())
    async with short_of(1.7, broker) as net:
        ann = [await half_a_message(net, 400_000, "ann") for _ in range(3)]
        await half_a_message(net, 600_000, "bob")
        assert len(net.broker.fds_of("bob")) == 1
        await wait_all_tasks_blocked()
        assert (len(net.broker.fds_of("ann")), len(net.broker.fds_of("bob"))) == (2, 1)
        assert len(ann) == 3


async def test_what_a_slow_reader_alone_holds_goes_before_what_all_hold(
    autojump_clock: MockClock,
) -> None:
    async with short_of(3, topics=TopicRules(history_size=0)) as net:
        slow = [await stalled(net, "news") for _ in range(10)]
        asker = await stalled(net)
        for n in range(8):
            net.broker.publish_nowait("news", f"{n}" * 100_000)
        await wait_all_tasks_blocked()
        held = memory(net).parts["outboxes"]
        assert 800_000 < held < 2.5 * MIB  # each message once, and a chunk for each in hand
        for _ in range(9):
            net.broker.push(asker.fd, "x" * 100_000)
        net.broker.publish_nowait("news", "y" * 100_000)
        half = await half_a_message(net, 400_000)
        await trio.sleep(PAUSE / 2)
        gone = [peer.fd for peer in (*slow, asker, half) if not net.broker.is_established(peer.fd)]
        assert gone == [asker.fd]


async def stalled(net: Network, *topics: str) -> Peer:
    """A client that reads no more."""
    peer = await net.open_client(make_pair=lockstep_stream_pair)
    for topic in topics:
        await subscribe(peer, topic)
    return peer


async def test_who_says_goodbye_with_much_in_hand_is_cut(autojump_clock: MockClock) -> None:
    """A frame that has begun to go out is finished before a Close frame, in general."""
    async with short_of(4, topics=TopicRules(history_size=0)) as net:
        innocent = await open_innocent(net)
        slow = await stalled(net)
        for _ in range(2):
            net.broker.push(slow.fd, BIG)
        await wait_all_tasks_blocked()
        waiting = memory(net).parts["outboxes"]
        await half_a_message(net, 800_000)
        await half_a_message(net, 820_000)
        await half_a_message(net, 840_000)
        assert not net.broker.is_established(slow.fd)
        assert 900_000 < memory(net).parts["outboxes"] < waiting
        await half_a_message(net, 860_000)
        await trio.sleep(2 * PAUSE)
        assert memory(net).held <= 4 * MIB
        await innocent.talk()
        assert not net.broker.exists(slow.fd)


async def test_memory_that_is_short_is_logged_with_who_gave_way(autojump_clock: MockClock) -> None:
    async with short_of(1) as net:
        with structlog.testing.capture_logs() as lines:
            for _ in range(2):
                await half_a_message(net, 600_000)
            await wait_all_tasks_blocked()
        (line,) = [line for line in lines if line["event"] == "memory_short"]
        assert line["log_level"] == "warning"
        assert line["gave_way"] == 1
        assert line["limit"] == "1.0 MiB"
        assert line["forgotten"] == "0.0 MiB"
        assert line["refuses_newcomers"] is False


async def test_another_limit_counts_from_the_reload_on(autojump_clock: MockClock) -> None:
    async with short_of(8) as net:
        for _ in range(4):
            await half_a_message(net)
        net.broker.reload(Config(max_memory_bytes=2 * MIB))
        await trio.sleep(1)
        assert memory(net).limit == 2 * MIB
        assert memory(net).held <= 2 * MIB
        assert memory(net).gave_way == 2
        net.broker.reload(Config(max_memory_bytes=8 * MIB))
        for _ in range(4):
            await half_a_message(net)
        assert memory(net).gave_way == 2


# who is refused


async def test_close_to_the_limit_a_large_will_is_refused_and_a_small_one_is_not(
    autojump_clock: MockClock,
) -> None:
    async with short_of(2) as net:
        first, second, third = [await net.open_client() for _ in range(3)]
        assert "rpc" in await rpc(first, "will", topic="w", data=BIG)
        refused = await rpc(second, "will", topic="w", data=BIG)
        assert refused["error"] == {"code": 106, "message": "memory is short"}
        assert "rpc" in await rpc(third, "will", topic="w", data="bye")
        # In place of another as large, or once that is taken back.
        assert "rpc" in await rpc(first, "will", topic="v", data=BIG)
        assert "rpc" in await rpc(first, "will")
        assert memory(net).parts["wills"] < 1000
        assert "rpc" in await rpc(second, "will", topic="w", data=BIG)
        assert (memory(net).gave_way, memory(net).refused) == (0, 1)


async def test_the_will_of_who_has_gone_weighs_no_more(autojump_clock: MockClock) -> None:
    async with short_of(2, topics=TopicRules(history_size=0)) as net:
        for _ in range(3):
            peer = await net.open_client()
            assert "rpc" in await rpc(peer, "will", topic="w", data=BIG)
            await peer.aclose()
            await trio.sleep(1)
            assert memory(net).parts["wills"] == 0


async def test_a_connection_has_a_bound_on_all_that_it_holds(autojump_clock: MockClock) -> None:
    bounds: dict[str, Any] = {
        "max_message_bytes": 10_000,
        "outbox_bytes": 10_000,
        "connection_bytes": 60_000,
    }
    async with short_of(100, **bounds) as net:
        peer = await net.open_client()
        room = 60_000 - 32_500  # its outbox may need that
        assert "rpc" in await rpc(peer, "will", topic="w", data="x" * 9_000)
        codes = [await code_of(peer, subscribe={"channel": f"{n:0200}"}) for n in range(25)]
        assert codes.count(0) == (room - 9_300) // 900
        assert codes[-1] == 106
        refused = await rpc(peer, "will", topic="w", data="y" * 9_900)
        assert refused["error"]["message"] == "more than 27500 bytes for one connection"
        assert "rpc" in await rpc(peer, "will")
        assert await code_of(peer, subscribe={"channel": "another"}) == 0


async def test_close_to_the_limit_nobody_gets_heavy_by_subscribing(
    autojump_clock: MockClock,
) -> None:
    async with short_of(2) as net:
        will, peer = [await net.open_client() for _ in range(2)]
        assert "rpc" in await rpc(will, "will", topic="w", data=BIG)
        tf = {"key": "a", "cmp": "eq", "val": "x" * 30_000}
        codes = [
            await code_of(
                peer, subscribe={"channel": f"c{n}", "tf": {**tf, "val": f"{n}" * 15_000}}
            )
            for n in range(60)
        ]
        # As long as there is room, then up to what everybody may have.
        assert codes[0] == 0
        assert codes[-1] == 106
        other = await net.open_client()
        assert await code_of(other, subscribe={"channel": "a"}) == 0
        assert net.broker.is_established(will.fd)


async def test_where_nobody_holds_much_newcomers_are_refused(autojump_clock: MockClock) -> None:
    async with short_of(3.5 * STREAM_BYTES / MIB) as net:
        early = [await net.open_client() for _ in range(3)]
        silent = await net.connect()
        await trio.sleep(BEAT)
        late = await net.connect()
        await late.send(handshake())
        assert (await late.receive_head()).startswith("HTTP/1.1 503 ")
        for peer in early:
            assert await code_of(peer, presence={"channel": "a"}) == 0
        assert await code_of(early[0], subscribe={"channel": "a"}) == 106
        for peer in (silent, late, early.pop()):
            await peer.aclose()
        await trio.sleep(BEAT)
        assert await code_of(early[0], subscribe={"channel": "a"}) == 0
        assert memory(net).gave_way == 0


# kept data


async def test_kept_data_give_back_what_is_over_their_half(autojump_clock: MockClock) -> None:
    async with short_of(2) as net:
        for n in range(15):
            net.broker.publish_nowait(f"topic{n}", "x" * 100_000)
        net.broker.publish_nowait("small", "y", retain=True)
        kept = memory(net).parts["history"]
        assert kept > 1_500_000
        half = await half_a_message(net, 700_000)
        await trio.sleep(PAUSE)
        after = memory(net)
        assert kept - 500_000 < after.parts["history"] < kept - 300_000
        assert (after.held <= 2 * MIB, after.gave_way) == (True, 0)
        assert net.broker.is_established(half.fd)
        assert [p.topic for p in net.node.services.router.retained.matching("small")] == ["small"]


async def test_kept_data_stay_where_connections_hold_more_than_their_half(
    autojump_clock: MockClock,
) -> None:
    async with short_of(2) as net:
        for n in range(8):
            net.broker.publish_nowait(f"topic{n}", "x" * 100_000)
        kept = memory(net).parts["history"]
        for _ in range(2):
            await half_a_message(net)
        await trio.sleep(PAUSE)
        assert memory(net).parts["history"] == kept
        assert memory(net).gave_way == 1


async def test_kept_data_give_back_all_where_nobody_else_holds_much(
    autojump_clock: MockClock,
) -> None:
    async with short_of(0.4) as net:
        peers = [await net.open_client() for _ in range(20)]
        net.broker.publish_nowait("a", "x" * 30_000)
        net.broker.publish_nowait("b", "x" * 30_000, retain=True)
        before = memory(net).parts
        peers += [await net.open_client() for _ in range(4)]
        await trio.sleep(BEAT)
        after = memory(net)
        assert after.parts["history"] + after.parts["retained"] < 50_000
        assert after.parts["history"] + after.parts["retained"] < before["history"]
        assert (after.held <= 0.4 * MIB, after.gave_way) == (True, 0)


# the account


async def test_all_that_was_charged_is_given_back_when_all_have_gone(
    autojump_clock: MockClock,
) -> None:
    broker = Broker()
    opened = trio.Event()

    @broker.on_message
    async def wait(_: object, __: object) -> None:
        await opened.wait()

    async with short_of(100, broker) as net, net.broker.subscribe("*") as reader:
        net.broker.push((await net.open_websocket()).fd, "waits until it speaks")
        plain = await net.open_plain()
        for _ in range(5):
            await plain.send_text("w" * 20_000)
        slow, half = await stalled(net, "news"), await half_a_message(net)
        net.broker.publish_nowait("news", "x" * 100_000)
        client, other = [await net.open_client() for _ in range(2)]
        await rpc(client, "will", topic="w", data="x" * 10_000)
        await client.send_json(
            {"id": 9, "rpc": {"method": "request", "data": {"to": f"fd:{other.fd}", "data": 1}}}
        )
        await wait_all_tasks_blocked()
        parts = memory(net).parts
        assert all(parts[part] > 0 for part in ALIVE), parts
        assert memory(net).held == sum(parts.values())
        for peer in (plain, slow, half, client, other):
            await peer.aclose()
        opened.set()
        for info in net.broker.connections():
            net.broker.disconnect(info.fd)
        await reader.receive()
        await reader.receive()
        await trio.sleep(30)
        # What is remembered of those that have ended stays for a while.
        left = {**dict.fromkeys(ALIVE, 0), "connections": net.node.services.closed.bytes_held}
        assert {part: memory(net).parts[part] for part in ALIVE} == left
        assert memory(net).parts["history"] > 100_000


async def test_a_busy_session_is_charged_for_what_waits_until_it_is_dealt_with(
    autojump_clock: MockClock,
) -> None:
    broker = Broker()
    doors = [trio.Event() for _ in range(3)]
    left = list(doors)

    @broker.on_rpc
    async def wait(_: object, __: str, ___: object) -> None:
        await left.pop(0).wait()

    async with short_of(100, broker) as net:
        peer = await net.open_client()
        for number in range(3):
            rpc_of = {"method": "x", "data": "x" * 100_000}
            await peer.send_json({"id": number + 2, "rpc": rpc_of})
        for number, door in enumerate(doors):
            await wait_all_tasks_blocked()
            held = memory(net).parts["incoming"]
            assert (3 - number) * 100_000 < held < (4 - number) * 101_000 + 100_000
            door.set()
        await peer.receive_all()
        assert memory(net).parts["incoming"] == 0


async def test_what_waits_for_a_peer_that_has_not_spoken_is_counted(
    autojump_clock: MockClock, net: Network
) -> None:
    peer = await net.open_websocket()
    net.broker.push(peer.fd, "x" * 10_000)
    assert 10_000 < memory(net).parts["outboxes"] < 10_100
    assert (await peer.request(connect={}))["connect"]["client"] == str(peer.fd)
    await peer.receive_all()
    assert memory(net).parts["outboxes"] == 0


async def test_the_body_of_a_backend_is_counted_and_never_gives_way(
    autojump_clock: MockClock,
) -> None:
    async with short_of(1, api_key="key") as net:
        backend = await net.connect()
        body = json.dumps({"channel": "a", "data": "x" * 800_000}).encode()
        head = f"POST /api/publish HTTP/1.1\r\nHost: localhost\r\nX-API-Key: key\r\nContent-Length: {len(body)}"
        await backend.send(head.encode() + b"\r\n\r\n" + body[:-1])
        await wait_all_tasks_blocked()
        assert memory(net).parts["incoming"] == len(body)
        await half_a_message(net, 400_000)
        await trio.sleep(3 * PAUSE)
        assert memory(net).gave_way == 1
        await backend.send(body[-1:])
        assert (await backend.receive_head()).startswith("HTTP/1.1 200 ")
        assert memory(net).parts["incoming"] == 0


async def test_what_is_taken_into_the_hands_of_a_slow_stream_is_counted(
    autojump_clock: MockClock,
) -> None:
    async with short_of(100, topics=TopicRules(history_size=0)) as net:
        before = memory(net).held
        slow = [await stalled(net, "news") for _ in range(10)]
        for _ in range(8):
            net.broker.publish_nowait("news", "x" * 60_000)
        await wait_all_tasks_blocked()
        found = memory(net).parts["outboxes"]
        assert 8 * 60_000 + 10 * 2 * 60_000 < found < 8 * 61_000 + 10 * 2 * 66_000
        for peer in slow:
            await peer.aclose()
        await trio.sleep(1)
        assert memory(net).held == before + net.node.services.closed.bytes_held


async def test_a_reader_in_this_program_is_bounded_in_bytes(autojump_clock: MockClock) -> None:
    bounds: dict[str, Any] = {
        "max_message_bytes": 10_000,
        "outbox_bytes": 10_000,
        "connection_bytes": 60_000,
    }
    async with short_of(100, **bounds) as net, net.broker.subscribe("*") as reader:
        for n in range(10):
            net.broker.publish_nowait("a", f"{n}" * 10_000)
        assert memory(net).parts["readers"] == pytest.approx(50_000, rel=0.05)
        got = [(await reader.receive()).value for _ in range(5)]
        assert [value[0] for value in got] == list("01234")  # type: ignore[index]
        assert memory(net).parts["readers"] == 0
        with pytest.raises(Exception, match="5 publications were dropped"):
            await reader.receive()


# at start


@pytest.mark.parametrize(
    "fields, of, warned",
    [
        ({"max_memory_bytes": 200 * MIB}, "max_memory_bytes", False),
        ({"max_memory_bytes": 80 * MIB}, "max_memory_bytes", True),
        ({"max_memory_bytes": 80 * MIB, "history_bytes": 10 * MIB}, "max_memory_bytes", False),
        ({}, "half of this ", False),
    ],
)
async def test_the_budget_is_told_at_start_and_stores_that_are_more_than_it(
    autojump_clock: MockClock, fields: dict[str, Any], of: str, warned: bool
) -> None:
    with structlog.testing.capture_logs() as lines:
        async with open_test_broker(Broker(Config(max_connections=1000, **fields))):
            pass
    (line,) = [line for line in lines if line["event"] == "memory"]
    assert line["log_level"] == "info"
    assert line["of"].startswith(of)
    assert line["connections"] == "1,000 of 13.2 MiB at most"
    warnings = [line for line in lines if line["event"] == "too_little_memory"]
    assert len(warnings) == warned
    if warned:
        assert "80.0 MiB" in warnings[0]["detail"]
        assert "84.0 MiB" in warnings[0]["detail"]


async def test_events_count_where_somebody_reads_them(autojump_clock: MockClock) -> None:
    broker = Broker(Config(max_memory_bytes=100 * MIB))

    @broker.on_event
    async def read(_: object) -> None:
        await trio.sleep(1)

    with structlog.testing.capture_logs() as lines:
        async with open_test_broker(broker) as net:
            await net.open_client()
            assert memory(net).parts["events"] > 0
            await trio.sleep(5)
            assert memory(net).parts["events"] == 0
    assert [line for line in lines if line["event"] == "too_little_memory"]


# what was freed


@attrs.define
class System:
    """A process, as its heap sees it. A trim gives back all `garbage` but what is `stuck`."""

    budget: MemoryBudget = attrs.field(factory=lambda: MemoryBudget(limit=10**12))
    garbage: int = 0
    stuck: int = 0
    held: int = 0
    work: float = 0.0
    now: float = 0.0
    trims: int = 0
    heap: Heap = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.budget.count(Part.KEYS, lambda: self.held)
        self.heap = Heap(self.budget, lambda: self.work, self.resident, self.trim)

    def resident(self) -> int:
        return 60 * MIB + self.held + self.garbage

    def trim(self) -> None:
        self.trims += 1
        self.garbage = min(self.garbage, self.stuck)

    def look(self, times: int = 1) -> int:
        """Look once a second; how often it was trimmed so far."""
        for _ in range(times):
            self.now += BEAT
            self.heap.look(self.now)
        return self.trims


def test_freed_memory_is_given_back_in_a_quiet_moment() -> None:
    system = System()
    system.look()
    system.held = 200 * MIB
    assert system.look(3) == 0
    system.held, system.garbage = 0, 200 * MIB
    system.work += QUIET
    assert system.look() == 0  # much is going on
    system.work += QUIET - 1
    assert system.look() == 1
    assert system.look(5) == 1
    assert system.resident() == 60 * MIB


def test_memory_that_has_just_grown_is_left_alone_and_so_is_little() -> None:
    system = System()
    system.look()
    system.garbage = GARBAGE_BYTES - 1
    assert system.look(3) == 0
    system.garbage += 10
    assert system.look() == 0
    assert system.look() == 1


def test_what_cannot_be_given_back_is_not_tried_again_until_there_is_more() -> None:
    system = System(stuck=10**12)
    system.look()
    system.garbage = GARBAGE_BYTES
    assert system.look(5) == 1
    system.garbage += GARBAGE_BYTES - 1
    assert system.look(5) == 1
    system.garbage += 1
    assert system.look(5) == 2


def test_what_goes_back_by_itself_may_come_again() -> None:
    system = System(stuck=10**12)
    system.look()
    system.garbage = 3 * GARBAGE_BYTES
    assert system.look(3) == 1
    system.garbage = 0
    system.look()
    system.garbage = GARBAGE_BYTES
    assert system.look(3) == 2


def test_what_is_held_again_and_again_is_no_garbage() -> None:
    system = System()
    for _ in range(20):
        system.held = 60 * MIB
        system.look()
        system.held = 0
        assert system.look() == 0


@pytest.mark.parametrize("limit, much", [(10**12, MUCH_GARBAGE_BYTES), (100 * MIB, 25 * MIB)])
def test_much_is_given_back_however_busy_the_broker_is(limit: int, much: int) -> None:
    system = System(MemoryBudget(limit=limit))
    system.look()
    for _ in range(3):
        system.work += 10 * QUIET
        system.garbage = much - 1
        assert system.look() == 0
    system.garbage = much
    system.heap.look(system.now + PAUSE)  # also between two seconds
    assert (system.trims, system.heap.trims) == (1, 1)
