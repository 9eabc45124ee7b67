"""How far does it go? From one process to the internet, reckoned from what single things cost:
`python benchmarks/scale.py`.

Prints what each thing costs, with the command that measures it; what loads of each size need, and which limit
is the next; and two simulations, of topics that are not alike, and of a node that dies. `--measure` measures the
costs of the shared log here and now, in CPU time, in one minute; `--write` puts the tables into docs/scale.md,
and with `--measure` what was measured into `COSTS` first.

`Load` and `COSTS` are all that goes in: another load by `--connections`, `--publishes` and so on.
"""

import argparse
import math
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import attrs

# what single things cost


@attrs.frozen
class Cost:
    """What one thing takes, in a unit, and the command that measures it."""

    name: str
    value: float
    unit: str
    command: str


BENCH = "nox -s bench -- --scenario "
MEASURE = "python benchmarks/scale.py --measure"
COSTS = (
    Cost("connection", 11.8, "KiB", BENCH + "idle"),
    Cost("connect", 320, "µs of a node", BENCH + "idle"),
    Cost("lone delivery", 6.1, "µs of a node", BENCH + "paced-100"),
    Cost("publish, acked", 24, "µs of a node", "python benchmarks/engines.py --only 100"),
    Cost("entry read and skipped", 0.62, "µs of each node", MEASURE),
    Cost("publish with history", 18, "µs of Redis", MEASURE),
    Cost("publish without", 5, "µs of Redis", MEASURE),
    Cost("reader", 0.59, "µs of Redis, for each publish and node", MEASURE),
)

CORE = 1e6
"""µs of a core in a second."""
BUSY = 0.6
"""So much of a core is planned for: beyond it what waits grows faster than the load."""
NODE_GIB = 2.0
"""Memory for clients of one node, beside 60 MiB for Python."""
READING = 0.2
"""So much of a node may go into reading what nobody there wants."""


def cost(name: str) -> float:
    return next(each.value for each in COSTS if each.name == name)


# what a load needs


@attrs.frozen
class Load:
    """What clients do: by default people who chat, each in rooms of ten, with a line a minute."""

    connections: int
    publishes: float = 1 / 60
    """A second, of each connection."""
    listeners: int = 10
    """Who get each publication."""
    kept: float = 1.0
    """Part of the publications whose topics have history."""

    @property
    def published(self) -> float:
        return self.connections * self.publishes


@attrs.frozen
class Need:
    """What a load takes, and what would be short next."""

    nodes: int
    logs: int
    redis_busy: float
    """Part of a core, of each log's Redis."""
    node_busy: float
    reading: float
    """Part of a node's core that goes into entries that nobody there wants."""
    short: str


def need(load: Load, *, shared: bool) -> Need:
    """Nodes and cells for a load. Where one log is too slow the load is divided among cells, each with a log
    and nodes of its own, as many as are needed for each to stay below its limits."""
    cells = 1
    while True:
        share = attrs.evolve(load, connections=math.ceil(load.connections / cells))
        found = _in_one_cell(share) if shared else _alone(share)
        if found is not None:
            return attrs.evolve(found, nodes=found.nodes * cells, logs=cells if shared else 0)
        if not shared:
            raise ValueError("one process does not carry it")
        cells += max(1, cells // 16)


def _of_own(load: Load) -> float:
    """µs of all nodes together in a second, without what they read of each other."""
    return load.published * (cost("publish, acked") + load.listeners * cost("lone delivery"))


def _alone(load: Load) -> Need | None:
    busy = _of_own(load) / CORE
    memory = load.connections * cost("connection") / 2**20
    if busy > BUSY or memory > NODE_GIB:
        return None
    return Need(
        1, 0, 0.0, busy, 0.0, "its core" if busy / BUSY > memory / NODE_GIB else "its memory"
    )


def _in_one_cell(load: Load) -> Need | None:
    by_memory = load.connections * cost("connection") / 2**20 / NODE_GIB
    reading = load.published * cost("entry read and skipped") / CORE
    if reading > READING:
        return None
    by_core = _of_own(load) / CORE / (BUSY - reading)
    nodes = max(2, math.ceil(max(by_memory, by_core)))
    each = load.kept * cost("publish with history") + (1 - load.kept) * cost("publish without")
    redis = load.published * (each + nodes * cost("reader")) / CORE
    if redis > BUSY:
        return None
    node_busy = _of_own(load) / CORE / nodes + reading
    parts = {"Redis": redis / BUSY, "reading the log": reading / READING}
    return Need(nodes, 1, redis, node_busy, reading, max(parts, key=parts.__getitem__))


SIZES = (1_000, 10_000, 50_000, 100_000, 1_000_000, 10_000_000, 100_000_000, 1_000_000_000)


def sizes_table(load: Load, sizes: Sequence[int] = SIZES) -> Iterator[str]:
    yield "| connections | publishes a second | deliveries a second | run | nodes | a node is busy | of that reading | Redis is busy | short next |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for size in sizes:
        sized = attrs.evolve(load, connections=size)
        try:
            found = need(sized, shared=False)
        except ValueError:
            found = need(sized, shared=True)
        run = (
            "one process"
            if not found.logs
            else "one Redis"
            if found.logs == 1
            else f"{found.logs:,} cells"
        )
        yield (
            f"| {size:,} | {sized.published:,.0f} | {sized.published * sized.listeners:,.0f} | {run} | {found.nodes:,} | "
            f"{found.node_busy:.0%} | {found.reading:.0%} | {found.redis_busy:.0%} | {found.short} |"
        )


def limits_table() -> Iterator[str]:
    """How much one Redis carries, by how many nodes read it."""
    yield "| nodes on one Redis | publishes a second with history | without | a node reads |"
    yield "| --- | --- | --- | --- |"
    for nodes in (1, 2, 4, 8, 16, 32, 64):
        most = [
            BUSY * CORE / (cost(name) + nodes * cost("reader"))
            for name in ("publish with history", "publish without")
        ]
        reading = most[0] * cost("entry read and skipped") / CORE
        yield f"| {nodes} | {most[0]:,.0f} | {most[1]:,.0f} | {reading:.0%} of its core |"


def costs_table() -> Iterator[str]:
    yield "| what | costs | measured by |"
    yield "| --- | --- | --- |"
    for each in COSTS:
        yield f"| {each.name} | {each.value:g} {each.unit} | `{each.command}` |"


# simulations


def hottest(topics: int, parts: int, exponent: float, seed: int) -> float:
    """The load of the fullest of so many cells or shards, as a multiple of the mean, where the n-th topic is
    published to as often as 1 ÷ n^exponent, and its name alone says where it goes."""
    chance = random.Random(seed)
    loads = [0.0] * parts
    for number in range(1, topics + 1):
        loads[chance.randrange(parts)] += number**-exponent
    return max(loads) * parts / sum(loads)


def hottest_table() -> Iterator[str]:
    yield "| topics | parts | all alike | the n-th 1 ÷ √n | the n-th 1 ÷ n |"
    yield "| --- | --- | --- | --- | --- |"
    for topics, parts in ((1_000, 16), (100_000, 16), (100_000, 256)):
        cells = (
            f"{sum(hottest(topics, parts, exponent, seed) for seed in range(3)) / 3:.2f}"
            for exponent in (0.0, 0.5, 1.0)
        )
        yield f"| {topics:,} | {parts} | {' | '.join(cells)} |"


def storm(connections: int, nodes: int, seed: int = 0) -> tuple[float, float, float]:
    """A node dies with so many connections, which come back to the others as an SDK does: after a part of
    0.5 s by chance, then of 1 s, 2 s, …, 20 s when they are refused. Seconds until half of them are back, all of
    them, and the busiest tenth of a second of a node, as a part of its core.

    A node takes what it can in half of its time, and lets 100 more wait; the rest is refused.
    """
    chance = random.Random(seed)
    step = 0.1
    most = BUSY * CORE * step / cost("connect")
    due: dict[int, list[int]] = {}
    for _ in range(connections):
        due.setdefault(int(chance.random() * 0.5 / step), []).append(1)
    back, half, busiest, now, waiting = 0, 0.0, 0.0, 0, [0.0] * nodes
    while back < connections:
        refused = 0
        for tries in due.pop(now, ()):
            node = min(chance.randrange(nodes), chance.randrange(nodes), key=waiting.__getitem__)
            if waiting[node] < most + 100:
                waiting[node] += 1
                continue
            refused += 1
            delay = chance.random() * min(20.0, 0.5 * 2**tries)
            due.setdefault(now + 1 + int(delay / step), []).append(tries + 1)
        for node in range(nodes):
            taken = min(waiting[node], most)
            waiting[node] -= taken
            back += round(taken)
            busiest = max(busiest, taken * cost("connect") / CORE / step)
        now += 1
        if not half and back >= connections / 2:
            half = now * step
        if not due and not any(waiting):
            break
    return half, now * step, busiest


def storm_table() -> Iterator[str]:
    yield "| connections of the dead node | nodes left | half are back after | all | the others are busy with it |"
    yield "| --- | --- | --- | --- | --- |"
    for connections, nodes in ((10_000, 1), (10_000, 3), (50_000, 1), (50_000, 3), (50_000, 15)):
        half, whole, busiest = storm(connections, nodes)
        yield f"| {connections:,} | {nodes} | {half:.1f} s | {whole:.1f} s | {busiest:.0%} of a core |"


# the costs of the shared log, measured here


async def _measure(readers: int, kept: bool, count: int = 20_000) -> tuple[float, float]:
    """µs of CPU of Redis, and of this process with all its engines, for each publication that one engine
    submits, while so many others read what nobody there wants."""
    import trio
    from engines import PAYLOAD, _Nobody

    from broker.config.engine_url import parse_engine_url
    from broker.config.settings import TopicRules
    from broker.core.messages import Position, Publication
    from broker.core.session import Parcel
    from broker.engines.engine import Submission
    from broker.engines.redis import open_redis
    from broker.errors import Refused

    rules = TopicRules(history_size=100 if kept else 0, history_ttl=300)
    acked, more = 0, trio.Event()

    def done(answer: Position | Refused | None) -> None:
        nonlocal acked
        assert not isinstance(answer, Refused), answer
        acked += 1
        more.set()

    with _redis() as (pid, url):
        redis = parse_engine_url(url).redis
        assert redis is not None

        async def read(task_status: trio.TaskStatus[None]) -> None:
            async with open_redis(redis, 2**26, 2**20, time.time) as engine:
                async with engine.running(_Nobody()):
                    task_status.started()
                    await trio.sleep_forever()

        async with trio.open_nursery() as tasks:
            for _ in range(readers):
                await tasks.start(read)
            async with open_redis(redis, 2**26, 2**20, time.time) as engine:
                async with engine.running(_Nobody()):
                    before, own = _cpu(pid), time.process_time()
                    for number in range(count):
                        topic = f"t{number % 1000}"
                        parcel = Parcel(topic, "close", [[Publication(topic, PAYLOAD)]])
                        engine.submit(Submission(parcel, rules, keep=kept, dones=[done]))
                        while number + 1 - acked >= 256:
                            more = trio.Event()
                            await more.wait()
                    while acked < count:
                        more = trio.Event()
                        await more.wait()
                    await trio.sleep(0.2)  # the others have read it, too
                    after, here = _cpu(pid), time.process_time()
            tasks.cancel_scope.cancel()
    return (after - before) * 1e6 / count, (here - own) * 1e6 / count


@contextmanager
def _redis() -> Iterator[tuple[int, str]]:
    """A Redis of its own: its process, and its URL."""
    from engines import _process, _redis_program, _to_unix

    with tempfile.TemporaryDirectory() as place:
        path = Path(place, "redis.sock")
        argv = [_redis_program(), "--port", "0", "--unixsocket", str(path), "--save", ""]
        with _process([*argv, "--dir", place], partial(_to_unix, path)) as link:
            pid: int = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED)
            yield pid, f"redis+unix://{path}"


def _cpu(pid: int) -> float:
    """Seconds of CPU of a process (Linux: /proc/PID/schedstat of each of its tasks)."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def measured() -> Mapping[str, float]:
    """The costs of the shared log here and now, by their names."""
    import trio

    def least(readers: int, kept: bool) -> tuple[float, float]:
        """Of three runs: what others do to the caches of a core only adds to it."""
        runs = [trio.run(_measure, readers, kept) for _ in range(3)]
        return min(redis for redis, _ in runs), min(own for _, own in runs)

    (alone, own), (with_readers, all_of_them) = least(0, True), least(4, True)
    without, _ = least(0, False)
    reader = (with_readers - alone) / 4
    return {
        "publish with history": alone - reader,
        "publish without": without - reader,
        "reader": reader,
        "entry read and skipped": (all_of_them - own) / 4,
    }


# the page

PAGE = Path(__file__).parent.parent / "docs" / "scale.md"
TABLES: Mapping[str, Callable[[], Iterator[str]]] = {
    "costs": costs_table,
    "sizes": lambda: sizes_table(Load(0)),
    "limits": limits_table,
    "hottest": hottest_table,
    "storm": storm_table,
}


def with_tables(page: str) -> str:
    """The page with the tables as they are now, each between its two marks."""
    for name, table in TABLES.items():
        text = f"<!-- {name}: begin -->\n" + "\n".join(table()) + f"\n<!-- {name}: end -->"
        marks = rf"<!-- {name}: begin -->.*?<!-- {name}: end -->"
        page = re.sub(marks, lambda _, text=text: text, page, flags=re.DOTALL)
    return page


def with_costs(source: str, found: Mapping[str, float]) -> str:
    """This program with other costs, of two digits that count."""
    for name, value in found.items():
        source, count = re.subn(
            rf'(Cost\("{name}", )[\d.]+', rf"\g<1>{float(f'{value:.2g}'):g}", source
        )
        assert count == 1, name
    return source


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--measure", action="store_true", help="the costs of the shared log, here")
    parser.add_argument("--write", action="store_true", help="the tables into docs/scale.md")
    parser.add_argument("--connections", type=int, default=0, help="one size in place of all")
    parser.add_argument(
        "--publishes", type=float, default=1 / 60, help="a second, of each connection"
    )
    parser.add_argument("--listeners", type=int, default=10, help="who get each publication")
    parser.add_argument("--kept", type=float, default=1.0, help="part of them with history")
    options = parser.parse_args()
    if options.measure:
        print("| what | stands in COSTS | here and now |\n| --- | --- | --- |")
        found = measured()
        for name, value in found.items():
            print(f"| {name} | {cost(name):g} µs | {value:.2f} µs |")
        if options.write:
            itself = Path(__file__)
            itself.write_text(with_costs(itself.read_text("utf-8"), found), "utf-8")
            subprocess.run([sys.executable, str(itself), "--write"], check=True)
        return
    if options.write:
        PAGE.write_text(with_tables(PAGE.read_text("utf-8")), "utf-8")
        return
    load = Load(0, options.publishes, options.listeners, options.kept)
    sizes = (options.connections,) if options.connections else SIZES
    print("\n".join(sizes_table(load, sizes)))
    if not options.connections:
        for name in [each for each in TABLES if each != "sizes"]:
            print("\n" + "\n".join(TABLES[name]()))


if __name__ == "__main__":
    main()
