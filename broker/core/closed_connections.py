"""The connections that ended last, with the whole truth about each, for those who ask why one was closed.

Rules:

1. There are `CLOSED_MOST` at most, and each takes `CLOSED_BYTES` at most, whatever its peer has sent:
   long texts are cut, and of very many topics some are left out.
2. The oldest gives way. Nothing is looked up here on the way of a publication.
"""

from collections import deque
from collections.abc import Iterator
from typing import Final

import attrs

from broker.core.messages import Close, ClosedConnection, ConnectionDetails, Fd

CLOSED_MOST: Final = 1000
"""A morning of a small service, and the last seconds of a large one that has just fallen over."""

TEXT_MOST: Final = 255
"""Characters of a user, a path, a reason; the address and the name of the app are shorter."""

TOPICS_MOST: Final = 2048
"""Characters of all topics of one connection together."""

_FIXED: Final = 800

CLOSED_BYTES: Final = _FIXED + 4 * (3 * TEXT_MOST + 2 * 64 + TOPICS_MOST)
"""The most that one of them takes: itself, and its texts where each character has four bytes."""


@attrs.define(eq=False)
class ClosedConnections:
    """See the module."""

    _closed: deque[tuple[ClosedConnection, int]] = attrs.field(
        init=False, factory=lambda: deque(maxlen=CLOSED_MOST)
    )
    bytes_held: int = attrs.field(init=False, default=0)
    """About what they take."""

    def add(self, details: ConnectionDetails, close: Close, closed_at: float) -> None:
        topics_before = len(details.topics)
        details, close = _cut(details), _cut_reason(close)
        texts = "".join(
            (
                details.user,
                details.path,
                close.reason,
                details.app_name,
                details.app_version,
                *details.topics,
            )
        )
        size = _FIXED + (len(texts) if texts.isascii() else len(texts.encode(errors="replace")))
        if len(self._closed) == CLOSED_MOST:
            self.bytes_held -= self._closed[0][1]
        self._closed.append((ClosedConnection(details, close, closed_at, topics_before), size))
        self.bytes_held += size

    def __len__(self) -> int:
        return len(self._closed)

    def __iter__(self) -> Iterator[ClosedConnection]:
        """The last first."""
        return (closed for closed, _ in reversed(self._closed))

    def find(self, fd: Fd) -> ClosedConnection | None:
        """The one that had this fd. Linear in them."""
        return next((closed for closed in self if closed.details.fd == fd), None)


def _cut(details: ConnectionDetails) -> ConnectionDetails:
    """The same with its long texts cut; most have none."""
    topics = _that_fit(details.topics)
    is_long = max(len(details.user), len(details.path)) > TEXT_MOST
    if not (is_long or details.established or len(topics) < len(details.topics)):
        return details
    return attrs.evolve(
        details,
        established=False,
        user=details.user[:TEXT_MOST],
        path=details.path[:TEXT_MOST],
        topics=topics,
    )


def _cut_reason(close: Close) -> Close:
    if len(close.reason) <= TEXT_MOST:
        return close
    return attrs.evolve(close, reason=close.reason[:TEXT_MOST])


def _that_fit(topics: tuple[str, ...]) -> tuple[str, ...]:
    room, fitting = TOPICS_MOST, []
    for topic in topics:
        room -= len(topic) + 1
        if room < 0:
            break
        fitting.append(topic)
    return tuple(fitting)
