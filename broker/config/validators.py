"""Checks of single settings: each raises `ValueError`, in one line that names the field and the value."""

import ipaddress
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, Protocol, TypeGuard, TypeVar, get_args, get_origin
from urllib.parse import urlsplit

import attrs
import idna

from broker.config.engine_url import parse_engine_url
from broker.config.place import parse_place
from broker.core.event_queue import CHOICES
from broker.core.hosts import LITERALS, HostPattern, OriginPattern, normal_host
from broker.core.names import RESERVED_NAMESPACES
from broker.core.signing import key_of
from broker.core.topics import check_pattern, check_topic, is_pattern, mistaken_for_pattern

T = TypeVar("T")
N = TypeVar("N", bound=Mapping[str, object])
P = TypeVar("P", bound=Sequence["_Pattern"])


class _Pattern(Protocol):
    @property
    def match(self) -> str: ...


Validator = Callable[[Any, "attrs.Attribute[Any]", Any], None]


def _is_http_url(value: str) -> bool:
    try:
        parts = urlsplit(value)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is none, a bracket that does not close
        return False


def http_url(_: object, field: "attrs.Attribute[str]", value: str) -> None:
    if value and not _is_http_url(value):
        raise ValueError(
            f'{field.name} is {value!r}: must be like "https://example.com/.well-known/jwks.json"'
        )


def backend_url(_: object, field: "attrs.Attribute[str]", value: str) -> None:
    if value and not _is_http_url(value):
        raise ValueError(f'{field.name} is {value!r}: must be like "https://example.com/events"')


def signing_secret(_: object, field: "attrs.Attribute[str]", value: str) -> None:
    try:
        if value:
            key_of(value)
    except ValueError as error:
        raise ValueError(f"{field.name} {error}") from None


_OUR_HEADERS: Final = frozenset(
    (
        *("host", "connection", "upgrade", "transfer-encoding", "content-length", "content-type"),
        *("accept-encoding", "webhook-id", "webhook-timestamp", "webhook-signature"),
    )
)


def headers(_: object, field: "attrs.Attribute[tuple[str, ...]]", value: tuple[str, ...]) -> None:
    for name in value:
        if name.lower() in _OUR_HEADERS or not re.fullmatch(r"[A-Za-z0-9-]+", name):
            raise ValueError(f"{field.name} holds {name!r}: must be a header that is not ours")


def event_kinds(
    _: object, field: "attrs.Attribute[tuple[str, ...]]", value: tuple[str, ...]
) -> None:
    for kind in value:
        if kind not in CHOICES:
            raise ValueError(f"{field.name} holds {kind!r}: known are {', '.join(CHOICES)}")


def number(low: float, high: float = math.inf, *, optional: bool = False) -> Validator:
    """Between `low` and `high`, both included; None as well if `optional`."""

    def check(_: object, field: "attrs.Attribute[T]", value: T) -> None:
        if value is None and optional:
            return
        if not _is_number(value) or not low <= value <= high:
            bounds = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise ValueError(f"{field.name} is {value!r}: must be {bounds}")

    return check


def path_prefix(_: object, field: "attrs.Attribute[str]", value: str) -> None:
    if value and not re.fullmatch(r"(/[-._~!$&'()*+,=:@%0-9A-Za-z]+)+", value):
        raise ValueError(
            f'{field.name} is {value!r}: must be like "/chat", without a slash at the end'
        )


def place(_: object, field: "attrs.Attribute[str]", value: str) -> None:
    try:
        if value:
            parse_place(value)
    except ValueError as error:
        raise ValueError(f"{field.name}: {error}") from None


def file_mode(_: object, field: "attrs.Attribute[str | None]", value: str | None) -> None:
    if value is not None and not re.fullmatch(r"0?[0-7]{3}", value, re.ASCII):
        raise ValueError(f'{field.name} is {value!r}: must be octal digits in quotes, as in "0660"')


def positive(_: object, field: "attrs.Attribute[float]", value: float) -> None:
    if not _is_number(value) or not value > 0:
        raise ValueError(f"{field.name} is {value!r}: must be more than 0")


def _is_number(value: object) -> TypeGuard[float]:
    """Whether `value` can be compared with a bound; NaN and True are no one's limit."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def engine_url(_: object, field: "attrs.Attribute[str]", value: str) -> None:
    try:
        parse_engine_url(value)
    except ValueError as error:
        raise ValueError(f"{field.name} is {value!r}: {error}") from None


def host_name(_: object, field: "attrs.Attribute[str]", value: str) -> None:
    try:
        value.encode("idna")
    except UnicodeError as error:
        raise ValueError(f"{field.name} is {value!r}: must be a name or an address") from error


def paths(_: object, field: "attrs.Attribute[tuple[str, ...]]", value: tuple[str, ...]) -> None:
    for path in value:
        if not path.startswith("/"):
            raise ValueError(f'{field.name} holds {path!r}: must start with "/"')
        if "*" in path.removesuffix("/*"):
            raise ValueError(
                f'{field.name} holds {path!r}: "*" stands for all below a path, at the end: "/rooms/*"'
            )


def secret_text(_: object, field: "attrs.Attribute[str | None]", value: str | None) -> None:
    # Not shown: an error goes to a log.
    if value is not None and not (value and value.isascii() and value.isprintable()):
        raise ValueError(f"{field.name} must be printable ASCII, and not empty")


def ascii_host(host: str) -> str:
    """The name `host` as it goes over the wire, with A-labels by IDNA 2008 as browsers and Trio have
    them; the empty string for what cannot be a host there."""
    try:
        return normal_host(host if host.isascii() else idna.encode(host, uts46=True).decode())
    except ValueError:
        return ""


def origins(_: object, field: "attrs.Attribute[tuple[str, ...]]", value: tuple[str, ...]) -> None:
    for origin in value:
        try:
            if origin not in LITERALS:
                OriginPattern.parse(origin)
        except ValueError as error:
            right = _origin_meant(origin)
            raise ValueError(
                f'{field.name} holds {origin!r}: must be like "{right}", or "*" for all: {error}'
            ) from None


def hosts(_: object, field: "attrs.Attribute[tuple[str, ...]]", value: tuple[str, ...]) -> None:
    for host in value:
        try:
            HostPattern.parse(host)
        except ValueError as error:
            right = _host_meant(host.partition("://")[2] or host)
            raise ValueError(
                f'{field.name} holds {host!r}: must be like "{right}", or "*" for all: {error}'
            ) from None


def _origin_meant(text: str) -> str:
    """The origin that somebody may have had in mind who wrote `text`."""
    text = text.strip().lower()
    if text == "null" or text.startswith("file:"):
        return "null"  # as browsers say of a page from a file
    scheme, separator, rest = text.partition("://")
    if not separator:
        scheme, rest = "https", scheme
    scheme = {"ws": "http", "wss": "https", "*": "https"}.get(scheme, scheme)
    meant = f"{scheme}://{_host_meant(rest)}"
    try:
        OriginPattern.parse(meant)
    except ValueError:
        return "https://example.com"
    return meant


def _host_meant(text: str) -> str:
    """The host that somebody may have had in mind who wrote `text`."""
    text = re.split(r"[/?#]", text.strip())[0].rpartition("@")[2]
    if text.count(":") > 1 and not text.startswith("["):
        text = f"[{text}]"
    name, colon, port = text.rpartition(":") if not text.endswith("]") else (text, "", "")
    if not colon:
        name, port = text, ""
    wildcard = "*." if name.startswith("*.") else ""
    host = wildcard + ascii_host(name.removeprefix("*."))
    meant = f"{host}:{port}" if port else host
    try:
        HostPattern.parse(meant)
    except ValueError:
        return "example.com"
    return meant


def networks(_: object, field: "attrs.Attribute[tuple[str, ...]]", value: tuple[str, ...]) -> None:
    for entry in value:
        try:
            if entry != "unix":
                ipaddress.ip_network(str(entry))  # which takes a number for an address, too
        except ValueError:
            raise ValueError(
                f'{field.name} holds {entry!r}: must be like "{_network_meant(str(entry))}", or "unix"'
            ) from None


def _network_meant(text: str) -> str:
    """The address or network that somebody may have had in mind who wrote `text`."""
    if text.strip() == "localhost":
        return "127.0.0.1"
    try:
        return str(ipaddress.ip_network(text.strip().strip("[]"), strict=False))
    except ValueError:
        return "10.0.0.0/8"


def first_fd(_: object, field: "attrs.Attribute[T]", value: T) -> None:
    # JavaScript counts exactly up to 2^53, and there have to be some left.
    fits = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 2**52
    if not fits and value != "clock":
        raise ValueError(f'{field.name} is {value!r}: must be from 1 to {2**52}, or "clock"')


def namespace_names(_: object, field: "attrs.Attribute[N]", value: N) -> None:
    for name in value:
        if name in RESERVED_NAMESPACES:
            raise ValueError(f"{field.name} holds {name!r}: {name}:… is what connections are named")
        try:
            check_topic(name, 255)
        except ValueError as error:
            raise ValueError(f"{field.name} holds {name!r}: {error}") from error
        if set(name) & set(":$#"):
            raise ValueError(
                f"{field.name} holds {name!r}: it is the part of a topic before its colon, "
                "without ':', '$' and '#'"
            )


def distinct_patterns(_: object, field: "attrs.Attribute[P]", value: P) -> None:
    matches = [pattern.match for pattern in value]
    for match in matches:
        if matches.count(match) > 1:
            raise ValueError(f"{field.name} holds {match!r} twice: the second would never apply")


def topic_match(_: object, field: "attrs.Attribute[str]", value: str) -> None:
    try:
        (check_pattern if is_pattern(value) else check_topic)(value, 255)
    except ValueError as error:
        raise ValueError(f"{field.name} is {value!r}: {error}") from error
    # Rules that match nothing leave open what they were to close.
    if hint := mistaken_for_pattern(value):
        raise ValueError(f"{field.name}: {hint}")


def expected_of(hint: object) -> str:
    """The kind of value to write there, in words."""
    if isinstance(hint, type) and attrs.has(hint):
        return f"a {hint.__name__}"
    if get_origin(hint) is Mapping:
        return f"{expected_of(get_args(hint)[1])} for each name"
    if get_origin(hint) is Literal:
        return " or ".join(f'"{choice}"' for choice in get_args(hint))
    if get_origin(hint) is tuple:
        return (
            "a list of strings"
            if str in get_args(hint)
            else f"a list, of {get_args(hint)[0].__name__}"
        )
    hints = [kind for kind in get_args(hint) if kind is not type(None)] or [hint]
    words = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a string",
        Path: "a string with a path",
    }
    literals = [kind for kind in hints[1:] if get_origin(kind) is Literal]
    return " or ".join([words[hints[0]], *map(expected_of, literals)])
