"""What a topic keeps and who is there, in as much as one reply may hold."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.config.settings import Config, TopicRules
from broker.core.messages import PUBLICATION_BYTES, Position, Publication
from broker.core.work import LISTED, MEMBER
from broker.errors import Refused
from broker.routing.reading import (
    first_bytes,
    history_page,
    listed_bytes,
    listing_work,
    presence_counts,
    presence_page,
    weigh_history,
    weigh_recovery,
)
from broker.routing.router import Router
from tests.routing.conftest import attach, listen, make_router, publish, subscription


def pubs(*sizes: int) -> list[Publication]:
    return [Publication("t", b"x" * size, offset=n) for n, size in enumerate(sizes, 1)]


@given(st.lists(st.integers(0, 5000), max_size=20), st.integers(1, 20_000))
def test_as_many_as_fit_are_listed_and_one_at_least(sizes: list[int], most: int) -> None:
    publications = pubs(*sizes)
    found = first_bytes(publications, most)
    assert found == publications[: len(found)]
    assert len(found) == min(1, len(sizes)) or listed_bytes(found) <= most
    if len(found) < len(publications):
        assert listed_bytes(publications[: len(found) + 1]) > most


def test_a_small_publication_costs_more_than_its_data() -> None:
    assert listed_bytes(pubs(1, 2)) == 3 + 2 * PUBLICATION_BYTES
    assert listing_work(pubs(0, 0)) == 2 * LISTED
    assert listing_work(pubs(10_000)) > 5 * LISTED


def filled(count: int, size: int = 10, **fields: Any) -> Router:
    """A router whose topic `t` keeps so many publications of so many bytes."""
    router = make_router(Config(topics=TopicRules(history_size=10_000), **fields))
    for _ in range(count):
        publish(router, "t", b"1" * size)
    return router


@pytest.mark.parametrize("limit, listed", [(-1, 5), (7, 5), (5, 5), (3, 3), (0, 0)])
async def test_a_page_of_history_has_history_max_limit_at_most(limit: int, listed: int) -> None:
    router = filled(8, history_max_limit=5)
    found, top = history_page(router, "t", None, limit, reverse=False)
    assert [each.offset for each in found] == list(range(1, listed + 1))
    assert top.offset == 8


@pytest.mark.parametrize("reverse", [False, True])
async def test_a_page_of_history_has_history_reply_bytes_at_most(reverse: bool) -> None:
    router = filled(8, 1000, history_reply_bytes=4000)
    found, top = history_page(router, "t", None, -1, reverse)
    offsets = [each.offset for each in found]
    assert offsets == ([8, 7, 6] if reverse else [1, 2, 3])
    following, _ = history_page(router, "t", Position(offsets[-1], top.epoch), -1, reverse)
    assert [each.offset for each in following] == ([5, 4, 3] if reverse else [4, 5, 6])


@pytest.mark.parametrize("limit", [-1, 0, 2, 100])
@pytest.mark.parametrize("since", [None, 0, 5, 8, 99])
@pytest.mark.parametrize("reverse", [False, True])
async def test_what_a_page_weighs_is_what_listing_it_takes(
    limit: int, since: int | None, reverse: bool
) -> None:
    router = filled(8, 1000, history_max_limit=6, history_reply_bytes=5500)
    _, top = router.engine.history("t", None, 0, False)
    position = None if since is None else Position(since, top.epoch)
    found, _ = history_page(router, "t", position, limit, reverse)
    assert weigh_history(router, "t", since, limit, reverse) == listing_work(found)


async def test_to_weigh_asks_for_nothing() -> None:
    router = filled(0)
    assert weigh_history(router, "none", None, -1, False) == 0
    assert weigh_recovery(router, "none", 0) == 0
    assert router.engine.statistics().history.quiet_topics == 0


async def test_a_recovery_weighs_what_it_brings_or_nothing() -> None:
    router = filled(8, 1000, history_reply_bytes=5 * 1000 + 5 * PUBLICATION_BYTES)
    assert weigh_recovery(router, "t", 8) == 0
    assert weigh_recovery(router, "t", 6) == listing_work(pubs(1000, 1000))
    assert weigh_recovery(router, "t", 3) == listing_work(pubs(*[1000] * 5))
    assert weigh_recovery(router, "t", 2) == 0


async def test_a_presence_has_presence_max_clients_at_most() -> None:
    router = make_router(Config(presence_max_clients=3))
    for _ in range(3):
        listen(router, "t")
    before = router.meter.done
    assert len(presence_page(router, "t")) == 3
    assert router.meter.done - before >= 3 * MEMBER
    listen(router, "t")
    before = router.meter.done
    with pytest.raises(Refused, match="more than 3 clients: ask for presence_stats") as caught:
        presence_page(router, "t")
    assert caught.value.code == 106
    assert router.meter.done == before, "to refuse costs nothing"
    assert presence_counts(router, "t") == (4, 1)


async def test_a_presence_shows_history_reply_bytes_of_info_at_most() -> None:
    router = make_router(Config(history_reply_bytes=1000))
    for _ in range(2):
        peer = attach(router)
        peer.conn_info = b"1" * 400
        router.subscribe(subscription(peer, "t"))
    assert len(presence_page(router, "t")) == 2
    peer = attach(router)
    peer.conn_info = b"1" * 201
    router.subscribe(subscription(peer, "t"))
    with pytest.raises(Refused, match="more than 1000 bytes of info") as caught:
        presence_page(router, "t")
    assert caught.value.code == 106


async def test_users_are_counted_once() -> None:
    router = make_router()
    for user in ("a", "a", "b", ""):
        listen(router, "t", user=user)
    assert presence_counts(router, "t") == (4, 3)
    assert presence_counts(router, "u") == (0, 0)
