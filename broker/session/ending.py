"""The end of one connection: how it came about, the goodbye, and who is told."""

import attrs
import trio

from broker.core.event_queue import EventKind
from broker.core.messages import Close, Fd, Initiator
from broker.errors import CloseCode, Disconnect
from broker.hooks import Connection
from broker.session.services import Services
from broker.transport.lane import Lane
from broker.transport.outbox import Outbox


def end_by(services: Services, fd: Fd, error: Exception, hook: str = "message") -> None:
    """Close a connection because of what a hook of its has raised: an order, or by mistake, which is
    logged. Never waits."""
    connection = services.connections.get(fd)
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
    with trio.move_on_after(seconds) as answering:
        await outbox.wait_empty()
        # The queue may have taken its time, at the pace of a slow but living peer.
        answering.deadline = trio.current_time() + seconds
        await lane.wait_ended()
        # Where the peer began, the answer to its Close was queued only now.
        await outbox.wait_empty()


async def tell_closed(services: Services, connection: Connection, close: Close) -> None:
    """Tell the log, the readers of events and the app's hook, once, that a connection has ended.

    The app counts on being told, also when everything around here is being cancelled: the hook is
    shielded, and has `close_seconds`.
    """
    fd, user = connection.fd, connection.user
    fields = {**attrs.asdict(close), "initiator": close.initiator.value}
    services.emit(EventKind.DISCONNECTED, fd, user, **fields)
    services.log.info("close", fd=fd, **fields)
    hook = services.hooks.close
    if hook is None:
        return
    grace = trio.current_time() + services.config.close_seconds
    with trio.CancelScope(shield=True, deadline=grace):
        try:
            await hook(connection, close)
        except Exception:
            services.log.exception("hook_failed", hook="close", fd=fd)
