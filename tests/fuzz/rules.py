"""Targets of rules: tag filters, tokens and keys, settings."""

import base64
import hashlib
import hmac
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import attrs
import msgspec

from broker.access.keys import keys_of_jwks, secret_key
from broker.access.tokens import Tokens
from broker.config.loading import load
from broker.config.settings import Config, TokenRules
from broker.core.audience_index import AudienceIndex
from broker.core.hub import Hub
from broker.core.json_reader import BadJson, read
from broker.core.session import Subscription
from broker.core.tags import CompiledFilter, FilterNode, check_filter, matches
from broker.errors import ConfigError, TokenExpired, TokenInvalid
from tests.conftest import HMAC_SECRET
from tests.core.conftest import Listener, attach, join
from tests.fuzz.target import target

# tag filters


class _Case(msgspec.Struct):
    """Filters, and the tags of publications that they judge."""

    filters: list[FilterNode] = []
    tags: list[dict[str, str]] = []


MOST_FILTERS: Final = 12
MOST_TAGS: Final = 12


@target(
    "tags",
    b'{"filters":[{"key":"a","cmp":"eq","val":"1"},{"op":"and","nodes":[{"key":"a","cmp":"in","vals":["1","2",""]},{"key":"p","cmp":"gte","val":"10.50"}]}],"tags":[{"a":"1"},{"a":"2","p":"10.5"},{}]}',
    b'{"filters":[{"op":"or","nodes":[{"key":"a","cmp":"eq","val":"x"},{"key":"a","cmp":"eq","val":"y"}]},{"op":"not","nodes":[{"key":"b","cmp":"sw","val":"x"}]}],"tags":[{"a":"y","b":"xy"},{"b":"z"}]}',
    b'{"filters":[{"key":"a","cmp":"nin","vals":["","1"]},{"key":"a","cmp":"neq","val":""},{"key":"a","cmp":"nex"},{"key":"a","cmp":"ct","val":"b"}],"tags":[{"a":""},{"a":"abc"}]}',
    b'{"filters":[{"key":"n","cmp":"lt","val":"-0"},{"key":"n","cmp":"gt","val":"1_0"}],"tags":[{"n":"-1"},{"n":"\xd9\xa1"},{"n":"NaN"},{"n":"0x10"}]}',
    words=(
        b'{"key":"a","cmp":"eq","val":"1"},', b'"op":"not","nodes":[', b'"op":"and","nodes":[', b'"op":"or","nodes":[',
        b'"vals":["1",""]', b'"cmp":"lte"', b'"val":"1e9"', b'"val":"inf"', b'"val":" 1"', b'{"a":"1"},', b'"":""',
    ),
)  # fmt: skip
def tags(data: bytes) -> None:
    """A compiled filter, and an index of them, say what the definition says."""
    try:
        case = read(data, _Case)
    except BadJson:
        return
    index, members = AudienceIndex(), list[tuple[FilterNode, Subscription]]()
    for node in case.filters[:MOST_FILTERS]:
        try:
            check_filter(node)
        except ValueError as error:
            assert "\n" not in str(error)
            continue
        compiled = CompiledFilter(node)
        turned = CompiledFilter(_turned(node))
        assert compiled == turned
        assert hash(compiled) == hash(turned)
        member = join(attach(Hub[Listener](), "plain"), "news", wanted=compiled)
        members.append((node, member))
        index.add(member)
    for each in [{}, *case.tags[:MOST_TAGS]]:
        _judge(index, members, each)
    for _, member in members:
        index.remove(member)
    assert not len(index)
    assert not index._places


def _turned(node: FilterNode) -> FilterNode:
    """The same filter in another order."""
    nodes = tuple(map(_turned, reversed(node.nodes)))
    return msgspec.structs.replace(node, vals=node.vals[::-1], nodes=nodes)


def _judge(
    index: AudienceIndex,
    members: Sequence[tuple[FilterNode, Subscription]],
    tags: Mapping[str, str],
) -> None:
    audiences, _ = index.wanting(tags)
    found = {id(each) for audience in audiences for each in audience}
    assert sum(map(len, audiences)) == len(found), "one gets it twice"
    for node, member in members:
        wanted = member.wanted
        assert wanted is not None
        is_wanted = matches(node, tags)
        assert wanted.matches(tags) == is_wanted
        assert (id(member) in found) == is_wanted
        for equality in wanted.equalities:
            holds = tags.get(equality.key) in equality.values
            assert not is_wanted or holds, equality
            assert not equality.decides or not holds or is_wanted, equality


# tokens

RULES: Final = TokenRules(hmac_secret=HMAC_SECRET)
TOKENS: Final = Tokens(RULES, [secret_key(HMAC_SECRET.encode())], lambda: 1_700_000_000.0)
STRICT: Final = attrs.evolve(RULES, audience="us", issuer="them")
HASHES: Final = {"HS256": "sha256", "HS384": "sha384", "HS512": "sha512"}


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def signed(payload: bytes, header: bytes = b'{"alg":"HS256","typ":"JWT"}') -> str:
    start = f"{_encoded(header)}.{_encoded(payload)}"
    digest = hmac.digest(HMAC_SECRET.encode(), start.encode(), "sha256")
    return f"{start}.{_encoded(digest)}"


def _read_token(tokens: Tokens, token: str) -> list[Any]:
    """What either kind of it says."""
    found: list[Any] = []
    for verify in (tokens.connection_nowait, tokens.subscription_nowait):
        try:
            found.append(verify(token))
        except (TokenInvalid, TokenExpired):
            pass
    assert len(found) < 2, "of both kinds"
    return found


@target(
    "tokens",
    signed(b'{"sub":"a","exp":1800000000}').encode(),
    signed(b'{"sub":"a","channel":"c"}').encode() + b"\n",
    b"eyJhbGciOiJub25lIn0.e30.", b"a.b.c",
    signed(b"{}", b'{"alg":"HS256","crit":["b64"],"b64":false}').encode(),
    signed(b"{}", b'{"alg":"HS256","kid":null}').encode(),
    words=(b".", b"..", b"=", b"-_", b"eyJ", b"e30", _encoded(b'{"alg":"HS512"}').encode(), b"\xc3\xbc", b"\0"),
)  # fmt: skip
def tokens(data: bytes) -> None:
    """Nothing counts whose signature, made again here, is not that of the secret."""
    token = data.decode("utf-8", "surrogateescape")
    if not _read_token(TOKENS, token):
        return
    start, _, signature = token.rpartition(".")
    header = json.loads(base64.urlsafe_b64decode(start.partition(".")[0] + "=="))
    digest = hmac.digest(HMAC_SECRET.encode(), start.encode(), HASHES[header["alg"]])
    padded = signature + "=" * (-len(signature) % 4)
    assert base64.urlsafe_b64decode(padded) == digest


@target(
    "claims",
    b'{"sub":"a","exp":1800000000,"info":{"n":1},"channels":["a"],"subs":{"b":{"data":1,"b64info":"e30="}}}',
    b'{"sub":"a","channel":"c","client":"1","b64data":"e30=","expire_at":0,"aud":["us"],"iss":"them"}',
    b'{"sub":null,"exp":1e400,"nbf":-1,"aud":"us","jti":[1]}', b'{"sub":"\\ud83d"}',
    b'{"exp":1700000000,"nbf":1699999999.5,"expire_at":-5,"info":"\n"}',
    words=(b'"exp":', b'"nbf":', b'"expire_at":', b'"channel":"', b'"channels":[', b'"subs":{', b"null", b'"b64info":"',
           b"NaN", b"1e999", b'"aud":[', b'"\\ud83d"', b"[[[[[[[["),
    share=20,
)  # fmt: skip
def claims(data: bytes) -> None:
    """The claims of a token that is signed are what Python's reader finds, or it is refused."""
    digest = hashlib.sha256(data).digest()
    for rules in (RULES, STRICT):
        verifier = attrs.evolve(TOKENS, rules=rules)
        for found in _read_token(verifier, signed(data)):
            # `info` may hold what Python would not write again.
            theirs = json.loads(data.decode(), parse_int=float)
            assert found.user == (theirs.get("sub") or "")
            assert (theirs.get("exp") or 2e9) > 1_700_000_000 - rules.leeway_seconds
            for raw in (found.info, getattr(found, "data", None)):
                assert raw is None or b"\n" not in raw
            if rules is STRICT:
                assert theirs["iss"] == "them"
                assert theirs["aud"] == "us" or "us" in theirs["aud"]
    assert not _read_token(TOKENS, signed(data)[:-20] + _encoded(digest)[:20])


@target(
    "jwks",
    b'{"keys":[{"kty":"EC","crv":"P-256","kid":"a","x":"f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU","y":"x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"}]}',
    b'{"keys":[{"kty":"RSA","kid":"b","alg":"RS256","use":"sig","n":"sXchDaQebHnPiGvyDOAT4saGEUetSyo9MKLOoWFsueri23bOdgWp4Dy1WlUzewbgBHod5pcM9H95GQRV3JDXboIRROSBigeC5yjU1hGzHHyXss8UDprecbAYxknTcQkhslANGRUZmdTOQ5qTRsLAt6BTYuyvVRdhS8exSZEy_c4gs_7svlJJQ4H9_NxsiIoLwAEk7-Q3UXERGYw_75IDrGA84-lA_-Ct4eTlXHBIY2EaV7t7LjJaynVJCpkv4LKjTTAumiGUIuQhrNhZLuF_RJLqHpM2kgWFLU7-VTdL1VbC2tejvcI2BlMkEpk1BzBZI0KQB0GaDWFLN-aEAw3vRw","e":"AQAB"}]}',
    b'{"keys":[{"kty":"OKP","crv":"Ed25519","kid":"c","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"},{"kty":"oct","k":"AAAA","kid":"d"}]}',
    words=(b'"kid":', b'"alg":"ES256"', b'"use":"enc"', b'"key_ops":["verify"]', b"null", b'"kty":"oct"', b"AAAA", b"[]"),
)  # fmt: skip
def jwks(data: bytes) -> None:
    """Keys for public algorithms, or a refusal."""
    try:
        keys = keys_of_jwks(data)
    except ValueError:
        return
    for kid, key in keys.items():
        assert isinstance(kid, str)
        assert not key.algorithms & HASHES.keys(), "a public secret"


# settings

SCRATCH: Final = tempfile.TemporaryDirectory(prefix="fuzz-")


@target(
    "config",
    b'port = 9000\nhosts = ["a.example"]\n[topics]\nhistory_size = 10\n[topics.namespaces.chat]\nhistory_ttl = 5.5\n[[topics.patterns]]\nmatch = "news.>"\nretain = true\n',
    b'[tokens]\nhmac_secret = "0123456789abcdef0123456789abcdef"\nleeway_seconds = 1\n[webhooks]\nurl = "http://localhost/x"\n',
    b'allowed_origins = ["https://*.example.org", "null"]\ntrusted_proxies = ["10.0.0.0/8", "unix"]\nslow_consumer = "latest"\nmax_memory_bytes = 1_000_000_000\n',
    b'engine = "sqlite:///x.db?sync=process"\nmessage_rate = inf\nlog_level = "debug"\npaths = ["/", "/rooms/*"]\n',
    b"\nBROKER_PORT=9000\nBROKER_TOPICS_HISTORY_SIZE=1\nBROKER_HOSTS=a, b\nBROKER_DEMO_PAGE=true",
    b"\nBROKER_MESSAGE_RATE=1e3\nBROKER_API_KEY=k\nBROKER_PORTT=1\nBROKER_TOKEN_SECRET=x",
    words=(b"[topics]\n", b"[topics.namespaces.a]\n", b"[[topics.patterns]]\n", b'match = "', b" = nan\n", b" = -1\n",
           b" = 1979-05-27\n", b"engine = ", b"redis://", b"{a = 1}", b'"""', b"''", b"[[[[[[[[[[[[", b"\\U0010ffff",
           b"BROKER_", b"\nBROKER_ENGINE=sqlite:", b"0x", b".", b"max_connections", b"_seconds = "),
    share=12,
)  # fmt: skip
def config(data: bytes) -> None:
    """A config, or one line that says what is wrong. What begins with a line end is the environment."""
    path: Path | None = None
    environ: dict[str, str] = {}
    if data.startswith(b"\n"):
        text = data.decode("utf-8", "surrogateescape")
        pairs = [line.partition("=") for line in text.split("\n")]
        environ = {name: value for name, _, value in pairs if name}
    else:
        path = Path(SCRATCH.name) / "broker.toml"
        path.write_bytes(data)
    try:
        found = load(path, {}, environ=environ)
    except ConfigError as error:
        assert "\n" not in str(error), error
        assert str(error)
        return
    assert isinstance(found, Config)
    assert load(path, {}, environ=environ) == found
