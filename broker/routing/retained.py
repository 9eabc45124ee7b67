"""Retained values on their way to a new subscriber: in slices, as the peer takes them.

Rule: a value is sent only if it was retained before the subscription began, and only to a subscriber
who may have it at that moment.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain

import msgspec

from broker.core.messages import Publication
from broker.core.session import Subscription
from broker.core.work import COMMAND, FILTER_NODE, LISTED
from broker.routing.recipients import Peer
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
    if not isinstance(subscriber, Peer):
        for found in slices:
            _give(router, subscription, found, recovered=recovered)
        return
    # Most have one slice, or none; it stands right behind the reply.
    _give(router, subscription, next(slices, ()), recovered=recovered)
    second = next(slices, None)
    if second is not None:
        rest = chain((second,), slices)
        subscriber.start_soon(
            partial(_give_rest, router, subscription, subscriber, rest, recovered)
        )


async def _give_rest(
    router: Router,
    subscription: Subscription,
    peer: Peer,
    slices: Iterator[Sequence[Publication]],
    recovered: bool,
) -> None:
    """Send the other slices, each in its turn, and no faster than the peer takes them."""
    for found in slices:
        await peer.outbox.wait_below(router.settings.config.outbox_bytes // 2)
        await router.turns.wait()
        if peer.subscriptions.get(subscription.name) is not subscription:
            return
        _give(router, subscription, found, recovered=recovered)


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
