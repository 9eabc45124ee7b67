"""The settings in force, each with where it was given."""

from math import inf
from pathlib import Path

import attrs
import pytest

from broker import Config, TokenRules, TopicRules
from broker.config.effective import EffectiveSetting, effective
from broker.config.loading import load_with_sources
from broker.config.reload import Settings
from broker.config.settings import TopicPattern, WebhookRules


def by_name(settings: list[EffectiveSetting]) -> dict[str, EffectiveSetting]:
    return {setting.name: setting for setting in settings}


def test_every_setting_is_there_once() -> None:
    names = [setting.name for setting in effective(Config())]
    assert len(names) == len(set(names))
    tables = {"topics": TopicRules, "tokens": TokenRules, "webhooks": WebhookRules}
    expected = {
        field.name
        for field in attrs.fields(Config)
        if field.name not in (*tables, "namespaces", "patterns")
    }
    for table, kind in tables.items():
        expected |= {f"{table}.{field.name}" for field in attrs.fields(kind)}
    assert set(names) == expected
    assert {setting.source for setting in effective(Config())} == {"default"}


def test_each_value_tells_where_it_was_given(tmp_path: Path) -> None:
    file = tmp_path / "broker.toml"
    file.write_text(
        "host = '::1'\nport = 1\nmax_topics = 7\n[topics]\nretain = true\nhistory_size = 5\n"
        "[topics.namespaces.chat]\nhistory_size = 9\n"
        "[[topics.patterns]]\nmatch = 'a.*'\nretain = false\n"
    )
    environ = {"BROKER_MAX_TOPICS": "8", "BROKER_TOPICS_PRESENCE": "false", "BROKER_PORT": "2"}
    base = Config(drain_seconds=1.5)
    loaded = load_with_sources(file, {"port": 3}, base=base, environ=environ)
    got = by_name(effective(loaded.config, loaded.sources))
    expected = {
        "host": ("::1", str(file)),
        "port": (3, "command line"),
        "max_topics": (8, "BROKER_MAX_TOPICS"),
        "drain_seconds": (1.5, "program"),
        "unix": (None, "default"),
        "topics.retain": (True, str(file)),
        "topics.presence": (False, "BROKER_TOPICS_PRESENCE"),
        "topics.history_ttl": (300.0, "default"),
        "topics.namespaces.chat.history_size": (9, str(file)),
        "topics.namespaces.chat.presence": (False, "BROKER_TOPICS_PRESENCE"),
        "topics.namespaces.chat.history_ttl": (300.0, "default"),
        "topics.patterns[0].match": ("a.*", str(file)),
        "topics.patterns[0].retain": (False, str(file)),
        "topics.patterns[0].history_size": (5, str(file)),
    }
    assert {name: (got[name].value, got[name].source) for name in expected} == expected


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (Config(api_key="s3cret"), "api_key"),
        (Config(metrics_key="s3cret"), "metrics_key"),
        (Config(tokens=TokenRules(hmac_secret="s3cret")), "tokens.hmac_secret"),
    ],
)
def test_a_secret_is_not_told(config: Config, name: str) -> None:
    settings = by_name(effective(config))
    assert settings[name].value == "(secret)"
    assert settings[name].source == "program"
    assert "s3cret" not in repr(settings)
    assert by_name(effective(Config()))[name].value is None


def test_values_are_as_json_can_say_them() -> None:
    config = Config(
        message_rate=inf,
        tls_cert=Path("a.pem"),
        tls_key=Path("b.pem"),
        patterns=(TopicPattern("a.>", TopicRules()),),
    )
    got = by_name(effective(config))
    assert got["message_rate"].value == "inf"
    assert got["tls_cert"].value == "a.pem"
    assert got["allowed_origins"].value == []
    assert got["topics.patterns[0].match"].source == "program"


def test_what_a_reload_cannot_change_keeps_its_source_and_says_why() -> None:
    settings = Settings(Config(port=1), {"port": "old.toml", "max_topics": "old.toml"})
    settings.replace(Config(port=2, max_topics=5), {"port": "new.toml", "max_topics": "new.toml"})
    got = by_name(effective(settings.config, settings.sources))
    assert (got["port"].value, got["port"].source) == (1, "old.toml")
    assert (got["max_topics"].value, got["max_topics"].source) == (5, "new.toml")
    assert got["port"].needs_restart == "the listeners are open"
    assert got["max_topics"].needs_restart == ""
