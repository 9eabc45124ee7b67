"""What operators see of messages in protobuf: all but the secrets, however much of a message there is."""

import centrifuge.protocol.client_pb2 as schema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.protocols.centrifuge_protobuf import COMMAND, REPLY, Message
from broker.protocols.shown_protobuf import FIELDS_MOST, HIDDEN, without_secrets

SECRET = "s3cret-0123456789"
SUB = schema.SubscribeRequest(channel="news", token=SECRET, data=b"{}")

COMMANDS = {
    "connect": schema.Command(id=1, connect={"token": SECRET, "name": "js"}),
    "its topics": schema.Command(id=1, connect={"subs": {"news": SUB}, "version": "1"}),
    "its headers": schema.Command(id=1, connect={"headers": {"authorization": SECRET}}),
    "subscribe": schema.Command(id=1, subscribe=SUB),
    "refresh": schema.Command(id=1, refresh={"token": SECRET}),
    "sub_refresh": schema.Command(id=1, sub_refresh={"channel": "news", "token": SECRET}),
}
REPLIES = {
    "connect": schema.Reply(id=1, connect={"client": "7", "session": SECRET, "node": "one"}),
}
MESSAGES = [(COMMAND, each) for each in COMMANDS.values()]
MESSAGES += [(REPLY, each) for each in REPLIES.values()]
PLAIN = schema.Command(
    id=2, history={"channel": "news", "limit": -1, "since": {"offset": 7, "epoch": "x"}}
)


def framed(*messages: schema.Command | schema.Reply) -> bytes:
    """As one frame has them."""
    frame = b""
    for message in messages:
        data = message.SerializeToString()
        assert len(data) < 128
        frame += bytes((len(data),)) + data
    return frame


@pytest.mark.parametrize(("kind", "message"), MESSAGES)
@pytest.mark.parametrize("behind", [0, 1])
def test_no_part_of_a_secret_is_shown_wherever_the_message_is_cut(
    kind: Message, message: schema.Command, behind: int
) -> None:
    other = PLAIN if kind is COMMAND else schema.Reply(id=2, publish={})
    frame = framed(*[other] * behind, message, other)
    assert SECRET.encode() in frame
    for cut in range(len(frame) + 1):
        shown = without_secrets(frame[:cut], kind)
        assert SECRET[:2].encode() not in shown
    assert HIDDEN in shown
    assert shown.startswith(framed(*[other] * behind)), "what is before it is shown"
    assert shown.endswith(framed(other)), "and what is behind it"


def test_what_has_no_secrets_is_shown_as_it_is() -> None:
    frame = framed(PLAIN, schema.Command(id=3, publish={"channel": "a", "data": b'{"n":1}'}))
    for cut in range(len(frame) + 1):
        shown = without_secrets(frame[:cut], COMMAND)
        assert frame.startswith(shown)
    assert shown == frame
    replies = framed(schema.Reply(push={"channel": "a", "pub": {"data": b"1", "tags": {"k": "v"}}}))
    assert without_secrets(replies, REPLY) == replies


def test_only_so_many_fields_are_looked_at() -> None:
    tiny = b"\x02\x08\x01" * 10 * FIELDS_MOST
    assert len(without_secrets(tiny, COMMAND)) <= 3 * (FIELDS_MOST + 1)


@given(st.binary(max_size=200), st.sampled_from([COMMAND, REPLY]))
def test_anything_else_is_shown_as_far_as_it_can_be_read(data: bytes, kind: Message) -> None:
    shown = without_secrets(data, kind)
    assert HIDDEN in shown or data.startswith(shown)
