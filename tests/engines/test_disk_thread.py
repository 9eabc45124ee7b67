"""The thread that waits for a disk: whose work it does, what comes back, and when it ends."""

import threading

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from broker.engines.disk_thread import open_disk_thread
from broker.engines.engine import RunBlocking


async def test_work_is_done_in_one_thread_which_has_ended_with_the_block() -> None:
    async with open_disk_thread() as disk:
        one, other = [await disk(threading.current_thread) for _ in range(2)]
        assert one is other
        assert one is not threading.main_thread()
        assert one.is_alive()
    assert not one.is_alive()


async def test_others_run_while_the_disk_is_waited_for() -> None:
    released = threading.Event()

    async def release() -> None:
        released.set()

    async with open_disk_thread() as disk, trio.open_nursery() as nursery:
        nursery.start_soon(release)
        assert await disk(lambda: released.wait(60))


async def test_an_error_comes_back_and_the_thread_goes_on() -> None:
    def fail() -> None:
        raise OSError("no disk")

    async with open_disk_thread() as disk:
        with pytest.raises(OSError, match="no disk"):
            await disk(fail)
        assert await disk(lambda: 7) == 7


async def test_a_cancelled_caller_waits_for_the_end_of_what_has_begun() -> None:
    released = threading.Event()
    ends: list[bool] = []

    async def wait(disk: RunBlocking, scope: trio.CancelScope) -> None:
        with scope:
            ends.append(await disk(lambda: released.wait(60)))
            await trio.lowlevel.checkpoint()
            ends.append(False)

    async with open_disk_thread() as disk, trio.open_nursery() as nursery:
        scope = trio.CancelScope()
        nursery.start_soon(wait, disk, scope)
        await wait_all_tasks_blocked()
        scope.cancel()
        await wait_all_tasks_blocked()
        assert ends == []
        released.set()
    assert ends == [True]


async def test_who_is_cancelled_already_begins_nothing() -> None:
    done: list[None] = []
    async with open_disk_thread() as disk:
        with trio.CancelScope() as scope:
            scope.cancel()
            await disk(lambda: done.append(None))
        assert await disk(lambda: 7) == 7
    assert done == []
