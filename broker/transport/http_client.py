"""HTTP requests that the broker itself makes of a backend: signed, bounded, each with a deadline.

Rules:

1. A request is signed, as `signing` says, so a backend can tell that it comes from here.
2. Redirects are not followed and cookies not kept: the settings alone say who is asked.
3. Of an answer that is too long, no more is read than shows it.
4. A request that fails raises one error, `HttpFailed`, whose text says why.
5. The caller bounds the number of requests at once: nothing waits here.
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
    """A client that makes requests for as long as the block. It has no deadlines of its own.

    Raises `ConfigError` if the package for it is missing, in the name of the `setting` that needs
    it and the `extra` that it comes with.
    """
    try:
        from httpx2 import AsyncClient, Limits
    except ModuleNotFoundError:
        raise ConfigError(
            f"{setting} needs the package `httpx2`: pip install '.[{extra}]'"
        ) from None
    # A request that waited for a connection in there would wait in the time that the other side has.
    limits = Limits(max_connections=None, max_keepalive_connections=None)
    async with AsyncClient(timeout=None, limits=limits) as client:
        yield client


class HttpFailed(Exception):
    """A request without a whole answer; the message says why, in one line."""


REASON_LENGTH = 300
"""Characters of a reason: it goes to a log, and may hold what the other side has sent."""


def reason_of(error: BaseException) -> str:
    """The reason of a failed request in one line: its class, its words, and those of its root cause.

    `httpx2` gives its errors the words of what they come from, which may have none itself: Trio's
    for a broken TLS handshake has not, and the one below it says which certificate.
    """
    words: list[str] = []
    link: BaseException | None = error
    while link is not None and len(words) < _CAUSES:
        is_group = isinstance(link, BaseExceptionGroup)
        words.append("" if is_group else " ".join(str(link).split()))
        if isinstance(link, BaseExceptionGroup):
            link = link.exceptions[0]
        else:
            # Also what was put aside by `from None`, as httpcore2 does with all that it translates.
            link = link.__cause__ or link.__context__
    said = [each for each in words if each]
    text = type(error).__name__
    if said:
        text = f"{text}: {said[0]}"
        if said[-1] not in text:
            text = f"{text} ({said[-1]})"
    return text[:REASON_LENGTH]


_CAUSES = 20
"""How deep is looked for the root cause; eight is what a failed connect has."""


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

        Raises `HttpFailed`, also after that many `seconds` without the whole answer. Cancelled, the
        connection is closed, which tells a backend that nobody waits.
        """
        try:
            with trio.fail_after(seconds):
                return await self._post(url, request_id, body, more_headers)
        except trio.TooSlowError:
            raise HttpFailed(f"no answer within {seconds:g} s") from None
        except Exception as error:
            raise HttpFailed(reason_of(error)) from error

    async def _post(
        self, url: str, request_id: str, body: bytes, more_headers: Mapping[str, str]
    ) -> Answer:
        headers = {
            "user-agent": f"trio-broker/{VERSION}",
            **more_headers,
            "content-type": "application/json",
            "accept-encoding": "identity",
            **signature(self.secret, request_id, self.now(), body),
        }
        self.client.cookies.clear()
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
