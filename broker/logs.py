"""How events become lines: three formats, one line per event, and a lid on repetition.

The rest of the package says what happened (`log.info("open", fd=7, peer=…)`) and never how it
looks. `console` and `json` write to stderr, so that stdout stays free for a program's output;
`article` writes the tutorial's four lines to stdout and nothing else.

Rule 1: what a peer sent cannot start a line of its own or move a terminal's cursor: control
characters come out escaped.

Rule 2: a log that cannot be written (a closed pipe, a full disk) never fails the broker.

Rule 3: a peer cannot fill the disk: of warnings with one name, one a second is written.
"""

import enum
import io
import logging
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final, TextIO

import structlog
from structlog.types import EventDict, Processor

from broker.config.settings import LogFormat, LogLevel

LIMITED: Final = frozenset({"refused", "token_refused"})
"""Events that strangers cause at will; limited at any level. Warnings are limited anyway."""


def configure(
    log_format: LogFormat,
    level: LogLevel,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Set up logging for a process that is a broker and nothing else.

    Events below `level` cost next to nothing. What other libraries log through the standard
    library goes the same way from WARNING on. `clock` counts seconds, for the limit on
    repetition.
    """
    limiter = Limiter(clock=clock)
    _configure_structlog(log_format, level, limiter)
    threshold = max(_number(level), logging.WARNING)
    handler = _ForeignHandler(threshold)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[
                structlog.stdlib.add_logger_name,
                structlog.stdlib.add_log_level,
                limiter,
                _escape_name,
            ],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *_rendering(log_format),
            ],
        )
    )
    logging.basicConfig(handlers=[handler], level=threshold, force=True)


def configure_if_unset(log_format: LogFormat, level: LogLevel) -> None:
    """Set up structlog for an embedded broker, unless the program has done so itself.

    The standard library's logging is the program's own and stays as it is.
    """
    if not structlog.is_configured():
        _configure_structlog(log_format, level, Limiter())


def reconfigure(log_format: LogFormat, level: LogLevel) -> None:
    """Change what was set up here; a program that has set up logging itself keeps its own."""
    if structlog.get_config()["logger_factory"] is not _Lines:
        return
    if any(isinstance(handler, _ForeignHandler) for handler in logging.getLogger().handlers):
        configure(log_format, level)
    else:
        _configure_structlog(log_format, level, Limiter())


class Limiter:
    """A processor that lets one warning per name and `interval` seconds through.

    The next one that passes says in `swallowed` how many did not. Once a flood has ended for
    good, the count of its last second is never said.
    """

    def __init__(
        self, *, interval: float = 1.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._interval = interval
        self._clock = clock
        # The keys are event and logger names of the code, never a peer's, so this stays small.
        self._passed: dict[tuple[str, str], float] = {}
        self._swallowed: dict[tuple[str, str], int] = {}

    def __call__(self, _: object, method: str, event: EventDict) -> EventDict:
        name = event["event"]
        if method in ("debug", "info") and name not in LIMITED:
            return event
        # Another library's text may hold anything, so its logger's name stands for it.
        logger = event.get("logger")
        key = ("", logger) if logger is not None else (name, event.get("hook", ""))
        now = self._clock()
        if now - self._passed.get(key, -self._interval) < self._interval:
            self._swallowed[key] = self._swallowed.get(key, 0) + 1
            raise structlog.DropEvent
        self._passed[key] = now
        swallowed = self._swallowed.pop(key, 0)
        if swallowed:
            event["swallowed"] = swallowed
        return event


def _configure_structlog(
    log_format: LogFormat,
    level: LogLevel,
    limiter: Limiter,
) -> None:
    processors: list[Processor] = [structlog.stdlib.add_log_level, limiter]
    threshold = _number(level)
    if log_format == "article":
        processors.append(_Article(max(threshold, logging.WARNING)))
        threshold = logging.DEBUG  # the article tells of every message
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8")  # byte for byte, whatever the locale
    structlog.configure(
        processors=[*processors, *_rendering(log_format)],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=_Lines,
        cache_logger_on_first_use=False,
    )


def _rendering(log_format: LogFormat) -> list[Processor]:
    if log_format == "json":
        return [
            _plain_values,
            structlog.processors.format_exc_info,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(),
        ]
    return [
        _plain_values,
        _ready_sentence,
        structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
        structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(),
            sort_keys=False,
            repr_native_str=True,  # escapes what would move the cursor
            exception_formatter=structlog.dev.plain_traceback,
        ),
    ]


def _plain_values(_: object, __: str, event: EventDict) -> EventDict:
    """Show an enum as its value: `code=1000`, not `code=<CloseCode.NORMAL: 1000>`."""
    for key, value in event.items():
        if isinstance(value, enum.Enum):
            event[key] = value.value
    return event


def _ready_sentence(_: object, __: str, event: EventDict) -> EventDict:
    """Say in words, on the console, what `ready` says in fields."""
    if event["event"] == "ready" and "addresses" in event:
        addresses = event.pop("addresses")
        pages = [
            "http" + address.removeprefix("ws") + "/"
            for address in addresses
            if address.startswith("ws")
        ]
        page = f" (chat page: {pages[0]})" if pages else ""
        event["event"] = f"Broker ready on {', '.join(addresses)}{page} - stop with Ctrl-C"
    return event


def _escape_name(_: object, __: str, event: EventDict) -> EventDict:
    event["event"] = escape(str(event["event"]))
    return event


# C0 and C1 controls, the two Unicode line ends, and what turns the writing direction round. Not
# `str.isprintable`, which would escape the ideographic space and joined emoji as well.
_CONTROLS: Final = {
    code: chr(code).encode("unicode_escape").decode()
    for span in (range(0x20), range(0x7F, 0xA0), range(0x2028, 0x202F), range(0x2066, 0x206A))
    for code in span
}


def escape(text: str) -> str:
    """Text that stays on its line: control characters become their Python escapes."""
    return text.translate(_CONTROLS)


class _Article:
    """Renders the four events of the article and lets warnings through to the console form."""

    def __init__(self, threshold: int) -> None:
        self._threshold = threshold

    def __call__(self, _: object, __: str, event: EventDict) -> EventDict:
        line = self._line(event)
        if line is not None:
            _write(sys.stdout, line)
            raise structlog.DropEvent
        if _number(event["level"]) < self._threshold:
            raise structlog.DropEvent
        return event

    def _line(self, event: EventDict) -> str | None:
        match event["event"]:
            case "ready":
                return "websocket服务器启动成功"
            case "open":
                return f"握手成功 fd{event['fd']}"
            case "message":
                data = event["data"]
                if isinstance(data, bytes):
                    data = data.decode(errors="backslashreplace")
                return (
                    f"接收客户端消息: {event['fd']}:{escape(data)},"
                    f"opcode:{int(event['opcode'])},fin:{int(event['fin'])}"
                )
            case "close":
                return f"客户端 {event['fd']} 关闭"
        return None


class _Lines:
    """Where structlog's lines end up. Asks for `sys.stderr` each time, so redirection works."""

    def __init__(self, *_: object) -> None:
        pass

    def msg(self, line: str) -> None:
        _write(sys.stderr, line)

    debug = info = warning = error = critical = exception = msg


class _ForeignHandler(logging.Handler):
    """Where the standard library's lines end up."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except structlog.DropEvent:
            return
        _write(sys.stderr, line)


def _write(stream: TextIO, line: str) -> None:
    # One write, so lines of two processes on one pipe do not mix; flushed, so `| grep` sees it.
    with suppress(OSError, ValueError):  # ValueError: the stream is closed
        try:
            stream.write(line + "\n")
        except UnicodeEncodeError:  # a terminal that is not UTF-8
            stream.write(line.encode("ascii", "backslashreplace").decode() + "\n")
        stream.flush()


def _number(level: str) -> int:
    return logging.getLevelNamesMapping()[level.upper()]
