"""Inputs of many who do at one moment what one does at little cost."""

import signal
from collections.abc import Sequence
from typing import Final

import trio

from tests.hostile.field import Field, hostile
from tests.hostile.slow import BUFFER, STALL
from tests.hostile.target import Setup
from tests.hostile.wire import Ended, Peer, result

ISSUE: Final = "issue 9"


@hostile(
    "crowd/a reload with 60,000 topics",
    ISSUE,
    "served",
    fresh=True,
    setup=Setup(toml="[topics]\nhistory_size = 10\n"),
    seconds=60.0,
    peak_mib=192.0,
    left_mib=160.0,
)
async def _topics(field: Field) -> Sequence[str]:
    api = await field.keep_api()
    for number in range(60):
        names = [f"topic-{number}-{n}" for n in range(1000)]
        result(await api.call("broadcast", channels=names, data=1))
    for size in (11, 12, 13, 10):
        field.target.config_file.write_text(f"[topics]\nhistory_size = {size}\n")
        field.signal(signal.SIGHUP)
        await trio.sleep(0.5)
    return ["served"]


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
