"""`broker.cli.serve`, mostly as a process of its own: start, signals, reload, stop, exit status."""

import fcntl
import json
import os
import signal
import ssl
import subprocess
import sys
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import pytest
import trio
import trustme
from click.testing import CliRunner

from broker.cli.main import main
from broker.testing import Peer, handshake

if TYPE_CHECKING:
    from tests.cli.conftest import Running

    Runner: TypeAlias = Callable[..., AbstractAsyncContextManager[Running]]
    Run: TypeAlias = Callable[..., Awaitable[tuple[int, str, str]]]

SERVE = ("--port", "0", "--log-format", "json")


@pytest.mark.usefixtures("alarm", "logging_restored")
def test_a_mistake_inside_the_users_module_keeps_its_traceback(here: Path) -> None:
    (here / "cli_lacks_one.py").write_text("import nowhere_at_all\n")
    result = CliRunner().invoke(main, ["cli_lacks_one:broker"])
    assert isinstance(result.exception, ModuleNotFoundError)
    assert result.exception.name == "nowhere_at_all"


async def test_a_bug_keeps_its_traceback(tmp_path: Path, running: "Runner") -> None:
    (tmp_path / "app.py").write_text(
        "from broker import Broker\n"
        "class Buggy(Broker):\n"
        "    async def serve(self, **_):\n"
        "        raise OverflowError('a bug')\n"
        "broker = Buggy()\n"
    )
    async with running("app:broker", cwd=tmp_path) as it:
        assert await it.process.wait() == 1
        await it.wait_for("OverflowError: a bug")
    assert b"Traceback" in it.stderr


# Serving


@pytest.mark.parametrize("command", [(), ("serve",)])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_drains_and_exits_with_0(
    command: tuple[str, ...], number: signal.Signals, running: "Runner"
) -> None:
    async with running(*command, *SERVE) as it:
        assert (await it.url()).startswith("ws://")
        assert await it.stop(number) == 0
    assert b"Traceback" not in it.stderr
    assert it.stdout == b""


async def test_the_second_signal_ends_it_at_once_with_status_1(
    tmp_path: Path, running: "Runner"
) -> None:
    (tmp_path / "app.py").write_text(
        "import sys, trio\n"
        "from broker import Broker\n"
        "class Stubborn(Broker):\n"
        "    async def serve(self, *, task_status):\n"
        "        task_status.started([])\n"
        "        print('up', file=sys.stderr, flush=True)\n"
        "        await trio.sleep_forever()\n"
        "    def stop(self):\n"
        "        print('told', file=sys.stderr, flush=True)\n"
        "broker = Stubborn()\n"
    )
    async with running("app:broker", cwd=tmp_path) as it:
        await it.wait_for("up")
        it.process.send_signal(signal.SIGTERM)
        await it.wait_for("told")
        assert await it.stop(signal.SIGTERM) == 1
    assert b"Traceback" not in it.stderr


async def test_the_ready_line_names_the_address_and_how_to_stop(running: "Runner") -> None:
    async with running("--port", "0") as it:
        line = await it.wait_for("ready")
        assert "Broker ready on ws://" in line
        assert "chat page: http://" in line
        assert "Ctrl-C" in line


async def test_article_prints_its_line_and_nothing_else(running: "Runner") -> None:
    async with running("--port", "0", "--log-format", "article") as it:
        await it.wait_for("websocket服务器启动成功\n", into="stdout")
        assert await it.stop(signal.SIGTERM) == 0
    assert it.stdout.decode() == "websocket服务器启动成功\n"
    assert it.stderr == b""


async def test_an_open_bind_is_warned_about(running: "Runner") -> None:
    async with running(*SERVE, "--host", "0.0.0.0") as it:
        await it.url()
        assert await it.stop(signal.SIGTERM) == 0
    assert it.stderr.decode().count("neither tokens nor allowed_origins") == 1


async def test_a_users_broker_brings_its_settings_and_options_override_them(
    tmp_path: Path, running: "Runner"
) -> None:
    (tmp_path / "app.py").write_text(
        "from broker import Broker\n"
        "from broker import Config\n"
        "broker = Broker(Config(host='host.invalid', port=0, log_format='json'))\n"
        "@broker.on_message\n"
        "async def upper(connection, frame):\n"
        "    broker.publish_nowait('heard', frame.data.upper())\n"
    )
    async with running("app:broker", "--host", "127.0.0.1", cwd=tmp_path) as it:
        assert (await it.url()).startswith("ws://127.0.0.1:")


async def test_the_environment_lies_between_file_and_options(
    tmp_path: Path, running: "Runner"
) -> None:
    file = tmp_path / "broker.toml"
    file.write_text('host = "host.invalid"\nport = 1\nlog_format = "console"\n')
    env = {"BROKER_HOST": "127.0.0.1", "BROKER_PORT": "2", "BROKER_LOG_FORMAT": "json"}
    async with running("--config", str(file), "--port", "0", env=env) as it:
        assert (await it.url()).startswith("ws://127.0.0.1:")


# Signals


def app(tmp_path: Path, body: str) -> Path:
    """An app of its own, `app:broker`, with these lines behind the broker."""
    (tmp_path / "app.py").write_text(
        "import os, sys, trio\n"
        "from broker import Broker, Config\n"
        "broker = Broker(Config(host='127.0.0.1', port=0, log_format='json'))\n"
        "def say(text):\n"
        "    os.write(2, text.encode() + b'\\n')\n" + body
    )
    return tmp_path


HANDSHAKE = (
    b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


async def ask_for_websocket(url: str, handshake: bytes = HANDSHAKE) -> trio.SocketStream:
    """Connect and send a handshake; the answer is left to the caller."""
    host, _, port = url.removeprefix("ws://").rpartition(":")
    stream = await trio.open_tcp_stream(host, int(port))
    await stream.send_all(handshake)
    return stream


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_ends_a_start_at_once_with_0(
    running: "Runner", tmp_path: Path, number: signal.Signals
) -> None:
    """Importing the app takes for ever, and is busy."""
    here = app(tmp_path, "say('importing')\nwhile True: pass\n")
    async with running("app:broker", cwd=here) as it:
        await it.wait_for("importing")
        assert await it.stop(number) == 0
    assert b"Traceback" not in it.stderr


async def test_a_signal_ends_a_start_that_waits_for_its_config(
    running: "Runner", tmp_path: Path
) -> None:
    fifo = tmp_path / "broker.toml"
    os.mkfifo(fifo)
    async with running("--config", str(fifo)) as it:
        # Opens only once the other side does, too: from now on it waits for the text.
        number = await trio.to_thread.run_sync(os.open, fifo, os.O_WRONLY)
        try:
            assert await it.stop(signal.SIGTERM) == 0
        finally:
            os.close(number)


async def test_a_signal_ends_a_start_that_has_not_come_to_serve(
    running: "Runner", tmp_path: Path
) -> None:
    here = app(
        tmp_path,
        "class Slow(Broker):\n"
        "    async def serve(self, *, task_status):\n"
        "        say('starting')\n"
        "        await trio.sleep_forever()\n"
        "broker = Slow()\n",
    )
    async with running("app:broker", cwd=here) as it:
        await it.wait_for("starting")
        assert await it.stop(signal.SIGTERM) == 0


UNSHARE = ("unshare", "--pid", "--fork", "--kill-child")


@pytest.fixture
def namespaces() -> None:
    try:
        allowed = subprocess.run([*UNSHARE, "true"], check=False, capture_output=True).returncode
    except FileNotFoundError:
        allowed = 1
    if allowed != 0:
        pytest.skip("needs the right to make a PID namespace")


def only_child(pid: int) -> int:
    """The process that `unshare` has forked: PID 1 in its namespace."""
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


@pytest.mark.usefixtures("namespaces")
@pytest.mark.parametrize("moment", ["importing", "ready"])
async def test_pid_1_obeys_a_signal_from_start_to_end(
    running: "Runner", tmp_path: Path, moment: str
) -> None:
    stop = "while True: pass\n" if moment == "importing" else ""
    here = app(tmp_path, f"say('importing')\n{stop}")
    command = (*UNSHARE, sys.executable, "-m", "broker")
    async with running("app:broker", cwd=here, command=command) as it:
        await it.wait_for(moment)
        os.kill(only_child(it.process.pid), signal.SIGTERM)
        assert await it.process.wait() == 0


BUSY = """
@broker.on_open
async def busy(connection):
    say('busy')
    while True: pass
"""


@pytest.mark.parametrize(
    "signals", [(signal.SIGTERM, signal.SIGINT), (signal.SIGINT, signal.SIGTERM)]
)
async def test_a_second_signal_ends_a_busy_loop_with_1_and_says_where_it_was(
    running: "Runner", tmp_path: Path, signals: tuple[signal.Signals, ...]
) -> None:
    async with running("app:broker", cwd=app(tmp_path, BUSY)) as it:
        async with await ask_for_websocket(await it.url()):
            await it.wait_for("busy\n")
            assert await it.stop(*signals) == 1
    line = json.loads(next(line for line in it.stderr.splitlines() if b'"stuck"' in line))
    assert "app.py:" in line["at"]
    assert line["at"].endswith(" in busy")
    assert b"Traceback" not in it.stderr


async def test_a_second_signal_ends_a_loop_that_lets_no_python_run(
    running: "Runner", tmp_path: Path
) -> None:
    """The hook goes into C code for ever, once the second signal is on its way."""
    deaf = BUSY.replace(
        "say('busy')\n    while True: pass",
        "import signal\n"
        "    handle = signal.getsignal(signal.SIGTERM)\n"
        "    def then_deaf(*args):\n"
        "        handle(*args); handle(*args); say('deaf'); sum(range(10**15))\n"
        "    signal.signal(signal.SIGTERM, then_deaf)\n"
        "    say('busy')\n"
        "    while True: pass",
    )
    async with running("app:broker", cwd=app(tmp_path, deaf)) as it:
        async with await ask_for_websocket(await it.url()):
            await it.wait_for("busy\n")
            assert await it.stop(signal.SIGTERM) == 1
    assert b"deaf" in it.stderr


async def test_a_third_signal_waits_for_nothing(running: "Runner", tmp_path: Path) -> None:
    async with running("app:broker", cwd=app(tmp_path, BUSY)) as it:
        async with await ask_for_websocket(await it.url()):
            await it.wait_for("busy\n")
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
                it.process.send_signal(number)
            assert await it.process.wait() == 1


# Reload


async def test_a_reload_that_hangs_is_told_of_and_a_stop_is_obeyed(
    running: "Runner", tmp_path: Path
) -> None:
    file = tmp_path / "broker.toml"
    file.write_text("port = 0\nlog_format = 'json'\nhost = '127.0.0.1'\n")
    short = (
        "import broker.cli.serve as serve\n"
        "from broker.__main__ import run\n"
        "serve.RELOAD_SECONDS = 0.05\n"
        "run()\n"
    )
    async with running("--config", str(file), command=(sys.executable, "-c", short)) as it:
        await it.url()
        file.unlink()
        os.mkfifo(file)
        it.process.send_signal(signal.SIGHUP)
        failed = json.loads(await it.wait_for("reload_failed"))
        assert failed["detail"] == (
            f"{file}: not read within 0.05 s; the broker goes on with the old config"
        )
        file.unlink()
        file.write_text("port = 0\nmax_topics = 7\n")
        it.stderr.clear()
        it.process.send_signal(signal.SIGHUP)
        # The first read has its thread still: it says so again, and is not in the way of a stop.
        await it.wait_for("reload_failed")
        assert await it.stop(signal.SIGTERM) == 0


@pytest.mark.parametrize("text", ["prt = 1", "port = ", "\x00", "port = 'x'", None, b"\xff"])
async def test_a_reload_of_a_bad_file_changes_nothing(
    running: "Runner", tmp_path: Path, text: str | bytes | None
) -> None:
    file = tmp_path / "broker.toml"
    file.write_text("port = 0\nlog_format = 'json'\nhost = '127.0.0.1'\n")
    async with running("--config", str(file)) as it:
        url = await it.url()
        if text is None:
            file.unlink()
            file.mkdir()
        else:
            file.write_bytes(text.encode() if isinstance(text, str) else text)
        it.process.send_signal(signal.SIGHUP)
        failed = json.loads(await it.wait_for("reload_failed"))
        assert str(file) in failed["detail"]
        assert failed["detail"].endswith("; the broker goes on with the old config")
        async with await ask_for_websocket(url) as peer:
            assert b" 101 " in await peer.receive_some()
        assert await it.stop(signal.SIGTERM) == 0


async def test_a_reload_that_comes_during_the_start_is_kept_for_later(
    running: "Runner", tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    here = app(tmp_path, f"say('importing')\nopen({str(gate)!r}).read()\n")
    file = tmp_path / "broker.toml"
    file.write_text("")
    async with running("--config", str(file), "app:broker", cwd=here) as it:
        await it.wait_for("importing")
        it.process.send_signal(signal.SIGHUP)
        number = await trio.to_thread.run_sync(os.open, gate, os.O_WRONLY)
        os.close(number)
        await it.wait_for('"reloaded"')
        assert await it.stop(signal.SIGTERM) == 0


async def test_a_reload_without_a_file_is_harmless(running: "Runner") -> None:
    async with running(*SERVE) as it:
        url = await it.url()
        it.process.send_signal(signal.SIGHUP)
        await it.wait_for('"reloaded"')
        async with await ask_for_websocket(url) as peer:
            assert b" 101 " in await peer.receive_some()
        assert await it.stop(signal.SIGTERM) == 0


async def test_new_objects_are_looked_at_in_a_process_that_is_the_brokers(
    running: "Runner", tmp_path: Path
) -> None:
    body = """import gc
def look(phase, info):
    if gc.get_threshold()[0] == 5_000 and phase == "start" and info["generation"] == 1:
        looks.append(phase)
        say(f"look {len(looks)}")
looks = []
gc.callbacks.append(look)
"""
    async with running(*SERVE, "app:broker", cwd=app(tmp_path, body)) as it:
        await it.url()
        await it.wait_for("look 2")
        assert await it.stop(signal.SIGTERM) == 0


@pytest.mark.parametrize("moment", ["importing", "ready"])
async def test_the_end_of_its_terminal_is_the_end(
    running: "Runner", tmp_path: Path, moment: str
) -> None:
    stop = "while True: pass\n" if moment == "importing" else ""
    here = app(tmp_path, f"say('importing')\n{stop}")
    master, terminal = os.openpty()
    script = f"import os; os.dup2({terminal}, 0); from broker.__main__ import run; run()"
    command = (sys.executable, "-c", script)
    async with running("app:broker", command=command, cwd=here, pass_fds=(terminal,)) as it:
        os.close(terminal)
        await it.wait_for(moment)
        os.close(master)
        assert await it.stop(signal.SIGHUP) == 0
    assert b"reloaded" not in it.stderr


async def test_a_new_certificate_is_shown_to_those_who_come(
    running: "Runner", tmp_path: Path
) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"

    def issue() -> ssl.SSLContext:
        authority, context = trustme.CA(), ssl.create_default_context()
        authority.configure_trust(context)
        issued = authority.issue_cert("localhost")
        issued.private_key_pem.write_to_path(key)
        issued.cert_chain_pems[0].write_to_path(cert)
        return context

    async def greet(url: str, context: ssl.SSLContext) -> trio.SSLStream[trio.SocketStream]:
        plain = await ask_for_websocket(url.replace("wss:", "ws:"), b"")
        stream = trio.SSLStream(plain, context, server_hostname="localhost", https_compatible=True)
        await stream.send_all(HANDSHAKE)
        assert b" 101 " in await stream.receive_some()
        return stream

    old = issue()
    options = ("--host", "127.0.0.1", "--tls-cert", str(cert), "--tls-key", str(key))
    async with running(*SERVE, *options) as it:
        url = await it.url()
        stays = await greet(url, old)
        new = issue()
        it.process.send_signal(signal.SIGHUP)
        await it.wait_for('"reloaded"')
        await (await greet(url, new)).aclose()
        key.write_text("half of a copy")
        it.process.send_signal(signal.SIGHUP)
        failed = await it.wait_for("reload_failed")
        assert "are not a PEM certificate and its unencrypted key" in failed
        await (await greet(url, new)).aclose()
        await stays.send_all(b"\x81\x82\0\0\0\0hi")
        assert b"this is server" in await stays.receive_some()
        await stays.aclose()
        assert await it.stop(signal.SIGTERM) == 0


# Logs


async def test_a_log_that_nobody_reads_delays_neither_clients_nor_a_stop(
    tmp_path: Path,
) -> None:
    path = tmp_path / "broker.sock"
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    root = Path(__file__).parents[2]
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "broker", "--unix", str(path), "--log-level", "debug"],
        stderr=write,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    os.close(write)
    message = b"\x82\xfe\x40\x00\0\0\0\0" + bytes(0x4000)  # 16 KiB, which debug logs in full
    try:
        with trio.fail_after(60):
            async with trio.lowlevel.FdStream(read) as stream:
                assert b"ready" in await stream.receive_some()  # and from now on nobody reads
                for _ in range(250):
                    async with await trio.open_unix_socket(path) as peer:
                        await peer.send_all(HANDSHAKE + message)
                        heard = b""
                        while not heard.endswith(b"this is server"):
                            heard += await peer.receive_some()
                process.send_signal(signal.SIGTERM)
                assert await process.wait() == 0
    finally:
        process.kill()


@pytest.mark.parametrize(
    "redirection, log_format",
    [
        ("2>&-", "console"),
        ("2>&-", "json"),
        (">&-", "article"),
        ("<&- >&- 2>&-", "article"),
        (">/dev/full 2>/dev/full", "article"),
        ("2>/dev/full", "console"),
    ],
)
async def test_a_closed_or_full_stream_is_no_error(
    running: "Runner", tmp_path: Path, redirection: str, log_format: str
) -> None:
    path = tmp_path / "broker.sock"
    command = ("sh", "-c", f'exec {sys.executable} -m broker "$@" {redirection}', "sh")
    options = ("--unix", str(path), "--log-format", log_format)
    async with running(*options, command=command) as it:
        while True:
            try:
                peer = await trio.open_unix_socket(path)
                break
            except OSError:  # not yet
                await trio.sleep(0.01)
        await peer.send_all(HANDSHAKE)
        assert b" 101 " in await peer.receive_some()
        await peer.aclose()
        assert await it.stop(signal.SIGTERM) == 0
    assert b"Traceback" not in it.stderr


# Ends by an app's own exception


@pytest.mark.parametrize(
    "raised, status",
    [
        ("SystemExit(3)", 3),
        ("SystemExit('no database')", 1),
        ("KeyboardInterrupt", 130),
        ("BaseException('x\\ny')", 1),
    ],
)
async def test_an_exception_that_ends_the_process_is_one_line(
    running: "Runner", tmp_path: Path, raised: str, status: int
) -> None:
    here = app(
        tmp_path,
        "class Ending(Broker):\n"
        "    async def serve(self, *, task_status):\n"
        "        task_status.started([])\n"
        "        async with trio.open_nursery():\n"
        f"            raise {raised}\n"
        "broker = Ending(Config(log_format='json'))\n",
    )
    async with running("app:broker", cwd=here) as it:
        assert await it.process.wait() == status
        ended = json.loads(await it.wait_for('"ended"'))
    assert ended["by"].startswith(raised.partition("(")[0])
    assert "app.py:" in ended["at"]
    assert it.stderr.count(b"\n") == 1


@pytest.mark.parametrize(
    "raised, status", [("SystemExit(3)", 3), ("SystemExit()", 0), ("KeyboardInterrupt()", 130)]
)
async def test_a_hook_that_ends_the_process_has_its_exit_status_and_all_are_told(
    running: "Runner", tmp_path: Path, raised: str, status: int
) -> None:
    here = app(
        tmp_path,
        "broker = Broker(Config(port=0, log_format='json'))\n"
        "@broker.on_message\n"
        "async def end(connection, frame):\n"
        f"    raise {raised}\n",
    )
    async with running("app:broker", cwd=here) as it:
        host, _, port = (await it.url()).removeprefix("ws://").rpartition(":")
        peers = [Peer(await trio.open_tcp_stream(host.strip("[]"), int(port))) for _ in range(3)]
        for peer in peers:
            await peer.send(handshake(host="localhost"))
            await peer.receive_head()
        await peers[0].send_text("x")
        for peer in peers:
            assert await peer.receive_close() == (1001, "shutdown")
            await peer.aclose()
        assert await it.process.wait() == status
        said = json.loads(await it.wait_for('"hook_ended_the_process"'))
    assert (said["hook"], said["fd"], said["error"]) == ("message", 1, raised)
    assert b"Traceback" not in it.stderr
    assert it.stderr.count(b'"level":"critical"') + it.stderr.count(b'"level": "critical"') == 2
