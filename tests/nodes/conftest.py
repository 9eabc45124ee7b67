"""Two nodes on one bus; the users of their clients are named by tokens."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from broker import Broker, Config
from broker.testing import Bus, BusNode, Peer, name_users_by_token, open_test_node


@pytest.fixture
def bus() -> Bus:
    return Bus()


@asynccontextmanager
async def node(bus: Bus, name: str, **settings: Any) -> AsyncGenerator[BusNode, None]:
    broker = name_users_by_token(Broker(Config(name=name, **settings)))
    async with open_test_node(bus, broker) as opened:
        yield opened


@pytest.fixture
async def one(autojump_clock: MockClock, bus: Bus) -> AsyncGenerator[BusNode, None]:
    async with node(bus, "one") as opened:
        yield opened


@pytest.fixture
async def two(autojump_clock: MockClock, bus: Bus, one: BusNode) -> AsyncGenerator[BusNode, None]:
    async with node(bus, "two") as opened:
        yield opened


async def came(peer: Peer) -> list[Any]:
    """All that a client gets, but replies: data of publications and messages, and other pushes."""
    found = []
    for each in await peer.receive_all():
        push = each.get("push", {}) if isinstance(each, dict) else {}
        if "pub" in push:
            found.append(push["pub"]["data"])
        elif "message" in push:
            found.append(push["message"]["data"])
        elif push:
            found.append(push)
        elif not isinstance(each, dict):
            found.append(each)
    return found


async def settle() -> None:
    """Let all that is on its way between the nodes arrive."""
    await trio.sleep(0.1)
