"""Publish with options: exclude fds, tags, idempotency key, report.

Each such publication is a parcel of its own: it is fanned out at once, behind all that was published
before. Without options a publication takes `Router.publish_all`, where a thousand share one fan-out.
"""

from collections.abc import Collection, Mapping
from typing import Final

import attrs
import trio

from broker.core.idempotency import MAX_KEY_BYTES, IdempotentResults
from broker.core.messages import Delivery, Fd, Position, Publication
from broker.core.names import is_connection_name
from broker.core.session import Parcel, Report, Session
from broker.core.shares import owner_of, text_bytes
from broker.errors import ErrorCode, Refused
from broker.routing.router import Router


@attrs.frozen
class PublishOptions:
    """Everything that one publication may ask for.

    The fds of `exclude` get nothing; subscribers may pick by `tags`, and see them. `opaque` data are
    bytes that may be anything, not JSON. With `skip_history` the publication is not kept, so who is
    away now misses it. `retain` makes it the topic's last value, whatever its rules. A second
    publish with the same `key`, by the same publisher to the same topic within five minutes, does
    nothing and gets the report of the first; "" is no key.
    """

    exclude: Collection[Fd] = ()
    tags: Mapping[str, str] | None = None
    opaque: bool = False
    skip_history: bool = False
    retain: bool = False
    key: str = ""


PLAINLY: Final = PublishOptions()

FD_BYTES: Final = 36
"""An fd in a report that is kept: a number, and its place in the tuple."""


@attrs.define(eq=False)
class Publisher:
    """Publishes on behalf of clients and of this program, and reports what became of it."""

    router: Router
    _done: IdempotentResults[Delivery] = attrs.field(init=False, factory=IdempotentResults)

    def publish(
        self,
        topic: str,
        data: bytes,
        by: Session | None = None,
        options: PublishOptions = PLAINLY,
    ) -> Delivery:
        """Publish raw JSON, or opaque bytes, and say what became of it; one atomic step, linear in
        those who listen. `by` is the client that publishes, None this program.

        Raises `Refused` as `Router.publish_all` does, and 107 for a key that is too long and for
        `retain` where there is no topic.
        """
        if options.retain and is_connection_name(topic):
            raise Refused(ErrorCode.BAD_REQUEST, f"{topic} retains nothing: it is no topic")
        if not options.key:
            return self._publish(topic, data, by, options)
        if len(options.key.encode("utf-8", "replace")) > MAX_KEY_BYTES:
            raise Refused(ErrorCode.BAD_REQUEST, f"key: more than {MAX_KEY_BYTES} bytes")
        # An anonymous client is nobody else: its keys are its connection's own.
        owner = owner_of(None if by is None else by.info)
        now = trio.current_time()
        kept_as = (topic, options.key)
        delivery = self._done.get(owner, kept_as, now)
        if delivery is None:
            delivery = self._publish(topic, data, by, options)
            size = text_bytes(topic) + text_bytes(options.key) + FD_BYTES * len(delivery.failed)
            self._done.keep(owner, kept_as, delivery, now, size)
        return delivery

    @property
    def bytes_held(self) -> int:
        """What the results take that are kept by key."""
        return self._done.bytes_held

    def forget(self, by: Session) -> None:
        """Forget the keys of a client that has gone, if they were its connection's own."""
        if not by.user:
            self._done.forget(owner_of(by.info))

    def _publish(
        self, topic: str, data: bytes, by: Session | None, options: PublishOptions
    ) -> Delivery:
        info = None if by is None else by.info
        publication = Publication(topic, data, info, tags=options.tags, opaque=options.opaque)
        report = Report()
        parcel = Parcel(
            topic, "close", [(publication,)], exclude=frozenset(options.exclude), report=report
        )
        publication = self.router.publish_parcel(
            parcel, keep=not options.skip_history, retain=options.retain
        )
        position: Position | None = None
        if publication.offset:
            position = self.router.engine.position(topic)
        dropped = report.matched - report.queued
        return Delivery(report.matched, report.queued, dropped, tuple(report.failed), position)
