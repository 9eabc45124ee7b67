"""Connections looked up and acted on while a broker serves."""

import time

import pytest
from trio.testing import MockClock, assert_no_checkpoints, wait_all_tasks_blocked

from broker import (
    Broker,
    Disconnect,
    PushResult,
)
from broker.testing import open_test_broker


async def test_connections_are_told_page_by_page(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker()) as net:
        peers = [await net.open_plain() for _ in range(5)]
        await peers[1].aclose()
        await wait_all_tasks_blocked()
        pages = [(0, 2), (3, 2), (5, 2), (0, 100), (0, 0), (4, 1)]
        told = [[info.fd for info in net.broker.connections(*page)] for page in pages]
        assert told == [[1, 3], [4, 5], [], [1, 3, 4, 5], [], [5]]
        assert [info.fd for info in net.broker.connections()] == [1, 3, 4, 5]


async def test_a_connection_is_known_by_its_fd(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker()) as net:
        await net.open_websocket()
        client = await net.open_websocket("/connection/websocket")
        info = net.broker.connection_info(client.fd)
        assert info is not None
        assert (info.fd, info.user, info.address, info.path, info.protocol, info.topics) == (
            *(2, "", "memory", "/connection/websocket", "plain", ()),
        )
        assert abs(info.opened_at - time.time()) < 60
        await client.request(connect={})
        for name in ("news", "a.*"):
            await client.request(subscribe={"channel": name})
        net.broker.bind(client.fd, "alice")
        info = net.broker.connection_info(client.fd)
        assert info is not None
        assert (info.user, info.protocol) == ("alice", "centrifuge-json")
        assert info.topics == ("news", "a.*")
        assert net.broker.connection_info(99) is None


async def test_a_connection_that_is_closing_exists_but_can_be_sent_nothing(
    autojump_clock: MockClock,
) -> None:
    async with open_test_broker(Broker()) as net:
        peer = await net.open_plain()
        fd = peer.fd

        def state() -> tuple[bool, bool]:
            return net.broker.exists(fd), net.broker.is_established(fd)

        assert state() == (True, True)
        assert net.broker.disconnect(fd)
        assert state() == (True, False)
        assert net.broker.push(fd, "x") is PushResult.CLOSED
        assert not net.broker.disconnect(fd)
        assert await peer.receive_close() == (3503, "force disconnect")
        await peer.send_close(3503)
        await wait_all_tasks_blocked()
        assert state() == (False, False)
        assert not net.broker.disconnect(fd)
        assert not net.broker.disconnect(99)


@pytest.mark.parametrize("code", [0, 999, 1004, 1005, 1006, 1015, 2999, 5000, 2**16, -1])
async def test_a_code_that_cannot_be_sent_is_told_and_closes_nobody(
    autojump_clock: MockClock, code: int
) -> None:
    with pytest.raises(ValueError, match=f"close code {code} cannot be sent"):
        Disconnect(code)
    async with open_test_broker(Broker()) as net:
        peer = await net.open_plain()
        with pytest.raises(ValueError, match=f"close code {code} cannot be sent"):
            net.broker.disconnect(peer.fd, code)
        assert net.broker.is_established(peer.fd)


async def test_users_have_fds(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker()) as net:
        one, two, three = [await net.open_plain() for _ in range(3)]
        for peer in (three, one):
            net.broker.bind(peer.fd, "alice")
        assert net.broker.fds_of("alice") == [1, 3]
        await one.aclose()
        await wait_all_tasks_blocked()
        assert net.broker.fds_of("alice") == [3]
        net.broker.bind(three.fd, "")
        assert net.broker.fds_of("alice") == net.broker.fds_of("") == []
        with pytest.raises(KeyError):
            net.broker.bind(one.fd, "alice")
        assert net.broker.fds_of("bob") == []
        assert net.broker.is_established(two.fd)


async def test_nothing_that_an_app_calls_waits(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker()) as net:
        peer = await net.open_plain()
        client = await net.open_client()
        await client.request(subscribe={"channel": "news"})
        with assert_no_checkpoints():
            net.broker.push(peer.fd, "x")
            net.broker.publish_nowait("news", 1)
            net.broker.bind(peer.fd, "alice")
            net.broker.connections()
            net.broker.stats()
            net.broker.disconnect(peer.fd)
            net.broker.stop()
