"""The HTTP API: each method by hand in memory, then with Centrifugo's own client, `cent`."""

import base64
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import count
from typing import Any, TypeVar

import cent
import msgspec
import pytest
import structlog
import trio
from cent.exceptions import CentApiResponseError, CentTransportError, CentUnauthorizedError
from trio.testing import MockClock, assert_no_checkpoints

from broker import Broker, CloseCode, Config, ConnectEvent, ConnectReply, TopicRules
from broker.http.api import MAX_COMMANDS, Api
from broker.routing.recipients import Peer as Recipient
from broker.testing import Network, Peer, handshake
from tests.http.conftest import KEY, ask, call, error, listener, result, served
from tests.routing.conftest import attach, subscription

T = TypeVar("T")


# the door


async def test_without_a_key_there_is_no_api(autojump_clock: MockClock) -> None:
    async with served(api_key=None) as net:
        status, body = await ask(net, "info", b"{}", "")
        assert status == 404
        assert b"set api_key" in body


@pytest.mark.parametrize("key", [None, "", "wrong", KEY + "x", KEY[:-1], "s\xe9cret"])
async def test_only_the_key_opens_it(autojump_clock: MockClock, key: str | None) -> None:
    async with served() as net:
        # Nothing is said about what else is wrong.
        assert (await ask(net, "nonsense", b"not json", key))[0] == 401


@pytest.mark.parametrize("value", [f"apikey {KEY}", f"APIKEY  {KEY}"])
async def test_the_key_may_come_as_authorization(autojump_clock: MockClock, value: str) -> None:
    async with served() as net:
        assert (await ask(net, "info", b"{}", None, Authorization=value))[0] == 200
        assert (await ask(net, "info", b"{}", None, Authorization=f"Bearer {KEY}"))[0] == 401


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"{}x", b"[" * 100_000])
async def test_a_body_that_is_not_json_is_400(autojump_clock: MockClock, body: bytes) -> None:
    async with served() as net:
        for method in ("publish", "batch"):
            status, text = await ask(net, method, body)
            assert status == 400
            assert text.startswith((b"The body is not JSON: ", b"The body is nested too deeply"))


async def test_a_body_over_the_limit_is_413(autojump_clock: MockClock) -> None:
    async with served() as net:
        assert (await ask(net, "publish", b" " * (2**20 + 1)))[0] == 413


async def test_an_unknown_method_is_404_and_a_get_is_405(autojump_clock: MockClock) -> None:
    async with served() as net:
        status, text = await ask(net, "publsh", b"{}")
        assert status == 404
        assert b"history_remove" in text
        stream = await net.listener.connect()
        await stream.send_all(b"GET /api/info HTTP/1.1\r\nHost: test\r\n\r\n")
        answer = b""
        async for data in stream:
            answer += data
        await stream.aclose()
        assert answer.startswith(b"HTTP/1.1 405 ")


async def test_the_key_is_not_in_the_repr_of_the_settings() -> None:
    assert KEY not in repr(Config(api_key=KEY))


@pytest.mark.parametrize("key", ["", "a\nb", "é"])
async def test_a_key_that_no_header_can_carry_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="api_key must be printable ASCII"):
        Config(api_key=key)


@pytest.mark.parametrize(
    "method, params",
    [
        ("publish", {"data": 1}),
        ("publish", {"channel": "news"}),
        ("publish", {"channel": "news.*", "data": 1}),
        ("publish", {"channel": 1, "data": 1}),
        ("publish", {"channel": "news", "b64data": "?"}),
        ("publish", {"channel": "news", "b64data": "é"}),
        ("subscribe", {"channel": "a", "user": "u", "b64data": base64.b64encode(b"\xff").decode()}),
        ("subscribe", {"channel": "a", "user": "u", "b64info": "é"}),
        ("publish", {"channel": "news", "data": 1, "tags": {"a": 1}}),
        ("publish", {"channel": "news", "data": 1, "idempotency_key": "k" * 256}),
        ("broadcast", {"channels": "news", "data": 1}),
        ("subscribe", {"channel": "news"}),
        ("disconnect", {"user": ""}),
        ("history", {"channel": "news", "since": {"offset": -1}}),
        ("connections", {"limit": 0}),
        ("batch", {"commands": {}}),
    ],
)
async def test_bad_params_are_error_107(
    autojump_clock: MockClock, method: str, params: dict[str, object]
) -> None:
    async with served() as net:
        code, message = await error(net, method, **params)
        assert code == 107
        assert message


# publishing


async def test_publish_reaches_subscribers_with_its_tags(autojump_clock: MockClock) -> None:
    async with served() as net, await listener(net, "news", "ne*", ">") as peer:
        first = await result(net, "publish", channel="news", data={"a": [1]}, tags={"k": "v"})
        assert first["offset"] == 1
        exact = (await peer.receive_json())["push"]
        assert exact == {
            "channel": "news",
            "pub": {"data": {"a": [1]}, "offset": 1, "tags": {"k": "v"}},
        }
        pattern = (await peer.receive_json())["push"]
        assert pattern["channel"] == ">"
        assert pattern["pub"]["tags"] == {"k": "v", "topic": "news"}
        second = await result(net, "publish", channel="news", data=2)
        assert second == {"offset": 2, "epoch": first["epoch"]}
        assert (await result(net, "publish", channel="news", data=3, skip_history=True)) == {}
        history = await result(net, "history", channel="news", limit=-1)
        assert [each["data"] for each in history["publications"]] == [{"a": [1]}, 2]
        assert history["publications"][0]["tags"] == {"k": "v"}


async def test_b64data_is_any_bytes_in_base64(autojump_clock: MockClock) -> None:
    async with served() as net, await listener(net, "news") as peer:
        await result(net, "publish", channel="news", b64data=base64.b64encode(b"[1,\n2]").decode())
        assert (await peer.receive_json())["push"]["pub"]["data"] == [1, 2]
        async with net.broker.subscribe("news") as messages:
            await result(net, "publish", channel="news", b64data="/w==")
            assert (await messages.receive()).data == b"\xff"
        assert (await peer.receive_json())["push"]["pub"]["data"] == "/w=="
        history = await result(net, "history", channel="news", limit=-1)
        assert [each["data"] for each in history["publications"]] == [[1, 2], "/w=="]


async def test_a_key_makes_a_publish_happen_once_in_five_minutes(
    autojump_clock: MockClock,
) -> None:
    async with served() as net, await listener(net, "news", "other") as peer:
        ask_again = {"channel": "news", "data": 1, "idempotency_key": "k"}
        first = await result(net, "publish", **ask_again)
        assert await result(net, "publish", **ask_again) == first
        assert await result(net, "publish", **{**ask_again, "channel": "other"}) != first
        # News once, then the other topic.
        assert (await peer.receive_json())["push"]["channel"] == "news"
        assert (await peer.receive_json())["push"]["channel"] == "other"
        assert (await result(net, "history", channel="news"))["offset"] == 1
        await trio.sleep(301)
        assert (await result(net, "publish", **ask_again))["offset"] == 2


async def test_broadcast_answers_for_each_topic(autojump_clock: MockClock) -> None:
    async with served() as net, await listener(net, "a", "b") as peer:
        got = await result(net, "broadcast", channels=["a", "fd:99", "b"], data="x")
        assert [list(each) for each in got["responses"]] == [["result"], ["error"], ["result"]]
        assert got["responses"][1]["error"]["code"] == 102
        channels = [(await peer.receive_json())["push"]["channel"] for _ in "ab"]
        assert channels == ["a", "b"]


async def test_publish_can_leave_out_fds_and_report(autojump_clock: MockClock) -> None:
    async with served() as net, await listener(net, "news") as a, await listener(net, "news") as b:
        params = {"channel": "news", "data": 1, "exclude": [a.fd], "report": True}
        got = await result(net, "publish", **params)
        del got["offset"], got["epoch"]
        assert got == {"matched": 1, "queued": 1, "dropped": 0, "failed": []}
        assert "pub" in (await b.receive_json())["push"]
        await result(net, "push", fd=a.fd, data="only this")
        assert (await a.receive_json())["push"] == {"message": {"data": "only this"}}


async def test_push_says_what_became_of_it(autojump_clock: MockClock) -> None:
    async with served() as net, await listener(net) as peer:
        assert await result(net, "push", fd=peer.fd, data=1) == {"status": "queued"}
        assert await result(net, "push", fd=99, data=1) == {"status": "closed"}


# clients


async def test_a_user_is_subscribed_and_unsubscribed(autojump_clock: MockClock) -> None:
    async with served() as net, await listener(net, user="a") as a, await listener(net) as other:
        await result(net, "subscribe", user="a", channel="news", data={"by": "us"}, info="i")
        push = (await a.receive_json())["push"]
        assert push["channel"] == "news"
        assert push["subscribe"]["data"] == {"by": "us"}
        await result(net, "publish", channel="news", data=1)
        assert (await a.receive_json())["push"]["pub"]["data"] == 1
        presence = (await result(net, "presence", channel="news"))["presence"]
        assert presence == {
            str(a.fd): {
                "client": str(a.fd),
                "user": "a",
                "conn_info": {"name": "a"},
                "chan_info": "i",
            }
        }
        # Again is no error, and of a user that is not here neither.
        await result(net, "subscribe", user="a", channel="news")
        await result(net, "subscribe", user="nobody", channel="news")
        await result(net, "unsubscribe", user="a", client=str(other.fd), channel="news")
        assert net.broker.topics() == {"news": 1}
        await result(net, "unsubscribe", user="a", channel="news")
        assert (await a.receive_json())["push"] == {
            "channel": "news",
            "unsubscribe": {"code": 2000, "reason": "server unsubscribe"},
        }
        assert (await result(net, "presence", channel="news")) == {"presence": {}}


async def test_a_subscribe_that_asks_for_recovery_or_override_is_refused(
    autojump_clock: MockClock,
) -> None:
    async with served() as net, await listener(net, user="a"):
        since = {"offset": 1, "epoch": "x"}
        code, text = await error(net, "subscribe", user="a", channel="t", recover_since=since)
        assert code == 108
        assert "recover_since" in text
        override = {"presence": {"value": False}}
        code, text = await error(net, "subscribe", user="a", channel="t", override=override)
        assert code == 108
        assert "override" in text
        assert net.broker.topics() == {}
        await result(net, "subscribe", user="a", channel="t", recover_since=None, override=None)
        assert net.broker.topics() == {"t": 1}


async def test_subscribe_stops_at_the_limit_of_topics(autojump_clock: MockClock) -> None:
    async with served(max_topics=2) as net, await listener(net, "a", user="x"):
        await result(net, "subscribe", user="x", channel="b")
        refused = await error(net, "subscribe", user="x", channel="c")
        assert refused == (106, "more than 2 subscriptions")
        await result(net, "subscribe", user="x", channel="b")
        assert net.broker.topics() == {"a": 1, "b": 1}


async def test_disconnect_spares_the_whitelist(autojump_clock: MockClock) -> None:
    async with (
        served() as net,
        await listener(net, user="a") as x,
        await listener(net, user="a") as y,
    ):
        await result(net, "disconnect", user="a", whitelist=[str(y.fd)])
        assert await x.receive_close() == (3503, "force disconnect")
        assert net.broker.is_established(y.fd)
        order = {"code": 4001, "reason": "go"}
        await result(net, "disconnect", user="a", client=str(y.fd), disconnect=order)
        assert await y.receive_close() == (4001, "go")
        third = await listener(net)
        bad = {"client": str(third.fd), "disconnect": {"code": 1006}}
        assert (await error(net, "disconnect", **bad))[0] == 107
        assert net.broker.is_established(third.fd)


async def test_a_client_that_cannot_be_is_not_there(autojump_clock: MockClock) -> None:
    async with served() as net:
        peer = await listener(net)
        for client in ("9" * 5000, "0" + str(peer.fd), "٣", "a"):
            assert await result(net, "disconnect", client=client) == {}
        assert net.broker.is_established(peer.fd)


async def test_refresh_ends_what_has_expired(autojump_clock: MockClock) -> None:
    async with served() as net, await listener(net, user="a") as a:
        await result(net, "refresh", user="a", expired=True)
        assert await a.receive_close() == (CloseCode.EXPIRED, "expired")


async def test_refresh_moves_the_end_of_a_connection(autojump_clock: MockClock) -> None:
    async with served(ping_seconds=1e6) as net, await listener(net, user="a") as a:
        now, begun = net.broker.wall_clock(), trio.current_time()
        grace = net.broker.config.tokens.grace_seconds
        for end in (10, 100):
            await result(net, "refresh", user="a", expire_at=int(now) + end)
        with pytest.raises(trio.TooSlowError), trio.fail_after(90 + grace):
            await a.receive_frame()
        assert await a.receive_close() == (CloseCode.EXPIRED, "connection expired")
        assert trio.current_time() - begun == pytest.approx(100 + grace, abs=2.5)


async def test_refresh_without_an_end_takes_it_off(autojump_clock: MockClock) -> None:
    async with served(ping_seconds=1e6) as net, await listener(net, user="a") as a:
        await result(net, "refresh", user="a", expire_at=int(net.broker.wall_clock()) + 10)
        await result(net, "refresh", user="a")
        await trio.sleep(1000)
        assert net.broker.is_established(a.fd)


async def test_refresh_with_an_end_that_is_past_is_the_end(autojump_clock: MockClock) -> None:
    async with served() as net, await listener(net, user="a") as a:
        await result(net, "refresh", user="a", expire_at=1)
        assert await a.receive_close() == (CloseCode.EXPIRED, "expired")
        assert (await error(net, "refresh", user="a", expire_at=-1))[0] == 107
        assert (await error(net, "refresh", user="a", expire_at=10**400))[0] == 107


async def test_a_plain_peer_does_not_expire(autojump_clock: MockClock) -> None:
    async with served() as net, await net.open_plain() as peer:
        await peer.send_text("plain")
        await trio.testing.wait_all_tasks_blocked()
        assert not net.broker.expire(peer.fd, 1.0)
        assert net.broker.is_established(peer.fd)


# topics


async def test_presence_stats_count_users_once(autojump_clock: MockClock) -> None:
    async with (
        served() as net,
        await listener(net, "t", user="a"),
        await listener(net, "t", user="a"),
        await listener(net, "t", user="b"),
    ):
        got = await result(net, "presence_stats", channel="t")
        assert got == {"num_clients": 3, "num_users": 2}


async def test_history_pages_and_goes(autojump_clock: MockClock) -> None:
    async with served() as net:
        for number in range(5):
            position = await result(net, "publish", channel="t", data=number)
        assert await result(net, "history", channel="t") == {"publications": [], **position}
        since = {"offset": 2, "epoch": position["epoch"]}
        page = await result(net, "history", channel="t", limit=2, since=since)
        assert [each["offset"] for each in page["publications"]] == [3, 4]
        page = await result(net, "history", channel="t", limit=1, reverse=True)
        assert [each["data"] for each in page["publications"]] == [4]
        bad = await error(net, "history", channel="t", since={"offset": 1, "epoch": "old"})
        assert bad[0] == 112
        await result(net, "history_remove", channel="t")
        gone = await result(net, "history", channel="t", limit=-1)
        assert gone == {"publications": [], **position}


async def test_channels_are_listed_by_a_glob(autojump_clock: MockClock) -> None:
    async with served() as net, await listener(net, "chat:1", "chat:2", "news", "n.>"):
        async with await listener(net, "chat:1"):
            everything = (await result(net, "channels"))["channels"]
            assert everything["chat:1"] == {"num_clients": 2}
            assert set(everything) == {"chat:1", "chat:2", "news", "n.>"}
            some = (await result(net, "channels", pattern="chat:*"))["channels"]
            assert set(some) == {"chat:1", "chat:2"}


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("{chat,news}:*", {"chat:1", "chat:2", "news:1"}),
        ("chat:{1,{3,2}}", {"chat:1", "chat:2"}),
        ("{chat,{n,b}ews}:1", {"chat:1", "news:1"}),
        ("chat:1{,x}", {"chat:1"}),
        ("{chat:1", set()),
        ("chat:[!1]", {"chat:2"}),
    ],
)
async def test_a_glob_may_name_alternatives(
    autojump_clock: MockClock, pattern: str, names: set[str]
) -> None:
    async with served() as net, await listener(net, "chat:1", "chat:2", "news:1"):
        assert set((await result(net, "channels", pattern=pattern))["channels"]) == names


async def test_a_glob_of_too_many_alternatives_is_refused(autojump_clock: MockClock) -> None:
    async with served() as net:
        for pattern, reason in {
            "{a,b}" * 7: "pattern stands for more than 100 patterns without braces",
            "{a,b,c,d,e}"
            + "x" * 1000: "pattern stands for more than 4096 characters without braces",
            "a" * 1025: "pattern has more than 1024 characters",
            "{" * 500_000 + "}" * 500_000: "pattern has more than 1024 characters",
        }.items():
            assert await error(net, "channels", pattern=pattern) == (107, reason)
        assert await result(net, "channels", pattern="a" * 1024) == {"channels": {}}
        assert await result(net, "channels", pattern="{a,b}" * 6) == {"channels": {}}


async def test_info_has_metrics(autojump_clock: MockClock) -> None:
    async with served() as net, await listener(net, "t"), await listener(net, "t"):
        for number in range(3):
            await result(net, "publish", channel="t", data=number)
        await trio.testing.wait_all_tasks_blocked()
        (node,) = (await result(net, "info"))["nodes"]
        assert node["metrics"]["interval"] == pytest.approx(node["uptime"], abs=1)
        assert node["metrics"]["items"] == {
            "messages_published": 3,
            "messages_delivered": 6,
            "connections_refused": 0,
            "history_publications_evicted": 0,
        }


async def test_info_counts(autojump_clock: MockClock) -> None:
    async with served() as net, await listener(net, "a", "b", user="x"):
        (node,) = (await result(net, "info"))["nodes"]
        assert (node["num_clients"], node["num_users"]) == (1, 1)
        assert (node["num_subs"], node["num_channels"]) == (2, 2)


async def test_connections_page_and_one_is_shown(autojump_clock: MockClock) -> None:
    async with served() as net, await listener(net, "t", user="x") as x, await listener(net) as y:
        plain = await net.open_websocket()
        listed = (await result(net, "connections", limit=2))["connections"]
        assert list(listed) == [str(x.fd), str(y.fd)]
        rest = (await result(net, "connections", after=y.fd))["connections"]
        assert rest[str(plain.fd)]["protocol"] == "plain"
        of_x = (await result(net, "connections", user="x"))["connections"]
        assert list(of_x) == [str(x.fd)]
        shown = await result(net, "connection", fd=x.fd)
        assert shown | {"age_seconds": 0} == of_x[str(x.fd)] | {"age_seconds": 0}
        assert (shown["transport"], shown["protocol"]) == ("websocket", "json")
        assert (shown["user"], shown["topics"]) == ("x", ["t"])
        assert (await error(net, "connection", fd=99))[0] == 102
        assert (await error(net, "connections", expression="true"))[0] == 108


# several at once


@pytest.mark.parametrize("parallel", [False, True])
async def test_a_batch_answers_in_order(autojump_clock: MockClock, parallel: bool) -> None:
    async with served() as net, await listener(net, "t") as peer:
        answer = await call(
            net,
            "batch",
            commands=[
                {"publish": {"channel": "t", "data": 1}},
                {"publish": {"channel": "fd:99", "data": 1}},
                {"nonsense": {}},
                {"publish": {}, "info": {}},
                {"publish": {"channel": "t", "data": 2}},
                {"presence_stats": {"channel": "t"}},
            ],
            parallel=parallel,
        )
        replies = answer["replies"]
        assert replies[0]["publish"]["offset"] == 1
        assert [each["error"]["code"] for each in replies[1:4]] == [102, 104, 107]
        assert replies[4]["publish"]["offset"] == 2
        assert replies[5] == {"presence_stats": {"num_clients": 1, "num_users": 1}}
        got = [(await peer.receive_json())["push"]["pub"]["data"] for _ in "12"]
        assert got == [1, 2]


# turns, and the room in an answer


async def asked(net: Network, method: str, **params: object) -> Any:
    """The answer to a request of one more connection, without the way over HTTP."""
    node = net.broker.node
    answer = await Api(node).answer(method, msgspec.json.encode(params), node.new_share())
    assert answer.status == 200, answer.body
    return json.loads(answer.body)


async def beside(net: Network, act: Callable[[], object], method: str, **params: object) -> Any:
    """The same, while somebody else does something as often as there is a turn; how often that was."""
    answers: list[Any] = []
    times = 0

    async def ask() -> None:
        answers.append(await asked(net, method, **params))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        while not answers:
            act()
            times += 1
            await trio.lowlevel.checkpoint()
    return answers[0], times


def fill(net: Network, topic: str, count: int) -> list[Recipient]:
    """As many clients that are subscribed to one topic, none of which is there."""
    router = net.broker.node.router
    peers = [attach(router) for _ in range(count)]
    for peer in peers:
        router.hub.subscribe(subscription(peer, topic))
    return peers


async def test_a_small_request_is_one_step(autojump_clock: MockClock) -> None:
    async with served() as net, await listener(net, "t"):
        commands: list[dict[str, object]] = [
            {"publish": {"channel": "t", "data": n}} for n in range(3)
        ]
        commands += [{"presence": {"channel": "t"}}, {"history": {"channel": "t", "limit": 9}}]
        commands += [{"channels": {}}, {"connections": {}}, {"presence_stats": {"channel": "t"}}]
        with assert_no_checkpoints():
            answer = await asked(net, "batch", commands=commands)
        assert [list(each) for each in answer["replies"]] == [list(each) for each in commands]


@pytest.mark.parametrize("method", ["batch", "broadcast"])
async def test_others_have_their_turn_within_a_request_whose_own_order_is_kept(
    autojump_clock: MockClock, method: str
) -> None:
    async with served(topics=TopicRules(history_size=10_000)) as net:

        def publish() -> None:
            net.broker.publish_nowait("t", "other")

        if method == "batch":
            commands = [{"publish": {"channel": "t", "data": n}} for n in range(8000)]
            answer, turns = await beside(net, publish, "batch", commands=commands)
            offsets = [each["publish"]["offset"] for each in answer["replies"]]
        else:
            channels = ["t"] * 2000
            answer, turns = await beside(net, publish, "broadcast", channels=channels, data="mine")
            offsets = [each["result"]["offset"] for each in answer["result"]["responses"]]
        assert 10 < turns < 1000
        assert offsets == sorted(offsets)
        publications, _ = await net.broker.history("t")
        data = [each.value for each in publications]
        between = [
            n for n in range(1, len(data)) if (data[n] == "other") is not (data[n - 1] == "other")
        ]
        assert len(between) > 10
        if method == "batch":
            assert [each for each in data if each != "other"] == list(range(8000))


async def test_each_connection_of_a_user_is_a_step_and_looked_at_in_it(
    autojump_clock: MockClock,
) -> None:
    async with served() as net:
        peers = [await listener(net, user="a") for _ in range(20)]
        share = net.broker.node.new_share()
        share.spend(1e6)
        body = msgspec.json.encode({"user": "a"})
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Api(net.broker.node).answer, "disconnect", body, share)
            while net.broker.is_established(peers[0].fd):  # noqa: ASYNC110 - each turn counts
                await trio.lowlevel.checkpoint()
            assert net.broker.is_established(peers[-1].fd), "twenty steps are five turns"
            net.broker.bind(peers[-1].fd, "b")
        here = [net.broker.is_established(peer.fd) for peer in peers]
        assert here == [False] * 19 + [True]


@pytest.mark.parametrize("order", [{"code": 1006}, {"code": 99}])
async def test_a_code_that_closes_nothing_is_refused_before_anybody_is_closed(
    autojump_clock: MockClock, order: dict[str, object]
) -> None:
    async with served() as net, await listener(net, user="a") as peer:
        assert (await error(net, "disconnect", user="a", disconnect=order))[0] == 107
        assert (await error(net, "disconnect", user="nobody", disconnect=order))[0] == 107
        assert net.broker.is_established(peer.fd)


async def test_lists_are_written_piece_by_piece_and_whole(autojump_clock: MockClock) -> None:
    async with served() as net:
        peers = fill(net, "crowd", 3000)
        fds = [str(peer.fd) for peer in peers]
        for number, peer in enumerate(peers):
            net.broker.node.router.hub.subscribe(subscription(peer, f"x{number}"))
        answer, turns = await beside(net, int, "presence", channel="crowd")
        presence = answer["result"]["presence"]
        assert list(presence) == fds
        assert presence[fds[0]] == {"client": fds[0], "user": ""}
        assert turns > 5
        answer, turns = await beside(net, int, "channels", pattern="{x,y,z,crowd,v}*")
        assert len(answer["result"]["channels"]) == 3001
        assert turns > 5
        assert await result(net, "presence_stats", channel="crowd") == {
            "num_clients": 3000,
            "num_users": 1,
        }


async def test_what_has_gone_since_a_list_was_begun_is_not_in_it(autojump_clock: MockClock) -> None:
    async with served() as net:
        hub = net.broker.node.router.hub
        peers = fill(net, "crowd", 2000)
        for number, peer in enumerate(peers):
            hub.subscribe(subscription(peer, f"x{number}"))
        last = peers[-1]
        turns = count()

        def leave() -> None:
            if next(turns) == 2:  # it was begun
                hub.leave_all(last)

        answer, _ = await beside(net, leave, "channels", pattern="{x,a,b,d,e,f,g}*")
        assert "x1999" not in answer["result"]["channels"]
        assert len(answer["result"]["channels"]) == 1999


async def test_a_list_that_does_not_fit_is_refused_and_what_was_done_is_told(
    autojump_clock: MockClock,
) -> None:
    config = {"api_reply_bytes": 3000, "topics": TopicRules(history_size=10)}
    async with served(**config) as net, await listener(net, "a"):
        fill(net, "crowd", 100)
        for _ in range(3):
            net.broker.publish_nowait("big", "x" * 900)
        code, text = await error(net, "presence", channel="crowd")
        assert code == 106
        assert text == "the answer would be too long: ask for less, or in a request of its own"
        commands = [
            {"history": {"channel": "big", "limit": 2}},
            {"publish": {"channel": "a", "data": 1}},
            {"history": {"channel": "big", "limit": 2}},
            {"history": {"channel": "big", "limit": 1}},
            {"history": {"channel": "big", "limit": 1}},
            {"publish": {"channel": "a", "data": 2}},
            {"broadcast": {"channels": ["a"] * 200, "data": 3}},
            {"history": {"channel": "big", "limit": 0}},
        ]
        answer = await call(net, "batch", commands=commands)
        replies = answer["replies"]
        assert [next(iter(each)) for each in replies] == [
            *("history", "publish", "error", "history", "error", "publish", "broadcast", "history")
        ]
        assert {each["error"]["code"] for each in replies if "error" in each} == {106}
        assert len(replies[6]["broadcast"]["responses"]) == 200
        assert (await net.broker.history("a"))[1].offset == 202


async def test_history_is_bounded_as_for_clients_and_pages_on(autojump_clock: MockClock) -> None:
    bounds = {"history_max_limit": 4, "history_reply_bytes": 3000}
    async with served(topics=TopicRules(history_size=100), **bounds) as net:
        for n in range(10):
            net.broker.publish_nowait("t", n)
        for n in range(3):
            net.broker.publish_nowait("t", f"{n}" * 1000)
        net.broker.publish_nowait("t", "x" * 10_000)
        page = await result(net, "history", channel="t", limit=-1)
        assert [each["data"] for each in page["publications"]] == [0, 1, 2, 3]
        assert page["offset"] == 14, "the last offset says that there is more"
        got, sizes = [], []
        position = {"offset": 0, "epoch": page["epoch"]}
        while position["offset"] < page["offset"]:
            page = await result(net, "history", channel="t", limit=100, since=position)
            sizes.append(len(page["publications"]))
            got += [each["data"] for each in page["publications"]]
            position["offset"] = page["publications"][-1]["offset"]
        assert got == [*range(10), *(f"{n}" * 1000 for n in range(3)), "x" * 10_000]
        assert sizes == [4, 4, 3, 2, 1], "one at least, of whatever size"
        page = await result(net, "history", channel="t", limit=100, reverse=True)
        assert [each["offset"] for each in page["publications"]] == [14]


async def test_a_page_of_connections_ends_where_there_is_no_more_room(
    autojump_clock: MockClock,
) -> None:
    async with served(api_reply_bytes=2000) as net:
        peers = [await listener(net, f"t{n}", user="u") for n in range(20)]
        for asked_by in ({}, {"user": "u"}):
            got: list[str] = []
            pages = 0
            while page := (
                await result(net, "connections", after=int(got[-1]) if got else 0, **asked_by)
            )["connections"]:
                got += page
                pages += 1
            assert got == [str(peer.fd) for peer in peers]
            assert 3 < pages < 20
        await subscribe_many(peers[0], 100)
        assert (await error(net, "connections", limit=1))[0] == 106, "not even one"


async def subscribe_many(peer: Peer, count: int) -> None:
    for n in range(count):
        assert "subscribe" in await peer.request(subscribe={"channel": f"{n}-" + "x" * 20})


async def test_a_batch_has_so_many_commands_at_most(autojump_clock: MockClock) -> None:
    async with served() as net:
        code, text = await error(net, "batch", commands=[{}] * (MAX_COMMANDS + 1))
        assert (code, text) == (106, f"a batch has at most {MAX_COMMANDS} commands")
        answer = await asked(net, "batch", commands=[{}] * 3)
        assert [each["error"]["code"] for each in answer["replies"]] == [107] * 3


@pytest.mark.parametrize(
    "command, reply",
    [
        (b"5", 107),
        (b"null", 107),
        (b"[]", 107),
        (b"{}", 107),
        (b'{"info":{},"info2":{}}', 107),
        (b'{"nonsense":{}}', 104),
        (b'{"info":null}', 107),
        (b'{"info":5}', 107),
        (b'{"\\ud83d":{}}', 107),
        (b'{"publish":{"channel":"\\ud83d","data":1}}', 107),
        (b'{"publish":{"channel":"a","data":"\\ud83d"}}', 0),
        ('{"publish":{"channel":"é","data":1}}'.encode(), 0),
    ],
)
async def test_a_command_of_a_batch_is_read_by_itself(
    autojump_clock: MockClock, command: bytes, reply: int
) -> None:
    async with served() as net:
        body = b'{"commands":[%b,{"publish":{"channel":"b","data":1}}]}' % command
        status, answer = await ask(net, "batch", body)
        assert status == 200
        first, second = json.loads(answer)["replies"]
        assert first.get("error", {"code": 0})["code"] == reply
        assert "publish" in second


async def test_a_wrong_key_is_logged_with_its_address_by_either_door(
    autojump_clock: MockClock,
) -> None:
    async with served() as net:
        for key, reason in (("wrong", "wrong key"), (None, "no key")):
            with structlog.testing.capture_logs() as lines:
                assert (await ask(net, "info", b"{}", key))[0] == 401
                chunked = (
                    b"POST /api/info HTTP/1.1\r\nHost: test\r\n%bTransfer-Encoding: chunked\r\n"
                    b"\r\n2\r\n{}\r\n0\r\n\r\n" % (b"" if key is None else b"X-API-Key: wrong\r\n")
                )
                stream = await net.listener.connect()
                await stream.send_all(chunked)
                answer = b"".join([bytes(data) async for data in stream])
                assert answer.startswith(b"HTTP/1.1 401 ")
                await stream.aclose()
            found = [each for each in lines if each["event"] == "api_key_refused"]
            assert [(each["reason"], each["method"]) for each in found] == [(reason, "info")] * 2
            assert {each["log_level"] for each in found} == {"warning"}
            assert [each["peer"] for each in found] == ["memory", "unix"]


# users


async def test_a_publication_to_a_user_reaches_all_its_fds(
    autojump_clock: MockClock,
) -> None:
    async with served() as net:
        phone = await net.open_websocket()
        reply = await phone.request(connect={"token": "alice"})
        assert set(reply["connect"]["subs"]) == {f"fd:{phone.fd}", "user:alice"}
        laptop = await listener(net, user="alice")
        bare = await net.open_plain()
        net.broker.bind(bare.fd, "alice")
        stranger = await listener(net, user="bob")
        await result(net, "publish", channel="user:alice", data="hello")
        for peer in (phone, laptop):
            assert (await peer.receive_json())["push"] == {
                "channel": "user:alice",
                "pub": {"data": "hello"},
            }
        assert await bare.receive_text() == "hello"
        assert (await error(net, "publish", channel="user:carol", data=1))[0] == 102
        for topic, code in (("user:alice", 103), ("user:bob", 105)):
            reply = await stranger.request(subscribe={"channel": topic})
            assert reply["error"]["code"] == code
        reply = await stranger.request(publish={"channel": "user:alice", "data": "hi"})
        assert reply == {"id": 1, "publish": {}}
        assert (await phone.receive_json())["push"]["pub"]["info"]["user"] == "bob"


async def test_a_client_is_told_when_the_app_binds_it(autojump_clock: MockClock) -> None:
    async with served() as net, await listener(net) as peer:
        net.broker.bind(peer.fd, "alice")
        assert await peer.receive_json() == {"push": {"channel": "user:alice", "subscribe": {}}}
        net.broker.bind(peer.fd, "")
        push = (await peer.receive_json())["push"]
        assert (push["channel"], push["unsubscribe"]["code"]) == ("user:alice", 2000)


# Centrifugo's own client, over a real socket


@asynccontextmanager
async def cent_client(key: str = KEY) -> AsyncIterator[tuple[Broker, cent.Client, str]]:
    broker = Broker(Config(api_key=KEY, host="127.0.0.1", port=0, log_level="error"))

    @broker.on_connect
    async def let_in(event: ConnectEvent) -> ConnectReply:
        return ConnectReply(user=event.token)

    async with trio.open_nursery() as nursery:
        (address,) = await nursery.start(broker.serve)
        client = cent.Client(address.replace("ws:", "http:") + "/api", key, timeout=5)
        try:
            yield broker, client, address
        finally:
            client.close()
            broker.stop()


async def in_thread(call: Callable[..., T], *args: object) -> T:
    return await trio.to_thread.run_sync(lambda: call(*args))


async def over_tcp(address: str, user: str) -> Peer:
    host, _, port = address.removeprefix("ws://").partition(":")
    peer = Peer(await trio.open_tcp_stream(host, int(port)))
    await peer.send(handshake("/connection/websocket", host=f"{host}:{port}"))
    assert (await peer.receive_head()).startswith("HTTP/1.1 101 ")
    reply = await peer.request(connect={"token": user})
    peer.fd = int(reply["connect"]["client"])
    return peer


async def test_cent_does_it_all() -> None:
    with trio.fail_after(30):
        async with cent_client() as (broker, client, address), await over_tcp(address, "u") as peer:
            subscribe = cent.SubscribeRequest(user="u", channel="t", info={"k": 1}, data={"d": 1})
            await in_thread(client.subscribe, subscribe)
            assert "subscribe" in (await peer.receive_json())["push"]
            published = await in_thread(
                client.publish,
                cent.PublishRequest(
                    channel="t", data={"n": 1}, tags={"a": "b"}, idempotency_key="1"
                ),
            )
            assert (published.offset, bool(published.epoch)) == (1, True)
            assert (await peer.receive_json())["push"]["pub"]["tags"] == {"a": "b"}
            sent = await in_thread(
                client.broadcast, cent.BroadcastRequest(channels=["t", "user:none"], data=2)
            )
            assert sent.responses[0].result is not None
            assert sent.responses[0].result.offset == 2
            assert sent.responses[1].error is not None
            assert sent.responses[1].error.code == 102
            presence = await in_thread(client.presence, cent.PresenceRequest(channel="t"))
            assert presence.presence[str(peer.fd)].user == "u"
            assert presence.presence[str(peer.fd)].chan_info == {"k": 1}
            stats = await in_thread(client.presence_stats, cent.PresenceStatsRequest(channel="t"))
            assert (stats.num_clients, stats.num_users) == (1, 1)
            history = await in_thread(client.history, cent.HistoryRequest(channel="t", limit=10))
            assert [each.data for each in history.publications] == [{"n": 1}, 2]
            since = cent.StreamPosition(offset=1, epoch=history.epoch)
            page = cent.HistoryRequest(channel="t", limit=-1, since=since)
            assert len((await in_thread(client.history, page)).publications) == 1
            channels = await in_thread(client.channels, cent.ChannelsRequest(pattern="t*"))
            assert channels.channels["t"].num_clients == 1
            info = await in_thread(client.info, cent.InfoRequest())
            assert info.nodes[0].num_clients == 1
            listed = await in_thread(
                client.connections, cent.ConnectionsRequest(user="u", expression="")
            )
            assert listed.connections[str(peer.fd)].transport == "websocket"
            batch = await in_thread(
                client.batch,
                cent.BatchRequest(
                    requests=[
                        cent.PublishRequest(channel="t", data=3),
                        cent.PresenceStatsRequest(channel="t"),
                    ]
                ),
            )
            assert [each.model_dump() for each in batch.replies] == [
                {"offset": 3, "epoch": history.epoch},
                {"num_clients": 1, "num_users": 1},
            ]
            await in_thread(client.history_remove, cent.HistoryRemoveRequest(channel="t"))
            with pytest.raises(CentApiResponseError) as caught:
                await in_thread(client.publish, cent.PublishRequest(channel="t.*", data=1))
            assert caught.value.code == 107
            await in_thread(client.unsubscribe, cent.UnsubscribeRequest(user="u", channel="t"))
            assert broker.topics() == {}
            await in_thread(client.refresh, cent.RefreshRequest(user="u", expired=True))
            assert (await peer.receive_close())[0] == 3005


async def test_cent_disconnects() -> None:
    with trio.fail_after(30):
        async with cent_client() as (_, client, address), await over_tcp(address, "u") as peer:
            order = cent.Disconnect(code=4000, reason="bye")
            request = cent.DisconnectRequest(user="u", client=str(peer.fd), disconnect=order)
            await in_thread(client.disconnect, request)
            assert await peer.receive_close() == (4000, "bye")


async def test_cent_learns_what_it_does_wrong() -> None:
    with trio.fail_after(30):
        async with cent_client("wrong") as (_, client, _address):
            with pytest.raises(CentUnauthorizedError):
                await in_thread(client.info, cent.InfoRequest())
        async with cent_client() as (_, client, _address):
            with pytest.raises(CentTransportError) as caught:
                await in_thread(client.block_user, cent.BlockUserRequest(user="u"))
            assert caught.value.status_code == 404


# what a person looks for


async def test_connections_are_found_by_what_is_known_of_them(autojump_clock: MockClock) -> None:
    async with served() as net:
        first = await net.open_client(token="ann", name="js", version="5")
        second = await listener(net, "news", user="bob")
        for query, fds in (
            ({"topic": "news"}, [second.fd]),
            ({"app": "js"}, [first.fd]),
            ({"address": "memory"}, [first.fd, second.fd]),
            ({"address": "10."}, []),
            ({"user": "bob", "topic": "news", "after": second.fd}, []),
        ):
            listed = await result(net, "connections", **query)
            assert [int(fd) for fd in listed["connections"]] == fds


async def test_a_connection_is_told_in_all_detail(autojump_clock: MockClock) -> None:
    async with served() as net, await listener(net, "t", user="x") as peer:
        shown = await result(net, "connection", fd=peer.fd)
        assert shown["messages_received"] == 2
        assert shown["messages_sent"] == 2
        assert shown["rtt_seconds"] is None
        assert shown["limits"]["topics"] == 1000


async def test_closed_connections_are_told_the_last_first(autojump_clock: MockClock) -> None:
    async with served() as net:
        peers = [await listener(net, f"t{n}", user=f"u{n % 2}") for n in range(4)]
        for peer in peers:
            net.broker.disconnect(peer.fd, 4000, f"bye {peer.fd}")
            await peer.receive_close()
            await peer.aclose()
            await trio.sleep(1)
        listed = (await result(net, "closed_connections"))["connections"]
        assert [each["fd"] for each in listed] == [peer.fd for peer in reversed(peers)]
        assert listed[0]["topics"] == ["t3"]
        end = {key: listed[0][key] for key in ("code", "reason", "initiator", "undelivered")}
        assert end == {
            "code": 4000,
            "reason": f"bye {peers[3].fd}",
            "initiator": "server",
            "undelivered": 0,
        }
        (one,) = (await result(net, "closed_connections", fd=peers[1].fd))["connections"]
        assert one["topics"] == ["t1"]
        of_u0 = (await result(net, "closed_connections", user="u0", limit=1))["connections"]
        assert [each["fd"] for each in of_u0] == [peers[2].fd]


async def test_a_trace_is_read_until_it_ends(autojump_clock: MockClock) -> None:
    async with served() as net, await listener(net, user="ann") as peer:
        trace = (await result(net, "trace", user="ann"))["trace"]
        assert (await result(net, "trace_read", trace=trace))["entries"] == []
        await peer.request(publish={"channel": "t", "data": 1})
        read = await result(net, "trace_read", trace=trace, wait=5)
        assert [entry["kind"] for entry in read["entries"]] == ["received", "sent"]
        assert (read["missed"], read["ended"]) == (0, False)
        began = trio.current_time()
        read = await result(net, "trace_read", trace=trace, wait=5)
        assert read["entries"] == []
        assert trio.current_time() - began == pytest.approx(5)
        assert await result(net, "trace_end", trace=trace) == {}
        assert (await error(net, "trace_read", trace=trace))[0] == 102


async def test_a_trace_of_a_connection_says_that_it_has_ended(autojump_clock: MockClock) -> None:
    async with served() as net, await listener(net) as peer:
        trace = (await result(net, "trace", fd=peer.fd))["trace"]
        await peer.aclose()
        read = await result(net, "trace_read", trace=trace, wait=5)
        assert [entry["kind"] for entry in read["entries"]] == ["disconnected"]
        assert read["ended"]
        assert len(net.node.traces) == 0


async def test_a_busy_trace_is_read_in_pieces_and_tells_what_is_missing(
    autojump_clock: MockClock,
) -> None:
    async with served() as net:
        trace = (await result(net, "trace", topic="t"))["trace"]
        for number in range(1010):
            net.broker.publish_nowait("t", number)
        got, missed = [], 0
        while read := await result(net, "trace_read", trace=trace):
            got += [int(entry["text"]) for entry in read["entries"]]
            missed += read["missed"]
            if not read["entries"]:
                break
        assert got == list(range(1000))
        assert missed == 10


@pytest.mark.parametrize(
    ("params", "code"),
    [
        ({}, 107),
        ({"fd": 1, "user": "x"}, 107),
        ({"fd": 99}, 102),
        ({"topic": "user:x"}, 103),
    ],
)
async def test_what_cannot_be_traced_is_an_error(
    autojump_clock: MockClock, params: dict[str, object], code: int
) -> None:
    async with served() as net:
        assert (await error(net, "trace", **params))[0] == code


async def test_config_tells_the_settings_without_secrets(autojump_clock: MockClock) -> None:
    async with served(max_topics=5) as net:
        settings = (await result(net, "config"))["settings"]
        by_name = {setting["name"]: setting for setting in settings}
        assert by_name["max_topics"] == {
            "name": "max_topics",
            "value": 5,
            "source": "program",
            "needs_restart": "",
        }
        assert by_name["api_key"]["value"] == "(secret)"
        assert KEY not in json.dumps(settings)
