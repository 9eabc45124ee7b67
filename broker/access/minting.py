"""Tokens that are made here: for the command line, tests, and backends in Python."""

from collections.abc import Mapping

import jwt
import msgspec
from jwt.algorithms import has_crypto

from broker.access.keys import JWS, NEEDS_CRYPTO, RSA, UnfitKey, public_key
from broker.errors import ConfigError

# minting


def algorithm_of(private_key: bytes) -> str:
    """The algorithm of a private key in PEM, unless another is named. Raises `ConfigError`."""
    if not has_crypto:
        raise ConfigError(f"a private key {NEEDS_CRYPTO}")
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        algorithms = public_key(load_pem_private_key(private_key, None).public_key()).algorithms
    except (ValueError, TypeError) as error:  # TypeError: it has a passphrase
        reason = str(error) if isinstance(error, UnfitKey) else "not a private key in PEM"
        raise ConfigError(reason) from None
    return "RS256" if algorithms == RSA else min(algorithms)


def mint(claims: Mapping[str, object], key: bytes, algorithm: str, kid: str = "") -> str:
    """Sign a token. `key` is the HMAC secret, or a private key in PEM.

    Raises `ConfigError` for a key that does not fit the algorithm.
    """
    payload = msgspec.json.encode(claims)
    try:
        return JWS.encode(payload, key, algorithm, headers={"kid": kid} if kid else None)
    except NotImplementedError:
        raise ConfigError(f"{algorithm} {NEEDS_CRYPTO}") from None
    except (jwt.PyJWTError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"the key does not fit {algorithm}: {error}") from None
