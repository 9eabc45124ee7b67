"""Events as the app's `on_event` gets them, and that nobody waits for it."""

from typing import Any

import msgspec
import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock

from broker import Broker, Config, Connection, Event, TopicRules, WebhookRules
from broker.core.messages import Frame
from broker.testing import Network, open_test_broker

pytestmark = pytest.mark.usefixtures("logging_restored")


def told(broker: Broker) -> list[dict[str, Any]]:
    """The events that `on_event` gets from here on, without what is the same in all or differs by run."""
    seen: list[dict[str, Any]] = []

    @broker.on_event
    async def keep(event: Event) -> None:
        shown = msgspec.to_builtins(event)
        for name in ("node", "epoch", "time", "address"):
            shown.pop(name, None)
        seen.append(shown)

    return seen


async def settle(net: Network) -> None:
    await trio.sleep(0.1)
    assert net.broker.stats().events["on_event"].waiting == 0


async def test_a_client_s_life_is_told_from_open_to_disconnected(
    autojump_clock: MockClock,
) -> None:
    broker = Broker()
    seen = told(broker)
    async with open_test_broker(broker) as net:
        peer = await net.open_websocket("/?a=1")
        broker.bind(peer.fd, "alice")
        await peer.request(connect={})
        await peer.request(subscribe={"channel": "news"})
        await peer.request(unsubscribe={"channel": "news"})
        await peer.request(subscribe={"channel": "a.*"})
        await peer.send_close(1000, "bye")
        await peer.receive_close()
        await settle(net)
    who = {"fd": 1, "user": "alice"}
    assert seen == [
        {"kind": "started", "seq": 1},
        {"kind": "opened", "seq": 2, "fd": 1, "user": "", "path": "/", "transport": "websocket"},
        {"kind": "bound", "seq": 3, **who},
        {"kind": "connected", "seq": 4, **who, "protocol": "centrifuge-json"},
        {"kind": "subscribed", "seq": 5, **who, "topic": "news"},
        {
            "kind": "unsubscribed",
            "seq": 6,
            **who,
            "topic": "news",
            "code": 0,
            "reason": "unsubscribed",
        },
        {"kind": "subscribed", "seq": 7, **who, "topic": "a.*"},
        {
            "kind": "unsubscribed",
            "seq": 8,
            **who,
            "topic": "a.*",
            "code": 1,
            "reason": "disconnected",
        },
        {
            "kind": "disconnected",
            "seq": 9,
            **who,
            "code": 1000,
            "reason": "bye",
            "initiator": "client",
            "undelivered": 0,
        },
        {"kind": "stopped", "seq": 10},
    ]


async def test_the_server_s_doings_are_told_with_their_reasons(autojump_clock: MockClock) -> None:
    broker = Broker(Config(topics=TopicRules(history_size=0)))
    seen = told(broker)
    async with open_test_broker(broker) as net:
        peer = await net.open_client()
        broker.add_subscription(peer.fd, "news")
        broker.end_subscription(peer.fd, "news", 2500, "come back")
        broker.disconnect(peer.fd, 3503, "out")
        await settle(net)
        assert [
            (each["kind"], each.get("code"), each.get("reason"), each.get("initiator"))
            for each in seen[3:]
        ] == [
            ("subscribed", None, None, None),
            ("unsubscribed", 2500, "come back", None),
        ]
        await peer.aclose()
        await settle(net)
        last = seen[-1]
        assert (last["kind"], last["code"], last["initiator"]) == ("disconnected", 3503, "server")
        await net.open_plain()
    assert (seen[-2]["code"], seen[-2]["initiator"]) == (1001, "shutdown")
    assert seen[-1]["kind"] == "stopped"


async def test_the_event_of_an_end_counts_undelivered_messages(autojump_clock: MockClock) -> None:
    broker = Broker(Config(outbox_messages=3))
    seen = told(broker)
    async with open_test_broker(broker) as net:
        peer = await net.open_plain(make_pair=trio.testing.lockstep_stream_pair)
        for _ in range(5):
            broker.push(peer.fd, "x")
            await trio.sleep(0.1)
        await trio.sleep(60)
        assert (seen[-1]["kind"], seen[-1]["fd"]) == ("disconnected", peer.fd)
        assert seen[-1]["undelivered"] > 0


async def test_a_binding_that_changes_nothing_is_not_told(autojump_clock: MockClock) -> None:
    broker = Broker()
    seen = told(broker)
    async with open_test_broker(broker) as net:
        peer = await net.open_plain()
        broker.bind(peer.fd, "")
        broker.bind(peer.fd, "bob")
        broker.bind(peer.fd, "bob")
        await settle(net)
        assert [each["kind"] for each in seen] == ["started", "opened", "bound"]


async def test_a_user_who_is_bound_when_the_connection_has_ended_is_not_told(
    autojump_clock: MockClock,
) -> None:
    broker = Broker()
    seen = told(broker)

    @broker.on_close
    async def late(connection: Connection, close: object) -> None:
        broker.bind(connection.fd, "ghost")

    async with open_test_broker(broker) as net:
        peer = await net.open_plain()
        await peer.aclose()
        await settle(net)
        assert [each["kind"] for each in seen] == ["started", "opened", "disconnected"]


async def test_this_program_s_own_subscriptions_are_nobody_s_events(
    autojump_clock: MockClock,
) -> None:
    broker = Broker()
    seen = told(broker)
    async with open_test_broker(broker) as net:
        async with broker.subscribe("news"):
            await settle(net)
        await settle(net)
        assert len(seen) == 1


async def test_a_slow_hook_holds_up_no_connection_and_loses_only_the_oldest(
    autojump_clock: MockClock,
) -> None:
    broker = Broker(Config(ping_seconds=1e9, webhooks=WebhookRules(max_events=3)))
    seen: list[Event] = []

    @broker.on_event
    async def slow(event: Event) -> None:
        await trio.sleep(10)
        seen.append(event)

    @broker.on_message
    async def answer(connection: Connection, frame: Frame) -> None:
        broker.push(connection.fd, frame.data)

    with capture_logs() as lines:
        async with open_test_broker(broker) as net:
            began = trio.current_time()
            peers = [await net.open_plain() for _ in range(6)]
            await peers[-1].send_text("hello")
            assert await peers[-1].receive_text() == "hello"
            assert trio.current_time() == began
            assert broker.stats().events["on_event"].dropped == 3
            await trio.sleep(15)
            peers += [await net.open_plain() for _ in range(6)]
            await trio.sleep(100)
            assert [line["event"] for line in lines].count("events_lost") == 1
            peers += [await net.open_plain() for _ in range(6)]
            assert [line["event"] for line in lines].count("events_lost") == 2
    assert [(each.kind, each.seq) for each in seen[:5]] == [
        *[("started", 1), ("lost", 4), ("lost", 10), ("opened", 11), ("opened", 12)],
    ]


async def test_a_hook_that_raises_is_logged_and_told_what_comes_next(
    autojump_clock: MockClock,
) -> None:
    broker = Broker()
    seen = []

    @broker.on_event
    async def broken(event: Event) -> None:
        seen.append(event.kind)
        raise ValueError("no")

    with capture_logs() as lines:
        async with open_test_broker(broker) as net:
            await net.open_plain()
    assert seen == ["started", "opened", "disconnected", "stopped"]
    assert [line["kind"] for line in lines if line["event"] == "hook_failed"] == seen


async def test_a_hook_may_use_the_broker_to_the_last(autojump_clock: MockClock) -> None:
    broker = Broker()
    published = []

    @broker.on_event
    async def publish(event: Event) -> None:
        delivery = await broker.publish("events", event.kind)
        published.append((event.kind, delivery.matched))

    async with open_test_broker(broker), broker.subscribe("events") as messages:
        await trio.sleep(1)
        broker.stop()
        while (await messages.receive()).value != "stopped":
            pass
    assert [kind for kind, _ in published] == ["started", "stopped"]
    assert published[-1] == ("stopped", 1)


async def test_a_hook_that_hangs_delays_a_stop_for_so_long_only(
    autojump_clock: MockClock,
) -> None:
    broker = Broker(Config(webhooks=WebhookRules(flush_seconds=2)))

    @broker.on_event
    async def hang(event: Event) -> None:
        await trio.sleep_forever()

    with capture_logs() as lines:
        async with open_test_broker(broker):
            began = trio.current_time()
    assert trio.current_time() - began == 2
    (untold,) = [line for line in lines if line["event"] == "events_untold"]
    assert (untold["reader"], untold["waiting"]) == ("on_event", 2)


async def test_a_broker_that_is_cancelled_tells_of_no_end(autojump_clock: MockClock) -> None:
    broker = Broker(Config(port=0))
    seen = told(broker)
    async with trio.open_nursery() as nursery:
        await nursery.start(broker.serve)
        await trio.sleep(1)
        nursery.cancel_scope.cancel()
    assert [each["kind"] for each in seen] == ["started"]


async def test_each_start_is_an_epoch_of_its_own(autojump_clock: MockClock) -> None:
    broker = Broker(Config(port=0, name="eu-1"))
    epochs = []

    @broker.on_event
    async def keep(event: Event) -> None:
        assert event.node == "eu-1"
        epochs.append((event.kind, event.epoch))

    for _ in range(2):
        async with open_test_broker(broker):
            pass
    (first, one), (last, two), (_, three), _ = epochs
    assert (first, last) == ("started", "stopped")
    assert one == two != three


async def test_a_node_is_named_by_host_and_port(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "machine")
    broker = Broker(Config(port=9000))
    nodes = []

    @broker.on_event
    async def keep(event: Event) -> None:
        nodes.append(event.node)

    async with open_test_broker(broker):
        pass
    assert nodes == ["machine:9000"] * 2


async def test_without_a_reader_there_are_no_events(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker()) as net:
        peer = await net.open_client()
        await peer.request(subscribe={"channel": "news"})
        assert net.broker.stats().events == {}
