"""Direct messages to who is behind: each publisher has a share, and whoever floods is refused."""

import json
from typing import Any

import pytest
import trio
from trio.testing import MockClock, lockstep_stream_pair

from broker import Broker, Close, Config, Connection, TopicRules
from broker.core.messages import ClientInfo, Publication
from broker.core.session import Parcel, Report
from broker.errors import Refused
from broker.routing.letters import Letters
from broker.routing.recipients import Peer
from broker.routing.requests import Requests
from broker.routing.router import Router
from broker.testing import open_test_broker
from broker.transport.outbox import Run
from tests.conftest import rpc
from tests.routing.conftest import attach, end_round, make_outbox, make_router, publish, runs

ANN, EVE = ClientInfo("101", "ann"), ClientInfo("102", "eve")
ANN_ELSEWHERE = ClientInfo("103", "ann")
STRANGER, ANOTHER = ClientInfo("104", ""), ClientInfo("105", "")

BLOCK = b'"' + b"x" * 99_900 + b'"'
"""A tenth of what an outbox of these tests holds, in one message."""


def make_victim(router: Router, blocks: int = 6, user: str = "") -> Peer:
    """A peer in whose outbox so many blocks wait, of this program."""
    victim = attach(router, user=user)
    for _ in range(blocks):
        victim.outbox.offer(Run((BLOCK,)))
    return victim


def send(router: Router, to: str, info: ClientInfo | None, data: bytes = BLOCK) -> int:
    """Publish and end the run; the error code, 0 for none."""
    try:
        publish(router, to, data, info)
    except Refused as refusal:
        return refusal.code
    finally:
        end_round(router)
    return 0


def accepted(router: Router, to: str, info: ClientInfo | None, most: int = 10) -> int:
    """How many blocks of a publisher are taken in a row, until one is refused with 111."""
    for count in range(most):
        code = send(router, to, info)
        if code:
            assert code == 111
            return count
    return most


def publication_of(topic: str, info: ClientInfo) -> Publication:
    return Publication(topic, b"1", info)


async def test_a_publisher_has_a_quarter_of_the_outbox_of_who_is_behind() -> None:
    router = make_router()
    victim = make_victim(router)
    # The last of them began when less than a quarter was taken.
    assert accepted(router, f"fd:{victim.fd}", EVE) == 3
    assert victim.outbox.messages == 9


async def test_others_have_shares_of_their_own_and_all_together_a_half() -> None:
    router = make_router()
    victim = make_victim(router)
    to = f"fd:{victim.fd}"
    assert accepted(router, to, EVE) == 3
    assert accepted(router, to, ANN) == 3
    # Nothing is left of the half.
    for other in (STRANGER, ANOTHER, ANN_ELSEWHERE):
        assert send(router, to, other, b"1") == 111


async def test_a_user_is_one_publisher_and_strangers_are_several() -> None:
    router = make_router()
    to = f"fd:{make_victim(router).fd}"
    assert accepted(router, to, ANN) == 3
    assert send(router, to, ANN_ELSEWHERE, b"1") == 111
    to = f"fd:{make_victim(router).fd}"
    assert accepted(router, to, STRANGER) == 3
    assert send(router, to, ANOTHER, b"1") == 0


async def test_small_messages_count_by_their_number() -> None:
    router = make_router()
    victim = attach(router)
    to = f"fd:{victim.fd}"
    victim.outbox.offer(Run([b"x"] * 501))  # of 1,000
    taken = 0
    while not send(router, to, EVE, b"1"):
        taken += 1
    assert taken == 251


async def test_who_takes_what_comes_has_no_shares() -> None:
    router = make_router()
    victim = attach(router)
    to = f"fd:{victim.fd}"
    for _ in range(5):
        assert send(router, to, EVE) == 0
        assert send(router, to, EVE) == 0
        victim.outbox.discard()
    assert len(victim.letters) == 0


async def test_this_program_has_no_share() -> None:
    router = make_router()
    victim = make_victim(router)
    assert accepted(router, f"fd:{victim.fd}", None, most=4) == 4
    assert len(victim.letters) == 0


async def test_what_is_out_or_dropped_counts_no_longer() -> None:
    router = make_router()
    victim = make_victim(router)
    to = f"fd:{victim.fd}"
    for _ in range(2):
        assert accepted(router, to, EVE) == 3
        assert len(victim.letters) == 1
        victim.outbox.discard()
        assert len(victim.letters) == 0
        for _ in range(6):
            victim.outbox.offer(Run((BLOCK,)))
    assert accepted(router, to, EVE) == 3
    victim.outbox.abandon()
    assert len(victim.letters) == 0


async def test_publishers_in_one_run_are_told_apart() -> None:
    router = make_router()
    victim = make_victim(router)
    for number, info in enumerate((ANN, EVE, ANN, None)):
        publish(router, f"fd:{victim.fd}", b"%d" % number, info)
    end_round(router)
    assert runs(victim)[6:] == [[0], [1], [2], [3]]
    assert len(victim.letters) == 2


async def test_other_ways_to_send_a_direct_message_have_the_same_share() -> None:
    router = make_router()
    victim = make_victim(router)
    to = f"fd:{victim.fd}"
    asker = attach(router, user="eve")
    assert accepted(router, to, asker.info) == 3
    parcel = Parcel(to, "close", [(publication_of(to, asker.info),)], report=Report())
    with pytest.raises(Refused) as caught:
        router.publish_parcel(parcel, keep=False, retain=False)
    assert caught.value.code == 111
    requests = Requests(router)
    with pytest.raises(Refused) as caught:
        requests.ask(to, b"1", asker, print)
    assert caught.value.code == 111
    assert len(requests) == 0
    assert requests.ask(to, b"1", None, print) == 1
    # A request counts as well.
    victim.outbox.discard()
    for _ in range(6):
        victim.outbox.offer(Run((BLOCK,)))
    requests.ask(to, BLOCK, asker, print)
    assert accepted(router, to, asker.info) == 2


async def test_of_several_connections_of_a_user_only_the_one_that_is_behind_misses_it() -> None:
    router = make_router()
    slow, quick = make_victim(router, user="vic"), attach(router, user="vic")
    for number in range(5):
        assert send(router, "user:vic", EVE) == 0
        assert quick.outbox.messages == 1, number
        quick.outbox.discard()
    assert slow.outbox.messages == 9
    report = Report()
    parcel = Parcel("user:vic", "close", [(publication_of("user:vic", EVE),)], report=report)
    router.publish_parcel(parcel, keep=False, retain=False)
    assert (report.matched, report.queued, report.failed) == (2, 1, [])
    parcel.exclude = frozenset({slow.fd})
    parcel.report = report = Report()
    router.publish_parcel(parcel, keep=False, retain=False)
    assert (report.matched, report.queued) == (1, 1)


async def test_letters_know_nobody_who_has_nothing_there() -> None:
    letters = Letters(make_outbox(make_router().office))
    run = letters.write((b"x" * 10,), "fd:1", EVE)
    other = letters.write((b"x" * 10,), "fd:1", STRANGER)
    assert (run.messages, len(letters)) == (1, 2)
    del run
    assert len(letters) == 1
    del other
    assert len(letters) == 0


async def test_a_flooded_reader_stays_and_the_flooder_is_told(autojump_clock: MockClock) -> None:
    broker, closes = Broker(Config(topics=TopicRules(history_size=0))), list[Close]()

    @broker.on_close
    async def note(connection: Connection, close: Close) -> None:
        closes.append(close)

    async with open_test_broker(broker) as net:
        victim = await net.open_client(lockstep_stream_pair)
        flooder, other = await net.open_client(), await net.open_client()
        to, text = f"fd:{victim.fd}", "x" * 60_000
        codes = []
        for number in range(100):
            message = {"channel": to, "data": [number, text]}
            reply = await flooder.request(publish=message)
            codes.append(reply.get("error", {}).get("code", 0))
            if number % 20 == 19:
                await trio.sleep(0.1)
        assert set(codes) == {0, 111}
        assert codes.index(111) > 2
        assert net.outbox(victim.fd).bytes < broker.config.outbox_bytes
        # Somebody else still gets through, in any way.
        assert "publish" in await other.request(publish={"channel": to, "data": "hello"})
        request = {"to": to, "data": "?", "seconds": 1}
        assert (await rpc(other, "request", **request))["error"]["code"] == 504
        assert (await rpc(flooder, "request", **request))["error"]["code"] == 111
        came: list[Any] = []
        while "?" not in came:
            push = json.loads(await victim.receive_text())
            came.append(push["push"]["pub"]["data"])
        taken = [number for number, code in enumerate(codes) if not code]
        assert [each[0] for each in came if isinstance(each, list)] == taken
        assert came[-2:] == ["hello", "?"]
        assert "publish" in await flooder.request(publish={"channel": to, "data": 1})
        assert closes == []
