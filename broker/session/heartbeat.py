"""Pings to a silent peer, and the verdict on one that does not answer, or never says who it is."""

from math import inf

import trio

from broker.config.settings import Config
from broker.core.session import Phase
from broker.routing.router import Router
from broker.session.orders import Orders
from broker.transport import frames
from broker.transport.lane import Lane
from broker.transport.outbox import Outbox, Run


class Heartbeat:
    """Looked at by `beat`, about once a second while something is `due`.

    A Centrifuge client gets a ping at each interval, because it counts on that; any other peer when it has
    been silent for so long.
    """

    __slots__ = (
        "_due",
        "_lane",
        "_opened_at",
        "_orders",
        "_outbox",
        "_pinged",
        "_pinged_at",
        "_router",
        "_rtt",
    )

    def __init__(self, orders: Orders, router: Router, lane: Lane, outbox: Outbox) -> None:
        self._orders = orders
        self._router = router
        self._lane = lane
        self._outbox = outbox
        # Of the ping that is not answered yet: when, the ping, and how much had been taken by then.
        self._pinged: tuple[float, Run, int] | None = None
        self._pinged_at = inf  # when the last ping was queued, answered or not
        self._rtt: float | None = None  # of a ping before that
        self._opened_at = trio.current_time()
        self._due = self._opened_at + router.settings.config.ping_seconds

    def beat(self, now: float, *, answers_pings: bool) -> bool:
        """Ping if it is time; false if the peer has not answered in time and is to be given up.

        Silence of a peer that never `answers_pings` means nothing.
        """
        config = self._router.settings.config
        if not self._is_alive(now, config):
            return False
        if now < self._due:
            return True
        codec = self._orders.codec
        if codec is not None:
            frame = codec.ping()
        else:
            silent_until = self._lane.heard_at + config.ping_seconds
            if now < silent_until:
                self._due = silent_until
                return True
            frame = frames.encode(frames.PING, b"")
        self._due = now + config.ping_seconds
        ping = Run((frame,), messages=0)
        self._rtt, self._pinged_at = self.rtt, now
        self._router.send_run(self._orders.peer, ping)
        if self._pinged is None and answers_pings:
            self._pinged = now, ping, self._outbox.chunks
        return True

    def due(self, now: float, *, tokens_required: bool) -> float:
        """Until when nothing has to be looked at, unless the config changes.

        That is `now` while a ping is not answered, because the peer's excuse may be over soon; and for a peer
        that has to be known by then, because the app may know it no longer.
        """
        if self._pinged is not None:
            return now
        stale_at = self._opened_at + self._router.settings.config.stale_seconds
        if self._orders.peer.phase is Phase.CONNECTED:
            return self._due
        if now < stale_at:
            return min(self._due, stale_at)
        return now if tokens_required else self._due

    @property
    def rtt(self) -> float | None:
        """Seconds from the last ping that was answered to its answer, with all that was queued before
        it; None before there was one."""
        answered_at = max(self._lane.answered_at, self._orders.peer.answered_at)
        return answered_at - self._pinged_at if answered_at >= self._pinged_at else self._rtt

    def is_stale(self, now: float, *, tokens_required: bool) -> bool:
        """Whether a peer has held its place for `stale_seconds` without becoming a client, where it
        has to become one.

        That is so of a peer which asked for a subprotocol or came over HTTP, because it cannot be plain; and
        with `tokens_required` of every other, but for one that the app knows: by a user, or as plain by its
        own word. A plain peer where anybody may come is as good as a client.
        """
        peer = self._orders.peer
        if peer.phase is Phase.CONNECTED:
            return False
        if now - self._opened_at < self._router.settings.config.stale_seconds:
            return False
        if not self._orders.may_be_plain:
            return True
        return tokens_required and not (peer.user or self._orders.app_vouches)

    def _is_alive(self, now: float, config: Config) -> bool:
        if self._pinged is None:
            return True
        pinged_at, ping, chunks = self._pinged
        lane, outbox = self._lane, self._outbox
        # At the same instant counts: on virtual time an answer takes none.
        # While the line is full our ping may not be out: then the outbox sees who is dead.
        if lane.heard_at >= pinged_at or not lane.reading or outbox.blocked:
            self._pinged = None
        elif now - pinged_at < config.pong_seconds:
            pass
        elif outbox.chunks > chunks and outbox.holds(ping):
            self._pinged = None  # it is behind what a slow but living peer takes
        else:
            return False
        return True
