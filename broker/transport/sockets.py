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
