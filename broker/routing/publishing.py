"""Publish with options: exclude fds, tags, idempotency key, report.

Each such publication is a parcel of its own: it is fanned out at once, behind all that was published
before, or as soon as the engine has kept it. Without options a publication takes
`Router.publish_all`, where a thousand share one fan-out.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Final, Protocol, TypeAlias

import attrs
import trio

from broker.core.idempotency import MAX_KEY_BYTES
from broker.core.messages import ClientInfo, Delivery, Fd, Position, Publication, last_offset
from broker.core.names import direct_fd, is_connection_name
from broker.core.session import Parcel, Report, Session
from broker.core.shares import Owner, owner_of, text_bytes
from broker.core.work import AUDIENCE, LISTENERS, PEER, PUBLICATION, Allowance
from broker.engines.engine import Done, IdempotencyKey
from broker.errors import ErrorCode, Refused
from broker.routing.router import Router


@attrs.frozen
class PublishOptions:
    """Everything that one publication may ask for.

    The fds of `exclude` get nothing; subscribers may pick by `tags`, and see them. `opaque` data are
    bytes that may be anything, not JSON. With `skip_history` the publication is not kept, so a client that is
    away now misses it. `retain` makes it the topic's last value, whatever its rules. A second publish with
    the same `key`, by the same publisher to the same topic within five minutes, does nothing and gets the
    report of the first; "" is no key. With `report` the counts are those of all nodes. `on_behalf_of` is the
    client that others see as its publisher, where this program publishes for one that has gone.
    """

    exclude: Collection[Fd] = ()
    tags: Mapping[str, str] | None = None
    opaque: bool = False
    skip_history: bool = False
    retain: bool = False
    key: str = ""
    on_behalf_of: ClientInfo | None = None
    report: bool = False


PLAINLY: Final = PublishOptions()

OnDelivery: TypeAlias = Callable[["Delivery | Refused"], None]
"""Called once with what became of a publication that the engine had to keep first. Never waits."""

FD_BYTES: Final = 36
"""An fd in a report that is kept: a number, and its place in the tuple."""

_KeptAs: TypeAlias = tuple[Owner, tuple[str, str]]
"""The owner of the key; the topic and the key."""


class CountsEverywhere(Protocol):
    """Counts what becomes of publications on all nodes."""

    def mark(self, parcel: Parcel) -> None:
        """Have a parcel counted that is about to be published."""

    def begin(self, parcel: Parcel, done: OnDelivery) -> Done:
        """It was published: return what is to be told when it is kept. `done` is told the counts then."""


@attrs.define(eq=False)
class Publisher:
    """Publishes on behalf of clients and of this program, and reports what became of it."""

    router: Router
    everywhere: CountsEverywhere | None = attrs.field(init=False, default=None)
    """None where there is one node."""
    # Publishes with a key that are not kept yet, and others who wait for their outcome.
    _underway: dict[_KeptAs, list[OnDelivery]] = attrs.field(init=False, factory=dict)

    def weigh(self, topic: str) -> float:
        """The work of a small publication by itself, about, if all who listen want it; nothing where
        it will be refused, or goes to a connection."""
        if is_connection_name(topic):
            return 0.0
        try:
            self.router.rights.check_topic(topic)
        except Refused:
            return 0.0
        found = self.router.hub.listeners(topic)
        members = sum([listeners.members for listeners in found])
        width = sum([listeners.width for listeners in found])
        return len(found) * LISTENERS + width * (AUDIENCE + PUBLICATION) + members * PEER

    def publish(
        self,
        topic: str,
        data: bytes,
        by: Session | None = None,
        options: PublishOptions = PLAINLY,
        done: OnDelivery | None = None,
    ) -> Delivery | None:
        """Publish raw JSON, or opaque bytes, and say what became of it; one atomic step, linear in
        those who listen. `by` is the client that publishes, None this program.

        None where the engine has to keep it first: `done` is called when that is known. Raises
        `Refused` as `Router.publish_all` does, and 107 for a key that is too long and for `retain`
        where there is no topic.
        """
        self._check_retain(topic, retain=options.retain)
        if not options.key:
            return self._publish(topic, data, by, options, done)
        if len(options.key.encode("utf-8", "replace")) > MAX_KEY_BYTES:
            raise Refused(ErrorCode.BAD_REQUEST, f"key: more than {MAX_KEY_BYTES} bytes")
        # An anonymous client is nobody else: its keys are its connection's own, and end with it.
        owner = owner_of(None if by is None else by.info)
        kept_as = owner, (topic, options.key)
        delivery = self.router.engine.keys.get(*kept_as, trio.current_time())
        if delivery is not None:
            return delivery
        others = [] if done is None else [done]
        if kept_as in self._underway:
            self._underway[kept_as] += others
            return None
        key = None if isinstance(owner, int) else IdempotencyKey(owner, options.key)
        tell = partial(self._tell_all, kept_as)
        delivery = self._publish(topic, data, by, options, tell, key)
        if delivery is None:
            self._underway[kept_as] = others
        else:
            self._keep(kept_as, delivery)
        return delivery

    def weigh_plainly(self, topic: str, contents: Sequence[bytes]) -> float | None:
        """The work of `publish_plainly` besides the making of the publications, as `Router.weigh` has it, which
        begins a run. None where that may not be called in this step: somebody has to keep them first, they go
        to a connection, or they are more than one and than a step's work."""
        if is_connection_name(topic):
            return None
        work = self.router.weigh(topic)
        if self.router.keeps_later:
            return None
        if len(contents) > 1 and not self.router.takes_together(map(len, contents)):
            return None
        return work

    def publish_plainly(
        self, topic: str, contents: Sequence[bytes], payer: Allowance
    ) -> Position | None:
        """Publish raw JSON of this program, without options, where `weigh_plainly` lets it: as `publish` does it,
        one after the other, in one step. They join the open run; `payer` is charged for the end of that, in
        whosever step it comes.

        Returns where the last stands in the topic's history, None where that keeps none. Raises `Refused`.
        """
        self.router.publish_all(topic, contents, payer=payer)
        is_kept = last_offset(self.router.latest) > 0
        return self.router.engine.position(topic) if is_kept else None

    def check_later(self, topic: str, *, retain: bool) -> None:
        """Raise `Refused` for a publication that could never be published, whoever is here by then: 107 for a
        name that is no topic and for `retain` where there is none, 102 for one that is no fd, 108 where
        connections have no names."""
        self._check_retain(topic, retain=retain)
        if is_connection_name(topic):
            self.router.rights.check_direct()
        if direct_fd(topic) is None:
            self.router.rights.check_topic(topic)

    def _check_retain(self, topic: str, *, retain: bool) -> None:
        if retain and is_connection_name(topic):
            raise Refused(ErrorCode.BAD_REQUEST, f"{topic} retains nothing: it is no topic")

    @property
    def bytes_held(self) -> int:
        """Bytes of the results that are kept by key."""
        return self.router.engine.keys.bytes_held

    def forget(self, by: Session) -> None:
        """Forget the keys of a client that has gone, if they were its connection's own."""
        keys = self.router.engine.keys
        if not by.user and keys.bytes_held:
            keys.forget(owner_of(by.info))

    def _publish(
        self,
        topic: str,
        data: bytes,
        by: Session | None,
        options: PublishOptions,
        done: OnDelivery | None,
        key: IdempotencyKey | None = None,
    ) -> Delivery | None:
        info = options.on_behalf_of if by is None else by.info
        publication = Publication(topic, data, info, tags=options.tags, opaque=options.opaque)
        report = Report()
        exclude, payer = frozenset(options.exclude), None if by is None else by.allowance
        parcel = Parcel(
            topic, "close", [(publication,)], exclude=exclude, report=report, payer=payer
        )
        # A publication to one connection is counted by the connection's node, which answers.
        counts = self.everywhere if options.report and direct_fd(topic) is None else None
        if counts is not None and done is not None:
            counts.mark(parcel)
        dones = self.router.publish_parcel(
            parcel, keep=not options.skip_history, retain=options.retain, key=key
        )
        if dones is None:
            ((publication,),) = parcel.batches
            engine = self.router.engine
            return delivery_of(report, engine.position(topic) if publication.offset else None)
        if done is not None:
            tell = partial(_tell, done, report)
            dones.append(tell if counts is None else counts.begin(parcel, done))
        return None

    def _tell_all(self, kept_as: _KeptAs, result: Delivery | Refused) -> None:
        """A publish with a key is kept, or it is not: so was each repetition of it."""
        if isinstance(result, Delivery):
            self._keep(kept_as, result)
        for done in self._underway.pop(kept_as):
            done(result)

    def _keep(self, kept_as: _KeptAs, delivery: Delivery) -> None:
        owner, (topic, key) = kept_as
        size = text_bytes(topic) + text_bytes(key) + FD_BYTES * len(delivery.failed)
        self.router.engine.keys.keep(owner, (topic, key), delivery, trio.current_time(), size)


def _tell(done: OnDelivery, report: Report, result: Position | Refused | None) -> None:
    done(result if isinstance(result, Refused) else delivery_of(report, result))


def delivery_of(report: Report, position: Position | None) -> Delivery:
    """The outcome of a publication, as it was counted."""
    dropped = report.matched - report.queued
    return Delivery(report.matched, report.queued, dropped, tuple(report.failed), position)
