"""Messages between a client and a broker: commands as bytes, replies and pushes as structs.

Unknown fields are skipped, payloads stay raw JSON. Decides nothing but whether a message is of this
protocol, in its types and within its bounds; one that is not raises `Lost`.
"""

import json
import re
import secrets
from collections.abc import Iterator, Mapping
from typing import Annotated, Final

import msgspec

from broker.client.loss import TooLarge, foreign
from broker.core.messages import ClientInfo, Publication
from broker.core.values import check_values

MAX_OBJECTS: Final = 500_000
"""JSON objects in one reply or push: as structs they take 50 to 100 MiB for a moment. 100
publications of 64 KiB, all of them made of objects such as {"x":1,"y":2}, come near."""

TAGS_BYTES: Final = 2**20
"""Tags of one publication, as JSON: no more than a whole message that a broker takes by default."""

HEARTBEAT_SECONDS: Final = 86_400
"""The longest interval of pings: rarer than once a day they tell nothing."""

Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
"""Offsets and the like: the schema has 64 bits, of which the SDKs keep 53 to 63."""

Code = Annotated[int, msgspec.Meta(ge=0, le=65_535)]


class Empty(msgspec.Struct):
    """An object of which no field is used."""


class ErrorReply(msgspec.Struct):
    code: Code = 0
    message: str = ""
    temporary: bool = False


class Info(msgspec.Struct):
    client: str = ""
    user: str = ""
    conn_info: msgspec.Raw = msgspec.Raw()
    chan_info: msgspec.Raw = msgspec.Raw()

    def freeze(self) -> ClientInfo:
        return ClientInfo(
            self.client,
            self.user,
            bytes(self.conn_info) or None,
            bytes(self.chan_info) or None,
        )


class Pub(msgspec.Struct):
    data: msgspec.Raw = msgspec.Raw(b"null")
    info: Info | None = None
    offset: Count = 0
    time: Count = 0
    channel: str = ""
    tags: msgspec.Raw = msgspec.Raw()

    def freeze(self, topic: str) -> Publication:
        info = None if self.info is None else self.info.freeze()
        # A copy: a slice of the frame would keep all of the frame alive.
        data = bytes(self.data)
        tags = _read_tags(bytes(self.tags)) if bytes(self.tags) else None
        return Publication(self.channel or topic, data, info, self.offset, self.time, tags)


class Subscribed(msgspec.Struct):
    recoverable: bool = False
    positioned: bool = False
    epoch: str = ""
    offset: Count = 0
    publications: list[Pub] = []
    recovered: bool = False


class Connected(msgspec.Struct):
    client: str = ""
    ping: Annotated[int, msgspec.Meta(ge=0, le=HEARTBEAT_SECONDS)] = 0
    pong: bool = False
    subs: dict[str, Subscribed] = {}


class HistoryResult(msgspec.Struct):
    publications: list[Pub] = []
    epoch: str = ""
    offset: Count = 0


class PresenceResult(msgspec.Struct):
    presence: dict[str, Info] = {}


class StatsResult(msgspec.Struct):
    num_clients: Count = 0
    num_users: Count = 0


class Data(msgspec.Struct):
    data: msgspec.Raw = msgspec.Raw(b"null")


class Member(msgspec.Struct):
    info: Info = msgspec.field(default_factory=Info)


class Ended(msgspec.Struct):
    code: Code = 0
    reason: str = ""


class Push(msgspec.Struct):
    channel: str = ""
    pub: Pub | None = None
    join: Member | None = None
    leave: Member | None = None
    unsubscribe: Ended | None = None
    subscribe: Subscribed | None = None
    message: Data | None = None
    disconnect: Ended | None = None


class Reply(msgspec.Struct):
    id: Count = 0
    error: ErrorReply | None = None
    push: Push | None = None
    connect: Connected | None = None
    subscribe: Subscribed | None = None
    unsubscribe: Empty | None = None
    publish: Empty | None = None
    history: HistoryResult | None = None
    presence: PresenceResult | None = None
    presence_stats: StatsResult | None = None
    rpc: Data | None = None

    def answers(self, method: str) -> bool:
        """Whether this is what a broker replies to `method`, an error included."""
        return self.error is not None or getattr(self, method) is not None


_decode = msgspec.json.Decoder(Reply).decode
_decode_tags = msgspec.json.Decoder(dict[str, str] | None).decode


def encode(command: Mapping[str, object]) -> bytes:
    """One command on one line. Raises `TypeError` for what JSON cannot hold, such as a set, and `ValueError`
    for ready JSON that is none."""
    check_values(command)
    try:
        line = msgspec.json.encode(command)
    except UnicodeEncodeError:  # half a surrogate pair, which goes as its escape
        line = json.dumps(msgspec.to_builtins(command), allow_nan=False).encode()
    # A newline separates commands. Ready JSON from the caller may hold some, between tokens only:
    # inside a JSON string it would have to be escaped.
    return line.replace(b"\n", b" ")


def read_lines(message: str) -> Iterator[str]:
    """The objects of one message, as text; one at a time, because a message may hold millions."""
    start = 0
    while start < len(message):
        end = message.find("\n", start)
        if end < 0:
            end = len(message)
        line = message[start:end].strip(" \t\r")
        if line:
            yield line
        start = end + 1


def read_reply(line: str) -> Reply | None:
    """One reply or push; None is a ping. Raises `Lost` for what is neither.

    Half a surrogate pair (`"\\ud83d"`) stays as it is in payloads, and is an error elsewhere.
    """
    if line == "{}":
        return None
    if len(line) > MAX_OBJECTS and line.count("{") > MAX_OBJECTS:
        raise TooLarge(f"more than {MAX_OBJECTS:,} JSON objects at once")
    try:
        try:
            reply = _decode(line)
        except msgspec.DecodeError:
            reply = _decode_with_halves(line)
    except RecursionError:
        raise foreign("JSON that is nested too deeply") from None
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise foreign(str(error)) from error
    if not reply.id and reply.push is None:
        if not line[1:-1].strip():
            return None
        raise foreign("neither a reply nor a push")
    return reply


# An escaped backslash, a whole pair or any other escape, all left alone; or half a pair.
_ESCAPE: Final = re.compile(
    r"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
    r"|u(?P<half>[dD][89a-fA-F][0-9a-fA-F]{2})|.)"
)


def _decode_with_halves(line: str) -> Reply:
    """Decode what msgspec does not take, though RFC 8259 section 8.2 does: halves of pairs.

    Each goes through msgspec as a mark that nobody can have guessed. Raises what msgspec raises,
    and `Lost` for a half that is not in a payload.
    """
    mark = f"\\u0000{secrets.token_hex(8)}"

    def marked(match: re.Match[str]) -> str:
        return match[0] if match["half"] is None else mark + match["half"]

    reply = _decode(_ESCAPE.sub(marked, line))
    _restore(reply, mark.encode())
    if mark[6:] in repr(reply):  # which shows the texts of all fields, but no payload
        raise foreign("half a surrogate pair in a name or text")
    return reply


def _restore(value: object, mark: bytes) -> object:
    if isinstance(value, msgspec.Raw):
        return msgspec.Raw(bytes(value).replace(mark, b"\\u"))
    if isinstance(value, list):
        return [_restore(each, mark) for each in value]
    if isinstance(value, dict):
        return {key: _restore(each, mark) for key, each in value.items()}
    if isinstance(value, msgspec.Struct):
        for name in value.__struct_fields__:
            setattr(value, name, _restore(getattr(value, name), mark))
    return value


def _read_tags(text: bytes) -> Mapping[str, str] | None:
    if len(text) > TAGS_BYTES:
        raise TooLarge(f"tags of more than {TAGS_BYTES:,} bytes")
    try:
        return _decode_tags(text)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise foreign(f"tags: {error}") from error
