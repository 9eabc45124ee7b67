"""Upkeep of a file that no broker uses: its contents are counted, and nothing of them is lost."""

from pathlib import Path

import pytest
from trio.testing import MockClock

from broker.config.settings import TopicRules
from broker.engines.sqlite_upkeep import compact, inspect
from broker.errors import ConfigError
from broker.testing.engines import kept
from tests.engines.conftest import opened

FOR_EVER = TopicRules(history_size=3, history_ttl=1e12)


async def fill(path: Path) -> None:
    async with opened(path, first_fd=5) as (_, witness):
        for number in range(40):
            await witness.published("a", b"%d" % number * 20_000, rules=FOR_EVER)
        await witness.published("b", b"1", rules=FOR_EVER, retain=True)


async def test_a_file_is_counted_and_stays_as_it_is(autojump_clock: MockClock, path: Path) -> None:
    await fill(path)
    before = path.read_bytes()
    report = await inspect(path)
    assert report.problems == []
    assert (report.topics, report.publications, report.values, report.keys) == (2, 4, 1, 0)
    assert (report.next_fd, report.bytes, report.is_clean) == (5, len(before), True)
    assert path.read_bytes() == before


async def test_what_is_kept_is_the_same_in_less_room(autojump_clock: MockClock, path: Path) -> None:
    await fill(path)
    before, after = await compact(path)
    assert after == path.stat().st_size < before / 5
    assert (await inspect(path)).publications == 4
    async with opened(path) as (engine, _):
        assert [len(data) for data in await kept(engine, "a")] == [40_000] * 3


@pytest.mark.parametrize("work", [inspect, compact])
async def test_a_file_that_is_not_there_is_not_made(
    work: object, autojump_clock: MockClock, path: Path
) -> None:
    assert callable(work)
    with pytest.raises(ConfigError):
        await work(path)
    assert not path.exists()
