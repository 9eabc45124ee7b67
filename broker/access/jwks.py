"""An issuer's published keys (RFC 7517), fetched over HTTP and kept.

Rules:

1. One task fetches, at most every `jwks_retry_seconds`; a client that needs a key waits for it or
   takes one that is there. So a client that goes away cancels nobody's fetch.
2. A fetch that fails leaves the keys as they were: an issuer that is down locks out nobody who has
   a token.
"""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from math import inf
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import structlog
import trio

from broker.access.keys import Key, keys_of_jwks, load_keys
from broker.access.tokens import Tokens
from broker.config.settings import Config, TokenRules
from broker.core.scopes import name_scope
from broker.errors import KeysUnavailable
from broker.transport.http_client import open_http_client, reason_of

if TYPE_CHECKING:
    from httpx2 import AsyncClient

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("broker")

FETCH_SECONDS = 10.0
"""An issuer that takes longer is as good as down; clients wait meanwhile."""

MAX_BYTES = 2**20
"""A set of a hundred RSA keys has 50 KB."""

Fetch = Callable[[], Awaitable[bytes]]
"""Gets the key set. An exception counts as a failed fetch; it is cancelled when it takes long."""


class FetchFailed(Exception):
    """The issuer has not answered with a key set; the message says what it did."""


class Jwks:
    """The keys of one issuer: a `KeySource`, as long as `run` runs."""

    def __init__(self, fetch: Fetch, rules: TokenRules) -> None:
        self._fetch = fetch
        self._rules = rules
        self._keys: dict[str, Key] = {}
        self._failed = True
        self._wanted = trio.Event()
        self._fetched = trio.Event()
        self._fetching = False
        self._not_before = -inf

    async def run(self) -> None:
        """Fetch now, then every so often, and when a key is asked for that is not there."""
        while True:
            self._not_before = trio.current_time() + self._rules.jwks_retry_seconds
            self._fetching = True
            await self._fetch_once()
            self._fetching = False
            fetched, self._fetched = self._fetched, trio.Event()
            self._wanted = trio.Event()
            fetched.set()
            rules = self._rules
            pause = rules.jwks_retry_seconds if self._failed else rules.jwks_seconds
            with trio.move_on_after(pause):
                await self._wanted.wait()

    async def _fetch_once(self) -> None:
        try:
            with trio.fail_after(FETCH_SECONDS):
                text = await self._fetch()
            self._keys = keys_of_jwks(text)
        except trio.TooSlowError:
            self._fail(f"no answer within {FETCH_SECONDS:g} s")
        except Exception as error:  # noqa: BLE001 - one failed fetch ends neither us nor the next
            self._fail(reason_of(error))
        else:
            self._failed = False
            log.info("jwks_fetched", url=shown(self._rules.jwks_url), keys=len(self._keys))

    def _fail(self, reason: str) -> None:
        self._failed = True
        url = shown(self._rules.jwks_url)
        log.warning("jwks_failed", url=url, reason=reason, kept=len(self._keys))

    def known(self, kid: str) -> Key | None:
        """The key of that name, as far as it is here."""
        return self._keys.get(kid)

    async def key(self, kid: str) -> Key | None:
        """The key of that name; None if a set that came after asking has none.

        Raises `KeysUnavailable` if that set could not be fetched, or not so soon after the last:
        the key may be a new one, so its bearer should ask again.
        """
        await trio.lowlevel.checkpoint()
        if kid in self._keys:
            return self._keys[kid]
        if not self._fetching and trio.current_time() < self._not_before:
            why = "cannot be fetched" if self._failed else "was fetched just now"
            raise KeysUnavailable(f"the key is not in the set, which {why}")
        self._wanted.set()
        await self._fetched.wait()
        if kid in self._keys:
            return self._keys[kid]
        if self._failed:
            raise KeysUnavailable("the key is not in the set, which cannot be fetched")
        return None


def shown(url: str) -> str:
    """A URL as logs may have it: a password, or a key in the query, is nobody else's."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


@asynccontextmanager
async def open_tokens(config: Config, now: Callable[[], float]) -> AsyncGenerator[Tokens]:
    """Open the verifier of one broker's tokens; it fetches keys for as long as the block.

    Raises `ConfigError` for keys that cannot be used.
    """
    rules = config.tokens
    if rules.public_keys or rules.hmac_secret_file:
        keys = await trio.to_thread.run_sync(load_keys, rules, abandon_on_cancel=True)
    else:
        keys = load_keys(rules)
    if not rules.jwks_url:
        yield Tokens(rules, keys, now)
        return
    async with (
        open_http_client("tokens.jwks_url", "jwks") as client,
        trio.open_nursery() as nursery,
    ):
        name_scope(nursery, "tokens")
        jwks = Jwks(partial(fetch_text, client, rules.jwks_url), rules)
        nursery.start_soon(jwks.run)
        yield Tokens(rules, keys, now, jwks)
        nursery.cancel_scope.cancel()


async def fetch_text(client: "AsyncClient", url: str) -> bytes:
    """GET a small document. Raises `FetchFailed` for any status but 200, or when it is not small.

    Redirects are not followed: the settings alone decide whose keys count.
    """
    headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
    async with client.stream("GET", url, headers=headers) as response:
        if response.status_code != 200:
            raise FetchFailed(f"status {response.status_code}")
        body = bytearray()
        # Read to the end, or to the caller's deadline: httpx2's generators are not to be left early.
        async for chunk in response.aiter_raw():
            if len(body) <= MAX_BYTES:
                body += chunk
    if len(body) > MAX_BYTES:
        raise FetchFailed(f"more than {MAX_BYTES} bytes")
    return bytes(body)
