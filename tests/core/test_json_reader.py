"""JSON that is grammatical, but that a strict decoder refuses: read by the rules of the module."""

import json
import math
from typing import Annotated

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta, Raw, Struct

from broker.core.json_reader import (
    MAX_COMMAS,
    MAX_HALVES,
    MAX_LEVELS,
    MAX_MEMBERS,
    MAX_OBJECTS,
    MAX_REASON,
    AsSent,
    BadJson,
    Json,
    TooDeep,
    members,
    members_of,
    mend,
    mended_text,
    objects,
    one_text,
    read,
    read_strictly,
    value_of,
)

halves = st.characters(categories=["Cs"])
any_text = st.text(st.characters() | halves, max_size=8)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | any_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(any_text, inner, max_size=3),
    max_leaves=8,
)


class Nodes(Struct):
    nodes: list["Nodes"] = []
    payload: Raw = Raw(b"")


class Inner(Struct):
    name: str = ""
    count: Annotated[int, Meta(ge=0)] = 0
    payload: Raw = Raw(b"")


class Outer(Struct):
    key: str
    on: bool = False
    payload: Raw = Raw(b"")
    later: AsSent = Raw(b"")
    inner: Inner | None = None
    by_name: dict[str, Inner] = {}
    labels: dict[str, str] = {}
    raws: dict[str, Raw] = {}
    names: list[str] = []
    inners: tuple[Inner, ...] = ()
    loose: dict[str, object] | None = None
    either: str | list[str] = ""


class Strict(Struct, forbid_unknown_fields=True):
    key: str = ""


class Nested(Struct):
    inner: "Nested | None" = None
    name: str = ""


def plain(value: object) -> object:
    """A struct as what JSON can say; payloads as bytes."""
    if isinstance(value, Raw):
        return bytes(value)
    if isinstance(value, Struct):
        return {name: plain(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value


def with_halves_replaced(value: object) -> object:
    """As a value should be seen, found without the code under test."""
    if isinstance(value, str):
        return "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in joined(value))
    if isinstance(value, list):
        return [with_halves_replaced(inner) for inner in value]
    if isinstance(value, dict):
        return {
            str(with_halves_replaced(name)): with_halves_replaced(inner)
            for name, inner in value.items()
        }
    return value


def joined(text: str) -> str:
    """Two halves that fit are one character, for everybody who reads JSON."""
    found: str = json.loads(json.dumps(text))
    return found


# halves of surrogate pairs


@pytest.mark.parametrize(
    "sent, mended",
    [
        (rb'"\ud83d"', rb'"\ufffd"'),
        (rb'"\uDC00"', rb'"\ufffd"'),
        (rb'"\udbff\uD800"', rb'"\ufffd\ufffd"'),
        (rb'"\ude00\ud83d"', rb'"\ufffd\ufffd"'),
        (rb'"\ud83d\ude00"', rb'"\ud83d\ude00"'),
        (rb'"\ud83d\ud83d\ude00"', rb'"\ufffd\ud83d\ude00"'),
        (rb'"\ud83d\ude00\ude00"', rb'"\ud83d\ude00\ufffd"'),
        (rb'"\ud83d\u0041"', rb'"\ufffd\u0041"'),
        (rb'"\ud83dx\ude00"', rb'"\ufffdx\ufffd"'),
        (rb'"\\ud83d"', rb'"\\ud83d"'),
        (rb'"\\\ud83d"', rb'"\\\ufffd"'),
        (rb'"\\\\ud83d\\\\\ude00"', rb'"\\\\ud83d\\\\\ufffd"'),
        (rb'"\\ud83d\ude00"', rb'"\\ud83d\ufffd"'),
        (rb'"\n\ud83d"', rb'"\n\ufffd"'),
        (rb'{"\ud83d":["\udfff"]}', rb'{"\ufffd":["\ufffd"]}'),
        (rb'"\ud7ff\ue000\ufffd"', rb'"\ud7ff\ue000\ufffd"'),
    ],
)
def test_half_a_pair_becomes_a_replacement_character(sent: bytes, mended: bytes) -> None:
    assert mend(sent) == mended
    assert msgspec.json.decode(mended) == value_of(sent)


def test_all_else_stays_the_same_object() -> None:
    for data in (b'"a"', rb'"\ud83d\ude00 \\ud83d"', b"", "😀".encode()):
        assert mend(data) is data


@given(json_values)
def test_any_value_can_be_read_strictly_when_it_is_mended(value: object) -> None:
    sent = json.dumps(value).encode()
    mended = mend(sent)
    assert len(mended) == len(sent)
    assert json.loads(msgspec.json.format(mended)) == with_halves_replaced(value)
    assert mend(mended) is mended


@given(any_text)
def test_a_python_text_is_mended_like_the_same_text_in_json(text: str) -> None:
    mended = mended_text(text)
    mended.encode()
    assert mended == with_halves_replaced(text)


def test_a_message_full_of_backslashes_is_mended_in_linear_time() -> None:
    # Quadratic would be minutes.
    for part in (b"\\\\", rb"\n", rb"\\a", rb"\ud83d\ude00"):
        data = b'"' + part * (2**20 // len(part)) + rb'\ud83d"'
        assert mend(data).endswith(rb'\ufffd"')


# values


@pytest.mark.parametrize(
    "data, value",
    [
        (b"null", None),
        (rb'["\ud83d", "\ud83d\ude00"]', ["\ufffd", "😀"]),
        (rb'{"\ud83d": 1e999}', {"\ufffd": math.inf}),
        (b"-1e999", -math.inf),
        (b"9" * 4300, int("9" * 4300)),
        (b"9" * 4301, math.inf),
        (b"-" + b"9" * 5000, -math.inf),
        (b"12345678901234567890123", 12345678901234567890123),
        (b'{"a":1,"a":2}', {"a": 2}),
        (rb'"\u0000"', "\0"),
    ],
)
def test_a_value_is_what_python_can_hold_of_it(data: bytes, value: object) -> None:
    assert value_of(data) == value


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b" ", b"nul", b"NaN", b"Infinity", b"-Infinity", b"1 2", b"[1,]", b"\xff", b'"\xff"'),
        *(b'"\xed\xa0\x80"', b"1\x00", b"\xff\xfe1\x00", b"\xef\xbb\xbf1", rb'"\ud83"', rb'"\q"'),
        *(rb'["\ud83d", NaN]', rb'"\ud83d' + b"\n" + b'"', rb'{"\ud83d":1,}', rb'["\ud83d", 01]'),
    ],
)  # fmt: skip
def test_all_else_is_told_in_one_line(data: bytes) -> None:
    for ask in (value_of, one_text):
        with pytest.raises(BadJson, match=r"^not JSON: ") as caught:
            ask(data)
        assert str(caught.value).isprintable()
    with pytest.raises(BadJson, match=r"^not JSON: |no object"):
        read(data, Inner)


@pytest.mark.parametrize("half", [b"1", rb'"\ud83d"', b"1e999"])
def test_a_text_may_be_nested_too_deeply(half: bytes) -> None:
    data = b"[" * 5000 + half + b"]" * 5000
    for ask in (value_of, one_text, lambda data: objects(data, 9)):
        with pytest.raises(TooDeep, match="nested too deeply"):
            ask(data)
    with pytest.raises(TooDeep):
        read(b'{"payload":' + data + b"}", Inner)


@given(st.binary(max_size=40) | any_text.map(lambda text: json.dumps(text)[:-1].encode()))
def test_nothing_else_is_raised_by_whatever_comes(data: bytes) -> None:
    for ask in (
        value_of,
        one_text,
        lambda data: objects(data, 9),
        lambda data: read(data, Outer),
    ):
        try:
            ask(data)
        except BadJson as error:
            assert "\n" not in str(error)


# several objects


def test_objects_are_parted_by_line_ends_and_are_what_was_sent() -> None:
    sent = [
        rb'{"a": "\ud83d"}',
        b"{}",
        b'{\n"a" : [\n{}\n,\n{ "b":\n{\n}\n}\n]\n}',
        rb'{"a":"\\ud83d","}\n{":"}{ } {"}',
    ]
    for between in (b"\n", b" \r\n\n", b"\t\n "):
        for ends in (b"", between):
            cut = objects(ends + between.join(sent) + ends, len(sent))
            found = list(cut)
            assert len(cut) == len(sent)
            assert [text.sent.strip() for text in found] == sent
            assert [text.mended.strip() for text in found] == [mend(each) for each in sent]
            assert [text.is_whole for text in found] == [False, True, True, True]


@given(st.lists(st.dictionaries(any_text, json_values, max_size=3), min_size=1, max_size=9))
def test_objects_are_cut_where_they_end_whatever_is_in_them(sent: list[dict[str, object]]) -> None:
    for indent in (None, 0, 2):
        texts = [json.dumps(each, indent=indent).encode() for each in sent]
        found = objects(b"\n".join(texts), len(sent))
        assert [each.sent for each in found] == texts
        if len(sent) > 1:
            with pytest.raises(BadJson, match=f"more than {len(sent) - 1} objects"):
                objects(b"\n".join(texts), len(sent) - 1)


@pytest.mark.parametrize(
    "data",
    [b"{}{}\n{}", b"{} {}\n", b"{}\n1", b"1\n{}", b"{}\n{", b"{}\nnull\n{}", b"{},\n{}", b"\n"],
)
def test_nothing_but_line_ends_is_between_objects(data: bytes) -> None:
    with pytest.raises(BadJson, match=r"^not JSON: "):
        objects(data, 9)


# structs


@pytest.mark.parametrize(
    "field", ["on", "inner", "by_name", "labels", "raws", "names", "inners", "loose", "either"]
)
def test_null_is_absence(field: str) -> None:
    sent = json.dumps({"key": "k", field: None}).encode()
    assert plain(read(sent, Outer)) == plain(Outer("k"))
    # Also after another value: the last one of a name counts.
    assert plain(read(b'{"on":true,"on":null,"key":"k"}', Outer)) == plain(Outer("k"))


def test_null_is_a_value_of_a_payload() -> None:
    sent = b'{"key":"k","payload":null,"later":null,"raws":{"a":null},"names":null}'
    found = read(sent, Outer)
    assert (bytes(found.payload), bytes(found.later)) == (b"null", b"null")
    assert plain(found.raws) == {"a": b"null"}


def test_null_is_absence_inside_too() -> None:
    sent = {
        "key": "k",
        "inner": {"name": None, "count": None, "payload": [None]},
        "by_name": {"a": None, "b": {"name": None, "count": 2}},
        "labels": {"a": None, "b": "c"},
        "inners": [{"name": None}],
        "unknown": None,
    }
    assert plain(read(json.dumps(sent).encode(), Outer)) == plain(
        Outer(
            "k",
            inner=Inner(payload=Raw(b"[null]")),
            by_name={"b": Inner(count=2)},
            labels={"b": "c"},
            inners=(Inner(),),
        )
    )


@given(st.data())
def test_a_struct_with_nulls_is_the_struct_without_those_fields(data: st.DataObject) -> None:
    inner = st.fixed_dictionaries(
        {}, optional={"name": st.text(max_size=3), "count": st.integers(0, 2**70)}
    )
    sent = data.draw(
        st.fixed_dictionaries(
            {"key": st.text(max_size=3)},
            optional={
                "on": st.booleans(),
                "inner": inner,
                "by_name": st.dictionaries(st.text(max_size=3), inner, max_size=2),
                "labels": st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2),
                "names": st.lists(st.text(max_size=3), max_size=2),
                "either": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=2),
            },
        )
    )
    nulled = data.draw(st.sets(st.sampled_from([*Outer.__struct_fields__, "unknown"])))
    nulled -= {"key", "payload", "later"}
    without = {name: value for name, value in sent.items() if name not in nulled}
    expected = msgspec.json.decode(json.dumps(without), type=Outer)
    # A half beside them makes every member be looked for in what was sent.
    for beside in ({}, {"\ud83d": "\ud83d"}):
        changed = json.dumps({**sent, **dict.fromkeys(nulled), **beside}, indent=data.draw(nones))
        assert plain(read(changed.encode(), Outer)) == plain(expected)


nones = st.none() | st.integers(0, 3)


@given(json_values, json_values, nones)
def test_payloads_are_mended_or_stay_as_sent(
    one: object, other: object, indent: int | None
) -> None:
    sent = json.dumps({"key": "\u2028", "payload": one, "later": other}, indent=indent).encode()
    found = read(sent, Outer)
    assert value_of(bytes(found.payload)) == with_halves_replaced(one)
    msgspec.json.format(bytes(found.payload))  # which takes no halves
    assert json.loads(bytes(found.later)) == json.loads(json.dumps(other))


HALF = "half of a surrogate pair is no character"


@pytest.mark.parametrize(
    "sent, reason",
    [
        (rb'{"key":"\ud83d"}', f"key: {HALF}"),
        (rb'{"key":"k","inner":{"name":"a\udfff"}}', f"inner.name: {HALF}"),
        (rb'{"key":"k","by_name":{"\ud83d":{}}}', f"by_name: {HALF}"),
        (rb'{"key":"k","by_name":{"a":{"name":"\ud83d"}}}', f"by_name['a'].name: {HALF}"),
        (rb'{"key":"k","labels":{"\ud83d":"a"}}', f"labels: {HALF}"),
        (rb'{"key":"k","labels":{"a":"\ud83d"}}', f"labels['a']: {HALF}"),
        (rb'{"key":"k","raws":{"\ud83d":1}}', f"raws: {HALF}"),
        (rb'{"key":"k","names":["a","\ud83d"]}', f"names: {HALF}"),
        (rb'{"key":"k","inners":[{},{"name":"\ud83d"}]}', f"inners.name: {HALF}"),
        (rb'{"key":"k","loose":{"a":["\ud83d"]}}', f"loose: {HALF}"),
        (rb'{"key":"k","either":["\ud83d"]}', f"either: {HALF}"),
        (rb'{"key":"\ud83d","key":"k"}', "this has a member twice"),
        (rb'{"key":"k","payload":"\ud83d","on":true,"on":null}', "this has a member twice"),
        (rb'{"payload":"\ud83d"}', "key is missing"),
        (b"{}", "key is missing"),
        (b'{"key":null}', "key is missing"),
        (b'{"key":5}', "key: Expected `str`, got `int`"),
        (b'{"key":"k","inner":5}', "inner is no object"),
        (b'{"key":"k","inner":{"count":-1}}', "inner.count: Expected `int` >= 0"),
        (b'{"key":"k","names":5}', "names: Expected `array`, got `int`"),
        (b'{"key":"k","inners":5}', "inners is no list"),
        (b'{"key":"k","names":[null]}', "names: Expected `str`, got `null` - at `$[0]`"),
        (b'{"key":"k","by_name":[]}', "by_name is no object"),
        (b'{"key":"k","by_name":{"a\\n":5}}', "by_name['a\\n'] is no object"),
        (b"[]", "this is no object"),
        (b"null", "this is no object"),
    ],
)
def test_a_field_that_is_wrong_is_named(sent: bytes, reason: str) -> None:
    with pytest.raises(BadJson) as caught:
        read(sent, Outer)
    assert str(caught.value) == reason


def test_a_member_that_is_no_field_is_passed_over_unless_none_may_be() -> None:
    assert read(rb'{"key":null,"\ud83d":1,"b":{}}', Inner) == read(b"{}", Inner)
    assert read(b'{"key":null}', Strict) == Strict()
    with pytest.raises(BadJson, match=r"^'b' is no field$"):
        read(b'{"key":null,"b":1}', Strict)
    with pytest.raises(BadJson, match="is no field"):
        read(rb'{"\ud83d":1}', Strict)


def test_a_reason_is_short_whatever_it_quotes() -> None:
    with pytest.raises(BadJson) as caught:
        read(b'{"by_name":{"' + b"\\u0001" * 10_000 + b'":{"name":5}},"key":"k"}', Outer)
    assert len(str(caught.value)) <= MAX_REASON
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("half", [b"", rb',"payload":"\ud83d"'], ids=["null", "half"])
def test_so_many_members_are_read_one_by_one(half: bytes) -> None:
    others = 3 + bool(half)
    for count in (MAX_MEMBERS - others, MAX_MEMBERS - others + 1):
        names = b",".join(b'"%d":"a"' % number for number in range(count))
        sent = b'{"key":"k","on":null,"labels":{%b}%b}' % (names, half)
        if count + others > MAX_MEMBERS:
            with pytest.raises(BadJson, match="more than 8192 members"):
                read(sent, Outer)
        else:
            assert len(read(sent, Outer).labels) == count


def test_where_few_objects_are_expected_many_are_refused_before_they_are_made() -> None:
    for count in (MAX_OBJECTS - 1, MAX_OBJECTS):
        objects = b",".join([b"{}"] * count)
        sent = b'{"nodes":[%b]}' % objects
        assert len(read(sent, Nodes).nodes) == count
        if count < MAX_OBJECTS:
            assert len(read(sent, Nodes, few=True).nodes) == count
        else:
            with pytest.raises(BadJson, match="more than 8192 members"):
                read(sent, Nodes, few=True)
        payload = b'{"payload":[%b]}' % objects
        assert bytes(read(payload, Nodes, few=True).payload) == b"[%b]" % objects


def test_a_map_that_is_large_is_refused_before_it_is_made() -> None:
    names = b",".join(b'"%d":""' % number for number in range(MAX_COMMAS + 2))
    with pytest.raises(BadJson, match="more than 8192 members"):
        read(b'{"key":"k","on":null,"labels":{%b}}' % names, Outer)
    payload = b'{"key":"k","on":null,"payload":{%b}}' % names
    assert len(json.loads(bytes(read(payload, Outer).payload))) == MAX_COMMAS + 2


@pytest.mark.parametrize("more", [b"", rb',"payload":"\ud83d"'], ids=["null", "half"])
def test_a_large_text_is_read_as_a_small_one_is(more: bytes) -> None:
    payload = b"[%b]" % b",".join([b"0"] * (MAX_COMMAS + 2))
    large = read(b'{"key":"k","on":null,"later":%b,"labels":{"a":"b"}%b}' % (payload, more), Outer)
    small = read(b'{"key":"k","on":null,"later":[],"labels":{"a":"b"}%b}' % more, Outer)
    assert bytes(large.later) == payload
    assert (large.key, large.labels, large.payload) == (small.key, small.labels, small.payload)


def test_members_that_nobody_asked_for_are_skipped() -> None:
    unknown = b",".join(b'"x%d":0' % number for number in range(MAX_COMMAS + 2))
    assert read(b'{"key":"k","on":null,%b}' % unknown, Outer) == Outer("k")
    with pytest.raises(BadJson, match="more than 8192 members"):
        read(rb'{"key":"k","payload":"\ud83d",%b}' % unknown, Outer)


@pytest.mark.parametrize(
    "sent, reason",
    [
        (b"[%b]", "this is no object"),
        (b'{"key":"k","on":null,"inner":[{%b}]}', "inner is no object"),
    ],
)
def test_the_fault_of_a_large_text_is_told(sent: bytes, reason: str) -> None:
    item = b'"x":0' if b"{" in sent else b"0"
    with pytest.raises(BadJson) as caught:
        read(sent % b",".join([item] * (MAX_COMMAS + 2)), Outer)
    assert str(caught.value) == reason


def test_a_large_text_has_no_field_that_a_strict_struct_has_not() -> None:
    names = b",".join([b'"x":0'] * 100)
    with pytest.raises(BadJson, match="this is no object, or has a field too many"):
        read(b'{"key":"k",%b}' % names, Strict)


def test_so_many_halves_are_told_from_pairs() -> None:
    pairs = rb'{"payload":"%b","key":null}'
    many = pairs % (rb"\ud83d\uDE00" * (MAX_HALVES // 2) + rb"\ud83d")
    with pytest.raises(BadJson, match="more than 32768 escapes of surrogates"):
        read(many, Nodes)
    strictly = many.replace(rb'\ud83d","key":null', b'"')
    assert len(bytes(read(strictly, Nodes).payload)) == 12 * (MAX_HALVES // 2) + 2


def test_the_members_that_a_struct_names() -> None:
    found = members_of(one_text(rb'{"key":1,"key":"\ud83d","other":2}'), Outer)
    assert found == {"key": rb'"\ufffd"'}
    with pytest.raises(BadJson, match="no object"):
        members_of(one_text(b"[]"), Outer)


def test_a_list_of_texts_counts_as_one() -> None:
    sent = b'{"key":"k","on":null,"names":[' + b",".join([b'"a"'] * 2 * MAX_MEMBERS) + b"]}"
    assert len(read(sent, Outer).names) == 2 * MAX_MEMBERS


def test_so_many_levels_are_looked_into() -> None:
    for levels in (MAX_LEVELS, MAX_LEVELS + 1):
        sent = b'{"inner":' * levels + b'{"name":null}' + b"}" * levels
        if levels > MAX_LEVELS:
            with pytest.raises(BadJson, match="is nested more than 20 deep"):
                read(sent, Nested)
        else:
            assert read(sent, Nested).inner is not None


def test_members_are_mended_and_the_last_of_a_name_counts() -> None:
    text = one_text(rb' {"a": 1, "\ud83d" : "\ud83d", "a": [2] } ')
    assert members(text) == {"a": b"[2]", "\ufffd": rb'"\ufffd"'}
    with pytest.raises(BadJson, match="no object"):
        members(Json(b"[]", b"[]"))


pieces_of_json = st.sampled_from(
    [
        *(b"{", b"}", b"[", b"]", b",", b":", b'"', b" ", b"\n", b"1", b"01", b"null", b"true"),
        *(
            b'"key"',
            b'"payload"',
            b'"on"',
            b'"a"',
            b'"\xff"',
            b'"\\ud83d"',
            b'"\xc3\xa9"',
            b"1e999",
        ),
    ]
)
outers = st.fixed_dictionaries(
    {"key": any_text},
    optional={"payload": json_values, "on": st.booleans() | st.none(), "other": json_values},
).map(lambda value: json.dumps(value).encode())


@given(outers | st.lists(pieces_of_json, max_size=12).map(b"".join))
def test_what_is_read_strictly_is_whole_json_and_read_alike(data: bytes) -> None:
    found = read_strictly(data, Outer)
    if found is not None:
        one_text(data)
        assert plain(found) == plain(read(data, Outer))


@pytest.mark.parametrize(
    "data",
    [
        *(b'{"key":"a","payload":"\\ud83d"}', b'{"key":"a","payload":"\xff"}', b'{"key":"\xff"}'),
        *(
            b'{"key":null}',
            b'{"key":5}',
            b'{"key":"a"',
            b'{"key":"a"}x',
            b'{"key":"a","payload":01}',
        ),
        b'{"key":"a","payload":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
def test_what_needs_care_is_not_read_strictly(data: bytes) -> None:
    assert read_strictly(data, Outer) is None


def test_what_is_usual_is_read_strictly() -> None:
    found = read_strictly(b' {"key":"\xc3\xa9","payload":[1 ,\n2],"more":{}}\n', Outer)
    assert found is not None
    assert (found.key, bytes(found.payload)) == ("é", b"[1 ,\n2]")
