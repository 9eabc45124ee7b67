"""The contract of an engine as checks, for every engine that there is, and for yours.

::

    @pytest.mark.parametrize("check", ENGINE_CONTRACT)
    async def test_my_engine(check, autojump_clock, tmp_path):
        await ENGINE_CONTRACT[check](lambda: open_my_engine(tmp_path / "store"))

A check opens an engine on the same store as often as it likes, one after another, and begins with
an empty one. It takes virtual time: an engine that waits for a disk does so in line, by
`wait_in_line`.
"""

import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Final, TypeAlias, TypeVar

import trio

from broker.config.settings import TopicRules
from broker.core.history import UnrecoverablePosition
from broker.core.messages import ClientInfo, Delivery, Position, Publication, Series
from broker.core.session import Parcel
from broker.core.work import Allowance
from broker.engines.engine import Engine, IdempotencyKey, Submission
from broker.errors import Refused

OpenEngine: TypeAlias = Callable[[], AbstractAsyncContextManager[Engine]]
"""Opens an engine on the store of one check, with room for some thousand publications."""

EngineCheck: TypeAlias = Callable[[OpenEngine], Awaitable[None]]

T = TypeVar("T")

RULES: Final = TopicRules(history_size=10_000, history_ttl=3600)
NO_HISTORY: Final = TopicRules(history_size=0)


async def wait_in_line(work: Callable[[], T], /) -> T:
    """Wait for a disk in the loop itself, with some turns for others around it: virtual time does not
    wait for threads."""
    await trio.lowlevel.checkpoint()
    result = work()
    with trio.CancelScope(shield=True):
        await trio.lowlevel.checkpoint()
    return result


class Witness:
    """A sink that sees all that is delivered, and publishes as the router does."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.delivered: dict[str, list[Publication]] = {}
        self.listeners: dict[str, list[Callable[[Publication], None]]] = {}
        self.answers: list[Position | Refused | None] = []
        self.gaps: list[str] = []

    def deliver(self, parcel: Parcel, *, retain: bool) -> float:
        if retain:
            self.engine.retained.deliver(parcel)
        for batch in parcel.batches:
            self.delivered.setdefault(parcel.topic, []).extend(batch)
            for publication in batch:
                for listener in list(self.listeners.get(parcel.topic, ())):
                    listener(publication)
        return 0.0

    def settled(self) -> None:
        pass

    def wants(self, topic: str) -> bool:
        return True

    def listened(self) -> Sequence[str]:
        return list(self.listeners)

    def gap(self, topic: str) -> Iterator[float]:
        self.gaps.append(topic)
        yield 0.0

    def publish(
        self,
        topic: str,
        *data: bytes,
        rules: TopicRules = RULES,
        keep: bool = True,
        retain: bool = False,
        key: IdempotencyKey | None = None,
        info: ClientInfo | None = None,
        done: Callable[[Position | Refused | None], None] | None = None,
        payer: Allowance | None = None,
    ) -> None:
        """Publish in a row; `done` is told once, at once or later. Raises `Refused` as the engine does."""
        engine = self.engine
        keep, retain = keep and rules.history_size > 0, retain or rules.retain
        batch: Sequence[Publication] = [Publication(topic, each, info) for each in data]
        if len(data) > 1:  # as the router does
            batch = Series(topic, data, info)
        parcel = Parcel(topic, "close", [batch], payer=payer)
        answer = done or self.answers.append

        def tell(position: Position | Refused | None) -> None:
            if key is not None and not isinstance(position, Refused):
                delivery = Delivery(0, 0, 0, position=position)
                engine.keys.keep(key.owner, (topic, key.key), delivery, trio.current_time())
            answer(position)

        if engine.defers(topic, rules, more=retain or key is not None):
            engine.submit(Submission(parcel, rules, keep, retain, key, [tell]))
            return
        if keep:
            parcel.batches = [engine.publish(topic, batch, rules, trio.current_time())]
        self.deliver(parcel, retain=retain)
        tell(engine.position(topic) if keep else None)

    async def published(self, topic: str, *data: bytes, **options: object) -> Position | None:
        """Publish, and wait until it is kept. Raises `Refused`."""
        ended = trio.Event()
        answers: list[Position | Refused | None] = []

        def tell(answer: Position | Refused | None) -> None:
            answers.append(answer)
            ended.set()

        self.publish(topic, *data, **options, done=tell)  # type: ignore[arg-type]
        await ended.wait()
        (answer,) = answers
        if isinstance(answer, Refused):
            raise answer
        return answer

    def offsets(self, topic: str) -> list[int]:
        return [each.offset for each in self.delivered.get(topic, ())]

    def data(self, topic: str) -> list[bytes]:
        return [each.data for each in self.delivered.get(topic, ())]


async def kept(engine: Engine, topic: str) -> list[bytes]:
    """The data of all that a topic keeps."""
    await engine.fetch((topic,))
    return [each.data for each in engine.history(topic, None, -1, False)[0]]


async def position_of(engine: Engine, topic: str) -> Position:
    """Where a topic is."""
    await engine.fetch((topic,))
    return engine.position(topic)


async def has_recovered(engine: Engine, topic: str, since: Position) -> bool:
    """Whether a subscriber that has all up to there gets the rest."""
    await engine.fetch((topic,))
    return engine.view(topic, since).recovered


class _Reader:
    """Listens to one topic now and then, and recovers in between; it must never miss anything."""

    def __init__(self, witness: Witness, topic: str) -> None:
        self._witness = witness
        self._topic = topic
        self._position: Position | None = None
        self.seen: list[bytes] = []

    async def come(self) -> None:
        engine, topic = self._witness.engine, self._topic
        await engine.fetch((topic,))
        if self._position is None:
            self._position = engine.position(topic)
            assert not self._position.offset, "nothing was published yet"
        else:
            view = engine.view(topic, self._position)
            assert view.recovered, "there is room for all"
            for publication in view.missed:
                self._take(publication)
            assert self._position.offset == view.top.offset, "all missed are there"
        self._witness.listeners.setdefault(topic, []).append(self._take)

    def go(self) -> None:
        self._witness.listeners[self._topic].remove(self._take)

    def _take(self, publication: Publication) -> None:
        assert self._position is not None
        assert publication.offset == self._position.offset + 1, "no gap, nothing twice"
        self._position = Position(publication.offset, self._position.epoch)
        self.seen.append(publication.data)


async def check_order(open_engine: OpenEngine) -> None:
    """Per topic one order without a hole, the same for all, also while others come and go; and nothing is
    acknowledged before it is delivered."""
    chance = random.Random(7)  # noqa: S311 - the same each time
    topics = [f"t{number}" for number in range(5)]
    async with open_engine() as engine:
        witness = Witness(engine)
        readers = [_Reader(witness, topic) for topic in topics[:3] for _ in range(2)]
        said: dict[str, list[bytes]] = {topic: [] for topic in topics}
        acknowledged = 0

        def tell(topic: str, last: bytes, answer: Position | Refused | None) -> None:
            nonlocal acknowledged
            assert isinstance(answer, Position)
            offset = answer.offset
            there = [each.data for each in witness.delivered[topic] if each.offset == offset]
            assert there == [last], "it was delivered, in that place"
            acknowledged += 1

        async def publisher(number: int) -> None:
            for turn in range(60):
                topic = chance.choice(topics)
                data = [b"%d.%d.%d" % (number, turn, n) for n in range(chance.randint(1, 4))]
                said[topic] += data
                witness.publish(topic, *data, done=partial(tell, topic, data[-1]))
                for _ in range(chance.randint(0, 2)):
                    await trio.lowlevel.checkpoint()

        async def wanderer(reader: _Reader) -> None:
            for _ in range(40):
                for _ in range(chance.randint(0, 3)):
                    await trio.lowlevel.checkpoint()
                reader.go()
                for _ in range(chance.randint(0, 3)):
                    await trio.lowlevel.checkpoint()
                await reader.come()

        async with engine.running(witness):
            for reader in readers:
                await reader.come()
            async with trio.open_nursery() as nursery:
                for number in range(4):
                    nursery.start_soon(publisher, number)
                for reader in readers:
                    nursery.start_soon(wanderer, reader)
        assert acknowledged == 240, "the end of `running` settles all"
        async with engine.running(witness):
            for topic in topics:
                assert witness.data(topic) == said[topic] == await kept(engine, topic)
                assert witness.offsets(topic) == list(range(1, len(said[topic]) + 1))
        for reader, topic in zip(
            readers, [each for each in topics[:3] for _ in range(2)], strict=True
        ):
            assert reader.seen == said[topic]


async def check_views(open_engine: OpenEngine) -> None:
    """A view is complete or says that it is not; another epoch is never taken for this one."""
    async with open_engine() as engine:
        witness = Witness(engine)
        # A server that nodes share has a clock of its own.
        ttl = 0.5 if engine.durability == "shared" else 60.0
        small = TopicRules(history_size=3, history_ttl=ttl)
        async with engine.running(witness):
            position = await witness.published("a", b"1", b"2", b"3", b"4", rules=small)
            assert position is not None
            assert position.offset == 4
            epoch = position.epoch
            assert await position_of(engine, "a") == position
            view = engine.view("a", Position(2, epoch))
            assert ([each.data for each in view.missed], view.recovered) == ([b"3", b"4"], True)
            assert view.top == position
            for missed_some in (Position(0, epoch), Position(5, epoch), Position(4, "other")):
                assert not engine.view("a", missed_some).recovered
            try:
                engine.history("a", Position(2, "other"), -1, False)
            except UnrecoverablePosition as error:
                assert error.position == position
            else:
                raise AssertionError("another epoch was read")
            await trio.sleep(ttl + 0.1)
            assert await kept(engine, "a") == []
            assert engine.view("a", position).recovered, "who missed nothing learns so"


async def check_rules(open_engine: OpenEngine) -> None:
    """Rules and options count for each publication: how much is kept, whether it is kept at all, whether it
    is the last value; and one that is not kept stays in its place."""
    async with open_engine() as engine:
        witness = Witness(engine)
        async with engine.running(witness):
            witness.publish("a", b"1", b"2")
            witness.publish("a", b"passing", keep=False)
            witness.publish("a", b"3", retain=True)
            assert await witness.published("a", b"4", keep=False) is None
            await witness.published("off", b"5", rules=NO_HISTORY, retain=True)
            await witness.published("off", b"6", rules=NO_HISTORY)
            assert witness.data("a") == [b"1", b"2", b"passing", b"3", b"4"]
            assert witness.offsets("a") == [1, 2, 0, 3, 0]
            assert await kept(engine, "a") == [b"1", b"2", b"3"]
            assert witness.offsets("off") == [0, 0]
            assert {each.topic: each.data for each in engine.retained.values()} == {
                "a": b"3",
                "off": b"5",
            }
            await witness.published("a", b"7", rules=TopicRules(history_size=2))
            assert await kept(engine, "a") == [b"3", b"7"]
            # Nothing overtakes on one topic, whichever way it goes.
            witness.publish("mixed", b"1", rules=NO_HISTORY, retain=True)
            witness.publish("mixed", b"2", rules=NO_HISTORY)
            await witness.published("mixed", b"3", rules=NO_HISTORY)
            assert witness.data("mixed") == [b"1", b"2", b"3"]


async def check_removal(open_engine: OpenEngine) -> None:
    """Removed publications are gone, and the count goes on; a topic that is forgotten begins anew, and
    publications on their way to it are delivered and not kept."""
    async with open_engine() as engine:
        witness = Witness(engine)
        async with engine.running(witness):
            witness.publish("a", b"1", b"2")
            await engine.remove("a")
            assert witness.data("a") == [b"1", b"2"], "in its place among what was published"
            assert await kept(engine, "a") == []
            before = await position_of(engine, "a")
            assert before.offset == 2
            after = await witness.published("a", b"3")
            assert after == Position(3, before.epoch)
            assert not await has_recovered(engine, "a", Position(1, before.epoch))
            await engine.remove("never was")
            engine.forget(lambda topic: topic == "a")
            assert (await position_of(engine, "a")).epoch != before.epoch
            await witness.published("b", b"1")
            witness.publish("b", b"2")
            engine.forget(lambda topic: topic == "b")
            await witness.published("b", b"3")
            assert witness.data("b") == [b"1", b"2", b"3"]
            assert await kept(engine, "b") == [b"3"]


async def check_room(open_engine: OpenEngine) -> None:
    """An engine that is full says so, and has room again once what it had is settled."""
    async with open_engine() as engine:
        witness = Witness(engine)
        async with engine.running(witness):
            said = 0
            while not engine.is_full() and said < 200:
                witness.publish("a", bytes(2**16))
                said += 1
            while engine.is_full():
                await engine.wait_room()
            await witness.published("a", b"last")
            assert len(witness.delivered["a"]) == said + 1


async def check_cancelled(open_engine: OpenEngine) -> None:
    """A cancelled engine leaves nothing open: each publication is acknowledged or refused, once."""
    chance = random.Random(11)  # noqa: S311 - the same each time
    for _ in range(30):
        async with open_engine() as engine:
            witness = Witness(engine)
            answers: list[Position | Refused | None] = []
            with trio.CancelScope() as scope:
                async with engine.running(witness):
                    before = len(await kept(engine, "a"))
                    for number in range(6):
                        witness.publish("a", b"%d" % number, done=answers.append)
                        for _ in range(chance.randint(0, 2)):
                            await trio.lowlevel.checkpoint()
                    with trio.move_on_after(0):
                        await engine.remove("other")
                    scope.cancel()
                    await trio.sleep_forever()
            assert len(answers) == 6
            acknowledged = [each for each in answers if isinstance(each, Position)]
            assert len(witness.delivered.get("a", ())) == len(acknowledged)
        async with open_engine() as engine, engine.running(Witness(engine)):
            came = len(await kept(engine, "a")) - before
            if engine.durability == "shared":  # what was sent is on its way
                assert came >= len(acknowledged)
            else:
                assert came == (0 if engine.durability == "none" else len(acknowledged))


async def check_restart(open_engine: OpenEngine) -> None:
    """An engine that keeps more than this process keeps all of it: publications with their senders, epochs,
    last values, keys, fds. Any other begins new epochs."""
    ann = ClientInfo("7", "ann", b'{"name":"Ann"}', None)
    async with open_engine() as engine:
        durable = engine.durability != "none"
        witness = Witness(engine)
        async with engine.running(witness):
            quiet = await position_of(engine, "quiet")
            await witness.published("a", b"1", b"2", info=ann)
            keyed = await witness.published("a", b"3", key=IdempotencyKey("ann", "k"), retain=True)
            await witness.published("gone", b"1")
            await engine.remove("gone")
            engine.note_fds(engine.next_fd + 5)
            await engine.fetch(("a", "gone"))
            position, gone = engine.position("a"), engine.position("gone")
            before, _ = engine.history("a", None, -1, False)
        next_fd = engine.next_fd
    for _ in range(2):
        async with open_engine() as engine:
            now = trio.current_time()
            if not durable:
                assert engine.position("a").epoch != position.epoch
                assert engine.position("quiet").epoch != quiet.epoch
                continue
            assert engine.next_fd >= next_fd or engine.durability == "shared"
            (value,) = engine.retained.values()
            assert (value.data, value.offset) == (b"3", 3)
            witness = Witness(engine)
            async with engine.running(witness):
                assert await position_of(engine, "a") == position
                assert engine.history("a", None, -1, False)[0] == before
                assert await position_of(engine, "quiet") == quiet
                assert await position_of(engine, "gone") == gone
                assert await kept(engine, "gone") == []
                if engine.durability == "shared":  # which knows the keys of all nodes
                    again = await witness.published("a", b"again", key=IdempotencyKey("ann", "k"))
                    assert (again, witness.data("a")) == (keyed, [])
                else:
                    delivery = engine.keys.get("ann", ("a", "k"), now)
                    assert delivery == Delivery(0, 0, 0, position=keyed)
                await witness.published("a", b"more")
                await engine.remove("quiet")
                position = await position_of(engine, "a")
                before, _ = engine.history("a", None, -1, False)
            assert [each.offset for each in before] == list(range(1, position.offset + 1))


ENGINE_CONTRACT: Final[dict[str, EngineCheck]] = {
    "order": check_order,
    "views": check_views,
    "rules": check_rules,
    "removal": check_removal,
    "room": check_room,
    "cancelled": check_cancelled,
    "restart": check_restart,
}
"""The checks by name; each takes an engine on an empty store."""


async def engine_contract(new_store: Callable[[], OpenEngine]) -> None:
    """Hold an engine to the whole contract: `new_store` makes an empty store and returns what opens an
    engine on it. Raises `AssertionError` where it falls short."""
    for check in ENGINE_CONTRACT.values():
        await check(new_store())
