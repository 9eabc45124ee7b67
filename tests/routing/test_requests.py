"""Requests between clients: each ends in one answer, and nobody waits in vain."""

import json
import math
import sys
from math import inf

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from broker import (
    Refused,
)
from broker.core.lazy_heap import SWEPT
from broker.core.session import Decider
from broker.core.work import ANSWERED
from broker.protocols.plain import PLAIN
from broker.routing.reader import Reader
from broker.routing.recipients import Peer
from broker.routing.requests import MAX_ASKED, Requests
from tests.conftest import done, next_pub, received, rpc, served, subscribe
from tests.routing.conftest import attach, listen, make_router, runs, subscription


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


async def test_a_client_that_asks_and_goes_leaves_nothing_behind(autojump_clock: MockClock) -> None:
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


async def test_an_answered_request_waits_for_no_end_of_its_time(autojump_clock: MockClock) -> None:
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
        assert len(requests) == 1
        assert requests.deadlines < 100
        assert answers == [b"2"] * 1000
        await trio.sleep(7)
        (late,) = answers[1000:]
        assert isinstance(late, Refused)
        assert late.code == 504
        assert len(requests) == requests.deadlines == 0


# by itself


class Asker:
    """The answers that a request got: one, or it still waits."""

    def __init__(self) -> None:
        self.answers: list[bytes | Refused] = []

    def __call__(self, answer: bytes | Refused) -> None:
        self.answers.append(answer)

    def outcome(self) -> bytes | int | None:
        """The answer, the code of the refusal, or None as long as it waits."""
        assert len(self.answers) < 2, "it was answered twice"
        for answer in self.answers:
            return answer.code if isinstance(answer, Refused) else answer
        return None


def make_requests() -> tuple[Requests, Peer, Peer]:
    """Requests, and two clients."""
    router = make_router()
    return Requests(router), attach(router, user="ann"), attach(router)


async def test_the_one_who_is_asked_gets_a_publication_tagged_with_its_number() -> None:
    requests, asker, responder = make_requests()
    asked = Asker()
    assert requests.ask("fd:2", b"[1]", asker, asked) == 1
    (run,) = responder.outbox.mail
    push = json.loads(run.frames[0][2:])["push"]
    assert push["channel"] == "fd:2"
    assert push["pub"]["tags"] == {"reply_to": "1"}
    assert push["pub"]["data"] == [1]
    assert push["pub"]["info"]["user"] == "ann"
    assert run.messages == 1
    assert asked.outcome() is None
    requests.reply(2, 1, b"2")
    assert asked.outcome() == b"2"
    assert len(requests) == 0


async def test_a_request_ends_once_whatever_happens_afterwards() -> None:
    requests, asker, responder = make_requests()
    asked = Asker()
    number = requests.ask("fd:2", b"1", asker, asked, due=5)
    requests.reply(responder.fd, number, b"2")
    requests.forget(number)
    requests.leave(responder.fd)
    requests.leave(asker.fd)
    requests.expire(100)
    with pytest.raises(Refused, match="107"):
        requests.reply(responder.fd, number, b"3")
    assert asked.outcome() == b"2"


@pytest.mark.parametrize("by", [1, 3, 0])
async def test_nobody_else_answers(by: int) -> None:
    requests, asker, _ = make_requests()
    asked = Asker()
    number = requests.ask("fd:2", b"1", asker, asked)
    with pytest.raises(Refused, match=f"107: no request {number} waits for an answer of this"):
        requests.reply(by, number, b"2")
    assert asked.outcome() is None
    assert len(requests) == 1


async def test_requests_end_when_their_time_is_over_in_any_order() -> None:
    requests, asker, _ = make_requests()
    asked = {due: Asker() for due in (3.0, 1.0, inf, 2.0)}
    for due, each in asked.items():
        requests.ask("fd:2", b"1", asker, each, due=due)
    requests.expire(0.9)
    assert [each.outcome() for each in asked.values()] == [None] * 4
    requests.expire(2)
    assert [each.outcome() for each in asked.values()] == [None, 504, None, 504]
    requests.expire(10**9)
    assert [each.outcome() for each in asked.values()] == [504, 504, None, 504]
    assert len(requests) == 1


async def test_a_connection_that_goes_answers_no_more_and_waits_no_more() -> None:
    requests, one, two = make_requests()
    there, back, own = Asker(), Asker(), Asker()
    requests.ask("fd:2", b"1", one, there)
    requests.ask("fd:1", b"1", two, back)
    requests.ask("fd:1", b"1", None, own)
    requests.leave(two.fd)
    assert (there.outcome(), back.outcome(), own.outcome()) == (503, None, None)
    assert len(requests) == 1
    requests.leave(one.fd)
    assert (back.outcome(), own.outcome()) == (None, 503)  # nobody is there to be told
    assert len(requests) == 0
    requests.leave(99)


async def test_an_asker_has_a_bound_and_this_program_has_none() -> None:
    requests, asker, responder = make_requests()
    for _ in range(MAX_ASKED):
        requests.ask("fd:2", b"1", asker, Asker())
    with pytest.raises(Refused, match=f"106: more than {MAX_ASKED} requests wait for an answer"):
        requests.ask("fd:2", b"1", asker, Asker())
    requests.ask("fd:1", b"1", responder, Asker())  # who is asked may ask
    for _ in range(MAX_ASKED + 1):
        requests.ask("fd:2", b"1", None, Asker())
    requests.reply(responder.fd, 1, b"2")
    requests.ask("fd:2", b"1", asker, Asker())


@pytest.mark.parametrize(
    "to, code",
    [
        ("fd:1", 107),  # itself
        ("fd:9", 503),
        ("fd:x", 102),
        ("fd:3", 503),  # has not spoken yet
        ("fd:4", 503),  # plain, so it knows no answers
        ("", 107),
        ("a.*", 107),
        ("alone", 503),  # nobody is in a group there
        ("empty", 503),
        ("inside", 503),  # a reader in this program has no fd to answer from
        ("mine", 503),  # nobody asks itself
    ],
)
async def test_a_request_to_nobody_who_can_answer_fails_at_once(to: str, code: int) -> None:
    requests, asker, other = make_requests()
    router = requests.router
    attach(router, None)
    attach(router, PLAIN)
    router.subscribe(subscription(other, "alone"))
    router.subscribe(subscription(asker, "mine", group="g"))
    router.subscribe(subscription(Reader(1), "inside", by=Decider.PROGRAM, group="g"))
    asked = Asker()
    with pytest.raises(Refused) as refused:
        requests.ask(to, b"1", asker, asked)
    assert refused.value.code == code
    assert (len(requests), asked.outcome()) == (0, None)


async def test_a_client_that_takes_nothing_is_not_waited_for() -> None:
    requests, asker, responder = make_requests()
    responder.outbox.seal()
    with pytest.raises(Refused, match="503: fd 2 takes no more"):
        requests.ask("fd:2", b"1", asker, Asker())
    assert len(requests) == 0


async def test_requests_to_a_group_go_around_its_members_that_may_hear_it() -> None:
    requests, asker, _ = make_requests()
    router = requests.router
    ann = listen(router, "a#ann", user="ann", group="g")
    by_pattern = [listen(router, ">", user=user, group="h") for user in ("ann", "eve")]
    for _ in range(3):
        requests.ask("a#ann", b"1", asker, Asker())
    assert len(runs(ann)) == 3
    requests.leave(ann.fd)
    router.leave(ann)
    for _ in range(3):
        requests.ask("a#ann", b"1", asker, Asker())
    assert [len(runs(peer)) for peer in by_pattern] == [3, 0]


async def test_requests_that_end_together_end_a_few_at_a_time() -> None:
    """A hundred thousand may wait for one client, and end when it goes or when their time is over."""
    router = make_router()
    requests, responder = Requests(router), attach(router)
    ends: list[object] = []
    for _ in range(30):
        asker = attach(router)
        requests.ask(f"fd:{responder.fd}", b"1", asker, ends.append, due=5.0)
    assert requests.expire(6.0, 10 * ANSWERED)
    assert (len(ends), len(requests)) == (10, 20)
    requests.leave(responder.fd, 10 * ANSWERED)
    assert (len(ends), len(requests)) == (20, 10)
    assert requests.has(responder.fd)
    requests.leave(responder.fd)
    assert (len(ends), len(requests)) == (30, 0)
    assert not requests.has(responder.fd)
    assert not requests.expire(6.0, 10 * ANSWERED)
    assert len(ends) == 30


async def test_deadlines_of_answered_requests_are_swept_away_a_few_at_a_time() -> None:
    router = make_router()
    requests, responder = Requests(router), attach(router)
    numbers = [
        requests.ask(f"fd:{responder.fd}", b"1", None, lambda result: None, due=5.0)
        for _ in range(1000)
    ]
    for number in numbers:
        before = requests.deadlines
        requests.reply(responder.fd, number, b"1")
        assert before - requests.deadlines <= SWEPT
        assert requests.deadlines <= 3 * len(requests) + 100
    assert requests.deadlines < 100


async def test_to_ask_costs_the_same_however_many_wait_for_the_asker() -> None:
    router = make_router()
    requests, asker, other = Requests(router), attach(router), attach(router)

    def steps() -> int:
        """How many calls, and resumptions of generators, it takes to ask."""
        count = 0

        def note(*_: object) -> None:
            nonlocal count
            count += 1

        sys.setprofile(note)
        try:
            requests.ask(f"fd:{other.fd}", b"1", asker, lambda result: None)
        finally:
            sys.setprofile(None)
        return count

    before = steps()
    for _ in range(200):
        requests.ask(f"fd:{asker.fd}", b"1", None, lambda result: None)
    assert steps() < before + 10
