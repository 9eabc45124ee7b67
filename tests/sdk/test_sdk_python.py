"""The PyPI package `centrifuge-python`, unmodified, on asyncio."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any, NoReturn

import pytest

try:
    import centrifuge
except ImportError:
    centrifuge = None

pytestmark = pytest.mark.sdk

PATIENCE = 8.0

use_protobuf = ContextVar("use_protobuf", default=False)
"""Which of the two encodings the scenario is in. In protobuf the app sees payloads as bytes."""


def said(value: object) -> object:
    """A value as this SDK takes it."""
    return json.dumps(value).encode() if use_protobuf.get() else value


def heard(data: Any) -> object:
    """The value of what this SDK gave."""
    return json.loads(data) if use_protobuf.get() else data


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
    endpoint = f"{url}/connection/websocket"
    client = centrifuge.Client(endpoint, events=told, use_protobuf=use_protobuf.get())
    await client.connect()
    context = await told.next("connected")
    assert heard(context.data) == {"fd": int(context.client)}
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
        await a.publish(said({"text": "你好"}))
        for told in (to_alice, to_bob):
            publication = (await told.next("publication")).pub
            assert heard(publication.data) == {"text": "你好"}
            assert publication.info.client == alice.fd


async def history(url: str) -> None:
    async with connected(url) as (alice, _):
        sub, _ = await subscribed(alice, "news")
        for n in (1, 2, 3):
            await sub.publish(said(n))
        result = await sub.history(limit=100)
        assert [heard(publication.data) for publication in result.publications] == [1, 2, 3]
        assert result.offset == 3
        since = centrifuge.StreamPosition(offset=1, epoch=result.epoch)
        result = await sub.history(limit=100, since=since)
        assert [heard(publication.data) for publication in result.publications] == [2, 3]


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
        await bob.publish("room.lobby", said(1))
        await told.next("publication")
        await alice.disconnect()
        for n in (2, 3, 4):
            await bob.publish("room.lobby", said(n))
        await alice.connect()
        context = await told.next("subscribed", 2)
        assert context.was_recovering
        assert context.recovered
        await bob.publish("room.lobby", said(5))
        await told.next("publication", 5)
        assert [heard(context.pub.data) for context in told.all("publication")] == [1, 2, 3, 4, 5]


@asynccontextmanager
async def proxied(url: str) -> AsyncIterator[tuple[str, Callable[[], None]]]:
    """A way to the broker that can be cut, as networks do: without a word."""
    host, _, port = url.removeprefix("ws://").partition(":")
    writers: list[asyncio.StreamWriter] = []

    async def hand_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(2**16):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(host, int(port))
        writers.extend((writer, back))
        await asyncio.gather(hand_on(reader, back), hand_on(there, writer))

    def cut() -> None:
        for writer in writers:
            writer.transport.abort()
        writers.clear()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port_here = server.sockets[0].getsockname()[1]
        yield f"ws://127.0.0.1:{port_here}", cut
        cut()


async def interrupted_recovery(url: str) -> None:
    """The line drops while the app handles the first of three recovered publications."""
    seen: list[object] = []
    first, last = asyncio.Event(), asyncio.Event()
    async with proxied(url) as (way, cut), connected(url) as (bob, _):
        async with connected(way) as (alice, to_alice):

            class Handler(Recorder):
                async def on_publication(self, context: Any) -> None:
                    seen.append(heard(context.pub.data))
                    first.set()
                    if seen[-1] == 4:
                        last.set()
                    if seen == [1, 2]:
                        cut()
                        await to_alice.next("connecting", 3)

            told = Handler()
            sub = alice.new_subscription("room.lobby", events=told, recoverable=True)
            await sub.subscribe()
            await told.next("subscribed")
            await bob.publish("room.lobby", said(1))
            await first.wait()
            cut()
            for n in (2, 3, 4):
                await bob.publish("room.lobby", said(n))
            assert (await told.next("subscribed", 3)).recovered
            await last.wait()
            assert sorted(set(map(int, map(str, seen)))) == [1, 2, 3, 4]


async def direct(url: str) -> None:
    async with connected(url) as (alice, _), connected(url) as (bob, told):
        await alice.publish(f"fd:{bob.fd}", said({"text": "only you"}))
        context = await told.next("publication")
        assert context.channel == f"fd:{bob.fd}"
        assert heard(context.pub.data) == {"text": "only you"}
        assert context.pub.info.client == alice.fd
        with pytest.raises(centrifuge.ReplyError) as refused:
            await alice.publish("fd:999999", said(1))
        assert refused.value.code == 102


async def by_tags(url: str) -> None:
    wanted = centrifuge.Filter.any(
        centrifuge.Filter.eq("ticker", "AAPL"), centrifuge.Filter.gte("price", "100")
    )
    async with connected(url) as (alice, _):
        _, told = await subscribed(alice, "news", tags_filter=wanted)
        await alice.publish("news", said("no tags, so not wanted"))
        _, all_told = await subscribed(alice, "news.2")
        await alice.publish("news.2", said("wanted"))
        await all_told.next("publication")
        assert not told.all("publication")


async def rpc(url: str) -> None:
    async with connected(url) as (alice, _):
        with pytest.raises(centrifuge.ReplyError) as refused:
            await alice.rpc("nothing", said({}))
        assert refused.value.code == 104


@pytest.mark.parametrize("protobuf", [False, True], ids=["json", "protobuf"])
@pytest.mark.parametrize(
    "scenario", [messages, history, presence, recovery, interrupted_recovery, direct, by_tags, rpc]
)
def test_the_python_sdk_does(
    scenario: Callable[[str], Awaitable[None]],
    protobuf: bool,
    start_broker: Callable[..., Any],
    missing: Callable[[str], NoReturn],
) -> None:
    if centrifuge is None:
        missing("centrifuge-python is not installed: run `nox -s tests`")
    broker = start_broker()

    async def within_reason() -> None:
        use_protobuf.set(protobuf)
        async with asyncio.timeout(PATIENCE):
            await scenario(broker.ws)
            # The SDK says goodbye in the background, and asyncio would cut it short.
            while rest := asyncio.all_tasks() - {asyncio.current_task()}:
                await asyncio.wait(rest)

    asyncio.run(within_reason())
    broker.stop()
