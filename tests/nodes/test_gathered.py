"""The dashboard of one node shows all of them, and reaches them all."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from broker.admin import listings
from broker.testing import Bus, BusNode, Peer
from tests.conftest import ADMIN_KEY, VIEW_KEY, done, log_in, rpc, told
from tests.nodes.conftest import came, node, settle

KEYS = {"admin_key": ADMIN_KEY, "admin_view_key": VIEW_KEY}


@pytest.fixture
async def one(autojump_clock: MockClock, bus: Bus) -> AsyncGenerator[BusNode, None]:
    async with node(bus, "one", **KEYS) as opened:
        yield opened


@pytest.fixture
async def two(autojump_clock: MockClock, bus: Bus, one: BusNode) -> AsyncGenerator[BusNode, None]:
    async with node(bus, "two", **KEYS) as opened:
        yield opened


@pytest.fixture
async def desk(one: BusNode, two: BusNode) -> Peer:
    return await log_in(one)


def where(page: Any) -> dict[int, str]:
    return {row["fd"]: row["node"] for row in page["rows"]}


async def test_connections_of_all_nodes_come_a_page_at_a_time_and_each_once(
    autojump_clock: MockClock, one: BusNode, two: BusNode, desk: Peer
) -> None:
    peers = [(await net.open_plain(), net.node.name) for net in (one, two, two, one, two)]
    expected = {desk.fd: "one"} | {peer.fd: name for peer, name in peers}
    for limit in range(1, 8):
        seen: dict[int, str] = {}
        after = 0
        while True:
            page = await done(desk, "admin.connections", after=after, limit=limit)
            assert page["missing"] == []
            assert page["all"] == 6
            assert not seen.keys() & where(page).keys()
            seen |= where(page)
            after = page["next"]
            if not after:
                break
        assert seen == expected
        assert list(seen) == sorted(seen)
    ids = {each["name"]: each["id"] for each in (await done(desk, "admin.ticks"))["nodes"]}
    page = await done(desk, "admin.connections", node=ids["two"])
    assert where(page) == {fd: name for fd, name in expected.items() if name == "two"}
    assert (await rpc(desk, "admin.connections", node="nobody"))["error"]["code"] == 102


async def test_a_page_has_as_many_rows_as_fit_and_the_next_has_the_others(
    autojump_clock: MockClock,
    one: BusNode,
    two: BusNode,
    desk: Peer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for _ in range(3):
        for net in (one, two):
            await net.open_plain()
    monkeypatch.setattr(listings, "PAGE_BYTES", 2000)
    seen: list[int] = []
    pages = 0
    page: dict[str, Any] = {"next": 0}
    while not pages or page["next"]:
        page = await done(desk, "admin.connections", after=page["next"])
        seen += where(page)
        pages += 1
    assert (len(seen), pages > 1) == (7, True)
    assert seen == sorted(set(seen))


async def test_the_heaviest_of_all_come_first_and_a_search_reaches_all(
    autojump_clock: MockClock, one: BusNode, two: BusNode, desk: Peer
) -> None:
    ann, bob = await one.open_client(token="ann"), await two.open_client(token="bob")
    one.broker.push(ann.fd, "x" * 20_000)
    two.broker.push(bob.fd, "x" * 50_000)
    await settle()
    page = await done(desk, "admin.connections", order="sent", limit=2)
    assert where(page) == {bob.fd: "two", ann.fd: "one"}
    assert [row["fd"] for row in page["rows"]] == [bob.fd, ann.fd]
    for search, peer, name in (("user:bob", bob, "two"), (str(ann.fd), ann, "one")):
        assert where(await done(desk, "admin.connections", search=search)) == {peer.fd: name}
    shown = await done(desk, "admin.connection", fd=bob.fd)
    assert (shown["node"], shown["here"]["user"]) == ("two", "bob")
    tree = await done(desk, "admin.tree", fd=bob.fd)
    assert tree["name"] == f"fd {bob.fd}"


async def test_acts_reach_another_node_and_leave_a_line_here(
    autojump_clock: MockClock,
    one: BusNode,
    two: BusNode,
    desk: Peer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bob = await two.open_client(token="bob")
    await bob.request(subscribe={"channel": "news"})
    assert await done(desk, "admin.push", fd=bob.fd, data={"a": 1}) == {"status": "forwarded"}
    await done(desk, "admin.unsubscribe", fd=bob.fd, topic="news")
    assert (await rpc(desk, "admin.unsubscribe", fd=bob.fd, topic="news"))["error"]["code"] == 102
    assert (await rpc(desk, "admin.kick", fd=bob.fd, code=1005))["error"]["code"] == 107
    await done(desk, "admin.kick", fd=bob.fd, reason="make room")
    assert (await rpc(desk, "admin.kick", fd=bob.fd))["error"]["code"] == 102
    pushes = await came(bob)
    assert pushes[0] == {"a": 1}
    assert "unsubscribe" in pushes[1]
    assert pushes[2]["disconnect"]["code"] == 3503
    await bob.aclose()
    await trio.sleep(10)
    shown = await done(desk, "admin.connection", fd=bob.fd)
    assert (shown["node"], shown["closed"]["close"]["reason"]) == ("two", "make room")
    page = await done(desk, "admin.closed", search="bob")
    assert where(page) == {bob.fd: "two"}
    text = capsys.readouterr().err
    assert [text.count(f"act='{act}'") for act in ("push", "unsubscribe", "kick")] == [1, 1, 1]


ACTS: dict[str, dict[str, Any]] = {"kick": {}, "unsubscribe": {"topic": "t"}, "push": {"data": 1}}


async def test_who_may_only_look_may_act_on_no_node(
    autojump_clock: MockClock, one: BusNode, two: BusNode
) -> None:
    bob = await two.open_client()
    await bob.request(subscribe={"channel": "t"})
    looker = await log_in(one, VIEW_KEY)
    assert where(await done(looker, "admin.connections"))[bob.fd] == "two"
    for act, params in ACTS.items():
        reply = await rpc(looker, f"admin.{act}", fd=bob.fd, **params)
        assert reply["error"]["code"] == 103, act
    await settle()
    assert two.broker.topics() == {"t": 1}
    assert await bob.receive_all() == []


async def test_ended_connections_of_all_nodes_come_the_last_first_and_each_once(
    autojump_clock: MockClock, one: BusNode, two: BusNode, desk: Peer
) -> None:
    ended: dict[int, str] = {}
    for net in (one, two, two, one, two):
        async with await net.open_plain() as peer:
            ended[peer.fd] = net.node.name
        await trio.sleep(1)
    for limit in (1, 2, 4, 5, 100):
        seen: dict[int, str] = {}
        before = None
        while True:
            page = await done(desk, "admin.closed", before=before, limit=limit)
            seen |= where(page)
            before = page["next"]
            if before is None:
                break
        assert list(seen.items()) == list(ended.items())[::-1], limit


async def test_topics_are_counted_over_all_nodes(
    autojump_clock: MockClock, one: BusNode, two: BusNode, desk: Peer
) -> None:
    ann, bob, eve = [await net.open_client() for net in (one, two, two)]
    for peer, topics in ((ann, ("both", "here")), (bob, ("both", "there")), (eve, ("there",))):
        for topic in topics:
            await peer.request(subscribe={"channel": topic})
    await bob.request(publish={"channel": "both", "data": 1})
    rows = {row["name"]: row for row in (await done(desk, "admin.topics"))["rows"]}
    counts = {name: (row["subscribers"], row["on"]) for name, row in rows.items()}
    assert counts == {
        "both": (2, {"one": 1, "two": 1}),
        "here": (1, {"one": 1}),
        "there": (2, {"two": 2}),
    }
    page = await done(desk, "admin.topics", limit=1)
    assert page["rows"][0]["subscribers"] == 2
    shown = await done(desk, "admin.topic", topic="both")
    assert where(shown) == {ann.fd: "one", bob.fd: "two"}
    assert (shown["subscribers"], shown["on"]) == (2, {"one": 1, "two": 1})
    assert (shown["offset"], len(shown["history"])) == (1, 1)
    for name in ("", "fd:1", "a b\n"):
        assert "error" in await rpc(desk, "admin.topic", topic=name), name


async def test_a_topic_that_is_among_the_first_of_one_node_is_counted_on_the_others(
    autojump_clock: MockClock, one: BusNode, two: BusNode, desk: Peer
) -> None:
    """With room for one: on `one` that is `a`, on `two` it is `b`, of which `one` has a subscriber too."""
    people = {
        name: [await net.open_client() for _ in range(3)]
        for name, net in (("one", one), ("two", two))
    }
    for peer in people["one"][:2]:
        await peer.request(subscribe={"channel": "a"})
    await people["one"][2].request(subscribe={"channel": "b"})
    for peer in people["two"][:2]:
        await peer.request(subscribe={"channel": "b"})
    (row,) = (await done(desk, "admin.topics", limit=1, search="b"))["rows"]
    assert (row["name"], row["on"]) == ("b", {"one": 1, "two": 2})


LISTS = ("connections", "closed", "topics", "topic")


async def test_a_node_that_does_not_answer_is_missing_by_name(
    autojump_clock: MockClock, one: BusNode, two: BusNode, desk: Peer
) -> None:
    bob = await two.open_client()
    ids = {each["name"]: each["id"] for each in (await done(desk, "admin.ticks"))["nodes"]}
    asked = [(f"admin.{name}", {"topic": "t"} if name == "topic" else {}) for name in LISTS]
    for method, params in asked:
        async with silent(two):
            page = await done(desk, method, **params)
        (missing,) = page["missing"]
        assert (missing["name"], missing["id"]) == ("two", ids["two"]), method
        assert "does not answer" in missing["reason"]
    async with silent(two):
        ticks = (await done(desk, "admin.ticks"))["nodes"]
    assert [("reason" in each, each["name"]) for each in ticks] == [(False, "one"), (True, "two")]
    acts = [(f"admin.{act}", {"fd": bob.fd, **ACTS[act]}) for act in ("unsubscribe", "kick")]
    for method, params in (*acts, ("admin.budgets", {"node": ids["two"]})):
        async with silent(two):
            assert (await rpc(desk, method, **params))["error"]["code"] == 100, method


@asynccontextmanager
async def silent(net: BusNode) -> AsyncGenerator[None]:
    """A node that is not heard of, and not for so long that it is taken for dead."""
    net.cut()
    began = trio.current_time()
    yield
    assert trio.current_time() - began == pytest.approx(2, abs=0.1), "a deadline, once"
    net.mend()
    await trio.sleep(4)


async def test_what_is_a_nodes_own_is_shown_of_the_one_that_is_chosen(
    autojump_clock: MockClock, one: BusNode, two: BusNode, desk: Peer
) -> None:
    await trio.sleep(3.5)
    peers = [await two.open_plain() for _ in range(3)]
    assert len(peers) == 3
    await trio.sleep(1)
    here, other = (await done(desk, "admin.ticks"))["nodes"]
    assert [each["name"] for each in (here, other)] == ["one", "two"]
    shown = await done(desk, "admin.overview", node=other["id"])
    place = shown["samples"]["fields"].index("connections")
    assert (shown["node"], other["tick"][place], here["tick"][place]) == ("two", 3, 1)
    assert len(shown["samples"]["rows"]) >= 4
    assert (await done(desk, "admin.budgets", node=other["id"]))["connections"] == 3
    assert (await done(desk, "admin.budgets"))["connections"] == 1
    rows = (await done(desk, "admin.config", node=other["id"]))["rows"]
    assert next(row["value"] for row in rows if row["name"] == "name") == "two"
    assert ADMIN_KEY not in str(rows)
    engine = await done(desk, "admin.engine", node=other["id"])
    assert [each["name"] for each in engine["nodes"]] == ["one", "two"]
    for chosen in (here["id"], other["id"]):
        tree = await done(desk, "admin.tree", node=chosen)
        assert "neighbours" in str(tree)


async def test_a_trace_follows_a_connection_and_a_user_on_another_node(
    autojump_clock: MockClock, one: BusNode, two: BusNode, desk: Peer
) -> None:
    bob = await two.open_client(token="bob")

    async def entries(kind: str, **target: object) -> list[Any]:
        trace = (await done(desk, "admin.trace", **target))["trace"]
        await bob.request(publish={"channel": "t", "data": 1})
        while True:
            data = await told(desk)
            if data.get("trace") == trace and any(e["kind"] == kind for e in data["entries"]):
                return [e["fd"] for e in data["entries"] if e["kind"] == kind]

    assert await entries("received", fd=bob.fd) == [bob.fd]
    assert await entries("received", user="bob") == [bob.fd]
    assert await entries("published", topic="t") == [bob.fd]
    await done(desk, "admin.trace", fd=bob.fd)
    assert (len(one.node.traces), len(two.node.traces)) == (0, 1)
    await done(desk, "admin.untrace")
    assert (len(one.node.traces), len(two.node.traces)) == (0, 0)
    await done(desk, "admin.trace", user="bob")
    assert (len(one.node.traces), len(two.node.traces)) == (1, 1)
    await desk.aclose()
    await trio.sleep(5)
    assert (len(one.node.traces), len(two.node.traces)) == (0, 0)
    watched = await log_in(two)
    looker = await log_in(one, VIEW_KEY)
    assert (await rpc(looker, "admin.trace", fd=watched.fd))["error"]["code"] == 103
