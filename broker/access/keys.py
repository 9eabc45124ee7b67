"""Keys that verify tokens: secrets, PEM files, and the keys of a JSON Web Key Set (RFC 7517)."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs
import jwt
import msgspec
from jwt.algorithms import HMACAlgorithm, get_default_algorithms, has_crypto
from msgspec import Struct

from broker.config.settings import TokenRules
from broker.errors import ConfigError

if TYPE_CHECKING:
    from jwt.algorithms import AllowedPublicKeys

HMAC: Final = frozenset({"HS256", "HS384", "HS512"})
RSA: Final = frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"})
CURVES: Final = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}
EDDSA: Final = frozenset({"EdDSA"})
ALGORITHMS: Final = HMAC | RSA | set(CURVES.values()) | EDDSA

MIN_RSA_BITS: Final = 2048
"""RFC 7518 section 3.3."""

NEEDS_CRYPTO: Final = "needs the package `cryptography`: pip install '.[tokens]'"


class _PreparedHmac(HMACAlgorithm):
    """HMAC with a secret that was checked when it was loaded, not once more for each token."""

    def prepare_key(self, key: str | bytes) -> bytes:
        return key if isinstance(key, bytes) else key.encode()

    def check_key_length(self, key: object) -> str | None:
        return None


def _make_jws() -> jwt.PyJWS:
    jws = jwt.PyJWS(algorithms=sorted(ALGORITHMS & get_default_algorithms().keys()))
    for name in HMAC:
        made = getattr(HMACAlgorithm, f"SHA{name[2:]}")
        jws.unregister_algorithm(name)
        jws.register_algorithm(name, _PreparedHmac(made))
    return jws


JWS: Final = _make_jws()


# keys


@attrs.frozen
class Key:
    """Something that verifies signatures, and the algorithms that it verifies."""

    algorithms: frozenset[str]
    material: "AllowedPublicKeys | bytes" = attrs.field(repr=False)


def load_keys(rules: TokenRules) -> tuple[Key, ...]:
    """The keys that the settings hold, read from their files.

    Raises `ConfigError` for a file that is not there, or holds no such key.
    """
    keys = []
    secret = load_secret(rules)
    if secret:
        keys.append(secret_key(secret))
    keys += [_load_public_key(path) for path in rules.public_keys]
    if rules.jwks_url and not has_crypto:
        raise ConfigError(f"tokens.jwks_url {NEEDS_CRYPTO}")
    return tuple(keys)


def load_secret(rules: TokenRules) -> bytes:
    """The HMAC secret of the settings; empty if there is none. Raises `ConfigError`."""
    if rules.hmac_secret_file is None:
        return rules.hmac_secret.encode()
    secret = _read(rules.hmac_secret_file, "tokens.hmac_secret_file").rstrip(b"\r\n")
    if not secret:
        raise ConfigError(f"tokens.hmac_secret_file: {rules.hmac_secret_file} is empty")
    return secret


def secret_key(secret: bytes) -> Key:
    """An HMAC key. Raises `ConfigError` for a secret that is a public key or certificate."""
    try:
        HMACAlgorithm(HMACAlgorithm.SHA256).prepare_key(secret)
    except jwt.InvalidKeyError:
        raise ConfigError(
            "tokens.hmac_secret is a public key, which is no secret: name its PEM file in "
            "tokens.public_keys"
        ) from None
    return Key(HMAC, secret)


def _load_public_key(path: str) -> Key:
    source = f"tokens.public_keys: {path}"
    pem = _read(Path(path), "tokens.public_keys")
    if not has_crypto:
        raise ConfigError(f"{source}: {NEEDS_CRYPTO}")
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        return public_key(load_pem_public_key(pem))
    except ValueError as error:
        reason = str(error) if isinstance(error, UnfitKey) else "not a public key in PEM"
        raise ConfigError(f"{source}: {reason}") from None


def _read(path: Path, source: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{source}: cannot read {path}: {error.strerror}") from None


class UnfitKey(ValueError):
    """A key that no algorithm of ours takes."""


def public_key(material: object) -> Key:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.asymmetric.ed448 import Ed448PublicKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

    match material:
        case RSAPublicKey():
            if material.key_size < MIN_RSA_BITS:
                raise UnfitKey(f"an RSA key has at least {MIN_RSA_BITS} bits")
            return Key(RSA, material)
        case EllipticCurvePublicKey():
            if material.curve.name not in CURVES:
                raise UnfitKey(f"curve {material.curve.name}: take one of {', '.join(CURVES)}")
            return Key(frozenset({CURVES[material.curve.name]}), material)
        case Ed25519PublicKey() | Ed448PublicKey():
            return Key(EDDSA, material)
    raise UnfitKey("take an RSA, EC, Ed25519 or Ed448 key")


def keys_of_jwks(text: bytes) -> dict[str, Key]:
    """The keys of a JSON Web Key Set by `kid` (RFC 7517 section 5).

    Keys that we cannot use are left out, as the RFC asks: keys without `kid`, keys to encrypt with, keys
    of other kinds. So is a symmetric key: one that everybody can fetch is no secret.
    Raises `ValueError` for a document that is no key set.
    """
    try:
        entries = msgspec.json.decode(text, type=_KeySet).keys
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(f"not a JSON Web Key Set: {error}") from None
    keys: dict[str, Key] = {}
    for entry in entries:
        kid = entry.get("kid")
        if (
            not isinstance(kid, str)
            or entry.get("use", "sig") != "sig"
            or entry.get("kty") == "oct"
        ):
            continue
        try:
            # The algorithm is only asked for to parse the key; which it fits is decided here.
            key = public_key(jwt.PyJWK.from_dict({**entry}, _any_algorithm(entry)).key)
            if entry.get("alg") is not None:
                key = attrs.evolve(key, algorithms=key.algorithms & {entry["alg"]})
        except (jwt.PyJWTError, ValueError, TypeError, KeyError, AttributeError):
            continue
        if key.algorithms:
            keys[kid] = key
    return keys


class _KeySet(Struct):
    keys: list[dict[str, Any]]


def _any_algorithm(entry: Mapping[str, object]) -> str | None:
    """One that parses keys of this kind; None leaves the choice to the curve."""
    return {"RSA": "RS256", "OKP": "EdDSA"}.get(str(entry.get("kty")))
