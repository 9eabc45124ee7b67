"""The tree of tasks and scopes, as the dashboard shows it."""

from typing import Any

from broker.admin.nurseries import MOST as TREE_MOST
from broker.testing import Network, Peer
from tests.conftest import done, log_in


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
    assert "helpers" in nurseries  # the operator waits for this answer
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
    assert [row["name"] for row in rows] == ["fd 400"]
