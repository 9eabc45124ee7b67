"""Logs: three formats, nothing forged by a peer, a lid on repetition."""

import io
import json
import logging
import sys

import pytest
import structlog

from broker import logs
from broker.config.settings import LogFormat
from broker.core.messages import Initiator


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


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


def test_a_peer_cannot_forge_a_console_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("console", "info")
    structlog.get_logger().info("open", fd=1, path="/\n\x1b[2J")
    logging.getLogger("wsproto").warning("bad header %s", "\n\x1b[2J")
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 2
    assert "\x1b" not in err


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


def test_warnings_of_one_name_pass_once_a_second_and_say_how_many_did_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = Clock()
    logs.configure("json", "info", clock=clock)
    log = structlog.get_logger()

    def written() -> list[tuple[str, int | None]]:
        lines = map(json.loads, capsys.readouterr().err.splitlines())
        return [(line["event"], line.get("swallowed")) for line in lines]

    for _ in range(5):
        log.warning("accept_failed")
        log.info("refused", status=400)  # strangers cause it, so it is limited at any level
        log.info("open")
    assert written() == [("accept_failed", None), ("refused", None), *[("open", None)] * 5]
    clock.now += 0.999
    log.warning("accept_failed")
    assert written() == []
    clock.now += 0.001
    log.warning("accept_failed")
    log.warning("accept_failed")
    assert written() == [("accept_failed", 5)]
    clock.now += 1
    log.warning("accept_failed")
    assert written() == [("accept_failed", 1)]


def test_two_hooks_that_fail_are_two_names(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("json", "info", clock=Clock())
    for hook in ("on_open", "on_message", "on_open"):
        structlog.get_logger().error("hook_failed", hook=hook, fd=1)
    hooks = [json.loads(line)["hook"] for line in capsys.readouterr().err.splitlines()]
    assert hooks == ["on_open", "on_message"]


def test_other_libraries_are_limited_by_logger(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("json", "info", clock=Clock())
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
