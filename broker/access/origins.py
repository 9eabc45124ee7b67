"""Which web pages may connect: the check of a browser's `Origin` and `Host` (RFC 6455 section 10.2).

A browser sends the user's cookies and reaches the user's own network on behalf of any page, so a
page of somebody else's must not be served. Programs send no Origin and pass.

A page may be its own by name only: the owner of `evil.example` can have that name lead to the user's
own machine a moment later (DNS rebinding), and his page then asks us under its own name. So the page's own
origin counts under names that are ours.
"""

from functools import lru_cache

import attrs

from broker.config.settings import Config, is_loopback
from broker.config.validators import ascii_host
from broker.core.hosts import (
    DEFAULT_PORTS,
    LITERALS,
    HostPattern,
    Origin,
    OriginPattern,
    is_address,
    normal_host,
    split_port,
)
from broker.transport.head import Head


@attrs.frozen
class PagePolicy:
    """Which pages may connect, as the settings have it. `page_policy` makes one."""

    literals: frozenset[str]
    origins: tuple[OriginPattern, ...]
    named_hosts: tuple[HostPattern, ...]
    """The entries of `hosts`."""
    known_hosts: tuple[HostPattern, ...]
    """Those, the name we listen on, and the hosts of pages that may connect."""
    hosts_matter: bool
    lenient: bool
    """Whether loopback pages, and those of origin `null`, pass under a loopback name."""

    def refusal(self, head: Head) -> str | None:
        """The reason, in one line, for which a request must not be served; None if it may be.

        Without an `Origin` it is a program's, or a page's own GET: browsers leave it out of that
        alone (Fetch standard, section 3.2). No page can have its browser send `Upgrade`.
        """
        if "*" in self.literals:
            return None
        origin = head.origin
        if origin is None:
            from_program = head.is_upgrade or head.method not in ("GET", "HEAD")
            return None if from_program or self._is_ours(head) else _foreign(_host_of(head)[0])
        if origin in self.literals:
            return None
        page = _page(origin)
        if page is not None and any(each.matches(page) for each in self.origins):
            return None
        if page is not None and page.scheme not in DEFAULT_PORTS:
            page = None  # nobody's but who is listed
        host, port = _host_of(head)
        # `null` is what a page opened from a file has. Behind a proxy that hands `Host` on, the name is
        # a public one: there `null` is anybody's sandboxed frame.
        stays_here = self.lenient and is_loopback(host)
        if stays_here and (origin == "null" or (page is not None and is_loopback(page.host))):
            return None
        if page is not None and page.host == host:
            if page.port == (port or DEFAULT_PORTS[page.scheme]):
                return None if self._is_ours(head) else _foreign(host)
            if port is None:  # as `Host $host` of nginx has it: `hosts` says which ports are meant
                is_named = any(each.matches(host, page.port) for each in self.named_hosts)
                return None if is_named else _foreign(f"{host}:{page.port}")
        return (
            f"origin not allowed: {origin} is neither in allowed_origins nor the page's own under "
            f"the host {head.host or ''!r}"
        )

    def _is_ours(self, head: Head) -> bool:
        """Whether nobody else can have the name under which we were asked lead to us."""
        host, port = _host_of(head)
        return (
            not self.hosts_matter
            or not host  # an HTTP/1.0 program
            or is_loopback(host)
            or is_address(host)
            or any(each.matches(host, port) for each in self.known_hosts)
        )


def page_policy(config: Config, *, loopback_bind: bool, users_matter: bool) -> PagePolicy:
    """The policy that follows from the settings: cheap, because one is kept for all settings that are alike.

    `loopback_bind` says whether this machine alone can reach us, its proxies among all else;
    `users_matter` whether clients are told apart by their users.
    """
    has_certificate = config.tls_cert is not None
    return _policy(
        config.allowed_origins,
        config.hosts,
        config.host,
        has_certificate,
        loopback_bind,
        users_matter,
    )


@lru_cache(maxsize=16)  # a broker has one, and another after a reload
def _policy(
    allowed_origins: tuple[str, ...],
    hosts: tuple[str, ...],
    bound_host: str,
    has_certificate: bool,
    loopback_bind: bool,
    users_matter: bool,
) -> PagePolicy:
    literals = frozenset(allowed_origins) & LITERALS
    origins = tuple(OriginPattern.parse(e) for e in allowed_origins if e not in LITERALS)
    named = tuple(map(HostPattern.parse, hosts))
    bound = ascii_host(bound_host)
    return PagePolicy(
        literals,
        origins,
        named,
        (
            *named,
            *([HostPattern(bound, None)] if bound else []),
            *(HostPattern(e.host.name, None) for e in origins if e.scheme in DEFAULT_PORTS),
        ),
        # With a certificate of ours, a browser comes to us under no name that is not in it.
        hosts_matter=not has_certificate
        and (loopback_bind or users_matter or bool(allowed_origins) or bool(hosts)),
        # Where users matter, a page of another program's on this machine is somebody else's too.
        lenient=loopback_bind and not users_matter,
    )


def _page(origin: str) -> Origin | None:
    try:
        return Origin.parse(origin)
    except ValueError:
        return None


def _host_of(head: Head) -> tuple[str, int | None]:
    """Host and port of the `Host` header; a name that is none stays as it came, and matches nothing."""
    text = head.host or ""
    try:
        host, port = split_port(text)
        return normal_host(host), port
    except ValueError:
        return text, None


def _foreign(host: str) -> str:
    return (
        f"host not ours: {host}, so a page may have come here by DNS rebinding; if it is a name of "
        f'this broker, set hosts = ["{host}"], or BROKER_HOSTS={host}'
    )
