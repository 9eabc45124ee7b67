"""Inputs that come in pieces or in rows: halves that many hold, a byte at a time, ten thousand at once."""

import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import trio

from tests.deflated import deflated
from tests.hostile.bombs import COMPRESSED, OFFER, RSV1, repeated
from tests.hostile.field import Field, hostile
from tests.hostile.floods import flooders
from tests.hostile.messages import TOKENS, token
from tests.hostile.slow import BUFFER, STALL
from tests.hostile.target import API_KEY, Setup
from tests.hostile.wire import (
    BINARY,
    CONTINUATION,
    TEXT,
    Ended,
    Json,
    Peer,
    frame,
    handshake,
    request,
    said,
    text,
)

ISSUE: Final = "issue 9"
FREE: Final = Setup(
    tls=True,
    options=("--slow-consumer", "drop_oldest", "--history-size", "0"),
    env={**STALL, "BROKER_COMPRESSION": "true"},
)


async def all_at_once(
    field: Field, peers: Sequence[Peer], act: Callable[[Peer], Awaitable[str]]
) -> Sequence[str]:
    """The different fates of peers that do the same at the same moment."""
    fates = set[str]()

    async def one(peer: Peer) -> None:
        try:
            fates.add(await act(peer))
        except Ended as ended:
            fates.add(ended.how)

    async with trio.open_nursery() as nursery:
        for peer in peers:
            nursery.start_soon(one, peer)
    return sorted(fates)


# what is not whole


@hostile("piece/1,000 halves of a compressed message", ISSUE, "held", setup=COMPRESSED, fresh=True,
         attackers=1000, seconds=60.0, peak_mib=256.0, left_mib=96.0)  # fmt: skip
async def _halves(field: Field) -> Sequence[str]:
    half = frame(BINARY, deflated(bytes(range(256)) * 400), rsv=RSV1, fin=False)
    peers = [await field.open_ws(fields=OFFER) for _ in range(1000)]

    async def act(peer: Peer) -> str:
        await peer.send(half)
        return "held"

    return await all_at_once(field, peers, act)


@hostile("piece/50 bombs of 900 small fragments", ISSUE, "close 1009", setup=COMPRESSED,
         attackers=50, seconds=60.0, peak_mib=192.0)  # fmt: skip
async def _fragments(field: Field) -> Sequence[str]:
    whole = repeated(bytes(10**6), 1000)
    size = len(whole) // 900 + 1
    data = frame(BINARY, whole[:size], rsv=RSV1, fin=False) + b"".join(
        frame(CONTINUATION, whole[at : at + size], fin=False)
        for at in range(size, len(whole), size)
    )
    peers = [await field.open_ws(fields=OFFER) for _ in range(50)]

    async def act(peer: Peer) -> str:
        try:
            await peer.send(data)
        except Ended:
            pass
        return await peer.ending(50.0)

    return await all_at_once(field, peers, act)


@hostile("piece/300 bodies in chunks of one byte", ISSUE, "411", "RST", "EOF", attackers=300,
         seconds=40.0, peak_mib=96.0)  # fmt: skip
async def _chunks(field: Field) -> Sequence[str]:
    peers = [await field.connect() for _ in range(300)]
    head = request("POST /connection/uni_sse", [("Transfer-Encoding", "chunked")])

    async def act(peer: Peer) -> str:
        await peer.send(head)
        for _ in range(200):
            await peer.send(b"1\r\n \r\n")
        return str((await peer.response()).status)

    return await all_at_once(field, peers, act)


@hostile("piece/300 heads, a byte at a time", ISSUE, "101", attackers=300, seconds=60.0,
         peak_mib=96.0)  # fmt: skip
async def _heads(field: Field) -> Sequence[str]:
    peers = [await field.connect() for _ in range(300)]
    head = handshake()

    async def act(peer: Peer) -> str:
        for at in range(len(head)):
            await peer.send(head[at : at + 1])
        return str((await peer.head()).status)

    return await all_at_once(field, peers, act)


# rows of requests


def _pipelined(named: str, data: bytes, *should: str) -> None:
    @hostile(f"row/10,000 requests, {named}", ISSUE, *should, attackers=5, seconds=40.0)
    async def _row(field: Field) -> Sequence[str]:
        peers = [await field.connect() for _ in range(5)]

        async def act(peer: Peer) -> str:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_send, peer, data * 10_000)
                status = (await peer.response()).status
                with trio.move_on_after(20):
                    try:
                        await peer.drain()
                    except Ended:
                        pass
                nursery.cancel_scope.cancel()
            return str(status)

        return await all_at_once(field, peers, act)


async def _send(peer: Peer, data: bytes) -> None:
    try:
        await peer.send(data)
    except Ended:
        pass


KEY: Final = ("X-API-Key", API_KEY)
_pipelined("healthz", request("GET /healthz"), "200")
_pipelined("a page", request("GET /"), "200")
_pipelined("metrics", request("GET /metrics", [KEY]), "200")
_pipelined("API without a key", request("POST /api/info", [], b"{}"), "401")
_pipelined("API, info", request("POST /api/info", [KEY], b"{}"), "200")
_pipelined("API, a wrong method", request("POST /api/nothing", [KEY], b"{}"), "404")
_pipelined("emulation", request("POST /emulation", [], b'{"session":"1"}'), "404", "400")


# what many ask for


@hostile("row/16 clients show tokens of 64 KiB", ISSUE, "served", attackers=16, setup=TOKENS,
         peak_mib=128.0)  # fmt: skip
async def _tokens(field: Field) -> Sequence[str]:
    shown = token({"sub": "a", "channel": "t", "x": "y" * 48_000})
    data = text({"id": 9, "subscribe": {"channel": "t", "token": shown}})
    await flooders(field, 16, data)
    return ["served"]


@hostile("row/16 clients send JSON 10,000 deep", ISSUE, "served", attackers=16, peak_mib=128.0)
async def _deep(field: Field) -> Sequence[str]:
    data = frame(
        TEXT, b'{"id":9,"publish":{"channel":"a","data":' + b"[" * 10_000 + b"]" * 10_000 + b"}}"
    )
    await flooders(field, 16, data)
    return ["served"]


@hostile("row/50 clients recover 900 topics at once", ISSUE, "recovered", attackers=50, fresh=True,
         seconds=60.0, peak_mib=192.0, left_mib=96.0)  # fmt: skip
async def _recoveries(field: Field) -> Sequence[str]:
    api = await field.keep_api()
    for start in range(0, 900, 100):
        publishes = [
            {"publish": {"channel": f"kept{n}", "data": k}}
            for n in range(start, start + 100)
            for k in range(10)
        ]
        await api.call("batch", commands=publishes)
    epochs: list[str] = []
    for n in range(900):
        found = await api.call("history", channel=f"kept{n}", limit=1)
        epochs.append(str(found["result"]["epoch"]))
    asked: list[Json] = [
        {
            "id": n + 2,
            "subscribe": {"channel": f"kept{n}", "recover": True, "epoch": epochs[n], "offset": 0},
        }
        for n in range(900)
    ]
    peers = await field.open_clients(50)
    data = text(*asked)

    async def act(peer: Peer) -> str:
        await peer.send(data)
        left = 900
        while left:
            left -= sum("subscribe" in line for line in await peer.lines())
        return "recovered"

    return await all_at_once(field, peers, act)


@hostile("row/1,000 join a group and leave it", ISSUE, "served", attackers=1000, fresh=True,
         seconds=60.0, peak_mib=128.0, left_mib=96.0)  # fmt: skip
async def _group(field: Field) -> Sequence[str]:
    peers = await field.open_clients(1000)
    publisher = await field.open_client()
    data = text(
        {"id": 8, "subscribe": {"channel": "jobs", "data": {"group": "g"}}},
        {"id": 9, "unsubscribe": {"channel": "jobs"}},
    )

    async def act(peer: Peer) -> str:
        for _ in range(5):
            await peer.send(data)
            await peer.reply(9)
        return "served"

    async def work() -> None:
        while True:
            await publisher.say(*({"publish": {"channel": "jobs", "data": n}} for n in range(20)))
            await trio.sleep(0.01)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(work)
        fates = await all_at_once(field, peers, act)
        nursery.cancel_scope.cancel()
    return fates


@hostile("row/3,000 wills at once", ISSUE, "gone", attackers=3000, fresh=True, seconds=90.0,
         peak_mib=192.0, left_mib=160.0)  # fmt: skip
async def _wills(field: Field) -> Sequence[str]:
    readers = await field.open_clients(50)
    for reader in readers:
        await reader.call(subscribe={"channel": "last"})
        field.nursery.start_soon(_drained, reader)
    peers = await field.open_clients(3000)
    for peer in peers:
        await peer.rpc("will", topic="last", data="x" * 100)
    for peer in peers:
        peer.reset()
    await trio.sleep(2)
    return ["gone"]


async def _drained(peer: Peer) -> None:
    try:
        await peer.drain()
    except Ended:
        pass


@hostile("row/50 connect with tokens for 700 watched topics", ISSUE, "ok", "close 3501", attackers=50,
         setup=TOKENS, fresh=True, seconds=60.0, peak_mib=192.0, left_mib=128.0)  # fmt: skip
async def _watched(field: Field) -> Sequence[str]:
    names = [f"w{number}" for number in range(700)]
    watcher = await field.open_client(token=token({"sub": "w"}))
    for start in range(0, 700, 100):
        await watcher.say(
            *(
                {"id": start + n + 2, "subscribe": {"channel": name, "join_leave": True}}
                for n, name in enumerate(names[start : start + 100])
            )
        )
    field.nursery.start_soon(_drained, watcher)
    shown = token({"sub": "a", "channels": names})
    peers = [await field.open_ws() for _ in range(50)]

    async def act(peer: Peer) -> str:
        await peer.say({"id": 1, "connect": {"token": shown}})
        return said(await peer.reply(1))

    return await all_at_once(field, peers, act)


# answers that nobody takes


@hostile("unread/100 compressed, over TLS, at 40 KB/s", ISSUE, "served", attackers=100, setup=FREE,
         fresh=True, seconds=60.0, peak_mib=256.0, left_mib=128.0)  # fmt: skip
async def _compressed(field: Field) -> Sequence[str]:
    readers = []
    for _ in range(100):
        reader = await field.open_ws(fields=OFFER, receive_buffer=BUFFER)
        await reader.say({"id": 1, "connect": {}})
        await reader.say({"id": 2, "subscribe": {"channel": "slow"}})
        readers.append(reader)
    for reader in readers:
        field.nursery.start_soon(_sip, reader)
    publisher = await field.open_client()
    data = json.dumps(list(range(2000)))
    for _ in range(400):
        await publisher.say({"publish": {"channel": "slow", "data": data}})
        await trio.sleep(0.01)
    return ["served"]


async def _sip(peer: Peer) -> None:
    try:
        await peer.drain(40e3, 8192)
    except Ended:
        pass


@hostile("unread/300 uni_sse that stop", ISSUE, "served", attackers=300, fresh=True, seconds=60.0,
         peak_mib=420.0, left_mib=128.0)  # fmt: skip
async def _stopped(field: Field) -> Sequence[str]:
    for _ in range(300):
        await field.open_stream("/connection/uni_sse", {"subs": {"slow": {}}}, receive_buffer=4096)
    publisher = await field.open_client()
    for _ in range(400):
        await publisher.say({"publish": {"channel": "slow", "data": "x" * 4000}})
        await trio.sleep(0.01)
    return ["served"]
