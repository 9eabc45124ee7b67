"""Requests that another node answers: to a connection there, or to a member of a queue group there.

The node that is asked sees to it as to one of its own clients' requests, and its answer is the answer. Ends
the node before that, nobody answers: 503, as when the client goes that was asked.

Rule: an asker that no longer waits takes the request back, so that nothing is left of it on either node.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import count
from math import inf

import attrs
import trio
from msgspec.structs import replace

from broker.core.messages import ClientInfo
from broker.core.names import direct_fd
from broker.core.work import COMMAND
from broker.errors import ErrorCode, Refused
from broker.routing.group_shares import GroupShares
from broker.routing.mail import Asked, Unasked
from broker.routing.neighbours import Neighbours
from broker.routing.open_calls import Answer, Unanswered
from broker.routing.requests import OnAnswer, Requests


@attrs.define(eq=False)
class _Asking:
    """One request on its way over the nodes that may answer it."""

    distant: "DistantRequests"
    body: Asked
    nodes: list[str]
    due: float
    answer: OnAnswer
    call: int = 0
    node: str = ""
    is_over: bool = False

    def ask_next(self, refusal: Refused) -> None:
        """Ask the next node; raises the refusal if none is left."""
        neighbours = self.distant.neighbours
        if not self.nodes:
            raise refusal
        self.node = self.nodes.pop(0)
        seconds = None if self.due == inf else max(0.0, self.due - trio.current_time())
        body = replace(self.body, seconds=seconds)
        self.call = neighbours.call(self.node, body, self.answered, seconds=inf)

    def answered(self, result: bytes | Refused) -> None:
        if self.is_over:
            return
        if isinstance(result, Unanswered):
            result = Refused(ErrorCode.NOBODY_LISTENS, f"{self.body.to}: its node has gone")
        if isinstance(result, Refused) and result.code == ErrorCode.NOBODY_LISTENS and self.nodes:
            try:
                self.ask_next(result)
                return
            except Refused as refusal:
                result = refusal
        self.is_over = True
        self.answer(result)

    def take_back(self) -> None:
        """Nobody waits for it any more."""
        if self.is_over:
            return
        self.is_over = True
        neighbours = self.distant.neighbours
        neighbours.calls.forget(self.call)
        # It ends there when its time is over, or this node is declared dead.
        with suppress(Refused):
            neighbours.note(self.node, Unasked(self.body.number))


@attrs.define(eq=False)
class DistantRequests:
    """See the module. It is the `Elsewhere` of `requests`."""

    neighbours: Neighbours
    groups: GroupShares
    requests: Requests
    _numbers: "count[int]" = attrs.field(init=False, factory=lambda: count(1))
    _here: dict[tuple[str, int], int] = attrs.field(init=False, factory=dict)
    """The requests of other nodes that wait here, by node and number there."""

    def __attrs_post_init__(self) -> None:
        self.requests.elsewhere = self
        self.neighbours.on(Asked, self._asked)
        self.neighbours.on(Unasked, self._unasked)
        self.neighbours.on_gone.append(self._gone)

    def ask(
        self,
        to: str,
        data: bytes,
        info: ClientInfo | None,
        due: float,
        answer: OnAnswer,
        refusal: Refused,
    ) -> Callable[[], None]:
        """Ask on another node, and return what takes it back. `answer` is called once, later. Raises
        `refusal` where no other node can have anybody to ask."""
        number = next(self._numbers)
        nodes = self._nodes_for(to)
        # Not always the same first: each answers as many as the others.
        first = number % len(nodes) if nodes else 0
        body = Asked(number, to, data, info, None)
        asking = _Asking(self, body, [*nodes[first:], *nodes[:first]], due, answer)
        asking.ask_next(refusal)
        return asking.take_back

    def _nodes_for(self, to: str) -> Sequence[str]:
        fd = direct_fd(to)
        if fd is None:
            return self.groups.nodes_of(to)
        node = self.neighbours.node_of(fd)
        return [] if node is None else [node]

    # those of others

    def _asked(self, sender: str, asked: Asked, answer: Answer) -> float:
        key, meter = (sender, asked.number), self.requests.router.meter
        before = meter.done
        due = inf if asked.seconds is None else trio.current_time() + asked.seconds
        end = partial(self._end, key, answer)
        try:
            self._here[key] = self.requests.ask_here(asked.to, asked.data, asked.info, end, due)
        except Refused as refusal:
            answer(refusal)
        return COMMAND + meter.done - before

    def _end(self, key: tuple[str, int], answer: Answer, result: bytes | Refused) -> None:
        self._here.pop(key, None)
        answer(result)

    def _unasked(self, sender: str, unasked: Unasked, answer: Answer) -> float:
        number = self._here.pop((sender, unasked.number), None)
        if number is not None:
            self.requests.forget(number)
        return COMMAND

    def _gone(self, node: str) -> None:
        for key in [key for key in self._here if key[0] == node]:
            self.requests.forget(self._here.pop(key))
