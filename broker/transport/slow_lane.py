"""trio-websocket, as the judge of every frame that is not plain data.

It is given a stream of our own, by its public API, in which it finds whole frames. The handshake
with the peer is long done, so it is shown one that always looks the same, and its answer goes nowhere.

Rule: frames are handed over when trio-websocket asks for more, which is when it has dealt with those
before, and at most the last of them completes a message. So after `put` a message is complete or it
is not, and no task has to wait for it.
"""

from collections.abc import Callable

import trio
import trio_websocket

from broker.transport import frames

_HANDSHAKE = (
    b"GET / HTTP/1.1\r\nHost: peer\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


class SlowLane(trio.abc.Stream):
    """The stream under trio-websocket; see `open_slow_lane`."""

    def __init__(self, answer: Callable[[bytes], None]) -> None:
        self._answer = answer
        self._to_websocket, self._from_lane = trio.open_memory_channel[bytes](1)
        self._to_websocket.send_nowait(_HANDSHAKE)
        self._settled = trio.Event()
        self._websocket: trio_websocket.WebSocketConnection | None = None
        self.error: tuple[int, str] | None = None
        """Code and words for what the peer did wrong, once trio-websocket has given it up."""

    async def put(self, slow: bytes) -> None:
        """Hand over whole frames, and wait until they have been dealt with."""
        self._settled = trio.Event()
        await self._to_websocket.send(slow)
        await self._settled.wait()

    def settle(self) -> None:
        """Have `put` return: trio-websocket has ended, or will not deal with what was handed over any more."""
        self._settled.set()

    async def get_message(self) -> bytes:
        """The payload of the message that the frames before have completed."""
        assert self._websocket is not None
        message = await self._websocket.get_message()
        return message.encode() if isinstance(message, str) else message

    async def open(self, nursery: trio.Nursery, max_message_bytes: int) -> None:
        """Start trio-websocket in `nursery`."""
        request = await trio_websocket.wrap_server_stream(
            nursery, self, max_message_size=max_message_bytes
        )
        self._websocket = await request.accept()

    def let_go(self) -> None:
        """Drop all that came, and the way to answer; trio-websocket points back here. The last call."""
        self._websocket = None
        self._answer = _drop

    # methods that trio-websocket calls

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        self._settled.set()
        if self.error is not None:
            await trio.lowlevel.checkpoint()
            return b""
        return await self._from_lane.receive()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        # It answers the handshake first; and a Close, which is ours to send.
        if self._websocket is not None and data[0] != 0x80 | frames.CLOSE:
            self._answer(bytes(data))

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        """Trio-websocket has given the peer up."""
        await trio.lowlevel.checkpoint()
        reason = None if self._websocket is None else self._websocket.closed
        if reason is not None:
            self.error = reason.code, reason.reason or ""


def _drop(frame: bytes) -> None:
    pass


async def open_slow_lane(
    nursery: trio.Nursery, answer: Callable[[bytes], None], max_message_bytes: int
) -> SlowLane:
    """A slow lane whose reader runs in `nursery`. `answer` is given each frame that it wants to send.

    About 0.5 ms and 12 KiB, which is why a connection has none before it needs one.
    """
    slow_lane = SlowLane(answer)
    await slow_lane.open(nursery, max_message_bytes)
    return slow_lane
