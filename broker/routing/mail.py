"""The messages between nodes, and how they are written: msgpack, a tag and fields in their order.

Rules:

1. A node trusts the others: what may be said was decided where it was asked for. But a node may be of another
   version: mail that cannot be read is dropped and counted, never raised.
2. A field is only ever added at the end, with a default. Then a node reads the mail of an older one, and
   skips fields that a newer one has added.
"""

from typing import Final, TypeAlias

import msgspec
from msgspec import Struct

from broker.core.messages import ClientInfo, Fd, Publication
from broker.errors import Refused


class Mail(Struct, frozen=True, array_like=True):
    """A message that is not answered, or the body of a call, which is."""


# messages and topics


class Direct(Mail, frozen=True, tag="direct"):
    """Publications of one client, or of a program, to a connection of the node that gets this."""

    topic: str
    publications: list[Publication]
    exclude: list[Fd] = []


class Pushed(Mail, frozen=True, tag="pushed"):
    """A push to a connection; `kind` says what its data are: `text`, `bytes`, `json`. The frame has this
    opcode, and fragments of so many bytes, where these are not 0."""

    fd: Fd
    kind: str
    data: bytes
    opcode: int = 0
    fragment_bytes: int = 0


class Came(Mail, frozen=True, tag="came"):
    """Somebody subscribed to a topic."""

    topic: str
    info: ClientInfo


class Left(Mail, frozen=True, tag="left"):
    """Somebody is subscribed no longer."""

    topic: str
    info: ClientInfo


class Asked(Mail, frozen=True, tag="asked"):
    """A request to a connection, or to a member of a queue group, of the node that gets this."""

    number: int
    """By which its asker takes it back."""
    to: str
    data: bytes
    info: ClientInfo | None
    seconds: float | None


class Unasked(Mail, frozen=True, tag="unasked"):
    """Nobody waits for the answer to a request any more."""

    number: int


class Dealt(Mail, frozen=True, tag="dealt"):
    """Publications for one member of a queue group, which the nodes in `tried` could not place."""

    name: str
    group: str
    publications: list[Publication]
    exclude: list[Fd]
    rule: str
    tried: list[str]


class Counted(Mail, frozen=True, tag="counted"):
    """The outcome of a publication on the node that sends this."""

    number: int
    matched: int
    queued: int
    failed: list[Fd]


# orders: where `of` names a user, to those alone that are this user's when they get it


class Disconnect(Mail, frozen=True, tag="disconnect"):
    fds: list[Fd]
    code: int
    reason: str
    of: str = ""


class Expire(Mail, frozen=True, tag="expire"):
    fds: list[Fd]
    when: float | None
    of: str = ""


class Subscribe(Mail, frozen=True, tag="subscribe"):
    fds: list[Fd]
    topic: str
    info: bytes | None
    data: bytes | None
    join_leave: bool
    of: str = ""


class Unsubscribe(Mail, frozen=True, tag="unsubscribe"):
    fds: list[Fd]
    topic: str
    code: int
    reason: str
    of: str = ""


class Bind(Mail, frozen=True, tag="bind"):
    fds: list[Fd]
    user: str


class ListConnections(Mail, frozen=True, tag="connections"):
    """Those of `fds`; where there are none, up to `limit` that fit, with an fd above `after`."""

    fds: list[Fd]
    after: Fd = 0
    limit: int = 0
    user: str = ""
    topic: str = ""
    address: str = ""
    app: str = ""


class ListTopics(Mail, frozen=True, tag="topics"):
    most_bytes: int


class ListClosed(Mail, frozen=True, tag="closed"):
    """The connections that ended last: that of an fd, those of a user, or all; up to `limit`."""

    fd: Fd
    user: str
    limit: int


class Trace(Mail, frozen=True, tag="trace"):
    """Begin to trace; the answer is an id."""

    fd: Fd
    user: str
    topic: str


class ReadTrace(Mail, frozen=True, tag="read_trace"):
    """Ask for the entries of a trace since the last read; the node waits up to `wait` seconds for one."""

    trace: str
    wait: float


class EndTrace(Mail, frozen=True, tag="end_trace"):
    trace: str


class ReportRequest(Mail, frozen=True, tag="report"):
    """Asks how a node is; a `NodeReport` is the answer."""


class Look(Mail, frozen=True, tag="look"):
    """One of the things to be seen of a node, by its name; `params` and the answer are JSON."""

    name: str
    params: bytes


Body: TypeAlias = (
    Direct
    | Pushed
    | Came
    | Left
    | Asked
    | Unasked
    | Dealt
    | Counted
    | Disconnect
    | Expire
    | Subscribe
    | Unsubscribe
    | Bind
    | ListConnections
    | ListTopics
    | ListClosed
    | Trace
    | ReadTrace
    | EndTrace
    | ReportRequest
    | Look
)


# envelopes


class Note(Struct, frozen=True, array_like=True, tag="note"):
    """Wants no answer."""

    body: Body


class Call(Struct, frozen=True, array_like=True, tag="call"):
    """Is answered with its number."""

    number: int
    body: Body


class Result(Struct, frozen=True, array_like=True, tag="result"):
    """The answer to a call: a value as its kind has it, or a refusal with its code."""

    number: int
    value: bytes = b""
    code: int = 0
    message: str = ""

    @classmethod
    def of(cls, number: int, answer: bytes | Refused) -> "Result":
        if isinstance(answer, Refused):
            return cls(number, code=answer.code, message=answer.message)
        return cls(number, answer)

    @property
    def answer(self) -> bytes | Refused:
        return Refused(self.code, self.message) if self.code else self.value


Envelope: TypeAlias = Note | Call | Result

_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(Envelope)


def write(envelope: Envelope) -> bytes:
    return _encoder.encode(envelope)


def read(message: bytes) -> Envelope:
    """Raises `ValueError` for what is none, or of a kind that this version does not know."""
    return _decoder.decode(message)
