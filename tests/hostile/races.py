"""Inputs that race with a decision: whoever is sent away while a hook thinks, a reload that takes a right away
while something is under way."""

import signal
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import trio

from tests.hostile.field import Field, hostile, unless
from tests.hostile.target import Setup
from tests.hostile.wire import Ended, Peer, result, said, text

ISSUE: Final = "issue 9"
THINKING: Final = Setup(app="tests.hostile.apps:thinking")


async def heard(peer: Peer, seconds: float = 1.0) -> list[object]:
    """The data of all publications that come within some time."""
    found: list[object] = []
    with trio.move_on_after(seconds):
        while True:
            found += [each["data"] for each in await peer.publications()]
    return found


def _kicked(name: str, *commands: object) -> None:
    @hostile(f"kick/while {name} is asked about", ISSUE, "nothing", setup=THINKING)
    async def attack(field: Field) -> Sequence[str]:
        reader, peer = await field.open_clients(2)
        await reader.call(subscribe={"channel": "slow"})
        await peer.send(text(*commands))
        await trio.sleep(0.3)
        await field.api("disconnect", user="", client=str(peer.fd))
        result(await field.api("publish", channel="slow-2", data="late"))
        ended = await peer.ending()
        rest = await heard(reader, 1.5)
        shown = result(await field.api("presence_stats", channel="slow-2"))["num_clients"]
        faults = [ended != "close 3503" and ended, rest, shown, "late" in str(peer.pushes)]
        return unless(any(faults) and str(faults), "nothing")


_kicked("a publish", {"id": 2, "publish": {"channel": "slow", "data": 1}})
_kicked(
    "a publish by rpc",
    {"id": 2, "rpc": {"method": "publish", "data": {"topic": "slow", "data": 1}}},
)
_kicked(
    "a call",
    {"id": 2, "rpc": {"method": "say", "data": {}}},
    {"id": 3, "publish": {"channel": "slow", "data": 1}},
)
_kicked(
    "a subscription",
    {"id": 2, "subscribe": {"channel": "slow-2"}},
    {"id": 3, "publish": {"channel": "slow", "data": 1}},
)
_kicked(
    "an rpc, by a will", {"id": 2, "rpc": {"method": "will", "data": {"topic": "slow", "data": 1}}}
)
_kicked("a request", {"id": 2, "rpc": {"method": "request", "data": {"to": "slow", "data": 1}}})
_kicked(
    "a refresh",
    {"id": 2, "presence": {"channel": "slow"}},
    {"id": 3, "publish": {"channel": "slow", "data": 1}},
)
_kicked(
    "a history",
    {"id": 2, "history": {"channel": "slow"}},
    {"id": 3, "publish": {"channel": "slow", "data": 1}},
)


@hostile("kick/50 publish as they are sent away", ISSUE, "nothing", attackers=50, times=2)
async def _flood(field: Field) -> Sequence[str]:
    reader = await field.open_client()
    await reader.call(subscribe={"channel": "flood"})
    peers = await field.open_clients(50)
    late: list[str] = []
    told: set[str] = set()

    async def publish(peer: Peer) -> None:
        try:
            while True:
                await peer.send(
                    text(*({"publish": {"channel": "flood", "data": peer.fd}} for _ in range(20)))
                )
                await trio.sleep(0.01)
        except Ended:
            pass

    async def read() -> None:
        while True:
            for each in await reader.publications():
                data = str(each["data"])
                if not data.startswith("gone ") and data in told:
                    late.append(data)
                if data.startswith("gone "):
                    told.add(data.removeprefix("gone "))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        for peer in peers:
            nursery.start_soon(publish, peer)
        api = await field.keep_api()
        await trio.sleep(0.5)
        for peer in peers:
            await api.call("disconnect", user="", client=str(peer.fd))
            # What is said by now is behind all that was published before.
            await api.call("publish", channel="flood", data=f"gone {peer.fd}")
        await trio.sleep(1)
        nursery.cancel_scope.cancel()
    return unless((late or len(told) < 50) and f"{len(late)} late, {len(told)} told", "nothing")


# a reload


def _reloaded(
    name: str, before: str, after: str, *should: str, app: str = ""
) -> Callable[[Callable[[Field, Callable[[], Awaitable[None]]], Awaitable[Sequence[str]]]], None]:
    def decorate(
        attack: Callable[[Field, Callable[[], Awaitable[None]]], Awaitable[Sequence[str]]],
    ) -> None:
        @hostile(f"reload/{name}", ISSUE, *should, setup=Setup(toml=before, app=app), fresh=True)
        async def whole(field: Field) -> Sequence[str]:
            async def reload() -> None:
                field.target.config_file.write_text(after)
                field.signal(signal.SIGHUP)
                while "reload" not in field.log():  # noqa: ASYNC110 - a log sets no event
                    await trio.sleep(0.02)

            return await attack(field, reload)

    return decorate


PATTERN: Final = '[[topics.patterns]]\nmatch = "{}"\n{}\n'


@_reloaded(
    "may_subscribe, a pattern goes on",
    PATTERN.format("pay.*", 'may_subscribe = "all"'),
    PATTERN.format("pay.*", 'may_subscribe = "none"'),
    "nothing",
)
async def _pattern(field: Field, reload: Callable[[], Awaitable[None]]) -> Sequence[str]:
    peer = await field.open_client()
    await peer.call(subscribe={"channel": "pay.*"})
    await reload()
    result(await field.api("publish", channel="pay.a", data=1))
    return unless(await heard(peer) and "heard", "nothing")


@_reloaded(
    "may_subscribe, a topic goes on",
    PATTERN.format("pay.*", 'may_subscribe = "all"'),
    PATTERN.format("pay.*", 'may_subscribe = "none"'),
    "nothing",
    "goes on",
)
async def _topic(field: Field, reload: Callable[[], Awaitable[None]]) -> Sequence[str]:
    peer = await field.open_client()
    await peer.call(subscribe={"channel": "pay.a"})
    await reload()
    result(await field.api("publish", channel="pay.a", data=1))
    return unless(await heard(peer) and "goes on", "nothing")


@_reloaded(
    "may_publish, between two of one message",
    PATTERN.format("pay.*", 'may_publish = "all"'),
    PATTERN.format("pay.*", 'may_publish = "none"'),
    "error 103",
)
async def _publishes(field: Field, reload: Callable[[], Awaitable[None]]) -> Sequence[str]:
    peer = await field.open_client()
    await peer.call(publish={"channel": "pay.a", "data": 1})
    await reload()
    return [said(await peer.call(publish={"channel": "pay.a", "data": 1}))]


@_reloaded(
    "may_read_history, an iteration",
    PATTERN.format("pay.*", ""),
    PATTERN.format("pay.*", 'may_read_history = "none"'),
    "error 103",
)
async def _history(field: Field, reload: Callable[[], Awaitable[None]]) -> Sequence[str]:
    peer = await field.open_client()
    for n in range(50):
        await field.api("publish", channel="pay.a", data=n)
    await peer.call(history={"channel": "pay.a", "limit": 10})
    await reload()
    return [
        said(
            await peer.call(
                history={"channel": "pay.a", "limit": 10, "since": {"offset": 10, "epoch": ""}}
            )
        )
    ]


@_reloaded(
    "may_publish, a request under way",
    PATTERN.format("pay.*", ""),
    PATTERN.format("pay.*", 'may_publish = "none"\nmay_subscribe = "none"'),
    "answered",
    "error 103",
)
async def _request(field: Field, reload: Callable[[], Awaitable[None]]) -> Sequence[str]:
    asker, worker = await field.open_clients(2)
    await worker.call(subscribe={"channel": "pay.a", "data": {"group": "g"}})
    await asker.say({"id": 900, "rpc": {"method": "request", "data": {"to": "pay.a", "data": 1}}})
    (asked,) = await worker.publications()
    await reload()
    tags = asked["tags"]
    await worker.rpc("reply", reply_to=tags["reply_to"], data=2)
    reply = await asker.reply(900)
    first = "answered" if "error" not in reply else said(reply)
    again = said(await asker.rpc("request", to="pay.a", data=1))
    return [first, again]


@_reloaded(
    "a group goes on",
    PATTERN.format("pay.*", ""),
    PATTERN.format("pay.*", 'may_subscribe = "users"'),
    "nothing",
    "goes on",
)
async def _group(field: Field, reload: Callable[[], Awaitable[None]]) -> Sequence[str]:
    worker, other = await field.open_clients(2)
    await worker.call(subscribe={"channel": "pay.*", "data": {"group": "g"}})
    await other.call(subscribe={"channel": "pay.a", "data": {"group": "g"}})
    await reload()
    for n in range(10):
        result(await field.api("publish", channel="pay.a", data=n))
    return [
        "goes on" if await heard(other) else "nothing",
        "a pattern hears" if await heard(worker) else "nothing",
    ]


@_reloaded(
    "may_subscribe, uni_sse goes on",
    PATTERN.format("pay.*", ""),
    PATTERN.format("pay.*", 'may_subscribe = "none"'),
    "nothing",
    "goes on",
)
async def _sse(field: Field, reload: Callable[[], Awaitable[None]]) -> Sequence[str]:
    peer = await field.open_stream("/connection/uni_sse", {"subs": {"pay.*": {}}})
    await peer.until(b"\n\n")
    await reload()
    result(await field.api("publish", channel="pay.a", data="late"))
    with trio.move_on_after(1):
        await peer.until(b"late")
        return ["goes on"]
    return ["nothing"]
