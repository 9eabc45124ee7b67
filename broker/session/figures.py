"""The figures of one node, for those who look after it, and for other nodes.

Rules:

1. A snapshot is one step. A look at every connection is a survey, and goes in turns.
2. Counters count since `serve` began, and never go down.
"""

import time
from collections import Counter
from collections.abc import Mapping
from typing import Final

import attrs
import msgspec
import trio

from broker.core.event_queue import EventStatistics
from broker.core.histogram import Histogram, HistogramStatistics
from broker.core.history import HistoryStatistics
from broker.core.hub import HubStatistics
from broker.core.memory import MemoryStatistics
from broker.core.retained import RetainedStatistics
from broker.core.work import SURVEYED, SURVEYED_AT_ONCE
from broker.engines.engine import EngineStatistics
from broker.hooks import HookStatistics
from broker.session.counts import ConnectionCounts
from broker.session.services import Services
from broker.transport.lane import Traffic
from broker.transport.postman import PostStatistics
from broker.version import VERSION

QUEUE_BYTES: Final = (0, 2**10, 2**12, 2**14, 2**16, 2**18, 2**20, 2**22)
QUEUE_MESSAGES: Final = (0, 1, 4, 16, 64, 256, 1024, 4096, 16_384)


@attrs.frozen
class BrokerStatistics:
    """A snapshot. `published`, `refused` and all other counters count since `serve` began; those of the
    hooks since they were set."""

    connections: int
    users: int
    published: int
    refused: int
    hub: HubStatistics
    engine: EngineStatistics
    post: PostStatistics
    events: Mapping[str, EventStatistics]
    """By reader, `on_event` and `webhooks`; empty where nobody reads them."""
    retained: RetainedStatistics
    ends: ConnectionCounts
    """How connections came and ended."""
    namespaces: Mapping[str, int]
    """Publications by namespace: "" for topics of none, `fd` and `user` for direct messages."""
    recoveries: Mapping[str, int]
    """By outcome: `recovered` without a loss, or with a `gap`."""
    hooks: Mapping[tuple[str, str], HookStatistics]
    """By kind of hook, and by who is asked: the `app` or a `backend`."""
    loop_lag: HistogramStatistics
    """By how many seconds the event loop was late, looked at once a second."""
    memory: MemoryStatistics
    """Bytes that are held for clients, by part."""
    uptime_seconds: float
    """Since `serve` began."""
    bytes_received: int
    """From all connections that ever were here."""

    @property
    def accepted(self) -> int:
        """Connections that were ever here."""
        return sum(self.ends.opened.values())

    @property
    def closed(self) -> int:
        """Connections that have ended."""
        return sum(self.ends.closed.values())

    @property
    def bytes_queued(self) -> int:
        """Bytes that were put into outboxes: they are sent, wait, or were dropped."""
        return self.post.bytes_queued

    @property
    def history(self) -> HistoryStatistics:
        return self.engine.history


@attrs.frozen
class Survey:
    """A walk over all connections that were here when it began: how many by transport and protocol, what
    waits in their outboxes; and what came from all that ever were here, and was dropped for them, since
    `serve` began."""

    connections: Mapping[tuple[str, str], int]
    queue_bytes: HistogramStatistics
    queue_messages: HistogramStatistics
    received: Traffic
    messages_dropped: int


class NodeReport(msgspec.Struct, frozen=True):
    """How a node is. `uptime` in seconds; the counters are since it began to serve. One that does not
    answer has only its name, and is not `alive`."""

    name: str
    version: str = VERSION
    uptime: float = 0.0
    connections: int = 0
    users: int = 0
    subscriptions: int = 0
    topics: int = 0
    messages_published: int = 0
    messages_delivered: int = 0
    connections_refused: int = 0
    history_publications_evicted: int = 0
    alive: bool = True


class Mark(msgspec.Struct, frozen=True, array_like=True):
    """The last event of a node that its backend is told of: the answer holds after it."""

    epoch: str = ""
    seq: int = 0


@attrs.define(eq=False)
class Figures:
    """See the module."""

    services: Services
    loop_lag: Histogram = attrs.field(init=False, factory=Histogram)
    """Seconds by which the event loop was late, looked at once a second."""
    _began: float = attrs.field(init=False, factory=trio.current_time)

    def statistics(self, survey: Survey | None = None) -> BrokerStatistics:
        """A snapshot; one step. Linear in the connections, 0.4 µs each, unless a `survey` of this moment
        has looked at them already."""
        router = self.services.router
        return BrokerStatistics(
            connections=len(router.hub.sessions),
            users=router.hub.sessions.statistics().users,
            published=router.published,
            refused=self.services.counts.refused,
            hub=router.hub.statistics(),
            engine=router.engine.statistics(),
            post=router.office.statistics(),
            events={} if router.events is None else router.events.statistics(),
            memory=self.services.memory.statistics(),
            retained=router.retained.statistics(),
            ends=self.services.counts.statistics(),
            namespaces=router.by_namespace(),
            recoveries=attrs.asdict(router.recoveries),
            hooks=self.services.hooks.statistics(),
            loop_lag=self.loop_lag.statistics(),
            uptime_seconds=trio.current_time() - self._began,
            bytes_received=self._received() if survey is None else survey.received.bytes,
        )

    @property
    def started_at(self) -> float:
        """Unix seconds."""
        return self.services.started_at

    @property
    def webhooks(self) -> EventStatistics | None:
        """How far the events for the backend are; None where none is told of any."""
        events = self.services.router.events
        return None if events is None else events.statistics().get("webhooks")

    def mark(self) -> Mark:
        """The last event that the backend is told of, at most when it is told of any."""
        told = self.webhooks
        return Mark() if told is None else Mark(told.epoch, told.seq)

    def report(self) -> NodeReport:
        """How this node is, as others may ask."""
        statistics = self.statistics()
        hub = statistics.hub
        return NodeReport(
            self.services.name,
            uptime=time.time() - self.started_at,
            connections=statistics.connections,
            users=statistics.users,
            subscriptions=hub.subscriptions,
            topics=hub.topics + hub.patterns,
            messages_published=statistics.published,
            messages_delivered=statistics.post.messages_delivered,
            connections_refused=statistics.refused,
            history_publications_evicted=statistics.history.publications_evicted,
        )

    def _received(self) -> int:
        here = [each.traffic.bytes for each in self.services.connections.values()]
        return self.services.counts.received.bytes + sum(here)

    async def survey(self) -> Survey:
        """Look at every connection. Linear in them, in turns, where it is counted: others are served in between.

        A counter never goes down from one survey to the next. Cancelled, nothing is left behind.
        """
        connections = self.services.connections
        # A connection that ends from here on is still in this list; the next survey has it among the ended.
        here, counts = list(connections.items()), self.services.counts
        received, dropped = attrs.evolve(counts.received), counts.dropped
        kinds: Counter[tuple[str, str]] = Counter()
        queue_bytes, queue_messages = Histogram(QUEUE_BYTES), Histogram(QUEUE_MESSAGES)
        for first in range(0, len(here), SURVEYED_AT_ONCE):
            piece = here[first : first + SURVEYED_AT_ONCE]
            await self.services.router.turns.pay(len(piece) * SURVEYED)
            received.add_all([connection.traffic for _, connection in piece])
            outboxes = [connection.peer.outbox for _, connection in piece]
            dropped += sum([outbox.dropped for outbox in outboxes])
            # An outbox without a writer keeps what it had: it is nobody's queue any more.
            left = [connection for fd, connection in piece if fd in connections]
            kinds.update([(connection.transport, connection.protocol) for connection in left])
            queue_bytes.observe_all([each.peer.outbox.bytes for each in left])
            queue_messages.observe_all([each.peer.outbox.messages for each in left])
        waiting = queue_bytes.statistics(), queue_messages.statistics()
        return Survey(kinds, *waiting, received, dropped)
