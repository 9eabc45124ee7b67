"""The messages between systemd and a service: sockets that systemd has opened, and the service's state.

See sd_listen_fds(3) and sd_notify(3). Nothing here is missed where there is no systemd.

Rule: variables for this process are taken out of the environment: a child must not take them for its own.
"""

import os
import socket
from collections.abc import MutableMapping
from contextlib import suppress
from time import monotonic_ns
from typing import Final

import attrs
import trio

_FIRST_SOCKET: Final = 3
"""SD_LISTEN_FDS_START: behind stdin, stdout and stderr."""


def take_listen_fds(environ: MutableMapping[str, str] = os.environ) -> list[int]:
    """The files to listen on, by `LISTEN_FDS`; none if they were opened for another process."""
    pid, count = environ.pop("LISTEN_PID", ""), environ.pop("LISTEN_FDS", "")
    environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    return list(range(_FIRST_SOCKET, _FIRST_SOCKET + int(count)))


@attrs.frozen
class Notifier:
    """Tells systemd how this process is. Without an address it tells nobody. No method waits or raises."""

    address: str = ""
    watchdog_seconds: float | None = None
    """How often systemd wants a sign of life, or it starts the service anew; None: never."""

    @classmethod
    def of(cls, environ: MutableMapping[str, str] = os.environ) -> "Notifier":
        """The one that the environment asks for."""
        address = environ.pop("NOTIFY_SOCKET", "")
        limit, pid = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", "")
        is_ours = pid in ("", str(os.getpid()))
        seconds = int(limit) / 1e6 if is_ours and limit.isdecimal() and int(limit) else None
        return cls(address, seconds)

    def ready(self, status: str = "") -> None:
        """It serves, or serves again after a reload."""
        self._tell("READY=1", *([f"STATUS={status}"] if status else []))

    def reloading(self) -> None:
        """It reads its settings anew; `ready` ends that."""
        self._tell("RELOADING=1", f"MONOTONIC_USEC={monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """It drains."""
        self._tell("STOPPING=1")

    def alive(self) -> None:
        """A sign of life."""
        self._tell("WATCHDOG=1")

    async def keep_alive(self, seconds: float) -> None:
        """Give a sign of life every so often, until cancelled: none while the event loop stands still."""
        while True:
            self.alive()
            await trio.sleep(seconds)

    def _tell(self, *lines: str) -> None:
        if not self.address:
            return
        # A name that begins with @ is one of the abstract kind, which begins with a zero byte.
        address = f"\0{self.address[1:]}" if self.address.startswith("@") else self.address
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.sendto("\n".join(lines).encode(), address)
