"""Targets of the protocols: commands in JSON and protobuf, plain peers, and the reader of JSON."""

import json
from collections.abc import Callable, Mapping
from typing import Any, Final

import centrifuge.protocol.client_pb2 as schema
import msgspec
from msgspec import Raw
from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, TextMessage

from broker.core.json_reader import BadJson, mend, one_text, read, read_members, value_of
from broker.core.messages import ClientInfo, Publication
from broker.protocols import centrifuge_json
from broker.protocols.centrifuge_json import CENTRIFUGE_JSON, is_connect
from broker.protocols.centrifuge_protobuf import CENTRIFUGE_PROTOBUF, read_emulation
from broker.protocols.codec import Codec, PeerCodec
from broker.protocols.commands import (
    METHODS,
    BadCommand,
    Command,
    ConnectRequest,
    FaultyCommand,
    SubscribeRequest,
)
from broker.protocols.json_text import check_json, is_json_line, opaque_json
from broker.protocols.plain import PLAIN
from tests.conftest import delimited
from tests.fuzz.target import target

SLOW_TOPICS: Final = ("a", "ü.b", "news.*")


def _decoded(codec: Codec, payload: bytes) -> list[Command] | None:
    """The commands of a message, None for a refusal."""
    try:
        found = codec.decode(payload)
        commands = list(found)
    except BadCommand as error:
        assert len(str(error)) < 1000
        return None
    assert len(commands) == len(found) > 0
    return commands


def _payload(frame: bytes) -> bytes | str:
    """What a client of another implementation finds in a frame."""
    client = Connection(ConnectionType.CLIENT)
    client.receive_data(frame)
    (event,) = client.events()
    assert isinstance(event, TextMessage | BytesMessage)
    assert event.message_finished
    return event.data if isinstance(event, TextMessage) else bytes(event.data)


def _by_python(data: bytes) -> Any:
    """As Python's own reader has it. Raises `ValueError` for what is not JSON (RFC 8259), and
    `RecursionError`."""

    def refuse(word: str) -> None:
        raise ValueError(word)

    return json.loads(
        data.decode(), parse_constant=refuse, parse_int=float, object_pairs_hook=_last
    )


def _last(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return dict(pairs)


def _goes_out(codec: PeerCodec, publication: Publication) -> None:
    """A publication in all its ways to be written, each the same frame."""
    name = publication.topic
    frame = codec.publication(name, publication)
    assert b"".join(codec.pieces(name, publication)) == frame
    assert list(codec.publications(name, [publication, publication])) == [frame, frame]


# commands in JSON

JSON_WORDS: Final = (
    b"\n", b"null", b"{}", b"[]", b'"id":', b'"connect":{', b'"publish":{"channel":"a","data":', b'"data":',
    b'"\\ud83d"', b'"\\ud83d\\ude00"', b'\\u0000', b'"tf":{"op":"not","nodes":[', b'"since":{"offset":', b"1e400",
    b"18446744073709551616", b"-0", b"\xed\xa0\xbd", b'"channel":null', b"[[[[[[[[[[", b'{"a":{"a":{"a":', b"true",
    b'"subs":{"', b"\xe2\x80\xa8", b'"headers":{"a":null}', b"}{", b" \t\r\n",
)  # fmt: skip


@target(
    "centrifuge_json",
    b'{"id":1,"connect":{"token":"t","data":{"a":1},"subs":{"a":{"recover":true,"epoch":"e","offset":3}}}}',
    b'{"id":2,"subscribe":{"channel":"a","recoverable":true,"tf":{"key":"k","cmp":"eq","val":"v"}}}\n{"id":3,"rpc":{"method":"m","data":"\\ud83d"}}',
    b'{"publish":{"channel":"a.b","data":{"a":[1,2.5,"\\u00e9"]}}}\n{"id":9,"publish":{"channel":"c","data":null}}',
    b'{"id":3,"history":{"channel":"a","limit":-1,"since":{"offset":0,"epoch":""},"reverse":true}}',
    b'{}',
    b'{"id":4,"presence":{"channel":"a"}}\n{"id":5,"unsubscribe":{"channel":"a"}}\n{"send":{"data":1}}',
    b'{"id":6,"refresh":{"token":"t"}}\n{"id":7,"sub_refresh":{"channel":"a","token":"t"}}\n',
    words=JSON_WORDS,
)  # fmt: skip
def commands_in_json(data: bytes) -> None:
    """Both ways to read commands find the same, which is what Python's reader finds; and what is
    published goes out as whole lines of the same JSON."""
    commands = _decoded(CENTRIFUGE_JSON, data)
    if commands is not None and mend(data) is data:
        try:
            apart = list(centrifuge_json._read_apart(data))
        except BadCommand as error:
            # Of texts that are read member by member there are bounds.
            assert "nested" in str(error) or "more than" in str(error), error
        else:
            faults = any(isinstance(each, FaultyCommand) for each in (*apart, *commands))
            assert faults or apart == commands
    _compare_with_python(data, commands)
    publishes = CENTRIFUGE_JSON.decode_publishes([data])
    if publishes is not None:
        (publish,) = publishes
        assert commands == [Command(id=publish.id, publish=publish.publish)]
    is_connect(data)
    for command in commands or ():
        if command.publish is not None and not isinstance(command, FaultyCommand):
            _publish_json(bytes(command.publish.data), command.publish.channel)


def _compare_with_python(data: bytes, commands: list[Command] | None) -> None:
    try:
        lines = [_by_python(line) for line in data.split(b"\n") if line.strip()]
    except RecursionError:
        return
    except ValueError:
        # One of many lines that is none ends its connection, as does one text that is none: but a line
        # end may stand between two tokens of one command.
        try:
            one = _by_python(data)
        except RecursionError:
            return
        except ValueError:
            if b"\n" not in data:
                assert commands is None, "it is no JSON"
            return
        lines = [one]
    if commands is None or len(lines) != len(commands):
        return
    for line, command in zip(lines, commands, strict=True):
        assert isinstance(line, dict)
        number = line.get("id")
        assert command.id == (number or 0)
        if not isinstance(command, FaultyCommand):
            named = {m for m in METHODS if line.get(m) is not None}
            assert named == {m for m in METHODS if getattr(command, m) is not None}


def _publish_json(data: bytes, channel: str) -> None:
    try:
        line = check_json(data)
    except BadCommand:
        return
    assert b"\n" not in line
    assert is_json_line(line)
    value = value_of(line)
    info = ClientInfo("1", channel, line, None)
    for topic in SLOW_TOPICS:
        for publication in (
            Publication(topic, line, info, 5, 0, None),
            Publication(topic, line, None, 0, 7, {"k": channel}),
            Publication(topic, line, info, 0, 0, None, opaque=True),
        ):
            _goes_out(CENTRIFUGE_JSON, publication)
            text = _payload(CENTRIFUGE_JSON.publication(channel or "x", publication))
            assert isinstance(text, str)
            assert "\n" not in text
            found = value_of(text.encode())
            assert isinstance(found, dict)
            assert repr(found["push"]["pub"]["data"]) == repr(value)


# commands in protobuf


def _both(command: Command) -> schema.Command:
    """A command of ours as one of the official library's."""
    theirs = schema.Command(id=command.id)
    for method in METHODS:
        request = getattr(command, method)
        if request is not None:
            _fill(getattr(theirs, method), request)
    return theirs


def _fill(theirs: Any, ours: msgspec.Struct) -> None:
    theirs.SetInParent()
    for name in ours.__struct_fields__:
        if name not in theirs.DESCRIPTOR.fields_by_name:
            continue
        value = getattr(ours, name)
        if isinstance(value, Raw):
            setattr(theirs, name, bytes(value))
        elif isinstance(value, SubscribeRequest | msgspec.Struct):
            _fill(getattr(theirs, name), value)
        elif isinstance(value, Mapping):
            for key, each in value.items():
                if isinstance(each, msgspec.Struct):
                    _fill(getattr(theirs, name)[key], each)
                else:
                    getattr(theirs, name)[key] = each
        elif isinstance(value, tuple):
            for each in value:
                if isinstance(each, msgspec.Struct):
                    _fill(getattr(theirs, name).add(), each)
                else:
                    getattr(theirs, name).append(each)
        elif value is not None:
            setattr(theirs, name, value)


def _command(**fields: Any) -> bytes:
    return delimited(schema.Command(**fields).SerializeToString())


PING: Final = 11
"""The number of that field of a command."""

FILTER: Final = {"op": "and", "nodes": [{"key": "k", "cmp": "in", "vals": ["a", "b"]}, {"key": "n", "cmp": "gt", "val": "3"}]}  # fmt: skip


@target(
    "centrifuge_protobuf",
    _command(id=1, connect={"token": "t", "data": b"{}", "name": "js", "headers": {"a": "b"},
                            "subs": {"a": {"recover": True, "offset": 2**40, "epoch": "e"}}}),
    _command(id=2, subscribe={"channel": "ü", "recoverable": True, "tf": FILTER, "data": b"1"}),
    _command(publish={"channel": "a.b", "data": b"\x00\xff"}) + _command(id=3, publish={"channel": "c", "data": b"{}"}),
    _command(id=4, history={"channel": "a", "limit": -1, "since": {"offset": 1, "epoch": "x"}, "reverse": True}),
    _command() + _command(id=5, rpc={"method": "m", "data": b"[]"}) + _command(send={"data": b"1"}),
    _command(id=6, refresh={"token": "t"}) + _command(id=7, sub_refresh={"channel": "a", "token": "t"}),
    _command(id=8, presence={"channel": "a"}) + _command(id=9, presence_stats={"channel": "a"}),
    words=(
        b"\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01", b"\xff" * 11, b"\x08", b"\x22", b"\x2a\x00", b"\x3a\x04\x0a\x02",
        b"\x0b", b"\x0c", b"\x0d\0\0\0\0", b"\x09" + bytes(8), b"\xfa\xff\xff\xff\x0f", b"\x6a\x02\x32\x00", b"\x00",
        b"\xc3\x28", b"\x80\x00",
    ),
)  # fmt: skip
def commands_in_protobuf(data: bytes) -> None:
    """What is read is what the official library reads there, field by field."""
    commands = _decoded(CENTRIFUGE_PROTOBUF, data)
    at = 0
    for command in commands or ():
        size, at = _varint(data, at)
        part, at = data[at : at + size], at + size
        if isinstance(command, FaultyCommand):
            continue
        try:
            theirs = schema.Command.FromString(_without_ping(part))
        except Exception as error:
            raise AssertionError("the official library refuses it") from error
        theirs.DiscardUnknownFields()
        assert theirs == _both(command)
        if command.publish is not None:
            _publish_opaque(bytes(command.publish.data), command.publish.channel)
    publishes = CENTRIFUGE_PROTOBUF.decode_publishes([data])
    if publishes is not None:
        (publish,) = publishes
        assert commands == [Command(id=publish.id, publish=publish.publish)]
    try:
        read_emulation(data)
    except BadCommand:
        pass


def _varint(data: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = data[at]
        number |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return number, at


def _without_ping(command: bytes) -> bytes:
    """A command that was read, without the field `ping`: in that is nothing that a broker would look for."""
    kept, at = b"", 0
    while at < len(command):
        begin = at
        key, at = _varint(command, at)
        if key & 7 == 0:
            _, at = _varint(command, at)
        elif key & 7 == 2:
            size, at = _varint(command, at)
            at += size
        else:
            at += 8 if key & 7 == 1 else 4
        if key >> 3 != PING:
            kept += command[begin:at]
    return kept


def _publish_opaque(data: bytes, channel: str) -> None:
    publication = Publication(
        "ü", data, ClientInfo("1", channel), 5, 7, {"k": channel}, opaque=True
    )
    for codec in (CENTRIFUGE_PROTOBUF, CENTRIFUGE_JSON, PLAIN):
        _goes_out(codec, publication)
    found = _payload(CENTRIFUGE_PROTOBUF.publication(channel, publication))
    assert isinstance(found, bytes)
    size, at = _varint(found, 0)
    assert len(found) == at + size
    push = schema.Reply.FromString(found[at:]).push
    assert (push.channel, push.pub.data, push.pub.offset) == (channel, data, 5)
    text = _payload(CENTRIFUGE_JSON.publication(channel, publication))
    assert isinstance(text, str)
    shown = value_of(text.encode())
    assert isinstance(shown, dict)
    assert repr(shown["push"]["pub"]["data"]) == repr(value_of(opaque_json(data)))


# plain peers, and JSON itself


@target(
    "plain", b'{"a":1}', b'"text \\u00e9 \\n"', b"\x00\xff", b"[1,\n 2]", b'"\\ud83d"', "text ü".encode(),
    words=JSON_WORDS,
)  # fmt: skip
def plain(data: bytes) -> None:
    """JSON is text, a JSON string its content, and all else the same bytes."""
    found = _payload(PLAIN.publication("a", Publication("a", data, opaque=True)))
    try:
        line = check_json(data)
    except BadCommand:
        assert found == data
        return
    assert isinstance(found, str)
    value = value_of(line)
    assert found == (value if isinstance(value, str) else line.decode())
    _goes_out(PLAIN, Publication("a", line))
    assert _payload(PLAIN.message(line)) == found


KINDS: Final[tuple[Callable[[bytes], object], ...]] = (
    lambda data: read(data, Command),
    lambda data: read(data, ConnectRequest, few=True),
    lambda data: read(data, SubscribeRequest),
    read_members,
)


@target(
    "json_reader",
    b'{"token":null,"data":"\\ud83d","subs":{"a":{"offset":1,"data":{"\\ud83d":1}}}}',
    b'{"id":1,"subscribe":{"channel":"a","tf":{"op":"not","nodes":[{"key":"\\u0061","cmp":"ex"}]}}}',
    b'[1,-0,1e999,0.5,123456789012345678901234567890,"\\ud83d\\ude00\\ud83d",{"a":null}]',
    b'"\\\\ud83d"', b"[[[[[[[[[[]]]]]]]]]]",
    words=JSON_WORDS,
)  # fmt: skip
def json_reader(data: bytes) -> None:
    """A text is JSON where Python's reader says so, with the same value once it is mended."""
    try:
        text = one_text(data)
        value = value_of(data)
    except BadJson as error:
        assert "\n" not in str(error)
        _is_not_json(data, str(error))
    else:
        assert len(text.mended) == len(data)
        mended = text.mended
        assert mend(mended) is mended
        mended.decode()
        theirs = _by_python(mended)
        assert _alike(value, theirs), (value, theirs)
    for kind in KINDS:
        try:
            kind(data)
        except BadJson as error:
            assert "\n" not in str(error)


def _is_not_json(data: bytes, reason: str) -> None:
    if "nested" in reason:
        return
    try:
        _by_python(data)
    except (ValueError, RecursionError):
        return
    raise AssertionError(f"Python reads it: {reason}")


def _alike(ours: object, theirs: object) -> bool:
    """Whether two values are the same, numbers as floats."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(_alike(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list) and isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(_alike, ours, theirs))
    if isinstance(ours, int) and not isinstance(ours, bool):
        try:
            return float(ours) == theirs
        except OverflowError:
            return theirs in (float("inf"), float("-inf"))
    return type(ours) is type(theirs) and ours == theirs
