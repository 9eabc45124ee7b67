"""What systemd and a service tell each other; with systemd's own tools where they are installed."""

import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeAlias

import pytest
import trio

from broker.cli.systemd import Notifier, take_listen_fds
from tests.ports import free_port

if TYPE_CHECKING:
    from tests.cli.conftest import Running

    Runner: TypeAlias = Callable[..., AbstractAsyncContextManager[Running]]

ME = str(os.getpid())


@pytest.mark.parametrize(
    ("environ", "files"),
    [
        ({}, []),
        ({"LISTEN_PID": ME, "LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:b"}, [3, 4]),
        ({"LISTEN_PID": "1", "LISTEN_FDS": "2"}, []),
        ({"LISTEN_FDS": "2"}, []),
        ({"LISTEN_PID": ME, "LISTEN_FDS": "x"}, []),
    ],
)
def test_files_are_taken_once_and_only_by_whom_they_are_for(
    environ: dict[str, str], files: list[int]
) -> None:
    assert take_listen_fds(environ) == files
    assert environ == {}


@pytest.mark.parametrize(
    ("environ", "notifier"),
    [
        ({}, Notifier()),
        ({"NOTIFY_SOCKET": "/x"}, Notifier("/x")),
        ({"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "30000000"}, Notifier("/x", 30)),
        ({"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "1", "WATCHDOG_PID": "1"}, Notifier("/x")),
        ({"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "0", "WATCHDOG_PID": ME}, Notifier("/x")),
    ],
)
def test_a_notifier_is_what_the_environment_says_and_no_childs(
    environ: dict[str, str], notifier: Notifier
) -> None:
    assert Notifier.of(environ) == notifier
    assert environ == {}


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_what_is_told_arrives(tmp_path: Path, kind: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as inbox:
        name = str(tmp_path / "notify") if kind == "path" else f"@trio-broker-{ME}"
        inbox.bind(name.replace("@", "\0"))
        notifier = Notifier(name)
        notifier.ready("serves")
        assert inbox.recv(999) == b"READY=1\nSTATUS=serves"
        notifier.alive()
        assert inbox.recv(999) == b"WATCHDOG=1"
        notifier.stopping()
        assert inbox.recv(999) == b"STOPPING=1"
        notifier.reloading()
        assert inbox.recv(999).startswith(b"RELOADING=1\nMONOTONIC_USEC=")


def test_where_nobody_listens_nothing_happens(tmp_path: Path) -> None:
    Notifier(str(tmp_path / "nobody")).ready()
    Notifier().alive()


async def test_a_service_tells_when_it_serves_lives_and_stops(
    running: "Runner", tmp_path: Path
) -> None:
    with trio.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as inbox:
        await inbox.bind(str(tmp_path / "notify"))
        environ = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "200000"}
        file = tmp_path / "broker.toml"
        file.write_text("port = 0\nhost = '127.0.0.1'\n")
        async with running("--config", str(file), env=environ) as it:
            first = await inbox.recv(999)
            assert first.startswith(b"READY=1\nSTATUS=serves on ws://127.0.0.1:")
            said = [await inbox.recv(999) for _ in range(3)]
            assert set(said) == {b"WATCHDOG=1"}
            it.process.send_signal(signal.SIGHUP)
            await it.wait_for("reloaded")
            while not said[-1].startswith(b"RELOADING=1"):
                said.append(await inbox.recv(999))
            while not said[-1].startswith(b"READY=1"):
                said.append(await inbox.recv(999))
            it.process.send_signal(signal.SIGTERM)
            while said[-1] != b"STOPPING=1":
                said.append(await inbox.recv(999))
            assert await it.process.wait() == 0


@pytest.mark.parametrize("where", ["port", "path"])
async def test_it_serves_on_sockets_that_systemd_opened(
    running: "Runner", tmp_path: Path, missing: Callable[[str], NoReturn], where: str
) -> None:
    activate = shutil.which("systemd-socket-activate")
    if activate is None:
        missing("systemd-socket-activate is not here: apt-get install systemd")
    port = free_port()
    path = tmp_path / "broker.sock"
    place = f"127.0.0.1:{port}" if where == "port" else str(path)
    # It has a short list of what it hands on of the environment.
    root = Path(__file__).parents[2]
    command = (activate, "-l", place, "-E", f"PYTHONPATH={root}", sys.executable, "-m", "broker")
    async with running("--log-format", "json", command=command) as it:
        await it.wait_for("Listening on")
        # Started by whoever comes first, who waits in the backlog meanwhile.
        if where == "port":
            stream = await trio.open_tcp_stream("127.0.0.1", port)
        else:
            stream = await trio.open_unix_socket(path)
        async with stream:
            await stream.send_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b" 200 " in await stream.receive_some()
        assert place in await it.wait_for('"ready"')
        assert await it.stop(signal.SIGTERM) == 0
