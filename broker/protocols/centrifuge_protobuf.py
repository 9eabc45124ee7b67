"""The Centrifuge client protocol in protobuf: subprotocol `centrifuge-protobuf`.

A binary frame holds one or several messages, each behind its length as a varint. The tables below
are the protocol's schema (client.proto, MIT, by Centrifugal Labs), as far as we speak it; fields that
they do not name are skipped, as protobuf has it. Field kinds and the wire format are those of
https://protobuf.dev/programming-guides/encoding/.

Written by hand, because it is small and on the hot path: a publication is encoded in 0.9 µs, where
the protobuf library takes 3 to 4. That library, as the official Python SDK uses it, is what the
tests compare this to.

Rule: messages that are read are checked as far as the structs of `centrifuge` promise: sizes, UTF-8, ranges.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from enum import Enum
from functools import lru_cache
from typing import Any, Final, TypeAlias

import attrs
import msgspec
from msgspec import Raw

from broker.core.json_reader import finish, mended_text
from broker.core.messages import ClientInfo, Publication
from broker.core.tags import FilterNode
from broker.protocols import commands
from broker.protocols.codec import Apart, Codec, Commands, info_fields, shown_tags
from broker.protocols.commands import (
    MAX_COMMANDS,
    METHODS,
    BadCommand,
    Command,
    PublishCommand,
    PublishRequest,
    faulty,
    in_steps,
)
from broker.transport import frames

MAX_FIELDS: Final = 2**14
"""In one command, with what is in its fields: they take 15 ms, in pieces. Connect takes seven to recover a
topic, and a client has a thousand topics unless the config says otherwise."""

_PIECE: Final = 64
"""Fields that are read in one step: 0.1 ms."""

_ENVELOPE_FIELDS: Final = 16
"""Of a request to `/emulation`, which has three."""


class Kind(Enum):
    """The kinds of scalar fields."""

    UINT32 = "uint32"
    UINT64 = "uint64"
    INT32 = "int32"
    INT64 = "int64"
    BOOL = "bool"
    STRING = "string"
    BYTES = "bytes"


@attrs.frozen(eq=False)
class Many:
    """A repeated field."""

    of: "Type"


@attrs.frozen(eq=False)
class Keyed:
    """A map from strings."""

    of: "Type"


@attrs.define(eq=False)
class Message:
    """One message of the schema. `struct` is the type that it is read into, None for messages that are only
    written."""

    fields: "dict[str, tuple[int, Type]]"
    struct: type[msgspec.Struct] | None = None
    by_number: "dict[int, tuple[str, Type]]" = attrs.field(init=False, factory=dict)
    by_name: "dict[str, tuple[bytes, Type]]" = attrs.field(init=False, factory=dict)
    """With what stands before each field: its number and wire type."""

    def __attrs_post_init__(self) -> None:
        for name, (number, kind) in self.fields.items():
            self.add(name, number, kind)

    def add(self, name: str, number: int, kind: "Type") -> None:
        wire = _VARINT if kind in _VARINTS else _LENGTH
        self.by_number[number] = name, kind
        self.by_name[name] = _varint(number << 3 | wire), kind


Type: TypeAlias = Kind | Message | Many | Keyed

_EMPTY = Raw(b"")
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_VARINTS = (Kind.UINT32, Kind.UINT64, Kind.INT32, Kind.INT64, Kind.BOOL)
UINT32, UINT64, INT32, INT64, BOOL, STRING, BYTES = Kind
_RANGES: dict[Type, tuple[int, int]] = {
    UINT32: (0, 2**32),
    UINT64: (0, 2**64),
    INT32: (-(2**31), 2**31),
    INT64: (-(2**63), 2**63),
}


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


# messages that are read

_FILTER = Message(
    {
        "op": (1, STRING),
        "key": (2, STRING),
        "cmp": (3, STRING),
        "val": (4, STRING),
        "vals": (5, Many(STRING)),
    },
    FilterNode,
)
_FILTER.add("nodes", 6, Many(_FILTER))
_SUBSCRIBE = Message(
    {
        "channel": (1, STRING),
        "token": (2, STRING),
        "recover": (3, BOOL),
        "epoch": (6, STRING),
        "offset": (7, UINT64),
        "data": (8, BYTES),
        "positioned": (9, BOOL),
        "recoverable": (10, BOOL),
        "join_leave": (11, BOOL),
        "delta": (12, STRING),
        "tf": (13, _FILTER),
        "flag": (14, INT64),
        "type": (15, INT32),
    },
    commands.SubscribeRequest,
)
_CONNECT = Message(
    {
        "token": (1, STRING),
        "data": (2, BYTES),
        "subs": (3, Keyed(_SUBSCRIBE)),
        "name": (4, STRING),
        "version": (5, STRING),
        "headers": (6, Keyed(STRING)),
        "flag": (7, INT64),
    },
    commands.ConnectRequest,
)
_CHANNEL = Message({"channel": (1, STRING)}, commands.ChannelRequest)
_SINCE = Message({"offset": (1, UINT64), "epoch": (2, STRING)}, commands.StreamPosition)
_HISTORY = Message(
    {"channel": (1, STRING), "limit": (7, INT32), "since": (8, _SINCE), "reverse": (9, BOOL)},
    commands.HistoryRequest,
)
COMMAND = Message(
    {
        "id": (1, UINT32),
        "connect": (4, _CONNECT),
        "subscribe": (5, _SUBSCRIBE),
        "unsubscribe": (6, _CHANNEL),
        "publish": (7, Message({"channel": (1, STRING), "data": (2, BYTES)}, PublishRequest)),
        "presence": (8, _CHANNEL),
        "presence_stats": (9, _CHANNEL),
        "history": (10, _HISTORY),
        "send": (12, Message({"data": (1, BYTES)}, commands.SendRequest)),
        "rpc": (13, Message({"data": (1, BYTES), "method": (2, STRING)}, commands.RpcRequest)),
        "refresh": (14, Message({"token": (1, STRING)}, commands.RefreshRequest)),
        "sub_refresh": (
            15,
            Message({"channel": (1, STRING), "token": (2, STRING)}, commands.SubRefreshRequest),
        ),
    },
    Command,
)


class EmulationRequest(msgspec.Struct):
    """The body of a request to `/emulation`; `data` is one message."""

    node: str = ""
    session: str = ""
    data: Raw = _EMPTY


EMULATION_REQUEST = Message(
    {"node": (1, STRING), "session": (2, STRING), "data": (3, BYTES)}, EmulationRequest
)

# messages that are written

_INFO = Message(
    {"user": (1, STRING), "client": (2, STRING), "conn_info": (3, BYTES), "chan_info": (4, BYTES)}
)
_PUBLICATION = Message(
    {
        "data": (4, BYTES),
        "info": (5, _INFO),
        "offset": (6, UINT64),
        "tags": (7, Keyed(STRING)),
        "time": (9, INT64),
        "channel": (10, STRING),
    }
)
_SUBSCRIBE_RESULT = Message(
    {
        "expires": (1, BOOL),
        "ttl": (2, UINT32),
        "recoverable": (3, BOOL),
        "epoch": (6, STRING),
        "publications": (7, Many(_PUBLICATION)),
        "recovered": (8, BOOL),
        "offset": (9, UINT64),
        "positioned": (10, BOOL),
        "data": (11, BYTES),
        "was_recovering": (12, BOOL),
    }
)
_PUSH = Message(
    {
        "channel": (2, STRING),
        "pub": (4, _PUBLICATION),
        "join": (5, Message({"info": (1, _INFO)})),
        "leave": (6, Message({"info": (1, _INFO)})),
        "unsubscribe": (7, Message({"code": (2, UINT32), "reason": (3, STRING)})),
        "message": (8, Message({"data": (1, BYTES)})),
        "subscribe": (
            9,
            Message(
                {
                    "recoverable": (1, BOOL),
                    "epoch": (4, STRING),
                    "offset": (5, UINT64),
                    "positioned": (6, BOOL),
                    "data": (7, BYTES),
                }
            ),
        ),
        "disconnect": (
            11,
            Message({"code": (1, UINT32), "reason": (2, STRING)}),
        ),
        "refresh": (12, Message({"expires": (1, BOOL), "ttl": (2, UINT32)})),
    }
)
REPLY = Message(
    {
        "id": (1, UINT32),
        "error": (
            2,
            Message({"code": (1, UINT32), "message": (2, STRING), "temporary": (3, BOOL)}),
        ),
        "push": (4, _PUSH),
        "connect": (
            5,
            Message(
                {
                    "client": (1, STRING),
                    "version": (2, STRING),
                    "expires": (3, BOOL),
                    "ttl": (4, UINT32),
                    "data": (5, BYTES),
                    "subs": (6, Keyed(_SUBSCRIBE_RESULT)),
                    "ping": (7, UINT32),
                    "pong": (8, BOOL),
                    "session": (9, STRING),
                    "node": (10, STRING),
                    "time": (11, INT64),
                }
            ),
        ),
        "subscribe": (6, _SUBSCRIBE_RESULT),
        "unsubscribe": (7, Message({})),
        "publish": (8, Message({})),
        "presence": (9, Message({"presence": (1, Keyed(_INFO))})),
        "presence_stats": (
            10,
            Message({"num_clients": (1, UINT32), "num_users": (2, UINT32)}),
        ),
        "history": (
            11,
            Message(
                {
                    "publications": (1, Many(_PUBLICATION)),
                    "epoch": (2, STRING),
                    "offset": (3, UINT64),
                }
            ),
        ),
        "rpc": (13, Message({"data": (1, BYTES)})),
        "refresh": (
            14,
            Message(
                {
                    "client": (1, STRING),
                    "version": (2, STRING),
                    "expires": (3, BOOL),
                    "ttl": (4, UINT32),
                }
            ),
        ),
        "sub_refresh": (15, Message({"expires": (1, BOOL), "ttl": (2, UINT32)})),
    }
)


# reading


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at `at`, and where it ends. Raises `IndexError` at the end of `data`."""
    byte = data[at]
    if byte < 0x80:
        return byte, at + 1
    number, shift = byte & 0x7F, 7
    while byte >= 0x80:
        at += 1
        byte = data[at]
        number |= (byte & 0x7F) << shift
        shift += 7
        if shift > 70:  # ten bytes hold 64 bits
            raise BadCommand("a number of more than ten bytes")
    return number, at + 1


def _read_length(data: bytes, at: int, end: int) -> tuple[int, int]:
    """Where the content at `at` begins and ends."""
    length, at = read_varint(data, at)
    if length > end - at:
        raise BadCommand("a field longer than its message")
    return at, at + length


@attrs.define(eq=False)
class _Reader:
    """Reads one command from `data`, which has no more than so many fields left."""

    data: bytes
    most: int = MAX_FIELDS
    fields_left: int = attrs.field(
        init=False, default=attrs.Factory(lambda self: self.most, takes_self=True)
    )
    fault: str = ""
    """The first field with a text that is not UTF-8, as its name and what is wrong."""

    def read(self, message: Message, at: int, end: int) -> Generator[int, None, Any]:
        """The struct of one message in `data[at:end]`; yields how many fields were read, piece by piece."""
        data = self.data
        values: dict[str, Any] = {}
        while at < end:
            if self.count_field():
                yield _PIECE
            key, at = read_varint(data, at)
            wire = key & 7
            name, kind = message.by_number.get(key >> 3, ("", BYTES))
            if not name and not 8 <= key < 2**32:
                raise BadCommand("the number of a field is 1 to 536870911")
            if wire == _LENGTH:
                at, stop = _read_length(data, at, end)
                if kind is STRING or kind is BYTES:
                    if name:
                        values[name] = self.scalar(kind, name, at, stop)
                elif kind not in _VARINTS:
                    yield from self.add(values, name, kind, at, stop)
                at = stop
            elif wire == _VARINT:
                number, at = read_varint(data, at)
                if name and kind in _VARINTS:
                    values[name] = _scalar(kind, number)
            elif wire == _FIXED64:
                at += 8
            elif wire == _FIXED32:
                at += 4
            else:
                raise BadCommand(f"wire type {wire}")
        if at > end:
            raise BadCommand("a field longer than its message")
        for name, value in values.items():
            if type(value) is list:
                values[name] = tuple(value)
        assert message.struct is not None
        return message.struct(**values)

    def count_field(self) -> bool:
        """Whether a pause is due."""
        self.fields_left -= 1
        if self.fields_left < 0:
            raise BadCommand(f"more than {self.most} fields in a command")
        return (self.most - self.fields_left) % _PIECE == 0

    def add(
        self, values: dict[str, Any], name: str, kind: Type, at: int, stop: int
    ) -> Generator[int, None, None]:
        """Read one field in `data[at:stop]` into `values`."""
        if isinstance(kind, Many):
            value = yield from self.content(kind.of, name, at, stop)
            values.setdefault(name, []).append(value)
        elif isinstance(kind, Keyed):
            key, value = "", None
            while at < stop:
                if self.count_field():
                    yield _PIECE
                tag, at = read_varint(self.data, at)
                if tag not in (0x0A, 0x12):
                    raise BadCommand("not an entry of a map")
                at, entry_stop = _read_length(self.data, at, stop)
                if tag == 0x0A:
                    key = self.scalar(STRING, name, at, entry_stop)
                else:
                    value = yield from self.content(kind.of, name, at, entry_stop)
                at = entry_stop
            if value is None:
                value = yield from self.content(kind.of, name, stop, stop)
            values.setdefault(name, {})[key] = value
        else:
            values[name] = yield from self.content(kind, name, at, stop)

    def content(self, kind: Type, name: str, at: int, stop: int) -> Generator[int, None, Any]:
        if isinstance(kind, Message):
            return (yield from self.read(kind, at, stop))
        return self.scalar(kind, name, at, stop)

    def scalar(self, kind: Type, name: str, at: int, stop: int) -> Any:
        if kind is STRING:
            try:
                return self.data[at:stop].decode()
            except UnicodeDecodeError as error:
                self.fault = self.fault or f"{name}: {error.reason}, so not UTF-8"
                return ""
        assert kind is BYTES
        return Raw(self.data[at:stop])


def _read(
    message: Message, data: bytes, at: int, stop: int, most: int = MAX_FIELDS
) -> Generator[int, None, tuple[Any, str]]:
    """The struct of one message in `data[at:stop]`, and what is wrong with a text in it, if anything; before
    it how many fields were read, piece by piece. Raises `BadCommand`."""
    reader = _Reader(data, most)
    try:
        found = yield from reader.read(message, at, stop)
        yield (most - reader.fields_left) % _PIECE
        return found, reader.fault
    except IndexError:
        raise BadCommand("cut off") from None
    except RecursionError:
        raise BadCommand("nested too deeply") from None


def _read_command(data: bytes, at: int, stop: int) -> Generator[int, None, Command]:
    command: Command
    command, fault = yield from _read(COMMAND, data, at, stop)
    if fault:
        methods = [method for method in METHODS if getattr(command, method) is not None]
        return faulty(command.id, methods, fault)
    return command


def read_emulation(body: bytes) -> EmulationRequest:
    """Read a request to `/emulation`, which has no length before it. Raises `BadCommand`."""
    request: EmulationRequest
    request, fault = finish(_read(EMULATION_REQUEST, body, 0, len(body), _ENVELOPE_FIELDS))
    if fault:
        raise BadCommand(fault)
    return request


def _scalar(kind: Type, number: int) -> int | bool:
    if kind is BOOL:
        return number != 0
    if kind in (INT32, INT64) and number >= 2**63:
        number -= 2**64
    least, end = _RANGES[kind]
    if not least <= number < end:
        raise BadCommand(f"{number} is out of range")
    return number


# writing


def _write(message: Message, values: Mapping[str, Any]) -> bytes:
    """One message, without its length. A key that the schema has not is an error of ours."""
    parts: list[bytes] = []
    for name, value in values.items():
        tag, kind = message.by_name[name]
        if isinstance(kind, Many):
            for each in value:
                parts += (tag, _delimited(_bytes(kind.of, each)))
        elif isinstance(kind, Keyed):
            for key, each in value.items():
                entry = b"\x0a%b\x12%b" % (
                    _delimited(_utf_8(key)),
                    _delimited(_bytes(kind.of, each)),
                )
                parts += (tag, _delimited(entry))
        elif kind in _VARINTS:
            if value:  # proto3 leaves out what is 0
                parts += (tag, _varint(int(value) % 2**64))
        elif value or isinstance(kind, Message):
            parts += (tag, _delimited(_bytes(kind, value)))
    return b"".join(parts)


# `Any`: its type is that which `kind` stands for, and is not looked at again for each field.
def _bytes(kind: Type, value: Any) -> bytes:
    if kind is STRING:
        return _utf_8(value)
    if kind is BYTES:
        return bytes(value)
    assert isinstance(kind, Message)
    return _write(kind, value)


def _utf_8(text: str) -> bytes:
    """A text of ours or of the app's: of half a surrogate pair there is no UTF-8."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return mended_text(text).encode()


def _delimited(content: bytes) -> bytes:
    return _length(len(content)) + content


_SHORT = tuple(_varint(length) for length in range(2048))


def _length(length: int) -> bytes:
    return _SHORT[length] if length < 2048 else _varint(length)


@attrs.frozen(eq=False)
class _Commands(Apart):
    """The commands of one message, each read when its turn comes: a MiB of small ones takes a
    second, during which others want to be served."""

    payload: bytes
    count: int

    def __len__(self) -> int:
        return self.count

    def in_steps(self) -> Iterator[Command]:
        for at, stop in _places(self.payload):
            yield from in_steps(_read_command(self.payload, at, stop))


def _places(payload: bytes) -> Iterator[tuple[int, int]]:
    """Where each command begins and ends. Raises `BadCommand`."""
    at, end = 0, len(payload)
    try:
        while at < end:
            stop = at + 1 + payload[at]
            if stop <= end and payload[at] < 0x80:  # as nearly always: a call takes 0.2 µs
                at += 1
            else:
                at, stop = _read_length(payload, at, end)
            yield at, stop
            at = stop
    except IndexError:
        raise BadCommand("cut off") from None


class CentrifugeProtobuf(Codec):
    """See the module."""

    name = "centrifuge-protobuf"
    opaque_payloads = True

    def __init__(self) -> None:
        # Of the publisher before this one, who is most often the same.
        self._info: ClientInfo | None = None
        self._info_field = b""

    def decode(self, payload: bytes) -> Commands:
        count = 0
        for _ in _places(payload):
            count += 1
            if count > MAX_COMMANDS:
                raise BadCommand(f"more than {MAX_COMMANDS} commands in a message")
        if not count:
            raise BadCommand("empty")
        return _Commands(payload, count)

    def decode_publishes(self, payloads: Sequence[bytes]) -> Sequence[PublishCommand] | None:
        commands = []
        for payload in payloads:
            command = _read_publish(payload)
            if command is None:
                return None
            commands.append(command)
        return commands

    def pieces(self, name: str, publication: Publication) -> tuple[bytes, bytes, bytes]:
        info = publication.info
        if info is not self._info:
            self._info_field = b"" if info is None else b"\x2a" + _info(info)
            self._info = info
        data, tail = publication.data, self._info_field
        if publication.offset:
            tail += b"\x30" + _varint(publication.offset)
        if name != publication.topic or publication.tags or publication.time:
            tail += _extras(name, publication)
        # From the inside out, as each length is that of all that follows: data, publication, push,
        # reply, and all in the frame.
        channel, field = _channel_field(name), _length(len(data))
        size = 1 + len(field) + len(data) + len(tail)
        body = _length(size)
        size += 1 + len(channel) + len(body)
        push = _length(size)
        size += 1 + len(push)
        reply = _length(size)
        header = frames.binary_header(size + len(reply))
        parts = header, reply, push, channel, body, field
        return b"%b%b\x22%b%b\x22%b\x22%b" % parts, data, tail

    def encode(self, reply: Mapping[str, object]) -> bytes:
        return _delimited(_write(REPLY, reply))

    def frame(self, replies: Sequence[bytes]) -> bytes:
        return frames.binary_frame(b"".join(replies))

    def payload(self, publication: Publication) -> Raw:
        return Raw(publication.data)


CENTRIFUGE_PROTOBUF = CentrifugeProtobuf()


def _read_publish(payload: bytes) -> PublishCommand | None:
    """Length, id, and one publish of channel and data, in the order in which everyone writes it."""
    try:
        size, at = read_varint(payload, 0)
        end = len(payload)
        request_id = 0
        if at + size != end:
            return None
        if payload[at] == 0x08:
            request_id, at = read_varint(payload, at + 1)
        if payload[at] != 0x3A or request_id >= 2**32:
            return None
        size, at = read_varint(payload, at + 1)
        if at + size != end or payload[at] != 0x0A:
            return None
        size, at = read_varint(payload, at + 1)
        channel = payload[at : at + size].decode()
        at += size
        if payload[at] != 0x12:
            return None
        size, at = read_varint(payload, at + 1)
        if at + size != end:
            return None
    except (IndexError, UnicodeDecodeError, BadCommand):
        return None
    return PublishCommand(PublishRequest(channel, Raw(payload[at:])), request_id)


def _extras(name: str, publication: Publication) -> bytes:
    fields: dict[str, object] = {
        "tags": shown_tags(name, publication) or {},
        "time": publication.time,
    }
    if name != publication.topic:
        fields["channel"] = publication.topic
    return _write(_PUBLICATION, fields)


def is_disconnect(start: bytes) -> bool:
    """Whether a frame that starts like this is the push that `Codec.disconnect` writes.

    12 bytes are enough to tell.
    """
    try:
        _, at = read_varint(start, 0)
        if start[at] != _PUSH_TAG:
            return False
        _, at = read_varint(start, at + 1)
        return start[at] == _DISCONNECT_TAG
    except (IndexError, BadCommand):
        return False


(_PUSH_TAG,), (_DISCONNECT_TAG,) = REPLY.by_name["push"][0], _PUSH.by_name["disconnect"][0]


@lru_cache(maxsize=4096)
def _channel_field(name: str) -> bytes:
    return b"\x12" + _delimited(_utf_8(name))


@lru_cache(maxsize=4096)
def _info(info: ClientInfo) -> bytes:
    return _delimited(_write(_INFO, info_fields(info)))
