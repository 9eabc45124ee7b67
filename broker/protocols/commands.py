"""The commands of the Centrifuge client protocol, version 2 (wire reference, section 2).

Requests become the structs below, in JSON and in protobuf; payloads stay raw from end to end, so a
message is never parsed on its way through.

Rule: a message that cannot be taken apart is a `BadCommand`, and ends its connection (3501). A
command that can, but has a field that it cannot have, is a `FaultyCommand`: it alone is refused.
"""

from collections.abc import Collection, Generator, Iterator
from typing import Annotated, Any, Final

from msgspec import Meta, Raw, Struct

from broker.core.json_reader import AsSent
from broker.core.tags import FilterNode
from broker.core.work import PART

RequestId = Annotated[int, Meta(ge=0, le=2**32 - 1)]
Offset = Annotated[int, Meta(ge=0)]
_EMPTY = Raw(b"")

MAX_COMMANDS: Final = 2**14
"""In one message, of either codec: they are found in 5 ms, and decoded one by one when their turn comes.
The official JavaScript SDK is back with a subscribe for each of its subscriptions in one message:
a thousand unless `max_topics` says otherwise, and 20,000 of the shortest names fit into 1 MiB."""


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
    """The kind of subscription: 0 is a stream, the others are maps and polls."""


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
    data: AsSent = _EMPTY
    """For methods of the broker it holds names, so that `json_reader.read` is what reads it."""


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
    """A command that is a publish and nothing else, as nearly all commands are."""

    publish: PublishRequest
    id: RequestId = 0


METHODS = tuple(field for field in Command.__struct_fields__ if field != "id")
WITHOUT_ID = ("publish", "send")
"""The methods that may want no reply."""

_REQUESTS: dict[str, type[Struct]] = {
    "publish": PublishRequest,
    "connect": ConnectRequest,
    "subscribe": SubscribeRequest,
    "unsubscribe": ChannelRequest,
    "presence": ChannelRequest,
    "presence_stats": ChannelRequest,
    "history": HistoryRequest,
    "rpc": RpcRequest,
    "send": SendRequest,
    "refresh": RefreshRequest,
    "sub_refresh": SubRefreshRequest,
}


class FaultyCommand(Command, kw_only=True):
    """A command to be refused with error 107, for the reason in `fault`.

    Its methods are those of the command that came, with empty requests.
    """

    fault: str


class Unread(Command, kw_only=True):
    """No command: the next one has taken so much work by now, and is not yet read."""

    work: float


FEW_PARTS: Final = 8
"""Members or fields of a command that are read for the price of every command: a subscribe has seven."""


def in_steps(reading: Generator[int, None, Command]) -> Iterator[Command]:
    """A command, and before it its price: `reading` pauses, and yields how many parts it has read since the last
    time. So a step is short, and whoever has used up its share waits before the next."""
    while True:
        try:
            parts = next(reading)
        except StopIteration as end:
            yield end.value
            return
        if parts > FEW_PARTS:
            yield Unread(work=parts * PART)


def faulty(request_id: int, methods: Collection[str], fault: str) -> FaultyCommand:
    """The command of that id and those methods, to be refused for `fault`.

    Raises `BadCommand` where nobody could be told: only a publish or a send goes without an id.
    """
    if not request_id and (len(methods) != 1 or not {*methods} <= {*WITHOUT_ID}):
        raise BadCommand(fault)
    requests: dict[str, Any] = {method: _REQUESTS[method]() for method in methods}
    return FaultyCommand(id=request_id, fault=fault, **requests)


class BadCommand(ValueError):
    """A message is no command of this protocol; the text says what is wrong with it."""
