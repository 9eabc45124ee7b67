"""The router with ways to connections of other nodes, as those of a test are."""

import attrs
import pytest
import trio
from trio.testing import MockClock

from broker.core.messages import ClientInfo, Fd
from broker.core.session import Parcel
from broker.engines.engine import Done
from broker.errors import ErrorCode, Refused
from broker.routing.elsewhere import Way
from broker.testing import BusNode


@attrs.define(eq=False)
class Ways:
    """To the connections from 100 on; `sent` is what went there."""

    sent: list[tuple[str, bytes]] = attrs.field(factory=list)
    asked: list[ClientInfo | None] = attrs.field(factory=list)
    is_full: bool = False

    def way_to(self, topic: str, fd: Fd) -> Way:
        if fd < 100:
            raise Refused(ErrorCode.UNKNOWN_CHANNEL)
        return Way(self.check, self.send)

    def check(self, info: ClientInfo | None) -> None:
        self.asked.append(info)
        if self.is_full:
            raise Refused(ErrorCode.LIMIT_EXCEEDED)

    def send(self, parcel: Parcel, dones: list[Done]) -> None:
        self.sent += [(parcel.topic, each.data) for run in parcel.batches for each in run]


async def test_a_message_to_a_connection_that_is_not_here_goes_the_way_to_it(
    autojump_clock: MockClock, one: BusNode
) -> None:
    one.node.router.ways = ways = Ways()
    here = await one.open_plain()
    await one.broker.publish(f"fd:{here.fd}", "near")
    with trio.move_on_after(1) as scope:
        await one.broker.publish("fd:100", "far")
    assert scope.cancelled_caught  # the way is yet to answer for it
    assert ways.sent == [("fd:100", b'"far"')]
    assert ways.asked == [None]
    with pytest.raises(Refused):
        await one.broker.publish("fd:99", "nobody")


async def test_nothing_is_sent_where_the_way_has_too_much_of_its_publisher(
    autojump_clock: MockClock, one: BusNode
) -> None:
    one.node.router.ways = ways = Ways(is_full=True)
    with pytest.raises(Refused) as refused:
        await one.broker.publish("fd:100", "far")
    assert refused.value.code == ErrorCode.LIMIT_EXCEEDED
    assert ways.sent == []
