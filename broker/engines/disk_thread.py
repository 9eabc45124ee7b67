"""The thread in which an engine waits for its disk.

It is there as long as the engine, has one piece of work at a time, and sleeps in between. The loop and the
thread wake each other through a pipe each way: `trio.to_thread` looks for a free thread, makes a limiter and a
context, and comes back through the queue of the loop, which takes longer than many a disk.

Rule: work that has begun is waited for, whoever is cancelled. Nobody else has the file meanwhile.
"""

import os
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import trio

from broker.engines.engine import RunBlocking

T = TypeVar("T")


class _DiskThread:
    """See `open_disk_thread`."""

    def __init__(self) -> None:
        self._work: Callable[[], None] | None = None
        self._asked, self._ask = os.pipe()
        self._told, self._tell = os.pipe()
        # A daemon: a broker that breaks down does not wait for its disk.
        self._thread = threading.Thread(target=self._run, name="engine disk", daemon=True)
        self._thread.start()

    async def __call__(self, work: Callable[[], T], /) -> T:
        await trio.lowlevel.checkpoint_if_cancelled()
        assert self._work is None, "one at a time"
        results: list[T] = []
        errors: list[BaseException] = []

        def do() -> None:
            try:
                results.append(work())
            except BaseException as error:  # noqa: ASYNC103, BLE001 - the caller's, whatever it is
                errors.append(error)

        self._work = do
        os.write(self._ask, b"1")
        with trio.CancelScope(shield=True):
            await trio.lowlevel.wait_readable(self._told)
        os.read(self._told, 1)
        self._work = None
        if errors:
            raise errors.pop()
        return results.pop()

    def _run(self) -> None:
        while os.read(self._asked, 1):
            assert self._work is not None
            self._work()
            os.write(self._tell, b"1")

    def end(self) -> None:
        """Let the thread end, which has nothing to do any more, and close the pipes."""
        os.close(self._ask)
        self._thread.join()
        for end in (self._asked, self._told, self._tell):
            os.close(end)


@asynccontextmanager
async def open_disk_thread() -> AsyncGenerator[RunBlocking]:
    """Does work in a thread of its own for as long as the block, one piece at a time: do not call it while
    it works. Open it around everything that does."""
    thread = _DiskThread()
    try:
        yield thread
    finally:
        thread.end()
