"""The outcome of a publication on all nodes: each node tells the asker how many got it there.

The asker writes its name and a number on the publication; a node that reads them in the log sends back its
counts. The sum is known when all nodes have answered that were there when it was published, or after
`COUNT_SECONDS`; then it says that it is not complete.
"""

from contextlib import suppress
from functools import partial
from typing import Final

import attrs

from broker.core.messages import Position
from broker.core.session import Parcel, Report
from broker.core.work import COMMAND
from broker.engines.engine import Done
from broker.errors import Refused
from broker.routing.mail import Counted
from broker.routing.neighbours import Neighbours
from broker.routing.open_calls import Answer
from broker.routing.publishing import OnDelivery, Publisher, delivery_of
from broker.routing.router import Router

COUNT_SECONDS: Final = 1.0
"""A node that has not counted by then hangs; who asks is not to wait for its end."""


@attrs.define(eq=False)
class _Counting:
    """One publication that is being counted."""

    report: Report
    done: OnDelivery
    missing: set[str]
    position: Position | None = None
    is_kept: bool = False

    def finish(self, *, complete: bool) -> None:
        delivery = delivery_of(self.report, self.position)
        self.done(attrs.evolve(delivery, complete=complete))


@attrs.define(eq=False)
class DistantReports:
    """See the module."""

    neighbours: Neighbours
    router: Router
    publisher: Publisher
    _open: dict[int, _Counting] = attrs.field(init=False, factory=dict)

    def __attrs_post_init__(self) -> None:
        self.publisher.everywhere = self
        self.router.count_for = self._count
        self.neighbours.on(Counted, self._counted)
        self.neighbours.on_gone.append(self._gone)

    def mark(self, parcel: Parcel) -> None:
        number = self.neighbours.calls.next_number()
        parcel.report_to = f"{self.neighbours.id} {number}"

    def begin(self, parcel: Parcel, done: OnDelivery) -> Done:
        assert parcel.report is not None, "it is counted here as well"
        number = _number_of(parcel.report_to)
        missing = set(self.neighbours.others())
        self._open[number] = _Counting(parcel.report, done, missing)
        return partial(self._kept, number)

    def _kept(self, number: int, result: Position | Refused | None) -> None:
        counting = self._open[number]
        if isinstance(result, Refused):
            del self._open[number]
            counting.done(result)
            return
        counting.position, counting.is_kept = result, True
        late = partial(self._late, number)
        self.neighbours.calls.add(number, "", late, COUNT_SECONDS)
        self._look(number)

    def _late(self, number: int, result: bytes | Refused) -> None:
        self._open.pop(number).finish(complete=False)

    def _look(self, number: int) -> None:
        counting = self._open[number]
        if counting.is_kept and not counting.missing:
            self.neighbours.calls.forget(number)
            del self._open[number]
            counting.finish(complete=True)

    def _counted(self, sender: str, counted: Counted, answer: Answer) -> float:
        counting = self._open.get(counted.number)
        if counting is not None and sender in counting.missing:
            counting.missing.discard(sender)
            counting.report.matched += counted.matched
            counting.report.queued += counted.queued
            counting.report.failed += counted.failed
            self._look(counted.number)
            self.router.returns.settled()
        return COMMAND

    def _gone(self, node: str) -> None:
        for number, counting in list(self._open.items()):
            counting.missing.discard(node)
            self._look(number)

    def _count(self, report_to: str, report: Report) -> None:
        """Tell another node what became of its publication here."""
        node, _, _ = report_to.partition(" ")
        counted = Counted(_number_of(report_to), report.matched, report.queued, report.failed)
        with suppress(Refused):  # the asker is told that it is not complete
            self.neighbours.note(node, counted)


def _number_of(report_to: str) -> int:
    return int(report_to.rpartition(" ")[2])
