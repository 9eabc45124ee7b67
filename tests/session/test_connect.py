"""The commands that say who a client is: by its app, by nobody, and by a token until that expires."""

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
    ConnectEvent,
    ConnectReply,
    Disconnect,
    Refused,
    SubscribeEvent,
    TokenRules,
    TopicRules,
)
from broker.access.minting import mint
from broker.testing import Network, open_test_broker
from tests.conftest import ask
from tests.session.conftest import (
    CONFIG,
    connect,
    error_of,
    next_push,
    refused,
    silent_for,
    token,
)

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
async def test_a_client_without_a_good_token_is_sent_away_for_good(
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
        keyed.broker.publish_nowait("news", number)
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
        keyed.broker.publish_nowait(topic, topic)
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
        keyed.broker.publish_nowait("news", number)
    for epoch, recovered in ((before["epoch"], True), ("other", False)):
        peer = await keyed.open_websocket()
        # The flag asks for an error, which would be one for all that connect brings.
        asked = {"recover": True, "offset": 0, "epoch": epoch, "flag": 2}
        reply = await peer.request(connect={"token": good, "subs": {"news": asked}})
        news = reply["connect"]["subs"]["news"]
        assert news["was_recovering"]
        assert news["recovered"] is recovered
        assert [p["data"] for p in news["publications"]] == ([0, 1, 2] if recovered else [])


async def test_a_watcher_sees_server_side_subscriptions(
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
            net.broker.publish_nowait("news", number)
            await trio.sleep(0.001)
        numbers = []
        while "pub" in (push := await next_push(peer)):
            numbers.append(push["pub"]["data"])
        assert numbers == list(range(len(numbers)))
        assert len(numbers) < 50
        assert push["disconnect"]["code"] == 3010
        assert await peer.receive_close() == (3010, "insufficient state")


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


async def test_connect_says_which_fd_this_is(autojump_clock: MockClock, net: Network) -> None:
    await net.open_websocket()
    peer = await net.open_websocket("/connection/websocket")
    (reply,) = await ask(peer, {"id": 5, "connect": {"name": "js", "version": "1"}})
    version = reply["connect"].pop("version")
    assert version
    assert reply == {
        "id": 5,
        "connect": {
            "client": "2",
            "data": {"fd": 2},
            "subs": {"fd:2": {}},
            "ping": 20,
            "pong": True,
        },
    }
    info = net.broker.connection_info(2)
    assert info is not None
    assert (info.protocol, info.topics) == ("centrifuge-json", ())


async def test_the_connect_hook_says_who_this_is(autojump_clock: MockClock, net: Network) -> None:
    events = []

    @net.broker.on_connect
    async def let_in(event: ConnectEvent) -> ConnectReply:
        events.append(event)
        return ConnectReply(user="alice", info={"name": "Alice"}, data={"motd": "hi"})

    client = await net.open_websocket()
    sent = {"token": "t", "data": {"a": 1}, "name": "js", "version": "5"}
    (reply,) = await ask(client, {"id": 1, "connect": sent})
    assert reply["connect"]["data"] == {"fd": client.fd, "motd": "hi"}
    (event,) = events
    assert (event.token, event.data, event.name, event.version) == ("t", {"a": 1}, "js", "5")
    assert event.connection.fd == client.fd
    assert net.broker.fds_of("alice") == [client.fd]
    await client.request(subscribe={"channel": "news"})
    reply = await client.request(presence={"channel": "news"})
    info = {"user": "alice", "client": str(client.fd), "conn_info": {"name": "Alice"}}
    assert reply["presence"]["presence"] == {str(client.fd): info}


async def test_a_user_that_was_bound_before_is_kept(
    autojump_clock: MockClock, net: Network
) -> None:
    peer = await net.open_websocket()
    net.broker.bind(peer.fd, "bob")
    await peer.request(connect={})
    assert net.broker.fds_of("bob") == [peer.fd]
    await peer.request(subscribe={"channel": "news"})
    reply = await peer.request(presence={"channel": "news"})
    assert reply["presence"]["presence"][str(peer.fd)]["user"] == "bob"


@pytest.mark.parametrize("what", ["refused", "raised", "not json"])
async def test_a_client_that_was_not_let_in_may_try_again(
    autojump_clock: MockClock, net: Network, what: str
) -> None:
    @net.broker.on_connect
    async def check(event: ConnectEvent) -> ConnectReply | None:
        if event.token == "good":
            return None
        if what == "refused":
            raise Refused(101)
        if what == "raised":
            raise ZeroDivisionError
        return ConnectReply(user="alice", data={"a": object()})

    peer = await net.open_websocket()
    code = await error_of(peer, connect={"token": "bad"})
    assert code == (101 if what == "refused" else 100)
    assert net.broker.fds_of("alice") == []
    assert "connect" in await peer.request(connect={"token": "good"})


async def test_the_connect_hook_may_send_a_client_away(
    autojump_clock: MockClock, net: Network
) -> None:
    @net.broker.on_connect
    async def check(event: ConnectEvent) -> None:
        raise Disconnect(3500, "invalid token")

    peer = await net.open_websocket()
    assert await ask(peer, {"id": 1, "connect": {}}) == [3500]


async def test_a_client_disconnected_while_the_connect_hook_ran_is_not_let_in(
    autojump_clock: MockClock, net: Network
) -> None:
    @net.broker.on_connect
    async def disconnect(event: ConnectEvent) -> ConnectReply:
        net.broker.disconnect(event.connection.fd, 3507, "no")
        return ConnectReply(user="alice")

    peer = await net.open_websocket()
    assert await ask(peer, {"id": 1, "connect": {}}) == [3507]
    assert net.broker.fds_of("alice") == []
