"""A structured-concurrency pub/sub broker over WebSocket, on Trio.

::

    broker = Broker()

    @broker.on_message
    async def answer(connection, frame):
        broker.push(connection.fd, "this is server")

    trio.run(broker.serve)
"""

from broker.app import Broker
from broker.config.settings import Config, TokenRules, TopicPattern, TopicRules, WebhookRules
from broker.core.event_queue import Event, EventKind, EventStatistics
from broker.core.messages import (
    ClientInfo,
    Close,
    ConnectionInfo,
    Delivery,
    Fd,
    Frame,
    Initiator,
    Position,
    Publication,
    PushResult,
)
from broker.errors import (
    BrokerError,
    CloseCode,
    ConfigError,
    Disconnect,
    ErrorCode,
    Lagged,
    Refused,
)
from broker.hooks import (
    ConnectEvent,
    Connection,
    ConnectReply,
    PublishEvent,
    PublishReply,
    ReadEvent,
    SubscribeEvent,
    SubscribeReply,
)
from broker.node import BrokerStatistics
from broker.routing.reader import Reader
from broker.version import VERSION as __version__

__all__ = [
    "Broker",
    "BrokerError",
    "BrokerStatistics",
    "ClientInfo",
    "Close",
    "CloseCode",
    "Config",
    "ConfigError",
    "ConnectEvent",
    "ConnectReply",
    "Connection",
    "ConnectionInfo",
    "Delivery",
    "Disconnect",
    "ErrorCode",
    "Event",
    "EventKind",
    "EventStatistics",
    "Fd",
    "Frame",
    "Initiator",
    "Lagged",
    "Position",
    "Publication",
    "PublishEvent",
    "PublishReply",
    "PushResult",
    "ReadEvent",
    "Reader",
    "Refused",
    "SubscribeEvent",
    "SubscribeReply",
    "TokenRules",
    "TopicPattern",
    "TopicRules",
    "WebhookRules",
    "__version__",
]
