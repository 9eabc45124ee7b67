"""Inputs behind the handshake, at the level of RFC 6455: frames, lengths, fragments, control frames,
close codes, UTF-8, and peers that do not answer."""

from collections.abc import Sequence

import trio

from tests.hostile.field import PLAIN, Attack, Field, Input, add, hostile, unless
from tests.hostile.heads import HASTY, S1, S2, S3
from tests.hostile.target import Setup
from tests.hostile.wire import (
    BINARY,
    CLOSE,
    CONTINUATION,
    MASK,
    PING,
    PONG,
    TEXT,
    Ended,
    Peer,
    close,
    frame,
    handshake,
    header_of,
)

SMALL = Setup(options=("--max-message-bytes", "1000"))
"""A limit on messages that is cheap to go over."""
SLOW_APP = Setup(app="tests.hostile.apps:slow_messages")


def _ends(*pieces: bytes) -> Attack:
    """Send, and see how the connection ends."""

    async def attack(field: Field) -> Sequence[str]:
        peer = await field.open_ws()
        try:
            for piece in pieces:
                await peer.send(piece)
        except Ended:
            pass  # cut while it was sending: what came before it is still to be read
        return [await peer.ending()]

    return attack


def shape(name: str, source: str, data: bytes, *should: str, setup: Setup = PLAIN) -> None:
    """Put one sequence of frames, and how it must end, into the table."""
    add(
        Input(
            name=f"frame/{name}", source=source, should=should, attack=_ends(data), setup=setup,
            times=10, quick=True,
        )
    )  # fmt: skip


# headers

for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15):
    shape(f"opcode {opcode}", "RFC 6455 5.2", frame(opcode, b"x"), "close 1002")
for rsv in (0x40, 0x20, 0x10):
    shape(f"reserved bit {rsv:#x}", "RFC 6455 5.2", frame(TEXT, b"x", rsv=rsv), "close 1002")
    shape(f"reserved bit {rsv:#x} on a Ping", "RFC 6455 5.2", frame(PING, rsv=rsv), "close 1002")
shape("no mask", "RFC 6455 5.1", b"\x81\x01x", "close 1002")
shape("length 5 in 2 bytes", "RFC 6455 5.2", b"\x81\xfe\x00\x05" + MASK + b"hello", "close 1002")
shape("length 5 in 8 bytes", "RFC 6455 5.2", header_of(5) + b"hello", "close 1002")
shape("length 2^63", "RFC 6455 5.2", header_of(2**63), "close 1002", "close 1009")
shape("length 2^64 - 1", "RFC 6455 5.2", header_of(2**64 - 1), "close 1002", "close 1009")
shape("length 1 GiB", S2, header_of(2**30), "close 1009")
shape("a message of limit + 1", S1, frame(BINARY, bytes(1001)), "close 1009", setup=SMALL)
shape("limit + 1, a Ping behind", S1, frame(TEXT, b"x" * 1001) + frame(PING), "close 1009",
      setup=SMALL)  # fmt: skip
shape("limit counts bytes", S3, frame(TEXT, "新".encode() * 334), "close 1009", setup=SMALL)
shape("limit + 1 in fragments", S2,
      frame(TEXT, b"x" * 600, fin=False) + frame(CONTINUATION, b"x" * 600), "close 1009",
      setup=SMALL)  # fmt: skip

# fragments and control frames

shape("a continuation of nothing", "RFC 6455 5.4", frame(CONTINUATION, b"x"), "close 1002")
shape("a message within a message", "RFC 6455 5.4",
      frame(TEXT, b"a", fin=False) + frame(TEXT, b"b"), "close 1002")  # fmt: skip
shape("1,025 fragments", S2,
      frame(TEXT, b"", fin=False) + frame(CONTINUATION, fin=False) * 1024, "close 1009")  # fmt: skip
shape("a Ping in fragments", "RFC 6455 5.5", frame(PING, b"x", fin=False), "close 1002")
shape("a Ping of 126 bytes", "RFC 6455 5.5", frame(PING, bytes(126)), "close 1002")
shape("a Close of 126 bytes", "RFC 6455 5.5", close(1000, b"x" * 124), "close 1002")
shape("200 Pings", S2, frame(PING, b"x") * 200, "close 1008")
shape("200 Pongs", S2, frame(PONG, b"x") * 200, "close 1008")

# text

for name, data in {
    "a byte 0xFF": b"\xff",
    "half a character": "新".encode()[:2],
    "a surrogate": b"\xed\xa0\x80",
    "an overlong slash": b"\xc0\xaf",
    "past U+10FFFF": b"\xf4\x90\x80\x80",
}.items():
    shape(f"text, {name}", "RFC 6455 8.1", frame(TEXT, data), "close 1007")
shape("text, bad in a later fragment", "RFC 6455 8.1",
      frame(TEXT, b"good", fin=False) + frame(CONTINUATION, b"\xff"), "close 1007")  # fmt: skip

# closes

for code in (0, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535):
    shape(f"Close {code}", "RFC 6455 7.4", close(code), "close 1002")
shape("Close 1014", "RFC 6455 7.4; registered", close(1014), "close 1014")
shape("Close of one byte", "RFC 6455 5.5.1", frame(CLOSE, b"\x03"), "close 1002")
shape("Close with a bad reason", "RFC 6455 5.5.1", close(1000, b"\xff"), "close 1007", "close 1002")
shape("Close, then more", "RFC 6455 5.5.1", close(1000) + frame(TEXT, b"x") * 50, "close 1000")


# peers that do not answer, go away, or flood


def _leaves(*pieces: bytes, reset: bool) -> Attack:
    async def attack(field: Field) -> Sequence[str]:
        peer = await field.open_ws()
        for piece in pieces:
            await peer.send(piece)
        await trio.sleep(0.01)
        if reset:
            peer.reset()
        else:
            await peer.finish()
            await peer.ending()
        return ["gone"]

    return attack


for name, pieces in {
    "half a header": (b"\x81",),
    "half a message": (header_of(1000, TEXT) + b"x",),
    "half a fragmented message": (frame(TEXT, b"x", fin=False),),
    "a Ping": (frame(PING, b"x"),),
    "a Close": (close(1000),),
}.items():
    for word, reset in (("RST", True), ("FIN", False)):
        add(
            Input(
                name=f"leave/{name}, then {word}", source=S1, should=("gone",),
                attack=_leaves(*pieces, reset=reset), times=10, quick=True,
            )
        )  # fmt: skip


@hostile("leave/four messages to a busy hook, RST", S2, "gone", setup=SLOW_APP, times=10)
async def _busy(field: Field) -> Sequence[str]:
    peer = await field.open_ws()
    for number in range(4):
        await peer.send(frame(TEXT, b"%d" % number))
        await trio.sleep(0.01)
    peer.reset()
    return ["gone"]


@hostile("wait/50 slow messages, a Ping, a Close", S2, "answered", setup=SLOW_APP)
async def _slow_session(field: Field) -> Sequence[str]:
    peer = await field.open_ws()
    for number in range(50):
        await peer.send(frame(TEXT, b"%d" % number))
    began = trio.current_time()
    await peer.send(frame(PING, b"now"))
    while (await peer.frame())[0] != PONG:
        pass
    await peer.send(close(1000))
    while (await peer.frame())[0] != CLOSE:
        pass
    took = trio.current_time() - began
    return unless(took > 0.5 and f"after {took:.1f} s", "answered")


@hostile("wait/ignores our Close, and talks on", S2, "EOF", "RST", setup=HASTY)
async def _ignore(field: Field) -> Sequence[str]:
    peer = await field.open_client()
    await field.api("disconnect", client=str(peer.fd))
    with trio.move_on_after(6):
        try:
            while True:
                await peer.say({"id": 9, "rpc": {"method": "x"}})
                await trio.sleep(0.1)
        except Ended as ended:
            return [ended.how]
    return ["never cut"]


@hostile("wait/ignores our 1009", S2, "EOF", "RST", setup=HASTY, times=5)
async def _ignore_too_big(field: Field) -> Sequence[str]:
    peer = await field.open_ws()
    await peer.send(header_of(2**30))
    while (await peer.frame())[0] != CLOSE:
        pass
    with trio.move_on_after(6):
        return [await peer.ending()]
    return ["never cut"]


@hostile("wait/a Ping behind our Close", S1, "close 3503, nothing behind", quick=True)
async def _late_ping(field: Field) -> Sequence[str]:
    peer = await field.open_client()
    await field.api("disconnect", client=str(peer.fd))
    await peer.send(frame(PING, b"late") + frame(TEXT, b"late") + frame(PONG))
    how = await peer.ending()
    await peer.send(close(3503))
    try:
        opcode, _ = await peer.frame()
    except Ended:
        return [f"{how}, nothing behind"]
    return [f"{how}, then opcode {opcode}"]


@hostile("wait/half a message, then silence", S2, "close 1008", setup=HASTY, times=5)
async def _half(field: Field) -> Sequence[str]:
    peer = await field.open_ws()
    await peer.send(header_of(2**20, TEXT) + b"x")
    return [await _ending_with_pongs(peer)]


@hostile("wait/fragments, one a second", S2, "close 1008", setup=HASTY, times=5)
async def _fragments(field: Field) -> Sequence[str]:
    peer = await field.open_ws()

    async def drip() -> None:
        await peer.send(frame(TEXT, b"x", fin=False))
        for _ in range(6):
            await trio.sleep(1)
            try:
                await peer.send(frame(CONTINUATION, b"x", fin=False))
            except Ended:
                return

    field.nursery.start_soon(drip)
    return [await _ending_with_pongs(peer)]


@hostile("wait/half-open, before a connect", S2, "close 1011", setup=HASTY, times=5)
async def _half_open(field: Field) -> Sequence[str]:
    return [await _mute_ending(await field.open_ws())]


@hostile("wait/half-open, a client", S2, "close 3012", setup=HASTY, times=5)
async def _half_open_client(field: Field) -> Sequence[str]:
    return [await _mute_ending(await field.open_client())]


async def _mute_ending(peer: Peer) -> str:
    """How it ends for a peer that answers nothing."""
    with trio.move_on_after(10):
        try:
            while True:
                opcode, payload = await peer.frame()
                if opcode == CLOSE:
                    return f"close {int.from_bytes(payload[:2], 'big')}"
        except Ended as ended:
            return ended.how
    return "held for ever"


async def _ending_with_pongs(peer: Peer) -> str:
    return await peer.ending(8)


async def _flood(peer: Peer, data: bytes, times: int) -> str:
    """How it ends for a peer that sends and sends, and reads nothing meanwhile."""
    try:
        with trio.move_on_after(8):
            for _ in range(times):
                await peer.send(data)
    except Ended:
        pass
    return await peer.ending(8)


@hostile("flood/1,000,000 empty fragments", S2, "close 1009", "RST", seconds=30.0)
async def _empty_fragments(field: Field) -> Sequence[str]:
    peer = await field.open_ws()
    await peer.send(frame(TEXT, fin=False))
    return [await _flood(peer, frame(CONTINUATION, fin=False) * 10_000, 100)]


@hostile("flood/Pings whose Pongs are not read", S2, "close 1008", "RST", quick=True)
async def _pings(field: Field) -> Sequence[str]:
    peer = await field.open_ws(receive_buffer=4096)
    return [await _flood(peer, frame(PING, bytes(125)) * 100, 1000)]


@hostile("flood/messages byte by byte", S3, "answered", quick=True)
async def _bytewise(field: Field) -> Sequence[str]:
    peer = await field.connect()
    await peer.drip(handshake(), 0)
    await peer.head()
    await peer.drip(frame(TEXT, b"hello"), 0.002)
    return unless(await peer.message() != b"this is server" and "something else", "answered")


@hostile("flood/a million tiny plain messages", S3, "answered", seconds=40.0)
async def _tiny(field: Field) -> Sequence[str]:
    peer = await field.open_ws()

    async def send() -> None:
        try:
            for _ in range(100):
                await peer.send(frame(TEXT) * 10_000)
        except Ended:
            pass

    field.nursery.start_soon(send)
    with trio.move_on_after(5):
        await peer.drain()
    return ["answered"]
