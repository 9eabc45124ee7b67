"""What the broker itself does for clients: queue groups, reports, requests, wills, last values."""

import json
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from trio.testing import MockClock, lockstep_stream_pair, wait_all_tasks_blocked

from broker import (
    Broker,
    Config,
    ConnectEvent,
    Connection,
    ConnectReply,
    Delivery,
    ErrorCode,
    PublishEvent,
    PublishReply,
    Refused,
    TopicRules,
)
from broker.core.hub import Hub
from broker.core.messages import ClientInfo, Close, Initiator
from broker.engines.memory import MemoryEngine
from broker.routing.router import Router
from broker.session.rpc import Methods
from broker.testing import MemoryListener, Network, Peer, handshake, open_test_broker
from broker.transport.postman import PostOffice


@asynccontextmanager
async def served(broker: Broker | None = None, **fields: Any) -> AsyncIterator[Network]:
    """A broker whose clients' tokens are their users."""
    broker = broker or Broker(Config(**fields))

    @broker.on_connect
    async def let_in(event: ConnectEvent) -> ConnectReply:
        return ConnectReply(user=event.token)

    async with open_test_broker(broker) as net:
        yield net


async def rpc(peer: Peer, method: str, **params: object) -> Any:
    """The whole reply; what came before it is dropped."""
    return await peer.request(rpc={"method": method, "data": params})


async def done(peer: Peer, method: str, **params: object) -> Any:
    reply = await rpc(peer, method, **params)
    assert "error" not in reply, reply
    return reply["rpc"]["data"]


async def subscribe(peer: Peer, topic: str, group: object = None, **fields: object) -> Any:
    data = {} if group is None else {"data": {"group": group}}
    reply = await peer.request(subscribe={"channel": topic, **data, **fields})
    assert "subscribe" in reply, reply
    return reply["subscribe"]


async def pub(peer: Peer) -> Any:
    return (await peer.receive_json())["push"]["pub"]


async def received(net: Network, peer: Peer) -> list[Any]:
    """The data of all publications that have come; ended by a push of ours."""
    net.broker.push(peer.fd, "end")
    got: list[Any] = []
    while True:
        for line in (await peer.receive_text()).split("\n"):
            push = json.loads(line)["push"]
            if push.get("message"):
                return got
            got.append(push["pub"]["data"])


# queue groups


async def test_each_publication_goes_to_one_member_in_turn(autojump_clock: MockClock) -> None:
    async with served() as net:
        workers = [await net.open_client() for _ in range(3)]
        for worker in workers:
            await subscribe(worker, "jobs", "workers")
        everybody = await net.open_client()
        await subscribe(everybody, "jobs")
        publisher = await net.open_client()
        # In one message, so in one run.
        await publisher.send_json(*({"publish": {"channel": "jobs", "data": n}} for n in range(6)))
        await wait_all_tasks_blocked()
        assert [await received(net, worker) for worker in workers] == [[0, 3], [1, 4], [2, 5]]
        assert await received(net, everybody) == [0, 1, 2, 3, 4, 5]


async def test_each_group_gets_all_and_patterns_have_groups_too(
    autojump_clock: MockClock,
) -> None:
    async with served() as net:
        a, b = await net.open_client(), await net.open_client()
        await subscribe(a, "jobs.*", "workers")
        await subscribe(b, "jobs.x", "auditors")
        for n in (1, 2):
            net.broker.publish("jobs.x", n)
        assert await received(net, a) == [1, 2]
        assert await received(net, b) == [1, 2]


async def test_a_member_that_is_gone_or_slow_is_passed_over(autojump_clock: MockClock) -> None:
    async with served(outbox_bytes=4000, ping_seconds=1000) as net:
        gone, quick = await net.open_client(), await net.open_client()
        slow = await net.open_client(make_pair=lockstep_stream_pair)
        for member in (gone, slow, quick):
            await subscribe(member, "jobs", "workers")
        await gone.aclose()
        await wait_all_tasks_blocked()
        for n in range(20):
            net.broker.publish("jobs", str(n) * 500)
            await wait_all_tasks_blocked()
            if n > 8:
                assert await pub(quick)
        # The slow one got some until it was seen to be slow, and is still here.
        assert net.broker.is_established(slow.fd)
        slow_outbox = net.outbox(slow.fd)
        assert 0 < slow_outbox.bytes <= 4000


async def test_with_only_slow_members_the_one_with_least_to_do_gets_it(
    autojump_clock: MockClock,
) -> None:
    async with served(outbox_bytes=10_000, ping_seconds=1000) as net:
        peers = [await net.open_client(make_pair=lockstep_stream_pair) for _ in "ab"]
        for peer in peers:
            await subscribe(peer, "jobs", "workers")
        reports = []
        for _ in range(10):
            reports.append(net.broker.publish("jobs", "x" * 1500))
            await wait_all_tasks_blocked()
        assert all(each.queued == 1 for each in reports)
        waiting = [net.outbox(peer.fd).bytes for peer in peers]
        assert all(bytes_ > 5000 for bytes_ in waiting)


async def test_a_member_neither_recovers_nor_gets_retained_values(
    autojump_clock: MockClock,
) -> None:
    async with served() as net:
        net.broker.publish("jobs", 1, retain=True)
        peer = await net.open_client()
        got = await subscribe(peer, "jobs", "workers", recoverable=True, recover=True)
        assert "recoverable" not in got
        assert "publications" not in got
        assert await received(net, peer) == []


@pytest.mark.parametrize("group", [1, "", "g" * 256, ["a"]])
async def test_a_bad_group_is_refused(autojump_clock: MockClock, group: object) -> None:
    async with served() as net:
        peer = await net.open_client()
        reply = await peer.request(subscribe={"channel": "jobs", "data": {"group": group}})
        assert reply["error"]["code"] == 107
        assert "group" in reply["error"]["message"]


async def test_a_reader_in_this_program_may_be_a_member(autojump_clock: MockClock) -> None:
    async with served() as net, net.broker.subscribe("jobs", group="workers") as messages:
        peer = await net.open_client()
        await subscribe(peer, "jobs", "workers")
        for n in range(4):
            net.broker.publish("jobs", n)
        assert [(await messages.receive()).value for _ in "12"] == [0, 2]
        assert await received(net, peer) == [1, 3]


# rpc publish


async def test_a_plain_rpc_publish_is_a_publish(autojump_clock: MockClock) -> None:
    async with served() as net:
        peer = await net.open_client()
        await subscribe(peer, "news")
        await peer.send_json(
            {"id": 5, "rpc": {"method": "publish", "data": {"topic": "news", "data": 1}}}
        )
        assert await pub(peer) == {
            "data": 1,
            "offset": 1,
            "info": {"user": "", "client": str(peer.fd)},
        }
        assert await peer.receive_json() == {"id": 5, "rpc": {"data": {}}}


async def test_no_echo_exclude_and_report(autojump_clock: MockClock) -> None:
    async with served() as net:
        peers = [await net.open_client() for _ in range(4)]
        for peer in peers:
            await subscribe(peer, "news")
        me, spared, *_ = peers
        report = await done(
            me, "publish", topic="news", data=1, echo=False, exclude=[spared.fd], report=True
        )
        assert report == {"matched": 2, "queued": 2, "dropped": 0, "failed": []}
        assert [await received(net, peer) for peer in peers] == [[], [], [1], [1]]
        nobody = await done(me, "publish", topic="empty", data=1, report=True)
        assert nobody == {"matched": 0, "queued": 0, "dropped": 0, "failed": []}
        direct = await done(me, "publish", topic=f"fd:{spared.fd}", data=1, report=True)
        assert direct["queued"] == 1


async def test_a_long_list_of_the_excluded_costs_each_subscriber_one_look(
    autojump_clock: MockClock,
) -> None:
    class Listed(list[int]):
        def __contains__(self, fd: object) -> bool:
            raise AssertionError("a walk through the list")

    async with served() as net:
        peers = [await net.open_client() for _ in range(4)]
        for peer, data in zip(peers, [{}, {}, {"group": "g"}, {"group": "g"}], strict=True):
            await peer.request(subscribe={"channel": "news", "data": data})
        net.broker.publish("news", 1, exclude=Listed([peers[0].fd, peers[2].fd]))
        assert [await received(net, peer) for peer in peers] == [[], [1], [], [1]]


async def test_exclude_holds_within_a_group(autojump_clock: MockClock) -> None:
    async with served() as net:
        a, b = await net.open_client(), await net.open_client()
        for peer in (a, b):
            await subscribe(peer, "jobs", "workers")
        for n in range(3):
            await done(a, "publish", topic="jobs", data=n, echo=False)
        assert await received(net, b) == [0, 1, 2]
        both = await done(a, "publish", topic="jobs", data=1, exclude=[a.fd, b.fd], report=True)
        assert both == {"matched": 1, "queued": 0, "dropped": 1, "failed": []}


async def test_the_report_names_who_failed() -> None:
    """Over a real socket: only the system says that it would not take more."""
    broker = Broker(Config(port=0, host="127.0.0.1", outbox_bytes=100_000, log_level="error"))
    async with trio.open_nursery() as nursery:
        (address,) = await nursery.start(broker.serve)
        with trio.fail_after(30):
            stalled = Peer(await trio.open_tcp_stream("127.0.0.1", int(address.rpartition(":")[2])))
            async with stalled, broker.subscribe("news") as messages:
                await stalled.send(handshake())
                await stalled.receive_head()
                await stalled.request(connect={})
                await subscribe(stalled, "news")
                delivery = broker.publish("news", "x")
                assert (delivery.matched, delivery.queued, delivery.failed) == (2, 2, ())
                while not delivery.failed:
                    delivery = broker.publish("news", "x" * 50_000)
                    await trio.lowlevel.checkpoint()
                assert (delivery.matched, delivery.queued, delivery.dropped) == (2, 1, 1)
                assert delivery.failed == (1,)
                assert not broker.is_established(1)
                assert messages.bytes_waiting > 1
        broker.stop()


async def test_a_key_makes_a_publish_happen_once_per_user(autojump_clock: MockClock) -> None:
    async with served() as net:
        async with net.broker.subscribe("news") as messages:
            alice, again, bob = [
                await net.open_client(token=user) for user in ("alice", "alice", "bob")
            ]
            params = {"topic": "news", "data": 1, "key": "k", "report": True}
            first = await done(alice, "publish", **params)
            assert await done(alice, "publish", **{**params, "data": 2}) == first
            # From another of her connections, as after a reconnect.
            assert await done(again, "publish", **params) == first
            await done(bob, "publish", **params)
            got = [await messages.receive() for _ in "12"]
            assert [each.info and each.info.user for each in got] == ["alice", "bob"]
            await wait_all_tasks_blocked()
            assert messages.bytes_waiting == 0


async def test_a_key_of_an_anonymous_client_is_its_connections_own(
    autojump_clock: MockClock,
) -> None:
    async with served() as net:
        async with net.broker.subscribe("news") as messages:
            one, other = [await net.open_client() for _ in "12"]
            params = {"topic": "news", "data": 1, "key": "1"}
            for client in (one, other, one, other):
                await done(client, "publish", **params)
            got = [await messages.receive() for _ in "12"]
            assert [each.info and each.info.client for each in got] == ["1", "2"]
            await wait_all_tasks_blocked()
            assert messages.bytes == 0


async def test_keys_of_an_anonymous_client_go_with_it(autojump_clock: MockClock) -> None:
    router = Router(Hub(), MemoryEngine(2**20), PostOffice(), Config())
    methods = Methods(router)
    gone, alice = ClientInfo("7"), ClientInfo("8", "alice")
    for _ in "12":
        for info in (gone, alice):
            methods.publish("news", b"1", info, key="1")
    assert router.published == 2
    for fd in (7, 8):
        methods.end(fd, Close(1006, "", Initiator.NETWORK))
    methods.publish("news", b"1", alice, key="1")  # she has come back
    assert router.published == 2
    methods.publish("news", b"1", gone, key="1")
    assert router.published == 3


async def test_a_refused_publish_may_be_tried_again_with_its_key(
    autojump_clock: MockClock,
) -> None:
    async with served() as net:
        peer = await net.open_client()
        params = {"topic": "fd:2", "data": 1, "key": "k"}
        assert (await rpc(peer, "publish", **params))["error"]["code"] == 102
        other = await net.open_client()
        assert other.fd == 2
        await done(peer, "publish", **params)
        assert (await pub(other))["data"] == 1


async def test_the_app_is_asked_about_rpc_publishes_too(autojump_clock: MockClock) -> None:
    broker = Broker()

    @broker.on_publish
    async def look(event: PublishEvent) -> PublishReply | None:
        if event.topic == "secret":
            raise Refused(ErrorCode.PERMISSION_DENIED)
        return PublishReply(b'"censored"')

    async with served(broker) as net, broker.subscribe("news") as messages:
        peer = await net.open_client()
        for method, field in (("publish", "topic"), ("request", "to"), ("will", "topic")):
            reply = await rpc(peer, method, **{field: "secret", "data": 1})
            assert reply["error"]["code"] == 103
        await done(peer, "publish", topic="news", data=1)
        assert (await messages.receive()).value == "censored"


@pytest.mark.parametrize(
    "method, params",
    [
        ("publish", {}),
        ("publish", {"topic": "news"}),
        ("publish", {"topic": "news", "data": 1, "ehco": False}),
        ("publish", {"topic": "news.*", "data": 1}),
        ("publish", {"topic": "news", "data": 1, "key": "k" * 256}),
        ("publish", {"topic": "fd:1", "data": 1}),
        ("publish", {"topic": "user:u", "data": 1, "retain": True}),
        ("request", {"to": "fd:1", "data": 1}),
        ("request", {"to": "news.*", "data": 1}),
        ("request", {"to": "news", "data": 1, "seconds": 0}),
        ("request", {"to": "news", "data": 1, "seconds": 61}),
        ("reply", {"reply_to": "1", "data": 1}),
        ("reply", {"reply_to": "x", "data": 1}),
        ("reply", {"reply_to": "9" * 5000, "data": 1}),
        ("reply", {"reply_to": "1"}),
        ("will", {"topic": "news"}),
    ],
)
async def test_bad_params_are_error_107(
    autojump_clock: MockClock, method: str, params: dict[str, object]
) -> None:
    async with served() as net:
        peer = await net.open_client(token="u")
        reply = await rpc(peer, method, **params)
        assert reply["error"]["code"] == 107, reply


async def test_other_methods_are_the_apps(autojump_clock: MockClock) -> None:
    broker = Broker()

    @broker.on_rpc
    async def answer(connection: Connection, method: str, data: object) -> object:
        return [method, data]

    async with served(broker) as net:
        peer = await net.open_client()
        assert await done(peer, "mine", a=1) == ["mine", {"a": 1}]


# requests


async def test_a_client_answers_another(autojump_clock: MockClock) -> None:
    async with served() as net:
        asker, responder = await net.open_client(token="a"), await net.open_client()
        await asker.send_json(
            {
                "id": 7,
                "rpc": {"method": "request", "data": {"to": f"fd:{responder.fd}", "data": [1]}},
            }
        )
        asked = (await responder.receive_json())["push"]
        assert asked["channel"] == f"fd:{responder.fd}"
        assert asked["pub"]["data"] == [1]
        assert asked["pub"]["info"]["user"] == "a"
        reply_to = asked["pub"]["tags"]["reply_to"]
        # The asker is free to do other things meanwhile.
        assert await done(asker, "publish", topic="t", data=1) == {}
        assert await done(responder, "reply", reply_to=reply_to, data={"sum": 1}) == {}
        assert await asker.receive_json() == {"id": 7, "rpc": {"data": {"sum": 1}}}
        # Once.
        reply = await rpc(responder, "reply", reply_to=reply_to, data=2)
        assert reply["error"]["code"] == 107


async def test_an_answer_may_be_an_error(autojump_clock: MockClock) -> None:
    async with served() as net:
        asker, responder = await net.open_client(), await net.open_client()
        await asker.send_json(
            {"id": 7, "rpc": {"method": "request", "data": {"to": "fd:2", "data": 1}}}
        )
        reply_to = (await pub(responder))["tags"]["reply_to"]
        error = {"code": 400, "message": "no such thing"}
        await done(responder, "reply", reply_to=reply_to, error=error)
        assert await asker.receive_json() == {"id": 7, "error": error}


async def test_only_the_one_who_was_asked_may_answer(autojump_clock: MockClock) -> None:
    async with served() as net:
        asker, responder, other = [await net.open_client() for _ in range(3)]
        await asker.send_json(
            {"id": 7, "rpc": {"method": "request", "data": {"to": "fd:2", "data": 1}}}
        )
        reply_to = (await pub(responder))["tags"]["reply_to"]
        reply = await rpc(other, "reply", reply_to=reply_to, data="forged")
        assert reply["error"]["code"] == 107
        await done(responder, "reply", reply_to=reply_to, data="real")
        assert (await asker.receive_json())["rpc"] == {"data": "real"}


async def test_requests_to_a_group_go_around(autojump_clock: MockClock) -> None:
    async with served() as net:
        asker, a, b = [await net.open_client() for _ in range(3)]
        listener = await net.open_client()
        await subscribe(listener, "sum")
        for member in (asker, a, b):
            await subscribe(member, "sum", "adders")
        for member in (a, b, a):
            await asker.send_json(
                {"id": 7, "rpc": {"method": "request", "data": {"to": "sum", "data": 1}}}
            )
            await done(member, "reply", reply_to=(await pub(member))["tags"]["reply_to"], data=2)
            assert (await asker.receive_json())["rpc"] == {"data": 2}
        assert await received(net, listener) == []


@pytest.mark.parametrize("to", ["fd:99", "sum", "fd:2"])
async def test_a_request_fails_at_once_when_nobody_listens(
    autojump_clock: MockClock, to: str
) -> None:
    async with served() as net:
        asker = await net.open_client()
        await net.open_plain()  # fd 2 could not answer
        await subscribe(asker, "sum", "adders")  # and nobody asks itself
        before = trio.current_time()
        reply = await rpc(asker, "request", to=to, data=1)
        assert reply["error"]["code"] == 503
        assert trio.current_time() == before


async def test_a_request_fails_when_its_time_is_over(autojump_clock: MockClock) -> None:
    async with served() as net:
        asker, responder = await net.open_client(), await net.open_client()
        before = trio.current_time()
        reply = await rpc(asker, "request", to="fd:2", data=1, seconds=3)
        assert reply["error"] == {"code": 504, "message": "no answer"}
        assert 3 <= trio.current_time() - before <= 4
        late = await rpc(
            responder, "reply", reply_to=(await pub(responder))["tags"]["reply_to"], data=1
        )
        assert late["error"]["code"] == 107


async def test_a_request_fails_when_the_one_who_was_asked_goes(
    autojump_clock: MockClock,
) -> None:
    async with served() as net:
        asker, responder = await net.open_client(), await net.open_client()
        await asker.send_json(
            {"id": 7, "rpc": {"method": "request", "data": {"to": "fd:2", "data": 1}}}
        )
        await pub(responder)
        await responder.aclose()
        reply = await asker.receive_json()
        assert reply["error"] == {"code": 503, "message": "fd 2 has gone without an answer"}


async def test_who_asks_and_goes_leaves_nothing_behind(autojump_clock: MockClock) -> None:
    async with served() as net:
        asker, responder = await net.open_client(), await net.open_client()
        await asker.send_json(
            {"id": 7, "rpc": {"method": "request", "data": {"to": "fd:2", "data": 1}}}
        )
        reply_to = (await pub(responder))["tags"]["reply_to"]
        assert net.open_requests == 1
        await asker.aclose()
        await wait_all_tasks_blocked()
        assert net.open_requests == 0
        reply = await rpc(responder, "reply", reply_to=reply_to, data=1)
        assert reply["error"]["code"] == 107


async def test_two_that_ask_each_other_do_not_block_each_other(
    autojump_clock: MockClock,
) -> None:
    async with served() as net:
        a, b = await net.open_client(), await net.open_client()
        for asker, to in ((a, "fd:2"), (b, "fd:1")):
            await asker.send_json(
                {"id": 7, "rpc": {"method": "request", "data": {"to": to, "data": 1}}}
            )
        asked = {peer: (await pub(peer))["tags"]["reply_to"] for peer in (a, b)}
        for peer, reply_to in asked.items():
            await peer.send_json(
                {"id": 8, "rpc": {"method": "reply", "data": {"reply_to": reply_to, "data": 2}}}
            )
        for peer in (a, b):
            replies = [await peer.receive_json() for _ in "12"]
            assert sorted(each["id"] for each in replies) == [7, 8]
            assert all("rpc" in each for each in replies)


async def test_a_client_has_a_hundred_requests_open_at_most(autojump_clock: MockClock) -> None:
    async with served() as net:
        asker, _ = await net.open_client(), await net.open_client()
        command = {"id": 7, "rpc": {"method": "request", "data": {"to": "fd:2", "data": 1}}}
        await asker.send_json(*[command] * 100)
        await wait_all_tasks_blocked()
        assert (await rpc(asker, "request", to="fd:2", data=1))["error"]["code"] == 106
        # Those who are asked are not limited by it.
        other = await net.open_client()
        await other.send_json(command)
        await wait_all_tasks_blocked()
        assert net.open_requests == 101


async def test_the_program_asks_a_client(autojump_clock: MockClock) -> None:
    async with served() as net:
        peer = await net.open_client()

        async def answer() -> None:
            asked = await pub(peer)
            assert "info" not in asked
            reply_to = asked["tags"]["reply_to"]
            await done(peer, "reply", reply_to=reply_to, data=asked["data"] + 1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer)
            assert await net.broker.request(f"fd:{peer.fd}", 1) == 2
        with pytest.raises(Refused, match="503"):
            await net.broker.request("fd:99", 1)
        with trio.move_on_after(1) as patience:
            await net.broker.request(f"fd:{peer.fd}", 1)
        assert patience.cancelled_caught
        assert net.open_requests == 0
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def wait() -> None:
                with pytest.raises(Refused, match="has gone"):
                    await net.broker.request(f"fd:{peer.fd}", 1)

            await wait_all_tasks_blocked()
            await peer.aclose()


async def test_an_answer_that_python_cannot_hold_is_an_infinity_to_the_program(
    autojump_clock: MockClock,
) -> None:
    async with served() as net, trio.open_nursery() as nursery:
        peer = await net.open_client()

        @nursery.start_soon
        async def reply() -> None:
            number = (await pub(peer))["tags"]["reply_to"]
            params = f'{{"reply_to":"{number}","data":1e999}}'
            await peer.send_text(f'{{"id":9,"rpc":{{"method":"reply","data":{params}}}}}')

        assert await net.broker.request(f"fd:{peer.fd}", 1) == math.inf


async def test_what_was_answered_waits_for_no_end_of_its_time(autojump_clock: MockClock) -> None:
    async with served() as net:
        peer = await net.open_client()
        requests = net.node.services.requests
        answers: list[bytes | Refused] = []
        # Asked once and never answered: it stays, and ends when its time is over.
        requests.ask(f"fd:{peer.fd}", b"1", None, answers.append, due=trio.current_time() + 5)
        for _ in range(1000):
            due = trio.current_time() + 5
            number = requests.ask(f"fd:{peer.fd}", b"1", None, answers.append, due=due)
            requests.reply(peer.fd, number, b"2")
        assert (len(requests), len(requests._due) < 100) == (1, True)
        assert answers == [b"2"] * 1000
        await trio.sleep(7)
        (late,) = answers[1000:]
        assert isinstance(late, Refused)
        assert late.code == 504
        assert len(requests) == len(requests._due) == 0


# last values


async def test_a_new_subscriber_gets_the_retained_value_at_once(
    autojump_clock: MockClock,
) -> None:
    async with served() as net:
        publisher = await net.open_client()
        for value in (20, 21):
            await done(publisher, "publish", topic="temp.kitchen", data=value, retain=True)
        net.broker.publish("temp.kitchen", "not retained")
        info = {"user": "", "client": str(publisher.fd)}
        peer = await net.open_client()
        got = await subscribe(peer, "temp.kitchen", recoverable=True)
        assert got["offset"] == 3
        # Without an offset: it is no news that a position may follow.
        assert await pub(peer) == {"data": 21, "info": info, "tags": {"retained": "true"}}
        await subscribe(peer, "temp.>")
        assert (await pub(peer))["tags"] == {"retained": "true", "topic": "temp.kitchen"}
        async with net.broker.subscribe("temp.*") as messages:
            assert (await messages.receive()).value == 21
        # Who has recovered everything has that, too.
        back = await net.open_client()
        await subscribe(back, "temp.kitchen", recover=True, offset=1, epoch=got["epoch"])
        assert await received(net, back) == []
        # But not what the history never had.
        net.broker.publish("temp.kitchen", 22, retain=True, skip_history=True)
        later = await net.open_client()
        await subscribe(later, "temp.kitchen", recover=True, offset=3, epoch=got["epoch"])
        assert (await pub(later))["data"] == 22
        net.broker.add_subscription(publisher.fd, "temp.kitchen")
        assert "subscribe" in (await publisher.receive_json())["push"]
        assert (await pub(publisher))["data"] == 22


async def test_null_clears_what_is_retained(autojump_clock: MockClock) -> None:
    async with served() as net:
        net.broker.publish("temp", 1, retain=True)
        net.broker.publish("temp", None, retain=True)
        peer = await net.open_client()
        await subscribe(peer, "temp")
        assert await received(net, peer) == []


async def test_a_rule_retains_what_anyone_publishes(autojump_clock: MockClock) -> None:
    async with served(topics=TopicRules(retain=True)) as net:
        publisher = await net.open_client()
        await publisher.send_json(*({"publish": {"channel": "t", "data": n}} for n in range(3)))
        await wait_all_tasks_blocked()
        assert net.broker.publish("u", 1) == Delivery(0, 0, 0, (), net.broker.history("u")[1])
        peer = await net.open_client()
        await subscribe(peer, "t")
        assert (await pub(peer))["data"] == 2
        await subscribe(peer, "u")
        assert (await pub(peer))["data"] == 1


# wills


async def test_a_will_is_published_when_its_client_is_lost(autojump_clock: MockClock) -> None:
    async with served() as net, net.broker.subscribe("left") as messages:
        peer = await net.open_client(token="alice")
        assert await done(peer, "will", topic="left", data="first") == {}
        assert await done(peer, "will", topic="left", data={"who": "alice"}) == {}
        await peer.aclose()
        publication = await messages.receive()
        assert publication.value == {"who": "alice"}
        assert publication.info is not None
        assert publication.info.user == "alice"
        await wait_all_tasks_blocked()
        assert messages.bytes_waiting == 0


@pytest.mark.parametrize(
    "code, published", [(1000, False), (1001, True), (4000, True), (None, False)]
)
async def test_a_will_is_void_after_a_goodbye(
    autojump_clock: MockClock, code: int | None, published: bool
) -> None:
    async with served() as net, net.broker.subscribe("left") as messages:
        peer = await net.open_client()
        await done(peer, "will", topic="left", data=1)
        if code is None:  # what `close()` of a browser sends
            await peer.send(b"\x88\x80\x00\x00\x00\x00")
        else:
            await peer.send_close(code)
        await peer.receive_close()
        await peer.aclose()
        await wait_all_tasks_blocked()
        assert messages.bytes_waiting == published


async def test_a_will_is_published_when_the_server_sends_its_client_away(
    autojump_clock: MockClock,
) -> None:
    async with served() as net, net.broker.subscribe("left") as messages:
        peer = await net.open_client()
        await done(peer, "will", topic="left", data=1)
        net.broker.disconnect(peer.fd)
        await peer.receive_close()
        await peer.aclose()
        assert (await messages.receive()).value == 1


async def test_a_will_can_be_taken_back_and_one_to_nobody_is_forgotten(
    autojump_clock: MockClock,
) -> None:
    async with served() as net, net.broker.subscribe("left") as messages:
        peer, other = await net.open_client(), await net.open_client()
        await done(peer, "will", topic="left", data=1)
        assert await done(peer, "will") == {}
        await peer.aclose()
        await done(other, "will", topic="fd:99", data=1)
        await other.aclose()
        await wait_all_tasks_blocked()
        assert messages.bytes_waiting == 0
        assert net.broker.connections() == []


async def test_a_will_does_no_harm_when_the_broker_is_cancelled() -> None:
    broker, listener = Broker(), MemoryListener()
    async with trio.open_nursery() as nursery:
        await nursery.start(lambda **start: broker.serve(listeners=[listener], **start))
        net = Network(broker, listener)
        for _ in range(3):
            peer = await net.open_client()
            await subscribe(peer, "left", join_leave=True)
            await done(peer, "will", topic="left", data=1)
        nursery.cancel_scope.cancel()
    with pytest.raises(RuntimeError, match="not serving"):
        broker.publish("left", 1)


# patterns and rules


async def test_nobody_gets_through_a_group_or_a_retained_value_what_it_may_not_subscribe_to(
    autojump_clock: MockClock,
) -> None:
    async with served() as net:
        eve = await net.open_client(token="eve")
        net.broker.publish("$secret", 1, retain=True)
        net.broker.publish("room#ann", 1, retain=True)
        net.broker.publish("open", 1, retain=True)
        await subscribe(eve, ">")
        assert await received(net, eve) == [1]
        spy = await net.open_client(token="eve")
        await subscribe(spy, "*", "spies")
        for topic, queued in (("$secret", 0), ("room#ann", 0), ("open", 2)):
            assert net.broker.publish(topic, topic).queued == queued
        assert await received(net, spy) == ["open"]
        with pytest.raises(Refused, match="503"):
            await net.broker.request("$secret", 1)


async def test_rules_hold_for_rpc_publishes_too(autojump_clock: MockClock) -> None:
    async with served(topics=TopicRules(may_publish="none")) as net:
        peer = await net.open_client()
        for method, field in (("publish", "topic"), ("request", "to"), ("will", "topic")):
            reply = await rpc(peer, method, **{field: "news", "data": 1})
            assert reply["error"]["code"] == 103
