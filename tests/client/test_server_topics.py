"""Topics that the server has subscribed a client to: what is recovered, and what is told as lost."""

from typing import Any

from trio.testing import MockClock, wait_all_tasks_blocked

from broker.client import Client
from broker.client.subscription import INBOX_MESSAGES, RECOVER_BYTES
from broker.client.testing import KEPT, FakeBroker, FakePeer, pub
from broker.core.messages import Position


def kept(offset: int, **more: object) -> dict[str, Any]:
    return {**KEPT, "offset": offset, **more}


async def offsets(client: Client, count: int) -> list[int]:
    return [(await anext(client.messages)).offset for _ in range(count)]


async def again(fake: FakeBroker, peer: FakePeer, **reply: object) -> tuple[FakePeer, Any]:
    """Cut the line; the next connection, and what its connect command asks to recover."""
    await peer.drop()
    peer = await fake.accept()
    fake.fds += 1
    connect = await peer.answer("connect", client=str(fake.fds), **reply)
    await wait_all_tasks_blocked()
    return peer, connect.get("subs")


async def test_it_is_asked_for_from_where_it_has_arrived(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    subs = {"news": kept(3), "fd:1": {}, "user:a": {}}
    async with fake.client(subs=subs) as (client, peer):
        assert client.messages.positions == {"news": Position(3, "e")}
        await peer.publish(4, 5)
        assert await offsets(client, 1) == [4]
        assert client.messages.positions == {"news": Position(4, "e")}
        missed = kept(7, recovered=True, publications=[pub(5), pub(6), pub(7)])
        peer, asked = await again(fake, peer, subs={"news": missed})
        assert asked == {"news": {"recover": True, "offset": 5, "epoch": "e"}}
        await peer.publish(7, 8)
        assert await offsets(client, 4) == [5, 6, 7, 8], "each once"
        assert client.messages.gaps == {}
        assert client.messages.positions == {"news": Position(8, "e")}


async def test_what_cannot_be_recovered_is_a_gap_where_it_is(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client(subs={"news": kept(3), "other": {}}) as (client, peer):
        await peer.publish(4)
        new = kept(1, epoch="new", recovered=True)
        peer, _ = await again(fake, peer, subs={"news": new, "other": {}})
        await peer.publish(2)
        await wait_all_tasks_blocked()
        assert await offsets(client, 1) == [4]
        assert client.messages.gaps == {}, "the gap is behind it"
        assert await offsets(client, 1) == [2]
        assert client.messages.gaps == {"news": 1, "other": 1}
        assert client.messages.positions == {"news": Position(2, "new")}


async def test_an_answer_that_nothing_was_missed_is_no_gap(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client(subs={"news": kept(3)}) as (client, peer):
        await again(fake, peer, subs={"news": kept(3)})
        assert client.messages.gaps == {}


async def test_a_topic_that_the_server_gives_later_begins_there_and_may_come_back_so(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client() as (client, peer):
        await peer.send({"push": {"channel": "news", "subscribe": kept(3)}})
        await peer.publish(4)
        assert await offsets(client, 1) == [4]
        peer, asked = await again(fake, peer)
        assert asked == {"news": {"recover": True, "offset": 4, "epoch": "e"}}
        for _ in range(2):  # said twice, it is the same
            await peer.send({"push": {"channel": "news", "subscribe": kept(6)}})
        await peer.publish(7)
        assert await offsets(client, 1) == [7]
        assert client.messages.gaps == {"news": 1}


async def test_a_topic_that_ended_is_forgotten(fake: FakeBroker, autojump_clock: MockClock) -> None:
    async with fake.client(subs={"news": kept(3), "other": kept(1)}) as (client, peer):
        await peer.send({"push": {"channel": "news", "unsubscribe": {"code": 2000}}})
        await wait_all_tasks_blocked()
        assert client.messages.positions == {"other": Position(1, "e")}
        peer, asked = await again(fake, peer)
        assert list(asked) == ["other"]
        peer, _ = await again(fake, peer)
        peer, asked = await again(fake, peer)
        assert asked is None, "it was not given back for a whole connection"
        assert client.messages.positions == {}


async def test_until_somebody_iterates_the_newest_are_kept_with_where_they_are(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client(subs={"news": kept(0)}) as (client, peer):
        await peer.publish(1)
        peer, _ = await again(fake, peer, subs={"news": kept(5)})
        await peer.publish(*range(6, 6 + INBOX_MESSAGES))
        await wait_all_tasks_blocked()
        assert client.messages.dropped >= 1
        assert client.messages.gaps == {"news": 1}, "the mark had to make room as well"
        assert client.messages.positions == {"news": Position(5, "e")}


async def test_many_publications_and_topics_are_taken_up_within_bounds(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    names = [f"{number:05}" + "n" * 90 for number in range(9_000)]
    async with fake.client(subs={name: kept(1) for name in names}) as (client, peer):
        missed = kept(101, recovered=True, publications=[pub(each) for each in range(2, 102)])
        peer, asked = await again(fake, peer, subs={names[0]: missed, names[-1]: kept(9)})
        assert RECOVER_BYTES / 400 < len(asked) < RECOVER_BYTES / 195
        assert await offsets(client, 100) == [*range(2, 102)]
        assert client.messages.gaps == {names[-1]: 1}, "it was not asked for"


async def test_a_reply_that_is_too_large_is_not_asked_for_again(
    fake: FakeBroker, autojump_clock: MockClock
) -> None:
    async with fake.client(subs={"news": kept(3)}) as (client, peer):
        await peer.drop()
        peer = await fake.accept()
        command = await peer.expect("connect")
        assert command["connect"]["subs"]
        publications: list[object] = [{}] * 500_001
        await peer.send(
            {"id": command["id"], "connect": {"subs": {"news": {"publications": publications}}}}
        )
        peer = await fake.accept()
        fake.fds += 1
        connect = await peer.answer("connect", client="2", subs={"news": kept(9)})
        await wait_all_tasks_blocked()
        assert "subs" not in connect
        assert client.messages.gaps == {"news": 1}
