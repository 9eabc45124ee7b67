"""Pings: when they are due, and what becomes of a peer that does not answer."""

import math
import socket

import pytest
import trio
from trio.testing import MockClock, lockstep_stream_pair

from broker import (
    Broker,
    Config,
    TopicRules,
)
from broker.testing import Network, open_test_broker
from tests.conftest import ask


async def test_a_ping_behind_what_a_client_has_yet_to_take_is_not_yet_due(
    autojump_clock: MockClock,
) -> None:
    def narrow_pair() -> tuple[trio.abc.Stream, trio.abc.Stream]:
        ours, theirs = trio.socket.socketpair()
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the least the system has
        return trio.SocketStream(ours), trio.SocketStream(theirs)

    async with open_test_broker(Broker()) as net:
        client = await net.open_client(narrow_pair)
        for number in range(100):
            net.broker.publish("t", f"{number:01000}")
        await client.send_json({"id": 1, "history": {"channel": "t", "limit": -1}})
        for _ in range(12):
            await trio.sleep(5)
            await client.stream.receive_some(5000)
        assert net.broker.is_established(client.fd)
        await client.aclose()


async def test_a_client_is_pinged_every_20_seconds_and_stays_while_it_answers(
    autojump_clock: MockClock, net: Network
) -> None:
    client = await net.open_client()
    for _ in range(4):
        began = trio.current_time()
        assert await client.receive_json() == {}
        assert trio.current_time() - began == pytest.approx(20, abs=1.1)
        await client.send_text("{}")
    assert net.broker.is_established(client.fd)


@pytest.mark.parametrize("seconds, told", [(math.inf, 0), (0.4, 1), (20, 20), (20.5, 21)])
async def test_a_client_is_told_in_whole_seconds_how_often_it_will_be_pinged(
    autojump_clock: MockClock, seconds: float, told: int
) -> None:
    async with open_test_broker(Broker(Config(ping_seconds=seconds))) as net:
        client = await net.open_websocket()
        assert (await client.request(connect={}))["connect"]["ping"] == told


async def test_a_busy_client_is_pinged_as_well(autojump_clock: MockClock, net: Network) -> None:
    client = await net.open_client()
    pings = 0
    with trio.move_on_after(65):
        while True:
            await trio.sleep(1)
            pings += (await ask(client, {"id": 2, "publish": {"channel": "a", "data": 1}})).count(
                {}
            )
    assert pings == 3


async def test_a_client_that_does_not_answer_is_sent_away(
    autojump_clock: MockClock, net: Network
) -> None:
    client = await net.open_client()
    began = trio.current_time()
    assert await client.receive_json() == {}
    assert await client.receive_json() == {
        "push": {"disconnect": {"code": 3012, "reason": "no pong"}}
    }
    assert await client.receive_close() == (3012, "no pong")
    assert trio.current_time() - began == pytest.approx(30, abs=2.1)


async def test_a_slow_client_is_not_blamed_for_a_ping_behind_what_it_still_takes(
    autojump_clock: MockClock,
) -> None:
    rules = TopicRules(history_size=100, history_ttl=1000)
    async with open_test_broker(Broker(Config(topics=rules))) as net:
        for _ in range(100):
            net.broker.publish("a", "x" * 20_000)
        client = await net.open_client(lockstep_stream_pair)
        await client.send_json({"id": 2, "history": {"channel": "a", "limit": -1}})
        got = b""
        while not got.endswith(b"{}"):  # the ping
            await trio.sleep(1)
            data = await client.stream.receive_some(32_000)
            assert data, "cut"
            got += data
        assert len(got) > 2_000_000
        assert trio.current_time() > 60
        await client.send_text("{}")
        assert await client.receive_json() == {}
        # Whoever has got it and is silent is not slow.
        assert await client.receive_close() == (3012, "no pong")
