"""Setting up logging: for a process that is a broker, or for a program that embeds one.

Rule: settings that a program has made itself stay as they are.
"""

import atexit
import io
import logging
import sys
import time
from collections.abc import Callable
from typing import Final, Protocol

import attrs
import structlog
from structlog.types import EventDict, Processor

from broker.config.settings import LogFormat, LogLevel
from broker.logs.limiter import Limiter, Swallowed
from broker.logs.rendering import article_line, level_number, rendering
from broker.logs.writer import LineWriter, LogStatistics, StreamName, write_now

FLUSH_SECONDS: Final = 1.0
"""How long an end of the process waits, at most, for lines to be taken. A reader that lives takes
all that may wait in milliseconds, and a supervisor gives a stop 10 s (Docker) or more."""

log: structlog.typing.FilteringBoundLogger = structlog.get_logger("broker")


class _Sink(Protocol):
    def write(self, name: StreamName, line: str, *, important: bool) -> None: ...


class _AtOnce:
    """Writes in the thread that logs. For a program that embeds a broker: it gets no thread."""

    def write(self, name: StreamName, line: str, *, important: bool) -> None:
        write_now(getattr(sys, name), line)


class _Threads:
    """Writes in a thread for each stream: where stdout stalls, warnings still go to stderr."""

    def __init__(self) -> None:
        self.limiter: Limiter | None = None
        self.worker: int | None = None
        self.writers: dict[StreamName, LineWriter] = {
            "stderr": LineWriter("stderr", self._log_dropped, self._log_swallowed),
            "stdout": LineWriter("stdout", self._log_dropped),
        }

    def write(self, name: StreamName, line: str, *, important: bool) -> None:
        self.writers[name].write(line, important=important)

    def _log_dropped(self, count: int) -> None:
        log.warning("log_lines_dropped", count=count)

    def _log_swallowed(self) -> None:
        if self.limiter is not None:
            self.limiter.notify_due()


_threads: Final = _Threads()


@attrs.define(eq=False)
class _Output:
    """Where structlog's lines end up; a logger, and the factory of it."""

    sink: _Sink
    limiter: Limiter

    def __call__(self, *_: object) -> "_Output":
        return self

    def msg(self, line: str) -> None:
        self.sink.write("stderr", line, important=False)

    debug = info = msg

    def warning(self, line: str) -> None:
        self.sink.write("stderr", line, important=True)

    error = critical = exception = warning


class _Article:
    """A processor that writes the article's four lines, and lets warnings through; and why a page was
    refused, which who pastes the article's script into the wrong page has to learn."""

    def __init__(self, sink: _Sink, threshold: int) -> None:
        self._sink = sink
        self._threshold = threshold

    def __call__(self, _: object, __: str, event: EventDict) -> EventDict:
        line = article_line(event)
        if line is not None:
            self._sink.write("stdout", line, important=True)
            raise structlog.DropEvent
        is_refused_page = event["event"] == "refused" and event.get("status") == 403
        if level_number(event["level"]) < self._threshold and not is_refused_page:
            raise structlog.DropEvent
        return event


class _ForeignHandler(logging.Handler):
    """Where the standard library's lines end up."""

    def __init__(self, level: int, sink: _Sink) -> None:
        super().__init__(level)
        self._sink = sink

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except structlog.DropEvent:
            return
        except Exception:  # noqa: BLE001 - a log never fails its caller, who gave wrong arguments
            record.msg = f"line that cannot be formatted, {record.pathname}:{record.lineno}"
            record.args = record.exc_info = None
            line = self.format(record)
        self._sink.write("stderr", line, important=record.levelno >= logging.WARNING)


def configure(
    log_format: LogFormat,
    level: LogLevel,
    *,
    clock: Callable[[], float] = time.monotonic,
    worker: int | None = None,
) -> None:
    """Set up logging for a process that is a broker and nothing else.

    Every line has the field `worker`, if there is one.

    Events below `level` cost next to nothing. Events that other libraries log through the
    standard library go the same way from WARNING on. `clock` counts seconds, for the limit on
    repetition.

    From the first line on a daemon thread writes to stderr, one more with `article` to stdout:
    a caller that logs never waits. At the end of the process lines that wait are written, for at
    most `FLUSH_SECONDS`.
    """
    _threads.worker = worker
    limiter = _configure_structlog(log_format, level, _threads, clock)
    _threads.limiter = limiter
    threshold = max(level_number(level), logging.WARNING)
    handler = _ForeignHandler(threshold, _threads)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[
                structlog.stdlib.add_logger_name,
                structlog.stdlib.add_log_level,
                limiter,
                _add_worker,
            ],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *rendering(log_format),
            ],
        )
    )
    logging.basicConfig(handlers=[handler], level=threshold, force=True)
    atexit.unregister(flush)
    atexit.register(flush)


def configure_if_unset(log_format: LogFormat, level: LogLevel) -> None:
    """Set up structlog for an embedded broker, unless the program has done so itself.

    The standard library's logging is the program's own and stays as it is. Lines are written by
    the thread that logs them, and no other is started.
    """
    if not structlog.is_configured():
        _configure_structlog(log_format, level, _AtOnce())


def reconfigure(log_format: LogFormat, level: LogLevel) -> None:
    """Change what was set up here; a program that has set up logging itself keeps its own."""
    output = structlog.get_config()["logger_factory"]
    if not isinstance(output, _Output):
        return
    output.limiter.notify_due(all_of_them=True)
    if output.sink is _threads:
        configure(log_format, level, worker=_threads.worker)
    else:
        _configure_structlog(log_format, level, output.sink)


def _configure_structlog(
    log_format: LogFormat,
    level: LogLevel,
    sink: _Sink,
    clock: Callable[[], float] = time.monotonic,
) -> Limiter:
    limiter = Limiter(_log_swallowed, clock=clock)
    processors: list[Processor] = [structlog.stdlib.add_log_level]
    threshold = level_number(level)
    if log_format == "article":
        # Before the limit: its lines are what the tutorial promises, every one of them.
        processors.append(_Article(sink, max(threshold, logging.WARNING)))
        threshold = logging.DEBUG  # the article tells of every message
        if isinstance(sys.stdout, io.TextIOWrapper) and not sys.stdout.closed:
            sys.stdout.reconfigure(encoding="utf-8")  # byte for byte, whatever the locale
    made = structlog.make_filtering_bound_logger(threshold)
    # A program that embeds a broker may put processors of its own in place of ours, to see all lines.
    is_lidded = sink is _threads and log_format != "article"
    structlog.configure(
        processors=[*processors, limiter, _add_worker, *rendering(log_format)],
        wrapper_class=_lidded(made, limiter) if is_lidded else made,
        logger_factory=_Output(sink, limiter),
        cache_logger_on_first_use=False,
    )
    return limiter


def _lidded(
    made: type[structlog.typing.FilteringBoundLogger], limiter: Limiter
) -> type[structlog.typing.FilteringBoundLogger]:
    """A logger that makes no line of what would be swallowed: in a storm of connections that is nearly all."""

    def info(
        logger: structlog.typing.FilteringBoundLogger, event: str, *args: object, **fields: object
    ) -> None:
        if not limiter.swallows(event):
            made.info(logger, event, *args, **fields)

    return type("LiddedLogger", (made,), {"info": info})


def _add_worker(_: object, __: str, event: EventDict) -> EventDict:
    if _threads.worker is not None:
        event["worker"] = _threads.worker
    return event


def _log_swallowed(swallowed: Swallowed) -> None:
    write = log.info if swallowed.level in ("debug", "info") else log.warning
    write("lines_swallowed", **swallowed.fields)


def flush(seconds: float = FLUSH_SECONDS) -> bool:
    """Say what was swallowed, and wait until all lines are written, `seconds` at most.

    Returns whether they were. Safe in a signal handler.
    """
    if _threads.limiter is not None:
        _threads.limiter.notify_due(all_of_them=True)
    end = time.monotonic() + seconds
    written = [
        writer.flush(max(0.0, end - time.monotonic())) for writer in _threads.writers.values()
    ]
    return all(written)


def statistics() -> LogStatistics:
    """A snapshot of the lines that wait, and of those that nobody took in time."""
    each = [writer.statistics() for writer in _threads.writers.values()]
    return LogStatistics(
        lines_dropped=sum(writer.lines_dropped for writer in each),
        waiting_bytes=sum(writer.waiting_bytes for writer in each),
    )


# strays


_hook_before: list[Callable[["sys.UnraisableHookArgs"], object]] = []


def capture_strays() -> None:
    """Let the log have what Python itself prints to stderr: warnings, exceptions in finalizers.

    Python would wait there for a reader that may never come. Call it after `configure`.
    """
    logging.captureWarnings(True)
    if not _hook_before:
        _hook_before.append(sys.unraisablehook)
        sys.unraisablehook = _log_unraisable


def _log_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    source = unraisable.object  # a finalizer or a generator; its repr is the app's, and may fail
    name = getattr(source, "__qualname__", type(source).__qualname__)
    log.error("exception_ignored", where=str(name), exc_info=unraisable.exc_value or False)


def release(seconds: float = FLUSH_SECONDS) -> None:
    """Undo `configure` and `capture_strays`, and end their threads; for tests.

    Lines that wait are written, for `seconds` at most.
    """
    if _threads.limiter is not None:
        _threads.limiter.notify_due(all_of_them=True)
    structlog.reset_defaults()
    logging.captureWarnings(False)
    if _hook_before:
        sys.unraisablehook = _hook_before.pop()
    _threads.limiter = None
    for writer in _threads.writers.values():
        writer.close(seconds)
    atexit.unregister(flush)
