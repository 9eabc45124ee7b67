"""The counters of a node in one JSON object, for people and their scripts; for machines there is
`/metrics`. Those of several nodes are put together in `sums`.
"""

import heapq
import time
from collections.abc import Mapping
from itertools import islice
from typing import Annotated, Final

import attrs
from msgspec import Meta, Struct

from broker.core.histogram import HistogramStatistics
from broker.core.messages import ClosedConnection, ConnectionDetails
from broker.core.work import DETAILS, SURVEYED, SURVEYED_AT_ONCE
from broker.node import Node
from broker.session.figures import BrokerStatistics, Survey
from broker.session.services import ServedConnection
from broker.version import VERSION

VIEW: Final = "stats"
"""The name by which nodes ask each other for these."""

Rows = Annotated[int, Meta(ge=0, le=100)]


class AskedStats(Struct):
    rows: Rows = 0
    """So many connections are told as well: the heaviest, and those that ended last."""


async def stats_of(node: Node, asked: AskedStats) -> dict[str, object]:
    """The state now, and the counts since the start. Linear in the connections, in turns with all else."""
    survey = await node.figures.survey()
    found = _fields(node, survey)
    if asked.rows:
        found["heaviest"] = await _heaviest(node, asked.rows)
        found["closed_last"] = [_ended(each) for each in islice(node.services.closed, asked.rows)]
    return found


def _weight(connection: ServedConnection) -> tuple[int, int]:
    """The bytes that wait for a connection; between equals, the bytes that went both ways."""
    outbox = connection.peer.outbox
    return outbox.bytes, outbox.bytes_sent + connection.traffic.bytes


async def _heaviest(node: Node, most: int) -> list[dict[str, object]]:
    turns, connections = node.router.turns, node.services.connections
    here, top = list(connections.values()), list[ServedConnection]()
    for first in range(0, len(here), SURVEYED_AT_ONCE):
        piece = here[first : first + SURVEYED_AT_ONCE]
        await turns.pay(len(piece) * SURVEYED)
        top = heapq.nlargest(most, [*top, *piece], key=_weight)
    await turns.pay(len(top) * DETAILS)
    details = [node.connection_details(each.peer.fd) for each in top]
    return [_row(each) for each in details if each is not None]


def _row(details: ConnectionDetails) -> dict[str, object]:
    fields = ("fd", "user", "address", "app_name", "app_version")
    sizes = ("bytes_queued", "messages_dropped", "bytes_received", "bytes_sent")
    return {name: getattr(details, name) for name in (*fields, *sizes)}


def _ended(closed: ClosedConnection) -> dict[str, object]:
    close, details = closed.close, closed.details
    return {
        **{name: getattr(details, name) for name in ("fd", "user", "address")},
        "closed_at": closed.closed_at,
        "code": close.code,
        "reason": close.reason,
        "initiator": close.initiator.value,
    }


def _fields(node: Node, survey: Survey) -> dict[str, object]:
    statistics = node.figures.statistics(survey)
    return {
        "node": node.name,
        "version": VERSION,
        "uptime": round(time.time() - node.figures.started_at, 3),
        "draining": node.draining,
        **_here(node, statistics),
        "connections_by": [
            {"transport": transport, "protocol": protocol, "count": count}
            for (transport, protocol), count in survey.connections.items()
        ],
        **_counted(statistics, survey),
        "memory": {
            **attrs.asdict(statistics.memory),
            "limit": int(min(statistics.memory.limit, 2**53)),
        },
        "loop_lag": _spread(statistics.loop_lag),
        "queues": {
            "bytes": _spread(survey.queue_bytes),
            "messages": _spread(survey.queue_messages),
        },
        "hooks": [
            {"hook": kind, "asked": asked, "failures": each.failures, **_spread(each.seconds)}
            for (kind, asked), each in statistics.hooks.items()
        ],
        "events": {
            name: {
                "waiting": each.waiting,
                "delivered": each.delivered,
                "dropped": each.dropped,
                "failures": each.failures,
            }
            for name, each in statistics.events.items()
        },
    }


def _here(node: Node, statistics: BrokerStatistics) -> Mapping[str, object]:
    return {
        "connections": statistics.connections,
        "connections_max": node.services.admission.capacity.connections,
        "users": statistics.users,
        "topics": statistics.hub.topics,
        "patterns": statistics.hub.patterns,
        "subscriptions": statistics.hub.subscriptions,
        "traces": len(node.traces),
    }


def _counted(statistics: BrokerStatistics, survey: Survey) -> Mapping[str, object]:
    ends, post = statistics.ends, statistics.post
    return {
        "published": statistics.published,
        "published_by_namespace": statistics.namespaces,
        "delivered": post.messages_delivered,
        "messages_received": survey.received.messages,
        "bytes_received": survey.received.bytes,
        "messages_queued": post.messages_queued,
        "bytes_queued": post.bytes_queued,
        "messages_dropped": survey.messages_dropped,
        "opened": ends.opened,
        "closed": [
            {"code": code, "initiator": initiator, "count": count}
            for (code, initiator), count in ends.closed.items()
            if count
        ],
        "refused": {reason: count for reason, count in ends.refused.items() if count},
        "errors": {code: count for code, count in ends.errors.items() if count},
        "gaps": ends.gaps,
        "recoveries": statistics.recoveries,
    }


def _spread(histogram: HistogramStatistics) -> dict[str, object]:
    return {
        "count": histogram.count,
        "sum": round(histogram.sum, 6),
        "bounds": histogram.bounds,
        "counts": histogram.counts,
    }
