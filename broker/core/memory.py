"""The memory that a broker holds: one account of all of it, and who gives way when it is short.

Words: a *part* is one kind of what is held; a *holding* is the memory of one connection, or of one request,
without the bytes that wait in its outbox; its *holder* can give way; a *party* is a user, or an address where
there is none.

Rules:

1. Each byte is in one part. A part counts for itself, as a store does that has a total, or is
   charged to holdings. Charges are made in steps, and none on the way of a publication.
2. Kept data are entitled to one half of the budget, all else to the other. When memory is short, what
   is over its half gives way first.
3. Of connections and requests the heaviest party gives way first, and of that its heaviest holding.
   A holding of less than `FREE_BYTES` never does. Where none is larger, kept data give way; and if there are
   none either, newcomers are refused.
4. Close to the limit, a holding of more than that gets no more. So nobody can bring another down by asking.
5. Nothing here waits, or does anything to anybody. It is said who has to give way; see `session.memory`.

Not promised: that the process takes no more than this. Python, buffers of the system, and holes
between what is held come on top.
"""

import heapq
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from math import inf
from types import TracebackType
from typing import Any, Final, Protocol

import attrs

FREE_BYTES: Final = 64 * 2**10
"""Bytes that everybody may hold, however short memory is: one read of a socket, a hundred subscriptions."""

NEAR: Final = 0.9
"""Part of the limit up to which anybody may ask for more, and down to which is given way: the rest is
for what cannot be refused, and a look at everybody pays for itself by a tenth of all memory."""

STEPS: Final = 1024
"""Of what is left, the part that may come before all is summed up again: a look costs as much as a subscription."""

STEP_BYTES: Final = 2**20
"""No more than that comes in between: sixty connections."""

STREAM_BYTES: Final = 16 * 2**10
"""An accepted stream, its tasks and its session, idle: 8.9 KiB of RSS for a WebSocket, 17.8 KiB for a
client over HTTP."""

TLS_STREAM_BYTES: Final = 36 * 2**10
"""The same over TLS, measured alike: 33.7 and 37.3 KiB."""


class Part(StrEnum):
    """The kinds of what is held."""

    CONNECTIONS = "connections"
    """Accepted streams, with their tasks and sessions; and what is remembered of those that ended last."""
    OUTBOXES = "outboxes"
    """Messages on their way to peers, each counted once however many get it."""
    WINDOWS = "windows"
    """The last bytes that clients sent, because the messages that they compress refer to them."""
    INCOMING = "incoming"
    """Bytes of peers that were not dealt with yet: parts of messages, bodies, commands that wait."""
    SUBSCRIPTIONS = "subscriptions"
    WILLS = "wills"
    REQUESTS = "requests"
    """Requests between clients that wait for an answer."""
    READERS = "readers"
    """Publications that wait for readers in this program."""
    EVENTS = "events"
    """Events that wait for their readers."""
    HISTORY = "history"
    RETAINED = "retained"
    KEYS = "keys"
    """Results by idempotency key."""


KEPT: Final = (Part.HISTORY, Part.RETAINED)
"""The parts of kept data, that give back when memory is short."""


@attrs.frozen
class MemoryStatistics:
    """A snapshot, in bytes. `refused` and `gave_way` count since `serve` began."""

    limit: float
    held: int
    parts: Mapping[str, int]
    refused: int
    """Commands and requests that were refused because memory was short."""
    gave_way: int
    """Connections and requests that were ended for that."""


@attrs.define(eq=False)
class Ledger:
    """How many bytes the runs hold that were entered here and are still needed by somebody; and how many
    messages and bytes were ever offered to single outboxes: replies, pushes, control frames.

    Those who add to it look now and then whether that is more than `most`, and call `on_full`.
    """

    bytes_held: int = 0
    most: float = inf
    on_full: Callable[[], None] = lambda: None
    throw_away: Callable[[list[Any]], None] = lambda runs: None
    """Takes a list that somebody has no use for, and nobody else has; its runs may stay for a while."""
    messages_offered: int = 0
    bytes_offered: int = 0


class Holder(Protocol):
    """A connection, or a request whose body is read: it can give way."""

    @property
    def party(self) -> str:
        """The user, or the address, that it belongs to."""

    @property
    def waiting(self) -> int:
        """Bytes that wait in its outbox, at most. Constant time."""

    def own_waiting(self) -> int:
        """About how many bytes would be free if those were dropped; data of several outboxes count in part."""

    def give_way(self) -> None:
        """End, as memory is short. Never waits; called once more while it still holds something."""


@attrs.define(eq=False)
class Holding:
    """The memory that is held for one holder, besides its outbox; `bytes` is the sum of all parts.

    As a context manager it is part of its budget for as long as the block; afterwards it holds
    nothing, and a charge changes nothing. `holder` is None for a holding that never gives way.
    """

    budget: "MemoryBudget" = attrs.field(factory=lambda: MemoryBudget())  # noqa: PLW0108 - defined below
    holder: Holder | None = None
    bytes: int = 0
    is_closed: bool = False
    has_given_way: bool = False
    _parts: dict[Part, int] = attrs.field(init=False, factory=dict)

    def __enter__(self) -> "Holding":
        self.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def open(self) -> None:
        """Be part of its budget, until `close`."""
        self.budget.add(self)

    def close(self) -> None:
        """Hold nothing any more; a charge changes nothing from now on."""
        self.is_closed = True
        for part, held in self._parts.items():
            self.budget.charge(part, -held)
        self._parts.clear()
        self.bytes = 0
        self.budget.discard(self)
        self.holder = None

    def charge(self, part: Part, more: int) -> None:
        """Hold more bytes, or fewer if negative."""
        if more and not self.is_closed:
            self.bytes += more
            self._parts[part] = self._parts.get(part, 0) + more
            self.budget.charge(part, more)

    def refusal(self, size: int) -> str:
        """Why so many bytes more cannot be had; "" if they can.

        The caller charges the bytes in the same step, if it takes them.
        """
        budget = self.budget
        if self.bytes + size > budget.connection_room:
            return f"more than {budget.connection_room:.0f} bytes for one connection"
        if budget.has_room(size):
            return ""
        if self.bytes + size <= FREE_BYTES and not budget.is_exhausted:
            return ""
        budget.refused += 1
        return "memory is short"

    def give_way(self) -> None:
        """Have its holder end, as memory is short."""
        if self.holder is not None:
            self.budget.gave_way += not self.has_given_way
            self.has_given_way = True
            self.holder.give_way()

    @property
    def is_over(self) -> bool:
        """Whether it is more than one connection may have, so that nothing more should be read."""
        return self.bytes > self.budget.connection_room

    @property
    def excess(self) -> int:
        """The bytes that would be free if its holder gave way, beyond `FREE_BYTES`."""
        holder = self.holder
        if holder is None or self.bytes + holder.waiting <= FREE_BYTES:
            return 0
        return max(0, self.bytes + holder.own_waiting() - FREE_BYTES)


@attrs.define(eq=False)
class MemoryBudget:
    """The account; see the module. Bytes everywhere.

    `connection_room` is what one connection may hold besides its outbox. `on_short` is called, again
    and again, while more than `limit` is held; it must not do more than note that.
    """

    runs: Ledger = attrs.field(factory=Ledger)
    limit: float = inf
    connection_room: float = inf
    on_short: Callable[[], None] = lambda: None
    refused: int = 0
    gave_way: int = 0
    _seen: float = attrs.field(init=False, default=0.0)  # that was held at the last look
    _unseen: float = attrs.field(init=False, default=inf)  # that has come since then, or more
    _step: float = attrs.field(init=False, default=FREE_BYTES)  # that may come before the next one
    _exhausted: bool = attrs.field(init=False, default=False)
    _counts: dict[Part, Callable[[], int]] = attrs.field(init=False, factory=dict)
    _charged: "Counter[Part]" = attrs.field(init=False, factory=Counter)
    _charged_bytes: int = attrs.field(init=False, default=0)
    _holdings: dict[Holding, None] = attrs.field(init=False, factory=dict)

    def __attrs_post_init__(self) -> None:
        self.runs.on_full = self.look

    def resize(self, limit: float, connection_room: float) -> None:
        """Go by other bounds."""
        self.limit, self.connection_room = limit, connection_room
        self.look()

    # filling

    def count(self, part: Part, count: Callable[[], int]) -> None:
        """Have a part counted by a function, which is called often: it costs a look-up or two."""
        self._counts[part] = count

    def hold(self, holder: Holder | None = None) -> Holding:
        """A holding, to be entered."""
        return Holding(self, holder)

    def add(self, holding: Holding) -> None:
        self._holdings[holding] = None

    def discard(self, holding: Holding) -> None:
        del self._holdings[holding]

    def charge(self, part: Part, more: int) -> None:
        """Hold so many bytes more of a part that does not count for itself."""
        self._charged[part] += more
        self._charged_bytes += more
        if more > 0:
            self._note(more)

    # looking

    def has_room(self, size: int) -> bool:
        """Whether so many bytes more fit below the limit, with room to spare."""
        self._note(0)
        if self._seen + self._unseen + size > NEAR * self.limit:
            self.look()
        return self._seen + size <= NEAR * self.limit

    def _note(self, more: int) -> None:
        """Count what comes, and look when it is enough: to ask all parts costs as much as a subscription."""
        # A charge may come with a stream, which counts for itself, as all kept data do.
        self._unseen += max(more, STREAM_BYTES)
        if self._unseen >= self._step or self._seen + self._unseen > self.limit:
            self.look()

    @property
    def held(self) -> int:
        """All that is held now. About a microsecond."""
        return self._held_besides_runs() + self.runs.bytes_held

    def charged(self, part: Part) -> int:
        """The bytes of a part that are held by charges."""
        return self._charged[part]

    @property
    def kept(self) -> int:
        """The kept data of it."""
        return sum(self._counts[part]() for part in KEPT if part in self._counts)

    def look(self) -> None:
        """See whether memory is short, and say how much more the runs may take."""
        besides = self._held_besides_runs()
        self.runs.most = self.limit - besides
        self._seen, self._unseen = besides + self.runs.bytes_held, 0.0
        left = NEAR * self.limit - self._seen
        self._step = min(max(FREE_BYTES, left / STEPS), STEP_BYTES)
        if self._seen > self.limit:
            self._unseen = inf  # and so at every charge
            self.on_short()

    @property
    def is_exhausted(self) -> bool:
        """Whether memory is short, and nobody was there who could give way."""
        return self._exhausted and self.held > self.limit

    def set_exhausted(self, exhausted: bool) -> None:
        """Note whether everybody has given way who could, and that was not enough."""
        self._exhausted = exhausted

    def statistics(self) -> MemoryStatistics:
        parts = {part: self._charged[part] for part in Part}
        for part, count in self._counts.items():
            parts[part] += count()
        parts[Part.OUTBOXES] += self.runs.bytes_held
        return MemoryStatistics(
            self.limit,
            self.held,
            {part.value: size for part, size in parts.items()},
            self.refused,
            self.gave_way,
        )

    def _held_besides_runs(self) -> int:
        return self._charged_bytes + sum([count() for count in self._counts.values()])

    # giving way

    @property
    def shortage(self) -> float:
        """How many bytes have to come free; 0 while memory is not short."""
        held = self.held
        return held - NEAR * self.limit if held > self.limit else 0.0

    @property
    def surplus_kept(self) -> float:
        """How many bytes the kept data are over their half."""
        return max(0.0, self.kept - self.limit / 2)

    def givers(self, goal: float) -> Iterator[tuple[Holding, int]]:
        """The holdings that give way for `goal` bytes to come free, the first first, and what each has.

        Before all others those who are about to already, and hold on to it. All are chosen before the
        first comes out. Linear in the holdings, and some 20 µs for each of those that are heavy.
        """
        found: list[tuple[Holding, int]] = []
        parties: dict[str, list[tuple[int, int, Holding]]] = {}
        for number, holding in enumerate(self._holdings):
            excess = holding.excess
            if excess and holding.has_given_way:
                found.append((holding, excess + FREE_BYTES))
                goal -= excess + FREE_BYTES
            elif excess and holding.holder is not None:
                members = parties.setdefault(holding.holder.party, [])
                members.append((excess, number, holding))
        heap = []
        for number, members in enumerate(parties.values()):
            members.sort(key=lambda member: member[:2])
            heap.append((-sum(excess for excess, _, _ in members), number, members))
        heapq.heapify(heap)
        while heap and goal > 0:
            together, number, members = heapq.heappop(heap)
            excess, _, holding = members.pop()
            found.append((holding, excess + FREE_BYTES))
            goal -= excess + FREE_BYTES
            if members:
                heapq.heappush(heap, (together + excess, number, members))
        return iter(found)


UNCOUNTED: Final = Holding()
"""Stands for a holding outside of a broker, or before there is one: charges to it count for nobody."""
