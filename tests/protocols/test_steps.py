"""A command that is dear to read is read in steps, and its price is told as it grows."""

import pytest

from broker.core.json_reader import MAX_COMMAS, PIECE
from broker.core.work import PART, TAKEN_APART
from broker.protocols.centrifuge_json import CENTRIFUGE_JSON
from broker.protocols.centrifuge_protobuf import CENTRIFUGE_PROTOBUF
from broker.protocols.codec import Codec, steps_of
from broker.protocols.commands import FEW_PARTS, FaultyCommand, Unread


def delimited(body: bytes) -> bytes:
    length = len(body)
    head = bytearray()
    while length > 127:
        head.append(length & 127 | 128)
        length >>= 7
    return bytes((*head, length)) + body


def nodes(count: int) -> bytes:
    tf = b'{"nodes":[%b]}' % b",".join([b"{}"] * (count - 6))
    return b'{"id":7,"subscribe":{"channel":"a","epoch":null,"tf":%b}}' % tf


def headers(count: int) -> bytes:
    pairs = b",".join(b'"%d":null' % number for number in range(count - 3))
    return b'{"id":7,"connect":{"headers":{%b}}}' % pairs


def members(count: int) -> bytes:
    return b'{"id":null,"connect":{"subs":{%b}}}' % b",".join(
        b'"%d":{}' % number for number in range(count - 3)
    )


def fields(count: int) -> bytes:
    return delimited(b"\x08\x07" * count)


def topics(count: int) -> bytes:
    return delimited(b"\x08\x07\x22" + delimited(b"\x1a\x04\x0a\x00\x12\x00" * (count // 3)))


def keys(count: int) -> bytes:
    return delimited(b"\x08\x07\x22" + delimited(b"\x1a" + delimited(b"\x0a\x00" * count)))


@pytest.mark.parametrize(
    "codec, write",
    [
        (CENTRIFUGE_JSON, nodes),
        (CENTRIFUGE_JSON, headers),
        (CENTRIFUGE_PROTOBUF, fields),
        (CENTRIFUGE_PROTOBUF, topics),
        (CENTRIFUGE_PROTOBUF, keys),
    ],
)
def test_what_is_dear_to_read_is_read_and_charged_in_steps(codec: Codec, write: object) -> None:
    assert callable(write)
    *steps, command = steps_of(codec.decode(write(3000)))
    assert command.id == 7
    works = [step.work for step in steps if isinstance(step, Unread)]
    assert len(works) == len(steps)
    apart = works.pop(0) if codec is CENTRIFUGE_JSON else 0.0  # before anything is read of it
    assert apart == pytest.approx(3000 * TAKEN_APART if codec is CENTRIFUGE_JSON else 0.0, rel=0.01)
    assert max(works) <= PIECE * PART
    assert sum(works) == pytest.approx(3000 * PART, rel=0.01)
    (again,) = codec.decode(write(3000))
    assert again == command


@pytest.mark.parametrize(
    "codec, write", [(CENTRIFUGE_JSON, headers), (CENTRIFUGE_PROTOBUF, fields)]
)
def test_what_is_small_has_the_price_of_every_command(codec: Codec, write: object) -> None:
    assert callable(write)
    assert len(list(steps_of(codec.decode(write(FEW_PARTS))))) == 1
    assert len(list(steps_of(codec.decode(write(FEW_PARTS + 3))))) == 2


def test_a_command_with_a_fault_is_charged_as_well() -> None:
    sent = headers(1000)[:-3] + b',"x":5}}}'
    *steps, command = steps_of(CENTRIFUGE_JSON.decode(sent))
    assert isinstance(command, FaultyCommand)
    assert sum([step.work for step in steps if isinstance(step, Unread)]) > 900 * PART


def test_members_that_nobody_knows_are_skipped_and_cost_no_more_than_that() -> None:
    more = b",".join(b'"a%d":0' % number for number in range(100_000))
    apart, command = steps_of(CENTRIFUGE_JSON.decode(b'{"epoch":0,"id":7,%b,"rpc":null}' % more))
    assert isinstance(apart, Unread)
    assert apart.work == pytest.approx(MAX_COMMAS * TAKEN_APART)
    assert command.id == 7
