"""Shares of owners in a common store, in bytes, and the owner that holds the most.

Words: an *owner* is a user by name, a connection without a user by its fd, or None for the app; an
owner without a user is a *stranger*; an *account* is what the store holds for one owner.

Rules:

- An account is there while it holds something, and is forgotten with its last byte. While it is
  there it weighs `account_bytes` itself, so that many small owners weigh what they take.
- All strangers together have one share, as one user has: to open a hundred connections is to hold
  a hundredth with each. Among themselves they are told apart by their fds.
- `heaviest` is exact, and its cost does not follow the number of owners.

So an owner of less than total / (users + 2) loses nothing to others: the heaviest holds more.

Not promised: anything between strangers, where one person may be many of them. Give clients users.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final, Generic, TypeAlias, TypeVar

import attrs

from broker.core.lazy_heap import LazyHeap
from broker.core.messages import ClientInfo, Fd
from broker.core.names import MAX_FD_DIGITS

Owner: TypeAlias = str | Fd | None
"""A user by name, a connection without a user by its fd, or None for the app."""

NO_FD: Final[Fd] = 0
"""Owner of what comes from a client whose id is no fd, which only the app can make up: fds start
at 1."""

TAGS_BYTES: Final = 192
"""A dict of tags before its texts: 184 bytes up to five tags, as tracemalloc counts on CPython
3.11, rounded up."""

TAG_BYTES: Final = 160
"""One tag besides its characters: two texts of 49 bytes each before their first character, what
rounding to 16 bytes adds, and 35 to 56 for its place in a dict that has grown."""


def text_bytes(text: str) -> int:
    """At most what the characters of a text take: 1 byte each, 4 where one is not ASCII.

    Constant in the length. Chinese takes 2 in truth, and one emoji makes every letter take 4.
    """
    return len(text) if text.isascii() else 4 * len(text)


def tags_bytes(tags: Mapping[str, str] | None) -> int:
    """The bytes of a publication's tags; 0 without any. Linear in the tags, not in their texts."""
    if not tags:
        return 0
    total = TAGS_BYTES + TAG_BYTES * len(tags)
    for key, value in tags.items():
        letters = len(key) + len(value)
        total += letters if key.isascii() and value.isascii() else 4 * letters
    return total


def owner_of(info: ClientInfo | None) -> Owner:
    """The owner of what this client has published; None, the app, where there is no client."""
    if info is None:
        return None
    if info.user:
        return info.user
    digits = info.client
    return int(digits) if digits.isdecimal() and len(digits) <= MAX_FD_DIGITS else NO_FD


@attrs.define(eq=False)
class Account:
    """One owner and its bytes. Stores derive from it, to list beside the bytes what they are of."""

    owner: Owner
    bytes: int = 0
    """Change it by `Shares.charge`."""
    bound: int = 0
    """At least `bytes`: the place in the heap goes by it, so not every byte moves the account."""

    @property
    def is_stranger(self) -> bool:
        return isinstance(self.owner, int)


A = TypeVar("A", bound=Account)


@attrs.define(eq=False)
class _Party(Generic[A]):
    """Accounts that are compared with each other: a heap by `bound`, heaviest first."""

    accounts: dict[Owner, A] = attrs.field(factory=dict)
    # (−bound, number, account): an entry counts only while it agrees with the account's `bound`.
    _heap: LazyHeap[tuple[int, int, A]] = attrs.field(
        factory=lambda: LazyHeap(lambda entry: -entry[0] == entry[2].bound)
    )
    _pushed: int = 0

    def lift(self, account: A) -> None:
        # A quarter more than it holds: an account that grows to a megabyte is moved 40 times.
        account.bound = account.bytes + account.bytes // 4
        self._push(account)

    def heaviest(self) -> A | None:
        heap = self._heap
        while (entry := heap.first()) is not None:
            account = entry[2]
            if not heap.counts(entry):
                heap.pop()
            elif account.bytes == account.bound:
                return account
            else:
                # Each time paid for by the charges since the bound was true.
                heap.pop()
                account.bound = account.bytes
                self._push(account)
        return None

    def close(self, account: A) -> None:
        del self.accounts[account.owner]
        account.bound = -1  # no entry agrees with it

    def _push(self, account: A) -> None:
        self._pushed += 1
        self._heap.push((-account.bound, self._pushed, account), len(self.accounts))


@attrs.define(eq=False)
class Shares(Generic[A]):
    """The accounts of one store, which `open_account` makes; each weighs `account_bytes` itself."""

    open_account: Callable[[Owner], A]
    account_bytes: int = 0
    bytes: int = attrs.field(init=False, default=0)
    """Of all accounts together."""
    _strangers_bytes: int = attrs.field(init=False, default=0)
    _known: "_Party[A]" = attrs.field(init=False, factory=_Party[Any])
    _strangers: "_Party[A]" = attrs.field(init=False, factory=_Party[Any])

    def __len__(self) -> int:
        """How many owners hold something."""
        return len(self._known.accounts) + len(self._strangers.accounts)

    def get(self, owner: Owner) -> A | None:
        """The account of this owner; None if it holds nothing."""
        return self._party(owner).accounts.get(owner)

    def account(self, owner: Owner) -> A:
        """The account of this owner, opened if need be: charge it at once, or it stays for ever."""
        accounts = self._party(owner).accounts
        account = accounts.get(owner)
        if account is None:
            account = accounts[owner] = self.open_account(owner)
            self._count(account, self.account_bytes)
        return account

    def charge(self, account: A, bytes: int) -> None:  # noqa: A002 - the unit is the name
        """Put more bytes on an account, or fewer if negative; one that holds none is forgotten."""
        party = self._count(account, bytes)
        if account.bytes > account.bound:
            party.lift(account)
        elif account.bytes == self.account_bytes:
            self._count(account, -self.account_bytes)
            party.close(account)

    def heaviest(self) -> A | None:
        """The account that holds the most, of strangers only if these together hold more than any
        user or the app; None where nothing is held.

        Of equal ones, in no order that anyone should rely on. Logarithmic in the owners,
        amortised over the charges.
        """
        known = self._known.heaviest()
        if known is None or self._strangers_bytes > known.bytes:
            return self._strangers.heaviest()
        return known

    def _count(self, account: A, bytes: int) -> "_Party[A]":  # noqa: A002
        self.bytes += bytes
        account.bytes += bytes
        if account.is_stranger:
            self._strangers_bytes += bytes
            return self._strangers
        return self._known

    def _party(self, owner: Owner) -> "_Party[A]":
        return self._strangers if isinstance(owner, int) else self._known
