"""A primary that dies, and the one that Sentinels name then."""

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
import trio

from broker.config.engine_url import RedisUrl, parse_engine_url
from broker.engines.redis import open_redis
from broker.errors import Refused
from broker.testing import Witness
from tests.engines.servers import BINARIES
from tests.ports import free_port

ROOM = 2**20


@contextmanager
def running(directory: Path, *options: object) -> Iterator[subprocess.Popen[bytes]]:
    directory.mkdir()
    command = [BINARIES["valkey"], *map(str, options)]
    process = subprocess.Popen(command, cwd=directory, stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_replica(port: int) -> None:
    for _ in range(500):
        with suppress(OSError), socket.create_connection(("127.0.0.1", port)) as asked:
            asked.sendall(b"INFO replication\r\n")
            if b"state=online" in asked.recv(65536):
                return
        time.sleep(0.02)
    raise AssertionError("there is no replica")


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[tuple[RedisUrl, subprocess.Popen[bytes]]]:
    """What names a primary with a replica, and the primary."""
    ports = [free_port() for _ in range(3)]
    rules = tmp_path / "sentinel.conf"
    rules.write_text(
        f"port {ports[2]}\nsentinel monitor main 127.0.0.1 {ports[0]} 1\n"
        "sentinel down-after-milliseconds main 300\nsentinel failover-timeout main 1000\n"
    )
    usual = "--save", "", "--repl-diskless-sync-delay", 0, "--bind", "127.0.0.1"
    with ExitStack() as stack:
        primary = stack.enter_context(running(tmp_path / "a", "--port", ports[0], *usual))
        replica = "--port", ports[1], "--replicaof", f"127.0.0.1 {ports[0]}"
        stack.enter_context(running(tmp_path / "b", *replica, *usual))
        wait_replica(ports[0])  # which a Sentinel asks about at its start, then each 10 s
        stack.enter_context(running(tmp_path / "c", rules, "--sentinel"))
        redis = parse_engine_url(f"redis+sentinel://127.0.0.1:{ports[2]}/main").redis
        assert redis is not None
        yield redis, primary


async def published(witness: Witness, data: bytes) -> None:
    """Publish until it is acknowledged."""
    while True:
        try:
            await witness.published("a", data)
            return
        except Refused:
            await trio.sleep(0.1)


async def test_the_primary_is_followed(
    deployment: tuple[RedisUrl, subprocess.Popen[bytes]],
) -> None:
    url, primary = deployment
    with trio.fail_after(40):
        async with open_redis(url, ROOM, ROOM, time.time) as engine:
            witness = Witness(engine)
            async with engine.running(witness):
                await engine.fetch(("a",))
                before = engine.position("a")
                await published(witness, b"1")
                primary.kill()
                await published(witness, b"2")
                await engine.fetch(("a",))
                recovered = engine.view("a", before).recovered
                assert recovered == (not engine.statistics().losses), "what is lost is told"
                assert engine.position("a").offset >= 1
