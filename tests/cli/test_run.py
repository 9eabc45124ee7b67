"""`Broker.run`: a whole program, which signals end as they end the command."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import pytest
import trio

from broker import Broker, Config

if TYPE_CHECKING:
    from tests.cli.conftest import Running

    Runner: TypeAlias = Callable[..., AbstractAsyncContextManager[Running]]

PROGRAM = """\
import signal
import sys
from broker import Broker, Config

broker = Broker(Config(port=0, host="127.0.0.1", log_format="json", drain_seconds={drain}))
before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]


@broker.on_close
async def closed(connection, close):
    print("closed", int(close.code), close.initiator, flush=True)


try:
    broker.run()
finally:
    after = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    print("handlers are back" if after == before else after, flush=True)
print("end of the program")
"""

HANDSHAKE = (
    b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


async def connected(it: "Running") -> trio.SocketStream:
    host, _, port = (await it.url()).removeprefix("ws://").partition(":")
    stream = await trio.open_tcp_stream(host, int(port))
    await stream.send_all(HANDSHAKE)
    assert (await stream.receive_some()).startswith(b"HTTP/1.1 101")
    return stream


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_drains_and_the_program_goes_on(
    running: "Runner", number: signal.Signals
) -> None:
    program = PROGRAM.format(drain=5)
    async with running("-W", "error", "-c", program, command=(sys.executable,)) as it:
        async with await connected(it) as stream:
            it.process.send_signal(number)
            assert (await stream.receive_some())[2:4] == (1001).to_bytes(2, "big")
            await stream.send_all(bytes((0x88, 0x82, 0, 0, 0, 0, 3, 0xE9)))
            assert await it.process.wait() == 0
        await it.wait_for("end of the program", into="stdout")
    assert it.stdout.decode() == "closed 1001 shutdown\nhandlers are back\nend of the program\n"
    assert "Traceback" not in it.stderr.decode()


async def test_a_second_signal_cuts_it_short_with_status_1(running: "Runner") -> None:
    program = PROGRAM.format(drain=300)
    async with running("-W", "error", "-c", program, command=(sys.executable,)) as it:
        async with await connected(it) as stream:
            it.process.send_signal(signal.SIGINT)
            await stream.receive_some()  # our peer does not answer the Close
            it.process.send_signal(signal.SIGINT)
            assert await it.process.wait() == 1
        await it.wait_for("handlers are back", into="stdout")
    assert "end of the program" not in it.stdout.decode()
    assert "Traceback" not in it.stderr.decode()


def test_after_a_cut_the_process_may_go_on() -> None:
    """Nothing of what guards a cut ends the process once the cut is done."""
    program = (
        "import os, signal, threading, time, trio\n"
        "from broker import Broker, Config\n"
        "from broker.process import signals\n"
        "broker = Broker(Config(port=0, host='127.0.0.1', log_level='error'))\n"
        "@broker.on_event\n"
        "async def event(it):\n"
        "    if it.kind == 'started':\n"
        "        for _ in range(2):\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "try:\n"
        "    broker.run()\n"
        "except SystemExit as error:\n"
        "    print('status', error.code)\n"
        "time.sleep(signals.STUCK_SECONDS + 0.2)\n"
        "print('still here')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert (done.stdout, done.stderr, done.returncode) == ("status 1\nstill here\n", "", 0)


ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "docs/howto/unix-socket.md",
]
SERVES = re.compile(r"^ *broker\.run\(\)$|nursery\.start\(broker\.serve\)", re.MULTILINE)
PRINTED = {
    f"{page.name} {number}": code
    for page in PAGES
    for number, code in enumerate(
        re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    )
    if SERVES.search(code)
}


def test_the_programs_that_serve_are_found() -> None:
    pages = {name.partition(" ")[0] for name in PRINTED}
    assert pages == {"README.md", "article.md", "article.zh.md", "tutorial.md", "unix-socket.md"}


@pytest.mark.parametrize("name", PRINTED)
async def test_a_program_that_a_page_prints_ends_by_ctrl_c_without_a_traceback(
    running: "Runner", tmp_path: Path, name: str
) -> None:
    code = PRINTED[name]
    for shown, here in (
        ("Broker()", "__import__('broker').Broker(__import__('broker').Config(port=0))"),
        ("port=9501", "port=0"),
        ("[::]:9502", "127.0.0.1:0"),
        ("/run/broker/", ""),
    ):
        code = code.replace(shown, here)
    assert "port=0" in code
    (tmp_path / "program.py").write_text(code, "utf-8")
    async with running("program.py", command=(sys.executable,), cwd=tmp_path) as it:
        await it.wait_for("ready on")
        assert await it.stop(signal.SIGINT) == 0
    assert "Traceback" not in it.stderr.decode()


SAMPLES = ("article.py", "chat.py", "direct.py", "publish.py a 1", "subscribe.py a")

BY_CTRL_C = (130, -signal.SIGINT)
"""How a sample ends: by itself after a goodbye, or by the signal. Shells have 130 for both."""


def sample_command(script: str, *options: str) -> tuple[str, ...]:
    return (sys.executable, *options, str(ROOT / "clients" / script))


@pytest.mark.parametrize(
    ("script", "begun"),
    [
        ("direct.py --url {url}", "fd"),
        ("chat.py --url {url}", "you are"),
        ("article.py --url {url} --wait 600", "打开连接"),
        ("online.py http://localhost:1 0", "listening on"),
    ],
)
async def test_a_sample_ends_by_ctrl_c_without_a_word(
    running: "Runner", script: str, begun: str
) -> None:
    program = PROGRAM.format(drain=0)
    async with running("-c", program, command=(sys.executable,)) as it:
        name, *args = script.format(url=await it.url()).split()
        environ = {"BROKER_WEBHOOKS_SECRET": "whsec_" + "A" * 32, "BROKER_API_KEY": "x"}
        async with running(*args, command=sample_command(name), env=environ) as sample:
            await sample.wait_for(begun, into="stdout")
            assert await sample.stop(signal.SIGINT) in BY_CTRL_C
        assert sample.stderr.decode() == ""


@pytest.mark.parametrize("script", SAMPLES)
async def test_a_sample_ends_by_ctrl_c_where_nobody_answers_its_handshake(
    running: "Runner", script: str
) -> None:
    name, *args = script.split()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"ws://127.0.0.1:{silent.getsockname()[1]}"
        async with running(*args, "--url", url, command=sample_command(name)) as sample:
            peer, _ = await trio.to_thread.run_sync(silent.accept)
            with peer:
                await trio.to_thread.run_sync(peer.recv, 1)  # its handshake has begun
                assert await sample.stop(signal.SIGINT) in BY_CTRL_C
        assert sample.stdout == sample.stderr == b""


@pytest.mark.parametrize("script", SAMPLES)
async def test_a_sample_ends_by_ctrl_c_while_it_is_imported(running: "Runner", script: str) -> None:
    name, *args = script.split()
    command = sample_command(name, "-X", "importtime")
    async with running(*args, "--url", "ws://127.0.0.1:1", command=command) as sample:
        await sample.wait_for(" attr._compat\n")  # the first of what Trio needs
        assert await sample.stop(signal.SIGINT) in BY_CTRL_C
    assert "Traceback" not in sample.stderr.decode()


def test_in_another_thread_stop_ends_it(capsys: pytest.CaptureFixture[str]) -> None:
    broker = Broker(Config(port=0, host="127.0.0.1"))

    @broker.on_event
    async def event(_: object) -> None:
        broker.stop()

    handler = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=broker.run)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    assert signal.getsignal(signal.SIGINT) is handler
