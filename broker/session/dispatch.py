"""Messages of one peer, in order: bytes in, decisions out.

`take` carries out all that waits for nobody, in the task that reads; `finish` does the rest, in a
task that may wait. A busy publisher's messages never see the second.

Rules:

1. Nothing overtakes: a message is not looked at before all that came before it is done.
2. A peer that has had its turn goes behind all others, in the middle of a message if need be.
3. A client that has yet to take a large reply is served on when it has.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Final

import attrs
import trio

from broker.core.session import Phase, PhaseEvent
from broker.core.usage import ConnectionUsage
from broker.errors import CloseCode, Disconnect, ErrorCode, Refused
from broker.hooks import Connection
from broker.protocols.centrifuge_json import CENTRIFUGE_JSON, is_connect
from broker.protocols.codec import Codec, Result
from broker.protocols.commands import METHODS, BadCommand, Command, FaultyCommand, PublishCommand
from broker.protocols.json_text import is_json_line
from broker.routing.recipients import Peer
from broker.session.commands import (
    Handler,
    History,
    NobodyAsked,
    Presence,
    PresenceStats,
    SubRefresh,
    Subscribe,
    Unsubscribe,
    ask_publish,
    hand_to_app,
)
from broker.session.connect import Connect, Refresh
from broker.session.orders import Orders
from broker.session.replies import NOTHING, Client
from broker.session.rpc import Rpc, Send
from broker.session.services import Services
from broker.transport.lane import Batch

Sized = tuple[Command, float]
"""A command, and its share of the bytes of its message."""

_TURN: Final = 512
"""How many publishes of a message, or of several in a row, are carried out before all others have
their turn: as many as one read holds, so that no run is cut short by it. 1 MiB holds 25,000."""

_COST: Final = 64
"""How many publishes any other command counts as: to list who is present on a busy topic takes a
millisecond, a checkpoint 10 µs."""

_BYTES: Final = 128
"""How many bytes of a command count as one publish more: in protobuf they may be as many fields of
two bytes, and 16 KiB of these take 7 ms to read."""

_PONG: Final = Command()


class Publish:
    """The one command that is answered when its batch is done."""

    def must_ask(self, client: Client, command: Command) -> bool:
        assert command.publish is not None
        return client.services.hooks.publish is not None and bool(command.publish.data)

    async def ask(self, client: Client, command: Command) -> object:
        request = command.publish
        assert request is not None
        return await ask_publish(client, request.channel, client.payload(request.data))

    def act(self, client: Client, command: Command, answer: object) -> None:
        request = command.publish
        assert request is not None
        data = answer if isinstance(answer, bytes) else client.payload(request.data)
        publish(client, command.id, request.channel, data)


def publish(client: Client, request_id: int, topic: str, data: bytes) -> None:
    """Publish what a client sent, if it may; the reply waits for the end of the batch."""
    try:
        if not data:
            raise Refused(ErrorCode.BAD_REQUEST, "publish without data")
        client.check_publish(topic)
        opaque = client.codec.opaque_payloads and not is_json_line(data)
        client.services.router.publish_all(topic, (data,), client.peer.info, None, opaque)
    except Refused as refusal:
        if request_id:
            client.add_reply(client.error(request_id, refusal))
    else:
        if request_id:
            client.add_reply(client.codec.reply(request_id, "publish", NOTHING))


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


class _AnswerToPing(NobodyAsked):
    def act(self, client: Client, command: Command, answer: object) -> None:
        pass


class _Unacceptable(NobodyAsked):
    """A command that breaks the protocol's grammar."""

    def __init__(self, methods: Sequence[str]) -> None:
        self._methods = methods

    def act(self, client: Client, command: Command, answer: object) -> None:
        if not command.id:
            raise Disconnect(CloseCode.BAD_REQUEST, "bad request: a command without an id")
        if self._methods:
            raise Refused(ErrorCode.BAD_REQUEST, "more than one method in a command")
        raise Refused(ErrorCode.METHOD_NOT_FOUND)


class _Faulty(NobodyAsked):
    """A command that could be told apart, and not be read."""

    def __init__(self, fault: str) -> None:
        self._fault = fault

    def act(self, client: Client, command: Command, answer: object) -> None:
        raise Refused(ErrorCode.BAD_REQUEST, self._fault)


class _OutOfPlace(NobodyAsked):
    def act(self, client: Client, command: Command, answer: object) -> None:
        raise Disconnect(CloseCode.BAD_REQUEST, "bad request: connect comes first, and once")


_ANSWER_TO_PING: Final = _AnswerToPing()
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
    connect_fields: Callable[[], Result]
    client: Client | None = attrs.field(init=False, default=None)
    turn_is_over: bool = attrs.field(init=False, default=False)
    """Whether `take` has stopped because all others should have their turn first."""
    _left: Iterator[Sized] | None = attrs.field(init=False, default=None)  # of a begun message
    _spent: int = attrs.field(init=False, default=0)

    def take(self, batch: Batch) -> Batch:
        """Carry out what a batch begins with, as far as nobody has to be waited for; return the rest.

        Never waits. Raises `Disconnect`. With `turn_is_over`, call it again with the rest when all
        other tasks have run; else the rest is for `finish`.
        """
        self.turn_is_over = False
        done = 0
        try:
            if self._take_publishes(batch):
                return []
            for _, payload in batch:
                client = self.client or self._begin(payload)
                if client is None or not self._take_message(client, payload):
                    break
                done += 1
        finally:
            self.settle()
        return batch[done:]

    async def finish(self, batch: Batch) -> None:
        """Carry out a batch, or what `take` has left of it, waiting for whoever is asked.

        Raises `Disconnect`, and what the app's hook for plain messages raises. Cancelled, it leaves
        what it has not begun.
        """
        try:
            if self.peer.is_established and self._take_publishes(batch):
                return
            for opcode, payload in batch:
                if not self.peer.is_established:
                    break
                client = self.client or self._begin(payload)
                if client is not None:
                    await self._finish_message(client, payload)
                else:
                    self._note_plain(len(payload))
                    await hand_to_app(self.services, self.connection, opcode, payload)
        finally:
            # What was published is out, whatever the message behind it was.
            self.settle()

    def settle(self) -> None:
        """Send the answers to what has been published."""
        if self.client is not None:
            self.client.settle()

    # the first message

    def _begin(self, payload: bytes) -> Client | None:
        """Take the peer for a client, if that is what its first message says; None for a plain one."""
        if self.peer.phase is Phase.OPEN and (self.codec is not None or is_connect(payload)):
            codec = self.codec or CENTRIFUGE_JSON
            self.client = Client(
                self.services,
                self.peer,
                self.orders,
                self.connection,
                codec,
                self.connect_fields(),
            )
        return self.client

    def _note_plain(self, size: int) -> None:
        """Count a plain message; send a peer away that sends too much: it knows no error reply."""
        if self.services.rate_limits.active and not self._admits(size):
            raise Disconnect(CloseCode.POLICY_VIOLATION, "too many messages")
        if not self.orders.declare_plain():
            self.peer.transition(PhaseEvent.MESSAGE)

    # the hot path

    def _take_publishes(self, batch: Batch) -> bool:
        """Carry out a batch of messages that are one publish each; false, and nothing is done, if
        it is anything else, or somebody has to be asked."""
        client = self.client
        if client is None or self._left is not None or not self._may_publish_now:
            return False
        commands = client.codec.decode_publishes([payload for _, payload in batch])
        if commands is None:
            return False
        together = len(commands) > 1 and not client.codec.opaque_payloads
        if together and self._publish_together(client, commands):
            return True
        for command in commands:
            # A copy: a Raw would keep the whole message that it is a part of.
            data = bytes(command.publish.data)
            publish(client, command.id, command.publish.channel, data)
        return True

    def _publish_together(self, client: Client, commands: Sequence[PublishCommand]) -> bool:
        """Carry out what nearly every read of a busy publisher holds: one topic, no answers wanted.

        A fourth of what they cost one by one. False if they are anything else.
        """
        topic = client.open_topic
        for command in commands:
            if command.id or command.publish.channel != topic or not command.publish.data:
                return False
        contents = [bytes(command.publish.data) for command in commands]
        try:
            self.services.router.publish_all(topic, contents, client.peer.info)
        except Refused:
            pass  # it was open to all, but an fd may be gone; and nobody waits for an answer
        return True

    @property
    def _may_publish_now(self) -> bool:
        services = self.services
        return (
            services.hooks.publish is None
            and self.peer.phase is Phase.CONNECTED
            and not services.rate_limits.active
        )

    # one message

    def _commands(self, client: Client, payload: bytes) -> Iterator[Sized]:
        """The commands of a message, each with its share of the bytes. Raises `Disconnect`."""
        try:
            commands = client.codec.decode(payload)
            size = len(payload) / max(1, len(commands))
            for command in commands:
                yield command, size
        except BadCommand as error:
            raise Disconnect(CloseCode.BAD_REQUEST, f"bad request: {error}") from None

    def _take_message(self, client: Client, payload: bytes) -> bool:
        """Carry out the commands of one message; false if it stopped before its end."""
        commands = self._left or self._commands(client, payload)
        self._left = None
        for command, size in commands:
            handler, method = self._handler(command)
            if handler.must_ask(client, command):
                self._left = chain([(command, size)], commands)
                return False
            if self._is_admitted(client, command, size):
                self._act(client, command, handler, method)
                self._spend(command, size)
            if not self.peer.is_established:
                break
            if self._spent >= _TURN or self.peer.outbox.replies_wait:
                self._left = commands
                self.turn_is_over = not self.peer.outbox.replies_wait
                self._spent = 0
                return False
        return True

    async def _finish_message(self, client: Client, payload: bytes) -> None:
        commands = self._left or self._commands(client, payload)
        self._left = None
        if self.peer.outbox.replies_wait:
            await self.peer.outbox.wait_empty()
        for command, size in commands:
            handler, method = self._handler(command)
            if self._is_admitted(client, command, size):
                if handler.must_ask(client, command):
                    await self._ask_and_act(client, command, handler, method)
                else:
                    self._act(client, command, handler, method)
                self._spend(command, size)
            if self._spent >= _TURN:
                self._spent = 0
                await trio.lowlevel.checkpoint()
            if not self.peer.is_established:
                break
            if self.peer.outbox.replies_wait:
                await self.peer.outbox.wait_empty()

    def _handler(self, command: Command) -> tuple[Handler, str]:
        """The handler of a command, and the name of its method; "" where it is not just one."""
        methods = [method for method in METHODS if getattr(command, method) is not None]
        if not methods and not command.id:
            return _ANSWER_TO_PING, ""
        if isinstance(command, FaultyCommand):
            return _Faulty(command.fault), ""
        if len(methods) != 1 or not (command.id or methods[0] in ("send", "publish")):
            return _Unacceptable(methods), ""
        if (self.peer.phase is Phase.CONNECTED) == (methods[0] == "connect"):
            return _OUT_OF_PLACE, ""
        return HANDLERS[methods[0]], methods[0]

    def _act(self, client: Client, command: Command, handler: Handler, method: str) -> None:
        if method != "publish":
            client.settle()
        with _failures_answered(client, command, method):
            result = handler.act(client, command, None)
            if result is not None and command.id:
                client.reply(command.id, method, result)

    async def _ask_and_act(
        self, client: Client, command: Command, handler: Handler, method: str
    ) -> None:
        client.settle()
        with _failures_answered(client, command, method):
            answer = await handler.ask(client, command)
            if not self.peer.is_established:
                return
            result = handler.act(client, command, answer)
            if result is not None and command.id:
                client.reply(command.id, method, result)

    # limits

    def _is_admitted(self, client: Client, command: Command, size: float) -> bool:
        """Whether a command is within the limits; if not, it is answered with 111.

        Raises `Disconnect` when that has happened too often.
        """
        if not self.services.rate_limits.active or command == _PONG or self._admits(size):
            return True
        client.refuse(command.id, Refused(ErrorCode.TOO_MANY_REQUESTS))
        return False

    def _admits(self, size: float) -> bool:
        peer = self.peer
        if peer.usage is None:
            peer.usage = ConnectionUsage()
        limits = self.services.rate_limits
        return limits.admits(peer.usage, peer.user, size, trio.current_time())

    def _spend(self, command: Command, size: float) -> None:
        cost = 1 if command.publish is not None else _COST
        self._spent += cost + int(size) // _BYTES


@contextmanager
def _failures_answered(client: Client, command: Command, method: str) -> Iterator[None]:
    """Answer a command that was refused, or whose hook has failed."""
    try:
        yield
    except Refused as refusal:
        client.refuse(command.id, refusal)
    except Disconnect:
        raise
    except Exception:
        if method == "send":
            raise
        client.services.log.exception("hook_failed", hook=method, fd=client.peer.fd)
        client.refuse(command.id, Refused(ErrorCode.INTERNAL))
