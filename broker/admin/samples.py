"""The figures of the dashboard's charts, a sample a second, and the tick by which operators are told of them.

Rules:

1. Samples are read from what the broker counts anyway. All are of constant cost but one: the traffic of the
   connections that are here now, a sum over them that is taken in turns.
2. They are taken while there is a dashboard, watched or not: an operator who opens it sees the last quarter
   of an hour.
3. An operator who does not read is told nothing more until he has; see `Desk.tell`.
"""

import time
from collections import deque
from typing import Final

import attrs
import trio

from broker.config.machine import resident_bytes
from broker.node import Node
from broker.protocols.json_text import written
from broker.transport.lane import Traffic

SECONDS: Final = 1.0
KEPT: Final = 900
"""Samples: a quarter of an hour, 300 KB."""

AT_ONCE: Final = 500
"""Connections that are summed up between two turns: 0.1 ms."""

SUMMED: Final = 0.2
"""Work of one of them, as `core.work` has it."""

TICK: Final = 100.0
"""Work of a sample besides."""


@attrs.frozen(kw_only=True)
class Sample:
    """The figures of one moment. Those that only grow count since `serve` began."""

    time: float
    """Unix seconds."""
    connections: int
    users: int
    topics: int
    """And patterns."""
    subscriptions: int
    published: int
    delivered: int
    messages_in: int
    bytes_in: int
    messages_out: int
    bytes_out: int
    queued: int
    """Bytes that wait in outboxes, each counted once."""
    held: int
    """Bytes of memory for clients."""
    resident: int
    """Bytes of memory of the process."""
    lag: float
    """Seconds by which the event loop was late in the last second."""
    cpu: float
    """Seconds that this process has used of all processors."""
    opened: int
    closed: int
    refused: int
    errors: int
    slow: int
    """Connections that were ended as they were too slow."""


FIELDS: Final = tuple(field.name for field in attrs.fields(Sample))


class Samples:
    """The samples of one node. `keep` takes them."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._kept: deque[tuple[float, ...]] = deque(maxlen=KEPT)
        self._lag = node.figures.loop_lag.statistics()

    def history(self) -> dict[str, object]:
        """All samples that are kept, the oldest first, as columns have names."""
        return {"fields": FIELDS, "rows": list(self._kept)}

    @property
    def last(self) -> tuple[float, ...] | None:
        """The last; None where none is kept."""
        return self._kept[-1] if self._kept else None

    async def keep(self) -> None:
        """Take a sample a second and tell all operators of it, until cancelled."""
        due = trio.current_time()
        while True:
            due = max(due + SECONDS, trio.current_time())
            await trio.sleep_until(due)
            if not self._node.services.operators.enabled:
                self._kept.clear()
                continue
            sample = attrs.astuple(await self.take())
            self._kept.append(sample)
            self._tell(sample)

    async def take(self) -> Sample:
        """The figures of now. Linear in connections, in turns with everybody else."""
        traffic = await self._traffic()
        node = self._node
        router, services = node.router, node.services
        hub, post, ends = router.hub, router.office.statistics(), services.counts.statistics()
        router.meter.add(TICK)
        closed = ends.closed
        return Sample(
            time=round(node.now(), 3),
            connections=len(hub.sessions),
            users=hub.sessions.statistics().users,
            topics=hub.statistics().topics + hub.statistics().patterns,
            subscriptions=hub.statistics().subscriptions,
            published=router.published,
            delivered=post.messages_delivered,
            messages_in=traffic.messages,
            bytes_in=traffic.bytes,
            messages_out=post.messages_queued,
            bytes_out=post.bytes_queued,
            queued=post.bytes_held,
            held=services.memory.held,
            resident=resident_bytes(),
            lag=self._take_lag(),
            cpu=round(time.process_time(), 3),
            opened=sum(ends.opened.values()),
            closed=sum(closed.values()),
            refused=services.counts.refused,
            errors=sum(ends.errors.values()),
            slow=sum(count for (_, initiator), count in closed.items() if initiator == "slow"),
        )

    async def _traffic(self) -> Traffic:
        services, router = self._node.services, self._node.router
        # A connection that ends from here on is still in this list; the next look has it among the ended.
        here, total = list(services.connections.values()), attrs.evolve(services.counts.received)
        for first in range(0, len(here), AT_ONCE):
            piece = here[first : first + AT_ONCE]
            await router.turns.pay(len(piece) * SUMMED)
            total.add_all([connection.traffic for connection in piece])
        return total

    def _take_lag(self) -> float:
        """Seconds on average of the looks at the loop since the last sample: as a rule just one."""
        before, self._lag = self._lag, self._node.figures.loop_lag.statistics()
        looks = self._lag.count - before.count
        return round((self._lag.sum - before.sum) / looks, 6) if looks else 0.0

    def _tell(self, sample: tuple[float, ...]) -> None:
        desks = list(self._node.services.desks.values())
        if desks:
            data = written({"tick": sample})
            for desk in desks:
                desk.tell(data)
