"""The plain protocol: what a bare WebSocket gets."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.core.messages import ClientInfo, Publication
from broker.protocols.plain import PLAIN
from broker.transport import frames


def text_of(frame: bytes) -> str:
    header = frames.read_header(frame)
    assert header is not None
    assert (header.fin, header.opcode, header.masked) == (True, frames.TEXT, False)
    assert len(frame) == header.size + header.length
    return frame[header.size :].decode()


@pytest.mark.parametrize(
    "data, arrives",
    [
        (b'"hello"', "hello"),
        (b'""', ""),
        (b'"a\\nb \\"c\\" \\u00e9 \\ud83d\\ude00"', 'a\nb "c" é 😀'),
        ('"服务端"'.encode(), "服务端"),
        (b"7", "7"),
        (b"null", "null"),
        (b'{"a": [1, "b"]}', '{"a": [1, "b"]}'),
        (b'["hello"]', '["hello"]'),
    ],
)
def test_json_arrives_as_it_is_and_a_string_as_its_content(data: bytes, arrives: str) -> None:
    assert text_of(PLAIN.message(data)) == arrives


@given(st.text(st.characters(exclude_categories=["Cs"])), st.booleans())
def test_any_string_arrives_as_itself(text: str, ascii_only: bool) -> None:
    assert text_of(PLAIN.message(json.dumps(text, ensure_ascii=ascii_only).encode())) == text


def test_a_plain_peer_is_told_neither_the_topic_nor_the_sender() -> None:
    publication = Publication("news", b'{"a":1}', ClientInfo("7", "alice"), offset=3)
    assert text_of(PLAIN.publication("news.*", publication)) == '{"a":1}'


@pytest.mark.parametrize("data", [rb'"a\ud83d"', rb'"\ude00a"', rb'["\ud83d"]', b'"a"', b"\xff"])
def test_a_plain_peer_gets_all_that_is_json_as_text_and_all_else_in_binary(data: bytes) -> None:
    frame = PLAIN.publication("t", Publication("t", data, opaque=True))
    try:
        value = json.loads(data)
    except ValueError:
        assert frame == frames.binary_frame(data)
        return
    seen = text_of(frame)
    if isinstance(value, str):
        assert seen == value.replace("\ud83d", "\ufffd").replace("\ude00", "\ufffd")
    else:
        assert json.loads(seen) == ["\ufffd"]


def test_ready_json_of_an_app_may_hold_half_a_pair() -> None:
    assert text_of(PLAIN.message(rb'"a\ud83d"')) == "a\ufffd"
