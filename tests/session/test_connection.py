"""A connection: tasks and hooks of its life, and the last word that its client gets."""

from itertools import pairwise

import pytest
import trio
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from trio.testing import MockClock, wait_all_tasks_blocked

from broker import (
    Broker,
    Connection,
    Frame,
    TokenRules,
)
from broker.access.keys import Key
from broker.access.minting import mint
from broker.access.tokens import Tokens
from broker.core.event_queue import Event, EventKind
from broker.core.work import LEFT, SLICE
from broker.session.connection import LEAVES_AT_ONCE
from broker.session.connection import Connection as ServingConnection
from broker.testing import Network, client_frame, open_test_broker
from broker.transport.frames import CLOSE, PONG, TEXT
from tests.session.conftest import (
    pong_to,
    pub,
)


def count_tasks() -> int:
    """All tasks of this run."""
    tasks, waiting = 0, [trio.lowlevel.current_root_task()]
    while waiting:
        task = waiting.pop()
        if task is not None:
            tasks += 1
            waiting += [child for nursery in task.child_nurseries for child in nursery.child_tasks]
    return tasks


async def test_a_client_that_nobody_has_to_be_asked_about_costs_one_task(
    autojump_clock: MockClock,
) -> None:
    async with open_test_broker(Broker()) as net:
        await wait_all_tasks_blocked()
        before = count_tasks()
        for number in range(1, 4):
            peer = await net.open_client()
            await peer.request(subscribe={"channel": "news"})
            await peer.request(publish={"channel": "news", "data": 1})
            await wait_all_tasks_blocked()
            assert count_tasks() == before + number


async def test_the_first_message_waits_for_the_open_hook(autojump_clock: MockClock) -> None:
    broker, may_go_on = Broker(), trio.Event()

    @broker.on_open
    async def wait(connection: Connection) -> None:
        await may_go_on.wait()

    async with open_test_broker(broker) as net:
        peer = await net.open_websocket()
        await peer.send_json({"id": 1, "connect": {}})
        await wait_all_tasks_blocked()
        info = broker.connection_info(peer.fd)
        assert info is not None
        assert info.protocol == "plain"
        assert await pong_to(peer) == (PONG, b"?")
        may_go_on.set()
        assert (await peer.receive_json())["connect"]["client"] == str(peer.fd)


async def test_a_hook_for_what_came_with_the_close_has_close_seconds(
    autojump_clock: MockClock,
) -> None:
    broker, cancelled_at = Broker(), []

    @broker.on_message
    async def hang(connection: Connection, frame: Frame) -> None:
        try:
            await trio.sleep_forever()
        finally:
            cancelled_at.append(trio.current_time())

    async with open_test_broker(broker) as net:
        peer = await net.open_plain()
        began = trio.current_time()
        await peer.send(client_frame(TEXT, b"?") + client_frame(CLOSE))
        await peer.receive_eof()
        assert cancelled_at == [began + broker.config.close_seconds]


COMMANDS: list[tuple[str, str, dict[str, object]]] = [
    ("connect", "connect", {}),
    ("subscribe", "subscribe", {"channel": "a"}),
    ("publish", "publish", {"channel": "a", "data": 1}),
    ("presence", "presence", {"channel": "a"}),
    ("presence", "presence_stats", {"channel": "a"}),
    ("history", "history", {"channel": "a"}),
    ("rpc", "rpc", {"method": "mine", "data": 1}),
    ("publish", "rpc", {"method": "publish", "data": {"topic": "a", "data": 1}}),
    ("message", "send", {"data": 1}),
]


@pytest.mark.parametrize(("hook", "method", "request_"), COMMANDS, ids=str)
async def test_while_a_hook_waits_pings_are_answered_and_nothing_overtakes(
    hook: str, method: str, request_: dict[str, object], autojump_clock: MockClock
) -> None:
    broker, may_go_on = Broker(), trio.Event()

    async def wait(*_: object) -> None:
        await may_go_on.wait()

    async with open_test_broker(broker) as net:
        other = await net.open_client()
        peer = await (net.open_websocket() if method == "connect" else net.open_client())
        getattr(broker, f"on_{hook}")(wait)
        await peer.send_json({"id": 0 if method == "send" else 2, method: request_})
        assert await pong_to(peer) == (PONG, b"?")
        await peer.send_json({"publish": {"channel": f"fd:{other.fd}", "data": "behind"}})
        with trio.move_on_after(5) as silence:
            await other.receive_json()
        assert silence.cancelled_caught
        may_go_on.set()
        push = (await other.receive_json())["push"]
        assert push["pub"]["data"] == "behind"


async def test_while_a_key_is_fetched_pings_are_answered(autojump_clock: MockClock) -> None:
    may_go_on = trio.Event()
    private = ed25519.Ed25519PrivateKey.generate()
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    class Issuer:
        def known(self, kid: str) -> Key | None:
            return None

        async def key(self, kid: str) -> Key | None:
            await may_go_on.wait()
            return None

    rules = TokenRules()
    async with open_test_broker(Broker()) as net:
        net.node.services.tokens = Tokens(rules, (), lambda: 0.0, Issuer())
        peer = await net.open_websocket()
        token = mint({"sub": "a"}, pem, "EdDSA", kid="one")
        await peer.send_json({"id": 1, "connect": {"token": token}})
        await wait_all_tasks_blocked()
        assert await pong_to(peer) == (PONG, b"?")
        may_go_on.set()
        code, _ = await peer.receive_close()
        assert code == 3500


async def test_the_last_push_says_why_and_the_close_code_says_it_again(
    autojump_clock: MockClock, net: Network
) -> None:
    client = await net.open_client()
    net.broker.publish_nowait(f"fd:{client.fd}", "last words")
    net.broker.disconnect(client.fd, 3503, 'because "so"')
    assert await client.receive_all() == [
        pub(f"fd:{client.fd}", "last words"),
        {"push": {"disconnect": {"code": 3503, "reason": 'because "so"'}}},
        3503,
    ]


async def test_those_who_go_together_are_not_told_of_each_other(autojump_clock: MockClock) -> None:
    many = 100  # of whom the last would be told of all others
    async with open_test_broker(Broker()) as net:
        watching = {"channel": "room", "join_leave": True}
        peers = [await net.open_client() for _ in range(many + 1)]
        for peer in peers:
            await peer.request(subscribe=watching)
        stays, *goers = peers
        await wait_all_tasks_blocked()
        office = net.node.services.router.office
        before = office.statistics().messages_delivered
        async with trio.open_nursery() as nursery:
            for peer in goers:
                nursery.start_soon(peer.aclose)
        await wait_all_tasks_blocked()
        assert office.statistics().messages_delivered - before == many
        told = [message["push"] for message in await stays.receive_all()]
        left = {push["leave"]["info"]["client"] for push in told if "leave" in push}
        assert left == {str(peer.fd) for peer in goers}


@pytest.mark.parametrize("how", ["the peer goes", "we close"])
async def test_a_thousand_topics_are_left_in_turns_with_all_others(
    how: str, autojump_clock: MockClock
) -> None:
    async with open_test_broker(Broker()) as net:
        peer = await net.open_client()
        await peer.send_json(
            *({"id": n, "subscribe": {"channel": f"t{n}"}} for n in range(10, 1010))
        )
        hub = net.node.services.router.hub
        await wait_all_tasks_blocked()
        assert hub.statistics().topics == 1000
        seen = [1000]

        async def watch() -> None:
            while seen[-1]:
                await trio.lowlevel.checkpoint()
                seen.append(hub.statistics().topics)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            if how == "we close":
                assert net.broker.disconnect(peer.fd)
                assert 1000 - 2 * LEAVES_AT_ONCE / LEFT < hub.statistics().topics < 1000
                assert not net.broker.is_established(peer.fd)
            else:
                await peer.aclose()
        # Two slices: Trio changes the order of tasks that run in one turn.
        steps = [before - after for before, after in pairwise(seen)]
        assert max(steps) <= (2 * SLICE + LEAVES_AT_ONCE) / LEFT


@pytest.mark.parametrize("is_cut", [False, True])
async def test_all_topics_are_left_before_the_app_learns_that_a_connection_has_ended(
    is_cut: bool, autojump_clock: MockClock
) -> None:
    """Also when it is cut, which leaves no time for turns."""
    broker, told = Broker(), []

    @broker.on_event
    async def hear(event: Event) -> None:
        told.append(event.kind)

    async with open_test_broker(broker) as net:
        peer = await net.open_client()
        await peer.send_json(
            *({"id": n, "subscribe": {"channel": f"t{n}"}} for n in range(10, 1010))
        )
        await wait_all_tasks_blocked()
        if is_cut:
            connection = net.node.services.connections[peer.fd]
            assert isinstance(connection, ServingConnection)
            connection.cut()
        else:
            await peer.aclose()
        await wait_all_tasks_blocked()
    last = told.index(EventKind.DISCONNECTED)
    assert told[:last].count(EventKind.UNSUBSCRIBED) == 1000
