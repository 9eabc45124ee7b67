"""The Centrifuge protocol in protobuf, held against the protobuf library and the official schema."""

from typing import Any

import centrifuge.protocol.client_pb2 as schema
import pytest
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from hypothesis import given
from hypothesis import strategies as st

from broker.core.messages import ClientInfo, Position, Publication
from broker.core.tags import FilterNode
from broker.protocols.centrifuge_protobuf import (
    CENTRIFUGE_PROTOBUF,
    COMMAND,
    EMULATION_REQUEST,
    MAX_FIELDS,
    REPLY,
    Keyed,
    Kind,
    Many,
    Message,
    is_disconnect,
    read_emulation,
)
from broker.protocols.commands import MAX_COMMANDS, METHODS, BadCommand, Command, FaultyCommand
from broker.transport import frames
from tests.conftest import delimited, varint

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
payloads = st.binary(max_size=3000)
offsets = st.integers(0, 2**64 - 1)
infos = st.builds(
    ClientInfo,
    client=texts,
    user=texts,
    conn_info=st.none() | payloads,
    chan_info=st.none() | payloads,
)
tags = st.none() | st.dictionaries(texts, texts, max_size=3)


def payload_of(frame: bytes) -> bytes:
    header = frames.read_header(frame)
    assert header is not None
    assert (header.fin, header.opcode, header.masked) == (True, frames.BINARY, False)
    assert len(frame) == header.size + header.length
    return frame[header.size :]


def read_all(payload: bytes) -> list[Any]:
    """The replies of a frame, read by the library."""
    replies = []
    while payload:
        size = shift = 0
        while True:
            byte, payload = payload[0], payload[1:]
            size |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        replies.append(schema.Reply.FromString(payload[:size]))
        payload = payload[size:]
    return replies


def read(frame: bytes) -> Any:
    (reply,) = read_all(payload_of(frame))
    return reply


def shown(info: ClientInfo) -> Any:
    return schema.ClientInfo(
        user=info.user, client=info.client, conn_info=info.conn_info, chan_info=info.chan_info
    )


# the schema


NEWER = {("SubscribeRequest", 15): "type"}
"""Fields that centrifuge-js 5.8 has, and the schema in centrifuge-python 0.7 has not yet."""


def compare(message: Message, official: Any, seen: set[int]) -> None:
    if id(message) in seen:
        return
    seen.add(id(message))
    for number, (name, kind) in message.by_number.items():
        if NEWER.get((official.name, number)) == name:
            continue
        field = official.fields_by_number[number]
        assert field.name == name, f"{official.name}.{name}"
        is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
        assert isinstance(kind, Keyed) is is_map
        if isinstance(kind, Keyed):
            assert field.message_type.fields_by_name["key"].type == field.TYPE_STRING
            field, kind = field.message_type.fields_by_name["value"], kind.of
        elif isinstance(kind, Many):
            kind = kind.of
        if isinstance(kind, Message):
            compare(kind, field.message_type, seen)
        else:
            of = {
                Kind.UINT32: [field.TYPE_UINT32],
                Kind.UINT64: [field.TYPE_UINT64],
                Kind.INT32: [field.TYPE_INT32],
                Kind.INT64: [field.TYPE_INT64],
                Kind.BOOL: [field.TYPE_BOOL],
                Kind.STRING: [field.TYPE_STRING],
                Kind.BYTES: [field.TYPE_BYTES],
            }
            assert isinstance(kind, Kind)
            assert field.type in of[kind], f"{official.name}.{name}"


def test_every_field_has_the_name_number_and_type_of_the_official_schema() -> None:
    compare(COMMAND, schema.Command.DESCRIPTOR, set())
    compare(REPLY, schema.Reply.DESCRIPTOR, set())
    compare(EMULATION_REQUEST, schema.EmulationRequest.DESCRIPTOR, set())


def test_every_method_is_in_the_schema_both_ways() -> None:
    assert {*COMMAND.by_name} == {"id", *METHODS}
    assert {*METHODS} - {"send"} <= {*REPLY.by_name}


# what is written


@given(texts, texts, payloads, st.none() | infos, offsets, tags, st.integers(0, 2**62))
def test_a_publication_is_a_push(
    name: str,
    topic: str,
    data: bytes,
    info: ClientInfo | None,
    offset: int,
    tags: dict[str, str] | None,
    time: int,
) -> None:
    publication = Publication(topic, data, info, offset, time, tags, True)
    pub = schema.Publication(data=data, offset=offset, time=time, tags=tags)
    if info is not None:
        pub.info.CopyFrom(shown(info))
    if name != topic:
        pub.channel = topic
        pub.tags["topic"] = topic
    expected = schema.Reply(push=schema.Push(channel=name, pub=pub))
    # Twice: the second time a publisher's info is remembered.
    for _ in range(2):
        assert read(CENTRIFUGE_PROTOBUF.publication(name, publication)) == expected


@pytest.mark.parametrize("size", [0, 1, 127, 128, 2047, 2048, 16383, 16384, 2**20])
def test_lengths_of_any_size(size: int) -> None:
    data = b"x" * size
    push = read(CENTRIFUGE_PROTOBUF.publication("t" * min(size, 5000), Publication("t", data)))
    assert push.push.pub.data == data


@given(texts, infos, st.integers(0, 2**32 - 1), texts, payloads)
def test_the_other_pushes(
    topic: str, info: ClientInfo, code: int, reason: str, data: bytes
) -> None:
    codec = CENTRIFUGE_PROTOBUF
    Push = schema.Push  # noqa: N806

    def push(**fields: Any) -> Any:
        return schema.Reply(push=Push(**fields))

    assert read(codec.join(topic, info)) == push(channel=topic, join=schema.Join(info=shown(info)))
    assert read(codec.leave(topic, info)) == push(
        channel=topic, leave=schema.Leave(info=shown(info))
    )
    assert read(codec.unsubscribe(topic, code, reason)) == push(
        channel=topic, unsubscribe=schema.Unsubscribe(code=code, reason=reason)
    )
    assert read(codec.disconnect(code, reason)) == push(
        disconnect=schema.Disconnect(code=code, reason=reason)
    )
    assert read(codec.message(data)) == push(message=schema.Message(data=data))
    told = {"recoverable": True, "positioned": True, "epoch": reason, "offset": code, "data": data}
    assert read(codec.subscribe(topic, told)) == push(
        channel=topic, subscribe=schema.Subscribe(**told)
    )
    expiry = schema.Refresh(expires=code > 0, ttl=code)
    assert read(codec.refresh(code)) == push(refresh=expiry)


@given(texts, infos, st.integers(0, 2**32 - 1), st.integers(0, 2**20))
def test_a_disconnect_is_told_by_its_first_bytes(
    topic: str, info: ClientInfo, code: int, size: int
) -> None:
    codec = CENTRIFUGE_PROTOBUF
    assert is_disconnect(payload_of(codec.disconnect(code, "x" * size))[:12])
    others = [codec.ping(), codec.join(topic, info), codec.unsubscribe(topic, code, "")]
    others += [codec.message(b"x" * size), codec.refresh(code)]
    others.append(codec.publication(topic, Publication(topic, b"Z" * size)))
    others.append(codec.frame([codec.reply(code, "rpc", {"data": b"Z" * size})]))
    others.append(codec.frame([codec.reply(code, "history", {"epoch": "x"})]))  # field 11 as well
    for other in others:
        assert not is_disconnect(payload_of(other)[:12])
    assert not any(is_disconnect(odd) for odd in (b"", b"\x80", b"\xff" * 12, b"\x03\x22\x80"))


def test_a_tag_cannot_say_that_a_publication_is_of_another_topic() -> None:
    publication = Publication("news.a", b"1", tags={"topic": "other", "k": "v"})
    push = read(CENTRIFUGE_PROTOBUF.publication("news.*", publication)).push
    assert dict(push.pub.tags) == {"topic": "news.a", "k": "v"}


def test_a_field_that_is_zero_is_left_out() -> None:
    stats = CENTRIFUGE_PROTOBUF.reply(1, "presence_stats", {"num_clients": 0, "num_users": 0})
    assert stats == b"\x04\x08\x01\x52\x00"


def test_a_ping_is_an_empty_reply() -> None:
    assert payload_of(CENTRIFUGE_PROTOBUF.ping()) == b"\x00"


def test_replies_share_a_frame() -> None:
    codec = CENTRIFUGE_PROTOBUF
    replies = [codec.reply(1, "publish", {}), codec.error(2, 100, "internal", True)]
    assert read_all(payload_of(codec.frame(replies))) == [
        schema.Reply(id=1, publish=schema.PublishResult()),
        schema.Reply(id=2, error=schema.Error(code=100, message="internal", temporary=True)),
    ]


@given(
    st.lists(st.tuples(payloads, st.none() | infos, tags), max_size=3), texts, st.booleans(), infos
)
def test_results_with_everything_in_them(
    kept: list[tuple[bytes, ClientInfo | None, dict[str, str] | None]],
    epoch: str,
    recovered: bool,
    somebody: ClientInfo,
) -> None:
    codec = CENTRIFUGE_PROTOBUF
    publications = [
        Publication("news", data, info, offset, 0, tags, True)
        for offset, (data, info, tags) in enumerate(kept, 5)
    ]
    listed = [
        schema.Publication(data=p.data, info=p.info and shown(p.info), offset=p.offset, tags=p.tags)
        for p in publications
    ]
    stream = codec.stream(publications, Position(9, epoch))
    flags = {"recoverable": True, "positioned": True, "was_recovering": True}
    result = {**flags, "recovered": recovered, "expires": True, "ttl": 7, "data": b"\xff"}
    replies = [
        codec.reply(1, "history", stream),
        codec.reply(2, "subscribe", {**result, **stream}),
        codec.reply(3, "connect", {"client": "7", "pong": True, "subs": {"a": stream, "b": {}}}),
        codec.reply(4, "presence", codec.presence({somebody.client: somebody})),
        codec.reply(5, "presence_stats", {"num_clients": 2, "num_users": 0}),
        codec.reply(6, "rpc", {"data": b"\x00"}),
        codec.reply(7, "refresh", {"client": "7", "version": "1", "expires": True, "ttl": 60}),
        codec.reply(8, "sub_refresh", {"expires": True, "ttl": 60}),
        codec.reply(9, "unsubscribe", {}),
    ]
    official = {"publications": listed, "offset": 9, "epoch": epoch}
    subs = {"a": schema.SubscribeResult(**official), "b": schema.SubscribeResult()}
    assert read_all(payload_of(codec.frame(replies))) == [
        schema.Reply(id=1, history=schema.HistoryResult(**official)),
        schema.Reply(id=2, subscribe=schema.SubscribeResult(**{**result, **official})),
        schema.Reply(id=3, connect=schema.ConnectResult(client="7", pong=True, subs=subs)),
        schema.Reply(
            id=4, presence=schema.PresenceResult(presence={somebody.client: shown(somebody)})
        ),
        schema.Reply(id=5, presence_stats=schema.PresenceStatsResult(num_clients=2)),
        schema.Reply(id=6, rpc=schema.RPCResult(data=b"\x00")),
        schema.Reply(
            id=7, refresh=schema.RefreshResult(client="7", version="1", expires=True, ttl=60)
        ),
        schema.Reply(id=8, sub_refresh=schema.SubRefreshResult(expires=True, ttl=60)),
        schema.Reply(id=9, unsubscribe=schema.UnsubscribeResult()),
    ]


# what is read

filters = st.recursive(
    st.builds(schema.FilterNode, key=texts, cmp=texts, val=texts, vals=st.lists(texts, max_size=3)),
    lambda inner: st.builds(schema.FilterNode, op=texts, nodes=st.lists(inner, max_size=3)),
    max_leaves=5,
)
flags = st.integers(-(2**63), 2**63 - 1)
subscribes = st.builds(
    schema.SubscribeRequest,
    channel=texts,
    token=texts,
    recover=st.booleans(),
    epoch=texts,
    offset=offsets,
    data=payloads,
    positioned=st.booleans(),
    recoverable=st.booleans(),
    join_leave=st.booleans(),
    delta=texts,
    tf=st.none() | filters,
    flag=flags,
)
requests = {
    "connect": st.builds(
        schema.ConnectRequest,
        token=texts,
        data=payloads,
        subs=st.dictionaries(texts, subscribes, max_size=2),
        name=texts,
        version=texts,
        headers=st.dictionaries(texts, texts, max_size=2),
        flag=flags,
    ),
    "subscribe": subscribes,
    "unsubscribe": st.builds(schema.UnsubscribeRequest, channel=texts),
    "publish": st.builds(schema.PublishRequest, channel=texts, data=payloads),
    "presence": st.builds(schema.PresenceRequest, channel=texts),
    "presence_stats": st.builds(schema.PresenceStatsRequest, channel=texts),
    "history": st.builds(
        schema.HistoryRequest,
        channel=texts,
        limit=st.integers(-(2**31), 2**31 - 1),
        since=st.none() | st.builds(schema.StreamPosition, offset=offsets, epoch=texts),
        reverse=st.booleans(),
    ),
    "send": st.builds(schema.SendRequest, data=payloads),
    "rpc": st.builds(schema.RPCRequest, data=payloads, method=texts),
    "refresh": st.builds(schema.RefreshRequest, token=texts),
    "sub_refresh": st.builds(schema.SubRefreshRequest, channel=texts, token=texts),
}
commands = st.one_of(
    *(
        st.builds(schema.Command, id=st.integers(0, 2**32 - 1), **{method: request})
        for method, request in requests.items()
    )
)


def same(ours: Any, official: Any) -> None:
    """Our struct says what the library's message says, field for field."""
    for field in official.DESCRIPTOR.fields:
        if not hasattr(ours, field.name):
            assert field.name == "ping"
            continue
        mine, theirs = getattr(ours, field.name), getattr(official, field.name)
        if field.name in ("subs", "headers"):
            assert mine.keys() == theirs.keys()
            for key in theirs:
                if field.name == "subs":
                    same(mine[key], theirs[key])
                else:
                    assert mine[key] == theirs[key]
        elif field.name == "nodes":
            assert len(mine) == len(theirs)
            for one, other in zip(mine, theirs, strict=True):
                same(one, other)
        elif field.name == "vals":
            assert mine == tuple(theirs)
        elif field.type == field.TYPE_MESSAGE:
            assert (mine is not None) is official.HasField(field.name)
            if mine is not None:
                same(mine, theirs)
        elif field.type == field.TYPE_BYTES:
            assert bytes(mine) == theirs
        else:
            assert mine == theirs
            assert type(mine) is type(theirs)


@given(st.lists(commands, min_size=1, max_size=4))
def test_commands_are_read_as_the_library_writes_them(sent: list[Any]) -> None:
    read = CENTRIFUGE_PROTOBUF.decode(delimited(*sent))
    assert len(read) == len(sent)
    for ours, official in zip(read, sent, strict=True):
        assert isinstance(ours, Command)
        same(ours, official)


@given(texts, texts, payloads)
def test_an_emulation_request_is_read_as_the_library_writes_it(
    node: str, session: str, data: bytes
) -> None:
    sent = schema.EmulationRequest(node=node, session=session, data=data)
    same(read_emulation(sent.SerializeToString()), sent)


@given(st.binary(max_size=60))
def test_any_other_bytes_are_an_emulation_request_or_a_bad_command(body: bytes) -> None:
    try:
        read = read_emulation(body)
    except BadCommand as error:
        assert str(error).isprintable()
    else:
        assert isinstance(read.session, str)


@given(commands)
def test_the_fast_way_reads_a_publish_like_the_slow_one_and_nothing_else(sent: Any) -> None:
    payload = delimited(sent)
    (fast,) = CENTRIFUGE_PROTOBUF.decode_publishes([payload]) or (None,)
    (slow,) = CENTRIFUGE_PROTOBUF.decode(payload)
    if sent.HasField("publish") and sent.publish.channel and sent.publish.data:
        assert fast is not None
    if fast is not None:
        assert slow.publish is not None
        assert (fast.id, fast.publish.channel) == (slow.id, slow.publish.channel)
        assert bytes(fast.publish.data) == bytes(slow.publish.data)
        others = [m for m in METHODS if m != "publish" and getattr(slow, m) is not None]
        assert not others


def test_two_publishes_in_a_message_are_not_taken_for_one() -> None:
    publish = schema.Command(id=1, publish=schema.PublishRequest(channel="a", data=b"1"))
    payload = delimited(publish, publish)
    assert CENTRIFUGE_PROTOBUF.decode_publishes([payload]) is None
    assert len(CENTRIFUGE_PROTOBUF.decode(payload)) == 2


def test_the_fast_way_leaves_what_is_odd_to_the_slow_one() -> None:
    publish = schema.Command(id=1, publish=schema.PublishRequest(channel="a", data=b"1"))
    payload = delimited(publish)
    assert CENTRIFUGE_PROTOBUF.decode_publishes([payload]) is not None
    for size in (payload[0] - 1, payload[0] + 1):
        assert CENTRIFUGE_PROTOBUF.decode_publishes([bytes((size,)) + payload[1:]]) is None
    # An id of 2^32.
    body = b"\x08\x80\x80\x80\x80\x10" + payload[3:]
    assert CENTRIFUGE_PROTOBUF.decode_publishes([bytes((len(body),)) + body]) is None


def test_unknown_fields_are_skipped() -> None:
    unknown = b"\xa0\x06\x07" + b"\xa2\x06\x02hi" + b"\xa1\x06" + b"8" * 8 + b"\xa5\x06" + b"4" * 4
    body = b"\x08\x05" + unknown + schema.Command(rpc={"method": "add"}).SerializeToString()
    (command,) = CENTRIFUGE_PROTOBUF.decode(bytes((len(body),)) + body)
    assert command.id == 5
    assert command.rpc is not None
    assert command.rpc.method == "add"


def test_a_known_field_of_another_wire_type_is_unknown() -> None:
    # The id as text, publish as a number: the library ignores both.
    body = b"\x0a\x01x\x38\x01"
    (command,) = CENTRIFUGE_PROTOBUF.decode(b"\x05" + body)
    assert (command.id, command.publish) == (0, None)
    assert schema.Command.FromString(body).id == 0


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\x05",
        b"\x02\x08",
        b"\x80",
        b"\xff" * 11,
        b"\x02\x08\x80",
        b"\x0b\x08" + b"\xff" * 10,
        b"\x06\x08\x80\x80\x80\x80\x10",  # an id of 2^32
        b"\x02\x0b\x0c",  # a group
        b"\x02\x0f\x00",  # wire type 7
        b"\x03\x2a\x05a",  # longer than its message
        b"\x05\xa1\x06123",  # 8 bytes, of which 3 are there
        b"\x05\x2a\x03\x0a\x01\xff",  # a topic that is not UTF-8, and nobody to be told
        b"\x06\x22\x04\x1a\x02\x08\x01",  # not an entry of a map
        b"\x0b\x22\x09\x32\x02\x0a\x05\x0a\x03abc",  # a key longer than its entry
        b"\x0c" + b"\x80" * 10 + b"\x01\x00",  # a field's number of eleven bytes
        b"\x02\x00\x00",  # field 0
        b"\x02\x02\x00",
        b"\x04\x3a\x02\x00\x01",  # in a publish
        b"\x06\x80\x80\x80\x80\x10\x00",  # field 2^29
        b'{"id":1,"connect":{}}',
        "客户端".encode(),
    ],
    ids=repr,
)
def test_a_payload_that_is_no_command_is_described_in_one_line(payload: bytes) -> None:
    assert CENTRIFUGE_PROTOBUF.decode_publishes([payload]) is None
    with pytest.raises(BadCommand) as caught:
        list(CENTRIFUGE_PROTOBUF.decode(payload))
    message = str(caught.value)
    assert message
    assert "\n" not in message
    assert len(message) < 200


def test_the_highest_number_of_a_field_is_one_that_nobody_knows() -> None:
    body = b"\xf8\xff\xff\xff\x0f\x00\x08\x07"
    (command,) = CENTRIFUGE_PROTOBUF.decode(varint(len(body)) + body)
    assert command.id == schema.Command.FromString(body).id == 7


@pytest.mark.parametrize("limit", [2**31, -(2**31) - 1, 2**40, -(2**63)])
def test_a_limit_that_is_no_int32_is_refused(limit: int) -> None:
    history = b"\x38" + varint(limit % 2**64)
    command = b"\x08\x01\x52" + delimited(history)
    with pytest.raises(BadCommand, match="out of range"):
        list(CENTRIFUGE_PROTOBUF.decode(delimited(command)))


@pytest.mark.parametrize("body", [b"\x00\x00", b"\x02\x00", b"\x80\x80\x80\x80\x10\x00"])
def test_fields_that_the_official_library_refuses_are_refused(body: bytes) -> None:
    with pytest.raises(DecodeError):
        schema.Command.FromString(body)
    with pytest.raises(BadCommand, match="the number of a field is 1 to 536870911"):
        list(CENTRIFUGE_PROTOBUF.decode(varint(len(body)) + body))


def test_commands_are_read_one_by_one() -> None:
    commands = CENTRIFUGE_PROTOBUF.decode(b"\x02\x08\x07\x02\x08\x80")
    assert len(commands) == 2
    reading = iter(commands)
    assert next(reading).id == 7
    with pytest.raises(BadCommand, match="cut off"):
        next(reading)


def test_a_message_has_so_many_commands_at_most() -> None:
    assert len(CENTRIFUGE_PROTOBUF.decode(bytes(MAX_COMMANDS))) == MAX_COMMANDS
    with pytest.raises(BadCommand, match="more than 16384 commands"):
        CENTRIFUGE_PROTOBUF.decode(bytes(MAX_COMMANDS + 1))


@pytest.mark.parametrize("body", [b"", b"\x08\x01", b"\x08\x01\x22\x00", b"\x08\x01" * 64], ids=len)
def test_commands_are_found_where_they_are(body: bytes) -> None:
    payload = (varint(len(body)) + body) * 300
    commands = CENTRIFUGE_PROTOBUF.decode(payload)
    assert len(commands) == len(list(commands)) == 300
    assert {command.id for command in commands} == {int(bool(body))}
    for short in range(1, len(body) + 1):
        with pytest.raises(BadCommand, match="a field longer than its message"):
            CENTRIFUGE_PROTOBUF.decode(payload[:-short])


@pytest.mark.parametrize(
    "path, fields, most",
    [
        ((), b"\x08\x01", MAX_FIELDS),
        ((), b"\xa0\x06\x01", MAX_FIELDS),  # nobody knows it
        ((0x22,), b"\x32\x00", MAX_FIELDS - 1),  # a header
        ((0x22,), b"\x1a\x04\x0a\x00\x12\x00", (MAX_FIELDS - 1) // 3),  # a topic
        ((0x2A, 0x6A), b"\x2a\x00", MAX_FIELDS - 2),  # a value of a filter
        ((0x2A, 0x6A), b"\x32\x02\x2a\x00", (MAX_FIELDS - 2) // 2),  # a node, and one of it
    ],
)
def test_a_command_has_so_many_fields_at_most(
    path: tuple[int, ...], fields: bytes, most: int
) -> None:
    for count in (most, most + 1):
        body = fields * count
        for tag in reversed(path):
            body = bytes((tag,)) + varint(len(body)) + body
        commands = CENTRIFUGE_PROTOBUF.decode(varint(len(body)) + body)
        if count > most:
            with pytest.raises(BadCommand, match="more than 16384 fields"):
                list(commands)
        else:
            assert len(list(commands)) == 1


def test_a_filter_nested_too_deeply_is_told() -> None:
    node = b""
    for _ in range(20_000):
        node = b"\x32" + varint(len(node)) + node
    command = schema.Command(id=1)
    command.subscribe.channel = "a"
    body = command.SerializeToString()
    inner = b"\x6a" + varint(len(node)) + node
    subscribe = b"\x2a" + varint(len(inner)) + inner
    with pytest.raises(BadCommand, match="nested"):
        list(CENTRIFUGE_PROTOBUF.decode(varint(len(body + subscribe)) + body + subscribe))


@given(st.binary(max_size=80))
def test_nothing_else_is_raised_by_whatever_comes(payload: bytes) -> None:
    CENTRIFUGE_PROTOBUF.decode_publishes([payload])
    try:
        list(CENTRIFUGE_PROTOBUF.decode(payload))
    except BadCommand:
        pass


@given(commands, st.data())
def test_nor_by_a_command_that_was_tampered_with(sent: Any, data: st.DataObject) -> None:
    payload = bytearray(delimited(sent))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(payload) - 1))
        payload[at] = data.draw(st.integers(0, 255))
    try:
        list(CENTRIFUGE_PROTOBUF.decode(bytes(payload)))
    except BadCommand:
        pass


def test_a_filter_is_the_same_in_both_encodings() -> None:
    node = schema.FilterNode(op="not", nodes=[schema.FilterNode(key="a", cmp="in", vals=["b"])])
    sent = schema.Command(id=1, subscribe=schema.SubscribeRequest(channel="a", tf=node))
    (command,) = CENTRIFUGE_PROTOBUF.decode(delimited(sent))
    assert command.subscribe is not None
    expected = FilterNode(op="not", nodes=(FilterNode(key="a", cmp="in", vals=("b",)),))
    assert command.subscribe.tf == expected


# texts that are not UTF-8: as a JavaScript library writes half of a surrogate pair

HALF = b"\xed\xa0\xbd"


@pytest.mark.parametrize(
    "command, field",
    [
        ({"publish": {"channel": "@@@", "data": b"1"}}, "channel"),
        ({"subscribe": {"channel": "a", "token": "@@@"}}, "token"),
        ({"subscribe": {"channel": "a", "tf": {"vals": ["@@@"]}}}, "vals"),
        ({"connect": {"subs": {"@@@": {}}}}, "subs"),
        ({"connect": {"headers": {"a": "@@@"}}}, "headers"),
        ({"rpc": {"method": "@@@"}}, "method"),
        ({"history": {"since": {"epoch": "@@@"}}}, "epoch"),
    ],
)
@pytest.mark.parametrize("text", [HALF, b"\xff\xfe\xfd"], ids=["half", "latin"])
def test_a_text_that_is_not_utf_8_refuses_its_command_alone(
    text: bytes, command: dict[str, Any], field: str
) -> None:
    good = schema.Command(id=1, publish=schema.PublishRequest(channel="a", data=b"1"))
    bad = schema.Command(id=7, **command)
    payload = delimited(good, bad, good).replace(b"@@@", text)
    first, found, last = CENTRIFUGE_PROTOBUF.decode(payload)
    assert isinstance(found, FaultyCommand)
    assert found.id == 7
    assert found.fault.startswith(f"{field}: ")
    assert found.fault.endswith(", so not UTF-8")
    (method,) = command
    assert [m for m in METHODS if getattr(found, m) is not None] == [method]
    for other in (first, last):
        assert not isinstance(other, FaultyCommand)
        assert other.publish is not None


def test_a_payload_is_any_bytes_and_stays_so() -> None:
    for data in (HALF, rb'"\ud83d"', b"null", b"\xff"):
        sent = schema.Command(id=1, publish=schema.PublishRequest(channel="a", data=data))
        (command,) = CENTRIFUGE_PROTOBUF.decode(delimited(sent))
        assert command.publish is not None
        assert bytes(command.publish.data) == data


def test_an_emulation_request_names_its_session_in_utf_8() -> None:
    with pytest.raises(BadCommand, match=r"^session: .*, so not UTF-8$"):
        read_emulation(b"\x12\x03" + HALF)
