"""Commands as bytes, and what comes as structs."""

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.client.loss import Lost, TooLarge
from broker.client.wire import MAX_OBJECTS, TAGS_BYTES, Push, encode, read_lines, read_reply
from broker.core.messages import ClientInfo, Publication


def pushed(line: str) -> Push:
    reply = read_reply(line)
    assert reply is not None
    assert reply.push is not None
    return reply.push


def published(line: str) -> Publication:
    pub = pushed(line).pub
    assert pub is not None
    return pub.freeze("news")


def test_a_command_is_one_line_of_json() -> None:
    raw = msgspec.Raw(b'{\n "a": "b\\nc"\n}')
    line = encode({"id": 1, "publish": {"channel": "é", "data": raw}})
    assert b"\n" not in line
    data = json.loads(line)["publish"]["data"]
    assert data == {"a": "b\nc"}


def test_half_a_surrogate_pair_goes_as_its_escape() -> None:
    assert b'"\\ud83d"' in encode({"publish": {"data": ["\ud83d"]}})
    with pytest.raises(TypeError):
        encode({"publish": {"data": ["\ud83d", object()]}})


def test_data_that_json_cannot_hold_is_a_type_error() -> None:
    for data in (object(), {1, 2}, {"a": [frozenset()]}):
        with pytest.raises(TypeError):
            encode({"publish": {"data": data}})


@pytest.mark.parametrize(
    "message, lines",
    [
        ("", []),
        ("\n", []),
        ("a", ["a"]),
        ("a\n", ["a"]),
        ("a\nb", ["a", "b"]),
        ("\n a\r\n\n\tb", ["a", "b"]),
    ],
)
def test_lines_are_what_stands_between_line_ends(message: str, lines: list[str]) -> None:
    assert list(read_lines(message)) == lines


def test_an_empty_object_is_a_ping() -> None:
    assert read_reply("{}") is None
    assert read_reply("{ }") is None


def test_unknown_fields_are_skipped_and_payloads_stay_as_they_came() -> None:
    got = published(
        '{"push":{"new":1,"channel":"a","pub":{"data":{ "n":1.50 },"offset":3,"time":9,"more":[],'
        '"info":{"client":"7","user":"al","conn_info":[ 1 ]},"tags":{"k":"v"}}}}'
    )
    info = ClientInfo("7", "al", b"[ 1 ]")
    assert got == Publication("news", b'{ "n":1.50 }', info, 3, 9, {"k": "v"})


@pytest.mark.parametrize("count, fits", [(MAX_OBJECTS - 2, True), (MAX_OBJECTS + 1, False)])
def test_objects_are_bounded(count: int, fits: bool) -> None:
    line = '{"x":[' + "{}," * (count - 1) + '{}],"push":{}}'
    if fits:
        pushed(line)
    else:
        with pytest.raises(TooLarge, match="more than 500,000 JSON objects"):
            read_reply(line)


def test_tags_are_bounded_and_must_be_texts() -> None:
    line = '{"push":{"pub":{"tags":%s}}}'
    assert published(line % "null").tags is None
    with pytest.raises(TooLarge):
        published(line % json.dumps({"a": "x" * TAGS_BYTES}))
    with pytest.raises(Lost, match="tags"):
        published(line % "[1]")


def test_a_reply_says_which_method_it_answers() -> None:
    reply = read_reply('{"id":1,"publish":{}}')
    assert reply is not None
    assert reply.answers("publish")
    assert not reply.answers("rpc")
    error = read_reply('{"id":1,"error":{"code":100}}')
    assert error is not None
    assert error.answers("rpc")


halves = st.text(
    st.characters(categories=["Cs"]) | st.sampled_from('\\"ud83/\n\u0000') | st.characters()
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | halves,
    lambda inner: st.lists(inner) | st.dictionaries(halves, inner),
    max_leaves=10,
)


@given(values, st.booleans())
def test_any_json_is_a_payload_and_stays_as_it_came(value: object, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(value)  # a half that is not escaped cannot be sent
    for line in (
        f'{{"push":{{"channel":"a","pub":{{"data":{text},"info":{{"conn_info":{text}}}}}}}}}',
        f'{{"push":{{"channel":"a","unknown":{text},"pub":{{"data":{text}}}}}}}',
    ):
        got = published(line)
        assert got.data == text.encode()
        if got.info is not None:
            assert got.info.conn_info == text.encode()


@pytest.mark.parametrize(
    "line",
    [
        r'{"push":{"channel":"\ud83d"}}',
        r'{"push":{"channel":"a","disconnect":{"code":3000,"reason":"\ude00"}}}',
        r'{"id":1,"error":{"message":"\ud83d\ud83d"}}',
        r'{"id":1,"presence":{"presence":{"\ud83d":{}}}}',
        r'{"push":{"channel":"a","pub":{"data":1,"tags":{"a":"\ud83d"}}}}',
    ],
)
def test_half_a_surrogate_pair_in_a_name_or_text_is_no_protocol(line: str) -> None:
    with pytest.raises(Lost):
        published(line)


def test_a_mark_of_ours_that_somebody_else_wrote_is_left_alone() -> None:
    text = r'"\u0000aaaaaaaaaaaaaaaad83d \ud83d"'
    assert published(f'{{"push":{{"pub":{{"data":{text}}}}}}}').data == text.encode()
