"""The scripts of `test_recovery` on brokers that share a Redis: clients recover at another than they came from.

One broker is not restarted with the others, and the witness is in its program: so it hears what a
broker that was killed has appended and never read back.

Redis answers in its own time, and its clock is its own. So virtual time stands still while anything is under
way to Redis or back, and no answer is ever late; what is kept ages in Redis more slowly than here, which the
rules allow.
"""

from collections.abc import AsyncGenerator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager

import attrs
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from broker import Broker
from broker.engines.redis import RedisEngine
from broker.testing import Network, open_test_broker
from tests.engines.servers import BINARIES, Server, serving
from tests.test_recovery import CONFIG, Script, World, hold, play

EXAMPLES = 10
"""A script takes a third of a second, most of it in opening and closing brokers."""

IDLE_SECONDS = 0.003
"""In real time: who has heard nothing for so long will hear nothing."""

FOR_EVER = 1e6


@pytest.fixture(scope="module", params=list(BINARIES))
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    with serving(BINARIES[request.param], tmp_path_factory.mktemp("redis")) as server:
        trio.run(server.call, "PING")  # it is up: in virtual time nobody would wait for it
        yield server


DEADLINES = (
    *("redis.FETCH_SECONDS", "redis.OPEN_SECONDS", "redis.CLOSE_SECONDS", "redis.OVERDUE_EVERY"),
    *("redis_cluster.ANSWER_SECONDS", "redis_wire.CALL_SECONDS", "redis_wire.CONNECT_SECONDS"),
    *("redis_log.BLOCK_SECONDS", "redis_log.SILENT_SECONDS", "redis_outgoing.PUBLISH_SECONDS"),
)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is too late: virtual time says nothing of how long Redis takes."""
    for name in DEADLINES:
        monkeypatch.setattr(f"broker.engines.{name}", FOR_EVER)


class SharedWorld(World):
    """Brokers on one Redis: clients join `nodes` of them by turns. The first is restarted, the last has the
    witness."""

    keeps_all = is_shared = True

    def __init__(self, server: Server, nodes: int) -> None:
        config = attrs.evolve(CONFIG, engine=f"redis+unix://{server.socket}")
        super().__init__(Broker(config))
        self._nodes = nodes
        self._others = [Broker(config) for _ in range(max(1, nodes - 1))]
        self.brokers += self._others
        self._other_nets: list[Network] = []
        self._open_nets: list[Network] = []

    @asynccontextmanager
    async def others_opened(self) -> AsyncGenerator[None]:
        """All brokers but the first serve, and the witness listens, for as long as the block."""
        async with AsyncExitStack() as stack:
            for other in self._others:
                self._other_nets.append(await stack.enter_async_context(open_test_broker(other)))
            self._open_nets = self._other_nets
            async with trio.open_nursery() as witnesses:
                await self.begin_witnesses(self._others[-1], witnesses)
                yield
                self._others[-1].stop()

    @asynccontextmanager
    async def opened(self) -> AsyncGenerator[None]:
        try:
            async with open_test_broker(self.broker) as net:
                self._open_nets = [net, *self._other_nets]
                self.nets = self._open_nets[: self._nodes]
                await self.quiet()
                yield
        finally:
            self._open_nets = self._other_nets

    async def quiet(self) -> None:
        while True:
            await wait_all_tasks_blocked(IDLE_SECONDS / 10)
            engines = [engine_of(net) for net in self._open_nets]
            places = {engine.incoming.shared.place for engine in engines}
            if len(places) == 1 and not any(map(is_busy, engines)):
                return


def engine_of(net: Network) -> RedisEngine:
    engine = net.node.router.engine
    assert isinstance(engine, RedisEngine)
    return engine


def is_busy(engine: RedisEngine) -> bool:
    """Whether anything is under way between it and Redis, but for what others may say."""
    fetches = engine.incoming._fetches
    return bool(fetches or engine.statistics().waiting or engine.incoming.shared.flights)


async def move(clock: MockClock) -> None:
    """Let time pass from one deadline to the next while nothing is under way, until cancelled."""
    while True:
        await wait_all_tasks_blocked(IDLE_SECONDS)
        seconds = trio.lowlevel.current_statistics().seconds_to_next_deadline
        if 0 < seconds < FOR_EVER / 2:
            clock.jump(seconds)


async def play_shared(script: Script, server: Server, nodes: int, clock: MockClock) -> None:
    await server.call("FLUSHALL")
    async with trio.open_nursery() as tasks:
        tasks.start_soon(move, clock)
        world = SharedWorld(server, nodes)
        async with world.others_opened():
            await play(script, world)
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize("nodes", [1, 3])
def test_recovery_on_a_redis_never_loses_duplicates_or_reorders(
    server: Server, nodes: int, patient: None, how_many_scripts: int | None
) -> None:
    def act(script: Script) -> None:
        clock = MockClock()
        trio.run(play_shared, script, server, nodes, clock, clock=clock)

    hold(act, how_many_scripts or EXAMPLES)
