"""The faults of the world, as inputs of the table that `tests.hostile` judges: beside each of them two clients
go on talking, who must lose nothing and hardly notice.

Fifteen of the inputs of that table hold something, each by a peer of its own: here by fifty at once.
"""

import signal
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, Unpack

import attrs
import trio

from tests.hostile import floods, frames, heads, messages, process, rights, slow  # noqa: F401
from tests.hostile.field import MIB, PLAIN, TABLE, Attack, Bounds, Field, Input, unless
from tests.hostile.messages import token
from tests.hostile.target import SECRET, Setup
from tests.hostile.wire import Ended, Tcp, result, said
from tests.world.far import KINDS, TOPIC
from tests.world.places import FAKETIME, OURS, Far, open_far, open_link

FAULTS: Final[list[Input]] = []
SOURCE: Final = "issue 12"


def fault(
    name: str, *should: str, setup: Setup = PLAIN, **bounds: Unpack[Bounds]
) -> Callable[[Attack], Attack]:
    def decorate(attack: Attack) -> Attack:
        FAULTS.append(
            Input(name=name, source=SOURCE, should=should, attack=attack, setup=setup, **bounds)
        )
        return attack

    return decorate


# the network

HASTY: Final = {"BROKER_PING_SECONDS": "1", "BROKER_PONG_SECONDS": "1", "BROKER_STALL_SECONDS": "2", "BROKER_CLOSE_SECONDS": "1"}  # fmt: skip
OPEN: Final = ("--host", "0.0.0.0")
EACH: Final = 13
CROWD: Final = dict.fromkeys(KINDS, EACH)


def _port(field: Field) -> int:
    address = field.target.address
    assert isinstance(address, Tcp)
    return address.port


async def _wait_alone(field: Field, seconds: float, others: int = 2) -> list[str]:
    """`gone` when none but the bystanders are left."""
    left = -1
    with trio.move_on_after(seconds):
        while True:
            left = await trio.to_thread.run_sync(field.target.clients, abandon_on_cancel=True)
            if 0 <= left <= others:
                return ["gone"]
            await trio.sleep(0.1)
    return [f"{left - others} are left after {seconds:g} s"]


@fault("link/down: 52 half-open peers", "gone", setup=Setup(options=OPEN, env=HASTY), attackers=52,
       seconds=30.0)  # fmt: skip
async def _half_open(field: Field) -> Sequence[str]:
    async with open_link() as link:
        async with open_far(_port(field), CROWD, host=OURS, inside=link.machine):
            link.down()
            return await _wait_alone(field, 10)


@fault("link/down under 1 MB/s: 52 half-open peers", "gone", setup=Setup(options=OPEN, env=HASTY),
       attackers=52, seconds=30.0)  # fmt: skip
async def _half_open_busy(field: Field) -> Sequence[str]:
    async with open_link() as link, _publishing(field, rate=10, size=100_000):
        async with open_far(_port(field), CROWD, host=OURS, inside=link.machine):
            link.down()
            return await _wait_alone(field, 10)


@fault("link/down for 3 s, then up again", "all, in order, once", setup=Setup(options=OPEN),
       attackers=50, seconds=40.0)  # fmt: skip
async def _down_and_up(field: Field) -> Sequence[str]:
    async with open_link() as link, _publishing(field, rate=100, size=10) as published:
        async with open_far(_port(field), {"client": 50}, host=OURS, inside=link.machine) as far:
            link.down()
            await trio.sleep(3)
            link.up()
            return [await _all_came(far, published)]


async def _all_came(far: Far, published: "list[int]", seconds: float = 15) -> str:
    """Whether all clients come to have what was published by now, without a gap, as long as it takes."""
    wanted = published[-1] + 50
    found: dict[str, Any] = {}
    with trio.move_on_after(seconds):
        while True:
            found = await far.order("report")
            if found["behind"] >= wanted and not found["silent"]:
                break
            await trio.sleep(0.2)
    is_whole = found["behind"] >= wanted and not any(
        found[each] for each in ("silent", "missed", "unordered", "ended")
    )
    return "all, in order, once" if is_whole else str(found)


@asynccontextmanager
async def _publishing(field: Field, rate: float, size: int) -> "AsyncGenerator[list[int]]":
    """Publish numbers for as long as the block; those that were acknowledged."""
    published: list[int] = []

    async def publish() -> None:
        api = await field.keep_api()
        while True:
            data = {"n": len(published), "x": "x" * size}
            result(await api.call("publish", channel=TOPIC, data=data))
            published.append(len(published))
            await trio.sleep(1 / rate)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(publish)
        yield published
        nursery.cancel_scope.cancel()


# clients that stand still


@fault("clients/20 stopped (SIGSTOP) under 2 MB/s", "gone", "comes to its end",
       setup=Setup(env=HASTY), attackers=50, seconds=40.0, peak_mib=160.0)  # fmt: skip
async def _stopped(field: Field) -> Sequence[str]:
    async with _publishing(field, rate=20, size=100_000):
        async with open_far(_port(field), {"client": 20}, buffer=4096) as far:
            far.process.send_signal(signal.SIGSTOP)
            gone = await _wait_alone(field, 15)
            far.process.send_signal(signal.SIGCONT)
            ended = 0
            with trio.move_on_after(5):
                while ended < 20:
                    ended = sum((await far.order("report"))["ended"].values())
                    await trio.sleep(0.1)
            return [*gone, *unless(ended != 20 and f"{20 - ended} hang", "comes to its end")]


@fault("clients/20 stopped (SIGSTOP), nothing is sent", "gone", setup=Setup(env=HASTY),
       attackers=50, seconds=40.0)  # fmt: skip
async def _stopped_idle(field: Field) -> Sequence[str]:
    async with open_far(_port(field), dict.fromkeys(KINDS, 5)) as far:
        far.process.send_signal(signal.SIGSTOP)
        try:
            return await _wait_alone(field, 15)
        finally:
            far.process.send_signal(signal.SIGCONT)


# what is held

HOLDING: Final = (
    "slow head/silence",
    "slow head/half a head, then silence",
    "slow head/byte by byte",
    "slow head/a body byte by byte",
    "wait/50 slow messages, a Ping, a Close",
    "wait/ignores our Close, and talks on",
    "wait/ignores our 1009",
    "wait/half a message, then silence",
    "wait/fragments, one a second",
    "wait/half-open, before a connect",
    "wait/half-open, a client",
    "flood/Pings whose Pongs are not read",
    "admission/a subprotocol and no connect",
    "tls/half a hello, then silence",
    "slow reader/one that reads nothing, close",
)
BY: Final = 50


def _held(name: str) -> Input:
    (entry,) = [each for each in TABLE if each.name == name]
    return attrs.evolve(
        entry,
        name=f"hold/{name.rpartition('/')[2]} × {BY}"[:50],
        source=entry.source,
        times=BY,
        attackers=BY,
        seconds=max(60.0, entry.seconds),
        peak_mib=max(256.0, entry.peak_mib),
        left_mib=max(64.0, entry.left_mib),
    )


FAULTS.extend(map(_held, HOLDING))

# files

for reused in (
    "head/connect and FIN, 64 files",
    "admission/300 silent sockets, 256 files",
    "admission/300 refused that linger, 256 files",
):
    FAULTS.extend(each for each in TABLE if each.name == reused)


@fault("files/200 clients where 64 files may be open", "some are served", "200", attackers=200, files=1,
       setup=Setup(files=64))  # fmt: skip
async def _few_files(field: Field) -> Sequence[str]:
    served = 0
    for _ in range(200):
        try:
            await field.open_client()
            served += 1
        except Ended:
            pass
    health = (await field.ask(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")).status
    return [*unless(not 5 < served < 64 and f"{served} are served", "some are served"), str(health)]


# disks

DISK: Final = 4 * MIB
DURABLE: Final = {"BROKER_ENGINE": "sqlite:{disk}/log.db"}
KEPT: Final = (
    '[topics]\nhistory_size = 0\n[[topics.patterns]]\nmatch = "d"\nhistory_size = 100000\n'
)
"""Of the bystanders nothing is kept: what cannot be kept is refused, whoever publishes it."""


@fault("disk/full: the engine's file", "refused", "kept again", "nothing acknowledged is lost", fresh=True,
       setup=Setup(disk_bytes=DISK, env=DURABLE, toml=KEPT), errors=100, seconds=40.0)  # fmt: skip
async def _full_engine(field: Field) -> Sequence[str]:
    filler = field.target.disk / "filler"
    filler.write_bytes(bytes(DISK // 4))
    api = await field.keep_api()
    kept: list[int] = []
    refused = ""
    for number in range(2000):
        answer = await api.call("publish", channel="d", data={"n": number, "x": "x" * 5000})
        if "error" in answer:
            refused = said(answer)
            break
        kept.append(number)
    outcomes = unless(refused != "error 100" and f"{len(kept)} kept: {refused}", "refused")
    filler.unlink()
    with trio.move_on_after(10):
        while (  # noqa: ASYNC110 - a disk sets no event
            said(await api.call("publish", channel="d", data={"n": -1})) != "ok"
        ):
            await trio.sleep(0.1)
        outcomes.append("kept again")
    history = result(await api.call("history", channel="d", limit=-1))["publications"]
    found = [each["data"]["n"] for each in history if each["data"]["n"] >= 0]
    return [*outcomes, *unless(found != kept and f"{len(kept)} acknowledged, {len(found)} there",
                               "nothing acknowledged is lost")]  # fmt: skip


@fault("disk/full: the log", "served", setup=Setup(disk_bytes=MIB // 4, options=("--log-level", "debug")),
       errors=1000, seconds=30.0)  # fmt: skip
async def _full_log(field: Field) -> Sequence[str]:
    (field.target.disk / "filler").write_bytes(bytes(MIB // 4 - 16_384))
    for _ in range(200):
        await field.ask(bytes(100))
    peer = await field.open_client()
    answer = said(await peer.call(publish={"channel": "a", "data": 1}))
    return unless(answer != "ok" and answer, "served")


# clocks

WALL: Final = {
    "LD_PRELOAD": str(FAKETIME[0]) if FAKETIME else "",
    "FAKETIME_TIMESTAMP_FILE": "{disk}/clock",
    "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    "FAKETIME_CACHE_DURATION": "1",
    "BROKER_TOKENS_HMAC_SECRET": SECRET,
    "BROKER_TOKENS_ALLOW_ANONYMOUS": "true",
    "BROKER_ENGINE": "sqlite:{disk}/log.db",
    "BROKER_TOPICS_HISTORY_SIZE": "1000",
}


def _clock(name: str, step: str) -> None:
    @fault(f"clock/{name}", "no hole", "recovered", "let in", "goes on", fresh=True,
           setup=Setup(env=WALL), attackers=50, seconds=30.0)  # fmt: skip
    async def attack(field: Field) -> Sequence[str]:
        if not FAKETIME:
            return ["not run: Debian's package `faketime` is not installed"]
        api = await field.keep_api()
        listener = await field.open_client()
        found = result(await listener.call(subscribe={"channel": "c", "recoverable": True}))
        before = await _publish_some(api, range(10))
        (field.target.disk / "clock").write_text(step)
        await trio.sleep(2.5)  # it is looked at once a second
        after = await _publish_some(api, range(10, 20))
        offsets = [each["offset"] for each in await _all_of(listener, 20)]
        outcomes = unless(offsets != [*range(1, 21)] or before + after != offsets, "no hole")
        late = await field.open_client(token=token({"sub": "ann"}))
        asked = {"channel": "c", "recover": True, "offset": 3, "epoch": found["epoch"]}
        recovery = result(await late.call(subscribe=asked))
        whole = recovery.get("recovered") and len(recovery["publications"]) == 17
        outcomes += unless(not whole and f"{recovery}"[:100], "recovered")
        return [
            *outcomes,
            "let in",
            *unless(said(await late.call(presence={"channel": "c"})) != "ok", "goes on"),
        ]


async def _publish_some(api: Any, numbers: range) -> list[int]:
    answers = [await api.call("publish", channel="c", data={"n": n}) for n in numbers]
    return [result(answer)["offset"] for answer in answers]


async def _all_of(peer: Any, count: int) -> list[Any]:
    found: list[Any] = []
    while len(found) < count:
        found += await peer.publications()
    return found


_clock("an hour forward", "+3600")
_clock("a day back", "-86400")

# memory

LIMITED: Final = Setup(cgroup_bytes=256 * MIB)


@fault("memory/256 MiB (cgroup), 600 × 1 MB waits", "stays", setup=LIMITED, attackers=50, seconds=60.0,
       peak_mib=200.0, left_mib=128.0, fresh=True)  # fmt: skip
async def _pressure(field: Field) -> Sequence[str]:
    """Readers that do not read, of messages of 1 MB: more than twice what there is."""
    for _ in range(30):
        reader = await field.open_client(receive_buffer=4096)
        await reader.call(subscribe={"channel": "big"})
    api = await field.keep_api()
    for _ in range(20):
        await api.call("publish", channel="big", data="x" * 900_000)
    return unless(not field.target.is_running and "the system has killed it", "stays")


@fault("memory/256 MiB (cgroup), 500 half messages", "stays", setup=LIMITED, attackers=500, seconds=60.0,
       peak_mib=200.0, left_mib=128.0, fresh=True)  # fmt: skip
async def _half_messages(field: Field) -> Sequence[str]:
    from tests.hostile.wire import header_of

    for _ in range(500):
        try:
            peer = await field.open_ws()
            await peer.send(header_of(1_000_000) + bytes(900_000))
        except Ended:
            pass
    await trio.sleep(1)
    return unless(not field.target.is_running and "the system has killed it", "stays")


# names and backends

NAMELESS: Final = {"BROKER_WEBHOOKS_RPC_URL": "http://backend.example/rpc", **DURABLE}


@fault("names/DNS that hangs, 60 questions", "refused", "kept meanwhile", setup=Setup(env=NAMELESS, toml=KEPT),
       errors=100, seconds=40.0, attackers=60, files=70, fresh=True)  # fmt: skip
async def _hanging_names(field: Field) -> Sequence[str]:
    with trio.socket.socket(type=trio.socket.SOCK_DGRAM) as server:
        await server.bind(("127.0.0.1", 53))
        peers = [await field.open_client() for _ in range(60)]
        outcomes: list[str] = []

        async def ask(peer: Any) -> None:
            with trio.move_on_after(15):
                answer = await peer.rpc("anything")
                outcomes.extend(unless("error" not in answer and "answered", "refused"))
                return
            outcomes.append("no answer in 15 s")

        async with trio.open_nursery() as nursery:
            for peer in peers:
                nursery.start_soon(ask, peer)
            await trio.sleep(1)
            with trio.move_on_after(3) as bound:
                await field.api("publish", channel="d", data=1)
            kept = unless(
                bound.cancelled_caught and "an engine that waits for names", "kept meanwhile"
            )
    return [*outcomes, *kept]


def _without_end(way: str) -> None:
    @fault(f"backend/answers for ever: {way}", "refused", "served", setup=Setup(backend=("rpc",)),
           errors=100, seconds=40.0, attackers=50, files=70, peak_mib=96.0)  # fmt: skip
    async def attack(field: Field) -> Sequence[str]:
        peers = [await field.open_client() for _ in range(30)]
        outcomes: list[str] = []

        async def ask(peer: Any) -> None:
            with trio.move_on_after(20):
                answer = await peer.rpc(way)
                outcomes.extend(unless("error" not in answer and "answered", "refused"))
                return
            outcomes.append("no answer in 20 s")

        async with trio.open_nursery() as nursery:
            for peer in peers:
                nursery.start_soon(ask, peer)
        # Whoever asks next has a backend that answers again.
        answer = said(await (await field.open_client()).rpc("quick"))
        return [*outcomes, *unless(answer != "ok" and answer, "served")]


for way in ("silence", "drip", "endless"):
    _without_end(way)
