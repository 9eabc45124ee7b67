"""`python -m broker token`: what it prints, and the exit status."""

import json
import os
import re
from pathlib import Path
from typing import Any

import jwt
import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from broker.cli.main import main
from tests.conftest import HMAC_SECRET

# The command sets up the log of its process, which is that of all tests here.
pytestmark = pytest.mark.usefixtures("logging_restored")


def run(*arguments: str, secret: str | None = HMAC_SECRET) -> Result:
    env = {name: None for name in os.environ if name.startswith("BROKER_")}
    return CliRunner().invoke(
        main, ["token", *arguments], env={**env, "BROKER_TOKENS_HMAC_SECRET": secret or ""}
    )


def created(*options: str, secret: str | None = HMAC_SECRET) -> str:
    result = run("create", *options, secret=secret)
    assert result.exit_code == 0, result.output
    return result.stdout.strip()


def claims_of(token: str) -> dict[str, Any]:
    return jwt.decode(token, options={"verify_signature": False})


def mistake(*arguments: str, secret: str | None = HMAC_SECRET) -> str:
    """The last line on stderr of a call that is wrong."""
    result = run(*arguments, secret=secret)
    assert result.exit_code == 2
    assert result.stdout == ""
    return result.stderr.splitlines()[-1]


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """A private key and a config file that names the public one."""
    private = ec.generate_private_key(ec.SECP384R1())
    path, public, config = tmp_path / "private.pem", tmp_path / "public.pem", tmp_path / "b.toml"
    path.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(
        private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    config.write_text(f'[tokens]\npublic_keys = ["{public}"]\naudience = "us"\nissuer = "ours"\n')
    return path, config


def test_a_created_token_has_the_claims_that_were_asked_for() -> None:
    token = created(
        *("--user", "alice", "--info", '{"a":1}', "--meta", "[2]", "--expires", "15m"),
        *("--subscribe", "news", "--subscribe", "chat"),
    )
    claims = claims_of(token)
    assert claims.pop("exp") - claims.pop("iat") == 900
    assert claims == {
        "sub": "alice", "info": {"a": 1}, "meta": [2], "channels": ["news", "chat"]
    }  # fmt: skip
    assert json.loads(run("check", token).stdout) == claims_of(token)


@pytest.mark.parametrize(
    "text, seconds",
    [("90", 90), ("90s", 90), ("1.5m", 90), ("1h", 3600), ("7d", 604_800), ("never", None)],
)
def test_how_long_it_is_good_for(text: str, seconds: int | None) -> None:
    claims = claims_of(created("--expires", text))
    assert ("exp" in claims) is (seconds is not None)
    if seconds is not None:
        assert claims["exp"] - claims["iat"] == seconds


def test_a_subscription_token_is_created_and_checked() -> None:
    token = created("--user", "alice", "--topic", "$room")
    assert claims_of(token)["channel"] == "$room"
    result = run("check", token)
    assert result.exit_code == 0
    assert json.loads(result.stdout)["channel"] == "$room"


def test_a_private_key_signs_and_the_settings_verify(keys: tuple[Path, Path]) -> None:
    private, config = keys
    options = ["--key", str(private), "--config", str(config), "--kid", "1"]
    token = created(*options, secret=None)
    assert jwt.get_unverified_header(token) == {"alg": "ES384", "typ": "JWT", "kid": "1"}
    assert claims_of(token)["aud"] == "us"
    assert claims_of(token)["iss"] == "ours"
    assert run("check", "--config", str(config), token, secret=None).exit_code == 0


@pytest.mark.parametrize(
    "token, reason",
    [
        (lambda: created(secret="another secret of good length...."), "no key verifies its HS256"),
        (lambda: created("--expires", "0s").replace(".", "..", 1), "no header"),
        (lambda: created("--algorithm", "HS512")[:-6], "no key verifies its HS512 signature"),
        (lambda: jwt.encode({"exp": 1}, HMAC_SECRET), "expired"),
        (lambda: jwt.encode({}, "", "none"), "algorithm 'none'"),
        (lambda: "x" * 9000, "longer than 8192 bytes"),
    ],
)
def test_a_token_that_the_broker_would_refuse_is_refused_with_the_reason(
    token: Any, reason: str
) -> None:
    result = run("check", token())
    assert result.exit_code == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: the token is refused: ")
    assert reason in line


def test_mistakes_are_one_line_that_names_the_way_out(
    keys: tuple[Path, Path], tmp_path: Path
) -> None:
    private, _ = keys
    assert "no key to sign with: set BROKER_TOKENS_HMAC_SECRET" in mistake("create", secret=None)
    assert "no key to verify with: set BROKER_TOKENS_HMAC_SECRET" in mistake(
        "check", "x", secret=None
    )
    assert "'{' is not JSON" in mistake("create", "--info", "{")
    assert "'1y' is not like 90s" in mistake("create", "--expires", "1y")
    assert "leave out --topic" in mistake("create", "--topic", "a", "--subscribe", "b")
    assert "No such file" in mistake("create", "--key", str(tmp_path / "none.pem"))
    assert "No such file" in mistake("create", "--config", str(tmp_path / "none.toml"))
    assert "does not fit RS256" in mistake("create", "--key", str(private), "--algorithm", "RS256")
    assert "RS256 signs with a private key" in mistake("create", "--algorithm", "RS256")
    public = private.with_name("public.pem")
    line = mistake("create", "--key", str(public))
    assert line == f"Error: {public}: not a private key in PEM"


def test_no_option_takes_a_secret() -> None:
    """Every user of a machine can read what stands on its command lines."""
    assert not re.search("--[a-z-]*secret", run("create", "--help").output)


def test_rsa_signs_with_rs256_unless_told_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "private.pem"
    path.write_bytes(
        rsa.generate_private_key(65537, 2048).private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
        )
    )
    for options, algorithm in (([], "RS256"), (["--algorithm", "PS512"], "PS512")):
        token = created("--key", str(path), *options)
        assert jwt.get_unverified_header(token)["alg"] == algorithm
