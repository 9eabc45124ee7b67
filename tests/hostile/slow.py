"""Peers that read slowly and steadily, on each transport: they are to be kept, and to cost nothing.

The row's figures go with `stall_seconds` of 10; here it is 2, and the rates are five times as high,
so that a run takes 7 s rather than 35. The point is the same: the system's own buffer holds more
than such a reader takes within `stall_seconds`.
"""

from collections.abc import Sequence
from typing import Final

import trio

from tests.hostile.field import MIB, PLAIN, Attack, Field, Input, add, hostile, unless
from tests.hostile.floods import drained
from tests.hostile.target import Setup
from tests.hostile.wire import Ended, Peer, result, text

ISSUE: Final = "issue 9"
STALL: Final = {"BROKER_STALL_SECONDS": "2"}
SECONDS: Final = 7.0
BUFFER: Final = 4096
"""The least that the system grants as a receive buffer, about: what is sent is felt at once."""


async def _publish(field: Field, topic: str, rate: float) -> None:
    """Publish `rate` bytes a second, 10 KB a message."""
    publisher = await field.open_client()
    try:
        while True:
            await publisher.say({"publish": {"channel": topic, "data": "x" * 10_000}})
            await trio.sleep(10_000 / rate)
    except Ended:
        pass


async def _read_on(peer: Peer, rate: float, seconds: float = SECONDS) -> list[str]:
    """Read at a rate; whether the connection is there in the end."""
    with trio.move_on_after(seconds):
        try:
            if peer.fd:
                await peer.follow(rate, 8192)
            else:  # a stream over HTTP, which answers no pings and ends at once
                await peer.drain(rate, 8192)
        except Ended as ended:
            return [f"cut after {peer.received / 1000:.0f} KB: {ended.how}"]
    return ["stays"]


def _socket_reader(rate: float) -> Attack:
    async def attack(field: Field) -> Sequence[str]:
        peer = await field.open_client(receive_buffer=BUFFER)
        await peer.call(subscribe={"channel": "slow"})
        field.nursery.start_soon(_publish, field, "slow", 2e6)
        return await _read_on(peer, rate)

    return attack


def _stream_reader(path: str, rate: float) -> Attack:
    async def attack(field: Field) -> Sequence[str]:
        if path.endswith("uni_sse"):
            asked: object = {"subs": {"slow": {}}}
        else:
            asked = {"id": 1, "connect": {}}
        peer = await field.open_stream(path, asked, receive_buffer=BUFFER)
        if not path.endswith("uni_sse"):
            fd = (await peer.until(b"\n")).partition(b'"client":"')[2].partition(b'"')[0].decode()
            await field.api("subscribe", user="", client=fd, channel="slow")
        field.nursery.start_soon(_publish, field, "slow", 2e6)
        return await _read_on(peer, rate)

    return attack


def _reader(
    name: str, attack: Attack, *options: str, tls: bool = False, unix: bool = False
) -> None:
    add(
        Input(
            name=f"slow reader/{name}", source=ISSUE, should=("stays",), attack=attack,
            setup=Setup(options=options, env=STALL, tls=tls, unix=unix), peak_mib=48.0, fresh=True,
        )
    )  # fmt: skip


# Without a history: a client that can recover is told of a gap, and where the server had subscribed it
# that is by a close code with which it comes back.
DROP = ("--slow-consumer", "drop_oldest", "--history-size", "0")
LATEST = ("--slow-consumer", "latest", "--history-size", "0")
_reader("75 KB/s, drop_oldest", _socket_reader(75e3), *DROP)
_reader("75 KB/s, latest", _socket_reader(75e3), *LATEST)
_reader("75 KB/s, TLS, drop_oldest", _socket_reader(75e3), *DROP, tls=True)
_reader("75 KB/s, Unix, drop_oldest", _socket_reader(75e3), *DROP, unix=True)
_reader("45 KB/s, http_stream, drop_oldest", _stream_reader("/connection/http_stream", 45e3), *DROP)
_reader("45 KB/s, sse, latest", _stream_reader("/connection/sse", 45e3), *LATEST)
_reader("45 KB/s, uni_sse, drop_oldest", _stream_reader("/connection/uni_sse", 45e3), *DROP)


@hostile("slow reader/12 MB recovered by uni_sse at 2.5 MB/s", ISSUE, "all", fresh=True,
         setup=Setup(env={**STALL, "BROKER_HISTORY_REPLY_BYTES": str(16 * MIB)}), peak_mib=96.0, left_mib=48.0, seconds=30.0)  # fmt: skip
async def _recovery(field: Field) -> Sequence[str]:
    api = await field.keep_api()
    epoch = result(await api.call("publish", channel="r", data="x" * 120_000))["epoch"]
    for _ in range(99):
        await api.call("publish", channel="r", data="x" * 120_000)
    asked = {"subs": {"r": {"recover": True, "epoch": epoch, "offset": 0}}}
    peer = await field.open_stream("/connection/uni_sse", asked, receive_buffer=65536)
    with trio.move_on_after(9):
        try:
            await peer.drain(2.5e6, 65536)
        except Ended as ended:
            return [f"cut after {peer.received / 1e6:.1f} MB: {ended.how}"]
    return unless(peer.received < 11.9e6 and f"{peer.received / 1e6:.1f} MB of 12", "all")


@hostile("slow reader/one that reads nothing, close", "hostile peers, S2", "close 3008", "EOF", "RST",
         setup=Setup(env=STALL), fresh=True, peak_mib=48.0)  # fmt: skip
async def _never(field: Field) -> Sequence[str]:
    peer = await field.open_client(receive_buffer=BUFFER)
    await peer.call(subscribe={"channel": "slow"})
    field.nursery.start_soon(_publish, field, "slow", 2e6)
    await trio.sleep(6)
    return [await peer.ending(5)]


for name, options in (("drop_oldest", DROP), ("latest", LATEST)):

    @hostile(f"slow reader/one that reads nothing, {name}", "hostile peers, S2", "cut",
             setup=Setup(options=options, env=STALL), fresh=True, peak_mib=48.0)  # fmt: skip
    async def _never_dropping(field: Field) -> Sequence[str]:
        peer = await field.open_client(receive_buffer=BUFFER)
        await peer.call(subscribe={"channel": "slow"})
        field.nursery.start_soon(_publish, field, "slow", 2e6)
        for _ in range(40):
            await trio.sleep(0.25)
            if "error" in await field.api("connection", fd=peer.fd):
                return ["cut"]
        return ["held for ever"]


def _small_runs(by: str, path: str = "", *, tls: bool = False) -> None:
    """Five readers that are far behind, and runs of one publication each."""

    @hostile(f"slow reader/60,000 runs, drop_oldest{by}", ISSUE, "cheap", fresh=True, attackers=5,
             setup=Setup(options=DROP, tls=tls), peak_mib=96.0, left_mib=48.0, seconds=40.0)  # fmt: skip
    async def _runs(field: Field) -> Sequence[str]:
        count = 60_000
        for _ in range(5):
            await _open_reader(field, path)
        publisher = await field.open_client()
        before = field.sample().cpu
        one = text({"publish": {"channel": "a", "data": 1}}) + text(
            {"publish": {"channel": "b", "data": 1}}
        )
        done = False
        with trio.move_on_after(30):
            for _ in range(count // 200):
                await publisher.send(one * 100)
                await trio.lowlevel.checkpoint()
            await publisher.call(presence_stats={"channel": "a"})
            done = True
        spent = field.sample().cpu - before
        if not done:
            return [f"not through after 30 s, {spent:.0f} s of CPU"]
        return unless(spent / count > 1e-4 and f"{spent / count * 1e6:.0f} µs of CPU each", "cheap")


async def _open_reader(field: Field, path: str) -> None:
    """A client that reads 20 KB/s of the topics a and b."""
    if path:
        asked = {"id": 1, "connect": {}}
        peer = await field.open_stream(path, asked, receive_buffer=BUFFER)
        fd = (await peer.until(b"\n")).partition(b'"client":"')[2].partition(b'"')[0].decode()
        for topic in ("a", "b"):
            await field.api("subscribe", user="", client=fd, channel=topic)
    else:
        peer = await field.open_client(receive_buffer=BUFFER)
        for topic in ("a", "b"):
            await peer.call(subscribe={"channel": topic})
    field.nursery.start_soon(drained, peer, 20e3)


_small_runs("")
_small_runs(", TLS", tls=True)
_small_runs(", http_stream", "/connection/http_stream")
_small_runs(", sse", "/connection/sse")


@hostile("slow reader/10 at 15 KB/s beside a firehose", ISSUE, "served", attackers=10,
         setup=PLAIN, peak_mib=96.0)  # fmt: skip
async def _firehose(field: Field) -> Sequence[str]:
    for _ in range(10):
        peer = await field.open_client(receive_buffer=BUFFER)
        await peer.call(subscribe={"channel": "slow"})
        field.nursery.start_soon(drained, peer, 15e3)
    field.nursery.start_soon(_publish, field, "slow", 5e6)
    await trio.sleep(4)
    return ["served"]
