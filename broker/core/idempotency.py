"""Results by idempotency key, for a publisher that asks again because the answer got lost.

Words: an *owner* is a user, an anonymous connection or the app: see `shares`.

Rules:

- A key belongs to its owner: two owners with the same key never meet.
- Bounded in number, in bytes and in age. Beyond a bound the oldest result of the owner with the
  most bytes is forgotten, so a repetition of that is done again, and it is no other owner's.
- `now` is any clock in seconds that does not go backwards.

An anonymous connection's results go with it, by `forget`: after a reconnect it has another fd.
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Final, Generic, TypeVar

import attrs

from broker.core.shares import Account, Owner, Shares

T = TypeVar("T")

TTL: Final = 300.0
"""Five minutes, as Centrifugo: longer than any sensible chain of retries."""

MAX_KEPT: Final = 10_000
"""Thirty publishes with a key a second, all the time."""

MAX_BYTES: Final = 12 * 2**20
"""`MAX_KEPT` results with a topic and a key of 255 bytes each are 11.5 MB."""

MAX_KEY_BYTES: Final = 255

RESULT_BYTES: Final = 640
"""One result besides the characters of its key and topic: 623 bytes with a key of two short texts,
as tracemalloc counts them on CPython 3.11."""

OWNER_BYTES: Final = 640
"""One owner's account and its own order of results, measured alike: 637 bytes. Charged, so that
ten thousand connections with one key each weigh what they take."""


@attrs.frozen
class IdempotencyStatistics:
    """A snapshot. `results_evicted` counts those lost to the bounds; those that went by age are not in it."""

    results: int
    owners: int
    bytes: int
    results_evicted: int


@attrs.define(eq=False)
class _Kept(Generic[T]):
    account: "_Results[T]"
    key: Hashable
    due: float
    result: T
    bytes: int


@attrs.define(eq=False)
class _Results(Account, Generic[T]):
    """The results of one owner, oldest first."""

    kept: OrderedDict[Hashable, _Kept[T]] = attrs.field(factory=OrderedDict)


@attrs.define(eq=False)
class IdempotentResults(Generic[T]):
    """Results by owner and key, each for `ttl` seconds."""

    ttl: float = TTL
    max_kept: int = MAX_KEPT
    max_bytes: int = MAX_BYTES
    # All live as long, so the order of arrival is that of their ends.
    _order: OrderedDict[_Kept[T], None] = attrs.field(init=False, factory=OrderedDict)
    _shares: Shares[_Results[T]] = attrs.field(init=False)
    _evicted: int = attrs.field(init=False, default=0)

    def __attrs_post_init__(self) -> None:
        self._shares = Shares(_Results[T], OWNER_BYTES)

    def __len__(self) -> int:
        return len(self._order)

    @property
    def bytes_held(self) -> int:
        return self._shares.bytes

    def get(self, owner: Owner, key: Hashable, now: float) -> T | None:
        """The result that this owner keeps under `key`, or None."""
        self._expire(now)
        results = self._shares.get(owner)
        kept = None if results is None else results.kept.get(key)
        return None if kept is None else kept.result

    def keep(self, owner: Owner, key: Hashable, result: T, now: float, size: int = 0) -> None:
        """Keep a result, in place of the one that this owner has under `key`.

        `size` is the bytes of the key and the result, which come on top of `RESULT_BYTES`. A result
        larger than all the room is not kept. Constant in the number of results; logarithmic in
        that of owners.
        """
        self._expire(now)
        results = self._shares.account(owner)
        kept = _Kept(results, key, now + self.ttl, result, RESULT_BYTES + size)
        more = kept.bytes
        former = results.kept.pop(key, None)
        if former is not None:
            del self._order[former]
            more -= former.bytes
        results.kept[key] = kept
        self._order[kept] = None
        self._shares.charge(results, more)
        while len(self._order) > self.max_kept or self._shares.bytes > self.max_bytes:
            heaviest = self._shares.heaviest()
            assert heaviest is not None
            self._drop(next(iter(heaviest.kept.values())))
            self._evicted += 1

    def forget(self, owner: Owner) -> None:
        """Forget all results of an owner, such as a connection that has ended. Linear in them."""
        results = self._shares.get(owner)
        if results is not None:
            for kept in list(results.kept.values()):
                self._drop(kept)

    def items(self) -> Iterator[tuple[Owner, Hashable, T, float]]:
        """The owner, key and result of each, and when it was kept; oldest first."""
        for kept in self._order:
            yield kept.account.owner, kept.key, kept.result, kept.due - self.ttl

    def statistics(self) -> IdempotencyStatistics:
        return IdempotencyStatistics(
            results=len(self._order),
            owners=len(self._shares),
            bytes=self.bytes_held,
            results_evicted=self._evicted,
        )

    def _expire(self, now: float) -> None:
        while self._order:
            kept = next(iter(self._order))
            if kept.due > now:
                break
            self._drop(kept)

    def _drop(self, kept: _Kept[T]) -> None:
        results = kept.account
        del self._order[kept], results.kept[kept.key]
        self._shares.charge(results, -kept.bytes)
