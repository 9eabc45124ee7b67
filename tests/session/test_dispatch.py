"""Messages of one peer: their order, their turns, and those that are no commands."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import centrifuge.protocol.client_pb2 as schema
import jwt
import pytest
import trio
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from trio.testing import MockClock, lockstep_stream_pair, wait_all_tasks_blocked

from broker import (
    Broker,
    Close,
    Config,
    ConnectEvent,
    Connection,
    Frame,
    Initiator,
    PublishEvent,
    PublishReply,
    SubscribeEvent,
    TokenRules,
    TopicRules,
)
from broker.core.work import (
    AUDIENCE,
    COMMAND,
    DECODED_KILOBYTE,
    FIRST_MESSAGE,
    KILOBYTE,
    LEFT,
    LISTED,
    LISTENERS,
    LITTLE,
    MEMBER,
    OPENING,
    PART,
    PEER,
    PUBLICATION,
    REFUSED,
    ROUND,
    SLICE,
    SUBSCRIPTION,
    TOKEN,
    UNMASKED_KILOBYTE,
    WIDE_SIGNATURE,
)
from broker.protocols.commands import MAX_COMMANDS
from broker.routing.router import MOST_TOGETHER
from broker.routing.turns import Turns as Queue
from broker.testing import Network, Peer, client_frame, handshake, open_test_broker
from broker.transport import frames
from broker.transport.frames import BINARY, PONG, TEXT
from tests.conftest import ask, data_of, delimited, next_pub
from tests.routing.conftest import attach, subscription
from tests.session.conftest import (
    LoopLoad,
    disconnected,
    error_of,
    pong_to,
)


@pytest.mark.parametrize(
    "first, plain",
    [
        ('{"id":1,"connect":{}}', False),
        ('{"id":1,"subscribe":{"channel":"news"}}', True),
        ('{"connect":{}}', True),
        ("connect", True),
        ("", True),
    ],
)
async def test_a_first_message_that_is_no_connect_makes_a_peer_plain_for_good(
    autojump_clock: MockClock, net: Network, first: str, plain: bool
) -> None:
    @net.broker.on_message
    async def echo(connection: Connection, frame: Frame) -> None:
        net.broker.push(connection.fd, f"got {frame.data!r}")

    peer = await net.open_websocket()
    await peer.send_text(first)
    text = await peer.receive_text()
    assert (text == f"got {first!r}") is plain
    if plain:
        await peer.send_text('{"id":1,"connect":{}}')
        assert (await peer.receive_text()).startswith("got ")


@pytest.mark.parametrize(
    "first, code",
    [
        ({"id": 1, "subscribe": {"channel": "news"}}, 3501),
        ({"id": 1, "publish": {"channel": "news", "data": 1}}, 3501),
        ({"publish": {"channel": "news", "data": 1}}, 3501),
        ({"send": {"data": 1}}, 3501),
        ({"connect": {}}, 3501),
        ("connect", 3501),
    ],
)
async def test_with_its_subprotocol_a_client_must_begin_with_connect(
    autojump_clock: MockClock, net: Network, first: object, code: int
) -> None:
    peer = await net.open_websocket(headers={"Sec-WebSocket-Protocol": "centrifuge-json"})
    assert await ask(peer, first) == [code]


async def test_commands_behind_a_connect_wait_for_it(
    autojump_clock: MockClock, net: Network
) -> None:
    @net.broker.on_connect
    async def slowly(event: ConnectEvent) -> None:
        await trio.sleep(0.05)

    peer = await net.open_websocket()
    replies = await ask(
        peer,
        {"id": 1, "connect": {}},
        {"id": 2, "subscribe": {"channel": "news"}},
        {"id": 3, "publish": {"channel": "news", "data": "x"}},
    )
    kinds = [
        next(k for k in ("connect", "subscribe", "push", "publish") if k in r) for r in replies
    ]
    assert kinds == ["connect", "subscribe", "push", "publish"]


async def test_to_connect_twice_is_a_bad_request(autojump_clock: MockClock, net: Network) -> None:
    client = await net.open_client()
    code, reason = await disconnected(client, {"id": 2, "connect": {}})
    assert code == 3501
    assert "connect" in reason


async def test_publications_that_came_in_many_lines_go_out_in_one(
    autojump_clock: MockClock, net: Network
) -> None:
    client = await net.open_client()
    await client.request(subscribe={"channel": "news"})
    await client.send_text('{"publish":{"channel":"news",\n"data":{\n"a": [1,\n2]}}}')
    assert data_of(await client.receive_all()) == [{"a": [1, 2]}]

    @net.broker.on_publish
    async def rewrite(event: PublishEvent) -> PublishReply:
        return PublishReply(b'{\n"b":\n2}')

    await client.send_json({"publish": {"channel": "news", "data": 1}})
    assert data_of(await client.receive_all()) == [{"b": 2}]


async def test_bytes_that_are_not_utf_8_reach_nobody(
    autojump_clock: MockClock, net: Network
) -> None:
    client, reader = await net.open_client(), await net.open_client()
    await reader.request(subscribe={"channel": "news"})
    command = b'{"publish":{"channel":"news","data":"\xff"}}'
    await client.send(client_frame(frames.BINARY, command))
    assert (await client.receive_all())[-1] == 3501
    assert await reader.receive_all() == []


@pytest.mark.parametrize("joined", [True, False])
async def test_a_thousand_commands_at_once_leave_others_their_turn(
    autojump_clock: MockClock, net: Network, joined: bool
) -> None:
    client = await net.open_client()
    lines = [json.dumps({"id": 1, "presence_stats": {"channel": "t"}}) for _ in range(1000)]
    if joined:
        sent = client_frame(frames.TEXT, "\n".join(lines).encode())
    else:
        sent = b"".join(client_frame(frames.TEXT, line.encode()) for line in lines)
    turns = 0
    async with trio.open_nursery() as nursery:

        async def take_turns() -> None:
            nonlocal turns
            while True:
                turns += 1
                await trio.lowlevel.checkpoint()

        await client.send(sent)
        nursery.start_soon(take_turns)
        got = 0
        while got < 1000:
            got += (await client.receive_text()).count("presence_stats")
        nursery.cancel_scope.cancel()
    # They are 6 ms of work, of which others are let in between two slices; 9 to 13 turns were seen, and 6 to 8
    # where nobody is let in.
    assert turns > 1000 * COMMAND / SLICE + 2


async def test_what_is_refused_is_paid_for(autojump_clock: MockClock, net: Network) -> None:
    """To refuse a command takes as long again as to carry out a simple one."""
    client = await net.open_client()
    await wait_all_tasks_blocked()
    load = LoopLoad(net.node.router.meter)
    trio.lowlevel.add_instrument(load)
    await client.send_json(*({"id": n, "rpc": {"method": "none"}} for n in range(1, 101)))
    for _ in range(100):
        assert (await client.receive_json())["error"]["code"] == 104
    trio.lowlevel.remove_instrument(load)
    assert sum(load.rounds) > 100 * REFUSED


async def test_what_came_from_a_peer_that_has_ended_is_not_looked_at(
    autojump_clock: MockClock, net: Network
) -> None:
    """Nobody would be charged for it: a read of a thousand messages took 3 ms, and of many peers more."""
    client = await net.open_client()
    said = json.dumps({"id": 1, "rpc": {"method": "x" * 500}}).encode()
    await client.send(client_frame(TEXT, said) * 100)
    meter = net.node.router.meter
    until = meter.done + 20 * 500 / 1024 * DECODED_KILOBYTE
    while meter.done < until:
        await trio.lowlevel.checkpoint()
    net.broker.disconnect(client.fd)
    load = LoopLoad(meter)
    trio.lowlevel.add_instrument(load)
    await wait_all_tasks_blocked()
    trio.lowlevel.remove_instrument(load)
    assert sum(load.rounds) < 20 * 500 / 1024 * DECODED_KILOBYTE


async def test_members_of_one_command_leave_others_their_turn(
    autojump_clock: MockClock, net: Network
) -> None:
    """A null has them read one by one; whoever asks for that waits in between, and answers come in order."""
    client = await net.open_client()
    tf = {"op": "or", "nodes": [{}] * 5000}
    subscribe = {"id": 2, "subscribe": {"channel": "a", "epoch": None, "tf": tf}}
    meter = net.node.router.meter
    before, load = meter.done, LoopLoad(meter)
    trio.lowlevel.add_instrument(load)
    await client.send(client_frame(frames.TEXT, json.dumps(subscribe).encode()))
    await client.send(client_frame(frames.TEXT, b'{"id":3,"presence_stats":{"channel":"t"}}'))
    assert (await client.receive_json())["error"]["code"] == 107
    assert (await client.receive_json())["id"] == 3
    trio.lowlevel.remove_instrument(load)
    assert meter.done - before > 5000 * PART
    assert max(load.rounds) < 4 * SLICE


CROWD: Final = 2500
"""Listeners of a topic, with as many publications, so that one act there takes more than a slice."""


def fill(net: Network) -> None:
    """Listeners of `crowd`, none of which is there, and a history."""
    router = net.broker.node.router
    for _ in range(CROWD):
        router.hub.subscribe(subscription(attach(router), "crowd"))
    for _ in range(CROWD):
        net.broker.publish_nowait("kept", 1)


@pytest.mark.parametrize(
    "act, most",
    [
        ({"rpc": {"method": "publish", "data": {"topic": "crowd", "data": 1}}}, CROWD * PEER),
        ({"publish": {"channel": "crowd", "data": 1}}, CROWD * PEER),
        ({"presence": {"channel": "crowd"}}, CROWD * MEMBER),
        ({"presence_stats": {"channel": "crowd"}}, CROWD * MEMBER / 10),
        ({"history": {"channel": "kept", "limit": -1}}, CROWD * LISTED),
        ({"subscribe": {"channel": "kept", "recover": True, "offset": 0}}, CROWD * LISTED),
    ],
    ids=["rpc publish", "publish", "presence", "presence_stats", "history", "recovery"],
)
async def test_what_many_ask_for_at_once_is_done_a_few_at_a_time(
    autojump_clock: MockClock, act: dict[str, Any], most: float
) -> None:
    config = Config(history_max_limit=CROWD, topics=TopicRules(history_size=CROWD))
    async with open_test_broker(Broker(config)) as net:
        clients = [await net.open_client() for _ in range(20)]
        fill(net)
        if "subscribe" in act:
            epoch = (await net.broker.history("kept", limit=0))[1].epoch
            act = {"subscribe": {**act["subscribe"], "epoch": epoch}}
        await wait_all_tasks_blocked()
        load = LoopLoad(net.broker.node.router.meter)
        trio.lowlevel.add_instrument(load)
        async with trio.open_nursery() as nursery:  # all in one moment
            for client in clients:
                nursery.start_soon(client.send_json, {"id": 7, **act})
        await wait_all_tasks_blocked()
        trio.lowlevel.remove_instrument(load)
        for client in clients:
            assert "error" not in (await client.receive_all())[-1]
        together = sum(load.rounds)
        assert together > 20 * 0.9 * most, "all of it was done, and charged"
        assert max(load.rounds) < ROUND + 1.5 * most + 20 * 2 * COMMAND
        assert len([each for each in load.rounds if each > most / 2]) >= min(
            20, together / (2 * ROUND)
        )


@pytest.mark.parametrize("asks", [False, True], ids=["at once", "by a hook"])
async def test_tokens_that_many_show_are_verified_a_few_at_a_time(
    autojump_clock: MockClock, tmp_path: Path, asks: bool
) -> None:
    """A signature may take as long as a hundred other commands, and a bad one costs its bearer nothing."""
    key = ec.generate_private_key(ec.SECP384R1())
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "key.pem").write_bytes(public)
    rules = TokenRules(public_keys=(str(tmp_path / "key.pem"),), allow_anonymous=True)
    broker = Broker(Config(tokens=rules))
    if asks:

        @broker.on_subscribe
        async def let_in(event: SubscribeEvent) -> None:
            pass

    shown = jwt.encode({"channel": "t"}, ec.generate_private_key(ec.SECP384R1()), "ES384")
    command = json.dumps({"id": 2, "subscribe": {"channel": "t", "token": shown}})
    async with open_test_broker(broker) as net:
        clients = [await net.open_client() for _ in range(10)]
        await wait_all_tasks_blocked()
        load = LoopLoad(net.node.router.meter)
        trio.lowlevel.add_instrument(load)
        async with trio.open_nursery() as nursery:
            for client in clients:
                nursery.start_soon(client.send_text, "\n".join([command] * 5))
        await wait_all_tasks_blocked()
        trio.lowlevel.remove_instrument(load)
        each = TOKEN + WIDE_SIGNATURE
        assert sum(load.rounds) > 50 * each
        assert max(load.rounds) < ROUND + 3 * each
        for client in clients:
            refused = 0
            while refused < 5:
                refused += (await client.receive_text()).count('"code":103')


async def test_hundreds_that_go_at_once_leave_a_few_at_a_time(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker(Config(direct_topics=False))) as net:
        clients = [await net.open_client() for _ in range(20)]
        router = net.broker.node.router
        for client in clients:
            peer = router.hub.sessions.get(client.fd)
            assert peer is not None
            for number in range(400):
                router.subscribe(subscription(peer, f"t{number}"))
        await wait_all_tasks_blocked()
        load = LoopLoad(router.meter)
        trio.lowlevel.add_instrument(load)
        async with trio.open_nursery() as nursery:
            for client in clients:
                nursery.start_soon(client.aclose)
        await wait_all_tasks_blocked()
        trio.lowlevel.remove_instrument(load)
        assert net.broker.topics() == {}
        assert net.broker.stats().connections == 0
        assert sum(load.rounds) >= 20 * 400 * LEFT
        assert max(load.rounds) <= ROUND + 400 * LEFT


@pytest.mark.parametrize("come_with", ["head", "connect"])
async def test_hundreds_that_come_at_once_are_let_in_a_few_at_a_time(
    autojump_clock: MockClock, come_with: str
) -> None:
    async with open_test_broker(Broker()) as net:
        peers = [await net.connect() for _ in range(300)]
        heads = come_with == "head"
        if not heads:
            for peer in peers:
                await peer.send(handshake())
                await peer.receive_head()
        await wait_all_tasks_blocked()
        load = LoopLoad(net.broker.node.router.meter)
        trio.lowlevel.add_instrument(load)
        async with trio.open_nursery() as nursery:
            for peer in peers:
                first = handshake() if heads else client_frame(TEXT, b'{"id":1,"connect":{}}')
                nursery.start_soon(peer.send, first)
        await wait_all_tasks_blocked()
        trio.lowlevel.remove_instrument(load)
        assert sum(load.rounds) >= 300 * (OPENING if heads else FIRST_MESSAGE)
        assert max(load.rounds) <= 2 * ROUND
        for peer in peers:
            assert await (peer.receive_head() if heads else peer.receive_json())


async def test_first_bursts_of_hundreds_are_carried_out_a_few_at_a_time(
    autojump_clock: MockClock, net: Network
) -> None:
    """Each is within what one may do at once; together they would hold the loop for 50 ms."""
    peers = [await net.open_client() for _ in range(300)]
    await wait_all_tasks_blocked()
    load = LoopLoad(net.node.router.meter)
    trio.lowlevel.add_instrument(load)
    async with trio.open_nursery() as nursery:
        for number, peer in enumerate(peers):
            said = [{"id": n + 2, "subscribe": {"channel": f"{number}.{n}"}} for n in range(7)]
            nursery.start_soon(peer.send_json, *said)
    await wait_all_tasks_blocked()
    trio.lowlevel.remove_instrument(load)
    assert sum(load.rounds) >= 300 * 7 * SUBSCRIPTION
    assert max(load.rounds) < 2 * ROUND + 300 * LITTLE, load.rounds


class Turns(trio.abc.Instrument):
    """A value after each turn of Trio's loop."""

    def __init__(self, value: Callable[[], float]) -> None:
        self.seen = [value()]
        self._value = value

    def before_io_wait(self, timeout: float) -> None:
        self.seen.append(self._value())


TOKENS = [f"t{n}" for n in range(7)]
WIDE = ".".join(TOKENS)
"""A topic that 100 patterns of one client match."""
OVERLAPPING = [
    ".".join("*" if bits >> at & 1 else token for at, token in enumerate(TOKENS))
    for bits in range(1, 101)
]


@pytest.mark.parametrize(
    "commands",
    [
        pytest.param([{"publish": {"channel": "a", "data": 1}}] * 500, id="one topic"),
        pytest.param([{"publish": {"channel": c, "data": 1}} for c in "ab" * 250], id="two topics"),
        pytest.param([{"publish": {"channel": WIDE, "data": 1}}] * 500, id="many audiences"),
        pytest.param([{"publish": {"channel": WIDE, "data": "x" * 9000}}] * 6, id="large ones"),
        pytest.param(
            [{"id": 5, "rpc": {"method": "publish", "data": {"topic": WIDE, "data": 1}}}] * 50,
            id="by themselves",
        ),
        pytest.param(
            [
                {"id": n, "subscribe": {"channel": name, "tf": {"key": "a", "cmp": "ex"}}}
                for n, name in enumerate(OVERLAPPING, 1)
            ],
            id="filters",
        ),
    ],
)
@pytest.mark.parametrize("joined", [True, False])
async def test_the_work_of_one_read_is_done_in_slices(
    autojump_clock: MockClock, commands: list[dict[str, Any]], joined: bool
) -> None:
    """A slice may end in the midst of an act, which is one publication here at most."""
    lines = [json.dumps(each).encode() for each in commands]
    sent = [b"\n".join(lines)] if joined else lines
    size = len(lines[0]) / 1024 * KILOBYTE
    act = len(OVERLAPPING) * (PUBLICATION + AUDIENCE + PEER + LISTENERS + size)
    config = Config(outbox_bytes=2**26, outbox_messages=10**6)  # no rule for slow readers
    async with open_test_broker(Broker(config)) as net:
        reader, client = await net.open_client(), await net.open_client()
        for name in (*"ab", *OVERLAPPING):
            await reader.request(subscribe={"channel": name})
        meter = net.node.services.router.meter
        await client.send(b"".join(client_frame(frames.TEXT, each) for each in sent))
        turns = Turns(lambda: meter.done)
        trio.lowlevel.add_instrument(turns)
        await client.send_json({"id": 9999, "presence_stats": {"channel": "a"}})
        while b'"id":9999' not in (await client.receive_text()).encode():
            pass
        trio.lowlevel.remove_instrument(turns)
    done = [after - before for before, after in pairwise(turns.seen)]
    assert max(done) <= max(SLICE, MOST_TOGETHER) + act
    assert sum(done) > 300


async def test_replies_to_publishes_come_behind_the_publications_of_their_batch(
    autojump_clock: MockClock,
    net: Network,
) -> None:
    client = await net.open_client()
    await client.request(subscribe={"channel": "a"})
    await client.request(subscribe={"channel": "b"})
    names = "aababb"
    commands = [
        {"id": number, "publish": {"channel": name, "data": number}}
        for number, name in enumerate(names, 1)
    ]
    objects = await ask(client, *commands)
    assert data_of(objects[: len(names)]) == [1, 2, 3, 4, 5, 6]
    assert objects[len(names) :] == [{"id": n, "publish": {}} for n in range(1, 7)]


async def test_every_other_reply_comes_at_once_behind_all_before_it(
    autojump_clock: MockClock, net: Network
) -> None:
    client = await net.open_client()
    objects = await ask(
        client,
        {"id": 1, "publish": {"channel": "a", "data": "before"}},
        {"id": 2, "subscribe": {"channel": "a"}},
        {"id": 3, "publish": {"channel": "a", "data": "x"}},
        {"id": 4, "publish": {"channel": "*", "data": "bad"}},
        {"id": 5, "presence_stats": {"channel": "a"}},
        {"id": 6, "publish": {"channel": "a", "data": "y"}},
        {"id": 7, "unsubscribe": {"channel": "a"}},
        {"id": 8, "publish": {"channel": "a", "data": "after"}},
    )
    order = [o["id"] if "id" in o else o["push"]["pub"]["data"] for o in objects]
    assert order == [1, 2, "x", 3, 4, 5, "y", 6, 7, 8]


async def test_many_messages_in_one_write_keep_their_order(
    autojump_clock: MockClock, net: Network
) -> None:
    client = await net.open_client()
    await client.request(subscribe={"channel": "a"})
    texts = [f'{{"id":{n},"publish":{{"channel":"a","data":{n}}}}}' for n in range(1, 101)]
    await client.send(b"".join(client_frame(frames.TEXT, text.encode()) for text in texts))
    objects = await client.receive_all()
    assert data_of(objects) == list(range(1, 101))
    assert [o["id"] for o in objects if "id" in o] == list(range(1, 101))


@pytest.mark.parametrize("bad", ["hello", '{"id":2,"connect":{}}'])
async def test_commands_before_a_bad_message_are_done_and_answered(
    autojump_clock: MockClock, net: Network, bad: str
) -> None:
    client, reader = await net.open_client(), await net.open_client()
    await reader.request(subscribe={"channel": "a"})
    publish = b'{"id":1,"publish":{"channel":"a","data":1}}'
    await client.send(client_frame(frames.TEXT, publish) + client_frame(frames.TEXT, bad.encode()))
    first, *_, code = await client.receive_all()
    assert (first, code) == ({"id": 1, "publish": {}}, 3501)
    assert data_of(await reader.receive_all()) == [1]


async def test_a_publication_is_out_before_a_hook_is_waited_for(
    autojump_clock: MockClock, net: Network
) -> None:
    @net.broker.on_rpc
    async def call(connection: Connection, method: str, data: object) -> None:
        await trio.sleep(60)

    client, reader = await net.open_client(), await net.open_client()
    await reader.request(subscribe={"channel": "a"})
    publish = {"id": 1, "publish": {"channel": "a", "data": 1}}
    assert await ask(client, publish, {"id": 2, "rpc": {}}) == [{"id": 1, "publish": {}}]
    assert data_of(await reader.receive_all()) == [1]


async def test_commands_behind_the_one_that_ended_a_client_are_not_done(
    autojump_clock: MockClock, net: Network
) -> None:
    @net.broker.on_rpc
    async def call(connection: Connection, method: str, data: object) -> None:
        net.broker.disconnect(connection.fd)

    client, reader = await net.open_client(), await net.open_client()
    await reader.request(subscribe={"channel": "a"})
    publish = {"id": 2, "publish": {"channel": "a", "data": 1}}
    await ask(client, {"id": 1, "rpc": {}}, publish, {"send": {"data": 1}})
    assert await reader.receive_all() == []


async def test_commands_behind_a_bad_one_are_not_done(
    autojump_clock: MockClock, net: Network
) -> None:
    client = await net.open_client()
    commands = [{"id": 1, "connect": {}}, {"id": 2, "publish": {"channel": "a", "data": 1}}]
    assert (await ask(client, *commands))[-1] == 3501
    assert net.broker.stats().published == 0


@pytest.mark.parametrize(
    "text",
    [
        "hello",
        "",
        "[]",
        "null",
        '{"id":-1,"subscribe":{}}',
        '{"id":4294967296,"subscribe":{}}',
        '{"id":18446744073709551616,"subscribe":{}}',
        '{"id":0,"subscribe":{"channel":"a"}}',
        '{"rpc":{"method":"a"}}',
        '{"publish":{"channel":"a","data":1},"send":{"data":1}}',
        '{"publish":{"channel":"a","data":1},"id":1}}',
        "\n\n",
        " ",
        '{"id":1}{"id":2}',
        '{"id":1,"rpc":{"data":' + "[" * 10_000 + "]" * 10_000 + "}}",
    ],
    ids=lambda text: repr(text[:40]),
)
async def test_a_client_that_does_not_speak_the_protocol_is_sent_away(
    autojump_clock: MockClock, net: Network, text: str
) -> None:
    client = await net.open_client()
    await client.send_text(text)
    push, code = await client.receive_all()
    assert code == 3501
    assert push["push"]["disconnect"]["code"] == 3501
    assert push["push"]["disconnect"]["reason"].startswith("bad request")


@pytest.mark.parametrize("pings", [0, 6000])
async def test_a_large_message_is_not_taken_apart_before_its_turn(
    autojump_clock: MockClock, net: Network, monkeypatch: pytest.MonkeyPatch, pings: int
) -> None:
    client = await net.open_client()
    router, published, wait = net.node.router, [], Queue.wait

    async def watched(turns: Queue, work: float | None = None) -> float:
        published.append(router.published)
        return await wait(turns, work)

    monkeypatch.setattr(Queue, "wait", watched)
    first = '{"publish":{"channel":"news","data":"first"}}'
    await client.send_text("\n".join([first, *["{}"] * pings, "{}"]))
    await wait_all_tasks_blocked()
    assert published[:1] == ([0] if pings else []), "what was published when it went into the queue"
    assert router.published == 1


async def test_large_publishes_that_end_together_are_unmasked_in_turns(
    autojump_clock: MockClock, net: Network
) -> None:
    """To unmask a mebibyte takes 4 ms, and to decode it as much again."""
    command = {"publish": {"channel": "a", "data": "x" * 10**6}}
    sent = client_frame(frames.TEXT, json.dumps(command).encode())
    clients = [await net.open_client() for _ in range(20)]
    load = LoopLoad(net.node.router.meter)
    trio.lowlevel.add_instrument(load)
    async with trio.open_nursery() as nursery:
        for client in clients:
            nursery.start_soon(client.send, sent)
    await wait_all_tasks_blocked()
    trio.lowlevel.remove_instrument(load)
    unmasked = len(sent) / 1024 * UNMASKED_KILOBYTE
    assert sum(load.rounds) > 20 * unmasked
    assert max(load.rounds) < 8 * unmasked
    for client in clients:
        await client.request(presence_stats={"channel": "a"})


@pytest.mark.parametrize("codec", ["json", "protobuf"])
@pytest.mark.parametrize("excess", [0, 1])
async def test_a_message_of_so_many_commands_is_carried_out(
    autojump_clock: MockClock, net: Network, codec: str, excess: int
) -> None:
    """All of them, or none."""
    reader = await net.open_client()
    await reader.request(subscribe={"channel": "news"})
    headers = {"Sec-WebSocket-Protocol": f"centrifuge-{codec}"}
    client = await net.open_websocket(headers=headers)
    pings = MAX_COMMANDS - 2 + excess
    if codec == "protobuf":
        message = delimited(
            schema.Command(id=1, connect={}),
            *[schema.Command()] * pings,
            schema.Command(publish={"channel": "news", "data": b'"last"'}),
        )
        await client.send(client_frame(frames.BINARY, message))
    else:
        last = '{"publish":{"channel":"news","data":"last"}}'
        await client.send_text("\n".join(['{"id":1,"connect":{}}', *["{}"] * pings, last]))
    if excess:
        assert (await client.receive_close())[0] == 3501
        assert await reader.receive_all() == []
    else:
        assert (await next_pub(reader))["data"] == "last"


@pytest.mark.parametrize(
    "command, code",
    [
        ({}, 104),
        ({"dance": {}}, 104),
        ({"rpc": {"method": "x"}}, 104),
        ({"publish": {"channel": "a"}}, 107),
        ({"publish": {}}, 107),
        ({"subscribe": {}}, 107),
        ({"subscribe": {"channel": "a"}, "unsubscribe": {"channel": "a"}}, 107),
        ({"publish": {"channel": "a", "data": 1}, "rpc": {}}, 107),
        ({"connect": {}, "publish": {"channel": "a", "data": 1}}, 107),
        ({"refresh": {"token": "t"}}, 108),
        ({"sub_refresh": {"channel": "a", "token": "t"}}, 108),
    ],
)
async def test_a_bad_request_is_answered_and_its_client_stays(
    autojump_clock: MockClock, net: Network, command: dict[str, object], code: int
) -> None:
    client = await net.open_client()
    assert await error_of(client, **command) == code
    assert "publish" in await client.request(publish={"channel": "a", "data": 1})


async def test_an_error_has_the_words_that_clients_know(
    autojump_clock: MockClock, net: Network
) -> None:
    client = await net.open_client()
    assert await ask(client, {"id": 9, "rpc": {"method": "x"}}) == [
        {"id": 9, "error": {"code": 104, "message": "method not found"}}
    ]


@pytest.mark.parametrize("command", ["history", "recovery"])
async def test_a_client_that_asks_for_a_lot_gets_all_of_it_one_after_the_other(
    autojump_clock: MockClock, command: str
) -> None:
    """Each reply is ten times what its outbox holds."""
    async with open_test_broker(Broker(Config(outbox_bytes=10_000))) as net:
        client = await net.open_client(lockstep_stream_pair)
        outbox = net.outbox(client.fd)
        for number in range(100):
            net.broker.publish_nowait("t", f"{number:01000}")
        history = {"id": 1, "history": {"channel": "t", "limit": -1}}
        position = {"recover": True, "epoch": net.node.services.router.engine.position("t").epoch}
        recovery = {"id": 1, "subscribe": {"channel": "t", **position}}
        await client.send_json(recovery if command == "recovery" else history, history, history)
        most = 0
        replies: list[Any] = []
        while len(replies) < 3:
            await trio.sleep(5)
            most = max(most, outbox.bytes)
            replies += [json.loads(line) for line in (await client.receive_text()).split("\n")]
        assert most < 130_000
        for reply in replies:
            (result,) = [value for key, value in reply.items() if key != "id"]
            assert len(result["publications"]) == 100


async def published(net: Network, *payloads: bytes, topic: str = "news") -> list[Any]:
    """Pushes that a subscriber gets of these messages, sent in one write; without frames."""
    reader = await net.open_client()
    await reader.request(subscribe={"channel": topic})
    writer = await net.open_client()
    await writer.request(publish={"channel": topic, "data": "opened"})
    await writer.send(b"".join([client_frame(TEXT, payload) for payload in payloads]))
    got: list[Any] = []
    while True:
        with trio.move_on_after(1) as silence:
            got += map(json.loads, (await reader.receive_text()).split("\n"))
        if silence.cancelled_caught:
            return [push["push"]["pub"] | {"channel": push["push"]["channel"]} for push in got[1:]]


def a_publish(data: object, topic: str = "news") -> bytes:
    return json.dumps({"publish": {"channel": topic, "data": data}}, ensure_ascii=False).encode()


TOGETHER: dict[str, tuple[list[bytes], list[object]]] = {
    "one": ([a_publish(1)], [1]),
    "two": ([a_publish(1), a_publish(2)], [1, 2]),
    "as many as have a template": ([a_publish(n) for n in range(4)], [0, 1, 2, 3]),
    "more than history keeps": ([a_publish(n) for n in range(250)], list(range(250))),
    "a percent sign": ([a_publish("100 %d %b")] * 5, ["100 %d %b"] * 5),
    "not ASCII": ([a_publish("ü"), a_publish("客户端")], ["ü", "客户端"]),
    "two in one message": ([a_publish(1), a_publish(2) + b"\n" + a_publish(3)], [1, 2, 3]),
    "lines within": ([a_publish(1), a_publish({"a": 2}).replace(b" ", b"\n")], [1, {"a": 2}]),
    "a line too many": ([a_publish(1) + b"\n", a_publish(2), a_publish(3)], [1, 2, 3]),
    "without data": ([a_publish(1), b'{"publish":{"channel":"news"}}', a_publish(3)], [1, 3]),
    "another topic between": ([a_publish(1), a_publish(2, "b"), a_publish(3)], [1, 3]),
    "a topic that is none": ([a_publish(1), a_publish(2, "a.*"), a_publish(3)], [1, 3]),
    "another command between": ([a_publish(1), b'{"id":7,"rpc":{}}', a_publish(3)], [1, 3]),
    "an answer to a ping between": ([a_publish(1), b"{}", a_publish(3)], [1, 3]),
}


@pytest.mark.parametrize("case", TOGETHER)
async def test_publishes_that_come_together_arrive_one_by_one(
    case: str, autojump_clock: MockClock
) -> None:
    payloads, expected = TOGETHER[case]
    async with open_test_broker(Broker()) as net:
        got = await published(net, *payloads)
        assert [pub["data"] for pub in got] == expected
        assert [pub["offset"] for pub in got] == list(range(2, 2 + len(expected)))
        assert {pub["info"]["client"] for pub in got} == {"2"}
        # One that opened the topic, and in one case another to a topic of its own.
        others = case == "another topic between"
        assert net.broker.stats().published == 1 + len(expected) + others


async def test_publishes_to_a_reader_of_a_pattern_name_their_topic_however_many_come(
    autojump_clock: MockClock,
) -> None:
    async with open_test_broker(Broker()) as net:
        reader = await net.open_client()
        await reader.request(subscribe={"channel": "news.*"})
        writer = await net.open_client()
        await writer.request(publish={"channel": "news.a", "data": 0})
        await reader.receive_json()
        await writer.send(client_frame(TEXT, a_publish(1, "news.a")) * 5)
        for _ in range(5):
            push = (await reader.receive_json())["push"]
            assert (push["channel"], push["pub"]["channel"]) == ("news.*", "news.a")
            assert push["pub"]["tags"] == {"topic": "news.a"}


async def test_an_empty_message_among_publishes_ends_the_connection(
    autojump_clock: MockClock,
) -> None:
    async with open_test_broker(Broker()) as net:
        peer = await net.open_client()
        for _ in range(2):  # the first opens the topic
            await peer.send(client_frame(TEXT, a_publish(1)) * 3)
        await peer.send(client_frame(TEXT, a_publish(1)) + client_frame(TEXT, b""))
        assert (await peer.receive_close())[0] == 3501


async def test_every_publish_of_a_batch_gets_its_reply(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker()) as net:
        peer = await net.open_client()
        await peer.request(publish={"channel": "a", "data": 0})
        sent = [{"id": n, "publish": {"channel": "a", "data": n}} for n in range(2, 9)]
        await peer.send(b"".join([client_frame(TEXT, json.dumps(c).encode()) for c in sent]))
        replies = [json.loads(line) for line in (await peer.receive_text()).split("\n")]
        assert [reply["id"] for reply in replies] == list(range(2, 9))


async def test_text_that_is_not_utf_8_ends_the_connection_in_binary_frames_too(
    autojump_clock: MockClock,
) -> None:
    async with open_test_broker(Broker()) as net:
        peer = await net.open_client()
        await peer.request(publish={"channel": "news", "data": 0})
        broken = a_publish("?").replace(b"?", b"\xff")
        await peer.send(b"".join(client_frame(BINARY, each) for each in (a_publish(1), broken)))
        assert (await peer.receive_close())[0] == 3501


async def test_direct_messages_to_who_has_gone_are_no_offence(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker()) as net:
        sender, receiver = await net.open_client(), await net.open_client()
        message = client_frame(TEXT, a_publish("hi", f"fd:{receiver.fd}"))
        await sender.send(message * 3)
        for _ in range(3):
            await receiver.receive_json()
        await receiver.aclose()
        await sender.send(message * 3)
        assert await pong_to(sender) == (PONG, b"?")


LARGE = Config(outbox_bytes=10_000, topics=TopicRules(history_size=100))


async def ask_for_much(net: Network, *behind: object) -> Peer:
    """A client that asks for 40,000 bytes, and for more behind it, and takes none of it."""
    for number in range(40):
        net.broker.publish_nowait("news", f"{number:01000}")
    peer = await net.open_client(lockstep_stream_pair)
    many = {"id": 2, "history": {"channel": "news", "limit": -1}}
    await peer.send_json(many, *behind)
    await wait_all_tasks_blocked()
    return peer


@pytest.mark.parametrize("behind", [(), ({"id": 3, "history": {"channel": "news"}},)])
async def test_while_a_large_reply_waits_its_peer_is_heard(
    behind: tuple[object, ...], autojump_clock: MockClock
) -> None:
    broker, ends = Broker(LARGE), []

    @broker.on_close
    async def note(connection: Connection, close: Close) -> None:
        ends.append((trio.current_time(), close.code, close.initiator))

    async with open_test_broker(broker) as net:
        peer = await ask_for_much(net, *behind)
        began = trio.current_time()
        await peer.send_json({"id": 4, "presence": {"channel": "news"}})
        await peer.send_close(4000, "bye")
        await trio.sleep(20)
        # It had `close_seconds` to take the reply before what it asked for behind it is dropped, and
        # as many for the rest of what is queued.
        grace = 2 * broker.config.close_seconds
        assert ends == [(began + grace, 4000, Initiator.CLIENT)]


async def test_commands_behind_a_large_reply_are_served_once_in_order(
    autojump_clock: MockClock,
) -> None:
    async with open_test_broker(Broker(LARGE)) as net:
        reader = await net.open_client()
        await reader.request(subscribe={"channel": "b"})
        peer = await ask_for_much(
            net,
            {"publish": {"channel": "b", "data": 1}},
            {"id": 3, "history": {"channel": "news", "limit": -1}},
            {"publish": {"channel": "b", "data": 2}},
        )
        for number in (3, 4):
            await peer.send(client_frame(TEXT, a_publish(number, "b")))
        await peer.send_json({"id": 5, "presence": {"channel": "news"}})
        await wait_all_tasks_blocked()
        ids: list[int] = []
        while len(ids) < 3:
            ids += [json.loads(line)["id"] for line in (await peer.receive_text()).split("\n")]
        assert ids == [2, 3, 5]
        got: list[Any] = []
        while len(got) < 4:
            got += map(json.loads, (await reader.receive_text()).split("\n"))
        assert [push["push"]["pub"]["data"] for push in got] == [1, 2, 3, 4]
