"""The interface of every codec of the Centrifuge protocol: replies, pushes, results."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol, TypeAlias

from msgspec import Raw

from broker.core.messages import ClientInfo, Position, Publication
from broker.protocols.commands import Command, PublishCommand, Unread

Result: TypeAlias = Mapping[str, object]


def shown_tags(name: str, publication: Publication) -> Mapping[str, str] | None:
    """The tags that go out to those who listen under `name`."""
    if name == publication.topic:
        return publication.tags
    # The field for it is `channel`; some SDKs hide that one from the app, and show tags.
    return {**(publication.tags or {}), "topic": publication.topic}


class Commands(Protocol):
    """The commands of one message, in their order."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Command]: ...


class Apart(ABC):
    """Commands of which some may be dear to read: each is read when its turn comes."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def in_steps(self) -> Iterator[Command]:
        """The commands, and an `Unread` before each one that is dear. Raises `BadCommand`."""

    def __iter__(self) -> Iterator[Command]:
        return (command for command in self.in_steps() if not isinstance(command, Unread))


def steps_of(commands: Commands) -> Iterator[Command]:
    """The commands of a message, and what is dear to read announced before it."""
    return commands.in_steps() if isinstance(commands, Apart) else iter(commands)


class PeerCodec(Protocol):
    """Writes the frames that any peer may get, whether it speaks a protocol or is plain."""

    @property
    def name(self) -> str:
        """The protocol: `plain`, or the subprotocol's name."""

    @property
    def opaque_payloads(self) -> bool:
        """Whether payloads of the peer may be bytes that are not JSON."""

    def publication(self, name: str, publication: Publication) -> bytes:
        """A ready frame of one publication for those who listen under `name`."""

    def publications(self, name: str, publications: Sequence[Publication]) -> Sequence[bytes]:
        """A ready frame each of several publications of one topic, from one publisher, all with the
        same tags, in the order of their offsets."""

    def pieces(self, name: str, publication: Publication) -> tuple[bytes, bytes, bytes]:
        """The same frame in three pieces: the data, the same for all names, between two of a few bytes."""

    def message(self, data: bytes) -> bytes:
        """A ready frame of a message that belongs to no topic."""


class Codec(ABC):
    """Writes replies and pushes, and reads commands: the common part of JSON and protobuf.

    A push is a ready frame. A reply is not: `frame` makes one of several. A *result* is what
    answers a command: its fields by the protocol's names, payloads as `msgspec.Raw`.
    """

    name: str
    opaque_payloads: bool
    """Whether payloads may be bytes that are not JSON."""

    @abstractmethod
    def decode(self, payload: bytes, /) -> Commands:
        """The commands of one message: one at least. A `FaultyCommand` is one of them.

        Raises `BadCommand`, also for a message with nothing in it; perhaps only when it comes to
        the command that is none.
        """

    @abstractmethod
    def decode_publishes(self, payloads: Sequence[bytes], /) -> Sequence[PublishCommand] | None:
        """The commands of messages that are one publish each and nothing else; None for any others.

        On the hot path, so it may also give up on a publish that is written in an unusual way.
        """

    def publication(self, name: str, publication: Publication) -> bytes:
        """A ready frame of one publication for those who listen under `name`."""
        head, data, tail = self.pieces(name, publication)
        return head + data + tail

    @abstractmethod
    def pieces(self, name: str, publication: Publication) -> tuple[bytes, bytes, bytes]:
        """The same frame in three pieces: the data, the same for all names, between two of a few bytes."""

    def publications(self, name: str, publications: Sequence[Publication]) -> Sequence[bytes]:
        """A ready frame each of several publications of one topic, from one publisher, all with the
        same tags, in the order of their offsets."""
        return [self.publication(name, publication) for publication in publications]

    @abstractmethod
    def encode(self, reply: Mapping[str, object], /) -> bytes:
        """One `Reply` of the protocol's schema. Half of a surrogate pair goes as U+FFFD."""

    @abstractmethod
    def frame(self, replies: Sequence[bytes]) -> bytes:
        """One frame of one or several replies."""

    @abstractmethod
    def payload(self, publication: Publication) -> Raw:
        """The publication's `data`, as this codec's clients get it."""

    # pushes

    def message(self, data: bytes) -> bytes:
        """A ready frame of a message that belongs to no topic."""
        return self._push({"message": {"data": Raw(data)}})

    def join(self, topic: str, info: ClientInfo) -> bytes:
        return self._push({"channel": topic, "join": {"info": info_fields(info)}})

    def leave(self, topic: str, info: ClientInfo) -> bytes:
        return self._push({"channel": topic, "leave": {"info": info_fields(info)}})

    def subscribe(self, topic: str, result: Result) -> bytes:
        """The server has subscribed this client to a topic."""
        return self._push({"channel": topic, "subscribe": result})

    def unsubscribe(self, topic: str, code: int, reason: str) -> bytes:
        return self._push({"channel": topic, "unsubscribe": {"code": code, "reason": reason}})

    def refresh(self, ttl: int) -> bytes:
        """The connection's token was renewed by the server; 0 for one that does not expire."""
        return self._push({"refresh": {"expires": True, "ttl": ttl} if ttl else {}})

    def disconnect(self, code: int, reason: str) -> bytes:
        """Ahead of a Close frame: some proxies hand on the frame, but not its code."""
        return self._push({"disconnect": {"code": code, "reason": reason}})

    def ping(self) -> bytes:
        return self.frame((self.encode({}),))

    def _push(self, push: Mapping[str, object]) -> bytes:
        return self.frame((self.encode({"push": push}),))

    # replies

    def reply(self, request_id: int, method: str, result: Result) -> bytes:
        return self.encode({"id": request_id, method: result})

    def published(self, request_ids: Sequence[int]) -> Sequence[bytes]:
        """The replies to publishes, for `frame`: as many pieces as it takes."""
        return [self.reply(request_id, "publish", {}) for request_id in request_ids]

    def error(self, request_id: int, code: int, message: str, temporary: bool) -> bytes:
        error: dict[str, object] = {"code": code, "message": message}
        if temporary:
            error["temporary"] = True
        return self.encode({"id": request_id, "error": error})

    # results, and parts of them

    def stream(self, publications: Iterable[Publication], position: Position) -> dict[str, object]:
        """The fields that history and recovery have in common."""
        return {
            "publications": [self._listed(publication) for publication in publications],
            "offset": position.offset,
            "epoch": position.epoch,
        }

    def presence(self, clients: Mapping[str, ClientInfo]) -> Result:
        return {"presence": {client: info_fields(info) for client, info in clients.items()}}

    def _listed(self, publication: Publication) -> dict[str, object]:
        fields: dict[str, object] = {"data": self.payload(publication)}
        if publication.info is not None:
            fields["info"] = info_fields(publication.info)
        fields["offset"] = publication.offset
        if publication.tags:
            fields["tags"] = publication.tags
        if publication.time:
            fields["time"] = publication.time
        return fields


def info_fields(info: ClientInfo) -> dict[str, object]:
    """A `ClientInfo` by the protocol's names."""
    fields: dict[str, object] = {"user": info.user, "client": info.client}
    if info.conn_info is not None:
        fields["conn_info"] = Raw(info.conn_info)
    if info.chan_info is not None:
        fields["chan_info"] = Raw(info.chan_info)
    return fields
