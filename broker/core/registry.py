"""Who is here: sessions by fd, and the fds of each user.

Rules: an fd starts at 1, only grows and is never used again, so a number that somebody kept
never reaches a stranger. An fd has at most one user, a user any number of fds; both directions
change in one method.
"""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Generic, TypeVar

import attrs

from broker.core.messages import Fd

S = TypeVar("S")


@attrs.frozen
class RegistryStatistics:
    """A snapshot. `last_fd` is also how many sessions there have ever been."""

    sessions: int
    users: int
    last_fd: Fd


@attrs.define(eq=False)
class Registry(Generic[S]):
    """The sessions of one broker, in the order they came."""

    _sessions: dict[Fd, S] = attrs.field(init=False, factory=dict)
    _last_fd: Fd = attrs.field(init=False, default=0)
    _user_of: dict[Fd, str] = attrs.field(init=False, factory=dict)
    _fds_of: dict[str, set[Fd]] = attrs.field(init=False, factory=dict)

    def attach(self, make: Callable[[Fd], S]) -> S:
        """Take the next fd and keep what `make` builds for it, until `detach`.

        If `make` raises, nothing is kept and the number is spent.
        """
        self._last_fd = fd = self._last_fd + 1
        session = self._sessions[fd] = make(fd)
        return session

    def detach(self, fd: Fd) -> S:
        """Forget a session and its user, and return it. Raises `KeyError` if it is not here."""
        session = self._sessions.pop(fd)
        self._move(fd, "")
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

        Steps over the sessions before the page one by one, which is linear in them. Who attaches
        or detaches between two pages makes no other session appear twice or not at all.
        """
        # Fds only grow and a dict keeps its order, so there is nothing to sort.
        following = (session for fd, session in self._sessions.items() if fd > after)
        return list(islice(following, limit))

    def bind(self, fd: Fd, user: str) -> None:
        """Say whose session this is, in place of what was said before; "" says nobody's.

        Raises `KeyError` if the session is not here.
        """
        if fd not in self._sessions:
            raise KeyError(fd)
        self._move(fd, user)

    def fds_of(self, user: str) -> tuple[Fd, ...]:
        """This user's fds in growing order; none for a user who is not here, or for ""."""
        return tuple(sorted(self._fds_of.get(user, ())))

    def user_of(self, fd: Fd) -> str:
        """The user behind an fd; "" if nobody's, or not here."""
        return self._user_of.get(fd, "")

    def statistics(self) -> RegistryStatistics:
        return RegistryStatistics(len(self._sessions), len(self._fds_of), self._last_fd)

    def _move(self, fd: Fd, user: str) -> None:
        before = self._user_of.pop(fd, "")
        if before:
            fds = self._fds_of[before]
            fds.remove(fd)
            if not fds:
                del self._fds_of[before]
        if user:
            self._user_of[fd] = user
            self._fds_of.setdefault(user, set()).add(fd)
