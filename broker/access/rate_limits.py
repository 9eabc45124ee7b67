"""How much a connection and a user may ask for in a time; all off unless the config says so.

A *bucket* holds what may be taken at once and fills at a rate. A request that finds too little in
one of them is refused with 111, and a connection that goes on for long is sent away with 3013. A
refused request takes nothing, so a client that asks too often gets just its rate.

Rules:

1. Time is an argument, and the rates are those of the moment: a reload changes them under way.
2. A user's buckets outlive his connections until they are full again, so that to come back is no
   way around them.
"""

import math
from typing import Final

from broker.config.reload import Settings
from broker.core.usage import ConnectionUsage, Usage
from broker.errors import CloseCode, Disconnect

_SWEEP_AT_LEAST: Final = 1024
"""Users remembered before the first look for full buckets: about 300 KB."""


class RateLimits:
    """The limits of one broker, and what its users have used."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._users: dict[str, Usage] = {}
        self._sweep_at = _SWEEP_AT_LEAST
        self.are_active: bool
        """Whether there is anything to ask `admits` for."""
        settings.watch(self._settings_changed)
        self._settings_changed()

    def __len__(self) -> int:
        """How many users are remembered."""
        return len(self._users)

    def _settings_changed(self) -> None:
        config = self._settings.config
        rates = min(config.message_rate, config.byte_rate)
        least = min(rates, config.user_message_rate, config.user_byte_rate)
        self.are_active = least < math.inf

    def admits(self, usage: ConnectionUsage, user: str, size: float, now: float) -> bool:
        """Whether a request of `size` bytes may be carried out; if so, it is counted.

        Raises `Disconnect` when this connection was told no too often.
        """
        config = self._settings.config
        demands = [
            (usage.own.messages, 1, config.message_rate, config.message_burst),
            (usage.own.bytes, size, config.byte_rate, config.byte_burst),
        ]
        if user and min(config.user_message_rate, config.user_byte_rate) < math.inf:
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
        config = self._settings.config
        self._users = {
            user: usage
            for user, usage in self._users.items()
            if not (
                usage.messages.is_full(config.user_message_rate, now)
                and usage.bytes.is_full(config.user_byte_rate, now)
            )
        }
        self._sweep_at = max(_SWEEP_AT_LEAST, 2 * len(self._users))
