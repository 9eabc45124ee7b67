"""Views of a node, by name: of this one, of another, or of all, side by side.

Rules:

1. A view only looks. So an operator who may look here may look at every node, and no right to change anything
   goes from one node to another this way.
2. Each node is asked for its bounded part, in one message of `MOST_BYTES`. It does the work in turns with
   everything else, for `AT_ONCE` at once, and for as long as anybody waits for it.
3. A node that does not answer is named, with the reason: it is never left out in silence.
"""

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Final, TypeAlias, TypeVar

import attrs
import trio
from msgspec import Struct

from broker.core.json_reader import BadJson, read
from broker.errors import ErrorCode, Refused
from broker.protocols.json_text import written
from broker.routing.mail import Look
from broker.routing.neighbourhood import Neighbourhood
from broker.routing.neighbours import NodeInfo
from broker.routing.open_calls import CALL_SECONDS, Answer

MOST_BYTES: Final = 2**20
"""Bytes of one answer, such as the topics of a node. A page of a hundred rows has 50 to 100 KB."""

AT_ONCE: Final = 32
"""Views that are being made for other nodes: eight nodes with four open pages each. One of ten thousand
connections takes 30 ms of the loop, so that is a second of it at worst, in turns."""

View: TypeAlias = Callable[[bytes], Awaitable[bytes]]
"""Makes a view, from parameters in JSON to JSON. Raises `Refused`."""

S = TypeVar("S", bound=Struct)


def view_of(params: type[S], look: Callable[[S], Awaitable[object]]) -> View:
    """A view whose parameters are read as a struct; what `look` returns is written as JSON."""

    async def view(data: bytes) -> bytes:
        try:
            asked = read(data or b"{}", params)
        except BadJson as error:
            raise Refused(ErrorCode.BAD_REQUEST, str(error)) from None
        return written(await look(asked))

    return view


@attrs.frozen
class Seen:
    """The answer of a node: JSON, or the reason why there is none."""

    node: NodeInfo
    answer: bytes | Refused


class Views:
    """The views of one node, and its way to those of all others."""

    def __init__(self, neighbourhood: Neighbourhood | None, name: str) -> None:
        self._neighbours = None if neighbourhood is None else neighbourhood.neighbours
        self._neighbourhood = neighbourhood
        self._name = name
        self._views: dict[str, View] = {}
        self._at_work = 0
        if self._neighbours is not None:
            self._neighbours.on(Look, self._look)

    def add(self, name: str, view: View) -> None:
        """Let this be seen of this node, by those who may look."""
        self._views[name] = view

    # asking

    @property
    def here(self) -> NodeInfo:
        """This node."""
        return NodeInfo("" if self._neighbours is None else self._neighbours.id, self._name)

    def nodes(self) -> list[NodeInfo]:
        """This node, then all others by name."""
        others = [] if self._neighbours is None else self._neighbours.nodes()
        return [self.here, *[each for each in others if each.id != self.here.id]]

    async def of(self, node: str, name: str, params: object) -> bytes:
        """The answer of one node, by its id; "" for this one. Raises `Refused`: the node's own refusal, 100
        if it does not answer, 102 where there is no such node. Cancelled, nothing is left behind here."""
        if node in ("", self.here.id):
            return await self._show(name, written(params))
        if self._neighbours is None or all(node != each.id for each in self.nodes()):
            raise Refused(ErrorCode.UNKNOWN_CHANNEL, f"no node has the id {node!r:.40}")
        return await self._neighbours.ask(node, Look(name, written(params)))

    async def of_all(self, name: str, params: object, nodes: Sequence[str] = ()) -> list[Seen]:
        """The answers of the nodes with these ids, or of all, in the order of `nodes`. Never raises for
        another node; see rule 3. Cancelled, nothing is left behind here."""
        asked = [each for each in self.nodes() if not nodes or each.id in nodes]
        data, here = written(params), self.here.id
        seen: dict[str, bytes | Refused] = {}
        if any(each.id == here for each in asked):
            seen[here] = await self._show(name, data)
        if self._neighbours is not None:
            others = [each.id for each in asked if each.id != here]
            seen |= await self._neighbours.ask_all(Look(name, data), others)
        return [Seen(each, seen[each.id]) for each in asked]

    # answering

    async def _show(self, name: str, params: bytes) -> bytes:
        view = self._views.get(name)
        if view is None:
            raise Refused(ErrorCode.METHOD_NOT_FOUND, f"nothing is called {name!r:.40} here")
        return await view(params)

    def _look(self, sender: str, asked: Look, answer: Answer) -> float:
        assert self._neighbourhood is not None
        self._neighbourhood.start_soon(partial(self._answer, asked, answer))
        return 0.0

    async def _answer(self, asked: Look, answer: Answer) -> None:
        if self._at_work >= AT_ONCE:
            text = f"{AT_ONCE} looks at this node are being taken already"
            answer(Refused(ErrorCode.TOO_MANY_REQUESTS, text))
            return
        self._at_work += 1
        try:
            with trio.move_on_after(CALL_SECONDS):  # then nobody waits for it any more
                shown = await self._show(asked.name, asked.params)
                if len(shown) > MOST_BYTES:
                    text = f"{asked.name} has {len(shown)} bytes: more than one message may hold"
                    raise Refused(ErrorCode.LIMIT_EXCEEDED, text)
                answer(shown)
        except Refused as refusal:
            answer(refusal)
        finally:
            self._at_work -= 1
