"""Apps that an attack is aimed at: hooks that are slow, wrong or broken. Served as
`python -m broker tests.hostile.apps:NAME`."""

import os
import time

import trio

from broker import (
    Broker,
    Close,
    ConnectEvent,
    Connection,
    ConnectReply,
    Frame,
    PublishEvent,
    ReadEvent,
    Refused,
    SubscribeEvent,
)

slow_open = Broker()
slow_messages = Broker()
authorizing = Broker()
subscribing = Broker()
false_subscribe = Broker()
binding = Broker()
slow_publish = Broker()
thinking = Broker()
headers = Broker()
slow_subscribe = Broker()
slow_close = Broker()
raising = Broker()
exiting = Broker()
blocking = Broker()
leaking = Broker()


@slow_open.on_open
async def _wait_long(connection: Connection) -> None:
    if "x-slow" in connection.headers:
        await trio.sleep(5)


@slow_messages.on_message
async def _take_long(connection: Connection, frame: Frame) -> None:
    await trio.sleep(0.2)


@authorizing.on_connect
async def _who(event: ConnectEvent) -> ConnectReply:
    user = {"s3cret": "alice", "b0b": "bob"}.get(event.token)
    if user is None:
        raise Refused(101)
    return ConnectReply(user=user)


@authorizing.on_subscribe
async def _staff_only(event: SubscribeEvent) -> None:
    if event.topic.startswith("staff.") and event.connection.user != "alice":
        raise Refused(103)


@subscribing.on_connect
async def _news_for_all(event: ConnectEvent) -> ConnectReply:
    return ConnectReply(topics=("news",))


@false_subscribe.on_subscribe  # type: ignore[type-var]  # as an app may do it
async def _no(event: SubscribeEvent) -> bool | None:
    return False if event.topic == "$payroll" else None


@binding.on_rpc
async def _be(connection: Connection, method: str, data: object) -> object:
    assert isinstance(data, dict)
    binding.bind(connection.fd, data["user"])
    return {}


@slow_publish.on_publish
async def _think(event: PublishEvent) -> None:
    if event.topic == "slow":
        await trio.sleep(1)


@thinking.on_publish
@thinking.on_subscribe
@thinking.on_presence
@thinking.on_history
async def _think_of_all(event: PublishEvent | SubscribeEvent | ReadEvent) -> None:
    if event.topic.startswith("slow"):
        await trio.sleep(1)


@thinking.on_rpc
async def _think_of_a_call(connection: Connection, method: str, data: object) -> object:
    await trio.sleep(1)
    return data


@headers.on_connect
async def _show(event: ConnectEvent) -> ConnectReply:
    seen = event.connection.headers
    return ConnectReply(data={name: seen.get(name, "") for name in ("x-forwarded-for", "cookie")})


@slow_subscribe.on_subscribe
async def _ask_somebody(event: SubscribeEvent) -> None:
    await trio.sleep(0.1)


@slow_close.on_close
async def _tidy_up(connection: Connection, close: Close) -> None:
    await trio.sleep(3)


@slow_close.on_message
async def _hang(connection: Connection, frame: Frame) -> None:
    await trio.sleep_forever()


@raising.on_message
async def _raise(connection: Connection, frame: Frame) -> None:
    raise ValueError(frame.data)


@exiting.on_message
async def _exit(connection: Connection, frame: Frame) -> None:
    raise {"SystemExit": SystemExit(3), "GeneratorExit": GeneratorExit()}.get(
        str(frame.data), BaseException(str(frame.data))
    )


@blocking.on_message
async def _block(connection: Connection, frame: Frame) -> None:
    time.sleep(0.5)  # noqa: ASYNC251 - that is the mistake


_kept: list[object] = []


@leaking.on_message
async def _leak(connection: Connection, frame: Frame) -> None:
    _kept.append((os.dup(0), bytes(b"x" * 40 * 2**20)))
