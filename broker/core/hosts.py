"""Names of hosts, and origins of web pages (RFC 6454): text that is compared, never looked up.

A host pattern, as in the setting `hosts`:

    valid       example.com   example.com:8443   *.example.com   192.0.2.7   [2001:db8::1]:9501   *
    invalid     https://example.com   www*.example.com   *.192.0.2.7   example.com:0   bücher.example

An origin pattern, as in the setting `allowed_origins`:

    valid       https://example.com   https://*.example.com   http://localhost:*   app://name
                null   file://   *
    invalid     example.com   https://example.com/   wss://example.com   *://example.com

Rule 1  `*.` stands for one label or more, not for none, as in Centrifugo: `*.example.com` matches
        `a.example.com` and `a.b.example.com`, not `example.com`.
Rule 2  Names are compared as they go over the wire, which is in ASCII, without regard to case. An
        A-label (`xn--…`) is neither decoded nor checked: browsers go by IDNA 2008 and beyond.
Rule 3  A pattern that no browser's request could match is a `ValueError`, whose text is the reason.
"""

import ipaddress
import re
from typing import Final, Self

import attrs

DEFAULT_PORTS: Final = {"http": 80, "https": 443}
"""Browsers leave these out, of `Origin` and of `Host` (RFC 6454 section 6.1)."""

LITERALS: Final = frozenset({"*", "null", "file://"})
"""Entries of `allowed_origins` that are no pattern. A page from a file has the origin `null` in the
browsers of today, and `file://` in Electron and in some web views."""

# RFC 1035 section 2.3.4: a label has 63 bytes, a name 253 as text. Underscores are no letters of host
# names, and browsers take them. The mark of an A-label alone is none (RFC 5890 section 2.3.2.1).
_LABEL: Final = re.compile(r"(?!xn--\Z)[a-z0-9_-]{1,63}")
_NAME_LENGTH: Final = 253
_SCHEME: Final = re.compile(r"[a-z][a-z0-9+.-]*")
# The URL standard's "ends in a number": no name ends so, browsers read all of these as IPv4.
_NUMBER: Final = re.compile(r"[0-9]+|0x[0-9a-f]*")


def normal_host(text: str) -> str:
    """The host `text`, without a port, in the form in which two are compared.

    That is lower case, an IPv6 address in brackets and as short as it can be, a name without the dot
    that only tells a resolver where it ends. Raises `ValueError` for what is neither a name in ASCII
    nor an address.
    """
    text = text.lower()
    if not text.isascii():
        raise ValueError("a browser sends a name in ASCII")
    if text.startswith("["):
        if not text.endswith("]") or "%" in text:
            raise ValueError("an IPv6 address stands in brackets, without a zone")
        return f"[{ipaddress.IPv6Address(text[1:-1])}]"
    text = text.removesuffix(".")
    labels = text.split(".")
    if _NUMBER.fullmatch(labels[-1]):
        return str(ipaddress.IPv4Address(text))
    if len(text) > _NAME_LENGTH or not all(map(_LABEL.fullmatch, labels)):
        raise ValueError("this is neither a host name nor an address")
    return text


def is_address(host: str) -> bool:
    """Whether `host` is an IP address: nobody's DNS decides where it leads to."""
    try:
        normal = normal_host(host)
    except ValueError:
        return False
    return normal.startswith("[") or bool(_NUMBER.fullmatch(normal.rpartition(".")[2]))


def split_port(text: str) -> tuple[str, int | None]:
    """Host and port of `example.com:9501`; the port is None where there is none, or an empty one.

    Raises `ValueError` for a port that is not from 1 to 65535. The host is as it stands there.
    """
    host, colon, port = text.rpartition(":")
    if not colon or "]" in port:
        return text, None
    if not port:
        return host, None
    if not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
        raise ValueError("a port is a number from 1 to 65535")
    return host, int(port)


@attrs.frozen
class Origin:
    """The origin of a web page. `port` is the scheme's own where none is named; 0 if it has none."""

    scheme: str
    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read an `Origin` header. Raises `ValueError` for `null` and all else that names no host."""
        scheme, rest = _split_scheme(text)
        host, port = split_port(rest)
        return cls(scheme, normal_host(host), port or DEFAULT_PORTS.get(scheme, 0))


def _split_scheme(text: str) -> tuple[str, str]:
    scheme, separator, rest = text.lower().partition("://")
    if not separator:
        raise ValueError("an origin begins with its scheme")
    if not _SCHEME.fullmatch(scheme):
        raise ValueError("a scheme is one word, such as https; name each in an entry of its own")
    if set(rest) & set("/?#@"):
        raise ValueError("an origin has neither a path nor a query nor a user")
    return scheme, rest


@attrs.frozen
class HostPattern:
    """One entry of `hosts`."""

    name: str
    """A name or an address; `.example.com` for all below it, the empty string for all there are."""
    port: int | None
    """None for any."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read an entry. Raises `ValueError`."""
        if text == "*":
            return cls("", None)
        if "://" in text:
            raise ValueError("a host has no scheme")
        if set(text) & set("/?#@"):
            raise ValueError("a host has neither a path nor a query nor a user")
        host, port = split_port(text)
        if text.endswith(":"):
            raise ValueError("a port is a number from 1 to 65535")
        return cls(_pattern_name(host), port)

    def matches(self, host: str, port: int | None) -> bool:
        """Whether it matches a host in its normal form. A `port` of None is one that was left out,
        as by a proxy: then the name decides."""
        if self.port is not None and port is not None and self.port != port:
            return False
        if self.name.startswith("."):
            return host.endswith(self.name)
        return not self.name or host == self.name


def _pattern_name(text: str) -> str:
    name = text.removeprefix("*.")
    if "*" in name:
        raise ValueError('"*" stands for whole labels before a dot, as in *.example.com')
    normal = normal_host(name)
    if name == text:
        return normal
    if is_address(normal):
        raise ValueError("nothing is below an address")
    return f".{normal}"


@attrs.frozen
class OriginPattern:
    """One entry of `allowed_origins` that is not among `LITERALS`."""

    scheme: str
    host: HostPattern

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read an entry. Raises `ValueError`."""
        scheme, rest = _split_scheme(text)
        if scheme in ("ws", "wss"):
            raise ValueError("this is about the page, whose scheme is http or https")
        if rest.endswith(":*"):
            return cls(scheme, HostPattern(_pattern_name(rest[:-2]), None))
        host = HostPattern.parse(rest)
        if not host.name:
            raise ValueError('"*" stands for whole labels before a dot, as in *.example.com')
        return cls(scheme, attrs.evolve(host, port=host.port or DEFAULT_PORTS.get(scheme, 0)))

    def matches(self, origin: Origin) -> bool:
        return self.scheme == origin.scheme and self.host.matches(origin.host, origin.port)
