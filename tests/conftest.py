"""Fixtures and helpers that more than one test file needs; anything for one file lives in that file."""

import http.client
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import attrs
import pytest
import structlog
import trio
from hypercorn.config import Config as HypercornConfig
from hypercorn.trio import serve as serve_hypercorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from trio.testing import MockClock

from broker import Broker, Config, logs
from broker.engines.sqlite_file import NotWritten
from broker.testing import Network, Peer, name_users_by_token, open_test_broker
from tests.engines.servers import ENGINES, engine_of
from tests.ports import free_port

T = TypeVar("T")


def pytest_addoption(parser: pytest.Parser) -> None:
    kinds = ", ".join(ENGINES)
    text = f"the engine of brokers that are started as processes: {kinds}, or a URL"
    parser.addoption("--engine", default="memory", help=text)
    text = "how many scripts the tests of recovery run on each engine; by default what there is time for"
    parser.addoption("--scripts", type=int, default=None, help=text)


def pytest_configure(config: pytest.Config) -> None:
    # A shell has what it runs in the background ignore Ctrl-C, and so would all brokers that are started.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def logging_to_stderr() -> None:
    """Log as an embedded broker does, whichever test comes first.

    structlog's `capture_logs` leaves it configured with its own default, which prints to stdout.
    """
    logs.configure_if_unset("console", "info")


@pytest.fixture
def logging_restored() -> Iterator[None]:
    """Begin with structlog as it is when nobody has configured it; leave all logging as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    config = structlog.get_config() if structlog.is_configured() else None
    structlog.reset_defaults()
    yield
    logs.release()
    if config is not None:
        structlog.configure(**config)
    root.handlers[:] = handlers
    root.setLevel(level)


HMAC_SECRET = "0123456789abcdef0123456789abcdef"
"""A secret for tokens: as long as HS256 asks for (RFC 7518 section 3.2)."""

WEBHOOK_SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
"""The secret in the example of Standard Webhooks."""


@pytest.fixture
def config() -> Config:
    """The settings of `net`; a file or a class that needs others has a fixture of this name."""
    return Config()


# A test that uses this asks for `autojump_clock` too: pytest-trio takes the clock from the test's own
# arguments.
@pytest.fixture
async def net(autojump_clock: MockClock, config: Config) -> AsyncGenerator[Network, None]:
    """A broker in memory."""
    async with open_test_broker(Broker(config)) as network:
        yield network


@asynccontextmanager
async def served(broker: Broker | None = None, **fields: Any) -> AsyncGenerator[Network, None]:
    """A broker whose clients' tokens are their users; by default one with these settings."""
    async with open_test_broker(name_users_by_token(broker or Broker(Config(**fields)))) as net:
        yield net


def data_of(objects: list[Any]) -> list[Any]:
    """The data of the publications among these objects."""
    return [each["push"]["pub"]["data"] for each in objects if "pub" in each.get("push", {})]


async def ask(peer: Peer, *commands: object) -> list[Any]:
    """Send commands as one message; return all that comes."""
    await peer.send_json(*commands)
    return await peer.receive_all()


async def code_of(peer: Peer, **command: object) -> int:
    """The error that a command is answered with; 0 for none."""
    reply = await peer.request(**command)
    code = reply.get("error", {}).get("code", 0)
    assert isinstance(code, int)
    return code


async def rpc(peer: Peer, method: str, **params: object) -> Any:
    """The whole reply to a call; all that came before it is dropped."""
    return await peer.request(rpc={"method": method, "data": params})


async def done(peer: Peer, method: str, **params: object) -> Any:
    """The answer to a call that has to succeed."""
    reply = await rpc(peer, method, **params)
    assert "error" not in reply, reply
    return reply["rpc"]["data"]


async def subscribe(peer: Peer, topic: str, group: object = None, **fields: object) -> Any:
    """Subscribe, perhaps as a member of a queue group; the result."""
    data = {} if group is None else {"data": {"group": group}}
    reply = await peer.request(subscribe={"channel": topic, **data, **fields})
    assert "subscribe" in reply, reply
    return reply["subscribe"]


ADMIN_KEY = "the-key-of-operators"
VIEW_KEY = "the-key-of-those-who-look"


async def log_in(net: Network, key: str = ADMIN_KEY) -> Peer:
    """An operator at the dashboard's door. Raises `Closed` where the key does not let him in."""
    peer = await net.open_websocket("/admin/websocket")
    reply = await peer.request(connect={"data": {"key": key}})
    assert reply["connect"]["subs"] == {"$admin": {}}, reply
    return peer


async def told(peer: Peer) -> Any:
    """The next that an operator is told of its own accord."""
    return (await next_pub(peer))["data"]


async def next_pub(peer: Peer) -> Any:
    """The publication that has to come next."""
    return (await peer.receive_json())["push"]["pub"]


async def received(net: Network, peer: Peer) -> list[Any]:
    """The data of all publications that have come; ended by a push of ours."""
    net.broker.push(peer.fd, "end")
    got: list[Any] = []
    while True:
        for line in (await peer.receive_text()).split("\n"):
            push = json.loads(line)["push"]
            if push.get("message"):
                return got
            got.append(push["pub"]["data"])


@attrs.define(eq=False)
class Disk:
    """What an engine's disk does is what a test says: `Broker.run_blocking`, or that of an engine."""

    failure: str = ""
    """Why nothing can be written, such as "database or disk is full"."""
    works: int = 0
    _free: trio.Event | None = None

    def hold(self) -> None:
        """Let everybody wait for the disk until `release`."""
        self._free = trio.Event()

    def release(self) -> None:
        if self._free is not None:
            self._free.set()
            self._free = None

    async def __call__(self, work: Callable[[], T], /) -> T:
        await trio.lowlevel.checkpoint()
        if self._free is not None:
            await self._free.wait()
        self.works += 1
        if self.failure:
            raise NotWritten(self.failure)
        return work()


def varint(number: int) -> bytes:
    """A number as protobuf has it, seven bits a byte."""
    encoded = b""
    while number > 0x7F:
        encoded += bytes((number & 0x7F | 0x80,))
        number >>= 7
    return encoded + bytes((number,))


def delimited(*messages: Any) -> bytes:
    """Messages of the official protobuf library, or their bytes, each behind its length."""
    written = b""
    for message in messages:
        body = message if isinstance(message, bytes) else message.SerializeToString()
        written += varint(len(body)) + body
    return written


PATIENCE = 60.0
"""Seconds until a broker that does not start or stop fails its test: one that has ended is seen at once, and
one that starts beside ten other programs on two cores has taken 12 s."""


@attrs.frozen
class Process:
    """A broker as users run it: `python -m broker`, for peers that do not speak Trio."""

    port: int
    process: "subprocess.Popen[bytes]"
    output: Path

    @property
    def http(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def ws(self) -> str:
        return f"ws://127.0.0.1:{self.port}"

    def stop(self) -> str:
        """Ask it to stop; what it printed, once it has ended well."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(PATIENCE) == 0
        return self.output.read_text("utf-8")


@pytest.fixture(scope="session")
def missing() -> Callable[[str], NoReturn]:
    """Say that a test cannot run here: in CI that is a failure, elsewhere a skipped test."""

    def give_up(what: str) -> NoReturn:
        if os.environ.get("CI"):
            pytest.fail(what)
        pytest.skip(what)

    return give_up


@pytest.fixture(scope="session")
def node(missing: Callable[[str], NoReturn]) -> list[str]:
    """The command that runs JavaScript for browsers: Node, with what of theirs it lacks."""
    path = shutil.which("node")
    if path is None:
        missing("node is not installed (Debian: apt-get install nodejs npm)")
    asked = subprocess.run([path, "--version"], capture_output=True, text=True, check=True)
    major = int(asked.stdout.removeprefix("v").partition(".")[0])
    sdk = Path(__file__).parent / "sdk"
    command = [path, "--import", (sdk / "globals.mjs").as_uri()]
    if major >= 22 or (sdk / "node_modules" / "ws").is_dir():
        return command
    if major < 20:
        missing("node has no WebSocket: run `npm ci` in tests/sdk, or `nox -s sdk_js`")
    return [*command, "--experimental-websocket"]


@pytest.fixture
def how_many_scripts(request: pytest.FixtureRequest) -> int | None:
    """What `--scripts` says, if it is there."""
    count: int | None = request.config.getoption("--scripts")
    return count


@pytest.fixture
def engine_options(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[list[str]]:
    """What names the engine that `--engine` asks for, with nothing in it; no option for memory."""
    kind = request.config.getoption("--engine")
    with engine_of(kind, tmp_path) as engine:
        yield [] if kind == "memory" else ["--engine", engine]


@pytest.fixture
def start_broker(tmp_path: Path, engine_options: list[str]) -> Iterator[Callable[..., Process]]:
    """Start `python -m broker` with these options; ended with the test at the latest."""
    started = []

    def start(*options: str) -> Process:
        # The article's log names no port, so it is chosen here.
        port = free_port()
        output = tmp_path / f"broker-{port}.out"
        with output.open("wb") as file:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "broker", "--host", "127.0.0.1"),
                    *("--port", str(port), *engine_options, *options),
                ],
                stdout=file,
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
            )
        started.append(process)
        deadline = time.monotonic() + PATIENCE
        while not _is_healthy(port):
            assert process.poll() is None, "the broker did not start"
            assert time.monotonic() < deadline, "the broker does not answer"
            time.sleep(0.02)  # a foreign process: no clock of ours moves it
        return Process(port, process, output)

    yield start
    for process in started:
        process.kill()
        process.wait()


def _is_healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status == 200
    except ConnectionRefusedError:
        return False
    finally:
        connection.close()


@asynccontextmanager
async def _serve_backend(endpoint: Callable[[Request], Awaitable[Response]]) -> AsyncGenerator[str]:
    settings = HypercornConfig()
    settings.bind = ["127.0.0.1:0"]
    settings.errorlog = None  # or it sets the level of a logger that is everybody's
    app = Starlette(routes=[Route("/backend", endpoint, methods=["POST"])])
    done = trio.Event()
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            (url,) = await nursery.start(
                partial(serve_hypercorn, app, settings, shutdown_trigger=done.wait)  # type: ignore[arg-type]
            )
            yield f"{url}/backend"
            done.set()


@pytest.fixture
def serve_backend() -> Callable[
    [Callable[[Request], Awaitable[Response]]], AbstractAsyncContextManager[str]
]:
    """Serve what is posted for as long as a block, 20 s at most; the block gets the URL."""
    return _serve_backend
