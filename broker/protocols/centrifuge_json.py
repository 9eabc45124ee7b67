"""The Centrifuge client protocol in JSON (wire reference, section 2).

Publications are put together from bytes, as payloads are never parsed on their way through.

Rule: encodes and decodes, and decides nothing.
"""

import re
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import lru_cache

import attrs
import msgspec
from msgspec import Raw

from broker.core.json_reader import (
    MAX_COMMAS,
    PIECE,
    BadJson,
    Json,
    Objects,
    are_few,
    members_of,
    objects,
    one_text,
    read_in_pieces,
)
from broker.core.messages import ClientInfo, Publication, Series
from broker.core.work import TAKEN_APART
from broker.protocols.codec import Apart, Codec, Commands, shown_tags
from broker.protocols.commands import (
    MAX_COMMANDS,
    METHODS,
    BadCommand,
    Command,
    FaultyCommand,
    PublishCommand,
    RequestId,
    Unread,
    faulty,
    in_steps,
)
from broker.protocols.json_text import opaque_json, written
from broker.transport import frames

_decoder = msgspec.json.Decoder(Command)
_publish_decoder = msgspec.json.Decoder(PublishCommand)
_ids: "msgspec.json.Decoder[int | None]" = msgspec.json.Decoder(RequestId | None)


_AT_ONCE = 256
"""Objects, and so commands at most, of a message that is decoded as a whole: 50 µs."""

_LARGE = 2**17
"""Bytes in which there may be publishes enough to be worth counting: 2 ms. A read is half of that."""

# Two objects in one line, or so it seems: a string may hold it as well. The decoder of lines takes them.
_touch = re.compile(rb"}[ \t\r]*{").search


def decode(payload: bytes) -> Commands:
    """The commands of one message: one JSON object, or several joined by newlines.

    Raises `BadCommand` as `Codec.decode` says; for a payload that is not UTF-8 too, as a binary
    frame may carry: it would go out again in text frames.
    """
    has_lines = b"\n" in payload
    try:
        if are_few(payload) and not (has_lines and payload.count(b"{") > _AT_ONCE):
            if not payload.isascii():
                payload.decode()
            if not has_lines:
                return [_decoder.decode(payload)]
            if _touch(payload) is None and (commands := _decoder.decode_lines(payload)):
                return commands
    except (msgspec.DecodeError, UnicodeDecodeError):
        pass  # perhaps for the sake of one of them
    except RecursionError:
        raise BadCommand("nested too deeply") from None
    return _read_apart(payload)


def _read_apart(payload: bytes) -> "_Apart":
    """The commands of a message that the fast decoder does not take, or that may be many."""
    if not payload.strip():
        raise BadCommand("empty")
    try:
        if b"\n" in payload:
            return _Apart(objects(payload, MAX_COMMANDS))
        return _Apart((one_text(payload),))
    except BadJson as error:
        raise BadCommand(str(error)) from None


@attrs.frozen(eq=False)
class _Apart(Apart):
    """The commands of one message, each read when its turn comes: to read one member by member may
    take 50 times as long as to decode it, and others want to be served meanwhile."""

    texts: Objects | tuple[Json]

    def __len__(self) -> int:
        return len(self.texts)

    def in_steps(self) -> Iterator[Command]:
        for text in self.texts:
            command = _read_strictly(text)
            if command is not None:
                yield command
            else:
                commas = min(text.mended.count(b","), MAX_COMMAS)
                # It is taken apart in one step, before its parts are read one by one.
                if commas > PIECE:
                    yield Unread(work=commas * TAKEN_APART)
                yield from in_steps(_read_leniently(text))


def _read_strictly(text: Json) -> Command | None:
    if not (text.is_whole and are_few(text.sent)):
        return None
    try:
        return _decoder.decode(text.sent)
    except msgspec.DecodeError:
        return None  # perhaps a null
    except RecursionError:
        raise BadCommand("nested too deeply") from None


def _read_leniently(text: Json) -> Generator[int, None, Command]:
    try:
        try:
            return (yield from read_in_pieces(text, Command))
        except BadJson as error:
            return _faulty(text, str(error))
    except RecursionError:
        raise BadCommand("nested too deeply") from None


def _faulty(text: Json, fault: str) -> FaultyCommand:
    try:
        sent = members_of(text, Command)
    except BadJson:
        raise BadCommand(f"a command is an object: {fault}") from None
    try:
        request_id = _ids.decode(sent.get("id", b"null")) or 0
    except msgspec.DecodeError as error:
        raise BadCommand(f"id: {error}") from None
    return faulty(request_id, [m for m in METHODS if sent.get(m, b"")[:1] == b"{"], fault)


def decode_publishes(payloads: Sequence[bytes]) -> Sequence[PublishCommand] | None:
    """The commands of messages that are one publish each and nothing else; None for any others.

    0.2 µs a message, where `decode` and a look at every method take 1.6 µs.
    """
    if b'"publish"' not in payloads[0][:32]:
        return None
    joined = payloads[0] if len(payloads) == 1 else b"\n".join(payloads)
    if joined.count(b"\n") >= len(payloads):
        return None
    if len(joined) > _LARGE and not are_few(joined):
        return None  # several in one payload, perhaps
    if min(payloads)[:1] < b"{":
        return None  # one may be blank, which is no line to the decoder, and another hold two
    try:
        if not joined.isascii():
            joined.decode()
        commands = _publish_decoder.decode_lines(joined)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return commands if len(commands) == len(payloads) else None


def is_connect(payload: bytes) -> bool:
    """Whether a first message opens this protocol. Anything else that it may be is plain text."""
    if b'"connect"' not in payload or not payload.lstrip().startswith(b"{"):
        return False
    try:
        first = next(iter(decode(payload)))
    except BadCommand:
        return False
    return first.connect is not None and first.id > 0


class CentrifugeJson(Codec):
    """One JSON object a line, in text frames."""

    name = "centrifuge-json"
    opaque_payloads = False

    def __init__(self) -> None:
        # Of the publication before this one: publisher and topic are most often the same.
        self._info: ClientInfo | None = None
        self._info_field = b""
        self._name: str | None = None
        self._head = b""
        self._opaque = self._opaque_json = b""

    # No call around a call: these are on the hot path.
    decode: Callable[[bytes], Commands] = staticmethod(decode)
    decode_publishes: Callable[[Sequence[bytes]], Sequence[PublishCommand] | None] = staticmethod(
        decode_publishes
    )

    def pieces(self, name: str, publication: Publication) -> tuple[bytes, bytes, bytes]:
        info = publication.info
        if info is not self._info or name is not self._name:
            self._remember(name, info)
        head, tail = self._head, self._info_field
        tags, data = publication.tags, publication.data
        if name != publication.topic:
            tail += b',"channel":' + _string(publication.topic)
            tags = shown_tags(name, publication)
        if tags:
            tail += b',"tags":' + written(tags)
        if publication.time:
            tail += b',"time":%d' % publication.time
        if publication.opaque:
            data = self._json_of(data)
        if publication.offset:  # last, where a stream of events looks for it
            tail = b'%b,"offset":%d' % (tail, publication.offset)
        tail += b"}}}"
        header = frames.text_header(len(head) + len(data) + len(tail))
        return header + head, data, tail

    def _json_of(self, data: bytes) -> bytes:
        # A megabyte takes 5 ms, and a thousand audiences may ask for it in a row.
        if data is not self._opaque:
            self._opaque, self._opaque_json = data, opaque_json(data)
        return self._opaque_json

    def publications(self, name: str, publications: Sequence[Publication]) -> Sequence[bytes]:
        if isinstance(publications, Series):
            said = publications
            contents, info, offset = [*said.contents], said.info, said.first
            is_simple = name == said.topic and not said.opaque
        else:
            first, last = publications[0], publications[-1]
            contents, info, offset = [p.data for p in publications], first.info, first.offset
            has_gaps = offset and last.offset - offset != len(contents) - 1
            is_simple = _is_simple(name, first) and not has_gaps
        if not is_simple:
            return [self.publication(name, publication) for publication in publications]
        if info is not self._info or name is not self._name:
            self._remember(name, info)
        head, info_field = self._head, self._info_field
        if offset:
            return frames.text_frames(head, contents, info_field + b',"offset":', offset, b"}}}")
        return frames.text_frames(head, contents, info_field + b"}}}")

    def _remember(self, name: str, info: ClientInfo | None) -> None:
        """Write what all publications of a publisher under a name have in common."""
        if info is not self._info:
            self._info_field = b"" if info is None else b',"info":' + _info(info)
            self._info = info
        if name is not self._name:
            self._head = b'{"push":{"channel":' + _string(name) + b',"pub":{"data":'
            self._name = name

    encode: Callable[[object], bytes] = staticmethod(written)

    def frame(self, replies: Sequence[bytes]) -> bytes:
        return frames.text_frame(replies[0] if len(replies) == 1 else b"\n".join(replies))

    def published(self, request_ids: Sequence[int]) -> Sequence[bytes]:
        # In one piece, as a busy publisher wants an answer to each: a tenth of the price of one by one.
        lines = (b'{"id":%d,"publish":{}}\n' * len(request_ids))[:-1]
        return (lines % tuple(request_ids),)

    def payload(self, publication: Publication) -> Raw:
        data = publication.data
        return Raw(opaque_json(data) if publication.opaque else data)


CENTRIFUGE_JSON = CentrifugeJson()


def _is_simple(name: str, publication: Publication) -> bool:
    """Whether a publication shows nothing but data, info and offset under `name`."""
    return (
        name == publication.topic
        and not publication.tags
        and not publication.time
        and not publication.opaque
    )


@lru_cache(maxsize=4096)
def _string(text: str) -> bytes:
    return written(text)


@lru_cache(maxsize=4096)
def _info(info: ClientInfo) -> bytes:
    body = b'{"user":' + _string(info.user) + b',"client":' + _string(info.client)
    if info.conn_info is not None:
        body += b',"conn_info":' + info.conn_info
    if info.chan_info is not None:
        body += b',"chan_info":' + info.chan_info
    return body + b"}"
