"""One Centrifuge client's commands, and what they are answered (wire reference, sections 2 and 3).

Rules:

1. After every await the world may have changed: what was checked before it is checked again.
2. A publish is answered when its batch is done, after its own publications; everything else is
   answered at once, behind all that came before.
3. A bad request gets an error reply; a client that does not follow the protocol is sent away.
4. A client that has yet to take a large reply is served on when it has.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import ceil, inf
from typing import TYPE_CHECKING

import attrs
import msgspec
import structlog
import trio

from broker.access.tokens import (
    ConnectionToken,
    ServerSub,
    SubscriptionToken,
    Tokens,
    needs_token,
    ttl,
)
from broker.access.topic_rules import (
    allows,
    check_access,
    check_subscribe,
    guards_itself,
    personal_topic,
)
from broker.config.settings import Askers, Config
from broker.core.event_queue import EventKind
from broker.core.history import UnrecoverablePosition
from broker.core.json_reader import BadJson, value_of
from broker.core.messages import ClientInfo, Fd, Position
from broker.core.session import Happening, Phase, Session
from broker.core.topics import is_pattern
from broker.errors import (
    CloseCode,
    Disconnect,
    ErrorCode,
    KeysUnavailable,
    Refused,
    TokenExpired,
    TokenInvalid,
    TokenRefused,
    UnsubscribeCode,
)
from broker.hooks import (
    ConnectEvent,
    ConnectReply,
    Hooks,
    PublishEvent,
    ReadEvent,
    SubscribeEvent,
    SubscribeReply,
)
from broker.protocols.codec import Codec, Result
from broker.protocols.commands import (
    METHODS,
    BadCommand,
    Command,
    FaultyCommand,
    PublishCommand,
    SubscribeRequest,
)
from broker.protocols.json_text import check_json, is_json_line, one_line, to_json
from broker.routing.router import DIRECT, PERSONAL, Router, direct_fd
from broker.routing.subscriptions import open_subscription
from broker.session.rpc import RPC
from broker.transport import frames
from broker.transport.outbox import Run
from broker.version import VERSION

if TYPE_CHECKING:
    from broker.session.connection import Connection

log = structlog.get_logger("broker")

_NOTHING: Result = {}
_NOT_SEEN_BEFORE = SubscribeRequest()

MAX_GROUP_LENGTH = 255
"""Of a queue group's name: as long as topics may be unless the config says otherwise."""

_ASKED = {
    "connect": ("connect",),
    "subscribe": ("subscribe",),
    "publish": ("publish",),
    "presence": ("presence",),
    "presence_stats": ("presence",),
    "history": ("history",),
    "rpc": ("rpc", "publish"),
    "send": ("message",),
    "refresh": (),
    "sub_refresh": (),
}
"""The hooks that may be asked about a method."""

_WITH_TOKEN = ("connect", "subscribe", "refresh", "sub_refresh")

_TURN = 512
"""How many publishes of a message, or of several in a row, are carried out before all others have
their turn: as many as one read holds, so that no run is cut short by it. 1 MiB holds 25,000."""

_COST = 64
"""How many publishes any other command counts as: who is present on a busy topic takes a millisecond
to tell, a checkpoint 10 µs."""

_BYTES = 128
"""How many bytes of a command count as one publish more: in protobuf they may be as many fields of
two bytes, and 16 KiB of these take 7 ms to read."""

_GLANCE = 2**12
"""Larger messages are not read twice to find out whether somebody has to be asked: in protobuf that
takes 1 ms for these already, and a task of its own 10 µs."""


class Conversation:
    """See the module."""

    def __init__(
        self,
        connection: "Connection",
        session: Session,
        codec: Codec,
        router: Router,
        hooks: Hooks,
        config: Config,
        tokens: Tokens,
    ) -> None:
        self._connection = connection
        self._session = session
        self._codec = codec
        self._decode_publishes = codec.decode_publishes
        self._opaque = codec.opaque_payloads
        self._router = router
        self._hooks = hooks
        self._tokens = tokens
        self._replies: list[bytes] = []
        self._left: Iterator[tuple[Command, float]] | None = None  # of a message that has begun
        self._spent = 0  # of this session's turn
        self._token_user = ""
        # On Trio's clock, as all deadlines here: when the connection ends unless it is refreshed,
        # and when the first of it and its subscriptions does.
        self._expires_at = inf
        self._next_expiry = inf
        self.reload(config)

    def reload(self, config: Config) -> None:
        """Go by another config from the next command on."""
        self._config = config
        self._is_limited = self._connection.is_limited
        # To this one the client may publish whatever else happens: the hot path asks once.
        self._open_topic = ""

    def publish_nowait(self, payloads: Sequence[bytes]) -> bool:
        """Carry out messages that are one publish each, if nobody has to be asked about them.

        The hot path: no checkpoint, and no reply before `settle`. False leaves them for `handle`.
        """
        if not self._may_publish_now:
            return False
        commands = self._decode_publishes(payloads)
        if commands is None:
            return False
        if len(commands) > 1 and not self._opaque and self._publish_together(commands):
            return True
        for command in commands:
            self._publish(command.id, command.publish.channel, command.publish.data)
        return True

    def _publish_together(self, commands: Sequence[PublishCommand]) -> bool:
        """What nearly every read of a busy publisher holds: one topic, and no answers wanted.

        A fourth of what they cost one by one. False if they are anything else.
        """
        topic = self._open_topic
        for command in commands:
            if command.id or command.publish.channel != topic or not command.publish.data:
                return False
        # Copies: a Raw would keep the whole message that it is a part of.
        contents = [bytes(command.publish.data) for command in commands]
        try:
            self._router.publish_all(topic, contents, self._session.info)
        except Refused:
            pass  # it was open to all, but an fd may be gone; and nobody waits for an answer
        return True

    def may_wait(self, payload: bytes) -> bool:
        """Whether `handle` may have to wait for the app, or for somebody's keys."""
        waiting = [
            method
            for method, asked in _ASKED.items()
            if (self._tokens.source is not None and method in _WITH_TOKEN)
            or any(getattr(self._hooks, hook) is not None for hook in asked)
        ]
        if not waiting or len(payload) > _GLANCE:
            return bool(waiting)
        try:
            return any(
                getattr(command, method) is not None
                for command in self._codec.decode(payload)
                for method in waiting
            )
        except BadCommand:
            return False

    async def handle(self, payload: bytes) -> None:
        """Carry out the commands of one message, or what `handle_nowait` has left of it.

        Replies may wait until `settle`.
        """
        if self._left is None:
            self._left = self._commands(payload)
        else:
            await self._connection.outbox.wait_empty()
        while not await self._go_on(self._left):
            await self._connection.outbox.wait_empty()

    async def handle_nowait(self, payload: bytes) -> bool:
        """Carry out the commands of a message that waits for nobody.

        False if that stopped at a reply which is so large that the peer has to take it first: then
        the rest is for `handle`.
        """
        self._left = self._commands(payload)
        return await self._go_on(self._left)

    async def _go_on(self, commands: Iterator[tuple[Command, float]]) -> bool:
        for command, size in commands:
            if self._is_limited and not self._admits(command, size):
                continue
            methods = [method for method in METHODS if getattr(command, method) is not None]
            faulty = isinstance(command, FaultyCommand)
            if methods == ["publish"] and self._may_publish_now and not faulty:
                assert command.publish is not None
                data = self._payload(command.publish.data)
                self._publish(command.id, command.publish.channel, data)
                self._spent += 1 + int(size) // _BYTES
            else:
                self.settle()
                await self._handle(command, methods)
                self._spent += _COST + int(size) // _BYTES
            if self._spent >= _TURN:
                self._spent = 0
                await trio.lowlevel.checkpoint()
            if not self._session.is_established:
                break
            if self._connection.outbox.replies_wait:
                return False
        self._left = None
        return True

    def _commands(self, payload: bytes) -> Iterator[tuple[Command, float]]:
        """The commands of a message, each with its share of the bytes. Raises `Disconnect`."""
        try:
            commands = self._codec.decode(payload)
            size = len(payload) / len(commands)
            for command in commands:
                yield command, size
        except BadCommand as error:
            raise Disconnect(CloseCode.BAD_REQUEST, f"bad request: {error}") from None

    def settle(self) -> None:
        """Send out the replies that wait, behind what has been published. Never waits.

        Without a reply the run stays open, for other sessions to join theirs to it.
        """
        if self._replies:
            replies, self._replies = self._replies, []
            self._router.flush()
            self._connection.outbox.offer(Run((self._codec.frame(replies),)))

    @property
    def _may_publish_now(self) -> bool:
        return (
            self._hooks.publish is None
            and not self._is_limited
            and self._session.phase is Phase.CONNECTED
        )

    def _admits(self, command: Command, size: float) -> bool:
        """Whether a command is within the limits; if not, it is answered with 111.

        Raises `Disconnect` when that has happened too often.
        """
        if command == _PONG:
            return True
        if self._connection.admits(size):
            return True
        self._refuse(command, Refused(ErrorCode.TOO_MANY_REQUESTS))
        return False

    def _check_publish(self, topic: str) -> None:
        """Raise `Refused` unless the rules let this client publish to a topic, or to an fd."""
        user = self._connection.user
        if topic.startswith((DIRECT, PERSONAL)):
            if topic.startswith(DIRECT) and direct_fd(topic) == self._session.fd:
                raise Refused(ErrorCode.BAD_REQUEST, f"{topic} is this connection itself")
            if not allows(self._config.may_send, user):
                raise Refused(ErrorCode.PERMISSION_DENIED)
            open_to_all = self._config.may_send == "all"
        else:
            self._router.check_name(topic)
            who = self._router.rules_for(topic).may_publish
            self._check_access(who, topic)
            open_to_all = who == "all" and not guards_itself(topic)
        if open_to_all:
            self._open_topic = topic

    def _publish(self, request_id: int, topic: str, data: bytes) -> None:
        try:
            if not data:
                raise Refused(ErrorCode.BAD_REQUEST, "publish without data")
            if topic != self._open_topic:
                self._check_publish(topic)
            # A copy: a Raw would keep the whole message that it is a part of.
            data = bytes(data)
            opaque = self._opaque and not is_json_line(data)
            self._router.publish(topic, data, self._session.info, None, opaque)
        except Refused as refusal:
            if request_id:
                self._replies.append(self._error(request_id, refusal))
        else:
            if request_id:
                self._replies.append(self._codec.reply(request_id, "publish", _NOTHING))

    async def _handle(self, command: Command, methods: list[str]) -> None:
        if not methods and not command.id:
            return  # the answer to a ping
        if not command.id and methods not in (["send"], ["publish"]):
            raise Disconnect(CloseCode.BAD_REQUEST, "bad request: a command without an id")
        try:
            if isinstance(command, FaultyCommand):
                raise Refused(ErrorCode.BAD_REQUEST, command.fault)
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
                self._reply(self._codec.reply(command.id, methods[0], result))

    def _refuse(self, command: Command, refusal: Refused) -> None:
        if command.id:  # without one nobody waits for an answer
            self._reply(self._error(command.id, refusal))

    def _reply(self, reply: bytes) -> None:
        self.settle()
        self._router.flush()
        self._connection.outbox.offer_reply(Run((self._codec.frame([reply]),)))

    def _error(self, request_id: int, refusal: Refused) -> bytes:
        return self._codec.error(request_id, refusal.code, refusal.message, refusal.temporary)

    # what clients send and apps return

    def _payload(self, data: msgspec.Raw) -> bytes:
        """What a client sent, as it goes on."""
        return bytes(data) if self._opaque else one_line(bytes(data))

    def _value(self, data: msgspec.Raw) -> object:
        """What a client sent, as hooks get it: decoded, or None; as bytes if it is not JSON."""
        if not data:
            return None
        try:
            return value_of(bytes(data))
        except BadJson as error:  # or deeper than Python goes
            if self._opaque:
                return bytes(data)
            raise Refused(ErrorCode.BAD_REQUEST, f"data: {error}") from None

    def _group_of(self, data: msgspec.Raw) -> str:
        """The queue group that a subscriber names in its `data`; "" if none.

        Raises `Refused` for a group that is no text, and for an empty one.
        """
        if b'"group"' not in bytes(data):
            return ""
        fields = self._value(data)
        group = fields.get("group") if isinstance(fields, dict) else None
        if group is None:
            return ""
        if not isinstance(group, str) or not 0 < len(group) <= MAX_GROUP_LENGTH:
            text = f"group is a text of 1 to {MAX_GROUP_LENGTH} characters"
            raise Refused(ErrorCode.BAD_REQUEST, text)
        return group

    def _written(self, value: object) -> msgspec.Raw:
        """What a hook returned, as a client gets it. Raises `TypeError` for what JSON cannot say."""
        if isinstance(value, bytes) and self._opaque:
            return msgspec.Raw(value)
        return msgspec.Raw(to_json(value))

    # commands: each returns the result, or None if it has answered by itself

    async def _on_connect(self, command: Command) -> None:
        request = command.connect
        assert request is not None
        token = await self._connection_token(request.token)
        reply = None
        if self._hooks.connect is not None and self._session.is_established:
            event = ConnectEvent(
                self._connection,
                request.token,
                self._value(request.data),
                request.name,
                request.version,
                None if token is None else token.claims,
            )
            reply = await self._hooks.connect(event)
        if not self._session.is_established:
            return
        reply = reply or ConnectReply()
        session, sessions, fd = self._session, self._router.hub.sessions, self._session.fd
        data = {"fd": fd}
        if isinstance(reply.data, dict):
            data |= reply.data
        result: dict[str, object] = {"client": str(fd), "version": VERSION}
        info = None if reply.info is None else to_json(reply.info)
        user, expires_at = reply.user or sessions.user_of(fd), inf
        server_subs: Mapping[str, ServerSub] = {}
        if token is not None:
            user = reply.user or token.user
            info = token.info if info is None else info
            server_subs = token.subs
            expires_at = self._watch(token.expires_at, result)
        self._check_connections_of(user)
        personal = None
        if self._config.personal_topic:
            personal = personal_topic(user, self._config.max_topic_bytes)
        if personal is not None:
            server_subs = {personal: ServerSub(), **server_subs}
        self._check_server_subs(server_subs)
        server_subs = {**self._topics_of_app(reply.topics), **server_subs}
        # What JSON cannot say raises before anything has changed, so the client may try again.
        result |= {
            "data": msgspec.Raw(to_json(data)),
            "ping": _whole_seconds(self._config.ping_seconds),
            "pong": True,
            **self._connection.connect_fields(),
        }
        # No checkpoint from here to the reply: whatever is published next comes behind it.
        sessions.bind(fd, user)
        session.note(Happening.CONNECT)
        # What was opened in the plain protocol.
        self._router.leave_all(session, UnsubscribeCode.SERVER, "connected")
        session.codec, session.info = self._codec, ClientInfo(str(fd), user, info)
        if self._router.events is not None:
            protocol = self._connection.protocol
            self._router.events.emit(EventKind.CONNECTED, fd, user, protocol=protocol)
        if token is not None:
            self._connection.claims, self._token_user = token.claims, token.user
            self._expires_at = expires_at
        opened = [
            open_subscription(
                self._router,
                session,
                self._codec,
                # What it was not asked for it cannot filter, and the others are not to blame for it.
                msgspec.structs.replace(
                    request.subs.get(name, _NOT_SEEN_BEFORE), channel=name, flag=0, tf=None
                ),
                info=options.info,
                data=options.data,
                server_side=True,
            )
            for name, options in server_subs.items()
        ]
        subs: dict[str, object] = {}
        if self._config.direct_topics:
            subs[f"{DIRECT}{fd}"] = {}
            if user:
                subs[f"{PERSONAL}{user}"] = {}
        result["subs"] = subs | {each.subscription.name: each.result for each in opened}
        self._reply(self._codec.reply(command.id, "connect", result))
        for each in opened:
            each.settle(self._router)

    def _topics_of_app(self, topics: Iterable[str]) -> dict[str, ServerSub]:
        """What the app wants this client to get: now, or since before it spoke this protocol."""
        subs = {}
        for name in (*self._session.subscriptions, *topics):
            try:
                self._router.check_listenable(name)
            except Refused as refusal:
                log.error("not_subscribed", fd=self._session.fd, topic=name, reason=str(refusal))
            else:
                subs[name] = ServerSub()
        return subs

    async def _connection_token(self, token: str) -> ConnectionToken | None:
        """What a client's token says; None for one without, where that is allowed.

        Raises `Disconnect` for a token that will never do, `Refused` where another one may.
        """
        tokens = self._tokens
        if not tokens.enabled:
            return None  # without a key a token means nothing, or only something to the app
        if not token and tokens.rules.anonymous_allowed:
            return None
        try:
            if not token:
                raise TokenInvalid("no token")
            return await tokens.connection(token)
        except TokenInvalid as error:
            self._note_refused(error)
            raise Disconnect(CloseCode.INVALID_TOKEN, "invalid token") from None
        except TokenRefused as error:
            self._note_refused(error)
            raise _refused(error) from None

    def _note_refused(self, error: TokenRefused) -> None:
        log.info("token_refused", fd=self._session.fd, reason=str(error)[:200])

    def _check_server_subs(self, subs: Mapping[str, ServerSub]) -> None:
        for name in subs:
            self._router.check_listenable(name)
        if len(subs) > self._config.max_topics:
            limit = f"more than {self._config.max_topics} subscriptions"
            raise Refused(ErrorCode.LIMIT_EXCEEDED, limit)

    def _check_connections_of(self, user: str) -> None:
        limit = self._config.max_connections_per_user
        if not user or limit is None:
            return
        others = [fd for fd in self._router.hub.sessions.fds_of(user) if fd != self._session.fd]
        if len(others) >= limit:
            raise Disconnect(CloseCode.CONNECTION_LIMIT, "connection limit")

    async def _on_subscribe(self, command: Command) -> None:
        request = command.subscribe
        assert request is not None
        name, session, router = request.channel, self._session, self._router
        router.check_subscribable(session, name)
        token = await self._subscription_token(name, request.token)
        self._check_rules(name, token)
        reply = None
        if self._hooks.subscribe is not None and session.is_established:
            data = self._value(request.data)
            claims = None if token is None else token.claims
            event = SubscribeEvent(self._connection, name, request.token, data, claims)
            reply = await self._hooks.subscribe(event)
        if not session.is_established:
            return
        router.check_subscribable(session, name)
        self._check_rules(name, token)
        reply = reply or SubscribeReply()
        # No checkpoint from here to the reply: whatever is published next comes behind it.
        group = self._group_of(request.data)
        info = None if reply.info is None else to_json(reply.info)
        data = None if reply.data is None else to_json(reply.data)
        expires_at, expiry = inf, dict[str, object]()
        if token is not None:
            info = token.info if info is None else info
            data = token.data if data is None else data
            expires_at = self._watch(token.expires_at, expiry)
        opened = open_subscription(
            router, session, self._codec, request, info=info, data=data, group=group
        )
        opened.subscription.expires_at = expires_at
        self._reply(self._codec.reply(command.id, "subscribe", {**expiry, **opened.result}))
        opened.settle(router)

    async def _subscription_token(self, name: str, token: str) -> SubscriptionToken | None:
        """What a subscription token says of this client and this topic; None for none.

        Raises `Refused` for any other token, and for none where one is needed.
        """
        tokens, session = self._tokens, self._session
        if not tokens.enabled:
            return None  # without a key a token means nothing, or only something to the app
        if not token:
            if needs_token(name):
                raise Refused(ErrorCode.PERMISSION_DENIED)
            return None
        try:
            found = await tokens.subscription(token)
            if found.topic != name:
                raise TokenInvalid("for another topic")
            if found.user != self._router.hub.sessions.user_of(session.fd):
                raise TokenInvalid("for another user")
            if found.client not in ("", str(session.fd)):
                raise TokenInvalid("for another connection")
        except TokenRefused as error:
            self._note_refused(error)
            raise _refused(error) from None
        return found

    def _check_rules(self, name: str, token: SubscriptionToken | None) -> None:
        """Raise `Refused` unless the rules let this client subscribe; a token is above them."""
        if token is None:
            rules, asked = self._router.rules_for(name), self._hooks.subscribe is not None
            check_subscribe(rules, name, self._connection.user, asked=asked)

    async def _on_unsubscribe(self, command: Command) -> Result:
        assert command.unsubscribe is not None
        self._router.unsubscribe(self._session, command.unsubscribe.channel)
        return _NOTHING

    async def _on_publish(self, command: Command) -> None:
        request = command.publish
        assert request is not None
        data = self._payload(request.data)
        if data and self._hooks.publish is not None:
            data = await self.authorize(request.channel, data)
            if not self._session.is_established:
                return
        self._publish(command.id, request.channel, data)

    async def authorize(self, topic: str, data: bytes) -> bytes:
        """Ask rules and app whether `data` may be published; what the app wants in its place.

        The session may have ended meanwhile. Raises `Refused`.
        """
        self._check_publish(topic)
        if self._hooks.publish is not None:
            reply = await self._hooks.publish(PublishEvent(self._connection, topic, data))
            if reply is not None and reply.data is not None:
                return check_json(reply.data)
        return data

    async def _on_presence(self, command: Command) -> Result:
        assert command.presence is not None
        topic = command.presence.channel
        await self._check_presence(topic)
        return self._codec.presence(self._router.hub.presence(topic))

    async def _on_presence_stats(self, command: Command) -> Result:
        assert command.presence_stats is not None
        topic = command.presence_stats.channel
        await self._check_presence(topic)
        clients = self._router.hub.presence(topic)
        users = {info.user for info in clients.values()}
        return {"num_clients": len(clients), "num_users": len(users)}

    async def _check_presence(self, topic: str) -> None:
        self._check_readable(topic)
        rules = self._router.rules_for(topic)
        if not rules.presence:
            raise Refused(ErrorCode.NOT_AVAILABLE)
        self._check_access(rules.may_read_presence, topic)
        if self._hooks.presence is not None:
            await self._hooks.presence(ReadEvent(self._connection, topic))

    def _check_access(self, who: Askers, topic: str) -> None:
        subscribed = topic in self._session.subscriptions
        check_access(who, topic, self._connection.user, subscribed=subscribed)

    def _check_readable(self, topic: str) -> None:
        """Only topics have a history or a presence: no pattern, no fd."""
        self._router.check_name(topic)
        if is_pattern(topic) or topic.startswith((DIRECT, PERSONAL)):
            raise Refused(ErrorCode.NOT_AVAILABLE)

    async def _on_history(self, command: Command) -> Result:
        request = command.history
        assert request is not None
        self._check_readable(request.channel)
        rules = self._router.rules_for(request.channel)
        if not rules.history_size:
            raise Refused(ErrorCode.NOT_AVAILABLE)
        self._check_access(rules.may_read_history, request.channel)
        if self._hooks.history is not None:
            await self._hooks.history(ReadEvent(self._connection, request.channel))
        since = None
        if request.since is not None:
            if request.reverse and not request.since.offset:
                raise Refused(ErrorCode.BAD_REQUEST, "reverse since offset 0: nothing is before it")
            since = Position(request.since.offset, request.since.epoch)
        most = self._config.history_max_limit
        limit = most if request.limit < 0 else min(request.limit, most)
        try:
            publications, top = self._router.engine.history(
                request.channel, since, limit, request.reverse
            )
        except UnrecoverablePosition:
            raise Refused(ErrorCode.UNRECOVERABLE_POSITION) from None
        return self._codec.stream(publications, top)

    async def _on_rpc(self, command: Command) -> Result | None:
        request = command.rpc
        assert request is not None
        if request.method in RPC:
            caller = _Caller(self, command.id)
            methods = self._connection.methods
            result = await methods.call(caller, request.method, bytes(request.data))
            return None if result is None else {"data": msgspec.Raw(result)}
        if self._hooks.rpc is None:
            raise Refused(ErrorCode.METHOD_NOT_FOUND)
        data = await self._hooks.rpc(self._connection, request.method, self._value(request.data))
        return {"data": self._written(data)}

    def _answer_rpc(self, request_id: int, result: bytes | Refused) -> None:
        """Answer an rpc that was not answered when it was asked, if the client is still here."""
        if not self._session.is_established:
            return
        if isinstance(result, Refused):
            self._reply(self._error(request_id, result))
        else:
            data = msgspec.Raw(result)
            self._reply(self._codec.reply(request_id, "rpc", {"data": data}))

    async def _on_send(self, command: Command) -> None:
        assert command.send is not None
        if self._hooks.message is None:
            raise Disconnect(CloseCode.NOT_AVAILABLE, "not available")
        data, opcode = bytes(command.send.data), frames.TEXT
        if self._opaque:
            try:
                data = check_json(data)
            except BadCommand:
                opcode = frames.BINARY
        await self._connection.handle_message(opcode, data)

    async def _on_refresh(self, command: Command) -> Result | None:
        assert command.refresh is not None
        if not self._tokens.enabled:
            raise Refused(ErrorCode.NOT_AVAILABLE)
        token = await self._connection_token(command.refresh.token)
        if not self._session.is_established:
            return None
        # The app may have made another user of it, which stays as it is.
        if token is None or token.user != self._token_user:
            self._note_refused(TokenInvalid("refresh for another user"))
            raise Disconnect(CloseCode.INVALID_TOKEN, "invalid token")
        result: dict[str, object] = {"client": str(self._session.fd), "version": VERSION}
        self._expires_at = self._watch(token.expires_at, result)
        self._connection.claims = token.claims
        return result

    async def _on_sub_refresh(self, command: Command) -> Result | None:
        request = command.sub_refresh
        assert request is not None
        if not self._tokens.enabled:
            raise Refused(ErrorCode.NOT_AVAILABLE)
        token = await self._subscription_token(request.channel, request.token)
        # Looked up after the wait: it may have ended meanwhile.
        subscription = self._session.subscriptions.get(request.channel)
        if token is None or subscription is None:
            raise Refused(ErrorCode.PERMISSION_DENIED)
        result: dict[str, object] = {}
        subscription.expires_at = self._watch(token.expires_at, result)
        return result

    # expiry

    def _watch(self, expires_at: float | None, result: dict[str, object]) -> float:
        """Note when something ends, told by the wall clock, and tell the client in `result`.

        Returns the deadline on Trio's clock: what the wall clock does later moves nothing. Raises
        `Refused` for what has ended already.
        """
        if expires_at is None:
            return inf
        rules, now = self._tokens.rules, self._tokens.now()
        if expires_at <= now - rules.leeway_seconds:
            raise Refused(ErrorCode.EXPIRED)
        result |= {"expires": True, "ttl": ttl(expires_at, now)}
        deadline = trio.current_time() + (expires_at - now) + rules.grace_seconds
        self._next_expiry = min(self._next_expiry, deadline)
        return deadline

    def expire_at(self, when: float | None) -> bool:
        """Put another end, in Unix seconds, in place of the one the connection has, or none; false,
        and nothing changes, if that time has come."""
        try:
            self._expires_at = self._watch(when, {})
        except Refused:
            return False
        return True

    def beat(self, now: float) -> None:
        """End what has expired and was not refreshed. Costs one comparison unless something has."""
        if now < self._next_expiry:
            return
        if now >= self._expires_at:
            self._connection.close(CloseCode.EXPIRED, "connection expired")
            return
        subscriptions = self._session.subscriptions
        for name, subscription in list(subscriptions.items()):
            if now >= subscription.expires_at:
                self._connection.end_subscription(
                    name, UnsubscribeCode.EXPIRED, "subscription expired"
                )
        ends = (subscription.expires_at for subscription in subscriptions.values())
        self._next_expiry = min(self._expires_at, *ends, inf)


def _refused(error: TokenRefused) -> Refused:
    """The error reply to a token that a client may replace, or try again with."""
    if isinstance(error, TokenExpired):
        return Refused(ErrorCode.TOKEN_EXPIRED)
    if isinstance(error, KeysUnavailable):
        return Refused(ErrorCode.INTERNAL)
    return Refused(ErrorCode.PERMISSION_DENIED)


_PONG = Command()


def _whole_seconds(interval: float) -> int:
    """A ping interval as clients know it: never less than it is, and 0 for no pings at all."""
    return 0 if interval == inf else ceil(interval)


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
        data = await self.conversation.authorize(topic, data)
        if not self.conversation._session.is_established:
            raise Refused(ErrorCode.NOT_AVAILABLE)  # which nobody is left to read
        return data

    def answer(self, result: bytes | Refused) -> None:
        self.conversation._answer_rpc(self.request_id, result)
