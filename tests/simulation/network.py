"""The network between clients and brokers: streams in memory, and what can go wrong on them.

A client's end of a `Wire` never waits, so a whole crowd of clients is one function that is called now and then.
The broker's end is a Trio stream, as its listener would accept.
"""

from collections import deque
from contextlib import suppress
from random import Random
from typing import Final

import trio

HOLE_BYTES: Final = 4096
"""What a black hole takes before it takes nothing any more: the send buffer of the system."""

SLICE: Final = 7


class Wire:
    """One connection. Faults last until `heal`; `reset`, `half_close` and `vanish` are for good."""

    def __init__(self, chance: Random, *, sliced: bool = False, lag: float = 0.0) -> None:
        self.far_end = FarEnd(self)
        self.sliced = sliced
        """Whether the broker reads 1 to 7 bytes at a time."""
        self.lag = lag
        """Seconds that everything is on its way, in both directions."""
        self.is_stalled = False
        """The client takes nothing."""
        self.was_stalled = False
        self.is_reset = self.has_vanished = self.is_half_closed = False
        self.bytes_sent = 0
        """Of the broker's."""
        self._chance = chance
        self._up: deque[tuple[float, bytes]] = deque()
        self._down: deque[tuple[float, bytes]] = deque()
        self._lost = 0
        self._moved = trio.lowlevel.ParkingLot()
        self._reads = self._sends = False
        self.is_closed = False
        """By the broker."""

    # the client's end

    @property
    def is_over(self) -> bool:
        """Whether the client has ended it."""
        return self.is_reset or self.has_vanished or self.is_half_closed

    def send(self, data: bytes) -> None:
        if not (self.is_over or self.is_closed):
            self._up.append((trio.current_time() + self.lag, data))
            self._wake()

    def read(self) -> bytes:
        """All that has come by now."""
        now, came = trio.current_time(), []
        while self._down and self._down[0][0] <= now and not self.is_stalled:
            came.append(self._down.popleft()[1])
        return b"".join(came)

    @property
    def has_ended(self) -> bool:
        """The broker has closed it, and all of it was read; or there is nothing to read any more."""
        return self.is_reset or (self.is_closed and not self._down)

    def stall(self) -> None:
        self.is_stalled = self.was_stalled = True

    def heal(self) -> None:
        self.is_stalled, self.sliced, self.lag = False, False, 0.0
        self._wake()

    def half_close(self) -> None:
        self.is_half_closed = True
        self._wake()

    def reset(self) -> None:
        """What is on its way to the broker is lost, too."""
        self.is_reset = True
        self._up.clear()
        self._wake()

    def vanish(self) -> None:
        """Nothing arrives any more, in neither direction, and nobody is told."""
        self.has_vanished = True
        self._up.clear()
        self._down.clear()

    def _wake(self) -> None:
        with suppress(RuntimeError):  # behind the end of everything
            self._moved.unpark_all()

    # the broker's end

    async def take(self, data: bytes) -> None:
        if self._sends:
            raise AssertionError("two tasks write to one stream")
        self._sends = True
        try:
            await trio.lowlevel.checkpoint()
            self._check()
            self.bytes_sent += len(data)
            if self.has_vanished:
                self._lost += len(data)
            else:
                self._down.append((trio.current_time() + self.lag, data))
            await self.wait_taken()
        finally:
            self._sends = False

    async def wait_taken(self) -> None:
        while self.is_stalled or (self.has_vanished and self._lost > HOLE_BYTES):
            await self._moved.park()
            self._check()

    async def give(self, most: int) -> bytes:
        if self._reads:
            raise AssertionError("two tasks read from one stream")
        self._reads = True
        try:
            await trio.lowlevel.checkpoint()
            while True:
                self._check()
                if not self._up or self.has_vanished:
                    if self.is_half_closed:
                        return b""
                    await self._moved.park()
                    continue
                due, data = self._up[0]
                if due > trio.current_time():
                    await trio.sleep_until(due)
                    continue
                self._up.popleft()
                if self.sliced:
                    most = min(most, self._chance.randint(1, SLICE))
                if len(data) > most:
                    self._up.appendleft((due, data[most:]))
                return data[:most]
        finally:
            self._reads = False

    def close(self) -> None:
        self.is_closed = True
        self._up.clear()
        self._wake()

    def _check(self) -> None:
        if self.is_closed:
            raise trio.ClosedResourceError
        if self.is_reset:
            raise trio.BrokenResourceError


class FarEnd(trio.abc.Stream):
    """The broker's end of a wire."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._wire.take(bytes(data))

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()
        await self._wire.wait_taken()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        return await self._wire.give(max_bytes or 2**16)

    async def aclose(self) -> None:
        self._wire.close()
        await trio.lowlevel.checkpoint()


class Door(trio.abc.Listener[trio.abc.Stream]):
    """A listener that is connected to without waiting."""

    def __init__(self) -> None:
        self._knocking: deque[trio.abc.Stream] = deque()
        self._knocked = trio.lowlevel.ParkingLot()
        self._is_closed = False

    def knock(self, stream: trio.abc.Stream) -> bool:
        """Have a stream be accepted; false where nobody listens any more."""
        if not self._is_closed:
            self._knocking.append(stream)
            self._knocked.unpark_all()
        return not self._is_closed

    async def accept(self) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        while not self._knocking:
            if self._is_closed:
                raise trio.ClosedResourceError
            await self._knocked.park()
        return self._knocking.popleft()

    async def aclose(self) -> None:
        """Whoever was not accepted yet is refused."""
        self._is_closed = True
        self._knocked.unpark_all()
        with trio.CancelScope(shield=True):  # closing by force does not wait for anybody
            while self._knocking:
                await trio.aclose_forcefully(self._knocking.popleft())
        await trio.lowlevel.checkpoint()
