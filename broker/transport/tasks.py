"""How a connection starts a task of its own: the one type that all who need a task share."""

from collections.abc import Awaitable, Callable
from typing import Protocol, TypeAlias

Work: TypeAlias = Callable[..., Awaitable[object]]
"""What a task does."""


class StartSoon(Protocol):
    """The function that starts a task: of a connection, with which the task ends at the latest, or of a nursery.
    Never waits."""

    def __call__(self, work: Work, /, *args: object) -> object: ...


def start_nothing(work: Work, /, *args: object) -> None:
    """In place of a connection's function once it has ended: raises `RuntimeError`."""
    raise RuntimeError("this connection has ended")
