"""`broker.config.types`: a value of any source becomes one of its field's, or is refused by name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import attrs
import pytest

from broker.config.types import typed


@attrs.frozen
class Table:
    size: int = 1


@pytest.mark.parametrize(
    "hint, value, result",
    [
        (int, 7, 7),
        (float, 7, 7.0),
        (float, 0.5, 0.5),
        (bool, True, True),
        (str, "a", "a"),
        (Path, "a/b", Path("a/b")),
        (int | None, None, None),
        (int | Literal["clock"], "clock", "clock"),
        (int | Literal["clock"], 3, 3),
        (tuple[str, ...], ["a", "b"], ("a", "b")),
        (tuple[Table, ...], [Table(2)], (Table(2),)),
        (Mapping[str, Table], {"a": Table(2)}, {"a": Table(2)}),
    ],
)
def test_a_value_is_taken_as_its_field_has_it(hint: Any, value: object, result: object) -> None:
    found = typed("size", hint, value)
    assert (found, type(found)) == (result, type(result))


@pytest.mark.parametrize(
    "hint, value, expected",
    [
        (int, "7", "a whole number"),
        (int, True, "a whole number"),
        (int, 7.0, "a whole number"),
        (float, "0.5", "a number"),
        (float, False, "a number"),
        (bool, 1, "true or false"),
        (str, 7, "a string"),
        (Path, 7, "a string with a path"),
        (int | Literal["clock"], "cloc", 'a whole number or "clock"'),
        (int | Literal["clock"], True, 'a whole number or "clock"'),
        (tuple[str, ...], "ab", "a list of strings"),
        (tuple[str, ...], ["a", 1], "a list of strings"),
        (tuple[Table, ...], [{"size": 2}], "a list, of Table"),
        (Mapping[str, Table], {"a": 1}, "a Table for each name"),
        (Mapping[str, Table], {1: Table()}, "a Table for each name"),
    ],
)
def test_another_type_is_refused_with_name_value_and_what_is_expected(
    hint: Any, value: object, expected: str
) -> None:
    with pytest.raises(ValueError) as refusal:
        typed("size", hint, value)
    assert str(refusal.value) == f"size is {value!r}: expected {expected}"


def test_a_secret_is_not_shown_when_it_is_refused() -> None:
    with pytest.raises(ValueError) as refusal:
        typed("api_key", str, 12345678, is_secret=True)
    assert str(refusal.value) == "api_key is int: expected a string"
