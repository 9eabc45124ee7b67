"""Request heads that pass, those that are refused, and that nothing that passes can hurt later."""

import base64
import string

import h11
import pytest
import trio
import wsproto
import wsproto.events
from hypothesis import example, given
from hypothesis import strategies as st
from trio.testing import memory_stream_one_way_pair, wait_all_tasks_blocked

from broker.errors import HeadError
from broker.transport.head import (
    acceptance,
    check_upgrade,
    parse_head,
    read_fields,
    read_head,
    refusal,
    whole_head,
)

KEY = "dGhlIHNhbXBsZSBub25jZQ=="
UPGRADE = {
    "Host": "localhost:9501",
    "Connection": "keep-alive, Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": KEY,
}


def head_bytes(line: str = "GET / HTTP/1.1", headers: dict[str, str] | None = None) -> bytes:
    fields = UPGRADE if headers is None else headers
    lines = [line, *(f"{name}: {value}" for name, value in fields.items()), "", ""]
    return "\r\n".join(lines).encode("latin-1")


def status_of(raw: bytes, *, upgrade: bool = True) -> int:
    """The status that a peer gets which sends `raw`; 101 when it passes."""
    try:
        head = parse_head(raw)
        if upgrade:
            check_upgrade(head)
    except HeadError as error:
        return error.status
    return 101


# acceptance


@pytest.mark.parametrize("subprotocol", [None, "centrifuge-json"])
def test_the_answer_is_what_a_client_of_wsproto_accepts(subprotocol: str | None) -> None:
    client = wsproto.WSConnection(wsproto.ConnectionType.CLIENT)
    offered = ["other", "centrifuge-json"]
    request = wsproto.events.Request(host="localhost", target="/", subprotocols=offered)
    raw = client.send(request)
    client.receive_data(acceptance(parse_head(raw), subprotocol))
    (event,) = client.events()
    assert isinstance(event, wsproto.events.AcceptConnection)
    assert event.subprotocol == subprotocol


# what an app sees


def fields_of(*lines: bytes) -> dict[str, str]:
    raw = b"\r\n".join([b"GET / HTTP/1.1", b"Host: a", *lines, b"", b""])
    head = parse_head(raw)
    fields = head.fields()
    assert read_fields(head.field_lines) == fields  # as a connection does that has kept these alone
    assert fields.pop("host") == "a"
    return fields


@pytest.mark.parametrize(
    "lines, fields",
    [
        ([b"X-Forwarded-For: 1.2.3.4", b"x-forwarded-for: 5.6.7.8"], {"x-forwarded-for": "1.2.3.4, 5.6.7.8"}),
        ([b"Cookie: a=1", b"Cookie: b=2", b"cookie: c=3"], {"cookie": "a=1; b=2; c=3"}),
        ([b"Accept: a", b"X: 1", b"Accept: b"], {"accept": "a, b", "x": "1"}),
        ([b"Via:", b"Via: b"], {"via": ", b"}),
        (["Cookie: nick=张三".encode()], {"cookie": "nick=张三"}),
        ([b"Cookie: nick=caf\xe9"], {"cookie": "nick=caf\xe9"}),
        (["Cookie: a=张".encode(), b"Cookie: b=\xff"], {"cookie": "a=张; b=\xff"}),
        ([b"X: \xed\xa0\xbd"], {"x": "\xed\xa0\xbd"}),  # half a pair is no UTF-8
        ([b"X: \xc0\xaf"], {"x": "\xc0\xaf"}),  # nor is a long way to say "/"
    ],
)  # fmt: skip
def test_an_app_sees_one_value_of_each_header(lines: list[bytes], fields: dict[str, str]) -> None:
    assert fields_of(*lines) == fields


@given(st.binary(max_size=40))
def test_an_app_can_encode_any_value_that_passes(value: bytes) -> None:
    raw = b"GET / HTTP/1.1\r\nHost: a\r\nX: " + value + b"\r\n\r\n"
    if status_of(raw, upgrade=False) == 101:
        head = parse_head(raw)
        text = head.fields()["x"]
        assert read_fields(head.field_lines)["x"] == text
        assert text.encode() in (
            value.strip(b" \t"),
            value.strip(b" \t").decode("latin-1").encode(),
        )


@pytest.mark.parametrize(
    "path, route",
    [("/", "/"), ("/a", "/a"), ("/a/", "/a"), ("/a//", "/a/"), ("/a/?b=/", "/a"), ("*", "*")],
)
def test_a_slash_at_the_end_of_a_path_makes_no_other_route(path: str, route: str) -> None:
    head = parse_head(head_bytes(f"GET {path} HTTP/1.1"))
    assert (head.route, head.path) == (route, path.partition("?")[0])


# parse_head


def test_a_head_is_shown_as_it_was_sent() -> None:
    raw = (
        b"GET /connection/websocket?a=%20b&c HTTP/1.1\r\nHOST:localhost:9501 \r\n"
        b"Origin: http://localhost:9501\r\nX-A: 1\r\nx-a:\t2 3\t\r\nEmpty:\r\n\r\n"
    )
    head = parse_head(raw)
    assert (head.method, head.version, head.raw) == ("GET", "1.1", raw)
    assert head.target == "/connection/websocket?a=%20b&c"
    assert (head.path, head.query) == ("/connection/websocket", "a=%20b&c")
    assert head.headers[0] == ("host", "localhost:9501")
    assert (head.host, head.origin) == ("localhost:9501", "http://localhost:9501")
    assert head.header("X-A") == "1, 2 3"
    assert head.header("empty") == ""
    assert head.header("absent") is None
    assert not head.is_upgrade
    assert head.subprotocols == ()


def test_an_upgrade_names_its_subprotocols_in_order() -> None:
    fields = {**UPGRADE, "Sec-WebSocket-Protocol": "centrifuge-protobuf,, centrifuge-json "}
    head = parse_head(head_bytes(headers=fields))
    assert head.is_upgrade
    assert head.subprotocols == ("centrifuge-protobuf", "centrifuge-json")


@pytest.mark.parametrize(
    "line, status",
    [
        ("GET / HTTP/1.1", 101),
        ("GET http://localhost/ HTTP/1.1", 101),
        ("OPTIONS * HTTP/1.1", 101),
        ("POST /api/publish HTTP/1.0", 101),
        ("get / HTTP/1.1", 101),
        ("GET / HTTP/2.0", 505),
        ("GET / HTTP/0.9", 505),
        ("GET / HTTP/1.2", 505),
        ("PRI * HTTP/2.0", 400),
        ("GET /", 400),
        ("GET  / HTTP/1.1", 400),
        ("GET /\t HTTP/1.1", 400),
        ("GET / HTTP/1.1 ", 400),
        ("GET / http/1.1", 400),
        ("G(T / HTTP/1.1", 400),
        ("GET /\xe9 HTTP/1.1", 400),
        ("GET /\x00 HTTP/1.1", 400),
        ("", 400),
    ],
)
def test_a_request_line_has_three_words(line: str, status: int) -> None:
    assert status_of(head_bytes(line), upgrade=False) == status


@pytest.mark.parametrize(
    "field, status",
    [
        ("Cookie: caf\xe9", 101),
        ("X: a\tb", 101),
        ("X:", 101),
        ("X : a", 400),
        (": a", 400),
        ("no colon", 400),
        (" folded", 400),
        ("\tfolded", 400),
        ("X: a\x00b", 400),
        ("X: a\x0bb", 400),
        ("X: a\x7fb", 400),
        ("X: a\rb", 400),
        ("X: a\nY: b", 400),
        ("\xe9: a", 400),
        ("Content-Length: 5", 101),
        ("Content-Length: -1", 400),
        ("Content-Length: 1, 1", 400),
        ("Content-Length: 1\r\nContent-Length: 1", 400),
        ("Content-Length: " + "9" * 19, 400),
        ("Transfer-Encoding: Chunked", 101),
        ("Transfer-Encoding: gzip", 501),
        ("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", 501),
        ("Transfer-Encoding: chunked\r\nContent-Length: 5", 400),
        ("Host: localhost", 400),
    ],
)
def test_a_header_is_one_line_with_one_meaning(field: str, status: int) -> None:
    raw = f"GET / HTTP/1.1\r\nHost: a\r\n{field}\r\n\r\n".encode("latin-1")
    assert status_of(raw, upgrade=False) == status


@pytest.mark.parametrize(
    "host, status",
    [
        ("localhost", 101),
        ("localhost:9501", 101),
        ("127.0.0.1:1", 101),
        ("[::1]:9501", 101),
        ("xn--bcher-kva.example", 101),
        ("under_score", 101),
        # IDNA 2008, which Python's own codec cannot read
        ("xn--strae-oqa.de", 101),
        ("XN--STRAE-OQA.DE:443", 101),
        ("xn--nxasmm1c.example", 101),
        ("xn--ls8h.la", 101),
        ("a.xn--fiqs8s", 101),
        ("xn--mgba3a4f16a.ir.", 101),
        ("xn--1ch.example", 101),
        # no A-labels, and nobody here decodes them
        ("xn--a.example", 101),
        ("xn---", 101),
        ("axn--.example", 101),
        # the mark of an A-label, of nothing
        ("xn--", 400),
        ("XN--:9501", 400),
        ("a.xn--", 400),
        ("a.Xn--.example:1", 400),
        ("b\xfccher.example", 400),
        ("xn--\x80", 400),
        ("localhost:65536", 400),
        ("localhost:http", 400),
        ("[::1", 400),
        ("[1.2.3]", 400),
        ("a/b", 400),
        ("a@b", 400),
        ("a b", 400),
        ("a" * 300, 400),
        ("", 400),
    ],
)
def test_a_websocket_comes_to_a_well_formed_host(host: str, status: int) -> None:
    assert status_of(head_bytes(headers={**UPGRADE, "Host": host})) == status


def test_only_http_1_0_may_leave_out_the_host() -> None:
    assert status_of(head_bytes("GET / HTTP/1.0", {}), upgrade=False) == 101
    assert status_of(head_bytes("GET / HTTP/1.1", {}), upgrade=False) == 400


def test_a_head_ends_with_a_blank_line() -> None:
    assert status_of(head_bytes()[:-2], upgrade=False) == 400
    assert status_of(b"", upgrade=False) == 400


# check_upgrade


@pytest.mark.parametrize(
    "change, status",
    [
        ({}, 101),
        ({"Connection": "Upgrade"}, 101),
        ({"Connection": "UPGRADE"}, 101),
        ({"Connection": "keep-alive"}, 400),
        ({"Connection": "upgraded"}, 400),
        ({"Connection": "Upgrade\r\nConnection: keep-alive"}, 101),
        ({"Connection": "keep-alive\r\nConnection: Upgrade"}, 101),
        ({"Connection": "\r\nConnection: ,upgrade,"}, 101),
        ({"Connection": "keep-alive\r\nConnection: TE"}, 400),
        ({"Connection": "keep-alive\r\nConnection: Upgrade, \xe9"}, 400),
        ({"Upgrade": "WebSocket"}, 101),
        ({"Upgrade": "h2c, websocket"}, 101),
        ({"Upgrade": "websocket\r\nUpgrade: h2c"}, 101),
        ({"Upgrade": "h2c\r\nUpgrade: WEBSOCKET"}, 101),
        ({"Upgrade": "websockets"}, 400),
        ({"Upgrade": "h2c"}, 400),
        ({"Upgrade": "websocket, \xe9"}, 400),
        ({"Sec-WebSocket-Version": "8"}, 426),
        ({"Sec-WebSocket-Version": "013"}, 426),
        ({"Sec-WebSocket-Version": "8\r\nSec-WebSocket-Version: 13"}, 400),
        ({"Sec-WebSocket-Key": "junk"}, 400),
        ({"Sec-WebSocket-Key": ""}, 400),
        ({"Sec-WebSocket-Key": base64.b64encode(b"x" * 15).decode()}, 400),
        ({"Sec-WebSocket-Key": base64.b64encode(b"x" * 17).decode()}, 400),
        ({"Sec-WebSocket-Key": KEY.replace("d", "-", 1)}, 400),
        ({"Sec-WebSocket-Key": f"{KEY}\r\nSec-WebSocket-Key: {KEY}"}, 400),
        ({"Origin": "null"}, 101),
        ({"Origin": "http://a\r\nOrigin: http://b"}, 400),
        ({"Content-Length": "0"}, 101),
        ({"Content-Length": "5"}, 400),
        ({"Transfer-Encoding": "chunked"}, 400),
        ({"Expect": "100-continue"}, 101),
        ({"Sec-WebSocket-Protocol": "\xe9"}, 400),
        ({"Sec-WebSocket-Protocol": "centrifuge-json\r\nSec-WebSocket-Protocol: a"}, 101),
        ({"Sec-WebSocket-Extensions": "\x80"}, 400),
        ({"Sec-WebSocket-Version": "13\xa0"}, 400),
        ({"Sec-WebSocket-Unheard-Of": "\xe9"}, 400),
        ({"Origin": "http://caf\xe9"}, 400),
        # others are the app's
        ({"Cookie": "caf\xe9"}, 101),
        ({"Cookie": "nick=\xe5\xbc\xa0\xe4\xb8\x89"}, 101),
        ({"User-Agent": "\xff"}, 101),
        ({"X-Forwarded-For": "\x80"}, 101),
        ({"Cookie": "a=\x00"}, 400),
        ({"Cookie": "a=\x7f"}, 400),
        ({"Sec-WebSocket-Extensions": "permessage-deflate; client_max_window_bits"}, 101),
    ],
)
def test_a_handshake_is_as_rfc_6455_has_it(change: dict[str, str], status: int) -> None:
    assert status_of(head_bytes(headers={**UPGRADE, **change})) == status


@pytest.mark.parametrize("absent", UPGRADE)
def test_a_handshake_without_one_of_its_headers_is_refused(absent: str) -> None:
    fields = {name: value for name, value in UPGRADE.items() if name != absent}
    assert status_of(head_bytes(headers=fields)) == (426 if "Version" in absent else 400)


@pytest.mark.parametrize(
    "line, status",
    [
        ("GET /?a=b HTTP/1.1", 101),
        ("GET / HTTP/1.0", 505),
        ("POST / HTTP/1.1", 400),
        ("GET http://localhost/ HTTP/1.1", 400),
        ("GET * HTTP/1.1", 400),
    ],
)
def test_a_handshake_is_a_get_of_a_path(line: str, status: int) -> None:
    assert status_of(head_bytes(line)) == status


# Nothing that passes can hurt the parsers behind


def h11_reads(raw: bytes) -> None:
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(raw)
    assert isinstance(connection.next_event(), h11.Request)


def we_accept(raw: bytes) -> None:
    """All that is done with a handshake, to the answer that a client of another kind reads."""
    head = parse_head(raw)
    head.fields()
    for subprotocol in (None, *head.subprotocols):
        assert acceptance(head, subprotocol).startswith(b"HTTP/1.1 101 ")


words = st.text(alphabet=string.printable[:-6] + "\r\n\t\x00\x7f\xe9", max_size=12)
tokens = st.text(alphabet=string.ascii_letters + string.digits + "-_!~", min_size=1, max_size=12)
hosts = st.one_of(
    st.sampled_from(["localhost:9501", "[::1]:1", "xn--", "a..b", "."]),
    st.from_regex(
        r"(xn--)?[a-z0-9-]{0,12}(\.xn--[A-Za-z0-9-]{0,12})?(:[0-9]{0,6})?", fullmatch=True
    ),
    st.text(alphabet=string.ascii_letters + string.digits + ".-_:[]%~", max_size=70),
)
comma_lists = st.lists(st.one_of(tokens, words), max_size=4).map(", ".join)
keys = st.one_of(
    st.binary(min_size=15, max_size=17).map(lambda b: base64.b64encode(b).decode()), words
)


def mostly(usual: str, odd: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(st.just(usual), st.just(usual), st.just(usual), odd)


@st.composite
def handshakes(draw: st.DrawFn) -> bytes:
    """Heads that are nearly right: most fields as they should be, some odd, repeated or gone."""
    target = draw(mostly("/", words.map(lambda word: f"/{word}")))
    fields = [
        ("Host", draw(hosts)),
        ("Connection", draw(mostly("Upgrade", comma_lists))),
        ("Upgrade", draw(mostly("websocket", comma_lists))),
        ("Sec-WebSocket-Version", draw(mostly("13", words))),
        ("Sec-WebSocket-Key", draw(mostly(KEY, keys))),
        *draw(st.lists(st.tuples(st.just("Sec-WebSocket-Protocol"), comma_lists), max_size=2)),
        *draw(st.lists(st.tuples(st.just("Sec-WebSocket-Extensions"), comma_lists), max_size=2)),
        *draw(
            st.lists(
                st.tuples(
                    st.one_of(
                        tokens,
                        st.sampled_from(
                            ["host", "connection", "upgrade", "sec-websocket-key", "Expect",
                             "Content-Length", "Transfer-Encoding", "Origin", "HTTP2-Settings"]
                        ),
                    ),
                    st.one_of(words, st.sampled_from(["0", "chunked", "100-continue", "close"])),
                ),
                max_size=2,
            )
        ),
    ]  # fmt: skip
    shuffled = draw(st.permutations(fields))
    lines = [f"GET {target} HTTP/1.1", *(f"{name}: {value}" for name, value in shuffled), "", ""]
    return "\r\n".join(lines).encode("latin-1")


@given(handshakes())
@example(head_bytes())
@example(head_bytes(headers={**UPGRADE, "Host": "xn--"}))
@example(head_bytes(headers={**UPGRADE, "Expect": "100-continue", "Content-Length": "0"}))
@example(head_bytes(headers={**UPGRADE, "Sec-WebSocket-Protocol": "a b,!,c"}))
def test_no_handshake_that_passes_makes_h11_or_ourselves_raise(raw: bytes) -> None:
    status = status_of(raw, upgrade=False)
    if status == 101:
        h11_reads(raw)
        if status_of(raw) == 101:
            we_accept(raw)


@given(st.binary(max_size=80), st.binary(max_size=80))
def test_no_head_at_all_makes_h11_raise_once_it_passed(line: bytes, field: bytes) -> None:
    for raw in (
        line + b"\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: " + field + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: " + field + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n" + field + b"\r\n\r\n",
    ):
        if status_of(raw, upgrade=False) == 101:
            h11_reads(raw)


# read_head


async def test_bytes_behind_the_head_are_kept() -> None:
    ours, theirs = memory_stream_one_way_pair()
    await ours.send_all(head_bytes() + b"\x81\x80\x00\x00\x00\x00")
    assert await read_head(theirs, 8192) == (head_bytes(), b"\x81\x80\x00\x00\x00\x00")


async def test_a_head_may_come_one_byte_at_a_time() -> None:
    ours, theirs = memory_stream_one_way_pair()

    async def trickle() -> None:
        for byte in head_bytes() + b"rest":
            await ours.send_all(bytes([byte]))
            await wait_all_tasks_blocked()

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trickle)
            assert await read_head(theirs, 8192) == (head_bytes(), b"")


async def test_a_head_may_have_begun_before() -> None:
    ours, theirs = memory_stream_one_way_pair()
    await ours.send_all(head_bytes()[20:] + b"rest")
    assert await read_head(theirs, 8192, head_bytes()[:20]) == (head_bytes(), b"rest")


@pytest.mark.parametrize(
    ("data", "both"),
    [
        (head_bytes() + b"rest", (head_bytes(), b"rest")),
        (head_bytes(), (head_bytes(), b"")),
        (head_bytes()[:-1], None),
        (b"", None),
        (b"\r\n" + head_bytes(), None),  # an empty line before it
    ],
)
def test_a_head_that_came_in_one_piece_needs_no_reading(
    data: bytes, both: tuple[bytes, bytes] | None
) -> None:
    assert whole_head(data) == both


async def test_a_peer_that_says_nothing_and_leaves_is_no_error() -> None:
    ours, theirs = memory_stream_one_way_pair()
    await ours.aclose()
    assert await read_head(theirs, 8192) is None


async def test_a_peer_that_leaves_midway_is_refused() -> None:
    ours, theirs = memory_stream_one_way_pair()
    await ours.send_all(b"GET / HT")
    await ours.aclose()
    with pytest.raises(HeadError, match="400"):
        await read_head(theirs, 8192)


@pytest.mark.parametrize("empty", [b"\r\n", b"\r\n\r\n", b"\r\n" * 50])
@pytest.mark.parametrize("size", [1, 3, 10_000])
async def test_empty_lines_before_a_request_are_passed_over(empty: bytes, size: int) -> None:
    ours, theirs = memory_stream_one_way_pair()
    sent = empty + head_bytes()

    async def in_pieces() -> None:
        for start in range(0, len(sent), size):
            await ours.send_all(sent[start : start + size])
            await wait_all_tasks_blocked()

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(in_pieces)
            assert await read_head(theirs, 8192) == (head_bytes(), b"")


@pytest.mark.parametrize("empty", [b"\r\n", b"\r\n\r\n\r\n", b"\r"])
async def test_a_peer_that_leaves_behind_empty_lines_is_no_error(empty: bytes) -> None:
    ours, theirs = memory_stream_one_way_pair()
    await ours.send_all(empty)
    await ours.aclose()
    assert await read_head(theirs, 8192) is None


async def test_empty_lines_count_as_part_of_the_head() -> None:
    ours, theirs = memory_stream_one_way_pair()
    await ours.send_all(b"\r\n" * 5000)
    with pytest.raises(HeadError, match="431"):
        await read_head(theirs, 8192)


@pytest.mark.parametrize(
    "begin",
    [
        b"\x16\x03\x01\x02\x00\x01",
        b"\x00",
        b"\n",
        b"\rGET / HTTP/1.1\r\n",
        b"\r\n\nGET / HTTP/1.1\r\n",
        b"\r\n GET / HTTP/1.1\r\n",
        b"\r\n\x16\x03",
        b" GET / HTTP/1.1\r\n",
        b"GET / HTTP/1.1\n",
        b"\xff",
    ],
)
async def test_bytes_that_cannot_become_http_are_refused_without_waiting(begin: bytes) -> None:
    ours, theirs = memory_stream_one_way_pair()
    await ours.send_all(begin)
    with pytest.raises(HeadError, match="400"):
        await read_head(theirs, 8192)


class Endless(trio.abc.ReceiveStream):
    """A peer that sends `x` for ever, and counts how many were taken."""

    taken = 0

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        assert max_bytes is not None
        self.taken += max_bytes
        return b"x" * max_bytes

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


async def test_a_head_over_the_limit_is_refused_and_nothing_past_it_is_read() -> None:
    peer = Endless()
    with pytest.raises(HeadError, match="431"):
        await read_head(peer, 10_000)
    assert peer.taken == 10_000


async def test_a_head_of_exactly_the_limit_passes() -> None:
    ours, theirs = memory_stream_one_way_pair()
    await ours.send_all(head_bytes() + b"x")
    assert await read_head(theirs, len(head_bytes())) == (head_bytes(), b"")
    ours, theirs = memory_stream_one_way_pair()
    await ours.send_all(head_bytes())
    with pytest.raises(HeadError, match="431"):
        await read_head(theirs, len(head_bytes()) - 1)


# refusal


def response(raw: bytes) -> tuple[h11.Response, bytes]:
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method="GET", target="/", headers=[("Host", "a")]))
    client.send(h11.EndOfMessage())
    client.receive_data(raw)
    answer, body = client.next_event(), client.next_event()
    assert isinstance(answer, h11.Response)
    assert isinstance(body, h11.Data)
    assert isinstance(client.next_event(), h11.EndOfMessage)
    assert client.their_state is h11.MUST_CLOSE
    return answer, bytes(body.data)


def test_a_refusal_is_a_whole_response_that_closes() -> None:
    answer, body = response(refusal(503, "full", [("Retry-After", "1")]))
    assert (answer.status_code, answer.reason, body) == (503, b"Service Unavailable", b"full\n")
    assert (b"retry-after", b"1") in list(answer.headers)


def test_a_426_says_what_to_upgrade_to() -> None:
    answer, _ = response(refusal(426, "use a WebSocket"))
    headers = dict(answer.headers)
    assert headers[b"upgrade"] == b"websocket"
    assert headers[b"sec-websocket-version"] == b"13"
    assert b"Upgrade" in headers[b"connection"]
