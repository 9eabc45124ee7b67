"""Inputs before the handshake: bytes that are no HTTP, heads, bodies, origins, hosts, kept connections."""

from collections.abc import Sequence
from typing import Final

import trio

from tests.hostile.field import PLAIN, Attack, Field, Input, add, hostile, unless
from tests.hostile.target import API_KEY, SECRET, Setup
from tests.hostile.wire import KEY, Ended, Peer, frame, handshake, header_of, request, text

HASTY: Final = Setup(
    env={
        "BROKER_OPEN_SECONDS": "1",
        "BROKER_MESSAGE_SECONDS": "2",
        "BROKER_CLOSE_SECONDS": "1",
        "BROKER_PING_SECONDS": "2",
        "BROKER_PONG_SECONDS": "1",
        "BROKER_STALL_SECONDS": "2",
    }
)
"""Deadlines short enough that a table of them ends today; which deadline it is does not matter."""

S1, S2, S3 = "hostile peers, S1", "hostile peers, S2", "hostile peers, S3"
KEYED = ("X-API-Key", API_KEY)


def _answered(*pieces: bytes, finish: bool = False) -> Attack:
    """Send, and see what HTTP says; half a second between pieces."""

    async def attack(field: Field) -> Sequence[str]:
        peer = await field.connect()
        for number, piece in enumerate(pieces):
            if number:
                await trio.sleep(0.5)
            try:
                await peer.send(piece)
            except Ended:
                break  # it has answered already, and we did not wait for it
        if finish:
            await peer.finish()
        return [str((await peer.head()).status)]

    return attack


def head(
    name: str, source: str, data: bytes, *should: str, setup: Setup = PLAIN, finish: bool = False
) -> None:
    """Put one request, and the statuses that are right for it, into the table."""
    attack = _answered(data, finish=finish)
    add(
        Input(
            name=f"head/{name}", source=source, should=should, attack=attack, setup=setup,
            times=10, quick=setup is PLAIN,
        )
    )  # fmt: skip


# bytes that are no HTTP

head("TLS hello to a plain port", S3, b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03", "400")
head("zeros", S3, bytes(100), "400")
head("a line of text", S3, b"hello?\n", "400")
head("HTTP 2 preface", "RFC 9113 3.4", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "400")
head("bare line feeds", "RFC 9112 2.2", b"GET / HTTP/1.1\nHost: localhost\n\n", "400")
head("bad request line", S1, b"GET nonsense\r\n\r\n", "400")
head("two spaces", "RFC 9112 3", b"GET  / HTTP/1.1\r\nHost: localhost\r\n\r\n", "400")
head("half a head, then FIN", S1, handshake()[:-10], "400", finish=True)
head("an empty line before", "issue 8; RFC 9112 2.2", b"\r\n" + handshake(), "101")

# heads

head("1 MB of headers", S3, b"GET / HTTP/1.1\r\n" + b"X-A: y\r\n" * 125_000, "431")
head("1 MB of target", S3, b"GET /" + b"x" * 2**20, "431")
head("8193 bytes", S3, handshake(fields={"X-A": "y" * 8200}), "431")
head("676 empty headers", "issue 9", request("GET /healthz", [("a", "")] * 1300), "200")
head("no Host", "RFC 9112 3.2", handshake(host=""), "400")
head("two Hosts", "RFC 9112 3.2", handshake(fields={"Host": "localhost"}), "400")
head("folded header", "RFC 9112 5.2", request("GET /", [("X-A", "1\r\n 2")]), "400")
head("space before the colon", "RFC 9112 5.1", request("GET /", [("X-A ", "1")]), "400")
head("NUL in a header", "RFC 9110 5.5", request("GET /", [("X-A", "a\x00b")]), "400")
head("Host of 300 bytes", S1, handshake(host="a" * 300), "400")
head("Host with a port of letters", S1, handshake(host="localhost:http"), "400")
head("Host with half an address", S1, handshake(host="[::1"), "400")
head("Host xn-- alone", S1, handshake(host="xn--"), "400")
head("Host in IDNA 2008", "issue 8", handshake(host="xn--strae-oqa.de"), "101",
     setup=Setup(env={"BROKER_HOSTS": "xn--strae-oqa.de"}))  # fmt: skip
for name, value in {
    "Host": "caf\xe9",
    "Connection": "Upgrade, \xe9",
    "Sec-WebSocket-Key": KEY[:-1] + "\xff",
    "Sec-WebSocket-Version": "13\xa0",
    "Sec-WebSocket-Protocol": "caf\xe9",
    "Sec-WebSocket-Extensions": "\x80",
}.items():
    host = "" if name == "Host" else "localhost"
    head(f"byte over 0x7F in {name}", S1, handshake(fields={name: value}, host=host), "400")
head("UTF-8 in Cookie", "issue 8",
     handshake(fields={"Cookie": "nick=张三".encode().decode("latin-1")}), "101")  # fmt: skip
head("two Connection lines", "issue 8", request("GET /", [
    ("Connection", "keep-alive"), ("Connection", "Upgrade"), ("Upgrade", "websocket"),
    ("Sec-WebSocket-Key", KEY), ("Sec-WebSocket-Version", "13"),
]), "101")  # fmt: skip
head("trailing slash", "issue 8", handshake("/connection/websocket/"), "101")
head("HTTP 1.0 upgrade", S3, handshake().replace(b"HTTP/1.1", b"HTTP/1.0"), "505")
head("HTTP 3.0", S3, handshake().replace(b"HTTP/1.1", b"HTTP/3.0"), "505")
head("junk key", S3, handshake(fields={"Sec-WebSocket-Key": "junk"}), "400")
head("no key", S3, handshake(fields={"Sec-WebSocket-Key": None}), "400")
head("version 12", S3, handshake(fields={"Sec-WebSocket-Version": "12"}), "426")
head("upgrade by POST", S3, handshake().replace(b"GET", b"POST"), "400")
head("upgrade with a body", S3, handshake(fields={"Content-Length": "5"}) + b"hello", "400")
head("upgrade to h2c", "RFC 9113 3.1",
     request("GET /healthz", [("Connection", "Upgrade"), ("Upgrade", "h2c")]), "200")  # fmt: skip

# requests that are none of a WebSocket

head("GET on the WebSocket path", S3, request("GET /connection/websocket"), "426")
head("POST on the WebSocket path", S3, request("POST /connection/websocket", (), b"hi"), "426")
head("POST on the page", S3, request("POST /", (), b"hi"), "404", "405")
head("path above the root", "RFC 3986 5.2.4", request("GET /static/../../../etc/passwd"), "404")
head("path above, encoded", "RFC 3986 5.2.4", request("GET /static/%2e%2e/%2e%2e/x"), "404")
head("NUL in a path", "RFC 3986 2.1", request("GET /static/%00"), "404", "400")
head("two lengths", "RFC 9112 6.3",
     request("POST /", [("Content-Length", "3"), ("Content-Length", "4")]), "400")  # fmt: skip
head("negative length", "RFC 9110 8.6", request("POST /", [("Content-Length", "-1")]), "400")
head("length and chunked", "RFC 9112 6.3",
     request("POST /", [("Content-Length", "3"), ("Transfer-Encoding", "chunked")]), "400")  # fmt: skip
head("coding gzip", "RFC 9112 6.1", request("POST /", [("Transfer-Encoding", "gzip")]), "501")
head("body of 2 MB", S2, request("POST /api/info", [KEYED], b" " * 2**21), "413")
head("chunks without end", S2,
     request("POST /", [("Transfer-Encoding", "chunked")]) + (b"10000\r\n" + b"x" * 65536 + b"\r\n") * 32,
     "404", "405", "413")  # fmt: skip
head("an empty line behind", "issue 8", request("GET /healthz") + b"\r\n", "200")
head("a second request behind", "issue 8", request("GET /healthz") * 2, "200")
head("API without a key", "HTTP API", request("POST /api/info", (), b"{}"), "401")
head(
    "API with a key of bytes",
    "HTTP API",
    request("POST /api/info", [("X-API-Key", "\xe9")], b"{}"),
    "401",
)
head("API, not JSON", "HTTP API", request("POST /api/info", [KEYED], b"{"), "400")
head(
    "API, nested 100,000 deep",
    "HTTP API",
    request("POST /api/info", [KEYED], b"[" * 100_000),
    "400",
)
head("API, line ends alone", "issue 8", request("POST /api/info", [KEYED], b"\n\n"), "400")
head("API, no such method", "HTTP API", request("POST /api/frobnicate", [KEYED], b"{}"), "404")

# clients without WebSocket

for name, target in (("http_stream", "/connection/http_stream"), ("sse", "/connection/sse")):
    head(f"{name}, line ends alone", "issue 8", request(f"POST {target}", (), b"\n\n\n"), "400")
    head(f"{name}, not JSON", "protocol", request(f"POST {target}", (), b"hello"), "400")
    head(
        f"{name}, nested 10,000 deep",
        "protocol",
        request(f"POST {target}", (), b"[" * 10_000),
        "400",
    )
    head(
        f"{name}, not a connect",
        "protocol",
        request(f"POST {target}", (), b'{"id":1,"rpc":{}}'),
        "400",
    )
    head(f"{name}, 2 MB", "protocol", request(f"POST {target}", (), b" " * 2**21), "413")
head("http_stream by GET", "protocol", request("GET /connection/http_stream"), "405")
head("http_stream in XML", "protocol",
     request("POST /connection/http_stream", [("Content-Type", "text/xml")], b"<a/>"), "415")  # fmt: skip
head("uni_sse, broken", "protocol", request("GET /connection/uni_sse?cf_connect=%7B"), "400")
head("uni_sse, not UTF-8", "protocol", request("GET /connection/uni_sse?topic=%ff"), "400")
head("uni_sse, line ends alone", "issue 8", request("POST /connection/uni_sse", (), b"\n\n"), "400")
head("sse asked for by an image", "protocol",
     request("GET /connection/sse?cf_connect=%7B%22id%22:1,%22connect%22:%7B%7D%7D",
             [("Sec-Fetch-Site", "cross-site")]), "403")  # fmt: skip
head("emulation, line ends alone", "issue 8", request("POST /emulation", (), b"\n\n"), "400")
head("emulation, no such session", "protocol",
     request("POST /emulation", (), b'{"session":"1.guess","node":"","data":"{}"}'), "404")  # fmt: skip
head("emulation, 20 digits", "protocol",
     request("POST /emulation", (), b'{"session":"99999999999999999999.x","data":""}'), "404")  # fmt: skip
head("emulation, half an emoji", "protocol",
     request("POST /emulation", (), b'{"session":"1.\\ud83d","data":"\\ud83d"}'), "400", "404")  # fmt: skip

# pages of others

EVIL = {"Origin": "http://evil.example"}
for origin in ("http://evil.example", "https://localhost.evil.example", "file:", "null.example"):
    head(f"Origin {origin}", S2, handshake(fields={"Origin": origin}), "403")
head("rebound name, on loopback", "issue 8", handshake(fields=EVIL, host="evil.example"), "403")
head("rebound name, with tokens", "issue 8", handshake(fields=EVIL, host="evil.example"), "403",
     setup=Setup(env={"BROKER_TOKENS_HMAC_SECRET": SECRET, "BROKER_TOKENS_ALLOW_ANONYMOUS": "true"}))  # fmt: skip
head("rebound name, with allowed_origins", "issue 8",
     handshake(fields=EVIL, host="evil.example"), "403",
     setup=Setup(options=("--allowed-origin", "https://good.example")))  # fmt: skip
head("rebound name, for http_stream", "issue 8",
     request("POST /connection/http_stream", [("Origin", "http://evil.example")],
             b'{"id":1,"connect":{}}', host="evil.example"), "403")  # fmt: skip
head("rebound name, for the API's page", "issue 8", request("GET /", host="evil.example"),
     "403", "421", "200")  # fmt: skip
for allowed, origin in (
    ("https://EXAMPLE.com", "https://example.com"),
    ("https://example.com:443", "https://example.com"),
    ("https://*.example.com", "https://shop.example.com"),
):

    async def _start_or_serve(field: Field, origin: str = origin) -> Sequence[str]:
        await field.open_ws(fields={"Origin": origin})
        return ["101"]

    add(
        Input(
            name=f"head/allowed {allowed}",
            source="issue 8; RFC 6454",
            should=("101", "not started"),
            attack=_start_or_serve,
            setup=Setup(options=("--allowed-origin", allowed)),
        )
    )


# resets, silence, slowness


def _reset_after(data: bytes, *, shaken: bool = False) -> Attack:
    async def attack(field: Field) -> Sequence[str]:
        for pause in (0.0, 0.001, 0.01):
            peer = await field.connect()
            await peer.send(data)
            if shaken:
                await peer.head()
            await trio.sleep(pause)
            peer.reset()
        return ["gone"]

    return attack


for name, data in {
    "nothing": b"",
    "GET": request("GET /"),
    "GET healthz": request("GET /healthz"),
    "half a line": b"GET / HT",
    "garbage": b"\x00\xff\x00",
    "a bad line": b"GET nonsense\r\n\r\n",
    "half a head": handshake()[:-10],
    "a handshake": handshake(),
    "a handshake and a message": handshake() + frame(1, b"x"),
    "a stream's request": request("POST /connection/http_stream", (), b'{"id":1,"connect":{}}'),
    "an API request": request("POST /api/info", [KEYED], b"{}"),
}.items():
    add(
        Input(
            name=f"reset/after {name}", source=S1, should=("gone",), attack=_reset_after(data),
            times=20, quick=True,
        )
    )  # fmt: skip


def _waits(name: str, attack: Attack, *should: str) -> None:
    add(
        Input(
            name=f"slow head/{name}", source=S3, should=should, attack=attack, setup=HASTY, times=5
        )
    )


async def _drip_a_head(field: Field) -> Sequence[str]:
    peer = await field.connect()
    field.nursery.start_soon(_drip, peer, handshake())
    return [str((await peer.head()).status)]


async def _drip(peer: Peer, data: bytes) -> None:
    try:
        await peer.drip(data, 0.1)
    except Ended:
        pass


async def _drip_a_body(field: Field) -> Sequence[str]:
    peer = await field.connect()
    await peer.send(request("POST /connection/http_stream", [("Content-Length", "1000")]))
    field.nursery.start_soon(_drip, peer, b" " * 1000)
    with trio.move_on_after(33):
        return [str((await peer.head()).status)]
    return ["waits on"]


_waits("silence", _answered(b""), "408")
_waits("half a head, then silence", _answered(b"GET / HTTP/1.1\r\nHo"), "408")
_waits("byte by byte", _drip_a_head, "408")


@hostile("slow head/a body byte by byte", "lifetimes: body", "408", seconds=36.0, times=5)
async def _body(field: Field) -> Sequence[str]:
    return await _drip_a_body(field)


@hostile("head/message behind the upgrade", S3, "delivered", times=10, quick=True)
async def _behind(field: Field) -> Sequence[str]:
    peer = await field.connect()
    await peer.send(handshake() + text({"id": 1, "connect": {}}))
    await peer.head()
    await peer.reply(1)
    return ["delivered"]


@hostile("head/300 MiB before the hook is done", S1, "held back",
         setup=Setup(app="tests.hostile.apps:slow_open"), peak_mib=24.0)  # fmt: skip
async def _flood(field: Field) -> Sequence[str]:
    peer = await field.open_ws(fields={"X-Slow": "1"})
    chunk, taken = header_of(2**16) + bytes(2**16), 0
    with trio.move_on_after(2):
        while taken < 300 * 2**20:
            await peer.send(chunk)
            taken += len(chunk)
    return unless(taken >= 300 * 2**20 and "took it all", "held back")


@hostile("head/connect and FIN, 64 files", S1, "served", setup=Setup(files=64), attackers=100)
async def _fins(field: Field) -> Sequence[str]:
    for _ in range(100):
        try:
            await (await field.connect()).finish()
        except Ended:
            pass
    with trio.fail_after(5):
        await field.open_ws()
    lines = field.log().splitlines()
    return unless(len(lines) > 120 and f"{len(lines)} log lines", "served")


@hostile(
    "head/50 bodies of 10,000 one-byte chunks", "RFC 9112 7.1", "413", attackers=50, seconds=20.0
)
async def _crumbs(field: Field) -> Sequence[str]:
    """Each chunk is looked at by itself, so they are bounded by their number, as fragments are."""
    head = request("POST /", [("Transfer-Encoding", "chunked")])
    answers: set[str] = set()
    for _ in range(4):
        peers = [await field.connect() for _ in range(50)]
        for peer in peers:
            await peer.send(head + b"1\r\nx\r\n" * 10_000)
        for peer in peers:
            answers.add(str((await peer.head()).status))
            await peer.aclose()
    return sorted(answers)


# kept connections: proxies reuse what they have


def _kept(name: str, behind: bytes, *should: str) -> None:
    async def attack(field: Field) -> Sequence[str]:
        peer = await field.connect()
        await peer.send(request("POST /api/info", [KEYED], b"{}"))
        assert (await peer.response()).status == 200
        await peer.send(behind)
        return [str((await peer.head()).status)]

    add(
        Input(
            name=f"kept/{name}", source="issue 8", should=should, attack=attack, times=5, quick=True
        )
    )


_kept("then a handshake", handshake(), "101")
_kept("then http_stream",
      request("POST /connection/http_stream", (), b'{"id":1,"connect":{}}'), "200")  # fmt: skip
_kept("then uni_sse", request("GET /connection/uni_sse"), "200")
_kept("then sse", request("POST /connection/sse", (), b'{"id":1,"connect":{}}'), "200")
_kept("then emulation, unknown session",
      request("POST /emulation", (), b'{"session":"1.x","node":"","data":"{}"}'), "404")  # fmt: skip
_kept("then a page", request("GET /"), "200")
_kept("then healthz", request("GET /healthz"), "200")
_kept("then garbage", bytes(100), "400")
_kept("then a page of another origin", handshake(fields=EVIL), "403")


@hostile("kept/emulation of a session that is there", "issue 8", "204", quick=True)
async def _emulate(field: Field) -> Sequence[str]:
    stream = await field.open_stream("/connection/http_stream", {"id": 1, "connect": {}})
    line = await stream.until(b"\n")
    session = line.partition(b'"session":"')[2].partition(b'"')[0].decode()
    peer = await field.connect()
    await peer.send(request("POST /api/info", [KEYED], b"{}"))
    await peer.response()
    body = f'{{"session":"{session}","node":"","data":"{{}}"}}'.encode()
    await peer.send(request("POST /emulation", (), body))
    return [str((await peer.head()).status)]


def _long(name: str, start: bytes, *should: str, fields: int = 1900) -> None:
    async def attack(field: Field) -> Sequence[str]:
        peer = await field.connect()
        await peer.send(start + b"a:\r\n" * fields + b"\r\n")
        return [str((await peer.head()).status)]

    add(
        Input(
            name=f"head/50 x {fields:,} empty fields, {name}", source="issue 9", should=should,
            attack=attack, times=50, attackers=50, quick=True,
        )
    )  # fmt: skip


_long("page", request("GET /nothing").removesuffix(b"\r\n"), "404", fields=1400)
_long("page", request("GET /nothing").removesuffix(b"\r\n"), "431")
_long("uni_sse", request("GET /connection/uni_sse").removesuffix(b"\r\n"), "200")
_long("handshake", handshake().removesuffix(b"\r\n"), "101")
