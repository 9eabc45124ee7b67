"""Requests between clients: one asks, one other answers, and nobody waits in vain.

The one who is asked gets a publication tagged `reply_to`, and answers with that number. An ask ends
in exactly one of: the answer; `NOBODY_LISTENS`, at once when there is nobody to ask, or when the
one who was asked goes; `NO_ANSWER` when its time is over.

Rule: nothing here waits. The answer is handed to a function, so a client that has asked goes on
with its other commands, and two that ask each other do not block each other.
"""

import heapq
from collections.abc import Callable
from math import inf
from typing import Any, Final, TypeAlias

import attrs

from broker.core.messages import ClientInfo, Fd, Publication
from broker.core.session import Phase, Session, Subscription
from broker.errors import ErrorCode, Refused
from broker.routing.queue_groups import Outlet
from broker.routing.router import Router, direct_fd
from broker.transport.outbox import Offer, Run

MAX_ASKED: Final = 100
"""Requests of one client that wait for an answer: more than that is a queue, which a topic is for."""

Answer: TypeAlias = Callable[["bytes | Refused"], None]
"""Called once, with raw JSON or with what went wrong. Never waits."""


@attrs.frozen(eq=False)
class _Asked:
    number: int
    asker: Fd
    responder: Fd
    answer: Answer


@attrs.define(eq=False)
class Requests:
    """The requests that wait for an answer."""

    router: Router
    _asked: dict[int, _Asked] = attrs.field(init=False, factory=dict)
    # The numbers that each connection has a part in, whoever asks and whoever answers.
    _of: dict[Fd, set[int]] = attrs.field(init=False, factory=dict)
    _due: list[tuple[float, int]] = attrs.field(init=False, factory=list)
    _last: int = attrs.field(init=False, default=0)

    def __len__(self) -> int:
        return len(self._asked)

    def ask(
        self,
        to: str,
        data: bytes,
        info: ClientInfo | None,
        answer: Answer,
        *,
        asker: Fd = 0,
        due: float = inf,
    ) -> int:
        """Ask an fd, or one member of a queue group of a topic; return the request's number.

        `asker` is 0 for this very program. Raises `Refused`: 503 when nobody is there to ask, 106
        when this asker has too many requests open, 107 for what is neither.
        """
        open_here = sum(1 for n in self._of.get(asker, ()) if self._asked[n].asker == asker)
        if asker and open_here >= MAX_ASKED:
            text = f"more than {MAX_ASKED} requests wait for an answer"
            raise Refused(ErrorCode.LIMIT_EXCEEDED, text)
        self.router.flush()
        number = self._last + 1
        tags = {"reply_to": str(number)}
        name, session = self._responder(to, asker, tags)
        self._last = number
        codec: Any = session.codec
        outbox: Any = session.outbox
        frame = codec.publication(name, Publication(to, data, info, tags=tags))
        if outbox.offer(Run((frame,), to)) is not Offer.TAKEN:
            raise Refused(ErrorCode.NOBODY_LISTENS, f"fd {session.fd} takes no more")
        self._asked[number] = _Asked(number, asker, session.fd, answer)
        for fd in {asker, session.fd}:
            self._of.setdefault(fd, set()).add(number)
        if due < inf:
            heapq.heappush(self._due, (due, number))
        return number

    def reply(self, responder: Fd, number: int, answer: bytes | Refused) -> None:
        """Hand on an answer. Raises `Refused` unless this connection was asked and is waited for."""
        asked = self._asked.get(number)
        if asked is None or asked.responder != responder:
            text = f"no request {number} waits for an answer of this connection"
            raise Refused(ErrorCode.BAD_REQUEST, text)
        self.forget(number)
        asked.answer(answer)

    def forget(self, number: int) -> None:
        """Nobody waits for this answer any more, if anybody did."""
        asked = self._asked.pop(number, None)
        if asked is not None:
            # Those that were answered go when they outnumber the others: constant per request.
            if len(self._due) > 2 * len(self._asked) + 64:
                self._due = [entry for entry in self._due if entry[1] in self._asked]
                heapq.heapify(self._due)
            for fd in {asked.asker, asked.responder}:
                numbers = self._of[fd]
                numbers.discard(number)
                if not numbers:
                    del self._of[fd]

    def leave(self, fd: Fd) -> None:
        """A connection is gone: whoever waits for it learns so, and what it asked is forgotten."""
        for number in list(self._of.get(fd, ())):
            asked = self._asked[number]
            self.forget(number)
            if asked.asker != fd:
                gone = f"fd {fd} has gone without an answer"
                asked.answer(Refused(ErrorCode.NOBODY_LISTENS, gone))

    def expire(self, now: float) -> None:
        """End what has waited for too long. Call it about once a second."""
        while self._due and self._due[0][0] <= now:
            _, number = heapq.heappop(self._due)
            asked = self._asked.get(number)
            if asked is not None:
                self.forget(number)
                asked.answer(Refused(ErrorCode.NO_ANSWER))

    def _responder(self, to: str, asker: Fd, tags: dict[str, str]) -> tuple[str, Session]:
        """Who is asked, and under which name it gets the request."""
        fd = direct_fd(to)
        if fd is not None:
            self.router.check_direct()
            if fd == asker:
                raise Refused(ErrorCode.BAD_REQUEST, f"{to} is this connection itself")
            session = self.router.hub.sessions.get(fd)
            if session is not None and session.phase is Phase.CONNECTED:
                return to, session
            raise Refused(ErrorCode.NOBODY_LISTENS, f"no client has fd {fd}")
        self.router.check_topic(to)
        rules = self.router.rules_for(to)
        for listeners in self.router.hub.listeners(to):
            for group in listeners.groups.values():

                def suits(member: Subscription, name: str = listeners.name) -> bool:
                    # A reader in this very program has no fd to answer from.
                    return isinstance(member.subscriber, Session) and (
                        name == to or self.router.may_get(rules, to, member)
                    )

                outlet = Outlet(group, self.router.office, rules.slow_consumer, (asker,), suits)
                member = outlet.choose(tags)
                if member is not None:
                    assert isinstance(member.subscriber, Session)
                    return member.name, member.subscriber
        raise Refused(ErrorCode.NOBODY_LISTENS, f"nobody listens to {to} in a queue group")
