"""Hooks as type checkers see them: `test_hooks.py` has mypy and pyright read this; nobody runs it.

A line that a checker has to complain of says `type: ignore`, and a checker complains of one that
says so for nothing. So this file has no errors if every hook below is judged as it should be.
"""

from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, assert_type

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from broker import (
    Broker,
    Close,
    ConnectEvent,
    Connection,
    ConnectReply,
    Event,
    Frame,
    Handshake,
    HandshakeReply,
    PublishEvent,
    PublishReply,
    ReadEvent,
    SubscribeEvent,
    SubscribeReply,
)

broker = Broker()


# as they should be


@broker.on_handshake
async def asked(handshake: Handshake) -> HandshakeReply | None:
    assert_type(handshake.query, str)
    assert_type(handshake.params, Mapping[str, str])
    assert_type(handshake.cookies, Mapping[str, str])
    assert_type(handshake.subprotocols, tuple[str, ...])
    return HandshakeReply({"X-Served-By": "a"}, {"seen": "1"}, "chat.v2")


@broker.on_open
async def opened(connection: Connection) -> None:
    assert_type(connection.fd, int)
    assert_type(connection.user, str)
    assert_type(connection.claims, Mapping[str, object])
    assert_type(connection.data, dict[str, Any])
    assert_type(connection.headers, Mapping[str, str])
    assert_type(connection.subprotocol, str | None)
    assert_type(connection.remote_port, int)
    connection.data["seen"] = 1
    broker.push(connection.fd, connection.info().topics)


@broker.on_message
async def heard(connection: Connection, frame: Frame) -> None: ...


@broker.on_buffer_full
@broker.on_buffer_empty
async def filling(connection: Connection) -> None: ...


@broker.on_close
async def closed(connection: object, close: Close) -> None: ...


@broker.on_rpc
async def called(connection: Connection, method: str, data: object) -> list[int]:
    return [1]


@broker.on_request
async def requested(request: Request) -> JSONResponse:
    return JSONResponse({})


@broker.on_connect
async def let_in(event: ConnectEvent) -> ConnectReply | None:
    return ConnectReply("ann", {"name": "Ann"}, {"hello": 1}, ["news"])


@broker.on_subscribe
async def may_read(event: SubscribeEvent) -> SubscribeReply:
    return SubscribeReply()


@broker.on_publish
async def may_write(event: PublishEvent) -> PublishReply | None:
    return PublishReply(b"1")


@broker.on_presence
async def may_see(event: ReadEvent) -> None: ...


@broker.on_history
async def may_look_back(event: ReadEvent) -> None: ...


@broker.on_event
async def happened(event: Event) -> None: ...


class App:
    async def may_read(self, event: SubscribeEvent) -> None: ...

    async def __call__(self, event: SubscribeEvent, more: int = 0) -> None: ...


async def with_more(more: int, event: SubscribeEvent) -> None: ...


def forward(event: SubscribeEvent) -> Awaitable[None]:
    return App().may_read(event)


broker.on_subscribe(App().may_read)
broker.on_subscribe(App())
broker.on_subscribe(partial(with_more, 1))
broker.on_subscribe(forward)


async def keeps_its_type() -> None:
    event: Any = None
    # A decorated function is what it was.
    assert_type(await called(event, "", None), list[int])
    assert_type(await requested(event), JSONResponse)
    assert_type(await may_read(event), SubscribeReply)


# another event


@broker.on_open  # type: ignore[type-var]
async def opened_with_an_event(connection: ConnectEvent) -> None: ...


@broker.on_message  # type: ignore[type-var]
async def heard_a_text(connection: Connection, frame: str) -> None: ...


@broker.on_buffer_full  # type: ignore[type-var]
async def filling_with_bytes(connection: Connection, waiting: int) -> None: ...


@broker.on_close  # type: ignore[type-var]
async def closed_with_a_code(connection: Connection, close: int) -> None: ...


@broker.on_rpc  # type: ignore[type-var]
async def called_with_a_dict(connection: Connection, method: str, data: dict[str, int]) -> None: ...


@broker.on_request  # type: ignore[type-var]
async def requested_by_path(request: str) -> None: ...


@broker.on_connect  # type: ignore[type-var]
async def let_in_for_another(event: SubscribeEvent) -> None: ...


@broker.on_subscribe  # type: ignore[type-var]
async def may_read_for_another(event: PublishEvent) -> None: ...


@broker.on_publish  # type: ignore[type-var]
async def may_write_for_another(event: ConnectEvent) -> None: ...


@broker.on_presence  # type: ignore[type-var]
async def may_see_for_another(event: SubscribeEvent) -> None: ...


@broker.on_history  # type: ignore[type-var]
async def may_look_back_for_another(event: PublishEvent) -> None: ...


@broker.on_event  # type: ignore[type-var]
async def happened_for_another(event: ReadEvent) -> None: ...


@broker.on_handshake  # type: ignore[type-var]
async def asked_for_a_connection(connection: Connection) -> None: ...


# another number of arguments


@broker.on_open  # type: ignore[type-var]
async def opened_with_nothing() -> None: ...


@broker.on_message  # type: ignore[type-var]
async def heard_nothing(connection: Connection) -> None: ...


@broker.on_close  # type: ignore[type-var]
async def closed_with_two(connection: Connection, code: int, reason: str) -> None: ...


@broker.on_rpc  # type: ignore[type-var]
async def called_without_data(connection: Connection, method: str) -> object: ...


@broker.on_subscribe  # type: ignore[type-var]
async def may_read_with_two(connection: Connection, topic: str) -> None: ...


@broker.on_publish  # type: ignore[type-var]
async def may_write_by_keyword(event: PublishEvent, *, more: int) -> None: ...


# another answer


@broker.on_handshake  # type: ignore[type-var]
async def asked_and_told_no(handshake: Handshake) -> bool:
    return False


@broker.on_open  # type: ignore[type-var]
async def opened_is_told_no(connection: Connection) -> bool:
    return False


@broker.on_message  # type: ignore[type-var]
async def heard_and_answered(connection: Connection, frame: Frame) -> str:
    return "heard"


@broker.on_close  # type: ignore[type-var]
async def closed_and_counted(connection: Connection, close: Close) -> int:
    return 1


@broker.on_request  # type: ignore[type-var]
async def requested_and_told(request: Request) -> Response | str:
    return "here"


@broker.on_connect  # type: ignore[type-var]
async def let_in_by_a_bool(event: ConnectEvent) -> bool:
    return True


@broker.on_subscribe  # type: ignore[type-var]
async def may_read_by_a_bool(event: SubscribeEvent) -> bool:
    return False


@broker.on_publish  # type: ignore[type-var]
async def may_write_by_another(event: PublishEvent) -> SubscribeReply:
    return SubscribeReply()


@broker.on_presence  # type: ignore[type-var]
async def may_see_by_a_bool(event: ReadEvent) -> bool:
    return False


@broker.on_history  # type: ignore[type-var]
async def may_look_back_by_a_dict(event: ReadEvent) -> dict[str, int]:
    return {}


@broker.on_event  # type: ignore[type-var]
async def happened_and_more(event: Event) -> bool:
    return True


# not async


@broker.on_message  # type: ignore[type-var]
def heard_at_once(connection: Connection, frame: Frame) -> None: ...


@broker.on_subscribe  # type: ignore[type-var]
def may_read_at_once(event: SubscribeEvent) -> SubscribeReply | None: ...


@broker.on_rpc  # type: ignore[type-var]
def called_at_once(connection: Connection, method: str, data: object) -> str:
    return ""


@broker.on_request  # type: ignore[type-var]
def requested_at_once(request: Request) -> Response:
    return Response()


# an app's own code, on a Connection and on replies


def beyond_the_api(connection: Connection) -> None:
    connection.outbox  # type: ignore[attr-defined]  # noqa: B018
    connection.user = "bob"  # type: ignore[misc]
    connection.close(1000)  # type: ignore[attr-defined]


ConnectReply(topics="news")  # type: ignore[arg-type]
ConnectReply(user=None)  # type: ignore[arg-type]
ConnectReply(data=[1])  # type: ignore[arg-type]
PublishReply("text")  # type: ignore[arg-type]
ConnectReply(topics=("news",))
ConnectReply(topics={"news"})

decorator: Callable[[Callable[[ReadEvent], Awaitable[None]]], object] = broker.on_history
