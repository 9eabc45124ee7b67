"""The answers of the HTTP API's methods, as types: for its description, and for those who read it.

The answers themselves are written piece by piece, because some are long. Tests compare both.
"""

from typing import Any

from msgspec import UNSET, Struct, UnsetType

from broker.config.effective import EffectiveSetting
from broker.core.messages import ConnectionDetails
from broker.core.trace import Entry


class Nothing(Struct):
    """It is done; there is nothing to tell."""


class Error(Struct):
    """Why a command was refused; the codes are those of error replies to clients."""

    code: int
    message: str


class Published(Struct):
    """The place of a publication in its topic's history, if it has one; and its outcome, if `report` asked
    for that. `complete` is there, and false, where a node has not answered."""

    offset: int | UnsetType = UNSET
    epoch: str | UnsetType = UNSET
    matched: int | UnsetType = UNSET
    queued: int | UnsetType = UNSET
    dropped: int | UnsetType = UNSET
    failed: list[int] | UnsetType = UNSET
    complete: bool | UnsetType = UNSET


class Response(Struct):
    """The answer for one topic of a broadcast: one of the two."""

    result: Published | UnsetType = UNSET
    error: Error | UnsetType = UNSET


class Broadcasted(Struct):
    responses: list[Response]


class Client(Struct):
    """A client, as others see it. `client` is its fd in decimal."""

    client: str
    user: str
    conn_info: Any = UNSET  # any JSON, of which a schema is made: msgspec calls that `Any`
    chan_info: Any = UNSET  # the same


class Presence(Struct):
    """The subscribed clients, by their fds in decimal."""

    presence: dict[str, Client]


class PresenceStats(Struct):
    num_clients: int
    num_users: int


class KeptPublication(Struct):
    data: Any  # any JSON, as above
    offset: int
    tags: dict[str, str] | UnsetType = UNSET
    info: Client | UnsetType = UNSET


class HistoryPage(Struct):
    """A part of what is kept, and the top of the topic: while the last `offset` in the list is below that,
    there is more."""

    publications: list[KeptPublication]
    offset: int
    epoch: str


class NumClients(Struct):
    num_clients: int


class ChannelList(Struct):
    channels: dict[str, NumClients]


class NodeMetrics(Struct):
    """The counts of a node in `interval` seconds, which is since it began."""

    interval: float
    items: dict[str, float]


class NodeInfo(Struct):
    """One node; `alive` says whether it has answered."""

    uid: str
    name: str
    version: str
    alive: bool
    num_clients: int
    num_users: int
    num_subs: int
    num_channels: int
    uptime: int
    metrics: NodeMetrics


class NodeList(Struct):
    nodes: list[NodeInfo]


class Pushed(Struct):
    """The outcome: `queued`, `full`, `closed`, or `forwarded` to another node."""

    status: str


class Mark(Struct):
    """The last event of a node that had happened when the answer was begun."""

    epoch: str
    seq: int


class ConnectionPage(Struct):
    """Connections by their fds in decimal, lowest first. The last page is the one that is empty."""

    connections: dict[str, ConnectionDetails]
    node: str | UnsetType = UNSET
    epoch: str | UnsetType = UNSET
    seq: int | UnsetType = UNSET
    nodes: dict[str, Mark] | UnsetType = UNSET


class ClosedDetails(Struct):
    """The state of a connection right before it ended, and how and when it ended."""

    fd: int
    user: str
    address: str
    transport: str
    protocol: str
    topics: list[str]
    code: int
    reason: str
    initiator: str
    undelivered: int
    closed_at: float
    topic_count: int


class ClosedList(Struct):
    """The last that ended comes first."""

    connections: list[ClosedDetails]


class TraceBegun(Struct):
    trace: str


class TraceRead(Struct):
    entries: list[Entry]
    missed: int
    ended: bool


class HeavyConnection(Struct):
    """For whom much waits, or has gone both ways. `node` is the name of the one that it is on."""

    node: str
    fd: int
    user: str
    address: str
    app_name: str
    app_version: str
    bytes_queued: int
    messages_dropped: int
    bytes_received: int
    bytes_sent: int


class EndedConnection(Struct):
    """How a connection ended, and on which node it was."""

    node: str
    fd: int
    user: str
    address: str
    closed_at: float
    code: int
    reason: str
    initiator: str


class NodeStats(Struct):
    """Of one node: `alive` says whether it has answered; if not there is the `reason`, else all of what
    stands in the sums."""

    node: str
    id: str
    alive: bool
    reason: str | UnsetType = UNSET
    connections: int | UnsetType = UNSET


class Stats(Struct):
    """The state now, and the counts since the start; there are more fields than are named here. They are sums
    over the nodes that have answered, but `node`, `version`, `uptime` and `draining` are those of the node
    that was asked. `nodes` has all nodes, each with its own; with `rows` there are `heaviest` and
    `closed_last`."""

    node: str
    version: str
    uptime: float
    draining: bool
    connections: int
    users: int
    topics: int
    subscriptions: int
    published: int
    delivered: int
    nodes: list[NodeStats]
    heaviest: list[HeavyConnection] | UnsetType = UNSET
    closed_last: list[EndedConnection] | UnsetType = UNSET


class Settings(Struct):
    settings: list[EffectiveSetting]


class Replies(Struct):
    """Of a batch: each command's result under its method's name, or its error."""

    replies: list[dict[str, Any]]
