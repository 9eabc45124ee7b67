"""One connection to Redis: commands go out, and their answers come back in the same order.

Of our own, because a node waits for something on it for each batch of any node: a client library's
tasks and channels cost more there than all else that is done with a lone publication. The protocol is read by
hiredis, which is imported when a connection is opened, so that a broker without Redis needs none.

Rules:

1. A task that waits for an answer reads, one at a time, and keeps for the others what comes for them. There is no other task.
2. An answer that nobody waits for any more is still taken in its turn. A command that was cut short ends the
   connection.
3. All that may go wrong is one error, `LinkLost`; after it the connection is of no use.
"""

import os
import ssl
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from hashlib import sha1
from typing import Any, Final

import attrs
import trio

CALL_SECONDS: Final = 2.0
"""How long an answer may take. A failover takes longer, and then another server answers."""

CONNECT_SECONDS: Final = 2.0

READ_BYTES: Final = 2**18
"""In one read of a socket."""


class LinkLost(Exception):
    """The connections to Redis are of no use any more; the text says why."""


class ErrorReply(Exception):
    """Redis has answered with an error, as in the text."""


class NotRedis(Exception):
    """An answer that is not the protocol of Redis."""


FAILURES: Final = (
    ErrorReply,
    NotRedis,
    OSError,
    trio.BrokenResourceError,
    trio.ClosedResourceError,
    trio.TooSlowError,
)
"""All that a connection may raise below the methods that raise `LinkLost`."""


def reason_of(error: BaseException) -> str:
    """An error as a log tells of it, with the one that it came from."""
    if isinstance(error, BaseExceptionGroup):  # of several addresses, none of which took us
        return reason_of(error.exceptions[0])
    if isinstance(error, trio.TooSlowError):
        return "it does not answer"
    text = str(error) or type(error).__name__
    why = "" if error.__cause__ is None else reason_of(error.__cause__)
    return text if why in text else f"{text}: {why}"


def to_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def to_text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


@attrs.define(eq=False)
class Script:
    """A Lua script, called by its digest."""

    text: str
    sha: bytes = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.sha = sha1(self.text.encode()).hexdigest().encode()  # noqa: S324 - Redis' own name


Part = bytes | str | int
"""A part of a command. A text may have half a surrogate pair, which the app may give it."""


@attrs.frozen
class Place:
    """Where a server listens: a path for a Unix socket, or a host and a port."""

    path: str = ""
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        return self.path or f"{self.host}:{self.port}"


@attrs.define(eq=False)
class PlainStream(trio.abc.Stream):
    """A socket, without the turns of the scheduler that Trio's own takes beside the wait."""

    socket: trio.socket.SocketType

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        left = memoryview(data)
        while left:
            try:
                left = left[os.write(self._fileno, left) :]
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._fileno)

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.wait_writable(self._fileno)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        while True:
            # As a rule what is asked for is not there yet.
            await trio.lowlevel.wait_readable(self._fileno)
            try:
                return os.read(self._fileno, max_bytes or READ_BYTES)
            except BlockingIOError:
                pass

    async def aclose(self) -> None:
        self.socket.close()
        await trio.lowlevel.checkpoint()

    @property
    def _fileno(self) -> int:
        """Asked for each time: once it is closed, its number may be another file's."""
        number = self.socket.fileno()
        if number < 0:
            raise trio.ClosedResourceError("this connection was closed")
        return number


@attrs.define(eq=False)
class _Turn:
    """Of a command whose answer has yet to come."""

    is_over: bool = False
    answer: Any = None  # numbers, bytes and lists of them: which, the command says


class Wire:
    """One connection; made by `open_wire`. Several may wait for answers at once, which come in order."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        import hiredis

        self._stream = stream
        self._pack: Callable[[Any], bytes] = hiredis.pack_command
        self._more = object()
        self._reader = hiredis.Reader(NotRedis, ErrorReply, notEnoughData=self._more)
        self._turns: deque[_Turn] = deque()
        self._sending = trio.Lock()
        self._reading = trio.Lock()
        self._is_cut = False

    async def call(self, command: bytes, *parts: Part) -> Any:
        """Send a command and wait for its answer. Raises `LinkLost`."""
        try:
            with trio.fail_after(CALL_SECONDS):
                return await self.ask(command, *parts)
        except FAILURES as error:
            raise LinkLost(reason_of(error)) from error

    async def run(self, script: Script, key: str, *parts: Part) -> Any:
        """Run a script on a key. One that the server does not know is sent along. Raises `LinkLost`."""
        try:
            with trio.fail_after(CALL_SECONDS):
                try:
                    return await self.ask(b"EVALSHA", script.sha, 1, key, *parts)
                except ErrorReply as error:
                    if not str(error).startswith("NOSCRIPT"):
                        raise
                    return await self.ask(b"EVAL", script.text, 1, key, *parts)
        except FAILURES as error:
            raise LinkLost(reason_of(error)) from error

    async def wait(self, command: bytes, *parts: Part) -> Any:
        """As `call`, for as long as the caller likes."""
        try:
            return await self.ask(command, *parts)
        except FAILURES as error:
            raise LinkLost(reason_of(error)) from error

    async def ask(self, command: bytes, *parts: Part) -> Any:
        """As `wait`, and raises what went wrong: one of `FAILURES`."""
        written = [to_bytes(each) if type(each) is str else each for each in parts]
        turn = _Turn()
        await _acquire(self._sending)
        try:
            await self._send(turn, self._pack((command, *written)))
        finally:
            self._sending.release()
        await _acquire(self._reading)
        try:
            while not turn.is_over:
                self._take_in(await self._stream.receive_some())
        finally:
            self._reading.release()
        if isinstance(turn.answer, ErrorReply):
            raise turn.answer
        return turn.answer

    async def _send(self, turn: _Turn, data: bytes) -> None:
        if self._is_cut:
            raise trio.BrokenResourceError("a command was cut short")
        self._turns.append(turn)
        self._is_cut = True
        await self._stream.send_all(data)
        self._is_cut = False

    def _take_in(self, data: bytes | bytearray) -> None:
        """Give out the answers that are whole by now."""
        if not data:
            raise trio.BrokenResourceError("Redis has closed the connection")
        self._reader.feed(bytes(data))
        while (answer := self._reader.gets()) is not self._more:
            if not self._turns:
                raise NotRedis("an answer came that nobody has asked for")
            turn = self._turns.popleft()
            turn.answer, turn.is_over = answer, True


async def _acquire(lock: trio.Lock) -> None:
    """The same as its own method, without a turn of the scheduler where nobody has it."""
    try:
        lock.acquire_nowait()
    except trio.WouldBlock:
        await lock.acquire()


@asynccontextmanager
async def open_wire(
    place: Place,
    context: ssl.SSLContext | None = None,
    user: str | None = None,
    password: str | None = None,
    db: int = 0,
) -> AsyncGenerator[Wire]:
    """A connection that is ready, for as long as the block. Raises one of `FAILURES` where there is none
    within `CONNECT_SECONDS`."""
    stream: trio.abc.Stream | None = None
    try:
        with trio.fail_after(CONNECT_SECONDS):
            stream = await _connect(place, context)
            wire = Wire(stream)
            await wire.ask(b"HELLO", 3, *_login(user, password))
            if db:
                await wire.ask(b"SELECT", db)
        yield wire
    finally:
        if stream is not None:  # at once: who does not answer does not take a farewell either
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(stream)


def _login(user: str | None, password: str | None) -> Sequence[str]:
    if not (user or password):
        return ()
    return "AUTH", user or "default", password or ""


async def _connect(place: Place, context: ssl.SSLContext | None) -> trio.abc.Stream:
    if place.path:
        return PlainStream((await trio.open_unix_socket(place.path)).socket)
    stream = await trio.open_tcp_stream(place.host, place.port)
    if context is None:
        return PlainStream(stream.socket)
    return trio.SSLStream(stream, context, server_hostname=place.host, https_compatible=True)
