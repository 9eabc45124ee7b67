"""Events as text: the console's lines, JSON, and the article's four.

Rule: nothing that comes from outside, in a name, a value or an exception, ends a line or reaches a
terminal as anything but text. The line ends of a traceback are ours; those in an exception's
message are not, and come out as `\\n`.
"""

import enum
import logging
import sys
import traceback
from collections.abc import Iterator
from types import TracebackType
from typing import Final, TypeAlias

import structlog
from structlog.types import EventDict, Processor

from broker.config.settings import LogFormat

ExcInfo: TypeAlias = (
    tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]
)


def rendering(log_format: LogFormat) -> list[Processor]:
    """The processors that make a line of text of an event, or of JSON."""
    exceptions = structlog.processors.ExceptionRenderer(format_exception)
    if log_format == "json":
        return [
            plain_values,
            exceptions,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(),  # in ASCII, so it escapes all there is to escape
        ]
    return [
        plain_values,
        _ready_sentence,
        _harmless,
        exceptions,
        structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
        structlog.dev.ConsoleRenderer(
            colors=_is_terminal(),
            sort_keys=False,
            repr_native_str=True,  # escapes what would move the cursor
            exception_formatter=structlog.dev.plain_traceback,
        ),
    ]


def _is_terminal() -> bool:
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except ValueError:  # it is closed
        return False


def plain_values(_: object, __: str, event: EventDict) -> EventDict:
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
        has_page = event.pop("demo_page", True)
        page = f" (chat page: {pages[0]})" if pages and has_page else ""
        event["event"] = f"Broker ready on {', '.join(addresses)}{page} - stop with Ctrl-C"
    return event


_UNQUOTED: Final = {
    "event": "",
    "logger": "",
    "logger_name": "",
    "exception": "    ",
    "stack": "    ",
}
"""Keys that the console shows without quotes, the last two on a line of their own, and how that
line begins: no log line begins with a space."""

# Types that the console shows with quotes, or that are safe as they are.
_SAFE: Final = (str, int, float, bool, type(None))


class _Escaped:
    """Stands for a value whose own `repr` may hold anything, or fail."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __repr__(self) -> str:
        try:
            return escape(repr(self._value))
        except Exception as error:  # noqa: BLE001 - a log never fails its caller
            return f"<{type(self._value).__name__}: its repr raised {type(error).__name__}>"


def _harmless(_: object, __: str, event: EventDict) -> EventDict:
    """Escape what the console shows without quotes: event, logger, names, other objects' `repr`."""
    shown: EventDict = {}
    for key, value in event.items():
        if key in _UNQUOTED:
            value = _UNQUOTED[key] + escape(str(value))
        elif key != "exc_info" and type(value) not in _SAFE:
            value = _Escaped(value)
        shown[escape(key)] = value
    return shown


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


# exceptions


def format_exception(exc_info: ExcInfo) -> str:
    """A traceback as Python prints it, indented, and with nothing raw in it.

    Every line is indented, so none can be taken for a log line of its own.
    """
    _, error, _ = exc_info
    if error is None:  # `exc_info=True` where nothing was raised
        return "    no exception"
    printable = traceback.TracebackException.from_exception(error, compact=True)
    return "\n".join(f"    {line}" for line in _lines(printable))


MAX_GROUP: Final = 15
"""Exceptions of a group that are shown, as Python shows: a crowd mostly says one thing."""

MAX_DEPTH: Final = 10
"""Groups within groups that are shown, as Python shows."""


def _lines(error: traceback.TracebackException, depth: int = 0) -> Iterator[str]:
    for link, sentence in _chain(error):
        yield "Traceback (most recent call last):"
        for entry in link.stack.format():
            yield from map(escape, entry.removesuffix("\n").split("\n"))
        for text in link.format_exception_only():
            yield escape(text.removesuffix("\n"))
        inner = link.exceptions or []
        for number, each in enumerate(inner[: MAX_GROUP if depth < MAX_DEPTH else 0], 1):
            yield f"  +-- {number} of {len(inner)}:"
            yield from (f"  | {line}" for line in _lines(each, depth + 1))
        if sentence:
            yield from ("", sentence, "")


_CAUSED: Final = "The above exception was the direct cause of the following exception:"
_BESIDE: Final = "During handling of the above exception, another exception occurred:"


def _chain(
    error: traceback.TracebackException,
) -> list[tuple[traceback.TracebackException, str]]:
    """The causes that led to it, the first one first, each with the sentence that stands behind it."""
    links = [(error, "")]
    while True:
        last = links[-1][0]
        if last.__cause__ is not None:
            links.append((last.__cause__, _CAUSED))
        elif last.__context__ is not None and not last.__suppress_context__:
            links.append((last.__context__, _BESIDE))
        else:
            return links[::-1]


# the article


def article_line(event: EventDict) -> str | None:
    """One of the article's four lines; None for any other event."""
    match event:
        case {"event": "ready"}:
            return "websocket服务器启动成功"
        case {"event": "open", "fd": fd}:
            return f"握手成功 fd{fd}"
        case {"event": "message", "fd": fd, "data": data, "opcode": opcode, "fin": fin}:
            if isinstance(data, bytes):
                data = data.decode(errors="backslashreplace")
            return f"接收客户端消息: {fd}:{escape(data)},opcode:{int(opcode)},fin:{int(fin)}"
        case {"event": "close", "fd": fd}:
            return f"客户端 {fd} 关闭"
    return None


def level_number(level: str) -> int:
    """A level as the standard library counts it: `info` is 20."""
    return logging.getLevelNamesMapping()[level.upper()]
