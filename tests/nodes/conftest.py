"""Two nodes on one bus; the users of their clients are named by tokens."""

import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import attrs
import pytest
import trio
from trio.testing import MockClock

from broker import Broker, Config
from broker.core.event_queue import Event
from broker.engines.cluster import LEASE_SECONDS
from broker.http.api import Api
from broker.testing import Bus, BusNode, Peer, name_users_by_token, open_test_node
from tests.conftest import ask


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


DEAD = LEASE_SECONDS + 4
"""By then a node that was killed is buried."""


async def present(peer: Peer, topic: str) -> dict[str, str]:
    """The clients that a client is told of, each with its user."""
    reply = await peer.request(presence={"channel": topic})
    return {fd: info.get("user", "") for fd, info in reply["presence"]["presence"].items()}


async def watch(peer: Peer, topic: str) -> None:
    await ask(peer, {"id": 1, "subscribe": {"channel": topic, "join_leave": True}})


def seen(pushes: list[Any]) -> list[tuple[str, str]]:
    """Who joined and left, by user."""
    return [
        (kind, push[kind]["info"]["user"])
        for push in pushes
        for kind in ("join", "leave")
        if isinstance(push, dict) and kind in push
    ]


@attrs.define
class Backend:
    """What an app is told of, as `clients/online.py` reads it."""

    events: list[Event] = attrs.field(factory=list)

    def broker(self, name: str) -> Broker:
        broker = name_users_by_token(Broker(Config(name=name)))

        @broker.on_event
        async def note(event: Event) -> None:
            self.events.append(event)

        return broker

    def take(self, *kinds: str) -> list[Event]:
        events, self.events = self.events, []
        return [event for event in events if event.kind in kinds]


async def join(peer: Peer, topic: str, group: str = "g", **more: Any) -> None:
    subscribe = {"channel": topic, "data": {"group": group}, **more}
    reply = await peer.request(subscribe=subscribe)
    assert "error" not in reply, reply
    await settle()


async def api(net: BusNode, method: str, **params: Any) -> Any:
    """What the HTTP API of a node answers: the result, or the error's code."""
    answer = await Api(net.node).answer(method, json.dumps(params).encode(), net.node.new_share())
    read = json.loads(answer.body)
    return read["result"] if "result" in read else read["error"]["code"]
