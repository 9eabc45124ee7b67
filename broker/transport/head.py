"""One HTTP/1.1 request head, read and checked before any parser of ours or others sees it.

Peers send bytes that make h11 raise; a head that passes here cannot. So the rules are at least as strict,
and a head is either exactly right or refused:

Rule 1  Nothing past the head is asked for until the head is judged; bytes that came with it are kept.
Rule 2  `parse_head` holds for every request, `check_upgrade` adds what RFC 6455 section 4.2.1
        asks of a WebSocket handshake.
Rule 3  A head is never repaired: one that two parsers could read in two ways is a 400.
Rule 4  A field that is not the handshake's own is opaque (RFC 9110 section 5.5): bytes beyond ASCII
        pass, as a browser sends them in a cookie.

Nothing here knows paths that are served, origins that are allowed, or users.
"""

import base64
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from http import HTTPStatus
from urllib.parse import parse_qsl, urlsplit

import attrs
import trio

from broker.errors import HeadError
from broker.transport.sockets import receive_some

CHUNK = 4096  # a browser's head is 500 bytes to 2 KiB: one read, and little to carry over

# RFC 9110 section 5.6.2 and RFC 9112 section 3. `GET / HTTP/1.1` is valid; two spaces, a tab,
# or a byte outside ! to ~ in the target are not.
_TOKEN = r"[-!#$%&'*+.^_`|~0-9A-Za-z]+"
_REQUEST_LINE = re.compile(rf"({_TOKEN}) ([!-~]+) HTTP/([0-9]\.[0-9])")
# RFC 9112 section 5: no space before the colon, no folding. h11 lets control characters pass
# in values; we do not, because no browser sends any.
_FIELD_LINE = re.compile(rf"({_TOKEN}):[ \t]*([\t -~\x80-\xff]*)")
# RFC 9110 section 7.2: `example.org`, `example.org:9501`, `[::1]:9501`, or nothing at all.
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[-A-Za-z0-9._~!$&'()*+;=%]*)(:[0-9]*)?")
# A label that is the mark of an A-label, of nothing: no name (RFC 5890 section 2.3.2.1), and no browser sends
# it. Nothing looks at the text behind such a mark.
_NO_LABEL = re.compile(r"(?<![^.])xn--(?![^.:])", re.IGNORECASE).search
_HOST_LENGTH = 255 + len(":65535")  # DNS names end at 255
_KEY = re.compile(r"[A-Za-z0-9+/]{22}==")  # exactly 16 bytes of base64
_ACCEPT_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 section 1.3
# Read by us, so of no doubtful meaning; all others belong to the app.
_HANDSHAKE_FIELDS = ("connection", "upgrade", "origin")
_ONE_VALUE = ("host", "origin", "sec-websocket-version", "sec-websocket-key")
_BARE_LF = re.compile(rb"(?<!\r)\n")
_TOKEN_BYTE = re.compile(_TOKEN[:-1].encode())
_TLS_HANDSHAKE = 0x16  # the first byte of every TLS connection
_CR = 0x0D
_PHRASES = {status.value: status.phrase for status in HTTPStatus}


@attrs.frozen
class Head:
    """One request head that passed `parse_head`.

    `target`, `path` and `query` are as sent, not percent-decoded. `headers` has lower-case
    names in the order they came, and values in Latin-1, which is a character for each byte. `raw` is
    every byte from the request line up to and including the blank line.
    """

    method: str
    target: str
    path: str
    query: str
    version: str
    headers: tuple[tuple[str, str], ...]
    raw: bytes = attrs.field(repr=False)
    _by_name: Mapping[str, Sequence[str]] = attrs.field(init=False, eq=False, repr=False)

    @_by_name.default
    def _found_by_name(self) -> Mapping[str, Sequence[str]]:
        found: dict[str, list[str]] = {}
        for name, value in self.headers:
            found.setdefault(name, []).append(value)
        return found

    def values(self, name: str) -> Sequence[str]:
        """Every value of the header `name` (lower-case), in order."""
        return self._by_name.get(name, ())

    @property
    def repeats(self) -> bool:
        """Whether any header came in several lines."""
        return len(self._by_name) < len(self.headers)

    def header(self, name: str) -> str | None:
        """The header `name` (any case), or None; one that came in several lines is joined to a list
        (RFC 9110 section 5.3)."""
        name = name.lower()
        values = self._by_name.get(name)
        if values is None:
            return None
        return values[0] if len(values) == 1 else _joint(name).join(values)

    def fields(self) -> dict[str, str]:
        """All headers as an app sees them, by their lower-case names.

        One that came in several lines is joined: by `, ` (RFC 9110 section 5.3), `Cookie` by `; ` (RFC
        6265 section 5.4 allows one; HTTP/2 splits it). A value is read as UTF-8, or as Latin-1 if it is
        none, so that any bytes are some text.
        """
        return _joined(self.headers)

    @property
    def field_lines(self) -> bytes:
        """The header lines as they came, from which `read_fields` makes `fields` at any time."""
        return self.raw[self.raw.index(b"\r\n") + 2 : -4]

    @property
    def route(self) -> str:
        """The path by which a request is told apart: without a slash at its end."""
        return route_of(self.path)

    @property
    def is_upgrade(self) -> bool:
        """Whether the peer asks for a WebSocket; `check_upgrade` says whether it asks rightly."""
        return _lists(self.header("upgrade"), "websocket")

    @property
    def subprotocols(self) -> tuple[str, ...]:
        """Subprotocols that the peer offers in `Sec-WebSocket-Protocol`, its favourite first."""
        return read_list(self.header("sec-websocket-protocol"))

    @property
    def origin(self) -> str | None:
        """The `Origin` header: every browser sends it, no page can forge it."""
        return self.header("origin")

    @property
    def host(self) -> str | None:
        """The `Host` header, port included."""
        return self.header("host")


@attrs.frozen
class Request:
    """A request whose head was read: with `behind`, all bytes that came after that so far."""

    head: Head
    behind: bytes = attrs.field(repr=False)
    peer: str = ""
    """The other end of its connection, as the PROXY protocol told it if it did: who may say for whom it asks."""
    address: str = ""
    """Where its client is, as far as somebody has found that out."""


def below(head: Head, prefix: str) -> Head | None:
    """The head of a request as it would be without a prefix of its path; None for one that is not below
    it. `/chat` is below `/chat`, as `/`."""
    rest = head.target.removeprefix(prefix)
    if len(rest) == len(head.target) or rest[:1] not in ("", "/", "?"):
        return None
    target = rest if rest.startswith("/") else f"/{rest}"
    path, _, query = target.partition("?")
    start = len(head.method) + 1
    raw = head.raw[:start] + target.encode("ascii") + head.raw[start + len(head.target) :]
    return attrs.evolve(head, target=target, path=path, query=query, raw=raw)


def route_of(path: str) -> str:
    """A path without a slash at its end: `/a/` is where `/a` is. `/` stays as it is."""
    return path[:-1] if path.endswith("/") and len(path) > 1 else path


def is_websocket_path(path: str, served: Iterable[str]) -> bool:
    """Whether WebSockets are served on a path. `/rooms/*` serves all below `/rooms/`, `/*` every path."""
    route = route_of(path)
    return any(
        path.startswith(each[:-1]) if each.endswith("/*") else route == route_of(each)
        for each in served
    )


def read_query(query: str) -> dict[str, str]:
    """The parameters of a query, percent-decoded; of several with one name the last. Linear."""
    return dict(parse_qsl(query, keep_blank_values=True, errors="replace"))


def read_cookies(header: str) -> dict[str, str]:
    """The cookies of a `Cookie` header, as they were set: nothing but quotes around a value is taken off.

    Of several with one name the first, as browsers send the one of the longest path first (RFC 6265
    section 5.4).
    """
    cookies: dict[str, str] = {}
    for pair in header.split(";"):
        name, equals, value = pair.strip(" \t").partition("=")
        if equals:
            if len(value) > 1 and value[0] == value[-1] == '"':
                value = value[1:-1]
            cookies.setdefault(name.rstrip(" \t"), value)
    return cookies


def read_fields(lines: bytes) -> dict[str, str]:
    """The `fields` of a head that was accepted, from its `field_lines`. Linear: 15 µs for a browser's."""
    pairs = (line.partition(":") for line in lines.decode("latin-1").split("\r\n") if line)
    return _joined((name.lower(), value.strip(" \t")) for name, _, value in pairs)


def _joined(headers: Iterable[tuple[str, str]]) -> dict[str, str]:
    fields: dict[str, str] = {}
    for name, value in headers:
        text = value if value.isascii() else _text(value)
        fields[name] = f"{fields[name]}{_joint(name)}{text}" if name in fields else text
    return fields


def _joint(name: str) -> str:
    return "; " if name == "cookie" else ", "


def _text(value: str) -> str:
    try:
        return value.encode("latin-1").decode()
    except UnicodeDecodeError:
        return value


def read_list(value: str | None) -> tuple[str, ...]:
    """The parts of a header whose value is a list."""
    return tuple(token for piece in (value or "").split(",") if (token := piece.strip(" \t")))


def _lists(value: str | None, token: str) -> bool:
    """Whether a header whose value is a list has a token, which is lower-case here and in any case there."""
    if value is None:
        return False
    value = value.lower()
    return value == token or token in read_list(value)


def parse_head(raw: bytes) -> Head:
    """Read one request head: all bytes up to and including the blank line.

    Raises `HeadError`: 400 for anything that is not HTTP/1, 505 for another version of it.
    A head that passes is one that h11 accepts as well.
    """
    if not raw.endswith(b"\r\n\r\n"):
        raise HeadError(400, "the request head does not end with a blank line")
    first, *lines = raw[:-4].decode("latin-1").split("\r\n")
    match = _REQUEST_LINE.fullmatch(first)
    if match is None:
        raise HeadError(400, "the request line is not METHOD TARGET HTTP/1.1")
    method, target, version = match.groups()
    if method == "PRI":
        raise HeadError(400, "this server speaks HTTP/1.1, not HTTP/2")
    if version not in ("1.0", "1.1"):
        raise HeadError(505, f"this server speaks HTTP/1.1, not HTTP/{version}")
    headers: list[tuple[str, str]] = []
    for line in lines:
        match = _FIELD_LINE.fullmatch(line)
        if match is None:
            raise HeadError(400, f"header line {len(headers) + 1} is not NAME: VALUE")
        name, value = match.groups()
        headers.append((name.lower(), value.rstrip(" \t")))
    path, _, query = target.partition("?")
    head = Head(method, target, path, query, version, tuple(headers), raw)
    _check_host(head)
    _check_framing(head)
    return head


def _check_host(head: Head) -> None:
    hosts = head.values("host")
    if len(hosts) > 1 or (not hosts and head.version == "1.1"):
        raise HeadError(400, "a request has exactly one Host header")
    if hosts and not _is_host(hosts[0]):
        raise HeadError(400, "the Host header is not HOST or HOST:PORT")


@lru_cache(maxsize=64)  # a server has few names, and a client asks for one of them each time
def _is_host(host: str) -> bool:
    if len(host) > _HOST_LENGTH or not _HOST.fullmatch(host) or _NO_LABEL(host):
        return False
    try:
        urlsplit(f"//{host}").port  # noqa: B018  # raises on a bad IPv6 address or port
    except ValueError:
        return False
    return True


def _check_framing(head: Head) -> None:
    """Refuse a body whose end two parsers could see in two places (RFC 9112 section 6.3)."""
    lengths, codings = head.values("content-length"), head.values("transfer-encoding")
    if codings and (lengths or head.version == "1.0"):
        raise HeadError(400, "Transfer-Encoding goes with neither Content-Length nor HTTP/1.0")
    if codings and [coding.lower() for coding in codings] != ["chunked"]:
        raise HeadError(501, "the only Transfer-Encoding served is chunked")
    if len(lengths) > 1 or not all(re.fullmatch("[0-9]{1,18}", length) for length in lengths):
        raise HeadError(400, "Content-Length is one number")


def check_upgrade(head: Head) -> None:
    """Check that `head` is a whole WebSocket handshake, as RFC 6455 section 4.2.1 has it.

    Raises `HeadError`: 505 for HTTP/1.0, 426 for another WebSocket version (`refusal` names
    ours), 400 for the rest. Bytes beyond ASCII are refused in the handshake's own fields alone.
    """
    if head.version != "1.1":
        raise HeadError(505, "a WebSocket handshake needs HTTP/1.1")
    if head.method != "GET":
        raise HeadError(400, "a WebSocket handshake is a GET request")
    for name, value in () if head.raw.isascii() else head.headers:
        if value.isascii():
            continue
        if name in _HANDSHAKE_FIELDS or name.startswith("sec-websocket-"):
            raise HeadError(400, f"the {name.title()} header of a WebSocket handshake is ASCII")
    if not head.target.startswith("/"):
        raise HeadError(400, "a WebSocket handshake names a path that starts with /")
    if not head.host:
        raise HeadError(400, "a WebSocket handshake names its Host")
    if head.values("transfer-encoding") or head.header("content-length") not in (None, "0"):
        raise HeadError(400, "a WebSocket handshake has no body")
    # No lists: of several lines one server would take the first and another the last.
    for name in _ONE_VALUE if head.repeats else ():
        if len(head.values(name)) > 1:
            raise HeadError(400, f"a WebSocket handshake has one {name.title()} header")
    if not _lists(head.header("connection"), "upgrade"):
        raise HeadError(400, "a WebSocket handshake has the header Connection: Upgrade")
    if not head.is_upgrade:
        raise HeadError(400, "a WebSocket handshake has the header Upgrade: websocket")
    if head.header("sec-websocket-version") != "13":
        raise HeadError(426, "this server speaks WebSocket version 13")
    if not _KEY.fullmatch(head.header("sec-websocket-key") or ""):
        raise HeadError(400, "Sec-WebSocket-Key is 16 bytes in base64")


def whole_head(data: bytes) -> tuple[bytes, bytes] | None:
    """The head that came in one piece with what is behind it, as nearly all do; None if it is for `read_head`
    to say what `data` is the beginning of."""
    end = data.find(b"\r\n\r\n")
    if end < 0 or data[0] == _CR:
        return None
    return data[: end + 4], data[end + 4 :]


async def read_head(
    stream: trio.abc.ReceiveStream, limit: int, begun: bytes = b""
) -> tuple[bytes, bytes] | None:
    """Read one request head: its bytes through the blank line, and the bytes behind it. `begun` of it was
    read before.

    Empty lines before it are passed over, as old clients end a body with one (RFC 9112 section 2.2).
    Returns None when the peer closes and has sent nothing else. Asks the stream for at most `limit`
    bytes in all, empty lines included, so little piles up behind the head. Raises `HeadError`: 400
    when the peer closes midway or what comes cannot become HTTP (told at once, without waiting for
    the end), 431 at `limit` bytes without a blank line; and what the stream raises. The caller brings
    the deadline. After a cancellation the bytes read so far are lost: close the stream.
    """
    buffer = bytearray()
    left = limit
    while left > 0:
        data = begun or await receive_some(stream, min(CHUNK, left))
        begun = b""
        if not data:
            if not buffer or buffer == b"\r":
                return None
            raise HeadError(400, "the connection ended in the middle of the request head")
        left -= len(data)
        searched = max(0, len(buffer) - 3)
        buffer += data
        if buffer[0] == _CR:
            while buffer.startswith(b"\r\n"):
                del buffer[:2]
            if not buffer or buffer == b"\r":
                continue
            searched = 0
        end = buffer.find(b"\r\n\r\n", searched)
        if end >= 0:
            return bytes(buffer[: end + 4]), bytes(buffer[end + 4 :])
        if buffer[0] == _TLS_HANDSHAKE:
            raise HeadError(400, "this port speaks plain HTTP, the peer began with TLS")
        if not _TOKEN_BYTE.match(buffer) or _BARE_LF.search(buffer, max(0, searched - 1)):
            raise HeadError(400, "this is not an HTTP request")
    raise HeadError(431, f"the request head is longer than {limit} bytes")


def acceptance(
    head: Head,
    subprotocol: str | None,
    headers: Iterable[tuple[str, str]] = (),
    extensions: str = "",
) -> bytes:
    """The 101 response to a head that has passed `check_upgrade` (RFC 6455 section 4.2.2), with these
    headers besides, and the extensions that were agreed on."""
    key = head.header("sec-websocket-key") or ""
    digest = hashlib.sha1(key.encode() + _ACCEPT_GUID, usedforsecurity=False).digest()
    lines = [
        "HTTP/1.1 101 Switching Protocols",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Accept: {base64.b64encode(digest).decode()}",
    ]
    if subprotocol is not None:
        lines.append(f"Sec-WebSocket-Protocol: {subprotocol}")
    if extensions:
        lines.append(f"Sec-WebSocket-Extensions: {extensions}")
    lines += [f"{name}: {value}" for name, value in headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def refusal(status: int, reason: str, headers: Iterable[tuple[str, str]] = ()) -> bytes:
    """A whole HTTP/1.1 response that says `reason` in its text body; close after sending it.

    A 426 names what we speak by itself: `Upgrade: websocket` and version 13, as RFC 9110
    section 15.5.22 and RFC 6455 section 4.2.2 ask.
    """
    body = f"{reason}\n".encode()
    lines = [
        f"HTTP/1.1 {status} {_PHRASES.get(status, 'Refused')}",
        "Content-Type: text/plain; charset=utf-8",
        f"Content-Length: {len(body)}",
    ]
    if status == HTTPStatus.UPGRADE_REQUIRED:
        lines += ["Connection: Upgrade, close", "Upgrade: websocket", "Sec-WebSocket-Version: 13"]
    else:
        lines += ["Connection: close"]
    lines += [f"{name}: {value}" for name, value in headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body
