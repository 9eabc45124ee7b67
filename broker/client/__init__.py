"""A Trio client for the broker: the Centrifuge client protocol as JSON over trio-websocket.

::

    async with open_client("ws://localhost:9501") as client:
        async with client.subscribe("news") as subscription:
            await client.publish("news", {"title": "hello"})
            async for publication in subscription:
                print(publication.topic, publication.value)

Rules it keeps:

1. Every task lives in the nursery of `open_client`; nothing outlives the block.
2. Only the writer task writes, so a cancelled call never leaves half a frame on the wire.
3. Nothing that arrived is dropped for a slow consumer: we stop reading instead, and TCP slows
   the broker. While a request waits for its reply we do read on, since the reply is behind
   what was not read yet; so a consumer may call the client from inside its loop.
4. Publications that may have been missed are counted, never hidden: `Subscription.gaps`.
5. A request is sent once. If the connection drops before the reply, the caller decides.
"""

from broker.client.address import OpenStream
from broker.client.client import CONNECT_SECONDS, Client, History, PresenceStats, open_client
from broker.client.link import FRAME_BYTES, OUTBOX_COMMANDS
from broker.client.running import run
from broker.client.subscription import INBOX_MESSAGES, Join, Leave, Messages, Subscription

__all__ = [
    "CONNECT_SECONDS",
    "FRAME_BYTES",
    "INBOX_MESSAGES",
    "OUTBOX_COMMANDS",
    "Client",
    "History",
    "Join",
    "Leave",
    "Messages",
    "OpenStream",
    "PresenceStats",
    "Subscription",
    "open_client",
    "run",
]
