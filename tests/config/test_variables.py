"""Variables that begin as ours do and are none."""

from pathlib import Path

import pytest

from broker.config.loading import load, load_with_sources
from broker.errors import ConfigError

LOOKS = "; did you mean {}? A secret that does not count would leave the broker open"


def told(**environ: str) -> list[str]:
    return [str(each) for each in load_with_sources(None, {}, environ=environ).unknown]


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("BROKER_PROT", "BROKER_PORT"),
        ("BROKER_MAX_CONNECTION", "BROKER_MAX_CONNECTIONS"),
        ("BROKER_HISTORY_SIZE", "BROKER_TOPICS_HISTORY_SIZE"),
        ("BROKER_TOPIC_HISTORY_SIZE", "BROKER_TOPICS_HISTORY_SIZE"),
        ("BROKER_WEBHOOK_URL", "BROKER_WEBHOOKS_URL"),
        ("BROKER_LOGLEVEL", "BROKER_LOG_LEVEL"),
    ],
)
def test_an_unknown_variable_is_named_with_the_nearest_right_one(name: str, nearest: str) -> None:
    assert told(**{name: "1"}) == [f"{name}: there is no such setting; did you mean {nearest}?"]


def test_one_that_is_near_nothing_is_named_all_the_same() -> None:
    assert told(BROKER_XYZZY="1", BROKER_PORT="1") == [
        "BROKER_XYZZY: there is no such setting; the settings page lists them"
    ]


def test_the_file_is_named_by_an_option() -> None:
    assert told(BROKER_CONFIG="broker.toml") == [
        "BROKER_CONFIG: there is no such setting; the option --config names the file"
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("BROKER_SERVICE_HOST", "10.0.0.1"),
        ("BROKER_SERVICE_PORT", "9501"),
        ("BROKER_SERVICE_PORT_HTTP", "9501"),
        ("BROKER_PORT_9501_TCP", "tcp://10.0.0.1:9501"),
        ("BROKER_PORT_9501_TCP_PROTO", "tcp"),
        ("BROKER_PORT_9501_TCP_PORT", "9501"),
        ("BROKER_PORT_9501_TCP_ADDR", "10.0.0.1"),
        ("BROKER_PORT_53_UDP", "udp://10.0.0.1:53"),
        ("BROKER_API_SERVICE_HOST", "10.0.0.1"),
        ("BROKER_API_PORT", "tcp://10.0.0.1:80"),
        ("BROKER_TOKEN_SERVER_SERVICE_HOST", "10.0.0.1"),
        ("BROKER_URL", "ws://localhost:9501"),
        ("BROKER_TOKEN", "eyJ"),
        ("BROKER_CA", "ca.pem"),
        ("BROKER_PROT", ""),
        ("MY_BROKER_PROT", "1"),
        ("BROKER_PORT", "1"),
    ],
)
def test_what_is_nobodys_slip_is_not_named(name: str, value: str) -> None:
    assert told(**{name: value}) == []


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("BROKER_HMAC_SECRET", "BROKER_TOKENS_HMAC_SECRET"),
        ("BROKER_TOKEN_HMAC_SECRET", "BROKER_TOKENS_HMAC_SECRET"),
        ("BROKER_TOKENS_HMACSECRET", "BROKER_TOKENS_HMAC_SECRET"),
        ("BROKER_APIKEY", "BROKER_API_KEY"),
        ("BROKER_API_KYE", "BROKER_API_KEY"),
        ("BROKER_WEBHOOK_SECRET", "BROKER_WEBHOOKS_SECRET"),
    ],
)
def test_one_that_looks_like_a_secret_is_an_error(name: str, nearest: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load(None, {}, environ={name: "s3cret"})
    assert str(raised.value) == f"{name}: there is no such setting" + LOOKS.format(nearest)
    assert "s3cret" not in str(raised.value)


def test_a_password_that_is_near_nothing_is_an_error_too() -> None:
    with pytest.raises(ConfigError, match="BROKER_ADMIN_PASSWORD: there is no such setting"):
        load(None, {}, environ={"BROKER_ADMIN_PASSWORD": "x"})


def test_a_secret_is_never_taken_for_another_kind_of_setting() -> None:
    with pytest.raises(
        ConfigError, match=r"there is no such setting; the settings page lists them\. A secret"
    ):
        load(None, {}, environ={"BROKER_PASSWORD": "x"})  # not BROKER_PORT, which is near


def test_a_file_has_no_part_in_it(tmp_path: Path) -> None:
    file = tmp_path / "broker.toml"
    file.write_text("port = 1")
    loaded = load_with_sources(file, {}, environ={"BROKER_PROT": "2"})
    assert loaded.config.port == 1
    assert [each.name for each in loaded.unknown] == ["BROKER_PROT"]
