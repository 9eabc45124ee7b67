"""Broken connections to a running broker, over TCP, beside clients that must not notice.

Each is a way that a client may talk, changed by chance: the head of its request, its frames, its commands,
cut into up to three writes; and then it closes, resets, closes one half, or waits for its answer. What is
judged is what `tests.hostile` judges: the bystanders, memory, files, connections, the log.
"""

# ruff: noqa: T201 - a program, whose output this is

import random
from collections.abc import Sequence
from functools import partial
from typing import Final

import trio

from tests.fuzz.mutator import input_of
from tests.fuzz.table import TARGETS
from tests.hostile.aloud import run_aloud
from tests.hostile.field import Field, Input
from tests.hostile.wire import TEXT, Ended, Peer, frame, handshake, request

PORTION: Final = 5000
"""Connections between two looks at what is left: one row."""
AT_ONCE: Final = 50

WAYS: Final = ("head", "lane", "session", "http", "proxy_protocol", "api")
"""The targets whose inputs are sent, each as its clients would."""


def run(count: int, seed: int) -> int:
    """Send so many; return the exit status."""
    entries = [
        Input(
            name=f"fuzz/connections {start} to {min(start + PORTION, count) - 1}",
            source=f"seed {seed}",
            should=("gone",),
            attack=partial(_attack, seed, start, min(start + PORTION, count)),
            attackers=AT_ONCE,
            seconds=600.0,
        )
        for start in range(0, count, PORTION)
    ]
    verdicts = run_aloud(entries)
    bad = [verdict for verdict in verdicts if not verdict.is_good]
    print(f"\n{count} connections, {len(bad)} of {len(verdicts)} rows not as they should be")
    return 1 if bad else 0


async def _attack(seed: int, start: int, stop: int, field: Field) -> Sequence[str]:
    numbers = iter(range(start, stop))

    async def one_by_one() -> None:
        for number in numbers:
            try:
                await broken_connection(field, seed, number)
            except Ended:
                pass

    async with trio.open_nursery() as nursery:
        for _ in range(AT_ONCE):
            nursery.start_soon(one_by_one)
    return ["gone"]


def bytes_of(seed: int, number: int) -> bytes:
    """What the connection of this number sends: always the same."""
    chance = random.Random(f"{seed} {number}")
    way = chance.choice(WAYS)
    data = input_of(TARGETS[way], seed * 10**9 + number)
    if way == "lane":
        return handshake() + data
    if way == "session":
        connect = frame(TEXT, b'{"id":1,"connect":{}}')
        return handshake() + connect + b"".join(frame(TEXT, part) for part in data.split(b"\0"))
    if way == "http":
        line, _, body = data.partition(b"\n")
        fields = [("Content-Type", "application/json")]
        return request(line.decode("latin-1"), fields, body)
    if way == "api":
        name, _, body = data.partition(b"\n")
        return request(f"POST /api/{name.decode('latin-1')}", [("X-API-Key", "wrong")], body)
    return data


async def broken_connection(field: Field, seed: int, number: int) -> None:
    """The connection of this number: always the same bytes, and the same end. Raises `Ended`."""
    chance = random.Random(number)
    data = bytes_of(seed, number)
    cuts = sorted(chance.randrange(len(data) + 1) for _ in range(chance.randrange(3)))
    peer = await field.connect()
    field.peers.remove(peer)
    try:
        for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
            await peer.send(data[start:end])
            await trio.lowlevel.checkpoint()
        await _leave(peer, chance.randrange(4))
    finally:
        await peer.aclose()


async def _leave(peer: Peer, way: int) -> None:
    if way == 1:
        peer.reset()
    elif way == 2:
        await peer.finish()
        with trio.move_on_after(0.2):
            await peer.read()
    elif way == 3:
        with trio.move_on_after(0.2):
            await peer.read()
