"""Somebody who does no harm, and must notice none."""

from typing import TYPE_CHECKING

import attrs
import trio

from tests.simulation.carriers import WebSocket
from tests.simulation.network import Wire

if TYPE_CHECKING:
    from tests.simulation.world import World

MOST_STEPS = 1000
"""Steps of all tasks of the loop that a round trip takes at most, whatever the others do meanwhile."""

MOST_BYTES = 512 * 2**10
"""Bytes that the broker writes meanwhile, to everybody together."""


@attrs.define(eq=False)
class Bystander:
    """It publishes to a topic of its own, and hears that: `round_trip` is what a message costs it, in
    what the loop does for everybody meanwhile."""

    world: "World"
    topic: str
    wire: Wire
    carrier: WebSocket = attrs.field(factory=lambda: WebSocket(0))
    fd: int = 0
    _sent: int = 0
    _came: int = 0

    @classmethod
    async def arrive(cls, world: "World", node: int) -> "Bystander":
        self = cls(world, f"by.{node}", world.new_wire(node))
        more = [{"id": 2, "subscribe": {"channel": self.topic}}]
        begin = self.carrier.begin({"id": 1, "connect": {}}, more)
        self.wire.send(begin.replace(b"?c=0", b"", 1))
        for _ in range(100):
            await world.still()
            self.pump()
            if self.fd:
                return self
        raise AssertionError("a bystander is not let in")

    @property
    def is_here(self) -> bool:
        return not self.wire.is_closed and not self.wire.is_over

    def pump(self) -> bool:
        data = self.wire.read()
        for said in self.carrier.hear(data):
            if not said:
                self.wire.send(self.carrier.write([{}]))
            elif "connect" in said:
                self.fd = int(said["connect"]["client"])
            elif "pub" in said.get("push", {}):
                number = said["push"]["pub"]["data"]
                assert number == self._came + 1, "a bystander has lost something"
                self._came = number
        return bool(data)

    async def round_trip(self) -> None:
        """Raises `AssertionError` where it takes too much."""
        world = self.world
        steps, size = world.steps.taken, world.bytes_sent
        self._sent += 1
        self.wire.send(
            self.carrier.write([{"publish": {"channel": self.topic, "data": self._sent}}])
        )
        rounds = 0
        while self._came < self._sent and self.is_here:
            rounds += 1
            if rounds > 50:  # it may be on its way between two nodes
                await trio.sleep(0.01)
            else:
                await trio.lowlevel.checkpoint()
            self.pump()
            spent = world.steps.taken - steps
            assert spent <= MOST_STEPS, f"a bystander waits for {spent} steps of others"
        written = world.bytes_sent - size
        assert written <= MOST_BYTES, f"a bystander waited for {written} bytes to others"
        world.most_steps = max(world.most_steps, world.steps.taken - steps)
        world.most_bytes = max(world.most_bytes, written)

    def leave(self) -> None:
        self.wire.half_close()
