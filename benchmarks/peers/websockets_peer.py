"""Fan-out on websockets and uvloop with its own `broadcast`, compression and pings off.

What a publisher sends at /pub/TOPIC goes to those at /sub/TOPIC. Nothing is parsed, kept, counted
or bounded. With the files of a certificate and its key behind the port it is all over TLS.
"""

import asyncio
import ssl
import sys
from collections import defaultdict

import uvloop
from websockets.asyncio.server import ServerConnection, broadcast, serve

subscribers: defaultdict[str, set[ServerConnection]] = defaultdict(set)


async def handle(connection: ServerConnection) -> None:
    assert connection.request is not None
    _, role, topic = connection.request.path.split("/")
    if role == "sub":
        subscribers[topic].add(connection)
        try:
            await connection.wait_closed()
        finally:
            subscribers[topic].discard(connection)
    else:
        audience = subscribers[topic]
        async for message in connection:
            broadcast(audience, message)


async def main(port: int, *files: str) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH) if files else None
    if context is not None:
        context.load_cert_chain(*files)
    async with serve(
        *(handle, "127.0.0.1", port),
        ssl=context,
        compression=None, ping_interval=None, backlog=4096, max_queue=1024,
    ):  # fmt: skip
        await asyncio.get_running_loop().create_future()


uvloop.run(main(int(sys.argv[1]), *sys.argv[2:]))
