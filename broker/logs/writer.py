"""Lines on their way to stderr or stdout, written by a thread, so that nobody waits for a reader.

Rules:

1. `write` never waits, however slowly the other end of the stream reads. A line without room
   is dropped and counted; the count is logged when the stream moves again.
2. A line goes out in one write, in order, and whole or not at all.
3. A stream that is absent or closed, or cannot be written, fails nobody.
4. The thread begins with the first line, and is a daemon: no end of the process waits for it.

Only a stream that is a file of the system can block. Any other, such as a `StringIO`, is written
at once and needs no thread.
"""

import io
import os
import queue
import select
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Literal, TextIO, TypeAlias

import attrs

StreamName: TypeAlias = Literal["stderr", "stdout"]

ROOM_BYTES: Final = 2**20
"""Bytes of lines that may wait: some 8,000 of `open`, ten seconds of a flood within its limits.
A pipe holds 64 KiB besides. A single line may be larger: it is taken when nothing else waits."""

IDLE_SECONDS: Final = 1.1
"""Silence after which `on_idle` is called: a little longer than the second of the limiter."""


@attrs.frozen
class LogStatistics:
    """A snapshot; `lines_dropped` counts since the process began."""

    lines_dropped: int
    waiting_bytes: int


@attrs.frozen
class _Line:
    file: io.FileIO
    data: bytes


class LineWriter:
    """Writes lines to `sys.stderr` or `sys.stdout`, whatever these are at the time.

    `on_dropped` is called in the thread, with a number of lines, once there is room again;
    `on_idle`, once after each time that something was written and then nothing for a while.
    """

    def __init__(
        self,
        name: StreamName,
        on_dropped: Callable[[int], None],
        on_idle: Callable[[], None] = lambda: None,
        *,
        room: int = ROOM_BYTES,
    ) -> None:
        self._name = name
        self._on_dropped = on_dropped
        self._on_idle = on_idle
        self._room = room
        self._begin()
        _writers.add(self)

    def _begin(self) -> None:
        # Both may be entered anew by a signal handler or a finalizer that logs; a `Condition`
        # or a `Queue` would wait for itself there.
        self._lock = threading.RLock()
        self._lines: queue.SimpleQueue[_Line | threading.Event | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._waiting = 0
        self._untold = 0
        self._dropped = 0

    def write(self, line: str, *, important: bool) -> None:
        """Write a line, now or as soon as the stream takes it; drop it if too many wait.

        Lines that are not important have half of the room, so that an error finds a place behind.
        """
        stream: TextIO | None = getattr(sys, self._name)
        if stream is None:
            return
        file = _file_of(stream)
        if file is None or not self._has_thread():
            write_now(stream, line)
            return
        data = _encode(stream, line)
        with self._lock:
            bound = self._room if important else self._room // 2
            full = self._waiting and self._waiting + len(data) > bound
            if full or (self._untold and not important):
                self._untold += 1
                self._dropped += 1
                return
            self._waiting += len(data)
            self._lines.put(_Line(file, data))

    def flush(self, seconds: float) -> bool:
        """Wait until what waits now is written, `seconds` at most; say whether it was."""
        if self._thread is None:
            return True
        written = threading.Event()
        self._lines.put(written)
        return written.wait(seconds)

    def close(self, seconds: float) -> None:
        """End the thread once it has written what waits; after `seconds`, leave it to itself."""
        thread = self._thread
        if thread is not None:
            self._lines.put(None)
            thread.join(seconds)
            self._begin()

    def statistics(self) -> LogStatistics:
        with self._lock:
            return LogStatistics(self._dropped, self._waiting)

    def _has_thread(self) -> bool:
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(
                    target=self._run, args=(self._lines,), name=f"log {self._name}", daemon=True
                )
                try:
                    thread.start()
                except RuntimeError:  # the system has no more, or the interpreter is ending
                    return False
                self._thread = thread
            return True

    def _run(self, lines: "queue.SimpleQueue[_Line | threading.Event | None]") -> None:
        idle = True
        while True:
            try:
                item = lines.get(timeout=None if idle else IDLE_SECONDS)
            except queue.Empty:
                idle = True
                self._on_idle()
                continue
            if item is None:
                return
            if isinstance(item, threading.Event):
                item.set()
                continue
            idle = False
            with suppress(OSError, ValueError):  # ValueError: the stream is closed
                _write_all(item.file, item.data)
            self._count_written(len(item.data))

    def _count_written(self, size: int) -> None:
        dropped = 0
        with self._lock:
            self._waiting -= size
            # Not before most has gone: a stream that is always nearly full would else be told of
            # its losses in every second line.
            if self._untold and self._waiting <= self._room // 4:
                dropped, self._untold = self._untold, 0
        if dropped:
            self._on_dropped(dropped)

    def forget_thread(self) -> None:
        """Begin anew in a forked child, which has the lines of its parent, but not its threads."""
        self._begin()


_writers: "weakref.WeakSet[LineWriter]" = weakref.WeakSet()


def _after_fork() -> None:
    for writer in list(_writers):
        writer.forget_thread()


os.register_at_fork(after_in_child=_after_fork)


def write_now(stream: TextIO | None, line: str) -> None:
    """Write a line, wait until it is taken, and suffer a stream that cannot take it."""
    if stream is None:
        return
    # One write, so lines of two processes on one pipe do not mix; flushed, so `| grep` sees it.
    with suppress(OSError, ValueError):  # ValueError: the stream is closed
        try:
            stream.write(line + "\n")
        except UnicodeEncodeError:  # a terminal that is not UTF-8
            stream.write(line.encode("ascii", "backslashreplace").decode() + "\n")
        stream.flush()


def _file_of(stream: TextIO) -> io.FileIO | None:
    """The file of the system below a text stream, past its buffers and their locks.

    A buffer's lock that a thread holds for ever would abort the interpreter at its end.
    """
    buffer = getattr(stream, "buffer", None)
    file = getattr(buffer, "raw", buffer)
    return file if isinstance(file, io.FileIO) else None


def _encode(stream: TextIO, line: str) -> bytes:
    try:
        return f"{line}\n".encode(stream.encoding, stream.errors or "strict")
    except UnicodeEncodeError:  # a terminal that is not UTF-8
        return f"{line}\n".encode("ascii", "backslashreplace")


def _write_all(file: io.FileIO, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        taken = file.write(rest)
        if taken is None:  # somebody who shares it has made it non-blocking, and it is full
            poll = select.poll()
            poll.register(file, select.POLLOUT)
            poll.poll()
            continue
        rest = rest[taken:]
