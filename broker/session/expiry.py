"""The end that a token puts to a connection or a subscription, unless it is refreshed.

Deadlines are on Trio's clock: changes of the wall clock move none.
"""

from math import inf

import trio

from broker.access.tokens import ConnectionToken, SubscriptionToken, Tokens, ttl
from broker.core.session import Session
from broker.core.work import COMMAND, LEFT, SLICE
from broker.errors import CloseCode, ErrorCode, Refused, UnsubscribeCode
from broker.session.services import ServedConnection


def expiry_fields(tokens: Tokens, expires_at: float | None) -> dict[str, object]:
    """Fields of a reply that say when something ends: at `expires_at` in Unix seconds. Empty
    for None, which is never. Raises `Refused` (110) for what has ended already.
    """
    if expires_at is None:
        return {}
    now = tokens.now()
    if expires_at <= now - tokens.rules.leeway_seconds:
        raise Refused(ErrorCode.EXPIRED)
    return {"expires": True, "ttl": ttl(expires_at, now)}


def token_fields(
    tokens: Tokens, token: ConnectionToken | SubscriptionToken | None
) -> dict[str, object]:
    """The same, of what a verified token puts an end to. Raises `Refused` as well (109), where the token itself has
    expired since it was verified: somebody may have been asked meanwhile."""
    if token is None:
        return {}
    exp = token.claims.get("exp")
    if isinstance(exp, int | float) and exp <= tokens.now() - tokens.rules.leeway_seconds:
        raise Refused(ErrorCode.TOKEN_EXPIRED)
    return expiry_fields(tokens, token.expires_at)


def deadline(tokens: Tokens, session: Session, expires_at: float | None) -> float:
    """The same instant, and the grace behind it, on Trio's clock; the session is looked at then."""
    if expires_at is None:
        return inf
    due = trio.current_time() + (expires_at - tokens.now()) + tokens.rules.grace_seconds
    session.next_expiry = min(session.next_expiry, due)
    session.look_at = min(session.look_at, due)
    return due


def expire(connection: ServedConnection, tokens: Tokens, when: float | None) -> bool:
    """Let a client's connection end at `when`, in Unix seconds, or never; at once if that is past.

    False if it is no Centrifuge client.
    """
    if connection.orders.codec is None:
        return False
    try:
        expiry_fields(tokens, when)
    except Refused:
        connection.close(CloseCode.EXPIRED, "expired")
    else:
        connection.peer.expires_at = deadline(tokens, connection.peer, when)
    return True


def end_expired(connection: ServedConnection, now: float) -> bool:
    """End what has expired and was not refreshed, as far as a slice of work goes; whether there is more. Costs
    one comparison unless something has."""
    session, orders = connection.peer, connection.orders
    if now < session.next_expiry:
        return False
    if now >= session.expires_at:
        connection.close(CloseCode.EXPIRED, "connection expired")
        return False
    meter = orders.router.meter
    until = meter.done + SLICE
    for name, subscription in list(session.subscriptions.items()):
        if now >= subscription.expires_at:
            if meter.done >= until:
                return True
            meter.add(LEFT + COMMAND)
            orders.end_subscription(name, UnsubscribeCode.EXPIRED, "subscription expired")
    ends = [subscription.expires_at for subscription in session.subscriptions.values()]
    session.next_expiry = min([session.expires_at, *ends])
    return False
