"""JSON Web Tokens: who a client is, and what it may subscribe to (RFC 7515, 7519).

The claims are Centrifugo's, so what mints tokens for Centrifugo mints them for us: a *connection
token* says who connects (`sub`, `info`, `channels`, `subs`, `meta`), a *subscription token* lets one
user subscribe to one `channel`.

Rules:

1. A key fits some algorithms and verifies those alone, so a public key is never taken for an HMAC
   secret, and `none` is nobody's algorithm.
2. Nothing in a token counts before its signature does, except which key it names.
3. Time is an argument. `Tokens` alone waits, and only for a key that has to be fetched.
4. A peer is told that its token is invalid, never why; the log has the reason, never the token.
"""

import base64
import binascii
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import attrs
import jwt
import msgspec
from jwt.algorithms import HMACAlgorithm, get_default_algorithms, has_crypto
from msgspec import Raw, Struct

from .config import TokenRules
from .core.topics import is_pattern
from .errors import ConfigError, KeysUnavailable, TokenExpired, TokenInvalid

HMAC: Final = frozenset({"HS256", "HS384", "HS512"})
RSA: Final = frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"})
CURVES: Final = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}
EDDSA: Final = frozenset({"EdDSA"})
ALGORITHMS: Final = HMAC | RSA | set(CURVES.values()) | EDDSA

MIN_RSA_BITS: Final = 2048
"""RFC 7518 section 3.3."""

MIN_SECRET_BYTES: Final = 32
"""RFC 7518 section 3.2, for HS256. A shorter secret works and is warned about."""

MAX_TTL: Final = 2**32 - 1
"""`ttl` is a uint32 in the protocol."""

NEEDS_CRYPTO: Final = "needs the package `cryptography`: pip install 'trio-broker[tokens]'"


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


_JWS: Final = _make_jws()


# keys


@attrs.frozen
class Key:
    """Something that verifies signatures, and the algorithms that it verifies."""

    algorithms: frozenset[str]
    material: Any = attrs.field(repr=False)


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


def warning(rules: TokenRules) -> str | None:
    """Say in one line what is weak about the settings; None if nothing is."""
    secret = load_secret(rules)
    if secret and len(secret) < MIN_SECRET_BYTES:
        return (
            f"tokens.hmac_secret has {len(secret)} bytes and can be guessed from any one token; "
            f"take {MIN_SECRET_BYTES} random ones: openssl rand -hex 32"
        )
    return None


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
        return _public_key(load_pem_public_key(pem))
    except ValueError as error:
        reason = str(error) if isinstance(error, _UnfitKey) else "not a public key in PEM"
        raise ConfigError(f"{source}: {reason}") from None


def _read(path: Path, source: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{source}: cannot read {path}: {error.strerror}") from None


class _UnfitKey(ValueError):
    """A key that no algorithm of ours takes."""


def _public_key(material: object) -> Key:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.asymmetric.ed448 import Ed448PublicKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

    match material:
        case RSAPublicKey():
            if material.key_size < MIN_RSA_BITS:
                raise _UnfitKey(f"an RSA key has at least {MIN_RSA_BITS} bits")
            return Key(RSA, material)
        case EllipticCurvePublicKey():
            if material.curve.name not in CURVES:
                raise _UnfitKey(f"curve {material.curve.name}: take one of {', '.join(CURVES)}")
            return Key(frozenset({CURVES[material.curve.name]}), material)
        case Ed25519PublicKey() | Ed448PublicKey():
            return Key(EDDSA, material)
    raise _UnfitKey("take an RSA, EC, Ed25519 or Ed448 key")


def keys_of_jwks(text: bytes) -> dict[str, Key]:
    """The keys of a JSON Web Key Set by `kid` (RFC 7517 section 5).

    What we cannot use is left out, as the RFC asks: keys without `kid`, keys to encrypt with, keys
    of other kinds. So is a symmetric key: what everybody can fetch is no secret. Raises
    `ValueError` for what is no key set.
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
            key = _public_key(jwt.PyJWK.from_dict({**entry}, _any_algorithm(entry)).key)
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


# claims


class WrongKind(TokenInvalid):
    """A valid token, but a subscription token where a connection token is due, or the reverse."""


class SubOptions(Struct):
    """What a connection token says of one server-side subscription."""

    info: Raw = Raw(b"")
    b64info: str = ""
    data: Raw = Raw(b"")
    b64data: str = ""


class _Claims(Struct):
    sub: str = ""
    exp: float | None = None
    nbf: float | None = None
    iat: float | None = None
    jti: str = ""
    aud: str | list[str] = []
    iss: str = ""
    info: Raw = Raw(b"")
    b64info: str = ""
    data: Raw = Raw(b"")
    b64data: str = ""
    expire_at: float | None = None
    channel: str = ""
    channels: list[str] = []
    subs: dict[str, SubOptions] = {}
    meta: Raw = Raw(b"")
    # Of Centrifugo before version 4, whose subscription tokens were for one connection.
    client: str = ""


@attrs.frozen
class ServerSub:
    """A topic that a client is subscribed to by its token. `info` and `data` are raw JSON."""

    info: bytes | None = None
    data: bytes | None = None


@attrs.frozen
class ConnectionToken:
    """What a valid connection token says.

    `claims` are all claims as they came, `info` is raw JSON. `expires_at` is when the connection
    does, in Unix seconds; None: never.
    """

    claims: Mapping[str, object]
    user: str
    info: bytes | None
    expires_at: float | None
    subs: Mapping[str, ServerSub]


@attrs.frozen
class SubscriptionToken:
    """What a valid subscription token says. `client` is empty unless it is for one connection."""

    claims: Mapping[str, object]
    user: str
    topic: str
    client: str
    info: bytes | None
    data: bytes | None
    expires_at: float | None


@attrs.frozen
class Header:
    """What a token says of its signature; not to be believed, only to be looked up."""

    algorithm: str
    kid: str


def read_header(token: str, max_bytes: int) -> Header:
    """Raises `TokenInvalid` for what has no header, or one that asks for what we do not know."""
    if len(token) > max_bytes:
        raise TokenInvalid(f"longer than {max_bytes} bytes")
    try:
        header = _JWS.get_unverified_header(token)
    except (jwt.InvalidTokenError, ValueError, RecursionError) as error:
        raise TokenInvalid(f"no header: {error}") from None
    if "crit" in header:  # RFC 7515 section 4.1.11: what is critical must be understood
        raise TokenInvalid("a critical header")
    algorithm, kid = header.get("alg"), header.get("kid", "")
    if not isinstance(algorithm, str) or not isinstance(kid, str) or algorithm not in ALGORITHMS:
        raise TokenInvalid(f"algorithm {algorithm!r}")
    return Header(algorithm, kid)


def read_connection(
    token: str, header: Header, keys: Iterable[Key], rules: TokenRules, now: float
) -> ConnectionToken:
    """Verify a connection token. Raises `TokenInvalid` or `TokenExpired`."""
    claims, every = _verified(token, header, keys, rules)
    if claims.channel:  # or a token for one topic would let its bearer in
        raise WrongKind("a subscription token, not a connection token")
    _check_time(claims, rules, now)
    subs = {name: ServerSub() for name in claims.channels}
    for name, options in claims.subs.items():
        subs[name] = ServerSub(
            _json(options.info, options.b64info), _json(options.data, options.b64data)
        )
    info = _json(claims.info, claims.b64info)
    return ConnectionToken(every, claims.sub, info, _expires_at(claims), subs)


def read_subscription(
    token: str, header: Header, keys: Iterable[Key], rules: TokenRules, now: float
) -> SubscriptionToken:
    """Verify a subscription token. Raises `TokenInvalid` or `TokenExpired`.

    Whether it is for this user and topic is for the caller to compare.
    """
    claims, every = _verified(token, header, keys, rules)
    if not claims.channel:
        raise WrongKind("a connection token, not a subscription token")
    _check_time(claims, rules, now)
    return SubscriptionToken(
        every,
        claims.sub,
        claims.channel,
        claims.client,
        _json(claims.info, claims.b64info),
        _json(claims.data, claims.b64data),
        _expires_at(claims),
    )


def _verified(
    token: str, header: Header, keys: Iterable[Key], rules: TokenRules
) -> tuple[_Claims, dict[str, object]]:
    payload = _verified_payload(token, header, keys)
    try:
        claims = msgspec.json.decode(payload, type=_Claims)
        every: dict[str, object] = msgspec.json.decode(payload)
    except (msgspec.DecodeError, RecursionError) as error:
        raise TokenInvalid(f"claims: {error}") from None
    named = [claims.aud] if isinstance(claims.aud, str) else claims.aud
    if rules.audience and rules.audience not in named:
        raise TokenInvalid(f"audience {claims.aud!r}")
    if rules.issuer and rules.issuer != claims.iss:
        raise TokenInvalid(f"issuer {claims.iss!r}")
    return claims, every


def _verified_payload(token: str, header: Header, keys: Iterable[Key]) -> bytes:
    algorithm = header.algorithm
    for key in keys:
        if algorithm not in key.algorithms:
            continue
        try:
            whole = _JWS.decode_complete(token, key.material, algorithms=[algorithm])
        except jwt.InvalidSignatureError:
            continue
        except (jwt.InvalidTokenError, jwt.InvalidKeyError, ValueError) as error:
            raise TokenInvalid(str(error)) from None
        payload: bytes = whole["payload"]
        return payload
    raise TokenInvalid(f"no key verifies its {algorithm} signature")


def _check_time(claims: _Claims, rules: TokenRules, now: float) -> None:
    if claims.exp is not None and claims.exp <= now - rules.leeway_seconds:
        raise TokenExpired("expired")
    # As Centrifugo: the client fetches another token, which a 3500 would keep it from.
    if claims.nbf is not None and claims.nbf > now + rules.leeway_seconds:
        raise TokenExpired("not valid yet")


def _expires_at(claims: _Claims) -> float | None:
    """`expire_at` parts the end of the connection from that of the token; 0 is never."""
    if claims.expire_at is None:
        return claims.exp
    return claims.expire_at if claims.expire_at > 0 else None


def _json(raw: Raw, encoded: str) -> bytes | None:
    """A claim that stands there as JSON or, under another name, as base64 of JSON.

    Other bytes cannot be shown to a client that speaks JSON.
    """
    data = bytes(raw)
    if encoded:
        try:
            data = base64.b64decode(encoded, validate=True)
            data.decode()
            msgspec.json.decode(data)
        except (binascii.Error, ValueError, RecursionError) as error:
            raise TokenInvalid(f"base64 of what is not JSON: {error}") from None
    if not data or data == b"null":
        return None
    # One line: clients split a frame at newlines before they parse it.
    return data if b"\n" not in data else msgspec.json.format(data, indent=-1)


def needs_token(name: str) -> bool:
    """Whether a topic, or a pattern that may match it, is private: those that begin with `$`."""
    first = name.partition(".")[0]
    return name.startswith("$") or (is_pattern(name) and first in ("*", ">"))


def ttl(expires_at: float, now: float) -> int:
    """Whole seconds for a client's timer, at least 1: it refreshes within the grace period."""
    return max(1, min(MAX_TTL, int(expires_at - now)))


# asking


class KeySource(Protocol):
    """Where keys come from that are not in the settings."""

    async def key(self, kid: str) -> Key | None:
        """The key of that name; None if there is none. Raises `KeysUnavailable`."""


@attrs.frozen
class Tokens:
    """Verifies tokens by the settings. `now` is the wall clock, in Unix seconds."""

    rules: TokenRules
    keys: Sequence[Key]
    now: Callable[[], float]
    source: KeySource | None = None

    @property
    def enabled(self) -> bool:
        """Whether there is anything to verify a token with."""
        return bool(self.keys) or self.source is not None

    async def connection(self, token: str) -> ConnectionToken:
        """Raises `TokenInvalid`, `TokenExpired` or `KeysUnavailable`. May wait for keys."""
        header = read_header(token, self.rules.max_bytes)
        keys = await self._keys_for(header)
        return read_connection(token, header, keys, self.rules, self.now())

    async def subscription(self, token: str) -> SubscriptionToken:
        """Raises `TokenInvalid`, `TokenExpired` or `KeysUnavailable`. May wait for keys."""
        header = read_header(token, self.rules.max_bytes)
        keys = await self._keys_for(header)
        return read_subscription(token, header, keys, self.rules, self.now())

    async def _keys_for(self, header: Header) -> list[Key]:
        keys = [key for key in self.keys if header.algorithm in key.algorithms]
        # No one asks the issuer for a key that cannot be there.
        if self.source is not None and header.kid and header.algorithm not in HMAC:
            try:
                named = await self.source.key(header.kid)
            except KeysUnavailable:
                if not keys:
                    raise
            else:
                keys += [named] if named is not None else []
        return keys


# minting


def algorithm_of(private_key: bytes) -> str:
    """What a private key in PEM signs with, unless told otherwise. Raises `ConfigError`."""
    if not has_crypto:
        raise ConfigError(f"a private key {NEEDS_CRYPTO}")
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        algorithms = _public_key(load_pem_private_key(private_key, None).public_key()).algorithms
    except (ValueError, TypeError) as error:  # TypeError: it has a passphrase
        reason = str(error) if isinstance(error, _UnfitKey) else "not a private key in PEM"
        raise ConfigError(reason) from None
    return "RS256" if algorithms == RSA else min(algorithms)


def mint(claims: Mapping[str, object], key: bytes, algorithm: str, kid: str = "") -> str:
    """Sign a token. `key` is the HMAC secret, or a private key in PEM.

    Raises `ConfigError` for a key that does not fit the algorithm.
    """
    payload = msgspec.json.encode(claims)
    try:
        return _JWS.encode(payload, key, algorithm, headers={"kid": kid} if kid else None)
    except NotImplementedError:
        raise ConfigError(f"{algorithm} {NEEDS_CRYPTO}") from None
    except (jwt.PyJWTError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"the key does not fit {algorithm}: {error}") from None
