"""A Centrifuge client as its commands see it: how they are answered, and how payloads are read.

Rule: a publish is answered when its batch is done, after its own publications, or when the engine has
kept it; everything else is answered at once, behind all that came before.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Final, TypeAlias

import attrs
import msgspec
import trio

from broker.core.json_reader import BadJson, value_of
from broker.core.messages import Position
from broker.engines.engine import Done
from broker.errors import ErrorCode, Refused
from broker.hooks import Connection
from broker.protocols.codec import Codec, Result
from broker.protocols.json_text import one_line, to_json
from broker.routing.recipients import Peer
from broker.session.orders import Orders
from broker.session.services import Services

NOTHING: Final[Result] = {}

Needed: TypeAlias = Mapping[str, Position | None]
"""Topics that a command needs, each with the position that its client comes with, if it has one."""


@attrs.define(eq=False)
class Client:
    """One peer that speaks the Centrifuge protocol, from its first command on.

    `connection` is the same as hooks see it, `codec` how it speaks and is spoken to. The transport
    adds `connect_fields` to the reply to `connect`.
    """

    services: Services
    peer: Peer
    orders: Orders
    connection: Connection
    codec: Codec
    connect_fields: Result = NOTHING
    pending: int = attrs.field(init=False, default=0)
    """Batches of its publishes that the engine has yet to keep."""
    _all_kept: trio.Event | None = attrs.field(init=False, default=None)
    _replies: list[bytes] = attrs.field(init=False, factory=list)
    _open_topic: str = attrs.field(init=False, default="")
    _open_version: int = attrs.field(init=False, default=-1)

    # rights

    def check_publish(self, topic: str) -> None:
        """Raise `Refused` unless this client may publish to `topic` now. Two comparisons where
        everybody may, and it published there before."""
        if topic == self.open_topic() and topic:
            return
        if self.services.rights.check_publish(self.peer, topic):
            self._open_topic = topic
            self._open_version = self.services.settings.version

    def open_topic(self) -> str:
        """The topic it last published to, if everybody may under the settings of now; else ""."""
        is_current = self._open_version == self.services.settings.version
        return self._open_topic if is_current else ""

    # what topics keep

    @property
    def may_lack(self) -> bool:
        """Whether there may be topics of which the engine does not know here what it keeps."""
        return self.services.router.engine.durability == "shared"

    def lacks(self, needed: Needed) -> bool:
        """Whether the engine has to be waited for to know what these topics keep."""
        engine = self.services.router.engine
        return not all(engine.knows(topic, since) for topic, since in needed.items())

    async def fetch(self, needed: Needed) -> None:
        """Wait until the engine knows these topics, and whether a client's position is theirs; no checkpoint
        where it does. Raises `Refused`."""
        if self.lacks(needed):
            await self.services.router.engine.fetch([*needed], needed)

    # replies

    def answer_publishes(self, request_ids: Sequence[int], refusal: Refused | None) -> None:
        """Answer publishes, when the batch is done: all were carried out, or all were refused."""
        self._replies += self._publish_replies(request_ids, refusal)

    def _publish_replies(
        self, request_ids: Sequence[int], refusal: Refused | None
    ) -> Sequence[bytes]:
        if refusal is not None:
            return [self.error(each, refusal) for each in request_ids]
        return self.codec.published(request_ids) if request_ids else ()

    def answer_when_kept(self, dones: list[Done], request_ids: Sequence[int]) -> None:
        """Answer these publishes when the engine has kept them, together with all others of its
        batch; those without an id not at all."""
        self.pending += 1
        dones.append(partial(self._publishes_kept, request_ids))

    def _publishes_kept(
        self, request_ids: Sequence[int], result: Position | Refused | None
    ) -> None:
        refusal = result if isinstance(result, Refused) else None
        self.kept(self._publish_replies([each for each in request_ids if each], refusal))

    def kept(self, replies: Sequence[bytes]) -> None:
        """One of what is `pending` is kept, or refused; send these with all answers of its batch."""
        self.pending -= 1
        if not self.pending and self._all_kept is not None:
            self._all_kept.set()
            self._all_kept = None
        if replies and self.peer.is_established:
            self._replies += replies
            self.services.router.returns.when_settled(self.settle)

    async def wait_kept(self) -> None:
        """Wait until the engine has kept, or refused, all that this client has published."""
        while self.pending:
            if self._all_kept is None:
                self._all_kept = trio.Event()
            await self._all_kept.wait()

    def settle(self) -> None:
        """Send out the replies that wait, behind what has been published. Never waits.

        Without a reply the run stays open, for other sessions to join theirs to it.
        """
        if self._replies:
            replies, self._replies = self._replies, []
            self.services.router.send(self.peer, (self.codec.frame(replies),), messages=1)

    def reply(self, request_id: int, method: str, result: Result) -> None:
        """Answer a command at once."""
        self._reply(self.codec.reply(request_id, method, result))

    def refuse(self, request_id: int, refusal: Refused) -> None:
        """Answer a command with an error; nobody waits for one that has no id."""
        if request_id:
            self._reply(self.error(request_id, refusal))

    def _reply(self, reply: bytes) -> None:
        self.settle()
        self.services.router.reply(self.peer, self.codec.frame([reply]))

    def error(self, request_id: int, refusal: Refused) -> bytes:
        """An error reply, not framed yet."""
        self.services.counts.note_error(refusal.code)
        return self.codec.error(request_id, refusal.code, refusal.message, refusal.temporary)

    # payloads

    def payload(self, data: msgspec.Raw) -> bytes:
        """A copy of what a client sent, as it goes on: a Raw would keep all of its message."""
        return bytes(data) if self.codec.opaque_payloads else one_line(bytes(data))

    def value(self, data: msgspec.Raw) -> object:
        """The same as hooks get it: decoded, or None; as bytes if it is not JSON. Raises `Refused`
        for JSON that Python cannot hold."""
        if not data:
            return None
        try:
            return value_of(bytes(data))
        except BadJson as error:  # or deeper than Python goes
            if self.codec.opaque_payloads:
                return bytes(data)
            raise Refused(ErrorCode.BAD_REQUEST, f"data: {error}") from None

    def written(self, value: object) -> msgspec.Raw:
        """A value of the app, as this client gets it. Raises `TypeError` for what JSON cannot say."""
        if isinstance(value, bytes) and self.codec.opaque_payloads:
            return msgspec.Raw(value)
        return msgspec.Raw(to_json(value))
