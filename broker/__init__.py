"""A structured-concurrency pub/sub broker over WebSocket, on Trio.

::

    broker = Broker()

    @broker.on_message
    async def answer(connection, frame):
        broker.push(connection.fd, "this is server")

    broker.run()
"""

from importlib import import_module
from typing import TYPE_CHECKING

from broker.version import VERSION as __version__

if TYPE_CHECKING:
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
        Opcode,
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
        Handshake,
        HandshakeReply,
        PublishEvent,
        PublishReply,
        ReadEvent,
        SubscribeEvent,
        SubscribeReply,
    )
    from broker.routing.reader import Reader
    from broker.session.figures import BrokerStatistics

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
    "Handshake",
    "HandshakeReply",
    "Initiator",
    "Lagged",
    "Opcode",
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

# Loaded when first asked for: `python -m broker` obeys signals before this takes its half second.
# Light modules come first, so that `from broker import ConfigError` does not load the whole.
_HOMES = (
    *("broker.errors", "broker.core.messages", "broker.core.event_queue"),
    *(
        "broker.config.settings",
        "broker.hooks",
        "broker.routing.reader",
        "broker.node",
        "broker.app",
    ),
)


if not TYPE_CHECKING:  # a checker that saw it would take any name for one of ours

    def __getattr__(name: str) -> object:
        if name in __all__:
            for home in _HOMES:
                module = import_module(home)
                if hasattr(module, name):
                    # From now on it is a plain attribute.
                    return globals().setdefault(name, getattr(module, name))
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
