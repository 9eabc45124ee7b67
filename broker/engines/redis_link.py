"""The connections to Redis: the one module that knows the client library, which is coredis.

A *link* is three connections that are held for as long as all is well: one that appends, one that
reads the log, one that asks. Any failure of one of them is one error, `LinkLost`. Then all three are closed,
because an answer that came too late would be taken for another.

The library is imported when a link is opened, so that a broker without Redis needs none.
"""

import logging
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from hashlib import sha1
from typing import TYPE_CHECKING, Any, Final

import attrs
import trio

from broker.config.engine_url import RedisUrl
from broker.errors import ConfigError

if TYPE_CHECKING:
    from coredis.connection import BaseConnection, TCPLocation
    from coredis.pool import ConnectionPool

CALL_SECONDS: Final = 2.0
"""How long an answer may take. A failover takes longer, and then another server answers."""

CONNECT_SECONDS: Final = 2.0


class LinkLost(Exception):
    """The connections to Redis are of no use any more; the text says why."""


def to_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def to_text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


@attrs.define(eq=False)
class Script:
    """A Lua script, called by its digest."""

    text: str
    sha: bytes = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.sha = sha1(self.text.encode()).hexdigest().encode()  # noqa: S324 - Redis' own name


Part = bytes | str | int
"""A part of a command. A text may have half a surrogate pair, which the app may give it."""


@attrs.define(eq=False)
class Wire:
    """One connection. Several may wait for answers at once, which come in order."""

    _connection: "BaseConnection"

    async def call(self, command: bytes, *parts: Part, seconds: float | None = None) -> Any:
        """Send a command and wait for its answer. Raises `LinkLost`."""
        try:
            return await self._ask(command, parts, seconds or CALL_SECONDS)
        except _foreign_errors() as error:
            raise LinkLost(_reason(error)) from error

    async def run(self, script: Script, key: str, *parts: Part) -> Any:
        """Run a script on a key. One that the server does not know is sent along. Raises `LinkLost`."""
        from coredis.exceptions import NoScriptError

        try:
            try:
                return await self._ask(b"EVALSHA", (script.sha, 1, key, *parts), CALL_SECONDS)
            except NoScriptError:
                return await self._ask(b"EVAL", (script.text, 1, key, *parts), CALL_SECONDS)
        except _foreign_errors() as error:
            raise LinkLost(_reason(error)) from error

    async def _ask(self, command: bytes, parts: tuple[Part, ...], seconds: float) -> Any:
        with trio.fail_after(seconds):
            written = [to_bytes(each) if type(each) is str else each for each in parts]
            return await self._connection.create_request(command, *written, decode=False)


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
    reason = ""
    try:
        async with _open_pool(url) as pool:
            # Nothing may be raised through the pool: it makes a group of whatever it is.
            try:
                async with AsyncExitStack() as stack:
                    held = [await _hold(pool, stack) for _ in range(3)]
                    await use(Link(*held))
            except LinkLost as error:
                reason = str(error)
            except _foreign_errors() as error:
                reason = _reason(error)
            except UNREADABLE as error:
                reason = unreadable(error)
    except* _foreign_errors() as group:  # by the tasks of the pool, as it is closed
        reason = reason or _reason(group.exceptions[0])
    return reason


async def _hold(pool: "ConnectionPool[Any]", stack: AsyncExitStack) -> Wire:
    with trio.fail_after(2 * CONNECT_SECONDS):
        return Wire(await stack.enter_async_context(pool.acquire()))


@asynccontextmanager
async def _open_pool(url: RedisUrl) -> AsyncGenerator["ConnectionPool[Any]"]:
    from coredis import Sentinel
    from coredis.connection import TCPLocation, UnixDomainSocketLocation
    from coredis.pool import ConnectionPool

    options: dict[str, Any] = {
        "username": url.user,
        "password": url.password,
        "db": url.db,
        "connect_timeout": CONNECT_SECONDS,
        "ssl_context": _tls_context(url),
    }
    hosts = [TCPLocation(*each) for each in url.hosts]
    if url.service:
        timeouts = {"connect_timeout": CONNECT_SECONDS, "stream_timeout": CALL_SECONDS}
        async with Sentinel(hosts, sentinel_kwargs=timeouts, **options) as sentinel:
            async with sentinel.primary_for(url.service).connection_pool as primaries:
                yield primaries
    else:
        location: UnixDomainSocketLocation | TCPLocation
        if url.socket:
            await _probe(url.socket)
            location = UnixDomainSocketLocation(url.socket)
        else:
            location = await _home(url, options)
        async with ConnectionPool(location=location, **options) as pool:
            yield pool


async def _probe(where: "str | TCPLocation") -> None:
    """Raise an `OSError` that says why, where nothing listens: the library would only say that it is so, and
    leave half a connection behind."""
    with trio.fail_after(CONNECT_SECONDS):
        if isinstance(where, str):
            stream = await trio.open_unix_socket(where)
        else:
            stream = await trio.open_tcp_stream(where.host, where.port)
        await stream.aclose()


async def _home(url: RedisUrl, options: dict[str, Any]) -> "TCPLocation":
    """Where our keys are: of a cluster, the node that its nodes name. Raises an `OSError` where none can be
    reached, and what else a link may be lost to."""
    from coredis.connection import TCPLocation
    from coredis.exceptions import MovedError
    from coredis.pool import ConnectionPool

    failure: Exception = OSError("no host is named")
    for host in [TCPLocation(*each) for each in url.hosts]:
        try:
            await _probe(host)
        except (OSError, trio.TooSlowError) as error:
            failure = error
            continue
        home, refusal = host, None
        async with ConnectionPool(location=host, **options) as pool:
            try:
                with trio.fail_after(CALL_SECONDS):
                    async with pool.acquire() as connection:
                        await connection.create_request(b"EXISTS", to_bytes(url.key + ":log"))
            except MovedError as moved:
                home = TCPLocation(moved.host or host.host, moved.port)
            except _foreign_errors() as error:  # nothing may be raised through the pool
                refusal = error
        if refusal is None:
            await _probe(home)
            return home
        failure = refusal
    raise failure


def _tls_context(url: RedisUrl) -> ssl.SSLContext | None:
    return ssl.create_default_context(cafile=url.ca) if url.tls else None


def check_installed(url: RedisUrl) -> None:
    """Get the library ready. Raises `ConfigError` where it is not installed, and for a certificate that
    cannot be read."""
    try:
        import coredis  # noqa: F401 - see the module
    except ImportError:
        text = "engine: Redis needs the extra `redis`: pip install '.[redis]'"
        raise ConfigError(text) from None
    # We report a lost connection ourselves, once.
    logging.getLogger("coredis").setLevel(logging.CRITICAL + 1)
    try:
        _tls_context(url)
    except OSError as error:
        raise ConfigError(f"engine: ca: {error}") from error


def _foreign_errors() -> tuple[type[Exception], ...]:
    """All that a failure of the link may raise."""
    import anyio
    from coredis.exceptions import RedisError

    broken = anyio.BrokenResourceError, anyio.ClosedResourceError, anyio.EndOfStream
    return RedisError, *broken, OSError, trio.TooSlowError


def _reason(error: BaseException) -> str:
    """An error as a log tells of it, with the one that it came from."""
    if isinstance(error, BaseExceptionGroup):
        return _reason(error.exceptions[0])
    if isinstance(error, trio.TooSlowError):
        return "it does not answer"
    text = str(error) or type(error).__name__
    why = "" if error.__cause__ is None else _reason(error.__cause__)
    return text if why in text else f"{text}: {why}"
