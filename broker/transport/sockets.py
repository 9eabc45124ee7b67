"""Sockets, bare or below other streams: reading them, and seeing what their peers take.

A read is one system call and one wait for it. Trio's own way tries to read first, and gives way to
others also when it got something: 20 µs more for each read of a peer that has sent nothing yet,
which is nearly every one.
"""

import fcntl
import os
import select
import socket
import ssl
import sys
import termios
from typing import Final

import trio

# Where `tcpi_bytes_acked` is in the `tcp_info` of <linux/tcp.h>, 64 bits since Linux 4.1.
_BYTES_ACKED = slice(120, 128)

ROOM = 8 * 2**10
"""Bytes that a socket that is writable has room for. Trio asks the system to hold no more than 16 KiB that
it has not sent yet (`TCP_NOTSENT_LOWAT`); writable means that half of that is free."""


class RelayStream(trio.abc.Stream):
    """A stream that passes on what it is given to another one, perhaps as more bytes."""

    transport_stream: trio.abc.Stream
    pieces: int = 0
    """How many pieces of what was sent the other stream has taken; only grows."""


def fileno_of(stream: object) -> int:
    """The file number of a bare socket, which may be used without its stream knowing; -1 for any
    other stream, such as TLS or one in memory."""
    return stream.socket.fileno() if isinstance(stream, trio.SocketStream) else -1


def socket_below(stream: object) -> trio.SocketStream | None:
    """The socket that carries a stream, below TLS and relays; None for a stream in memory."""
    while isinstance(stream, (trio.SSLStream, RelayStream)):
        stream = stream.transport_stream
    return stream if isinstance(stream, trio.SocketStream) else None


def let_go(stream: object) -> None:
    """Free what a stream holds that was closed and that nobody uses any more, not even to close it.

    `trio.SSLStream` points to itself (it keeps a bound method for its handshake), so the 130 KiB that
    OpenSSL has for it would stay until the garbage collector comes by, which is seldom.
    """
    if isinstance(stream, trio.SSLStream):
        vars(stream).clear()


def has_room(stream: trio.SocketStream) -> bool:
    """Whether a write of up to `ROOM` bytes to a socket would not wait; true of one that is dead."""
    fileno = stream.socket.fileno()
    if fileno < 0:
        return True
    poll = select.poll()
    poll.register(fileno, select.POLLOUT)
    return bool(poll.poll(0))


def unacknowledged(fileno: int) -> int:
    """How many bytes the system holds for the peer of a socket; 0 where it does not say, as of one that is
    closed, whose number is -1."""
    try:
        return int.from_bytes(fcntl.ioctl(fileno, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
    except (OSError, ValueError):
        return 0


def acknowledged(stream: trio.SocketStream) -> int:
    """A number that changes when the peer of a socket takes something.

    That is how many bytes a TCP peer has acknowledged, where the system says so. Of other sockets
    it is what the system still holds, which changes for as long as nothing more is written.
    """
    try:
        info = stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED.stop)
        if len(info) == _BYTES_ACKED.stop:
            return int.from_bytes(info[_BYTES_ACKED], sys.byteorder)
    except (AttributeError, OSError):
        pass  # not on this system; not TCP; closed
    return unacknowledged(stream.socket.fileno())


async def receive_some(stream: trio.abc.ReceiveStream, most: int) -> bytes | bytearray:
    """Wait for bytes and take up to `most`; empty at the end of the stream.

    Raises `trio.BrokenResourceError` and `trio.ClosedResourceError`. Cancelled, nothing is lost.
    One task at a time.
    """
    if not isinstance(stream, trio.SocketStream):
        return await stream.receive_some(most)
    while True:
        try:
            await trio.lowlevel.wait_readable(stream.socket)
            # Asked for anew: the number of a socket that was closed may be another's by now.
            return os.read(stream.socket.fileno(), most)
        except BlockingIOError:
            pass  # readable is a hint: see BUGS in select(2)
        except OSError as error:
            raise trio.BrokenResourceError(f"socket connection broken: {error}") from error
        except ValueError as error:  # its number is -1
            raise trio.ClosedResourceError("this stream is closed") from error


def wake_reader(stream: object) -> None:
    """Have the task that waits for bytes of a bare socket go on, with `trio.ClosedResourceError`, though the
    socket stays open: so none needs a cancel scope of its own, which is 0.6 KiB and 8 µs."""
    if isinstance(stream, trio.SocketStream) and stream.socket.fileno() >= 0:
        trio.lowlevel.notify_closing(stream.socket)


def receive_now(stream: object, most: int) -> bytes:
    """Up to `most` bytes of what has come to a bare socket already. Empty where that is nothing, and of any other
    stream or a dead one: `receive_some` says what is the matter."""
    fileno = fileno_of(stream)
    if fileno < 0:
        return b""
    try:
        return os.read(fileno, most)
    except OSError:
        return b""


def write_now(stream: object, data: bytes) -> int:
    """Hand to a bare socket what it takes without waiting; how many bytes that was. None of a stream that is
    no bare socket, and of one that is dead: the sender of the rest will be told so."""
    fileno = fileno_of(stream)
    if fileno < 0:
        return 0
    try:
        return os.write(fileno, data)
    except OSError:
        return 0


def address_of(stream: trio.abc.Stream) -> str:
    """Where a stream's peer is, as text; `unix` or `memory` where that has no address."""
    below = socket_below(stream)
    if below is None:
        return "memory"
    try:
        peer = below.socket.getpeername()
    except OSError:
        return "unknown"
    if not isinstance(peer, tuple):
        return "unix"
    host, port = peer[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


_GONE: Final = (ssl.SSLEOFError, ssl.SSLZeroReturnError)


HTTP_WITHOUT_TLS: Final = "http request"
"""The fault where a peer began with plain HTTP."""


def tls_fault(error: trio.BrokenResourceError) -> str | None:
    """The reason why TLS has failed, in the words of OpenSSL: `http request`, `tlsv1 alert unknown ca`. None
    where something else was wrong, or the peer has gone without a word: some versions of Python tell of that as
    an error of TLS."""
    cause = error.__cause__
    if not isinstance(cause, ssl.SSLError) or isinstance(cause, _GONE):
        return None
    return (cause.reason or str(cause)).replace("_", " ").lower()


async def answer_and_linger(stream: trio.abc.Stream, answer: bytes, seconds: float) -> None:
    """Send a last answer and read on for a while: unread bytes would turn it into a reset."""
    with trio.move_on_after(seconds):
        await stream.send_all(answer)
        if isinstance(stream, trio.abc.HalfCloseableStream):
            await stream.send_eof()
            left = 2**20
            while left > 0:
                data = await stream.receive_some(64 * 2**10)
                if not data:
                    break
                left -= len(data)
