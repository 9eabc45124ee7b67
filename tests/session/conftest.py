"""One client after another, at the level of commands and of tokens."""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from broker import Broker, Config, TokenRules
from broker.access.minting import mint
from broker.core.work import Meter
from broker.testing import Closed, Network, Peer, client_frame, open_test_broker
from broker.transport.frames import PING
from tests.conftest import HMAC_SECRET, ask

INTERNAL = {"code": 100, "message": "internal", "temporary": True}

CONFIG = Config(tokens=TokenRules(hmac_secret=HMAC_SECRET))


# As for `net`, a test that uses this asks for `autojump_clock` too.
@pytest.fixture
async def keyed(autojump_clock: MockClock) -> AsyncIterator[Network]:
    """A broker in memory that asks its clients for tokens."""
    async with open_test_broker(Broker(CONFIG)) as network:
        yield network


async def error_of(peer: Peer, **command: object) -> int:
    reply = await peer.request(**command)
    code = reply["error"]["code"]
    assert isinstance(code, int)
    return code


async def disconnected(peer: Peer, *commands: object) -> tuple[int, str]:
    """The code that a client is sent away with for these, as push and as Close frame alike."""
    *_, last, code = await ask(peer, *commands)
    push = last["push"]["disconnect"]
    assert push["code"] == code
    return code, push["reason"]


def pushed(name: str, **push: object) -> dict[str, object]:
    return {"push": {"channel": name, **push}}


def pub(name: str, data: object, sender: Peer | None = None, **fields: object) -> object:
    content: dict[str, object] = {"data": data}
    if sender is not None:
        content["info"] = {"user": "", "client": str(sender.fd)}
    return pushed(name, pub=content | fields)


def missed(reply: Any) -> list[Any]:
    """The data that a recovery brought."""
    return [publication["data"] for publication in reply["subscribe"]["publications"]]


def token(net: Network, expires: float | None = None, **claims: object) -> str:
    """A token that expires so many virtual seconds from now."""
    if expires is not None:
        claims["exp"] = net.broker.wall_clock() + expires
    return mint(claims, HMAC_SECRET.encode(), "HS256")


async def connect(net: Network, *, expires: float | None = None, **claims: object) -> Peer:
    """A client with a token of these claims."""
    return await net.open_client(token=token(net, expires, **claims))


async def refused(peer: Peer, **command: object) -> int:
    """The code of the error reply, or that of the Close frame, to one command."""
    try:
        reply = await peer.request(**command)
    except Closed as closed:
        assert closed.code is not None
        return closed.code
    code: int = reply["error"]["code"]
    return code


async def next_push(peer: Peer) -> dict[str, Any]:
    """The next push; pings on the way are answered."""
    while True:
        objects = list(map(json.loads, (await peer.receive_text()).split("\n")))
        for each in objects:
            if not each:
                await peer.send_text("{}")
            elif "push" in each:
                push: dict[str, Any] = each["push"]
                return push


async def silent_for(peer: Peer, seconds: float) -> bool:
    """Answer pings for so long; whether nothing else came."""
    with trio.move_on_after(seconds) as silence:
        await next_push(peer)
    return silence.cancelled_caught


async def pong_to(peer: Peer) -> tuple[int, bytes]:
    """The answer to a ping of the peer's."""
    await peer.send(client_frame(PING, b"?"))
    return await peer.receive_frame()


class LoopLoad(trio.abc.Instrument):
    """The work that is done between two looks at what the system has to say: in one round of all tasks."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._before = meter.done
        self.rounds: list[float] = []

    def before_io_wait(self, timeout: float) -> None:
        self.rounds.append(self._meter.done - self._before)
        self._before = self._meter.done
