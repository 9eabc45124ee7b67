"""The page about two brokers behind HAProxy is done as it stands there, with an official SDK on each of the two.

One run, as each kill is found out after ten seconds or more.
"""

import asyncio
import gc
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, NoReturn
from urllib.request import Request, urlopen

import attrs
import pytest
from websockets.sync.client import connect

from broker.access.minting import mint
from tests.conftest import HMAC_SECRET, PATIENCE
from tests.engines.servers import BINARIES, Server, serving
from tests.hostile.target import waited_of
from tests.ports import free_port
from tests.sdk.test_sdk_python import Recorder
from tests.test_deployment import ROOT, START_SECONDS, accepts, blocks, program, running

try:
    import centrifuge
except ImportError:
    centrifuge = None

__all__ = ["program"]

pytestmark = pytest.mark.sdk

PAGE = "two-brokers.md"
HERE = Path(__file__).parent

BEREAVED_SECONDS = 30.0
"""By then a broker that was killed is known to be dead: after 13 s, as a rule."""

ROUND_TRIP = 0.05
"""A message of a bystander takes no longer, while another broker dies."""


def token(user: str) -> str:
    return mint({"sub": user}, HMAC_SECRET.encode(), "HS256")


@attrs.define(eq=False)
class Site:
    """All that the page has run: both brokers and the balancer."""

    directory: Path
    redis: Server
    ports: dict[str, int]
    port: int
    processes: "dict[str, subprocess.Popen[bytes]]" = attrs.field(factory=dict)

    def fill(self, text: str) -> str:
        """What the page prints, with the addresses of this test."""
        for name, here in (
            ("redis://127.0.0.1:6379", f"redis+unix://{self.redis.socket}"),
            ("9501", str(self.ports["one"])),
            ("9502", str(self.ports["two"])),
            (":9500", f":{self.port}"),
        ):
            text = text.replace(name, here)
        return re.sub(r"\bpython\b", sys.executable, text)

    def run(self, command: str, output: int = subprocess.PIPE) -> "subprocess.Popen[bytes]":
        environ = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "BROKER_TOKENS_HMAC_SECRET": HMAC_SECRET,
            "BROKER_TOKEN": token("shell"),
        }
        command = "exec env " + self.fill(command)
        return subprocess.Popen(
            ["sh", "-c", command], cwd=self.directory, env=environ, stdout=output
        )

    def printed(self, command: str) -> str:
        """What a command prints that ends by itself."""
        output, _ = self.run(command).communicate(timeout=3 * PATIENCE)
        return output.decode()

    def begin(self, name: str) -> None:
        """Start a broker, and wait until it may be sent clients."""
        (line,) = (each for each in blocks(PAGE, "shell") if f"BROKER_NAME={name} " in each)
        self.processes[name] = process = self.run(line, subprocess.DEVNULL)
        deadline = time.monotonic() + START_SECONDS
        while not self.is_ready(name):
            assert process.poll() is None, f"{name} has ended"
            assert time.monotonic() < deadline, f"{name} does not answer"
            time.sleep(0.02)  # a foreign process: no clock of ours moves it

    def is_ready(self, name: str) -> bool:
        try:
            with urlopen(f"http://localhost:{self.ports[name]}/readyz", timeout=PATIENCE) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def home_of(self, fd: int) -> str:
        """The broker that has a connection."""
        request = Request(
            f"http://localhost:{self.port}/api/connection",
            json.dumps({"fd": fd}).encode(),
            {"X-API-Key": "a-key-of-your-own", "Content-Type": "application/json"},
        )
        with urlopen(request, timeout=PATIENCE) as answer:
            return str(json.load(answer)["result"]["node"])

    def end(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()


@pytest.fixture
def site(tmp_path: Path, program: Callable[[str], str]) -> Iterator[Site]:
    haproxy = program("haproxy")
    with serving(BINARIES["valkey"], tmp_path) as redis, ExitStack() as stack:
        site = Site(tmp_path, redis, {"one": free_port(), "two": free_port()}, free_port())
        stack.callback(site.end)
        (settings,) = blocks(PAGE, "toml")
        (tmp_path / "broker.toml").write_text(site.fill(settings))
        (balancing, _) = blocks(PAGE, "text")
        (tmp_path / "haproxy.cfg").write_text(site.fill(balancing))
        for name in site.ports:
            site.begin(name)
        command = [haproxy, "-db", "-f", str(tmp_path / "haproxy.cfg")]
        stack.enter_context(running(command, lambda: accepts(site.port)))
        yield site


class Happened:
    """What a client was told, which can be waited for."""

    def __init__(self) -> None:
        self.all: list[dict[str, Any]] = []
        self._news = asyncio.Event()

    def note(self, **what: Any) -> None:
        self.all.append(what)
        self._news.set()

    def of(self, event: str, **fields: Any) -> list[dict[str, Any]]:
        wanted = {"event": event, **fields}
        return [each for each in self.all if wanted.items() <= each.items()]

    async def wait(
        self, event: str, *, seconds: float = 3 * PATIENCE, more_than: int = 0, **fields: Any
    ) -> dict[str, Any]:
        """The last of these, once more than so many have happened."""
        async with asyncio.timeout(seconds):
            while len(found := self.of(event, **fields)) <= more_than:
                self._news.clear()
                await self._news.wait()
        return found[-1]


class JavaScript:
    """A client of centrifuge-js in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.happened = Happened()
        self._process = process
        self._answers: dict[int, asyncio.Future[Any]] = {}

    async def listen(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            said = json.loads(line)
            if "id" in said:
                self._answers.pop(said["id"]).set_result(said)
            else:
                self.happened.note(**said)

    async def do(self, name: str, **options: Any) -> Any:
        assert self._process.stdin is not None
        number = len(self._answers) + 1
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        self._process.stdin.write(
            json.dumps({"id": number, "do": name, **options}).encode() + b"\n"
        )
        said = await asyncio.wait_for(answer, 3 * PATIENCE)
        assert "error" not in said, said
        return said["result"]


@asynccontextmanager
async def javascript(node: str, url: str) -> AsyncIterator[JavaScript]:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        node, "remote.mjs", url, token("jane"), cwd=HERE, stdin=pipe, stdout=pipe
    )
    client = JavaScript(process)
    listening = asyncio.create_task(client.listen())
    try:
        yield client
    finally:
        process.kill()
        await process.wait()
        await listening


class Python(Recorder):
    """A client of centrifuge-python; its own events, and those of its subscriptions."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.told = Happened()
        self.client = centrifuge.Client(
            url, events=self, token=token("paul"), min_reconnect_delay=0.05
        )

    async def on_connected(self, context: Any) -> None:
        self.told.note(event="connected", fd=int(context.client))

    async def on_publication(self, context: Any) -> None:
        await self._published(context.channel, context.pub)

    async def _published(self, topic: str, pub: Any) -> None:
        sender = pub.info and pub.info.client
        self.told.note(event="publication", topic=topic, data=pub.data, sender=sender)
        if "reply_to" in pub.tags:
            answer = {"reply_to": pub.tags["reply_to"], "data": {"half": pub.data / 2}}
            self.answering = asyncio.create_task(self.client.rpc("reply", answer))

    async def subscribe(self, topic: str, **options: Any) -> None:
        owner = self

        class Events(Recorder):
            async def on_publication(self, context: Any) -> None:
                await owner._published(topic, context.pub)

            async def on_join(self, context: Any) -> None:
                owner.told.note(event="join", topic=topic, sender=context.info.client)

            async def on_leave(self, context: Any) -> None:
                owner.told.note(event="leave", topic=topic, sender=context.info.client)

            async def on_subscribed(self, context: Any) -> None:
                owner.told.note(event="subscribed", topic=topic, recovered=context.recovered)

        sub = self.client.new_subscription(topic, events=Events(), **options)
        await sub.subscribe()
        await self.told.wait("subscribed", topic=topic)


@contextmanager
def bystander(site: Site, name: str) -> Iterator[list[float]]:
    """Somebody at one broker who sends a message to himself every 20 ms; the times that these took, but for
    those in which one of the processes was ready to run and others had the processor."""
    took: list[float] = []
    is_over = threading.Event()

    def talk() -> None:
        processes = [threading.get_native_id(), site.processes[name].pid, site.redis.process.pid]
        with connect(f"ws://localhost:{site.ports[name]}/connection/websocket") as peer:
            for command in (
                {"connect": {"token": token("bea")}},
                {"subscribe": {"channel": "own"}},
            ):
                peer.send(json.dumps({"id": 1, **command}))
                peer.recv(PATIENCE)
            while not is_over.wait(0.02):
                before, began = sum(map(waited_of, processes)), time.monotonic()
                peer.send('{"publish":{"channel":"own","data":1}}')
                while '"pub"' not in peer.recv(PATIENCE):
                    pass
                passed = time.monotonic() - began
                took.append(passed - (sum(map(waited_of, processes)) - before))

    thread = threading.Thread(target=talk)
    thread.start()
    try:
        yield took
    finally:
        is_over.set()
        thread.join()


async def talk_across(js: JavaScript, py: Python, fds: dict[str, int]) -> None:
    """Everything that one client can be to another, over two brokers."""
    jane, paul = js.happened, py.told
    await js.do("subscribe", topic="room", options={"recoverable": True, "joinLeave": True})
    await py.subscribe("room", recoverable=True, join_leave=True)
    await jane.wait("join", topic="room", sender=str(fds["py"]))
    # To a topic, to a connection, to a user; there and back.
    for target in ("room", f"fd:{fds['py']}", "user:paul"):
        await js.do("publish", topic=target, data=f"jane to {target}")
        heard = await paul.wait("publication", data=f"jane to {target}")
        assert heard["sender"] == str(fds["js"])
    for target in ("room", f"fd:{fds['js']}", "user:jane"):
        await py.client.publish(target, f"paul to {target}")
        came = await jane.wait("publication", data=f"paul to {target}")
        assert came["sender"] == str(fds["py"])
    # By a pattern.
    await py.subscribe("news.*")
    await js.do("subscribe", topic="goods.>", options={})
    await js.do("publish", topic="news.sport", data="goal")
    await py.client.publish("goods.fruit.apple", "red")
    await paul.wait("publication", topic="news.*", data="goal")
    await jane.wait("publication", topic="goods.>", data="red")
    # In a group: each publication to one of the two.
    await js.do("subscribe", topic="work", options={"data": {"group": "g"}})
    await py.subscribe("work", data={"group": "g"})
    for number in range(20):
        await js.do("publish", topic="work", data=number)
    await js.do("publish", topic="room", data="work is over")
    for told in (jane, paul):
        await told.wait("publication", topic="room", data="work is over")
    shares = [
        [each["data"] for each in told.of("publication", topic="work")] for told in (jane, paul)
    ]
    assert sorted(shares[0] + shares[1]) == list(range(20))
    assert all(shares)
    # Requests.
    answer = await py.client.rpc("request", {"to": f"fd:{fds['js']}", "data": 21})
    assert answer.data == {"twice": 42}
    params = {"to": f"fd:{fds['py']}", "data": 42}
    assert await js.do("rpc", method="request", params=params) == {"half": 21}
    # Presence, history, a retained value.
    both = sorted(map(str, fds.values()))
    assert sorted(await js.do("presence", topic="room")) == both
    assert sorted((await py.client.presence("room")).clients) == both
    history = (await py.client.history("room", limit=100)).publications
    assert [each.data for each in history] == ["jane to room", "paul to room", "work is over"]
    assert await js.do("history", topic="room") == [each.data for each in history]
    sign = {"topic": "sign", "data": "open", "retain": True}
    await js.do("rpc", method="publish", params=sign)
    await py.subscribe("sign")
    await paul.wait("publication", topic="sign", data="open")


async def kill_and_restart(
    site: Site, js: JavaScript, py: Python, fds: dict[str, int]
) -> list[float]:
    """The broker of the one client is killed, and later that of the other restarted; both recover. What a
    bystander's messages took while the broker died."""
    jane, paul = js.happened, py.told
    names = {who: site.home_of(fd) for who, fd in fds.items()}
    assert set(names.values()) == {"one", "two"}
    will = {"topic": "room", "data": "jane is lost"}
    await js.do("rpc", method="will", params=will)
    # When what comes behind it is kept the other broker has the will, however soon this one dies.
    await js.do("publish", topic="elsewhere", data="kept")
    with bystander(site, names["py"]) as took:
        dying = site.processes[names["js"]]
        dying.kill()
        await jane.wait("connecting")
        await py.client.publish("room", "while away")
        await jane.wait("subscribed", topic="room", wasRecovering=True, recovered=True)
        await jane.wait("publication", topic="room", data="while away")
        told = await paul.wait(
            "publication", topic="room", data="jane is lost", seconds=BEREAVED_SECONDS
        )
        assert told["sender"] == str(fds["js"])
        await paul.wait("leave", topic="room", sender=str(fds["js"]))
        await jane.wait("publication", topic="room", data="jane is lost")
    dying.wait()
    # As the page has it: one after the other.
    await asyncio.to_thread(site.begin, names["js"])
    going, subscribed = site.processes[names["py"]], len(paul.of("subscribed", topic="room"))
    going.send_signal(signal.SIGTERM)
    await paul.wait("subscribed", more_than=subscribed, topic="room")
    assert paul.of("subscribed", topic="room")[-1]["recovered"]
    assert await asyncio.to_thread(going.wait, 3 * PATIENCE) == 0
    await js.do("publish", topic="room", data="still here")
    await paul.wait("publication", topic="room", data="still here")
    return took


def test_two_brokers_behind_haproxy_are_one(
    site: Site, node: str, missing: Callable[[str], NoReturn]
) -> None:
    if centrifuge is None:
        missing("centrifuge-python is not installed: run `nox -s tests`")
    url = f"ws://127.0.0.1:{site.port}/connection/websocket"
    (told,) = (text for text in blocks(PAGE, "text") if text.startswith("NODE"))
    (asked,) = (line for line in blocks(PAGE, "shell") if "broker nodes" in line)
    shown = [line.split() for line in site.printed(asked).splitlines()]
    expected = [line.split() for line in told.splitlines()]
    assert [line[:6] for line in shown] == [line[:6] for line in expected]

    async def both() -> list[float]:
        async with javascript(node, url) as js:
            py = Python(url)
            js_fd = await js.do("connect")
            await py.client.connect()
            fds = {"js": js_fd, "py": (await py.told.wait("connected"))["fd"]}
            await talk_across(js, py, fds)
            took = await kill_and_restart(site, js, py, fds)
            await py.client.disconnect()
            return took

    try:
        took = asyncio.run(both())
    finally:
        # The SDK may leave its connection to the broker that was killed; no other test is to answer for it.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()
    assert len(took) > 100
    assert max(took) < ROUND_TRIP, f"{max(took) * 1000:.1f} ms"


def test_what_one_command_publishes_another_hears_elsewhere(site: Site) -> None:
    listening, saying = (
        line for line in blocks(PAGE, "shell") if re.search(r" (sub|pub) --url", line)
    )
    listener = site.run(listening)
    try:
        assert listener.stdout is not None
        deadline = time.monotonic() + START_SECONDS
        while "news" not in site.printed(
            "python -m broker topics --url http://localhost:9501 --api-key a-key-of-your-own"
        ):
            assert time.monotonic() < deadline
        site.printed(saying)
        assert b'news 1 "hello"' in listener.stdout.readline()
    finally:
        listener.kill()
        listener.communicate()
