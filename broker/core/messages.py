"""Messages, and all else that travels: the frozen values that the other modules hand to each other.

Rule: everything here is immutable, and nothing here knows a socket, a clock or a wire format.
"""

from collections.abc import Iterator, Mapping, Sequence
from enum import IntEnum, StrEnum
from typing import Final, Literal, TypeAlias, overload

import attrs
import msgspec

from broker.core.json_reader import BadJson, TooDeep, value_of

Fd: TypeAlias = int
"""A connection's number on this broker: starts at 1, only grows, is never reused."""


Transport: TypeAlias = Literal["websocket", "http_stream", "sse", "uni_sse"]
"""How a peer is carried, in the words of the SDKs."""

ONE_WAY: Final = frozenset({"uni_sse"})
"""Those whose clients can send no command after the first."""


class Position(msgspec.Struct, frozen=True):
    """A place in one topic's history: everything up to and including `offset`, in this `epoch`."""

    offset: int
    epoch: str

    def reaches(self, other: "Position") -> bool:
        """Whether a topic that is here has been there. An empty epoch stands for any."""
        return other.epoch in ("", self.epoch) and other.offset <= self.offset


@attrs.frozen
class ClientInfo:
    """The client behind a connection, as other clients may see it. `*_info` are raw JSON."""

    client: str
    user: str = ""
    conn_info: bytes | None = None
    chan_info: bytes | None = None


class Publication(msgspec.Struct, frozen=True, gc=False):
    """One message on a topic. `data` is raw JSON in one line, kept as it came.

    `offset` is 0 where the topic keeps no history. `time` is Unix milliseconds, 0 if not known.
    `tags` belong to the publisher: short texts beside the data, for receivers and filters. `opaque` says that
    `data` is bytes of which nothing is known: a client over protobuf may send what is not JSON. A msgspec
    struct, because two are made per publication: 0.02 µs each, where attrs takes 0.34 µs.
    """

    topic: str
    data: bytes
    info: ClientInfo | None = None
    offset: int = 0
    time: int = 0
    tags: Mapping[str, str] | None = None
    opaque: bool = False

    @property
    def value(self) -> object:
        r"""`data` as Python objects, decoded anew at each use; as bytes where it is not JSON.

        Bytes are for `opaque` data alone: all other data is JSON. Half of a surrogate pair, such as
        ``"\ud83d"``, is U+FFFD (RFC 8259 section 8.2 leaves it open). A number beyond Python's range,
        such as ``1e999``, is an infinity. Of several members with one name there is the last.

        Raises `ValueError` for data that is nested so deeply that Python cannot hold it: a publisher
        may send up to a thousand levels, of which the caller's own calls take some. Nothing else.
        """
        try:
            return value_of(self.data)
        except TooDeep:
            raise ValueError("the data is nested too deeply for Python") from None
        except BadJson:
            if self.opaque:
                return self.data
            raise


PUBLICATION_BYTES: Final = 288
"""Bytes of one publication that somebody holds, besides its data and tags."""


class Series(Sequence[Publication]):
    """Publications of one publisher in a row, without tags, of one topic. Their offsets have no gap.

    They are made when somebody asks for one; code that only writes them looks at the fields. `first` is the
    offset of the first, 0 where none has one. `contents` is not to be changed any more.
    """

    __slots__ = ("_made", "contents", "first", "info", "opaque", "topic")

    def __init__(
        self,
        topic: str,
        contents: Sequence[bytes],
        info: ClientInfo | None = None,
        first: int = 0,
        opaque: bool = False,
    ) -> None:
        self.topic: str = topic
        self.contents: Sequence[bytes] = contents
        self.info: ClientInfo | None = info
        self.first: int = first
        self.opaque: bool = opaque
        self._made: list[Publication] | None = None

    def __len__(self) -> int:
        return len(self.contents)

    def __iter__(self) -> Iterator[Publication]:
        return iter(self._all())

    @overload
    def __getitem__(self, place: int) -> Publication: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Publication]: ...
    def __getitem__(self, place: int | slice) -> Publication | Sequence[Publication]:
        if isinstance(place, slice) or self._made is not None:
            return self._all()[place]
        data = self.contents[place]
        offset = self.first + place % len(self.contents) if self.first else 0
        return Publication(self.topic, data, self.info, offset, 0, None, self.opaque)

    def _all(self) -> list[Publication]:
        if self._made is None:
            topic, info, opaque = self.topic, self.info, self.opaque
            step = 1 if self.first else 0
            self._made = [
                Publication(topic, data, info, self.first + step * place, 0, None, opaque)
                for place, data in enumerate(self.contents)
            ]
        return self._made


def last_offset(publications: Sequence[Publication]) -> int:
    """The offset of the last of them, 0 where it has none; none of a series is made for it."""
    if isinstance(publications, Series):
        return publications.first and publications.first + len(publications.contents) - 1
    return publications[-1].offset


def data_bytes(publications: Sequence[Publication]) -> int:
    """The bytes of their data; none of a series is made for it."""
    if isinstance(publications, Series):
        return sum(map(len, publications.contents))
    return sum([len(each.data) for each in publications])


@attrs.frozen
class Frame:
    """One WebSocket message as a hook sees it; `opcode` and `fin` as in RFC 6455 section 5.2.

    A message that came in fragments is shown whole, so `fin` is true unless a test says otherwise.
    """

    data: str | bytes
    opcode: int
    fin: bool = True


class Opcode(IntEnum):
    """The kind of a frame that carries a message; the numbers are those of RFC 6455 section 5.2."""

    TEXT = 1
    BINARY = 2


class Initiator(StrEnum):
    """The side that began a close."""

    CLIENT = "client"
    SERVER = "server"
    HEARTBEAT = "heartbeat"
    SLOW = "slow"
    SHUTDOWN = "shutdown"
    NETWORK = "network"


@attrs.frozen
class Close:
    """How a connection ended. `undelivered` counts messages that were queued and never written."""

    code: int = attrs.field(converter=int)
    reason: str
    initiator: Initiator
    undelivered: int = 0

    def with_undelivered(self, undelivered: int) -> "Close":
        """The same end, with so many messages that were never written."""
        return Close(self.code, self.reason, self.initiator, undelivered)


@attrs.frozen
class Delivery:
    """The outcome of one publication at this node. Queued is not delivered: TCP tells nobody that
    a peer has read.

    `matched` subscriptions get it, of which `queued` took it and `dropped` did not, being too slow
    or on their way out; `failed` are the fds of those. A queue group is one subscription.
    `position` is the publication's place in its topic's history, None where it has none. Where nodes
    share an engine the counts are those of this node; with `report` of all that have answered, and
    `complete` is false if one has not.
    """

    matched: int
    queued: int
    dropped: int
    failed: tuple[Fd, ...] = ()
    position: Position | None = None
    complete: bool = True


class PushResult(StrEnum):
    """The outcome of a push. Queued is not delivered: TCP tells nobody that a peer has read."""

    QUEUED = "queued"
    FULL = "full"
    """There was no room. A peer that is known is closed then, with 3008. One that has not spoken yet stays,
    and so does one that a `send` may not wait for."""
    CLOSED = "closed"
    """It is not here, or on its way out."""
    FORWARDED = "forwarded"
    """On its way to another node, which has the connection if anybody has."""
    REBOUND = "rebound"
    """It became another user's while a `send` waited, and gets nothing that was meant for the first."""


@attrs.frozen
class ConnectionInfo:
    """A snapshot of one connection. Times are in Unix seconds. `bytes_queued` and `messages_queued` wait for it. `app_name` and `app_version` are what
    a Centrifuge client calls itself, the first 64 characters of each; empty for others."""

    fd: Fd
    user: str
    address: str
    path: str
    transport: Transport
    protocol: str
    opened_at: float
    topics: tuple[str, ...]
    app_name: str = ""
    app_version: str = ""
    last_received_at: float = 0.0
    last_sent_at: float = 0.0
    bytes_received: int = 0
    messages_received: int = 0
    bytes_queued: int = 0
    messages_queued: int = 0
    node: str = ""
    """The name of the node that it is on, where there are several."""


@attrs.frozen(kw_only=True)
class ConnectionDetails(ConnectionInfo):
    """A snapshot of all that is known of one connection. Messages and bytes count since it was opened.

    `idle_seconds` is how long nothing came from the peer. `rtt_seconds` is the time from the last ping
    that it answered to the answer, with whatever was queued before that ping; None before there was
    one: a peer that is not silent, and no Centrifuge client, is not pinged. `bytes_received` are those
    of the stream, with all headers of frames; `bytes_sent` those of frames, as the system has taken them.
    """

    established: bool
    """Neither closing nor gone."""
    age_seconds: float
    """Since it was opened."""
    idle_seconds: float
    rtt_seconds: float | None
    messages_sent: int
    bytes_sent: int
    messages_dropped: int
    """Too slow for them."""
    blocked: bool
    """Its socket would not take more when it was last asked."""
    bytes_held: int
    """Memory, besides its outbox."""
    limits: "ConnectionLimits"


@attrs.frozen
class ConnectionLimits:
    """The bounds of one connection, as they are now. The rates are None where there is no limit."""

    messages_queued: int
    bytes_queued: int
    topics: int
    bytes_held: float
    message_rate: float | None
    byte_rate: float | None


@attrs.frozen
class ClosedConnection:
    """A connection that has ended: what was known of it right before, how, and when (Unix seconds).

    Of its topics there are as many as have room, `topic_count` were there. Long texts are cut."""

    details: ConnectionDetails
    close: Close
    closed_at: float
    topic_count: int
