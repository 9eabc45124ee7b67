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
from typing import Final, TypeAlias

import attrs

from broker.core.messages import Fd, Publication
from broker.core.names import direct_fd
from broker.core.session import Phase, Subscription
from broker.core.work import ASKED, LISTENERS
from broker.errors import ErrorCode, Refused
from broker.routing.queue_groups import GroupRecipient
from broker.routing.recipients import Peer
from broker.routing.router import Router
from broker.transport.outbox import Offer, Run

MAX_ASKED: Final = 100
"""Requests of one client that wait for an answer: more than that is a queue, which a topic is for."""

REQUEST_BYTES: Final = 900
"""An open request: itself, its answer's way back, its deadline, and its places in four collections."""

OnAnswer: TypeAlias = Callable[["bytes | Refused"], None]
"""Called once, with raw JSON or with what went wrong. Never waits."""


@attrs.frozen(eq=False)
class _Request:
    number: int
    asker: Fd
    responder: Fd
    answer: OnAnswer


@attrs.define(eq=False)
class Requests:
    """The requests that wait for an answer."""

    router: Router
    _requests: dict[int, _Request] = attrs.field(init=False, factory=dict)
    # The numbers that each connection has a part in, whoever asks and whoever answers.
    _of: dict[Fd, set[int]] = attrs.field(init=False, factory=dict)
    _due: list[tuple[float, int]] = attrs.field(init=False, factory=list)
    _last: int = attrs.field(init=False, default=0)

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def bytes_held(self) -> int:
        """About what the open requests take; what they ask waits in outboxes."""
        return REQUEST_BYTES * len(self._requests)

    @property
    def deadlines(self) -> int:
        """Deadlines that are remembered, of answered requests too: at most two a request, and 64."""
        return len(self._due)

    def ask(
        self,
        to: str,
        data: bytes,
        asker: Peer | None,
        answer: OnAnswer,
        *,
        due: float = inf,
    ) -> int:
        """Ask an fd, or one member of a queue group of a topic; return the request's number.

        `asker` is None for this very program. Raises `Refused`: 503 when nobody is there to ask, 106
        when this asker has too many requests open, 107 for what is neither, 111 when too much of this
        asker waits for a client that is behind.
        """
        asker_fd = 0 if asker is None else asker.fd
        mine = self._of.get(asker_fd, ())
        if asker_fd and sum(self._requests[n].asker == asker_fd for n in mine) >= MAX_ASKED:
            text = f"more than {MAX_ASKED} requests wait for an answer"
            raise Refused(ErrorCode.LIMIT_EXCEEDED, text)
        number = self._last + 1
        tags = {"reply_to": str(number)}
        name, peer = self._responder(to, asker_fd, tags)
        info = None if asker is None else asker.info
        is_behind = peer.outbox.is_behind()
        if is_behind:
            peer.letters.check(info, peer.fd)
        self._last = number
        assert peer.codec is not None, "a client that is asked has connected"
        frames = (peer.codec.publication(name, Publication(to, data, info, tags=tags)),)
        run = peer.letters.write(frames, "", info) if is_behind else Run(frames)
        if self.router.send_run(peer, run) is not Offer.TAKEN:
            raise Refused(ErrorCode.NOBODY_LISTENS, f"fd {peer.fd} takes no more")
        self._requests[number] = _Request(number, asker_fd, peer.fd, answer)
        for fd in {asker_fd, peer.fd}:
            self._of.setdefault(fd, set()).add(number)
        if due < inf:
            heapq.heappush(self._due, (due, number))
        return number

    def reply(self, responder: Fd, number: int, answer: bytes | Refused) -> None:
        """Hand on an answer. Raises `Refused` unless this connection was asked and is waited for."""
        request = self._requests.get(number)
        if request is None or request.responder != responder:
            text = f"no request {number} waits for an answer of this connection"
            raise Refused(ErrorCode.BAD_REQUEST, text)
        self.forget(number)
        request.answer(answer)

    def forget(self, number: int) -> None:
        """Nobody waits for this answer any more, if anybody did."""
        request = self._requests.pop(number, None)
        if request is not None:
            # Those that were answered go when they outnumber the others: constant per request.
            if len(self._due) > 2 * len(self._requests) + 64:
                self._due = [entry for entry in self._due if entry[1] in self._requests]
                heapq.heapify(self._due)
            for fd in {request.asker, request.responder}:
                numbers = self._of[fd]
                numbers.discard(number)
                if not numbers:
                    del self._of[fd]

    def leave(self, fd: Fd) -> None:
        """A connection is gone: those that wait for it learn so, and its own requests are forgotten."""
        for number in list(self._of.get(fd, ())):
            request = self._requests[number]
            self.forget(number)
            if request.asker != fd:
                gone = f"fd {fd} has gone without an answer"
                request.answer(Refused(ErrorCode.NOBODY_LISTENS, gone))

    def expire(self, now: float) -> None:
        """End what has waited for too long. Call it about once a second."""
        while self._due and self._due[0][0] <= now:
            _, number = heapq.heappop(self._due)
            request = self._requests.get(number)
            if request is not None:
                self.forget(number)
                request.answer(Refused(ErrorCode.NO_ANSWER))

    def _responder(self, to: str, asker: Fd, tags: dict[str, str]) -> tuple[str, Peer]:
        """The client that is asked, and the name under which it gets the request."""
        router = self.router
        fd = direct_fd(to)
        if fd is not None:
            router.check_direct()
            if fd == asker:
                raise Refused(ErrorCode.BAD_REQUEST, f"{to} is this connection itself")
            peer = router.hub.sessions.get(fd)
            if peer is not None and peer.phase is Phase.CONNECTED:
                return to, peer
            raise Refused(ErrorCode.NOBODY_LISTENS, f"no client has fd {fd}")
        router.rights.check_topic(to)
        rules = router.rights.rules_of(to)
        found = router.hub.listeners(to)
        router.meter.add(len(found) * LISTENERS)
        for listeners in found:
            through_pattern = listeners.name != to

            def admits(member: Subscription, through_pattern: bool = through_pattern) -> bool:
                # A reader in this very program has no fd to answer from.
                return isinstance(member.subscriber, Peer) and (
                    not through_pattern or router.rights.receives(rules, to, member)
                )

            for group in listeners.groups.values():
                member = GroupRecipient(group, admits).choose(tags, (asker,))
                router.meter.add(group.looks * ASKED)
                if member is not None and isinstance(member.subscriber, Peer):
                    return member.name, member.subscriber
        raise Refused(ErrorCode.NOBODY_LISTENS, f"nobody listens to {to} in a queue group")
