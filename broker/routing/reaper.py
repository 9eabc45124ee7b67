"""The burial of a dead node: those who watch learn that its clients have left, their wills are published,
and the readers of events learn that nobody is connected to it any more.

Rules:

1. One node buries, and what it has dealt with is cleared then. If it dies as well another goes on: so a
   leave may be told twice, and a will is published once, by its key.
2. The last is cleared when every reader of events was told: an event that only waits here may die with this
   node.
3. A burial has its turns as all else has: its node may have had ten thousand clients.
"""

from collections.abc import Callable
from typing import Final

import attrs
import msgspec
import structlog
import trio

from broker.core.messages import Delivery
from broker.core.work import COMMAND, KILOBYTE, PEER
from broker.engines.cluster import Card
from broker.errors import Refused
from broker.events.dispatcher import Events
from broker.routing.neighbours import Neighbours
from broker.routing.publishing import Publisher, PublishOptions
from broker.routing.roster import EVENTS, IN, WILLS, LastWill, info_of
from broker.routing.router import Router

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("broker.nodes")

AT_ONCE: Final = 100
"""Cards of one step."""

RETRY_SECONDS: Final = 1.0

_last_will: Final = msgspec.msgpack.Decoder(LastWill)


@attrs.define(eq=False)
class Reaper:
    """See the module."""

    neighbours: Neighbours
    router: Router
    publisher: Publisher
    events: Events | None
    _start: Callable[[str], None] | None = attrs.field(init=False, default=None)
    _waiting: list[str] = attrs.field(init=False, factory=list)

    def __attrs_post_init__(self) -> None:
        self.neighbours.on_bury = self._bury

    def _bury(self, node: str) -> None:
        if self._start is None:
            self._waiting.append(node)
        else:
            self._start(node)

    async def run(self) -> None:
        """Bury nodes that have died, until cancelled."""
        async with trio.open_nursery() as burials:

            def start(node: str) -> None:
                burials.start_soon(self._see_to, node, name="burial")

            self._start = start
            for node in self._waiting:
                start(node)
            self._waiting.clear()
            await trio.sleep_forever()

    async def _see_to(self, node: str) -> None:
        cluster, me = self.neighbours.cluster, self.neighbours.id
        log.warning("burying", id=node)
        while me == self.neighbours.id:  # else it has died itself, and somebody else goes on
            try:
                cards = await cluster.leftovers(node, AT_ONCE)
                if not cards:
                    log.info("buried", id=node)
                    return
                for card in cards:
                    try:
                        await self._deal_with(node, card)
                    except ValueError as error:  # no card of ours: it is cleared like all others
                        log.error("card_misread", name=card.name, reason=str(error)[:200])
                await cluster.clear(node, cards)
            except Refused as refusal:
                log.warning("burial_waits", id=node, reason=refusal.message)
                await trio.sleep(RETRY_SECONDS)

    async def _deal_with(self, node: str, card: Card) -> None:
        work = COMMAND + len(card.value) / 1024 * KILOBYTE
        if card.drawer.startswith(IN):
            topic = card.drawer[len(IN) :]
            watchers = len(self.router.hub.watchers(topic))
            await self.router.turns.wait(work + watchers * PEER)
            self.router.watchers.left_for_good(topic, info_of(card.name, card.value))
        elif card.drawer == WILLS:
            will = _last_will.decode(card.value)
            await self.router.turns.wait(work + self.publisher.weigh(will.topic))
            await self._carry_out(node, card.name, will)
        elif card.drawer == EVENTS and self.events is not None:
            await self.events.tell_death(card.name, card.value.decode())

    async def _carry_out(self, node: str, fd: str, will: LastWill) -> None:
        key = f"will of {fd} on {node}"
        options = PublishOptions(retain=will.retain, key=key, on_behalf_of=will.info)
        ended = trio.Event()
        results: list[Delivery | Refused] = []

        def end(result: Delivery | Refused) -> None:
            results.append(result)
            ended.set()

        try:
            # By the rules of now, as where a client ends whose node goes on.
            self.router.rights.check_will(will.info.user, will.topic)
            if self.publisher.publish(will.topic, will.data, None, options, end) is None:
                await ended.wait()
        except Refused as refusal:
            end(refusal)
        for result in results:
            if isinstance(result, Refused):
                if result.temporary:
                    raise result  # it is tried again
                log.info("will_refused", fd=fd, topic=will.topic, reason=result.message)
