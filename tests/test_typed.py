"""What the pages print to be typed is typed, as it stands there: block by block, each into a terminal of its own.

A block whose last command goes on, as a broker does, keeps its terminal, and those below it on the page find it running. Where a page
starts its broker once more, the one before is ended by Ctrl-C, and has to end well. Ports, and directories that only root may write
to, are those of the test. Whatever installs something does nothing here.

`test_every_block_is_run_somewhere` holds all other blocks to a test that runs them, or to a reason.
"""

import json
import os
import re
import signal
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Final

import attrs
import pytest
import trustme
from websockets.sync.client import connect

from broker.config.loading import load
from tests.engines.servers import BINARIES, serving
from tests.ports import free_port
from tests.test_deployment import program

__all__ = ["program"]

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"

START_SECONDS = 60.0
"""Until what a block starts is up, or what it asks for has been printed: long, as many tests may share a processor."""

TYPED: Final = {
    "README.md": "",
    "docs/tutorial.md": "",
    "docs/howto/authorize.md": "",
    "docs/howto/configure.md": "",
    "docs/howto/dashboard.md": "",
    "docs/howto/durable.md": "",
    "docs/howto/fallbacks.md": "python -m broker",
    "docs/howto/logs.md": "",
    "docs/howto/monitoring.md": "",
    "docs/howto/nodes.md": "BROKER_API_KEY=a-key-of-your-own python -m broker",
    "docs/howto/private-messages.md": "",
    "docs/howto/redis.md": "",
    "docs/howto/systemd.md": "",
    "docs/howto/tls.md": "",
    "docs/howto/tokens.md": "",
    "docs/howto/topics.md": "",
    "docs/howto/tracing.md": "",
    "docs/howto/unix-socket.md": "",
    "docs/howto/webhooks.md": "",
    "docs/howto/workers.md": "",
    "docs/javascript/index.md": "",
    "docs/javascript/tokens.md": "",
    "docs/reference/http-api.md": "",
    "docs/tutorial/http-api.md": "BROKER_API_KEY=a-key-of-your-own python -m broker",
}
"""The pages whose blocks in shell and Python are typed, and what is typed before, where a page takes a broker for granted."""

INSTALLS: Final = ("pip", "npm", "apt-get", "nox", "systemctl")

GOES_ON = re.compile(
    r"(python -m broker|trio-broker)( --?[a-z-]+( [^ ]+)?)*( \w+:\w+)?( \\\n.*)?$"
    r"|(python -m broker|trio-broker) (sub|trace|top) [^&]*$|curl -N .*$|systemd-socket-activate .*$",
)
"""A last command that ends with Ctrl-C alone."""

IS_UP = re.compile(rb"ready on|\"ready\"|websocket|Listening on|serving")


@attrs.frozen
class Block:
    page: str
    language: str
    text: str
    before: str
    """The paragraph above it."""

    @property
    def first(self) -> str:
        return self.text.strip().partition("\n")[0]


def blocks(page: str) -> list[Block]:
    found = []
    text = (ROOT / page).read_text("utf-8")
    for match in re.finditer(r"^( *)```([^\n]*)\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE):
        above = text[: match.start()].rstrip().rpartition("\n\n")[2]
        code = textwrap.dedent(match[3])
        found.append(Block(page, match[2], code, above))
    return found


@attrs.define(eq=False)
class Terminal:
    """A shell that types one block; what it prints is in a file."""

    text: str
    process: "subprocess.Popen[bytes]"
    output: Path
    goes_on: bool
    port: str
    """Of the broker that it serves, if it does."""

    def printed(self) -> str:
        return self.output.read_text("utf-8", errors="replace")

    def wait_up(self) -> None:
        """Wait until what goes on is up, or all has ended well."""
        deadline = time.monotonic() + START_SECONDS
        if not self.goes_on:
            assert self.process.wait(START_SECONDS) == 0, self.said()
            return
        while self.port and not IS_UP.search(self.output.read_bytes()):
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.02)  # a foreign process: no clock of ours moves it

    def interrupt(self) -> None:
        """Press Ctrl-C."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGINT)
        status = self.process.wait(START_SECONDS)
        assert not self.port or status == 0, self.said()
        self.port = ""

    def said(self) -> str:
        return f"{self.text}\n-- printed:\n{self.printed()}"


@attrs.define(eq=False)
class Desk:
    """Where a page is typed."""

    directory: Path
    redis: str
    ports: dict[str, str]
    terminals: list[Terminal] = attrs.field(factory=list)

    def fill(self, text: str) -> str:
        """What a page prints, with the addresses of this test."""
        for printed, here in (
            ("redis://127.0.0.1:6379", self.redis),
            ("/var/lib/broker", str(self.directory)),
            ("/run/broker", str(self.directory)),
            ("/etc/broker.toml", "broker.toml"),
            ("www-data", "root"),
            ("--workers 4", "--workers 2"),
            ("= Broker()", f"= Broker(__import__('broker').Config(port={self.ports['9501']}))"),
            *((rf"(?<=[ :=]){port}\b", here) for port, here in self.ports.items()),
        ):
            text = re.sub(printed if printed.startswith("(?") else re.escape(printed), here, text)
        return text

    def write(self, name: str, text: str) -> None:
        (self.directory / name).write_text(self.fill(text), "utf-8")

    def type(self, text: str, *, serves: bool = False) -> Terminal:
        """Type a block, and wait until what goes on is up, or all has ended well. `serves`: its program does."""
        last = text.strip().rpartition("\n")[2] if not text.strip().count("\\\n") else text.strip()
        goes_on = serves or GOES_ON.search(last.partition("  #")[0].strip()) is not None
        serves = goes_on and not re.search(r" (sub|trace|top) |^curl", last)
        named = re.search(r"--port[ =](\d+)|PORT=(\d+)|-l (\d+)", text)
        port = next(filter(None, named.groups()), "") if named else "9501"
        if serves or " engine " in text:
            for other in self.terminals:
                if other.port == port or " engine " in text:
                    other.interrupt()
        before = self.connected()
        output = self.directory / f"terminal-{len(self.terminals)}.txt"
        with output.open("wb") as file:
            process = subprocess.Popen(
                ["bash", "-ec", f"shopt -s expand_aliases\n{self.fill(text)}"],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                cwd=self.directory,
                env=self.environ(),
                start_new_session=True,
            )
        terminal = Terminal(text, process, output, goes_on, port if serves else "")
        self.terminals.append(terminal)
        terminal.wait_up()
        deadline = time.monotonic() + START_SECONDS
        while goes_on and not serves and " sub " in last and self.connected() == before:
            # It subscribes with the next packet; what is typed next takes a start of Python.
            assert time.monotonic() < deadline, terminal.said()
            time.sleep(0.02)  # a foreign process
        return terminal

    def connected(self) -> int:
        """How many clients the log of a broker has told of."""
        return sum(each.printed().count("] connected ") for each in self.terminals if each.port)

    def environ(self) -> dict[str, str]:
        own = {name: value for name, value in os.environ.items() if not name.startswith("BROKER_")}
        return {
            **own,
            "PATH": f"{self.directory / 'bin'}:{own['PATH']}",
            "PYTHONUNBUFFERED": "1",
            "BROKER_PORT": self.ports["9501"],
            "BROKER_URL": f"ws://localhost:{self.ports['9501']}",
        }

    def expect(self, lines: str) -> None:
        """Wait until a terminal has printed each of these lines, but for its numbers."""
        deadline = time.monotonic() + START_SECONDS
        wanted = [masked(line) for line in self.fill(lines).splitlines() if line.strip()]
        while True:
            got = {masked(line) for each in self.terminals for line in each.printed().splitlines()}
            missing = [line for line in wanted if line not in got]
            if not missing:
                return
            assert time.monotonic() < deadline, (missing, got)
            time.sleep(0.05)  # a foreign process: no clock of ours moves it

    def end(self) -> None:
        for terminal in self.terminals:
            if terminal.process.poll() is None:
                os.killpg(terminal.process.pid, signal.SIGINT)
        for terminal in self.terminals:
            try:
                terminal.process.wait(START_SECONDS)
            finally:
                # What it has left in the background as well.
                try:
                    os.killpg(terminal.process.pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass


def masked(line: str) -> str:
    """A line without what is another one each time."""
    line = re.sub(r"='[^']*(machine|cgroup|MiB|GiB)[^']*'", "='…'", line)
    line = re.sub(r"\b[0-9a-f]{8}\b|\b[KMG]iB\b", "0", line)
    return re.sub(r"\d[\d.,:]*", "0", line).strip()


@pytest.fixture
def desk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Desk]:
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    python = f'export PYTHONPATH="{ROOT}"\nexec "{sys.executable}"'
    venv = '[ "$1 $2" = "-m venv" ] && { mkdir -p "$3/bin"; : > "$3/bin/activate"; exit; }\n'
    scripts = {
        "python": f'{python} "$@"',
        "python3": f'{venv}{python} "$@"',
        "trio-broker": f'{python} -m broker "$@"',
        **dict.fromkeys(INSTALLS, ":"),
    }
    for name, script in scripts.items():
        path = bin_ / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    issued = trustme.CA().issue_cert("localhost", "example.com")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "fullchain.pem")
    issued.private_key_pem.write_to_path(tmp_path / "privkey.pem")
    (tmp_path / "broker.toml").touch()
    ports = {name: str(free_port()) for name in ("9501", "9502", "8000", "443", "4318")}
    page = request.getfixturevalue("page")
    if "redis" in (ROOT / page).read_text("utf-8"):
        with serving(BINARIES["valkey"], tmp_path) as server:
            desk = Desk(tmp_path, f"redis+unix://{server.socket}", ports)
            yield from _cleared(desk)
    else:
        yield from _cleared(Desk(tmp_path, "", ports))


def _cleared(desk: Desk) -> Iterator[Desk]:
    try:
        yield desk
    finally:
        desk.end()


@contextmanager
def clients(desk: Desk, until: int) -> Iterator[None]:
    """Clients of the SDKs, the last of which has this fd."""
    with ExitStack() as stack:
        fd = 0
        while fd < until:
            url = f"ws://localhost:{desk.ports['9501']}/connection/websocket"
            client = stack.enter_context(connect(url))
            client.send('{"id": 1, "connect": {}}')
            fd = int(json.loads(client.recv(START_SECONDS))["connect"]["client"])
        yield


PRINTED: Final = {"docs/tutorial.md", "docs/howto/durable.md"}
"""Pages whose output below a command is that of a terminal, line by line."""


@pytest.mark.parametrize("page", TYPED)
def test_a_page_is_typed_as_it_stands_there(page: str, desk: Desk) -> None:
    if TYPED[page]:
        desk.type(TYPED[page])
    behind = ""
    for number, block in enumerate(blocks(page)):
        if (page, block.first) in UNTYPED:
            continue
        if block.language == "toml":
            desk.write("broker.toml", block.text)
        elif block.language == "python":
            saved = re.search(r"[Ss]ave this as\s+`(\w+\.py)`", block.before)
            name = saved[1] if saved else f"program{number}.py"
            desk.write(name, block.text)
            if not saved:
                desk.type(
                    f"python -W error {name}",
                    serves="broker.run()" in block.text or "broker.serve)" in block.text,
                )
        elif block.language == "shell":
            pushed = re.fullmatch(r"python -m broker push (\d+) .*\n", block.text)
            with clients(desk, int(pushed[1])) if pushed else nullcontext():
                desk.type(block.text)
        elif block.language == "text" and page in PRINTED and behind == "shell":
            desk.expect(block.text)
        behind = block.language


@pytest.mark.parametrize("page", ["README.md"])
def test_the_program_of_readme_answers_and_is_drained_by_ctrl_c(page: str, desk: Desk) -> None:
    (program_,) = (block.text for block in blocks(page) if block.language == "python")
    desk.write("mine.py", program_)
    terminal = desk.type("python -W error mine.py", serves=True)
    with connect(f"ws://localhost:{desk.ports['9501']}") as plain:
        plain.send("hello")
        assert plain.recv(START_SECONDS) == "fd 1 said hello"
        terminal.interrupt()
    assert "Traceback" not in terminal.printed()


# all blocks

UNTYPED: Final = {
    (
        "docs/howto/fallbacks.md",
        "curl -N http://localhost:9501/connection/uni_sse \\",
    ): "a token and a place that stand for the reader's",
    ("docs/howto/monitoring.md", "apt-get install prometheus"): "tests/test_monitoring.py",
    ("docs/howto/nodes.md", "import trio"): "tests/test_tutorial.py",
    (
        "docs/howto/tracing.md",
        'await broker.publish("news", data, tags={"traceparent": traceparent})',
    ): "one line of a program",
    ("docs/tutorial/http-api.md", "import trio"): "tests/test_tutorial.py",
}
"""Blocks of typed pages that are not typed, and why, or which test runs them."""

BY_HAND: Final = {
    "CONTRIBUTING.md": "sets up, and runs what CI runs",
    "docs/howto/compile.md": "installs; CI and `nox -s compiled` do it",
    "docs/howto/deploy.md": "installs, and asks for systemd and a container tool",
    "docs/reliability.md": "runs all tests, for minutes or hours",
    "docs/scale.md": "measures, for minutes",
}
"""Pages whose shell blocks are for a machine of one's own: all else of them is run."""

RUN_BY: Final = {
    "tests/test_article.py": {"docs/article.md", "docs/article.zh.md"},
    "tests/test_tutorial.py": {"docs/coming-from/", "docs/tutorial/", "docs/howto/nodes.md"},
    "tests/test_fastapi.py": {"docs/howto/fastapi.md"},
    "tests/test_deployment.py": {
        "docs/howto/nginx.md",
        "docs/howto/deploy.md",
        "docs/howto/systemd.md",
    },
    "tests/test_docs.py": {"docs/howto/test.md"},
    "tests/webhooks/test_proxy.py": {"docs/howto/ask-a-backend.md"},
    "tests/cli/test_terminal_page.py": {"docs/howto/terminal.md"},
    "tests/cli/test_completion.py": {"docs/reference/command-line.md"},
    "tests/sdk/test_two_brokers.py": {"docs/howto/two-brokers.md"},
    "tests/test_pages_javascript.py": {
        "docs/howto/private-messages.md",
        "docs/howto/typing-indicator.md",
    },
    "tests/browser/test_javascript_pages.py": {"docs/javascript/"},
}

ALONE: Final = {
    (
        "docs/coming-from/socket-io.md",
        'import { Centrifuge } from "centrifuge";',
    ): "the SDK as on docs/javascript/index.md",
    (
        "docs/howto/fallbacks.md",
        "const centrifuge = new Centrifuge(",
    ): "tests/sdk/ has these transports",
    (
        "docs/howto/fallbacks.md",
        'const source = new EventSource("/connection/uni_sse?topic=news");',
    ): "tests/browser/test_event_source.py",
    (
        "docs/howto/tokens.md",
        'const centrifuge = new Centrifuge("wss://example.com/connection/websocket", {',
    ): "tests/browser/test_javascript_pages.py, by docs/javascript/tokens.md",
    (
        "docs/howto/tokens.md",
        'centrifuge.newSubscription("$room", { getToken: async (ctx) => (await fetch(`/token?topic=${ctx.channel}`)).text() });',
    ): "tests/sdk/ subscribes with tokens",
    (
        "docs/reliability.md",
        '@hostile("frame/a Ping of 126 bytes", "RFC 6455 5.5", "close 1002", times=10)',
    ): "a row of tests/hostile/",
    (
        "docs/tutorial.md",
        'const ws = new WebSocket("ws://localhost:9501");',
    ): "tests/browser/test_browser.py runs it by the page's own button",
}
"""Blocks that no test takes from the page, and which test has the same, or why."""

CODE: Final = {"shell", "console", "python", "javascript", "html"}


def pages() -> list[str]:
    """All pages but the decisions, which print no code to be typed."""
    found = [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "SECURITY.md",
        *DOCS.rglob("*.md"),
    ]
    names = [path.relative_to(ROOT).as_posix() for path in found]
    return sorted(name for name in names if not name.startswith("docs/adr/"))


def is_run(block: Block) -> bool:
    if (block.page, block.first) in {**UNTYPED, **ALONE}:
        return True
    if block.page in TYPED and block.language in ("shell", "python"):
        return True
    if block.page in BY_HAND and block.language == "shell":
        return True
    return any(block.page.startswith(page) for run in RUN_BY.values() for page in run)


def test_every_block_is_run_somewhere() -> None:
    bare = [
        (block.page, block.language, block.first)
        for page in pages()
        for block in blocks(page)
        if block.language in CODE and not is_run(block)
    ]
    assert bare == []


def test_all_reasons_are_for_blocks_that_are_there() -> None:
    there = {(block.page, block.first) for page in pages() for block in blocks(page)}
    assert UNTYPED.keys() <= there
    assert ALONE.keys() <= there
    assert {*BY_HAND, *TYPED} <= {page for page, _ in there}
    for test in RUN_BY:
        assert (ROOT / test).is_file()


SETTINGS: Final = [
    pytest.param(block, id=f"{block.page}-{number}")
    for page in pages()
    for number, block in enumerate(blocks(page))
    if block.language == "toml"
]


@pytest.mark.parametrize("block", SETTINGS)
def test_all_settings_that_a_page_shows_are_right(block: Block, tmp_path: Path) -> None:
    path = tmp_path / "broker.toml"
    path.write_text(block.text, "utf-8")
    load(path, {}, environ={})


def test_all_json_that_a_page_shows_is_json() -> None:
    for page in pages():
        for block in blocks(page):
            if block.language == "json":
                for line in block.text.splitlines():
                    json.loads(line)


@pytest.mark.parametrize("page", ["docs/howto/dashboard.md", "docs/howto/redis.md"])
def test_nginx_takes_what_a_page_shows(
    page: str, program: Callable[[str], str], tmp_path: Path
) -> None:
    (shown,) = (block.text for block in blocks(page) if block.language == "nginx")
    http = shown if shown.startswith("upstream") else f"server {{ listen 127.0.0.1:1;\n{shown} }}"
    path = tmp_path / "nginx.conf"
    path.write_text(f"pid {tmp_path}/pid;\nevents {{}}\nhttp {{ access_log off;\n{http} }}\n")
    nginx = [program("nginx"), "-t", "-q", "-e", "stderr", "-p", str(tmp_path), "-c", str(path)]
    subprocess.run(nginx, check=True)
