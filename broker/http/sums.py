"""The counters of several nodes as those of one broker.

Rules:

1. Counters, numbers of things that are here and histograms are summed. The facts of one node (its name, how
   long it is up) stand with each node, and at the top for the first, which was asked.
2. A sum is of the nodes that have answered. The others stand in the list of nodes with the reason.
3. A user, or a topic, that is on two nodes counts twice.
"""

import heapq
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from broker.errors import Refused
from broker.session.views import Seen

Row = dict[str, Any]

_OWN: Final = ("node", "version", "uptime", "draining")

_KEYS: Final[Mapping[str, tuple[str, ...]]] = {
    "connections_by": ("transport", "protocol"),
    "closed": ("code", "initiator"),
    "hooks": ("hook", "asked"),
}
"""Lists of counters, and which of their fields say what is counted."""

_decode: Final = msgspec.json.Decoder().decode


def whole(seen: Sequence[Seen], rows: int) -> Row:
    """The sums of all nodes that have answered, and in `nodes` each of them; `rows` connections in each list
    of such. Raises `Refused` where none has, with the reason of the first."""
    nodes: list[Row] = []
    heaviest: list[Row] = []
    ended: list[Row] = []
    total: Row | None = None
    for each in seen:
        who = {"node": each.node.name, "id": each.node.id}
        if isinstance(each.answer, Refused):
            nodes.append({**who, "alive": False, "reason": each.answer.message})
            continue
        found: Row = _decode(each.answer)
        heaviest += [{"node": each.node.name, **row} for row in found.pop("heaviest", ())]
        ended += [{"node": each.node.name, **row} for row in found.pop("closed_last", ())]
        nodes.append({**who, "alive": True, **found})
        total = found if total is None else {**_sum(total, found), **_own(total)}
    if total is None:
        raise _first_refusal(seen)
    total = {**total, "nodes": nodes}
    if rows:
        total["heaviest"] = heapq.nlargest(rows, heaviest, key=_weight)
        total["closed_last"] = heapq.nlargest(rows, ended, key=lambda row: row["closed_at"])
    return total


def _own(total: Row) -> Row:
    return {name: total[name] for name in _OWN}


def _weight(row: Row) -> tuple[int, int]:
    return row["bytes_queued"], row["bytes_sent"] + row["bytes_received"]


def _first_refusal(seen: Sequence[Seen]) -> Refused:
    return next(each.answer for each in seen if isinstance(each.answer, Refused))


def _sum(one: Row, other: Row) -> Row:
    if "bounds" in one and "bounds" in other:
        one, other = _on_common_bounds(one, other)
    names = [*one, *(name for name in other if name not in one)]
    return {name: _added(name, one.get(name), other.get(name)) for name in names}


def _added(name: str, one: object, other: object) -> object:
    if one is None or other is None:
        return other if one is None else one
    match one, other:
        case list(), list() if name in _KEYS:
            return _sum_rows(one, other, _KEYS[name])
        case list(), list() if name == "counts":
            return [first + second for first, second in zip(one, other, strict=True)]
        case dict(), dict():
            return _sum(one, other)
        case (bool(), _):
            return one
        case (int() | float(), int() | float()):
            return round(one + other, 6)
    return one


def _sum_rows(one: list[Row], other: list[Row], keys: Sequence[str]) -> list[Row]:
    found = {tuple(row[key] for key in keys): row for row in one}
    for row in other:
        key = tuple(row[each] for each in keys)
        before = found.get(key)
        # A key may be a number, such as a close code, and keys are not summed.
        told = {each: row[each] for each in keys}
        found[key] = row if before is None else {**_sum(before, row), **told}
    return list(found.values())


def _on_common_bounds(one: Row, other: Row) -> tuple[Row, Row]:
    """Two histograms, perhaps of two versions, by the bounds that both have."""
    bounds = [bound for bound in one["bounds"] if bound in other["bounds"]]
    return _with_bounds(one, bounds), _with_bounds(other, bounds)


def _with_bounds(histogram: Row, bounds: list[float]) -> Row:
    counts, place = [0] * (len(bounds) + 1), 0
    for bound, count in zip([*histogram["bounds"], None], histogram["counts"], strict=True):
        counts[place] += count
        if bound in bounds:
            place += 1
    return {**histogram, "bounds": bounds, "counts": counts}
