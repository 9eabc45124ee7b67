"""Which publications a subscriber wants, judged by their tags (the protocol's field `tf`).

A filter is a tree: its leaves compare one tag, the other nodes join or negate. By example::

    {"key": "ticker", "cmp": "eq", "val": "AAPL"}
    {"op": "and", "nodes": [{"key": "price", "cmp": "gte", "val": "100"}, …]}
    {"op": "xor", "nodes": []}                       invalid: no such operation
    {"key": "price", "cmp": "gt", "val": "much"}     invalid: not a number

What each comparison means is taken from Centrifuge (`internal/filter`): a tag that is not there is
not equal to anything, in no set but one that has "", and neither less nor more than a number.
"""

from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation
from operator import ge, gt, le, lt
from typing import Final

import msgspec

MAX_NODES: Final = 100
"""A filter is looked at for each publication, so its size is everybody's time."""

MAX_VALUES: Final = 1000
"""In all the lists of a filter together: a thousand are compared in 30 µs."""

MAX_DEPTH: Final = 16


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
    if len(text) > 40 or not text.isascii() or "e" in text.lower():
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
    """Raise `ValueError`, which says what is wrong, for a filter that could never be meant."""
    level, count, values = [node], 1, 0
    for _ in range(MAX_DEPTH):
        for each in level:
            _check_node(each)
            values += len(each.vals)
        if values > MAX_VALUES:
            raise ValueError(f"tags filter: more than {MAX_VALUES} values")
        level = [inner for each in level for inner in each.nodes]
        count += len(level)
        if count > MAX_NODES:
            raise ValueError(f"tags filter: more than {MAX_NODES} nodes")
        if not level:
            return
    raise ValueError(f"tags filter: nested more than {MAX_DEPTH} deep")


def count_nodes(node: FilterNode) -> int:
    """How many nodes a filter has, itself among them; at most `MAX_NODES` once it was checked."""
    return 1 + sum([count_nodes(inner) for inner in node.nodes])


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
