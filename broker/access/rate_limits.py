"""How much a connection and a user may ask for in a time; all off unless the config says so.

A *bucket* holds what may be taken at once and fills at a rate. A request that finds too little in
one of them is refused with 111, and a connection that goes on for long is sent away with 3013. What
is refused takes nothing, so a client that asks too often gets just its rate.

Rules:

1. Time is an argument, and the rates too: a reload changes them under way.
2. A user's buckets outlive his connections until they are full again, so that to come back is no
   way around them.
"""

import math
from typing import Final

import attrs

from broker.config.settings import Config
from broker.errors import CloseCode, Disconnect

_SWEEP_AT_LEAST: Final = 1024
"""Users remembered before the first look for full buckets: about 300 KB."""


@attrs.define(eq=False)
class Bucket:
    """How much was taken; what is left is the burst less that."""

    taken: float = 0.0
    at: float = 0.0

    def has(self, cost: float, rate: float, burst: float, now: float) -> bool:
        """Whether `cost` may be taken now. One that is larger than the burst may when the bucket
        is full, and is paid off before the next."""
        return self._left_to_pay(rate, now) + min(cost, burst) <= burst

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
    """What one connection, or one user, has used."""

    messages: Bucket = attrs.field(factory=Bucket)
    bytes: Bucket = attrs.field(factory=Bucket)


@attrs.define(eq=False)
class ConnectionUsage:
    """What one connection has used, and how much it asked for beyond that."""

    own: Usage = attrs.field(factory=Usage)
    excess: Bucket = attrs.field(factory=Bucket)


class Limits:
    """The limits of one broker, and what its users have used."""

    def __init__(self, config: Config) -> None:
        self._users: dict[str, Usage] = {}
        self._sweep_at = _SWEEP_AT_LEAST
        self.reload(config)

    def __len__(self) -> int:
        """How many users are remembered."""
        return len(self._users)

    def reload(self, config: Config) -> None:
        """Take the rates from another config. What was used stays used."""
        self._config = config
        self._limits_users = min(config.user_message_rate, config.user_byte_rate) < math.inf
        self.active = self._limits_users or min(config.message_rate, config.byte_rate) < math.inf
        """False if there is nothing to ask `admits` for."""

    def admits(self, usage: ConnectionUsage, user: str, size: float, now: float) -> bool:
        """Whether a request of `size` bytes may be carried out; if so, it is counted.

        Raises `Disconnect` when this connection was told no too often.
        """
        config = self._config
        demands = [
            (usage.own.messages, 1, config.message_rate, config.message_burst),
            (usage.own.bytes, size, config.byte_rate, config.byte_burst),
        ]
        if user and self._limits_users:
            shared = self._usage_of(user, now)
            demands += [
                (shared.messages, 1, config.user_message_rate, config.user_message_burst),
                (shared.bytes, size, config.user_byte_rate, config.user_byte_burst),
            ]
        if all(bucket.has(cost, rate, burst, now) for bucket, cost, rate, burst in demands):
            for bucket, cost, rate, _ in demands:
                bucket.take(cost, rate, now)
            return True
        if not usage.excess.has(1, config.excess_rate, config.excess_burst, now):
            raise Disconnect(CloseCode.TOO_MANY_REQUESTS, "too many requests")
        usage.excess.take(1, config.excess_rate, now)
        return False

    def _usage_of(self, user: str, now: float) -> Usage:
        usage = self._users.get(user)
        if usage is None:
            if len(self._users) >= self._sweep_at:
                self._sweep(now)
            usage = self._users[user] = Usage()
        return usage

    def _sweep(self, now: float) -> None:
        """Forget users with nothing to pay. Linear in them, and done when they have doubled."""
        config = self._config
        self._users = {
            user: usage
            for user, usage in self._users.items()
            if not (
                usage.messages.is_full(config.user_message_rate, now)
                and usage.bytes.is_full(config.user_byte_rate, now)
            )
        }
        self._sweep_at = max(_SWEEP_AT_LEAST, 2 * len(self._users))
