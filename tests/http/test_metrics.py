"""`/metrics`: who may read it, and that it says what happened."""

import base64
import sys
from collections.abc import AsyncIterator

import pytest
import structlog
import trio
from prometheus_client.parser import text_string_to_metric_families
from trio.testing import (
    MockClock,
    lockstep_stream_pair,
    wait_all_tasks_blocked,
)

from broker import Broker, Config, Connection, Frame, TopicRules
from broker.http.metrics import METRICS, exposition
from broker.testing import Network, handshake, name_users_by_token, open_test_broker
from tests.conftest import served, subscribe
from tests.deflated import OFFER, TEXT, DeflatingPeer, message
from tests.http.test_asgi import ask

KEY = "m3trics"
API_KEY = "s3cret"


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@pytest.fixture
async def net(autojump_clock: MockClock) -> AsyncIterator[Network]:
    async with served(namespaces={"chat": TopicRules()}) as network:
        yield network


async def read(net: Network) -> dict[str, float]:
    """All samples, by name and labels as they stand in the text."""
    text = (await exposition(net.node)).decode()
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            key = f"{sample.name}{{{labels}}}" if labels else sample.name
            assert key not in found, "a series twice"
            found[key] = sample.value
    return found


# who may read it


@pytest.mark.parametrize(
    "fields",
    [
        {"Authorization": f"Bearer {KEY}"},
        {"Authorization": f"bearer  {KEY}"},
        {"Authorization": basic("prometheus", KEY)},
        {"Authorization": basic("", KEY)},
        {"Authorization": f"Bearer {API_KEY}"},
        {"Authorization": f"apikey {API_KEY}"},
        {"X-API-Key": API_KEY},
        {"X-API-Key": KEY},
    ],
)
async def test_who_shows_a_key_reads_the_metrics(fields: dict[str, str]) -> None:
    broker = Broker(Config(metrics_key=KEY, api_key=API_KEY))
    status, headers, body = await ask(broker, "/metrics", **fields)
    assert status == 200
    assert headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert headers["cache-control"] == "no-store"
    assert b"\nbroker_users 0.0\n" in body


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({}, "no key"),
        ({"Authorization": "Bearer"}, "no key"),
        ({"Authorization": "Bearer wrong"}, "wrong key"),
        ({"Authorization": f"Bearer {KEY}x"}, "wrong key"),
        ({"Authorization": basic(KEY, "")}, "no key"),
        ({"Authorization": "Basic !"}, "no key"),
        ({"Authorization": "Basic " + base64.b64encode(b"\xff\xff:x").decode()}, "no key"),
        ({"Authorization": f"Digest {KEY}"}, "no key"),
        ({"X-API-Key": "no"}, "wrong key"),
    ],
)
async def test_nobody_else_does_and_the_log_says_so(fields: dict[str, str], reason: str) -> None:
    with structlog.testing.capture_logs() as lines:
        status, headers, body = await ask(Broker(Config(metrics_key=KEY)), "/metrics", **fields)
    assert status == 401
    assert headers["www-authenticate"] == 'Bearer realm="metrics", Basic realm="metrics"'
    assert b"broker_" not in body
    [line] = [line for line in lines if line["event"] == "metrics_key_refused"]
    assert (line["reason"], line["log_level"]) == (reason, "warning")
    assert KEY not in str(line)


@pytest.mark.parametrize("fields", [{}, {"Authorization": f"Bearer {KEY}"}])
async def test_without_a_key_in_the_settings_there_are_none(fields: dict[str, str]) -> None:
    status, _, body = await ask(Broker(), "/metrics", **fields)
    assert status == 404
    assert b"set metrics_key, or BROKER_METRICS_KEY" in body


async def test_without_the_library_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    broker = Broker(Config(metrics_key=KEY))
    status, _, body = await ask(broker, "/metrics", Authorization=f"Bearer {KEY}")
    assert status == 501
    assert b"pip install '.[metrics]'" in body


async def test_it_is_only_read() -> None:
    assert (await ask(Broker(Config(metrics_key=KEY)), "/metrics", "POST"))[0] == 405


# what it says


def test_names_keep_to_the_conventions() -> None:
    """https://prometheus.io/docs/practices/naming/"""
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert metric.name.startswith(("broker_", "process_")), metric.name
        assert not metric.name.endswith("_total"), "the text adds it"
        assert metric.help.endswith("."), metric.name
        unit = metric.name.rpartition("_")[2]
        assert unit not in ("ms", "milliseconds", "kb", "kib", "mb", "mib"), metric.name
        if metric.kind == "histogram":
            assert unit == "seconds"


async def test_every_metric_is_in_the_text(autojump_clock: MockClock, net: Network) -> None:
    text = (await exposition(net.node)).decode()
    for metric in METRICS:
        suffix = "_total" if metric.kind == "counter" else ""
        assert f"\n# TYPE {metric.name}{suffix} " in f"\n{text}"


async def test_connections_by_transport_and_protocol(
    autojump_clock: MockClock, net: Network
) -> None:
    for token in ("ann", "bob", "bob"):
        await net.open_client(token=token)
    await net.open_plain()
    found = await read(net)
    assert found["broker_connections{protocol=centrifuge-json,transport=websocket}"] == 3
    assert found["broker_connections{protocol=plain,transport=websocket}"] == 1
    assert found["broker_connections_opened_total{transport=websocket}"] == 4
    assert found["broker_users"] == 2
    assert found["broker_streams"] == 4


async def test_ends_by_code_and_initiator(autojump_clock: MockClock, net: Network) -> None:
    peers = [await net.open_plain() for _ in range(4)]
    await peers[0].send_close(1000)
    net.broker.disconnect(peers[1].fd, 3503)
    net.broker.disconnect(peers[2].fd, 4123)
    await peers[3].aclose()
    await trio.sleep(60)
    found = await read(net)
    for key in ("1000,initiator=client", "3503,initiator=server", "4000-4499,initiator=server"):
        assert found[f"broker_connections_closed_total{{code={key}}}"] == 1
    assert found["broker_connections_closed_total{code=1006,initiator=network}"] == 1
    assert found["broker_connections_closed_total{code=3008,initiator=slow}"] == 0
    assert "broker_connections{protocol=plain,transport=websocket}" not in found


@pytest.mark.parametrize(
    "sent, reason",
    [
        (b"\x16\x03\x01\x00\r\n\r\n", "bad_request"),
        (handshake(headers={"Origin": "http://evil.example"}), "page"),
        (handshake(headers={"Sec-WebSocket-Version": "8"}), "version"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"x: y\r\n" * 2000, "head_too_large"),
        (b"GET /connection/http_stream HTTP/1.1\r\nHost: localhost\r\n\r\n", "method"),
        (b"", "timeout"),
    ],
)
async def test_refusals_by_reason(
    autojump_clock: MockClock, net: Network, sent: bytes, reason: str
) -> None:
    peer = await net.connect()
    if sent:
        await peer.send(sent)
    await peer.receive_head()
    found = await read(net)
    refused = {key: n for key, n in found.items() if key.startswith("broker_connections_refused")}
    assert {key: n for key, n in refused.items() if n} == {
        f"broker_connections_refused_total{{reason={reason}}}": 1
    }


async def test_a_broker_that_is_full_or_stops_says_so(autojump_clock: MockClock) -> None:
    async with open_test_broker(Broker(Config(max_connections=1))) as net:
        first = await net.open_plain()
        await (second := await net.connect()).send(handshake())
        await second.receive_head()
        node = net.node
        found = await read(net)
        assert found["broker_connections_refused_total{reason=no_place}"] == 1
        assert found["broker_connections_max"] == 1
        assert found["broker_draining"] == 0
        late = await net.connect()
        await late.send(handshake()[:-2])
        await trio.testing.wait_all_tasks_blocked()
        net.broker.stop()
        await trio.testing.wait_all_tasks_blocked()
        await late.send(b"\r\n")
        assert " 503 " in await late.receive_head()
        await first.receive_close()
    assert node.figures.statistics().ends.refused["shutting_down"] == 1


async def test_messages_bytes_and_publications_by_namespace(
    autojump_clock: MockClock, net: Network
) -> None:
    ann, bob = await net.open_client(token="ann"), await net.open_client(token="bob")
    await subscribe(bob, "chat:room")
    before = await read(net)
    for topic in ("chat:room", "chat:room", "news", f"fd:{bob.fd}"):
        await ann.request(publish={"channel": topic, "data": "x" * 1000})
    after = await read(net)
    more = {key: after[key] - before.get(key, 0) for key in after}
    assert more["broker_incoming_messages_total"] == 4
    assert 4000 < more["broker_incoming_bytes_total"] < 4600
    # Three publications that somebody gets, and four replies.
    assert more["broker_deliveries_total"] == 3
    assert more["broker_outgoing_bytes_total"] > 3000
    assert more["broker_publications_total{namespace=chat}"] == 2
    assert more["broker_publications_total{namespace=fd}"] == 1
    assert more["broker_publications_total{namespace=}"] == 1
    assert after["broker_history_publications"] == 3
    assert after["broker_history_topics"] == 2
    assert after["broker_subscriptions"] == 1


async def test_what_compression_comes_to(autojump_clock: MockClock) -> None:
    broker = Broker(Config(compression=True, metrics_key=KEY))
    async with open_test_broker(broker) as net:
        peer = DeflatingPeer(await net.open_plain(headers=OFFER))
        net.broker.push(peer.fd, TEXT)
        assert await peer.receive_message() == (True, TEXT)
        await peer.send(message(TEXT))
        await wait_all_tasks_blocked()
        found = await read(net)
    for direction in ("sent", "received"):
        assert found[f"broker_compressed_messages_total{{direction={direction}}}"] == 1
        size = "broker_compressed_bytes_total{{compressed={},direction={}}}".format
        assert found[size("no", direction)] == len(TEXT)
        assert 0 < found[size("yes", direction)] < len(TEXT) / 5


async def test_error_replies_by_code(autojump_clock: MockClock, net: Network) -> None:
    peer = await net.open_client(token="ann")
    await peer.request(publish={"channel": "unknown:x", "data": 1})
    await peer.request(history={"channel": "chat:x", "limit": 1, "since": {"epoch": "no"}})
    found = await read(net)
    assert found["broker_errors_total{code=102}"] == 1
    assert sum(n for key, n in found.items() if key.startswith("broker_errors")) == 2


async def test_a_slow_client_is_in_the_queues_then_among_the_cut(
    autojump_clock: MockClock,
) -> None:
    async with served(outbox_messages=4, stall_seconds=10) as net:
        slow = await net.open_client(make_pair=lockstep_stream_pair, token="slow")
        await subscribe(slow, "t")
        quick = await net.open_client(token="quick")
        for _ in range(3):
            net.broker.publish_nowait("t", "x" * 100)
        await quick.receive_all()
        found = await read(net)
        assert found["broker_queue_messages_bucket{le=1.0}"] == 1
        assert found["broker_queue_messages_bucket{le=4.0}"] == 2
        assert found["broker_queue_messages_gsum"] == 3
        assert found["broker_queue_bytes_bucket{le=0.0}"] == 1
        assert found["broker_queue_bytes_gcount"] == 2
        assert found["broker_memory_bytes{part=outboxes}"] > 300
        await trio.sleep(30)
        cut = (await read(net))["broker_connections_closed_total{code=1006,initiator=slow}"]
        assert cut == 1


async def test_drops_gaps_and_recoveries(autojump_clock: MockClock) -> None:
    rules = TopicRules(slow_consumer="drop_oldest", history_size=5)
    async with served(outbox_messages=4, topics=rules) as net:
        slow = await net.open_client(make_pair=lockstep_stream_pair, token="slow")
        await subscribe(slow, "t", recoverable=True)
        for number in range(20):
            net.broker.publish_nowait("t", number)
            await trio.testing.wait_all_tasks_blocked()
        found = await read(net)
        assert found["broker_messages_dropped_total"] > 0
        assert found["broker_gaps_total"] == 1
        other = await net.open_client(token="other")
        here = await subscribe(other, "t", recoverable=True)
        await other.request(unsubscribe={"channel": "t"})
        for offset in (here["offset"], 1):
            since = {"recover": True, "offset": offset, "epoch": here["epoch"]}
            await subscribe(other, "t", recoverable=True, **since)
            await other.request(unsubscribe={"channel": "t"})
        found = await read(net)
        assert found["broker_recoveries_total{outcome=recovered}"] == 1
        assert found["broker_recoveries_total{outcome=gap}"] == 1


async def test_what_the_ended_have_sent_is_still_counted(
    autojump_clock: MockClock, net: Network
) -> None:
    seen = []
    for _ in range(3):
        peer = await net.open_client(token="ann")
        await peer.send_json({"id": 2, "rpc": {"method": "x"}})
        await peer.receive_all()
        seen.append(await read(net))
        await peer.aclose()
        await trio.sleep(1)
        seen.append(await read(net))
    for name in ("broker_incoming_messages_total", "broker_incoming_bytes_total"):
        values = [found[name] for found in seen]
        assert values == sorted(values)
    assert seen[-1]["broker_incoming_messages_total"] == 6


async def test_hooks_by_kind_with_their_failures(autojump_clock: MockClock) -> None:
    broker = name_users_by_token(Broker())

    @broker.on_message
    async def fail(connection: Connection, frame: Frame) -> None:
        raise RuntimeError("on purpose")

    async with open_test_broker(broker) as net:
        await net.open_client(token="ann")
        peer = await net.open_plain()
        await peer.send_text("x")
        assert await peer.receive_close() == (1011, "internal error")
        found = await read(net)
    assert found["broker_hook_seconds_count{asked=app,hook=connect}"] == 1
    assert found["broker_hook_failures_total{asked=app,hook=connect}"] == 0
    assert found["broker_hook_failures_total{asked=app,hook=message}"] == 1
    assert found["broker_hook_seconds_count{asked=app,hook=message}"] == 1


async def test_the_lag_of_the_loop_is_looked_at_each_second(
    autojump_clock: MockClock, net: Network
) -> None:
    before = (await read(net))["broker_loop_lag_seconds_count"]
    await trio.sleep(5)
    autojump_clock.jump(1.7)  # as if somebody had computed all that time
    await trio.sleep(2)
    found = await read(net)
    total = found["broker_loop_lag_seconds_count"]
    assert total - before >= 6
    assert total - found["broker_loop_lag_seconds_bucket{le=0.5}"] == 1
    assert 0.7 <= found["broker_loop_lag_seconds_sum"] < 1.8


async def test_what_was_published_in_this_very_step_is_counted_by_namespace(
    autojump_clock: MockClock, net: Network
) -> None:
    """Else a count would move from one namespace to another, and one counter go down."""
    router = net.node.services.router
    for topic in ("chat:x", "news", "chat:x"):
        router.publish_all(topic, (b"1", b"2"))
    net.broker.publish_nowait("chat:x", 3)
    assert net.broker.stats().namespaces == {"": 2, "fd": 0, "user": 0, "chat": 5}
    router.publish_all("chat:x", (b"4",))
    assert net.broker.stats().namespaces == {"": 2, "fd": 0, "user": 0, "chat": 6}
