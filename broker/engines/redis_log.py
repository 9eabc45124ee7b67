"""One log in Redis that all nodes share: what is appended to it, and what is read back from it.

Words: a *batch* is what one call of a script appends, one entry of the log; a *flight* is a batch of
this node that was not read back yet; the *place* is the entry that was read last; a *lineage* is one
unbroken life of the log, which ends when some of it is lost.

Rules:

1. An entry counts when it is read back: so all nodes see one order, this one among them.
2. One batch at a time is sent; while it is on its way, the next one gathers. A batch that was not answered is
   sent again under its number, and is applied once.
3. Each entry names the one before it. Where that is not our place, something was lost, and the reader is
   told (`lost`) before it gets anything else; so it is when another lineage begins.
4. Where the log was cut, a new lineage begins; any node may be the first to find out.
5. An entry is given out as a whole, even if the link is lost meanwhile.
6. Data that cannot be read are passed over, logged and counted, be it another program's entry or a part of
   one of ours: nobody's mistake in Redis may stop what others publish. An entry of another program is taken
   out. Where the log cannot be followed without them, the link counts as lost, and that is the reason.
"""

import random
import secrets
from collections import deque
from collections.abc import Mapping, Sequence
from math import inf
from typing import Any, Final, NamedTuple, Protocol

import attrs
import structlog
import trio
from msgspec import Struct

from broker.config.engine_url import RedisUrl
from broker.core.work import ROUND
from broker.engines.redis_link import UNREADABLE, Link, unreadable, use_link
from broker.engines.redis_scripts import APPEND, ATTACH, FORMAT, RENEW
from broker.engines.redis_wire import CALL_SECONDS, LinkLost, to_bytes, to_text
from broker.engines.waiting import BATCH_BYTES, BATCH_PUBLICATIONS

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("broker")

LOG_BYTES: Final = 64 * 2**20
"""So much of the log is kept: a node that is behind by more has lost something. Ten seconds of all that
one Redis can take."""

UNREAD_PUBLICATIONS: Final = 2 * BATCH_PUBLICATIONS
UNREAD_BYTES: Final = 2 * BATCH_BYTES
"""So much of this node may be in the log and not be read back until it makes another batch: one is read while
another is sent. What is in the log waits in its order there, whoever comes."""

READ_ENTRIES: Final = 64
"""Entries in one read: no more than 64 MiB, and as a rule what 16 nodes say in 4 ms."""

BLOCK_SECONDS: Final = 1.0
"""How long a read waits for more. It ends by itself when something comes."""

TICK_SECONDS: Final = 3.0
"""A node that has had nothing to say for so long says so: that finds a link which delivers nothing."""

SILENT_SECONDS: Final = 10.0
"""A batch that was not read back for so long is a sign that the link delivers nothing."""

RETRY_SECONDS: Final = 0.05
RETRY_MAX_SECONDS: Final = 2.0
"""Between two tries to connect, with as much again by chance, so that nodes do not come all at once."""

PATIENCE_SECONDS: Final = 5.0
"""A link that is lost for less is no matter: messages of that time wait."""

SKIPPED: Final = 2.0
"""Work of a part that nobody here wants, as `core.work` weighs it. Measured 1.5 to 2.5."""

LOST: Final = "some of the log is gone: who counts on getting all is told so"

ANOTHER_LOG: Final = "the log is another one"

IDLE_EPOCH_MS: Final = 86_400_000
"""An epoch that nobody asked for during a day ends, as in the other engines."""


class Draft(Struct, frozen=True, gc=False):
    """A part of a batch, about one topic; see `redis_scripts` for the flags."""

    flags: str
    topic: str
    size: int = 0
    ttl_ms: int = 0
    count: int = 0
    key: str = ""
    data: bytes = b""


class Logged(Struct, frozen=True, gc=False):
    """A part of an entry, as it is read: the same everywhere."""

    node: str
    """The node that has written it."""
    flags: str
    topic: str
    number: int
    """Which part of its batch it is."""
    first: int
    """The offset of the first publication, 0 where none has one."""
    epoch: str
    size: int
    ttl: float
    at: float
    """When, in Unix seconds by the clock of Redis."""
    place: int
    data: bytes


@attrs.define(eq=False)
class Flight:
    """A batch of this node, from when it is sent until it is read back."""

    counter: int
    drafts: Sequence[Draft]
    items: Sequence[object]
    """The item behind each draft, for the one that has submitted it."""
    sent_at: float
    is_answered: bool = False
    is_given_up: bool = False
    """Whether nobody waits for it any more: then it is not sent again."""
    up_to: int = 0
    """How many of all notes that there ever were had been taken when it was made."""
    publications: int = attrs.field(init=False)
    bytes: int = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.publications = sum([draft.count for draft in self.drafts])
        self.bytes = sum([len(draft.data) for draft in self.drafts])


class LogReader(Protocol):
    """Gets the entries that are read from a log, and has the drafts to append: the engine."""

    def gather(self) -> tuple[Sequence[Draft], Sequence[object]]:
        """Take what is to be appended now, as much as a batch may hold. No checkpoint."""

    def skips(self, flags: str, topic: str) -> bool:
        """Whether a part that another node has written is of no use here; then it counts as skipped, and is
        not taken. Most parts are, where there are many nodes: so it is asked before anything is decoded."""

    def take(self, logged: Logged, own: object | None) -> float:
        """Take what was read, `own` if it comes from this node and is known; return its work. No checkpoint.

        Below 0 where nothing was taken, as something is missing before it: again after `tell_gaps`."""

    async def tell_gaps(self) -> None:
        """Tell the subscribers of topics that have turned out to have a gap."""

    async def rest(self, work: float) -> float:
        """Called between two parts of an entry: others may run if that was much; return what is left."""

    def settled(self) -> None:
        """An entry was given out."""

    def finished(self, flight: Flight) -> None:
        """A batch of this node was read back, and all that is in the log of it was taken."""

    def heard(self, sender: str, message: bytes) -> float:
        """A message for this node alone; returns the work of it. No checkpoint."""

    def missed(self, flight: Flight) -> None:
        """A batch of this node will not be read back; nobody knows whether it was applied."""

    @property
    def taken(self) -> int:
        """How many of all notes that there ever were have been taken by `gather`, or refused."""

    async def linked(self, link: Link) -> None:
        """There is a link, and our place is found: enter this node. Raises `LinkLost`."""

    async def beat(self, link: Link) -> None:
        """Say now and then that this node lives, until cancelled. Raises `LinkLost`."""

    async def load(self, link: Link) -> None:
        """Fetch what every node has of the whole. Called before anything is read. Raises `LinkLost`."""

    async def lost(self, link: Link) -> None:
        """Something was lost before what is read next: nothing that is known of any topic is true. Raises
        `LinkLost`, and is then called again."""


class SharedLog:
    """See the module. `key` is the prefix of all keys of this log."""

    def __init__(self, url: RedisUrl, key: str, node: str, retained_bytes: int) -> None:
        self.url = url
        self.key = key
        self._log_key = to_bytes(f"{key}:log")
        self.node: str = node
        self._retained_bytes = retained_bytes
        self.place: int = -1
        """-1 before the first link."""
        self.lineage: str = ""
        self.failing: str = ""
        """Why there is no link; "" while there is one."""
        self.failing_since: float = 0.0
        self.has_left: bool = False
        """Whether this node has said that it stops: that the log knows it no more is no failure then."""
        self.batches: int = 0
        self.entries: int = 0
        self.losses: int = 0
        self.misread: int = 0
        self.link: Link | None = None
        self.reader: LogReader
        self._head: bytes | None = None
        """Of the entry at the place; None where it was not read."""
        self._server_lineage = ""
        self.inbox: tuple[int, int] = (0, 0)
        """The last message for this node that was read."""
        self.written: int = 0
        """How many of all notes that there ever were are in Redis."""
        self._mail: deque[tuple[tuple[int, int], str, bytes]] = deque()
        self._flights: deque[Flight] = deque()
        self._counter = 0
        self._something = trio.Event()
        self._moved = trio.Event()
        self._tasks: trio.CancelScope | None = None
        self._why = ""
        self._retry_seconds = RETRY_SECONDS

    @property
    def flights(self) -> Sequence[Flight]:
        return self._flights

    def become(self, node: str) -> Sequence[Flight]:
        """Be another node, which has sent nothing yet; what the former had sent."""
        self.node, self.inbox, self._counter = node, (self.place, 0), 0
        self._mail.clear()
        flights, self._flights = self._flights, deque()
        return flights

    @property
    def refusal(self) -> str:
        """Why nothing is taken, as there has been no link for a while; "" where it is."""
        has_waited = self.failing_since + PATIENCE_SECONDS < trio.current_time()
        return self.failing if self.failing and has_waited else ""

    def wake(self) -> None:
        """There is something to append."""
        self._something.set()

    def lose(self, why: str) -> None:
        """Give the link up; another one is opened."""
        self._why = self._why or why
        self.link = None
        if self._tasks is not None:
            self._tasks.cancel()

    async def wait_moved(self) -> None:
        """Wait until something was read, or there is a new link."""
        await self._moved.wait()

    async def wait_link(self) -> Link:
        """Wait for a link that works."""
        while self.link is None:
            await self._moved.wait()
        return self.link

    def _note_moved(self) -> None:
        moved, self._moved = self._moved, trio.Event()
        moved.set()

    # the link

    async def serve(self) -> None:
        """Append and read, over one link after the other, until cancelled."""
        while True:
            why = await use_link(self.url, self._use)
            self._note_lost(why or self._why or "the connection ended")
            self._why = ""
            await trio.sleep(self._retry_seconds * (1 + random.random()))  # noqa: S311 - no secret
            self._retry_seconds = min(2 * self._retry_seconds, RETRY_MAX_SECONDS)

    def _note_lost(self, why: str) -> None:
        self.link = None
        if not self.failing and not self.has_left:
            self.failing_since = trio.current_time()
            log.error("engine_failing", redis=self.url.where, reason=why)
        self.failing = why

    async def _use(self, link: Link) -> None:
        await self.attach(link)
        await self.reader.linked(link)
        async with trio.open_nursery() as nursery:
            self._tasks = nursery.cancel_scope
            self._note_linked(link)
            nursery.start_soon(self._guard, self._write, link, name="engine writer")
            nursery.start_soon(self._guard, self._pump, link, name="engine reader")
            nursery.start_soon(self._guard, self.reader.beat, link, name="engine beat")
        self._tasks = None

    async def _guard(self, task: "Task", link: Link) -> None:
        """A failure ends the link, and raises nothing: several may fail at once."""
        try:
            await task(link)
        except LinkLost as error:
            self.lose(str(error))
        except UNREADABLE as error:
            self.lose(unreadable(error))

    async def attach(self, link: Link) -> None:
        """Find our place in the log again; the first time, its end. Raises `LinkLost`."""
        lineage, last, began, first, head, done, version = await self._look(link)
        lineage = lineage.decode()
        if version != FORMAT:
            text = f"the keys have format {version}, and this version knows {FORMAT}"
            raise LinkLost(text)
        if self.place < 0:
            await self.reader.load(link)
            self.place, self.lineage, self._head = last, lineage, head
        elif not self._is_head(head) or self.place > last:
            oldest = int(first.split(b"-")[0]) if first else last
            if lineage == self.lineage and (self.place > last or (first and oldest <= self.place)):
                renewed = RENEW, self.key + ":log", self.key, lineage, secrets.token_hex(4)
                lineage, began = await link.reader.run(*renewed)
                lineage = lineage.decode()
            if lineage != self.lineage:
                await self._lose_place(link, began, lineage)
        else:
            self._head = head
        self._server_lineage = lineage
        self._sort_flights(done)

    async def _look(self, link: Link) -> Any:
        """The state of the log, and of our place in it; see the script."""
        token, place = secrets.token_hex(4), "" if self.place < 0 else str(self.place)
        return await link.reader.run(ATTACH, self.key + ":log", self.key, self.node, token, place)

    def _is_head(self, head: bytes) -> bool:
        """Whether this is the head of the entry that was read last, as far as we know that."""
        return self._head is None or head == self._head

    def _note_linked(self, link: Link) -> None:
        if self.failing:
            log.info("engine_recovered", redis=self.url.where)
        self.failing = ""
        self.link = link
        self._note_moved()

    async def _lose_place(self, link: Link, place: int, lineage: str) -> None:
        """Go on somewhere else, or with another lineage, once the reader has dealt with that."""
        self.losses += 1
        log.warning("log_lost", redis=self.url.where, detail=LOST)
        with trio.CancelScope(shield=True):
            await self.reader.lost(link)
        self.place, self.lineage, self._head = place, lineage, None
        self.inbox = min(self.inbox, (place, 0))
        self._mail.clear()
        self._server_lineage = lineage
        self._note_moved()

    def _sort_flights(self, done: int) -> None:
        """Note which flights were applied though nobody heard of it; forget those nobody waits for."""
        for flight in list(self._flights):
            if flight.counter <= done:
                flight.is_answered = True
                self.written = max(self.written, flight.up_to)
            elif flight.is_given_up:
                self._flights.remove(flight)
                self.reader.missed(flight)
            else:
                flight.is_answered = False  # what was applied is gone with the log

    # appending

    async def _write(self, link: Link) -> None:
        for flight in [each for each in self._flights if not each.is_answered]:
            await self._append(link, flight)
        while True:
            with trio.move_on_after(TICK_SECONDS):
                await self._something.wait()
            self._something = trio.Event()
            while self._leaves_much_unread():
                await self.wait_moved()
            drafts, items = self.reader.gather()
            self._counter += 1
            flight = Flight(self._counter, drafts, items, trio.current_time())
            flight.up_to = self.reader.taken
            self._flights.append(flight)
            await self._append(link, flight)

    def _leaves_much_unread(self) -> bool:
        """Whether much is to be read back first; what nobody waits for may be lost."""
        unread = [flight for flight in self._flights if not flight.is_given_up]
        return (
            sum([flight.publications for flight in unread]) >= UNREAD_PUBLICATIONS
            or sum([flight.bytes for flight in unread]) >= UNREAD_BYTES
        )

    async def _append(self, link: Link, flight: Flight) -> None:
        parts: list[bytes | str | int] = [self.key, self.node, flight.counter, secrets.token_hex(4)]
        parts += [LOG_BYTES, IDLE_EPOCH_MS, self._retained_bytes]
        for draft in flight.drafts:
            parts += [draft.flags, draft.topic, draft.size, draft.ttl_ms, draft.count]
            parts += [draft.key, draft.data]
        before = self.place  # others may append, and be read, while the answer is on its way
        answer = await link.writer.run(APPEND, self.key + ":log", *parts)
        if answer[0] < 0:
            raise LinkLost("this node is not among the others any more")
        flight.is_answered = True
        self.written = max(self.written, flight.up_to)
        self.batches += 1
        self._retry_seconds = RETRY_SECONDS
        self._note_moved()
        if answer[1].decode() != self._server_lineage or answer[2] < before:
            raise LinkLost(ANOTHER_LOG)

    # reading

    async def _pump(self, link: Link) -> None:
        # The bounds of two scopes are moved: two new ones for each read cost as much as the read.
        with trio.CancelScope() as patience, trio.CancelScope() as whole:
            while True:
                patience.deadline = trio.current_time() + BLOCK_SECONDS + CALL_SECONDS
                read = await self._read(link)
                patience.deadline, whole.shield = inf, True
                for name, fields in read.get(self._log_key, ()):
                    await self._take(link, name, fields)
                if self._mail:
                    await self._hand_out_mail()
                whole.shield = False
                self._check_alive()
        raise LinkLost("it does not answer")

    async def _read(self, link: Link) -> "_Read":
        """The next entries of the log, none after `BLOCK_SECONDS`; mail is put aside."""
        inbox = f"{self.key}:in:{self.node}"
        places = f"{self.place}-0", f"{self.inbox[0]}-{self.inbox[1]}"
        streams = b"STREAMS", self._log_key, inbox, *places
        options = b"COUNT", READ_ENTRIES, b"BLOCK", int(BLOCK_SECONDS * 1000)
        found: _Read = await link.pump.wait(b"XREAD", *options, *streams) or {}
        for name, fields in found.get(inbox.encode(), ()):
            if _place_of(name)[0] > self.place + 2 * LOG_BYTES:  # ours would be lost by now
                await self._take_out(link, inbox, name)
                continue
            self.inbox = _place_of(name)
            self._mail.append((self.inbox, fields[0].decode(errors="replace"), fields[1]))
        return found

    async def _take_out(self, link: Link, key: str, name: bytes) -> None:
        """Take out what another program has put into a stream of ours."""
        self.note_misread(f"an entry of another program in {key}: is the prefix in use?", name)
        await link.pump.call(b"XDEL", key, name)

    def note_misread(self, reason: str, name: bytes) -> None:
        """Log and count what was passed over, with the place or the key where it is."""
        self.misread += 1
        place = name.decode(errors="replace")
        log.error("log_misread", redis=self.url.where, entry=place, reason=reason[:200])

    async def _hand_out_mail(self) -> None:
        """Hand out the messages whose batches were read: they come behind what is in these."""
        work = 0.0
        while self._mail and self._mail[0][0][0] <= self.place:
            _, sender, message = self._mail.popleft()
            work = await self.reader.rest(work + self.reader.heard(sender, message))
        self.reader.settled()

    def _check_alive(self) -> None:
        oldest = next((each for each in self._flights if each.is_answered), None)
        if oldest is not None and oldest.sent_at + SILENT_SECONDS < trio.current_time():
            oldest.sent_at = trio.current_time()
            raise LinkLost("what is appended does not come back")

    async def _take(self, link: Link, name: bytes, fields: Sequence[bytes]) -> None:
        head, place = _Head.read(fields), _place_of(name)[0]
        if head is None:
            await self._take_out(link, f"{self.key}:log", name)
            return
        lineage, before = head.lineage, head.before
        if lineage != self.lineage:
            # Either some of the log is gone behind our place, or it is another log, of which we have missed
            # the first entries: also where the places are the same.
            found = await self._look(link)
            if not self._is_head(found[4]):
                raise LinkLost(ANOTHER_LOG)
        if before != self.place or lineage != self.lineage:
            await self._lose_place(link, before, lineage)
        flight = self._own_flight(head.counter) if head.node == self.node else None
        work = 0.0
        for i in range(2, len(fields), 2):
            try:
                words = to_text(fields[i]).split(" ", 6)
                if flight is None and self.reader.skips(words[0], words[6]):
                    work += SKIPPED
                    continue
                logged = _logged(head.node, words, fields[i + 1], head.at, place)
                own = None if flight is None else flight.items[logged.number]
                done = self.reader.take(logged, own)
                if done < 0:
                    await self.reader.tell_gaps()
                    done = self.reader.take(logged, own)
            except (ValueError, IndexError) as error:
                # A mistake of another version. Of a topic that is kept, what comes next has a gap before it.
                self.note_misread(str(error), name)
                done = SKIPPED
            work += done
            if work >= ROUND:
                work = await self.reader.rest(work)
        await self.reader.rest(work)
        if flight is not None:
            self.reader.finished(flight)
        self.place, self._head = place, fields[1]
        self.entries += 1
        if self._mail:
            await self._hand_out_mail()
        self.reader.settled()
        self._note_moved()

    def _own_flight(self, counter: int) -> Flight | None:
        """The flight that is read back; none that was sent before it will be."""
        while self._flights and self._flights[0].counter <= counter:
            flight = self._flights.popleft()
            if flight.counter == counter:
                return flight
            self.reader.missed(flight)
        return None


_Read = Mapping[bytes, Sequence[tuple[bytes, Sequence[bytes]]]]
"""The entries of each stream: the place and the fields."""


class _Head(NamedTuple):
    """The head of an entry; see `redis_scripts`."""

    node: str
    counter: int
    before: int
    lineage: str
    at: float
    """When, in Unix seconds."""

    @classmethod
    def read(cls, fields: Sequence[bytes]) -> "_Head | None":
        """The head of an entry; None for one that is none of ours."""
        try:
            node, counter, before, lineage, ms = fields[1].decode().split(" ")
            return cls(node, int(counter), int(before), lineage, int(ms) / 1000)
        except (ValueError, IndexError):
            return None


class Task(Protocol):
    async def __call__(self, link: Link) -> None: ...


def _place_of(name: bytes) -> tuple[int, int]:
    place, _, number = name.partition(b"-")
    return int(place), int(number)


def _logged(node: str, words: Sequence[str], data: bytes, at: float, place: int) -> Logged:
    flags, number, first, epoch, size, ttl, topic = words
    numbers = int(number), int(first)
    return Logged(node, flags, topic, *numbers, epoch, int(size), int(ttl) / 1000, at, place, data)
