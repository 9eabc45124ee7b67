"""Commands of Centrifuge clients, and what they are answered (wire reference, section 2).

Each command is a step that never waits, `act`, with an `ask` before it where somebody has to be
asked: a hook of the app, its backend, an issuer of keys.

Rules:

1. `act` decides and acts in one atomic step. The answer to `ask` was true before an await, so it is
   checked again.
2. A bad request gets an error reply; a client that does not follow the protocol is sent away.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Final, Generic, TypeVar

import attrs

from broker.access.rights import Reading
from broker.access.tokens import SubscriptionToken
from broker.core.history import UnrecoverablePosition
from broker.core.messages import Frame, Position
from broker.core.work import MEMBER
from broker.errors import (
    ErrorCode,
    KeysUnavailable,
    Refused,
    TokenExpired,
    TokenInvalid,
    TokenRefused,
)
from broker.hooks import Connection, PublishEvent, ReadEvent, SubscribeEvent, SubscribeReply
from broker.protocols.codec import Result
from broker.protocols.commands import Command, HistoryRequest, SubscribeRequest
from broker.protocols.json_text import check_json, to_json
from broker.routing.neighbourhood import Neighbourhood
from broker.routing.reading import (
    history_page,
    listed_clients,
    listing_work,
    presence_counts,
    presence_page,
    weigh_history,
)
from broker.routing.subscriptions import (
    check_subscribable,
    is_recoverable,
    plan_subscription,
    since_of,
    weigh_subscribing,
)
from broker.session.expiry import deadline, token_fields
from broker.session.replies import NOTHING, Client, Needed
from broker.session.services import Services
from broker.transport import frames

T = TypeVar("T")

_NO_REPLY: Final = SubscribeReply()

MAX_GROUP_LENGTH: Final = 255
"""Characters of a queue group's name: as long as topics may be unless the config says otherwise."""


class Handler(ABC):
    """Carries out one kind of command. Unless it says otherwise nobody is asked, and it is cheap."""

    def must_ask(self, client: Client, command: Command) -> bool:
        """Whether `ask` has to be called, because somebody is to be asked."""
        return False

    async def ask(self, client: Client, command: Command) -> object:
        """Ask, and return the answer for `act`. Raises `Refused` and `Disconnect`."""
        return None

    def weigh(self, client: Client, command: Command, answer: object = None) -> float:
        """The work that `act` is going to take besides that of every command, about; see `core.work`. `answer`
        is None where nobody was asked, or before that.

        It is all that others know of the step: one that is not told is too much, where many come to it at once.
        """
        return 0.0

    def is_held(self, client: Client, command: Command) -> bool:
        """Whether the engine has to be waited for before `act`: a client that publishes, and then asks
        for the history, finds what it has published."""
        return client.pending > 0

    def topics(self, client: Client, command: Command, answer: object) -> Needed:
        """The topics whose history or position `act` needs, by the state of now. `answer` is None before
        anybody was asked."""
        return {}

    @abstractmethod
    def act(self, client: Client, command: Command, answer: object) -> Result | None:
        """Carry the command out: the result, or None if there is none to send now.

        `answer` is None where nobody was asked. Raises `Refused` and `Disconnect`, with nothing
        changed.
        """


def note_refused(client: Client, error: TokenRefused) -> None:
    """Log why a token was refused; its bearer is never told."""
    client.services.log.info("token_refused", fd=client.peer.fd, reason=str(error)[:200])


def refusal_of(error: TokenRefused) -> Refused:
    """The error reply to a token that a client may replace, or try again with."""
    if isinstance(error, TokenExpired):
        return Refused(ErrorCode.TOKEN_EXPIRED)
    if isinstance(error, KeysUnavailable):
        return Refused(ErrorCode.INTERNAL)
    return Refused(ErrorCode.PERMISSION_DENIED)


# tokens


@attrs.frozen
class Found(Generic[T]):
    """A verified token, or None where there is none and none is asked for; by which rules and keys that is so."""

    token: T | None
    basis: object


async def pay_for_token(client: Client, token: str) -> None:
    """Wait for the turn in which a token is verified, and count that. For who waited for its key: a thousand
    may have waited for the same."""
    await client.services.router.turns.pay(client.services.tokens.weigh(token))


def weigh_token(client: Client, token: str) -> float:
    """The work of a token that is verified in the step of its command."""
    tokens = client.services.tokens
    return 0.0 if tokens.may_wait else tokens.weigh(token)


async def ask_subscription_token(client: Client, token: str) -> Found[SubscriptionToken]:
    """Verify a subscription token, waiting for keys; None for none, or where none counts."""
    tokens = client.services.tokens
    if not token or not tokens.enabled:
        return Found(None, tokens.basis)
    try:
        await tokens.wait_key(token)
        await pay_for_token(client, token)
        return Found(tokens.subscription_nowait(token), tokens.basis)
    except TokenRefused as error:
        note_refused(client, error)
        raise refusal_of(error) from None


def subscription_token(
    client: Client, token: str, found: Found[SubscriptionToken] | None = None
) -> SubscriptionToken | None:
    """The same by the keys that are here. What was `found` before stands unless a reload has changed rules or
    keys since."""
    tokens = client.services.tokens
    if found is not None and found.basis == tokens.basis:
        return found.token
    if not token or not tokens.enabled:
        return None
    client.services.router.meter.add(tokens.weigh(token))
    try:
        return tokens.subscription_nowait(token)
    except TokenRefused as error:
        note_refused(client, error)
        raise refusal_of(error) from None


def check_bearer(client: Client, name: str, token: SubscriptionToken | None) -> None:
    """Raise `Refused` for a token that is for another topic, user or connection."""
    if token is None:
        return
    peer = client.peer
    for wanted, given, what in (
        (name, token.topic, "topic"),
        (peer.user, token.user, "user"),
        (str(peer.fd), token.client or str(peer.fd), "connection"),
    ):
        if wanted != given:
            note_refused(client, TokenInvalid(f"for another {what}"))
            raise Refused(ErrorCode.PERMISSION_DENIED)


# subscriptions


@attrs.frozen
class _SubscribeAnswer:
    """A verified token, and what the hook replied."""

    found: Found[SubscriptionToken]
    reply: SubscribeReply


class Subscribe(Handler):
    def must_ask(self, client: Client, command: Command) -> bool:
        services = client.services
        return (
            services.hooks.subscribe is not None
            or services.tokens.may_wait
            or (client.may_lack and client.lacks(self.topics(client, command, None)))
        )

    def topics(self, client: Client, command: Command, answer: object) -> Needed:
        request = command.subscribe
        assert request is not None
        router, name = client.services.router, request.channel
        try:
            # Before its rules are looked up: they are remembered by name.
            router.rights.check_listenable(name)
            group = _group_of(client, request)
            if is_recoverable(router, name, request, group):
                return {name: since_of(request)}
        except Refused:
            pass
        return {}

    async def ask(self, client: Client, command: Command) -> object:
        request = command.subscribe
        assert request is not None
        name, peer, services = request.channel, client.peer, client.services
        check_subscribable(services.router, peer, name)
        found = await ask_subscription_token(client, request.token)
        token = found.token
        check_bearer(client, name, token)
        services.rights.grant(peer, name, token)
        reply = None
        if services.hooks.subscribe is not None and peer.is_established:
            data = client.value(request.data)
            claims = None if token is None else token.claims
            event = SubscribeEvent(client.connection, name, request.token, data, claims)
            reply = await services.hooks.subscribe(event)
        await client.fetch(self.topics(client, command, None))
        return _SubscribeAnswer(found, reply or _NO_REPLY)

    def weigh(self, client: Client, command: Command, answer: object = None) -> float:
        request = command.subscribe
        assert request is not None
        return weigh_token(client, request.token) + weigh_subscribing(
            client.services.router, request
        )

    def act(self, client: Client, command: Command, answer: object) -> Result | None:
        request = command.subscribe
        assert request is not None
        name, peer, services = request.channel, client.peer, client.services
        check_subscribable(services.router, peer, name)
        if isinstance(answer, _SubscribeAnswer):
            found, reply = answer.found, answer.reply
        else:
            found, reply = None, _NO_REPLY
        token = subscription_token(client, request.token, found)
        check_bearer(client, name, token)
        grant = services.rights.grant(peer, name, token)
        if reply.info is not None:
            grant = attrs.evolve(grant, info=to_json(reply.info))
        if reply.data is not None:
            grant = attrs.evolve(grant, data=to_json(reply.data))
        expiry = token_fields(services.tokens, token)
        plan = plan_subscription(
            services.router, peer, client.codec, request, grant, group=_group_of(client, request)
        )
        # No checkpoint from here to the reply: the next publication comes behind it.
        opened = plan.begin()
        opened.subscription.expires_at = deadline(services.tokens, peer, grant.expires_at)
        client.reply(command.id, "subscribe", {**expiry, **opened.result})
        opened.settle(services.router)
        return None


def _group_of(client: Client, request: SubscribeRequest) -> str:
    """The queue group that a subscriber names in its `data`; "" if none.

    Raises `Refused` for a group that is no text, and for an empty one.
    """
    data = request.data
    if b'"group"' not in bytes(data):
        return ""
    fields = client.value(data)
    group = fields.get("group") if isinstance(fields, dict) else None
    if group is None:
        return ""
    if not isinstance(group, str) or not 0 < len(group) <= MAX_GROUP_LENGTH:
        text = f"group is a text of 1 to {MAX_GROUP_LENGTH} characters"
        raise Refused(ErrorCode.BAD_REQUEST, text)
    return group


class Unsubscribe(Handler):
    def weigh(self, client: Client, command: Command, answer: object = None) -> float:
        assert command.unsubscribe is not None
        return client.services.router.watchers.weigh(command.unsubscribe.channel)

    def act(self, client: Client, command: Command, answer: object) -> Result | None:
        assert command.unsubscribe is not None
        client.services.router.unsubscribe(client.peer, command.unsubscribe.channel)
        return NOTHING


class SubRefresh(Handler):
    def must_ask(self, client: Client, command: Command) -> bool:
        return client.services.tokens.may_wait

    async def ask(self, client: Client, command: Command) -> object:
        assert command.sub_refresh is not None
        return await ask_subscription_token(client, command.sub_refresh.token)

    def weigh(self, client: Client, command: Command, answer: object = None) -> float:
        assert command.sub_refresh is not None
        return weigh_token(client, command.sub_refresh.token)

    def act(self, client: Client, command: Command, answer: object) -> Result | None:
        request, services = command.sub_refresh, client.services
        assert request is not None
        if not services.tokens.enabled:
            raise Refused(ErrorCode.NOT_AVAILABLE)
        found = answer if isinstance(answer, Found) else None
        token = subscription_token(client, request.token, found)
        check_bearer(client, request.channel, token)
        subscription = client.peer.subscriptions.get(request.channel)
        if token is None or subscription is None:
            raise Refused(ErrorCode.PERMISSION_DENIED)
        fields = token_fields(services.tokens, token)
        subscription.expires_at = deadline(services.tokens, client.peer, token.expires_at)
        return fields


# messages and publications


async def hand_to_app(
    services: Services, connection: Connection, opcode: int, payload: bytes
) -> None:
    """Give one message to the app."""
    text = opcode == frames.TEXT
    frame = Frame(payload.decode() if text else payload, opcode)
    services.log.debug(
        "message", fd=connection.fd, data=frame.data, opcode=opcode, fin=int(frame.fin)
    )
    if services.hooks.message is not None:
        await services.hooks.message(connection, frame)


async def ask_publish(client: Client, topic: str, data: bytes) -> bytes:
    """Ask rules and app whether `data` may be published; return what the app wants in its place.

    Raises `Refused`. The rules are asked again when it is published.
    """
    services = client.services
    services.rights.check_publish(client.peer, topic)
    if services.hooks.publish is not None:
        reply = await services.hooks.publish(PublishEvent(client.connection, topic, data))
        if reply is not None and reply.data is not None:
            return check_json(reply.data)
    return data


# reading


async def ask_read(client: Client, topic: str, what: Reading) -> None:
    """Ask rules and app whether a topic's history or presence may be read. Raises `Refused`. The rules are
    asked again when it is read."""
    client.services.rights.check_read(client.peer, topic, what)
    hooks = client.services.hooks
    hook = hooks.history if what == "history" else hooks.presence
    if hook is not None:
        await hook(ReadEvent(client.connection, topic))


class _ReadsPresence(Handler):
    """The common part of the two presence commands: who may ask, and what there is to tell."""

    def must_ask(self, client: Client, command: Command) -> bool:
        services = client.services
        return services.hooks.presence is not None or services.neighbourhood is not None

    async def ask(self, client: Client, command: Command) -> object:
        topic, neighbourhood = self._topic(command), client.services.neighbourhood
        await ask_read(client, topic, "presence")
        return None if neighbourhood is None else await self._read(client, topic, neighbourhood)

    @abstractmethod
    async def _read(self, client: Client, topic: str, neighbourhood: Neighbourhood) -> object:
        """Fetch who is on a topic on all nodes, for `act`. Raises `Refused`."""

    def weigh(self, client: Client, command: Command, answer: object = None) -> float:
        return MEMBER * client.services.router.hub.count(self._topic(command))

    def _topic(self, command: Command) -> str:
        request = command.presence or command.presence_stats
        assert request is not None
        return request.channel

    def _allowed(self, client: Client, command: Command) -> str:
        """The topic, if this client may ask about it. Raises `Refused`."""
        topic = self._topic(command)
        client.services.rights.check_read(client.peer, topic, "presence")
        return topic


class Presence(_ReadsPresence):
    async def _read(self, client: Client, topic: str, neighbourhood: Neighbourhood) -> object:
        most = client.services.config.presence_max_clients
        return await neighbourhood.roster.presence(topic, most)

    def act(self, client: Client, command: Command, answer: object) -> Result | None:
        topic, router = self._allowed(client, command), client.services.router
        if isinstance(answer, Mapping):
            return client.codec.presence(listed_clients(router, answer))
        return client.codec.presence(presence_page(router, topic))


class PresenceStats(_ReadsPresence):
    def weigh(self, client: Client, command: Command, answer: object = None) -> float:
        return super().weigh(client, command) / 10

    async def _read(self, client: Client, topic: str, neighbourhood: Neighbourhood) -> object:
        return await neighbourhood.roster.counts(topic)

    def act(self, client: Client, command: Command, answer: object) -> Result | None:
        topic = self._allowed(client, command)
        if isinstance(answer, tuple):
            clients, users = answer
        else:
            clients, users = presence_counts(client.services.router, topic)
        return {"num_clients": clients, "num_users": users}


def _since(request: HistoryRequest) -> Position | None:
    return None if request.since is None else Position(request.since.offset, request.since.epoch)


class History(Handler):
    def must_ask(self, client: Client, command: Command) -> bool:
        needed = self.topics(client, command, None)
        return client.services.hooks.history is not None or client.lacks(needed)

    def topics(self, client: Client, command: Command, answer: object) -> Needed:
        assert command.history is not None
        return {command.history.channel: _since(command.history)}

    async def ask(self, client: Client, command: Command) -> object:
        assert command.history is not None
        await ask_read(client, command.history.channel, "history")
        await client.fetch(self.topics(client, command, None))
        return None

    def act(self, client: Client, command: Command, answer: object) -> Result | None:
        request, services = command.history, client.services
        assert request is not None
        services.rights.check_read(client.peer, request.channel, "history")
        if request.since is not None and request.reverse and not request.since.offset:
            raise Refused(ErrorCode.BAD_REQUEST, "reverse since offset 0: nothing is before it")
        try:
            publications, top = history_page(
                services.router, request.channel, _since(request), request.limit, request.reverse
            )
        except UnrecoverablePosition:
            raise Refused(ErrorCode.UNRECOVERABLE_POSITION) from None
        services.router.meter.add(listing_work(publications))
        return client.codec.stream(publications, top)

    def weigh(self, client: Client, command: Command, answer: object = None) -> float:
        request = command.history
        assert request is not None
        since = None if request.since is None else request.since.offset
        router = client.services.router
        return weigh_history(router, request.channel, since, request.limit, request.reverse)
