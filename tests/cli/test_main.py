"""The command line, as processes of its own: what is printed, and the exit status.

Mistakes that are found before anything runs are tested in this process, which is faster.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import click
import pytest
import trio
from click.testing import CliRunner

from broker.cli.client_commands import _run_as_client
from broker.cli.main import main
from broker.errors import RequestFailed
from broker.version import VERSION

# A process that does not do what a test waits for fails the test, not the whole run.
PATIENCE = 20


@attrs.define(eq=False)
class Running:
    """`python -m broker …` as a process; stderr is read line by line."""

    process: trio.Process
    stdout: bytearray = attrs.field(factory=bytearray)
    stderr: bytearray = attrs.field(factory=bytearray)
    grown: trio.Event = attrs.field(factory=trio.Event)
    ended: int = 0

    async def read(self, stream: trio.abc.ReceiveStream, into: bytearray) -> None:
        async for chunk in stream:
            into += chunk
            self._tell()
        self.ended += 1
        self._tell()

    def _tell(self) -> None:
        self.grown.set()
        self.grown = trio.Event()

    async def wait_for(self, text: str, *, into: str = "stderr") -> str:
        """The first line of stderr (or stdout) that holds `text`."""
        while True:
            for line in bytes(getattr(self, into)).decode().splitlines(keepends=True):
                if text in line and line.endswith("\n"):
                    return line
            if self.ended == 2:
                pytest.fail(f"ended without {text!r} on {into}; stderr: {self.stderr.decode()}")
            await self.grown.wait()

    async def url(self) -> str:
        """Where it listens; needs `--log-format json`."""
        addresses: list[str] = json.loads(await self.wait_for('"ready"'))["addresses"]
        return addresses[0]

    async def stop(self, *signals: signal.Signals) -> int:
        for number in signals:
            self.process.send_signal(number)
        return await self.process.wait()


@asynccontextmanager
async def running(
    *args: str, cwd: Path | None = None, env: dict[str, str] | None = None
) -> AsyncIterator[Running]:
    root = str(Path(__file__).parents[2])
    environ = {**os.environ, "PYTHONPATH": root, **(env or {})}
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            process = await trio.lowlevel.open_process(
                [sys.executable, "-m", "broker", *args],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=cwd,
                env=environ,
            )
            it = Running(process)
            assert process.stdout is not None
            assert process.stderr is not None
            nursery.start_soon(it.read, process.stdout, it.stdout)
            nursery.start_soon(it.read, process.stderr, it.stderr)
            try:
                yield it
            finally:
                process.kill()
                with trio.CancelScope(shield=True):
                    await process.wait()


async def run(*args: str) -> tuple[int, str, str]:
    """Run a command to its end: exit status, stdout, stderr."""
    async with running(*args) as it:
        status = await it.process.wait()
    return status, it.stdout.decode(), it.stderr.decode()


SERVE = ("--port", "0", "--log-format", "json")


# Mistakes


@pytest.fixture
def alarm() -> Iterator[None]:
    """Ends a command that runs in this process and should have failed at once."""

    def ring(*_: object) -> None:
        raise TimeoutError("it serves, or hangs")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(PATIENCE)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    return tmp_path


@pytest.mark.usefixtures("alarm", "logging_restored")
@pytest.mark.parametrize(
    "line, message",
    [
        ("--prt 1", "Did you mean"),
        ("serve --prt 1", "--port"),
        ("--port x", "Invalid value for '--port': 'x' is not a valid integer."),
        ("--port 70000", "port is 70000: must be from 0 to 65535"),
        ("--history-size -1", "topics.history_size is -1: must be at least 0"),
        ("--log-format xml", "Invalid value for '--log-format': 'xml' is not one of"),
        ("--allowed-origin example.com", "allowed_origins holds 'example.com': must be like"),
        ("--tls-cert a.pem", "tls_cert is 'a.pem' but tls_key is not set"),
        (
            "--tls-cert a.pem --tls-key a.key",
            "cannot read a.pem: ",
        ),
        ("--config no.toml", "no.toml: cannot read it: No such file or directory"),
        ("--config bad.toml", "bad.toml: unknown key 'prt': did you mean 'port'?"),
        (
            "pubb",
            "'pubb' is neither a command (serve, pub, push, sub, token, bench) nor MODULE:ATTR",
        ),
        ("--port 0 sub news", "Got unexpected extra argument (news)"),
        ("there:", "'there:' is neither a command"),
        ("nowhere:broker", "'nowhere:broker': there is no module 'nowhere'"),
        ("nowhere.deep:broker", "'nowhere.deep:broker': there is no module 'nowhere'"),
        ("cli_app_module:brokr", "'cli_app_module:brokr': module 'cli_app_module' has no 'brokr'"),
        ("cli_app_module:number", "'cli_app_module:number' is a int: expected a broker.Broker"),
        ("--host a..b", "host is 'a..b': must be a name or an address"),
        (
            "--host 203.0.113.1 --port 0 --allowed-origin *",
            "cannot listen on 203.0.113.1: ",
        ),
        ("--unix no/such/dir", "cannot listen on unix socket no/such/dir: "),
        ("pub news", "Missing argument 'DATA'. See main pub --help."),
        ("token create --expires 1y", " or never. See main token create --help."),
        ("push x 1", "Invalid value for 'FD': 'x' is not a valid integer"),
        ("push 0 1", "Invalid value for 'FD': 0 is not in the range x>=1"),
        ("sub news --url localhost", "'localhost' is not like ws://host:9501"),
        ("sub news --url ws://localhost:1", "cannot connect to ws://localhost:1: "),
        ("pub news 1 --url ws://localhost:1", "start a broker there, or name another with --url"),
        ("push 1 1 --url ws://localhost:1", "cannot connect to ws://localhost:1: "),
    ],
)
def test_a_mistake_is_one_line_and_status_2(here: Path, line: str, message: str) -> None:
    (here / "bad.toml").write_text("prt = 1")
    (here / "cli_app_module.py").write_text("number = 1")
    result = CliRunner().invoke(main, line.split())
    assert result.exit_code == 2
    errors = result.stderr.splitlines()
    assert errors[-1].startswith("Error: ")
    assert message in errors[-1]
    assert len(errors) == 1
    assert result.stdout == ""


@pytest.mark.parametrize("temporary, end", [(True, "; try again later"), (False, "")])
def test_a_refusal_for_now_says_so_and_not_that_nobody_is_there(temporary: bool, end: str) -> None:
    async def refused(_: None) -> None:
        raise RequestFailed(100, "internal", temporary)

    with pytest.raises(click.ClickException) as caught:
        _run_as_client(refused, None)
    assert caught.value.message == f"100: internal{end}"
    assert caught.value.exit_code == 1


@pytest.mark.usefixtures("alarm", "logging_restored")
def test_a_taken_port_is_one_line_and_status_2() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = CliRunner().invoke(main, ["--host", "127.0.0.1", "--port", str(port)])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"Error: port {port} on 127.0.0.1 is already in use: ")
    assert result.stderr.count("\n") == 1
    assert "--port" in result.stderr


@pytest.mark.usefixtures("alarm", "logging_restored")
def test_a_mistake_inside_the_users_module_keeps_its_traceback(here: Path) -> None:
    (here / "cli_lacks_one.py").write_text("import nowhere_at_all\n")
    result = CliRunner().invoke(main, ["cli_lacks_one:broker"])
    assert isinstance(result.exception, ModuleNotFoundError)
    assert result.exception.name == "nowhere_at_all"


async def test_a_bug_keeps_its_traceback(tmp_path: Path) -> None:
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


# Help


def test_help_tells_of_every_command_and_every_option_of_serve() -> None:
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0
    serve = main.commands["serve"]
    for option in (flag for param in serve.params for flag in param.opts if flag[0] == "-"):
        assert option in result.stdout
    for command in ("serve", "pub", "sub", "push"):
        assert f"  {command} " in result.stdout
    assert "[default: localhost]" in " ".join(result.stdout.split())


def test_version_is_printed() -> None:
    result = CliRunner().invoke(main, ["--version"])
    assert result.exit_code == 0
    assert result.stdout == f"trio-broker, version {VERSION}\n"


# Serving


@pytest.mark.parametrize("command", [(), ("serve",)])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_drains_and_exits_with_0(
    command: tuple[str, ...], number: signal.Signals
) -> None:
    async with running(*command, *SERVE) as it:
        assert (await it.url()).startswith("ws://")
        assert await it.stop(number) == 0
    assert b"Traceback" not in it.stderr
    assert it.stdout == b""


async def test_the_second_signal_ends_it_at_once_with_status_1(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(
        "import sys, trio\n"
        "from broker import Broker\n"
        "class Stubborn(Broker):\n"
        "    async def serve(self):\n"
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


async def test_the_ready_line_names_the_address_and_how_to_stop() -> None:
    async with running("--port", "0") as it:
        line = await it.wait_for("ready")
        assert "Broker ready on ws://" in line
        assert "chat page: http://" in line
        assert "Ctrl-C" in line


async def test_article_prints_its_line_and_nothing_else() -> None:
    async with running("--port", "0", "--log-format", "article") as it:
        await it.wait_for("websocket服务器启动成功\n", into="stdout")
        assert await it.stop(signal.SIGTERM) == 0
    assert it.stdout.decode() == "websocket服务器启动成功\n"
    assert it.stderr == b""


async def test_an_open_bind_is_warned_about() -> None:
    async with running(*SERVE, "--host", "0.0.0.0") as it:
        await it.url()
        assert await it.stop(signal.SIGTERM) == 0
    assert it.stderr.decode().count("neither tokens nor allowed_origins") == 1


async def test_a_users_broker_brings_its_settings_and_options_override_them(
    tmp_path: Path,
) -> None:
    (tmp_path / "app.py").write_text(
        "from broker import Broker\n"
        "from broker import Config\n"
        "broker = Broker(Config(host='host.invalid', port=0, log_format='json'))\n"
        "@broker.on_message\n"
        "async def upper(connection, frame):\n"
        "    broker.publish('heard', frame.data.upper())\n"
    )
    async with running("app:broker", "--host", "127.0.0.1", cwd=tmp_path) as it:
        assert (await it.url()).startswith("ws://127.0.0.1:")


async def test_the_environment_lies_between_file_and_options(tmp_path: Path) -> None:
    file = tmp_path / "broker.toml"
    file.write_text('host = "host.invalid"\nport = 1\nlog_format = "console"\n')
    env = {"BROKER_HOST": "127.0.0.1", "BROKER_PORT": "2", "BROKER_LOG_FORMAT": "json"}
    async with running("--config", str(file), "--port", "0", env=env) as it:
        assert (await it.url()).startswith("ws://127.0.0.1:")


# Client commands


async def test_pub_reaches_sub_and_ctrl_c_ends_sub_with_130() -> None:
    async with running(*SERVE) as broker:
        url = await broker.url()
        async with (
            running("sub", "news.*", "--url", url) as text,
            running("sub", "news.a", "--url", url, "--json") as as_json,
        ):
            # Subscribed when the broker says so; until then what is published is not theirs.
            published = 0
            while b"\n" not in text.stdout or b"\n" not in as_json.stdout:
                published += 1
                assert await run("pub", "news.a", '{"n": [1, 2]}', "--url", url) == (0, "", "")
            line = (await text.wait_for("news.a", into="stdout")).split(" ", 2)
            assert line[0] == "news.a"
            assert 1 <= int(line[1]) <= published
            assert line[2] == '{"n":[1,2]}\n'
            fields = json.loads(await as_json.wait_for("news.a", into="stdout"))
            assert fields["topic"] == "news.a"
            assert fields["data"] == {"n": [1, 2]}
            assert await text.stop(signal.SIGINT) == 130
            assert await as_json.stop(signal.SIGTERM) == 130
            assert text.stderr == as_json.stderr == b""


async def test_data_that_is_not_json_goes_as_a_string() -> None:
    async with running(*SERVE) as broker:
        url = await broker.url()
        async with running("sub", "a", "--url", url) as sub:
            while b"\n" not in sub.stdout:
                assert (await run("pub", "a", "not json\x1b[2J", "--url", url))[0] == 0
            assert (await sub.wait_for("a ", into="stdout")).endswith(' "not json\\u001b[2J"\n')


async def test_what_the_broker_refuses_is_one_line_and_status_1() -> None:
    async with running(*SERVE) as broker:
        url = await broker.url()
        status, out, err = await run("push", "4711", "hello", "--url", url)
        assert (status, out) == (1, "")
        assert err.startswith("Error: push to fd 4711: the broker refused: ")
        assert err.count("\n") == 1
        status, out, err = await run("pub", "news.*", "hello", "--url", url)
        assert (status, out) == (1, "")
        assert err.startswith("Error: publish to 'news.*': the broker refused: ")
