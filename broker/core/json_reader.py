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
from collections.abc import Iterator
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
from msgspec import Raw, Struct

AsSent: TypeAlias = Annotated[Raw, "as sent"]
"""A payload that is read once more, by a struct of its own: nothing in it is replaced before that, because
there may be names in it."""

MAX_MEMBERS: Final = 2**13
"""In one text that has to be read member by member: they take 25 ms. Connect takes up to seven to
recover a topic, and a client has a thousand topics unless the config says otherwise."""

MAX_OBJECTS: Final = 2**14
"""In one text that a strict decoder takes as a whole where `few` are expected. A topic or a filter takes
three bytes in JSON and 200 as a struct; so many take 3 ms. Payloads may have more."""

MAX_LEVELS: Final = 20
"""Of structs in structs, each of which costs another look at all that is below it: 2 ms for 1 MiB. A
filter of tags has 16, and stands in two others."""

MAX_REASON: Final = 200
"""Characters: a reason may quote a name, which may be as long as a message."""

S = TypeVar("S", bound=Struct)


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
    return mend(data)


def _after(match: Any, data: bytes, at: int) -> int:
    found: re.Match[bytes] = match(data, at)
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
def _decoder(kind: Any) -> "msgspec.json.Decoder[Any]":
    return msgspec.json.Decoder(kind)


@lru_cache(maxsize=256)
def _fields(kind: type[Struct]) -> dict[str, msgspec.structs.FieldInfo]:
    return {field.encode_name: field for field in msgspec.structs.fields(kind)}


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

    What it gives `read` gives as well, and such a text is JSON from its first byte to its last, in UTF-8: it
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
        return _Reader().map(one_text(data), AsSent, "", 0)
    except RecursionError:
        raise TooDeep from None
    return found


def are_few(data: bytes) -> bool:
    """Whether a text has no more than `MAX_OBJECTS`; `read_text` counts those in payloads as nothing."""
    return data.count(b"{") <= MAX_OBJECTS


def read_text(text: Json, kind: type[S], path: str = "") -> S:
    """`text` as a struct, member by member; `path` stands before the names in reasons."""
    found: S = _Reader().struct(text, kind, path)
    return found


def members(text: Json) -> dict[str, bytes]:
    """The members of an object, mended; of several with one name, the last.

    Raises `BadJson` for no object.
    """
    try:
        return {name: bytes(raw) for name, raw in _members.decode(text.mended).items()}
    except msgspec.DecodeError:
        raise BadJson("no object") from None


def _only(kind: Any) -> Any:
    """A type without its `None`."""
    if get_origin(kind) not in (Union, UnionType):
        return kind
    others = [each for each in get_args(kind) if each is not NoneType]
    return others[0] if len(others) == 1 else kind


def _has_parts(kind: Any) -> bool:
    """Whether there may be nulls or payloads inside: else a list of them is read in one go."""
    kind = _only(kind)
    struct = isinstance(kind, type) and issubclass(kind, Struct)
    return struct or kind in (Raw, AsSent) or get_origin(kind) is dict


class _Reader:
    """Reads one text, as far as it has members left."""

    def __init__(self) -> None:
        self.members_left = MAX_MEMBERS

    def struct(self, text: Json, kind: type[Struct], path: str, level: int = 0) -> Any:
        if level > MAX_LEVELS:
            raise BadJson(f"{path} is nested more than {MAX_LEVELS} deep")
        fields, values = _fields(kind), dict[str, Any]()
        for name, member in self.members(text, path):
            field = fields.get(name)
            if field is None:
                if kind.__struct_config__.forbid_unknown_fields:
                    raise BadJson(f"{_under(path)}{name[:40]!r} is no field")
                continue
            of = _only(field.type)
            if member.mended == b"null" and of not in (Raw, AsSent):
                values.pop(field.name, None)
            else:
                values[field.name] = self.value(member, of, _under(path) + name, level)
        for name, field in fields.items():
            if field.required and field.name not in values:
                raise BadJson(f"{_under(path)}{name} is missing")
        return kind(**values)

    def value(self, text: Json, kind: Any, path: str, level: int) -> Any:
        kind = _only(kind)
        if kind is Raw:
            return Raw(text.mended)
        if kind == AsSent:
            return Raw(text.sent)
        if isinstance(kind, type) and issubclass(kind, Struct):
            return self.struct(text, kind, path, level + 1)
        origin, of = get_origin(kind), get_args(kind)
        if origin is dict and of[1] is not object:
            return self.map(text, of[1], path, level)
        if origin in (list, tuple) and _has_parts(of[0]):
            items = self.items(text, path)
            return origin(self.value(item, of[0], path, level) for item in items)
        if not text.is_whole:
            raise BadJson(f"{path}: half of a surrogate pair is no character")
        try:
            return _decoder(kind).decode(text.mended)
        except msgspec.DecodeError as error:
            raise BadJson(f"{path}: {error}") from None

    def map(self, text: Json, of: Any, path: str, level: int) -> dict[str, Any]:
        found = {}
        for name, member in self.members(text, path, named=True):
            if member.mended != b"null" or of in (Raw, AsSent):
                found[name] = self.value(member, of, f"{path}[{name[:40]!r}]", level)
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

    def count(self, members: int) -> None:
        self.members_left -= members
        if self.members_left < 0:
            raise BadJson(f"more than {MAX_MEMBERS} members")


def _under(path: str) -> str:
    return f"{path}." if path else ""
