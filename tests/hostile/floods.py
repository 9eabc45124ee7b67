"""Inputs that multiply: each message or subscription is allowed, and their product is not affordable.

The rows of issue 9, and their kin. Those that hold memory say how much the broker may gain, and why.
"""

import itertools
import random
from base64 import urlsafe_b64encode
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec
import trio

from tests.hostile.field import MIB, Field, hostile, unless
from tests.hostile.target import Setup
from tests.hostile.wire import (
    BINARY,
    CONTINUATION,
    PING,
    TEXT,
    Ended,
    Json,
    Peer,
    frame,
    handshake,
    request,
    result,
    said,
    text,
)

ISSUE: Final = "issue 9"
APP: Final = "hostile peers, application level"
SERVED: Final = ("served", "refused")
MEGABYTE: Final = "x" * 10**6
LARGE_PUBLISH: Final = b'{"publish":{"channel":"e","data":"%b"}}' % (b"x" * 10**6)
TOKENS: Final = 10

BUDGET_MIB: Final = 256.0
BUDGET: Final = {"BROKER_MAX_MEMORY_BYTES": str(int(BUDGET_MIB) * MIB)}
"""Of a broker whose inputs hold much: the bound that issue 9 asks for."""

HOLES_MIB: Final = 2 * BUDGET_MIB
"""What the process may take with the holes that many large blocks leave, before they are given back."""

HISTORY: Final = Setup(env=BUDGET)
SLOW_CURVE: Final = Setup(
    toml=f"[tokens]\npublic_keys = ['{Path(__file__).with_name('es384.pem')}']\nallow_anonymous = true\n"
)
HISTORY_MIB: Final = 57
"""As many publications of 1 MB fit into `history_bytes`, 64 MiB, with what they cost besides."""


def matching(count: int) -> Iterator[str]:
    """Different patterns that all match `TARGET`: with one to eight stars in ten tokens."""
    patterns = (
        ".".join("*" if at in stars else f"t{at}" for at in range(TOKENS))
        for size in range(1, 9)
        for stars in map(set, itertools.combinations(range(TOKENS), size))
    )
    return itertools.islice(patterns, count)


TARGET: Final = ".".join(f"t{at}" for at in range(TOKENS))


def filter_of(leaves: int) -> Json:
    """A filter of as many numeric comparisons, none of which is true."""
    nodes = [{"key": f"k{n}", "cmp": "gt", "val": "1000000.5"} for n in range(leaves)]
    return {"op": "or", "nodes": nodes}


def request_of(responder: Peer, number: int, data: object = 1, **more: object) -> Json:
    """The command of this id that requests something of another peer."""
    asked = {"to": f"fd:{responder.fd}", "data": data, **more}
    return {"id": number, "rpc": {"method": "request", "data": asked}}


async def subscribe_all(peer: Peer, requests: Sequence[Json]) -> "Counter[str]":
    """Subscribe to many, 20 a message; how often each answer came."""
    answers: Counter[str] = Counter()
    for start in range(0, len(requests), 20):
        some = requests[start : start + 20]
        await peer.say(*({"id": start + n + 1, "subscribe": each} for n, each in enumerate(some)))
        left = len(some)
        while left:
            for line in await peer.lines():
                if "id" in line:
                    answers[said(line)] += 1
                    left -= 1
    return answers


def served(answers: "Counter[str]") -> list[str]:
    """Served, or refused for its size: both are right, as long as it is told."""
    odd = [each for each in answers if each not in ("ok", "error 106", "error 107", "error 111")]
    return odd or (["served"] if answers["ok"] else ["refused"])


async def drained(peer: Peer, rate: float = 0.0) -> None:
    """Read on until the end, whatever that is."""
    try:
        await peer.drain(rate)
    except Ended:
        pass


async def fill_history(field: Field, topic: str, count: int = HISTORY_MIB) -> None:
    """Publish as many messages of 1 MB."""
    api = await field.keep_api()
    for _ in range(count):
        await api.call("publish", channel=topic, data=MEGABYTE)


async def retain(field: Field, count: int, size: int) -> None:
    """Retain values under `r.a.b.c.d.N`."""
    api = await field.keep_api()
    at_once = min(100, 500_000 // size)
    for start in range(0, count, at_once):
        publishes = [
            {"publish": {"channel": f"r.a.b.c.d.{n}", "data": "x" * size, "retain": True}}
            for n in range(start, min(start + at_once, count))
        ]
        await api.call("batch", commands=publishes)


# filters and patterns


@hostile("multiply/990 patterns, 99-node filters", ISSUE, *SERVED, fresh=True, seconds=15.0)
async def _patterns_with_filters(field: Field) -> Sequence[str]:
    peer = await field.open_client()
    tf = filter_of(98)
    answers = await subscribe_all(peer, [{"channel": p, "tf": tf} for p in matching(990)])
    await peer.say(*({"publish": {"channel": TARGET, "data": 1}} for _ in range(100)))
    await peer.call(presence_stats={"channel": "a"})
    return served(answers)


@hostile("multiply/the same by tags that pass", ISSUE, *SERVED, fresh=True, seconds=15.0)
async def _patterns_with_tags(field: Field) -> Sequence[str]:
    peer = await field.open_client()
    tf = filter_of(98)
    answers = await subscribe_all(peer, [{"channel": p, "tf": tf} for p in matching(990)])
    tags = {f"k{n}": "0.5" for n in range(98)}
    publishes = [{"publish": {"channel": TARGET, "data": 1, "tags": tags}}] * 50
    await field.api("batch", commands=publishes)
    return served(answers)


@hostile("multiply/such filters, 200 publishes a second", ISSUE, *SERVED, fresh=True, seconds=15.0)
async def _paced(field: Field) -> Sequence[str]:
    peer, publisher = await field.open_clients(2)
    tf = filter_of(99)
    answers = await subscribe_all(peer, [{"channel": p, "tf": tf} for p in matching(990)])
    field.nursery.start_soon(drained, peer)
    for _ in range(400):
        await publisher.say({"publish": {"channel": TARGET, "data": 1}})
        await trio.sleep(0.005)
    return served(answers)


@hostile("multiply/14,000 retained, filtered 16 times", ISSUE, *SERVED, fresh=True, seconds=15.0)
async def _retained_filtered(field: Field) -> Sequence[str]:
    await retain(field, 14_000, 10)
    peer = await field.open_client()
    names = ["r", "a", "b", "c"]
    patterns = [
        ".".join("*" if bits >> at & 1 else name for at, name in enumerate(names)) + ".>"
        for bits in range(16)
    ]
    tf = filter_of(98)
    return served(await subscribe_all(peer, [{"channel": p, "tf": tf} for p in patterns]))


@hostile("multiply/30 x 1,000 patterns that do not match", ISSUE, "cheap", fresh=True, attackers=30,
         seconds=30.0, peak_mib=256.0, left_mib=128.0)  # fmt: skip
async def _no_match(field: Field) -> Sequence[str]:
    chance = random.Random(7)
    peers = await field.open_clients(30)
    for number, peer in enumerate(peers):
        requests = []
        for n in range(1000):
            stars = set(chance.sample(range(31), 8))
            tokens = ["*" if at in stars else "t" for at in range(31)]
            requests.append({"channel": ".".join((*tokens, f"n{number}x{n}"))})
        await subscribe_all(peer, requests)
    publisher = await field.open_client()
    before = field.sample().cpu
    for _ in range(200):
        await publisher.say({"publish": {"channel": ".".join(["t"] * 32), "data": 1}})
        await trio.sleep(0.005)
    await publisher.call(presence_stats={"channel": "a"})
    each = (field.sample().cpu - before) / 200
    return unless(each > 0.002 and f"{each * 1000:.0f} ms of CPU a publish", "cheap")


@hostile("multiply/5 x 990 patterns, all excluded", ISSUE, "cheap", fresh=True, seconds=30.0)
async def _excluded(field: Field) -> Sequence[str]:
    peers = await field.open_clients(5)
    for peer in peers:
        await subscribe_all(peer, [{"channel": each} for each in matching(990)])
    publisher = await field.open_client()
    before = field.sample().cpu
    parameters = {"topic": TARGET, "data": 1, "exclude": [peer.fd for peer in peers]}
    await publisher.say(
        *({"id": n, "rpc": {"method": "publish", "data": parameters}} for n in range(2, 502))
    )
    await publisher.reply(501)
    spent = field.sample().cpu - before
    return unless(spent > 1 and f"{spent:.1f} s of CPU", "cheap")


@hostile("multiply/1,000 rooms by filter on one topic", ISSUE, "cheap", fresh=True, attackers=1000,
         seconds=30.0, peak_mib=96.0, left_mib=48.0)  # fmt: skip
async def _rooms(field: Field) -> Sequence[str]:
    peers = await field.open_clients(1000)
    for number, peer in enumerate(peers):
        room = {"key": "room", "cmp": "eq", "val": str(number)}
        result(await peer.call(subscribe={"channel": "rooms", "tf": room}))
    api = await field.keep_api()
    before = field.sample().cpu
    for number in range(500):
        await api.call("publish", channel="rooms", data=1, tags={"room": str(number)})
    each = (field.sample().cpu - before) / 500
    heard = sum([len(await peer.publications()) for peer in peers[:500]])
    if heard != 500:
        return [f"{heard} heard of 500"]
    return unless(each > 0.001 and f"{each * 1000:.1f} ms of CPU a publish", "cheap")


@hostile("multiply/990 patterns, reads of 500 publishes", ISSUE, *SERVED, seconds=15.0)
async def _patterns_and_reads(field: Field) -> Sequence[str]:
    peer, publisher = await field.open_clients(2)
    answers = await subscribe_all(peer, [{"channel": each} for each in matching(990)])
    field.nursery.start_soon(drained, peer)
    with trio.move_on_after(2):
        await repeat(publisher, text({"publish": {"channel": TARGET, "data": 1}}) * 500)
    return served(answers)


def _large_for_many(named: str, size: int) -> None:
    @hostile(f"multiply/990 patterns, publishes of {named}", ISSUE, *SERVED, fresh=True,
             setup=Setup(options=("--slow-consumer", "drop_oldest", "--history-size", "0")),
             seconds=15.0)  # fmt: skip
    async def _patterns_and_large(field: Field) -> Sequence[str]:
        peer, publisher = await field.open_clients(2)
        answers = await subscribe_all(peer, [{"channel": each} for each in matching(990)])
        with trio.move_on_after(4):
            await repeat(publisher, text({"publish": {"channel": TARGET, "data": "x" * size}}))
        return served(answers)


_large_for_many("60 KB", 60_000)
_large_for_many("1 MB", 10**6)


@hostile("multiply/50 x rpc publish into 990 patterns", ISSUE, *SERVED, attackers=50, fresh=True,
         seconds=20.0)  # fmt: skip
async def _many_calls(field: Field) -> Sequence[str]:
    peer, *callers = await field.open_clients(51)
    answers = await subscribe_all(peer, [{"channel": each} for each in matching(990)])
    field.nursery.start_soon(drained, peer)
    call = {"id": 9, "rpc": {"method": "publish", "data": {"topic": TARGET, "data": 1}}}
    with trio.move_on_after(3):
        async with trio.open_nursery() as nursery:
            for caller in callers:
                nursery.start_soon(repeat, caller, text(call))
                nursery.start_soon(drained, caller)
    return served(answers)


@hostile("multiply/50 wills for 990 patterns at once", ISSUE, "gone", attackers=50, fresh=True,
         seconds=20.0)  # fmt: skip
async def _many_wills(field: Field) -> Sequence[str]:
    peer, *others = await field.open_clients(51)
    await subscribe_all(peer, [{"channel": each} for each in matching(990)])
    field.nursery.start_soon(drained, peer)
    for other in others:
        result(await other.rpc("will", topic=TARGET, data=1))
    for other in others:
        other.reset()
    await trio.sleep(1)
    return ["gone"]


@hostile("multiply/50 x 1,000 patterns left at once", ISSUE, "gone", attackers=50, fresh=True,
         seconds=30.0, peak_mib=256.0, left_mib=200.0)  # fmt: skip
async def _leave_together(field: Field) -> Sequence[str]:
    peers = await field.open_clients(50)
    for number, peer in enumerate(peers):
        names = [{"channel": f"*.{number}.x{n}.>"} for n in range(1000)]
        await subscribe_all(peer, names)
    for peer in peers:
        peer.reset()
    await trio.sleep(1)
    return ["gone"]


@hostile("multiply/a group of 200 that is stuck", ISSUE, "cheap", attackers=200, fresh=True,
         seconds=30.0, peak_mib=128.0, left_mib=64.0)  # fmt: skip
async def _stuck_group(field: Field) -> Sequence[str]:
    for _ in range(200):
        peer = await field.open_client(receive_buffer=4096)
        await peer.call(subscribe={"channel": "jobs", "data": {"group": "g"}})
    publisher = await field.open_client()
    before = field.sample().cpu
    data = text({"publish": {"channel": "jobs", "data": "x" * 1000}}) * 100
    for _ in range(500):
        await publisher.send(data)
    await publisher.call(presence_stats={"channel": "a"})
    spent = field.sample().cpu - before
    return unless(spent > 5 and f"{spent:.1f} s of CPU", "cheap")


@hostile("multiply/10,000 patterns *.*.*.*.>", APP, *SERVED, attackers=10, seconds=20.0,
         peak_mib=96.0)  # fmt: skip
async def _stars(field: Field) -> Sequence[str]:
    found: Counter[str] = Counter()
    for number, peer in enumerate(await field.open_clients(10)):
        found += await subscribe_all(
            peer, [{"channel": f"*.*.*.*.c{number}x{n}.>"} for n in range(1000)]
        )
    return served(found)


@hostile("multiply/100,000 subscriptions of one client", APP, *SERVED, seconds=30.0)
async def _subscriptions(field: Field) -> Sequence[str]:
    peer = await field.open_client()
    found: Counter[str] = Counter()
    for start in range(0, 100_000, 500):
        await peer.say(
            *({"id": n + 1, "subscribe": {"channel": f"s{n}"}} for n in range(start, start + 500))
        )
        left = 500
        while left:
            lines = [line for line in await peer.lines() if "id" in line]
            found += Counter(map(said, lines))
            left -= len(lines)
    return served(found)


@hostile(
    "multiply/exclude lists of 100,000", ISSUE, "served", "error 106", "error 107", seconds=20.0
)
async def _long_excludes(field: Field) -> Sequence[str]:
    peer = await field.open_client()
    parameters = {"topic": "a", "data": 1, "exclude": list(range(100_000))}
    replies = [await peer.rpc("publish", **parameters) for _ in range(10)]
    return ["served" if "error" not in each else said(each) for each in replies]


# filters and names that are large


@hostile("memory/600 subscriptions, 1 MB filters", ISSUE, "refused", "error 106", "error 107",
         fresh=True, peak_mib=48.0, setup=HISTORY, seconds=20.0)  # fmt: skip
async def _large_filters(field: Field) -> Sequence[str]:
    peer = await field.open_client()
    tf = {"key": "a", "cmp": "eq", "val": MEGABYTE}
    last = "served"
    for number in range(600):
        last = said(await peer.call(subscribe={"channel": f"f{number}", "tf": tf}))
        if last != "ok":
            break
    return ["all were taken" if last == "ok" else last]


@hostile("memory/200 filters of 1 MB come and go", ISSUE, "given back", fresh=True, attackers=200,
         peak_mib=384.0, left_mib=48.0, seconds=30.0)  # fmt: skip
async def _come_and_go(field: Field) -> Sequence[str]:
    left: list[float] = []
    tf = {"key": "a", "cmp": "neq", "val": MEGABYTE}
    for _ in range(3):
        peers = [await field.open_client(receive_buffer=4096) for _ in range(200)]
        for peer in peers:
            await peer.say({"id": 7, "subscribe": {"channel": "come", "tf": tf}})
        api = await field.keep_api()
        for _ in range(200):
            await api.call("publish", channel="come", data="x" * 1000, skip_history=True)
        await field.close()
        await trio.sleep(1)
        left.append(field.sample().rss / MIB)
    return unless(
        left[2] - left[0] > 32 and f"+{left[2] - left[0]:.0f} MiB in two rounds", "given back"
    )


@hostile("memory/subscription data of 1 MB, 600 times", ISSUE, *SERVED, "error 106", fresh=True,
         peak_mib=48.0, setup=HISTORY, seconds=20.0)  # fmt: skip
async def _large_data(field: Field) -> Sequence[str]:
    peer = await field.open_client()
    for number in range(600):
        fate = said(await peer.call(subscribe={"channel": f"d{number}", "data": MEGABYTE}))
        if fate != "ok":
            return [fate]
    return ["served"]


@hostile("memory/500 wills of 1 MB", ISSUE, "served", "error 106", fresh=True, attackers=500,
         setup=HISTORY, peak_mib=BUDGET_MIB, left_mib=128.0, seconds=30.0)  # fmt: skip
async def _wills(field: Field) -> Sequence[str]:
    fates = []
    for number in range(500):
        peer = await field.open_client()
        fates.append(said(await peer.rpc("will", topic=f"will{number % 5}", data=MEGABYTE)))
    return ["served" if each == "ok" else each for each in fates]


@hostile("memory/1,000 idle, 676 empty headers each", ISSUE, "bounded", fresh=True, attackers=1000,
         peak_mib=96.0, left_mib=48.0, seconds=30.0)  # fmt: skip
async def _headers(field: Field) -> Sequence[str]:
    fields: dict[str, str | None] = {f"a{n:x}": "" for n in range(676)}
    before = field.sample().rss
    for _ in range(1000):
        await field.open_ws(fields=fields)
    each = (field.sample().rss - before) / 1000 / 1024
    return unless(each > 32 and f"{each:.0f} KiB each", "bounded")


@hostile("memory/1 MiB of {} lines, 20 clients", ISSUE, "served", "close 3501", "close 1008",
         fresh=True, attackers=20, peak_mib=128.0, seconds=30.0)  # fmt: skip
async def _lines(field: Field) -> Sequence[str]:
    peers = await field.open_clients(20)
    data = frame(TEXT, b"\n".join([b"{}"] * 349_000))
    fates: list[str] = []

    async def flood(peer: Peer) -> None:
        try:
            await peer.send(data)
            await peer.call(presence_stats={"channel": "a"})
        except Ended as ended:
            fates.append(ended.how)
        else:
            fates.append("served")

    async with trio.open_nursery() as nursery:
        for peer in peers:
            nursery.start_soon(flood, peer)
    return fates


@hostile("memory/1 MiB of commands, 5 clients", ISSUE, "served", "close 3501", "close 1008",
         fresh=True, attackers=5, peak_mib=128.0, seconds=30.0)  # fmt: skip
async def _commands(field: Field) -> Sequence[str]:
    fates = []
    data = frame(TEXT, b"\n".join(b'{"id":%d,"rpc":{"method":"x"}}' % n for n in range(2, 32_000)))
    for peer in await field.open_clients(5):
        try:
            await peer.send(data)
            field.nursery.start_soon(drained, peer)
            fates.append("served")
        except Ended as ended:
            fates.append(ended.how)
    await trio.sleep(4)
    return fates


@hostile("memory/half a message of 1 MB, 200 peers", ISSUE, "held", fresh=True, attackers=200,
         setup=HISTORY, peak_mib=256.0, left_mib=48.0, seconds=20.0)  # fmt: skip
async def _halves(field: Field) -> Sequence[str]:
    half = frame(TEXT, b"x" * 10**6)[:-1000]
    for _ in range(200):
        peer = await field.open_ws()
        try:
            await peer.send(half)
        except Ended:
            pass  # the budget's business
    return ["held"]


@hostile("memory/half a message of 1 MB, 1,000 peers", ISSUE, "held", fresh=True, attackers=1000,
         setup=HISTORY, peak_mib=288.0, left_mib=48.0, seconds=30.0)  # fmt: skip
async def _many_halves(field: Field) -> Sequence[str]:
    half = frame(TEXT, b"x" * 10**6)[:-1000]
    for _ in range(1000):
        peer = await field.open_ws()
        try:
            await peer.send(half)
        except Ended:
            pass  # it had to give way
    return ["held"]


@hostile("memory/half a body of 1 MB, 1,000 peers", ISSUE, "held", fresh=True, attackers=1000,
         setup=HISTORY, peak_mib=288.0, left_mib=48.0, seconds=30.0)  # fmt: skip
async def _many_bodies(field: Field) -> Sequence[str]:
    whole = request("POST /connection/http_stream", (), b"x" * 10**6)
    for _ in range(1000):
        peer = await field.connect()
        try:
            await peer.send(whole[:-1000])
        except Ended:
            pass
    return ["held"]


@hostile("memory/100 messages of 1 MB behind a session", ISSUE, "204", "503", "RST", "EOF",
         fresh=True, attackers=100, setup=HISTORY, peak_mib=192.0, seconds=30.0)  # fmt: skip
async def _emulations(field: Field) -> Sequence[str]:
    """The session gets an answer that it does not take, so it takes no more commands."""
    body = {"id": 1, "connect": {}}
    stream = await field.open_stream("/connection/http_stream", body, receive_buffer=4096)
    session = msgspec.json.decode(await stream.until(b"\n"))["connect"]["session"]
    fates: list[str] = []

    async def emulate(data: bytes) -> None:
        sent = msgspec.json.encode({"session": session, "data": data.decode()})
        try:
            fates.append(str((await field.ask(request("POST /emulation", (), sent))).status))
        except Ended as ended:
            fates.append(ended.how)

    await fill_history(field, "big", 5)
    await emulate(b'{"id":2,"history":{"channel":"big","limit":-1}}')
    with trio.move_on_after(5):
        async with trio.open_nursery() as nursery:
            for _ in range(100):
                nursery.start_soon(emulate, LARGE_PUBLISH)
    return fates


@hostile("memory/100 one-way recoveries of 4 MB, unread", ISSUE, "held", fresh=True, attackers=100,
         setup=HISTORY, peak_mib=HOLES_MIB, left_mib=96.0, seconds=30.0)  # fmt: skip
async def _one_way_recoveries(field: Field) -> Sequence[str]:
    await fill_history(field, "big", 4)
    client = await field.open_client()
    epoch = result(await client.call(history={"channel": "big"}))["epoch"]
    subs = {"big": {"recover": True, "epoch": epoch, "offset": 0}}
    for _ in range(100):
        try:
            await field.open_stream("/connection/uni_sse", {"subs": subs}, receive_buffer=4096)
        except Ended:
            pass
    await trio.sleep(3)
    return ["held"]


@hostile(
    "memory/100 answers of 1 MB, unread", ISSUE, "bounded", fresh=True, peak_mib=48.0, seconds=20.0
)
async def _answers(field: Field) -> Sequence[str]:
    asker = await field.open_client(receive_buffer=4096)
    answerer = await field.open_client()
    await asker.say(*(request_of(answerer, n, seconds=30) for n in range(2, 102)))
    answered = 0
    with trio.move_on_after(15):
        while answered < 100:
            for publication in await answerer.publications():
                reply_to = publication["tags"]["reply_to"]
                await answerer.rpc("reply", reply_to=reply_to, data=MEGABYTE)
                answered += 1
    return ["bounded"]


@hostile("memory/101 requests open", "protocol", "error 106", quick=True)
async def _open_requests(field: Field) -> Sequence[str]:
    asker, other = await field.open_clients(2)
    await asker.say(*(request_of(other, n, seconds=30) for n in range(2, 103)))
    return [said(await asker.reply(102))]


@hostile("memory/2,000 topics of 100 publications", ISSUE, "served", fresh=True, setup=HISTORY,
         peak_mib=160.0, left_mib=128.0, seconds=20.0)  # fmt: skip
async def _topics(field: Field) -> Sequence[str]:
    peer = await field.open_client()
    for start in range(0, 2000, 10):
        await peer.say(
            *(
                {"publish": {"channel": f"topic{n}", "data": "x" * 300}}
                for n in range(start, start + 10)
                for _ in range(100)
            )
        )
    await peer.call(presence_stats={"channel": "a"})
    return ["served"]


@hostile(
    "memory/100,000 keys", ISSUE, "served", fresh=True, peak_mib=96.0, left_mib=64.0, seconds=30.0
)
async def _keys(field: Field) -> Sequence[str]:
    peer = await field.open_client()
    for start in range(0, 100_000, 500):
        calls = (
            {"method": "publish", "data": {"topic": "k", "data": 1, "key": f"{n}" + "k" * 200}}
            for n in range(start, start + 500)
        )
        await peer.say(*({"id": start + n + 2, "rpc": each} for n, each in enumerate(calls)))
        left = 500
        while left:
            left -= sum("id" in line for line in await peer.lines())
    return ["served"]


# histories


@hostile("history/57 MB, small receive buffer", ISSUE, *SERVED, fresh=True, setup=HISTORY,
         peak_mib=240.0, left_mib=160.0, p50_ms=10.0, seconds=20.0)  # fmt: skip
async def _history(field: Field) -> Sequence[str]:
    await fill_history(field, "big")
    peer = await field.open_client(receive_buffer=4096)
    await peer.say({"id": 8, "history": {"channel": "big", "limit": -1}})
    await peer.say({"id": 9, "presence_stats": {"channel": "a"}})
    with trio.move_on_after(8):
        await drained(peer, 10e6)
    return ["served"]


@hostile("history/28 MB in one reply, one message behind", ISSUE, "linear", fresh=True, seconds=20.0,
         setup=Setup(env={**BUDGET, "BROKER_HISTORY_REPLY_BYTES": str(28 * MIB)}),
         peak_mib=240.0, left_mib=160.0, p50_ms=10.0)  # fmt: skip
async def _history_in_one(field: Field) -> Sequence[str]:
    await fill_history(field, "big")
    peer = await field.open_client(receive_buffer=4096)
    before = field.sample().cpu
    await peer.say({"id": 8, "history": {"channel": "big", "limit": -1}})
    await peer.say({"id": 9, "presence_stats": {"channel": "a"}})
    with trio.move_on_after(10):
        await drained(peer, 10e6)
    spent = field.sample().cpu - before
    return unless(spent > 2 and f"{spent:.1f} s of CPU", "linear")


@hostile("history/57 MB, 8 such readers", ISSUE, *SERVED, fresh=True, setup=HISTORY, attackers=8,
         peak_mib=300.0, left_mib=200.0, seconds=20.0)  # fmt: skip
async def _histories(field: Field) -> Sequence[str]:
    await fill_history(field, "big")
    for _ in range(8):
        peer = await field.open_client(receive_buffer=4096)
        await peer.say({"id": 8, "history": {"channel": "big", "limit": -1}})
        await peer.say({"id": 9, "presence_stats": {"channel": "a"}})
        field.nursery.start_soon(drained, peer, 2e6)
    await trio.sleep(6)
    return ["served"]


@hostile("history/57 MB by http_stream at full speed", ISSUE, "at once", fresh=True, setup=HISTORY,
         peak_mib=300.0, left_mib=200.0, seconds=30.0)  # fmt: skip
async def _history_stream(field: Field) -> Sequence[str]:
    await fill_history(field, "big")
    peer = await field.connect()
    body = b'{"id":1,"connect":{}}\n{"id":2,"history":{"channel":"big","limit":-1}}'
    await peer.send(request("POST /connection/http_stream", (), body))
    await peer.head()
    began = trio.current_time()
    await peer.until(b'"id":2')
    await peer.until(b"\n")
    took = trio.current_time() - began
    return unless(took > 3 and f"after {took:.1f} s", "at once")


@hostile("history/16 slow readers of 57 MB", ISSUE, *SERVED, fresh=True, setup=HISTORY, attackers=16,
         peak_mib=256.0, left_mib=160.0, seconds=20.0)  # fmt: skip
async def _slow_histories(field: Field) -> Sequence[str]:
    await fill_history(field, "big")
    for _ in range(16):
        peer = await field.open_client(receive_buffer=4096)
        await peer.say({"id": 8, "history": {"channel": "big", "limit": -1}})
        field.nursery.start_soon(drained, peer, 100e3)
    await trio.sleep(4)
    return ["served"]


@hostile("history/3 readers at 5 MB/s of a busy topic", ISSUE, "cheap", fresh=True, setup=HISTORY,
         attackers=3, peak_mib=300.0, left_mib=200.0, seconds=20.0)  # fmt: skip
async def _busy_history(field: Field) -> Sequence[str]:
    await fill_history(field, "big")
    for _ in range(3):
        peer = await field.open_client(receive_buffer=65536)
        await peer.call(subscribe={"channel": "busy"})
        await peer.say({"id": 8, "history": {"channel": "big", "limit": -1}})
        field.nursery.start_soon(drained, peer, 5e6)
    publisher = await field.open_client()
    before = field.sample().cpu
    for _ in range(250):
        await publisher.say({"publish": {"channel": "busy", "data": 1}})
        await trio.sleep(0.02)
    spent = field.sample().cpu - before
    return unless(spent > 2 and f"{spent:.1f} s of CPU in 5 s", "cheap")


@hostile("history/300 recoveries of 100 publications", ISSUE, "served", fresh=True, setup=HISTORY, attackers=1,
         seconds=20.0)  # fmt: skip
async def _recoveries(field: Field) -> Sequence[str]:
    publisher = await field.open_client()
    await publisher.say(*({"publish": {"channel": "r", "data": "x" * 1000}} for _ in range(100)))
    epoch = result(await publisher.call(history={"channel": "r"}))["epoch"]
    peer = await field.open_client()
    asked = {"channel": "r", "recover": True, "epoch": epoch, "offset": 0}
    for _ in range(300):
        result(await peer.call(subscribe=asked))
        await peer.call(unsubscribe={"channel": "r"})
    return ["served"]


# retained values


async def _greeted(field: Field, count: int, size: int) -> list[str]:
    """Whether a reader that reads gets all retained values."""
    await retain(field, count, size)
    peer = await field.open_client()
    heard = 0
    try:
        await peer.say({"id": 7, "subscribe": {"channel": "r.>"}})
        with trio.move_on_after(10):
            while heard < count:
                heard += sum("push" in line for line in await peer.lines())
    except Ended as ended:
        return [f"{ended.how} after {heard}"]
    return unless(heard < count and f"{heard} of {count}", "all")


@hostile("retained/13,000 to a fast reader", ISSUE, "all", fresh=True, seconds=20.0)
async def _retained_small(field: Field) -> Sequence[str]:
    return await _greeted(field, 13_000, 100)


@hostile("retained/1,800 of 4 KB to a fast reader", ISSUE, "all", fresh=True, seconds=20.0)
async def _retained_large(field: Field) -> Sequence[str]:
    return await _greeted(field, 1_800, 3900)


# floods


async def flooders(
    field: Field, count: int, data: bytes, *, seconds: float = 2.5, reads: bool = True
) -> None:
    """As many clients that send the same again and again, and come back when they are sent away."""

    async def flood() -> None:
        while True:
            try:
                peer = await field.open_client()
                if reads:
                    field.nursery.start_soon(drained, peer)
                while True:
                    await peer.send(data)
            except Ended:
                await trio.sleep(0.02)

    with trio.move_on_after(seconds):
        async with trio.open_nursery() as nursery:
            for _ in range(count):
                nursery.start_soon(flood)


@hostile("flood/16 clients ask for presence", ISSUE, "served", attackers=16, p50_ms=20.0)
async def _presence(field: Field) -> Sequence[str]:
    for peer in await field.open_clients(100):
        await peer.call(subscribe={"channel": "crowd"})
    asked = text(*({"id": n, "presence": {"channel": "crowd"}} for n in range(2, 200)))
    await flooders(field, 16, asked)
    return ["served"]


@hostile(
    "flood/16 clients show tokens of a slow curve", ISSUE, "served", attackers=16, setup=SLOW_CURVE
)
async def _tokens(field: Field) -> Sequence[str]:
    """To refuse a signature by P-384 takes as long as a hundred other commands."""
    return await _show_tokens(field, b'{"alg":"ES384"}')


@hostile(
    "flood/16 x tokens of a slow curve, headers no JSON",
    "RFC 7515 4",
    "served",
    attackers=16,
    setup=SLOW_CURVE,
)
async def _odd_tokens(field: Field) -> Sequence[str]:
    """Python takes it for JSON."""
    return await _show_tokens(field, b'{"alg":"ES384","x":NaN}')


async def _show_tokens(field: Field, header: bytes) -> Sequence[str]:
    head, claims = (urlsafe_b64encode(each).decode() for each in (header, b'{"sub":"eve"}'))
    shown = f"{head.rstrip('=')}.{claims.rstrip('=')}.{urlsafe_b64encode(b's' * 96).decode()}"
    data = text(*({"id": n, "subscribe": {"channel": "t", "token": shown}} for n in range(2, 200)))
    await flooders(field, 16, data)
    return ["served"]


@hostile("flood/16 clients send empty fragments", ISSUE, "served", attackers=16, p50_ms=20.0)
async def _fragments(field: Field) -> Sequence[str]:
    data = frame(TEXT, fin=False) + frame(CONTINUATION, fin=False) * 10_000
    await flooders(field, 16, data)
    return ["served"]


@hostile("flood/50 x 16 KB of filter nodes and a null", ISSUE, "served", attackers=50, fresh=True,
         seconds=30.0, peak_mib=128.0, left_mib=64.0)  # fmt: skip
async def _nodes_and_a_null(field: Field) -> Sequence[str]:
    """A strict decoder refuses the null, so all is read member by member."""
    tf = b'{"op":"or","nodes":[%b]}' % b",".join([b"{}"] * 5300)
    command = b'{"id":9,"subscribe":{"channel":"a","epoch":null,"tf":%b}}' % tf
    peers = await field.open_clients(50)
    for _ in range(3):
        for peer in peers:
            await peer.send(frame(TEXT, command))
        for peer in peers:
            await peer.call(presence_stats={"channel": "a"})
    return ["served"]


@hostile("flood/50 x 16 KB of protobuf fields", ISSUE, "served", attackers=50, fresh=True,
         seconds=30.0, peak_mib=128.0, left_mib=64.0)  # fmt: skip
async def _protobuf_fields(field: Field) -> Sequence[str]:
    """A subscribe command of 8,000 empty data, the last of which counts; length, id, field 5, its field 7."""
    command = b"\x85\x7d\x08\x09\x2a\x80\x7d" + b"\x3a\x00" * 8000
    offered = {"Sec-WebSocket-Protocol": "centrifuge-protobuf"}
    peers = [await field.open_ws(fields=offered) for _ in range(50)]
    for peer in peers:
        await peer.send(frame(BINARY, b"\x04\x08\x01\x22\x00"))
        await peer.message()
    for _ in range(5):
        for peer in peers:
            await peer.send(frame(BINARY, command))
        for peer in peers:
            await peer.message()
    return ["served"]


@hostile("flood/5 x 1 MB of halves of pairs", ISSUE, "close 3501", attackers=5, fresh=True,
         seconds=20.0)  # fmt: skip
async def _surrogates(field: Field) -> Sequence[str]:
    command = b'{"id":9,"subscribe":{"channel":"%b"}}' % (b"\\ud800" * 170_000)
    peers = await field.open_clients(5)
    for peer in peers:
        await peer.send(frame(TEXT, command))
    return [await peer.ending(5) for peer in peers]


@hostile("flood/5 x 1 MB of headers", ISSUE, "served", attackers=5, fresh=True, seconds=20.0)
async def _many_headers(field: Field) -> Sequence[str]:
    headers = b",".join(b'"%x":""' % number for number in range(80_000))
    command = b'{"id":9,"connect":{"headers":{%b,"x":null}}}' % headers
    peers = await field.open_clients(5)
    for peer in peers:
        await peer.send(frame(TEXT, command))
    for peer in peers:
        await peer.message()
    return ["served"]


@hostile("flood/publishes kept apart by pings, to 400", ISSUE, *SERVED, fresh=True, seconds=20.0,
         peak_mib=96.0, left_mib=48.0)  # fmt: skip
async def _apart(field: Field) -> Sequence[str]:
    """Each is a write to every listener's socket."""
    for listener in await field.open_clients(400):
        await listener.call(subscribe={"channel": "apart"})
        field.nursery.start_soon(drained, listener)
    peer = await field.open_client()
    await peer.send(
        b"".join(
            text({"publish": {"channel": "apart", "data": number}}) + frame(PING, b"")
            for number in range(95)
        )
    )
    await peer.call(presence_stats={"channel": "apart"})
    return ["served"]


@hostile("flood/16 clients publish as fast as they can", ISSUE, "served", attackers=16)
async def _publishes(field: Field) -> Sequence[str]:
    data = text({"publish": {"channel": "flood", "data": "x" * 60}}) * 600
    await flooders(field, 16, data)
    return ["served"]


@hostile("flood/16 clients publish with an id", ISSUE, "served", attackers=16)
async def _publishes_answered(field: Field) -> Sequence[str]:
    data = text({"id": 9, "publish": {"channel": "flood", "data": 1}}) * 1000
    await flooders(field, 16, data)
    return ["served"]


@hostile("flood/16 clients ask and do not read", ISSUE, "served", attackers=16, peak_mib=128.0)
async def _unread(field: Field) -> Sequence[str]:
    data = text({"id": 9, "rpc": {"method": "frobnicate"}}) * 1000
    await flooders(field, 16, data, reads=False)
    return ["served"]


@hostile("flood/16 clients come and go on a topic", ISSUE, "served", attackers=16)
async def _churn(field: Field) -> Sequence[str]:
    watcher = await field.open_client()
    await watcher.call(subscribe={"channel": "door", "join_leave": True})
    field.nursery.start_soon(drained, watcher)
    data = text(
        {"id": 8, "subscribe": {"channel": "door", "join_leave": True}},
        {"id": 9, "unsubscribe": {"channel": "door"}},
    )
    await flooders(field, 16, data * 100)
    return ["served"]


@hostile("flood/50 x the last byte of 1 MB at once", ISSUE, "served", attackers=50, fresh=True,
         seconds=30.0, peak_mib=192.0, left_mib=96.0)  # fmt: skip
async def last_bytes(field: Field) -> Sequence[str]:
    """50 messages of the largest size are there, but for a byte that all send at the same moment."""
    peers = await field.open_clients(50)
    message = frame(TEXT, LARGE_PUBLISH)
    for _ in range(5):
        for peer in peers:
            await peer.send(message[:-1])
        await trio.sleep(0.3)
        for peer in peers:
            await peer.send(message[-1:])
    for peer in peers:
        await peer.call(rpc={"method": "frobnicate"})
    return ["served"]


@hostile("flood/50 x uni_sse with 900 topics at once", ISSUE, "200", attackers=50, seconds=30.0,
         peak_mib=96.0, left_mib=48.0)  # fmt: skip
async def _one_way_lists(field: Field) -> Sequence[str]:
    """Lists of 9 KB, that all end at the same moment: each topic is read, and subscribed to."""
    asked = request("POST /connection/uni_sse", [("Content-Type", "application/json")],
                    msgspec.json.encode({"subs": {f"t{n}": {} for n in range(900)}}))  # fmt: skip
    peers = [await field.connect() for _ in range(50)]
    for peer in peers:
        await peer.send(asked[:-1])
    await trio.sleep(0.3)
    for peer in peers:
        await peer.send(asked[-1:])
    return sorted({str((await peer.head()).status) for peer in peers})


@hostile("flood/16 peers that were sent away", ISSUE, "served", attackers=16)
async def _sent_away(field: Field) -> Sequence[str]:
    await flooders(field, 16, frame(3) + frame(TEXT, b"x" * 100) * 5000, reads=False)
    return ["served"]


@hostile("flood/50 clients publish to their own fds", ISSUE, "served", attackers=50, seconds=30.0)
async def _direct(field: Field) -> Sequence[str]:
    peers = await field.open_clients(50)
    with trio.move_on_after(2.5):
        async with trio.open_nursery() as nursery:
            for peer, other in zip(peers, peers[1:] + peers[:1], strict=True):
                data = text({"publish": {"channel": f"fd:{other.fd}", "data": "x" * 60}}) * 100
                nursery.start_soon(repeat, peer, data)
                nursery.start_soon(drained, peer)
    return ["served"]


async def repeat(peer: Peer, data: bytes) -> None:
    try:
        while True:
            await peer.send(data)
    except Ended:
        pass


@hostile("flood/1,000 connect at once", ISSUE, "served", attackers=1000, peak_mib=96.0, left_mib=48.0,
         seconds=20.0)  # fmt: skip
async def _storm(field: Field) -> Sequence[str]:
    fates: list[str] = []

    async def come() -> None:
        try:
            await field.open_client()
        except Ended as ended:
            fates.append(ended.how)
        else:
            fates.append("served")

    async with trio.open_nursery() as nursery:
        for _ in range(1000):
            nursery.start_soon(come)
    return fates


@hostile("flood/500 handshakes a second, then RST", ISSUE, "gone", attackers=50, seconds=30.0)
async def _resets(field: Field) -> Sequence[str]:
    for _ in range(1000):
        peer = await field.connect()
        field.peers.clear()
        await peer.send(handshake() + text({"id": 1, "connect": {}}))
        await trio.sleep(0.002)
        peer.reset()
    return ["gone"]


@hostile("flood/two messages of 1 MB to who reads", ISSUE, "delivered", times=3)
async def _two_large(field: Field) -> Sequence[str]:
    reader, publisher = await field.open_clients(2)
    topic = f"large-{reader.fd}"
    await reader.call(subscribe={"channel": topic})
    for _ in range(2):
        await publisher.say({"publish": {"channel": topic, "data": MEGABYTE}})
    heard = 0
    while heard < 2:
        heard += len(await reader.publications())
    return ["delivered"]


@hostile("flood/60 KB direct messages to a slow reader", ISSUE, "stays", seconds=30.0)
async def _victim(field: Field) -> Sequence[str]:
    victim = await field.open_client(receive_buffer=65536)
    flooder = await field.open_client()
    data = text({"publish": {"channel": f"fd:{victim.fd}", "data": "x" * 60_000}})
    field.nursery.start_soon(repeat, flooder, data)
    with trio.move_on_after(4):
        try:
            await victim.follow(2e6)
        except Ended as ended:
            return [f"the victim: {ended.how}"]
    return ["stays"]


# backends: they are trusted, and may be many


@hostile("backend/a batch of 10,000 publishes", ISSUE, "ok", seconds=30.0)
async def _batch(field: Field) -> Sequence[str]:
    commands = [{"publish": {"channel": "b", "data": 1}}] * 10_000
    answer = await field.api("batch", commands=commands)
    return unless(len(answer["replies"]) != 10_000 and "not all")


@hostile("backend/a broadcast to 20,000 topics", ISSUE, "ok", left_mib=64.0, seconds=30.0)
async def _broadcast(field: Field) -> Sequence[str]:
    answer = await field.api("broadcast", channels=[f"b{n}" for n in range(20_000)], data=1)
    return [said(answer)]


@hostile(
    "backend/channels by a glob for backtracking",
    ISSUE,
    "ok",
    "error 107",
    seconds=30.0,
    fresh=True,
)
async def _glob(field: Field) -> Sequence[str]:
    peer = await field.open_client()
    await subscribe_all(peer, [{"channel": "a" * 200 + f"{n}"} for n in range(900)])
    return [said(await field.api("channels", pattern="*a" * 20 + "b"))]


@hostile("backend/presence of 1,000 clients, 100 times", ISSUE, "ok", attackers=1000, peak_mib=96.0,
         left_mib=48.0, seconds=30.0)  # fmt: skip
async def _presences(field: Field) -> Sequence[str]:
    for peer in await field.open_clients(1000):
        await peer.call(subscribe={"channel": "crowd"})
    api = await field.keep_api()
    return sorted({said(await api.call("presence", channel="crowd")) for _ in range(100)})


@hostile("backend/a broadcast to 100,000 topics", ISSUE, "ok", fresh=True, peak_mib=160.0, left_mib=128.0,
         seconds=60.0)  # fmt: skip
async def _broad(field: Field) -> Sequence[str]:
    return [said(await field.api("broadcast", channels=[f"b{n}" for n in range(99_000)], data=1))]


@hostile("backend/a batch of 10 histories of 57 MB", ISSUE, "ok", fresh=True, setup=HISTORY,
         peak_mib=128.0, left_mib=96.0, seconds=30.0)  # fmt: skip
async def _many_histories(field: Field) -> Sequence[str]:
    await fill_history(field, "big")
    commands = [{"history": {"channel": "big", "limit": -1}}] * 10
    answer = await field.api("batch", commands=commands)
    asked = [said(each) for each in answer["replies"]]
    return unless(len(asked) != 10 and "not all")


@hostile("backend/1 MiB of {} in a batch", ISSUE, "error 106", fresh=True, peak_mib=192.0, left_mib=96.0,
         seconds=30.0)  # fmt: skip
async def _nothings(field: Field) -> Sequence[str]:
    return [said(await field.api("batch", commands=[{}] * 349_000))]


PATIENT: Final = Setup(options=("--ping-seconds", "600"))
"""For crowds that are made ready for longer than a client may be silent."""


@hostile("backend/a list of 100,000 channels", ISSUE, "ok", attackers=100, fresh=True, setup=PATIENT,
         peak_mib=256.0, left_mib=192.0, seconds=60.0)  # fmt: skip
async def _channels(field: Field) -> Sequence[str]:
    for number, peer in enumerate(await field.open_clients(100)):
        await subscribe_all(peer, [{"channel": f"chat:{number}-{n}"} for n in range(1000)])
        field.nursery.start_soon(drained, peer)
    fates = [
        said(await field.api("channels", pattern=glob)) for glob in ("*", "{a,b,c,d}*{e,f,g}*")
    ]
    return sorted(set(fates))


@hostile("backend/connections with 100,000 topics", ISSUE, "ok", attackers=100, fresh=True, setup=PATIENT,
         peak_mib=256.0, left_mib=192.0, seconds=60.0)  # fmt: skip
async def _connections(field: Field) -> Sequence[str]:
    for number, peer in enumerate(await field.open_clients(100)):
        names = [{"channel": f"chat:{number}-{n}-" + "x" * 200} for n in range(1000)]
        await subscribe_all(peer, names)
        field.nursery.start_soon(drained, peer)
    return [said(await field.api("connections", limit=10_000))]


ALICE: Final = Setup(
    app="tests.hostile.apps:authorizing",
    connect={"token": "b0b"},
    options=("--ping-seconds", "600"),
)


@hostile("backend/1,000 of one user subscribe and watch", ISSUE, "ok", attackers=1000, setup=ALICE,
         fresh=True, peak_mib=96.0, left_mib=64.0, seconds=90.0)  # fmt: skip
async def _subscribe_user(field: Field) -> Sequence[str]:
    for _ in range(1000):
        peer = await field.open_client(token="s3cret")
        await peer.call(subscribe={"channel": "door", "join_leave": True})
        field.nursery.start_soon(drained, peer)
    await trio.sleep(1)
    return [
        said(await field.api("unsubscribe", user="alice", channel="door")),
        said(await field.api("subscribe", user="alice", channel="hall")),
    ]


@hostile("backend/1,000 of one user are sent away", ISSUE, "ok", attackers=1000, setup=ALICE,
         fresh=True, peak_mib=96.0, left_mib=64.0, seconds=90.0)  # fmt: skip
async def _disconnect_user(field: Field) -> Sequence[str]:
    for number in range(1000):
        peer = await field.open_client(token="s3cret")
        await peer.say(
            *({"id": n + 2, "subscribe": {"channel": f"{number}.{n}"}} for n in range(10))
        )
        field.nursery.start_soon(drained, peer)
    await trio.sleep(1)
    return [said(await field.api("disconnect", user="alice"))]


@hostile("backend/50 callers publish to 1,000 listeners", ISSUE, "ok", attackers=1000, fresh=True,
         setup=PATIENT, peak_mib=96.0, left_mib=64.0, seconds=60.0)  # fmt: skip
async def _callers(field: Field) -> Sequence[str]:
    for peer in await field.open_clients(1000):
        await peer.call(subscribe={"channel": "crowd"})
        field.nursery.start_soon(drained, peer)
    fates: Counter[str] = Counter()

    async def publish() -> None:
        api = await field.keep_api()
        for _ in range(20):
            fates[said(await api.call("publish", channel="crowd", data=1))] += 1

    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(publish)
    return sorted(fates)


@hostile("flood/50 clients rpc-publish to 1,000 listeners", ISSUE, "ok", attackers=1000, fresh=True,
         setup=PATIENT, peak_mib=96.0, left_mib=64.0, seconds=60.0)  # fmt: skip
async def _rpc_publishes(field: Field) -> Sequence[str]:
    for peer in await field.open_clients(1000):
        await peer.call(subscribe={"channel": "crowd"})
        field.nursery.start_soon(drained, peer)
    fates: Counter[str] = Counter()

    async def publish(peer: Peer) -> None:
        for _ in range(20):
            fates[said(await peer.rpc("publish", topic="crowd", data=1))] += 1

    async with trio.open_nursery() as nursery:
        for peer in await field.open_clients(50):
            nursery.start_soon(publish, peer)
    return sorted(fates)
