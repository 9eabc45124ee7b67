"""The connections to Redis: how its servers are found, and how they are held.

A *link* is three connections that are held for as long as all is well: one that appends, one that
reads the log, one that asks. Any failure of one of them is one error, `LinkLost`. Then all three are closed,
because an answer that came too late would be taken for another.
"""

import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Final, TypeAlias

import attrs
import trio

from broker.config.engine_url import RedisUrl
from broker.engines.redis_wire import (
    CALL_SECONDS,
    FAILURES,
    ErrorReply,
    LinkLost,
    Place,
    Wire,
    open_wire,
    reason_of,
    to_text,
)
from broker.errors import ConfigError

UNREADABLE: Final = ValueError, LookupError, TypeError, AttributeError
"""Raised where data in Redis are not what we have written there: another program has."""


def unreadable(error: Exception) -> str:
    """The reason that is told then."""
    return f"what is in Redis cannot be read: {type(error).__name__}: {error}"[:200]


@attrs.frozen
class Link:
    """Three connections to one server."""

    writer: Wire
    pump: Wire
    reader: Wire


Use = Callable[[Link], Awaitable[None]]


async def use_link(url: RedisUrl, use: Use) -> str:
    """Open a link and use it; return why it was lost, "" if `use` came to its end.

    Raises nothing but what is no failure of the link. Cancelled, all is closed.
    """
    try:
        async with _open_link(url) as link:
            await use(link)
    except LinkLost as error:
        return str(error)
    except FAILURES as error:
        return reason_of(error)
    except UNREADABLE as error:
        return unreadable(error)
    return ""


@asynccontextmanager
async def _open_link(url: RedisUrl) -> AsyncGenerator[Link]:
    open_at = _opener(url)
    if url.service:
        place = await _primary(url)
    else:
        place = Place(url.socket) if url.socket else await _home(url, open_at)
    async with AsyncExitStack() as stack:
        held = [await stack.enter_async_context(open_at(place)) for _ in range(3)]
        if url.service and (await held[0].call(b"ROLE"))[0] != b"master":
            raise LinkLost(f"{place} is no primary, though Sentinels say so")
        yield Link(*held)


Opener: TypeAlias = Callable[[Place], AbstractAsyncContextManager[Wire]]
"""Connects to a place as the URL says. All that one link opens share its TLS context: to make one reads files."""


def _opener(url: RedisUrl) -> Opener:
    context = _tls_context(url)
    return lambda place: open_wire(place, context, url.user, url.password, url.db)


async def _primary(url: RedisUrl) -> Place:
    """The primary that the first of the Sentinels names that can be reached. Raises one of `FAILURES`."""
    failure: Exception = OSError("no host is named")
    for host in [Place("", *each) for each in url.hosts]:
        try:
            async with open_wire(host) as wire:
                with trio.fail_after(CALL_SECONDS):
                    found = await wire.ask(b"SENTINEL", b"GET-MASTER-ADDR-BY-NAME", url.service)
        except FAILURES as error:
            failure = error
            continue
        if found:
            return Place("", to_text(found[0]), int(found[1]))
        failure = OSError(f"the Sentinel at {host} does not know {url.service}")
    raise failure


async def _home(url: RedisUrl, open_at: Opener) -> Place:
    """Where our keys are: of a cluster, the node that its nodes name. Raises one of `FAILURES`."""
    failure: Exception = OSError("no host is named")
    for host in [Place("", *each) for each in url.hosts]:
        try:
            async with open_at(host) as wire:
                try:
                    with trio.fail_after(CALL_SECONDS):
                        await wire.ask(b"EXISTS", url.key + ":log")
                except ErrorReply as error:
                    kind, _, rest = str(error).partition(" ")
                    if kind != "MOVED":
                        raise
                    name, _, port = rest.partition(" ")[2].rpartition(":")
                    return Place("", name or host.host, int(port))
                return host
        except FAILURES as error:
            failure = error
    raise failure


def _tls_context(url: RedisUrl) -> ssl.SSLContext | None:
    return ssl.create_default_context(cafile=url.ca) if url.tls else None


def check_installed(url: RedisUrl) -> None:
    """Get the library ready. Raises `ConfigError` where it is not installed, and for a certificate that
    cannot be read."""
    try:
        import hiredis  # noqa: F401 - see `redis_wire`
    except ImportError:
        text = "engine: Redis needs the extra `redis`: pip install '.[redis]'"
        raise ConfigError(text) from None
    try:
        _tls_context(url)
    except OSError as error:
        raise ConfigError(f"engine: ca: {error}") from error
