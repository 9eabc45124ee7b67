"""One connection to Redis, by answers that a test gives byte for byte."""

import socket
from typing import Any

import pytest
import trio
from trio.testing import MemoryReceiveStream, memory_stream_pair, wait_all_tasks_blocked

from broker.engines.redis_wire import CALL_SECONDS, LinkLost, PlainStream, Script, Wire


async def wired() -> tuple[Wire, trio.StapledStream[Any, Any]]:
    near, far = memory_stream_pair()
    return Wire(near), far


async def heard(far: trio.StapledStream[Any, Any]) -> bytes:
    return bytes(await far.receive_some())


async def test_answers_come_in_the_order_of_the_commands_and_in_any_pieces(
    autojump_clock: object,
) -> None:
    wire, far = await wired()
    found: dict[int, Any] = {}

    async def ask(number: int) -> None:
        found[number] = await wire.call(b"GET", number, "\ud800")

    async with trio.open_nursery() as nursery:
        for number in range(3):
            nursery.start_soon(ask, number)
            await wait_all_tasks_blocked()
        said = await heard(far)
        assert said.startswith(b"*3\r\n$3\r\nGET\r\n$1\r\n0\r\n$3\r\n\xed\xa0\x80\r\n*3\r\n")
        for byte in b"$2\r\nab\r\n:5\r\n%1\r\n+k\r\n*2\r\n_\r\n$-1\r\n":
            await far.send_all(bytes([byte]))
            await wait_all_tasks_blocked()
    assert found == {0: b"ab", 1: 5, 2: {b"k": [None, None]}}


async def test_an_answer_that_nobody_waits_for_any_more_is_no_answer_to_another(
    autojump_clock: object,
) -> None:
    wire, far = await wired()
    with trio.move_on_after(1):
        await wire.call(b"FIRST")
    async with trio.open_nursery() as nursery:

        async def ask() -> None:
            assert await wire.call(b"SECOND") == b"two"

        nursery.start_soon(ask)
        await wait_all_tasks_blocked()
        await far.send_all(b"+one\r\n+two\r\n")


async def test_who_reads_and_is_cancelled_leaves_the_reading_to_the_next(
    autojump_clock: object,
) -> None:
    wire, far = await wired()

    async def ask() -> None:
        assert await wire.call(b"SECOND") == b"two"

    async with trio.open_nursery() as nursery:
        async with trio.open_nursery() as first:
            first.start_soon(wire.call, b"FIRST")
            await wait_all_tasks_blocked()
            nursery.start_soon(ask)
            await wait_all_tasks_blocked()
            first.cancel_scope.cancel()
        await far.send_all(b"+one\r\n+two\r\n")


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"-OOM no more\r\n", "OOM no more"),
        (b"?\r\n", "Protocol error"),
        (b"+one\r\n+two\r\n", "nobody has asked for"),
        (b"", "closed"),
    ],
)
async def test_whatever_goes_wrong_is_one_error(
    autojump_clock: object, answer: bytes, why: str
) -> None:
    wire, far = await wired()
    if answer:
        await far.send_all(answer)
    else:
        await far.send_eof()
    with pytest.raises(LinkLost, match=why):
        await wire.call(b"PING")


async def test_who_does_not_answer_is_waited_for_so_long(autojump_clock: object) -> None:
    wire, _ = await wired()
    began = trio.current_time()
    with pytest.raises(LinkLost, match="it does not answer"):
        await wire.call(b"PING")
    assert trio.current_time() - began == pytest.approx(CALL_SECONDS)
    with trio.move_on_after(100) as scope:
        await wire.wait(b"PING")
    assert scope.cancelled_caught


async def test_a_script_that_the_server_does_not_know_is_sent_along(autojump_clock: object) -> None:
    wire, far = await wired()
    async with trio.open_nursery() as nursery:

        async def run() -> None:
            assert await wire.run(Script("return 1"), "key", "part") == [1, b"x"]

        nursery.start_soon(run)
        assert b"EVALSHA" in await heard(far)
        await far.send_all(b"-NOSCRIPT no matching script\r\n")
        tail = b"$8\r\nreturn 1\r\n$1\r\n1\r\n$3\r\nkey\r\n$4\r\npart\r\n"
        assert await heard(far) == b"*5\r\n$4\r\nEVAL\r\n" + tail
        await far.send_all(b"*2\r\n:1\r\n$1\r\nx\r\n")


async def test_after_a_command_that_was_cut_short_nothing_is_sent(autojump_clock: object) -> None:
    sent: list[bytes] = []

    class Slow(trio.abc.SendStream):
        async def send_all(self, data: bytes | bytearray | memoryview) -> None:
            sent.append(bytes(data))
            await trio.sleep_forever()

        async def wait_send_all_might_not_block(self) -> None: ...
        async def aclose(self) -> None: ...

    wire = Wire(trio.StapledStream(Slow(), MemoryReceiveStream()))
    with trio.move_on_after(1):
        await wire.call(b"FIRST")
    with pytest.raises(LinkLost, match="cut short"):
        await wire.call(b"SECOND")
    assert len(sent) == 1


async def test_a_plain_stream_sends_all_and_receives_what_there_is() -> None:
    ours, theirs = trio.socket.socketpair()
    with theirs:
        near, far = PlainStream(ours), PlainStream(theirs)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        came = bytearray()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(near.send_all, b"x" * 2**20)
            while len(came) < 2**20:
                came += await far.receive_some()
        assert bytes(came) == b"x" * 2**20
        async with trio.open_nursery() as nursery:

            async def receive() -> None:
                with pytest.raises(trio.ClosedResourceError):
                    await near.receive_some()

            nursery.start_soon(receive)
            await wait_all_tasks_blocked()
            await near.aclose()
        with pytest.raises(trio.ClosedResourceError):
            await near.send_all(b"x")
        with pytest.raises(trio.ClosedResourceError):
            await near.receive_some()
        assert await far.receive_some() == b""
