"""Direct messages to connections of other nodes: sent to their node, and answered for by it.

So a publisher learns the same as on one node: that nobody is there (102), or that too much of it waits for a
connection that is behind (111).

Rule: of what is on its way to one node and not answered yet, one publisher may have a quarter of
`MOST_BYTES`. A node that hangs costs those who write to it, and no others.
"""

from functools import partial
from typing import Final

import attrs
import msgspec
import trio

from broker.core.messages import ClientInfo, Fd, Publication, data_bytes
from broker.core.session import Parcel, Report
from broker.core.shares import Owner, owner_of
from broker.core.work import PUBLICATION
from broker.engines.engine import Done
from broker.errors import ErrorCode, Refused
from broker.routing.elsewhere import Way
from broker.routing.mail import Direct
from broker.routing.neighbours import Neighbours
from broker.routing.open_calls import Answer
from broker.routing.router import Router

MOST_BYTES: Final = 4 * 2**20
"""As much as an outbox holds."""

SHARE: Final = 4

OVERHEAD: Final = 200
"""Bytes that a message on its way costs besides its data."""

_counts: Final = msgspec.msgpack.Decoder(tuple[int, int, list[Fd]])


@attrs.define(eq=False)
class _OnItsWay:
    """The bytes of requests that one node has yet to answer."""

    total: int = 0
    of: dict[Owner, int] = attrs.field(factory=dict)

    def add(self, owner: Owner, size: int) -> None:
        self.total += size
        left = self.of.get(owner, 0) + size
        if left:
            self.of[owner] = left
        else:
            self.of.pop(owner, None)

    def is_full(self, owner: Owner) -> bool:
        return self.total > MOST_BYTES or self.of.get(owner, 0) > MOST_BYTES // SHARE


@attrs.define(eq=False)
class Forwarding:
    """See the module. It is the `Ways` of the router."""

    neighbours: Neighbours
    router: Router
    _waiting: dict[str, _OnItsWay] = attrs.field(init=False, factory=dict)

    def __attrs_post_init__(self) -> None:
        self.neighbours.on(Direct, self._take)

    def way_to(self, topic: str, fd: Fd) -> Way:
        node = self.neighbours.node_of(fd)
        if node is None:
            raise no_connection(fd)
        return Way(partial(self._check, node), partial(self._send, node))

    def _check(self, node: str, info: ClientInfo | None) -> None:
        waiting = self._waiting.get(node)
        if waiting is not None and waiting.is_full(owner_of(info)):
            name = self.neighbours.name_of(node)
            raise Refused(ErrorCode.TOO_MANY_REQUESTS, f"node {name} is behind: try again later")

    def _send(self, node: str, parcel: Parcel, dones: list[Done]) -> None:
        publications = [each for batch in parcel.batches for each in batch]
        owner = owner_of(publications[0].info)
        size = data_bytes(publications) + OVERHEAD * len(publications)
        body = Direct(parcel.topic, publications, list(parcel.exclude))
        answer = partial(self._answered, node, owner, size, parcel.report, dones)
        waiting = self._waiting.setdefault(node, _OnItsWay())
        waiting.add(owner, size)
        try:
            self.neighbours.call(node, body, answer)
        except Refused as refusal:
            # The publisher fills `dones` only after this call, so it is told in a later step.
            trio.lowlevel.current_trio_token().run_sync_soon(self._failed, answer, refusal)

    def _failed(self, answer: Answer, refusal: Refused) -> None:
        answer(refusal)
        self.router.returns.settled()

    def _answered(
        self,
        node: str,
        owner: Owner,
        size: int,
        report: Report | None,
        dones: list[Done],
        result: bytes | Refused,
    ) -> None:
        waiting = self._waiting[node]
        waiting.add(owner, -size)
        if not waiting.total:
            del self._waiting[node]
        if isinstance(result, bytes) and report is not None:
            matched, queued, failed = _counts.decode(result)
            report.matched += matched
            report.queued += queued
            report.failed += failed
        outcome = result if isinstance(result, Refused) else None
        for done in dones:
            done(outcome)

    def _take(self, sender: str, direct: Direct, answer: Answer) -> float:
        """Another node sends this to a connection here."""
        publications: list[Publication] = direct.publications
        report = Report()
        parcel = Parcel(
            direct.topic,
            "close",
            [publications],
            exclude=frozenset(direct.exclude),
            report=report,
        )
        try:
            work = self.router.deliver_direct(parcel)
        except Refused as refusal:
            answer(refusal)
            return PUBLICATION * len(publications)
        counts = report.matched, report.queued, report.failed
        answer(msgspec.msgpack.encode(counts))
        return work


def no_connection(fd: Fd) -> Refused:
    """The answer to a request about a connection that is nowhere."""
    return Refused(ErrorCode.UNKNOWN_CHANNEL, f"no connection has fd {fd}")
