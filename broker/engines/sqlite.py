"""The sqlite engine: a publication is in a file before it is delivered and acknowledged.

One task takes all that waits, commits it in a thread, and gives it back run by run. There is no
lingering for more: the commit before is the linger, so a lone publication waits for one commit and
a busy broker has thousands in each.

Words: a *batch* is what one commit holds; a topic is *unwritten* while the log does not know its
epoch, or still has one that was forgotten; to *clean* the log is to write anew what is kept, piece by piece
beside what is published meanwhile, and then delete all rows before that.

Rules:

1. Memory changes when the log has, in its order. Only epochs begin and are forgotten at once, because a
   subscriber does not wait: then the topic is unwritten, and the next commit that brings something to it says first
   where it is; if none does, one of the next.
2. Offsets are given when a commit has succeeded, never before: one that fails leaves no hole.
3. While a topic has something on its way, all that is published to it goes that way.

A publication of a topic without history, and a direct message, need no engine and wait for nobody.

Not promised: that something is *not* kept which was not acknowledged. A publication that is
refused is not kept; one whose publisher never got an answer may be.
"""

import heapq
import secrets
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, nullcontext
from functools import partial
from hashlib import blake2s
from itertools import islice
from pathlib import Path
from typing import Final, cast

import attrs
import msgspec
import structlog
import trio

from broker.config.engine_url import EngineUrl, Sync
from broker.config.settings import TopicRules
from broker.core.messages import Delivery, Fd, Position, Publication
from broker.core.scopes import name_scope
from broker.core.shares import text_bytes
from broker.core.topic_history import History
from broker.core.work import COMMAND, PUBLICATION, ROUND, Allowance
from broker.engines.copies import Copies
from broker.engines.disk_thread import open_disk_thread
from broker.engines.engine import (
    SUBMISSION_BYTES,
    Durability,
    EngineStatistics,
    RunBlocking,
    Sink,
    Submission,
)
from broker.engines.memory import Memory, new_epoch
from broker.engines.records import (
    BadRecord,
    Batch,
    Begin,
    Forgotten,
    Meta,
    Older,
    Once,
    Record,
    Removed,
    Renewed,
    Run,
    Stands,
    Value,
    encode,
    join,
    split,
)
from broker.engines.sqlite_file import LogFile, NotWritten, damaged
from broker.engines.waiting import BATCH_BYTES, BATCH_PUBLICATIONS, LITTLE_BYTES, Waiting
from broker.errors import ConfigError, ErrorCode, Refused

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("broker")

SPARE_BYTES: Final = 64 * 2**20
"""The log is cleaned when it is longer than this and twice what is kept: so all is written at most
twice, and a small broker never cleans."""

PIECE_BYTES: Final = 2**19
PIECE_PUBLICATIONS: Final = 256
"""Bytes and publications of one piece of a cleaning, and one publication at least. A commit has less than two,
beside what is published: 1 ms of the loop, and about as long on the disk as a full batch takes."""

LISTED_AT_ONCE: Final = 512
"""Topics that are put in order in one step, when a cleaning begins: 0.5 ms of the loop. A hundred thousand would
take 30."""

UNWRITTEN_AT_ONCE: Final = 256
"""Topics of which a commit says where they are, besides those that it brings something to: 1 ms of the loop. A
reload may have all forgotten, a hundred thousand. Nothing is lost with what a crash leaves unwritten: whatever is
published there later says first where the topic is."""

DELETE_PIECES: Final = 8
"""So much of what was cleaned is deleted after a commit, 4 MiB. More than a commit adds, or a log that is flooded
would grow for ever; and SQLite only notes that their pages are free."""

RETRY_SECONDS: Final = 0.1
RETRY_MAX_SECONDS: Final = 2.0
"""Between two tries while the disk takes nothing: at first as short as a log takes to be rotated,
at last as long as a person who has made room looks at it."""

CLOSE_SECONDS: Final = 5.0
"""How long a stop waits until what was submitted is kept: a thousand commits of a slow disk."""

FD_LEASE: Final = 100_000
"""So many fds are set aside at once. After a kill they count as given out; 3,000 connections a second
take half a minute for half of them, and it is looked at once a second."""


@attrs.define(eq=False)
class _Removal:
    """A topic's publications are to be removed."""

    topic: str
    is_over: trio.Event = attrs.field(factory=trio.Event)
    refusal: Refused | None = None
    count: int = 0
    weight: int = SUBMISSION_BYTES
    party: None = None


@attrs.frozen
class _Piece:
    """Records, encoded, that stay in one commit, and the publications or topics in them."""

    records: list[bytes]
    count: int


@attrs.define(eq=False)
class _Cleaning:
    """The state of a log's cleaning: rows that have yet to be written anew, then rows to delete."""

    up_to: int
    """The last row before it began."""
    left: Iterator[_Piece]
    """A topic or a part of one, a value or a key each, made when it is taken."""
    is_written: bool = False


@attrs.define(eq=False)
class _Batch:
    """One commit, and what is done after it."""

    items: deque[Submission | _Removal]
    records: list[bytes]
    meta: Meta | None
    unwritten: dict[str, int]
    """The topics that it says something about, and the number of that: it may be different by now."""
    ends_cleaning: bool


class SqliteEngine(Memory):
    """See the module, and `Engine` for the methods. Made by `open_sqlite`."""

    def __init__(
        self,
        file: LogFile,
        sync: Sync,
        max_bytes: int,
        retained_bytes: int,
        wall_clock: Callable[[], float],
        run_blocking: RunBlocking,
        spare_bytes: int,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        super().__init__(max_bytes, retained_bytes, self._new_epoch)
        self.durability: Durability = sync
        self._sync: Sync = sync
        self.next_fd: Fd = file.meta.next_fd
        self._file = file
        self._wall_clock = wall_clock
        self._run_blocking = run_blocking
        self._spare_bytes = spare_bytes
        self._piece_bytes = piece_bytes
        self._waiting: Waiting[Submission | _Removal] = Waiting()
        # How many wait or are under way, by topic.
        self._pending: dict[str, int] = {}
        self._under_way: deque[Submission | _Removal] = deque()
        self._unwritten: dict[str, int] = {}
        self._changes = 0
        self._meta = file.meta
        self._cleaning: _Cleaning | None = None
        self._copies = Copies(self._store)
        self._store.note_forgotten = self._note_unwritten
        self._failing = ""
        self._retry_seconds = RETRY_SECONDS
        self._is_ending = False
        self._something = trio.Event()
        self._drained = trio.Event()
        self._batches = self._submitted = 0

    # publishing

    def defers(self, topic: str, rules: TopicRules, *, more: bool = False) -> bool:
        self._store.touch(topic)  # or its former epoch might be in the log when this is forgotten
        if not (
            rules.history_size
            or rules.retain
            or more
            or topic in self._pending
            or topic in self._unwritten
        ):
            return False
        if self._failing:
            raise self._refusal()
        return True

    def submit(self, submission: Submission) -> None:
        submission.weigh()
        self._submitted += submission.count
        self._put(submission)

    def _put(self, item: Submission | _Removal) -> None:
        topic = item.topic
        self._pending[topic] = self._pending.get(topic, 0) + 1
        self._waiting.put(item, topic)
        self._something.set()

    def is_full(self, party: Allowance | None = None, size: int = LITTLE_BYTES) -> bool:
        return self._waiting.is_full(party, size)

    async def wait_room(self) -> None:
        await self._waiting.wait_room()

    # forgetting

    async def remove(self, topic: str) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._failing:
            raise self._refusal()
        removal = _Removal(topic)
        self._put(removal)
        await removal.is_over.wait()
        if removal.refusal is not None:
            raise removal.refusal

    def forget(self, is_over: Callable[[str], bool]) -> None:
        self._store.forget(is_over)
        for item in [*self._under_way, *self._waiting]:
            if isinstance(item, Submission) and is_over(item.topic):
                item.keep = False
                self._note_unwritten(item.topic)

    @property
    def bytes_held(self) -> int:
        return super().bytes_held + self._waiting.bytes

    # fds

    def note_fds(self, next_fd: Fd) -> None:
        self.next_fd = next_fd
        if next_fd + FD_LEASE // 2 > self._meta.next_fd:
            self._meta = msgspec.structs.replace(self._meta, next_fd=next_fd + FD_LEASE)
            self._something.set()

    # life

    @asynccontextmanager
    async def running(self, sink: Sink) -> AsyncGenerator[None]:
        async with trio.open_nursery() as nursery:
            name_scope(nursery, "writer")
            nursery.start_soon(self._write, sink, name="engine writer")
            yield
            self._is_ending = True
            self._something.set()
            with trio.move_on_after(CLOSE_SECONDS):
                await self._drained.wait()
            nursery.cancel_scope.cancel()

    def statistics(self) -> EngineStatistics:
        return EngineStatistics(
            self._store.statistics(),
            waiting=self._waiting.bytes,
            batches=self._batches,
            submitted=self._submitted,
            log_bytes=self._file.bytes,
            failing=self._failing,
        )

    async def _write(self, sink: Sink) -> None:
        """Commit what is submitted and give it back, until nothing more will come."""
        try:
            # At the end of a stop what cannot be kept is refused, and not tried again.
            while not self._is_ending or (self._has_work and not self._failing):
                await self._wait_work()
                batch = self._gather(sink)
                try:
                    await self._commit(batch)
                    await self._give_back(batch, sink)
                    await self._clean()
                except NotWritten as error:
                    await self._sit_out(error, sink)
        finally:
            self._refuse([*self._under_way, *self._waiting.clear()], sink, "the broker stops")
            self._drained.set()

    @property
    def _has_work(self) -> bool:
        return bool(
            self._waiting
            or self._unwritten
            or (self._cleaning is not None and not self._is_ending)
            or self._meta != self._file.meta
        )

    async def _wait_work(self) -> None:
        await trio.lowlevel.checkpoint()
        while not self._has_work and not self._is_ending:
            self._something = trio.Event()
            await self._something.wait()

    # a batch on its way

    def _gather(self, sink: Sink) -> _Batch:
        """Take what waits, as much as a commit may hold. No checkpoint: it says what is true now."""
        items: deque[Submission | _Removal] = deque()
        count = size = 0
        while self._waiting and count < BATCH_PUBLICATIONS and size < BATCH_BYTES:
            item = self._waiting.take()
            items.append(item)
            size += item.weight
            count += item.count
        now, at = trio.current_time(), int(self._wall_clock() * 1000)
        kept = [item.topic for item in items if isinstance(item, Submission) and item.keep]
        for topic in dict.fromkeys(kept):
            self._store.position(topic, now)  # begins an epoch where there is none
        self._under_way = items
        unwritten = self._unwritten_of(items)
        records = [each for topic in unwritten for each in self._state_of(topic, now, at)]
        ends_cleaning = self._write_anew(records)
        for item in list(items):
            try:
                record = _record_of(item, at)
                records += [] if record is None else [encode(record)]
            except (ValueError, TypeError) as error:  # tags of the app's that are no texts
                items.remove(item)
                self._refuse([item], sink, str(error))
        meta = self._meta if self._meta != self._file.meta else None
        return _Batch(items, records, meta, unwritten, ends_cleaning)

    def _unwritten_of(self, items: Iterable[Submission | _Removal]) -> dict[str, int]:
        """The unwritten topics that a commit says where they are: all that it brings something to, and some
        others."""
        unwritten = self._unwritten
        some = dict(islice(unwritten.items(), UNWRITTEN_AT_ONCE))
        for item in items:
            if item.topic in unwritten:
                some[item.topic] = unwritten[item.topic]
        return some

    async def _commit(self, batch: _Batch) -> None:
        if batch.records or batch.meta is not None:
            await self._run_blocking(partial(self._append, batch.records, batch.meta))
            self._batches += 1
        if batch.items:
            self._retry_seconds = RETRY_SECONDS
        for topic, number in batch.unwritten.items():
            if self._unwritten.get(topic) == number:
                del self._unwritten[topic]
        if batch.ends_cleaning and self._cleaning is not None:
            self._cleaning.is_written = True

    def _append(self, records: list[bytes], meta: Meta | None = None) -> None:
        """Commit a row of these. Blocks. Raises `NotWritten`."""
        self._file.append(join(records), meta)

    async def _give_back(self, batch: _Batch, sink: Sink) -> None:
        """Deliver and acknowledge a batch that is in the log now. Cancelled, it goes on to its end."""
        with trio.CancelScope(shield=True):
            while batch.items:
                self._give_back_some(batch.items, sink)
                sink.settled()
                if batch.items:
                    await trio.lowlevel.checkpoint()

    def _give_back_some(self, items: deque[Submission | _Removal], sink: Sink) -> None:
        """The same for as many as one step may take."""
        now, work, over = trio.current_time(), 0.0, []
        while items and work < ROUND:
            item = items[0]
            if isinstance(item, Submission):
                work += self._deliver(item, sink, now)
            else:
                self._store.remove(item.topic, now)
                item.is_over.set()
            over.append(items.popleft())
            work += COMMAND + PUBLICATION * item.count
        self._note_over(over)

    def _deliver(self, submission: Submission, sink: Sink, now: float) -> float:
        parcel, rules, dones = submission.parcel, submission.rules, submission.dones
        position = None
        if submission.keep:
            topic, batches = parcel.topic, parcel.batches
            size, ttl, extend = rules.history_size, rules.history_ttl, self._store.extend
            batches[:] = [extend(topic, each, now, size, ttl) for each in batches]
            if dones:
                position = self._store.position(topic, now)
        work = sink.deliver(parcel, retain=submission.retain)
        for done in dones:
            done(position)
        return work

    def _note_over(self, items: Sequence[Submission | _Removal]) -> None:
        """They are on their way no longer, and room for others."""
        pending = self._pending
        for item in items:
            topic = item.topic
            left = pending[topic] - 1
            if left:
                pending[topic] = left
            else:
                del pending[topic]
            self._waiting.over(item)

    # what fails

    def _refusal(self) -> Refused:
        return Refused(ErrorCode.INTERNAL, f"not kept: {self._failing}")

    def _refuse(self, items: Sequence[Submission | _Removal], sink: Sink, why: str) -> None:
        refusal = Refused(ErrorCode.INTERNAL, f"not kept: {why}")
        for item in items:
            if isinstance(item, Submission):
                for done in item.dones:
                    done(refusal)
            else:
                item.refusal = refusal
                item.is_over.set()
        self._note_over(items)
        sink.settled()

    async def _sit_out(self, error: NotWritten, sink: Sink) -> None:
        """Refuse all publications that wait or come, until the file takes something again."""
        self._failing = str(error)
        self._cleaning = None
        log.error("engine_failing", file=str(self._file.path), reason=self._failing)
        while self._failing and not self._is_ending:
            self._refuse([*self._under_way, *self._waiting.clear()], sink, self._failing)
            self._under_way = deque()
            await self._wait_retry(sink)
            try:
                await self._run_blocking(partial(self._file.append, b"", self._meta))
            except NotWritten as again:
                self._failing = str(again)
            else:
                self._failing = ""
                log.info("engine_recovered", file=str(self._file.path))

    async def _wait_retry(self, sink: Sink) -> None:
        """Wait before the next try, twice as long each time; refuse at once what comes meanwhile."""
        due = trio.current_time() + self._retry_seconds
        self._retry_seconds = min(2 * self._retry_seconds, RETRY_MAX_SECONDS)
        while trio.current_time() < due and not self._is_ending:
            self._something = trio.Event()
            with trio.move_on_at(due):
                await self._something.wait()
            self._refuse(self._waiting.clear(), sink, self._failing)

    # epochs and cleaning

    def _new_epoch(self, topic: str) -> str:
        self._note_unwritten(topic)
        return new_epoch(topic)

    def _note_unwritten(self, topic: str) -> None:
        self._changes += 1
        self._unwritten[topic] = self._changes
        self._something.set()

    def _state_of(self, topic: str, now: float, at: int) -> list[bytes]:
        """The records, encoded, that put a topic where it is."""
        state = self._store.state(topic)
        if state is None:
            return [encode(Forgotten(topic))]
        position, history = state
        kept = 0 if history is None else history.ring.count
        begin = Begin(topic, position.epoch, position.offset - kept)
        runs = [] if history is None else _runs_of(history, now, at)
        return [encode(begin), *map(encode, runs)]

    def _write_anew(self, records: list[bytes]) -> bool:
        """Add what the next commit holds of a cleaning; whether that is the rest of it."""
        if self._cleaning is None or self._cleaning.is_written:
            return False
        size = count = 0
        for piece in self._cleaning.left:
            records += piece.records
            size += sum(map(len, piece.records))
            count += piece.count
            if size >= self._piece_bytes or count >= PIECE_PUBLICATIONS:
                return False
        return True

    async def _clean(self) -> None:
        """Begin to clean the log if it is time, or go on with that. Raises `NotWritten`."""
        cleaning = self._cleaning
        if cleaning is None:
            kept = self._store.statistics().bytes + self.retained.statistics().bytes
            if self._file.bytes > 2 * kept + self._spare_bytes:
                self._cleaning = _Cleaning(self._file.last_seq, self._pieces())
        elif cleaning.is_written and await self._run_blocking(partial(self._delete, cleaning)):
            self._cleaning = None

    def _pieces(self) -> Iterator[_Piece]:
        """All that is kept, as records; each piece is what is true in the step in which it is taken. First of
        the topics is the one published to longest ago, so that a start finds them in that order. The first
        pieces are empty: each has put some of them in order."""
        topics, used_at = self._store.topics(), self._store.used_at
        parts = []
        for place in range(0, len(topics), LISTED_AT_ONCE):
            part = topics[place : place + LISTED_AT_ONCE]
            parts.append(sorted([(used_at(topic), topic) for topic in part]))
            yield _Piece([], PIECE_PUBLICATIONS)
        for _, topic in heapq.merge(*parts):
            yield from self._pieces_of(topic)
        for value in self.retained.values():
            if self.retained.get(value.topic) is value:  # else its successor is in the log already
                yield _Piece([encode(Value(value.topic, value.offset, Batch.of((value,))))], 1)
        began = self._wall_clock() - trio.current_time()
        for owner, kept_as, delivery, kept_at in list(self.keys.items()):
            if not isinstance(owner, int):
                topic, key = cast(tuple[str, str], kept_as)
                position = delivery.position or Position(0, "")
                at = int((began + kept_at) * 1000)
                once = Once(topic, key, owner, at, position.offset, position.epoch)
                yield _Piece([encode(once)], 1)

    def _pieces_of(self, topic: str) -> Iterator[_Piece]:
        """A topic, with all that it keeps at the first piece and still keeps at the last; see `copies`."""
        state = self._store.state(topic)
        position, history = state or (Position(0, ""), None)
        kept = 0 if history is None else history.ring.count
        if history is None or self._fitting(history, 0) == kept:
            now, at = trio.current_time(), int(self._wall_clock() * 1000)
            yield _Piece(self._state_of(topic, now, at), 1 + kept)
            return
        first, top = 1, position.offset
        yield _Piece([encode(Stands(topic, position.epoch, top))], 1)
        while first <= top:
            state = self._store.state(topic)
            if state is None or state[0].epoch != position.epoch:
                return  # what is true now is unwritten, and will be in a commit as such
            piece, first = self._older(topic, *state, first, top)
            yield piece

    def _older(
        self, topic: str, position: Position, history: History | None, first: int, top: int
    ) -> tuple[_Piece, int]:
        """A copy of what a topic keeps from an offset on, up to another at most, and the offset behind it."""
        kept = 0 if history is None else history.ring.count
        front = position.offset + 1 - kept
        first, runs = max(first, front), list[Run]()
        behind = first
        if history is not None and first <= top:
            start = first - front
            stop = min(start + self._fitting(history, start), top + 1 - front)
            now, at = trio.current_time(), int(self._wall_clock() * 1000)
            runs = list(_runs_of(history, now, at, start, stop))
            behind = front + stop
        older = Older(topic, position.epoch, front, first, runs, behind > top)
        return _Piece([encode(older)], 1 + behind - first), behind

    def _fitting(self, history: History, start: int) -> int:
        """How many of the publications that a topic keeps, from a place on, are in one piece."""
        ring, size, last = history.ring, 0, None
        stop = min(ring.count, start + PIECE_PUBLICATIONS)
        for place in range(start, stop):
            info = ring.info(place)
            size += ring.weight(place)
            if info is not None and info is not last:
                size += len(info.conn_info or b"") + len(info.chan_info or b"")
            if size > self._piece_bytes and place > start:
                return place - start
            last = info
        return stop - start

    def write_all_anew(self) -> None:
        """Clean the log at once. Blocks. Raises `NotWritten`, with all that is kept still there."""
        cleaning = self._cleaning = _Cleaning(self._file.last_seq, self._pieces())
        is_rest = False
        self._file.mark()
        while not is_rest:
            records: list[bytes] = []
            is_rest = self._write_anew(records)
            self._append(records)
        while not self._delete(cleaning):
            pass

    def _delete(self, cleaning: _Cleaning) -> bool:
        """Delete some of the rows that were written anew; whether they were the last. Blocks. Raises
        `NotWritten`."""
        return self._file.delete(cleaning.up_to, DELETE_PIECES * self._piece_bytes)

    # the start

    def replay(self, now: float, wall: float) -> None:
        """Read the file, as it was before this process. Blocks. `now` is `trio.current_time()`, and
        `wall` the same moment in Unix seconds. Raises `ConfigError` for a file that is damaged."""
        try:
            for row in self._file.rows():
                for record in split(row):
                    self._take_record(record, now, wall)
        except BadRecord as error:
            raise ConfigError(damaged(self._file.path, error)) from error
        while self._store.expire(now):
            pass

    def begin(self, first_fd: Fd) -> None:
        """Note in the file that it is in use. Blocks. Raises `ConfigError`."""
        before, boot = self._file.meta, boot_id()
        self.next_fd = max(first_fd, before.next_fd)
        self._meta = Meta(boot, self._sync, False, self.next_fd + FD_LEASE)
        records = []
        if before.sync == "process" and not before.is_clean and before.boot_id != (boot or None):
            # Some of the last rows may never have reached the disk, and nobody can say which.
            renewed = Renewed(secrets.token_hex(8))
            self._take_record(renewed, 0.0, 0.0)
            records.append(encode(renewed))
            detail = "what was acknowledged last may be lost: no client recovers across it"
            log.warning("epochs_renewed", file=str(self._file.path), detail=detail)
        try:
            self._file.mark()
            self._file.append_durably(join(records), self._meta)
        except NotWritten as error:
            raise ConfigError(f"engine: {self._file.path} cannot be written: {error}") from error
        if self._sync == "power":
            self._file.reserve()

    def close(self) -> None:
        """Close the file in good order. Blocks."""
        self._file.close(msgspec.structs.replace(self._meta, is_clean=True, next_fd=self.next_fd))

    def _take_record(self, record: Record, now: float, wall: float) -> None:
        """Do once more what a record tells of."""

        def when(at: int) -> float:
            return now - max(0.0, wall - at / 1000)

        if isinstance(record, Run):
            self._take_run(record, when(record.at))
        elif isinstance(record, Begin):
            self._store.restore(record.topic, Position(record.top, record.epoch), now)
            self._unwritten.pop(record.topic, None)
            self._copies.drop(record.topic)
        elif isinstance(record, Stands):
            self._copies.begin(record, now)
            self._unwritten.pop(record.topic, None)
        elif isinstance(record, Older):
            self._copies.take(record, now, when)
        elif isinstance(record, Removed):
            self._store.remove(record.topic, now)
            self._copies.drop(record.topic)
        elif isinstance(record, Forgotten):
            self._store.forget_topic(record.topic)
            self._unwritten.pop(record.topic, None)
            self._copies.drop(record.topic)
        elif isinstance(record, Renewed):
            self._store.renew(partial(_renewed, record.salt))
        elif isinstance(record, Value):
            values = record.batch.publications(record.topic)
            if len(values) != 1:
                raise BadRecord(f"a topic retains {len(values)} values")
            self.retained.take([msgspec.structs.replace(values[0], offset=record.offset)])
        else:
            position = Position(record.offset, record.epoch) if record.offset else None
            self._keep_key(record.owner, record.topic, record.key, position, when(record.at))

    def _take_run(self, run: Run, when: float) -> None:
        topic, position = run.topic, None
        published: Sequence[Publication] = ()
        for batch in run.batches:
            published = batch.publications(topic)
            if run.size:
                published = self._store.extend(topic, published, when, run.size, run.ttl)
        if run.size:
            position = self._store.position(topic, when)
        if run.retain:
            self.retained.take(published)
        if run.key:
            self._keep_key(run.owner, topic, run.key, position, when)

    def _keep_key(
        self, owner: str | None, topic: str, key: str, position: Position | None, when: float
    ) -> None:
        # Nobody knows any more who got it; its position is known.
        delivery = Delivery(0, 0, 0, position=position)
        size = text_bytes(topic) + text_bytes(key)
        self.keys.keep(owner, (topic, key), delivery, when, size)


def _record_of(item: Submission | _Removal, at: int) -> Run | Removed | None:
    """The record of what was submitted, None if nothing of it is kept."""
    if isinstance(item, _Removal):
        return Removed(item.topic)
    parcel, rules, batches = item.parcel, item.rules, item.parcel.batches
    size = rules.history_size if item.keep else 0
    if not size:
        if not item.retain and item.key is None:
            return None
        batches = [batches[-1][-1:]]
    key, owner = ("", None) if item.key is None else (item.key.key, item.key.owner)
    written = [Batch.of(each) for each in batches]
    return Run(parcel.topic, at, size, rules.history_ttl, written, item.retain, key, owner)


def _runs_of(
    history: History, now: float, at: int, start: int = 0, stop: int | None = None
) -> Iterator[Run]:
    """The history of a topic as runs, or a part of it: another time begins a new run, another publisher a new
    batch."""
    size, run, last, last_when = history.ring.count, None, None, 0.0
    for when, each in history.dated(start, stop):
        if run is None or when != last_when:
            if run is not None:
                yield run
            run = Run(history.topic, at - int((now - when) * 1000), size, history.ttl, [])
            last = None
        if last is None or (each.info, each.tags, each.opaque) != (
            last.info,
            last.tags,
            last.opaque,
        ):
            run.batches.append(Batch.of((each,)))
        else:
            run.batches[-1].data.append(each.data)
        last, last_when = each, when
    if run is not None:
        yield run


def _renewed(salt: str, epoch: str) -> str:
    return blake2s(f"{salt}{epoch}".encode(), digest_size=4).hexdigest()


def boot_id() -> str:
    """The name of this machine's run since it was started; "" where the system has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return ""


@asynccontextmanager
async def open_sqlite(
    url: EngineUrl,
    max_bytes: int,
    retained_bytes: int,
    wall_clock: Callable[[], float],
    first_fd: Fd = 1,
    run_blocking: RunBlocking | None = None,
    spare_bytes: int = SPARE_BYTES,
    piece_bytes: int = PIECE_BYTES,
) -> AsyncGenerator[SqliteEngine]:
    """An engine with what its file has kept, for as long as the block; open it around everything that
    publishes.

    A disk is waited for in a thread, or as `run_blocking` does. Raises `ConfigError` for a file that cannot be
    used. Closes the file in good order, also when cancelled: that waits for the disk.
    """
    # Its own, as it is there for nothing else, and each commit waits for it twice.
    async with open_disk_thread() if run_blocking is None else nullcontext(run_blocking) as disk:
        async with _opened(
            url, max_bytes, retained_bytes, wall_clock, first_fd, disk, spare_bytes, piece_bytes
        ) as engine:
            yield engine


@asynccontextmanager
async def _opened(
    url: EngineUrl,
    max_bytes: int,
    retained_bytes: int,
    wall_clock: Callable[[], float],
    first_fd: Fd,
    run_blocking: RunBlocking,
    spare_bytes: int,
    piece_bytes: int,
) -> AsyncGenerator[SqliteEngine]:
    assert url.path is not None
    path = url.path.absolute()
    now, wall = trio.current_time(), wall_clock()

    def load() -> SqliteEngine:
        file = LogFile.open(path, url.sync)
        try:
            engine = SqliteEngine(
                file,
                url.sync,
                max_bytes,
                retained_bytes,
                wall_clock,
                run_blocking,
                spare_bytes,
                piece_bytes,
            )
            engine.replay(now, wall)
            engine.begin(first_fd)
        except BaseException:
            file.close()
            raise
        return engine

    engine = await run_blocking(load)
    try:
        kept = engine.statistics().history
        log.info("engine_opened", file=str(path), publications=kept.publications)
        async with engine.expiring():
            yield engine
    finally:
        with trio.CancelScope(shield=True):  # a commit, and it has no end but the disk's
            await run_blocking(engine.close)  # noqa: ASYNC102
