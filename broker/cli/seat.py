"""One worker's side of `--workers`: what its supervisor has given it, and the leash between the two.

A worker is the same command as its supervisor, with one variable more in its environment. It finds
there the listening sockets, which it shares with all others, and the leash: a socket pair. By that
the worker says that it is ready; and it reads the end of it when the supervisor has gone, however
that died. Then it drains: nobody is left to stop it.

Rule: sockets and leash are files that were inherited. They are no child's of ours.
"""

import os
import socket
import ssl
from collections.abc import MutableMapping
from pathlib import Path
from typing import Final

import attrs
import msgspec
import trio

from broker.config.machine import memory_limit
from broker.config.settings import Config
from broker.http.worker_metrics import serve_others
from broker.node import Node
from broker.transport.gate import Counts, Gate, GatedListener
from broker.transport.listeners import (
    AnyListener,
    open_unix,
    secure,
    take_sockets,
)

VARIABLE: Final = "TRIO_BROKER_WORKER"


class Given(msgspec.Struct, frozen=True):
    """Handed to a worker by way of its environment. Numbers of files, which it inherits."""

    number: int
    """Of this worker, from 1 on."""
    of: int
    """How many workers there are."""
    name: str
    engine: str
    host: str
    port: int
    unix: str | None
    directory: str
    """Where each worker has a socket for the others, which only this user may enter."""
    sockets: list[int]
    api_sockets: list[int]
    counts: int
    leash: int


def take_given(environ: MutableMapping[str, str] = os.environ) -> Given | None:
    """The seat that a supervisor has given to this process; None if it is nobody's worker."""
    text = environ.pop(VARIABLE, None)
    if text is None:
        return None
    given = msgspec.json.decode(text, type=Given)
    for fileno in (*given.sockets, *given.api_sockets, given.counts, given.leash):
        os.set_inheritable(fileno, False)
    return given


@attrs.define(eq=False)
class Seat:
    """The place of this process among the workers."""

    given: Given
    counts: Counts
    leash: trio.SocketStream

    @classmethod
    def open(cls, given: Given) -> "Seat":
        """Sit down; in a Trio loop."""
        counts = Counts.of(given.counts)
        os.close(given.counts)
        leash = trio.socket.from_stdlib_socket(socket.socket(fileno=given.leash))
        return cls(given, counts, trio.SocketStream(leash))

    def open_listeners(self, context: ssl.SSLContext | None) -> tuple[list[AnyListener], Gate]:
        """The sockets that all workers listen on, with TLS where there is a certificate, and the gate
        before them, which has yet to know how many connections there are here."""
        gate = Gate(self.counts, self.given.number - 1, lambda: 0)
        gated = [GatedListener.over(each, gate) for each in take_sockets(self.given.sockets)]
        return secure(gated, context), gate

    def path_of(self, number: int) -> Path:
        """Where the worker of that number answers the others."""
        return Path(self.given.directory, f"worker-{number}.sock")

    async def join(self, node: Node) -> None:
        """Let the others have this worker's metrics, until cancelled, and have those of the others."""
        numbers = range(1, self.given.of + 1)
        node.worker = self.given.number
        node.others = {each: self.path_of(each) for each in numbers if each != node.worker}
        await serve_others(node, await open_unix(self.path_of(node.worker)))

    async def tell_ready(self, addresses: list[str]) -> None:
        """Tell the supervisor that this worker serves, and where."""
        with trio.CancelScope(shield=True):
            await self.leash.send_all(msgspec.json.encode(addresses) + b"\n")

    async def wait_abandoned(self) -> None:
        """Wait until the supervisor has gone."""
        try:
            while await self.leash.receive_some():
                pass
        except trio.BrokenResourceError:
            pass


def as_worker(given: Given, config: Config) -> Config:
    """The config of one worker: a node with a name of its own, and its part of the machine's memory."""
    return attrs.evolve(
        config,
        name=given.name,
        engine=given.engine,
        host=given.host,
        port=given.port,
        unix=None if given.unix is None else Path(given.unix),
        max_memory_bytes=max(1, memory_limit(config) // given.of),
    )
