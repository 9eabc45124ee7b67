"""This node among the others: the mail from them, the mail to them, and the answers.

The ways of a message: a *note* wants no answer; a *call* is answered once, by its result, or by a
refusal of ours when its node has died or its time is over. A module that serves other nodes registers
by `on`.

Rules:

1. Nothing here waits but `ask` and `ask_all`. An answer is handed to a function.
2. A request of a node is carried out when it comes, at its place among the publications, and its work is told
   to the engine, which lets others run in between.
3. Mail that cannot be read, or comes too late, is dropped and counted.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, TypeAlias, TypeVar

import attrs
import structlog
import trio

from broker.core.fd_blocks import FdBlocks
from broker.core.messages import Fd
from broker.core.work import COMMAND
from broker.engines.cluster import ClusterLink
from broker.errors import Refused
from broker.routing.mail import Body, Call, Mail, Note, Result, read, write
from broker.routing.open_calls import CALL_SECONDS, Answer, OpenCalls, unanswered

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("broker.nodes")

NODE: Final = "node"
"""The notice with which a node begins: its name, and when it has started."""

FDS: Final = "fds "
"""How the notice of a block of fds begins; then comes its first number. It says where the block ends."""

Handler: TypeAlias = Callable[[str, Any, Answer], float]
"""Carries out a request: the id of the node that asks, its mail, and the way of the answer, which a note does
not need. Returns the work of it."""

OnNotice: TypeAlias = Callable[[str, str, bytes | None], None]

M = TypeVar("M", bound=Mail)


@attrs.frozen
class NodeInfo:
    """A node that shares the engine: its id, its name, and when it has started, in Unix seconds."""

    id: str
    name: str
    started_at: float = 0.0


def no_answer(value: bytes | Refused) -> None:
    """Takes the answer to a call where nobody waits for it."""


class Neighbours:
    """See the module. It is the `Listener` of its cluster."""

    def __init__(self, cluster: ClusterLink, name: str, started_at: float) -> None:
        self.cluster = cluster
        self.blocks: FdBlocks = FdBlocks()
        self.calls: OpenCalls = OpenCalls()
        self.misread: int = 0
        """Messages that could not be read."""
        self.on_gone: list[Callable[[str], None]] = []
        self.on_restate: list[Callable[[], None]] = []
        self.on_lapse: list[Callable[[], None]] = []
        self.on_bury: Callable[[str], None] = no_burial
        self.name = name
        self._started_at = started_at
        self._nodes: dict[str, NodeInfo] = {}
        self._handlers: dict[type[Mail], Handler] = {}
        self._notices: list[tuple[str, OnNotice]] = [(FDS, self._block), (NODE, self._node)]
        cluster.listen(self)

    # who is there

    @property
    def id(self) -> str:
        """This node."""
        return self.cluster.node

    def nodes(self) -> Sequence[NodeInfo]:
        """The nodes that are not known to be dead, by name; this one is among them."""
        return sorted(self._nodes.values(), key=lambda node: (node.name, node.id))

    def name_of(self, node: str) -> str:
        """The name of a node, or its id where that is not known."""
        info = self._nodes.get(node)
        return node if info is None else info.name

    def others(self) -> list[str]:
        """All but this one."""
        return [node for node in self._nodes if node != self.id]

    def node_of(self, fd: Fd) -> str | None:
        """The other node whose connection this may be; None if it can be none of any."""
        node = self.blocks.node_of(fd)
        return None if node == self.id else node

    def introduce(self) -> None:
        """Tell the others that this node is here."""
        self.cluster.post(NODE, f"{self._started_at} {self.name}".encode())

    # what others may ask for

    def on(self, kind: type[M], handler: Callable[[str, M, Answer], float]) -> None:
        """Have this do what others ask for with mail of a kind."""
        self._handlers[kind] = handler

    def on_notice(self, prefix: str, hook: OnNotice) -> None:
        """Have this told of notices whose name begins so; the rest of that, and the value, None for one
        that is down."""
        self._notices.append((prefix, hook))

    # what goes to others

    def note(self, node: str, body: Body) -> None:
        """Tell one node. Raises `Refused` (100) while nothing can be told."""
        self.cluster.tell(node, write(Note(body)))

    def announce(self, body: Body) -> bool:
        """Tell all others; false if nothing can be told now."""
        try:
            self.cluster.announce(write(Note(body)))
        except Refused:
            return False
        return True

    def call(self, node: str, body: Body, answer: Answer, *, seconds: float = CALL_SECONDS) -> int:
        """Ask one node; `answer` is called later, never from here. Returns the number of the call.

        Raises `Refused` (100) while nothing can be told, and for a node that has gone.
        """
        if node not in self._nodes:
            raise unanswered(f"node {node} has gone")
        number = self.calls.next_number()
        self.cluster.tell(node, write(Call(number, body)))
        self.calls.add(number, node, answer, seconds)
        return number

    async def ask(self, node: str, body: Body, *, seconds: float = CALL_SECONDS) -> bytes:
        """Ask one node, and wait for the answer. Raises `Refused`: with what the node says, and 100 if it
        does not answer. Cancelled, it may do what it was asked for all the same."""
        (answer,) = (await self.ask_all(body, [node], seconds=seconds)).values()
        if isinstance(answer, Refused):
            raise answer
        return answer

    async def ask_all(
        self, body: Body, nodes: Sequence[str] | None = None, *, seconds: float = CALL_SECONDS
    ) -> Mapping[str, bytes | Refused]:
        """Ask these nodes, or all others, side by side; what each has said, or why it has not."""
        asked = self.others() if nodes is None else nodes
        answers: dict[str, bytes | Refused] = {}
        numbers: list[int] = []
        ended = trio.Event()

        def answer(node: str, value: bytes | Refused) -> None:
            answers[node] = value
            if len(answers) == len(asked):
                ended.set()

        for node in asked:
            try:
                numbers.append(self.call(node, body, partial(answer, node), seconds=seconds))
            except Refused as refusal:
                answer(node, refusal)
        try:
            if asked:
                await ended.wait()
        finally:
            for number in numbers:
                self.calls.forget(number)
        return answers

    # what comes from others

    def heard(self, sender: str, message: bytes) -> float:
        try:
            envelope = read(message)
        except ValueError as error:
            self.misread += 1
            log.warning("misread", node=self.name_of(sender), reason=str(error)[:200])
            return COMMAND
        if isinstance(envelope, Result):
            self.calls.end(envelope.number, envelope.answer)
            return COMMAND
        handler = self._handlers.get(type(envelope.body))
        if handler is None:
            return COMMAND
        answer: Answer = no_answer
        if isinstance(envelope, Call):
            answer = partial(self._answer, sender, envelope.number)
        elif sender == self.id:
            return COMMAND  # an announcement of its own, which it has acted on
        return COMMAND + handler(sender, envelope.body, answer)

    def _answer(self, node: str, number: int, answer: bytes | Refused) -> None:
        try:
            self.cluster.tell(node, write(Result.of(number, answer)))
        except Refused:
            pass  # the engine is down: who waits there is told so when its time is over

    def noticed(self, node: str, name: str, value: bytes | None) -> None:
        for prefix, hook in self._notices:
            if name.startswith(prefix):
                hook(node, name[len(prefix) :], value)

    def gone(self, node: str) -> None:
        # Not of one that was forgotten, such as what this node was before it lapsed.
        if node in self._nodes:
            log.info("node_gone", node=self.name_of(node), id=node)
        self._forget_node(node)

    def _forget_node(self, node: str) -> None:
        self.calls.end_all(f"node {self.name_of(node)} has gone", node)
        self.blocks.forget(node)
        for hook in self.on_gone:
            hook(node)
        self._nodes.pop(node, None)

    def bury(self, node: str) -> None:
        self.on_bury(node)

    def restate(self) -> None:
        for node in list(self._nodes):
            self._forget_node(node)
        self.introduce()
        for hook in self.on_restate:
            hook()

    def lapsed(self) -> None:
        # The node that this was is dead, for itself as for the others.
        log.error("node_lapsed", detail="it was declared dead: every client is told to reconnect")
        for node in list(self._nodes):
            self._forget_node(node)
        self.calls.end_all("this node was cut off")
        self.introduce()
        for hook in self.on_lapse:
            hook()

    def _node(self, node: str, rest: str, value: bytes | None) -> None:
        if value is None or rest:
            return
        started_at, _, name = value.decode().partition(" ")
        is_new = node not in self._nodes
        self._nodes[node] = NodeInfo(node, name, float(started_at))
        if is_new and node != self.id:
            log.info("node_came", node=name, id=node)

    def _block(self, node: str, first: str, value: bytes | None) -> None:
        if value is None:
            self.blocks.remove(node, int(first))
        else:
            self.blocks.add(node, range(int(first), int(value)))


def no_burial(node: str) -> None:
    """Until there is somebody who deals with it."""
