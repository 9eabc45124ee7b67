"""Where a broker is, from its URL, and how it is reached."""

import ssl
from collections.abc import Awaitable, Callable
from urllib.parse import quote, urlsplit

import trio

from broker.errors import ClientError

OpenStream = Callable[[str, int], Awaitable[trio.abc.Stream]]
"""Called with host and port; returns the connected stream that WebSocket is spoken over."""


# Sent as they are; the rest of a path or query is percent-encoded (RFC 3986 sections 3.3 and 3.4).
_PLAIN = "/?:@!$&'()*+,;=-._~%"


def split_url(url: str) -> tuple[str, int, str]:
    """Host, port and the path with its query, ready for a request line.

    By example: `ws://localhost:9501`, `wss://example.com/connection/websocket?a=1`,
    `ws://[::1]:9501`, `ws://例え.jp/é`; invalid: `http://…`, `ws://`, `ws://a..b`, `ws://host:0`.
    A fragment is left out (RFC 6455 section 3). Raises `ClientError`, naming the URL.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
        (parts.hostname or "").encode("idna")  # as the resolver does it
    except ValueError as error:  # UnicodeError is one
        raise ClientError(f"{url!r} is not a WebSocket URL: {error}") from None
    if parts.scheme not in ("ws", "wss") or not parts.hostname or port == 0:
        raise ClientError(
            f"{url!r} is not a WebSocket URL: it must look like ws://host:9501 or wss://host"
        )
    if parts.username is not None:
        raise ClientError(
            f"the URL for {parts.hostname!r} names a user: give a token, or an Authorization header"
        )
    resource = parts.path or "/"
    if parts.query:
        resource += f"?{parts.query}"
    resource = quote(resource, safe=_PLAIN)
    return parts.hostname, port or (443 if parts.scheme == "wss" else 80), resource


def host_header(host: str, port: int) -> str:
    """The value of the `Host` header: without the port where it is the usual one."""
    name = f"[{host}]" if ":" in host else host
    return name if port in (80, 443) else f"{name}:{port}"


def opener(url: str, ssl_context: ssl.SSLContext | None) -> OpenStream:
    """How the broker at `url` is reached: over TCP, and TLS for `wss` (None: the system's
    certificates)."""
    if urlsplit(url).scheme != "wss":
        return trio.open_tcp_stream

    async def open_tls(host: str, port: int) -> trio.abc.Stream:
        # https_compatible: peers close TCP without a TLS goodbye, and WebSocket has its own.
        return await trio.open_ssl_over_tcp_stream(
            host, port, ssl_context=ssl_context, https_compatible=True
        )

    return open_tls
