"""Inputs that are about the process: its files, its log, its signals, its TLS, its backends, its hooks."""

import os
import signal
from collections.abc import Sequence
from typing import Final

import trio

from tests.hostile.field import Field, hostile, unless
from tests.hostile.floods import drained
from tests.hostile.heads import KEYED
from tests.hostile.messages import token
from tests.hostile.target import SECRET, Setup, Target
from tests.hostile.wire import (
    TEXT,
    Ended,
    Peer,
    Response,
    Tcp,
    close,
    frame,
    handshake,
    request,
    result,
    said,
)

ISSUE: Final = "issue 9"
DOCKER_SECONDS: Final = 10.0
"""From SIGTERM to SIGKILL: what a stop has."""


async def _silent(field: Field, count: int) -> None:
    """Connect and say nothing; who is refused is refused."""
    for _ in range(count):
        try:
            await field.connect()
        except Ended:
            pass


async def _status(field: Field, data: bytes) -> str:
    """The status of an answer that must be there soon."""
    with trio.move_on_after(3):
        try:
            return str((await field.ask(data)).status)
        except Ended as ended:
            return ended.how
    return "silence"


# files and admission


@hostile("admission/five silent sockets, 7 allowed", ISSUE, "200",
         setup=Setup(options=("--max-connections", "7")))  # fmt: skip
async def _five(field: Field) -> Sequence[str]:
    await _silent(field, 5)
    await trio.sleep(0.2)
    return [
        await _status(field, request("GET /healthz")),
        await _status(field, request("POST /api/info", [KEYED, ("Connection", "close")], b"{}")),
    ]


@hostile("admission/200 silent sockets, 7 allowed", ISSUE, "200", attackers=200,
         setup=Setup(options=("--max-connections", "7")))  # fmt: skip
async def _two_hundred(field: Field) -> Sequence[str]:
    await _silent(field, 200)
    await trio.sleep(0.2)
    return [await _status(field, request("GET /healthz"))]


# The broker keeps the connection to its backend for the next question: that is one file.
@hostile("admission/300 silent sockets, 256 files", ISSUE, "ok", "200", attackers=300, files=1,
         setup=Setup(files=256, backend=("rpc",)))  # fmt: skip
async def _files(field: Field) -> Sequence[str]:
    peer = await field.open_client()
    await _silent(field, 300)
    await trio.sleep(0.3)
    answers = [said(await peer.call(rpc={"method": "quick", "data": {}}))]
    return [*answers, await _status(field, request("GET /healthz"))]


@hostile("admission/300 refused that linger, 256 files", ISSUE, "ok", "200", attackers=300, files=1,
         setup=Setup(files=256, backend=("rpc",)))  # fmt: skip
async def _lingerers(field: Field) -> Sequence[str]:
    peer = await field.open_client()
    for _ in range(300):
        try:
            await (await field.connect()).send(bytes(100))
        except Ended:
            pass
    await trio.sleep(0.3)
    answers = [said(await peer.call(rpc={"method": "quick", "data": {}}))]
    return [*answers, await _status(field, request("GET /healthz"))]


STALE: Final = Setup(
    options=("--max-connections", "22"),
    env={"BROKER_TOKENS_HMAC_SECRET": SECRET, "BROKER_STALE_SECONDS": "2"},
    connect={"token": token({"sub": "bystander"})},
)
"""Two bystanders and twenty others; `stale_seconds` is what issue 9 calls it."""


@hostile("admission/20 peers without a token", ISSUE, "close 3502", setup=STALE, attackers=20,
         seconds=40.0)  # fmt: skip
async def _tokenless(field: Field) -> Sequence[str]:
    peers = [await field.open_ws() for _ in range(20)]
    await trio.sleep(8)
    return [await peer.ending(1) for peer in peers]


@hostile("admission/a subprotocol and no connect", ISSUE, "close 3502", times=5,
         setup=Setup(env={"BROKER_STALE_SECONDS": "2"}))  # fmt: skip
async def _no_connect(field: Field) -> Sequence[str]:
    peer = await field.open_ws(fields={"Sec-WebSocket-Protocol": "centrifuge-json"})
    return [await peer.ending(8)]


@hostile(
    "admission/50 idle connections of a backend", "lifetimes: API request", "200", attackers=50
)
async def _idle_backends(field: Field) -> Sequence[str]:
    for _ in range(50):
        api = await field.keep_api()
        await api.call("info")
    return [await _status(field, request("GET /healthz"))]


# logs


@hostile("log/wrong API keys", ISSUE, "logged", times=1)
async def _wrong_keys(field: Field) -> Sequence[str]:
    for _ in range(20):
        await field.ask(request("POST /api/info", [("X-API-Key", "wrong")], b"{}"))
    return _logged(field, "401", "api", "key")


@hostile("log/refused requests", ISSUE, "logged")
async def _refused(field: Field) -> Sequence[str]:
    for _ in range(20):
        await field.ask(bytes(100))
    return _logged(field, "400")


def _logged(field: Field, *words: str) -> list[str]:
    """Whether a line says it, with an address, and not one for each."""
    lines = field.log().splitlines()
    about = [
        each for each in lines if "127.0.0.1" in each and any(w in each.lower() for w in words)
    ]
    if not about:
        return [f"no line among {len(lines)}"]
    return unless(len(about) > 10 and f"{len(about)} lines for 20", "logged")


@hostile("log/500 connects a second", ISSUE, "limited", attackers=50)
async def _opens(field: Field) -> Sequence[str]:
    for _ in range(500):
        peer = await field.open_ws()
        peer.reset()
    lines = len(field.log().splitlines())
    return unless(lines > 250 and f"{lines} lines for 500 connects", "limited")


@hostile("log/console, a hook raises with the peer's text", ISSUE, "escaped", errors=1000,
         setup=Setup(app="tests.hostile.apps:raising", log_format="console"))  # fmt: skip
async def _forged(field: Field) -> Sequence[str]:
    peer = await field.open_ws()
    await peer.send(frame(TEXT, b"x\n12:00:00 [info] forged\x1b[31m\r\xe2\x80\xa8end"))
    await peer.ending()
    await trio.sleep(0.2)
    log = field.log()
    raw = "\x1b[31m" in log or any(
        line.startswith("12:00:00 [info] forged") for line in log.splitlines()
    )
    return unless(raw and "forged and raw", "escaped")


@hostile("log/names and reasons with escapes", "logs: Rule 1", "escaped",
         setup=Setup(log_format="console"))  # fmt: skip
async def _names(field: Field) -> Sequence[str]:
    peer = await field.open_client(name="\x1b[31m\n12:00:00 [info] forged", version="\x9b31m")
    await peer.send(close(4000, "\u009b31m\n12:00:00 [info] forged".encode()))
    await peer.ending()
    await field.ask(b"GET /\x1b[31m HTTP/1.1\r\nHost: a\r\n\r\n")
    log = field.log()
    return unless(
        ("\x1b[31m" in log or "\x9b" in log or "\n12:00:00 [info] forged" in log) and "raw",
        "escaped",
    )


async def _stops(field: Field, seconds: float = DOCKER_SECONDS) -> Sequence[str]:
    began = trio.current_time()
    field.signal(signal.SIGTERM)
    how = await field.target.wait_ended(seconds)
    took = trio.current_time() - began
    return [how if took <= seconds else f"{how} after {took:.1f} s"]


async def _stops_at_the_second(field: Field) -> Sequence[str]:
    """Whether it ends by the second signal, if the first does not do it within 7 s."""
    field.signal(signal.SIGTERM)
    if (how := await field.target.wait_ended(7)) != "runs on":
        return [how]
    field.signal(signal.SIGTERM)
    how = await field.target.wait_ended(3)
    return ["two signals ignored" if how == "runs on" else how]


@hostile("log/a pipe that nobody reads", ISSUE, "served", "exit 0", attackers=50,
         setup=Setup(stderr="pipe"), finale=_stops_at_the_second)  # fmt: skip
async def _pipe(field: Field) -> Sequence[str]:
    for _ in range(600):
        with trio.move_on_after(3) as bound:
            peer = await field.open_ws(path="/?" + "x" * 200)
            peer.reset()
        if bound.cancelled_caught:
            return ["nobody is served any more"]
    return ["served"]


@hostile(
    "log/stderr closed", ISSUE, "served", "exit 0", setup=Setup(stderr="closed"), finale=_stops
)
async def _closed(field: Field) -> Sequence[str]:
    await field.open_client()
    await field.ask(bytes(100))
    return ["served"]


# signals


@hostile("signal/SIGHUP, the config a FIFO", ISSUE, "sent", "exit 0", setup=Setup(toml="drain_seconds = 1\n"),
         finale=_stops_at_the_second)  # fmt: skip
async def _fifo(field: Field) -> Sequence[str]:
    field.target.config_file.unlink()
    os.mkfifo(field.target.config_file)
    field.signal(signal.SIGHUP)
    await trio.sleep(0.5)
    return ["sent"]


@hostile("signal/SIGHUP, the config broken or gone", "settings", "goes on", errors=10,
         setup=Setup(toml="drain_seconds = 1\n"))  # fmt: skip
async def _broken_config(field: Field) -> Sequence[str]:
    for content in (b"drain_seconds = [", b"port = 'x'", b"\xff\xfe", b"x" * 10**6):
        field.target.config_file.write_bytes(content)
        field.signal(signal.SIGHUP)
        await trio.sleep(0.2)
    field.target.config_file.unlink()
    field.signal(signal.SIGHUP)
    await trio.sleep(0.2)
    await field.open_client()
    return ["goes on"]


async def _early(field: Field) -> Sequence[str]:
    fates = []
    for number, pause in enumerate((0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6)):
        scratch = field.target.scratch / f"early{number}"
        scratch.mkdir()
        other = Target(Setup(), scratch)
        await trio.sleep(pause)
        other.signal(signal.SIGTERM)
        how = await other.wait_ended(8)
        lines = other.log_lines()
        other.kill()
        if any("Traceback" in line for line in lines):
            how = f"a traceback at {pause} s"
        fates.append("ended" if how in ("exit 0", "signal 15", "exit 143") else how)
    return fates


async def _with_peers(field: Field) -> Sequence[str]:
    """Stop with 30 peers of each kind; what they are told."""
    plain = [await field.open_ws() for _ in range(30)]
    clients = await field.open_clients(30)
    fates: list[str] = []

    async def watch(peer: Peer) -> None:
        fates.append(await peer.ending(12))

    async with trio.open_nursery() as nursery:
        for peer in (*plain, *clients):
            nursery.start_soon(watch, peer)
        await trio.sleep(0.1)
        fates.extend(await _stops(field))
    return fates


async def _nothing(field: Field) -> Sequence[str]:
    return ["ready"]


TOLD: Final = ("ready", "close 1001", "close 3001", "exit 0")
hostile("signal/a stop with 60 peers", "hostile peers, S2", *TOLD, finale=_with_peers)(_nothing)
hostile("signal/SIGTERM while it starts", ISSUE, "ready", "ended", finale=_early,
        seconds=60.0)(_nothing)  # fmt: skip
hostile("signal/a stop, drain_seconds 0", ISSUE, *TOLD, finale=_with_peers,
        setup=Setup(options=("--drain-seconds", "0")))(_nothing)  # fmt: skip


async def _hanging_stop(field: Field) -> Sequence[str]:
    for _ in range(10):
        peer = await field.open_ws()
        await peer.send(frame(TEXT, b"hang"))
    await trio.sleep(0.1)
    return await _stops(field)


hostile("signal/a stop with hooks that hang", ISSUE, "ready", "exit 0", finale=_hanging_stop,
        setup=Setup(app="tests.hostile.apps:slow_close"), errors=100)(_nothing)  # fmt: skip


@hostile("hook/a close hook of 3 s", ISSUE, "at once", times=5,
         setup=Setup(app="tests.hostile.apps:slow_close"))  # fmt: skip
async def _close_hook(field: Field) -> Sequence[str]:
    peer = await field.open_ws()
    began = trio.current_time()
    await peer.send(close(1000))
    await peer.ending()
    try:
        await peer.read()
    except Ended:
        pass
    took = trio.current_time() - began
    return unless(took > 1 and f"EOF after {took:.1f} s", "at once")


@hostile("hook/80 subscribes, each asks for 0.1 s", ISSUE, "within 5 s",
         setup=Setup(app="tests.hostile.apps:slow_subscribe"))  # fmt: skip
async def _eighty(field: Field) -> Sequence[str]:
    peer = await field.open_client()
    began = trio.current_time()
    await peer.say(*({"id": n, "subscribe": {"channel": f"s{n}"}} for n in range(2, 82)))
    left = 80
    while left:
        left -= sum("id" in line for line in await peer.lines())
    took = trio.current_time() - began
    return unless(took > 5 and f"within {took:.1f} s", "within 5 s")


RAISING: Final = Setup(app="tests.hostile.apps:raising")
EXITING: Final = Setup(app="tests.hostile.apps:exiting")


@hostile(
    "hook/raises ValueError", "hostile peers, S1", "close 1011", setup=RAISING, times=5, errors=5
)
async def _raises(field: Field) -> Sequence[str]:
    peer = await field.open_ws()
    await peer.send(frame(TEXT, b"x"))
    return [await peer.ending()]


def _raiser(kind: bytes) -> None:
    @hostile(f"hook/raises {kind.decode()}", ISSUE, "close 1011", setup=EXITING, errors=1)
    async def attack(field: Field) -> Sequence[str]:
        peer = await field.open_ws()
        await peer.send(frame(TEXT, kind))
        return [await peer.ending()]


_raiser(b"GeneratorExit")
_raiser(b"BaseException")


async def _exit(field: Field) -> Sequence[str]:
    """A hook that raises SystemExit: contained, or a stop that tells everybody."""
    other, peer = await field.open_ws(), await field.open_ws()
    await peer.send(frame(TEXT, b"SystemExit"))
    fates = [await peer.ending(8), await other.ending(3)]
    traceback = any("Traceback" in line for line in field.target.log_lines())
    return [*fates, *(["a traceback"] if traceback else [])]


hostile("hook/raises SystemExit", ISSUE, "ready", "close 1011", "close 1001", "open", setup=EXITING,
        finale=_exit, errors=1)(_nothing)  # fmt: skip


# TLS and Unix sockets

TLS: Final = Setup(tls=True)


async def _bare(field: Field) -> Peer:
    """A connection to the TLS port without TLS."""
    address = field.target.address
    assert isinstance(address, Tcp)
    stream = await trio.open_tcp_stream(address.host, address.port)
    peer = Peer(stream)
    field.peers.append(peer)
    return peer


def _bare_input(name: str, data: bytes, *should: str, reset: bool = False) -> None:
    @hostile(f"tls/{name}", "hostile peers, S3", *should, setup=TLS, times=10)
    async def attack(field: Field) -> Sequence[str]:
        peer = await _bare(field)
        await peer.send(data)
        if reset:
            await trio.sleep(0.02)
            peer.reset()
            return ["gone"]
        try:
            while True:  # an alert may come first
                await peer.read()
        except Ended as ended:
            return [ended.how]


HELLO: Final = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100)
ENDS: Final = ("EOF", "RST")
_bare_input("plain HTTP to the TLS port", request("GET /"), *ENDS)
_bare_input("garbage to the TLS port", b"\x00\xff" * 500, *ENDS)
_bare_input("half a hello, then silence", HELLO, *ENDS)
_bare_input("half a hello, then RST", HELLO, "gone", reset=True)
_bare_input("silence", b"", *ENDS)


@hostile("tls/failed handshakes are logged", ISSUE, "logged", setup=TLS)
async def _failed_tls(field: Field) -> Sequence[str]:
    for _ in range(20):
        peer = await _bare(field)
        await peer.send(request("GET /"))
        try:
            while True:
                await peer.read()
        except Ended:
            pass
    return _logged(field, "tls", "ssl", "handshake")


@hostile("tls/handshake, message, RST", "hostile peers, S1", "gone", setup=TLS, times=20)
async def _tls_reset(field: Field) -> Sequence[str]:
    peer = await field.open_client()
    await peer.say({"id": 9, "rpc": {"method": "x"}})
    peer.reset()
    return ["gone"]


@hostile("tls/16 MB to who reads nothing", ISSUE, "served", setup=TLS, peak_mib=48.0)
async def _tls_unread(field: Field) -> Sequence[str]:
    peer = await field.open_client(receive_buffer=4096)
    await peer.call(subscribe={"channel": "slow"})
    publisher = await field.open_client()
    for _ in range(160):
        await publisher.say({"publish": {"channel": "slow", "data": "x" * 100_000}})
    await publisher.call(presence_stats={"channel": "a"})
    return ["served"]


@hostile(
    "unix/handshake, message, reset", "hostile peers, S1", "gone", setup=Setup(unix=True), times=20
)
async def _unix(field: Field) -> Sequence[str]:
    peer = await field.open_client()
    await peer.say({"id": 9, "rpc": {"method": "x"}})
    await peer.aclose()
    return ["gone"]


@hostile("unix/16 MB to who reads nothing", ISSUE, "served", setup=Setup(unix=True), peak_mib=48.0)
async def _unix_unread(field: Field) -> Sequence[str]:
    return await _tls_unread(field)


# backends


@hostile("backend/500 connections of one user, slow rpc", ISSUE, "let in", "answered", attackers=500,
         setup=Setup(backend=("connect", "rpc")), seconds=60.0, peak_mib=128.0, left_mib=64.0,
         files=64)  # fmt: skip
async def _pool(field: Field) -> Sequence[str]:
    peers = [await field.open_client(data={"user": "mallory"}) for _ in range(500)]
    for peer in peers:
        await peer.say({"id": 9, "rpc": {"method": "slow", "data": {}}})
        field.nursery.start_soon(drained, peer)
    await trio.sleep(0.5)
    began = trio.current_time()
    other = await field.open_client(data={"user": "alice"})
    reply = await other.call(rpc={"method": "quick", "data": {}})
    took = trio.current_time() - began
    if took > 2:
        return [f"alice waits {took:.1f} s"]
    return ["let in", "answered" if "rpc" in reply else f"rpc: {said(reply)}"]


async def _forwarded(field: Field, fields: dict[str, str | None]) -> Response | dict[str, str]:
    peer = await field.open_ws(fields=fields)
    found: dict[str, str] = result(await peer.call(connect={"data": {"user": "eve"}}))["data"]
    return found


@hostile("backend/a stranger's X-Forwarded-For", ISSUE, "not forwarded",
         setup=Setup(backend=("connect",)))  # fmt: skip
async def _spoofed(field: Field) -> Sequence[str]:
    seen = await _forwarded(field, {"X-Forwarded-For": "192.0.2.66", "X-Real-IP": "192.0.2.66"})
    return unless("192.0.2.66" in str(seen) and "forwarded", "not forwarded")


@hostile("backend/a Cookie in UTF-8", ISSUE, "asked", setup=Setup(backend=("connect",)))
async def _cookie(field: Field) -> Sequence[str]:
    await _forwarded(field, {"Cookie": "nick=张三".encode().decode("latin-1")})
    return ["asked"]


# controls: what must be found, or this table could not fail


@hostile("control/a hook that blocks", "this table", "answered", control=True,
         setup=Setup(app="tests.hostile.apps:blocking"))  # fmt: skip
async def _blocks(field: Field) -> Sequence[str]:
    peer = await field.open_ws()
    await peer.send(frame(TEXT, b"x"))
    return ["answered"]


@hostile("control/a hook that keeps files and memory", "this table", "answered", control=True,
         setup=Setup(app="tests.hostile.apps:leaking"))  # fmt: skip
async def _leaks(field: Field) -> Sequence[str]:
    peer = await field.open_ws()
    await peer.send(frame(TEXT, b"x"))
    await trio.sleep(0.2)
    return ["answered"]


@hostile("control/a hook that raises", "this table", "close 1011", control=True, setup=RAISING)
async def _unexpected(field: Field) -> Sequence[str]:
    return await _raises(field)


@hostile("control/an answer that is another", "this table", "500", control=True)
async def _other(field: Field) -> Sequence[str]:
    return [await _status(field, request("GET /healthz"))]


@hostile("control/a broker that is killed", "this table", "killed", control=True)
async def _killed(field: Field) -> Sequence[str]:
    peer = await field.connect()
    await peer.send(handshake())
    field.signal(signal.SIGKILL)
    return ["killed"]
