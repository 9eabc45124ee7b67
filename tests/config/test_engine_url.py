"""How a setting names an engine."""

from pathlib import Path

import pytest

from broker.config.engine_url import EngineUrl, RedisUrl, parse_engine_url
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
    ["", "Memory", "memory:x", "sqlite", "sqlite:", "sqlite:?sync=power", "sqlite:x?", "redis:/x",
     "sqlite:x?sync=all", "sqlite:x?sync=power&y=1", "sqlite:a\0b"],
)  # fmt: skip
def test_what_names_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"must be|stands sync="):
        parse_engine_url(text)


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("redis://localhost", RedisUrl((("localhost", 6379),))),
        (
            "rediss://ann:p%40ss@[::1]:7000/3?prefix=app&ca=/etc/ca.pem",
            RedisUrl((("::1", 7000),), user="ann", password="p@ss", db=3, tls=True,
                     ca=Path("/etc/ca.pem"), prefix="app"),
        ),
        ("redis://a,b:7000", RedisUrl((("a", 6379), ("b", 7000)))),
        ("redis://:secret@h?db=2", RedisUrl((("h", 6379),), password="secret", db=2)),
        ("redis+unix:///run/r.sock?db=1", RedisUrl(socket="/run/r.sock", db=1)),
        (
            "redis+sentinel://a,b:1/main/2",
            RedisUrl((("a", 26379), ("b", 1)), service="main", db=2),
        ),
    ],
)  # fmt: skip
def test_a_redis_is_named(text: str, url: RedisUrl) -> None:
    assert parse_engine_url(text) == EngineUrl(redis=url)
    assert "secret" not in repr(url) + url.where


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("redis://", "must be"), ("redis://a,:1", "must be"), ("redis://a/b", "number"),
        ("redis://a/1/2", "must be"), ("redis://a?x=1", "and not x"), ("redis://a?db=-1", "number"),
        ("redis://a?prefix=", "prefix is"), ("redis://a?prefix={x}", "prefix is"),
        ("redis+unix://", "Unix socket"), ("redis+unix://host/x", "Unix socket"),
        ("redis+sentinel://a:1", "Sentinels"), ("redis://a:99999999", "must be"), ("redis://:1", "must be"),
        ("redis://[a", "must be"),
    ],
)  # fmt: skip
def test_a_redis_that_is_named_wrongly_is_refused(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_engine_url(text)


def test_a_variable_may_name_it_and_is_named_when_it_is_wrong() -> None:
    assert load(None, {}, environ={"BROKER_ENGINE": "sqlite:x"}).engine == "sqlite:x"
    with pytest.raises(
        ConfigError, match=r"^BROKER_ENGINE: .*'redis:x': must be .memory. or like "
    ):
        load(None, {}, environ={"BROKER_ENGINE": "redis:x"})
