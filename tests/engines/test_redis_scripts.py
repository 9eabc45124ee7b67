"""The scripts themselves, in a server: what each answers, and which keys there are afterwards."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from broker.engines.redis_scripts import (
    APPEND,
    ATTACH,
    BEAT,
    CLEAR,
    ENTER,
    FORMAT,
    LEASE,
    LEAVE,
    LEFTOVERS,
    OWNERS,
    READ,
    RENEW,
    VIEW,
)
from broker.engines.redis_wire import Place, Script, Wire, open_wire
from tests.engines.servers import Server

LOG_BYTES, IDLE_MS, RETAINED_BYTES = 10_000, 60_000, 1000

PIECE = (100, 100_000)
"""Runs and bytes."""


class Scripts:
    """Calls them with the prefix of a log, and a lineage for where there is none."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire

    async def run(self, script: Script, *parts: str | int | bytes) -> Any:
        return await self.wire.run(script, "{p}:log", "{p}", *parts)

    async def enter(self, node: str) -> Any:
        return await self.run(ENTER, node, "l1", "")

    async def append(self, node: str, counter: int, *runs: tuple[str | int | bytes, ...]) -> Any:
        """Runs: flags, topic, size, ttl, count, key, data."""
        words = [each for run in runs for each in run]
        bounds = (LOG_BYTES, IDLE_MS, RETAINED_BYTES)
        return await self.run(APPEND, node, counter, "l1", *bounds, *words)

    async def view(self, topic: str) -> Any:
        return await self.run(VIEW, topic, "l1", IDLE_MS, IDLE_MS, *PIECE)


@asynccontextmanager
async def scripts(server: Server) -> AsyncGenerator[Scripts]:
    (await server.connect()).socket.close()  # it listens by now
    async with open_wire(Place(str(server.socket))) as wire:
        yield Scripts(wire)


def keep(topic: str, data: bytes, count: int = 1, key: str = "", flags: str = "k") -> Any:
    return (flags, topic, 3, 60_000, count, key, data)


async def test_a_batch_is_applied_once_and_only_of_a_node_that_has_entered(server: Server) -> None:
    async with scripts(server) as log:
        assert (await log.append("a", 1, keep("t", b"x")))[0] == -1
        assert await log.enter("a") == [b"l1", b"a", []]
        assert (await log.append("a", 1, keep("t", b"x")))[0] == 1
        assert (await log.append("a", 1, keep("t", b"x")))[0] == 0
        assert (await log.view("t"))[3] == b"1"


async def test_a_view_has_the_runs_up_to_the_top_within_the_size(server: Server) -> None:
    async with scripts(server) as log:
        await log.enter("a")
        for number in range(1, 4):
            await log.append("a", number, keep("t", b"%d" % number, count=2))
        _, _, epoch, top, size, ttl, runs = await log.view("t")
        assert (epoch, top, size, ttl) == (b"l11", b"6", b"3", b"60000")
        assert [(place, fields[1]) for place, fields in runs] == [(b"4-0", b"2"), (b"6-0", b"3")]


async def test_a_publish_with_a_key_that_came_before_is_published_no_second_time(
    server: Server,
) -> None:
    async with scripts(server) as log:
        await log.enter("a")
        for counter in (1, 2):
            await log.append("a", counter, keep("t", b"x", key="k1"))
        assert (await log.view("t"))[3] == b"1"
        entries = await log.wire.call(b"XRANGE", "{p}:log", "-", "+")
        flags = [fields[2].split()[0] for _, fields in entries]
        assert flags == [b"k", b"d"]


async def test_retained_values_take_no_more_than_their_bytes_and_the_oldest_goes(
    server: Server,
) -> None:
    async with scripts(server) as log:
        await log.enter("a")
        for number, topic in enumerate("abc", 1):
            await log.append("a", number, keep(topic, b"x" * 400, flags="kv"))
        kept = await log.wire.call(b"HKEYS", "{p}:r")
        assert sorted(kept) == [b"b", b"c"]
        await log.append("a", 4, keep("b", b"null", flags="kc"))
        assert await log.wire.call(b"HKEYS", "{p}:r") == [b"c"]
        held = int(await log.wire.call(b"GET", "{p}:rb"))
        assert held == len(b"1 " + b"x" * 400 + b"c")


async def test_another_lineage_begins_all_epochs_anew_and_whoever_is_first_begins_it(
    server: Server,
) -> None:
    async with scripts(server) as log:
        await log.enter("a")
        await log.append("a", 1, keep("t", b"x"))
        lineage, last, *_, done, version = await log.run(ATTACH, "a", "l1", "")
        assert (lineage, done, version) == (b"l1", 1, FORMAT)
        assert (await log.run(RENEW, "l1", "l2")) == [b"l2", last]
        assert (await log.run(RENEW, "l1", "l3")) == [b"l2", last]
        _, _, epoch, top, *_ = await log.view("t")
        assert (epoch[:2], top) == (b"l2", b"0")


async def test_cards_of_a_node_that_is_dead_count_for_nobody_and_are_buried_by_one(
    server: Server,
) -> None:
    async with scripts(server) as log:
        for node in "ab":
            await log.enter(node)
        card = ("C", "drawer", 0, 0, 0, "name", b"3:annrest")
        for node in "ab":
            await log.append(node, 1, card)
        assert await log.run(READ, "drawer", 1) == -1
        assert len(await log.run(READ, "drawer", 2)) == 2
        owners = ["", "0", "a", "name", "ann", "b", "name", "ann"]
        assert await log.run(OWNERS, "drawer", "", "0", 10) == [each.encode() for each in owners]
        await log.wire.call(b"HSET", "{p}:nodes", "b", 0)  # it has not beaten for long
        dead = await log.run(BEAT, "a", "l1", 1000, 1, 0, LOG_BYTES)
        assert dead[1:] == [b"b"]
        assert len(await log.run(READ, "drawer", 2)) == 1
        assert await log.run(LEFTOVERS, "b", 10) == [b"drawer", b"name", b"3:annrest"]
        await log.run(CLEAR, "b", "drawer", "name")
        assert await log.run(LEFTOVERS, "b", 10) == []
        assert await log.run(ENTER, "b", "l1", "l1") == [b"0"]


async def test_a_node_that_leaves_takes_its_keys_along(server: Server) -> None:
    async with scripts(server) as log:
        await log.enter("a")
        await log.append("a", 1, ("N", "name", 0, 0, 1, "", b"notice"))
        assert await log.wire.call(b"EXISTS", "{p}:n:a", "{p}:done:a") == 2
        assert await log.run(LEAVE, "a", "l1", LOG_BYTES) == 1
        assert await log.wire.call(b"EXISTS", "{p}:n:a", "{p}:done:a") == 0
        assert await log.run(LEAVE, "a", "l1", LOG_BYTES) == 0


async def test_numbers_are_leased_above_all_that_were(server: Server) -> None:
    async with scripts(server) as log:
        assert await log.run(LEASE, 100, 0) == b"100"
        assert await log.run(LEASE, 10, 5) == b"110"
        assert await log.run(LEASE, 10, 2**53 - 100) == b"%d" % (2**53 - 90)
