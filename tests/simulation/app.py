"""The app of a simulation: its hooks wait, raise and refuse as they are told, and know whom they let in."""

import json
from typing import TYPE_CHECKING, Any

import attrs
import trio

from broker import (
    Broker,
    Close,
    ConnectEvent,
    Connection,
    ConnectReply,
    Disconnect,
    Frame,
    PublishEvent,
    Refused,
    SubscribeEvent,
)
from tests.simulation.clients import Conn
from tests.simulation.ledger import number_of

if TYPE_CHECKING:
    from tests.simulation.world import World


@attrs.define(eq=False)
class Moods:
    """How the app's hooks behave at the moment: each kind is `calm`, `waits`, `raises` or `ends`."""

    by_kind: dict[str, str] = attrs.field(factory=dict)
    _held: trio.Event = attrs.field(factory=trio.Event)

    async def at(self, kind: str) -> None:
        mood = self.by_kind.get(kind, "calm")
        if mood == "waits":
            await self._held.wait()
        elif mood == "naps":
            for _ in range(3):
                await trio.lowlevel.checkpoint()
        elif mood == "raises":
            raise LookupError("a mistake of the app's")
        elif mood == "refuses":
            raise Refused(103)
        elif mood == "ends":
            raise Disconnect(4000, "the app says so")

    def release(self) -> None:
        self._held.set()
        self._held = trio.Event()

    def calm(self) -> None:
        self.by_kind.clear()
        self.release()


@attrs.define(eq=False)
class App:
    """One for all brokers of a simulation."""

    world: "World"
    moods: Moods = attrs.field(factory=Moods)

    def broker(self, seat: int) -> Broker:
        """A new broker with this app, for the place of this number."""
        world = self.world
        config = attrs.evolve(world.config, engine=world.script.engine_url)
        if world.script.engine in ("bus", "redis"):
            config = attrs.evolve(config, name=f"node {seat}")
        broker = Broker(config)
        hooks = world.script.hooks
        broker.on_connect(self._on_connect)
        broker.on_close(self._on_close)
        broker.on_message(self._on_message)
        broker.on_rpc(self._on_rpc)
        if "open" in hooks:
            broker.on_open(self._on_open)
        if "subscribe" in hooks:
            broker.on_subscribe(self._on_subscribe)
        if "publish" in hooks:
            broker.on_publish(self._on_publish)
        if "read" in hooks:
            broker.on_history(self._on_read)
            broker.on_presence(self._on_read)
        return broker

    def _conn(self, connection: Connection) -> Conn | None:
        """The connection of ours that a hook is about; None for a bystander's."""
        number = connection.params.get("c")
        if number is None:
            return None
        conn = self.world.conns[int(number)]
        conn.let_in = True
        if not conn.fd:
            conn.fd = connection.fd
        assert conn.fd == connection.fd, f"fd {connection.fd} was {conn.fd}"
        before = self.world.by_fd.setdefault(conn.fd, conn)
        assert before is conn, f"the fd {conn.fd} was used again"
        return conn

    async def _mood(self, kind: str, conn: Conn | None) -> None:
        if conn is None:
            return
        mood = self.moods.by_kind.get(kind, "calm")
        # Without its connect, what a client has sent behind that is no command either.
        if mood == "ends" or kind in ("open", "connect", "message"):
            conn.causes |= {"server"} if mood in ("raises", "refuses", "ends") else set()
        await self.moods.at(kind)

    async def _on_open(self, connection: Connection) -> None:
        await self._mood("open", self._conn(connection))

    async def _on_connect(self, event: ConnectEvent) -> ConnectReply:
        conn = self._conn(event.connection)
        await self._mood("connect", conn)
        if conn is not None:
            conn.users.append((self.world.ledger.changed(), event.token))
        return ConnectReply(user=event.token)

    async def _on_message(self, connection: Connection, frame: Frame) -> None:
        conn = self._conn(connection)
        await self._mood("message", conn)
        self.world.seat_of(conn).broker.push(connection.fd, f"heard {frame.data!r}")

    async def _on_close(self, connection: Connection, close: Close) -> None:
        conn = self._conn(connection)
        if conn is not None and not self.world.has_failed:
            conn.closes += 1
            if conn.closes > 1:
                raise AssertionError(f"the close hook of fd {conn.fd} was called twice")
            _check_close(conn, close)
            if self.moods.by_kind.get("close") in ("waits", "naps"):
                await self.moods.at("close")

    async def _on_rpc(self, connection: Connection, method: str, data: object) -> object:
        await self._mood("rpc", self._conn(connection))
        return {"called": data}

    async def _on_subscribe(self, event: SubscribeEvent) -> None:
        conn = self._conn(event.connection)
        await self._mood("subscribe", conn)
        self.world.ledger.decided["subscribe", event.connection.fd, event.topic] = (
            self.world.ledger.changes
        )

    async def _on_publish(self, event: PublishEvent) -> None:
        conn = self._conn(event.connection)
        await self._mood("publish", conn)
        if conn is not None:
            number = number_of(json.loads(event.data))
            self.world.ledger.decided["publish", number] = self.world.ledger.changes

    async def _on_read(self, event: Any) -> None:
        await self._mood("read", self._conn(event.connection))


def _check_close(conn: Conn, close: Close) -> None:
    who, code = close.initiator.value, close.code
    causes = set(conn.causes)
    if conn.wire.was_stalled or conn.wire.has_vanished:
        causes |= {"slow", "heartbeat"}
    if who not in causes:
        raise AssertionError(f"fd {conn.fd} was ended by {who} ({code}), true is {sorted(causes)}")
    if who == "client":
        if code not in conn.codes:
            raise AssertionError(f"fd {conn.fd} closed with {conn.codes}, told is {code}")
    elif who == "network" and code != 1006:
        raise AssertionError(f"fd {conn.fd} was lost, told is {code}")
