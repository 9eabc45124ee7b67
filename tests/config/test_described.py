"""The words about each setting, and its default as a file has it."""

import tomllib
from pathlib import Path

import attrs
import pytest

from broker.config.described import TABLES, described, in_toml


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "true"),
        (5, "5"),
        (12_345, "12_345"),
        (2.5, "2.5"),
        (3.0, "3.0"),
        (float("inf"), "inf"),
        (1e9, "1000000000.0"),
        ((), "[]"),
        (("a", 'b"c'), '["a", "b\\"c"]'),
        (Path("/x"), '"/x"'),
        ("a\\b", '"a\\\\b"'),
    ],
)
def test_a_value_is_written_as_a_file_has_it(value: object, text: str) -> None:
    assert in_toml(value) == text
    read = tomllib.loads(f"x = {text}")["x"]
    expected = list(value) if isinstance(value, tuple) else value
    assert read == (str(expected) if isinstance(expected, Path) else expected)


def test_every_setting_has_words_of_its_own_and_its_default() -> None:
    for table, kind in TABLES.items():
        found = [each for each in described(table) if each.field is not None]
        names = {each.field.name for each in found if each.field is not None}
        tables = {*TABLES, "namespaces", "patterns"}
        assert names == {field.name for field in attrs.fields(kind)} - tables
        assert all(each.words for each in found)
        assert len({each.words for each in found}) == len(found)
        for each in found:
            assert each.field is not None
            assert each.default == getattr(kind(), each.field.name)
