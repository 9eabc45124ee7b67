"""How a subscription begins, whoever asked for it: the client, or the server on its behalf.

Rule: one atomic step. Whatever is published before it is in the result, if the client recovers;
whatever is published after it comes behind the result.
"""

import attrs
from msgspec import Raw

from broker.core.messages import Position
from broker.core.session import Session, Subscription
from broker.core.tags import check_filter, matches
from broker.core.topics import is_pattern
from broker.errors import ErrorCode, Refused
from broker.protocols.codec import Codec
from broker.protocols.commands import SubscribeRequest
from broker.routing.router import Router

REJECT_UNRECOVERED = 2
"""Subscribe flag: answer 112 instead of `recovered: false`. Flag 1 offers to take numbers in place
of topic names, which we have no use for: pushes name their topic."""


@attrs.frozen
class Opened:
    """A subscription that has begun, and what its client is told: to be sent before `settle`."""

    subscription: Subscription
    result: dict[str, object]

    def settle(self, router: Router) -> None:
        """What comes behind the reply or push: the values that are retained, then who joined."""
        router.give_retained(self.subscription, recovered=bool(self.result.get("recovered")))
        router.announce(self.subscription)


def open_subscription(
    router: Router,
    session: Session,
    codec: Codec | None,
    request: SubscribeRequest,
    *,
    info: bytes | None = None,
    data: bytes | None = None,
    group: str = "",
    server_side: bool = False,
    join_leave: bool = False,
) -> Opened:
    """Subscribe `session` to `request.channel`, which it may and is not yet.

    `info` is what others see of it on this topic, `data` goes to the client, both raw JSON. Without
    a `codec` the peer is told nothing, and the result is empty. `server_side` subscriptions are
    recoverable wherever there is a history. Raises `Refused`, with nothing changed: 112 for an
    unrecoverable position where the client asked for that, 107 for a tags filter that makes no
    sense, 108 for another kind of subscription than a stream.
    """
    if request.type:
        text = f"type {request.type}: only streams are served, no maps and no shared polls"
        raise Refused(ErrorCode.NOT_AVAILABLE, text)
    name = request.channel
    wanted = request.tf
    if wanted is not None:
        try:
            check_filter(wanted)
        except ValueError as error:
            raise Refused(ErrorCode.BAD_REQUEST, str(error)) from None
    rules = router.rules_for(name)
    asks = request.recoverable or request.positioned or request.recover or server_side
    asks = asks or rules.force_recovery or rules.force_positioning
    join_leave = join_leave or request.join_leave or rules.force_push_join_leave
    # A member that recovered would be given what others of its group have had.
    has_history = rules.history_size > 0 and not is_pattern(name) and not group
    recoverable = asks and has_history and codec is not None
    result: dict[str, object] = {}
    if recoverable:
        assert codec is not None
        if request.recover:
            position = Position(request.offset, request.epoch)
            missed, recovered, top = router.engine.recover(name, position)
            if not recovered and request.flag & REJECT_UNRECOVERED:
                raise Refused(ErrorCode.UNRECOVERABLE_POSITION)
            if wanted is not None:
                missed = [each for each in missed if matches(wanted, each.tags or {})]
            result |= {"was_recovering": True, "recovered": recovered}
        else:
            missed, top = [], router.engine.position(name)
        result |= {"recoverable": True, "positioned": True, **codec.stream(missed, top)}
    if data is not None:
        result["data"] = Raw(data)
    subscription = Subscription(
        session,
        name,
        session.info if info is None else attrs.evolve(session.info, chan_info=info),
        join_leave=join_leave and codec is not None,
        recoverable=recoverable,
        group=group,
        server_side=server_side,
        wanted=wanted,
    )
    router.subscribe(subscription)
    return Opened(subscription, result)
