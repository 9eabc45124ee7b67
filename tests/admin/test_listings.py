"""The lists of the dashboard: connections, ended ones, topics and their subscribers, page by page."""

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from broker.testing import Network, Peer
from tests.conftest import done, log_in, rpc

SEARCHES = [
    ("", {1, 2, 3, 4}),
    ("2", {2}),
    ("fd:2", {2}),
    ("fd:02", set()),
    ("topic:news", {1, 2}),
    ("news", {1, 2}),
    ("new", set()),
    ("topic:new", set()),
    ("user:an", {3}),
    ("ANN", {3}),
    ("user: ann ", {3}),
    ("client:js 5.1", {2}),
    ("JS", {1, 2, 3}),
    ("address:mem", {1, 2, 3, 4}),
    ("address:10.", set()),
    ("nobody", set()),
    ("colon:in it", set()),
]


@pytest.mark.parametrize(("search", "fds"), SEARCHES)
async def test_connections_are_found_by_what_is_known_of_them(
    search: str, fds: set[int], net: Network, people: list[Peer], autojump_clock: object
) -> None:
    net.broker.bind(3, "Ann:the first")
    peer = await log_in(net)
    page = await done(peer, "admin.connections", search=search)
    assert {row["fd"] for row in page["rows"]} == fds
    assert page["all"] == 4


async def test_connections_come_a_page_at_a_time_and_each_once(
    net: Network, autojump_clock: object
) -> None:
    for _ in range(250):
        await net.open_plain()
    peer = await log_in(net)
    seen: list[int] = []
    after = 0
    for size in (100, 100, 51):
        page = await done(peer, "admin.connections", after=after)
        assert len(page["rows"]) == size
        seen += [row["fd"] for row in page["rows"]]
        after = page["next"]
    assert after == 0
    assert seen == list(range(1, 252))


async def test_connections_come_in_the_order_that_is_asked_for(
    net: Network, people: list[Peer], autojump_clock: object
) -> None:
    await people[2].request(subscribe={"channel": "a"})
    await people[2].request(subscribe={"channel": "b"})
    for fd, size in ((1, 2000), (2, 5000)):
        net.broker.push(fd, "x" * size)
    await wait_all_tasks_blocked()
    peer = await log_in(net)

    async def first(order: str) -> int:
        page = await done(peer, "admin.connections", order=order, limit=1)
        assert page["next"] == 0
        return int(page["rows"][0]["fd"])

    assert await first("topics") == 3
    assert await first("sent") == 2
    await people[2].request(publish={"channel": "c", "data": "x" * 5000})
    assert await first("received") == 3


async def test_a_connection_is_shown_with_all_its_topics_and_after_its_end_with_the_truth(
    net: Network, people: list[Peer], autojump_clock: object
) -> None:
    peer = await log_in(net)
    shown = (await done(peer, "admin.connection", fd=1))["here"]
    assert (shown["topics"], shown["topic_count"], shown["operator"]) == (["news"], 1, False)
    assert shown["app_name"] == "js"
    assert (await done(peer, "admin.connection", fd=peer.fd))["here"]["operator"] is True
    await done(peer, "admin.kick", fd=1, code=3011, reason="make room")
    await people[0].receive_close()
    await people[0].aclose()
    await trio.sleep(10)
    closed = (await done(peer, "admin.connection", fd=1))["closed"]
    assert closed["close"]["code"] == 3011
    assert closed["close"]["reason"] == "make room"
    assert closed["close"]["initiator"] == "server"
    assert closed["topics"] == ["news"]
    page = await done(peer, "admin.closed")
    assert [row["fd"] for row in page["rows"]] == [1]
    assert (await rpc(peer, "admin.connection", fd=999))["error"]["code"] == 102


async def test_ended_connections_come_a_page_at_a_time_the_last_first(
    net: Network, autojump_clock: object
) -> None:
    for _ in range(150):
        async with await net.open_plain():
            pass
        await trio.sleep(0.1)
    peer = await log_in(net)
    page = await done(peer, "admin.closed")
    assert [row["fd"] for row in page["rows"]] == list(range(150, 50, -1))
    page = await done(peer, "admin.closed", before=page["next"])
    assert [row["fd"] for row in page["rows"]] == list(range(50, 0, -1))
    assert page["next"] is None
    page = await done(peer, "admin.closed", search="77")
    assert [row["fd"] for row in page["rows"]] == [77]


async def test_topics_are_listed_by_how_many_listen(
    net: Network, people: list[Peer], autojump_clock: object
) -> None:
    await people[0].request(subscribe={"channel": "new.*"})
    peer = await log_in(net)
    page = await done(peer, "admin.topics", search="NEW")
    assert [(row["name"], row["subscribers"]) for row in page["rows"]] == [
        ("news", 2),
        ("new.*", 1),
    ]
    assert page["rows"][1]["pattern"] is True
    assert (await done(peer, "admin.topics", search="x"))["rows"] == []


async def test_a_hundred_topics_are_listed_and_the_others_counted(
    net: Network, autojump_clock: object
) -> None:
    client = await net.open_client()
    for number in range(250):
        net.broker.add_subscription(client.fd, f"topic.{number}")
    peer = await log_in(net)
    page = await done(peer, "admin.topics")
    assert (len(page["rows"]), page["found"]) == (100, 250)


async def test_a_topic_shows_who_listens_and_what_it_keeps(
    net: Network, people: list[Peer], autojump_clock: object
) -> None:
    for number in range(60):
        await net.broker.publish("news", {"number": number}, tags={"kind": "test"})
    await net.broker.publish("news", "x" * 10_000, retain=True)
    peer = await log_in(net)
    shown = await done(peer, "admin.topic", topic="news")
    assert [row["fd"] for row in shown["rows"]] == [1, 2]
    assert shown["offset"] == 61
    assert [each["offset"] for each in shown["history"]] == list(range(61, 11, -1))
    assert shown["history"][1]["text"] == '{"number":59}'
    assert shown["history"][1]["tags"] == {"kind": "test"}
    assert shown["retained"]["cut"] is True
    assert len(shown["retained"]["text"]) == 4096
    assert shown["rules"]["history_size"] == 100
    assert (await done(peer, "admin.topic", topic="news", after=1))["rows"][0]["fd"] == 2
    assert (await done(peer, "admin.topic", topic="news.*"))["pattern"] is True
    for name in ("", "fd:1", "user:ann", "a b\n", "x" * 300):
        assert "error" in await rpc(peer, "admin.topic", topic=name), name


async def test_subscribers_come_a_page_at_a_time(net: Network, autojump_clock: object) -> None:
    for _ in range(150):
        client = await net.open_plain()
        net.broker.add_subscription(client.fd, "news")
    peer = await log_in(net)
    shown = await done(peer, "admin.topic", topic="news")
    assert (len(shown["rows"]), shown["subscribers"], shown["next"]) == (100, 150, 100)
    shown = await done(peer, "admin.topic", topic="news", after=100)
    assert (len(shown["rows"]), shown["next"]) == (50, 0)
