"""Lists for operators: connections and topics, searched in turns and a page at a time.

Rules:

1. An answer has `PAGE` rows at most, however many there are; what it costs to search goes by turns.
2. A list is of the moments in which it was searched: who came and went meanwhile may be in it or not.
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
from broker.errors import ErrorCode, Refused
from broker.node import Node
from broker.protocols.centrifuge_json import CENTRIFUGE_JSON
from broker.routing.reading import history_page, listing_work
from broker.session.details import details_of
from broker.session.search import ConnectionQuery
from broker.session.services import ServedConnection

PAGE: Final = 100
"""Rows of one answer."""

AT_ONCE: Final = 100
"""Connections or topics that are looked at between two turns: 0.1 ms."""

LOOKED_AT: Final = 1.0
"""Work of one that is compared with what is searched for."""

SHOWN: Final = 14.0
"""Work of a connection in a list: all that is known of it, read and written."""

SHOWN_BYTES: Final = 4096
"""Characters of a payload."""

HISTORY: Final = 50
"""Publications of a topic's history that are shown, the newest."""

Text = Annotated[str, Meta(max_length=256)]
Limit = Annotated[int, Meta(ge=1, le=PAGE)]
T = TypeVar("T")

Order = Literal["fd", "queue", "received", "sent", "topics"]


class Search(Struct, forbid_unknown_fields=True):
    """Connections to be listed: those of which `search` says something, beyond the fd `after`; or with
    an `order` other than `fd` those that have the most."""

    search: Text = ""
    after: Annotated[int, Meta(ge=0)] = 0
    limit: Limit = PAGE
    order: Order = "fd"


class SearchTopics(Struct, forbid_unknown_fields=True):
    """Topics and patterns to be listed: those whose name holds `search`, the most listened to first."""

    search: Text = ""
    limit: Limit = PAGE


class SearchClosed(Struct, forbid_unknown_fields=True):
    """Connections that have ended to be listed, the last first, without the first `skip` of them."""

    search: Text = ""
    skip: Annotated[int, Meta(ge=0)] = 0
    limit: Limit = PAGE


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
            await self._turn(SURVEYED_AT_ONCE * LOOKED_AT)
            if most is not None:
                found = heapq.nlargest(asked.limit, found, key=most)
            elif len(found) > asked.limit:
                found = found[: asked.limit]
                next_fd = found[-1].peer.fd
                break
        await self._turn(len(found) * SHOWN)
        # A connection that has gone meanwhile has nothing left to show.
        left = [each for each in found if each.peer.fd in services.connections]
        rows = [self.connection(each) for each in left]
        return {"rows": rows, "next": next_fd, "all": len(services.connections)}

    def connection(self, connection: ServedConnection, topics: int = 3) -> dict[str, object]:
        """All that is known of a connection, with so many of its topics."""
        shown = _details(details_of(self.node.services, connection), topics)
        shown["operator"] = connection.peer.fd in self.node.services.desks
        return shown

    async def closed(self, asked: SearchClosed) -> dict[str, object]:
        """A page of connections that have ended; `next` is to be skipped for the one behind it."""
        wanted, closed = _Wanted.of(asked.search), self.node.services.closed
        rows: list[dict[str, object]] = []
        skip, passed, next_skip = asked.skip, 0, 0
        for piece in _pieces(list(closed)):
            await self._turn(len(piece) * LOOKED_AT)
            for each in piece:
                if not wanted.fits_closed(each):
                    continue
                passed += 1
                if passed <= skip:
                    continue
                if len(rows) == asked.limit:
                    next_skip = passed - 1
                    break
                rows.append(closed_row(each, topics=3))
            if next_skip:
                break
        await self._turn(len(rows) * SHOWN)
        return {"rows": rows, "next": next_skip, "all": len(closed)}

    async def topics(self, asked: SearchTopics) -> dict[str, object]:
        """The topics and patterns that have the most subscribers; `found` is how many match."""
        text, named = asked.search.strip().lower(), self.node.router.hub.named()
        top: list[Listeners] = []
        found = 0
        for piece in _pieces(named):
            await self._turn(len(piece) * (LOOKED_AT + NAMED))
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

    async def topic(self, name: str, after: Fd) -> dict[str, object]:
        """One topic: who listens, a page of them beyond an fd; what it keeps, the newest first; its
        rules. Raises `Refused` for what is neither topic nor pattern."""
        router = self.node.router
        router.rights.check_listenable(name)
        members = router.hub.subscriptions(name) if not is_pattern(name) else []
        count = router.hub.count(name)
        clients = [each for each in members if each.subscriber.fd > after]
        await self._turn(len(members) * MEMBER / 10)
        page = heapq.nsmallest(PAGE + 1, clients, key=lambda each: each.subscriber.fd)
        await self._turn(len(page) * MEMBER)
        more = len(page) > PAGE
        rows = [
            {
                "fd": each.subscriber.fd,
                "user": each.subscriber.user,
                "by": each.grant.by,
                "group": each.group,
                "info": None if each.grant.info is None else _text(each.grant.info),
            }
            for each in page[:PAGE]
        ]
        shown: dict[str, object] = {
            "name": name,
            "pattern": is_pattern(name),
            "subscribers": count,
            "in_program": sum(1 for each in members if not each.subscriber.fd),
            "rows": rows,
            "next": page[PAGE - 1].subscriber.fd if more else 0,
            "rules": attrs.asdict(router.rights.rules_of(name)),
        }
        if not is_pattern(name):
            shown |= await self._kept(name)
        return shown

    async def _kept(self, topic: str) -> dict[str, object]:
        router = self.node.router
        if not router.engine.knows(topic):
            await router.engine.fetch((topic,))
        publications, top = history_page(router, topic, None, HISTORY, True)
        await self._turn(listing_work(publications))
        retained = router.retained.get(topic)
        return {
            "offset": top.offset,
            "epoch": top.epoch,
            "history": [_publication(each) for each in publications],
            "retained": None if retained is None else _publication(retained),
        }

    async def _turn(self, work: float) -> None:
        """Wait for a turn in which so much may be done, and charge it."""
        await self.node.router.turns.wait(work)
        self.node.router.meter.add(work)


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


def found_connection(node: Node, fd: Fd) -> ServedConnection:
    """A connection that is here. Raises `Refused` (102)."""
    connection = node.services.connections.get(fd)
    if connection is None:
        raise Refused(ErrorCode.UNKNOWN_CHANNEL, f"no connection has fd {fd}")
    return connection
