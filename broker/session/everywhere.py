"""The connections and topics of all nodes, as if they were here.

An act on a connection of this node is done at once, by `Acts`; for other connections their node is asked. A
question about everybody goes to all nodes, or to the cards that they file. Alone, everything is here.

Rules:

1. The rights of the asker were decided before. A node does what another asks for, within its own limits:
   `max_topics` of a connection, the bytes of a message.
2. The asker gets the truth or an error, and never a list without the part of a node that did not answer.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from math import inf
from typing import Any, Final, Protocol, TypeAlias

import attrs
import msgspec

from broker.core.hub import Hub
from broker.core.messages import ClientInfo, ConnectionDetails, Fd, PushResult
from broker.core.session import ServerSub
from broker.core.work import (
    COLLECTED,
    COMMAND,
    ENDING,
    KILOBYTE,
    NAMED,
    SUBSCRIPTION,
    SURVEYED_AT_ONCE,
)
from broker.errors import ErrorCode, Refused
from broker.protocols.json_text import to_json
from broker.routing.mail import (
    Bind,
    Disconnect,
    Expire,
    ListConnections,
    ListTopics,
    Pushed,
    ReportRequest,
    Subscribe,
    Unsubscribe,
)
from broker.routing.neighbourhood import Neighbourhood
from broker.routing.neighbours import Neighbours
from broker.routing.open_calls import Answer
from broker.routing.recipients import Peer
from broker.routing.router import Router
from broker.session.figures import Figures, Mark, NodeReport
from broker.session.orders import Shaped, shaped
from broker.session.search import ConnectionQuery

TOGETHER: Final = 100
"""Connections that one message gives an order to: 25 ms of work where it ends them."""

PAGE_BYTES: Final = 2**18
"""Of a list that one node tells another at once."""

TOPICS_BYTES: Final = 2**20
"""Of the topics of one node, which are told at once: some 30,000."""

MOST_READ: Final = 100_000
"""Cards that are read for one answer, about 10 MB."""

encode: Final = msgspec.msgpack.Encoder().encode


class Acts(Protocol):
    """The things that a node does to its own connections, each in one atomic step."""

    def disconnect(self, fd: Fd, code: int, reason: str) -> bool: ...
    def expire(self, fd: Fd, when: float | None) -> bool: ...
    def add_subscription(self, fd: Fd, topic: str, sub: ServerSub) -> bool: ...
    def end_subscription(self, fd: Fd, topic: str, code: int, reason: str) -> bool: ...
    def bind(self, fd: Fd, user: str) -> None: ...
    def connection_details(self, fd: Fd) -> ConnectionDetails | None: ...
    def search(self, query: ConnectionQuery) -> Iterator[Sequence[Fd]]: ...
    def fds_of(self, user: str) -> list[Fd]: ...
    def push(self, fd: Fd, data: object) -> PushResult: ...
    @property
    def name(self) -> str: ...
    @property
    def router(self) -> Router: ...


@attrs.frozen
class Connections:
    """Connections, and after which event of each node that holds."""

    connections: list[ConnectionDetails]
    marks: Mapping[str, Mark]


INFO_BYTES: Final = 500

MOST_INFOS: Final = 500
"""Connections that are listed in one step: 2 ms."""


class _Page(msgspec.Struct, frozen=True, array_like=True):
    """Connections in the order of their fds; `is_cut`: there are more than fitted."""

    connections: list[ConnectionDetails]
    is_cut: bool
    node: str
    mark: Mark


ForFds: TypeAlias = Disconnect | Expire | Subscribe | Unsubscribe | Bind


@attrs.frozen
class _Order:
    """The act that one kind of mail orders a connection to do, and its work."""

    work: float
    act: Callable[[Any, Fd], bool]


@attrs.define(eq=False)
class Everywhere:
    """See the module. Every async method raises `Refused` (100) where a node or the engine does not
    answer; cancelled, it may have been done or not."""

    acts: Acts
    figures: Figures
    hub: Hub[Peer]
    neighbourhood: Neighbourhood | None
    _orders: Mapping[type[ForFds], _Order] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        acts = self.acts
        self._orders = {
            Disconnect: _Order(ENDING, lambda m, fd: acts.disconnect(fd, m.code, m.reason)),
            Expire: _Order(COMMAND, lambda m, fd: acts.expire(fd, m.when)),
            Subscribe: _Order(
                SUBSCRIPTION, lambda m, fd: acts.add_subscription(fd, m.topic, _sub_of(m))
            ),
            Unsubscribe: _Order(
                COMMAND, lambda m, fd: acts.end_subscription(fd, m.topic, m.code, m.reason)
            ),
            Bind: _Order(COMMAND, self._bind),
        }
        if self.neighbourhood is not None:
            on = self.neighbourhood.neighbours.on
            for kind in self._orders:
                on(kind, self._take_order)
            on(Pushed, self._take_push)
            on(ListConnections, self._list_connections)
            on(ListTopics, self._list_topics)
            on(ReportRequest, self._report)

    @property
    def _neighbours(self) -> Neighbours:
        assert self.neighbourhood is not None, "alone there is nobody to ask"
        return self.neighbourhood.neighbours

    # orders

    async def order(self, fds: Sequence[Fd], make: Callable[[list[Fd]], ForFds]) -> int:
        """Give an order to connections, node by node and some at a time, in their order on each; return
        how many have followed it. `make` makes the mail with it.

        Raises `Refused` as well where a connection refuses; those before it have followed.
        """
        by_node: dict[str | None, list[Fd]] = {}
        for fd in fds:
            by_node.setdefault(self.node_of(fd), []).append(fd)
        done = 0
        for node, theirs in by_node.items():
            for start in range(0, len(theirs), TOGETHER):
                body = make(theirs[start : start + TOGETHER])
                if node is None:
                    done += self._obey(body)
                else:
                    done += int.from_bytes(await self._neighbours.ask(node, body), "big")
        return done

    def push(self, fd: Fd, data: object) -> PushResult:
        """Send a message to a connection of another node, if there is one that may have it. Never waits.

        Raises `TypeError` for what JSON cannot say, `ValueError` for text that is not Unicode.
        """
        node = self.node_of(fd)
        if node is None:
            return PushResult.CLOSED
        opcode = fragment_bytes = 0
        if isinstance(data, Shaped):
            opcode, fragment_bytes, data = data.opcode, data.fragment_bytes, data.value
        if isinstance(data, str):
            kind, payload = "text", data.encode()
        elif isinstance(data, bytes):
            kind, payload = "bytes", data
        else:
            kind, payload = "json", to_json(data)
        body = Pushed(fd, kind, payload, opcode, fragment_bytes)
        try:
            self._neighbours.note(node, body)
        except Refused:
            return PushResult.CLOSED  # nothing can be told: as if its node were gone
        return PushResult.FORWARDED

    def node_of(self, fd: Fd) -> str | None:
        """The id of the other node that may have, or have had, a connection; None for this one, and for an fd
        that is nobody's."""
        if self.neighbourhood is None or self.hub.sessions.get(fd) is not None:
            return None
        return self._neighbours.node_of(fd)

    def _obey(self, body: ForFds) -> int:
        order, fds = self._orders[type(body)], body.fds
        if not isinstance(body, Bind) and body.of:
            # It was asked for a user, and since then a connection may have become another's.
            of_user = frozenset(self.hub.sessions.fds_of(body.of))
            fds = [fd for fd in fds if fd in of_user]
        return sum([order.act(body, fd) for fd in fds])

    def _take_order(self, sender: str, body: ForFds, answer: Answer) -> float:
        try:
            answer(self._obey(body).to_bytes(4, "big"))
        except Refused as refusal:
            answer(refusal)
        return self._orders[type(body)].work * len(body.fds)

    def _take_push(self, sender: str, pushed: Pushed, answer: Answer) -> float:
        data: object = pushed.data
        if pushed.kind == "text":
            data = pushed.data.decode()
        elif pushed.kind == "json":
            data = msgspec.Raw(pushed.data)
        if pushed.opcode:
            data = shaped(data, pushed.opcode, pushed.fragment_bytes)
        self.acts.push(pushed.fd, data)
        return COMMAND + len(pushed.data) / 1024 * KILOBYTE

    def _bind(self, body: Bind, fd: Fd) -> bool:
        try:
            self.acts.bind(fd, body.user)
        except KeyError:
            return False
        return True

    # who is there

    async def connections(
        self, query: ConnectionQuery, limit: int, node: str = ""
    ) -> "Connections":
        """Up to `limit` connections that fit, in the order of their fds, of the nodes of this name, or of
        all. Raises `Refused` (107) for a name that no node has."""
        found: list[ConnectionDetails] = []
        marks: dict[str, Mark] = {}
        while len(found) < limit:
            pages = await self._ask_pages(query, limit - len(found), node)
            marks = marks or {page.node: page.mark for page in pages}
            # Beyond the end of a page that was cut there are some of its node that nobody has told.
            seen = min([each.connections[-1].fd for each in pages if each.is_cut], default=inf)
            fitting = [each for page in pages for each in page.connections if each.fd <= seen]
            fitting.sort(key=lambda details: details.fd)
            found += fitting[: limit - len(found)]
            if seen == inf:
                break
            query = attrs.evolve(query, after=int(seen))
        return Connections(found, marks)

    async def _ask_pages(self, query: ConnectionQuery, limit: int, node: str) -> list["_Page"]:
        pages: list[_Page] = []
        if node in ("", self.acts.name):
            pages.append(await self._page(self.acts.search(query), limit))
        if self.neighbourhood is not None:
            names = {other: self._neighbours.name_of(other) for other in self._neighbours.others()}
            others = [other for other, name in names.items() if node in ("", name)]
            ask = ListConnections(
                [], query.after, limit, query.user, query.topic, query.address, query.app
            )
            answers = await self._neighbours.ask_all(ask, others)
            pages += [_page_of(_checked(answer)) for answer in answers.values()]
        if not pages:
            raise Refused(ErrorCode.BAD_REQUEST, f"no node is named {node!r}")
        return pages

    async def connection_details(self, fd: Fd) -> ConnectionDetails | None:
        """A snapshot of one connection; None if it is nowhere."""
        node = self.node_of(fd)
        if node is None:
            return self.acts.connection_details(fd)
        page = _page_of(await self._neighbours.ask(node, ListConnections([fd])))
        return next(iter(page.connections), None)

    async def fds_of(self, user: str) -> list[Fd]:
        """The connections of a user that are not closing. Raises `Refused` (106) for very many."""
        if self.neighbourhood is None:
            return self.acts.fds_of(user)
        return await self.neighbourhood.roster.fds_of(user, MOST_READ)

    async def presence(self, topic: str, most: int = MOST_READ) -> Mapping[str, ClientInfo]:
        """The clients that are subscribed to a topic itself, by client id. Raises `Refused`: 106 for more
        than `most` on other nodes together, 108 where nodes do not tell each other."""
        if self.neighbourhood is None:
            return self.hub.presence(topic)
        return await self.neighbourhood.roster.presence(topic, most)

    async def presence_stats(self, topic: str) -> tuple[int, int]:
        """How many clients are subscribed to a topic itself, and how many users these are."""
        if self.neighbourhood is None:
            return self.hub.presence_stats(topic)
        return await self.neighbourhood.roster.counts(topic)

    async def topics(self) -> dict[str, int]:
        """The topics and patterns that are subscribed to, with how many subscriptions each has. Raises
        `Refused` (106) where a node has too many for one message."""
        topics: Counter[str] = Counter(self.hub.topics())
        if self.neighbourhood is not None:
            answers = await self._neighbours.ask_all(ListTopics(TOPICS_BYTES))
            for answer in answers.values():
                topics.update(_topics.decode(_checked(answer)))
        return dict(topics)

    async def nodes(self) -> list[NodeReport]:
        """How all nodes are, this one first, then by name."""
        reports = [self.figures.report()]
        if self.neighbourhood is not None:
            answers = await self._neighbours.ask_all(ReportRequest())
            others = [
                NodeReport(self._neighbours.name_of(node), alive=False)
                if isinstance(answer, Refused)
                else _report.decode(answer)
                for node, answer in answers.items()
            ]
            reports += sorted(others, key=lambda report: report.name)
        return reports

    def _list_connections(self, sender: str, asked: ListConnections, answer: Answer) -> float:
        assert self.neighbourhood is not None
        self.neighbourhood.start_soon(partial(self._list, asked, answer))
        return COMMAND

    async def _list(self, asked: ListConnections, answer: Answer) -> None:
        walk: Iterable[Sequence[Fd]] = [asked.fds]
        if not asked.fds:
            query = ConnectionQuery(asked.after, asked.user, asked.topic, asked.address, asked.app)
            walk = self.acts.search(query)
        answer(encode(await self._page(walk, asked.limit or len(asked.fds))))

    async def _page(self, walk: Iterable[Sequence[Fd]], limit: int) -> "_Page":
        """As many of these as fit into one message, and one at least: looked at in turns with all else, and
        counted there, whoever asked. To write them is counted by whoever does that."""
        mark, size, turns = self.figures.mark(), 0, self.acts.router.turns
        page: list[ConnectionDetails] = []
        for fds in walk:
            await turns.pay(SURVEYED_AT_ONCE * NAMED + len(fds) * COLLECTED)
            for fd in fds:
                details = self.acts.connection_details(fd)
                if details is None:
                    continue
                size += INFO_BYTES + len(details.user) + len(details.path)
                size += sum(map(len, details.topics))
                if page and (size > PAGE_BYTES or len(page) == min(limit, MOST_INFOS)):
                    return _Page(page, len(page) < limit, self.acts.name, mark)
                page.append(details)
        return _Page(page, False, self.acts.name, mark)

    def _list_topics(self, sender: str, asked: ListTopics, answer: Answer) -> float:
        topics = self.hub.topics()
        # The shortest has five bytes, with its count.
        listed = encode(topics) if 5 * len(topics) < asked.most_bytes else None
        if listed is None or len(listed) > asked.most_bytes:
            text = f"a node has {len(topics)} topics: more than one message may hold"
            answer(Refused(ErrorCode.LIMIT_EXCEEDED, text))
        else:
            answer(listed)
        return len(topics) * NAMED

    def _report(self, sender: str, asked: ReportRequest, answer: Answer) -> float:
        answer(encode(self.figures.report()))
        return COMMAND


_pages: Final = msgspec.msgpack.Decoder(_Page)
_topics: Final = msgspec.msgpack.Decoder(dict[str, int])
_report: Final = msgspec.msgpack.Decoder(NodeReport)


def _page_of(answer: bytes) -> _Page:
    return _pages.decode(answer)


def _checked(answer: bytes | Refused) -> bytes:
    if isinstance(answer, Refused):
        raise answer
    return answer


def _sub_of(mail: Subscribe) -> ServerSub:
    return ServerSub(mail.info, mail.data, mail.join_leave)
