"""Tokens that are made here are verified by PyJWT, and by nothing else than the key they are for."""

from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)

from broker.access.minting import algorithm_of, mint
from broker.errors import ConfigError
from tests.conftest import HMAC_SECRET

RSA = rsa.generate_private_key(65537, 2048)
KEYS: dict[str, Any] = {
    "RS256": RSA,
    "ES256": ec.generate_private_key(ec.SECP256R1()),
    "ES384": ec.generate_private_key(ec.SECP384R1()),
    "ES512": ec.generate_private_key(ec.SECP521R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate(),
}


def pem(private: Any, how: KeySerializationEncryption | None = None) -> bytes:
    encoded = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, how or NoEncryption())
    assert isinstance(encoded, bytes)
    return encoded


@pytest.mark.parametrize("algorithm", KEYS)
def test_a_private_key_signs_with_what_it_fits(algorithm: str) -> None:
    private = KEYS[algorithm]
    assert algorithm_of(pem(private)) == algorithm
    token = mint({"sub": "ann", "n": 1}, pem(private), algorithm)
    assert jwt.decode(token, private.public_key(), [algorithm]) == {"sub": "ann", "n": 1}
    assert jwt.get_unverified_header(token) == {"alg": algorithm, "typ": "JWT"}


@pytest.mark.parametrize("algorithm", ["HS256", "HS384", "HS512"])
def test_a_secret_signs_with_every_hmac(algorithm: str) -> None:
    # As long as the strictest of them asks for.
    secret = HMAC_SECRET * 2
    token = mint({"sub": "客户端"}, secret.encode(), algorithm)
    assert jwt.decode(token, secret, [algorithm]) == {"sub": "客户端"}


def test_a_token_names_its_key() -> None:
    token = mint({}, HMAC_SECRET.encode(), "HS256", kid="2024")
    assert jwt.get_unverified_header(token)["kid"] == "2024"
    assert "kid" not in jwt.get_unverified_header(mint({}, HMAC_SECRET.encode(), "HS256"))


def test_ed448_signs_as_eddsa() -> None:
    assert algorithm_of(pem(ed448.Ed448PrivateKey.generate())) == "EdDSA"


@pytest.mark.parametrize(
    "key, reason",
    [
        (b"", "not a private key in PEM"),
        (b"s3cret", "not a private key in PEM"),
        (pem(RSA, BestAvailableEncryption(b"pass")), "not a private key in PEM"),
        (pem(rsa.generate_private_key(65537, 1024)), "an RSA key has at least 2048 bits"),
        (pem(ec.generate_private_key(ec.SECP256K1())), "curve secp256k1: take one of "),
        (pem(dsa.generate_private_key(1024)), "take an RSA, EC, Ed25519 or Ed448 key"),
    ],
)
def test_a_key_that_signs_nothing_is_refused_with_the_reason(key: bytes, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        algorithm_of(key)


@pytest.mark.parametrize(
    "key, algorithm",
    [
        (b"no key", "RS256"),
        (pem(KEYS["ES256"]), "RS256"),
        (pem(RSA), "ES256"),
        (pem(RSA), "EdDSA"),
        (HMAC_SECRET.encode(), "ES256"),
    ],
)
def test_a_key_that_does_not_fit_its_algorithm_is_refused(key: bytes, algorithm: str) -> None:
    with pytest.raises(ConfigError, match=f"the key does not fit {algorithm}: "):
        mint({}, key, algorithm)
