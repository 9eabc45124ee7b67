"""The server's say over one peer: messages, topics and users that it has not asked for."""

import msgspec
import pytest
import trio
import trio.testing
from structlog.testing import capture_logs
from trio.testing import MockClock, wait_all_tasks_blocked

from broker import (
    Broker,
    Config,
    Connection,
    Frame,
    PushResult,
    Refused,
    TopicRules,
)
from broker.core.session import Decider, Grant, Phase, PhaseEvent, ServerSub, Subscription
from broker.errors import UnsubscribeCode
from broker.protocols.centrifuge_json import CENTRIFUGE_JSON
from broker.protocols.centrifuge_protobuf import CENTRIFUGE_PROTOBUF
from broker.protocols.codec import PeerCodec
from broker.protocols.plain import PLAIN
from broker.routing.router import Router
from broker.session.orders import ENTRY_BYTES, Orders
from broker.testing import Network, open_test_broker
from broker.transport import frames
from tests.routing.conftest import (
    attach,
    end_round,
    listen,
    make_router,
    publish,
    receive_pushes,
    runs,
)


async def test_a_client_is_pushed_messages(autojump_clock: MockClock, net: Network) -> None:
    client = await net.open_client()
    for data in ("x", {"a": 1}, None):
        assert net.broker.push(client.fd, data) is PushResult.QUEUED
    assert await client.receive_all() == [
        {"push": {"message": {"data": data}}} for data in ("x", {"a": 1}, None)
    ]


LOCKSTEP = trio.testing.lockstep_stream_pair


@pytest.mark.parametrize(
    "data, opcode, payload",
    [
        ("hello", frames.TEXT, b"hello"),
        ("", frames.TEXT, b""),
        ("服务端", frames.TEXT, "服务端".encode()),
        (b"\x00\xff", frames.BINARY, b"\x00\xff"),
        ({"a": [1, None]}, frames.TEXT, b'{"a":[1,null]}'),
        (7, frames.TEXT, b"7"),
        (None, frames.TEXT, b"null"),
        (msgspec.Raw(b'{"a": 1}'), frames.TEXT, b'{"a": 1}'),
        (msgspec.Raw(b'"text"'), frames.TEXT, b"text"),
    ],
)
async def test_a_push_to_a_plain_peer(
    autojump_clock: MockClock, data: object, opcode: int, payload: bytes
) -> None:
    async with open_test_broker(Broker()) as net:
        peer = await net.open_plain()
        assert net.broker.push(peer.fd, data) is PushResult.QUEUED
        assert await peer.receive_frame() == (opcode, payload)


@pytest.mark.parametrize(
    "data, shown",
    [
        ("hello", "hello"),
        ({"a": [1, None]}, {"a": [1, None]}),
        (msgspec.Raw(b'{\n"a": 1}'), {"a": 1}),
        (b"\x00\xff", "AP8="),
    ],
)
async def test_a_push_to_a_centrifuge_client(
    autojump_clock: MockClock, data: object, shown: object
) -> None:
    async with open_test_broker(Broker()) as net:
        client = await net.open_client()
        assert net.broker.push(client.fd, data) is PushResult.QUEUED
        assert await client.receive_json() == {"push": {"message": {"data": shown}}}


async def test_a_push_that_finds_no_room_is_full_and_its_peer_is_cut(
    autojump_clock: MockClock,
) -> None:
    rules = TopicRules(history_size=0, slow_consumer="drop_oldest")
    async with open_test_broker(Broker(Config(outbox_messages=3, topics=rules))) as net:
        client = await net.open_client(make_pair=LOCKSTEP)
        await client.request(subscribe={"channel": "news"})
        for number in range(6):
            net.broker.publish_nowait("news", number)
            await wait_all_tasks_blocked()  # the writer has its hands full
        assert net.broker.push(client.fd, "x") is PushResult.FULL
        assert net.broker.push(client.fd, "x") is PushResult.CLOSED
        code, _ = await client.receive_close()
        assert code == 3008


async def test_a_push_comes_behind_what_a_client_published_in_the_same_turn(
    autojump_clock: MockClock,
) -> None:
    broker = Broker()
    pushed = []

    @broker.on_message
    async def push(connection: Connection, frame: Frame) -> None:
        pushed.append(broker.push(1, "pushed"))  # no checkpoint since the publish before it

    async with open_test_broker(broker) as net:
        reader, writer = await net.open_client(), await net.open_client()
        await reader.request(subscribe={"channel": "news"})
        await writer.send_json({"publish": {"channel": "news", "data": 1}}, {"send": {"data": 2}})
        assert (await reader.receive_json())["push"]["pub"]["data"] == 1
        assert (await reader.receive_json())["push"]["message"] == {"data": "pushed"}
    assert pushed == [PushResult.QUEUED]


async def test_pushes_and_publications_keep_their_order(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker()) as net:
        peer = await net.open_plain()
        net.broker.push(peer.fd, "1")
        net.broker.publish_nowait(f"fd:{peer.fd}", "2")
        net.broker.push(peer.fd, "3")
        assert [await peer.receive_text() for _ in range(3)] == ["1", "2", "3"]


async def test_a_client_is_told_of_a_subscription_it_did_not_ask_for(
    autojump_clock: object,
) -> None:
    async with open_test_broker(Broker()) as net:
        peer = await net.open_client()
        assert net.broker.add_subscription(peer.fd, "news", data={"why": "vip"}, info="seat 4")
        (push,) = await receive_pushes(peer, 1)
        epoch = push["subscribe"].pop("epoch")
        assert epoch
        assert push == {
            "channel": "news",
            "subscribe": {
                "recoverable": True,
                "positioned": True,
                "offset": 0,
                "data": {"why": "vip"},
            },
        }
        net.broker.publish_nowait("news", 1)
        (push,) = await receive_pushes(peer, 1)
        assert push == {"channel": "news", "pub": {"data": 1, "offset": 1}}
        presence = await peer.request(presence={"channel": "news"})
        (info,) = presence["presence"]["presence"].values()
        assert info["chan_info"] == "seat 4"


async def test_it_ends_as_the_server_says_or_the_client(autojump_clock: object) -> None:
    async with open_test_broker(Broker()) as net:
        peer = await net.open_client()
        for topic in ("a", "b"):
            net.broker.add_subscription(peer.fd, topic)
        await receive_pushes(peer, 2)
        assert net.broker.end_subscription(peer.fd, "a")
        assert not net.broker.end_subscription(peer.fd, "a")
        (push,) = await receive_pushes(peer, 1)
        assert push["unsubscribe"] == {"code": 2000, "reason": "server unsubscribe"}
        await peer.request(unsubscribe={"channel": "b"})
        assert net.broker.connections()[0].topics == ()


async def test_a_watcher_sees_a_subscription_come_and_go(autojump_clock: object) -> None:
    async with open_test_broker(Broker()) as net:
        peer, watcher = await net.open_client(), await net.open_client()
        await watcher.request(subscribe={"channel": "news", "join_leave": True})
        await watcher.receive_json()
        net.broker.add_subscription(peer.fd, "news", join_leave=True)
        first, second = await receive_pushes(peer, 2)
        assert "subscribe" in first
        assert second["join"]["info"]["client"] == str(peer.fd)
        net.broker.end_subscription(peer.fd, "news")
        joined, left = await receive_pushes(watcher, 2)
        assert joined["join"] == left["leave"] == {"info": {"user": "", "client": str(peer.fd)}}


async def test_a_subscription_that_cannot_be_is_false_or_refused(autojump_clock: object) -> None:
    async with open_test_broker(Broker(Config(max_topics=2))) as net:
        peer = await net.open_client()
        add = net.broker.add_subscription
        assert add(peer.fd, "a")
        assert not add(peer.fd, "a")
        assert not add(99, "a")
        for topic, code in [("", 107), ("fd:99", 103), (f"fd:{peer.fd}", 105)]:
            with pytest.raises(Refused) as refused:
                add(peer.fd, topic)
            assert refused.value.code == code
        assert add(peer.fd, "b.*")
        with pytest.raises(Refused) as refused:
            add(peer.fd, "c")
        assert refused.value.code == 106
        reply = await peer.request(subscribe={"channel": "a"})
        assert reply["error"]["code"] == 105
        net.broker.disconnect(peer.fd)
        assert not add(peer.fd, "d")
        assert net.broker.stats().hub.subscriptions == 0


async def test_a_plain_peer_may_be_subscribed_too(autojump_clock: object) -> None:
    async with open_test_broker(Broker()) as net:
        peer = await net.open_plain()
        assert net.broker.add_subscription(peer.fd, "news")
        net.broker.publish_nowait("news", "hello")
        assert net.broker.end_subscription(peer.fd, "news")
        net.broker.publish_nowait("news", "unheard")
        net.broker.push(peer.fd, "last")
        assert [await peer.receive_text() for _ in range(2)] == ["hello", "last"]


async def test_a_subscription_made_at_open_is_in_the_connect_reply(autojump_clock: object) -> None:
    broker = Broker()

    @broker.on_open
    async def subscribe(connection: Connection) -> None:
        broker.add_subscription(connection.fd, "news")

    async with open_test_broker(broker) as net:
        plain, client = await net.open_plain(), await net.open_websocket()
        reply = await client.request(connect={})
        assert {*reply["connect"]["subs"]} == {"news", f"fd:{client.fd}"}
        broker.publish_nowait("news", 1)
        assert (await client.receive_json())["push"]["pub"] == {"data": 1, "offset": 1}
        assert await plain.receive_text() == "1"


# by itself


def orders_for(
    codec: PeerCodec | None = CENTRIFUGE_JSON,
    *,
    router: Router | None = None,
    may_be_plain: bool = True,
    user: str = "",
) -> Orders:
    """Orders for a peer that speaks `codec`; with None it has not spoken yet."""
    router = router or make_router()
    return Orders(router, attach(router, codec, user), may_be_plain)


def frames_for(orders: Orders) -> list[bytes]:
    """All that waits in the outbox, frame by frame."""
    return [frame for run in orders.peer.outbox.mail for frame in run.frames]


def connect(orders: Orders) -> None:
    """Let the peer in, as its `connect` does: topics first, then messages."""
    orders.peer.codec = CENTRIFUGE_JSON
    orders.peer.transition(PhaseEvent.CONNECT)
    orders.take_topics()
    orders.send_waiting()


@pytest.mark.parametrize(
    "codec, phase, speaks",
    [
        (None, Phase.OPEN, False),
        (PLAIN, Phase.PLAIN, False),
        (CENTRIFUGE_JSON, Phase.CONNECTED, True),
        (CENTRIFUGE_PROTOBUF, Phase.CONNECTED, True),
    ],
)
def test_the_codec_is_that_of_a_client_which_has_connected(
    codec: PeerCodec | None, phase: Phase, speaks: bool
) -> None:
    orders = orders_for(codec)
    assert orders.peer.phase is phase
    assert orders.codec is (codec if speaks else None)
    orders.peer.transition(PhaseEvent.CLOSE)
    assert orders.codec is None


@pytest.mark.parametrize(
    "data, frame",
    [
        ("hi", b"\x81\x02hi"),
        (b"\x00", b"\x82\x01\x00"),
        (b"{}", b"\x82\x02{}"),
        ({"a": 1}, b'\x81\x07{"a":1}'),
        (None, b"\x81\x04null"),
    ],
)
def test_messages_wait_until_it_is_known_how_to_send_them(data: object, frame: bytes) -> None:
    orders, spoken = orders_for(None), orders_for(PLAIN)
    assert orders.push(data) is PushResult.QUEUED
    assert frames_for(orders) == []
    assert orders.declare_plain()
    assert spoken.push(data) is PushResult.QUEUED
    assert frames_for(orders) == frames_for(spoken) == [frame]


def test_messages_that_wait_keep_their_order_and_go_out_once() -> None:
    orders = orders_for(None)
    for data in (1, "two", 3):
        orders.push(data)
    connect(orders)
    orders.send_waiting()
    assert [data_in(frame) for frame in frames_for(orders)] == [1, "two", 3]
    assert orders.peer.outbox.messages == 3


def data_in(frame: bytes) -> object:
    return msgspec.json.decode(frame[2:])["push"]["message"]["data"]


def test_messages_wait_within_the_bounds_of_an_outbox() -> None:
    orders = orders_for(None, router=make_router(Config(outbox_bytes=1000)))
    size = 500 - ENTRY_BYTES
    assert [orders.push("x" * size) for _ in range(3)] == [
        PushResult.QUEUED,
        PushResult.QUEUED,
        PushResult.FULL,
    ]
    # The smallest has its price too.
    small = orders_for(None, router=make_router(Config(outbox_bytes=1000)))
    results = [small.push("") for _ in range(1 + 1000 // ENTRY_BYTES)]
    assert results.count(PushResult.FULL) == 1
    # Room is there again once they are out.
    assert orders.declare_plain()
    assert orders.push("x" * size) is PushResult.QUEUED


@pytest.mark.parametrize("codec", [None, PLAIN, CENTRIFUGE_JSON])
def test_a_message_that_cannot_be_is_refused_before_anything_waits(
    codec: PeerCodec | None,
) -> None:
    orders = orders_for(codec)
    with pytest.raises(TypeError):
        orders.push(object())
    with pytest.raises(ValueError, match="surrogates not allowed"):
        orders.push("\ud800")
    connect(orders) if codec is None else None
    assert frames_for(orders) == []


@pytest.mark.parametrize("codec", [None, PLAIN, CENTRIFUGE_JSON])
def test_a_peer_that_is_closing_takes_no_orders(codec: PeerCodec | None) -> None:
    orders = orders_for(codec)
    orders.peer.transition(PhaseEvent.CLOSE)
    assert orders.push("x") is PushResult.CLOSED
    assert not orders.add_subscription("a", ServerSub())
    assert not orders.end_subscription("a", 2000, "")
    assert not orders.declare_plain()
    assert (frames_for(orders), orders.peer.subscriptions) == ([], {})


@pytest.mark.parametrize(
    "data, opaque, frame_has",
    [
        (b"\x00\xff", False, b'"AP8="'),
        (b"\x00\xff", True, b"\x00\xff"),
        ("hi", False, b'"hi"'),
        ("hi", True, b'"hi"'),
        ({"a": 1}, False, b'{"a":1}'),
        ({"a": 1}, True, b'{"a":1}'),
    ],
)
def test_bytes_go_as_they_are_to_clients_that_take_bytes(
    data: object, opaque: bool, frame_has: bytes
) -> None:
    orders = orders_for(CENTRIFUGE_PROTOBUF if opaque else CENTRIFUGE_JSON)
    orders.push(data)
    (frame,) = frames_for(orders)
    assert frame_has in frame


# topics of a peer that has not spoken yet


def test_topics_wait_for_the_first_message() -> None:
    orders = orders_for(None)
    sub = ServerSub(b"1", b"2", join_leave=True)
    assert orders.add_subscription("a", sub)
    assert not orders.add_subscription("a", ServerSub())  # the first counts
    assert orders.topics_waiting_for("") == {"a": sub}
    assert orders.peer.subscriptions == {}
    assert orders.end_subscription("a", 2000, "")
    assert not orders.end_subscription("a", 2000, "")
    assert orders.topics_waiting_for("") == {}


def test_topics_wait_within_the_bound_of_subscriptions() -> None:
    orders = orders_for(None, router=make_router(Config(max_topics=2)))
    for name in ("a", "b"):
        orders.add_subscription(name, ServerSub())
    with pytest.raises(Refused, match="106: more than 2 subscriptions"):
        orders.add_subscription("c", ServerSub())
    assert list(orders.topics_waiting_for("")) == ["a", "b"]


@pytest.mark.parametrize("codec", [None, PLAIN, CENTRIFUGE_JSON])
@pytest.mark.parametrize(
    "name, code", [("", 107), ("a\n", 107), ("fd:9", 103), ("user:eve", 103), ("olds:a", 102)]
)
def test_a_name_that_cannot_be_is_refused_at_once(
    codec: PeerCodec | None, name: str, code: int
) -> None:
    config = Config(namespaces={"chat": TopicRules()})
    orders = orders_for(codec, router=make_router(config))
    with pytest.raises(Refused, match=str(code)):
        orders.add_subscription(name, ServerSub())
    assert not orders.topics_waiting_for("")
    assert orders.peer.subscriptions == {}


# a peer is declared plain


async def test_a_peer_declared_plain_gets_its_topics_then_its_messages() -> None:
    orders = orders_for(None)
    router = orders.router
    orders.push("first")
    orders.add_subscription("a", ServerSub())
    publish(router, "a", b'"too early"')
    assert orders.declare_plain()
    publish(router, "a", b'"news"')
    end_round(router)
    assert runs(orders.peer) == [["first"], ["news"]]
    assert orders.peer.phase is Phase.PLAIN
    assert orders.peer.subscriptions["a"].grant == Grant("a", Decider.SERVER)
    assert not orders.topics_waiting_for("")


@pytest.mark.parametrize(
    "codec, may_be_plain, declared",
    [
        (None, True, True),
        (None, False, False),  # over HTTP, or with a subprotocol
        (PLAIN, True, False),
        (CENTRIFUGE_JSON, True, False),
    ],
)
def test_only_a_peer_that_has_not_spoken_is_declared_plain(
    codec: PeerCodec | None, may_be_plain: bool, declared: bool
) -> None:
    orders = orders_for(codec, may_be_plain=may_be_plain)
    phase = orders.peer.phase
    assert orders.declare_plain() is declared
    assert orders.peer.phase is (Phase.PLAIN if declared else phase)
    assert not orders.declare_plain()


async def test_a_topic_that_the_settings_no_longer_know_is_left_out_and_logged() -> None:
    orders = orders_for(None, router=make_router(Config(namespaces={"chat": TopicRules()})))
    for name in ("chat:a", "b"):
        orders.add_subscription(name, ServerSub())
    orders.router.settings.replace(Config(namespaces={"olds": TopicRules()}))
    with capture_logs() as logs:
        assert orders.declare_plain()
    assert list(orders.peer.subscriptions) == ["b"]
    assert [(each["event"], each["topic"]) for each in logs] == [("not_subscribed", "chat:a")]


@pytest.mark.parametrize(
    "headers, declared",
    [({}, True), ({"Sec-WebSocket-Protocol": "centrifuge-protobuf"}, False)],
)
async def test_a_websocket_with_a_subprotocol_is_never_plain(
    autojump_clock: MockClock, headers: dict[str, str], declared: bool
) -> None:
    async with open_test_broker(Broker()) as net:
        peer = await net.open_websocket(headers=headers)
        assert net.broker.push(peer.fd, "waits") is PushResult.QUEUED
        assert net.broker.declare_plain(peer.fd) is declared
        with trio.move_on_after(1) as silence:
            assert await peer.receive_frame() == (frames.TEXT, b"waits")
        assert silence.cancelled_caught is not declared


async def test_a_peer_over_http_is_never_plain(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker()) as net:
        peer = await net.connect()
        body = b'{"id":1,"connect":{}}'
        head = b"POST /connection/http_stream HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d"
        await peer.send(head % len(body) + b"\r\n\r\n")
        assert not net.broker.declare_plain(1)
        await peer.send(body)
        assert (await peer.receive_head()).startswith("HTTP/1.1 200 ")
        assert not net.broker.declare_plain(1)
        info = net.broker.connection_info(1)
        assert info is not None
        assert info.protocol == "centrifuge-json"


# users


async def test_another_user_loses_what_is_not_his_and_is_told_so() -> None:
    router = make_router(Config(personal_topic=True))
    watcher = attach(router)
    router.subscribe(Subscription(watcher, "a", Grant("a", Decider.RULES), join_leave=True))
    orders = orders_for(router=router, user="ann")
    for name in ("a", "#ann", "room#ann,bob"):
        orders.add_subscription(name, ServerSub())
    before = len(frames_for(orders))
    orders.bind("bob")
    assert list(orders.peer.subscriptions) == ["a", "room#ann,bob", "#bob"]
    told = [msgspec.json.decode(frame[2:])["push"] for frame in frames_for(orders)[before:]]
    ended = {"code": UnsubscribeCode.SERVER, "reason": "other user"}
    assert told[:3] == [
        {"channel": "#ann", "unsubscribe": ended},
        {"channel": "user:ann", "unsubscribe": ended},
        {"channel": "user:bob", "subscribe": {}},
    ]
    assert (told[3]["channel"], "subscribe" in told[3]) == ("#bob", True)
    # On a topic that it keeps, those who watch see one go and another come.
    assert runs(watcher) == [["join"], ["leave"], ["join"]]
    assert router.hub.sessions.fds_of("bob") == (orders.peer.fd,)


def test_a_peer_that_has_not_spoken_becomes_another_users_without_a_word() -> None:
    orders = orders_for(None)
    orders.bind("ann")
    assert orders.peer.user == "ann"
    assert frames_for(orders) == []
    assert orders.router.hub.sessions.fds_of("ann") == (orders.peer.fd,)


def test_without_direct_topics_nobody_is_told_of_one() -> None:
    orders = orders_for(router=make_router(Config(direct_topics=False)), user="ann")
    orders.bind("bob")
    assert frames_for(orders) == []


def test_a_subscription_of_another_peer_is_left_alone() -> None:
    router = make_router()
    other, orders = listen(router, "a"), orders_for(router=router)
    assert not orders.end_subscription("a", UnsubscribeCode.SERVER, "")
    assert list(other.subscriptions) == ["a"]
