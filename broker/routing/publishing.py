"""Publications that ask for more than to be sent: who is left out, tags, a report of what became of it.

Each is a run of its own: it is fanned out at once, behind all that was published before. What asks
for nothing of this takes `Router.publish`, where a thousand publications share one fan-out.
"""

from collections.abc import Collection, Mapping
from typing import Any

import trio

from broker.core.messages import ClientInfo, Delivery, Fd, Publication
from broker.errors import ErrorCode, Refused
from broker.routing.queue_groups import Outlet
from broker.routing.router import DIRECT, IN_PROCESS, PERSONAL, Router
from broker.transport.outbox import Run


def publish_apart(
    router: Router,
    topic: str,
    data: bytes,
    info: ClientInfo | None = None,
    *,
    tags: Mapping[str, str] | None = None,
    opaque: bool = False,
    exclude: Collection[Fd] = (),
    skip_history: bool = False,
    retain: bool = False,
) -> Delivery:
    """Publish raw JSON, or `opaque` bytes, and say what became of it; one atomic step, linear in
    those who listen.

    The fds of `exclude` get nothing. With `skip_history` the publication is not kept, so who is
    away now misses it. `retain` makes it the topic's last value, whatever its rules. Raises
    `Refused` as `Router.publish` does.
    """
    # A client may list as many as a message holds, and each subscriber is looked up among them.
    exclude = frozenset(exclude)
    if retain and topic.startswith((DIRECT, PERSONAL)):
        raise Refused(ErrorCode.BAD_REQUEST, f"{topic} retains nothing: it is no topic")
    router.flush()
    rules, parts = router.resolve(topic)
    publication = Publication(topic, data, info, tags=tags, opaque=opaque)
    position = None
    if rules.history_size and not skip_history:
        (publication,) = router.engine.publish(topic, (publication,), rules, trio.current_time())
        position = router.engine.position(topic)
    router.published += 1
    if retain or rules.retain:
        router.retained.take((publication,))
    # All recipients are told apart before the first gets anything: who is cut for being too slow
    # leaves the very maps that are walked here.
    rounds = [
        (
            part,
            [(outbox, who) for outbox, who in part.outboxes.items() if _fd(who) not in exclude]
            if exclude
            else list(part.outboxes.items()),
        )
        for part in parts
    ]
    matched = queued = 0
    failed: list[Fd] = []
    for part, recipients in rounds:
        encoded = part.codec.publication(part.name, publication)
        if encoded is None:  # not what these want, by its tags
            continue
        if part.codec is IN_PROCESS:
            takers = [outbox for outbox, _ in recipients]
            for outlet in [taker for taker in takers if isinstance(taker, Outlet)]:
                outlet.exclude = exclude
                if not outlet.wants(tags):
                    takers.remove(outlet)
            matched += len(takers)
            queued += sum([taker.take((encoded,)) == 1 for taker in takers])
            continue
        matched += len(recipients)
        run = Run((encoded,), topic, rules.slow_consumer)
        router.office.deliver(run, [outbox for outbox, _ in recipients])
        gone = [_fd(who) for outbox, who in recipients if outbox.sealed]
        queued += len(recipients) - len(gone)
        failed += gone
    return Delivery(matched, queued, matched - queued, tuple(failed), position)


def _fd(who: Any) -> Fd:
    """The fd behind a subscription or a session; 0 for a subscriber in this very program."""
    who = getattr(who, "subscriber", who)
    return getattr(who, "fd", 0)
