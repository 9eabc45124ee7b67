"""Redis is there, and does not do what it is asked for: whatever the reason, it is told once, without any secret;
what was acknowledged is kept; and all goes on by itself when that is over.

A row of the table is a state: how Redis gets into it and out again, and a word of what it is told as.
"""

import random
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

import attrs
import hiredis
import pytest
import structlog.testing
import trio

from broker.core.messages import Position
from broker.engines.redis import open_redis
from broker.engines.redis_wire import ErrorReply
from broker.errors import Refused
from broker.testing import Witness
from broker.testing.engines import kept
from tests.engines.conftest import ROOM
from tests.engines.servers import BINARIES, Proxy, Server, serving

PASSWORD: Final = "hush-hush"


_packed: Final[Callable[[Any], bytes]] = hiredis.pack_command


@attrs.define(eq=False)
class Admin:
    """A connection that was there before, and so is served whatever the passwords are."""

    stream: trio.SocketStream

    async def do(self, *words: str | int) -> Any:
        await self.stream.send_all(_packed(words))
        reader = hiredis.Reader(replyError=ErrorReply)
        while (answer := reader.gets()) is False:
            reader.feed(bytes(await self.stream.receive_some(65536)))
        if isinstance(answer, ErrorReply):
            raise answer
        return answer

    async def all_anew(self) -> None:
        """End all connections but this one, so that others have to be made."""
        await self.do("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")


ENDLESS: Final[tuple[str | int, ...]] = ("EVAL", "while true do end", 0)

Act = Callable[[Admin], Awaitable[None]]


def does(*commands: Sequence[str | int]) -> Act:
    async def act(admin: Admin) -> None:
        for command in commands:
            await admin.do(*command)

    return act


async def disk_is_full(admin: Admin) -> None:
    """Writing a snapshot fails, so Redis takes no more."""
    (_, directory) = await admin.do("CONFIG", "GET", "dir")
    place = Path(directory.decode()) / "gone"
    place.mkdir()
    await admin.do("CONFIG", "SET", "dir", str(place))
    place.rmdir()
    await admin.do("CONFIG", "SET", "save", "3600 1000000")
    await admin.do("BGSAVE")
    while b"rdb_last_bgsave_status:err" not in await admin.do("INFO", "persistence"):
        await trio.lowlevel.checkpoint()


async def runs_for_ever(admin: Admin) -> None:
    """Another program's script, which is not answered and cannot be waited for."""
    await admin.do("CONFIG", "SET", "lua-time-limit", 10)
    await admin.stream.send_all(_packed(ENDLESS))


async def is_killed(admin: Admin) -> None:
    stream = await trio.open_unix_socket(str(admin.stream.socket.getpeername()))
    other = Admin(stream)
    async with stream:
        while True:
            with suppress(ErrorReply):
                await other.do("SCRIPT", "KILL")
                return


async def wants_a_password(admin: Admin) -> None:
    await admin.do("CONFIG", "SET", "requirepass", "another")
    await admin.all_anew()


async def has_another_password(admin: Admin) -> None:
    await admin.do("ACL", "SETUSER", "broker", "resetpass", ">another")
    await admin.all_anew()


async def may_not_write(admin: Admin) -> None:
    await admin.do("ACL", "SETUSER", "broker", "-@write")


STATES: Final[dict[str, tuple[Act, Act, str]]] = {
    "no memory": (
        does(("CONFIG", "SET", "maxmemory", 1)),
        does(("CONFIG", "SET", "maxmemory", 0)),
        "OOM",
    ),
    "no disk": (
        disk_is_full,
        does(("CONFIG", "SET", "stop-writes-on-bgsave-error", "no")),
        "MISCONF",
    ),
    "no replicas": (
        does(("CONFIG", "SET", "min-replicas-to-write", 1)),
        does(("CONFIG", "SET", "min-replicas-to-write", 0)),
        "NOREPLICAS",
    ),
    "a replica": (
        does(("REPLICAOF", "127.0.0.1", 1)),
        does(("REPLICAOF", "NO", "ONE")),
        "READONLY",
    ),
    "a replica without a master": (
        does(("CONFIG", "SET", "replica-serve-stale-data", "no"), ("REPLICAOF", "127.0.0.1", 1)),
        does(("REPLICAOF", "NO", "ONE")),
        "MASTERDOWN",
    ),
    "busy": (runs_for_ever, is_killed, "BUSY"),
    "another password": (
        has_another_password,
        does(("ACL", "SETUSER", "broker", "resetpass", f">{PASSWORD}")),
        "WRONGPASS",
    ),
    "no such user": (
        does(("ACL", "DELUSER", "broker")),
        does(("ACL", "SETUSER", "broker", "on", f">{PASSWORD}", "~*", "&*", "+@all")),
        "WRONGPASS",
    ),
    "may not write": (
        may_not_write,
        does(("ACL", "SETUSER", "broker", "+@all")),
        "ermission|can't run",
    ),
    "no more clients": (
        does(("CONFIG", "SET", "maxclients", 1), ("CLIENT", "KILL", "TYPE", "normal")),
        does(("CONFIG", "SET", "maxclients", 100)),
        "max number of clients|Broken pipe|reset|closed",
    ),
}


@pytest.fixture(params=[each for each in ("valkey", "redis-6.2") if each in BINARIES])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    kind: str = request.param
    options = ("--enable-protected-configs", "yes") if kind != "redis-6.2" else ()
    with serving(BINARIES[kind], tmp_path, *options) as server:
        yield server


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.engines.redis_log.BLOCK_SECONDS", 0.2)
    monkeypatch.setattr("broker.engines.redis_log.RETRY_MAX_SECONDS", 0.1)
    monkeypatch.setattr("broker.engines.redis_log.TICK_SECONDS", 0.1)
    monkeypatch.setattr("broker.engines.redis_log.PATIENCE_SECONDS", 0.3)
    monkeypatch.setattr("broker.engines.redis_outgoing.PUBLISH_SECONDS", 0.6)
    monkeypatch.setattr("broker.engines.redis.FETCH_SECONDS", 0.3)


@asynccontextmanager
async def nodes(server: Server) -> AsyncGenerator[tuple[Admin, list[Witness]]]:
    """Two nodes, which log in, and a connection of an administrator."""
    async with await server.connect() as stream:
        admin = Admin(stream)
        await admin.do("ACL", "SETUSER", "broker", "on", f">{PASSWORD}", "~*", "&*", "+@all")
        url = attrs.evolve(server.url, user="broker", password=PASSWORD)
        async with open_redis(url, ROOM, ROOM, time.time) as one:
            async with open_redis(url, ROOM, ROOM, time.time) as two:
                found = [Witness(one), Witness(two)]
                async with one.running(found[0]), two.running(found[1]):
                    yield admin, found


async def publish_on(witness: Witness, name: bytes, acked: list[bytes], told: list[str]) -> None:
    """Publish one after the other, until cancelled, and keep the books."""
    number = 0
    while True:
        number += 1
        data = b"%s.%d" % (name, number)
        try:
            if isinstance(await witness.published("a", data), Position):
                acked.append(data)
        except Refused as refusal:
            assert refusal.temporary
            told.append(str(refusal))
        await trio.sleep(0.002)


@pytest.mark.parametrize("state", STATES)
async def test_what_redis_refuses_is_told_once_and_loses_nothing(
    server: Server, state: str
) -> None:
    begin, end, word = STATES[state]
    acked: list[bytes] = []
    told: list[str] = []
    with trio.fail_after(60), structlog.testing.capture_logs() as lines:
        async with nodes(server) as (admin, witnesses), trio.open_nursery() as nursery:
            for witness, name in zip(witnesses, (b"one", b"two"), strict=True):
                nursery.start_soon(publish_on, witness, name, acked, told)
            await until(lambda: len(acked) > 20)
            await begin(admin)
            engines = [witness.engine for witness in witnesses]
            await until(lambda: all(each.statistics().failing for each in engines))
            reasons = [each.statistics().failing for each in engines]
            await until(lambda: len(told) > 2)
            await end(admin)
            await until(lambda: not any(each.statistics().failing for each in engines))
            before = len(acked)
            await until(lambda: len(acked) > before + 20)
            nursery.cancel_scope.cancel()
        came = [witness.data("a") for witness in witnesses]
        found = came[0]
        assert set(acked) <= set(found), "what was acknowledged was delivered"
        for data in came:
            assert len(set(data)) == len(data), "once"
    async with open_redis(server.url, ROOM, ROOM, time.time) as engine:
        async with engine.running(Witness(engine)):
            assert set(acked) <= set(await kept(engine, "a")), "and is kept"
    assert all(re.search(word, each) for each in reasons), reasons
    said = [each["event"] for each in lines if each["event"].startswith(("engine_f", "engine_r"))]
    assert sorted(said) == [
        "engine_failing",
        "engine_failing",
        "engine_recovered",
        "engine_recovered",
    ], [each.get("reason", "")[:60] for each in lines]
    assert PASSWORD not in f"{lines} {told} {reasons}"


ANSWERS: Final = (
    "LOADING Redis is loading the dataset in memory",
    "MOVED 7638 127.0.0.1:1",
    "ASK 7638 127.0.0.1:1",
    "CLUSTERDOWN Hash slot not served",
    "TRYAGAIN Multiple keys request during rehashing of slot",
    "ERR unknown command",
)


@pytest.mark.parametrize("answer", ANSWERS)
async def test_whatever_redis_answers_instead_is_told_once_and_loses_nothing(
    server: Server, answer: str
) -> None:
    proxy = Proxy(server, random.Random(1), swallows=0.0)
    acked: list[bytes] = []
    told: list[str] = []
    with trio.fail_after(60), structlog.testing.capture_logs() as lines:
        async with proxy.serving(), open_redis(proxy.url, ROOM, ROOM, time.time) as engine:
            witness = Witness(engine)
            async with engine.running(witness), trio.open_nursery() as nursery:
                nursery.start_soon(publish_on, witness, b"one", acked, told)
                await until(lambda: len(acked) > 20)
                proxy.says = f"-{answer}\r\n".encode()
                await until(lambda: answer in engine.statistics().failing)
                await until(lambda: len(told) > 2)
                proxy.says = b""
                before = len(acked)
                await until(lambda: len(acked) > before + 20)
                nursery.cancel_scope.cancel()
            assert set(acked) <= set(witness.data("a"))
            assert len(set(witness.data("a"))) == len(witness.data("a"))
    said = [each["event"] for each in lines if each["event"].startswith(("engine_f", "engine_r"))]
    assert said == ["engine_failing", "engine_recovered"], lines[1:]


async def until(is_true: Callable[[], bool]) -> None:
    while not is_true():  # noqa: ASYNC110 - of a server that is no task of ours
        await trio.sleep(0.005)


async def test_one_prefix_in_two_databases_is_two_brokers(server: Server) -> None:
    url = server.url
    async with open_redis(url, ROOM, ROOM, time.time) as one:
        async with open_redis(attrs.evolve(url, db=1), ROOM, ROOM, time.time) as two:
            here, there = Witness(one), Witness(two)
            async with one.running(here), two.running(there):
                first = await here.published("a", b"1")
                other = await there.published("a", b"2")
                assert first is not None
                assert other is not None
                assert (first.offset, other.offset) == (1, 1)
                assert first.epoch != other.epoch
                assert (here.data("a"), there.data("a")) == ([b"1"], [b"2"])
                assert await one.nodes.lease_fds(5, 0) == await two.nodes.lease_fds(5, 0)
