"""A log is cleaned piece by piece: none is large, what is published goes in between, and wherever the work is
cut off, what is left says the same."""

import base64
import sqlite3
import tempfile
import zlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from broker.config.engine_url import parse_engine_url
from broker.config.settings import TopicRules
from broker.core.history import HistoryStore
from broker.core.messages import ClientInfo, Position
from broker.engines.engine import IdempotencyKey, Sink
from broker.engines.records import (
    FORMAT,
    Batch,
    Begin,
    Meta,
    Older,
    Run,
    encode,
    join,
    split,
)
from broker.engines.sqlite import (
    PIECE_BYTES,
    PIECE_PUBLICATIONS,
    SqliteEngine,
    _Batch,
    open_sqlite,
)
from broker.engines.sqlite_file import LogFile
from broker.engines.sqlite_upkeep import inspect
from broker.engines.waiting import BATCH_BYTES
from broker.testing import Witness, wait_in_line
from broker.testing.engines import kept
from tests.conftest import Disk
from tests.engines.conftest import ROOM, opened

T = TypeVar("T")

NEVER = 2**40
"""Spare bytes with which a log is not cleaned; with as many less than none it always is."""
WALL = 1e9


class Rows:
    """A log of these rows, as it is read at a start."""

    path = Path("log.db")
    meta = Meta()

    def __init__(self, rows: list[bytes]) -> None:
        self._rows = rows
        self.last_seq, self.bytes = len(rows), sum(map(len, rows))

    def rows(self) -> Iterator[bytes]:
        yield from self._rows


def read(rows: list[bytes]) -> SqliteEngine:
    """The engine of a broker that starts on a log of these rows."""
    file = cast(LogFile, Rows(rows))
    engine = SqliteEngine(file, "power", ROOM, ROOM, lambda: WALL, wait_in_line, NEVER)
    engine.replay(trio.current_time(), WALL + trio.current_time())
    return engine


def all_kept(engine: SqliteEngine, but: Collection[str]) -> tuple[Any, ...]:
    """Positions and histories, with their times in hundredths of seconds, but of some topics; values; keys."""
    topics = {}
    for topic in set(engine._store.topics()) - set(but):
        state = engine._store.state(topic)
        assert state is not None
        position, history = state
        dated = [] if history is None else history.dated()
        topics[topic] = position, [(round(when * 100), each) for when, each in dated]
    # Without their offsets: one that was not kept because its topic was forgotten on its way has one in the log.
    values = {value.topic: value.data for value in engine.retained.values()}
    keys = {(owner, key) for owner, key, _, _ in engine.keys.items()}
    return topics, values, keys


class Watched:
    """A disk that is read after each work, as a broker would that starts on what is there then."""

    def __init__(self) -> None:
        self.engine: SqliteEngine | None = None
        self.rows: list[bytes] | None = None
        self.cuts = 0

    async def __call__(self, work: Callable[[], T], /) -> T:
        self.check()
        await trio.lowlevel.checkpoint()
        result = work()
        if self.engine is not None:
            self.rows = list(self.engine._file.rows())
        with trio.CancelScope(shield=True):
            await trio.lowlevel.checkpoint()
        return result

    def check(self) -> None:
        """All of the work before has been given back now, so memory and the file are to agree."""
        if self.rows is not None and self.engine is not None:
            # By a look a topic ends that a reload has forgotten.
            for topic in list(self.engine._store.topics()):
                self.engine._store.state(topic)
            unwritten = self.engine._unwritten
            assert all_kept(read(self.rows), unwritten) == all_kept(self.engine, unwritten)
            self.cuts += 1


TOPICS = st.sampled_from("abc")
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("publish"), TOPICS, st.integers(1, 9), st.sampled_from([2, 5, 30])),
        st.tuples(st.just("publish"), TOPICS, st.integers(1, 9), st.sampled_from([2, 5, 30])),
        st.tuples(st.just("remove"), TOPICS),
        st.tuples(st.just("forget"), TOPICS),
        st.tuples(st.just("sleep"), st.sampled_from([0.1, 5.0])),
        st.tuples(st.just("turns"), st.integers(1, 60)),
        st.tuples(st.just("give up")),
    ),
    min_size=4,
    max_size=30,
)


async def live(directory: str, steps: list[Any]) -> None:
    disk = Watched()
    async with open_sqlite(
        parse_engine_url(f"sqlite:{directory}/log.db"),
        ROOM,
        ROOM,
        lambda: WALL + trio.current_time(),
        run_blocking=disk,
        spare_bytes=-NEVER,
        piece_bytes=100,  # one publication; and a row or two are deleted at once
    ) as engine:
        witness, disk.engine = Witness(engine), engine
        async with engine.running(witness), trio.open_nursery() as nursery:
            for number, (what, *said) in enumerate(steps):
                if what == "publish":
                    topic, count, size = said
                    info = ClientInfo(str(number), "ann", b"{}") if number % 2 else None
                    witness.publish(
                        topic,
                        *(b"%d.%d" % (number, each) * 100 for each in range(count)),
                        rules=TopicRules(history_size=size, history_ttl=1000),
                        retain=number % 3 == 0,
                        info=info,
                        key=IdempotencyKey("ann", str(number)) if count == 1 else None,
                    )
                elif what == "remove":
                    nursery.start_soon(engine.remove, said[0])
                elif what == "forget":
                    engine.forget(lambda topic, over=said[0]: topic == over)  # type: ignore[misc]
                    await trio.sleep(1)
                elif what == "sleep":
                    await trio.sleep(said[0])
                elif what == "give up":
                    engine._cleaning = None
                else:
                    for _ in range(said[0]):
                        await trio.lowlevel.checkpoint()
            await trio.sleep(1)
        disk.check()
        disk.engine = None


@settings(max_examples=60, deadline=None, report_multiple_bugs=False)
@given(STEPS)
def test_wherever_it_is_cut_off_a_log_says_what_is_kept(steps: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        trio.run(live, directory, steps, clock=MockClock(autojump_threshold=0))


class Noted(Disk):
    """A disk that notes the rows that were added to the log."""

    def __init__(self) -> None:
        super().__init__()
        self.engine: SqliteEngine | None = None
        self.rows: list[bytes] = []

    async def __call__(self, work: Callable[[], T], /) -> T:
        last = 0 if self.engine is None else self.engine._file.last_seq
        result = await super().__call__(work)
        if self.engine is not None and self.engine._file.last_seq > last:
            *_, row = self.engine._file.rows()
            self.rows.append(row)
        return result


async def until(is_so: Callable[[], bool]) -> None:
    for _ in range(10_000):
        if is_so():
            return
        await trio.lowlevel.checkpoint()
    raise AssertionError("it never is")


async def test_no_commit_holds_more_than_two_pieces_of_a_topic_however_large(
    autojump_clock: MockClock, path: Path
) -> None:
    many = TopicRules(history_size=10**6, history_ttl=3600)
    async with opened(path, spare_bytes=NEVER) as (_, witness):
        for _ in range(20):
            await witness.published("large", bytes(PIECE_BYTES // 2), rules=many)
        await witness.published("long", *[b"1"] * 3000, rules=many)
    disk = Noted()
    async with opened(path, disk=disk, spare_bytes=-NEVER) as (engine, witness):
        disk.engine = engine
        await witness.published("other", b"1")  # a look at the log follows each commit
        await until(lambda: engine._cleaning is not None and engine._cleaning.is_written)
    assert max(map(len, disk.rows)) < 2 * PIECE_BYTES
    counts = []
    for row in disk.rows:
        pieces = [each for each in split(row) if isinstance(each, Older)]
        batches = [batch for piece in pieces for run in piece.runs for batch in run.batches]
        counts.append(sum(len(batch.data) for batch in batches))
    assert sum(counts) >= 20 + 3000
    assert max(counts) < 2 * PIECE_PUBLICATIONS
    async with opened(path) as (engine, _):
        assert [len(each) for each in await kept(engine, "large")] == [PIECE_BYTES // 2] * 20
        assert await kept(engine, "long") == [b"1"] * 3000


async def test_what_is_published_while_a_topic_is_copied_waits_for_one_piece(
    autojump_clock: MockClock, path: Path
) -> None:
    async with opened(path, spare_bytes=NEVER) as (_, witness):
        for number in range(40):
            await witness.published("large", b"%d" % number * (PIECE_BYTES // 4))
    disk = Noted()
    async with opened(path, disk=disk, spare_bytes=-NEVER) as (engine, witness):
        disk.engine = engine
        await witness.published("other", b"1")
        await until(lambda: engine._cleaning is not None)
        for number in range(3):
            works = disk.works
            position = await witness.published(("large", "other")[number % 2], b"now")
            assert position is not None
            # The piece that was under way, and the commit with this publication.
            assert disk.works - works <= 2
        cleaning = engine._cleaning
        assert cleaning is not None
        assert not cleaning.is_written, "that was meanwhile"
        await until(lambda: engine._cleaning is not cleaning)
    async with opened(path) as (engine, _):
        history, top = engine.history("large", None, -1, False)
        assert [each.offset for each in history] == list(range(1, top.offset + 1))
        assert [each.data[:1] for each in history[-3:]] == [b"3", b"n", b"n"]


async def test_topics_are_put_in_order_in_several_steps_that_published_to_longest_ago_first(
    autojump_clock: MockClock, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broker.engines.sqlite.LISTED_AT_ONCE", 16)
    names = [f"t{number * 7 % 50}" for number in range(50)]
    used_at, gather = HistoryStore.used_at, SqliteEngine._gather
    steps, at_once = [0], list[int]()

    def note(store: HistoryStore, topic: str) -> float:
        steps[-1] += 1
        return used_at(store, topic)

    def note_step(engine: SqliteEngine, sink: Sink) -> _Batch:
        steps.append(0)
        batch = gather(engine, sink)
        at_once.append(steps[-1])
        return batch

    monkeypatch.setattr(HistoryStore, "used_at", note)
    monkeypatch.setattr(SqliteEngine, "_gather", note_step)
    async with opened(path, spare_bytes=NEVER) as (_, witness):
        for topic in (*sorted(names), *names):  # they begin in another order
            await witness.published(topic, b"1")
            await trio.sleep(0.01)
    disk = Noted()
    async with opened(path, disk=disk, spare_bytes=-NEVER) as (engine, witness):
        disk.engine = engine
        await witness.published("t7", b"2")
        await until(lambda: engine._cleaning is not None)
        cleaning = engine._cleaning
        await until(lambda: engine._cleaning is not cleaning)
    assert set(at_once) == {0, 2, 16}
    assert steps == [0, *at_once], "all is done beside what is published"
    written = [each for row in disk.rows for each in split(row) if isinstance(each, Begin)]
    names.remove("t7")
    assert [each.topic for each in written][:50] == [*names, "t7"]


async def test_a_log_that_is_flooded_while_it_is_cleaned_does_not_grow_for_ever(
    autojump_clock: MockClock, path: Path
) -> None:
    spare, count = 2 * BATCH_BYTES, 16
    few = TopicRules(history_size=count, history_ttl=3600)
    async with opened(path, spare_bytes=spare) as (engine, witness):
        longest = 0
        for _ in range(60):
            for _ in range(count):
                witness.publish("flood", bytes(BATCH_BYTES // count), rules=few)
            await until(lambda: not engine.statistics().waiting)
            longest = max(longest, engine.statistics().log_bytes)
        assert spare < longest < 12 * BATCH_BYTES


async def test_pieces_of_a_cleaning_whose_beginning_was_deleted_are_passed_over(
    autojump_clock: MockClock, path: Path
) -> None:
    async with opened(path) as (engine, witness):
        position = await witness.published("a", b"1", b"2")
        assert position is not None
    for epoch in (position.epoch, "another"):
        file = LogFile.open(path, "power")
        run = Run("a", int(WALL * 1000), 9, 60.0, [Batch([b"wrong"])])
        file.append(join([encode(Older("a", epoch, 1, 1, [run], True))]))
        file.append(join([encode(Older("nowhere", epoch, 1, 1, [run], True))]))
        file.close()
        async with opened(path) as (engine, _):
            assert await kept(engine, "a") == [b"1", b"2"]
            assert engine.position("a") == position
            assert engine._store.state("nowhere") is None


OLD_FILE = (
    "c-rmV&rj1}9LMpe-4qoED2aL?rU#;6m}%F}xdR=WHikHd&KbkSq>Mtq$z;qQM<L!k0ZR-whanPA{s$s(ATflC7ZVf1&5"
    "Jkx0H3jm&de<FVoctzv`L?DzMnSzKE3zmjpRhp)5h|Jdu~xP#eh&%F`#Ke2(@<ppvcqz+q!a!Vj(v!8dJsjtP-d+#$F3"
    "~00000000000000000000000000002+pUWsMCp$Zp+4iD4lJj!;ae1hh(oQ_%Xqk8->1eW`^~`wF+F&Z<TyfIc_4MGic"
    "zRg7>J0a31uvT~jLv9@<WNFO4P~^{tz@z{U`NE^{w`rB`nzI_u{*I|`<wmNer7*p;s5{u00000000000000000000000"
    "2~DdpTRi@8%r{Nkx~d8;QWS8XM=?5-LkhVB|8k;;$JdzX~5yCW~Yd|2razW4F%ZLgA>FD-5=p-siyRIIhN_4OBPvUt3t"
    "u1r6e@QSPMs2lcNBV74+dZ2W$?D|XdvRQV@!s+KNWq0|m{?eVA+P}53|Ja`$MqP*6pd(b*;cL)g)^+$BbXavA2lhK+Tc"
    "Wi#rI7H6$<oK}(Xi*~dN>;lXZ2{%x)8O3@+HTDmZwJzE38K%*4WDZ{3EZhp>!Vei9Y8{+nmfFTJTi|6Y7vR`gG#!ZCO0"
    "Kq*RLy$1BJ6xH?#~-6wL<<%L;U@A>0)%-1%e_C98t44H3UJ!uxI?8!!LOlClahCi>rYZeMspR_l9^Qa6>>`v}B3mMhW-"
    "lm$ZGPKj(ZZ`|*)zIFzB5N1_=7awZ2KNxz"
)
"""As format 1 had it: cleaned once, and published to after that."""


async def test_a_file_of_format_1_is_read_and_cleaned_and_has_the_new_format_then(
    autojump_clock: MockClock, path: Path
) -> None:
    path.write_bytes(zlib.decompress(base64.b85decode(OLD_FILE)))
    before = path.read_bytes()
    assert (await inspect(path)).publications == 3
    assert path.read_bytes() == before, "to look at it changes nothing"
    assert format_of(path) == 1
    for spare in (NEVER, -NEVER, NEVER):
        async with opened(path, spare_bytes=spare, piece_bytes=1) as (engine, _):
            history, top = engine.history("a", None, -1, False)
            assert top == Position(10, "1b10a1b7")
            assert [each.data for each in history] == [b"2", b"3", b"4"]
            assert [each.offset for each in history] == [8, 9, 10]
            assert engine.position("quiet") == Position(2, "ada5ea15")
            assert [value.data for value in engine.retained.values()] == [b"3"]
            assert engine.keys.get("ann", ("a", "k2"), trio.current_time()) is not None
            await trio.sleep(1)
        assert format_of(path) == FORMAT == 2


def format_of(path: Path) -> int:
    db = sqlite3.connect(path)
    (version,) = db.execute("PRAGMA user_version").fetchone()
    db.close()
    return int(version)
