"""Keys by where they come from: the settings, PEM files, and the key set of an issuer."""

import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from broker.access.keys import (
    EDDSA,
    HMAC,
    RSA,
    UnfitKey,
    keys_of_jwks,
    load_keys,
    load_secret,
    public_key,
    secret_key,
)
from broker.config.settings import TokenRules
from broker.errors import ConfigError
from tests.conftest import HMAC_SECRET

RSA_KEY = rsa.generate_private_key(65537, 2048).public_key()
EC_KEY = ec.generate_private_key(ec.SECP256R1()).public_key()
ED_KEY = ed25519.Ed25519PrivateKey.generate().public_key()


def pem(public: Any) -> bytes:
    encoded = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    assert isinstance(encoded, bytes)
    return encoded


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


# the settings


def test_without_settings_there_is_no_key() -> None:
    assert load_keys(TokenRules()) == ()
    assert load_secret(TokenRules()) == b""


def test_all_keys_of_the_settings_count_the_secret_first(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{n}.pem", pem(key)) for n, key in enumerate((RSA_KEY, EC_KEY))]
    rules = TokenRules(hmac_secret=HMAC_SECRET, public_keys=tuple(map(str, files)))
    assert [key.algorithms for key in load_keys(rules)] == [HMAC, RSA, {"ES256"}]


@pytest.mark.parametrize(
    "written, secret",
    [(b"s3cret\n", b"s3cret"), (b"s3cret\r\n", b"s3cret"), (b" s3cret ", b" s3cret ")],
)
def test_a_secret_of_a_file_has_no_line_end(tmp_path: Path, written: bytes, secret: bytes) -> None:
    rules = TokenRules(hmac_secret_file=write(tmp_path / "secret", written))
    assert load_secret(rules) == secret


@pytest.mark.parametrize("written", [b"", b"\n", None])
def test_a_secret_file_that_holds_none_is_named(tmp_path: Path, written: bytes | None) -> None:
    path = tmp_path / "secret"
    if written is not None:
        path.write_bytes(written)
    with pytest.raises(ConfigError, match=r"^tokens\.hmac_secret_file: .*secret"):
        load_secret(TokenRules(hmac_secret_file=path))


@pytest.mark.parametrize(
    "written", [b"", b"no key", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"]
)
def test_a_file_that_holds_no_public_key_is_named(tmp_path: Path, written: bytes) -> None:
    path = write(tmp_path / "key.pem", written)
    with pytest.raises(ConfigError, match=r"^tokens\.public_keys: .*key\.pem: not a public key in"):
        load_keys(TokenRules(public_keys=(str(path),)))


@pytest.mark.parametrize(
    "public, reason",
    [
        (rsa.generate_private_key(65537, 1024).public_key(), "at least 2048 bits"),
        (dsa.generate_private_key(1024).public_key(), "take an RSA, EC"),
        (ec.generate_private_key(ec.SECP256K1()).public_key(), "curve secp256k1: take one of"),
    ],
)
def test_a_key_that_no_algorithm_takes_says_why(tmp_path: Path, public: Any, reason: str) -> None:
    path = write(tmp_path / "key.pem", pem(public))
    with pytest.raises(ConfigError, match=f"^tokens.public_keys: .*{reason}"):
        load_keys(TokenRules(public_keys=(str(path),)))


def test_a_public_key_in_place_of_a_secret_is_refused() -> None:
    with pytest.raises(ConfigError, match="is a public key, which is no secret"):
        secret_key(pem(RSA_KEY))


@pytest.mark.parametrize(
    "public, algorithms",
    [
        (RSA_KEY, RSA),
        (EC_KEY, {"ES256"}),
        (ec.generate_private_key(ec.SECP384R1()).public_key(), {"ES384"}),
        (ec.generate_private_key(ec.SECP521R1()).public_key(), {"ES512"}),
        (ED_KEY, EDDSA),
        (ed448.Ed448PrivateKey.generate().public_key(), EDDSA),
    ],
)
def test_a_public_key_verifies_what_it_fits(public: Any, algorithms: set[str]) -> None:
    assert public_key(public).algorithms == algorithms


def test_another_object_is_no_public_key() -> None:
    with pytest.raises(UnfitKey):
        public_key(b"secret")


def test_a_key_does_not_show_itself() -> None:
    assert HMAC_SECRET not in repr(secret_key(HMAC_SECRET.encode()))


# key sets


def jwk(public: Any, **fields: object) -> dict[str, object]:
    for algorithm in (RSAAlgorithm, ECAlgorithm, OKPAlgorithm):
        try:
            return {**algorithm.to_jwk(public, as_dict=True), **fields}
        except Exception:  # noqa: BLE001 - each of them says otherwise that it is not its own
            continue
    raise AssertionError("no JSON Web Key")


def key_set(*entries: object) -> bytes:
    return json.dumps({"keys": entries}).encode()


def test_keys_of_a_set_are_found_by_their_names() -> None:
    keys = keys_of_jwks(key_set(jwk(RSA_KEY, kid="1"), jwk(EC_KEY, kid="2"), jwk(ED_KEY, kid="3")))
    assert {kid: key.algorithms for kid, key in keys.items()} == {
        "1": RSA,
        "2": {"ES256"},
        "3": EDDSA,
    }


@pytest.mark.parametrize(
    "alg, algorithms", [("RS256", {"RS256"}), ("PS512", {"PS512"}), ("ES256", None), (5, None)]
)
def test_a_key_that_names_an_algorithm_verifies_no_other(
    alg: object, algorithms: set[str] | None
) -> None:
    keys = keys_of_jwks(key_set(jwk(RSA_KEY, kid="1", alg=alg)))
    assert (keys["1"].algorithms if keys else None) == algorithms


@pytest.mark.parametrize(
    "entry",
    [
        {},
        jwk(RSA_KEY),  # no name
        jwk(RSA_KEY, kid=1),
        jwk(RSA_KEY, kid="1", use="enc"),
        {"kty": "oct", "k": "c2VjcmV0", "kid": "1"},  # everybody can fetch it
        {"kty": "RSA", "n": "AQAB", "e": "AQAB", "kid": "1"},
        {"kty": "RSA", "kid": "1"},
        {"kty": "none", "kid": "1"},
        {"kty": ["RSA"], "kid": "1"},
        {**jwk(EC_KEY), "x": "!", "kid": "1"},
    ],
)
def test_of_a_set_what_cannot_be_used_is_left_out(entry: dict[str, object]) -> None:
    assert list(keys_of_jwks(key_set(entry, jwk(ED_KEY, kid="good")))) == ["good"]


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{}", b'{"keys":1}', b'{"keys":[1]}', b"\xff", b"[" * 10_000]
)
def test_a_document_that_is_no_key_set_is_said_to_be_none(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"^not a JSON Web Key Set: "):
        keys_of_jwks(text)
