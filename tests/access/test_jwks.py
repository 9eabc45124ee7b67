"""Keys that are fetched: when, how often, and what happens when the issuer does not answer."""

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest
import trio
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from jwt.algorithms import OKPAlgorithm
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from structlog.testing import capture_logs
from trio.testing import MockClock, wait_all_tasks_blocked

from broker.access import jwks
from broker.access.jwks import FetchFailed, Jwks, fetch_text, open_tokens
from broker.access.keys import keys_of_jwks
from broker.access.minting import mint
from broker.access.tokens import Tokens
from broker.config.settings import Config, TokenRules
from broker.errors import KeysUnavailable, TokenInvalid

URL = "https://issuer.example/jwks.json"
RULES = TokenRules(jwks_url=URL, jwks_seconds=100, jwks_retry_seconds=10)


class Issuer:
    """Publishes keys; may be down, slow, or talk nonsense."""

    def __init__(self, *kids: str) -> None:
        self.private = {kid: ed25519.Ed25519PrivateKey.generate() for kid in kids}
        self.fetches: list[float] = []
        self.delay = 0.0
        self.error: Exception | None = None
        self.text: bytes | None = None

    def rotate(self, *kids: str) -> None:
        self.private = {
            kid: self.private.get(kid) or ed25519.Ed25519PrivateKey.generate() for kid in kids
        }

    def document(self) -> bytes:
        keys = []
        for kid, private in self.private.items():
            key = OKPAlgorithm.to_jwk(private.public_key(), as_dict=True)
            keys.append({**key, "kid": kid})
        return json.dumps({"keys": keys}).encode()

    def token(self, kid: str, user: str = "alice") -> str:
        pem = self.private[kid].private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return mint({"sub": user}, pem, "EdDSA", kid)

    async def fetch(self) -> bytes:
        self.fetches.append(trio.current_time())
        await trio.sleep(self.delay)
        if self.error is not None:
            raise self.error
        return self.document() if self.text is None else self.text


@asynccontextmanager
async def running(issuer: Issuer, rules: TokenRules = RULES) -> AsyncIterator[Jwks]:
    source = Jwks(issuer.fetch, rules)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(source.run)
        yield source
        nursery.cancel_scope.cancel()


async def test_a_token_is_verified_by_the_key_that_it_names(autojump_clock: MockClock) -> None:
    issuer = Issuer("a", "b")
    async with running(issuer) as source:
        tokens = Tokens(RULES, (), lambda: 0.0, source)
        assert tokens.enabled
        for kid in ("a", "b"):
            assert (await tokens.connection(issuer.token(kid))).user == "alice"
        assert len(issuer.fetches) == 1
        impostor = Issuer("a")
        with pytest.raises(TokenInvalid):
            await tokens.connection(impostor.token("a"))


async def test_a_session_that_comes_before_the_first_fetch_is_done_waits_for_it(
    autojump_clock: MockClock,
) -> None:
    issuer = Issuer("a")
    issuer.delay = 3
    async with running(issuer) as source:
        await wait_all_tasks_blocked()
        assert await source.key("a") is not None
        assert trio.current_time() - issuer.fetches[0] == 3


async def test_the_set_is_fetched_again_every_so_often(autojump_clock: MockClock) -> None:
    issuer = Issuer("a", "b")
    async with running(issuer) as source:
        assert await source.key("a")
        issuer.rotate("b")
        await trio.sleep(99)
        assert await source.key("a")
        await trio.sleep(12)
        assert await source.key("a") is None
        assert await source.key("b")
    assert [at - issuer.fetches[0] for at in issuer.fetches][:2] == [0, 100]


async def test_an_unknown_key_has_the_set_fetched_at_once(autojump_clock: MockClock) -> None:
    issuer = Issuer("a")
    async with running(issuer) as source:
        await source.key("a")
        await trio.sleep(50)
        issuer.rotate("a", "new")
        assert await source.key("new")
        assert [at - issuer.fetches[0] for at in issuer.fetches] == [0, 50]


async def test_made_up_keys_do_not_hammer_the_issuer(autojump_clock: MockClock) -> None:
    issuer = Issuer("a")
    async with running(issuer) as source:
        await source.key("a")
        await trio.sleep(20)
        assert await source.key("made-up 1") is None
        for number in range(100):
            await trio.sleep(0.05)
            # It may be a new key, for all we know: not refused for good.
            with pytest.raises(KeysUnavailable, match="fetched just now"):
                await source.key(f"made-up {number}")
        assert len(issuer.fetches) == 2
        await trio.sleep(10)
        assert await source.key("made-up 1") is None
        assert len(issuer.fetches) == 3


async def test_many_who_ask_at_once_are_served_by_one_fetch(autojump_clock: MockClock) -> None:
    issuer = Issuer("a")
    async with running(issuer) as source:
        await source.key("a")
        await trio.sleep(20)
        issuer.delay = 1
        issuer.rotate("new")
        found = []

        async def ask(patience: float) -> None:
            with trio.move_on_after(patience):
                found.append(await source.key("new"))

        async with trio.open_nursery() as nursery:
            for patience in (0.5, 9, 9, 9):  # the first goes away before the answer
                nursery.start_soon(ask, patience)
        assert len(found) == 3
        assert None not in found
        assert len(issuer.fetches) == 2


@pytest.mark.parametrize(
    "trouble",
    [
        lambda issuer: setattr(issuer, "error", OSError("down")),
        lambda issuer: setattr(issuer, "text", b"<html>"),
        lambda issuer: setattr(issuer, "delay", 1000),
    ],
    ids=["down", "nonsense", "slow"],
)
async def test_an_issuer_that_is_down_locks_out_nobody_who_has_a_token(
    trouble: Callable[[Issuer], None], autojump_clock: MockClock
) -> None:
    issuer = Issuer("a")
    async with running(issuer) as source:
        await source.key("a")
        trouble(issuer)
        await trio.sleep(1000)
        assert len(issuer.fetches) > 30  # it is tried again, every 10 or 20 s
        assert await source.key("a")
        with pytest.raises(KeysUnavailable):
            await source.key("b")
        issuer.error, issuer.text, issuer.delay = None, None, 0
        issuer.rotate("b")
        await trio.sleep(25)
        assert await source.key("b")
        assert await source.key("a") is None


async def test_without_any_key_so_far_a_client_is_told_to_come_back(
    autojump_clock: MockClock,
) -> None:
    issuer = Issuer("a")
    issuer.error = OSError("down")
    async with running(issuer) as source:
        tokens = Tokens(RULES, (), lambda: 0.0, source)
        for _ in range(3):
            with pytest.raises(KeysUnavailable, match="cannot be fetched"):
                await tokens.connection(issuer.token("a"))
            await trio.sleep(3)


async def test_a_token_that_names_no_key_is_nobodys(autojump_clock: MockClock) -> None:
    issuer = Issuer("a")
    async with running(issuer) as source:
        tokens = Tokens(RULES, (), lambda: 0.0, source)
        await source.key("a")
        pem = issuer.private["a"].private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        with pytest.raises(TokenInvalid):
            await tokens.connection(mint({}, pem, "EdDSA"))


async def test_the_issuer_is_not_asked_for_secrets(autojump_clock: MockClock) -> None:
    issuer = Issuer("a")
    async with running(issuer) as source:
        await source.key("a")
        await trio.sleep(20)
        tokens = Tokens(RULES, (), lambda: 0.0, source)
        with pytest.raises(TokenInvalid):
            await tokens.connection(mint({}, b"x" * 32, "HS256", "made-up"))
        assert len(issuer.fetches) == 1


async def test_keys_of_the_settings_count_beside_those_of_the_issuer(
    autojump_clock: MockClock,
) -> None:
    issuer, ours = Issuer("a"), Issuer("ours")
    issuer.error = OSError("down")
    async with running(issuer) as source:
        keys = keys_of_jwks(ours.document())
        tokens = Tokens(RULES, tuple(keys.values()), lambda: 0.0, source)
        assert (await tokens.connection(ours.token("ours", "bob"))).user == "bob"
        with pytest.raises(KeysUnavailable):
            await tokens.connection(issuer.token("a"))


# over HTTP: a whole server in memory


@asynccontextmanager
async def serving(answer: Callable[[Request], Response]) -> AsyncIterator[httpx2.AsyncClient]:
    async def endpoint(request: Request) -> Response:
        return answer(request)

    app = Starlette(routes=[Route("/jwks.json", endpoint)])
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app)) as client:
        yield client


async def test_the_document_is_fetched() -> None:
    async with serving(lambda request: PlainTextResponse("keys")) as client:
        assert await fetch_text(client, URL) == b"keys"


@pytest.mark.parametrize(
    "answer, message",
    [
        (lambda request: PlainTextResponse("no", 404), "status 404"),
        (lambda request: RedirectResponse("https://evil.example/"), "status 307"),
        (lambda request: PlainTextResponse("x" * (jwks.MAX_BYTES + 1)), "more than 1048576 bytes"),
    ],
)
async def test_an_answer_that_is_not_plain_or_too_large_is_a_failure(
    answer: Any, message: str
) -> None:
    async with serving(answer) as client:
        with pytest.raises(FetchFailed, match=message):
            await fetch_text(client, URL)


async def test_settings_without_a_url_fetch_nothing() -> None:
    async with open_tokens(Config(), lambda: 0.0) as tokens:
        assert not tokens.enabled
    rules = TokenRules(hmac_secret="x" * 32)
    async with open_tokens(Config(tokens=rules), lambda: 5.0) as tokens:
        assert tokens.enabled
        assert tokens.source is None
        assert tokens.now() == 5.0


async def test_the_log_names_the_issuer_and_no_secret(autojump_clock: MockClock) -> None:
    issuer = Issuer("a")
    issuer.error = FetchFailed("status 500")
    rules = TokenRules(jwks_url="https://me:s3cret@issuer.example:8443/keys?key=s3cret#s3cret")
    with capture_logs() as logs:
        async with running(issuer, rules):
            await wait_all_tasks_blocked()
    [line] = logs
    assert line["url"] == "https://issuer.example:8443/keys"
    assert "s3cret" not in str(line)
