"""The two codecs side by side: the same is written by both, and nothing makes them fail."""

import json
from typing import Any

import centrifuge.protocol.client_pb2 as schema
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.core.messages import ClientInfo, Position, Publication
from broker.protocols.centrifuge_json import CENTRIFUGE_JSON
from broker.protocols.centrifuge_protobuf import CENTRIFUGE_PROTOBUF
from broker.protocols.codec import Codec, PeerCodec, info_fields, shown_tags
from broker.protocols.commands import BadCommand
from broker.protocols.plain import PLAIN
from broker.transport import frames

CODECS: list[Codec] = [CENTRIFUGE_JSON, CENTRIFUGE_PROTOBUF]
PEERS: list[PeerCodec] = [*CODECS, PLAIN]

PATTERN = "news.*"  # longer than any of these
any_text = st.text(st.characters() | st.characters(categories=["Cs"]), max_size=5)


def read(frame: bytes) -> Any:
    """The one reply or push in a frame, as the protocol's names have it; ids apart."""
    header = frames.read_header(frame)
    assert header is not None
    payload = frame[header.size :]
    if header.opcode == frames.TEXT:
        return json.loads(payload)
    size, at = payload[0], 1
    if size > 127:
        size, at = size & 0x7F | payload[1] << 7, 2
    assert len(payload) == at + size
    return plain(schema.Reply.FromString(payload[at:]))


def plain(value: Any) -> Any:
    """A message of the protobuf library as dicts and lists; what is empty is not there."""
    if hasattr(value, "ListFields"):
        return {field.name: plain(inner) for field, inner in value.ListFields()}
    if hasattr(value, "items"):
        return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, str | bytes | int):
        return value
    return [plain(inner) for inner in value]


@pytest.mark.parametrize("codec", PEERS, ids=lambda codec: codec.name)
def test_any_peer_can_be_written_to(codec: PeerCodec) -> None:
    publication = Publication("news", b'{"a":1}', ClientInfo("7"), 3)
    frame = codec.publication("news", publication)
    assert list(codec.publications("news", [publication] * 9)) == [frame] * 9
    head, data, tail = codec.pieces("news.*", publication)
    assert data is publication.data  # so that a thousand names share it
    assert head + data + tail == codec.publication("news.*", publication)
    assert codec.message(b"7")
    assert codec.opaque_payloads is (codec.name == "centrifuge-protobuf")


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
@pytest.mark.parametrize("payload", [b"", b"\n", b"\n\n", b" \r\n\t"], ids=repr)
def test_a_message_with_nothing_in_it_is_a_bad_command(codec: Codec, payload: bytes) -> None:
    with pytest.raises(BadCommand) as caught:
        list(codec.decode(payload))
    if codec is CENTRIFUGE_JSON or not payload:
        assert str(caught.value) == "empty"
    assert codec.decode_publishes([payload]) is None


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
@given(one=any_text, other=any_text)
def test_text_that_is_not_unicode_goes_out_with_a_replacement(
    codec: Codec, one: str, other: str
) -> None:
    # A peer cannot send such a text, but apps name users, topics and reasons too.
    def clean(text: str) -> str:
        return "".join(
            "\ufffd" if "\ud800" <= c <= "\udfff" else c for c in json.loads(json.dumps(text))
        )

    def nonempty(**fields: object) -> dict[str, object]:
        """Protobuf leaves out what is empty."""
        return {name: value for name, value in fields.items() if value}

    info = ClientInfo(one, other)
    shown = nonempty(client=clean(one), user=clean(other))
    stream = codec.stream([Publication("t", b"1", info, 5, 0, {one: other})], Position(9, one))
    frame = codec.frame
    for written, expected in [
        (codec.join(one, info), clean(one)),
        (codec.unsubscribe(one, 2000, other), clean(one)),
        (codec.publication(PATTERN, Publication(one, b"1", info)), PATTERN),
        (codec.publication(one, Publication(one, b"1", info, tags={one: other})), clean(one)),
    ]:
        assert read(written)["push"].get("channel", "") == expected
    told = read(codec.publication(PATTERN, Publication(one, b"1", info, tags={"k": other})))
    assert told["push"]["pub"]["tags"] == {"k": clean(other), "topic": clean(one)}
    assert {k: v for k, v in told["push"]["pub"]["info"].items() if v} == shown
    error = read(frame([codec.error(1, 107, one, False)]))["error"]
    assert {k: v for k, v in error.items() if v} == nonempty(code=107, message=clean(one))
    presence = read(frame([codec.reply(1, "presence", codec.presence({one: info}))]))
    assert list(presence["presence"]["presence"]) == [clean(one)]
    history = read(frame([codec.reply(1, "history", stream)]))["history"]
    assert history["publications"][0]["tags"] == {clean(one): clean(other)}


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
@pytest.mark.parametrize("ids", [[1], [7, 2**32 - 1, 8]])
def test_publishes_are_answered_in_one_frame_as_one_by_one(codec: Codec, ids: list[int]) -> None:
    one_by_one = [codec.reply(each, "publish", {}) for each in ids]
    assert codec.frame(codec.published(ids)) == codec.frame(one_by_one)


def test_a_pattern_s_listeners_are_told_the_topic_in_the_tags() -> None:
    publication = Publication("news.a", b"1", tags={"k": "v", "topic": "x"})
    assert shown_tags("news.a", publication) == {"k": "v", "topic": "x"}
    assert shown_tags("news.*", publication) == {"k": "v", "topic": "news.a"}
    assert shown_tags("news.*", Publication("news.a", b"1")) == {"topic": "news.a"}


def test_an_info_that_is_absent_is_left_out() -> None:
    assert info_fields(ClientInfo("7", "a")) == {"user": "a", "client": "7"}
    assert info_fields(ClientInfo("7", "a", b"1", b"2")) == {
        "user": "a",
        "client": "7",
        "conn_info": msgspec.Raw(b"1"),
        "chan_info": msgspec.Raw(b"2"),
    }
