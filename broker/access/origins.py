"""Who may connect at all: the check of a browser's Origin (RFC 6455 section 10.2).

A browser sends the user's cookies and reaches the user's own network on behalf of any page, so
a page of somebody else's must not be served. Programs send no Origin and pass.
"""

from collections.abc import Collection
from urllib.parse import urlsplit

from broker.config.settings import is_loopback
from broker.transport.head import Head


def origin_allowed(head: Head, allowed: Collection[str], *, loopback_bind: bool) -> bool:
    """Whether a handshake's Origin may be served.

    None (not a browser), a listed one and the page's own (its host and port are those of the
    `Host` header) may. While we listen on loopback only and were asked for under a loopback name,
    so may every loopback origin and `null`, which is what a page opened from a file has. Behind a
    proxy that hands `Host` on, the name is a public one: there `null` is anybody's sandboxed frame.
    """
    origin = head.origin
    if origin is None or "*" in allowed or origin in allowed:
        return True
    host_name = urlsplit(f"//{head.host or ''}").hostname or ""
    stays_here = loopback_bind and is_loopback(host_name)
    if origin == "null":
        return stays_here
    try:
        parts = urlsplit(origin)
        host = parts.hostname
    except ValueError:
        return False
    if parts.scheme not in ("http", "https") or not host:
        return False
    if head.host is not None and parts.netloc.lower() == head.host.lower():
        return True
    return stays_here and is_loopback(host)
