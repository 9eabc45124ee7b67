"""Inputs that are compressed: little that becomes much, much that becomes nothing, windows that are kept."""

import zlib
from collections.abc import Sequence
from typing import Final

import trio

from tests.deflated import deflated
from tests.hostile.field import Attack, Field, Input, add, hostile, unless
from tests.hostile.target import Setup
from tests.hostile.wire import BINARY, CLOSE, CONTINUATION, PING, TEXT, Ended, Peer, frame, text

SOURCE: Final = "RFC 7692"
RSV1: Final = 0x40
OFFER: Final = {"Sec-WebSocket-Extensions": "permessage-deflate"}
COMPRESSED: Final = Setup(env={"BROKER_COMPRESSION": "true"})
KEEPING_MIB: Final = 64
KEEPING: Final = Setup(
    env={
        "BROKER_COMPRESSION": "true",
        "BROKER_COMPRESSION_CLIENT_CONTEXT": "true",
        "BROKER_MAX_MEMORY_BYTES": str(KEEPING_MIB * 2**20),
    }
)


def repeated(data: bytes, times: int) -> bytes:
    """The same of so many times the data, without the seconds that a gigabyte takes."""
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15)
    first, again = (deflater.compress(data) + deflater.flush(zlib.Z_SYNC_FLUSH) for _ in range(2))
    return (first + again * (times - 1))[:-4]


def tables(count: int) -> bytes:
    """Eight times as many blocks with tables of their own and no data, of 90 bits each."""
    order = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1]
    bits = [(0, 1), (2, 2), (0, 5), (0, 5), (len(order) - 4, 4)]
    bits += [(1 if each in (18, 1) else 0, 3) for each in order]
    bits += [(1, 1), (138 - 11, 7), (1, 1), (118 - 11, 7), (0, 1), (0, 1), (0, 1)]
    block = at = 0
    for value, width in bits * 8:
        block |= value << at
        at += width
    return block.to_bytes(at // 8, "little") * count + b"\x00"


BOMB: Final = frame(BINARY, repeated(bytes(10**6), 1000), rsv=RSV1)
"""A gigabyte in one megabyte."""
JUST: Final = frame(BINARY, deflated(bytes(2**20)), rsv=RSV1)
"""A message of the largest size in one kilobyte."""
TABLES: Final = frame(BINARY, tables(11_000), rsv=RSV1)
"""A megabyte of work that comes to nothing."""
EMPTY: Final = frame(BINARY, b"\x00\x00\x00\xff\xff" * 200_000 + b"\x00", rsv=RSV1)
FINALS: Final = frame(BINARY, b"\x03\x00" * 50_000, rsv=RSV1)
"""As many streams, each at its end, in one message."""
FRAGMENTS: Final = frame(BINARY, deflated(bytes(10**6)), rsv=RSV1, fin=False) + b"".join(
    frame(PING, b"?") + frame(CONTINUATION, b"\x00\x00\xff\xff" + deflated(bytes(10**6)), fin=False)
    for _ in range(3)
)
TINY: Final = frame(TEXT, b"\x00", rsv=RSV1) * 2_000
PONGS: Final = text({"id": 1, "connect": {}}) + frame(TEXT, deflated(b"{}"), rsv=RSV1) * 20_000


def _ends(*pieces: bytes) -> Attack:
    async def attack(field: Field) -> Sequence[str]:
        peer = await field.open_ws(fields=OFFER)
        try:
            for piece in pieces:
                await peer.send(piece)
            await peer.send(frame(CLOSE, (1000).to_bytes(2, "big")))
        except Ended:
            pass
        return [await peer.ending(15.0)]

    return attack


for name, data, outcome in (
    ("a gigabyte in one frame", BOMB, "close 1009"),
    ("a gigabyte in fragments, Pings between", FRAGMENTS, "close 1009"),
    ("a megabyte, ten times", JUST * 10, "close 1000"),
    ("all tables and no data", TABLES, "close 1000"),
    ("empty blocks", EMPTY, "close 1000"),
    ("50,000 last blocks", FINALS, "close 1000"),
    ("2,000 empty messages", TINY, "close 1000"),
    ("20,000 pongs, thousands a read", PONGS, "close 1000"),
    ("no DEFLATE", frame(BINARY, b"\xff" * 1000, rsv=RSV1), "close 1007"),
    ("RSV1 on a continuation",
     frame(TEXT, b"\x00", rsv=RSV1, fin=False) + frame(CONTINUATION, rsv=RSV1), "close 1002"),
):  # fmt: skip
    add(
        Input(
            name=f"bomb/{name}", source=SOURCE, should=(outcome,), attack=_ends(data),
            setup=COMPRESSED, times=3, quick=len(data) < 10_000,
        )
    )  # fmt: skip


def _many(data: bytes) -> Attack:
    """A hundred connections that send the same at once."""

    async def attack(field: Field) -> Sequence[str]:
        peers = [await field.open_ws(fields=OFFER) for _ in range(100)]
        outcomes: set[str] = set()

        async def bomb(peer: Peer) -> None:
            try:
                await peer.send(data)
                await peer.send(frame(CLOSE, (1000).to_bytes(2, "big")))
            except Ended:
                pass
            outcomes.add(await peer.ending(50.0))

        async with trio.open_nursery() as nursery:
            for peer in peers:
                nursery.start_soon(bomb, peer)
        return sorted(outcomes)

    return attack


for name, data, outcome in (
    ("100 connections, a gigabyte each", BOMB, "close 1009"),
    ("100 connections, a megabyte each", JUST, "close 1000"),
    ("100 connections, tables and no data", frame(BINARY, tables(500), rsv=RSV1), "close 1000"),
):
    add(
        Input(
            name=f"bomb/{name}", source=SOURCE, should=(outcome,), attack=_many(data),
            setup=COMPRESSED, attackers=100, seconds=60.0, peak_mib=192.0,
        )
    )  # fmt: skip


@hostile("bomb/games with windows", SOURCE, "served", setup=COMPRESSED, quick=True)
async def _windows(field: Field) -> Sequence[str]:
    """Every offer of windows, good and bad; who is agreed with is served within its window."""
    data = b"a window is as wide as was agreed on " * 100
    for server in ("", *range(6, 18), "x", '"9"'):
        for client in ("", *range(6, 18), "x"):
            offer = "permessage-deflate"
            offer += f"; server_max_window_bits={server}" if server else ""
            offer += f"; client_max_window_bits={client}" if client else ""
            peer = await field.open_ws(fields={"Sec-WebSocket-Extensions": offer})
            is_number = isinstance(client, int) and 9 <= client <= 15
            agreed = (not server or server in (*range(9, 16), '"9"')) and (
                not client or client in range(8, 16)
            )
            if agreed:
                bits = client if is_number else 9
                await peer.send(frame(TEXT, deflated(data, int(bits)), rsv=RSV1))
            else:
                await peer.send(frame(TEXT, data))
            await peer.send(frame(CLOSE, (1000).to_bytes(2, "big")))
            if (how := await peer.ending()) != "close 1000":
                return [f"{offer}: {how}"]
            await peer.aclose()
    return ["served"]


@hostile(
    "bomb/1,000 idle clients that keep a window", SOURCE, "served",
    setup=KEEPING, seconds=60.0, peak_mib=KEEPING_MIB, fresh=True,
)  # fmt: skip
async def _keep(field: Field) -> Sequence[str]:
    """Each has its window filled, and stays."""
    message = frame(BINARY, deflated(bytes(range(256)) * 160), rsv=RSV1)
    peers = []
    for _ in range(1000):
        peer = await field.open_ws(fields=OFFER)
        await peer.send(message)
        peers.append(peer)
    await trio.sleep(0.5)
    gone = 0
    for peer in peers[::50]:
        await peer.send(message)
        await peer.send(frame(PING, b"?"))
        try:
            while (await peer.frame())[1] != b"?":
                pass
        except Ended:
            gone += 1
    return unless(gone and f"{gone} of 20 were ended", "served")
