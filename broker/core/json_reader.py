r"""JSON from others, read as leniently as its grammar is (RFC 8259), into structs and values.

The decoders of msgspec are fast and strict. They refuse some texts that are grammatical JSON, and
the slower ways here are for those alone. By example, of a struct with a text ``name`` and a payload
``data``::

    {"name": null, "data": null}     no name; the payload is null
    {"name": "a", "data": "\ud83d"}  the payload is "\ufffd": half of a surrogate pair is no character
    {"name": "\ud83d"}               refused: two different names would become the same
    {"name": 5}                      refused, and the reason says which field it is
    {"name": "a"                     refused: not JSON

Rules:

1. `null` in a field of a struct, or as a value of a map, is absence, as in protobuf's JSON mapping.
   In a payload it is a value as any other.
2. Half of a surrogate pair (RFC 8259 section 8.2) cannot be written in UTF-8. In a payload it
   becomes U+FFFD, as browsers and Go do it, so that strict parsers can read what goes out. All
   other text with one is refused.
3. A reader gets a value or a `BadJson`; the reason is one line that names the field.
"""

import json
import re
from collections.abc import Callable, Generator, Iterator
from enum import Enum
from functools import lru_cache
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Final,
    NamedTuple,
    TypeAlias,
    TypeVar,
    Union,
    get_args,
    get_origin,
)

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType, defstruct

AsSent: TypeAlias = Annotated[Raw, "as sent"]
"""A payload that is read once more, by a struct of its own: nothing in it is replaced before that, because
there may be names in it."""

MAX_MEMBERS: Final = 2**13
"""In one text that has to be read member by member: they take 20 ms, in pieces. Connect takes up to seven to
recover a topic, and a client has a thousand topics unless the config says otherwise."""

PIECE: Final = 64
"""Members that are read in one step: 0.1 to 0.2 ms. Fifty clients may begin at once, each without a turn."""

MAX_COMMAS: Final = 2 * MAX_MEMBERS
"""In a text that is taken apart into values at once, 0.3 µs each. Payloads may have more."""

_FEW_COMMAS: Final = 64
"""A map of so many members is made faster than a struct with all fields."""

_UNNAMED_BYTES: Final = 2**16
"""Of members that a struct does not name, where halves of pairs have to be looked for in all: 4 ms."""

MAX_OBJECTS: Final = 2**14
"""In one text that a strict decoder takes as a whole where `few` are expected. A topic or a filter takes
three bytes in JSON and 200 as a struct; so many take 3 ms. Payloads may have more."""

MAX_HALVES: Final = 2**15
"""Escapes of surrogates in a text that a strict decoder refuses: to tell pairs from halves takes 8 ms. A text
that it takes may have any number."""

MAX_LEVELS: Final = 20
"""Of structs in structs, each of which costs another look at all that is below it: 2 ms for 1 MiB. A
filter of tags has 16, and stands in two others."""

MAX_REASON: Final = 200
"""Characters: a reason may quote a name, which may be as long as a message."""

S = TypeVar("S", bound=Struct)
T = TypeVar("T")


class BadJson(ValueError):
    """A text is not JSON, or not what was asked for; the message says in one line what is wrong."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason[:MAX_REASON])


class TooDeep(BadJson):
    """A text is nested more deeply than can be read here: about a thousand levels."""

    def __init__(self) -> None:
        super().__init__("nested too deeply")


# halves of surrogate pairs

_HIGH, _LOW = rb"\\u[dD][89abAB][0-9a-fA-F]{2}", rb"\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_maybe_half = re.compile(rb"\\u[dD][89a-fA-F]").search
# Escaped backslashes and pairs are matched whole, so that the text behind or in them is not taken for the
# beginning of an escape. It begins with one byte, which is found at 1 GB/s.
_halves = re.compile(rb"\\(?:\\(?:\\\\)*|%b%b|(%b|%b))" % (_HIGH[2:], _LOW, _HIGH[2:], _LOW[2:]))


def mend(data: bytes) -> bytes:
    r"""JSON with ``\ufffd`` in place of each half of a surrogate pair.

    It has the same length, and is the same object if there was none.
    """
    if _maybe_half(data) is None:
        return data
    mended = _halves.sub(lambda found: b"\\ufffd" if found[1] else found[0], data)
    return data if mended == data else mended


def mended_text(text: str) -> str:
    """A Python text with U+FFFD in place of each half of a surrogate pair; two that fit are joined."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


# one text


class Json(NamedTuple):
    """One JSON text as it was sent, and mended."""

    sent: bytes
    mended: bytes

    @property
    def is_whole(self) -> bool:
        """Whether nothing had to be mended."""
        return self.sent is self.mended or self.sent == self.mended

    def part(self, start: int, end: int) -> "Json":
        mended = self.mended[start:end]
        return Json(mended if self.sent is self.mended else self.sent[start:end], mended)


_raw = msgspec.json.Decoder(Raw)
_members = msgspec.json.Decoder(dict[str, Raw])
_items = msgspec.json.Decoder(list[Raw])
_space = re.compile(rb"[ \t\n\r]*").match
_key = re.compile(
    rb'[ \t\n\r]*[{,][ \t\n\r]*("[^"\\]*(?:\\.[^"\\]*)*")[ \t\n\r]*:[ \t\n\r]*', re.DOTALL
).match
_item = re.compile(rb"[ \t\n\r]*[\[,][ \t\n\r]*").match
_end = re.compile(rb"[ \t\n\r]*[{]?[ \t\n\r]*}[ \t\n\r]*").fullmatch


# In a string no line ends as such, and in an object or a list a comma stands between two objects: so this
# is between two texts, and nowhere else.
_between = re.compile(rb"}[ \t\r]*\n[ \t\n\r]*(?={)")


class Objects:
    """Several JSON objects, which are cut out one by one when they are asked for."""

    def __init__(self, whole: Json, count: int) -> None:
        self._whole = whole
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Json]:
        return (self._whole.part(start, end) for start, end in _places(self._whole.mended))


def _places(data: bytes) -> Iterator[tuple[int, int]]:
    start = 0
    for found in _between.finditer(data):
        yield start, found.start() + 1
        start = found.end()
    yield start, len(data)


def objects(data: bytes, most: int) -> Objects:
    """The JSON objects in `data`: one at least, which line ends part.

    Raises `BadJson` for more than `most`, and if any of it is not JSON or not UTF-8. A single value that is
    no object is taken for one, and left to the reader.
    """
    mended = _checked(data)
    # Faster than `_places`, which makes an object for each: 3 ms for 16,384 of 45 bytes. They are not
    # kept, as that is.
    *others, last = _between.split(mended, most)
    if len(others) >= most:
        raise BadJson(f"more than {most} objects")
    for without_brace in others:
        _check_one(without_brace + b"}")
    _check_one(last)
    return Objects(Json(data, mended), len(others) + 1)


def one_text(data: bytes) -> Json:
    """`data` as one JSON text. Raises `BadJson`."""
    mended = _checked(data)
    _check_one(mended)
    return Json(data, mended)


def _check_one(data: bytes) -> None:
    try:
        _raw.decode(data)
    except msgspec.DecodeError as error:
        raise BadJson(f"not JSON: {error}") from None
    except RecursionError:
        raise TooDeep from None


def _checked(data: bytes) -> bytes:
    """`data`, which has to be UTF-8, mended."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        raise BadJson(f"not JSON: {error}") from None
    if data.count(b"\\ud") + data.count(b"\\uD") > MAX_HALVES:
        raise BadJson(f"more than {MAX_HALVES} escapes of surrogates")
    return mend(data)


_Match: TypeAlias = Callable[[bytes, int], re.Match[bytes] | None]


def _after(match: _Match, data: bytes, at: int) -> int:
    found = match(data, at)
    assert found is not None
    return found.end()


# into values


def value_of(data: bytes) -> object:
    """One JSON text as Python objects.

    Half of a surrogate pair is U+FFFD, and a number beyond Python's range an infinity. Raises
    `BadJson`; `TooDeep` for about a thousand levels, the fewer the deeper the caller is.
    """
    try:
        try:
            return msgspec.json.decode(data)
        except msgspec.DecodeError:
            return json.loads(one_text(data).mended, parse_int=_integer)
    except RecursionError:
        raise TooDeep from None


def _integer(digits: str) -> int | float:
    # Python makes no int of more than 4300 digits; a float can hold 308.
    return int(digits) if len(digits) <= 4300 else float(digits)


# into structs


@lru_cache(maxsize=512)
def _decoder(kind: object) -> "msgspec.json.Decoder[Any]":
    return msgspec.json.Decoder(kind)


@lru_cache(maxsize=256)
def _fields(kind: type[Struct]) -> dict[str, msgspec.structs.FieldInfo]:
    return {field.encode_name: field for field in msgspec.structs.fields(kind)}


@lru_cache(maxsize=256)
def _required(kind: type[Struct]) -> tuple[tuple[str, str], ...]:
    """Those that have to be there, as they are written and as they are called."""
    return tuple((name, field.name) for name, field in _fields(kind).items() if field.required)


def read(data: bytes, kind: type[S], *, few: bool = False) -> S:
    """One JSON text as a struct, by the rules of this module. Raises `BadJson`.

    Payloads are the struct's fields of type `Raw`; those of type `AsSent` are not mended. Where `few`
    objects are expected besides what is in payloads, more than `MAX_OBJECTS` are refused.
    """
    if few and not are_few(data):
        return read_text(one_text(data), kind)
    try:
        found: S = _decoder(kind).decode(data)
    except msgspec.DecodeError:
        return read_text(one_text(data), kind)
    except RecursionError:
        raise TooDeep from None
    # A strict decoder does not look into what it skips or keeps raw.
    if not data.isascii():
        _checked(data)
    return found


def read_strictly(data: bytes, kind: type[S]) -> S | None:
    """One JSON text as a struct, where a strict decoder takes it as it is; None for any other, which has to be
    `read` with care.

    `read` gives the same for it, and such a text is JSON from its first byte to its last, in UTF-8: it
    need not be looked at once more.
    """
    try:
        found: S = _decoder(kind).decode(data)
        if not data.isascii():
            data.decode()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return found


def read_members(data: bytes) -> dict[str, Raw]:
    """One JSON object as its members, as they were sent. Raises `BadJson`, also where two names would
    become the same."""
    try:
        found: dict[str, Raw] = _decoder(dict[str, AsSent]).decode(data)
    except msgspec.DecodeError:
        return finish(_Reader().map(one_text(data), AsSent, "", 0))
    except RecursionError:
        raise TooDeep from None
    return found


def are_few(data: bytes) -> bool:
    """Whether a text has no more than `MAX_OBJECTS` and `MAX_COMMAS`; `read_text` counts those in payloads as
    nothing."""
    return data.count(b"{") <= MAX_OBJECTS and data.count(b",") <= MAX_COMMAS


def read_text(text: Json, kind: type[S]) -> S:
    """`text` as a struct, member by member. Raises `BadJson`."""
    return finish(read_in_pieces(text, kind))


def finish(reading: Generator[int, None, T]) -> T:
    """The result of a reading, without a pause."""
    while True:
        try:
            next(reading)
        except StopIteration as end:
            found: T = end.value
            return found


def read_in_pieces(text: Json, kind: type[S]) -> Generator[int, None, S]:
    """The same with a pause behind every `PIECE` of members and at the end: each yields how many were read
    since the one before. A text that is not JSON or not such a struct raises `BadJson` after the last of them."""
    reader = _Reader()
    found: S | None = None
    fault = ""
    try:
        found = yield from reader.struct(text, kind, "")
    except BadJson as error:
        fault = str(error)  # without its frames, while others run
    yield reader.read
    if found is None:
        raise BadJson(fault)
    return found


def members_of(text: Json, kind: type[Struct]) -> dict[str, bytes]:
    """The members of an object that a struct names, mended; of several with one name, the last.

    Raises `BadJson` for no object.
    """
    try:
        found = _outer(kind).decode(text.mended)
    except msgspec.DecodeError:
        raise BadJson("no object") from None
    values = {name: getattr(found, field.name) for name, field in _fields(kind).items()}
    return {name: bytes(raw) for name, raw in values.items() if raw is not UNSET}


def members(text: Json) -> dict[str, bytes]:
    """The members of an object, mended; of several with one name, the last.

    Raises `BadJson` for no object.
    """
    try:
        return {name: bytes(raw) for name, raw in _members.decode(text.mended).items()}
    except msgspec.DecodeError:
        raise BadJson("no object") from None


def _only(kind: object) -> Any:
    """A type without its `None`."""
    if get_origin(kind) not in (Union, UnionType):
        return kind
    others = [each for each in get_args(kind) if each is not NoneType]
    return others[0] if len(others) == 1 else kind


def _has_parts(kind: object) -> bool:
    """Whether there may be nulls or payloads inside: else a list of them is read in one go."""
    kind = _only(kind)
    struct = isinstance(kind, type) and issubclass(kind, Struct)
    return struct or kind in (Raw, AsSent) or get_origin(kind) is dict


class _Way(Enum):
    """The ways in which a value is read."""

    RAW = "raw"
    AS_SENT = "as sent"
    STRUCT = "struct"
    MAP = "map"
    LIST = "list"
    WHOLE = "whole"


_PAYLOADS: Final = (_Way.RAW, _Way.AS_SENT)


@lru_cache(maxsize=512)
def _way_of(kind: object) -> tuple[_Way, Any, Any]:
    """How a value of a type is read; the type without its `None`, of a list that of the list alone; and the
    type of what is in it."""
    kind = _only(kind)
    if kind is Raw:
        return _Way.RAW, kind, None
    if kind == AsSent:
        return _Way.AS_SENT, kind, None
    if isinstance(kind, type) and issubclass(kind, Struct):
        return _Way.STRUCT, kind, None
    origin, of = get_origin(kind), get_args(kind)
    if origin is dict and of[1] is not object:
        return _Way.MAP, kind, of[1]
    if origin in (list, tuple) and _has_parts(of[0]):
        return _Way.LIST, origin, of[0]
    return _Way.WHOLE, kind, None


@lru_cache(maxsize=256)
def _outer(kind: type[Struct]) -> "msgspec.json.Decoder[Any]":
    """A decoder of the fields of a struct as they are. It skips what the struct does not name: as a map, 1 MiB
    of such members would take 40 ms."""
    fields: list[tuple[str, Any, Any]] = [
        (field.name, Raw | UnsetType, msgspec.field(default=UNSET, name=name))
        for name, field in _fields(kind).items()
    ]
    return msgspec.json.Decoder(defstruct("Outer", fields, forbid_unknown_fields=_is_strict(kind)))


def _is_strict(kind: type[Struct]) -> bool:
    return bool(kind.__struct_config__.forbid_unknown_fields)


Reading: TypeAlias = Generator[int, None, Any]
"""A value, after pauses."""


class _Reader:
    """Reads one text, as far as it has members left. `read` counts them since the last pause."""

    def __init__(self) -> None:
        self.members_left = MAX_MEMBERS
        self.read = 0

    def struct(self, text: Json, kind: type[Struct], path: str, level: int = 0) -> Reading:
        if level > MAX_LEVELS:
            raise BadJson(f"{path} is nested more than {MAX_LEVELS} deep")
        fields, values = _fields(kind), dict[str, Any]()
        for name, member in self.fields(text, kind, path):
            self.read += 1
            if self.read == PIECE:
                yield self.take_read()
            field = fields.get(name)
            if field is None:
                if _is_strict(kind):
                    raise BadJson(f"{_under(path)}{name[:40]!r} is no field")
                continue
            if member.mended == b"null" and _way_of(field.type)[0] not in _PAYLOADS:
                values.pop(field.name, None)
            else:
                under = f"{path}.{name}" if path else name
                values[field.name] = yield from self.value(member, field.type, under, level)
        for name, field_name in _required(kind):
            if field_name not in values:
                raise BadJson(f"{_under(path)}{name} is missing")
        return kind(**values)

    def fields(self, text: Json, kind: type[Struct], path: str) -> Iterator[tuple[str, Json]]:
        """Names and values of an object that is read as a struct; perhaps not of those that it has not."""
        is_whole = text.is_whole
        if text.mended.count(b",") <= (_FEW_COMMAS if is_whole else MAX_COMMAS):
            yield from self.members(text, path)
            return
        decoder = _outer(kind)
        try:
            found = decoder.decode(text.mended)
        except msgspec.DecodeError:
            what = "is no object, or has a field too many" if _is_strict(kind) else "is no object"
            raise BadJson(f"{path or 'this'} {what}") from None
        named = [(name, getattr(found, field.name)) for name, field in _fields(kind).items()]
        values = {name: bytes(raw) for name, raw in named if raw is not UNSET}
        if not is_whole:
            if len(text.mended) - sum(map(len, values.values())) > _UNNAMED_BYTES:
                raise BadJson(f"more than {MAX_MEMBERS} members")
            yield from self.members(text, path)
            return
        self.count(len(values))
        for name, data in values.items():
            yield name, Json(data, data)

    def value(self, text: Json, kind: object, path: str, level: int) -> Reading:
        way, plain, of = _way_of(kind)
        if way is _Way.RAW:
            return Raw(text.mended)
        if way is _Way.AS_SENT:
            return Raw(text.sent)
        if way is _Way.STRUCT:
            return (yield from self.struct(text, plain, path, level + 1))
        if way is _Way.MAP:
            self.check_few(text, of)
            return (yield from self.map(text, of, path, level))
        if way is _Way.LIST:
            self.check_few(text, of)
            values = dict[int, Any]()
            for number, item in enumerate(self.items(text, path)):
                self.read += 1
                if self.read == PIECE:
                    yield self.take_read()
                values[number] = yield from self.value(item, of, path, level)
            return plain(values.values())
        if not text.is_whole:
            raise BadJson(f"{path}: half of a surrogate pair is no character")
        try:
            return _decoder(plain).decode(text.mended)
        except msgspec.DecodeError as error:
            raise BadJson(f"{path}: {error}") from None

    def check_few(self, text: Json, of: object) -> None:
        """Raise `BadJson` for more values than are to be taken apart, unless they are payloads."""
        if text.mended.count(b",") > MAX_COMMAS and _way_of(of)[0] not in _PAYLOADS:
            raise BadJson(f"more than {MAX_MEMBERS} members")

    def map(self, text: Json, of: object, path: str, level: int) -> Reading:
        found = {}
        for name, member in self.members(text, path, named=True):
            self.read += 1
            if self.read == PIECE:
                yield self.take_read()
            if member.mended != b"null" or _way_of(of)[0] in _PAYLOADS:
                under = f"{path}[{name[:40]!r}]"
                found[name] = yield from self.value(member, of, under, level)
        return found

    def members(self, text: Json, path: str, *, named: bool = False) -> Iterator[tuple[str, Json]]:
        """Names and values of an object; `named` says that a name counts, whichever it is."""
        try:
            found = _members.decode(text.mended)
        except msgspec.DecodeError:
            raise BadJson(f"{path or 'this'} is no object") from None
        self.count(len(found))
        if text.is_whole:
            for name, raw in found.items():
                data = bytes(raw)
                yield name, Json(data, data)
            return
        at = 0
        for name, raw in found.items():
            match = _key(text.mended, at)
            start = at if match is None else match.end()
            at = start + len(bytes(raw))
            value = text.part(start, at)
            if match is None or value.mended != bytes(raw):
                raise BadJson(f"{path or 'this'} has a member twice")
            if named and not text.part(*match.span(1)).is_whole:
                raise BadJson(f"{path}: half of a surrogate pair is no character")
            yield name, value
        if _end(text.mended, at) is None:
            raise BadJson(f"{path or 'this'} has a member twice")

    def items(self, text: Json, path: str) -> Iterator[Json]:
        try:
            found = _items.decode(text.mended)
        except msgspec.DecodeError:
            raise BadJson(f"{path} is no list") from None
        self.count(len(found))
        at = 0
        for raw in found:
            start = _after(_item, text.mended, at)
            at = start + len(bytes(raw))
            yield text.part(start, at)

    def take_read(self) -> int:
        read, self.read = self.read, 0
        return read

    def count(self, members: int) -> None:
        self.members_left -= members
        if self.members_left < 0:
            raise BadJson(f"more than {MAX_MEMBERS} members")


def _under(path: str) -> str:
    return f"{path}." if path else ""
