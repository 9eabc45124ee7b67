"""A lid on repetition: of lines with one name, a few a second pass, and the rest is counted.

Rules:

1. A name's limit is its own: the first error is written however many `open` came before it.
2. Nothing is swallowed without a word: the count stands in the next line of that name, or in a
   line `lines_swallowed` once a second has passed without one.
"""

import threading
import time
from collections.abc import Callable
from typing import Final, TypeAlias

import attrs
import structlog
from structlog.types import EventDict

LINES_A_SECOND: Final = {
    "open": 5,
    "connected": 5,
    "close": 5,
    "refused": 1,
    "tls_failed": 1,
    "token_refused": 1,
    "no_pattern": 1,
    "will_refused": 1,
}
"""Events below a warning that strangers cause at will, and how many of each are written.

Five connections a second are a quiet broker, which logs each one; a person can still read ten
lines a second. A refusal is a mistake, and so is a pattern that is none: one a second shows which, as with
a warning.
"""

SECOND: Final = 1.0
"""The time that limits are counted in. A flood is seen at once, and its count soon after."""

MAX_NAMES: Final = 1000
"""Names that are told apart at a time. Ours are some forty; an app may make them of a peer's text."""

UNLIMITED: Final = frozenset(
    {"lines_swallowed", "log_lines_dropped", "doubtful_setting", "unknown_setting", "exposed"}
)
"""Lines about lines, which are as rare as a second makes them; and those of a start about its settings, which
are as many as somebody has set."""

_Key: TypeAlias = tuple[str, str, str]


@attrs.frozen
class Swallowed:
    """How many lines of one name were not written; by hook or logger where these are told apart."""

    name: str
    hook: str
    logger: str
    count: int
    level: str

    @property
    def fields(self) -> dict[str, object]:
        """The fields of the line `lines_swallowed`."""
        named = {"name": self.name, "hook": self.hook, "logger": self.logger}
        return {**{key: text for key, text in named.items() if text}, "count": self.count}


@attrs.define(eq=False)
class _Second:
    """The counts of one name since its second began."""

    since: float
    level: str
    passed: int = 1
    swallowed: int = 0


class Limiter:
    """A processor that lets some lines per name and second through.

    `notify` is called, without a lock held, with each count that no line of the same name has said
    within the second. Any thread may log; `clock` counts seconds.
    """

    def __init__(
        self,
        notify: Callable[[Swallowed], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._notify = notify
        self._interval = SECOND
        self._clock = clock
        # An RLock: a line may be logged in a signal handler, or by a finalizer, in the same thread.
        self._lock = threading.RLock()
        self._seconds: dict[_Key, _Second] = {}
        self._pending = 0

    def swallows(self, name: str) -> bool:
        """Whether a line below a warning is one too many of its name now. It is counted then, and need not
        be made: that would cost five times as much."""
        limit = LINES_A_SECOND.get(name)
        second = self._seconds.get((name, "", "")) if limit else None
        if second is None or limit is None or second.passed < limit:
            return False
        with self._lock:
            if self._clock() - second.since >= self._interval:
                return False
            self._count_swallowed(second)
        return True

    def __call__(self, _: object, method: str, event: EventDict) -> EventDict:
        name = str(event["event"])
        if name in UNLIMITED:
            return event
        mild = method in ("debug", "info")
        limit = LINES_A_SECOND.get(name, 0 if mild else 1)
        if limit:
            # Another library's text may hold anything, so its logger's name stands for it.
            logger = event.get("logger")
            hook = str(event.get("hook", ""))
            key = (name, hook, "") if logger is None else ("", "", str(logger))
            swallowed = self._admit(key, method, limit)
            if swallowed:
                event["swallowed"] = swallowed
        if self._pending:
            self.notify_due()
        return event

    def _admit(self, key: _Key, level: str, limit: int) -> int:
        """Count a line; return how many were swallowed before it. Raises `DropEvent`."""
        now = self._clock()
        with self._lock:
            second = self._seconds.get(key)
            if second is not None and now - second.since < self._interval:
                if second.passed < limit:
                    second.passed += 1
                    return 0
                self._count_swallowed(second)
                raise structlog.DropEvent
            if second is None and len(self._seconds) >= MAX_NAMES:
                self._forget_quiet(now)
            self._seconds[key] = _Second(now, level)
            if second is None or not second.swallowed:
                return 0
            self._pending -= 1
            return second.swallowed

    def _count_swallowed(self, second: _Second) -> None:
        self._pending += not second.swallowed
        second.swallowed += 1

    def _forget_quiet(self, now: float) -> None:
        """Make room: names that have nothing to notify of go, the quiet ones or, if need be, all."""
        silent = {key: each for key, each in self._seconds.items() if not each.swallowed}
        quiet = [key for key, each in silent.items() if now - each.since >= self._interval]
        for key in quiet or silent:
            del self._seconds[key]

    def notify_due(self, *, all_of_them: bool = False) -> None:
        """Notify of the counts whose second is over; before an end, all of them."""
        now = self._clock()
        due = []
        with self._lock:
            for key, second in list(self._seconds.items()):
                if second.swallowed and (all_of_them or now - second.since >= self._interval):
                    due.append(Swallowed(*key, second.swallowed, second.level))
                    second.swallowed = 0
                    self._pending -= 1
        for count in due:
            self._notify(count)
