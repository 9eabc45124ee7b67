"""Tokens end to end: a client in memory, and what its token makes of it until it expires."""

from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from jwt.algorithms import OKPAlgorithm
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from trio.testing import MockClock

from broker import (
    Broker,
    Config,
    ConfigError,
    ConnectEvent,
    ConnectReply,
    Disconnect,
    Refused,
    SubscribeEvent,
    SubscribeReply,
    TokenRules,
    TopicRules,
)
from broker.access.minting import mint
from broker.testing import Network, handshake, open_test_broker
from tests.session.conftest import CONFIG, connect, next_push, refused, silent_for, token

# connect


async def test_a_token_says_who_connects(autojump_clock: MockClock, keyed: Network) -> None:
    peer = await keyed.open_websocket()
    reply = await peer.request(
        connect={"token": token(keyed, sub="alice", info={"name": "Alice"}, meta={"plan": 1})}
    )
    assert "expires" not in reply["connect"]
    assert keyed.broker.fds_of("alice") == [peer.fd]
    await peer.request(subscribe={"channel": "news"})
    presence = (await peer.request(presence={"channel": "news"}))["presence"]["presence"]
    assert presence == {
        str(peer.fd): {"user": "alice", "client": str(peer.fd), "conn_info": {"name": "Alice"}}
    }


@pytest.mark.parametrize(
    "bad", ["", "garbage", "eyJhbGciOiJub25lIn0.eyJzdWIiOiJhZG1pbiJ9.", "x" * 9000]
)
async def test_who_has_no_good_token_is_sent_away_for_good(
    autojump_clock: MockClock, keyed: Network, bad: str
) -> None:
    peer = await keyed.open_websocket()
    await peer.send_json({"id": 1, "connect": {"token": bad}})
    assert await peer.receive_close() == (3500, "invalid token")


async def test_an_expired_token_may_be_replaced(autojump_clock: MockClock, keyed: Network) -> None:
    peer = await keyed.open_websocket()
    assert await refused(peer, connect={"token": token(keyed, -6, sub="alice")}) == 109
    assert await refused(peer, connect={"token": token(keyed, nbf=9e9)}) == 109
    assert keyed.broker.fds_of("alice") == []
    assert "connect" in await peer.request(connect={"token": token(keyed, 60, sub="alice")})


async def test_anonymous_clients_come_in_where_the_settings_allow_it(
    autojump_clock: MockClock,
) -> None:
    config = attrs.evolve(CONFIG, tokens=attrs.evolve(CONFIG.tokens, allow_anonymous=True))
    async with open_test_broker(Broker(config)) as net:
        peer = await net.open_client()
        assert "subscribe" in await peer.request(subscribe={"channel": "news"})
        assert await refused(peer, refresh={"token": token(net, sub="alice")}) == 3500
        # one that comes with a token needs a good one all the same
        other = await net.open_websocket()
        assert await refused(other, connect={"token": "bad"}) == 3500


async def test_without_a_key_tokens_are_the_apps_business(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker()) as net:

        @net.broker.on_connect
        async def let_in(event: ConnectEvent) -> ConnectReply:
            assert event.claims is None
            return ConnectReply(user=event.token)

        @net.broker.on_subscribe
        async def look(event: SubscribeEvent) -> None:
            assert event.token == "x"

        peer = await net.open_client(token="alice")
        assert net.broker.fds_of("alice") == [peer.fd]
        assert "subscribe" in await peer.request(subscribe={"channel": "$a", "token": "x"})
        assert await refused(peer, refresh={"token": "x"}) == 108
        assert await refused(peer, sub_refresh={"channel": "$a", "token": "x"}) == 108


async def test_a_subscription_token_is_above_the_rules(autojump_clock: MockClock) -> None:
    rules = TopicRules(may_subscribe="none")
    async with open_test_broker(Broker(attrs.evolve(CONFIG, topics=rules))) as net:
        peer = await connect(net, sub="alice")
        for topic in ("a", "room#bob"):
            assert await refused(peer, subscribe={"channel": topic}) == 103
            shown = token(net, sub="alice", channel=topic)
            reply = await peer.request(subscribe={"channel": topic, "token": shown})
            assert "subscribe" in reply
            published = await peer.request(publish={"channel": topic, "data": 1})
            assert "publish" in published


async def test_the_personal_topic_comes_beside_those_of_the_token(
    autojump_clock: MockClock,
) -> None:
    config = attrs.evolve(CONFIG, personal_topic=True, max_connections_per_user=1)
    async with open_test_broker(Broker(config)) as net:
        peer = await net.open_websocket()
        reply = await peer.request(connect={"token": token(net, sub="alice", channels=["a"])})
        assert list(reply["connect"]["subs"]) == [f"fd:{peer.fd}", "user:alice", "#alice", "a"]
        another = await net.open_websocket()
        connecting = {"token": token(net, sub="alice")}
        await another.send_json({"id": 1, "connect": connecting})
        assert await another.receive_close() == (3504, "connection limit")


async def test_the_connect_hook_sees_the_claims_and_has_the_last_word(
    autojump_clock: MockClock, keyed: Network
) -> None:
    seen: list[ConnectEvent] = []

    @keyed.broker.on_connect
    async def check(event: ConnectEvent) -> ConnectReply | None:
        seen.append(event)
        if event.data == "banned":
            raise Disconnect(3507, "banned")
        if event.data == "rename":
            return ConnectReply(user="bob", info={"as": "bob"}, data={"welcome": 1})
        return None

    claims: dict[str, Any] = {"sub": "alice", "info": 1, "meta": {"plan": "free"}}
    peer = await keyed.open_websocket()
    assert await refused(peer, connect={"token": "bad"}) == 3500
    assert seen == []
    peer = await keyed.open_websocket()
    assert await refused(peer, connect={"token": token(keyed, **claims), "data": "banned"}) == 3507
    (event,) = seen
    assert event.claims == claims
    assert event.connection.claims == {}  # it was not let in

    peer = await connect(keyed, **claims)
    assert keyed.broker.fds_of("alice") == [peer.fd]
    assert seen[-1].connection.claims == claims
    peer = await keyed.open_client(token=token(keyed, 60, **claims), data="rename")
    assert keyed.broker.fds_of("bob") == [peer.fd]
    # its tokens still name alice; what is said of topics goes by the user that the app knows
    assert "refresh" in await peer.request(refresh={"token": token(keyed, 90, sub="alice")})
    for user, passes in (("alice", False), ("bob", True)):
        request = {"channel": "$a", "token": token(keyed, sub=user, channel="$a")}
        assert ("subscribe" in await peer.request(subscribe=request)) is passes
    presence = (await peer.request(presence={"channel": "$a"}))["presence"]["presence"]
    assert presence[str(peer.fd)]["conn_info"] == {"as": "bob"}


async def test_a_connect_that_failed_leaves_nothing_of_its_token(
    autojump_clock: MockClock,
) -> None:
    config = attrs.evolve(CONFIG, tokens=attrs.evolve(CONFIG.tokens, allow_anonymous=True))
    async with open_test_broker(Broker(config)) as net:

        @net.broker.on_connect
        async def fail(event: ConnectEvent) -> ConnectReply | None:
            return ConnectReply(data={"a": object()}) if event.claims else None

        peer = await net.open_websocket()
        assert await refused(peer, connect={"token": token(net, 10, sub="alice")}) == 100
        assert "connect" in await peer.request(connect={})
        (info,) = net.broker.connections()
        assert info.user == ""
        assert await silent_for(peer, 60)  # it does not expire


# server-side subscriptions


async def test_a_token_subscribes_its_bearer(autojump_clock: MockClock, keyed: Network) -> None:
    for number in range(3):
        keyed.broker.publish("news", number)
    peer = await keyed.open_websocket()
    claims: dict[str, Any] = {
        "sub": "alice",
        "channels": ["news", "plan.*"],
        "subs": {"chat": {"info": {"role": "admin"}, "data": {"hello": 1}}},
    }
    subs = (await peer.request(connect={"token": token(keyed, **claims)}))["connect"]["subs"]
    assert set(subs) == {f"fd:{peer.fd}", "user:alice", "news", "plan.*", "chat"}
    assert subs["plan.*"] == {}
    assert subs["news"]["recoverable"]
    assert subs["news"]["offset"] == 3
    assert subs["news"]["publications"] == []
    assert subs["chat"]["data"] == {"hello": 1}
    for topic in ("news", "plan.a", "chat"):
        keyed.broker.publish(topic, topic)
        assert (await next_push(peer))["pub"]["data"] == topic
    presence = (await peer.request(presence={"channel": "chat"}))["presence"]["presence"]
    assert presence[str(peer.fd)]["chan_info"] == {"role": "admin"}
    assert await refused(peer, subscribe={"channel": "news"}) == 105


async def test_a_server_side_subscription_recovers(
    autojump_clock: MockClock, keyed: Network
) -> None:
    good = token(keyed, sub="alice", channels=["news"])
    peer = await keyed.open_websocket()
    before = (await peer.request(connect={"token": good}))["connect"]["subs"]["news"]
    await peer.aclose()
    for number in range(3):
        keyed.broker.publish("news", number)
    for epoch, recovered in ((before["epoch"], True), ("other", False)):
        peer = await keyed.open_websocket()
        # The flag asks for an error, which would be one for all that connect brings.
        asked = {"recover": True, "offset": 0, "epoch": epoch, "flag": 2}
        reply = await peer.request(connect={"token": good, "subs": {"news": asked}})
        news = reply["connect"]["subs"]["news"]
        assert news["was_recovering"]
        assert news["recovered"] is recovered
        assert [p["data"] for p in news["publications"]] == ([0, 1, 2] if recovered else [])


async def test_who_watches_a_topic_is_told_of_server_side_subscriptions(
    autojump_clock: MockClock, keyed: Network
) -> None:
    watcher = await connect(keyed, sub="bob")
    await watcher.request(subscribe={"channel": "news", "join_leave": True})
    assert "join" in await next_push(watcher)  # its own
    peer = await connect(keyed, sub="alice", channels=["news"])
    push = await next_push(watcher)
    assert push["join"]["info"] == {"user": "alice", "client": str(peer.fd)}


@pytest.mark.parametrize(
    "channels, code", [(["a", ""], 107), (["fd:1"], 103), (["a\x00"], 107), (["a", "b", "c"], 106)]
)
async def test_topics_that_cannot_be_are_refused_before_anything_changes(
    autojump_clock: MockClock, channels: list[str], code: int
) -> None:
    async with open_test_broker(Broker(attrs.evolve(CONFIG, max_topics=2))) as net:
        peer = await net.open_websocket()
        assert await refused(peer, connect={"token": token(net, channels=channels)}) == code
        good = token(net, channels=["a", "b"])
        assert "connect" in await peer.request(connect={"token": good})


async def test_a_gap_in_a_server_side_subscription_ends_the_connection_which_then_recovers(
    autojump_clock: MockClock,
) -> None:
    rules = TopicRules(slow_consumer="drop_oldest")
    config = attrs.evolve(CONFIG, topics=rules, outbox_messages=5)
    async with open_test_broker(Broker(config)) as net:
        peer = await net.open_websocket(make_pair=trio.testing.lockstep_stream_pair)
        await peer.send_json({"id": 1, "connect": {"token": token(net, channels=["news"])}})
        await peer.receive_text()
        for number in range(50):
            net.broker.publish("news", number)
            await trio.sleep(0.001)
        numbers = []
        while "pub" in (push := await next_push(peer)):
            numbers.append(push["pub"]["data"])
        assert numbers == list(range(len(numbers)))
        assert len(numbers) < 50
        assert push["disconnect"]["code"] == 3010
        assert await peer.receive_close() == (3010, "insufficient state")


# refresh and expiry


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
    broker = Broker(CONFIG)
    async with open_test_broker(broker) as net:
        peer = await connect(net, expires=60)
        clock = broker.wall_clock
        broker.wall_clock = lambda: clock() + 10_000
        start = trio.current_time()
        assert (await next_push(peer))["disconnect"]["code"] == 3005
        assert trio.current_time() - start >= 85


# subscribe


async def test_a_private_topic_is_for_who_has_a_token_for_it(
    autojump_clock: MockClock, keyed: Network
) -> None:
    peer = await connect(keyed, sub="alice")
    for name in ("$room", "$room.*", ">", "*.a"):
        assert await refused(peer, subscribe={"channel": name}) == 103
    assert await refused(peer, history={"channel": "$room"}) == 103
    assert await refused(peer, presence={"channel": "$room"}) == 103
    assert "subscribe" in await peer.request(subscribe={"channel": "room"})
    claims: dict[str, Any] = {
        "sub": "alice",
        "channel": "$room",
        "info": {"role": 1},
        "data": {"hello": 1},
    }
    reply = await peer.request(subscribe={"channel": "$room", "token": token(keyed, **claims)})
    assert reply["subscribe"] == {"data": {"hello": 1}}
    presence = (await peer.request(presence={"channel": "$room"}))["presence"]["presence"]
    assert presence[str(peer.fd)]["chan_info"] == {"role": 1}
    assert "history" in await peer.request(history={"channel": "$room"})
    wide = token(keyed, sub="alice", channel=">")
    assert "subscribe" in await peer.request(subscribe={"channel": ">", "token": wide})


@pytest.mark.parametrize("channel", ["room", "$room"])
@pytest.mark.parametrize(
    "claims, expires, code",
    [
        ({"sub": "alice", "channel": "$other"}, 60, 103),
        ({"sub": "bob", "channel": "CHANNEL"}, 60, 103),
        ({"channel": "CHANNEL"}, 60, 103),
        ({"sub": "alice"}, 60, 103),
        ({"sub": "alice", "channel": "CHANNEL", "client": "999"}, 60, 103),
        ({"sub": "alice", "channel": "CHANNEL"}, -6, 109),
        ({"sub": "alice", "channel": "CHANNEL", "expire_at": 1}, 60, 110),
    ],
)
async def test_a_token_that_is_given_must_be_good(
    autojump_clock: MockClock,
    keyed: Network,
    channel: str,
    claims: dict[str, Any],
    expires: float,
    code: int,
) -> None:
    peer = await connect(keyed, sub="alice")
    if "channel" in claims:
        claims = {**claims, "channel": claims["channel"].replace("CHANNEL", channel)}
    given = token(keyed, expires, **claims)
    assert await refused(peer, subscribe={"channel": channel, "token": given}) == code
    assert await refused(peer, subscribe={"channel": channel, "token": "garbage"}) == 103
    assert keyed.broker.connections()[0].topics == ()


async def test_a_subscription_token_of_old_may_name_the_connection(
    autojump_clock: MockClock, keyed: Network
) -> None:
    peer = await connect(keyed, sub="alice")
    given = token(keyed, sub="alice", channel="$a", client=str(peer.fd))
    assert "subscribe" in await peer.request(subscribe={"channel": "$a", "token": given})


async def test_the_subscribe_hook_sees_the_claims_and_has_the_last_word(
    autojump_clock: MockClock, keyed: Network
) -> None:
    seen: list[SubscribeEvent] = []

    @keyed.broker.on_subscribe
    async def check(event: SubscribeEvent) -> SubscribeReply | None:
        seen.append(event)
        if event.topic == "$no":
            raise Refused(103)
        return SubscribeReply(info=2, data=2) if event.topic == "$other" else None

    peer = await connect(keyed, sub="alice")
    assert await refused(peer, subscribe={"channel": "$a"}) == 103
    assert seen == []
    for topic, said in (("$a", 1), ("$other", 2), ("$no", None)):
        claims: dict[str, Any] = {"sub": "alice", "channel": topic, "info": 1, "data": 1}
        reply = await peer.request(subscribe={"channel": topic, "token": token(keyed, **claims)})
        assert seen[-1].claims == claims
        if said is None:
            assert reply["error"]["code"] == 103
            continue
        assert reply["subscribe"]["data"] == said
        presence = (await peer.request(presence={"channel": topic}))["presence"]["presence"]
        assert presence[str(peer.fd)]["chan_info"] == said
    await peer.request(subscribe={"channel": "open"})
    assert seen[-1].claims is None


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


# who may open a connection at all


@pytest.mark.parametrize(
    "origin, status",
    [
        ("null", 403),
        ("http://localhost:3000", 403),
        ("http://127.0.0.1", 403),
        ("http://localhost:9501", 101),
        ("https://listed.example", 101),
        (None, 101),
    ],
)
async def test_with_tokens_only_the_page_of_our_own_and_listed_ones_may_connect(
    autojump_clock: MockClock, origin: str | None, status: int
) -> None:
    config = attrs.evolve(CONFIG, allowed_origins=("https://listed.example",))
    async with open_test_broker(Broker(config)) as net:
        peer = await net.connect()
        headers = {} if origin is None else {"Origin": origin}
        await peer.send(handshake(headers=headers, host="localhost:9501"))
        assert (await peer.receive_head()).startswith(f"HTTP/1.1 {status} ")
        await peer.aclose()


async def test_a_key_that_cannot_be_read_keeps_the_broker_from_starting(tmp_path: Path) -> None:
    rules = TokenRules(public_keys=(str(tmp_path / "none.pem"),))
    with pytest.raises(ConfigError, match=r"none\.pem: No such file"):
        await Broker(Config(port=0, tokens=rules)).serve()


async def test_the_keys_of_an_issuer_on_the_network_are_used() -> None:
    """Two brokers on real sockets, one of them the issuer."""
    private = ed25519.Ed25519PrivateKey.generate()
    key = {**OKPAlgorithm.to_jwk(private.public_key(), as_dict=True), "kid": "1"}
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    issuer = Broker(Config(host="127.0.0.1", port=0))

    @issuer.on_request
    async def publish_keys(request: Request) -> Response:
        return JSONResponse({"keys": [key]})

    async with trio.open_nursery() as nursery:
        (address,) = await nursery.start(issuer.serve)
        url = address.replace("ws://", "http://") + "/jwks.json"
        async with open_test_broker(Broker(Config(tokens=TokenRules(jwks_url=url)))) as net:
            good = mint({"sub": "alice"}, pem, "EdDSA", kid="1")
            peer = await net.open_client(token=good)
            assert net.broker.fds_of("alice") == [peer.fd]
            # A key that may be new: asked about too soon after the last fetch.
            other = await net.open_websocket()
            reply = await other.request(connect={"token": mint({}, pem, "EdDSA", kid="2")})
            assert reply["error"] == {"code": 100, "message": "internal", "temporary": True}
        issuer.stop()
