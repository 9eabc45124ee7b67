"""One Centrifuge client's commands, and what they are answered (wire reference, sections 2 and 3).

Rules:

1. After every await the world may have changed: what was checked before it is checked again.
2. A publish is answered when its batch is done, after its own publications; everything else is
   answered at once, behind all that came before.
3. A bad request gets an error reply; a client that does not follow the protocol is sent away.
4. A client that has yet to take a large reply is served on when it has.
"""

import math
from typing import TYPE_CHECKING

import attrs
import msgspec
import structlog
import trio

from .config import Config
from .core.history import UnrecoverablePosition
from .core.messages import ClientInfo, Fd, Position
from .core.session import Happening, Phase, Session, Subscription
from .core.topics import is_pattern
from .errors import CloseCode, Disconnect, ErrorCode, Refused
from .hooks import (
    ConnectEvent,
    ConnectReply,
    Hooks,
    PublishEvent,
    ReadEvent,
    SubscribeEvent,
    SubscribeReply,
)
from .methods import RPC
from .protocols import centrifuge
from .protocols.centrifuge import CENTRIFUGE_JSON, METHODS, BadCommand, Command, one_line, to_json
from .router import DIRECT, PERSONAL, Router, direct_fd
from .transport import frames
from .transport.outbox import Run
from .version import VERSION

if TYPE_CHECKING:
    from .connection import Connection

log = structlog.get_logger("broker")

REJECT_UNRECOVERED = 2
"""Subscribe flag: answer 112 instead of `recovered: false`."""

MAX_GROUP_LENGTH = 255
"""Of a queue group's name: as long as topics may be unless the config says otherwise."""

_TURN = 512
"""How many publishes of a message, or of several in a row, are carried out before all others have
their turn: as many as one read holds, so that no run is cut short by it. 1 MiB holds 25,000."""

_COST = 64
"""How many publishes any other command counts as: who is present on a busy topic takes a millisecond
to tell, a checkpoint 10 µs."""


class Conversation:
    """See the module."""

    def __init__(
        self,
        connection: "Connection",
        session: Session,
        router: Router,
        hooks: Hooks,
        config: Config,
    ) -> None:
        self._connection = connection
        self._session = session
        self._router = router
        self._hooks = hooks
        self._config = config
        self._replies: list[bytes] = []
        self._spent = 0  # of this session's turn

    def publish_nowait(self, payload: bytes) -> bool:
        """Carry out a message that is one publish, if nobody has to be asked about it.

        The hot path: no checkpoint, and no reply before `settle`. False leaves it for `handle`.
        """
        if not self._may_publish_now:
            return False
        command = centrifuge.decode_publish(payload)
        if command is None:
            return False
        request = command.publish
        self._publish(command.id, request.channel, request.data)
        return True

    async def handle(self, payload: bytes) -> None:
        """Carry out the commands of one message. Replies may wait until `settle`."""
        try:
            commands = centrifuge.decode(payload)
        except BadCommand as error:
            raise Disconnect(CloseCode.BAD_REQUEST, f"bad request: {error}") from None
        for command in commands:
            methods = [method for method in METHODS if getattr(command, method) is not None]
            if methods == ["publish"] and self._may_publish_now:
                assert command.publish is not None
                data = one_line(bytes(command.publish.data))
                self._publish(command.id, command.publish.channel, data)
                self._spent += 1
            else:
                self.settle()
                await self._handle(command, methods)
                self._spent += _COST
            if self._spent >= _TURN:
                self._spent = 0
                await trio.lowlevel.checkpoint()
            if self._connection.outbox.replies_wait:
                await self._connection.outbox.wait_empty()
            if not self._session.is_established:
                return

    def settle(self) -> None:
        """Send out the replies that wait, behind what has been published. Never waits.

        Without a reply the run stays open, for other sessions to join theirs to it.
        """
        if self._replies:
            replies, self._replies = self._replies, []
            self._router.flush()
            self._connection.outbox.offer(Run((centrifuge.frame(replies),)))

    @property
    def _may_publish_now(self) -> bool:
        return self._hooks.publish is None and self._session.phase is Phase.CONNECTED

    def _publish(self, request_id: int, topic: str, data: bytes) -> None:
        try:
            if not data:
                raise Refused(ErrorCode.BAD_REQUEST, "publish without data")
            if topic.startswith(DIRECT) and direct_fd(topic) == self._session.fd:
                raise Refused(ErrorCode.BAD_REQUEST, f"{topic} is this connection itself")
            # A copy: a Raw would keep the whole message that it is a part of.
            self._router.publish(topic, bytes(data), self._session.info)
        except Refused as refusal:
            if request_id:
                self._replies.append(_error(request_id, refusal))
        else:
            if request_id:
                self._replies.append(CENTRIFUGE_JSON.reply(request_id, "publish"))

    async def _handle(self, command: Command, methods: list[str]) -> None:
        if not methods and not command.id:
            return  # the answer to a ping
        if not command.id and methods not in (["send"], ["publish"]):
            raise Disconnect(CloseCode.BAD_REQUEST, "bad request: a command without an id")
        try:
            if len(methods) > 1:
                raise Refused(ErrorCode.BAD_REQUEST, "more than one method in a command")
            if not methods:
                raise Refused(ErrorCode.METHOD_NOT_FOUND)
            if (self._session.phase is Phase.CONNECTED) == (methods == ["connect"]):
                raise Disconnect(
                    CloseCode.BAD_REQUEST, "bad request: connect comes first, and once"
                )
            result = await getattr(self, f"_on_{methods[0]}")(command)
        except Refused as refusal:
            self._refuse(command, refusal)
        except Disconnect:
            raise
        except Exception:
            if methods == ["send"]:
                raise
            log.exception("hook_failed", hook=methods[0], fd=self._session.fd)
            self._refuse(command, Refused(ErrorCode.INTERNAL))
        else:
            if result is not None and command.id:
                self._reply(CENTRIFUGE_JSON.reply(command.id, methods[0], result))

    def _refuse(self, command: Command, refusal: Refused) -> None:
        if command.id:  # without one nobody waits for an answer
            self._reply(_error(command.id, refusal))

    def _reply(self, reply: bytes) -> None:
        self.settle()
        self._router.flush()
        self._connection.outbox.offer_reply(Run((centrifuge.frame([reply]),)))

    # commands: each returns the result as JSON, or None if it has answered by itself

    async def _on_connect(self, command: Command) -> bytes | None:
        request = command.connect
        assert request is not None
        reply = None
        if self._hooks.connect is not None:
            event = ConnectEvent(
                self._connection,
                request.token,
                _from_json(request.data),
                request.name,
                request.version,
            )
            reply = await self._hooks.connect(event)
            if not self._session.is_established:
                return None
        reply = reply or ConnectReply()
        session, sessions, fd = self._session, self._router.hub.sessions, self._session.fd
        user = reply.user or sessions.user_of(fd)
        subs: dict[str, object] = {f"{DIRECT}{fd}": {}}
        if user:
            subs[f"{PERSONAL}{user}"] = {}
        data = {"fd": fd}
        if isinstance(reply.data, dict):
            data |= reply.data
        # What JSON cannot say raises before anything has changed, so the client may try again.
        result = to_json(
            {
                "client": str(fd),
                "version": VERSION,
                "data": data,
                "subs": subs,
                "ping": _whole_seconds(self._config.ping_seconds),
                "pong": True,
            }
        )
        info = ClientInfo(str(fd), user, None if reply.info is None else to_json(reply.info))
        sessions.bind(fd, user)
        session.note(Happening.CONNECT)
        session.codec, session.info = CENTRIFUGE_JSON, info
        return result

    async def _on_subscribe(self, command: Command) -> bytes | None:
        request = command.subscribe
        assert request is not None
        name, session, router = request.channel, self._session, self._router
        self._check_subscribe(name)
        reply = None
        if self._hooks.subscribe is not None:
            data = _from_json(request.data)
            event = SubscribeEvent(self._connection, name, request.token, data)
            reply = await self._hooks.subscribe(event)
            if not session.is_established:
                return None
            self._check_subscribe(name)
        reply = reply or SubscribeReply()
        # No checkpoint from here to the reply: whatever is published next comes behind it.
        rules = router.rules_for(name)
        group = _group_of(request.data)
        # A member that recovered would be given what others of its group have had.
        has_history = rules.history_size > 0 and not is_pattern(name) and not group
        recoverable = has_history and (request.recoverable or request.positioned or request.recover)
        fields = []
        recovered = False
        if recoverable:
            position = Position(request.offset, request.epoch)
            if request.recover:
                missed, recovered, top = router.engine.recover(name, position)
                if not recovered and request.flag & REJECT_UNRECOVERED:
                    raise Refused(ErrorCode.UNRECOVERABLE_POSITION)
                was = b'"was_recovering":true,"recovered":%b' % (b"true" if recovered else b"false")
                fields.append(was)
            else:
                missed, top = [], router.engine.position(name)
            fields.append(b'"recoverable":true,"positioned":true')
            fields.append(CENTRIFUGE_JSON.stream(missed, top))
        info = _with_topic_info(session.info, reply.info)
        subscription = Subscription(
            session, name, info, request.join_leave and rules.join_leave, recoverable, group
        )
        if reply.data is not None:
            fields.append(b'"data":' + to_json(reply.data))
        self.settle()
        router.subscribe(subscription)
        result = b"{" + b",".join(fields) + b"}"
        self._reply(CENTRIFUGE_JSON.reply(command.id, "subscribe", result))
        if not recovered:  # who has all that was published has the last of it, too
            router.give_retained(subscription)
        router.announce(subscription)
        return None

    def _check_subscribe(self, name: str) -> None:
        session = self._session
        user = self._router.hub.sessions.user_of(session.fd)
        own = {f"{DIRECT}{session.fd}"} | ({f"{PERSONAL}{user}"} if user else set())
        if name in session.subscriptions or name in own:
            raise Refused(ErrorCode.ALREADY_SUBSCRIBED)
        self._router.check_listenable(name)
        if len(session.subscriptions) >= self._config.max_topics:
            limit = f"more than {self._config.max_topics} subscriptions"
            raise Refused(ErrorCode.LIMIT_EXCEEDED, limit)

    async def _on_unsubscribe(self, command: Command) -> bytes:
        assert command.unsubscribe is not None
        self._router.unsubscribe(self._session, command.unsubscribe.channel)
        return b"{}"

    async def _on_publish(self, command: Command) -> None:
        request = command.publish
        assert request is not None
        data = one_line(bytes(request.data))
        if data:
            data = await self.authorize(request.channel, data)
            if not self._session.is_established:
                return
        self._publish(command.id, request.channel, data)

    async def authorize(self, topic: str, data: bytes) -> bytes:
        """Ask the app whether `data` may be published; what it wants published in its place.

        The session may have ended meanwhile.
        """
        if self._hooks.publish is not None:
            reply = await self._hooks.publish(PublishEvent(self._connection, topic, data))
            if reply is not None and reply.data is not None:
                return centrifuge.check_json(reply.data)
        return data

    async def _on_presence(self, command: Command) -> bytes:
        assert command.presence is not None
        topic = command.presence.channel
        await self._check_presence(topic)
        return CENTRIFUGE_JSON.presence(self._router.hub.presence(topic))

    async def _on_presence_stats(self, command: Command) -> bytes:
        assert command.presence_stats is not None
        topic = command.presence_stats.channel
        await self._check_presence(topic)
        clients = self._router.hub.presence(topic)
        users = {info.user for info in clients.values()}
        return to_json({"num_clients": len(clients), "num_users": len(users)})

    async def _check_presence(self, topic: str) -> None:
        self._check_readable(topic)
        if not self._router.rules_for(topic).presence:
            raise Refused(ErrorCode.NOT_AVAILABLE)
        if self._hooks.presence is not None:
            await self._hooks.presence(ReadEvent(self._connection, topic))

    def _check_readable(self, topic: str) -> None:
        """Only topics have a history or a presence: no pattern, no fd."""
        self._router.check_name(topic)
        if is_pattern(topic) or topic.startswith((DIRECT, PERSONAL)):
            raise Refused(ErrorCode.NOT_AVAILABLE)

    async def _on_history(self, command: Command) -> bytes:
        request = command.history
        assert request is not None
        self._check_readable(request.channel)
        if not self._router.rules_for(request.channel).history_size:
            raise Refused(ErrorCode.NOT_AVAILABLE)
        if self._hooks.history is not None:
            await self._hooks.history(ReadEvent(self._connection, request.channel))
        since = None
        if request.since is not None:
            if request.reverse and not request.since.offset:
                raise Refused(ErrorCode.BAD_REQUEST, "reverse since offset 0: nothing is before it")
            since = Position(request.since.offset, request.since.epoch)
        try:
            publications, top = self._router.engine.history(
                request.channel, since, request.limit, request.reverse
            )
        except UnrecoverablePosition:
            raise Refused(ErrorCode.UNRECOVERABLE_POSITION) from None
        return b"{" + CENTRIFUGE_JSON.stream(publications, top) + b"}"

    async def _on_rpc(self, command: Command) -> bytes | None:
        request = command.rpc
        assert request is not None
        if request.method in RPC:
            caller = _Caller(self, command.id)
            methods = self._connection.methods
            result = await methods.call(caller, request.method, bytes(request.data))
            return None if result is None else b'{"data":' + result + b"}"
        if self._hooks.rpc is None:
            raise Refused(ErrorCode.METHOD_NOT_FOUND)
        data = await self._hooks.rpc(self._connection, request.method, _from_json(request.data))
        return b'{"data":' + to_json(data) + b"}"

    def _answer_rpc(self, request_id: int, result: bytes | Refused) -> None:
        """Answer an rpc that was not answered when it was asked, if the client is still here."""
        if not self._session.is_established:
            return
        if isinstance(result, Refused):
            self._reply(_error(request_id, result))
        else:
            content = b'{"data":' + result + b"}"
            self._reply(CENTRIFUGE_JSON.reply(request_id, "rpc", content))

    async def _on_send(self, command: Command) -> None:
        assert command.send is not None
        if self._hooks.message is None:
            raise Disconnect(CloseCode.NOT_AVAILABLE, "not available")
        await self._connection.handle_message(frames.TEXT, bytes(command.send.data))

    async def _on_refresh(self, command: Command) -> bytes:
        raise Refused(ErrorCode.NOT_AVAILABLE)

    async def _on_sub_refresh(self, command: Command) -> bytes:
        raise Refused(ErrorCode.NOT_AVAILABLE)


def _whole_seconds(interval: float) -> int:
    """A ping interval as clients know it: never less than it is, and 0 for no pings at all."""
    return 0 if interval == math.inf else math.ceil(interval)


@attrs.define(eq=False)
class _Caller:
    """A client that has called one of the broker's own methods."""

    conversation: Conversation
    request_id: int

    @property
    def fd(self) -> Fd:
        return self.conversation._session.fd

    @property
    def info(self) -> ClientInfo:
        return self.conversation._session.info

    async def authorize(self, topic: str, data: bytes) -> bytes:
        if topic.startswith(DIRECT) and direct_fd(topic) == self.fd:
            raise Refused(ErrorCode.BAD_REQUEST, f"{topic} is this connection itself")
        data = await self.conversation.authorize(topic, data)
        if not self.conversation._session.is_established:
            raise Refused(ErrorCode.NOT_AVAILABLE)  # which nobody is left to read
        return data

    def answer(self, result: bytes | Refused) -> None:
        self.conversation._answer_rpc(self.request_id, result)


def _error(request_id: int, refusal: Refused) -> bytes:
    return CENTRIFUGE_JSON.error(request_id, refusal.code, refusal.message, refusal.temporary)


def _from_json(data: msgspec.Raw) -> object:
    try:
        return msgspec.json.decode(data) if data else None
    except (msgspec.DecodeError, RecursionError) as error:  # 1e999, or deeper than Python goes
        raise Refused(ErrorCode.BAD_REQUEST, f"data: {error}") from None


def _group_of(data: msgspec.Raw) -> str:
    """The queue group that a subscriber names in its `data`; "" if none.

    Raises `Refused` for a group that is no text, and for an empty one.
    """
    if b'"group"' not in bytes(data):
        return ""
    fields = _from_json(data)
    group = fields.get("group") if isinstance(fields, dict) else None
    if group is None:
        return ""
    if not isinstance(group, str) or not 0 < len(group) <= MAX_GROUP_LENGTH:
        text = f"group is a text of 1 to {MAX_GROUP_LENGTH} characters"
        raise Refused(ErrorCode.BAD_REQUEST, text)
    return group


def _with_topic_info(info: ClientInfo, topic_info: object) -> ClientInfo:
    return info if topic_info is None else attrs.evolve(info, chan_info=to_json(topic_info))
