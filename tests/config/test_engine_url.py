"""How a setting names an engine."""

from pathlib import Path

import pytest

from broker.config.engine_url import EngineUrl, parse_engine_url
from broker.config.loading import load
from broker.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("memory", EngineUrl()),
        ("sqlite:log.db", EngineUrl(Path("log.db"))),
        ("sqlite:/var/lib/log.db?sync=power", EngineUrl(Path("/var/lib/log.db"))),
        ("sqlite:a:b?sync=process", EngineUrl(Path("a:b"), "process")),
    ],
)
def test_an_engine_is_named(text: str, url: EngineUrl) -> None:
    assert parse_engine_url(text) == url


@pytest.mark.parametrize(
    "text",
    ["", "Memory", "memory:x", "sqlite", "sqlite:", "sqlite:?sync=power", "sqlite:x?", "redis://x",
     "sqlite:x?sync=all", "sqlite:x?sync=power&y=1", "sqlite:a\0b"],
)  # fmt: skip
def test_what_names_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"must be|stands sync="):
        parse_engine_url(text)


def test_a_variable_may_name_it_and_is_named_when_it_is_wrong() -> None:
    assert load(None, {}, environ={"BROKER_ENGINE": "sqlite:x"}).engine == "sqlite:x"
    with pytest.raises(
        ConfigError, match=r"^BROKER_ENGINE: .*'redis:x': must be .memory. or like "
    ):
        load(None, {}, environ={"BROKER_ENGINE": "redis:x"})
