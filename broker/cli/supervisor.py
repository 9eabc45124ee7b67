"""`--workers N`: a process that serves nobody and keeps N others that do.

It opens the listening sockets once. All workers inherit them, so a worker that dies or is replaced
refuses nobody: new connections wait in the backlog for the others. SO_REUSEPORT would give each worker a
backlog of its own, and reset what waits in that of a dead one (ADR 26).

| what happens | what is done |
| --- | --- |
| all are ready | one line `ready`, and systemd is told |
| a worker dies | another takes its place, at first after 0.1 s |
| five that were young die within 10 s, or five before all were ready | the others drain, exit status 3 |
| one cannot start, as its settings are wrong by now | it is tried again every 5 s; the others go on |
| a worker's event loop stands still for 30 s | it is killed, which is a death |
| SIGTERM, SIGINT | all drain; the status is 0 if all have ended well |
| a second one | all are cut; who is there after 3 s is killed; the status is 1 |
| SIGHUP | each reads its settings again |
| the supervisor itself dies | each worker drains, as its leash ends |

Rule: no client is known here. A fault of a client cannot reach this process.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Final

import attrs
import msgspec
import structlog
import trio

from broker.cli.private_redis import open_private_redis
from broker.cli.restarts import DEATHS, LONGEST_PAUSE, Restarts
from broker.cli.seat import VARIABLE, Given
from broker.cli.systemd import Notifier
from broker.config.settings import Config
from broker.errors import ConfigError
from broker.node import node_name
from broker.process import signals
from broker.process.signals import CUT_SHORT, Order
from broker.transport.gate import Counts, make_shared
from broker.transport.listeners import take_sockets
from broker.transport.places import open_api_sockets, open_sockets_of

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("broker")

GAVE_UP: Final = 3
"""Exit status when a process that dies again and again was given up; as gunicorn has it."""

MISTAKE: Final = 2
"""Exit status of a worker that cannot start with its settings. It has said why."""

HUNG_SECONDS: Final = 30.0
"""An event loop that stands still for so long has lost its clients: they hear no ping after 25 s."""

CUT_SECONDS: Final = 3.0
"""From a second signal until who is still there is killed: a worker is cut within 2.5 s."""


@asynccontextmanager
async def open_engine_for_workers(
    config: Config, give_up: Callable[[str], None]
) -> AsyncGenerator[str]:
    """The engine that joins the workers, as a value of the setting `engine`, for as long as the block.

    If it is a Redis of our own which dies again and again, `give_up` is told. Raises `ConfigError` if there
    is none, or it does not start.
    """
    if config.engine != "memory":
        yield config.engine
        return
    async with open_private_redis(give_up) as path:
        yield f"redis+unix://{path}"


def longest_stop(config: Config) -> float:
    """Seconds after which a worker that was told to stop is not going to."""
    return config.drain_notice_seconds + config.drain_seconds + config.webhooks.flush_seconds + 10


@attrs.define(eq=False)
class _Worker:
    """One place of a worker, and the process that is there now."""

    number: int
    pid: int = 0
    addresses: list[str] | None = None
    """Where it listens; None until it is ready."""
    ready: trio.Event = attrs.field(factory=trio.Event)


@attrs.define(eq=False)
class Supervisor:
    """Keeps the workers. `run` runs until all have ended for good."""

    config: Config
    command: Sequence[str]
    sockets: Sequence[trio.SocketListener]
    api_sockets: Sequence[trio.SocketListener]
    notifier: Notifier
    directory: str
    """For the sockets of the workers among themselves; only this user may enter it."""
    engine: str = ""
    """The engine that joins the workers; set before `run`."""
    status: int = 0
    _workers: list[_Worker] = attrs.field(init=False)
    _shared: int = attrs.field(init=False)
    _counts: Counts = attrs.field(init=False)
    _restarts: Restarts = attrs.field(init=False, factory=Restarts)
    _stopping: trio.Event = attrs.field(init=False, factory=trio.Event)
    _cut: trio.Event = attrs.field(init=False, factory=trio.Event)
    _failed_starts: int = attrs.field(init=False, default=0)
    _has_served: bool = attrs.field(init=False, default=False)

    def __attrs_post_init__(self) -> None:
        self._workers = [_Worker(number) for number in range(1, self.config.workers + 1)]
        self._shared = make_shared(len(self._workers))
        self._counts = Counts.of(self._shared)

    # orders

    def obey(self, order: Order) -> None:
        """Act on a signal. Never waits."""
        if order == "drain":
            self.stop()
        elif order == "cut":
            self.status = CUT_SHORT
            self._cut.set()
            self._signal(signal.SIGTERM)
        else:
            self.notifier.reloading()
            self._signal(signal.SIGHUP)
            self.notifier.ready()

    def stop(self) -> None:
        """Have all drain, and start none any more."""
        if not self._stopping.is_set():
            self._stopping.set()
            log.info("stopping", workers=sum(each.pid > 0 for each in self._workers))
            self.notifier.stopping()
            self._signal(signal.SIGTERM)

    def _signal(self, number: int) -> None:
        for worker in self._workers:
            if worker.pid:
                with suppress(ProcessLookupError):
                    os.kill(worker.pid, number)

    def give_up(self, reason: str) -> None:
        """Have all drain, and say why there is no use in going on."""
        if not self._stopping.is_set():
            log.critical("gave_up", reason=reason)
            self.status = GAVE_UP
            self.stop()

    # life

    async def run(self) -> int:
        """Keep the workers until a stop; the exit status."""
        async with trio.open_nursery() as watch:
            watch.start_soon(self._kill_the_late)
            watch.start_soon(self._kill_the_hung)
            if self.notifier.watchdog_seconds is not None:
                watch.start_soon(self.notifier.keep_alive, self.notifier.watchdog_seconds / 2)
            async with trio.open_nursery() as places:
                first, *others = self._workers
                places.start_soon(self._keep, first)
                # A mistake in the settings is one worker's to tell of.
                await _first_of(first.ready.wait, self._stopping.wait)
                for worker in others:
                    places.start_soon(self._keep, worker)
                for worker in others:
                    await _first_of(worker.ready.wait, self._stopping.wait)
                if not self._stopping.is_set():
                    self._has_served = True
                    log.info("ready", addresses=first.addresses, workers=len(self._workers))
                    self.notifier.ready(f"{len(self._workers)} workers serve")
            watch.cancel_scope.cancel()
        os.close(self._shared)
        log.info("stopped")
        return self.status

    async def _keep(self, worker: _Worker) -> None:
        while not self._stopping.is_set():
            began = trio.current_time()
            status = await self._run(worker)
            lived = trio.current_time() - began
            if self._stopping.is_set():
                if status and not self.status:
                    self.status = CUT_SHORT
                return
            if status == MISTAKE and not self._has_served:
                self.status = MISTAKE
                self.stop()
                return
            pause = self._pause(status, lived)
            how = _in_words(status)
            log.error("worker_died", number=worker.number, how=how, restart_seconds=pause)
            if pause is None:
                self.give_up(f"workers die again and again soon after their start, the last {how}")
                return
            with trio.move_on_after(pause):
                await self._stopping.wait()

    def _pause(self, status: int, lived: float) -> float | None:
        """Seconds until the next process takes the place of one that died; None to give up."""
        if status == MISTAKE:
            # A file that is being written, a Redis that is away: no reason to end those that serve.
            return LONGEST_PAUSE
        self._failed_starts += not self._has_served
        if self._failed_starts == DEATHS:  # however long each took
            return None
        return self._restarts.pause(lived, trio.current_time())

    async def _run(self, worker: _Worker) -> int:
        """Run one process in this place until it has died; its exit status, below 0 for a signal."""
        ours, theirs = socket.socketpair()
        sockets = [each.socket.fileno() for each in self.sockets]
        api_sockets = [each.socket.fileno() for each in self.api_sockets]
        given = Given(
            number=worker.number,
            of=len(self._workers),
            name=f"{node_name(self.config)}/{worker.number}",
            engine=self.engine,
            host=self.config.host,
            port=self.config.port,
            unix=None if self.config.unix is None else str(self.config.unix),
            directory=self.directory,
            sockets=sockets,
            api_sockets=api_sockets,
            counts=self._shared,
            leash=theirs.fileno(),
        )
        with theirs:
            process = await trio.lowlevel.open_process(
                self.command,
                stdin=subprocess.DEVNULL,
                env={**os.environ, VARIABLE: msgspec.json.encode(given).decode()},
                pass_fds=(*sockets, *api_sockets, self._shared, theirs.fileno()),
                process_group=0,  # or Ctrl-C would reach it twice: from the terminal, and from us
            )
        worker.pid = process.pid
        if self._stopping.is_set():  # while it was being started
            process.terminate()
        try:
            async with trio.SocketStream(trio.socket.from_stdlib_socket(ours)) as leash:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._hear, leash, worker)
                    status = await process.wait()
                    nursery.cancel_scope.cancel()
        finally:
            worker.pid = 0
            self._counts.leave(worker.number - 1)
            if process.poll() is None:
                process.kill()
        return status

    async def _hear(self, leash: trio.SocketStream, worker: _Worker) -> None:
        said = bytearray()
        with suppress(trio.BrokenResourceError):
            while not said.endswith(b"\n"):
                data = await leash.receive_some()
                if not data:
                    return
                said += data
            worker.addresses = msgspec.json.decode(said, type=list[str])
            worker.ready.set()

    # guards

    async def _kill_the_late(self) -> None:
        """Nobody who stops takes longer than he may: a worker that was suspended would, for ever."""
        await self._stopping.wait()
        with trio.move_on_after(longest_stop(self.config)):
            await self._cut.wait()
            await trio.sleep(CUT_SECONDS)
        log.warning("killed", reason="still there after its time to stop")
        self.status = self.status or CUT_SHORT
        self._signal(signal.SIGKILL)

    async def _kill_the_hung(self) -> None:
        while True:
            await trio.sleep(1)
            for worker in self._workers:
                silence = self._counts.silence(worker.number - 1)
                if worker.pid and silence is not None and silence > HUNG_SECONDS:
                    log.error("worker_hung", number=worker.number, seconds=round(silence))
                    self._counts.leave(worker.number - 1)
                    with suppress(ProcessLookupError):
                        os.kill(worker.pid, signal.SIGKILL)


def _in_words(status: int) -> str:
    if status >= 0:
        return f"with status {status}"
    try:
        return f"by {signal.Signals(-status).name}"
    except ValueError:
        return f"by signal {-status}"


async def _first_of(*waits: Callable[[], Awaitable[None]]) -> None:
    """Wait until one of these has come."""
    async with trio.open_nursery() as nursery:

        async def wait(which: Callable[[], Awaitable[None]]) -> None:
            await which()
            nursery.cancel_scope.cancel()

        for each in waits:
            nursery.start_soon(wait, each)


def command_of_this_process() -> list[str]:
    """The command line that makes another process like this one."""
    return [sys.executable, *sys.orig_argv[1:]]


def _private_directory() -> "tempfile.TemporaryDirectory[str]":
    """A directory that only this user may enter. Raises `ConfigError` where none can be made."""
    try:
        return tempfile.TemporaryDirectory(prefix="trio-broker-")
    except OSError:
        raise ConfigError(
            "workers need a directory for their sockets, and no temporary one can be written to: set "
            "TMPDIR, or mount one at /tmp"
        ) from None


async def supervise(
    config: Config, places: Sequence[Config], inherited: Sequence[int], notifier: Notifier
) -> int:
    """Serve by workers until a signal; the exit status. `places` are the settings by which to listen on
    more than their own place, `inherited` files to listen on in place of that.

    Raises `ConfigError` where it cannot listen, or nothing is there to join the workers with.
    """
    token = trio.lowlevel.current_trio_token()
    api_sockets = await open_api_sockets(config)
    if inherited:
        sockets = [*take_sockets(inherited), *await open_sockets_of(places)]
    else:
        sockets = await open_sockets_of([config, *places])
    if config.unix is None:
        config = attrs.evolve(config, port=sockets[0].socket.getsockname()[1])
    command = command_of_this_process()

    def deliver(order: Order) -> None:
        token.run_sync_soon(supervisor.obey, order)

    try:
        with _private_directory() as directory:
            supervisor = Supervisor(config, command, sockets, api_sockets, notifier, directory)
            async with open_engine_for_workers(config, supervisor.give_up) as supervisor.engine:
                try:
                    attrs.evolve(config, engine=supervisor.engine)
                except ValueError as error:
                    raise ConfigError(str(error)) from None
                signals.process.hand_over(deliver, partial(log.critical, "stuck"))
                return await supervisor.run()
    finally:
        signals.process.take_back()
        for each in (*sockets, *api_sockets):
            each.socket.close()
