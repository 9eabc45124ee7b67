"""Settings: which values they take, and what they are taken together to mean."""

from pathlib import Path
from typing import Any

import attrs
import pytest

from broker.config.loading import load
from broker.config.settings import (
    NEEDS_RESTART,
    Config,
    TokenRules,
    TopicPattern,
    TopicRules,
    WebhookRules,
    exposure_warning,
    is_loopback,
)
from broker.errors import ConfigError


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("port", -1, "port is -1: must be from 0 to 65535"),
        ("port", 65536, "port is 65536: must be from 0 to 65535"),
        ("port", True, "port is True: expected a whole number"),
        ("port", "9501", "port is '9501': expected a whole number"),
        ("port", 1.0, "port is 1.0: expected a whole number"),
        ("host", 5, "host is 5: expected a string"),
        ("host", None, "host is None: expected a string"),
        ("unix", 5, "unix is 5: expected a string with a path"),
        ("access_log", 1, "access_log is 1: expected true or false"),
        ("access_log", "no", "access_log is 'no': expected true or false"),
        ("ping_seconds", "20", "ping_seconds is '20': expected a number"),
        ("max_connections", "5", "max_connections is '5': expected a whole number"),
        ("allowed_origins", "*", "allowed_origins is '*': expected a list of strings"),
        ("allowed_origins", (1,), "allowed_origins is (1,): expected a list of strings"),
        ("api_key", 12345, "api_key is int: expected a string"),
        ("first_fd", "now", "first_fd is 'now': expected a whole number or \"clock\""),
        ("topics", {"retain": True}, "topics is {'retain': True}: expected a TopicRules"),
        ("topics", None, "topics is None: expected a TopicRules"),
        ("tokens", "secret", "tokens is 'secret': expected a TokenRules"),
        ("namespaces", {"a": {}}, "namespaces is {'a': {}}: expected a TopicRules for each name"),
        ("patterns", ("a.*",), "patterns is ('a.*',): expected a list, of TopicPattern"),
        ("host", "a..b", "host is 'a..b': must be a name or an address"),
        ("backlog", 0, "backlog is 0: must be at least 1"),
        ("max_connections", 0, "max_connections is 0: must be at least 1"),
        ("open_seconds", 0, "open_seconds is 0.0: must be more than 0"),
        ("ping_seconds", float("nan"), "ping_seconds is nan: must be more than 0"),
        ("drain_seconds", -0.5, "drain_seconds is -0.5: must be at least 0"),
        ("websocket_paths", ("ws",), "websocket_paths holds 'ws': must start with \"/\""),
        ("allowed_origins", ("example.com",), "allowed_origins holds 'example.com': must be like"),
        ("allowed_origins", ("https://a.b/c",), "allowed_origins holds 'https://a.b/c'"),
        ("log_format", "xml", 'log_format is \'xml\': expected "console" or "json" or "article"'),
        ("tls_cert", Path("a.pem"), "tls_cert is 'a.pem' but tls_key is not set"),
        ("tls_key", Path("a.key"), "tls_key is 'a.key' but tls_cert is not set"),
        ("max_memory_bytes", 0, "max_memory_bytes is 0: must be at least 1"),
        ("connection_bytes", 2**20, "connection_bytes is 1048576: must be at least 4456448, as an"),
    ],
)
def test_a_wrong_value_is_refused_by_field_and_value(
    field: str, value: object, message: str
) -> None:
    with pytest.raises(ValueError) as raised:
        attrs.evolve(Config(), **{field: value})  # type: ignore[arg-type]
    assert str(raised.value).startswith(message)


def test_a_config_that_a_program_makes_has_the_values_of_one_from_a_file() -> None:
    made: dict[str, Any] = {
        "unix": "/run/broker.sock",
        "drain_seconds": 3,
        "allowed_origins": ["*"],
        "patterns": [TopicPattern("a.*", TopicRules())],
    }
    config = Config(**made)
    assert config.unix == Path("/run/broker.sock")
    assert (config.drain_seconds, type(config.drain_seconds)) == (3.0, float)
    assert config.allowed_origins == ("*",)
    assert config.patterns == (TopicPattern("a.*", TopicRules()),)
    assert attrs.evolve(config) == config


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopicRules(presence=1), "presence is 1: expected true or false"),  # type: ignore[arg-type]
        (lambda: TokenRules(hmac_secret=b"x"), "hmac_secret is bytes: expected a string"),  # type: ignore[arg-type]
        (lambda: TopicPattern("a.*", {}), "rules is {}: expected a TopicRules"),  # type: ignore[arg-type]
        (lambda: WebhookRules(url=3), "url is 3: expected a string"),  # type: ignore[arg-type]
    ],
)
def test_the_tables_of_a_config_are_checked_as_it_is(make: Any, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        make()
    assert str(raised.value) == message


def test_the_edges_of_the_ranges_are_in() -> None:
    config = Config(
        port=0,
        max_connections=None,
        ping_seconds=float("inf"),
        drain_seconds=0,
        allowed_origins=("*", "null", "http://localhost:8000"),
        topics=TopicRules(history_size=0),
    )
    assert config.port == config.topics.history_size == 0


@pytest.mark.parametrize(
    "host, expected",
    [
        ("localhost", True),
        ("LocalHost.", True),
        ("app.localhost", True),
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("[::1]", True),
        ("0.0.0.0", False),
        ("::", False),
        ("", False),
        ("192.168.1.2", False),
        ("example.com", False),
        ("localhost.example.com", False),
    ],
)
def test_loopback_is_told_from_the_open_network(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_only_an_open_bind_without_origins_or_tokens_is_warned_about() -> None:
    warning = exposure_warning(Config(host="0.0.0.0", port=9502))
    assert warning is not None
    assert "'0.0.0.0'" in warning
    assert "9502" in warning
    assert "\n" not in warning
    # --host does nothing for a socket that systemd opened, and makes a container deaf.
    assert "or where systemd or a container opens the port" in warning
    assert exposure_warning(Config()) is None
    assert exposure_warning(Config(host="0.0.0.0", allowed_origins=("https://a.b",))) is None
    assert exposure_warning(Config(host="0.0.0.0", unix=Path("/run/b.sock"))) is None


def test_tokens_that_are_needed_make_an_open_bind_safe() -> None:
    needed = TokenRules(hmac_secret="secret")
    assert exposure_warning(Config(host="0.0.0.0", tokens=needed)) is None
    optional = TokenRules(hmac_secret="secret", allow_anonymous=True)
    warning = exposure_warning(Config(host="0.0.0.0", tokens=optional))
    assert warning is not None
    assert "[tokens]" in warning


@pytest.mark.parametrize(
    "field, value",
    [
        ("hmac_secret", "secret"),
        ("hmac_secret_file", Path("/run/secret")),
        ("public_keys", ("a.pem",)),
        ("jwks_url", "https://a.b"),
    ],
)
def test_any_key_makes_tokens_count(field: str, value: object) -> None:
    assert not TokenRules().configured
    assert TokenRules().anonymous_allowed
    rules = attrs.evolve(TokenRules(), **{field: value})  # type: ignore[arg-type]
    assert rules.configured
    assert not rules.anonymous_allowed
    assert attrs.evolve(rules, allow_anonymous=True).anonymous_allowed
    assert not attrs.evolve(rules, allow_anonymous=False).anonymous_allowed


@pytest.mark.parametrize(
    "rules, message",
    [
        ({"hmac_secret": "a", "hmac_secret_file": "b"}, "are both set"),
        ({"allow_anonymous": False}, "there is no key to verify a token with"),
    ],
)
def test_token_rules_that_contradict_each_other_are_refused(
    rules: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load(None, {"tokens": rules}, environ={})


def test_a_config_is_told_apart_by_its_values_and_never_changes() -> None:
    assert Config() == Config()
    assert Config(max_topics=5) != Config()
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        Config().max_topics = 5  # type: ignore[misc]


def test_every_setting_that_needs_a_restart_says_why() -> None:
    reasons = [
        field.metadata[NEEDS_RESTART]
        for field in attrs.fields(Config)
        if NEEDS_RESTART in field.metadata
    ]
    assert reasons
    assert all(isinstance(reason, str) and reason for reason in reasons)


@pytest.mark.parametrize("who", ["all", "users", "none", "subscribers"])
def test_only_a_subscriber_can_be_asked_whether_it_is_one(who: str) -> None:
    rules: dict[str, Any] = {"may_publish": who}
    assert TopicRules(**rules).may_publish == who
    subscribing: dict[str, Any] = {"may_subscribe": who}
    if who == "subscribers":
        with pytest.raises(ValueError, match="may_subscribe"):
            TopicRules(**subscribing)
    else:
        assert TopicRules(**subscribing).may_subscribe == who


def test_defaults_fit_each_other() -> None:
    config = Config()
    assert config.max_message_bytes >= 1000 * config.max_topics, (
        "one message subscribes to all (ADR 16)"
    )
    assert config.history_reply_bytes >= 4 * config.max_message_bytes
    assert config.byte_burst >= config.max_message_bytes
    # A whole history in base64, with what each publication takes besides.
    most = (config.history_reply_bytes + config.max_message_bytes) * 4 / 3
    assert config.api_reply_bytes >= most + 300 * config.history_max_limit


def test_the_bound_on_a_connection_is_what_the_bounds_on_its_parts_add_up_to() -> None:
    mib = 2**20
    assert Config().connection_most == (3.25 + 4 + 4 + 2) * mib
    fields = {"outbox_bytes": 4 * mib, "max_message_bytes": 2 * mib}
    assert Config(**fields).outbox_most == 9 * mib  # type: ignore[arg-type]
    assert Config(**fields).connection_most == (9 + 4 + 4 + 4) * mib  # type: ignore[arg-type]
    assert Config(connection_bytes=5 * mib).connection_most == 5 * mib
    assert Config(inbox_batches=16).inbox_bytes == mib
