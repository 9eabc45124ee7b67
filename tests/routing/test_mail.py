"""The messages between nodes: what is written is read again, also by a node of another version."""

import msgspec
import pytest

from broker.errors import Refused
from broker.routing.mail import (
    Bind,
    Call,
    Disconnect,
    Envelope,
    Note,
    ReportRequest,
    Result,
    read,
    write,
)

ENVELOPES: list[Envelope] = [
    Note(Bind([1, 2], "ann")),
    Note(ReportRequest()),
    Call(7, Disconnect([2**52], 3500, "go")),
    Result(7, b"\x00\xff"),
    Result(8, code=100, message="not now"),
]


@pytest.mark.parametrize("envelope", ENVELOPES, ids=repr)
def test_it_is_read_as_it_was_written(envelope: Envelope) -> None:
    assert read(write(envelope)) == envelope


def test_an_answer_is_a_value_or_a_refusal() -> None:
    assert Result.of(3, b"yes").answer == b"yes"
    answer = Result.of(3, Refused(108, "nowhere")).answer
    assert isinstance(answer, Refused)
    assert (answer.code, answer.message) == (108, "nowhere")
    assert isinstance(Result(3, code=108).answer, Refused), "its code says so, not its words"


def test_a_field_that_a_newer_node_has_added_is_skipped() -> None:
    written = msgspec.msgpack.encode(["note", ["bind", [1], "ann", "later"], "later"])
    assert read(written) == Note(Bind([1], "ann"))


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode(["note"]),
        msgspec.msgpack.encode(["note", ["unheard of", 1]]),
        msgspec.msgpack.encode(["note", ["bind", [1]]]),
        msgspec.msgpack.encode(["note", ["bind", ["1"], "ann"]]),
        write(ENVELOPES[0])[:-1],
    ],
)
def test_any_other_is_a_value_error(message: bytes) -> None:
    with pytest.raises(ValueError):
        read(message)
