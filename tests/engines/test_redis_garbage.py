"""Another program writes over the keys of a broker: that is told, and the process goes on.

Each key by each kind of garbage. Afterwards the key is taken away, and nodes work again.
"""

import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Final

import pytest
import trio

from broker.core.messages import Position
from broker.engines.redis import open_redis
from broker.errors import ConfigError, Refused
from tests.engines.servers import BINARIES, Server, serving
from tests.engines.test_redis_cluster import ROOM, Member, hurried, member

__all__ = ["hurried"]

HUGE: Final = "9" * 5000

KEYS: Final = {
    "state": "hash",
    "log": "stream",
    "done:NODE": "string",
    "m:t": "hash",
    "h:t": "stream",
    "r": "hash",
    "ro": "zset",
    "rb": "string",
    "fd": "string",
    "nodes": "hash",
    "dead": "hash",
    "was:NODE": "string",
    "n:NODE": "hash",
    "in:NODE": "stream",
    "c:NODE:in:t": "hash",
    "d:NODE": "set",
    "w:in:t": "set",
}

KINDS: Final = ("text", "list", "nothing", "one more", "huge", "cut off")


def garbage(key: str, kind: str, where: str) -> list[tuple[str, ...]]:
    """The commands that put it there. `one more` is of the right type; `huge` and `cut off` are so in what is
    there."""
    of = KEYS[key]
    if kind == "text":
        return [("SET", where, "junk")]
    if kind == "list":
        return [("DEL", where), ("RPUSH", where, "junk")]
    if kind == "nothing":
        return [("DEL", where)]
    value = {"one more": "junk ü", "huge": HUGE, "cut off": ""}[kind]
    if of == "hash":
        names = {"state": ["l", "b", "r", "c", "v"], "m:t": list("etslxy"), "c:NODE:in:t": ["7"]}
        named = ["x"] if kind == "one more" else names.get(key, ["name", "t"])
        return [("HSET", where, name, value) for name in named]
    if of == "stream":
        return [("XADD", where, "*", "a", value), ("XADD", where, "*", "", f"{value} 1 2 3")]
    return [
        {
            "string": ("SET", where, value),
            "set": ("SADD", where, value),
            "zset": ("ZADD", where, "1", value),
        }[of]
    ]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(BINARIES["valkey"], tmp_path) as server:
        yield server


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.engines.redis_cluster.ANSWER_SECONDS", 0.2)
    monkeypatch.setattr("broker.engines.redis_log.RETRY_MAX_SECONDS", 0.1)
    monkeypatch.setattr("broker.engines.redis_log.TICK_SECONDS", 0.1)
    monkeypatch.setattr("broker.engines.redis_log.PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr("broker.engines.redis_outgoing.PUBLISH_SECONDS", 0.4)
    monkeypatch.setattr("broker.engines.redis.FETCH_SECONDS", 0.2)


async def use(one: Member) -> None:
    """Ask for all that can be asked for."""
    cluster = one.engine.cluster
    for ask in (
        lambda: cluster.read("in:t", 100),
        lambda: cluster.count("in:t"),
        lambda: cluster.lease_fds(10, 1),
        lambda: cluster.leftovers(one.node, 100),
        lambda: one.engine.fetch(["t"]),
        lambda: one.witness.published("t", b"2", retain=True),
    ):
        with suppress(Refused):
            await ask()
    cluster.file("in:t", "8", b"card", "ann")
    cluster.post("name", b"2")


async def publish_at_last(one: Member) -> None:
    with trio.fail_after(20):
        while True:
            with suppress(Refused):
                if isinstance(await one.witness.published("u", b"1"), Position):
                    return
            await trio.sleep(0.02)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key", KEYS)
async def test_garbage_is_told_and_ends_nothing(
    hurried: None, server: Server, key: str, kind: str
) -> None:
    async with AsyncExitStack() as stack:
        one, two = [await stack.enter_async_context(member(server)) for _ in "12"]
        one.engine.cluster.file("in:t", "7", b"card", "ann")
        one.engine.cluster.post("name", b"1")
        await one.witness.published("t", b"1", retain=True)
        where = f"{server.url.key}:{key.replace('NODE', one.node)}"
        for command in garbage(key, kind, where):
            await server.call(*command)
        for each in (one, two):
            with suppress(Refused):
                each.engine.cluster.tell(one.node, b"message")
            await use(each)
        with suppress(ConfigError):  # whoever comes now is told, or works
            with trio.move_on_after(0.3):
                async with open_redis(server.url, ROOM, ROOM, time.time):
                    pass
        await server.call("DEL", where)
        for each in (one, two):
            await publish_at_last(each)


@pytest.mark.parametrize("kind", ["valkey", "redis-6.2"])
async def test_what_is_no_card_is_passed_over(hurried: None, tmp_path: Path, kind: str) -> None:
    with serving(BINARIES[kind], tmp_path) as server:
        async with member(server) as one, member(server) as two:
            for each, name in ((one, "7"), (two, "8")):
                each.engine.cluster.file("in:t", name, b"card", "ann")
                assert await each.engine.cluster.count("in:t")
            where = f"{server.url.key}:c:{one.node}:in:t"
            for bad in ("", "x", ":", "ü:", "-1:ab", "0x1:ab", "9:ab", "9" * 5000 + ":ab"):
                await server.call("HSET", where, f"bad {bad[:9]}", bad)
            for each in (one, two):
                assert await each.engine.cluster.count("in:t") == (2, 1)
                assert await each.engine.cluster.read("in:t", 100) == {"7": b"card", "8": b"card"}
            await server.call("SET", where, "no hash")
            for each in (one, two):
                assert await each.engine.cluster.count("in:t") == (1, 1)
                assert await each.engine.cluster.read("in:t", 100) == {"8": b"card"}
            assert list(await two.engine.cluster.leftovers(one.node, 10)) == []
