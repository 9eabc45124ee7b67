"""Lists of one node for operators: connections and topics, searched in turns and a page at a time. Those
of all nodes are put together in `gathered`.

Rules:

1. An answer has `PAGE` rows at most, however many there are, and about `PAGE_BYTES`; what it costs to search
   goes by turns.
2. A list is of the moments in which it was searched: one that came or went meanwhile may be in it or not.
3. Payloads are shown as text, and cut: a page is read by a person.
"""

import heapq
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Annotated, Final, Literal, TypeVar

import attrs
from msgspec import Meta, Struct

from broker.core.hub import Listeners
from broker.core.messages import ClosedConnection, ConnectionDetails, Fd, Publication
from broker.core.topics import is_pattern
from broker.core.work import MEMBER, NAMED, SURVEYED_AT_ONCE
from broker.node import Node
from broker.protocols.centrifuge_json import CENTRIFUGE_JSON
from broker.protocols.json_text import written
from broker.routing.reading import history_page, listing_work
from broker.session.details import details_of
from broker.session.search import ConnectionQuery
from broker.session.services import ServedConnection

PAGE: Final = 100
"""Rows of one answer."""

PAGE_BYTES: Final = 2**19
"""Of all rows of one answer, and one more: half of what a node may tell another at once. Strangers choose
paths, names and topics; a usual row has 800."""

AT_ONCE: Final = 100
"""Connections or topics that are looked at between two turns: 0.1 ms."""

LOOKED_AT: Final = 1.0
"""Work of one that is compared with what is searched for."""

SHOWN: Final = 30.0
"""Work of a connection in a list: all that is known of it, read and written; then, as those of all nodes
are, read and written once more."""

SHOWN_BYTES: Final = 4096
"""Characters of a payload."""

HISTORY: Final = 50
"""Publications of a topic's history that are shown, the newest."""

Text = Annotated[str, Meta(max_length=256)]
NodeId = Annotated[str, Meta(max_length=64)]
Limit = Annotated[int, Meta(ge=1, le=PAGE)]
T = TypeVar("T")

Order = Literal["fd", "queue", "received", "sent", "topics"]


class Nothing(Struct, forbid_unknown_fields=True):
    """The parameters of a view that needs none."""


class Search(Struct, forbid_unknown_fields=True):
    """Connections to be listed: those of which `search` says something, beyond the fd `after`; or with
    an `order` other than `fd` those that have the most."""

    search: Text = ""
    after: Annotated[int, Meta(ge=0)] = 0
    limit: Limit = PAGE
    order: Order = "fd"
    node: NodeId = ""
    """The id of one node; else all are asked."""


class SearchTopics(Struct, forbid_unknown_fields=True):
    """Topics and patterns to be listed: those whose name holds `search`, the most listened to first."""

    search: Text = ""
    limit: Limit = PAGE
    node: NodeId = ""


class Names(Struct, forbid_unknown_fields=True):
    """Topics and patterns whose subscribers are to be counted."""

    names: Annotated[list[str], Meta(max_length=PAGE)]


class OneTopic(Struct, forbid_unknown_fields=True):
    topic: Annotated[str, Meta(max_length=1024)]
    after: Annotated[int, Meta(ge=0)] = 0
    node: NodeId = ""


class SearchClosed(Struct, forbid_unknown_fields=True):
    """Connections that have ended to be listed, the last first: those before one that is named by when it
    ended and by its fd."""

    search: Text = ""
    before: tuple[float, int] | None = None
    limit: Limit = PAGE
    node: NodeId = ""


# what is searched for

_FIELDS: Final = ("fd", "user", "address", "topic", "client")


@attrs.frozen
class _Wanted:
    """A search: `user:ann` looks in one field, `ann` in all. An fd and a topic are compared as a whole, all
    else by any part of it, in upper or lower case."""

    field: str
    """"" for all."""
    text: str

    @classmethod
    def of(cls, search: str) -> "_Wanted":
        search = search.strip()
        field, colon, text = search.partition(":")
        if colon and field in _FIELDS:
            return cls(field, text.strip())
        # A number by itself is an fd, and no part of a port.
        return cls("fd" if search.isascii() and search.isdigit() else "", search)

    def fits(self, fd: Fd, user: str, address: str, client: str, topics: Container[str]) -> bool:
        if not self.text:
            return True
        if self.field == "fd":
            return str(fd) == self.text
        if self.field == "topic":
            return self.text in topics
        texts = {"user": user, "address": address, "client": client}
        part = self.text.lower()
        if self.field:
            return part in texts[self.field].lower()
        return self.text in topics or any(part in text.lower() for text in texts.values())

    def fits_connection(self, connection: ServedConnection) -> bool:
        peer = connection.peer
        client = f"{peer.app_name} {peer.app_version}"
        return self.fits(peer.fd, peer.user, connection.address, client, peer.subscriptions)

    def fits_closed(self, closed: ClosedConnection) -> bool:
        info = closed.details
        client = f"{info.app_name} {info.app_version}"
        return self.fits(info.fd, info.user, info.address, client, info.topics)


_MOST: Final[dict[str, Callable[[ServedConnection], int]]] = {
    "queue": lambda each: each.peer.outbox.bytes,
    "received": lambda each: each.traffic.bytes,
    "sent": lambda each: each.peer.outbox.bytes_sent,
    "topics": lambda each: len(each.peer.subscriptions),
}


def _pieces(entries: Sequence[T]) -> Iterator[Sequence[T]]:
    for first in range(0, len(entries), AT_ONCE):
        yield entries[first : first + AT_ONCE]


@attrs.frozen
class Listings:
    """The lists of one node."""

    node: Node

    async def connections(self, asked: Search) -> dict[str, object]:
        """A page of connections; `next` is to be asked `after` for the one behind it, 0 at the end."""
        wanted, services = _Wanted.of(asked.search), self.node.services
        by_topic = wanted.text if wanted.field == "topic" else ""
        most = _MOST.get(asked.order)
        query = ConnectionQuery(after=0 if most else asked.after, topic=by_topic)
        found: list[ServedConnection] = []
        next_fd = 0
        for fds in self.node.search(query):
            found += [
                here for fd in fds if wanted.fits_connection(here := services.connections[fd])
            ]
            await self.node.router.turns.pay(SURVEYED_AT_ONCE * LOOKED_AT)
            if most is not None:
                found = heapq.nlargest(asked.limit, found, key=most)
            elif len(found) > asked.limit:
                found = found[: asked.limit]
                next_fd = found[-1].peer.fd
                break
        await self.node.router.turns.pay(len(found) * SHOWN)
        # A connection that has gone meanwhile has nothing left to show.
        left = [each for each in found if each.peer.fd in services.connections]
        rows, is_cut = _fitting([self.connection(each) for each in left])
        if is_cut and most is None:
            next_fd = left[len(rows) - 1].peer.fd
        return {"rows": rows, "next": next_fd, "all": len(services.connections)}

    def connection(self, connection: ServedConnection, topics: int = 3) -> dict[str, object]:
        """All that is known of a connection, with so many of its topics."""
        shown = _details(details_of(self.node.services, connection), topics)
        shown["operator"] = connection.peer.fd in self.node.services.desks
        return shown

    async def closed(self, asked: SearchClosed) -> dict[str, object]:
        """A page of connections that have ended; `next` is to be asked `before` for the one behind it, None
        at the end."""
        wanted, closed = _Wanted.of(asked.search), self.node.services.closed
        fitting: list[ClosedConnection] = []
        for piece in _pieces(list(closed)):
            await self.node.router.turns.pay(len(piece) * LOOKED_AT)
            fitting += [
                each
                for each in piece
                if wanted.fits_closed(each)
                and (asked.before is None or _ended(each) < asked.before)
            ]
        fitting.sort(key=_ended, reverse=True)  # a clock may be set back
        page = fitting[: asked.limit]
        await self.node.router.turns.pay(len(page) * SHOWN)
        rows, _ = _fitting([closed_row(each, topics=3) for each in page])
        is_more = len(rows) < len(fitting)
        last = _ended(page[len(rows) - 1]) if is_more else None
        return {"rows": rows, "next": last, "all": len(closed)}

    async def topics(self, asked: SearchTopics) -> dict[str, object]:
        """The topics and patterns that have the most subscribers; `found` is how many match."""
        text, named = asked.search.strip().lower(), self.node.router.hub.named()
        top: list[Listeners] = []
        found = 0
        for piece in _pieces(named):
            await self.node.router.turns.pay(len(piece) * (LOOKED_AT + NAMED))
            some = [each for each in piece if len(each) and text in each.name.lower()]
            found += len(some)
            top = heapq.nlargest(asked.limit, [*top, *some], key=len)
        rows = [
            {
                "name": each.name,
                "subscribers": len(each),
                "groups": len(each.groups),
                "watchers": len(each.watchers),
                "pattern": is_pattern(each.name),
            }
            for each in top
        ]
        return {"rows": rows, "found": found, "all": len(named)}

    async def counts(self, asked: Names) -> list[list[int]]:
        """Of each of these topics how many subscribers, queue groups and watchers it has."""
        await self.node.router.turns.pay(len(asked.names) * NAMED)
        hub = self.node.router.hub
        found = [hub.find(name) for name in asked.names]
        return [
            [0, 0, 0] if each is None else [len(each), len(each.groups), len(each.watchers)]
            for each in found
        ]

    async def members(self, asked: OneTopic) -> dict[str, object]:
        """A page of those who listen to a topic, beyond an fd. Raises `Refused` for a name that is neither
        topic nor pattern."""
        router, name = self.node.router, asked.topic
        router.rights.check_listenable(name)
        members = router.hub.subscriptions(name) if not is_pattern(name) else []
        count = router.hub.count(name)
        clients = [each for each in members if each.subscriber.fd > asked.after]
        await self.node.router.turns.pay(len(members) * MEMBER / 10)
        page = heapq.nsmallest(PAGE + 1, clients, key=lambda each: each.subscriber.fd)
        await self.node.router.turns.pay(len(page) * MEMBER)
        rows, _ = _fitting(
            [
                {
                    "fd": each.subscriber.fd,
                    "user": each.subscriber.user,
                    "by": each.grant.by,
                    "group": each.group,
                    "info": None if each.grant.info is None else _text(each.grant.info),
                }
                for each in page[:PAGE]
            ]
        )
        is_more = len(page) > len(rows)
        return {
            "subscribers": count,
            "in_program": sum(1 for each in members if not each.subscriber.fd),
            "rows": rows,
            "next": page[len(rows) - 1].subscriber.fd if is_more else 0,
        }

    async def kept(self, name: str) -> dict[str, object]:
        """The other facts about a topic: its rules; its history, the newest first; and its retained value."""
        rules = attrs.asdict(self.node.router.rights.rules_of(name))
        shown: dict[str, object] = {"name": name, "pattern": is_pattern(name), "rules": rules}
        return shown if is_pattern(name) else shown | await self._kept(name)

    async def _kept(self, topic: str) -> dict[str, object]:
        router = self.node.router
        if not router.engine.knows(topic):
            await router.engine.fetch((topic,))
        publications, top = history_page(router, topic, None, HISTORY, True)
        await self.node.router.turns.pay(listing_work(publications))
        retained = router.retained.get(topic)
        return {
            "offset": top.offset,
            "epoch": top.epoch,
            "history": [_publication(each) for each in publications],
            "retained": None if retained is None else _publication(retained),
        }


def _fitting(rows: list[dict[str, object]]) -> tuple[list[dict[str, object]], bool]:
    """As many of these as fit into an answer, and one at least; whether some did not."""
    size = 0
    for number, row in enumerate(rows):
        size += len(written(row))
        if size > PAGE_BYTES and number:
            return rows[:number], True
    return rows, False


def _ended(closed: ClosedConnection) -> tuple[float, int]:
    return closed.closed_at, closed.details.fd


def _details(details: ConnectionDetails, topics: int) -> dict[str, object]:
    shown = attrs.asdict(details)
    shown["topics"] = list(details.topics[:topics])
    shown["topic_count"] = len(details.topics)
    return shown


def closed_row(closed: ClosedConnection, topics: int) -> dict[str, object]:
    """The whole truth about a connection that has ended, with so many of its topics."""
    return {
        **_details(closed.details, topics),
        "topic_count": closed.topic_count,
        "closed_at": closed.closed_at,
        "close": attrs.asdict(closed.close),
    }


def _publication(publication: Publication) -> dict[str, object]:
    info = publication.info
    return {
        **payload(bytes(CENTRIFUGE_JSON.payload(publication))),
        "offset": publication.offset,
        "time": publication.time,
        "fd": "" if info is None else info.client,
        "user": "" if info is None else info.user,
        "tags": publication.tags,
    }


def payload(data: bytes) -> dict[str, object]:
    """A payload as text for a person, and how many bytes it has."""
    return {"text": _text(data), "bytes": len(data), "cut": len(data) > SHOWN_BYTES}


def _text(data: bytes) -> str:
    return data[:SHOWN_BYTES].decode(errors="replace")
