"""The file of a sqlite engine: whose it is, whether it is one, and what may be wrong with it."""

import random
import sqlite3
from pathlib import Path

import pytest
from trio.testing import MockClock

from broker.engines.records import Batch, Begin, Meta, Once, Record, Value, encode, join
from broker.engines.sqlite_file import APPLICATION_ID, PAGE_BYTES, WAL_BYTES
from broker.engines.sqlite_upkeep import compact, inspect
from broker.errors import ConfigError
from tests.engines.conftest import files_bounded, opened


async def filled(path: Path) -> None:
    async with opened(path) as (_, witness):
        for number in range(50):
            await witness.published(f"t{number % 5}", b"%d" % number * 100, retain=True)


async def mistake(path: Path) -> str:
    with pytest.raises(ConfigError) as wrong:
        async with opened(path):
            pass
    assert "\n" not in str(wrong.value)
    return str(wrong.value)


async def test_a_second_process_is_told_that_the_file_is_in_use(
    autojump_clock: MockClock, path: Path
) -> None:
    async with opened(path) as (_, witness):
        text = await mistake(path)
        assert text == (
            f"engine: {path} is in use by another process; stop that, or name another file"
        )
        await witness.published("a", b"1")


async def test_what_is_not_ours_is_refused_and_left_as_it_is(
    autojump_clock: MockClock, path: Path
) -> None:
    path.write_bytes(b"a letter to the editor\n" * 100)
    before = path.read_bytes()
    assert "is not a database" in await mistake(path)
    assert path.read_bytes() == before

    path.unlink()
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE letters (text)")
    db.close()
    before = path.read_bytes()
    assert "is a database of another program" in await mistake(path)
    assert path.read_bytes() == before

    path.unlink()
    await filled(path)
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 3")
    db.close()
    assert "has format 3, and this version knows 2" in await mistake(path)

    assert "not a directory" in await mistake(path / "log.db")
    assert "is a directory" in await mistake(path.parent)
    assert "there is no directory" in await mistake(path.parent / "nowhere" / "log.db")


async def test_a_damaged_file_is_refused_or_read_and_never_a_traceback(
    autojump_clock: MockClock, path: Path
) -> None:
    await filled(path)
    chance, whole, refused = random.Random(3), path.read_bytes(), 0
    for number in range(60):
        damaged = bytearray(whole)
        if number % 3 == 0:
            del damaged[chance.randrange(len(damaged)) :]
        else:
            place = chance.randrange(len(damaged) - 64)
            damaged[place : place + 64] = chance.randbytes(64)
        path.write_bytes(damaged)
        for end in ("-wal", "-shm", "-journal"):
            Path(f"{path}{end}").unlink(missing_ok=True)
        try:
            async with opened(path):
                pass
        except ConfigError as error:
            refused += 1
            assert str(path) in str(error)
            assert "\n" not in str(error)
            assert path.read_bytes() == bytes(damaged), "it is never overwritten"
    assert refused > 20


@pytest.mark.parametrize(
    "record",
    [Value("a", 1, Batch([])), Value("a", 1, Batch([b"1", b"2"])), Value("a", -1, Batch([b"1"])),
     Begin("a", "e1", -7), Begin("a", "e1", 2**63), Once("a", "k", None, 1, -1, "e1")],
)  # fmt: skip
async def test_a_record_that_cannot_be_is_damage_though_its_checksum_is_right(
    autojump_clock: MockClock, path: Path, record: Record
) -> None:
    await filled(path)
    with sqlite3.connect(path) as file:
        file.execute("INSERT INTO log SELECT MAX(seq) + 1, ? FROM log", (join([encode(record)]),))
    file.close()
    with pytest.raises(ConfigError, match="damaged"):
        async with opened(path):
            pass


async def test_only_its_owner_may_read_a_new_file(autojump_clock: MockClock, path: Path) -> None:
    async with opened(path):
        assert path.stat().st_mode & 0o777 == 0o600
        assert not Path(f"{path}-shm").exists()


def make_old(path: Path) -> None:
    """A file as it was made before pages were large."""
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA page_size = 4096")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("CREATE TABLE log (seq INTEGER PRIMARY KEY, records BLOB NOT NULL)")
        db.execute("INSERT INTO log VALUES (0, ?)", (encode(Meta()),))
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        db.execute("PRAGMA user_version = 1")
    db.close()


def pages(path: Path) -> int:
    """The bytes of a page of a file."""
    with sqlite3.connect(path) as db:
        (size,) = db.execute("PRAGMA page_size").fetchone()
    db.close()
    assert isinstance(size, int)
    return size


async def test_a_file_with_small_pages_is_used_as_it_is_and_gets_large_ones_when_compacted(
    autojump_clock: MockClock, path: Path
) -> None:
    make_old(path)
    await filled(path)
    assert pages(path) == 4096
    await compact(path)
    assert pages(path) == PAGE_BYTES
    before = path.read_bytes()
    assert (await inspect(path)).values == 5
    assert path.read_bytes() == before, "a look changes nothing"
    async with opened(path) as (engine, witness):
        assert engine.retained.get("t4") is not None
        await witness.published("t0", b"1")
    path.unlink()
    await filled(path)
    assert pages(path) == PAGE_BYTES


@pytest.mark.parametrize("is_old", [False, True])
async def test_commits_do_not_make_what_is_beside_the_file_longer(
    autojump_clock: MockClock, path: Path, is_old: bool
) -> None:
    if is_old:
        make_old(path)
    wal = Path(f"{path}-wal")
    async with opened(path) as (_, witness):
        assert wal.stat().st_size == WAL_BYTES
        for _ in range(60):
            await witness.published("a", *[bytes(1000)] * 100)
            assert wal.stat().st_size <= WAL_BYTES + 12 * PAGE_BYTES
    assert not wal.exists()


async def test_where_there_is_no_room_for_that_nothing_is_taken(
    autojump_clock: MockClock, path: Path
) -> None:
    with files_bounded(20 * PAGE_BYTES):
        async with opened(path) as (_, witness):
            assert Path(f"{path}-wal").stat().st_size < 10 * PAGE_BYTES
            await witness.published("a", b"1")


async def test_a_file_that_no_commit_waits_for_has_nothing_beside_it_in_advance(
    autojump_clock: MockClock, path: Path
) -> None:
    async with opened(path, "?sync=process"):
        assert Path(f"{path}-wal").stat().st_size < 10 * PAGE_BYTES
