"""Nobody is told a lie after a crash, whenever it comes and whatever was going on.

A crash is a copy of the file, and of what SQLite has beside it, in the middle of the work: what a
process that is killed leaves. A script of steps goes on with that copy. The truth is one map from a
topic, an epoch and an offset to what was published there; it must never get a second meaning.
"""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import attrs
import trio
from hypothesis import example, given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from broker.config.engine_url import parse_engine_url
from broker.config.settings import TopicRules
from broker.core.messages import Position, Publication
from broker.core.session import Parcel
from broker.engines.sqlite import SqliteEngine, open_sqlite
from broker.engines.sqlite_file import NotWritten
from broker.errors import Refused
from broker.testing import Witness

T = TypeVar("T")

KEPT = TopicRules(history_size=6, history_ttl=100)
OFF = TopicRules(history_size=0)
TOPICS = ("a", "b", "c")
ROOM = 8 * 2**10
"""So little that topics push each other out."""


class Truth(Witness):
    """All that was ever delivered, over all lives of the engine."""

    def __init__(self) -> None:
        self.at: dict[tuple[str, str, int], bytes] = {}
        self.stale: set[tuple[str, str]] = set()
        """Topics with epochs in which something was published that no history has."""

    def begin(self, engine: SqliteEngine, disk: "Disk") -> None:
        super().__init__(engine)
        self.disk = disk

    def deliver(self, parcel: Parcel, *, retain: bool) -> float:
        if self.disk.copy is not None:
            return 0.0  # nobody is there any more to get it
        work = super().deliver(parcel, retain=retain)
        epoch = self.engine.position(parcel.topic).epoch
        for batch in parcel.batches:
            for publication in batch:
                self.note(parcel.topic, epoch, publication)
        return work

    def note(self, topic: str, epoch: str, publication: Publication) -> None:
        if publication.offset:
            key = topic, epoch, publication.offset
            assert self.at.setdefault(key, publication.data) == publication.data, "a second meaning"

    def check(self) -> None:
        """Ask for each position that anybody may have, as a client that comes back would."""
        engine = self.engine
        for topic in TOPICS:
            publications, top = engine.history(topic, None, -1, False)
            assert [each.offset for each in publications] == list(
                range(top.offset - len(publications) + 1, top.offset + 1)
            )
            for publication in publications:
                self.note(topic, top.epoch, publication)
        for topic, epoch, offset in list(self.at):
            top = engine.position(topic)
            assert top.epoch != epoch or top.offset >= offset, "delivered, and not kept"
            view = engine.view(topic, Position(offset, epoch))
            if not view.recovered:
                continue
            assert (topic, epoch) not in self.stale, "something is missing that was published"
            assert view.top.epoch == epoch
            for n, publication in enumerate(view.missed, offset + 1):
                assert publication.offset == n
                assert self.at[topic, epoch, n] == publication.data
            assert view.top.offset == offset + len(view.missed)


@attrs.define
class Disk:
    """Where the file is, and what becomes of work on it."""

    path: Path
    is_full: bool = False
    crashes_in: int = -1
    copy: Path | None = None

    async def __call__(self, work: Callable[[], T], /) -> T:
        await trio.lowlevel.checkpoint()
        if self.is_full:
            raise NotWritten("database or disk is full")
        result = work()
        if self.crashes_in == 0 and self.copy is None:
            self.copy = self.take_copy()
        self.crashes_in -= 1
        with trio.CancelScope(shield=True):
            await trio.lowlevel.checkpoint()
        return result

    def take_copy(self) -> Path:
        """The file as a kill would leave it now."""
        copy = self.path.with_name(f"{int(self.path.stem) + 1}.db")
        for end in ("", "-wal"):
            source = Path(f"{self.path}{end}")
            if source.exists():
                shutil.copy(source, f"{copy}{end}")
        return copy


topics = st.sampled_from(TOPICS)
steps = st.one_of(
    st.tuples(st.just("publish"), topics, st.integers(1, 8)),
    st.tuples(st.just("publish"), topics, st.integers(1, 3)),
    st.tuples(st.just("ask"), topics),
    st.tuples(st.just("remove"), topics),
    st.tuples(st.just("off"), topics),
    st.tuples(st.just("squeeze"), st.integers(1, 4)),
    st.tuples(st.just("sleep"), st.sampled_from([1.0, 50.0, 101.0])),
    st.tuples(st.just("full"), st.sampled_from([True, False])),
    st.tuples(st.just("turns"), st.integers(0, 6)),
    st.tuples(st.just("crash"), st.integers(0, 4)),
    st.tuples(st.just("restart")),
)


class Life:
    """One script."""

    def __init__(self, directory: Path, script: list[Any]) -> None:
        self.disk = Disk(directory / "0.db")
        self.truth = Truth()
        self.script = script
        self.number = 0

    async def run(self) -> None:
        while self.script:
            self.disk = Disk(self.disk.path)
            # Read by the real disk; the full one is for a broker that serves.
            async with open_sqlite(
                parse_engine_url(f"sqlite:{self.disk.path}?sync=process"),
                ROOM,
                ROOM,
                lambda: 1e9 + trio.current_time(),
                run_blocking=self.disk,
                spare_bytes=-(2**40) if len(self.script) % 2 else 2**10,
                piece_bytes=32 if len(self.script) % 3 else 400,
            ) as engine:
                self.truth.begin(engine, self.disk)
                self.truth.check()
                with trio.CancelScope() as scope:
                    async with engine.running(self.truth):
                        crashed = await self.live(engine)
                        if crashed:
                            scope.cancel()
                self.disk.is_full = False
            if crashed:
                assert self.disk.copy is not None
                self.disk.path = self.disk.copy

    async def live(self, engine: SqliteEngine) -> bool:
        """Do steps until one ends this life; whether that is by a crash."""
        while self.script:
            what, *given = self.script.pop(0)
            if what == "crash":
                self.disk.crashes_in = given[0]
                for _ in range(4 * given[0]):
                    await trio.lowlevel.checkpoint()
                if self.disk.copy is None:
                    self.disk.copy = self.disk.take_copy()
                return True
            if what == "restart":
                return False
            await self.do(engine, what, *given)
            if self.disk.copy is None:
                self.truth.check()
        return False

    async def do(self, engine: SqliteEngine, what: str, *given: Any) -> None:
        try:
            if what == "publish":
                self.publish(given[0], given[1], KEPT)
            elif what == "ask":
                engine.position(given[0])
            elif what == "remove":
                with trio.move_on_after(0):
                    await engine.remove(given[0])
            elif what == "off":
                self.switch_off(given[0])
            elif what == "squeeze":
                for number in range(given[0]):
                    self.truth.publish("other", b"%d" % number * 1000, rules=KEPT)
            elif what == "sleep":
                await trio.sleep(given[0])
            elif what == "full":
                self.disk.is_full = given[0]
            else:
                for _ in range(given[0]):
                    await trio.lowlevel.checkpoint()
        except Refused as refused:
            assert refused.temporary

    def publish(self, topic: str, count: int, rules: TopicRules) -> None:
        self.number += 1
        data = [b"%d.%d" % (self.number, n) for n in range(count)]
        self.truth.publish(topic, *data, rules=rules)

    def switch_off(self, topic: str) -> None:
        """The topic keeps no history for a moment, in which something is published to it."""
        self.truth.engine.forget(lambda name: name == topic)
        known = {(name, epoch) for name, epoch, _ in self.truth.at if name == topic}

        def note(publication: Publication) -> None:
            self.truth.stale |= known
            self.truth.listeners[topic].remove(note)

        self.truth.listeners.setdefault(topic, []).append(note)
        try:
            self.publish(topic, 1, OFF)
        except Refused:
            self.truth.listeners[topic].remove(note)
            raise


@settings(max_examples=100, deadline=None, report_multiple_bugs=False)
@given(st.lists(steps, min_size=1, max_size=25))
@example([("publish", "a", 1), ("turns", 6), ("off", "a"), ("crash", 0), ("ask", "a")])
def test_a_position_never_gets_a_second_meaning(script: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        life = Life(Path(directory), list(script))
        trio.run(life.run, clock=MockClock(autojump_threshold=0))
