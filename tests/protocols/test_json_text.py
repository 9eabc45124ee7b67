"""JSON as bytes: checked, brought onto one line, made from values."""

import json
from base64 import b64encode
from datetime import date

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.protocols.commands import BadCommand
from broker.protocols.json_text import (
    check_json,
    is_json_line,
    one_line,
    opaque_json,
    to_json,
    written,
)

any_text = st.text(st.characters() | st.characters(categories=["Cs"]), max_size=8)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | any_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(any_text, inner, max_size=3),
    max_leaves=8,
)


def clean(value: object) -> object:
    """A value without halves of surrogate pairs."""
    if isinstance(value, str):
        return "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in value)
    if isinstance(value, list):
        return [clean(inner) for inner in value]
    if isinstance(value, dict):
        return {clean(name): clean(inner) for name, inner in value.items()}
    return value


@pytest.mark.parametrize(
    "value",
    [
        msgspec.Raw(b'{\n "a": [1,\r\n2],\n "b": "x\\ny"}'),
        [msgspec.Raw(b"{\n}")],
        {"a": msgspec.Raw(b"\n1\n")},
    ],
)
def test_ready_json_of_an_app_has_no_line_ends_when_it_goes_out(value: object) -> None:
    written = to_json(value)
    assert b"\n" not in written
    assert json.loads(written) == json.loads(msgspec.json.encode(value))


@pytest.mark.parametrize(
    "value",
    [{1, 2}, frozenset(), [{1}], ({1},), {"a": {"b": [1, {2}]}}, {"a": 1, "b": frozenset("x")}],
)
def test_a_set_is_a_type_error_wherever_it_lies(value: object) -> None:
    with pytest.raises(TypeError, match="a set has no order"):
        to_json(value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ([1, (2, {"a": [None]})], b'[1,[2,{"a":[null]}]]'),
        (date(2026, 1, 2), b'"2026-01-02"'),
        (float("inf"), b"null"),
    ],
)
def test_what_msgspec_can_say_goes_as_it_says_it(value: object, text: bytes) -> None:
    assert to_json(value) == text


def test_a_value_that_json_cannot_say_is_a_type_error() -> None:
    for value in (object(), {1, object()}, {(1, 2): 3}):
        for ask in (to_json, written):
            with pytest.raises(TypeError):
                ask(value)


@pytest.mark.parametrize("value", ["\ud83d", {"\ude00": 1}, [["a\udfff"]], ("\ud800",)])
def test_text_that_is_not_unicode_is_a_value_error_for_an_app(value: object) -> None:
    with pytest.raises(ValueError, match="surrogates not allowed"):
        to_json(value)


@given(json_values)
def test_a_reply_is_written_whatever_text_is_in_it(value: object) -> None:
    # The way through JSON joins two halves that fit, as every reader does.
    value = json.loads(json.dumps(value))
    assert json.loads(written(value)) == clean(value)


def test_ready_json_beside_such_a_text_stays_as_it_is() -> None:
    value = {"a\ud83d": msgspec.Raw(b'{"x":1e999}'), "b": ["\ud83d", msgspec.Raw(b"1.0")]}
    assert written(value) == '{"a\ufffd":{"x":1e999},"b":["\ufffd",1.0]}'.encode()


@given(json_values, st.none() | st.integers(0, 2), st.booleans())
def test_json_is_checked_and_in_one_line(
    value: object, indent: int | None, ascii_only: bool
) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    try:
        data = text.encode()
    except UnicodeEncodeError:
        return  # no bytes that anybody could send
    checked = check_json(data)
    assert json.loads(checked) == clean(json.loads(data))
    assert b"\n" not in checked
    msgspec.json.format(checked)  # which takes no halves
    assert is_json_line(data) is (checked is data)
    assert opaque_json(data) == checked


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"nul", b"{", b'{"a":1} {}', b'"\xff"', b"[" * 10_000, b"1,", b"'a'", b'"\n"'),
        *(b"NaN", b'"\xed\xa0\x80"', rb'"\ud83"', rb'["\ud83d",]', b"\xef\xbb\xbf1"),
    ],
)
def test_bytes_that_are_not_one_json_value_are_told_and_go_as_base64(data: bytes) -> None:
    with pytest.raises(BadCommand):
        check_json(data)
    assert not is_json_line(data)
    assert opaque_json(data) == b'"' + b64encode(data) + b'"'


@pytest.mark.parametrize("data", [rb'"\ud83d"', rb'{"a":["\ude00x"]}', rb'{"\ud83d":1}'])
def test_half_a_surrogate_pair_is_json_and_never_base64(data: bytes) -> None:
    mended = data.replace(rb"\ud83d", rb"\ufffd").replace(rb"\ude00", rb"\ufffd")
    assert check_json(data) == opaque_json(data) == mended
    assert not is_json_line(data)
    assert is_json_line(mended)


def test_line_ends_go_and_all_else_stays() -> None:
    assert one_line(b'{"a": 1.0}') == b'{"a": 1.0}'
    assert one_line(b'{"a":\n1.0}') == b'{"a":1.0}'
