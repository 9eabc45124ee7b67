"""Which publications a subscriber wants, judged by their tags (the protocol's field `tf`).

A filter is a tree: its leaves compare one tag, the other nodes join or negate. By example::

    {"key": "ticker", "cmp": "eq", "val": "AAPL"}
    {"op": "and", "nodes": [{"key": "price", "cmp": "gte", "val": "100"}, …]}
    {"op": "xor", "nodes": []}                       invalid: no such operation
    {"key": "price", "cmp": "gt", "val": "much"}     invalid: not a number

What each comparison means is taken from Centrifuge (`internal/filter`): a tag that is not there is
not equal to anything, in no set but one that has "", and neither less nor more than a number.

A filter comes as a tree of `FilterNode`, and is compiled once, when somebody subscribes with it;
`matches` is the definition, for tests and for single checks.
"""

from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from operator import ge, gt, le, lt
from typing import Final, TypeAlias

import msgspec

from broker.core.shares import text_bytes

MAX_NODES: Final = 100
"""A filter is looked at for each publication, so its size is everybody's time."""

MAX_VALUES: Final = 1000
"""In all the lists of a filter together. A list is one look-up however long it is, so this bounds
its memory."""

MAX_BYTES: Final = 65_536
"""The texts of a filter together: `MAX_VALUES` of 64 bytes. It is kept for as long as a subscription."""

MAX_DEPTH: Final = 16

MAX_DIGITS: Final = 40
"""Of a number with sign and point; what is longer is no number."""

FILTER_BYTES: Final = 256
"""One compiled filter besides its nodes: 240 bytes, as tracemalloc counts them on CPython 3.11."""

NODE_BYTES: Final = 928
"""One node besides its texts: up to 912 bytes for the node as it came, its closure, its key and a
number, measured alike."""

VALUE_BYTES: Final = 160
"""One text in a list besides its characters: 49 bytes for the text and up to 100 for its places in
the list and in the set."""

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
Equality: TypeAlias = tuple[str, frozenset[str]]

# A publication's number is read once, however many filters compare it.
_number_of: Final = lru_cache(CACHED_NUMBERS)(_number)


class CompiledFilter:
    """A filter, ready for many publications. Equal ones are equal and hash alike, at once.

    Filters are equal if they differ in no more than the order of nodes and values.
    """

    __slots__ = ("_hash", "_key", "_test", "_untagged", "bytes", "cost", "equality", "nodes")

    nodes: int
    """How many it has."""
    bytes: int
    """At most what it keeps in memory."""
    cost: int
    """How many comparisons of a tag one `matches` makes at most, about 0.1 µs each; one with a
    number, or for a part of a text, counts twice."""
    equality: Equality | None
    """A tag, and the values of which it must have one for anything to match. None where there is no
    such tag. So a publication need not be shown to filters that ask for other values."""

    def __init__(self, node: FilterNode) -> None:
        """Compile a filter as it came. Raises `ValueError` as `check_filter` does."""
        check_filter(node)
        self.nodes, size, self.cost = _measure(node)
        self.bytes = FILTER_BYTES + size
        self._key, self._test = _compile(node)
        self.equality = _equality(node)
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
        return f"<CompiledFilter nodes={self.nodes} equality={self.equality!r}>"


def _measure(node: FilterNode) -> tuple[int, int, int]:
    """Nodes, bytes and cost. Values that stand twice are counted twice."""
    texts = sum(map(text_bytes, (node.key, node.val, *node.vals)))
    size = NODE_BYTES + VALUE_BYTES * len(node.vals) + texts
    if not node.op:
        return 1, size, 2 if node.cmp in _NUMERIC or node.cmp in ("sw", "ew", "ct") else 1
    below = [_measure(inner) for inner in node.nodes]
    nodes, sizes, costs = (sum(each) for each in zip(*below, strict=True))
    return 1 + nodes, size + sizes, costs


def _equality(node: FilterNode) -> Equality | None:
    match node.op, node.cmp:
        case "", "eq":
            return node.key, frozenset((node.val,))
        case "", "in" if "" not in node.vals:  # which is what a tag counts as that is not there
            return node.key, frozenset(node.vals)
        case "and", _:
            found = [each for each in map(_equality, node.nodes) if each is not None]
            return min(found, key=lambda each: len(each[1]), default=None)
        case "or", _:
            every = [_equality(inner) for inner in node.nodes]
            values: set[str] = set()
            for each in every:
                if each is None or every[0] is None or each[0] != every[0][0]:
                    return None
                values |= each[1]
            return None if every[0] is None else (every[0][0], frozenset(values))
    return None


def _compile(node: FilterNode) -> tuple[Key, Test]:
    """The filter as a key that tells it from others, and as a function."""
    if not node.op:
        return _compile_leaf(node)
    keys, tests = zip(*map(_compile, node.nodes), strict=True)
    if node.op == "not":
        return ("not", keys[0]), _not(tests[0])
    # A node that stands twice is asked once.
    distinct = tuple(dict(zip(keys, tests, strict=True)).values())
    if len(distinct) == 1:
        return keys[0], distinct[0]
    return (node.op, frozenset(keys)), (_all if node.op == "and" else _any)(distinct)


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


def _compile_leaf(node: FilterNode) -> tuple[Key, Test]:
    key, cmp, val, vals = node.key, node.cmp, node.val, frozenset(node.vals)
    match cmp:
        case "eq":
            return (cmp, key, val), lambda tags: tags.get(key) == val
        case "neq":
            return (cmp, key, val), lambda tags: tags.get(key) != val
        case "in":
            return (cmp, key, vals), lambda tags: tags.get(key, "") in vals
        case "nin":
            return (cmp, key, vals), lambda tags: tags.get(key, "") not in vals
        case "ex":
            return (cmp, key), lambda tags: key in tags
        case "nex":
            return (cmp, key), lambda tags: key not in tags
        case "sw":
            return (cmp, key, val), lambda tags: key in tags and tags[key].startswith(val)
        case "ew":
            return (cmp, key, val), lambda tags: key in tags and tags[key].endswith(val)
        case "ct":
            return (cmp, key, val), lambda tags: key in tags and val in tags[key]
    bound = _number(val)
    assert bound is not None  # it was checked
    return (cmp, key, bound), _numeric(key, _NUMERIC[cmp], bound)


def _numeric(key: str, compare: Callable[[Decimal, Decimal], bool], bound: Decimal) -> Test:
    def test(tags: Tags) -> bool:
        text = tags.get(key)
        # A long text is no number; it is not to be kept for it either.
        if text is None or len(text) > MAX_DIGITS:
            return False
        number = _number_of(text)
        return number is not None and compare(number, bound)

    return test
