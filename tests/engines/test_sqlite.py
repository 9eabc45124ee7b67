"""The sqlite engine where the contract says nothing: a disk that fails, commits, files, fds, cleaning."""

import shutil
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path

import pytest
import structlog.testing
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from broker.config.engine_url import parse_engine_url
from broker.config.settings import TopicRules
from broker.core.messages import ClientInfo, Position, Publication
from broker.core.session import Parcel
from broker.core.work import ROUND, Allowance
from broker.engines.engine import IdempotencyKey, Submission
from broker.engines.records import Forgotten, Meta, Record, split
from broker.engines.sqlite import UNWRITTEN_AT_ONCE, SqliteEngine, open_sqlite
from broker.engines.sqlite_file import PAGE_BYTES, LogFile
from broker.engines.waiting import BATCH_BYTES, FULL_BYTES
from broker.errors import Refused
from broker.testing import Witness, wait_in_line
from broker.testing.engines import NO_HISTORY, kept
from tests.conftest import Disk
from tests.engines.conftest import ROOM, _wall_clock, files_bounded, opened

Open = Callable[..., AbstractAsyncContextManager[tuple[SqliteEngine, Witness]]]


# commits


async def test_what_comes_while_a_commit_is_under_way_is_in_the_next_one(
    autojump_clock: MockClock, path: Path
) -> None:
    disk = Disk()
    async with opened(path, disk=disk) as (_, witness):
        before = disk.works
        disk.hold()
        witness.publish("a", b"1")
        await wait_all_tasks_blocked()
        for number in range(100):
            witness.publish(f"t{number % 3}", b"%d" % number)
        await wait_all_tasks_blocked()
        assert (witness.delivered, witness.answers) == ({}, [])
        disk.release()
        await wait_all_tasks_blocked()
        assert disk.works == before + 2
        assert len(witness.answers) == 101


async def test_what_has_no_history_waits_for_no_disk(autojump_clock: MockClock, path: Path) -> None:
    disk = Disk()
    async with opened(path, disk=disk) as (_, witness):
        disk.hold()
        witness.publish("kept", b"1")
        witness.publish("passing", b"2", rules=NO_HISTORY)
        assert witness.data("passing") == [b"2"]
        assert witness.data("kept") == []
        disk.release()


async def test_a_topic_goes_by_the_file_for_as_long_as_something_of_it_is_on_its_way(
    autojump_clock: MockClock, path: Path
) -> None:
    disk = Disk()
    async with opened(path, disk=disk) as (engine, witness):
        for _ in range(2):
            disk.hold()
            witness.publish("a", b"1")
            witness.publish("a", b"2")
            await wait_all_tasks_blocked()
            assert engine.defers("a", NO_HISTORY), "it would overtake them"
            disk.release()
            await wait_all_tasks_blocked()
            assert not engine.defers("a", NO_HISTORY)


async def test_topics_that_are_forgotten_are_in_several_commits_and_those_in_use_first(
    autojump_clock: MockClock, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, commits = 3 * UNWRITTEN_AT_ONCE, list[list[Record]]()
    append = LogFile.append

    def note(file: LogFile, row: bytes, meta: Meta | None = None) -> None:
        commits.append([*split(row)] if row else [])
        append(file, row, meta)

    async with opened(path) as (engine, witness):
        for number in range(count):
            witness.publish(f"t{number}", b"1")
        await witness.published("mine", b"1")
        before = [engine.position(f"t{number}") for number in range(count)]
        monkeypatch.setattr(LogFile, "append", note)
        engine.forget(lambda topic: topic.startswith("t"))
        assert engine.defers("t9", NO_HISTORY), "its former epoch is in the log"
        await witness.published("t9", b"2", rules=NO_HISTORY)
        await witness.published("mine", b"2")
        assert await kept(engine, "t8") == []
        await trio.sleep(3)
        forgotten = [[each for each in row if isinstance(each, Forgotten)] for row in commits]
        assert max(map(len, forgotten)) <= UNWRITTEN_AT_ONCE + 1
        assert len([each for each in forgotten if each]) >= 3
        assert Forgotten("t9") in commits[0]
    async with opened(path) as (engine, _):
        assert await kept(engine, "mine") == [b"1", b"2"]
        assert engine.statistics().history.topics == 1
        assert not {engine.position(f"t{n}").epoch for n in range(count)} & {
            each.epoch for each in before
        }


async def test_it_is_full_when_4_mib_wait_and_tells_who_waits_for_room(
    autojump_clock: MockClock, path: Path
) -> None:
    disk = Disk()
    async with opened(path, disk=disk) as (engine, witness):
        disk.hold()
        said = 0
        while not engine.is_full():
            witness.publish("a", bytes(2**18))
            said += 1
        assert said == FULL_BYTES // 2**18
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.wait_room)
            await wait_all_tasks_blocked()
            assert engine.statistics().waiting >= FULL_BYTES
            disk.release()
        assert engine.statistics().waiting < FULL_BYTES


async def test_a_publication_waits_for_a_commit_and_its_own_and_not_for_a_flood(
    autojump_clock: MockClock, path: Path
) -> None:
    disk = Disk()
    async with opened(path, disk=disk) as (engine, witness):
        disk.hold()
        flooder, bystander = Allowance(), Allowance()
        before: list[int] = []
        witness.listeners["a"] = [lambda _: before.append(len(witness.delivered["flood"]))]
        large = bytes(BATCH_BYTES // 4)
        while not engine.is_full(flooder):
            witness.publish("flood", large, payer=flooder)
        await wait_all_tasks_blocked()  # one batch is under way
        assert not engine.is_full(bystander, 1)
        witness.publish("a", b"1", payer=bystander)
        disk.release()
        await witness.published("flood", b"last", payer=flooder)
        assert before == [4], "those that were under way"
        assert len(witness.delivered["flood"]) == FULL_BYTES // len(large) + 1


async def test_a_stop_keeps_what_was_submitted_and_refuses_what_the_disk_does_not_take(
    autojump_clock: MockClock, path: Path
) -> None:
    async with opened(path) as (_, witness):
        witness.publish("a", b"1")
    assert [type(each) for each in witness.answers] == [Position]
    disk = Disk()
    async with opened(path, disk=disk, runs=False) as (engine, witness):
        began = trio.current_time()
        async with engine.running(witness):
            disk.hold()
            witness.publish("a", b"2")
        assert trio.current_time() - began == 5
        (refusal,) = witness.answers
        assert isinstance(refusal, Refused)
        disk.release()
    async with opened(path) as (engine, _):
        assert await kept(engine, "a") == [b"1"]


async def test_others_have_their_turn_while_a_large_batch_is_given_back(
    autojump_clock: MockClock, path: Path
) -> None:
    class Costly(Witness):
        def deliver(self, parcel: Parcel, *, retain: bool) -> float:
            super().deliver(parcel, retain=retain)
            seen.append("deliver")
            return ROUND

    seen: list[str] = []
    disk = Disk()
    async with opened(path, disk=disk, runs=False) as (engine, _):
        sink = Costly(engine)
        async with engine.running(sink), trio.open_nursery() as nursery:
            disk.hold()
            sink.publish("a", b"first")
            await wait_all_tasks_blocked()
            for number in range(10):
                sink.publish(f"t{number}", b"1")
            disk.release()

            async def others() -> None:
                for _ in range(200):
                    await trio.lowlevel.checkpoint()
                    if seen and seen[-1] == "deliver":
                        seen.append("others")

            nursery.start_soon(others)
    assert seen.count("deliver") == 11
    # Within one turn of the loop Trio's order is random: at the end of one, and first in the next.
    assert "deliver deliver deliver" not in " ".join(seen)


# a disk that fails


async def test_a_full_disk_refuses_what_is_to_be_kept_and_nothing_else_until_there_is_room(
    autojump_clock: MockClock, path: Path
) -> None:
    disk = Disk()
    with structlog.testing.capture_logs() as lines:
        async with opened(path, disk=disk) as (engine, witness):
            first = await witness.published("a", b"1")
            assert first is not None
            disk.failure = "database or disk is full"
            with pytest.raises(Refused) as refused:
                await witness.published("a", b"lost")
            assert refused.value.code == 100
            assert refused.value.temporary
            assert refused.value.message == "not kept: database or disk is full"
            assert engine.statistics().failing == "database or disk is full"
            with pytest.raises(Refused):
                witness.publish("a", b"refused at once")
            with pytest.raises(Refused):
                await engine.remove("a")
            witness.publish("passing", b"2", rules=NO_HISTORY)
            assert witness.data("passing") == [b"2"]
            assert await kept(engine, "a") == [b"1"]
            fresh = engine.position("fresh")
            assert engine.view("a", Position(0, first.epoch)).recovered
            await trio.sleep(30)
            disk.failure = ""
            await trio.sleep(2)
            assert engine.statistics().failing == ""
            assert await witness.published("a", b"2") == Position(2, first.epoch)
            assert engine.position("fresh") == fresh
    events = [line["event"] for line in lines if line["event"].startswith("engine_")]
    assert events == ["engine_opened", "engine_failing", "engine_recovered"]
    async with opened(path) as (engine, _):
        assert await kept(engine, "a") == [b"1", b"2"]
        assert engine.position("a") == Position(2, first.epoch)
        assert engine.position("fresh") == fresh


async def test_tries_again_come_ever_later_and_every_two_seconds_at_last(
    autojump_clock: MockClock, path: Path
) -> None:
    disk = Disk()
    async with opened(path, disk=disk) as (_, witness):
        disk.failure = "disk I/O error"
        with pytest.raises(Refused):
            await witness.published("a", b"1")
        before = disk.works
        await trio.sleep(0.35)
        assert disk.works == before + 2  # after 0.1 and 0.2 more
        await trio.sleep(3.0)
        before = disk.works
        await trio.sleep(20)
        assert disk.works == before + 10
        disk.failure = ""


async def test_what_waits_behind_a_commit_that_fails_is_refused_with_it(
    autojump_clock: MockClock, path: Path
) -> None:
    disk = Disk()
    async with opened(path, disk=disk) as (engine, witness):
        disk.hold()
        witness.publish("a", b"1")
        await wait_all_tasks_blocked()
        witness.publish("a", b"2")
        removed: list[Refused] = []

        async def remove() -> None:
            try:
                await engine.remove("a")
            except Refused as refused:
                removed.append(refused)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(remove)
            await wait_all_tasks_blocked()
            disk.failure = "database or disk is full"
            disk.release()
        assert len(removed) == 1
        assert [type(each) for each in witness.answers] == [Refused, Refused]
        assert engine.statistics().waiting == 0
        disk.failure = ""


async def test_what_was_let_in_before_the_disk_failed_and_is_submitted_later_is_refused(
    autojump_clock: MockClock, path: Path
) -> None:
    disk = Disk()
    async with opened(path, disk=disk) as (engine, witness):
        rules = TopicRules(history_size=10, history_ttl=60)
        assert engine.defers("a", rules)
        disk.failure = "database or disk is full"
        witness.publish("b", b"1")
        await wait_all_tasks_blocked()
        assert engine.statistics().failing == disk.failure
        witness.answers.clear()
        parcel = Parcel("a", "close", [[Publication("a", b"2")]])
        engine.submit(Submission(parcel, rules, True, False, None, [witness.answers.append]))
        await wait_all_tasks_blocked()
        assert [type(each) for each in witness.answers] == [Refused]
        assert engine.statistics().waiting == 0
        disk.failure = ""


async def test_a_write_that_really_fails_leaves_no_hole_and_a_whole_file(
    autojump_clock: MockClock, path: Path
) -> None:
    async with opened(path) as (engine, witness):
        await witness.published("a", b"1")
        # Of the nine pages of this commit some are written, and the next is not.
        with files_bounded(8 * PAGE_BYTES), pytest.raises(Refused) as refused:
            await witness.published("a", *[bytes(1000)] * 100)
        assert refused.value.temporary
        await trio.sleep(1)
        position = await witness.published("a", b"2")
        assert position is not None
        assert position.offset == 2
    async with opened(path) as (engine, _):
        assert await kept(engine, "a") == [b"1", b"2"]
    file = LogFile.open(path, "power")
    assert file.problems() == []
    file.close()


async def test_a_text_that_cannot_be_written_refuses_their_publication_alone(
    autojump_clock: MockClock, path: Path
) -> None:
    async with opened(path) as (engine, witness):
        with pytest.raises(Refused):
            await witness.published("a", b"1", info=ClientInfo("7", "half \ud83d"))
        assert await witness.published("a", b"2") == engine.position("a")


# the start


def copy_of(path: Path) -> Path:
    return Path(shutil.copy(path, path.with_suffix(".copy")))


# epochs, when a tail may be lost


def rewrite_meta(path: Path, meta: Meta) -> None:
    file = LogFile.open(path, "power")
    file.append(b"", meta)
    file.close()


@pytest.mark.parametrize(
    ("meta", "renewed"),
    [
        (Meta("another boot", "process", False), True),
        (Meta("another boot", "process", True), False),
        (Meta("another boot", "power", False), False),
        (Meta("", "process", False), True),
    ],
)
async def test_epochs_begin_anew_where_the_power_may_have_taken_a_tail(
    autojump_clock: MockClock, path: Path, meta: Meta, *, renewed: bool
) -> None:
    async with opened(path, "?sync=process") as (engine, witness):
        before = await witness.published("a", b"1", b"2")
        assert before is not None
        quiet = engine.position("quiet")
    rewrite_meta(path, meta)
    epochs = set()
    for _ in range(2):
        async with opened(path, "?sync=process") as (engine, witness):
            now = engine.position("a")
            epochs.add(now.epoch)
            assert now.offset == 2
            assert await kept(engine, "a") == [b"1", b"2"]
            assert (now.epoch != before.epoch) is renewed
            assert (engine.position("quiet") != quiet) is renewed
            assert engine.view("a", before).recovered is not renewed
    assert len(epochs) == 1


async def test_a_kill_renews_nothing_while_the_machine_runs(
    autojump_clock: MockClock, path: Path
) -> None:
    async with opened(path, "?sync=process") as (engine, witness):
        before = await witness.published("a", b"1")
        copy = copy_of(path)
        shutil.copy(f"{path}-wal", f"{copy}-wal")
    async with opened(copy, "?sync=process") as (engine, _):
        assert engine.position("a") == before


# time


async def test_a_ttl_goes_on_while_nobody_is_there(autojump_clock: MockClock, path: Path) -> None:
    short = TopicRules(history_size=10, history_ttl=60)
    async with opened(path) as (_, witness):
        await witness.published("a", b"1", rules=short)
        await trio.sleep(30)
        await witness.published("a", b"2", rules=short)
        await witness.published("b", b"3", key=IdempotencyKey("ann", "k"))
    await trio.sleep(40)
    async with opened(path) as (engine, _):
        assert await kept(engine, "a") == [b"2"]
        assert engine.keys.get("ann", ("b", "k"), trio.current_time()) is not None
        await trio.sleep(21)
        assert await kept(engine, "a") == []
        await trio.sleep(240)
        assert engine.keys.get("ann", ("b", "k"), trio.current_time()) is None


async def test_a_wall_clock_that_was_set_back_makes_nothing_younger_than_new(
    autojump_clock: MockClock, path: Path
) -> None:
    short = TopicRules(history_size=10, history_ttl=60)
    async with opened(path) as (_, witness):
        await witness.published("a", b"1", rules=short)
    url = parse_engine_url(f"sqlite:{path}")
    earlier = partial(_wall_clock, 1e9 - 10_000)
    async with open_sqlite(url, ROOM, ROOM, earlier, run_blocking=wait_in_line) as engine:
        assert await kept(engine, "a") == [b"1"]
        await trio.sleep(61)
        assert await kept(engine, "a") == []


# cleaning


async def test_the_log_stays_within_its_bound_whatever_is_published(
    autojump_clock: MockClock, path: Path
) -> None:
    few = TopicRules(history_size=5, history_ttl=3600)
    async with opened(path, spare_bytes=2**18) as (engine, witness):
        longest = 0
        for number in range(400):
            topic = f"t{number % 7}"
            await witness.published(topic, bytes(8192), rules=few, retain=number % 50 == 0)
            longest = max(longest, engine.statistics().log_bytes)
        kept_bytes = engine.statistics().history.bytes + engine.retained.statistics().bytes
        assert 2**18 < longest < 3 * kept_bytes + 2 * 2**18
        positions = {f"t{n}": engine.position(f"t{n}") for n in range(7)}
        histories = {topic: engine.history(topic, None, -1, False)[0] for topic in positions}
        values = list(engine.retained.values())
    assert path.stat().st_size < 4 * longest
    async with opened(path) as (engine, _):
        assert {topic: engine.position(topic) for topic in positions} == positions
        assert {t: engine.history(t, None, -1, False)[0] for t in positions} == histories
        assert list(engine.retained.values()) == values


async def test_a_topic_that_is_never_published_to_again_survives_a_cleaning(
    autojump_clock: MockClock, path: Path
) -> None:
    async with opened(path, spare_bytes=2**16) as (engine, witness):
        position = await witness.published(
            "old", b"1", b"2", retain=True, key=IdempotencyKey(None, "k")
        )
        for _ in range(200):
            await witness.published("busy", bytes(4096), rules=TopicRules(history_size=2))
        await wait_all_tasks_blocked()
        assert engine.statistics().log_bytes < 2**18
    async with opened(path) as (engine, _):
        assert engine.position("old") == position
        assert await kept(engine, "old") == [b"1", b"2"]
        assert engine.keys.get(None, ("old", "k"), trio.current_time()) is not None


# fds


async def test_fds_go_on_after_a_kill_beyond_all_that_may_have_been_given_out(
    autojump_clock: MockClock, path: Path
) -> None:
    async with opened(path) as (engine, _):
        assert engine.next_fd == 1
        engine.note_fds(60_000)
        await wait_all_tasks_blocked()
        copy = copy_of(path)
        shutil.copy(f"{path}-wal", f"{copy}-wal")
    async with opened(copy) as (engine, _):
        assert engine.next_fd == 160_000
    async with opened(path) as (engine, _):
        assert engine.next_fd == 60_000
    async with opened(path, first_fd=70_000) as (engine, _):
        assert engine.next_fd == 70_000
