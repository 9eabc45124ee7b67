"""`broker.logs.rendering`: a line is what we say, whatever a peer has sent."""

import json
import logging

import pytest
import structlog

from broker import logs
from broker.config.settings import LogFormat
from broker.logs.rendering import MAX_DEPTH, MAX_GROUP, format_exception

pytestmark = pytest.mark.usefixtures("logging_restored")

FORGED = "\n12:00:00 [info     ] open    fd=1\r\x1b[2J\x9b2J\u2028\u202e\x07"
RAW = "\r\x1b\x9b\u2028\u202e\x07"
"""Characters that a line must not hold; its own end is looked at apart."""


@pytest.mark.parametrize(
    "data, shown",
    [
        ("two\nlines\r", "two\\nlines\\r"),
        ("\x1b[2J\x07", "\\x1b[2J\\x07"),
        ("\u2028\u202e", "\\u2028\\u202e"),
        ("全角\u3000空格", "全角\u3000空格"),
        (b"\xff\x00a", "\\xff\\x00a"),
    ],
)
def test_a_peer_cannot_forge_an_article_line(
    data: str | bytes, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure("article", "info")
    structlog.get_logger().debug("message", fd=1, data=data, opcode=2, fin=True)
    assert capsys.readouterr().out == f"接收客户端消息: 1:{shown},opcode:2,fin:1\n"


@pytest.mark.parametrize("event", ["open", "message", "close"])
def test_an_apps_own_event_of_that_name_is_no_article_line(
    event: str, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure("article", "info")
    structlog.get_logger().warning(event, door="left")
    out, err = capsys.readouterr()
    assert out == ""
    assert "door='left'" in err


class Hostile:
    def __repr__(self) -> str:
        return FORGED


class Broken:
    def __repr__(self) -> str:
        raise ValueError(FORGED)


@pytest.mark.parametrize("log_format", ["console", "json", "article"])
@pytest.mark.parametrize(
    "event, fields",
    [
        ("refused", {"reason": FORGED}),
        (FORGED, {}),
        ("x", {FORGED: 1}),
        ("x", {"logger": FORGED}),
        ("x", {"logger_name": FORGED}),
        ("x", {"exception": FORGED}),
        ("x", {"stack": FORGED}),
        ("x", {"data": FORGED.encode()}),
        ("x", {"data": [FORGED, {FORGED: (FORGED,)}]}),
        ("x", {"data": ValueError(FORGED)}),
        ("x", {"data": Hostile()}),
        ("x", {"data": [Hostile()]}),
    ],
)
def test_nothing_of_a_peers_forges_a_line(
    log_format: LogFormat,
    event: str,
    fields: dict[str, object],
    capsys: pytest.CaptureFixture[str],
) -> None:
    logs.configure(log_format, "info")
    structlog.get_logger().warning(event, **fields)
    out, err = capsys.readouterr()
    assert out == ""
    _, *rest = err.splitlines()
    assert all(line.startswith("    ") for line in rest)
    assert not set(err) & set(RAW)


def test_a_repr_that_raises_fails_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("console", "info")
    structlog.get_logger().warning("x", data=Broken())
    assert "<Broken: its repr raised ValueError>" in capsys.readouterr().err


@pytest.mark.parametrize("log_format", ["console", "json", "article"])
@pytest.mark.parametrize("level", ["warning", "exception"])
def test_nothing_that_other_libraries_pass_on_forges_a_line(
    log_format: LogFormat, level: str, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure(log_format, "info")
    foreign = logging.getLogger(f"wsproto{FORGED}")
    try:
        raise ValueError(FORGED)
    except ValueError:
        getattr(foreign, level)("bad header %s", FORGED)
    out, err = capsys.readouterr()
    assert out == ""
    first, *rest = err.splitlines()
    assert "bad header" in first
    assert all(line.startswith("    ") for line in rest)
    assert not set(err) & set(RAW)


def cause() -> Exception:
    try:
        try:
            raise KeyError(FORGED)
        except KeyError as error:
            raise ValueError(FORGED) from error
    except ValueError as error:
        return error


def context() -> Exception:
    try:
        try:
            raise KeyError(FORGED)
        finally:
            raise ValueError(FORGED)
    except ValueError as error:
        return error


def noted() -> Exception:
    error = ValueError("x")
    error.add_note(FORGED)
    return error


def of_code() -> Exception:
    try:
        compile(f"'''{FORGED}''' = = 1", FORGED, "exec")
    except SyntaxError as error:
        return error
    raise AssertionError


class Unprintable(Exception):
    def __str__(self) -> str:
        raise ValueError(FORGED)


@pytest.mark.parametrize(
    "error",
    [
        ValueError(FORGED),
        cause(),
        context(),
        noted(),
        of_code(),
        Unprintable(),
        OSError(2, FORGED, FORGED),
        type(f"E{FORGED}", (Exception,), {})("x"),
        AttributeError(FORGED, name=FORGED, obj=1),
        ExceptionGroup(FORGED, [ValueError(FORGED), ExceptionGroup(FORGED, [cause()])]),
    ],
    ids=lambda error: type(error).__name__[:20].partition("\n")[0],
)
@pytest.mark.parametrize("log_format", ["console", "json", "article"])
def test_nothing_in_an_exception_forges_a_line(
    log_format: LogFormat, error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure(log_format, "info")
    try:
        raise error
    except Exception:  # noqa: BLE001 - whatever it is
        structlog.get_logger().exception("hook_failed", hook="message", fd=1)
    out, err = capsys.readouterr()
    assert out == ""
    if log_format == "json":
        (line,) = err.splitlines()
        lines = json.loads(line)["exception"].splitlines()
    else:
        first, *lines = err.splitlines()
        assert "hook_failed" in first
    assert "Traceback (most recent call last):" in lines[0]
    assert all(line.startswith("    ") for line in lines)
    assert not set(err) & set(RAW)
    assert any("test_rendering.py" in line for line in lines)


def test_a_traceback_keeps_its_lines_and_says_what_python_says() -> None:
    error = cause()
    told = format_exception((type(error), error, error.__traceback__)).splitlines()
    assert told[0] == "    Traceback (most recent call last):"
    assert told[1].startswith("      File ")
    assert told[2] == "        raise KeyError(FORGED)"
    direct = "    The above exception was the direct cause of the following exception:"
    assert told.count(direct) == 1
    assert told.index(direct) < told.index("        raise ValueError(FORGED) from error")


def test_no_exception_is_said_to_be_none() -> None:
    assert format_exception((None, None, None)) == "    no exception"


def test_a_crowd_of_exceptions_is_cut() -> None:
    deep: Exception = ValueError("deepest")
    for _ in range(2 * MAX_DEPTH):
        deep = ExceptionGroup("deep", [deep])
    wide = ExceptionGroup("wide", [ValueError("one") for _ in range(1000)])
    told = format_exception((ExceptionGroup, ExceptionGroup("", [deep, wide]), None))
    assert told.count("ValueError: one") == MAX_GROUP
    assert "deepest" not in told
    assert f"{MAX_GROUP} of 1000" in told
