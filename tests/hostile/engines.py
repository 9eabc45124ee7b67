"""Inputs about what is behind a broker: the Redis that its nodes share hangs while clients flood, the log of a
file is cleaned."""

import signal
from collections.abc import Sequence
from typing import Final

import trio

from tests.hostile.field import MIB, Field, hostile, unless
from tests.hostile.floods import drained, last_bytes, repeat
from tests.hostile.target import Setup
from tests.hostile.wire import said, text

ISSUE: Final = "issue 9"
ON_REDIS: Final = Setup(ground="redis")
HANGS_SECONDS: Final = 5.0


async def _hangs(field: Field, data: bytes, most_mib: float) -> Sequence[str]:
    """Fifty clients flood while Redis hangs: what waits is bounded, and a second later all is as it was."""
    before = field.sample().rss
    field.target.reset_peak()
    async with trio.open_nursery() as nursery:
        for peer in await field.open_clients(50):
            nursery.start_soon(repeat, peer, data)
            nursery.start_soon(drained, peer)
        await trio.sleep(0.5)
        field.target.signal_store(signal.SIGSTOP)
        await trio.sleep(HANGS_SECONDS)
        field.target.signal_store(signal.SIGCONT)
        await trio.sleep(0.5)
        nursery.cancel_scope.cancel()
    gained = (field.target.peak() - before) / MIB
    if gained > most_mib:
        return [f"RSS +{gained:.0f} MiB"]
    await trio.sleep(1)
    peer = await field.open_client()
    began = trio.current_time()
    fate = said(await peer.call(publish={"channel": "after", "data": 1}))
    took = trio.current_time() - began
    if fate != "ok":
        return [fate]
    return unless(took > 0.1 and f"a publish took {took:.2f} s", "healthy")


def _redis_hangs(what: str, size: int, times: int, most_mib: float) -> None:
    data = text({"id": 9, "publish": {"channel": "flood", "data": "x" * size}}) * times

    async def hangs(field: Field) -> Sequence[str]:
        return await _hangs(field, data, most_mib)

    @hostile(f"engine/redis hangs for 5 s, 50 publish {what}", ISSUE, "healthy", setup=ON_REDIS,
             fresh=True, attackers=50, seconds=40.0, errors=1, finale=hangs)  # fmt: skip
    async def _before(field: Field) -> Sequence[str]:
        return ["healthy"]


# 4 MiB wait for Redis, whatever their sizes; and of each client an inbox, which has 4 MiB where messages are large.
_redis_hangs("60 bytes", 60, 100, 64.0)
_redis_hangs("60 KB", 60_000, 1, 256.0)


# One topic keeps 64 MiB then, and the log has three times as much.
hostile("engine/sqlite is cleaned of 250 x 1 MB", ISSUE, "served", setup=Setup(ground="sqlite"), attackers=50,
        fresh=True, seconds=30.0, peak_mib=192.0, left_mib=96.0)(last_bytes)  # fmt: skip
