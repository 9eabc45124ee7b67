"""The redis engine against real servers: the contract, several nodes, and faults.

Here time is real, as a server knows no other: nothing waits for a time that could wait for an event.
"""

import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import attrs
import pytest
import structlog.testing
import trio
import trio.lowlevel
import trio.testing

from broker.core.messages import Position, Publication
from broker.engines.engine import IdempotencyKey
from broker.engines.redis import RedisEngine, open_redis
from broker.engines.redis_log import Draft
from broker.engines.redis_outgoing import Order, Outgoing
from broker.engines.redis_wire import Part, Wire
from broker.errors import Refused
from broker.testing import ENGINE_CONTRACT, Witness
from broker.testing.engines import RULES, has_recovered, kept, position_of
from tests.engines.conftest import ROOM
from tests.engines.servers import BINARIES, Proxy, Server, serving


@pytest.fixture(params=BINARIES)
def each_server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    with serving(BINARIES[request.param], tmp_path) as server:
        yield server


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy the machine is, nobody gives up because of that."""
    monkeypatch.setattr("broker.engines.redis_outgoing.PUBLISH_SECONDS", 100)
    monkeypatch.setattr("broker.engines.redis_log.PATIENCE_SECONDS", 100)
    monkeypatch.setattr("broker.engines.redis.FETCH_SECONDS", 100)


@asynccontextmanager
async def opened(
    server: Server | Proxy, *, room: int = ROOM
) -> AsyncGenerator[tuple[RedisEngine, Witness]]:
    """A node of its own."""
    async with open_redis(server.url, room, room, time.time) as engine:
        witness = Witness(engine)
        async with engine.running(witness):
            yield engine, witness


@pytest.mark.parametrize("check", ENGINE_CONTRACT)
async def test_it_keeps_the_contract(each_server: Server, check: str) -> None:
    with trio.fail_after(120):
        await ENGINE_CONTRACT[check](lambda: open_redis(each_server.url, ROOM, ROOM, time.time))


# several nodes


@attrs.define(eq=False)
class Follower:
    """A subscriber at one node that leaves and comes back, by the rules of clients."""

    witness: Witness
    topic: str
    position: Position | None = None
    seen: list[bytes] = attrs.field(factory=list)
    unrecovered: int = 0
    may_lose: bool = False
    """Whether an epoch may lose some of what it keeps."""

    async def come(self) -> None:
        engine = self.witness.engine
        while True:
            try:
                await engine.fetch((self.topic,))
                break
            except Refused:
                pass
        if self.position is None:
            self.position = engine.position(self.topic)
            assert not self.position.offset, "nothing was published yet"
        else:
            view = engine.view(self.topic, self.position)
            if not view.recovered:
                is_over = view.top.epoch != self.position.epoch
                assert is_over or self.may_lose, "only an epoch that is over is lost"
                self.unrecovered += 1
                self.seen.clear()
                self.position = view.top
            for publication in view.missed:
                self.take(publication)
            assert self.position.offset == view.top.offset, "all missed are there"
        self.witness.listeners.setdefault(self.topic, []).append(self.take)

    async def come_back(self) -> None:
        """Come, knowing what was told of gaps until then."""
        await self.witness.engine.fetch((self.topic,))
        self.witness.gaps[:] = [topic for topic in self.witness.gaps if topic != self.topic]
        await self.come()

    def go(self) -> None:
        self.witness.listeners[self.topic].remove(self.take)

    def take(self, publication: Publication) -> None:
        assert self.position is not None
        if self.topic in self.witness.gaps:
            return  # it is told, and would not be given this
        assert publication.offset == self.position.offset + 1, "no gap, nothing twice"
        self.position = Position(publication.offset, self.position.epoch)
        self.seen.append(publication.data)

    async def wander(self, turns: int, chance: random.Random) -> None:
        for _ in range(turns):
            for _ in range(chance.randint(0, 40)):
                await trio.lowlevel.checkpoint()
            self.go()
            for _ in range(chance.randint(0, 40)):
                await trio.lowlevel.checkpoint()
            await self.come_back()


@attrs.define(eq=False)
class Trial:
    """Some nodes, with publishers and subscribers at each."""

    nodes: list[Witness]
    topics: list[str] = attrs.field(factory=lambda: [f"t{number}" for number in range(5)])
    acked: dict[str, list[bytes]] = attrs.field(factory=dict)
    refused: list[bytes] = attrs.field(factory=list)
    followers: list[Follower] = attrs.field(factory=list)
    chance: random.Random = attrs.field(factory=lambda: random.Random(7))
    may_lose: bool = False

    async def publisher(self, witness: Witness, name: str, turns: int) -> None:
        for turn in range(turns):
            topic = self.chance.choice(self.topics)
            data = [
                b"%s.%d.%d" % (name.encode(), turn, n) for n in range(self.chance.randint(1, 4))
            ]
            witness.publish(topic, *data, done=partial(self._tell, topic, data))
            for _ in range(self.chance.randint(0, 20)):
                await trio.lowlevel.checkpoint()

    def _tell(self, topic: str, data: list[bytes], answer: Position | Refused | None) -> None:
        if isinstance(answer, Position):
            self.acked.setdefault(topic, []).extend(data)
        else:
            self.refused += data

    async def run(self, turns: int = 60) -> None:
        """Publish and wander, until all is answered."""
        for witness in self.nodes:
            for topic in self.topics[:3]:
                follower = Follower(witness, topic, may_lose=self.may_lose)
                self.followers.append(follower)
                await follower.come()
        async with trio.open_nursery() as nursery:
            for number, witness in enumerate(self.nodes):
                for each in range(4 // len(self.nodes) + 1):
                    nursery.start_soon(self.publisher, witness, f"p{number}.{each}", turns)
            for follower in self.followers:
                nursery.start_soon(follower.wander, turns // 2, self.chance)
        for witness in self.nodes:  # behind all that they have published
            await witness.published("end", b"end")

    async def check(self, *, epochs_change: bool = False) -> None:
        """All nodes agree; what was acknowledged is kept, once and in order."""
        for follower in self.followers:
            follower.go()
            await follower.come_back()
        for topic in self.topics:
            histories = []
            for witness in self.nodes:
                await witness.published("end", b"end")
                await witness.engine.fetch((topic,))
                publications, _ = witness.engine.history(topic, None, -1, False)
                histories.append([(each.offset, each.data) for each in publications])
            assert all(each == histories[0] for each in histories)
            stored = [data for _, data in histories[0]]
            assert len(set(stored)) == len(stored), "nothing twice"
            if not epochs_change:
                assert [offset for offset, _ in histories[0]] == list(range(1, len(stored) + 1))
                assert set(self.acked.get(topic, ())) <= set(stored), "nothing is lost"
                for publisher in {data.split(b".")[0] + data.split(b".")[1] for data in stored}:
                    own = [d for d in stored if b"".join(d.split(b".")[:2]) == publisher]
                    assert own == sorted(own, key=lambda d: [int(n) for n in d.split(b".")[2:]])
            for follower in self.followers:
                if follower.topic == topic:
                    assert epochs_change or not follower.unrecovered
                    assert follower.seen == stored


@asynccontextmanager
async def trial(server: Server | Proxy, nodes: int, room: int = ROOM) -> AsyncGenerator[Trial]:
    async with AsyncExitStack() as stack:
        found = [await stack.enter_async_context(opened(server, room=room)) for _ in range(nodes)]
        with trio.fail_after(120):  # noqa: ASYNC100 - for the block of the caller
            yield Trial([witness for _, witness in found])


@pytest.mark.parametrize("room", [ROOM, 0])
@pytest.mark.parametrize("nodes", [1, 3])
async def test_all_nodes_see_one_order(each_server: Server, nodes: int, room: int) -> None:
    """Without room every topic is fetched each time that somebody comes, while others publish."""
    async with trial(each_server, nodes, room) as all_nodes:
        await all_nodes.run()
        await all_nodes.check()
        assert not all_nodes.refused


# faults


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for long."""
    monkeypatch.setattr("broker.engines.redis_wire.CALL_SECONDS", 0.3)
    monkeypatch.setattr("broker.engines.redis_log.BLOCK_SECONDS", 0.2)


async def connected_again(trial: Trial) -> None:
    """Wait until each node has published something, and so is in order."""
    for witness in trial.nodes:
        while True:
            try:
                await witness.published("end", b"end")
                break
            except Refused:
                await trio.sleep(0.01)


async def until(is_true: Callable[[], bool]) -> None:
    for _ in range(2000):
        if is_true():
            return
        await trio.sleep(0.005)
    raise AssertionError("it never is")


async def kill_all(server: Server, trial: Trial) -> None:
    for _ in range(8):
        await server.call("CLIENT", "KILL", "TYPE", "normal")
        await connected_again(trial)


async def stall(server: Server, trial: Trial) -> None:
    server.pause()
    await trio.sleep(0.5)  # longer than a call may take, so that all links are lost
    server.go_on()


async def hold_commands(server: Server, trial: Trial) -> None:
    await server.call("CLIENT", "PAUSE", "400")


async def forget_scripts(server: Server, trial: Trial) -> None:
    for _ in range(5):
        await server.call("SCRIPT", "FLUSH")
        await connected_again(trial)


async def become_a_replica(server: Server, trial: Trial) -> None:
    await server.call("REPLICAOF", "127.0.0.1", "1")
    await trio.sleep(0.2)
    await server.call("REPLICAOF", "NO", "ONE")


async def have_no_memory(server: Server, trial: Trial) -> None:
    await server.call("CONFIG", "SET", "maxmemory", "1")
    await trio.sleep(0.2)
    await server.call("CONFIG", "SET", "maxmemory", "0")


HARMLESS = [kill_all, stall, hold_commands, forget_scripts, become_a_replica, have_no_memory]


@pytest.mark.parametrize("fault", HARMLESS)
async def test_a_fault_of_some_moments_loses_nothing(
    server: Server, hurried: None, fault: Callable[[Server, Trial], Awaitable[None]]
) -> None:
    async with trial(server, 3) as all_nodes:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(all_nodes.run)
            await trio.sleep(0.05)
            await fault(server, all_nodes)
        await all_nodes.check()
        assert not all_nodes.refused, "it was over in time"


async def test_a_batch_whose_answer_is_lost_is_sent_again_and_counts_once(server: Server) -> None:
    proxy = Proxy(server, random.Random(3))
    async with proxy.serving():
        async with trial(proxy, 3) as all_nodes:
            await all_nodes.run(150)
            await all_nodes.check()
            assert len(proxy.swallowed) > 3
            assert not all_nodes.refused


async def test_a_batch_that_arrives_after_all_was_sent_again_counts_for_nothing(
    server: Server,
) -> None:
    """As from a connection that was given up, and that Redis reads later."""
    proxy = Proxy(server, random.Random(3))
    async with proxy.serving():
        async with trial(proxy, 1) as one_node:
            await one_node.run(150)
            late = [each for each in proxy.swallowed if b"p0." in each]
            for request in late:
                async with await server.connect() as stream:
                    await stream.send_all(request)
                    assert (await stream.receive_some()).startswith(b"*3\r\n:0\r\n"), (
                        "it was applied"
                    )
            assert late
            await one_node.check()


async def test_a_position_that_another_node_has_told_of_is_read_up_to(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While this node has no link, or has not read so far: to have recovered is no question of where a client
    comes to."""
    proxy = Proxy(server, random.Random(1))
    async with proxy.serving(), opened(server) as (one, teller), opened(proxy) as (two, _):
        with trio.fail_after(60):
            await teller.published("a", b"1")
            await two.fetch(("a",))
            proxy.passes = trio.Event()
            position = await teller.published("a", b"2")
            assert position is not None
            assert two.knows("a")
            assert not two.knows("a", position)
            monkeypatch.setattr("broker.engines.redis.FETCH_SECONDS", 0.1)
            with pytest.raises(Refused, match="history is away") as refusal:
                await two.fetch(("a",), {"a": position})
            assert (refusal.value.code, refusal.value.temporary) == (100, True)
            monkeypatch.setattr("broker.engines.redis.FETCH_SECONDS", 60)
            async with trio.open_nursery() as nursery:
                for _ in range(50):  # in a storm
                    nursery.start_soon(two.fetch, ("a",), {"a": position})
                await trio.testing.wait_all_tasks_blocked()
                proxy.passes.set()
            assert two.knows("a", position)
            assert two.view("a", position).recovered
            for lost in (Position(9, position.epoch), Position(2, "another")):
                await two.fetch(("a",), {"a": lost})
                assert not two.view("a", lost).recovered
            assert one.knows("a") is False


async def test_a_storm_of_positions_that_are_not_known_asks_redis_twice(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(server) as (one, witness):
        await witness.published("a", b"1")
        await one.fetch(("a",))
        asked, call = [], Wire.call

        async def counted(wire: Wire, command: bytes, *parts: Part) -> object:
            asked.append(command)
            return await call(wire, command, *parts)

        monkeypatch.setattr(Wire, "call", counted)
        async with trio.open_nursery() as nursery:
            for number in range(200):
                nursery.start_soon(one.fetch, ("a",), {"a": Position(number, "former")})
        assert 1 <= len(asked) <= 2


async def test_an_epoch_that_another_node_has_told_of_is_read_up_to(server: Server) -> None:
    """A new life of the log: who has heard of it elsewhere is told of its loss once."""
    async with opened(server) as (_, teller), opened(server) as (two, _):
        await teller.published("a", b"1")
        await two.fetch(("a",))
        await server.call("FLUSHALL")
        position = await _published_at_last(teller, "a")
        with trio.fail_after(60):
            await two.fetch(("a",), {"a": position})
            assert two.view("a", position).recovered


async def _published_at_last(witness: Witness, topic: str) -> Position:
    while True:
        with suppress(Refused):
            position = await witness.published(topic, b"again")
            assert position is not None
            return position


async def test_who_is_behind_by_more_than_the_log_is_told(
    server: Server, hurried: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broker.engines.redis_log.LOG_BYTES", 10_000)
    proxy = Proxy(server, random.Random(3))
    async with proxy.serving(), opened(server) as (_, here), opened(proxy) as (slow, there):
        follower = Follower(there, "a")
        await follower.come()
        await here.published("a", b"0")
        await slow.fetch(("b",))
        await until(lambda: bool(follower.seen))
        proxy.passes = trio.Event()
        for number in range(200):
            await here.published("a", b"%d" % number * 100)
        proxy.passes.set()
        await until(lambda: "a" in there.gaps)
        assert not slow.knows("b")
        follower.go()
        await follower.come_back()
        assert not follower.unrecovered, "the history has it still"
        assert len(follower.seen) == 201
        assert slow.statistics().losses == 1


async def test_a_topic_that_redis_has_evicted_is_a_gap_for_who_listens(server: Server) -> None:
    async with opened(server) as (here, witness), opened(server) as (_, other):
        position = await other.published("a", b"1")
        assert position is not None
        await here.fetch(("a", "b"))
        await server.call("DEL", "{broker}:m:a")
        again = await other.published("a", b"2")
        assert again is not None
        assert (again.offset, again.epoch != position.epoch) == (1, True)
        await witness.published("b", b"1")
        assert witness.gaps == ["a"]
        assert not await has_recovered(here, "a", position)
        await other.published("c", b"1")
        await server.call("DEL", "{broker}:h:c")
        position = await other.published("c", b"2")
        assert await kept(here, "c") == [b"2"]
        assert await position_of(here, "c") == position
        assert position is not None
        assert not await has_recovered(here, "c", Position(0, position.epoch))


async def test_keys_that_are_evicted_by_chance_are_a_loss_that_is_told(
    server: Server, hurried: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with `allkeys-random`, while nodes publish and subscribers recover."""
    monkeypatch.setattr("broker.engines.redis_log.RETRY_MAX_SECONDS", 0.1)
    async with trial(server, 3) as all_nodes:
        all_nodes.may_lose = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(all_nodes.run, 200)
            for _ in range(40):
                async with await server.connect() as stream:
                    await stream.send_all(b"RANDOMKEY\r\n")
                    key = bytes(await stream.receive_some()).split(b"\r\n")[1].decode()
                await server.call("DEL", key)
                await trio.sleep(0.02)
        await connected_again(all_nodes)
        for follower in all_nodes.followers:  # which sees by itself that it misses nothing untold
            follower.go()
            await follower.come_back()
            assert len(set(follower.seen)) == len(follower.seen), "nothing twice"
        assert any(each.unrecovered for each in all_nodes.followers)


async def test_what_was_given_up_leaves_nothing_behind(
    server: Server, hurried: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broker.engines.redis_outgoing.PUBLISH_SECONDS", 0.2)
    async with opened(server) as (engine, witness):
        await witness.published("a", b"0")
        server.pause()
        for number in range(20):
            witness.publish("a", b"%d" % number * 1000)
            await trio.lowlevel.checkpoint()
        await until(lambda: len(witness.answers) == 20)
        assert all(isinstance(each, Refused) for each in witness.answers)
        with pytest.raises(Refused):
            await engine.remove("a")
        server.go_on()
        monkeypatch.setattr("broker.engines.redis_outgoing.PUBLISH_SECONDS", 100)
        await connected_again(Trial([witness]))
        await until(lambda: not engine.statistics().waiting)


async def ttl_of(server: Server, topic: str) -> int:
    return int((await server.call("PTTL", f"{{broker}}:m:{topic}")).strip(b":\r\n"))


async def test_an_epoch_that_nobody_uses_ends_soon(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(server) as (engine, witness):
        await engine.fetch(("a",))
        assert 800_000 < await ttl_of(server, "a") <= 900_000
        await witness.published("a", b"1")
        assert await ttl_of(server, "a") > 86_400_000
        await engine.fetch(("b",))
        monkeypatch.setattr("broker.engines.redis.EMPTY_EPOCH_MS", 10**6)
        await engine.incoming.touch_all()
        assert await ttl_of(server, "b") > 900_000


async def test_rules_that_change_are_kept_with_the_topic(server: Server) -> None:
    """Of a topic in use only its top is written each time, unless something else has changed as well."""
    async with opened(server) as (_, witness):
        for size, ttl in [(3, 50.0), (3, 50.0), (5, 50.0), (5, 50.0), (5, 40.0)]:
            rules = attrs.evolve(RULES, history_size=size, history_ttl=ttl)
            position = await witness.published("a", b"1", rules=rules)
            assert position is not None
            found = await server.call("HMGET", "{broker}:m:a", "t", "s", "l")
            lines = found.decode().split("\r\n")[2::2]
            assert lines == [str(position.offset), str(size), str(int(ttl * 1000))]


async def test_topics_are_forgotten_a_few_at_a_time_and_before_they_are_looked_at(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broker.engines.redis.FORGOTTEN_AT_ONCE", 10)
    names = [f"t{number}" for number in range(35)]
    async with opened(server) as (engine, witness):
        for name in names:
            await witness.published(name, b"1")
        await engine.fetch(names)
        before = {engine.position(name).epoch for name in names}
        ordered: list[str] = []
        order = Outgoing.order

        def note(out: Outgoing, flag: str, topic: str) -> Order:
            ordered.append(topic)
            return order(out, flag, topic)

        monkeypatch.setattr(Outgoing, "order", note)
        engine.forget(lambda topic: topic != "t8")
        assert ordered == []
        assert not engine.knows("t7")
        assert engine.knows("t8")
        witness.publish("t9", b"2")
        assert ordered == ["t7", "t9"]
        steps = [0]
        while len(ordered) < 34:
            await trio.lowlevel.checkpoint()
            steps.append(len(ordered) - sum(steps))
        assert max(steps) <= 12
        await witness.published("t9", b"3")
        assert await kept(engine, "t9") == [b"2", b"3"]
        await engine.fetch(names)
        assert len(before & {engine.position(name).epoch for name in names}) == 1


async def test_odd_texts_are_no_trouble(server: Server) -> None:
    """Half a surrogate pair, which a client may put into a key, and an app anywhere."""
    odd = "\ud83d"
    async with opened(server) as (engine, witness), opened(server) as (_, other):
        key = IdempotencyKey(f"ann{odd}", odd)
        position = await witness.published("a", b"1", key=key)
        assert await other.published("a", b"1", key=key) == position
        assert await other.published("a", b"1", key=IdempotencyKey("ann", odd)) != position
        engine.cluster.file(odd, odd, b"x", odd)
        assert await engine.cluster.read(odd, 1) == {odd: b"x"}
        assert not engine.statistics().failing


async def test_what_a_later_version_writes_into_the_log_is_passed_over_and_told(
    server: Server,
) -> None:
    """A kind of entry that this one does not know, and a field more in a message."""
    async with opened(server) as (engine, witness):
        await witness.published("a", b"1")
        shared = engine.incoming.shared
        with structlog.testing.capture_logs() as lines, trio.fail_after(60):
            engine.incoming.out.note(Draft("Z", "news", data=b"of tomorrow"), lasts=False)
            await witness.published("a", b"2")
        assert witness.data("a") == [b"1", b"2"]
        assert (engine.statistics().misread, engine.statistics().losses) == (1, 0)
        (line,) = [each for each in lines if each["event"] == "log_misread"]
        assert "another version" in line["reason"]
        assert not shared.failing


BEHIND_ALL = "18446744073709551615-18446744073709551615"


@pytest.mark.parametrize("place", ["*", BEHIND_ALL, "{}-7"], ids=["now", "last", "between"])
async def test_what_another_program_writes_into_the_log_stops_nobody(
    server: Server, place: str
) -> None:
    """It may stand behind all that is ours, so that nothing can be appended behind it."""
    async with opened(server) as (engine, witness), opened(server) as (_, other):
        await witness.published("a", b"1")
        shared = engine.incoming.shared
        with structlog.testing.capture_logs() as lines, trio.fail_after(60):
            place = place.format(shared.place)
            await server.call("XADD", f"{shared.key}:log", place, "of", "another program")
            while not engine.statistics().misread:  # noqa: ASYNC110 - a statistic sets no event
                await trio.sleep(0.01)
            await witness.published("a", b"2")
            await other.published("a", b"3")
            await witness.published("b", b"4")
        assert [each.data for each in witness.delivered["a"]] == [b"1", b"2", b"3"]
        assert engine.statistics().losses == 0
        assert not engine.statistics().failing
        (line,) = [each for each in lines if each["event"] == "log_misread"][:1]
        assert "another program" in line["reason"]


@pytest.mark.parametrize("spoilt", ["h", "m", "log", "in"])
@pytest.mark.parametrize("how", ["behind", "no stream"])
async def test_what_another_program_writes_over_a_key_is_told_as_a_loss_and_stops_nobody(
    server: Server, spoilt: str, how: str
) -> None:
    async with opened(server) as (engine, witness):
        first = await witness.published("a", b"1")
        key = engine.incoming.shared.key
        name = {"log": f"{key}:log", "in": f"{key}:in:{engine.incoming.shared.node}"}
        wanted = name.get(spoilt, f"{key}:{spoilt}:a")
        if how == "behind" and spoilt != "m":
            await server.call("XADD", wanted, BEHIND_ALL, "of", "another program")
        else:
            await server.call("SET", wanted, "of another program")
        with trio.fail_after(60):
            await witness.published("b", b"2")
            second = await witness.published("a", b"3")
            third = await witness.published("a", b"4")
        assert first is not None
        assert second is not None
        assert third == Position(second.offset + 1, second.epoch)
        assert (second.epoch == first.epoch) is (spoilt in ("log", "in"))
        assert [each.data for each in witness.delivered["a"]][-2:] == [b"3", b"4"]


async def lose_all(server: Server) -> None:
    await server.call("FLUSHALL")


async def begin_empty(server: Server) -> None:
    server.end()
    server.begin()


async def go_back(server: Server) -> None:
    """Begin anew from what was saved a while ago, so that a tail is lost."""
    server.end()
    server.begin()


@pytest.mark.parametrize("fault", [lose_all, begin_empty, go_back])
async def test_what_is_lost_is_told(
    server: Server, hurried: None, fault: Callable[[Server], Awaitable[None]]
) -> None:
    async with trial(server, 3) as all_nodes:
        first = all_nodes.nodes[0]
        await all_nodes.run(20)
        if fault is go_back:
            await server.call("SAVE")
            await all_nodes.nodes[1].published("t0", b"9.9.9")
        followers = all_nodes.followers
        epochs = [each.position and each.position.epoch for each in followers]
        await fault(server)
        await connected_again(all_nodes)
        for witness in all_nodes.nodes:
            assert {"t0", "t1", "t2"} <= set(witness.gaps), "all who listen are told"
            assert witness.engine.statistics().losses == 1
        for follower, epoch in zip(followers, epochs, strict=True):
            follower.go()
            await follower.come_back()
            assert follower.unrecovered
            assert follower.position is not None
            assert follower.position.epoch != epoch
        await first.published("t0", b"0.0.0")
        # Its own comes behind it in the log; before that another node may not have read it.
        position = await all_nodes.nodes[2].published("t0", b"0.0.1")
        assert position == await position_of(all_nodes.nodes[2].engine, "t0")
        assert position.offset == 2
