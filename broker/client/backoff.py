"""How long to wait before the next attempt."""

import random
from typing import Final

RECONNECT_FIRST_SECONDS: Final = 0.2
"""Bound of the first wait: a broker that restarts is back within a second."""

RECONNECT_MOST_SECONDS: Final = 20.0
"""Bound of all later waits, as in the official clients: 10,000 clients that wait for a broker
are 1,000 attempts a second, which one core takes."""


def backoff(attempt: int) -> float:
    """Seconds to wait before an attempt, counted from 0.

    Full jitter: a thousand clients that lost one broker must not come back together.
    """
    bound = RECONNECT_FIRST_SECONDS * 2.0 ** min(attempt, 10)
    return random.uniform(0, min(RECONNECT_MOST_SECONDS, bound))  # noqa: S311 - not a secret
