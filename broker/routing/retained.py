"""Retained values on their way to a new subscriber: in slices, as the peer takes them.

Rules:

1. A value is sent only if it was retained before the subscription began, and only to a subscriber
   who may have it at that moment.
2. A peer waits for its turn in one place, however many patterns it subscribes to: what is left to be sent for
   one is sent when all before it is.
"""

from collections.abc import Sequence
from functools import partial
from itertools import chain

import msgspec

from broker.core.messages import Publication
from broker.core.retained import SLICE
from broker.core.session import Subscription
from broker.core.topics import is_pattern
from broker.core.work import COMMAND, FILTER_NODE, LISTED, LOOKED
from broker.routing.recipients import Peer, Search
from broker.routing.router import DIRECT_RULES, Router


def give_retained(router: Router, subscription: Subscription, *, recovered: bool = False) -> None:
    """Send a new subscriber the last values that are retained for it, each tagged `retained`.

    Not to a queue group: its members would get old values again with each that joins. Without an offset,
    because it is no news that a position may follow. A subscriber that has `recovered` has all that the
    history kept, and gets only values that it did not keep.
    """
    if subscription.group:
        return
    slices = router.retained.slices(subscription.name)
    subscriber = subscription.subscriber
    router.meter.add(_weigh_looks(router, subscription.name))
    if not isinstance(subscriber, Peer):
        for found in slices:
            _give(router, subscription, found, recovered=recovered)
        return
    # Most have one slice, or none; it stands right behind the reply.
    _give(router, subscription, next(slices, ()), recovered=recovered)
    second = next(slices, None)
    if second is not None:
        rest = chain((second,), slices)
        if subscriber.add_search(Search(subscription, rest, recovered)):
            subscriber.start_soon(partial(_give_rest, router, subscriber))


def weigh_retained(router: Router, name: str) -> float:
    """The work of what a new subscriber to this name is given at once, at most."""
    if not is_pattern(name):
        return COMMAND + (LISTED if router.retained.get(name) is not None else 0.0)
    return COMMAND + _weigh_looks(router, name) + min(len(router.retained), SLICE) * LISTED


def _weigh_looks(router: Router, name: str) -> float:
    """The work of the search for one slice."""
    return min(len(router.retained), SLICE) * LOOKED if is_pattern(name) else 0.0


async def _give_rest(router: Router, peer: Peer) -> None:
    """Send the other slices of all that this peer has subscribed to, each in its turn, and no faster than the
    peer takes them."""
    while (search := peer.next_search()) is not None:
        for found in search.slices:
            await peer.outbox.wait_below(router.settings.config.outbox_bytes // 2)
            await router.turns.wait(weigh_retained(router, search.subscription.name))
            if not search.is_wanted:
                break
            router.meter.add(_weigh_looks(router, search.subscription.name))
            _give(router, search.subscription, found, recovered=search.recovered)


def _give(
    router: Router, subscription: Subscription, values: Sequence[Publication], *, recovered: bool
) -> None:
    """Send those of the retained values that this subscriber wants and may have now."""
    name, wanted = subscription.name, subscription.wanted
    asked = 0 if wanted is None else wanted.nodes * sum([bool(value.tags) for value in values])
    router.meter.add(COMMAND + len(values) * LISTED + asked * FILTER_NODE)
    for value in values:
        if not subscription.wants(value.tags) or (recovered and value.offset):
            continue
        rules = router.rights.book.find(value.topic)
        if value.topic != name and (
            rules is None or not router.rights.receives(rules, value.topic, subscription)
        ):
            continue
        tags = {**(value.tags or {}), "retained": "true"}
        shown = msgspec.structs.replace(value, offset=0, tags=tags)
        subscription.subscriber.take(name, (shown,), DIRECT_RULES.slow_consumer)
