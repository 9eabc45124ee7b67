"""Requests between clients: one asks, one other answers, and nobody waits in vain.

The one who is asked gets a publication tagged `reply_to`, and answers with that number. An ask ends
in exactly one of: the answer; `NOBODY_LISTENS`, at once when there is nobody to ask, or when the
one who was asked goes; `NO_ANSWER` when its time is over.

Rules:

1. Nothing here waits. The answer is handed to a function, so a client that has asked goes on with its
   other commands, and two that ask each other do not block each other.
2. A client may be asked by any number of others, each a hundred times. So no step is linear in the requests
   that wait, and those that end at once end a few at a time.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial
from math import inf
from typing import Final, Protocol, TypeAlias

import attrs

from broker.core.lazy_heap import LazyHeap
from broker.core.messages import ClientInfo, Fd, Publication
from broker.core.names import direct_fd
from broker.core.session import Phase, Subscription
from broker.core.work import ANSWERED, ASK, ASKED, LISTENERS
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


class Elsewhere(Protocol):
    """The other nodes, which may have somebody to ask."""

    def ask(
        self,
        to: str,
        data: bytes,
        info: ClientInfo | None,
        due: float,
        answer: OnAnswer,
        refusal: Refused,
    ) -> Callable[[], None]:
        """Ask there; return what takes the request back. Raises `refusal` where nobody can be asked."""


ANOTHER_NODE: Final[Fd] = 0
"""Stands for the one who is asked, where that is on another node."""


@attrs.frozen(eq=False)
class _Request:
    number: int
    asker: Fd
    responder: Fd
    answer: OnAnswer
    take_back: Callable[[], None] | None = None


@attrs.define(eq=False)
class Requests:
    """The requests that wait for an answer."""

    router: Router
    elsewhere: Elsewhere | None = attrs.field(init=False, default=None)
    _requests: dict[int, _Request] = attrs.field(init=False, factory=dict)
    # The numbers that each connection has a part in, whoever asks and whoever answers.
    _of: dict[Fd, set[int]] = attrs.field(init=False, factory=dict)
    # How many of them each has asked.
    _asked: "Counter[Fd]" = attrs.field(init=False, factory=Counter)
    _due: LazyHeap[tuple[float, int]] = attrs.field(init=False)
    _last: int = attrs.field(init=False, default=0)

    def __attrs_post_init__(self) -> None:
        requests = self._requests
        self._due = LazyHeap(lambda entry: entry[1] in requests)

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def bytes_held(self) -> int:
        """About what the open requests take; what they ask waits in outboxes."""
        return REQUEST_BYTES * len(self._requests)

    @property
    def deadlines(self) -> int:
        """Deadlines that are remembered, of answered requests too: at most three a request, and a hundred."""
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
        if asker_fd and self._asked[asker_fd] >= MAX_ASKED:
            text = f"more than {MAX_ASKED} requests wait for an answer"
            raise Refused(ErrorCode.LIMIT_EXCEEDED, text)
        info = None if asker is None else asker.info
        try:
            return self.ask_here(to, data, info, answer, due, asker_fd)
        except Refused as refusal:
            if self.elsewhere is None or refusal.code != ErrorCode.NOBODY_LISTENS:
                raise
            number = self._last + 1
            ended = partial(self._end, number)
            take_back = self.elsewhere.ask(to, data, info, due, ended, refusal)
        self._last = number
        self._open(_Request(number, asker_fd, ANOTHER_NODE, answer, take_back), due)
        return number

    def ask_here(
        self,
        to: str,
        data: bytes,
        info: ClientInfo | None,
        answer: OnAnswer,
        due: float,
        asker_fd: Fd = 0,
    ) -> int:
        """Ask somebody who is on this node, on behalf of whom `info` shows; `asker_fd` is its fd here, 0
        if it has none. Raises `Refused` as `ask` does."""
        number = self._last + 1
        tags = {"reply_to": str(number)}
        name, peer = self._responder(to, asker_fd, tags)
        is_behind = peer.outbox.is_behind()
        if is_behind:
            peer.letters.check(info, peer.fd)
        self._last = number
        self.router.meter.add(ASK)
        assert peer.codec is not None, "a client that is asked has connected"
        frames = (peer.codec.publication(name, Publication(to, data, info, tags=tags)),)
        run = peer.letters.write(frames, "", info) if is_behind else Run(frames)
        if self.router.send_run(peer, run) is not Offer.TAKEN:
            raise Refused(ErrorCode.NOBODY_LISTENS, f"fd {peer.fd} takes no more")
        self._open(_Request(number, asker_fd, peer.fd, answer), due)
        return number

    def _open(self, request: _Request, due: float) -> None:
        number = request.number
        self._requests[number] = request
        self._asked[request.asker] += 1
        for fd in {request.asker, request.responder}:
            self._of.setdefault(fd, set()).add(number)
        if due < inf:
            self._due.push((due, number), len(self._requests))

    def _end(self, number: int, result: bytes | Refused) -> None:
        """Hand the result of another node to the asker."""
        request = self._requests.get(number)
        self.forget(number)
        if request is not None:
            request.answer(result)

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
            if request.take_back is not None:
                request.take_back()
            self._due.sweep(len(self._requests))
            self._asked[request.asker] -= 1
            if not self._asked[request.asker]:
                del self._asked[request.asker]
            for fd in {request.asker, request.responder}:
                numbers = self._of[fd]
                numbers.discard(number)
                if not numbers:
                    del self._of[fd]

    def has(self, fd: Fd) -> bool:
        """Whether a connection has a part in any request that is open."""
        return fd in self._of

    def leave(self, fd: Fd, work: float = inf) -> None:
        """A connection is gone: those that wait for it learn so, and its own requests are forgotten; as many
        of both as so much work goes for."""
        meter = self.router.meter
        until = meter.done + work
        while meter.done < until and (numbers := self._of.get(fd)):
            number = numbers.pop()
            request = self._requests[number]
            self.forget(number)
            meter.add(ANSWERED)
            if request.asker != fd:
                gone = f"fd {fd} has gone without an answer"
                request.answer(Refused(ErrorCode.NOBODY_LISTENS, gone))

    def expire(self, now: float, work: float = inf) -> bool:
        """End what has waited for too long, as far as so much work goes; whether there is more. Call it about
        once a second."""
        meter = self.router.meter
        until = meter.done + work
        while (first := self._due.first()) is not None and first[0] <= now:
            if meter.done >= until:
                return True
            _, number = self._due.pop()
            request = self._requests.get(number)
            if request is not None:
                self.forget(number)
                meter.add(ANSWERED)
                request.answer(Refused(ErrorCode.NO_ANSWER))
        return False

    def _responder(self, to: str, asker: Fd, tags: dict[str, str]) -> tuple[str, Peer]:
        """The client that is asked, and the name under which it gets the request."""
        router = self.router
        fd = direct_fd(to)
        if fd is not None:
            router.rights.check_direct()
            if fd == asker:
                raise Refused(ErrorCode.BAD_REQUEST, f"{to} is this connection itself")
            peer = router.hub.sessions.get(fd)
            if peer is not None and peer.takes_direct and peer.phase is Phase.CONNECTED:
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
