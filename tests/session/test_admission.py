"""Places for guests and connections: who gets one, who gives way, and what that costs nobody else."""

import json
import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import structlog
import trio
from trio.testing import MockClock, memory_stream_pair, wait_all_tasks_blocked

from broker import Broker, Config, WebhookRules
from broker.config.reload import Settings
from broker.errors import HeadError
from broker.session.admission import LINGERERS, MAX_GUESTS, Admission, Capacity, Guest, Stage
from broker.testing import Network, Peer, handshake, open_test_broker

KEY = "a key of many characters"
HEALTHZ = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
SLOW_BODY = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n"
API = (
    f"POST /api/info HTTP/1.1\r\nHost: localhost\r\nX-API-Key: {KEY}\r\n"
    "Content-Length: 2\r\n\r\n{}"
).encode()


# the figures


@pytest.mark.parametrize(
    "max_connections, limit, connections, files, connection_files",
    [
        (None, 64, 32, 48, 32),
        (None, 256, 128, 192, 128),
        (None, 512, 256, 384, 256),
        (None, 1024, 768, 896, 768),
        (None, 100_000, 99_744, 99_872, 99_744),
        (5, 1024, 5, 896, 768),
        (5000, 1024, 5000, 896, 768),
        (None, 1, 1, 1, 1),
        (None, sys.maxsize, sys.maxsize - 256, sys.maxsize - 128, sys.maxsize - 256),
    ],
)
def test_half_of_the_reserve_is_for_guests_and_half_for_the_broker_itself(
    max_connections: int | None, limit: int, connections: int, files: int, connection_files: int
) -> None:
    places = Capacity.of(max_connections, limit)
    assert (places.connections, places.files, places.connection_files) == (
        connections,
        files,
        connection_files,
    )


def test_guests_are_bounded_by_the_larger_of_connections_and_a_number_of_their_own() -> None:
    assert Capacity.of(5, 10**6).guests == MAX_GUESTS
    assert Capacity.of(5000, 10**6).guests == 5000


@pytest.mark.parametrize(
    "limit, files, connections", [(10_000, 9_672, 9_544), (1024, 768, 640), (256, 192, 128)]
)
def test_requests_to_backends_have_files_of_their_own(
    limit: int, files: int, connections: int
) -> None:
    rules = WebhookRules(rpc_url="https://backend.example/", pool_requests=200)
    places = Admission(Settings(Config(webhooks=rules)), lambda: limit).capacity
    assert (places.files, places.connections) == (files, connections)
    config = Config(webhooks=rules, max_connections=connections + 1)
    text = str(Admission(Settings(config), lambda: limit).warning())
    assert f"room for {connections}," in text
    assert f"raise that limit to {connections + 1 + 128 + 200 + 128} " in text


def admission(max_connections: int | None = None, limit: int = 10**6) -> Admission:
    return Admission(Settings(Config(max_connections=max_connections)), lambda: limit)


@pytest.mark.parametrize("fits, limit", [(768, 1024), (99_744, 100_000), (32, 64)])
def test_more_connections_than_files_are_warned_about_with_the_figures_and_the_way_out(
    fits: int, limit: int
) -> None:
    assert admission(fits, limit).warning() is None
    assert admission(None, limit).warning() is None
    text = admission(fits + 1, limit).warning()
    assert text is not None
    assert "\n" not in text
    for figure in (f"is {fits + 1},", f"with {limit} open", f"for {fits},", f"to {fits + 257} ("):
        assert figure in text
    # Both ways out are ways out.
    assert admission(fits + 1, fits + 257).warning() is None


async def test_the_warning_is_given_at_start(autojump_clock: MockClock) -> None:
    with structlog.testing.capture_logs() as logs:
        async with open_test_broker(Broker(Config(max_connections=10**9))):
            pass
        async with open_test_broker(Broker(Config(max_connections=1))):
            pass
    [line] = [entry for entry in logs if entry["event"] == "too_few_files"]
    assert (line["log_level"], line["detail"][:30]) == ("warning", "max_connections is 1000000000,")


# who gives way


class Guests:
    """Guests of an admission by the order in which they came."""

    def __init__(self, places: Admission) -> None:
        self.places = places
        self.all: list[Guest] = []
        self.streams: list[trio.abc.Stream] = []

    def come(self, count: int = 1) -> list[Guest]:
        for _ in range(count):
            self.streams.append(memory_stream_pair()[0])
            self.all.append(self.places.welcome(self.streams[-1]))
        return self.all[-count:]

    def go(self) -> None:
        while self.streams:
            self.places.see_off(self.streams.pop())

    @property
    def away(self) -> list[int]:
        """Those that gave way, by number."""
        assert all(
            (guest.scope is not None and guest.scope.cancel_called) == guest.gave_way
            for guest in self.all
        )
        return [number for number, guest in enumerate(self.all) if guest.gave_way]


@pytest.fixture
async def guests() -> AsyncIterator[Guests]:
    found = Guests(admission(5))
    yield found
    found.go()
    assert found.places.count() == 0


async def test_a_newcomer_pushes_out_the_oldest_silent_one(guests: Guests) -> None:
    guests.come(MAX_GUESTS)
    assert guests.away == []
    guests.come(3)
    assert guests.away == [0, 1, 2]
    assert guests.places.count(Stage.SILENT) == MAX_GUESTS


async def test_the_kind_that_holds_most_gives_way(guests: Guests) -> None:
    for guest in guests.come(MAX_GUESTS - 10):
        guests.places.ask(guest)
    guests.come(10)
    guests.come(2)
    assert guests.away == [0, 1]


async def test_of_two_kinds_that_hold_the_same_the_silent_ones_give_way(guests: Guests) -> None:
    for guest in guests.come(MAX_GUESTS // 2):
        guests.places.ask(guest)
    guests.come(MAX_GUESTS // 2 + 1)
    assert guests.away == [MAX_GUESTS // 2]


async def test_the_refused_give_way_first(guests: Guests) -> None:
    *_, last = guests.come(MAX_GUESTS)
    guests.places.linger(last)
    guests.come()
    assert guests.away == [MAX_GUESTS - 1]


async def test_only_so_many_of_the_refused_are_read_on(guests: Guests) -> None:
    for guest in guests.come(LINGERERS + 2):
        guests.places.linger(guest)
    assert guests.away == [0, 1]
    assert guests.places.count() == LINGERERS


async def test_connections_and_backends_give_way_to_nobody(guests: Guests) -> None:
    for guest in guests.come(5):
        guests.places.connect(guest)
    guests.come(64)
    for stream in guests.streams[5:]:
        guests.places.trust(stream)
    assert guests.places.count(Stage.BACKEND) == 64
    # One backend too many is a guest like any other.
    guests.come()
    guests.places.trust(guests.streams[-1])
    guests.come(MAX_GUESTS)
    assert guests.away == list(range(69, 69 + 65))
    for _ in range(2 * MAX_GUESTS):
        guests.places.make_room()
    assert guests.places.count() == 69


async def test_the_one_that_gave_way_gets_no_other_place(guests: Guests) -> None:
    first = guests.come(MAX_GUESTS + 1)[0]
    guests.places.ask(first)
    guests.places.linger(first)
    guests.places.trust(guests.streams[0])
    assert first.stage is Stage.GONE
    with pytest.raises(HeadError, match="503"):
        guests.places.connect(first)
    assert guests.places.count() == MAX_GUESTS


async def test_a_place_among_the_connections_is_free_when_it_is_taken_back(guests: Guests) -> None:
    for guest in guests.come(5):
        guests.places.connect(guest)
    (late,) = guests.come()
    with pytest.raises(HeadError, match="503: too many connections"):
        guests.places.connect(late)
    assert late.stage is Stage.SILENT
    guests.go()
    guests.places.check_connections()


async def test_streams_in_memory_hold_no_file(guests: Guests) -> None:
    guests.places = admission(None, 8)
    guests.come(100)
    assert guests.away == []


@pytest.mark.parametrize("max_connections", [None, 100])
async def test_sockets_leave_files_for_the_broker_itself(max_connections: int | None) -> None:
    places = admission(max_connections, 8)  # of which 2 are for the broker itself and 2 for guests
    came = Guests(places)
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    async with listener:
        for _ in range(7):
            came.streams.append(await trio.open_tcp_stream("127.0.0.1", port))
            came.all.append(places.welcome(came.streams[-1]))
        assert came.away == [0]
        for guest in came.all[1:5]:
            places.connect(guest)
        with pytest.raises(HeadError, match="503"):
            places.connect(came.all[5])
        streams = list(came.streams)
        came.go()
        assert len(places) == 0
        for stream in streams:
            await stream.aclose()


# over a whole broker


@pytest.fixture
async def net() -> AsyncIterator[Network]:
    async with open_test_broker(Broker(Config(api_key=KEY, max_connections=5))) as network:
        yield network


async def status(net: Network, request: bytes) -> int:
    async with await net.connect() as peer:
        await peer.send(request)
        return int((await peer.receive_head()).split()[1])


async def silent(net: Network, count: int) -> list[Peer]:
    peers = [await net.connect() for _ in range(count)]
    await wait_all_tasks_blocked()
    return peers


@pytest.mark.parametrize("first", [b"", b"GET /", SLOW_BODY, SLOW_BODY + b"x"])
@pytest.mark.parametrize("count", [5, 20, MAX_GUESTS + 50])
async def test_strangers_who_never_finish_take_no_place_of_others(
    autojump_clock: MockClock, net: Network, first: bytes, count: int
) -> None:
    peers = await silent(net, count)
    for peer in peers:
        with suppress(trio.BrokenResourceError):  # some have given way
            await peer.send(first)
    await wait_all_tasks_blocked()
    began = trio.current_time()
    assert await status(net, HEALTHZ) == 200
    assert await status(net, API) == 200
    async with await net.open_client() as client:
        assert "publish" in await client.request(publish={"channel": "a", "data": 1})
    assert trio.current_time() == began
    assert net.streams <= MAX_GUESTS + 1


async def test_a_connection_too_many_is_told_and_all_else_is_served(
    autojump_clock: MockClock, net: Network
) -> None:
    clients = [await net.open_client() for _ in range(5)]
    assert await status(net, handshake()) == 503
    assert await status(net, HEALTHZ) == 200
    assert await status(net, API) == 200
    await clients[0].aclose()
    await wait_all_tasks_blocked()
    await (await net.open_client()).aclose()


async def test_a_place_is_lost_to_another_while_a_body_comes(
    autojump_clock: MockClock, net: Network
) -> None:
    async with await net.connect() as slow:
        body = b'{"id":1,"connect":{}}'
        head = f"POST /connection/http_stream HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}"
        await slow.send(head.encode() + b"\r\n\r\n" + body[:5])
        await wait_all_tasks_blocked()
        for _ in range(5):
            await net.open_client()
        await slow.send(body[5:])
        assert (await slow.receive_head()).startswith("HTTP/1.1 503 ")
    assert len(net.broker.connections()) == 5


async def test_a_backend_keeps_its_connection_through_a_flood(
    autojump_clock: MockClock, net: Network
) -> None:
    async with await net.connect() as backend:
        for count in (0, MAX_GUESTS + 50):
            for peer in await silent(net, count):
                with suppress(trio.BrokenResourceError):  # some have given way
                    await peer.send(SLOW_BODY)
            await wait_all_tasks_blocked()
            await silent(net, count)
            await backend.send(API)
            assert "HTTP/1.1 200 " in await backend.receive_head()


async def test_the_refused_hold_no_more_than_their_few_places(
    autojump_clock: MockClock, net: Network
) -> None:
    peers = await silent(net, 3 * LINGERERS)
    for peer in peers:
        await peer.send(b"nonsense\r\n\r\n")
        assert (await peer.receive_head()).startswith("HTTP/1.1 400 ")
    await wait_all_tasks_blocked()
    assert net.streams == LINGERERS
    await peers[0].receive_eof()
    await trio.sleep(net.broker.config.close_seconds + 0.1)
    assert net.streams == 0


async def test_the_one_that_gives_way_is_closed_at_once_with_one_line(
    autojump_clock: MockClock, net: Network
) -> None:
    with structlog.testing.capture_logs() as logs:
        peers = await silent(net, MAX_GUESTS + 1)
        began = trio.current_time()
        assert await peers[0].receive_eof() == b""
        assert trio.current_time() == began
    [line] = [entry for entry in logs if entry["event"] == "refused"]
    assert (line["peer"], line["reason"]) == ("memory", "no place left: gave way to a newcomer")
    assert net.broker.stats().refused == 1


# over real sockets, with few files

FILES = 256

SCRIPT = """
    import os
    import resource
    import sys

    import trio

    from broker import Broker, Config
    from broker.logs import configure

    files = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

    async def main():
        configure("json", "warning")
        broker = Broker(Config(host="127.0.0.1", port=0, api_key="a key of many characters"))
        opened = []
        async with trio.open_nursery() as nursery:
            (address,) = await nursery.start(broker.serve)
            print(address.rpartition(":")[2], flush=True)
            while True:
                line = await trio.to_thread.run_sync(sys.stdin.readline)
                order, _, count = line.strip().partition(" ")
                try:
                    for _ in range(int(count or 0)):
                        opened.append(os.open("/dev/null", os.O_RDONLY))
                except OSError as error:
                    assert error.errno == 24, error
                if order == "close":
                    for file in opened:
                        os.close(file)
                    opened = []
                elif order != "open":
                    break
                print(len(opened), broker.stats().connections, flush=True)
            broker.stop()

    trio.run(main)
"""


class FewFiles:
    """A broker in a process that may have few files open, and that opens some on order."""

    def __init__(self, script: Path) -> None:
        script.write_text(textwrap.dedent(SCRIPT))
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", script, str(FILES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        self.port = int(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def tell(self, order: str) -> tuple[int, int]:
        """Give an order; how many files the app holds then, and how many connections there are."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{order}\n")
        self.process.stdin.flush()
        opened, connections = self._line().split()
        return int(opened), int(connections)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def status(self, request: bytes) -> int:
        with self.connect() as stream:
            stream.sendall(request)
            return int(stream.recv(12)[9:12])

    def stop(self) -> list[dict[str, object]]:
        """Stop it in good order; the lines that it logged."""
        _, errors = self.process.communicate("stop\n", timeout=30)
        assert self.process.returncode == 0, errors
        return [json.loads(line) for line in errors.splitlines()]


@pytest.fixture
def few_files(tmp_path: Path) -> Iterator[FewFiles]:
    few = FewFiles(tmp_path / "few.py")
    yield few
    few.process.kill()
    few.process.communicate()


@pytest.mark.parametrize("first", [b"", SLOW_BODY, b"nonsense\r\n\r\n", handshake()])
def test_the_broker_keeps_files_of_its_own_whatever_strangers_do(
    few_files: FewFiles, first: bytes
) -> None:
    with ExitStack() as held:
        for _ in range(FILES + 50):
            held.enter_context(few_files.connect()).sendall(first)
        assert few_files.status(HEALTHZ) == 200
        assert few_files.status(API) == 200
        # As many as a few questions to backends take.
        opened, connections = few_files.tell("open 40")
        assert opened == 40
        assert connections == (128 if first == handshake() else 0)
        few_files.tell("close")
    assert few_files.stop() == []


def test_an_accept_that_finds_no_file_ends_nothing_and_is_tried_again(few_files: FewFiles) -> None:
    opened, _ = few_files.tell(f"open {FILES}")
    assert 200 < opened < FILES
    with few_files.connect() as waiting:
        waiting.sendall(HEALTHZ)
        assert few_files.tell("open 1")[0] == opened
        few_files.tell("close")
        waiting.settimeout(10)
        assert waiting.recv(12) == b"HTTP/1.1 200"
    lines = few_files.stop()
    assert {line["event"] for line in lines} == {"not_accepted"}
    assert str(lines[0]["reason"]).startswith("EMFILE")
    assert "Traceback" not in str(lines)
