"""Shared by the tests of this folder."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import h11
import msgspec
import trio

from broker import Broker, Config, ConnectEvent, ConnectReply
from broker.testing import Network, Peer, open_test_broker


def written(document: object) -> Any:
    """As somebody reads it."""
    return msgspec.json.decode(msgspec.json.encode(document))


KEY = "s3cret"


@asynccontextmanager
async def served(**fields: Any) -> AsyncIterator[Network]:
    """A broker with an API key; a client's token is its user."""
    broker = Broker(Config(**{"api_key": KEY, **fields}))

    @broker.on_connect
    async def let_in(event: ConnectEvent) -> ConnectReply:
        return ConnectReply(user=event.token, info={"name": event.token} if event.token else None)

    async with open_test_broker(broker) as net:
        yield net


async def ask(
    net: Network, method: str, body: bytes, key: str | None = KEY, **headers: str
) -> tuple[int, bytes]:
    client = h11.Connection(h11.CLIENT)
    fields = [("Host", "test"), ("Content-Length", str(len(body)))]
    fields += [("Connection", "close")]
    fields += [("X-API-Key", key)] if key is not None else []
    fields += [(name.replace("_", "-"), value) for name, value in headers.items()]
    encoded = [(name.encode(), value.encode("latin-1")) for name, value in fields]
    head = client.send(h11.Request(method="POST", target=f"/api/{method}", headers=encoded))
    sent = client.send(h11.Data(data=body)) if body else b""
    client.send(h11.EndOfMessage())
    assert head is not None
    assert sent is not None
    stream = await net.listener.connect()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.send_all, head + sent)
        async for data in stream:
            client.receive_data(bytes(data))
    client.receive_data(b"")
    await stream.aclose()
    answer = client.next_event()
    assert isinstance(answer, h11.Response)
    got = b""
    while isinstance(event := client.next_event(), h11.Data):
        got += event.data
    return answer.status_code, got


async def call(net: Network, method: str, **params: object) -> Any:
    """The whole JSON answer of one request."""
    status, body = await ask(net, method, msgspec.json.encode(params))
    assert status == 200, body
    return json.loads(body)


async def result(net: Network, method: str, **params: object) -> Any:
    answer = await call(net, method, **params)
    assert "error" not in answer, answer
    return answer["result"]


async def error(net: Network, method: str, **params: object) -> tuple[int, str]:
    answer = await call(net, method, **params)
    return answer["error"]["code"], answer["error"]["message"]


async def listener(net: Network, *topics: str, user: str = "") -> Peer:
    peer = await net.open_client(token=user)
    for topic in topics:
        reply = await peer.request(subscribe={"channel": topic})
        assert "subscribe" in reply, reply
    return peer
