"""Reading a bare socket with one system call and one wait for it.

Trio's own way tries to read first, and gives way to others also when it got something: 20 µs more
for each read of a peer that has sent nothing yet, which is nearly every one.
"""

import os

import trio


def fileno_of(stream: object) -> int:
    """The file number of a bare socket, which may be used without its stream knowing; -1 for any
    other stream, such as TLS or one in memory."""
    return stream.socket.fileno() if isinstance(stream, trio.SocketStream) else -1


async def receive_some(stream: trio.abc.ReceiveStream, most: int) -> bytes | bytearray:
    """Wait for bytes and take up to `most`; empty at the end of the stream.

    Raises `trio.BrokenResourceError` and `trio.ClosedResourceError`. Cancelled, nothing is lost.
    One task at a time.
    """
    if not isinstance(stream, trio.SocketStream):
        return await stream.receive_some(most)
    while True:
        await trio.lowlevel.wait_readable(stream.socket)
        try:
            # Asked for anew: the number of a socket that was closed may be another's by now.
            return os.read(stream.socket.fileno(), most)
        except BlockingIOError:
            pass  # readable is a hint: see BUGS in select(2)
        except OSError as error:
            raise trio.BrokenResourceError(f"socket connection broken: {error}") from error


def address_of(stream: trio.abc.Stream) -> str:
    """Where a stream's peer is, as text; `unix` or `memory` where that has no address."""
    if isinstance(stream, trio.SSLStream):
        stream = stream.transport_stream
    if not isinstance(stream, trio.SocketStream):
        return "memory"
    try:
        peer = stream.socket.getpeername()
    except OSError:
        return "unknown"
    if not isinstance(peer, tuple):
        return "unix"
    host, port = peer[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


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
