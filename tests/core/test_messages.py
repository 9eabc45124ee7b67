"""Messages: what a reader makes of any data that a publisher may send."""

import math

import pytest

from broker.core.messages import Publication, Series, last_offset


@pytest.mark.parametrize(
    "data, value",
    [
        (b'{"a":[1,null]}', {"a": [1, None]}),
        (b"1e999", math.inf),
        (b'{"a":-1e999}', {"a": -math.inf}),
        (rb'"a\ud83d"', "a\ufffd"),
        (rb'{"\ude00":1e999}', {"\ufffd": math.inf}),
        (b'{"a":1,"a":2}', {"a": 2}),
    ],
)
def test_a_reader_sees_all_that_is_json(data: bytes, value: object) -> None:
    assert Publication("t", data).value == value
    assert Publication("t", data, opaque=True).value == value


@pytest.mark.parametrize("data", [b"\xff", b"", b'"\xed\xa0\xbd"', b"NaN", rb'"\ud83"', b"1\x00"])
def test_bytes_that_are_not_json_are_seen_as_bytes(data: bytes) -> None:
    assert Publication("t", data, opaque=True).value == data


def test_data_that_python_cannot_hold_is_a_value_error() -> None:
    for opaque in (False, True):
        publication = Publication("t", b"[" * 5000 + b"]" * 5000, opaque=opaque)
        with pytest.raises(ValueError, match="nested too deeply"):
            _ = publication.value


@pytest.mark.parametrize("first, last", [(0, 0), (1, 3), (7, 9)])
def test_the_last_offset_of_a_series_is_that_of_its_last_publication(first: int, last: int) -> None:
    series = Series("t", [b"1", b"2", b"3"], None, first)
    assert last_offset(series) == last_offset(list(series)) == last
