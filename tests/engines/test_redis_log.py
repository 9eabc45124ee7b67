"""What is read from a log in Redis is taken only where it follows what is known: in memory, with the answers
that a server would give."""

from collections.abc import Sequence
from typing import Any

import attrs
import pytest
import structlog.testing
import trio
from trio.testing import wait_all_tasks_blocked

from broker.config.engine_url import RedisUrl
from broker.engines.redis_link import Link
from broker.engines.redis_log import Draft, Flight, Logged, SharedLog
from broker.engines.redis_scripts import FORMAT
from broker.engines.redis_wire import Script, Wire
from broker.engines.waiting import BATCH_PUBLICATIONS

LIFE = "life-1"


@attrs.define(eq=False)
class Reader:
    """It notes what it is told, and has nothing to say."""

    losses: int = 0
    taken: int = 0
    topics: list[str] = attrs.field(factory=list)

    def gather(self) -> tuple[Sequence[Draft], Sequence[object]]:
        return (), ()

    def skips(self, flags: str, topic: str) -> bool:
        return False

    def take(self, logged: Logged, own: object | None) -> float:
        self.topics.append(logged.topic)
        return 0.0

    async def tell_gaps(self) -> None:
        raise AssertionError("nothing has a gap")

    async def rest(self, work: float) -> float:
        return work

    def settled(self) -> None:
        pass

    def finished(self, flight: Flight) -> None:
        pass

    def heard(self, sender: str, message: bytes) -> float:
        return 0.0

    def missed(self, flight: Flight) -> None:
        pass

    async def linked(self, link: Link) -> None:
        pass

    async def beat(self, link: Link) -> None:
        await trio.sleep_forever()

    async def load(self, link: Link) -> None:
        pass

    async def lost(self, link: Link) -> None:
        self.losses += 1


class Answering(Wire):
    """Each script is answered the same."""

    def __init__(self, answer: list[Any]) -> None:
        self.answer = answer
        self.calls: list[tuple[bytes | str | int, ...]] = []

    async def call(self, command: bytes, *parts: bytes | str | int) -> Any:
        self.calls.append((command, *parts))

    async def run(self, script: Script, key: str, *parts: bytes | str | int) -> Any:
        return self.answer


def link_to(place: int, *, lineage: str = LIFE, done: int = 0) -> Link:
    """To a server whose log ends at a place, and that has applied so many batches of ours."""
    wire = Answering([lineage.encode(), place, place, b"", None, done, FORMAT])
    return Link(wire, wire, wire)


async def log_at(place: int) -> tuple[SharedLog, Reader]:
    log, reader = SharedLog(RedisUrl(), "broker", "me", 0), Reader()
    log.reader = reader
    await log.attach(link_to(place))
    return log, reader


def entry(before: int, *, lineage: str = LIFE) -> list[bytes]:
    """Of another node, with one part."""
    head = f"other 1 {before} {lineage} 1700000000000".encode()
    return [b"h", head, b"k 0 1 e1 10 60000 t", b""]


async def test_an_entry_that_follows_is_taken() -> None:
    log, reader = await log_at(5)
    await log._take(link_to(6), b"6-0", entry(5))
    assert (log.place, reader.topics, reader.losses) == (6, ["t"], 0)


async def test_an_entry_that_names_another_before_it_is_a_loss_that_is_told() -> None:
    log, reader = await log_at(5)
    await log._take(link_to(8), b"8-0", entry(7))
    assert (reader.losses, log.losses) == (1, 1)
    assert (log.place, reader.topics) == (8, ["t"])


async def test_an_entry_of_another_lineage_is_a_loss_though_the_place_is_ours() -> None:
    log, reader = await log_at(5)
    await log._take(link_to(6, lineage="life-2"), b"6-0", entry(5, lineage="life-2"))
    assert (reader.losses, log.losses) == (1, 1)
    assert (log.place, log.lineage) == (6, "life-2")


@pytest.mark.parametrize(
    "header", [b"", b"k", b"k 1 one e1 10 60000 t", b"k 1 1 e1 10 60000", b"\xff 1 1 e1 10 60000 t"]
)
async def test_a_part_that_cannot_be_read_is_passed_over_and_counted(header: bytes) -> None:
    log, reader = await log_at(5)
    head, *rest = entry(5)
    with structlog.testing.capture_logs() as lines:
        await log._take(link_to(6), b"6-0", [head, rest[0], header, b"", *rest[1:]])
    assert (log.place, reader.topics, log.misread) == (6, ["t"], 1)
    assert [line["event"] for line in lines] == ["log_misread"]


@pytest.mark.parametrize(
    "fields",
    [[b"of", b"another"], [b"", b""], [b"", b"a b c d e"], [b"", b"n 1 2 l 3 4"], [b"", b"\xff"]],
)
async def test_an_entry_of_another_program_is_taken_out_and_changes_nothing(
    fields: list[bytes],
) -> None:
    log, reader = await log_at(5)
    link = link_to(6)
    with structlog.testing.capture_logs() as lines:
        await log._take(link, b"1700000000000-3", fields)
    assert (log.place, reader.topics, reader.losses, log.misread) == (5, [], 0, 1)
    assert isinstance(link.pump, Answering)
    assert link.pump.calls == [(b"XDEL", "broker:log", b"1700000000000-3")]
    assert "another program" in lines[0]["reason"]
    await log._take(link_to(6), b"6-0", entry(5))
    assert (log.place, reader.topics, reader.losses) == (6, ["t"], 0)


async def test_what_was_applied_is_not_sent_again_and_all_behind_it_is() -> None:
    log, _ = await log_at(5)
    log._flights.extend(Flight(counter, (), (), 0.0, up_to=counter) for counter in (1, 2, 3))
    await log.attach(link_to(7, done=2))
    assert [flight.is_answered for flight in log.flights] == [True, True, False]
    assert log.written == 2


@attrs.define(eq=False)
class Busy(Reader):
    """It has ten batches to say, one after the other."""

    log: SharedLog | None = None
    left: int = 10

    def gather(self) -> tuple[Sequence[Draft], Sequence[object]]:
        assert self.log is not None
        self.left -= 1
        if self.left:
            self.log.wake()
        return [Draft("k", "t", count=BATCH_PUBLICATIONS)], [object()]


async def test_no_more_is_appended_while_much_has_yet_to_be_read_back() -> None:
    log = SharedLog(RedisUrl(), "broker", "me", 0)
    log.reader = Busy(log=log)
    wire = Answering([0, LIFE.encode(), 7])
    log._server_lineage = LIFE

    async def sent() -> int:
        await wait_all_tasks_blocked()
        return log.batches

    async with trio.open_nursery() as nursery:
        log.wake()
        nursery.start_soon(log._write, Link(wire, wire, wire))
        assert await sent() == 2
        log._flights.popleft()  # it is read back
        log._note_moved()
        assert await sent() == 3
        log._flights[0].is_given_up = True  # nobody knows whether it ever will be
        log._note_moved()
        assert await sent() == 4
        nursery.cancel_scope.cancel()
