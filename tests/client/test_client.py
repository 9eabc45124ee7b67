"""The client: connecting, requests, coming back. Against the real broker: `test_scripts.py`."""

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import trio
import trio_websocket
from trio.testing import MockClock, wait_all_tasks_blocked

from broker import Broker
from broker.client import (
    PresenceStats,
    Subscription,
    open_client,
)
from broker.client.testing import (
    KEPT,
    URL,
    FakeBroker,
    FakePeer,
    pub,
)
from broker.core.messages import ClientInfo, Position, Publication
from broker.errors import ClientError, ConnectionLost, RequestFailed, Unavailable
from broker.testing import open_test_broker
from broker.version import VERSION


async def take(subscription: Subscription[Publication], count: int) -> list[object]:
    return [(await anext(subscription)).value for _ in range(count)]


async def cannot_open(fake: FakeBroker) -> ClientError:
    """The error that opening a client ends with."""
    with pytest.raises(ClientError) as caught:
        async with open_client(URL, open_stream=fake.open_stream):
            pytest.fail("connected")
    return caught.value


async def test_connects_with_token_name_data_and_headers(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    seen: list[object] = []

    async def serve() -> None:
        request, stream = await fake.request()
        seen.extend([request.path, (b"x-tenant", b"blue") in request.headers])
        peer = FakePeer(fake.nursery, stream, await request.accept())
        seen.append(await peer.answer("connect", client="7", data={"fd": 7}))

    fake.nursery.start_soon(serve)
    async with open_client(
        f"{URL}/connection/websocket?a=1",
        token="secret",
        name="meter",
        version="2.1",
        data={"room": 1},
        headers=[("X-Tenant", "blue")],
        open_stream=fake.open_stream,
    ) as client:
        assert client.fd == 7
    assert not client.connected
    connect = {"token": "secret", "name": "meter", "version": "2.1", "data": {"room": 1}}
    assert seen == ["/connection/websocket?a=1", True, connect]


@pytest.mark.parametrize(
    "own, told",
    [({}, ("trio-broker", VERSION)), ({"name": "meter"}, ("meter", ""))],
    ids=["a program that says nothing", "a program with a name of its own"],
)
async def test_a_client_says_its_version_and_none_of_a_program_that_has_not_told_it(
    own: dict[str, Any], told: tuple[str, str]
) -> None:
    async with (
        open_test_broker(Broker()) as net,
        open_client("ws://test", open_stream=lambda *_: net.listener.connect(), **own) as client,
    ):
        info = net.broker.connection_info(client.fd)
        assert info is not None
        assert (info.app_name, info.app_version) == told


async def test_a_refused_connection_is_one_line_that_names_the_url(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    fake.down = True
    assert str(await cannot_open(fake)) == f"cannot connect to {URL}: connection refused"
    assert len(fake.dials) == 1


async def test_a_real_port_where_nobody_listens_is_named_too() -> None:
    with trio.socket.socket() as taken:
        await taken.bind(("127.0.0.1", 0))  # bound and not listening
        url = f"ws://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ClientError, match=f"^cannot connect to {url}: connection refused$"):
            async with open_client(url):
                pytest.fail("connected")


async def test_an_answer_that_is_not_websocket_is_named(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async def serve() -> None:
        request, _ = await fake.request()
        await request.reject(403)

    fake.nursery.start_soon(serve)
    assert "the answer is HTTP 403, not WebSocket" in str(await cannot_open(fake))


async def test_an_end_during_the_handshake_is_told_at_once(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async def serve() -> None:
        stream = await fake.stream()
        await stream.receive_some()
        await trio.aclose_forcefully(stream)

    fake.nursery.start_soon(serve)
    assert "closed before the WebSocket handshake" in str(await cannot_open(fake))
    assert trio.current_time() == fake.dials[0]


async def test_a_broker_that_does_not_answer_is_given_up_after_10_s(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    assert "no answer within 10 s" in str(await cannot_open(fake))
    assert trio.current_time() == pytest.approx(fake.dials[0] + 10)


@pytest.mark.parametrize("answer", ["this is server", '{"id":1}', '{"id":1,"connect":{}}', "[1]"])
async def test_a_server_of_another_protocol_is_named(
    fake: FakeBroker, autojump_clock: MockClock, answer: str
) -> None:
    async def serve() -> None:
        peer = await fake.accept()
        await peer.expect("connect")
        await peer.ws.send_message(answer)

    fake.nursery.start_soon(serve)
    assert "not this broker's protocol" in str(await cannot_open(fake))


async def test_refused_for_good_is_unavailable_with_the_code(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async def by_close() -> None:
        await (await fake.accept()).ws.aclose(3500, "invalid token")

    async def by_reply() -> None:
        await (await fake.accept()).refuse("connect", 109)

    for serve, code in ((by_close, 3500), (by_reply, 109)):
        fake.nursery.start_soon(serve)
        error = await cannot_open(fake)
        assert isinstance(error, Unavailable)
        assert error.code == code


async def test_before_the_first_connection_a_temporary_refusal_is_an_error(
    fake: FakeBroker,
    autojump_clock: MockClock,
) -> None:
    async def by_reply() -> None:
        await (await fake.accept()).refuse("connect", 111, temporary=True)

    async def by_close() -> None:
        await (await fake.accept()).ws.aclose(3004, "internal")

    for serve, code in ((by_reply, 111), (by_close, 3004)):
        fake.nursery.start_soon(serve)
        error = await cannot_open(fake)
        assert isinstance(error, RequestFailed)  # and no `Unavailable`, which is for good
        assert error.temporary
        assert error.code == code
    assert len(fake.dials) == 2


@pytest.mark.parametrize("error", [RequestFailed(103, "no"), KeyboardInterrupt(), ValueError("x")])
async def test_an_exception_of_the_block_comes_out_unwrapped(
    fake: FakeBroker, autojump_clock: MockClock, error: BaseException
) -> None:
    with pytest.raises(type(error)) as caught:
        async with fake.subscriber():
            raise error
    assert caught.value is error


async def test_cancelling_the_block_ends_it(fake: FakeBroker, autojump_clock: MockClock) -> None:
    with trio.move_on_after(5) as scope:
        async with fake.subscriber():
            await trio.sleep_forever()
    assert scope.cancelled_caught


async def test_leaving_while_reconnecting_is_immediate(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client() as (_, peer):
        fake.down = True
        await peer.drop()
        await trio.sleep(50)
        left = trio.current_time()
    assert trio.current_time() == left


async def test_publish_waits_for_its_reply(fake: FakeBroker, autojump_clock: MockClock) -> None:
    async with fake.client() as (client, peer):

        async def serve() -> None:
            command = await peer.expect("publish")
            await trio.sleep(3)
            await peer.send({"id": command["id"], "publish": {}})

        began = trio.current_time()
        fake.nursery.start_soon(serve)
        await client.publish("news", {"a": "é"})
        assert trio.current_time() == pytest.approx(began + 3)


async def test_an_error_reply_is_raised_to_its_own_caller(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client() as (client, peer), trio.open_nursery() as nursery:

        async def push() -> None:
            with pytest.raises(RequestFailed, match="102: no"):
                await client.push(99, "hello")

        nursery.start_soon(push)
        await wait_all_tasks_blocked()
        nursery.start_soon(client.publish, "news", 1)
        first = await peer.expect("publish")
        assert first["publish"] == {"channel": "fd:99", "data": "hello"}
        await peer.answer("publish")
        await peer.send({"id": first["id"], "error": {"code": 102, "message": "no"}})


async def test_a_cancelled_block_says_goodbye_and_ends_also_where_nobody_answers(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    with trio.CancelScope() as scope:
        async with fake.client() as (_, peer):
            scope.cancel()
            await trio.sleep_forever()
    with pytest.raises(trio_websocket.ConnectionClosed) as closed:
        await peer.ws.get_message()
    assert closed.value.reason is not None
    assert closed.value.reason.code == 1000
    with trio.move_on_after(1):  # nobody has greeted it yet
        async with open_client(URL, open_stream=fake.open_stream):
            pytest.fail("connected")
    assert trio.current_time() < 2


async def test_a_cancelled_publish_leaves_the_client_usable(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client() as (client, peer):
        with trio.move_on_after(1):
            await client.publish("news", 1)
        await peer.answer("publish")
        peer.soon("publish")
        await client.publish("news", 2)


async def test_history_presence_rpc_and_send(fake: FakeBroker, autojump_clock: MockClock) -> None:
    async with fake.client() as (client, peer):
        kept = pub(4) | {"time": 9, "info": {"client": "3", "user": "al"}}
        peer.soon("history", publications=[kept], epoch="e", offset=5)
        page = await client.history("news", limit=1)
        assert page.position == Position(5, "e")
        assert page.publications == (Publication("news", b'"n4"', ClientInfo("3", "al"), 4, 9),)

        info = {"client": "3", "user": "al", "conn_info": {"name": "A"}}
        peer.soon("presence", presence={"3": info})
        there = await client.presence("news")
        assert there == {"3": ClientInfo("3", "al", b'{"name": "A"}')}

        peer.soon("presence_stats", num_clients=2, num_users=1)
        assert await client.presence_stats("news") == PresenceStats(2, 1)

        peer.soon("rpc", data={"sum": 3})
        assert await client.rpc("add", [1, 2]) == {"sum": 3}

        await client.send("hello")
        assert await peer.expect("send") == {"send": {"data": "hello"}}


async def test_history_asks_for_what_it_says(fake: FakeBroker, autojump_clock: MockClock) -> None:
    asked: list[object] = []
    async with fake.client() as (client, peer):

        async def serve() -> None:
            asked.extend([await peer.answer("history"), await peer.answer("history")])

        fake.nursery.start_soon(serve)
        await client.history("news")
        await client.history("news", limit=0, since=Position(3, "e"), reverse=True)
    since = {"offset": 3, "epoch": "e"}
    assert asked == [
        {"channel": "news", "limit": -1},
        {"channel": "news", "limit": 0, "since": since, "reverse": True},
    ]


async def test_requests_in_flight_fail_when_the_connection_drops(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client() as (client, peer):

        async def serve() -> None:
            await peer.expect("publish")
            await peer.drop()

        fake.nursery.start_soon(serve)
        with pytest.raises(ConnectionLost, match="may or may not have been carried out"):
            await client.publish("news", 1)


async def test_a_request_made_while_reconnecting_waits_for_the_connection(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client() as (client, peer):
        await peer.drop()
        await wait_all_tasks_blocked()
        assert not client.connected

        async def serve() -> None:
            await (await fake.greet()).answer("publish")

        fake.nursery.start_soon(serve)
        await client.publish("news", 1)
        assert client.fd == 2


async def test_waits_grow_with_jitter_and_stay_within_20_s(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    random.seed(1)
    async with fake.client() as (_, peer):
        fake.down = True
        await peer.drop()
        await trio.sleep(400)
    waits = [after - before for before, after in zip(fake.dials, fake.dials[1:], strict=False)]
    for attempt, wait in enumerate(waits):
        assert wait <= min(20, 0.2 * 2**attempt) + 1e-6
    assert max(waits) > 15
    assert len(set(waits)) == len(waits)
    assert 20 < len(waits) < 80  # 10 s each on average


async def test_a_broker_that_greets_and_hangs_up_is_not_hammered(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client() as (_, peer):
        await peer.drop()
        with trio.move_on_after(400):
            while True:
                await (await fake.greet()).drop()
    assert len(fake.dials) < 90


async def test_after_a_long_connection_the_waits_are_short_again(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client() as (_, peer):
        fake.down = True
        await peer.drop()
        await trio.sleep(100)
        fake.down = False
        peer = await fake.greet()
        await trio.sleep(30)
        dropped = trio.current_time()
        await peer.drop()
        await fake.greet()
        assert trio.current_time() - dropped <= 0.2


async def test_close_3500_ends_it_for_everybody(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client() as (client, peer):
        peer.soon("subscribe", **KEPT)
        async with client.subscribe("news") as subscription, trio.open_nursery() as nursery:

            async def ends(function: Callable[[], Any]) -> None:
                with pytest.raises(Unavailable, match="3500: invalid token"):
                    await function()

            nursery.start_soon(ends, partial(client.publish, "news", 1))
            nursery.start_soon(ends, client.messages.__anext__)
            await peer.publish(1)
            await wait_all_tasks_blocked()
            await peer.ws.aclose(3500, "invalid token")
            await trio.sleep(60)
            assert await take(subscription, 1) == ["n1"]
            await ends(subscription.__anext__)
            await ends(partial(client.publish, "news", 1, reply=False))
            await ends(client.subscribe("more").__aenter__)
        assert len(fake.dials) == 1
        assert not client.connected


@pytest.mark.parametrize("code", [1001, 3001, 3012, 4000])
async def test_other_close_codes_and_disconnect_pushes_come_back(
    fake: FakeBroker, autojump_clock: MockClock, code: int
) -> None:
    async with fake.client() as (client, peer):
        await peer.ws.aclose(code, "bye")
        peer = await fake.greet()
        await peer.send({"push": {"disconnect": {"code": code, "reason": "bye"}}})
        await fake.greet()
        await wait_all_tasks_blocked()
        assert client.fd == 3


async def test_a_disconnect_push_for_good_ends_it(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client() as (client, peer):
        await peer.send({"push": {"disconnect": {"code": 3503, "reason": "out"}}})
        with pytest.raises(Unavailable, match="3503: out"):
            await anext(client.messages)


async def test_garbage_from_the_broker_is_a_lost_connection(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client() as (client, peer):
        await peer.ws.send_message("{")
        await fake.greet()
        await wait_all_tasks_blocked()
        assert client.fd == 2
