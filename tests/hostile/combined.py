"""Inputs that combine what is bounded by itself: who watches × who comes and goes, who asks × who is asked,
values × patterns × filters, connections × what each of them waits for."""

import itertools
from collections.abc import Callable, Sequence
from typing import Final

import trio

from tests.hostile.field import Field, hostile, unless
from tests.hostile.floods import (
    PATIENT,
    TARGET,
    drained,
    filter_of,
    flooders,
    matching,
    repeat,
    request_of,
    retain,
    subscribe_all,
)
from tests.hostile.messages import TOKENS, token
from tests.hostile.wire import Ended, Json, Peer, frame, result, said, text

ISSUE: Final = "issue 9"


def come_and_go(subscription: Json) -> bytes:
    """Frames that subscribe, and unsubscribe again."""
    left = {"channel": subscription["channel"]}
    return text({"id": 8, "subscribe": subscription}, {"id": 9, "unsubscribe": left})


async def asked_by_all(
    field: Field, responder: Peer, count: int, seconds: float = 60
) -> list[Peer]:
    """As many clients, each with a hundred open requests to one other."""
    askers = await field.open_clients(count)
    for asker in askers:
        await asker.say(*(request_of(responder, n, seconds=seconds) for n in range(2, 102)))
    for asker in askers:
        await asker.call(presence_stats={"channel": "a"})
    return askers


@hostile("combined/50 x 100 requests, who is asked goes", ISSUE, "ok", attackers=50, fresh=True,
         setup=PATIENT, seconds=90.0, peak_mib=256.0, left_mib=128.0)  # fmt: skip
async def _responder_goes(field: Field) -> Sequence[str]:
    responder = await field.open_client()
    field.nursery.start_soon(drained, responder)
    askers = await asked_by_all(field, responder, 50)
    responder.reset()
    replies = [await peer.reply() for peer in askers]
    return sorted({said(each) for each in replies} - {"error 503"}) or ["ok"]


@hostile("combined/50 x 100 requests, time is up at once", ISSUE, "error 504", attackers=50,
         fresh=True, setup=PATIENT, seconds=90.0, peak_mib=256.0, left_mib=128.0)  # fmt: skip
async def _requests_expire(field: Field) -> Sequence[str]:
    responder = await field.open_client()
    field.nursery.start_soon(drained, responder)
    askers = await asked_by_all(field, responder, 50, 3)
    replies = [await peer.reply() for peer in askers]
    return sorted({said(each) for each in replies})


@hostile("combined/who is asked 5,000 times asks", ISSUE, "served", attackers=50, fresh=True,
         setup=PATIENT, seconds=90.0, peak_mib=256.0, left_mib=128.0)  # fmt: skip
async def _much_asked(field: Field) -> Sequence[str]:
    responder, other = await field.open_clients(2)
    field.nursery.start_soon(drained, responder)
    field.nursery.start_soon(drained, other)
    await asked_by_all(field, responder, 50)
    data = text(request_of(other, 5, seconds=60))
    with trio.move_on_after(3):
        await repeat(responder, data * 50)
    return ["served"]


@hostile("combined/50 come and go before 1,000 watchers", ISSUE, "served", attackers=1000,
         fresh=True, setup=PATIENT, seconds=60.0, peak_mib=128.0, left_mib=96.0)  # fmt: skip
async def _watched(field: Field) -> Sequence[str]:
    for _ in range(1000):
        watcher = await field.open_client()
        await watcher.call(subscribe={"channel": "door", "join_leave": True})
        field.nursery.start_soon(drained, watcher)
    await flooders(field, 50, come_and_go({"channel": "door"}) * 20)
    return ["served"]


@hostile("combined/50 subscribe to 128 retained values", ISSUE, "served", attackers=50, fresh=True,
         setup=PATIENT, seconds=60.0, peak_mib=128.0, left_mib=96.0)  # fmt: skip
async def _retained_churn(field: Field) -> Sequence[str]:
    await retain(field, 5000, 10)
    tf = {"key": "a", "cmp": "eq", "val": "b"}
    await flooders(field, 50, come_and_go({"channel": "r.>", "tf": tf}) * 20)
    return ["served"]


@hostile("combined/one churns over 10,000 retained values", ISSUE, "served", fresh=True,
         setup=PATIENT, seconds=60.0, peak_mib=128.0, left_mib=96.0)  # fmt: skip
async def _retained_and_leavers(field: Field) -> Sequence[str]:
    """Somebody else comes and goes meanwhile, who is not to wait for a thousand turns of this one."""
    await retain(field, 10_000, 10)
    peer = await field.open_client()
    tf = {"key": "a", "cmp": "eq", "val": "b"}
    names = ["r", "a", "b", "c", "d"]
    patterns = [
        ".".join("*" if bits >> at & 1 else name for at, name in enumerate(names)) + ".>"
        for bits in range(32)
    ]
    field.nursery.start_soon(drained, peer)
    data = b"".join(come_and_go({"channel": each, "tf": tf}) for each in patterns)
    slowest = 0.0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(repeat, peer, data)
        for _ in range(20):
            began = trio.current_time()
            other = await field.open_client()
            await other.say({"id": 2, "publish": {"channel": "z", "data": 1}})
            await other.reply(2)
            await other.send(frame(8, b"\x03\xe8"))
            await other.ending()
            slowest = max(slowest, trio.current_time() - began)
            await trio.sleep(0.05)
        nursery.cancel_scope.cancel()
    return unless(slowest > 1 and f"another came and went in {slowest:.1f} s", "served")


@hostile("combined/50 clients, patterns come and go", ISSUE, "served", attackers=50, fresh=True,
         setup=PATIENT, seconds=60.0, peak_mib=128.0, left_mib=96.0)  # fmt: skip
async def _pattern_churn(field: Field) -> Sequence[str]:
    return await _churn(
        field, lambda number: [{"channel": f"*.{n}.x{number}.>"} for n in range(10)]
    )


@hostile("combined/50 clients, filters come and go", ISSUE, "served", attackers=50, fresh=True,
         setup=PATIENT, seconds=60.0, peak_mib=128.0, left_mib=96.0)  # fmt: skip
async def _filter_churn(field: Field) -> Sequence[str]:
    def listed(number: int, n: int) -> Json:
        return {"key": "a", "cmp": "in", "vals": [f"v{number}-{n}-{i}" for i in range(900)]}

    return await _churn(
        field,
        lambda number: [
            {"channel": "f", "tf": filter_of(98) if n % 2 else listed(number, n)} for n in range(10)
        ],
    )


async def _churn(field: Field, asked: Callable[[int], Sequence[Json]]) -> Sequence[str]:
    """Fifty clients subscribe to what is asked by each, and unsubscribe, for four seconds."""
    peers = await field.open_clients(50)
    with trio.move_on_after(4):
        async with trio.open_nursery() as nursery:
            for number, peer in enumerate(peers):
                data = b"".join(come_and_go(each) for each in asked(number))
                nursery.start_soon(repeat, peer, data)
                nursery.start_soon(drained, peer)
    return ["served"]


@hostile("combined/presences of 2,000 in one message", ISSUE, "served", attackers=50, fresh=True,
         setup=PATIENT, seconds=90.0, peak_mib=192.0, left_mib=96.0)  # fmt: skip
async def _presences(field: Field) -> Sequence[str]:
    for _ in range(2000):
        peer = await field.open_client()
        await peer.call(subscribe={"channel": "crowd"})
        field.nursery.start_soon(drained, peer)
    data = text(
        *(
            {"id": n + 2, ("presence_stats" if n % 2 else "presence"): {"channel": "crowd"}}
            for n in range(40)
        )
    )
    await flooders(field, 50, data)
    return ["served"]


@hostile("combined/50 x history in odd places, pipelined", ISSUE, "served", attackers=50,
         fresh=True, seconds=60.0, peak_mib=128.0, left_mib=96.0)  # fmt: skip
async def _histories(field: Field) -> Sequence[str]:
    publisher = await field.open_client()
    field.nursery.start_soon(drained, publisher)
    for _ in range(400):
        await publisher.say({"publish": {"channel": "h", "data": "x" * 500}})
    epoch = (await (await field.open_client()).call(history={"channel": "h"}))["history"].get(
        "epoch", ""
    )
    field.nursery.start_soon(repeat, publisher, text({"publish": {"channel": "h", "data": 1}}))
    pages = itertools.product(
        (0, 1, -1, 300, 2**31 - 1), (False, True), (None, 0, 1, 50, 350, 10**9, 2**63)
    )
    asks = [
        {"channel": "h", "limit": limit, "reverse": reverse}
        | ({} if offset is None else {"since": {"offset": offset, "epoch": epoch}})
        for limit, reverse, offset in pages
    ]
    data = text(*({"id": n, "history": ask} for n, ask in enumerate(asks, 2)))
    await flooders(field, 50, data)
    return ["served"]


@hostile("combined/answers twice, late, and of others", ISSUE, "ok", fresh=True, seconds=30.0)
async def _odd_answers(field: Field) -> Sequence[str]:
    asker, responder, stranger = await field.open_clients(3)
    await asker.say(request_of(responder, 5, "q", seconds=1))
    (asked,) = await responder.publications()
    number = asked["tags"]["reply_to"]
    guesses = ("0", "-1", "1e3", "\u0663", "9" * 30, str(int(number) + 1), "", " 1")
    odd = [said(await peer.rpc("reply", reply_to=number, data=1)) for peer in (stranger, asker)]
    odd += [said(await responder.rpc("reply", reply_to=each, data=1)) for each in guesses]
    if set(odd) != {"error 107"}:
        return [f"answered {odd}"]
    first = said(await responder.rpc("reply", reply_to=number, data="right"))
    second = said(await responder.rpc("reply", reply_to=number, data="again"))
    reply = await asker.reply(5)
    if (first, second, reply["rpc"]["data"]) != ("ok", "error 107", "right"):
        return [f"{first} {second} {reply}"]
    await asker.say(request_of(responder, 6, "q", seconds=0.5))
    (asked,) = await responder.publications()
    reply = await asker.reply(6)
    late = said(await responder.rpc("reply", reply_to=asked["tags"]["reply_to"], data="late"))
    return unless((said(reply), late) != ("error 504", "error 107") and f"{reply} {late}")


@hostile("combined/100 answers of 60 KB to who reads nothing", ISSUE, "ok", "close 3008",
         attackers=50, fresh=True, seconds=30.0, peak_mib=192.0, left_mib=96.0)  # fmt: skip
async def _unread_answers(field: Field) -> Sequence[str]:
    responders = await field.open_clients(50)

    async def answer(peer: Peer) -> None:
        try:
            while True:
                for asked in await peer.publications():
                    await peer.say(
                        {
                            "id": 9,
                            "rpc": {
                                "method": "reply",
                                "data": {
                                    "reply_to": asked["tags"]["reply_to"],
                                    "data": "x" * 60_000,
                                },
                            },
                        }
                    )
        except Ended:
            pass

    for peer in responders:
        field.nursery.start_soon(answer, peer)
        asker = await field.open_client(receive_buffer=4096)
        await asker.say(*(request_of(peer, n) for n in range(2, 102)))
    await trio.sleep(4)
    return ["ok"]


@hostile("combined/a group whose members come and go", ISSUE, "each once", attackers=50,
         fresh=True, seconds=40.0, peak_mib=128.0, left_mib=64.0)  # fmt: skip
async def _group(field: Field) -> Sequence[str]:
    """50 members come and go all the time; one stays; what is published goes to one each, and none to all."""
    stays, publisher = await field.open_clients(2)
    await stays.call(subscribe={"channel": "jobs", "data": {"group": "g"}})
    got: dict[int, int] = {}

    async def collect(peer: Peer) -> None:
        try:
            while True:
                for pub in await peer.publications():
                    got[pub["data"]] = got.get(pub["data"], 0) + 1
        except Ended:
            pass

    field.nursery.start_soon(collect, stays)
    data = come_and_go({"channel": "jobs", "data": {"group": "g"}})
    async with trio.open_nursery() as nursery:
        for peer in await field.open_clients(50):
            nursery.start_soon(repeat, peer, data)
            field.nursery.start_soon(collect, peer)
        for n in range(1000):
            await publisher.say({"publish": {"channel": "jobs", "data": n}})
            await trio.sleep(0.002)
        await trio.sleep(0.5)
        nursery.cancel_scope.cancel()
    await trio.sleep(1)
    twice = [n for n, c in got.items() if c > 1]
    missing = 1000 - len(got)
    return unless((twice or missing) and f"{len(twice)} twice, {missing} missing", "each once")


@hostile("combined/300 retained wills that go together", ISSUE, "gone", attackers=300, fresh=True,
         seconds=40.0, peak_mib=128.0, left_mib=64.0)  # fmt: skip
async def _wills(field: Field) -> Sequence[str]:
    peer, *others = await field.open_clients(301)
    await subscribe_all(peer, [{"channel": each, "tf": filter_of(2)} for each in matching(600)])
    watcher = await field.open_client()
    await watcher.call(subscribe={"channel": ">"})
    field.nursery.start_soon(drained, peer)
    field.nursery.start_soon(drained, watcher)
    for n, other in enumerate(others):
        result(
            await other.rpc(
                "will", topic=TARGET if n % 2 else f"w.{n}", data="x" * 20_000, retain=True
            )
        )
    for other in others:
        other.reset()
    await trio.sleep(2)
    return ["gone"]


@hostile("combined/400 uni_sse get broadcasts", ISSUE, "all", attackers=400, fresh=True, setup=PATIENT,
         seconds=60.0, peak_mib=128.0, left_mib=96.0)  # fmt: skip
async def _broadcasts(field: Field) -> Sequence[str]:
    for _ in range(400):
        subs = {name: dict[str, str]() for name in ("all", *map(str, range(10)))}
        peer = await field.open_stream("/connection/uni_sse", {"subs": subs})
        field.nursery.start_soon(drained, peer)
    publisher = await field.open_client()
    for number in range(30):
        await publisher.say({"publish": {"channel": "all", "data": number}})
        await trio.sleep(0.2)
    return ["all"]


@hostile("combined/200 full outboxes before 500 watchers", ISSUE, "served", attackers=500, fresh=True,
         setup=PATIENT, seconds=60.0, peak_mib=512.0, left_mib=192.0)  # fmt: skip
async def _overflow(field: Field) -> Sequence[str]:
    """The publication that is too much for 200 of them ends these, and of each 500 others are to be told."""
    for number in range(500):
        peer = await field.open_client(receive_buffer=4096)
        await peer.call(subscribe={"channel": "door", "join_leave": True})
        if number % 5 < 3:
            field.nursery.start_soon(drained, peer)
    publisher = await field.open_client()
    with trio.move_on_after(4):
        await repeat(publisher, text({"publish": {"channel": "door", "data": "x" * 20_000}}))
    return ["served"]


@hostile("combined/50 connect with tokens for 200 topics", ISSUE, "let in", attackers=50, fresh=True,
         setup=TOKENS, seconds=30.0, peak_mib=128.0, left_mib=96.0)  # fmt: skip
async def _large_tokens(field: Field) -> Sequence[str]:
    """As when all clients of an app come back: each is let in by one step of 6 ms."""
    shown = token({"sub": "a", "channels": [f"t{number}" for number in range(200)]})
    peers = [await field.open_ws() for _ in range(50)]
    for peer in peers:
        await peer.say({"id": 1, "connect": {"token": shown}})
    fates = {said(await peer.reply(1)) for peer in peers}
    return ["let in" if fate == "ok" else fate for fate in sorted(fates)]
