"""The end of one connection: how it came about, the goodbye, and who is told."""

from contextlib import suppress
from math import inf
from typing import Final

import trio

from broker.core.event_queue import EventFields, EventKind
from broker.core.messages import Close, Fd, Initiator
from broker.errors import CloseCode, Disconnect
from broker.hooks import Connection, EndsProcess
from broker.routing.recipients import Peer
from broker.session.services import Services
from broker.transport.lane import Lane
from broker.transport.outbox import Outbox

_TLS_GOODBYE: Final = 1.0
"""Seconds for a goodbye that needs no answer: a courtesy (RFC 8446 section 6.1)."""


def end_by(services: Services, fd: Fd, error: Exception, hook: str = "message") -> None:
    """Close a connection because of what a hook of its has raised: an order, or by mistake, which is
    logged. Never waits."""
    connection = services.connections.get(fd)
    if isinstance(error, EndsProcess):
        if connection is not None:
            connection.shut_down()
        return
    if isinstance(error, Disconnect):
        code, reason = error.code, error.reason
    else:
        services.log.error("hook_failed", hook=hook, fd=fd, exc_info=error)
        code, reason = CloseCode.INTERNAL_ERROR, "internal error"
    if connection is not None:
        connection.close(code, reason)


def how_it_ended(lane: Lane, outbox: Outbox, stall_seconds: float) -> Close:
    """The truth about a connection that nobody here has closed."""
    if lane.close_began_here and lane.close_sent is not None:
        return Close(*lane.close_sent, Initiator.SERVER)
    if lane.peer_close is not None:
        return Close(*lane.peer_close, Initiator.CLIENT)
    if outbox.stalled:
        reason = f"took nothing for {stall_seconds:g} s"
        return Close(CloseCode.ABNORMAL, reason, Initiator.SLOW)
    return Close(CloseCode.ABNORMAL, "connection lost", Initiator.NETWORK)


async def say_goodbye(lane: Lane, outbox: Outbox, seconds: float) -> None:
    """Let what is queued go out, and give the peer time to answer our Close: `seconds` each."""
    if lane.has_ended and not outbox.mail:
        return
    with trio.move_on_after(seconds) as answering:
        await outbox.wait_empty()
        # The queue may have taken its time, at the pace of a slow but living peer.
        answering.deadline = trio.current_time() + seconds
        await lane.wait_ended()
        # Where the peer began, the answer to its Close was queued only now.
        await outbox.wait_empty()


async def close_stream(
    services: Services, stream: trio.abc.Stream, *, at_once: bool = False
) -> None:
    """Close a stream for good; again, if it is closed already. A bare socket takes no waiting. TLS says
    goodbye before, for no longer than `_TLS_GOODBYE`; not `at_once`, and not if all is being cancelled."""
    if isinstance(stream, trio.SocketStream):
        stream.socket.close()
        return
    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        if at_once or trio.current_effective_deadline() == -inf:
            await trio.aclose_forcefully(stream)
        else:
            with services.last_words(_TLS_GOODBYE):
                await stream.aclose()


def note_closed(services: Services, peer: Peer, address: str, close: Close, seconds: float) -> None:
    """Tell the log and the readers of events, once, that a connection has ended, after so long."""
    fields: EventFields = {
        "code": close.code,
        "reason": close.reason,
        "initiator": close.initiator.value,
        "undelivered": close.undelivered,
    }
    services.counts.note_closed(close)
    services.emit(EventKind.DISCONNECTED, peer.fd, peer.user, **fields)
    services.log.info(
        "close",
        fd=peer.fd,
        user=peer.user,
        peer=address,
        **fields,
        seconds=round(seconds, 1),
        app_name=peer.app_name,
        app_version=peer.app_version,
    )


async def run_close_hook(services: Services, connection: Connection, close: Close) -> None:
    """Call the app's `on_close`, once for each connection, and whatever happens around here.

    The app counts on being told: the hook is shielded, and has `close_seconds`; see
    `Services.last_words`.
    """
    hook = services.hooks.close
    if hook is None:
        return
    with services.last_words(services.config.close_seconds):
        try:
            await hook(connection, close)
        except EndsProcess:
            pass  # this connection has ended already
        except Exception:
            services.log.exception("hook_failed", hook="close", fd=connection.fd)
