"""The gate before a socket that several processes accept from: it keeps their connections even.

The system wakes all processes for each connection that comes, and the quickest has it, so that one process of
four gets half. Here each process tells the others, in memory that they share, how many it has. One that has
many more than the least waits a little, and by then another has taken it.

Rules:

1. Each process writes its own cells alone, and nobody waits for another: there is no lock.
2. Nobody waits for a process that has said nothing for a while: it may hang.
3. A process that has waited its turns takes any connection that is there: a wrong count costs milliseconds.
"""

import errno
import mmap
import os
import socket
import time
from collections.abc import Callable
from typing import Final

import attrs
import trio

LEAD: Final = 8
"""Connections that a process may have more than the least: below what anybody notices of a thousand."""

PAUSE: Final = 0.002
"""Seconds that one with more waits for others: they are awake already, and an accept takes 0.1 ms."""

PAUSES: Final = 5
"""Waits until it takes a connection all the same: so busy others cost each at most 10 ms."""

BEAT: Final = 0.5
"""Seconds between two signs of life."""

SILENCE: Final = 2.0
"""Seconds without a sign of life until a process counts for nothing: four beats, because a pause of the event
loop of a second is no death."""

_CELLS: Final = 2  # for each: connections, and milliseconds of the monotonic clock at its last beat
_PASSING: Final = frozenset(
    getattr(errno, name)
    for name in (
        *("EAGAIN", "EINTR", "ECONNABORTED", "EPERM", "EPROTO", "ENETDOWN", "ENOPROTOOPT"),
        *("EHOSTDOWN", "ENONET", "EHOSTUNREACH", "ENETUNREACH", "ETIMEDOUT", "ECONNRESET"),
    )
    if hasattr(errno, name)
)
"""Errors of one connection that ended before it was accepted (see accept(2)), not of the listener."""


def make_shared(processes: int) -> int:
    """A file in memory for the counts of so many processes; its number, which children may inherit."""
    fileno = os.memfd_create("trio-broker-gate")
    os.ftruncate(fileno, processes * _CELLS * 8)
    return fileno


@attrs.define(eq=False)
class Counts:
    """The cells of all processes."""

    cells: memoryview
    clock: Callable[[], float] = time.monotonic

    @classmethod
    def of(cls, fileno: int) -> "Counts":
        """Map a file that `make_shared` made. The file may be closed afterwards."""
        return cls(memoryview(mmap.mmap(fileno, 0)).cast("q"))

    def note(self, place: int, connections: int) -> None:
        """Say how many connections the process at a place has, and that it lives."""
        self.cells[place * _CELLS] = connections
        self.cells[place * _CELLS + 1] = max(1, int(self.clock() * 1000))

    def leave(self, place: int) -> None:
        """Say that the process at a place takes no more: it has died, or is stopping."""
        self.cells[place * _CELLS + 1] = 0

    def connections(self, place: int) -> int:
        """The count of connections that the process at a place told last."""
        return self.cells[place * _CELLS]

    def silence(self, place: int) -> float | None:
        """Seconds since the last sign of life of the process at a place; None if it has left."""
        beat = self.cells[place * _CELLS + 1]
        return None if beat == 0 else self.clock() - beat / 1000

    def least(self) -> int | None:
        """The fewest connections of those that are alive; None if nobody is."""
        alive = [
            self.connections(place)
            for place in range(len(self.cells) // _CELLS)
            if (silence := self.silence(place)) is not None and silence < SILENCE
        ]
        return min(alive, default=None)


@attrs.define(eq=False)
class Gate:
    """The gate of one process. `count` says how many connections it has now."""

    counts: Counts
    place: int
    count: Callable[[], int]

    def note(self) -> None:
        """Tell the others how many there are here."""
        self.counts.note(self.place, self.count())

    def leave(self) -> None:
        """Tell the others that nothing more is accepted here."""
        self.counts.leave(self.place)

    def is_ahead(self) -> bool:
        """Whether another should have the next one."""
        least = self.counts.least()
        return least is not None and self.count() >= least + LEAD

    async def beat(self, is_over: Callable[[], bool]) -> None:
        """Tell the others every `BEAT` seconds, until it is over or cancelled; then they are told that."""
        try:
            while not is_over():
                self.note()
                await trio.sleep(BEAT)
        finally:
            self.leave()


@attrs.define(eq=False)
class GatedListener(trio.abc.Listener[trio.SocketStream]):
    """A listener on a socket that other processes accept from as well. It owns `socket`.

    Not by way of a `trio.SocketListener`: that waits for the next where another was quicker, and takes
    that one past the gate.
    """

    socket: socket.socket
    gate: Gate
    _together: int = attrs.field(init=False, default=0)
    """Those that have come in one step, of which `gate` counts none yet."""

    @classmethod
    def over(cls, listener: trio.SocketListener, gate: Gate) -> "GatedListener":
        """The same socket behind a gate; `listener` is used up."""
        sock = socket.socket(fileno=listener.socket.detach())
        sock.setblocking(False)
        return cls(sock, gate)

    async def accept(self) -> trio.SocketStream:
        """The next connection that no other process has taken. Raises what a `SocketListener` does."""
        pauses = 0
        while True:
            if self.socket.fileno() < 0:
                raise trio.ClosedResourceError
            await trio.lowlevel.wait_readable(self.socket)
            if pauses < PAUSES and self.gate.is_ahead():
                pauses += 1
                await trio.sleep(PAUSE)
                continue
            pauses = 0
            try:
                accepted, _ = self.socket.accept()
            except OSError as error:
                if error.errno not in _PASSING:
                    raise
                continue
            self.gate.note()
            self._together = 1
            return trio.SocketStream(trio.socket.from_stdlib_socket(accepted))

    def accept_nowait(self) -> trio.SocketStream:
        """One that waits and that no other process should have, `LEAD` in all with the last that `accept` has
        returned. Raises `OSError` where there is none."""
        if self._together >= LEAD or self.gate.is_ahead():
            raise BlockingIOError
        accepted, _ = self.socket.accept()
        self._together += 1
        return trio.SocketStream(trio.socket.from_stdlib_socket(accepted))

    async def aclose(self) -> None:
        if self.socket.fileno() >= 0:
            trio.lowlevel.notify_closing(self.socket)
            self.socket.close()
        await trio.lowlevel.checkpoint()
