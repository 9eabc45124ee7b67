"""`broker.logs.setup`: what is written where in the three formats, and what an embedding app keeps."""

import io
import json
import logging
import os
import sys
import threading
import warnings
from typing import TextIO

import pytest
import structlog

from broker import logs
from broker.config.settings import LogFormat
from broker.core.messages import Initiator
from broker.logs import LogStatistics, limiter, writer

PATIENCE = 20.0


def pipe() -> tuple[TextIO, TextIO]:
    """The end to read and the end to write, which stands for stderr."""
    read, write = os.pipe()
    return os.fdopen(read, encoding="utf-8"), os.fdopen(write, "w", encoding="utf-8")


class ReadAll:
    """Reads a pipe to its end, in a thread."""

    def __init__(self, reader: TextIO) -> None:
        self._text = ""
        self._thread = threading.Thread(target=self._run, args=(reader,))
        self._thread.start()

    def _run(self, reader: TextIO) -> None:
        self._text = reader.read()

    def all(self) -> str:
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        return self._text


pytestmark = pytest.mark.usefixtures("logging_restored")


def test_console_writes_one_line_per_event_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("console", "info")
    log = structlog.get_logger()
    log.info("close", fd=7, code=1000, initiator=Initiator.CLIENT)
    log.debug("message", fd=7, data="hidden")
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert "close" in line
    assert "fd=7 code=1000 initiator='client'" in line.replace("  ", "")
    assert "\x1b" not in line  # not a terminal, so no colours


def test_console_says_ready_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("console", "info")
    structlog.get_logger().info("ready", addresses=["wss://127.0.0.1:9501", "wss://[::1]:9501"])
    assert (
        "Broker ready on wss://127.0.0.1:9501, wss://[::1]:9501 "
        "(chat page: https://127.0.0.1:9501/) - stop with Ctrl-C"
    ) in capsys.readouterr().err
    structlog.get_logger().info("ready", addresses=["unix:/run/b.sock"])
    assert "Broker ready on unix:/run/b.sock - stop with Ctrl-C" in capsys.readouterr().err


def test_json_writes_one_object_per_line_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("json", "debug")
    structlog.get_logger().debug("message", fd=1, data="a\nb", initiator=Initiator.SLOW)
    try:
        raise ValueError("in a hook")
    except ValueError:
        structlog.get_logger().error("hook_failed", hook="on_open", fd=1, exc_info=True)
    out, err = capsys.readouterr()
    assert out == ""
    message, failed = map(json.loads, err.splitlines())
    assert message["event"] == "message"
    assert message["level"] == "debug"
    assert message["data"] == "a\nb"
    assert message["initiator"] == "slow"
    assert failed["exception"].endswith("ValueError: in a hook")


def test_article_writes_its_four_lines_to_stdout_and_no_others(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logs.configure("article", "info")
    log = structlog.get_logger()
    log.info("ready", addresses=["ws://127.0.0.1:9501"])
    log.info("open", fd=1, peer="127.0.0.1", path="/")
    log.debug("message", fd=1, data="client：hello，服务端", opcode=1, fin=True)
    log.info("close", fd=1, code=1000, reason="", initiator="client", undelivered=0)
    log.info("stopping")
    log.debug("anything")
    out, err = capsys.readouterr()
    assert out == (
        "websocket服务器启动成功\n"
        "握手成功 fd1\n"
        "接收客户端消息: 1:client：hello，服务端,opcode:1,fin:1\n"
        "客户端 1 关闭\n"
    )
    assert err == ""


def test_article_shows_why_a_page_was_refused(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("article", "info")
    log = structlog.get_logger()
    log.info("refused", status=400, reason="not HTTP", peer="127.0.0.1:1")
    log.info("refused", status=403, reason="origin not allowed: null", peer="127.0.0.1:2")
    log.info("connected", fd=1, user="ann")
    out, err = capsys.readouterr()
    assert out == ""
    [line] = err.splitlines()
    assert "origin not allowed: null" in line


def test_article_still_tells_of_trouble_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("article", "info")
    structlog.get_logger().warning("exposed", host="0.0.0.0")
    out, err = capsys.readouterr()
    assert out == ""
    assert "exposed" in err


def test_article_is_utf8_and_flushed_whatever_the_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    logs.configure("article", "info")
    structlog.get_logger().info("open", fd=3)
    assert raw.getvalue() == "握手成功 fd3\n".encode()


@pytest.mark.parametrize("log_format", ["console", "json", "article"])
def test_other_libraries_are_heard_from_warning_on(
    log_format: LogFormat, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure(log_format, "debug")
    logging.getLogger("hypercorn.error").info("not this")
    logging.getLogger("hypercorn.error").warning("but %s", "this")
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert "but this" in line
    assert "hypercorn.error" in line


def test_other_libraries_are_limited_by_logger(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("json", "info", clock=lambda: 100.0)
    for number in range(3):
        logging.getLogger("trio.serve_listeners").error("accept failed %d", number)
        logging.getLogger("hypercorn.error").error("something %d", number)
    events = [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()]
    assert events == ["accept failed 0", "something 0"]


def test_a_log_that_cannot_be_written_fails_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError

    closed = io.StringIO()
    closed.close()
    logs.configure("console", "info")
    for stream in (Broken(), closed):
        monkeypatch.setattr(sys, "stderr", stream)
        structlog.get_logger().info("open", fd=1)


def test_a_terminal_that_is_not_utf8_gets_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(raw, encoding="ascii", errors="strict"))
    logs.configure("console", "info")
    structlog.get_logger().info("open", user="服务")
    assert b"user='\\u670d\\u52a1'" in raw.getvalue()


def test_the_article_is_not_limited_and_other_formats_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    log = structlog.get_logger()
    cases: list[tuple[LogFormat, int]] = [("article", 100), ("console", 5)]
    for log_format, opens in cases:
        logs.configure(log_format, "info", clock=lambda: 100.0)
        for fd in range(100):
            log.info("open", fd=fd)
        out, err = capsys.readouterr()
        assert len((out if log_format == "article" else err).splitlines()) == opens


def test_an_end_says_how_many_lines_were_swallowed(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("json", "info", clock=lambda: 100.0)
    for fd in range(5000):
        structlog.get_logger().info("open", fd=fd)
    assert logs.flush()
    *opens, last = map(json.loads, capsys.readouterr().err.splitlines())
    assert [line["event"] for line in opens] == ["open"] * 5
    assert (last["event"], last["name"], last["count"]) == ("lines_swallowed", "open", 4995)
    assert last["level"] == "info"


@pytest.mark.parametrize("stream", [None, "closed"])
@pytest.mark.parametrize("log_format", ["console", "json", "article"])
def test_no_stream_is_no_error(
    log_format: LogFormat, stream: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = None
    if stream == "closed":
        gone = io.TextIOWrapper(io.BytesIO())
        gone.close()
    monkeypatch.setattr(sys, "stderr", gone)
    monkeypatch.setattr(sys, "stdout", gone)
    logs.configure(log_format, "debug")
    structlog.get_logger().info("ready", addresses=["ws://127.0.0.1:9501"])
    structlog.get_logger().error("hook_failed", fd=1)
    logging.getLogger("hypercorn.error").error("this")
    assert logs.flush()


def test_a_pipe_that_nobody_reads_delays_nobody_and_is_told_what_it_missed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reader, stderr = pipe()
    with reader:
        with stderr:
            monkeypatch.setattr(sys, "stderr", stderr)
            logs.configure("json", "debug")
            for number in range(20_000):
                structlog.get_logger().debug("message", number=number)
            structlog.get_logger().error("hook_failed", fd=1)
            before = logs.statistics()
            assert before.lines_dropped > 10_000
            assert before.waiting_bytes > 0
            assert not logs.flush(0)
            read = ReadAll(reader)
            assert logs.flush(PATIENCE)
            logs.release()
        lines = [json.loads(line) for line in read.all().splitlines()]
    told = [line for line in lines if line["event"] == "log_lines_dropped"]
    assert sum(line["count"] for line in told) == before.lines_dropped
    numbers = [line["number"] for line in lines if line["event"] == "message"]
    assert numbers == list(range(20_000 - before.lines_dropped))
    assert [line["event"] for line in lines[-2:]] == ["hook_failed", "log_lines_dropped"]
    assert logs.statistics() == LogStatistics(lines_dropped=0, waiting_bytes=0)


def test_a_stalled_stdout_does_not_keep_warnings_from_stderr(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unread, stdout = pipe()
    reader, stderr = pipe()
    with unread, reader, stdout, stderr:
        monkeypatch.setattr(sys, "stdout", stdout)
        monkeypatch.setattr(sys, "stderr", stderr)
        logs.configure("article", "info")
        for fd in range(10_000):
            structlog.get_logger().info("open", fd=fd)
        structlog.get_logger().warning("exposed")
        assert "exposed" in reader.readline()
        unread.close()  # lets the thread go, with a broken pipe


def test_a_storm_that_has_ended_is_counted_without_another_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reader, stderr = pipe()
    with reader, stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        monkeypatch.setattr(limiter, "SECOND", 0.02)
        monkeypatch.setattr(writer, "IDLE_SECONDS", 0.03)
        logs.configure("json", "info")
        for fd in range(5000):
            structlog.get_logger().info("open", fd=fd)
        told, opens = 0, 0
        while told + opens < 5000:
            line = json.loads(reader.readline())
            opens += line["event"] == "open"
            told += line.get("swallowed", line.get("count", 0))
        assert told + opens == 5000


def test_threads_begin_with_the_first_line_and_end_with_release(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def ours() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("log ")]

    reader, stderr = pipe()
    with reader, stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        logs.configure("json", "info")
        assert ours() == []
        structlog.get_logger().info("open", fd=1)
        assert ours() == ["log stderr"]
        logs.release()
        assert ours() == []
        structlog.reset_defaults()
        logs.configure_if_unset("json", "info")
        structlog.get_logger().info("open", fd=2)
        assert ours() == []
        assert [json.loads(reader.readline())["fd"] for _ in range(2)] == [1, 2]


def test_a_forked_child_writes_its_own_lines_and_not_its_parents(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reader, stderr = pipe()
    with reader, stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        logs.configure("json", "info")
        structlog.get_logger().info("before")
        assert logs.flush(PATIENCE)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
            child = os.fork()
        if child == 0:
            structlog.get_logger().info("in_child")
            logs.flush(PATIENCE)
            os._exit(0)
        os.waitpid(child, 0)
        structlog.get_logger().info("after")
        events = [json.loads(reader.readline())["event"] for _ in range(3)]
        assert events == ["before", "in_child", "after"]


def test_a_line_may_be_logged_while_one_is_logged(capsys: pytest.CaptureFixture[str]) -> None:
    class Nosy:
        def __repr__(self) -> str:
            structlog.get_logger().warning("within")
            return "nosy"

    logs.configure("console", "info")
    structlog.get_logger().warning("around", value=Nosy())
    first, second = capsys.readouterr().err.splitlines()
    assert "within" in first
    assert "around" in second


def test_a_librarys_wrong_arguments_fail_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("console", "info")
    logging.getLogger("a.library").warning("number %d", "x")
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be formatted" in line
    assert "test_setup.py" in line


def test_warnings_and_exceptions_that_nobody_can_catch_are_logged(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Bad:
        def __del__(self) -> None:
            raise ValueError("in a finalizer\nforged")

    before = sys.unraisablehook
    logs.configure("console", "info")
    logs.capture_strays()
    Bad()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)
        logging.captureWarnings(True)
        warnings.warn("never\nawaited", RuntimeWarning, stacklevel=1)
    err = capsys.readouterr().err
    assert "exception_ignored" in err
    assert "Bad.__del__" in err
    assert "    ValueError: in a finalizer\\nforged\n" in err
    assert "RuntimeWarning: never\\nawaited" in err
    logs.release()
    assert sys.unraisablehook is before


@pytest.mark.parametrize("own", [True, False])
def test_a_reload_changes_only_a_setup_of_ours(
    own: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    if own:
        structlog.configure(
            processors=[structlog.processors.KeyValueRenderer()],
            logger_factory=structlog.PrintLoggerFactory(),
        )
    else:
        logs.configure("console", "info")
    logs.reconfigure("json", "debug")
    structlog.get_logger().debug("message", fd=1)
    out, err = capsys.readouterr()
    assert (out != "", err != "") == (own, not own)
    assert own or json.loads(err)["event"] == "message"


def test_an_embedding_program_keeps_its_own_logging() -> None:
    structlog.configure(processors=[structlog.processors.JSONRenderer()])
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    before = structlog.get_config()
    logs.configure_if_unset("console", "info")
    assert structlog.get_config() == before
    structlog.reset_defaults()
    logs.configure_if_unset("console", "info")
    assert structlog.get_config()["processors"] != before["processors"]
    assert (root.handlers, root.level) == (handlers, level)
