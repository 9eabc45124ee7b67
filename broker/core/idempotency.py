"""Results of what must not be done twice, for whoever asks again because the answer got lost.

Rule: bounded in number and in age; `now` is any clock in seconds that does not go backwards.
Beyond the bound the oldest result is forgotten, so a repetition of that is done again.
"""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Final, Generic, TypeVar

import attrs

T = TypeVar("T")

TTL: Final = 300.0
"""Five minutes, as Centrifugo: longer than any sensible chain of retries."""

MAX_KEPT: Final = 10_000
"""With keys of at most `MAX_KEY_BYTES` about 5 MB."""

MAX_KEY_BYTES: Final = 255


@attrs.define(eq=False)
class Once(Generic[T]):
    """Results by key, for `ttl` seconds."""

    ttl: float = TTL
    max_kept: int = MAX_KEPT
    # All live as long, so the order of arrival is that of their ends.
    _kept: OrderedDict[Hashable, tuple[float, T]] = attrs.field(init=False, factory=OrderedDict)

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable, now: float) -> T | None:
        """The result kept under `key`, or None."""
        self._expire(now)
        kept = self._kept.get(key)
        return None if kept is None else kept[1]

    def keep(self, key: Hashable, result: T, now: float) -> None:
        """Keep a result, of a key that has none."""
        self._expire(now)
        if len(self._kept) >= self.max_kept:
            self._kept.popitem(last=False)
        self._kept[key] = now + self.ttl, result

    def _expire(self, now: float) -> None:
        while self._kept and next(iter(self._kept.values()))[0] <= now:
            self._kept.popitem(last=False)
