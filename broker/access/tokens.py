"""JSON Web Tokens: the user of a client, and the topics it may subscribe to (RFC 7515, 7519).

The claims are Centrifugo's, so a program that mints tokens for Centrifugo mints them for us: a *connection
token* says who connects (`sub`, `info`, `channels`, `subs`, `meta`), a *subscription token* lets one user
subscribe to one `channel`.

Rules:

1. A key fits some algorithms and verifies those alone, so a public key is never taken for an HMAC
   secret, and `none` is nobody's algorithm.
2. Nothing in a token counts before its signature does, except which key it names.
3. Time is an argument. `Tokens` alone waits, and only for a key that has to be fetched.
4. A peer is told that its token is invalid, never why; the log has the reason, never the token.
"""

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Final, Protocol, TypeVar

import attrs
import jwt
import msgspec
from msgspec import Raw, Struct

from broker.access.keys import ALGORITHMS, HMAC, JWS, Key
from broker.config.settings import TokenRules
from broker.core.json_reader import BadJson, one_text, read, value_of
from broker.core.session import ServerSub
from broker.core.work import SIGNATURE, TOKEN, WIDE_SIGNATURE
from broker.errors import KeysUnavailable, TokenExpired, TokenInvalid

MAX_TTL: Final = 2**32 - 1
"""`ttl` is a uint32 in the protocol."""


# claims


class WrongKind(TokenInvalid):
    """A valid token, but a subscription token where a connection token is due, or the reverse."""


class SubOptions(Struct):
    """The claims of one server-side subscription, in a connection token."""

    info: Raw = Raw(b"")
    b64info: str = ""
    data: Raw = Raw(b"")
    b64data: str = ""


class _Claims(Struct):
    """The claims that both kinds of token use. A claim that is null is absent, as for Centrifugo.

    Others may be of any type: `jti` and `iat`, which nothing here depends on, are not even read.
    """

    sub: str = ""
    exp: float | None = None
    nbf: float | None = None
    expire_at: float | None = None
    info: Raw = Raw(b"")
    b64info: str = ""
    channel: str = ""


class _ConnectionClaims(_Claims):
    channels: list[str] = []
    subs: dict[str, SubOptions] = {}


class _SubscriptionClaims(_Claims):
    data: Raw = Raw(b"")
    b64data: str = ""
    # Of Centrifugo before version 4, whose subscription tokens were for one connection.
    client: str = ""


class _Audience(Struct):
    aud: str | list[str] = []


class _Issuer(Struct):
    iss: str = ""


C = TypeVar("C", bound=_Claims)


@attrs.frozen
class ConnectionToken:
    """The claims of a valid connection token.

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
    """The claims of a valid subscription token. `client` is empty unless it is for one connection."""

    claims: Mapping[str, object]
    user: str
    topic: str
    client: str
    info: bytes | None
    data: bytes | None
    expires_at: float | None


@attrs.frozen
class Header:
    """The header of a token: algorithm and key of its signature, to look up and not to believe."""

    algorithm: str
    kid: str


def read_header(token: str, max_bytes: int) -> Header:
    """Raises `TokenInvalid` for a text without a header, for a header that asks for something unknown, and for
    one that `weigh` reads otherwise."""
    if len(token) > max_bytes:
        raise TokenInvalid(f"longer than {max_bytes} bytes")
    try:
        header = JWS.get_unverified_header(token)
    except (jwt.InvalidTokenError, ValueError, RecursionError) as error:
        raise TokenInvalid(f"no header: {error}") from None
    if "crit" in header:  # RFC 7515 section 4.1.11: critical fields must be understood
        raise TokenInvalid("a critical header")
    algorithm, kid = header.get("alg"), header.get("kid", "")
    if not isinstance(algorithm, str) or not isinstance(kid, str) or algorithm not in ALGORITHMS:
        raise TokenInvalid(f"algorithm {algorithm!r}")
    # NaN, half of a surrogate pair, UTF-16: no JSON, but Python takes it.
    if algorithm != _algorithm_of(token):
        raise TokenInvalid("a header that is no JSON")
    return Header(algorithm, kid)


class _Algorithm(Struct):
    alg: str = ""


_WORK: Final = {
    algorithm: WIDE_SIGNATURE if algorithm in ("ES384", "ES512") else SIGNATURE
    for algorithm in ALGORITHMS - HMAC
}
"""Of one signature; those by HMAC are part of what a token costs in any case."""

_USUAL_HEADER: Final = 512


def _algorithm_of(token: str) -> str:
    """The algorithm that a token names for its signature; "" where it names none. Cheap."""
    start = token.partition(".")[0]
    read = _algorithm_in if len(start) <= _USUAL_HEADER else _algorithm_in.__wrapped__
    return read(start)


@lru_cache(maxsize=64)  # all tokens of an issuer begin alike
def _algorithm_in(start: str) -> str:
    try:
        return msgspec.json.decode(jwt.utils.base64url_decode(start), type=_Algorithm).alg
    except (ValueError, RecursionError):
        return ""


def read_connection(
    token: str, header: Header, keys: Iterable[Key], rules: TokenRules, now: float
) -> ConnectionToken:
    """Verify a connection token. Raises `TokenInvalid` or `TokenExpired`."""
    claims, every = _verified(token, header, keys, rules, _ConnectionClaims)
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
    claims, every = _verified(token, header, keys, rules, _SubscriptionClaims)
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
    token: str, header: Header, keys: Iterable[Key], rules: TokenRules, kind: type[C]
) -> tuple[C, dict[str, object]]:
    payload = _verified_payload(token, header, keys)
    try:
        claims = read(payload, kind)
        # Only who asks for an audience or an issuer cares of which type they are.
        audience = read(payload, _Audience).aud if rules.audience else ""
        issuer = read(payload, _Issuer).iss if rules.issuer else ""
        every = value_of(payload)
    except BadJson as error:
        raise TokenInvalid(f"claims: {error}") from None
    assert isinstance(every, dict)  # or it would have been no struct
    named = [audience] if isinstance(audience, str) else audience
    if rules.audience and rules.audience not in named:
        raise TokenInvalid(f"audience {audience!r}")
    if rules.issuer and rules.issuer != issuer:
        raise TokenInvalid(f"issuer {issuer!r}")
    return claims, every


def _verified_payload(token: str, header: Header, keys: Iterable[Key]) -> bytes:
    algorithm = header.algorithm
    for key in keys:
        if algorithm not in key.algorithms:
            continue
        try:
            whole = JWS.decode_complete(token, key.material, algorithms=[algorithm])
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
            data = one_text(base64.b64decode(encoded, validate=True)).mended
        except ValueError as error:
            raise TokenInvalid(f"base64 of what is not JSON: {error}") from None
    if not data or data == b"null":
        return None
    # One line: clients split a frame at newlines before they parse it.
    return data if b"\n" not in data else msgspec.json.format(data, indent=-1)


def ttl(expires_at: float, now: float) -> int:
    """Whole seconds for a client's timer, at least 1: it refreshes within the grace period."""
    return max(1, min(MAX_TTL, int(expires_at - now)))


# asking


class KeySource(Protocol):
    """Keys that are not in the settings."""

    def known(self, kid: str) -> Key | None:
        """The key of that name, as far as it is here. Never waits."""

    async def key(self, kid: str) -> Key | None:
        """The key of that name; None if there is none. Raises `KeysUnavailable`."""


@attrs.define(eq=False)
class Tokens:
    """Verifies tokens by the settings. `now` is the wall clock, in Unix seconds.

    `rules` and `keys` may be replaced at any time, both at once: they count from the next act on. So what was
    found of a token before somebody was waited for stands for as long as its `basis` does.
    """

    rules: TokenRules
    keys: Sequence[Key]
    now: Callable[[], float]
    source: KeySource | None = None

    @property
    def basis(self) -> tuple[TokenRules, Sequence[Key]]:
        """The rules and keys by which tokens are verified now."""
        return self.rules, self.keys

    @property
    def enabled(self) -> bool:
        """Whether there is anything to verify a token with."""
        return bool(self.keys) or self.source is not None

    @property
    def required(self) -> bool:
        """Whether nobody connects without a token."""
        return self.enabled and not self.rules.anonymous_allowed

    @property
    def may_wait(self) -> bool:
        """Whether a key may have to be fetched before a token can be verified."""
        return self.source is not None

    def weigh(self, token: str) -> float:
        """The work that it takes to verify a token, at most: by what it says of itself, and as `core.work` has
        it. 0 for none, and where none counts."""
        if not token or not self.enabled or len(token) > self.rules.max_bytes:
            return 0.0
        signature = _WORK.get(_algorithm_of(token), 0.0)
        return TOKEN + signature * (len(self.keys) + (self.source is not None))

    async def connection(self, token: str) -> ConnectionToken:
        """Raises `TokenInvalid`, `TokenExpired` or `KeysUnavailable`. May wait for keys."""
        await self.wait_key(token)
        return self.connection_nowait(token)

    async def subscription(self, token: str) -> SubscriptionToken:
        """Raises `TokenInvalid`, `TokenExpired` or `KeysUnavailable`. May wait for keys."""
        await self.wait_key(token)
        return self.subscription_nowait(token)

    def connection_nowait(self, token: str) -> ConnectionToken:
        """The same, by the keys that are here: raises `TokenInvalid` where one is missing."""
        header = read_header(token, self.rules.max_bytes)
        return read_connection(token, header, self._keys_here(header), self.rules, self.now())

    def subscription_nowait(self, token: str) -> SubscriptionToken:
        """The same, by the keys that are here: raises `TokenInvalid` where one is missing."""
        header = read_header(token, self.rules.max_bytes)
        return read_subscription(token, header, self._keys_here(header), self.rules, self.now())

    def _keys_here(self, header: Header) -> list[Key]:
        keys = [key for key in self.keys if header.algorithm in key.algorithms]
        if self._asks_source(header):
            assert self.source is not None
            named = self.source.known(header.kid)
            keys += [named] if named is not None else []
        return keys

    def _asks_source(self, header: Header) -> bool:
        # No one asks the issuer for a key that cannot be there.
        return self.source is not None and bool(header.kid) and header.algorithm not in HMAC

    async def wait_key(self, token: str) -> None:
        """Wait for the key that a token names, if it has to be fetched. Raises `TokenInvalid` for what has no
        header, and `KeysUnavailable`."""
        header = read_header(token, self.rules.max_bytes)
        if not self._asks_source(header):
            return
        assert self.source is not None
        try:
            await self.source.key(header.kid)
        except KeysUnavailable as unavailable:
            try:
                _verified_payload(token, header, self._keys_here(header))
            except TokenInvalid:
                # The key that is missing may be the one: not to be refused for good.
                raise unavailable from None
