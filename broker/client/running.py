"""A client as a whole program: Ctrl-C ends it as a shell expects, and kindly.

Python raises `KeyboardInterrupt` in whatever task is at work. There it may be lost, as the context of
an error of that task or in a callback, or end a task whose siblings nobody ends. A cancelled scope
reaches all of them.
"""

import signal
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVarTuple

import trio

_Args = TypeVarTuple("_Args")


def run(main: Callable[[*_Args], Awaitable[None]], *args: *_Args) -> None:
    """Run `main(*args)` on Trio, to its end or to Ctrl-C: for the whole of a program.

    Ctrl-C (SIGINT) cancels it, so every client still says goodbye, 2 s at most, and then the program
    ends with status 130, as shells have it, by `SystemExit`. A second Ctrl-C does not wait for that. An
    exception of `main` comes out as it is. Main thread only, where Python has signals.
    """
    if trio.run(until_signal(partial(main, *args), (signal.SIGINT,))):
        sys.exit(128 + signal.SIGINT)


def until_signal(
    work: Callable[[], Awaitable[None]],
    numbers: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM),
) -> Callable[[], Awaitable[bool]]:
    """Do something until it ends by itself, or a signal ends it: then it is cancelled, and the result
    is true. Its exceptions come out as they are."""

    async def run() -> bool:
        has_ended = False
        raised: Exception | None = None
        async with trio.open_nursery() as nursery:
            await nursery.start(_cancel_on_signal, nursery.cancel_scope, numbers)
            try:
                await work()
            except Exception as error:  # noqa: BLE001 - raised again below
                raised = error
            has_ended = True
            nursery.cancel_scope.cancel()
        if raised is not None:
            raise raised
        return not has_ended

    return run


async def _cancel_on_signal(
    scope: trio.CancelScope,
    numbers: tuple[signal.Signals, ...],
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    with trio.open_signal_receiver(*numbers) as signals:
        task_status.started()
        await anext(signals)
        scope.cancel()
