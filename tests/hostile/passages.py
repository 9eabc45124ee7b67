"""Inputs by what passes bytes on, and by those who stop half way: the PROXY protocol, bodies in odd chunks,
ends that are half closed, streams that end while their client still asks."""

import json
import signal
import socket
import ssl
import struct
from collections.abc import Sequence
from typing import Final

import trio

from tests.hostile.field import Field, Input, add, hostile, unless
from tests.hostile.target import API_KEY, Setup
from tests.hostile.wire import Ended, Peer, Tcp, handshake, request, text

ISSUE: Final = "issue 9"
PROXY: Final = "proxy-protocol.txt"
CHUNKED: Final = [("Transfer-Encoding", "chunked"), ("X-API-Key", API_KEY)]

V2: Final = b"\r\n\r\n\0\r\nQUIT\n"
OTHERS: Final = 'trusted_proxies = ["127.0.0.2"]\nproxy_protocol = {}\n'
"""The bystanders come from 127.0.0.1, which is no proxy."""


def v2(tlvs: bytes = b"", command: int = 0x21, family: int = 0x11) -> bytes:
    """A header of version 2 that names 192.0.2.7."""
    body = (
        socket.inet_aton("192.0.2.7")
        + socket.inet_aton("192.0.2.1")
        + struct.pack("!HH", 4711, 443)
    )
    return V2 + struct.pack("!BBH", command, family, len(body) + len(tlvs)) + body + tlvs


def tlv(kind: int, data: bytes) -> bytes:
    return struct.pack("!BH", kind, len(data)) + data


V1: Final = b"PROXY TCP4 192.0.2.7 192.0.2.1 4711 443\r\n"
TLVS: Final = (
    tlv(2, b"evil.example\r\n\r\n")
    + tlv(0x20, b"\0" * 5 + tlv(0x21, b"TLSv1.3"))
    + tlv(4, b"\0" * 3000)
)


async def by_proxy(field: Field) -> Peer:
    """A connection that comes from the proxy."""
    address = field.target.address
    assert isinstance(address, Tcp), "by another address of this machine"
    sock = trio.socket.socket()
    await sock.bind(("127.0.0.2", 0))
    await sock.connect(("127.0.0.1", address.port))
    peer = Peer(trio.SocketStream(sock))
    field.peers.append(peer)
    return peer


async def _status(peer: Peer) -> str:
    try:
        return str((await peer.response()).status)
    except Ended as ended:
        return ended.how


def _header(name: str, data: bytes, *should: str, seconds: float = 0.0) -> None:
    async def attack(field: Field) -> Sequence[str]:
        peer = await by_proxy(field)
        if seconds:
            await peer.drip(data, seconds)
        else:
            await peer.send(data)
        return [await _status(peer)]

    add(
        Input(
            name=f"proxy/{name}",
            source=PROXY,
            should=should,
            attack=attack,
            setup=Setup(toml=OTHERS.format("true"), env={"BROKER_OPEN_SECONDS": "2"}),
        )
    )


GET: Final = request("GET /healthz")
_header("version 1 byte by byte", V1 + GET, "200", seconds=0.002)
_header("version 2 byte by byte", v2() + GET, "200", seconds=0.002)
_header("version 2, 3 KB behind it", v2(TLVS) + GET, "200")
_header("version 2, more than it may have", v2(b"\0" * 4096) + GET, "400")
_header("version 2, an unknown command", v2(command=0x22) + GET, "400")
_header("version 2, of IPv6 and too short", v2(family=0x21) + GET, "400")
_header("version 2 twice", v2() + v2() + GET, "400")
_header("version 1 behind version 2", v2() + V1 + GET, "400")
_header("no header", GET, "400")
_header("half a header, then silence", v2()[:20], "408")
_header("version 1 without an end", b"PROXY TCP4 " + b"1" * 200, "400")


def _over_tls(name: str, before: bytes, inside: bytes, *should: str) -> None:
    """A header before the TLS handshake, and what is said in TLS before the request."""

    async def attack(field: Field) -> Sequence[str]:
        address = field.target.address
        assert isinstance(address, Tcp), "by another address of this machine"
        peer = await by_proxy(field)
        await peer.send(before)
        context = ssl.create_default_context(cafile=address.ca)
        name = "localhost"
        stream = trio.SSLStream(peer.stream, context, server_hostname=name, https_compatible=True)
        try:
            await stream.do_handshake()
        except (trio.BrokenResourceError, OSError):
            return ["no handshake"]
        secure = Peer(stream)
        field.peers.append(secure)
        await secure.send(inside + GET)
        return [await _status(secure)]

    add(
        Input(
            name=f"proxy/TLS, {name}",
            source=PROXY,
            should=should,
            attack=attack,
            setup=Setup(toml=OTHERS.format("true"), tls=True, env={"BROKER_OPEN_SECONDS": "2"}),
        )
    )


_over_tls("version 1 before it", V1, b"", "200")
_over_tls("version 2 before it", v2(), b"", "200")
_over_tls("version 2 and 3 KB before it", v2(TLVS), b"", "200")
_over_tls("of nobody before it", v2(command=0x20), b"", "200")
_over_tls("no header", b"", b"", "no handshake")
_over_tls("version 1 in it", b"", V1, "no handshake")
_over_tls("version 2 in it", b"", v2(), "no handshake")
_over_tls("before it and in it", v2(), v2(), "400")
_over_tls("of nobody before it, and one in it", v2(command=0x20), V1, "400")
_over_tls("two before it", V1 + v2(), b"", "no handshake")


@hostile(
    "proxy/500 headers that never end",
    PROXY,
    "408",
    setup=Setup(toml=OTHERS.format("true"), env={"BROKER_OPEN_SECONDS": "2"}),
    attackers=50,
)
async def _never(field: Field) -> Sequence[str]:
    peers = [await by_proxy(field) for _ in range(500)]
    for peer in peers:
        await peer.send(v2()[:13])
    return [await _status(peer) for peer in peers]


@hostile("proxy/a reload switches it", PROXY, "switched", setup=Setup(toml=OTHERS.format("false")))
async def _switch(field: Field) -> Sequence[str]:
    config = field.target.config_file
    found = []
    before = await by_proxy(field)
    await before.send(GET[:10])
    await trio.sleep(0.1)
    for on, data in (("true", v2() + GET), ("false", GET), ("true", V1 + GET), ("false", GET)):
        config.write_text(OTHERS.format(on))
        field.signal(signal.SIGHUP)
        await trio.sleep(0.3)
        peer = await by_proxy(field)
        await peer.send(data)
        found.append(await _status(peer))
    await before.send(GET[10:])
    found.append(await _status(before))
    return unless(found != ["200"] * 5 and str(found), "switched")


# bodies


def _body(
    name: str,
    data: bytes,
    *should: str,
    drip: float = 0.0,
    finish: bool = False,
    path: str = "/api/info",
    fields: Sequence[tuple[str, str]] = CHUNKED,
    seconds: float = 20.0,
) -> None:
    async def attack(field: Field) -> Sequence[str]:
        peer = await field.connect()
        head = request(f"POST {path}", fields)
        try:
            if drip:
                await peer.send(head)
                await peer.drip(data, drip)
            else:
                await peer.send(head + data)
            if finish:
                await peer.finish()
        except Ended:
            pass
        return [await _status(peer)]

    add(
        Input(
            name=f"body/{name}",
            source="RFC 9112 7.1",
            should=should,
            attack=attack,
            seconds=seconds,
        )
    )


_body("a chunk's extension of 1 MB", b"5;" + b"x" * 2**20, "431")
_body(
    "an extension of 12 KB on each chunk",
    b"".join(b"1;" + b"x" * 12000 + b"\r\n{\r\n" for _ in range(80)),
    "400",
    "413",
)
_body("a chunk's size of 1,000 digits", b"0" * 1000 + b"5\r\nhello\r\n0\r\n\r\n", "400")
_body("a size of 20 digits", b"F" * 20 + b"\r\nhello", "400", finish=True)
_body("trailers of 1 MB", b"2\r\n{}\r\n0\r\n" + b"x: y\r\n" * 170_000, "400", "413", "431")
_body(
    "trailers that say another length",
    b"2\r\n{}\r\n0\r\nContent-Length: 5\r\nX-API-Key: k\r\n\r\n",
    "200",
)
_body(
    "chunks of one byte, dripped",
    b"".join(b"1\r\n%c\r\n" % c for c in b"{}") + b"0\r\n\r\n",
    "200",
    drip=0.003,
)
_body("a body that stops half way", b"5\r\nhel", "RST", "EOF", "400", finish=True)
_body(
    "100-continue, and no body",
    b"",
    "100",
    "408",
    fields=[*CHUNKED, ("Expect", "100-continue")],
    seconds=40,
)
_body(
    "an expectation unheard of",
    b"2\r\n{}\r\n0\r\n\r\n",
    "417",
    "400",
    "200",
    fields=[*CHUNKED, ("Expect", "200-maybe")],
)
_body(
    "chunked twice",
    b"2\r\n{}\r\n0\r\n\r\n",
    "400",
    "501",
    fields=[("Transfer-Encoding", "chunked, chunked")],
)
_body(
    "chunked to the API, with a key",
    b"2\r\n{}\r\n0\r\n\r\n",
    "200",
    path="/api/info",
    fields=[*CHUNKED, ("X-API-Key", "hostile-key")],
)
_body("line feeds alone around chunks", b"2\n{}\n0\n\n", "400", finish=True)


@hostile("body/50 x 100-continue and silence", ISSUE, "held", attackers=50)
async def _continue(field: Field) -> Sequence[str]:
    fields = [("Content-Length", "1000000"), ("Expect", "100-continue")]
    for _ in range(50):
        peer = await field.connect()
        await peer.send(request("POST /emulation", fields))
    await trio.sleep(1)
    return ["held"]


# half closed


@hostile("half/FIN behind a handshake", ISSUE, "EOF", "close 1000", "RST", "close 1002")
async def _fin(field: Field) -> Sequence[str]:
    peer = await field.connect()
    await peer.send(handshake() + text({"id": 1, "connect": {}}))
    await peer.finish()
    await peer.head()
    return [await peer.ending()]


@hostile("half/FIN behind 1,000 publishes", ISSUE, "all")
async def _fin_publishes(field: Field) -> Sequence[str]:
    reader = await field.open_client()
    await reader.call(subscribe={"channel": "half"})
    peer = await field.connect()
    await peer.send(
        handshake()
        + text({"id": 1, "connect": {}})
        + text(*({"publish": {"channel": "half", "data": n}} for n in range(1000)))
    )
    await peer.finish()
    got = 0
    with trio.move_on_after(5):
        while got < 1000:
            got += len(await reader.publications())
    return unless(got != 1000 and f"{got}", "all")


@hostile("half/FIN behind an API request", ISSUE, "200", "EOF")
async def _fin_api(field: Field) -> Sequence[str]:
    peer = await field.connect()
    await peer.send(request("POST /api/info", [("X-API-Key", "hostile-key")], b"{}"))
    await peer.finish()
    return [await _status(peer)]


@hostile("half/500 WebSockets, FIN, and never read", ISSUE, "gone", attackers=50)
async def _fins(field: Field) -> Sequence[str]:
    peers = await field.open_clients(500)
    for peer in peers:
        await peer.finish()
    await trio.sleep(1)
    return ["gone"]


async def _stream(field: Field) -> tuple[Peer, str, str]:
    peer = await field.open_stream("/connection/http_stream", {"id": 1, "connect": {}})
    line = json.loads((await peer.until(b"\n")).split(b"\r\n")[-1].strip() or b"{}")
    return peer, line["connect"]["session"], line["connect"].get("node", "")


@hostile("half/emulation while its stream ends", ISSUE, "ended", attackers=50, times=2)
async def _emulation(field: Field) -> Sequence[str]:
    async def one() -> None:
        peer, session, node = await _stream(field)
        said = json.dumps(
            {
                "session": session,
                "node": node,
                "data": json.dumps({"id": 2, "publish": {"channel": "e", "data": 1}}),
            }
        ).encode()
        asks = [await field.connect() for _ in range(5)]
        for n, ask in enumerate(asks):
            if n == 2:
                peer.reset()
            try:
                await ask.send(
                    request("POST /emulation", [("Content-Type", "application/json")], said)
                )
            except Ended:
                pass
        seen.extend([await _status(ask) for ask in asks])

    seen: list[str] = []
    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(one)
    return unless(not set(seen) <= {"204", "404", "400"} and str(set(seen)), "ended")


@hostile(
    "wait/500 silent sockets time out at once",
    ISSUE,
    "408",
    setup=Setup(env={"BROKER_OPEN_SECONDS": "2"}),
    attackers=50,
)
async def _silent(field: Field) -> Sequence[str]:
    peers = [await field.connect() for _ in range(500)]
    return [await _status(peer) for peer in peers]


@hostile(
    "wait/500 half heads time out at once",
    ISSUE,
    "408",
    setup=Setup(env={"BROKER_OPEN_SECONDS": "2"}),
    attackers=50,
)
async def _halves(field: Field) -> Sequence[str]:
    peers = [await field.connect() for _ in range(500)]
    for peer in peers:
        await peer.send(GET[:20])
    return [await _status(peer) for peer in peers]
