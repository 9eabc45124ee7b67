"""Signals, from the first line of the process to its last.

One handler is installed before anything that takes time is imported, and stays; only what it does
changes with the time of life. So there is no moment without one: a process that is PID 1, as in a
container, has no default action to fall back on, and would not hear a SIGTERM at all.

| when | SIGTERM, SIGINT | SIGHUP |
| --- | --- | --- |
| it starts | the process ends at once: nobody is connected | is kept for later |
| it serves | the first drains, the second cuts, the third ends it at once | reads its files anew |
| it is over | the process ends at once | nothing |

SIGHUP is also how a terminal says that it ends. That is the end of a broker that was started there,
and known by this: the terminal is gone by then. Somebody who sends it to a service means a reload.

That is the command's process. For a program that calls `Broker.run` the handler stands for as long as
that serves.

Rule: nothing is imported here that is not loaded with the interpreter or as good as free.
"""

import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final, Literal, TypeAlias

_Handler: TypeAlias = Callable[[int, FrameType | None], object] | int | signal.Handlers

Order: TypeAlias = Literal["drain", "cut", "reload"]

CUT_SHORT: Final = 1
"""Exit status after a second signal."""

BUSY_SECONDS: Final = 0.5
"""How long a cut may take before the loop counts as stuck. A cut waits for nobody, so it takes
milliseconds; the sender of a second signal is waiting for it."""

STUCK_SECONDS: Final = 2.0
"""When the process is ended even if no Python code can run, as in C code that keeps the
interpreter to itself: after `BUSY_SECONDS` and the flush of the log."""

CLIENTS: Final = frozenset(
    {
        *("pub", "sub", "push", "history", "presence", "request"),
        *("connections", "connection", "topics", "disconnect", "trace", "top", "stats", "nodes"),
        *("config", "token", "engine", "bench", "openapi", "asyncapi", "version"),
    }
)
"""The commands that do not serve: a signal ends them with 128 + its number, as shells have it."""


class Signals:
    """The handler of one process. All of it runs in the main thread, the handler in between."""

    def __init__(self) -> None:
        self.before_exit: Callable[[], object] = lambda: None
        """Called before the process ends at once; must itself end soon."""
        self._installed: dict[int, _Handler] = {}
        self._terminals: list[int] = []
        """Which of stdin, stdout and stderr were a terminal at the start."""
        self._begin()

    def _begin(self) -> None:
        self._ends_with: Callable[[int], int] = _status_by_arguments
        self._deliver: Callable[[Order], object] | None = None
        self._report: Callable[[str], object] = lambda _: None
        self._requests = 0
        self._is_hung_up = False
        self._timer: threading.Timer | None = None

    def install(self) -> None:
        """Handle SIGTERM, SIGINT and SIGHUP from now on. Main thread only."""
        if not self._installed:
            self._terminals = [number for number in range(3) if os.isatty(number)]
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                # None stands for a handler that was not set by Python, and cannot be put back.
                self._installed[number] = signal.signal(number, self._handle) or signal.SIG_DFL

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle them for a block, and then as before; if it was installed before, it stays."""
        if self._installed:
            yield
            return
        self.install()
        try:
            yield
        finally:
            for number in list(self._installed):
                self._give_back(number)
            if self._timer is not None:
                # It has ended in time, and the process may go on.
                self._timer.cancel()
                faulthandler.cancel_dump_traceback_later()
            self._begin()

    def begin_client(self) -> None:
        """Leave Ctrl-C and the end of a terminal to a command that does not serve."""
        self._ends_with = _status_by_number
        self._give_back(signal.SIGINT)
        self._give_back(signal.SIGHUP)

    def begin_serving(self) -> None:
        """Say that this process serves; nobody is connected yet, so a signal still ends it."""
        self._ends_with = lambda _: 0

    def hand_over(
        self, deliver: Callable[[Order], object], report: Callable[[str], object]
    ) -> None:
        """Give what comes from now on to `deliver`, as an order, in a signal handler.

        `report` is called in a thread, with where the loop is stuck, if it is.
        """
        self._report = report
        self._deliver = deliver
        if self._is_hung_up:
            self._is_hung_up = False
            deliver("reload")

    def take_back(self) -> None:
        """Say that nobody is served any more: a signal ends the process at once."""
        self._deliver = None
        self._ends_with = lambda _: CUT_SHORT

    def _give_back(self, number: int) -> None:
        before = self._installed.pop(number, None)
        if before is not None:
            signal.signal(number, before)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGHUP and not _is_gone(self._terminals):
            if self._deliver is None:
                self._is_hung_up = True
            else:
                self._deliver("reload")
            return
        self._requests += 1
        if self._deliver is None:
            self._exit(self._ends_with(number))
        elif self._requests == 1:
            self._deliver("drain")
        elif self._requests == 2:
            self._see_that_it_ends()
            self._deliver("cut")
        else:
            os._exit(CUT_SHORT)

    def _see_that_it_ends(self) -> None:
        self._timer = threading.Timer(BUSY_SECONDS, self._end_busy)
        self._timer.daemon = True
        self._timer.start()
        # In C, in a thread that needs no interpreter. Its dump goes nowhere: it would wait for the
        # reader of stderr as well.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        faulthandler.dump_traceback_later(STUCK_SECONDS, exit=True, file=nowhere)

    def _end_busy(self) -> None:
        if self._deliver is not None:
            self._report(_where(threading.main_thread()))
        self._exit(CUT_SHORT)

    def _exit(self, status: int) -> None:
        self.before_exit()
        os._exit(status)


def _is_gone(terminals: list[int]) -> bool:
    """Whether a terminal that was there has ended: then it is none any more."""
    return any(not os.isatty(number) for number in terminals)


def _status_by_number(number: int) -> int:
    return 128 + number


def _status_by_arguments(number: int) -> int:
    """The status before the command line has been read: of a start that was called off, 0."""
    return 128 + number if sys.argv[1:2] and sys.argv[1] in CLIENTS else 0


def _where(thread: threading.Thread) -> str:
    """The line of code that a thread is in: `app.py:12 in answer`."""
    frame = sys._current_frames().get(thread.ident or 0)
    if frame is None:
        return "unknown"
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"


process: Final = Signals()
"""The one of this process."""
