"""A worker's seat: what its supervisor hands to it, and its leash."""

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from broker import Config
from broker.cli.seat import VARIABLE, Given, Seat, as_worker, take_given


@pytest.fixture
def files() -> Iterator[list[int]]:
    """Four files as a child inherits them."""
    with ExitStack() as stack:
        found = []
        for each in (socket.socket() for _ in range(4)):
            stack.enter_context(each)
            os.set_inheritable(each.fileno(), True)
            found.append(each.fileno())
        yield found


def given(files: list[int], **fields: object) -> Given:
    own, api, counts, leash = files
    return msgspec.structs.replace(
        Given(2, 3, "n2", "memory", "::", 9501, None, "/run", [own], [api], counts, leash),
        **fields,
    )


def test_who_is_nobodys_worker_has_no_seat() -> None:
    assert take_given({"PATH": "/bin"}) is None


def test_a_seat_is_taken_once_and_no_child_inherits_it(files: list[int]) -> None:
    seat = given(files)
    environ = {VARIABLE: msgspec.json.encode(seat).decode(), "PATH": "/bin"}
    assert take_given(environ) == seat
    assert environ == {"PATH": "/bin"}, "a child of the worker is no worker"
    assert [os.get_inheritable(each) for each in files] == [False] * 4


def test_a_worker_has_a_name_and_a_share_of_the_memory(files: list[int]) -> None:
    config = Config(name="all", max_memory_bytes=3 * 2**30, max_connections=7)
    made = as_worker(given(files, unix="/run/b.sock"), config)
    assert (made.name, made.engine, made.host, made.port) == ("n2", "memory", "::", 9501)
    assert made.unix == Path("/run/b.sock")
    assert made.max_memory_bytes == 2**30
    assert made.max_connections == 7


async def test_a_worker_says_once_that_it_serves_and_learns_that_nobody_holds_the_leash() -> None:
    near, far = socket.socketpair()
    async with trio.SocketStream(trio.socket.from_stdlib_socket(near)) as leash:
        seat = Seat(given([1, 2, 3, 4]), None, leash)  # type: ignore[arg-type]
        assert seat.path_of(3) == Path("/run/worker-3.sock")
        await seat.tell_ready(["http://here:1"])
        assert far.recv(1000) == b'["http://here:1"]\n'
        abandoned = trio.Event()

        async def wait() -> None:
            await seat.wait_abandoned()
            abandoned.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await wait_all_tasks_blocked()
            assert not abandoned.is_set()
            far.close()
            with trio.fail_after(10):
                await abandoned.wait()
