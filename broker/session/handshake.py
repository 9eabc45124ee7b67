"""Handshakes that the app decides: `on_handshake`, asked before a peer is answered.

Rules:

1. Every door asks: a peer that is refused as a WebSocket does not come in as an HTTP stream.
2. The peer waits, and no longer than `open_seconds`; what is held for it meanwhile is charged.
3. Facts may change while the app is asked: the caller looks at them again afterwards.
"""

from typing import Any, Final

import attrs
import trio

from broker.core.memory import Part
from broker.core.messages import Transport
from broker.errors import Disconnect, ErrorCode, HeadError, Refused
from broker.hooks import EndsProcess, HandshakeReply, check_headers
from broker.session.memory import hold_request
from broker.session.profile import SUBPROTOCOLS, Asked
from broker.session.services import Services
from broker.transport.head import Head

_STATUSES: Final = {
    ErrorCode.INTERNAL: 500,
    ErrorCode.UNAUTHORIZED: 401,
    ErrorCode.BAD_REQUEST: 400,
    ErrorCode.TOKEN_EXPIRED: 401,
    ErrorCode.EXPIRED: 401,
    ErrorCode.TOO_MANY_REQUESTS: 429,
}
"""HTTP statuses of errors that are the protocol's; 403 of all others."""


class RefusedByApp(HeadError):
    """The app's hook does not let a peer in."""


@attrs.frozen
class Welcome:
    """The app's answer to a handshake, and the dict that it keeps with the connection."""

    reply: HandshakeReply = attrs.field(factory=HandshakeReply)
    data: dict[str, Any] = attrs.field(factory=dict)


UNASKED: Final = Welcome()
"""For where there is no hook: all is as the broker has it."""


async def ask_app(
    services: Services, head: Head, address: str, transport: Transport, held: int = 0
) -> Welcome:
    """Ask the app whether a peer may come in; `held` bytes are kept for it besides its head.

    Raises `HeadError` if not, 500 if the hook fails, and 503 if it has no answer in time or memory is
    short. Cancelled, so is the hook.
    """
    hook = services.hooks.handshake
    if hook is None:
        return UNASKED
    asked = Asked(head, address, transport)
    seconds = services.config.open_seconds
    reply: HandshakeReply | None = None
    short = trio.CancelScope()
    with trio.move_on_after(seconds) as waiting, short:
        with hold_request(services, address, head, short.cancel) as holding:
            held += len(head.raw)
            if reason := holding.refusal(held):
                raise HeadError(503, reason)
            holding.charge(Part.INCOMING, held)
            try:
                reply = await hook(asked)
            except Refused as refusal:
                raise _answer_of(services, refusal) from None
            except EndsProcess:
                raise HeadError(503, "shutting down") from None
            except Disconnect as order:
                raise RefusedByApp(403, order.reason or "refused") from None
            except Exception:
                services.log.exception("hook_failed", hook="handshake", peer=address)
                raise HeadError(500, "internal error") from None
    if short.cancelled_caught:
        raise HeadError(503, "memory is short")
    if waiting.cancelled_caught:
        services.log.error("hook_failed", hook="handshake", peer=address, reason="too slow")
        raise HeadError(503, "the server is busy")
    reply = reply or HandshakeReply()
    is_chosen = transport == "websocket" and reply.subprotocol
    if is_chosen and reply.subprotocol not in head.subprotocols:
        detail = f"subprotocol {reply.subprotocol!r} is not one that the peer offers"
        services.log.error("hook_failed", hook="handshake", peer=address, reason=detail)
        raise HeadError(500, "internal error")
    return Welcome(reply, asked.data)


def _answer_of(services: Services, refusal: Refused) -> HeadError:
    status = refusal.code
    if not 300 <= status <= 599:
        status = _STATUSES.get(status, 403)  # type: ignore[call-overload]
    try:
        check_headers("Refused", refusal.headers)
    except (TypeError, ValueError) as error:
        services.log.error("hook_failed", hook="handshake", reason=str(error))
        return HeadError(500, "internal error")
    message = refusal.message.encode(errors="replace").decode()
    return RefusedByApp(status, message, refusal.headers.items())


def choose_subprotocol(head: Head, reply: HandshakeReply) -> str | None:
    """The subprotocol that is agreed on: the app's choice, else the peer's first that we know."""
    if reply.subprotocol is not None:
        return reply.subprotocol or None
    return next((each for each in head.subprotocols if each in SUBPROTOCOLS), None)
