"""The bus that test nodes share: one log for all, and faults that tests ask for."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import attrs
import pytest
import trio
from trio.testing import MockClock

from broker import Config, Refused
from broker.engines.cluster import LEASE_SECONDS
from broker.testing import Bus, Witness
from broker.testing.bus import BusEngine


@attrs.define
class Listening:
    """One engine on the bus, with all that it hears."""

    engine: BusEngine
    witness: Witness
    events: list[object] = attrs.field(factory=list)

    def heard(self, sender: str, message: bytes) -> float:
        self.events.append(message)
        return 0.0

    def noticed(self, node: str, name: str, value: bytes | None) -> None:
        self.events.append((name, value))

    def gone(self, node: str) -> None:
        self.events.append(("gone", node))

    def bury(self, node: str) -> None:
        self.events.append(("bury", node))

    def restate(self) -> None:
        self.events.append("restate")

    def lapsed(self) -> None:
        self.events.append("lapsed")


@asynccontextmanager
async def listening(bus: Bus) -> AsyncGenerator[Listening]:
    async with bus.open_engine(Config(), trio.current_time) as engine:
        found = Listening(engine, Witness(engine))
        engine.listen(found)
        async with engine.running(found.witness):
            yield found


async def test_all_nodes_see_one_order(autojump_clock: MockClock) -> None:
    bus = Bus(delay=0.1)
    async with listening(bus) as one, listening(bus) as two:
        for number in range(20):
            (one, two)[number % 2].witness.publish("t", b"%d" % number)
        await trio.sleep(1)
        assert one.witness.data("t") == two.witness.data("t")
        assert one.witness.offsets("t") == list(range(1, 21))


async def test_a_node_that_lags_reads_later_and_the_same(autojump_clock: MockClock) -> None:
    bus = Bus()
    async with listening(bus) as one, listening(bus) as two:
        two.engine.lag = 2.0
        await one.witness.published("t", b"1")
        await trio.sleep(1)
        assert two.witness.data("t") == []
        await trio.sleep(1.1)
        assert two.witness.data("t") == [b"1"]


async def test_a_node_that_is_cut_off_is_refused_and_catches_up(autojump_clock: MockClock) -> None:
    bus = Bus()
    async with listening(bus) as one, listening(bus) as two:
        bus.cut(two.engine.node)
        await one.witness.published("t", b"1")
        with pytest.raises(Refused, match="the bus does not answer"):
            two.witness.publish("t", b"2")
        assert two.witness.data("t") == []
        bus.mend(two.engine)
        await trio.sleep(1)
        assert two.witness.data("t") == [b"1"]


async def test_a_killed_node_is_gone_after_its_lease_and_one_buries_it(
    autojump_clock: MockClock,
) -> None:
    bus = Bus()
    async with listening(bus) as one, listening(bus) as two:
        dead = two.engine.node
        bus.kill(dead)
        await trio.sleep(LEASE_SECONDS - 4)
        assert one.events == []
        await trio.sleep(8)
        assert one.events == [("gone", dead), ("bury", dead)]
        assert two.events == []


async def test_a_store_that_has_lost_all_asks_everybody_to_say_it_anew(
    autojump_clock: MockClock,
) -> None:
    bus = Bus()
    async with listening(bus) as one, listening(bus) as two:
        one.engine.post("n", b"1")
        await trio.sleep(1)
        bus.lose_all()
        await trio.sleep(1)
        assert one.events == two.events == [("n", b"1"), "restate"]
