"""What a seed makes of a simulation: its circumstances, and the steps that are taken in it.

A step is a small thing that can happen, with all its numbers, and does nothing where it makes no sense: so
any part of a script is a script, and a failing one can be made short by leaving steps out.
"""

from random import Random
from typing import TYPE_CHECKING, Final, Protocol

import attrs
import trio

from broker import Refused
from tests.simulation.carriers import CARRIERS
from tests.simulation.ledger import payload

if TYPE_CHECKING:
    from tests.simulation.world import Engine, World

NAMES: Final = ("news", "chat", "tick", "live", "vip", "work")
LISTENED: Final = ("news", "chat", "tick", "live", "vip", ">")
USERS: Final = ("", "", "ann", "bob")
MOST_STEPS: Final = 34


class Step(Protocol):
    @property
    def turns(self) -> int:
        """How often the event loop turns before the next step."""

    async def do(self, world: "World") -> None: ...


@attrs.frozen
class Join:
    turns: int
    client: int
    kind: str
    token: str
    at_once: bool
    node: int
    sliced: bool
    lag: float

    async def do(self, world: "World") -> None:
        client = world.clients[self.client]
        if client.conn is None and world.living:
            wire = world.new_wire(self.node, self.sliced, self.lag)
            client.join(self.kind, self.token, self.at_once, self.node, wire)


@attrs.frozen
class Drop:
    turns: int
    client: int
    how: str
    quarters: int

    async def do(self, world: "World") -> None:
        world.clients[self.client].drop(self.how, self.quarters)


@attrs.frozen
class Goodbye:
    turns: int
    client: int
    code: int

    async def do(self, world: "World") -> None:
        world.clients[self.client].close(self.code)


@attrs.frozen
class Subscribe:
    turns: int
    client: int
    topic: str
    fresh: bool = False
    group: str = ""
    tag: str = ""

    async def do(self, world: "World") -> None:
        how = {"fresh": self.fresh, "group": self.group, "tag": self.tag}
        world.clients[self.client].subscribe(self.topic, **how)


@attrs.frozen
class Unsubscribe:
    turns: int
    client: int
    topic: str

    async def do(self, world: "World") -> None:
        world.clients[self.client].unsubscribe(self.topic)


@attrs.frozen
class Publish:
    turns: int
    client: int
    topic: str
    count: int
    how: str
    large: bool

    async def do(self, world: "World") -> None:
        world.clients[self.client].publish(self.topic, self.count, self.how, self.large)


@attrs.frozen
class PublishByCall:
    turns: int
    client: int
    topic: str
    key: str
    again: bool
    echo: bool

    async def do(self, world: "World") -> None:
        client = world.clients[self.client]
        client.publish_by_call(self.topic, key=self.key, again=self.again, echo=self.echo)


@attrs.frozen
class Direct:
    """To another client: by its fd, or by its user."""

    turns: int
    client: int
    other: int
    by_user: bool
    count: int
    asks: bool

    async def do(self, world: "World") -> None:
        client, other = world.clients[self.client], world.clients[self.other]
        conn = other.conn
        if conn is None or not conn.fd or client is other:
            return
        user = conn.users[-1][1] if conn.users else ""
        if self.asks:
            client.ask(f"fd:{conn.fd}", 5)
        elif not self.by_user:
            client.publish(f"fd:{conn.fd}", self.count, "joined")
        elif user:
            client.publish(f"user:{user}", self.count, "joined")


@attrs.frozen
class AskGroup:
    turns: int
    client: int

    async def do(self, world: "World") -> None:
        world.clients[self.client].ask("work", 5)


@attrs.frozen
class AppPublish:
    turns: int
    seat: int
    topic: str
    count: int
    tag: str
    large: bool

    async def do(self, world: "World") -> None:
        living = world.living
        if not living:
            return
        seat = living[self.seat % len(living)]
        for _ in range(self.count):
            tags = {"k": self.tag} if self.tag else None
            sent = world.ledger.send(self.topic, f"app {seat.number}", tags=tags)
            try:
                data = payload(sent.number, self.large)
                seat.broker.publish_nowait(self.topic, data, tags=tags)
            except (Refused, trio.WouldBlock):
                world.ledger.refused.add(sent.number)


@attrs.frozen
class ApiPublish:
    turns: int
    seat: int
    topic: str
    tag: str
    sliced: bool

    async def do(self, world: "World") -> None:
        if not world.living:
            return
        wire = world.new_wire(self.seat, self.sliced)
        tags = {"k": self.tag} if self.tag else None
        sent = world.ledger.send(self.topic, f"api {world.new_number()}", tags=tags)
        body = {"channel": self.topic, "data": sent.number, **({"tags": tags} if tags else {})}
        world.call_api(wire, "publish", body)


@attrs.frozen
class ApiRead:
    turns: int
    seat: int
    method: str
    topic: str

    async def do(self, world: "World") -> None:
        if world.living:
            wire = world.new_wire(self.seat)
            body = {"channel": self.topic} if self.method != "info" else {}
            world.call_api(wire, self.method, body)


@attrs.frozen
class Will:
    turns: int
    client: int
    topic: str
    retain: bool

    async def do(self, world: "World") -> None:
        world.clients[self.client].leave_will(self.topic, self.retain)


@attrs.frozen
class Read:
    turns: int
    client: int
    topic: str
    what: str
    limit: int

    async def do(self, world: "World") -> None:
        client = world.clients[self.client]
        if self.what == "history":
            client.read_history(self.topic, self.limit)
        else:
            client.read_presence(self.topic, self.what)


@attrs.frozen
class ReadMuch:
    """Ask for more than one answer may hold."""

    turns: int
    client: int

    async def do(self, world: "World") -> None:
        await AppPublish(0, 0, "news", 9, "", True).do(world)
        await world.turns(3)
        world.clients[self.client].read_history("news", -1)


@attrs.frozen
class Call:
    turns: int
    client: int
    number: int

    async def do(self, world: "World") -> None:
        client = world.clients[self.client]
        client.call("echo", self.number)
        client.say_plain(f"call {self.number}")


@attrs.frozen
class Bind:
    turns: int
    client: int
    user: str

    async def do(self, world: "World") -> None:
        world.bind(world.clients[self.client], self.user)


@attrs.frozen
class Kick:
    turns: int
    client: int

    async def do(self, world: "World") -> None:
        conn = world.clients[self.client].conn
        if conn is not None and conn.fd:
            conn.causes.add("server")
            world.seat_of(conn).broker.disconnect(conn.fd, 4001, "kicked")


@attrs.frozen
class Push:
    turns: int
    client: int

    async def do(self, world: "World") -> None:
        conn = world.clients[self.client].conn
        if conn is not None and conn.fd:
            world.seat_of(conn).broker.push(conn.fd, f"for {conn.fd}")


@attrs.frozen
class Mood:
    turns: int
    kind: str
    mood: str

    async def do(self, world: "World") -> None:
        world.app.moods.by_kind[self.kind] = self.mood


@attrs.frozen
class Release:
    turns: int
    calm: bool

    async def do(self, world: "World") -> None:
        if self.calm:
            world.app.moods.calm()
        else:
            world.app.moods.release()


@attrs.frozen
class WhileAHookWaits:
    """Ask for what is for users, be another before the hook has answered, and see."""

    turns: int
    client: int
    kind: str
    user: str
    closes: bool

    async def do(self, world: "World") -> None:
        client = world.clients[self.client]
        world.app.moods.by_kind[self.kind] = "waits"
        if self.kind == "subscribe":
            client.subscribe("vip")
        else:
            client.publish("vip", 1, "joined")
        await world.turns(12)
        if self.closes:
            world.reload(is_open=False, outbox_messages=world.outbox_messages)
        else:
            world.bind(client, self.user)
        world.app.moods.calm()


@attrs.frozen
class Reload:
    turns: int
    is_open: bool
    outbox_messages: int

    async def do(self, world: "World") -> None:
        world.reload(is_open=self.is_open, outbox_messages=self.outbox_messages)


@attrs.frozen
class Stall:
    turns: int
    client: int
    heals: bool

    async def do(self, world: "World") -> None:
        conn = world.clients[self.client].conn
        if conn is not None:
            if self.heals:
                conn.wire.heal()
            else:
                conn.wire.stall()


@attrs.frozen
class Swamp:
    """A client stops to read, and more comes than may wait for it."""

    turns: int
    client: int
    topic: str
    count: int

    async def do(self, world: "World") -> None:
        await Stall(0, self.client, False).do(world)
        await AppPublish(0, 0, self.topic, 1, "", False).do(world)
        await world.turns(6)
        await AppPublish(0, 0, self.topic, self.count, "", False).do(world)


@attrs.frozen
class Away:
    """Lose the connection, miss something, come back, and perhaps have the app stop in the middle."""

    turns: int
    client: int
    topic: str
    missed: int
    seconds: float
    kind: str
    stops_after: int
    large: bool

    async def do(self, world: "World") -> None:
        client = world.clients[self.client]
        conn = client.conn
        token, node = ("", 0) if conn is None else (conn.token, conn.node)
        client.drop("reset", 4)
        await AppPublish(0, 0, self.topic, self.missed, "", self.large).do(world)
        await world.sleep(self.seconds)
        client.stops_after = self.stops_after
        await Join(0, self.client, self.kind, token, True, node, False, 0.0).do(world)


@attrs.frozen
class Remove:
    turns: int
    topic: str

    async def do(self, world: "World") -> None:
        await world.remove_history(self.topic)


@attrs.frozen
class Sleep:
    turns: int
    seconds: float

    async def do(self, world: "World") -> None:
        await world.sleep(self.seconds)


@attrs.frozen
class Rest:
    turns: int

    async def do(self, world: "World") -> None:
        await world.rest()


@attrs.frozen
class Restart:
    turns: int
    seat: int
    kindly: bool

    async def do(self, world: "World") -> None:
        await world.restart(self.seat, self.kindly)


@attrs.frozen
class CutOff:
    """A node reaches the others no more, for so long."""

    turns: int
    seat: int
    seconds: float

    async def do(self, world: "World") -> None:
        await world.cut_off(self.seat, self.seconds)


@attrs.frozen
class Lag:
    turns: int
    seat: int
    seconds: float

    async def do(self, world: "World") -> None:
        world.lag(self.seat, self.seconds)


@attrs.frozen
class Disk:
    """What the engine is kept on takes nothing, until it does again."""

    turns: int
    fails: bool

    async def do(self, world: "World") -> None:
        world.disk_fails = self.fails


# scripts


@attrs.frozen
class Script:
    seed: int
    engine: "Engine"
    nodes: int
    clients: int
    hooks: frozenset[str]
    has_witness: bool
    bus_delay: float
    steps: tuple[tuple[int, Step], ...]
    """With their numbers, which they keep when others are left out."""
    engine_url: str = "memory"

    def only(self, numbers: frozenset[int]) -> "Script":
        steps = tuple(each for each in self.steps if each[0] in numbers)
        return attrs.evolve(self, steps=steps)


def write(seed: int, engine: "Engine | None" = None) -> Script:
    """The script of a seed. Every eighth is on a file, every sixth has two nodes."""
    chance = Random(f"{seed} script")
    drawn: Engine = chance.choices(("memory", "sqlite", "bus"), (17, 3, 4))[0]
    engine = engine or drawn
    nodes = 2 if engine in ("bus", "redis") else 1
    hooks = [kind for kind in ("open", "subscribe", "publish", "read") if chance.random() < 0.4]
    clients = chance.randint(3, 4)
    writer = _Writer(chance, clients, nodes, engine, frozenset(hooks))
    steps = writer.opening()
    steps += [writer.step() for _ in range(chance.randint(12, MOST_STEPS))]
    return Script(
        seed,
        engine,
        nodes,
        clients,
        writer.hooks,
        has_witness=chance.random() < 0.75,
        bus_delay=chance.choice((0.0, 0.0, 0.05)),
        steps=tuple(enumerate(steps)),
    )


@attrs.frozen
class _Writer:
    chance: Random
    clients: int
    nodes: int
    engine: str
    hooks: frozenset[str]

    def opening(self) -> list[Step]:
        """Everybody comes, and wants something."""
        steps: list[Step] = []
        for client in range(self.clients):
            topics = self.chance.sample(LISTENED, self.chance.randint(1, 3))
            steps += [self._subscribe(client, topic) for topic in topics]
            steps.append(self._join(client))
        return steps

    def step(self) -> Step:
        chance, client = self.chance, self.chance.randrange(self.clients)
        turns, topic = chance.choice((0, 0, 1, 2, 3, 8)), chance.choice(NAMES)
        kinds = list(_WEIGHTS)
        kind = chance.choices(kinds, [_WEIGHTS[each] for each in kinds])[0]
        if kind in ("restart", "cut_off", "lag") and self.nodes > 1:
            kind = chance.choice(("restart", "cut_off", "lag"))
        elif kind in ("cut_off", "lag"):
            kind = "disk" if self.engine == "sqlite" else "publish"
        made: Step = getattr(self, f"_{kind}")(turns, client, topic)
        return made

    def _join(self, client: int) -> Step:
        chance = self.chance
        weights = [6, 4, 3, 2, 2, 1, 1, 2]
        kind = chance.choices(list(CARRIERS), weights)[0]
        return Join(
            chance.choice((0, 1, 8)),
            client,
            kind,
            chance.choice(USERS),
            chance.random() < 0.6,
            chance.randrange(self.nodes),
            chance.random() < 0.12,
            chance.choice((0.0, 0.0, 0.0, 0.0, 0.2)),
        )

    def _subscribe(self, client: int, topic: str, turns: int = 0) -> Step:
        chance = self.chance
        if topic == "work":
            return Subscribe(turns, client, topic, group="g")
        tag = chance.choice(("a", "b")) if chance.random() < 0.15 and topic != ">" else ""
        return Subscribe(turns, client, topic, chance.random() < 0.2, "", tag)

    def _come(self, turns: int, client: int, topic: str) -> Step:
        return self._join(client)

    def _go(self, turns: int, client: int, topic: str) -> Step:
        how = self.chance.choice(("reset", "reset", "half_close", "vanish"))
        return Drop(turns, client, how, self.chance.randint(0, 4))

    def _goodbye(self, turns: int, client: int, topic: str) -> Step:
        return Goodbye(turns, client, self.chance.choice((1000, 3000, 4321)))

    def _listen(self, turns: int, client: int, topic: str) -> Step:
        name = topic if topic == "work" else self.chance.choice(LISTENED)
        return self._subscribe(client, name, turns)

    def _leave(self, turns: int, client: int, topic: str) -> Step:
        return Unsubscribe(turns, client, self.chance.choice((*LISTENED, "work")))

    def _publish(self, turns: int, client: int, topic: str) -> Step:
        chance = self.chance
        how = chance.choice(("joined", "one by one", "silent"))
        large = chance.random() < 0.1
        return Publish(turns, client, topic, chance.randint(1, 6), how, large)

    def _call_publish(self, turns: int, client: int, topic: str) -> Step:
        chance = self.chance
        key = chance.choice(("", "k1", "k1", "k2"))
        again, echo = chance.random() < 0.3, chance.random() < 0.8
        return PublishByCall(turns, client, topic, key, again, echo)

    def _app(self, turns: int, client: int, topic: str) -> Step:
        chance = self.chance
        tag = chance.choice(("", "", "a", "b"))
        large = chance.random() < 0.15
        return AppPublish(turns, chance.randrange(2), topic, chance.randint(1, 8), tag, large)

    def _api(self, turns: int, client: int, topic: str) -> Step:
        chance = self.chance
        if chance.random() < 0.6:
            tag = chance.choice(("", "a"))
            return ApiPublish(turns, chance.randrange(2), topic, tag, chance.random() < 0.1)
        method = chance.choice(("history", "presence", "info", "presence_stats"))
        return ApiRead(turns, chance.randrange(2), method, topic)

    def _direct(self, turns: int, client: int, topic: str) -> Step:
        chance = self.chance
        other, by_user = chance.randrange(self.clients), chance.random() < 0.4
        return Direct(turns, client, other, by_user, chance.randint(1, 4), chance.random() < 0.3)

    def _ask_group(self, turns: int, client: int, topic: str) -> Step:
        return AskGroup(turns, client)

    def _will(self, turns: int, client: int, topic: str) -> Step:
        return Will(turns, client, self.chance.choice(("news", "live")), self.chance.random() < 0.3)

    def _read(self, turns: int, client: int, topic: str) -> Step:
        if self.chance.random() < 0.25:
            return ReadMuch(turns, client)
        what = self.chance.choice(("history", "history", "presence", "presence_stats"))
        return Read(turns, client, topic, what, self.chance.choice((-1, 0, 3, 50)))

    def _call(self, turns: int, client: int, topic: str) -> Step:
        return Call(turns, client, self.chance.randrange(1000))

    def _bind(self, turns: int, client: int, topic: str) -> Step:
        return Bind(turns, client, self.chance.choice(("", "ann", "bob")))

    def _kick(self, turns: int, client: int, topic: str) -> Step:
        return Kick(turns, client)

    def _push(self, turns: int, client: int, topic: str) -> Step:
        return Push(turns, client)

    def _mood(self, turns: int, client: int, topic: str) -> Step:
        kinds = [*self.hooks, "connect", "message", "rpc", "close"]
        moods = ("waits", "waits", "naps", "raises", "refuses", "ends")
        return Mood(turns, self.chance.choice(sorted(kinds)), self.chance.choice(moods))

    def _release(self, turns: int, client: int, topic: str) -> Step:
        return Release(turns, self.chance.random() < 0.6)

    def _while_a_hook_waits(self, turns: int, client: int, topic: str) -> Step:
        both = [kind for kind in ("subscribe", "publish") if kind in self.hooks]
        if not both:
            return self._bind(turns, client, topic)
        chance = self.chance
        user, closes = chance.choice(("", "", "bob")), chance.random() < 0.3
        return WhileAHookWaits(turns, client, chance.choice(both), user, closes)

    def _reload(self, turns: int, client: int, topic: str) -> Step:
        return Reload(turns, self.chance.random() < 0.6, self.chance.choice((40, 40, 15)))

    def _stall(self, turns: int, client: int, topic: str) -> Step:
        return Stall(turns, client, self.chance.random() < 0.5)

    def _swamp(self, turns: int, client: int, topic: str) -> Step:
        return Swamp(turns, client, topic, self.chance.choice((10, 45, 60)))

    def _away(self, turns: int, client: int, topic: str) -> Step:
        chance = self.chance
        topic = chance.choice(("news", "chat", "tick"))
        kind = chance.choices(list(CARRIERS)[:5], (6, 4, 3, 2, 2))[0]
        seconds, stops = chance.choice((0.0, 1.0, 31.0)), chance.choice((-1, -1, 0, 1, 2))
        large = chance.random() < 0.2
        return Away(turns, client, topic, chance.randint(1, 9), seconds, kind, stops, large)

    def _remove(self, turns: int, client: int, topic: str) -> Step:
        return Remove(turns, topic)

    def _sleep(self, turns: int, client: int, topic: str) -> Step:
        return Sleep(turns, self.chance.choice((0.1, 1.0, 6.0, 22.0)))

    def _rest(self, turns: int, client: int, topic: str) -> Step:
        return Rest(turns)

    def _restart(self, turns: int, client: int, topic: str) -> Step:
        return Restart(turns, self.chance.randrange(self.nodes), self.chance.random() < 0.4)

    def _cut_off(self, turns: int, client: int, topic: str) -> Step:
        return CutOff(turns, self.chance.randrange(2), self.chance.choice((0.5, 3.0, 25.0)))

    def _lag(self, turns: int, client: int, topic: str) -> Step:
        return Lag(turns, self.chance.randrange(2), self.chance.choice((0.0, 0.5)))

    def _disk(self, turns: int, client: int, topic: str) -> Step:
        return Disk(turns, self.chance.random() < 0.5)


_WEIGHTS: Final = {
    "publish": 10,
    "call_publish": 6,
    "app": 9,
    "api": 4,
    "direct": 6,
    "ask_group": 2,
    "come": 9,
    "go": 4,
    "goodbye": 2,
    "listen": 8,
    "leave": 3,
    "will": 3,
    "read": 4,
    "call": 2,
    "bind": 3,
    "kick": 1,
    "push": 2,
    "mood": 4,
    "release": 3,
    "while_a_hook_waits": 3,
    "reload": 2,
    "stall": 2,
    "swamp": 4,
    "away": 7,
    "remove": 1,
    "sleep": 2,
    "rest": 5,
    "restart": 1,
    "cut_off": 1,
    "lag": 1,
}
"""How often each kind of step is taken."""
