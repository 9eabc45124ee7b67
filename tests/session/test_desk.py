"""The dashboard's door, as operators and as strangers come to it."""

from typing import Any

import attrs
import pytest
import structlog
import trio
import trio.testing

from broker import Broker, Config, Connection
from broker.access.operators import GUESSES, Asker, Method, Role
from broker.config.settings import TokenRules
from broker.core.messages import Close, Frame, PushResult
from broker.errors import Disconnect, Refused
from broker.hooks import ConnectEvent, Handshake, HandshakeReply
from broker.session.desk import BEHIND_BYTES
from broker.testing import Closed, Network, open_test_broker
from tests.conftest import ADMIN_KEY, HMAC_SECRET, VIEW_KEY, code_of, done, log_in, rpc, told

DENIED = 103


@pytest.fixture
def config() -> Config:
    return Config(admin_key=ADMIN_KEY, admin_view_key=VIEW_KEY)


async def test_a_key_lets_in_and_tells_the_role(net: Network, autojump_clock: object) -> None:
    for key, role in ((ADMIN_KEY, "full"), (VIEW_KEY, "view")):
        peer = await net.open_websocket("/admin/websocket/")
        reply = await peer.request(connect={"data": {"key": key}})
        assert reply["connect"]["data"] == {"fd": peer.fd, "role": role}
        assert (await done(peer, "admin.overview"))["node"] == net.node.name


LOGINS: list[Any] = [
    {},
    {"data": None},
    {"data": {}},
    {"data": {"key": "wrong"}},
    {"data": {"key": ""}},
    {"data": {"key": None}},
    {"data": {"key": [ADMIN_KEY]}},
    {"data": ADMIN_KEY},
    {"data": {"key": ADMIN_KEY, "more": "x" * 2000}},
    {"token": ADMIN_KEY},
    {"data": {"token": ADMIN_KEY}},
]


@pytest.mark.parametrize("connect", LOGINS)
async def test_without_the_key_nobody_is_let_in(
    connect: Any, net: Network, autojump_clock: object
) -> None:
    peer = await net.open_websocket("/admin/websocket")
    with structlog.testing.capture_logs() as lines:
        with pytest.raises(Closed) as closed:
            await peer.request(connect=connect)
    assert closed.value.code == 3500
    (line,) = [line for line in lines if line["event"] == "admin_key_refused"]
    assert line["log_level"] == "warning"
    assert "wrong" not in str({**line, "reason": ""})
    assert not net.node.services.desks


async def test_guesses_are_slowed_down_by_where_they_come_from(
    net: Network, autojump_clock: object
) -> None:
    async def reason(key: str) -> str:
        peer = await net.open_websocket("/admin/websocket")
        with pytest.raises(Closed) as closed:
            await peer.request(connect={"data": {"key": key}})
        return closed.value.reason

    for _ in range(GUESSES):
        assert await reason("guess") == "wrong key"
    assert (await reason("guess")).startswith("too many wrong keys")
    assert (await reason(ADMIN_KEY)).startswith("too many wrong keys")
    await trio.sleep(60)
    await log_in(net)


async def test_who_guesses_through_a_proxy_locks_out_nobody_on_this_machine(
    net: Network, autojump_clock: object
) -> None:
    async def reason(**headers: str) -> str:
        peer = await net.open_websocket("/admin/websocket", headers)
        with pytest.raises(Closed) as closed:
            await peer.request(connect={"data": {"key": "guess"}})
        return closed.value.reason

    with structlog.testing.capture_logs() as lines:
        for number in range(GUESSES):
            assert await reason(**{"X-Forwarded-For": f"192.0.2.{number}"}) == "wrong key"
        # Nobody is believed what he says of himself, or he could guess for ever.
        assert (await reason(**{"X-Forwarded-For": "203.0.113.9"})).startswith("too many")
        assert (await reason(Host="chat.example")).startswith("too many")
    refused = [line for line in lines if line["event"] == "admin_key_refused"]
    assert all("trusted_proxies" in line["hint"] for line in refused)
    here = await net.open_websocket("/admin/websocket", {"Host": "localhost:9501"})
    assert "connect" in await here.request(connect={"data": {"key": ADMIN_KEY}})


COMMANDS: list[dict[str, Any]] = [
    {"subscribe": {"channel": "news"}},
    {"subscribe": {"channel": "$admin"}},
    {"unsubscribe": {"channel": "$admin"}},
    {"publish": {"channel": "news", "data": 1}},
    {"publish": {"channel": "fd:1", "data": 1}},
    {"presence": {"channel": "news"}},
    {"presence_stats": {"channel": "news"}},
    {"history": {"channel": "news"}},
    {"refresh": {"token": "x"}},
    {"sub_refresh": {"channel": "news", "token": "x"}},
    {"send": {"data": 1}},
]


@pytest.mark.parametrize("key", [ADMIN_KEY, VIEW_KEY])
@pytest.mark.parametrize("command", COMMANDS, ids=lambda each: next(iter(each)))
async def test_an_operator_has_no_command_but_rpc(
    command: dict[str, Any], key: str, net: Network, autojump_clock: object
) -> None:
    listener = await net.open_client()
    await listener.request(subscribe={"channel": "news"})
    peer = await log_in(net, key)
    assert await code_of(peer, **command) == DENIED
    assert net.node.figures.statistics().published == 0
    assert not (await net.broker.history("news"))[0]


@pytest.mark.parametrize("method", ["publish", "request", "reply", "will", "anything"])
async def test_an_operator_calls_neither_our_methods_for_clients_nor_the_apps(
    method: str, autojump_clock: object, config: Config
) -> None:
    broker = Broker(config)

    @broker.on_rpc
    async def answer(connection: Connection, method: str, data: object) -> object:
        raise AssertionError("the app is not asked")

    async with open_test_broker(broker) as net:
        peer = await log_in(net)
        reply = await rpc(peer, method, topic="news", data=1)
        assert reply["error"]["code"] == 104


@pytest.mark.parametrize("path", ["/", "/connection/websocket"])
async def test_at_every_other_door_the_key_is_nothing(
    path: str, net: Network, autojump_clock: object
) -> None:
    peer = await net.open_websocket(path)
    reply = await peer.request(connect={"data": {"key": ADMIN_KEY}, "token": ADMIN_KEY})
    assert "$admin" not in reply["connect"]["subs"]
    for method in net.node.services.admin:
        assert (await rpc(peer, method, fd=1))["error"]["code"] == 104
    assert not net.node.services.desks


async def test_what_is_published_to_a_topic_called_admin_reaches_no_operator(
    net: Network, autojump_clock: object
) -> None:
    peer = await log_in(net)
    await net.broker.publish("$admin", {"tick": "made up"})
    client = await net.open_client()
    assert await code_of(client, subscribe={"channel": "$admin"}) == DENIED
    assert await code_of(client, publish={"channel": "$admin", "data": 1}) == DENIED
    for _ in range(3):
        assert isinstance((await told(peer))["tick"], list)


@pytest.mark.parametrize(
    ("method", "about", "code"),
    [
        ("publish", {"topic": "TO", "data": "made up"}, 102),
        ("publish", {"topic": "TO", "data": "made up", "report": True, "key": "k"}, 102),
        ("request", {"to": "TO", "data": "made up"}, 503),
    ],
)
async def test_nobody_writes_to_an_operator(
    net: Network, autojump_clock: object, method: str, about: dict[str, Any], code: int
) -> None:
    """Who could would fill his line, and he would see nothing more."""
    chief, client = await log_in(net), await net.open_client()
    call = {name: f"fd:{chief.fd}" if value == "TO" else value for name, value in about.items()}
    assert (await rpc(client, method, **call))["error"]["code"] == code
    assert await code_of(client, publish={"channel": f"fd:{chief.fd}", "data": "made up"}) == 102
    with pytest.raises(Refused, match="102"):
        await net.broker.publish(f"fd:{chief.fd}", "made up")
    net.broker.bind(chief.fd, "chief")
    assert await code_of(client, publish={"channel": "user:chief", "data": "made up"}) == 102
    assert net.broker.fds_of("chief") == []
    assert not net.broker.add_subscription(chief.fd, "news")
    await net.broker.publish("news", "made up")
    assert net.broker.push(chief.fd, "made up") is PushResult.CLOSED
    assert await net.broker.send(chief.fd, "made up") is PushResult.CLOSED
    will = {"topic": f"fd:{chief.fd}", "data": "made up"}
    assert "error" not in await rpc(client, "will", **will)
    await client.aclose()
    await trio.sleep(1)
    seen = str(await chief.receive_all())
    assert "tick" in seen
    assert "made up" not in seen


@pytest.mark.parametrize("path", ["/admin", "/admin/websocket"])
async def test_without_a_key_in_the_settings_there_is_no_door(
    path: str, autojump_clock: object
) -> None:
    async with open_test_broker(Broker(Config())) as net:
        with pytest.raises(AssertionError, match=r"40[46]|426"):
            await net.open_websocket(path)
        assert not net.broker.connections()


async def test_the_app_hears_nothing_of_operators(autojump_clock: object, config: Config) -> None:
    broker, heard = Broker(config), list[str]()

    @broker.on_handshake
    async def on_handshake(handshake: Handshake) -> HandshakeReply | None:
        heard.append("handshake")
        raise Refused(401)

    @broker.on_buffer_full
    async def on_buffer_full(connection: Connection) -> None:
        heard.append("buffer full")

    @broker.on_open
    async def on_open(connection: Connection) -> None:
        heard.append("open")
        raise Disconnect(3503, "without a cookie")

    @broker.on_connect
    async def on_connect(event: ConnectEvent) -> None:
        heard.append("connect")

    @broker.on_message
    async def on_message(connection: Connection, frame: Frame) -> None:
        heard.append("message")

    @broker.on_close
    async def on_close(connection: Connection, close: Close) -> None:
        heard.append("close")

    async with open_test_broker(broker) as net:
        peer = await log_in(net)
        await done(peer, "admin.overview")
        await peer.send_close()
        await peer.receive_close()
        # What is no command at all is not the app's either.
        rude = await net.open_websocket("/admin/websocket")
        await rude.send_text("hello")
        assert (await rude.receive_close())[0] == 3501
        await trio.sleep(1)
    assert heard == []


async def test_an_operator_needs_no_token(autojump_clock: object, config: Config) -> None:
    rules = TokenRules(hmac_secret=HMAC_SECRET)
    async with open_test_broker(Broker(attrs.evolve(config, tokens=rules))) as net:
        peer = await log_in(net)
        await trio.sleep(15)  # nor is he sent away as one who never showed any
        assert await done(peer, "admin.budgets")


async def test_who_does_not_log_in_is_sent_away(net: Network, autojump_clock: object) -> None:
    peer = await net.open_websocket("/admin/websocket")
    assert await peer.receive_close() == (3502, "stale")


WRITES: dict[str, dict[str, Any]] = {
    "admin.kick": {"fd": 1},
    "admin.unsubscribe": {"fd": 1, "topic": "news"},
    "admin.push": {"fd": 1, "data": {"a": 1}},
    "admin.publish": {"topic": "news", "data": {"a": 1}},
}


async def test_every_method_that_takes_the_full_role_is_tried_here(
    net: Network, autojump_clock: object
) -> None:
    methods = net.node.services.admin
    assert {name for name, each in methods.items() if each.role is Role.FULL} == set(WRITES)


@pytest.mark.parametrize("method", WRITES)
async def test_who_may_only_look_changes_nothing(
    method: str, net: Network, autojump_clock: object
) -> None:
    client = await net.open_client()
    assert client.fd == 1
    await client.request(subscribe={"channel": "news"})
    peer = await log_in(net, VIEW_KEY)
    assert (await rpc(peer, method, **WRITES[method]))["error"]["code"] == DENIED
    assert net.broker.is_established(1)
    assert net.broker.topics() == {"news": 1}
    assert await client.receive_all() == []


async def test_who_may_only_look_begins_nothing_that_takes_more(
    net: Network, autojump_clock: object
) -> None:
    began = []

    async def look(params: Any, asker: Asker) -> object:
        began.append(params)
        return {}

    methods = dict(net.node.services.admin)
    params = methods["admin.overview"].params
    net.node.services.admin = {**methods, "admin.slow": Method(params, Role.FULL, look=look)}
    peer = await log_in(net, VIEW_KEY)
    assert (await rpc(peer, "admin.slow"))["error"]["code"] == DENIED
    assert began == []


@pytest.mark.parametrize(
    ("new", "ends"),
    [
        ({}, True),
        ({"admin_key": "another-key"}, True),
        ({"admin_view_key": ADMIN_KEY}, True),
        ({"admin_key": ADMIN_KEY, "ping_seconds": 5}, False),
    ],
)
async def test_a_key_that_is_replaced_ends_its_logins(
    new: dict[str, Any], ends: bool, net: Network, autojump_clock: object
) -> None:
    peer = await log_in(net)
    net.broker.reload(Config(**new))
    if ends:
        assert await peer.receive_close() == (3500, "the key has changed")
        await peer.aclose()
        await trio.sleep(1)
        assert not net.node.services.desks
    else:
        assert await done(peer, "admin.budgets")


async def test_a_right_is_asked_for_once_more_after_an_await(
    net: Network, autojump_clock: object
) -> None:
    """The key is taken away while a call is looking."""
    acted = []

    async def look(params: Any, asker: Asker) -> object:
        net.broker.reload(Config(admin_view_key=VIEW_KEY))
        await trio.lowlevel.checkpoint()
        asker.check(Role.FULL)
        acted.append(params)
        return {}

    methods = dict(net.node.services.admin)
    params = methods["admin.overview"].params
    net.node.services.admin = {**methods, "admin.slow": Method(params, Role.FULL, look=look)}
    peer = await log_in(net)
    await peer.send_json({"id": 1, "rpc": {"method": "admin.slow", "data": {}}})
    assert await peer.receive_close() == (3500, "the key has changed")
    assert acted == []


async def test_a_publish_that_waits_for_the_engine_asks_for_the_right_when_it_goes_on(
    net: Network, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = trio.Event()
    monkeypatch.setattr(type(net.node), "wait_room", lambda node: room.wait())
    peer = await log_in(net)
    data = {"topic": "news", "data": 1}
    await peer.send_json({"id": 1, "rpc": {"method": "admin.publish", "data": data}})
    await trio.testing.wait_all_tasks_blocked()
    net.broker.reload(Config(admin_view_key=VIEW_KEY))
    room.set()
    await peer.receive_close()
    assert (await net.broker.history("news"))[0] == []


async def test_a_dashboard_that_nobody_reads_holds_little_and_harms_nobody(
    net: Network, autojump_clock: object
) -> None:
    peer = await net.open_websocket("/admin/websocket", make_pair=trio.testing.lockstep_stream_pair)
    await peer.request(connect={"data": {"key": ADMIN_KEY}})
    fd = peer.fd
    desk = net.node.services.desks[fd]
    data = b'"%b"' % (b"x" * 1000)
    taken = sum(desk.tell(data) for _ in range(1000))
    assert taken <= BEHIND_BYTES / 1000 + 2
    assert net.outbox(fd).bytes <= BEHIND_BYTES + 2000
    await trio.sleep(30)
    assert not net.broker.exists(fd)
    assert not net.node.services.desks


async def test_an_operators_line_is_not_traced(net: Network, autojump_clock: object) -> None:
    spy = await log_in(net, VIEW_KEY)
    chief = await net.open_websocket("/admin/websocket")
    for target in ({"fd": chief.fd}, {"fd": spy.fd}):
        assert (await rpc(spy, "admin.trace", **target))["error"]["code"] == DENIED
    net.broker.bind(chief.fd, "chief")
    await done(spy, "admin.trace", user="chief")
    await chief.request(connect={"data": {"key": ADMIN_KEY}})
    await done(chief, "admin.kick", fd=spy.fd)
    seen = str(await spy.receive_all())
    assert ADMIN_KEY not in seen


async def test_what_an_operator_does_is_logged_without_what_he_sends(
    net: Network, autojump_clock: object
) -> None:
    client = await net.open_client()
    peer = await log_in(net)
    with structlog.testing.capture_logs() as lines:
        await done(peer, "admin.push", fd=client.fd, data="for your eyes")
        await done(peer, "admin.publish", topic="news", data="for your eyes")
        await done(peer, "admin.kick", fd=client.fd, reason="bye")
    acts = [line for line in lines if line["event"] == "admin_act"]
    assert [line["act"] for line in acts] == ["push", "publish", "kick"]
    assert all(line["fd"] == peer.fd for line in acts)
    assert "eyes" not in str(acts)


async def test_an_rpc_before_the_login_is_out_of_place(
    net: Network, autojump_clock: object
) -> None:
    peer = await net.open_websocket("/admin/websocket")
    await peer.send_json({"id": 1, "rpc": {"method": "admin.overview", "data": {}}})
    assert (await peer.receive_close())[0] == 3501


async def test_a_page_of_a_stranger_is_refused_at_the_door(
    net: Network, autojump_clock: object
) -> None:
    with pytest.raises(AssertionError, match="403"):
        await net.open_websocket("/admin/websocket", {"Origin": "https://evil.example"})
