"""What operators may ask for, and what they are answered."""

from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from broker import Config
from broker.admin import methods
from broker.admin.nurseries import MOST as TREE_MOST
from broker.admin.samples import FIELDS, KEPT
from broker.config.settings import TopicRules
from broker.testing import Network, Peer
from tests.conftest import ADMIN_KEY, VIEW_KEY, done, log_in, rpc, told


@pytest.fixture
def config() -> Config:
    return Config(admin_key=ADMIN_KEY, admin_view_key=VIEW_KEY, name="here")


@pytest.fixture
async def people(net: Network, autojump_clock: object) -> list[Peer]:
    """Three, of whom the first two listen to the news."""
    found = [await net.open_client(name="js", version=f"5.{number}") for number in range(3)]
    for peer in found[:2]:
        await peer.request(subscribe={"channel": "news"})
    return found


async def test_the_table_in_the_module_lists_every_method(
    net: Network, autojump_clock: object
) -> None:
    text = methods.__doc__ or ""
    for name, method in net.node.services.admin.items():
        star = " *" if method.role == "full" else ""
        assert f"\n{name}{star} " in text, name


@pytest.mark.parametrize(
    "params", [{"more": 1}, {"fd": "7"}, {"limit": 101}, {"search": "x" * 300}]
)
async def test_parameters_that_are_wrong_are_refused(
    params: dict[str, Any], net: Network, autojump_clock: object
) -> None:
    peer = await log_in(net)
    for name in net.node.services.admin:
        if name not in ("admin.connection", "admin.tree", "admin.kick") or "fd" not in params:
            assert (await rpc(peer, name, **params))["error"]["code"] == 107, name


async def test_an_overview_has_the_node_and_the_samples_so_far(
    net: Network, autojump_clock: object
) -> None:
    await trio.sleep(5.5)
    peer = await log_in(net)
    shown = await done(peer, "admin.overview")
    assert shown["node"] == "here"
    assert tuple(shown["samples"]["fields"]) == FIELDS
    assert len(shown["samples"]["rows"]) == 5
    assert shown["places"] > 0


async def test_a_tick_a_second_has_the_figures_of_then(
    net: Network, people: list[Peer], autojump_clock: object
) -> None:
    peer = await log_in(net)
    await people[0].request(publish={"channel": "news", "data": {"a": 1}})
    tick = dict(zip(FIELDS, (await told(peer))["tick"], strict=True))
    assert tick["connections"] == 4
    assert tick["published"] == 1
    assert tick["delivered"] == 2
    assert tick["messages_in"] >= 5
    assert tick["subscriptions"] == 2
    later = dict(zip(FIELDS, (await told(peer))["tick"], strict=True))
    assert later["time"] - tick["time"] == pytest.approx(1, abs=0.01)
    assert later["published"] == 1


async def test_samples_are_kept_for_a_quarter_of_an_hour(
    net: Network, autojump_clock: object
) -> None:
    await trio.sleep(2 * KEPT)
    peer = await log_in(net)
    assert len((await done(peer, "admin.overview"))["samples"]["rows"]) == KEPT


async def test_without_a_dashboard_no_samples_are_kept(
    net: Network, autojump_clock: object
) -> None:
    await trio.sleep(5)
    net.broker.reload(Config())
    await trio.sleep(5)
    net.broker.reload(Config(admin_key=ADMIN_KEY))
    peer = await log_in(net)
    assert len((await done(peer, "admin.overview"))["samples"]["rows"]) <= 1


# connections

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


# topics


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


# acts


async def test_acts_do_what_they_say(
    net: Network, people: list[Peer], autojump_clock: object
) -> None:
    peer = await log_in(net)
    assert await done(peer, "admin.push", fd=1, data={"hello": [1, None]}) == {"status": "queued"}
    push = (await people[0].receive_json())["push"]
    assert push == {"message": {"data": {"hello": [1, None]}}}
    report = await done(peer, "admin.publish", topic="news", data="x", retain=True)
    assert (report["matched"], report["offset"]) == (2, 1)
    assert (await net.broker.history("news"))[0][0].value == "x"
    await done(peer, "admin.publish", topic="news", data=None, skip_history=True)
    assert len((await net.broker.history("news"))[0]) == 1
    await done(peer, "admin.unsubscribe", fd=2, topic="news")
    assert net.broker.topics() == {"news": 1}
    await done(peer, "admin.kick", fd=3)
    assert (await people[2].receive_close())[0] == 3503


MISTAKES: list[tuple[str, dict[str, Any], int]] = [
    ("admin.kick", {"fd": 99}, 102),
    ("admin.kick", {"fd": 1, "code": 1005}, 107),
    ("admin.kick", {"fd": 1, "reason": "x" * 200}, 107),
    ("admin.kick", {}, 107),
    ("admin.push", {"fd": 99, "data": 1}, 102),
    ("admin.push", {"fd": 1}, 107),
    ("admin.unsubscribe", {"fd": 1, "topic": "other"}, 102),
    ("admin.unsubscribe", {"fd": 99, "topic": "news"}, 102),
    ("admin.publish", {"topic": "news"}, 107),
    ("admin.publish", {"topic": "news.*", "data": 1}, 107),
    ("admin.publish", {"topic": "fd:99", "data": 1}, 102),
    ("admin.trace", {}, 107),
    ("admin.trace", {"fd": 1, "user": "ann"}, 107),
    ("admin.trace", {"fd": 99}, 102),
    ("admin.tree", {"fd": 99}, 102),
    ("admin.nothing", {}, 104),
]


@pytest.mark.parametrize(("method", "params", "code"), MISTAKES)
async def test_a_mistake_is_answered_and_changes_nothing(
    method: str,
    params: dict[str, Any],
    code: int,
    net: Network,
    people: list[Peer],
    autojump_clock: object,
) -> None:
    peer = await log_in(net)
    assert (await rpc(peer, method, **params))["error"]["code"] == code
    assert net.broker.topics() == {"news": 2}
    assert all(net.broker.is_established(each.fd) for each in people)


# traces


async def test_a_trace_is_told_until_it_is_ended(
    net: Network, people: list[Peer], autojump_clock: object
) -> None:
    peer = await log_in(net)
    trace = (await done(peer, "admin.trace", topic="news"))["trace"]
    await net.broker.publish("news", {"a": 1})

    async def next_entries() -> Any:
        while True:
            data = await told(peer)
            if "trace" in data:
                assert data["trace"] == trace
                return data["entries"]

    (entry,) = await next_entries()
    assert (entry["kind"], entry["topic"], entry["text"]) == ("published", "news", '{"a":1}')
    await done(peer, "admin.untrace")
    assert len(net.node.traces) == 0
    await net.broker.publish("news", {"a": 2})
    for _ in range(3):
        assert "tick" in await told(peer)


async def test_an_operator_has_one_trace_which_ends_with_him(
    net: Network, people: list[Peer], autojump_clock: object
) -> None:
    peer = await log_in(net)
    for fd in (1, 2, 3) * 5:
        await done(peer, "admin.trace", fd=fd)
    await wait_all_tasks_blocked()
    assert len(net.node.traces) == 1
    await peer.aclose()
    await trio.sleep(10)
    assert len(net.node.traces) == 0


async def test_the_page_learns_that_what_it_traces_has_gone(
    net: Network, people: list[Peer], autojump_clock: object
) -> None:
    peer = await log_in(net)
    await done(peer, "admin.trace", fd=1)
    await people[0].aclose()
    seen: list[Any] = []
    while not seen or not seen[-1]["ended"]:
        data = await told(peer)
        seen += [data] if "trace" in data else []
    assert "disconnected" in [entry["kind"] for each in seen for entry in each["entries"]]


async def test_a_flood_that_is_traced_is_told_in_pieces_and_counted(
    net: Network, people: list[Peer], autojump_clock: object
) -> None:
    peer = await log_in(net)
    await done(peer, "admin.trace", topic="news")
    for number in range(5000):
        net.broker.publish_nowait("news", number)
    entries: list[Any] = []
    missed = 0
    while not missed:
        data = await told(peer)
        piece = data.get("entries", [])
        assert len(piece) <= 100
        entries += piece
        missed = data.get("missed", 0)
    assert len(entries) >= 1000
    assert len(entries) + missed == 5000


# the rest


def walk(scope: Any) -> Any:
    yield scope
    for child in scope["children"]:
        yield from walk(child)


async def test_the_tree_names_the_scopes_as_the_page_on_lifetimes_does(
    net: Network, people: list[Peer], autojump_clock: object
) -> None:
    peer = await log_in(net)
    rows = list(walk(await done(peer, "admin.tree")))
    nurseries = [row["name"] for row in rows if row["kind"] == "nursery"]
    order = ["engine", "post office", "upkeep", "sessions", "intake"]
    assert [name for name in nurseries if name in order] == order
    assert "io" in nurseries
    assert {"fd 1", "fd 2", "fd 3", "heartbeat", "keeper of memory"} <= {
        row["name"] for row in rows
    }


async def test_the_tree_of_many_connections_is_as_short(
    net: Network, autojump_clock: object
) -> None:
    for _ in range(500):
        await net.open_plain()
    peer = await log_in(net)
    rows = list(walk(await done(peer, "admin.tree")))
    assert len(rows) <= TREE_MOST
    (more,) = [
        row for row in rows if row["kind"] == "tasks" and "serve_connection" in row["function"]
    ]
    shown = [row for row in rows if row["function"].endswith("serve_connection")]
    assert more["count"] + len(shown) - 1 == 501
    rows = list(walk(await done(peer, "admin.tree", fd=400)))
    assert [row["name"] for row in rows] == ["fd 400", "io"]


async def test_budgets_engine_and_config_say_what_is_so(
    net: Network, people: list[Peer], autojump_clock: object
) -> None:
    peer = await log_in(net)
    budgets = await done(peer, "admin.budgets")
    assert budgets["connections"] == 4
    assert budgets["memory"]["parts"]["subscriptions"] > 0
    assert budgets["history_bytes"] == net.node.config.history_bytes
    engine = await done(peer, "admin.engine")
    assert engine["nodes"][0]["name"] == "here"
    assert engine["kind"] == "memory"
    rows = {row["name"]: row for row in (await done(peer, "admin.config"))["rows"]}
    assert rows["name"]["value"] == "here"
    assert rows["port"]["restart"]
    assert rows["topics.history_size"]["value"] == str(TopicRules().history_size)
    assert rows["fallbacks"]["value"] == "true"
    text = str(rows)
    assert ADMIN_KEY not in text
    assert VIEW_KEY not in text
