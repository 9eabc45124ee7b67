"""The end that a token puts to connections and subscriptions, and how it is put off."""

from typing import Any

import attrs
import pytest
import trio
from trio.testing import MockClock

from broker import Broker, Config, ConnectEvent, SubscribeEvent, TokenRules
from broker.access.keys import load_keys
from broker.testing import Network, open_test_broker
from tests.conftest import HMAC_SECRET
from tests.session.conftest import (
    CONFIG,
    connect,
    next_push,
    refused,
    silent_for,
    token,
)


async def test_a_connection_that_is_not_refreshed_ends_after_the_grace_period(
    autojump_clock: MockClock, keyed: Network
) -> None:
    peer = await keyed.open_websocket()
    reply = await peer.request(connect={"token": token(keyed, 60, sub="alice")})
    assert reply["connect"]["expires"] is True
    assert reply["connect"]["ttl"] == 60
    start = trio.current_time()
    push = await next_push(peer)
    assert push["disconnect"]["code"] == 3005
    assert 85 <= trio.current_time() - start <= 86.5
    assert await peer.receive_close() == (3005, "connection expired")


async def test_refresh_puts_the_end_off(autojump_clock: MockClock, keyed: Network) -> None:
    peer = await connect(keyed, expires=60, sub="alice")
    start = trio.current_time()
    assert await silent_for(peer, 70)
    reply = await peer.request(refresh={"token": token(keyed, 60, sub="alice", meta=2)})
    assert reply["refresh"].pop("version")
    assert reply["refresh"] == {"client": str(peer.fd), "expires": True, "ttl": 60}
    assert (await next_push(peer))["disconnect"]["code"] == 3005
    assert 155 <= trio.current_time() - start <= 156.5


async def test_refresh_with_a_token_that_does_not_expire_ends_the_worry(
    autojump_clock: MockClock, keyed: Network
) -> None:
    peer = await connect(keyed, expires=60, sub="alice")
    reply = await peer.request(refresh={"token": token(keyed, sub="alice")})
    assert "expires" not in reply["refresh"]
    assert await silent_for(peer, 1000)


@pytest.mark.parametrize(
    "claims, expires, code",
    [
        ({"sub": "alice"}, -6, 109),
        ({"sub": "bob"}, 60, 3500),
        ({}, 60, 3500),
        ({"sub": "alice", "channel": "a"}, 60, 3500),
        ({"sub": "alice", "expire_at": 1}, 60, 110),
    ],
)
async def test_a_token_that_does_not_refresh(
    autojump_clock: MockClock, keyed: Network, claims: dict[str, Any], expires: float, code: int
) -> None:
    peer = await connect(keyed, expires=60, sub="alice")
    assert await refused(peer, refresh={"token": token(keyed, expires, **claims)}) == code


async def test_refresh_without_a_token_is_invalid(
    autojump_clock: MockClock, keyed: Network
) -> None:
    peer = await connect(keyed, expires=60, sub="alice")
    assert await refused(peer, refresh={}) == 3500


async def test_expire_at_says_when_the_connection_ends(
    autojump_clock: MockClock, keyed: Network
) -> None:
    now = keyed.broker.wall_clock()
    peer = await keyed.open_websocket()
    reply = await peer.request(connect={"token": token(keyed, 60, expire_at=now + 500)})
    assert reply["connect"]["ttl"] == 500
    peer = await keyed.open_websocket()
    reply = await peer.request(connect={"token": token(keyed, 60, expire_at=0)})
    assert "expires" not in reply["connect"]
    peer = await keyed.open_websocket()
    assert await refused(peer, connect={"token": token(keyed, 60, expire_at=now - 60)}) == 110


async def test_a_clock_that_is_set_moves_no_deadline(autojump_clock: MockClock) -> None:
    broker = Broker(attrs.evolve(CONFIG, stale_seconds=100))
    async with open_test_broker(broker) as net:
        peer = await connect(net, expires=60)
        clock = broker.wall_clock
        broker.wall_clock = lambda: clock() + 10_000
        start = trio.current_time()
        assert (await next_push(peer))["disconnect"]["code"] == 3005
        assert trio.current_time() - start >= 85


async def test_a_subscription_that_is_not_refreshed_ends_after_the_grace_period(
    autojump_clock: MockClock, keyed: Network
) -> None:
    peer = await connect(keyed, sub="alice")
    start = trio.current_time()
    for topic, expires in (("$late", 200), ("$soon", 60), ("$never", None)):
        given = token(keyed, expires, sub="alice", channel=topic)
        reply = await peer.request(subscribe={"channel": topic, "token": given})
        assert reply["subscribe"].get("ttl") == expires
        assert reply["subscribe"].get("expires", False) is (expires is not None)
    for topic, after in (("$soon", 85), ("$late", 225)):
        push = await next_push(peer)
        assert push == {
            "channel": topic,
            "unsubscribe": {"code": 2501, "reason": "subscription expired"},
        }
        assert after <= trio.current_time() - start <= after + 1.5
    assert keyed.broker.connections()[0].topics == ("$never",)
    # the client comes back with another token
    given = token(keyed, 60, sub="alice", channel="$soon")
    assert "subscribe" in await peer.request(subscribe={"channel": "$soon", "token": given})


async def test_sub_refresh_puts_the_end_off(autojump_clock: MockClock, keyed: Network) -> None:
    peer = await connect(keyed, sub="alice")
    start = trio.current_time()
    good = token(keyed, 60, sub="alice", channel="$a")
    await peer.request(subscribe={"channel": "$a", "token": good})
    assert await silent_for(peer, 50)
    again = token(keyed, 60, sub="alice", channel="$a")
    reply = await peer.request(sub_refresh={"channel": "$a", "token": again})
    assert reply["sub_refresh"] == {"expires": True, "ttl": 60}
    assert (await next_push(peer))["unsubscribe"]["code"] == 2501
    assert 135 <= trio.current_time() - start <= 136.5
    # what was refused
    assert await refused(peer, sub_refresh={"channel": "$a", "token": again}) == 109
    fresh = token(keyed, 60, sub="alice", channel="$a")
    assert await refused(peer, sub_refresh={"channel": "$a", "token": fresh}) == 103  # gone
    await peer.request(subscribe={"channel": "open"})
    assert await refused(peer, sub_refresh={"channel": "open"}) == 103
    assert await refused(peer, sub_refresh={"channel": "open", "token": fresh}) == 103
    assert await refused(peer, sub_refresh={"channel": "open", "token": "garbage"}) == 103


async def test_an_ended_subscription_takes_its_deadline_along(
    autojump_clock: MockClock, keyed: Network
) -> None:
    peer = await connect(keyed, sub="alice")
    given = token(keyed, 60, sub="alice", channel="room")
    await peer.request(subscribe={"channel": "room", "token": given})
    await peer.request(unsubscribe={"channel": "room"})
    await peer.request(subscribe={"channel": "room"})
    assert await silent_for(peer, 200)


async def test_subscriptions_that_expire_together_end_a_few_at_a_time(
    autojump_clock: MockClock, keyed: Network
) -> None:
    """A client may have a thousand, whose tokens all end at the full hour."""
    peer = await connect(keyed, sub="alice")
    topics = [f"$t{number}" for number in range(300)]
    for topic in topics:
        given = token(keyed, 60, sub="alice", channel=topic)
        await peer.request(subscribe={"channel": topic, "token": given})
    (connection,) = keyed.broker.connections()
    served = keyed.broker._node.services.connections[connection.fd]  # type: ignore[union-attr]
    now = trio.current_time() + 86
    assert served.beat(now), "there is more"
    left = len(served.peer.subscriptions)
    assert 100 < left < 300
    while served.beat(now):
        assert len(served.peer.subscriptions) < left
        left = len(served.peer.subscriptions)
    assert not served.peer.subscriptions
    assert served.peer.next_expiry > now
    ended = [await next_push(peer) for _ in topics]
    assert {each["channel"] for each in ended} == set(topics)


@pytest.mark.parametrize("leaves_open", [{}, {"expire_at": 0}, {"expire_at": 4_000_000_000}])
async def test_a_token_that_expires_while_a_hook_is_asked_has_expired(
    autojump_clock: MockClock, leaves_open: dict[str, int]
) -> None:
    """As one that came too late: the client fetches another, which error 110 would keep it from."""
    broker = Broker(attrs.evolve(CONFIG, stale_seconds=100))

    @broker.on_connect
    async def look_up(event: ConnectEvent) -> None:
        await trio.sleep(10)

    @broker.on_subscribe
    async def may_read(event: SubscribeEvent) -> None:
        await trio.sleep(10)

    async with open_test_broker(broker) as net:
        peer = await net.open_websocket()

        async def answered(method: str, seconds: int, **claims: object) -> Any:
            about = {"sub": "alice", **leaves_open, **claims}
            signed = token(net, seconds, **about)
            channel = {} if method == "connect" else {"channel": "$room"}
            return await peer.request(**{method: {"token": signed, **channel}})

        assert (await answered("connect", 4))["error"]["code"] == 109
        assert net.broker.fds_of("alice") == []
        assert "connect" in await answered("connect", 60)
        reply = await answered("subscribe", 4, channel="$room")
        assert reply["error"]["code"] == 109
        assert net.broker.topics() == {}
        assert "subscribe" in await answered("subscribe", 60, channel="$room")


@pytest.mark.parametrize(
    ("method", "rules"),
    [
        ("connect", {"hmac_secret": "another secret, of 32 characters."}),
        ("connect", {"hmac_secret": HMAC_SECRET, "issuer": "somebody else"}),
        ("connect without", {"hmac_secret": HMAC_SECRET, "allow_anonymous": False}),
        (
            "subscribe",
            {"hmac_secret": "another secret, of 32 characters.", "allow_anonymous": True},
        ),
    ],
)
async def test_a_token_stands_as_long_as_the_keys_and_rules_by_which_it_was_verified(
    autojump_clock: MockClock, method: str, rules: dict[str, Any]
) -> None:
    """A reload while a hook is asked: as for the same token a moment later."""
    before = TokenRules(hmac_secret=HMAC_SECRET, allow_anonymous=True)
    broker = Broker(Config(tokens=before, stale_seconds=100))
    waits: list[float] = [0.0]

    @broker.on_connect
    async def look_up(event: ConnectEvent) -> None:
        await trio.sleep(waits[0])

    @broker.on_subscribe
    async def may_read(event: SubscribeEvent) -> None:
        await trio.sleep(waits[0])

    async with open_test_broker(broker) as net:
        peer = await net.open_websocket()
        if method == "subscribe":
            await peer.request(connect={})
            asked: dict[str, Any] = {"channel": "$room", "token": token(net, 60, channel="$room")}
        else:
            asked = {} if method == "connect without" else {"token": token(net, 60, sub="alice")}
        waits[0] = 1.0
        outcome: list[int] = []

        async def ask() -> None:
            outcome.append(await refused(peer, **{method.split(maxsplit=1)[0]: asked}))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await trio.sleep(0.5)
            after = TokenRules(**rules)
            net.node.reload(Config(tokens=after, stale_seconds=100), keys=load_keys(after))
        assert outcome == [103 if method == "subscribe" else 3500]
        assert net.broker.topics() == {}
