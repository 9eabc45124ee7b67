"""Settings that are right and do nothing, or less than was meant."""

from pathlib import Path

import pytest
import structlog
from trio.testing import MockClock

from broker import Broker, Config
from broker.config.loading import load_with_sources
from broker.config.settings import TokenRules
from broker.testing import open_test_broker
from tests.conftest import HMAC_SECRET

SECRET = "whsec_" + "c2VjcmV0" * 4


def doubts(tmp_path: Path, file: str = "", **environ: str) -> list[str]:
    path = tmp_path / "b.toml"
    path.write_text(file)
    found = load_with_sources(path, {}, environ=environ).doubts
    return [each.replace(f"{path}: ", "FILE: ") for each in found]


@pytest.mark.parametrize(
    "file, begins",
    [
        ('unix = "/run/b"\nport = 1', ["FILE: port counts for nothing beside unix"]),
        ('unix = "/run/b"\nhost = "::"', ["FILE: host counts for nothing beside unix"]),
        ('unix_mode = "0660"', ["FILE: unix_mode counts for nothing without unix"]),
        ('unix_group = "a"', ["FILE: unix_group counts for nothing without unix"]),
        (f'[webhooks]\nsecret = "{SECRET}"', ["FILE: webhooks.secret signs nothing"]),
        ('api_listen = "localhost:1"', ["FILE: api_listen serves nothing but the health"]),
        ('api_key = "s3cret"', ["api_key has 6 characters and can be guessed"]),
        ('metrics_key = "s3cret"', ["metrics_key has 6 characters"]),
        ('admin_key = "s3cret"', ["admin_key has 6 characters"]),
        ('admin_view_key = "s3cret"', ["admin_view_key has 6 characters"]),
        ('[tokens]\nhmac_secret = "secret"', ["tokens.hmac_secret has 6 bytes"]),
        (f'[tokens]\nhmac_secret = "{31 * "k"}"', ["tokens.hmac_secret has 31 bytes"]),
        (f'[tokens]\nhmac_secret = "{32 * "k"}"', []),
    ],
)
def test_each_is_one_line_that_names_the_place_and_no_secret(
    tmp_path: Path, file: str, begins: list[str]
) -> None:
    found = doubts(tmp_path, file)
    assert len(found) == len(begins)
    assert all(line.startswith(begin) for line, begin in zip(found, begins, strict=True))
    assert not any("s3cret" in line or "\n" in line for line in found)


@pytest.mark.parametrize(
    "content, begins",
    [
        (b"secret\n", ["tokens.hmac_secret_file has 6 bytes"]),
        (HMAC_SECRET.encode() + b"\r\n", []),
        (b"", []),  # an error of whoever loads it
        (None, []),
    ],
)
def test_a_secret_in_a_file_of_its_own_is_looked_at_as_well(
    tmp_path: Path, content: bytes | None, begins: list[str]
) -> None:
    secret = tmp_path / "secret"
    if content is not None:
        secret.write_bytes(content)
    found = doubts(tmp_path, f'[tokens]\nhmac_secret_file = "{secret}"')
    assert [line[: len(begin)] for line, begin in zip(found, begins, strict=True)] == begins


@pytest.mark.parametrize(
    "file",
    [
        "",
        'unix = "/run/b"\nunix_mode = "0660"\nunix_group = "a"',
        f'[webhooks]\nsecret = "{SECRET}"\nrpc_url = "http://localhost"',
        'api_listen = "localhost:1"\nmetrics_key = "0123456789abcdef"',
        'api_key = "0123456789abcdef"\nadmin_key = "fedcba9876543210"',
        f'[tokens]\nhmac_secret = "{HMAC_SECRET}"',
        f'[tokens]\nhmac_secret = "{"é" * 16}"',
    ],
)
def test_of_what_counts_there_is_nothing_to_say(tmp_path: Path, file: str) -> None:
    assert doubts(tmp_path, file) == []


def test_a_layer_that_overrides_another_is_no_doubt(tmp_path: Path) -> None:
    assert doubts(tmp_path, "port = 1", BROKER_UNIX="/run/b") == []
    assert doubts(tmp_path, 'unix = "/run/b"', BROKER_PORT="1") == []
    both = doubts(tmp_path, BROKER_PORT="1", BROKER_UNIX="/run/b")
    assert [line.partition(" counts")[0] for line in both] == ["BROKER_PORT: port"]


async def test_a_program_in_python_is_told_at_start_as_the_command_is(
    autojump_clock: MockClock,
) -> None:
    with structlog.testing.capture_logs() as logs:
        async with open_test_broker(Broker(Config(tokens=TokenRules(hmac_secret="secret")))):
            pass
    [line] = [entry for entry in logs if entry["event"] == "doubtful_setting"]
    assert line["log_level"] == "warning"
    assert line["detail"].startswith("tokens.hmac_secret has 6 bytes")
