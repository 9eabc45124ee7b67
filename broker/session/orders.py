"""Things that the server does to a client of its own accord: push, subscribe, unsubscribe, bind.

Rule: a peer that has not spoken yet is not written to. Its messages and topics wait here, within the
bounds of its outbox and `max_topics`, until its first message tells which protocol it speaks.
"""

import sys
from collections.abc import Mapping
from functools import partial
from typing import Final, TypeAlias

import attrs
import msgspec
import structlog

from broker.core.memory import Part
from broker.core.messages import Opcode, PushResult
from broker.core.names import PERSONAL, admits_user, personal_topic
from broker.core.session import Decider, Grant, Phase, PhaseEvent, ServerSub
from broker.errors import ErrorCode, Refused, UnsubscribeCode
from broker.protocols.codec import Codec
from broker.protocols.commands import SubscribeRequest
from broker.protocols.json_text import to_json
from broker.protocols.plain import PLAIN, Plain
from broker.routing.recipients import Peer
from broker.routing.router import Router
from broker.routing.subscriptions import Plan, check_subscribable, plan_subscription
from broker.transport import frames
from broker.transport.outbox import Offer

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("broker")

_OFFERS = {
    Offer.TAKEN: PushResult.QUEUED,
    Offer.FULL: PushResult.FULL,
    Offer.SEALED: PushResult.CLOSED,
}


@attrs.frozen
class _Json:
    """Ready JSON."""

    data: bytes


@attrs.frozen
class Shaped:
    """A message whose frame is the app's own wish, where a peer is plain; see `shaped`."""

    message: "str | bytes | _Json"
    opcode: int
    fragment_bytes: int

    @property
    def value(self) -> str | bytes | msgspec.Raw:
        """The message itself, as it may be pushed."""
        message = self.message
        return msgspec.Raw(message.data) if isinstance(message, _Json) else message

    def frame(self) -> bytes:
        return frames.fragments(self.opcode, _bytes_of(self.message), self.fragment_bytes)


Message: TypeAlias = str | bytes | _Json | Shaped

LEAST_FRAGMENT: Final = 125
"""Bytes of a fragment: as many as the shortest header has room for, so that headers are no more than
a sixtieth of what is sent."""

ENTRY_BYTES: Final = 64
"""A message that waits costs so much besides its data."""


def message_of(data: object) -> Message:
    """Data as it is sent: `str` and `bytes` as they are, anything else as JSON.

    Raises `TypeError` for what JSON cannot say, and `ValueError` for text that is not Unicode.
    """
    if isinstance(data, str):
        data.encode()
        return data
    return data if isinstance(data, (bytes, Shaped)) else _Json(to_json(data))


def shaped(data: object, opcode: int | None, fragment_bytes: int | None) -> Shaped:
    """Data in a frame with this opcode, in fragments of so many bytes; None for what is right.

    Raises what `message_of` does, and `ValueError` for another opcode, for text that is not UTF-8,
    and for fragments that are too small.
    """
    message = message_of(data)
    assert not isinstance(message, Shaped)
    if opcode is None:
        opcode = Opcode.BINARY if isinstance(message, bytes) else Opcode.TEXT
    elif opcode not in (Opcode.TEXT, Opcode.BINARY):
        raise ValueError(
            f"opcode {opcode} is no message: TEXT and BINARY are; a ping is `ping`, a close "
            "`disconnect`, and fragments are made by `fragment_bytes`"
        )
    if isinstance(message, bytes) and opcode == Opcode.TEXT:
        message.decode()
    if fragment_bytes is None:
        fragment_bytes = sys.maxsize
    elif fragment_bytes < LEAST_FRAGMENT:
        raise ValueError(f"fragment_bytes is {fragment_bytes}: must be at least {LEAST_FRAGMENT}")
    return Shaped(message, opcode, fragment_bytes)


def size_of(message: Message) -> int:
    """The bytes of a message while it waits."""
    if isinstance(message, Shaped):
        message = message.message
    return ENTRY_BYTES + len(message.data if isinstance(message, _Json) else message)


def _bytes_of(message: str | bytes | _Json) -> bytes:
    if isinstance(message, _Json):
        return message.data
    return message if isinstance(message, bytes) else message.encode()


@attrs.define(eq=False)
class Orders:
    """The server's say over one peer. Each method is one atomic step, and never waits."""

    router: Router
    peer: Peer
    may_be_plain: bool
    """Whether the peer may turn out to speak no protocol: not over HTTP, nor with a subprotocol."""
    app_vouches: bool = attrs.field(init=False, default=False)
    """Whether the app has declared it plain, and so wants it to stay as it is."""
    _waiting: list[Message] | None = attrs.field(init=False, default=None)
    _waiting_bytes: int = attrs.field(init=False, default=0)
    _topics: dict[str, ServerSub] = attrs.field(init=False, factory=dict)

    @property
    def codec(self) -> Codec | None:
        """The codec of a Centrifuge client; None for any other peer, and before its connect."""
        codec = self.peer.codec
        if self.peer.phase is Phase.CONNECTED and isinstance(codec, Codec):
            return codec
        return None

    @property
    def _plain(self) -> Plain:
        """How the peer is written to where it speaks no protocol."""
        packed = self.peer.packed
        return PLAIN if packed is None else packed.plain

    # messages

    def push(self, data: object) -> PushResult:
        """Send one message; see `message_of`. An operator is nobody's correspondent: CLOSED."""
        if not (self.peer.is_established and self.peer.is_apps):
            return PushResult.CLOSED
        message = message_of(data)
        if self.peer.speaks:
            return self._send(message)
        size = size_of(message)
        if not self._has_room_to_wait(size):
            return PushResult.FULL
        self._waiting = self._waiting or []
        self._waiting.append(message)
        self._waiting_bytes += size
        self.peer.holding.charge(Part.OUTBOXES, size)
        return PushResult.QUEUED

    def has_room(self, size: int) -> bool:
        """Whether a message of so many bytes may be pushed by a sender that can wait for that."""
        if not self.peer.speaks:
            return self._has_room_to_wait(size)
        high, _ = self.router.settings.config.watermarks
        return self.peer.outbox.has_room(size, high)

    async def wait_change(self, size: int) -> None:
        """Wait until there may be room for a message of so many bytes, or the peer has changed: it speaks,
        is another user's, or goes. Look again then."""
        high, _ = self.router.settings.config.watermarks
        await self.peer.outbox.wait_eased(high - size if self.peer.speaks else 0)

    def _has_room_to_wait(self, size: int) -> bool:
        return self._waiting_bytes + size <= self.router.settings.config.outbox_bytes

    def _send(self, message: Message) -> PushResult:
        return _OFFERS[self.router.send(self.peer, (self._frame(message),), messages=1)]

    def _frame(self, message: Message) -> bytes:
        codec = self.codec
        plain = self._plain
        if codec is None and isinstance(message, str):  # as most are that are pushed often
            return plain.text_frame(message.encode())
        if isinstance(message, Shaped):
            if codec is None:
                return message.frame()
            message = message.message
        if codec is not None:
            if isinstance(message, _Json) or (isinstance(message, bytes) and codec.opaque_payloads):
                return codec.message(message if isinstance(message, bytes) else message.data)
            return codec.message(to_json(message))
        if isinstance(message, _Json):
            return plain.message(message.data)
        if isinstance(message, bytes):
            return plain.binary_frame(message)
        return plain.text_frame(message.encode())

    # topics

    def add_subscription(self, topic: str, sub: ServerSub) -> bool:
        """Subscribe the peer and tell it; false if it is subscribed already, closing, or an operator's.

        Raises `Refused`: 106 for one subscription too many, 107 for what is no topic or pattern.
        """
        peer, router = self.peer, self.router
        if not (peer.is_established and peer.is_apps):
            return False
        if topic in peer.subscriptions or topic in self._topics:
            return False
        check_subscribable(router, peer, topic)
        if not peer.speaks:
            limit = router.settings.config.max_topics
            if len(self._topics) >= limit:
                raise Refused(ErrorCode.LIMIT_EXCEEDED, f"more than {limit} subscriptions")
            self._topics[topic] = sub
            return True
        plan = self._plan(topic, sub)
        if plan.recoverable and not router.engine.knows(topic):
            self._topics[topic] = sub
            peer.start_soon(partial(self._begin_later, topic))
        else:
            self._begin(plan)
        return True

    def _plan(self, topic: str, sub: ServerSub) -> Plan:
        peer = self.peer
        return plan_subscription(
            self.router,
            peer,
            self.codec,
            SubscribeRequest(topic),
            Grant(topic, Decider.SERVER, peer.user, sub.info, sub.data),
            server_side=True,
            join_leave=sub.join_leave,
        )

    def _begin(self, plan: Plan) -> None:
        router, peer, topic = self.router, self.peer, plan.grant.name
        opened = plan.begin()
        if plan.codec is not None:
            fields = {k: v for k, v in opened.result.items() if k != "publications"}
            router.send(peer, (plan.codec.subscribe(topic, fields),))
        opened.settle(router)

    async def _begin_later(self, topic: str) -> None:
        """Begin a subscription when the engine knows its topic, if it is still wanted by then; it waits
        among the topics meanwhile."""
        try:
            await self.router.engine.fetch((topic,))
            sub = self._topics.pop(topic, None)
            if (
                sub is not None
                and self.peer.is_established
                and topic not in self.peer.subscriptions
            ):
                check_subscribable(self.router, self.peer, topic)
                self._begin(self._plan(topic, sub))
        except Refused as refusal:
            self._topics.pop(topic, None)
            log.error("not_subscribed", fd=self.peer.fd, topic=topic, reason=str(refusal))

    def end_subscription(self, topic: str, code: int, reason: str) -> bool:
        """End a subscription, whoever began it, and tell the client why; false if there was none."""
        if self._topics.pop(topic, None) is not None:
            return True
        if self.router.unsubscribe(self.peer, topic, code, reason) is None:
            return False
        codec = self.codec
        if codec is not None:
            self.router.send(self.peer, (codec.unsubscribe(topic, code, reason),))
        return True

    # the user

    def bind(self, user: str) -> None:
        """Make the connection another user's, in one step: its rights, its events, what others see
        of it, and the topics that are a user's own."""
        peer, router = self.peer, self.router
        before = peer.user
        self._topics = dict(self.topics_waiting_for(user))
        lost = router.bind(peer, user)
        peer.outbox.wake()
        codec, config = self.codec, router.settings.config
        if codec is None:
            return
        gone, come = list(lost), []
        if config.direct_topics:
            gone += [PERSONAL + before] if before else []
            come += [codec.subscribe(PERSONAL + user, {})] if user else []
        why = UnsubscribeCode.SERVER, "other user"
        router.send(peer, [*(codec.unsubscribe(name, *why) for name in gone), *come])
        own = personal_topic(user, config.max_topic_bytes) if config.personal_topic else None
        if own is not None and own not in peer.subscriptions:
            self.add_subscription(own, ServerSub())

    # the first message

    def vouch(self) -> bool:
        """`declare_plain` by the app, also where the peer has turned out to be plain by itself."""
        self.app_vouches = self.may_be_plain
        return self.declare_plain()

    def declare_plain(self) -> bool:
        """Take a peer that has not spoken yet for one that speaks no protocol; false for others.

        Messages and topics that waited for it go out. A `connect` of its is a message like others.
        """
        if self.peer.phase is not Phase.OPEN or not self.may_be_plain:
            return False
        self.router.send(self.peer, ())  # a run that is open does not know of it
        self.peer.codec = self._plain
        self.peer.transition(PhaseEvent.MESSAGE)
        topics, self._topics = self._topics, {}
        for topic, sub in topics.items():
            try:
                self.add_subscription(topic, sub)
            except Refused as refusal:  # the settings have changed meanwhile
                log.error("not_subscribed", fd=self.peer.fd, topic=topic, reason=str(refusal))
        self.send_waiting()
        return True

    def topics_waiting_for(self, user: str) -> Mapping[str, ServerSub]:
        """The topics that wait for the first message, or for the engine, of those that the connection has
        once it is this user's: where that is another than now, none that are for others alone."""
        if user == self.peer.user:
            return self._topics
        return {name: sub for name, sub in self._topics.items() if admits_user(name, user)}

    def take_topics(self) -> None:
        """The topics that waited have been seen to."""
        self._topics = {}

    def send_waiting(self) -> None:
        """Send the messages that waited until it was known how."""
        if self._waiting:
            self.peer.holding.charge(Part.OUTBOXES, -self._waiting_bytes)
            messages, self._waiting, self._waiting_bytes = self._waiting, None, 0
            for message in messages:
                self._send(message)
        self.peer.outbox.wake()
