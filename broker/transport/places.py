"""Places to listen on beside the one of the settings: `unix:/run/broker.sock`, `localhost:9502`, `[::]:9503`.

Rule: one that cannot be had is told of, and fails no other. Without any there is nothing to serve.
"""

from collections.abc import Sequence
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import Final

import attrs
import structlog
import trio

from broker.config.settings import Config, is_loopback
from broker.errors import ConfigError
from broker.transport.listeners import AnyListener, open_listeners

log = structlog.get_logger("broker")

_UNIX: Final = "unix:"


def config_of(place: str, config: Config) -> Config:
    """The settings, with this place in place of their own. Raises `ValueError` for what is no place."""
    if place.startswith(_UNIX):
        path = place.removeprefix(_UNIX)
        if not path:
            raise ValueError(f'{place!r} names no file: "unix:/run/broker.sock"')
        return attrs.evolve(config, unix=Path(path))
    host, colon, port = place.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not (colon and host and port.isascii() and port.isdigit()) or (
        ":" in host and not bracketed
    ):
        raise ValueError(
            f'{place!r} is no place to listen on: "HOST:PORT", "[::1]:9501", or "unix:/run/broker.sock"'
        )
    return attrs.evolve(config, host=host.strip("[]"), port=int(port), unix=None)


def is_local(config: Config) -> bool:
    """Whether only this machine can come in where the settings have us listen."""
    return config.unix is not None or is_loopback(config.host)


async def open_places(configs: Sequence[Config]) -> list[AnyListener]:
    """Listen as each of these says. The caller owns the listeners.

    What cannot be had is logged. Raises `ConfigError`, the first of all, if nothing can.
    """
    opened: list[AnyListener] = []
    failures: list[ConfigError] = []
    try:
        for config in configs:
            try:
                opened += await open_listeners(config)
            except ConfigError as error:
                failures.append(error)
    except BaseException:
        for listener in opened:
            with suppress(OSError), trio.CancelScope(shield=True, deadline=-inf):
                await listener.aclose()
        raise
    if not opened and failures:
        raise failures[0]
    for failure in failures:
        log.error("not_listening", reason=str(failure), detail="all other places are served")
    return opened
