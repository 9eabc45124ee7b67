"""The work of a command is known before it: it is all that is known of the others who have their turn with it."""

import json
from collections.abc import Callable
from typing import Any, Final

import pytest
from trio.testing import MockClock

from broker import Broker, Config, TokenRules, TopicRules
from broker.access.minting import mint
from broker.core.work import WRITE
from broker.protocols.commands import Command
from broker.session.commands import Handler
from broker.session.dispatch import Dispatcher
from broker.session.replies import Client
from broker.testing import Network, Peer, open_test_broker
from tests.conftest import HMAC_SECRET

MANY: Final = 200

NODES: Final = {
    "op": "or",
    "nodes": [{"key": f"k{n}", "cmp": "gt", "val": f"{n}.5"} for n in range(90)],
}
VALUES: Final = {"key": "room", "cmp": "in", "vals": [f"v{n}" for n in range(900)]}
HALF_A_PAIR: Final = '{"topic":"a.b.c","data":"\\ud800"}'
"""Accepted by the decoder that is patient, and by none that is strict."""


async def patterns(net: Network) -> None:
    peer = await net.open_client()
    for n in range(MANY // 2):
        tf = {"key": "k", "cmp": "neq", "val": f"{n}"}
        await peer.request(subscribe={"channel": "a.b.*", "tf": tf})
        await peer.request(subscribe={"channel": f"{'*' if n % 2 else 'a'}.b.>", "tf": tf})


async def watchers(net: Network) -> None:
    for _ in range(MANY):
        peer = await net.open_client()
        await peer.request(subscribe={"channel": "door", "join_leave": True})


async def values(net: Network) -> None:
    for n in range(MANY):
        await net.broker.publish(f"r.{n}", 1, retain=True)


async def members(net: Network) -> None:
    for _ in range(MANY):
        await (await net.open_client()).request(subscribe={"channel": "door"})


async def history(net: Network) -> None:
    for n in range(MANY):
        await net.broker.publish("h", n)


async def listeners(net: Network) -> None:
    for n in range(MANY):
        pattern = ".".join("*" if n >> at & 1 else each for at, each in enumerate("abcdefgh"))
        await (await net.open_client()).request(subscribe={"channel": pattern})


ROWS: Final[dict[str, tuple[Callable[[Network], Any] | None, dict[str, Any]]]] = {
    "a pattern": (None, {"subscribe": {"channel": "a.*.b.>"}}),
    "a filter of many nodes": (None, {"subscribe": {"channel": "f", "tf": NODES}}),
    "a filter of many values": (None, {"subscribe": {"channel": "f", "tf": VALUES}}),
    "a topic that many watch": (watchers, {"subscribe": {"channel": "door"}}),
    "a pattern of retained values": (values, {"subscribe": {"channel": "r.>"}}),
    "a pattern that finds none of them": (values, {"subscribe": {"channel": "r.*.x.*.*.>"}}),
    "a recovery": (
        history,
        {"subscribe": {"channel": "h", "recover": True, "offset": 1, "epoch": "E"}},
    ),
    "a history": (history, {"history": {"channel": "h", "limit": -1}}),
    "a presence": (members, {"presence": {"channel": "door"}}),
    "counts of a presence": (members, {"presence_stats": {"channel": "door"}}),
    "a publish by rpc": (
        listeners,
        {"rpc": {"method": "publish", "data": {"topic": "a.b.c.d.e.f.g.h", "data": 1}}},
    ),
}


async def announced(monkeypatch: pytest.MonkeyPatch, peer: Peer, text: str) -> tuple[float, float]:
    """The work that was told before the last command of a message, and the work that it was."""
    told: list[tuple[float, float]] = []
    act = Dispatcher._act

    def spied(
        self: Dispatcher, client: Client, command: Command, handler: Handler, *others: Any
    ) -> None:
        work = handler.weigh(client, command)
        before = self.services.router.meter.done
        act(self, client, command, handler, *others)
        told.append((work, self.services.router.meter.done - before))

    with monkeypatch.context() as patched:
        patched.setattr(Dispatcher, "_act", spied)
        await peer.send_text(text)
        await peer.receive_json()
    return told[-1]


CONFIG: Final = Config(
    tokens=TokenRules(hmac_secret=HMAC_SECRET, allow_anonymous=True),
    topics=TopicRules(history_size=MANY),
)


@pytest.mark.parametrize("row", ROWS)
async def test_the_work_of_a_command_is_known_before_it(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, row: str
) -> None:
    prepare, command = ROWS[row]
    async with open_test_broker(Broker(CONFIG)) as net:
        if prepare is not None:
            await prepare(net)
        peer = await net.open_client()
        if "recover" in json.dumps(command):
            reply = await peer.request(history={"channel": "h"})
            command["subscribe"]["epoch"] = reply["history"]["epoch"]
        work, was = await announced(monkeypatch, peer, json.dumps({"id": 9, **command}))
        assert was > 30, "else there is nothing to see"
        assert work > 0.8 * was


async def test_the_work_of_leaving_a_topic_that_many_watch_is_known_before_it(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_test_broker(Broker(CONFIG)) as net:
        await watchers(net)
        peer = await net.open_client()
        await peer.request(subscribe={"channel": "door"})
        text = json.dumps({"id": 9, "unsubscribe": {"channel": "door"}})
        work, was = await announced(monkeypatch, peer, text)
        assert work >= was > MANY * WRITE


async def test_the_work_of_a_publish_that_only_a_patient_decoder_reads_is_known_before_it(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_test_broker(Broker(CONFIG)) as net:
        listener = await net.open_client()
        for n in range(MANY):
            tf = {"key": "k", "cmp": "neq", "val": f"{n}"}
            other = await net.open_client() if n else listener
            await other.request(subscribe={"channel": "a.b.c", "tf": tf})
        peer = await net.open_client()
        text = f'{{"id":9,"rpc":{{"method":"publish","data":{HALF_A_PAIR}}}}}'
        work, was = await announced(monkeypatch, peer, text)
        assert work > 0.8 * was > 0.8 * MANY


async def test_the_work_of_a_connect_grows_with_the_topics_of_its_token(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_test_broker(Broker(CONFIG)) as net:
        claims = {"sub": "a", "channels": [f"t{n}" for n in range(500)]}
        token = mint(claims, HMAC_SECRET.encode(), "HS256")
        peer = await net.open_websocket()
        text = json.dumps({"id": 1, "connect": {"token": token}})
        work, was = await announced(monkeypatch, peer, text)
        assert work > 0.6 * was > 500
