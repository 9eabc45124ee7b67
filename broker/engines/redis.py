"""The redis engine: all nodes that name the same Redis are one broker.

A publication is appended to a log that all nodes read, and counts when this node reads it back. The history
of a topic lies in Redis beside the log. A node fetches it when somebody first asks for it, and keeps it up to
date from then on as it reads the log.

Rules:

1. Memory changes as the log is read, in its order. A fetch is put where it belongs: entries that were read
   meanwhile, and are behind it in the log, are added to it.
2. A run that does not follow the one before means that something was lost: those who listen and count on
   getting all are told so (`Sink.gap`) before they get it.
3. Nobody waits for longer than `PUBLISH_SECONDS`: then a publish is refused, whatever becomes of it.
4. While Redis is away, memory answers. A subscriber of that time gets later publications like all others.

Not promised: that a publish is lost which was refused because its outcome was not known.
"""

import secrets
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Final, cast

import attrs
import msgspec
import structlog
import trio

from broker.config.engine_url import RedisUrl
from broker.config.settings import TopicRules
from broker.core.messages import Fd, Position, Publication
from broker.core.names import DIRECT, PERSONAL
from broker.core.scopes import name_scope
from broker.core.session import Parcel
from broker.core.sweeps import Sweeps
from broker.core.work import COMMAND, ROUND, Allowance
from broker.engines.cluster import ClusterLink
from broker.engines.engine import (
    NOWHERE,
    Durability,
    EngineStatistics,
    Sink,
    Submission,
    View,
)
from broker.engines.memory import Memory
from broker.engines.redis_cluster import RedisClusterLink
from broker.engines.redis_link import UNREADABLE, Link, check_installed, use_link
from broker.engines.redis_log import IDLE_EPOCH_MS, Draft, Flight, Logged, SharedLog
from broker.engines.redis_outgoing import (
    BATCH_RUNS,
    NOT_KNOWN,
    Item,
    Outgoing,
    Post,
    decode_posted,
)
from broker.engines.redis_present import Present
from broker.engines.redis_scripts import PIECE, TOUCH, VIEW
from broker.engines.redis_topics import UNBOUNDED, KnownTopics, Snapshot, numbered
from broker.engines.redis_wire import LinkLost, to_text
from broker.engines.waiting import LITTLE_BYTES
from broker.errors import ConfigError, ErrorCode, Refused

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("broker")

FETCH_SECONDS: Final = 4.0
"""How long a subscriber waits for what a topic keeps, from one piece of it to the next: as long as a publisher,
about."""

PIECE_RUNS: Final = 1000
PIECE_BYTES: Final = 2**18
"""What Redis gives of a history in one step, in which nobody else is served: 1 to 2 ms. Less than it takes by
one run at most, or by as many again as it has looked at."""

OPEN_SECONDS: Final = 10.0
"""How long a start waits for Redis, which may be starting, too."""

FORGOTTEN_AT_ONCE: Final = 200
"""Topics that are forgotten in one step: 1 to 2 ms, as each is an order to Redis."""

CLOSE_SECONDS: Final = 5.0
"""How long a stop waits until what was submitted is read back."""

OLDEST: Final = (6, 2)
"""The first version whose streams are trimmed by id as they are added to."""

LOADED_AT_ONCE: Final = 100
"""Retained values in one answer: as a rule 10 KB."""

EMPTY_EPOCH_MS: Final = 900_000
"""An epoch in which nothing was published ends so long after nobody listens any more: else anybody who may
subscribe could fill Redis with the names of topics that nobody uses."""

TOUCH_EVERY: Final = 300.0
TOUCHED_AT_ONCE: Final = 100
"""Seconds between two rounds in which they are kept alive, and topics in one step: 0.1 ms of Redis."""

OVERDUE_EVERY: Final = 0.25
"""Seconds between two looks at what has waited for too long."""


@attrs.define(eq=False)
class _Fetch:
    """A topic on its way here, and what was read of it meanwhile."""

    topic: str
    caught: list[tuple[Logged, list[Sequence[Publication]]]] = attrs.field(factory=list)
    is_stale: bool = False
    """Whether the log was lost meanwhile, so that it has to be fetched anew."""
    is_over: trio.Event = attrs.field(factory=trio.Event)
    refusal: str = ""
    due: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    most: int = 0
    """Runs in the longest try so far. Whoever comes further than that is given more time: so one that has to
    begin anew for ever ends."""

    def note_came(self, runs: int) -> None:
        """So many runs of it are here."""
        if runs > self.most:
            self.most = runs
            self.due.deadline = trio.current_time() + FETCH_SECONDS


class RedisEngine(Memory):
    """See the module, and `Engine` for the methods. Made by `open_redis`."""

    durability: Durability = "shared"

    def __init__(
        self, shared: SharedLog, max_bytes: int, retained_bytes: int, first_fd: Fd
    ) -> None:
        super().__init__(UNBOUNDED, retained_bytes, _no_epoch)
        self._store.meta_ttl = float("inf")
        self.next_fd: Fd = first_fd
        self._log = shared
        self._out = Outgoing(shared.wake)
        self.nodes: RedisClusterLink = RedisClusterLink(shared, self._out)
        self.cluster: ClusterLink = self.nodes
        self._topics = KnownTopics(self._store, max_bytes, self._is_listened_to)
        self._present = Present(shared)
        self.incoming: _Incoming = _Incoming(self, shared, self._out, self._topics)
        shared.reader = self.incoming
        self._sink: Sink | None = None
        self._sweeps = Sweeps()
        self._something_over = trio.Event()

    def _is_listened_to(self, topic: str) -> bool:
        return self.incoming.sink is not None and self.incoming.sink.wants(topic)

    # publishing

    def defers(self, topic: str, rules: TopicRules, *, more: bool = False) -> bool:
        if topic.startswith(DIRECT):
            return False
        self.nodes.check()
        return True

    def submit(self, submission: Submission) -> None:
        self._touch(submission.topic)
        self._out.post(submission)

    def is_full(self, party: Allowance | None = None, size: int = LITTLE_BYTES) -> bool:
        return self._out.items.is_full(party, size)

    async def wait_room(self) -> None:
        await self._out.items.wait_room()

    # reading

    def knows(self, topic: str, since: Position | None = None) -> bool:
        self._touch(topic)
        if topic not in self._topics:
            return False
        return since is None or self._topics.reaches(topic, since)

    async def fetch(
        self, topics: Sequence[str], since: Mapping[str, Position | None] = NOWHERE
    ) -> None:
        await trio.lowlevel.checkpoint()
        with self._topics.pinned(topics):
            # One that is fetched anyway is as it is now.
            if any(self.knows(topic) and not self.knows(topic, since[topic]) for topic in since):
                await self._catch_up()
            while unknown := [topic for topic in topics if not self.knows(topic)]:
                for fetch in [self.incoming.begin_fetch(topic) for topic in unknown]:
                    await fetch.is_over.wait()
                    if fetch.refusal:
                        raise Refused(ErrorCode.INTERNAL, fetch.refusal)

    async def _catch_up(self) -> None:
        """Read all that any node may have read by now. Raises `Refused` (100)."""
        try:
            with trio.move_on_after(FETCH_SECONDS):
                await self._present.wait_read()
                return
            why = self._log.failing or "Redis does not answer"
        except UNREADABLE as error:
            why = f"what is kept is not ours: {error}"[:200]
        raise Refused(ErrorCode.INTERNAL, f"history is away: {why}")

    def position(self, topic: str) -> Position:
        self._topics.touch(topic)
        return super().position(topic)

    def view(self, topic: str, since: Position) -> View:
        self._topics.touch(topic)
        return super().view(topic, since)

    def history(
        self, topic: str, since: Position | None, limit: int, reverse: bool
    ) -> tuple[list[Publication], Position]:
        self._topics.touch(topic)
        return super().history(topic, since, limit, reverse)

    # forgetting

    async def remove(self, topic: str) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        order = self._out.order("R", topic)
        await order.ended.wait()
        if order.refusal is not None:
            raise order.refusal

    def forget(self, is_over: Callable[[str], bool]) -> None:
        # A topic that is not known here ends when it is published to without a history.
        waiting = [item for item in self._out if isinstance(item, Post)]
        sent = [each for flight in self._log.flights for each in flight.items]
        on_way = [item.topic for item in [*waiting, *sent] if isinstance(item, Post)]
        self._sweeps.begin(is_over, self._topics.names())
        for topic in dict.fromkeys(on_way):
            if self._sweeps.touch(topic):
                self._end_topic(topic)
        for item in waiting:
            if is_over(item.topic):
                item.submission.keep = False
        self._something_over.set()

    def _touch(self, topic: str) -> None:
        """Forget a topic now, if it is one of those that are to be forgotten."""
        if self._sweeps.begun and self._sweeps.touch(topic) and self._topics.follows(topic):
            self._end_topic(topic)

    def _end_topic(self, topic: str) -> None:
        self._topics.drop(topic)
        self._out.order("F", topic)

    async def _sweep(self) -> None:
        """Forget what is to be forgotten, a few topics at a time, until cancelled."""
        while True:
            await self._something_over.wait()
            await self._out.items.wait_room()
            for _ in range(FORGOTTEN_AT_ONCE):
                topic = self._sweeps.take()
                if topic is None:
                    self._something_over = trio.Event()
                    break
                self._touch(topic)

    # the part of the memory that it takes

    @property
    def bytes_held(self) -> int:
        return self._store.bytes_held + self._out.waiting

    @property
    def heaviest_bytes(self) -> int:
        return self._store.bytes_held

    def prepare(self, size: int) -> bool:
        return True

    def give_back(self, size: int) -> int:
        before = self._store.bytes_held
        self._topics.shrink(max(0, before - size))
        return before - self._store.bytes_held

    # fds

    def note_fds(self, next_fd: Fd) -> None:
        self.next_fd = next_fd

    # life

    @asynccontextmanager
    async def running(self, sink: Sink) -> AsyncGenerator[None]:
        try:
            async with trio.open_nursery() as nursery:
                name_scope(nursery, "writer")
                self.incoming.begin(sink, nursery)
                nursery.start_soon(self._log.serve, name="engine link")  # noqa: ASYNC113 - `entered` waits for it
                nursery.start_soon(self.incoming.refuse_overdue, name="engine deadlines")
                nursery.start_soon(self.incoming.touch, name="engine upkeep")
                nursery.start_soon(self._sweep, name="engine forgetting")
                try:
                    async with self.nodes.entered(OPEN_SECONDS):
                        yield
                    with trio.move_on_after(CLOSE_SECONDS):
                        await self.incoming.wait_drained()
                        await self._leave()
                finally:
                    self.incoming.stop()
                    nursery.cancel_scope.cancel()
        finally:  # what was read is given out by now
            self.incoming.settle_all()

    async def _leave(self) -> None:
        link = await self._log.wait_link()
        with suppress(LinkLost):  # then others find out
            await self.nodes.leave(link)

    def statistics(self) -> EngineStatistics:
        return EngineStatistics(
            self._store.statistics(),
            waiting=self._out.waiting,
            batches=self._log.batches,
            submitted=self._out.submitted,
            failing=self._log.refusal,
            entries=self._log.entries,
            skipped=self.incoming.skipped,
            losses=self._log.losses,
            misread=self._log.misread,
        )


@attrs.define(eq=False)
class _Incoming:
    """The entries that are read from the log, and the histories that are fetched beside it."""

    engine: RedisEngine
    shared: SharedLog
    out: Outgoing
    topics: KnownTopics
    sink: Sink | None = None
    skipped: int = 0
    _tasks: trio.Nursery | None = None
    _fetches: dict[str, _Fetch] = attrs.field(init=False, factory=dict)
    _drained: trio.Event = attrs.field(init=False, factory=trio.Event)
    _gaps: list[str] = attrs.field(init=False, factory=list)

    # life

    def begin(self, sink: Sink, tasks: trio.Nursery) -> None:
        self.sink, self._tasks = sink, tasks

    def stop(self) -> None:
        """Nothing more is fetched."""
        self._tasks = None

    def settle_all(self) -> None:
        """Nothing more is read."""
        for flight in list(self.shared.flights):
            self.missed(flight)
        self.out.refuse_all("the broker stops")
        self._settle()

    async def wait_drained(self) -> None:
        while len(self.out) or any(flight.items for flight in self.shared.flights):
            self._drained = trio.Event()
            await self._drained.wait()

    async def refuse_overdue(self) -> None:
        """Refuse what has waited for too long, until cancelled."""
        while True:
            await trio.sleep(OVERDUE_EVERY)
            if self.out.refuse_overdue(self.shared.flights, self.shared.failing):
                self._settle()

    async def touch(self) -> None:
        """Keep epochs alive in which nothing was published while somebody listens, until cancelled."""
        while True:
            await trio.sleep(TOUCH_EVERY)
            await self.touch_all()

    async def touch_all(self) -> None:
        shared, sink = self.shared, self.sink
        assert sink is not None
        empty = [topic for topic in self.topics.empty() if sink.wants(topic)]
        for first in range(0, len(empty), TOUCHED_AT_ONCE):
            link = await shared.wait_link()
            some = empty[first : first + TOUCHED_AT_ONCE]
            try:
                key = shared.key + ":log"
                await link.reader.run(TOUCH, key, shared.key, EMPTY_EPOCH_MS, *some)
            except LinkLost as error:
                shared.lose(str(error))

    def _settle(self) -> None:
        if self.sink is not None:
            self.sink.settled()
        self._drained.set()

    # the log

    def gather(self) -> tuple[list[Draft], list[Item]]:
        drafts, items = self.out.gather()
        return drafts, items

    def settled(self) -> None:
        self._settle()

    @property
    def taken(self) -> int:
        return self.out.taken

    def heard(self, sender: str, message: bytes) -> float:
        return self.engine.nodes.heard(sender, message)

    def finished(self, flight: Flight) -> None:
        for item in cast(Sequence[Item], flight.items):
            self.out.note_over(item)

    async def linked(self, link: Link) -> None:
        await self.engine.nodes.linked(link)

    async def beat(self, link: Link) -> None:
        await self.engine.nodes.beat(link)

    def missed(self, flight: Flight) -> None:
        for item in cast(Sequence[Item], flight.items):
            self.out.refuse(item, NOT_KNOWN)
            self.out.note_over(item)
        flight.items = ()

    async def rest(self, work: float) -> float:
        if work < ROUND:
            return work
        self._settle()
        await trio.lowlevel.checkpoint()
        return 0.0

    async def load(self, link: Link) -> None:
        retained = self.engine.retained
        for value in retained.values():
            retained.take((msgspec.structs.replace(value, data=b"null"),))
        cursor = b"0"
        while True:
            parts = self.shared.key + ":r", cursor, b"COUNT", LOADED_AT_ONCE
            cursor, found = await link.reader.call(b"HSCAN", *parts)
            for name, field in _pairs(found):
                try:
                    offset, _, data = field.partition(b" ")
                    last = decode_posted(data).batches[-1].publications(to_text(name))[-1]
                    value = msgspec.structs.replace(last, offset=int(offset))
                except UNREADABLE as error:
                    self.shared.note_misread(f"a retained value: {error}", name)
                else:
                    retained.take([value])
            if cursor == b"0":
                return

    async def lost(self, link: Link) -> None:
        assert self.sink is not None
        await self.load(link)
        self.topics.clear()
        for fetch in self._fetches.values():
            fetch.is_stale = True
        self._gaps = list(self.sink.listened())
        await self.tell_gaps()

    async def tell_gaps(self) -> None:
        assert self.sink is not None
        gaps, self._gaps, work = self._gaps, [], 0.0
        for topic in gaps:
            work = await self.rest(work + COMMAND)
            for done in self.sink.gap(topic):
                work = await self.rest(work + done)

    def skips(self, flags: str, topic: str) -> bool:
        # With more flags it is the last value of its topic, which all nodes know, or wants a report.
        if flags not in ("k", "n", "e") or topic in self._fetches or self.topics.follows(topic):
            return False
        assert self.sink is not None
        if self.sink.wants(topic):
            return False
        self.skipped += 1
        return True

    def take(self, logged: Logged, own: object | None) -> float:
        item = cast("Item | None", own)
        work = COMMAND
        kind = logged.flags[0]
        result: Position | Refused | None = None
        if kind in "kneu":
            if kind == "k" and not self.topics.precedes(logged):
                self.topics.drop(logged.topic)
                self._gaps = [logged.topic]
                return -1.0
            work += self._take_run(logged, item if isinstance(item, Post) else None)
        elif kind == "R" and self.topics.follows(logged.topic):
            self.topics.remove(logged.topic)
        elif kind == "F":
            self.topics.drop(logged.topic)
        elif kind in "AMNG":
            work += self.engine.nodes.take(logged)
        elif kind not in "dRFx":
            reason = f"an entry of kind {kind!r}: a node is of another version"
            self.shared.note_misread(reason, b"%d" % logged.place)
        elif kind == "x":
            text = f"user {logged.topic[len(PERSONAL) :]!r} has no connection"
            result = Refused(ErrorCode.UNKNOWN_CHANNEL, text)
        if self._fetches:
            self._catch(logged, [])
        if item is not None:
            if kind in "kd" and logged.first:
                assert isinstance(item, Post)
                result = Position(logged.first + item.submission.count - 1, logged.epoch)
            item.end(result)
            self.out.note_over(item)
        return work

    def _take_run(self, logged: Logged, own: Post | None) -> float:
        """Number the publications of a run, keep them where the topic is known, give them out."""
        topic, kind, options = logged.topic, logged.flags[0], logged.flags[1:]
        assert self.sink is not None
        follows, fetch = self.topics.follows(topic), self._fetches.get(topic)
        wanted = own or options or self.sink.wants(topic)
        if not (wanted or (kind == "k" and (follows or fetch is not None))):
            self.skipped += 1
            if follows and kind == "e":
                self.topics.drop(topic)
            return 0.0
        parcel = _parcel_of(logged) if own is None else own.submission.parcel
        parcel.place = logged.place * BATCH_RUNS + logged.number
        if kind == "k":
            kept = self.topics.add(logged, parcel.batches) if follows else None
            parcel.batches = numbered(parcel.batches, logged.first) if kept is None else kept
            if fetch is not None:
                self._catch(logged, parcel.batches)
        elif kind == "e" and follows:
            self.topics.drop(topic)
        return self.sink.deliver(parcel, retain="v" in options or "c" in options)

    # fetching

    def _catch(self, logged: Logged, batches: list[Sequence[Publication]]) -> None:
        fetch = self._fetches.get(logged.topic)
        if fetch is not None and (batches or logged.flags[0] in "eRF"):
            fetch.caught.append((logged, batches))

    def begin_fetch(self, topic: str) -> _Fetch:
        """Fetch a topic, once for all who want it. Raises `Refused` where nothing is read."""
        fetch = self._fetches.get(topic)
        if fetch is None:
            if self._tasks is None:
                raise Refused(ErrorCode.INTERNAL, "the broker stops")
            fetch = self._fetches[topic] = _Fetch(topic)
            self._tasks.start_soon(self._fetch, fetch, name="engine fetch")
        return fetch

    async def _fetch(self, fetch: _Fetch) -> None:
        try:
            fetch.due.deadline = trio.current_time() + FETCH_SECONDS
            with fetch.due:
                while not await self._try_fetch(fetch):
                    pass
            if fetch.due.cancelled_caught:
                why = self.shared.failing or "Redis does not answer"
                fetch.refusal = f"history is away: {why}"
        finally:
            del self._fetches[fetch.topic]
            fetch.is_over.set()

    async def _try_fetch(self, fetch: _Fetch) -> bool:
        """Fetch a topic and put it where it belongs; whether that went well."""
        shared, topic = self.shared, fetch.topic
        while topic in self.out.orders:  # of this node: what was removed is not seen again
            await shared.wait_moved()
        link = await shared.wait_link()
        fetch.caught, fetch.is_stale = [], False
        try:
            snapshot = await self._read_history(link, fetch)
        except LinkLost as error:
            shared.lose(str(error))
            return False
        except UNREADABLE as error:
            fetch.refusal = f"history is away: what is kept is not ours: {error}"[:200]
            return True
        if snapshot is None:
            return False
        while shared.place < snapshot.place and not fetch.is_stale:
            await shared.wait_moved()
        if not fetch.is_stale:
            await self.topics.put(snapshot)
        if fetch.is_stale:
            self.topics.drop(topic)
            return False
        for logged, batches in fetch.caught:
            if logged.place > snapshot.place:
                self._add_caught(logged, batches)
        with self.topics.pinned([topic]):
            self.topics.shrink(self.topics.max_bytes)
        return topic in self.topics

    async def _read_history(self, link: Link, fetch: _Fetch) -> Snapshot | None:
        """Fetch what Redis keeps of a topic, piece by piece; None where its epoch ended meanwhile, or some of the
        log was lost. Raises `LinkLost`, and one of `UNREADABLE`."""
        key, topic, bounds = self.shared.key, fetch.topic, (PIECE_RUNS, PIECE_BYTES)
        parts = key, topic, secrets.token_hex(4), IDLE_EPOCH_MS, EMPTY_EPOCH_MS, *bounds
        snapshot, some = Snapshot.of(topic, await link.reader.run(VIEW, key + ":log", *parts))
        await snapshot.take(some)
        epoch, top = snapshot.position.epoch, snapshot.position.offset
        while not snapshot.is_whole:
            fetch.note_came(len(snapshot.runs))
            parts = key, topic, epoch, snapshot.next_offset, top, *bounds
            some = await link.reader.run(PIECE, key + ":log", *parts)
            if some is None or fetch.is_stale:
                return None
            await snapshot.take(some)
        fetch.note_came(len(snapshot.runs))
        snapshot.settle()
        return snapshot

    def _add_caught(self, logged: Logged, batches: list[Sequence[Publication]]) -> None:
        kind = logged.flags[0]
        if kind == "k":
            self.topics.add(logged, batches)
        elif kind == "R":
            self.topics.remove(logged.topic)
        else:
            self.topics.drop(logged.topic)


def _parcel_of(logged: Logged) -> Parcel:
    """The publications of another node. Its rule is that of this node's settings."""
    posted = decode_posted(logged.data)
    batches = [batch.publications(logged.topic) for batch in posted.batches]
    return Parcel(
        logged.topic,
        "close",
        [*batches],
        exclude=frozenset(posted.exclude),
        report_to=posted.report_to,
    )


def _pairs(fields: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """The names and values of a flat list."""
    return zip(fields[::2], fields[1::2], strict=True)


def _no_epoch(topic: str) -> str:
    raise AssertionError("epochs begin in Redis alone")


async def _attach(shared: SharedLog) -> None:
    """Find the end of the log. Raises `ConfigError` where there is none for us."""
    url, why = shared.url, "it does not answer"
    faults: list[str] = []

    async def begin(link: Link) -> None:
        faults[:] = await _faults_of(link)
        if not faults:
            await shared.attach(link)

    with trio.move_on_after(OPEN_SECONDS):
        while True:
            why = await use_link(url, begin)
            if not why:
                break
            await trio.sleep(0.1)
    if why or faults:
        raise ConfigError(f"engine: no Redis at {url.where}: {why or faults[0]}")


async def _faults_of(link: Link) -> list[str]:
    """Why a server cannot be used, if that is so; warns of one that may forget what it should keep."""
    try:
        info = (await link.reader.call(b"INFO")).decode()
    except LinkLost as error:
        log.warning("redis_unknown", reason=str(error), detail="INFO is not allowed")
        return []
    fields = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    version = fields.get("redis_version", "")
    if tuple(map(int, version.split(".")[:2] or [0])) < OLDEST:
        return [f"it is Redis {version}, and 6.2 is the oldest that will do"]
    policy = fields.get("maxmemory_policy", "")
    if policy.startswith("allkeys"):
        detail = "it may evict any key: what is kept may be lost, and who listens is told so"
        log.warning("redis_evicts", policy=policy, detail=detail)
    return []


@asynccontextmanager
async def open_redis(
    url: RedisUrl,
    max_bytes: int,
    retained_bytes: int,
    wall_clock: Callable[[], float],
    first_fd: Fd = 1,
) -> AsyncGenerator[RedisEngine]:
    """An engine on a Redis, for as long as the block; open it around everything that publishes.

    Raises `ConfigError` where there is none within `OPEN_SECONDS`.
    """
    check_installed(url)
    shared = SharedLog(url, url.key, secrets.token_hex(6), retained_bytes)
    engine = RedisEngine(shared, max_bytes, retained_bytes, first_fd)

    await _attach(shared)
    log.info("engine_opened", redis=url.where, node=shared.node)
    async with engine.expiring():
        yield engine
