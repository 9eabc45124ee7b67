"""Who may connect at all: the check of a browser's Origin (RFC 6455 section 10.2).

A browser sends the user's cookies and reaches the user's own network on behalf of any page, so
a page of somebody else's must not be served. Programs send no Origin and pass.
"""

from collections.abc import Collection
from urllib.parse import urlsplit

from .config import is_loopback
from .transport.head import Head


def origin_allowed(head: Head, allowed: Collection[str], *, loopback_bind: bool) -> bool:
    """Whether a handshake's Origin may be served.

    None (not a browser), a listed one and the page's own (its host and port are those of the
    `Host` header) may. While we listen on loopback only, so may every loopback origin and `null`,
    which is what a page opened from a file has.
    """
    origin = head.origin
    if origin is None or "*" in allowed or origin in allowed:
        return True
    if origin == "null":
        return loopback_bind
    try:
        parts = urlsplit(origin)
        host = parts.hostname
    except ValueError:
        return False
    if parts.scheme not in ("http", "https") or not host:
        return False
    if head.host is not None and parts.netloc.lower() == head.host.lower():
        return True
    return loopback_bind and is_loopback(host)
