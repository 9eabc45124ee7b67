"""The engine, as the rest of the broker sees it: *the log decides, memory answers*.

A publication is appended to a log. It comes back from there, and then gets its offset, is fanned out and is
acknowledged, in the order of the log. An engine without a log gives it back at once.

All engines promise:

1. Per topic one order, and offsets without a hole, the same for everybody.
2. A `Done` without a refusal means: the publication is kept, as far as `durability` says, and delivered.
3. Nothing is delivered twice within one epoch. An epoch that anybody was told of is never used for
   another count: after a loss there is a new one.

Not promised: an order between topics; that a publication is kept for its whole ttl; that one which was *not*
acknowledged is gone: a process that was killed may have kept it.

Every method is called in Trio's thread, and each async one says what it waits for.
"""

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from types import MappingProxyType
from typing import Final, Literal, Protocol, TypeAlias, TypeVar

import attrs

from broker.config.settings import TopicRules
from broker.core.history import HistoryStatistics
from broker.core.idempotency import IdempotentResults
from broker.core.messages import ClientInfo, Delivery, Fd, Position, Publication, data_bytes
from broker.core.retained import Retained
from broker.core.session import Parcel
from broker.core.work import Allowance, Meter
from broker.engines.cluster import ClusterLink
from broker.engines.waiting import LITTLE_BYTES
from broker.errors import Refused

T = TypeVar("T")

Durability: TypeAlias = Literal["none", "process", "power", "shared"]
"""The faults that an acknowledged publication survives: none, the death of this process, the loss of power;
or the faults that a server survives which this process shares with others."""

Done: TypeAlias = Callable[["Position | Refused | None"], None]
"""Called once for what was submitted: with the topic's position right behind it, None where no history
keeps it, or `Refused` when it is not kept. Never waits."""


NOWHERE: Final[Mapping[str, Position | None]] = MappingProxyType({})
"""The positions of clients that have nothing of any topic."""


class RunBlocking(Protocol):
    """Does work that waits for a disk, one piece at a time. Cancelled, it waits for the end of what has begun."""

    def __call__(self, work: Callable[[], T], /) -> Awaitable[T]: ...


@attrs.frozen
class IdempotencyKey:
    """An idempotency key: whose it is, and the key. The owner is a user, or None for the app."""

    owner: str | None
    key: str


PUBLICATION_BYTES: Final = 64
"""A publication that waits to be kept costs so much besides its data."""

SUBMISSION_BYTES: Final = 512
"""Each submission costs so much besides."""


@attrs.define(eq=False)
class Submission:
    """Publications to one topic that are to be kept, and then delivered: a run, or one with options.

    The parcel belongs to the engine from `submit` on, which puts the offsets into its publications.
    Without `keep` the history leaves them out, and they only keep their place among the others. With
    `retain` the last of them is the topic's last value. `dones` may get more until it is settled.
    """

    parcel: Parcel
    rules: TopicRules
    keep: bool = True
    retain: bool = False
    key: IdempotencyKey | None = None
    dones: list[Done] = attrs.field(factory=list)
    count: int = attrs.field(init=False, default=0)
    weight: int = attrs.field(init=False, default=0)
    """The publications in it, and the bytes that it costs while it waits. `weigh` sets them."""

    def weigh(self) -> None:
        """Count and weigh what is in it: for an engine, once, when it takes it."""
        batches = self.parcel.batches
        self.count = sum(map(len, batches))
        size = sum(map(data_bytes, batches))
        self.weight = size + PUBLICATION_BYTES * self.count + SUBMISSION_BYTES

    @property
    def topic(self) -> str:
        return self.parcel.topic

    @property
    def party(self) -> Allowance | None:
        """The party that publishes, and whose turn this takes; see `engines.waiting`."""
        return self.parcel.payer


@attrs.frozen
class View:
    """The answer to a subscriber that begins now.

    `missed` is all that was published after its position, if it has `recovered`; `top` is where it
    goes on from.
    """

    missed: list[Publication]
    recovered: bool
    top: Position


@attrs.frozen
class EngineStatistics:
    """A snapshot. Counts are since the engine was opened; without a log all but `history` are 0."""

    history: HistoryStatistics
    waiting: int = 0
    """Bytes that were submitted and are not settled."""
    batches: int = 0
    """Commits."""
    submitted: int = 0
    """Publications that went by `submit`."""
    log_bytes: int = 0
    """Bytes of the log: those that it keeps, and those that the next cleaning takes out."""
    failing: str = ""
    """Why nothing is kept now, such as a full disk; "" while all is well."""
    entries: int = 0
    """Batches that were read from a log that nodes share, those of this node among them."""
    skipped: int = 0
    """Publications in these that nobody here wanted, in runs."""
    losses: int = 0
    """Times that some of that log was lost."""
    misread: int = 0
    """Entries of that log, or parts of one, that could not be read and were passed over."""


class Sink(Protocol):
    """Gets what an engine gives back: the router."""

    def deliver(self, parcel: Parcel, *, retain: bool) -> float:
        """Fan a parcel out now; return the work of that step, as `core.work` weighs it, so that the engine
        lets others run after a round of it. The writes come then, and one write takes all of the round.
        No checkpoint."""

    def settled(self) -> None:
        """Every `Done` of a batch was called: send the answers that were held for it. No checkpoint."""

    # of an engine that several nodes share

    def wants(self, topic: str) -> bool:
        """Whether anybody here listens to what is published to a topic."""

    def listened(self) -> Sequence[str]:
        """The topics with listeners here. Linear in them."""

    def gap(self, topic: str) -> Iterator[float]:
        """Something was lost before the next publication: end the present subscriptions that count on getting
        all, so that they recover, or learn of their loss. One by one, each with its work, so that others may
        run in between; nothing is delivered meanwhile."""


class Engine(Protocol):
    """Keeps what topics publish, decides its order, and gives it back. See the module."""

    durability: Durability
    meter: Meter
    """The one of its broker, to which it adds the work that is not every publication's; see `core.work`."""
    cluster: ClusterLink
    """The nodes that share it. Their messages and publications come from one log: each parcel on all nodes,
    with the same `place`, `exclude` and `report_to`; the node that has submitted it gets that very parcel.
    One with `report_to` is delivered whether anybody `wants` it or not."""

    @property
    def retained(self) -> Retained:
        """The last values. Changed only by what is delivered."""

    @property
    def keys(self) -> IdempotentResults[Delivery]:
        """The outcomes of publishes with a key."""

    # publishing

    def defers(self, topic: str, rules: TopicRules, *, more: bool = False) -> bool:
        """Whether the next publication to a topic has to go by `submit`; else it goes by `publish`
        where the rules keep a history, and needs no engine where they do not.

        `more`: something else than the history has to keep it, a retained value or a key. Where nodes
        share the engine everything goes by `submit`, `user:NAME` as well. Never asked about `fd:N`.
        Raises `Refused` (100, temporary) while nothing can be kept.
        """

    def publish(
        self, topic: str, publications: Sequence[Publication], rules: TopicRules, now: float
    ) -> Sequence[Publication]:
        """Keep publications now, where they are not deferred; return them with their offsets. No
        checkpoint. `now` is `trio.current_time()`: asked for once a run, because it costs more than the
        rest."""

    def publish_run(
        self,
        topic: str,
        contents: Sequence[bytes],
        info: ClientInfo | None,
        opaque: bool,
        rules: TopicRules,
        now: float,
    ) -> Sequence[Publication]:
        """The same for what one publisher says in a row, without tags or time: to make the publications
        here, where their offsets are known, is a third less work."""

    def submit(self, submission: Submission) -> None:
        """Take what is to be kept. Never waits, never calls a `Done` itself.

        Later, with no checkpoint in between, `Sink.deliver` gets the parcel and each `Done` the
        position; or each `Done` gets `Refused`. Where nodes share the engine, what goes to `user:NAME`
        is refused with 102 if the drawer of that name has no card.
        """

    def is_full(self, party: Allowance | None = None, size: int = LITTLE_BYTES) -> bool:
        """Whether a publisher should wait for room with so many bytes: as much is on its way as may be, and
        this would be more than a little of this party's. None is this very program."""

    async def wait_room(self) -> None:
        """Wait until there is room again for whatever comes; others may have taken it by then. Cancelled,
        nothing happens."""

    # reading: one atomic step each, with no checkpoint, so that a publication of that time falls either
    # before it or behind it, never in between and never into both. About a topic that it knows: a reader
    # fetches it first, and then decides anew whether it still may.

    def knows(self, topic: str, since: Position | None = None) -> bool:
        """Whether what follows may be asked about a topic, until the next checkpoint; of one that a client has
        something of, `since`, also whether the topic has come so far here. An engine that nobody shares knows
        all."""

    async def fetch(
        self, topics: Sequence[str], since: Mapping[str, Position | None] = NOWHERE
    ) -> None:
        """Have these topics known when it returns, until the next checkpoint. Of those with a position that is
        not known here, all is read that any node may have told of until now: what is not known then, never
        was, or is lost. Raises `Refused` (100, temporary) where that cannot be. Cancelled, nothing happens."""

    def position(self, topic: str) -> Position:
        """Where a topic is; begins an epoch if there is none."""

    def view(self, topic: str, since: Position) -> View:
        """The publications that a subscriber has missed which has everything up to `since`. All that
        `Sink.deliver` got before is in the view, and nothing that it gets later."""

    def history(
        self, topic: str, since: Position | None, limit: int, reverse: bool
    ) -> tuple[list[Publication], Position]:
        """See `HistoryStore.read`. Raises `UnrecoverablePosition` when `since` is of another epoch."""

    def peek(
        self, topic: str, since: int | None, limit: int, reverse: bool = False
    ) -> list[Publication]:
        """About the publications that `history` would list, to know its cost before."""

    # forgetting

    async def remove(self, topic: str) -> None:
        """Forget a topic's publications; its epoch and count go on. Done when it returns, in its
        place among what was submitted. Cancelled, it may be done or not. Raises `Refused`."""

    def forget(self, is_over: Callable[[str], bool]) -> None:
        """Forget the topics that this is true of now, with their epochs; what is on its way to them is
        delivered and not kept. Each is forgotten before anybody looks at it or publishes there, and all others in
        pieces while others run, in a second or some. Never waits."""

    # the part of the broker's memory that it takes

    @property
    def bytes_held(self) -> int:
        """Bytes of publications that are kept, and of those that wait for that."""

    @property
    def heaviest_bytes(self) -> int:
        """Bytes of the owner with the most; see `HistoryStore`."""

    def prepare(self, size: int) -> bool:
        """Get ready to give back so much, in steps; see `HistoryStore.prepare`."""

    def give_back(self, size: int) -> int:
        """Let histories give way until so many bytes are free; return how many are."""

    # fds

    @property
    def next_fd(self) -> Fd:
        """The first fd that no connection had, as far as this engine remembers; else 1."""

    def note_fds(self, next_fd: Fd) -> None:
        """Say about once a second what the fd of the next connection is. Never waits."""

    # life

    def running(self, sink: Sink) -> AbstractAsyncContextManager[None]:
        """Give back to `sink` for as long as the block. At its end all that was submitted is settled,
        within `close_seconds`; then what is left is refused."""

    def statistics(self) -> EngineStatistics: ...
