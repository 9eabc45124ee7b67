"""Connections found by what is known of them."""

import pytest
import trio
from trio.testing import MockClock

from broker import Broker
from broker.core.work import SURVEYED_AT_ONCE
from broker.session.search import ConnectionQuery
from broker.testing import Network, name_users_by_token, open_test_broker


def found(net: Network, **query: object) -> list[int]:
    return [fd for piece in net.node.search(ConnectionQuery(**query)) for fd in piece]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("query", "fds"),
    [
        ({}, [1, 2, 3, 4]),
        ({"after": 2}, [3, 4]),
        ({"user": "ann"}, [1, 2]),
        ({"user": "ann", "after": 1}, [2]),
        ({"user": "nobody"}, []),
        ({"topic": "news"}, [1, 3]),
        ({"topic": "news", "after": 1}, [3]),
        ({"topic": "news", "user": "ann"}, [1]),
        ({"topic": "a.*"}, [2]),
        ({"topic": "a.b"}, []),
        ({"address": "mem"}, [1, 2, 3, 4]),
        ({"address": "10."}, []),
        ({"app": "js"}, [1, 3]),
        ({"app": "js 5.3.0"}, [1]),
        ({"app": "js 5"}, []),
        ({"app": "js", "user": "bob"}, [3]),
    ],
)
async def test_a_query_finds_what_fits_all_of_it(
    autojump_clock: MockClock, query: dict[str, object], fds: list[int]
) -> None:
    async with open_test_broker(name_users_by_token(Broker())) as net:
        first = await net.open_client(token="ann", name="js", version="5.3.0")
        second = await net.open_client(token="ann")
        third = await net.open_client(token="bob", name="js", version="4")
        await net.open_plain()
        await first.request(subscribe={"channel": "news"})
        await second.request(subscribe={"channel": "a.*"})
        await third.request(subscribe={"channel": "news"})
        async with net.broker.subscribe("news"):  # is no connection
            assert found(net, **query) == fds


async def test_one_step_looks_at_so_many_and_leaves_out_who_has_gone(
    autojump_clock: MockClock,
) -> None:
    async with open_test_broker(Broker()) as net:
        peers = [await net.open_plain() for _ in range(SURVEYED_AT_ONCE + 20)]
        walk = net.node.search(ConnectionQuery())
        assert len(next(walk)) == SURVEYED_AT_ONCE
        await peers[-1].aclose()
        await trio.sleep(1)
        assert list(next(walk)) == [peer.fd for peer in peers[SURVEYED_AT_ONCE:-1]]
        assert next(walk, None) is None
