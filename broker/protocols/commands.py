"""The commands of the Centrifuge client protocol, version 2 (wire reference, section 2).

Requests become the structs below, in JSON and in protobuf; payloads stay raw from end to end, so a
message is never parsed on its way through.
"""

from typing import Annotated

from msgspec import Meta, Raw, Struct

from broker.core.tags import FilterNode

RequestId = Annotated[int, Meta(ge=0, le=2**32 - 1)]
Offset = Annotated[int, Meta(ge=0)]
_EMPTY = Raw(b"")


class StreamPosition(Struct):
    offset: Offset = 0
    epoch: str = ""


class SubscribeRequest(Struct):
    channel: str = ""
    token: str = ""
    recover: bool = False
    epoch: str = ""
    offset: Offset = 0
    data: Raw = _EMPTY
    positioned: bool = False
    recoverable: bool = False
    join_leave: bool = False
    delta: str = ""
    tf: FilterNode | None = None
    flag: int = 0
    type: int = 0
    """What kind of subscription: 0 is a stream, the others are maps and polls."""


class ConnectRequest(Struct):
    token: str = ""
    data: Raw = _EMPTY
    subs: dict[str, SubscribeRequest] = {}
    name: str = ""
    version: str = ""
    headers: dict[str, str] = {}
    flag: int = 0


class ChannelRequest(Struct):
    """unsubscribe, presence and presence_stats."""

    channel: str = ""


class PublishRequest(Struct):
    channel: str = ""
    data: Raw = _EMPTY


class HistoryRequest(Struct):
    channel: str = ""
    limit: int = 0
    since: StreamPosition | None = None
    reverse: bool = False


class RpcRequest(Struct):
    method: str = ""
    data: Raw = _EMPTY


class SendRequest(Struct):
    data: Raw = _EMPTY


class RefreshRequest(Struct):
    token: str = ""


class SubRefreshRequest(Struct):
    channel: str = ""
    token: str = ""


class Command(Struct):
    """One command: an id and exactly one of the rest; an empty one is the answer to a ping."""

    id: RequestId = 0
    publish: PublishRequest | None = None
    connect: ConnectRequest | None = None
    subscribe: SubscribeRequest | None = None
    unsubscribe: ChannelRequest | None = None
    presence: ChannelRequest | None = None
    presence_stats: ChannelRequest | None = None
    history: HistoryRequest | None = None
    rpc: RpcRequest | None = None
    send: SendRequest | None = None
    refresh: RefreshRequest | None = None
    sub_refresh: SubRefreshRequest | None = None


class PublishCommand(Struct, forbid_unknown_fields=True, gc=False):
    """A command that is a publish and nothing else: what nearly all commands are."""

    publish: PublishRequest
    id: RequestId = 0


METHODS = tuple(field for field in Command.__struct_fields__ if field != "id")


class BadCommand(ValueError):
    """What came is no command of this protocol; the message says what is wrong with it."""
