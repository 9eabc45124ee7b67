"""Traces and ended connections of all nodes, as if they were here.

Rules:

1. A connection is traced on its own node, a user on all that are there when the trace begins. A topic is
   traced here: a listener gets the publications of all nodes.
2. The entries of another node are fetched by asking it. A read that asks several nodes at once waits no
   longer than `TOGETHER_SECONDS` for each look, because fetched entries must not be lost.
3. As with all that is asked of others, a node that does not answer makes the answer an error.
"""

from collections.abc import Sequence
from functools import partial
from typing import Final
from uuid import uuid4

import attrs
import msgspec
import trio

from broker.core.messages import ClosedConnection, Fd
from broker.core.trace import Entry, Target
from broker.core.work import COMMAND, DETAILS, LISTED, NAMED, SUBSCRIPTION
from broker.errors import Refused
from broker.routing.mail import EndTrace, ListClosed, ReadTrace, Trace
from broker.routing.neighbourhood import Neighbourhood
from broker.routing.neighbours import Neighbours
from broker.routing.open_calls import CALL_SECONDS, Answer
from broker.session.services import Services
from broker.session.tracing import IDLE_SECONDS, Traces

READ_AT_ONCE: Final = 100
"""Entries of a trace in one answer, some 80 KB at most."""

CLOSED_AT_ONCE: Final = 100
"""Ended connections that one node tells another at once: 250 KB where all had as many topics as fit."""

TOGETHER_SECONDS: Final = 1.0
"""How long a trace on several nodes may lag behind."""

DISTANT_MOST: Final = 64
"""Traces on other nodes that are known by their id here. Each has its bounds on its own node."""

encode: Final = msgspec.msgpack.Encoder().encode


class Read(msgspec.Struct, frozen=True, array_like=True):
    """The entries of a trace since it was read last. `missed` more were left out behind the last one."""

    entries: list[Entry]
    missed: int
    has_ended: bool


_read: Final = msgspec.msgpack.Decoder(Read)
_closed: Final = msgspec.msgpack.Decoder(list[ClosedConnection])


@attrs.define(eq=False)
class Inspection:
    """See the module. Every async method raises `Refused`: 100 where a node does not answer; cancelled,
    it may have been done or not."""

    services: Services
    traces: Traces
    _distant: dict[str, list[tuple[str | None, str]]] = attrs.field(init=False, factory=dict)
    """The parts of a trace, with their nodes, by its id; the oldest first."""

    def __attrs_post_init__(self) -> None:
        if self._neighbourhood is not None:
            on = self._neighbours.on
            on(ListClosed, self._list_closed)
            on(Trace, self._begin_here)
            on(ReadTrace, self._read_here)
            on(EndTrace, self._end_here)

    @property
    def _neighbourhood(self) -> Neighbourhood | None:
        return self.services.neighbourhood

    @property
    def _neighbours(self) -> Neighbours:
        assert self._neighbourhood is not None, "alone there is nobody to ask"
        return self._neighbourhood.neighbours

    # connections that have ended

    async def closed(self, fd: Fd, user: str, limit: int) -> Sequence[ClosedConnection]:
        """The connections that ended last, on all nodes, the last first; with an fd that one alone, with
        a user theirs."""
        found = self._closed_here(fd, user, limit)
        if self._neighbourhood is not None and not (fd and found):
            ask = ListClosed(fd, user, min(limit, CLOSED_AT_ONCE))
            for answer in (await self._neighbours.ask_all(ask)).values():
                found += _closed.decode(_checked(answer))
        found.sort(key=lambda closed: -closed.closed_at)
        return found[:limit]

    def _closed_here(self, fd: Fd, user: str, limit: int) -> list[ClosedConnection]:
        fitting = []
        for closed in self.services.closed:
            if fd in (0, closed.details.fd) and user in ("", closed.details.user):
                fitting.append(closed)
                if len(fitting) == limit:
                    break
        return fitting if self._neighbourhood is None else list(map(self._of_here, fitting))

    def _of_here(self, closed: ClosedConnection) -> ClosedConnection:
        """With the name of this node, as there are several."""
        details = attrs.evolve(closed.details, node=self.services.name)
        return attrs.evolve(closed, details=details)

    def _list_closed(self, sender: str, asked: ListClosed, answer: Answer) -> float:
        found = self._closed_here(asked.fd, asked.user, min(asked.limit, CLOSED_AT_ONCE))
        answer(encode(found))
        return len(self.services.closed) * NAMED + len(found) * DETAILS

    # traces

    async def begin(self, target: Target) -> str:
        """Begin a trace, wherever what it is about is; return its id. Raises as `Traces.begin` does."""
        parts = await self._begin_parts(target)
        if len(parts) == 1 and parts[0][0] is None:
            return parts[0][1]
        if len(self._distant) == DISTANT_MOST:
            del self._distant[next(iter(self._distant))]  # it ends where it is, as nobody reads it
        trace_id = uuid4().hex
        self._distant[trace_id] = parts
        return trace_id

    async def _begin_parts(self, target: Target) -> list[tuple[str | None, str]]:
        here, ask = self.services.connections, Trace(target.fd, target.user, target.topic)
        if self._neighbourhood is not None and target.fd and target.fd not in here:
            node = self._neighbours.node_of(target.fd)
            if node is not None:
                return [(node, (await self._neighbours.ask(node, ask)).decode())]
        parts: list[tuple[str | None, str]] = [(None, self.traces.begin(target, IDLE_SECONDS).id)]
        if self._neighbourhood is not None and target.user:
            answers = await self._neighbours.ask_all(ask)
            parts += [(node, _checked(answer).decode()) for node, answer in answers.items()]
        return parts

    async def read(self, trace_id: str, wait: float) -> Read:
        """The entries of a trace since the last read; wait up to so many seconds until there is one. Raises
        `Refused` (102) for one that has ended, or that nobody had read for too long."""
        parts = self._distant.get(trace_id)
        if parts is None:
            return await self._read(trace_id, wait)
        if len(parts) == 1:
            read = await self._read_part(parts[0], wait)
        else:
            read = await self._read_together(parts, wait)
        if read.has_ended:
            self._distant.pop(trace_id, None)
        return read

    async def _read_together(self, parts: list[tuple[str | None, str]], wait: float) -> Read:
        until = trio.current_time() + wait
        while True:
            left = max(0.0, until - trio.current_time())
            reads: list[Read] = []

            async def read(part: tuple[str | None, str], seconds: float, into: list[Read]) -> None:
                into.append(await self._read_part(part, seconds))

            async with trio.open_nursery() as nursery:
                for part in parts:
                    nursery.start_soon(read, part, min(left, TOGETHER_SECONDS), reads)
            entries = sorted([e for each in reads for e in each.entries], key=lambda e: e.time)
            missed = sum([each.missed for each in reads])
            has_ended = all(each.has_ended for each in reads)
            if entries or missed or has_ended or left <= TOGETHER_SECONDS:
                return Read(entries, missed, has_ended)

    async def _read_part(self, part: tuple[str | None, str], wait: float) -> Read:
        node, trace_id = part
        if node is None:
            return await self._read(trace_id, wait)
        ask, seconds = ReadTrace(trace_id, wait), wait + CALL_SECONDS
        return _read.decode(await self._neighbours.ask(node, ask, seconds=seconds))

    async def _read(self, trace_id: str, wait: float) -> Read:
        trace = self.traces.find(trace_id, IDLE_SECONDS + wait)
        if wait:
            with trio.move_on_after(wait):
                await trace.wait()
        entries = trace.buffer.take(READ_AT_ONCE)
        has_ended = trace.has_ended and not trace.buffer
        if has_ended:
            self.traces.end(trace)
        missed = 0 if trace.buffer else trace.buffer.take_missed()
        return Read(entries, missed, has_ended)

    async def end(self, trace_id: str) -> None:
        """End a trace, wherever its parts are. Raises `Refused` (102) where there is none."""
        for node, part in self._distant.pop(trace_id, [(None, trace_id)]):
            if node is None:
                self.traces.end(self.traces.find(part, IDLE_SECONDS))
            else:
                await self._neighbours.ask(node, EndTrace(part))

    # what other nodes ask for

    def _begin_here(self, sender: str, asked: Trace, answer: Answer) -> float:
        try:
            target = Target(asked.fd, asked.user, asked.topic)
            answer(self.traces.begin(target, IDLE_SECONDS).id.encode())
        except Refused as refusal:
            answer(refusal)
        return SUBSCRIPTION

    def _read_here(self, sender: str, asked: ReadTrace, answer: Answer) -> float:
        assert self._neighbourhood is not None
        self._neighbourhood.start_soon(partial(self._answer_read, asked, answer))
        return COMMAND + READ_AT_ONCE * LISTED

    async def _answer_read(self, asked: ReadTrace, answer: Answer) -> None:
        try:
            answer(encode(await self._read(asked.trace, asked.wait)))
        except Refused as refusal:
            answer(refusal)

    def _end_here(self, sender: str, asked: EndTrace, answer: Answer) -> float:
        try:
            self.traces.end(self.traces.find(asked.trace, IDLE_SECONDS))
            answer(b"")
        except Refused as refusal:
            answer(refusal)
        return COMMAND


def _checked(answer: bytes | Refused) -> bytes:
    if isinstance(answer, Refused):
        raise answer
    return answer
