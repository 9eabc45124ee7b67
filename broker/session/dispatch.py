"""Messages of one peer, in order: bytes in, decisions out.

`take` carries out all that waits for nobody, in the task that reads; `finish` does the rest, in a
task that may wait. A busy publisher's messages never see the second.

An exception that is kept holds the frames that it came through, and they it: all that came with one
message, until the garbage collector comes by. So none stays in a variable that outlives its answer.

Rules:

1. Nothing overtakes: a command is carried out when all that came before it are. Hooks are asked about
   different topics side by side (`questions`).
2. A peer that has had its turn goes behind all others, in the middle of a message if need be.
3. A client that has yet to take a large reply is served on when it has.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from operator import attrgetter
from typing import Final

import attrs
import trio

from broker.core.session import Phase, PhaseEvent
from broker.core.usage import ConnectionUsage
from broker.core.work import (
    ALONE,
    BURST,
    COMMAND,
    DECODED_KILOBYTE,
    FIRST_MESSAGE,
    FRAME,
    PUBLICATION,
    REFUSED,
)
from broker.errors import CloseCode, Disconnect, ErrorCode, Refused
from broker.hooks import Connection
from broker.protocols.centrifuge_json import CENTRIFUGE_JSON, is_connect
from broker.protocols.codec import Codec, Result, steps_of
from broker.protocols.commands import (
    METHODS,
    BadCommand,
    Command,
    FaultyCommand,
    PublishCommand,
    Unread,
)
from broker.protocols.json_text import is_json_line
from broker.routing.recipients import Peer
from broker.routing.turns import Share
from broker.session.commands import (
    Handler,
    History,
    Presence,
    PresenceStats,
    SubRefresh,
    Subscribe,
    Unsubscribe,
    ask_publish,
    hand_to_app,
)
from broker.session.connect import Connect, Refresh
from broker.session.expiry import end_expired
from broker.session.orders import Orders
from broker.session.questions import Questions, Turn, topic_of
from broker.session.replies import Client
from broker.session.rpc import Rpc, Send
from broker.session.services import Services
from broker.transport.lane import Batch
from broker.transport.tasks import StartSoon

Sized = tuple[Command, float]
"""A command, and its share of the bytes of its message."""

_REQUESTS_OF: Final = attrgetter(*METHODS)
_PONG: Final = Command()
_CONNECTED: Final = Phase.CONNECTED

_FEW: Final = 32
"""Publishes that are decoded without a look at how many there is room for."""

_ASKED_AGAIN: Final = 3
"""Times that a hook is asked anew because the client was another user by then: a program that changes it each
time would never be answered."""

_LARGE: Final = BURST / DECODED_KILOBYTE * 1024
"""Bytes of a message that nobody may take apart without a turn: 16 KB."""

_HUGE: Final = 2**17
"""Bytes of a publish that is no case for the hot path: to decode it is most of the work, 0.3 ms."""


class Publish(Handler):
    """The one command that is answered when its batch is done."""

    def must_ask(self, client: Client, command: Command) -> bool:
        assert command.publish is not None
        return client.services.hooks.publish is not None and bool(command.publish.data)

    async def ask(self, client: Client, command: Command) -> object:
        request = command.publish
        assert request is not None
        return await ask_publish(client, request.channel, client.payload(request.data))

    def weigh(self, client: Client, command: Command, answer: object = None) -> float:
        assert command.publish is not None
        return client.services.router.weigh(command.publish.channel)

    def is_held(self, client: Client, command: Command) -> bool:
        assert command.publish is not None
        size = len(command.publish.data)
        return client.services.router.engine.is_full(client.peer.allowance, size)

    def act(self, client: Client, command: Command, answer: object) -> None:
        request = command.publish
        assert request is not None
        data = answer if isinstance(answer, bytes) else client.payload(request.data)
        publish(client, command.id, request.channel, data)


def publish(client: Client, request_id: int, topic: str, data: bytes) -> None:
    """Publish what a client sent, if it may; the reply waits for the end of the batch, or for the
    engine."""
    refusal, dones = None, None
    try:
        if not data:
            raise Refused(ErrorCode.BAD_REQUEST, "publish without data")
        client.check_publish(topic)
        opaque = client.codec.opaque_payloads and not is_json_line(data)
        router = client.services.router
        peer = client.peer
        dones = router.publish_all(topic, (data,), peer.info, opaque, peer.allowance)
    except Refused as error:
        refusal = error
    if dones is not None:
        client.answer_when_kept(dones, (request_id,))
    elif request_id:
        client.answer_publishes((request_id,), refusal)
    if client.services.logs_commands:
        _log_command(client, request_id, "publish", topic, refusal)
    del refusal  # see the module: it holds this frame


HANDLERS: Final[dict[str, Handler]] = {
    "connect": Connect(),
    "subscribe": Subscribe(),
    "unsubscribe": Unsubscribe(),
    "publish": Publish(),
    "presence": Presence(),
    "presence_stats": PresenceStats(),
    "history": History(),
    "rpc": Rpc(),
    "send": Send(),
    "refresh": Refresh(),
    "sub_refresh": SubRefresh(),
}


class _AnswerToPing(Handler):
    def is_held(self, client: Client, command: Command) -> bool:
        return False

    def act(self, client: Client, command: Command, answer: object) -> None:
        client.peer.answered_at = trio.current_time()


class _ToRead(Handler):
    """The next command is dear to read: what was read of it is paid for, and its turn waited for."""

    def is_held(self, client: Client, command: Command) -> bool:
        return False

    def weigh(self, client: Client, command: Command, answer: object = None) -> float:
        assert isinstance(command, Unread)
        return command.work

    def act(self, client: Client, command: Command, answer: object) -> None:
        client.services.router.meter.add(self.weigh(client, command))


class _Unacceptable(Handler):
    """A command that breaks the protocol's grammar."""

    def __init__(self, methods: Sequence[str]) -> None:
        self._methods = methods

    def act(self, client: Client, command: Command, answer: object) -> None:
        if not command.id:
            raise Disconnect(CloseCode.BAD_REQUEST, "bad request: a command without an id")
        if self._methods:
            raise Refused(ErrorCode.BAD_REQUEST, "more than one method in a command")
        raise Refused(ErrorCode.METHOD_NOT_FOUND)


class _Faulty(Handler):
    """A command that could be told apart, and not be read."""

    def __init__(self, fault: str) -> None:
        self._fault = fault

    def act(self, client: Client, command: Command, answer: object) -> None:
        raise Refused(ErrorCode.BAD_REQUEST, self._fault)


class _OutOfPlace(Handler):
    def act(self, client: Client, command: Command, answer: object) -> None:
        raise Disconnect(CloseCode.BAD_REQUEST, "bad request: connect comes first, and once")


_ANSWER_TO_PING: Final = _AnswerToPing()
_TO_READ: Final = _ToRead()
_OUT_OF_PLACE: Final = _OutOfPlace()


@attrs.define(eq=False)
class Dispatcher:
    """Carries out what one peer sends.

    `codec` is that of a peer which has asked for one; of any other the first message decides.
    """

    services: Services
    peer: Peer
    orders: Orders
    connection: Connection
    codec: Codec | None
    connect_fields: Result
    start_soon: StartSoon
    """Starts a task in the connection's own nursery."""
    client: Client | None = attrs.field(init=False, default=None)
    _left: Iterator[Sized] | None = attrs.field(init=False, default=None)  # of a begun message
    _share: Share = attrs.field(init=False)
    _read: int = attrs.field(init=False, default=0)  # see `work_off`
    questions: Questions = attrs.field(init=False)
    """The commands that wait for an answer, their own or one before it."""

    def __attrs_post_init__(self) -> None:
        self.questions = Questions(self, self.start_soon)
        self._share = self.peer.allowance = Share(turns=self.services.router.turns)

    def take(self, batch: Batch) -> Batch:
        """Carry out what a batch begins with, as far as nobody has to be waited for; return the rest.

        Never waits. Raises `Disconnect`. Unless its share `is_used_up`, the rest is for `finish`.
        """
        share = self._share
        share.is_used_up = False
        if share.is_low() and not share.begin():
            return batch
        if self.peer.outbox.replies_wait and self._peer_is_behind:
            return batch
        done = 0
        try:
            done = self._take_publishes(batch)
            if 0 < done < len(batch):
                share.is_used_up = True
            while done < len(batch) and not share.is_used_up:
                if not self.peer.is_established:
                    return []  # what nobody carries out costs nobody anything, and nothing is charged for it
                payload = batch[done][1]
                if not self._may_take_apart(payload):
                    break
                client = self.client or self._begin(payload)
                if client is None or not self._take_message(client, payload):
                    break
                done += 1
        finally:
            if self.client is not None:
                self.client.settle()
        return batch[done:]

    def take_read(self, batch: Batch, read: int = 0) -> Batch:
        """Take a batch as it has come; return what is left for `work_off`. A first message is left, since
        somebody has to enter with it.

        `read`: bytes of this peer that have been read by now. Where they are more than they were, others ran
        meanwhile; one read may come in a thousand batches, between which nobody else has run. Never waits.
        Raises `Disconnect`.
        """
        share = self._share
        if read > self._read:
            self._read = read
            if share.turns.latest is share:
                share.renew()
        share.left -= len(batch) * FRAME
        if self.client is None and self.peer.phase is Phase.OPEN:
            return batch
        share.narrow()
        return self.take(batch)

    async def work_off(self, batch: Batch) -> Batch:
        """Go on with what `take_read` has left, in as many turns as that needs; return what is left for
        `finish`. Raises `Disconnect`. Cancelled, it leaves what it has not begun.
        """
        share = self._share
        if self.client is None and self.peer.phase is Phase.OPEN:
            await self.services.router.turns.enter(FIRST_MESSAGE)
            share.narrow()
            batch = self.take(batch)
        while share.is_used_up and self.peer.is_established:
            await share.wait_turn()
            batch = self.take(batch)
        return [] if batch and not self.peer.is_established else batch

    async def pay(self, work: float) -> None:
        """Wait until so much may be done for this peer before its messages are there, and count it. Returns
        at once, without a checkpoint, where that is so now. Cancelled, it has counted nothing."""
        await self._share.wait_slice(work)
        self._share.spend(work)
        self.services.router.meter.add(work)

    async def finish(self, batch: Batch) -> None:
        """Carry out the commands that `take` has left of a batch, and wait for the answers of those who are
        asked.

        It may return while `questions` are open. Raises `Disconnect`, and what the app's hook for
        plain messages raises. Cancelled, it leaves what it has not begun.
        """
        order: tuple[int, str] | None = None
        try:
            await self._finish(batch)
        except Disconnect as error:
            order = error.code, error.reason
        finally:
            # Answers to publishes go out, whatever the message behind them was.
            self.settle()
        if order is not None:
            await self.questions.wait_none()
            raise Disconnect(*order)

    async def _finish(self, batch: Batch) -> None:
        if not self.questions.turns:
            batch = await self.work_off(self.take_read(batch))
        while batch and self.peer.is_established:
            opcode, payload = batch[0]
            client = self.client or self._begin(payload)
            if client is not None:
                await self._finish_commands(client, batch)
                return
            await self._share.wait_room()
            self._note_plain(len(payload))
            await hand_to_app(self.services, self.connection, opcode, payload)
            batch = await self.work_off(self.take_read(batch[1:]))

    def settle(self) -> None:
        """Send the answers to what has been published."""
        if self.client is not None:
            self.client.settle()

    def let_go(self) -> None:
        """Drop what has come and was not carried out, and all that points back here. The last call."""
        self._left = self.client = None
        del self.questions

    # the first message

    def _begin(self, payload: bytes) -> Client | None:
        """Take the peer for a client, if that is what its first message says; None for a plain one."""
        if self.peer.phase is Phase.OPEN and (self.codec is not None or is_connect(payload)):
            codec = self.codec or CENTRIFUGE_JSON
            if self.peer.packed is not None:
                codec = self.peer.packed.of(codec)
            self.client = Client(
                self.services,
                self.peer,
                self.orders,
                self.connection,
                codec,
                self.connect_fields,
            )
        return self.client

    def _note_plain(self, size: int) -> None:
        """Count a plain message; send a peer away that sends too much: it knows no error reply."""
        self._share.spend(COMMAND + size / 1024 * DECODED_KILOBYTE)
        if not self._is_within(size):
            raise Disconnect(CloseCode.POLICY_VIOLATION, "too many messages")
        if not self.orders.declare_plain():
            self.peer.transition(PhaseEvent.MESSAGE)

    # the hot path

    def _take_publishes(self, batch: Batch) -> int:
        """Carry out messages that are one publish each; return how many, 0 if the batch is anything
        else or somebody has to be asked."""
        client, services, router = self.client, self.services, self.services.router
        may_publish_now = (
            services.hooks.publish is None
            and self.peer.phase is _CONNECTED
            and not services.rate_limits.are_active
            and not services.logs_commands
            and not router.engine.is_full(self.peer.allowance)
        )
        if client is None or self._left is not None or not may_publish_now or not batch:
            return 0
        # One message, as many reads hold, needs no comprehension: that is a call.
        payloads = [batch[0][1]] if len(batch) == 1 else [payload for _, payload in batch]
        if len(payloads[0]) > _HUGE:
            return 0  # to be taken apart in a turn, at its price
        if len(payloads) > _FEW:
            # As many as there is room for at most; to decode all of them is half of the work.
            del payloads[int(max(self._share.slice, self._share.left) / PUBLICATION) + 1 :]
        commands = client.codec.decode_publishes(payloads)
        if not commands:
            return 0
        topic = client.open_topic()
        if commands[0].publish.channel == topic and topic and not client.codec.opaque_payloads:
            if not self._share.has_room(router.weigh(topic)):
                return 0
            goes_together = len(commands) == 1 or router.takes_together(
                len(command.publish.data) for command in commands
            )
            if goes_together and self._publish_together(client, topic, commands):
                return len(commands)
        meter, share = router.meter, self._share
        for number, command in enumerate(commands):
            topic = command.publish.channel
            before = meter.done  # to begin a run is work as well
            if not share.has_room(router.weigh(topic)):
                return number
            # A copy: a Raw would keep the whole message that it is a part of.
            publish(client, command.id, topic, bytes(command.publish.data))
            share.spend(ALONE + meter.done - before)
        return len(commands)

    def _publish_together(
        self, client: Client, topic: str, commands: Sequence[PublishCommand]
    ) -> bool:
        """Carry out what nearly every read of a busy publisher holds: one topic, which is open to all.

        A fourth of what they cost one by one. False if they are anything else.
        """
        answered, contents = [], []
        for command in commands:
            request = command.publish
            data = request.data
            if request.channel != topic or not data:
                return False
            if command.id:
                answered.append(command.id)
            contents.append(bytes(data))
        router = self.services.router
        before = router.meter.done
        refusal, dones = None, None
        try:
            peer = client.peer
            dones = router.publish_all(topic, contents, peer.info, payer=peer.allowance)
        except Refused as error:
            refusal = error  # an fd that is gone
        if dones is not None:
            client.answer_when_kept(dones, answered)
        elif answered:
            client.answer_publishes(answered, refusal)
        del refusal  # see the module: it holds this frame
        self._share.spend(router.meter.done - before)
        return True

    # one message

    def _may_take_apart(self, payload: bytes) -> bool:
        """Whether a message may be decoded in this turn, if it is not yet; notes that the turn is over
        if not. Its commands are weighed later, one after the other."""
        if len(payload) <= _LARGE or self._left is not None or self._share.slice > 0:
            return True
        self._share.want_turn()
        return False

    def _commands(self, client: Client, payload: bytes) -> Iterator[Sized]:
        """The commands of a message, each with its share of the bytes. Raises `Disconnect`."""
        try:
            commands = client.codec.decode(payload)
            self.services.router.meter.add(len(payload) / 1024 * DECODED_KILOBYTE)
            size = len(payload) / max(1, len(commands))
            for command in steps_of(commands):
                yield command, 0.0 if isinstance(command, Unread) else size
        except BadCommand as error:
            raise Disconnect(CloseCode.BAD_REQUEST, f"bad request: {error}") from None

    def _take_message(self, client: Client, payload: bytes) -> bool:
        """Carry out the commands of one message; false if it stopped before its end."""
        commands = self._left or self._commands(client, payload)
        self._left = None
        for command, size in commands:
            handler, method = self._handler(command)
            waits = handler.must_ask(client, command) or handler.is_held(client, command)
            if waits or not self._share.has_room(handler.weigh(client, command)):
                self._left = chain([(command, size)], commands)
                return False
            if self._is_admitted(client, command, size):
                self._act(client, command, handler, method, size)
            if not self.peer.is_established:
                break
            if self._peer_is_behind:
                self._left = commands
                return False
        return True

    async def _finish_commands(self, client: Client, batch: Batch) -> None:
        """The same for all that is left: waits for those who are asked, for the peer, and for its turn."""
        begun, self._left = self._left, None
        rest = batch if begun is None else batch[1:]
        messages = (self._commands(client, payload) for _, payload in rest)
        commands = chain(begun or (), chain.from_iterable(messages))
        if self._peer_is_behind:
            await self.peer.outbox.wait_empty()
        for (command, size), following in _with_following(commands):
            handler, method = self._handler(command)
            if handler is not _ANSWER_TO_PING and handler is not _TO_READ:
                if not self._is_within(size):
                    await self.questions.wait_none()
                    self._refuse_excess(client, command)
                    continue
                topic = topic_of(command, method)
                turn = Turn(client, command, handler, method, size, topic)
                await self.questions.join(turn, following)
            else:
                await self._share.wait_room(handler.weigh(client, command))
                self._act(client, command, handler, method, size)
            if not self.peer.is_established:
                break

    async def carry_out(self, turn: Turn) -> None:
        """Carry out a command, now that its turn has come, when the peer has taken everything before it and
        others have had their turn."""
        if self._peer_is_behind:
            await self.peer.outbox.wait_empty()
        client, command, handler = turn.client, turn.command, turn.handler
        while handler.is_held(client, command) and self.peer.is_established:
            if client.pending:
                await client.wait_kept()
            else:
                await self.services.router.engine.wait_room()
        await _wait_ready(turn, self._share)
        for _ in range(_ASKED_AGAIN):
            if not (turn.is_answered_for_another and self.peer.is_established):
                break
            await turn.ask()
            if turn.is_over:
                return  # cancelled
            await _wait_ready(turn, self._share)
        if turn.is_answered_for_another:
            turn.failure = Refused(ErrorCode.INTERNAL)
        connection = self.services.connections.get(self.peer.fd)
        if connection is not None:
            end_expired(connection, trio.current_time())  # which is looked at once a second
        self._act(client, command, handler, turn.method, turn.size, turn)

    @property
    def _peer_is_behind(self) -> bool:
        """Whether it has yet to take a large reply, before it is served on."""
        return self.peer.outbox.replies_wait and self.peer.is_established

    def _handler(self, command: Command) -> tuple[Handler, str]:
        """The handler of a command, and the name of its method; "" where it is not just one."""
        requests = _REQUESTS_OF(command)
        methods = [name for name, each in zip(METHODS, requests, strict=True) if each is not None]
        if not methods and not command.id:
            return (_TO_READ if isinstance(command, Unread) else _ANSWER_TO_PING), ""
        if isinstance(command, FaultyCommand):
            return _Faulty(command.fault), ""
        if len(methods) != 1 or not (command.id or methods[0] in ("send", "publish")):
            return _Unacceptable(methods), ""
        if (self.peer.phase is Phase.CONNECTED) == (methods[0] == "connect"):
            return _OUT_OF_PLACE, ""
        return HANDLERS[methods[0]], methods[0]

    def _act(
        self,
        client: Client,
        command: Command,
        handler: Handler,
        method: str,
        size: float,
        turn: Turn | None = None,
    ) -> None:
        """Decide and act, and charge it to this peer; `turn` has the answer, if somebody was asked.
        No checkpoint."""
        if not self.peer.is_established:
            return
        if method != "publish":
            client.settle()
        before = self.services.router.meter.done
        try:
            answer = None if turn is None else turn.take_answer()
            result = handler.act(client, command, answer)
            if result is not None and command.id:
                client.reply(command.id, method, result)
        except Exception as error:
            self._note_outcome(client, command, method, error)
            self.services.router.meter.add(REFUSED)
            if isinstance(error, Disconnect) or (
                method == "send" and not isinstance(error, Refused)
            ):
                raise
            _answer_failure(client, command, method, error)
        else:
            # The outcome of a publish is logged where it is carried out; the answer to a ping has no method,
            # and says nothing.
            if method not in ("publish", ""):
                self._note_outcome(client, command, method)
        work = COMMAND + size / 1024 * DECODED_KILOBYTE
        self._share.spend(work + self.services.router.meter.done - before)

    # limits

    def _is_admitted(self, client: Client, command: Command, size: float) -> bool:
        """Whether a command is within the limits; if not, it is answered with 111.

        Raises `Disconnect` when that has happened too often.
        """
        if (
            not self.services.rate_limits.are_active
            or command == _PONG
            or isinstance(command, Unread)
        ):
            return True
        if self._is_within(size):
            return True
        self._refuse_excess(client, command)
        return False

    def _refuse_excess(self, client: Client, command: Command) -> None:
        refusal = Refused(ErrorCode.TOO_MANY_REQUESTS)
        client.refuse(command.id, refusal)
        self._note_outcome(client, command, self._handler(command)[1], refusal)

    def _note_outcome(
        self, client: Client, command: Command, method: str, outcome: Exception | None = None
    ) -> None:
        """Log how a command ended, where all are logged."""
        if self.services.logs_commands:
            _log_command(client, command.id, method, _subject(command, method), outcome)

    def _is_within(self, size: float) -> bool:
        limits, peer = self.services.rate_limits, self.peer
        if not limits.are_active:
            return True
        if peer.usage is None:
            peer.usage = ConnectionUsage()
        return limits.admits(peer.usage, peer.user, size, trio.current_time())


async def _wait_ready(turn: Turn, share: Share) -> None:
    """Wait until a command may be carried out, and all that it needs to know is known."""
    client, command, handler = turn.client, turn.command, turn.handler
    if turn.failure is None:
        await share.wait_room(handler.weigh(client, command, turn.answer))
        # The step that may have to wait comes last: all that is known holds until the next checkpoint.
        try:
            await client.fetch(handler.topics(client, command, turn.answer))
        except Refused as refusal:
            turn.failure = refusal.with_traceback(None)


def _with_following(commands: Iterator[Sized]) -> Iterator[tuple[Sized, Command | None]]:
    """Each command with the one behind it, None at the end. A fault of that one is raised when its turn
    comes."""
    current = next(commands, None)
    while current is not None:
        if isinstance(current[0], Unread):
            yield current, None  # before it is read
            current = next(commands, None)
            continue
        following: Sized | None = None
        order: tuple[int, str] | None = None
        try:
            following = next(commands, None)
        except Disconnect as error:
            order = error.code, error.reason
        is_known = following is not None and not isinstance(following[0], Unread)
        yield current, following[0] if is_known and following is not None else None
        if order is not None:
            raise Disconnect(*order)
        current = following


def _answer_failure(client: Client, command: Command, method: str, error: Exception) -> None:
    """Answer a command that was refused, or whose hook has failed."""
    if isinstance(error, Refused):
        client.refuse(command.id, error)
        return
    client.services.log.error("hook_failed", hook=method, fd=client.peer.fd, exc_info=error)
    client.refuse(command.id, Refused(ErrorCode.INTERNAL))


def _subject(command: Command, method: str) -> str:
    """The topic that a command is about, or the method that it calls."""
    if command.rpc is not None:
        return command.rpc.method
    return topic_of(command, method) or ""


def _log_command(
    client: Client, request_id: int, method: str, about: str, outcome: Exception | None
) -> None:
    """Log a command with the id of its request, and how it ended: `ok`, or the code of the error reply
    or of the close."""
    fields: dict[str, object] = {"outcome": "ok"}
    if isinstance(outcome, Refused):
        fields = {"outcome": "error", "code": int(outcome.code), "reason": outcome.message}
    elif isinstance(outcome, Disconnect):
        fields = {"outcome": "disconnect", "code": int(outcome.code), "reason": outcome.reason}
    elif outcome is not None:
        fields = {"outcome": "error", "code": int(ErrorCode.INTERNAL), "reason": "hook failed"}
    client.services.log.debug(
        "command",
        fd=client.peer.fd,
        user=client.peer.user,
        request=request_id,
        method=method or "none",
        about=about,
        **fields,
    )
