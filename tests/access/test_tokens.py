"""Which tokens let in whom, and which do not: decided without I/O, at a time of the test's choosing."""

import base64
import hashlib
import hmac
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from broker.access.keys import ALGORITHMS, Key, keys_of_jwks, load_keys, public_key
from broker.access.minting import algorithm_of, mint
from broker.access.tokens import (
    ConnectionToken,
    SubscriptionToken,
    Tokens,
    WrongKind,
    read_connection,
    read_header,
    read_subscription,
    ttl,
)
from broker.config.settings import TokenRules
from broker.core.names import may_cover_private
from broker.core.session import ServerSub
from broker.core.work import SIGNATURE, TOKEN, WIDE_SIGNATURE
from broker.errors import ConfigError, TokenExpired, TokenInvalid, TokenRefused
from tests.conftest import HMAC_SECRET

OTHER = "fedcba9876543210fedcba9876543210"
ADMIN = b'{"sub":"admin"}'
NOW = 1_800_000_000.0
RULES = TokenRules(hmac_secret=HMAC_SECRET)

RSA = rsa.generate_private_key(65537, 2048)
PRIVATE: dict[str, Any] = {
    **dict.fromkeys(["RS256", "RS384", "RS512", "PS256", "PS384", "PS512"], RSA),
    "ES256": ec.generate_private_key(ec.SECP256R1()),
    "ES384": ec.generate_private_key(ec.SECP384R1()),
    "ES512": ec.generate_private_key(ec.SECP521R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate(),
}


def pem(private: Any) -> bytes:
    made: bytes = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return made


def private_pem(private: Any, password: bytes = b"") -> bytes:
    encryption = BestAvailableEncryption(password) if password else NoEncryption()
    made: bytes = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
    return made


def signed(
    claims: object, secret: str = HMAC_SECRET, algorithm: str = "HS256", header: Any = None
) -> str:
    """A token over any payload, JSON or not."""
    payload = claims if isinstance(claims, bytes) else json.dumps(claims).encode()
    return jwt.PyJWS().encode(payload, secret, algorithm, header)


def connection(token: str, rules: TokenRules = RULES, now: float = NOW) -> ConnectionToken:
    header = read_header(token, rules.max_bytes)
    return read_connection(token, header, load_keys(rules), rules, now)


def subscription(token: str, rules: TokenRules = RULES, now: float = NOW) -> SubscriptionToken:
    header = read_header(token, rules.max_bytes)
    return read_subscription(token, header, load_keys(rules), rules, now)


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


# what they cost


@pytest.mark.parametrize("algorithm", sorted([*PRIVATE, "HS256"]))
def test_a_token_is_weighed_by_what_it_says_of_its_signature(algorithm: str) -> None:
    private = PRIVATE.get(algorithm)
    secret = HMAC_SECRET.encode() if private is None else private_pem(private)
    keys = [public_key(each.public_key()) for each in (RSA, PRIVATE["ES384"])]
    tokens = Tokens(TokenRules(), keys, lambda: NOW)
    signature = {"HS256": 0.0, "ES384": WIDE_SIGNATURE, "ES512": WIDE_SIGNATURE}
    each = signature.get(algorithm, SIGNATURE)
    assert tokens.weigh(mint({"sub": "alice"}, secret, algorithm)) == TOKEN + 2 * each


@pytest.mark.parametrize("bad", ["a.b.c", "e30.e30.", "W10.e30.", "\ud800.a", "." * 5, "x" * 600])
def test_what_is_no_token_is_weighed_as_one_without_a_signature(bad: str) -> None:
    assert Tokens(TokenRules(), load_keys(RULES), lambda: NOW).weigh(bad) == TOKEN


HEADERS = {
    "NaN": b'{"alg":"ALG","x":NaN}',
    "Infinity": b'{"alg":"ALG","x":-Infinity}',
    "half of a surrogate pair": b'{"alg":"ALG","x":"\\ud800"}',
    "half of one as a name": b'{"alg":"ALG","\\ud800":1}',
    "UTF-16": '{"alg":"ALG"}'.encode("utf-16"),
    "UTF-32": '{"alg":"ALG"}'.encode("utf-32"),
    "a byte order mark": b'\xef\xbb\xbf{"alg":"ALG"}',
    "of a number of 4,000 digits": b'{"alg":"ALG","x":' + b"9" * 4000 + b"}",
    "none first": b'{"alg":"none","alg":"ALG"}',
    "HS256 first": b'{"alg":"HS256","alg":"ALG"}',
    "HS256 last": b'{"alg":"ALG","alg":"HS256"}',
    "an escaped name": b'{"\\u0061lg":"ALG"}',
    "an escaped value": b'{"alg":"\\u0045S512"}',
    "a name in capitals": b'{"ALG":"ALG"}',
    "behind it more": b'{"alg":"ALG"}{}',
    "nested 900 deep": b'{"alg":"ALG","x":' + b"[" * 900 + b"]" * 900 + b"}",
    "a list": b'["ALG"]',
    "a list of one": b'{"alg":["ALG"]}',
}


@pytest.mark.parametrize("algorithm", ["ES512", "ES384", "RS256", "EdDSA"])
@pytest.mark.parametrize("header", HEADERS)
def test_no_header_has_a_signature_verified_that_was_not_weighed(
    header: str, algorithm: str
) -> None:
    first = base64.urlsafe_b64encode(HEADERS[header].replace(b"ALG", algorithm.encode()))
    token = (
        f"{first.decode().rstrip('=')}.{base64.urlsafe_b64encode(ADMIN).decode().rstrip('=')}.c2ln"
    )
    tokens = Tokens(TokenRules(), [public_key(PRIVATE["ES512"].public_key())], lambda: NOW)
    try:
        named = read_header(token, 8192).algorithm
    except TokenInvalid:
        return
    work = WIDE_SIGNATURE if named in ("ES384", "ES512") else SIGNATURE
    assert tokens.weigh(token) == TOKEN + (0 if named == "HS256" else work)


def test_where_nothing_is_verified_a_token_weighs_nothing() -> None:
    tokens = Tokens(TokenRules(), load_keys(RULES), lambda: NOW)
    assert tokens.weigh("") == tokens.weigh("x" * 10_000) == 0
    assert Tokens(TokenRules(), (), lambda: NOW).weigh("a.b.c") == 0


# algorithms and keys


@pytest.mark.parametrize("algorithm", ["HS256", "HS384", "HS512"])
def test_the_secret_verifies_every_hmac(algorithm: str) -> None:
    token = mint({"sub": "alice"}, HMAC_SECRET.encode(), algorithm)
    assert connection(token).user == "alice"
    with pytest.raises(TokenInvalid):
        connection(token, TokenRules(hmac_secret=OTHER))


@pytest.mark.parametrize("algorithm", sorted(PRIVATE))
def test_a_public_key_verifies_the_algorithms_it_fits(algorithm: str, tmp_path: Path) -> None:
    private = PRIVATE[algorithm]
    path = tmp_path / "public.pem"
    path.write_bytes(pem(private))
    token = mint({"sub": "alice"}, private_pem(private), algorithm)
    assert connection(token, TokenRules(public_keys=(str(path),))).user == "alice"
    # not with another key of the same kind, nor with keys of other kinds
    for other in set(PRIVATE.values()) - {private}:
        path.write_bytes(pem(other))
        with pytest.raises(TokenInvalid):
            connection(token, TokenRules(hmac_secret=HMAC_SECRET, public_keys=(str(path),)))


def test_a_key_that_is_being_replaced_and_its_successor_both_count(tmp_path: Path) -> None:
    privates = [ed25519.Ed25519PrivateKey.generate() for _ in range(2)]
    paths = []
    for number, private in enumerate(privates):
        paths.append(str(tmp_path / f"{number}.pem"))
        Path(paths[-1]).write_bytes(pem(private))
    rules = TokenRules(public_keys=tuple(paths))
    for private in privates:
        token = mint({"sub": "alice"}, private_pem(private), "EdDSA")
        assert connection(token, rules).user == "alice"


def test_all_algorithms_are_tried_above() -> None:
    assert {*PRIVATE, "HS256", "HS384", "HS512"} == ALGORITHMS


def test_ed448_is_eddsa_too() -> None:
    private = ed448.Ed448PrivateKey.generate()
    assert algorithm_of(private_pem(private)) == "EdDSA"


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "EdDSA"])
def test_a_public_key_is_never_an_hmac_secret(algorithm: str, tmp_path: Path) -> None:
    """The attack of RFC 8725 section 2.1: everybody knows the public key, so could sign with it."""
    path = tmp_path / "public.pem"
    public = pem(PRIVATE[algorithm])
    path.write_bytes(public)
    head = b64(b'{"alg":"HS256"}') + "." + b64(ADMIN)
    forged = f"{head}.{b64(hmac.digest(public, head.encode(), hashlib.sha256))}"
    with pytest.raises(TokenInvalid):
        connection(forged, TokenRules(public_keys=(str(path),)))
    with pytest.raises(ConfigError, match="is a public key, which is no secret"):
        load_keys(TokenRules(hmac_secret=public.decode()))


@pytest.mark.parametrize(
    "name", ["none", "None", "NONE", "", "HS1", "ES256K", "RS", "hs256", None, 1]
)
def test_no_other_algorithm_counts(name: object) -> None:
    head = b64(json.dumps({"alg": name}).encode())
    for signature in ("", "AAAA"):
        with pytest.raises(TokenInvalid):
            connection(f"{head}.{b64(b'{}')}.{signature}")


def test_a_signature_of_nothing_is_none() -> None:
    head, payload, _ = signed({"sub": "admin"}).split(".")
    with pytest.raises(TokenInvalid):
        connection(f"{head}.{payload}.")


def test_a_changed_payload_is_not_signed() -> None:
    head, _, signature = signed({"sub": "alice"}).split(".")
    with pytest.raises(TokenInvalid):
        connection(f"{head}.{b64(ADMIN)}.{signature}")


def test_a_critical_header_that_nobody_understands_is_refused() -> None:
    with pytest.raises(TokenInvalid):
        connection(signed({}, header={"crit": ["exp"], "exp": 1}))


@pytest.mark.parametrize(
    "token",
    [
        *("", ".", "..", "...", "a.b.c", "é.é.é", "\ud800", "\0", "eyJhbGciOiJIUzI1NiJ9"),
        *(
            f"{b64(header)}.e30.AAAA"
            for header in (
                *(b"[" * 5000, b"null", b"\xff", b'{"alg":"HS256","kid":1}'),
                *(b'{"alg":' + b"9" * 5000 + b"}", b'{"alg":"HS256","b64":false}'),
            )
        ),
    ],
)  # fmt: skip
def test_garbage_is_refused(token: str) -> None:
    with pytest.raises(TokenInvalid):
        connection(token)


def test_a_giant_token_is_refused_unread() -> None:
    rules = attrs.evolve(RULES, max_bytes=1000)
    token = signed({"sub": "a" * 900})
    with pytest.raises(TokenInvalid, match="longer than 1000 bytes"):
        connection(token, rules)
    assert connection(token).user == "a" * 900


# claims


@pytest.mark.parametrize(
    "payload",
    [
        *(b"", b"[]", b"null", b"\xff", b"[" * 3000, b'{"sub":1}', b'{"exp":[]}', b'{"nbf":{}}'),
        *(b'{"sub":"\\ud800"}', b'{"exp":"1"}', b'{"exp":true}', b'{"exp":1e999}', b'{"nbf":[]}'),
        *(b'{"exp":' + b"9" * 400 + b"}", b'{"channels":"news"}', b'{"subs":["news"]}'),
        *(b'{"channels":[1]}', b'{"b64info":1}', b'{"b64info":"!"}', b'{"b64info":"AAAA"}'),
        *(b'{"subs":{"a":{"b64data":"/w=="}}}', b'{"x":' + b"[" * 2500 + b"]" * 2500 + b"}"),
    ],
)  # fmt: skip
def test_claims_that_are_not_what_they_should_be_are_refused(payload: bytes) -> None:
    with pytest.raises(TokenInvalid):
        connection(signed(payload))


SCALARS = ("sub", "exp", "nbf", "expire_at", "b64info", "channel", "channels", "subs", "info")


@pytest.mark.parametrize("claim", [*SCALARS, "aud", "iss", "jti", "iat", "meta", "client", "data"])
def test_a_claim_that_is_null_is_absent(claim: str) -> None:
    said = {"sub": "alice", "exp": NOW + 9}
    without = {name: value for name, value in said.items() if name != claim}
    expected = attrs.evolve(connection(signed(without)), claims={**said, claim: None})
    assert connection(signed({**said, claim: None})) == expected


@pytest.mark.parametrize("claim", ["sub", "exp", "info", "data", "b64data", "client", "jti"])
def test_a_claim_of_a_subscription_token_that_is_null_is_absent(claim: str) -> None:
    said = {"sub": "alice", "exp": NOW + 9, "channel": "$room"}
    without = {name: value for name, value in said.items() if name != claim}
    expected = attrs.evolve(subscription(signed(without)), claims={**said, claim: None})
    assert subscription(signed({**said, claim: None})) == expected


def test_an_audience_that_is_null_is_not_us() -> None:
    for rules in (attrs.evolve(RULES, audience="us"), attrs.evolve(RULES, issuer="ours")):
        with pytest.raises(TokenInvalid):
            connection(signed({"aud": None, "iss": None}), rules)


def test_a_null_inside_the_subscriptions_is_absent() -> None:
    subs = {"news": {"info": None, "b64info": None, "data": 1}, "chat": None}
    assert connection(signed({"subs": subs})).subs == {"news": ServerSub(None, b"1")}


@pytest.mark.parametrize("odd", [5, "x", 1.5, True, [1], {"a": 1}], ids=repr)
@pytest.mark.parametrize(
    "claim", ["jti", "iat", "aud", "iss", "client", "data", "b64data", "azp", "nonce", "meta"]
)
def test_claims_that_nothing_depends_on_may_be_of_any_type(claim: str, odd: object) -> None:
    found = connection(signed({"sub": "alice", claim: odd}))
    assert (found.user, found.claims[claim]) == ("alice", odd)


@pytest.mark.parametrize("claim", ["jti", "iat", "aud", "iss", "channels", "subs"])
def test_nor_do_those_of_the_other_kind_count_in_a_subscription_token(claim: str) -> None:
    found = subscription(signed({"sub": "alice", "channel": "$room", claim: 5}))
    assert (found.user, found.claims[claim]) == ("alice", 5)


def test_an_audience_or_issuer_that_is_asked_for_is_a_text() -> None:
    with pytest.raises(TokenInvalid, match="claims: aud: "):
        connection(signed({"aud": 5}), attrs.evolve(RULES, audience="us"))
    with pytest.raises(TokenInvalid, match="claims: iss: "):
        connection(signed({"iss": ["ours"]}), attrs.evolve(RULES, issuer="ours"))


@pytest.mark.parametrize(
    "payload, reason",
    [
        (b'{"sub":5}', "claims: sub: Expected `str`"),
        (b'{"exp":"5"}', "claims: exp: Expected `float`"),
        (b'{"sub":"\\ud83d"}', "claims: sub: half of a surrogate pair is no character"),
        (b'{"channels":["\\ud83d"]}', "claims: channels: half of a surrogate pair"),
        (b'{"subs":{"\\ud83d":{}}}', "claims: subs: half of a surrogate pair"),
        (b'{"subs":{"a":5}}', "claims: subs['a'] is no object"),
        (b'{"sub":"a"', "claims: not JSON"),
        (b"[" * 3000, "claims: nested too deeply"),
    ],
)
def test_the_reason_names_the_claim(payload: bytes, reason: str) -> None:
    with pytest.raises(TokenInvalid) as caught:
        connection(signed(payload))
    assert str(caught.value).startswith(reason)


def test_half_a_surrogate_pair_passes_in_what_is_shown_and_what_is_unused() -> None:
    half = rb'{"sub":"a","info":{"n":"x\ud83d"},"meta":"\ude00","nick":"\ud83d","subs":{"a":{"data":"\ud83d"}}}'
    found = connection(signed(half))
    assert found.info == rb'{"n":"x\ufffd"}'
    assert found.subs == {"a": ServerSub(None, rb'"\ufffd"')}
    assert (found.claims["meta"], found.claims["nick"]) == ("\ufffd", "\ufffd")
    encoded = base64.b64encode(rb'"\ud83d"').decode()
    assert connection(signed({"b64info": encoded})).info == rb'"\ufffd"'


def test_numbers_beyond_python_are_no_matter_in_unused_claims() -> None:
    claims = connection(signed(b'{"sub":"a","jti":1e999,"big":' + b"9" * 5000 + b"}")).claims
    assert claims == {"sub": "a", "jti": float("inf"), "big": float("inf")}


def test_a_connection_token_says_who_connects_and_to_what() -> None:
    claims = {
        "sub": "alice",
        "exp": NOW + 60,
        "iat": NOW,
        "jti": "1",
        "info": {"name": "Alice"},
        "meta": {"plan": "free"},
        "channels": ["news", "chat"],
        "subs": {
            "chat": {"info": {"role": "admin"}, "data": [1]},
            "b64": {
                "b64info": "WzFd",
                "b64data": "WzJd",
                "override": {"presence": {"value": True}},
            },
        },
    }
    assert connection(signed(claims)) == ConnectionToken(
        claims,
        "alice",
        b'{"name": "Alice"}',
        NOW + 60,
        {
            "news": ServerSub(),
            "chat": ServerSub(b'{"role": "admin"}', b"[1]"),
            "b64": ServerSub(b"[1]", b"[2]"),
        },
    )


def test_an_empty_token_is_of_nobody_in_particular_and_for_ever() -> None:
    assert connection(signed({})) == ConnectionToken({}, "", None, None, {})


def test_info_may_come_in_base64_and_is_kept_in_one_line() -> None:
    assert (
        connection(signed({"b64info": base64.b64encode(b'{\n"a": 1}').decode()})).info == b'{"a":1}'
    )
    assert connection(signed(b'{"info":{\n"a": 1}}')).info == b'{"a":1}'
    assert connection(signed({"info": None})).info is None


def test_a_subscription_token_says_who_may_read_what() -> None:
    claims = {
        "sub": "alice",
        "channel": "$room",
        "info": 1,
        "data": 2,
        "client": "7",
        "exp": NOW + 9,
    }
    assert subscription(signed(claims)) == SubscriptionToken(
        claims, "alice", "$room", "7", b"1", b"2", NOW + 9
    )


def test_one_kind_of_token_does_not_pass_for_the_other() -> None:
    with pytest.raises(WrongKind):
        connection(signed({"sub": "alice", "channel": "news"}))
    with pytest.raises(WrongKind):
        subscription(signed({"sub": "alice"}))


@pytest.mark.parametrize(
    "audience, passes",
    [
        ("us", True),
        (["them", "us"], True),
        ("them", False),
        (["them"], False),
        ([], False),
        (None, False),
    ],
)
def test_the_audience_must_be_us_if_the_settings_say_so(audience: Any, passes: bool) -> None:
    token = signed({"sub": "a"} if audience is None else {"sub": "a", "aud": audience})
    assert connection(token).user == "a"
    rules = attrs.evolve(RULES, audience="us")
    if passes:
        assert connection(token, rules).user == "a"
    else:
        with pytest.raises(TokenInvalid):
            connection(token, rules)


@pytest.mark.parametrize("issuer, passes", [("ours", True), ("theirs", False), (None, False)])
def test_the_issuer_must_be_ours_if_the_settings_say_so(issuer: str | None, passes: bool) -> None:
    token = signed({} if issuer is None else {"iss": issuer})
    connection(token)
    rules = attrs.evolve(RULES, issuer="ours")
    if passes:
        connection(token, rules)
    else:
        with pytest.raises(TokenInvalid):
            connection(token, rules)


@pytest.mark.parametrize("claim, early", [("exp", -1), ("nbf", 1)])
@pytest.mark.parametrize("leeway", [0, 5, 60])
def test_clocks_may_differ_by_the_leeway(claim: str, early: int, leeway: float) -> None:
    rules = attrs.evolve(RULES, leeway_seconds=leeway)
    inside = NOW + early * (leeway - 1 if leeway else -1)
    outside = NOW + early * (leeway + 1)
    connection(signed({claim: inside}), rules)
    with pytest.raises(TokenExpired):
        connection(signed({claim: outside}), rules)


def test_an_expired_token_of_somebody_else_is_not_ours_to_call_expired() -> None:
    with pytest.raises(TokenInvalid):
        connection(signed({"exp": 1}, OTHER))
    with pytest.raises(TokenInvalid):
        connection(signed({"exp": 1, "aud": "them"}), attrs.evolve(RULES, audience="us"))


@pytest.mark.parametrize(
    "claims, expires_at",
    [
        ({}, None),
        ({"exp": NOW + 1}, NOW + 1),
        ({"exp": NOW + 1, "expire_at": NOW + 9}, NOW + 9),
        ({"exp": NOW + 1, "expire_at": 0}, None),
        ({"expire_at": NOW + 9}, NOW + 9),
    ],
)
def test_expire_at_parts_the_end_of_the_connection_from_that_of_the_token(
    claims: object, expires_at: float | None
) -> None:
    assert connection(signed(claims)).expires_at == expires_at


def test_time_to_live_is_in_whole_seconds_that_a_client_can_count() -> None:
    assert ttl(NOW + 60.5, NOW) == 60
    assert ttl(NOW - 3, NOW) == 1
    assert ttl(1e300, NOW) == 2**32 - 1


@pytest.mark.parametrize(
    "name, private",
    [
        ("$room", True), ("$room.*", True), (">", True), ("*.a", True), ("*", True),
        ("room", False), ("room.>", False), ("a$", False), ("*a", False), ("*a.*", False),
    ],
)  # fmt: skip
def test_names_that_begin_with_a_dollar_or_may_match_one_are_private(
    name: str, private: bool
) -> None:
    assert may_cover_private(name) is private


# keys in files


def test_a_secret_is_read_from_a_file_without_its_line_end(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text(f"{HMAC_SECRET}\n")
    assert connection(signed({"sub": "a"}), TokenRules(hmac_secret_file=file)).user == "a"


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "cannot read"),
        (lambda: b"", "not a public key in PEM"),
        (
            lambda: b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n",
            "not a public key",
        ),
        (lambda: private_pem(PRIVATE["EdDSA"]), "not a public key in PEM"),
        (lambda: pem(rsa.generate_private_key(65537, 1024)), "an RSA key has at least 2048 bits"),
        (lambda: pem(ec.generate_private_key(ec.SECP256K1())), "curve secp256k1: take one of"),
        (lambda: pem(dsa.generate_private_key(1024)), "take an RSA, EC, Ed25519 or Ed448 key"),
    ],
)
def test_a_file_without_a_fit_public_key_is_named(
    content: Callable[[], bytes] | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "public.pem"
    if content is not None:
        path.write_bytes(content())
    with pytest.raises(ConfigError) as raised:
        load_keys(TokenRules(public_keys=(str(path),)))
    assert str(path) in str(raised.value)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_empty_or_missing_secret_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    with pytest.raises(ConfigError, match=r"hmac_secret_file: cannot read .*secret: No such file"):
        load_keys(TokenRules(hmac_secret_file=file))
    file.write_text("\n")
    with pytest.raises(ConfigError, match="secret is empty"):
        load_keys(TokenRules(hmac_secret_file=file))


def test_a_short_secret_works() -> None:
    rules = TokenRules(hmac_secret="secret")
    assert connection(signed({"sub": "a"}, HMAC_SECRET), RULES).user == "a"
    assert connection(mint({"sub": "a"}, b"secret", "HS256"), rules).user == "a"


def test_no_setting_shows_the_secret() -> None:
    rules = TokenRules(hmac_secret=HMAC_SECRET)
    assert HMAC_SECRET not in repr(rules)
    assert HMAC_SECRET not in repr(Tokens(rules, load_keys(rules), lambda: NOW))


# key sets


def jwk(private: Any, **fields: object) -> dict[str, object]:
    """The public key as a JSON Web Key; a field that is None is left out."""
    public = private.public_key()
    if isinstance(public, rsa.RSAPublicKey):
        made = jwt.algorithms.RSAAlgorithm.to_jwk(public, as_dict=True)
    elif isinstance(public, ec.EllipticCurvePublicKey):
        made = jwt.algorithms.ECAlgorithm.to_jwk(public, as_dict=True)
    else:
        made = jwt.algorithms.OKPAlgorithm.to_jwk(public, as_dict=True)
    made.pop("key_ops", None)
    return {name: value for name, value in {**made, **fields}.items() if value is not None}


def key_set(*keys: object) -> bytes:
    return json.dumps({"keys": keys}).encode()


@pytest.mark.parametrize("algorithm", sorted(PRIVATE))
@pytest.mark.parametrize("says_algorithm", [True, False])
def test_a_published_key_verifies_what_it_fits(algorithm: str, says_algorithm: bool) -> None:
    private = PRIVATE[algorithm]
    said = algorithm if says_algorithm else None
    keys = keys_of_jwks(key_set(jwk(private, kid="1", alg=said, use="sig")))
    token = mint({"sub": "alice"}, private_pem(private), algorithm, kid="1")
    header = read_header(token, 8192)
    assert header.kid == "1"
    assert read_connection(token, header, keys.values(), RULES, NOW).user == "alice"


def test_a_published_key_that_names_an_algorithm_verifies_no_other() -> None:
    keys = keys_of_jwks(key_set(jwk(RSA, kid="1", alg="RS256")))
    token = mint({}, private_pem(RSA), "RS512", kid="1")
    with pytest.raises(TokenRefused):
        read_connection(token, read_header(token, 8192), keys.values(), RULES, NOW)


def test_of_a_key_set_only_what_can_be_used_is_taken() -> None:
    good = jwk(RSA, kid="good")
    bad: list[dict[str, object]] = [
        jwk(RSA),  # without kid
        jwk(RSA, kid=7),
        jwk(RSA, kid="enc", use="enc"),
        jwk(RSA, kid="alg", alg="RSA-OAEP"),
        jwk(RSA, kid="es", alg="ES256"),
        jwk(rsa.generate_private_key(65537, 1024), kid="short"),
        jwk(ec.generate_private_key(ec.SECP256K1()), kid="curve"),
        {"kty": "oct", "kid": "oct", "k": "AAAA"},
        {"kty": "oct", "kid": "oct", "k": "AAAA", "alg": "HS256"},
        {"kty": "RSA", "kid": "n", "n": "!", "e": "AQAB"},
        {"kty": "RSA", "kid": "n"},
        {"kty": "EC", "kid": "xy", "crv": "P-256", "x": "AA", "y": "AA"},
        {"kty": "OKP", "kid": "okp", "crv": "X25519", "x": "AA"},
        {"kty": "new", "kid": "new"},
        {"kty": 1, "kid": "1", "alg": 1},
        jwk(RSA, kid="list", alg=["RS256"]),
        {},
    ]
    assert set(keys_of_jwks(key_set(*bad, good))) == {"good"}


@pytest.mark.parametrize(
    "text", [b"", b"<html>", b"{}", b"[]", b'{"keys":1}', b'{"keys":[1]}', b"[" * 9000]
)
def test_a_text_that_is_no_key_set_is_said_to_be_none(text: bytes) -> None:
    with pytest.raises(ValueError, match="not a JSON Web Key Set"):
        keys_of_jwks(text)


# minting


def test_a_private_key_says_what_it_signs_with() -> None:
    for algorithm, private in PRIVATE.items():
        found = algorithm_of(private_pem(private))
        assert found == ("RS256" if private is RSA else algorithm)


def test_a_text_that_is_no_private_key_is_said_to_be_none() -> None:
    for text in (b"", b"secret", pem(RSA), private_pem(RSA, b"password")):
        with pytest.raises(ConfigError, match="not a private key in PEM"):
            algorithm_of(text)
    with pytest.raises(ConfigError, match="the key does not fit ES256"):
        mint({}, private_pem(RSA), "ES256")


def test_keys_compare_without_showing_themselves() -> None:
    assert "material" not in repr(Key(frozenset(), b"secret"))
