"""The counters of a broker in one JSON object, for people and their scripts; for machines there is
`/metrics`.
"""

import time
from collections.abc import Mapping

import attrs

from broker.core.histogram import HistogramStatistics
from broker.node import BrokerStatistics, Node, Survey
from broker.version import VERSION


def stats_fields(node: Node, survey: Survey) -> dict[str, object]:
    """What is here now, and what was counted since the start. `survey` is a walk over the connections of
    this moment."""
    statistics = node.stats(survey)
    return {
        "node": node.name,
        "version": VERSION,
        "uptime": round(time.time() - node.started_at, 3),
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
        "connections_max": node.services.admission.places.connections,
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
