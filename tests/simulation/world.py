"""One simulation: brokers, their app, their clients, and the checks of what is true of all of them.

`run` plays a script. After each step the clients take what has come, and everything that was said
is held to the rules; at a *rest* everybody is at peace, and it has to be true to the last publication.
At the end everybody goes, and nothing may be left.
"""

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from random import Random
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

import attrs
import trio
from trio.testing import wait_all_tasks_blocked

from broker import (
    Broker,
    Config,
    Refused,
)
from broker.engines.sqlite_file import NotWritten
from broker.testing import Bus, wait_in_line
from tests.simulation.app import App
from tests.simulation.bystander import Bystander
from tests.simulation.carriers import post
from tests.simulation.chances import WALL_BEGAN
from tests.simulation.checks import Checks
from tests.simulation.clients import Client, Conn
from tests.simulation.ledger import Ledger, Witness
from tests.simulation.network import Door, Wire
from tests.simulation.settings import API_KEY, CONFIG, RULES, TOPICS, config_of

if TYPE_CHECKING:
    from tests.simulation.script import Script

T = TypeVar("T")

Engine = Literal["memory", "sqlite", "bus", "redis"]

GONE_SECONDS: Final = 60
"""So long it takes at most until everybody is gone who has gone, whatever the way."""

ANSWER_SECONDS: Final = 5.0
"""How long an answer may take where the time is real: longer than any back-off."""

MOST_STEPS: Final = 200_000
"""Steps of all tasks in one simulation: twenty times of what the longest ones take."""


class Steps(trio.abc.Instrument):
    """Counts what all tasks of the loop have done."""

    def __init__(self) -> None:
        self.taken = 0

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self.taken += 1


@attrs.define(eq=False)
class Seat:
    """One broker: a node where there are several, and the only one else."""

    number: int
    broker: Broker
    scope: trio.CancelScope
    listener: Door
    ended: trio.Event
    witness: Witness
    engine: Any = None
    is_cut: bool = False


class World:
    """See the module."""

    def __init__(self, script: "Script", chance_for: Callable[[str], Random]) -> None:
        self.script = script
        self.ledger = Ledger()
        self.wires_chance = chance_for("wires")
        self.app = App(self)
        self.checks = Checks(self)
        self.conns: dict[int, Conn] = {}
        self.by_fd: dict[int, Conn] = {}
        self.clients = [Client(self, number) for number in range(script.clients)]
        self.orphans: list[Wire] = []
        self.wires: list[Wire] = []
        self.seats: list[Seat] = []
        self.steps = Steps()
        self.vip: list[tuple[int, bool]] = [(0, True)]
        """Since when it is open to users, or closed."""
        self.outbox_messages = CONFIG.outbox_messages
        self.trace = hashlib.blake2b(digest_size=16)
        self.bus = Bus(delay=script.bus_delay)
        self.nursery: trio.Nursery
        self.api: list[tuple[Wire, bytearray]] = []
        self.bystanders: list[Bystander] = []
        self.most_steps = self.most_bytes = 0
        self.sure_from: dict[str, float] = dict.fromkeys(TOPICS, 0.0)
        """Since when nothing but size and age has taken anything from a topic's history."""
        self.disk_fails = self.has_failed = False
        self._numbers = 0

    # small things

    def note(self, data: bytes | str) -> None:
        """Add to the trace, which is the same for the same seed."""
        self.trace.update(data.encode() if isinstance(data, str) else data)
        self.trace.update(b"@%d %.9f;" % (self.steps.taken, trio.current_time()))

    def new_number(self) -> int:
        self._numbers += 1
        return self._numbers

    def new_wire(self, node: int, sliced: bool = False, lag: float = 0.0) -> Wire:
        """A stream that the broker is going to accept; a broken one where there is no such broker."""
        wire = Wire(self.wires_chance, sliced=sliced, lag=lag)
        seat = self.seats[node % len(self.seats)] if self.seats else None
        if seat is None or seat.ended.is_set() or not seat.listener.knock(wire.far_end):
            wire.close()
            return wire
        self.wires.append(wire)
        return wire

    @property
    def living(self) -> list[Seat]:
        return [seat for seat in self.seats if not seat.ended.is_set()]

    def vip_open(self, since: int) -> bool:
        """Whether `vip` was open at any moment since that count of changes."""
        before = [is_open for at, is_open in self.vip if at <= since]
        return any(before[-1:]) or any(is_open for at, is_open in self.vip if at > since)

    @property
    def config(self) -> Config:
        return config_of(self.vip[-1][1], self.outbox_messages)

    def seat_of(self, conn: Conn | None) -> Seat:
        return self.seats[0 if conn is None else conn.node % len(self.seats)]

    # brokers

    async def open_seats(self, count: int) -> None:
        for number in range(count):
            await self.open_seat(number)

    async def open_seat(self, number: int, broker: Broker | None = None) -> Seat:
        """Start a broker, new or once more, in the place of this number."""
        broker = broker or self.app.broker(number)
        if self.script.engine == "bus":
            broker.open_engine = self.bus.open_engine
        broker.wall_clock = lambda: WALL_BEGAN + trio.current_time()
        broker.run_blocking = self._run_blocking
        scope, ended, listener = trio.CancelScope(), trio.Event(), Door()
        witness = Witness()
        seat = Seat(number, broker, scope, listener, ended, witness)

        async def serve(task_status: trio.TaskStatus[Any]) -> None:  # noqa: ASYNC128 - handed on
            try:
                with scope:
                    await broker.serve(listeners=[listener], task_status=task_status)
            finally:
                ended.set()

        await self.nursery.start(serve)
        if self.script.engine == "bus":
            seat.engine = broker.node.router.engine
        if number < len(self.seats):
            self.seats[number] = seat
        else:
            self.seats.append(seat)
        if self.script.has_witness:
            self.ledger.witnesses.append(witness)
            await self.nursery.start(self._watch, seat)
        return seat

    async def _watch(self, seat: Seat, task_status: trio.TaskStatus[None]) -> None:
        async with seat.broker.subscribe(">", capacity=10_000) as messages:
            task_status.started()
            async for told in messages:
                if "retained" not in (told.tags or {}) and not told.topic.startswith("by."):
                    self.ledger.witnessed(seat.witness, told.topic, told.value, told.offset)

    async def restart(self, number: int, kindly: bool) -> None:
        """End a broker and start it again: it counts on, and knows what its engine has kept."""
        seat = self.seats[number % len(self.seats)]
        self.disk_fails = False  # or it could not even be opened
        await self._end(seat, kindly)
        is_one_of_many = self.script.engine in ("bus", "redis")
        await self.open_seat(seat.number, None if is_one_of_many else seat.broker)
        if self.script.engine == "memory":
            self.forget_histories()

    def forget_histories(self) -> None:
        self.sure_from = dict.fromkeys(TOPICS, trio.current_time() + 1e-6)

    async def _end(self, seat: Seat, kindly: bool) -> None:
        self._harm(seat)
        if kindly:
            seat.broker.stop()
            while not seat.ended.is_set():
                self.pump()
                await trio.sleep(0.5)
        else:
            if seat.engine is not None:
                self.bus.kill(seat.engine.node)
            seat.scope.cancel()
            await seat.ended.wait()
        for client in self.clients:
            if client.conn is not None and client.conn.node % len(self.seats) == seat.number:
                client.drop("reset", 4)
        await self.still()

    def _harm(self, seat: Seat) -> None:
        """Whoever is there may be sent away now, and may miss something."""
        for conn in self.conns.values():
            if conn.node % len(self.seats) == seat.number and not conn.closes:
                conn.causes |= {"shutdown", "server"}
                conn.harmed, conn.rested = True, False

    # time

    def pump(self) -> bool:
        """Have all clients take what has come; whether anything has."""
        moved = [client.pump() for client in self.clients]
        moved += [each.pump() for each in self.bystanders]
        moved.append(self._pump_api())
        for wire in list(self.orphans):
            wire.read()
            if wire.has_ended:
                self.orphans.remove(wire)
        return any(moved)

    def _pump_api(self) -> bool:
        moved = False
        for wire, came in list(self.api):
            data = wire.read()
            came += data
            moved = moved or bool(data)
            if wire.has_ended:
                self.api.remove((wire, came))
                if came and not wire.is_reset:
                    self.note(bytes(came))
                    assert bytes(came[9:12]) in (b"200", b"503"), bytes(came)
        return moved

    async def turns(self, count: int) -> None:
        if self.is_real:
            await trio.sleep(0.01)
        for _ in range(count):
            await trio.lowlevel.checkpoint()
        self.pump()

    @property
    def is_real(self) -> bool:
        """Whether a real server has a part in it, and so the real time."""
        return self.script.engine == "redis"

    async def still(self) -> None:
        """Until all tasks wait; where a server may be about to answer, for a while more."""
        if self.is_real:
            await trio.sleep(0.04)
        await wait_all_tasks_blocked()

    async def settle(self) -> None:
        """Until nothing moves but with time."""
        while True:
            await self.still()
            assert self.steps.taken < MOST_STEPS, "something never comes to rest"
            if not self.pump():
                break
        self.ledger.check()

    async def sleep(self, seconds: float) -> None:
        until = trio.current_time() + (min(seconds, 0.2) if self.is_real else seconds)
        while (left := until - trio.current_time()) > 0:
            await trio.sleep(min(left, 2.0))
            await self.settle()

    # what scripts do

    def bind(self, client: Client, user: str) -> None:
        """Make a client's connection another user's."""
        conn = client.conn
        if conn is None or not conn.is_open or conn.closes:
            return
        broker = self.seat_of(conn).broker
        with suppress(KeyError, RuntimeError):
            broker.bind(conn.fd, user)
            conn.users.append((self.ledger.changed(), user))
            self.ledger.void_keys()

    def reload(self, *, is_open: bool, outbox_messages: int) -> None:
        if self.vip[-1][1] != is_open:
            self.vip.append((self.ledger.changed(), is_open))
        self.outbox_messages = outbox_messages
        for seat in self.living:
            config = attrs.evolve(
                self.config, engine=seat.broker.config.engine, name=seat.broker.config.name
            )
            seat.broker.reload(config)

    def call_api(self, wire: Wire, method: str, body: object) -> None:
        request = post(f"/api/{method}", json.dumps(body).encode(), key=API_KEY)
        wire.send(request)
        self.api.append((wire, bytearray()))

    async def remove_history(self, topic: str) -> None:
        if RULES[topic].history_size and self.living:
            with suppress(Refused):
                self.sure_from[topic] = trio.current_time() + 1e-6
                await self.living[0].broker.remove_history(topic)
                self.sure_from[topic] = trio.current_time() + 1e-6

    async def cut_off(self, number: int, seconds: float) -> None:
        seat = self.seats[number % len(self.seats)]
        if self.script.engine == "bus" and not seat.ended.is_set():
            if not seat.is_cut:
                seat.is_cut = True
                self.bus.cut(seat.engine.node)
                self._harm(seat)
            await self.sleep(seconds)
            self.bus.mend(seat.engine)
            seat.is_cut = False

    def lag(self, number: int, seconds: float) -> None:
        seat = self.seats[number % len(self.seats)]
        if self.script.engine == "bus":
            seat.engine.lag = seconds

    async def _run_blocking(self, work: Callable[[], T], /) -> T:
        if self.disk_fails:
            await trio.lowlevel.checkpoint()
            raise NotWritten("disk I/O error")
        return await wait_in_line(work)

    # rest

    async def rest(self) -> None:
        """Everybody is calm, every wire is whole: then nothing may be missing."""
        self.app.moods.calm()
        self.disk_fails = False
        for wire in self.wires:
            wire.heal()
        for seat in self.seats:
            if seat.is_cut:
                self.bus.mend(seat.engine)
                seat.is_cut = False
        await self.sleep(1.5)
        await self.settle()
        if self.is_real:
            await self._wait_answers()
        for client in self.clients:
            self.checks.client(client)
        if self.script.engine in ("memory", "sqlite"):
            for topic in TOPICS:
                await self.checks.topic(topic)
        for client in self.clients:
            conn = client.conn
            if conn is not None:
                conn.rested, conn.harmed = True, False
                conn.wire.was_stalled = False
                witness = self.seat_of(conn).witness
                for sub in client.subs.values():
                    sub.rested, sub.seen, sub.place = True, [], len(witness.order)

    async def _wait_answers(self) -> None:
        """A hook that naps, or an engine that has lost its server, may take longer than `sleep` does here."""
        with trio.move_on_after(ANSWER_SECONDS):
            while any(client.open_asked for client in self.clients):
                await trio.sleep(0.05)
                await self.settle()

    # the beginning and the end

    async def play(self) -> None:
        before = trio.lowlevel.current_statistics().tasks_living
        trio.lowlevel.add_instrument(self.steps)
        async with trio.open_nursery() as self.nursery:
            try:
                await self._play_steps()
                await self._finish()
            except BaseException:
                self.has_failed = True  # what follows from that says nothing
                raise
        left = trio.lowlevel.current_statistics().tasks_living - before
        assert not left, f"{left} tasks are left"
        open_wires = [wire for wire in self.wires if not wire.is_closed]
        assert not open_wires, f"{len(open_wires)} streams are left open"

    async def _play_steps(self) -> None:
        await self.open_seats(self.script.nodes)
        for seat in self.seats:
            self.bystanders.append(await Bystander.arrive(self, seat.number))
        for number, step in self.script.steps:
            self.note(f"{number}")
            await step.do(self)
            await self.turns(step.turns)
            await self.check_bystanders()

    async def check_bystanders(self) -> None:
        """Each sends something to itself, and has it back in its time."""
        for bystander, seat in zip(self.bystanders, self.seats, strict=True):
            if bystander.is_here and not seat.is_cut and not self.disk_fails:
                await bystander.round_trip()

    @property
    def bytes_sent(self) -> int:
        """By all brokers, to everybody."""
        return sum(wire.bytes_sent for wire in self.wires)

    async def _finish(self) -> None:
        await self.rest()
        for client in self.clients:
            client.stops_after = -1
            client.close(1000)
        await self.sleep(0.5)
        for client in self.clients:
            client.drop("half_close", 4)
        for bystander in self.bystanders:
            bystander.leave()
        for _ in range(GONE_SECONDS):  # a client that has vanished is missed by its pings
            if not any(seat.broker.node.services.admission.count() for seat in self.living):
                break
            await self.sleep(1.0)
        await self.sleep(1.0)
        for seat in self.living:
            self.checks.nothing_left(seat)
        for seat in self.living:
            seat.broker.stop()
        while self.living:
            await trio.sleep(0.5)
            self.pump()
        self.ledger.check()
        for conn in self.conns.values():
            if conn.let_in:
                assert conn.closes == 1, f"the close hook of fd {conn.fd}: {conn.closes} times"
