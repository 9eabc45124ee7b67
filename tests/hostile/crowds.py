"""Inputs of many who do at one moment what one does at little cost."""

import signal
import ssl
from collections.abc import Sequence
from typing import Final

import trio

from tests.hostile.field import Field, hostile
from tests.hostile.raw_tls import RawTls
from tests.hostile.slow import BUFFER, STALL
from tests.hostile.target import Ground, Setup
from tests.hostile.wire import Ended, Peer, Tcp, result

ISSUE: Final = "issue 9"


def _reloaded(name: str, sizes: Sequence[int], pause: float, ground: Ground = "memory") -> None:
    """An input in which a broker with 60,000 topics is told by one reload after the other how many publications each
    is to keep."""

    @hostile(
        f"crowd/{name}",
        ISSUE,
        "served",
        fresh=True,
        setup=Setup(toml="[topics]\nhistory_size = 10\n", ground=ground),
        seconds=60.0,
        peak_mib=192.0,
        left_mib=160.0,
    )
    async def attack(field: Field) -> Sequence[str]:
        await _keep_60_000(field)
        for size in sizes:
            _reload(field, size)
            await trio.sleep(pause)
        return ["served"]


_reloaded("a reload with 60,000 topics", (11, 12, 13, 10), 0.5)
_reloaded("60,000 topics are forgotten", (0, 10, 0), 1.5)
_reloaded("60,000 topics are forgotten on sqlite", (0, 10, 0), 1.5, "sqlite")


async def _keep_60_000(field: Field) -> None:
    api = await field.keep_api()
    for number in range(60):
        names = [f"topic-{number}-{n}" for n in range(1000)]
        result(await api.call("broadcast", channels=names, data=1))


def _reload(field: Field, history_size: int) -> None:
    field.target.config_file.write_text(f"[topics]\nhistory_size = {history_size}\n")
    field.signal(signal.SIGHUP)


@hostile(
    "crowd/300 half hellos, and the rest at once",
    ISSUE,
    "shaken",
    attackers=50,
    setup=Setup(tls=True),
    seconds=30.0,
    peak_mib=96.0,
)
async def _hellos(field: Field) -> Sequence[str]:
    address = _address(field)
    rest: list[tuple[Peer, bytes]] = []
    for _ in range(300):
        coming, going = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = ssl.create_default_context(cafile=address.ca).wrap_bio(
            coming, going, server_hostname="localhost"
        )
        try:
            tls.do_handshake()
        except ssl.SSLWantReadError:
            pass
        hello = going.read()
        peer = Peer(trio.SocketStream(await _dial(address)))
        field.peers.append(peer)
        await peer.send(hello[:100])
        rest.append((peer, hello[100:]))
    await trio.sleep(0.5)
    for peer, data in rest:
        await peer.send(data)
    for peer, _ in rest:
        await peer.read()
    return ["shaken"]


async def _dial(address: Tcp) -> trio.socket.SocketType:
    sock = trio.socket.socket()
    await sock.connect((address.host, address.port))
    return sock


def _address(field: Field) -> Tcp:
    address = field.target.address
    assert isinstance(address, Tcp), "TLS is over TCP"
    return address


UPDATES: Final = 5000
"""Changes of keys by one peer: 135 KB."""


@hostile(
    "crowd/20 x 5,000 changes of keys (TLS 1.3)",
    ISSUE,
    "200",
    attackers=20,
    setup=Setup(tls=True),
    seconds=60.0,
    peak_mib=96.0,
)
async def _keys(field: Field) -> Sequence[str]:
    """Each asks for a change of the broker's as well."""
    ready: list[tuple[Peer, RawTls, bytes]] = []
    for _ in range(20):
        peer, tls = Peer(trio.SocketStream(await _dial(_address(field)))), RawTls()
        field.peers.append(peer)
        while not tls.shake_hands():
            await peer.send(tls.said())
            tls.hear(await peer.read())
        await peer.send(tls.said())
        for number in range(UPDATES):
            tls.change_keys(both=True)
            if number % 100 == 0:
                await trio.lowlevel.checkpoint()
        tls.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        ready.append((peer, tls, tls.said()))
    fates = set[str]()

    async def flood(peer: Peer, tls: RawTls, said: bytes) -> None:
        field.nursery.start_soon(_send, peer, said)
        answer = b""
        while not (answer := answer + tls.read()):
            tls.hear(await peer.read())
        fates.add(answer.split()[1].decode())

    async with trio.open_nursery() as floods:
        for each in ready:
            floods.start_soon(flood, *each)
    return sorted(fates)


async def _send(peer: Peer, data: bytes) -> None:
    try:
        await peer.send(data)
    except Ended:
        pass


@hostile(
    "crowd/100 slow streams over TLS, drop_oldest",
    ISSUE,
    "served",
    attackers=50,
    fresh=True,
    seconds=40.0,
    peak_mib=200.0,
    left_mib=128.0,
    setup=Setup(
        tls=True, options=("--slow-consumer", "drop_oldest", "--history-size", "0"), env=STALL
    ),
)
async def _streams(field: Field) -> Sequence[str]:
    peers = [
        await field.open_stream(
            "/connection/uni_sse", {"subs": {"slow": {}}}, receive_buffer=BUFFER
        )
        for _ in range(100)
    ]
    for peer in peers:
        field.nursery.start_soon(_drain, peer)
    publisher = await field.open_client()
    for _ in range(500):
        await publisher.say({"publish": {"channel": "slow", "data": "x" * 10_000}})
        await trio.sleep(0.01)
    return ["served"]


async def _drain(peer: Peer) -> None:
    try:
        await peer.drain(40e3, 8192)
    except Ended:
        pass
