"""Requests between clients: each ends in one answer, and nobody waits in vain."""

import math

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from broker import (
    Refused,
)
from tests.conftest import done, next_pub, received, rpc, served, subscribe


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
        reply_to = (await next_pub(responder))["tags"]["reply_to"]
        error = {"code": 400, "message": "no such thing"}
        await done(responder, "reply", reply_to=reply_to, error=error)
        assert await asker.receive_json() == {"id": 7, "error": error}


async def test_only_the_one_who_was_asked_may_answer(autojump_clock: MockClock) -> None:
    async with served() as net:
        asker, responder, other = [await net.open_client() for _ in range(3)]
        await asker.send_json(
            {"id": 7, "rpc": {"method": "request", "data": {"to": "fd:2", "data": 1}}}
        )
        reply_to = (await next_pub(responder))["tags"]["reply_to"]
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
            await done(
                member, "reply", reply_to=(await next_pub(member))["tags"]["reply_to"], data=2
            )
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
            responder, "reply", reply_to=(await next_pub(responder))["tags"]["reply_to"], data=1
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
        await next_pub(responder)
        await responder.aclose()
        reply = await asker.receive_json()
        assert reply["error"] == {"code": 503, "message": "fd 2 has gone without an answer"}


async def test_who_asks_and_goes_leaves_nothing_behind(autojump_clock: MockClock) -> None:
    async with served() as net:
        asker, responder = await net.open_client(), await net.open_client()
        await asker.send_json(
            {"id": 7, "rpc": {"method": "request", "data": {"to": "fd:2", "data": 1}}}
        )
        reply_to = (await next_pub(responder))["tags"]["reply_to"]
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
        asked = {peer: (await next_pub(peer))["tags"]["reply_to"] for peer in (a, b)}
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
            asked = await next_pub(peer)
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
            number = (await next_pub(peer))["tags"]["reply_to"]
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
