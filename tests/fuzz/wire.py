"""Targets of the wire: request heads, what proxies say, frames, and the lane that reads a peer."""

import ipaddress
import struct
from collections.abc import Coroutine, Sequence
from typing import Any, Final, TypeVar, cast

import h11
import structlog
import trio
from trio.testing import MockClock, memory_stream_pair
from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, TextMessage
from wsproto.frame_protocol import FrameProtocol, ParseFailed
from wsproto.utilities import RemoteProtocolError

from broker.access.proxies import host_of, trusted_proxies
from broker.errors import HeadError
from broker.protocols.centrifuge_json import CENTRIFUGE_JSON
from broker.protocols.commands import BadCommand
from broker.testing import handshake
from broker.transport import frames
from broker.transport.head import (
    Head,
    acceptance,
    below,
    check_upgrade,
    is_websocket_path,
    parse_head,
    read_cookies,
    read_fields,
    read_head,
    read_list,
    read_query,
)
from broker.transport.lane import Lane, LaneLimits
from broker.transport.outbox import Outbox
from broker.transport.proxy_protocol import read_proxy_header
from tests.fuzz.target import target
from tests.transport.calls import Calls

T = TypeVar("T")

HEAD_BYTES: Final = 8192


def run_through(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that never waits."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return cast(T, done.value)
    raise AssertionError("it waits")


class _Slices(trio.abc.ReceiveStream):
    """Bytes that come in slices of a size, then the end. It never waits."""

    def __init__(self, data: bytes, size: int) -> None:
        self._data = data
        self._size = size
        self.asked = 0

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        assert max_bytes
        self.asked += max_bytes
        size = min(self._size, max_bytes)
        taken, self._data = self._data[:size], self._data[size:]
        return taken

    async def aclose(self) -> None: ...


# heads


def _head_of(data: bytes, size: int) -> Head | int | None:
    """The head at the front of a stream, or the status of its refusal; None for a stream that ends."""
    stream = _Slices(data, size)
    try:
        both = run_through(read_head(stream, HEAD_BYTES))
        if both is None:
            return None
        raw, behind = both
        assert raw.endswith(b"\r\n\r\n")
        assert data.lstrip(b"\r\n").startswith(raw + behind) or (raw + behind) in data
        return parse_head(raw)
    except HeadError as error:
        assert 400 <= error.status <= 505
        assert "\n" not in str(error)
        return error.status


BROWSER: Final = handshake(
    "/connection/websocket?token=a%20b&a=1",
    {"Origin": "https://example.org", "Cookie": 'a=b; c="d e"', "User-Agent": "Mozilla/5.0 (X11)",
     "Sec-WebSocket-Protocol": "centrifuge-json, centrifuge-protobuf",
     "Sec-WebSocket-Extensions": "permessage-deflate; client_max_window_bits"},
)  # fmt: skip


@target(
    "head",
    BROWSER,
    b"GET / HTTP/1.1\r\nHost: [::1]:9501\r\nAccept: */*\r\n\r\nbehind",
    b"POST /api/publish HTTP/1.1\r\nhost: a\r\nContent-Length: 2\r\nX-API-Key: k\r\n\r\n{}",
    b"POST /emulation HTTP/1.1\r\nHost: a.example.:80\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"\r\n\r\nOPTIONS * HTTP/1.0\r\n\r\n",
    words=(
        b"\r\n", b"\r\n\r\n", b": ", b"Host: xn--a.b\r\n", b"HTTP/1.0", b"HTTP/2.0", b"Upgrade: h2c\r\n",
        b"Connection: keep-alive, Upgrade\r\n", b"Content-Length: 0\r\n", b"Transfer-Encoding: ",
        b"Cookie: a=\xff; b\r\n", b"Sec-WebSocket-Version: 12\r\n", b"PRI", b"[::1", b"]:1x", b"\r\n ", b"//",
    ),
    share=14,
)  # fmt: skip
def head(data: bytes) -> None:
    """What passes `parse_head` passes h11, with the same fields; however it was cut into reads."""
    whole = _head_of(data, HEAD_BYTES)
    for size in (1, 7):
        found = _head_of(data, size)
        # Of several faults the first that is seen is told.
        both_refused = isinstance(found, int) and isinstance(whole, int)
        assert both_refused or found == whole, f"another head in reads of {size} bytes"
    if not isinstance(whole, Head):
        return
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(whole.raw)
    request = connection.next_event()
    assert isinstance(request, h11.Request), request
    assert request.method.decode() == whole.method
    assert request.target.decode() == whole.target
    theirs = [(name.decode(), value.decode("latin-1")) for name, value in request.headers]
    assert theirs == list(whole.headers)
    assert read_fields(whole.field_lines) == whole.fields()
    under = below(whole, "/connection")
    if under is not None:
        assert parse_head(under.raw) == under
    read_query(whole.query)
    read_cookies(whole.header("cookie") or "")
    read_list(whole.header("accept"))
    is_websocket_path(whole.path, ("/", "/rooms/*"))
    _upgrade(whole)


def _upgrade(found: Head) -> None:
    """What passes `check_upgrade` is a handshake for wsproto as well."""
    try:
        check_upgrade(found)
    except HeadError as error:
        assert error.status in (400, 426, 505)
        return
    subprotocols = found.subprotocols
    answer = acceptance(found, subprotocols[0] if subprotocols else None)
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method="GET", target="/", headers=[("host", "a"), ("upgrade", "websocket"), ("connection", "upgrade")]))  # fmt: skip
    client.receive_data(answer)
    assert isinstance(client.next_event(), h11.InformationalResponse)


# what proxies say

OURS: Final = "203.0.113.9"
"""The address that the proxy has seen, and adds."""


@target(
    "forwarded",
    b"192.0.2.7, 10.0.0.1", b"for=192.0.2.43;proto=http, for=\"[2001:db8::17]:4711\"", b"unknown, [::1]:80",
    b'for="_hidden";by=1.2.3.4, For=10.1.1.1',
    words=(b"for=", b'"', b",", b";", b"\\", b"[::ffff:10.0.0.1]", b"fe80::1%eth0", b"10.0.0.1", b"%", b":1"),
)  # fmt: skip
def forwarded(data: bytes) -> None:
    """A client cannot make its proxy's word another one: behind whatever it sends, the address that the
    proxy adds is the client's, or nothing is."""
    text = data.decode("latin-1")
    listed = trusted_proxies(("10.0.0.0/8",))
    listed.client_in(text)
    assert str(listed.client_in(f"{text}, {OURS}")) == OURS
    named = trusted_proxies(("10.0.0.0/8",), "forwarded")
    named.client_in(text)
    for added in (f"for={OURS}", f'for="{OURS}:80";proto=https', f"by=10.0.0.2;for={OURS}"):
        found = named.client_in(f"{text}, {added}")
        assert found is None or str(found) == OURS, f"{found} by {text!r}"
    host = host_of(text)
    if host is not None:
        assert host_of(str(host)) == host
        assert listed.party_of("", text, "alone")


class _Socket:
    """What `read_proxy_header` asks of a socket: it may look, and take."""

    def __init__(self, data: bytes, size: int) -> None:
        self.data = data
        self._size = size

    async def recv(self, most: int, flags: int = 0) -> bytes:
        taken = self.data[: min(most, self._size)]
        if not flags:
            self.data = self.data[len(taken) :]
        return taken


class _Stream:
    def __init__(self, data: bytes, size: int) -> None:
        self.socket = _Socket(data, size)


def _proxied(data: bytes, size: int) -> tuple[str | None, bytes] | None:
    """The address, and what is left; None for a refusal."""
    stream = _Stream(data, size)
    try:
        found = run_through(read_proxy_header(cast(trio.SocketStream, stream)))
    except HeadError:
        return None
    return found, stream.socket.data


SIGNATURE: Final = b"\r\n\r\n\0\r\nQUIT\n"
BEHIND: Final = b"GET / HTTP/1.1\r\n\r\n"


@target(
    "proxy_protocol",
    b"PROXY TCP4 192.0.2.7 192.0.2.1 4711 443\r\n" + BEHIND,
    b"PROXY TCP6 2001:db8::7 ::1 4711 443\r\n" + BEHIND,
    b"PROXY UNKNOWN\r\n" + BEHIND,
    SIGNATURE + b"\x21\x11\0\x0c\xc0\0\2\7\xc0\0\2\1\x12\x67\1\xbb" + BEHIND,
    SIGNATURE + b"\x21\x21\0\x24" + bytes(36) + BEHIND,
    SIGNATURE + b"\x20\0\0\0" + BEHIND,
    words=(SIGNATURE, b"PROXY ", b"TCP4 ", b"UNKNOWN", b"\r\n", b"\x21\x31", b"65536", b"-1 ", b"\xb2"),
)  # fmt: skip
def proxy_protocol(data: bytes) -> None:
    """The same address however it was cut, no byte behind is taken, and both versions agree."""
    found = _proxied(data, 2**16)
    assert _proxied(data, 1) == found
    if found is None:
        return
    address, behind = found
    assert data.endswith(behind)
    if address is None:
        return
    host, _, port = address.rpartition(":")
    parsed = ipaddress.ip_address(host.strip("[]"))
    words = (f"TCP{parsed.version}", str(parsed), str(parsed), port, "80")
    assert _proxied(b"PROXY %b\r\n" % " ".join(words).encode() + behind, 5) == found
    family, both = (
        (b"\x11", 2 * parsed.packed) if parsed.version == 4 else (b"\x21", 2 * parsed.packed)
    )
    body = both + struct.pack("!HH", int(port), 80)
    header = SIGNATURE + b"\x21" + family + struct.pack("!H", len(body)) + body
    assert _proxied(header + behind, 5) == found


# frames

LIMIT: Final = 1000
SHORT: Final = frames.masked_frame(frames.TEXT, b'{"id":1,"connect":{}}')
STARTED: Final = frames.masked_frame(frames.BINARY, b"", fin=False)
FRAME_SEEDS: Final = (
    SHORT,
    SHORT + frames.masked_frame(frames.BINARY, bytes(200)) + frames.masked_frame(frames.TEXT, "é€".encode()),
    frames.masked_frame(frames.TEXT, b'{"id":1,', fin=False)
    + frames.masked_frame(frames.PING, b"now")
    + frames.masked_frame(frames.CONTINUATION, b'"send":{}}') + SHORT,
    frames.masked_frame(frames.PONG, b"") + frames.masked_frame(frames.CLOSE, b"\x03\xe8bye") + SHORT,
    frames.masked_frame(frames.CONTINUATION, b"a" * 130, fin=False) + frames.masked_frame(frames.CONTINUATION, b"b"),
    frames.masked_frame(frames.BINARY, bytes(1001)), b"\x81\xff\0\0\0\0\0\1\0\0\0\0\0\0",
    b"\x81\x85\x37\xfa\x21\x3d\x7f\x9f\x4d\x51\x58",
)  # fmt: skip
FRAME_WORDS: Final = (
    b"\x81\x80\0\0\0\0", b"\x01\x80\0\0\0\0", b"\x80\x80\0\0\0\0", b"\0\x80\0\0\0\0", b"\x89\x80\0\0\0\0",
    b"\x88\x82\0\0\0\0\x03\xe8", b"\x88\x80\0\0\0\0", b"\x81\xfe\0\x7e", b"\x82\xff", b"\xc1", b"\x83",
    b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\x03\xed", SHORT,
)  # fmt: skip


def _by_wsproto(data: bytes) -> list[tuple[int, bytes]]:
    """The whole messages that another implementation reads."""
    protocol = FrameProtocol(client=False, extensions=[])
    protocol.receive_bytes(data)
    messages: list[tuple[int, bytes]] = []
    parts: list[bytes] = []
    for frame in protocol.received_frames():
        payload = frame.payload
        parts.append(
            payload.encode() if isinstance(payload, str) else bytes(cast(bytearray, payload))
        )
        if frame.message_finished:
            messages.append((int(frame.opcode), b"".join(parts)))
            parts.clear()
    assert not parts, "the last is not whole"
    return messages


@target("frames", *FRAME_SEEDS, words=FRAME_WORDS)
def whole_frames(data: bytes) -> None:
    """What the fast readers take is what wsproto reads there, byte for byte."""
    messages, used = frames.take_messages(data, LIMIT)
    assert _by_wsproto(data[:used]) == messages
    assert frames.take_messages(bytearray(data), LIMIT) == (messages, used)
    joined, count, taken, fin = frames.take_fragments(data, LIMIT)
    if count:
        closing = b"" if fin else frames.masked_frame(frames.CONTINUATION, b"")
        assert _by_wsproto(STARTED + data[:taken] + closing) == [(frames.BINARY, joined)]
    end, passed = frames.pass_over(data, 100)
    at = 0
    for _ in range(passed):
        header = frames.read_header(data, at)
        if header is not None:
            at += header.size + header.length
        else:  # of the last one the mask is yet to come
            at = end
    assert at == end
    _close(data[:125])
    mask = (data + bytes(4))[:4]
    assert frames.unmask(frames.unmask(data, mask), mask) == data
    client = Connection(ConnectionType.CLIENT)
    client.receive_data(frames.fragments(frames.BINARY, data, 100))
    parts = [event.data for event in client.events() if isinstance(event, BytesMessage)]
    assert b"".join(parts) == data


def _close(payload: bytes) -> None:
    """A Close frame is legal where wsproto takes it."""
    protocol = FrameProtocol(client=False, extensions=[])
    protocol.receive_bytes(frames.masked_frame(frames.CLOSE, payload))
    try:
        list(protocol.received_frames())
        takes = True
    except ParseFailed:
        takes = False
    assert frames.is_legal_close(payload) == takes, payload
    code, reason = frames.close_content(payload)
    if takes and len(payload) >= 2:
        again = frames.close_frame(code, reason)
        assert frames.payload_of(again) == payload


# the lane

LIMITS: Final = LaneLimits(
    max_message_bytes=LIMIT,
    max_fragments=10,
    message_seconds=30,
    control_rate=20,
    control_burst=100,
    inbox_batches=1000,
    inbox_bytes=10**6,
)


class _Read:
    """All that came of a peer: its messages, and how that ended."""

    def __init__(self) -> None:
        self.messages: list[frames.Message] = []
        self.sent: tuple[int, str] | None = None
        self.peer: tuple[int, str] | None = None


async def _read_all(data: bytes, size: int) -> _Read:
    stream, theirs = memory_stream_pair()
    read = _Read()
    lane = Lane(stream, b"", LIMITS, lambda: None)
    async with trio.open_nursery() as nursery:

        async def flush(outboxes: list[Outbox]) -> None:
            for outbox in outboxes:
                outbox.flush(trio.current_time())

        lane.outbox = Outbox(
            stream,
            post=lambda outboxes: nursery.start_soon(flush, outboxes),
            owner=Calls(start=nursery.start_soon, broken=lane.lost),
            max_bytes=10**6,
            max_messages=10**6,
            stall_seconds=10,
        )
        nursery.start_soon(lane.run, nursery.start_soon)

        async def collect() -> None:
            async for batch in lane.inbox:
                read.messages += batch
                lane.note_done(batch)

        nursery.start_soon(collect)
        for start in range(0, len(data), size):
            await theirs.send_all(data[start : start + size])
            await trio.testing.wait_all_tasks_blocked()
        await theirs.send_eof()
        await trio.testing.wait_all_tasks_blocked()
        assert lane.has_ended or lane.close_sent is not None, "the end was not seen"
        nursery.cancel_scope.cancel()
    read.sent, read.peer = lane.close_sent, lane.peer_close
    return read


def lane_of(data: bytes, size: int) -> _Read:
    with structlog.testing.capture_logs():
        return trio.run(_read_all, data, size, clock=MockClock())


def _by_wsproto_until_wrong(data: bytes) -> Sequence[frames.Message]:
    """The messages before a Close or an error."""
    connection = Connection(ConnectionType.SERVER)
    messages: list[frames.Message] = []
    parts: list[bytes] = []
    try:
        connection.receive_data(data)
        for event in connection.events():
            if isinstance(event, TextMessage | BytesMessage):
                part = event.data.encode() if isinstance(event, TextMessage) else bytes(event.data)
                parts.append(part)
                if event.message_finished:
                    opcode = frames.TEXT if isinstance(event, TextMessage) else frames.BINARY
                    messages.append((opcode, b"".join(parts)))
                    parts.clear()
            elif isinstance(event, CloseConnection):
                break
    except RemoteProtocolError:
        pass
    return messages


@target("lane", *FRAME_SEEDS, words=FRAME_WORDS, share=5, most=2048)
def lane(data: bytes) -> None:
    """The same messages and the same end however the bytes were cut, those that wsproto reads; and each
    message is commands, or is refused."""
    whole = lane_of(data, 2**16)
    sliced = lane_of(data[:400], 3) if len(data) <= 400 else lane_of(data, len(data) // 3)
    assert sliced.messages == whole.messages
    assert (sliced.sent, sliced.peer) == (whole.sent, whole.peer)
    theirs = _by_wsproto_until_wrong(data)
    code = None if whole.sent is None else whole.sent[0]
    if code in (1008, 1009):  # bounds of ours
        assert list(theirs[: len(whole.messages)]) == whole.messages
    else:
        assert list(theirs) == whole.messages, f"closed with {code}"
    for _, payload in whole.messages:
        try:
            list(CENTRIFUGE_JSON.decode(payload))
        except BadCommand:
            pass
