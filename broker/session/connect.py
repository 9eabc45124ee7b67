"""The commands that say who a client is: `connect`, and `refresh` of its token.

Rule: a connect is whole or not at all. All that can be refused is refused before anything changes.
"""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from math import ceil, inf
from typing import Final

import attrs
import msgspec

from broker.access.tokens import ConnectionToken
from broker.config.settings import Config
from broker.core.event_queue import EventKind
from broker.core.messages import Position
from broker.core.names import DIRECT, PERSONAL, personal_topic
from broker.core.session import Decider, Grant, PhaseEvent, ServerSub
from broker.core.work import COMMAND, SUBSCRIPTION
from broker.errors import (
    CloseCode,
    Disconnect,
    ErrorCode,
    Refused,
    TokenInvalid,
    TokenRefused,
)
from broker.hooks import ConnectEvent, ConnectReply
from broker.protocols.codec import Result
from broker.protocols.commands import Command, ConnectRequest, SubscribeRequest
from broker.protocols.json_text import to_json
from broker.routing.subscriptions import (
    Opened,
    Plan,
    is_recoverable,
    plan_subscription,
    since_of,
)
from broker.session.commands import (
    Found,
    Handler,
    note_refused,
    pay_for_token,
    refusal_of,
    weigh_token,
)
from broker.session.expiry import deadline, token_fields
from broker.session.replies import Client, Needed
from broker.version import VERSION

NAME_LENGTH: Final = 64
"""Characters that are kept of what a client calls itself: its program and its version, for a log."""

USUAL_TOKEN: Final = 1024
"""Bytes of a token that names few topics, if any. The other bytes of a longer one may all name some."""

TOPIC_IN_TOKEN: Final = 8
"""Bytes of a token for each topic that it lets its bearer subscribe to, at least: six before they are base64."""

_NOT_SEEN_BEFORE: Final = SubscribeRequest()
_NO_REPLY: Final = ConnectReply()


async def ask_connection_token(client: Client, token: str) -> Found[ConnectionToken]:
    """Verify a client's token, waiting for keys; None for one without, where that is allowed.

    Raises `Disconnect` for a token that will never do, `Refused` where another one may.
    """
    tokens = client.services.tokens
    if not _counts(client, token):
        return Found(None, tokens.basis)
    try:
        await tokens.wait_key(token)
        await pay_for_token(client, token)
        return Found(tokens.connection_nowait(token), tokens.basis)
    except TokenRefused as error:
        raise _verdict(client, error) from None


def connection_token(
    client: Client, token: str, found: Found[ConnectionToken] | None = None
) -> ConnectionToken | None:
    """The same by the keys that are here. What was `found` before stands unless a reload has changed rules or
    keys since."""
    if found is not None and found.basis == client.services.tokens.basis:
        return found.token
    if not _counts(client, token):
        return None
    client.services.router.meter.add(client.services.tokens.weigh(token))
    try:
        return client.services.tokens.connection_nowait(token)
    except TokenRefused as error:
        raise _verdict(client, error) from None


def _counts(client: Client, token: str) -> bool:
    """Whether a token is to be verified; raises `Disconnect` where one is missing."""
    tokens = client.services.tokens
    if not tokens.enabled:
        return False  # without a key a token means nothing, or only something to the app
    if token:
        return True
    if tokens.rules.anonymous_allowed:
        return False
    raise _verdict(client, TokenInvalid("no token"))


def _verdict(client: Client, error: TokenRefused) -> Exception:
    note_refused(client, error)
    if isinstance(error, TokenInvalid):
        return Disconnect(CloseCode.INVALID_TOKEN, "invalid token")
    return refusal_of(error)


@attrs.frozen
class _ConnectAnswer:
    """A verified token, and what the hook replied."""

    found: Found[ConnectionToken]
    reply: ConnectReply


class Connect(Handler):
    def must_ask(self, client: Client, command: Command) -> bool:
        services = client.services
        return services.hooks.connect is not None or services.tokens.may_wait or client.may_lack

    def topics(self, client: Client, command: Command, answer: object) -> Needed:
        request, router = command.connect, client.services.router
        assert request is not None
        if not isinstance(answer, _ConnectAnswer):
            return {}
        token, reply = answer.found.token, answer.reply
        user = reply.user or (client.peer.user if token is None else token.user)
        own = personal_topic(user, client.services.config.max_topic_bytes)
        wanted = {*client.orders.topics_waiting_for(user), *reply.topics}
        wanted |= set() if token is None else set(token.subs)
        wanted |= {own} if own is not None and client.services.config.personal_topic else set()
        needed: dict[str, Position | None] = {}
        for name in wanted:
            with suppress(Refused):
                router.rights.check_listenable(name)
                if is_recoverable(router, name, _NOT_SEEN_BEFORE, "", server_side=True):
                    needed[name] = since_of(request.subs.get(name, _NOT_SEEN_BEFORE))
        return needed

    async def ask(self, client: Client, command: Command) -> object:
        request = command.connect
        assert request is not None
        found = await ask_connection_token(client, request.token)
        reply = None
        if client.services.hooks.connect is not None and client.peer.is_established:
            event = ConnectEvent(
                client.connection,
                request.token,
                client.value(request.data),
                request.name,
                request.version,
                None if found.token is None else found.token.claims,
            )
            reply = await client.services.hooks.connect(event)
        return _ConnectAnswer(found, reply or _NO_REPLY)

    def weigh(self, client: Client, command: Command, answer: object = None) -> float:
        assert command.connect is not None
        given = command.connect.token
        topics = max(0, len(given) - USUAL_TOKEN) / TOPIC_IN_TOKEN
        if isinstance(answer, _ConnectAnswer):
            named = answer.found.token
            topics = len(answer.reply.topics) + len(named.subs if named is not None else ())
        return weigh_token(client, given) + topics * (SUBSCRIPTION + COMMAND)

    def act(self, client: Client, command: Command, answer: object) -> Result | None:
        request = command.connect
        assert request is not None
        if isinstance(answer, _ConnectAnswer):
            found, reply = answer.found, answer.reply
        else:
            found, reply = None, _NO_REPLY
        token = connection_token(client, request.token, found)
        admission = _admit(client, request, token, reply)
        _let_in(client, command.id, admission)
        return None


@attrs.frozen
class _Admission:
    """All that a client gets when it is let in; nothing of it can be refused any more."""

    user: str
    info: bytes | None
    token: ConnectionToken | None
    plans: list[Plan]
    result: dict[str, object]
    app_name: str
    app_version: str


def _admit(
    client: Client, request: ConnectRequest, token: ConnectionToken | None, reply: ConnectReply
) -> _Admission:
    """Check everything about a connect, and change nothing. Raises `Refused` and `Disconnect`; and
    `TypeError` for what JSON cannot say, so the client may try again."""
    services, peer = client.services, client.peer
    config, fd = services.config, peer.fd
    user = reply.user or (peer.user if token is None else token.user)
    info = None if reply.info is None else to_json(reply.info)
    if info is None and token is not None:
        info = token.info
    data = {"fd": fd, **(reply.data if isinstance(reply.data, dict) else {})}
    _check_connections_of(client, user)
    result: dict[str, object] = {
        "client": str(fd),
        "version": VERSION,
        **token_fields(services.tokens, token),
        "data": msgspec.Raw(to_json(data)),
        **ping_fields(config),
        **client.connect_fields,
    }
    subs = _server_subs(client, user, token, reply.topics)
    plans = [
        plan_subscription(
            services.router,
            peer,
            client.codec,
            # A client cannot filter what it did not ask for, and the others are not to blame.
            msgspec.structs.replace(
                request.subs.get(name, _NOT_SEEN_BEFORE), channel=name, flag=0, tf=None
            ),
            Grant(name, Decider.SERVER, user, sub.info, sub.data),
            server_side=True,
            join_leave=sub.join_leave,
        )
        for name, sub in subs.items()
    ]
    for name, asked in request.subs.items():
        if name not in subs and asked.type:
            text = f"type {asked.type}: only streams are served, no maps and no shared polls"
            raise Refused(ErrorCode.NOT_AVAILABLE, text)
    named = request.name[:NAME_LENGTH], request.version[:NAME_LENGTH]
    return _Admission(user, info, token, plans, result, *named)


def _let_in(client: Client, request_id: int, admission: _Admission) -> None:
    """Connect the client and answer it. No checkpoint: the next publication comes behind."""
    services, peer, token = client.services, client.peer, admission.token
    router = services.router
    peer.codec = client.codec
    peer.transition(PhaseEvent.CONNECT)
    peer.conn_info = admission.info
    peer.app_name, peer.app_version = admission.app_name, admission.app_version
    router.hub.sessions.bind(peer, admission.user)
    client.orders.take_topics()
    services.emit(EventKind.CONNECTED, peer.fd, peer.user, protocol=client.codec.name)
    services.log.info(
        "connected",
        fd=peer.fd,
        user=peer.user,
        peer=client.connection.address,
        protocol=client.codec.name,
        app_name=peer.app_name,
        app_version=peer.app_version,
    )
    if token is not None:
        peer.claims, peer.token_user = token.claims, token.user
        peer.expires_at = deadline(services.tokens, peer, token.expires_at)
    opened: list[Opened] = []
    room = services.config.history_reply_bytes
    for plan in admission.plans:
        opened.append(plan.begin(room))
        room -= opened[-1].size
    subs: dict[str, object] = {}
    if services.config.direct_topics:
        subs[f"{DIRECT}{peer.fd}"] = {}
        if peer.user:
            subs[f"{PERSONAL}{peer.user}"] = {}
    subs |= {each.subscription.name: each.result for each in opened}
    client.reply(request_id, "connect", {**admission.result, "subs": subs})
    for each in opened:
        each.settle(router)
    client.orders.send_waiting()


def _server_subs(
    client: Client, user: str, token: ConnectionToken | None, topics: Iterable[str]
) -> Mapping[str, ServerSub]:
    """The topics that this client is subscribed to at once: by the app, the settings, its token.

    Raises `Refused` for one of its token that nobody may listen to, and for too many.
    """
    config, rights = client.services.config, client.services.rights
    subs: dict[str, ServerSub] = {}
    waiting = client.orders.topics_waiting_for(user)
    wanted = {**waiting, **{name: ServerSub() for name in topics}}
    for name, sub in wanted.items():
        try:
            rights.check_listenable(name)
        except Refused as refusal:
            client.services.log.error(
                "not_subscribed", fd=client.peer.fd, topic=name, reason=str(refusal)
            )
        else:
            subs[name] = sub
    own = personal_topic(user, config.max_topic_bytes) if config.personal_topic else None
    by_token = {} if token is None else token.subs
    if len(by_token) + (own is not None) > config.max_topics:
        limit = f"more than {config.max_topics} subscriptions"
        raise Refused(ErrorCode.LIMIT_EXCEEDED, limit)
    if own is not None:
        subs[own] = ServerSub()
    for name, granted in by_token.items():
        rights.check_listenable(name)
        subs[name] = granted
    return subs


def _check_connections_of(client: Client, user: str) -> None:
    limit = client.services.config.max_connections_per_user
    if not user or limit is None:
        return
    fds = client.services.router.hub.sessions.fds_of(user)
    if len([fd for fd in fds if fd != client.peer.fd]) >= limit:
        raise Disconnect(CloseCode.CONNECTION_LIMIT, "connection limit")


def ping_fields(config: Config) -> Result:
    """The ping fields for a client: whole seconds, never less than the interval; 0 for no pings at all."""
    seconds = config.ping_seconds
    return {"ping": 0 if seconds == inf else ceil(seconds), "pong": True}


class Refresh(Handler):
    def must_ask(self, client: Client, command: Command) -> bool:
        return client.services.tokens.may_wait

    async def ask(self, client: Client, command: Command) -> object:
        assert command.refresh is not None
        return await ask_connection_token(client, command.refresh.token)

    def weigh(self, client: Client, command: Command, answer: object = None) -> float:
        assert command.refresh is not None
        return weigh_token(client, command.refresh.token)

    def act(self, client: Client, command: Command, answer: object) -> Result | None:
        assert command.refresh is not None
        services, peer = client.services, client.peer
        if not services.tokens.enabled:
            raise Refused(ErrorCode.NOT_AVAILABLE)
        found = answer if isinstance(answer, Found) else None
        token = connection_token(client, command.refresh.token, found)
        # The app may have made another user of it, which stays as it is.
        if token is None or token.user != peer.token_user:
            note_refused(client, TokenInvalid("refresh for another user"))
            raise Disconnect(CloseCode.INVALID_TOKEN, "invalid token")
        fields = token_fields(services.tokens, token)
        peer.expires_at = deadline(services.tokens, peer, token.expires_at)
        peer.claims = token.claims
        return {"client": str(peer.fd), "version": VERSION, **fields}
