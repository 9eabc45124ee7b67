"""Retained values on their way: in slices, and for one peer by one task."""

from typing import Any

import trio

from broker.core.messages import Publication
from broker.core.retained import SLICE
from broker.core.session import Subscription
from broker.core.work import LOOKED
from broker.routing.recipients import Peer
from broker.routing.retained import give_retained
from broker.routing.router import Router
from broker.transport.tasks import Work
from tests.routing.conftest import attach, make_router, subscription


def with_values(count: int) -> Router:
    router = make_router()
    for number in range(count):
        router.retained.take([Publication(f"r.{number}", b"1", None)])
    return router


def begin(router: Router, peer: Peer, name: str) -> Subscription:
    begun = subscription(peer, name)
    router.subscribe(begun)
    give_retained(router, begun)
    return begun


def waiting(peer: Peer) -> list[Any]:
    return [run for run in peer.outbox.mail if run.messages]


async def test_one_task_sends_what_is_left_for_all_patterns_of_a_peer() -> None:
    """However many it subscribes to, it waits for its turns in one place."""
    router = with_values(5 * SLICE)
    peer, tasks = attach(router), list[Work]()
    peer.start_soon = lambda work, *_: tasks.append(work)
    for name in ("r.*", "r.>", "*.>"):
        begin(router, peer, name)
    assert len(tasks) == 1
    await tasks.pop()()
    assert len(waiting(peer)) == 3 * 5 * SLICE
    # And the next one when that is done.
    begin(router, peer, "*.*")
    assert len(tasks) == 1


async def test_what_is_left_for_subscriptions_that_have_ended_is_not_kept() -> None:
    """A peer may come and go, and take nothing meanwhile."""
    router = with_values(2 * SLICE + 2)
    peer, tasks = attach(router), list[Work]()
    peer.start_soon = lambda work, *_: tasks.append(work)
    for number in range(20):
        name = f"r.{'>' if number % 2 else '*'}"
        begin(router, peer, name)
        router.unsubscribe(peer, name)
    assert peer.searches_waiting < 5
    sent = len(waiting(peer))
    await tasks.pop()()
    assert len(waiting(peer)) == sent
    assert peer.searches_waiting == 0


async def test_values_that_are_looked_at_are_charged_whether_they_match_or_not() -> None:
    router = with_values(SLICE)
    peer = attach(router)
    before = router.meter.done
    begin(router, peer, "r.*.none")
    assert waiting(peer) == []
    assert router.meter.done - before > SLICE * LOOKED
    await trio.lowlevel.checkpoint()
