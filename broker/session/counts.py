"""Counters of connections since the broker began to serve: how they came, what they sent, how they ended.

Rules:

1. Nothing here is counted per publication or per delivery. A connection counts what it receives and drops,
   where that happens; its counts are added here when it has ended.
2. Labels are from bounded sets, whatever a peer or a backend says: a close code that is not ours is
   counted by its range, an error that is not ours as `other`.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Final, TypeVar, get_args

import attrs

from broker.core.messages import Close, Initiator, Transport
from broker.errors import CloseCode, ErrorCode
from broker.transport.lane import Traffic

REASONS: Final[Mapping[int, str]] = {
    400: "bad_request",
    403: "page",
    404: "no_session",
    405: "method",
    408: "timeout",
    411: "no_length",
    413: "too_large",
    415: "media_type",
    426: "version",
    431: "head_too_large",
    501: "version",
    503: "no_place",
    505: "version",
}
"""Why a request was refused, by the status that it was answered with."""

GAVE_WAY: Final = "gave_way"
SHUTTING_DOWN: Final = "shutting_down"
TLS: Final = "tls"
APP: Final = "app"
OTHER: Final = "other"

_CODES: Final = frozenset(map(int, CloseCode)) | {1003, 1005, 1010, 1012, 1014}
_RANGES: Final = (3000, 3500, 4000, 4500)
_ERRORS: Final = frozenset(map(int, ErrorCode))
_ALL_REASONS: Final = (*REASONS.values(), GAVE_WAY, SHUTTING_DOWN, TLS, APP)
_SLOW: Final = [(str(int(c)), str(Initiator.SLOW)) for c in (CloseCode.SLOW, CloseCode.ABNORMAL)]

L = TypeVar("L")


def _zeros(labels: Iterable[L]) -> Counter[L]:
    return Counter(dict.fromkeys(labels, 0))


def code_label(code: int) -> str:
    """A close code as it is counted: `3008`; one that is the app's or the peer's own by the half
    thousand that says whether clients come back, `4000-4499`."""
    if code in _CODES:
        return str(code)
    for first in _RANGES:
        if first <= code < first + 500:
            return f"{first}-{first + 499}"
    return OTHER


@attrs.frozen
class ConnectionCounts:
    """A snapshot of counters since `serve` began. `closed` is by code and initiator, `refused` by
    reason, `errors` by the code of the error replies to clients. `gaps` are subscriptions that lost
    publications and were ended for it."""

    opened: Mapping[str, int]
    closed: Mapping[tuple[str, str], int]
    refused: Mapping[str, int]
    errors: Mapping[str, int]
    gaps: int


@attrs.define(eq=False)
class Counts:
    """See the module."""

    gaps: int = 0
    received: Traffic = attrs.field(init=False, factory=Traffic)
    """From all connections that have ended."""
    dropped: int = 0
    """Messages for these that were dropped as they were too slow."""
    # All that can be are there from the start: a rate of something that appears misses the first.
    _opened: Counter[str] = attrs.field(init=False, factory=lambda: _zeros(get_args(Transport)))
    _closed: Counter[tuple[str, str]] = attrs.field(init=False, factory=lambda: _zeros(_SLOW))
    _refused: Counter[str] = attrs.field(init=False, factory=lambda: _zeros(_ALL_REASONS))
    _errors: Counter[str] = attrs.field(init=False, factory=lambda: _zeros(map(str, _ERRORS)))

    def note_opened(self, transport: str) -> None:
        self._opened[transport] += 1

    def note_closed(self, close: Close) -> None:
        self._closed[code_label(close.code), close.initiator.value] += 1

    def note_ended(self, received: Traffic, dropped: int) -> None:
        """A connection is no longer among those that are here."""
        self.received.add_all([received])
        self.dropped += dropped

    def note_refused(self, reason: str) -> None:
        self._refused[reason] += 1

    def note_error(self, code: int) -> None:
        self._errors[str(code) if code in _ERRORS else OTHER] += 1

    @property
    def refused(self) -> int:
        """All that were refused, for whatever reason."""
        return self._refused.total()

    def statistics(self) -> ConnectionCounts:
        return ConnectionCounts(
            dict(self._opened),
            dict(self._closed),
            dict(self._refused),
            dict(self._errors),
            self.gaps,
        )
