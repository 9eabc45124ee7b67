"""When a process that has died is started again, and when that is given up."""

from collections import deque
from typing import Final

import attrs

FIRST_PAUSE: Final = 0.1
"""Seconds before the first restart: one that died of a single message is back before anybody asks."""

LONGEST_PAUSE: Final = 5.0

STEADY_SECONDS: Final = 10.0
"""A process that lived so long had started well. Its death is news, and not one more of a row."""

DEATHS: Final = 5
"""Deaths of young processes within `STEADY_SECONDS` until that is given up: nothing will come of it."""


@attrs.define(eq=False)
class Restarts:
    """The deaths of one kind of process."""

    _young: deque[float] = attrs.field(factory=lambda: deque(maxlen=DEATHS))

    def pause(self, lived: float, now: float) -> float | None:
        """Seconds to wait before the restart of a process that died now and had lived so long; None to give up."""
        if lived >= STEADY_SECONDS:
            return FIRST_PAUSE
        self._young.append(now)
        recent = [when for when in self._young if now - when < STEADY_SECONDS]
        if len(recent) == DEATHS:
            return None
        doubled: float = FIRST_PAUSE * 2.0 ** (len(recent) - 1)
        return min(LONGEST_PAUSE, doubled)
