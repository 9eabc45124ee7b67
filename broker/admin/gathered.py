"""The lists of all nodes as those of one broker, for the dashboard.

Rules:

1. Each node gives its bounded part of a page, as `listings` makes it; see `session.views`. A row says by
   `node` where it is.
2. A list that lacks a node says so: `missing` has its name, and why it has not answered.
3. The work of putting them together is charged, and done in turns.
"""

import heapq
from collections.abc import Mapping, Sequence
from math import inf
from typing import Any, Final, TypeAlias

import attrs
import msgspec
from msgspec import Struct

from broker.admin.listings import (
    PAGE,
    Names,
    NodeId,
    Nothing,
    OneTopic,
    Search,
    SearchClosed,
    SearchTopics,
)
from broker.core.messages import Fd
from broker.core.work import READ_KILOBYTE
from broker.errors import ErrorCode, Refused
from broker.node import Node

Row: TypeAlias = dict[str, Any]

_MOST: Final[Mapping[str, str]] = {
    "queue": "bytes_queued",
    "received": "bytes_received",
    "sent": "bytes_sent",
    "topics": "topic_count",
}
"""By which field of a row it stands in an order."""

_decode: Final = msgspec.json.Decoder().decode


@attrs.frozen
class _Part:
    """The answer of one node: a page, or another view."""

    id: str
    name: str
    shown: Any  # JSON that this version or another has made: which fields there are, the view says

    def rows(self) -> list[Row]:
        """Its rows, with its name."""
        return [{**row, "node": self.name} for row in self.shown["rows"]]


@attrs.frozen
class _Asked:
    parts: list[_Part]
    missing: list[Row]

    def total(self, field: str) -> int:
        return sum(part.shown[field] for part in self.parts)

    def rows(self) -> list[Row]:
        return [row for part in self.parts for row in part.rows()]

    def rows_by_fd(self, limit: int) -> tuple[list[Row], Fd]:
        """The first of all in the order of their fds, and the fd that the next page is to be asked `after`; 0
        at the end. Beyond the last of a page that was cut there are some of its node that nobody has told."""
        seen = min([part.shown["next"] for part in self.parts if part.shown["next"]], default=inf)
        fitting = [row for row in self.rows() if row["fd"] <= seen]
        fitting.sort(key=lambda row: row["fd"])
        if len(fitting) > limit:
            return fitting[:limit], fitting[limit - 1]["fd"]
        return fitting, 0 if seen == inf else int(seen)


@attrs.frozen
class Gathered:
    """See the module. Every method raises `Refused`: 102 for a `node` that is no id of any."""

    node: Node

    async def connections(self, asked: Search) -> Row:
        """A page of connections: in the order of fds, `next` is to be asked `after` for the one behind it."""
        found = await self._ask("connections", asked, [asked.node])
        field = _MOST.get(asked.order)
        if field is None:
            rows, next_fd = found.rows_by_fd(asked.limit)
        else:
            rows, next_fd = heapq.nlargest(asked.limit, found.rows(), key=lambda row: row[field]), 0
        return {"rows": rows, "next": next_fd, "all": found.total("all"), "missing": found.missing}

    async def connection(self, fd: Fd) -> Row:
        """All that is known of a connection, or of its end, by the name of its node. Raises `Refused` (102)
        for one that is nowhere, 100 where its node does not answer."""
        views = self.node.views
        where = self.node.everywhere.node_of(fd) or views.here.id
        shown: Row = _decode(await views.of(where, "connection", {"fd": fd}))
        names = {each.id: each.name for each in views.nodes()}
        return {**shown, "node": names.get(where, where)}

    async def closed(self, asked: SearchClosed) -> Row:
        """A page of connections that have ended; `next` is to be asked `before` for the one behind it."""
        found = await self._ask("closed", asked, [asked.node])
        # Behind the last of a page that was cut there are some of its node that nobody has told.
        ends = [part.shown["next"] for part in found.parts if part.shown["next"] is not None]
        seen = max(ends, default=[-inf, 0])
        fitting = [row for row in found.rows() if _ended(row) >= seen]
        rows = heapq.nlargest(asked.limit, fitting, key=_ended)
        is_more = bool(ends) or len(rows) < len(fitting)
        last = _ended(rows[-1]) if is_more and rows else None
        return {"rows": rows, "next": last, "all": found.total("all"), "missing": found.missing}

    async def topics(self, asked: SearchTopics) -> Row:
        """The topics and patterns with the most subscribers, of those that are among the first of a node;
        `on` has how many each node has. `found` is how many match at most: one that two nodes have counts
        twice."""
        first = await self._ask("topics", asked, [asked.node])
        rows: dict[str, Row] = {}
        for part in first.parts:
            for row in part.shown["rows"]:
                _add_topic(rows, row, part)
        largest = heapq.nlargest(asked.limit, rows.values(), key=_subscribers)
        missing = first.missing
        if len(first.parts) > 1:
            # A node may have some more of those that are not among its own first.
            names = Names([row["name"] for row in largest])
            counts = await self._ask("counts", names, [part.id for part in first.parts])
            missing = [*missing, *counts.missing]
            largest = [_counted(row, place, counts.parts) for place, row in enumerate(largest)]
            largest.sort(key=_subscribers, reverse=True)
        return {
            "rows": largest,
            "found": first.total("found"),
            "all": first.total("all"),
            "missing": missing,
        }

    async def topic(self, asked: OneTopic) -> Row:
        """One topic: who listens, a page of them beyond an fd; what is kept, the newest first; its rules.
        Raises `Refused` for what is neither topic nor pattern."""
        found = await self._ask("members", asked, [asked.node])
        rows, next_fd = found.rows_by_fd(PAGE)
        return {
            **_decode(await self.node.views.of("", "kept", {"topic": asked.topic})),
            "subscribers": found.total("subscribers"),
            "on": {part.name: part.shown["subscribers"] for part in found.parts},
            "in_program": found.total("in_program"),
            "rows": rows,
            "next": next_fd,
            "missing": found.missing,
        }

    async def ticks(self) -> list[Row]:
        """The last sample of each node, by its id and name; or why there is none."""
        found = await self._ask("tick", Nothing(), [])
        shown = [{"id": part.id, "name": part.name, "tick": part.shown} for part in found.parts]
        return [*shown, *found.missing]

    async def _ask(self, view: str, params: Struct, nodes: Sequence[NodeId]) -> _Asked:
        """Of the nodes of these ids, or of all; `[""]` is all as well."""
        views, router = self.node.views, self.node.router
        seen = await views.of_all(view, params, [each for each in nodes if each])
        if not seen:
            raise Refused(ErrorCode.UNKNOWN_CHANNEL, f"no node has the id {nodes[0]!r}")
        parts: list[_Part] = []
        missing: list[Row] = []
        for each in seen:
            who = each.node
            if isinstance(each.answer, Refused):
                missing.append({"id": who.id, "name": who.name, "reason": each.answer.message})
                continue
            await router.turns.pay(len(each.answer) / 1024 * READ_KILOBYTE)
            parts.append(_Part(who.id, who.name, _decode(each.answer)))
        return _Asked(parts, missing)


def _ended(row: Row) -> list[float]:
    return [row["closed_at"], row["fd"]]


def _subscribers(row: Row) -> int:
    count: int = row["subscribers"]
    return count


def _counted(row: Row, place: int, parts: list[_Part]) -> Row:
    """A topic by what the nodes say of it that have counted: it is in this place with each."""
    row = {**row, **dict.fromkeys(_COUNTS, 0), "on": {}}
    for part in parts:
        counts = part.shown[place]
        for field, count in zip(_COUNTS, counts, strict=True):
            row[field] += count
        if counts[0]:
            row["on"][part.name] = row["on"].get(part.name, 0) + counts[0]
    return row


_COUNTS: Final = ("subscribers", "groups", "watchers")


def _add_topic(rows: dict[str, Row], row: Row, part: _Part) -> None:
    before = rows.get(row["name"])
    if before is None:
        rows[row["name"]] = {**row, "on": {part.name: row["subscribers"]}}
        return
    for field in _COUNTS:
        before[field] += row[field]
    before["on"][part.name] = before["on"].get(part.name, 0) + row["subscribers"]
