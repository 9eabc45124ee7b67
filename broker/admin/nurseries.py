"""The nursery tree as it is now, by Trio's own introspection, in the words of docs/design/lifetimes.md.

Rules:

1. The tree is of one moment: it is read in one step. Linear in the tasks, 0.2 µs each.
2. However many tasks there are, an answer has `MOST` rows at most. Tasks that are alike are counted, and
   the first few of them are shown; the tree of one connection can be asked for.
"""

from collections import Counter
from itertools import islice
from math import isinf
from operator import attrgetter
from typing import Final

import attrs
import trio

from broker.core.messages import Fd
from broker.core.scopes import name_of_scope
from broker.errors import ErrorCode, Refused
from broker.session.accept import STREAM
from broker.session.services import Services

MOST: Final = 100
"""Rows of one answer."""

ALIKE: Final = 3
"""So many tasks of one function are shown, each with what is in it, before the rest is only counted."""

LISTED: Final = 0.2
"""Work of one task, as `core.work` has it."""

_KEEPER: Final = "broker.session.helpers.Helpers._keep"

_WORDS: Final = {
    STREAM: "stream",
    _KEEPER: "keeper",
    "broker.session.connection.Connection._serve": "serving",
    "broker.session.connection.Connection._see_out": "goodbye",
    "broker.session.questions.Questions._ask": "question",
    "broker.transport.listeners.accept_streams": "listener",
    "broker.app._beat": "heartbeat",
    "broker.app.Broker.serve": "Broker.serve",
    "broker.access.jwks.Jwks.run": "issuer's keys",
    "memory": "keeper of memory",
    "admin": "samples for this page",
    "broker.cli.serve._reload_on_signal": "reload",
    "broker.cli.serve._watch": "watch",
    "<init>": "trio",
}
"""Tasks in the words of the page on lifetimes; any other goes by the name of its function."""


@attrs.define
class Scope:
    """One row: a task, a nursery, or several tasks that are alike."""

    kind: str
    """`task`, `nursery` or `tasks`."""
    name: str
    function: str = ""
    """Of a task, in full."""
    count: int = 1
    fd: Fd | None = None
    """Of a task that serves a connection."""
    deadline: float | None = None
    """Seconds until it is cancelled; None if it has no deadline of its own."""
    shielded: bool = False
    cancelled: bool = False
    children: "list[Scope]" = attrs.field(factory=list)


_name = attrgetter("name")


class _Builder:
    """Builds a tree of `MOST` rows at most. The connections that it knows by their fd are the first few,
    and the one that is asked for."""

    def __init__(self, services: Services, fd: Fd | None) -> None:
        connections = services.connections
        few = [*islice(connections, ALIKE), *([] if fd is None else [fd])]
        self._fds = {connections[each].task: each for each in few}
        # The asker is a task of ours: for a connection, which is like any other, or for another node.
        above = _above(trio.lowlevel.current_task().parent_nursery)
        self._ours = [task for task in above if task.name != STREAM]
        self._left = MOST
        self._now = trio.current_time()

    def task(self, task: trio.lowlevel.Task) -> Scope:
        self._left -= 1
        fd = self._fds.get(task)
        name = _word(task.name) if fd is None else f"fd {fd}"
        scope = Scope("task", name, task.name, fd=fd)
        for nursery in task.child_nurseries:
            if self._left <= 0:
                break
            scope.children.append(self.nursery(nursery))
        return scope

    def nursery(self, nursery: trio.Nursery) -> Scope:
        self._left -= 1
        cancel = nursery.cancel_scope
        is_helpers = nursery.parent_task.name == _KEEPER
        name = name_of_scope(nursery) or ("helpers" if is_helpers else "nursery")
        scope = Scope("nursery", name, shielded=cancel.shield, cancelled=cancel.cancel_called)
        if not isinf(cancel.deadline):
            scope.deadline = round(cancel.deadline - self._now, 3)
        scope.children = self._children(nursery.child_tasks)
        return scope

    def _children(self, tasks: frozenset[trio.lowlevel.Task]) -> list[Scope]:
        """The broker before what the program does besides, or that might leave no row for it; then by name,
        and in the order of their fds: a set has none that a person could follow."""
        counts = Counter(map(_name, tasks))
        found = [self.task(task) for task in self._ours if task in tasks]
        shown = Counter(scope.function for scope in found)
        for name in sorted(counts):
            for task in self._few(name, tasks, ALIKE - shown[name]):
                if self._left <= 0:
                    break
                shown[name] += 1
                found.append(self.task(task))
            more = counts[name] - shown[name]
            if more:
                self._left -= 1
                found.append(Scope("tasks", _word(name), name, count=more))
        return found

    def _few(
        self, name: str, tasks: frozenset[trio.lowlevel.Task], most: int
    ) -> list[trio.lowlevel.Task]:
        """Some tasks of one function: those with a known fd first."""
        known = [task for task in self._fds if task in tasks and task.name == name]
        others = (
            task
            for task in tasks
            if task.name == name and task not in self._fds and task not in self._ours
        )
        return [*known, *islice(others, max(0, most - len(known)))][: max(0, most)]


def _word(function: str) -> str:
    return _WORDS.get(function, function.rpartition(".")[2])


def _above(nursery: trio.Nursery | None) -> list[trio.lowlevel.Task]:
    """The tasks that a nursery is in, up to the root."""
    found = []
    while nursery is not None:
        found.append(nursery.parent_task)
        nursery = nursery.parent_task.parent_nursery
    return found


async def nursery_tree(services: Services, fd: Fd | None) -> Scope:
    """The tree of the whole process, or of the task that serves one connection; for a task of this broker.

    Raises `Refused` (102) where that is not here.
    """
    await services.router.turns.pay(len(services.connections) * LISTED)
    if fd is not None and fd not in services.connections:
        raise Refused(ErrorCode.UNKNOWN_CHANNEL, f"no connection has fd {fd}")
    builder = _Builder(services, fd)
    if fd is not None:
        connection = services.connections[fd]
        tree, helpers = builder.task(connection.task), connection.helpers
        if helpers is not None and helpers.nursery is not None:  # their keeper is beside that task
            tree.children.append(builder.nursery(helpers.nursery))
        return tree
    root = trio.lowlevel.current_root_task()
    assert root is not None, "this runs in Trio"
    return builder.task(_first_of_ours(root))


def _first_of_ours(root: trio.lowlevel.Task) -> trio.lowlevel.Task:
    """The main task of `trio.run`: around it are only Trio's own."""
    for nursery in root.child_nurseries:
        for task in nursery.child_tasks:
            if not task.name.startswith(("trio.", "<")):
                return task
    return root
