"""What travels: what a reader makes of any data that a publisher may send."""

import math

import pytest

from broker.core.messages import Publication


@pytest.mark.parametrize(
    "data, value",
    [
        (b'{"a":[1,null]}', {"a": [1, None]}),
        (b"1e999", math.inf),
        (b'{"a":-1e999}', {"a": -math.inf}),
    ],
)
def test_a_reader_sees_all_that_is_json(data: bytes, value: object) -> None:
    assert Publication("t", data).value == value


def test_what_python_cannot_hold_is_a_value_error() -> None:
    publication = Publication("t", b"[" * 5000 + b"]" * 5000)
    with pytest.raises(ValueError, match="nested too deeply"):
        _ = publication.value
