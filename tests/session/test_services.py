"""The parts that all connections of one broker share."""

import attrs
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from broker import Broker, Config
from broker.core.event_queue import Event, EventKind
from broker.session.services import LAST_WORDS_SECONDS, Services
from broker.testing import Network, open_test_broker


async def test_services_go_by_the_settings_of_the_moment(
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
    assert services.rate_limits.are_active


async def speak(services: Services, seconds: float) -> None:
    """Say last words for as long as one may."""
    with services.last_words(seconds):
        await trio.sleep_forever()


async def test_last_words_take_their_time_also_while_all_is_cancelled(
    autojump_clock: MockClock, net: Network
) -> None:
    began = trio.current_time()
    with trio.CancelScope() as scope:
        with net.node.services.last_words(5):
            scope.cancel()
            await trio.sleep(4)
            assert trio.current_time() == began + 4
        await trio.lowlevel.checkpoint()
    assert scope.cancelled_caught
    await speak(net.node.services, 5)
    assert trio.current_time() == began + 4 + 5


async def test_last_words_that_begin_in_a_cut_have_a_second(
    autojump_clock: MockClock, net: Network
) -> None:
    began = trio.current_time()
    with trio.CancelScope() as scope:
        scope.cancel()
        await speak(net.node.services, 60)
    assert trio.current_time() == began + LAST_WORDS_SECONDS


@pytest.mark.parametrize(("drain", "seconds", "took"), [(0, 5, 1), (3, 5, 4), (30, 5, 5)])
async def test_a_stop_shortens_the_last_words_that_are_being_said(
    autojump_clock: MockClock, net: Network, drain: float, seconds: float, took: float
) -> None:
    services = net.node.services
    began = trio.current_time()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(speak, services, seconds)
        await wait_all_tasks_blocked()
        services.begin_drain(drain)
        assert services.draining
        nursery.start_soon(speak, services, seconds)
    assert trio.current_time() == began + took


async def test_a_cut_is_never_put_off(autojump_clock: MockClock, net: Network) -> None:
    services = net.node.services
    began = trio.current_time()
    services.begin_drain(2)
    services.cut()
    services.begin_drain(20)
    await speak(services, 5)
    assert trio.current_time() == began + LAST_WORDS_SECONDS


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
