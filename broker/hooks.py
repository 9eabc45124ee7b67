"""What an app may hook into, and the events and replies that authorizers deal in.

Every hook is async and runs in the task of the connection it is about, one at a time and in order.
What it raises ends that connection with 1011 and is logged once; `Refused` answers the one request
with an error reply, `Disconnect` sends the peer away. Cancellation reaches a hook when the
connection has ended and the hook is still busy `close_seconds` later.

`on_event` is the exception: it runs in a task of its own and holds up nobody; what it raises is
logged, and the next event comes. Cancellation reaches it `flush_seconds` after the last connection
of a broker that stops has ended.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, TypeAlias

import attrs

from broker.core.event_queue import Event
from broker.core.messages import Close, Frame

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from broker.session.connection import Connection


@attrs.frozen
class ConnectEvent:
    """A peer asks to be let in. `data` is what it sent along, decoded, or None.

    `claims` is what its token says, once that was verified; None without a token, or without a
    key to verify one.
    """

    connection: "Connection"
    token: str
    data: object
    name: str
    version: str
    claims: Mapping[str, object] | None = None


@attrs.frozen
class ConnectReply:
    """`user` and `info` are what others will see of it; `data` goes to the peer itself.

    `user` and `info` that are given come before those of a token.
    The peer is subscribed to `topics` at once, and recovers what it missed of them.
    """

    user: str = ""
    info: object = None
    data: object = None
    topics: tuple[str, ...] = ()


@attrs.frozen
class SubscribeEvent:
    """A client asks to subscribe to `topic`, which may be a pattern.

    `claims` is what its subscription token says, once that was verified; None without one.
    """

    connection: "Connection"
    topic: str
    token: str
    data: object
    claims: Mapping[str, object] | None = None


@attrs.frozen
class SubscribeReply:
    """`info` is what others will see of it on this topic; `data` goes to the client itself.

    What is given comes before what a token says.
    """

    info: object = None
    data: object = None


@attrs.frozen
class PublishEvent:
    """A client asks to publish `data` to `topic`; `fd:7` is a direct message to fd 7.

    `data` is raw JSON, or, from a client over protobuf, any bytes.
    """

    connection: "Connection"
    topic: str
    data: bytes


@attrs.frozen
class PublishReply:
    """`data`, raw JSON, is published in place of what came; None leaves it as it is."""

    data: bytes | None = None


@attrs.frozen
class ReadEvent:
    """A client asks for the history or the presence of `topic`."""

    connection: "Connection"
    topic: str


OpenHook: TypeAlias = Callable[["Connection"], Awaitable[None]]
MessageHook: TypeAlias = Callable[["Connection", Frame], Awaitable[None]]
CloseHook: TypeAlias = Callable[["Connection", Close], Awaitable[None]]
RpcHook: TypeAlias = Callable[["Connection", str, object], Awaitable[object]]
RequestHook: TypeAlias = Callable[["Request"], Awaitable["Response | None"]]
ConnectHook: TypeAlias = Callable[[ConnectEvent], Awaitable[ConnectReply | None]]
SubscribeHook: TypeAlias = Callable[[SubscribeEvent], Awaitable[SubscribeReply | None]]
PublishHook: TypeAlias = Callable[[PublishEvent], Awaitable[PublishReply | None]]
ReadHook: TypeAlias = Callable[[ReadEvent], Awaitable[None]]
EventHook: TypeAlias = Callable[[Event], Awaitable[None]]


@attrs.define(eq=False)
class Hooks:
    """The hooks that an app has set; None where it has none."""

    open: OpenHook | None = None
    message: MessageHook | None = None
    close: CloseHook | None = None
    rpc: RpcHook | None = None
    request: RequestHook | None = None
    connect: ConnectHook | None = None
    subscribe: SubscribeHook | None = None
    publish: PublishHook | None = None
    presence: ReadHook | None = None
    history: ReadHook | None = None
    event: EventHook | None = None
