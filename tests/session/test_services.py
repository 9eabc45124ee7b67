"""The parts that all connections of one broker share."""

import resource

import attrs
import pytest
from trio.testing import MockClock

from broker import Broker, Config
from broker.core.event_queue import Event, EventKind
from broker.testing import Network, open_test_broker


async def test_what_is_shared_goes_by_the_settings_of_the_moment(
    autojump_clock: MockClock, net: Network
) -> None:
    services = net.node.services
    peer = await net.open_client()
    lane_limits, outbox = services.lane_limits, net.outbox(peer.fd)
    net.broker.reload(
        Config(max_message_bytes=1000, outbox_bytes=2000, outbox_messages=30, message_rate=5)
    )
    assert services.config.max_message_bytes == 1000
    assert services.lane_limits == attrs.evolve(lane_limits, max_message_bytes=1000)
    assert (outbox.max_bytes, outbox.max_messages) == (2000, 30)
    assert services.rate_limits.active


@pytest.mark.parametrize("limit", [1, 7])
async def test_the_settings_say_how_many_connections_there_may_be(
    autojump_clock: MockClock, limit: int
) -> None:
    async with open_test_broker(Broker(Config(max_connections=limit))) as net:
        assert net.node.services.max_connections == limit


async def test_else_there_may_be_as_many_as_open_files_less_a_reserve(
    autojump_clock: MockClock, net: Network
) -> None:
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        for soft, connections in ((1000, 936), (128, 64), (100, 50)):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, most))
            assert net.node.services.max_connections == connections
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, most))


async def test_events_are_for_those_who_read_them(autojump_clock: MockClock) -> None:
    broker, told = Broker(), []

    @broker.on_event
    async def keep(event: Event) -> None:
        told.append((event.kind, event.fd, event.topic))

    async with open_test_broker(broker) as net:
        net.node.services.emit(EventKind.SUBSCRIBED, 7, "ann", topic="a")
    assert told == [("started", None, None), ("subscribed", 7, "a"), ("stopped", None, None)]
    async with open_test_broker(Broker()) as net:
        net.node.services.emit(EventKind.SUBSCRIBED, 7, "ann", topic="a")
