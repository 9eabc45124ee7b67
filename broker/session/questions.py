"""Questions of one client that are open: asked side by side, carried out in the order of their
commands.

Rules:

1. A command is carried out when all that came before it are, whichever answer was there first. So
   replies and effects come in the order of the commands, as if there had been one at a time.
2. Of two commands about one topic the second is asked about when the first is carried out, since the question
   may depend on it.
3. A command about no topic goes alone: it may change who the client is, or call the app, and that may matter
   for everything behind it.
4. Each question is a task in the connection's own nursery, and so is gone when the connection is.
   Where a backend is asked, it is cancelled as soon as the client has gone; a hook of the app has
   until the end that `end_soon` sets.
"""

from math import inf
from typing import Final, Protocol

import attrs
import trio

from broker.core.memory import Part
from broker.protocols.commands import Command
from broker.session.commands import Handler
from broker.session.ending import end_by
from broker.session.replies import Client
from broker.session.rpc import METHODS, target_of
from broker.transport.tasks import StartSoon

_ABOUT_A_TOPIC: Final = (
    *("subscribe", "unsubscribe", "sub_refresh"),
    *("publish", "presence", "presence_stats", "history"),
)


def topic_of(command: Command, method: str) -> str | None:
    """The topic that a command of one method is about; None where it is about more than one."""
    if method == "rpc":
        return target_of(command)
    if method not in _ABOUT_A_TOPIC:
        return None
    topic: str = getattr(command, method).channel
    return topic


@attrs.define(eq=False)
class Turn:
    """A command that has yet to be carried out, in its place behind others."""

    client: Client
    command: Command
    handler: Handler
    method: str
    size: float
    """Its share of the bytes of its message."""
    topic: str | None = None
    ends_with_client: bool = False
    """Whether its answer is of no use once the client has gone."""
    answer: object = None
    asked_as: str | None = None
    """The user of the client when somebody was asked last; None if nobody was."""
    failure: Exception | None = None
    is_over: bool = False
    """Whether nothing is left to be done: it was carried out, or cancelled."""
    scope: trio.CancelScope = attrs.field(init=False, factory=trio.CancelScope)
    is_open: bool = attrs.field(init=False, default=False)
    """Whether its answer is waited for."""

    def take_answer(self) -> object:
        """Return the answer, or raise what came in its place. Once: it is not kept."""
        failure, self.failure = self.failure, None
        try:
            if failure is not None:
                raise failure
            return self.answer
        finally:
            del failure  # it holds this frame

    @property
    def is_answered_for_another(self) -> bool:
        """Whether the client has become another user since somebody was asked about this topic."""
        is_about_user = self.topic is not None and self.asked_as is not None
        return is_about_user and self.failure is None and self.asked_as != self.client.peer.user

    async def ask(self) -> None:
        """Get the answer, or the exception that comes in its place. Cancelled, the turn is over.

        May be called again, for another answer.
        """
        if self.asked_as is not None:
            self.scope = trio.CancelScope(deadline=self.scope.deadline)
        self.is_open, self.asked_as = True, self.client.peer.user
        has_answer = False
        try:
            with self.scope:
                try:
                    self.answer = await self.handler.ask(self.client, self.command)
                except Exception as error:  # noqa: BLE001 - raised when its turn comes
                    # Without this very frame, which holds the turn: else each would keep the other.
                    trace = error.__traceback__
                    self.failure = error.with_traceback(trace and trace.tb_next)
                    del trace
                has_answer = True
        finally:
            self.is_open = False
            self.is_over = not has_answer


class Carrier(Protocol):
    """Carries commands out: the dispatcher, as its questions use it."""

    async def carry_out(self, turn: Turn) -> None:
        """Do what a command asks for, now that its turn has come."""


@attrs.define(eq=False)
class Questions:
    """The turns of one client, in order. `start_soon` starts a task in the connection's own nursery."""

    _carrier: Carrier
    _start_soon: StartSoon
    turns: tuple[Turn, ...] = attrs.field(init=False, default=())
    """The commands that wait for an answer, their own or one before it. A look at it is cheaper than a
    length of ours, and each read of a publisher takes one."""
    _is_proceeding: bool = attrs.field(init=False, default=False)
    _moved: trio.Event | None = attrs.field(init=False, default=None)
    _due: float = attrs.field(init=False, default=inf)
    _has_gone: bool = attrs.field(init=False, default=False)

    # joining: one task does, that of the session

    async def join(self, turn: Turn, following: Command | None) -> None:
        """Carry a command out when its turn comes, and ask about it as soon as may be.

        Returns once the next command, `following` if that is known, may be looked at. Waits for an
        answer only where nothing can be asked beside. Raises nothing: a failure is answered, or ends the
        connection.
        """
        client, command = turn.client, turn.command
        config, hooks = client.services.config, client.services.hooks
        at_once = config.questions_at_once
        if not turn.handler.must_ask(client, command):
            await (self.wait_none() if turn.topic is None else self._wait_room(at_once))
            self._enter(turn)
            await self._proceed()
            return
        turn.ends_with_client = hooks.is_lent(_hook_of(command, turn.method))
        client.settle()
        # Whether there is room for one more subscription is found out when it is asked about.
        rivals = len(client.peer.subscriptions) + len(self.turns)
        is_tight = turn.method == "subscribe" and rivals >= config.max_topics
        if turn.topic is None or is_tight or at_once == 1:
            await self.wait_none()
            await self._ask_here(turn)
            return
        await self._wait_room(at_once, turn.topic)
        if following is not None and _publishes_to(following, turn.topic):
            await self._ask_here(turn)  # a task costs as much as a hook that does little
        else:
            self._ask_beside(turn)

    async def wait_none(self) -> None:
        """Wait until all that came before are carried out, or cancelled."""
        while self.turns:
            await self._wait_moved()

    async def _wait_room(self, at_once: int, topic: str | None = None) -> None:
        """Wait until fewer than `at_once` are before it, and none about `topic`."""
        while len(self.turns) >= at_once or any(
            topic is not None and turn.topic == topic for turn in self.turns
        ):
            await self._wait_moved()

    def _ask_beside(self, turn: Turn) -> None:
        if self._takes_place(turn):
            turn.is_open = True
            self._start_soon(self._ask, turn)

    async def _ask_here(self, turn: Turn) -> None:
        if self._takes_place(turn):
            await self._ask(turn)

    def _takes_place(self, turn: Turn) -> bool:
        """Put it behind all others, unless there is no use in asking any more."""
        has_gone = self._has_gone and turn.ends_with_client
        if has_gone or not turn.client.peer.is_established:
            return False
        turn.scope.deadline = self._due
        self._enter(turn)
        return True

    def _enter(self, turn: Turn) -> None:
        """Add a turn, and charge its command, which may be all of a message."""
        self.turns += (turn,)  # few: `questions_at_once`
        turn.client.peer.holding.charge(Part.INCOMING, int(turn.size))

    def _leave(self) -> None:
        turn, *left = self.turns
        self.turns = tuple(left)
        turn.client.peer.holding.charge(Part.INCOMING, -int(turn.size))

    # the end

    def end_soon(self, due: float) -> None:
        """The client has gone, or is being closed: let questions to a backend end now, those to the
        app at `due` on Trio's clock. Never waits."""
        self._has_gone, self._due = True, due
        for turn in self.turns:
            if turn.ends_with_client:
                turn.scope.cancel()
            else:
                turn.scope.deadline = due

    # in turn

    async def _ask(self, turn: Turn) -> None:
        await turn.ask()
        await self._proceed()

    async def _proceed(self) -> None:
        """Carry out, in order, those whose turn it is; one task at a time does."""
        if self._is_proceeding:
            return
        self._is_proceeding = True
        client = None
        try:
            while self.turns and not self.turns[0].is_open:
                turn = self.turns[0]
                client = turn.client
                if not turn.is_over:
                    turn.is_over = True  # before it waits: cancelled there, it is not tried again
                    try:
                        await self._carrier.carry_out(turn)
                    except Exception as error:  # noqa: BLE001 - it ends this connection
                        end_by(client.services, client.peer.fd, error)
                self._leave()
                if self._moved is not None:
                    self._moved.set()
        finally:
            self._is_proceeding = False
            if client is not None:
                client.settle()

    async def _wait_moved(self) -> None:
        self._moved = trio.Event()
        await self._moved.wait()


def _publishes_to(command: Command, topic: str) -> bool:
    return command.publish is not None and command.publish.channel == topic


def _hook_of(command: Command, method: str) -> str:
    """The hook that a command of one method is asked of."""
    if command.rpc is not None and command.rpc.method in METHODS:
        return "publish"
    return method
