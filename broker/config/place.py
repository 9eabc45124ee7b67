"""How a setting names a place to listen on: `unix:/run/broker.sock`, `localhost:9502`, `[::]:9503`."""

from pathlib import Path
from typing import Final

_UNIX: Final = "unix:"


def parse_place(text: str) -> Path | tuple[str, int]:
    """A Unix socket, or host and port. Raises `ValueError` for what is no place."""
    if text.startswith(_UNIX):
        path = text.removeprefix(_UNIX)
        if not path:
            raise ValueError(f'{text!r} names no file: "unix:/run/broker.sock"')
        return Path(path)
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not (colon and host and port.isascii() and port.isdigit()) or (
        ":" in host and not bracketed
    ):
        raise ValueError(
            f'{text!r} is no place to listen on: "HOST:PORT", "[::1]:9501", or "unix:/run/broker.sock"'
        )
    return host.strip("[]"), int(port)
