"""`/metrics`: what this broker counts, in the text format of Prometheus, read when it is asked for.

Rule 1  Nothing is counted for Prometheus. Each metric is one line of `METRICS`: its name, what it says,
        and where in a snapshot it stands. A snapshot is taken for each request, and dropped with it.
Rule 2  Labels are from bounded sets, so the number of series is bounded whatever peers do.
Rule 3  A request shows a key: how many connections there are, of whom and how slow, is nobody else's
        business. Nothing is looked at before the key.
Rule 4  What is linear in connections is done in turns, and the text is written a few metrics at a time.
"""

import base64
import binascii
import hmac
import time
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import attrs
import structlog
import trio
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from broker import logs
from broker.core.event_queue import EventStatistics
from broker.core.histogram import HistogramStatistics
from broker.http.api import peer_of, shown_key
from broker.logs import LogStatistics
from broker.node import Node
from broker.session.compression import Compression
from broker.session.figures import BrokerStatistics, Survey
from broker.transport.frames import BUILD
from broker.version import VERSION

if TYPE_CHECKING:
    from prometheus_client import Metric as Family

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("broker.http")

MEDIA_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

METRICS_AT_ONCE: Final = 8
"""Metrics that are written between two turns of the loop: 0.3 ms, with all the series that they have."""

_PAGE_SIZE: Final = 4096


@attrs.frozen
class Snapshot:
    """All that metrics are read from."""

    node: Node
    stats: BrokerStatistics
    survey: Survey
    log: LogStatistics


Value: TypeAlias = float | HistogramStatistics
Values: TypeAlias = (
    Value
    | Mapping[str, Value]
    | Mapping[tuple[str, str], Value]
    | Mapping[tuple[str, str, str], Value]
)
"""One value; or one by label, or by several."""

Kind: TypeAlias = Literal["gauge", "counter", "histogram", "gauge histogram"]


@attrs.frozen
class Metric:
    """One metric. `name` is without the suffix `_total` that a counter has in the text; `read` has as
    many values as the `labels` have combinations that were seen."""

    kind: Kind
    name: str
    help: str
    read: Callable[[Snapshot], Values]
    labels: tuple[str, ...] = ()


def _compressed_bytes(compression: Compression) -> Mapping[tuple[str, str], Value]:
    packing, inflated = compression.packing, compression.inflated
    return {
        ("sent", "no"): packing.bytes_before,
        ("sent", "yes"): packing.bytes_after,
        ("received", "no"): inflated.bytes_after,
        ("received", "yes"): inflated.bytes_before,
    }


def _gauge(name: str, text: str, read: Callable[[Snapshot], Values], *labels: str) -> Metric:
    return Metric("gauge", name, text, read, labels)


def _counter(name: str, text: str, read: Callable[[Snapshot], Values], *labels: str) -> Metric:
    return Metric("counter", name, text, read, labels)


def _histogram(name: str, text: str, read: Callable[[Snapshot], Values], *labels: str) -> Metric:
    return Metric("histogram", name, text, read, labels)


def _waiting(name: str, text: str, read: Callable[[Snapshot], Values]) -> Metric:
    return Metric("gauge histogram", name, text, read)


def _events(read: Callable[[EventStatistics], Value]) -> Callable[[Snapshot], Values]:
    """The same of each reader of events."""
    return lambda of: {name: read(each) for name, each in of.stats.events.items()}


def _resident_bytes(_: Snapshot) -> float:
    """Memory of this process that is in RAM; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * _PAGE_SIZE
    except (OSError, ValueError, IndexError):
        return 0


METRICS: Final[tuple[Metric, ...]] = (
    # the broker
    _gauge(
        "broker_info", "1, with the name, the version and the build of this broker as labels.",
        lambda of: {(of.node.name, VERSION, BUILD): 1}, "node", "version", "build",
    ),
    _gauge("broker_draining", "1 while the broker stops.", lambda of: of.node.draining),
    _gauge(
        "process_start_time_seconds", "When the broker began to serve, in Unix seconds.",
        lambda of: of.node.figures.started_at,
    ),
    _gauge(
        "process_resident_memory_bytes", "Memory of this process that is in RAM.", _resident_bytes
    ),
    _counter(
        "process_cpu_seconds", "Time of all processors that this process has used.",
        lambda _: time.process_time(),
    ),
    _histogram(
        "broker_loop_lag_seconds",
        "How late the event loop was, looked at once a second: so long may anybody have waited.",
        lambda of: of.stats.loop_lag,
    ),
    # connections
    _gauge(
        "broker_connections", "Connections that are here.",
        lambda of: of.survey.connections, "transport", "protocol",
    ),
    _gauge(
        "broker_connections_max", "Places for connections, by max_connections and open files.",
        lambda of: of.node.services.admission.capacity.connections,
    ),
    _gauge(
        "broker_streams", "Accepted streams that are open: connections, and all other requests.",
        lambda of: of.node.services.admission.count(),
    ),
    _gauge("broker_users", "Users with a connection.", lambda of: of.stats.users),
    _counter(
        "broker_connections_opened", "Connections that were opened.",
        lambda of: of.stats.ends.opened, "transport",
    ),
    _counter(
        "broker_connections_closed",
        "Connections that have ended; the initiator of one that was too slow is slow.",
        lambda of: of.stats.ends.closed, "code", "initiator",
    ),
    _counter(
        "broker_connections_refused", "Requests that were refused before there was a connection.",
        lambda of: of.stats.ends.refused, "reason",
    ),
    _counter(
        "broker_errors", "Error replies to clients.", lambda of: of.stats.ends.errors, "code"
    ),
    # topics
    _gauge("broker_topics", "Topics with subscribers.", lambda of: of.stats.hub.topics),
    _gauge("broker_patterns", "Patterns with subscribers.", lambda of: of.stats.hub.patterns),
    _gauge("broker_subscriptions", "Subscriptions.", lambda of: of.stats.hub.subscriptions),
    # messages
    _counter(
        "broker_incoming_messages", "Messages from clients; one may hold several commands.",
        lambda of: of.survey.received.messages,
    ),
    _counter(
        "broker_incoming_bytes", "Bytes from clients, in frames.",
        lambda of: of.survey.received.bytes,
    ),
    _counter(
        "broker_outgoing_messages", "Messages put into the queues of connections.",
        lambda of: of.stats.post.messages_queued,
    ),
    _counter(
        "broker_outgoing_bytes", "Bytes put into the queues of connections, in frames.",
        lambda of: of.stats.post.bytes_queued,
    ),
    _counter(
        "broker_publications", "Publications, by whomever.",
        lambda of: of.stats.namespaces, "namespace",
    ),
    _counter(
        "broker_deliveries", "Publications, joins and leaves, each counted for everyone it goes to.",
        lambda of: of.stats.post.messages_delivered,
    ),
    _counter(
        "broker_messages_dropped", "Messages that were dropped as their queue was full.",
        lambda of: of.survey.messages_dropped,
    ),
    _counter(
        "broker_gaps", "Subscriptions that lost publications, and were ended to recover.",
        lambda of: of.stats.ends.gaps,
    ),
    _counter(
        "broker_recoveries", "Recoveries of clients that came back.",
        lambda of: of.stats.recoveries, "outcome",
    ),
    _counter(
        "broker_compressed_messages",
        "Messages that were compressed; one that is sent counts once, for all who get it.",
        lambda of: {
            "sent": of.node.services.compression.packing.messages,
            "received": of.node.services.compression.inflated.messages,
        }, "direction",
    ),
    _counter(
        "broker_compressed_bytes", "Their bytes, compressed and not.",
        lambda of: _compressed_bytes(of.node.services.compression), "direction", "compressed",
    ),
    # what waits
    _waiting(
        "broker_queue_bytes", "Connections by how many bytes wait in their queue.",
        lambda of: of.survey.queue_bytes,
    ),
    _waiting(
        "broker_queue_messages", "Connections by how many messages wait in their queue.",
        lambda of: of.survey.queue_messages,
    ),
    # what is kept
    _gauge("broker_history_bytes", "Memory of the history.", lambda of: of.stats.history.bytes),
    _gauge(
        "broker_history_max_bytes", "Its bound, history_bytes.",
        lambda of: of.node.config.history_bytes,
    ),
    _gauge(
        "broker_history_publications", "Publications in the history.",
        lambda of: of.stats.history.publications,
    ),
    _gauge(
        "broker_history_topics", "Topics with a history.", lambda of: of.stats.history.topics
    ),
    _counter(
        "broker_history_evicted", "Publications that the bound on all bytes has pushed out.",
        lambda of: of.stats.history.publications_evicted,
    ),
    _gauge(
        "broker_retained_bytes", "Memory of retained values.", lambda of: of.stats.retained.bytes
    ),
    _gauge(
        "broker_retained_max_bytes", "Its bound, retained_bytes.",
        lambda of: of.node.config.retained_bytes,
    ),
    _gauge("broker_retained_values", "Retained values.", lambda of: of.stats.retained.values),
    _counter(
        "broker_retained_evicted", "Retained values that the bound on all bytes has pushed out.",
        lambda of: of.stats.retained.values_evicted,
    ),
    # the engine
    _gauge(
        "broker_engine_failing", "1 while nothing can be kept.",
        lambda of: bool(of.stats.engine.failing),
    ),
    _gauge(
        "broker_engine_waiting_bytes", "What was published and is not kept yet.",
        lambda of: of.stats.engine.waiting,
    ),
    _counter(
        "broker_engine_batches", "Batches that were written.",
        lambda of: of.stats.engine.batches,
    ),
    _counter(
        "broker_engine_entries", "Batches of all nodes that were read from the log they share.",
        lambda of: of.stats.engine.entries,
    ),
    _counter(
        "broker_engine_skipped", "Runs of publications in these that nobody here wanted.",
        lambda of: of.stats.engine.skipped,
    ),
    _counter(
        "broker_engine_losses", "Times that some of that log was lost.",
        lambda of: of.stats.engine.losses,
    ),
    _counter(
        "broker_engine_misread", "What of that log could not be read, and was passed over.",
        lambda of: of.stats.engine.misread,
    ),
    # memory
    _gauge(
        "broker_memory_bytes", "What is held for clients, by part.",
        lambda of: of.stats.memory.parts, "part",
    ),
    _gauge(
        "broker_memory_max_bytes", "The bound on all parts together.",
        lambda of: of.stats.memory.limit,
    ),
    _counter(
        "broker_memory_refused", "Commands and requests that were refused as memory was short.",
        lambda of: of.stats.memory.refused,
    ),
    _counter(
        "broker_memory_gave_way", "Connections and requests that were ended as memory was short.",
        lambda of: of.stats.memory.gave_way,
    ),
    # hooks, and backends that are asked in their place
    _histogram(
        "broker_hook_seconds",
        "How long hooks took; of a backend with the wait for its place in the pool.",
        lambda of: {kind: each.seconds for kind, each in of.stats.hooks.items()}, "hook", "asked",
    ),
    _counter(
        "broker_hook_failures", "Calls of hooks that neither answered nor refused.",
        lambda of: {kind: each.failures for kind, each in of.stats.hooks.items()}, "hook", "asked",
    ),
    # events
    _gauge(
        "broker_events_waiting", "Events that wait for their reader.",
        _events(lambda of: of.waiting), "reader",
    ),
    _counter(
        "broker_events_delivered", "Events that their reader has had.",
        _events(lambda of: of.delivered), "reader",
    ),
    _counter(
        "broker_events_dropped", "Events that were dropped as too many waited.",
        _events(lambda of: of.dropped), "reader",
    ),
    _counter(
        "broker_event_failures", "Attempts to deliver events that failed.",
        _events(lambda of: of.failures), "reader",
    ),
    _histogram(
        "broker_event_request_seconds", "How long requests with events to a backend took.",
        _events(lambda of: of.seconds), "reader",
    ),
    # logs
    _counter(
        "broker_log_lines_dropped", "Lines of the log that nobody took in time.",
        lambda of: of.log.lines_dropped,
    ),
    _gauge(
        "broker_log_waiting_bytes", "Lines of the log that wait for their reader.",
        lambda of: of.log.waiting_bytes,
    ),
)  # fmt: skip
"""All metrics; `docs/howto/monitoring.md` lists them."""


class Metrics:
    """Answers `GET /metrics` on behalf of a node."""

    def __init__(self, node: Node, read: Callable[[], Awaitable[bytes]]) -> None:
        self._node = node
        self._read = read
        if self._keys:
            _is_installed()  # now, as that takes 20 ms: nobody is here yet to wait for it

    async def __call__(self, request: Request) -> Response:
        refusal = self._refuse(request)
        if refusal is not None:
            return refusal
        if not _is_installed():
            text = "/metrics needs the package `prometheus-client`: pip install '.[metrics]'"
            return PlainTextResponse(f"{text}\n", HTTPStatus.NOT_IMPLEMENTED)
        body = await self._read()
        headers = {"Cache-Control": "no-store"}
        return Response(body, headers=headers, media_type=MEDIA_TYPE)

    @property
    def _keys(self) -> list[str]:
        config = self._node.config
        return [key for key in (config.metrics_key, config.api_key) if key is not None]

    def _refuse(self, request: Request) -> Response | None:
        """The answer to a client that may not read this, or where it is off; else None."""
        ours = self._keys
        if not ours:
            text = "The metrics are off: set metrics_key, or BROKER_METRICS_KEY, to turn them on."
            return PlainTextResponse(f"{text}\n", HTTPStatus.NOT_FOUND)
        shown = _shown_key(request).encode()
        if any(hmac.compare_digest(shown, key.encode()) for key in ours):
            return None
        reason = "wrong key" if shown else "no key"
        log.warning("metrics_key_refused", reason=reason, peer=peer_of(request))
        text = "Wrong or missing key: send metrics_key as a bearer token, or as the password."
        headers = {"WWW-Authenticate": 'Bearer realm="metrics", Basic realm="metrics"'}
        return PlainTextResponse(f"{text}\n", HTTPStatus.UNAUTHORIZED, headers)


def _is_installed() -> bool:
    """Whether the library is there that writes the text."""
    try:
        import prometheus_client  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True


def _shown_key(request: Request) -> str:
    """The key that a request shows: as a bearer token, as the password of any user, or as backends
    show theirs; "" if none."""
    scheme, _, shown = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return shown.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(shown.strip(), validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return ""
    return shown_key(request.headers.get)


async def exposition(node: Node) -> bytes:
    """All metrics of a node as text. Takes turns with everybody else; cancelled, nothing is left behind."""
    survey = await node.figures.survey()
    snapshot = Snapshot(node, node.figures.statistics(survey), survey, logs.statistics())
    text = b""
    for first in range(0, len(METRICS), METRICS_AT_ONCE):
        await trio.lowlevel.checkpoint()
        text += _written(METRICS[first : first + METRICS_AT_ONCE], snapshot)
    return text


@attrs.frozen
class _Collector:
    """Families as the library collects them."""

    families: "list[Family]"

    def collect(self) -> "list[Family]":
        return self.families


def _written(metrics: tuple[Metric, ...], snapshot: Snapshot) -> bytes:
    from prometheus_client import generate_latest

    return generate_latest(_Collector([_family(metric, snapshot) for metric in metrics]))


def _family(metric: Metric, snapshot: Snapshot) -> "Family":
    """A metric with its values of now."""
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeHistogramMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
    )

    values = metric.read(snapshot)
    by_label = values if isinstance(values, Mapping) else {"": values}
    labels = metric.labels
    family: CounterMetricFamily | GaugeMetricFamily
    buckets: HistogramMetricFamily | GaugeHistogramMetricFamily
    if metric.kind in ("histogram", "gauge histogram"):
        made = HistogramMetricFamily if metric.kind == "histogram" else GaugeHistogramMetricFamily
        buckets = made(metric.name, metric.help, labels=labels)
        for label, value in by_label.items():
            assert isinstance(value, HistogramStatistics)
            buckets.add_metric(_texts(label, labels), _cumulative(value), value.sum)
        return buckets
    made_plain = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    family = made_plain(metric.name, metric.help, labels=labels)
    for label, value in by_label.items():
        assert not isinstance(value, HistogramStatistics)
        family.add_metric(_texts(label, labels), value)
    return family


def _texts(label: str | tuple[str, ...], labels: tuple[str, ...]) -> tuple[str, ...]:
    if not labels:
        return ()
    return label if isinstance(label, tuple) else (label,)


def _cumulative(histogram: HistogramStatistics) -> list[tuple[str, float]]:
    """Its buckets as Prometheus has them: each holds all that are smaller."""
    total, buckets = 0, []
    for bound, count in zip((*histogram.bounds, float("inf")), histogram.counts, strict=True):
        total += count
        buckets.append(("+Inf" if bound == float("inf") else str(float(bound)), float(total)))
    return buckets
