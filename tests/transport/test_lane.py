"""The rules of the lane, seen by peers that keep or break those of RFC 6455."""

from collections.abc import Iterator

import pytest
import structlog.testing
from trio.testing import MockClock

from broker import Broker, Config
from broker.connection import Connection
from broker.core.messages import Frame
from broker.testing import open_test_broker


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


def echo_broker(config: Config | None = None) -> Broker:
    broker = Broker(config)

    @broker.on_message
    async def echo(connection: Connection, frame: Frame) -> None:
        broker.push(connection.fd, frame.data)

    return broker


async def test_each_close_of_a_peer_is_answered(autojump_clock: MockClock) -> None:
    # Many, as it was once a matter of which task ran first.
    async with open_test_broker(Broker()) as net:
        for _ in range(50):
            peer = await net.open_plain()
            await peer.send_close(4321, "bye")
            assert await peer.receive_close() == (4321, "bye")
