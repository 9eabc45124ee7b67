"""The output of pub, sub, push and bench: text of one line, whatever peers have sent."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
import trio
from click.testing import CliRunner

from broker.cli.bench import BenchFailed
from broker.cli.main import main
from broker.cli.output import publication_as_json, publication_as_text
from broker.cli.running import EscapedLines, run_as_client
from broker.client.testing import handshake_by_hand, server_frame
from broker.core.messages import ClientInfo, Publication
from broker.errors import CannotConnect, ClientError, ConnectionLost, RequestFailed, Unavailable

# C0, DEL, C1 (0x9b begins a command to a terminal as ESC [ does), line ends, directions.
NASTY = "\x1b[2J\x07\r\n\x7f\x9b31m\u0085\u2028\u2029\u202e\u2066\u200b 张三 👩‍👩‍👧"
RAW = [*map(chr, range(0x20)), *map(chr, range(0x7F, 0xA0)), "\u2028", "\u2029", "\u202e", "\u2066"]


def is_clean(line: str) -> bool:
    return not any(character in line for character in RAW)


def nasty_publication() -> Publication:
    data = json.dumps({NASTY: [NASTY, 1]}, ensure_ascii=False).encode()
    info = ClientInfo(NASTY, NASTY)
    return Publication(NASTY, data, info, 7, 9, {NASTY: NASTY})


def test_a_publication_is_one_clean_line_of_text_with_json_that_says_the_same() -> None:
    line = publication_as_text(nasty_publication())
    assert is_clean(line)
    assert "张三 👩‍👩‍👧" in line
    data = line[line.index(" 7 {") + 3 :]
    assert json.loads(data) == {NASTY: [NASTY, 1]}


def test_a_publication_as_json_is_one_clean_line_that_says_the_same() -> None:
    line = publication_as_json(nasty_publication())
    assert is_clean(line)
    assert json.loads(line) == {
        "topic": NASTY,
        "offset": 7,
        "data": {NASTY: [NASTY, 1]},
        "time": 9,
        "tags": {NASTY: NASTY},
        "client": NASTY,
        "user": NASTY,
    }


@pytest.mark.parametrize(
    "data, value",
    [
        (b'"\\ud83d"', "\ud83d"),
        (b'[\t"\\ud83d\\n",\r1 ]', ["\ud83d\n", 1]),
        (b'"\\ud83d \xc2\x9b"', "\ud83d \x9b"),
        (b"1e999", float("inf")),
        (b'{ "a" :\t1 }', {"a": 1}),
    ],
)
@pytest.mark.parametrize("form", [publication_as_text, publication_as_json])
def test_any_data_is_one_clean_line_of_json(
    form: Callable[[Publication], str], data: bytes, value: object
) -> None:
    line = form(Publication("t", data, None, 1))
    assert is_clean(line)
    if form is publication_as_json:
        assert json.loads(line)["data"] == value
    else:
        assert json.loads(line.removeprefix("t 1 ")) == value


@pytest.mark.parametrize(
    "error, status",
    [
        (RequestFailed(103, NASTY), 1),
        (RequestFailed(100, NASTY, temporary=True), 1),
        (Unavailable(3500, NASTY), 1),
        (ConnectionLost(3500, NASTY), 1),
        (BenchFailed(NASTY), 1),
        (CannotConnect(NASTY), 2),
        (ClientError(NASTY), 2),
        (ExceptionGroup("", [Unavailable(3500, NASTY)]), 1),
    ],
)
def test_an_error_of_a_peers_making_is_one_clean_line(error: Exception, status: int) -> None:
    async def fail(_: None) -> None:
        raise error

    with pytest.raises(click.ClickException) as caught:
        run_as_client(fail, None)
    line = caught.value.format_message()
    assert is_clean(line)
    assert "张三" in line
    assert caught.value.exit_code == status


@pytest.mark.parametrize(
    "command", ["pub a\udcff 1", "pub a \udcff", "push 1 \udcff", "sub \udcff"]
)
def test_arguments_that_are_no_text_are_one_clean_line(command: str) -> None:
    result = CliRunner().invoke(main, command.split())
    assert result.exit_code == 2
    [line] = result.stderr.splitlines()
    assert "is not UTF-8" in line


def test_data_that_is_nested_too_deeply_is_one_line() -> None:
    result = CliRunner().invoke(main, ["pub", "a", "[" * 10_000 + "]" * 10_000])
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("Error: ")


# As processes, against servers that mean harm.

ROOT = Path(__file__).parents[2]
CLOSE = server_frame(b"\x0d\xac" + NASTY.encode()[:60], 0x88)
ERROR = json.dumps({"code": 103, "message": NASTY}, ensure_ascii=False).encode()
SERVERS: dict[str, tuple[bytes, ...]] = {
    "a Close": (CLOSE,),
    "a refusal of the connection": (server_frame(b'{"id":1,"error":' + ERROR + b"}"),),
    "a refusal of the request": (
        server_frame(b'{"id":1,"connect":{"client":"1"}}'),
        server_frame(b'{"id":2,"error":' + ERROR + b"}"),
    ),
    "a disconnect": (
        server_frame(
            b'{"push":{"disconnect":'
            + json.dumps({"code": 3500, "reason": NASTY}, ensure_ascii=False).encode()
            + b"}}"
        ),
    ),
}


async def run_against(
    frames: tuple[bytes, ...], *command: str
) -> "subprocess.CompletedProcess[bytes]":
    """The output of a command when a server answers one command with one frame."""

    async def serve(stream: trio.SocketStream) -> None:
        try:
            await handshake_by_hand(stream)
            for frame in frames:
                await stream.receive_some(1000)
                await stream.send_all(frame)
            await stream.send_eof()
            while await stream.receive_some(1000):
                pass
        except trio.BrokenResourceError:
            pass  # it has what it wanted

    async with trio.open_nursery() as nursery:
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, serve, [listener])
        port = listener.socket.getsockname()[1]
        with trio.fail_after(30):
            done = await trio.run_process(
                [sys.executable, "-m", "broker", *command, "--url", f"ws://127.0.0.1:{port}"],
                capture_stdout=True,
                capture_stderr=True,
                check=False,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
        nursery.cancel_scope.cancel()
    return done


@pytest.mark.parametrize("name", SERVERS)
@pytest.mark.parametrize("command", [("pub", "a", "1"), ("sub", "a"), ("bench", "--sub", "1")])
async def test_the_word_of_a_hostile_server_is_one_clean_line_and_status_1(
    command: tuple[str, ...], name: str
) -> None:
    done = await run_against(SERVERS[name], *command)
    assert done.stdout == b""
    [line] = done.stderr.decode().splitlines()
    assert line.startswith("Error: ")
    assert is_clean(line)
    assert done.returncode == 1


async def test_publications_are_printed_clean_on_a_terminal_that_is_not_utf8(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    pub = {"push": {"channel": "a", "pub": {"data": NASTY, "offset": 1}}}
    end = b'{"code":2000,"reason":"\\u001b[2J"}'
    done = await run_against(
        (
            server_frame(b'{"id":1,"connect":{"client":"1"}}'),
            server_frame(b'{"id":2,"subscribe":{}}')
            + server_frame(json.dumps(pub, ensure_ascii=False).encode())
            + server_frame(b'{"push":{"channel":"a","unsubscribe":' + end + b"}}"),
        ),
        *("sub", "a"),
    )
    [line] = done.stdout.decode("latin-1").splitlines()
    assert is_clean(line)
    assert line.startswith('a 1 "')
    [line] = done.stderr.decode("latin-1").splitlines()
    assert is_clean(line)
    assert line.endswith(r"\x1b[2J (2000)")
    assert done.returncode == 1


def test_the_log_of_a_client_command_is_clean(capsys: pytest.CaptureFixture[str]) -> None:

    record = logging.LogRecord("broker.client", logging.INFO, "", 1, "lost: %s", (NASTY,), None)
    assert is_clean(EscapedLines("%(message)s").format(record))


# bench reads bytes itself.
