"""The Centrifuge protocol in JSON: what is written, as any JSON parser reads it; what is read."""

import json
import tracemalloc
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.core.messages import ClientInfo, Position, Publication
from broker.protocols import centrifuge_json as module
from broker.protocols.centrifuge_json import (
    CENTRIFUGE_JSON,
    CentrifugeJson,
    decode,
    decode_publishes,
    is_connect,
)
from broker.protocols.commands import MAX_COMMANDS, METHODS, BadCommand, FaultyCommand
from broker.protocols.json_text import opaque_json, to_json
from broker.transport import frames

# Quotes, control characters, line ends, emoji, everything that UTF-8 can say.
texts = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(
    ['"', "\\", "\n", "\x00\x1f\x7f", "\u2028", "😀", '"}\n{"id":1}', "</script>"]
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
infos = st.builds(
    ClientInfo,
    client=texts,
    user=texts,
    conn_info=st.none() | json_values.map(to_json),
    chan_info=st.none() | json_values.map(to_json),
)


def payload_of(frame: bytes) -> bytes:
    header = frames.read_header(frame)
    assert header is not None
    assert (header.fin, header.opcode, header.masked) == (True, frames.TEXT, False)
    assert len(frame) == header.size + header.length
    return frame[header.size :]


def read(frame: bytes) -> Any:
    """The one object in a frame, read by a parser that is not ours."""
    payload = payload_of(frame)
    assert b"\n" not in payload, "clients split frames at newlines"
    return json.loads(payload)


def shown(info: ClientInfo) -> dict[str, object]:
    """A `ClientInfo` as the wire reference has it."""
    fields: dict[str, object] = {"user": info.user, "client": info.client}
    if info.conn_info is not None:
        fields["conn_info"] = json.loads(info.conn_info)
    if info.chan_info is not None:
        fields["chan_info"] = json.loads(info.chan_info)
    return fields


# what is written


@given(texts, texts, json_values, st.none() | infos, st.integers(0, 2**63))
def test_a_publication_is_a_push(
    name: str, topic: str, value: object, info: ClientInfo | None, offset: int
) -> None:
    publication = Publication(topic, to_json(value), info, offset)
    pub: dict[str, object] = {"data": value}
    if info is not None:
        pub["info"] = shown(info)
    if offset:
        pub["offset"] = offset
    if name != topic:
        pub |= {"channel": topic, "tags": {"topic": topic}}
    assert read(CENTRIFUGE_JSON.publication(name, publication)) == {
        "push": {"channel": name, "pub": pub}
    }


@pytest.mark.parametrize("count", [1, 3, 4, 20])
@pytest.mark.parametrize(
    "odd",
    [
        {},
        {"topic": '100% "%d" %b'},
        {"info": None},
        {"info": ClientInfo("7", "50%d", b'"%b"')},
        {"offset": 0},
        {"time": 1700000000000},
        {"tags": {"a": "1"}},
        {"data": b"\xff", "opaque": True},
        {"data": b'"%d %b"'},
        {"data": b'"' + b"x" * 200 + b'"'},
        {"data": b'"' + b"x" * 70_000 + b'"'},
    ],
    ids=lambda odd: next(iter(odd), "simple"),
)
@pytest.mark.parametrize("pattern", ["", "*"])
def test_several_publications_are_written_as_each_would_be(
    pattern: str, odd: dict[str, Any], count: int
) -> None:
    base: dict[str, Any] = {"topic": "a", "data": b"1", "info": ClientInfo("7"), "offset": 95} | odd
    publications = [Publication(**base) for _ in range(count)]
    if base["offset"]:
        publications = [
            msgspec.structs.replace(p, offset=p.offset + n) for n, p in enumerate(publications)
        ]
    name = pattern or base["topic"]
    assert list(CENTRIFUGE_JSON.publications(name, publications)) == [
        CENTRIFUGE_JSON.publication(name, publication) for publication in publications
    ]


def test_opaque_data_is_made_json_once_for_all_names(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[bytes] = []

    def count(data: bytes) -> bytes:
        made.append(data)
        return opaque_json(data)

    monkeypatch.setattr(module, "opaque_json", count)
    codec = CentrifugeJson()
    for data in (b"[1,\n2]", b"\xff", b"[1,\n2]"):
        publication = Publication("a.b", data, opaque=True)
        written = [codec.publication(name, publication) for name in ("a.b", "a.*", "*.b")]
        assert len({json.dumps(read(frame)["push"]["pub"]["data"]) for frame in written}) == 1
    assert made == [b"[1,\n2]", b"\xff", b"[1,\n2]"]


@given(texts, infos, st.integers(0, 9999), texts, json_values)
def test_the_other_pushes(
    topic: str, info: ClientInfo, code: int, reason: str, value: object
) -> None:
    codec = CENTRIFUGE_JSON
    assert read(codec.join(topic, info)) == {
        "push": {"channel": topic, "join": {"info": shown(info)}}
    }
    assert read(codec.leave(topic, info)) == {
        "push": {"channel": topic, "leave": {"info": shown(info)}}
    }
    assert read(codec.unsubscribe(topic, code, reason)) == {
        "push": {"channel": topic, "unsubscribe": {"code": code, "reason": reason}}
    }
    assert read(codec.disconnect(code, reason)) == {
        "push": {"disconnect": {"code": code, "reason": reason}}
    }
    assert read(codec.message(to_json(value))) == {"push": {"message": {"data": value}}}


def test_a_ping_is_an_empty_object() -> None:
    assert read(CENTRIFUGE_JSON.ping()) == {}


@given(st.integers(1, 2**32 - 1), st.sampled_from(METHODS), json_values, texts, st.booleans())
def test_replies_and_errors(
    number: int, method: str, result: object, message: str, temporary: bool
) -> None:
    reply = CENTRIFUGE_JSON.reply(number, method, {"data": msgspec.Raw(to_json(result))})
    assert json.loads(reply) == {"id": number, method: {"data": result}}
    error: dict[str, object] = {"code": 107, "message": message}
    if temporary:
        error["temporary"] = True
    assert json.loads(CENTRIFUGE_JSON.error(number, 107, message, temporary)) == {
        "id": number,
        "error": error,
    }


def test_a_result_may_be_empty() -> None:
    assert CENTRIFUGE_JSON.reply(7, "publish", {}) == b'{"id":7,"publish":{}}'


@given(st.lists(st.tuples(json_values, st.none() | infos), max_size=3), texts)
def test_history_lists_publications_with_their_offsets(
    kept: list[tuple[object, ClientInfo | None]], epoch: str
) -> None:
    publications = [
        Publication("news", to_json(value), info, offset)
        for offset, (value, info) in enumerate(kept, 5)
    ]
    listed = [
        {"data": value, "offset": offset} | ({"info": shown(info)} if info else {})
        for offset, (value, info) in enumerate(kept, 5)
    ]
    result = CENTRIFUGE_JSON.stream(publications, Position(9, epoch))
    assert json.loads(CENTRIFUGE_JSON.reply(1, "history", result))["history"] == {
        "publications": listed,
        "offset": 9,
        "epoch": epoch,
    }


@given(st.lists(infos, max_size=3, unique_by=lambda info: info.client))
def test_presence_has_the_infos_by_client(present: list[ClientInfo]) -> None:
    clients = {info.client: info for info in present}
    reply = CENTRIFUGE_JSON.reply(1, "presence", CENTRIFUGE_JSON.presence(clients))
    assert json.loads(reply)["presence"] == {
        "presence": {client: shown(info) for client, info in clients.items()}
    }


@given(st.lists(json_values, min_size=1, max_size=4))
def test_a_frame_is_one_object_a_line(values: list[object]) -> None:
    lines = payload_of(CENTRIFUGE_JSON.frame([to_json(value) for value in values])).split(b"\n")
    assert [json.loads(line) for line in lines] == values


# what is read


def test_every_field_of_every_command_is_read() -> None:
    since = {"offset": 3, "epoch": "e"}
    fields: dict[str, dict[str, object]] = {
        "connect": {
            "token": "t",
            "data": {"a": 1},
            "subs": {"news": {"recover": True, "epoch": "e", "offset": 1}},
            "name": "js",
            "version": "1.2",
            "headers": {"h": "v"},
        },
        "subscribe": {
            "channel": "news",
            "token": "t",
            "recover": True,
            "epoch": "e",
            "offset": 4,
            "data": [1],
            "positioned": True,
            "recoverable": True,
            "join_leave": True,
            "flag": 2,
        },
        "unsubscribe": {"channel": "news"},
        "presence": {"channel": "news"},
        "presence_stats": {"channel": "news"},
        "publish": {"channel": "news", "data": "x"},
        "history": {"channel": "news", "limit": -1, "since": since, "reverse": True},
        "rpc": {"method": "add", "data": [1, 2]},
        "send": {"data": None},
        "refresh": {"token": "t"},
        "sub_refresh": {"channel": "news", "token": "t"},
    }
    assert set(fields) == set(METHODS)
    for number, (method, sent) in enumerate(fields.items(), 1):
        (command,) = decode(json.dumps({"id": number, method: sent}).encode())
        assert command.id == number
        assert [m for m in METHODS if getattr(command, m) is not None] == [method]
        request = getattr(command, method)
        assert isinstance(sent, dict)
        for field, value in sent.items():
            assert plain(getattr(request, field)) == value


def plain(value: object) -> object:
    """A field as the JSON value that it was."""
    if isinstance(value, msgspec.Raw):
        return json.loads(bytes(value))
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, msgspec.Struct):
        fields = {name: getattr(value, name) for name in value.__struct_fields__}
        default = type(value)()
        return {n: plain(v) for n, v in fields.items() if v != getattr(default, n)}
    return value


def test_a_field_that_is_left_out_has_its_default() -> None:
    (command,) = decode(b'{"subscribe":{}}')
    assert command.id == 0
    request = command.subscribe
    assert request is not None
    assert (request.channel, request.offset, request.epoch, bytes(request.data)) == ("", 0, "", b"")
    wishes = (request.recover, request.positioned, request.recoverable, request.join_leave)
    assert wishes == (False, False, False, False)


def test_fields_that_nobody_knows_are_ignored() -> None:
    (command,) = decode(
        b'{"id":1,"what":[{"is":"this"}],"publish":{"channel":"a","zip":1,"data":2}}'
    )
    assert command.publish is not None
    assert (command.publish.channel, bytes(command.publish.data)) == ("a", b"2")


@pytest.mark.parametrize(
    "payload, ids",
    [
        (b'{"id":1}', [1]),
        (b'{"id":1}\n{"id":2}', [1, 2]),
        (b'{"id":1}\n{"id":2}\n', [1, 2]),
        (b'\n\n{"id":1}\n\n{"id":2}', [1, 2]),
        (b' {"id":1} ', [1]),
        (b'{"id":1}\r\n{"id":2}', [1, 2]),
        (b"{}", [0]),
        (b'{\n"id":\n1}', [1]),
    ],
)
def test_commands_are_joined_by_newlines(payload: bytes, ids: list[int]) -> None:
    assert [command.id for command in decode(payload)] == ids


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20))
def test_any_number_of_commands_comes_out_in_order(ids: list[int]) -> None:
    payload = b"\n".join(to_json({"id": number, "rpc": {}}) for number in ids)
    assert [command.id for command in decode(payload)] == ids


def peak_of(act: Callable[[], object]) -> int:
    """Bytes of memory that something needs at most."""
    tracemalloc.start()
    try:
        act()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


LINES = {
    "empty": b"{}",
    "short": b'{"id":5,"rpc":{"method":"a"}}',
    "nulls": b'{"id":5,"rpc":null}',
    "wrong": b'{"id":5,"rpc":{"method":7}}',
    "halves": rb'{"id":5,"send":{"data":"\ud83d"}}',
}


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_a_message_has_so_many_commands_at_most(line: bytes) -> None:
    most = decode(b"\n".join([line] * MAX_COMMANDS))
    assert len(most) == MAX_COMMANDS
    for lines in (MAX_COMMANDS + 1, 2**20 // (len(line) + 1)):
        for end in (b"", b"\n"):
            with pytest.raises(BadCommand, match="more than 16384 objects"):
                decode(b"\n".join([line] * lines) + end)


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
@pytest.mark.parametrize("between", [b"\n", b"", b" ", b"\r\n"])
def test_many_commands_are_not_there_at_the_same_time(line: bytes, between: bytes) -> None:
    message = between.join([line] * (2**20 // len(line + between))) + b"\n"
    begin = between.join([line] * MAX_COMMANDS) + b"\n"

    def read(payload: bytes) -> None:
        try:
            for _ in decode(payload):
                pass
        except BadCommand:
            pass

    # It is cut up once, to be checked; and where it has to be mended, that takes it into pieces too.
    most = (10 if b"ud83d" in line else 3) * 2**20
    for payload in (message, begin):
        assert peak_of(partial(read, payload)) < most


@pytest.mark.parametrize(
    "objects",
    [
        b'"connect":{"subs":{%b}}' % b",".join(b'"%x":{}' % number for number in range(16_400)),
        b'"subscribe":{"tf":{"nodes":[%b]}}' % b",".join([b"{}"] * 300_000),
    ],
    ids=["topics", "nodes"],
)
def test_a_command_of_too_many_objects_is_refused_before_they_are_made(objects: bytes) -> None:
    (command,) = decode(b'{"id":7,%b}' % objects)
    assert isinstance(command, FaultyCommand)
    assert (command.id, command.fault) == (7, "more than 8192 members")
    both = list(decode(b'{"id":7,%b}\n{"id":8,"rpc":{}}' % objects))
    assert [isinstance(each, FaultyCommand) for each in both] == [True, False]


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xff\xfe",
        b"hello",
        b"null",
        b"7",
        b"[]",
        b'"connect"',
        b'{"id":1',
        b'{"id":1}{"id":2}',
        b'{"id":1}\n{"id":2',
        b'{"id":1}\nhello',
        b'{"id":-1}',
        b'{"id":4294967296}',
        b'{"id":18446744073709551616}',
        b'{"id":1.5}',
        b'{"id":"1"}',
        b'{"id":true}',
        b'{"connect":7}',
        b"\n",
        b" \r\n\n\t",
        b'{"id":1}\nnull',
        b'{"rpc":{"method":"\\ud800"}}',
        b'{"publish":{"channel":7},"rpc":{}}',
        b'{"publish":{"channel":"a\xff"}}',
        b'{"publish":{"channel":"a","data":"\\q"}}',
        b'{"publish":{"channel":"a","data":"\\ud80"}}',
        b'{"publish":{"channel":"a","data":"\x01"}}',
        b'{"publish":{"channel":"a","data":nul}}',
        b'{"publish":{"channel":"a","data":[1,]}}',
        b'{"publish":{"channel":"a","data":01}}',
        b'{"publish":{"channel":"a","data":"\xc3"}}',
        b'{"subscribe":{"offset":-1}}',
        b'{"subscribe":{"recover":1}}',
        b'{"history":{"since":{"offset":1.5}}}',
        b'{"rpc":{"data":' + b"[" * 10_000 + b"]" * 10_000 + b"}}",
        b'{"what":' + b'{"a":' * 10_000 + b"1" + b"}" * 10_000 + b"}",
        b'{"id":1}\n{"rpc":{"data":' + b"[" * 10_000 + b"]" * 10_000 + b"}}",
        b"[" * 100_000,
    ],
    ids=lambda payload: repr(payload[:40]),
)
def test_a_payload_that_is_no_command_is_described_in_one_line(payload: bytes) -> None:
    with pytest.raises(BadCommand) as caught:
        list(decode(payload))
    message = str(caught.value)
    assert message
    assert "\n" not in message
    assert len(message) < 200
    assert not is_connect(payload)


@pytest.mark.parametrize("number", [0, 1, 2**32 - 1])
def test_an_id_is_a_number_of_32_bits(number: int) -> None:
    (command,) = decode(b'{"id":%d}' % number)
    assert command.id == number


@pytest.mark.parametrize("offset", [0, 2**53 + 1, 2**64 - 1, 2**64])
def test_an_offset_may_be_larger_than_any_there_is(offset: int) -> None:
    (command,) = decode(b'{"subscribe":{"offset":%d}}' % offset)
    assert command.subscribe is not None
    assert command.subscribe.offset == offset


@given(st.binary(max_size=60) | texts.map(str.encode))
def test_nothing_else_is_raised_by_whatever_comes(payload: bytes) -> None:
    try:
        assert list(decode(payload))
    except BadCommand:
        pass
    is_connect(payload)


@given(json_values, st.integers(0, 4))
def test_a_payload_stays_byte_for_byte_what_came(value: object, indent: int) -> None:
    data = json.dumps(value, indent=indent or None, ensure_ascii=False).encode()
    (command,) = decode(b'{"publish":{"channel":"a","data":%b}}' % data)
    assert command.publish is not None
    assert bytes(command.publish.data) == data


@pytest.mark.parametrize(
    "payload, opens",
    [
        (b'{"id":1,"connect":{}}', True),
        (b' {"connect":{"token":"t"},"id":1}', True),
        (b'{"id":1,"connect":{}}\n{"id":2,"subscribe":{"channel":"a"}}', True),
        (b'{"id":1,"subscribe":{"channel":"a"}}\n{"id":2,"connect":{}}', False),
        (b'{"id":0,"connect":{}}', False),
        (b'{"connect":{}}', False),
        (b'{"id":1,"connect":null}', False),
        (b'{"id":1,"connect":true}', False),
        (b'{"id":1,"method":"connect"}', False),
        (b'[{"id":1,"connect":{}}]', False),
        (b'"connect"', False),
        (b"connect", False),
        (b"", False),
        ("client：hello，服务端".encode(), False),
    ],
)
def test_only_a_connect_command_opens_the_protocol(payload: bytes, opens: bool) -> None:
    assert is_connect(payload) is opens


def test_publishes_in_any_script_are_read_together() -> None:
    words = ["客户端", "ü", "b"]
    payloads = [
        json.dumps({"publish": {"channel": "a", "data": word}}, ensure_ascii=False).encode()
        for word in words
    ]
    commands = decode_publishes(payloads)
    assert commands is not None
    assert [msgspec.json.decode(each.publish.data) for each in commands] == words


@pytest.mark.parametrize("blank", [b"", b" ", b"\t\r "])
def test_two_publishes_in_one_payload_do_not_stand_for_a_blank_one(blank: bytes) -> None:
    publish = b'{"publish":{"channel":"a","data":1}}'
    assert decode_publishes([publish, publish * 2, blank]) is None
    assert decode_publishes([publish, publish, publish]) is not None


@pytest.mark.parametrize("between", [b"", b" ", b"\t", b"\r"])
@pytest.mark.parametrize("line_end", [b"", b"\n", b"\n{}"])
def test_two_objects_in_one_line_are_refused_whatever_else_is_there(
    between: bytes, line_end: bytes
) -> None:
    command = b'{"id":1,"rpc":{"method":"m"}}'
    with pytest.raises(BadCommand, match="trailing characters"):
        CENTRIFUGE_JSON.decode(command + between + command + line_end)


def test_braces_in_a_text_are_no_objects() -> None:
    commands = CENTRIFUGE_JSON.decode(b'{"id":1,"rpc":{"method":"} {"}}\n{"id":2,"rpc":{}}')
    assert [command.id for command in commands] == [1, 2]


def test_publishes_that_are_many_in_one_message_are_not_made() -> None:
    payload = b'{"publish":{}}'
    assert decode_publishes([payload]) is not None
    peak = peak_of(lambda: decode_publishes([payload * 70_000]))
    assert peak < 2 * 2**20  # the message itself, joined
    with pytest.raises(BadCommand, match="trailing characters"):
        decode(payload * 70_000)


def test_a_publish_of_many_objects_is_one() -> None:
    data = b"[%b{}]" % (b"{}," * 300_000)
    (command,) = decode(b'{"publish":{"channel":"a","data":%b}}' % data)
    assert command.publish is not None
    assert bytes(command.publish.data) == data


@pytest.mark.parametrize("data", [b"\xff", b"\xed\xa0\x80", "ü".encode()[:1]])
def test_publishes_that_are_not_utf_8_are_not(data: bytes) -> None:
    payload = b'{"publish":{"channel":"a","data":"%b"}}'
    assert decode_publishes([payload % b"a", payload % data]) is None


# what a strict decoder refuses

HALF = "half of a surrogate pair is no character"

FIELDS: dict[str, tuple[str, ...]] = {
    "connect": ("token", "subs", "name", "version", "headers", "flag"),
    "subscribe": (
        *("channel", "token", "recover", "epoch", "offset", "positioned", "recoverable"),
        *("join_leave", "delta", "tf", "flag", "type"),
    ),
    "unsubscribe": ("channel",),
    "presence": ("channel",),
    "presence_stats": ("channel",),
    "publish": ("channel",),
    "history": ("channel", "limit", "since", "reverse"),
    "rpc": ("method",),
    "send": (),
    "refresh": ("token",),
    "sub_refresh": ("channel", "token"),
}
"""All fields that are no payload."""


def test_the_fields_above_are_all_there_are() -> None:
    assert {*FIELDS} == {*METHODS}
    for method in METHODS:
        (command,) = decode(b'{"id":1,"%b":{}}' % method.encode())
        fields = getattr(command, method).__struct_fields__
        assert {*fields} - {"data"} == {*FIELDS[method]}


@pytest.mark.parametrize(
    "method, field", [(method, field) for method, fields in FIELDS.items() for field in fields]
)
def test_null_is_absence_in_every_field_of_every_command(method: str, field: str) -> None:
    (without,) = decode(json.dumps({"id": 1, method: {"data": 1}}).encode())
    sent = json.dumps({"id": 1, method: {field: None, "data": 1}}).encode()
    (command,) = decode(sent)
    assert plain(command) == plain(without)
    both = list(decode(b'{"id":7,"rpc":{}}\n' + sent))
    assert (both[0].id, plain(both[1])) == (7, plain(without))


@pytest.mark.parametrize("method", METHODS)
def test_a_method_that_is_null_is_not_asked_for(method: str) -> None:
    (command,) = decode(b'{"id":null,"%b":null}' % method.encode())
    assert plain(command) == {}


@pytest.mark.parametrize("method", ["connect", "subscribe", "publish", "rpc", "send"])
def test_a_payload_may_be_null(method: str) -> None:
    for beside in (b"", b',"channel":null,"token":null,"method":null'):
        (command,) = decode(b'{"id":1,"%b":{"data":null%b}}' % (method.encode(), beside))
        assert bytes(getattr(command, method).data) == b"null"


@pytest.mark.parametrize(
    "sent",
    [
        {"subscribe": {"tf": {"op": None, "key": "a", "cmp": "in", "vals": None, "nodes": None}}},
        {"subscribe": {"tf": {"op": "not", "nodes": [{"key": "a", "cmp": None}]}}},
        {"history": {"since": {"offset": None, "epoch": None}}},
        {"connect": {"subs": {"a": {"recover": None, "epoch": None}, "b": None}}},
        {"connect": {"headers": {"a": "b", "c": None}}},
    ],
)
def test_null_is_absence_inside_too(sent: dict[str, Any]) -> None:
    (command,) = decode(json.dumps({"id": 1, **sent}).encode())
    (expected,) = decode(json.dumps({"id": 1, **without_nulls(sent)}).encode())
    assert not isinstance(command, FaultyCommand)
    assert plain(command) == plain(expected)


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_nulls(v) for name, v in value.items() if v is not None}
    if isinstance(value, list):
        return [without_nulls(inner) for inner in value]
    return value


halves = st.text(st.characters() | st.characters(categories=["Cs"]), max_size=6)
odd_values = st.recursive(
    st.none() | st.integers() | halves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(halves, inner, max_size=3),
    max_leaves=6,
)


@given(
    st.sampled_from(["connect", "subscribe", "publish", "rpc", "send"]),
    st.lists(odd_values, min_size=1, max_size=4),
    st.none() | st.integers(0, 2),
)
def test_any_payload_passes(method: str, values: list[object], indent: int | None) -> None:
    sent = [{"id": n, method: {"data": value}} for n, value in enumerate(values, 1)]
    payload = "\n".join(json.dumps(each, indent=indent) for each in sent).encode()
    commands = list(decode(payload))
    assert [command.id for command in commands] == [*range(1, len(values) + 1)]
    for command, value in zip(commands, values, strict=True):
        assert not isinstance(command, FaultyCommand)
        data = bytes(getattr(command, method).data)
        if method != "rpc":
            # The broker's own rpc methods have names in it: it is for who reads it to mend.
            msgspec.json.format(data)  # which takes no halves
        if indent is None:
            assert len(data) == len(json.dumps(value))


def test_half_a_pair_in_a_payload_is_replaced_and_nothing_else_is() -> None:
    data = rb'{"a" : 1.0, "b":"\ud83d", "c":"\ud83d\ude00", "\udead":"\\ud83d"}'
    for method in ("connect", "subscribe", "publish", "send"):
        (command,) = decode(b'{"id":1,"%b":{"data":%b}}' % (method.encode(), data))
        assert bytes(getattr(command, method).data) == (
            rb'{"a" : 1.0, "b":"\ufffd", "c":"\ud83d\ude00", "\ufffd":"\\ud83d"}'
        )
    (command,) = decode(b'{"id":1,"rpc":{"data":%b}}' % data)
    assert command.rpc is not None
    assert bytes(command.rpc.data) == data


@pytest.mark.parametrize(
    "sent, fault",
    [
        (rb'"publish":{"channel":"\ud83d","data":1}', f"publish.channel: {HALF}"),
        (rb'"publish":{"channel":"a\udfff","data":"\ud83d"}', f"publish.channel: {HALF}"),
        (rb'"subscribe":{"channel":"a","token":"\ud83d"}', f"subscribe.token: {HALF}"),
        (rb'"subscribe":{"epoch":"\ud83d"}', f"subscribe.epoch: {HALF}"),
        (rb'"subscribe":{"tf":{"vals":["\ud83d"]}}', f"subscribe.tf.vals: {HALF}"),
        (rb'"connect":{"token":"\ud83d"}', f"connect.token: {HALF}"),
        (rb'"connect":{"subs":{"\ud83d":{}}}', f"connect.subs: {HALF}"),
        (rb'"connect":{"headers":{"a":"\ud83d"}}', f"connect.headers['a']: {HALF}"),
        (rb'"rpc":{"method":"\ud83d"}', f"rpc.method: {HALF}"),
        (rb'"history":{"since":{"epoch":"\ud83d"}}', f"history.since.epoch: {HALF}"),
        (b'"publish":{"channel":7}', "publish.channel: Expected `str`, got `int`"),
        (b'"publish":7', "publish is no object"),
        (b'"connect":true', "connect is no object"),
        (b'"subscribe":{"offset":-1}', "subscribe.offset: Expected `int` >= 0"),
        (b'"subscribe":{"recover":1}', "subscribe.recover: Expected `bool`, got `int`"),
        (b'"history":{"since":{"offset":1.5}}', "history.since.offset: Expected `int`"),
        (b'"connect":{"subs":{"a":5}}', "connect.subs['a'] is no object"),
    ],
)
def test_a_wrong_field_refuses_its_command_alone(sent: bytes, fault: str) -> None:
    good = b'{"id":1,"publish":{"channel":"a","data":1}}'
    for before, behind in ((b"", b""), (good + b"\n", b"\n" + good)):
        commands = list(decode(before + b'{"id":7,' + sent + b"}" + behind))
        found = commands[len(commands) // 2]
        assert isinstance(found, FaultyCommand)
        assert (found.id, found.fault[: len(fault)]) == (7, fault)
        others = [command for command in commands if command is not found]
        assert all(each.publish is not None and each.id == 1 for each in others)
        assert len(others) == (2 if before else 0)


def test_a_publish_without_an_id_is_refused_in_silence() -> None:
    (command,) = decode(rb'{"publish":{"channel":"\ud83d","data":1}}')
    assert isinstance(command, FaultyCommand)
    assert (command.id, command.publish is not None) == (0, True)


def test_a_line_that_is_broken_ends_it_before_anything_is_carried_out() -> None:
    for broken in (b'{"id":2,', b'{"id":2,"rpc":{"data":"\\ud83"}}', b"nonsense"):
        with pytest.raises(BadCommand, match="not JSON"):
            decode(b'{"id":1,"publish":{"channel":null}}\n' + broken)


def test_commands_that_are_read_member_by_member_are_read_one_by_one() -> None:
    commands = decode(b'{"id":1,"rpc":{"method":null}}\n{"id":-1}\n')
    assert len(commands) == 2
    reading = iter(commands)
    assert next(reading).id == 1
    with pytest.raises(BadCommand, match="id: Expected `int` >= 0"):
        next(reading)


@pytest.mark.parametrize(
    "payload, opens",
    [
        (rb'{"id":1,"connect":{"data":"\ud83d"}}', True),
        (b'{"id":1,"connect":{"token":null}}', True),
        (rb'{"id":1,"connect":{"token":"\ud83d"}}', True),  # to be told so, in the protocol
        (b'{"id":1,"connect":{"token":5}}', True),
        (b'{"id":null,"connect":{"token":null}}', False),
    ],
)
def test_a_connect_that_is_refused_is_a_connect(payload: bytes, opens: bool) -> None:
    assert is_connect(payload) is opens
