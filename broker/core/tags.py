"""Which publications a subscriber wants, judged by their tags (the protocol's field `tf`).

A filter is a tree: its leaves compare one tag, the other nodes join or negate. By example::

    {"key": "ticker", "cmp": "eq", "val": "AAPL"}
    {"op": "and", "nodes": [{"key": "price", "cmp": "gte", "val": "100"}, …]}
    {"op": "xor", "nodes": []}                       invalid: no such operation
    {"key": "price", "cmp": "gt", "val": "much"}     invalid: not a number

Comparisons mean the same as in Centrifuge (`internal/filter`): a tag that is not there is
not equal to anything, in no set but one that has "", and neither less nor more than a number.

A filter comes as a tree of `FilterNode`, and is compiled once, when somebody subscribes with it;
`matches` is the definition, for tests and for single checks.
"""

from collections.abc import Callable, Collection, Mapping
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from operator import ge, gt, le, lt
from typing import Final, NamedTuple, TypeAlias

import attrs
import msgspec

from broker.core.shares import text_bytes
from broker.core.work import FILTER_PART, FILTER_VALUE

MAX_NODES: Final = 100
"""A filter is looked at for each publication, so its size is everybody's time."""

MAX_VALUES: Final = 1000
"""In all the lists of a filter together. A list is one look-up however long it is, so this bounds
its memory."""

MAX_BYTES: Final = 65_536
"""The texts of a filter together: `MAX_VALUES` of 64 bytes. It is kept for as long as a subscription."""

MAX_DEPTH: Final = 16

MAX_DIGITS: Final = 40
"""Of a number with sign and point; a longer text is no number."""

FILTER_BYTES: Final = 256
"""One compiled filter besides its nodes: 240 bytes, as tracemalloc counts them on CPython 3.11."""

NODE_BYTES: Final = 928
"""One node besides its texts: up to 912 bytes for the node as it came, its closure, its key and a
number, measured alike."""

VALUE_BYTES: Final = 160
"""One text in a list besides its characters: 49 bytes for the text and up to 100 for its places in
the list and in the set."""

PLACE_BYTES: Final = 272
"""One value under which a filter is filed in an index (`core.audience_index`), where nobody else asks
for it: 256 bytes, measured alike. With 1,000 values in a list that is the larger part of a filter."""

CACHED_NUMBERS: Final = 1024
"""Numbers in publications' tags that are remembered, at most 40 letters each: 0.2 MB. A publication is
compared with all filters in a row, so even a few would do."""


class FilterNode(msgspec.Struct, frozen=True):
    """One node as it comes over the wire; equal filters are equal and hash alike."""

    op: str = ""
    key: str = ""
    cmp: str = ""
    val: str = ""
    vals: tuple[str, ...] = ()
    nodes: tuple["FilterNode", ...] = ()


def _number(text: str) -> Decimal | None:
    # A Decimal takes 1e999999999 without a murmur, and a comparison may then take for ever.
    if len(text) > MAX_DIGITS or not text.isascii() or "e" in text.lower():
        return None
    try:
        number = Decimal(text)
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


_NUMERIC: Final[dict[str, Callable[[Decimal, Decimal], bool]]] = {
    "lt": lt,
    "lte": le,
    "gt": gt,
    "gte": ge,
}
_TEXTUAL: Final[dict[str, Callable[[FilterNode, str | None], bool]]] = {
    "eq": lambda node, value: value == node.val,
    "neq": lambda node, value: value != node.val,
    "in": lambda node, value: (value or "") in node.vals,
    "nin": lambda node, value: (value or "") not in node.vals,
    "ex": lambda node, value: value is not None,
    "nex": lambda node, value: value is None,
    "sw": lambda node, value: value is not None and value.startswith(node.val),
    "ew": lambda node, value: value is not None and value.endswith(node.val),
    "ct": lambda node, value: value is not None and node.val in value,
}


def weigh_filter(node: FilterNode) -> float:
    """The work of a new filter (`core.work`), which may have yet to be checked."""
    nodes, values = [node], 0
    for each in nodes:
        values += len(each.vals)
        if len(nodes) + len(each.nodes) > MAX_NODES:  # to be refused
            return MAX_NODES * FILTER_PART
        nodes += each.nodes
    return len(nodes) * FILTER_PART + values * FILTER_VALUE


def check_filter(node: FilterNode) -> None:
    """Raise `ValueError`, which says what is wrong, for a filter that could never be meant, and for
    one of more than `MAX_NODES`, `MAX_VALUES`, `MAX_BYTES` or `MAX_DEPTH`."""
    level, count, values, size = [node], 1, 0, 0
    for _ in range(MAX_DEPTH):
        for each in level:
            _check_node(each)
            values += len(each.vals)
            size += sum(map(text_bytes, (each.key, each.val, *each.vals)))
        if values > MAX_VALUES:
            raise ValueError(f"tags filter: more than {MAX_VALUES} values")
        if size > MAX_BYTES:
            raise ValueError(f"tags filter: more than {MAX_BYTES} bytes of texts")
        level = [inner for each in level for inner in each.nodes]
        count += len(level)
        if count > MAX_NODES:
            raise ValueError(f"tags filter: more than {MAX_NODES} nodes")
        if not level:
            return
    raise ValueError(f"tags filter: nested more than {MAX_DEPTH} deep")


def _check_node(node: FilterNode) -> None:
    if node.op == "":
        if not node.key:
            raise ValueError("tags filter: a comparison without a key")
        if node.cmp in _NUMERIC:
            if _number(node.val) is None:
                raise ValueError(f"tags filter: {node.cmp} needs a number, not {node.val[:40]!r}")
        elif node.cmp not in _TEXTUAL:
            raise ValueError(f"tags filter: no comparison {node.cmp[:40]!r}")
        if node.nodes:
            raise ValueError("tags filter: a comparison with nodes below it")
    elif node.op == "not":
        if len(node.nodes) != 1:
            raise ValueError("tags filter: not takes exactly one node")
    elif node.op not in ("and", "or"):
        raise ValueError(f"tags filter: no operation {node.op[:40]!r}")
    elif not node.nodes:
        raise ValueError(f"tags filter: {node.op} without nodes")


def matches(node: FilterNode, tags: Mapping[str, str]) -> bool:
    """Whether `tags` are wanted. `node` has passed `check_filter`."""
    match node.op:
        case "and":
            return all(matches(inner, tags) for inner in node.nodes)
        case "or":
            return any(matches(inner, tags) for inner in node.nodes)
        case "not":
            return not matches(node.nodes[0], tags)
    value = tags.get(node.key)
    textual = _TEXTUAL.get(node.cmp)
    if textual is not None:
        return textual(node, value)
    number, bound = None if value is None else _number(value), _number(node.val)
    return number is not None and bound is not None and _NUMERIC[node.cmp](number, bound)


# compiled

Tags: TypeAlias = Mapping[str, str]
Test: TypeAlias = Callable[[Tags], bool]
Key: TypeAlias = tuple[object, ...]


@attrs.frozen
class Equality:
    """A tag that must have one of some values for anything to match.

    `decides`: that is all that the filter asks for, so one of the values is a match.
    """

    key: str
    values: Collection[str]
    decides: bool


# A publication's number is read once, however many filters compare it.
_number_of: Final = lru_cache(CACHED_NUMBERS)(_number)


class CompiledFilter:
    """A filter, ready for many publications. Equal ones are equal and hash alike, at once.

    Filters are equal if they differ in no more than the order of nodes and values.
    """

    __slots__ = ("_hash", "_key", "_test", "_untagged", "bytes", "equalities", "nodes")

    nodes: int
    """How many it has."""
    bytes: int
    """At most what it keeps in memory, its places in an index among it (`core.audience_index`)."""
    equalities: tuple[Equality, ...]
    """Each of these must hold for anything to match; none where the filter asks for no such thing.
    So a publication need not be shown to filters that ask for other values."""

    def __init__(self, node: FilterNode) -> None:
        """Compile a filter as it came. Raises `ValueError` as `check_filter` does."""
        check_filter(node)
        self.nodes, size = _measure(node)
        self._key, self._test, self.equalities = _compile(node)
        places = max([len(each.values) for each in self.equalities], default=1)
        self.bytes = FILTER_BYTES + size + PLACE_BYTES * places
        self._hash = hash(self._key)
        self._untagged = self._test({})

    def matches(self, tags: Tags | None) -> bool:
        """Whether these tags are wanted. Without any, nothing is compared."""
        return self._test(tags) if tags else self._untagged

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, CompiledFilter):
            return NotImplemented
        return self._hash == other._hash and self._key == other._key

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return f"<CompiledFilter nodes={self.nodes} equalities={self.equalities!r}>"


def _measure(node: FilterNode) -> tuple[int, int]:
    """Nodes and bytes. Values that stand twice are counted twice."""
    texts = sum(map(text_bytes, (node.key, node.val, *node.vals)))
    size = NODE_BYTES + VALUE_BYTES * len(node.vals) + texts
    below = [_measure(inner) for inner in node.nodes]
    return 1 + sum([nodes for nodes, _ in below]), size + sum([sizes for _, sizes in below])


class _Compiled(NamedTuple):
    """A filter as a key that tells it from others, as a function, and what it must find."""

    key: Key
    test: Test
    equalities: tuple[Equality, ...] = ()


def _compile(node: FilterNode) -> _Compiled:
    if not node.op:
        return _compile_leaf(node)
    # A node that stands twice is asked once.
    distinct = {each.key: each for each in map(_compile, node.nodes)}
    first, *others = distinct.values()
    if node.op == "not":
        return _Compiled(("not", first.key), _not(first.test))
    if not others:
        return first
    key = (node.op, frozenset(distinct))
    tests = tuple(each.test for each in distinct.values())
    if node.op == "or":
        return _Compiled(key, _any(tests), _alternatives(first, others))
    found = [equality for each in distinct.values() for equality in each.equalities]
    return _Compiled(key, _all(tests), tuple(attrs.evolve(each, decides=False) for each in found))


def _alternatives(first: _Compiled, others: list[_Compiled]) -> tuple[Equality, ...]:
    """Tags of which each of several nodes must find one of its values: one of all these values."""
    found = []
    for equality in first.equalities:
        key, values, decides = equality.key, set(equality.values), equality.decides
        for other in others:
            same = next((each for each in other.equalities if each.key == key), None)
            if same is None:
                break
            values.update(same.values)
            decides = decides and same.decides
        else:
            found.append(Equality(key, frozenset(values), decides))
    return tuple(found)


def _not(test: Test) -> Test:
    return lambda tags: not test(tags)


def _all(tests: tuple[Test, ...]) -> Test:
    def test(tags: Tags) -> bool:
        # Loops, as `all` and `any` take 0.3 µs before the first test.
        for each in tests:  # noqa: SIM110
            if not each(tags):
                return False
        return True

    return test


def _any(tests: tuple[Test, ...]) -> Test:
    def test(tags: Tags) -> bool:
        for each in tests:  # noqa: SIM110
            if each(tags):
                return True
        return False

    return test


def _compile_leaf(node: FilterNode) -> _Compiled:
    key, cmp, val, vals = node.key, node.cmp, node.val, frozenset(node.vals)
    match cmp:
        case "eq":
            only = Equality(key, (val,), decides=True)
            return _Compiled((cmp, key, val), lambda tags: tags.get(key) == val, (only,))
        case "neq":
            return _Compiled((cmp, key, val), lambda tags: tags.get(key) != val)
        case "in":
            # A tag that is not there counts as "".
            some = () if "" in vals else (Equality(key, vals, decides=True),)
            return _Compiled((cmp, key, vals), lambda tags: tags.get(key, "") in vals, some)
        case "nin":
            return _Compiled((cmp, key, vals), lambda tags: tags.get(key, "") not in vals)
        case "ex":
            return _Compiled((cmp, key), lambda tags: key in tags)
        case "nex":
            return _Compiled((cmp, key), lambda tags: key not in tags)
        case "sw":
            return _Compiled(
                (cmp, key, val), lambda tags: key in tags and tags[key].startswith(val)
            )
        case "ew":
            return _Compiled((cmp, key, val), lambda tags: key in tags and tags[key].endswith(val))
        case "ct":
            return _Compiled((cmp, key, val), lambda tags: key in tags and val in tags[key])
    bound = _number(val)
    assert bound is not None  # it was checked
    return _Compiled((cmp, key, bound), _numeric(key, _NUMERIC[cmp], bound))


def _numeric(key: str, compare: Callable[[Decimal, Decimal], bool], bound: Decimal) -> Test:
    def test(tags: Tags) -> bool:
        text = tags.get(key)
        # A long text is no number; it is not to be kept for it either.
        if text is None or len(text) > MAX_DIGITS:
            return False
        number = _number_of(text)
        return number is not None and compare(number, bound)

    return test
