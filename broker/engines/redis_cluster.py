"""The nodes that share a Redis: who lives, what they tell each other, and what is left of the dead.

The messages of a node go into the batches of its publications, in their order. Its beats say that it lives,
in one step of Redis each: the same step declares others dead, and writes that into the log. See
`engines.cluster` for the rules.
"""

import secrets
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import attrs
import structlog
import trio

from broker.core.messages import Fd
from broker.engines.cluster import BEAT_SECONDS, LEASE_SECONDS, Card, Listener
from broker.engines.redis_link import Link, unreadable
from broker.engines.redis_log import LOG_BYTES, Draft, Logged, SharedLog
from broker.engines.redis_outgoing import Outgoing
from broker.engines.redis_scripts import BEAT, CLEAR, ENTER, LEASE, LEAVE, LEFTOVERS, OWNERS, READ
from broker.engines.redis_wire import LinkLost, Script, to_bytes, to_text
from broker.errors import ErrorCode, Refused

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("broker.nodes")

MOST_STATED: Final = 64 * 2**20
"""Bytes of facts that may wait while Redis is away: about 200,000 connections that come and go."""

COUNTED_AT_ONCE: Final = 1000
"""Cards that Redis looks at in one step, in which nobody else is served: 2 ms."""

ANSWER_SECONDS: Final = 2.0
"""How long somebody waits who asks about cards."""


@attrs.define(eq=False)
class RedisClusterLink:
    """See the module, and `ClusterLink` for the methods."""

    shared: SharedLog
    out: Outgoing
    listener: Listener | None = attrs.field(init=False, default=None)
    is_shared = True
    _entered_in: str = attrs.field(init=False, default="")
    """The lineage in which this node was entered; "" before."""
    _hanging: dict[str, dict[str, bytes]] = attrs.field(init=False, factory=dict)
    """The notices of all nodes, by name, as the listener knows them."""
    _burying: set[str] = attrs.field(init=False, factory=set)
    _is_given_up: bool = attrs.field(init=False, default=False)
    _entered: trio.Event = attrs.field(init=False, factory=trio.Event)

    @property
    def node(self) -> str:
        return self.shared.node

    def listen(self, listener: Listener) -> None:
        self.listener = listener

    # what is said

    def tell(self, node: str, message: bytes) -> None:
        self.check()
        self.out.note(Draft("T", node, data=message), lasts=False)

    def announce(self, message: bytes) -> None:
        self.check()
        self.out.note(Draft("A", "", data=message), lasts=False)

    def post(self, name: str, value: bytes | None) -> None:
        draft = Draft("M", name) if value is None else Draft("N", name, data=value)
        self._state(draft)

    def file(self, drawer: str, name: str, value: bytes | None, owner: str = "") -> None:
        if value is None:
            draft = Draft("D", drawer, key=name)
        else:
            of = to_bytes(owner)
            draft = Draft("C", drawer, key=name, data=b"%d:%b%b" % (len(of), of, value))
        self._state(draft)

    def _state(self, draft: Draft) -> None:
        """Have a fact written, however long that takes. Where too many wait they are dropped, and this node
        is given up: another in its place says what is true then."""
        if self._is_given_up:
            return
        self.out.note(draft, lasts=True)
        if self.out.waiting > MOST_STATED:
            self._is_given_up = True
            self.out.drop_notes()
            self.shared.lose("too much waits to be written")

    def check(self) -> None:
        """Raise `Refused` (100) while nothing can be said."""
        why = self.shared.refusal
        if why:
            raise Refused(ErrorCode.INTERNAL, f"not kept: {why}")

    # what is asked

    async def read(self, drawer: str, most: int) -> Mapping[str, bytes]:
        found = await self._ask(READ, drawer, most)
        if found == -1:
            raise Refused(ErrorCode.LIMIT_EXCEEDED, f"more than {most} clients")
        cards: dict[str, bytes] = {}
        for flat in found:
            for name, value in zip(flat[::2], flat[1::2], strict=True):
                whole = self._without_owner(drawer, value)
                if whole is not None:
                    cards[to_text(name)] = whole
        return cards

    async def count(self, drawer: str) -> tuple[int, int]:
        cards: set[tuple[bytes, bytes]] = set()
        owners: set[bytes] = set()
        node, cursor = b"", b"0"
        while True:
            parts = to_text(node), to_text(cursor), COUNTED_AT_ONCE
            node, cursor, *found = await self._ask(OWNERS, drawer, *parts)
            cards.update(zip(found[::3], found[1::3], strict=True))
            owners.update(found[2::3])
            if not node:
                return len(cards), len(owners)

    async def lease_fds(self, count: int, above: Fd) -> range:
        answer = await self._ask(LEASE, count, above)
        try:
            last = int(answer)
        except ValueError as error:
            raise Refused(ErrorCode.INTERNAL, unreadable(error)) from None
        return range(last - count + 1, last + 1)

    async def leftovers(self, node: str, most: int) -> Sequence[Card]:
        flat = await self._ask(LEFTOVERS, node, most)
        if not flat:
            self._burying.discard(node)
        return [
            Card(to_text(drawer), to_text(name), self._without_owner(to_text(drawer), value) or b"")
            for drawer, name, value in zip(flat[::3], flat[1::3], flat[2::3], strict=True)
        ][:most]

    def _without_owner(self, drawer: str, value: bytes) -> bytes | None:
        """The content of a card; None, and logged, for what is no card of ours."""
        size, _, rest = value.partition(b":")
        # As the script that counts them finds it. 20 digits are too many already.
        if size.isdigit() and len(size) < 20 and int(size) <= len(rest):
            return rest[int(size) :]
        self.shared.note_misread(f"a card in {drawer} has no owner", value[:40])
        return None

    async def clear(self, node: str, cards: Sequence[Card]) -> None:
        names = [text for card in cards for text in (card.drawer, card.name)]
        await self._ask(CLEAR, node, *names)

    async def _ask(self, script: Script, *parts: str | int) -> Any:
        """Run a script behind all that this node has said. Raises `Refused` (100)."""
        shared, up_to = self.shared, self.out.noted
        with trio.move_on_after(ANSWER_SECONDS):
            await trio.lowlevel.checkpoint()
            while shared.written < up_to:
                await shared.wait_moved()
            link = await shared.wait_link()
            try:
                return await link.reader.run(script, shared.key + ":log", shared.key, *parts)
            except LinkLost as error:
                shared.lose(str(error))
        why = shared.failing or "it does not answer"
        raise Refused(ErrorCode.INTERNAL, f"Redis cannot be asked: {why}")

    # life

    @asynccontextmanager
    async def entered(self, seconds: float) -> AsyncGenerator[None]:
        """This node is among the others for as long as the block, which begins when it is."""
        with trio.move_on_after(seconds):
            await self._entered.wait()
        yield

    async def linked(self, link: Link) -> None:
        """Enter this node, or find that it was declared dead; learn what has changed. Raises `LinkLost`."""
        shared = self.shared
        was_in, has_lapsed = self._entered_in, False
        found = await self._enter(link, was_in)
        if found[0] == b"0" or self._is_given_up:
            self._is_given_up = False
            has_lapsed = True
            for flight in shared.become(secrets.token_hex(6)):
                shared.reader.missed(flight)
            shared.reader.settled()
            self.out.drop_notes()
            self._burying.clear()
            found = await self._enter(link, "")
        self._entered_in = found[0].decode()
        if has_lapsed or was_in not in ("", self._entered_in):
            self._hanging.clear()  # as the listener forgets all of it, and has to be told anew
            if has_lapsed:
                self._listener.lapsed()
            else:
                self._listener.restate()
        self._learn(found[1:])
        self._entered.set()

    async def _enter(self, link: Link, lineage: str) -> Any:
        shared = self.shared
        parts = shared.key, shared.node, secrets.token_hex(4), lineage
        return await link.reader.run(ENTER, shared.key + ":log", *parts)

    def _learn(self, found: Sequence[Any]) -> None:
        """Tell the listener every difference to the facts that it has."""
        hanging: dict[str, dict[str, bytes]] = {}
        for node, flat in zip(found[::2], found[1::2], strict=True):
            values = (
                dict(zip(flat[::2], flat[1::2], strict=True)) if isinstance(flat, list) else flat
            )
            hanging[node.decode()] = {to_text(name): value for name, value in values.items()}
        for node in [each for each in self._hanging if each not in hanging]:
            self._note_gone(node)
        for node, notices in hanging.items():
            known = self._hanging.get(node, {})
            for name in [each for each in known if each not in notices]:
                self._note(node, name, None)
            for name, value in notices.items():
                if known.get(name) != value:
                    self._note(node, name, value)

    async def beat(self, link: Link) -> None:
        """Say that this node lives, until cancelled. Raises `LinkLost`."""
        shared, began = self.shared, trio.current_time()
        while True:
            may_reap = trio.current_time() >= began + LEASE_SECONDS
            place, number = shared.inbox
            inbox = f"{min(place, shared.place)}-{number if place <= shared.place else 0}"
            parts = shared.key, shared.node, secrets.token_hex(4), int(LEASE_SECONDS * 1000)
            answer = await link.reader.run(
                BEAT, shared.key + ":log", *parts, int(may_reap), inbox, LOG_BYTES
            )
            if not answer:
                raise LinkLost("this node is not among the others any more")
            last, *dead = answer
            while shared.place < int(last):
                await shared.wait_moved()  # they are gone for this node, too
            for node in [each.decode() for each in dead]:
                if node not in self._burying:
                    self._burying.add(node)
                    self._listener.bury(node)
            await trio.sleep(BEAT_SECONDS)

    async def leave(self, link: Link) -> None:
        """Be among the others no longer. Raises `LinkLost`."""
        shared = self.shared
        shared.has_left = True
        parts = shared.key, shared.node, secrets.token_hex(4), LOG_BYTES
        await link.writer.run(LEAVE, shared.key + ":log", *parts)

    # what is read

    def take(self, logged: Logged) -> float:
        """Take what is in the log for all nodes; return the work of it. No checkpoint."""
        kind = logged.flags
        if kind == "A":
            return self.heard(logged.node, logged.data)
        if kind == "N":
            self._note(logged.node, logged.topic, logged.data)
        elif kind == "M":
            self._note(logged.node, logged.topic, None)
        elif logged.topic == self.node:
            self.shared.lose("this node was declared dead")
        else:
            self._note_gone(logged.topic)
        return 0.0

    def heard(self, sender: str, message: bytes) -> float:
        return self._listener.heard(sender, message)

    @property
    def _listener(self) -> Listener:
        return self.listener or NOBODY

    def _note(self, node: str, name: str, value: bytes | None) -> None:
        notices = self._hanging.setdefault(node, {})
        if value is None:
            notices.pop(name, None)
        else:
            notices[name] = value
        try:
            self._listener.noticed(node, name, value)
        except ValueError as error:
            self.shared.note_misread(f"the notice {name} of {node}: {error}", node.encode())

    def _note_gone(self, node: str) -> None:
        self._hanging.pop(node, None)
        if node != self.node:
            self._listener.gone(node)


class _Nobody:
    """Listens where no broker does: in a test of the engine alone."""

    def heard(self, sender: str, message: bytes) -> float:
        return 0.0

    def noticed(self, node: str, name: str, value: bytes | None) -> None: ...
    def gone(self, node: str) -> None: ...
    def bury(self, node: str) -> None: ...
    def restate(self) -> None: ...
    def lapsed(self) -> None: ...


NOBODY: Final = _Nobody()
