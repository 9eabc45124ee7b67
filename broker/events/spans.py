"""Spans of OpenTelemetry for publications that carry a trace: how long the broker took, and those who listen.

A publication carries a trace in its tag `traceparent` (W3C Trace Context, level 1), which goes to
subscribers as it came. The sender of a trace decides whether it is sampled; one that is not has no spans.

Rules:

1. Off, nothing of OpenTelemetry is imported, and nothing is looked at. Without tags a publication is never
   looked at either.
2. Nobody waits for a span: the SDK's own thread sends them, in batches, and drops what is too much.
3. `publish` lasts until the publication is kept and handed out, on the node that it came to. `deliver` lasts,
   on each node, until the last connection has taken it, or has gone; it is what `Parcel.shared` holds.
"""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import attrs
import trio

from broker.config.settings import Config
from broker.core.messages import Position
from broker.core.session import Parcel
from broker.errors import ConfigError, Refused
from broker.version import VERSION

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, Tracer

TAG: Final = "traceparent"

PER_SECOND: Final = 100
"""Publications, of each kind of span: of more than that nobody looks at each one."""

OPEN_MOST: Final = 1000
"""`deliver` spans at once: each lasts as long as its slowest subscriber. 2 MiB."""

FLUSH_SECONDS: Final = 5.0
"""How long the last spans have to be sent when the broker stops."""

_SAMPLED: Final = 0x01
_parent = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})", re.ASCII).fullmatch


def is_sampled(traceparent: str) -> bool:
    """Whether this names a trace that is sampled, so that its publications have spans."""
    return _sampled(traceparent) is not None


def _sampled(traceparent: str) -> "re.Match[str] | None":
    match = _parent(traceparent)
    return match if match is not None and int(match[3], 16) & _SAMPLED else None


@attrs.define(eq=False)
class _Room:
    """So many in each second."""

    _second: float = attrs.field(init=False, default=-1.0)
    _left: int = attrs.field(init=False, default=PER_SECOND)

    def take(self, now: float) -> bool:
        if now // 1 != self._second:
            self._second, self._left = now // 1, PER_SECOND
        self._left -= 1
        return self._left >= 0


@attrs.frozen(eq=False)
class Spans:
    """Makes spans with a tracer of OpenTelemetry's."""

    _tracer: "Tracer"
    _open: set[int] = attrs.field(init=False, factory=set)
    _publishes: _Room = attrs.field(init=False, factory=_Room)
    _delivers: _Room = attrs.field(init=False, factory=_Room)

    def publish(self, parcel: Parcel) -> "_Publish | None":
        """The span of a publication that begins its way; None where it has none."""
        context = self._context_of(parcel)
        if context is None or not self._publishes.take(trio.current_time()):
            return None
        return _Publish(self._begin(f"publish {parcel.topic}", "publish", parcel, context))

    def deliver(self, parcel: Parcel) -> None:
        """Have a parcel with its publication hold a span, if it has one, until everybody has taken it."""
        context = self._context_of(parcel)
        if context is None or len(self._open) >= OPEN_MOST:
            return
        if not self._delivers.take(trio.current_time()):
            return
        span = self._begin(f"deliver {parcel.topic}", "deliver", parcel, context)
        parcel.shared = _Deliver(span, parcel.shared, self._open)

    def _context_of(self, parcel: Parcel) -> "Context | None":
        tags = parcel.batches[0][0].tags
        match = _sampled(tags.get(TAG, "")) if tags else None
        if match is None:
            return None
        from opentelemetry import trace

        of = trace.SpanContext(
            int(match[1], 16), int(match[2], 16), is_remote=True, trace_flags=trace.TraceFlags(1)
        )
        return trace.set_span_in_context(trace.NonRecordingSpan(of)) if of.is_valid else None

    def _begin(
        self, name: str, operation: str, parcel: Parcel, context: "Context | None"
    ) -> "Span":
        from opentelemetry.trace import SpanKind

        ((publication,),) = parcel.batches
        attributes: dict[str, str | int] = {
            "messaging.system": "trio-broker",
            "messaging.operation.name": operation,
            "messaging.destination.name": parcel.topic,
            "messaging.message.body.size": len(publication.data),
        }
        if publication.info is not None:
            attributes["messaging.client.id"] = publication.info.client
        kind = SpanKind.CONSUMER if operation == "publish" else SpanKind.PRODUCER
        return self._tracer.start_span(name, context, kind, attributes)


@attrs.frozen(eq=False)
class _Publish:
    """The span of a publication that is on its way."""

    _span: "Span"

    def refused(self, refusal: Refused) -> None:
        from opentelemetry.trace import StatusCode

        self._span.set_attribute("error.type", str(int(refusal.code)))
        self._span.set_status(StatusCode.ERROR, refusal.message)
        self._span.end()

    def done(self, result: Position | Refused | None) -> None:
        """It was kept and handed out, or refused."""
        if isinstance(result, Refused):
            self.refused(result)
            return
        if result is not None:
            self._span.set_attribute("messaging.message.id", f"{result.epoch}:{result.offset}")
        self._span.end()


class _Deliver:
    """Ends a span when nobody holds it any more: each run that it goes out with holds it until the run is
    written. The former `shared` object of the parcel is held with it."""

    __slots__ = ("_inner", "_open", "_span")

    def __init__(self, span: "Span", inner: object, open_spans: set[int]) -> None:
        self._span, self._inner, self._open = span, inner, open_spans
        open_spans.add(id(self))

    def __del__(self) -> None:
        self._open.discard(id(self))
        self._span.end()


@asynccontextmanager
async def open_spans(config: Config) -> AsyncIterator[Spans | None]:
    """The maker of spans, as the settings say; None where they are off. At the end the last spans are sent.

    Raises `ConfigError` where the packages are missing.
    """
    if config.spans == "off":
        yield None
        return
    try:
        from opentelemetry import trace

        if config.spans == "program":
            yield Spans(trace.get_tracer("trio-broker", VERSION))
            return
        provider = _provider(config.spans)
    except ImportError as error:
        text = f"spans is {config.spans!r}, which needs a package: pip install '.[tracing]'"
        raise ConfigError(f"{text} ({error.name} is missing)") from None
    try:
        yield Spans(provider.get_tracer("trio-broker", VERSION))
    finally:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + FLUSH_SECONDS):
            await trio.to_thread.run_sync(provider.shutdown, abandon_on_cancel=True)


def _provider(kind: str) -> Any:
    """The SDK with one exporter; its own variables (`OTEL_…`) say the rest."""
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter

    exporter: SpanExporter
    if kind == "otlp":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        exporter = OTLPSpanExporter()
    else:
        exporter = ConsoleSpanExporter()
    # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES come before our values.
    resource = Resource({SERVICE_NAME: "trio-broker"}).merge(_told())
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def _told() -> Any:
    from opentelemetry.sdk.resources import OTELResourceDetector

    return OTELResourceDetector().detect()
