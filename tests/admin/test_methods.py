"""What operators may ask for, and what they are answered."""

from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from broker.admin import methods
from broker.admin.samples import FIELDS
from broker.config.settings import TopicRules
from broker.testing import Network, Peer
from tests.conftest import ADMIN_KEY, VIEW_KEY, done, log_in, rpc, told


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


# connections


# topics


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
