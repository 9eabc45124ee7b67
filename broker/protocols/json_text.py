"""JSON as bytes: checked, brought onto one line, made from values."""

from base64 import b64encode
from collections.abc import Mapping

import msgspec

from broker.core.json_reader import BadJson, mended_text, one_text
from broker.core.values import LEAVES, check_values
from broker.protocols.commands import BadCommand

_encoder = msgspec.json.Encoder()


def to_json(value: object) -> bytes:
    """Any JSON-able value as JSON in one line; `msgspec.Raw` is ready JSON. A value that msgspec knows goes
    its way: a date as text, a dataclass as an object, `inf` as null.

    Raises `TypeError` for what JSON cannot say, such as a set, which has no order, and `ValueError` for
    text that is not Unicode, half of a surrogate pair, and for ready JSON that is none.
    """
    if type(value) not in LEAVES:
        check_values(value)
    return one_line(_encoder.encode(value))


def written(value: object) -> bytes:
    """As `to_json`, for what has to go out: text that is not Unicode goes with U+FFFD in it.

    `msgspec.Raw` stays as it is, and has no line ends.
    """
    try:
        return _encoder.encode(value)
    except UnicodeEncodeError:
        return _encoder.encode(_mended(value))


def _mended(value: object) -> object:
    if isinstance(value, str):
        return mended_text(value)
    if isinstance(value, Mapping):
        return {_mended(name): _mended(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_mended(inner) for inner in value]
    return value


def one_line(data: bytes) -> bytes:
    """Valid JSON without line ends: clients split a frame at newlines before they parse it."""
    return data if b"\n" not in data else msgspec.json.format(data, indent=-1)


def check_json(data: bytes) -> bytes:
    """Return `data` in one line if it is one JSON value, else raise `BadCommand`.

    Half of a surrogate pair in a text, which strict parsers would stumble over, becomes U+FFFD.
    """
    try:
        return one_line(one_text(data).mended)
    except BadJson as error:
        raise BadCommand(str(error)) from None


def is_json_line(data: bytes) -> bool:
    """Whether `data` is one JSON value, to go out as it is: without line ends, and all Unicode."""
    try:
        return b"\n" not in data and check_json(data) is data
    except BadCommand:
        return False


def opaque_json(data: bytes) -> bytes:
    """Bytes of a client over protobuf, for those who read JSON.

    JSON stays JSON, as `check_json` gives it; anything else becomes a string in base64, as proto3's
    own JSON mapping has it. So does JSON of more than about a thousand levels, which most parsers
    refuse (RFC 8259 section 9).
    """
    try:
        return check_json(data)
    except BadCommand:
        return b'"' + b64encode(data) + b'"'
