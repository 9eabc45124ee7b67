"""Spans of publications, collected by the SDK's own exporter in memory."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import trio
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from trio.testing import MockClock, lockstep_stream_pair, wait_all_tasks_blocked

from broker import Broker, Config, ConfigError, TopicRules
from broker.events.spans import OPEN_MOST, PER_SECOND, is_sampled, open_spans
from broker.testing import Network, Peer, open_test_broker
from tests.conftest import PATIENCE
from tests.http.conftest import KEY, ask, call

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, UNSAMPLED = f"00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-00"


@pytest.fixture(scope="module")
def exporter() -> InMemorySpanExporter:
    # A program sets its provider once.
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return exporter


@pytest.fixture
def spans(exporter: InMemorySpanExporter) -> Iterator[InMemorySpanExporter]:
    exporter.clear()
    yield exporter
    exporter.clear()


def names(spans: InMemorySpanExporter) -> list[str]:
    return [span.name for span in spans.get_finished_spans()]


@asynccontextmanager
async def served(**fields: Any) -> AsyncIterator[Network]:
    async with open_test_broker(Broker(Config(**{"spans": "program", **fields}))) as net:
        yield net


async def reader(net: Network, topic: str = "news", **more: Any) -> Peer:
    peer = await net.open_client(**more)
    await peer.request(subscribe={"channel": topic})
    return peer


async def pushed(peer: Peer) -> Any:
    return (await peer.receive_json())["push"]["pub"]


def of(span: ReadableSpan) -> tuple[str, str]:
    assert span.context is not None
    assert span.parent is not None
    return f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}"


async def test_a_publication_with_a_trace_has_a_span_for_each_half_of_its_way(
    autojump_clock: MockClock, spans: InMemorySpanExporter
) -> None:
    async with served() as net, await reader(net) as peer:
        await net.broker.publish("news", {"n": 1}, tags={"traceparent": SAMPLED, "k": "v"})
        push = await pushed(peer)
        assert push["tags"] == {"traceparent": SAMPLED, "k": "v"}
        await wait_all_tasks_blocked()
        found = {span.name: span for span in spans.get_finished_spans()}
        assert found.keys() == {"publish news", "deliver news"}
        assert {of(span) for span in found.values()} == {(TRACE, PARENT)}
        attributes = found["publish news"].attributes
        assert attributes is not None
        assert attributes["messaging.destination.name"] == "news"
        assert attributes["messaging.message.body.size"] == 7
        assert str(attributes["messaging.message.id"]).endswith(":1")


@pytest.mark.parametrize(
    "tags",
    [None, {}, {"k": "v"}, {"traceparent": UNSAMPLED}, {"traceparent": "00-0-0-01"}]
    + [{"traceparent": text} for text in ("", "x", f"00-{'0' * 32}-{PARENT}-01", SAMPLED + "\n")]
    + [{"traceparent": text} for text in (SAMPLED.upper(), f"ff{SAMPLED[2:]}", SAMPLED + "-x")],
)
async def test_without_a_sampled_trace_there_is_none(
    autojump_clock: MockClock, spans: InMemorySpanExporter, tags: dict[str, str] | None
) -> None:
    async with served() as net, await reader(net) as peer:
        await net.broker.publish("news", 1, tags=tags)
        await pushed(peer)
    assert names(spans) == []


async def test_off_nothing_of_it_happens(
    autojump_clock: MockClock, spans: InMemorySpanExporter
) -> None:
    async with served(spans="off", api_key=KEY) as net, await reader(net) as peer:
        await net.broker.publish("news", 1, tags={"traceparent": SAMPLED})
        body = json.dumps({"channel": "news", "data": 2}).encode()
        await ask(net, "publish", body, traceparent=SAMPLED)
        await pushed(peer)
        assert "tags" not in (await pushed(peer))
    assert names(spans) == []


async def test_a_delivery_lasts_until_the_slowest_has_it(
    autojump_clock: MockClock, spans: InMemorySpanExporter
) -> None:
    async with served() as net, await reader(net) as fast:
        slow = await reader(net, make_pair=lockstep_stream_pair)
        await net.broker.publish("news", 1, tags={"traceparent": SAMPLED})
        await pushed(fast)
        await wait_all_tasks_blocked()
        assert names(spans) == ["publish news"]
        await pushed(slow)
        await wait_all_tasks_blocked()
        assert names(spans) == ["publish news", "deliver news"]
        await slow.aclose()


async def test_a_delivery_ends_with_the_last_connection_that_would_have_it(
    autojump_clock: MockClock, spans: InMemorySpanExporter
) -> None:
    async with served() as net:
        slow = await reader(net, make_pair=lockstep_stream_pair)
        await net.broker.publish("news", 1, tags={"traceparent": SAMPLED})
        await slow.aclose()
        await wait_all_tasks_blocked()
        assert names(spans) == ["publish news", "deliver news"]


async def test_the_trace_of_a_request_is_that_of_its_publications(
    autojump_clock: MockClock, spans: InMemorySpanExporter
) -> None:
    async with served(api_key=KEY) as net, await reader(net, "a") as peer:
        other = SAMPLED.replace(PARENT, "1" * 16)
        for method, tags in [("publish", {}), ("broadcast", {"traceparent": other})]:
            where = {"channel": "a"} if method == "publish" else {"channels": ["a"]}
            body = json.dumps({**where, "data": 1, "tags": tags}).encode()
            assert (await ask(net, method, body, traceparent=SAMPLED))[0] == 200
        assert (await pushed(peer))["tags"] == {"traceparent": SAMPLED}
        assert (await pushed(peer))["tags"] == {"traceparent": other}
        await call(net, "publish", channel="a", data=1)
        assert "tags" not in (await pushed(peer))
    parents = [of(span)[1] for span in spans.get_finished_spans()]
    assert sorted(parents) == ["1" * 16, "1" * 16, PARENT, PARENT]


async def test_there_are_so_many_a_second(
    autojump_clock: MockClock, spans: InMemorySpanExporter
) -> None:
    async with served() as net, await reader(net):
        for _ in range(PER_SECOND + 20):
            net.broker.publish_nowait("other", 1, tags={"traceparent": SAMPLED})
        assert names(spans).count("publish other") == PER_SECOND
        await trio.sleep(1)
        net.broker.publish_nowait("other", 1, tags={"traceparent": SAMPLED})
        assert names(spans).count("publish other") == PER_SECOND + 1


async def test_so_many_deliveries_are_open_at_once(
    autojump_clock: MockClock, spans: InMemorySpanExporter
) -> None:
    async with served(topics=TopicRules(history_size=0), stall_seconds=60) as net:
        slow = await reader(net, make_pair=lockstep_stream_pair)
        for _ in range(OPEN_MOST // PER_SECOND + 2):
            for _ in range(PER_SECOND):
                net.broker.publish_nowait("news", 1, tags={"traceparent": SAMPLED})
            await trio.sleep(1)
        await slow.aclose()
    assert names(spans).count("publish news") == OPEN_MOST + 2 * PER_SECOND
    # What is in the hands of the stream already is open no more.
    assert OPEN_MOST <= names(spans).count("deliver news") <= OPEN_MOST + PER_SECOND


@pytest.mark.parametrize("engine", ["memory", "sqlite"])
async def test_a_publication_that_is_kept_first_has_both(
    autojump_clock: MockClock, spans: InMemorySpanExporter, tmp_path: Path, engine: str
) -> None:
    url = engine if engine == "memory" else f"sqlite:{tmp_path}/b.db"
    async with served(engine=url) as net, await reader(net) as peer:
        delivery = await net.broker.publish("news", 1, tags={"traceparent": SAMPLED})
        await pushed(peer)
        await wait_all_tasks_blocked()
    assert sorted(names(spans)) == ["deliver news", "publish news"]
    assert delivery.position is not None


def test_only_a_sampled_trace_is_one() -> None:
    assert is_sampled(SAMPLED)
    assert not is_sampled(UNSAMPLED)
    assert not is_sampled("")


async def test_without_the_packages_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"spans is 'console'.*pip install '.\[tracing\]'"):
        async with open_spans(Config(spans="console")):
            pass


PROGRAM = """
import sys, trio
from broker import Broker, Config

async def main():
    broker = Broker(Config(port=0, spans=sys.argv[1]))
    async with trio.open_nursery() as nursery:
        await nursery.start(broker.serve)
        await broker.publish("news", 1, tags={"traceparent": "%s"})
        broker.stop()

trio.run(main)
"""


def test_the_last_spans_are_written_before_the_end() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM % SAMPLED, "console"],
        capture_output=True,
        text=True,
        timeout=3 * PATIENCE,
        check=True,
    )
    assert '"name": "publish news"' in done.stdout
    assert f'"trace_id": "0x{TRACE}"' in done.stdout
    assert '"service.name": "trio-broker"' in done.stdout
    assert "Traceback" not in done.stderr


class Collector(BaseHTTPRequestHandler):
    """Takes spans as a collector does, by OTLP over HTTP."""

    bodies: ClassVar[list[bytes]] = []

    def do_POST(self) -> None:
        self.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing is to be said."""


def test_spans_go_to_a_collector() -> None:
    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            subprocess.run(
                [sys.executable, "-c", PROGRAM % SAMPLED, "otlp"],
                env={
                    **os.environ,
                    "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
                    "OTEL_EXPORTER_OTLP_COMPRESSION": "none",
                    "OTEL_SERVICE_NAME": "chat",
                },
                timeout=3 * PATIENCE,
                check=True,
            )
        finally:
            server.shutdown()
            thread.join()
    sent = b"".join(Collector.bodies)
    assert b"publish news" in sent
    assert bytes.fromhex(TRACE) in sent
    assert b"chat" in sent


def test_off_nothing_of_opentelemetry_is_imported() -> None:
    program = "import sys, broker.app, broker.http.api; print([m for m in sys.modules if 'opentelemetry' in m])"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=3 * PATIENCE,
        check=True,
    )
    assert done.stdout == "[]\n"
