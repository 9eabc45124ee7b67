"""Sets are found in whatever msgspec has a way to say, and in nothing else."""

import dataclasses
import enum
from collections import Counter, OrderedDict, defaultdict
from datetime import date
from typing import Any, NamedTuple

import attrs
import msgspec
import pytest

from broker.core.values import check_values


@dataclasses.dataclass
class Data:
    a: Any
    _b: Any = None


@dataclasses.dataclass(slots=True)
class Slots:
    a: Any


@attrs.define
class Attrs:
    a: Any
    _b: Any = None


class Struct(msgspec.Struct):
    a: Any


class Pair(NamedTuple):
    a: Any
    b: Any = 0


class Words(list[Any]): ...


class Few(set[int]): ...


class Colour(enum.Enum):
    RED = "red"


KEPT = [
    lambda inner: [inner],
    lambda inner: (1, inner),
    lambda inner: {"a": {"b": [1, inner]}},
    lambda inner: defaultdict(set, a=inner),
    lambda inner: OrderedDict(a=inner),
    lambda inner: Words([inner]),
    lambda inner: Pair(1, inner),
    Data,
    lambda inner: Data(1, inner),
    Slots,
    Attrs,
    Struct,
    lambda inner: [Data(Struct(Pair({"a": inner})))],
]


@pytest.mark.parametrize("hold", KEPT)
@pytest.mark.parametrize("found", [{1, 2}, frozenset(), Few({1})])
def test_a_set_is_found_in_whatever_holds_it(hold: Any, found: object) -> None:
    value = hold(found)
    # Without us it would go out as a list.
    assert b"[" in msgspec.json.encode(value)
    with pytest.raises(TypeError, match="a set has no order, and JSON no sets: make it a list"):
        check_values(value)


@pytest.mark.parametrize("hold", KEPT)
@pytest.mark.parametrize(
    "fine", [1, "a", None, b"a", [], {}, (), msgspec.Raw(b"{}"), date(2026, 1, 2), Colour.RED]
)
def test_what_is_no_set_passes(hold: Any, fine: object) -> None:
    value = hold(fine)
    check_values(value)
    msgspec.json.encode(value)


@pytest.mark.parametrize("hold", [*KEPT, lambda inner: inner])
@pytest.mark.parametrize(
    "data", [b"NaN", b"[Infinity]", b'{"a":-Infinity}', b"{", b"1 2", b"", b"\xff"]
)
def test_ready_json_that_is_none_is_found(hold: Any, data: bytes) -> None:
    """msgspec would write it as it is."""
    with pytest.raises(ValueError, match="JSON"):
        check_values(hold(msgspec.Raw(data)))


def test_a_field_that_is_not_said_may_hold_a_set() -> None:
    value = Attrs(Counter("a"), {1})
    check_values(value)
    assert msgspec.json.encode(value) == b'{"a":{"a":1}}'


@pytest.mark.parametrize("found", [{1}, frozenset("a"), Few({1})])
def test_a_set_alone_is_found(found: object) -> None:
    with pytest.raises(TypeError):
        check_values(found)
