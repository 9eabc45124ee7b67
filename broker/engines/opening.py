"""The engine that the settings name."""

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

from broker.config.engine_url import parse_engine_url
from broker.config.settings import Config
from broker.core.messages import Fd
from broker.engines.engine import Engine, RunBlocking
from broker.engines.memory import open_memory
from broker.engines.redis import open_redis
from broker.engines.sqlite import open_sqlite


class OpenEngine(Protocol):
    """Opens an engine; see `open_engine`."""

    def __call__(
        self,
        config: Config,
        wall_clock: Callable[[], float],
        first_fd: Fd = ...,
        run_blocking: RunBlocking | None = ...,
        /,
    ) -> AbstractAsyncContextManager[Engine]: ...


@asynccontextmanager
async def open_engine(
    config: Config,
    wall_clock: Callable[[], float],
    first_fd: Fd = 1,
    run_blocking: RunBlocking | None = None,
) -> AsyncGenerator[Engine]:
    """The engine for as long as the block; open it around everything that publishes.

    `wall_clock` is in Unix seconds. fds begin at `first_fd` at the lowest. A disk is waited for in a
    thread, or as `run_blocking` does. Raises `ConfigError` for a file that cannot be used, and for a
    Redis that cannot.
    """
    url, sizes = parse_engine_url(config.engine), (config.history_bytes, config.retained_bytes)
    if url.redis is not None:
        async with open_redis(url.redis, *sizes, wall_clock, first_fd) as redis:
            yield redis
    elif url.path is None:
        async with open_memory(*sizes, first_fd) as memory:
            yield memory
    else:
        async with open_sqlite(url, *sizes, wall_clock, first_fd, run_blocking) as sqlite:
            yield sqlite
