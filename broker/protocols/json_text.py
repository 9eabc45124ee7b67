"""JSON as bytes: checked, brought onto one line, made from values."""

from base64 import b64encode

import msgspec
from msgspec import Raw

from broker.protocols.commands import BadCommand

encoder = msgspec.json.Encoder()
_raw = msgspec.json.Decoder(Raw)


def to_json(value: object) -> bytes:
    """Any JSON-able value as JSON in one line; `msgspec.Raw` is ready JSON. Raises `TypeError`."""
    return one_line(encoder.encode(value))


def one_line(data: bytes) -> bytes:
    """Valid JSON without line ends: clients split a frame at newlines before they parse it."""
    return data if b"\n" not in data else msgspec.json.format(data, indent=-1)


def check_json(data: bytes) -> bytes:
    """Return `data` in one line if it is one JSON value, else raise `BadCommand`."""
    try:
        data.decode()
        _raw.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadCommand(f"not JSON: {error}") from None
    return one_line(data)


def is_json_line(data: bytes) -> bool:
    """Whether `data` is one JSON value without line ends, so that it can go out as it is."""
    try:
        return b"\n" not in data and check_json(data) is data
    except BadCommand:
        return False


def opaque_json(data: bytes) -> bytes:
    """Bytes of a client over protobuf, for those who read JSON.

    JSON stays JSON; anything else becomes a string in base64, as proto3's own JSON mapping has it.
    """
    try:
        return check_json(data)
    except BadCommand:
        return b'"' + b64encode(data) + b'"'
