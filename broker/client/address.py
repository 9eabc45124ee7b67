"""Where a broker is, from its URL, and how it is reached."""

import ssl
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

import trio

from broker.errors import ClientError

OpenStream = Callable[[str, int], Awaitable[trio.abc.Stream]]
"""Called with host and port; returns the connected stream that WebSocket is spoken over."""


def split_url(url: str) -> tuple[str, int, str]:
    """Host, port and the path with its query."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ClientError(f"{url!r} is not a WebSocket URL: {error}") from None
    if parts.scheme not in ("ws", "wss") or not parts.hostname:
        raise ClientError(
            f"{url!r} is not a WebSocket URL: it must look like ws://host:9501 or wss://host"
        )
    resource = parts.path or "/"
    if parts.query:
        resource += f"?{parts.query}"
    return parts.hostname, port or (443 if parts.scheme == "wss" else 80), resource


def host_header(host: str, port: int) -> str:
    name = f"[{host}]" if ":" in host else host
    return name if port in (80, 443) else f"{name}:{port}"


def opener(url: str, ssl_context: ssl.SSLContext | None) -> OpenStream:
    if urlsplit(url).scheme != "wss":
        return trio.open_tcp_stream

    async def open_tls(host: str, port: int) -> trio.abc.Stream:
        # https_compatible: peers close TCP without a TLS goodbye, and WebSocket has its own.
        return await trio.open_ssl_over_tcp_stream(
            host, port, ssl_context=ssl_context, https_compatible=True
        )

    return open_tls
