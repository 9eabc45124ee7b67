"""The PyPI package `centrifuge-python`, unmodified, on asyncio."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, NoReturn

import pytest

try:
    import centrifuge
except ImportError:
    centrifuge = None

pytestmark = pytest.mark.sdk

PATIENCE = 8.0


class Recorder:
    """An event handler of either kind: notes what it is told, and can be waited on."""

    def __init__(self) -> None:
        self.happened: list[tuple[str, Any]] = []
        self._news = asyncio.Event()

    def __getattr__(self, name: str) -> Callable[[Any], Awaitable[None]]:
        if not name.startswith("on_"):
            raise AttributeError(name)

        async def note(context: Any) -> None:
            self.happened.append((name.removeprefix("on_"), context))
            self._news.set()

        return note

    def all(self, name: str) -> list[Any]:
        return [context for kind, context in self.happened if kind == name]

    async def next(self, name: str, count: int = 1) -> Any:
        """The `count`th event of this name, waited for."""
        while len(self.all(name)) < count:
            self._news.clear()
            await self._news.wait()
        return self.all(name)[count - 1]


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[tuple[Any, Recorder]]:
    """A connected client and what it is told; `.fd` is its number here."""
    told = Recorder()
    client = centrifuge.Client(f"{url}/connection/websocket", events=told)
    await client.connect()
    context = await told.next("connected")
    assert context.data == {"fd": int(context.client)}
    client.fd = context.client
    try:
        yield client, told
    finally:
        await client.disconnect()


async def subscribed(client: Any, topic: str, **options: Any) -> tuple[Any, Recorder]:
    told = Recorder()
    sub = client.new_subscription(topic, events=told, **options)
    await sub.subscribe()
    await told.next("subscribed")
    return sub, told


async def messages(url: str) -> None:
    async with connected(url) as (alice, _), connected(url) as (bob, _):
        a, to_alice = await subscribed(alice, "room.lobby")
        _, to_bob = await subscribed(bob, "room.lobby")
        await a.publish({"text": "你好"})
        for told in (to_alice, to_bob):
            publication = (await told.next("publication")).pub
            assert publication.data == {"text": "你好"}
            assert publication.info.client == alice.fd


async def history(url: str) -> None:
    async with connected(url) as (alice, _):
        sub, _ = await subscribed(alice, "news")
        for n in (1, 2, 3):
            await sub.publish(n)
        result = await sub.history(limit=100)
        assert [publication.data for publication in result.publications] == [1, 2, 3]
        assert result.offset == 3
        since = centrifuge.StreamPosition(offset=1, epoch=result.epoch)
        result = await sub.history(limit=100, since=since)
        assert [publication.data for publication in result.publications] == [2, 3]


async def presence(url: str) -> None:
    async with connected(url) as (alice, _), connected(url) as (bob, _):
        a, told = await subscribed(alice, "room.lobby", join_leave=True)
        b, _ = await subscribed(bob, "room.lobby")
        assert (await told.next("join", 2)).info.client == bob.fd  # after its own
        assert set((await a.presence()).clients) == {alice.fd, bob.fd}
        assert (await a.presence_stats()).num_clients == 2
        await b.unsubscribe()
        assert (await told.next("leave")).info.client == bob.fd
        assert set((await a.presence()).clients) == {alice.fd}


async def recovery(url: str) -> None:
    async with connected(url) as (alice, _), connected(url) as (bob, _):
        _, told = await subscribed(alice, "room.lobby", recoverable=True)
        await bob.publish("room.lobby", 1)
        await told.next("publication")
        await alice.disconnect()
        for n in (2, 3, 4):
            await bob.publish("room.lobby", n)
        await alice.connect()
        context = await told.next("subscribed", 2)
        assert context.was_recovering
        assert context.recovered
        await bob.publish("room.lobby", 5)
        await told.next("publication", 5)
        assert [context.pub.data for context in told.all("publication")] == [1, 2, 3, 4, 5]


async def direct(url: str) -> None:
    async with connected(url) as (alice, _), connected(url) as (bob, told):
        await alice.publish(f"fd:{bob.fd}", {"text": "only you"})
        context = await told.next("publication")
        assert context.channel == f"fd:{bob.fd}"
        assert context.pub.data == {"text": "only you"}
        assert context.pub.info.client == alice.fd
        with pytest.raises(centrifuge.ReplyError) as refused:
            await alice.publish("fd:999999", 1)
        assert refused.value.code == 102


async def rpc(url: str) -> None:
    async with connected(url) as (alice, _):
        with pytest.raises(centrifuge.ReplyError) as refused:
            await alice.rpc("nothing", {})
        assert refused.value.code == 104


@pytest.mark.parametrize("scenario", [messages, history, presence, recovery, direct, rpc])
def test_the_python_sdk_does(
    scenario: Callable[[str], Awaitable[None]],
    start_broker: Callable[..., Any],
    missing: Callable[[str], NoReturn],
) -> None:
    if centrifuge is None:
        missing("centrifuge-python is not installed: run `nox -s sdk`")
    broker = start_broker()

    async def within_reason() -> None:
        async with asyncio.timeout(PATIENCE):
            await scenario(broker.ws)
            # The SDK says goodbye in the background, and asyncio would cut it short.
            while rest := asyncio.all_tasks() - {asyncio.current_task()}:
                await asyncio.wait(rest)

    asyncio.run(within_reason())
    broker.stop()
