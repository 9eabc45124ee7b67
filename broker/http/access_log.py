"""The access log: a line for each HTTP request that was answered, if the settings want one.

Rules:

1. A request that becomes a connection is no entry: `open` and `close` tell of it. One that is refused
   before it is known what it asks for has its line `refused` alone.
2. Queries are left out, because a token may stand there; and so is every header but `User-Agent`.
3. A failure to log is nobody's failure.
"""

from typing import Final

import attrs
import structlog
import trio

from broker.transport.head import Head

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("broker.http")

MOST: Final = 200
"""Characters of a path, or of what a client calls itself."""


@attrs.define(eq=False)
class Exchange:
    """One request, and what it was answered with, of `size` bytes. `status` is 0 while there is no answer."""

    _head: Head
    _is_logged: bool
    _peer: str
    _began: float
    status: int = 0
    size: int = 0

    @classmethod
    def begin(cls, head: Head, address: str, *, is_logged: bool) -> "Exchange":
        """A request has come from a client at this address."""
        return cls(head, is_logged, address, trio.current_time())

    def note_sent(self, data: bytes) -> None:
        """Some of the answer goes out; its head may come behind that of a `100 Continue`."""
        if self.status < 200 and data.startswith(b"HTTP/1.") and data[9:12].isdigit():
            self.status = int(data[9:12])
        self.size += len(data)

    def end(self) -> None:
        """Log it, if that is wanted. Never waits."""
        if not self._is_logged:
            return
        head = self._head
        log.info(
            "request",
            method=head.method,
            path=head.path[:MOST],
            status=self.status,
            bytes=self.size,
            seconds=round(trio.current_time() - self._began, 4),
            peer=self._peer,
            agent=(head.header("user-agent") or "")[:MOST],
        )
