"""How a subscription begins, whoever asked for it: the client, or the server on its behalf.

Rules:

1. All that can be refused is refused by `plan_subscription`; to begin what was planned refuses only
   a position that cannot be recovered, where the client asked for that.
2. To begin is one atomic step. Publications before it are in the result, if the client recovers;
   those after it come behind the result.
3. A topic that looks like a pattern is one; a line in the log says which pattern may have been meant.
4. A successful recovery is answered with the position that was asked for: clients keep the position
   of the reply before they hand out what it brings, each of which moves it on.
"""

from typing import Final

import attrs
import structlog
from msgspec import Raw

from broker.core.messages import Position, Publication
from broker.core.names import DIRECT, PERSONAL
from broker.core.session import Grant, Subscription, subscription_bytes
from broker.core.tags import CompiledFilter, weigh_filter
from broker.core.topics import is_pattern, mistaken_for_pattern
from broker.core.work import FILTER_NODE, PATTERN, SUBSCRIPTION
from broker.errors import ErrorCode, Refused
from broker.protocols.codec import Codec
from broker.protocols.commands import SubscribeRequest
from broker.routing.reading import listed_bytes, listing_work, weigh_recovery
from broker.routing.recipients import Peer
from broker.routing.retained import give_retained, weigh_retained
from broker.routing.router import Router

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("broker")

REJECT_UNRECOVERED: Final = 2
"""Subscribe flag: answer 112 instead of `recovered: false`. Flag 1 offers to take numbers in place
of topic names, which we have no use for: pushes name their topic."""


def check_subscribable(router: Router, peer: Peer, name: str) -> None:
    """Raise `Refused` for a name that this peer cannot subscribe to, whoever wants it: 105 where it
    is subscribed, 106 for one too many, and as `Rights.check_listenable` does."""
    if name in peer.subscriptions or name in _own_names(router, peer):
        raise Refused(ErrorCode.ALREADY_SUBSCRIBED)
    router.rights.check_listenable(name)
    limit = router.settings.config.max_topics
    if len(peer.subscriptions) >= limit:
        raise Refused(ErrorCode.LIMIT_EXCEEDED, f"more than {limit} subscriptions")


def _own_names(router: Router, peer: Peer) -> list[str]:
    """The names that stand for this connection itself."""
    if not router.settings.config.direct_topics:
        return []
    return [f"{DIRECT}{peer.fd}", *([f"{PERSONAL}{peer.user}"] if peer.user else ())]


def weigh_subscribing(router: Router, request: SubscribeRequest) -> float:
    """The work of a subscription that a client asks for: filed, its filter compiled, what it has missed and what
    is retained for it listed, those who watch told."""
    name = request.channel
    work = SUBSCRIPTION + router.watchers.weigh(name) + weigh_retained(router, name)
    if is_pattern(name):
        work += PATTERN
    if request.tf is not None:
        work += weigh_filter(request.tf)
    if request.recover:
        work += weigh_recovery(router, name, request.offset)
    return work


@attrs.frozen
class Opened:
    """A subscription that has begun, and what its client is told: to be sent before `settle`."""

    subscription: Subscription
    result: dict[str, object]
    size: int = 0
    """Bytes of the publications that it brings."""

    def settle(self, router: Router) -> None:
        """Give the publications behind the reply or push: the values that are retained, then the join."""
        give_retained(router, self.subscription, recovered=bool(self.result.get("recovered")))
        router.watchers.joined(self.subscription)


@attrs.frozen
class Plan:
    """A subscription that may begin, as long as nothing is waited for."""

    router: Router
    peer: Peer
    request: SubscribeRequest
    grant: Grant
    codec: Codec | None
    group: str
    server_side: bool
    join_leave: bool
    recoverable: bool
    wanted: CompiledFilter | None

    def begin(self, room: int | None = None) -> Opened:
        """Subscribe the peer. `room` is for what is left of `history_reply_bytes` in a reply to more than
        this. Raises `Refused` (112), with nothing changed, for an unrecoverable position where the
        client asked for that."""
        result: dict[str, object] = {}
        size = 0
        if self.codec and self.recoverable:
            result, size = self._recover(self.codec, room)
        if self.grant.data is not None:
            result["data"] = Raw(self.grant.data)
        subscription = Subscription(
            self.peer,
            self.grant.name,
            self.grant,
            join_leave=self.join_leave,
            recoverable=self.recoverable,
            group=self.group,
            server_side=self.server_side,
            wanted=self.wanted,
        )
        self.router.subscribe(subscription)
        # No error, as it is a topic like others: official clients may well have such names.
        if hint := mistaken_for_pattern(self.grant.name):
            log.info("no_pattern", fd=self.peer.fd, topic=self.grant.name, detail=hint)
        return Opened(subscription, result, size)

    def _recover(self, codec: Codec, room: int | None) -> tuple[dict[str, object], int]:
        engine, request, name = self.router.engine, self.request, self.grant.name
        result: dict[str, object] = {"recoverable": True, "positioned": True}
        missed: list[Publication] = []
        size = 0
        since = since_of(request)
        if since is not None:
            view = engine.view(name, since)
            missed, recovered, position = view.missed, view.recovered, view.top
            size = listed_bytes(missed)
            most = self.router.settings.config.history_reply_bytes
            # One of any size goes in a reply of its own.
            if size > (most if room is None else room) and (len(missed) > 1 or room is not None):
                # Never in part; and all of it would be more than one reply may hold.
                missed, recovered, size = [], False, 0
            if recovered:
                self.router.recoveries.recovered += 1
            else:
                self.router.recoveries.gap += 1
            self.router.meter.add(listing_work(missed))
            if not recovered and request.flag & REJECT_UNRECOVERED:
                raise Refused(ErrorCode.UNRECOVERABLE_POSITION)
            result |= {"was_recovering": True, "recovered": recovered}
            if recovered:
                position = Position(request.offset, position.epoch)
            wanted = self.wanted
            if wanted is not None:
                asked = [each for each in missed if each.tags]
                self.router.meter.add(len(asked) * wanted.nodes * FILTER_NODE)
                missed = [each for each in missed if wanted.matches(each.tags)]
        else:
            position = engine.position(name)
        return {**result, **codec.stream(missed, position)}, size


def since_of(request: SubscribeRequest) -> Position | None:
    """The position that a client comes back with; None for one that does not recover."""
    return Position(request.offset, request.epoch) if request.recover else None


def is_recoverable(
    router: Router, name: str, request: SubscribeRequest, group: str, *, server_side: bool = False
) -> bool:
    """Whether a subscription would be one that recovers what it has missed: if it is asked for, and there
    is a history. Raises `Refused` (102)."""
    rules = router.rights.rules_of(name)
    asks = request.recoverable or request.positioned or request.recover or server_side
    asks = asks or rules.force_recovery or rules.force_positioning
    # A member that recovered would be given what others of its group have had.
    return asks and rules.history_size > 0 and not is_pattern(name) and not group


def plan_subscription(
    router: Router,
    peer: Peer,
    codec: Codec | None,
    request: SubscribeRequest,
    grant: Grant,
    *,
    group: str = "",
    server_side: bool = False,
    join_leave: bool = False,
) -> Plan:
    """Check all of a subscription to `grant.name`, which the peer is not subscribed to yet.

    Without a `codec` the peer is told nothing, and the result is empty. `server_side` subscriptions
    are recoverable wherever there is a history. Raises `Refused`: 107 for a tags filter that makes
    no sense, 108 for another kind of subscription than a stream.
    """
    if request.type:
        text = f"type {request.type}: only streams are served, no maps and no shared polls"
        raise Refused(ErrorCode.NOT_AVAILABLE, text)
    name = grant.name
    wanted = _compiled(router, peer, request)
    _check_room(router, peer, name, grant, wanted)
    rules = router.rights.rules_of(name)
    join_leave = join_leave or request.join_leave or rules.force_push_join_leave
    recoverable = is_recoverable(router, name, request, group, server_side=server_side)
    return Plan(
        router,
        peer,
        request,
        grant,
        codec,
        group,
        server_side,
        join_leave=join_leave and codec is not None,
        recoverable=recoverable and codec is not None,
        wanted=wanted,
    )


def _compiled(router: Router, peer: Peer, request: SubscribeRequest) -> CompiledFilter | None:
    """The filter of a request. Raises `Refused`: 107 for one that makes no sense, 106 where all
    filters of this connection together would have too many nodes."""
    if request.tf is None:
        return None
    try:
        wanted = CompiledFilter(request.tf)
    except ValueError as error:
        raise Refused(ErrorCode.BAD_REQUEST, str(error)) from None
    router.meter.add(weigh_filter(request.tf))
    limit = router.settings.config.max_filter_nodes
    if peer.filter_nodes + wanted.nodes > limit:
        raise Refused(ErrorCode.LIMIT_EXCEEDED, f"filters with more than {limit} nodes together")
    return wanted


def _check_room(
    router: Router, peer: Peer, name: str, grant: Grant, wanted: CompiledFilter | None
) -> None:
    """Raise `Refused` (106) where all subscriptions of this connection would take too much memory."""
    limit = router.settings.config.max_subscription_bytes
    size = subscription_bytes(name, grant, wanted)
    if peer.subscription_bytes + size > limit:
        text = f"subscriptions that take more than {limit} bytes together"
        raise Refused(ErrorCode.LIMIT_EXCEEDED, text)
    if reason := peer.holding.refusal(size):
        raise Refused(ErrorCode.LIMIT_EXCEEDED, reason)
