"""Sessions by fd, and the fds of each user.

Rules:

1. An fd only grows and is never used again while this registry lives, so a number that somebody kept
   never reaches a stranger. The first is given from outside, by somebody who knows which were used before.
   Where nodes share the numbers, only those that were leased to this one are given out.
2. A session has at most one user, a user any number of fds; both directions change in one method.
3. A session that is on its way out no longer counts as its user's: `retire`.
"""

from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from math import inf
from typing import Generic, Protocol, TypeVar

import attrs

from broker.core.messages import Fd


class Owned(Protocol):
    """The part of a session that a registry keeps true."""

    @property
    def fd(self) -> Fd: ...

    user: str


S = TypeVar("S", bound=Owned)


@attrs.frozen
class RegistryStatistics:
    """A snapshot. `last_fd` is the last that was given out."""

    sessions: int
    users: int
    last_fd: Fd


@attrs.define(eq=False)
class Registry(Generic[S]):
    """The sessions of one broker, in the order they came. The next to come gets `next_fd`."""

    next_fd: Fd = 1
    on_claim: Callable[[Fd, str, str], None] | None = attrs.field(init=False, default=None)
    """Told whose an fd is from now on, and whose it was; "" is nobody. Never waits."""
    on_low: Callable[[], None] = attrs.field(init=False, default=lambda: None)
    """Called when half of the last lease was given out. Never waits."""
    _end: float = attrs.field(init=False, default=inf)
    _low: float = attrs.field(init=False, default=inf)
    _spare: deque[range] = attrs.field(init=False, factory=deque)
    _sessions: dict[Fd, S] = attrs.field(init=False, factory=dict)
    _fds_of: dict[str, set[Fd]] = attrs.field(init=False, factory=dict)

    def attach(self, make: Callable[[Fd], S]) -> S:
        """Take the next fd and keep what `make` builds for it, until `detach`.

        If `make` raises, nothing is kept and the number is spent. Raises `LookupError` where none is left.
        """
        fd = self.next_fd
        if fd >= self._end:
            raise LookupError("no fd is left")
        self.next_fd = fd + 1
        if self.next_fd >= self._end and self._spare:
            self._begin(self._spare.popleft())
        if fd >= self._low:
            self._low = inf
            self.on_low()
        session = self._sessions[fd] = make(fd)
        return session

    @property
    def fds_left(self) -> float:
        """How many fds may still be given out; infinite unless they are leased."""
        return self._end - self.next_fd + sum(map(len, self._spare))

    def lease(self, fds: range) -> None:
        """Give out these as well, behind those that are left; from the first lease on no others. They
        have to be larger than all before."""
        if self._end == inf or self.next_fd >= self._end:
            self._begin(fds)
        else:
            self._spare.append(fds)
        self._low = fds.start + len(fds) // 2

    def revoke(self) -> None:
        """Give out nothing until the next lease."""
        self._end, self._low = self.next_fd, inf
        self._spare.clear()
        self.on_low()

    def has_any(self, fds: range) -> bool:
        """Whether anybody is here with one of these. Linear in those who were here before."""
        return any(session.fd < fds.stop for session in self.page(fds.start - 1, 1))

    def _begin(self, fds: range) -> None:
        self.next_fd, self._end = fds.start, fds.stop

    def detach(self, fd: Fd) -> S:
        """Forget a session, and return it. Raises `KeyError` if it is not here."""
        session = self._sessions.pop(fd)
        self.retire(session)
        return session

    def get(self, fd: Fd) -> S | None:
        return self._sessions.get(fd)

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[S]:
        """Sessions in fd order. Attaching or detaching meanwhile is an error: copy first."""
        return iter(self._sessions.values())

    def page(self, after: Fd, limit: int) -> list[S]:
        """Up to `limit` sessions with an fd above `after`, in fd order; the first page is after 0.

        Steps over the sessions before the page one by one, which is linear in them. A session that
        attaches or detaches between two pages makes no other appear twice or not at all.
        """
        # Fds only grow and a dict keeps its order, so there is nothing to sort.
        following = (session for fd, session in self._sessions.items() if fd > after)
        return list(islice(following, limit))

    def bind(self, session: S, user: str) -> None:
        """Say whose session this is, in place of what was said before; "" says nobody's."""
        before = self._release(session)
        session.user = user
        if user:
            self._fds_of.setdefault(user, set()).add(session.fd)
        if self.on_claim is not None and user != before:
            self.on_claim(session.fd, user, before)

    def retire(self, session: S) -> None:
        """Count a session as its user's no longer. It keeps its `user`, which close hooks show."""
        before = self._release(session)
        if self.on_claim is not None and before:
            self.on_claim(session.fd, "", before)

    def _release(self, session: S) -> str:
        """Count a session as nobody's; return whose it was."""
        fds = self._fds_of.get(session.user)
        if fds is None or session.fd not in fds:
            return ""
        fds.discard(session.fd)
        if not fds:
            del self._fds_of[session.user]
        return session.user

    def fds_of(self, user: str) -> tuple[Fd, ...]:
        """This user's fds in growing order; none for a user who is not here, or for ""."""
        return tuple(sorted(self._fds_of.get(user, ())))

    def statistics(self) -> RegistryStatistics:
        return RegistryStatistics(len(self._sessions), len(self._fds_of), self.next_fd - 1)
