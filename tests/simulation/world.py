"""One simulation: brokers, their app, their clients, and the checks of what is true of all of them.

`run` plays a script. After each step the clients take what has come, and everything that was said
is held to the rules; at a *rest* everybody is at peace, and it has to be true to the last publication.
At the end everybody goes, and nothing may be left.
"""

import hashlib
import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

import attrs
import structlog
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from broker import (
    Broker,
    Close,
    Config,
    ConnectEvent,
    Connection,
    ConnectReply,
    Disconnect,
    Frame,
    PublishEvent,
    Refused,
    SubscribeEvent,
    TopicPattern,
    TopicRules,
)
from broker.core.memory import Part
from broker.engines.sqlite_file import NotWritten
from broker.testing import Bus, wait_in_line
from tests.simulation.bystander import Bystander
from tests.simulation.carriers import post
from tests.simulation.chances import WALL_BEGAN, decided_by
from tests.simulation.clients import Asked, Client, Conn, Sub
from tests.simulation.ledger import Ledger, Sent, Told, Witness, number_of
from tests.simulation.network import Door, Wire

if TYPE_CHECKING:
    from tests.simulation.script import Script

T = TypeVar("T")

Engine = Literal["memory", "sqlite", "bus", "redis"]

RULES: Final = {
    "news": TopicRules(history_size=10, history_ttl=30.0, retain=True),
    "chat": TopicRules(history_size=8, history_ttl=30.0, slow_consumer="drop_oldest"),
    "tick": TopicRules(history_size=20, history_ttl=30.0, slow_consumer="latest"),
    "live": TopicRules(history_size=0, slow_consumer="drop_oldest"),
    "vip": TopicRules(history_size=6, history_ttl=30.0, may_subscribe="users", may_publish="users"),
    "work": TopicRules(history_size=5, history_ttl=30.0),
}
TOPICS: Final = tuple(RULES)

CLOSED: Final = attrs.evolve(RULES["vip"], may_subscribe="none", may_publish="none")
"""The rules of `vip` while it is closed to everybody."""

API_KEY: Final = "the key of this simulation"

CONFIG: Final = Config(
    hook_decides_patterns=True,
    patterns=tuple(TopicPattern(name, rules) for name, rules in RULES.items()),
    outbox_messages=40,
    outbox_bytes=16 * 2**10,
    history_reply_bytes=6 * 2**10,
    history_max_limit=12,
    api_key=API_KEY,
    log_level="error",
)

GOING: Final = (1000, 1005)


EXPECTED: Final = ("hook_failed", "node_lapsed", "engine_failing", "not_subscribed")
"""Lines that the log may have: what was done to the broker on purpose."""


class Violation(AssertionError):
    """Something that has to be true is not."""


@attrs.define(eq=False)
class Moods:
    """How the app's hooks behave at the moment: each kind is `calm`, `waits`, `raises` or `ends`."""

    by_kind: dict[str, str] = attrs.field(factory=dict)
    _held: trio.Event = attrs.field(factory=trio.Event)

    async def at(self, kind: str) -> None:
        mood = self.by_kind.get(kind, "calm")
        if mood == "waits":
            await self._held.wait()
        elif mood == "naps":
            for _ in range(3):
                await trio.lowlevel.checkpoint()
        elif mood == "raises":
            raise LookupError("a mistake of the app's")
        elif mood == "refuses":
            raise Refused(103)
        elif mood == "ends":
            raise Disconnect(4000, "the app says so")

    def release(self) -> None:
        self._held.set()
        self._held = trio.Event()

    def calm(self) -> None:
        self.by_kind.clear()
        self.release()


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
        self.moods = Moods()
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

    # the app

    def app(self, seat: int) -> Broker:
        config = attrs.evolve(self.config, engine=self.script.engine_url)
        if self.script.engine in ("bus", "redis"):
            config = attrs.evolve(config, name=f"node {seat}")
        broker = Broker(config)
        hooks = self.script.hooks
        broker.on_connect(self._on_connect)
        broker.on_close(self._on_close)
        broker.on_message(self._on_message)
        broker.on_rpc(self._on_rpc)
        if "open" in hooks:
            broker.on_open(self._on_open)
        if "subscribe" in hooks:
            broker.on_subscribe(self._on_subscribe)
        if "publish" in hooks:
            broker.on_publish(self._on_publish)
        if "read" in hooks:
            broker.on_history(self._on_read)
            broker.on_presence(self._on_read)
        return broker

    @property
    def config(self) -> Config:
        _, is_open = self.vip[-1]
        rules = RULES if is_open else {**RULES, "vip": CLOSED}
        patterns = tuple(TopicPattern(name, each) for name, each in rules.items())
        return attrs.evolve(CONFIG, patterns=patterns, outbox_messages=self.outbox_messages)

    def _conn(self, connection: Connection) -> Conn | None:
        """The connection of ours that a hook is about; None for a bystander's."""
        number = connection.params.get("c")
        if number is None:
            return None
        conn = self.conns[int(number)]
        conn.let_in = True
        if not conn.fd:
            conn.fd = connection.fd
        assert conn.fd == connection.fd, f"fd {connection.fd} was {conn.fd}"
        before = self.by_fd.setdefault(conn.fd, conn)
        assert before is conn, f"the fd {conn.fd} was used again"
        return conn

    async def _mood(self, kind: str, conn: Conn | None) -> None:
        if conn is None:
            return
        mood = self.moods.by_kind.get(kind, "calm")
        # Without its connect, what a client has sent behind that is no command either.
        if mood == "ends" or kind in ("open", "connect", "message"):
            conn.causes |= {"server"} if mood in ("raises", "refuses", "ends") else set()
        await self.moods.at(kind)

    async def _on_open(self, connection: Connection) -> None:
        await self._mood("open", self._conn(connection))

    async def _on_connect(self, event: ConnectEvent) -> ConnectReply:
        conn = self._conn(event.connection)
        await self._mood("connect", conn)
        if conn is not None:
            conn.users.append((self.ledger.changed(), event.token))
        return ConnectReply(user=event.token)

    async def _on_message(self, connection: Connection, frame: Frame) -> None:
        conn = self._conn(connection)
        await self._mood("message", conn)
        self.seat_of(conn).broker.push(connection.fd, f"heard {frame.data!r}")

    async def _on_close(self, connection: Connection, close: Close) -> None:
        conn = self._conn(connection)
        if conn is not None and not self.has_failed:
            conn.closes += 1
            if conn.closes > 1:
                raise Violation(f"the close hook of fd {conn.fd} was called twice")
            self._check_close(conn, close)
            if self.moods.by_kind.get("close") in ("waits", "naps"):
                await self.moods.at("close")

    async def _on_rpc(self, connection: Connection, method: str, data: object) -> object:
        await self._mood("rpc", self._conn(connection))
        return {"called": data}

    async def _on_subscribe(self, event: SubscribeEvent) -> None:
        conn = self._conn(event.connection)
        await self._mood("subscribe", conn)
        self.ledger.decided["subscribe", event.connection.fd, event.topic] = self.ledger.changes

    async def _on_publish(self, event: PublishEvent) -> None:
        conn = self._conn(event.connection)
        await self._mood("publish", conn)
        if conn is not None:
            number = number_of(json.loads(event.data))
            self.ledger.decided["publish", number] = self.ledger.changes

    async def _on_read(self, event: Any) -> None:
        await self._mood("read", self._conn(event.connection))

    def seat_of(self, conn: Conn | None) -> Seat:
        return self.seats[0 if conn is None else conn.node % len(self.seats)]

    # what clients ask

    def _check_close(self, conn: Conn, close: Close) -> None:
        who, code = close.initiator.value, close.code
        causes = set(conn.causes)
        if conn.wire.was_stalled or conn.wire.has_vanished:
            causes |= {"slow", "heartbeat"}
        if who not in causes:
            raise Violation(f"fd {conn.fd} was ended by {who} ({code}), true is {sorted(causes)}")
        if who == "client":
            if code not in conn.codes:
                raise Violation(f"fd {conn.fd} closed with {conn.codes}, told is {code}")
        elif who == "network" and code != 1006:
            raise Violation(f"fd {conn.fd} was lost, told is {code}")

    def check_connected(self, conn: Conn) -> None:
        before = self.by_fd.setdefault(conn.fd, conn)
        assert before is conn, f"the fd {conn.fd} was used again"

    def _decided(self, key: object, asked: Asked) -> int:
        return max(asked.since, self.ledger.decided.get(key, 0))

    def check_may_subscribe(self, conn: Conn, asked: Asked) -> None:
        since = self._decided(("subscribe", conn.fd, asked.topic), asked)
        if asked.topic == "vip":
            assert any(conn.could_be(since)), "nobody is subscribed to what is for users"
            assert self.vip_open(since), "somebody is subscribed to what is closed"

    def check_published(self, conn: Conn, asked: Asked) -> None:
        if asked.topic == "vip":
            since = self._decided(("publish", asked.number), asked)
            assert any(conn.could_be(since)), "nobody published to what is for users"
            assert self.vip_open(since), "somebody published to what is closed"
        if asked.topic in RULES and self.script.has_witness:
            number = asked.number
            if len(self.seats) == 1 and not self.living:
                return
            self.ledger.check_later(partial(self._check_told, number, len(self.seats)))

    def _check_told(self, number: int, seats: int) -> None:
        if seats == len(self.seats) and not any(seat.is_cut for seat in self.seats):
            assert self.ledger.was_published(number), f"{number} is acknowledged, not delivered"

    def check_refusal(self, conn: Conn, asked: Asked, code: int) -> None:
        """An innocent request to an open topic is not refused."""
        calm = not self.moods.by_kind and self.script.engine in ("memory", "sqlite")
        if calm and code == 103 and asked.kind == "subscribe":
            hooked = {"subscribe"} & self.script.hooks
            assert asked.topic == "vip" or hooked, f"{asked.topic} is open"

    def check_may_read(self, conn: Conn, asked: Asked) -> None:
        if asked.topic == "vip" and "vip" not in conn.client.subs:
            assert any(conn.could_be(asked.since)), "nobody reads what is for users"
            assert self.vip_open(asked.since), "somebody reads what is closed"

    def check_length(self, publications: Sequence[Any], limit: int) -> None:
        most = CONFIG.history_max_limit if limit < 0 else min(limit, CONFIG.history_max_limit)
        assert len(publications) <= most, (
            f"{len(publications)} publications, and the limit is {most}"
        )
        self._check_bytes(publications, "a history")

    def _check_bytes(self, publications: Sequence[Any], what: str) -> None:
        size = sum(len(str(each["data"])) for each in publications)
        most = CONFIG.history_reply_bytes
        assert len(publications) < 2 or size <= most, f"{what} of {size} bytes"

    def check_recovered(
        self,
        conn: Conn,
        topic: str,
        epoch: str,
        offset: int,
        missed: Sequence[Any],
        sub: Sub,
    ) -> None:
        self._check_bytes(missed, "a recovery")

    def check_rights(self, conn: Conn, sub: Sub, sent: Sent, topic: str) -> None:
        if topic != "vip":
            return
        if sub.name != topic:
            assert any(conn.could_be(sent.at)), f"{sent.number} is for users"
            assert self.vip_open(sent.at), f"{sent.number} is for nobody"
        elif "subscribe" not in self.script.hooks:  # else the hook's yes outlives a bind
            assert any(conn.could_be(sent.at)), f"{sent.number} is for users"

    def check_group(self, conn: Conn, sub: Sub, sent: Sent) -> None:
        key = f"{sub.group} of {sub.name}", sent.number
        before = self.ledger.group_members.setdefault(key, conn.fd)
        assert before == conn.fd, f"{key} came to fd {before} and to fd {conn.fd}"

    def check_present(self, conn: Conn, fd: int) -> None:
        other = self.by_fd.get(fd)
        assert other is None or other.let_in, f"fd {fd} is present and was never here"

    def check_message(self, conn: Conn, data: Any) -> None:
        assert data == f"for {conn.fd}" or str(data).startswith("heard"), data

    def check_plain(self, conn: Conn, text: str) -> None:
        if text.isdigit():
            sent = self.ledger.sent[int(text)]
            assert sent.topic == f"fd:{conn.fd}" or sent.topic[5:] in conn.could_be(sent.at), text
        else:
            assert text == f"for {conn.fd}" or text.startswith("heard"), text

    # brokers

    async def open_seats(self, count: int) -> None:
        for number in range(count):
            await self.open_seat(number)

    async def open_seat(self, number: int, broker: Broker | None = None) -> Seat:
        """Start a broker, new or once more, in the place of this number."""
        broker = broker or self.app(number)
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
        await self.open_seat(seat.number, seat.broker if self.script.engine != "bus" else None)
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
        await wait_all_tasks_blocked()

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
        for _ in range(count):
            await trio.lowlevel.checkpoint()
        self.pump()

    async def settle(self) -> None:
        """Until nothing moves but with time."""
        while True:
            await wait_all_tasks_blocked()
            if not self.pump():
                break
        self.ledger.check()

    async def sleep(self, seconds: float) -> None:
        until = trio.current_time() + seconds
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
        self.moods.calm()
        self.disk_fails = False
        for wire in self.wires:
            wire.heal()
        for seat in self.seats:
            if seat.is_cut:
                self.bus.mend(seat.engine)
                seat.is_cut = False
        await self.sleep(1.5)
        await self.settle()
        for client in self.clients:
            self._check_client(client)
        if self.script.engine in ("memory", "sqlite"):
            for topic in TOPICS:
                await self._check_topic(topic)
        for client in self.clients:
            conn = client.conn
            if conn is not None:
                conn.rested, conn.harmed = True, False
                conn.wire.was_stalled = False
                witness = self.seat_of(conn).witness
                for sub in client.subs.values():
                    sub.rested, sub.seen, sub.place = True, [], len(witness.order)

    def _check_client(self, client: Client) -> None:
        conn = client.conn
        if conn is None or not conn.is_open:
            return
        open_asked = [a for a in client.asked.values() if a.kind != "request"]
        assert not open_asked, f"no answer to {open_asked}"
        if not self.script.has_witness or not conn.rested or conn.harmed:
            return
        for sub in client.subs.values():
            if sub.rested and not sub.group and sub.is_on:
                self._check_sub(conn, sub)

    def _check_sub(self, conn: Conn, sub: Sub) -> None:
        """All that was published since the last rest has come, or is reported as dropped."""
        witness = self.seat_of(conn).witness
        told = [each for each in witness.order[sub.place :] if self._is_for(conn, sub, *each)]
        expected = [number for _, number in told]
        certain = [n for t, n in told if t != "vip"]
        if sub.seen == expected:
            return
        seen = [n for n in sub.seen if self.ledger.sent[n].topic != "vip"]
        missing = sorted(set(certain) - set(seen))
        assert not set(sub.seen) - set(expected), "more came than was published"
        if not missing:
            assert seen == certain, f"{sub.name}: {seen} is not the order {certain}"
            return
        seat = self.seat_of(conn)
        details = seat.broker.node.connection_details(conn.fd)
        dropped = 0 if details is None else details.messages_dropped
        assert len(missing) <= dropped, f"{missing} never came on {sub.name} to fd {conn.fd}"

    def _is_for(self, conn: Conn, sub: Sub, topic: str, number: int) -> bool:
        sent = self.ledger.sent[number]
        if sub.name not in (topic, ">"):
            return False
        if sub.tag and (sent.tags or {}).get("k") != sub.tag:
            return False
        return conn.fd not in sent.not_to

    async def _check_topic(self, topic: str) -> None:
        """What is acknowledged is kept, who is positioned is at the top, and presence is right."""
        seat = self.seats[0]
        rules = RULES[topic]
        publications, position = await seat.broker.history(topic)
        kept = [number_of(each.value) for each in publications]
        for each in publications:
            self.ledger.saw(topic, position.epoch, each.offset, number_of(each.value))
        told = self.told(topic)
        now = trio.current_time()
        sure = [
            each.number
            for each in told[-rules.history_size :]
            if each.at > max(self.sure_from[topic], now - rules.history_ttl + 0.1)
        ]
        if rules.history_size and self.script.has_witness:
            assert kept[len(kept) - len(sure) :] == sure, f"{topic} keeps {kept}, not {sure}"
        present = {int(client) for client in await seat.broker.presence(topic)}
        here = set()
        for client in self.clients:
            conn, sub = client.conn, client.subs.get(topic)
            if conn is not None and sub is not None and sub.is_on:
                here.add(conn.fd)
                spot = client.spots.get(topic)
                gaps = sub.tag or topic in conn.without_echo
                if sub.positioned and not gaps and spot is not None:
                    assert (spot.epoch, spot.offset) == (position.epoch, position.offset), (
                        f"fd {conn.fd} is at {spot.offset} of {topic}, which is at {position.offset}"
                    )
        for bystander in self.bystanders:
            present.discard(bystander.fd)
        going = {conn.fd for conn in self.conns.values() if conn.wire.is_over and not conn.closes}
        assert here <= present <= here | going, f"{present} are present on {topic}, not {here}"

    def told(self, topic: str) -> list[Told]:
        """All that was ever delivered to a topic, over restarts."""
        return [each for one in self.ledger.witnesses for each in one.told.get(topic, ())]

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
        await self.sleep(45.0)
        for seat in self.living:
            self._check_nothing_left(seat)
        for seat in self.living:
            seat.broker.stop()
        while self.living:
            await trio.sleep(0.5)
            self.pump()
        self.ledger.check()
        for conn in self.conns.values():
            if conn.let_in:
                assert conn.closes == 1, f"the close hook of fd {conn.fd}: {conn.closes} times"

    def _check_nothing_left(self, seat: Seat) -> None:
        node = seat.broker.node
        services, router = node.services, node.router
        assert not services.connections, f"{len(services.connections)} connections are left"
        assert services.admission.count() == 0, "streams are left"
        assert not len(services.requests), "requests are left"
        assert not len(services.wills), "wills are left"
        assert not [t for t in router.hub.topics() if t != ">"], f"{router.hub.topics()} are left"
        parts = node.stats().memory.parts
        for part in (Part.OUTBOXES, Part.INCOMING, Part.SUBSCRIPTIONS, Part.WILLS, Part.REQUESTS):
            assert not parts.get(part, 0), f"{parts[part]} bytes of {part} are left"


# runs


@attrs.frozen
class Outcome:
    """How a simulation ended: `failure` is what was violated, "" for nothing."""

    trace: str
    failure: str
    most_steps: int = 0
    most_bytes: int = 0
    messages: int = 0
    error: BaseException | None = None


def simulate(script: "Script") -> Outcome:
    """Play a script, from nothing to nothing."""
    if script.engine != "sqlite" or script.engine_url != "memory":
        return _simulate(script)
    with tempfile.TemporaryDirectory() as directory:
        # What waits for the power to fail would only take longer.
        url = f"sqlite:{directory}/log.db?sync=process"
        return _simulate(attrs.evolve(script, engine_url=url))


def _simulate(script: "Script") -> Outcome:
    with decided_by(script.seed) as chance_for, _logged() as lines:
        world: World | None = None

        async def play() -> None:
            nonlocal world
            world = World(script, chance_for)
            await world.play()

        error: BaseException | None = None
        try:
            trio.run(play, clock=MockClock(autojump_threshold=0))
        except Exception as caught:  # noqa: BLE001 - it is what the simulation has found
            error = caught
        assert world is not None
        failure = _failure_of(error, lines)
        world.trace.update(failure.encode())
        digest = world.trace.hexdigest()
        sent = len(world.ledger.sent)
    return Outcome(digest, failure, world.most_steps, world.most_bytes, sent, error)


def _failure_of(error: BaseException | None, lines: Sequence[Any]) -> str:
    """What was wrong, in a line: of several things the first in the log, as it came first."""
    for line in lines:
        found = line.get("exc_info")
        if isinstance(found, AssertionError):
            return f"{type(found).__name__}: {found}"
        if line["event"] not in EXPECTED:
            return f"logged: {line['event']} {found!r}"
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if error is None:
        return ""
    return f"{type(error).__name__}: {error}".split("\n")[0]


@contextmanager
def _logged() -> Iterator[list[Any]]:
    """What the broker logs of errors, meanwhile."""
    before = structlog.get_config() if structlog.is_configured() else None
    lines: list[Any] = []

    def note(logger: object, method: str, line: Any) -> Any:
        if line.get("exc_info") is True:
            line["exc_info"] = sys.exc_info()[1]
        lines.append(line)
        raise structlog.DropEvent

    level = structlog.make_filtering_bound_logger(logging.ERROR)
    structlog.configure([note], wrapper_class=level, cache_logger_on_first_use=False)
    try:
        yield lines
    finally:
        structlog.reset_defaults()
        if before is not None:
            structlog.configure(**before)
