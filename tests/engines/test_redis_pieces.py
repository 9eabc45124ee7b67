"""A history in Redis comes in pieces, so that no step there takes longer the more is kept.

Between two pieces the topic is published to, trimmed, removed or begun anew: the pieces are one state of it.
"""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from broker.core.messages import Position
from broker.engines.redis_scripts import PIECE, VIEW
from broker.engines.redis_wire import Script, Wire
from broker.testing import Witness
from broker.testing.engines import RULES, kept
from tests.engines.servers import BINARIES, Server, serving
from tests.engines.test_redis import opened, patient, trial

__all__ = ["patient"]

Meanwhile = Callable[[], Awaitable[None]]


@pytest.fixture(autouse=True)
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.engines.redis.PIECE_RUNS", 4)
    monkeypatch.setattr("broker.engines.redis.PIECE_BYTES", 2000)


@attrs.define(eq=False)
class Steps:
    """What Redis is asked for of histories, and what happens after each answer."""

    monkeypatch: pytest.MonkeyPatch
    pieces: list[Any] = attrs.field(factory=list)
    after: Callable[[int], Awaitable[None]] | None = None

    def __attrs_post_init__(self) -> None:
        ask = Wire.run

        async def run(wire: Wire, script: Script, key: str, *parts: Any) -> Any:
            answer = await ask(wire, script, key, *parts)
            if script is VIEW or script is PIECE:
                self.pieces.append(answer[-1] if script is VIEW else answer)
                if self.after is not None:
                    await self.after(len(self.pieces))
            return answer

        self.monkeypatch.setattr(Wire, "run", run)

    def once_after(self, number: int, meanwhile: Meanwhile) -> None:
        async def after(pieces: int) -> None:
            if pieces == number:
                await meanwhile()

        self.after = after


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    return Steps(monkeypatch)


async def fill(witness: Witness, count: int, size: int = 1) -> Position:
    """Publish so many, each a run of its own."""
    position = None
    for number in range(count):
        position = await witness.published("a", b"%0*d" % (size, number))
    assert position is not None
    return position


def numbers(first: int, last: int) -> list[bytes]:
    return [b"%d" % number for number in range(first, last)]


@pytest.mark.parametrize("kind", ["valkey", "redis-6.2"])
async def test_no_step_gives_more_than_a_piece(tmp_path: Path, kind: str, steps: Steps) -> None:
    with serving(BINARIES[kind], tmp_path) as server:
        async with opened(server) as (_, witness), opened(server) as (other, _):
            await fill(witness, 30)
            assert await kept(other, "a") == numbers(0, 30)
            assert [len(each) for each in steps.pieces] == [4] * 7 + [2]
            steps.pieces.clear()
            await witness.engine.remove("a")
            await fill(witness, 6, 1500)
        async with opened(server) as (third, _):
            assert len(await kept(third, "a")) == 6
            assert [len(each) for each in steps.pieces] == [2, 2, 2], "or the bytes are enough"


async def test_pieces_that_keep_coming_are_waited_for(
    server: Server, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long a history is: a topic is not away because it keeps much."""
    monkeypatch.setattr("broker.engines.redis.FETCH_SECONDS", 1.0)
    async with opened(server) as (_, witness), opened(server) as (other, _):
        await fill(witness, 24)

        async def dawdle(pieces: int) -> None:
            await trio.sleep(0.25)

        steps.after = dawdle
        assert await kept(other, "a") == numbers(0, 24)
        assert len(steps.pieces) == 6


async def test_what_is_published_between_two_pieces_comes_once(
    server: Server, steps: Steps
) -> None:
    async with opened(server) as (_, witness), opened(server) as (other, _):
        await fill(witness, 10)

        async def publish() -> None:
            for number in range(10, 15):
                await witness.published("a", b"%d" % number)

        steps.once_after(2, publish)
        assert await kept(other, "a") == numbers(0, 15)


async def test_what_is_trimmed_between_two_pieces_is_gone_and_the_rest_is_not(
    server: Server, steps: Steps
) -> None:
    async with opened(server) as (_, witness), opened(server) as (other, _):
        await fill(witness, 10)

        async def trim() -> None:
            await witness.published("a", b"10", rules=attrs.evolve(RULES, history_size=3))
            await server.call("XTRIM", "{broker}:h:a", "MINID", "9")

        steps.once_after(1, trim)
        assert await kept(other, "a") == numbers(8, 11)


async def test_what_is_removed_between_two_pieces_is_gone(server: Server, steps: Steps) -> None:
    async with opened(server) as (_, witness), opened(server) as (other, _):
        before = await fill(witness, 10)
        steps.once_after(2, lambda: witness.engine.remove("a"))
        assert await kept(other, "a") == []
        assert other.position("a") == before


@pytest.mark.parametrize("how", [("DEL", "{broker}:m:a"), ("FLUSHALL",)], ids=["m", "all"])
async def test_pieces_of_two_epochs_are_not_joined(
    server: Server, steps: Steps, how: tuple[str, ...]
) -> None:
    """What is there by then has the same offsets, and is something else."""
    async with opened(server) as (_, witness), opened(server) as (other, there):
        before = await fill(witness, 10)

        async def begin_anew() -> None:
            await server.call(*how)
            for number in range(20, 32):
                while not isinstance(await witness.published("a", b"%d" % number), Position):
                    pass

        steps.once_after(1, begin_anew)
        with trio.fail_after(20):
            found = await kept(other, "a")
        # Though this node may not have read of it by then. With the log lost nothing is asked for any more.
        assert how == ("FLUSHALL",) or steps.pieces[1] is None
        assert found == numbers(20, 32)
        assert other.position("a").epoch != before.epoch
        await there.published("a", b"32")
        assert await kept(other, "a") == numbers(20, 33)


async def test_nodes_agree_on_what_is_fetched_in_pieces_while_others_publish(
    server: Server,
) -> None:
    async with trial(server, 3, room=0) as all_nodes:
        await all_nodes.run()
        await all_nodes.check()
        assert not all_nodes.refused
