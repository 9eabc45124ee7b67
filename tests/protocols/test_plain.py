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
