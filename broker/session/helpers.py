"""The tasks beside the one that serves a connection: a writer while a socket would block, one that waits for hooks.

Most connections never have any, and a nursery takes 20 µs and 1.3 KiB. So theirs is opened with the first, by a
task of its own that is started where the connection's is, and it ends with the last.

Rules:

1. Nobody outlives the connection: at its end its own task waits in `join` for all that are left.
2. An exception of one of them ends all, and the connection with them: `join` raises it.
"""

from collections.abc import Callable
from typing import Final

import attrs
import trio

from broker.core.messages import Close, Initiator, Transport
from broker.errors import CloseCode
from broker.session.profile import Profile
from broker.transport.head import Head
from broker.transport.lane import Lane
from broker.transport.sockets import wake_reader
from broker.transport.tasks import Work


@attrs.define(eq=False)
class Helpers:
    """The helper tasks of one connection, whose own task runs in `home`. `on_failure` is called, in the step in
    which all of them have ended, if one of them has raised an exception."""

    _home: trio.Nursery
    _on_failure: Callable[[], None]
    nursery: trio.Nursery | None = attrs.field(init=False, default=None)
    """Where they run; None while there are none."""
    _wanted: list[tuple[Work, tuple[object, ...]]] = attrs.field(init=False, factory=list)
    """The tasks that are to be started when there is a nursery."""
    _keepers: int = attrs.field(init=False, default=0)
    """Tasks that hold a nursery open: one, and another that has yet to end."""
    _failures: list[BaseException] = attrs.field(init=False, factory=list)
    _is_cancelled: bool = attrs.field(init=False, default=False)
    _ended: trio.Event | None = attrs.field(init=False, default=None)

    def start_soon(self, work: Work, /, *args: object) -> None:
        """Start a task; after `cancel` one that is cancelled at its first checkpoint. Never waits."""
        # A nursery whose last task has ended takes no more, though its keeper has yet to see that.
        if self.nursery is not None and self.nursery.child_tasks:
            self.nursery.start_soon(work, *args)
            return
        self._wanted.append((work, args))
        if len(self._wanted) == 1:
            self._keepers += 1
            self._home.start_soon(self._keep)

    def cancel(self) -> None:
        """End all, and those that are started from now on. Never waits."""
        self._is_cancelled = True
        if self.nursery is not None:
            self.nursery.cancel_scope.cancel()

    async def join(self) -> None:
        """Cancel all that are left and wait for their end, shielded: what they still do, they bound themselves.
        Raises what one of them has raised."""
        self.cancel()
        with trio.CancelScope(shield=True):
            while self._keepers:
                self._ended = trio.Event()
                await self._ended.wait()
        if self._failures:
            failures, self._failures = self._failures, []
            raise BaseExceptionGroup("helpers of a connection", failures)

    async def _keep(self) -> None:
        """Hold a nursery open for as long as it has tasks."""
        nursery = None
        try:
            async with trio.open_nursery() as nursery:
                self.nursery = nursery
                if self._is_cancelled:
                    nursery.cancel_scope.cancel()
                wanted, self._wanted = self._wanted, []
                for work, args in wanted:
                    nursery.start_soon(work, *args)
        except* trio.Cancelled:
            raise  # not by `cancel`: all around the connection ends
        except* BaseException as group:  # noqa: BLE001 - the connection raises it
            self._failures.append(group)
            self._on_failure()
        finally:
            if self.nursery is nursery:
                self.nursery = None
            self._keepers -= 1
            if self._ended is not None:
                self._ended.set()


CUT: Final = Close(CloseCode.ABNORMAL, "cut", Initiator.SHUTDOWN)
"""How a connection ends that is cancelled before it was told to close."""


class Helped(Profile):
    """The part of a connection that knows its tasks: the one that serves it, and those beside."""

    __slots__ = ("_closing", "_reading", "_stream", "helpers", "lane", "task")

    task: trio.lowlevel.Task
    """The one that serves it. This and `lane` are there while the connection runs."""
    lane: Lane

    def __init__(
        self, stream: trio.abc.Stream, head: Head, address: str, transport: Transport
    ) -> None:
        super().__init__(head, address, transport)
        self._stream = stream
        self._closing: Close | None = None
        self._reading: trio.CancelScope | None = (
            None  # around that task's waits, unless it reads a bare socket
        )
        self.helpers: Helpers | None = None

    def start_soon(self, work: Work, /, *args: object) -> None:
        """Start a task that ends with the connection at the latest. Never waits."""
        if self.helpers is None:
            home = self.task.parent_nursery
            assert home is not None, "what serves connections has a nursery for them"
            self.helpers = Helpers(home, self.cut)
        self.helpers.start_soon(work, *args)

    def cut(self) -> None:
        """End it now, wherever its tasks wait. Nothing more is read or sent; then it goes on as at any end."""
        self._closing = self._closing or CUT
        self.lane.lost()
        self.peer.outbox.abandon()
        if self._reading is not None:
            self._reading.cancel()
        else:
            wake_reader(self._stream)
        if self.helpers is not None:
            self.helpers.cancel()
