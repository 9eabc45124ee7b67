"""Recovery never loses, duplicates or reorders: a whole broker against scripts of whatever can happen.

A script is a list of steps: publishing of several kinds, connections that break with any part of
their bytes on the way, readers that stop reading, trimming by size, age, room and by hand, restarts.
Between two steps lie as many turns of the event loop as the script says, so that steps meet half
done things.

What is true is told by one witness in the broker's own program per topic: the order in which it was
published. A client is held to it by the rules of `Client`. And a broker that never recovers would
keep these; so what is kept for sure has to be recovered.

Brokers that share a Redis are held to the same by `test_recovery_shared`. `--scripts N` runs so many on
each engine, in place of as many as there is time for.
"""

import json
import tempfile
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, Protocol, TypeAlias

import attrs
import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from broker import (
    Broker,
    Config,
    ConnectEvent,
    ConnectReply,
    SubscribeEvent,
    TopicPattern,
    TopicRules,
)
from broker.testing import Network, client_frame, handshake, open_test_broker
from broker.transport import frames

EXAMPLES = {"memory": 1000, "sqlite": 250}
"""A script on a file takes four times as long."""

PERSONAL = "#u"
"""Every client's by its user: the server subscribes it, and it recovers with `connect`."""

RULES = {
    "close": TopicRules(history_size=10, history_ttl=3.0, slow_consumer="close", retain=True),
    "drop": TopicRules(history_size=8, history_ttl=30.0, slow_consumer="drop_oldest"),
    "latest": TopicRules(history_size=40, history_ttl=3.0, slow_consumer="latest"),
    PERSONAL: TopicRules(history_size=12, history_ttl=30.0, slow_consumer="drop_oldest"),
}
TOPICS = tuple(RULES)

CONFIG = Config(
    hook_decides_patterns=True,
    patterns=tuple(TopicPattern(name, rules) for name, rules in RULES.items()),
    personal_topic=True,
    history_bytes=64 * 2**10,
    outbox_messages=6,
    outbox_bytes=4 * 2**10,
    # Nothing here is about heartbeats.
    ping_seconds=float("inf"),
    log_level="error",
)


class Wire:
    """One connection, whose client reads and writes without a checkpoint."""

    def __init__(self) -> None:
        self.gone = False
        self._reads = trio.Event()
        self._reads.set()
        self._down = trio.testing.MemorySendStream(self._take)
        self._up = trio.testing.MemoryReceiveStream()
        self.far_end = trio.StapledStream(self._down, self._up)

    async def _take(self) -> None:
        """All that was sent is on its way; the next can be sent once the client reads."""
        await self._reads.wait()
        if self.gone:
            raise trio.BrokenResourceError

    @property
    def stalled(self) -> bool:
        return not self._reads.is_set()

    def stall(self) -> None:
        if not self.stalled:
            self._reads = trio.Event()

    def resume(self) -> None:
        self._reads.set()

    def send(self, data: bytes) -> None:
        with suppress(trio.ClosedResourceError):  # the broker has closed, and we have yet to hear
            self._up.put_data(data)

    def read(self) -> bytes | None:
        """The bytes that have come; nothing once the broker has closed, None if there is nothing yet."""
        try:
            return bytes(self._down.get_data_nowait())
        except trio.WouldBlock:
            return None

    def cut(self) -> None:
        self.gone = True
        self._reads.set()
        self._up.put_eof()


@attrs.define(eq=False)
class Spot:
    """Where a client is in one topic: the last it has seen. Kept beyond its connection."""

    epoch: str = ""
    offset: int = 0


@attrs.define(eq=False)
class Asked:
    """A subscribe that waits for its reply; `had` is how much had been published by then."""

    topic: str
    recovers: bool
    had: int


class Client:
    """A client that keeps to the protocol, and finds out when the broker does not.

    - Nothing of a topic comes unless it is subscribed: after the reply, before the end.
    - Each publication has the offset behind the last one, and is what was published there.
    - A recovery brings all up to the position in its reply, in the same epoch.
    - Where there is none, the reply says so, brings nothing, and its position is not behind us.
    - What a topic retains comes at most once, to who has not recovered, and is the last before.
    """

    def __init__(self, world: "World", number: int) -> None:
        self.world = world
        self.number = number
        self.wire: Wire | None = None
        self.spots: dict[str, Spot] = {}
        self.wanted: dict[str, None] = {}
        self._buffer = b""
        self._is_open = False
        # By request: a subscribe, a number that is published, a topic that is unsubscribed.
        self._asked: dict[int, Asked | int | str] = {}
        self._on: dict[str, bool] = {}
        self._last_id = 1
        self._of_pattern: dict[str, int] = {}
        self._may_get_retained: set[str] = set()
        self._joins = 0

    # what it does

    async def join(self, at_once: bool) -> None:
        """Connect; `at_once` with all it wants subscribed to in the same breath."""
        if self.wire is not None:
            return
        self.wire = wire = Wire()
        self._buffer, self._is_open, self._last_id = b"", False, 1
        self._asked, self._on, self._of_pattern = {}, {}, {}
        nets = self.world.nets
        await nets[(self.number + self._joins) % len(nets)].listener.connect(
            lambda: (wire.far_end, wire.far_end)
        )
        self._joins += 1
        spot = self.spots.get(PERSONAL)
        subs = {} if spot is None else {PERSONAL: {"recover": True, **attrs.asdict(spot)}}
        self._asked[1] = Asked(PERSONAL, spot is not None, self.world.count(PERSONAL))
        wire.send(handshake())
        self._send({"id": 1, "connect": {"subs": subs}})
        if at_once:
            self._send(*[self._subscribing(topic, False, "") for topic in self.wanted])

    def subscribe(self, topic: str, how: str, hold: str) -> None:
        self.wanted[topic] = None
        if self._may_ask(topic):
            if how == "zero" and topic in self.spots:
                self.spots[topic].offset = 0
            self._send(self._subscribing(topic, how == "fresh", hold))

    def subscribe_amid(self, topic: str, numbers: list[int]) -> None:
        """Subscribe in the middle of one's own publications, all in one frame."""
        self.wanted[topic] = None
        if self._may_ask(topic):
            one, *others = [self._publishing(topic, number, True) for number in numbers]
            self._send(one, self._subscribing(topic, False, ""), *others)

    def unsubscribe(self, topic: str) -> None:
        """Stop to listen; what is on its way by now may still come."""
        if self.wire is not None and self._on.get(topic) and topic != PERSONAL:
            self.wanted.pop(topic, None)
            # Publications that still come are not taken: where we are is told by the last that was.
            self._on[topic] = False
            self._asked[self._next_id()] = topic
            self._send({"id": self._last_id, "unsubscribe": {"channel": topic}})

    def subscribe_pattern(self) -> None:
        if self.wire is not None and ">" not in self._on:
            self._on[">"] = True
            self._send({"id": self._next_id(), "subscribe": {"channel": ">"}})

    def publish(self, topic: str, numbers: list[int], how: str) -> None:
        commands = [self._publishing(topic, number, how != "no reply") for number in numbers]
        if how == "joined":
            self._send(*commands)
        else:
            for command in commands:
                self._send(command)

    def drop(self, quarters: int) -> None:
        """Lose the connection, and of what is on its way all but the first `quarters`."""
        if self.wire is not None:
            data = self.wire.read() or b""
            self._hear(data[: len(data) * quarters // 4])
            self._end()

    def read(self) -> None:
        while self.wire is not None and not self.wire.stalled:
            data = self.wire.read()
            if data is None:
                break
            if data:
                self._hear(data)
            else:
                self._end()

    def _may_ask(self, topic: str) -> bool:
        waits = any(isinstance(a, Asked) and a.topic == topic for a in self._asked.values())
        return self.wire is not None and topic not in self._on and not waits

    def _subscribing(self, topic: str, fresh: bool, hold: str) -> object:
        spot = None if fresh else self.spots.get(topic)
        number = self._next_id()
        self._asked[number] = Asked(topic, spot is not None, self.world.count(topic))
        fields: dict[str, object] = {"channel": topic, "recoverable": True, "data": hold}
        if spot is not None:
            fields |= {"recover": True, **attrs.asdict(spot)}
        return {"id": number, "subscribe": fields}

    def _publishing(self, topic: str, number: int, reply: bool) -> object:
        self.world.sent(topic, number, self.number)
        command: dict[str, object] = {"publish": {"channel": topic, "data": number}}
        if reply:
            self._asked[self._next_id()] = number
            command["id"] = self._last_id
        return command

    def _next_id(self) -> int:
        self._last_id += 1
        return self._last_id

    def _send(self, *commands: object) -> None:
        if self.wire is not None and commands:
            text = "\n".join(map(json.dumps, commands))
            self.wire.send(client_frame(frames.TEXT, text.encode()))

    def _end(self) -> None:
        if self.wire is not None:
            self.wire.cut()
            self.wire = None

    # what it hears

    def _hear(self, data: bytes) -> None:
        self._buffer += data
        if not self._is_open:
            head, end, rest = self._buffer.partition(b"\r\n\r\n")
            if not end:
                return
            if not head.startswith(b"HTTP/1.1 101"):
                assert head.startswith(b"HTTP/1.1 503"), head  # the broker is stopping
                self._end()
                return
            self._is_open, self._buffer = True, rest
        while (header := frames.read_header(self._buffer)) is not None:
            end_of_frame = header.size + header.length
            if len(self._buffer) < end_of_frame:
                return
            payload = self._buffer[header.size : end_of_frame]
            self._buffer = self._buffer[end_of_frame:]
            if header.opcode == frames.CLOSE:
                self._end()
                return
            for line in payload.split(b"\n"):
                self._hear_object(json.loads(line))

    def _hear_object(self, said: Any) -> None:
        if "push" in said:
            self._hear_push(said["push"])
            return
        assert "error" not in said, said
        asked = self._asked.pop(said["id"], None)
        if isinstance(asked, int):
            self.world.acknowledged.append(asked)
        elif isinstance(asked, str):
            self._on.pop(asked, None)  # it may have been ended before
        elif asked is not None:
            reply = said["connect"]["subs"] if "connect" in said else {}
            self._hear_subscribed(asked, reply.get(PERSONAL) or said["subscribe"])

    def _hear_subscribed(self, asked: Asked, reply: Any) -> None:
        topic, world = asked.topic, self.world
        assert topic not in self._on, "subscribed twice"
        epoch, offset = reply["epoch"], reply["offset"]
        spot = self.spots.setdefault(topic, Spot(epoch, offset))
        before = attrs.evolve(spot)
        assert reply.get("was_recovering", False) == asked.recovers
        missed = reply["publications"]
        self._on[topic] = True
        self._may_get_retained.discard(topic)
        if reply.get("recovered"):
            # Official SDKs keep this position before they hand out the first publication.
            assert (spot.epoch, spot.offset) == (epoch, offset), "not the position asked for"
            for publication in missed:
                self._see(topic, publication)
            return
        assert not missed, "publications without a recovery"
        self._may_get_retained.add(topic)
        self.spots[topic] = Spot(epoch, offset)

        def check() -> None:
            place = world.place(topic, epoch, offset)
            assert place >= asked.had - 1, "a position of long ago"
            assert place >= world.place(topic, before.epoch, before.offset), "a step back"
            if asked.recovers:
                assert not world.keeps(topic, before), "what is kept was not recovered"

        world.check_later(check)

    def _hear_push(self, push: Any) -> None:
        if "disconnect" in push:
            return
        topic = push["channel"]
        if "unsubscribe" in push:
            assert topic in self._on, "the end of no subscription"
            assert push["unsubscribe"]["code"] == 2500
            if self._on[topic]:  # else it crosses our own, whose reply is to come
                del self._on[topic]
        elif topic == ">":
            self._hear_pattern(push["pub"])
        elif "pub" in push:
            if self._on.get(topic) is False:
                return
            assert topic in self._on, "a publication without a subscription"
            if push["pub"].get("tags", {}).get("retained"):
                self._hear_retained(topic, push["pub"]["data"])
            else:
                self._see(topic, push["pub"])

    def _see(self, topic: str, publication: Any) -> None:
        spot, number = self.spots[topic], publication["data"]
        assert publication["offset"] == spot.offset + 1, "not the one behind the last"
        spot.offset += 1
        epoch, offset, world = spot.epoch, spot.offset, self.world

        def check() -> None:
            place = world.place(topic, epoch, offset)
            assert world.told[topic][place].number == number, "not what was published there"

        world.check_later(check)

    def _hear_retained(self, topic: str, number: int) -> None:
        assert topic in self._may_get_retained, "retained, and seen before"
        self._may_get_retained.discard(topic)
        epoch, offset, world = self.spots[topic].epoch, self.spots[topic].offset, self.world

        def check() -> None:
            place = world.place(topic, epoch, offset)
            assert world.told[topic][place].number == number, "an old value is retained"

        world.check_later(check)

    def _hear_pattern(self, publication: Any) -> None:
        topic, number = publication["channel"], publication["data"]
        if topic in RULES and "retained" not in publication["tags"]:
            assert number > 0
            world, before = self.world, self._of_pattern.get(topic, 0)
            self._of_pattern[topic] = number
            world.check_later(lambda: world.check_order(topic, before, number))


@attrs.frozen
class Told:
    """A publication as the witness tells of it; `at` is virtual time."""

    offset: int
    number: int
    at: float


class World:
    """The broker, its clients, and what is true."""

    keeps_all = False
    """Whether what is kept survives the end of the broker."""
    is_shared = False
    """Whether there are other brokers, so that its own memory does not bound what is kept."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.brokers = [broker]
        """All that are one with it, too."""
        self.nets: list[Network] = []
        """Where clients join, by turns: the broker, or each of some that are one."""
        self.clients = [Client(self, number) for number in range(3)]
        self.told: dict[str, list[Told]] = {topic: [] for topic in TOPICS}
        self.acknowledged: list[int] = []
        self.hold = trio.Event()
        self._checked = dict.fromkeys(TOPICS, 0)
        self._where: dict[int, tuple[str, int]] = {}
        self._sent: dict[int, tuple[str, int]] = {}
        self._newest: dict[tuple[str, int], int] = {}
        # Where each epoch's offset 0 is in `told`: offset n is n places behind it.
        self._epochs: dict[tuple[str, str], int] = {}
        # Publications before these may have been trimmed.
        self._sure_from = dict.fromkeys(TOPICS, 0)
        self._now_epochs: dict[str, str] = {}
        self._checks: list[Callable[[], None]] = []

    # what is true

    def count(self, topic: str) -> int:
        return len(self.told[topic])

    def sent(self, topic: str, number: int, sender: int) -> None:
        self._sent[number] = topic, sender

    def numbers(self, count: int) -> list[int]:
        last = len(self._sent)
        return list(range(last + 1, last + 1 + count))

    def place(self, topic: str, epoch: str, offset: int) -> int:
        return self._epochs[topic, epoch] + offset

    def keeps(self, topic: str, spot: Spot) -> bool:
        """Whether all behind `spot` is kept for sure."""
        told, rules = self.told[topic], RULES[topic]
        first = self.place(topic, spot.epoch, spot.offset) + 1
        return self._now_epochs[topic] == spot.epoch and (
            first == len(told)
            or (
                first >= max(self._sure_from[topic], len(told) - rules.history_size)
                and told[first].at + rules.history_ttl > trio.current_time()
            )
        )

    def check_order(self, topic: str, before: int, number: int) -> None:
        assert self._where[number][0] == topic
        if before:
            assert self._where[before][1] < self._where[number][1], "a pattern reorders"

    def check_later(self, check: Callable[[], None]) -> None:
        """Once the witness has told all."""
        self._checks.append(check)

    def trimmed(self) -> None:
        """Publications up to now may be gone."""
        for topic, told in self.told.items():
            self._sure_from[topic] = len(told)

    async def note_epochs(self) -> None:
        for topic, told in self.told.items():
            _, position = await self.broker.history(topic, limit=0)
            base = len(told) - 1 - position.offset
            assert self._epochs.setdefault((topic, position.epoch), base) == base
            self._now_epochs[topic] = position.epoch

    def check(self) -> None:
        for topic, told in self.told.items():
            for place in range(self._checked[topic], len(told)):
                one = told[place]
                assert one.number not in self._where, "published twice"
                sent_to, sender = self._sent[one.number]
                assert sent_to == topic
                assert self._newest.get((topic, sender), 0) < one.number, "a sender's order"
                self._newest[topic, sender] = one.number
                self._where[one.number] = topic, place
            self._checked[topic] = len(told)
        checks, self._checks = self._checks, []
        for check in checks:
            check()
        acknowledged, self.acknowledged = self.acknowledged, []
        for number in acknowledged:
            assert number in self._where, "acknowledged and not published"

    def check_all_sent(self, numbers: list[int]) -> None:
        assert all(number in self._where for number in numbers), "sent and not published"

    # what happens

    @asynccontextmanager
    async def opened(self) -> AsyncGenerator[None]:
        """The broker serves, and a witness listens to each topic, for as long as the block; which has to stop
        the broker."""
        async with open_test_broker(self.broker) as net, trio.open_nursery() as witnesses:
            self.nets = [net]
            await self.begin_witnesses(self.broker, witnesses)
            yield

    async def begin_witnesses(self, broker: Broker, tasks: trio.Nursery) -> None:
        for topic in TOPICS:
            await tasks.start(self._witness, broker, topic)

    async def quiet(self) -> None:
        """Wait until nothing moves any more."""
        await wait_all_tasks_blocked()

    async def settle(self) -> None:
        """Until nothing moves any more; then the clients read, and all is checked."""
        await self.quiet()
        for client in self.clients:
            client.read()
        self.check()

    async def authorize(self, event: SubscribeEvent) -> None:
        if event.data == "hold":
            await self.hold.wait()

    def release(self, *, for_good: bool = False) -> None:
        self.hold.set()
        if not for_good:
            self.hold = trio.Event()

    async def _witness(
        self, broker: Broker, topic: str, *, task_status: trio.TaskStatus[None]
    ) -> None:
        async with broker.subscribe(topic, capacity=10_000) as messages:
            task_status.started()
            async for told in messages:
                if told.tags:
                    continue  # retained, as some engines do beyond a restart
                assert isinstance(told.value, int)
                self.told[topic].append(Told(told.offset, told.value, trio.current_time()))

    async def finish(self) -> None:
        """Let everything come to rest with all clients here, and see that they have it all."""
        self.release(for_good=True)
        for client in self.clients:
            if client.wire is not None:
                client.wire.resume()
        await self.settle()
        for client in self.clients:
            await client.join(at_once=True)
        await self.settle()
        numbers = []
        for topic in TOPICS:
            for client in self.clients:
                client.subscribe(topic, "recover", "")
        for topic in TOPICS:
            numbers += Publish(topic, 1, "app", 0).send(self)
            numbers += Publish(topic, 1, "joined", 1).send(self)
        await self.settle()
        self.check_all_sent(numbers)
        for client in self.clients:
            assert client.wire is not None
            for topic, told in self.told.items():
                spot = client.spots[topic]
                assert self.place(topic, spot.epoch, spot.offset) == len(told) - 1, "not all came"


# steps


class Step(Protocol):
    async def do(self, world: World) -> None: ...


@attrs.frozen
class Publish:
    topic: str
    count: int
    how: str
    client: int

    def send(self, world: World) -> list[int]:
        numbers = world.numbers(self.count)
        if self.how == "app":
            for number in numbers:
                world.sent(self.topic, number, -1)
                world.broker.publish_nowait(self.topic, number)
        elif world.clients[self.client].wire is not None:
            world.clients[self.client].publish(self.topic, numbers, self.how)
        return numbers

    async def do(self, world: World) -> None:
        self.send(world)


@attrs.frozen
class Join:
    client: int
    at_once: bool

    async def do(self, world: World) -> None:
        await world.clients[self.client].join(self.at_once)


@attrs.frozen
class Drop:
    client: int
    quarters: int

    async def do(self, world: World) -> None:
        world.clients[self.client].drop(self.quarters)


@attrs.frozen
class Subscribe:
    client: int
    topic: str
    how: str
    hold: str

    async def do(self, world: World) -> None:
        world.clients[self.client].subscribe(self.topic, self.how, self.hold)


@attrs.frozen
class SubscribeAmid:
    client: int
    topic: str
    count: int

    async def do(self, world: World) -> None:
        client = world.clients[self.client]
        client.subscribe_amid(self.topic, world.numbers(self.count))


@attrs.frozen
class Listen:
    """To all topics by a pattern, beside what else a client listens to."""

    client: int

    async def do(self, world: World) -> None:
        world.clients[self.client].subscribe_pattern()


@attrs.frozen
class Unsubscribe:
    client: int
    topic: str

    async def do(self, world: World) -> None:
        world.clients[self.client].unsubscribe(self.topic)


@attrs.frozen
class Stall:
    client: int
    resume: bool

    async def do(self, world: World) -> None:
        wire = world.clients[self.client].wire
        if wire is not None:
            if self.resume:
                wire.resume()
            else:
                wire.stall()


@attrs.frozen
class Swamp:
    """More than a client that has just stopped reading can be kept, and more while that is seen."""

    client: int
    first: str
    topic: str
    count: int
    turns: int

    async def do(self, world: World) -> None:
        await Stall(self.client, False).do(world)
        # A message on its way by then is never dropped.
        Publish(self.first, 1, "app", 0).send(world)
        await world.quiet()
        Publish(self.first, self.count // 3, "app", 0).send(world)
        Publish(self.topic, self.count, "app", 0).send(world)
        for _ in range(self.turns):
            await trio.lowlevel.checkpoint()
        for client in range(3):
            if client != self.client:
                Publish(self.topic, 2, "no reply", client).send(world)


@attrs.frozen
class SubscribeAcross:
    """Subscribe, and publish while the authorizer takes its time."""

    client: int
    topic: str
    how: str
    publish: Publish
    turns: int

    async def do(self, world: World) -> None:
        client = world.clients[self.client]
        client.unsubscribe(self.topic)
        await world.settle()
        client.subscribe(self.topic, self.how, "hold")
        await world.quiet()
        self.publish.send(world)
        for _ in range(self.turns):
            await trio.lowlevel.checkpoint()
        world.release()


@attrs.frozen
class Away:
    """Lose the connection, miss something, and be back in time or not."""

    client: int
    topic: str
    seen: int
    seconds_before: float
    missed: int
    seconds_away: float

    async def do(self, world: World) -> None:
        Publish(self.topic, self.seen, "app", 0).send(world)
        await Sleep(self.seconds_before).do(world)
        await Drop(self.client, 4).do(world)
        Publish(self.topic, self.missed, "app", 0).send(world)
        await Sleep(self.seconds_away).do(world)
        await Join(self.client, True).do(world)


@attrs.frozen
class Release:
    """The authorizer lets go of all whom it holds."""

    async def do(self, world: World) -> None:
        world.release()


@attrs.frozen
class Sleep:
    seconds: float

    async def do(self, world: World) -> None:
        await world.settle()
        await trio.sleep(self.seconds)


@attrs.frozen
class Remove:
    topic: str

    async def do(self, world: World) -> None:
        await world.broker.remove_history(self.topic)
        world.check_later(world.trimmed)


@attrs.frozen
class Squeeze:
    """Something else takes all the room there is for history."""

    async def do(self, world: World) -> None:
        world.broker.publish_nowait("other", "x" * CONFIG.history_bytes)
        if not world.is_shared:
            world.check_later(world.trimmed)


@attrs.frozen
class Forget:
    """So many ask for the position of topics that those without publications are forgotten.

    With nobody here: a subscriber would see the new epoch's offsets and hear of it when it is back.
    """

    async def do(self, world: World) -> None:
        await world.settle()
        for client in world.clients:
            client.drop(4)
        await world.quiet()
        for topic in TOPICS:
            await world.broker.remove_history(topic)
        for number in range(CONFIG.history_bytes // 256):
            await world.broker.history(f"other.{number}", limit=0)
        world.trimmed()
        await world.note_epochs()


@attrs.frozen
class Restart:
    """The broker ends, `kindly` or in mid-air; of what was on its way, these `quarters` arrive."""

    kindly: bool
    quarters: int


clients = st.integers(0, 2)
topics = st.sampled_from(TOPICS)
asked_for = st.sampled_from(TOPICS[:-1])
quarters = st.integers(0, 4)
counts = st.integers(1, 12)
publishes = st.builds(
    Publish, topics, counts, st.sampled_from(["app", "joined", "one by one", "no reply"]), clients
)
ways = st.sampled_from(["recover", "fresh", "zero"])
subscribes = st.builds(Subscribe, clients, asked_for, ways, st.sampled_from(["", "hold"]))
swamps = st.builds(Swamp, clients, topics, topics, st.integers(6, 12), st.integers(4, 5))
seconds = st.sampled_from([0.0, 1.0, 2.0, 2.9, 11.0, 31.0])
steps = st.one_of(
    publishes,
    publishes,
    publishes,
    subscribes,
    subscribes,
    st.builds(Join, clients, st.booleans()),
    st.builds(Drop, clients, quarters),
    st.builds(SubscribeAmid, clients, asked_for, st.integers(1, 3)),
    st.builds(Listen, clients),
    st.builds(Unsubscribe, clients, asked_for),
    st.builds(Stall, clients, st.booleans()),
    swamps,
    swamps,
    swamps,
    st.builds(SubscribeAcross, clients, asked_for, ways, publishes, st.integers(0, 3)),
    st.builds(Away, clients, topics, counts, seconds, counts, seconds),
    st.builds(Release),
    st.builds(Sleep, seconds),
    st.builds(Remove, topics),
    st.builds(Squeeze),
    st.builds(Forget),
    st.builds(Restart, st.booleans(), quarters),
)
SETTLE = 8
turns = st.integers(0, SETTLE)
"""How often the event loop turns before the next step; so many: until nothing moves."""

Script: TypeAlias = list[tuple[Step | Restart, int]]

scripts = st.lists(st.tuples(steps, turns), max_size=30)


async def play(script: Script, world: World) -> None:
    """Have a script happen to a world; see the module."""

    async def welcome(event: ConnectEvent) -> ConnectReply:
        return ConnectReply(user="u")

    for broker in world.brokers:
        broker.on_connect(welcome)
        broker.on_subscribe(world.authorize)
    for client in world.clients[:2]:
        client.wanted = dict.fromkeys(TOPICS[:-1])
    remaining = iter(script)
    restart: Restart | None = None
    more = True
    while more:
        with trio.CancelScope() as power:
            async with world.opened():
                await world.note_epochs()
                for client in world.clients:
                    await client.join(at_once=True)
                if restart is None:  # after a restart all come at once
                    await world.settle()
                restart, more = None, False
                for step, pause in remaining:
                    if isinstance(step, Restart):
                        restart, more = step, True
                        break
                    await step.do(world)
                    if pause == SETTLE:
                        await world.settle()
                    else:
                        for _ in range(pause):
                            await trio.lowlevel.checkpoint()
                if restart is None:
                    await world.finish()
                world.broker.stop()
                if restart is not None and not restart.kindly:
                    await wait_all_tasks_blocked()
                    power.cancel()
        if restart is not None:
            for client in world.clients:
                client.drop(restart.quarters)
            await world.quiet()
            world.check()
            if not world.keeps_all:
                world.trimmed()


def hold(act: Callable[[Script], None], examples: int) -> None:
    """Have so many scripts made up and acted."""

    @settings(max_examples=examples, deadline=None, report_multiple_bugs=False)
    @given(scripts)
    def some(script: Script) -> None:
        act(script)

    some()


def on_memory(script: Script) -> None:
    trio.run(play, script, World(Broker(CONFIG)), clock=MockClock(autojump_threshold=0))


def on_sqlite(script: Script) -> None:
    with tempfile.TemporaryDirectory() as directory:
        # What waits for the power to fail would only take longer.
        engine = f"sqlite:{directory}/log.db?sync=process"
        world = World(Broker(attrs.evolve(CONFIG, engine=engine)))
        world.keeps_all = True
        trio.run(play, script, world, clock=MockClock(autojump_threshold=0))


@pytest.mark.parametrize(
    ("engine", "act"), [("memory", on_memory), ("sqlite", on_sqlite)], ids=["memory", "sqlite"]
)
def test_recovery_never_loses_duplicates_or_reorders(
    engine: str, act: Callable[[Script], None], how_many_scripts: int | None
) -> None:
    hold(act, how_many_scripts or EXAMPLES[engine])
