"""HTTP requests that the broker itself makes of a backend: signed, bounded, each with a deadline.

Rules:

1. A request is signed, as `signing` says, so a backend can tell that it comes from here.
2. Redirects are not followed and cookies not kept: who is asked is for the settings to say.
3. Of an answer that is too long, no more is read than shows it.
"""

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING

import attrs
import trio

from broker.core.signing import signature
from broker.errors import ConfigError
from broker.version import VERSION

if TYPE_CHECKING:
    from httpx2 import AsyncClient

MAX_ANSWER_BYTES = 64 * 2**10
"""A backend has little to say: yes, no, who it is."""


@asynccontextmanager
async def open_http_client(setting: str, extra: str) -> AsyncGenerator["AsyncClient"]:
    """What makes requests for as long as the block. It has no deadlines of its own.

    Raises `ConfigError` if the package for it is missing, in the name of the `setting` that needs
    it and the `extra` that it comes with.
    """
    try:
        from httpx2 import AsyncClient
    except ModuleNotFoundError:
        raise ConfigError(
            f"{setting} needs the package `httpx2`: pip install 'trio-broker[{extra}]'"
        ) from None
    async with AsyncClient(timeout=None) as client:
        yield client


@attrs.frozen
class Answer:
    """`retry_after` is the header as it came, "" if there is none; `body` is None if too long."""

    status: int
    retry_after: str
    body: bytes | None


_NO_HEADERS: Mapping[str, str] = MappingProxyType({})


@attrs.frozen
class Backend:
    """Where requests go to. `secret` is as in the settings; "" for no signature."""

    client: "AsyncClient"
    secret: str = attrs.field(repr=False)
    now: Callable[[], float]

    async def post(
        self,
        url: str,
        request_id: str,
        body: bytes,
        seconds: float,
        more_headers: Mapping[str, str] = _NO_HEADERS,
    ) -> Answer:
        """POST JSON, and return the answer once it is complete. `more_headers` have lower-case
        names, and go out in UTF-8.

        Raises what `httpx2` raises, and `trio.TooSlowError` after that many `seconds`.
        """
        headers = {
            "user-agent": f"trio-broker/{VERSION}",
            **more_headers,
            "content-type": "application/json",
            "accept-encoding": "identity",
            **signature(self.secret, request_id, self.now(), body),
        }
        self.client.cookies.clear()
        with trio.fail_after(seconds):
            fields = [(name.encode(), value.encode()) for name, value in headers.items()]
            async with self.client.stream("POST", url, content=body, headers=fields) as response:
                answer = bytearray()
                # Cancelled, not left: so httpx2's own generators end as well.
                with trio.CancelScope() as reading:
                    async for chunk in response.aiter_raw():
                        answer += chunk
                        if len(answer) > MAX_ANSWER_BYTES:
                            reading.cancel()
                fits = len(answer) <= MAX_ANSWER_BYTES
        retry_after = response.headers.get("retry-after", "")
        return Answer(response.status_code, retry_after, bytes(answer) if fits else None)
