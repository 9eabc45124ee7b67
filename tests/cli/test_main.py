"""`broker.cli.main`: one line and status 2 for a mistake, help, and the default command.

Mistakes are found before anything runs, so they are tested in this process, which is faster.
"""

import socket
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from broker.cli.main import main
from broker.transport.frames import BUILD
from broker.version import VERSION


@pytest.mark.usefixtures("alarm", "logging_restored")
@pytest.mark.parametrize(
    "line, message",
    [
        ("--prt 1", "No such option '--prt': did you mean '--port'?"),
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
        ("pubb", "'pubb' is neither a command nor MODULE:ATTR, such as chat.server:broker; did"),
        ("pubb news 1", "did you mean 'pub'?"),
        ("pbu news 1 --url ws://localhost:9501", "did you mean 'pub'?"),
        ("subscribe news", "did you mean 'sub'?"),
        ("srve --port 1", "did you mean 'serve'?"),
        ("tokens create", "did you mean 'token'?"),
        ("xyzzy 1 2", "; commands are serve, pub, sub, push, history, presence, request, conn"),
        ("conections", "did you mean 'connections'?"),
        ("conections --user ann --limit 5", "did you mean 'connections'?"),
        ("disconect 7 --code 4000", "did you mean 'disconnect'?"),
        ("histroy news --limit 3", "did you mean 'history'?"),
        ("stat", "did you mean 'stats'?"),
        ("chat.py", "such as chat.server:broker; did you mean 'chat:broker'?"),
        ("serve chat.py", "did you mean 'chat:broker'?"),
        ("serve cli_app_module", "did you mean 'cli_app_module:broker'?"),
        ("config chekc", "No such command 'chekc': did you mean 'check'?"),
        ("config check --config bad.toml", "bad.toml: unknown key 'prt': did you mean 'port'?"),
        ("config show --config no.toml", "no.toml: cannot read it: No such file or directory"),
        (
            "config show --running --config bad.toml",
            "--running asks the broker: leave out bad.toml",
        ),
        ("config show --running", "this needs the broker's api_key: set BROKER_API_KEY, or give"),
        (
            "connections",
            "this needs the broker's api_key: set BROKER_API_KEY, or give it by --api-k",
        ),
        ("connections --closed --app js", "--closed goes with --user alone"),
        ("connections --api-key x --url ws://localhost:1", "cannot connect to ws://localhost:1: "),
        (
            "connections --api-key x --url localhost",
            "'localhost' is not like ws://host:9501 or http",
        ),
        ("connection 0 --api-key x", "'0' is no fd: expected a number from 1 on"),
        ("trace fd:x --api-key x", "'fd:x' is no fd: expected a number from 1 on"),
        ("disconnect --api-key x", "give the fds to close, or --user"),
        ("disconnect 7 --user ann --api-key x", "give the fds to close, or --user"),
        ("pub news 1 --tag a", "'a' is not like NAME=VALUE"),
        ("pub news 1 --tag a=b", "--tag is for backends: it needs --api-key, or BROKER_API_KEY"),
        ("pub news 1 --key k --count 2", "--key makes all publications one: leave out --count"),
        ("pub news 1 --rate 0", "0.0 is not in the range x>0"),
        ("pub news 1 --ca no.pem", "no.pem: cannot read it: No such file or directory"),
        ("pub news 1 --ca bad.toml", "bad.toml: no certificates in PEM"),
        ("sub news --since 1 --history 1", "--since and --history: give one of them"),
        ("sub news.* --history 1", "--since and --history are for one topic, without a --group"),
        ("sub news --since 1 --group g", "--since and --history are for one topic, without a"),
        ("--port 0 subb news", "did you mean 'sub'?"),
        ("serve --port 0 pub news 1", "'pub' is a command: its name comes before all options"),
        ("--port 0 sub news", "'sub' is a command: its name comes before all options"),
        ("chat:broker more", "Got unexpected extra argument (more)"),
        ("token craete", "No such command 'craete': did you mean 'create'?"),
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
        ("push x 1", "Invalid value for 'FD': 'x' is no fd: expected a number from 1 on"),
        ("push 0 1", "Invalid value for 'FD': '0' is no fd: expected a number from 1 on"),
        ("sub news --url localhost", "'localhost' is not like ws://host:9501"),
        ("sub news --url ws://localhost:1", "cannot connect to ws://localhost:1: "),
        ("pub news 1 --url ws://localhost:1", "start a broker there, or name another with --url"),
        ("push 1 1 --url ws://localhost:1", "cannot connect to ws://localhost:1: "),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    here: Path, line: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "cli_app_module", raising=False)  # of the case before
    (here / "bad.toml").write_text("prt = 1")
    (here / "cli_app_module.py").write_text("number = 1")
    result = CliRunner().invoke(main, line.split())
    assert result.exit_code == 2
    errors = result.stderr.splitlines()
    assert errors[-1].startswith("Error: ")
    assert message in errors[-1]
    assert len(errors) == 1
    assert result.stdout == ""


@pytest.mark.usefixtures("alarm", "logging_restored")
def test_a_taken_port_is_one_line_and_status_2() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = CliRunner().invoke(main, ["--host", "127.0.0.1", "--port", str(port)])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"Error: port {port} on 127.0.0.1 is already in use: ")
    assert result.stderr.count("\n") == 1
    assert "--port" in result.stderr


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


@pytest.mark.parametrize("command", [(), ("serve",), ("pub",), ("token",), ("token", "create")])
def test_h_is_help(command: tuple[str, ...]) -> None:
    short, long = (CliRunner().invoke(main, [*command, flag]) for flag in ("-h", "--help"))
    assert short.exit_code == long.exit_code == 0
    assert short.stdout == long.stdout
    assert short.stdout.startswith("Usage: ")


def test_ctrl_c_is_status_130_and_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    def interrupted() -> None:
        raise BaseExceptionGroup("", [BaseExceptionGroup("", [KeyboardInterrupt()])])

    monkeypatch.setitem(main.commands, "interrupted", interrupted)
    result = CliRunner().invoke(main, ["interrupted"])
    assert (result.exit_code, result.output) == (130, "")


def test_version_is_printed() -> None:
    result = CliRunner().invoke(main, ["--version"])
    assert result.exit_code == 0
    assert result.stdout == f"trio-broker, version {VERSION} ({BUILD})\n"


@pytest.mark.usefixtures("logging_restored")
@pytest.mark.parametrize("group", ["config", "token", "engine"])
def test_a_group_without_a_command_shows_its_help(group: str) -> None:
    result = CliRunner().invoke(main, [group])
    assert result.exit_code == 2
    assert result.output.startswith("Usage: ")
    assert "Error" not in result.output
    assert "\nCommands:\n" in result.output
