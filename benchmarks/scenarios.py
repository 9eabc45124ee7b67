"""What is measured, and what the broker has to reach: data, no code that runs anything.

Rule: every scenario is run on every server it names with the same numbers. A row that we lose stays
in the table; where one choice (how many frames a publisher hands over at once, say) would favour
somebody, all of its values are rows, and each is held to the same goal.
"""

from typing import Literal

import attrs

Kind = Literal["topic", "direct", "connections", "http"]
Metric = Literal[
    "deliveries_per_second", "publishes_per_second", "p50_ms", "p99_ms", "p999_ms",
    "connects_per_second", "kib_per_connection", "noticed_seconds", "bytes_per_delivery",
]  # fmt: skip

FAST = ("broker", "nats", "ceiling")
PEERS = ("broker", "compiled", "nats", "uws", "picows", "websockets", "ceiling")
FANOUT = (*PEERS[:-1], "nchan", "ceiling")

OTHER_ROUNDS = 0.4
"""Of the rounds, how many is taken of what no goal asks for: two of five."""

UNDER_WAY_BYTES = 512 * 1024
"""Of payload, per subscriber: half of what the broker keeps for a reader before it cuts it, so no
server is measured by how it treats slow ones."""


@attrs.frozen(kw_only=True)
class Scenario:
    """One load. `window` is publications under way per topic, `burst` frames per write, `batch`
    publications per HTTP request."""

    name: str
    title: str
    metric: Metric = "deliveries_per_second"
    servers: tuple[str, ...] = FAST
    kind: Kind = "topic"
    subs: int = 1
    pubs: int = 1
    topics: int = 1
    payload: int = 64
    burst: int = 1
    batch: int = 1
    window: int = 1024
    rate: float = 0
    patterns: int = 0
    at_once: int = 64
    reply: bool = False
    recover: bool = False
    """Whether subscribers ask for what they have missed, as an SDK does that comes back."""
    words: bool = False
    """Payloads are text, of words and numbers; what goes out counts in bytes as well."""
    deflate: bool = False
    """Subscribers offer permessage-deflate, and servers are told to compress."""
    tls: bool = False
    """Everybody connects over TLS, and servers show one and the same certificate."""
    seconds: float = 2
    warm: float = 0.5

    @property
    def actual_window(self) -> int:
        return max(self.burst, min(self.window, UNDER_WAY_BYTES // self.payload))


@attrs.frozen
class Goal:
    """`ours` ÷ `theirs` of one metric is at least, or at most, `bound`.

    `versus` is a server in the same scenario, or `name/server` of another scenario.
    """

    scenario: str
    metric: Metric
    versus: str
    sign: Literal["≥", "≤"]
    bound: float

    def is_met(self, ratio: float) -> bool:
        return ratio >= self.bound if self.sign == "≥" else ratio <= self.bound


SCENARIOS = (
    *(
        Scenario(name=f"1-1-burst-{b}", title=f"1→1, {b} a write", burst=b, window=4096, servers=PEERS)
        for b in (1, 16, 128)
    ),
    *(
        Scenario(
            name=f"1-100-burst-{b}", title=f"1→100, {b} a write", subs=100, burst=b, servers=FANOUT
        )
        for b in (1, 16, 128)
    ),
    *(
        Scenario(
            name=f"1-1000-burst-{b}", title=f"1→1,000, {b} a write", subs=1000, burst=b,
            servers=FANOUT, warm=1,
        )
        for b in (1, 16)
    ),
    Scenario(name="100-100", title="100→100, each to all", subs=100, pubs=100, servers=PEERS),
    Scenario(
        name="direct", title="1,000 pairs, direct messages", kind="direct", subs=1000, pubs=1000,
        topics=1000, window=16, servers=PEERS,
    ),
    Scenario(
        name="rooms", title="1,000 topics × 10 subscribers", subs=10_000, pubs=1000, topics=1000,
        window=8, warm=1,
        servers=("broker", "compiled", "nats", "uws", "picows", "ceiling"),
    ),
    *(
        Scenario(
            name=f"payload-{size}", title=f"1→100, {words} each", subs=100, payload=size,
            servers=("broker", "nats", "uws", "picows", "ceiling"),
        )
        for size, words in ((16, "16 B"), (1024, "1 KiB"), (16_384, "16 KiB"))
    ),
    *(
        Scenario(
            name=f"text-{size}{'-deflate' * deflate}",
            title=f"1→100, {words} of text each{', compressed' * deflate}",
            subs=100, payload=size, words=True, deflate=deflate, servers=("broker", "uws"),
        )
        for size, words in ((1024, "1 KiB"), (16_384, "16 KiB"))
        for deflate in (False, True)
    ),
    Scenario(
        name="paced-1000", title="1→1,000, 50 a second", subs=1000, rate=50, metric="p50_ms",
        servers=PEERS, seconds=3,
    ),
    Scenario(
        name="paced-100", title="1→100, 500 a second", subs=100, rate=500, metric="p50_ms",
        servers=PEERS, seconds=3,
    ),
    Scenario(
        name="idle", title="9,000 idle subscribers", kind="connections", subs=9000, pubs=0,
        seconds=1, warm=0, metric="kib_per_connection", servers=PEERS[:-1],
    ),
    Scenario(
        name="storm", title="5,000 connects, then 5,000 disconnects at once", kind="connections",
        subs=5000, pubs=0, at_once=5000, seconds=0.5, warm=0, metric="connects_per_second",
        servers=PEERS[:-1],
    ),
    Scenario(
        name="tls", title="5,000 idle subscribers over TLS", kind="connections", subs=5000, pubs=0,
        tls=True, seconds=1, warm=0, metric="connects_per_second",
        servers=("broker", "nats", "uws", "websockets"),
    ),
    Scenario(
        name="resume", title="5,000 come back: connect, subscribe, recover", kind="connections",
        subs=5000, pubs=0, seconds=0.5, warm=0, recover=True, metric="connects_per_second",
        servers=("broker", "nats"),
    ),
    *(
        Scenario(
            name=f"patterns-{n}", title=f"1→1, 16 a write, {n:,} patterns that do not match",
            patterns=n, burst=16, window=4096, metric="publishes_per_second", servers=("broker", "nats"),
        )
        for n in (10, 10_000)
    ),
    *(
        Scenario(
            name=f"scale-{n}", title=f"1→{n:,}, few under way", subs=n, window=64, warm=1,
            servers=("broker", "nats"),
        )
        for n in (100, 9000)
    ),
    Scenario(
        name="reply", title="1→1, 16 a write, each publish answered", burst=16, window=4096, reply=True,
        servers=("broker", "compiled", "nats"),
    ),
    *(
        # A topic for each connection: nchan loses messages of a channel that gets 33,000 a second.
        Scenario(
            name=f"http-{n}", title=f"HTTP, {words}", kind="http", subs=n, pubs=n, topics=n,
            metric="publishes_per_second", servers=("broker", "uws", "nchan"),
        )
        for n, words in ((1, "1 connection"), (8, "8 connections"))
    ),
    *(
        Scenario(
            name=f"http-{n}-batch", title=f"HTTP, {words}, 100 a request", kind="http", subs=n, pubs=n,
            topics=n, batch=100, metric="publishes_per_second", servers=("broker",),
        )
        for n, words in ((1, "1 connection"), (8, "8 connections"))
    ),
    Scenario(
        name="history-off", title="1→1, 16 a write, no history", burst=16, window=4096,
        servers=("broker", "broker without history"),
    ),
    Scenario(
        name="history-off-100", title="1→100, no history", subs=100,
        servers=("broker", "broker without history"),
    ),
)  # fmt: skip

_RATE: Metric = "deliveries_per_second"
GOALS = (
    *(Goal(f"1-100-burst-{b}", _RATE, "nats", "≥", 1.7) for b in (1, 16, 128)),
    *(Goal(f"1-1000-burst-{b}", _RATE, "nats", "≥", 3.5) for b in (1, 16)),
    *(Goal(f"1-1000-burst-{b}", _RATE, "uws", "≥", 4) for b in (1, 16)),
    *(Goal(f"1-100-burst-{b}", _RATE, "websockets", "≥", 50) for b in (1, 16, 128)),
    *(Goal(f"1-1000-burst-{b}", _RATE, "websockets", "≥", 50) for b in (1, 16)),
    *(Goal(f"1-1-burst-{b}", _RATE, "picows", "≥", 1.7) for b in (1, 16, 128)),
    *(Goal(f"1-1-burst-{b}", _RATE, "nats", "≥", 0.6) for b in (1, 16, 128)),
    Goal("paced-1000", "p50_ms", "nats", "≤", 0.8),
    Goal("paced-1000", "p99_ms", "nats", "≤", 0.8),
    Goal("paced-1000", "p50_ms", "picows", "≤", 1.05),
    Goal("paced-1000", "p50_ms", "uws", "≤", 1.2),
    Goal("paced-1000", "p99_ms", "picows", "≤", 1.2),
    Goal("1-100-burst-1", _RATE, "ceiling", "≥", 0.5),
    Goal("1-100-burst-16", _RATE, "ceiling", "≥", 0.8),
    Goal("1-1000-burst-16", _RATE, "ceiling", "≥", 0.8),
    Goal("100-100", _RATE, "nats", "≥", 1.5),
    Goal("rooms", _RATE, "uws", "≥", 1),
    Goal("reply", _RATE, "nats", "≥", 0.4),
    Goal("http-1", "publishes_per_second", "nchan", "≥", 1),
    Goal("http-8", "publishes_per_second", "nchan", "≥", 0.4),
    Goal("storm", "noticed_seconds", "nats", "≤", 1.5),
    Goal("resume", "connects_per_second", "nats", "≥", 1),
    Goal("idle", "kib_per_connection", "", "≤", 9),
    Goal("idle", "kib_per_connection", "nats", "≤", 0.5),
    Goal("idle", "connects_per_second", "nats", "≥", 0.8),
    Goal("idle", "connects_per_second", "websockets", "≥", 1.3),
    Goal("patterns-10000", "publishes_per_second", "patterns-10/broker", "≥", 1 / 1.3),
    Goal("scale-9000", _RATE, "scale-100/broker", "≥", 1 / 1.5),
)


def has_goal(scenario: str, server: str) -> bool:
    """Whether a goal rests on this server's figure in this scenario; all rest on the broker's own."""
    return any(
        (scenario == goal.scenario and server in ("broker", goal.versus))
        or f"{scenario}/{server}" == goal.versus
        for goal in GOALS
    )
