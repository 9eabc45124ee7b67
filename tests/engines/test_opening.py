"""The engine that the settings name, with the sizes that they give."""

from pathlib import Path

import pytest
import trio

from broker import Config
from broker.engines.memory import MemoryEngine
from broker.engines.opening import open_engine
from broker.engines.sqlite import SqliteEngine
from broker.errors import ConfigError
from broker.testing import wait_in_line


@pytest.mark.parametrize("name", ["memory", "sqlite"])
async def test_the_url_says_which(name: str, autojump_clock: object, tmp_path: Path) -> None:
    url = f"sqlite:{tmp_path / 'log.db'}" if name == "sqlite" else "memory"
    config = Config(engine=url, history_bytes=2**20, retained_bytes=2**19)
    async with open_engine(config, trio.current_time, 7, wait_in_line) as engine:
        assert type(engine) is {"memory": MemoryEngine, "sqlite": SqliteEngine}[name]
        assert engine.next_fd == 7


async def test_a_file_that_cannot_be_is_a_mistake_in_the_config(tmp_path: Path) -> None:
    config = Config(engine=f"sqlite:{tmp_path / 'no' / 'log.db'}")
    with pytest.raises(ConfigError, match="engine: "):
        async with open_engine(config, trio.current_time):
            pass
