"""Places to listen on beside the one of the settings: `unix:/run/broker.sock`, `localhost:9502`, `[::]:9503`.

Rule: a place that cannot be had is reported, and fails no other. Without any there is nothing to serve.
"""

import ssl
from collections.abc import Sequence
from pathlib import Path

import attrs
import structlog
import trio

from broker.config.place import parse_place
from broker.config.settings import Config, is_loopback
from broker.errors import ConfigError
from broker.transport.listeners import AnyListener, open_sockets, read_certificate, secure

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("broker")


def config_of(place: str, config: Config) -> Config:
    """The settings, with this place in place of their own. Raises `ValueError` for what is no place."""
    where = parse_place(place)
    if isinstance(where, Path):
        return attrs.evolve(config, unix=where)
    return attrs.evolve(config, host=where[0], port=where[1], unix=None)


def is_local(config: Config) -> bool:
    """Whether only this machine can come in where the settings have us listen."""
    return config.unix is not None or is_loopback(config.host)


async def open_places(
    configs: Sequence[Config], context: ssl.SSLContext | None = None, *, others: bool = False
) -> list[AnyListener]:
    """Listen as each of these says, over TLS by a context that was read before, or is read now from the
    first. The caller owns the listeners.

    A place that cannot be had is logged. Raises `ConfigError`, the first of all, if nothing can, and there
    are no `others` that listen already.
    """
    context = context or await read_certificate(configs[0])
    return secure(await open_sockets_of(configs, others=others), context)


async def open_sockets_of(
    configs: Sequence[Config], *, others: bool = False
) -> list[trio.SocketListener]:
    """The same, but for TLS."""
    opened: list[trio.SocketListener] = []
    failures: list[ConfigError] = []
    try:
        for config in configs:
            try:
                opened += await open_sockets(config)
            except ConfigError as error:
                failures.append(error)
    except BaseException:
        for listener in opened:
            listener.socket.close()
        raise
    if not opened and failures and not others:
        raise failures[0]
    for failure in failures:
        log.error("not_listening", reason=str(failure), detail="all other places are served")
    return opened


async def open_api_sockets(config: Config) -> list[trio.SocketListener]:
    """Listen where the API alone is, if `api_listen` says so. The caller owns them. Raises `ConfigError`."""
    if not config.api_listen:
        return []
    try:
        return await open_sockets(config_of(config.api_listen, config))
    except ConfigError as error:
        reason = str(error).partition(": stop what listens there")[0]
        raise ConfigError(f"api_listen: {reason}") from None
