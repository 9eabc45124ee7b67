"""The connections that ended last: the truth about each, within bounds."""

import attrs
import pytest

from broker.core.closed_connections import (
    CLOSED_BYTES,
    CLOSED_MOST,
    TEXT_MOST,
    TOPICS_MOST,
    ClosedConnections,
)
from broker.core.messages import Close, ConnectionDetails, ConnectionLimits, Initiator

DETAILS = ConnectionDetails(
    fd=1,
    user="ann",
    address="10.0.0.1:5",
    path="/connection/websocket",
    transport="websocket",
    protocol="centrifuge-json",
    opened_at=1.0,
    topics=("news", "a.*"),
    established=True,
    age_seconds=3.0,
    idle_seconds=1.0,
    rtt_seconds=0.02,
    messages_received=1,
    bytes_received=2,
    messages_sent=3,
    bytes_sent=4,
    messages_queued=5,
    bytes_queued=6,
    messages_dropped=7,
    blocked=False,
    bytes_held=8,
    limits=ConnectionLimits(1, 2, 3, 4, None, None),
)
GONE = Close(3008, "slow", Initiator.SLOW, 5)


def test_the_whole_truth_is_kept() -> None:
    closed = ClosedConnections()
    closed.add(DETAILS, GONE, 9.0)
    (kept,) = closed
    assert kept.details == attrs.evolve(DETAILS, established=False)
    assert (kept.close, kept.closed_at, kept.topic_count) == (GONE, 9.0, 2)
    assert closed.find(1) is kept
    assert closed.find(2) is None


def test_the_last_come_first_and_the_oldest_gives_way() -> None:
    closed = ClosedConnections()
    for fd in range(1, CLOSED_MOST + 3):
        closed.add(attrs.evolve(DETAILS, fd=fd), GONE, 0.0)
    assert [each.details.fd for each in closed] == list(range(CLOSED_MOST + 2, 2, -1))
    assert len(closed) == CLOSED_MOST


def test_what_is_held_is_counted_and_goes_with_the_oldest() -> None:
    closed = ClosedConnections()
    closed.add(attrs.evolve(DETAILS, user="x" * 200), GONE, 0.0)
    one_long = closed.bytes_held
    for _ in range(CLOSED_MOST - 1):
        closed.add(DETAILS, GONE, 0.0)
    before = closed.bytes_held
    closed.add(DETAILS, GONE, 0.0)
    per_one = before - closed.bytes_held
    assert per_one == 200 - len("ann")
    assert closed.bytes_held == CLOSED_MOST * (one_long - per_one)


@pytest.mark.parametrize("letter", ["x", "é", "\U0001f600"])
def test_none_takes_more_than_its_bound(letter: str) -> None:
    closed = ClosedConnections()
    heavy = attrs.evolve(
        DETAILS,
        user=letter * 10_000,
        path="/" * 100_000,
        app_name=letter * 64,
        app_version=letter * 64,
        topics=tuple(f"{n}{letter * 200}" for n in range(1000)),
    )
    closed.add(heavy, attrs.evolve(GONE, reason=letter * 5000), 0.0)
    (kept,) = closed
    assert closed.bytes_held <= CLOSED_BYTES
    assert len(kept.details.user) == TEXT_MOST
    assert 0 < sum(map(len, kept.details.topics)) <= TOPICS_MOST
    assert kept.topic_count == 1000
    assert kept.details.topics == heavy.topics[: len(kept.details.topics)]
