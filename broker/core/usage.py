"""How much of its limits somebody has used: token buckets.

A *bucket* holds what may be taken at once and fills at a rate. Rule: time is an argument, and so are
rate and burst: a reload changes them under way.
"""

import math

import attrs


@attrs.define(eq=False)
class Bucket:
    """How much was taken; the rest of the burst is left."""

    taken: float = 0.0
    at: float = 0.0

    def has(self, cost: float, rate: float, burst: float, now: float) -> bool:
        """Whether `cost` may be taken now. One that is larger than the burst may when the bucket
        is full, and is paid off before the next."""
        return self._left_to_pay(rate, now) + min(cost, burst) <= burst

    def left(self, rate: float, burst: float, now: float) -> float:
        """How much may be taken now."""
        return max(0.0, burst - self._left_to_pay(rate, now))

    def take(self, cost: float, rate: float, now: float) -> None:
        """Take it, be it there or not."""
        self.taken = self._left_to_pay(rate, now) + cost
        self.at = now

    def is_full(self, rate: float, now: float) -> bool:
        return self._left_to_pay(rate, now) <= 0

    def _left_to_pay(self, rate: float, now: float) -> float:
        return 0.0 if rate == math.inf else max(0.0, self.taken - (now - self.at) * rate)


@attrs.frozen
class Usage:
    """Requests and bytes that one connection, or one user, has used."""

    messages: Bucket = attrs.field(factory=Bucket)
    bytes: Bucket = attrs.field(factory=Bucket)


@attrs.define(eq=False)
class ConnectionUsage:
    """Requests and bytes that one connection has used, and how much it asked for beyond that."""

    own: Usage = attrs.field(factory=Usage)
    excess: Bucket = attrs.field(factory=Bucket)
