"""Kinds of names, each told by how it begins and ends.

::

    news.eu        a topic: rules by pattern, else the default ones
    chat:room      a topic of the namespace `chat`: rules by pattern, else those of `chat`
    $plans         a private topic: a subscription token or a hook lets one in, no rule does
    $chat:plans    also a private one, of the namespace `chat`
    room#1,42      a topic for the users 1 and 42 alone
    #42            the personal topic of user 42
    news.*  >      patterns: `*` is one token, `>` the rest
    fd:7  user:42  no topics: one connection, and all connections of one user

Rule: a name is read here and nowhere else. Nothing here knows rules, users that are here, or bytes.
"""

from functools import lru_cache
from typing import Final

from broker.core.messages import Fd
from broker.core.topics import CACHED, check_pattern, check_topic, is_pattern
from broker.errors import ErrorCode, Refused

DIRECT: Final = "fd:"
"""A publication to `fd:7` goes to fd 7 alone."""

PERSONAL: Final = "user:"
"""A publication to `user:alice` goes to every connection of alice."""

PRIVATE: Final = "$"
LIMITED: Final = "#"

RESERVED_NAMESPACES: Final = (DIRECT[:-1], PERSONAL[:-1])
"""Namespaces that stand for connections."""

MAX_FD_DIGITS: Final = 18
"""Longer numbers are no fd that was ever given out, and do not fit 64 bits."""


def is_connection_name(name: str) -> bool:
    """Whether a name stands for connections: `fd:N` or `user:NAME`."""
    return name.startswith((DIRECT, PERSONAL))


def direct_fd(name: str) -> Fd | None:
    """The fd that an `fd:N` name stands for; None for any other name.

    One connection has one name: plain ASCII digits without a leading zero. Raises `Refused` (102)
    for an `fd:` name that is spelled otherwise.
    """
    return _fd_of(name) if name.startswith(DIRECT) else None


@lru_cache(CACHED)
def _fd_of(name: str) -> Fd:
    digits = name[len(DIRECT) :]
    plain = digits.isascii() and digits.isdigit() and not digits.startswith("0")
    if not plain or len(digits) > MAX_FD_DIGITS:
        raise Refused(ErrorCode.UNKNOWN_CHANNEL)
    return int(digits)


def check_name(name: str, max_bytes: int) -> None:
    """Raise `Refused` (107) for a name that is neither a topic nor a pattern."""
    try:
        if is_pattern(name):
            check_pattern(name, max_bytes)
        else:
            check_topic(name, max_bytes)
    except ValueError as error:
        raise Refused(ErrorCode.BAD_REQUEST, str(error)) from None


def check_publishable(name: str, max_bytes: int) -> None:
    """Raise `Refused` (107) for a name that is no topic."""
    try:
        check_topic(name, max_bytes)
    except ValueError as error:
        raise Refused(ErrorCode.BAD_REQUEST, str(error)) from None


def is_private(name: str) -> bool:
    """Whether a name is that of a private topic."""
    return name.startswith(PRIVATE)


def may_cover_private(name: str) -> bool:
    """Whether a name is private, or a pattern that may match a private topic."""
    first = name.partition(".")[0]
    return is_private(name) or (is_pattern(name) and first in ("*", ">"))


def users_of(name: str) -> list[str] | None:
    """The users that a name limits itself to; None where it does not."""
    _, sign, users = name.rpartition(LIMITED)
    return users.split(",") if sign else None


def admits_user(name: str, user: str) -> bool:
    """Whether a name is not limited to users, or to this one among others."""
    users = users_of(name)
    return users is None or (bool(user) and user in users)


def guards_itself(name: str) -> bool:
    """Whether a name says who may in: private, or for some users alone."""
    return LIMITED in name or is_private(name)


def personal_topic(user: str, max_bytes: int) -> str | None:
    """The topic of one user alone; None for nobody, and for a user whose name no topic can hold."""
    name = f"{LIMITED}{user}"
    try:
        check_topic(name, max_bytes)
    except ValueError:
        return None
    return name if users_of(name) == [user] and user else None


def namespace_of(name: str) -> str | None:
    """The part of a name before its colon; None without a colon.

    A user's name behind `#` may have a colon of its own, which is no namespace's.
    """
    own, _, _ = name.removeprefix(PRIVATE).partition(LIMITED)
    namespace, colon, _ = own.partition(":")
    return namespace if colon else None
