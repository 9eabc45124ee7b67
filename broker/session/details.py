"""All that is known of one connection while it runs."""

from math import inf
from time import time as wall_clock

import trio

from broker.core.messages import ConnectionDetails, ConnectionLimits
from broker.session.services import ServedConnection, Services


def details_of(
    services: Services, connection: ServedConnection, topics: tuple[str, ...] | None = None
) -> ConnectionDetails:
    """A snapshot, which is of use for a connection that is there or has ended in this very step: then
    `topics` are those that it had."""
    outbox, config = connection.peer.outbox, services.config
    facts = connection.facts()
    if topics is not None:
        facts["topics"] = topics
    return ConnectionDetails(
        **facts,
        established=connection.peer.is_established,
        age_seconds=max(0.0, wall_clock() - facts["opened_at"]),
        idle_seconds=max(0.0, trio.current_time() - connection.lane.heard_at),
        rtt_seconds=connection.heartbeat.rtt,
        messages_sent=outbox.messages_sent,
        bytes_sent=outbox.bytes_sent,
        messages_dropped=outbox.dropped,
        blocked=outbox.blocked,
        bytes_held=connection.holding.bytes,
        limits=ConnectionLimits(
            outbox.max_messages,
            outbox.max_bytes,
            config.max_topics,
            services.memory.connection_room,
            None if config.message_rate == inf else config.message_rate,
            None if config.byte_rate == inf else config.byte_rate,
        ),
    )
