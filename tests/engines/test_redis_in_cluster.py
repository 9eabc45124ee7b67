"""A Redis Cluster: the node that has our keys is found, and found again when they move."""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio

from broker.config.engine_url import RedisUrl, parse_engine_url
from broker.engines.redis import open_redis
from broker.errors import Refused
from broker.testing import Witness
from tests.engines.test_redis_sentinel import running
from tests.ports import free_port

ROOM = 2**20

SLOTS = 16384


@pytest.fixture
def ports(tmp_path: Path) -> Iterator[list[int]]:
    """Two primaries; which has which slots is for the test to say."""
    found = [free_port(), free_port()]
    with ExitStack() as stack:
        for port in found:
            options = (
                "--port",
                port,
                "--bind",
                "127.0.0.1",
                "--save",
                "",
                "--cluster-enabled",
                "yes",
            )
            bus = "--cluster-port", free_port()
            stack.enter_context(running(tmp_path / str(port), *options, *bus))
        yield found


async def call(port: int, *words: object) -> str:
    with trio.fail_after(10):
        while True:
            try:
                stream = await trio.open_tcp_stream("127.0.0.1", port)
                break
            except OSError:
                await trio.sleep(0.02)
        async with stream:
            await stream.send_all((" ".join(map(str, words)) + "\r\n").encode())
            return bytes(await stream.receive_some(65536)).decode()


async def until_ok(port: int) -> None:
    for _ in range(500):
        if "cluster_state:ok" in await call(port, "CLUSTER", "INFO"):
            return
        await trio.sleep(0.02)
    raise AssertionError("it is no cluster")


async def join(ports: list[int]) -> list[str]:
    """Make one cluster of them, the slots on both sides; their ids."""
    ids = [(await call(port, "CLUSTER", "MYID")).split("\r\n")[1] for port in ports]
    for number, port in enumerate(ports):
        await call(port, "CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        first = SLOTS // 2 * number
        await call(port, "CLUSTER", "ADDSLOTSRANGE", first, first + SLOTS // 2 - 1)
    bus = (await call(ports[1], "CONFIG", "GET", "cluster-port")).split("\r\n")[-2]
    await call(ports[0], "CLUSTER", "MEET", "127.0.0.1", ports[1], bus)
    for port in ports:
        await until_ok(port)
    return ids


def url_of(ports: list[int]) -> RedisUrl:
    redis = parse_engine_url("redis://" + ",".join(f"127.0.0.1:{port}" for port in ports)).redis
    assert redis is not None
    return redis


async def published(witness: Witness, data: bytes) -> None:
    while True:
        try:
            await witness.published("a", data)
            return
        except Refused:
            await trio.sleep(0.1)


async def test_our_keys_are_found_wherever_they_are(ports: list[int]) -> None:
    with trio.fail_after(40):
        ids = await join(ports)
        slot = int((await call(ports[0], "CLUSTER", "KEYSLOT", "{broker}:log")).strip(":\r\n"))
        home = slot // (SLOTS // 2)
        for first in (0, 1):  # whichever is asked first
            order = [ports[first], ports[1 - first]]
            async with open_redis(url_of(order), ROOM, ROOM, time.time) as engine:
                witness = Witness(engine)
                async with engine.running(witness):
                    await published(witness, b"%d" % first)
        async with open_redis(url_of([1, *ports]), ROOM, ROOM, time.time) as engine:
            witness = Witness(engine)
            async with engine.running(witness):
                await engine.fetch(("a",))
                before = engine.position("a")
                assert before.offset == 2
                # The slot moves, and what is in it stays behind: to the broker, an empty Redis.
                await call(ports[home], "FLUSHALL")
                for port in ports:
                    await call(port, "CLUSTER", "SETSLOT", slot, "NODE", ids[1 - home])
                await published(witness, b"2")
                await engine.fetch(("a",))
                assert engine.position("a").epoch != before.epoch
                assert engine.statistics().losses
                assert "1" in await call(ports[1 - home], "EXISTS", "{broker}:log")
