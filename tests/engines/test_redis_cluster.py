"""Nodes that share a Redis, without brokers: what they tell each other, and what becomes of the dead."""

import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import attrs
import pytest
import structlog.testing
import trio

from broker.config.settings import TopicRules
from broker.core.messages import Position
from broker.engines.cluster import Card
from broker.engines.redis import RedisEngine, open_redis
from broker.engines.redis_cluster import RedisClusterLink
from broker.engines.redis_link import Link
from broker.engines.redis_scripts import OWNERS
from broker.engines.redis_wire import Script, Wire
from broker.errors import Refused
from broker.testing import Witness
from broker.testing.engines import NO_HISTORY
from tests.engines.servers import BINARIES, Server, serving

ROOM = 2**20


@pytest.fixture(params=["valkey", "redis-6.2"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    with serving(BINARIES[request.param], tmp_path) as server:
        yield server


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that is silent for a moment is dead."""
    monkeypatch.setattr("broker.engines.redis_cluster.BEAT_SECONDS", 0.05)
    monkeypatch.setattr("broker.engines.redis_cluster.LEASE_SECONDS", 1.5)
    monkeypatch.setattr("broker.engines.redis_wire.CALL_SECONDS", 1.0)


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy the machine is, nobody gives up because of that."""
    monkeypatch.setattr("broker.engines.redis_cluster.ANSWER_SECONDS", 30)
    monkeypatch.setattr("broker.engines.redis_outgoing.PUBLISH_SECONDS", 30)


@attrs.define(eq=False)
class Told:
    """A listener, with all that it was told."""

    told: list[object] = attrs.field(init=False, factory=list)

    def heard(self, sender: str, message: bytes) -> float:
        self.told.append((sender, message))
        return 1.0

    def noticed(self, node: str, name: str, value: bytes | None) -> None:
        self.told.append((node, name, value))

    def gone(self, node: str) -> None:
        self.told.append(("gone", node))

    def bury(self, node: str) -> None:
        self.told.append(("bury", node))

    def restate(self) -> None:
        self.told.append("restate")

    def lapsed(self) -> None:
        self.told.append("lapsed")


@attrs.define(eq=False)
class Member(Told):
    """A node, with all that it was told."""

    engine: RedisEngine
    witness: Witness
    life: trio.CancelScope = attrs.field(factory=trio.CancelScope)

    def __attrs_post_init__(self) -> None:
        self.engine.cluster.listen(self)

    @property
    def node(self) -> str:
        return self.engine.cluster.node

    async def until(self, what: object) -> None:
        for _ in range(2000):
            if what in self.told:
                return
            await trio.sleep(0.005)
        raise AssertionError(f"{what} is not among {self.told}")


@asynccontextmanager
async def member(server: Server) -> AsyncGenerator[Member]:
    with trio.fail_after(60):
        async with open_redis(server.url, ROOM, ROOM, time.time) as engine:
            witness = Witness(engine)
            found = Member(engine, witness)
            with found.life:
                async with engine.running(witness):
                    yield found


async def killed(server: Server, prepare: Callable[[Member], None]) -> str:
    """A node that has said something, and is no more, without a goodbye; its id."""
    async with member(server) as one:
        prepare(one)
        await one.witness.published("end", b"1")
        one.life.cancel()
        await trio.lowlevel.checkpoint()
    return one.node


# messages


async def test_a_message_comes_in_its_place(server: Server) -> None:
    async with member(server) as one, member(server) as two:
        one.engine.cluster.tell(two.node, b"1")
        one.witness.publish("a", b"x")
        one.engine.cluster.tell(two.node, b"2")
        one.engine.cluster.announce(b"3")
        one.engine.cluster.tell("nobody", b"4")
        await one.witness.published("a", b"y")
        await two.until((one.node, b"2"))
        await one.until((one.node, b"3"))
        await two.witness.published("end", b"1")
        mail = [each for each in two.told if each != (one.node, b"3")]
        assert mail == [(one.node, b"1"), (one.node, b"2")]
        assert (one.node, b"3") in two.told
        assert one.told == [(one.node, b"3")]


async def test_notices_are_known_to_all_and_to_who_comes_later(server: Server) -> None:
    async with member(server) as one:
        one.engine.cluster.post("name", b"one")
        one.engine.cluster.post("gone", b"x")
        one.engine.cluster.post("gone", None)
        await one.until((one.node, "gone", None))
        async with member(server) as two:
            assert (one.node, "name", b"one") in two.told
            assert (one.node, "gone", b"x") not in two.told[:1]
            one.engine.cluster.post("name", b"1")
            await two.until((one.node, "name", b"1"))
            two_node = two.node
        await one.until(("gone", two_node))
        assert ("bury", two_node) not in one.told


async def test_cards_are_read_from_all_nodes(server: Server) -> None:
    async with member(server) as one, member(server) as two:
        for number, each in enumerate((one, two)):
            for name in range(3):
                owner = f"ann:{number}" if name else "10:x"
                each.engine.cluster.file("d", f"{number}{name}", b"v:%d" % name, owner)
        two.engine.cluster.file("d", "12", None)
        two.engine.cluster.file("d", "never", None)
        await two.engine.cluster.count("d")
        found = await one.engine.cluster.read("d", 5)
        assert found == {"00": b"v:0", "01": b"v:1", "02": b"v:2", "10": b"v:0", "11": b"v:1"}
        assert await one.engine.cluster.count("d") == (5, 3)
        assert await one.engine.cluster.count("empty") == (0, 0)
        with pytest.raises(Refused, match="more than 4"):
            await one.engine.cluster.read("d", 4)


async def test_cards_are_counted_piece_by_piece(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that nobody waits while Redis looks at all of them; and also where they are of many nodes."""
    sizes: list[int] = []
    async with member(server) as one, member(server) as two, member(server) as three:
        for number in range(3000):
            one.engine.cluster.file("d", f"1.{number}", b"", f"{number % 1000}")
        for number in range(700):
            two.engine.cluster.file("d", f"2.{number}", b"", f"{number + 900}")
        three.engine.cluster.file("d", "3", b"", "3")
        for each in (one, two, three):
            await each.engine.cluster.count("d")
        ask = Wire.run

        async def run(wire: Wire, script: Script, key: str, *parts: Any) -> Any:
            answer = await ask(wire, script, key, *parts)
            if script is OWNERS:
                sizes.append((len(answer) - 2) // 3)
            return answer

        monkeypatch.setattr(Wire, "run", run)
        assert await one.engine.cluster.count("d") == (3701, 1600)
        assert len(sizes) >= 3
        assert max(sizes) < 2500, "some more than were asked for: by how the hash is laid out"


async def test_fds_are_given_out_once(server: Server) -> None:
    async with member(server) as one, member(server) as two:
        assert await one.engine.cluster.lease_fds(10, 0) == range(1, 11)
        assert await two.engine.cluster.lease_fds(10, 0) == range(11, 21)
        assert await one.engine.cluster.lease_fds(5, 100) == range(101, 106)


async def test_a_message_to_a_user_who_is_not_there_is_refused(server: Server) -> None:
    async with member(server) as one, member(server) as two:
        with pytest.raises(Refused, match="user 'ann' has no connection"):
            await one.witness.published("user:ann", b"1", rules=NO_HISTORY)
        two.engine.cluster.file("user:ann", "7", b"")
        await two.engine.cluster.count("user:ann")
        assert await one.witness.published("user:ann", b"2", rules=NO_HISTORY) is None
        await two.witness.published("end", b"1")
        assert two.witness.data("user:ann") == [b"2"]


async def test_a_parcel_says_where_it_stands_and_who_wants_a_report(server: Server) -> None:
    async with member(server) as one, member(server) as two:
        places: dict[str, list[int]] = {"one": [], "two": []}
        for name, each in (("one", one), ("two", two)):
            deliver = each.witness.deliver

            def note(parcel: object, *, retain: bool, n: str = name, d: object = deliver) -> float:
                places[n].append(parcel.place)  # type: ignore[attr-defined]
                return d(parcel, retain=retain)  # type: ignore[operator, no-any-return]

            each.witness.deliver = note  # type: ignore[method-assign]
        for number in range(5):
            one.witness.publish("a", b"%d" % number)
        await one.witness.published("a", b"x")
        await two.witness.published("end", b"1")
        assert places["two"][:6] == places["one"][:6]
        assert len(set(places["two"])) == len(places["two"])


# the dead


async def test_a_node_that_dies_is_declared_dead_and_buried_once(
    server: Server, hurried: None
) -> None:
    async with member(server) as one, member(server) as two:
        one.engine.cluster.file("d", "other", b"")

        def prepare(dead: Member) -> None:
            dead.engine.cluster.post("name", b"dead")
            for number in range(30):
                dead.engine.cluster.file("d", str(number), b"%d" % number)
            dead.engine.cluster.file("e", "x", b"y")

        dead = await killed(server, prepare)
        assert (await one.engine.cluster.count("d"))[0] == 31
        for each in (one, two):
            await each.until(("gone", dead))
        assert await one.engine.cluster.count("d") == (1, 1)
        with trio.fail_after(30):
            while not [each for each in (one, two) if ("bury", dead) in each.told]:
                await one.witness.published("end", b"1")
        (burier,) = [each for each in (one, two) if ("bury", dead) in each.told]
        left: list[Card] = []
        while cards := await burier.engine.cluster.leftovers(dead, 10):
            assert len(cards) <= 10
            left += cards
            await burier.engine.cluster.clear(dead, cards)
        assert sorted(int(card.value) for card in left if card.drawer == "d") == list(range(30))
        assert [card.value for card in left if card.drawer == "e"] == [b"y"]
        await trio.sleep(0.3)
        assert burier.told.count(("bury", dead)) == 1
        async with member(server) as late:
            assert not [each for each in late.told if isinstance(each, tuple) and each[0] == dead]


async def test_a_dead_node_may_have_had_any_number_of_drawers(
    server: Server, hurried: None
) -> None:
    def prepare(dead: Member) -> None:
        for number in range(500):
            dead.engine.cluster.file(f"d{number}", "x", b"%d" % number)

    dead = await killed(server, prepare)
    async with member(server) as one:
        await one.until(("bury", dead))
        await server.call("DEL", f"{{broker}}:c:{dead}:d7")
        left: list[bytes] = []
        while cards := await one.engine.cluster.leftovers(dead, 50):
            assert len(cards) <= 50
            left += [card.value for card in cards]
            await one.engine.cluster.clear(dead, cards)
        assert sorted(map(int, left)) == [number for number in range(500) if number != 7]
        assert b":0" in await server.call("EXISTS", f"{{broker}}:d:{dead}")
        assert b":0" in await server.call("HLEN", "{broker}:dead")


async def test_a_node_that_stops_is_told_of_no_failure(
    server: Server, hurried: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it may read that it has gone before it has."""
    leave = RedisClusterLink.leave

    async def slowly(cluster: RedisClusterLink, link: Link) -> None:
        await leave(cluster, link)
        while cluster.shared.link is not None:  # noqa: ASYNC110 - no event is set by a loss
            await trio.sleep(0.01)

    monkeypatch.setattr(RedisClusterLink, "leave", slowly)
    with structlog.testing.capture_logs() as lines:
        async with member(server):
            pass
    assert not [line for line in lines if line["event"] == "engine_failing"]


@pytest.mark.parametrize("hours", [1, -1])
async def test_a_clock_of_redis_that_is_set_lets_nobody_die_and_the_dead_be_buried(
    server: Server, hurried: None, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    """Set by so many hours: all that stands in Redis is so much older, or yet to come."""
    monkeypatch.setattr("broker.engines.redis_cluster.LEASE_SECONDS", 0.8)

    async def stamps() -> dict[str, int]:
        found = (await server.call("HGETALL", "{broker}:nodes")).split(b"\r\n")[2::2]
        return {node.decode(): int(ms) for node, ms in zip(found[::2], found[1::2], strict=True)}

    async with member(server) as one, member(server) as two:
        await trio.sleep(1.0)  # from here on they may declare each other dead
        dead = await killed(server, lambda one: one.engine.cluster.file("d", "1", b"x"))
        before = await stamps()
        assert set(before) == {one.node, two.node, dead}
        moved = [f for n, ms in before.items() for f in (n, str(ms - hours * 3_600_000))]
        await server.call("HSET", "{broker}:nodes", *moved)
        for each in (one, two):
            await each.until(("gone", dead))
        assert {one.node, two.node} == set(await stamps())
        for each in (one, two):
            assert "lapsed" not in each.told


async def test_a_reaper_may_die_as_well(server: Server, hurried: None) -> None:
    dead = await killed(server, lambda one: one.engine.cluster.file("d", "1", b"x"))
    async with member(server) as reaper:
        await reaper.until(("bury", dead))
        reaper.life.cancel()
        await trio.lowlevel.checkpoint()
    async with member(server) as heir:
        await heir.until(("bury", dead))
        (card,) = await heir.engine.cluster.leftovers(dead, 10)
        assert card == Card("d", "1", b"x")


async def test_a_node_that_was_declared_dead_goes_on_as_another(
    server: Server, hurried: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with member(server) as one, member(server) as two:
        before = one.node
        one.engine.cluster.post("name", b"one")
        await two.until((before, "name", b"one"))
        one.engine.cluster.file("d", "1", b"x")
        await one.engine.cluster.count("d")
        await server.call("HDEL", "{broker}:nodes", before)  # as another would
        await one.until("lapsed")
        assert one.node != before
        await one.witness.published("a", b"1")
        one.engine.cluster.post("name", b"again")
        await two.until((one.node, "name", b"again"))
        assert await two.engine.cluster.read("d", 10) == {}


async def test_who_was_declared_dead_is_told_of_the_others_anew(
    server: Server, hurried: None
) -> None:
    """It forgets them when it lapses; they do not know, and post nothing again."""
    async with member(server) as one, member(server) as two:
        there = (two.node, "name", b"two")
        two.engine.cluster.post("name", b"two")
        await one.until(there)
        await server.call("HDEL", "{broker}:nodes", one.node)
        await one.until("lapsed")
        await one.engine.cluster.count("d")
        assert there in one.told[one.told.index("lapsed") :]


async def test_who_links_to_an_empty_store_is_told_of_those_who_were_there_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def enter(self: RedisClusterLink, link: object, lineage: str) -> list[object]:
        return [b"new", b"two", [b"name", b"two"]]

    monkeypatch.setattr(RedisClusterLink, "_enter", enter)
    cluster: Any = RedisClusterLink(cast(Any, None), cast(Any, None))
    told = Told()
    cluster.listen(told)
    for lineage in ("", "new", "old"):
        cluster._entered_in = lineage
        await cluster.linked(None)
    assert told.told == [("two", "name", b"two"), "restate", ("two", "name", b"two")]


async def test_a_store_that_is_empty_is_told_all_anew(server: Server, hurried: None) -> None:
    async with member(server) as one, member(server) as two:
        before = one.node
        await server.call("FLUSHALL")
        for each in (one, two):
            await each.until("restate")
            each.engine.cluster.file("d", each.node, b"")
        assert one.node == before
        await two.engine.cluster.count("d")
        assert set(await one.engine.cluster.read("d", 10)) == {one.node, two.node}
        position = await one.witness.published("a", b"1", rules=TopicRules())
        assert isinstance(position, Position)
        assert not [each for each in (one, two) if "lapsed" in each.told]


async def test_a_node_whose_facts_are_too_many_while_redis_is_away_goes_on_as_another(
    server: Server, hurried: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broker.engines.redis_cluster.MOST_STATED", 100_000)
    async with member(server) as one:
        before = one.node
        server.pause()
        for number in range(1000):
            one.engine.cluster.file("d", str(number), b"x")
        assert one.engine.statistics().waiting < 100_000
        await trio.sleep(0.4)
        server.go_on()
        await one.until("lapsed")
        assert one.node != before
        one.engine.cluster.file("d", "new", b"y")
        assert (await one.engine.cluster.read("d", 2000)).get("new") == b"y"


async def test_who_asks_while_redis_is_away_is_refused(
    server: Server, hurried: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broker.engines.redis_cluster.ANSWER_SECONDS", 0.2)
    async with member(server) as one:
        server.pause()
        with pytest.raises(Refused, match="cannot be asked"):
            await one.engine.cluster.read("d", 1)
        one.engine.cluster.file("d", "1", b"x")
        server.go_on()
        monkeypatch.setattr("broker.engines.redis_cluster.ANSWER_SECONDS", 30)
        assert await one.engine.cluster.read("d", 1) == {"1": b"x"}
