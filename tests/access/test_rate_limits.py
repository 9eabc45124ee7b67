"""Rates of a connection and of a user, as numbers and as a client sees it."""

from math import inf
from typing import Any

import attrs
import pytest
import trio
from trio.testing import MockClock

from broker import Broker, Config, Connection, Disconnect, Frame
from broker.access.rate_limits import RateLimits
from broker.config.reload import Settings
from broker.core.usage import ConnectionUsage
from broker.testing import name_users_by_token, open_test_broker


def limits_of(config: Config) -> RateLimits:
    return RateLimits(Settings(config))


def test_without_rates_there_is_nothing_to_ask_for() -> None:
    assert not limits_of(Config()).are_active
    for rate in ("message_rate", "byte_rate", "user_message_rate", "user_byte_rate"):
        assert limits_of(attrs.evolve(Config(), **{rate: 5})).are_active  # type: ignore[arg-type]


def admitted(limits: RateLimits, usage: ConnectionUsage, user: str, count: int, now: float) -> int:
    return sum(limits.admits(usage, user, 1, now) for _ in range(count))


def test_a_refused_message_takes_nothing() -> None:
    limits, usage = limits_of(Config(message_rate=1, message_burst=10)), ConnectionUsage()
    assert [admitted(limits, usage, "", 50, now) for now in (0, 1, 2, 4)] == [10, 1, 1, 2]


def test_the_connections_of_one_user_share_his_rate_and_no_others_do() -> None:
    limits = limits_of(Config(user_message_rate=1, user_message_burst=10))
    phone, laptop, other, nobody = (ConnectionUsage() for _ in range(4))
    assert admitted(limits, phone, "ann", 7, 0) == 7
    assert admitted(limits, laptop, "ann", 7, 0) == 3
    assert admitted(limits, other, "bob", 7, 0) == 7
    assert admitted(limits, nobody, "", 700, 0) == 700
    # Nor does coming back help.
    assert admitted(limits, ConnectionUsage(), "ann", 7, 0) == 0
    assert len(limits) == 2


def test_users_who_have_nothing_to_pay_are_forgotten() -> None:
    limits = limits_of(Config(user_message_rate=10))
    for number in range(20_000):
        limits.admits(ConnectionUsage(), f"user {number}", 1, number * 0.01)
    assert len(limits) < 2048


def test_a_connection_that_goes_on_for_long_is_sent_away() -> None:
    config = Config(message_rate=1, message_burst=1, excess_rate=2, excess_burst=5)
    limits, usage = limits_of(config), ConnectionUsage()
    assert admitted(limits, usage, "", 6, 0) == 1
    with pytest.raises(Disconnect, match="3013: too many requests"):
        limits.admits(usage, "", 1, 0)
    patient = ConnectionUsage()
    for second in range(100):
        assert admitted(limits, patient, "", 3, second) == 1


def test_a_reload_changes_rates_and_keeps_what_was_used() -> None:
    settings = Settings(Config(message_rate=1, message_burst=10))
    limits, usage = RateLimits(settings), ConnectionUsage()
    assert admitted(limits, usage, "", 8, 0) == 8
    settings.replace(Config(message_rate=1, message_burst=9))
    assert admitted(limits, usage, "", 8, 0) == 1
    settings.replace(Config(message_rate=inf, byte_rate=10))
    assert admitted(limits, usage, "", 8, 0) == 8


# asked of a broker


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
    async with open_test_broker(
        name_users_by_token(Broker(Config(message_rate=1, message_burst=5)))
    ) as net:
        peer = await net.open_client()  # the connect is one
        async with net.broker.subscribe("a") as messages:
            commands = publishes(10, 6)
            if joined:
                await peer.send_json(*commands)
            else:
                for command in commands:
                    await peer.send_json(command)
            assert refused(await peer.receive_all()) == [14, 15]
            await trio.sleep(2)
            await peer.send_json(*publishes(20, 1), {"id": 21, "history": {"channel": "a"}})
            await peer.send_json({"id": 22, "rpc": {"method": "x"}}, {"rpc": {"method": "x"}})
            assert refused(await peer.receive_all()) == [22]
            for _ in range(5):
                await messages.receive()
            with trio.move_on_after(1) as silence:
                await messages.receive()
            assert silence.cancelled_caught


async def test_bytes_count_as_they_came(autojump_clock: MockClock) -> None:
    async with open_test_broker(
        name_users_by_token(Broker(Config(byte_rate=100, byte_burst=1000)))
    ) as net:
        peer = await net.open_client()
        await peer.send_json(*publishes(10, 1, "x" * 600))
        await peer.send_json(*publishes(11, 1, "x" * 600))
        await peer.send_json(*publishes(12, 1))
        assert refused(await peer.receive_all()) == [11]
        await trio.sleep(15)
        await peer.send_json(*publishes(13, 1, "x" * 3000))
        await peer.send_json(*publishes(14, 1))
        assert refused(await peer.receive_all()) == [14]


async def test_the_bytes_of_a_message_are_shared_among_its_commands(
    autojump_clock: MockClock,
) -> None:
    async with open_test_broker(
        name_users_by_token(Broker(Config(byte_rate=1, byte_burst=1000)))
    ) as net:
        peer = await net.open_client()
        await peer.send_json(*publishes(10, 8, "x" * 50))
        assert refused(await peer.receive_all()) == []
        await peer.send_json(*publishes(20, 8, "x" * 50))
        assert 0 < len(refused(await peer.receive_all())) < 8


async def test_answers_to_pings_are_not_counted(autojump_clock: MockClock) -> None:
    async with open_test_broker(
        name_users_by_token(
            Broker(Config(message_rate=1e-3, message_burst=1, excess_rate=1e-3, excess_burst=1))
        )
    ) as net:
        peer = await net.open_client()
        for _ in range(10):
            await trio.sleep(20)
            assert await peer.receive_json() == {}
            await peer.send_json({})
        assert net.broker.is_established(peer.fd)


async def test_all_connections_of_a_user_are_limited_together(autojump_clock: MockClock) -> None:
    async with open_test_broker(
        name_users_by_token(Broker(Config(user_message_rate=1, user_message_burst=5)))
    ) as net:
        phone = await net.open_client(token="ann")
        laptop = await net.open_client(token="ann")
        await phone.send_json(*publishes(10, 3))
        assert refused(await phone.receive_all()) == []
        await laptop.send_json(*publishes(10, 3))
        assert refused(await laptop.receive_all()) == [12]


async def test_a_client_that_floods_is_sent_away_and_a_bystander_loses_nothing(
    autojump_clock: MockClock,
) -> None:
    broker = name_users_by_token(Broker(Config(message_rate=10, message_burst=10, excess_burst=20)))
    async with open_test_broker(broker) as net:
        bystander, flood = await net.open_client(), await net.open_client()
        await bystander.request(subscribe={"channel": "a"})
        await flood.send_json(*publishes(10, 100))
        *replies, push, close = await flood.receive_all()
        assert [r["id"] for r in replies if "error" not in r] == list(range(10, 19))
        assert refused(replies) == list(range(19, 39))
        assert push["push"]["disconnect"] == {"code": 3013, "reason": "too many requests"}
        assert close == 3013
        assert len(await bystander.receive_all()) == 9


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
