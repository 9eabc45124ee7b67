"""Wills: a last publication on behalf of a client that goes without saying goodbye."""

from collections.abc import Callable
from typing import Final

import attrs
import structlog

from broker.core.memory import Part
from broker.core.messages import Close, Fd, Initiator
from broker.core.shares import text_bytes
from broker.core.work import COMMAND, KILOBYTE
from broker.errors import ErrorCode, Refused
from broker.routing.publishing import Publisher, PublishOptions
from broker.routing.recipients import Peer

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("broker")

GOODBYES: Final = (1000, 1005)
"""Codes of a client that means to go: 1005 is a Close frame without a code, which is what a browser's
`close()` sends."""

WILL_BYTES: Final = 256
"""A will besides its data and the characters of its topic: itself, two texts, its place: 233 bytes."""


@attrs.frozen
class Will:
    """A publication to come. `data` is raw JSON; `retain` makes it the topic's last value."""

    topic: str
    data: bytes
    retain: bool = False

    @property
    def bytes(self) -> int:
        return WILL_BYTES + text_bytes(self.topic) + len(self.data)


@attrs.define(eq=False)
class Wills:
    """The wills of the connections that are here, one each at most."""

    publisher: Publisher
    on_put: Callable[[Peer, Will | None], None] | None = attrs.field(init=False, default=None)
    """Told of each will that is put or taken back. Never waits."""
    _of: dict[Fd, Will] = attrs.field(init=False, factory=dict)

    def __len__(self) -> int:
        return len(self._of)

    def put(self, peer: Peer, will: Will | None) -> None:
        """Replace the will of a connection; None takes it back.

        Raises `Refused`, with nothing changed, for one that could never be published, and where there
        is no memory for it (106).
        """
        if will is not None:
            self.publisher.check_later(will.topic, retain=will.retain)
        before = self._of.get(peer.fd)
        more = (0 if will is None else will.bytes) - (0 if before is None else before.bytes)
        if more > 0 and (reason := peer.holding.refusal(more)):
            raise Refused(ErrorCode.LIMIT_EXCEEDED, reason)
        peer.holding.charge(Part.WILLS, more)
        if will is None:
            self._of.pop(peer.fd, None)
        else:
            self._of[peer.fd] = will
        if self.on_put is not None and will is not before:
            self.on_put(peer, will)

    def get(self, fd: Fd) -> Will | None:
        """The will of a connection, if it has one."""
        return self._of.get(fd)

    def weigh(self, fd: Fd) -> float:
        """The work of carrying out the will of a connection, about; 0 where it has none."""
        will = self._of.get(fd)
        if will is None:
            return 0.0
        size = len(will.data) / 1024 * KILOBYTE
        return COMMAND + size + self.publisher.weigh(will.topic)

    def carry_out(self, peer: Peer, close: Close) -> None:
        """Publish the will of a client that has ended so, if it still may; it has none afterwards.

        Before it leaves its topics, because some are open to subscribers alone; it gets nothing itself. A
        client that said goodbye leaves no will.
        """
        will = self._of.get(peer.fd)
        if will is None:
            return
        self.put(peer, None)
        if close.initiator is Initiator.CLIENT and close.code in GOODBYES:
            return
        try:
            self.publisher.router.rights.check_publish(peer, will.topic)
            options = PublishOptions(exclude=(peer.fd,), retain=will.retain)
            self.publisher.publish(will.topic, will.data, peer, options)
        except Refused as refusal:
            # For an fd or a user that has gone by now, or the rules have changed.
            log.info("will_refused", fd=peer.fd, topic=will.topic, reason=refusal.message)
