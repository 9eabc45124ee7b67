"""Several brokers that are one, in one process, on virtual time: a log in memory, and nodes with faults.

::

    async def test_a_message_reaches_another_node(autojump_clock):
        bus = Bus()
        async with open_test_node(bus, Broker()) as one, open_test_node(bus, Broker()) as two:
            ann = await one.open_client()
            bob = await two.open_client()
            await ann.request(publish={"channel": f"fd:{bob.fd}", "data": "hi"})
            assert await bob.receive_json() == ...

A `Bus` is what a shared store is to real nodes, with all of its promises: one log, one inbox a node, notices,
cards, leases. Each node reads it at its own pace. `kill` has a node die without a goodbye, `cut` cuts it off, and
`BusEngine.lag` has it read late.
"""

import secrets
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Final, TypeAlias

import attrs
import trio

from broker.config.settings import Config, TopicRules
from broker.core.history import HistoryStore
from broker.core.messages import Fd, Position
from broker.core.names import PERSONAL
from broker.core.session import Parcel
from broker.core.work import SLICE, Allowance
from broker.engines.cluster import BEAT_SECONDS, LEASE_SECONDS, Card, ClusterLink, Listener
from broker.engines.engine import (
    NOWHERE,
    Durability,
    EngineStatistics,
    RunBlocking,
    Sink,
    Submission,
)
from broker.engines.memory import Memory
from broker.engines.waiting import LITTLE_BYTES
from broker.errors import ErrorCode, Refused

FULL_BYTES: Final = 4 * 2**20

CLOSE_SECONDS: Final = 5.0

Read: TypeAlias = Callable[["BusEngine"], float]
"""Carries out an entry when a node reads it; returns the work of it."""

Write: TypeAlias = Callable[["Bus"], None]
"""Carries out an entry that a node has written, when the bus gets it."""


@attrs.define(eq=False)
class _Seat:
    """A node, as the bus knows it."""

    engine: "BusEngine"
    beaten_at: float
    is_dead: bool = False
    buried_by: str = ""
    notices: dict[str, bytes] = attrs.field(factory=dict)
    cards: dict[str, dict[str, tuple[bytes, str]]] = attrs.field(factory=dict)


class Bus:
    """The store that nodes share. `delay` is the seconds that an entry takes to each of them."""

    def __init__(self, delay: float = 0.0) -> None:
        self.delay = delay
        self.seats: dict[str, _Seat] = {}
        self.last_fd: Fd = 0
        self._epochs: dict[str, str] = {}
        self._place = 0
        self._kept: list[Read] = []
        self._once: dict[tuple[str | None, str, str], Position | None] = {}

    # nodes

    @asynccontextmanager
    async def open_engine(
        self,
        config: Config,
        wall_clock: Callable[[], float],
        first_fd: Fd = 1,
        run_blocking: RunBlocking | None = None,
    ) -> AsyncGenerator["BusEngine"]:
        """The engine of one more node; put it in place of `Broker.open_engine`."""
        engine = BusEngine(self, config.history_bytes, config.retained_bytes, first_fd)
        async with engine.expiring():
            yield engine

    def new_epoch(self, topic: str) -> str:
        return self._epochs.setdefault(topic, secrets.token_hex(4))

    def forget(self, is_over: Callable[[str], bool]) -> None:
        self._epochs = {each: e for each, e in self._epochs.items() if not is_over(each)}

    def enter(self, engine: "BusEngine") -> None:
        """A new node: it reads what there was at once, and from here on all that comes."""
        self.seats[engine.node] = _Seat(engine, trio.current_time())
        for learn in self._kept:
            learn(engine)
        for node, seat in self.seats.items():
            for name, value in seat.notices.items():
                engine.listener.noticed(node, name, value)

    def leave(self, node: str) -> None:
        """A node has stopped in good order."""
        if self.seats.pop(node, None) is not None:
            self._append(lambda engine: engine.read_gone(node))

    def beat(self, node: str, since: float) -> None:
        """A node lives, and has been beating `since` then."""
        now = trio.current_time()
        self.seats[node].beaten_at = now
        if now - since < LEASE_SECONDS:
            return
        for other, seat in list(self.seats.items()):
            buried_by = self.seats.get(seat.buried_by)
            if not seat.is_dead and now - seat.beaten_at >= LEASE_SECONDS:
                seat.is_dead, seat.notices = True, {}
                self._append(partial(_read_gone, other))
            elif not seat.is_dead or (buried_by is not None and not buried_by.is_dead):
                continue
            seat.buried_by = node
            self.seats[node].engine.put(partial(_read_burial, other))

    # what nodes write

    def write(self, node: str, batch: Sequence[Write]) -> bool:
        """Do all of a batch; false for a node that is dead."""
        seat = self.seats.get(node)
        if seat is None or seat.is_dead:
            return False
        for write in batch:
            write(self)
        return True

    def publish(self, engine: "BusEngine", submission: Submission) -> None:
        parcel, key = submission.parcel, submission.key
        once = None if key is None else (key.owner, parcel.topic, key.key)
        if once is not None and once in self._once:
            engine.put(partial(_settle, submission, self._once[once]))
            return
        name = parcel.topic
        if name.startswith(PERSONAL) and not self.read(name):
            text = f"user {name[len(PERSONAL) :]!r} has no connection"
            engine.put(partial(_settle, submission, Refused(ErrorCode.UNKNOWN_CHANNEL, text)))
            return
        parcel.place = self._place
        self._place += sum(map(len, parcel.batches))
        kept = parcel, submission.rules, submission.keep, submission.retain
        if submission.keep or submission.retain:
            self._kept.append(partial(_learn, (_copy(parcel), *kept[1:])))
        for seat in self._living():
            if seat.engine is engine:
                engine.put(partial(_read_own, submission, self, once))
            else:
                seat.engine.put(partial(_read_parcel, (_copy(parcel), *kept[1:])))

    def settle_key(self, once: tuple[str | None, str, str], position: Position | None) -> None:
        self._once[once] = position

    def remove(self, topic: str) -> None:
        read = partial(_read_removal, topic)
        self._kept.append(read)
        self._append(read)

    def tell(self, sender: str, to: str, message: bytes) -> None:
        seat = self.seats.get(to)
        if seat is not None and not seat.is_dead:
            seat.engine.put(lambda engine: engine.listener.heard(sender, message))

    def announce(self, sender: str, message: bytes) -> None:
        self._append(lambda engine: engine.listener.heard(sender, message))

    def post(self, node: str, name: str, value: bytes | None) -> None:
        notices = self.seats[node].notices
        if value is None:
            notices.pop(name, None)
        else:
            notices[name] = value
        self._append(lambda engine: engine.read_notice(node, name, value))

    def file(self, node: str, drawer: str, name: str, value: bytes | None, owner: str) -> None:
        drawers = self.seats[node].cards
        if value is not None:
            drawers.setdefault(drawer, {})[name] = value, owner
        elif drawer in drawers:
            drawers[drawer].pop(name, None)
            if not drawers[drawer]:
                del drawers[drawer]

    # what nodes read

    def read(self, drawer: str) -> dict[str, tuple[bytes, str]]:
        found: dict[str, tuple[bytes, str]] = {}
        for seat in self._living():
            found |= seat.cards.get(drawer, {})
        return found

    def lease_fds(self, count: int, above: Fd) -> range:
        first = max(self.last_fd, above) + 1
        self.last_fd = first + count - 1
        return range(first, first + count)

    def leftovers(self, node: str, most: int) -> list[Card]:
        seat = self.seats.get(node)
        if seat is None:
            return []
        cards = [
            Card(drawer, name, value)
            for drawer, found in seat.cards.items()
            for name, (value, _) in found.items()
        ]
        if not cards:
            del self.seats[node]
        return cards[:most]

    def clear(self, node: str, cards: Sequence[Card]) -> None:
        for card in cards:
            self.file(node, card.drawer, card.name, None, "")

    # faults

    def kill(self, node: str) -> None:
        """A node is no more, without a goodbye: it writes and reads nothing from now on."""
        self.seats[node].engine.is_killed = True

    def cut(self, node: str) -> None:
        """A node reaches the bus no more, until it is mended: it can neither write, read nor beat."""
        self.seats[node].engine.is_cut = True

    def mend(self, engine: "BusEngine") -> None:
        engine.is_cut = False
        engine.wake()

    def lose_all(self) -> None:
        """The store is empty, as after a restart without a disk: nobody knows of anybody's facts."""
        for seat in self._living():
            seat.notices, seat.cards = {}, {}
        self.last_fd = 0
        self._append(lambda engine: engine.read_loss())

    def _living(self) -> list[_Seat]:
        return [seat for seat in self.seats.values() if not seat.is_dead]

    def _append(self, read: Read | Callable[["BusEngine"], object]) -> None:
        for seat in self._living():
            seat.engine.put(read)


def _copy(parcel: Parcel) -> Parcel:
    """As another node reads it: it knows nothing of those who wait for it here."""
    return attrs.evolve(
        parcel, batches=[list(batch) for batch in parcel.batches], report=None, shared=None
    )


def _settle(
    submission: Submission, position: Position | Refused | None, engine: "BusEngine"
) -> float:
    engine.settle(submission, position)
    return 0.0


def _read_own(
    submission: Submission,
    bus: Bus,
    once: tuple[str | None, str, str] | None,
    engine: "BusEngine",
) -> float:
    parcel = submission.parcel
    work, position = engine.deliver(parcel, submission.rules, submission.keep, submission.retain)
    if once is not None:
        bus.settle_key(once, position)
    engine.settle(submission, position)
    return work


def _read_parcel(kept: tuple[Parcel, TopicRules, bool, bool], engine: "BusEngine") -> float:
    return engine.deliver(*kept)[0]


def _learn(kept: tuple[Parcel, TopicRules, bool, bool], engine: "BusEngine") -> float:
    parcel, rules, keep, retain = kept
    engine.learn(_copy(parcel), rules, keep, retain)
    return 0.0


def _read_removal(topic: str, engine: "BusEngine") -> float:
    return engine.read_removal(topic)


def _read_burial(node: str, engine: "BusEngine") -> float:
    return engine.read_burial(node)


def _read_gone(node: str, engine: "BusEngine") -> float:
    return engine.read_gone(node)


class BusEngine(Memory):
    """An engine on a `Bus`; it is its own `ClusterLink`."""

    durability: Durability = "shared"
    is_shared = True

    def __init__(self, bus: Bus, max_bytes: int, retained_bytes: int = 0, first_fd: Fd = 1) -> None:
        super().__init__(max_bytes, retained_bytes, bus.new_epoch)
        self.bus = bus
        self._max_bytes = max_bytes
        self.cluster: ClusterLink = self
        self.next_fd = first_fd
        self.node: str = secrets.token_hex(4)
        self.listener: Listener
        self.is_cut = self.is_killed = False
        self.lag: float = 0.0
        """Seconds that this node reads behind the others."""
        self._sink: Sink
        self._writes: deque[tuple[Write, Submission | None, int]] = deque()
        self._bytes = 0
        self._reads: deque[tuple[float, Callable[[BusEngine], object]]] = deque()
        self._open: dict[Submission, int] = {}
        self._news = trio.lowlevel.ParkingLot()
        self._written = trio.Event()
        self.beating_since: float = 0.0

    # publishing

    def defers(self, topic: str, rules: TopicRules, *, more: bool = False) -> bool:
        self._check()
        return True

    def submit(self, submission: Submission) -> None:
        self._check()
        size = sum([len(each.data) + 100 for b in submission.parcel.batches for each in b])
        self._open[submission] = size
        self._write(lambda bus: bus.publish(self, submission), size, submission)

    def is_full(self, party: Allowance | None = None, size: int = LITTLE_BYTES) -> bool:
        return self._bytes > FULL_BYTES

    async def wait_room(self) -> None:
        self._written = trio.Event()
        if self.is_full():
            await self._written.wait()
        else:
            await trio.lowlevel.checkpoint()

    def settle(self, submission: Submission, position: Position | Refused | None) -> None:
        if self._open.pop(submission, None) is not None:
            self.wake()
            for done in submission.dones:
                done(position)

    def knows(self, topic: str, since: Position | None = None) -> bool:
        return since is None or self.position(topic).reaches(since)

    async def fetch(
        self, topics: Sequence[str], since: Mapping[str, Position | None] = NOWHERE
    ) -> None:
        await trio.lowlevel.checkpoint()
        if all(self.knows(topic, since[topic]) for topic in since):
            return
        with trio.move_on_after(4.0):
            while self.is_cut or self.is_killed:
                await self._news.park()
            read = trio.Event()
            self.put(lambda engine: read.set())
            await read.wait()
            return
        raise Refused(ErrorCode.INTERNAL, "history is away: the bus does not answer")

    async def remove(self, topic: str) -> None:
        self._check()
        self._write(lambda bus: bus.remove(topic))
        await self._wait_written()

    def forget(self, is_over: Callable[[str], bool]) -> None:
        self.bus.forget(is_over)
        self._store.forget(is_over)

    def note_fds(self, next_fd: Fd) -> None:
        pass  # they are leased

    # the cluster

    def listen(self, listener: Listener) -> None:
        self.listener = listener

    def tell(self, node: str, message: bytes) -> None:
        self._check()
        self._write(lambda bus: bus.tell(self.node, node, message), len(message))

    def announce(self, message: bytes) -> None:
        self._check()
        self._write(lambda bus: bus.announce(self.node, message), len(message))

    def post(self, name: str, value: bytes | None) -> None:
        self._write(lambda bus: bus.post(self.node, name, value))

    def file(self, drawer: str, name: str, value: bytes | None, owner: str = "") -> None:
        self._write(lambda bus: bus.file(self.node, drawer, name, value, owner))

    async def read(self, drawer: str, most: int) -> Mapping[str, bytes]:
        await self._wait_written()
        cards = self.bus.read(drawer)
        if len(cards) > most:
            raise Refused(ErrorCode.LIMIT_EXCEEDED, f"more than {most}")
        return {name: value for name, (value, _) in cards.items()}

    async def count(self, drawer: str) -> tuple[int, int]:
        await self._wait_written()
        cards = self.bus.read(drawer)
        return len(cards), len({owner for _, owner in cards.values()})

    async def lease_fds(self, count: int, above: Fd) -> range:
        await self._wait_written()
        return self.bus.lease_fds(count, above)

    async def leftovers(self, node: str, most: int) -> Sequence[Card]:
        await self._wait_written()
        return self.bus.leftovers(node, most)

    async def clear(self, node: str, cards: Sequence[Card]) -> None:
        await self._wait_written()
        self.bus.clear(node, cards)

    # what the bus gives back

    def put(self, read: Callable[["BusEngine"], object]) -> None:
        """To be read when its time has come, behind what was put before."""
        due = trio.current_time() + self.bus.delay + self.lag
        self._reads.append((due, read))
        self.wake()

    def wake(self) -> None:
        self._news.unpark_all()

    def learn(self, parcel: Parcel, rules: TopicRules, keep: bool, retain: bool) -> None:
        """Keep a parcel that was published before this node was there, and deliver nothing."""
        self._keep(parcel, rules, keep)
        if retain:
            self.retained.deliver(parcel)

    def deliver(
        self, parcel: Parcel, rules: TopicRules, keep: bool, retain: bool
    ) -> tuple[float, Position | None]:
        position = self._keep(parcel, rules, keep)
        return self._sink.deliver(parcel, retain=retain), position

    def _keep(self, parcel: Parcel, rules: TopicRules, keep: bool) -> Position | None:
        if not keep:
            return None
        now, size, ttl = trio.current_time(), rules.history_size, rules.history_ttl
        parcel.batches = [
            self._store.extend(parcel.topic, batch, now, size, ttl) for batch in parcel.batches
        ]
        return self._store.position(parcel.topic, now)

    def read_notice(self, node: str, name: str, value: bytes | None) -> float:
        self.listener.noticed(node, name, value)
        return 0.0

    def read_gone(self, node: str) -> float:
        if node != self.node:
            self.listener.gone(node)
        return 0.0

    def read_burial(self, node: str) -> float:
        self.listener.bury(node)
        return 0.0

    def read_removal(self, topic: str) -> float:
        self._store.remove(topic, trio.current_time())
        return 0.0

    def read_loss(self) -> float:
        self.listener.restate()
        return 0.0

    # life

    @asynccontextmanager
    async def running(self, sink: Sink) -> AsyncGenerator[None]:
        self._sink = sink
        self.beating_since = trio.current_time()
        self.bus.enter(self)
        async with trio.open_nursery() as tasks:
            for task in (self._write_on, self._read_on, self._beat_on):
                tasks.start_soon(task, name=task.__name__)
            try:
                yield
                with trio.move_on_after(CLOSE_SECONDS), suppress(Refused):
                    await self._wait_written()
                    while self._open:
                        await self._news.park()
            finally:
                if not self.is_killed:
                    self.bus.leave(self.node)
                self._refuse_open()
                tasks.cancel_scope.cancel()

    def statistics(self) -> EngineStatistics:
        return EngineStatistics(self._store.statistics(), waiting=self._bytes)

    def _check(self) -> None:
        if self.is_cut or self.is_killed:
            raise Refused(ErrorCode.INTERNAL, "the bus does not answer")

    def _write(self, write: Write, size: int = 0, submission: Submission | None = None) -> None:
        self._writes.append((write, submission, size))
        self._bytes += size
        self.wake()

    async def _wait_written(self) -> None:
        """Wait until all is written that was said before. Raises `Refused` (100) after 2 s."""
        with trio.move_on_after(2.0):
            await trio.lowlevel.checkpoint()
            while self._writes or self.is_cut or self.is_killed:
                await self._news.park()
            return
        raise Refused(ErrorCode.INTERNAL, "the bus does not answer")

    async def _write_on(self) -> None:
        while True:
            if self._writes and not self.is_cut and not self.is_killed:
                batch = list(self._writes)
                self._writes.clear()
                self._bytes -= sum([size for _, _, size in batch])
                self._written.set()
                if not self.bus.write(self.node, [write for write, _, _ in batch]):
                    self._lapse()
                self.wake()
            await self._news.park()

    async def _read_on(self) -> None:
        work = 0.0
        while True:
            while self._reads and not self.is_cut and not self.is_killed:
                due, read = self._reads[0]
                if due > trio.current_time():
                    await trio.sleep_until(due)
                    continue
                self._reads.popleft()
                done = read(self)
                self._sink.settled()
                work += done if isinstance(done, float) else 0.0
                if work > SLICE:
                    work = 0.0
                    await trio.lowlevel.checkpoint()
            await self._news.park()

    async def _beat_on(self) -> None:
        while True:
            await trio.sleep(BEAT_SECONDS)
            if self.is_killed:
                continue
            if self.is_cut:
                self.beating_since = trio.current_time()
            elif self.bus.write(self.node, ()):
                self.bus.beat(self.node, self.beating_since)
            else:
                self._lapse()

    def _lapse(self) -> None:
        """It was declared dead: all that waits is refused, and it goes on as another."""
        self._writes.clear()
        self._reads.clear()
        self._bytes = 0
        self._refuse_open()
        self.node = secrets.token_hex(4)
        self.beating_since = trio.current_time()
        # Entries that passed meanwhile are lost: the node learns everything anew.
        self._store = HistoryStore(self._max_bytes, self.bus.new_epoch, meter=self.meter)
        self.listener.lapsed()
        self.bus.enter(self)

    def _refuse_open(self) -> None:
        refused = Refused(ErrorCode.INTERNAL, "the node was cut off: not known whether it was kept")
        for submission in list(self._open):
            self.settle(submission, refused)
        self._sink.settled()
