"""The engine that the settings name."""

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

from broker.config.settings import Config
from broker.engines.engine import Engine
from broker.engines.memory import open_memory


@asynccontextmanager
async def open_engine(config: Config, wall_clock: Callable[[], float]) -> AsyncGenerator[Engine]:
    """The engine for as long as the block; open it around everything that publishes.

    `wall_clock` is in Unix seconds.
    """
    async with open_memory(config.history_bytes, config.retained_bytes) as engine:
        yield engine
