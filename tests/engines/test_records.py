"""Records: what is written is read again, and nothing else is taken for it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.core.messages import ClientInfo, Publication, Series, data_bytes
from broker.engines.records import (
    BadRecord,
    Batch,
    Begin,
    Forgotten,
    Meta,
    Older,
    Once,
    Record,
    Removed,
    Renewed,
    Run,
    Stands,
    Value,
    decode_meta,
    encode,
    join,
    split,
)

ANN = ClientInfo("7", "ann", b"{}", None)
RECORDS: list[Record] = [
    Begin("a", "e1", 5),
    Run("a", 1_700_000_000_000, 100, 300.0, [Batch([b"1", b"\xff"], None, {"k": "v"}, True)]),
    Run("a", 1, 0, 0.5, [Batch.of((Publication("a", b"2", ANN),))], True, "key", "ann"),
    Removed("a"),
    Forgotten("\u4e2d"),
    Renewed("salt"),
    Value("a", 3, Batch([b"4"])),
    Once("a", "key", None, 5, 0, ""),
    Stands("a", "e1", 7),
    Older("a", "e1", 3, 4, [Run("a", 1, 5, 60.0, [Batch([b"6"])])], True),
]
ROW = join([encode(each) for each in RECORDS])


def test_records_are_read_as_they_were_written() -> None:
    assert list(split(ROW)) == RECORDS
    assert join([]) == b""
    meta = Meta("boot", "process", False, 17)
    assert decode_meta(encode(meta)) == meta


def test_publications_come_back_with_all_but_their_offsets() -> None:
    publications = [
        Publication("a", data, ANN, offset, 0, {"price": "1"}, True)
        for offset, data in enumerate((b"1", b"2"), 1)
    ]
    (record,) = split(join([encode(Run("a", 1, 2, 3.0, [Batch.of(publications)]))]))
    assert isinstance(record, Run)
    back = record.batches[0].publications("a")
    assert [(p.data, p.info, p.tags, p.opaque, p.offset) for p in back] == [
        (p.data, p.info, p.tags, p.opaque, 0) for p in publications
    ]


def test_what_has_no_tags_comes_back_in_one_piece() -> None:
    said = Series("a", [b"1", b"2"], ANN, 7, opaque=True)
    back = Batch.of(said).publications("a")
    assert isinstance(back, Series)
    assert (list(back.contents), back.info, back.first, back.opaque) == ([b"1", b"2"], ANN, 0, True)
    assert back._made is None, "none is made for that"
    assert data_bytes(said) == data_bytes([*said]) == 2


@given(st.integers(0, len(ROW) - 1), st.integers(1, 255))
def test_one_byte_that_has_changed_is_found(place: int, change: int) -> None:
    damaged = bytearray(ROW)
    damaged[place] ^= change
    with pytest.raises(BadRecord):
        list(split(bytes(damaged)))


@given(st.integers(1, len(ROW) - 1))
def test_a_row_that_is_cut_short_is_found(size: int) -> None:
    with pytest.raises(BadRecord):
        list(split(ROW[:size]))


@pytest.mark.parametrize(
    "record",
    [b"", b"\xff", encode(["a", "list"]), encode([99, "of a newer format"]), encode([1, 2, 3])],
)
def test_a_record_that_is_none_is_found(record: bytes) -> None:
    with pytest.raises(BadRecord):
        list(split(join([record])))
    with pytest.raises(BadRecord):
        decode_meta(record)
