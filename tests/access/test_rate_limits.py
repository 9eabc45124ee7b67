"""What a connection and a user may ask for in a time, as numbers and as a client sees it."""

import json
from math import inf
from typing import Any

import attrs
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from broker import Broker, Config, ConnectEvent, Connection, ConnectReply, Disconnect, Frame
from broker.access.rate_limits import Bucket, ConnectionUsage, Limits
from broker.testing import Closed, Peer, open_test_broker


@given(
    st.lists(st.tuples(st.floats(0, 10), st.integers(1, 50)), max_size=60),
    st.floats(0.1, 100),
    st.integers(1, 100),
)
def test_in_no_stretch_of_time_more_passes_than_the_rate_and_one_burst(
    asked: list[tuple[float, int]], rate: float, burst: int
) -> None:
    bucket, now, passed = Bucket(), 0.0, []
    for pause, cost in asked:
        now += pause
        if bucket.has(cost, rate, burst, now):
            bucket.take(cost, rate, now)
            passed.append((now, cost))
    for first, (start, _) in enumerate(passed):
        for last, (end, biggest) in enumerate(passed[first:], first):
            total = sum(cost for _, cost in passed[first : last + 1])
            # Only the last can be larger than the burst: it is paid off afterwards.
            assert total <= (end - start) * rate + burst + max(0, biggest - burst) + 1e-6


@pytest.mark.parametrize(
    "steps",
    [
        # at, cost, passes; 2 a second, 4 at once
        [(0, 1, True)] * 4 + [(0, 1, False), (0.4, 1, False), (0.5, 1, True), (0.5, 1, False)],
        [(0, 4, True), (1, 3, False), (1, 2, True), (100, 4, True), (100, 1, False)],
        # larger than the burst: only from full, and the debt is paid at the rate
        [(0, 1, True), (0, 10, False), (0.5, 10, True), (3.5, 1, False), (4, 1, True)],
    ],
)
def test_a_bucket_fills_at_its_rate_up_to_its_burst(
    steps: list[tuple[float, float, bool]],
) -> None:
    bucket = Bucket()
    for now, cost, passes in steps:
        assert bucket.has(cost, 2, 4, now) is passes, (now, cost)
        if passes:
            bucket.take(cost, 2, now)


def test_without_rates_there_is_nothing_to_ask_for() -> None:
    assert not Limits(Config()).active
    for rate in ("message_rate", "byte_rate", "user_message_rate", "user_byte_rate"):
        assert Limits(attrs.evolve(Config(), **{rate: 5})).active  # type: ignore[arg-type]


def admitted(limits: Limits, usage: ConnectionUsage, user: str, count: int, now: float) -> int:
    return sum(limits.admits(usage, user, 1, now) for _ in range(count))


def test_what_is_refused_takes_nothing() -> None:
    limits, usage = Limits(Config(message_rate=1, message_burst=10)), ConnectionUsage()
    assert [admitted(limits, usage, "", 50, now) for now in (0, 1, 2, 4)] == [10, 1, 1, 2]


def test_the_connections_of_one_user_share_his_rate_and_no_others_do() -> None:
    limits = Limits(Config(user_message_rate=1, user_message_burst=10))
    phone, laptop, other, nobody = (ConnectionUsage() for _ in range(4))
    assert admitted(limits, phone, "ann", 7, 0) == 7
    assert admitted(limits, laptop, "ann", 7, 0) == 3
    assert admitted(limits, other, "bob", 7, 0) == 7
    assert admitted(limits, nobody, "", 700, 0) == 700
    # Nor does coming back help.
    assert admitted(limits, ConnectionUsage(), "ann", 7, 0) == 0
    assert len(limits) == 2


def test_users_who_have_nothing_to_pay_are_forgotten() -> None:
    limits = Limits(Config(user_message_rate=10))
    for number in range(20_000):
        limits.admits(ConnectionUsage(), f"user {number}", 1, number * 0.01)
    assert len(limits) < 2048


def test_who_goes_on_for_long_is_sent_away() -> None:
    config = Config(message_rate=1, message_burst=1, excess_rate=2, excess_burst=5)
    limits, usage = Limits(config), ConnectionUsage()
    assert admitted(limits, usage, "", 6, 0) == 1
    with pytest.raises(Disconnect, match="3013: too many requests"):
        limits.admits(usage, "", 1, 0)
    patient = ConnectionUsage()
    for second in range(100):
        assert admitted(limits, patient, "", 3, second) == 1


def test_a_reload_changes_rates_and_keeps_what_was_used() -> None:
    limits, usage = Limits(Config(message_rate=1, message_burst=10)), ConnectionUsage()
    assert admitted(limits, usage, "", 8, 0) == 8
    limits.reload(Config(message_rate=1, message_burst=9))
    assert admitted(limits, usage, "", 8, 0) == 1
    limits.reload(Config(message_rate=inf, byte_rate=10))
    assert admitted(limits, usage, "", 8, 0) == 8


# asked of a broker


def served(**config: Any) -> Broker:
    """A broker that takes a client's token for its user."""
    broker = Broker(Config(**config))

    @broker.on_connect
    async def name(event: ConnectEvent) -> ConnectReply:
        return ConnectReply(user=event.token)

    return broker


async def arrived(peer: Peer) -> list[Any]:
    objects: list[Any] = []
    try:
        while True:
            with trio.move_on_after(0.01) as silence:
                text = await peer.receive_text()
            if silence.cancelled_caught:
                return objects
            objects += map(json.loads, text.split("\n"))
    except Closed as closed:
        return [*objects, (closed.code, closed.reason)]


def publishes(first: int, count: int, data: object = 1) -> list[object]:
    return [
        {"id": number, "publish": {"channel": "a", "data": data}}
        for number in range(first, first + count)
    ]


def refused(replies: list[Any]) -> list[int]:
    """The ids of those that were told to come later."""
    for reply in replies:
        if "error" in reply:
            error = {"code": 111, "message": "too many requests", "temporary": True}
            assert reply["error"] == error
    return [reply["id"] for reply in replies if "error" in reply]


@pytest.mark.parametrize("joined", [True, False])
async def test_requests_beyond_the_rate_are_answered_with_111(
    autojump_clock: MockClock, joined: bool
) -> None:
    async with open_test_broker(served(message_rate=1, message_burst=5)) as net:
        peer = await net.open_client()  # the connect is one
        async with net.broker.subscribe("a") as messages:
            commands = publishes(10, 6)
            if joined:
                await peer.send_json(*commands)
            else:
                for command in commands:
                    await peer.send_json(command)
            assert refused(await arrived(peer)) == [14, 15]
            await trio.sleep(2)
            await peer.send_json(*publishes(20, 1), {"id": 21, "history": {"channel": "a"}})
            await peer.send_json({"id": 22, "rpc": {"method": "x"}}, {"rpc": {"method": "x"}})
            assert refused(await arrived(peer)) == [22]
            for _ in range(5):
                await messages.receive()
            with trio.move_on_after(1) as silence:
                await messages.receive()
            assert silence.cancelled_caught


async def test_bytes_count_as_they_came(autojump_clock: MockClock) -> None:
    async with open_test_broker(served(byte_rate=100, byte_burst=1000)) as net:
        peer = await net.open_client()
        await peer.send_json(*publishes(10, 1, "x" * 600))
        await peer.send_json(*publishes(11, 1, "x" * 600))
        await peer.send_json(*publishes(12, 1))
        assert refused(await arrived(peer)) == [11]
        await trio.sleep(15)
        await peer.send_json(*publishes(13, 1, "x" * 3000))
        await peer.send_json(*publishes(14, 1))
        assert refused(await arrived(peer)) == [14]


async def test_the_bytes_of_a_message_are_shared_among_its_commands(
    autojump_clock: MockClock,
) -> None:
    async with open_test_broker(served(byte_rate=1, byte_burst=1000)) as net:
        peer = await net.open_client()
        await peer.send_json(*publishes(10, 8, "x" * 50))
        assert refused(await arrived(peer)) == []
        await peer.send_json(*publishes(20, 8, "x" * 50))
        assert 0 < len(refused(await arrived(peer))) < 8


async def test_answers_to_pings_are_not_counted(autojump_clock: MockClock) -> None:
    async with open_test_broker(
        served(message_rate=1e-3, message_burst=1, excess_rate=1e-3, excess_burst=1)
    ) as net:
        peer = await net.open_client()
        for _ in range(10):
            await trio.sleep(20)
            assert await peer.receive_json() == {}
            await peer.send_json({})
        assert net.broker.is_established(peer.fd)


async def test_all_connections_of_a_user_are_limited_together(autojump_clock: MockClock) -> None:
    async with open_test_broker(served(user_message_rate=1, user_message_burst=5)) as net:
        phone = await net.open_client(token="ann")
        laptop = await net.open_client(token="ann")
        await phone.send_json(*publishes(10, 3))
        assert refused(await arrived(phone)) == []
        await laptop.send_json(*publishes(10, 3))
        assert refused(await arrived(laptop)) == [12]


async def test_who_floods_is_sent_away_and_a_bystander_loses_nothing(
    autojump_clock: MockClock,
) -> None:
    broker = served(message_rate=10, message_burst=10, excess_burst=20)
    async with open_test_broker(broker) as net:
        bystander, flood = await net.open_client(), await net.open_client()
        await bystander.request(subscribe={"channel": "a"})
        await flood.send_json(*publishes(10, 100))
        *replies, push, close = await arrived(flood)
        assert [r["id"] for r in replies if "error" not in r] == list(range(10, 19))
        assert refused(replies) == list(range(19, 39))
        assert push["push"]["disconnect"]["code"] == 3013
        assert close == (3013, "too many requests")
        assert len(await arrived(bystander)) == 9


async def test_a_plain_peer_that_sends_too_much_is_closed(autojump_clock: MockClock) -> None:
    broker, got = Broker(Config(message_rate=1, message_burst=3)), []

    @broker.on_message
    async def take(connection: Connection, frame: Frame) -> None:
        got.append(frame.data)

    async with open_test_broker(broker) as net:
        peer = await net.open_plain()
        for number in range(3):
            await peer.send_text(f"{number}")
        await trio.sleep(1)
        await peer.send_text("3")
        await peer.send_text("4")
        assert await peer.receive_close() == (1008, "too many messages")
        assert got == ["0", "1", "2", "3"]
